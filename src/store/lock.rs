//! The fence: whatever is written after a claim first locks the lines whose leases still hold.

use super::{Lease, StoreError};
use deadpool_postgres::Transaction;
use futures_util::try_join;
use std::collections::{HashMap, HashSet};
use time::OffsetDateTime;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// Locks lines by lease, in id order.
pub const LOCK: &str = "
    select line.id, line.token, (select keyferry_now()), line.urgent_seq,
           case when line.urgent_seq is null then line.attempt
                else (select urgent.attempt from urgent where urgent.line_id = line.id and urgent.seq = line.urgent_seq) end
    from unnest($1::bigint[], $2::uuid[]) as asked(id, token)
    join line on line.id = asked.id and line.token = asked.token
    order by line.id for no key update of line";

/// How many audit entries jobs have. A statement of its own, after the lock: it sees what was committed while the
/// lock was waited for.
pub const AUDIT_COUNTS: &str = "select job_id, audit_n from progress where job_id = any($1)";

/// In which lines urgent jobs wait. After the lock as well.
const URGENT: &str = "select distinct line_id from urgent where line_id = any($1)";

/// A line whose lease holds, locked.
pub(super) struct Held {
    /// Entries of the audit trail about the job so far.
    pub(super) audit_n: i32,
    /// Claims of the job.
    pub(super) attempt: i32,
    /// The job's place, if it has overtaken its line.
    pub(super) urgent_seq: Option<i64>,
    /// Whether urgent jobs wait in the line; the job itself may be one.
    pub(super) has_urgent: bool,
}

/// Locks what still holds of `leases`, each with its job. `None`: none of them.
pub(super) async fn lock(
    transaction: &Transaction<'_>,
    leases: &[(Lease, Uuid)],
) -> Result<Option<(HashMap<Lease, Held>, OffsetDateTime)>, StoreError> {
    let lines: Vec<i64> = leases.iter().map(|(lease, _)| lease.line_id).collect();
    let tokens: Vec<Uuid> = leases.iter().map(|(lease, _)| lease.token).collect();
    let jobs: Vec<Uuid> = leases.iter().map(|(_, job)| *job).collect();
    let lock = transaction.prepare_cached(LOCK).await?;
    let counts = transaction.prepare_cached(AUDIT_COUNTS).await?;
    let urgent = transaction.prepare_cached(URGENT).await?;
    let locked: [&(dyn ToSql + Sync); 2] = [&lines, &tokens];
    let (counted, hurried): ([&(dyn ToSql + Sync); 1], [&(dyn ToSql + Sync); 1]) = ([&jobs], [&lines]);
    // One round trip: they run in this order.
    let (rows, counts, urgent) = try_join!(
        transaction.query(&lock, &locked),
        transaction.query(&counts, &counted),
        transaction.query(&urgent, &hurried),
    )?;
    let Some(now) = rows.first().map(|row| row.get(2)) else { return Ok(None) };
    let counts: HashMap<Uuid, i32> = counts.iter().map(|row| (row.get(0), row.get(1))).collect();
    let urgent: HashSet<i64> = urgent.iter().map(|row| row.get(0)).collect();
    // By line and token: a process that was slow may bring the end of its old lease together with that of its new.
    let rows: HashMap<Lease, &Row> = rows.iter().map(|row| (Lease::of(row), row)).collect();
    let held = leases.iter().filter_map(|(lease, job)| {
        let row = rows.get(lease)?;
        let held = Held {
            // A job without progress has one entry: that it was accepted.
            audit_n: counts.get(job).copied().unwrap_or(1),
            attempt: row.get(4),
            urgent_seq: row.get(3),
            has_urgent: urgent.contains(&lease.line_id),
        };
        Some((*lease, held))
    });
    Ok(Some((held.collect(), now)))
}
