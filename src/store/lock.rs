//! The fence: whatever is written after a claim first locks the lines whose leases still hold.

use super::{Ending, Lease, StoreError};
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

/// How many audit entries jobs have, and what they have done. A statement of its own, after the lock: it sees what was committed while the
/// lock was waited for.
pub const AUDIT_COUNTS: &str = "
    select job_id, audit_n, in_doubt, imported, deleted_ids <> '{}' or key_material_id is not null,
           source_key_id
    from progress where job_id = any($1)";

/// Which jobs an operator wants ended, and in which lines urgent jobs wait. After the lock as well.
const CANCELLED: &str = "select job_id, abandons from cancellation where job_id = any($1)";
const URGENT: &str = "select distinct line_id from urgent where line_id = any($1)";

/// A line whose lease holds, locked.
#[expect(clippy::struct_excessive_bools, reason = "each is a column of its own")]
pub(super) struct Held {
    /// Entries of the audit trail about the job so far.
    pub(super) audit_n: i32,
    /// Claims of the job.
    pub(super) attempt: i32,
    /// The job's place, if it has overtaken its line.
    pub(super) urgent_seq: Option<i64>,
    /// Whether urgent jobs wait in the line; the job itself may be one.
    pub(super) has_urgent: bool,
    /// An operator wants the job ended.
    pub(super) ending: Option<Ending>,
    /// A call of an earlier attempt, or of this one if it is about to be made, may have taken effect.
    pub(super) in_doubt: bool,
    /// AWS has answered every mutating call.
    pub(super) is_answered: bool,
    /// Some of the materials that it means are deleted, or its new one waits for the rotation.
    pub(super) has_changed: bool,
    /// The source key that it has chosen.
    pub(super) source_key_id: Option<Uuid>,
}

impl Held {
    /// How the job ends now, if an operator wants it ended and nothing stands against that.
    pub(super) fn ends_as(&self, is_unsettled: bool) -> Option<Ending> {
        self.ending.filter(|ending| *ending == Ending::Abandoned || !is_unsettled)
    }

    /// Whether what was done to AWS is still to be learnt, or to be seen.
    pub(super) fn is_unsettled(&self) -> bool {
        self.in_doubt || self.is_answered
    }
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
    let cancelled = transaction.prepare_cached(CANCELLED).await?;
    let locked: [&(dyn ToSql + Sync); 2] = [&lines, &tokens];
    let (counted, hurried): ([&(dyn ToSql + Sync); 1], [&(dyn ToSql + Sync); 1]) = ([&jobs], [&lines]);
    // One round trip: they run in this order.
    let (rows, counts, cancelled, urgent) = try_join!(
        transaction.query(&lock, &locked),
        transaction.query(&counts, &counted),
        transaction.query(&cancelled, &counted),
        transaction.query(&urgent, &hurried),
    )?;
    let Some(now) = rows.first().map(|row| row.get(2)) else { return Ok(None) };
    let progress: HashMap<Uuid, &Row> = counts.iter().map(|row| (row.get(0), row)).collect();
    let endings: HashMap<Uuid, Ending> = cancelled.iter().map(|row| (row.get(0), Ending::of(row.get(1)))).collect();
    let urgent: HashSet<i64> = urgent.iter().map(|row| row.get(0)).collect();
    // By line and token: a process that was slow may bring the end of its old lease together with that of its new.
    let rows: HashMap<Lease, &Row> = rows.iter().map(|row| (Lease::of(row), row)).collect();
    let held = leases.iter().filter_map(|(lease, job)| {
        let row = rows.get(lease)?;
        let progress = progress.get(job);
        let held = Held {
            // A job without progress has one entry: that it was accepted.
            audit_n: progress.map_or(1, |row| row.get(1)),
            attempt: row.get(4),
            urgent_seq: row.get(3),
            has_urgent: urgent.contains(&lease.line_id),
            ending: endings.get(job).copied(),
            in_doubt: progress.is_some_and(|row| row.get(2)),
            is_answered: progress.is_some_and(|row| row.get(3)),
            has_changed: progress.is_some_and(|row| row.get(4)),
            source_key_id: progress.and_then(|row| row.get(5)),
        };
        Some((*lease, held))
    });
    Ok(Some((held.collect(), now)))
}
