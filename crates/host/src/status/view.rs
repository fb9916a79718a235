//! All VMs of this user, asked at once.
//!
//! *In*: the folder of control sockets. *Out*: for each VM its status and its last events, or why there is none. *Invariant*: one that hangs costs its own
//! thread and a bounded time, and hides no other.
use std::collections::HashMap;
use std::path::Path;

use super::Status;
use crate::control::client::Connection;
use crate::control::folder;
use crate::error::Result;
use crate::events::Kept;

/// One VM.
#[derive(Debug)]
pub struct Seen {
    /// Its name.
    pub name: String,
    /// What it says.
    pub answer: Result<(Status, Vec<Kept>)>,
}

fn ask(folder: &Path, name: &str) -> Result<(Status, Vec<Kept>)> {
    let mut connection = Connection::open_one_of_several(folder, name)?;
    Ok((connection.status()?, connection.events()?))
}

/// Asks all that run, by name.
pub fn all(folder: &Path) -> Result<Vec<Seen>> {
    let names: Vec<String> = folder::running(folder)?.into_iter().map(|(name, _)| name).collect();
    Ok(std::thread::scope(|scope| {
        let asked: Vec<_> = names.into_iter().map(|name| (name.clone(), scope.spawn(move || ask(folder, &name)))).collect();
        let answered = asked
            .into_iter()
            .map(|(name, thread)| Seen { name, answer: thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)) });
        answered.collect()
    }))
}

/// The other side of each, as far as it runs here: another process with the same VM. By place in `seen`.
pub fn partners(seen: &[Seen]) -> HashMap<usize, usize> {
    let vm = |seen: &Seen| seen.answer.as_ref().ok().and_then(|(status, _)| status.vm.clone());
    let mut found = HashMap::new();
    for (a, one) in seen.iter().enumerate() {
        let Some(id) = vm(one) else { continue };
        if let Some(b) = seen.iter().enumerate().position(|(b, other)| a != b && vm(other).as_ref() == Some(&id)) {
            found.insert(a, b);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Control;
    use crate::error::Error;
    use crate::events::Events;

    #[test]
    fn all_are_asked_and_one_that_does_not_answer_hides_no_other() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("twinstep");
        assert!(all(&folder).unwrap().is_empty());
        let events = Events::new("primary", true, None).unwrap();
        events.say("notice", "hello");
        let controls = ["a", "c"].map(|name| Control::open_in(&folder, name, "alone", &events).unwrap());
        // It listens and says nothing.
        let _silent = std::os::unix::net::UnixListener::bind(folder.join("b.sock")).unwrap();
        controls[0].board().set_vm("cafe");
        let seen = all(&folder).unwrap();
        let names: Vec<_> = seen.iter().map(|seen| seen.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c"]);
        let (status, said) = seen[0].answer.as_ref().unwrap();
        assert_eq!((status.vm.as_deref(), said[0].event.text.as_str()), (Some("cafe"), "hello"));
        let why = seen[1].answer.as_ref().unwrap_err().to_string();
        assert!(why.contains("does not answer"), "{why}");
        assert!(seen[2].answer.is_ok());
    }

    #[test]
    fn two_sides_of_a_vm_find_each_other() {
        let seen = |vm: Option<&str>| Seen {
            name: "x".into(),
            answer: Ok((Status { vm: vm.map(str::to_owned), ..Status::default() }, Vec::new())),
        };
        let lost = Seen { name: "x".into(), answer: Err(Error::new("gone")) };
        let all = [seen(Some("1")), lost, seen(None), seen(Some("2")), seen(None), seen(Some("1"))];
        assert_eq!(partners(&all), HashMap::from([(0, 5), (5, 0)]));
    }
}
