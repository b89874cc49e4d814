//! Ends of attempts: outcome, audit entries, event, and the line's next head in one transaction.

use super::accept::{insert_audit, insert_events};
use super::deletions::Deletions;
use super::lock::{Held, lock};
use super::release::release;
use super::{Ending, Lease, QuotaLane, Store, StoreError, abandon, backlog, together, urgent};
use crate::audit::{Fact, Kind};
use crate::job::{Event, Failure, JobResult, JobSummary, KeyArn, Operation, ScarceCall, failure_json};
use crate::source::Fingerprint;
use deadpool_postgres::Transaction;
use futures_util::FutureExt as _;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;
use time::OffsetDateTime;
use uuid::Uuid;

/// How an attempt ended.
#[derive(Debug)]
pub struct Settlement {
    /// The lease under which it is written.
    pub lease: Lease,
    /// The job.
    pub job: JobSummary,
    /// Keyferry's name of the KMS key.
    pub key_id: Uuid,
    /// How often the key was rotated on demand, if AWS showed that in this attempt.
    pub rotations: Option<u32>,
    /// What the audit trail says, before the outcome itself.
    pub facts: Vec<Fact>,
    /// What a mutating call of this attempt does that may still take effect.
    pub late_effect: Option<String>,
    /// What AWS said that it deleted in this attempt.
    pub removed: Removed,
    /// What follows.
    pub kind: SettlementKind,
}

/// What follows an attempt.
#[derive(Debug)]
pub enum SettlementKind {
    /// The job ends.
    Ended {
        /// Its outcome.
        outcome: Result<JobResult, Failure>,
        /// The source key it imported, or was to import.
        source_key_id: Option<Uuid>,
        /// The material that the KMS key holds now, or may hold.
        material: Option<Material>,
    },
    /// The job is tried again.
    Retry {
        /// When; never after the deadline while that lies ahead.
        delay: Duration,
        /// The job's deadline.
        deadline: OffsetDateTime,
        /// Why, in one line, for `jobs show`.
        reason: Value,
        /// What the next attempt must know.
        state: RetryState,
        /// The scarce call that it makes first.
        next: ScarceCall,
    },
    /// It waits for its turn in the lane of a scarce call, before all others. It counts only if a call was made.
    AwaitSlot {
        /// The job's deadline.
        deadline: OffsetDateTime,
        /// What the next attempt must know, if this one has committed anything.
        state: Option<RetryState>,
        /// The lane.
        lane: QuotaLane,
        /// AWS throttled it all the same: why, in one line, for `jobs show`.
        throttled: Option<Value>,
    },
    /// The attempt did not begin; it does not count.
    PutBack {
        /// When it may be tried again.
        until: OffsetDateTime,
        /// The job's deadline.
        deadline: OffsetDateTime,
    },
}

/// What became of the end of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// Nothing was written: another worker has the line, or this very end was committed and its answer lost.
    Lost,
    /// It was written as it is.
    Written,
    /// An operator had wanted the job ended meanwhile: it ended as that.
    Ended(Ending),
}

impl Settled {
    /// Whether the lease still held.
    pub fn is_held(self) -> bool {
        self != Self::Lost
    }
}

/// What AWS answered to the mutating calls of a job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answered {
    /// The imported material's id; symmetric keys only.
    pub key_material_id: Option<String>,
}

/// Materials of a KMS key that were deleted from it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Removed {
    /// None.
    #[default]
    Nothing,
    /// Those of a symmetric key, by AWS's ids. The key stays tied to them.
    Materials(Vec<String>),
    /// The only one of a key without material ids. The key stays tied to it.
    Only,
    /// One that waited for its rotation, by AWS's id: the key was never tied to it.
    Waiting(String),
}

