//! A failed job is done again once at a time, at the end of its line, with the bytes that it had chosen.

use super::given::{
    Case, OPERATOR, accept, accept_line, add_source_key, arn, case, claim, claim_one, contents, end, failed,
    generating_step, job_with, retry, sealed, settle, step, succeeded, value,
};
use keyferry::job::{Failure, FailureCode};
use keyferry::source::Fingerprint;
use keyferry::store::{
    Cancelled, Chosen, ClaimedJob, DsmChoice, FailedChoice, FailedJob, Intent, KeyDeletion, NewRetry, Prepared,
    Removed, Retried, RetryState, SettlementKind, Standing, Step,
};
use serde_json::json;
use std::time::Duration;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

fn new_retry(of: Uuid) -> NewRetry {
    NewRetry { id: Uuid::now_v7(), of, rule: Some("imports".into()), policy: "allow-all".into(), abandons: false }
}

impl Case {
    async fn standing(&self, id: Uuid) -> Standing {
        self.store.standing(&[id]).await.unwrap().remove(0)
    }

    async fn failed_job(&self, id: Uuid) -> FailedJob {
        match self.standing(id).await {
            Standing::Failed(job) => *job,
            other => panic!("{other:?}"),
        }
    }

    /// Makes the retry of a failed job; its id.
    async fn retry(&self, of: Uuid) -> Uuid {
        let new = new_retry(of);
        assert_eq!(self.store.retry(std::slice::from_ref(&new), OPERATOR).await.unwrap(), [Retried::Made]);
        self.assert_sound().await;
        new.id
    }

    /// Commits a step of the only claimed job, and fails that; its id.
    async fn fails_after(&self, step: impl Fn(&ClaimedJob) -> Step) -> Uuid {
        let job = claim_one(&self.store).await;
        assert_eq!(self.store.prepare(&[&step(&job)]).await.unwrap(), [Prepared::Ready]);
        assert!(settle(&self.store, &failed(&job, "no")).await);
        job.id
    }
}

/// Accepted before deadlines had a bound.
#[tokio::test]
async fn a_deadline_at_the_end_of_time_is_retried_within_bounds() {
    let case = case().await;
    accept(&case.store, &[job_with("j", &arn(1), json!({"deadline": "9999-12-31T23:59:59Z"}))]).await;
    let first = claim_one(&case.store).await;
    assert!(settle(&case.store, &failed(&first, "no")).await);
    case.db.advance(Duration::from_secs(3_600)).await;
    case.retry(first.id).await;
    let given = "select deadline - accepted_at = interval '90 days' from job where retry_of is not null";
    assert!(value::<bool>(&case.client, given, &[]).await);
}

