//! What is in AWS, by our record, read with the reader's rights.

use super::given::{
    accept, accept_line, arn, arn_in, claim, claim_one, end, failed, job, job_with, material, retry, sealed, settle,
    step, succeeded,
};
use crate::support::db::TestDb;
use keyferry::job::JobResult;
use keyferry::source::SealedKey;
use keyferry::store::{
    ClaimedJob, KmsKeyFilter, KmsKeyView, Parameters, Prepared, Removed, RetryState, Scope, SettlementKind, Store,
};
use serde_json::json;
use std::time::Duration;
use time::OffsetDateTime;

const DAY: u64 = 86_400;

fn reader(db: &TestDb) -> Store {
    let settings = db.settings();
    Store::new(&db.reader_url(), &settings).unwrap()
}

async fn list(store: &Store, filter: KmsKeyFilter) -> Vec<KmsKeyView> {
    store.kms_keys(&KmsKeyFilter { limit: 100, ..filter }).await.unwrap()
}

fn arns(keys: &[KmsKeyView]) -> Vec<&str> {
    keys.iter().map(|key| key.arn.as_str()).collect()
}

/// Ends an import as AWS showed it afterwards.
async fn imports(store: &Store, job: &ClaimedJob, key: &SealedKey, id: &str, valid_to: Option<OffsetDateTime>) {
    let shown = json!({"KeySpec": "SYMMETRIC_DEFAULT", "KeyState": "Enabled", "CurrentKeyMaterialId": id});
    let mut held = material(key, true);
    (held.key_material_id, held.valid_to) = (Some(id.to_owned()), valid_to);
    let outcome = Ok(JobResult(json!({"aws_param": shown})));
    let kind = SettlementKind::Ended { outcome, source_key_id: Some(key.id), material: Some(held) };
    assert!(settle(store, &end(job, kind)).await);
}

#[tokio::test]
async fn a_key_shows_its_state_its_materials_and_its_last_job() {
    let db = TestDb::create().await;
    let (store, reader) = (db.store().await, reader(&db));
    let key = sealed("payroll");
    accept_line(&store, "j", &arn(1), 1).await;
    let unseen = reader.kms_key(&arn(1).to_string()).await.unwrap().unwrap();
    assert!(unseen.state.is_none() && unseen.last_job.is_none() && unseen.waiting == 1 && !unseen.is_running);
    let running = claim_one(&store).await;
    assert!(reader.kms_key(&unseen.id.to_string()).await.unwrap().unwrap().is_running);
    let ends = (running.now + time::Duration::days(20)).replace_nanosecond(0).unwrap();
    imports(&store, &running, &key, "m1", Some(ends)).await;
    let shown = reader.kms_key(&arn(1).to_string()).await.unwrap().unwrap();
    assert_eq!((shown.account.as_str(), shown.region.as_str()), ("111122223333", "eu-central-1"));
    assert_eq!((shown.kind.as_deref(), shown.state.as_deref()), (Some("SYMMETRIC_DEFAULT"), Some("Enabled")));
    let current = shown.current_material.clone().unwrap();
    assert_eq!((current.source_key_name.as_str(), current.source_key_id), ("payroll", key.id.to_string()));
    assert_eq!((shown.expires_at, shown.waiting, shown.last_job.unwrap().state.as_str()), (Some(ends), 0, "succeeded"));
    // What fails later is the last job, and what was seen stays seen; however many of them there are.
    for n in 0..30 {
        accept(&store, &[job(&format!("f{n}"), &arn(1))]).await;
        assert!(settle(&store, &failed(&claim_one(&store).await, "no")).await);
    }
    accept(&store, &[job("in-doubt", &arn(1)), job_with("next", &arn(1), json!({"operation": "delete"}))]).await;
    let doubt = claim_one(&store).await;
    let state = RetryState { in_doubt: true, parameters: Parameters::Kept, ..RetryState::default() };
    assert!(super::given::add_source_key(&store, &key).await);
    assert_eq!(store.prepare(&[&step(&doubt, &key)]).await.unwrap(), [Prepared::Ready]);
    let mut unanswered = retry(&doubt, Duration::from_secs(60), doubt.deadline, state);
    unanswered.late_effect = Some("import".into());
    assert!(settle(&store, &unanswered).await);
    store.hold(&Scope::Key(arn(1)), Some("why"), "op").await.unwrap();
    store.hold(&Scope::Region("us-east-1".into()), None, "op").await.unwrap();
    let shown = reader.kms_key(&arn(1).to_string()).await.unwrap().unwrap();
    let last = shown.last_job.unwrap();
    assert_eq!((last.request_id.as_str(), last.code.as_deref()), ("f29", Some("aws_refused")));
    assert_eq!((shown.state.as_deref(), shown.waiting), (Some("Enabled"), 2));
    assert!(shown.closed_until.is_some_and(|until| until > running.now));
    assert_eq!(shown.holds.iter().map(|hold| hold.scope.as_str()).collect::<Vec<_>>(), ["key"]);
    assert!(reader.kms_key(&arn(7).to_string()).await.unwrap().is_none());
    assert!(reader.kms_key("nonsense").await.unwrap().is_none());
}

