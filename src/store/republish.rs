//! Events that are told again. The outbox forgets an event once the broker has confirmed it; it is made again from its
//! job's row, byte for byte, since nothing that an event tells changes after its job's end.

use super::accept::{insert_audit, insert_events};
use super::batch::{JobPage, LOOK};
use super::{Store, StoreError};
use crate::audit::{Fact, Kind};
use crate::job::{Event, JobSummary, KeyArn, Request, RequestId};
use serde_json::{Value, json};
use time::{Duration, OffsetDateTime};
use tokio_postgres::Row;
use uuid::Uuid;

/// Events that one transaction puts into the outbox at most.
pub const REPUBLISH_PAGE: usize = 200;

/// A job joins its line at most 30 days after it was accepted, and is given three days, and one more to be settled, unless
/// its request says otherwise. An hour is for the clocks of the workers, which give the ids.
const LONGEST_LIFE: Duration = Duration::hours(34 * 24 + 1);
const CLOCKS: Duration = Duration::hours(1);

/// Which jobs' events are told again.
#[derive(Clone, Debug)]
pub enum Told {
    /// Those of a batch.
    OfBatch(String),
    /// Those that ended in this time, the end not included. One that was accepted more than 34 days before is not among
    /// them.
    Between(OffsetDateTime, OffsetDateTime),
}

/// One run of a command that tells events again.
#[derive(Clone, Debug)]
pub struct Republication {
    /// By which the audit trail knows it.
    pub id: Uuid,
    /// Who.
    pub operator: String,
}

/// What became of a page of events.
#[derive(Debug, Default)]
pub struct Republished {
    /// How many are in the outbox now.
    pub events: u64,
    /// Why others are not.
    pub unreadable: Vec<String>,
}

impl Store {
    /// A page of jobs: those that have ended, with one outcome only if one is given.
    pub async fn ended_jobs(&self, told: &Told, outcome: Option<&str>, after: Uuid) -> Result<JobPage, StoreError> {
        const OF_BATCH: &str = "
            select id, state <> 'waiting' and ($3::text is null or state = $3) from (
                select id, state from job where batch = $1 and id > $2 order by batch, id limit $4) as job order by id";
        const BETWEEN: &str = "
            select id, coalesce(finished_at >= $1 and finished_at < $2, false) and ($5::text is null or state = $5) from (
                select id, state, finished_at from job where id > $3 and id < $4 order by id limit $6) as job order by id";
        let client = self.client().await?;
        let rows = match told {
            Told::OfBatch(batch) => {
                let read = client.prepare_cached(OF_BATCH).await?;
                client.query(&read, &[&batch, &after, &outcome, &LOOK]).await?
            }
            Told::Between(since, until) => {
                let (first, last) = (first_id(*since - LONGEST_LIFE), first_id(*until + CLOCKS));
                let read = client.prepare_cached(BETWEEN).await?;
                client.query(&read, &[since, until, &after.max(first), &last, &outcome, &LOOK]).await?
            }
        };
        Ok(JobPage::of(&rows))
    }

    /// Whether fewer than `most` events are in the outbox, those included that the broker would not take.
    pub async fn outbox_has_room(&self, most: i64) -> Result<bool, StoreError> {
        const COUNT: &str = "
            select count(*) < $1 from (select from outbox limit $1) as waiting";
        self.retrying(|| async {
            let client = self.client().await?;
            let count = client.prepare_cached(COUNT).await?;
            Ok(client.query_one(&count, &[&most]).await?.get(0))
        })
        .await
    }

    /// Puts the events of up to [`REPUBLISH_PAGE`] jobs into the outbox once more, with an entry of the audit trail that
    /// names them: the `n`th of this republication. Jobs that have not ended have none.
    pub async fn republish(
        &self,
        republication: &Republication,
        n: i32,
        jobs: &[Uuid],
    ) -> Result<Republished, StoreError> {
        self.retrying(|| self.republish_once(republication, n, jobs)).await
    }

    async fn republish_once(
        &self,
        Republication { id, operator }: &Republication,
        n: i32,
        jobs: &[Uuid],
    ) -> Result<Republished, StoreError> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let rows = transaction.query(READ, &[&jobs]).await?;
        let now: OffsetDateTime = transaction.query_one("select keyferry_now()", &[]).await?.get(0);
        let (mut events, mut republished) = (Vec::new(), Republished::default());
        for row in &rows {
            match event(row) {
                Some(event) => events.push(event),
                None => republished.unreadable.push(format!(
                    "job {} cannot be read; was it written by a newer version? Use that one",
                    row.get::<_, Uuid>(0)
                )),
            }
        }
        if events.is_empty() {
            return Ok(republished);
        }
        insert_events(&transaction, &events).await?;
        let told: Vec<Uuid> = events.iter().map(|event| event.id).collect();
        let fact = Fact::new(Kind::EventsRepublished, json!({"operator": operator, "events": told}));
        insert_audit(&transaction, vec![(*id, n, fact.entry(*id, n, now))]).await?;
        transaction.commit().await?;
        republished.events = events.len() as u64;
        Ok(republished)
    }
}

/// Below every id of its millisecond: ids begin with the time.
fn first_id(at: OffsetDateTime) -> Uuid {
    let milliseconds = u128::try_from(at.unix_timestamp_nanos() / 1_000_000).unwrap_or_default();
    Uuid::from_u128(milliseconds << 80)
}

const READ: &str = "
    select job.id, job.state, job.result, job.error, job.finished_at, job.seq, kms_key.arn, job.principal,
           job.request_source, job.request_id, job.request, job.accepted_at, job.traceparent, job.retry_of
    from job join kms_key on kms_key.id = job.kms_key_id
    where job.id = any($1) and job.state <> 'waiting'
    order by job.finished_at, job.id";

fn event(row: &Row) -> Option<Event> {
    let request_id = RequestId::parse(row.get(9))?;
    let request = Request::from_canonical(row.get(10), request_id, row.get(8)).ok()?;
    let summary = JobSummary {
        id: row.get(0),
        key: KeyArn::parse(row.get(6)).ok()?,
        retry_of: row.get(13),
        principal: row.get(7),
        request_id: request.id.as_str().to_owned(),
        operation: request.operation().as_str(),
        dry_run: request.dry_run,
        batch: request.batch.clone(),
        // One that never joined its line has none.
        sequence: row.get::<_, Option<i64>>(5).unwrap_or(0),
        accepted_at: row.get(11),
        traceparent: row.get(12),
    };
    let (result, error): (Option<Value>, Option<Value>) = (row.get(2), row.get(3));
    let end = match row.get(1) {
        "succeeded" => Ok(result?),
        _ => Err(error?),
    };
    Some(Event::of_end(&summary, end.as_ref(), row.get::<_, Option<OffsetDateTime>>(4)?))
}
