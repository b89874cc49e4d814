//! Urgent jobs overtake their line; what a head may have done to AWS is settled first.

use super::given::{
    LEASE, SIGNATURE_LIFE, accept, accept_line, arn, assert_audit_holds, assert_dense, claim, claim_one, failed,
    generating_step, job, job_with, put_back, retry, settle, succeeded, urgent, value,
};
use crate::support::db::TestDb;
use keyferry::store::{Answered, ClaimedJob, JobFilter, Parameters, Prepared, RetryState, Store};
use serde_json::json;
use std::time::Duration;
use time::format_description::well_known::Rfc3339;
use tokio_postgres::Client;

const LANE: &str = "select operation from lane join line on line.lane_id = lane.id where due_at is not null";
const DUE: &str = "select due_at <= keyferry_now() from line";

fn name(job: &ClaimedJob) -> &str {
    job.request.id.as_str()
}

async fn again(store: &Store, job: &ClaimedJob, delay: Duration, state: RetryState) {
    assert!(settle(store, &retry(job, delay, job.deadline, state)).await);
}

/// Claims and ends jobs until there is none; says in which order.
async fn drain(store: &Store, client: &Client) -> Vec<String> {
    let mut order = Vec::new();
    while let Some(job) = claim(store, 1).await.pop() {
        order.push(name(&job).to_owned());
        assert!(settle(store, &succeeded(&job)).await);
        assert_dense(client).await;
    }
    assert_audit_holds(client).await;
    assert_eq!(value::<i64>(client, "select count(*) from urgent", &[]).await, 0);
    assert_eq!(value::<i64>(client, "select count(*) from line where due_at is not null", &[]).await, 0);
    order
}

#[tokio::test]
async fn urgent_jobs_run_first_in_their_own_order_and_the_line_goes_on() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept_line(&store, "j", &arn(1), 3).await;
    accept(&store, &[urgent("u1", &arn(1)), job("k", &arn(1)), urgent("u2", &arn(1))]).await;
    assert_eq!(value::<String>(&client, LANE, &[]).await, "DeleteImportedKeyMaterial", "a lane of its own");
    let first = claim_one(&store).await;
    assert_eq!((name(&first), first.sequence, first.attempt), ("u1", 4, 1));
    assert!(claim(&store, 8).await.is_empty(), "one at a time");
    assert!(settle(&store, &succeeded(&first)).await);
    assert_dense(&client).await;
    assert_eq!(drain(&store, &client).await, ["u2", "j-1", "j-2", "j-3", "k"]);
    // Alone, and as the head of a line that others join.
    accept(&store, &[urgent("u3", &arn(1))]).await;
    accept(&store, &[urgent("u4", &arn(1)), job("l", &arn(1))]).await;
    assert_eq!(drain(&store, &client).await, ["u3", "u4", "l"]);
}

#[tokio::test]
async fn attempts_are_counted_for_each_job() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept_line(&store, "j", &arn(1), 1).await;
    for attempt in 1..=3 {
        let job = claim_one(&store).await;
        assert_eq!((name(&job), job.attempt), ("j-1", attempt));
        again(&store, &job, Duration::ZERO, RetryState::default()).await;
    }
    accept(&store, &[urgent("u", &arn(1))]).await;
    for (attempt, counted) in [(1, false), (1, true), (2, true)] {
        let job = claim_one(&store).await;
        assert_eq!((name(&job), job.attempt), ("u", attempt));
        let shown = store.jobs(&JobFilter { limit: 9, ..JobFilter::default() }).await.unwrap().unwrap();
        let shown: Vec<i32> = shown.iter().map(|view| view.attempts).collect();
        assert_eq!(shown, [i32::try_from(attempt).unwrap(), 3]);
        if counted {
            again(&store, &job, Duration::ZERO, RetryState::default()).await;
        } else {
            assert!(settle(&store, &put_back(&job, None)).await);
        }
    }
    // A takeover counts.
    let old = claim_one(&store).await;
    db.advance(LEASE * 2).await;
    let new = claim_one(&store).await;
    assert_eq!((name(&new), new.attempt), ("u", 4));
    assert!(!settle(&store, &succeeded(&old)).await);
    assert!(settle(&store, &succeeded(&new)).await);
    let job = claim_one(&store).await;
    assert_eq!((name(&job), job.attempt), ("j-1", 4));
    assert!(settle(&store, &failed(&job, "no")).await);
    let attempts: Vec<i32> = client
        .query("select attempts from job order by seq", &[])
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(attempts, [4, 4]);
    assert_dense(&client).await;
}

