//! Certificates for the hosts of pairs: a small authority in a folder.
//!
//! *In*: a folder, names and addresses of hosts, days. *Out*: ordinary PEM files, which TLS of any make can read; and those of any other authority serve as well.
//! *Invariants*: nothing is overwritten; keys are readable by their owner alone from the moment they exist; a certificate that is issued has been checked
//! against the authority's as the other side will check it.
//!
//! ```text
//!   DIR/ca.pem       the authority's certificate       DIR/NAME/ca.pem    the same
//!   DIR/ca-key.pem   its key, which stays here         DIR/NAME/cert.pem  the host's certificate
//!                                                      DIR/NAME/key.pem   its key
//! ```
use std::fs::{DirBuilder, File};
use std::io::{ErrorKind, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::{RootCertStore, crypto};
use time::{Duration, OffsetDateTime};

use crate::channel::names::{CA, CERT, KEY, server_name};
use crate::error::{Context, Error, Result};
use crate::secret_file;

/// The authority's key.
const CA_KEY: &str = "ca-key.pem";
/// How long an authority is believed, if nothing else is said: ten years.
pub const CA_DAYS: u32 = 3650;
/// How long a host is believed, if nothing else is said: two years and a little.
pub const HOST_DAYS: u32 = 825;
/// Longest validity: a century.
pub const MAX_DAYS: u32 = 36_500;
/// Clocks of hosts differ; a new certificate is valid a little ago.
const BACKDATED: Duration = Duration::hours(1);

/// Makes an authority in `folder`, which need not exist, valid for so many days.
///
/// # Errors
/// If there is one already, or something cannot be written.
pub fn init(folder: &Path, days: u32) -> Result<()> {
    private_folder(folder)?;
    for name in [CA, CA_KEY] {
        if folder.join(name).symlink_metadata().is_ok() {
            return Err(Error::new(format!("{} holds an authority already: {name} is there", folder.display()))
                .next("choose another folder; certificates of the old authority would be worth nothing with a new one"));
        }
    }
    let key = new_key()?;
    let mut params = authority(&key);
    valid_for(&mut params, days)?;
    let certificate = params.self_signed(&key).what("cannot make the authority's certificate")?;
    write(&folder.join(CA_KEY), 0o600, &pem("PRIVATE KEY", key.serialized_der()))?;
    write(&folder.join(CA), 0o644, &pem("CERTIFICATE", certificate.der()))
}

/// Issues a certificate to the host called `name`, which is also reached by these names and addresses. Gives the folder with what that host needs.
///
/// # Errors
/// If there is no authority in `folder`, the host has a certificate there already, a name is none, or something cannot be written.
pub fn issue(folder: &Path, name: &str, addresses: &[String], days: u32) -> Result<PathBuf> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    for address in std::iter::once(name).chain(addresses.iter().map(String::as_str)) {
        let checked = server_name(address, "the names that were given")?;
        params.subject_alt_names.push(match address.parse::<IpAddr>() {
            Ok(ip) => SanType::IpAddress(ip),
            Err(_) => SanType::DnsName(checked.to_str().as_ref().try_into().what("this name cannot stand in a certificate")?),
        });
    }
    valid_for(&mut params, days)?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // After a failover the standby is a primary.
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;

    let (authority_pem, issuer, root) = open_authority(folder)?;
    let key = new_key()?;
    let certificate = params.signed_by(&key, &issuer).what("cannot make the certificate")?;
    check(root, certificate.der(), name).map_err(|e| {
        Error::new(format!("{CA} and {CA_KEY} in {} do not belong together, or the authority is not valid now", folder.display()))
            .because(e)
            .next("make an authority with `twinstep pki init` in another folder")
    })?;
    let own = folder.join(name);
    DirBuilder::new().mode(0o700).create(&own).map_err(|e| {
        let error = Error::new(format!("cannot create {}", own.display()));
        match e.kind() {
            ErrorKind::AlreadyExists => {
                error.because(e).next("nothing is overwritten: move the old folder away if the host needs a new certificate")
            }
            _ => error.because(e),
        }
    })?;
    write(&own.join(KEY), 0o600, &pem("PRIVATE KEY", key.serialized_der()))?;
    write(&own.join(CERT), 0o644, &pem("CERTIFICATE", certificate.der()))?;
    write(&own.join(CA), 0o644, &authority_pem)?;
    Ok(own)
}

fn new_key() -> Result<KeyPair> {
    // What every TLS there is can do.
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).what("cannot make a key")
}

