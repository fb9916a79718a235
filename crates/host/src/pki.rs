//! Certificates for the hosts of pairs: a small authority in a folder.
//!
//! *In*: a folder, names and addresses of hosts, days. *Out*: ordinary PEM files, which TLS of any make can read; and those of any other authority serve as well.
//! *Invariants*: nothing is overwritten but the list of what was withdrawn, which only grows; keys are readable by their owner alone from the moment they exist; a certificate that is issued has been checked
//! against the authority's as the other side will check it.
//!
//! ```text
//!   DIR/ca.pem       the authority's certificate       DIR/NAME/ca.pem    the same
//!   DIR/ca-key.pem   its key, which stays here         DIR/NAME/cert.pem  the host's certificate
//!   DIR/crl.pem      what was withdrawn, if anything   DIR/NAME/key.pem   its key
//!                                                      DIR/NAME/crl.pem   the list, if there is one
//! ```
use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io::{ErrorKind, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, RevokedCertParams, SanType, SerialNumber,
};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::{RootCertStore, crypto};
use time::{Duration, OffsetDateTime};

use crate::channel::names::{CA, CERT, CRL, KEY, server_name};
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
    let list = folder.join(CRL);
    if list.exists() {
        std::fs::copy(&list, own.join(CRL)).at("write", &own.join(CRL))?;
    }
    Ok(own)
}

/// Withdraws the certificates of the hosts of these names, whose folders are in `folder`, and those in these files, in addition to what was withdrawn before. The list is valid for so many days. Says
/// how many certificates are in it.
///
/// # Errors
/// If there is no authority in `folder`, a certificate cannot be read or is not its own, or something cannot be written.
pub fn revoke(folder: &Path, names: &[String], files: &[PathBuf], days: u32) -> Result<usize> {
    let mut dates = CertificateParams::default();
    valid_for(&mut dates, days)?;
    revoke_until(folder, names, files, dates.not_before, dates.not_after)
}

