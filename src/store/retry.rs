//! Retries: new jobs that do again what failed ones had committed themselves to.
//!
//! A job is retried once. Where its retry fails too, that one is retried: what an operator asks for is looked up along
//! this chain, so that asking twice never makes two jobs of one.

use super::accept::{Wanted, insert_audit, lengthen, read_keys};
use super::batch::{JobPage, LOOK};
use super::read::last_retries;
use super::summary::unreadable;
use super::{DsmChoice, Store, StoreError, backlog, urgent};
use crate::audit::{Fact, Kind};
use crate::job::{KeyArn, Request, RequestId};
use crate::source::Fingerprint;
use deadpool_postgres::Transaction;
use serde_json::json;
use std::collections::{BTreeMap, HashMap, HashSet};
use time::OffsetDateTime;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// Jobs that one transaction retries at most.
pub const RETRY_PAGE: usize = 200;

/// Where a job that is to be retried stands: itself or, if it was retried before, the last of its retries.
#[derive(Clone, Debug)]
pub enum Standing {
    /// It has not ended.
    Open {
        /// Which job that is.
        id: Uuid,
        /// A worker has it under way.
        is_running: bool,
    },
    /// It has succeeded.
    Succeeded(Uuid),
    /// It has failed: it can be retried.
    Failed(Box<FailedJob>),
    /// There is no such job.
    Unknown,
    /// It cannot be read, for this reason.
    Unreadable(String),
}

/// A job that failed, with all by which its retry is judged.
#[derive(Clone, Debug)]
pub struct FailedJob {
    /// Its id.
    pub id: Uuid,
    /// Who asked.
    pub principal: String,
    /// As whom; `None`: nobody was asked.
    pub identity: Option<String>,
    /// What was asked.
    pub request: Request,
    /// The KMS key.
    pub key: KeyArn,
    /// What it had committed itself to.
    pub choice: Option<FailedChoice>,
    place: Place,
}

#[derive(Clone, Debug)]
struct Place {
    line_id: i64,
    accepted_at: OffsetDateTime,
    deadline: OffsetDateTime,
    has_retry: bool,
}

/// What a failed job had committed itself to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FailedChoice {
    /// A key of the local store.
    Local {
        /// Its id.
        id: Uuid,
        /// Its name.
        name: String,
        /// Its bytes are erased.
        is_deleted: bool,
    },
    /// A key that a KMIP server holds.
    Dsm(DsmChoice),
    /// Of the materials that a delete meant, those that AWS has not said it deleted; none, and `is_done` false: the one
    /// of a key without material ids.
    Delete {
        /// AWS's ids.
        left: Vec<String>,
        /// There is nothing left to delete.
        is_done: bool,
    },
}

/// A retry that is allowed.
#[derive(Clone, Debug)]
pub struct NewRetry {
    /// The new job's id.
    pub id: Uuid,
    /// The failed job's.
    pub of: Uuid,
    /// The policy's rule that allows it.
    pub rule: Option<String>,
    /// The digest of the policy.
    pub policy: String,
    /// It is abandoned from the start: it takes away what the failed rotate has left, and ends.
    pub abandons: bool,
}

/// What became of a retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retried {
    /// The new job waits in its line.
    Made,
    /// Somebody else has retried the job meanwhile.
    Before,
    /// The source key that it had chosen was erased meanwhile.
    SourceKeyDeleted,
}

impl Store {
    /// Where jobs stand, in the order of `ids`.
    pub async fn standing(&self, ids: &[Uuid]) -> Result<Vec<Standing>, StoreError> {
        self.retrying(|| async {
            let mut client = self.client().await?;
            let transaction = client.transaction().await?;
            let last = last_retries(&transaction, ids).await?;
            let standing = read(&transaction, &last.values().copied().collect::<Vec<_>>()).await?;
            let of = |id| last.get(id).and_then(|last| standing.get(last)).cloned().unwrap_or(Standing::Unknown);
            Ok(ids.iter().map(of).collect())
        })
        .await
    }

    /// A page of a batch's jobs: those that failed, were not retried and were accepted before `before`; with one code only
    /// if one is given.
    pub async fn failed_of_batch(
        &self,
        batch: &str,
        code: Option<&str>,
        after: Uuid,
        before: OffsetDateTime,
    ) -> Result<JobPage, StoreError> {
        const READ: &str = "
            select id, state = 'failed' and accepted_at < $3 and ($4::text is null or code = $4)
                       and not exists (select from job as retry where retry.retry_of = page.id)
            from (select id, state, accepted_at, error ->> 'code' as code from job
                  where batch = $1 and id > $2 order by batch, id limit $5) as page order by id";
        self.retrying(|| async {
            let client = self.client().await?;
            let read = client.prepare_cached(READ).await?;
            Ok(JobPage::of(&client.query(&read, &[&batch, &after, &before, &code, &LOOK]).await?))
        })
        .await
    }

