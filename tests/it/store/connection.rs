//! Connections, time-outs and the schema's version: what goes wrong says so, soon, and tells no password.

use super::given::{accept, arn, job, refusal, until_waiting, value};
use crate::support::db::{TestDb, ca_file, connect};
use keyferry::config::Database;
use keyferry::job::RefusalCode;
use keyferry::store::{Candidate, SchemaError, Store, StoreError, migrate};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use url::Url;

const PASSWORD: &str = "sw0rdfish";

fn unavailable<T: std::fmt::Debug>(outcome: Result<T, StoreError>) -> String {
    match outcome {
        Err(StoreError::Unavailable(fault)) => fault.reason,
        other => panic!("expected Unavailable, got {other:?}"),
    }
}

/// An authority that signed nothing here.
fn other_authority(directory: &Path) -> std::path::PathBuf {
    let certificate = directory.join("other.pem");
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-days", "1"])
        .args(["-subj", "/CN=Another CA", "-keyout"])
        .arg(directory.join("other.key"))
        .arg("-out")
        .arg(&certificate)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    certificate
}

#[tokio::test]
async fn connections_are_encrypted_and_the_servers_certificate_is_verified() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    store.now().await.unwrap();
    let query = "
        select count(*) filter (where ssl), count(*) from pg_stat_ssl join pg_stat_activity using (pid)
        where application_name = 'keyferry' and usename = 'keyferry_worker' and datname = current_database()";
    let row = client.query_one(query, &[]).await.unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (1, 1));

    let directory = tempfile::tempdir().unwrap();
    let wrong = Database { ca_file: Some(other_authority(directory.path())), ..db.settings() };
    let reason = unavailable(Store::new(&db.worker_url(), &wrong).unwrap().now().await);
    assert!(reason.contains("certificate"), "{reason}");
    assert!(migrate(&db.owner_url(), &wrong).await.unwrap_err().to_string().contains("certificate"));
    // The system's authorities did not sign it either.
    let system = Database { ca_file: None, ..db.settings() };
    unavailable(Store::new(&db.worker_url(), &system).unwrap().now().await);
    let missing = Database { ca_file: Some(directory.path().join("nothing.pem")), ..db.settings() };
    let error = Store::new(&db.worker_url(), &missing).unwrap_err();
    assert!(matches!(error, StoreError::Setting { .. }) && error.to_string().contains("nothing.pem"), "{error}");
}

#[tokio::test]
async fn a_password_is_never_in_an_error() {
    let db = TestDb::create().await;
    let mut url = Url::parse(&db.worker_url()).unwrap();
    url.set_password(Some(PASSWORD)).unwrap();
    let store = Store::new(url.as_str(), &db.settings()).unwrap();
    let error = store.now().await.unwrap_err();
    for text in [error.to_string(), format!("{error:?}"), format!("{store:?}")] {
        assert!(!text.contains(PASSWORD), "{text}");
    }
    assert!(error.to_string().contains("password authentication failed"), "{error}");
    let migrating = migrate(url.as_str(), &db.settings()).await.unwrap_err();
    assert!(!format!("{migrating} {migrating:?}").contains(PASSWORD));

    for broken in [
        format!("postgres://keyferry_worker:{PASSWORD}@127.0.0.1:port/keyferry"),
        format!("postgres://keyferry_worker:{PASSWORD}@127.0.0.1/keyferry?sslmode=perhaps"),
        format!("postgres://keyferry_worker:{PASSWORD}@127.0.0.1/keyferry?{PASSWORD}=1"),
        format!("keyferry_worker:{PASSWORD}@127.0.0.1"),
    ] {
        let error = Store::new(&broken, &db.settings()).unwrap_err();
        assert!(matches!(error, StoreError::Setting { .. }));
        assert!(!format!("{error} {error:?}").contains(PASSWORD), "{error:?}");
    }
}

#[tokio::test]
async fn nobody_at_the_address_is_an_outage() {
    let db = TestDb::create().await;
    let mut url = Url::parse(&db.worker_url()).unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    url.set_port(Some(free)).unwrap();
    unavailable(Store::new(url.as_str(), &db.settings()).unwrap().now().await);
    // One that accepts and says nothing.
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    url.set_port(Some(mute.local_addr().unwrap().port())).unwrap();
    let settings = Database { connect_timeout_ms: 300, ..db.settings() };
    let from = Instant::now();
    unavailable(Store::new(url.as_str(), &settings).unwrap().now().await);
    assert!(from.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn a_pool_whose_connections_are_all_busy_says_so_in_time() {
    let db = TestDb::create().await;
    let mut blocker = db.client().await;
    let settings = Database { connections: 2, connect_timeout_ms: 2_000, ..db.settings() };
    let store = Store::new(&db.worker_url(), &settings).unwrap();
    let blocking = blocker.transaction().await.unwrap();
    blocking.batch_execute("lock table kms_key").await.unwrap();
    let busy: Vec<_> = (0..2)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move { store.resolve_keys(&[]).await })
        })
        .collect();
    until_waiting(&db.client().await, 2).await;
    let from = Instant::now();
    unavailable(store.now().await);
    assert!((Duration::from_millis(1_900)..Duration::from_secs(10)).contains(&from.elapsed()), "{:?}", from.elapsed());
    blocking.rollback().await.unwrap();
    for busy in busy {
        busy.await.unwrap().unwrap();
    }
    store.now().await.unwrap();
}

