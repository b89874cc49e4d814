//! Slots of scarce quotas: one schedule for all, claims that take no more than it gives, and nobody else's wait.

use super::given::{
    LEASE, SIGNATURE_LIFE, accept, arn, arn_in, claim, claim_one, end, job, job_with, settle, succeeded, value,
};
use crate::support::db::TestDb;
use keyferry::job::Scarce;
use keyferry::quota::{AHEAD_MS, Pace, Schedule};
use keyferry::store::{
    Claimed, ClaimedJob, NewJob, QuotaAnswer, QuotaAsk, QuotaLane, QuotaSlot, RetryState, Scan, SettlementKind, Store,
};
use serde_json::json;
use std::time::{Duration, Instant};
use tokio_postgres::Client;

const GET: Scarce = Scarce::GetParametersForImport;
const IMPORT: Scarce = Scarce::ImportKeyMaterial;

fn lane(operation: Scarce) -> QuotaLane {
    QuotaLane::of(&arn(0), operation)
}

/// A database whose lane of one operation is governed.
async fn governed(operation: Scarce, pace: Pace) -> (TestDb, Store, Client) {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    assert_eq!(store.govern(&[(lane(operation), Some(pace))]).await.unwrap(), 1);
    (db, store, client)
}

/// The clock stands still but for what a test moves it.
async fn freeze(client: &Client) {
    client
        .batch_execute(
            "create or replace function keyferry_now() returns timestamptz language sql stable parallel safe
             as $$ select timestamptz '2026-11-01 00:00:00+00' + ahead from public.clock_offset $$",
        )
        .await
        .unwrap();
}

async fn accept_keys(store: &Store, keys: std::ops::Range<u128>) {
    let jobs: Vec<NewJob> = keys.map(|n| job(&format!("j{n}"), &arn(n))).collect();
    accept(store, &jobs).await;
}

async fn claim_all(store: &Store, most: usize) -> Claimed {
    store.claim(most, LEASE, SIGNATURE_LIFE, Scan::FromBounds).await.unwrap()
}

/// One slot, if one is near.
async fn ask(store: &Store, operation: Scarce, missed: Option<QuotaSlot>) -> Option<QuotaSlot> {
    let asked = QuotaAsk::Slot { lane: lane(operation), missed, is_again: false };
    match store.quota(&[&asked]).await.unwrap().remove(0) {
        QuotaAnswer::Slot(slot) => Some(slot),
        QuotaAnswer::None => None,
        other => panic!("{other:?}"),
    }
}

async fn give_back(store: &Store, slots: Vec<QuotaSlot>) {
    let asks: Vec<QuotaAsk> = slots.into_iter().map(QuotaAsk::GiveBack).collect();
    store.quota(&asks.iter().collect::<Vec<_>>()).await.unwrap();
}

async fn throttle(store: &Store, lines: &[i64]) {
    let asks: Vec<QuotaAsk> = lines.iter().map(|&line_id| QuotaAsk::Throttled { lane: lane(GET), line_id }).collect();
    store.quota(&asks.iter().collect::<Vec<_>>()).await.unwrap();
}

async fn factor(store: &Store) -> f64 {
    store.quota_slowed().await.unwrap().iter().find(|(operation, ..)| *operation == GET).unwrap().1
}

fn about(found: f64, wanted: f64) -> bool {
    (found - wanted).abs() < 0.01
}

/// The schedule of the lane, in milliseconds of the standing clock.
async fn tat(client: &Client) -> f64 {
    let tat = "select extract(epoch from tat - timestamptz '2026-11-01 00:00:00+00')::float8 * 1000 from lane
               where interval_ms is not null";
    value(client, tat, &[]).await
}

