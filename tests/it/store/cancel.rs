//! Cancelled jobs end at once, or as soon as nothing is in doubt; never twice, and never without their line.

use super::given::{
    Case, LEASE, OPERATOR, SIGNATURE_LIFE, accept, accept_line, arn, case, claim, claim_one, contents, generating_step,
    job, job_with, put_back, retry, settle, succeeded, urgent, value,
};
use keyferry::store::{
    Answered, CANCEL_PAGE, Cancelled, ClaimedJob, Ending, Intent, JobFilter, Prepared, RetryState, Settled, Step, Stop,
};
use serde_json::json;
use std::time::Duration;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

impl Case {
    async fn id(&self, request_id: &str) -> Uuid {
        value(&self.client, "select id from job where request_id = $1", &[&request_id]).await
    }

    async fn cancel(&self, request_id: &str) -> Cancelled {
        let id = self.id(request_id).await;
        self.store.cancel(&[id], OPERATOR).await.unwrap().remove(0)
    }

    /// State and code.
    async fn end(&self, request_id: &str) -> (String, Option<String>) {
        let query = "select state, error ->> 'code' from job where request_id = $1";
        let row = self.client.query_one(query, &[&request_id]).await.unwrap();
        (row.get(0), row.get(1))
    }

    async fn assert_cancelled(&self, request_id: &str) {
        assert_eq!(self.end(request_id).await, ("failed".into(), Some("cancelled".into())), "{request_id}");
        let told: i64 =
            value(&self.client, "select count(*) from outbox where event_id = $1", &[&self.id(request_id).await]).await;
        assert_eq!(told, 1, "{request_id}");
        self.assert_sound().await;
    }

    async fn again(&self, job: &ClaimedJob, delay: Duration, state: RetryState) {
        assert!(settle(&self.store, &retry(job, delay, job.deadline, state)).await);
    }

    /// Claims and ends jobs until there is none; says in which order.
    async fn drain(&self) -> Vec<String> {
        let mut order = Vec::new();
        while let Some(job) = claim(&self.store, 1).await.pop() {
            order.push(job.request.id.as_str().to_owned());
            assert!(settle(&self.store, &succeeded(&job)).await);
        }
        self.assert_sound().await;
        for left in ["urgent", "cancellation", "progress", "future", "line where due_at is not null"] {
            assert_eq!(value::<i64>(&self.client, &format!("select count(*) from {left}"), &[]).await, 0, "{left}");
        }
        order
    }
}

#[tokio::test]
async fn waiting_jobs_end_at_once_wherever_they_stand() {
    let case = case().await;
    accept_line(&case.store, "j", &arn(1), 6).await;
    let ahead = (case.store.now().await.unwrap() + time::Duration::hours(1)).replace_nanosecond(0).unwrap();
    let later = json!({"not_before": ahead.format(&Rfc3339).unwrap()});
    accept(&case.store, &[job_with("later", &arn(1), later.clone()), job_with("later-too", &arn(1), later)]).await;
    // Middle, head with the one behind it gone already, last, and one that has not joined its line.
    for name in ["j-3", "j-2", "j-1", "j-6", "later"] {
        assert_eq!(case.cancel(name).await, Cancelled::Ended, "{name}");
        case.assert_cancelled(name).await;
    }
    let before = contents(&case.client).await;
    let was = Cancelled::EndedBefore { state: "failed".into(), code: Some("cancelled".into()) };
    assert_eq!(case.cancel("j-3").await, was, "once");
    assert_eq!(case.store.cancel(&[Uuid::now_v7()], OPERATOR).await.unwrap(), [Cancelled::Unknown]);
    assert_eq!(contents(&case.client).await, before);
    assert_eq!(case.end("later-too").await.0, "waiting");
    case.db.advance(Duration::from_secs(3_601)).await;
    assert_eq!(case.store.keep_house().await.unwrap(), 1);
    assert_eq!(case.drain().await, ["j-4", "j-5", "later-too"]);
    assert!(matches!(case.cancel("j-4").await, Cancelled::EndedBefore { code: None, .. }));
    // The whole of a line.
    accept_line(&case.store, "k", &arn(2), 3).await;
    let ids = [case.id("k-3").await, case.id("k-1").await, case.id("k-2").await];
    assert!(case.store.cancel(&ids, OPERATOR).await.unwrap().iter().all(|became| *became == Cancelled::Ended));
    assert!(claim(&case.store, 8).await.is_empty());
    accept_line(&case.store, "l", &arn(2), 1).await;
    assert_eq!(case.drain().await, ["l-1"]);
    let audit = "select entry::jsonb -> 'details' ->> 'operator' from audit_entry where entry::jsonb ->> 'kind' = 'cancel_requested'";
    let operators = case.client.query(audit, &[]).await.unwrap();
    assert!(operators.len() == 8 && operators.iter().all(|row| row.get::<_, &str>(0) == OPERATOR));
}

