//! Real handshakes over loopback: the two sides of a pair, and everybody else who may come.
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{JoinHandle, spawn};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustls::client::{ClientConfig, Resumption};
use rustls::pki_types::ServerName;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConnection, RootCertStore, crypto};
use tempfile::TempDir;
use twinstep_pair::wire::{self, Message};

use super::security::{PROTOCOL, hasty_provider};
use super::*;
use crate::error::Result;
use crate::events::Events;
use crate::{pki, secret_file};

/// An authority with a primary `a` and a standby `127.0.0.1`.
struct Pki(TempDir);

impl Pki {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        pki::init(dir.path(), 2).unwrap();
        let pki = Self(dir);
        pki.issue("a");
        pki.issue("127.0.0.1");
        pki
    }
    fn issue(&self, name: &str) {
        pki::issue(self.0.path(), name, &[], 1).unwrap();
    }
    fn of(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
    fn primary(&self) -> Security {
        tls(&self.of("a"), None, &[])
    }
    fn standby(&self) -> Security {
        tls(&self.of("127.0.0.1"), None, &[])
    }
}

fn tls(folder: &Path, peer_name: Option<&str>, expected: &[&str]) -> Security {
    let options =
        ChannelOptions { tls: Some(folder.to_owned()), peer_name: peer_name.map(str::to_owned), ..ChannelOptions::default() };
    options.open(&expected.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap()
}

/// A standby that waits.
struct Standby {
    address: SocketAddr,
    events: Events,
    thread: JoinHandle<Result<Channel>>,
}

impl Standby {
    fn start(security: Security) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, events) = (listener.local_addr().unwrap(), Events::new("standby", true, None).unwrap());
        let said = events.clone();
        Self { address, events, thread: spawn(move || accept(&listener, &security, &said)) }
    }
    fn reach(&self, security: &Security) -> Result<Channel> {
        reach(&self.address.to_string(), security, CONNECT_PATIENCE)
    }
    /// A stranger's connection.
    fn stranger(&self) -> TcpStream {
        TcpStream::connect(self.address).unwrap()
    }
    /// Not one of those who came was taken, and the standby said why of each; a primary is still taken.
    fn still_takes(self, primary: &Security, said: &[&str]) {
        let (ours, theirs) = self.pair(primary);
        drop((ours, theirs.0));
        let strangers: Vec<String> =
            theirs.1.history().into_iter().filter(|k| k.event.what == "stranger").map(|k| k.event.text).collect();
        assert_eq!(strangers.len(), said.len(), "{strangers:#?}");
        for words in said {
            assert!(strangers.iter().any(|text| text.contains(words)), "'{words}' is not in {strangers:#?}");
        }
    }
    /// A primary comes and is taken.
    fn pair(self, primary: &Security) -> (Duplex, (Channel, Events)) {
        let mut ours = self.reach(primary).unwrap().open().unwrap();
        ours.send(&wire::MAGIC).unwrap();
        let channel = self.thread.join().unwrap().unwrap();
        (ours, (channel, self.events))
    }
    /// Waits until it has said so much of strangers: they are met on threads of their own.
    fn wait_said(&self, strangers: usize) {
        let said =
            || self.events.history().iter().filter(|kept| kept.event.what == "stranger").map(|kept| kept.times).sum::<u64>();
        let deadline = Instant::now() + 20 * PATIENCE;
        while said() < strangers as u64 {
            assert!(Instant::now() < deadline, "{:#?}", self.events.history());
            std::thread::yield_now();
        }
    }
}

/// Waits until something can be done.
fn wait(duplex: &Duplex) {
    let interest = if duplex.wants_write() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
    poll(&mut [PollFd::new(&duplex.waitable(), interest)], None).unwrap();
}

/// What comes next: at least one byte, or none at the end.
fn next(duplex: &mut Duplex, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        duplex.flush()?;
        match duplex.receive(buffer) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => wait(duplex),
            result => return result,
        }
    }
}

/// All that comes, to the end; an error if it ends badly.
fn read_all(duplex: &mut Duplex) -> io::Result<Vec<u8>> {
    let (mut all, mut buffer) = (Vec::new(), vec![0; 100_000]);
    loop {
        match next(duplex, &mut buffer)? {
            0 => return Ok(all),
            n => all.extend_from_slice(&buffer[..n]),
        }
    }
}

