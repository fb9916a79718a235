//! The etcd arbiter against a server that plays etcd, well or badly. The real etcd: `crates/host/tests/etcd.rs`.
use super::*;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::arbiter::Login;

const HEADER: &str = r#""header":{"cluster_id":"1","member_id":"2","revision":"3","raft_term":"4"}"#;
/// Enough for a machine with other things to do; nothing waits so long unless a test is about silence.
const LONG: Duration = Duration::from_secs(20);

/// What the server was asked: the path, the token, the question.
struct Question {
    path: String,
    token: Option<String>,
    json: Value,
}

impl Question {
    fn read(stream: &TcpStream) -> Option<Self> {
        let mut reader = BufReader::new(stream);
        let mut line = || {
            let mut line = String::new();
            (reader.read_line(&mut line).ok()? > 0).then(|| line.trim_end().to_owned())
        };
        let first = line()?;
        let path = first.strip_prefix("POST ")?.strip_suffix(" HTTP/1.1")?.to_owned();
        let (mut length, mut token) = (0, None);
        loop {
            let header = line()?;
            let Some((name, value)) = header.split_once(": ") else { break };
            match name.to_lowercase().as_str() {
                "content-length" => length = value.parse().ok()?,
                "authorization" => token = Some(value.to_owned()),
                _ => {}
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        Some(Self { path, token, json: serde_json::from_slice(&body).ok()? })
    }

    fn key(&self) -> String {
        decoded(&self.json["compare"][0]["key"])
    }

    fn is_probe(&self) -> bool {
        self.path == "/v3/kv/txn" && self.key().ends_with("/.probe")
    }
}

fn decoded(value: &Value) -> String {
    String::from_utf8(BASE64.decode(value.as_str().unwrap()).unwrap()).unwrap()
}

/// The answer "it was there": what etcd says if the comparison failed.
fn found(key: &str, value: &str) -> String {
    let (key, value) = (BASE64.encode(key), BASE64.encode(value));
    format!(
        r#"{{{HEADER},"responses":[{{"response_range":{{"header":{{"revision":"3"}},"kvs":[{{"key":"{key}","create_revision":"2","mod_revision":"2","version":"1","value":"{value}"}}],"count":"1"}}}}]}}"#
    )
}

fn not_found() -> String {
    format!(r#"{{{HEADER},"responses":[{{"response_range":{{"header":{{"revision":"3"}}}}}}]}}"#)
}

fn created() -> String {
    format!(r#"{{{HEADER},"succeeded":true,"responses":[{{"response_put":{{"header":{{"revision":"3"}}}}}}]}}"#)
}

/// A server that answers probes as etcd does, and everything else as it is told: status and text, or nothing, for ever.
struct Server {
    endpoint: String,
    asked: Arc<AtomicUsize>,
}

impl Server {
    fn start(answer: impl Fn(&Question) -> Option<(u16, String)> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self { endpoint: listener.local_addr().unwrap().to_string(), asked: Arc::default() };
        let asked = server.asked.clone();
        // It ends with the test's process.
        std::thread::spawn(move || {
            let mut silent = Vec::new();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let Some(question) = Question::read(&stream) else { continue };
                let answered = if question.is_probe() {
                    Some((200, not_found()))
                } else {
                    asked.fetch_add(1, Ordering::SeqCst);
                    answer(&question)
                };
                let Some((status, text)) = answered else {
                    silent.push(stream);
                    continue;
                };
                // A client that has heard enough may be gone.
                let _ = write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n{text}", text.len());
            }
        });
        server
    }

    /// Always the same answer.
    fn saying(status: u16, text: impl Into<String>) -> Self {
        let text = text.into();
        Self::start(move |_| Some((status, text.clone())))
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

/// An address at which nobody listens.
fn dead() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

fn spec(endpoints: &[&str]) -> EtcdSpec {
    EtcdSpec {
        endpoints: endpoints.iter().map(|e| (*e).to_owned()).collect(),
        prefix: "test/prefix".into(),
        login: None,
        tls: None,
    }
}

fn arbiter(server: &Server) -> EtcdArbiter {
    EtcdArbiter::open_with(&spec(&[&server.endpoint]), LONG).unwrap()
}

fn unreachable(verdict: &Verdict, words: &[&str]) {
    let Verdict::Unreachable { why } = verdict else { panic!("{verdict}") };
    for word in words {
        assert!(why.contains(word), "{why} does not say {word}");
    }
}

#[test]
fn a_claim_is_one_transaction() {
    let server = Server::start(|question| {
        assert_eq!(question.path, "/v3/kv/txn");
        assert_eq!(question.token, None);
        assert_eq!(question.key(), "test/prefix/vm/epoch-7");
        let json = &question.json;
        assert_eq!(json["compare"][0]["target"], "CREATE");
        assert_eq!(json["compare"][0]["result"], "EQUAL");
        assert_eq!(json["compare"][0]["create_revision"], "0");
        assert_eq!(decoded(&json["success"][0]["request_put"]["key"]), "test/prefix/vm/epoch-7");
        assert_eq!(decoded(&json["success"][0]["request_put"]["value"]), "left");
        let read = json["failure"][0]["request_range"].as_object().unwrap();
        assert_eq!(decoded(&read["key"]), "test/prefix/vm/epoch-7");
        assert_eq!(read.len(), 1, "no `serializable`, no range");
        Some((200, created()))
    });
    let arbiter = arbiter(&server);
    assert_eq!(arbiter.claim("vm", 7, "left"), Verdict::Won);
    assert_eq!(server.asked(), 1);
    assert_eq!(arbiter.key("vm", 7), "test/prefix/vm/epoch-7");
}

#[test]
fn whoever_is_in_the_key_has_won() {
    let server = Server::start(|question| Some((200, found(&question.key(), "left"))));
    let arbiter = arbiter(&server);
    assert_eq!(arbiter.claim("vm", 1, "right"), Verdict::Lost { owner: "left".into() });
    // An answer was lost, or it asks once more.
    assert_eq!(arbiter.claim("vm", 1, "left"), Verdict::Won);
    assert_eq!(arbiter.claim("vm", 1, "left"), Verdict::Won);
}

#[test]
fn what_is_not_understood_is_no_verdict() {
    let key = "test/prefix/vm/epoch-1";
    let kvs = |kvs: &str| format!(r#"{{{HEADER},"responses":[{{"response_range":{{"kvs":{kvs}}}}}]}}"#);
    let empty = BASE64.encode(key);
    for (status, text, word) in [
        (200, String::new(), "not etcd's"),
        (200, "<html>".into(), "not etcd's"),
        (200, "{}".into(), "not etcd's"),
        (200, "[]".into(), "not etcd's"),
        (200, "[".repeat(60_000), "not etcd's"),
        (200, r#"{"succeeded":true}"#.into(), "not etcd's"),
        (200, r#"{"header":{"revision":"3"},"succeeded":"true"}"#.into(), "not etcd's"),
        (200, format!("{{{HEADER}}}"), "makes no sense"),
        (200, format!(r#"{{{HEADER},"succeeded":true}}"#), "makes no sense"),
        (200, created().replace("response_put", "response_txn"), "makes no sense"),
        (200, created().replace(r#""succeeded":true,"#, ""), "makes no sense"),
        (200, found(key, "vm").replace(HEADER, &format!(r#"{HEADER},"succeeded":true"#)), "makes no sense"),
        (200, not_found(), "makes no sense"),
        (200, kvs("[{},{}]"), "not etcd's"),
        (200, kvs(r#"[{"key":"%%%","value":"YQ=="}]"#), "makes no sense"),
        (200, found("test/prefix/vm/epoch-2", "left"), "makes no sense"),
        (200, found(key, ""), "holds no owner's name"),
        (200, found(key, "a b"), "holds no owner's name"),
        (200, found(key, &"x".repeat(101)), "holds no owner's name"),
        (200, kvs(&format!(r#"[{{"key":"{empty}"}}]"#)), "holds no owner's name"),
        (200, kvs(&format!(r#"[{{"key":"{empty}","value":"/w=="}}]"#)), "holds no owner's name"),
        (200, format!("{}{}", created(), " ".repeat(70_000)), "longer than 65536 bytes"),
        (204, String::new(), "HTTP status 204"),
        (302, String::new(), "HTTP status 302"),
        (404, "404 page not found".into(), "does not know"),
        (500, String::new(), "HTTP status 500"),
        (500, "a\x1b[31mlert".into(), "a [31mlert"),
        (503, r#"{"error":"etcdserver: no leader","code":14}"#.into(), "HTTP status 503, etcdserver: no leader"),
        (503, created(), "HTTP status 503"),
    ] {
        let server = Server::saying(status, text);
        unreachable(&arbiter(&server).claim("vm", 1, "left"), &[word, &server.endpoint]);
        assert_eq!(server.asked(), 1);
    }
}

#[test]
fn what_is_no_http_is_no_verdict() {
    for text in ["", "\r\n\r\n", "SSH-2.0-OpenSSH_9.2\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let _ = Question::read(&stream);
                let _ = stream.write_all(text.as_bytes());
            }
        });
        let error = EtcdArbiter::open_with(&spec(&[&endpoint]), LONG).unwrap_err().to_string();
        assert!(error.contains("cannot be the arbiter") && error.contains(&endpoint), "{error}");
    }
    // Headers without end.
    let server = Server::saying(200, "");
    let flood = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = flood.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in flood.incoming() {
            let mut stream = stream.unwrap();
            let _ = Question::read(&stream);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n");
            while stream.write_all(b"X-Filler: and so on, and so on\r\n").is_ok() {}
        }
    });
    let error = EtcdArbiter::open_with(&spec(&[&endpoint]), LONG).unwrap_err().to_string();
    assert!(error.contains("cannot be the arbiter"), "{error}");
    drop(server);
}

#[test]
fn a_silent_server_is_not_waited_for_longer_than_it_may_take() {
    let server = Server::start(|_| None);
    let mut arbiter = arbiter(&server);
    arbiter.patience = Duration::from_millis(200);
    let begun = Instant::now();
    unreachable(&arbiter.claim("vm", 1, "left"), &["no answer within"]);
    // Not a measurement: far below the patience of any other layer.
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert!(PATIENCE <= Duration::from_secs(3) && CONNECT_PATIENCE < PATIENCE);
}

#[test]
fn the_next_member_is_asked_when_one_is_dead_or_silent() {
    let (silent, good) = (Server::start(|_| None), Server::start(|q| Some((200, found(&q.key(), "left")))));
    let dead = dead();
    let mut arbiter = EtcdArbiter::open_with(&spec(&[&dead, &silent.endpoint, &good.endpoint]), LONG).unwrap();
    // The probe found the second one; it uses up its third of the time.
    arbiter.patience = Duration::from_secs(6);
    assert_eq!(arbiter.claim("vm", 1, "left"), Verdict::Won);
    assert_eq!((silent.asked(), good.asked()), (1, 1));
    // The one that answered is asked first.
    assert_eq!(arbiter.claim("vm", 1, "right"), Verdict::Lost { owner: "left".into() });
    assert_eq!((silent.asked(), good.asked()), (1, 2));
}

#[test]
fn when_nobody_answers_all_are_named() {
    let (bad, dead) = (Server::saying(500, "broken"), dead());
    let arbiter = EtcdArbiter::open_with(&spec(&[&bad.endpoint, &dead]), LONG).unwrap();
    for _ in 0..2 {
        unreachable(&arbiter.claim("vm", 1, "left"), &[&bad.endpoint, "broken", &dead, "refused", "; "]);
    }
    assert_eq!(bad.asked(), 2);
}

#[test]
fn names_are_checked_before_anybody_is_asked() {
    let server = Server::saying(200, created());
    let arbiter = arbiter(&server);
    for name in ["", "../vm", ".probe", "a/b", "a b"] {
        unreachable(&arbiter.claim(name, 1, "left"), &["cannot be the name of a VM"]);
        unreachable(&arbiter.claim("vm", 1, name), &["cannot be the name of a owner"]);
    }
    assert_eq!(server.asked(), 0);
}

const PASSWORD: &str = "open-sesame";

fn with_login(server: &Server) -> (tempfile::TempDir, Result<EtcdArbiter>) {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let password_file: PathBuf = dir.path().join("password");
    std::fs::write(&password_file, format!("{PASSWORD}\n")).unwrap();
    std::fs::set_permissions(&password_file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let login = Some(Login { user: "me".into(), password_file });
    let opened = EtcdArbiter::open_with(&EtcdSpec { login, ..spec(&[&server.endpoint]) }, LONG);
    (dir, opened)
}

/// Plays etcd with users: the n-th log-in gives `token-n`, and each token is good for so many claims.
fn with_users(claims: usize) -> Server {
    let (mut logins, mut left) = (0, 0);
    let state = Mutex::new(move |question: &Question| {
        if question.path == "/v3/auth/authenticate" {
            assert_eq!(question.json, json!({ "name": "me", "password": PASSWORD }));
            assert_eq!(question.token, None);
            (logins, left) = (logins + 1, claims);
            return (200, format!(r#"{{{HEADER},"token":"token-{logins}"}}"#));
        }
        if question.token != Some(format!("token-{logins}")) || left == 0 {
            return (401, r#"{"error":"etcdserver: invalid auth token","code":16}"#.into());
        }
        left -= 1;
        (200, created())
    });
    Server::start(move |question| Some((state.lock().unwrap())(question)))
}

#[test]
fn an_expired_token_is_renewed_once() {
    let server = with_users(2);
    let (_dir, arbiter) = with_login(&server);
    let arbiter = arbiter.unwrap();
    assert_eq!(server.asked(), 1, "logged in for the probe");
    for epoch in 0..2 {
        assert_eq!(arbiter.claim("vm", epoch, "left"), Verdict::Won);
    }
    assert_eq!(server.asked(), 3);
    assert_eq!(arbiter.claim("vm", 2, "left"), Verdict::Won);
    assert_eq!(server.asked(), 6, "refused, logged in, granted");
}

#[test]
fn a_token_that_is_never_good_is_not_renewed_for_ever() {
    let server = with_users(0);
    let (_dir, arbiter) = with_login(&server);
    let arbiter = arbiter.unwrap();
    unreachable(&arbiter.claim("vm", 1, "left"), &["invalid auth token"]);
    assert_eq!(server.asked(), 4, "a log-in for the probe; refused, logged in, refused");
}

#[test]
fn tokens_that_are_none() {
    for token in [String::new(), "a b".into(), "a\\r\\nX: y".into(), "x".repeat(9000)] {
        let server = Server::saying(200, format!(r#"{{{HEADER},"token":"{token}"}}"#));
        let error = with_login(&server).1.unwrap_err().to_string();
        assert!(error.contains("a token that is none"), "{error}");
    }
}

#[test]
fn secrets_are_not_shown() {
    let server = with_users(9);
    let (_dir, arbiter) = with_login(&server);
    let shown = format!("{:?}", arbiter.unwrap());
    assert!(shown.contains(&server.endpoint) && !shown.contains(PASSWORD) && !shown.contains("token-"), "{shown}");
    // Whoever plays etcd knows the password now, and says it.
    let parrot = Server::start(|question| Some((400, json!({ "message": question.json.to_string() }).to_string())));
    let error = with_login(&parrot).1.unwrap_err().to_string();
    assert!(error.contains("(secret)") && !error.contains(PASSWORD), "{error}");
    assert!(error.contains("--arbiter-password-file"), "{error}");
}

#[test]
fn who_is_not_there_is_refused_at_the_start() {
    let dead = dead();
    let error = EtcdArbiter::open_with(&spec(&[&dead]), LONG).unwrap_err().to_string();
    for words in ["etcd at ", &dead, "cannot be the arbiter", "refused", "what to do: start etcd", "--arbiter"] {
        assert!(error.contains(words), "{error}");
    }
}
