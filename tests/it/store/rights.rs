//! What the database itself forbids, whoever holds a role's password.

use super::given::{REGION, accept, add_source_key, arn, assert_audit_holds, claim_one, generating_step, job, refusal};
use super::given::{sealed, settle, succeeded, value};
use crate::support::db::{TestDb, connect};
use keyferry::job::RefusalCode;
use keyferry::store::Candidate;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

async fn as_role(url: &str) -> Client {
    connect(&url.parse().unwrap()).await
}

/// The SQLSTATE with which a statement is turned away.
async fn refused(client: &Client, statement: &str) -> SqlState {
    match client.batch_execute(statement).await {
        Ok(()) => panic!("not refused: {statement}"),
        Err(error) => error.as_db_error().unwrap_or_else(|| panic!("{error}")).code().clone(),
    }
}

/// A database with a row in every table that matters here.
async fn lived_in() -> TestDb {
    let db = TestDb::create().await;
    let store = db.store().await;
    accept(&store, &[job("a", &arn(1)), job("b", &arn(1))]).await;
    store.accept(&[Candidate::Refusal(refusal("r", RefusalCode::NotJson))]).await.unwrap();
    assert!(add_source_key(&store, &sealed("k")).await);
    let job = claim_one(&store).await;
    let (step, _) = generating_step(&job);
    store.prepare(&[&step]).await.unwrap();
    assert!(settle(&store, &succeeded(&job)).await);
    assert!(claim_one(&store).await.key.region() == REGION);
    db
}

#[tokio::test]
async fn the_audit_trail_is_append_only_for_everybody() {
    let db = lived_in().await;
    let superuser = db.client().await;
    let before: i64 = value(&superuser, "select count(*) from audit_entry", &[]).await;
    assert!(before >= 5);
    let ours = SqlState::from_code("KF001");
    let changes = [
        "update audit_entry set entry = entry",
        "update audit_entry set n = n + 100",
        "delete from audit_entry",
        "truncate audit_entry",
    ];
    let (owner, worker) = (as_role(&db.owner_url()).await, as_role(&db.worker_url()).await);
    for change in changes {
        assert_eq!(refused(&superuser, change).await, ours, "{change}");
        assert_eq!(refused(&owner, change).await, ours, "{change}");
        assert_eq!(refused(&worker, change).await, SqlState::INSUFFICIENT_PRIVILEGE, "{change}");
    }
    assert_eq!(value::<i64>(&superuser, "select count(*) from audit_entry", &[]).await, before);
    assert_audit_holds(&superuser).await;
}

#[tokio::test]
async fn an_audit_entry_has_one_number_and_looks_like_one() {
    let db = lived_in().await;
    let worker = as_role(&db.worker_url()).await;
    let copy = "insert into audit_entry (subject, n, entry) select subject, n, entry from audit_entry";
    assert_eq!(refused(&worker, copy).await, SqlState::UNIQUE_VIOLATION);
    let zero = "insert into audit_entry (subject, n, entry) values (gen_random_uuid(), 0, '{\"at\":\"x\"}')";
    assert_eq!(refused(&worker, zero).await, SqlState::CHECK_VIOLATION);
    let text = "insert into audit_entry (subject, n, entry) values (gen_random_uuid(), 1, 'nothing')";
    assert_eq!(refused(&worker, text).await, SqlState::CHECK_VIOLATION);
}

#[tokio::test]
async fn the_worker_changes_no_history_and_no_schema() {
    let db = lived_in().await;
    let worker = as_role(&db.worker_url()).await;
    for statement in [
        "update request set job_id = gen_random_uuid()",
        "delete from request",
        "update refusal set code = 'x'",
        "delete from refusal",
        "update refusal set identity = 'rabbitmq:x', identity_verified = true",
        "update job set identity = 'rabbitmq:x'",
        "update policy_load set digest = 'x'",
        "delete from policy_load",
        "delete from hold",
        "update hold set reason = 'x'",
        "update hold set scope = 'everything', value = ''",
        "update hold set held_by = 'x'",
        "delete from backlog",
        "delete from lane_backlog",
        "delete from refusal_meter",
        "delete from refusal_fold",
        "update refusal_fold set principal = 'x'",
        "update refusal_folded set principal = 'x'",
        "truncate backlog_change",
        "truncate urgent",
        "update cancellation set requested_at = now()",
        "update failed_choice set source_key_id = gen_random_uuid()",
        "delete from failed_choice",
        "update job set retry_of = gen_random_uuid()",
        "delete from job",
        "update job set request = '{}'",
        "update job set principal = 'x'",
        "update job set line_id = 1",
        "update job set deadline = now()",
        "delete from line",
        "delete from kms_key",
        "update kms_key set arn = 'x'",
        "delete from source_key",
        "update source_key set name = 'x'",
        "update source_key set fingerprint = 'x'",
        "delete from kms_material",
        "update fingerprint_key set sealed_key = 'x'",
        "delete from fingerprint_key",
        "update clock_offset set ahead = '1 day'",
        "insert into clock_offset values (true, '1 day')",
        "update schema_tolerance set oldest_binary = 0",
        "update refinery_schema_history set version = 0",
        "create table x ()",
        "create temporary table x ()",
        "create temporary table clock_offset as select true as only_row, interval '1 day' as ahead",
        "create view x as select 1",
        "create function x() returns int language sql as 'select 1'",
        "create schema x",
        "alter table job add column x int",
        "alter table audit_entry disable trigger all",
        "drop trigger audit_no_change on audit_entry",
        "drop table job",
        "create index on job (principal)",
        "set session_replication_role = replica",
        "select * from pg_authid",
    ] {
        assert_eq!(refused(&worker, statement).await, SqlState::INSUFFICIENT_PRIVILEGE, "{statement}");
    }
}