/// What the next attempt must know.
#[derive(Clone, Debug, Default)]
pub struct RetryState {
    /// A mutating call may have taken effect.
    pub in_doubt: bool,
    /// What becomes of the import parameters.
    pub parameters: Parameters,
    /// AWS answered every mutating call; what is left is to see it.
    pub answered: Option<Answered>,
    /// The id of a rotate's own material, once AWS has said that the key has it.
    pub waiting: Option<String>,
    /// How far a rotate has come in the other Regions.
    pub replicas: Replicas,
    /// Start counting refused parameters anew.
    pub reset_refreshes: bool,
}

impl RetryState {
    fn material_id(&self) -> Option<String> {
        let answered = self.answered.as_ref().and_then(|answered| answered.key_material_id.clone());
        answered.or_else(|| self.waiting.clone())
    }
}

/// How far a rotate has come in the Regions other than its key's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replicas(pub BTreeMap<String, ReplicaStep>);

words! {
    /// How far a rotate has come in one other Region.
    pub ReplicaStep {
        /// It was begun there, and did not come to an end.
        Tried = "tried",
        /// AWS has the material there.
        Imported = "imported",
    }
}

impl Replicas {
    /// As it is stored; `None`: there is nothing to tell.
    pub(super) fn stored(&self) -> Option<Value> {
        let steps = self.0.iter().map(|(region, step)| (region.clone(), json!(step.as_str())));
        (!self.0.is_empty()).then(|| Value::Object(steps.collect()))
    }

    /// What [`Self::stored`] gave.
    pub(super) fn read(stored: Option<Value>) -> Self {
        let Some(Value::Object(steps)) = stored else { return Self::default() };
        let step = |text: &Value| ReplicaStep::ALL.iter().copied().find(|step| Some(step.as_str()) == text.as_str());
        Self(steps.iter().filter_map(|(region, text)| Some((region.clone(), step(text)?))).collect())
    }
}

/// What becomes of a job's import parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Parameters {
    /// There are none.
    #[default]
    Absent,
    /// They are kept: the next scarce call is the import itself.
    Kept,
    /// AWS refused them: they are thrown away, and that is counted.
    Refused,
    /// They went with an import that AWS took, and serve no other.
    Used,
}

/// A material on a KMS key.
#[derive(Clone, Debug)]
pub struct Material {
    /// Keyed hash.
    pub fingerprint: Fingerprint,
    /// The source key's tier, `local` or `dsm`.
    pub source_tier: &'static str,
    /// The source key: its id, of a dsm key the connection's name and the server's identifier.
    pub source_key_id: String,
    /// Its name.
    pub source_key_name: String,
    /// The id that AWS gave it.
    pub key_material_id: Option<String>,
    /// Its end of life.
    pub valid_to: Option<OffsetDateTime>,
    /// False: whether AWS took it was never learnt.
    pub is_certain: bool,
}

/// Writes outcomes.
pub const END_JOBS: &str = "
    update job set state = ended.state, finished_at = ended.at, result = ended.result, error = ended.error,
                   source_key_id = ended.source_key_id, attempts = ended.attempts
    from unnest($1::uuid[], $2::text[], $3::timestamptz[], $4::jsonb[], $5::jsonb[], $6::uuid[], $7::integer[])
         as ended(id, state, at, result, error, source_key_id, attempts)
    where job.id = ended.id";

impl Store {
    /// Settles a slice; says what became of each.
    pub async fn settle(
        &self,
        settlements: &[&Settlement],
        signature_life: Duration,
    ) -> Result<Vec<Settled>, StoreError> {
        self.retrying(|| self.settle_once(settlements, signature_life)).await
    }

    async fn settle_once(
        &self,
        settlements: &[&Settlement],
        signature_life: Duration,
    ) -> Result<Vec<Settled>, StoreError> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let leases: Vec<(Lease, Uuid)> = settlements.iter().map(|end| (end.lease, end.job.id)).collect();
        let Some((held, now)) = lock(&transaction, &leases).await? else {
            return Ok(vec![Settled::Lost; settlements.len()]);
        };
        let ending: HashMap<Lease, (Ending, Settlement)> =
            settlements.iter().filter_map(|end| Some((end.lease, end.as_ended(held.get(&end.lease)?)?))).collect();
        let ending = with_materials(&transaction, settlements, ending).await?;
        let valid: Vec<(&Settlement, &Held)> = settlements
            .iter()
            .filter_map(|end| {
                let written = ending.get(&end.lease).map_or(*end, |(_, settlement)| settlement);
                Some((written, held.get(&end.lease)?))
            })
            .collect();

