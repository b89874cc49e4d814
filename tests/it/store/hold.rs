//! Holds stop what is within them at once, and no line is forgotten when they are released.

use super::given::{
    LEASE, REGION, SIGNATURE_LIFE, accept, accept_line, arn, arn_in, assert_audit_holds, assert_dense, claim,
    claim_one, generating_step, job, job_with, put_back, retry, settle, succeeded, urgent, value,
};
use crate::support::db::TestDb;
use keyferry::job::KeyArn;
use keyferry::store::{Cancelled, ClaimedJob, Ending, Held, NewJob, Prepared, RetryState, Scan, Scope, Stop, Store};
use serde_json::json;
use std::time::Duration;
use tokio_postgres::Client;
use uuid::Uuid;

const OPERATOR: &str = "op";
const PARKED: &str = "select count(*) from line where parked_by is not null";

async fn hold(store: &Store, scope: &Scope) {
    assert!(matches!(store.hold(scope, Some("a test"), OPERATOR).await.unwrap(), Held::Now(_)), "{scope:?}");
}

async fn release(store: &Store, scope: &Scope) {
    assert!(store.release(scope, OPERATOR).await.unwrap().is_some(), "{scope:?}");
    while store.wake_parked().await.unwrap() > 0 {}
}

fn names(jobs: &[ClaimedJob]) -> Vec<&str> {
    let mut names: Vec<&str> = jobs.iter().map(|job| job.request.id.as_str()).collect();
    names.sort_unstable();
    names
}

async fn end_all(store: &Store, jobs: &[ClaimedJob]) {
    for job in jobs {
        assert!(settle(store, &succeeded(job)).await);
    }
}

fn of(principal: &str, job: NewJob) -> NewJob {
    NewJob { principal: principal.into(), ..job }
}

async fn assert_sound(client: &Client) {
    assert_dense(client).await;
    assert_audit_holds(client).await;
}

#[tokio::test]
async fn each_scope_stops_its_own_jobs_and_no_others() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let mrk = |region: &str| {
        KeyArn::parse(&format!("arn:aws:kms:{region}:111122223333:key/mrk-{}", Uuid::from_u128(7).simple())).unwrap()
    };
    let elsewhere = KeyArn::parse(&format!("arn:aws:kms:{REGION}:444455556666:key/{}", Uuid::from_u128(4))).unwrap();
    let all = ["account", "key", "plain", "principal", "region"];
    for (round, (scope, stops)) in [
        (Scope::Everything, &all[..]),
        (Scope::Account("444455556666".into()), &["account"][..]),
        (Scope::Region("us-east-1".into()), &["region"][..]),
        (Scope::Principal("payroll".into()), &["principal"][..]),
        // The key of another Region has the same line.
        (Scope::Key(mrk("eu-west-1")), &["key"][..]),
    ]
    .into_iter()
    .enumerate()
    {
        hold(&store, &scope).await;
        let named = |name: &str, key: &KeyArn| {
            let mut job = job(&format!("{name}-{round}"), key);
            job.request.id = keyferry::job::RequestId::parse(&format!("{name}-{round}")).unwrap();
            job
        };
        accept(
            &store,
            &[
                named("plain", &arn(1)),
                named("account", &elsewhere),
                named("region", &arn_in("us-east-1", 3)),
                of("payroll", named("principal", &arn(5))),
                named("key", &mrk(REGION)),
                // A dry run is held as well.
            ],
        )
        .await;
        let is_stopped = |name: &&str| stops.iter().any(|stopped| name.starts_with(stopped));
        let ran = claim(&store, 20).await;
        assert!(ran.len() + stops.len() == 5 && !names(&ran).iter().any(is_stopped), "{scope:?}: {:?}", names(&ran));
        assert_eq!(value::<i64>(&client, PARKED, &[]).await, i64::try_from(stops.len()).unwrap());
        end_all(&store, &ran).await;
        assert!(claim(&store, 20).await.is_empty());
        release(&store, &scope).await;
        let rest = claim(&store, 20).await;
        assert!(rest.len() == stops.len() && rest.iter().all(|job| job.attempt == 1), "{scope:?}");
        end_all(&store, &rest).await;
        assert_sound(&client).await;
    }
    assert_eq!(store.holds().await.unwrap().len(), 0);
    let by = "select count(*) from audit_entry where entry::jsonb ->> 'kind' in ('held', 'hold_released')
              and entry::jsonb -> 'details' ->> 'operator' = 'op'";
    assert_eq!(value::<i64>(&client, by, &[]).await, 10);
}

