//! Source keys: erased only when nothing can still need them, and never confused with another.

use super::given::{
    LEASE, accept, add_source_key, arn, assert_audit_holds, claim_one, generating_step, job, keyring, material, retry,
    sealed, settle, step, succeeded, until_waiting, value,
};
use crate::support::db::TestDb;
use keyferry::source::{Kek, Keyring, SealedKey};
use keyferry::store::{KeyDeletion, NewSourceKey, Prepared, RetryState, SettlementKind, SourceKeyOrigin, StoreError};
use std::time::Duration;

#[tokio::test]
async fn an_erased_key_leaves_its_name_and_no_seals() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let key = sealed("k");
    assert!(add_source_key(&store, &key).await);
    assert!(!add_source_key(&store, &sealed("k")).await, "the name is taken");
    let stored = store.sealed_source_key("k").await.unwrap().unwrap();
    assert!(stored.sealed_material == key.sealed_material && stored.id == key.id);

    assert_eq!(store.delete_source_key("nobody", "op").await.unwrap(), KeyDeletion::Unknown);
    assert_eq!(store.delete_source_key(&key.id.to_string(), "op").await.unwrap(), KeyDeletion::Deleted);
    assert_eq!(store.delete_source_key("k", "op").await.unwrap(), KeyDeletion::Unknown);
    assert!(!add_source_key(&store, &sealed("k")).await, "a name never means other bytes");

    let stored = store.sealed_source_key("k").await.unwrap().unwrap();
    assert!(stored.sealed_material.is_none() && stored.sealed_data_key.is_none());
    assert!(store.source_keys(false, None, 10).await.unwrap().is_empty());
    let listed = store.source_keys(true, None, 10).await.unwrap();
    assert!(listed.len() == 1 && listed[0].deleted_at.is_some());
    for name_or_id in ["k", &key.id.to_string(), &key.id.simple().to_string().to_uppercase()] {
        assert_eq!(store.source_key(name_or_id).await.unwrap().unwrap().id, key.id, "{name_or_id}");
    }
    assert_eq!(value::<i64>(&client, "select count(*) from audit_entry", &[]).await, 2);
    assert_audit_holds(&client).await;
}

#[tokio::test]
async fn a_key_that_a_kms_key_holds_or_may_hold_is_not_erased() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    for (n, certain) in [(1, true), (2, false)] {
        let key = sealed(&format!("k{n}"));
        assert!(add_source_key(&store, &key).await);
        accept(&store, &[job(&format!("j{n}"), &arn(n))]).await;
        let mut end = succeeded(&claim_one(&store).await);
        if let SettlementKind::Ended { material: of_key, .. } = &mut end.kind {
            *of_key = Some(material(&key, certain));
        }
        assert!(settle(&store, &end).await);
        let tied = KeyDeletion::InUse(vec![arn(n).to_string()]);
        assert_eq!(store.delete_source_key(&key.name, "op").await.unwrap(), tied);
        assert_eq!(store.source_key(&key.name).await.unwrap().unwrap().used_by, [arn(n).to_string()]);
    }
    assert_eq!(value::<i64>(&client, "select count(*) from source_key where deleted_at is null", &[]).await, 2);
}

#[tokio::test]
async fn a_key_that_a_job_is_about_to_import_is_not_erased() {
    let db = TestDb::create().await;
    let store = db.store().await;
    let key = sealed("k");
    assert!(add_source_key(&store, &key).await);
    accept(&store, &[job("a", &arn(1))]).await;
    let job = claim_one(&store).await;
    assert_eq!(store.prepare(&[&step(&job, &key)]).await.unwrap(), [Prepared::Ready]);
    let tied = KeyDeletion::InUse(vec![arn(1).to_string()]);
    assert_eq!(store.delete_source_key("k", "op").await.unwrap(), tied);
    // Between two attempts as well.
    assert!(settle(&store, &retry(&job, Duration::from_secs(60), job.deadline, RetryState::default())).await);
    assert_eq!(store.delete_source_key("k", "op").await.unwrap(), tied);
    db.advance(LEASE * 4).await;
    assert!(settle(&store, &succeeded(&claim_one(&store).await)).await);
    assert_eq!(store.delete_source_key("k", "op").await.unwrap(), KeyDeletion::Deleted);
}

#[tokio::test]
async fn a_step_with_an_erased_key_is_told_so_and_its_neighbours_are_not_held_up() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let key = sealed("k");
    assert!(add_source_key(&store, &key).await);
    accept(&store, &[job("a", &arn(1)), job("b", &arn(2))]).await;
    let claimed = super::given::claim(&store, 8).await;
    assert_eq!(store.delete_source_key("k", "op").await.unwrap(), KeyDeletion::Deleted);
    let (other, _) = generating_step(&claimed[1]);
    let outcomes = store.prepare(&[&step(&claimed[0], &key), &other]).await.unwrap();
    assert_eq!(outcomes, [Prepared::SourceKeyDeleted, Prepared::Ready]);
    assert_eq!(value::<i64>(&client, "select count(*) from progress", &[]).await, 1);
}

