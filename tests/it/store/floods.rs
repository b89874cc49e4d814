//! Floods of refusals: the first of a minute are told of, the rest is counted, and each is still known.

use super::given::{assert_audit_holds, contents, nobody, refusal, until_waiting, value};
use crate::support::db::{TestDb, connect};
use keyferry::job::RefusalCode;
use keyferry::store::{Candidate, KEPT, NewRefusal, Sender, Store, TOLD_A_MINUTE, Verdict, statements};
use serde_json::{Value, json};
use std::time::Duration;
use time::OffsetDateTime;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

const MINUTE: Duration = Duration::from_secs(60);
const CODE: RefusalCode = RefusalCode::NotAllowed;
/// Rows of refusals' own, folded ones, and what the folds count.
const COUNTS: &str = "
    select array[(select count(*) from refusal), (select count(*) from refusal_folded),
                 (select coalesce(sum(count), 0)::bigint from refusal_fold)]";

async fn counts(client: &Client) -> [i64; 3] {
    value::<Vec<i64>>(client, COUNTS, &[]).await.try_into().unwrap()
}

/// A database at the beginning of a minute, so that none ends on the way.
async fn early() -> TestDb {
    let db = TestDb::create().await;
    let left = "select 61 - extract(second from keyferry_now())::double precision";
    db.advance(Duration::from_secs_f64(value::<f64>(&db.client().await, left, &[]).await)).await;
    db
}

fn flood(name: &str, count: usize, code: RefusalCode) -> Vec<NewRefusal> {
    (0..count).map(|number| refusal(&format!("{name}-{number}"), code)).collect()
}

fn by(sender: &Sender, principal: &str, refusals: Vec<NewRefusal>) -> Vec<NewRefusal> {
    let named = |new| NewRefusal { principal: principal.into(), sender: sender.clone(), ..new };
    refusals.into_iter().map(named).collect()
}

fn proved(identity: &str) -> Sender {
    Sender { identity: Some(identity.into()), is_verified: true, policy: "p".into() }
}

async fn refuse(store: &Store, refusals: &[NewRefusal]) {
    let candidates: Vec<Candidate> = refusals.iter().cloned().map(Candidate::Refusal).collect();
    for slice in candidates.chunks(200) {
        assert!(store.accept(slice).await.unwrap().iter().all(|verdict| *verdict == Verdict::Refused));
    }
}

fn key(new: &NewRefusal) -> ([u8; 32], [u8; 32]) {
    let (keyferry::store::MessageDigest::Request(digest) | keyferry::store::MessageDigest::Body(digest)) = new.digest;
    (new.id_hash, digest)
}