#[tokio::test]
async fn a_job_that_cannot_be_read_keeps_no_other() {
    let case = case().await;
    accept_line(&case.store, "j", &arn(1), 3).await;
    let newer = "update job set request = '{\"operation\":\"unheard-of\"}' where request_id = 'j-2'";
    case.client.batch_execute(newer).await.unwrap();
    let ids = [case.id("j-1").await, case.id("j-2").await, case.id("j-3").await];
    let became = case.store.cancel(&ids, OPERATOR).await.unwrap();
    assert!(became[0] == Cancelled::Ended && became[2] == Cancelled::Ended, "{became:?}");
    assert!(matches!(&became[1], Cancelled::Unreadable(message) if message.contains("cannot be read")), "{became:?}");
    assert_eq!(case.end("j-2").await.0, "waiting");
    case.assert_sound().await;
}

#[tokio::test]
async fn a_job_under_way_ends_between_two_steps() {
    let case = case().await;
    accept_line(&case.store, "j", &arn(1), 6).await;
    // When it is about to change AWS.
    let leased = claim_one(&case.store).await;
    for _ in 0..2 {
        assert_eq!(case.cancel("j-1").await, Cancelled::Requested);
        case.assert_sound().await;
    }
    assert_eq!(case.store.is_stopped(leased.id, None).await.unwrap(), Some(Stop::Ending(Ending::Cancelled)));
    assert_eq!(case.store.is_stopped(leased.id, Some(Ending::Cancelled)).await.unwrap(), None);
    let (step, generated) = generating_step(&leased);
    assert_eq!(case.store.prepare(&[&step]).await.unwrap(), [Prepared::Ending(Ending::Cancelled)]);
    assert!(case.store.sealed_source_key(&generated.name).await.unwrap().is_none(), "nothing was written");
    case.again(&leased, Duration::from_secs(60), RetryState::default()).await;
    case.assert_cancelled("j-1").await;
    // When it is given back, and to its successor if its worker dies.
    let leased = claim_one(&case.store).await;
    assert_eq!(leased.ending, None);
    assert_eq!(case.cancel("j-2").await, Cancelled::Requested);
    // So that the worker counts it.
    let settled = case.store.settle(&[&put_back(&leased, None)], SIGNATURE_LIFE).await.unwrap();
    assert_eq!(settled, [Settled::Ended(Ending::Cancelled)]);
    case.assert_cancelled("j-2").await;
    let left = claim_one(&case.store).await;
    case.db.advance(LEASE * 2).await;
    assert_eq!(case.cancel("j-3").await, Cancelled::Requested, "the worker may be alive");
    let found = claim_one(&case.store).await;
    assert!(found.id == left.id && found.ending == Some(Ending::Cancelled));
    assert!(settle(&case.store, &put_back(&found, None)).await);
    case.assert_cancelled("j-3").await;
    // Its own end comes first.
    let leased = claim_one(&case.store).await;
    assert_eq!(case.cancel("j-4").await, Cancelled::Requested);
    assert!(settle(&case.store, &succeeded(&leased)).await);
    assert_eq!(case.end("j-4").await.0, "succeeded");
    assert_eq!(case.drain().await, ["j-5", "j-6"]);
}

