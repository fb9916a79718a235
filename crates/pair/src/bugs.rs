//! Seeded bugs: the mistakes that the simulator must be able to find, each as a switch.
//!
//! In: with the feature `mutations` (which nothing that ships enables), one [`Bug`]. Out: `true` at the one place where the
//! mistake would be made. Invariant: without the feature every switch is the constant `false` and the code behind it is gone.

/// A mistake somebody could have made in this crate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bug {
    /// The primary lets an output leave before its note is acknowledged.
    ReleaseBeforeAck,
    /// The secondary goes live without asking the arbiter.
    LiveWithoutArbiter,
    /// The secondary goes live and does not send again what may not have left.
    ForgetReissue,
    /// The secondary acknowledges records that it has not received yet.
    AckBeforeReceive,
    /// The secondary goes live before it has consumed the log.
    LiveBeforeConsuming,
    /// The primary releases held outputs after it has lost the epoch.
    ReleaseAfterLosing,
    /// The primary goes on alone without asking the arbiter although protection had started.
    AloneWithoutArbiter,
    /// The primary starts protection without having sent the records of outputs that have left already.
    ProtectBeforeFlush,
    /// The primary starts protection although outputs that the image holds no trace of are still in its host's queues.
    ProtectBeforeLeft,
    /// The secondary thinks itself entitled as soon as it has the image.
    EntitledByImage,
    /// Either side takes an arbiter that does not answer for one that said yes.
    SilenceIsConsent,
    /// The primary says that outputs have left when it has only asked the host to send them.
    ReleasedBeforeLeft,
    /// The primary never throttles the guest.
    NeverThrottle,
    /// A primary whose arbiter does not answer does not ask again.
    AskOnce,
    /// The primary lets an output leave when its note is received, although it was to be matched.
    ReleaseBeforeMatch,
    /// The primary releases what it holds when outputs differ.
    ReleaseAtResync,
    /// The primary takes its guest out of the resync, and lets outputs leave, when it has sent all and not when the secondary has it.
    ResumeBeforeReady,
    /// The secondary counts the outputs that came with a resync as left.
    ForgetPendingAtResync,
    /// The secondary counts the output that differs as matched.
    MatchTheMismatch,
    /// A VM that has lost a standby does not look for another one.
    HealOnce,
    /// A secondary that goes live forgets where its VM's other standbys are.
    ForgetStandbys,
    /// The secondary acknowledges an image's bytes when they come, and not when its host has used them up.
    AckImageBeforeTaken,
    /// A peer that gives signs of life beside a dead channel is waited for without end.
    BeatIsEnough,
    /// A primary that was stalled goes on releasing what it finds acknowledged.
    ReleaseAfterStall,
    /// The primary tells how far its machine runs undisturbed after something has entered it.
    StaleLookahead,
    /// The primary does not stop its guest when it says that it stands still.
    RunOnAtStandStill,
    /// A secondary that goes on by itself goes live before its host has said what its machine has made since the difference.
    LiveBeforeDiverged,
}

impl Bug {
    /// All of them.
    pub const ALL: [Bug; 27] = [
        Bug::ReleaseBeforeAck,
        Bug::LiveWithoutArbiter,
        Bug::ForgetReissue,
        Bug::AckBeforeReceive,
        Bug::LiveBeforeConsuming,
        Bug::ReleaseAfterLosing,
        Bug::AloneWithoutArbiter,
        Bug::ProtectBeforeFlush,
        Bug::ProtectBeforeLeft,
        Bug::EntitledByImage,
        Bug::SilenceIsConsent,
        Bug::ReleasedBeforeLeft,
        Bug::NeverThrottle,
        Bug::AskOnce,
        Bug::ReleaseBeforeMatch,
        Bug::ReleaseAtResync,
        Bug::ResumeBeforeReady,
        Bug::ForgetPendingAtResync,
        Bug::MatchTheMismatch,
        Bug::HealOnce,
        Bug::ForgetStandbys,
        Bug::AckImageBeforeTaken,
        Bug::BeatIsEnough,
        Bug::ReleaseAfterStall,
        Bug::StaleLookahead,
        Bug::RunOnAtStandStill,
        Bug::LiveBeforeDiverged,
    ];
}

/// Which bug is on. None, outside of the simulator's own tests.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bugs {
    #[cfg(feature = "mutations")]
    on: Option<Bug>,
}

impl Bugs {
    /// Switches one bug on.
    #[cfg(feature = "mutations")]
    pub fn only(bug: Bug) -> Bugs {
        Bugs { on: Some(bug) }
    }

    #[cfg(feature = "mutations")]
    pub(crate) fn has(self, bug: Bug) -> bool {
        self.on == Some(bug)
    }

    #[cfg(not(feature = "mutations"))]
    pub(crate) const fn has(self, _bug: Bug) -> bool {
        false
    }
}
