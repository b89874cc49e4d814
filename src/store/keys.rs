//! Source keys of the local tier, and the fingerprint key.

use super::accept::insert_audit;
use super::{Fault, FaultKind, Store, StoreError};
use crate::audit::{Fact, Kind};
use crate::job::KeyKind;
use crate::source::{Fingerprint, SealedFingerprintKey, SealedKey};
use deadpool_postgres::Transaction;
use serde_json::json;
use time::OffsetDateTime;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// Where a source key's bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceKeyOrigin {
    /// This system's generator.
    Generated,
    /// Brought by an operator.
    Imported,
}

/// A source key that an operator makes or brings.
#[derive(Debug)]
pub struct NewSourceKey {
    /// The key, sealed.
    pub key: SealedKey,
    /// Where its bytes come from.
    pub origin: SourceKeyOrigin,
    /// Who did it, for the audit trail.
    pub operator: String,
}

/// A source key as it may be shown.
#[derive(Clone, Debug, serde::Serialize)]
pub struct KeyListing {
    /// The key's id.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// Its kind, named as AWS's `KeySpec`.
    pub kind: String,
    /// `generated` or `imported`.
    pub origin: String,
    /// Which key-encryption key seals it.
    pub kek_id: String,
    /// When it was made.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// When it was erased.
    #[serde(with = "time::serde::rfc3339::option")]
    pub deleted_at: Option<OffsetDateTime>,
    /// ARNs of the KMS keys that are, or may be, tied to its material, whether it is there now or not.
    pub used_by: Vec<String>,
}

/// Why a source key was not erased.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyDeletion {
    /// Erased.
    Deleted,
    /// No such key, or erased before.
    Unknown,
    /// KMS keys hold its material, or a job is about to import it.
    InUse(Vec<String>),
}

impl Store {
    /// The fingerprint key; `first` is stored when there is none yet.
    pub async fn fingerprint_key(&self, first: &SealedFingerprintKey) -> Result<SealedFingerprintKey, StoreError> {
        const READ: &str = "select version, sealed_key, kek_id from fingerprint_key order by version desc limit 1";
        const INSERT: &str = "
            insert into fingerprint_key (version, sealed_key, kek_id, created_at) values ($1, $2, $3, keyferry_now())
            on conflict do nothing";
        let client = self.client().await?;
        let mut row = client.query_opt(READ, &[]).await?;
        if row.is_none() {
            client.execute(INSERT, &[&first.version, &first.sealed_key, &first.kek_id]).await?;
            row = client.query_opt(READ, &[]).await?;
        }
        let row =
            row.ok_or_else(|| StoreError::Unavailable(Fault::new(FaultKind::Other, "the fingerprint key vanished")))?;
        Ok(SealedFingerprintKey { version: row.get(0), sealed_key: row.get(1), kek_id: row.get(2) })
    }

    /// Stores a source key; false when its name is taken.
    pub async fn add_source_key(&self, new: &NewSourceKey) -> Result<bool, StoreError> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let now: OffsetDateTime = transaction.query_one("select keyferry_now()", &[]).await?.get(0);
        let unless_taken = format!("{INSERT} on conflict (name) do nothing");
        if insert(&transaction, &unless_taken, &[&new.key], new.origin, now).await? == 0 {
            return Ok(false);
        }
        let kind = match new.origin {
            SourceKeyOrigin::Generated => Kind::SourceKeyCreated,
            SourceKeyOrigin::Imported => Kind::SourceKeyImported,
        };
        let details = json!({"name": new.key.name, "kind": new.key.kind.as_str(), "operator": new.operator});
        let entry = Fact::new(kind, details).entry(new.key.id, 1, now);
        insert_audit(&transaction, vec![(new.key.id, 1, entry)]).await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// Source keys, newest first and older than `before`; erased ones only when asked for.
    pub async fn source_keys(
        &self,
        with_deleted: bool,
        before: Option<Uuid>,
        limit: i64,
    ) -> Result<Vec<KeyListing>, StoreError> {
        let client = self.client().await?;
        // Ids begin with the time.
        let list = format!("{LISTING} where id < $1 and ($2 or deleted_at is null) order by id desc limit $3");
        let rows = client.query(&list, &[&before.unwrap_or(Uuid::max()), &with_deleted, &limit]).await?;
        Ok(rows.iter().map(listing).collect())
    }

    /// A source key by name or id, erased or not.
    pub async fn source_key(&self, name_or_id: &str) -> Result<Option<KeyListing>, StoreError> {
        let client = self.client().await?;
        let (column, value) = sought(name_or_id);
        let row = client.query_opt(&format!("{LISTING} where {column} = $1"), &[&*value]).await?;
        Ok(row.as_ref().map(listing))
    }

    /// A source key with its seals, by name or id.
    pub async fn sealed_source_key(&self, name_or_id: &str) -> Result<Option<SealedKey>, StoreError> {
        const READ: &str = "
            select id, name, kind, fingerprint, fingerprint_version, kek_id, sealed_material, sealed_data_key
            from source_key where";
        let client = self.client().await?;
        let (column, value) = sought(name_or_id);
        let row = client.query_opt(&format!("{READ} {column} = $1"), &[&*value]).await?;
        Ok(row.and_then(|row| {
            Some(SealedKey {
                id: row.get(0),
                name: row.get(1),
                kind: KeyKind::parse(row.get(2))?,
                fingerprint: Fingerprint { hash: row.get(3), version: row.get(4) },
                kek_id: row.get(5),
                sealed_material: row.get(6),
                sealed_data_key: row.get(7),
            })
        }))
    }