#[tokio::test]
async fn a_head_that_waits_long_is_overtaken_at_once() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept_line(&store, "j", &arn(1), 2).await;
    again(&store, &claim_one(&store).await, Duration::from_secs(3_600), RetryState::default()).await;
    assert!(claim(&store, 8).await.is_empty());
    accept(&store, &[urgent("u", &arn(1)), urgent("u2", &arn(1))]).await;
    assert!(value::<bool>(&client, DUE, &[]).await);
    for name_of in ["u", "u2"] {
        let job = claim_one(&store).await;
        assert_eq!(name(&job), name_of);
        assert!(settle(&store, &succeeded(&job)).await);
    }
    assert!(!value::<bool>(&client, DUE, &[]).await, "the head goes on waiting as it was to");
    assert_eq!(value::<String>(&client, LANE, &[]).await, "GetParametersForImport", "in its own lane");
    db.advance(Duration::from_secs(3_601)).await;
    assert_eq!(drain(&store, &client).await, ["j-1", "j-2"]);
    // Accepted while the head was running, which then is to wait.
    accept_line(&store, "k", &arn(1), 1).await;
    let head = claim_one(&store).await;
    accept(&store, &[urgent("v", &arn(1))]).await;
    assert!(claim(&store, 8).await.is_empty(), "not beside the head");
    let kept = RetryState { parameters: Parameters::Kept, ..RetryState::default() };
    again(&store, &head, Duration::from_secs(3_600), kept).await;
    let urgent_job = claim_one(&store).await;
    assert_eq!(name(&urgent_job), "v");
    again(&store, &urgent_job, Duration::ZERO, RetryState::default()).await;
    assert_eq!(value::<String>(&client, LANE, &[]).await, "DeleteImportedKeyMaterial");
    let urgent_job = claim_one(&store).await;
    assert_eq!(name(&urgent_job), "v");
    assert!(settle(&store, &succeeded(&urgent_job)).await);
    assert!(!value::<bool>(&client, DUE, &[]).await);
    assert_eq!(value::<String>(&client, LANE, &[]).await, "ImportKeyMaterial", "where the head was to go on");
    db.advance(Duration::from_secs(3_601)).await;
    assert_eq!(drain(&store, &client).await, ["k-1"]);
    // One that waits for itself is not hurried by another behind it.
    accept(&store, &[urgent("w1", &arn(1))]).await;
    again(&store, &claim_one(&store).await, Duration::from_secs(60), RetryState::default()).await;
    accept(&store, &[urgent("w2", &arn(1)), job("l", &arn(1))]).await;
    assert!(!value::<bool>(&client, DUE, &[]).await);
    db.advance(Duration::from_secs(61)).await;
    assert_eq!(drain(&store, &client).await, ["w1", "w2", "l"]);
}

#[tokio::test]
async fn what_the_head_may_have_done_is_settled_first() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept_line(&store, "j", &arn(1), 2).await;
    let head = claim_one(&store).await;
    let (step, _) = generating_step(&head);
    assert_eq!(store.prepare(&[&step]).await.unwrap(), [Prepared::Ready]);
    accept(&store, &[urgent("u", &arn(1))]).await;
    // Unanswered, then answered and not yet seen: in neither state is it overtaken, nor hurried.
    again(&store, &head, Duration::from_secs(60), RetryState { in_doubt: true, ..RetryState::default() }).await;
    assert!(!value::<bool>(&client, DUE, &[]).await, "its own delay stands");
    db.advance(Duration::from_secs(61)).await;
    let head = claim_one(&store).await;
    assert_eq!(name(&head), "j-1");
    let answered = RetryState { answered: Some(Answered::default()), ..RetryState::default() };
    again(&store, &head, Duration::ZERO, answered).await;
    let head = claim_one(&store).await;
    assert!(name(&head) == "j-1" && head.progress.answered);
    // A worker that died in doubt: its successor goes on with the same.
    db.advance(LEASE * 2).await;
    assert_eq!(drain(&store, &client).await, ["j-1", "u", "j-2"]);

    // What was in doubt and turned out to have done nothing does not hold it up.
    accept_line(&store, "k", &arn(2), 1).await;
    let head = claim_one(&store).await;
    let (step, _) = generating_step(&head);
    assert_eq!(store.prepare(&[&step]).await.unwrap(), [Prepared::Ready]);
    accept(&store, &[urgent("v", &arn(2))]).await;
    again(&store, &head, Duration::from_secs(3_600), RetryState::default()).await;
    assert_eq!(name(&claim_one(&store).await), "v");
}

