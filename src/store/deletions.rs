//! What a delete's own record says of its deletions, so that neither a later attempt nor a retry deletes again what
//! somebody has brought back meanwhile.

use super::StoreError;
use super::settle::{Removed, Settlement};
use deadpool_postgres::Transaction;
use uuid::Uuid;

/// Deletions that AWS has answered, by job.
#[derive(Default)]
pub(super) struct Deletions {
    named: Vec<Uuid>,
    /// Of each of them, joined by commas.
    ids: Vec<String>,
    /// Jobs that deleted the one material of a key without material ids.
    only: Vec<Uuid>,
}

impl Deletions {
    pub(super) fn add(&mut self, end: &Settlement) {
        match &end.removed {
            // What waited is no delete's.
            Removed::Nothing | Removed::Waiting(_) => {}
            Removed::Only => self.only.push(end.job.id),
            Removed::Materials(ids) => {
                self.named.push(end.job.id);
                self.ids.push(ids.join(","));
            }
        }
    }

    /// Writes them to the jobs' progress.
    pub(super) async fn note(&self, transaction: &Transaction<'_>) -> Result<(), StoreError> {
        const NAMED: &str = "
            update progress set deleted_ids = deleted_ids || string_to_array(deleted.ids, ',')
            from unnest($1::uuid[], $2::text[]) as deleted(job_id, ids)
            where progress.job_id = deleted.job_id";
        const ONLY: &str = "update progress set imported = true where job_id = any($1)";
        if !self.named.is_empty() {
            let note = transaction.prepare_cached(NAMED).await?;
            transaction.execute(&note, &[&self.named, &self.ids]).await?;
        }
        if !self.only.is_empty() {
            let note = transaction.prepare_cached(ONLY).await?;
            transaction.execute(&note, &[&self.only]).await?;
        }
        Ok(())
    }
}
