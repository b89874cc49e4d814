//! What operators watch of the whole store. Each statement has a bound, however much waits and however much has ended.

use super::lanes::other_lanes;
use super::{Store, StoreError};
use std::time::Duration;
use uuid::Uuid;

/// Unpublished events that are counted at most.
pub const MOST_EVENTS: i64 = 2_000;
/// Expiring materials that are looked at for each span at most.
pub const MOST_EXPIRING: i64 = 5_000;

/// How many jobs wait, what their lanes are doing, and how long the oldest of them has waited.
///
/// `$1`: no job that is under way has a lower id, as far as is known. Lanes are found as claims find them: neither dead
/// entries of those that were served lately nor idle ones cost anything. Of each lane the line that is due first is looked
/// at. Ids of jobs begin with their time, so that the first row of `progress` is the oldest job that was ever tried.
pub const WORK: &str = concat!(
    "
    with recursive clock as materialized (select keyferry_now() as now),
    known as materialized (
        select id, scan_from from lane where served_at > (select now from clock) - interval '1 day' order by id
    ),
",
    other_lanes!(),
    "
    busy(lane_id, scan_from) as (
        select id, scan_from from known
        union all
        select lane_id, '-infinity'::timestamptz from other where lane_id is not null
    ),
    first as materialized (
        -- A look at one job for each lane that is due: as a join it could become one at all jobs that wait.
        select lane.open_at, due.due_at,
               case when due.due_at <= (select now from clock) then (
                   select job.accepted_at from job
                   where job.line_id = due.id and job.seq = due.head_seq and job.state = 'waiting') end as accepted_at
        from busy join lane on lane.id = busy.lane_id
        cross join lateral (
            select line.id, line.head_seq, line.due_at from line
            where line.lane_id = busy.lane_id and line.due_at >= busy.scan_from
            order by line.due_at limit 1
        ) as due
    ),
    tried as materialized (select job_id from progress where job_id >= $1 order by job_id limit 1)
    select (select coalesce(sum(waiting), 0)::bigint from backlog where principal >= ''),
           (select count(*) from lane) - count(due_at),
           count(*) filter (where due_at > now and due_at < 'infinity'),
           count(*) filter (where due_at <= now and open_at <= now),
           count(*) filter (where due_at <= now and open_at > now),
           count(*) filter (where due_at = 'infinity'),
           coalesce(extract(epoch from max(now - due_at) filter (where due_at <= now)), 0)::float8,
           coalesce(extract(epoch from greatest(
               max(now - accepted_at),
               (select clock.now - job.accepted_at from tried join job on job.id = tried.job_id, clock))), 0)::float8,
           (select job_id from tried)
    from clock left join first on true group by clock.now"
);

/// How many events wait for a broker, and how long the oldest has. `$1`: none has a lower id, as far as is known.
///
/// An event's id is that of the job or of the refusal which it tells of: these say since when it waits.
pub const OUTBOX: &str = "
    with oldest as materialized (
        select id, event_id, due_at, held_because is not null as is_held from outbox
        where id >= $1 order by id limit $2
    ),
    first as materialized (select id, event_id, due_at from oldest order by id limit 1)
    select count(*) filter (where not is_held), count(*) filter (where is_held),
           (select coalesce(extract(epoch from keyferry_now() - coalesce(
                (select finished_at from job where job.id = first.event_id),
                (select refused_at from refusal where refusal.id = first.event_id),
                first.due_at)), 0)::float8 from first),
           (select id from first)
    from oldest";

/// How many keys have material that expires within `$1` days, or has expired, for 0.
pub const EXPIRY: &str = "
    select count(distinct kms_key_id) from (
        select kms_key_id from kms_material
        where valid_to is not null and removed_at is null
          and valid_to > case when $1::float8 > 0 then keyferry_now() else '-infinity' end
          and valid_to <= keyferry_now() + $1 * interval '1 day'
        order by valid_to limit $2
    ) as soon";

/// How many keys have material that has expired within the last hour and has not been imported again: an index's entries
/// of that hour, and of none before.
pub const EXPIRED_LATELY: &str = "
    select count(distinct kms_key_id) from (
        select kms_key_id from kms_material
        where valid_to is not null and removed_at is null
          and valid_to > keyferry_now() - interval '1 hour' and valid_to <= keyferry_now()
        order by valid_to desc limit $1
    ) as lately";

