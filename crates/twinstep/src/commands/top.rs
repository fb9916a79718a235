//! `twinstep top`: all VMs of this user on the whole terminal, refreshed each second. All drawing is here; what is drawn comes from `host`'s `status::view`.
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use clap::Args;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph};
use twinstep_host::control::folder;
use twinstep_host::error::Error;
use twinstep_host::events::Kept;
use twinstep_host::signals::Signals;
use twinstep_host::status::view::{self, Seen};
use twinstep_host::status::{Status, words};

/// Time between two questions to the VMs.
const REFRESH: Duration = Duration::from_secs(1);
/// How long a key is waited for before the screen is looked after again.
const KEY_PATIENCE: Duration = Duration::from_millis(100);

#[derive(Args)]
pub struct Arguments {
    /// The VM to look at first [default: the first one]
    vm: Option<String>,
}

pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    if !std::io::stdout().is_terminal() {
        let what = "`twinstep top` draws on a terminal, and standard output is none";
        return Err(Error::new(what).next("use `twinstep status` (with --json for programs)").into());
    }
    let folder = folder::of_this_user();
    // Folders that are not safe are refused before the screen is taken.
    folder::is_there(&folder)?;
    let end = Arc::new(AtomicBool::new(false));
    let told = end.clone();
    Signals::take()?.listen(move |_| told.store(true, Ordering::Relaxed));
    let news = ask_each_second(&folder)?;
    let mut terminal = ratatui::try_init()?;
    let mut view = View { chosen: arguments.vm, ..View::default() };
    let shown = loop {
        while let Ok(seen) = news.try_recv() {
            view.update(seen);
        }
        if let Err(e) = terminal.draw(|frame| view.draw(frame)) {
            break Err(e);
        }
        match key() {
            Ok(Key::Quit) => break Ok(()),
            Ok(Key::Move(by)) => view.choose(by),
            Ok(Key::Other) => {}
            Err(e) => break Err(e),
        }
        if end.load(Ordering::Relaxed) {
            break Ok(());
        }
    };
    ratatui::try_restore()?;
    shown?;
    Ok(ExitCode::SUCCESS)
}

/// What was pressed.
enum Key {
    Quit,
    /// Up or down in the list.
    Move(isize),
    Other,
}

/// Waits a moment for a key.
fn key() -> std::io::Result<Key> {
    if !event::poll(KEY_PATIENCE)? {
        return Ok(Key::Other);
    }
    let Event::Key(key) = event::read()? else { return Ok(Key::Other) };
    if key.kind == KeyEventKind::Release {
        return Ok(Key::Other);
    }
    Ok(match key.code {
        KeyCode::Char('q') | KeyCode::Esc => Key::Quit,
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Key::Quit,
        KeyCode::Up | KeyCode::Left | KeyCode::Char('k') => Key::Move(-1),
        KeyCode::Down | KeyCode::Right | KeyCode::Char('j') => Key::Move(1),
        _ => Key::Other,
    })
}

type News = std::result::Result<Vec<Seen>, String>;

/// Asks on a thread of its own, so that a VM that hangs does not stop the keys.
fn ask_each_second(folder: &Path) -> anyhow::Result<Receiver<News>> {
    let (to, news) = channel();
    let folder = folder.to_owned();
    let ask = move || {
        loop {
            let started = Instant::now();
            if to.send(view::all(&folder).map_err(|e| e.to_string())).is_err() {
                return;
            }
            std::thread::sleep(REFRESH.saturating_sub(started.elapsed()));
        }
    };
    std::thread::Builder::new().name("ask".into()).spawn(ask)?;
    Ok(news)
}

/// What is on the screen.
#[derive(Default)]
struct View {
    seen: Vec<Seen>,
    /// The VM that is looked at, by name: others come and go.
    chosen: Option<String>,
    /// Why nothing could be asked.
    trouble: Option<String>,
    asked: bool,
}

const BRIGHT: Style = Style::new().add_modifier(Modifier::BOLD);
const FAINT: Style = Style::new().fg(Color::DarkGray);

/// What a state is worth, as a colour.
fn colour(state: &str) -> Style {
    Style::new().fg(match state {
        "protected" | "following" => Color::Green,
        "deciding" | "consuming" | "copying" | "greeting" => Color::Yellow,
        "stopped" => Color::Red,
        _ => Color::Reset,
    })
}

impl View {
    fn update(&mut self, news: News) {
        self.asked = true;
        match news {
            Ok(seen) => (self.seen, self.trouble) = (seen, None),
            Err(why) => self.trouble = Some(why),
        }
    }
    /// Where the chosen one is in the list; the first, if it is gone.
    fn place(&self) -> usize {
        self.seen.iter().position(|seen| Some(&seen.name) == self.chosen.as_ref()).unwrap_or(0)
    }
    fn choose(&mut self, by: isize) {
        let place = self.place().saturating_add_signed(by).min(self.seen.len().saturating_sub(1));
        self.chosen = self.seen.get(place).map(|seen| seen.name.clone());
    }

    fn draw(&self, frame: &mut Frame) {
        let list = (self.seen.len() as u16).clamp(1, 10) + 3 + u16::from(self.trouble.is_some());
        let rows = self.sides().iter().map(|side| words::rows(side).len() as u16).max().unwrap_or(0);
        let areas = [Constraint::Length(list), Constraint::Length(rows + 2), Constraint::Min(3), Constraint::Length(1)];
        let [list, sides, events, keys] = Layout::vertical(areas).areas(frame.area());
        self.draw_list(frame, list);
        if let Some(seen) = self.seen.get(self.place()) {
            let side = self.sides();
            let places = Layout::horizontal(vec![Constraint::Fill(1); side.len()]).split(sides);
            side.iter().zip(places.iter()).for_each(|(side, place)| draw_side(frame, *place, side));
            if let Ok((_, said)) = &seen.answer {
                draw_events(frame, events, &seen.name, said);
            }
        }
        frame.render_widget(Line::styled(" q quits, arrows choose", FAINT), keys);
    }

