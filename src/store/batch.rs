//! Batches, page by page: no statement reads more than a page of one, however large it is and whatever became of its jobs.

use super::{Store, StoreError};
use std::collections::BTreeMap;
use tokio_postgres::Row;
use uuid::Uuid;

/// Jobs that are looked at in one statement.
pub(super) const LOOK: i64 = 5_000;

/// Jobs of the batch `$1` after `$2`, `$3` at most, and whether each waits.
pub const WAITING_PAGE: &str = "
    select id, state = 'waiting' from (
        select id, state from job where batch = $1 and id > $2 order by batch, id limit $3) as page order by id";

/// A page of jobs: those of them that are meant, maybe none.
#[derive(Debug, Default)]
pub struct JobPage {
    /// Their ids, in order.
    pub ids: Vec<Uuid>,
    /// Where the next page begins; `None`: this was the last.
    pub after: Option<Uuid>,
}

impl JobPage {
    /// From ids in order, and whether each is meant: of [`LOOK`] jobs, if there are as many.
    pub(super) fn of(rows: &[Row]) -> Self {
        Self { ids: rows.iter().filter(|row| row.get(1)).map(|row| row.get(0)).collect(), after: next(rows, 0) }
    }
}

/// The id of the last row, unless the page is not full.
fn next(rows: &[Row], id: usize) -> Option<Uuid> {
    let is_full = i64::try_from(rows.len()) == Ok(LOOK);
    rows.last().filter(|_| is_full).map(|row| row.get(id))
}

impl Store {
    /// A page of a batch's jobs: those that wait.
    pub async fn waiting_of_batch(&self, batch: &str, after: Uuid) -> Result<JobPage, StoreError> {
        self.retrying(|| async {
            let client = self.client().await?;
            let read = client.prepare_cached(WAITING_PAGE).await?;
            Ok(JobPage::of(&client.query(&read, &[&batch, &after, &LOOK]).await?))
        })
        .await
    }

    /// How many jobs of a batch there are, by state and, of those that failed, code. One that was retried is not counted: its
    /// retry is.
    pub async fn batch_counts(&self, batch: &str) -> Result<BTreeMap<(String, String), u64>, StoreError> {
        const COUNT: &str = "
            with page as materialized (
                select id, state, coalesce(error ->> 'code', '') as code from job
                where batch = $1 and id > $2 order by batch, id limit $3),
            counted as (
                select state, code, count(*) as count from page
                where not (state = 'failed' and exists (select from job as retry where retry.retry_of = page.id))
                group by 1, 2)
            select state, code, count, null::uuid, null::bigint from counted
            union all
            select '', '', 0, (select id from page order by id desc limit 1), (select count(*) from page)";
        let (mut counts, mut after) = (BTreeMap::new(), Some(Uuid::nil()));
        while let Some(from) = after {
            let rows = self
                .retrying(|| async {
                    let client = self.client().await?;
                    let count = client.prepare_cached(COUNT).await?;
                    Ok(client.query(&count, &[&batch, &from, &LOOK]).await?)
                })
                .await?;
            after = None;
            for row in &rows {
                // The last row says how far the page went.
                if let Some(seen) = row.get::<_, Option<i64>>(4) {
                    after = row.get::<_, Option<Uuid>>(3).filter(|_| seen == LOOK);
                } else {
                    let of = counts.entry((row.get(0), row.get(1))).or_default();
                    *of += u64::try_from(row.get::<_, i64>(2)).unwrap_or(0);
                }
            }
        }
        Ok(counts)
    }
}
