//! How to be sure of the other side: what people say, and what it comes to.
//!
//! *In*: flags or a table of a TOML file, and the files they name. *Out*: a [`Security`]. *Invariants*: TLS is version 1.3 and nothing older, with certificates on both
//! sides; the web's authorities are not trusted; nothing here shows a key to whoever prints it.
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::client::{ClientConfig, Resumption, verify_server_name};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, ServerConfig};
use rustls::version::TLS13;
use rustls::{DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme, crypto};
use serde::Deserialize;

use super::revocation::{self, Authorities, StandbyVerifier};
use crate::error::{Context, Error, Result};
use crate::secret_file;

/// What both sides call their protocol inside of TLS (RFC 7301): a certificate of the same authority that serves something else is no standby.
pub(super) const PROTOCOL: &[u8] = b"twinstep-log";

/// Files of `twinstep pki issue`.
pub(crate) const CA: &str = "ca.pem";
pub(crate) const CERT: &str = "cert.pem";
pub(crate) const KEY: &str = "key.pem";
/// And of `twinstep pki revoke`.
pub(crate) const CRL: &str = "crl.pem";

/// How the channel is secured, as people say it: flags, or the table `[channel]` of a TOML file with the same names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ChannelOptions {
    /// A folder with `ca.pem`, `cert.pem` and `key.pem`.
    pub tls: Option<PathBuf>,
    /// Certificates of the authorities that may vouch for the other side.
    pub tls_ca: Option<PathBuf>,
    /// Our own certificate, with those between it and the authority.
    pub tls_cert: Option<PathBuf>,
    /// Its key.
    pub tls_key: Option<PathBuf>,
    /// Lists of certificates that were withdrawn; if not given, `crl.pem` beside the authorities' certificates, if that is there.
    pub tls_crl: Option<PathBuf>,
    /// The name or address that the standby's certificate must be for, if not the one it is reached by.
    pub peer_name: Option<String>,
    /// The channel may be in the clear beyond this host.
    #[serde(default)]
    pub plaintext: bool,
}

impl ChannelOptions {
    /// What `flags` say, and what `self` (a file) says where the flags are silent.
    #[must_use]
    pub fn overridden_by(self, flags: Self) -> Self {
        // Who says one way on the command line does not want the other way of the file.
        let file =
            if flags.plaintext { Self::default() } else { Self { plaintext: self.plaintext && !flags.wants_tls(), ..self } };
        // A folder that is given means all that is in it.
        let files = if flags.tls.is_some() { Self::default() } else { file.clone() };
        Self {
            tls: flags.tls.or(file.tls),
            tls_ca: flags.tls_ca.or(files.tls_ca),
            tls_cert: flags.tls_cert.or(files.tls_cert),
            tls_key: flags.tls_key.or(files.tls_key),
            tls_crl: flags.tls_crl.or(files.tls_crl),
            peer_name: flags.peer_name.or(file.peer_name),
            plaintext: flags.plaintext || file.plaintext,
        }
    }

    fn wants_tls(&self) -> bool {
        self.tls.is_some() || self.tls_ca.is_some() || self.tls_cert.is_some() || self.tls_key.is_some() || self.tls_crl.is_some()
    }

    /// Whether nothing at all was said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Reads the files. `expected` are names of which a primary has to have one; with none any of the authority's will do.
    ///
    /// # Errors
    /// If options contradict each other, or a file is missing or is not what it should be.
    pub fn open(&self, expected: &[String]) -> Result<Security> {
        if !self.wants_tls() {
            if self.peer_name.is_some() || !expected.is_empty() {
                let what = "who the other side is can only be known with TLS";
                return Err(Error::new(what).next("give --tls DIR, or leave --peer-name and --expect-peer away"));
            }
            return Ok(if self.plaintext { Security::Plaintext } else { Security::OnThisHost });
        }
        if self.plaintext {
            return Err(Error::new("--plaintext and TLS exclude each other").next("leave one of them away"));
        }
        let file = |given: &Option<PathBuf>, name: &str, option: &'static str| match (given, &self.tls) {
            (Some(path), _) => Ok((path.clone(), option)),
            (None, Some(folder)) => Ok((folder.join(name), "--tls")),
            (None, None) => Err(Error::new(format!("for TLS there is no {option}"))
                .next("give --tls DIR, or all of --tls-ca, --tls-cert and --tls-key")),
        };
        let (ca, ca_option) = file(&self.tls_ca, CA, "--tls-ca")?;
        let (cert, cert_option) = file(&self.tls_cert, CERT, "--tls-cert")?;
        let (key, key_option) = file(&self.tls_key, KEY, "--tls-key")?;
        let peer_name = self.peer_name.as_deref().map(|name| server_name(name, "--peer-name")).transpose()?;
        let expected = expected.iter().map(|name| server_name(name, "--expect-peer")).collect::<Result<Vec<_>>>()?;

