//! Migrations, and the check that `serve` makes instead.

use super::{Store, StoreError, connection};
use crate::config::Database;
use refinery::embed_migrations;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

embed_migrations!("migrations");

/// Any two migrating processes wait for each other on this. Everybody who may connect can take it: it is not waited for without
/// end, and neither is any other lock.
const ADVISORY_LOCK: i64 = 0x6B66_6D69_6772_6174;
/// Locks are waited for as long as so many statements of a worker may take.
const PATIENCE: u64 = 6;

/// What `migrate` did.
#[derive(Debug, serde::Serialize)]
pub struct Migrated {
    /// Names of the migrations that were applied now, in order.
    pub applied: Vec<String>,
    /// The schema's version afterwards.
    pub version: i32,
}

/// Why the schema does not fit.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// Postgres is away, or the URL is of no use.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The roles are made by an operator, once for the cluster.
    #[error(
        "the roles keyferry_worker and keyferry_reader do not exist: run ops/postgres/roles.sql as a superuser first"
    )]
    NoRoles,
    /// Somebody keeps the lock by which migrating processes wait for each other.
    #[error(
        "another session holds the lock of migrations: {0}; if it is no keyferry migrate, end it as a superuser: select pg_terminate_backend(pid)"
    )]
    Locked(String),
    /// A migration failed or one that was applied has been changed.
    #[error("migration failed: {0}")]
    Failed(String),
    /// `migrate` was never run.
    #[error("the database has no Keyferry schema: run keyferry migrate with the owner's URL (database.owner_url)")]
    Absent,
    /// Older than this binary needs.
    #[error("the schema is at version {found}, this binary needs {needed}: run keyferry migrate")]
    TooOld {
        /// The schema's version.
        found: i32,
        /// This binary's.
        needed: i32,
    },
    /// A newer migration shut this binary out.
    #[error(
        "the schema no longer tolerates this binary ({found} is the oldest allowed, this is {ours}): install a newer keyferry"
    )]
    BinaryTooOld {
        /// The oldest version that the schema bears.
        found: i32,
        /// This binary's.
        ours: i32,
    },
}

/// Brings the schema up to date, as the owner, under an advisory lock. Safe to run twice and at once.
pub async fn migrate(owner_url: &str, settings: &Database) -> Result<Migrated, SchemaError> {
    let (config, tls) = connection(owner_url, settings, "database.owner_url")?;
    let (mut client, connection) = config.connect(tls).await.map_err(StoreError::from)?;
    let driver = tokio::spawn(connection);
    let outcome = migrate_on(&mut client, PATIENCE * settings.statement_timeout_ms).await;
    drop(client);
    // The connection ends when its client is gone; its own error was the client's error too.
    drop(driver.await);
    outcome
}

async fn migrate_on(client: &mut Client, lock_timeout_ms: u64) -> Result<Migrated, SchemaError> {
    let roles = "select count(*) from pg_roles where rolname in ('keyferry_worker', 'keyferry_reader')";
    let found: i64 = client.query_one(roles, &[]).await.map_err(StoreError::from)?.get(0);
    if found < 2 {
        return Err(SchemaError::NoRoles);
    }
    client.batch_execute(&format!("set lock_timeout = {lock_timeout_ms}")).await.map_err(StoreError::from)?;
    if let Err(error) = client.execute("select pg_advisory_lock($1)", &[&ADVISORY_LOCK]).await {
        return Err(match error.code() {
            Some(&SqlState::LOCK_NOT_AVAILABLE) => SchemaError::Locked(holders(client).await?),
            _ => StoreError::from(error).into(),
        });
    }
    let report = migrations::runner()
        .set_abort_divergent(true)
        .set_abort_missing(true)
        .run_async(client)
        .await
        .map_err(|error| SchemaError::Failed(super::fault::chain(&error)))?;
    client.execute("select pg_advisory_unlock($1)", &[&ADVISORY_LOCK]).await.map_err(StoreError::from)?;
    let applied =
        report.applied_migrations().iter().map(|migration| format!("V{}__{}", migration.version(), migration.name()));
    Ok(Migrated { applied: applied.collect(), version: newest() })
}

/// Who holds the advisory lock, as far as the owner is told of other roles' sessions.
async fn holders(client: &Client) -> Result<String, StoreError> {
    const HOLDERS: &str = "
        select coalesce(string_agg(format('pid %s, role %s, application %L', pid, usename, application_name), '; '),
                        'it has just let go')
        from pg_locks join pg_stat_activity using (pid)
        where locktype = 'advisory' and granted and objsubid = 1
          and database = (select oid from pg_database where datname = current_database())
          and (classid::bigint << 32) | objid::bigint = $1";
    Ok(client.query_one(HOLDERS, &[&ADVISORY_LOCK]).await?.get(0))
}

impl Store {
    /// Checks that the schema fits this binary. Changes nothing: the worker's role could not.
    pub async fn check_schema(&self) -> Result<(), SchemaError> {
        let client = self.client().await?;
        let present = "select to_regclass('public.schema_tolerance') is not null and to_regclass('public.refinery_schema_history') is not null";
        if !client.query_one(present, &[]).await.map_err(StoreError::from)?.get::<_, bool>(0) {
            return Err(SchemaError::Absent);
        }
        let versions =
            "select (select max(version) from refinery_schema_history), (select oldest_binary from schema_tolerance)";
        let row = client.query_one(versions, &[]).await.map_err(StoreError::from)?;
        let (found, oldest): (i32, i32) = (row.get(0), row.get(1));
        let ours = newest();
        if found < ours {
            return Err(SchemaError::TooOld { found, needed: ours });
        }
        if ours < oldest {
            return Err(SchemaError::BinaryTooOld { found: oldest, ours });
        }
        Ok(())
    }
}

/// The text of each migration, in their order.
pub(super) fn migration_texts() -> impl Iterator<Item = String> {
    let runner = migrations::runner();
    let mut found: Vec<_> =
        runner.get_migrations().iter().map(|one| (one.version(), one.sql().map(str::to_owned))).collect();
    found.sort_unstable();
    found.into_iter().filter_map(|(_, text)| text)
}

fn newest() -> i32 {
    migrations::runner().get_migrations().iter().map(refinery::Migration::version).max().unwrap_or(0)
}
