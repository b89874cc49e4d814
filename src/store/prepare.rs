//! The step before AWS is changed: the choice of material and the import parameters become durable.

use super::accept::insert_audit;
use super::hold::held_jobs;
use super::lock::{Held, lock};
use super::{Ending, Lease, Replicas, Store, StoreError, together};
use crate::audit::Fact;
use crate::job::{ImportParameters, KeyArn};
use crate::source::{Fingerprint, SealedKey};
use deadpool_postgres::Transaction;
use futures_util::FutureExt as _;
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// What a job is about to do.
#[derive(Debug)]
pub struct Step {
    /// The lease under which it is written.
    pub lease: Lease,
    /// The job.
    pub job_id: Uuid,
    /// What it commits itself to.
    pub intent: Intent,
    /// What the mutating calls do: equal texts mean that repeating them changes nothing.
    pub effect: String,
    /// What the audit trail says of it.
    pub facts: Vec<Fact>,
}

/// What a job commits itself to before AWS is changed.
#[derive(Debug)]
pub enum Intent {
    /// To import one source key and no other.
    Import {
        /// The source key.
        source: Chosen,
        /// The same, if it was generated for this job and is stored with the choice.
        generated: Option<Box<SealedKey>>,
        /// Parameters to keep; `None`: those kept before are still in use.
        parameters: Option<Box<ImportParameters>>,
        /// Of a rotate: the material that was in force before it.
        rotated_from: Option<String>,
    },
    /// To give a rotate's material to the key of another Region.
    Replicate {
        /// That key.
        replica: KeyArn,
        /// AWS's id of it, the same in every Region.
        material_id: String,
        /// How far the job has come in each.
        replicas: Replicas,
        /// Parameters to keep, in the place of any others.
        parameters: Box<ImportParameters>,
    },
    /// To ask for the rotation to this material, which waits.
    Rotate {
        /// AWS's id of it.
        material_id: String,
        /// How far the job has come in the other Regions.
        replicas: Replicas,
    },
    /// To take a rotate's material away again, which waits: the end of an abandoned job.
    Remove {
        /// AWS's id of it.
        material_id: String,
    },
    /// To delete these materials and no others; none: the one of a key without material ids.
    Delete {
        /// AWS's ids.
        material_ids: Vec<String>,
    },
}

/// Which source key a job has chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chosen {
    /// One of the local store.
    Local(Uuid),
    /// One that a KMIP server holds.
    Dsm(DsmChoice),
}

/// A key on a KMIP server. The fingerprint tells whether the server gives the same bytes again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DsmChoice {
    /// The name of the connection.
    pub connection: String,
    /// The server's unique identifier.
    pub key_id: String,
    /// The name that it was asked for by, if any.
    pub key_name: Option<String>,
    /// Keyed hash of the material.
    pub fingerprint: Fingerprint,
}

impl Step {
    fn source_key_id(&self) -> Option<Uuid> {
        match &self.intent {
            Intent::Import { source: Chosen::Local(id), .. } => Some(*id),
            _ => None,
        }
    }

    fn dsm(&self) -> Option<&DsmChoice> {
        match &self.intent {
            Intent::Import { source: Chosen::Dsm(choice), .. } => Some(choice),
            _ => None,
        }
    }

    fn generated(&self) -> Option<&SealedKey> {
        match &self.intent {
            Intent::Import { generated, .. } => generated.as_deref(),
            _ => None,
        }
    }

    fn parameters(&self) -> Option<&ImportParameters> {
        match &self.intent {
            Intent::Import { parameters, .. } => parameters.as_deref(),
            Intent::Replicate { parameters, .. } => Some(parameters),
            _ => None,
        }
    }

    fn replica(&self) -> Option<&KeyArn> {
        match &self.intent {
            Intent::Replicate { replica, .. } => Some(replica),
            _ => None,
        }
    }

