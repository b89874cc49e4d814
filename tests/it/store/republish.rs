//! Events are made again from their jobs' rows, page by page, and no faster than the outbox empties.

use super::given::{accept, accept_line, arn, assert_audit_holds, claim_one, job_with, settle, succeeded, value};
use crate::support::db::TestDb;
use keyferry::store::{Queue, Republication, Told};
use serde_json::json;
use std::time::Duration;
use uuid::Uuid;

fn republication() -> Republication {
    Republication { id: Uuid::now_v7(), operator: "op".into() }
}

#[tokio::test]
async fn what_cannot_be_read_keeps_no_other_and_what_waits_has_no_event() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    accept_line(&store, "j", &arn(1), 3).await;
    for _ in 0..2 {
        assert!(settle(&store, &succeeded(&claim_one(&store).await)).await);
    }
    let before: String = value(&client, "select string_agg(body, ' ' order by id) from outbox", &[]).await;
    client.batch_execute("delete from outbox").await.unwrap();
    let rows = client.query("select id from job order by seq", &[]).await.unwrap();
    let ids: Vec<Uuid> = rows.iter().map(|row| row.get(0)).collect();
    let this = republication();
    let done = store.republish(&this, 1, &ids).await.unwrap();
    assert!(done.events == 2 && done.unreadable.is_empty(), "{done:?}");
    let after: String = value(&client, "select string_agg(body, ' ' order by id) from outbox", &[]).await;
    assert_eq!(after, before, "in the order in which the jobs ended");
    client.batch_execute("update job set request = '{\"operation\":\"unheard-of\"}' where seq = 1").await.unwrap();
    let done = store.republish(&this, 2, &ids).await.unwrap();
    assert!(done.events == 1 && done.unreadable[0].contains(&ids[0].to_string()), "{done:?}");
    // Nothing to tell, nothing to record.
    let done = store.republish(&republication(), 1, &ids[2..]).await.unwrap();
    assert!(done.events == 0 && done.unreadable.is_empty());
    let entries = "select count(*) from audit_entry where entry like '%events_republished%'";
    assert_eq!(value::<i64>(&client, entries, &[]).await, 2);
    assert_audit_holds(&client).await;
}

#[tokio::test]
async fn jobs_are_found_by_when_they_ended() {
    let db = TestDb::create().await;
    let store = db.store().await;
    let mut ends = Vec::new();
    for n in 0..3 {
        accept(&store, &[job_with(&format!("j{n}"), &arn(1), json!({"batch": format!("b{}", n % 2)}))]).await;
        let job = claim_one(&store).await;
        assert!(settle(&store, &succeeded(&job)).await);
        ends.push((job.id, job.now));
        db.advance(Duration::from_secs(3_600)).await;
    }
    accept(&store, &[job_with("waits", &arn(1), json!({"batch": "b0"}))]).await;
    let found = async |told: &Told, outcome: Option<&str>| {
        let page = store.ended_jobs(told, outcome, Uuid::nil()).await.unwrap();
        assert_eq!(page.after, None);
        page.ids
    };
    let minute = time::Duration::minutes(1);
    let between = |from: usize, to: usize| Told::Between(ends[from].1 - minute, ends[to].1 + minute);
    assert_eq!(found(&between(0, 2), None).await, [ends[0].0, ends[1].0, ends[2].0]);
    assert_eq!(found(&between(1, 1), None).await, [ends[1].0]);
    assert!(found(&between(0, 2), Some("failed")).await.is_empty());
    assert_eq!(found(&Told::OfBatch("b0".into()), None).await, [ends[0].0, ends[2].0]);
    let rest = store.ended_jobs(&Told::OfBatch("b0".into()), None, ends[0].0).await.unwrap();
    assert_eq!(rest.ids, [ends[2].0]);
}

#[tokio::test]
async fn room_in_the_outbox_is_what_the_broker_may_take() {
    let db = TestDb::create().await;
    let store = db.store().await;
    for n in 0..3 {
        accept_line(&store, &format!("j{n}"), &arn(n), 1).await;
        assert!(settle(&store, &succeeded(&claim_one(&store).await)).await);
    }
    let room = async |most| store.outbox_has_room(most).await.unwrap();
    assert!(room(4).await && !room(3).await);
    // Neither what is being published is out yet, nor what the broker would not take: that would pile up without end.
    let taken = store.take_events(Queue::Fresh, 3, Duration::from_secs(30), None).await.unwrap();
    assert!(!room(3).await);
    store.hold_events(&[(taken[0].id, Duration::from_secs(60), "unroutable")]).await.unwrap();
    assert!(!room(3).await);
    store.forget_events(&[taken[0].id]).await.unwrap();
    assert!(room(3).await && !room(2).await);
}