    /// Makes up to [`RETRY_PAGE`] retries in one transaction; what became of each, in their order. Each has the time that
    /// its failed job was given, and imports what that had chosen.
    pub async fn retry(&self, retries: &[NewRetry], operator: &str) -> Result<Vec<Retried>, StoreError> {
        self.retrying(|| self.retry_once(retries, operator)).await
    }

    async fn retry_once(&self, retries: &[NewRetry], operator: &str) -> Result<Vec<Retried>, StoreError> {
        // Whoever else retries one of these jobs waits here.
        const LINES: &str = "
            select from line where id in (select line_id from job where id = any($1)) order by id for no key update";
        // Shared: a key that is being chosen cannot be deleted at the same time.
        const PIN: &str = "select id from source_key where id = any($1) and deleted_at is null order by id for share";
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let failed: Vec<Uuid> = retries.iter().map(|retry| retry.of).collect();
        transaction.execute(LINES, &[&failed]).await?;
        // A statement of its own: it sees what was committed while the locks were waited for.
        let standing = read(&transaction, &failed).await?;
        let sources: Vec<Uuid> = standing.values().filter_map(local_source).collect();
        let alive: HashSet<Uuid> = transaction.query(PIN, &[&sources]).await?.iter().map(|row| row.get(0)).collect();
        let now: OffsetDateTime = transaction.query_one("select keyferry_now()", &[]).await?.get(0);
        let mut outcomes = Vec::with_capacity(retries.len());
        let mut making: Vec<(&NewRetry, &FailedJob)> = Vec::new();
        for retry in retries {
            let outcome = match standing.get(&retry.of) {
                Some(Standing::Failed(job)) if job.place.has_retry => Retried::Before,
                Some(Standing::Failed(job)) => match local_source(&standing[&retry.of]) {
                    Some(source) if !alive.contains(&source) => Retried::SourceKeyDeleted,
                    // Twice in one slice is once.
                    _ if making.iter().any(|(made, _)| made.of == retry.of) => Retried::Before,
                    _ => {
                        making.push((retry, job));
                        Retried::Made
                    }
                },
                // What has failed stays failed.
                _ => return Err(StoreError::Settings(format!("job {} has not failed", retry.of))),
            };
            outcomes.push(outcome);
        }
        make(&transaction, &making, operator, now).await?;
        transaction.commit().await?;
        Ok(outcomes)
    }
}

/// Keeps what failed jobs had committed themselves to, before their progress is forgotten.
pub(super) async fn keep_choices(transaction: &Transaction<'_>, failed: &[Uuid]) -> Result<(), StoreError> {
    const KEEP: &str = "
        insert into failed_choice (job_id, source_key_id, dsm_connection, dsm_key_id, dsm_key_name, dsm_fingerprint,
                                   dsm_fingerprint_version, delete_ids, deleted_ids, is_answered, rotated_from)
        select job_id, source_key_id, dsm_connection, dsm_key_id, dsm_key_name, dsm_fingerprint,
               dsm_fingerprint_version, delete_ids, deleted_ids, imported, rotated_from
        from progress
        where job_id = any($1) and num_nonnulls(source_key_id, dsm_key_id, delete_ids) > 0
        order by job_id";
    if !failed.is_empty() {
        let keep = transaction.prepare_cached(KEEP).await?;
        transaction.execute(&keep, &[&failed]).await?;
    }
    Ok(())
}

// An import that failed before choices were kept names the key that it imported, or was to import.
const READ: &str = "
    select job.id, job.state, line.token is not null and coalesce(line.urgent_seq, line.head_seq) = job.seq,
           job.principal, job.identity, job.request_source, job.request_id, job.request, kms_key.arn, job.line_id,
           job.accepted_at, job.deadline, exists (select from job as retry where retry.retry_of = job.id),
           source.id, source.name, source.deleted_at is not null,
           choice.dsm_connection, choice.dsm_key_id, choice.dsm_key_name, choice.dsm_fingerprint,
           choice.dsm_fingerprint_version, choice.delete_ids, choice.deleted_ids,
           choice.is_answered
    from job
    join line on line.id = job.line_id
    join kms_key on kms_key.id = job.kms_key_id
    left join failed_choice as choice on choice.job_id = job.id
    left join source_key as source
        on source.id = case when choice.job_id is null and job.request::jsonb ->> 'operation' is distinct from 'rotate'
                            then job.source_key_id else choice.source_key_id end
    where job.id = any($1)";