    fn rotated_from(&self) -> Option<&str> {
        match &self.intent {
            Intent::Import { rotated_from, .. } => rotated_from.as_deref(),
            _ => None,
        }
    }

    /// What a rotate brought, once AWS has said that the key has it, and how far it has come in the other Regions.
    fn brought(&self) -> Option<(&str, &Replicas)> {
        match &self.intent {
            Intent::Replicate { material_id, replicas, .. } | Intent::Rotate { material_id, replicas } => {
                Some((material_id, replicas))
            }
            _ => None,
        }
    }

    fn delete_ids(&self) -> Option<String> {
        match &self.intent {
            // Ids are hex: a list of them needs no escaping. An array of arrays cannot be sent, since all of its
            // arrays must be of one length.
            Intent::Delete { material_ids } => Some(material_ids.join(",")),
            _ => None,
        }
    }
}

/// What became of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prepared {
    /// Durable: AWS may be changed now.
    Ready,
    /// The lease is another's.
    LeaseLost,
    /// The source key was deleted meanwhile.
    SourceKeyDeleted,
    /// An operator wants the job ended, and nothing stands against that.
    Ending(Ending),
    /// An operator holds what the job is within.
    Held,
}

impl Store {
    /// Writes a slice of steps, each valid only under its lease.
    pub async fn prepare(&self, steps: &[&Step]) -> Result<Vec<Prepared>, StoreError> {
        self.retrying(|| self.prepare_once(steps)).await
    }

    async fn prepare_once(&self, steps: &[&Step]) -> Result<Vec<Prepared>, StoreError> {
        // Shared: a key that is being chosen cannot be deleted at the same time.
        const PIN: &str = "select id from source_key where id = any($1) and deleted_at is null order by id for share";
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let leases: Vec<(Lease, Uuid)> = steps.iter().map(|step| (step.lease, step.job_id)).collect();
        let Some((held, now)) = lock(&transaction, &leases).await? else {
            return Ok(vec![Prepared::LeaseLost; steps.len()]);
        };

        let jobs: Vec<(Uuid, Option<&KeyArn>)> = steps.iter().map(|step| (step.job_id, step.replica())).collect();
        let on_hold = held_jobs(&transaction, &jobs).await?;
        let stopped: Vec<Option<Prepared>> = steps
            .iter()
            .map(|step| {
                let of_job = stop(step, held.get(&step.lease));
                of_job.or_else(|| on_hold.contains(&step.job_id).then_some(Prepared::Held))
            })
            .collect();
        let going_on = || steps.iter().zip(&stopped).filter(|(_, stopped)| stopped.is_none()).map(|(step, _)| *step);

        let generated: Vec<&SealedKey> = going_on().filter_map(Step::generated).collect();
        super::keys::insert_source_keys(&transaction, &generated, super::SourceKeyOrigin::Generated, now).await?;
        let sources: Vec<Uuid> = going_on().filter_map(Step::source_key_id).collect();
        let pin = transaction.prepare_cached(PIN).await?;
        let alive: HashSet<Uuid> = transaction.query(&pin, &[&sources]).await?.iter().map(|row| row.get(0)).collect();

        let outcomes: Vec<Prepared> = steps
            .iter()
            .zip(stopped)
            .map(|(step, stopped)| match stopped {
                Some(stopped) => stopped,
                None if step.source_key_id().is_none_or(|key| alive.contains(&key)) => Prepared::Ready,
                None => Prepared::SourceKeyDeleted,
            })
            .collect();
        let ready: Vec<&Step> = steps
            .iter()
            .zip(&outcomes)
            .filter(|(_, outcome)| **outcome == Prepared::Ready)
            .map(|(step, _)| *step)
            .collect();
        let mut entries = Vec::new();
        for step in &ready {
            for (n, fact) in (held[&step.lease].audit_n + 1..).zip(&step.facts) {
                entries.push((step.job_id, n, fact.entry(step.job_id, n, now)));
            }
        }
        together(vec![
            write_progress(&transaction, &ready, &held).boxed(),
            insert_audit(&transaction, entries).boxed(),
        ])
        .await?;
        transaction.commit().await?;
        self.written.entries(ready.iter().flat_map(|step| &step.facts).map(Fact::kind));
        Ok(outcomes)
    }
}

