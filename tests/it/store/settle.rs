//! Ends of attempts: outcome, audit, event and the next head together, once, under the lease alone.

use super::given::{
    LEASE, REGION, SIGNATURE_LIFE, accept, accept_line, add_source_key, arn, arn_in, assert_audit_holds, claim,
    claim_one, contents, end, failed, generating_step, job, job_with, material, put_back, retry, sealed, settle, step,
    succeeded, until_waiting, value,
};
use crate::support::db::TestDb;
use keyferry::audit::{Fact, Kind};
use keyferry::job::KeyArn;
use keyferry::store::{
    Answered, Chosen, Intent, Material, Parameters, Prepared, Removed, RetryState, Settled, Settlement, SettlementKind,
    Step,
};
use serde_json::json;
use std::time::Duration;
use time::OffsetDateTime;

const DUE_AT: &str = "select due_at from line where due_at is not null";

#[tokio::test]
async fn an_end_writes_outcome_audit_and_event_and_goes_on_to_the_next_head() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept_line(&store, "j", &arn(1), 2).await;
    let first = claim_one(&store).await;
    assert!(settle(&store, &succeeded(&first)).await);
    let second = claim_one(&store).await;
    assert_eq!((first.sequence, second.sequence), (1, 2));
    assert!(settle(&store, &failed(&second, "no")).await);
    assert!(claim(&store, 8).await.is_empty());

    let rows = client
        .query("select state, attempts, finished_at is not null, result is not null, error ->> 'code' from job order by seq", &[])
        .await
        .unwrap();
    let states: Vec<(String, i32, bool, bool, Option<String>)> =
        rows.iter().map(|row| (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4))).collect();
    assert_eq!(
        states,
        [("succeeded".into(), 1, true, true, None), ("failed".into(), 1, true, false, Some("aws_refused".into()))]
    );
    let events: Vec<uuid::Uuid> = client
        .query("select event_id from outbox order by id", &[])
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(events, [first.id, second.id]);
    assert_eq!(value::<i64>(&client, "select count(*) from progress", &[]).await, 0);
    assert_eq!(value::<i64>(&client, "select count(*) from line where due_at is null and token is null", &[]).await, 1);
    assert_audit_holds(&client).await;
}

#[tokio::test]
async fn settling_again_after_a_lost_answer_changes_nothing() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept_line(&store, "j", &arn(1), 2).await;
    accept_line(&store, "k", &arn(2), 1).await;
    let claimed = claim(&store, 8).await;
    let (ended, retried) = (succeeded(&claimed[0]), {
        let job = &claimed[1];
        retry(job, Duration::from_secs(5), job.deadline, RetryState::default())
    });
    assert_eq!(store.settle(&[&ended, &retried], SIGNATURE_LIFE).await.unwrap(), [Settled::Written, Settled::Written]);
    let before = contents(&client).await;
    assert_eq!(store.settle(&[&ended, &retried], SIGNATURE_LIFE).await.unwrap(), [Settled::Lost, Settled::Lost]);
    assert_eq!(contents(&client).await, before);
}

#[tokio::test]
async fn what_was_put_back_was_no_attempt() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept(&store, &[job("a", &arn(1))]).await;
    for _ in 0..3 {
        let job = claim_one(&store).await;
        assert_eq!(job.attempt, 1);
        assert!(settle(&store, &put_back(&job, None)).await);
    }
    let job = claim_one(&store).await;
    let until = job.now + time::Duration::minutes(5);
    assert!(settle(&store, &put_back(&job, Some(until))).await);
    assert_eq!(value::<OffsetDateTime>(&client, DUE_AT, &[]).await, until);
    assert!(claim(&store, 8).await.is_empty());
    db.advance(Duration::from_secs(301)).await;
    let job = claim_one(&store).await;
    assert!(settle(&store, &retry(&job, Duration::ZERO, job.deadline, RetryState::default())).await);
    assert_eq!(claim_one(&store).await.attempt, 2, "a retry was one");
    assert_audit_holds(&client).await;
}

