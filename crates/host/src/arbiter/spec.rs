//! Which arbiter a command line means.
//!
//! *In*: what `--arbiter` and the options beside it say. *Out*: an [`ArbiterSpec`] that can be opened. *Invariant*: a spec is consistent (a user has a
//! password, TLS has an authority), every part of it is checked, and no secret is in it: secrets come from files, which are read when the
//! arbiter is opened.

use std::ffi::OsString;
use std::net::Ipv6Addr;
use std::path::PathBuf;

use super::{Arbiter, DirectoryArbiter, EtcdArbiter, Registry};
use crate::error::{Error, Result};

/// Where etcd listens if nothing else is said.
const DEFAULT_PORT: u16 = 2379;
/// What keys begin with if nothing else is said.
const DEFAULT_PREFIX: &str = "twinstep";
/// etcd advises against clusters of more than seven. All of them must be asked within a claim's time.
const MOST_ENDPOINTS: usize = 9;
/// Longest prefix.
const LONGEST_PREFIX: usize = 200;
/// How an arbiter is written.
pub const SYNTAX: &str =
    "give --arbiter a directory both hosts share, or etcd://HOST[:PORT][,HOST[:PORT]...][/PREFIX] (with TLS etcds://...)";

/// What was said on the command line.
#[derive(Debug, Clone, Default)]
pub struct ArbiterOptions {
    /// `--arbiter`
    pub place: Option<OsString>,
    /// `--arbiter-user`
    pub user: Option<String>,
    /// `--arbiter-password-file`
    pub password_file: Option<PathBuf>,
    /// `--arbiter-ca`
    pub ca: Option<PathBuf>,
    /// `--arbiter-cert`
    pub cert: Option<PathBuf>,
    /// `--arbiter-key`
    pub key: Option<PathBuf>,
}

/// An arbiter to be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ArbiterSpec {
    /// A directory both hosts share.
    Directory(PathBuf),
    /// etcd.
    Etcd(EtcdSpec),
}

/// An etcd cluster, and who we are there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdSpec {
    /// `HOST:PORT` of each member.
    pub endpoints: Vec<String>,
    /// What our keys begin with, without a slash at the end.
    pub prefix: String,
    /// Who we are, if etcd wants to know.
    pub login: Option<Login>,
    /// TLS, if `etcds://` was said.
    pub tls: Option<TlsFiles>,
}

/// A user of etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// The name.
    pub user: String,
    /// The file with the password.
    pub password_file: PathBuf,
}

/// Files for TLS, all in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The authorities that may vouch for etcd.
    pub ca: PathBuf,
    /// Our certificate and its key, if etcd wants to see one.
    pub client: Option<(PathBuf, PathBuf)>,
}

impl ArbiterOptions {
    /// The arbiter that is meant, if any.
    pub fn check(self) -> Result<Option<ArbiterSpec>> {
        let extra = [
            ("--arbiter-user", self.user.is_some()),
            ("--arbiter-password-file", self.password_file.is_some()),
            ("--arbiter-ca", self.ca.is_some()),
            ("--arbiter-cert", self.cert.is_some()),
            ("--arbiter-key", self.key.is_some()),
        ];
        let extra = extra.into_iter().find(|(_, given)| *given).map(|(name, _)| name);
        let Some(place) = self.place else {
            return match extra {
                None => Ok(None),
                Some(name) => Err(Error::new(format!("{name} says how to reach an arbiter, but there is none")).next(SYNTAX)),
            };
        };
        // A directory may have any name, also one that is no text.
        let (scheme, rest) = place.to_str().and_then(|text| text.split_once("://")).unwrap_or_default();
        let encrypted = match scheme {
            "etcd" => false,
            "etcds" => true,
            "" => {
                return match extra {
                    None if place.is_empty() => Err(Error::new("--arbiter is empty").next(SYNTAX)),
                    None => Ok(Some(ArbiterSpec::Directory(place.into()))),
                    Some(name) => Err(Error::new(format!("{name} is for etcd, and {} is a directory", place.display()))
                        .next(format!("leave {name} away, or give --arbiter etcd://HOST"))),
                };
            }
            other => return Err(Error::new(format!("there is no arbiter of the kind {other}://")).next(SYNTAX)),
        };
        let (hosts, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        // It may be followed by a password, so what was given is not repeated.
        if hosts.contains('@') {
            return Err(Error::new("--arbiter has a user in its address, where everybody sees it")
                .next("give --arbiter-user NAME and --arbiter-password-file FILE instead"));
        }
        let wrong = |why: String| Error::new(format!("{scheme}://{rest} cannot be the arbiter")).because(why).next(SYNTAX);
        let endpoints = hosts.split(',').map(endpoint).collect::<std::result::Result<Vec<_>, _>>().map_err(wrong)?;
        if endpoints.len() > MOST_ENDPOINTS {
            return Err(wrong(format!("it has {} endpoints, {MOST_ENDPOINTS} are the most", endpoints.len())));
        }
        let prefix = self::prefix(prefix).map_err(wrong)?;
        let login = match (self.user, self.password_file) {
            (None, None) => None,
            (Some(user), _) if user.is_empty() || user.len() > 200 || user.contains(char::is_control) => {
                return Err(Error::new("--arbiter-user gives no name etcd could know").next("give a name of up to 200 letters"));
            }
            (Some(user), Some(password_file)) => Some(Login { user, password_file }),
            (Some(user), None) => {
                return Err(Error::new(format!("the arbiter's user {user} needs a password"))
                    .next("write it into a file only you can read, and give --arbiter-password-file FILE"));
            }
            (None, Some(_)) => {
                return Err(Error::new("--arbiter-password-file without a user").next("give --arbiter-user NAME"));
            }
        };
        let client = match (self.cert, self.key) {
            (None, None) => None,
            (Some(cert), Some(key)) => Some((cert, key)),
            (Some(_), None) => return Err(Error::new("--arbiter-cert needs its key").next("give --arbiter-key FILE")),
            (None, Some(_)) => return Err(Error::new("--arbiter-key needs its certificate").next("give --arbiter-cert FILE")),
        };
        let tls = match (encrypted, self.ca, client) {
            (true, Some(ca), client) => Some(TlsFiles { ca, client }),
            (true, None, _) => {
                return Err(Error::new(format!("who may vouch for etcd at {hosts}?"))
                    .next("give --arbiter-ca FILE, the certificate of the authority that signed etcd's (PEM)"));
            }
            (false, None, None) => None,
            (false, ..) => {
                return Err(Error::new("certificates were given, but etcd:// is not encrypted")
                    .next(format!("write etcds://{rest}, or leave --arbiter-ca, --arbiter-cert and --arbiter-key away")));
            }
        };
        Ok(Some(ArbiterSpec::Etcd(EtcdSpec { endpoints, prefix, login, tls })))
    }
}

impl ArbiterSpec {
    /// Opens it, and finds out whether it is there: better now than in the moment of need.
    pub fn open(&self) -> Result<Box<dyn Arbiter>> {
        Ok(match self {
            Self::Directory(folder) => Box::new(DirectoryArbiter::open(folder)?),
            Self::Etcd(spec) => Box::new(EtcdArbiter::open(spec)?),
        })
    }

