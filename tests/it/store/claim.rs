//! Claims and leases: a line is one worker's at a time, and no line waits behind another.

use super::given::{
    LEASE, SIGNATURE_LIFE, accept, accept_line, arn, arn_in, claim, claim_one, contents, job, put_back, sealed, settle,
    step, succeeded, value,
};
use crate::support::db::TestDb;
use keyferry::store::{Lease, NewJob, Prepared, Scope, Settled};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claimers_never_share_a_line_and_run_it_in_order() {
    let db = TestDb::create().await;
    let store = db.store().await;
    let jobs: Vec<NewJob> = (0..150).map(|n| job(&format!("j{n}"), &arn(n % 30))).collect();
    accept(&store, &jobs).await;
    let held = Arc::new(Mutex::new(HashSet::new()));
    let run = Arc::new(Mutex::new(HashMap::<i64, Vec<i64>>::new()));
    let claimers: Vec<_> = (0..4)
        .map(|_| {
            let (store, held, run) = (store.clone(), Arc::clone(&held), Arc::clone(&run));
            tokio::spawn(async move {
                while run.lock().unwrap().values().map(Vec::len).sum::<usize>() < 150 {
                    let claimed = claim(&store, 7).await;
                    assert!(claimed.len() <= 7);
                    for job in &claimed {
                        assert!(held.lock().unwrap().insert(job.lease.line_id), "a line was claimed twice");
                        assert_eq!(job.attempt, 1);
                    }
                    tokio::task::yield_now().await;
                    let ends: Vec<_> = claimed.iter().map(succeeded).collect();
                    for job in &claimed {
                        // Before the line can be another's.
                        assert!(held.lock().unwrap().remove(&job.lease.line_id));
                        run.lock().unwrap().entry(job.lease.line_id).or_default().push(job.sequence);
                    }
                    let ends: Vec<_> = ends.iter().collect();
                    let kept = store.settle(&ends, SIGNATURE_LIFE).await.unwrap();
                    assert!(kept.into_iter().all(Settled::is_held));
                }
            })
        })
        .collect();
    for claimer in claimers {
        claimer.await.unwrap();
    }
    let run = run.lock().unwrap().clone();
    assert_eq!(run.len(), 30);
    assert!(run.values().all(|order| *order == [1, 2, 3, 4, 5]), "{run:?}");
}

#[tokio::test]
async fn a_claim_takes_as_many_lines_as_there_are_permits_and_only_heads() {
    let db = TestDb::create().await;
    let store = db.store().await;
    let jobs: Vec<NewJob> = (0..80).map(|n| job(&format!("j{n}"), &arn(n % 40))).collect();
    accept(&store, &jobs).await;
    let first = claim(&store, 7).await;
    let rest = claim(&store, 200).await;
    assert_eq!((first.len(), rest.len()), (7, 33));
    let lines: HashSet<i64> = first.iter().chain(&rest).map(|job| job.lease.line_id).collect();
    assert_eq!(lines.len(), 40);
    assert!(first.iter().chain(&rest).all(|job| job.sequence == 1));
    assert!(claim(&store, 200).await.is_empty(), "every line is leased");
}

#[tokio::test]
async fn a_full_lane_keeps_no_other_lane_out_of_a_small_claim() {
    let db = TestDb::create().await;
    let store = db.store().await;
    let flood: Vec<NewJob> = (0..1_000).map(|n| job(&format!("f{n}"), &arn(n))).collect();
    accept(&store, &flood).await;
    // The flooded lane is being served already when the other gets its job.
    assert_eq!(claim(&store, 2).await.len(), 2);
    let other = arn_in("eu-west-1", 5_001);
    accept(&store, &[job("lone", &other)]).await;
    let claimed = claim(&store, 2).await;
    assert_eq!(claimed.len(), 2);
    assert!(claimed.iter().any(|job| job.key == other), "each lane has a share");

    accept(&store, &[job("lone-2", &arn_in("eu-west-2", 5_002))]).await;
    let mut singles = Vec::new();
    for _ in 0..3 {
        singles.extend(claim(&store, 1).await);
    }
    assert!(singles.iter().any(|job| job.key.region() == "eu-west-2"), "the longest unserved lane goes first");
}

