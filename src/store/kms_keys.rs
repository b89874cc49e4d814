//! What is in AWS, by our record: KMS keys, the materials that jobs brought, how the last jobs ended. Read only.

use super::{Hold, Store, StoreError};
use crate::job::KeyArn;
use deadpool_postgres::Object;
use std::collections::HashMap;
use std::time::Duration;
use time::OffsetDateTime;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// Places of a line that are looked at for jobs that have ended, before its head, from there on, and from its end. A line
/// may hold millions of jobs that wait, and some behind them that were cancelled.
const LOOK: i64 = 20;

/// Which KMS keys are listed.
#[derive(Clone, Debug, Default)]
pub struct KmsKeyFilter {
    /// Those of this account.
    pub account: Option<String>,
    /// Those of this Region.
    pub region: Option<String>,
    /// Those that hold, or may hold, or have held the material of this source key: its name or id; of a key on a KMIP server
    /// `CONNECTION/IDENTIFIER`.
    pub source_key: Option<String>,
    /// Those with a material that has expired, or expires within this time.
    pub expires_within: Option<Duration>,
    /// Only keys whose ARN comes after this one, for the next page.
    pub after: Option<String>,
    /// Rows at most.
    pub limit: i64,
}

/// A KMS key as it may be shown.
#[derive(Clone, Debug, serde::Serialize)]
pub struct KmsKeyView {
    /// The id that Keyferry gave it.
    pub id: Uuid,
    /// AWS's name of it.
    pub arn: String,
    /// Its account.
    pub account: String,
    /// Its Region.
    pub region: String,
    /// Since when it is known here.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// AWS's `KeySpec`, once a job has succeeded.
    pub kind: Option<String>,
    /// AWS's `KeyState`, as the last job that succeeded saw it.
    pub state: Option<String>,
    /// When that was.
    #[serde(with = "time::serde::rfc3339::option")]
    pub seen_at: Option<OffsetDateTime>,
    /// The material in force, as far as that is on record.
    pub current_material: Option<MaterialView>,
    /// How often it was rotated on demand, when AWS was last asked for that. AWS allows 25, for good.
    pub rotations: Option<i32>,
    /// When the first of the materials that are there ends.
    #[serde(with = "time::serde::rfc3339::option")]
    pub expires_at: Option<OffsetDateTime>,
    /// The job that ended last.
    pub last_job: Option<LastJob>,
    /// Jobs in the line from its head on, those under way included. All Regions of a key share one line, and a job that was
    /// cancelled in its middle counts until its turn would come.
    pub waiting: i64,
    /// A worker has one of them under way.
    pub is_running: bool,
    /// Until when jobs wait that would contradict a call that may still take effect.
    #[serde(with = "time::serde::rfc3339::option")]
    pub closed_until: Option<OffsetDateTime>,
    /// What stops its jobs, but for holds of principals.
    pub holds: Vec<Hold>,
    /// Every material on record, the newest last.
    pub materials: Vec<MaterialView>,
    /// ARNs of the same key in other Regions, as far as jobs have named them.
    pub other_regions: Vec<String>,
}

/// A material that a job put on a key, or may have put there.
#[derive(Clone, Debug, serde::Serialize)]
pub struct MaterialView {
    /// AWS's id of it; symmetric keys only.
    pub key_material_id: Option<String>,
    /// `local` or `dsm`.
    pub source_key_tier: String,
    /// The source key's id.
    pub source_key_id: String,
    /// Its name.
    pub source_key_name: String,
    /// Its end of life.
    #[serde(with = "time::serde::rfc3339::option")]
    pub valid_to: Option<OffsetDateTime>,
    /// When AWS took it; absent: whether it did was never learnt.
    #[serde(with = "time::serde::rfc3339::option")]
    pub imported_at: Option<OffsetDateTime>,
    /// Since when it is known to be gone.
    #[serde(with = "time::serde::rfc3339::option")]
    pub removed_at: Option<OffsetDateTime>,
    /// The last job that imported it.
    pub job_id: Uuid,
}

