//! A job's row as its event tells of it.

use crate::job::{JobSummary, KeyArn, Request, RequestId};
use tokio_postgres::Row;
use uuid::Uuid;

/// The columns of [`summary`], first in their statement.
macro_rules! summary_columns {
    () => {
        "job.id, job.request_source, job.request_id, job.request, kms_key.arn, job.principal, job.seq, job.accepted_at,
           job.traceparent, job.retry_of"
    };
}
pub(super) use summary_columns;

/// How many these are.
pub(super) const COLUMNS: usize = 10;

/// What the event of a job says of it; or that this version cannot read it.
pub(super) fn summary(row: &Row) -> Result<JobSummary, String> {
    parse(row).ok_or_else(|| unreadable(row.get(0)))
}

fn parse(row: &Row) -> Option<JobSummary> {
    let request_id = RequestId::parse(row.get(2))?;
    let request = Request::from_canonical(row.get(3), request_id, row.get(1)).ok()?;
    Some(JobSummary {
        id: row.get(0),
        key: KeyArn::parse(row.get(4)).ok()?,
        retry_of: row.get(9),
        principal: row.get(5),
        request_id: request.id.as_str().to_owned(),
        operation: request.operation().as_str(),
        dry_run: request.dry_run,
        batch: request.batch.clone(),
        // One that has not joined its line has none.
        sequence: row.get::<_, Option<i64>>(6).unwrap_or(0),
        accepted_at: row.get(7),
        traceparent: row.get(8),
    })
}

/// Of a row that this version cannot read.
pub(super) fn unreadable(id: Uuid) -> String {
    format!("job {id} cannot be read; was it written by a newer version? Use that one")
}
