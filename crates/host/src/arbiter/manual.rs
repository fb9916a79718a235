//! The manual override: a person who knows that the other side is dead decides in place of an arbiter that cannot be reached.
//!
//! *In*: claims on their way to an arbiter, a person's word. *Out*: verdicts. *Invariant*: the word counts for the one claim that waits when it is given, and only while the arbiter does not
//! answer: one that answers is believed. What was decided so is entered at the arbiter as soon as it answers; if the epoch is somebody else's there, two sides have run, and
//! this one is told to stop.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Map, json};
use twinstep_pair::Claim;

use super::{Arbiter, ArbiterSpec, Verdict};
use crate::error::Result;
use crate::events::Events;

/// The longest pause between two attempts to enter late what a person has decided.
const LATE_PAUSE: Duration = Duration::from_secs(10);

/// What stops the machine of this process, and why.
pub type Stop = Box<dyn Fn(String) + Send>;

#[derive(Default)]
struct State {
    /// The claim that the arbiter did not answer.
    waiting: Option<Claim>,
    /// The claim that a person has decided.
    decided: Option<Claim>,
    stop: Option<Stop>,
    /// Why it is to stop, while nobody knows how.
    overruled: Option<String>,
}

/// What a person may decide in a process. Cheap to clone; clones are the same one.
#[derive(Clone, Default)]
pub struct ManualOverride(Arc<Mutex<State>>);

impl ManualOverride {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A person says that the other side is dead. Gives the epoch that is this side's now.
    ///
    /// # Errors
    /// If no claim waits for an arbiter.
    pub fn decide(&self) -> std::result::Result<u64, String> {
        let mut state = self.state();
        let Some(claim) = state.waiting else {
            return Err("this side does not wait for an arbiter, so there is nothing to decide".to_owned());
        };
        state.decided = Some(claim);
        Ok(claim.epoch.0)
    }

    /// What stops the machine, should the arbiter say later that the epoch was another side's.
    pub fn stop_by(&self, stop: Stop) {
        let mut state = self.state();
        if let Some(why) = state.overruled.take() {
            stop(why);
        }
        state.stop = Some(stop);
    }

    /// The arbiter has given this verdict. Gives the one that counts.
    fn weigh(&self, claim: &Claim, verdict: Verdict) -> (Verdict, bool) {
        let mut state = self.state();
        if !matches!(verdict, Verdict::Unreachable { .. }) {
            state.waiting = None;
            return (verdict, false);
        }
        if state.decided == Some(*claim) {
            state.waiting = None;
            return (Verdict::Won, true);
        }
        state.waiting = Some(*claim);
        (verdict, false)
    }

    fn overrule(&self, why: String) {
        let mut state = self.state();
        match &state.stop {
            Some(stop) => stop(why),
            None => state.overruled = Some(why),
        }
    }
}

/// An arbiter as a pair asks it, with people beside it.
pub struct OverridableArbiter {
    arbiter: Box<dyn Arbiter>,
    /// To open another one, for claims that are entered late.
    spec: ArbiterSpec,
    manual: ManualOverride,
    events: Events,
}

impl OverridableArbiter {
    /// Opens an arbiter.
    ///
    /// # Errors
    /// If it cannot be used.
    pub fn open(spec: &ArbiterSpec, manual: &ManualOverride, events: &Events) -> Result<Self> {
        Ok(Self { arbiter: spec.open()?, spec: spec.clone(), manual: manual.clone(), events: events.clone() })
    }

    /// Enters a claim as soon as that is possible, on a thread of its own.
    fn enter_late(&self, claim: Claim) {
        let (spec, manual, events) = (self.spec.clone(), self.manual.clone(), self.events.clone());
        let enter = move || {
            let mut pause = Duration::from_secs(1);
            loop {
                std::thread::sleep(pause);
                pause = (pause * 2).min(LATE_PAUSE);
                let verdict = spec.open().map(|arbiter| put(&*arbiter, &claim));
                if manual.late(&claim, verdict.unwrap_or_else(|e| Verdict::Unreachable { why: e.to_string() }), &events) {
                    return;
                }
            }
        };
        // Without a thread the decision holds as well; only the arbiter does not hear of it.
        if let Err(e) = std::thread::Builder::new().name("arbiter-late".into()).spawn(enter) {
            self.events.say("arbiter", format!("epoch {} cannot be entered at the arbiter later: {e}", claim.epoch));
        }
    }
}

