//! Running many cases on both sides, and making failures small.
use crate::case::{Case, Program, listing};
use crate::compare;
use crate::forms::{self, Form, Level};
use crate::generate;
use crate::guest::Guest;
use crate::layout::{BREAKPOINT, IMAGE};
use crate::native::{BATCH, Native, Slot};
use crate::prng::Rng;
use crate::rep;
use iced_x86::Code;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Which cases to run.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    pub seed: u64,
    pub first: u64,
    pub cases: u64,
    pub level: Level,
}

/// Looks at a case that the silicon has run: says what is wrong with it.
pub trait Judge {
    /// Appends a line a difference. `lane` makes its own random choices repeatable.
    fn judge(&mut self, case: &Case, program: &Program, template: &[u8; IMAGE], slot: &Slot, lane: u64, out: &mut Vec<String>);
}

struct Failure {
    index: u64,
    text: String,
    summary: String,
}

/// What became of the cases of one form.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    cases: u64,
    /// Ran to the final trap.
    ended: u64,
    failed: u64,
}

#[derive(Default)]
struct Results {
    tallies: BTreeMap<usize, Tally>,
    /// The first few of each form.
    failures: BTreeMap<usize, Vec<Failure>>,
}

/// Failures of one form that are made small and kept.
const KEPT: usize = 2;
/// Cases of a form from which on it counts as covered only if some ran to the end.
const ENOUGH: u64 = 20;

/// Runs cases on all processors.
///
/// # Panics
/// If any case fails, if a known gap is none, or if a form never comes to its end.
pub fn check(settings: Settings, narrow: bool, judge: &(dyn Fn() -> Box<dyn Judge> + Sync)) {
    let forms = forms::compared(settings.level, narrow);
    let around = forms::around(settings.level, narrow);
    let ordinary: Vec<Form> = around.into_iter().filter(|f| known_gap(f.code).is_none()).collect();
    println!("{:?} seed {} cases {}..{}", settings.level, settings.seed, settings.first, settings.first + settings.cases);
    let next = AtomicU64::new(settings.first / BATCH as u64);
    let end = settings.first + settings.cases;
    let results = Mutex::new(Results::default());
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get());
    // All children before any engine: they inherit whatever is mapped, and an engine maps low addresses.
    let natives: Vec<Native> = (0..threads).map(|_| Native::start()).collect();
    let (next, results, ordinary, all) = (&next, &results, &ordinary, &forms);
    std::thread::scope(|scope| {
        for native in natives {
            scope.spawn(move || {
                let mut worker = Worker {
                    native,
                    judge: judge(),
                    ordinary,
                    narrow,
                    seed: settings.seed,
                    first: settings.first,
                    level: settings.level,
                };
                loop {
                    let batch = next.fetch_add(1, Relaxed);
                    if batch * BATCH as u64 >= end {
                        break;
                    }
                    worker.batch(batch, end, all, results);
                }
            });
        }
    });
    report(&forms, &results.lock().expect("no worker panicked"), settings, narrow);
}

fn known_gap(code: Code) -> Option<&'static str> {
    forms::KNOWN_GAPS.iter().find(|(codes, _)| codes.contains(&code)).map(|(_, reason)| *reason)
}

struct Worker<'a> {
    native: Native,
    judge: Box<dyn Judge>,
    /// Forms to surround a case with.
    ordinary: &'a [Form],
    /// 32-bit code.
    narrow: bool,
    seed: u64,
    /// Cases before this one are left out.
    first: u64,
    level: Level,
}