    /// Where standbys say that they wait.
    ///
    /// # Errors
    /// If the arbiter is not etcd, or does not answer.
    pub fn registry(&self) -> Result<Registry> {
        match self {
            Self::Etcd(spec) => Ok(Registry::new(EtcdArbiter::open(spec)?)),
            Self::Directory(folder) => {
                Err(Error::new(format!("standbys are registered at etcd, and the arbiter is the directory {}", folder.display()))
                    .next("give --arbiter etcd://HOST, or name the standbys: --protect HOST:PORT,HOST:PORT"))
            }
        }
    }
}

/// `HOST[:PORT]` with its port; HOST is a name, an IPv4 address, or an IPv6 address in brackets.
fn endpoint(text: &str) -> std::result::Result<String, String> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']').ok_or_else(|| format!("`{text}` has no closing bracket"))?;
            let address: Ipv6Addr = address.parse().map_err(|_| format!("`{address}` is no IPv6 address"))?;
            let port = match port.strip_prefix(':') {
                None if port.is_empty() => None,
                None => return Err(format!("`{port}` is no port")),
                port => port,
            };
            (format!("[{address}]"), port)
        }
        None => {
            let (host, port) = text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port)));
            let good = (1..=253).contains(&host.len())
                && host.split('.').all(|label| (1..=63).contains(&label.len()) && !label.starts_with('-'))
                && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'));
            if !good {
                return Err(format!("`{host}` is no host (an IPv6 address needs brackets: [::1])"));
            }
            (host.to_owned(), port)
        }
    };
    let port = match port {
        None => DEFAULT_PORT,
        Some(port) => port.parse().ok().filter(|port| *port != 0).ok_or_else(|| format!("`{port}` is no port"))?,
    };
    Ok(format!("{host}:{port}"))
}

