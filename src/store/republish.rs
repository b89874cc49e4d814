//! Events that are told again. The outbox forgets an event once the broker has confirmed it; it is made again from the row
//! of its job or refusal, byte for byte, since nothing that an event tells changes after that.

use super::accept::{insert_audit, insert_events};
use super::batch::{JobPage, LOOK};
use super::summary::{COLUMNS, summary, summary_columns, unreadable};
use super::{Store, StoreError, fold};
use crate::audit::{Fact, Kind};
use crate::job::{Event, KeyArn, RefusalSummary};
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
    /// Those of a batch; no refusal is of one.
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

    /// A page of refusals, and of folds of refusals that were told of.
    pub async fn refusals_told(&self, told: &Told, after: Uuid) -> Result<JobPage, StoreError> {
        // Ids of both begin with the time; a fold's can be old when it is told of, where no worker ran meanwhile.
        const BETWEEN: &str = "
            select id, coalesce(at >= $1 and at < $2, false) from (
                (select id, refused_at as at from refusal where id > $3 and id < $4 order by id limit $5)
                union all
                (select id, told_at from refusal_fold where id > $3 and id < $4 order by id limit $5)
            ) as told order by id limit $5";
        let Told::Between(since, until) = told else { return Ok(JobPage::default()) };
        let (first, last) = (first_id(*since - LONGEST_LIFE), first_id(*until + CLOCKS));
        self.retrying(|| async {
            let client = self.client().await?;
            let read = client.prepare_cached(BETWEEN).await?;
            Ok(JobPage::of(&client.query(&read, &[since, until, &after.max(first), &last, &LOOK]).await?))
        })
        .await
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

    /// Puts the events of up to [`REPUBLISH_PAGE`] jobs, refusals or folds of refusals into the outbox once more, with an
    /// entry of the audit trail that names them: the `n`th of this republication. Jobs that have not ended have none.
    pub async fn republish(
        &self,
        republication: &Republication,
        n: i32,
        ends: &[Uuid],
    ) -> Result<Republished, StoreError> {
        self.retrying(|| self.republish_once(republication, n, ends)).await
    }

    async fn republish_once(
        &self,
        Republication { id, operator }: &Republication,
        n: i32,
        ends: &[Uuid],
    ) -> Result<Republished, StoreError> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let rows = transaction.query(READ, &[&ends]).await?;
        let refusals = transaction.query(REFUSALS, &[&ends]).await?;
        let folds = transaction.query(FOLDS, &[&ends]).await?;
        let now: OffsetDateTime = transaction.query_one("select keyferry_now()", &[]).await?.get(0);
        let (mut events, mut republished) = (Vec::new(), Republished::default());
        let ends =
            rows.iter().map(of_job).chain(refusals.iter().map(of_refusal)).chain(folds.iter().map(of_fold).map(Ok));
        for end in ends {
            match end {
                Ok(event) => events.push(event),
                Err(why) => republished.unreadable.push(why),
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

const READ: &str = concat!(
    "
    select ",
    summary_columns!(),
    ", job.state, job.result, job.error, job.finished_at
    from job join kms_key on kms_key.id = job.kms_key_id
    where job.id = any($1) and job.state <> 'waiting'
    order by job.finished_at, job.id"
);

fn of_job(row: &Row) -> Result<Event, String> {
    let (summary, at) = (summary(row)?, row.get::<_, Option<OffsetDateTime>>(COLUMNS + 3));
    let (result, error): (Option<Value>, Option<Value>) = (row.get(COLUMNS + 1), row.get(COLUMNS + 2));
    let end = match row.get(COLUMNS) {
        "succeeded" => result.map(Ok),
        _ => error.map(Err),
    };
    let (Some(end), Some(at)) = (&end, at) else { return Err(unreadable(summary.id)) };
    Ok(Event::of_end(&summary, end.as_ref(), at))
}

/// Refusals that are told of one by one.
const REFUSALS: &str = "
    select id, principal, request_id, operation, key, code, field, message, traceparent, refused_at, is_whole
    from refusal where id = any($1) order by refused_at, id";

fn of_refusal(row: &Row) -> Result<Event, String> {
    let id: Uuid = row.get(0);
    if !row.get::<_, bool>(10) {
        return Err(format!("the event of the refusal {id} cannot be made again: an older version made it first"));
    }
    let arn: Option<&str> = row.get(4);
    let key = arn.map(KeyArn::parse).transpose();
    let key =
        key.map_err(|_| format!("the refusal {id} cannot be read; was it written by a newer version? Use that one"))?;
    let summary = RefusalSummary {
        id,
        principal: row.get(1),
        request_id: row.get(2),
        operation: row.get(3),
        key: key.as_ref(),
        code: row.get(5),
        field: row.get(6),
        message: row.get(7),
        traceparent: row.get(8),
    };
    Ok(Event::of_refusal(&summary, row.get(9)))
}

/// Folds that were told of: by their ids, or by that of any refusal within them.
const FOLDS: &str = "
    select id, principal, identity, ingress, code, policy, first_at, last_at, count, told_at from refusal_fold
    where told_at is not null
      and id in (select unnest($1::uuid[]) union select fold_id from refusal_folded where id = any($1))
    order by told_at, id";

fn of_fold(row: &Row) -> Event {
    Event::of_fold(&fold::summary(row), row.get(9))
}