async fn read(transaction: &Transaction<'_>, ids: &[Uuid]) -> Result<HashMap<Uuid, Standing>, StoreError> {
    let read = transaction.prepare_cached(READ).await?;
    let rows = transaction.query(&read, &[&ids]).await?;
    Ok(rows.iter().map(|row| (row.get(0), standing(row))).collect())
}

fn standing(row: &Row) -> Standing {
    let id: Uuid = row.get(0);
    match row.get(1) {
        "waiting" => Standing::Open { id, is_running: row.get::<_, Option<bool>>(2).unwrap_or(false) },
        "succeeded" => Standing::Succeeded(id),
        _ => match failed_job(row) {
            Some(job) => Standing::Failed(Box::new(job)),
            None => Standing::Unreadable(unreadable(id)),
        },
    }
}

fn failed_job(row: &Row) -> Option<FailedJob> {
    let id = RequestId::parse(row.get(6))?;
    Some(FailedJob {
        id: row.get(0),
        principal: row.get(3),
        identity: row.get(4),
        request: Request::from_canonical(row.get(7), id, row.get(5)).ok()?,
        key: KeyArn::parse(row.get(8)).ok()?,
        choice: failed_choice(row),
        place: Place { line_id: row.get(9), accepted_at: row.get(10), deadline: row.get(11), has_retry: row.get(12) },
    })
}

fn failed_choice(row: &Row) -> Option<FailedChoice> {
    if let Some(id) = row.get(13) {
        return Some(FailedChoice::Local { id, name: row.get(14), is_deleted: row.get(15) });
    }
    if let Some(connection) = row.get(16) {
        return Some(FailedChoice::Dsm(DsmChoice {
            connection,
            key_id: row.get(17),
            key_name: row.get(18),
            fingerprint: Fingerprint { hash: row.get(19), version: row.get(20) },
        }));
    }
    let (meant, deleted): (Vec<String>, Vec<String>) = (row.get::<_, Option<_>>(21)?, row.get(22));
    // The one in force stays first.
    let left: Vec<String> = meant.iter().filter(|id| !deleted.contains(id)).cloned().collect();
    let is_done = if meant.is_empty() { row.get(23) } else { left.is_empty() };
    Some(FailedChoice::Delete { is_done, left })
}

fn local_source(standing: &Standing) -> Option<Uuid> {
    match standing {
        Standing::Failed(job) => match &job.choice {
            Some(FailedChoice::Local { id, .. }) => Some(*id),
            _ => None,
        },
        _ => None,
    }
}

impl FailedJob {
    /// What the source key that it had chosen is called and by which identifier, as policies know it.
    pub fn known_source(&self) -> Option<(String, String)> {
        match self.choice.as_ref()? {
            FailedChoice::Local { id, name, .. } => Some((name.clone(), id.to_string())),
            FailedChoice::Dsm(key) => {
                let name = key.key_name.as_ref().unwrap_or(&key.key_id);
                Some((format!("{}/{name}", key.connection), format!("{}/{}", key.connection, key.key_id)))
            }
            // Its worker says what it is about to delete.
            FailedChoice::Delete { .. } => None,
        }
    }

    /// When a retry that is made now joins its line.
    pub fn start(&self, now: OffsetDateTime) -> OffsetDateTime {
        self.request.not_before.map_or(now, |not_before| not_before.max(now))
    }

    /// As long after its start as that of the failed job was.
    fn new_deadline(&self, now: OffsetDateTime) -> OffsetDateTime {
        self.request.deadline_again(now, self.place.accepted_at, self.place.deadline)
    }

    fn accepted(&self, retry: &NewRetry, operator: &str) -> Fact {
        Fact::new(
            Kind::Accepted,
            json!({
                "principal": self.principal,
                "identity": self.identity,
                "rule": retry.rule,
                "policy": retry.policy,
                "ingress": if retry.abandons { "abandon" } else { "retry" },
                "operator": operator,
                "retry_of": self.id,
                "request_source": self.request.source,
                "request_id": self.request.id.as_str(),
                "request_digest": hex::encode(self.request.digest()),
                "operation": self.request.operation().as_str(),
                "key": self.key.to_string(),
            }),
        )
    }

    /// That no other material will ever be sent, where that is known already.
    fn chosen(&self) -> Option<Fact> {
        let (name, id) = self.known_source()?;
        let tier = if matches!(self.choice, Some(FailedChoice::Dsm(_))) { "dsm" } else { "local" };
        let details = json!({"tier": tier, "source_key_id": id, "source_key_name": name, "generated": false,
                             "retry_of": self.id});
        Some(Fact::new(Kind::MaterialChosen, details))
    }
}

