//! Intake: jobs and refusals become durable, a slice at a time.

use super::refuse::write_refusals;
use super::{Store, StoreError, together};
use crate::audit::{Fact, Kind};
use crate::job::{Event, KeyArn, Operation, Refusal, RefusalCode, Request, ScarceCall};
use deadpool_postgres::Transaction;
use futures_util::{FutureExt as _, try_join};
use serde_json::json;
use std::collections::{BTreeMap, HashMap, HashSet};
use time::OffsetDateTime;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// The version of the digest's canonical form.
const DIGEST_VERSION: i16 = 1;

/// A message, judged without the store.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly all of a slice are jobs")]
pub enum Candidate {
    /// May become a job.
    Job(NewJob),
    /// Will not.
    Refusal(NewRefusal),
}

/// A job that is to be accepted, unless its id is known.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// The job's id if it is accepted (`UUIDv7`: new rows lie together in the index).
    pub id: Uuid,
    /// Who asks.
    pub principal: String,
    /// What is asked.
    pub request: Request,
    /// The KMS key, by whichever name it was given.
    pub key: KeyArn,
    /// W3C trace context of the message.
    pub traceparent: Option<String>,
    /// The transport, for the row of a refusal.
    pub ingress: &'static str,
    /// As whom it asks, and by which policy that was judged.
    pub sender: Sender,
    /// The policy's rule that allows it; `None`: there is no file, or it is seen when the source key is known.
    pub rule: Option<String>,
}

/// Who is behind a message, and what it was judged by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sender {
    /// As an identity is printed, or what the message claims; `None`: nobody was asked, or nothing was said.
    pub identity: Option<String>,
    /// Whether that is proved. Only then may the message be sent again in its name.
    pub is_verified: bool,
    /// The digest of the policy.
    pub policy: String,
}

/// A message that was refused.
#[derive(Clone, Debug)]
pub struct NewRefusal {
    /// The refusal's id, and its event's.
    pub id: Uuid,
    /// Who asked.
    pub principal: String,
    /// By which the message is known: its id's hash, or a keyed hash of queue and body.
    pub id_hash: [u8; 32],
    /// What the message says.
    pub digest: MessageDigest,
    /// Why.
    pub refusal: Refusal,
    /// The id, if it is usable.
    pub request_id: Option<String>,
    /// The operation, if the message is a valid request.
    pub operation: Option<Operation>,
    /// The key, if the message names one.
    pub key: Option<KeyArn>,
    /// The transport.
    pub ingress: &'static str,
    /// As whom it asked, and by which policy that was judged.
    pub sender: Sender,
    /// The policy's rule whose condition it breaks.
    pub rule: Option<String>,
    /// W3C trace context of the message.
    pub traceparent: Option<String>,
}

/// What a refused message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageDigest {
    /// A well-formed request: if a job has its id and its content, the message is a duplicate of that, whatever
    /// would be said to it now.
    Request([u8; 32]),
    /// Anything else, by a keyed hash of the body.
    Body([u8; 32]),
}

impl MessageDigest {
    pub(super) fn bytes(&self) -> &[u8] {
        let (Self::Request(bytes) | Self::Body(bytes)) = self;
        bytes
    }
}

/// What became of a message. All three are settled, the last with the dead-letter queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A job now waits in its line.
    Accepted,
    /// The job was accepted before.
    Duplicate,
    /// A refusal has its row, now or from before.
    Refused,
}

impl Store {
    /// Decides a slice in one transaction; verdicts are in the slice's order.
    ///
    /// Replaying it after a lost answer gives the same verdicts: ids are the caller's.
    pub async fn accept(&self, candidates: &[Candidate]) -> Result<Vec<Verdict>, StoreError> {
        if candidates.is_empty() {
            return Ok(Vec::new());
        }
        self.retrying(|| self.accept_once(candidates)).await
    }

    /// The ARNs behind the ids that Keyferry gave to KMS keys.
    pub async fn resolve_keys(&self, ids: &[Uuid]) -> Result<HashMap<Uuid, KeyArn>, StoreError> {
        self.retrying(|| async {
            let client = self.client().await?;
            let statement = client.prepare_cached("select id, arn from kms_key where id = any($1)").await?;
            let rows = client.query(&statement, &[&ids]).await?;
            let known = rows.iter().filter_map(|row| Some((row.get(0), KeyArn::parse(row.get(1)).ok()?)));
            Ok(known.collect())
        })
        .await
    }

