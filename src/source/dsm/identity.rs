//! Who the client is and whom it trusts, from the files of a connection.

use crate::config::{ConfigError, DsmConnection};
use crate::tls::{self, FileError, Files, OwnFiles};
use rustls::ClientConfig;
use std::sync::Arc;

/// The files of a connection, and what they held when they were last sound.
#[derive(Debug)]
pub(super) struct Identity {
    connection: String,
    tls: tls::Identity,
}

impl Identity {
    /// Reads the files of the connection of that name.
    pub(super) fn new(connection: &str, settings: &DsmConnection) -> Result<Self, ConfigError> {
        let DsmConnection { ca_file, cert_file, key_file, .. } = settings.clone();
        let own = Some(OwnFiles { certificate: cert_file, key: key_file });
        let tls = tls::Identity::read(Files { authorities: Some(ca_file), own }).map_err(|error| {
            let FileError { setting, path, reason } = error;
            ConfigError::Unusable { name: format!("dsm.{connection}.{setting}"), path, reason }
        })?;
        Ok(Self { connection: connection.to_owned(), tls })
    }

    /// What the files hold now; what they held before where they cannot be used, as while they are being replaced.
    /// Reads files: not for an async thread.
    pub(super) fn current(&self) -> Arc<ClientConfig> {
        let (config, error) = self.tls.current();
        if let Some(error) = error {
            tracing::warn!(
                dsm.connection = %self.connection, error.message = %error,
                "the certificate files cannot be read again: what they held before is used"
            );
        }
        config
    }
}
