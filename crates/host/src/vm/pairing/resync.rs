//! What the pair's thread does for a resync.
//!
//! *In*: what the standby tells of its machine; what the machine's thread has prepared, sends ahead, and makes where its guest stands. *Out*: events for the protocol, bytes to the standby, word to people.
//! *Invariant*: of a delta for a standby that was lost, nothing is listened to.
use super::*;
use crate::vm::ahead;

impl Driver {
    /// Outputs differ: the machine's thread prepares what can be prepared while the guest runs.
    pub(super) fn start_resync(&mut self) {
        self.feed = Feed::default();
        self.ahead = false;
        (self.mismatch_ns, self.stood_ns) = (now_ns(), 0);
        let pages = usize::try_from(self.primary.vm().ram_bytes / twinstep_machine::PAGE_SIZE).expect("it is in memory");
        let told = Arc::new(Mutex::new(Told::nothing(pages, &self.disks)));
        self.told = Some(told.clone());
        self.tell_vm(ToVm::PrepareResync(told));
    }

    /// The standby tells of its machine.
    pub(super) fn on_changed(&mut self, bytes: &[u8]) {
        let Some(told) = self.told.clone() else { return };
        let (result, searched) = {
            let mut told = told::lock(&told);
            let before = told.damaged;
            (told.take(bytes), told.damaged != before)
        };
        if searched {
            self.tell_vm(ToVm::Searched);
        }
        if let Err(e) = result {
            self.disconnect();
            self.primary.handle(now(), PrimaryEvent::PeerClosed { reason: e.to_string() });
        }
    }

    /// Pieces that are sent while the guest runs.
    pub(super) fn on_ahead(&mut self, bytes: Vec<u8>) {
        if self.ahead && self.primary.state() == PrimaryState::CatchingUp {
            self.feed.pieces(bytes, true);
            self.feed_image();
        }
    }

    /// More differs than can be sent while the guest stands still.
    pub(super) fn on_resync_goes_on(&mut self) {
        let stood_ns = now_ns() - self.stopped_ns;
        self.stood_ns += stood_ns;
        let text = format!(
            "more differs than can be sent while the guest stands still, which it did for {:.1} ms: it runs on meanwhile",
            stood_ns as f64 / 1e6
        );
        self.events.say_with("resync-goes-on", text, Map::from_iter([("pause_ns".to_owned(), json!(stood_ns))]));
        self.ahead = true;
        self.primary.handle(now(), PrimaryEvent::ResyncGoesOn);
        self.feed_image();
    }

    /// The delta that was asked for is here, of the machine at `position`.
    pub(super) fn on_delta(&mut self, position: u64, delta: &Delta, took_ns: u64) {
        self.say_damaged("primary", &delta.damaged);
        if !delta.damaged.is_empty() && delta.theirs_damaged == 0 {
            // It is known who is wrong. What was held is never to leave; the standby has made what is right, and goes on with it.
            self.tell_vm(ToVm::Fail("its memory is bad, and the standby's is not: the standby takes over".into()));
            return;
        }
        let outputs = self.held.iter().map(|(id, _, output)| (*id, output));
        let bytes = with_outputs(outputs, &delta.image);
        let figures = Map::from_iter([
            ("pages".to_owned(), json!(delta.pages)),
            ("blocks".to_owned(), json!(delta.blocks)),
            ("bytes".to_owned(), json!(bytes.len())),
            ("outputs".to_owned(), json!(self.held.len())),
            ("took_ns".to_owned(), json!(took_ns)),
        ]);
        let text = format!(
            "{} pages and {} blocks of disks differ; with {} outputs that are held they make {} KiB",
            delta.pages,
            delta.blocks,
            self.held.len(),
            bytes.len().div_ceil(1024)
        );
        self.events.say_with("delta", text, figures);
        self.ahead = false;
        self.feed.pieces([&ahead::delta_head()[..], &bytes].concat(), false);
        self.feed.end();
        self.primary.handle(now(), PrimaryEvent::ImageCut { position });
        self.feed_image();
    }

    /// A delta that was asked for is here. Says whether it is wanted: not if the standby it is for was lost.
    pub(super) fn is_newest_delta(&mut self) -> bool {
        self.deltas_awaited -= 1;
        self.deltas_awaited == 0 && self.primary.state() == PrimaryState::Resyncing
    }

    /// The standby is equal again.
    pub(super) fn say_resynced(&mut self) {
        self.told = None;
        self.tell_vm(ToVm::Resynced);
        let now_ns = now_ns();
        let pause_ns = self.stood_ns + now_ns - self.stopped_ns;
        let total_ns = now_ns - self.mismatch_ns;
        let figures = [("pause_ns", pause_ns), ("total_ns", total_ns)];
        let figures = Map::from_iter(figures.map(|(name, value)| (name.to_owned(), json!(value))));
        let text = format!(
            "the standby is equal again, {:.1} ms after the difference was found; the guest stood still for {:.1} ms of them",
            total_ns as f64 / 1e6,
            pause_ns as f64 / 1e6
        );
        self.events.say_with("resynced", text, figures);
        self.board.resynced();
    }
}