#[tokio::test]
async fn a_hold_is_made_once_and_released_once() {
    let db = TestDb::create().await;
    let store = db.store().await;
    let scope = Scope::Account("111122223333".into());
    hold(&store, &scope).await;
    let Held::Before(first) = store.hold(&scope, None, "another").await.unwrap() else { panic!("held twice") };
    assert_eq!((first.by.as_str(), first.reason.as_deref()), (OPERATOR, Some("a test")));
    assert!(store.release(&Scope::Everything, OPERATOR).await.unwrap().is_none(), "by the same words only");
    release(&store, &scope).await;
    assert!(store.release(&scope, OPERATOR).await.unwrap().is_none());
    hold(&store, &scope).await;
    assert_eq!(store.holds().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_job_under_way_stops_at_its_next_step() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept_line(&store, "j", &arn(1), 2).await;
    let job = claim_one(&store).await;
    let scope = Scope::Key(arn(1));
    assert_eq!(store.is_stopped(job.id, None).await.unwrap(), None);
    hold(&store, &scope).await;
    assert_eq!(store.under_way(&scope).await.unwrap(), 1);
    assert_eq!(store.under_way(&Scope::Principal("nobody".into())).await.unwrap(), 0);
    assert_eq!(store.is_stopped(job.id, None).await.unwrap(), Some(Stop::Held));
    let (step, generated) = generating_step(&job);
    assert_eq!(store.prepare(&[&step]).await.unwrap(), [Prepared::Held]);
    assert!(store.sealed_source_key(&generated.name).await.unwrap().is_none());
    assert!(settle(&store, &put_back(&job, None)).await);
    assert!(claim(&store, 8).await.is_empty());
    assert_eq!(store.under_way(&scope).await.unwrap(), 0);
    // In doubt as well: its takeover says so, and waits.
    release(&store, &scope).await;
    let job = claim_one(&store).await;
    assert_eq!(store.prepare(&[&generating_step(&job).0]).await.unwrap(), [Prepared::Ready]);
    hold(&store, &scope).await;
    db.advance(LEASE * 2).await;
    assert!(claim(&store, 8).await.is_empty());
    assert_eq!(value::<i64>(&client, "select count(*) from line where late_until > keyferry_now()", &[]).await, 1);
    release(&store, &scope).await;
    let job = claim_one(&store).await;
    assert!(job.progress.in_doubt && job.attempt == 2);
    // The deadline goes on counting.
    hold(&store, &scope).await;
    assert!(settle(&store, &put_back(&job, None)).await);
    assert!(claim(&store, 8).await.is_empty());
    db.advance(Duration::from_secs(4 * 86_400)).await;
    release(&store, &scope).await;
    let job = claim_one(&store).await;
    assert!(job.now > job.deadline);
    assert_sound(&client).await;
}

#[tokio::test]
async fn what_is_parked_can_be_overtaken_and_cancelled() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let scope = Scope::Principal("payroll".into());
    hold(&store, &scope).await;
    accept(&store, &[of("payroll", job("held", &arn(1))), job("behind", &arn(1))]).await;
    assert!(claim(&store, 8).await.is_empty());
    // Another's urgent delete overtakes the held head, which then waits again.
    accept(&store, &[urgent("u", &arn(1))]).await;
    let overtaking = claim_one(&store).await;
    assert_eq!(overtaking.request.id.as_str(), "u");
    assert!(settle(&store, &succeeded(&overtaking)).await);
    assert!(claim(&store, 8).await.is_empty());
    assert_eq!(value::<i64>(&client, PARKED, &[]).await, 1);
    // One of the held principal is held itself; the head behind it goes when that is cancelled.
    let own = of("payroll", urgent("own", &arn(1)));
    accept(&store, std::slice::from_ref(&own)).await;
    assert!(claim(&store, 8).await.is_empty());
    assert_eq!(store.cancel(&[own.id], OPERATOR).await.unwrap(), [Cancelled::Ended]);
    assert!(claim(&store, 8).await.is_empty());
    assert_sound(&client).await;
    let held: Uuid = value(&client, "select id from job where request_id = 'held'", &[]).await;
    assert_eq!(store.cancel(&[held], OPERATOR).await.unwrap(), [Cancelled::Ended]);
    let behind = claim_one(&store).await;
    assert_eq!(behind.request.id.as_str(), "behind");
    // Marked under its lease and left behind: it ends without AWS, hold or not.
    hold(&store, &Scope::Everything).await;
    assert_eq!(store.cancel(&[behind.id], OPERATOR).await.unwrap(), [Cancelled::Requested]);
    db.advance(LEASE * 2).await;
    let found = claim_one(&store).await;
    assert_eq!(found.ending, Some(Ending::Cancelled));
    assert!(settle(&store, &put_back(&found, None)).await);
    assert_sound(&client).await;
    assert_eq!(value::<i64>(&client, "select count(*) from job where state = 'waiting'", &[]).await, 0);
}

