//! Certificates that were withdrawn: the other side's is looked up in the authority's list at every handshake.
//!
//! *In*: a file of lists (PEM), which may come and change while we run; certificates that others show. *Out*: whether they may be believed. *Invariants*: with a list, a certificate is believed only if
//! the list of whoever issued it does not have it, and has not run out; a list that was named and cannot be read lets nobody in.
//!
//! The file is read anew for each handshake: it is small, handshakes are rare, and so a list that is copied to a host counts from then on.
use std::path::PathBuf;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::error::{Error, Result};
use crate::secret_file;

/// Authorities, and where their lists are.
#[derive(Debug, Clone)]
pub(super) struct Authorities {
    pub(super) roots: Arc<RootCertStore>,
    pub(super) provider: Arc<CryptoProvider>,
    pub(super) lists: PathBuf,
    /// The option that names the file; none: it need not be there.
    pub(super) option: Option<&'static str>,
}

impl Authorities {
    /// The lists as they are now.
    fn lists(&self) -> Result<Vec<CertificateRevocationListDer<'static>>> {
        if self.option.is_none() && matches!(self.lists.try_exists(), Ok(false)) {
            return Ok(Vec::new());
        }
        secret_file::revocation_lists(&self.lists, self.option.unwrap_or("the folder of the certificates"))
    }

    /// What checks a primary's certificate now.
    pub(super) fn of_clients(&self) -> Result<Arc<dyn ClientCertVerifier>> {
        let builder = WebPkiClientVerifier::builder_with_provider(self.roots.clone(), self.provider.clone());
        let builder = match self.lists()? {
            lists if lists.is_empty() => builder,
            lists => builder.with_crls(lists).enforce_revocation_expiration(),
        };
        builder.build().map_err(|e| self.unusable(e))
    }

    /// What checks a standby's certificate now.
    pub(super) fn of_servers(&self) -> Result<Arc<WebPkiServerVerifier>> {
        let builder = WebPkiServerVerifier::builder_with_provider(self.roots.clone(), self.provider.clone());
        let builder = match self.lists()? {
            lists if lists.is_empty() => builder,
            lists => builder.with_crls(lists).enforce_revocation_expiration(),
        };
        builder.build().map_err(|e| self.unusable(e))
    }

    fn unusable(&self, e: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        Error::new(format!("the list of withdrawn certificates {} cannot be used", self.lists.display()))
            .because(e)
            .next("make it anew with `twinstep pki revoke DIR`, and copy it here")
    }

    /// Refuses lists that would refuse everybody: that ran out, or are another authority's; and our own certificate, if it was withdrawn.
    pub(super) fn check_own(&self, chain: &[CertificateDer<'static>]) -> Result<()> {
        let verifier = self.of_clients()?;
        let Some((own, between)) = chain.split_first() else { return Ok(()) };
        let Err(e) = verifier.verify_client_cert(own, between, UnixTime::now()) else { return Ok(()) };
        match &e {
            rustls::Error::InvalidCertificate(CertificateError::Revoked) => {
                Err(Error::new(format!("our own certificate was withdrawn: it is in {}", self.lists.display()))
                    .next("issue another one for this host with `twinstep pki issue`"))
            }
            rustls::Error::InvalidCertificate(
                CertificateError::ExpiredRevocationList | CertificateError::ExpiredRevocationListContext { .. },
            ) => Err(Error::new(format!("the list of withdrawn certificates {} has run out", self.lists.display()))
                .because(e)
                .next("renew it with `twinstep pki revoke DIR`, and copy crl.pem to every host of the authority")),
            rustls::Error::InvalidCertificate(CertificateError::UnknownRevocationStatus)
            | rustls::Error::InvalidCertRevocationList(_) => Err(self.unusable(e)),
            // Our certificate may be of an authority that we do not take others' from.
            _ => Ok(()),
        }
    }
}

/// For rustls: nobody is let in.
pub(super) fn refuse(e: Error) -> rustls::Error {
    rustls::Error::General(e.to_string())
}

/// Checks a standby's certificate.
#[derive(Debug)]
pub(super) struct StandbyVerifier {
    pub(super) authorities: Authorities,
    /// For all but certificates.
    pub(super) base: Arc<WebPkiServerVerifier>,
}

impl ServerCertVerifier for StandbyVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        let verifier = self.authorities.of_servers().map_err(refuse)?;
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.base.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.base.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.base.supported_verify_schemes()
    }
}

/// Checks a primary's certificate, but for its name.
pub(super) fn verify_primary(
    authorities: &Authorities,
    end_entity: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
) -> std::result::Result<ClientCertVerified, rustls::Error> {
    authorities.of_clients().map_err(refuse)?.verify_client_cert(end_entity, intermediates, now)
}
