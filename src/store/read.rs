//! What people and programs see of jobs.

use super::{Store, StoreError};
use crate::job::RequestId;
use deadpool_postgres::GenericClient;
use serde_json::Value;
use std::collections::HashMap;
use time::OffsetDateTime;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};
use uuid::Uuid;

/// Which jobs are listed.
#[derive(Clone, Debug, Default)]
pub struct JobFilter {
    /// `waiting`, `succeeded` or `failed`. Jobs are read, newest first, until enough are in this state.
    pub state: Option<String>,
    /// A KMS key's ARN or the id that Keyferry gave it. Its jobs are read alone, along its line.
    pub key: Option<String>,
    /// The name of a batch. Its jobs are read alone, unless a key is given too.
    pub batch: Option<String>,
    /// Only jobs that would be listed after this one, for the next page.
    pub before: Option<Uuid>,
    /// Rows at most.
    pub limit: i64,
}

/// A job as it may be shown.
#[derive(Clone, Debug, serde::Serialize)]
pub struct JobView {
    /// The job's id; a refusal's own, which is its event's too.
    pub id: Uuid,
    /// The request's idempotency key.
    pub request_id: Option<String>,
    /// The CloudEvents source within which that key is unique, else empty; absent for a refusal.
    pub source: Option<String>,
    /// `waiting`, `succeeded`, `failed` or `rejected`.
    pub state: String,
    /// The operation.
    pub operation: Option<String>,
    /// The KMS key's ARN.
    pub key: Option<String>,
    /// Keyferry's name of the KMS key.
    pub key_id: Option<Uuid>,
    /// Place in the line; absent while the job waits for its `not_before`.
    pub sequence: Option<i64>,
    /// Who asked.
    pub principal: String,
    /// When it was accepted, or refused.
    #[serde(with = "time::serde::rfc3339")]
    pub accepted_at: OffsetDateTime,
    /// When it ended.
    #[serde(with = "time::serde::rfc3339::option")]
    pub finished_at: Option<OffsetDateTime>,
    /// Attempts made so far.
    pub attempts: i32,
    /// The request in canonical form.
    pub request: Option<Value>,
    /// The result, in the original call's shape.
    pub result: Option<Value>,
    /// Why it failed or was refused; for a waiting job, why its last attempt did.
    pub error: Option<Value>,
    /// How far a rotate that has not ended has come in the other Regions.
    pub replicas: Option<Value>,
    /// The failed job that this one does again.
    pub retry_of: Option<Uuid>,
    /// The job that does this failed one again.
    pub retried_by: Option<Uuid>,
}

const COLUMNS: &str = "
    job.id, job.request_id, job.state, job.request::jsonb, kms_key.arn, kms_key.id, job.seq, job.principal,
    job.accepted_at, job.finished_at,
    coalesce(urgent.attempt,
             case when job.state = 'waiting' and line.head_seq = job.seq then line.attempt else job.attempts end),
    job.result, coalesce(job.error, progress.last_error), job.request_source, job.retry_of,
    case when job.state = 'failed' then (select retry.id from job as retry where retry.retry_of = job.id) end,
    progress.replicas";
const TABLES: &str = "
    from job join kms_key on kms_key.id = job.kms_key_id
    join line on line.id = job.line_id
    left join progress on progress.job_id = job.id
    left join urgent on urgent.line_id = job.line_id and urgent.seq = job.seq";
/// The first job of each request.
const REQUESTS: &str = "select id_hash, job_id from request where principal = $1 and id_hash = any($2)";
const REFUSAL: &str = "select id, request_id, principal, refused_at, code, field, message, id_hash from refused";

