//! Passwords, keys and certificates for an arbiter.
//!
//! *In*: files. *Out*: secrets, and a TLS configuration. *Invariant*: a secret shows itself to nobody who prints it, comes from a file only its owner
//! can read, and a certificate that is handed on fits its key.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, crypto};
use ureq::tls::{Certificate, ClientCert, PrivateKey, RootCerts, TlsConfig};

use super::spec::TlsFiles;
use crate::error::{Context, Error, Result};
use crate::secret_file::{LONGEST_PEM, certificates, read};

/// Longest password.
const LONGEST_PASSWORD: u64 = 1024;

/// A text that is not shown.
#[derive(Clone)]
pub(super) struct Secret(Arc<str>);

impl Secret {
    pub(super) fn new(text: String) -> Self {
        Self(text.into())
    }

    /// For the wire, and for nothing else.
    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// The password in a file, without the end of its line.
pub(super) fn read_password(path: &Path) -> Result<Secret> {
    let bytes = read(path, "password file", "--arbiter-password-file", true, LONGEST_PASSWORD)?;
    let text = String::from_utf8(bytes).ok();
    let password = text.as_deref().map(|text| text.trim_end_matches(['\n', '\r']));
    match password {
        Some(password) if !password.is_empty() && !password.contains(char::is_control) => Ok(Secret::new(password.to_owned())),
        _ => Err(Error::new(format!("the password file {} holds no password", path.display()))
            .next("write the password into it, as a single line")),
    }
}

/// TLS with our own authorities instead of the web's, and with our certificate if there is one.
pub(super) fn tls_config(files: &TlsFiles) -> Result<TlsConfig> {
    let provider = Arc::new(crypto::ring::default_provider());
    let authorities = certificates(&files.ca, "--arbiter-ca")?;
    let mut roots = RootCertStore::empty();
    for authority in &authorities {
        roots.add(authority.clone()).map_err(|e| {
            Error::new(format!("{} holds a certificate that can't be used", files.ca.display()))
                .because(e)
                .next("check --arbiter-ca")
        })?;
    }
    let client = match &files.client {
        None => None,
        Some((cert, key)) => {
            let chain = certificates(cert, "--arbiter-cert")?;
            let bytes = read(key, "key", "--arbiter-key", true, LONGEST_PEM)?;
            let no_key = || {
                Error::new(format!("{} holds no private key", key.display()))
                    .next("give --arbiter-key a key in PEM that is not locked by a passphrase")
            };
            let parsed = PrivateKeyDer::from_pem_slice(&bytes).map_err(|_| no_key())?;
            // ureq takes them as they are, and panics later if they don't fit.
            ClientConfig::builder_with_provider(provider.clone())
                .with_safe_default_protocol_versions()
                .what("cannot prepare TLS")?
                .with_root_certificates(roots)
                .with_client_auth_cert(chain.clone(), parsed)
                .map_err(|e| {
                    Error::new(format!("the certificate {} does not go with the key {}", cert.display(), key.display()))
                        .because(e)
                        .next("check --arbiter-cert and --arbiter-key")
                })?;
            let key = PrivateKey::from_pem(&bytes).map_err(|_| no_key())?;
            Some(ClientCert::new_with_certs(&for_ureq(&chain), key))
        }
    };
    Ok(TlsConfig::builder()
        .unversioned_rustls_crypto_provider(provider)
        .root_certs(RootCerts::new_with_certs(&for_ureq(&authorities)))
        .client_cert(client)
        .build())
}

fn for_ureq(certificates: &[CertificateDer<'_>]) -> Vec<Certificate<'static>> {
    certificates.iter().map(|c| Certificate::from_der(c).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    fn write(folder: &Path, name: &str, mode: u32, content: &[u8]) -> std::path::PathBuf {
        let path = folder.join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn passwords() {
        let dir = tempfile::tempdir().unwrap();
        let good = write(dir.path(), "good", 0o600, b"open sesame\n");
        let secret = read_password(&good).unwrap();
        assert_eq!(secret.expose(), "open sesame");
        assert_eq!(format!("{secret:?}"), "(secret)");
        for (mode, content, words) in [
            (0o640, &b"open sesame"[..], "chmod 600"),
            (0o604, b"open sesame", "chmod 600"),
            (0o600, b"\n", "holds no password"),
            (0o600, b"two\nlines\n", "holds no password"),
            (0o600, b"\xff", "holds no password"),
            (0o600, &[b'x'; 1025], "longer than 1024 bytes"),
        ] {
            let error = read_password(&write(dir.path(), "bad", mode, content)).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("/bad") && !error.contains("sesame"), "{error}");
            fs::remove_file(dir.path().join("bad")).unwrap();
        }
        for (path, words) in [(dir.path().join("none"), "No such file"), (dir.path().to_owned(), "is not a file")] {
            let error = read_password(&path).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("--arbiter-password-file"), "{error}");
        }
    }

    #[test]
    fn certificates_that_are_none() {
        let dir = tempfile::tempdir().unwrap();
        let none = write(dir.path(), "none", 0o600, b"nothing");
        let strange = write(dir.path(), "strange", 0o600, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
        let files = |ca: &Path| TlsFiles { ca: ca.to_owned(), client: None };
        for (ca, words) in [(&none, "holds no certificate"), (&strange, "can't be used")] {
            let error = tls_config(&files(ca)).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("--arbiter-ca"), "{error}");
        }
    }
}