/// What keys begin with. It is shown in commands to copy, so it has only letters no shell cares about.
fn prefix(text: &str) -> std::result::Result<String, String> {
    if text.is_empty() {
        return Ok(DEFAULT_PREFIX.to_owned());
    }
    let text = text.strip_suffix('/').unwrap_or(text);
    let good = text.len() <= LONGEST_PREFIX
        && text
            .split('/')
            .all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')));
    if good { Ok(text.to_owned()) } else { Err(format!("`{text}` cannot be a prefix: use letters, digits, - _ . and single /")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(place: &str) -> ArbiterOptions {
        ArbiterOptions { place: Some(place.into()), ..ArbiterOptions::default() }
    }

    fn etcd(options: ArbiterOptions) -> EtcdSpec {
        match options.check() {
            Ok(Some(ArbiterSpec::Etcd(spec))) => spec,
            other => panic!("{other:?}"),
        }
    }

    fn refused(options: ArbiterOptions, words: &[&str]) {
        let error = options.check().unwrap_err().to_string();
        assert!(error.contains("what to do"), "{error}");
        for word in words {
            assert!(error.contains(word), "{error} does not say {word}");
        }
    }

    #[test]
    fn directories() {
        for name in ["/shared/arbiter", "arbiter", "etcd:", "a:/b", "."] {
            assert_eq!(options(name).check().unwrap(), Some(ArbiterSpec::Directory(name.into())));
        }
        assert_eq!(ArbiterOptions::default().check().unwrap(), None);
        refused(options(""), &["empty", "directory"]);
    }

    #[test]
    fn endpoints_and_prefixes() {
        let spec = etcd(options("etcd://localhost"));
        assert_eq!((&spec.endpoints[..], &spec.prefix[..]), (&["localhost:2379".to_owned()][..], "twinstep"));
        assert_eq!((spec.login, spec.tls), (None, None));
        let spec = etcd(options("etcd://10.0.0.1:1,a-b.example,[::1],[fe80::0:1]:65535/one/two/"));
        assert_eq!(spec.endpoints, ["10.0.0.1:1", "a-b.example:2379", "[::1]:2379", "[fe80::1]:65535"]);
        assert_eq!(spec.prefix, "one/two");
        assert_eq!(etcd(options("etcd://a/")).prefix, "twinstep");
    }

    #[test]
    fn addresses_that_are_refused() {
        for (place, word) in [
            ("http://a:2379", "http://"),
            ("etcd://", "`` is no host"),
            ("etcd:///prefix", "no host"),
            ("etcd://a,", "no host"),
            ("etcd://a b", "no host"),
            ("etcd://a..b", "no host"),
            ("etcd://-a", "no host"),
            ("etcd://::1", "brackets"),
            ("etcd://[::1", "closing bracket"),
            ("etcd://[::x]", "no IPv6 address"),
            ("etcd://[::1]2", "`2` is no port"),
            ("etcd://a:", "`` is no port"),
            ("etcd://a:0", "`0` is no port"),
            ("etcd://a:65536", "no port"),
            ("etcd://a,etcd://b", "no port"),
            ("etcd://a?x", "no host"),
            ("etcd://a/b//c", "cannot be a prefix"),
            ("etcd://a//", "cannot be a prefix"),
            ("etcd://a/b c", "cannot be a prefix"),
            ("etcd://a/ä", "cannot be a prefix"),
        ] {
            refused(options(place), &[word, "etcd://HOST"]);
        }
        refused(options(&format!("etcd://a/{}", "x".repeat(201))), &["cannot be a prefix"]);
        refused(options(&format!("etcd://{}", ["a"; 10].join(","))), &["10 endpoints"]);
    }

    #[test]
    fn a_password_in_the_address_is_refused_and_not_repeated() {
        let error = options("etcd://me:s3cret@host").check().unwrap_err().to_string();
        assert!(error.contains("--arbiter-password-file") && !error.contains("s3cret"), "{error}");
    }

    #[test]
    fn users() {
        let user = |user: Option<&str>, file: Option<&str>| ArbiterOptions {
            user: user.map(str::to_owned),
            password_file: file.map(PathBuf::from),
            ..options("etcd://a")
        };
        let login = etcd(user(Some("me"), Some("/secret"))).login;
        assert_eq!(login, Some(Login { user: "me".into(), password_file: "/secret".into() }));
        refused(user(Some("me"), None), &["needs a password", "--arbiter-password-file"]);
        refused(user(None, Some("/secret")), &["--arbiter-user"]);
        for name in ["", "a\nb"] {
            refused(user(Some(name), Some("/secret")), &["--arbiter-user"]);
        }
    }

    #[test]
    fn certificates() {
        let tls = |place: &str, [ca, cert, key]: [bool; 3]| {
            let file = |given: bool, name: &str| given.then(|| PathBuf::from(name));
            ArbiterOptions { ca: file(ca, "ca"), cert: file(cert, "cert"), key: file(key, "key"), ..options(place) }
        };
        let files = |client: Option<(&str, &str)>| {
            Some(TlsFiles { ca: "ca".into(), client: client.map(|(cert, key)| (cert.into(), key.into())) })
        };
        assert_eq!(etcd(tls("etcds://a", [true, false, false])).tls, files(None));
        assert_eq!(etcd(tls("etcds://a", [true, true, true])).tls, files(Some(("cert", "key"))));
        refused(tls("etcds://a", [false, false, false]), &["who may vouch", "--arbiter-ca"]);
        refused(tls("etcds://a", [true, true, false]), &["--arbiter-key"]);
        refused(tls("etcds://a", [true, false, true]), &["--arbiter-cert"]);
        refused(tls("etcd://a/p", [true, false, false]), &["not encrypted", "etcds://a/p"]);
        refused(tls("etcd://a", [false, true, true]), &["not encrypted"]);
        refused(tls("/shared", [true, false, false]), &["--arbiter-ca is for etcd", "/shared is a directory"]);
        let nothing = ArbiterOptions { ca: Some("ca".into()), ..ArbiterOptions::default() };
        refused(nothing, &["--arbiter-ca", "there is none"]);
    }
}
