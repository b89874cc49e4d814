//! One bad row never takes its batch with it: Postgres is made to refuse one, verb by verb.

use super::given::{
    SIGNATURE_LIFE, accept, arn, assert_audit_holds, assert_dense, claim, failed, generating_step, job, settle,
    succeeded, value,
};
use crate::support::db::TestDb;
use keyferry::store::{Candidate, NewJob, Prepared, Settlement, Step, StoreError, Verdict, bisect};

const SLICE: usize = 20;
const BAD: usize = 13;

#[tokio::test]
async fn a_job_that_postgres_refuses_is_refused_alone() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    client.batch_execute("alter table job add check (request_id <> 'bad')").await.unwrap();
    let name = |n| if n == BAD { "bad".to_owned() } else { format!("j{n}") };
    let candidates: Vec<Candidate> = (0..SLICE).map(|n| Candidate::Job(job(&name(n), &arn((n % 3) as u128)))).collect();
    // Twice: the second time as after a lost answer.
    for _ in 0..2 {
        let outcomes = bisect(&candidates, |range| store.accept(&candidates[range])).await.unwrap();
        assert_eq!(outcomes.len(), SLICE);
        for (at, outcome) in outcomes.into_iter().enumerate() {
            match outcome {
                Err(error) => assert!(at == BAD && matches!(error, StoreError::Data(_)), "{at}: {error}"),
                Ok(verdict) => assert!(at != BAD && verdict == Verdict::Accepted, "{at}: {verdict:?}"),
            }
        }
        assert_eq!(value::<i64>(&client, "select count(*) from job", &[]).await, 19);
        assert_eq!(value::<i64>(&client, "select count(*) from request", &[]).await, 19, "no id without its job");
    }
    assert_dense(&client).await;
    assert_audit_holds(&client).await;
}

#[tokio::test]
async fn a_step_that_postgres_refuses_fails_alone() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let jobs: Vec<NewJob> = (0..SLICE).map(|n| job(&format!("j{n}"), &arn(n as u128))).collect();
    accept(&store, &jobs).await;
    let claimed = claim(&store, SLICE).await;
    client
        .batch_execute(
            "create function refuse_bad() returns trigger language plpgsql as
             $$ begin raise exception 'bad' using errcode = 'check_violation'; end $$;
             create trigger refuse_bad before insert on audit_entry for each row
             when (new.entry like '%\"bad\"%') execute function refuse_bad()",
        )
        .await
        .unwrap();
    let mut steps: Vec<Step> = claimed.iter().map(|job| generating_step(job).0).collect();
    let fact = serde_json::json!({"why": "bad"});
    steps[BAD].facts.push(keyferry::audit::Fact::new(keyferry::audit::Kind::ImportIntended, fact));
    let rows: Vec<&Step> = steps.iter().collect();
    let outcomes = bisect(&rows, |range| store.prepare(&rows[range])).await.unwrap();
    assert_eq!(outcomes.len(), SLICE);
    for (at, outcome) in outcomes.into_iter().enumerate() {
        match outcome {
            Err(error) => assert!(at == BAD && matches!(error, StoreError::Data(_)), "{at}: {error}"),
            Ok(prepared) => assert!(at != BAD && prepared == Prepared::Ready, "{at}: {prepared:?}"),
        }
    }
    assert_eq!(value::<i64>(&client, "select count(*) from progress", &[]).await, 19);
    assert_eq!(value::<i64>(&client, "select count(*) from source_key", &[]).await, 19, "no key without its choice");
    assert_audit_holds(&client).await;
}

#[tokio::test]
async fn an_outcome_that_postgres_refuses_fails_alone() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let jobs: Vec<NewJob> = (0..SLICE).map(|n| job(&format!("j{n}"), &arn(n as u128))).collect();
    accept(&store, &jobs).await;
    let claimed = claim(&store, SLICE).await;
    client.batch_execute("alter table outbox add check (body not like '%unwelcome%')").await.unwrap();
    let mut ends: Vec<Settlement> = claimed.iter().map(succeeded).collect();
    ends[BAD] = failed(&claimed[BAD], "unwelcome");
    // What no rule of ours forbids and no Postgres stores.
    ends[2] = failed(&claimed[2], "a\0b");
    let rows: Vec<&Settlement> = ends.iter().collect();
    let outcomes = bisect(&rows, |range| store.settle(&rows[range], SIGNATURE_LIFE)).await.unwrap();
    assert_eq!(outcomes.len(), SLICE);
    for (at, outcome) in outcomes.into_iter().enumerate() {
        match outcome {
            Err(error) => assert!([2, BAD].contains(&at) && matches!(error, StoreError::Data(_)), "{at}: {error}"),
            Ok(settled) => assert!(![2, BAD].contains(&at) && settled.is_held(), "{at}"),
        }
    }
    assert_eq!(value::<i64>(&client, "select count(*) from job where state <> 'waiting'", &[]).await, 18);
    // Their leases still hold: what can be stored is taken.
    assert!(settle(&store, &failed(&claimed[BAD], "unstorable")).await);
    assert!(settle(&store, &failed(&claimed[2], "unstorable")).await);
    assert_audit_holds(&client).await;
}

/// An outage in the middle is the slice's, not a row's.
#[tokio::test]
async fn an_outage_is_nobodys_fault() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    client.batch_execute("revoke insert on job from keyferry_worker").await.unwrap();
    let candidates = [Candidate::Job(job("a", &arn(1))), Candidate::Job(job("b", &arn(2)))];
    let error = bisect(&candidates, |range| store.accept(&candidates[range])).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
    client.batch_execute("grant insert on job to keyferry_worker").await.unwrap();
    assert_eq!(store.accept(&candidates).await.unwrap(), [Verdict::Accepted, Verdict::Accepted]);
}
