//! Intake's transaction: every message one verdict, however often and by however many it is brought.

use super::given::{
    accept, arn, arn_in, assert_audit_holds, assert_dense, claim, claim_one, contents, job, job_with, refusal, value,
};
use crate::support::db::TestDb;
use keyferry::job::{KeyArn, RefusalCode};
use keyferry::store::{Candidate, NewJob, Verdict};
use serde_json::json;
use std::time::Duration;
use time::format_description::well_known::Rfc3339;

#[tokio::test]
async fn a_message_is_accepted_known_in_conflict_or_refused() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let first = job("a", &arn(1));
    assert_eq!(store.accept(&[Candidate::Job(first.clone())]).await.unwrap(), [Verdict::Accepted]);

    let again = job("a", &arn(1));
    let other = job_with("a", &arn(1), json!({"batch": "b"}));
    let slice = [
        Candidate::Job(again),
        Candidate::Job(other),
        Candidate::Refusal(refusal("r", RefusalCode::UnknownField)),
        Candidate::Job(job("b", &arn(1))),
    ];
    let verdicts = store.accept(&slice).await.unwrap();
    assert_eq!(verdicts, [Verdict::Duplicate, Verdict::Refused, Verdict::Refused, Verdict::Accepted]);

    let codes: Vec<String> = client
        .query("select code from refusal order by code", &[])
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(codes, ["id_conflict", "unknown_field"]);
    // Only refusals have an event yet.
    assert_eq!(value::<i64>(&client, "select count(*) from outbox", &[]).await, 2);
    assert_eq!(value::<i64>(&client, "select count(*) from audit_entry", &[]).await, 4);
    let ids: Vec<uuid::Uuid> =
        client.query("select id from job order by seq", &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    assert_eq!(ids[0], first.id, "the first job stands");
    assert_eq!(ids.len(), 2);
    assert_dense(&client).await;
    assert_audit_holds(&client).await;
}

#[tokio::test]
async fn an_empty_slice_is_nothing() {
    let db = TestDb::create().await;
    assert!(db.store().await.accept(&[]).await.unwrap().is_empty());
}

#[tokio::test]
async fn the_first_of_an_id_in_a_slice_stands_for_it() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let first = job("a", &arn(1));
    let slice = [
        Candidate::Job(first.clone()),
        Candidate::Job(job("a", &arn(1))),
        Candidate::Job(job("a", &arn(2))),
        Candidate::Job(job("a", &arn(2))),
    ];
    let verdicts = store.accept(&slice).await.unwrap();
    assert_eq!(verdicts, [Verdict::Accepted, Verdict::Duplicate, Verdict::Refused, Verdict::Refused]);
    assert_eq!(value::<uuid::Uuid>(&client, "select id from job", &[]).await, first.id);
    assert_eq!(value::<i64>(&client, "select count(*) from refusal", &[]).await, 1, "one verdict, one row");
    assert_eq!(value::<i64>(&client, "select count(*) from kms_key", &[]).await, 1, "a refused message registers none");
}

#[tokio::test]
async fn jobs_join_their_line_in_the_slices_order() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let jobs: Vec<NewJob> = (0..60).map(|n| job(&format!("j{n}"), &arn(n % 2))).collect();
    accept(&store, &jobs).await;
    let query = "select request_id from job join kms_key on kms_key.id = kms_key_id where arn = $1 order by seq";
    for key in [0, 1] {
        let rows = client.query(query, &[&arn(key).to_string()]).await.unwrap();
        let order: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        let expected: Vec<String> = (0..60).filter(|n| n % 2 == key).map(|n| format!("j{n}")).collect();
        assert_eq!(order, expected);
    }
}

#[tokio::test]
async fn a_replay_after_a_lost_answer_says_the_same_and_writes_nothing() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept(&store, &[job("old", &arn(1))]).await;
    let later = store.now().await.unwrap() + time::Duration::hours(1);
    let slice = [
        Candidate::Job(job("a", &arn(1))),
        Candidate::Job(job("a", &arn(1))),
        Candidate::Job(job_with("b", &arn(2), json!({"not_before": later.format(&Rfc3339).unwrap()}))),
        Candidate::Job(job("old", &arn(1))),
        Candidate::Job(job("old", &arn(9))),
        Candidate::Refusal(refusal("r", RefusalCode::NotAllowed)),
    ];
    let first = store.accept(&slice).await.unwrap();
    let before = contents(&client).await;
    assert_eq!(store.accept(&slice).await.unwrap(), first);
    assert_eq!(contents(&client).await, before);
}