fn read_some(duplex: &mut Duplex, n: usize) -> Vec<u8> {
    let (mut bytes, mut filled) = (vec![0; n], 0);
    while filled < n {
        match next(duplex, &mut bytes[filled..]).unwrap() {
            0 => panic!("it ends after {filled} bytes"),
            more => filled += more,
        }
    }
    bytes
}

#[test]
fn two_sides_that_know_each_other() {
    let pki = Pki::new();
    let standby = Standby::start(tls(&pki.of("127.0.0.1"), None, &["somebody", "a"]));
    let (mut primary, (channel, events)) = standby.pair(&pki.primary());
    let mut standby = channel.open().unwrap();
    primary.send(b" and more").unwrap();
    primary.finish().unwrap();
    standby.send(b"an answer").unwrap();
    standby.finish().unwrap();
    assert_eq!(read_all(&mut standby).unwrap(), b"TWPR and more");
    assert_eq!(read_all(&mut primary).unwrap(), b"an answer");
    let said = events.history().pop().unwrap().event;
    assert!(said.what == "connected" && said.text.contains("TLS 1.3, a)"), "{said:?}");
}

#[test]
fn in_the_clear_on_this_host() {
    let (mut primary, (channel, _)) = Standby::start(Security::OnThisHost).pair(&Security::OnThisHost);
    let mut standby = channel.open().unwrap();
    primary.send(b" and more").unwrap();
    primary.finish().unwrap();
    standby.finish().unwrap();
    primary.send(b"too late").unwrap();
    assert_eq!(read_all(&mut standby).unwrap(), b"TWPR and more");
    assert_eq!(read_all(&mut primary).unwrap(), b"");
}

/// A long log in both directions at once, more than the sockets take: nobody waits for ever, keys are updated on the way, all bytes arrive.
#[test]
fn both_directions_at_once_through_many_updates_of_keys() {
    const BYTES: usize = 12 << 20;
    let pki = Pki::new();
    // The same configurations with keys that are worn out after 40 records; in earnest it is after 16 million.
    let provider = Arc::new(hasty_provider(40));
    let hasty = |security: Security| {
        let Security::Tls(mut configured) = security else { unreachable!("it is made with files") };
        let folder = if configured.peer_name.is_some() { "a" } else { "127.0.0.1" };
        let chain = secret_file::certificates(&pki.of(folder).join("cert.pem"), "").unwrap();
        let key = secret_file::key(&pki.of(folder).join("key.pem"), "").unwrap();
        let roots = Arc::new(authority(&pki));
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .unwrap();
        client.alpn_protocols = vec![PROTOCOL.to_vec()];
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build().unwrap();
        let mut server = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .unwrap();
        server.alpn_protocols = vec![PROTOCOL.to_vec()];
        server.send_tls13_tickets = 0;
        (configured.client, configured.server) = (Arc::new(client), Arc::new(server));
        Security::Tls(configured)
    };
    let primary = hasty(tls(&pki.of("a"), Some("127.0.0.1"), &[]));
    let (ours, (channel, _)) = Standby::start(hasty(pki.standby())).pair(&primary);
    let mut theirs = channel.open().unwrap();
    assert_eq!(read_some(&mut theirs, 4), b"TWPR");
    let byte = |at: usize, salt: usize| (at.wrapping_mul(31).wrapping_add(at >> 9) ^ salt) as u8;
    let exchange = move |mut duplex: Duplex, sent, received| {
        spawn(move || {
            let bytes: Vec<u8> = (0..BYTES).map(|at| byte(at, sent)).collect();
            // Sizes from one byte to more than a piece, and more at a time than a socket takes.
            let (mut rest, mut size) = (&bytes[..], 1);
            while !rest.is_empty() {
                let (now, later) = rest.split_at(size.min(rest.len()));
                duplex.send(now).unwrap();
                (rest, size) = (later, size * 3 % 200_003);
            }
            duplex.finish().unwrap();
            let all = read_all(&mut duplex).unwrap();
            assert!(all.len() == BYTES && all.iter().enumerate().all(|(at, b)| *b == byte(at, received)));
            // What is still to be sent is.
            duplex.part(20 * PATIENCE);
        })
    };
    // The first does not read before it has put in everything.
    for thread in [exchange(ours, 1, 2), exchange(theirs, 2, 1)] {
        thread.join().unwrap();
    }
}