#[tokio::test]
async fn a_takeover_goes_on_with_the_urgent_job_that_was_left() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept_line(&store, "j", &arn(1), 1).await;
    accept(&store, &[urgent("u", &arn(1))]).await;
    let old = claim_one(&store).await;
    let intent = keyferry::store::Intent::Delete { material_ids: vec!["a".into()] };
    let step = keyferry::store::Step {
        lease: old.lease,
        job_id: old.id,
        intent,
        effect: "delete a".into(),
        facts: Vec::new(),
    };
    assert_eq!(store.prepare(&[&step]).await.unwrap(), [Prepared::Ready]);
    accept(&store, &[urgent("u2", &arn(1))]).await;
    db.advance(LEASE * 2).await;
    let new = claim_one(&store).await;
    assert!(name(&new) == "u" && new.progress.in_doubt);
    let late = "select late_effect from line where late_until > keyferry_now()";
    assert_eq!(value::<String>(&client, late, &[]).await, "delete a");
    // What the dead worker may have sent closes the line to whoever does something else.
    db.advance(SIGNATURE_LIFE).await;
    assert_eq!(drain_after(&store, &client, &new).await, ["u2", "j-1"]);
}

async fn drain_after(store: &Store, client: &Client, job: &ClaimedJob) -> Vec<String> {
    assert!(settle(store, &succeeded(job)).await);
    drain(store, client).await
}

#[tokio::test]
async fn a_late_effect_closes_the_line_to_an_urgent_job_too() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept_line(&store, "j", &arn(1), 2).await;
    let head = claim_one(&store).await;
    let mut end = succeeded(&head);
    end.late_effect = Some("import x never".into());
    assert!(settle(&store, &end).await);
    accept(&store, &[urgent("u", &arn(1))]).await;
    assert!(!value::<bool>(&client, DUE, &[]).await, "nor is it looked at in vain");
    db.advance(SIGNATURE_LIFE).await;
    let job = claim_one(&store).await;
    assert!(name(&job) == "u" && job.late.is_none());
    assert_eq!(drain_after(&store, &client, &job).await, ["j-2"]);
}

#[tokio::test]
async fn an_urgent_job_of_the_future_overtakes_when_its_time_comes() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let ahead = (store.now().await.unwrap() + time::Duration::hours(1)).replace_nanosecond(0).unwrap();
    let fields = json!({"operation": "delete", "urgent": true, "not_before": ahead.format(&Rfc3339).unwrap()});
    accept(&store, &[job_with("u", &arn(1), fields)]).await;
    accept_line(&store, "j", &arn(1), 2).await;
    again(&store, &claim_one(&store).await, Duration::from_secs(86_400), RetryState::default()).await;
    db.advance(Duration::from_secs(3_601)).await;
    assert_eq!(store.keep_house().await.unwrap(), 1);
    let job = claim_one(&store).await;
    assert_eq!(name(&job), "u");
    assert!(settle(&store, &succeeded(&job)).await);
    assert!(claim(&store, 8).await.is_empty());
    db.advance(Duration::from_secs(86_400)).await;
    assert_eq!(drain(&store, &client).await, ["j-1", "j-2"]);
}