        // One round trip: the statements go out together. None depends on another.
        let ended = Ended::of(&valid, now);
        together(vec![
            write_audit(&transaction, &valid, now).boxed(),
            ended.write_jobs(&transaction).boxed(),
            ended.empty_progress(&transaction).boxed(),
            ended.write_materials(&transaction).boxed(),
            insert_events(&transaction, &ended.events).boxed(),
            keep_progress(&transaction, &valid).boxed(),
            note_rotations(&transaction, &valid).boxed(),
            release(&transaction, &valid, now, signature_life).boxed(),
            backlog::change(&transaction, ended_jobs(&valid), -1).boxed(),
        ])
        .await?;
        // After the records of what jobs brought: a job may have taken away what it had brought itself.
        mark_removed(&transaction, &valid, now).await?;
        serve_urgent(&transaction, &valid, now).await?;
        let ended = valid.iter().filter(|(end, held)| held.ending.is_some() && end.kind.is_end());
        super::cancel::forget(&transaction, &ended.map(|(end, _)| end.job.id).collect::<Vec<_>>()).await?;
        transaction.commit().await?;
        self.written.entries(valid.iter().flat_map(|(end, _)| end.facts.iter().map(Fact::kind).chain(end.own_kind())));
        let became = |end: &&Settlement| match (held.contains_key(&end.lease), ending.get(&end.lease)) {
            (false, _) => Settled::Lost,
            (true, None) => Settled::Written,
            (true, Some((ending, _))) => Settled::Ended(*ending),
        };
        Ok(settlements.iter().map(became).collect())
    }
}

fn ended_jobs<'a>(ends: &'a [(&Settlement, &Held)]) -> impl Iterator<Item = (&'a str, &'a KeyArn)> {
    let ended = ends.iter().filter(|(end, _)| end.kind.is_end());
    ended.map(|(end, _)| (end.job.principal.as_str(), &end.job.key))
}

async fn write_audit(
    transaction: &Transaction<'_>,
    ends: &[(&Settlement, &Held)],
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    let mut entries = Vec::new();
    for (end, held) in ends {
        let facts = end.facts.iter().cloned().chain(end.own_fact());
        for (n, fact) in (held.audit_n + 1..).zip(facts) {
            entries.push((end.job.id, n, fact.entry(end.job.id, n, now)));
        }
    }
    insert_audit(transaction, entries).await
}

impl SettlementKind {
    fn is_end(&self) -> bool {
        matches!(self, Self::Ended { .. })
    }

    /// What AWS has answered to a job that is to be tried again.
    fn answer(&self) -> Option<&Answered> {
        match self {
            Self::Retry { state, .. } | Self::AwaitSlot { state: Some(state), .. } => state.answered.as_ref(),
            Self::Ended { .. } | Self::PutBack { .. } | Self::AwaitSlot { state: None, .. } => None,
        }
    }

    /// The id of a rotate's own material, if the attempt has learnt it.
    fn waiting(&self) -> Option<&String> {
        match self {
            Self::Retry { state, .. } | Self::AwaitSlot { state: Some(state), .. } => state.waiting.as_ref(),
            Self::Ended { .. } | Self::PutBack { .. } | Self::AwaitSlot { state: None, .. } => None,
        }
    }

    /// Whether what is known of the job stays as it was.
    fn leaves_progress(&self) -> bool {
        matches!(self, Self::PutBack { .. } | Self::AwaitSlot { state: None, .. })
    }
}

