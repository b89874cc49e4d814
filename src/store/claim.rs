//! Claims: lines with work, each under a lease, with all that the head's job needs.

mod lines;

pub use lines::CLAIM;

use super::advance::{Leases, advance};
use super::hold::{Holds, Parked, park};
use super::quota::{QuotaLane, QuotaSlot, hand_out};
use super::urgent::OVERTAKE;
use super::{DsmChoice, Ending, Replicas, Store, StoreError};
use crate::job::{
    ImportParameters, KeyArn, KeyKind, Operation, Request, RequestId, Scarce, Wrapping, WrappingAlgorithm,
    WrappingKeySpec,
};
use crate::quota::AHEAD_MS;
use crate::source::{Fingerprint, SealedKey};
use deadpool_postgres::Transaction;
use futures_util::{TryFutureExt as _, try_join};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};
use time::OffsetDateTime;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// The right to act for a line until it expires. Every later write names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    /// The line.
    pub line_id: i64,
    /// Random, new with every claim.
    pub token: Uuid,
}

impl Lease {
    /// From a row that begins with line and token.
    pub(super) fn of(row: &Row) -> Self {
        Self { line_id: row.get(0), token: row.get(1) }
    }
}

/// Jobs that join their lines in one transaction at most.
pub const JOIN_PAGE: usize = 200;

/// How much of the index of due lines a claim reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scan {
    /// Above the lanes' lower bounds, which keep it away from dead entries.
    FromBounds,
    /// All of it.
    Whole,
}

/// The job of a claimed line: that at its head, or an urgent one that overtakes it.
#[derive(Debug)]
pub struct ClaimedJob {
    /// The lease.
    pub lease: Lease,
    /// The store's time of the claim.
    pub now: OffsetDateTime,
    /// Claims of this job, this one included.
    pub attempt: u32,
    /// The job's id.
    pub id: Uuid,
    /// Place in the line.
    pub sequence: i64,
    /// The failed job that it does again.
    pub retry_of: Option<Uuid>,
    /// Who asked.
    pub principal: String,
    /// As whom; `None`: nobody was asked.
    pub identity: Option<String>,
    /// What was asked.
    pub request: Request,
    /// W3C trace context of the request.
    pub traceparent: Option<String>,
    /// When the message was accepted.
    pub accepted_at: OffsetDateTime,
    /// When the job gives up.
    pub deadline: OffsetDateTime,
    /// The KMS key.
    pub key: KeyArn,
    /// Keyferry's name of the KMS key.
    pub key_id: Uuid,
    /// When the KMS key was registered.
    pub key_created_at: OffsetDateTime,
    /// An operator wants it ended.
    pub ending: Option<Ending>,
    /// How far earlier attempts came.
    pub progress: Progress,
    /// The source key that was chosen, or that the request names; `None`: unknown, or none named.
    pub source_key: Option<SealedKey>,
    /// The materials that jobs have put on the key, or on another Region's key of the same line; the oldest first.
    pub materials: Vec<KnownMaterial>,
    /// A call of an earlier job that may still take effect: what it does, until when.
    pub late: Option<(String, OffsetDateTime)>,
    /// When the scarce call that its lane stands for may be made; `None`: the lane is not governed, or it was taken over.
    pub slot: Option<QuotaSlot>,
}

/// How far a job has come.
#[derive(Clone, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a column of its own")]
pub struct Progress {
    /// Whether the choice of the source key is committed.
    pub is_chosen: bool,
    /// The choice, if it is a key on a KMIP server.
    pub dsm: Option<DsmChoice>,
    /// What its mutating call does.
    pub effect: Option<String>,
    /// A mutating call may have taken effect.
    pub in_doubt: bool,
    /// AWS answered every mutating call; what is left is to see it.
    pub answered: bool,
    /// The id that AWS gave the material; of a rotate also while that waits for its rotation.
    pub key_material_id: Option<String>,
    /// `RotateKeyOnDemand` was to be called: if the job is in doubt, it may still take effect.
    pub rotation_sent: bool,
    /// How far a rotate has come in the other Regions.
    pub replicas: Replicas,
    /// Which materials a delete means, once that is committed.
    pub delete_ids: Option<Vec<String>>,
    /// Those of them that AWS said it deleted.
    pub deleted_ids: Vec<String>,
    /// Sets of import parameters thrown away.
    pub refreshes: u32,
    /// Kept for retries.
    pub parameters: Option<ImportParameters>,
    /// The material that was in force when a rotate, or the failed one that it does again, first committed itself.
    pub rotated_from: Option<String>,
    /// Attempts so far ended because of this, as in the audit trail.
    pub last_error: Option<serde_json::Value>,
}