    async fn accept_once(&self, candidates: &[Candidate]) -> Result<Vec<Verdict>, StoreError> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        // The first delivery of an id stands for it, also within a slice. A map sorted by (principal, id
        // hash): two intakes take the same ids in the same order.
        let mut firsts: Firsts<'_> = BTreeMap::new();
        for candidate in candidates {
            if let Candidate::Job(job) = candidate {
                firsts.entry((job.principal.as_str(), job.request.id_hash())).or_insert(job);
            }
        }
        let refused = candidates.iter().filter_map(|candidate| match candidate {
            Candidate::Refusal(NewRefusal { digest: MessageDigest::Request(_), principal, id_hash, .. }) => {
                Some((principal.as_str(), *id_hash))
            }
            _ => None,
        });
        let standing = claim_ids(&transaction, &firsts, refused.collect()).await?;
        let mut refusals = Vec::new();
        let verdicts = candidates
            .iter()
            .map(|candidate| match candidate {
                Candidate::Refusal(refusal) => {
                    let verdict = standing.judge_refusal(refusal);
                    if verdict == Verdict::Refused {
                        refusals.push(refusal.clone());
                    }
                    verdict
                }
                Candidate::Job(job) => {
                    let verdict = standing.judge(job);
                    if verdict == Verdict::Refused {
                        refusals.push(id_conflict(job));
                    }
                    verdict
                }
            })
            .collect();
        // In the slice's order, which is that of their places. Not those whose ids we owned before: this very
        // slice, or a part of it, was committed already and its answer lost.
        let winners: Vec<&NewJob> = candidates
            .iter()
            .filter_map(|candidate| match candidate {
                Candidate::Job(job) if standing.taken.contains(&job.id) => Some(job),
                _ => None,
            })
            .collect();
        if !winners.is_empty() {
            insert_jobs(&transaction, &winners, standing.now).await?;
        }
        let refused = write_refusals(&transaction, &refusals, standing.now).await?;
        transaction.commit().await?;
        self.written.entries(winners.iter().map(|_| Kind::Accepted));
        self.written.refusals(&refused);
        Ok(verdicts)
    }
}

type IdKey<'a> = (&'a str, [u8; 32]);
type Firsts<'a> = BTreeMap<IdKey<'a>, &'a NewJob>;

/// Which jobs own the ids that were asked for.
struct Standing<'a> {
    now: OffsetDateTime,
    owners: HashMap<IdKey<'a>, (Uuid, Vec<u8>)>,
    /// Jobs whose ids were taken just now.
    taken: HashSet<Uuid>,
}

impl Standing<'_> {
    fn judge(&self, job: &NewJob) -> Verdict {
        match self.owners.get(&(job.principal.as_str(), job.request.id_hash())) {
            Some((owner, _)) if *owner == job.id => Verdict::Accepted,
            Some((_, digest)) if digest[..] == job.request.digest() => Verdict::Duplicate,
            _ => Verdict::Refused,
        }
    }

    fn judge_refusal(&self, refusal: &NewRefusal) -> Verdict {
        let MessageDigest::Request(digest) = &refusal.digest else { return Verdict::Refused };
        match self.owners.get(&(refusal.principal.as_str(), refusal.id_hash)) {
            Some((_, accepted)) if accepted[..] == digest[..] => Verdict::Duplicate,
            _ => Verdict::Refused,
        }
    }
}