#[tokio::test]
async fn a_retry_takes_the_last_place_and_the_same_bytes_and_says_so() {
    let case = case().await;
    let ahead = (case.store.now().await.unwrap() + time::Duration::hours(2)).replace_nanosecond(0).unwrap();
    let deadline = json!({"deadline": ahead.format(&Rfc3339).unwrap(), "batch": "b"});
    accept(&case.store, &[job_with("j-0", &arn(1), deadline)]).await;
    let first = claim_one(&case.store).await;
    let (step, key) = generating_step(&first);
    assert_eq!(case.store.prepare(&[&step]).await.unwrap(), [Prepared::Ready]);
    accept_line(&case.store, "j", &arn(1), 2).await;
    assert!(settle(&case.store, &failed(&first, "no")).await);
    // Long after the first one's deadline.
    case.db.advance(Duration::from_secs(5 * 3_600)).await;
    let job = case.failed_job(first.id).await;
    assert_eq!(job.choice, Some(FailedChoice::Local { id: key.id, name: key.name.clone(), is_deleted: false }));
    let id = case.retry(first.id).await;
    assert!(matches!(case.standing(first.id).await, Standing::Open { id: open, is_running: false } if open == id));
    let given = "select (new.deadline - new.accepted_at) - (old.deadline - old.accepted_at) = '0'
                 from job as new join job as old on old.id = new.retry_of";
    assert!(value::<bool>(&case.client, given, &[]).await, "the same time as the failed one had");
    for expected in ["j-1", "j-2"] {
        let job = claim_one(&case.store).await;
        assert_eq!((job.request.id.as_str(), job.retry_of), (expected, None));
        assert!(settle(&case.store, &succeeded(&job)).await);
    }
    let again = claim_one(&case.store).await;
    assert_eq!((again.id, again.sequence, again.retry_of, again.attempt), (id, 4, Some(first.id), 1));
    assert!(again.progress.is_chosen && !again.progress.in_doubt);
    assert_eq!(again.source_key.as_ref().map(|key| key.id), Some(key.id));
    assert!(matches!(case.standing(first.id).await, Standing::Open { is_running: true, .. }));
    assert!(settle(&case.store, &succeeded(&again)).await);
    case.assert_sound().await;
    let body = "select body::jsonb #>> '{data,job,retry_of}' from outbox where event_id = $1";
    assert_eq!(value::<Option<String>>(&case.client, body, &[&id]).await, Some(first.id.to_string()));
    assert_eq!(value::<Option<String>>(&case.client, body, &[&first.id]).await, None);
    let entry = "select entry::jsonb -> 'details' ->> 'operator' from audit_entry where subject = $1 and n = 1";
    assert_eq!(value::<String>(&case.client, entry, &[&id]).await, OPERATOR);
    assert!(matches!(case.standing(first.id).await, Standing::Succeeded(last) if last == id));
    let found = case.store.find_jobs("anonymous", "", &["j-0".to_owned()]).await.unwrap();
    assert_eq!(found.iter().map(|(_, view)| view.id).collect::<Vec<_>>(), [id], "what the request's id means now");
    let before = case.store.retried_before(id).await.unwrap();
    assert_eq!(before.iter().map(|view| view.id).collect::<Vec<_>>(), [first.id]);
    assert!(case.store.retried_before(first.id).await.unwrap().is_empty());
    let found = case.store.find_jobs("anonymous", "", &[first.id.to_string(), id.to_string()]).await.unwrap();
    let links: Vec<_> = found.iter().map(|(_, view)| (view.id, view.retry_of, view.retried_by)).collect();
    assert!(links.contains(&(first.id, None, Some(id))) && links.contains(&(id, Some(first.id), None)), "{links:?}");
}

#[tokio::test]
async fn two_who_ask_at_once_make_one_retry() {
    let case = case().await;
    accept_line(&case.store, "j", &arn(1), 1).await;
    let job = claim_one(&case.store).await;
    assert!(settle(&case.store, &failed(&job, "no")).await);
    let other = case.db.store().await;
    let (mine, theirs) = ([new_retry(job.id), new_retry(job.id)], [new_retry(job.id)]);
    let (mine, theirs) = tokio::join!(case.store.retry(&mine, OPERATOR), other.retry(&theirs, OPERATOR));
    let all: Vec<Retried> = mine.unwrap().into_iter().chain(theirs.unwrap()).collect();
    assert_eq!(all.iter().filter(|one| **one == Retried::Made).count(), 1, "{all:?}");
    assert_eq!(all.iter().filter(|one| **one == Retried::Before).count(), 2, "{all:?}");
    let before = contents(&case.client).await;
    assert_eq!(case.store.retry(&[new_retry(job.id)], OPERATOR).await.unwrap(), [Retried::Before]);
    assert_eq!(contents(&case.client).await, before);
    case.assert_sound().await;
}

#[tokio::test]
async fn where_the_retry_failed_it_is_that_one_which_is_retried() {
    let case = case().await;
    accept_line(&case.store, "j", &arn(1), 1).await;
    let first = case.fails_after(|job| generating_step(job).0).await;
    let chosen = case.failed_job(first).await.choice;
    let second = case.retry(first).await;
    let job = claim_one(&case.store).await;
    assert!(settle(&case.store, &failed(&job, "no")).await);
    let last = case.failed_job(first).await;
    assert_eq!((last.id, &last.choice), (second, &chosen), "along the whole chain");
    let third = case.retry(second).await;
    assert!(matches!(case.standing(first).await, Standing::Open { id, .. } if id == third));
    // One that is cancelled keeps it too.
    assert_eq!(case.store.cancel(&[third], OPERATOR).await.unwrap(), [Cancelled::Ended]);
    assert_eq!(case.failed_job(first).await.choice, chosen);
    assert!(matches!(case.standing(Uuid::now_v7()).await, Standing::Unknown));
}