impl Progress {
    /// Whether what the job did, or may have done, is to be settled before another job of its line runs.
    pub(super) fn may_have_changed_aws(&self) -> bool {
        self.in_doubt || self.answered || self.key_material_id.is_some() || !self.deleted_ids.is_empty()
    }
}

/// A material that a job has put on a key. The key is tied to it for good.
#[derive(Clone, Debug)]
pub struct KnownMaterial {
    /// Whether it was put on this very key, not on another Region's.
    pub is_own: bool,
    /// Keyed hash.
    pub fingerprint: Fingerprint,
    /// `local` or `dsm`.
    pub source_tier: String,
    /// The source key's name.
    pub source_key_name: String,
    /// AWS's id of it; symmetric keys only.
    pub key_material_id: Option<String>,
}

impl KnownMaterial {
    /// The source key as a sentence names it.
    pub fn source(&self) -> String {
        match self.source_tier.as_str() {
            "local" => format!("source key {}", self.source_key_name),
            tier => format!("{tier} key {}", self.source_key_name),
        }
    }

    /// The request's fields that name it.
    pub fn as_fields(&self) -> String {
        match self.source_tier.as_str() {
            "local" => format!("source_key_identifier = {}", self.source_key_name),
            tier => format!("source_key_tier = {tier}, source_key_identifier = {}", self.source_key_name),
        }
    }
}

/// Reads what the jobs of claimed lines need. A statement of its own: it must not see an older state
/// than the lines that were just locked.
pub const READ: &str = "
    select line.id,
           job.id, job.principal, job.request_source, job.request_id, job.request, job.traceparent,
           job.accepted_at, job.deadline, kms_key.arn, kms_key.id, kms_key.created_at,
           progress.job_id is not null, progress.effect, coalesce(progress.in_doubt, false),
           coalesce(progress.imported, false), progress.key_material_id, coalesce(progress.refreshes, 0),
           progress.wrapping_algorithm, progress.wrapping_key_spec, progress.public_key, progress.import_token,
           progress.parameters_valid_to, progress.last_error, progress.source_key_id,
           source.id, source.name, source.kind, source.fingerprint, source.fingerprint_version, source.kek_id,
           source.sealed_material, source.sealed_data_key,
           known.own, known.fingerprints, known.versions, known.names, known.ids, progress.delete_ids,
           coalesce(progress.deleted_ids, '{}'), known.tiers,
           progress.dsm_connection, progress.dsm_key_id, progress.dsm_key_name, progress.dsm_fingerprint,
           progress.dsm_fingerprint_version,
           job.seq, case when line.urgent_seq is null then line.attempt else urgent.attempt end,
           -- One look where none is, not one for each job.
           case when (select exists (select from cancellation))
                then (select abandons from cancellation where job_id = job.id) end,
           job.identity, job.retry_of, coalesce(progress.rotation_sent, false), progress.replicas,
           progress.parameters_region, progress.rotated_from
    from unnest($1::bigint[]) as claimed(line_id)
    join line on line.id = claimed.line_id
    left join urgent on urgent.line_id = line.id and urgent.seq = line.urgent_seq
    join job on job.line_id = line.id and job.seq = coalesce(line.urgent_seq, line.head_seq) and job.state = 'waiting'
    join kms_key on kms_key.id = job.kms_key_id
    left join progress on progress.job_id = job.id
    -- An import names its source key, or the material whose source key is on record; a delete has none. Parsed once.
    cross join lateral (
        select case when request ->> 'source_key_tier' is distinct from 'dsm'
                    then request ->> 'source_key_identifier' end as name,
               case when request ->> 'source_key_identifier' is null and request ->> 'operation' is distinct from 'delete'
                    then request ->> 'key_material_id' end as material_id
        from (select job.request::jsonb as request offset 0) as parsed
        where progress.source_key_id is null and progress.dsm_key_id is null
        union all select null, null where progress.source_key_id is not null or progress.dsm_key_id is not null
    ) as asked
    left join lateral (
        select * from (
            select * from source_key where id = progress.source_key_id
            union all
            select * from source_key where name = asked.name
            union all
            select * from source_key where id = case
                when asked.name ~ '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$'
                then asked.name::uuid end
            union all
            select source_key.* from kms_key as other
            join kms_material as held on held.kms_key_id = other.id
            join source_key on source_key.id = case when held.source_tier = 'local' then held.source_key_id::uuid end
            where asked.material_id is not null
              and other.line_id = job.line_id and held.key_material_id = asked.material_id
        ) as found limit 1
    ) as source on true
    left join lateral (
        -- Sorted once, not by each aggregate.
        select array_agg(own) as own, array_agg(fingerprint) as fingerprints, array_agg(fingerprint_version) as versions,
               array_agg(source_key_name) as names, array_agg(source_tier) as tiers, array_agg(key_material_id) as ids
        from (
            select held.*, held.kms_key_id = kms_key.id as own
            from kms_key as other join kms_material as held on held.kms_key_id = other.id
            -- What is uncertain proves nothing; what only waited, and is gone, the key has forgotten.
            where other.line_id = job.line_id and held.imported_at is not null and held.is_tied
            order by held.imported_at
        ) as held
    ) as known on true";

