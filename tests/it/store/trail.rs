//! The audit trail, read page by page.

use super::given::{accept, add_source_key, arn, job, sealed, value};
use crate::support::db::{TestDb, connect};
use keyferry::config::Database;
use keyferry::store::{Position, Store, TrailRow, statements};
use serde_json::Value;
use url::Url;

/// Everything after a position, in pages of a length.
async fn read(store: &Store, mut after: Position, page: i64) -> Vec<TrailRow> {
    let mut all = Vec::new();
    loop {
        let rows = store.trail(None, after, page).await.unwrap();
        let Some(last) = rows.last() else { return all };
        after = last.position;
        all.extend(rows);
    }
}

#[tokio::test]
async fn pages_of_any_length_have_every_entry_once_and_in_one_order() {
    let db = TestDb::create().await;
    let store = db.store().await;
    let jobs: Vec<_> = (0..25).map(|n| job(&format!("j{n}"), &arn(n))).collect();
    accept(&store, &jobs).await;
    assert!(add_source_key(&store, &sealed("k")).await);
    let all = read(&store, Position::START, 1_000).await;
    let count: i64 = value(&db.client().await, "select count(*) from audit_entry", &[]).await;
    assert_eq!(all.len(), usize::try_from(count).unwrap());
    assert!(all.windows(2).all(|pair| pair[0].position < pair[1].position));
    let entries = |rows: &[TrailRow]| rows.iter().map(|row| row.entry.clone()).collect::<Vec<_>>();
    for page in [1, 7, 26] {
        assert_eq!(entries(&read(&store, Position::START, page).await), entries(&all), "pages of {page}");
    }
    for row in &all {
        let entry: Value = serde_json::from_str(&row.entry).unwrap();
        assert_eq!(entry["subject"], row.position.subject.to_string());
        assert_eq!(entry["n"], row.position.n);
    }
    // From an entry on, whether it is still the last of its subject or not.
    assert_eq!(entries(&read(&store, all[9].position, 4).await), entries(&all[10..]));
    let one = store.trail(Some(all[3].position.subject), Position::START, 10).await.unwrap();
    assert_eq!(entries(&one), entries(&all[3..4]));
    assert_eq!(store.trail(Some(all[3].position.subject), all[3].position, 10).await.unwrap().len(), 0);
}

/// In the midst of a long trail as at its beginning, without statistics as with them.
#[tokio::test]
async fn a_page_costs_what_it_holds() {
    const FILL: &str = "
        insert into audit_entry (subject, n, entry)
        select ('00000000-0000-7000-8000-' || lpad(to_hex(j), 12, '0'))::uuid, n, '{\"at\":\"x\"}'
        from generate_series(1, 20000) j, generate_series(1, 4) n";
    let db = TestDb::create().await;
    let admin = db.client().await;
    admin.batch_execute(FILL).await.unwrap();
    let mut url = Url::parse(&db.worker_url()).unwrap();
    let options = statements::session_options(&Database::default()).replace(' ', "%20").replace('=', "%3D");
    url.set_query(Some(&format!("sslmode=require&options={options}")));
    let session = connect(&url).await;
    session.batch_execute(&format!("prepare page (uuid, integer, bigint) as {}", statements::TRAIL)).await.unwrap();
    for _ in 0..2 {
        for from in ["00000000-0000-0000-0000-000000000000", "00000000-0000-7000-8000-000000002710"] {
            let explain = format!("explain (analyze, buffers, format json) execute page ('{from}', 1, 100)");
            let plan: Value = value(&session, &explain, &[]).await;
            let plan = &plan[0]["Plan"];
            let buffers = plan["Shared Hit Blocks"].as_u64().unwrap() + plan["Shared Read Blocks"].as_u64().unwrap();
            // A row is a look at its page, and the way into the index is a few.
            assert!(buffers <= 150, "{buffers} buffers from {from}: {plan:#}");
            assert_eq!(plan["Actual Rows"].as_f64(), Some(100.0));
        }
        admin.batch_execute("analyze audit_entry").await.unwrap();
    }
}
