//! What people and programs are shown of jobs.

use super::given::{accept, arn, claim_one, failed, job, job_with, refusal, retry, settle, succeeded, value};
use crate::support::db::TestDb;
use crate::support::eventually;
use keyferry::job::{KeyArn, RefusalCode};
use keyferry::store::{Candidate, JobFilter, JobView, RetryState};
use serde_json::json;
use std::time::Duration;
use uuid::Uuid;

fn names(views: &[JobView]) -> Vec<&str> {
    views.iter().map(|view| view.request_id.as_deref().unwrap()).collect()
}

#[tokio::test]
async fn jobs_are_listed_newest_first_and_page_by_page() {
    let db = TestDb::create().await;
    let store = db.store().await;
    for n in 1..=5 {
        let batch = if n % 2 == 0 { json!({"batch": "even"}) } else { json!({}) };
        accept(&store, &[job_with(&format!("j{n}"), &arn(n % 2), batch)]).await;
    }
    let list = async |filter: JobFilter| store.jobs(&JobFilter { limit: 100, ..filter }).await.unwrap().unwrap();
    let all = list(JobFilter::default()).await;
    assert_eq!(names(&all), ["j5", "j4", "j3", "j2", "j1"]);
    let page = JobFilter { limit: 2, before: Some(all[1].id), ..JobFilter::default() };
    assert_eq!(names(&store.jobs(&page).await.unwrap().unwrap()), ["j3", "j2"]);
    assert_eq!(names(&list(JobFilter { batch: Some("even".into()), ..JobFilter::default() }).await), ["j4", "j2"]);
    for key in [arn(0).to_string(), all[1].key_id.unwrap().to_string()] {
        assert_eq!(names(&list(JobFilter { key: Some(key), ..JobFilter::default() }).await), ["j4", "j2"]);
    }
    for unknown in [arn(7).to_string(), Uuid::from_u128(7).to_string(), "nonsense".to_owned()] {
        let filter = JobFilter { key: Some(unknown), limit: 100, ..JobFilter::default() };
        assert!(store.jobs(&filter).await.unwrap().is_none());
    }
    let running = super::given::claim(&store, 1).await;
    assert!(settle(&store, &succeeded(&running[0])).await);
    let done = list(JobFilter { state: Some("succeeded".into()), ..JobFilter::default() }).await;
    assert_eq!(names(&done), [running[0].request.id.as_str()]);
    assert!(done[0].result.is_some() && done[0].finished_at.is_some() && done[0].attempts == 1);
}

#[tokio::test]
async fn a_job_is_found_by_either_id_and_a_refusal_by_its_requests() {
    let db = TestDb::create().await;
    let store = db.store().await;
    let new = job("a", &arn(1));
    accept(&store, std::slice::from_ref(&new)).await;
    let refused = refusal("bad", RefusalCode::UnknownField);
    store.accept(&[Candidate::Refusal(refused.clone())]).await.unwrap();
    let find_in = async |source: &str, id: &str| -> Vec<JobView> {
        let found = store.find_jobs("anonymous", source, &[id.to_owned()]).await.unwrap();
        assert!(found.iter().all(|(asked, _)| asked == id));
        found.into_iter().map(|(_, view)| view).collect()
    };
    let find = async |id: &str| find_in("", id).await;
    assert_eq!(find("a").await[0].id, new.id);
    let spellings = [new.id.to_string(), new.id.to_string().to_uppercase()];
    let found = store.find_jobs("anonymous", "", &spellings).await.unwrap();
    assert_eq!(found.len(), 2, "each under its own spelling");
    assert_eq!(find(&new.id.to_string()).await[0].request_id.as_deref(), Some("a"));
    assert!(find("nobody").await.is_empty());
    let of_another = store.find_jobs("somebody", "", &["a".to_owned()]).await.unwrap();
    assert!(of_another.is_empty(), "ids are a principal's own");
    for id in ["bad", &refused.id.to_string()] {
        let bad = find(id).await;
        assert_eq!((bad.len(), bad[0].state.as_str(), bad[0].id), (1, "rejected", refused.id));
        assert_eq!(bad[0].error.as_ref().unwrap()["code"], "unknown_field");
    }

    let claimed = claim_one(&store).await;
    assert!(settle(&store, &retry(&claimed, Duration::ZERO, claimed.deadline, RetryState::default())).await);
    let waiting = &find("a").await[0];
    assert_eq!((waiting.state.as_str(), waiting.attempts), ("waiting", 1));
    assert_eq!(waiting.error.as_ref().unwrap()["message"], "later", "why the last attempt failed");
    assert!(settle(&store, &failed(&claim_one(&store).await, "no")).await);
    let ended = &find("a").await[0];
    assert_eq!((ended.state.as_str(), ended.attempts, ended.sequence), ("failed", 2, Some(1)));
    assert_eq!(ended.error.as_ref().unwrap()["code"], "aws_refused");

    // The same id from another source is another request.
    let mut event = job("a", &arn(2));
    event.request.source = "/orders".into();
    accept(&store, std::slice::from_ref(&event)).await;
    let ids = |found: Vec<JobView>| -> Vec<Uuid> { found.iter().map(|view| view.id).collect() };
    assert_eq!(ids(find("a").await), [new.id]);
    assert_eq!(ids(find_in("/orders", "a").await), [event.id]);
    assert_eq!(find(&event.id.to_string()).await[0].source.as_deref(), Some("/orders"));
}

