//! A pair whose hosts authenticate each other: certificates by `twinstep pki`, a failover over TLS, and who is kept out.
mod common;

use std::path::Path;

use common::{Twinstep, boot, folder, text, turn, twinstep, words};

/// An authority with certificates for a primary called `alpha` and a standby at 127.0.0.1.
fn pki(folder: &Path) {
    let folder = text(folder);
    twinstep(&["pki", "init", &folder]).with(0).shows("ca-key.pem secret");
    twinstep(&["pki", "issue", &folder, "alpha"]).with(0).shows("scp -rp");
    twinstep(&["pki", "issue", &folder, "beta", "--address", "127.0.0.1", "--days", "30"]).with(0);
}

#[test]
fn a_failover_over_tls() {
    let _turn = turn(2);
    let folder = folder();
    let (arbiter, certificates) = (folder.path().join("arbiter"), folder.path().join("pki"));
    std::fs::create_dir(&arbiter).unwrap();
    pki(&certificates);
    let arbiter = words(&["--arbiter", &text(&arbiter)]);
    let own = |host: &str| words(&["--tls", &text(&certificates.join(host))]);
    let listen = words(&["standby", "--listen", "127.0.0.1:0", "--expect-peer", "alpha", "--expect-vm", "db"]);
    let standby = Twinstep::start("standby", &[listen, arbiter.clone(), own("beta")].concat());
    let address = standby.wait_said("waiting for a primary on ");

    // One that the standby does not expect, and one that does not know what it talks to: no guest starts.
    let protect = words(&["--protect", &address]);
    let machine = boot("128M", "shell");
    Twinstep::run(&[&machine, &protect, &arbiter, &own("beta")]).end().refused(&["cannot agree on TLS", "--expect-peer"]);
    standby.wait_said("only valid for");
    let other_name = words(&["--peer-name", "gamma"]);
    Twinstep::run(&[&machine, &protect, &arbiter, &own("alpha"), &other_name]).end().refused(&["gamma", "--peer-name"]);

    // One that was withdrawn while the standby waits, and had no word of that itself.
    let place = text(&certificates);
    twinstep(&["pki", "issue", &place, "delta"]).with(0);
    let away = folder.path().join("away");
    std::fs::rename(certificates.join("delta"), &away).unwrap();
    twinstep(&["pki", "revoke", &place, "--cert", &text(&away.join("cert.pem"))]).with(0).shows("has 1 withdrawn certificates");
    Twinstep::run(&[&machine, &protect, &arbiter, &words(&["--tls", &text(&away)])]).end().refused(&["cannot agree on TLS"]);
    standby.wait_said("Revoked");

    let mut primary = Twinstep::run(&[&machine, &protect, &arbiter, &own("alpha"), &words(&["--name", "db"])]);
    standby.wait_said("(TLS 1.3, alpha)");
    standby.wait_said("(db, 128 MiB");
    primary.wait_said("protected: ");
    primary.wait_console("# ");
    primary.type_line(
        "i=0; echo it began: $((1 + 1)); while [ $i -lt 40000 ]; do i=$((i + 1)); done; echo counted to $i; poweroff -f",
    );
    primary.wait_console("it began: 2");
    primary.kill();
    assert!(!primary.has_shown("counted to 40000"), "it was killed in the middle");
    standby.wait_said("live: live in epoch 2");
    let ended = standby.end().with(0);
    ended.shows("counted to 40000");
}

#[test]
fn another_vm_than_the_one_that_is_expected() {
    let _turn = turn(1);
    let folder = folder();
    let arbiter = words(&["--arbiter", &text(folder.path())]);
    let listen = words(&["standby", "--once", "--listen", "127.0.0.1:0", "--expect-vm", "db", "--expect-vm", "mail"]);
    let standby = Twinstep::start("standby", &[listen, arbiter.clone()].concat());
    let address = standby.wait_said("waiting for a primary on ");
    let mut primary = Twinstep::run(&[&boot("128M", "shell"), &words(&["--protect", &address, "--name", "web"]), &arbiter]);
    standby.end().with(1).says(&["pairing refused", "expects the VM db or mail, not \"web\""]);
    primary.wait_said("pairing refused");
    primary.wait_console("# ");
    primary.type_line("poweroff -f");
    primary.end().with(0).says(&["expects the VM db or mail"]);
}

/// Beyond this host nothing is sent in the clear unless somebody says so.
#[test]
fn in_the_clear_only_when_it_is_said() {
    let folder = folder();
    let arbiter = text(folder.path());
    let ways_out = ["neither encrypted nor authenticated", "--tls DIR", "--plaintext"];
    twinstep(&["standby", "--listen", "0.0.0.0:0", "--arbiter", &arbiter]).refused(&ways_out);
    let machine = boot("128M", "none");
    // An address for documents: nobody is there.
    let protect = words(&["--protect", "192.0.2.1:7171", "--arbiter", &arbiter]);
    Twinstep::run(&[&machine, &protect]).end().refused(&ways_out);
    let standby = Twinstep::start("standby", &words(&["standby", "--listen", "0.0.0.0:0", "--plaintext", "--arbiter", &arbiter]));
    standby.wait_said("waiting for a primary on 0.0.0.0:");
    Twinstep::run(&[&machine, &words(&["--plaintext"])]).end().refused(&["--protect"]);
    twinstep(&["standby", "--listen", "127.0.0.1:0", "--expect-vm", "a b", "--arbiter", &arbiter]).refused(&["--expect-vm"]);
}

#[test]
fn nothing_of_a_pki_is_overwritten() {
    let folder = folder();
    let place = text(folder.path());
    twinstep(&["pki", "issue", &place, "alpha"]).refused(&["ca.pem", "pki init"]);
    pki(folder.path());
    twinstep(&["pki", "init", &place]).refused(&["already"]);
    twinstep(&["pki", "issue", &place, "alpha"]).refused(&["nothing is overwritten"]);
    twinstep(&["pki", "issue", &place, "gamma", "--days", "0"]).refused(&["--days"]);
}