/// Takes the ids of `firsts` for their jobs, where they are free, and reads who owns these and the ids of `refused`.
async fn claim_ids<'a>(
    transaction: &Transaction<'_>,
    firsts: &Firsts<'a>,
    refused: Vec<IdKey<'a>>,
) -> Result<Standing<'a>, StoreError> {
    const INSERT: &str = "
        insert into request (principal, id_hash, digest, digest_version, job_id)
        select principal, id_hash, digest, $5, job_id
        from unnest($1::text[], $2::bytea[], $3::bytea[], $4::uuid[]) as new(principal, id_hash, digest, job_id)
        order by principal, id_hash
        on conflict do nothing returning job_id";
    // A new statement: it sees what a rival committed while the insert waited for it.
    const READ: &str = "
        select asked.place, request.job_id, request.digest
        from unnest($1::text[], $2::bytea[]) with ordinality as asked(principal, id_hash, place)
        join request using (principal, id_hash)";
    let principals: Vec<&str> = firsts.keys().map(|(principal, _)| *principal).collect();
    let hashes: Vec<&[u8]> = firsts.keys().map(|(_, hash)| hash.as_slice()).collect();
    let digests: Vec<Vec<u8>> = firsts.values().map(|job| job.request.digest().to_vec()).collect();
    let ids: Vec<Uuid> = firsts.values().map(|job| job.id).collect();
    let insert = transaction.prepare_cached(INSERT).await?;
    let read = transaction.prepare_cached(READ).await?;
    let clock = transaction.prepare_cached("select keyferry_now()").await?;
    let taken = transaction.query(&insert, &[&principals, &hashes, &digests, &ids, &DIGEST_VERSION]).await?;
    let taken = taken.iter().map(|row| row.get(0)).collect();
    let asked: Vec<IdKey<'a>> = firsts.keys().copied().chain(refused).collect();
    let (asked_principals, asked_hashes): (Vec<&str>, Vec<&[u8]>) =
        asked.iter().map(|(principal, hash)| (*principal, hash.as_slice())).unzip();
    let columns: [&(dyn ToSql + Sync); 2] = [&asked_principals, &asked_hashes];
    let (rows, now) = try_join!(transaction.query(&read, &columns), transaction.query_one(&clock, &[]))?;
    let owners = rows
        .iter()
        .filter_map(|row| {
            let place = usize::try_from(row.get::<_, i64>(0)).ok()?;
            Some((*asked.get(place.checked_sub(1)?)?, (row.get(1), row.get(2))))
        })
        .collect();
    Ok(Standing { now: now.get(0), owners, taken })
}

async fn insert_jobs(transaction: &Transaction<'_>, jobs: &[&NewJob], now: OffsetDateTime) -> Result<(), StoreError> {
    let keys = register_keys(transaction, jobs, now).await?;
    let places = take_places(transaction, jobs, &keys, now).await?;
    let entries = jobs.iter().map(|job| (job.id, 1, accepted(job).entry(job.id, 1, now))).collect();
    together(vec![
        write_jobs(transaction, jobs, &keys, &places, now).boxed(),
        write_future(transaction, jobs, now).boxed(),
        insert_audit(transaction, entries).boxed(),
        super::backlog::change(transaction, jobs.iter().map(|job| (job.principal.as_str(), &job.key)), 1).boxed(),
    ])
    .await?;
    let urgent = jobs.iter().zip(&places).filter(|(job, _)| job.request.urgent);
    let urgent: Vec<(i64, i64)> =
        urgent.filter_map(|(job, place)| Some((keys[&wanted(job)].line_id, (*place)?))).collect();
    super::urgent::join(transaction, &urgent, now).await
}

async fn write_jobs(
    transaction: &Transaction<'_>,
    jobs: &[&NewJob],
    keys: &HashMap<Wanted<'_>, KnownKey>,
    places: &[Option<i64>],
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    const INSERT: &str = "
        insert into job (id, line_id, seq, lane_id, kms_key_id, principal, request_source, request_id, request,
                         traceparent, accepted_at, deadline, batch, identity)
        select id, line_id, seq, lane_id, key_id, principal, source, request_id, request, trace, $12, deadline, batch, identity
        from unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::bigint[], $5::uuid[], $6::text[], $7::text[],
                    $8::text[], $9::text[], $10::text[], $11::timestamptz[], $13::text[], $14::text[])
             as new(id, line_id, seq, lane_id, key_id, principal, source, request_id, request, trace, deadline, batch,
                    identity)";
    let ids: Vec<Uuid> = jobs.iter().map(|job| job.id).collect();
    let known: Vec<KnownKey> = jobs.iter().map(|job| keys[&wanted(job)]).collect();
    let lines: Vec<i64> = known.iter().map(|key| key.line_id).collect();
    let lanes: Vec<i64> = known.iter().map(|key| key.lane_id).collect();
    let key_ids: Vec<Uuid> = known.iter().map(|key| key.id).collect();
    let principals: Vec<&str> = jobs.iter().map(|job| job.principal.as_str()).collect();
    let sources: Vec<&str> = jobs.iter().map(|job| job.request.source.as_str()).collect();
    let request_ids: Vec<&str> = jobs.iter().map(|job| job.request.id.as_str()).collect();
    let requests: Vec<&str> = jobs.iter().map(|job| job.request.canonical()).collect();
    let traces: Vec<Option<&str>> = jobs.iter().map(|job| job.traceparent.as_deref()).collect();
    let deadlines: Vec<OffsetDateTime> = jobs.iter().map(|job| job.request.deadline_from(now)).collect();
    let identities: Vec<Option<&str>> = jobs.iter().map(|job| job.sender.identity.as_deref()).collect();
    let insert = transaction.prepare_cached(INSERT).await?;
    let batches: Vec<Option<&str>> = jobs.iter().map(|job| job.request.batch.as_deref()).collect();
    let columns: [&(dyn ToSql + Sync); 14] = [
        &ids,
        &lines,
        &places,
        &lanes,
        &key_ids,
        &principals,
        &sources,
        &request_ids,
        &requests,
        &traces,
        &deadlines,
        &now,
        &batches,
        &identities,
    ];
    transaction.execute(&insert, &columns).await?;
    Ok(())
}

