//! Everything that can be known after a scenario: what Postgres, the broker and the double hold, and what the
//! processes wrote. Taken once and then judged by [`super::checker`], which does no I/O.

use super::broker::{Message, Received};
use keyferry::source::{Kek, Keyring};
use keyferry::store::Store;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use time::OffsetDateTime;
use tokio_postgres::Client;
use uuid::Uuid;

/// A job's row.
#[derive(Clone, Debug)]
pub struct Job {
    pub id: Uuid,
    pub principal: String,
    pub identity: Option<String>,
    /// The failed job that it does again.
    pub retry_of: Option<Uuid>,
    pub request_id: String,
    pub arn: String,
    pub line_id: i64,
    pub seq: Option<i64>,
    pub operation: String,
    pub dry_run: bool,
    pub urgent: bool,
    pub state: String,
    pub finished_at: Option<OffsetDateTime>,
    pub attempts: i32,
    pub source_key_id: Option<Uuid>,
    /// Whole seconds since 1970; `None`: never.
    pub valid_to: Option<i64>,
    pub result: Option<Value>,
    pub error: Option<Value>,
}

impl Job {
    /// The failure's code, or nothing.
    pub fn code(&self) -> &str {
        self.error.as_ref().and_then(|error| error["code"].as_str()).unwrap_or_default()
    }

    /// Whether it may call AWS for this key: a rotate does for its key in every Region.
    pub fn reaches(&self, arn: &str) -> bool {
        let placeless = |arn: &str| {
            arn.split(':').enumerate().filter(|(at, _)| *at != 3).map(|(_, part)| part.to_owned()).collect::<Vec<_>>()
        };
        self.arn == arn || (self.operation == "rotate" && placeless(&self.arn) == placeless(arn))
    }

    /// Whether the failure says that AWS may have been changed.
    pub fn aws_changed(&self) -> bool {
        self.error.as_ref().is_some_and(|error| error["aws_changed"] == true)
    }
}

/// A refusal's row.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub id: Uuid,
    pub principal: String,
    pub identity: Option<String>,
    pub identity_verified: bool,
    pub request_id: Option<String>,
    pub code: String,
    pub field: Option<String>,
    pub message: String,
    /// The fold that tells of it; `None`: it is told of by itself.
    pub fold: Option<Uuid>,
}

/// A fold's row.
#[derive(Clone, Debug)]
pub struct Fold {
    pub id: Uuid,
    pub principal: String,
    pub identity: Option<String>,
    pub code: String,
    pub count: i64,
    /// Those of them that have no row.
    pub forgotten: i64,
}

/// An audit entry.
#[derive(Clone, Debug)]
pub struct Entry {
    pub subject: Uuid,
    pub n: i32,
    pub text: String,
}

/// A source key of the local store, with the bytes that its seal holds.
#[derive(Clone, Debug)]
pub struct SourceKey {
    pub id: Uuid,
    pub name: String,
    pub kind: String,
    pub origin: String,
    /// Empty once the key is deleted.
    pub material: Vec<u8>,
}

impl SourceKey {
    /// By which the double's journal names the material.
    pub fn sha256(&self) -> String {
        hex::encode(Sha256::digest(&self.material))
    }

    /// What must be found nowhere: the material as a whole, and of a pair each private number.
    pub fn secret_parts(&self) -> Vec<Vec<u8>> {
        let numbers: Vec<Vec<u8>> = match self.kind.split('_').next() {
            _ if self.material.is_empty() => Vec::new(),
            // RSAPrivateKey: version, n, e, and from there on all is private.
            Some("RSA") => private_key_fields(&self.material).split_off(3),
            // ECPrivateKey: version, scalar.
            Some("ECC") => vec![private_key_fields(&self.material).swap_remove(1)],
            _ => Vec::new(),
        };
        // An integer can begin with a zero that its bytes do not have elsewhere.
        let numbers = numbers.into_iter().map(|number| number.into_iter().skip_while(|byte| *byte == 0).collect());
        numbers.chain([self.material.clone()]).filter(|part: &Vec<u8>| !part.is_empty()).collect()
    }
}

/// The fields of the private key within PKCS#8: version, algorithm, and an octet string that holds a sequence.
fn private_key_fields(pkcs8: &[u8]) -> Vec<Vec<u8>> {
    let outer = der_items(&der_items(pkcs8)[0]);
    der_items(&der_items(&outer[2])[0])
}

/// The contents of DER values that stand one after the other.
fn der_items(mut der: &[u8]) -> Vec<Vec<u8>> {
    let mut items = Vec::new();
    while let [_tag, first, rest @ ..] = der {
        let (length, body) = if *first < 0x80 {
            (usize::from(*first), rest)
        } else {
            let (length, body) = rest.split_at(usize::from(*first & 0x7f));
            (length.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte)), body)
        };
        let (item, next) = body.split_at(length);
        items.push(item.to_vec());
        der = next;
    }
    items
}

