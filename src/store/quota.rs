//! Slots for calls with a scarce quota: one schedule for each account, Region and operation, and for all workers.
//!
//! Claims reserve slots for the lines that they take. Here is what an attempt needs beyond that, many attempts' needs at
//! once: a slot of another lane, a slot that is given back, the news that AWS throttles all the same. The arithmetic is that
//! of [`crate::quota`].

use super::{ClaimedJob, Store, StoreError};
use crate::job::{KeyArn, Scarce};
use crate::quota::{AHEAD_MS, Pace};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};
use time::OffsetDateTime;
use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;

/// A job that has missed its slot, or has had one in this attempt, waits so long for another at most.
const FAR_MS: f64 = 10_000.0;

/// An account and Region, and the operation whose calls are counted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QuotaLane {
    /// 12 digits.
    pub account: String,
    /// The Region's name.
    pub region: String,
    /// AWS's name of the operation.
    pub operation: Scarce,
}

impl QuotaLane {
    /// The one in which such a call on this key is counted.
    pub fn of(key: &KeyArn, operation: Scarce) -> Self {
        Self { account: key.account().to_owned(), region: key.region().to_owned(), operation }
    }
}

/// The right to make one call, not before a time.
#[derive(Clone, Debug)]
pub struct QuotaSlot {
    /// Where it is counted.
    pub lane: QuotaLane,
    /// Not before this, by this machine's monotonic clock.
    pub at: Instant,
    /// By how much it may be made later.
    pub grace: Duration,
    /// The schedule before it and behind it: it can be given back while nothing was given out behind it.
    before: OffsetDateTime,
    after: OffsetDateTime,
}

impl QuotaSlot {
    /// Of a row's columns from `first` on: the slot, the schedule before and behind it, the pace. `asked_at` is when this
    /// process asked, at which the store's clock stood at `now`.
    pub(super) fn of(row: &Row, first: usize, lane: QuotaLane, now: OffsetDateTime, asked_at: Instant) -> Option<Self> {
        let at: OffsetDateTime = row.get::<_, Option<OffsetDateTime>>(first)?;
        let pace = Pace { interval_ms: row.get(first + 3), tolerance_ms: row.get(first + 4) };
        Some(Self {
            lane,
            at: asked_at + Duration::try_from(at - now).unwrap_or_default(),
            grace: Duration::from_secs_f64(pace.grace_ms() / 1_000.0),
            before: row.get(first + 1),
            after: row.get(first + 2),
        })
    }

    /// Whether its time has passed.
    pub fn is_missed(&self) -> bool {
        Instant::now() > self.at + self.grace
    }
}

/// Hands the slots of claimed lines to those of the jobs that run, the first ones first, and gives back what is over: the
/// last ones, so that the schedule can take them back.
pub(super) fn hand_out(jobs: &mut [ClaimedJob], mut of_lines: HashMap<i64, QuotaSlot>) -> Vec<QuotaSlot> {
    let mut takers: Vec<(QuotaLane, OffsetDateTime, &mut ClaimedJob)> = jobs
        .iter_mut()
        .filter_map(|job| of_lines.get(&job.lease.line_id).map(|slot| (slot.lane.clone(), slot.after, job)))
        .collect();
    takers.sort_by_key(|(_, after, _)| *after);
    let mut slots: Vec<QuotaSlot> = of_lines.drain().map(|(_, slot)| slot).collect();
    slots.sort_by_key(|slot| std::cmp::Reverse(slot.after));
    let mut by_lane: HashMap<QuotaLane, Vec<QuotaSlot>> = HashMap::new();
    for slot in slots {
        by_lane.entry(slot.lane.clone()).or_default().push(slot);
    }
    for (lane, _, job) in takers {
        job.slot = by_lane.get_mut(&lane).and_then(Vec::pop);
    }
    by_lane.into_values().flatten().collect()
}