impl Settlement {
    /// The end instead of this, if an operator wants the job ended, and has either abandoned it or nothing is in doubt any
    /// more. What may be on the key is still to be added.
    fn as_ended(&self, held: &Held) -> Option<(Ending, Self)> {
        // One that is there to take away what a failed one has brought.
        let removes = self.job.retry_of.is_some() && held.ending == Some(Ending::Abandoned);
        let is_workers = self.kind.waiting().is_some() || held.has_changed || (removes && self.kind.leaves_progress());
        if self.job.operation == Operation::Rotate.as_str() && is_workers {
            // What it has brought is known to its worker, which ends it at its next claim.
            return None;
        }
        let is_unsettled = match &self.kind {
            SettlementKind::Ended { .. } => return None,
            SettlementKind::Retry { state, .. } | SettlementKind::AwaitSlot { state: Some(state), .. } => {
                state.in_doubt || state.answered.is_some() || held.is_answered
            }
            SettlementKind::PutBack { .. } | SettlementKind::AwaitSlot { state: None, .. } => held.is_unsettled(),
        };
        let ending = held.ends_as(is_unsettled)?;
        let failure = ending.failure(is_unsettled || held.has_changed || self.removed != Removed::Nothing);
        let kind = SettlementKind::Ended { outcome: Err(failure), source_key_id: held.source_key_id, material: None };
        let settlement = Self {
            lease: self.lease,
            job: self.job.clone(),
            key_id: self.key_id,
            rotations: self.rotations,
            facts: self.facts.clone(),
            late_effect: self.late_effect.clone(),
            removed: self.removed.clone(),
            kind,
        };
        Some((ending, settlement))
    }

    /// The entry of the ending itself.
    fn own_fact(&self) -> Option<Fact> {
        match &self.kind {
            SettlementKind::Ended { outcome: Ok(result), .. } => {
                let mut details = json!({"key": self.job.key.to_string()});
                for name in ["key_material_id", "key_material_ids", "dry_run"] {
                    if let Some(value) = result.0.get(name) {
                        details[name] = value.clone();
                    }
                }
                Some(Fact::new(Kind::Succeeded, details))
            }
            SettlementKind::Ended { outcome: Err(failure), .. } => Some(Fact::new(Kind::Failed, failure_json(failure))),
            SettlementKind::Retry { reason, .. } | SettlementKind::AwaitSlot { throttled: Some(reason), .. } => {
                Some(Fact::new(Kind::AttemptFailed, reason.clone()))
            }
            SettlementKind::PutBack { .. } | SettlementKind::AwaitSlot { throttled: None, .. } => None,
        }
    }

    /// What it says.
    fn own_kind(&self) -> Option<Kind> {
        match &self.kind {
            SettlementKind::Ended { outcome: Ok(_), .. } => Some(Kind::Succeeded),
            SettlementKind::Ended { outcome: Err(_), .. } => Some(Kind::Failed),
            SettlementKind::Retry { .. } | SettlementKind::AwaitSlot { throttled: Some(_), .. } => {
                Some(Kind::AttemptFailed)
            }
            SettlementKind::PutBack { .. } | SettlementKind::AwaitSlot { throttled: None, .. } => None,
        }
    }

    fn fact_count(&self) -> i32 {
        let own = usize::from(self.own_kind().is_some());
        i32::try_from(self.facts.len() + own).unwrap_or(i32::MAX)
    }
}

/// Everything about the jobs of a slice that end, in columns.
struct Ended {
    now: OffsetDateTime,
    ids: Vec<Uuid>,
    states: Vec<&'static str>,
    times: Vec<OffsetDateTime>,
    results: Vec<Option<Value>>,
    errors: Vec<Option<Value>>,
    sources: Vec<Option<Uuid>>,
    attempts: Vec<i32>,
    events: Vec<Event>,
    materials: MaterialRows,
    /// Of those that failed: their retries must know.
    deletions: Deletions,
}