#[tokio::test]
async fn what_was_deleted_is_not_in_force() {
    let db = TestDb::create().await;
    let store = db.store().await;
    let (old, new) = (sealed("old"), sealed("new"));
    for (name, key) in [("a", &old), ("b", &new)] {
        accept(&store, &[job(name, &arn(1))]).await;
        let id = format!("of-{}", key.name);
        imports(&store, &claim_one(&store).await, key, &id, None).await;
    }
    let shown = store.kms_key(&arn(1).to_string()).await.unwrap().unwrap();
    assert_eq!(shown.current_material.unwrap().source_key_name, "new");
    assert_eq!(shown.materials.len(), 2);
    accept(&store, &[job_with("d", &arn(1), json!({"operation": "delete"}))]).await;
    let mut deleted = succeeded(&claim_one(&store).await);
    deleted.removed = Removed::Materials(vec!["of-new".into()]);
    assert!(settle(&store, &deleted).await);
    let shown = store.kms_key(&arn(1).to_string()).await.unwrap().unwrap();
    assert!(shown.materials.iter().any(|held| held.source_key_name == "new" && held.removed_at.is_some()));
    assert!(shown.current_material.is_none_or(|held| held.source_key_name != "new"), "it is gone");
    assert_eq!(shown.last_job.unwrap().operation, "delete");
}

#[tokio::test]
async fn keys_are_listed_by_arn_page_by_page_and_filtered() {
    let db = TestDb::create().await;
    let (store, reader) = (db.store().await, reader(&db));
    let (payroll, other) = (sealed("payroll"), sealed("other"));
    assert!(super::given::add_source_key(&store, &payroll).await);
    let all = [arn_in("eu-central-1", 1), arn_in("eu-central-1", 2), arn_in("us-east-1", 3), arn_in("us-east-1", 4)];
    let now = store.now().await.unwrap().replace_nanosecond(0).unwrap();
    let ends = [None, Some(10), Some(40), Some(-1)].map(|days| days.map(|days| now + time::Duration::days(days)));
    for (n, (arn, ends)) in all.iter().zip(ends).enumerate() {
        accept(&store, &[job(&format!("j{n}"), arn)]).await;
        let key = if n % 2 == 0 { &payroll } else { &other };
        imports(&store, &claim_one(&store).await, key, &format!("m{n}"), ends).await;
    }
    let names: Vec<String> = all.iter().map(ToString::to_string).collect();
    assert_eq!(arns(&list(&reader, KmsKeyFilter::default()).await), names);
    let page = KmsKeyFilter { after: Some(names[0].clone()), limit: 2, ..KmsKeyFilter::default() };
    assert_eq!(arns(&reader.kms_keys(&page).await.unwrap()), names[1..3]);
    let within = |days| Some(Duration::from_secs(days * DAY));
    for (filter, expected) in [
        (KmsKeyFilter { region: Some("us-east-1".into()), ..KmsKeyFilter::default() }, &names[2..]),
        (KmsKeyFilter { account: Some("111122223334".into()), ..KmsKeyFilter::default() }, &[][..]),
        (KmsKeyFilter { account: Some("111122223333".into()), ..KmsKeyFilter::default() }, &names[..]),
        (KmsKeyFilter { expires_within: within(0), ..KmsKeyFilter::default() }, &names[3..]),
        (
            KmsKeyFilter { expires_within: within(30), region: Some("eu-central-1".into()), ..KmsKeyFilter::default() },
            &names[1..2],
        ),
    ] {
        assert_eq!(arns(&list(&reader, filter.clone()).await), expected, "{filter:?}");
    }
    for name in ["payroll".to_owned(), payroll.id.to_string()] {
        let filter = KmsKeyFilter { source_key: Some(name), ..KmsKeyFilter::default() };
        assert_eq!(arns(&list(&reader, filter).await), [names[0].as_str(), names[2].as_str()]);
    }
    assert!(claim(&store, 8).await.is_empty());
}