#[tokio::test]
async fn a_claim_takes_no_more_lines_than_there_are_slots_and_says_when_the_lane_opens() {
    let (db, store, client) = governed(GET, Pace::of(1.0, 0.0, 0.5)).await;
    freeze(&client).await;
    accept_keys(&store, 0..5).await;
    let first = claim_all(&store, 64).await;
    assert_eq!((first.jobs.len(), first.jobs[0].slot.as_ref().unwrap().lane.clone()), (1, lane(GET)));
    let closed = claim_all(&store, 64).await;
    assert!(closed.jobs.is_empty());
    let opens_in = closed.opens_in.unwrap();
    assert!((765..=775).contains(&opens_in.as_millis()), "{opens_in:?}");
    db.advance(opens_in.saturating_sub(Duration::from_millis(2))).await;
    assert!(claim_all(&store, 64).await.jobs.is_empty());
    db.advance(Duration::from_millis(3)).await;
    let asked_at = Instant::now();
    let second = claim_one(&store).await;
    let away = second.slot.unwrap().at - asked_at;
    assert!(away > Duration::from_millis(200), "{away:?} away");
    // No line was lost sight of.
    for _ in 0..3 {
        db.advance(Duration::from_millis(1_021)).await;
        claim_one(&store).await;
    }
    assert_eq!(claim_all(&store, 64).await.opens_in, None, "nothing waits");
}

/// The statements do what the pure arithmetic says, whatever is done in whatever order.
#[tokio::test]
async fn the_statements_follow_the_schedule_that_the_arithmetic_gives() {
    for (rate, burst, seed) in [(1.0, 0.5, 1_u64), (15.0, 0.5, 2), (97.3, 0.0, 3), (3.0, 1.0, 4), (0.4, 0.2, 5)] {
        let pace = Pace::of(rate, 0.1, burst);
        let (db, store, client) = governed(GET, pace).await;
        freeze(&client).await;
        accept_keys(&store, 0..200).await;
        let (mut model, mut now, mut random) = (Schedule { tat: f64::NEG_INFINITY }, 0.0, seed);
        let mut last: Vec<(QuotaSlot, keyferry::quota::Slot)> = Vec::new();
        for step in 0..60 {
            // A generator of Knuth's: only the order of steps comes of it.
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let draw = random >> 33;
            match draw % 4 {
                0 => {
                    let ms = u32::try_from(draw / 4 % 700).unwrap();
                    db.advance(Duration::from_millis(ms.into())).await;
                    now += f64::from(ms);
                }
                1 => {
                    let wanted = usize::try_from(draw / 4 % 9 + 1).unwrap();
                    let asks: Vec<QuotaAsk> = (0..wanted)
                        .map(|_| QuotaAsk::Slot { lane: lane(GET), missed: None, is_again: false })
                        .collect();
                    let answers = store.quota(&asks.iter().collect::<Vec<_>>()).await.unwrap();
                    let expected = model.reserve(now, u32::try_from(wanted).unwrap(), pace);
                    let slots = answers.into_iter().filter_map(|answer| match answer {
                        QuotaAnswer::Slot(slot) => Some(slot),
                        _ => None,
                    });
                    last = check(slots.collect(), expected);
                }
                2 => {
                    // A claim looks where the lane is open.
                    if now < model.opens_at(pace) {
                        continue;
                    }
                    let wanted = usize::try_from(draw / 4 % 9 + 1).unwrap();
                    let claimed = claim_all(&store, wanted).await;
                    let expected = model.reserve(now, u32::try_from(wanted).unwrap(), pace);
                    let mut slots: Vec<QuotaSlot> = claimed.jobs.into_iter().map(|job| job.slot.unwrap()).collect();
                    slots.sort_by_key(|slot| slot.at);
                    last = check(slots, expected);
                    // Of a burst it cannot be told which is the last.
                    if last.windows(2).any(|pair| pair[0].0.at == pair[1].0.at) {
                        last.clear();
                    }
                }
                _ => {
                    let Some((slot, expected)) = last.pop() else { continue };
                    give_back(&store, vec![slot]).await;
                    assert!(model.take_back(expected, pace));
                }
            }
            if model.tat.is_finite() {
                let tat = tat(&client).await;
                assert!(about(tat, model.tat), "rate {rate}, step {step}: {tat}, expected {}", model.tat);
            }
        }
    }
}

fn check(slots: Vec<QuotaSlot>, expected: Vec<keyferry::quota::Slot>) -> Vec<(QuotaSlot, keyferry::quota::Slot)> {
    assert_eq!(slots.len(), expected.len());
    for (slot, wanted) in slots.iter().zip(&expected) {
        let apart = (slot.at - slots[0].at).as_secs_f64() * 1_000.0;
        assert!(about(apart, wanted.at - expected[0].at), "{apart}, expected {wanted:?}");
    }
    slots.into_iter().zip(expected).collect()
}

