//! Jobs that an operator wants ended. Those that wait end at once; those that a worker has under way, or of which something
//! is in doubt, are marked, and the attempt that finds nothing in doubt ends them. An abandoned job does not wait for that.

use super::accept::{insert_audit, insert_events};
use super::advance::{Leases, advance};
use super::settle::{END_JOBS, MaterialRows};
use super::summary::{COLUMNS, summary, summary_columns};
use super::{Store, StoreError, abandon, backlog, urgent};
use crate::audit::{Fact, Kind};
use crate::job::{Event, Failure, JobSummary, Operation, failure_json};
use deadpool_postgres::Transaction;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use time::OffsetDateTime;
use tokio_postgres::Row;
use uuid::Uuid;

/// Jobs that one transaction cancels at most.
pub const CANCEL_PAGE: usize = 200;

/// How an operator wants a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Once nothing is in doubt.
    Cancelled,
    /// Even if it was never learnt what AWS did.
    Abandoned,
}

impl Ending {
    /// From the column `abandons`.
    pub(super) fn of(abandons: bool) -> Self {
        if abandons { Self::Abandoned } else { Self::Cancelled }
    }

    /// The job's end.
    pub fn failure(self, aws_changed: bool) -> Failure {
        match self {
            Self::Cancelled => Failure::cancelled(aws_changed),
            Self::Abandoned => Failure::abandoned(aws_changed),
        }
    }

    fn request_kind(self) -> Kind {
        match self {
            Self::Cancelled => Kind::CancelRequested,
            Self::Abandoned => Kind::AbandonRequested,
        }
    }
}

/// What became of a job that was to be ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// It has ended as `failed`, `cancelled` or `abandoned`.
    Ended,
    /// It ends between two of its steps; a cancelled one once nothing that it sent to AWS is in doubt. What AWS has done by
    /// then stands, and may be that it succeeds.
    Requested,
    /// It had ended before.
    EndedBefore {
        /// `succeeded` or `failed`.
        state: String,
        /// Why it failed.
        code: Option<String>,
    },
    /// There is no such job.
    Unknown,
    /// It stays as it is, for this reason.
    Unreadable(String),
}

impl Store {
    /// Cancels up to [`CANCEL_PAGE`] jobs in one transaction; what became of each, in the order of `ids`. Doing it
    /// again changes nothing.
    pub async fn cancel(&self, ids: &[Uuid], operator: &str) -> Result<Vec<Cancelled>, StoreError> {
        self.retrying(|| self.end_once(ids, Ending::Cancelled, operator)).await
    }

    /// Ends jobs whatever is in doubt, in the same way. What they may have put on a key stays on record, and the key's line
    /// stays closed to jobs that would contradict an unanswered call for as long as that may take effect.
    pub async fn abandon(&self, ids: &[Uuid], operator: &str) -> Result<Vec<Cancelled>, StoreError> {
        self.retrying(|| self.end_once(ids, Ending::Abandoned, operator)).await
    }

    async fn end_once(&self, ids: &[Uuid], ending: Ending, operator: &str) -> Result<Vec<Cancelled>, StoreError> {
        // Before the lines, as housekeeping does it, which skips what is locked.
        const FUTURE: &str = "select from future where job_id = any($1) order by job_id for update";
        const LINES: &str = "
            select from line where id in (select line_id from job where id = any($1) and state = 'waiting')
            order by id for no key update";
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        transaction.execute(FUTURE, &[&ids]).await?;
        transaction.execute(LINES, &[&ids]).await?;
        // A statement of its own: it sees what was committed while the locks were waited for.
        let rows = transaction.query(FOUND, &[&ids]).await?;
        let now: OffsetDateTime = transaction.query_one("select keyferry_now()", &[]).await?.get(0);
        // One that cannot be read keeps none of the others.
        let (mut found, mut became) = (Vec::new(), HashMap::new());
        for row in &rows {
            match Found::of(row) {
                Ok(job) => found.push(job),
                Err(why) => drop(became.insert(row.get(0), Cancelled::Unreadable(why))),
            }
        }
        let (ended, requested): (Vec<&Found>, Vec<&Found>) =
            found.iter().filter(|job| job.state == "waiting").partition(|job| job.may_end(ending));
        let is_new = |job: &&Found| job.requested.is_none_or(|before| before != ending && ending == Ending::Abandoned);
        let requested: Vec<&Found> = requested.into_iter().filter(is_new).collect();
        end(&transaction, &ended, ending, operator, now).await?;
        request(&transaction, &requested, ending, operator, now).await?;
        transaction.commit().await?;
        became.extend(found.iter().map(|job| (job.summary.id, job.became(ending))));
        Ok(ids.iter().map(|id| became.get(id).cloned().unwrap_or(Cancelled::Unknown)).collect())
    }
}

