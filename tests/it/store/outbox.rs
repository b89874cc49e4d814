//! Events: each with one relay at a time, until the broker has confirmed it.

use super::given::{REGION, refusal, value};
use crate::support::db::TestDb;
use keyferry::job::RefusalCode;
use keyferry::store::{Candidate, NewRefusal, OutboxRow, Store};
use std::collections::HashSet;
use std::time::Duration;

const LEASE: Duration = Duration::from_secs(30);

/// So many refusals, each with its event.
async fn make_events(store: &Store, name: &str, count: usize) {
    // Each by another principal: those of one would be told of together.
    let refused = (0..count).map(|n| {
        let id = format!("{name}-{n}");
        Candidate::Refusal(NewRefusal { principal: id.clone(), ..refusal(&id, RefusalCode::NotAllowed) })
    });
    let refused: Vec<Candidate> = refused.collect();
    for slice in refused.chunks(200) {
        store.accept(slice).await.unwrap();
    }
}

fn ids(rows: &[OutboxRow]) -> Vec<i64> {
    rows.iter().map(|row| row.id).collect()
}

#[tokio::test]
async fn an_event_is_taken_by_one_relay() {
    let db = TestDb::create().await;
    let store = db.store().await;
    make_events(&store, "e", 200).await;
    let relay = async || {
        let mut taken = Vec::new();
        loop {
            let rows = store.take_events(keyferry::store::Queue::Fresh, 7, LEASE, None).await.unwrap();
            if rows.is_empty() {
                return taken;
            }
            assert!(rows.len() <= 7);
            assert!(rows.iter().all(|row| row.attempts == 1 && row.routing_key.ends_with(REGION)));
            taken.extend(ids(&rows));
        }
    };
    let (one, two, three) = tokio::join!(relay(), relay(), relay());
    let all: Vec<i64> = one.into_iter().chain(two).chain(three).collect();
    assert_eq!(all.len(), 200);
    assert_eq!(all.iter().collect::<HashSet<_>>().len(), 200);
}

#[tokio::test]
async fn an_event_comes_back_when_its_relays_lease_ends_and_goes_when_confirmed() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    make_events(&store, "e", 3).await;
    let first = store.take_events(keyferry::store::Queue::Fresh, 10, LEASE, None).await.unwrap();
    assert_eq!(first.len(), 3);
    store.forget_events(&[first[0].id]).await.unwrap();
    db.advance(LEASE * 5 / 6).await;
    assert!(store.take_events(keyferry::store::Queue::Fresh, 10, LEASE, None).await.unwrap().is_empty());
    db.advance(Duration::from_secs(6)).await;
    let again = store.take_events(keyferry::store::Queue::Fresh, 10, LEASE, None).await.unwrap();
    assert_eq!(ids(&again), ids(&first[1..]));
    assert!(again.iter().all(|row| row.attempts == 2));
    let copies: HashSet<_> = first[1..].iter().map(|row| (row.event_id, row.body.clone())).collect();
    assert!(again.iter().all(|row| copies.contains(&(row.event_id, row.body.clone()))), "copies are equal");
    // Forgetting what is gone already is harmless.
    store.forget_events(&ids(&first)).await.unwrap();
    assert_eq!(value::<i64>(&client, "select count(*) from outbox", &[]).await, 0);
}

#[tokio::test]
async fn events_that_are_kept_stay_with_their_relay_until_another_has_taken_them() {
    let db = TestDb::create().await;
    let store = db.store().await;
    make_events(&store, "e", 3).await;
    let take = async || store.take_events(keyferry::store::Queue::Fresh, 10, LEASE, None).await.unwrap();
    let mine = take().await;
    assert_eq!(mine.len(), 3);
    for _ in 0..3 {
        db.advance(LEASE * 5 / 6).await;
        store.keep_events(&mine, LEASE).await.unwrap();
        assert!(take().await.is_empty());
    }
    db.advance(LEASE + Duration::from_secs(1)).await;
    let theirs = take().await;
    assert_eq!(ids(&theirs), ids(&mine));
    // Too late: they are another's now, for no longer than that one wants them.
    store.keep_events(&mine, LEASE * 10).await.unwrap();
    db.advance(LEASE + Duration::from_secs(1)).await;
    assert_eq!(take().await.len(), 3);
}

#[tokio::test]
async fn held_events_delay_no_fresh_one() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    make_events(&store, "flood", 1_000).await;
    while let rows = store.take_events(keyferry::store::Queue::Fresh, 200, LEASE, None).await.unwrap()
        && !rows.is_empty()
    {
        let held: Vec<_> = rows.iter().map(|row| (row.id, Duration::from_secs(5), "unroutable")).collect();
        store.hold_events(&held).await.unwrap();
    }
    make_events(&store, "fresh", 1).await;
    let fresh = store.take_events(keyferry::store::Queue::Fresh, 10, LEASE, None).await.unwrap();
    assert_eq!(fresh.len(), 1, "a fresh event is alone in its queue");
    assert!(
        store.take_events(keyferry::store::Queue::Held, 10, LEASE, None).await.unwrap().is_empty(),
        "each waits for its delay"
    );
    assert_eq!(
        value::<i64>(&client, "select count(*) from outbox where held_because = 'unroutable'", &[]).await,
        1_000
    );

    db.advance(Duration::from_secs(6)).await;
    let from = Some(store.now().await.unwrap() - time::Duration::minutes(1));
    let held = store.take_events(keyferry::store::Queue::Held, 10, LEASE, from).await.unwrap();
    assert_eq!(held.len(), 10);
    assert!(held.iter().all(|row| row.attempts == 2));
    store.forget_events(&ids(&held)).await.unwrap();
    assert_eq!(value::<i64>(&client, "select count(*) from outbox", &[]).await, 991);
}

#[tokio::test]
async fn relays_that_hold_and_forget_in_opposite_orders_meet_without_harm() {
    let db = TestDb::create().await;
    let store = db.store().await;
    make_events(&store, "e", 100).await;
    let rows = store.take_events(keyferry::store::Queue::Fresh, 200, LEASE, None).await.unwrap();
    let up = ids(&rows);
    let down: Vec<i64> = up.iter().rev().copied().collect();
    for _ in 0..30 {
        let hold = |ids: &[i64]| -> Vec<_> { ids.iter().map(|id| (*id, Duration::ZERO, "unroutable")).collect() };
        let (one, two) = (hold(&up), hold(&down));
        let (one, two) = tokio::join!(store.hold_events(&one), store.hold_events(&two));
        one.unwrap();
        two.unwrap();
    }
    let (one, two) = tokio::join!(store.forget_events(&up), store.forget_events(&down));
    one.unwrap();
    two.unwrap();
}
