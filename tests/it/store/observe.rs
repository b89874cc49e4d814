//! What operators watch of the whole store.

use super::given::{LEASE, accept, accept_line, arn, claim, job, refusal, retry, settle, succeeded, urgent, value};
use crate::support::db::TestDb;
use keyferry::audit::Kind;
use keyferry::job::RefusalCode;
use keyferry::store::{Bounds, Candidate, Queue, RetryState, Scope, Store, Unpublished, Work};
use std::time::Duration;

const HOUR: Duration = Duration::from_secs(3_600);

async fn work(store: &Store) -> Work {
    store.fold_backlog(0).await.unwrap();
    store.observe_work(&mut Bounds::default()).await.unwrap()
}

/// Idle, later, due, closed, held.
fn lanes(work: &Work) -> [i64; 5] {
    [work.idle, work.later, work.due, work.closed, work.held]
}

#[tokio::test]
async fn jobs_are_counted_and_the_oldest_is_known_as_long_as_it_has_not_ended() {
    let db = TestDb::create().await;
    let (store, admin) = (db.store().await, db.client().await);
    assert_eq!(work(&store).await, Work::default());
    accept_line(&store, "one", &arn(1), 3).await;
    accept(&store, &[job("two", &arn(2)), urgent("three", &arn(3))]).await;
    db.advance(HOUR).await;
    let seen = work(&store).await;
    let all: i64 = lanes(&seen).iter().sum();
    assert_eq!((seen.waiting, seen.due), (5, 2), "{seen:?}: the lanes of imports and of deletes");
    assert_eq!(all, value::<i64>(&admin, "select count(*) from lane", &[]).await);
    assert!((3_600.0..7_000.0).contains(&seen.oldest_due), "{seen:?}");
    assert!((3_600.0..7_000.0).contains(&seen.oldest), "{seen:?}");

    admin.batch_execute("update lane set open_at = keyferry_now() + interval '1 h'").await.unwrap();
    assert_eq!(lanes(&work(&store).await)[1..], [0, 0, 2, 0]);
    admin.batch_execute("update lane set open_at = '-infinity'").await.unwrap();

    let jobs = claim(&store, 8).await;
    assert_eq!(jobs.len(), 3);
    let seen = work(&store).await;
    assert_eq!(lanes(&seen)[1..], [2, 0, 0, 0], "{seen:?}");
    assert!(seen.oldest_due.abs() < f64::EPSILON, "{seen:?}");

    // What was tried is known by its progress, whenever it is due again.
    let (again, ended): (Vec<_>, Vec<_>) = jobs.iter().partition(|job| job.request.id.as_str() == "two");
    assert!(settle(&store, &retry(again[0], HOUR, again[0].deadline, RetryState::default())).await);
    for job in &ended {
        assert!(settle(&store, &succeeded(job)).await);
    }
    let seen = work(&store).await;
    assert_eq!(seen.waiting, 3);
    assert!(seen.oldest >= 3_600.0, "{seen:?}");

    // A bound is a hint: below it nothing is seen, and without it all is.
    let mut bounds = Bounds::default();
    store.observe_work(&mut bounds).await.unwrap();
    assert!(store.observe_work(&mut bounds).await.unwrap().oldest >= 3_600.0);
}

#[tokio::test]
async fn a_lane_whose_jobs_are_all_held_is_held() {
    let db = TestDb::create().await;
    let store = db.store().await;
    accept(&store, &[job("one", &arn(1))]).await;
    store.hold(&Scope::Everything, None, "op").await.unwrap();
    assert!(claim(&store, 8).await.is_empty());
    assert_eq!(lanes(&work(&store).await)[1..], [0, 0, 0, 1]);
}

#[tokio::test]
async fn events_are_as_old_as_what_they_tell_of() {
    let db = TestDb::create().await;
    let store = db.store().await;
    let mut bounds = Bounds::default();
    assert_eq!(store.observe_outbox(&mut bounds).await.unwrap(), Unpublished::default());
    let refused = |id: &str| Candidate::Refusal(refusal(id, RefusalCode::NotAllowed));
    store.accept(&[refused("r1"), refused("r2")]).await.unwrap();
    db.advance(HOUR).await;
    accept(&store, &[job("one", &arn(1))]).await;
    let jobs = claim(&store, 8).await;
    assert!(settle(&store, &succeeded(&jobs[0])).await);
    // A relay's lease does not make them younger.
    let taken = store.take_events(Queue::Fresh, 8, LEASE, None).await.unwrap();
    let seen = store.observe_outbox(&mut bounds).await.unwrap();
    assert_eq!((seen.fresh, seen.held), (3, 0));
    assert!((3_600.0..7_000.0).contains(&seen.oldest), "{seen:?}");

    store.hold_events(&[(taken[1].id, HOUR, "unroutable")]).await.unwrap();
    store.forget_events(&[taken[0].id]).await.unwrap();
    let seen = store.observe_outbox(&mut bounds).await.unwrap();
    assert_eq!((seen.fresh, seen.held), (1, 1));
    store.forget_events(&[taken[1].id]).await.unwrap();
    let seen = store.observe_outbox(&mut bounds).await.unwrap();
    assert_eq!((seen.fresh, seen.held), (1, 0));
    assert!(seen.oldest < 3_600.0, "{seen:?}: the job has just ended");
}