#[test]
fn a_certificate_of_another_authority() {
    let (pki, other) = (Pki::new(), Pki::new());
    let standby = Standby::start(pki.standby());
    let error = standby.reach(&other.primary()).unwrap_err().to_string();
    assert!(error.contains("UnknownIssuer") && error.contains("certificates of one authority"), "{error}");
    // One who believes the standby, with a certificate that the standby does not believe.
    let mixed = ChannelOptions { tls: Some(other.of("a")), tls_ca: Some(pki.of("ca.pem")), ..ChannelOptions::default() };
    let error = standby.reach(&mixed.open(&[]).unwrap()).unwrap_err().to_string();
    assert!(error.contains("received fatal alert") && error.contains("does not like our certificate"), "{error}");
    standby.wait_said(2);
    standby.still_takes(&pki.primary(), &["received fatal alert", "UnknownIssuer"]);
}

#[test]
fn another_name_than_the_one_that_is_asked_for() {
    let pki = Pki::new();
    pki.issue("b");
    let standby = Standby::start(tls(&pki.of("127.0.0.1"), None, &["c", "a"]));
    let error = standby.reach(&tls(&pki.of("a"), Some("elsewhere"), &[])).unwrap_err().to_string();
    assert!(error.contains("--peer-name") && error.contains("elsewhere"), "{error}");
    let error = standby.reach(&tls(&pki.of("b"), None, &[])).unwrap_err().to_string();
    assert!(error.contains("--expect-peer"), "{error}");
    standby.wait_said(2);
    standby.still_takes(&pki.primary(), &["received fatal alert", "not valid for"]);
    // The name need not be the address.
    let standby = Standby::start(tls(&pki.of("b"), None, &[]));
    standby.reach(&pki.primary()).unwrap_err();
    standby.wait_said(1);
    standby.still_takes(&tls(&pki.of("a"), Some("b"), &[]), &["received fatal alert"]);
}

#[test]
fn a_certificate_that_is_over_or_not_for_this() {
    let pki = Pki::new();
    let standby = Standby::start(pki.standby());
    // The authority's own certificate is not one for a host.
    let authority = ChannelOptions {
        tls_ca: Some(pki.of("ca.pem")),
        tls_cert: Some(pki.of("ca.pem")),
        tls_key: Some(pki.of("ca-key.pem")),
        ..ChannelOptions::default()
    };
    standby.reach(&authority.open(&[]).unwrap()).unwrap_err();
    standby.wait_said(1);
    standby.still_takes(&pki.primary(), &["CaUsedAsEndEntity"]);
}

#[test]
fn a_certificate_that_was_withdrawn() {
    let pki = Pki::new();
    let (a, standby) = (pki.primary(), Standby::start(pki.standby()));
    pki.issue("b");
    let b = tls(&pki.of("b"), None, &[]);
    let revoke = |name: &str| pki::revoke(pki.0.path(), &[name.to_owned()], &[], 1).unwrap();
    // While the standby waits.
    revoke("a");
    let error = standby.reach(&a).unwrap_err().to_string();
    assert!(error.contains("received fatal alert"), "{error}");
    standby.wait_said(1);
    standby.still_takes(&b, &["Revoked"]);
    // The primary looks as well, and neither uses a certificate of its own that it knows to be withdrawn.
    let standby = Standby::start(pki.standby());
    revoke("127.0.0.1");
    let error = standby.reach(&b).unwrap_err().to_string();
    assert!(error.contains("Revoked"), "{error}");
    let own = |name: &str| ChannelOptions { tls: Some(pki.of(name)), ..ChannelOptions::default() };
    let error = own("a").open(&[]).unwrap_err().to_string();
    assert!(error.contains("our own certificate was withdrawn") && error.contains("pki issue"), "{error}");
    // Whoever has no list knows nothing of it.
    std::fs::remove_file(pki.of("b").join("crl.pem")).unwrap();
    standby.wait_said(1);
    standby.still_takes(&b, &["received fatal alert"]);
}