impl Ended {
    fn of(ends: &[(&Settlement, &Held)], now: OffsetDateTime) -> Self {
        let mut ended = Self {
            now,
            ids: Vec::new(),
            states: Vec::new(),
            times: Vec::new(),
            results: Vec::new(),
            errors: Vec::new(),
            sources: Vec::new(),
            attempts: Vec::new(),
            events: Vec::new(),
            materials: MaterialRows::default(),
            deletions: Deletions::default(),
        };
        for (end, held) in ends {
            let SettlementKind::Ended { outcome, source_key_id, material } = &end.kind else { continue };
            ended.ids.push(end.job.id);
            ended.states.push(if outcome.is_ok() { "succeeded" } else { "failed" });
            ended.times.push(now);
            ended.results.push(outcome.as_ref().ok().map(|result| result.0.clone()));
            ended.errors.push(outcome.as_ref().err().map(failure_json));
            ended.sources.push(*source_key_id);
            ended.attempts.push(held.attempt);
            ended.events.push(Event::of_job(&end.job, outcome, now));
            if outcome.is_err() {
                ended.deletions.add(end);
            }
            if let Some(material) = material {
                ended.materials.push(end.key_id, end.job.id, material);
            }
        }
        ended
    }

    async fn write_jobs(&self, transaction: &Transaction<'_>) -> Result<(), StoreError> {
        if !self.ids.is_empty() {
            let write = transaction.prepare_cached(END_JOBS).await?;
            let Self { ids, states, times, results, errors, sources, attempts, .. } = self;
            transaction.execute(&write, &[ids, states, times, results, errors, sources, attempts]).await?;
        }
        Ok(())
    }

    async fn empty_progress(&self, transaction: &Transaction<'_>) -> Result<(), StoreError> {
        if !self.ids.is_empty() {
            self.deletions.note(transaction).await?;
            let failed = self.ids.iter().zip(&self.states).filter(|(_, state)| **state == "failed");
            super::retry::keep_choices(transaction, &failed.map(|(id, _)| *id).collect::<Vec<_>>()).await?;
            let empty = transaction.prepare_cached("delete from progress where job_id = any($1)").await?;
            transaction.execute(&empty, &[&self.ids]).await?;
        }
        Ok(())
    }

    async fn write_materials(&self, transaction: &Transaction<'_>) -> Result<(), StoreError> {
        self.materials.write(transaction, self.now).await
    }
}

/// What jobs that were abandoned may have put on their keys is on record like what others have, with what AWS answered to
/// the attempts that ended.
async fn with_materials(
    transaction: &Transaction<'_>,
    settlements: &[&Settlement],
    mut ending: HashMap<Lease, (Ending, Settlement)>,
) -> Result<HashMap<Lease, (Ending, Settlement)>, StoreError> {
    let in_doubt = |settlement: &Settlement| matches!(&settlement.kind, SettlementKind::Ended { outcome: Err(failure), .. } if failure.aws_changed);
    let answers =
        settlements.iter().filter(|end| ending.get(&end.lease).is_some_and(|(how, _)| *how == Ending::Abandoned));
    let answers: Vec<(Uuid, &Answered)> = answers.filter_map(|end| Some((end.job.id, end.kind.answer()?))).collect();
    abandon::note_answers(transaction, &answers).await?;
    let jobs: Vec<Uuid> = ending
        .values()
        .filter(|(ending, settlement)| *ending == Ending::Abandoned && in_doubt(settlement))
        .map(|(_, settlement)| settlement.job.id)
        .collect();
    let mut found = abandon::materials(transaction, &jobs).await?;
    for (_, settlement) in ending.values_mut() {
        if let SettlementKind::Ended { outcome, material, .. } = &mut settlement.kind {
            *material = found.remove(&settlement.job.id).map(|(_, material)| material);
            if let Some(failure) = material.as_ref().and_then(abandon::failure) {
                *outcome = Err(failure);
            }
        }
    }
    Ok(ending)
}