#[tokio::test]
async fn what_is_in_doubt_is_settled_first() {
    let case = case().await;
    accept_line(&case.store, "j", &arn(1), 3).await;
    for (name, answered) in [("j-1", false), ("j-2", true)] {
        let first = claim_one(&case.store).await;
        let (step, chosen) = generating_step(&first);
        assert_eq!(case.store.prepare(&[&step]).await.unwrap(), [Prepared::Ready]);
        let state = if answered {
            RetryState { answered: Some(Answered::default()), ..RetryState::default() }
        } else {
            RetryState { in_doubt: true, ..RetryState::default() }
        };
        case.again(&first, Duration::ZERO, state.clone()).await;
        assert_eq!(case.cancel(name).await, Cancelled::Requested);
        let second = claim_one(&case.store).await;
        assert_eq!(case.end(name).await.0, "waiting");
        if answered {
            // Whatever is left is to see it.
            case.again(&second, Duration::ZERO, state).await;
            assert!(settle(&case.store, &succeeded(&claim_one(&case.store).await)).await);
            assert_eq!(case.end(name).await.0, "succeeded");
        } else {
            assert_eq!(
                case.store.prepare(&[&super::given::step(&second, &chosen)]).await.unwrap(),
                [Prepared::Ready],
                "the same call once more"
            );
            // It turns out to have done nothing.
            case.again(&second, Duration::from_secs(60), RetryState::default()).await;
            case.assert_cancelled(name).await;
        }
    }
    assert_eq!(case.drain().await, ["j-3"]);
}

#[tokio::test]
async fn a_delete_that_is_half_done_says_so() {
    let case = case().await;
    accept(&case.store, &[job_with("d", &arn(1), json!({"operation": "delete", "scope": "all"}))]).await;
    let first = claim_one(&case.store).await;
    let intent = Intent::Delete { material_ids: vec!["a".into(), "b".into()] };
    let step = Step { lease: first.lease, job_id: first.id, intent, effect: "delete a b".into(), facts: Vec::new() };
    assert_eq!(case.store.prepare(&[&step]).await.unwrap(), [Prepared::Ready]);
    let mut end = retry(&first, Duration::from_secs(60), first.deadline, RetryState::default());
    end.removed = keyferry::store::Removed::Materials(vec!["a".into()]);
    assert!(settle(&case.store, &end).await);
    assert_eq!(case.cancel("d").await, Cancelled::Ended);
    case.assert_cancelled("d").await;
    let changed = "select (error ->> 'aws_changed')::boolean from job";
    assert!(value::<bool>(&case.client, changed, &[]).await);
}

#[tokio::test]
async fn urgent_jobs_and_the_heads_that_they_overtook_are_cancelled_too() {
    let case = case().await;
    accept_line(&case.store, "j", &arn(1), 3).await;
    case.again(&claim_one(&case.store).await, Duration::from_secs(3_600), RetryState::default()).await;
    accept(&case.store, &[urgent("u1", &arn(1)), urgent("u2", &arn(1))]).await;
    let due = "select due_at <= keyferry_now() from line";
    assert_eq!(case.cancel("u1").await, Cancelled::Ended);
    case.assert_cancelled("u1").await;
    assert!(value::<bool>(&case.client, due, &[]).await, "the second is next");
    assert_eq!(case.cancel("u2").await, Cancelled::Ended);
    case.assert_cancelled("u2").await;
    assert!(!value::<bool>(&case.client, due, &[]).await, "the head waits as it was to");
    let lane = "select operation from lane join line on line.lane_id = lane.id";
    assert_eq!(value::<String>(&case.client, lane, &[]).await, "GetParametersForImport");
    // The head goes while an urgent one waits, and while one runs.
    accept(&case.store, &[urgent("u3", &arn(1))]).await;
    assert_eq!(case.cancel("j-1").await, Cancelled::Ended);
    case.assert_cancelled("j-1").await;
    let leased = claim_one(&case.store).await;
    assert_eq!(leased.request.id.as_str(), "u3");
    assert_eq!(case.cancel("j-2").await, Cancelled::Ended, "it is not the one under way");
    case.assert_cancelled("j-2").await;
    assert_eq!(case.cancel("u3").await, Cancelled::Requested);
    assert!(settle(&case.store, &put_back(&leased, None)).await);
    case.assert_cancelled("u3").await;
    let next = claim_one(&case.store).await;
    assert_eq!((next.request.id.as_str(), next.attempt), ("j-3", 1));
    assert!(settle(&case.store, &put_back(&next, None)).await);
    assert_eq!(case.drain().await, ["j-3"]);
    // All but the urgent one, which then is the head as well.
    accept_line(&case.store, "k", &arn(2), 2).await;
    accept(&case.store, &[urgent("v", &arn(2))]).await;
    let ids = [case.id("k-1").await, case.id("k-2").await];
    case.store.cancel(&ids, OPERATOR).await.unwrap();
    case.assert_sound().await;
    assert_eq!(case.drain().await, ["v"]);
}

