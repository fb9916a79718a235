//! Swarm testing: each seed first draws what kind of world it lives in. In some worlds a kind of fault does not happen at all, in
//! others it happens all the time; a mild mixture of everything would find much less.
//!
//! In: the seed's generator. Out: a [`Profile`]. Invariant: the faults of a profile are such that a correct pair survives them.

use twinstep_pair::{Commit, Config, Nanos, OnMismatch};

use crate::random::Random;

/// When the faults stop. What is still open then must come right by [`END`].
pub(crate) const CALM_FROM: Nanos = Nanos::from_millis(160);
/// When the world ends.
pub(crate) const END: Nanos = Nanos::from_millis(560);

/// Hosts there are at most.
pub(crate) const MAX_HOSTS: usize = 3;

/// The kind of world a seed lives in.
#[derive(Debug, Clone)]
pub(crate) struct Profile {
    pub(crate) config: Config,
    pub(crate) delay_min_ns: u64,
    pub(crate) delay_max_ns: u64,
    pub(crate) ns_per_byte: u64,
    pub(crate) arbiter_delay_max_ns: u64,
    pub(crate) arbiter_answer_lost_percent: u64,
    /// How often an answer comes twice.
    pub(crate) arbiter_twice_percent: u64,
    /// From, to, as each host sees it.
    pub(crate) arbiter_away: [(Nanos, Nanos); MAX_HOSTS],
    /// How many faults there are.
    pub(crate) faults: u64,
    /// How often a change of state is followed by a fault at once: the moments at which protocols break.
    pub(crate) fault_at_change_percent: u64,
    /// Which kinds, as weights: see `Fault`.
    pub(crate) fault_weights: [u64; 9],
    /// Instructions that a guest runs in one slice, at most.
    pub(crate) slice_max: u64,
    /// Instructions that replay runs in one slice, at most.
    pub(crate) replay_slice_max: u64,
    /// How often a host says how far its machine will run undisturbed.
    pub(crate) lookahead_percent: u64,
    /// How often the host takes in more events before it does what it was asked for.
    pub(crate) lazy_percent: u64,
    /// Padding of inputs, at most: the weight of the log.
    pub(crate) input_padding_max: u64,
    pub(crate) image_padding: u64,
    /// Bytes of the image that are sent while the guest runs, before the cut: the rounds of a pre-copy.
    pub(crate) rounds_bytes: u64,
    /// How often more differs at a resync than can be sent at once.
    pub(crate) ahead_percent: u64,
    /// The host of a standby needs so long for a piece of an image, at most.
    pub(crate) take_delay_max_ns: u64,
    /// The guest does not run while the image is copied.
    pub(crate) pause_during_copy: bool,
    /// A released output takes so long to leave the host, at most.
    pub(crate) leave_delay_max_ns: u64,
    pub(crate) clients: u64,
    /// On how many hosts there is a process at first; those that are not the primary's are standbys.
    pub(crate) hosts: usize,
    /// How often a host whose process has ended starts a standby.
    pub(crate) restart_percent: u64,
    /// Signs of life beside the channel.
    pub(crate) beats: Beats,
    /// How many of them get lost.
    pub(crate) beats_lost_percent: u64,
    /// The primary knows an address of its own host, where a standby may wait later.
    pub(crate) own_place: bool,
}

/// Which way signs of life beside the channel take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beats {
    /// There are none.
    None,
    /// The channel's: what blocks that blocks them.
    SamePath,
    /// Another one, which is never cut.
    OwnPath,
}

/// The ways in which things go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A side's process dies; its sockets are closed by its kernel.
    Crash,
    /// A side's host dies; nobody is told.
    PowerLoss,
    /// The connection is reset at any byte.
    Cut,
    /// Nothing gets through for a while, or for ever, in one direction or in both.
    Partition,
    /// A side's process is stopped for a while.
    Stall,
    /// Replay stands still for a while.
    ReplayStall,
    /// A side ends properly.
    Goodbye,
    /// A bit of a machine's state flips.
    Flip,
    /// The primary gives the VM to its secondary.
    HandOver,
}

impl Fault {
    pub(crate) const ALL: [Fault; 9] = [
        Fault::Crash,
        Fault::PowerLoss,
        Fault::Cut,
        Fault::Partition,
        Fault::Stall,
        Fault::ReplayStall,
        Fault::Goodbye,
        Fault::Flip,
        Fault::HandOver,
    ];
}

