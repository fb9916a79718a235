//! Record, replay, compare: with a machine small enough to see through.
mod common;
use proptest::prelude::*;
use std::io::Cursor;
use twinstep_log::image::{PAGE_BYTES, read_image};
use twinstep_log::*;
use twinstep_machine::{Input, Output};
use xxhash_rust::xxh3::xxh3_64;

/// A machine that mixes its state a step an instruction, and now and then sends something that depends on it. It halts at every
/// multiple of 1000 instructions until it gets an input.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Toy {
    position: u64,
    a: u64,
    b: u64,
    rate: u32,
    halted: bool,
    outputs: Vec<(u64, Output)>,
    /// What goes wrong, and at which position.
    fault: Option<(u64, Fault)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    State,
    LoseOutput,
    ExtraOutput,
    LateOutput,
    OtherPort,
    LongerOutput,
    OtherBytes,
    Stop,
    RefuseInput,
}

impl Toy {
    fn fault_here(&self) -> Option<Fault> {
        self.fault.filter(|(position, _)| *position == self.position).map(|(_, fault)| fault)
    }

    fn sends(position: u64) -> bool {
        position.is_multiple_of(97)
    }

    fn instruction(&mut self) {
        self.position += 1;
        self.a = (self.a ^ self.b.rotate_left(17)).wrapping_mul(6364136223846793005).wrapping_add(u64::from(self.rate));
        self.b = self.b.wrapping_add(self.a >> 7) ^ self.position;
        self.halted = self.position.is_multiple_of(1000);
        if self.fault_here() == Some(Fault::State) {
            self.b ^= 1 << 40;
        }
        let late = self.fault.is_some_and(|(position, fault)| fault == Fault::LateOutput && position + 1 == self.position);
        let mut sends = Self::sends(self.position) || late;
        let mut frame = self.a.to_le_bytes().to_vec();
        let mut nic = 0;
        match self.fault_here() {
            Some(Fault::LoseOutput | Fault::LateOutput) => sends = false,
            Some(Fault::ExtraOutput) => self.outputs.push((self.position, Output::Serial(vec![1]))),
            Some(Fault::OtherPort) => nic = 1,
            Some(Fault::LongerOutput) => frame.push(0),
            Some(Fault::OtherBytes) => frame[3] ^= 1,
            _ => {}
        }
        if sends {
            self.outputs.push((self.position, Output::NetTx { nic, frame }));
        }
    }
}

impl Replayable for Toy {
    fn position(&self) -> u64 {
        self.position
    }
    fn run_to(&mut self, position: u64) -> RunOutcome {
        while self.position < position {
            if self.fault_here() == Some(Fault::Stop) {
                return RunOutcome::Stopped("triple fault".into());
            }
            if self.halted {
                return RunOutcome::Waiting;
            }
            self.instruction();
        }
        RunOutcome::Reached
    }
    fn input(&mut self, input: Input) -> Result<(), String> {
        if let Some((position, Fault::RefuseInput)) = self.fault
            && self.position >= position
        {
            return Err("there is no network card 1".into());
        }
        self.halted = false;
        match input {
            Input::Clock { advance_to_ns, picoseconds_per_instruction } => {
                self.a ^= advance_to_ns;
                self.rate = picoseconds_per_instruction;
            }
            Input::NetRx { nic, frame } => self.b ^= xxh3_64(&frame) + u64::from(nic),
            // An input that makes an output at its own position: an echo.
            Input::Serial(bytes) => self.outputs.push((self.position, Output::Serial(bytes))),
            other => self.a ^= xxh3_64(format!("{other:?}").as_bytes()),
        }
        Ok(())
    }
    fn take_outputs(&mut self) -> Vec<(u64, Output)> {
        std::mem::take(&mut self.outputs)
    }
    fn digest(&mut self) -> Vec<u8> {
        [self.a, self.b].iter().flat_map(|word| word.to_le_bytes()).collect()
    }
    fn explain(&self, ours: &[u8], recorded: &[u8]) -> String {
        let differs = |range: std::ops::Range<usize>| ours.get(range.clone()) != recorded.get(range);
        ["a", "b"][usize::from(!differs(0..8))].to_owned()
    }
}