async fn make(
    transaction: &Transaction<'_>,
    making: &[(&NewRetry, &FailedJob)],
    operator: &str,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    if making.is_empty() {
        return Ok(());
    }
    let asked: HashSet<Wanted<'_>> = making.iter().map(|(_, job)| (&job.key, job.request.first_call())).collect();
    let known = read_keys(transaction, &asked.into_iter().collect::<Vec<_>>()).await?;
    let lane = |job: &FailedJob| {
        known
            .get(&(&job.key, job.request.first_call()))
            .map(|key| key.lane_id)
            .ok_or_else(|| StoreError::Settings(format!("the KMS key of job {} has no lane in this database", job.id)))
    };
    let lanes: Vec<i64> = making.iter().map(|(_, job)| lane(job)).collect::<Result<_, _>>()?;
    let places = take_places(transaction, making, &lanes, now).await?;
    write_jobs(transaction, making, &lanes, &places, now).await?;
    write_choices(transaction, making).await?;
    abandon(transaction, making, now).await?;
    write_future(transaction, making, now).await?;
    let mut entries = Vec::new();
    for (retry, job) in making {
        let abandoned = retry.abandons.then(|| Fact::new(Kind::AbandonRequested, json!({"operator": operator})));
        let facts = std::iter::once(job.accepted(retry, operator)).chain(job.chosen()).chain(abandoned);
        entries.extend((1..).zip(facts).map(|(n, fact)| (retry.id, n, fact.entry(retry.id, n, now))));
    }
    insert_audit(transaction, entries).await?;
    let made = making.iter().map(|(_, job)| (job.principal.as_str(), &job.key));
    backlog::change(transaction, made, 1).await?;
    let urgent = making.iter().zip(&places).filter(|((_, job), _)| job.request.urgent);
    let urgent: Vec<(i64, i64)> = urgent.filter_map(|((_, job), place)| Some((job.place.line_id, (*place)?))).collect();
    urgent::join(transaction, &urgent, now).await
}

/// Places at the ends of the lines; `None` for a job that joins later.
async fn take_places(
    transaction: &Transaction<'_>,
    making: &[(&NewRetry, &FailedJob)],
    lanes: &[i64],
    now: OffsetDateTime,
) -> Result<Vec<Option<i64>>, StoreError> {
    let mut joining: BTreeMap<i64, (i64, i64)> = BTreeMap::new();
    for ((_, job), lane) in making.iter().zip(lanes).filter(|((_, job), _)| job.start(now) == now) {
        joining.entry(job.place.line_id).or_insert((0, *lane)).0 += 1;
    }
    let mut next = lengthen(transaction, &joining).await?;
    let mut place = |line| {
        let next = next.get_mut(&line)?;
        *next += 1;
        Some(*next - 1)
    };
    Ok(making.iter().map(|(_, job)| if job.start(now) == now { place(job.place.line_id) } else { None }).collect())
}

async fn write_jobs(
    transaction: &Transaction<'_>,
    making: &[(&NewRetry, &FailedJob)],
    lanes: &[i64],
    places: &[Option<i64>],
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    const INSERT: &str = "
        insert into job (id, line_id, seq, lane_id, kms_key_id, principal, request_source, request_id, request,
                         traceparent, accepted_at, deadline, batch, identity, retry_of)
        select new.id, failed.line_id, new.seq, new.lane_id, failed.kms_key_id, failed.principal, failed.request_source,
               failed.request_id, failed.request, failed.traceparent, $6, new.deadline, failed.batch, failed.identity,
               failed.id
        from unnest($1::uuid[], $2::uuid[], $3::bigint[], $4::bigint[], $5::timestamptz[])
             as new(id, failed_id, seq, lane_id, deadline)
        join job as failed on failed.id = new.failed_id";
    let ids: Vec<Uuid> = making.iter().map(|(retry, _)| retry.id).collect();
    let failed: Vec<Uuid> = making.iter().map(|(retry, _)| retry.of).collect();
    let deadlines: Vec<OffsetDateTime> = making.iter().map(|(_, job)| job.new_deadline(now)).collect();
    let insert = transaction.prepare_cached(INSERT).await?;
    transaction.execute(&insert, &[&ids, &failed, &places, &lanes, &deadlines, &now]).await?;
    Ok(())
}