/// More jobs than are passed over at once have ended behind the head: claims go on in steps.
#[tokio::test]
async fn a_head_goes_on_past_thousands_that_ended_out_of_turn() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    for slice in 0..13 {
        let jobs: Vec<_> = (0..200).map(|n| job(&format!("{slice}-{n}"), &arn(1))).collect();
        accept(&store, &jobs).await;
    }
    let ended = "update job set state = 'failed', finished_at = keyferry_now(), error = '{}'
                 where seq between 2 and $1::bigint";
    client.execute(ended, &[&2_599_i64]).await.unwrap();
    assert!(settle(&store, &succeeded(&claim_one(&store).await)).await);
    let mut steps = 0;
    let last = loop {
        match claim(&store, 8).await.pop() {
            Some(job) => break job,
            None => steps += 1,
        }
    };
    assert!((last.sequence, last.attempt) == (2_600, 1) && steps <= 3, "{steps}");
    assert!(settle(&store, &succeeded(&last)).await);
    // And to the end of the line, when all that is left has ended.
    accept_line(&store, "last", &arn(1), 1_200).await;
    client
        .execute("update job set state = 'failed', finished_at = keyferry_now() where seq > 2601", &[])
        .await
        .unwrap();
    assert!(settle(&store, &succeeded(&claim_one(&store).await)).await);
    while value::<i64>(&client, "select count(*) from line where due_at is not null", &[]).await > 0 {
        assert!(claim(&store, 8).await.is_empty());
    }
    assert_dense(&client).await;
}

const ALL: usize = 400;

/// Four workers, ten keys, urgent deletes among imports and attempts that are repeated: every job ends once, urgent
/// ones in their order, the others in theirs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rivals_never_run_two_jobs_of_a_line_nor_one_twice() {
    use std::collections::{HashMap, HashSet};
    use std::sync::{Arc, Mutex};
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let (held, ended) = (Arc::new(Mutex::new(HashSet::new())), Arc::new(Mutex::new(Vec::<(i64, bool, i64)>::new())));
    let publisher = tokio::spawn({
        let store = store.clone();
        async move {
            for slice in 0..20_usize {
                let jobs: Vec<_> = (0..20)
                    .map(|n| {
                        let (id, key) = (format!("{slice}-{n}"), arn((n % 10) as u128));
                        if (slice + n) % 5 == 0 { urgent(&id, &key) } else { job(&id, &key) }
                    })
                    .collect();
                accept(&store, &jobs).await;
            }
        }
    });
    let workers: Vec<_> = (0..4)
        .map(|worker| {
            let (store, held, ended) = (store.clone(), Arc::clone(&held), Arc::clone(&ended));
            tokio::spawn(async move {
                while ended.lock().unwrap().len() < ALL {
                    for (n, job) in claim(&store, 4).await.into_iter().enumerate() {
                        assert!(held.lock().unwrap().insert(job.lease.line_id), "a line was claimed twice");
                        let end = match (worker + n + job.attempt as usize) % 4 {
                            0 => put_back(&job, None),
                            1 => retry(&job, Duration::ZERO, job.deadline, RetryState::default()),
                            _ => {
                                let done = (job.lease.line_id, job.request.urgent, job.sequence);
                                ended.lock().unwrap().push(done);
                                succeeded(&job)
                            }
                        };
                        held.lock().unwrap().remove(&job.lease.line_id);
                        assert!(settle(&store, &end).await);
                    }
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    publisher.await.unwrap();
    for worker in workers {
        worker.await.unwrap();
    }
    let mut seen: HashMap<(i64, bool), Vec<i64>> = HashMap::new();
    for (line, urgent, seq) in ended.lock().unwrap().iter() {
        seen.entry((*line, *urgent)).or_default().push(*seq);
    }
    assert_eq!(seen.values().map(Vec::len).sum::<usize>(), ALL);
    assert!(seen.values().all(|order| order.is_sorted()), "{seen:?}");
    assert_dense(&client).await;
    assert_audit_holds(&client).await;
    let attempts = "select count(*) from job where attempts < 1 or state <> 'succeeded'";
    assert_eq!(value::<i64>(&client, attempts, &[]).await, 0);
    assert_eq!(value::<i64>(&client, "select count(*) from urgent", &[]).await, 0);
}