/// What an attempt asks of the schedules.
#[derive(Debug)]
pub enum QuotaAsk {
    /// A slot, in the place of one whose time has passed.
    Slot {
        /// Of which lane.
        lane: QuotaLane,
        /// The one that was missed.
        missed: Option<QuotaSlot>,
        /// The attempt has had one of this lane before.
        is_again: bool,
    },
    /// Its slot is not needed.
    GiveBack(QuotaSlot),
    /// AWS throttled a call that had its slot.
    Throttled {
        /// In which lane.
        lane: QuotaLane,
        /// On which line: one key alone is no sign of a quota.
        line_id: i64,
    },
}

/// What it gets.
#[derive(Debug)]
pub enum QuotaAnswer {
    /// A slot, not far away.
    Slot(QuotaSlot),
    /// The lane is not governed.
    Free,
    /// No slot is near: the job gives its line back into the lane.
    None,
    /// It is noted; nothing was asked for.
    Noted,
}

/// Takes slots back and gives out the next ones. `$1` to `$6`, for each lane: what names it, how many are wanted, and the
/// schedule behind and before those that come back, which are the last if that is how it stands.
///
/// `$7`: slots are given out when they are no further away. `$8`: how many are wanted by jobs that have missed one, which
/// get the next one within `$9`: to be sent back for it would only make them miss it again.
pub const RESERVE: &str = "
    with locked as materialized (
        select lane.id, lane.account, lane.region, lane.operation, asked.wanted, asked.late, lane.tolerance_ms,
               case when lane.tat = asked.top then asked.bottom else lane.tat end as tat,
               lane.interval_ms, lane.factor, lane.eased_at, lane.open_at, asked.top is not null and lane.tat = asked.top as is_back
        from unnest($1::text[], $2::text[], $3::text[], $4::integer[], $5::timestamptz[], $6::timestamptz[], $8::integer[])
             as asked(account, region, operation, wanted, top, bottom, late)
        join lane using (account, region, operation)
        where lane.interval_ms is not null
        order by lane.id for no key update of lane
    ),
    paced as materialized (
        select locked.*, clock.now, greatest(tat, clock.now) as base,
               interval_ms / lane_factor(factor, interval_ms, eased_at, clock.now) as pace_ms
        from locked, (select keyferry_now() as now offset 0) as clock
    ),
    granted as materialized (
        select paced.*, greatest(
                   least(wanted, 1 + floor((since_ms + $7 + tolerance_ms) / pace_ms)),
                   least(late, 1 + floor((since_ms + $9 + tolerance_ms) / pace_ms)),
                   0)::integer as count
        from (select paced.*, extract(epoch from now - base)::float8 * 1000 as since_ms from paced) as paced
    ),
    changed as (
        update lane set tat = case when count > 0 then base + count * pace_ms * interval '1 ms' else granted.tat end,
                        open_at = case when count > 0 or is_back
                            then case when count > 0 then base + count * pace_ms * interval '1 ms' else granted.tat end
                                 - (granted.tolerance_ms + case when pace_ms > $7 then $7 else $7 / 2 end) * interval '1 ms'
                            else lane.open_at end
        from granted where lane.id = granted.id
    )
    select account, region, operation, now,
           case when nth is not null
                then greatest(now, base + ((nth - 1) * pace_ms - tolerance_ms) * interval '1 ms') end,
           base + (nth - 1) * pace_ms * interval '1 ms', base + nth * pace_ms * interval '1 ms', pace_ms, tolerance_ms
    from granted left join lateral generate_series(1, count) as nth on true
    order by account, region, operation, nth";