#[tokio::test]
async fn slots_that_are_not_used_come_back_while_none_was_given_out_behind_them() {
    let (_db, store, client) = governed(GET, Pace::of(20.0, 0.2, 0.0)).await;
    freeze(&client).await;
    let mut slots = Vec::new();
    while let Some(slot) = ask(&store, GET, None).await {
        slots.push(slot);
    }
    assert_eq!(slots.len(), 5, "one now and in each 62.5 ms, for {AHEAD_MS} ms");
    let full = tat(&client).await;
    // In any order.
    let last = vec![slots[3].clone(), slots[4].clone()];
    give_back(&store, last).await;
    assert!(about(full - tat(&client).await, 125.0));
    give_back(&store, vec![slots[0].clone()]).await;
    assert!(about(full - tat(&client).await, 125.0), "another was given out behind it");
    give_back(&store, vec![slots[4].clone()]).await;
    assert!(about(full - tat(&client).await, 125.0), "it came back already");
    assert!(ask(&store, GET, None).await.is_some() && ask(&store, GET, None).await.is_some());
    assert!(ask(&store, GET, None).await.is_none());
}

#[tokio::test]
async fn a_slot_that_was_missed_is_changed_for_one_at_once() {
    let (db, store, client) = governed(GET, Pace::of(1.0, 0.0, 0.5)).await;
    freeze(&client).await;
    let slot = ask(&store, GET, None).await.unwrap();
    db.advance(Duration::from_millis(300)).await;
    assert!(ask(&store, GET, None).await.is_none(), "its time is another's");
    let now = Instant::now();
    let other = ask(&store, GET, Some(slot)).await.unwrap();
    assert!(other.at <= now + Duration::from_millis(50));
    // No more than the delay is lost.
    let interval_ms = Pace::of(1.0, 0.0, 0.5).interval_ms;
    assert!(about(tat(&client).await, 300.0 + interval_ms));
    // Where others have got slots meanwhile it gets the next one, and not the advice to come again and miss it again.
    db.advance(Duration::from_millis(1_400)).await;
    ask(&store, GET, None).await.unwrap();
    let before = tat(&client).await;
    let later = ask(&store, GET, Some(other)).await.unwrap();
    assert!(
        later.at > Instant::now() + Duration::from_millis(500) && later.at < Instant::now() + Duration::from_secs(2)
    );
    assert!(about(tat(&client).await, before + interval_ms));
}

#[tokio::test]
async fn throttling_slows_a_lane_for_all_and_it_recovers_but_one_hot_key_does_not() {
    let (db, store, client) = governed(GET, Pace::of(1.0, 0.0, 0.5)).await;
    freeze(&client).await;
    for _ in 0..20 {
        throttle(&store, &[7]).await;
        db.advance(Duration::from_secs(1)).await;
    }
    assert!(about(factor(&store).await, 1.0), "one key again and again");
    throttle(&store, &[8]).await;
    let slowed = factor(&store).await;
    assert!(about(slowed, 0.85), "{slowed}");
    throttle(&store, &[9, 10]).await;
    assert!(about(factor(&store).await, 0.85), "calls that had their slots already");
    // The next calls are as far apart as the part that is left says, in claims too.
    ask(&store, GET, None).await.unwrap();
    accept_keys(&store, 0..3).await;
    let opens_in = claim_all(&store, 9).await.opens_in.unwrap().as_secs_f64() * 1_000.0;
    assert!((opens_in - (1_020.4 / 0.85 - AHEAD_MS)).abs() < 1.0, "{opens_in}");
    db.advance(Duration::from_secs(1)).await;
    throttle(&store, &[9, 10]).await;
    assert!((factor(&store).await - 0.85 * 0.8505).abs() < 0.001);
    // A hundred calls' time gives a twentieth of the rate back.
    let before = factor(&store).await;
    db.advance(Duration::from_secs(102)).await;
    let after = factor(&store).await;
    assert!((after - before - 0.05).abs() < 0.002, "from {before} to {after}");
    db.advance(Duration::from_secs(600)).await;
    assert!(about(factor(&store).await, 1.0), "all of it");
    for line in 0..60 {
        throttle(&store, &[line, line + 1]).await;
        db.advance(Duration::from_millis(600)).await;
    }
    let least = factor(&store).await;
    assert!(least >= 0.0625, "never none");
    // The same rate said again changes nothing; another one was never throttled.
    let say = async |rate: f64| store.govern(&[(lane(GET), Some(Pace::of(rate, 0.0, 0.5)))]).await.unwrap();
    say(1.0).await;
    assert!(about(factor(&store).await, least));
    say(2.0).await;
    assert!(about(factor(&store).await, 1.0), "the old rate was slowed down");
    let other: f64 = value(&client, "select min(factor) from lane where interval_ms is null", &[]).await;
    assert!(about(other, 1.0), "no other lane is slowed");
}