/// Runs a machine in slices, gives it these inputs between them, and notes everything.
fn record(machine: &mut Toy, slices: &[(u64, Vec<Input>)], digest_interval: u64) -> (Vec<Entry>, Vec<(u64, Output)>) {
    let mut recorder = Recorder::new(machine.position, digest_interval);
    let (mut log, mut outputs) = (Vec::new(), Vec::new());
    let mut note_outputs = |machine: &mut Toy, recorder: &mut Recorder, log: &mut Vec<Entry>| {
        for (position, output) in machine.take_outputs() {
            log.push(recorder.output(position, &output).unwrap());
            outputs.push((position, output));
        }
    };
    for (length, inputs) in slices {
        let slice_end = machine.position + length;
        loop {
            let stop = recorder.next_digest().map_or(slice_end, |digest| digest.min(slice_end));
            let outcome = machine.run_to(stop);
            note_outputs(machine, &mut recorder, &mut log);
            if recorder.digest_due(machine.position) {
                log.push(recorder.digest(machine.position, machine.digest()).unwrap());
            }
            if machine.position == slice_end || outcome == RunOutcome::Waiting {
                break;
            }
        }
        for input in inputs {
            log.push(recorder.input(machine.position, input.clone()).unwrap());
            machine.input(input.clone()).unwrap();
        }
        note_outputs(machine, &mut recorder, &mut log);
        log.extend(recorder.progress(machine.position).unwrap());
    }
    log.push(recorder.end(machine.position, EndReason::Stopped).unwrap());
    let bytes: usize = log.iter().map(encoded_length).sum();
    assert_eq!(recorder.stats().total().bytes, bytes as u64);
    (log, outputs)
}

/// A machine that ran, with an input of every kind and nothing left out.
fn recorded() -> (Toy, Toy, Vec<Entry>, Vec<(u64, Output)>) {
    recorded_with(None)
}

/// The same, to which something happens.
fn recorded_with(fault: Option<(u64, Fault)>) -> (Toy, Toy, Vec<Entry>, Vec<(u64, Output)>) {
    let start = Toy { a: 1, b: 2, rate: 3, fault, ..Toy::default() };
    let mut machine = start.clone();
    let clock = |time| Input::Clock { advance_to_ns: time, picoseconds_per_instruction: 1000 };
    let slices: Vec<(u64, Vec<Input>)> = (0..60u64)
        .map(|index| {
            let input = match index % 5 {
                0 => Input::NetRx { nic: 0, frame: vec![index as u8; 60] },
                1 => Input::Serial(b"ls\n".to_vec()),
                2 => Input::Seed([index as u8; 32]),
                _ => clock(index * 1_000_000),
            };
            (index * 7 % 150, vec![clock(index), input])
        })
        .collect();
    let (log, outputs) = record(&mut machine, &slices, 100);
    assert!(machine.position > 3000 && outputs.len() > 30);
    (start, machine, log, outputs)
}

fn replay(machine: &mut Toy, log: &[Entry], until: Option<u64>) -> (Result<Report, Divergence>, Vec<(u64, Output)>) {
    let mut entries = log.iter().cloned();
    let mut outputs = Vec::new();
    let mut replayer = Replayer::new(machine.position, ReplayOptions::default());
    let result = replayer.run(machine, until, || Ok(entries.next()), |position, output| outputs.push((position, output)));
    let result = result.map_err(|error| match error {
        ReplayError::Divergence(divergence) => divergence,
        ReplayError::Read(error) => panic!("{error}"),
    });
    (result, outputs)
}

#[test]
fn a_replay_is_the_same() {
    let (start, recorded_machine, log, recorded_outputs) = recorded();
    let mut machine = start.clone();
    let (report, outputs) = replay(&mut machine, &log, None);
    assert_eq!(machine, recorded_machine);
    assert_eq!(outputs, recorded_outputs);
    let report = report.unwrap();
    assert_eq!(report.outputs_checked, outputs.len() as u64);
    assert_eq!(report.digests_checked, machine.position / 100);
    assert_eq!(report.last_agreed, Some(machine.position / 100 * 100));
    assert_eq!(report.entries.total().entries, log.len() as u64);
    assert_eq!((report.start, report.position), (0, machine.position));
    assert_eq!(report.end, Some(EndReason::Stopped));
    assert!(report.to_string().starts_with(&format!("replayed positions 0 to {}: ", machine.position)));
}