/// A takeover leaves a call behind that may still take effect, if its job was about to make one.
const MARK_LATE: &str = "
    update line
    set late_until = greatest(line.late_until, keyferry_now() + $3 * interval '1 ms'), late_effect = coalesce(taken.effect, line.late_effect, 'unknown')
    from unnest($1::bigint[], $2::text[]) as taken(id, effect)
    where line.id = taken.id";

impl Store {
    /// Claims up to `most` lines for `lease`. The bounds are hints: now and then a claim must look below
    /// them.
    pub async fn claim(
        &self,
        most: usize,
        lease: Duration,
        signature_life: Duration,
        scan: Scan,
    ) -> Result<Claimed, StoreError> {
        self.retrying(|| self.claim_once(most, lease, signature_life, scan)).await
    }

    async fn claim_once(
        &self,
        most: usize,
        lease: Duration,
        signature_life: Duration,
        scan: Scan,
    ) -> Result<Claimed, StoreError> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let claim = transaction.prepare_cached(CLAIM).await?;
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let asked_at = Instant::now();
        let claimed = transaction.query(&claim, &[&most, &millis(lease), &(scan == Scan::Whole), &AHEAD_MS]).await?;
        let is_nothing = |row: &Row| row.get::<_, Option<i64>>(0).is_none();
        if let Some(row) = claimed.first().filter(|row| is_nothing(row)) {
            let opens: Option<OffsetDateTime> = row.get(9);
            let opens_in = opens.map(|at| Duration::try_from(at - row.get::<_, OffsetDateTime>(3)).unwrap_or_default());
            transaction.rollback().await?;
            return Ok(Claimed { opens_in, ..Claimed::default() });
        }
        let heads: HashMap<i64, Head> = claimed.iter().map(|row| (row.get(0), Head::of(row))).collect();
        let lines: Vec<i64> = heads.keys().copied().collect();
        let overtake = transaction.prepare_cached(OVERTAKE).await?;
        let read = transaction.prepare_cached(READ).await?;
        let of_lines: [&(dyn ToSql + Sync); 1] = [&lines];
        // One round trip: they run in this order.
        let (_, rows, holds) = try_join!(
            transaction.execute(&overtake, &of_lines).map_err(StoreError::from),
            transaction.query(&read, &of_lines).map_err(StoreError::from),
            Holds::read(&transaction),
        )?;
        // A row that cannot be read holds up its own line and no other.
        let unread = |error: &StoreError| tracing::error!(error.message = %error, "a job stays where it is");
        let put_aside = lines.len() - rows.len();
        if put_aside > 0 {
            let read: HashSet<i64> = rows.iter().map(|row| row.get(0)).collect();
            let ended: Vec<(i64, bool)> =
                lines.iter().filter(|line| !read.contains(line)).map(|line| (*line, false)).collect();
            advance(&transaction, &ended, Leases::GiveUp).await?;
        }
        let mut jobs: Vec<ClaimedJob> =
            rows.iter().filter_map(|row| claimed_job(row, &heads).inspect_err(unread).ok()).collect();
        mark_late(&transaction, &mut jobs, &heads, signature_life).await?;
        let held: BTreeMap<i64, Parked> = jobs
            .iter()
            // One that is to end needs nothing of AWS for that.
            .filter(|job| match job.ending {
                None => true,
                Some(Ending::Cancelled) => job.progress.in_doubt || job.progress.answered,
                // A rotate takes its material away from the key first.
                Some(Ending::Abandoned) => {
                    job.request.operation() == Operation::Rotate
                        && !job.progress.answered
                        && (job.progress.key_material_id.is_some() || job.retry_of.is_some())
                }
            })
            .filter_map(|job| Some((job.lease.line_id, Parked { by: holds.on(&job.principal, &job.key)?, job })))
            .collect();
        park(&transaction, &held).await?;
        transaction.commit().await?;
        let put_aside = put_aside + held.len();
        let held: HashSet<i64> = held.into_keys().collect();
        let mut jobs: Vec<ClaimedJob> = jobs.into_iter().filter(|job| !held.contains(&job.lease.line_id)).collect();
        let slots = claimed.iter().filter_map(|row| Some((row.get(0), slot(row, asked_at)?)));
        let unused = hand_out(&mut jobs, slots.collect());
        Ok(Claimed { jobs, put_aside, unused, opens_in: None })
    }

    /// Renews leases that are still held; returns those that are. A line that is locked right now is left
    /// for the next beat.
    pub async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Renewed, StoreError> {
        self.retrying(|| self.renew_once(leases, lease)).await
    }

    async fn renew_once(&self, leases: &[Lease], lease: Duration) -> Result<Renewed, StoreError> {
        const RENEW: &str = "
            with held as materialized (
                select line.id from unnest($1::bigint[], $2::uuid[]) as asked(id, token)
                join line on line.id = asked.id and line.token = asked.token
                order by line.id for no key update of line skip locked)
            update line set due_at = keyferry_now() + $3 * interval '1 ms'
            from held where line.id = held.id
            returning line.id, line.token";
        const LOST: &str = "
            select asked.id, asked.token from unnest($1::bigint[], $2::uuid[]) as asked(id, token)
            join line on line.id = asked.id where line.token is distinct from asked.token";
        let client = self.client().await?;
        let lines: Vec<i64> = leases.iter().map(|lease| lease.line_id).collect();
        let tokens: Vec<Uuid> = leases.iter().map(|lease| lease.token).collect();
        let renew = client.prepare_cached(RENEW).await?;
        let rows = client.query(&renew, &[&lines, &tokens, &millis(lease)]).await?;
        let lost = client.prepare_cached(LOST).await?;
        let lost =
            if rows.len() == leases.len() { Vec::new() } else { client.query(&lost, &[&lines, &tokens]).await? };
        let leases = |rows: &[Row]| rows.iter().map(Lease::of).collect();
        Ok(Renewed { held: leases(&rows), lost: leases(&lost) })
    }

    /// Lets jobs whose `not_before` has come join their lines, and moves the lanes' lower bounds.
    /// Returns how many jobs joined; more may wait when it is [`JOIN_PAGE`].
    pub async fn keep_house(&self) -> Result<usize, StoreError> {
        self.retrying(|| self.keep_house_once()).await
    }

    async fn keep_house_once(&self) -> Result<usize, StoreError> {
        const DUE: &str = "
            select future.job_id, job.line_id from future join job on job.id = future.job_id
            where future.not_before <= (select keyferry_now())
            order by future.not_before limit $1
            for no key update of future skip locked";
        const LOCK: &str = "select id from line where id = any($1) order by id for no key update";
        const JOIN: &str = "
            with joining as materialized (
                select job.id, job.line_id, job.lane_id,
                       row_number() over (partition by job.line_id order by asked.place) as nth,
                       count(*) over (partition by job.line_id) as count
                from unnest($1::uuid[]) with ordinality as asked(id, place) join job using (id)),
            extended as (
                update line set tail_seq = line.tail_seq + joining.count,
                                lane_id = case when due_at is null then joining.lane_id else line.lane_id end,
                                due_at = coalesce(due_at, keyferry_now())
                from joining where joining.nth = 1 and line.id = joining.line_id
                returning line.id, line.tail_seq - joining.count as before),
            gone as (delete from future where job_id = any($1))
            update job set seq = extended.before + joining.nth
            from joining join extended on extended.id = joining.line_id
            where job.id = joining.id";
        const URGENT: &str = "
            select line_id, seq from job where id = any($1) and request::jsonb ->> 'urgent' = 'true'";
        // A margin of five seconds covers transactions that stamped a line and have not yet committed.
        const SCAN_FROM: &str = "
            update lane set scan_from = bound.at
            from (select lane.id, least(keyferry_now() - interval '5 s', (
                      -- What goes to the front of the lane just now goes a little below its first.
                      select line.due_at - interval '1 s' from line
                      where line.lane_id = lane.id and line.due_at >= lane.scan_from
                      order by line.due_at limit 1)) as at
                  from (select id, scan_from from lane where served_at > keyferry_now() - interval '1 min'
                        order by id for no key update skip locked) as lane) as bound
            where lane.id = bound.id and lane.scan_from < bound.at - interval '1 s'";
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let due = transaction.prepare_cached(DUE).await?;
        let rows = transaction.query(&due, &[&i64::try_from(JOIN_PAGE).unwrap_or(i64::MAX)]).await?;
        if !rows.is_empty() {
            let ids: Vec<Uuid> = rows.iter().map(|row| row.get(0)).collect();
            let lines: Vec<i64> = rows.iter().map(|row| row.get(1)).collect();
            let lock = transaction.prepare_cached(LOCK).await?;
            transaction.execute(&lock, &[&lines]).await?;
            let join = transaction.prepare_cached(JOIN).await?;
            transaction.execute(&join, &[&ids]).await?;
            let urgent = transaction.prepare_cached(URGENT).await?;
            let rows = transaction.query(&urgent, &[&ids]).await?;
            if !rows.is_empty() {
                let now: OffsetDateTime = transaction.query_one("select keyferry_now()", &[]).await?.get(0);
                let joined: Vec<(i64, i64)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
                super::urgent::join(&transaction, &joined, now).await?;
            }
        }
        let scan_from = transaction.prepare_cached(SCAN_FROM).await?;
        transaction.execute(&scan_from, &[]).await?;
        transaction.commit().await?;
        Ok(rows.len())
    }
}