/// What is on record of a material of a KMS key.
#[derive(Clone, Debug)]
pub struct Material {
    pub arn: String,
    pub key_material_id: Option<String>,
    pub is_certain: bool,
    pub is_removed: bool,
}

/// A line's row.
#[derive(Clone, Debug)]
pub struct Line {
    pub id: i64,
    pub head: i64,
    pub tail: i64,
    pub is_due: bool,
    pub is_leased: bool,
}

/// Bytes that must be found nowhere.
#[derive(Clone, Debug)]
pub struct Secret {
    pub name: String,
    pub bytes: Vec<u8>,
}

/// All of it.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Every message, in the order of publication, copies too.
    pub published: Vec<Message>,
    /// How many of the different ones are another spelling of one before.
    pub respelt: usize,
    /// Messages that were refused, and accepted when they were sent again.
    pub redriven: usize,
    pub jobs: Vec<Job>,
    pub refusals: Vec<Refusal>,
    pub folds: Vec<Fold>,
    pub audit: Vec<Entry>,
    pub source_keys: Vec<SourceKey>,
    /// SHA-256 of the material of keys on KMIP servers, by connection and identifier.
    pub dsm_keys: BTreeMap<String, String>,
    pub materials: Vec<Material>,
    /// Ids of holds, released or not.
    pub holds: Vec<Uuid>,
    pub lines: Vec<Line>,
    /// What is left in tables and queues that empty themselves.
    pub left: BTreeMap<String, i64>,
    pub events: Vec<Received>,
    pub dead: Vec<Vec<u8>>,
    pub journal: Vec<Value>,
    pub kms_keys: Vec<Value>,
    pub secrets: Vec<Secret>,
    /// Every text and every byte string of every table, logs and events, each with its place.
    pub texts: Vec<(String, Vec<u8>)>,
}

impl Snapshot {
    /// Reads what Postgres holds.
    pub async fn of_store(client: &Client, store: &Store, kek: &str) -> Self {
        let mut left = BTreeMap::new();
        for table in ["outbox", "progress", "future", "urgent", "cancellation"] {
            let count: i64 = client.query_one(&format!("select count(*) from {table}"), &[]).await.unwrap().get(0);
            left.insert(table.to_owned(), count);
        }
        // Of each principal, and of each account and Region, how far the count of its waiting jobs is off.
        let off = "
            select coalesce(sum(abs(off)), 0)::bigint from (
                select sum(waiting) as off from (
                    select principal, waiting from backlog union all select principal, change from backlog_change
                    union all select principal, -1 from job where state = 'waiting') as known
                group by principal
                union all
                select sum(waiting) from (
                    select account, region, waiting from lane_backlog
                    union all select account, region, change from backlog_change where account is not null
                    union all select split_part(arn, ':', 5), split_part(arn, ':', 4), -1
                    from job join kms_key on kms_key.id = job.kms_key_id where job.state = 'waiting') as known
                group by account, region) as each";
        left.insert("the backlog's count".into(), client.query_one(off, &[]).await.unwrap().get(0));
        let untold = "select count(*) from refusal_fold where told_at is null";
        left.insert("folds".into(), client.query_one(untold, &[]).await.unwrap().get(0));
        let holds = client.query("select id from hold", &[]).await.unwrap();
        Self {
            holds: holds.iter().map(|row| row.get(0)).collect(),
            jobs: jobs(client).await,
            refusals: refusals(client).await,
            folds: folds(client).await,
            audit: audit(client).await,
            source_keys: source_keys(client, store, kek).await,
            materials: materials(client).await,
            lines: lines(client).await,
            texts: texts(client).await,
            left,
            ..Self::default()
        }
    }
}

/// All jobs in the order of their lines.
pub async fn jobs(client: &Client) -> Vec<Job> {
    let sql = "
        select job.id, job.request_id, kms_key.arn, job.line_id, job.seq, job.state, job.attempts, job.source_key_id,
               case when job.request::jsonb ->> 'key_expiration' = 'true'
                    then floor(extract(epoch from (job.request::jsonb ->> 'valid_to')::timestamptz))::bigint end,
               job.result, job.error, coalesce(job.request::jsonb ->> 'operation', 'import'),
               coalesce(job.request::jsonb ->> 'dry_run' = 'true', false),
               coalesce(job.request::jsonb ->> 'urgent' = 'true', false), job.finished_at, job.principal, job.identity,
               job.retry_of
        from job join kms_key on kms_key.id = job.kms_key_id order by job.line_id, job.seq";
    let rows = client.query(sql, &[]).await.unwrap();
    rows.iter()
        .map(|row| Job {
            id: row.get(0),
            request_id: row.get(1),
            arn: row.get(2),
            line_id: row.get(3),
            seq: row.get(4),
            state: row.get(5),
            attempts: row.get(6),
            source_key_id: row.get(7),
            valid_to: row.get(8),
            result: row.get(9),
            error: row.get(10),
            operation: row.get(11),
            dry_run: row.get(12),
            urgent: row.get(13),
            finished_at: row.get(14),
            principal: row.get(15),
            identity: row.get(16),
            retry_of: row.get(17),
        })
        .collect()
}