fn put(arbiter: &dyn Arbiter, claim: &Claim) -> Verdict {
    arbiter.claim(&claim.vm.to_string(), claim.epoch.0, &claim.owner.to_string())
}

impl ManualOverride {
    /// What the arbiter says, late, to what a person has decided. True if that settles it.
    fn late(&self, claim: &Claim, verdict: Verdict, events: &Events) -> bool {
        match verdict {
            Verdict::Unreachable { .. } => false,
            Verdict::Won => {
                events.say("arbiter", format!("the arbiter answers again; epoch {} is entered as this side's", claim.epoch));
                true
            }
            Verdict::Lost { owner } => {
                let why = format!(
                    "a person said that the other side was dead, but epoch {} is {owner}'s: two sides have run, and this one stops",
                    claim.epoch
                );
                events.say("overruled", why.clone());
                self.overrule(why);
                true
            }
        }
    }
}

impl twinstep_pair::Arbiter for OverridableArbiter {
    fn test_and_set(&mut self, claim: &Claim) -> twinstep_pair::Verdict {
        let verdict = put(&*self.arbiter, claim);
        if let Verdict::Unreachable { why } = &verdict {
            let text = format!(
                "{why}. The guest stands still until the arbiter answers; if the other side is certainly dead, `twinstep arbiter override` decides"
            );
            self.events.say("arbiter-unreachable", text);
        }
        let (verdict, by_hand) = self.manual.weigh(claim, verdict);
        if by_hand {
            let figures = Map::from_iter([("epoch".to_owned(), json!(claim.epoch.0))]);
            let text = format!("epoch {} is this side's on a person's word; the arbiter was not asked", claim.epoch);
            self.events.say_with("overridden", text, figures);
            self.enter_late(*claim);
        }
        match verdict {
            Verdict::Won => twinstep_pair::Verdict::Won,
            Verdict::Lost { .. } => twinstep_pair::Verdict::Lost,
            Verdict::Unreachable { .. } => twinstep_pair::Verdict::Unreachable,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use twinstep_pair::{Epoch, OwnerId, VmId};

    fn claim(epoch: u64) -> Claim {
        Claim { vm: VmId([1; 16]), epoch: Epoch(epoch), owner: OwnerId([2; 16]) }
    }

    fn silent() -> Verdict {
        Verdict::Unreachable { why: "the cable is out".into() }
    }

    #[test]
    fn a_person_decides_the_claim_that_waits_and_no_other() {
        let manual = ManualOverride::default();
        assert!(manual.decide().unwrap_err().contains("does not wait"));
        assert_eq!(manual.weigh(&claim(2), silent()), (silent(), false));
        assert_eq!(manual.decide(), Ok(2));
        assert_eq!(manual.weigh(&claim(2), silent()), (Verdict::Won, true));
        // The next one is another question.
        assert_eq!(manual.weigh(&claim(3), silent()), (silent(), false));
    }

    #[test]
    fn an_arbiter_that_answers_is_believed() {
        let manual = ManualOverride::default();
        manual.weigh(&claim(2), silent());
        manual.decide().unwrap();
        let lost = Verdict::Lost { owner: "right".into() };
        assert_eq!(manual.weigh(&claim(2), lost.clone()), (lost, false));
        assert!(manual.decide().is_err(), "it has answered");
    }

    #[test]
    fn a_side_that_should_not_have_run_is_stopped() {
        let events = Events::new("test", true, None).unwrap();
        let manual = ManualOverride::default();
        assert!(!manual.late(&claim(2), silent(), &events));
        assert!(manual.late(&claim(2), Verdict::Won, &events));
        assert!(manual.late(&claim(2), Verdict::Lost { owner: "right".into() }, &events));
        // The machine may be on its way just then.
        let (stop, stopped) = channel();
        manual.stop_by(Box::new(move |why| stop.send(why).unwrap()));
        assert!(stopped.recv().unwrap().contains("epoch 2 is right's"));
        manual.late(&claim(3), Verdict::Lost { owner: "right".into() }, &events);
        assert!(stopped.recv().unwrap().contains("epoch 3"));
    }
}