/// Whatever a worker has to tell when it gives a job back, the trail goes on counting.
#[tokio::test]
async fn facts_of_a_job_that_is_put_back_are_numbered_on() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept(&store, &[job("a", &arn(1))]).await;
    for prepared in [false, true] {
        let job = claim_one(&store).await;
        if prepared {
            let (step, _) = generating_step(&job);
            assert_eq!(store.prepare(&[&step]).await.unwrap(), [Prepared::Ready]);
        }
        let mut back = put_back(&job, None);
        back.facts = vec![Fact::new(Kind::MaterialImported, json!({"attempt": job.attempt}))];
        assert!(settle(&store, &back).await);
    }
    let job = claim_one(&store).await;
    assert!(job.progress.is_chosen && job.progress.in_doubt, "what is known is kept");
    assert!(settle(&store, &succeeded(&job)).await);
    assert_audit_holds(&client).await;
}

#[tokio::test]
async fn a_retry_is_due_by_the_deadline_and_after_it_never_in_the_past() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept(&store, &[job("a", &arn(1))]).await;
    let due = async || value::<OffsetDateTime>(&client, DUE_AT, &[]).await;

    let job = claim_one(&store).await;
    let deadline = job.now + time::Duration::seconds(60);
    assert!(settle(&store, &retry(&job, Duration::from_secs(3_600), deadline, RetryState::default())).await);
    assert_eq!(due().await, deadline);

    db.advance(Duration::from_secs(61)).await;
    for (delay, put) in [(0, false), (90, false), (0, true)] {
        let job = claim_one(&store).await;
        assert!(job.now > deadline);
        let end = if put {
            end(&job, SettlementKind::PutBack { until: deadline, deadline })
        } else {
            retry(&job, Duration::from_secs(delay), deadline, RetryState::default())
        };
        let before = store.now().await.unwrap();
        assert!(settle(&store, &end).await);
        let (due, after) = (due().await, store.now().await.unwrap());
        let delay = time::Duration::seconds(i64::try_from(delay).unwrap());
        assert!(before + delay <= due && due <= after + delay, "{before} {due} {after}");
        db.advance(Duration::from_secs(91)).await;
    }
}

#[tokio::test]
async fn a_retry_keeps_what_the_next_attempt_must_know() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let key = sealed("k");
    assert!(add_source_key(&store, &key).await);
    accept(&store, &[job("a", &arn(1))]).await;
    let again = async |state: RetryState| {
        let job = claim_one(&store).await;
        let attempt = job.attempt;
        assert!(settle(&store, &retry(&job, Duration::ZERO, job.deadline, state)).await);
        let job = claim_one(&store).await;
        assert_eq!(job.attempt, attempt + 1);
        assert!(settle(&store, &put_back(&job, None)).await);
        job.progress
    };
    let operation = "select operation from lane join line on line.lane_id = lane.id";
    assert_eq!(value::<String>(&client, operation, &[]).await, "GetParametersForImport");

    let job = claim_one(&store).await;
    assert_eq!(store.prepare(&[&step(&job, &key)]).await.unwrap(), [Prepared::Ready]);
    assert!(settle(&store, &put_back(&job, None)).await);

    let doubtful = again(RetryState { in_doubt: true, parameters: Parameters::Kept, ..RetryState::default() }).await;
    assert!(doubtful.is_chosen && doubtful.in_doubt && !doubtful.answered && doubtful.parameters.is_some());
    assert_eq!(doubtful.last_error.unwrap()["message"], "later");
    assert_eq!(value::<String>(&client, operation, &[]).await, "ImportKeyMaterial");

    let refreshed = again(RetryState { parameters: Parameters::Refused, ..RetryState::default() }).await;
    assert!(refreshed.is_chosen && !refreshed.in_doubt && refreshed.parameters.is_none());
    assert_eq!(refreshed.refreshes, 1);
    assert_eq!(value::<String>(&client, operation, &[]).await, "GetParametersForImport");
    assert_eq!(again(RetryState { reset_refreshes: true, ..RetryState::default() }).await.refreshes, 0);

    let answered =
        again(RetryState { answered: Some(Answered { key_material_id: Some("m".into()) }), ..RetryState::default() })
            .await;
    assert!(answered.answered && answered.key_material_id.as_deref() == Some("m"));
    let still = again(RetryState::default()).await;
    assert!(still.answered && still.key_material_id.as_deref() == Some("m"), "AWS's answer is not forgotten");
    assert_audit_holds(&client).await;
}

