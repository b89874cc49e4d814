//! How many jobs of each principal wait, without counting them.
//!
//! Whoever accepts or ends jobs appends what changes; housekeeping folds that into one row a principal. The sum of both
//! is exact in every snapshot, and no two transactions wait for each other over a row that all of them change.

use super::{Store, StoreError};
use deadpool_postgres::Transaction;
use std::collections::{BTreeMap, HashMap};

/// Changes that one transaction folds at most.
const FOLD_PAGE: i64 = 10_000;

/// Appends by how much the principals' jobs have become more, or fewer.
pub(super) async fn change<'a>(
    transaction: &Transaction<'_>,
    principals: impl Iterator<Item = &'a str>,
    by: i64,
) -> Result<(), StoreError> {
    const APPEND: &str = "
        insert into backlog_change (principal, change) select * from unnest($1::text[], $2::bigint[])";
    let mut changes: BTreeMap<&str, i64> = BTreeMap::new();
    for principal in principals {
        *changes.entry(principal).or_default() += by;
    }
    if !changes.is_empty() {
        let (principals, changes): (Vec<&str>, Vec<i64>) = changes.into_iter().unzip();
        let append = transaction.prepare_cached(APPEND).await?;
        transaction.execute(&append, &[&principals, &changes]).await?;
    }
    Ok(())
}

impl Store {
    /// How many jobs of these principals wait, those included that are under way or have not joined their lines yet. A
    /// principal that is not among the keys has none.
    pub async fn waiting(&self, principals: &[&str]) -> Result<HashMap<String, i64>, StoreError> {
        const READ: &str = "
            select principal, sum(waiting)::bigint from (
                select principal, waiting from backlog where principal = any($1)
                union all
                select principal, change from backlog_change where principal = any($1)
            ) as known group by principal having sum(waiting) <> 0";
        self.retrying(|| async {
            let client = self.client().await?;
            let read = client.prepare_cached(READ).await?;
            let rows = client.query(&read, &[&principals]).await?;
            Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
        })
        .await
    }

    /// Folds changes into the principals' rows; says how many there were.
    pub async fn fold_backlog(&self) -> Result<u64, StoreError> {
        const FOLD: &str = "
            with gone as (
                delete from backlog_change where id in (
                    select id from backlog_change order by id limit $1 for update skip locked)
                returning principal, change),
            summed as (select principal, sum(change)::bigint as change, count(*) as count from gone group by principal),
            folded as (
                insert into backlog (principal, waiting) select principal, change from summed order by principal
                on conflict (principal) do update set waiting = backlog.waiting + excluded.waiting)
            select coalesce(sum(count), 0)::bigint from summed";
        self.retrying(|| async {
            let client = self.client().await?;
            let fold = client.prepare_cached(FOLD).await?;
            Ok(u64::try_from(client.query_one(&fold, &[&FOLD_PAGE]).await?.get::<_, i64>(0)).unwrap_or(0))
        })
        .await
    }
}