/// Through a file, from an image, as `record` and `replay` do it.
#[test]
fn a_recording_replays() {
    let (start, recorded_machine, log, _) = recorded();
    let image = ImageMetadata { ram_pages: 1, position: start.position, ..ImageMetadata::default() };
    let mut recording = RecordingStart::new(Vec::new(), &RecordingMetadata::default(), &image, Compression::Lz4).unwrap();
    let mut page = [0; PAGE_BYTES];
    page[..8].copy_from_slice(&start.a.to_le_bytes());
    page[8..16].copy_from_slice(&start.b.to_le_bytes());
    recording.image.page(0, &page).unwrap();
    let rate = ImagePayload { kind: "rate".into(), version: 1, bytes: start.rate.to_le_bytes().to_vec() };
    recording.image.payload(&rate).unwrap();
    let (mut writer, _) = recording.finish_image().unwrap();
    log.iter().for_each(|entry| writer.entry(entry).unwrap());
    let (bytes, _) = writer.close().unwrap();

    let mut reader = RecordingReader::open(Cursor::new(&bytes)).unwrap();
    let mut machine = Toy { position: reader.image_metadata().position, ..Toy::default() };
    let (mut rate, mut words) = (0, [0; 2]);
    let take_payload = |payload: ImagePayload| {
        rate = u32::from_le_bytes(payload.bytes.try_into().unwrap());
        Ok::<_, ReadError>(())
    };
    let word = |page: &[u8], index: usize| u64::from_le_bytes(page[index..index + 8].try_into().unwrap());
    let take_page = |_, page: &[u8; PAGE_BYTES]| words = [word(page, 0), word(page, 8)];
    read_image(&mut reader.image().unwrap(), take_payload, take_page, |_| {}).unwrap();
    (machine.rate, [machine.a, machine.b]) = (rate, words);
    let mut replayer = Replayer::new(machine.position, ReplayOptions::default());
    replayer.run(&mut machine, None, || reader.next_entry(), |_, _| {}).unwrap();
    assert_eq!(machine, recorded_machine);

    // Cut in the middle of its entries it replays to there.
    let mut reader = RecordingReader::open(Cursor::new(&bytes[..bytes.len() - 1001])).unwrap();
    let mut machine = start.clone();
    let mut replayer = Replayer::new(machine.position, ReplayOptions::default());
    let report = replayer.run(&mut machine, None, || reader.next_entry(), |_, _| {}).unwrap();
    let Some(RecordingEnd::Truncated { entries, position, .. }) = reader.end() else { panic!("{:?}", reader.end()) };
    assert_eq!((report.entries.total().entries, report.position, report.end), (*entries, *position, None));
    assert!(*position > 2000 && *position < recorded_machine.position);
}

#[test]
fn stops_anywhere_and_goes_on() {
    let (start, recorded_machine, log, recorded_outputs) = recorded();
    let mut entries = log.iter().cloned();
    let mut machine = start;
    let mut outputs = Vec::new();
    let mut replayer = Replayer::new(0, ReplayOptions::default());
    for until in (0..recorded_machine.position).step_by(37) {
        let next = || Ok(entries.next());
        let report = replayer.run(&mut machine, Some(until), next, |position, output| outputs.push((position, output))).unwrap();
        assert_eq!((machine.position, report.position), (until, until));
        let inputs_done = log.iter().filter(|entry| entry.position <= until).count() as u64;
        assert_eq!(report.entries.total().entries, inputs_done);
    }
    let next = || Ok(entries.next());
    let report = replayer.run(&mut machine, None, next, |position, output| outputs.push((position, output))).unwrap();
    assert_eq!(report.end, Some(EndReason::Stopped));
    assert_eq!(machine, recorded_machine);
    assert_eq!(outputs, recorded_outputs);
    assert!(replayer.take_unchecked_outputs().is_empty());
}