#[tokio::test]
async fn the_choice_of_material_is_made_once() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept(&store, &[job("a", &arn(1))]).await;
    let job = claim_one(&store).await;
    let (first, chosen) = generating_step(&job);
    let (mut second, _) = generating_step(&job);
    let another = Box::new(sealed("another"));
    second.intent = Intent::Import {
        source: Chosen::Local(another.id),
        generated: Some(another),
        parameters: None,
        rotated_from: None,
    };
    assert_eq!(store.prepare(&[&first]).await.unwrap(), [Prepared::Ready]);
    db.advance(LEASE * 2).await;
    let successor = claim_one(&store).await;
    assert_eq!(successor.source_key.as_ref().unwrap().id, chosen.id);
    second.lease = successor.lease;
    assert_eq!(store.prepare(&[&second]).await.unwrap(), [Prepared::Ready]);
    assert_eq!(value::<uuid::Uuid>(&client, "select source_key_id from progress", &[]).await, chosen.id);
}

#[tokio::test]
async fn a_late_effect_ends_by_time_alone() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept_line(&store, "j", &arn(1), 4).await;
    let late = async || {
        let row = client.query_one("select late_effect, late_until from line", &[]).await.unwrap();
        (row.get::<_, Option<String>>(0), row.get::<_, Option<OffsetDateTime>>(1))
    };
    let job = claim_one(&store).await;
    assert_eq!((job.late.clone(), late().await), (None, (None, None)));
    let mut unanswered = retry(&job, Duration::ZERO, job.deadline, RetryState::default());
    unanswered.late_effect = Some("import x never".into());
    assert!(settle(&store, &unanswered).await);
    let marked = late().await;
    assert_eq!(marked.0.as_deref(), Some("import x never"));
    let length = marked.1.unwrap() - job.now;
    assert!((time::Duration::seconds(600)..time::Duration::seconds(620)).contains(&length), "{length}");

    // Not by a retry, not by being put back, not by an end.
    let job = claim_one(&store).await;
    assert_eq!(job.late.as_ref().map(|(effect, _)| effect.as_str()), Some("import x never"));
    assert!(settle(&store, &retry(&job, Duration::ZERO, job.deadline, RetryState::default())).await);
    assert_eq!(late().await, marked);
    assert!(settle(&store, &put_back(&claim_one(&store).await, None)).await);
    assert_eq!(late().await, marked);
    assert!(settle(&store, &succeeded(&claim_one(&store).await)).await);
    assert_eq!(late().await, marked);
    // Not shortened by a later call with a shorter signature.
    let mut shorter = succeeded(&claim_one(&store).await);
    shorter.late_effect = Some("import x never".into());
    assert_eq!(store.settle(&[&shorter], Duration::from_secs(1)).await.unwrap(), [Settled::Written]);
    assert_eq!(late().await, marked);
    // Lengthened by one that may come later.
    db.advance(Duration::from_secs(100)).await;
    let mut longer = succeeded(&claim_one(&store).await);
    longer.late_effect = Some("import x never".into());
    assert!(settle(&store, &longer).await);
    assert!(late().await.1 > marked.1);

    db.advance(SIGNATURE_LIFE * 2).await;
    assert_eq!(claim_one(&store).await.late, None, "over");
}

#[tokio::test]
async fn materials_are_recorded_per_key_and_an_uncertain_one_hides_no_certain_one() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept_line(&store, "j", &arn(1), 4).await;
    let (first, other) = (sealed("first"), sealed("other"));
    let ended = async |key, certain| {
        let job = claim_one(&store).await;
        let mut end = succeeded(&job);
        if let SettlementKind::Ended { material: of_key, .. } = &mut end.kind {
            *of_key = Some(material(key, certain));
        }
        assert!(settle(&store, &end).await);
        job.materials.last().map(|last| last.source_key_name.clone())
    };
    assert_eq!(ended(&first, true).await, None);
    assert_eq!(ended(&other, false).await.as_deref(), Some("first"));
    assert_eq!(ended(&first, false).await.as_deref(), Some("first"), "an uncertain material is not the last");
    assert_eq!(ended(&first, true).await.as_deref(), Some("first"));
    assert_eq!(value::<i64>(&client, "select count(*) from kms_material", &[]).await, 2);
    let certain = "select count(*) from kms_material where imported_at is not null";
    assert_eq!(value::<i64>(&client, certain, &[]).await, 1);
}