#[tokio::test]
async fn erasing_waits_for_a_job_that_is_just_choosing_the_key() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let mut blocker = db.client().await;
    let key = sealed("k");
    assert!(add_source_key(&store, &key).await);
    accept(&store, &[job("a", &arn(1))]).await;
    let job = claim_one(&store).await;

    // Stops the step after it has pinned the key and before it is committed.
    let blocking = blocker.transaction().await.unwrap();
    blocking.batch_execute("lock table progress in exclusive mode").await.unwrap();
    let choosing = {
        let (store, step) = (store.clone(), step(&job, &key));
        tokio::spawn(async move { store.prepare(&[&step]).await.unwrap() })
    };
    until_waiting(&client, 1).await;
    let erasing = {
        let store = store.clone();
        tokio::spawn(async move { store.delete_source_key("k", "op").await.unwrap() })
    };
    until_waiting(&client, 2).await;
    blocking.commit().await.unwrap();
    assert_eq!(choosing.await.unwrap(), [Prepared::Ready]);
    assert_eq!(erasing.await.unwrap(), KeyDeletion::InUse(vec![arn(1).to_string()]));
    assert!(store.sealed_source_key("k").await.unwrap().unwrap().sealed_material.is_some());
}

#[tokio::test]
async fn a_name_is_given_to_one_key_however_many_ask_at_once() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let keys: Vec<_> = (0..6).map(|_| sealed("same")).collect();
    let adding = keys.iter().map(|key| add_source_key(&store, key));
    let won = futures_util::future::join_all(adding).await;
    assert_eq!(won.iter().filter(|won| **won).count(), 1);
    assert_eq!(value::<i64>(&client, "select count(*) from audit_entry", &[]).await, 1);
}

#[tokio::test]
async fn only_a_taken_name_is_called_taken() {
    let db = TestDb::create().await;
    let store = db.store().await;
    let key = sealed("k");
    assert!(add_source_key(&store, &key).await);
    // Another rule of the database is broken: the id is there.
    let same_id = SealedKey { name: "other".into(), ..key };
    let new = NewSourceKey { key: same_id, origin: SourceKeyOrigin::Imported, operator: "op".into() };
    let error = store.add_source_key(&new).await.unwrap_err();
    assert!(matches!(&error, StoreError::Data(reason) if reason.contains("source_key_pkey")), "{error}");
    assert!(store.source_key("other").await.unwrap().is_none());
}

#[tokio::test]
async fn keys_are_listed_page_by_page() {
    let db = TestDb::create().await;
    let store = db.store().await;
    for n in 1..=5 {
        assert!(add_source_key(&store, &sealed(&format!("k{n}"))).await);
    }
    assert_eq!(store.delete_source_key("k4", "op").await.unwrap(), KeyDeletion::Deleted);
    let page = async |with_deleted, before| {
        let keys = store.source_keys(with_deleted, before, 2).await.unwrap();
        (keys.last().map(|key| key.id), keys.into_iter().map(|key| key.name).collect::<Vec<_>>())
    };
    let (last, names) = page(false, None).await;
    assert_eq!(names, ["k5", "k3"]);
    assert_eq!(page(false, last).await.1, ["k2", "k1"]);
    assert_eq!(page(true, None).await.1, ["k5", "k4"]);
}

#[tokio::test]
async fn all_processes_open_the_fingerprint_key_that_was_first() {
    let db = TestDb::create().await;
    let store = db.store().await;
    let kek = || Kek::parse(&hex::encode([7; 32])).unwrap();
    let offers: Vec<_> = (0..4).map(|_| Keyring::new_fingerprint_key(&kek()).unwrap()).collect();
    let stored = futures_util::future::join_all(offers.iter().map(|offer| store.fingerprint_key(offer))).await;
    let stored: Vec<_> = stored.into_iter().map(Result::unwrap).collect();
    assert!(stored.windows(2).all(|pair| pair[0].sealed_key == pair[1].sealed_key));
    Keyring::open(kek(), &stored[0]).unwrap();
    let other = Kek::parse(&hex::encode([8; 32])).unwrap();
    assert!(Keyring::open(other, &stored[0]).is_err());
    let (one, two) = (keyring(), keyring());
    assert_ne!(one.body_hash("q", b"x"), two.body_hash("q", b"x"), "a keyring that was not shared hashes otherwise");
}
