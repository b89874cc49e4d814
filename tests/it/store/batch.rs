//! Batches of any size are read page by page.

use super::given::{OPERATOR, case};
use keyferry::store::statements::WAITING_PAGE;
use keyferry::store::{Cancelled, JobPage};
use uuid::Uuid;

/// Of 12,000 jobs every thousandth waits, and every fifth has failed; one that failed first was retried by the last.
const JOBS: &str = "
    insert into job (id, line_id, seq, lane_id, kms_key_id, principal, request_source, request_id, request, batch, state,
                     accepted_at, deadline, finished_at, error, retry_of)
    select lpad(to_hex(n), 32, '0')::uuid, -n, 1, 1, gen_random_uuid(), 'p', '', n, '{}', 'b',
           case when n % 1000 = 0 then 'waiting' when n % 5 = 1 then 'failed' else 'succeeded' end,
           keyferry_now(), keyferry_now(), case when n % 1000 > 0 then keyferry_now() end,
           case when n % 5 = 1 then jsonb_build_object('code', case when n < 6000 then 'key_disabled' else 'cancelled' end) end,
           case when n = 12000 then lpad('1', 32, '0')::uuid end
    from generate_series(1, 12000) as n";

async fn pages<Fut: Future<Output = JobPage>>(read: impl Fn(Uuid) -> Fut) -> Vec<Vec<u128>> {
    let (mut pages, mut after) = (Vec::new(), Some(Uuid::nil()));
    while let Some(from) = after {
        let page = read(from).await;
        pages.push(page.ids.iter().map(Uuid::as_u128).collect());
        after = page.after;
    }
    pages
}

#[tokio::test]
async fn a_batch_is_counted_and_read_page_by_page() {
    let case = case().await;
    case.client.batch_execute(JOBS).await.unwrap();
    let counts = case.store.batch_counts("b").await.unwrap();
    let named = |state: &str, code: &str, count: u64| ((state.to_owned(), code.to_owned()), count);
    // 2,400 have failed; the first of them is counted as its retry.
    let expected = [
        named("failed", "cancelled", 1_200),
        named("failed", "key_disabled", 1_199),
        named("succeeded", "", 9_588),
        named("waiting", "", 12),
    ];
    assert_eq!(counts.into_iter().collect::<Vec<_>>(), expected);
    assert!(case.store.batch_counts("nobody").await.unwrap().is_empty());

    let waiting = pages(async |after| case.store.waiting_of_batch("b", after).await.unwrap()).await;
    assert_eq!(waiting.iter().map(Vec::len).collect::<Vec<_>>(), [5, 5, 2]);
    assert!(waiting.concat().iter().zip(1..).all(|(id, n)| *id == n * 1_000));
    let start = case.store.now().await.unwrap();
    let failed = async |code: Option<&'static str>| {
        pages(async |after| case.store.failed_of_batch("b", code, after, start).await.unwrap()).await
    };
    let all = failed(None).await;
    assert_eq!(all.iter().map(Vec::len).collect::<Vec<_>>(), [999, 1_000, 400]);
    assert!(all[0][0] == 6 && all.concat().is_sorted());
    // A page of which none is meant is not the last.
    assert_eq!(failed(Some("cancelled")).await.iter().map(Vec::len).collect::<Vec<_>>(), [0, 800, 400]);
    let unknown = case.store.cancel(&[Uuid::from_u128(20_000)], OPERATOR).await.unwrap();
    assert_eq!(unknown, [Cancelled::Unknown]);
}

/// However a batch's jobs ended: no more than a page of them is read at once, and along its index.
#[tokio::test]
async fn pages_are_read_along_the_index_of_batches() {
    let case = case().await;
    case.client.batch_execute(JOBS).await.unwrap();
    case.client.batch_execute("set enable_seqscan = off; set enable_bitmapscan = off").await.unwrap();
    let read = format!("explain (analyze, costs off, timing off, summary off) {WAITING_PAGE}");
    let plan = case.client.query(&read, &[&"b", &Uuid::nil(), &5_000_i64]).await.unwrap();
    let plan: Vec<&str> = plan.iter().map(|row| row.get(0)).collect();
    assert!(plan.iter().any(|line| line.contains("job_batch") && line.contains("rows=5000")), "{plan:#?}");
}
