//! What people and programs are shown of jobs.

use super::given::{accept, arn, claim_one, failed, job, job_with, refusal, retry, settle, succeeded};
use crate::support::db::TestDb;
use keyferry::job::RefusalCode;
use keyferry::store::{Candidate, JobFilter, JobView, RetryState};
use serde_json::json;
use std::time::Duration;

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
    let list = async |filter: JobFilter| store.jobs(&JobFilter { limit: 100, ..filter }).await.unwrap();
    let all = list(JobFilter::default()).await;
    assert_eq!(names(&all), ["j5", "j4", "j3", "j2", "j1"]);
    let page = store.jobs(&JobFilter { limit: 2, before: all[1].id, ..JobFilter::default() }).await.unwrap();
    assert_eq!(names(&page), ["j3", "j2"]);
    assert_eq!(names(&list(JobFilter { batch: Some("even".into()), ..JobFilter::default() }).await), ["j4", "j2"]);
    for key in [arn(0).to_string(), all[1].key_id.unwrap().to_string()] {
        assert_eq!(names(&list(JobFilter { key: Some(key), ..JobFilter::default() }).await), ["j4", "j2"]);
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
    store.accept(&[Candidate::Refusal(refusal("bad", RefusalCode::UnknownField))]).await.unwrap();
    let find = async |id: &str| store.find_jobs("anonymous", &[id.to_owned()]).await.unwrap();
    assert_eq!(find("a").await[0].id, Some(new.id));
    assert_eq!(find(&new.id.to_string()).await[0].request_id.as_deref(), Some("a"));
    assert!(find("nobody").await.is_empty());
    assert!(store.find_jobs("somebody", &["a".to_owned()]).await.unwrap().is_empty(), "ids are a principal's own");
    let bad = find("bad").await;
    assert_eq!((bad.len(), bad[0].state.as_str(), bad[0].id), (1, "rejected", None));
    assert_eq!(bad[0].error.as_ref().unwrap()["code"], "unknown_field");

    let claimed = claim_one(&store).await;
    assert!(settle(&store, &retry(&claimed, Duration::ZERO, claimed.deadline, RetryState::default())).await);
    let waiting = &find("a").await[0];
    assert_eq!((waiting.state.as_str(), waiting.attempts), ("waiting", 1));
    assert_eq!(waiting.error.as_ref().unwrap()["message"], "later", "why the last attempt failed");
    assert!(settle(&store, &failed(&claim_one(&store).await, "no")).await);
    let ended = &find("a").await[0];
    assert_eq!((ended.state.as_str(), ended.attempts, ended.sequence), ("failed", 2, Some(1)));
    assert_eq!(ended.error.as_ref().unwrap()["code"], "aws_refused");
}