#[tokio::test]
async fn a_flood_is_told_of_twice_over_and_each_of_its_messages_is_known() {
    let db = early().await;
    let (store, client) = (db.store().await, db.client().await);
    let sender = proved("rabbitmq:payroll");
    let all = by(&sender, "payroll", flood("f", 450, CODE));
    refuse(&store, &all).await;
    assert_eq!(counts(&client).await, [TOLD_A_MINUTE, 440, 440]);
    let told = "select array[(select count(*) from audit_entry), (select count(*) from outbox)]";
    assert_eq!(value::<Vec<i64>>(&client, told, &[]).await, [TOLD_A_MINUTE; 2]);
    // The same messages again, and with ids of their own: a worker that lost the answer, and one that was sent copies.
    let before = contents(&client).await;
    let again: Vec<NewRefusal> = all.iter().map(|new| NewRefusal { id: Uuid::now_v7(), ..new.clone() }).collect();
    refuse(&store, &again).await;
    refuse(&store, &[again.clone(), again].concat()[..700]).await;
    assert_eq!(contents(&client).await, before);
    assert_eq!(store.tell_folds().await.unwrap(), 0, "the minute lasts");

    db.advance(MINUTE).await;
    assert_eq!(store.tell_folds().await.unwrap(), 1);
    assert_eq!(store.tell_folds().await.unwrap(), 0);
    assert_eq!(value::<Vec<i64>>(&client, told, &[]).await, [TOLD_A_MINUTE + 1; 2]);
    let event = "select body::jsonb from outbox where event_id = (select id from refusal_fold)";
    let event: Value = value(&client, event, &[]).await;
    let entry = "select entry::jsonb -> 'details' from audit_entry where subject = (select id from refusal_fold)";
    let entry: Value = value(&client, entry, &[]).await;
    assert_eq!(event["data"]["folded"], entry["folded"]);
    assert_eq!((&entry["folded"]["count"], &entry["folded"]["code"]), (&json!(440), &json!("not_allowed")));
    assert_eq!((&entry["identity"], &entry["identity_verified"]), (&json!("rabbitmq:payroll"), &json!(true)));
    // A copy that comes minutes later is none of a new flood.
    refuse(&store, &all[200..300]).await;
    assert_eq!(counts(&client).await, [TOLD_A_MINUTE, 440, 440]);
    assert_audit_holds(&client).await;

    let letters: Vec<_> = all.iter().map(|new| (key(new), None)).collect();
    let rows = store.refusals_of(&letters).await.unwrap();
    for (new, row) in all.iter().zip(&rows) {
        let row = row.as_ref().unwrap();
        assert_eq!((row.principal.as_str(), row.code.as_str(), row.id), ("payroll", "not_allowed", new.id));
        assert_eq!(store.refusal(new.id).await.unwrap().as_ref(), Some(row));
    }
    assert_eq!(rows.iter().flatten().filter(|row| row.fold.is_some()).count(), 440);
    // Who sends it again asks in its sender's name.
    let folded = all.last().unwrap();
    let record = store.refusals(&[folded.id]).await.unwrap().remove(&folded.id).unwrap();
    assert_eq!((record.identity.as_deref(), record.identity_verified), (Some("rabbitmq:payroll"), true));
    assert_eq!((&record.digest[..], &record.id_hash[..]), (&key(folded).1[..], &folded.id_hash[..]));
    let found = store.find_jobs("payroll", "", &["f-449".to_owned(), folded.id.to_string()]).await.unwrap();
    assert!(found.len() == 2 && found.iter().all(|(_, view)| view.id == folded.id && view.state == "rejected"));
}

/// Whoever is about to record a refusal waits while this lock is held.
const GATE: &str = "
    create function gate() returns trigger language plpgsql
        as $$ begin perform pg_advisory_xact_lock_shared(42); return new; end $$;
    create trigger gate before insert on refusal for each row execute function gate();
    create trigger gate before insert on refusal_folded for each row execute function gate()";

/// Advisory locks can be taken, and kept, by everybody who may connect.
#[tokio::test]
async fn refusals_wait_for_no_lock_that_a_reader_could_keep() {
    let db = early().await;
    let (store, client) = (db.store().await, db.client().await);
    let reader = connect(&db.reader_url().parse().unwrap()).await;
    for lock in [
        "select from refusal_turn for key share",
        "select from refusal_meter for key share",
        "do $$ begin lock table refusal_turn in access share mode; end $$",
        "do $$ begin lock table refusal_meter in row share mode; end $$",
    ] {
        let error = reader.batch_execute(lock).await.unwrap_err();
        assert_eq!(error.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE), "{lock}");
    }
    // As if a reader kept all of them: whoever asks for one gets none.
    let kept = "
        do $$ declare lock regprocedure; begin
            for lock in select oid::regprocedure from pg_proc where proname ~ '^pg_(try_)?advisory_.*lock' loop
                execute format('revoke execute on function %s from public', lock);
            end loop;
        end $$";
    client.batch_execute(kept).await.unwrap();
    refuse(&store, &flood("f", 450, CODE)).await;
    assert_eq!(counts(&client).await, [TOLD_A_MINUTE, 440, 440]);
}