/// What the authority's certificate says, but for dates. It follows from the key, so that issuing needs to read no certificate.
fn authority(key: &KeyPair) -> CertificateParams {
    let mut params = CertificateParams::default();
    let id: String = params.key_identifier(key).iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("Twinstep authority {id}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn valid_for(params: &mut CertificateParams, days: u32) -> Result<()> {
    if !(1..=MAX_DAYS).contains(&days) {
        return Err(
            Error::new(format!("a certificate cannot be valid for {days} days")).next(format!("give --days 1 to {MAX_DAYS}"))
        );
    }
    let now = OffsetDateTime::now_utc();
    params.not_before = now - BACKDATED;
    params.not_after = now + Duration::days(days.into());
    Ok(())
}

type Authority = (String, Issuer<'static, KeyPair>, CertificateDer<'static>);

fn open_authority(folder: &Path) -> Result<Authority> {
    let (ca, key) = (folder.join(CA), folder.join(CA_KEY));
    let place = "the folder that `twinstep pki init` made";
    let authority_pem = secret_file::read(&ca, "certificate", place, false, secret_file::LONGEST_PEM)?;
    let root = secret_file::certificates(&ca, place)?.swap_remove(0);
    let PrivateKeyDer::Pkcs8(der) = secret_file::key(&key, place)? else {
        return Err(
            Error::new(format!("{} is not a key that `twinstep pki init` made", key.display())).next(format!("give {place}"))
        );
    };
    let key_pair = KeyPair::from_pkcs8_der_and_sign_algo(&der, &PKCS_ECDSA_P256_SHA256).map_err(|e| {
        Error::new(format!("{} is not a key that `twinstep pki init` made", key.display()))
            .because(e)
            .next(format!("give {place}"))
    })?;
    let params = authority(&key_pair);
    let authority_pem = String::from_utf8(authority_pem).map_err(|_| Error::new(format!("{} is not PEM", ca.display())))?;
    Ok((authority_pem, Issuer::new(params, key_pair), root))
}

/// As the other side will.
fn check(root: CertificateDer<'static>, certificate: &CertificateDer<'_>, name: &str) -> Result<()> {
    let mut roots = RootCertStore::empty();
    roots.add(root).what("the authority's certificate can't be used")?;
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::new(crypto::ring::default_provider())).build();
    let verified = verifier.what("cannot prepare TLS")?.verify_server_cert(
        certificate,
        &[],
        &server_name(name, "the name")?,
        &[],
        UnixTime::now(),
    );
    verified.map(|_| ()).what("the certificate does not pass")
}

/// RFC 7468.
fn pem(label: &str, der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).expect("base64 is ASCII")).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

fn private_folder(folder: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).recursive(true).create(folder) {
        Err(e) => Err(e).at("create", folder),
        Ok(()) => Ok(()),
    }
}

fn write(path: &Path, mode: u32, text: &str) -> Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(mode).open(path).at("create", path)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).at("write", path)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn an_authority_and_its_hosts() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("pki");
        init(&folder, CA_DAYS).unwrap();
        assert_eq!((mode(&folder), mode(&folder.join(CA_KEY))), (0o700, 0o600));
        let own = issue(&folder, "host-a", &["10.0.0.1".into(), "fd00::1".into(), "a.example".into()], HOST_DAYS).unwrap();
        assert_eq!((mode(&own), mode(&own.join(KEY))), (0o700, 0o600));
        let certificate = secret_file::certificates(&own.join(CERT), "x").unwrap().swap_remove(0);
        let root = secret_file::certificates(&own.join(CA), "x").unwrap().swap_remove(0);
        for name in ["host-a", "10.0.0.1", "fd00::1", "a.example"] {
            check(root.clone(), &certificate, name).unwrap();
        }
        check(root, &certificate, "host-b").unwrap_err();
    }

    #[test]
    fn nothing_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), 1).unwrap();
        let before = fs::read(dir.path().join(CA_KEY)).unwrap();
        let error = init(dir.path(), 1).unwrap_err().to_string();
        assert!(error.contains("already") && error.contains("what to do"), "{error}");
        issue(dir.path(), "a", &[], 1).unwrap();
        let error = issue(dir.path(), "a", &[], 1).unwrap_err().to_string();
        assert!(error.contains("nothing is overwritten"), "{error}");
        assert_eq!(fs::read(dir.path().join(CA_KEY)).unwrap(), before);
        // Half an authority is not completed by another one's half.
        fs::remove_file(dir.path().join(CA)).unwrap();
        assert!(init(dir.path(), 1).is_err());
    }

    #[test]
    fn what_cannot_be_issued() {
        let dir = tempfile::tempdir().unwrap();
        let error = issue(dir.path(), "a", &[], 1).unwrap_err().to_string();
        assert!(error.contains("ca.pem") && error.contains("pki init"), "{error}");
        init(dir.path(), 10).unwrap();
        for bad in ["../a", "", "a b", "a/b", "-----BEGIN", "a\n"] {
            let error = issue(dir.path(), bad, &[], 1).unwrap_err().to_string();
            assert!(error.contains("neither a host's name nor an address"), "{bad:?}: {error}");
        }
        assert!(issue(dir.path(), "a", &["*".into()], 1).is_err());
        for days in [0, MAX_DAYS + 1] {
            let error = issue(dir.path(), "a", &[], days).unwrap_err().to_string();
            assert!(error.contains("--days"), "{error}");
        }
        assert!(!dir.path().join("a").exists());
        // The key of another authority.
        let other = tempfile::tempdir().unwrap();
        init(other.path(), 10).unwrap();
        fs::copy(other.path().join(CA_KEY), dir.path().join(CA_KEY)).unwrap();
        let error = issue(dir.path(), "a", &[], 1).unwrap_err().to_string();
        assert!(error.contains("do not belong together") && !error.contains("PRIVATE"), "{error}");
        fs::set_permissions(dir.path().join(CA_KEY), fs::Permissions::from_mode(0o640)).unwrap();
        let error = issue(dir.path(), "a", &[], 1).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
    }
}