/// What a claim has found.
#[derive(Debug, Default)]
pub struct Claimed {
    /// Jobs to run.
    pub jobs: Vec<ClaimedJob>,
    /// Due lines without a job that can run now. They are not due any more, or have gone on: others may be.
    pub put_aside: usize,
    /// Slots of theirs.
    pub unused: Vec<QuotaSlot>,
    /// Where nothing was found: when the first closed lane with work opens.
    pub opens_in: Option<Duration>,
}

/// What became of leases that were to be renewed.
#[derive(Debug)]
pub struct Renewed {
    /// Renewed.
    pub held: Vec<Lease>,
    /// Taken over, or settled meanwhile.
    pub lost: Vec<Lease>,
}

/// Milliseconds for `interval` arithmetic.
pub(super) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1_000.0
}

struct Head {
    token: Uuid,
    taken_over: bool,
    now: OffsetDateTime,
    late: Option<(String, OffsetDateTime)>,
}

impl Head {
    fn of(row: &Row) -> Self {
        Self {
            token: row.get(1),
            taken_over: row.get(2),
            now: row.get(3),
            late: row.get::<_, Option<String>>(4).zip(row.get::<_, Option<OffsetDateTime>>(5)),
        }
    }
}

/// The slot that a line was given.
fn slot(row: &Row, asked_at: Instant) -> Option<QuotaSlot> {
    let operation = Scarce::parse(row.get::<_, Option<&str>>(8)?)?;
    let lane = QuotaLane { account: row.get(6), region: row.get(7), operation };
    QuotaSlot::of(row, 9, lane, row.get(3), asked_at)
}