/// A commit whose answer was lost may still be under way when its job is settled: what it wrote is counted.
#[tokio::test]
async fn a_settlement_counts_the_entries_of_a_step_that_it_waited_for() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept(&store, &[job("a", &arn(1))]).await;
    let claimed = claim_one(&store).await;
    let slow = db.client().await;
    slow.batch_execute("begin").await.unwrap();
    slow.execute("select 1 from line where id = $1 for no key update", &[&claimed.lease.line_id]).await.unwrap();
    let entry = |n: i32| {
        format!(r#"{{"at":"x","details":{{}},"kind":"material_chosen","n":{n},"subject":"{}","v":1}}"#, claimed.id)
    };
    for n in 2..=3 {
        let insert = "insert into audit_entry (subject, n, entry) values ($1, $2, $3)";
        slow.execute(insert, &[&claimed.id, &n, &entry(n)]).await.unwrap();
    }
    slow.execute("insert into progress (job_id, in_doubt, audit_n) values ($1, true, 3)", &[&claimed.id])
        .await
        .unwrap();
    let settling = tokio::spawn({
        let (store, end) = (store.clone(), retry(&claimed, Duration::ZERO, claimed.deadline, RetryState::default()));
        async move { settle(&store, &end).await }
    });
    until_waiting(&client, 1).await;
    slow.batch_execute("commit").await.unwrap();
    assert!(settling.await.unwrap());
    assert_audit_holds(&client).await;
    assert_eq!(value::<i64>(&client, "select count(*) from audit_entry", &[]).await, 4);
}

/// A line of two Regions with three materials is one job still, which knows all of them and which are its key's own.
#[tokio::test]
async fn a_job_knows_every_material_of_its_line() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let (here, there) = (arn_in(REGION, 1), arn_in("us-east-1", 1));
    let multi = |arn: &KeyArn| {
        KeyArn::parse(&arn.to_string().replace(arn.key_id(), &format!("mrk-{}", "0a".repeat(16)))).unwrap()
    };
    let (here, there) = (multi(&here), multi(&there));
    let keys = [sealed("one"), sealed("two"), sealed("three")];
    for (number, (key, region)) in keys.iter().zip([&here, &there, &here]).enumerate() {
        add_source_key(&store, key).await;
        accept(&store, &[job(&format!("j{number}"), region)]).await;
        let claimed = claim_one(&store).await;
        let mut end = succeeded(&claimed);
        if let SettlementKind::Ended { material: of_key, .. } = &mut end.kind {
            *of_key = Some(Material { key_material_id: Some(format!("m{number}")), ..material(key, true) });
        }
        assert!(settle(&store, &end).await);
        db.advance(Duration::from_secs(1)).await;
    }
    accept(&store, &[job_with("by-id", &here, json!({"key_material_id": "ab".repeat(32)}))]).await;
    let claimed = claim(&store, 8).await;
    assert_eq!(claimed.len(), 1, "one job, however many materials");
    let known: Vec<(bool, &str, Option<&str>)> = claimed[0]
        .materials
        .iter()
        .map(|held| (held.is_own, held.source_key_name.as_str(), held.key_material_id.as_deref()))
        .collect();
    assert_eq!(known, [(true, "one", Some("m0")), (false, "two", Some("m1")), (true, "three", Some("m2"))]);
    assert!(claimed[0].source_key.is_none(), "no material on record has that id");
    assert!(settle(&store, &failed(&claimed[0], "no")).await);

    // The record of another Region leads to the source key too; a delete has none.
    client.execute("update kms_material set key_material_id = $1 where key_material_id = 'm1'", &[&ID]).await.unwrap();
    accept(&store, &[job_with("found", &here, json!({"key_material_id": ID}))]).await;
    let found = claim_one(&store).await;
    assert_eq!(found.source_key.as_ref().unwrap().name, "two");
    assert!(settle(&store, &failed(&found, "no")).await);
    accept(&store, &[job_with("gone", &here, json!({"operation": "delete", "key_material_id": ID}))]).await;
    assert!(claim_one(&store).await.source_key.is_none());
}

