//! Every SQL statement and every transaction.
//!
//! Verbs take slices. Multi-row statements lock in id order; deadlocks and serialisation failures are
//! tried again here, everything else is the caller's to judge by [`StoreError`]. No transaction is open
//! across a network call other than to Postgres itself.

mod abandon;
mod accept;
mod advance;
mod backlog;
mod batch;
mod bisect;
mod cancel;
mod claim;
mod dead;
mod deletions;
mod fault;
mod fold;
mod hold;
mod keys;
mod kms_keys;
mod lanes;
mod lock;
mod look;
mod observe;
mod outbox;
mod policy;
mod prepare;
mod quota;
mod read;
mod refuse;
mod release;
mod republish;
mod retry;
mod rights;
mod schema;
mod settle;
mod summary;
mod trail;
mod urgent;
mod written;

pub use accept::{Candidate, MessageDigest, NewJob, NewRefusal, Sender, Verdict};
pub use backlog::{FOLD_PAGE, Folded};
pub use batch::JobPage;
pub use bisect::bisect;
pub use cancel::{CANCEL_PAGE, Cancelled, Ending};
pub use claim::{Claimed, ClaimedJob, JOIN_PAGE, KnownMaterial, Lease, Progress, Renewed, Scan};
pub use dead::{LetterKey, RefusalRow};
pub use fault::{Fault, FaultKind};
pub use fold::FOLDS_PAGE;
pub use hold::{Held, Hold, Scope, Stop};
pub use keys::{KeyDeletion, KeyListing, NewSourceKey, SourceKeyOrigin};
pub use kms_keys::{KmsKeyFilter, KmsKeyView, LastJob, MaterialView};
pub use look::{Look, ReachError, Server};
pub use observe::{Bounds, PoolUse, Unpublished, Work};
pub use outbox::{OutboxRow, Queue};
pub use policy::RefusalRecord;
pub use prepare::{Chosen, DsmChoice, Intent, Prepared, Step};
pub use quota::{QuotaAnswer, QuotaAsk, QuotaLane, QuotaSlot};
pub use read::{JobFilter, JobView};
pub use refuse::{KEPT, TOLD_A_MINUTE};
pub use republish::{REPUBLISH_PAGE, Republication, Republished, Told};
pub use retry::{FailedChoice, FailedJob, NewRetry, RETRY_PAGE, Retried, Standing};
pub use rights::RightsFound;
pub use schema::{Migrated, SchemaError, migrate};
pub use settle::{
    Answered, Material, Parameters, Removed, ReplicaStep, Replicas, RetryState, Settled, Settlement, SettlementKind,
};
pub use trail::{Position, TrailRow};

/// Statements whose cost the suite bounds with `EXPLAIN`.
pub mod statements {
    pub use super::backlog::{FOLD, LANES_WAITING, LINES_WAITING, WAITING};
    pub use super::batch::WAITING_PAGE;
    pub use super::claim::{CLAIM, READ};
    pub use super::dead::REFUSALS_OF;
    pub use super::fold::DUE_FOLDS;
    pub use super::lock::{AUDIT_COUNTS, LOCK};
    pub use super::observe::{EXPIRED_LATELY, EXPIRY, FEW_ROTATIONS, MOST_EVENTS, MOST_EXPIRING, OUTBOX, WORK};
    pub use super::quota::RESERVE;
    pub use super::refuse::{KNOWN_REFUSALS, METERS, TURNS};
    pub use super::release::RELEASE;
    pub use super::session_options;
    pub use super::settle::END_JOBS;
    pub use super::trail::TRAIL;
    pub use super::urgent::OVERTAKE;
}

use crate::config::Database;
use crate::telemetry::Metrics;
use crate::tls::client_config;
use deadpool_postgres::{
    Hook, HookError, Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, Runtime, TimeoutType,
};
use futures_util::future::{BoxFuture, join_all};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use time::OffsetDateTime;
use tokio_postgres::config::TargetSessionAttrs;
use tokio_postgres::error::SqlState;
use tokio_postgres_rustls::MakeRustlsConnect;
use written::Tally;

/// Why a verb did not come to an end.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Postgres is away, full, or slow. Try again later.
    #[error("Postgres is not available: {0}")]
    Unavailable(Fault),
    /// A row breaks a rule of the database: the row's fault, found by bisection.
    #[error("Postgres refuses a row: {0}")]
    Data(String),
    /// Two transactions met. Tried again here before anybody sees it.
    #[error("a transaction gave way: {0}")]
    Conflict(String),
    /// A setting by which the database is reached.
    #[error("the setting {setting} is wrong: {reason}")]
    Setting {
        /// Its dotted name.
        setting: &'static str,
        /// What is wrong with it, and nothing of its value.
        reason: String,
    },
    /// Something else that time does not mend.
    #[error("{0}")]
    Settings(String),
}