impl MaterialRows {
    pub(super) async fn write(&self, transaction: &Transaction<'_>, now: OffsetDateTime) -> Result<(), StoreError> {
        const WRITE: &str = "
            insert into kms_material (kms_key_id, fingerprint, fingerprint_version, source_tier, source_key_id,
                                      source_key_name, key_material_id, valid_to, imported_at, job_id)
            select key_id, fingerprint, version, tier, source_id, name, material_id, valid_to,
                   case when certain then $10::timestamptz end, job_id
            from unnest($1::uuid[], $2::bytea[], $3::integer[], $4::text[], $5::text[], $6::text[], $7::timestamptz[],
                        $8::boolean[], $9::uuid[], $11::text[])
                 as new(key_id, fingerprint, version, source_id, name, material_id, valid_to, certain, job_id, tier)
            order by key_id, fingerprint
            on conflict (kms_key_id, fingerprint) do update set
                -- What is uncertain takes nothing back of what is certain.
                source_tier = case when excluded.imported_at is null and kms_material.imported_at is not null
                                   then kms_material.source_tier else excluded.source_tier end,
                source_key_id = case when excluded.imported_at is null and kms_material.imported_at is not null
                                     then kms_material.source_key_id else excluded.source_key_id end,
                source_key_name = case when excluded.imported_at is null and kms_material.imported_at is not null
                                       then kms_material.source_key_name else excluded.source_key_name end,
                valid_to = case when excluded.imported_at is null and kms_material.imported_at is not null
                                then kms_material.valid_to else excluded.valid_to end,
                key_material_id = coalesce(excluded.key_material_id, kms_material.key_material_id),
                imported_at = coalesce(excluded.imported_at, kms_material.imported_at),
                -- It is there, or may be.
                removed_at = null,
                is_tied = true,
                job_id = excluded.job_id";
        let m = self;
        if !m.keys.is_empty() {
            let write = transaction.prepare_cached(WRITE).await?;
            transaction
                .execute(
                    &write,
                    &[
                        &m.keys,
                        &m.fingerprints,
                        &m.versions,
                        &m.sources,
                        &m.names,
                        &m.ids,
                        &m.ends,
                        &m.certain,
                        &m.jobs,
                        &now,
                        &m.tiers,
                    ],
                )
                .await?;
        }
        Ok(())
    }
}

#[derive(Default)]
pub(super) struct MaterialRows {
    keys: Vec<Uuid>,
    fingerprints: Vec<Vec<u8>>,
    versions: Vec<i32>,
    tiers: Vec<&'static str>,
    sources: Vec<String>,
    names: Vec<String>,
    ids: Vec<Option<String>>,
    ends: Vec<Option<OffsetDateTime>>,
    certain: Vec<bool>,
    jobs: Vec<Uuid>,
}

impl MaterialRows {
    pub(super) fn push(&mut self, key_id: Uuid, job_id: Uuid, material: &Material) {
        self.keys.push(key_id);
        self.fingerprints.push(material.fingerprint.hash.clone());
        self.versions.push(material.fingerprint.version);
        self.tiers.push(material.source_tier);
        self.sources.push(material.source_key_id.clone());
        self.names.push(material.source_key_name.clone());
        self.ids.push(material.key_material_id.clone());
        self.ends.push(material.valid_to);
        self.certain.push(material.is_certain);
        self.jobs.push(job_id);
    }
}

