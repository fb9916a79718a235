//! Files of keys, certificates and passwords.
//!
//! *In*: a path, and the option it came by. *Out*: its bytes. *Invariant*: what is read is a plain file of bounded length, and a secret comes from a file that
//! only its owner can read; an error names the file and the option, and never shows what is in it.
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

use crate::error::{Error, Result};

/// Longest file of certificates or keys; a system's whole list of authorities has about 200 KiB.
pub(crate) const LONGEST_PEM: u64 = 4 << 20;

/// The certificates in a file, at least one.
pub(crate) fn certificates(path: &Path, option: &str) -> Result<Vec<CertificateDer<'static>>> {
    let bytes = read(path, "certificate", option, false, LONGEST_PEM)?;
    let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(Error::new(format!("{} holds no certificate", path.display())).next(format!("give {option} a file in PEM"))),
    }
}

/// The lists of withdrawn certificates in a file, at least one.
pub(crate) fn revocation_lists(path: &Path, option: &str) -> Result<Vec<CertificateRevocationListDer<'static>>> {
    let bytes = read(path, "list of withdrawn certificates", option, false, LONGEST_PEM)?;
    let found: std::result::Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(Error::new(format!("{} holds no list of withdrawn certificates", path.display()))
            .next(format!("give {option} a file in PEM, as `twinstep pki revoke` makes it"))),
    }
}

/// The key in a file. Whoever prints it sees nothing of it.
pub(crate) fn key(path: &Path, option: &str) -> Result<PrivateKeyDer<'static>> {
    let bytes = read(path, "key", option, true, LONGEST_PEM)?;
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|_| {
        Error::new(format!("{} holds no private key", path.display()))
            .next(format!("give {option} a key in PEM that is not locked by a passphrase"))
    })
}

/// All of a file.
pub(crate) fn read(path: &Path, what: &str, option: &str, secret: bool, longest: u64) -> Result<Vec<u8>> {
    let named = format!("the {what} {}", path.display());
    let refuse = |e: std::io::Error| Error::new(format!("cannot read {named}")).because(e).next(format!("check {option}"));
    // Looked at first, since opening a pipe could wait for ever; and asked again once it is open and can't be changed for another one.
    if !path.metadata().map_err(refuse)?.is_file() {
        return Err(Error::new(format!("{named} is not a file")).next(format!("check {option}")));
    }
    let file = File::open(path).map_err(refuse)?;
    if secret && file.metadata().map_err(refuse)?.mode() & 0o077 != 0 {
        return Err(Error::new(format!("others may read {named}")).next(format!("chmod 600 {}", path.display())));
    }
    let mut bytes = Vec::new();
    file.take(longest + 1).read_to_end(&mut bytes).map_err(refuse)?;
    if bytes.len() as u64 > longest {
        return Err(Error::new(format!("{named} is longer than {longest} bytes")).next(format!("check {option}")));
    }
    Ok(bytes)
}