/// How many keys can be rotated no more, and how many five times at most: an index's entries.
pub const FEW_ROTATIONS: &str = "
    select count(*) filter (where rotations >= 25), count(*) filter (where rotations < 25)
    from (select rotations from kms_key where rotations >= 20 order by rotations desc limit $1) as few";

/// Where the first rows are to be looked for. Hints: now and then they must be forgotten.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounds {
    job: Uuid,
    event: i64,
}

/// What jobs wait.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Jobs that have not ended, but for what the last second changed.
    pub waiting: i64,
    /// Lanes without a job.
    pub idle: i64,
    /// Lanes whose jobs are all under way, or wait for their time.
    pub later: i64,
    /// Lanes with a job that could be claimed.
    pub due: i64,
    /// The same, but the lane is closed.
    pub closed: i64,
    /// Lanes all of whose jobs are held.
    pub held: i64,
    /// How long the job that is due for the longest time has been.
    pub oldest_due: f64,
    /// Age of the oldest job that was tried, or is due first in its lane, in seconds.
    pub oldest: f64,
}

/// What events wait.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Unpublished {
    /// Never refused by a broker.
    pub fresh: i64,
    /// Refused, and tried again later.
    pub held: i64,
    /// Age of the oldest in seconds.
    pub oldest: f64,
}

/// The pool of connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolUse {
    /// At work.
    pub busy: usize,
    /// Open, without work.
    pub idle: usize,
    /// Allowed.
    pub most: usize,
    /// Tasks that wait for one.
    pub waiters: usize,
}

impl Store {
    /// Reads [`WORK`].
    pub async fn observe_work(&self, bounds: &mut Bounds) -> Result<Work, StoreError> {
        let from = bounds.job;
        let row = self
            .retrying(|| async {
                let client = self.client().await?;
                let statement = client.prepare_cached(WORK).await?;
                Ok(client.query_one(&statement, &[&from]).await?)
            })
            .await?;
        let tried: Option<Uuid> = row.get(8);
        bounds.job = tried.unwrap_or(from);
        Ok(Work {
            waiting: row.get::<_, i64>(0).max(0),
            idle: row.get(1),
            later: row.get(2),
            due: row.get(3),
            closed: row.get(4),
            held: row.get(5),
            oldest_due: row.get(6),
            oldest: row.get(7),
        })
    }

    /// Reads [`OUTBOX`].
    pub async fn observe_outbox(&self, bounds: &mut Bounds) -> Result<Unpublished, StoreError> {
        let from = bounds.event;
        let row = self
            .retrying(|| async {
                let client = self.client().await?;
                let statement = client.prepare_cached(OUTBOX).await?;
                Ok(client.query_one(&statement, &[&from, &MOST_EVENTS]).await?)
            })
            .await?;
        bounds.event = row.get::<_, Option<i64>>(3).unwrap_or(from);
        let oldest: Option<f64> = row.get(2);
        Ok(Unpublished { fresh: row.get(0), held: row.get(1), oldest: oldest.unwrap_or(0.0).max(0.0) })
    }

    /// How many keys have material that expires within this time; within none, that has expired.
    pub async fn keys_expiring(&self, within: Duration) -> Result<i64, StoreError> {
        let days = within.as_secs_f64() / 86_400.0;
        self.retrying(|| async {
            let client = self.client().await?;
            let statement = client.prepare_cached(EXPIRY).await?;
            Ok(client.query_one(&statement, &[&days, &MOST_EXPIRING]).await?.get(0))
        })
        .await
    }

    /// How many keys have material that has expired within the last hour.
    pub async fn keys_expired_lately(&self) -> Result<i64, StoreError> {
        self.retrying(|| async {
            let client = self.client().await?;
            let statement = client.prepare_cached(EXPIRED_LATELY).await?;
            Ok(client.query_one(&statement, &[&MOST_EXPIRING]).await?.get(0))
        })
        .await
    }

    /// How many keys can be rotated on demand no more, and how many five times at most.
    pub async fn keys_with_few_rotations(&self) -> Result<(i64, i64), StoreError> {
        self.retrying(|| async {
            let client = self.client().await?;
            let statement = client.prepare_cached(FEW_ROTATIONS).await?;
            let row = client.query_one(&statement, &[&MOST_EXPIRING]).await?;
            Ok((row.get(0), row.get(1)))
        })
        .await
    }

    /// Asks nobody.
    pub fn pool_use(&self) -> PoolUse {
        let status = self.pool.status();
        let idle = status.available.min(status.size);
        PoolUse { busy: status.size - idle, idle, most: status.max_size, waiters: status.waiting }
    }
}