/// Half of a slice was committed, by bisection or before an outage; then all of it is brought again.
#[tokio::test]
async fn a_replay_of_a_slice_that_was_committed_in_part_takes_the_rest() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let slice: Vec<Candidate> = (0..8).map(|n| Candidate::Job(job(&format!("j{n}"), &arn(n % 3)))).collect();
    store.accept(&slice[..3]).await.unwrap();
    assert!(store.accept(&slice).await.unwrap().iter().all(|verdict| *verdict == Verdict::Accepted));
    assert_eq!(value::<i64>(&client, "select count(*) from job", &[]).await, 8);
    assert_dense(&client).await;
    assert_audit_holds(&client).await;
}

/// Two processes are brought the same messages in opposite orders, with keys that both have to register.
#[tokio::test]
async fn overlapping_slices_in_opposite_orders_meet_without_harm() {
    let db = TestDb::create().await;
    let (one, two, client) = (db.store().await, db.store().await, db.client().await);
    for round in 0..40_u128 {
        let messages: Vec<(String, KeyArn)> = (0..24)
            .map(|n| {
                let region = if n % 2 == 0 { "eu-central-1" } else { "eu-west-1" };
                (format!("r{round}-{n}"), arn_in(region, round / 4 * 100 + n % 5))
            })
            .collect();
        let slice = || -> Vec<Candidate> {
            let jobs = messages.iter().map(|(id, key)| Candidate::Job(job(id, key)));
            let codes = [RefusalCode::NotJson, RefusalCode::NotAllowed, RefusalCode::UnknownKey];
            let refusals = codes.into_iter().map(|code| Candidate::Refusal(refusal(&format!("bad{round}"), code)));
            jobs.chain(refusals).collect()
        };
        let (forwards, mut backwards) = (slice(), slice());
        backwards.reverse();
        let (first, second) = tokio::join!(one.accept(&forwards), two.accept(&backwards));
        let (first, mut second) = (first.unwrap(), second.unwrap());
        second.reverse();
        for (first, second) in first.into_iter().zip(second).take(messages.len()) {
            let both = [first, second];
            assert!(both.contains(&Verdict::Accepted) && both.contains(&Verdict::Duplicate), "{both:?}");
        }
    }
    assert_eq!(value::<i64>(&client, "select count(*) from job", &[]).await, 40 * 24);
    assert_eq!(value::<i64>(&client, "select count(*) from request", &[]).await, 40 * 24);
    assert_eq!(value::<i64>(&client, "select count(*) from refused", &[]).await, 40 * 3);
    // Those beyond the first of a minute are folded.
    let told: i64 = value(&client, "select count(*) from refusal", &[]).await;
    assert_eq!(value::<i64>(&client, "select count(*) from outbox", &[]).await, told);
    assert_dense(&client).await;
    assert_audit_holds(&client).await;
}

#[tokio::test]
async fn both_names_of_a_key_lead_to_one_line() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept(&store, &[job("by-arn", &arn(1))]).await;
    let id: uuid::Uuid = value(&client, "select id from kms_key", &[]).await;
    let known = store.resolve_keys(&[id, uuid::Uuid::nil()]).await.unwrap();
    assert_eq!(known.len(), 1);
    accept(&store, &[job_with("by-id", &known[&id], json!({"key": id.to_string()}))]).await;
    let lines: i64 = value(&client, "select count(distinct line_id) from job", &[]).await;
    let keys: i64 = value(&client, "select count(distinct kms_key_id) from job", &[]).await;
    assert_eq!((lines, keys), (1, 1));
    assert_dense(&client).await;
}

#[tokio::test]
async fn all_regions_of_a_multi_region_key_are_one_line() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let in_region = |region: &str, account: &str| {
        let arn = format!("arn:aws:kms:{region}:{account}:key/mrk-1234abcd12ab34cd56ef1234567890ab");
        KeyArn::parse(&arn).unwrap()
    };
    let (here, there) = (in_region("eu-central-1", "111122223333"), in_region("eu-west-1", "111122223333"));
    accept(&store, &[job("1", &there), job("2", &here), job("3", &in_region("eu-west-1", "444455556666"))]).await;
    accept(&store, &[job("4", &here)]).await;
    let shapes: Vec<(i64, i64)> = client
        .query("select count(*), count(distinct kms_key_id) from job group by line_id order by 1", &[])
        .await
        .unwrap()
        .iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect();
    assert_eq!(shapes, [(1, 1), (3, 2)], "another account's key of the same name is another key");
    assert_dense(&client).await;
    // An empty line takes the lane of the job that opens it, and each next head brings its own.
    let query = "select lane.region from line join lane on lane.id = line.lane_id where line.tail_seq = 3";
    assert_eq!(value::<String>(&client, query, &[]).await, "eu-west-1");
    let claimed = claim(&store, 8).await;
    let head = claimed.iter().find(|job| job.request.id.as_str() == "1").unwrap();
    assert!(super::given::settle(&store, &super::given::succeeded(head)).await);
    assert_eq!(value::<String>(&client, query, &[]).await, "eu-central-1");
}