#[tokio::test]
async fn a_message_that_comes_over_two_transports_at_once_is_counted_once() {
    let db = early().await;
    let (one, other, client) = (db.store().await, db.store().await, db.client().await);
    let over = |ingress: &'static str, refusals: Vec<NewRefusal>| -> Vec<NewRefusal> {
        refusals.into_iter().map(|new| NewRefusal { ingress, ..new }).collect()
    };
    client.batch_execute(GATE).await.unwrap();
    // The one tells of its first ten and folds the rest; the other still has ten to tell, and then none.
    refuse(&one, &over("rabbitmq", flood("a", 10, CODE))).await;
    for name in ["both fold only one", "both fold"] {
        let before: i64 = counts(&client).await.iter().take(2).sum();
        client.execute("select pg_advisory_lock(42)", &[]).await.unwrap();
        let message = flood(&name.replace(' ', "-"), 1, CODE);
        let (mine, theirs) = (over("rabbitmq", message.clone()), over("sqs", message));
        let (one, other) = (one.clone(), other.clone());
        let both = tokio::spawn(async move { tokio::join!(refuse(&one, &mine), refuse(&other, &theirs)) });
        // The one at the gate, the other behind it.
        until_waiting(&client, 2).await;
        client.execute("select pg_advisory_unlock(42)", &[]).await.unwrap();
        both.await.unwrap();
        let after = counts(&client).await;
        assert_eq!(after[0] + after[1], before + 1, "{name}: {after:?}");
        assert_eq!(after[1], after[2], "{name}: each that is remembered is counted once");
        refuse(&db.store().await, &over("sqs", flood("b", 10, CODE))).await;
    }
    assert_audit_holds(&client).await;
}

#[tokio::test]
async fn a_flood_hides_nobody_elses_refusals() {
    let db = early().await;
    let (store, client) = (db.store().await, db.client().await);
    let own = async |refusals: Vec<NewRefusal>| {
        let before = counts(&client).await[0];
        refuse(&store, &refusals).await;
        counts(&client).await[0] - before
    };
    assert_eq!(own(flood("f", 300, CODE)).await, TOLD_A_MINUTE);
    assert_eq!(own(flood("g", 1, CODE)).await, 0, "it goes on");
    // Another principal's, another reason's, another transport's, and those of somebody who is known by name.
    assert_eq!(own(by(&nobody(), "payroll", flood("a", 1, CODE))).await, 1);
    assert_eq!(own(flood("b", 1, RefusalCode::NotJson)).await, 1);
    let other = flood("c", 1, CODE).into_iter().map(|new| NewRefusal { ingress: "other", ..new }).collect();
    assert_eq!(own(other).await, 1);
    assert_eq!(own(by(&proved("rabbitmq:x"), "anonymous", flood("d", 1, CODE))).await, 1);
    // What messages say of themselves is not asked: a thousand names are one flood.
    let claims = flood("e", 300, RefusalCode::IdentityMissing).into_iter().zip(0..).map(|(new, number)| {
        let sender = Sender { identity: Some(format!("rabbitmq:{number}")), ..nobody() };
        NewRefusal { sender, principal: "unidentified".into(), ..new }
    });
    assert_eq!(own(claims.collect()).await, TOLD_A_MINUTE);
    assert_eq!(value::<i64>(&client, "select count(*) from refusal_meter", &[]).await, 6);
    // The next minute begins anew.
    db.advance(MINUTE).await;
    assert_eq!(own(flood("h", 11, CODE)).await, TOLD_A_MINUTE);
    assert_eq!(counts(&client).await[1], 291 + 290 + 1);
}

/// Intakes that are given the same messages, while minutes pass and folds are told of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_message_is_counted_once_by_however_many_workers() {
    const SLICES: usize = 24;
    let db = early().await;
    let (store, client) = (db.store().await, db.client().await);
    let all = flood("f", SLICES * 20, CODE);
    let work = async |start: usize| {
        for slice in 0..SLICES {
            let at = (slice + start) % SLICES * 20;
            let copies = all[at..at + 20].iter().map(|new| NewRefusal { id: Uuid::now_v7(), ..new.clone() });
            refuse(&store, &copies.collect::<Vec<_>>()).await;
        }
    };
    let passing = async {
        for _ in 0..40 {
            db.advance(MINUTE / 4).await;
            store.tell_folds().await.unwrap();
        }
    };
    tokio::join!(work(0), work(1), work(SLICES / 2), passing);
    let [own, rows, counted] = counts(&client).await;
    assert_eq!((own + rows, counted), (i64::try_from(all.len()).unwrap(), rows));
    db.advance(MINUTE).await;
    store.tell_folds().await.unwrap();
    let told = "
        select count(*) from refusal_fold as fold join outbox on event_id = fold.id join audit_entry on subject = fold.id
        where body::jsonb #>> '{data,folded,count}' = fold.count::text
          and entry::jsonb #>> '{details,folded,count}' = fold.count::text";
    let folds: i64 = value(&client, "select count(*) from refusal_fold", &[]).await;
    assert!(folds > 0);
    assert_eq!(value::<i64>(&client, told, &[]).await, folds);
    assert_audit_holds(&client).await;
}