#[tokio::test]
async fn the_reader_reads_everything_but_secrets_and_writes_nothing() {
    let db = lived_in().await;
    let reader = as_role(&db.reader_url()).await;
    for statement in [
        "select sealed_material from source_key",
        "select sealed_data_key from source_key",
        "select fingerprint from source_key",
        "select * from source_key",
        "select count(*) from source_key where sealed_material is not null",
        "select fingerprint from kms_material",
        "select fingerprint_version from kms_material",
        "select dsm_fingerprint from failed_choice",
        "select * from failed_choice",
        "select import_token from progress",
        "select public_key from progress",
        "select * from fingerprint_key",
        "insert into audit_entry (subject, n, entry) values (gen_random_uuid(), 1, '{}')",
        "update job set state = 'failed'",
        "update clock_offset set ahead = '1 day'",
        "update line set token = null",
        "delete from outbox",
        "insert into hold (id, scope, value, held_by, held_at) values (gen_random_uuid(), 'everything', '', 'x', now())",
        "update hold set released_by = 'x', released_at = now()",
        "delete from urgent",
        "insert into urgent (line_id, seq) values (1, 1)",
        "insert into cancellation (job_id, requested_at) select id, now() from job",
        "update backlog set waiting = 0",
        "insert into backlog_change (principal, change) values ('x', 1)",
        "delete from backlog_change",
        "delete from refusal_folded",
        "update refusal_meter set seen = 0",
        "insert into policy_load values ('x', now())",
        "select from line for update",
        "select turn from refusal_turn",
        "create temporary table x ()",
        "create table x ()",
    ] {
        assert_eq!(refused(&reader, statement).await, SqlState::INSUFFICIENT_PRIVILEGE, "{statement}");
    }
    for statement in [
        "select * from job",
        "select * from line",
        "select * from lane",
        "select * from request",
        "select * from refusal",
        "select * from policy_load",
        "select * from hold",
        "select * from urgent",
        "select * from cancellation",
        "select job_id, source_key_id, dsm_key_id, delete_ids from failed_choice",
        "select * from backlog",
        "select * from backlog_change",
        "select * from lane_backlog",
        "select * from refused",
        "select * from refusal_meter",
        "select * from refusal_fold",
        "select * from refusal_folded",
        "select * from outbox",
        "select * from audit_entry",
        "select * from kms_key",
        "select id, name, kind, deleted_at from source_key",
        "select kms_key_id, source_key_name, valid_to from kms_material",
        "select job_id, effect, in_doubt, last_error from progress",
        "select keyferry_now()",
        "select oldest_binary from schema_tolerance",
    ] {
        reader.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
}

/// Those who may make temporary tables still cannot put one in the clock's place.
#[tokio::test]
async fn a_temporary_table_does_not_move_the_clock() {
    let db = TestDb::create().await;
    for client in [db.client().await, as_role(&db.owner_url()).await] {
        client
            .batch_execute(
                "create temporary table clock_offset as select true as only_row, interval '100 days' as ahead",
            )
            .await
            .unwrap();
        let moved: bool = value(&client, "select keyferry_now() > statement_timestamp() + interval '1 day'", &[]).await;
        assert!(!moved);
    }
}

/// Rights on the database belong to it, not to the schema: the migration takes care of its own part.
#[tokio::test]
async fn migrating_takes_temporary_tables_away() {
    let db = TestDb::create_empty().await;
    let client = db.client().await;
    let name: String = value(&client, "select current_database()::text", &[]).await;
    client.batch_execute(&format!("grant temporary on database {name} to public")).await.unwrap();
    keyferry::store::migrate(&db.owner_url(), &db.settings()).await.unwrap();
    let worker = as_role(&db.worker_url()).await;
    assert_eq!(refused(&worker, "create temporary table x ()").await, SqlState::INSUFFICIENT_PRIVILEGE);
}