        let provider = Arc::new(crypto::ring::default_provider());
        let roots = Arc::new(roots(&ca, ca_option)?);
        let chain = secret_file::certificates(&cert, cert_option)?;
        let secret = secret_file::key(&key, key_option)?;
        let misfit = |e: rustls::Error| {
            Error::new(format!("the certificate {} does not go with the key {}", cert.display(), key.display()))
                .because(e)
                .next(format!("check {cert_option} and {key_option}"))
        };
        let authorities = Authorities {
            roots,
            provider: provider.clone(),
            lists: self.tls_crl.clone().unwrap_or_else(|| ca.with_file_name(CRL)),
            option: self.tls_crl.is_some().then_some("--tls-crl"),
        };
        authorities.check_own(&chain)?;
        let verifier = StandbyVerifier { base: authorities.of_servers()?, authorities: authorities.clone() };
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .what("cannot prepare TLS")?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(chain.clone(), secret.clone_key())
            .map_err(misfit)?;
        client.alpn_protocols = vec![PROTOCOL.to_vec()];
        // A pair connects once; what would be kept for a second time is only something to lose.
        client.resumption = Resumption::disabled();
        let verifier = authorities.of_clients()?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .what("cannot prepare TLS")?
            .with_client_cert_verifier(Arc::new(ExpectedPeer { verifier, authorities, expected }))
            .with_single_cert(chain, secret)
            .map_err(misfit)?;
        server.alpn_protocols = vec![PROTOCOL.to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Security::Tls(Tls { client: Arc::new(client), server: Arc::new(server), peer_name }))
    }
}

fn roots(path: &Path, option: &str) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for authority in secret_file::certificates(path, option)? {
        roots.add(authority).map_err(|e| {
            Error::new(format!("{} holds a certificate that can't be used", path.display()))
                .because(e)
                .next(format!("check {option}"))
        })?;
    }
    Ok(roots)
}

/// A name or an address as a certificate has it.
pub(crate) fn server_name(name: &str, option: &str) -> Result<ServerName<'static>> {
    ServerName::try_from(name.to_owned()).map_err(|e| {
        Error::new(format!("'{name}' is neither a host's name nor an address")).because(e).next(format!("check {option}"))
    })
}

/// How to be sure of the other side. Both a primary and a standby can be made of it.
#[derive(Debug, Clone, Default)]
pub enum Security {
    /// In the clear, and therefore not beyond this host.
    #[default]
    OnThisHost,
    /// In the clear: somebody vouches for the network.
    Plaintext,
    /// TLS 1.3, with certificates on both sides.
    Tls(Tls),
}

/// TLS, ready to be used for either side.
#[derive(Clone)]
pub struct Tls {
    pub(super) client: Arc<ClientConfig>,
    pub(super) server: Arc<ServerConfig>,
    pub(super) peer_name: Option<ServerName<'static>>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

impl Security {
    /// In a word, for events.
    pub fn word(&self) -> &'static str {
        match self {
            Self::OnThisHost | Self::Plaintext => "in the clear",
            Self::Tls(_) => "TLS 1.3",
        }
    }

    /// Whether bytes may travel to or from this address of the other side, or, for who listens, to this address of ours.
    ///
    /// # Errors
    /// If they would leave this host in the clear and nobody has said that this is all right.
    pub fn allows(&self, address: IpAddr) -> Result<()> {
        match self {
            Self::OnThisHost if !address.to_canonical().is_loopback() => {
                let what = format!("the logging channel by {address} would leave this host neither encrypted nor authenticated");
                Err(Error::new(what).next(
                    "give --tls DIR on both sides (`twinstep pki init` and `twinstep pki issue` make what is needed), or, on a network that nobody else \
                     can reach, --plaintext on both sides",
                ))
            }
            _ => Ok(()),
        }
    }
}

/// Any certificate of the authority, or only those with one of these names.
#[derive(Debug)]
struct ExpectedPeer {
    /// For all but certificates.
    verifier: Arc<dyn ClientCertVerifier>,
    authorities: Authorities,
    expected: Vec<ServerName<'static>>,
}

impl ClientCertVerifier for ExpectedPeer {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.verifier.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> std::result::Result<ClientCertVerified, rustls::Error> {
        let verified = revocation::verify_primary(&self.authorities, end_entity, intermediates, now)?;
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let mut failure = None;
        for name in &self.expected {
            match verify_server_name(&certificate, name) {
                Ok(()) => return Ok(verified),
                Err(e) => failure = Some(e),
            }
        }
        failure.map_or(Ok(verified), Err)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

/// A provider whose keys are updated after so many records, for tests.
#[cfg(test)]
pub(super) fn hasty_provider(records: u64) -> crypto::CryptoProvider {
    let mut provider = crypto::ring::default_provider();
    provider.cipher_suites = provider
        .cipher_suites
        .iter()
        .filter_map(|suite| {
            let suite = suite.tls13()?;
            let mut common = rustls::CipherSuiteCommon {
                suite: suite.common.suite,
                hash_provider: suite.common.hash_provider,
                confidentiality_limit: suite.common.confidentiality_limit,
            };
            common.confidentiality_limit = records;
            let hasty =
                rustls::Tls13CipherSuite { common, hkdf_provider: suite.hkdf_provider, aead_alg: suite.aead_alg, quic: None };
            Some(rustls::SupportedCipherSuite::Tls13(Box::leak(Box::new(hasty))))
        })
        .collect();
    provider
}