#[test]
fn every_difference_is_found_where_it_is() {
    let (start, _, log, recorded_outputs) = recorded();
    let sent = |position: u64| Toy::sends(position);
    // A position that is no multiple of 97, and one that is; both between the digests at 1300 and at 1400.
    let (quiet, sending) = (1310, 1358);
    assert!(!sent(quiet) && sent(sending));
    let diverge = |fault, position| {
        let mut machine = Toy { fault: Some((position, fault)), ..start.clone() };
        let (result, outputs) = replay(&mut machine, &log, None);
        let divergence = result.expect_err("the difference is found");
        assert_eq!(divergence.last_agreed, Some(1300), "{divergence}");
        assert_eq!(outputs, recorded_outputs[..outputs.len()], "only outputs as recorded are handed out");
        assert!(outputs.last().unwrap().0 < divergence.position);
        (divergence.what, divergence.position, divergence)
    };
    let (what, position, divergence) = diverge(Fault::State, sending + 2);
    assert_eq!((what, position), (Difference::State, 1400));
    assert_eq!(divergence.expected, "another state");
    assert!(divergence.to_string().contains("the state last agreed at position 1300"), "{divergence}");
    // The state goes wrong just before an output is made of it: the output shows it first.
    assert!(matches!(diverge(Fault::State, sending - 1), (Difference::OutputBytes, p, _) if p == sending));
    assert!(matches!(diverge(Fault::LoseOutput, sending), (Difference::OutputMissing, p, _) if p == sending));
    assert!(
        matches!(diverge(Fault::ExtraOutput, quiet), (Difference::OutputExtra | Difference::OutputPosition, p, _) if p == quiet)
    );
    assert!(
        matches!(diverge(Fault::LateOutput, sending), (Difference::OutputPosition | Difference::OutputMissing, p, _) if p == sending)
    );
    assert!(matches!(diverge(Fault::OtherPort, sending), (Difference::OutputPort, p, _) if p == sending));
    assert!(matches!(diverge(Fault::LongerOutput, sending), (Difference::OutputLength, p, _) if p == sending));
    assert!(matches!(diverge(Fault::OtherBytes, sending), (Difference::OutputBytes, p, _) if p == sending));
    let (what, position, divergence) = diverge(Fault::Stop, quiet);
    assert_eq!((what, position), (Difference::Position, quiet));
    assert_eq!(divergence.found, "it stopped at 1310: triple fault");
    let first_input = log.iter().find(|entry| entry.position >= quiet && matches!(entry.event, Event::Input(_))).unwrap();
    let (what, position, divergence) = diverge(Fault::RefuseInput, quiet);
    assert_eq!((what, position), (Difference::Input, first_input.position));
    assert_eq!(divergence.found, "there is no network card 1");
}

#[test]
fn a_log_out_of_order_is_refused() {
    let at = |position, event| Entry { position, event };
    let difference = |log: &[Entry]| {
        let mut replayer = Replayer::new(10, ReplayOptions::default());
        let mut machine = Toy { position: 10, ..Toy::default() };
        log.iter().find_map(|entry| replayer.step(&mut machine, entry.clone(), &mut |_, _| {}).err()).map(|error| error.what)
    };
    assert_eq!(difference(&[at(9, Event::Progress)]), Some(Difference::LogOrder));
    assert_eq!(difference(&[at(12, Event::Progress), at(11, Event::Progress)]), Some(Difference::LogOrder));
    let end = at(12, Event::End { reason: EndReason::Stopped });
    assert_eq!(difference(&[end.clone(), at(13, Event::Progress)]), Some(Difference::LogOrder));
    assert_eq!(difference(&[at(10, Event::Progress), end]), None);
}

#[test]
fn a_lost_input_is_found() {
    let (start, _, mut log, _) = recorded();
    let index = log.iter().position(|entry| entry.position > 1300 && matches!(entry.event, Event::Input(_))).unwrap();
    let lost = log.remove(index);
    let mut machine = start;
    let divergence = replay(&mut machine, &log, None).0.unwrap_err();
    assert!(divergence.position >= lost.position && divergence.position <= lost.position.next_multiple_of(100) + 100);
}

#[test]
fn a_divergence_stays() {
    let (start, _, log, _) = recorded();
    let mut machine = Toy { fault: Some((550, Fault::State)), ..start };
    let mut replayer = Replayer::new(0, ReplayOptions::default());
    let first = log.iter().find_map(|entry| replayer.step(&mut machine, entry.clone(), &mut |_, _| {}).err()).unwrap();
    let later = Entry { position: machine.position, event: Event::Progress };
    assert_eq!(replayer.step(&mut machine, later, &mut |_, _| {}), Err(first));
}

