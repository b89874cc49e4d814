//! What the hot statements cost with a million finished jobs, a hundred thousand on one key and two thousand idle
//! lanes: a bounded number of buffers, whenever the plan was made and whatever the statistics say.
//!
//! One test, because the database takes seconds to fill.

use super::given::value;
use crate::support::db::{TestDb, connect};
use keyferry::config::Database;
use keyferry::store::statements;
use serde_json::Value;
use std::fmt::Write as _;
use tokio_postgres::Client;
use url::Url;

/// Lines in one claim and in one settlement.
const SLICE: i64 = 64;

/// Statements by name, with the buffers that a slice may touch: some two and a half times the most that was measured
/// over all variants, which was 939, 924, 353, 1,144 and 813; of the last three 194, 679 and 100.
///
/// To update a line takes some ten: its primary key, its page, the page of its new version, and twice the way into the
/// index of due lines. The two thousand idle lanes take 60 together, in one look at the lanes' table.
const BOUNDS: [(&str, &str, u64); 11] = [
    ("claim", statements::CLAIM, 2_200),
    // Nothing is urgent: the index of urgent jobs is looked into, and no line is touched. A session's first sort reads
    // five blocks of the catalogue.
    ("overtake", statements::OVERTAKE, 8),
    ("read", statements::READ, 2_300),
    ("lock", statements::LOCK, 900),
    ("end_jobs", statements::END_JOBS, 2_800),
    ("release", statements::RELEASE, 2_000),
    // Beside the lanes' table a look at each lane with work; pages of two thousand events; pages of five thousand
    // entries of an index.
    ("work", statements::WORK, 500),
    ("outbox", statements::OUTBOX, 1_700),
    ("expiry", statements::EXPIRY, 250),
    ("expired_lately", statements::EXPIRED_LATELY, 250),
    ("few_rotations", statements::FEW_ROTATIONS, 250),
];

#[tokio::test]
async fn hot_statements_touch_a_bounded_number_of_buffers() {
    let db = TestDb::create().await;
    let admin = db.client().await;
    // The plans must hold without any statistics, and nothing may take them away under the test.
    let tables = "outbox urgent lane order_key line kms_key source_key job progress kms_material";
    for table in tables.split(' ') {
        admin.batch_execute(&format!("alter table {table} set (autovacuum_enabled = false)")).await.unwrap();
    }
    // Only to fill it faster: neither changes how many buffers a statement touches.
    admin.batch_execute("alter table job set unlogged; alter table job set (fillfactor = 100)").await.unwrap();

    let early = session(&db).await;
    early.batch_execute("set plan_cache_mode = force_generic_plan").await.unwrap();
    prepare(&early).await;
    run(&early, "a plan made while the tables were empty", false).await;
    fill(&admin).await;

    let mut seen = run(&early, "a plan made while the tables were empty", true).await;
    let generic = "select min(generic_plans), max(custom_plans) from pg_prepared_statements where from_sql
                   and name in ('claim', 'overtake', 'read', 'lock', 'end_jobs', 'release')";
    let row = early.query_one(generic, &[]).await.unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (2, 0), "not the plan that was made first");

    let fresh = session(&db).await;
    prepare(&fresh).await;
    seen += &run(&fresh, "never analysed", true).await;
    admin.batch_execute("analyze").await.unwrap();
    seen += &run(&fresh, "analysed", true).await;
    seen += &under_a_quota(&fresh).await;
    seen += &under_a_snapshot(&db, &fresh).await;
    println!("{seen}");
}