impl Profile {
    pub(crate) fn draw(random: &mut Random) -> Profile {
        let slow_network = random.percent(20);
        let mut arbiter_away = [away(random); MAX_HOSTS];
        if random.percent(50) {
            // Not the arbiter is away, but hosts from it.
            arbiter_away = std::array::from_fn(|_| away(random));
        }
        let mut fault_weights = [0; 9];
        for weight in &mut fault_weights {
            *weight = random.pick(&[0, 1, 1, 4]);
        }
        if fault_weights.iter().all(|weight| *weight == 0) {
            fault_weights[0] = 1;
        }
        // Properly ended VMs teach little; they are rare.
        fault_weights[6] = u64::from(random.percent(10));
        let config = draw_config(random);
        // What the world sees of a flipped bit is wrong unless outputs are compared before they leave.
        fault_weights[7] = if config.commit == Commit::Matched { random.pick(&[0, 4, 12]) } else { 0 };
        fault_weights[8] = random.pick(&[0, 0, 1, 4]);
        let ns_per_byte = random.pick(&[0, 1, 10, if slow_network { 2_000 } else { 100 }]);
        let slice_max = random.pick(&[10, 100, 400]);
        Profile {
            config,
            delay_min_ns: 20_000,
            delay_max_ns: if slow_network { 6_000_000 } else { random.pick(&[50_000, 300_000, 2_000_000]) },
            ns_per_byte,
            arbiter_delay_max_ns: random.pick(&[100_000, 1_000_000, 30_000_000]),
            arbiter_answer_lost_percent: random.pick(&[0, 0, 30, 80]),
            arbiter_twice_percent: random.pick(&[0, 0, 20]),
            arbiter_away,
            faults: random.pick(&[0, 1, 1, 2, 2, 3, 5]),
            fault_at_change_percent: random.pick(&[0, 0, 10, 50]),
            fault_weights,
            slice_max,
            // From a secondary that holds the guest back to one that idles.
            replay_slice_max: slice_max * random.pick(&[1, 2, 8]) / 2,
            lookahead_percent: random.pick(&[0, 50, 100]),
            lazy_percent: random.pick(&[0, 20, 90]),
            // What enters must fit through the network: a log that can't be sent holds the guest back for good.
            input_padding_max: random.pick(&[0, 30, if ns_per_byte >= 2_000 { 30 } else { 400 }]),
            // A third copy must be over before the world is, also through the smallest window.
            image_padding: random.pick(&[0, 100, if slow_network { 500 } else { 2_000 }]),
            rounds_bytes: random.pick(&[0, 200, if slow_network { 200 } else { 5_000 }]),
            ahead_percent: random.pick(&[0, 0, 50]),
            take_delay_max_ns: random.pick(&[10_000, 300_000, 2_000_000]),
            pause_during_copy: random.percent(30),
            leave_delay_max_ns: random.pick(&[1_000, 200_000, 3_000_000]),
            clients: random.between(1, 4),
            hosts: random.pick(&[2, 3, 3]),
            restart_percent: random.pick(&[0, 50, 100]),
            own_place: random.percent(50),
            beats: random.pick(&[Beats::None, Beats::SamePath, Beats::OwnPath]),
            beats_lost_percent: random.pick(&[0, 0, 30]),
        }
    }

    /// Whether such faults happen in this world.
    pub(crate) fn allows(&self, fault: Fault) -> bool {
        Fault::ALL.iter().zip(self.fault_weights).any(|(other, weight)| *other == fault && weight > 0)
    }

    /// Draws a fault.
    pub(crate) fn fault(&self, random: &mut Random) -> Fault {
        let total: u64 = self.fault_weights.iter().sum();
        let mut ticket = random.between(0, total.max(1) - 1);
        for (fault, weight) in Fault::ALL.into_iter().zip(self.fault_weights) {
            if ticket < weight {
                return fault;
            }
            ticket -= weight;
        }
        Fault::Cut
    }
}

/// From when to when an arbiter does not answer.
fn away(random: &mut Random) -> (Nanos, Nanos) {
    let from = random.between(0, CALM_FROM.0);
    let span = if random.percent(30) { random.between(0, CALM_FROM.0) } else { 0 };
    (Nanos(from), Nanos(from + span))
}

fn draw_config(random: &mut Random) -> Config {
    Config {
        commit: random.pick(&[Commit::Received, Commit::Matched]),
        on_mismatch: OnMismatch::Primary,
        heartbeat_interval: Nanos::from_millis(4),
        peer_timeout: Nanos::from_millis(random.pick(&[20, 40])),
        copy_timeout: Nanos::from_millis(60),
        stall_timeout: Nanos::from_millis(80),
        replay_report_interval: Nanos::from_millis(random.pick(&[0, 1, 3])),
        arbiter_timeout: Nanos::from_millis(20),
        arbiter_retry_min: Nanos::from_millis(2),
        arbiter_retry_max: Nanos::from_millis(40),
        heal_retry_min: Nanos::from_millis(random.pick(&[1, 10])),
        heal_retry_max: Nanos::from_millis(20),
        max_unacked_bytes: random.pick(&[1_500, 20_000]),
        max_unreplayed_bytes: random.pick(&[3_000, 40_000]),
        max_replay_lag: random.pick(&[500, 5_000]),
        max_matched_lag: Nanos::from_millis(random.pick(&[2, 10])),
        max_held_outputs: random.pick(&[8, 200]),
        // A slice of the toy guest may pass the small bounds several times over; the hard bound is far.
        hard_bound_factor: 64,
        image_window_bytes: random.pick(&[256, 4_096]),
    }
}