#[tokio::test]
async fn a_source_key_is_either_erased_or_retried() {
    let case = case().await;
    let keys = [sealed("one"), sealed("two")];
    for (n, key) in keys.iter().enumerate() {
        assert!(add_source_key(&case.store, key).await);
        accept_line(&case.store, &key.name, &arn(n as u128), 1).await;
        case.fails_after(|job| step(job, key)).await;
    }
    let id = "select id from job where request_id = $1";
    let (one, two): (Uuid, Uuid) =
        (value(&case.client, id, &[&"one-1"]).await, value(&case.client, id, &[&"two-1"]).await);
    assert_eq!(case.store.delete_source_key("one", OPERATOR).await.unwrap(), KeyDeletion::Deleted);
    assert!(matches!(case.failed_job(one).await.choice, Some(FailedChoice::Local { is_deleted: true, .. })));
    let became = case.store.retry(&[new_retry(one), new_retry(two)], OPERATOR).await.unwrap();
    assert_eq!(became, [Retried::SourceKeyDeleted, Retried::Made], "one keeps none of the others");
    let in_use = KeyDeletion::InUse(vec![arn(1).to_string()]);
    assert_eq!(case.store.delete_source_key("two", OPERATOR).await.unwrap(), in_use);
    case.assert_sound().await;
}

#[tokio::test]
async fn a_retry_knows_a_kmip_servers_key_by_its_fingerprint() {
    let case = case().await;
    let fields = json!({"source_key_tier": "dsm", "source_key_identifier": "payroll"});
    accept(&case.store, &[job_with("d", &arn(1), fields)]).await;
    let choice = DsmChoice {
        connection: "vault".into(),
        key_id: "17".into(),
        key_name: Some("payroll".into()),
        fingerprint: Fingerprint { version: 1, hash: vec![9; 32] },
    };
    let failed = case
        .fails_after(|job| Step {
            intent: Intent::Import {
                source: Chosen::Dsm(choice.clone()),
                generated: None,
                parameters: None,
                rotated_from: None,
            },
            ..generating_step(job).0
        })
        .await;
    let job = case.failed_job(failed).await;
    assert_eq!(job.known_source(), Some(("vault/payroll".into(), "vault/17".into())));
    case.retry(failed).await;
    assert_eq!(claim_one(&case.store).await.progress.dsm, Some(choice));
}

#[tokio::test]
async fn a_deletes_retry_means_what_is_left() {
    let case = case().await;
    let meant = |job: &ClaimedJob| Step {
        lease: job.lease,
        job_id: job.id,
        intent: Intent::Delete { material_ids: vec!["b".into(), "a".into(), "c".into()] },
        effect: "delete a b c".into(),
        facts: Vec::new(),
    };
    accept(&case.store, &[job_with("d", &arn(1), json!({"operation": "delete", "scope": "all", "urgent": true}))])
        .await;
    let job = claim_one(&case.store).await;
    assert_eq!(case.store.prepare(&[&meant(&job)]).await.unwrap(), [Prepared::Ready]);
    let mut again = retry(&job, Duration::ZERO, job.deadline, RetryState::default());
    again.removed = Removed::Materials(vec!["b".into()]);
    assert!(settle(&case.store, &again).await);
    let job = claim_one(&case.store).await;
    assert!(settle(&case.store, &failed(&job, "no")).await);
    let left = FailedChoice::Delete { left: vec!["a".into(), "c".into()], is_done: false };
    assert_eq!(case.failed_job(job.id).await.choice, Some(left));
    accept_line(&case.store, "j", &arn(1), 1).await;
    let id = case.retry(job.id).await;
    let again = claim_one(&case.store).await;
    assert_eq!(again.id, id, "it overtakes its line as the failed one did");
    assert_eq!(again.progress.delete_ids, Some(vec!["a".into(), "c".into()]));
    assert!(again.progress.deleted_ids.is_empty());
    let mut rest = retry(&again, Duration::ZERO, again.deadline, RetryState::default());
    rest.removed = Removed::Materials(vec!["a".into(), "c".into()]);
    assert!(settle(&case.store, &rest).await);
    let again = claim_one(&case.store).await;
    assert!(settle(&case.store, &failed(&again, "not seen")).await);
    let done = FailedChoice::Delete { left: Vec::new(), is_done: true };
    assert_eq!(case.failed_job(id).await.choice, Some(done));
}