#[tokio::test]
async fn a_flood_takes_no_more_room_than_there_is_and_gives_it_back() {
    let db = early().await;
    let (store, client) = (db.store().await, db.client().await);
    let all = flood("f", 40, CODE);
    refuse(&store, &all[..20]).await;
    client.execute("update refusal_meter set kept = $1", &[&(KEPT - 4)]).await.unwrap();
    refuse(&store, &all[20..]).await;
    assert_eq!(counts(&client).await, [TOLD_A_MINUTE, 14, 30]);
    assert_eq!(value::<i64>(&client, "select forgotten from refusal_fold", &[]).await, 16);
    let now = store.now().await.unwrap();
    let times = |at: [i64; 4]| -> Vec<Option<OffsetDateTime>> {
        at.map(|minutes| Some(now + time::Duration::minutes(minutes))).into_iter().chain([None]).collect()
    };
    let of = async |ingress| store.may_be_forgotten(ingress, &times([-3, 0, 5, 15])).await.unwrap();
    assert_eq!(of("test").await, [false, true, true, false, false]);
    assert_eq!(of("other").await, [false; 5]);

    // After two weeks there is room again.
    client.execute("update refusal_meter set kept = 14", &[]).await.unwrap();
    assert_eq!(store.forget_folded().await.unwrap(), 0);
    db.advance(Duration::from_secs(14 * 86_400)).await;
    refuse(&store, &flood("g", 12, CODE)).await;
    db.advance(MINUTE).await;
    assert_eq!(store.tell_folds().await.unwrap(), 2);
    assert_eq!(store.forget_folded().await.unwrap(), 14);
    assert_eq!(store.forget_folded().await.unwrap(), 0);
    assert_eq!(counts(&client).await, [2 * TOLD_A_MINUTE, 2, 32]);
    assert_eq!(value::<i64>(&client, "select kept from refusal_meter", &[]).await, 2);
    assert_eq!(value::<i64>(&client, "select forgotten from refusal_fold order by id limit 1", &[]).await, 30);
    let rows = store.refusals_of(&[(key(&all[0]), None), (key(&all[39]), None)]).await.unwrap();
    assert!(rows[0].is_some() && rows[1].is_none());
}

/// As after the database's clock was put forward and back.
#[tokio::test]
async fn a_minute_that_comes_again_has_another_fold() {
    let db = early().await;
    let (store, client) = (db.store().await, db.client().await);
    refuse(&store, &flood("f", 15, CODE)).await;
    db.advance(MINUTE).await;
    assert_eq!(store.tell_folds().await.unwrap(), 1);
    client.execute("update clock_offset set ahead = ahead - interval '1 minute'", &[]).await.unwrap();
    refuse(&store, &flood("g", 3, CODE)).await;
    refuse(&store, &flood("h", 3, CODE)).await;
    db.advance(MINUTE).await;
    assert_eq!(store.tell_folds().await.unwrap(), 1);
    let folds: Vec<i64> = value(&client, "select array_agg(count order by id) from refusal_fold", &[]).await;
    assert_eq!(folds, [5, 6]);
    assert_audit_holds(&client).await;
}