const FOUND: &str = concat!(
    "
    select ",
    summary_columns!(),
    ", job.state, job.error ->> 'code', job.line_id,
           line.token is not null and coalesce(line.urgent_seq, line.head_seq) = job.seq,
           coalesce(progress.in_doubt or progress.imported, false), coalesce(progress.deleted_ids <> '{}' or progress.key_material_id is not null, false),
           coalesce(progress.audit_n, 1), cancellation.abandons,
           coalesce(urgent.attempt, case when line.head_seq = job.seq then line.attempt else 0 end),
           line.head_seq = job.seq,
           job.seq = (select min(seq) from urgent where urgent.line_id = line.id and urgent.parked_by is null),
           exists (select from urgent where urgent.line_id = line.id and urgent.parked_by is null), progress.source_key_id
    from job
    join line on line.id = job.line_id
    join kms_key on kms_key.id = job.kms_key_id
    left join progress on progress.job_id = job.id
    left join cancellation on cancellation.job_id = job.id
    left join urgent on urgent.line_id = job.line_id and urgent.seq = job.seq
    where job.id = any($1)"
);

/// A job that is to be ended, under the lock of its line.
#[expect(clippy::struct_excessive_bools, reason = "each is a column of its own")]
struct Found {
    summary: JobSummary,
    state: String,
    code: Option<String>,
    line_id: i64,
    seq: Option<i64>,
    /// A worker has it under way, or had when it died.
    is_leased: bool,
    /// What it did to AWS is to be learnt, or seen, first.
    is_unsettled: bool,
    /// Some of the materials are deleted, or a new one waits for its rotation.
    has_changed: bool,
    audit_n: i32,
    /// How it was to be ended before.
    requested: Option<Ending>,
    attempts: i32,
    is_head: bool,
    /// It is the urgent job that is next. One that is parked is not.
    is_first_urgent: bool,
    line_has_urgent: bool,
    source_key_id: Option<Uuid>,
}

impl Found {
    fn of(row: &Row) -> Result<Self, String> {
        let at = |column: usize| COLUMNS + column;
        Ok(Self {
            summary: summary(row)?,
            state: row.get(at(0)),
            code: row.get(at(1)),
            line_id: row.get(at(2)),
            seq: row.get(6),
            is_leased: row.get::<_, Option<bool>>(at(3)).unwrap_or(false),
            is_unsettled: row.get(at(4)),
            has_changed: row.get(at(5)),
            audit_n: row.get(at(6)),
            requested: row.get::<_, Option<bool>>(at(7)).map(Ending::of),
            attempts: row.get(at(8)),
            is_head: row.get::<_, Option<bool>>(at(9)).unwrap_or(false),
            is_first_urgent: row.get::<_, Option<bool>>(at(10)).unwrap_or(false),
            line_has_urgent: row.get(at(11)),
            source_key_id: row.get(at(12)),
        })
    }

    fn may_end(&self, ending: Ending) -> bool {
        // What a rotate has brought is for its worker to take away, or to put on record.
        let is_workers = self.summary.operation == Operation::Rotate.as_str() && self.has_changed;
        !self.is_leased && !is_workers && (!self.is_unsettled || ending == Ending::Abandoned)
    }

    fn became(&self, ending: Ending) -> Cancelled {
        match self.state.as_str() {
            "waiting" if self.may_end(ending) => Cancelled::Ended,
            "waiting" => Cancelled::Requested,
            state => Cancelled::EndedBefore { state: state.to_owned(), code: self.code.clone() },
        }
    }

    fn request_entry(&self, ending: Ending, operator: &str, now: OffsetDateTime) -> (Uuid, i32, String) {
        let (id, n) = (self.summary.id, self.audit_n + 1);
        (id, n, Fact::new(ending.request_kind(), json!({"operator": operator})).entry(id, n, now))
    }
}