/// Lanes that were served before and those that never were are found in different ways.
#[tokio::test]
async fn every_lane_with_work_is_found_whether_it_was_served_before_or_not() {
    let db = TestDb::create().await;
    let store = db.store().await;
    let lane = |n: u128| arn_in(&format!("eu-west-{n}"), n);
    let all = async |most| {
        let mut found = HashSet::new();
        loop {
            let claimed = claim(&store, most).await;
            if claimed.is_empty() {
                return found;
            }
            for job in claimed {
                assert!(found.insert(job.key.region().to_owned()));
                assert!(settle(&store, &succeeded(&job)).await);
            }
        }
    };
    // Lanes get their numbers in the order in which they are first named.
    let jobs = |round: &str, lanes: &[u128]| -> Vec<NewJob> {
        lanes.iter().map(|n| job(&format!("{round}-{n}"), &lane(*n))).collect()
    };
    accept(&store, &jobs("a", &[1, 2, 3, 4, 5, 6, 7, 8, 9])).await;
    assert_eq!(all(4).await.len(), 9);
    accept(&store, &jobs("b", &[2, 5, 6, 9, 10, 11])).await;
    assert_eq!(all(1).await.len(), 6);
    accept(&store, &jobs("c", &[1, 8, 11, 12])).await;
    assert_eq!(all(64).await.len(), 4);
    // So long ago that they count as never served.
    db.advance(Duration::from_secs(2 * 86_400)).await;
    accept(&store, &jobs("d", &[3, 4, 12, 13])).await;
    assert_eq!(all(2).await.len(), 4);
    accept(&store, &jobs("e", &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14])).await;
    assert_eq!(all(3).await.len(), 14);
}

/// Lanes that were not served for a day are found in another way than the others, which must not count parked lines.
#[tokio::test]
async fn lanes_that_are_held_for_days_take_no_share() {
    let db = TestDb::create().await;
    let store = db.store().await;
    for n in 1..=3 {
        let region = format!("eu-west-{n}");
        store.hold(&Scope::Region(region.clone()), None, "op").await.unwrap();
        accept(&store, &[job(&region, &arn_in(&region, n))]).await;
    }
    assert!(claim(&store, 8).await.is_empty());
    db.advance(Duration::from_secs(2 * 86_400)).await;
    let live: Vec<NewJob> = (10..22).map(|n| job(&format!("j{n}"), &arn(n))).collect();
    accept(&store, &live).await;
    assert_eq!(claim(&store, 8).await.len(), 8);
}

#[tokio::test]
async fn a_closed_lane_is_left_alone() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept(&store, &[job("a", &arn(1)), job("b", &arn_in("eu-west-1", 2))]).await;
    client
        .execute("update lane set open_at = keyferry_now() + interval '1 h' where region = 'eu-west-1'", &[])
        .await
        .unwrap();
    assert_eq!(claim_one(&store).await.key, arn(1));
    db.advance(Duration::from_secs(2 * 3600)).await;
    let regions: HashSet<String> = claim(&store, 8).await.iter().map(|job| job.key.region().to_owned()).collect();
    assert!(regions.contains("eu-west-1"));
}

#[tokio::test]
async fn a_lease_that_was_taken_over_is_worth_nothing() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let key = sealed("k");
    super::given::add_source_key(&store, &key).await;
    accept_line(&store, "j", &arn(1), 2).await;
    let old = claim_one(&store).await;
    db.advance(LEASE * 5 / 6).await;
    assert!(claim(&store, 8).await.is_empty(), "the lease still holds");
    db.advance(Duration::from_secs(6)).await;
    let new = claim_one(&store).await;
    assert_eq!(new.id, old.id);
    assert_eq!(new.attempt, 2);
    assert_ne!(new.lease.token, old.lease.token);
    assert_eq!(new.lease.line_id, old.lease.line_id);

    let before = contents(&client).await;
    assert!(!settle(&store, &succeeded(&old)).await);
    assert!(!settle(&store, &put_back(&old, None)).await);
    assert_eq!(store.prepare(&[&step(&old, &key)]).await.unwrap(), [Prepared::LeaseLost]);
    let (generating, _) = super::given::generating_step(&old);
    assert_eq!(store.prepare(&[&generating]).await.unwrap(), [Prepared::LeaseLost]);
    let renewed = store.renew(&[old.lease], LEASE).await.unwrap();
    assert_eq!((renewed.held, renewed.lost), (vec![], vec![old.lease]));
    assert_eq!(contents(&client).await, before);

    // In one slice with its successor, as a process brings both that was slow and claimed its own line again.
    let steps = [&step(&old, &key), &step(&new, &key)];
    assert_eq!(store.prepare(&steps).await.unwrap(), [Prepared::LeaseLost, Prepared::Ready]);
    let ends = [&put_back(&old, None), &succeeded(&new)];
    assert_eq!(store.settle(&ends, SIGNATURE_LIFE).await.unwrap(), [Settled::Lost, Settled::Written]);
    let next = claim_one(&store).await;
    assert_eq!(next.sequence, 2);
    let ends = [&succeeded(&next), &put_back(&old, None)];
    assert_eq!(store.settle(&ends, SIGNATURE_LIFE).await.unwrap(), [Settled::Written, Settled::Lost]);
    assert!(claim(&store, 8).await.is_empty());
    super::given::assert_audit_holds(&client).await;
}