/// Ten thousand lines are due in a lane of one call a second: while it is closed a claim looks past them, and when it opens
/// it reads the one that it takes.
async fn under_a_quota(session: &Client) -> String {
    const MANY: &str = "
        insert into line (id, lane_id, tail_seq, due_at)
        select 100000 + n, (select min(id) from lane), 1, keyferry_now() - n * interval '1 ms'
        from generate_series(1, 10000) as n;
        update lane set interval_ms = 1000, served_at = keyferry_now() where id = (select min(id) from lane)";
    const CLOSE: &str =
        "update lane set open_at = keyferry_now() + interval '1 h' where id = (select min(id) from lane)";
    session.batch_execute(&format!("begin; {MANY}")).await.unwrap();
    let open = explain(session, "claim").await;
    session.batch_execute(CLOSE).await.unwrap();
    let closed = explain(session, "claim").await;
    session.batch_execute("rollback").await.unwrap();
    let (open, closed) = (buffers(&open), buffers(&closed));
    assert!(open <= 400 && closed <= 200, "{open} buffers for one slot, {closed} while the lane is closed");
    format!("ten thousand lines due under a quota: {open} buffers for one slot, {closed} while the lane is closed\n")
}

/// A backup holds a snapshot open: nothing that was claimed or settled since can be cleaned away, and each of these left
/// an entry in the index of due lines, twenty thousand in all. Claims look for work above them.
async fn under_a_snapshot(db: &TestDb, session: &Client) -> String {
    const WORK: &str = "
        do $$ begin
            for turn in 1..50 loop
                update line set due_at = keyferry_now() + (turn - 70) * interval '1 s' where due_at is not null;
                update line set due_at = keyferry_now() + (turn - 100) * interval '1 s' where due_at is not null;
            end loop;
        end $$;
        update lane set served_at = keyferry_now(),
                        scan_from = (select min(due_at) from line where lane_id = lane.id and due_at is not null)
        where id = (select min(id) from lane)";
    let (backup, admin) = (db.client().await, db.client().await);
    backup.batch_execute("begin isolation level repeatable read; select count(*) from lane").await.unwrap();
    admin.batch_execute(WORK).await.unwrap();
    session.batch_execute("begin").await.unwrap();
    let plan = explain(session, "claim").await;
    session.batch_execute("rollback").await.unwrap();
    backup.batch_execute("rollback").await.unwrap();
    // The lines' own versions are met again by their primary key; what is bounded is how lines are found.
    let picked = nodes(&plan).into_iter().find(|node| node["Subplan Name"] == "CTE picked").map(buffers).unwrap();
    assert!(picked <= 400, "{picked} buffers to find lines over dead entries\n{plan:#}");
    format!("with a snapshot held open: {picked} buffers to find the lines of a claim\n")
}

/// The worker's role with the options of the store's own sessions.
async fn session(db: &TestDb) -> Client {
    let mut url = Url::parse(&db.worker_url()).unwrap();
    let options = statements::session_options(&Database::default()).replace(' ', "%20").replace('=', "%3D");
    url.set_query(Some(&format!("sslmode=require&options={options}")));
    let client = connect(&url).await;
    assert_eq!(value::<String>(&client, "select current_setting('enable_seqscan')", &[]).await, "off");
    client
}

async fn prepare(session: &Client) {
    for (name, statement, _) in BOUNDS {
        session.batch_execute(&format!("prepare {name} as {statement}")).await.unwrap();
    }
}

/// Runs the statements of one claim and one settlement, then takes them back.
async fn run(session: &Client, variant: &str, is_full: bool) -> String {
    let mut seen = String::new();
    session.batch_execute("begin").await.unwrap();
    for (name, _, most) in BOUNDS {
        let plan = explain(session, name).await;
        if is_full {
            let buffers = buffers(&plan);
            writeln!(seen, "{variant}: {name}: {buffers} buffers").unwrap();
            assert!(buffers <= most, "{variant}: {name} touches {buffers} buffers\n{plan:#}");
            let scanned = scanned(&plan);
            assert!(scanned.is_empty(), "{variant}: {name} scans {scanned:?}\n{plan:#}");
        }
    }
    if is_full {
        let claimed: i64 =
            value(session, "select count(*) from job where state = 'succeeded' and attempts = 7", &[]).await;
        assert_eq!(claimed, SLICE, "the statements did what they do");
    }
    session.batch_execute("rollback").await.unwrap();
    seen
}

async fn explain(session: &Client, name: &str) -> Value {
    let parameters = parameters(session, name).await;
    let explain = format!("explain (analyze, buffers, timing off, format json) execute {name} ({parameters})");
    value::<Value>(session, &explain, &[]).await[0]["Plan"].take()
}