/// Those that are only there to clear away are to be ended before any worker sees them.
async fn abandon(
    transaction: &Transaction<'_>,
    making: &[(&NewRetry, &FailedJob)],
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    const MARK: &str = "insert into cancellation (job_id, requested_at, abandons) select id, $2, true from unnest($1::uuid[]) as new(id)";
    let ids: Vec<Uuid> = making.iter().filter(|(retry, _)| retry.abandons).map(|(retry, _)| retry.id).collect();
    if !ids.is_empty() {
        transaction.execute(MARK, &[&ids, &now]).await?;
    }
    Ok(())
}

/// The choices are durable with the jobs: every attempt imports the same bytes as the failed job.
async fn write_choices(transaction: &Transaction<'_>, making: &[(&NewRetry, &FailedJob)]) -> Result<(), StoreError> {
    const INSERT: &str = "
        insert into progress (job_id, audit_n, source_key_id, dsm_connection, dsm_key_id, dsm_key_name, dsm_fingerprint,
                              dsm_fingerprint_version, delete_ids, rotated_from)
        select new.job_id, audit_n, new.source_key_id, connection, key_id, key_name, fingerprint, version,
               string_to_array(new.delete_ids, ','), failed.rotated_from
        from unnest($1::uuid[], $2::integer[], $3::uuid[], $4::text[], $5::text[], $6::text[], $7::bytea[],
                    $8::integer[], $9::text[], $10::uuid[])
             as new(job_id, audit_n, source_key_id, connection, key_id, key_name, fingerprint, version, delete_ids, failed_id)
        left join failed_choice as failed on failed.job_id = new.failed_id
        order by new.job_id";
    let chosen: Vec<(&NewRetry, &FailedChoice)> =
        making.iter().filter_map(|(retry, job)| Some((*retry, job.choice.as_ref()?))).collect();
    if chosen.is_empty() {
        return Ok(());
    }
    let jobs: Vec<Uuid> = chosen.iter().map(|(retry, _)| retry.id).collect();
    // Accepted; which material is chosen; and that it is abandoned.
    let entries = |(retry, choice): &(&NewRetry, &FailedChoice)| {
        1 + i32::from(!matches!(choice, FailedChoice::Delete { .. })) + i32::from(retry.abandons)
    };
    let counts: Vec<i32> = chosen.iter().map(entries).collect();
    let local = |choice: &FailedChoice| match choice {
        FailedChoice::Local { id, .. } => Some(*id),
        _ => None,
    };
    let sources: Vec<Option<Uuid>> = chosen.iter().map(|(_, choice)| local(choice)).collect();
    let dsm: Vec<Option<&DsmChoice>> = chosen
        .iter()
        .map(|(_, choice)| match choice {
            FailedChoice::Dsm(key) => Some(key),
            _ => None,
        })
        .collect();
    let connections: Vec<Option<&str>> = dsm.iter().map(|key| key.map(|key| key.connection.as_str())).collect();
    let key_ids: Vec<Option<&str>> = dsm.iter().map(|key| key.map(|key| key.key_id.as_str())).collect();
    let names: Vec<Option<&str>> = dsm.iter().map(|key| key.and_then(|key| key.key_name.as_deref())).collect();
    let hashes: Vec<Option<&[u8]>> = dsm.iter().map(|key| key.map(|key| key.fingerprint.hash.as_slice())).collect();
    let versions: Vec<Option<i32>> = dsm.iter().map(|key| key.map(|key| key.fingerprint.version)).collect();
    let deletes: Vec<Option<String>> = chosen
        .iter()
        .map(|(_, choice)| match choice {
            // Ids are hex: a list of them needs no escaping.
            FailedChoice::Delete { left, .. } => Some(left.join(",")),
            _ => None,
        })
        .collect();
    let failed: Vec<Uuid> = chosen.iter().map(|(retry, _)| retry.of).collect();
    let values: [&(dyn ToSql + Sync); 10] =
        [&jobs, &counts, &sources, &connections, &key_ids, &names, &hashes, &versions, &deletes, &failed];
    let insert = transaction.prepare_cached(INSERT).await?;
    transaction.execute(&insert, &values).await?;
    Ok(())
}

async fn write_future(
    transaction: &Transaction<'_>,
    making: &[(&NewRetry, &FailedJob)],
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    const INSERT: &str = "insert into future (job_id, not_before) select * from unnest($1::uuid[], $2::timestamptz[])";
    let later = making.iter().filter(|(_, job)| job.start(now) > now);
    let (ids, times): (Vec<Uuid>, Vec<OffsetDateTime>) = later.map(|(retry, job)| (retry.id, job.start(now))).unzip();
    if !ids.is_empty() {
        transaction.execute(INSERT, &[&ids, &times]).await?;
    }
    Ok(())
}