/// The same, with the times between which the list is valid.
pub(crate) fn revoke_until(
    folder: &Path,
    names: &[String],
    files: &[PathBuf],
    this_update: OffsetDateTime,
    next_update: OffsetDateTime,
) -> Result<usize> {
    let now = OffsetDateTime::now_utc();
    let (_, issuer, root) = open_authority(folder)?;
    let list = folder.join(CRL);
    let mut withdrawn = if list.exists() { read_list(&list)? } else { BTreeMap::new() };
    let mut certificates = files.to_vec();
    for name in names {
        server_name(name, "the names that were given")?;
        certificates.push(folder.join(name).join(CERT));
    }
    for path in &certificates {
        let certificate = secret_file::certificates(path, "the names that were given, or --cert")?.swap_remove(0);
        withdrawn.entry(serial(&certificate, &root, path)?).or_insert(now);
    }
    let params = CertificateRevocationListParams {
        this_update,
        next_update,
        // Never lower than before, as long as the clock is right.
        crl_number: u64::try_from(now.unix_timestamp()).unwrap_or_default().into(),
        issuing_distribution_point: None,
        revoked_certs: withdrawn
            .iter()
            .map(|(serial, since)| RevokedCertParams {
                serial_number: SerialNumber::from_slice(serial),
                revocation_time: *since,
                reason_code: None,
                invalidity_date: None,
            })
            .collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let text = pem("X509 CRL", params.signed_by(&issuer).what("cannot make the list")?.der());
    replace(&list, &text)?;
    for entry in std::fs::read_dir(folder).at("read", folder)? {
        let own = entry.at("read", folder)?.path();
        if own.join(CERT).is_file() {
            replace(&own.join(CRL), &text)?;
        }
    }
    Ok(withdrawn.len())
}

/// Serial numbers in a list, and since when they are.
fn read_list(path: &Path) -> Result<BTreeMap<Vec<u8>, OffsetDateTime>> {
    let broken = || {
        Error::new(format!("{} cannot be read, and what is in it must not be forgotten", path.display()))
            .next("use another copy of it; every host of the authority has one")
    };
    let list = secret_file::revocation_lists(path, "the folder that `twinstep pki init` made")?.swap_remove(0);
    let list = webpki::BorrowedCertRevocationList::from_der(&list).map_err(|e| broken().because(e))?;
    let mut withdrawn = BTreeMap::new();
    for entry in &list {
        let entry = entry.map_err(|e| broken().because(e))?;
        let since = i64::try_from(entry.revocation_date.as_secs()).ok();
        let since = since.and_then(|since| OffsetDateTime::from_unix_timestamp(since).ok()).ok_or_else(broken)?;
        withdrawn.insert(entry.serial_number.to_vec(), since);
    }
    Ok(withdrawn)
}

/// The serial number of a certificate of this authority.
fn serial(certificate: &CertificateDer<'_>, root: &CertificateDer<'_>, path: &Path) -> Result<Vec<u8>> {
    let read = webpki::EndEntityCert::try_from(certificate)
        .map_err(|e| Error::new(format!("{} is not a certificate", path.display())).because(e))?;
    let anchor = webpki::anchor_from_trusted_cert(root).what("the authority's certificate can't be used")?;
    if read.issuer() != anchor.subject.as_ref() {
        return Err(Error::new(format!("{} is not a certificate of this authority", path.display()))
            .next("only who has issued a certificate can withdraw it"));
    }
    Ok(read.serial().to_vec())
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

/// Replaces a file, or makes it: who reads it sees the one or the other.
fn replace(path: &Path, text: &str) -> Result<()> {
    let draft = path.with_extension("part");
    let mut file = File::create(&draft).at("create", &draft)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).at("write", &draft)?;
    std::fs::rename(&draft, path).at("replace", path)
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

    #[test]
    fn what_was_withdrawn_stays_withdrawn() {
        let dir = tempfile::tempdir().unwrap();
        let error = revoke(dir.path(), &[], &[], 1).unwrap_err().to_string();
        assert!(error.contains("pki init"), "{error}");
        init(dir.path(), 10).unwrap();
        for name in ["a", "b", "c"] {
            issue(dir.path(), name, &[], 10).unwrap();
        }
        assert_eq!(revoke(dir.path(), &[], &[], 10).unwrap(), 0, "an empty list");
        assert_eq!(revoke(dir.path(), &["a".into()], &[], 10).unwrap(), 1);
        let since = read_list(&dir.path().join(CRL)).unwrap();
        fs::rename(dir.path().join("b"), dir.path().join("elsewhere")).unwrap();
        let file = dir.path().join("elsewhere").join(CERT);
        assert_eq!(revoke(dir.path(), &["a".into()], &[file], 20).unwrap(), 2, "once each");
        let list = read_list(&dir.path().join(CRL)).unwrap();
        assert!(since.iter().all(|(serial, since)| list[serial] == *since), "{since:?} {list:?}");
        assert_eq!(revoke(dir.path(), &[], &[], 10).unwrap(), 2, "renewed");
        // Who comes later gets it as well.
        issue(dir.path(), "d", &[], 10).unwrap();
        let text = fs::read(dir.path().join(CRL)).unwrap();
        for name in ["a", "c", "d"] {
            assert_eq!(fs::read(dir.path().join(name).join(CRL)).unwrap(), text, "{name}");
        }

        let other = tempfile::tempdir().unwrap();
        init(other.path(), 10).unwrap();
        issue(other.path(), "x", &[], 10).unwrap();
        let foreign = other.path().join("x").join(CERT);
        let error = revoke(dir.path(), &[], &[foreign], 10).unwrap_err().to_string();
        assert!(error.contains("is not a certificate of this authority"), "{error}");
        assert!(revoke(dir.path(), &["nobody".into()], &[], 10).is_err());
        assert!(revoke(dir.path(), &["../a".into()], &[], 10).is_err());
        assert!(revoke(dir.path(), &[], &[], 0).is_err());
        // What is in the list is not forgotten because it cannot be read.
        fs::write(dir.path().join(CRL), pem("X509 CRL", b"nonsense")).unwrap();
        let error = revoke(dir.path(), &[], &[], 10).unwrap_err().to_string();
        assert!(error.contains("must not be forgotten"), "{error}");
    }
}