impl Store {
    /// Jobs, newest first; those of one key by their place in its line, last first. Nothing when the key is unknown.
    pub async fn jobs(&self, filter: &JobFilter) -> Result<Option<Vec<JobView>>, StoreError> {
        // Backwards along the primary key, or along the index of batches.
        const ALL: &str = "job.id < $4 order by job.id desc";
        const OF_BATCH: &str = "job.batch = $2 and job.id < $4 order by job.batch desc, job.id desc";
        // Backwards along the unique index on line and place. A line can be that of several keys; jobs that have no
        // place yet come first.
        const OF_KEY: &str = "job.line_id = $5 and job.kms_key_id = $6";
        const BEFORE_ID: &str = "(job.seq is not null or job.id < $4) order by job.seq desc, job.id desc";
        const BEFORE_PLACE: &str = "
            job.seq < (select other.seq from job as other where other.id = $4 and other.line_id = $5)
            order by job.seq desc";
        const HAS_PLACE: &str = "select seq is not null from job where id = $1";
        let client = self.client().await?;
        let JobFilter { state, key, batch, before, limit } = filter;
        let mut which = if batch.is_some() { OF_BATCH } else { ALL }.to_owned();
        let before_id = before.unwrap_or(Uuid::max());
        let mut values: Vec<&(dyn ToSql + Sync)> = vec![state, batch, limit, &before_id];
        let names;
        if let Some(key) = key {
            let Some(found) = find_key(&client, key).await? else { return Ok(None) };
            names = found;
            let placed = match before {
                Some(before) => client.query_opt(HAS_PLACE, &[before]).await?.is_none_or(|row| row.get(0)),
                None => false,
            };
            which = format!("{OF_KEY} and {}", if placed { BEFORE_PLACE } else { BEFORE_ID });
            values.extend([&names.0 as &(dyn ToSql + Sync), &names.1]);
        }
        let list = format!(
            "select {COLUMNS} {TABLES}
             where ($1::text is null or job.state = $1)
               and ($2::text is null or job.batch = $2)
               and {which} limit $3"
        );
        Ok(Some(client.query(&list, &values).await?.iter().map(job_view).collect()))
    }

    /// Jobs and refusals by their ids, or by the ids that a principal gave its requests within a CloudEvents source;
    /// each beside the id by which it was asked for. A request's id means the last of its job's retries, a job's own id
    /// just that job. Refusals come oldest first.
    pub async fn find_jobs(
        &self,
        principal: &str,
        source: &str,
        ids: &[String],
    ) -> Result<Vec<(String, JobView)>, StoreError> {
        let client = self.client().await?;
        // Several spellings can be one job's id, and each of them another request's.
        let mut own: HashMap<Uuid, Vec<&String>> = HashMap::new();
        for id in ids {
            if let Ok(parsed) = Uuid::try_parse(id) {
                own.entry(parsed).or_default().push(id);
            }
        }
        let own_ids: Vec<Uuid> = own.keys().copied().collect();
        let requests: HashMap<Vec<u8>, &String> = ids
            .iter()
            .filter_map(|id| Some((crate::job::id_hash(source, &RequestId::parse(id)?).to_vec(), id)))
            .collect();
        let hashes: Vec<&[u8]> = requests.keys().map(Vec::as_slice).collect();
        let mut found = Vec::new();
        let mut add = |asked: Option<&[&String]>, view: &JobView| {
            found.extend(asked.into_iter().flatten().map(|asked| ((*asked).clone(), view.clone())));
        };

        let by_id = format!("select {COLUMNS} {TABLES} where job.id = any($1)");
        for row in client.query(&by_id, &[&own_ids]).await? {
            let view = job_view(&row);
            add(own.get(&view.id).map(Vec::as_slice), &view);
        }
        let firsts = client.query(REQUESTS, &[&principal, &hashes]).await?;
        let firsts: HashMap<Uuid, &String> =
            firsts.iter().filter_map(|row| Some((row.get(1), *requests.get(row.get::<_, &[u8]>(0))?))).collect();
        let lasts = last_retries(&client, &firsts.keys().copied().collect::<Vec<_>>()).await?;
        let meant: HashMap<Uuid, &String> =
            firsts.iter().map(|(first, asked)| (*lasts.get(first).unwrap_or(first), *asked)).collect();
        for row in client.query(&by_id, &[&meant.keys().copied().collect::<Vec<_>>()]).await? {
            let view = job_view(&row);
            add(meant.get(&view.id).map(std::slice::from_ref), &view);
        }
        // Whoever knows a refusal's id has seen its event: no principal is asked for, as for a job's id.
        let refused_by_id = format!("{REFUSAL} where id = any($1)");
        for row in client.query(&refused_by_id, &[&own_ids]).await? {
            let view = refusal_view(&row);
            add(own.get(&view.id).map(Vec::as_slice), &view);
        }
        let refused = format!("{REFUSAL} where principal = $1 and id_hash = any($2) order by refused_at");
        for row in client.query(&refused, &[&principal, &hashes]).await? {
            add(requests.get(row.get::<_, &[u8]>(7)).map(std::slice::from_ref), &refusal_view(&row));
        }
        Ok(found)
    }