/// The store: a pool of connections of the worker's role.
#[derive(Clone, Debug)]
pub struct Store {
    pool: Pool,
    /// How long a verb may take: a server that is frozen answers no time-out of its own.
    patience: Duration,
    written: Arc<Tally>,
    /// Connections that are no younger are of no more use, although they look whole: their answers are still awaited, or
    /// they lead to a server that takes no writes any more.
    spoilt_at: Arc<Mutex<Option<Instant>>>,
    /// Where faults and connections are counted, if anywhere.
    metrics: Arc<OnceLock<Metrics>>,
}

impl Store {
    /// Prepares the pool. Connects nowhere yet.
    pub fn new(url: &str, settings: &Database) -> Result<Self, StoreError> {
        let (mut config, tls) = connection(url, settings, "database.url")?;
        config.options(session_options(settings));
        let manager = Manager::from_config(config, tls, ManagerConfig { recycling_method: RecyclingMethod::Fast });
        let wait = Some(Duration::from_millis(settings.connect_timeout_ms));
        let spoilt_at = Arc::<Mutex<Option<Instant>>>::default();
        let (spoilt, metrics) = (Arc::clone(&spoilt_at), Arc::<OnceLock<Metrics>>::default());
        let counting = Arc::clone(&metrics);
        let pool = Pool::builder(manager)
            .pre_recycle(Hook::sync_fn(move |_, connection| match *lock(&spoilt) {
                Some(at) if connection.created <= at => Err(HookError::message("made before the last fault")),
                _ => Ok(()),
            }))
            .post_create(Hook::sync_fn(move |_, _| {
                if let Some(metrics) = counting.get() {
                    metrics.store_connects.inc();
                }
                Ok(())
            }))
            .max_size(settings.connections)
            .wait_timeout(wait)
            .create_timeout(wait)
            .recycle_timeout(wait)
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| StoreError::Settings(error.to_string()))?;
        let patience = Duration::from_millis(2 * settings.statement_timeout_ms + settings.connect_timeout_ms);
        Ok(Self { pool, patience, written: Arc::new(Tally::new()), spoilt_at, metrics })
    }

    /// The same store, whose faults and connections are counted.
    #[must_use]
    pub fn counted_by(self, metrics: &Metrics) -> Self {
        for kind in FaultKind::ALL {
            metrics.store_faults.with_label_values(&[kind.as_str()]);
        }
        // What was connected before, for the first look at the schema, is not counted.
        self.metrics.get_or_init(|| metrics.clone());
        self
    }

    /// The one clock.
    pub async fn now(&self) -> Result<OffsetDateTime, StoreError> {
        self.retrying(|| async {
            let client = self.client().await?;
            let statement = client.prepare_cached("select keyferry_now()").await?;
            Ok(client.query_one(&statement, &[]).await?.try_get(0)?)
        })
        .await
    }

    /// Whether it takes writes now. A standby, and a server that was told to, answers and takes none.
    pub async fn check_writable(&self) -> Result<(), StoreError> {
        self.retrying(|| async {
            let client = self.client().await?;
            let statement = client.prepare_cached("select current_setting('transaction_read_only') = 'on'").await?;
            if client.query_one(&statement, &[]).await?.try_get(0)? {
                return Err(StoreError::Unavailable(Fault::new(FaultKind::ReadOnly, "it takes no writes (25006)")));
            }
            Ok(())
        })
        .await
    }

    /// Whether there is room left for what is written: an idle worker writes nothing by which it would learn that. A sort that
    /// does not fit into memory takes blocks of the disk on which Postgres's data are and gives them back, and a record in its
    /// log, of no table, is flushed by the commit. Where temporary files have a place of their own, only that is known.
    pub async fn check_room(&self) -> Result<(), StoreError> {
        // A megabyte.
        const SPILL: &str = "
            select max(length(filler)) from (
                select repeat('x', 1000) as filler from generate_series(1, 1000) as n order by filler, n offset 0) as spilt";
        const WRITE: &str = "select pg_logical_emit_message(true, 'keyferry', '')";
        self.retrying(|| async {
            let mut client = self.client().await?;
            let transaction = client.transaction().await?;
            transaction.batch_execute("set local work_mem = '64kB'").await?;
            for statement in [SPILL, WRITE] {
                match transaction.query_one(statement, &[]).await {
                    // Who is not let learns nothing by that.
                    Err(error) if error.code().is_some_and(is_forbidden) => return Ok(()),
                    done => drop(done?),
                }
            }
            Ok(transaction.commit().await?)
        })
        .await
    }

    async fn client(&self) -> Result<Object, StoreError> {
        self.pool.get().await.map_err(|error| {
            // A connection that was to be made, not one that was to be had.
            let is_new = matches!(error, PoolError::Backend(_) | PoolError::Timeout(TimeoutType::Create));
            if let Some(metrics) = self.metrics.get().filter(|_| is_new) {
                metrics.store_connects_failed.inc();
            }
            error.into()
        })
    }

    /// Runs a transaction within its time, and again while it gives way to another. One that met a server that takes no
    /// writes any more is run once more, on a fresh connection: another server may have taken over its address.
    async fn retrying<T, F, Fut>(&self, transaction: F) -> Result<T, StoreError>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<T, StoreError>>,
    {
        const MOST: u32 = 8;
        let (mut made, mut is_renewed) = (1, false);
        loop {
            let outcome = tokio::time::timeout(self.patience, transaction()).await.unwrap_or_else(|_| {
                let reason = format!("no answer within {} ms", self.patience.as_millis());
                // Whoever has this connection next would wait for the same answer.
                *lock(&self.spoilt_at) = Some(Instant::now());
                Err(StoreError::Unavailable(Fault::new(FaultKind::Timeout, reason)))
            });
            let fault = outcome.as_ref().err().and_then(StoreError::fault);
            if let (Some(kind), Some(metrics)) = (fault, self.metrics.get()) {
                metrics.store_faults.with_label_values(&[kind.as_str()]).inc();
            }
            if fault == Some(FaultKind::ReadOnly) {
                *lock(&self.spoilt_at) = Some(Instant::now());
            }
            match outcome {
                Err(StoreError::Conflict(reason)) if made == MOST => {
                    return Err(StoreError::Unavailable(Fault::new(FaultKind::Conflict, reason)));
                }
                Err(StoreError::Conflict(_)) => made += 1,
                Err(_) if fault == Some(FaultKind::ReadOnly) && !is_renewed => is_renewed = true,
                outcome => return outcome,
            }
        }
    }
}

