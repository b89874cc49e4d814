//! Who the client is and whom it trusts, from files. Read again for each new connection: a renewed certificate needs no
//! restart.

use crate::config::{ConfigError, DsmConnection};
use crate::tls::{IdentityError, mutual_config};
use rustls::ClientConfig;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// The files of a connection, and what they held when they were last sound.
pub(super) struct Identity {
    connection: String,
    ca_file: PathBuf,
    cert_file: PathBuf,
    key_file: PathBuf,
    last: Mutex<Arc<ClientConfig>>,
}

impl Identity {
    /// Reads the files of the connection of that name.
    pub(super) fn new(connection: &str, settings: &DsmConnection) -> Result<Self, ConfigError> {
        let DsmConnection { ca_file, cert_file, key_file, .. } = settings.clone();
        let config = mutual_config(&ca_file, &cert_file, &key_file).map_err(|error| {
            let (setting, path) = match error {
                IdentityError::Authorities(_) => ("ca_file", &ca_file),
                IdentityError::Certificate(_) => ("cert_file", &cert_file),
                IdentityError::Key(_) => ("key_file", &key_file),
            };
            let (name, path) = (format!("dsm.{connection}.{setting}"), path.clone());
            ConfigError::Unusable { name, path, reason: error.to_string() }
        })?;
        let last = Mutex::new(Arc::new(config));
        Ok(Self { connection: connection.to_owned(), ca_file, cert_file, key_file, last })
    }

    /// What the files hold now; what they held before where they cannot be used, as while they are being replaced.
    /// Reads files: not for an async thread.
    pub(super) fn current(&self) -> Arc<ClientConfig> {
        let read = mutual_config(&self.ca_file, &self.cert_file, &self.key_file);
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match read {
            Ok(config) => *last = Arc::new(config),
            Err(error) => tracing::warn!(
                dsm.connection = %self.connection, %error,
                "the certificate files cannot be read again: what they held before is used"
            ),
        }
        Arc::clone(&last)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("connection", &self.connection).finish_non_exhaustive()
    }
}
