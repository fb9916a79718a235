//! The arbiter in etcd.
//!
//! *In*: claims. *Out*: verdicts, and a key `PREFIX/VM/epoch-N` for every epoch that was won, whose value is the owner. *Invariant*: a win is reported
//! only on etcd's word that it created the key for us, or that the key holds our name; whatever else happens (no connection, no leader, a
//! late, strange or over-long answer) is unreachable. No secret is in an error, an event or `Debug`.
//!
//! # How
//! A claim is one transaction: if the key was never created, put our name; else read whose it is. etcd answers a transaction that may write only
//! after a majority has it on disk, so it is never stale, and a power failure does not undo it. There is no lease and no clock in it: a claim
//! holds for ever, as the directory's files do. An answer that got lost does no harm either: who asks again finds its own name.
//!
//! It is spoken to through its JSON gateway (etcd 3.4 or newer), in which keys and values are base64. The members are asked in turn, first the one that
//! answered last, each for a fair share of what is left of the time. A transaction may run at several of them: it gives the same owner each time.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use ureq::Agent;

use super::secrets::{self, Secret};
use super::spec::EtcdSpec;
use super::{Arbiter, Verdict, check_name};
use crate::error::{Error, Result};

/// How long a claim may take, all members together.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a connection may take, name look-up and TLS included.
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);
/// Longest answer. Ours have a few hundred bytes.
const LONGEST_ANSWER: u64 = 64 << 10;
/// Longest token; one of etcd's own has 30 bytes, a signed one (JWT) a few hundred.
const LONGEST_TOKEN: usize = 8 << 10;
/// How much of a complaint is shown, in letters.
const LONGEST_COMPLAINT: usize = 300;

/// The arbiter in etcd.
pub struct EtcdArbiter {
    agent: Agent,
    scheme: &'static str,
    endpoints: Vec<String>,
    prefix: String,
    login: Option<(String, Secret)>,
    /// We have a certificate to show.
    has_certificate: bool,
    patience: Duration,
    memory: Mutex<Memory>,
}

/// What one claim leaves for the next.
#[derive(Default)]
struct Memory {
    /// Whom to ask first.
    first: usize,
    token: Option<Secret>,
}

/// Why a member gave no verdict.
#[derive(Debug)]
pub(super) struct Failure {
    kind: Kind,
    pub(super) why: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// No answer.
    Silent,
    /// It does not know our token any more.
    Token,
    /// It does not do that for us.
    Refused,
    /// It can't do it, or it is not etcd.
    Strange,
}

impl Failure {
    pub(super) fn strange(why: impl Into<String>) -> Self {
        Self { kind: Kind::Strange, why: why.into() }
    }
}

pub(super) type Attempt<T> = std::result::Result<T, Failure>;

/// etcd's answer to a transaction. What is not looked at may be anything.
#[derive(Debug, Deserialize)]
struct TransactionAnswer {
    /// Every answer of etcd has it, and `{}` of somebody else has not.
    #[serde(rename = "header")]
    _header: Header,
    #[serde(default)]
    succeeded: bool,
    #[serde(default)]
    responses: Vec<StepAnswer>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Header {
    #[serde(rename = "revision")]
    _revision: IgnoredAny,
}

#[derive(Debug, Deserialize)]
struct StepAnswer {
    response_put: Option<IgnoredAny>,
    response_range: Option<RangeAnswer>,
}

#[derive(Debug, Deserialize)]
pub(super) struct RangeAnswer {
    #[serde(default)]
    pub(super) kvs: Vec<KeyValue>,
}

#[derive(Debug, Deserialize)]
pub(super) struct KeyValue {
    pub(super) key: String,
    /// Left out when it is empty.
    #[serde(default)]
    value: String,
}

#[derive(Debug, Deserialize)]
struct AuthenticateAnswer {
    token: String,
}

/// etcd's complaints; 3.4 has both fields, others one.
#[derive(Debug, Deserialize)]
struct Complaint {
    message: Option<String>,
    error: Option<String>,
}

impl EtcdArbiter {
    /// An arbiter at etcd, which must answer, know us, and let us write below the prefix.
    pub fn open(spec: &EtcdSpec) -> Result<Self> {
        Self::open_with(spec, PATIENCE)
    }