async fn write_future(transaction: &Transaction<'_>, jobs: &[&NewJob], now: OffsetDateTime) -> Result<(), StoreError> {
    const INSERT: &str = "insert into future (job_id, not_before) select * from unnest($1::uuid[], $2::timestamptz[])";
    let later = jobs.iter().filter_map(|job| Some((job.id, waits_until(job, now)?)));
    let (ids, times): (Vec<Uuid>, Vec<OffsetDateTime>) = later.unzip();
    if !ids.is_empty() {
        let insert = transaction.prepare_cached(INSERT).await?;
        transaction.execute(&insert, &[&ids, &times]).await?;
    }
    Ok(())
}

fn accepted(job: &NewJob) -> Fact {
    Fact::new(
        Kind::Accepted,
        json!({
            "principal": job.principal,
            "identity": job.sender.identity,
            "rule": job.rule,
            "policy": job.sender.policy,
            "ingress": job.ingress,
            "request_source": job.request.source,
            "request_id": job.request.id.as_str(),
            "request_digest": hex::encode(job.request.digest()),
            "operation": job.request.operation().as_str(),
            "key": job.key.to_string(),
        }),
    )
}

#[derive(Clone, Copy)]
pub(super) struct KnownKey {
    pub(super) id: Uuid,
    pub(super) line_id: i64,
    pub(super) lane_id: i64,
}

/// The first accepted job on an ARN registers it. Everything is inserted in sorted order and read again
/// in a new statement, which sees what a rival registered first.
async fn register_keys<'a>(
    transaction: &Transaction<'_>,
    jobs: &[&'a NewJob],
    now: OffsetDateTime,
) -> Result<HashMap<Wanted<'a>, KnownKey>, StoreError> {
    const LANES: &str = "
        insert into lane (account, region, operation)
        select new.account, new.region, wanted.operation
        from (select distinct account, region from unnest($1::text[], $2::text[]) as new(account, region)) as new,
             unnest($3::text[]) as wanted(operation)
        -- A conflict would wait for the claim that is just now serving the lane.
        where not exists (select from lane where lane.account = new.account and lane.region = new.region
                                             and lane.operation = wanted.operation)
        order by new.account, new.region, wanted.operation on conflict do nothing";
    // Apart from the lines: within one statement the names would only be found by comparing all with all.
    const NAMES: &str = "
        insert into order_key (name) select distinct name from unnest($1::text[]) as new(name) order by name
        on conflict do nothing returning name, line_id";
    const LINES: &str = "
        insert into line (id, lane_id)
        select new.id, lane.id
        from unnest($1::bigint[], $2::text[], $3::text[]) as new(id, account, region)
        join lane using (account, region)
        where lane.operation = $4
        order by new.id";
    const KEYS: &str = "
        insert into kms_key (id, arn, line_id, created_at)
        select new.id, new.arn, order_key.line_id, $4
        from unnest($1::uuid[], $2::text[], $3::text[]) as new(id, arn, name)
        join order_key using (name)
        order by new.arn on conflict do nothing";
    let mut arns: Vec<&KeyArn> = jobs.iter().map(|job| &job.key).collect();
    arns.sort_unstable();
    arns.dedup();
    let asked: Vec<Wanted<'a>> = jobs.iter().map(|job| wanted(job)).collect::<HashSet<_>>().into_iter().collect();
    let mut known = read_keys(transaction, &asked).await?;
    if known.len() < asked.len() {
        let names: Vec<String> = arns.iter().map(ToString::to_string).collect();
        let accounts: Vec<&str> = arns.iter().map(|arn| arn.account()).collect();
        let regions: Vec<&str> = arns.iter().map(|arn| arn.region()).collect();
        let order_keys: Vec<String> = arns.iter().map(|arn| arn.order_key()).collect();
        let ids: Vec<Uuid> = arns.iter().map(|_| Uuid::new_v4()).collect();
        let lanes = transaction.prepare_cached(LANES).await?;
        let operations = ScarceCall::ALL.map(ScarceCall::as_str);
        transaction.execute(&lanes, &[&accounts, &regions, &operations.as_slice()]).await?;
        let names_of_lines = transaction.prepare_cached(NAMES).await?;
        let named = transaction.query(&names_of_lines, &[&order_keys]).await?;
        let place: HashMap<&str, usize> = order_keys.iter().map(String::as_str).zip(0..).collect();
        let new: Vec<(i64, usize)> =
            named.iter().filter_map(|row| Some((row.get(1), *place.get(row.get::<_, &str>(0))?))).collect();
        let line_ids: Vec<i64> = new.iter().map(|(id, _)| *id).collect();
        let line_accounts: Vec<&str> = new.iter().map(|(_, at)| accounts[*at]).collect();
        let line_regions: Vec<&str> = new.iter().map(|(_, at)| regions[*at]).collect();
        let lines = transaction.prepare_cached(LINES).await?;
        // An empty line takes the lane of the job that opens it.
        let any = ScarceCall::Nothing.as_str();
        transaction.execute(&lines, &[&line_ids, &line_accounts, &line_regions, &any]).await?;
        let keys = transaction.prepare_cached(KEYS).await?;
        transaction.execute(&keys, &[&ids, &names, &order_keys, &now]).await?;
        known = read_keys(transaction, &asked).await?;
    }
    if known.len() == asked.len() {
        Ok(known)
    } else {
        Err(StoreError::Conflict("a KMS key is being registered by another worker".into()))
    }
}

