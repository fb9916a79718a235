//! How the two hosts of a pair are sure of each other: the same flags for every command that makes or takes a logging channel.
use std::path::PathBuf;

use clap::Args;
use twinstep_host::channel::ChannelOptions;

/// TLS or not, as flags.
#[derive(Args, Clone)]
pub struct ChannelArguments {
    /// TLS between the two hosts, with the files of this folder: ca.pem, cert.pem and key.pem, as `twinstep pki issue` makes them
    #[arg(long, value_name = "DIR")]
    tls: Option<PathBuf>,
    /// Certificates of the authorities that may vouch for the other side (PEM) [default: ca.pem in --tls]
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// Our own certificate and what is between it and the authority (PEM) [default: cert.pem in --tls]
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// The key of our certificate, which others may not read (PEM) [default: key.pem in --tls]
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Certificates that their authorities have withdrawn: a list of each authority (PEM), which may be replaced while this runs [default: crl.pem beside the certificates of the authorities, if
    /// it is there]
    #[arg(long, value_name = "FILE")]
    tls_crl: Option<PathBuf>,
    /// Neither encryption nor authentication, though the other side is not on this host: for a network that nobody else can reach
    #[arg(long)]
    plaintext: bool,
}

impl ChannelArguments {
    /// What is meant, with the name the standby's certificate has to have.
    pub fn options(self, peer_name: Option<String>) -> ChannelOptions {
        ChannelOptions {
            tls: self.tls,
            tls_ca: self.tls_ca,
            tls_cert: self.tls_cert,
            tls_key: self.tls_key,
            tls_crl: self.tls_crl,
            peer_name,
            plaintext: self.plaintext,
        }
    }
}