    fn open_with(spec: &EtcdSpec, patience: Duration) -> Result<Self> {
        let mut config = Agent::config_builder()
            // What HTTP_PROXY says is meant for the web. A redirect could lead to another cluster.
            .proxy(None)
            .max_redirects(0)
            .http_status_as_error(false)
            // Claims are rare, and a kept connection may be dead.
            .max_idle_connections(0)
            .max_response_header_size(16 << 10)
            .timeout_connect(Some(CONNECT_PATIENCE));
        if let Some(files) = &spec.tls {
            config = config.tls_config(secrets::tls_config(files)?).https_only(true);
        }
        let login = match &spec.login {
            Some(login) => Some((login.user.clone(), secrets::read_password(&login.password_file)?)),
            None => None,
        };
        let arbiter = Self {
            agent: config.build().into(),
            scheme: if spec.tls.is_some() { "https" } else { "http" },
            endpoints: spec.endpoints.clone(),
            prefix: spec.prefix.clone(),
            login,
            has_certificate: spec.tls.as_ref().is_some_and(|files| files.client.is_some()),
            patience,
            memory: Mutex::default(),
        };
        arbiter.probe()?;
        Ok(arbiter)
    }

    /// Asks for a claim that can't be granted, under a name no VM can have: revisions are not negative. etcd needs a majority for it, and checks whether
    /// we might write, but nothing is written.
    fn probe(&self) -> Result<()> {
        let key = format!("{}/.probe", self.prefix);
        let answer = self.ask(&transaction(&key, "LESS", "probe"), |answer| match &answer.responses[..] {
            [StepAnswer { response_range: Some(_), response_put: None }] if !answer.succeeded => Ok(()),
            _ => Err(Failure::strange("its answer makes no sense")),
        });
        let Err(failure) = answer else { return Ok(()) };
        let first = self.endpoints.first().map_or("HOST:PORT", String::as_str);
        let next = match failure.kind {
            Kind::Silent => {
                let tls = match (self.scheme, self.has_certificate) {
                    ("http", _) => "; where etcd wants TLS, write etcds://",
                    // In TLS 1.3 etcd says so after we have begun to ask, and its closed connection may be seen before its word.
                    (_, false) => "; where etcd wants to see a certificate, give --arbiter-cert and --arbiter-key",
                    _ => "",
                };
                format!(
                    "start etcd there, or give --arbiter another address; `curl {}://{first}/health` tells whether it answers{tls}",
                    self.scheme
                )
            }
            Kind::Token | Kind::Refused => format!(
                "check --arbiter-user and --arbiter-password-file; the user needs to read and write what begins with {0}/ \
                 (etcdctl role grant-permission ROLE readwrite {0}/ --prefix=true){1}",
                self.prefix,
                // etcd takes that name for a user's elsewhere, and its gateway does not.
                if self.scheme == "https" {
                    "; a certificate given with --arbiter-cert may have no common name then"
                } else {
                    ""
                }
            ),
            Kind::Strange => {
                "give --arbiter the client address of etcd 3.4 or newer; `etcdctl endpoint health` tells how it is".to_owned()
            }
        };
        let what = format!("etcd at {} cannot be the arbiter", self.endpoints.join(", "));
        Err(Error::new(what).because(failure.why).next(next))
    }

    /// What all our keys begin with.
    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The key that says who owns an epoch.
    #[must_use]
    pub fn key(&self, vm: &str, epoch: u64) -> String {
        format!("{}/{vm}/epoch-{epoch}", self.prefix)
    }

    fn try_claim(&self, vm: &str, epoch: u64, owner: &str) -> std::result::Result<Verdict, String> {
        check_name("VM", vm)?;
        check_name("owner", owner)?;
        let key = self.key(vm, epoch);
        let claim = transaction(&key, "EQUAL", owner);
        self.ask(&claim, |answer| verdict(answer, &key, owner)).map_err(|failure| failure.why)
    }

    /// A transaction, and what `read` understands of the answer.
    fn ask<T>(&self, transaction: &Value, read: impl Fn(&TransactionAnswer) -> Attempt<T>) -> Attempt<T> {
        self.call("kv/txn", transaction, read)
    }