/// A log without notes and digests, or a reader who does not want them compared.
#[test]
fn checks_can_be_off() {
    let (start, recorded_machine, log, recorded_outputs) = recorded();
    let bare: Vec<Entry> =
        log.iter().filter(|entry| !matches!(entry.event, Event::Output(_) | Event::Digest(_))).cloned().collect();
    for log in [&log, &bare] {
        let options = ReplayOptions { check_outputs: false, check_digests: false };
        let (mut machine, mut outputs, mut entries) = (start.clone(), Vec::new(), log.iter().cloned());
        let next = || Ok(entries.next());
        let report =
            Replayer::new(0, options).run(&mut machine, None, next, |position, output| outputs.push((position, output))).unwrap();
        assert_eq!((report.outputs_checked, report.digests_checked), (0, 0));
        assert_eq!(outputs, recorded_outputs);
        assert_eq!(machine, recorded_machine);
    }
}

/// Follows a primary's log as a standby does. What they disagree about, if anything, and the log up to where that was known.
fn follow(standby: &mut Toy, log: &[Entry]) -> Option<(Dispute, Vec<Entry>)> {
    let mut comparer = Comparer::new(0);
    let dispute = |found: Mismatch, position| Dispute {
        output: found.output,
        position,
        noted: found.noted.map(|(at, note)| Disputed::noted(at, &note)),
        made: found.made.map(|(at, made)| Disputed::made(at, &made, 100)),
        ..Dispute::default()
    };
    for (n, entry) in log.iter().enumerate() {
        let known = || log[..=n].to_vec();
        let stuck = standby.run_to(entry.position) != RunOutcome::Reached;
        standby.take_outputs().into_iter().for_each(|(at, output)| comparer.made(at, output));
        let refused = match &entry.event {
            _ if stuck => true,
            Event::Input(input) => standby.input(input.clone()).is_err(),
            Event::Output(note) => {
                comparer.noted(entry.position, *note);
                false
            }
            _ => false,
        };
        if refused {
            return Some((Dispute { output: 1, position: standby.position, stuck: true, ..Dispute::default() }, known()));
        }
        standby.take_outputs().into_iter().for_each(|(at, output)| comparer.made(at, output));
        while comparer.matched().is_some() {}
        if let Some(found) = comparer.mismatch(standby.position) {
            return Some((dispute(found, standby.position), known()));
        }
    }
    comparer.first().map(|found| (dispute(found, standby.position), log.to_vec()))
}

/// What a third machine says of two sides with these faults; none if they do not differ.
fn ask(
    primary: Option<(u64, Fault)>,
    standby: Option<(u64, Fault)>,
    third: Option<(u64, Fault)>,
) -> Option<Result<Opinion, VoteError>> {
    let (start, _, log, _) = recorded_with(primary);
    let (dispute, window) = follow(&mut Toy { fault: standby, ..start.clone() }, &log)?;
    let mut entries = window.into_iter();
    Some(vote::vote(&mut Toy { fault: third, ..start }, 0, &dispute, || Ok(entries.next())))
}

#[test]
fn a_third_machine_says_who_is_right() {
    use crate::Fault::*;
    // Outputs are made at multiples of 97.
    for (at, fault) in
        [(900, State), (970, LoseOutput), (975, ExtraOutput), (970, OtherPort), (970, LongerOutput), (970, OtherBytes)]
    {
        let of_standby = ask(None, Some((at, fault)), None).expect("they differ").unwrap();
        assert_eq!((of_standby.verdict, of_standby.stuck), (Verdict::Primary, None), "the standby has {fault:?}");
        let of_primary = ask(Some((at, fault)), None, None).expect("they differ").unwrap();
        assert_eq!(of_primary.verdict, Verdict::Standby, "the primary has {fault:?}");
        assert!(of_primary.outputs_agreed > 5 && of_primary.outputs_agreed < of_standby.outputs_agreed, "{fault:?}");
    }
    for fault in [(950, Stop), (950, RefuseInput)] {
        assert_eq!(ask(None, Some(fault), None).unwrap().unwrap().verdict, Verdict::Primary, "{fault:?}");
        // A third machine that does not get there, either.
        let opinion = ask(None, Some(fault), Some(fault)).unwrap().unwrap();
        assert!(opinion.verdict == Verdict::Standby && opinion.stuck.is_some(), "{opinion:?}");
    }
    assert!(ask(None, None, None).is_none(), "no difference, no vote");
}

