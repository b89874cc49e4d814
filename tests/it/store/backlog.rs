//! The count of waiting jobs is exact, however jobs end and whoever folds.

use super::given::{
    LEASE, REGION, SIGNATURE_LIFE, accept, arn, claim, job, job_with, put_back, retry, settle, succeeded, value,
};
use crate::support::db::TestDb;
use keyferry::store::{Cancelled, Candidate, FOLD_PAGE, NewJob, RetryState, Store, statements};
use serde_json::json;
use std::collections::HashMap;
use std::time::Duration;
use time::format_description::well_known::Rfc3339;

/// Of all keys here.
const ACCOUNT: &str = "111122223333";

async fn waiting(store: &Store, principal: &str) -> i64 {
    store.waiting(&[principal, "nobody"]).await.unwrap().get(principal).copied().unwrap_or(0)
}

async fn lanes(store: &Store) -> HashMap<(String, String), i64> {
    store.lanes_waiting(&[(ACCOUNT, REGION), (ACCOUNT, "elsewhere")]).await.unwrap()
}

fn of(principal: &str, job: NewJob) -> NewJob {
    NewJob { principal: principal.into(), ..job }
}

#[tokio::test]
async fn what_waits_is_counted_whatever_becomes_of_it() {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    let ahead = (store.now().await.unwrap() + time::Duration::hours(1)).replace_nanosecond(0).unwrap();
    let later = of("a", job_with("later", &arn(9), json!({"not_before": ahead.format(&Rfc3339).unwrap()})));
    let jobs: Vec<NewJob> =
        (0..8).map(|n| of(if n % 2 == 0 { "a" } else { "b" }, job(&format!("j{n}"), &arn(n)))).collect();
    accept(&store, &jobs).await;
    accept(&store, std::slice::from_ref(&later)).await;
    // A copy counts for nothing.
    store.accept(&[Candidate::Job(jobs[0].clone())]).await.unwrap();
    for folded in [false, true] {
        if folded {
            assert_eq!(store.fold_backlog(0).await.unwrap().count, 3);
        }
        assert_eq!((waiting(&store, "a").await, waiting(&store, "b").await), (5, 4));
        assert_eq!(lanes(&store).await, [((ACCOUNT.to_owned(), REGION.to_owned()), 9)].into());
        // One has not joined its line yet, and nothing is known of a key that nobody has named.
        let lines = store.lines_waiting(&[0, 9, 10].map(|n| arn(n).to_string())).await.unwrap();
        assert_eq!(lines, [(arn(0).to_string(), 1), (arn(9).to_string(), 0)].into());
        assert_eq!(store.backlog().await.unwrap(), if folded { 9 } else { 0 });
    }
    // Neither does an attempt that does not end its job, nor the end of one whose lease was taken over, nor an end that
    // is written again.
    let claimed = claim(&store, 20).await;
    assert!(settle(&store, &put_back(&claimed[0], None)).await);
    assert!(settle(&store, &retry(&claimed[1], Duration::ZERO, claimed[1].deadline, RetryState::default())).await);
    db.advance(LEASE * 2).await;
    let claimed_again = claim(&store, 20).await;
    let ends: Vec<_> = claimed.iter().chain(&claimed_again).map(succeeded).collect();
    let ends: Vec<_> = ends.iter().collect();
    for _ in 0..2 {
        store.settle(&ends, SIGNATURE_LIFE).await.unwrap();
    }
    assert_eq!((waiting(&store, "a").await, waiting(&store, "b").await), (1, 0));
    for cancelled in
        [Cancelled::Ended, Cancelled::EndedBefore { state: "failed".into(), code: Some("cancelled".into()) }]
    {
        assert_eq!(store.cancel(&[later.id], "op").await.unwrap(), [cancelled]);
        assert!(store.waiting(&["a", "b"]).await.unwrap().is_empty() && lanes(&store).await.is_empty());
    }
    store.fold_backlog(0).await.unwrap();
    let rows = client.query("select principal, waiting from backlog order by 1", &[]).await.unwrap();
    let rows: Vec<(&str, i64)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(rows, [("a", 0), ("b", 0)]);
    assert!(client.query("select from backlog_change", &[]).await.unwrap().is_empty());
}

