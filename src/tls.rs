//! TLS for every client that lets one choose: rustls with one provider, the server always verified.

use rustls::client::{Resumption, WantsClientCert};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ConfigBuilder, RootCertStore};
use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;

/// A client that trusts the authorities in `ca_file`, or the system's. The error says what is wrong with the file.
pub fn client_config(ca_file: Option<&Path>) -> Result<ClientConfig, String> {
    let roots = if let Some(path) = ca_file {
        authorities(path).map_err(|reason| format!("{} cannot be used: {reason}", path.display()))?
    } else {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        roots
    };
    Ok(builder(roots)?.with_no_client_auth())
}

/// Which of an identity's files is wrong, and why.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The authorities.
    #[error("{0}")]
    Authorities(String),
    /// The certificates.
    #[error("{0}")]
    Certificate(String),
    /// The private key.
    #[error("{0}")]
    Key(String),
}

/// A client with a certificate of its own that trusts the authorities in `ca_file` and no others.
///
/// Sessions are not resumed: the server looks at the certificate of every connection.
pub fn mutual_config(ca_file: &Path, cert_file: &Path, key_file: &Path) -> Result<ClientConfig, IdentityError> {
    let roots = authorities(ca_file).map_err(IdentityError::Authorities)?;
    let certificates = certificates(cert_file).map_err(IdentityError::Certificate)?;
    let key = PrivateKeyDer::from_pem_file(key_file).map_err(|error| {
        IdentityError::Key(match error {
            rustls::pki_types::pem::Error::NoItemsFound => {
                "it holds no private key in PEM, or one under a password: openssl pkey -in key.pem -out plain.pem"
                    .into()
            }
            error => error.to_string(),
        })
    })?;
    let mut config = builder(roots)
        .map_err(IdentityError::Authorities)?
        .with_client_auth_cert(certificates, key)
        .map_err(|error| IdentityError::Key(error.to_string()))?;
    config.resumption = Resumption::disabled();
    Ok(config)
}

fn builder(roots: RootCertStore) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, String> {
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    Ok(builder.with_root_certificates(roots))
}

fn authorities(path: &Path) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(text)?;
    }
    Ok(roots)
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
