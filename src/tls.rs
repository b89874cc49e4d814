//! TLS for every client that lets one choose: rustls with one provider, the server always verified.

use rustls::client::{Resumption, WantsClientCert};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{AlertDescription, ClientConfig, ConfigBuilder, RootCertStore};
use std::fmt::{self, Display};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// A client that trusts the authorities in `ca_file`, or the system's. The error says what is wrong with the file.
pub fn client_config(ca_file: Option<&Path>) -> Result<ClientConfig, String> {
    let files = Files { authorities: ca_file.map(Path::to_owned), own: None };
    files.config().map_err(|error| format!("{} cannot be used: {}", error.path.display(), error.reason))
}

/// The files that say whom a client trusts and who it is.
#[derive(Clone, Debug)]
pub struct Files {
    /// The authorities that are trusted, and no others. Absent: the system's.
    pub authorities: Option<PathBuf>,
    /// Who the client is. Absent: it shows no certificate.
    pub own: Option<OwnFiles>,
}

/// A client's certificate.
#[derive(Clone, Debug)]
pub struct OwnFiles {
    /// The certificate, with those between it and its authority.
    pub certificate: PathBuf,
    /// Its private key, not encrypted.
    pub key: PathBuf,
}

/// Which of the files is wrong, and why.
#[derive(Debug, thiserror::Error)]
#[error("{setting} {}: {reason}", path.display())]
pub struct FileError {
    /// What settings call it: `ca_file`, `cert_file` or `key_file`.
    pub setting: &'static str,
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub reason: String,
}

/// What the files held when they were last sound. Read again for each new connection: a renewed certificate needs no
/// restart.
pub struct Identity {
    files: Files,
    last: Mutex<Arc<ClientConfig>>,
}

impl Identity {
    /// Reads the files for the first time.
    pub fn read(files: Files) -> Result<Self, FileError> {
        let last = Mutex::new(Arc::new(files.config()?));
        Ok(Self { files, last })
    }

    /// What the files hold now; with an error, what they held before, as while they are being replaced.
    /// Reads files: not for an async thread.
    pub fn current(&self) -> (Arc<ClientConfig>, Option<FileError>) {
        let read = self.files.config();
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let error = match read {
            Ok(config) => {
                *last = Arc::new(config);
                None
            }
            Err(error) => Some(error),
        };
        (Arc::clone(&last), error)
    }
}

/// rustls's own words for a configuration are not asked: one of them is a private key.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("files", &self.files).finish_non_exhaustive()
    }
}

impl Files {
    /// A client with a certificate does not resume sessions: the server looks at the certificate of every connection.
    fn config(&self) -> Result<ClientConfig, FileError> {
        let wrong = |setting, path: &Path| {
            let path = path.to_owned();
            move |reason| FileError { setting, path, reason }
        };
        let roots = match &self.authorities {
            Some(path) => authorities(path).map_err(wrong("ca_file", path))?,
            None => system_authorities(),
        };
        // With no file to blame: rustls itself is not as it should be.
        let builder = builder(roots).map_err(wrong("ca_file", Path::new("")))?;
        let Some(OwnFiles { certificate, key }) = &self.own else {
            return Ok(builder.with_no_client_auth());
        };
        let certificates = certificates(certificate).map_err(wrong("cert_file", certificate))?;
        let private = private_key(key).map_err(wrong("key_file", key))?;
        let config = builder.with_client_auth_cert(certificates, private);
        let mut config = config.map_err(|error| wrong("key_file", key)(error.to_string()))?;
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}

/// Why a TLS connection was not made, or was ended by the other side, where TLS itself is the reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The server's certificate is not what it has to be.
    #[error("{0}")]
    Untrusted(String),
    /// The client's certificate is not taken.
    #[error("{0}")]
    Unauthenticated(String),
    /// TLS is not spoken, or not in a common version.
    #[error("{0}")]
    Protocol(String),
}

impl Fault {
    /// Tells certificates and a common language from a connection that merely broke, which gives nothing. With TLS 1.3 the
    /// server's verdict on the client's certificate comes only with the first answer.
    pub fn of(error: &io::Error) -> Option<Self> {
        use AlertDescription as Alert;
        match error.get_ref()?.downcast_ref::<rustls::Error>()? {
            rustls::Error::InvalidCertificate(fault) => {
                Some(Self::Untrusted(format!("the server's certificate: {fault}")))
            }
            rustls::Error::NoCertificatesPresented => Some(Self::Untrusted("the server shows no certificate".into())),
            rustls::Error::AlertReceived(
                alert @ (Alert::BadCertificate
                | Alert::UnsupportedCertificate
                | Alert::CertificateRevoked
                | Alert::CertificateExpired
                | Alert::CertificateUnknown
                | Alert::UnknownCA
                | Alert::AccessDenied
                | Alert::CertificateRequired),
            ) => Some(Self::Unauthenticated(format!("the server does not take the client's certificate: {alert:?}"))),
            rustls::Error::AlertReceived(
                alert @ (Alert::HandshakeFailure | Alert::ProtocolVersion | Alert::InsufficientSecurity),
            ) => Some(Self::Protocol(format!(
                "no common TLS version and cipher suite ({alert:?}); TLS 1.2 with ECDHE and AEAD, or TLS 1.3, is needed"
            ))),
            rustls::Error::InvalidMessage(_) => Some(Self::Protocol("the server does not speak TLS".into())),
            _ => None,
        }
    }
}

fn builder(roots: RootCertStore) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, String> {
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    Ok(builder.with_root_certificates(roots))
}

fn system_authorities() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

fn authorities(path: &Path) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(text)?;
    }
    Ok(roots)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| match error {
        rustls::pki_types::pem::Error::NoItemsFound => {
            "it holds no private key in PEM, or one under a password: openssl pkey -in key.pem -out plain.pem".into()
        }
        error => error.to_string(),
    })
}

/// The certificates of a PEM file, at least one.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let found = CertificateDer::pem_file_iter(path).map_err(text)?.collect::<Result<Vec<_>, _>>().map_err(text)?;
    if found.is_empty() { Err("it holds no certificate".into()) } else { Ok(found) }
}

fn text(error: impl Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_a_certificate_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("ca.pem");
        assert!(client_config(Some(&file)).unwrap_err().contains("ca.pem"));
        std::fs::write(&file, "nothing").unwrap();
        assert!(client_config(Some(&file)).unwrap_err().contains("no certificate"));
        assert!(client_config(None).is_ok());
    }
}