/// All refusals that are remembered, oldest first.
pub async fn refusals(client: &Client) -> Vec<Refusal> {
    let sql = "
        select id, request_id, code, field, message, principal, identity, identity_verified, fold_id
        from refused order by id";
    let rows = client.query(sql, &[]).await.unwrap();
    rows.iter()
        .map(|row| Refusal {
            id: row.get(0),
            request_id: row.get(1),
            code: row.get(2),
            field: row.get(3),
            message: row.get(4),
            principal: row.get(5),
            identity: row.get(6),
            identity_verified: row.get(7),
            fold: row.get(8),
        })
        .collect()
}

async fn folds(client: &Client) -> Vec<Fold> {
    let sql = "select id, principal, identity, code, count, forgotten from refusal_fold order by id";
    let rows = client.query(sql, &[]).await.unwrap();
    rows.iter()
        .map(|row| Fold {
            id: row.get(0),
            principal: row.get(1),
            identity: row.get(2),
            code: row.get(3),
            count: row.get(4),
            forgotten: row.get(5),
        })
        .collect()
}

async fn audit(client: &Client) -> Vec<Entry> {
    let rows = client.query("select subject, n, entry from audit_entry order by subject, n", &[]).await.unwrap();
    rows.iter().map(|row| Entry { subject: row.get(0), n: row.get(1), text: row.get(2) }).collect()
}

async fn materials(client: &Client) -> Vec<Material> {
    let sql = "
        select arn, key_material_id, imported_at is not null, removed_at is not null
        from kms_material join kms_key on kms_key.id = kms_key_id";
    let rows = client.query(sql, &[]).await.unwrap();
    rows.iter()
        .map(|row| Material {
            arn: row.get(0),
            key_material_id: row.get(1),
            is_certain: row.get(2),
            is_removed: row.get(3),
        })
        .collect()
}

async fn lines(client: &Client) -> Vec<Line> {
    let sql = "select id, head_seq, tail_seq, due_at is not null, token is not null from line order by id";
    let rows = client.query(sql, &[]).await.unwrap();
    rows.iter()
        .map(|row| Line {
            id: row.get(0),
            head: row.get(1),
            tail: row.get(2),
            is_due: row.get(3),
            is_leased: row.get(4),
        })
        .collect()
}

async fn source_keys(client: &Client, store: &Store, kek: &str) -> Vec<SourceKey> {
    let rows = client.query("select id, name, origin, kind from source_key order by id", &[]).await.unwrap();
    if rows.is_empty() {
        return Vec::new();
    }
    let kek = Kek::parse(kek).unwrap();
    let first = Keyring::new_fingerprint_key(&kek).unwrap();
    let keyring = Keyring::open(kek, &store.fingerprint_key(&first).await.unwrap()).unwrap();
    let mut keys = Vec::new();
    for row in rows {
        let (id, name): (Uuid, String) = (row.get(0), row.get(1));
        let sealed = store.sealed_source_key(&name).await.unwrap().unwrap();
        let material = sealed.open(&keyring).map(|material| material.material().expose().to_vec()).unwrap_or_default();
        keys.push(SourceKey { id, name, kind: row.get(3), origin: row.get(2), material });
    }
    keys
}

/// Every value of every table, byte strings as bytes, the rest as text.
async fn texts(client: &Client) -> Vec<(String, Vec<u8>)> {
    let sql = "
        select table_name::text, column_name::text, data_type = 'bytea' from information_schema.columns
        where table_schema = 'public' order by 1, 2";
    let mut texts = Vec::new();
    for column in client.query(sql, &[]).await.unwrap() {
        let (table, name): (String, String) = (column.get(0), column.get(1));
        let value = if column.get::<_, bool>(2) { name.clone() } else { format!("convert_to({name}::text, 'UTF8')") };
        let rows = client.query(&format!("select {value} from {table} where {name} is not null"), &[]).await.unwrap();
        texts.extend(rows.iter().map(|row| (format!("{table}.{name}"), row.get::<_, Vec<u8>>(0))));
    }
    texts
}