#[tokio::test]
async fn what_its_last_attempt_deleted_is_not_deleted_again_by_a_retry() {
    let case = case().await;
    for (line, (meant, removed, wanted)) in (1..).zip([
        (
            vec!["a".to_owned(), "b".into()],
            Removed::Materials(vec!["a".into()]),
            FailedChoice::Delete { left: vec!["b".into()], is_done: false },
        ),
        (vec![], Removed::Only, FailedChoice::Delete { left: vec![], is_done: true }),
        (vec![], Removed::Nothing, FailedChoice::Delete { left: vec![], is_done: false }),
    ]) {
        accept(&case.store, &[job_with(&format!("d{line}"), &arn(line), json!({"operation": "delete"}))]).await;
        let job = claim_one(&case.store).await;
        let intent = Intent::Delete { material_ids: meant };
        let step = Step { lease: job.lease, job_id: job.id, intent, effect: "delete".into(), facts: Vec::new() };
        assert_eq!(case.store.prepare(&[&step]).await.unwrap(), [Prepared::Ready]);
        let mut end = failed(&job, "denied");
        end.removed = removed;
        assert!(settle(&case.store, &end).await);
        assert_eq!(case.failed_job(job.id).await.choice, Some(wanted));
    }
}

#[tokio::test]
async fn a_job_that_was_to_join_later_joins_later_again() {
    let case = case().await;
    let ahead = (case.store.now().await.unwrap() + time::Duration::hours(1)).replace_nanosecond(0).unwrap();
    accept(&case.store, &[job_with("l", &arn(1), json!({"not_before": ahead.format(&Rfc3339).unwrap()}))]).await;
    let id: Uuid = value(&case.client, "select id from job", &[]).await;
    assert_eq!(case.store.cancel(&[id], OPERATOR).await.unwrap(), [Cancelled::Ended]);
    let again = case.retry(id).await;
    assert!(claim(&case.store, 8).await.is_empty());
    case.db.advance(Duration::from_secs(3_601)).await;
    assert_eq!(case.store.keep_house().await.unwrap(), 1);
    assert_eq!(claim_one(&case.store).await.id, again);
}

#[tokio::test]
async fn of_a_batch_only_what_failed_and_was_not_retried_is_meant() {
    let case = case().await;
    let ends: [Option<FailureCode>; 4] =
        [Some(FailureCode::AwsRefused), None, Some(FailureCode::KeyDisabled), Some(FailureCode::KeyDisabled)];
    let mut ids = Vec::new();
    for (n, code) in ends.into_iter().enumerate() {
        accept(&case.store, &[job_with(&format!("j{n}"), &arn(1), json!({"batch": "b"}))]).await;
        let job = claim_one(&case.store).await;
        ids.push(job.id);
        let outcome = match code {
            None => succeeded(&job),
            Some(code) => {
                let failure = Failure { code, message: "no".into(), aws_changed: false, policy: None };
                end(&job, SettlementKind::Ended { outcome: Err(failure), source_key_id: None, material: None })
            }
        };
        assert!(settle(&case.store, &outcome).await);
    }
    let start = case.store.now().await.unwrap();
    let of = async |code: Option<&str>, after| case.store.failed_of_batch("b", code, after, start).await.unwrap().ids;
    assert_eq!(of(None, Uuid::nil()).await, [ids[0], ids[2], ids[3]]);
    assert_eq!(of(Some("key_disabled"), Uuid::nil()).await, [ids[2], ids[3]]);
    assert_eq!(of(None, ids[2]).await, [ids[3]]);
    case.retry(ids[2]).await;
    let job = claim_one(&case.store).await;
    assert!(settle(&case.store, &failed(&job, "no")).await);
    assert_eq!(of(None, Uuid::nil()).await, [ids[0], ids[3]], "nothing that was accepted since");
}
