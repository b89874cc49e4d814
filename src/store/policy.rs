//! Which policies workers judge by, and what refusals are remembered of.

use super::{Store, StoreError};
use std::collections::HashMap;
use time::OffsetDateTime;
use uuid::Uuid;

/// A refusal, as far as a message that is sent again is compared with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusalRecord {
    /// By which the message is known.
    pub id_hash: Vec<u8>,
    /// What it says.
    pub digest: Vec<u8>,
    /// Why it was refused.
    pub code: String,
    /// Who sent it, as far as that was told.
    pub identity: Option<String>,
    /// Whether that was proved.
    pub identity_verified: bool,
}

impl Store {
    /// Notes that a worker judges by this policy from now on; when that is.
    pub async fn record_policy(&self, digest: &str) -> Result<OffsetDateTime, StoreError> {
        const RECORD: &str = "
            insert into policy_load (digest, loaded_at) values ($1, keyferry_now())
            on conflict (digest) do update set loaded_at = excluded.loaded_at
            returning loaded_at";
        self.retrying(|| async {
            let client = self.client().await?;
            let record = client.prepare_cached(RECORD).await?;
            Ok(client.query_one(&record, &[&digest]).await?.get(0))
        })
        .await
    }

    /// The digest of the policy that a worker loaded last.
    pub async fn newest_policy(&self) -> Result<Option<String>, StoreError> {
        self.retrying(|| async {
            let client = self.client().await?;
            let newest =
                client.prepare_cached("select digest from policy_load order by loaded_at desc, digest limit 1").await?;
            Ok(client.query_opt(&newest, &[]).await?.map(|row| row.get(0)))
        })
        .await
    }

    /// Refusals by their ids.
    pub async fn refusals(&self, ids: &[Uuid]) -> Result<HashMap<Uuid, RefusalRecord>, StoreError> {
        const READ: &str = "
            select id, id_hash, digest, code, identity, identity_verified from refused where id = any($1)";
        if ids.is_empty() {
            return Ok(HashMap::new());
        }
        self.retrying(|| async {
            let client = self.client().await?;
            let read = client.prepare_cached(READ).await?;
            let rows = client.query(&read, &[&ids]).await?;
            let record = |row: &tokio_postgres::Row| RefusalRecord {
                id_hash: row.get(1),
                digest: row.get(2),
                code: row.get(3),
                identity: row.get(4),
                identity_verified: row.get(5),
            };
            Ok(rows.iter().map(|row| (row.get(0), record(row))).collect())
        })
        .await
    }
}