#[tokio::test]
async fn what_a_dead_worker_left_goes_first_and_takes_no_slot() {
    let (db, store, client) = governed(GET, Pace::of(1.0, 0.0, 0.5)).await;
    freeze(&client).await;
    accept_keys(&store, 0..4).await;
    let dead = claim_one(&store).await;
    // The lane is closed when the lease has run out: the schedule is full, and others have waited longer.
    db.advance(LEASE).await;
    while ask(&store, GET, None).await.is_some() {}
    db.advance(Duration::from_millis(1)).await;
    let taken = claim_one(&store).await;
    assert_eq!((taken.id, taken.attempt, taken.slot.is_none()), (dead.id, 2, true));
    assert!(claim_all(&store, 9).await.jobs.is_empty());
}

/// A job that waits for a slot.
fn awaits(job: &ClaimedJob, lane: QuotaLane, throttled: Option<serde_json::Value>) -> keyferry::store::Settlement {
    let kind =
        SettlementKind::AwaitSlot { deadline: job.deadline, state: Some(RetryState::default()), lane, throttled };
    end(job, kind)
}

#[tokio::test]
async fn a_job_that_waits_for_a_slot_goes_before_the_others_of_that_lane_and_nothing_is_counted() {
    let (db, store, client) = governed(GET, Pace::of(10.0, 0.0, 0.0)).await;
    freeze(&client).await;
    accept_keys(&store, 0..3).await;
    db.advance(Duration::from_secs(60)).await;
    accept_keys(&store, 3..4).await;
    let jobs = claim(&store, 9).await;
    assert_eq!(jobs.len(), 3, "{jobs:?}");
    let (first, second) = (&jobs[0], &jobs[1]);
    for job in [first, second] {
        db.advance(Duration::from_secs(1)).await;
        assert!(settle(&store, &awaits(job, lane(GET), None)).await);
    }
    db.advance(Duration::from_millis(110)).await;
    let next = claim_all(&store, 2).await.jobs;
    let ids: Vec<_> = next.iter().map(|job| job.id).collect();
    assert!(
        ids.contains(&first.id) && ids.contains(&second.id),
        "before the fourth, who waits for longer than a second"
    );
    assert!(next.iter().all(|job| job.attempt == 1));
    let entries = "select count(*) from audit_entry where entry like '%attempt_failed%'";
    assert_eq!(value::<i64>(&client, entries, &[]).await, 0);
    // Throttled all the same, it is told of: a call was made.
    let why = json!({"class": "throttled", "times": 1, "message": "slow down"});
    assert!(settle(&store, &awaits(&next[0], lane(GET), Some(why.clone()))).await);
    db.advance(Duration::from_secs(1)).await;
    let again = claim(&store, 9).await.into_iter().find(|job| job.id == next[0].id).unwrap();
    assert_eq!((again.attempt, again.progress.last_error), (2, Some(why)));
    assert_eq!(value::<i64>(&client, entries, &[]).await, 1);
}

#[tokio::test]
async fn a_job_can_wait_in_a_lane_of_another_region_and_comes_back() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let elsewhere = QuotaLane { region: "us-east-1".into(), ..lane(IMPORT) };
    let lanes = [(elsewhere.clone(), Some(Pace::of(1.0, 0.0, 0.5))), (lane(GET), None)];
    assert_eq!(store.govern(&lanes).await.unwrap(), 1);
    assert_eq!(store.govern(&lanes).await.unwrap(), 0, "nothing is new");
    accept_keys(&store, 0..1).await;
    let job = claim_one(&store).await;
    assert!(job.slot.is_none(), "its lane is not governed");
    assert!(settle(&store, &awaits(&job, elsewhere.clone(), None)).await);
    let job = claim_one(&store).await;
    assert_eq!(job.slot.as_ref().unwrap().lane, elsewhere);
    assert!(settle(&store, &super::given::retry(&job, Duration::ZERO, job.deadline, RetryState::default())).await);
    let of_line = "select region || ' ' || operation from line join lane on lane.id = line.lane_id";
    assert_eq!(value::<String>(&client, of_line, &[]).await, "eu-central-1 GetParametersForImport");
    let job = claim_one(&store).await;
    assert!(settle(&store, &succeeded(&job)).await);
}

