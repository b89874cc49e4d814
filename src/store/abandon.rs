//! What abandoned jobs may have put on their keys.

use super::{Answered, Material, StoreError};
use crate::job::{Expiry, Failure, Request, RequestId};
use crate::source::Fingerprint;
use deadpool_postgres::Transaction;
use std::collections::HashMap;
use tokio_postgres::Row;
use uuid::Uuid;

/// What AWS answered to an attempt that ends because its job is abandoned: on record like what earlier attempts learnt.
pub(super) async fn note_answers(
    transaction: &Transaction<'_>,
    answers: &[(Uuid, &Answered)],
) -> Result<(), StoreError> {
    const NOTE: &str = "
        update progress set imported = true, key_material_id = coalesce(answered.material_id, progress.key_material_id)
        from unnest($1::uuid[], $2::text[]) as answered(job_id, material_id)
        where progress.job_id = answered.job_id";
    if answers.is_empty() {
        return Ok(());
    }
    let jobs: Vec<Uuid> = answers.iter().map(|(job, _)| *job).collect();
    let ids: Vec<Option<&str>> = answers.iter().map(|(_, answer)| answer.key_material_id.as_deref()).collect();
    transaction.execute(NOTE, &[&jobs, &ids]).await?;
    Ok(())
}

/// The end of a job that may have put this on its key, where AWS had answered that it did.
pub(super) fn failure(material: &Material) -> Option<Failure> {
    material.is_certain.then(|| Failure::abandoned_after_answer(material.key_material_id.as_deref()))
}

/// The material that each of these jobs is about to import, or has imported, with the KMS key. Read before its progress is
/// forgotten; nothing for a delete.
pub(super) async fn materials(
    transaction: &Transaction<'_>,
    jobs: &[Uuid],
) -> Result<HashMap<Uuid, (Uuid, Material)>, StoreError> {
    const READ: &str = "
        select job.id, job.kms_key_id, job.request_source, job.request_id, job.request, progress.imported,
               progress.key_material_id, source.id::text, source.name, source.fingerprint, source.fingerprint_version,
               progress.dsm_connection, progress.dsm_key_id, progress.dsm_key_name, progress.dsm_fingerprint,
               progress.dsm_fingerprint_version
        from progress join job on job.id = progress.job_id
        left join source_key as source on source.id = progress.source_key_id
        where progress.job_id = any($1) and (progress.in_doubt or progress.imported)";
    if jobs.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = transaction.query(READ, &[&jobs]).await?;
    Ok(rows.iter().filter_map(|row| Some((row.get(0), (row.get(1), material(row)?)))).collect())
}

fn material(row: &Row) -> Option<Material> {
    let id = RequestId::parse(row.get(3))?;
    let request = Request::from_canonical(row.get(4), id, row.get(2)).ok()?;
    let expiry = request.work.material()?.expiry;
    let (source_tier, source_key_id, source_key_name, version, hash) = if let Some(id) = row.get::<_, Option<String>>(7)
    {
        ("local", id, row.get(8), row.get(10), row.get(9))
    } else {
        let connection: String = row.get::<_, Option<_>>(11)?;
        let id: String = row.get(12);
        let name = row.get::<_, Option<String>>(13).unwrap_or_else(|| id.clone());
        ("dsm", format!("{connection}/{id}"), format!("{connection}/{name}"), row.get(15), row.get(14))
    };
    Some(Material {
        fingerprint: Fingerprint { version, hash },
        source_tier,
        source_key_id,
        source_key_name,
        key_material_id: row.get(6),
        valid_to: match expiry {
            Expiry::At(at) => Some(at),
            Expiry::Never => None,
        },
        is_certain: row.get(5),
    })
}