impl Worker<'_> {
    fn batch(&mut self, batch: u64, end: u64, forms: &[Form], results: &Mutex<Results>) {
        let template = generate::template(&mut Rng::new(self.seed, !batch));
        self.native.shared().template = *template;
        let first = batch * BATCH as u64;
        let mut cases = Vec::new();
        for index in first.max(self.first)..end.min(first + BATCH as u64) {
            let form = forms[(index % forms.len() as u64) as usize];
            let mut rng = Rng::new(self.seed, index);
            let case = generate::case(&mut rng, self.ordinary, form, self.level, self.narrow);
            let program = case.assemble().expect("assembled before");
            fill(&mut self.native.shared().slots[cases.len()], &case, &program, index);
            cases.push((index, form, case, program));
        }
        self.native.run(cases.len());
        let mut failed = Vec::new();
        for (i, (index, form, case, program)) in cases.into_iter().enumerate() {
            let mut differences = Vec::new();
            self.judge.judge(&case, &program, &template, &self.native.shared().slots[i], index, &mut differences);
            if !differences.is_empty() && self.asked_again(i) {
                differences.clear();
                self.judge.judge(&case, &program, &template, &self.native.shared().slots[i], index, &mut differences);
            }
            let slot = &self.native.shared().slots[i];
            let ended = slot.end.vector == BREAKPOINT && slot.end.regs.rip == program.at[case.items.len()] + 1;
            let mut results = results.lock().expect("no worker panicked");
            let tally = results.tallies.entry(form.code as usize).or_default();
            tally.cases += 1;
            tally.ended += u64::from(ended);
            if !differences.is_empty() {
                tally.failed += 1;
                if tally.failed <= KEPT as u64 {
                    failed.push((index, case, differences));
                }
            }
        }
        for (index, case, differences) in failed {
            let failure = self.explain(index, case, differences, &template);
            let mut results = results.lock().expect("no worker panicked");
            results.failures.entry(failure.1 as usize).or_default().push(failure.0);
        }
    }

    /// Runs slot `i` on the silicon once more. Answers whether it says something else now: kernels of virtual hosts lose a single step of 32-bit
    /// code now and then.
    fn asked_again(&mut self, i: usize) -> bool {
        let answer = |s: &Slot| (s.end, s.stepped_end, s.stepped_positions, s.picture_taken, s.picture);
        let shared = self.native.shared();
        let before = answer(&shared.slots[i]);
        self.native.run_one(i);
        answer(&self.native.shared().slots[i]) != before
    }

    /// Runs one case on both sides.
    fn once(&mut self, case: &Case, index: u64, template: &[u8; IMAGE]) -> Option<Vec<String>> {
        let program = case.assemble()?;
        fill(&mut self.native.shared().slots[0], case, &program, index);
        self.native.run(1);
        let mut differences = Vec::new();
        self.judge.judge(case, &program, template, &self.native.shared().slots[0], index, &mut differences);
        Some(differences)
    }

    /// Drops instructions as long as it fails, and tells the story.
    fn explain(&mut self, index: u64, mut case: Case, mut differences: Vec<String>, template: &[u8; IMAGE]) -> (Failure, Code) {
        let focus = case.focus;
        let mut i = 0;
        while i < case.items.len() {
            let smaller = case.without(i).and_then(|c| Some((self.once(&c, index, template).filter(|d| !d.is_empty())?, c)));
            if let Some((still, c)) = smaller {
                (case, differences) = (c, still);
                i = 0;
            } else {
                i += 1;
            }
        }
        let program = case.assemble().expect("it ran");
        let text = format!(
            "case {index} about {focus:?}, cpl {}, segments {:x?}:\n{}start:\n{}pokes {:x?}\ndifferences:\n  {}\nrun it alone: TWINSTEP_SEED={} TWINSTEP_FIRST={index} TWINSTEP_CASES=1\n",
            case.cpl,
            case.segments.all.map(|d| (d.selector, d.raw)),
            listing(&case, &program),
            compare::start(&program.init),
            program.pokes.iter().map(|(at, bytes)| (at, &bytes[..bytes.len().min(32)])).collect::<Vec<_>>(),
            differences.join("\n  "),
            self.seed
        );
        let codes: Vec<String> = case.items.iter().map(|item| format!("{:?}", item.instruction.code())).collect();
        let summary = format!("{} | {}", codes.join(" ; "), differences.first().map_or("", |d| d.as_str()));
        (Failure { index, text, summary }, focus)
    }
}

