//! What ails Postgres, in words that a metric can hold.

use super::StoreError;
use deadpool_postgres::{PoolError, TimeoutType};
use std::fmt;
use std::io;
use tokio_postgres::error::SqlState;

/// Why Postgres is not available: nothing is wrong with what was asked of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What ails it.
    pub kind: FaultKind,
    /// The same in the words of whoever found out.
    pub reason: String,
}

words! {
    /// What ails Postgres.
    pub FaultKind {
        /// No connection could be made: nobody answers, or a server that starts or stops.
        Unreachable = "unreachable",
        /// A connection ended while it was used.
        Closed = "closed",
        /// No answer in time: a statement, a lock, or a whole transaction.
        Timeout = "timeout",
        /// It takes no writes: a standby, or one that was told so.
        ReadOnly = "read_only",
        /// Its disk is full.
        DiskFull = "disk_full",
        /// It has no connection left for us.
        TooManyConnections = "too_many_connections",
        /// All connections of our own pool were busy for too long.
        PoolBusy = "pool_busy",
        /// Transactions met. Tried again until it is too often.
        Conflict = "deadlock_or_serialization",
        /// Anything else, such as a missing right.
        Other = "other",
    }
}

impl FaultKind {
    fn of_state(code: &SqlState) -> Self {
        match *code {
            SqlState::READ_ONLY_SQL_TRANSACTION => Self::ReadOnly,
            SqlState::DISK_FULL => Self::DiskFull,
            SqlState::TOO_MANY_CONNECTIONS => Self::TooManyConnections,
            // A statement's time-out cancels it.
            SqlState::QUERY_CANCELED | SqlState::LOCK_NOT_AVAILABLE | SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT => {
                Self::Timeout
            }
            SqlState::ADMIN_SHUTDOWN | SqlState::CRASH_SHUTDOWN => Self::Closed,
            SqlState::CANNOT_CONNECT_NOW => Self::Unreachable,
            ref code if code.code().starts_with("08") => Self::Closed,
            _ => Self::Other,
        }
    }
}

impl Fault {
    pub(super) fn new(kind: FaultKind, reason: impl Into<String>) -> Self {
        Self { kind, reason: reason.into() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl StoreError {
    /// What ails Postgres, if it is Postgres that is at fault.
    pub fn fault(&self) -> Option<FaultKind> {
        match self {
            Self::Unavailable(fault) => Some(fault.kind),
            Self::Conflict(_) => Some(FaultKind::Conflict),
            Self::Data(_) | Self::Settings(_) | Self::Setting { .. } => None,
        }
    }
}

/// An error of a connection that was made.
impl From<tokio_postgres::Error> for StoreError {
    fn from(error: tokio_postgres::Error) -> Self {
        let Some(database) = error.as_db_error() else {
            let is_gone = error.is_closed() || way(&error).is_some();
            let kind = if is_gone { FaultKind::Closed } else { FaultKind::Other };
            return Self::Unavailable(Fault::new(kind, chain(&error)));
        };
        // A detail can quote a row's values; the message does not.
        let message = format!("{} ({})", database.message(), database.code().code());
        match *database.code() {
            SqlState::T_R_SERIALIZATION_FAILURE | SqlState::T_R_DEADLOCK_DETECTED => Self::Conflict(message),
            // Another transaction wrote the same entry: our count of entries was old.
            SqlState::UNIQUE_VIOLATION if database.constraint() == Some("audit_entry_pkey") => Self::Conflict(message),
            // Classes 22 data exception, 23 integrity constraint, 54 program limit: the row's fault.
            ref code if ["22", "23", "54"].contains(&&code.code()[..2]) => Self::Data(message),
            ref code => Self::Unavailable(Fault::new(FaultKind::of_state(code), message)),
        }
    }
}

/// An error of a connection that is being made, or of the pool.
impl From<PoolError> for StoreError {
    fn from(error: PoolError) -> Self {
        let kind = match error {
            PoolError::Backend(error) if error.as_db_error().is_some() => return error.into(),
            PoolError::Backend(error) => {
                let kind = way(&error).unwrap_or(FaultKind::Other);
                return Self::Unavailable(Fault::new(kind, chain(&error)));
            }
            PoolError::Timeout(TimeoutType::Wait) => FaultKind::PoolBusy,
            PoolError::Timeout(TimeoutType::Create) => FaultKind::Unreachable,
            PoolError::Timeout(TimeoutType::Recycle) => FaultKind::Timeout,
            _ => FaultKind::Other,
        };
        Self::Unavailable(Fault::new(kind, error.to_string()))
    }
}

/// What ails the way to a server to which a connection is made; nothing where TLS or a login fails.
fn way(error: &dyn std::error::Error) -> Option<FaultKind> {
    let mut cause = error.source();
    while let Some(inner) = cause {
        if let Some(io) = inner.downcast_ref::<io::Error>() {
            return match io.kind() {
                // What TLS has to say.
                io::ErrorKind::InvalidData => None,
                // The connector's own word for servers of which none takes writes.
                io::ErrorKind::PermissionDenied if io.raw_os_error().is_none() => Some(FaultKind::ReadOnly),
                _ => Some(FaultKind::Unreachable),
            };
        }
        cause = inner.source();
    }
    // A time-out of the connector itself has no source.
    error.to_string().starts_with("timeout waiting for server").then_some(FaultKind::Unreachable)
}

pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_told_apart() {
        for (code, kind) in [
            ("25006", FaultKind::ReadOnly),
            ("53300", FaultKind::TooManyConnections),
            ("57014", FaultKind::Timeout),
            ("55P03", FaultKind::Timeout),
            ("57P01", FaultKind::Closed),
            ("57P02", FaultKind::Closed),
            ("57P03", FaultKind::Unreachable),
            ("08006", FaultKind::Closed),
            ("53100", FaultKind::DiskFull),
            ("42501", FaultKind::Other),
        ] {
            assert_eq!(FaultKind::of_state(&SqlState::from_code(code)), kind, "{code}");
        }
    }

    #[test]
    fn every_kind_has_a_word_of_its_own() {
        let words: std::collections::BTreeSet<&str> = FaultKind::ALL.iter().map(|kind| kind.as_str()).collect();
        assert_eq!(words.len(), FaultKind::ALL.len());
    }
}
