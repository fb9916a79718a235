//! The arbiter in the real etcd: Debian's, from the package cache, on the loopback address. Needs apt and a Debian mirror; where there is no apt, it is
//! skipped.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use twinstep_host::arbiter::{Arbiter, ArbiterOptions, ArbiterSpec, Verdict};
use twinstep_host::error::Result;
use twinstep_host::packages::{Store, tell_on_stderr};
use twinstep_host::passt::free_port;

/// How long etcd may take to be ready; it needs less than a second.
const PATIENCE: Duration = Duration::from_secs(60);

/// A cluster of one member in a folder of its own.
struct Etcd {
    program: PathBuf,
    folder: tempfile::TempDir,
    /// Plain, with TLS if there are certificates, and for other members, who never come.
    ports: [u16; 3],
    certificates: bool,
    child: Option<Child>,
}

impl Etcd {
    /// A member that is ready; nothing where there is no apt.
    fn start(certificates: bool) -> Option<Self> {
        if Command::new("apt-get").arg("--version").output().is_err() {
            eprintln!("skipped: this host has no apt-get");
            return None;
        }
        let package = Store::open().unwrap().package("etcd-server", &mut tell_on_stderr).unwrap();
        let program = package.root.join("usr/bin/etcd");
        let folder = tempfile::tempdir().unwrap();
        let mut etcd = Self { program, folder, ports: [0; 3], certificates, child: None };
        if certificates && !make_certificates(etcd.folder.path()) {
            eprintln!("skipped: this host has no openssl");
            return None;
        }
        // A port that was free may be taken by somebody else before etcd has it.
        for _ in 0..5 {
            etcd.ports = [(); 3].map(|()| free_port().unwrap());
            if etcd.run() {
                return Some(etcd);
            }
        }
        panic!("etcd does not start: {}", fs::read_to_string(etcd.path("log")).unwrap_or_default());
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts the process and waits until it answers; `false` if it ended instead.
    fn run(&mut self) -> bool {
        let [plain, tls, peers] = self.ports.map(|port| format!("127.0.0.1:{port}"));
        let (plain, peers) = (format!("http://{plain}"), format!("http://{peers}"));
        let clients = if self.certificates { format!("{plain},https://{tls}") } else { plain.clone() };
        let log = fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        let mut command = Command::new(&self.program);
        command.args(["--name", "test", "--initial-cluster", &format!("test={peers}")]);
        command.args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers]);
        command.args(["--listen-client-urls", &clients, "--advertise-client-urls", &plain]);
        command.arg("--data-dir").arg(self.path("data"));
        if self.certificates {
            command.arg("--client-cert-auth");
            for (option, file) in [("--cert-file", "server.pem"), ("--key-file", "server.key"), ("--trusted-ca-file", "ca.pem")] {
                command.arg(option).arg(self.path(file));
            }
        }
        // What the user has set for an etcd of theirs is not for ours.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("ETCD_")) {
            command.env_remove(name);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        // SAFETY: prctl is async-signal-safe. A test that dies takes etcd with it.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let child = self.child.insert(command.spawn().unwrap());
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if child.try_wait().unwrap().is_some() {
                return false;
            }
            if agent().get(format!("{plain}/health")).call().is_ok() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("etcd is not ready: {}", fs::read_to_string(self.path("log")).unwrap_or_default());
    }

    fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(self.child.as_ref().unwrap()), signal).unwrap();
    }

    /// Killed without warning, and started again.
    fn restart(&mut self) {
        self.kill();
        assert!(self.run(), "{}", fs::read_to_string(self.path("log")).unwrap_or_default());
    }

    fn plain(&self) -> ArbiterOptions {
        ArbiterOptions { place: Some(format!("etcd://127.0.0.1:{}/test", self.ports[0]).into()), ..ArbiterOptions::default() }
    }

    /// A call of the gateway, as etcdctl would make it.
    fn call(&self, call: &str, question: &Value) {
        let url = format!("http://127.0.0.1:{}/v3/{call}", self.ports[0]);
        agent().post(url).send(question.to_string()).unwrap_or_else(|e| panic!("{call}: {e}"));
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
    }
}

/// The loopback address is not reached through a proxy.
fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().proxy(None).timeout_global(Some(Duration::from_secs(10))).build().into()
}

/// Asks again while nobody knows, as a pair does: the machine may be busy.
fn settled(arbiter: &dyn Arbiter, vm: &str, epoch: u64, owner: &str) -> Verdict {
    let begun = Instant::now();
    loop {
        match arbiter.claim(vm, epoch, owner) {
            Verdict::Unreachable { .. } if begun.elapsed() < PATIENCE => {}
            verdict => return verdict,
        }
    }
}

fn open(options: &ArbiterOptions) -> Result<Box<dyn Arbiter>> {
    let spec: ArbiterSpec = options.clone().check()?.unwrap();
    spec.open()
}