fn fill(slot: &mut Slot, case: &Case, program: &Program, index: u64) {
    slot.init = program.init;
    slot.segments = program.segments;
    slot.code_at = case.code_at as u32;
    slot.code_len = program.bytes.len() as u32;
    slot.code[..program.bytes.len()].copy_from_slice(&program.bytes);
    slot.poke_count = program.pokes.len() as u32;
    for (poke, (at, bytes)) in slot.pokes.iter_mut().zip(&program.pokes) {
        poke.at = *at as u32;
        poke.len = bytes.len() as u32;
        poke.bytes[..bytes.len()].copy_from_slice(bytes);
    }
    slot.single_step = u32::from(case.stepping);
    slot.picture_at = Rng::new(index, 77).below(case.items.len() as u64 + 1);
    slot.picture_taken = 0;
}

fn report(forms: &[Form], results: &Results, settings: Settings, narrow: bool) {
    let cases: u64 = results.tallies.values().map(|t| t.cases).sum();
    let failed: u64 = results.tallies.values().map(|t| t.failed).sum();
    let ended: u64 = results.tallies.values().map(|t| t.ended).sum();
    println!(
        "{cases} cases about {} of {} forms ({} more are not compared, see forms.rs); {ended} ran to the end, {failed} failed",
        results.tallies.len(),
        forms.len(),
        forms::skipped(narrow)
    );
    if std::env::var_os("TWINSTEP_COVERAGE").is_some() {
        for form in forms {
            let tally = results.tallies.get(&(form.code as usize)).copied().unwrap_or_default();
            println!("compared: {:?}: {} cases, {} to the end", form.code, tally.cases, tally.ended);
        }
        print!("{}", forms::tables());
    }
    let mut wrong = Vec::new();
    for form in forms {
        let tally = results.tallies.get(&(form.code as usize)).copied().unwrap_or_default();
        if let Some(reason) = known_gap(form.code) {
            if tally.cases >= ENOUGH && tally.failed == 0 {
                wrong.push(format!("{:?} is a known gap ({reason}) but agrees: take it out of KNOWN_GAPS", form.code));
            }
            continue;
        }
        if tally.failed > 0 {
            wrong.push(format!("{:?}: {} of {} cases", form.code, tally.failed, tally.cases));
            for failure in &results.failures[&(form.code as usize)] {
                wrong.push(format!("    case {} {}", failure.index, failure.summary));
            }
        }
        if tally.cases >= ENOUGH && tally.ended == 0 && !form.faulting {
            wrong
                .push(format!("{:?} never ran to the end in {} cases: its operands are not well chosen", form.code, tally.cases));
        }
    }
    if wrong.is_empty() {
        return;
    }
    let first: Vec<&str> = results.failures.values().flatten().take(3).map(|f| f.text.as_str()).collect();
    panic!("seed {}:\n{}\n{}", settings.seed, first.join("\n"), wrong.join("\n"));
}

/// The silicon against itself, in another process.
pub fn against_itself() -> Box<dyn Judge> {
    Box::new(Itself(Native::start()))
}

struct Itself(Native);

impl Judge for Itself {
    fn judge(&mut self, case: &Case, program: &Program, template: &[u8; IMAGE], slot: &Slot, lane: u64, out: &mut Vec<String>) {
        compare::stepping(case, program, slot, out);
        let shared = self.0.shared();
        shared.template = *template;
        fill(&mut shared.slots[0], case, program, lane);
        self.0.run(1);
        let second = &self.0.shared().slots[0];
        compare::outcomes(case, program, &slot.end, &second.end, out);
        compare::images(case, program, &slot.end, &slot.memory, &second.memory, out);
        if let (Some(counted), true) = (straight_positions(case, program, slot), case.stepping)
            && counted != slot.stepped_positions
        {
            out.push(format!("positions: {counted} counted, {} steps", slot.stepped_positions));
        }
    }
}