    /// The failed jobs of which this one is a retry, the last one first.
    pub async fn retried_before(&self, id: Uuid) -> Result<Vec<JobView>, StoreError> {
        const BEFORE: &str = "
            with recursive chain(id, step) as (
                select retry_of, 1 from job where id = $1 and retry_of is not null
                union all
                select job.retry_of, chain.step + 1 from chain join job on job.id = chain.id where job.retry_of is not null
            )
            select id from chain order by step";
        let client = self.client().await?;
        let ids: Vec<Uuid> = client.query(BEFORE, &[&id]).await?.iter().map(|row| row.get(0)).collect();
        let read = format!("select {COLUMNS} {TABLES} where job.id = any($1)");
        let mut views: Vec<JobView> = client.query(&read, &[&ids]).await?.iter().map(job_view).collect();
        views.sort_by_key(|view| ids.iter().position(|id| *id == view.id));
        Ok(views)
    }
}

/// The last of each job's retries, by the job: itself, if it was not retried.
pub(super) async fn last_retries(client: &impl GenericClient, ids: &[Uuid]) -> Result<HashMap<Uuid, Uuid>, StoreError> {
    // Depth first along the index of retries; a chain is as long as somebody was patient.
    const LAST: &str = "
        with recursive chain(asked, id, step) as (
            select id, id, 0 from unnest($1::uuid[]) as asked(id)
            union all
            select chain.asked, job.id, chain.step + 1 from chain join job on job.retry_of = chain.id
        )
        select distinct on (asked) asked, id from chain order by asked, step desc";
    if ids.is_empty() {
        return Ok(HashMap::new());
    }
    Ok(client.query(LAST, &[&ids]).await?.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// The line and the id of a KMS key, by its ARN or its id.
async fn find_key(client: &Client, key: &str) -> Result<Option<(i64, Uuid)>, StoreError> {
    const FIND: &str = "select line_id, id from kms_key where";
    let row = match Uuid::try_parse(key) {
        Ok(id) => client.query_opt(&format!("{FIND} id = $1"), &[&id]).await?,
        Err(_) => client.query_opt(&format!("{FIND} arn = $1"), &[&key]).await?,
    };
    Ok(row.map(|row| (row.get(0), row.get(1))))
}

fn refusal_view(row: &Row) -> JobView {
    JobView {
        id: row.get(0),
        request_id: row.get(1),
        source: None,
        state: "rejected".into(),
        operation: None,
        key: None,
        key_id: None,
        sequence: None,
        principal: row.get(2),
        accepted_at: row.get(3),
        finished_at: row.get(3),
        attempts: 0,
        request: None,
        result: None,
        error: Some(serde_json::json!({
            "code": row.get::<_, String>(4),
            "field": row.get::<_, Option<String>>(5),
            "message": row.get::<_, String>(6),
            "aws_changed": false,
        })),
        replicas: None,
        retry_of: None,
        retried_by: None,
    }
}

fn job_view(row: &Row) -> JobView {
    let request: Value = row.get(3);
    JobView {
        id: row.get(0),
        request_id: row.get(1),
        state: row.get(2),
        operation: Some(request.get("operation").and_then(Value::as_str).unwrap_or("import").to_owned()),
        request: Some(request),
        key: row.get(4),
        key_id: row.get(5),
        sequence: row.get(6),
        principal: row.get(7),
        accepted_at: row.get(8),
        finished_at: row.get(9),
        attempts: row.get(10),
        result: row.get(11),
        error: row.get(12),
        source: row.get(13),
        retry_of: row.get(14),
        retried_by: row.get(15),
        replicas: row.get(16),
    }
}