#[tokio::test]
async fn the_jobs_of_a_key_are_read_along_its_line_alone() {
    const OTHERS: &str = "
        insert into job (id, line_id, seq, lane_id, kms_key_id, principal, request_source, request_id, request, state,
                         accepted_at, deadline, finished_at)
        select gen_random_uuid(), -1 - n % 100, n, 1, gen_random_uuid(), 'p', '', n, '{}', 'succeeded',
               keyferry_now(), keyferry_now(), keyferry_now()
        from generate_series(1, 100000) as n";
    const READ: &str = "
        select coalesce(idx_tup_fetch, 0) + coalesce(seq_tup_read, 0) from pg_stat_user_tables where relname = 'job'";
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    client.batch_execute("alter table job set (autovacuum_enabled = false)").await.unwrap();
    // The multi-Region key of another Region has the same line.
    let mrk = |region: &str| {
        KeyArn::parse(&format!("arn:aws:kms:{region}:111122223333:key/mrk-{}", Uuid::from_u128(1).simple())).unwrap()
    };
    let (key, twin) = (mrk("eu-central-1"), mrk("us-east-1"));
    let ahead = (store.now().await.unwrap() + time::Duration::days(1)).replace_nanosecond(0).unwrap();
    let ahead = json!({"not_before": ahead.format(&time::format_description::well_known::Rfc3339).unwrap()});
    for n in 1..=6 {
        accept(&store, &[job(&format!("a{n}"), &key), job(&format!("twin{n}"), &twin)]).await;
        accept(&store, &[job_with(&format!("later{n}"), &key, ahead.clone())]).await;
    }
    client.batch_execute(OTHERS).await.unwrap();
    drop(store);

    let expected: Vec<String> =
        ["later", "a"].iter().flat_map(|name| (1..=6).rev().map(move |n| format!("{name}{n}"))).collect();
    for analysed in [false, true] {
        if analysed {
            client.batch_execute("analyze").await.unwrap();
        }
        let store = db.store().await;
        let before = value::<i64>(&client, READ, &[]).await;
        let (mut seen, mut last) = (Vec::new(), None);
        loop {
            let filter = JobFilter { key: Some(key.to_string()), before: last, limit: 5, ..JobFilter::default() };
            let page = store.jobs(&filter).await.unwrap().unwrap();
            let Some(oldest) = page.last() else { break };
            last = Some(oldest.id);
            seen.extend(names(&page).into_iter().map(str::to_owned));
        }
        assert_eq!(seen, expected);
        let of_other =
            JobFilter { key: Some(key.to_string()), before: Some(Uuid::nil()), limit: 5, ..JobFilter::default() };
        assert!(store.jobs(&of_other).await.unwrap().unwrap().is_empty());
        // A session's counts are complete once it has ended.
        drop(store);
        eventually("the store's sessions end", || async {
            let query = "select count(*) from pg_stat_activity
                         where datname = current_database() and application_name = 'keyferry'";
            (value::<i64>(&client, query, &[]).await == 0).then_some(())
        })
        .await;
        let read = value::<i64>(&client, READ, &[]).await - before;
        assert!((12..200).contains(&read), "analysed: {analysed}: {read} rows of jobs read");
    }
}