    /// Asks one member after the other until one says something that `read` understands.
    pub(super) fn call<A: for<'a> Deserialize<'a>, T>(
        &self,
        call: &str,
        question: &Value,
        read: impl Fn(&A) -> Attempt<T>,
    ) -> Attempt<T> {
        let deadline = Instant::now() + self.patience;
        let (first, count) = (self.memory(|memory| memory.first), self.endpoints.len());
        let mut failures: Vec<Failure> = Vec::new();
        for n in 0..count {
            let which = (first + n) % count;
            let left = deadline.saturating_duration_since(Instant::now());
            // The time for those after it is kept; what it does not use is theirs, too.
            let share = left / u32::try_from(count - n).unwrap_or(u32::MAX);
            match self.ask_member(which, call, question, Instant::now() + share).and_then(|answer| read(&answer)) {
                Ok(found) => {
                    self.memory(|memory| memory.first = which);
                    return Ok(found);
                }
                Err(failure) => {
                    let why = format!("{}: {}", self.endpoints[which], self.for_people(&failure.why));
                    failures.push(Failure { why, ..failure });
                }
            }
        }
        self.memory(|memory| memory.first = (first + 1) % count.max(1));
        // Whoever answered knows more than who did not.
        let kind = failures.iter().map(|f| f.kind).find(|kind| *kind != Kind::Silent).unwrap_or(Kind::Silent);
        Err(Failure { kind, why: failures.into_iter().map(|f| f.why).collect::<Vec<_>>().join("; ") })
    }

    fn ask_member<A: for<'a> Deserialize<'a>>(
        &self,
        which: usize,
        call: &str,
        question: &Value,
        deadline: Instant,
    ) -> Attempt<A> {
        let ask = |token: Option<&Secret>| self.post(which, call, question, token, deadline);
        let Some((user, password)) = &self.login else { return ask(None) };
        if let Some(token) = self.memory(|memory| memory.token.clone()) {
            match ask(Some(&token)) {
                Err(failure) if failure.kind == Kind::Token => self.memory(|memory| memory.token = None),
                answered => return answered,
            }
        }
        let login = json!({ "name": user, "password": password.expose() });
        let answer: AuthenticateAnswer = self.post(which, "auth/authenticate", &login, None, deadline)?;
        let good = (1..=LONGEST_TOKEN).contains(&answer.token.len()) && answer.token.bytes().all(|b| b.is_ascii_graphic());
        if !good {
            return Err(Failure::strange("it gave a token that is none"));
        }
        let token = Secret::new(answer.token);
        self.memory(|memory| memory.token = Some(token.clone()));
        ask(Some(&token))
    }