#[tokio::test]
async fn keys_are_counted_by_when_their_material_expires() {
    let db = TestDb::create().await;
    let (store, admin) = (db.store().await, db.client().await);
    // Two materials of one key are one key; what was deleted expires no more.
    let insert = "
        insert into kms_material (kms_key_id, fingerprint, fingerprint_version, source_tier, source_key_id,
                                  source_key_name, job_id, valid_to, removed_at)
        select ('00000000-0000-4000-8000-00000000000' || key)::uuid, decode(lpad(n::text, 4, '0'), 'hex'), 1, 'local', 'x',
               'x', gen_random_uuid(), keyferry_now() + after::interval, case when gone then keyferry_now() end
        from (values (1, 1, '-3 days', false), (2, 2, '2 hours', false), (3, 2, '3 hours', false), (4, 3, '5 days', false),
                     (5, 4, '20 days', false), (6, 5, '80 days', false), (7, 6, '2 hours', true), (8, 7, null, false))
             as given(n, key, after, gone)";
    admin.batch_execute(insert).await.unwrap();
    let mut seen = Vec::new();
    for days in [0, 1, 7, 30, 90] {
        seen.push(store.keys_expiring(24 * days * HOUR).await.unwrap());
    }
    assert_eq!(seen, [1, 1, 2, 3, 4]);
    // Whoever is imported again does not hide who expires meanwhile, however many have expired long ago.
    let expire = async |keys: &str, at: &str| {
        let set = format!("update kms_material set valid_to = keyferry_now() + interval '{at}' where {keys}");
        admin.execute(&set, &[]).await.unwrap();
        (store.keys_expiring(Duration::ZERO).await.unwrap(), store.keys_expired_lately().await.unwrap())
    };
    assert_eq!(expire("false", "0 s").await, (1, 0));
    assert_eq!(expire("fingerprint in ('\\x0002', '\\x0003', '\\x0007')", "-10 min").await, (2, 1));
    assert_eq!(expire("fingerprint = '\\x0001'", "90 days").await, (1, 1));
    assert_eq!(expire("fingerprint in ('\\x0002', '\\x0003')", "-2 hours").await, (1, 0));
    let long_ago = "
        insert into kms_material (kms_key_id, fingerprint, fingerprint_version, source_tier, source_key_id,
                                  source_key_name, job_id, valid_to)
        select gen_random_uuid(), decode(lpad(n::text, 6, '0'), 'hex'), 1, 'local', 'x', 'x', gen_random_uuid(),
               keyferry_now() - interval '9 days' from generate_series(1, 5001) as n";
    admin.batch_execute(long_ago).await.unwrap();
    assert_eq!(expire("fingerprint = '\\x0004'", "-1 min").await, (5_000, 1));
}

#[tokio::test]
async fn what_is_put_on_record_is_counted_once_it_is_committed() {
    let db = TestDb::create().await;
    let (store, admin) = (db.store().await, db.client().await);
    let refused = Candidate::Refusal(refusal("r1", RefusalCode::NotAllowed));
    store.accept(std::slice::from_ref(&refused)).await.unwrap();
    store.accept(&[refused]).await.unwrap();
    accept(&store, &[job("one", &arn(1)), job("two", &arn(2))]).await;
    let jobs = claim(&store, 8).await;
    assert!(settle(&store, &succeeded(&jobs[0])).await);
    assert!(settle(&store, &retry(&jobs[1], HOUR, jobs[1].deadline, RetryState::default())).await);
    assert!(!settle(&store, &succeeded(&jobs[1])).await, "the lease is gone");
    for &kind in Kind::ALL {
        let count = "select count(*) from audit_entry where entry::jsonb ->> 'kind' = $1";
        let stored: i64 = value(&admin, count, &[&kind.as_str()]).await;
        assert_eq!(store.entries_written(kind), u64::try_from(stored).unwrap(), "{kind:?}");
    }
    assert_eq!(store.refusals_written(RefusalCode::NotAllowed), 1, "the same message again is no other refusal");
}