fn claimed_job(row: &Row, heads: &HashMap<i64, Head>) -> Result<ClaimedJob, StoreError> {
    let line_id: i64 = row.get(0);
    let broken = |what: &str| {
        StoreError::Settings(format!("line {line_id}: {what} cannot be read; was it written by a newer version?"))
    };
    let head = heads.get(&line_id).ok_or_else(|| broken("its head"))?;
    let id = RequestId::parse(row.get(4)).ok_or_else(|| broken("the request's id"))?;
    let request = Request::from_canonical(row.get(5), id, row.get(3)).map_err(|_| broken("the request"))?;
    let key = KeyArn::parse(row.get(9)).map_err(|_| broken("the key's ARN"))?;
    let kept = parameters(row, &key);
    Ok(ClaimedJob {
        lease: Lease { line_id, token: head.token },
        now: head.now,
        attempt: u32::try_from(row.get::<_, i32>(47)).unwrap_or(1),
        id: row.get(1),
        sequence: row.get(46),
        principal: row.get(2),
        identity: row.get(49),
        retry_of: row.get(50),
        request,
        traceparent: row.get(6),
        accepted_at: row.get(7),
        deadline: row.get(8),
        key,
        key_id: row.get(10),
        key_created_at: row.get(11),
        ending: row.get::<_, Option<bool>>(48).map(Ending::of),
        progress: Progress {
            is_chosen: row.get::<_, Option<Uuid>>(24).is_some() || row.get::<_, Option<&str>>(42).is_some(),
            dsm: dsm_choice(row),
            effect: row.get(13),
            in_doubt: row.get(14),
            answered: row.get(15),
            key_material_id: row.get(16),
            refreshes: u32::try_from(row.get::<_, i32>(17)).unwrap_or(0),
            parameters: kept,
            rotated_from: row.get(54),
            last_error: row.get(23),
            delete_ids: row.get(38),
            deleted_ids: row.get(39),
            rotation_sent: row.get(51),
            replicas: Replicas::read(row.get(52)),
        },
        source_key: source_key(row).map_err(broken)?,
        materials: known_materials(row),
        late: head.late.clone(),
        slot: None,
    })
}