#[tokio::test]
async fn an_expired_lease_that_nobody_took_can_be_renewed_and_settled() {
    let db = TestDb::create().await;
    let store = db.store().await;
    accept(&store, &[job("a", &arn(1))]).await;
    let job = claim_one(&store).await;
    db.advance(2 * LEASE).await;
    let renewed = store.renew(&[job.lease], LEASE).await.unwrap();
    assert_eq!((renewed.held, renewed.lost), (vec![job.lease], vec![]));
    assert!(claim(&store, 8).await.is_empty());
    assert!(settle(&store, &succeeded(&job)).await);
}

#[tokio::test]
async fn a_takeover_of_a_job_in_doubt_closes_its_line_to_other_effects() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept_line(&store, "doubt", &arn(1), 2).await;
    accept_line(&store, "calm", &arn(2), 1).await;
    let claimed = claim(&store, 8).await;
    let doubtful = claimed.iter().find(|job| job.key == arn(1)).unwrap();
    let (step, _) = super::given::generating_step(doubtful);
    assert_eq!(store.prepare(&[&step]).await.unwrap(), [Prepared::Ready]);
    db.advance(LEASE + Duration::from_secs(1)).await;

    let taken = claim(&store, 8).await;
    assert_eq!(taken.len(), 2);
    let late = "
        select late_effect, extract(epoch from late_until - keyferry_now())::float8
        from line join kms_key on kms_key.line_id = line.id where arn = $1";
    let row = client.query_one(late, &[&arn(1).to_string()]).await.unwrap();
    assert_eq!(row.get::<_, Option<String>>(0).unwrap(), step.effect);
    let left: f64 = row.get(1);
    assert!((590.0..=600.0).contains(&left), "{left}");
    let row = client.query_one(late, &[&arn(2).to_string()]).await.unwrap();
    assert_eq!((row.get::<_, Option<String>>(0), row.get::<_, Option<f64>>(1)), (None, None));

    let successor = taken.iter().find(|job| job.key == arn(1)).unwrap();
    assert!(successor.progress.in_doubt && successor.progress.is_chosen);
    assert_eq!(successor.progress.effect.as_deref(), Some(step.effect.as_str()));
    assert!(settle(&store, &succeeded(successor)).await);
    // The next job is told of it, for as long as the signature lives.
    let next = claim_one(&store).await;
    let (effect, until) = next.late.clone().unwrap();
    assert_eq!(effect, step.effect);
    assert!(settle(&store, &put_back(&next, Some(until))).await);
    assert!(claim(&store, 8).await.is_empty());
    db.advance(SIGNATURE_LIFE).await;
    let next = claim(&store, 8).await.into_iter().find(|job| job.key == arn(1)).unwrap();
    assert_eq!(next.late, None);
    assert_eq!(next.attempt, 1, "waiting for a late call is no attempt");
}

#[tokio::test]
async fn what_a_claim_tells_is_what_earlier_attempts_left() {
    let db = TestDb::create().await;
    let store = db.store().await;
    let key = sealed("named");
    super::given::add_source_key(&store, &key).await;
    let named = serde_json::json!({"source_key_identifier": "named"});
    let by_id = serde_json::json!({"source_key_identifier": key.id.to_string()});
    let unknown = serde_json::json!({"source_key_identifier": "nobody"});
    accept(
        &store,
        &[
            super::given::job_with("a", &arn(1), named),
            super::given::job_with("b", &arn(2), by_id),
            super::given::job_with("c", &arn(3), unknown),
            job("d", &arn(4)),
        ],
    )
    .await;
    let claimed = claim(&store, 8).await;
    let found: HashMap<&str, Option<uuid::Uuid>> =
        claimed.iter().map(|job| (job.request.id.as_str(), job.source_key.as_ref().map(|key| key.id))).collect();
    assert_eq!(found, HashMap::from([("a", Some(key.id)), ("b", Some(key.id)), ("c", None), ("d", None)]));

    let fresh = claimed.iter().find(|job| job.request.id.as_str() == "d").unwrap();
    let (step, generated) = super::given::generating_step(fresh);
    assert_eq!(store.prepare(&[&step]).await.unwrap(), [Prepared::Ready]);
    let mut end = succeeded(fresh);
    if let keyferry::store::SettlementKind::Ended { material, .. } = &mut end.kind {
        *material = Some(super::given::material(&generated, true));
    }
    assert!(settle(&store, &end).await);
    accept(&store, &[job("e", &arn(4))]).await;
    let next = claim(&store, 8).await.into_iter().find(|job| job.request.id.as_str() == "e").unwrap();
    let last = next.materials.last().unwrap();
    assert_eq!(last.fingerprint, generated.fingerprint);
    assert_eq!(last.source_key_name, generated.name);
    assert!(!next.progress.is_chosen && next.progress.parameters.is_none());
}