/// Positions passed before the exception that ended the case, where that can be told without stepping.
fn straight_positions(case: &Case, program: &Program, slot: &Slot) -> Option<u64> {
    let ended = program.at.iter().position(|&at| at == slot.end.regs.rip);
    if let Some(mask) = case.rep_mask {
        let iterations = slot.init.gpr[1].wrapping_sub(slot.end.regs.gpr[1]) & mask;
        return Some(rep::positions(iterations, slot.end.vector == BREAKPOINT));
    }
    let item = &case.items;
    let straight =
        item.iter().all(|i| i.target.is_none() && !i.instruction.has_rep_prefix() && !i.instruction.has_repne_prefix());
    if !straight || !case.addresses.is_empty() {
        return None;
    }
    if slot.end.vector == BREAKPOINT && slot.end.regs.rip == program.at[item.len()] + 1 {
        return Some(item.len() as u64);
    }
    // A trap points behind its instruction.
    let trap = matches!(slot.end.vector, 1 | BREAKPOINT | 4);
    ended.and_then(|n| (n as u64).checked_sub(u64::from(trap)))
}

/// The engine against the silicon.
pub fn against_engine(level: Level) -> Box<dyn Judge> {
    Box::new(Engine { guests: [64, 1, 2, 3, 7].map(|max_block| Guest::new(max_block, level)) })
}

struct Engine {
    guests: [Guest; 5],
}

impl Judge for Engine {
    fn judge(&mut self, case: &Case, program: &Program, template: &[u8; IMAGE], slot: &Slot, lane: u64, out: &mut Vec<String>) {
        let mut rng = Rng::new(lane, 99);
        let expected = if case.stepping { Some(slot.stepped_positions) } else { straight_positions(case, program, slot) };
        let base = rng.below(1 << 40);
        let limit = base + expected.unwrap_or(10_000) + 50;
        // The trap that ends a case has retired, and so has the handler's HLT.
        let traps = matches!(slot.end.vector, 1 | BREAKPOINT | 4);
        let expected_end = expected.map(|n| base + n + u64::from(traps) + 1);
        let others = 2 + rng.below(3) as usize;
        for (how, which) in
            [(How::Picture, 0), (How::Straight, 1), (How::Sliced, others), (How::Interrupted, (lane % 5) as usize)]
        {
            let mut interrupts = 0;
            let guest = &mut self.guests[which];
            let mut found = Vec::new();
            guest.load(template, program, case.code_at, case.cpl, base);
            let mut end = None;
            match how {
                How::Picture if slot.picture_taken != 0 && case.stepping => {
                    end = guest.run(base + slot.picture_at);
                    if end.is_some() {
                        found.push(format!("ended before position {}", slot.picture_at));
                    } else {
                        compare::picture(case, slot, &guest.regs(), guest.image(), &mut found);
                        if !found.is_empty() {
                            found.insert(0, format!("at position {}:", slot.picture_at));
                        }
                    }
                }
                How::Interrupted => {
                    while end.is_none() && guest.position() < limit + interrupts {
                        let until = guest.position() + rng.below(6);
                        end = guest.run(until);
                        interrupts += u64::from(end.is_none() && guest.interrupt());
                    }
                }
                How::Sliced => {
                    while end.is_none() && guest.position() < limit {
                        let until = guest.position() + rng.below(4);
                        end = guest.run(until);
                        if end.is_none() && rng.chance(10) {
                            guest.go_cold();
                        }
                    }
                }
                _ => {}
            }
            if found.is_empty() {
                let end = end.unwrap_or_else(|| guest.finish(limit + interrupts));
                compare::outcomes(case, program, &slot.end, &end, &mut found);
                compare::images(case, program, &slot.end, &slot.memory, guest.image(), &mut found);
                if let Some(expected) = expected_end
                    && guest.position() != expected + interrupts
                {
                    let expected = expected + interrupts;
                    found.push(format!(
                        "position: {} expected, {} counted",
                        expected - base,
                        guest.position().wrapping_sub(base)
                    ));
                }
            }
            if !found.is_empty() {
                found[0] += &format!(" [{how:?}, blocks of {}]", guest.max_block);
                out.extend(found);
                return;
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum How {
    /// Stopped once where the silicon took its picture.
    Picture,
    /// In one go.
    Straight,
    /// Interrupted at random positions by a handler that returns at once.
    Interrupted,
    /// In many short runs, some of them from cold caches.
    Sliced,
}
