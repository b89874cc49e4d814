//! What can be told of the database before a worker relies on it. Changes nothing.

use super::fault::chain;
use super::rights::{GRANTS, Right, RightsFound, needed};
use super::{StoreError, connection, session_options};
use crate::config::Database;
use crate::source::SealedFingerprintKey;
use std::time::Duration;
use time::OffsetDateTime;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error};

/// Jobs among which the keys are looked for that were used last.
const LAST_JOBS: i64 = 500;

/// Why the database was not reached.
#[derive(Debug, thiserror::Error)]
pub enum ReachError {
    /// The URL or the authority's file.
    #[error("{0}")]
    Settings(String),
    /// Nobody answers there, or not in time.
    #[error("{0}")]
    Away(String),
    /// TLS could not be agreed on.
    #[error("{0}")]
    Tls(String),
    /// The password, or the role; Postgres does not say which.
    #[error("{0}")]
    Password(String),
    /// No such database.
    #[error("{0}")]
    NoDatabase(String),
    /// The role may not connect.
    #[error("{0}")]
    NotLetIn(String),
    /// All its connections are taken.
    #[error("{0}")]
    Full(String),
    /// Postgres's own words for anything else.
    #[error("{0}")]
    Other(String),
}

/// A connection of its own, for looks.
pub struct Look {
    client: Client,
}

/// What the server is, and as whom it was reached.
#[derive(Clone, Debug)]
pub struct Server {
    /// The role of the session.
    pub role: String,
    /// `server_version_num`: 150018 is 15.18.
    pub version: i32,
    /// The version of TLS; `None` without it.
    pub tls: Option<String>,
    /// A standby, or a server that is told to write nothing.
    pub is_read_only: bool,
}

impl Look {
    /// Connects as the worker would.
    pub async fn open(url: &str, settings: &Database) -> Result<Self, ReachError> {
        let (mut config, tls) =
            connection(url, settings, "database.url").map_err(|error| ReachError::Settings(error.to_string()))?;
        config.options(session_options(settings));
        let patience = Duration::from_millis(settings.connect_timeout_ms);
        // Postgres's own limit is for TCP alone.
        let connecting = tokio::time::timeout(patience, config.connect(tls)).await;
        let late = |_| ReachError::Away(format!("no answer within {} ms", patience.as_millis()));
        let (client, connection) = connecting.map_err(late)??;
        // It ends with its client, whose errors are the connection's.
        drop(tokio::spawn(connection));
        Ok(Self { client })
    }

    /// What the server is.
    pub async fn server(&self) -> Result<Server, StoreError> {
        const READ: &str = "
            select current_user::text, current_setting('server_version_num')::integer,
                   (select version from pg_stat_ssl where pid = pg_backend_pid() and ssl),
                   pg_is_in_recovery() or current_setting('default_transaction_read_only')::boolean";
        let row = self.client.query_one(READ, &[]).await?;
        Ok(Server { role: row.get(0), version: row.get(1), tls: row.get(2), is_read_only: row.get(3) })
    }

    /// The server's own clock.
    pub async fn clock(&self) -> Result<OffsetDateTime, StoreError> {
        Ok(self.client.query_one("select clock_timestamp()", &[]).await?.get(0))
    }

    /// How many seconds the store's clock is ahead of the server's. For tests only; zero otherwise.
    pub async fn clock_offset(&self) -> Result<f64, StoreError> {
        let read = "select extract(epoch from ahead)::double precision from clock_offset";
        Ok(self.client.query_one(read, &[]).await?.get(0))
    }

    /// How the rights of this session's role differ from those that the migrations give to a worker.
    pub async fn rights(&self) -> Result<RightsFound, StoreError> {
        const READ: &str = "
            select c.relname::text, a.attname::text, lower(p.privilege),
                   has_column_privilege(c.oid, a.attnum, p.privilege)
            from pg_class c
                join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
                cross join unnest(array['SELECT', 'INSERT', 'UPDATE']) as p (privilege)
            where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p', 'v')
            union all
            select c.relname::text, null, lower(p.privilege), has_table_privilege(c.oid, p.privilege)
            from pg_class c cross join unnest(array['DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) as p (privilege)
            where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p', 'v')";
        let rows = self.client.query(READ, &[]).await?;
        let held: Vec<Right> = rows
            .iter()
            .map(|row| Right { table: row.get(0), column: row.get(1), privilege: row.get(2), is_held: row.get(3) })
            .collect();
        let mut found = RightsFound::compare(&needed(&GRANTS), &held);
        found.beyond.splice(0..0, self.powers().await?);
        Ok(found)
    }

    /// What the role may do that is no matter of single tables, in words.
    async fn powers(&self) -> Result<Vec<String>, StoreError> {
        const READ: &str = "
            select rolsuper, rolcreaterole, rolbypassrls,
                   exists (select from pg_class where relnamespace = 'public'::regnamespace
                                                      and pg_has_role(current_user, relowner, 'member')),
                   has_schema_privilege('public', 'CREATE'), has_database_privilege(current_database(), 'CREATE'),
                   has_database_privilege(current_database(), 'TEMPORARY')
            from pg_roles where rolname = current_user";
        const WORDS: [&str; 7] = [
            "it is a superuser",
            "it can make roles",
            "it passes over row security",
            "it owns tables",
            "it can make tables",
            "it can make schemas",
            "it can make temporary tables",
        ];
        let row = self.client.query_one(READ, &[]).await?;
        let holds = (0..WORDS.len()).filter(|at| row.get::<_, bool>(*at));
        Ok(holds.map(|at| WORDS[at].to_owned()).collect())
    }

    /// The sealed fingerprint key, which tells whether a key-encryption key is the right one. `None` before the first start.
    pub async fn fingerprint_key(&self) -> Result<Option<SealedFingerprintKey>, StoreError> {
        let read = "select version, sealed_key, kek_id from fingerprint_key order by version desc limit 1";
        let row = self.client.query_opt(read, &[]).await?;
        Ok(row.map(|row| SealedFingerprintKey { version: row.get(0), sealed_key: row.get(1), kek_id: row.get(2) }))
    }

    /// ARNs of the KMS keys of the last jobs, the latest first.
    pub async fn last_keys(&self) -> Result<Vec<String>, StoreError> {
        const READ: &str = "
            select kms_key.arn from (select id, kms_key_id from job order by id desc limit $1) as last
                join kms_key on kms_key.id = last.kms_key_id
            order by last.id desc";
        Ok(self.client.query(READ, &[&LAST_JOBS]).await?.iter().map(|row| row.get(0)).collect())
    }
}

impl From<Error> for ReachError {
    fn from(error: Error) -> Self {
        let Some(database) = error.as_db_error() else {
            let words = chain(&error);
            // The kinds of this error are its own; its words are all that tells them apart.
            return if words.starts_with("error performing TLS handshake") {
                Self::Tls(words)
            } else {
                Self::Away(words)
            };
        };
        let words = format!("{} ({})", database.message(), database.code().code());
        match *database.code() {
            SqlState::INVALID_PASSWORD => Self::Password(words),
            SqlState::INVALID_CATALOG_NAME => Self::NoDatabase(words),
            SqlState::INVALID_AUTHORIZATION_SPECIFICATION | SqlState::INSUFFICIENT_PRIVILEGE => Self::NotLetIn(words),
            SqlState::TOO_MANY_CONNECTIONS => Self::Full(words),
            SqlState::CANNOT_CONNECT_NOW => Self::Away(words),
            _ => Self::Other(words),
        }
    }
}