#[tokio::test]
async fn a_statement_or_a_lock_is_not_waited_for_without_end() {
    let db = TestDb::create().await;
    let mut client = db.client().await;
    let settings = Database { statement_timeout_ms: 2_000, ..db.settings() };
    let store = Store::new(&db.worker_url(), &settings).unwrap();
    {
        let locking = client.transaction().await.unwrap();
        locking.batch_execute("lock table kms_key").await.unwrap();
        let reason = unavailable(store.resolve_keys(&[]).await);
        assert!(reason.contains("lock timeout"), "{reason}");
        locking.rollback().await.unwrap();
    }
    client
        .batch_execute(
            "create function slow() returns trigger language plpgsql as
             $$ begin perform pg_sleep(30); return new; end $$;
             create trigger slow before insert on refusal for each row execute function slow()",
        )
        .await
        .unwrap();
    let from = Instant::now();
    let reason = unavailable(store.accept(&[Candidate::Refusal(refusal("r", RefusalCode::NotJson))]).await);
    assert!(reason.contains("statement timeout"), "{reason}");
    assert!(from.elapsed() < Duration::from_secs(15));
    // The connection is good for the next.
    accept(&store, &[job("a", &arn(1))]).await;
}

#[tokio::test]
async fn the_pool_recovers_when_its_connections_were_cut() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    store.now().await.unwrap();
    let cut = "
        select count(pg_terminate_backend(pid)) from pg_stat_activity
        where datname = current_database() and usename = 'keyferry_worker'";
    assert!(value::<i64>(&client, cut, &[]).await >= 1);
    let mut tries = 0;
    while let Err(error) = store.now().await {
        assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
        tries += 1;
        assert!(tries < 5);
    }
}

#[tokio::test]
async fn migrating_twice_and_at_once_is_harmless() {
    let db = TestDb::create_empty().await;
    let (url, settings) = (db.owner_url(), db.settings());
    let (one, two, three) = tokio::join!(migrate(&url, &settings), migrate(&url, &settings), migrate(&url, &settings));
    let outcomes = [one.unwrap(), two.unwrap(), three.unwrap()];
    assert_eq!(outcomes.iter().filter(|done| !done.applied.is_empty()).count(), 1);
    assert!(outcomes.iter().all(|done| done.version == outcomes[0].version));
    let again = migrate(&url, &settings).await.unwrap();
    assert!(again.applied.is_empty());
    let store = db.store().await;
    store.check_schema().await.unwrap();
    accept(&store, &[job("a", &arn(1))]).await;
}

#[tokio::test]
async fn whoever_keeps_the_lock_of_migrations_is_named() {
    let db = TestDb::create_empty().await;
    let mut url: Url = db.reader_url().parse().unwrap();
    url.query_pairs_mut().append_pair("application_name", "report");
    let reader = connect(&url).await;
    let pid: i32 = value(&reader, "select pg_backend_pid()", &[]).await;
    reader.batch_execute("select pg_advisory_lock(7738993309157319028)").await.unwrap();
    let hasty = Database { statement_timeout_ms: 50, ..db.settings() };
    let error = migrate(&db.owner_url(), &hasty).await.unwrap_err();
    assert!(matches!(error, SchemaError::Locked(_)), "{error}");
    let holder = format!("pid {pid}, role keyferry_reader, application 'report'");
    assert!(error.to_string().contains(&holder), "{error}");
    reader.batch_execute("select pg_advisory_unlock_all()").await.unwrap();
    migrate(&db.owner_url(), &db.settings()).await.unwrap();
}

#[tokio::test]
async fn a_schema_that_does_not_fit_is_named() {
    let db = TestDb::create_empty().await;
    let store = db.store().await;
    let error = store.check_schema().await.unwrap_err();
    assert!(matches!(error, SchemaError::Absent) && error.to_string().contains("keyferry migrate"), "{error}");

    let version = migrate(&db.owner_url(), &db.settings()).await.unwrap().version;
    let client = db.client().await;
    // By way of negative numbers: versions may be neighbours, and each is there once.
    let shift = async |by: i32| {
        let both = format!(
            "update refinery_schema_history set version = -version;
             update refinery_schema_history set version = -version + {by}"
        );
        client.batch_execute(&both).await.unwrap();
    };
    shift(-1).await;
    let error = store.check_schema().await.unwrap_err();
    assert!(matches!(error, SchemaError::TooOld { found, needed } if found + 1 == needed), "{error}");
    shift(1).await;

    client.execute("update schema_tolerance set oldest_binary = $1", &[&(version + 1)]).await.unwrap();
    let error = store.check_schema().await.unwrap_err();
    assert!(matches!(error, SchemaError::BinaryTooOld { ours, .. } if ours == version), "{error}");
    client.execute("update schema_tolerance set oldest_binary = $1", &[&version]).await.unwrap();
    // A newer schema that tolerates this binary is no obstacle.
    shift(5).await;
    store.check_schema().await.unwrap();

    shift(-5).await;
    client.execute("update refinery_schema_history set checksum = '1'", &[]).await.unwrap();
    let error = migrate(&db.owner_url(), &db.settings()).await.unwrap_err();
    assert!(matches!(error, SchemaError::Failed(_)), "{error}");
}

#[tokio::test]
async fn only_the_owner_migrates() {
    let db = TestDb::create_empty().await;
    let settings = Database { ca_file: Some(ca_file()), ..db.settings() };
    let error = migrate(&db.worker_url(), &settings).await.unwrap_err();
    assert!(error.to_string().contains("permission denied"), "{error}");
}