/// Why a step is not made, as far as the job itself tells.
fn stop(step: &Step, held: Option<&Held>) -> Option<Prepared> {
    match held {
        None => Some(Prepared::LeaseLost),
        // It is how the job ends.
        Some(_) if matches!(step.intent, Intent::Remove { .. }) => None,
        // What is in doubt is settled by the same call again.
        Some(held) => held.ends_as(held.is_unsettled()).map(Prepared::Ending),
    }
}

async fn write_progress(
    transaction: &Transaction<'_>,
    steps: &[&Step],
    held: &HashMap<Lease, Held>,
) -> Result<(), StoreError> {
    // A choice that was committed before stays: the caller has read it and brings the same.
    const WRITE: &str = "
        insert into progress (job_id, source_key_id, effect, in_doubt, audit_n, wrapping_algorithm, wrapping_key_spec,
                              public_key, import_token, parameters_valid_to, delete_ids,
                              dsm_connection, dsm_key_id, dsm_key_name, dsm_fingerprint, dsm_fingerprint_version,
                              key_material_id, replicas, rotation_sent, parameters_region, rotated_from)
        select job_id, source_key_id, effect, true, audit_n, algorithm, key_spec, public_key, import_token, valid_to,
               string_to_array(delete_ids, ','), connection, key_id, key_name, fingerprint, version,
               material_id, replicas, rotates, parameters_region, rotated_from
        from unnest($1::uuid[], $2::uuid[], $3::text[], $4::integer[], $5::text[], $6::text[], $7::bytea[], $8::bytea[],
                    $9::timestamptz[], $10::text[], $11::text[], $12::text[], $13::text[], $14::bytea[], $15::integer[],
                    $16::text[], $17::jsonb[], $18::boolean[], $19::text[], $20::text[])
             as new(job_id, source_key_id, effect, audit_n, algorithm, key_spec, public_key, import_token, valid_to,
                    delete_ids, connection, key_id, key_name, fingerprint, version, material_id, replicas, rotates,
                    parameters_region, rotated_from)
        on conflict (job_id) do update set
            source_key_id = coalesce(progress.source_key_id, excluded.source_key_id),
            dsm_connection = coalesce(progress.dsm_connection, excluded.dsm_connection),
            dsm_key_id = coalesce(progress.dsm_key_id, excluded.dsm_key_id),
            dsm_key_name = coalesce(progress.dsm_key_name, excluded.dsm_key_name),
            dsm_fingerprint = coalesce(progress.dsm_fingerprint, excluded.dsm_fingerprint),
            dsm_fingerprint_version = coalesce(progress.dsm_fingerprint_version, excluded.dsm_fingerprint_version),
            delete_ids = coalesce(progress.delete_ids, excluded.delete_ids),
            effect = excluded.effect,
            in_doubt = true,
            audit_n = excluded.audit_n,
            key_material_id = coalesce(excluded.key_material_id, progress.key_material_id),
            replicas = coalesce(excluded.replicas, progress.replicas),
            rotation_sent = excluded.rotation_sent or progress.rotation_sent,
            wrapping_algorithm = coalesce(excluded.wrapping_algorithm, progress.wrapping_algorithm),
            wrapping_key_spec = coalesce(excluded.wrapping_key_spec, progress.wrapping_key_spec),
            public_key = coalesce(excluded.public_key, progress.public_key),
            import_token = coalesce(excluded.import_token, progress.import_token),
            parameters_valid_to = coalesce(excluded.parameters_valid_to, progress.parameters_valid_to),
            parameters_region = coalesce(excluded.parameters_region, progress.parameters_region),
            -- That of the first call which may have brought something.
            rotated_from = case when progress.in_doubt then coalesce(progress.rotated_from, excluded.rotated_from)
                                else coalesce(excluded.rotated_from, progress.rotated_from) end";
    if steps.is_empty() {
        return Ok(());
    }
    let jobs: Vec<Uuid> = steps.iter().map(|step| step.job_id).collect();
    let sources: Vec<Option<Uuid>> = steps.iter().map(|step| step.source_key_id()).collect();
    let effects: Vec<&str> = steps.iter().map(|step| step.effect.as_str()).collect();
    let counts: Vec<i32> =
        steps.iter().map(|step| held[&step.lease].audit_n + i32::try_from(step.facts.len()).unwrap_or(0)).collect();
    let of = |step: &&Step| step.parameters().map(|set| set.wrapping.algorithm.as_str());
    let algorithms: Vec<Option<&str>> = steps.iter().map(of).collect();
    let specs: Vec<Option<&str>> =
        steps.iter().map(|step| step.parameters().map(|set| set.wrapping.key_spec.as_str())).collect();
    let public_keys: Vec<Option<&[u8]>> =
        steps.iter().map(|step| step.parameters().map(|set| set.public_key.as_slice())).collect();
    let tokens: Vec<Option<&[u8]>> =
        steps.iter().map(|step| step.parameters().map(|set| set.import_token.as_slice())).collect();
    let ends: Vec<Option<time::OffsetDateTime>> =
        steps.iter().map(|step| step.parameters().map(|set| set.valid_to)).collect();
    let delete_ids: Vec<Option<String>> = steps.iter().map(|step| step.delete_ids()).collect();
    let dsm: Vec<Option<&DsmChoice>> = steps.iter().map(|step| step.dsm()).collect();
    let connections: Vec<Option<&str>> = dsm.iter().map(|key| key.map(|key| key.connection.as_str())).collect();
    let key_ids: Vec<Option<&str>> = dsm.iter().map(|key| key.map(|key| key.key_id.as_str())).collect();
    let key_names: Vec<Option<&str>> = dsm.iter().map(|key| key.and_then(|key| key.key_name.as_deref())).collect();
    let fingerprints: Vec<Option<&[u8]>> =
        dsm.iter().map(|key| key.map(|key| key.fingerprint.hash.as_slice())).collect();
    let versions: Vec<Option<i32>> = dsm.iter().map(|key| key.map(|key| key.fingerprint.version)).collect();
    let brought: Vec<Option<(&str, &Replicas)>> = steps.iter().map(|step| step.brought()).collect();
    let material_ids: Vec<Option<&str>> = brought.iter().map(|brought| Some(brought.as_ref()?.0)).collect();
    let replicas: Vec<Option<Value>> = brought.iter().map(|brought| brought.as_ref()?.1.stored()).collect();
    let rotates: Vec<bool> = steps.iter().map(|step| matches!(step.intent, Intent::Rotate { .. })).collect();
    let regions: Vec<Option<&str>> =
        steps.iter().map(|step| step.parameters().map(|set| set.region.as_str())).collect();
    let rotated_from: Vec<Option<&str>> = steps.iter().map(|step| step.rotated_from()).collect();
    let values: [&(dyn ToSql + Sync); 20] = [
        &jobs,
        &sources,
        &effects,
        &counts,
        &algorithms,
        &specs,
        &public_keys,
        &tokens,
        &ends,
        &delete_ids,
        &connections,
        &key_ids,
        &key_names,
        &fingerprints,
        &versions,
        &material_ids,
        &replicas,
        &rotates,
        &regions,
        &rotated_from,
    ];
    let write = transaction.prepare_cached(WRITE).await?;
    transaction.execute(&write, &values).await?;
    Ok(())
}