/// As the store would pass them, for the lines that this transaction has claimed.
async fn parameters(session: &Client, name: &str) -> String {
    let of_claimed = async |column: &str| -> String {
        let query = format!(
            "select coalesce(array_agg({column} order by line.id), '{{}}')::text
             from line left join job on job.line_id = line.id and job.seq = line.head_seq where token is not null"
        );
        format!("'{}'", value::<String>(session, &query, &[]).await)
    };
    match name {
        "claim" => format!("{SLICE}, 30000, false, 250"),
        "overtake" | "read" => of_claimed("line.id").await,
        "lock" => {
            let (lines, tokens) = (of_claimed("line.id").await, of_claimed("token").await);
            format!("{lines}, {tokens}")
        }
        "end_jobs" => {
            let (ids, states) = (of_claimed("job.id").await, of_claimed("'succeeded'::text").await);
            let (times, results) = (of_claimed("keyferry_now()").await, of_claimed("'{\"id\": 1}'::jsonb").await);
            let (errors, sources) = (of_claimed("null::jsonb").await, of_claimed("null::uuid").await);
            format!("{ids}, {states}, {times}, {results}, {errors}, {sources}, {}", of_claimed("7").await)
        }
        "work" => "'00000000-0000-0000-0000-000000000000'".to_owned(),
        "outbox" => format!("0, {}", statements::MOST_EVENTS),
        "expiry" => format!("90, {}", statements::MOST_EXPIRING),
        "expired_lately" | "few_rotations" => statements::MOST_EXPIRING.to_string(),
        // Every other line is tried again.
        _ => {
            let (lines, ended) = (of_claimed("line.id").await, of_claimed("line.id % 2 = 0").await);
            let (counted, due) = (of_claimed("true").await, of_claimed("keyferry_now() + interval '1 min'").await);
            let (deadlines, late) =
                (of_claimed("keyferry_now() + interval '1 day'").await, of_claimed("null::text").await);
            let operations = of_claimed("case when line.id % 2 = 1 then 'ImportKeyMaterial' end").await;
            let (regions, first) = (of_claimed("'eu-central-1'::text").await, of_claimed("line.id % 4 = 1").await);
            format!(
                "{lines}, {ended}, {counted}, {due}, {deadlines}, {operations}, {late}, keyferry_now(), 600000, 1000, \
                 {regions}, {first}"
            )
        }
    }
}

/// Shared buffers of a plan. A modifying part that nothing reads runs after the rest and is not in its sum.
fn buffers(plan: &Value) -> u64 {
    let own = |plan: &Value| {
        ["Shared Hit Blocks", "Shared Read Blocks"].iter().filter_map(|key| plan[key].as_u64()).sum::<u64>()
    };
    let apart = nodes(plan)
        .into_iter()
        .filter(|node| ["CTE served", "CTE reserved"].iter().any(|name| node["Subplan Name"] == *name))
        .map(own)
        .sum::<u64>();
    own(plan) + apart
}

/// Tables that the plan reads from end to end.
fn scanned(plan: &Value) -> Vec<String> {
    let scans = nodes(plan).into_iter().filter(|node| node["Node Type"].as_str().unwrap_or("").contains("Seq Scan"));
    scans.filter_map(|node| Some(node["Relation Name"].as_str()?.to_owned())).collect()
}

fn nodes(plan: &Value) -> Vec<&Value> {
    let below = plan["Plans"].as_array().into_iter().flatten().flat_map(nodes);
    std::iter::once(plan).chain(below).collect()
}