/// A key and the scarce call that a job on it needs first.
pub(super) type Wanted<'a> = (&'a KeyArn, ScarceCall);

fn wanted(job: &NewJob) -> Wanted<'_> {
    (&job.key, job.request.first_call())
}

pub(super) async fn read_keys<'a>(
    transaction: &Transaction<'_>,
    asked: &[Wanted<'a>],
) -> Result<HashMap<Wanted<'a>, KnownKey>, StoreError> {
    const READ: &str = "
        select asked.place, kms_key.id, kms_key.line_id, lane.id
        from unnest($1::text[], $2::text[], $3::text[], $4::text[]) with ordinality
             as asked(arn, account, region, operation, place)
        join kms_key using (arn)
        join lane using (account, region, operation)";
    let names: Vec<String> = asked.iter().map(|(arn, _)| arn.to_string()).collect();
    let accounts: Vec<&str> = asked.iter().map(|(arn, _)| arn.account()).collect();
    let regions: Vec<&str> = asked.iter().map(|(arn, _)| arn.region()).collect();
    let operations: Vec<&str> = asked.iter().map(|(_, call)| call.as_str()).collect();
    let read = transaction.prepare_cached(READ).await?;
    let rows = transaction.query(&read, &[&names, &accounts, &regions, &operations]).await?;
    let known = rows.iter().filter_map(|row| {
        // Postgres counts from one.
        let at = usize::try_from(row.get::<_, i64>(0)).ok()?.checked_sub(1)?;
        Some((*asked.get(at)?, KnownKey { id: row.get(1), line_id: row.get(2), lane_id: row.get(3) }))
    });
    Ok(known.collect())
}

/// Places in the lines, in the slice's order; `None` for a job that joins later.
async fn take_places(
    transaction: &Transaction<'_>,
    jobs: &[&NewJob],
    keys: &HashMap<Wanted<'_>, KnownKey>,
    now: OffsetDateTime,
) -> Result<Vec<Option<i64>>, StoreError> {
    let mut joining: BTreeMap<i64, (i64, i64)> = BTreeMap::new();
    for job in jobs.iter().filter(|job| waits_until(job, now).is_none()) {
        let key = &keys[&wanted(job)];
        joining.entry(key.line_id).or_insert((0, key.lane_id)).0 += 1;
    }
    let mut next = lengthen(transaction, &joining).await?;
    let mut place = |job: &NewJob| {
        let next = next.get_mut(&keys[&wanted(job)].line_id)?;
        *next += 1;
        Some(*next - 1)
    };
    Ok(jobs.iter().map(|job| if waits_until(job, now).is_some() { None } else { place(job) }).collect())
}