#[test]
fn a_third_machine_that_is_wrong_itself_is_for_neither() {
    use crate::Fault::*;
    for third in [(970, LongerOutput), (970, LoseOutput), (960, ExtraOutput), (900, Stop)] {
        let opinion = ask(None, Some((970, OtherBytes)), Some(third)).unwrap().unwrap();
        assert_eq!(opinion.verdict, Verdict::Neither, "{third:?}: {opinion:?}");
    }
    // An output that the primary made too many, and the third goes wrong before.
    let opinion = ask(Some((975, ExtraOutput)), None, Some((970, OtherBytes))).unwrap().unwrap();
    assert_eq!(opinion.verdict, Verdict::Neither, "{opinion:?}");
}

#[test]
fn a_window_that_lacks_what_is_disputed_is_no_vote() {
    let (start, _, log, _) = recorded();
    let (dispute, window) = follow(&mut Toy { fault: Some((970, Fault::OtherBytes)), ..start.clone() }, &log).unwrap();
    let mut cut = window[..window.len() / 2].iter().cloned();
    let error = vote::vote(&mut start.clone(), 0, &dispute, || Ok(cut.next())).unwrap_err();
    assert!(error.to_string().contains("before the disputed output was noted at 970"), "{error}");
    let mut back = window.iter().rev().cloned();
    assert!(matches!(vote::vote(&mut start.clone(), 0, &dispute, || Ok(back.next())), Err(VoteError::Order(..))));
}

#[test]
fn a_dispute_keeps_outputs_and_is_read_again() {
    let outputs = [
        Output::NetTx { nic: 3, frame: vec![1; 60] },
        Output::NetTxGso { nic: 1, frame: vec![2; 90], segment_size: 30 },
        Output::Serial(b"ab".to_vec()),
        Output::Console(Vec::new()),
        Output::DiskWrite { disk: 2, offset: 1 << 40, data: vec![3; 64] },
        Output::DiskFlush { disk: 1, request: 77 },
    ];
    for output in outputs {
        let made = Disputed::made(7, &output, 100);
        assert_eq!((made.output(), made.note()), (Some(output.clone()), Some(OutputNote::of(&output))));
        let short = Disputed::made(7, &output, 1);
        assert_eq!(short.note(), made.note());
        let dispute = Dispute { output: 5, position: 9, noted: Some(short), made: Some(made), stuck: false, text: "it".into() };
        let bytes = minicbor::to_vec(&dispute).unwrap();
        assert_eq!(minicbor::decode::<Dispute>(&bytes).unwrap(), dispute);
    }
    let unknown = Disputed { kind: 9, ..Disputed::default() };
    assert!(unknown.note().is_none() && unknown.output().is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_was_recorded_replays(
        slices in prop::collection::vec((0u64..400, prop::collection::vec(common::any_input(), 0..3)), 1..30),
        digest_interval in 0u64..300,
        stops in prop::collection::vec(0u64..6000, 0..5),
    ) {
        let start = Toy { a: 1, ..Toy::default() };
        let mut recorded_machine = start.clone();
        let (log, recorded_outputs) = record(&mut recorded_machine, &slices, digest_interval);
        let mut stops = stops;
        stops.sort_unstable();
        let (mut machine, mut outputs, mut entries) = (start, Vec::new(), log.iter().cloned());
        let mut replayer = Replayer::new(0, ReplayOptions::default());
        for until in stops.into_iter().map(Some).chain([None]) {
            let report = replayer.run(&mut machine, until, || Ok(entries.next()), |position, output| outputs.push((position, output)));
            prop_assert!(report.is_ok(), "{}", report.unwrap_err());
        }
        prop_assert_eq!(machine, recorded_machine);
        prop_assert_eq!(outputs, recorded_outputs);
    }
}