/// A limit on temporary files, or a right that was taken away.
fn is_forbidden(code: &SqlState) -> bool {
    [SqlState::CONFIGURATION_LIMIT_EXCEEDED, SqlState::INSUFFICIENT_PRIVILEGE].contains(code)
}

/// Held for an assignment or a look.
fn lock(spoilt_at: &Mutex<Option<Instant>>) -> std::sync::MutexGuard<'_, Option<Instant>> {
    spoilt_at.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What each session of the store sets.
///
/// Plans must not depend on whether a fresh table was ever analysed: a cached plan that was made on an empty
/// table would scan it when it is full. Every statement here has its index.
pub fn session_options(settings: &Database) -> String {
    format!(
        "-c statement_timeout={} -c lock_timeout={} -c idle_in_transaction_session_timeout=15000 \
         -c client_connection_check_interval=5000 -c jit=off -c enable_seqscan=off \
         -c enable_bitmapscan=off -c enable_hashjoin=off -c enable_mergejoin=off",
        settings.statement_timeout_ms,
        settings.statement_timeout_ms / 2,
    )
}

/// Waits for statements that were sent together. When one fails, those after it only say that their transaction is
/// spoilt; which of them is heard first is chance, and only the cause says whether a row is at fault.
async fn together(statements: Vec<BoxFuture<'_, Result<(), StoreError>>>) -> Result<(), StoreError> {
    let errors = join_all(statements).await.into_iter().filter_map(Result::err);
    let cause = errors.min_by_key(|error| match error {
        StoreError::Data(_) | StoreError::Setting { .. } | StoreError::Settings(_) => 0,
        StoreError::Conflict(_) => 1,
        // The spoilt transaction (25P02) is among these.
        StoreError::Unavailable(_) => 2,
    });
    cause.map_or(Ok(()), Err)
}

/// Reads a URL and makes the TLS connector. `sslmode` decides whether TLS is used; the server's
/// certificate is always verified when it is. `setting` is the URL's name.
fn connection(
    url: &str,
    settings: &Database,
    setting: &'static str,
) -> Result<(tokio_postgres::Config, MakeRustlsConnect), StoreError> {
    let mut config: tokio_postgres::Config = url.parse().map_err(|_| {
        // The parser's own words could repeat a password.
        let reason = "expected postgres://user:password@host:port/database?sslmode=require".to_owned();
        StoreError::Setting { setting, reason }
    })?;
    config
        .application_name("keyferry")
        .connect_timeout(Duration::from_millis(settings.connect_timeout_ms))
        .keepalives(true)
        .keepalives_idle(Duration::from_secs(15))
        .keepalives_interval(Duration::from_secs(5))
        .tcp_user_timeout(Duration::from_millis(settings.statement_timeout_ms * 2));
    // Of several servers, only the one that takes writes is of use.
    if config.get_hosts().len() > 1 && config.get_target_session_attrs() == TargetSessionAttrs::Any {
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
    }
    let tls = client_config(settings.ca_file.as_deref())
        .map_err(|reason| StoreError::Setting { setting: "database.ca_file", reason })?;
    Ok((config, MakeRustlsConnect::new(tls)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_servers_the_one_that_takes_writes_is_meant() {
        for (url, wanted) in [
            ("postgres://u:p@one/db", TargetSessionAttrs::Any),
            ("postgres://u:p@one:1,two:2/db", TargetSessionAttrs::ReadWrite),
        ] {
            let (config, _) = connection(url, &Database::default(), "database.url").unwrap();
            assert_eq!(config.get_target_session_attrs(), wanted, "{url}");
        }
    }
}
