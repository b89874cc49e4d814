//! How many jobs of each principal wait, without counting them.
//!
//! Whoever accepts or ends jobs appends what changes; housekeeping folds that into one row a principal. The sum of both
//! is exact in every snapshot, and no two transactions wait for each other over a row that all of them change.

use super::{Store, StoreError};
use deadpool_postgres::Transaction;
use std::collections::{BTreeMap, HashMap};

/// Changes that one transaction folds at most.
pub const FOLD_PAGE: u64 = 10_000;

/// What the principals' changes add up to.
pub const WAITING: &str = "
    select principal, sum(waiting)::bigint from (
        select principal, waiting from backlog where principal = any($1)
        union all
        select principal, change from backlog_change where principal = any($1)
    ) as known group by principal having sum(waiting) <> 0";

/// Folds up to `$1` changes after `$2`.
pub const FOLD: &str = "
    with gone as (
        delete from backlog_change where id in (
            select id from backlog_change where id > $2 order by id limit $1 for update skip locked)
        returning id, principal, change),
    summed as (select principal, sum(change)::bigint as change from gone group by principal),
    folded as (
        insert into backlog (principal, waiting) select principal, change from summed order by principal
        on conflict (principal) do update set waiting = backlog.waiting + excluded.waiting)
    select count(*), coalesce(max(id), $2) from gone";

/// What has been folded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Folded {
    /// How many changes; more may be left when it is [`FOLD_PAGE`].
    pub count: u64,
    /// The last of them: the next fold begins behind it.
    pub last: i64,
}

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
        self.retrying(|| async {
            let client = self.client().await?;
            let read = client.prepare_cached(WAITING).await?;
            let rows = client.query(&read, &[&principals]).await?;
            Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
        })
        .await
    }

    /// Folds a page of changes into the principals' rows. `after` is a hint, which keeps it away from the dead entries of
    /// what was folded before: a change that was committed late is below it, so that now and then it must be 0. Whatever
    /// is not folded is counted all the same.
    pub async fn fold_backlog(&self, after: i64) -> Result<Folded, StoreError> {
        self.retrying(|| async {
            let client = self.client().await?;
            let fold = client.prepare_cached(FOLD).await?;
            let most = i64::try_from(FOLD_PAGE).unwrap_or(i64::MAX);
            let row = client.query_one(&fold, &[&most, &after]).await?;
            Ok(Folded { count: u64::try_from(row.get::<_, i64>(0)).unwrap_or(0), last: row.get(1) })
        })
        .await
    }
}