/// Slows lanes down. `$1` to `$3` name them; `$4`: a line whose call was throttled; `$5`: whether others' were too.
///
/// Not by one key alone: it may be hot, and AWS throttles that below the quota. And once for what comes within half a
/// second: slots that were given out before still lead to calls.
const SLOW: &str = "
    with locked as materialized (
        select lane.id, lane.factor, lane.interval_ms, lane.eased_at, asked.line_id, clock.now,
               (asked.several or (lane.throttled_line <> asked.line_id
                   and lane.throttled_at > clock.now - interval '10 s' - 4 * lane.interval_ms * interval '1 ms'))
               and lane.eased_at < clock.now - interval '500 ms' as slows
        from unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::boolean[])
             as asked(account, region, operation, line_id, several)
        join lane using (account, region, operation), (select keyferry_now() as now offset 0) as clock
        where lane.interval_ms is not null
        order by lane.id for no key update of lane
    )
    update lane set
        factor = case when slows
            then greatest(0.0625, 0.85 * lane_factor(locked.factor, locked.interval_ms, locked.eased_at, now))
            else lane.factor end,
        eased_at = case when slows then now else lane.eased_at end,
        throttled_line = locked.line_id,
        throttled_at = now
    from locked where lane.id = locked.id";

/// The lowest part of its rate that any lane of an operation has, and how many lanes have less than all.
const SLOWED: &str = "
    select operation, min(lane_factor(factor, interval_ms, eased_at, keyferry_now())),
           count(*) filter (where lane_factor(factor, interval_ms, eased_at, keyferry_now()) < 1)
    from lane where interval_ms is not null group by operation";

impl Store {
    /// Makes the lanes of all targets, and says how far apart their calls are to be; `None`: they are not counted. Says in
    /// how many lanes that was another.
    pub async fn govern(&self, lanes: &[(QuotaLane, Option<Pace>)]) -> Result<u64, StoreError> {
        const MAKE: &str = "
            insert into lane (account, region, operation)
            select new.account, new.region, new.operation
            from unnest($1::text[], $2::text[], $3::text[]) as new(account, region, operation)
            where not exists (select from lane where lane.account = new.account and lane.region = new.region
                                                 and lane.operation = new.operation)
            order by new.account, new.region, new.operation on conflict do nothing";
        // Whatever a slower rate, or a clock that was set back, has led to does not close a lane for longer than its own.
        const GOVERN: &str = "
            with locked as materialized (
                select lane.id, new.interval_ms, new.tolerance_ms
                from unnest($1::text[], $2::text[], $3::text[], $4::float8[], $5::float8[])
                     as new(account, region, operation, interval_ms, tolerance_ms)
                join lane using (account, region, operation)
                where lane.interval_ms is distinct from new.interval_ms or lane.tolerance_ms <> new.tolerance_ms
                   -- Further than slots are ever given out, in a lane that was slowed down as far as it can be.
                   or lane.open_at > keyferry_now() + interval '11 s' + 32 * new.interval_ms * interval '1 ms'
                order by lane.id for no key update of lane)
            update lane set interval_ms = locked.interval_ms, tolerance_ms = locked.tolerance_ms,
                            -- What AWS throttled was another rate.
                            factor = case when lane.interval_ms is distinct from locked.interval_ms then 1 else lane.factor end,
                            tat = least(lane.tat, keyferry_now() + coalesce(locked.interval_ms, 0) * interval '1 ms'),
                            open_at = '-infinity'
            from locked where lane.id = locked.id";
        let accounts: Vec<&str> = lanes.iter().map(|(lane, _)| lane.account.as_str()).collect();
        let regions: Vec<&str> = lanes.iter().map(|(lane, _)| lane.region.as_str()).collect();
        let operations: Vec<&str> = lanes.iter().map(|(lane, _)| lane.operation.as_str()).collect();
        let intervals: Vec<Option<f64>> = lanes.iter().map(|(_, pace)| pace.map(|pace| pace.interval_ms)).collect();
        let tolerances: Vec<f64> = lanes.iter().map(|(_, pace)| pace.map_or(0.0, |pace| pace.tolerance_ms)).collect();
        self.retrying(|| async {
            let client = self.client().await?;
            client.execute(MAKE, &[&accounts, &regions, &operations]).await?;
            Ok(client.execute(GOVERN, &[&accounts, &regions, &operations, &intervals, &tolerances]).await?)
        })
        .await
    }