#[tokio::test]
async fn a_held_urgent_delete_holds_up_nobody_elses_jobs() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let scope = Scope::Principal("payroll".into());
    // The head waits for its next attempt; the delete that overtakes it is found held.
    accept(&store, &[job("j-1", &arn(1)), job("j-2", &arn(1))]).await;
    let head = claim_one(&store).await;
    let hour = Duration::from_secs(3_600);
    assert!(settle(&store, &retry(&head, hour, head.deadline, RetryState::default())).await);
    hold(&store, &scope).await;
    accept(&store, &[of("payroll", urgent("u", &arn(1)))]).await;
    assert!(claim(&store, 8).await.is_empty(), "the head's own delay stands");
    assert_eq!(value::<i64>(&client, PARKED, &[]).await, 0);
    db.advance(hour).await;
    let head = claim_one(&store).await;
    assert_eq!((head.request.id.as_str(), head.attempt), ("j-1", 2));
    // Nor another's urgent delete, before it or behind.
    accept(&store, &[urgent("v", &arn(1))]).await;
    assert!(settle(&store, &succeeded(&head)).await);
    let other = claim_one(&store).await;
    assert_eq!(other.request.id.as_str(), "v");
    // One of which something is in doubt is settled before what a release wakes.
    let intent = keyferry::store::Intent::Delete { material_ids: vec!["a".into()] };
    let (lease, job_id) = (other.lease, other.id);
    let step = keyferry::store::Step { lease, job_id, intent, effect: "delete a".into(), facts: Vec::new() };
    assert_eq!(store.prepare(&[&step]).await.unwrap(), [Prepared::Ready]);
    release(&store, &scope).await;
    db.advance(LEASE * 2).await;
    let other = claim_one(&store).await;
    assert!(other.request.id.as_str() == "v" && other.progress.in_doubt);
    assert!(settle(&store, &succeeded(&other)).await);
    db.advance(SIGNATURE_LIFE).await;
    let own = claim_one(&store).await;
    assert_eq!((own.request.id.as_str(), own.attempt), ("u", 1));
    assert!(settle(&store, &put_back(&own, None)).await);
    // At the head its line is parked, until the hold is released or another overtakes it.
    hold(&store, &scope).await;
    let head = claim_one(&store).await;
    assert_eq!(head.request.id.as_str(), "j-2");
    assert!(settle(&store, &succeeded(&head)).await);
    assert!(claim(&store, 8).await.is_empty());
    assert_eq!(value::<i64>(&client, PARKED, &[]).await, 1);
    accept(&store, &[urgent("w", &arn(1))]).await;
    let other = claim_one(&store).await;
    assert_eq!(other.request.id.as_str(), "w");
    assert!(settle(&store, &succeeded(&other)).await);
    assert!(claim(&store, 8).await.is_empty());
    release(&store, &scope).await;
    let own = claim_one(&store).await;
    assert_eq!((own.request.id.as_str(), own.attempt), ("u", 1));
    assert!(settle(&store, &succeeded(&own)).await);
    assert_sound(&client).await;
    for left in ["urgent", "line where due_at is not null"] {
        assert_eq!(value::<i64>(&client, &format!("select count(*) from {left}"), &[]).await, 0, "{left}");
    }
    // Cancelled while it is parked, it is gone.
    hold(&store, &scope).await;
    let own = of("payroll", urgent("x", &arn(1)));
    accept(&store, &[job("k", &arn(1)), own.clone()]).await;
    let head = claim_one(&store).await;
    assert_eq!(store.cancel(&[own.id], OPERATOR).await.unwrap(), [Cancelled::Ended]);
    assert!(settle(&store, &succeeded(&head)).await);
    assert_sound(&client).await;
    assert_eq!(value::<i64>(&client, "select count(*) from urgent", &[]).await, 0);
}