/// With many changes of others still to be folded, and many dead entries of what was, one principal's count and the next
/// fold cost next to nothing.
#[tokio::test]
async fn neither_others_changes_nor_folded_ones_cost_anything() {
    const CHANGES: &str = "
        insert into backlog_change (principal, change)
        select case when n = 30000 then 'a' else 'b' end, 1 from generate_series(1, 30000) as n";
    let db = TestDb::create().await;
    let (store, client, mut backup) = (db.store().await, db.client().await, db.client().await);
    client.batch_execute("alter table backlog_change set (autovacuum_enabled = false)").await.unwrap();
    client.batch_execute(CHANGES).await.unwrap();
    let options = "set enable_seqscan = off; set enable_bitmapscan = off; set enable_hashjoin = off;
                   set enable_mergejoin = off; set plan_cache_mode = force_generic_plan";
    client.batch_execute(options).await.unwrap();
    for (name, statement) in [("waiting", statements::WAITING), ("fold", statements::FOLD)] {
        client.batch_execute(&format!("prepare {name} as {statement}")).await.unwrap();
    }
    let buffers = async |execute: &str| {
        let explain = format!("explain (analyze, buffers, timing off, format json) execute {execute}");
        let plan = value::<serde_json::Value>(&client, &explain, &[]).await[0]["Plan"].take();
        plan["Shared Hit Blocks"].as_u64().unwrap() + plan["Shared Read Blocks"].as_u64().unwrap()
    };
    let counted = buffers("waiting('{a}')").await;
    assert!(counted < 20, "{counted} buffers to count");
    assert_eq!(waiting(&store, "b").await, 29_999);

    let snapshot = backup.transaction().await.unwrap();
    snapshot.execute("select count(*) from backlog_change", &[]).await.unwrap();
    let mut after = 0;
    for count in [FOLD_PAGE, FOLD_PAGE, FOLD_PAGE, 0] {
        let folded = store.fold_backlog(after).await.unwrap();
        assert_eq!(folded.count, count);
        after = folded.last;
    }
    let folded = buffers(&format!("fold(10000, {after})")).await;
    assert!(folded < 20, "{folded} buffers to fold");
    assert_eq!((waiting(&store, "a").await, waiting(&store, "b").await), (1, 29_999));
    // What was committed late is counted, and folded by the next that begins at the start.
    let late = "insert into backlog_change (id, principal, change) overriding system value values (-1, 'a', 1)";
    client.batch_execute(late).await.unwrap();
    assert_eq!(store.fold_backlog(after).await.unwrap().count, 0);
    assert_eq!(waiting(&store, "a").await, 2);
    assert_eq!(store.fold_backlog(i64::MIN).await.unwrap().count, 1);
    assert_eq!(waiting(&store, "a").await, 2);
    snapshot.commit().await.unwrap();
}

/// Publishers, workers, operators and folding housekeepers at once; at each look the count is that of the jobs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_count_is_exact_in_every_snapshot() {
    let db = TestDb::create().await;
    let (store, mut client) = (db.store().await, db.client().await);
    let publishing = async {
        for slice in 0..20_u128 {
            let jobs: Vec<NewJob> = (0..10)
                .map(|n| of(["a", "b", "c"][(n % 3) as usize], job(&format!("{slice}-{n}"), &arn(slice * 10 + n))))
                .collect();
            accept(&store, &jobs).await;
            if slice % 3 == 0 {
                store.cancel(&[jobs[0].id, jobs[1].id], "op").await.unwrap();
            }
        }
    };
    let working = async {
        let mut idle = 0;
        while idle < 20 {
            let claimed = claim(&store, 4).await;
            idle = if claimed.is_empty() { idle + 1 } else { 0 };
            for job in claimed {
                settle(&store, &succeeded(&job)).await;
            }
        }
    };
    let folding = async {
        for _ in 0..40 {
            store.fold_backlog(0).await.unwrap();
        }
    };
    let looking = async {
        const BOTH: &str = "
            select (select coalesce(sum(waiting), 0) from backlog)::bigint
                     + (select coalesce(sum(change), 0) from backlog_change)::bigint,
                   (select coalesce(sum(waiting), 0) from lane_backlog)::bigint
                     + (select coalesce(sum(change), 0) from backlog_change where account is not null)::bigint,
                   (select count(*) from job where state = 'waiting')";
        for _ in 0..60 {
            let transaction = client
                .build_transaction()
                .isolation_level(tokio_postgres::IsolationLevel::RepeatableRead)
                .start()
                .await
                .unwrap();
            let row = transaction.query_one(BOTH, &[]).await.unwrap();
            assert_eq!(row.get::<_, i64>(0), row.get::<_, i64>(2));
            assert_eq!(row.get::<_, i64>(1), row.get::<_, i64>(2));
            transaction.commit().await.unwrap();
        }
    };
    tokio::join!(publishing, working, folding, looking);
    while let [_, ..] = claim(&store, 8).await.iter().map(succeeded).collect::<Vec<_>>().as_slice() {
        db.advance(LEASE * 2).await;
        for job in claim(&store, 200).await {
            assert!(settle(&store, &succeeded(&job)).await);
        }
    }
    assert!(store.waiting(&["a", "b", "c"]).await.unwrap().is_empty());
}