#[tokio::test]
async fn a_locked_line_does_not_keep_other_leases_from_being_renewed() {
    let db = TestDb::create().await;
    let (store, mut client) = (db.store().await, db.client().await);
    accept(&store, &[job("a", &arn(1)), job("b", &arn(2))]).await;
    let claimed = claim(&store, 8).await;
    let leases: Vec<Lease> = claimed.iter().map(|job| job.lease).collect();
    let unknown = Lease { line_id: leases[0].line_id, token: uuid::Uuid::new_v4() };
    db.advance(LEASE / 2).await;

    let transaction = client.transaction().await.unwrap();
    transaction.execute("select from line where id = $1 for update", &[&leases[0].line_id]).await.unwrap();
    let from = Instant::now();
    let renewed = store.renew(&leases, LEASE).await.unwrap();
    assert!(from.elapsed() < Duration::from_secs(2));
    assert_eq!((renewed.held, renewed.lost), (vec![leases[1]], vec![]), "the locked one is left for the next beat");
    transaction.rollback().await.unwrap();

    let renewed = store.renew(&[leases[0], leases[1], unknown], LEASE).await.unwrap();
    assert_eq!(renewed.held.iter().collect::<HashSet<_>>(), leases.iter().collect());
    assert_eq!(renewed.lost, [unknown]);
    db.advance(LEASE * 3 / 4).await;
    assert!(claim(&store, 8).await.is_empty(), "renewed leases hold for another full term");
    let held: i64 =
        value(&client, "select count(*) from line where due_at > keyferry_now() and token is not null", &[]).await;
    assert_eq!(held, 2);
}

/// As while two versions run side by side: what only the newer one can read is left to it.
#[tokio::test]
async fn a_job_that_cannot_be_read_stops_no_other() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let jobs: Vec<NewJob> = (0..6).map(|n| job(&format!("j{n}"), &arn(n))).collect();
    accept(&store, &jobs).await;
    let newer = "update job set request = '{\"operation\":\"transmute\"}' where request_id = 'j3'";
    client.execute(newer, &[]).await.unwrap();
    let claimed = claim(&store, 10).await;
    assert_eq!(claimed.len(), 5);
    assert!(claimed.iter().all(|job| job.request.id.as_str() != "j3"));
    assert_eq!(value::<i64>(&client, "select count(*) from job where state = 'waiting'", &[]).await, 6);
    // It is offered again when the lease has run out.
    client
        .execute("update job set request = $1 where request_id = 'j3'", &[&jobs[3].request.canonical()])
        .await
        .unwrap();
    assert!(claim(&store, 10).await.is_empty());
    db.advance(LEASE * 2).await;
    assert!(claim(&store, 10).await.iter().any(|job| job.request.id.as_str() == "j3"));
}

/// The lower bound of a lane's scan is a hint that must not hide work for long.
#[tokio::test]
async fn housekeeping_moves_the_scans_bound_and_hides_nothing_that_is_due() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let jobs: Vec<NewJob> = (0..20).map(|n| job(&format!("j{n}"), &arn(n))).collect();
    accept(&store, &jobs).await;
    let claimed = claim(&store, 10).await;
    db.advance(Duration::from_secs(20)).await;
    store.keep_house().await.unwrap();
    let bound = "select scan_from from lane where operation = 'GetParametersForImport'";
    let oldest = "select min(due_at) from line";
    let (bound, oldest): (time::OffsetDateTime, time::OffsetDateTime) =
        (value(&client, bound, &[]).await, value(&client, oldest, &[]).await);
    // What goes to the front of the lane goes a little below its first.
    assert_eq!(bound, oldest - time::Duration::seconds(1));
    assert_eq!(claim(&store, 20).await.len(), 10);
    // A line that becomes due below the bound is found by the claim that ignores bounds.
    client
        .execute(
            "update line set due_at = $2::timestamptz - interval '1 min', token = null where id = $1",
            &[&claimed[0].lease.line_id, &bound],
        )
        .await
        .unwrap();
    let claimed = store.claim(20, LEASE, SIGNATURE_LIFE, keyferry::store::Scan::FromBounds).await.unwrap();
    assert!(claimed.jobs.is_empty());
    assert_eq!(store.claim(20, LEASE, SIGNATURE_LIFE, keyferry::store::Scan::Whole).await.unwrap().jobs.len(), 1);
}