fn refused(options: &ArbiterOptions, words: &[&str]) {
    let Err(error) = open(options) else { panic!("{options:?} was not refused") };
    let error = error.to_string();
    for word in words {
        assert!(error.contains(word), "{error} does not say {word}");
    }
}

fn lost(owner: &str) -> Verdict {
    Verdict::Lost { owner: owner.into() }
}

#[test]
fn one_wins_and_stays_the_winner_whatever_becomes_of_etcd() {
    let Some(mut etcd) = Etcd::start(false) else { return };
    let owners = ["left", "right"];
    let barrier = Barrier::new(2);
    let race = |owner: &'static str| {
        let arbiter = open(&etcd.plain()).unwrap();
        let claim = |epoch| {
            barrier.wait();
            settled(&*arbiter, "vm", epoch, owner)
        };
        (0..20).map(claim).collect::<Vec<_>>()
    };
    let [left, right] = std::thread::scope(|scope| {
        let race = &race;
        owners.map(|owner| scope.spawn(move || race(owner))).map(|thread| thread.join().unwrap())
    });
    let mut winners = Vec::new();
    for (left, right) in left.iter().zip(&right) {
        winners.push(match (left, right) {
            (Verdict::Won, right) if *right == lost("left") => "left",
            (left, Verdict::Won) if *left == lost("right") => "right",
            both => panic!("{both:?}"),
        });
    }
    let arbiter = open(&etcd.plain()).unwrap();
    let verdicts_hold = || {
        for (epoch, winner) in (0..).zip(&winners) {
            for owner in owners {
                let expected = if owner == *winner { Verdict::Won } else { lost(winner) };
                assert_eq!(settled(&*arbiter, "vm", epoch, owner), expected);
            }
        }
    };
    verdicts_hold();
    etcd.restart();
    verdicts_hold();

    // It hears nothing, or hears it too late to tell.
    etcd.signal(Signal::STOP);
    let verdict = arbiter.claim("vm", 20, "left");
    assert!(matches!(verdict, Verdict::Unreachable { .. }), "{verdict}");
    refused(&etcd.plain(), &["cannot be the arbiter", "no answer within", "--arbiter"]);
    etcd.signal(Signal::CONT);
    // It may have been entered meanwhile or not: for nobody else in any case.
    assert_eq!(settled(&*arbiter, "vm", 20, "left"), Verdict::Won);
    assert_eq!(settled(&*arbiter, "vm", 20, "right"), lost("left"));
    verdicts_hold();

    // Another VM, another prefix: free.
    assert_eq!(settled(&*arbiter, "other", 0, "right"), Verdict::Won);
    let elsewhere = ArbiterOptions { place: Some(format!("etcd://127.0.0.1:{}", etcd.ports[0]).into()), ..etcd.plain() };
    assert_eq!(settled(&*open(&elsewhere).unwrap(), "vm", 20, "right"), Verdict::Won);

    etcd.kill();
    let verdict = arbiter.claim("vm", 21, "left");
    assert!(matches!(&verdict, Verdict::Unreachable { why } if why.contains("refused")), "{verdict}");
    refused(&etcd.plain(), &["cannot be the arbiter", "refused", "start etcd there"]);
}

/// An authority, etcd's certificate, ours, and one with a common name; and an authority nobody knows.
fn make_certificates(folder: &Path) -> bool {
    let openssl = |arguments: &str| {
        let output = Command::new("openssl").args(arguments.split(' ')).current_dir(folder).output();
        let Ok(output) = output else { return false };
        assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        true
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
    for authority in ["ca", "stranger"] {
        let basic = "-addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign";
        if !openssl(&format!(
            "req -x509 -config /dev/null {key} -subj /CN={authority} -keyout {authority}.key -out {authority}.pem {basic}"
        )) {
            return false;
        }
    }
    for (name, subject) in [("server", "/CN=server"), ("client", "/O=twins"), ("named", "/CN=twin")] {
        fs::write(folder.join("extensions"), "basicConstraints=CA:FALSE\nsubjectAltName=IP:127.0.0.1,DNS:localhost\n").unwrap();
        openssl(&format!("req -new -config /dev/null {key} -subj {subject} -keyout {name}.key -out {name}.csr"));
        openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile extensions -out {name}.pem"
        ));
        fs::set_permissions(folder.join(format!("{name}.key")), fs::Permissions::from_mode(0o600)).unwrap();
    }
    true
}