/// What the next attempt must know. A job that was put back before it did anything keeps no row; one that has
/// something to tell keeps the count of its entries.
async fn keep_progress(transaction: &Transaction<'_>, ends: &[(&Settlement, &Held)]) -> Result<(), StoreError> {
    const WRITE: &str = "
        insert into progress (job_id, audit_n, in_doubt, imported, key_material_id, refreshes, last_error, replicas)
        select job_id, audit_n, in_doubt, imported, material_id, refresh::int, last_error, replicas
        from unnest($1::uuid[], $2::integer[], $3::boolean[], $4::boolean[], $5::text[], $6::boolean[], $7::boolean[],
                    $8::jsonb[], $9::jsonb[])
             as new(job_id, audit_n, in_doubt, imported, material_id, refresh, reset, last_error, replicas)
        on conflict (job_id) do update set
            audit_n = excluded.audit_n,
            in_doubt = excluded.in_doubt,
            imported = excluded.imported or progress.imported,
            key_material_id = coalesce(excluded.key_material_id, progress.key_material_id),
            replicas = coalesce(excluded.replicas, progress.replicas),
            last_error = coalesce(excluded.last_error, progress.last_error),
            refreshes = progress.refreshes + excluded.refreshes";
    // Parameters that AWS refused are of no more use, whatever the reason; nor are those that it has taken.
    const DISCARD: &str = "
        update progress set wrapping_algorithm = null, wrapping_key_spec = null, public_key = null, import_token = null,
                            parameters_valid_to = null, parameters_region = null
        where job_id = any($1)";
    const RESET: &str = "update progress set refreshes = 0 where job_id = any($1)";
    // Nothing of what is known changes.
    const COUNT: &str = "
        insert into progress (job_id, audit_n) select * from unnest($1::uuid[], $2::integer[])
        on conflict (job_id) do update set audit_n = excluded.audit_n";
    let told: Vec<&(&Settlement, &Held)> =
        ends.iter().filter(|(end, _)| end.kind.leaves_progress() && end.fact_count() > 0).collect();
    if !told.is_empty() {
        let jobs: Vec<Uuid> = told.iter().map(|(end, _)| end.job.id).collect();
        let counts: Vec<i32> = told.iter().map(|(end, held)| held.audit_n + end.fact_count()).collect();
        let count = transaction.prepare_cached(COUNT).await?;
        transaction.execute(&count, &[&jobs, &counts]).await?;
    }
    let retries: Vec<(&Settlement, &Held, Option<&Value>, &RetryState)> = ends
        .iter()
        .filter_map(|(end, held)| match &end.kind {
            SettlementKind::Retry { reason, state, .. } => Some((*end, *held, Some(reason), state)),
            SettlementKind::AwaitSlot { throttled, state: Some(state), .. } => {
                Some((*end, *held, throttled.as_ref(), state))
            }
            _ => None,
        })
        .collect();
    if retries.is_empty() {
        return Ok(());
    }
    let jobs: Vec<Uuid> = retries.iter().map(|(end, ..)| end.job.id).collect();
    let counts: Vec<i32> = retries.iter().map(|(end, held, ..)| held.audit_n + end.fact_count()).collect();
    let doubts: Vec<bool> = retries.iter().map(|(.., state)| state.in_doubt).collect();
    let answered: Vec<bool> = retries.iter().map(|(.., state)| state.answered.is_some()).collect();
    let ids: Vec<Option<String>> = retries.iter().map(|(.., state)| state.material_id()).collect();
    let replicas: Vec<Option<Value>> = retries.iter().map(|(.., state)| state.replicas.stored()).collect();
    let refresh: Vec<bool> = retries.iter().map(|(.., state)| state.parameters == Parameters::Refused).collect();
    let reset: Vec<bool> = retries.iter().map(|(.., state)| state.reset_refreshes).collect();
    let reasons: Vec<Option<&Value>> = retries.iter().map(|(_, _, reason, _)| *reason).collect();
    let write = transaction.prepare_cached(WRITE).await?;
    transaction
        .execute(&write, &[&jobs, &counts, &doubts, &answered, &ids, &refresh, &reset, &reasons, &replicas])
        .await?;
    let chosen = |wanted: &[bool]| -> Vec<Uuid> {
        jobs.iter().zip(wanted).filter(|(_, wanted)| **wanted).map(|(job, _)| *job).collect()
    };
    // What was deleted stays deleted for this job, whoever brings it back meanwhile.
    let mut deletions = Deletions::default();
    for (end, ..) in &retries {
        deletions.add(end);
    }
    deletions.note(transaction).await?;
    let useless: Vec<bool> =
        retries.iter().map(|(.., state)| matches!(state.parameters, Parameters::Refused | Parameters::Used)).collect();
    for (statement, which) in [(DISCARD, chosen(&useless)), (RESET, chosen(&reset))] {
        if !which.is_empty() {
            let statement = transaction.prepare_cached(statement).await?;
            transaction.execute(&statement, &[&which]).await?;
        }
    }
    Ok(())
}

