//! A side that was taken over is refused where it would do harm, and a person may decide where no arbiter answers.
mod common;

use common::{User, boot, boot_with_network, text, turn, words};
use rustix::process::Signal;

#[test]
fn a_host_that_hung_is_refused_at_the_switch() {
    let _turn = turn(2);
    let user = User::new();
    let (arbiter, socket) = (user.path().join("arbiter"), text(&user.path().join("switch")));
    std::fs::create_dir(&arbiter).unwrap();
    let at = words(&["--arbiter", &text(&arbiter)]);
    let switch = user.start("switch", &[&words(&["--listen", &socket]), &at]);
    while !std::path::Path::new(&socket).exists() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let net = format!("switch={socket}");
    let mut standby =
        user.start("standby", &[&at, &words(&["--once", "--listen", "127.0.0.1:0", "--name", "twin", "--net", &net])]);
    let address = standby.wait_said("waiting for a primary on ");
    let primary =
        user.start("run", &[&at, &words(&["--protect", &address, "--name", "db"]), &boot_with_network("256M", "shell", &net)]);
    primary.wait_console("# ");
    standby.wait_said("protection has started");
    switch.wait_said("Named(PortId(0), VM ");

    primary.signal(Signal::STOP);
    standby.wait_said("live: live in epoch 2");
    // Before the one that hung has woken up, its port is closed to it.
    let fenced = switch.wait_said("Fenced { port: PortId(0), ");
    assert!(fenced.contains("epoch 1, ") && fenced.contains("by: 2"), "{fenced}");
    standby.type_line("echo alive $((1 + 1))");
    standby.wait_console("alive 2");
    primary.signal(Signal::CONT);
    let primary = primary.end();
    assert!(primary.said.contains("stopped: ") && primary.status == Some(5), "{primary:#?}");
    switch.wait_said("Refused { port: PortId(0), ");
    standby.type_line("poweroff -f");
    standby.end().with(0);
}

#[test]
fn a_person_decides_where_no_arbiter_answers() {
    let _turn = turn(2);
    let user = User::new();
    let arbiter = user.path().join("arbiter");
    let away = arbiter.with_extension("away");
    std::fs::create_dir(&arbiter).unwrap();
    let at = words(&["--arbiter", &text(&arbiter)]);
    let mut standby = user.start("standby", &[&at, &words(&["--once", "--listen", "127.0.0.1:0", "--name", "twin"])]);
    let address = standby.wait_said("waiting for a primary on ");
    let mut primary = user.start("run", &[&at, &words(&["--protect", &address]), &boot("128M", "shell")]);
    primary.wait_console("# ");
    standby.wait_said("protection has started");
    let decide = |more: &[&str]| user.ask("arbiter", &[&["override", "twin"], more].concat());
    decide(&["--other-side-is-dead"]).with(1).says(&["does not wait for an arbiter"]);

    std::fs::rename(&arbiter, &away).unwrap();
    primary.kill();
    standby.wait_said("arbiter-unreachable: ");
    decide(&[]).with(1).says(&["two machines where there was one", "--other-side-is-dead"]);
    assert!(!standby.has_said("live: "));
    decide(&["--other-side-is-dead"]).with(0).shows("'twin' goes on in epoch 2");
    standby.wait_said("overridden: epoch 2 is this side's on a person's word");
    standby.wait_said("live: live in epoch 2");
    standby.type_line("echo alive $((1 + 1))");
    standby.wait_console("alive 2");
    std::fs::rename(&away, &arbiter).unwrap();
    standby.wait_said("the arbiter answers again; epoch 2 is entered");
    user.ask("arbiter", &["show", "twin", "--arbiter", &text(&arbiter)]).with(0).shows("epoch 2: process ");
    standby.type_line("poweroff -f");
    standby.end().with(0);
}