    /// Answers many asks, one for each: news of throttling first, then what comes back, then what is wanted.
    pub async fn quota(&self, asks: &[&QuotaAsk]) -> Result<Vec<QuotaAnswer>, StoreError> {
        self.retrying(|| self.quota_once(asks)).await
    }

    async fn quota_once(&self, asks: &[&QuotaAsk]) -> Result<Vec<QuotaAnswer>, StoreError> {
        // A worker that stalled within a claim keeps its lanes locked: whoever asks for a slot of another does not wait long.
        // Nor for the disk: a schedule that a crash of PostgreSQL sets back by moments leads to a throttled call at most.
        const BRIEFLY: &str = "set local lock_timeout = '250ms'; set local synchronous_commit = off";
        let mut client = self.client().await?;
        let throttled = Throttled::of(asks);
        if !throttled.is_empty() {
            let (lanes, lines) = throttled.columns();
            let transaction = client.transaction().await?;
            let slow = transaction.prepare_cached(SLOW).await?;
            transaction.batch_execute(BRIEFLY).await?;
            let columns: [&(dyn ToSql + Sync); 5] =
                [&lanes.accounts, &lanes.regions, &lanes.operations, &lines.0, &lines.1];
            match transaction.execute(&slow, &columns).await {
                Ok(_) => transaction.commit().await?,
                // The next throttled call says the same.
                Err(error) if is_locked(&error) => transaction.rollback().await?,
                Err(error) => return Err(error.into()),
            }
        }
        let mut wanted: BTreeMap<&QuotaLane, Wanted> = BTreeMap::new();
        for ask in asks {
            match ask {
                QuotaAsk::Slot { lane, missed, is_again } => {
                    let of_lane = wanted.entry(lane).or_default();
                    of_lane.count += 1;
                    of_lane.late += i32::from(missed.is_some() || *is_again);
                    of_lane.back.extend(missed);
                }
                QuotaAsk::GiveBack(slot) => wanted.entry(&slot.lane).or_default().back.push(slot),
                QuotaAsk::Throttled { .. } => {}
            }
        }
        let mut given = HashMap::new();
        if !wanted.is_empty() {
            let lanes = Columns::of(wanted.keys().copied());
            let counts: Vec<i32> = wanted.values().map(|of_lane| of_lane.count).collect();
            let late: Vec<i32> = wanted.values().map(|of_lane| of_lane.late).collect();
            let (tops, bottoms): (Vec<_>, Vec<_>) = wanted.values().map(Wanted::chain).unzip();
            let transaction = client.transaction().await?;
            let reserve = transaction.prepare_cached(RESERVE).await?;
            transaction.batch_execute(BRIEFLY).await?;
            let asked_at = Instant::now();
            let columns: [&(dyn ToSql + Sync); 9] = [
                &lanes.accounts,
                &lanes.regions,
                &lanes.operations,
                &counts,
                &tops,
                &bottoms,
                &AHEAD_MS,
                &late,
                &FAR_MS,
            ];
            match transaction.query(&reserve, &columns).await {
                Ok(rows) => {
                    transaction.commit().await?;
                    given = given_out(&rows, asked_at);
                }
                // Nothing was given out, nor taken back: the jobs wait in their lanes.
                Err(error) if is_locked(&error) => {
                    transaction.rollback().await?;
                    given = wanted.keys().map(|lane| ((*lane).clone(), Vec::new())).collect();
                }
                Err(error) => return Err(error.into()),
            }
        }
        let mut answers: Vec<QuotaAnswer> = asks.iter().map(|_| QuotaAnswer::Noted).collect();
        // Those that have missed one, or would be back for another, come first.
        for is_late in [true, false] {
            for (answer, ask) in answers.iter_mut().zip(asks) {
                if let QuotaAsk::Slot { lane, missed, is_again } = ask
                    && (missed.is_some() || *is_again) == is_late
                {
                    *answer = match given.get_mut(lane) {
                        None => QuotaAnswer::Free,
                        Some(slots) => slots.pop().map_or(QuotaAnswer::None, QuotaAnswer::Slot),
                    };
                }
            }
        }
        Ok(answers)
    }

