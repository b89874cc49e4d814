//! An abandoned job ends whatever is in doubt, says what it may have done, and leaves nothing behind that forgets it.

use super::given::{
    Case, LEASE, OPERATOR, SIGNATURE_LIFE, accept, accept_line, arn, case, claim, claim_one, contents, generating_step,
    job_with, put_back, retry, settle, succeeded, value,
};
use keyferry::store::{
    Answered, Cancelled, ClaimedJob, Ending, FailedChoice, KeyDeletion, Prepared, RetryState, Scope, Settled, Standing,
    Stop,
};
use serde_json::json;
use std::time::Duration;
use uuid::Uuid;

impl Case {
    async fn abandon(&self, id: Uuid) -> Cancelled {
        self.store.abandon(&[id], OPERATOR).await.unwrap().remove(0)
    }

    /// Commits a step, whose call is then not answered.
    async fn is_left_in_doubt(&self, job: &ClaimedJob, answered: bool) {
        let (step, _) = generating_step(job);
        assert_eq!(self.store.prepare(&[&step]).await.unwrap(), [Prepared::Ready]);
        let state = if answered {
            RetryState { answered: Some(Answered { key_material_id: Some("m".into()) }), ..RetryState::default() }
        } else {
            RetryState { in_doubt: true, ..RetryState::default() }
        };
        let mut again = retry(job, Duration::from_secs(60), job.deadline, state);
        again.late_effect = (!answered).then(|| step.effect.clone());
        assert!(settle(&self.store, &again).await);
    }

    /// What the job may have put on its key, or has by AWS's own word, is told of by the record and by its end.
    async fn assert_on_record(&self, id: Uuid, answered: bool) {
        let query = "select imported_at is not null, key_material_id from kms_material where job_id = $1";
        let row = self.client.query_one(query, &[&id]).await.unwrap();
        let record: (bool, Option<String>) = (row.get(0), row.get(1));
        assert_eq!(record, (answered, answered.then(|| "m".into())));
        let said: String = value(&self.client, "select error ->> 'message' from job where id = $1", &[&id]).await;
        assert_eq!(said.contains("it took the material m,"), answered, "{said}");
    }

    async fn assert_abandoned(&self, id: Uuid, aws_changed: bool) {
        let query = "select state, error ->> 'code', (error ->> 'aws_changed')::boolean from job where id = $1";
        let row = self.client.query_one(query, &[&id]).await.unwrap();
        let end: (String, Option<String>, Option<bool>) = (row.get(0), row.get(1), row.get(2));
        assert_eq!(end, ("failed".into(), Some("abandoned".into()), Some(aws_changed)));
        let told = "select count(*) from outbox where event_id = $1";
        assert_eq!(value::<i64>(&self.client, told, &[&id]).await, 1);
        for left in ["progress", "cancellation"] {
            let query = format!("select count(*) from {left} where job_id = $1");
            assert_eq!(value::<i64>(&self.client, &query, &[&id]).await, 0, "{left}");
        }
        self.assert_sound().await;
    }
}

#[tokio::test]
async fn a_job_in_doubt_ends_at_once_and_what_it_may_have_done_stays_on_record() {
    for answered in [false, true] {
        let case = case().await;
        accept_line(&case.store, "j", &arn(1), 2).await;
        let job = claim_one(&case.store).await;
        case.is_left_in_doubt(&job, answered).await;
        assert_eq!(case.store.cancel(&[job.id], OPERATOR).await.unwrap(), [Cancelled::Requested], "cancelling waits");
        assert_eq!(case.abandon(job.id).await, Cancelled::Ended);
        case.assert_abandoned(job.id, true).await;
        let before = contents(&case.client).await;
        let was = Cancelled::EndedBefore { state: "failed".into(), code: Some("abandoned".into()) };
        assert_eq!(case.abandon(job.id).await, was);
        assert_eq!(contents(&case.client).await, before);
        case.assert_on_record(job.id, answered).await;
        let Standing::Failed(failed) = case.store.standing(&[job.id]).await.unwrap().remove(0) else { panic!() };
        let Some(FailedChoice::Local { name, .. }) = failed.choice else { panic!() };
        let deleted = case.store.delete_source_key(&name, OPERATOR).await.unwrap();
        assert_eq!(deleted, KeyDeletion::InUse(vec![arn(1).to_string()]), "the only bytes that settle it");
        // The next is told of the call that may still take effect.
        let next = claim_one(&case.store).await;
        assert_eq!(next.request.id.as_str(), "j-2");
        assert_eq!(next.late.is_some(), !answered, "{:?}", next.late);
        assert!(settle(&case.store, &succeeded(&next)).await);
        assert!(claim(&case.store, 8).await.is_empty());
    }
}