#[test]
fn standbys_are_registered_for_a_while() {
    let Some(etcd) = Etcd::start(false) else { return };
    let spec = etcd.plain().check().unwrap().unwrap();
    let registry = spec.registry().unwrap();
    assert!(registry.list().unwrap().is_empty());
    registry.put("b:7171", 60).unwrap();
    registry.put("a:7171", 60).unwrap();
    registry.put("b:7171", 60).unwrap();
    assert_eq!(registry.list().unwrap(), ["a:7171", "b:7171"]);
    // What somebody else writes there is no address, or next to it.
    for key in ["test/.standbys/no address", "test/.standbys0:1", "test/.standby/x:1"] {
        etcd.call("kv/put", &json!({ "key": BASE64.encode(key), "value": "eA==" }));
    }
    assert_eq!(registry.list().unwrap(), ["a:7171", "b:7171"]);
    registry.remove("a:7171").unwrap();
    registry.remove("a:7171").unwrap();
    assert_eq!(registry.list().unwrap(), ["b:7171"]);
    // Of a host that died it goes away by itself, and what was taken for the epochs does not.
    let arbiter = open(&etcd.plain()).unwrap();
    assert_eq!(settled(&*arbiter, "vm", 2, "left"), Verdict::Won);
    registry.put("c:7171", 1).unwrap();
    let begun = Instant::now();
    while registry.list().unwrap().contains(&"c:7171".to_owned()) {
        assert!(begun.elapsed() < PATIENCE, "the lease does not end");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(registry.list().unwrap(), ["b:7171"]);
    assert_eq!(settled(&*arbiter, "vm", 2, "right"), lost("left"));
}

#[test]
fn with_tls_and_a_user() {
    let Some(mut etcd) = Etcd::start(true) else { return };
    let password_file = |name: &str, password: &str| {
        let path = etcd.path(name);
        fs::write(&path, format!("{password}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    };
    let good = ArbiterOptions {
        place: Some(format!("etcds://localhost:{}/mine", etcd.ports[1]).into()),
        user: Some("twin".into()),
        password_file: Some(password_file("password", "open-sesame")),
        ca: Some(etcd.path("ca.pem")),
        cert: Some(etcd.path("client.pem")),
        key: Some(etcd.path("client.key")),
    };
    let wrong_password = ArbiterOptions { password_file: Some(password_file("wrong", "close-sesame")), ..good.clone() };

    // The range of keys that begin with "mine/" ends before "mine0".
    let permission = json!({ "permType": "READWRITE", "key": "bWluZS8=", "range_end": "bWluZTA=" });
    for (call, question) in [
        ("auth/role/add", json!({ "name": "root" })),
        ("auth/user/add", json!({ "name": "root", "password": "r" })),
        ("auth/user/grant", json!({ "user": "root", "role": "root" })),
        ("auth/user/add", json!({ "name": "twin", "password": "open-sesame" })),
        ("auth/role/add", json!({ "name": "twins" })),
        ("auth/role/grant", json!({ "name": "twins", "perm": permission })),
        ("auth/user/grant", json!({ "user": "twin", "role": "twins" })),
        ("auth/enable", json!({})),
    ] {
        etcd.call(call, &question);
    }

    let arbiter = open(&good).unwrap();
    assert_eq!(settled(&*arbiter, "vm", 2, "left"), Verdict::Won);
    assert_eq!(settled(&*open(&good).unwrap(), "vm", 2, "right"), lost("left"));

    refused(&wrong_password, &["authentication failed", "--arbiter-password-file"]);
    refused(&ArbiterOptions { user: None, password_file: None, ..good.clone() }, &["user name is empty", "--arbiter-user"]);
    let place = |text: String| ArbiterOptions { place: Some(text.into()), ..good.clone() };
    refused(&place(format!("etcds://localhost:{}/others", etcd.ports[1])), &["permission denied", "others/ --prefix"]);
    refused(&place(format!("etcds://localhost:{}/mine", etcd.ports[0])), &["cannot be the arbiter"]);
    let plainly = ArbiterOptions { ca: None, cert: None, key: None, ..place(format!("etcd://localhost:{}", etcd.ports[1])) };
    refused(&plainly, &["cannot be the arbiter", "write etcds://"]);
    refused(&ArbiterOptions { ca: Some(etcd.path("stranger.pem")), ..good.clone() }, &["certificate", "UnknownIssuer"]);
    refused(&ArbiterOptions { cert: None, key: None, ..good.clone() }, &["ertificate"]);
    let named = ArbiterOptions { cert: Some(etcd.path("named.pem")), key: Some(etcd.path("named.key")), ..good.clone() };
    refused(&named, &["CommonName", "no common name"]);
    refused(
        &ArbiterOptions { key: Some(etcd.path("server.key")), ..good.clone() },
        &["does not go with the key", "--arbiter-cert"],
    );

    // The same user may register standbys, which are below the prefix as well.
    let registry = good.clone().check().unwrap().unwrap().registry().unwrap();
    registry.put("b:7171", 30).unwrap();
    assert_eq!(registry.list().unwrap(), ["b:7171"]);

    // etcd forgets its tokens when it dies.
    etcd.restart();
    assert_eq!(settled(&*arbiter, "vm", 2, "right"), lost("left"));
    assert_eq!(settled(&*arbiter, "vm", 3, "left"), Verdict::Won);
}