/// Lengthens lines by so many places, each for jobs of a lane; the first new place of each.
pub(super) async fn lengthen(
    transaction: &Transaction<'_>,
    joining: &BTreeMap<i64, (i64, i64)>,
) -> Result<HashMap<i64, i64>, StoreError> {
    const LOCK: &str = "select id from line where id = any($1) order by id for no key update";
    const EXTEND: &str = "
        update line set tail_seq = tail_seq + joining.count,
                        -- An empty line takes the lane of the job that opens it.
                        lane_id = case when due_at is null then joining.lane_id else line.lane_id end,
                        due_at = coalesce(due_at, keyferry_now())
        from unnest($1::bigint[], $2::bigint[], $3::bigint[]) as joining(id, count, lane_id)
        where line.id = joining.id
        returning line.id, line.tail_seq";
    let lines: Vec<i64> = joining.keys().copied().collect();
    let counts: Vec<i64> = joining.values().map(|(count, _)| *count).collect();
    let lanes: Vec<i64> = joining.values().map(|(_, lane)| *lane).collect();
    let lock = transaction.prepare_cached(LOCK).await?;
    let extend = transaction.prepare_cached(EXTEND).await?;
    let (locked, extended): ([&(dyn ToSql + Sync); 1], [&(dyn ToSql + Sync); 3]) =
        ([&lines], [&lines, &counts, &lanes]);
    let (_, rows) = try_join!(transaction.execute(&lock, &locked), transaction.query(&extend, &extended))?;
    let first = |row: &tokio_postgres::Row| {
        let (line, tail): (i64, i64) = (row.get(0), row.get(1));
        (line, tail - joining[&line].0 + 1)
    };
    Ok(rows.iter().map(first).collect())
}

fn waits_until(job: &NewJob, now: OffsetDateTime) -> Option<OffsetDateTime> {
    job.request.not_before.filter(|not_before| *not_before > now)
}

fn id_conflict(job: &NewJob) -> NewRefusal {
    NewRefusal {
        id: Uuid::now_v7(),
        principal: job.principal.clone(),
        id_hash: job.request.id_hash(),
        digest: MessageDigest::Request(job.request.digest()),
        refusal: Refusal::of(
            "id",
            RefusalCode::IdConflict,
            "id: a job with this id and other content was accepted before, and stands; use a new id",
        ),
        request_id: Some(job.request.id.as_str().to_owned()),
        operation: Some(job.request.operation()),
        key: Some(job.key.clone()),
        ingress: job.ingress,
        sender: job.sender.clone(),
        rule: None,
        traceparent: job.traceparent.clone(),
    }
}

/// Appends audit entries: subject, number, canonical bytes.
pub(super) async fn insert_audit(
    transaction: &Transaction<'_>,
    entries: Vec<(Uuid, i32, String)>,
) -> Result<(), StoreError> {
    const INSERT: &str = "
        insert into audit_entry (subject, n, entry) select * from unnest($1::uuid[], $2::integer[], $3::text[])";
    let (mut subjects, mut numbers, mut texts) = (Vec::new(), Vec::new(), Vec::new());
    for (subject, n, text) in entries {
        subjects.push(subject);
        numbers.push(n);
        texts.push(text);
    }
    if subjects.is_empty() {
        return Ok(());
    }
    let insert = transaction.prepare_cached(INSERT).await?;
    transaction.execute(&insert, &[&subjects, &numbers, &texts]).await?;
    Ok(())
}

/// Puts events into the outbox.
pub(super) async fn insert_events(transaction: &Transaction<'_>, events: &[Event]) -> Result<(), StoreError> {
    const INSERT: &str = "
        insert into outbox (event_id, routing_key, body, due_at)
        select *, keyferry_now() from unnest($1::uuid[], $2::text[], $3::text[])";
    if events.is_empty() {
        return Ok(());
    }
    let ids: Vec<Uuid> = events.iter().map(|event| event.id).collect();
    let routing_keys: Vec<&str> = events.iter().map(|event| event.routing_key.as_str()).collect();
    let bodies: Vec<&str> = events.iter().map(|event| event.body.as_str()).collect();
    let insert = transaction.prepare_cached(INSERT).await?;
    transaction.execute(&insert, &[&ids, &routing_keys, &bodies]).await?;
    Ok(())
}