#[test]
fn a_list_that_is_worth_nothing_lets_nobody_in() {
    let (pki, other) = (Pki::new(), Pki::new());
    let (a, standby) = (pki.primary(), Standby::start(pki.standby()));
    let own = || ChannelOptions { tls: Some(pki.of("127.0.0.1")), ..ChannelOptions::default() };
    let refuses = |options: ChannelOptions, words: &[&str]| {
        let error = options.open(&[]).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
    };
    let ago = |hours| time::OffsetDateTime::now_utc() - time::Duration::hours(hours);
    pki::revoke_until(pki.0.path(), &[], &[], ago(48), ago(24)).unwrap();
    standby.reach(&a).unwrap_err();
    refuses(own(), &["has run out", "twinstep pki revoke", "every host"]);
    let list = pki.of("127.0.0.1").join("crl.pem");
    pki::revoke(other.0.path(), &[], &[], 1).unwrap();
    std::fs::copy(other.of("crl.pem"), &list).unwrap();
    // It says nothing of this authority's certificates.
    refuses(own(), &["cannot be used", "UnknownRevocationStatus"]);
    std::fs::write(&list, "nothing").unwrap();
    refuses(own(), &["holds no list of withdrawn certificates"]);
    refuses(ChannelOptions { tls_crl: Some(pki.of("missing.pem")), ..own() }, &["missing.pem", "check --tls-crl"]);
    // One that is named instead of it, and comes to be good again.
    let named = ChannelOptions { tls_crl: Some(pki.of("crl.pem")), ..own() };
    refuses(named.clone(), &["has run out"]);
    pki::revoke(pki.0.path(), &[], &[], 1).unwrap();
    named.open(&[]).unwrap();
    standby.wait_said(1);
    standby.still_takes(&a, &["received fatal alert"]);
}

fn authority(pki: &Pki) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add(secret_file::certificates(&pki.of("ca.pem"), "").unwrap().swap_remove(0)).unwrap();
    roots
}