const ID: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

#[tokio::test]
async fn what_was_deleted_is_marked_on_its_own_key_and_cleared_by_an_import() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept_line(&store, "j", &arn(1), 6).await;
    let (first, other) = (sealed("first"), sealed("other"));
    let ended = async |removed: Removed, brought: Option<Material>| {
        let job = claim_one(&store).await;
        let mut end = Settlement { removed, ..succeeded(&job) };
        if let SettlementKind::Ended { material: of_key, .. } = &mut end.kind {
            *of_key = brought;
        }
        assert!(settle(&store, &end).await);
        let marked = "select coalesce(string_agg(key_material_id, ',' order by key_material_id), '') from kms_material
                      where removed_at is not null";
        value::<String>(&client, marked, &[]).await
    };
    let with_id = |key, id: &str| Material { key_material_id: Some(id.into()), ..material(key, true) };
    ended(Removed::Nothing, Some(with_id(&first, "a"))).await;
    ended(Removed::Nothing, Some(with_id(&other, "b"))).await;
    assert_eq!(ended(Removed::Materials(vec!["b".into(), "unknown".into()]), None).await, "b");
    assert_eq!(ended(Removed::Only, None).await, "a,b");
    // An uncertain import may have brought it back; it says nothing of the end of life that is on record.
    let at = Some(OffsetDateTime::UNIX_EPOCH);
    let uncertain = Material { is_certain: false, valid_to: at, ..with_id(&first, "a") };
    assert_eq!(ended(Removed::Nothing, Some(uncertain)).await, "b");
    let expiry = "select valid_to from kms_material where key_material_id = 'a'";
    assert_eq!(value::<Option<OffsetDateTime>>(&client, expiry, &[]).await, None);
    assert_eq!(ended(Removed::Nothing, Some(Material { valid_to: at, ..with_id(&other, "b") })).await, "");
}

#[tokio::test]
async fn a_delete_keeps_what_it_means_and_waits_in_a_lane_of_its_own() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let lane = "select operation from lane join line on line.lane_id = lane.id";
    accept(&store, &[job_with("dry", &arn(1), json!({"dry_run": true}))]).await;
    assert_eq!(value::<String>(&client, lane, &[]).await, "nothing");
    assert!(settle(&store, &succeeded(&claim_one(&store).await)).await);
    accept(&store, &[job_with("d", &arn(1), json!({"operation": "delete", "scope": "all"}))]).await;
    assert_eq!(value::<String>(&client, lane, &[]).await, "DeleteImportedKeyMaterial");

    for committed in [vec!["a".to_owned(), "b".into()], vec!["other".into()]] {
        let job = claim_one(&store).await;
        let intent = Intent::Delete { material_ids: committed };
        let step = Step { lease: job.lease, job_id: job.id, intent, effect: "delete a b".into(), facts: Vec::new() };
        assert_eq!(store.prepare(&[&step]).await.unwrap(), [Prepared::Ready]);
        let state = RetryState { in_doubt: true, ..RetryState::default() };
        assert!(settle(&store, &retry(&job, Duration::ZERO, job.deadline, state)).await);
    }
    let job = claim_one(&store).await;
    assert_eq!(job.progress.delete_ids.as_deref(), Some(["a".to_owned(), "b".into()].as_slice()), "the first stands");
    assert!(!job.progress.is_chosen && job.progress.in_doubt);
    assert_eq!(value::<String>(&client, lane, &[]).await, "DeleteImportedKeyMaterial");
    assert!(settle(&store, &succeeded(&job)).await);

    // A key without material ids: an empty list is a choice too.
    accept(&store, &[job_with("only", &arn(1), json!({"operation": "delete"}))]).await;
    let job = claim_one(&store).await;
    let intent = Intent::Delete { material_ids: Vec::new() };
    let step = Step { lease: job.lease, job_id: job.id, intent, effect: "delete ".into(), facts: Vec::new() };
    assert_eq!(store.prepare(&[&step]).await.unwrap(), [Prepared::Ready]);
    assert!(settle(&store, &retry(&job, Duration::ZERO, job.deadline, RetryState::default())).await);
    assert_eq!(claim_one(&store).await.progress.delete_ids, Some(Vec::new()));
}