/// Workers claim and end while operators cancel the same jobs: each ends once, and no line stands still.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelling_races_with_workers() {
    let case = case().await;
    let jobs: Vec<_> = (0..400_u128)
        .map(|n| {
            let (id, key) = (format!("j{n}"), arn(n % 20));
            if n % 7 == 0 { urgent(&id, &key) } else { job(&id, &key) }
        })
        .collect();
    accept(&case.store, &jobs).await;
    let workers: Vec<_> = (0..3)
        .map(|_| {
            let (store, client) = (case.store.clone(), case.db.client());
            async move {
                let client = client.await;
                // Not by the job's own attempt: one that is put back keeps its number, the last of all for ever.
                let mut turn = 0;
                while value::<i64>(&client, "select count(*) from job where state = 'waiting'", &[]).await > 0 {
                    for job in claim(&store, 5).await {
                        turn += 1;
                        let end = match turn % 3 {
                            0 => put_back(&job, None),
                            1 => retry(&job, Duration::ZERO, job.deadline, RetryState::default()),
                            _ => succeeded(&job),
                        };
                        assert!(settle(&store, &end).await);
                    }
                }
            }
        })
        .collect();
    let cancelling = async {
        let ids: Vec<Uuid> = jobs.iter().map(|job| job.id).filter(|id| id.as_u128() % 2 == 0).collect();
        for page in ids.chunks(9) {
            case.store.cancel(page, OPERATOR).await.unwrap();
        }
    };
    tokio::join!(futures_util::future::join_all(workers), cancelling);
    assert!(case.drain().await.is_empty());
    let ends = "select count(*) from (select event_id from outbox group by event_id having count(*) = 1) as once";
    assert_eq!(value::<i64>(&case.client, ends, &[]).await, 400);
    let entries = "select count(*) from audit_entry where entry::jsonb ->> 'kind' in ('failed', 'succeeded')";
    assert_eq!(value::<i64>(&case.client, entries, &[]).await, 400);
}

#[tokio::test]
async fn a_batch_is_read_and_cancelled_in_pages_along_its_own_index() {
    let case = case().await;
    case.client.batch_execute("alter table job set (autovacuum_enabled = false)").await.unwrap();
    for slice in 0..5_u128 {
        let jobs: Vec<_> = (0..200)
            .map(|n| {
                job_with(
                    &format!("{slice}-{n}"),
                    &arn(n % 50),
                    json!({"batch": if n % 2 == 0 { "even" } else { "odd" }}),
                )
            })
            .collect();
        accept(&case.store, &jobs).await;
    }
    accept(&case.store, &[job("none", &arn(1))]).await;
    let filter = JobFilter { batch: Some("even".into()), limit: 900, ..JobFilter::default() };
    let listed = case.store.jobs(&filter).await.unwrap().unwrap();
    assert!(listed.len() == 500 && listed.is_sorted_by(|a, b| a.id > b.id));
    let waiting = case.store.waiting_of_batch("even", Uuid::nil()).await.unwrap();
    assert_eq!((waiting.ids.len(), waiting.after), (500, None));
    for page in waiting.ids.chunks(CANCEL_PAGE) {
        assert!(case.store.cancel(page, OPERATOR).await.unwrap().iter().all(|became| *became == Cancelled::Ended));
        case.assert_sound().await;
    }
    assert!(case.store.waiting_of_batch("even", Uuid::nil()).await.unwrap().ids.is_empty());
    let counts = case.store.batch_counts("even").await.unwrap();
    assert_eq!(counts.into_iter().collect::<Vec<_>>(), [(("failed".into(), "cancelled".into()), 500)]);
    // Ends leave no entry in any index.
    let changes = "select n_tup_upd - n_tup_hot_upd from pg_stat_user_tables where relname = 'job'";
    crate::support::eventually("the changes are counted", || async {
        case.client.batch_execute("select pg_stat_force_next_flush(), pg_stat_clear_snapshot()").await.unwrap();
        let all: i64 =
            value(&case.client, "select n_tup_upd from pg_stat_user_tables where relname = 'job'", &[]).await;
        (all >= 500).then_some(())
    })
    .await;
    let cold: i64 = value(&case.client, changes, &[]).await;
    assert!(cold < 25, "{cold} of 500 changes were not HOT");
}