    /// The lowest part of its rate that any lane of an operation has, and how many lanes have less than all of it.
    pub async fn quota_slowed(&self) -> Result<Vec<(Scarce, f64, i64)>, StoreError> {
        self.retrying(|| async {
            let client = self.client().await?;
            let slowed = client.prepare_cached(SLOWED).await?;
            let rows = client.query(&slowed, &[]).await?;
            let read = |row: &Row| Some((Scarce::parse(row.get(0))?, row.get(1), row.get(2)));
            Ok(rows.iter().filter_map(read).collect())
        })
        .await
    }
}

fn is_locked(error: &tokio_postgres::Error) -> bool {
    error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE)
}

/// Slots by lane, the first of each at the end.
fn given_out(rows: &[Row], asked_at: Instant) -> HashMap<QuotaLane, Vec<QuotaSlot>> {
    let mut given: HashMap<QuotaLane, Vec<QuotaSlot>> = HashMap::new();
    for row in rows.iter().rev() {
        let Some(operation) = Scarce::parse(row.get(2)) else { continue };
        let lane = QuotaLane { account: row.get(0), region: row.get(1), operation };
        let slot = QuotaSlot::of(row, 4, lane.clone(), row.get(3), asked_at);
        given.entry(lane).or_default().extend(slot);
    }
    given
}

/// What is asked of one lane.
#[derive(Default)]
struct Wanted<'a> {
    count: i32,
    /// By jobs that have missed one.
    late: i32,
    back: Vec<&'a QuotaSlot>,
}

impl Wanted<'_> {
    /// The schedule behind and before the longest row of slots that come back, from the last that was given out.
    fn chain(&self) -> (Option<OffsetDateTime>, Option<OffsetDateTime>) {
        let mut back = self.back.clone();
        back.sort_unstable_by_key(|slot| std::cmp::Reverse(slot.after));
        let Some(last) = back.first() else { return (None, None) };
        let bottom = back.iter().skip(1).fold(last.before, |bottom, slot| {
            // Intervals are rounded to microseconds, each by itself.
            if (slot.after - bottom).abs() <= time::Duration::microseconds(2) { slot.before } else { bottom }
        });
        (Some(last.after), Some(bottom))
    }
}

/// Lanes as statements take them.
struct Columns<'a> {
    accounts: Vec<&'a str>,
    regions: Vec<&'a str>,
    operations: Vec<&'a str>,
}

impl<'a> Columns<'a> {
    fn of(lanes: impl Iterator<Item = &'a QuotaLane> + Clone) -> Self {
        Self {
            accounts: lanes.clone().map(|lane| lane.account.as_str()).collect(),
            regions: lanes.clone().map(|lane| lane.region.as_str()).collect(),
            operations: lanes.map(|lane| lane.operation.as_str()).collect(),
        }
    }
}

/// The lines whose calls were throttled, by lane.
struct Throttled<'a>(BTreeMap<&'a QuotaLane, BTreeSet<i64>>);

impl<'a> Throttled<'a> {
    fn of(asks: &[&'a QuotaAsk]) -> Self {
        let mut lanes: BTreeMap<&QuotaLane, BTreeSet<i64>> = BTreeMap::new();
        for ask in asks {
            if let QuotaAsk::Throttled { lane, line_id } = ask {
                lanes.entry(lane).or_default().insert(*line_id);
            }
        }
        Self(lanes)
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The lanes; one line of each, and whether there are others.
    fn columns(&self) -> (Columns<'a>, (Vec<i64>, Vec<bool>)) {
        let lines = self.0.values().filter_map(|lines| Some((*lines.first()?, lines.len() > 1))).unzip();
        (Columns::of(self.0.keys().copied()), lines)
    }
}
