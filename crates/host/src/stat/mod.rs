//! Where a VM's time goes: measured, put into words, shown.
//!
//! *In*: what a machine's thread is doing ([`sampler`]) and what it counted, at two times. *Out*: rates and shares ([`measure`]), a table, lines, a
//! sentence that says what stands out ([`words`]). *Invariant*: the machine only counts and says what it does; whoever asks pays for the rest, and
//! with nobody asking nothing samples.
pub mod measure;
pub mod sampler;
pub mod words;

use std::collections::BTreeMap;

use twinstep_machine::Activity;

use crate::control::VmFigures;
use crate::control::wire::Stat;

/// What a machine's thread said, with what was seen of it, as others are told.
pub fn report(figures: &VmFigures, samples: &[u64; Activity::ALL.len()]) -> Stat {
    let mut counters = BTreeMap::new();
    figures.stats.each(&mut |set, name, value| {
        counters.insert(format!("{set}.{name}"), value);
    });
    let mut gauges = BTreeMap::new();
    figures.stats.now().each(&mut |name, value| {
        gauges.insert(name.to_owned(), value);
    });
    Stat {
        at_ns: figures.at_ns,
        position: figures.position,
        guest_ns: figures.guest_ns,
        cpu_ns: figures.cpu_ns,
        samples: Activity::ALL.iter().zip(samples).map(|(activity, n)| (activity.name().to_owned(), *n)).collect(),
        counters,
        gauges,
    }
}