    /// One question to one member.
    fn post<T: for<'a> Deserialize<'a>>(
        &self,
        which: usize,
        call: &str,
        question: &Value,
        token: Option<&Secret>,
        deadline: Instant,
    ) -> Attempt<T> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Failure { kind: Kind::Silent, why: "no time was left for it".to_owned() });
        }
        let url = format!("{}://{}/v3/{call}", self.scheme, self.endpoints[which]);
        let mut request = self.agent.post(url).config().timeout_global(Some(left)).build().content_type("application/json");
        if let Some(token) = token {
            request = request.header("Authorization", token.expose());
        }
        let mut response = request.send(question.to_string()).map_err(|e| no_answer(e, left))?;
        let status = response.status().as_u16();
        let text = response.body_mut().with_config().limit(LONGEST_ANSWER).read_to_vec().map_err(|e| no_answer(e, left))?;
        if status != 200 {
            return Err(complaint(status, &text));
        }
        serde_json::from_slice(&text).map_err(|e| Failure::strange(format!("its answer is not etcd's ({e})")))
    }

    fn memory<T>(&self, with: impl FnOnce(&mut Memory) -> T) -> T {
        with(&mut self.memory.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A server, or whoever plays it, may say much, send control characters to a terminal, or repeat what it was told.
    fn for_people(&self, text: &str) -> String {
        let token = self.memory(|memory| memory.token.clone());
        let secrets = self.login.iter().map(|(_, password)| password).chain(&token);
        let text = secrets.fold(text.to_owned(), |text, secret| text.replace(secret.expose(), "(secret)"));
        text.chars().take(LONGEST_COMPLAINT).map(|c| if c.is_control() { ' ' } else { c }).collect()
    }
}

impl Arbiter for EtcdArbiter {
    fn claim(&self, vm: &str, epoch: u64, owner: &str) -> Verdict {
        self.try_claim(vm, epoch, owner).unwrap_or_else(|why| Verdict::Unreachable { why })
    }
    fn owner(&self, vm: &str, epoch: u64) -> std::result::Result<Option<String>, String> {
        check_name("VM", vm)?;
        let key = self.key(vm, epoch);
        // Never granted, as the probe: etcd needs a majority for it, so the answer is not stale.
        self.ask(&transaction(&key, "LESS", ""), |answer| match &answer.responses[..] {
            [StepAnswer { response_range: Some(range), response_put: None }] if !answer.succeeded && range.kvs.is_empty() => {
                Ok(None)
            }
            _ => match verdict(answer, &key, "")? {
                Verdict::Lost { owner } => Ok(Some(owner)),
                _ => Err(Failure::strange("its answer makes no sense")),
            },
        })
        .map_err(|failure| failure.why)
    }
}

impl fmt::Debug for EtcdArbiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdArbiter").field("endpoints", &self.endpoints).field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

/// If the key's create revision compares so with 0 (which it is as long as the key does not exist), put the owner; else read the key.
fn transaction(key: &str, comparison: &str, owner: &str) -> Value {
    let (key, value) = (BASE64.encode(key), BASE64.encode(owner));
    json!({
        "compare": [{ "target": "CREATE", "key": key, "result": comparison, "create_revision": "0" }],
        "success": [{ "request_put": { "key": key, "value": value } }],
        "failure": [{ "request_range": { "key": key } }],
    })
}

/// What etcd's answer to a claim means.
fn verdict(answer: &TransactionAnswer, key: &str, owner: &str) -> Attempt<Verdict> {
    let nonsense = || Failure::strange("its answer makes no sense");
    match &answer.responses[..] {
        [StepAnswer { response_put: Some(_), response_range: None }] if answer.succeeded => Ok(Verdict::Won),
        [StepAnswer { response_put: None, response_range: Some(range) }] if !answer.succeeded => match &range.kvs[..] {
            [found] if BASE64.decode(&found.key).is_ok_and(|k| k == key.as_bytes()) => {
                let holder = BASE64.decode(&found.value).ok().and_then(|bytes| String::from_utf8(bytes).ok());
                let Some(holder) = holder.filter(|name| check_name("owner", name).is_ok()) else {
                    // Ours are always names: somebody else wrote this.
                    return Err(Failure::strange(format!(
                        "{key} holds no owner's name, so nobody knows whose epoch it is; see which side runs and put its name there"
                    )));
                };
                Ok(if holder == owner { Verdict::Won } else { Verdict::Lost { owner: holder } })
            }
            _ => Err(nonsense()),
        },
        _ => Err(nonsense()),
    }
}

fn no_answer(e: ureq::Error, left: Duration) -> Failure {
    let silent = |why: String| Failure { kind: Kind::Silent, why };
    match e {
        ureq::Error::Timeout(ureq::Timeout::Connect) => {
            silent(format!("no connection within {} ms", left.min(CONNECT_PATIENCE).as_millis()))
        }
        ureq::Error::Timeout(_) => silent(format!("no answer within {} ms", left.as_millis())),
        ureq::Error::Io(e) => silent(e.to_string()),
        ureq::Error::HostNotFound => silent("the name has no address".to_owned()),
        ureq::Error::BodyExceedsLimit(_) => Failure::strange(format!("its answer is longer than {LONGEST_ANSWER} bytes")),
        other => Failure::strange(other.to_string()),
    }
}

/// An HTTP status other than 200. What comes with it is somebody else's text.
fn complaint(status: u16, text: &[u8]) -> Failure {
    let said = serde_json::from_slice::<Complaint>(text).ok().and_then(|c| c.message.or(c.error));
    let said = said.unwrap_or_else(|| String::from_utf8_lossy(text).into_owned());
    let kind = match status {
        401 => Kind::Token,
        // etcd says so when users have changed since the token was made.
        400 if said.contains("revision of auth store is old") => Kind::Token,
        400 | 403 => Kind::Refused,
        _ => Kind::Strange,
    };
    let why = match (status, said.trim()) {
        (404, _) => "it does not know etcd's /v3/ calls (HTTP status 404)".to_owned(),
        (_, "") => format!("HTTP status {status}"),
        (_, said) => format!("HTTP status {status}, {said}"),
    };
    Failure { kind, why }
}

#[cfg(test)]
#[path = "etcd_tests.rs"]
mod tests;