#[tokio::test]
async fn under_a_lease_it_ends_between_two_steps() {
    let case = case().await;
    accept_line(&case.store, "j", &arn(1), 4).await;
    // When it is about to change AWS.
    let leased = claim_one(&case.store).await;
    assert_eq!(case.abandon(leased.id).await, Cancelled::Requested);
    assert_eq!(case.abandon(leased.id).await, Cancelled::Requested);
    assert_eq!(case.store.is_stopped(leased.id, None).await.unwrap(), Some(Stop::Ending(Ending::Abandoned)));
    let (step, _) = generating_step(&leased);
    assert_eq!(case.store.prepare(&[&step]).await.unwrap(), [Prepared::Ending(Ending::Abandoned)]);
    let settled = case.store.settle(&[&put_back(&leased, None)], SIGNATURE_LIFE).await.unwrap();
    assert_eq!(settled, [Settled::Ended(Ending::Abandoned)]);
    case.assert_abandoned(leased.id, false).await;
    // When its call is not answered: a cancelled one would go on.
    let leased = claim_one(&case.store).await;
    let (step, _) = generating_step(&leased);
    assert_eq!(case.store.prepare(&[&step]).await.unwrap(), [Prepared::Ready]);
    assert_eq!(case.store.cancel(&[leased.id], OPERATOR).await.unwrap(), [Cancelled::Requested]);
    assert_eq!(case.abandon(leased.id).await, Cancelled::Requested);
    let state = RetryState { in_doubt: true, ..RetryState::default() };
    let mut again = retry(&leased, Duration::ZERO, leased.deadline, state);
    again.late_effect = Some(step.effect.clone());
    let settled = case.store.settle(&[&again], SIGNATURE_LIFE).await.unwrap();
    assert_eq!(settled, [Settled::Ended(Ending::Abandoned)]);
    case.assert_abandoned(leased.id, true).await;
    case.assert_on_record(leased.id, false).await;
    // When its worker has died, the next claim finds it, and the line is closed for what that may have sent.
    let left = claim_one(&case.store).await;
    assert!(left.late.is_some());
    assert_eq!(case.store.prepare(&[&generating_step(&left).0]).await.unwrap(), [Prepared::Ready]);
    case.db.advance(LEASE * 2).await;
    assert_eq!(case.abandon(left.id).await, Cancelled::Requested, "the worker may be alive");
    let found = claim_one(&case.store).await;
    assert!(found.id == left.id && found.ending == Some(Ending::Abandoned));
    assert!(settle(&case.store, &put_back(&found, None)).await);
    case.assert_abandoned(left.id, true).await;
    let closed = "select extract(epoch from late_until - keyferry_now())::float8 from line";
    assert!(value::<f64>(&case.client, closed, &[]).await > 500.0, "from the takeover on");
    assert_eq!(claim_one(&case.store).await.request.id.as_str(), "j-4");
}

/// AWS answered, and did not show it yet, when the operator gave up: the answer is not lost with the attempt.
#[tokio::test]
async fn what_aws_answered_to_the_last_attempt_stays_known() {
    let case = case().await;
    accept_line(&case.store, "j", &arn(1), 1).await;
    let leased = claim_one(&case.store).await;
    assert_eq!(case.store.prepare(&[&generating_step(&leased).0]).await.unwrap(), [Prepared::Ready]);
    assert_eq!(case.abandon(leased.id).await, Cancelled::Requested);
    let answered = Answered { key_material_id: Some("m".into()) };
    let state = RetryState { answered: Some(answered), ..RetryState::default() };
    let looking = retry(&leased, Duration::ZERO, leased.deadline, state);
    let settled = case.store.settle(&[&looking], SIGNATURE_LIFE).await.unwrap();
    assert_eq!(settled, [Settled::Ended(Ending::Abandoned)]);
    case.assert_abandoned(leased.id, true).await;
    case.assert_on_record(leased.id, true).await;
}

#[tokio::test]
async fn held_and_cancelled_jobs_and_deletes_are_abandoned_too() {
    let case = case().await;
    accept(&case.store, &[job_with("d", &arn(1), json!({"operation": "delete", "urgent": true}))]).await;
    let job = claim_one(&case.store).await;
    case.is_left_in_doubt(&job, false).await;
    case.store.hold(&Scope::Everything, None, OPERATOR).await.unwrap();
    case.db.advance(Duration::from_secs(61)).await;
    assert!(claim(&case.store, 8).await.is_empty(), "it is parked");
    assert_eq!(case.abandon(job.id).await, Cancelled::Ended);
    case.assert_abandoned(job.id, true).await;
    assert_eq!(value::<i64>(&case.client, "select count(*) from line where due_at is not null", &[]).await, 0);
    assert_eq!(case.abandon(Uuid::now_v7()).await, Cancelled::Unknown);
}