#[tokio::test]
async fn a_refusal_is_remembered_once_per_verdict() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let counted = async |table: &str| value::<i64>(&client, &format!("select count(*) from {table}"), &[]).await;
    let twice = [
        Candidate::Refusal(refusal("a", RefusalCode::NotAllowed)),
        Candidate::Refusal(refusal("a", RefusalCode::NotAllowed)),
    ];
    for _ in 0..3 {
        assert_eq!(store.accept(&twice).await.unwrap(), [Verdict::Refused, Verdict::Refused]);
        assert_eq!((counted("refusal").await, counted("outbox").await, counted("audit_entry").await), (1, 1, 1));
    }
    let mut other_body = refusal("a", RefusalCode::NotAllowed);
    other_body.digest = keyferry::store::MessageDigest::Body([9; 32]);
    let mut other_principal = refusal("a", RefusalCode::NotAllowed);
    other_principal.principal = "somebody".into();
    let others = [
        Candidate::Refusal(refusal("a", RefusalCode::UnknownKey)),
        Candidate::Refusal(other_body),
        Candidate::Refusal(other_principal),
    ];
    store.accept(&others).await.unwrap();
    assert_eq!((counted("refusal").await, counted("outbox").await, counted("audit_entry").await), (4, 4, 4));
    // A refusal owns no id: the mended message is accepted under it.
    accept(&store, &[job("a", &arn(0))]).await;
}

#[tokio::test]
async fn a_job_with_not_before_takes_its_place_when_the_time_has_come() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let start = store.now().await.unwrap();
    let at = |minutes: i64| (start + time::Duration::minutes(minutes)).format(&Rfc3339).unwrap();
    accept(
        &store,
        &[
            job_with("second", &arn(1), json!({"not_before": at(20)})),
            job_with("first", &arn(1), json!({"not_before": at(10)})),
            job_with("far", &arn(2), json!({"not_before": at(60)})),
            job_with("past", &arn(3), json!({"not_before": at(-10)})),
        ],
    )
    .await;
    let waiting = "select count(*) from job where seq is null";
    assert_eq!(value::<i64>(&client, waiting, &[]).await, 3);
    assert_eq!(store.keep_house().await.unwrap(), 0);
    let claimed = claim_one(&store).await;
    assert_eq!(claimed.request.id.as_str(), "past");
    assert!(super::given::settle(&store, &super::given::succeeded(&claimed)).await);

    db.advance(Duration::from_secs(30 * 60)).await;
    accept(&store, &[job("between", &arn(1))]).await;
    assert_eq!(store.keep_house().await.unwrap(), 2);
    assert_eq!(store.keep_house().await.unwrap(), 0);
    let order: Vec<String> = client
        .query("select request_id from job where seq is not null and request_id <> 'past' order by seq", &[])
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(order, ["between", "first", "second"], "by commit, then by not_before");
    assert_eq!(value::<i64>(&client, "select count(*) from future", &[]).await, 1);
    assert_dense(&client).await;
}

/// Housekeepers of several processes and an intake meet on the same lines.
#[tokio::test]
async fn joining_jobs_and_new_ones_share_a_line_densely() {
    let db = TestDb::create().await;
    let (one, two, client) = (db.store().await, db.store().await, db.client().await);
    let later = (one.now().await.unwrap() + time::Duration::minutes(1)).format(&Rfc3339).unwrap();
    let waiting: Vec<NewJob> =
        (0..600).map(|n| job_with(&format!("w{n}"), &arn(n % 7), json!({"not_before": later}))).collect();
    accept(&one, &waiting).await;
    db.advance(Duration::from_secs(120)).await;
    let house = async |store: &keyferry::store::Store| {
        let mut joined = 0;
        for _ in 0..8 {
            joined += store.keep_house().await.unwrap();
        }
        joined
    };
    let intake = async {
        for n in 0..10 {
            let new: Vec<NewJob> = (0..7).rev().map(|key| job(&format!("n{n}-{key}"), &arn(key))).collect();
            accept(&two, &new).await;
        }
    };
    let (first, second, ()) = tokio::join!(house(&one), house(&two), intake);
    assert_eq!(first + second, 600);
    assert_eq!(value::<i64>(&client, "select count(*) from job where seq is null", &[]).await, 0);
    assert_dense(&client).await;
}
