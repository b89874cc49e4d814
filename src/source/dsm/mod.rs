//! The `dsm` tier: keys that a KMIP server holds, fetched over mutual TLS.
//!
//! ```text
//! Dsm::fetch --DsmKeyRef--> which connection; identifier or name first
//!   connection     Locate, Get Attributes and Get in as few messages as can be; judges state and identity
//!     messages     what is asked; answers: what came of it
//!     pool         few sessions a connection, failover, one more try where a session went stale (idle)
//!       server     how it fared: whether it is asked, by whom, or left alone
//!       session    TCP, TLS by identity's files, Discover Versions, one request at a time, time-outs
//!         ttlv     the encoding, checked before anything is read from it
//!     key_block    usage mask, formats (transparent: numbers) --> PlainKey
//! ```
//!
//! The client's certificate needs the right to Locate, Get Attributes and Get.
//!
//! Key bytes pass through one buffer a message, which is zeroised; what TLS and the RSA crate copy on the way is beyond
//! reach.

mod answers;
mod certificate;
mod check;
mod connection;
mod error;
mod identity;
mod idle;
mod key_block;
mod messages;
#[cfg(test)]
mod mutations;
mod names;
mod pool;
mod server;
mod session;
mod tags;
mod transparent;
mod ttlv;

pub use check::{ServerDetails, ServerReport};
pub use error::DsmError;

use super::PlainKey;
use crate::config::{ConfigError, DsmConnection};
use crate::job::{DsmKeyRef, KeyKind};
use crate::telemetry::Metrics;
use connection::{Connection, Known};
use std::collections::BTreeMap;
use std::fmt;

/// All configured connections. Connects when first asked for a key.
pub struct Dsm {
    connections: BTreeMap<String, Connection>,
    default: Option<String>,
}

/// A key as it was fetched.
#[derive(Debug)]
pub struct FetchedKey {
    /// The name of the connection.
    pub connection: String,
    /// By which the server knows it for ever.
    pub unique_identifier: String,
    /// By which it was asked for, or the first that the server says.
    pub name: Option<String>,
    /// The key.
    pub key: PlainKey,
}

impl Dsm {
    /// Reads the files of all connections; connects nowhere. `default` names the one that is meant where a reference names
    /// none; where there is only one it needs no name.
    pub fn new(
        settings: &BTreeMap<String, DsmConnection>,
        default: Option<&str>,
        metrics: &Metrics,
    ) -> Result<Self, ConfigError> {
        let mut connections = BTreeMap::new();
        for (name, settings) in settings {
            connections.insert(name.clone(), Connection::new(name, settings, metrics)?);
        }
        let only = connections.keys().next().filter(|_| connections.len() == 1);
        let default = default.or(only.map(String::as_str)).map(str::to_owned);
        Ok(Self { connections, default })
    }

    /// Whether a reference names a connection that is configured.
    pub fn knows(&self, reference: &DsmKeyRef) -> Result<(), DsmError> {
        self.connection(reference.connection()).map(drop)
    }

    /// The reference with the connection that it means, as results and policies name the key.
    pub fn full_name(&self, reference: &DsmKeyRef) -> Result<String, DsmError> {
        self.knows(reference)?;
        let connection = reference.connection().or(self.default.as_deref()).unwrap_or_default();
        Ok(format!("{connection}/{}", reference.key()))
    }

    /// Fetches a key and checks that it may and can be used as material of a kind.
    ///
    /// What looks like a unique identifier (see [`DsmKeyRef`]) is tried as one first, and as a name if there is no such
    /// object; anything else the other way round. A name that several objects have is refused, and so is one that is the
    /// identifier of another object: whoever stores objects could else put one in that other's place. That is asked when
    /// the name is not yet known, and not where the server keeps attributes to itself.
    ///
    /// Only Active keys are given out; a server that keeps no states is taken at its word.
    ///
    /// Each step has its time-out; whoever has less time than all of them together drops this at any point, and no
    /// connection is left half read.
    pub async fn fetch(&self, reference: &DsmKeyRef, kind: KeyKind) -> Result<FetchedKey, DsmError> {
        let connection = self.connection(reference.connection())?;
        let key = reference.key();
        let found = if reference.looks_like_identifier() {
            match connection.by_identifier(key, key).await? {
                Some(found) => Some(found),
                None => connection.by_name(key, Known::NoIdentifier).await?,
            }
        } else {
            match connection.by_name(key, Known::Nothing).await? {
                Some(found) => Some(found),
                None => connection.by_identifier(key, key).await?,
            }
        };
        connection.open(key, kind, found).await
    }

    /// Fetches the object that a server knows by this identifier, as what was once chosen: no name ever stands in for it.
    pub async fn fetch_exact(
        &self,
        connection: &str,
        unique_identifier: &str,
        kind: KeyKind,
    ) -> Result<FetchedKey, DsmError> {
        let connection = self.connection(Some(connection))?;
        let found = connection.by_identifier(unique_identifier, unique_identifier).await?;
        connection.open(unique_identifier, kind, found).await
    }

    fn connection(&self, name: Option<&str>) -> Result<&Connection, DsmError> {
        let Some(first) = self.connections.keys().next() else {
            return Err(DsmError::NotConfigured);
        };
        let configured = || self.connections.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let Some(name) = name.or(self.default.as_deref()) else {
            return Err(DsmError::NoDefault { configured: configured(), first: first.clone() });
        };
        let unknown = || DsmError::UnknownConnection { name: name.to_owned(), configured: configured() };
        self.connections.get(name).ok_or_else(unknown)
    }
}

impl fmt::Debug for Dsm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dsm").field("connections", &self.connections.keys()).field("default", &self.default).finish()
    }
}
