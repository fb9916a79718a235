//! The destination: takes a stream in, whatever it is, and ends with what the source had at the cut, or with a reason.
//!
//! **In:** bytes, cut anywhere. **Out:** units for the [`Target`]; at the end the state that came with them. **Invariants:** the target gets only units
//! of the layout it has agreed to; the end is accepted only if every unit was told of, and each region's digest is the source's; memory is bounded by 16 bytes a
//! unit, one block and [`MAX_STATE`].
use twinstep_machine::PageSet;

use crate::layout::{Layout, unit_hash};
use crate::stream::{Block, Decoder, MAX_STATE, StreamError, join, numbers};

/// Where units go. An error's text says why the copy cannot go on.
pub trait Target {
    /// The layout of what comes, and what the source says of it; before any unit. To be refused here if it does not fit, or takes too much memory.
    fn begin(&mut self, layout: &Layout, preface: &[u8]) -> Result<(), String>;
    /// A unit's bytes.
    fn unit(&mut self, region: usize, unit: u64, bytes: &[u8]) -> Result<(), String>;
    /// A unit is zero. `first`: nothing was told of it before, so that a target which began with zeroes has nothing to do.
    fn zero(&mut self, region: usize, unit: u64, first: bool) -> Result<(), String>;
}

/// Why a copy did not arrive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArrivalError {
    /// The stream cannot be used.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The target cannot take it.
    #[error("{0}")]
    Target(String),
    /// The stream says what the units do not.
    #[error("the copy is wrong: {0}")]
    Wrong(String),
    /// It failed before.
    #[error("the copy has failed before")]
    Failed,
}

/// What arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrived {
    /// What travelled besides the units.
    pub state: Vec<u8>,
    /// Rounds, with that of the cut.
    pub rounds: u64,
    /// Units that came, zeroes included; one that came twice counts twice.
    pub units: u64,
}

#[derive(Debug)]
struct Known {
    layout: Layout,
    told: Vec<PageSet>,
    hashes: Vec<Vec<u128>>,
    digests: Vec<u128>,
}

impl Known {
    /// A unit has this hash from now on.
    fn put(&mut self, region: usize, unit: u64, hash: u128) {
        let known = &mut self.hashes[region][unit as usize];
        self.digests[region] = self.digests[region].wrapping_sub(*known).wrapping_add(hash);
        *known = hash;
    }
}

/// The destination of one copy; see the head of the module.
#[derive(Debug, Default)]
pub struct Destination {
    decoder: Decoder,
    known: Option<Known>,
    state: Vec<u8>,
    rounds: u64,
    units: u64,
    failed: bool,
}

impl Destination {
    /// Of a stream that begins with the next byte.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes in.
    ///
    /// # Errors
    /// If the stream is none, or the target refuses, or what came does not fit its end. Then the copy has failed.
    pub fn push(&mut self, bytes: &[u8], target: &mut impl Target) -> Result<(), ArrivalError> {
        if self.failed {
            return Err(ArrivalError::Failed);
        }
        let taken = self.take(bytes, target);
        self.failed = taken.is_err();
        taken
    }

    fn take(&mut self, bytes: &[u8], target: &mut impl Target) -> Result<(), ArrivalError> {
        self.decoder.push(bytes);
        while let Some(block) = self.decoder.next_block()? {
            match (block, &mut self.known) {
                (Block::Begin { layout, preface }, known) => {
                    target.begin(&layout, preface).map_err(ArrivalError::Target)?;
                    *known = Some(Known {
                        told: layout.nothing(),
                        hashes: layout.regions().iter().map(|r| vec![0; r.units as usize]).collect(),
                        digests: vec![0; layout.regions().len()],
                        layout,
                    });
                }
                (_, None) => unreachable!("the decoder begins with the layout"),
                (Block::Round(number), _) => {
                    if number != self.rounds + 1 {
                        return Err(ArrivalError::Wrong(format!("round {number} comes after round {}", self.rounds)));
                    }
                    self.rounds = number;
                }
                (Block::Units { .. } | Block::Zeroes { .. }, _) if !self.state.is_empty() => {
                    return Err(ArrivalError::Wrong("units come after the state".into()));
                }
                (Block::Units { region, first, present, bytes }, Some(known)) => {
                    let unit_bytes = known.layout.regions()[region].unit_bytes as usize;
                    for (unit, bytes) in numbers(first, present).zip(bytes.chunks_exact(unit_bytes)) {
                        known.put(region, unit, unit_hash(unit, bytes));
                        target.unit(region, unit, bytes).map_err(ArrivalError::Target)?;
                    }
                    join(&mut known.told[region], first, present);
                    self.units += u64::from(present.count_ones());
                }
                (Block::Zeroes { region, first, present }, Some(known)) => {
                    for unit in numbers(first, present) {
                        known.put(region, unit, 0);
                        let before = known.told[region].contains(unit as usize);
                        target.zero(region, unit, !before).map_err(ArrivalError::Target)?;
                    }
                    join(&mut known.told[region], first, present);
                    self.units += u64::from(present.count_ones());
                }
                (Block::State(piece), _) => {
                    if self.state.len() + piece.len() > MAX_STATE {
                        return Err(ArrivalError::Wrong(format!("a state of more than {MAX_STATE} bytes")));
                    }
                    self.state.extend_from_slice(piece);
                }
                (Block::End { digests, sent }, Some(known)) => {
                    for (region, (told, found)) in known.told.iter().zip(known.layout.regions()).enumerate() {
                        let missing = found.units - told.len() as u64;
                        if missing > 0 {
                            return Err(ArrivalError::Wrong(format!("{missing} units of region {region} never came")));
                        }
                    }
                    if sent != self.units {
                        let units = self.units;
                        return Err(ArrivalError::Wrong(format!("{units} units came, {sent} were sent")));
                    }
                    if let Some(region) = known.digests.iter().zip(&digests).position(|(ours, theirs)| ours != theirs) {
                        return Err(ArrivalError::Wrong(format!("the digest of region {region} is not the source's")));
                    }
                }
            }
        }
        Ok(())
    }

    /// The stream is over.
    ///
    /// # Errors
    /// If it is not complete.
    pub fn finish(self) -> Result<Arrived, ArrivalError> {
        if self.failed {
            return Err(ArrivalError::Failed);
        }
        if !self.decoder.is_complete() {
            return Err(ArrivalError::Wrong("it ends before its end".into()));
        }
        Ok(Arrived { state: self.state, rounds: self.rounds, units: self.units })
    }
}