/// With many folded refusals on record, and folds that were told of, each statement stays on its keys.
#[tokio::test]
async fn what_was_folded_costs_nothing_later() {
    const FILL: &str = "
        insert into refusal_folded (id, fold_id, principal, id_hash, digest, code, ingress, identity_verified, refused_at)
        select gen_random_uuid(), gen_random_uuid(), 'p', sha256(n::text::bytea), sha256(n::text::bytea), 'not_json', 't',
               false, keyferry_now()
        from generate_series(1, 60000) as n;
        insert into refusal (id, principal, id_hash, digest, code, message, ingress, refused_at)
        select gen_random_uuid(), 'p', sha256(n::text::bytea), sha256(n::text::bytea), 'not_json', 'm', 't', keyferry_now()
        from generate_series(60001, 90000) as n;
        insert into refusal_fold (id, principal, ingress, code, policy, minute, first_at, last_at, count, forgotten, told_at)
        select gen_random_uuid(), 'p', 't', 'not_json', 'p', keyferry_now() - n * interval '1 min', keyferry_now(),
               keyferry_now(), 1, 0, keyferry_now() from generate_series(1, 20000) as n;
        insert into refusal_meter (principal, identity, ingress, code, minute, seen, kept)
        select 'p' || n, '', 't', 'not_json', keyferry_now(), 1, 1 from generate_series(1, 5000) as n;
        insert into lane_backlog (account, region, waiting) select n, 'r', 1 from generate_series(1, 5000) as n;
        insert into backlog_change (principal, account, region, change)
        select 'p', case when n = 20000 then '7' else '8' end, 'r', 1 from generate_series(1, 20000) as n;
        insert into line (id, lane_id) select n, 1 from generate_series(1, 20000) as n;
        insert into kms_key (id, arn, line_id, created_at) select gen_random_uuid(), n, n, keyferry_now()
        from generate_series(1, 20000) as n;";
    // Some two and a half times what was measured.
    let db = TestDb::create().await;
    let (early, admin) = (db.client().await, db.client().await);
    let asked = "select array_agg(sha256((n * 900)::text::bytea))::text from generate_series(1, 100) as n";
    let asked = format!("'{}'", value::<String>(&admin, asked, &[]).await);
    let bounds = [
        ("turns", statements::TURNS, "'{7,8,9}'".to_owned(), 3, 30),
        ("meters", statements::METERS, "'{p7,p8}', '{\"\",\"\"}', '{t,t}', '{not_json,not_json}'".to_owned(), 2, 60),
        (
            "known",
            statements::KNOWN_REFUSALS,
            format!(
                "array_fill('p'::text, array[100]), {asked}, {asked}, array_fill('not_json'::text, array[100]),
                 array_fill(null::text, array[100]), array_fill(false, array[100])"
            ),
            100,
            2_000,
        ),
        (
            "refusals_of",
            statements::REFUSALS_OF,
            format!("{asked}, {asked}, array_fill(null::text, array[100]), '{{}}'"),
            100,
            2_500,
        ),
        ("due_folds", statements::DUE_FOLDS, "1000".into(), 0, 10),
        ("lanes_waiting", statements::LANES_WAITING, "'{7}', '{r}'".into(), 1, 20),
        ("lines_waiting", statements::LINES_WAITING, "'{7,8,9,10}'".into(), 4, 60),
    ];
    let options = statements::session_options(&keyferry::config::Database::default()).replace("-c ", "");
    for option in options.split(' ').filter(|option| option.starts_with("enable_") || option.starts_with("jit")) {
        early.batch_execute(&format!("set {}", option.replace('=', " = "))).await.unwrap();
    }
    early.batch_execute("set plan_cache_mode = force_generic_plan").await.unwrap();
    for (name, statement, parameters, ..) in &bounds {
        early.batch_execute(&format!("prepare {name} as {statement}; execute {name} ({parameters})")).await.unwrap();
    }
    admin.batch_execute(FILL).await.unwrap();
    for is_analysed in [false, true] {
        if is_analysed {
            admin.batch_execute("analyze").await.unwrap();
        }
        for (name, _, parameters, rows, most) in &bounds {
            let explain = format!("explain (analyze, buffers, timing off, format json) execute {name} ({parameters})");
            let plan = value::<Value>(&early, &explain, &[]).await[0]["Plan"].take();
            let buffers = plan["Shared Hit Blocks"].as_u64().unwrap() + plan["Shared Read Blocks"].as_u64().unwrap();
            println!("{name}: {buffers} buffers");
            assert_eq!(plan["Actual Rows"], json!(rows), "{name}: {plan:#}");
            assert!(buffers <= *most, "{name} touches {buffers} buffers: {plan:#}");
        }
    }
}