/// How the last job on a key ended.
#[derive(Clone, Debug, serde::Serialize)]
pub struct LastJob {
    /// The job's id.
    pub id: Uuid,
    /// The request's idempotency key.
    pub request_id: String,
    /// The operation.
    pub operation: String,
    /// `succeeded` or `failed`.
    pub state: String,
    /// Why it failed.
    pub code: Option<String>,
    /// When it ended.
    #[serde(with = "time::serde::rfc3339")]
    pub finished_at: OffsetDateTime,
}

/// `$1`: how many places are looked at, three times. The jobs that brought materials are always among those that are seen.
const SELECT: &str = "
    select kms_key.id, kms_key.arn, kms_key.created_at, line.tail_seq - line.head_seq + 1,
           line.token is not null and line.due_at > keyferry_now(),
           case when line.late_until > keyferry_now() then line.late_until end,
           last.id, last.request_id, coalesce(last.request::jsonb ->> 'operation', 'import'), last.state,
           last.error ->> 'code', last.finished_at,
           seen.finished_at, seen.result #>> '{aws_param,KeySpec}', seen.result #>> '{aws_param,KeyState}',
           seen.result #>> '{aws_param,CurrentKeyMaterialId}',
           array(select other.arn from kms_key as other
                 where other.line_id = kms_key.line_id and other.id <> kms_key.id order by other.arn),
           kms_key.rotations
    from kms_key join line on line.id = kms_key.line_id
    left join lateral (
        select (array_agg(near.id order by near.finished_at desc, near.id desc))[1] as last_id,
               (array_agg(near.id order by near.finished_at desc, near.id desc) filter (where near.has_result))[1] as seen_id
        from (
            (select id, kms_key_id, finished_at, result is not null as has_result from job
             where line_id = line.id and seq < line.head_seq order by seq desc limit $1)
            union all
            (select id, kms_key_id, finished_at, result is not null from job
             where line_id = line.id and seq >= line.head_seq order by seq limit $1)
            union all
            (select id, kms_key_id, finished_at, result is not null from job
             where line_id = line.id and seq >= line.head_seq order by seq desc limit $1)
            union all
            (select job.id, job.kms_key_id, job.finished_at, job.result is not null
             from kms_material as held join job on job.id = held.job_id where held.kms_key_id = kms_key.id)
        ) as near
        where near.kms_key_id = kms_key.id and near.finished_at is not null
    ) as ended on true
    left join job as last on last.id = ended.last_id
    left join job as seen on seen.id = ended.seen_id";

impl Store {
    /// KMS keys in the order of their ARNs.
    pub async fn kms_keys(&self, filter: &KmsKeyFilter) -> Result<Vec<KmsKeyView>, StoreError> {
        const WHICH: &str = "
            where kms_key.arn > $2
              and ($3::text is null or split_part(kms_key.arn, ':', 5) = $3)
              and ($4::text is null or split_part(kms_key.arn, ':', 4) = $4)
              and ($5::text is null or kms_key.id in (
                  select kms_key_id from kms_material
                  where source_key_id in (select id::text from source_key where name = $5 union all select $5)))
              and ($6::float8 is null or exists (
                  select from kms_material as held
                  where held.kms_key_id = kms_key.id and held.removed_at is null
                    and held.valid_to <= keyferry_now() + $6 * interval '1 s'))
            order by kms_key.arn limit $7";
        let KmsKeyFilter { account, region, source_key, expires_within, after, limit } = filter;
        let after = after.as_deref().unwrap_or_default();
        let within = expires_within.map(|within| within.as_secs_f64());
        self.kms_keys_where(WHICH, &[&LOOK, &after, account, region, source_key, &within, limit]).await
    }

    /// One KMS key, by its ARN or the id that Keyferry gave it.
    pub async fn kms_key(&self, key: &str) -> Result<Option<KmsKeyView>, StoreError> {
        let found = match Uuid::try_parse(key) {
            Ok(id) => self.kms_keys_where("where kms_key.id = $2", &[&LOOK, &id]).await?,
            Err(_) => self.kms_keys_where("where kms_key.arn = $2", &[&LOOK, &key]).await?,
        };
        Ok(found.into_iter().next())
    }