/// Jobs that a claim puts aside leave their slots to those that run, and the last come back.
#[tokio::test]
async fn slots_of_jobs_that_are_held_go_to_others() {
    let (db, store, client) = governed(GET, Pace::of(20.0, 0.2, 0.0)).await;
    freeze(&client).await;
    accept_keys(&store, 0..4).await;
    store.hold(&keyferry::store::Scope::Key(arn(0)), None, "op").await.unwrap();
    let asked_at = Instant::now();
    let claimed = claim_all(&store, 9).await;
    assert_eq!((claimed.jobs.len(), claimed.put_aside, claimed.unused.len()), (3, 1, 1));
    let mut slots: Vec<_> = claimed.jobs.iter().map(|job| job.slot.as_ref().unwrap().at).collect();
    slots.sort_unstable();
    let last = claimed.unused[0].at;
    assert!(slots.iter().all(|at| *at < last) && last > asked_at);
    let full = tat(&client).await;
    give_back(&store, claimed.unused).await;
    assert!(about(full - tat(&client).await, 62.5));
    drop(db);
}

/// Many workers at once, with claims and asks mixed: together they get what one would.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_workers_together_get_no_more_and_no_less_than_the_rate() {
    let pace = Pace::of(50.0, 0.0, 0.1);
    let (_db, store, client) = governed(GET, pace).await;
    accept_keys(&store, 0..300).await;
    let now = "select extract(epoch from keyferry_now())::float8 * 1000";
    let begun: f64 = value(&client, now, &[]).await;
    let workers: Vec<_> = (0..4)
        .map(|worker| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut got = 0;
                for _ in 0..40 {
                    if worker % 2 == 0 {
                        got += claim_all(&store, 3).await.jobs.iter().filter(|job| job.slot.is_some()).count();
                    } else if ask(&store, GET, None).await.is_some() {
                        got += 1;
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                got
            })
        })
        .collect();
    let mut got = 0;
    for worker in workers {
        got += worker.await.unwrap();
    }
    let passed: f64 = value::<f64>(&client, now, &[]).await - begun;
    let got = f64::from(u32::try_from(got).unwrap());
    let most = (passed + AHEAD_MS + pace.tolerance_ms) / pace.interval_ms + 1.0;
    assert!(got <= most, "{got} slots in {passed} ms, {most} allowed");
    // One schedule counts each slot once: it stands where the last one ends.
    let tat: f64 =
        value(&client, "select extract(epoch from tat)::float8 * 1000 from lane where interval_ms is not null", &[])
            .await;
    let counted = (tat - begun) / pace.interval_ms;
    assert!(got <= counted + 1.0, "{got} slots, {counted} counted");
}

/// Whoever waits in an exhausted lane keeps nobody else waiting, and costs claims next to nothing.
#[tokio::test]
async fn ten_thousand_jobs_in_a_closed_lane_keep_no_other_waiting() {
    let (_db, store, client) = governed(GET, Pace::of(0.1, 0.0, 0.0)).await;
    accept_keys(&store, 0..2).await;
    claim_one(&store).await;
    let fill = "insert into line (id, lane_id, tail_seq, due_at)
                select 1000 + n, (select lane_id from job limit 1), 1, keyferry_now() - n * interval '1 ms'
                from generate_series(1, 10000) as n";
    assert_eq!(client.execute(fill, &[]).await.unwrap(), 10_000);
    let closed = claim_all(&store, 64).await;
    assert!(closed.jobs.is_empty() && closed.opens_in.is_some());
    accept(&store, &[job_with("other", &arn_in("us-east-1", 9), json!({}))]).await;
    let other = claim_one(&store).await;
    assert_eq!(other.key, arn_in("us-east-1", 9));
}
