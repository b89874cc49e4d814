//! What people and programs see of jobs.

use super::{Store, StoreError};
use serde_json::Value;
use time::OffsetDateTime;
use tokio_postgres::Row;
use uuid::Uuid;

/// Which jobs are listed.
#[derive(Clone, Debug, Default)]
pub struct JobFilter {
    /// `waiting`, `succeeded` or `failed`.
    pub state: Option<String>,
    /// A KMS key's ARN or the id that Keyferry gave it.
    pub key: Option<String>,
    /// The name of a batch.
    pub batch: Option<String>,
    /// Only jobs older than this one, for the next page.
    pub before: Option<Uuid>,
    /// Rows at most.
    pub limit: i64,
}

/// A job as it may be shown.
#[derive(Clone, Debug, serde::Serialize)]
pub struct JobView {
    /// The job's id; absent for a refusal.
    pub id: Option<Uuid>,
    /// The request's idempotency key.
    pub request_id: Option<String>,
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
}

const VIEW: &str = "
    job.id, job.request_id, job.state, job.request::jsonb, kms_key.arn, kms_key.id, job.seq, job.principal,
    job.accepted_at, job.finished_at,
    case when job.state = 'waiting' and line.head_seq = job.seq then line.attempt else job.attempts end,
    job.result, coalesce(job.error, progress.last_error)
    from job join kms_key on kms_key.id = job.kms_key_id
    join line on line.id = job.line_id
    left join progress on progress.job_id = job.id";

impl Store {
    /// Jobs, newest first.
    pub async fn jobs(&self, filter: &JobFilter) -> Result<Vec<JobView>, StoreError> {
        let client = self.client().await?;
        let list = format!(
            "select {VIEW}
             where ($1::text is null or job.state = $1)
               and ($2::text is null or kms_key.arn = $2 or kms_key.id::text = $2)
               and ($3::text is null or job.request::jsonb ->> 'batch' = $3)
               and ($4::uuid is null or job.id < $4)
             order by job.id desc limit $5"
        );
        let JobFilter { state, key, batch, before, limit } = filter;
        let rows = client.query(&list, &[state, key, batch, before, limit]).await?;
        Ok(rows.iter().map(job_view).collect())
    }

    /// Jobs by their ids, or by the ids that a principal gave its requests; refusals of these requests too.
    pub async fn find_jobs(&self, principal: &str, ids: &[String]) -> Result<Vec<JobView>, StoreError> {
        const REFUSED: &str = "
            select request_id, principal, refused_at, code, field, message from refusal
            where principal = $1 and id_hash = any($2) order by refused_at";
        let client = self.client().await?;
        let job_ids: Vec<Uuid> = ids.iter().filter_map(|id| Uuid::try_parse(id).ok()).collect();
        let by_id = format!("select {VIEW} where job.id = any($1)");
        let mut views: Vec<JobView> = client.query(&by_id, &[&job_ids]).await?.iter().map(job_view).collect();
        let by_request = format!(
            "select {VIEW} where job.id in (select job_id from request where principal = $1 and id_hash = any($2))"
        );
        let hashes: Vec<Vec<u8>> = ids
            .iter()
            .filter_map(|id| crate::job::RequestId::parse(id))
            .map(|id| crate::job::id_hash("", &id).to_vec())
            .collect();
        views.extend(client.query(&by_request, &[&principal, &hashes]).await?.iter().map(job_view));
        let refused = client.query(REFUSED, &[&principal, &hashes]).await?;
        views.extend(refused.iter().map(|row| JobView {
            id: None,
            request_id: row.get(0),
            state: "rejected".into(),
            operation: None,
            key: None,
            key_id: None,
            sequence: None,
            principal: row.get(1),
            accepted_at: row.get(2),
            finished_at: row.get(2),
            attempts: 0,
            request: None,
            result: None,
            error: Some(serde_json::json!({
                "code": row.get::<_, String>(3),
                "field": row.get::<_, Option<String>>(4),
                "message": row.get::<_, String>(5),
                "aws_changed": false,
            })),
        }));
        Ok(views)
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
    }
}