    fn draw_list(&self, frame: &mut Frame, area: Rect) {
        let mut lines = vec![Line::styled(format!("  {}", words::head()), FAINT)];
        let room = usize::from(area.height.saturating_sub(3 + u16::from(self.trouble.is_some()))).max(1);
        let place = self.place();
        // The chosen one is always in sight.
        let first = (place + 1).saturating_sub(room);
        for (at, seen) in self.seen.iter().enumerate().skip(first).take(room) {
            let (text, style) = match &seen.answer {
                Ok((status, _)) => (words::line(status), colour(&status.state)),
                Err(why) => (format!("{:<20} {}", seen.name, why.what()), Style::new().fg(Color::Red)),
            };
            let chosen = at == place;
            let style = if chosen { style.patch(BRIGHT) } else { style };
            lines.push(Line::styled(format!("{} {text}", if chosen { '>' } else { ' ' }), style));
        }
        if let Some(why) = &self.trouble {
            lines.push(Line::styled(format!("  {why}"), Style::new().fg(Color::Red)));
        } else if self.asked && self.seen.is_empty() {
            lines.push(Line::raw("  no VM runs here: start one with `twinstep run`; this sees VMs of the same user only"));
        }
        frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" twinstep ")), area);
    }

    /// The chosen VM, and its other side if that runs here.
    fn sides(&self) -> Vec<&Status> {
        let place = self.place();
        let places = std::iter::once(place).chain(view::partners(&self.seen).get(&place).copied());
        places.filter_map(|at| Some(&self.seen.get(at)?.answer.as_ref().ok()?.0)).collect()
    }
}

fn draw_side(frame: &mut Frame, area: Rect, status: &Status) {
    let lines: Vec<Line> = words::rows(status)
        .into_iter()
        .map(|(name, value)| {
            let style = if name == "state" { colour(&status.state).patch(BRIGHT) } else { Style::new() };
            Line::from(vec![Span::styled(format!("{name:<0$} ", words::NAME), FAINT), Span::styled(value, style)])
        })
        .collect();
    let title = format!(" {} (process {}, {}) ", status.name, status.pid, status.side);
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(title)), area);
}

fn draw_events(frame: &mut Frame, area: Rect, name: &str, events: &[Kept]) {
    let room = usize::from(area.height.saturating_sub(2));
    let last = &events[events.len().saturating_sub(room)..];
    let lines: Vec<Line> = last.iter().map(|event| Line::raw(words::event(event))).collect();
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(format!(" events of {name} "))), area);
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn seen(name: &str, side: &str, state: &str, vm: Option<&str>) -> Seen {
        let status = Status {
            name: name.into(),
            side: side.into(),
            state: state.into(),
            vm: vm.map(str::to_owned),
            epoch: vm.map(|_| 1),
            ..Status::default()
        };
        let event = twinstep_host::events::Event {
            at_ns: 1,
            side: side.into(),
            what: "notice".into(),
            text: format!("{name} was here"),
            figures: Default::default(),
        };
        Seen { name: name.into(), answer: Ok((status, vec![Kept { number: 1, times: 1, unix_ms: 0, event }])) }
    }

    fn screen(view: &View, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn the_chosen_vm_with_both_sides() {
        let mut view = View::default();
        assert!(!screen(&view, 100, 30).contains("no VM runs here"), "nobody was asked yet");
        view.update(Ok(Vec::new()));
        assert!(screen(&view, 100, 30).contains("no VM runs here"));
        let lost = Seen { name: "lost".into(), answer: Err(Error::new("the VM 'lost' does not answer")) };
        view.update(Ok(vec![
            seen("db", "primary", "protected", Some("cafe")),
            seen("db2", "standby", "following", Some("cafe")),
            lost,
            seen("web", "alone", "unprotected", None),
        ]));
        let shown = screen(&view, 120, 36);
        for part in [
            "> db ",
            "db2 ",
            "the VM 'lost' does not answer",
            "db (process 0, primary)",
            "db2 (process 0, standby)",
            "db was here",
        ] {
            assert!(shown.contains(part), "'{part}' is not shown:\n{shown}");
        }
        view.choose(-1);
        assert_eq!(view.place(), 0);
        (0..9).for_each(|_| view.choose(1));
        let shown = screen(&view, 120, 36);
        assert!(shown.contains("> web ") && shown.contains("web was here") && !shown.contains("db2 (process"), "{shown}");
        // It is gone: the first one is looked at.
        view.update(Ok(vec![seen("db", "primary", "protected", Some("cafe"))]));
        assert!(screen(&view, 120, 36).contains("> db "));
        view.update(Err("the folder is not safe".into()));
        let shown = screen(&view, 120, 36);
        assert!(shown.contains("the folder is not safe") && shown.contains("> db "), "{shown}");
    }

    #[test]
    fn any_size_and_any_number() {
        let mut view = View::default();
        view.update(Ok((0..40).map(|n| seen(&format!("vm{n}"), "alone", "unprotected", None)).collect()));
        (0..39).for_each(|_| view.choose(1));
        for (width, height) in [(1, 1), (10, 4), (40, 12), (80, 24), (300, 100)] {
            let shown = screen(&view, width, height);
            assert!(height < 24 || shown.contains("> vm39"), "{shown}");
        }
    }
}