/// What was deleted is remembered: the key takes it again, and needs it to be usable.
async fn mark_removed(
    transaction: &Transaction<'_>,
    ends: &[(&Settlement, &Held)],
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    const MARK: &str = "
        update kms_material set removed_at = $3, is_tied = gone.is_tied
        from unnest($1::uuid[], $2::text[], $4::boolean[]) as gone(key_id, material_id, is_tied)
        where kms_material.kms_key_id = gone.key_id
          and (gone.material_id is null or kms_material.key_material_id = gone.material_id)";
    let mut keys: Vec<Uuid> = Vec::new();
    let mut materials: Vec<Option<&str>> = Vec::new();
    let mut tied: Vec<bool> = Vec::new();
    for (end, _) in ends {
        let gone: Vec<Option<&str>> = match &end.removed {
            Removed::Nothing => Vec::new(),
            Removed::Only => vec![None],
            Removed::Materials(ids) => ids.iter().map(|id| Some(id.as_str())).collect(),
            Removed::Waiting(id) => vec![Some(id)],
        };
        keys.extend(gone.iter().map(|_| end.key_id));
        tied.extend(gone.iter().map(|_| !matches!(end.removed, Removed::Waiting(_))));
        materials.extend(gone);
    }
    if !keys.is_empty() {
        let mark = transaction.prepare_cached(MARK).await?;
        transaction.execute(&mark, &[&keys, &materials, &now, &tied]).await?;
    }
    Ok(())
}

/// How much of its rotations a key has used up.
async fn note_rotations(transaction: &Transaction<'_>, ends: &[(&Settlement, &Held)]) -> Result<(), StoreError> {
    const NOTE: &str = "
        update kms_key set rotations = seen.rotations
        from (select id, max(rotations) as rotations from unnest($1::uuid[], $2::integer[]) as seen(id, rotations)
              group by id order by id) as seen
        where kms_key.id = seen.id and kms_key.rotations is distinct from seen.rotations";
    let seen = ends.iter().filter_map(|(end, _)| Some((end.key_id, i32::try_from(end.rotations?).ok()?)));
    let (keys, rotations): (Vec<Uuid>, Vec<i32>) = seen.unzip();
    if !keys.is_empty() {
        let note = transaction.prepare_cached(NOTE).await?;
        transaction.execute(&note, &[&keys, &rotations]).await?;
    }
    Ok(())
}

/// Urgent jobs that ended are no longer; those that wait come next.
async fn serve_urgent(
    transaction: &Transaction<'_>,
    ends: &[(&Settlement, &Held)],
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    let (mut ended, mut uncounted, mut lines) = (Vec::new(), Vec::new(), Vec::new());
    for (end, held) in ends.iter().filter(|(_, held)| held.has_urgent) {
        let line = end.lease.line_id;
        match (held.urgent_seq, &end.kind) {
            (Some(seq), SettlementKind::Ended { .. }) => {
                ended.push((line, seq));
                lines.push(line);
            }
            // It keeps its own delay.
            (Some(_), SettlementKind::Retry { .. } | SettlementKind::AwaitSlot { throttled: Some(_), .. }) => {}
            (Some(seq), SettlementKind::PutBack { .. } | SettlementKind::AwaitSlot { .. }) => {
                uncounted.push((line, seq));
            }
            (None, _) => lines.push(line),
        }
    }
    urgent::end(transaction, &ended).await?;
    urgent::uncount(transaction, &uncounted).await?;
    urgent::hurry(transaction, &lines, now).await
}