    /// Erases a source key's seals, unless a KMS key is tied to it. The name stays taken for ever, so that it
    /// never means other bytes.
    pub async fn delete_source_key(&self, name_or_id: &str, operator: &str) -> Result<KeyDeletion, StoreError> {
        const USERS: &str = "
            select kms_key.arn from kms_material join kms_key on kms_key.id = kms_material.kms_key_id
            where kms_material.source_key_id = $1::uuid::text and kms_material.is_tied
            union
            select kms_key.arn from progress join job on job.id = progress.job_id
                join kms_key on kms_key.id = job.kms_key_id
            where progress.source_key_id = $1
            order by 1";
        const ERASE: &str = "
            update source_key set sealed_material = null, sealed_data_key = null, deleted_at = $2 where id = $1";
        // Not to be chosen by a job between this look and the end of the transaction.
        let (column, value) = sought(name_or_id);
        let find = format!("select id, name from source_key where {column} = $1 and deleted_at is null for update");
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let Some(row) = transaction.query_opt(&find, &[&*value]).await? else { return Ok(KeyDeletion::Unknown) };
        let (id, name): (Uuid, String) = (row.get(0), row.get(1));
        let users: Vec<String> = transaction.query(USERS, &[&id]).await?.iter().map(|row| row.get(0)).collect();
        if !users.is_empty() {
            return Ok(KeyDeletion::InUse(users));
        }
        let now: OffsetDateTime = transaction.query_one("select keyferry_now()", &[]).await?.get(0);
        let count = "select coalesce(max(n), 0)::integer from audit_entry where subject = $1";
        let n: i32 = transaction.query_one(count, &[&id]).await?.get(0);
        transaction.execute(ERASE, &[&id, &now]).await?;
        let fact = Fact::new(Kind::SourceKeyDeleted, json!({"name": name, "operator": operator}));
        insert_audit(&transaction, vec![(id, n + 1, fact.entry(id, n + 1, now))]).await?;
        transaction.commit().await?;
        Ok(KeyDeletion::Deleted)
    }
}

const LISTING: &str = "
    select id, name, kind, origin, kek_id, created_at, deleted_at,
           array(select kms_key.arn from kms_material join kms_key on kms_key.id = kms_material.kms_key_id
                 where kms_material.source_key_id = source_key.id::text and kms_material.is_tied order by 1)
    from source_key";

const INSERT: &str = "
    insert into source_key (id, name, kind, origin, sealed_material, sealed_data_key, kek_id, fingerprint,
                            fingerprint_version, created_at)
    select id, name, kind, $9, material, data_key, kek_id, fingerprint, version, $10
    from unnest($1::uuid[], $2::text[], $3::text[], $4::bytea[], $5::bytea[], $6::text[], $7::bytea[], $8::integer[])
         as new(id, name, kind, material, data_key, kek_id, fingerprint, version)
    order by name";

/// The indexed column that finds a source key, and the value it has. A name that looks like an id is never given.
fn sought(name_or_id: &str) -> (&'static str, Box<dyn ToSql + Sync + Send + '_>) {
    match Uuid::try_parse(name_or_id) {
        Ok(id) => ("id", Box::new(id)),
        Err(_) => ("name", Box::new(name_or_id)),
    }
}

/// Inserts sealed keys whose names jobs have to themselves.
pub(super) async fn insert_source_keys(
    transaction: &Transaction<'_>,
    keys: &[&SealedKey],
    origin: SourceKeyOrigin,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    if !keys.is_empty() {
        insert(transaction, INSERT, keys, origin, now).await?;
    }
    Ok(())
}

/// The number of keys that were inserted.
async fn insert(
    transaction: &Transaction<'_>,
    statement: &str,
    keys: &[&SealedKey],
    origin: SourceKeyOrigin,
    now: OffsetDateTime,
) -> Result<u64, StoreError> {
    let origin = match origin {
        SourceKeyOrigin::Generated => "generated",
        SourceKeyOrigin::Imported => "imported",
    };
    let ids: Vec<Uuid> = keys.iter().map(|key| key.id).collect();
    let names: Vec<&str> = keys.iter().map(|key| key.name.as_str()).collect();
    let kinds: Vec<&str> = keys.iter().map(|key| key.kind.as_str()).collect();
    let materials: Vec<Option<&[u8]>> = keys.iter().map(|key| key.sealed_material.as_deref()).collect();
    let data_keys: Vec<Option<&[u8]>> = keys.iter().map(|key| key.sealed_data_key.as_deref()).collect();
    let kek_ids: Vec<&str> = keys.iter().map(|key| key.kek_id.as_str()).collect();
    let hashes: Vec<&[u8]> = keys.iter().map(|key| key.fingerprint.hash.as_slice()).collect();
    let versions: Vec<i32> = keys.iter().map(|key| key.fingerprint.version).collect();
    let statement = transaction.prepare_cached(statement).await?;
    let values: [&(dyn ToSql + Sync); 10] =
        [&ids, &names, &kinds, &materials, &data_keys, &kek_ids, &hashes, &versions, &origin, &now];
    Ok(transaction.execute(&statement, &values).await?)
}

fn listing(row: &Row) -> KeyListing {
    KeyListing {
        id: row.get(0),
        name: row.get(1),
        kind: row.get(2),
        origin: row.get(3),
        kek_id: row.get(4),
        created_at: row.get(5),
        deleted_at: row.get(6),
        used_by: row.get(7),
    }
}