/// Somebody's own TLS: what it hears at the end.
fn foreign(standby: &Standby, config: ClientConfig) -> String {
    let mut tls = ClientConnection::new(Arc::new(config), ServerName::try_from("127.0.0.1").unwrap()).unwrap();
    let mut stream = standby.stranger();
    let mut tls = rustls::Stream::new(&mut tls, &mut stream);
    let mut byte = [0];
    match tls.read(&mut byte) {
        Ok(n) => panic!("{n} bytes were sent to a stranger"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn other_kinds_of_tls() {
    let pki = Pki::new();
    let standby = Standby::start(pki.standby());
    let provider = Arc::new(crypto::ring::default_provider());
    let builder = |version| {
        let builder = ClientConfig::builder_with_provider(provider.clone()).with_protocol_versions(&[version]).unwrap();
        builder.with_root_certificates(authority(&pki))
    };
    let mut nameless = builder(&TLS13).with_no_client_auth();
    nameless.alpn_protocols = vec![PROTOCOL.to_vec()];
    assert!(foreign(&standby, nameless).contains("CertificateRequired"));
    let own = |version| {
        let chain = secret_file::certificates(&pki.of("a").join("cert.pem"), "").unwrap();
        let mut config =
            builder(version).with_client_auth_cert(chain, secret_file::key(&pki.of("a").join("key.pem"), "").unwrap()).unwrap();
        config.resumption = Resumption::disabled();
        config
    };
    let mut old = own(&TLS12);
    old.alpn_protocols = vec![PROTOCOL.to_vec()];
    assert!(foreign(&standby, old).contains("ProtocolVersion"));
    let mut web = own(&TLS13);
    web.alpn_protocols = vec![b"h2".to_vec()];
    let heard = foreign(&standby, web);
    assert!(heard.contains("NoApplicationProtocol"), "{heard}");
    // Who does not say what it wants gets nothing.
    foreign(&standby, own(&TLS13));
    standby.wait_said(4);
    standby.still_takes(
        &pki.primary(),
        &["peer sent no certificates", "Tls12NotOffered", "any known protocol", "it wants another service"],
    );
}

#[test]
fn in_the_clear_to_one_that_wants_tls_and_the_reverse() {
    let pki = Pki::new();
    let standby = Standby::start(pki.standby());
    let mut primary = standby.reach(&Security::OnThisHost).unwrap().open().unwrap();
    primary.send(&wire::MAGIC).unwrap();
    let mut decoder = wire::Decoder::new();
    decoder.push(&read_all(&mut primary).unwrap());
    let Ok(Some(Message::Refuse { reason })) = decoder.next_message() else { panic!("a refusal is a frame") };
    assert!(reason.contains("--tls"), "{reason}");
    standby.wait_said(1);
    standby.still_takes(&pki.primary(), &["does not speak TLS"]);

    let standby = Standby::start(Security::OnThisHost);
    let error = standby.reach(&pki.primary()).unwrap_err().to_string();
    assert!(error.contains("cannot agree on TLS") && error.contains("start the standby with --tls"), "{error}");
    standby.wait_said(1);
    standby.still_takes(&Security::OnThisHost, &["it speaks TLS"]);
}

#[test]
fn noise() {
    let pki = Pki::new();
    for (security, primary) in [(pki.standby(), pki.primary()), (Security::OnThisHost, Security::OnThisHost)] {
        let standby = Standby::start(security);
        // The third begins like TLS, the fourth like a pair's frame.
        let noise = [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 100_000], b"\x16\x03\x03\xff\xff nonsense", b"TWPx", b""];
        for noise in noise {
            // It may hang up before it has read all.
            let _ = standby.stranger().write_all(noise);
        }
        standby.wait_said(noise.len());
        let mut byte = [0];
        let mut silent = standby.stranger();
        assert!(matches!(silent.read(&mut byte), Ok(0)), "who says nothing is sent away");
        standby.wait_said(noise.len() + 1);
        standby.pair(&primary);
    }
}

/// More of them than there are places, for longer than anybody waits: whoever means it gets through, at once.
#[test]
fn a_crowd_of_silent_clients_holds_up_nobody() {
    let pki = Pki::new();
    for (security, primary) in [(pki.standby(), pki.primary()), (Security::OnThisHost, Security::OnThisHost)] {
        let standby = Standby::start(security);
        let crowd: Vec<TcpStream> = (0..100).map(|_| standby.stranger()).collect();
        let began = Instant::now();
        let (_, (_, events)) = standby.pair(&primary);
        assert!(began.elapsed() < PATIENCE, "it had to wait until the others were sent away");
        let said = events.history();
        assert!(said[0].event.text.contains("closed"), "the oldest gave way: {said:#?}");
        drop(crowd);
    }
}

/// One that sends a byte now and then is given up all the same.
#[test]
fn who_drips_runs_out_of_time() {
    let pki = Pki::new();
    let standby = Standby::start(pki.standby());
    let mut slow = standby.stranger();
    let mut heard = slow.try_clone().unwrap();
    let dripping = spawn(move || {
        // A record's head that announces 256 bytes, and then they come.
        let mut bytes = vec![0x16, 3, 1, 1, 0, 1, 0, 0, 252];
        bytes.resize(261, 0);
        for (n, byte) in bytes.iter().enumerate() {
            if slow.write_all(&[*byte]).is_err() {
                return n;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bytes.len()
    });
    let _ = heard.read_to_end(&mut Vec::new());
    standby.wait_said(1);
    drop(heard);
    assert!(dripping.join().unwrap() < 261);
    standby.still_takes(&pki.primary(), &["does not go on within"]);
}

#[test]
fn a_connection_that_is_cut_or_tampered_with_does_not_look_finished() {
    let pki = Pki::new();
    // Cut: an end that the other side has not announced.
    let (mut primary, (channel, _)) = Standby::start(pki.standby()).pair(&pki.primary());
    drop(channel);
    let error = read_all(&mut primary).unwrap_err();
    assert!(matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset), "{error}");

    // Tampered with: bytes put in from outside. What came before is still handed on.
    let (mut primary, (channel, _)) = Standby::start(pki.standby()).pair(&pki.primary());
    let mut standby = channel.open().unwrap();
    standby.send(b"the last good words").unwrap();
    let mut forged = vec![0x17, 3, 3, 0, 40];
    forged.resize(45, 7);
    standby.stream().write_all(&forged).unwrap();
    assert_eq!(read_some(&mut primary, 19), b"the last good words");
    let error = read_all(&mut primary).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
}

#[test]
fn nothing_leaves_this_host_in_the_clear_by_mistake() {
    let pki = Pki::new();
    for (address, here) in [
        ("127.0.0.1", true),
        ("127.9.9.9", true),
        ("::1", true),
        ("::ffff:127.0.0.1", true),
        ("0.0.0.0", false),
        ("::", false),
        ("10.0.0.1", false),
        ("fe80::1", false),
    ] {
        let address: IpAddr = address.parse().unwrap();
        assert_eq!(Security::OnThisHost.allows(address).is_ok(), here, "{address}");
        Security::Plaintext.allows(address).unwrap();
        pki.primary().allows(address).unwrap();
    }
    // An address for documents, which nobody has: it is not even tried.
    let error = reach("192.0.2.1:7171", &Security::OnThisHost, CONNECT_PATIENCE).unwrap_err().to_string();
    assert!(error.contains("--tls DIR") && error.contains("--plaintext") && error.contains("192.0.2.1"), "{error}");
}

#[test]
fn options() {
    let pki = Pki::new();
    let of = |text: &str| -> ChannelOptions { toml::from_str(text).unwrap() };
    assert!(matches!(of("").open(&[]).unwrap(), Security::OnThisHost));
    assert!(matches!(of("plaintext = true").open(&[]).unwrap(), Security::Plaintext));
    assert!(toml::from_str::<ChannelOptions>("tls_ca = 'x'").is_err());
    let a = pki.of("a").display().to_string();
    // What one names wins over the folder.
    of(&format!("tls = '{a}'\ntls-ca = '{}'", pki.of("ca.pem").display())).open(&[]).unwrap();
    let refused = |text: &str, expected: &[&str], words: &[&str]| {
        let expected: Vec<String> = expected.iter().map(|name| (*name).to_owned()).collect();
        let error = of(text).open(&expected).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)) && error.contains("what to do"), "{error}");
        assert!(!error.contains("PRIVATE"), "{error}");
    };
    refused(&format!("tls = '{a}'\nplaintext = true"), &[], &["exclude each other"]);
    refused("peer-name = 'b'", &[], &["only be known with TLS"]);
    refused("plaintext = true", &["b"], &["only be known with TLS"]);
    refused(&format!("tls-cert = '{a}/cert.pem'"), &[], &["no --tls-ca"]);
    refused(&format!("tls = '{a}'\npeer-name = 'a b'"), &[], &["'a b'", "--peer-name"]);
    refused(&format!("tls = '{a}'"), &["*"], &["'*'", "--expect-peer"]);
    refused("tls = '/nowhere'", &[], &["/nowhere/ca.pem", "check --tls"]);
    refused(&format!("tls = '{a}'\ntls-key = '{}/key.pem'", pki.of("127.0.0.1").display()), &[], &["does not go with"]);
    refused(&format!("tls = '{a}'\ntls-cert = '{a}/key.pem'"), &[], &["holds no certificate", "--tls-cert"]);

    let file = of("tls = 'f'\ntls-key = 'k'\npeer-name = 'p'");
    assert_eq!(file.clone().overridden_by(ChannelOptions::default()), file);
    assert_eq!(file.clone().overridden_by(of("tls = 'g'")), of("tls = 'g'\npeer-name = 'p'"));
    assert_eq!(file.overridden_by(of("plaintext = true")), of("plaintext = true"));
    assert_eq!(of("plaintext = true").overridden_by(of("tls = 'g'")), of("tls = 'g'"));
}

#[test]
fn who_prints_it_sees_no_secret() {
    let pki = Pki::new();
    let shown = format!("{:?}", pki.primary());
    assert_eq!(shown, "Tls(Tls)");
    let key = secret_file::key(&pki.of("a").join("key.pem"), "").unwrap();
    assert!(!format!("{key:?}").contains(&format!("{:?}", &key.secret_der()[40..50])));
    let (primary, (channel, _)) = Standby::start(pki.standby()).pair(&pki.primary());
    for shown in [format!("{primary:?}"), format!("{channel:?}")] {
        assert!(shown.contains("Session"), "{shown}");
        assert!(!shown.contains("Connection") && shown.len() < 400, "{shown}");
    }
}