/// Lines 1 to 10,000 with a hundred finished jobs each, every fiftieth of them with one that waits; line 10,001 with a
/// hundred thousand that wait; and two thousand lanes whose only line is empty.
async fn fill(admin: &Client) {
    const FILL: &str = "
        insert into lane (account, region, operation)
        select '111122223333', 'eu-central-1', operation
        from unnest(array['GetParametersForImport', 'ImportKeyMaterial']) as operation;
        insert into lane (account, region, operation)
        select lpad(n::text, 12, '0'), 'eu-west-1', 'GetParametersForImport' from generate_series(1, 2000) as n;

        create function pg_temp.id(family int, n int) returns uuid language sql immutable as
        $$ select (lpad(family::text, 8, '0') || '-0000-4000-8000-' || lpad(to_hex(n), 12, '0'))::uuid $$;

        insert into line (id, lane_id, head_seq, tail_seq, due_at)
        select n, (select min(id) from lane), 101, case when n % 50 = 0 then 101 else 100 end,
               case when n % 50 = 0 then keyferry_now() - n * interval '1 ms' end
        from generate_series(1, 10000) as n;
        insert into line (id, lane_id, head_seq, tail_seq, due_at)
        values (10001, (select min(id) from lane), 1, 100000, keyferry_now() - interval '1 h');
        insert into line (id, lane_id) select 10001 + row_number() over (), id from lane where region = 'eu-west-1';

        insert into kms_key (id, arn, line_id, created_at)
        select pg_temp.id(1, n), 'arn:aws:kms:eu-central-1:111122223333:key/' || pg_temp.id(1, n), n,
               keyferry_now()
        from generate_series(1, 10001) as n;
        insert into source_key (id, name, kind, origin, sealed_material, sealed_data_key, kek_id, fingerprint,
                                fingerprint_version, created_at)
        select pg_temp.id(2, n), 'key-' || n, 'SYMMETRIC_DEFAULT', 'generated', 'x', 'x', 'k', 'f', 1, keyferry_now()
        from generate_series(1, 10001) as n;
        insert into kms_material (kms_key_id, fingerprint, fingerprint_version, source_tier, source_key_id,
                                  source_key_name, imported_at, job_id)
        select pg_temp.id(1, n), 'f', 1, 'local', pg_temp.id(2, n)::text, 'key-' || n, keyferry_now(), pg_temp.id(3, n)
        from generate_series(1, 10000) as n;

        insert into job (id, line_id, seq, lane_id, kms_key_id, principal, request_source, request_id, request, state,
                         accepted_at, deadline, finished_at)
        select pg_temp.id(3, n), 1 + n / 100, 1 + n % 100, 1, '00000001-0000-4000-8000-000000000001', 'p', '', '1', '{}',
               'succeeded', '2026-01-01', '2026-01-04', '2026-01-01'
        from generate_series(0, 999999) as n;
        insert into job (id, line_id, seq, lane_id, kms_key_id, principal, request_source, request_id, request,
                         accepted_at, deadline)
        select pg_temp.id(4, n), n, 101, 1, pg_temp.id(1, n), 'p', '', '1',
               '{\"source_key_identifier\":\"key-' || n || '\"}', '2026-01-01', '2026-01-04'
        from generate_series(50, 10000, 50) as n;
        insert into job (id, line_id, seq, lane_id, kms_key_id, principal, request_source, request_id, request,
                         accepted_at, deadline)
        select pg_temp.id(5, n), 10001, n, 1, pg_temp.id(1, 10001), 'p', '', '1', '{}', '2026-01-01', '2026-01-04'
        from generate_series(1, 100000) as n;
        insert into progress (job_id, source_key_id, audit_n, import_token)
        select pg_temp.id(4, n), pg_temp.id(2, n), 4, convert_to(repeat('x', 1500), 'UTF8')
        from generate_series(100, 10000, 100) as n;

        insert into outbox (event_id, routing_key, body, due_at)
        select pg_temp.id(3, n), 'job', repeat('x', 1500), keyferry_now() from generate_series(1, 50000) as n;
        insert into kms_material (kms_key_id, fingerprint, fingerprint_version, source_tier, source_key_id,
                                  source_key_name, imported_at, job_id, valid_to)
        select pg_temp.id(7, n), 'f', 1, 'local', 'x', 'x', keyferry_now(), pg_temp.id(3, n),
               keyferry_now() + n * interval '1 min'
        from generate_series(1, 100000) as n;";
    admin.batch_execute(FILL).await.unwrap();
}
