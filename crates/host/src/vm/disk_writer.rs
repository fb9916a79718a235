//! The thread that carries out what the guest writes to shared disks.
//!
//! *In*: disk outputs that may leave, in order. *Out*: bytes on the images; word to the machine's thread when a flush is done, and to the pair when outputs are durable. *Invariant*: outputs are carried out in their
//! order, and none counts as done before it is durable; after a failure nothing more is written.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use twinstep_machine::{Input, Output};

use super::live::ToVm;
use crate::disk::{Replica, SharedDisk, Write};
use crate::error::{Context, Error, Result};

/// Outputs carried out between two flushes of the images at most.
const MAX_BATCH: usize = 256;

/// What the thread is told.
enum ToWriter {
    /// To be carried out. Whether it was pending: a write that is sent again after a take-over was not.
    Output(Output, bool),
    /// Answer when everything before is durable.
    Settle(Sender<()>),
}

/// Who is told how many outputs are durable now, in addition to earlier ones.
pub type Written = Box<dyn Fn(u64) + Send>;

/// The thread. It ends with the last clone.
#[derive(Clone)]
pub struct DiskWriter {
    to: Sender<ToWriter>,
    written: Arc<Mutex<Option<Written>>>,
}

impl DiskWriter {
    /// Starts it for the shared disks among these; none if there are none.
    pub fn start(disks: &[Replica], vm: Sender<ToVm>) -> Result<Option<Self>> {
        let disks: Vec<Option<SharedDisk>> = disks.iter().map(|disk| disk.shared().cloned()).collect();
        if disks.iter().all(Option::is_none) {
            return Ok(None);
        }
        let (to, inbox) = channel();
        let written: Arc<Mutex<Option<Written>>> = Arc::default();
        let told = written.clone();
        let run = move || {
            if let Err(e) = work(&disks, &inbox, &vm, &told) {
                // A machine that has ended needs not be told.
                let _ = vm.send(ToVm::Fail(e.to_string()));
            }
        };
        std::thread::Builder::new().name("disk-writer".into()).spawn(run).what("cannot start a thread")?;
        Ok(Some(Self { to, written }))
    }

    /// Who is told how far outputs are durable.
    pub fn when_written(&self, written: Written) {
        *self.written.lock().unwrap_or_else(PoisonError::into_inner) = Some(written);
    }

    /// Carries out an output to a shared disk, soon.
    pub fn put(&self, output: Output) {
        // One that has failed has said so.
        let _ = self.to.send(ToWriter::Output(output, true));
    }

    /// Carries out again what the side that is gone may not have carried out. Returns when all is durable.
    ///
    /// # Errors
    /// If that failed; why was said to the machine's thread.
    pub fn put_again(&self, outputs: Vec<Output>) -> Result<()> {
        let (answer, settled) = channel();
        let all = outputs.into_iter().map(|output| ToWriter::Output(output, false)).chain([ToWriter::Settle(answer)]);
        all.for_each(|message| _ = self.to.send(message));
        settled.recv().map_err(|_| Error::new("what may be missing on a shared disk cannot be written to it"))
    }
}

fn work(
    disks: &[Option<SharedDisk>],
    inbox: &Receiver<ToWriter>,
    vm: &Sender<ToVm>,
    written: &Mutex<Option<Written>>,
) -> Result<()> {
    while let Ok(first) = inbox.recv() {
        let mut batch = vec![first];
        while batch.len() < MAX_BATCH
            && let Ok(more) = inbox.try_recv()
        {
            batch.push(more);
        }
        let mut writes: BTreeMap<(u8, bool), Vec<Write>> = BTreeMap::new();
        let (mut flushes, mut waiting, mut outputs) = (Vec::new(), Vec::new(), 0);
        for message in batch {
            match message {
                ToWriter::Output(Output::DiskWrite { disk, offset, data }, pending) => {
                    outputs += u64::from(pending);
                    writes.entry((disk, pending)).or_default().push((offset, data));
                }
                ToWriter::Output(Output::DiskFlush { disk, request }, pending) => {
                    outputs += u64::from(pending);
                    flushes.push((disk, request));
                }
                ToWriter::Output(..) => {}
                ToWriter::Settle(answer) => waiting.push(answer),
            }
        }
        // Writes of one disk are in their order, and one disk's order is nothing to another's. Those that are sent again all come before the first that was pending.
        for ((disk, pending), writes) in &writes {
            let shared = disks.get(usize::from(*disk)).and_then(Option::as_ref);
            let shared = shared.ok_or_else(|| Error::new(format!("the machine writes to disk {disk}, which is not shared")))?;
            shared.carry_out(writes, *pending)?;
        }
        // All batches before this one are durable as well.
        for (disk, request) in flushes {
            let _ = vm.send(ToVm::Input(Input::DiskDone { disk, request, data: Vec::new() }));
        }
        let _ = vm.send(ToVm::DiskWritten);
        if let Some(written) = &*written.lock().unwrap_or_else(PoisonError::into_inner) {
            // What is sent again after a take-over was the other side's output.
            if outputs > 0 {
                written(outputs);
            }
        }
        waiting.into_iter().for_each(|answer| _ = answer.send(()));
    }
    Ok(())
}