/// Ends jobs that wait, with all that belongs to an end.
async fn end(
    transaction: &Transaction<'_>,
    jobs: &[&Found],
    ending: Ending,
    operator: &str,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    if jobs.is_empty() {
        return Ok(());
    }
    let ids: Vec<Uuid> = jobs.iter().map(|job| job.summary.id).collect();
    let mut failures: Vec<Failure> =
        jobs.iter().map(|job| ending.failure(job.has_changed || job.is_unsettled)).collect();
    let unsettled: Vec<Uuid> = jobs.iter().filter(|job| job.is_unsettled).map(|job| job.summary.id).collect();
    let mut materials = MaterialRows::default();
    let found = abandon::materials(transaction, &unsettled).await?;
    for (id, failed) in ids.iter().zip(&mut failures) {
        if let Some((key_id, material)) = found.get(id) {
            materials.push(*key_id, *id, material);
            *failed = abandon::failure(material).unwrap_or_else(|| failed.clone());
        }
    }
    materials.write(transaction, now).await?;
    let errors: Vec<Value> = failures.iter().map(failure_json).collect();
    let states = vec!["failed"; jobs.len()];
    let times = vec![now; jobs.len()];
    let results: Vec<Option<Value>> = vec![None; jobs.len()];
    let sources: Vec<Option<Uuid>> = jobs.iter().map(|job| job.source_key_id).collect();
    let attempts: Vec<i32> = jobs.iter().map(|job| job.attempts).collect();
    let write = transaction.prepare_cached(END_JOBS).await?;
    transaction.execute(&write, &[&ids, &states, &times, &results, &errors, &sources, &attempts]).await?;
    super::retry::keep_choices(transaction, &ids).await?;
    for table in ["progress", "cancellation", "future"] {
        transaction.execute(&format!("delete from {table} where job_id = any($1)"), &[&ids]).await?;
    }

    let mut entries = Vec::new();
    let mut events = Vec::new();
    for ((job, failed), error) in jobs.iter().zip(failures).zip(errors) {
        let (id, n) = (job.summary.id, job.audit_n + 2);
        entries.push(job.request_entry(ending, operator, now));
        entries.push((id, n, Fact::new(Kind::Failed, error).entry(id, n, now)));
        events.push(Event::of_job(&job.summary, &Err(failed), now));
    }
    insert_audit(transaction, entries).await?;
    insert_events(transaction, &events).await?;
    let ended = jobs.iter().map(|job| (job.summary.principal.as_str(), &job.summary.key));
    backlog::change(transaction, ended, -1).await?;
    leave_lines(transaction, jobs, now).await
}

/// The lines go on without their jobs. Those in the middle are passed over when their turn would come.
async fn leave_lines(transaction: &Transaction<'_>, jobs: &[&Found], now: OffsetDateTime) -> Result<(), StoreError> {
    let places: Vec<(i64, i64)> = jobs.iter().filter_map(|job| Some((job.line_id, job.seq?))).collect();
    urgent::end(transaction, &places).await?;
    // Of each line whose next job is among them: whether the urgent one that is next stays.
    let mut lines: BTreeMap<i64, bool> = BTreeMap::new();
    for job in jobs.iter().filter(|job| job.is_head || job.is_first_urgent) {
        *lines.entry(job.line_id).or_insert(job.line_has_urgent) &= !job.is_first_urgent;
    }
    let moved: Vec<(i64, bool)> = lines.into_iter().collect();
    advance(transaction, &moved, Leases::Stay).await?;
    let hurried: Vec<i64> = moved.iter().filter(|(_, stays)| !stays).map(|(line, _)| *line).collect();
    urgent::hurry(transaction, &hurried, now).await
}

/// Marks jobs, so that the next look at one between two steps ends it.
async fn request(
    transaction: &Transaction<'_>,
    jobs: &[&Found],
    ending: Ending,
    operator: &str,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    const MARK: &str =
        "insert into cancellation (job_id, requested_at, abandons) select id, $2, $3 from unnest($1::uuid[]) as new(id)
         on conflict (job_id) do update set abandons = excluded.abandons";
    const COUNT: &str = "
        insert into progress (job_id, audit_n) select * from unnest($1::uuid[], $2::integer[])
        on conflict (job_id) do update set audit_n = excluded.audit_n";
    // One that nobody has under way is looked at now, not when its delay is over.
    const HURRY: &str = "
        update line set due_at = $2 where id = any($1) and token is null and due_at > $2 and parked_by is null";
    if jobs.is_empty() {
        return Ok(());
    }
    let hurried: Vec<i64> = jobs.iter().filter(|job| job.is_head && !job.is_leased).map(|job| job.line_id).collect();
    transaction.execute(HURRY, &[&hurried, &now]).await?;
    let ids: Vec<Uuid> = jobs.iter().map(|job| job.summary.id).collect();
    let counts: Vec<i32> = jobs.iter().map(|job| job.audit_n + 1).collect();
    transaction.execute(MARK, &[&ids, &now, &(ending == Ending::Abandoned)]).await?;
    transaction.execute(COUNT, &[&ids, &counts]).await?;
    insert_audit(transaction, jobs.iter().map(|job| job.request_entry(ending, operator, now)).collect()).await
}

/// Jobs that have ended are not to be ended any more.
pub(super) async fn forget(transaction: &Transaction<'_>, jobs: &[Uuid]) -> Result<(), StoreError> {
    if !jobs.is_empty() {
        let forget = transaction.prepare_cached("delete from cancellation where job_id = any($1)").await?;
        transaction.execute(&forget, &[&jobs]).await?;
    }
    Ok(())
}