/// Two holds on one job: it goes on when the second is released.
#[tokio::test]
async fn ten_thousand_held_lines_cost_nothing_until_they_are_released() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let both = [Scope::Everything, Scope::Region(REGION.into())];
    for scope in &both {
        hold(&store, scope).await;
    }
    let jobs: Vec<_> =
        (0..10_000).map(|n| job_with(&format!("j{n}"), &arn(n), json!({"dry_run": n % 2 == 0}))).collect();
    accept(&store, &jobs).await;
    let from = std::time::Instant::now();
    // One transaction, so that a worker that is told to stop can.
    let once = store.claim(64, LEASE, SIGNATURE_LIFE, Scan::FromBounds).await.unwrap();
    assert!(once.jobs.is_empty() && once.put_aside == 64);
    assert!(claim(&store, 64).await.is_empty());
    println!("parked 10,000 lines in {:?}", from.elapsed());
    assert_eq!(value::<i64>(&client, PARKED, &[]).await, 10_000);
    // Nothing is due, so that nothing is claimed in vain.
    let changes = "select count(*) from line where xmin::text::bigint > $1::text::bigint";
    let last: String = value(&client, "select pg_current_xact_id()::xid::text", &[]).await;
    for _ in 0..20 {
        assert!(claim(&store, 64).await.is_empty());
    }
    assert_eq!(value::<i64>(&client, changes, &[&last]).await, 0);
    let from = std::time::Instant::now();
    release(&store, &both[0]).await;
    println!("woke 10,000 lines in {:?}", from.elapsed());
    assert_eq!(value::<i64>(&client, PARKED, &[]).await, 0);
    assert!(claim(&store, 64).await.is_empty(), "the other hold stops them");
    assert_eq!(value::<i64>(&client, PARKED, &[]).await, 10_000);
    release(&store, &both[1]).await;
    assert_eq!(claim(&store, 64).await.len(), 64);
}

/// Claims that park meet releases, again and again: whatever the order, no line is left parked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_that_races_with_parking_forgets_no_line() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let jobs: Vec<_> = (0..30).map(|n| job(&format!("j{n}"), &arn(n))).collect();
    accept(&store, &jobs).await;
    let claimer = |store: Store| async move {
        let mut seen = 0;
        for _ in 0..4 {
            for job in claim(&store, 7).await {
                seen += 1;
                let end = if seen % 2 == 0 {
                    put_back(&job, None)
                } else {
                    retry(&job, Duration::ZERO, job.deadline, RetryState::default())
                };
                assert!(settle(&store, &end).await);
            }
        }
    };
    for round in 0..60_u32 {
        let scope = if round % 2 == 0 { Scope::Everything } else { Scope::Account("111122223333".into()) };
        hold(&store, &scope).await;
        let releasing = async {
            tokio::time::sleep(Duration::from_millis(u64::from(round % 12))).await;
            assert!(store.release(&scope, OPERATOR).await.unwrap().is_some());
            // As the command does it that is killed right after, every other time.
            if round % 3 != 0 {
                while store.wake_parked().await.unwrap() > 0 {}
            }
        };
        tokio::join!(claimer(store.clone()), claimer(store.clone()), releasing);
        // Housekeeping.
        while store.wake_parked().await.unwrap() > 0 {}
        assert_eq!(value::<i64>(&client, PARKED, &[]).await, 0, "round {round}");
        assert_eq!(value::<i64>(&client, "select count(*) from line where due_at <= keyferry_now()", &[]).await, 30);
    }
    assert_sound(&client).await;
}
