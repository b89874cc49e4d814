//! What is told of the database before a worker relies on it.

use super::given::{accept, arn, job, value};
use crate::support::db::TestDb;
use keyferry::config::Database;
use keyferry::store::{Look, ReachError, RightsFound};
use std::collections::BTreeSet;

async fn look(url: &str, settings: &Database) -> Look {
    Look::open(url, settings).await.unwrap()
}

/// Of a machine that has other things to do.
fn patient(db: &TestDb) -> Database {
    Database { connect_timeout_ms: 30_000, ..db.settings() }
}

async fn unreached(url: &str, settings: &Database) -> ReachError {
    Look::open(url, settings).await.err().expect("it was reached")
}

/// The migrations are read for what they grant; Postgres knows what they granted.
#[tokio::test]
async fn a_worker_has_what_the_migrations_grant_and_no_more() {
    let db = TestDb::create().await;
    let found = look(&db.worker_url(), &patient(&db)).await.rights().await.unwrap();
    assert_eq!(found, RightsFound::default());
    // Not for lack of looking: each right that is taken away is missed, and each other one is too much.
    let admin = db.client().await;
    let granted = "
        select distinct lower(privilege_type) || ' on ' || table_name from information_schema.role_table_grants
        where grantee = 'keyferry_worker' and table_schema = 'public' order by 1";
    let granted: BTreeSet<String> = admin.query(granted, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    assert!(granted.len() > 40, "{granted:?}");
    admin.batch_execute("revoke all on all tables in schema public from keyferry_worker").await.unwrap();
    let found = look(&db.worker_url(), &patient(&db)).await.rights().await.unwrap();
    let missing: BTreeSet<String> = found.missing.iter().filter(|right| !right.contains('(')).cloned().collect();
    assert_eq!(missing, granted);
    assert!(found.missing.iter().any(|right| right.starts_with("update (seq, state")), "{found:?}");
    admin.batch_execute("grant all on all tables in schema public to keyferry_worker").await.unwrap();
    let found = look(&db.worker_url(), &patient(&db)).await.rights().await.unwrap();
    assert_eq!(found.missing, [""; 0]);
    assert!(found.beyond.contains(&"delete on audit_entry".into()), "{found:?}");
    assert!(!found.beyond.contains(&"delete on outbox".into()), "{found:?}");
}

#[tokio::test]
async fn a_role_with_powers_is_told() {
    let db = TestDb::create().await;
    let found = look(&db.owner_url(), &patient(&db)).await.rights().await.unwrap();
    assert_eq!(found.missing, [""; 0]);
    for power in ["it owns tables", "it can make tables", "truncate on audit_entry"] {
        assert!(found.beyond.contains(&power.into()), "{power}: {found:?}");
    }
    let reader = look(&db.reader_url(), &patient(&db)).await.rights().await.unwrap();
    assert!(reader.missing.contains(&"insert on audit_entry".into()), "{reader:?}");
}

#[tokio::test]
async fn what_keeps_from_connecting_is_told_apart() {
    let db = TestDb::create().await;
    let settings = patient(&db);
    let url = db.worker_url();
    let other = |change: &dyn Fn(&mut url::Url)| {
        let mut url: url::Url = url.parse().unwrap();
        change(&mut url);
        url.to_string()
    };
    let error = unreached(&other(&|url| url.set_password(Some("wr0ng")).unwrap()), &settings).await;
    assert!(matches!(error, ReachError::Password(_)), "{error:?}");
    assert!(!format!("{error:?} {error}").contains("wr0ng"));
    let error = unreached(&other(&|url| url.set_username("nobody").unwrap()), &settings).await;
    assert!(matches!(error, ReachError::Password(_)), "{error:?}");
    let error = unreached(&other(&|url| url.set_path("no_such_database")), &settings).await;
    assert!(matches!(error, ReachError::NoDatabase(_)), "{error:?}");
    let error = unreached(&other(&|url| url.set_port(Some(1)).unwrap()), &settings).await;
    assert!(matches!(error, ReachError::Away(_)), "{error:?}");
    // A server that takes the connection and says nothing.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let hasty = Database { connect_timeout_ms: 1_000, ..settings.clone() };
    let error = unreached(&other(&|url| url.set_port(Some(port)).unwrap()), &hasty).await;
    assert!(matches!(error, ReachError::Away(_)), "{error:?}");
    let system = Database { ca_file: None, ..settings.clone() };
    let error = unreached(&url, &system).await;
    assert!(matches!(error, ReachError::Tls(_)), "{error:?}");
    assert!(matches!(unreached("postgres://h:x", &settings).await, ReachError::Settings(_)));
    let admin = db.client().await;
    let name: String = value(&admin, "select current_database()::text", &[]).await;
    admin.batch_execute(&format!("revoke connect on database {name} from keyferry_worker")).await.unwrap();
    let error = unreached(&url, &settings).await;
    assert!(matches!(error, ReachError::NotLetIn(_)), "{error:?}");
}

#[tokio::test]
async fn the_keys_of_the_last_jobs_come_latest_first() {
    let db = TestDb::create().await;
    let store = db.store().await;
    let look = look(&db.worker_url(), &patient(&db)).await;
    assert_eq!(look.last_keys().await.unwrap(), [""; 0]);
    assert!(look.fingerprint_key().await.unwrap().is_none());
    for n in [1, 2] {
        accept(&store, &[job(&format!("j{n}"), &arn(n))]).await;
    }
    assert_eq!(look.last_keys().await.unwrap(), [arn(2).to_string(), arn(1).to_string()]);
    // It has looked, and left nothing.
    assert!(look.fingerprint_key().await.unwrap().is_none());
}

#[tokio::test]
async fn the_server_and_its_clock_are_read() {
    let db = TestDb::create().await;
    let look = look(&db.worker_url(), &patient(&db)).await;
    let server = look.server().await.unwrap();
    assert_eq!(server.role, "keyferry_worker");
    assert!(server.version >= 150_000 && !server.is_read_only);
    assert!(server.tls.is_some_and(|tls| tls.starts_with("TLS")));
    assert!(look.clock_offset().await.unwrap().abs() < 0.001);
    db.advance(std::time::Duration::from_secs(90)).await;
    assert!((look.clock_offset().await.unwrap() - 90.0).abs() < 0.001);
    let admin = db.client().await;
    let name: String = value(&admin, "select current_database()::text", &[]).await;
    admin.batch_execute(&format!("alter database {name} set default_transaction_read_only = on")).await.unwrap();
    assert!(super::look::look(&db.worker_url(), &patient(&db)).await.server().await.unwrap().is_read_only);
}
