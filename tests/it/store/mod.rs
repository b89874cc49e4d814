//! The store against a real Postgres.

use crate::support::db::TestDb;

#[tokio::test]
async fn a_test_database_is_migrated() {
    let db = TestDb::create().await;
    let store = db.store().await;
    store.check_schema().await.unwrap();
    let before = store.now().await.unwrap();
    db.advance(std::time::Duration::from_secs(60)).await;
    assert!(store.now().await.unwrap() - before >= time::Duration::seconds(60));
    assert!(db.reader_url().contains("keyferry_reader"));
}