fn parameters(row: &Row, key: &KeyArn) -> Option<ImportParameters> {
    Some(ImportParameters {
        region: row.get::<_, Option<String>>(53).unwrap_or_else(|| key.region().to_owned()),
        wrapping: Wrapping {
            algorithm: WrappingAlgorithm::parse(row.get::<_, Option<&str>>(18)?)?,
            key_spec: WrappingKeySpec::parse(row.get::<_, Option<&str>>(19)?)?,
        },
        public_key: row.get::<_, Option<Vec<u8>>>(20)?,
        import_token: row.get::<_, Option<Vec<u8>>>(21)?,
        valid_to: row.get::<_, Option<OffsetDateTime>>(22)?,
        aws_request_id: None,
    })
}

fn source_key(row: &Row) -> Result<Option<SealedKey>, &'static str> {
    let Some(id) = row.get::<_, Option<Uuid>>(25) else { return Ok(None) };
    Ok(Some(SealedKey {
        id,
        name: row.get(26),
        kind: KeyKind::parse(row.get(27)).ok_or("the source key's kind")?,
        fingerprint: Fingerprint { hash: row.get(28), version: row.get(29) },
        kek_id: row.get(30),
        sealed_material: row.get(31),
        sealed_data_key: row.get(32),
    }))
}

fn dsm_choice(row: &Row) -> Option<DsmChoice> {
    Some(DsmChoice {
        connection: row.get::<_, Option<String>>(41)?,
        key_id: row.get::<_, Option<String>>(42)?,
        key_name: row.get(43),
        fingerprint: Fingerprint { hash: row.get::<_, Option<Vec<u8>>>(44)?, version: row.get(45) },
    })
}

fn known_materials(row: &Row) -> Vec<KnownMaterial> {
    let Some(own) = row.get::<_, Option<Vec<bool>>>(33) else { return Vec::new() };
    let (hashes, versions): (Vec<Vec<u8>>, Vec<i32>) = (row.get(34), row.get(35));
    let (names, ids, tiers): (Vec<String>, Vec<Option<String>>, Vec<String>) = (row.get(36), row.get(37), row.get(40));
    let columns = own.into_iter().zip(hashes).zip(versions).zip(names).zip(ids).zip(tiers);
    columns
        .map(|(((((is_own, hash), version), source_key_name), key_material_id), source_tier)| KnownMaterial {
            is_own,
            fingerprint: Fingerprint { version, hash },
            source_tier,
            source_key_name,
            key_material_id,
        })
        .collect()
}

async fn mark_late(
    transaction: &Transaction<'_>,
    jobs: &mut [ClaimedJob],
    heads: &HashMap<i64, Head>,
    signature_life: Duration,
) -> Result<(), StoreError> {
    let (mut lines, mut effects) = (Vec::new(), Vec::new());
    for job in jobs.iter_mut().filter(|job| job.progress.in_doubt && heads[&job.lease.line_id].taken_over) {
        lines.push(job.lease.line_id);
        effects.push(job.progress.effect.clone());
        // Its successor knows of it at once.
        if let Some(effect) = &job.progress.effect {
            job.late = Some((effect.clone(), job.now + signature_life));
        }
    }
    if lines.is_empty() {
        return Ok(());
    }
    let statement = transaction.prepare_cached(MARK_LATE).await?;
    transaction.execute(&statement, &[&lines, &effects, &millis(signature_life)]).await?;
    Ok(())
}
