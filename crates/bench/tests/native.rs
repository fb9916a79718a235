//! Every workload works, natively and small: what a guest prints is compared with this. *In*: Debian's packages. *Out*: no problem, a digest for each.
//! Nothing is timed.

use std::path::Path;

use twinstep_bench::boot::{Session, Watch};
use twinstep_bench::engine::{Engine, Kind, Setting, check_native};
use twinstep_bench::guest;
use twinstep_bench::workload::{ALL, Group, Plan};
use twinstep_host::packages::{Store, tell_on_stderr};

#[test]
fn every_workload_works() {
    if let Err(e) = check_native() {
        // A container may forbid it; then there is no native run to test.
        eprintln!("{e}");
        return;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let programs: Vec<_> = ALL.iter().filter(|w| w.group != Group::Boot).collect();
    // Small, but so that each has something to do; redis-benchmark needs a request for each of its connections.
    let sizes: Vec<String> = programs.iter().map(|w| format!("{}={}", w.name, w.quick.min(20))).collect();
    let plan = Plan::new(true, &[], &sizes).unwrap();
    let built = guest::build(&Store::open().unwrap(), folder, &plan, &mut tell_on_stderr);
    let built = built.expect("the guest is built from Debian packages; is the mirror in reach?");
    let setting =
        Setting { kernel: &built.kernel, initrd: &built.initrd, root: &built.root, ram_mib: 0, recordings: folder.to_owned() };
    let native = Engine { name: "native".into(), kind: Kind::Native };
    let watch = Watch { cpu: None, ram_mib: 0, waits_for_nobody: false, console: folder.join("native.log") };
    let run = Session::start(&native.command(&setting), &watch).unwrap().finish().unwrap();
    assert_eq!(run.problem, None);
    for workload in programs {
        let measure = run.measures.get(workload.name).unwrap_or_else(|| panic!("{} was not run", workload.name));
        assert_eq!(measure.status, 0, "{}: {:?}", workload.name, measure.notes);
        // The digest of nothing would mean that nothing was done.
        let nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert!(measure.digest.as_deref().is_some_and(|d| d != nothing), "{} printed nothing", workload.name);
    }
}