    async fn kms_keys_where(&self, which: &str, values: &[&(dyn ToSql + Sync)]) -> Result<Vec<KmsKeyView>, StoreError> {
        let holds = self.holds().await?;
        let client = self.client().await?;
        let rows = client.query(&format!("{SELECT} {which}"), values).await?;
        let ids: Vec<Uuid> = rows.iter().map(|row| row.get(0)).collect();
        let mut materials = materials(&client, &ids).await?;
        Ok(rows.iter().map(|row| view(row, materials.remove(&row.get(0)).unwrap_or_default(), &holds)).collect())
    }
}

async fn materials(client: &Object, keys: &[Uuid]) -> Result<HashMap<Uuid, Vec<MaterialView>>, StoreError> {
    const READ: &str = "
        select kms_key_id, key_material_id, source_tier, source_key_id, source_key_name, valid_to, imported_at,
               removed_at, job_id
        from kms_material where kms_key_id = any($1) order by imported_at nulls first, job_id";
    let mut found: HashMap<Uuid, Vec<MaterialView>> = HashMap::new();
    for row in client.query(READ, &[&keys]).await? {
        found.entry(row.get(0)).or_default().push(MaterialView {
            key_material_id: row.get(1),
            source_key_tier: row.get(2),
            source_key_id: row.get(3),
            source_key_name: row.get(4),
            valid_to: row.get(5),
            imported_at: row.get(6),
            removed_at: row.get(7),
            job_id: row.get(8),
        });
    }
    Ok(found)
}

fn view(row: &Row, materials: Vec<MaterialView>, holds: &[Hold]) -> KmsKeyView {
    let arn: String = row.get(1);
    let seen_current: Option<String> = row.get(15);
    let key = KeyArn::parse(&arn).ok();
    let last_job = row.get::<_, Option<Uuid>>(6).map(|id| LastJob {
        id,
        request_id: row.get(7),
        operation: row.get(8),
        state: row.get(9),
        code: row.get(10),
        finished_at: row.get(11),
    });
    let is_there = |held: &&MaterialView| held.removed_at.is_none();
    KmsKeyView {
        id: row.get(0),
        rotations: row.get(17),
        account: key.as_ref().map(|key| key.account().to_owned()).unwrap_or_default(),
        region: key.as_ref().map(|key| key.region().to_owned()).unwrap_or_default(),
        created_at: row.get(2),
        kind: row.get(13),
        state: row.get(14),
        seen_at: row.get(12),
        current_material: current(&materials, seen_current.as_deref()).cloned(),
        expires_at: materials.iter().filter(is_there).filter_map(|held| held.valid_to).min(),
        last_job,
        waiting: row.get(3),
        is_running: row.get::<_, Option<bool>>(4).unwrap_or(false),
        closed_until: row.get(5),
        holds: holds.iter().filter(|hold| key.as_ref().is_some_and(|key| stops(hold, key))).cloned().collect(),
        materials,
        other_regions: row.get(16),
        arn,
    }
}

/// The one that AWS named last; of a key without material ids, or where AWS named none, the one that AWS took last.
fn current<'a>(materials: &'a [MaterialView], seen: Option<&str>) -> Option<&'a MaterialView> {
    let named = materials.iter().find(|held| seen.is_some() && held.key_material_id.as_deref() == seen);
    let there = materials.iter().filter(|held| held.removed_at.is_none());
    named.filter(|held| held.removed_at.is_none()).or_else(|| match seen {
        // Another's is in force, or the one that is is gone.
        Some(_) if materials.iter().any(|held| held.key_material_id.is_some()) => None,
        _ => there.max_by_key(|held| held.imported_at),
    })
}

/// Whether a hold stops every job on a key.
fn stops(hold: &Hold, key: &KeyArn) -> bool {
    match hold.scope.as_str() {
        "everything" => true,
        "account" => hold.value == key.account(),
        "region" => hold.value == key.region(),
        "key" => hold.value == key.order_key(),
        _ => false,
    }
}
