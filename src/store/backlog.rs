//! How many jobs of each principal, and of each account and Region, wait, without counting them.
//!
//! Whoever accepts or ends jobs appends what changes; housekeeping folds that into one row a principal, and one an account
//! and Region. The sum of both is exact in every snapshot, and no two transactions wait for each other over a row that all
//! of them change. A line's own row tells how long it is.

use super::{Store, StoreError};
use crate::job::KeyArn;
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

/// The same of accounts and Regions.
pub const LANES_WAITING: &str = "
    select account, region, sum(waiting)::bigint
    from unnest($1::text[], $2::text[]) as asked(account, region)
    cross join lateral (
        select waiting from lane_backlog as lane where lane.account = asked.account and lane.region = asked.region
        union all
        select change from backlog_change as one where one.account = asked.account and one.region = asked.region
    ) as known group by account, region having sum(waiting) <> 0";

/// How many places of the keys' lines are not passed yet.
pub const LINES_WAITING: &str = "
    select kms_key.arn, line.tail_seq - line.head_seq + 1
    from unnest($1::text[]) as asked(arn)
    join kms_key on kms_key.arn = asked.arn
    join line on line.id = kms_key.line_id";

/// Folds up to `$1` changes after `$2`.
pub const FOLD: &str = "
    with gone as (
        delete from backlog_change where id in (
            select id from backlog_change where id > $2 order by id limit $1 for update skip locked)
        returning id, principal, account, region, change),
    summed as (select principal, sum(change)::bigint as change from gone group by principal),
    lanes as (
        select account, region, sum(change)::bigint as change from gone where account is not null
        group by account, region),
    folded_lanes as (
        insert into lane_backlog (account, region, waiting)
        select account, region, change from lanes order by account, region
        on conflict (account, region) do update set waiting = lane_backlog.waiting + excluded.waiting),
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

/// Appends by how much the jobs of these principals on these keys have become more, or fewer.
pub(super) async fn change<'a>(
    transaction: &Transaction<'_>,
    jobs: impl Iterator<Item = (&'a str, &'a KeyArn)>,
    by: i64,
) -> Result<(), StoreError> {
    const APPEND: &str = "
        insert into backlog_change (principal, account, region, change)
        select * from unnest($1::text[], $2::text[], $3::text[], $4::bigint[])";
    let mut counts: BTreeMap<(&str, &str, &str), i64> = BTreeMap::new();
    for (principal, key) in jobs {
        *counts.entry((principal, key.account(), key.region())).or_default() += by;
    }
    if !counts.is_empty() {
        let principals: Vec<&str> = counts.keys().map(|(principal, ..)| *principal).collect();
        let accounts: Vec<&str> = counts.keys().map(|(_, account, _)| *account).collect();
        let regions: Vec<&str> = counts.keys().map(|(.., region)| *region).collect();
        let changes: Vec<i64> = counts.values().copied().collect();
        let append = transaction.prepare_cached(APPEND).await?;
        transaction.execute(&append, &[&principals, &accounts, &regions, &changes]).await?;
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

    /// The same of accounts and Regions.
    pub async fn lanes_waiting(&self, lanes: &[(&str, &str)]) -> Result<HashMap<(String, String), i64>, StoreError> {
        let (accounts, regions): (Vec<&str>, Vec<&str>) = lanes.iter().copied().unzip();
        self.retrying(|| async {
            let client = self.client().await?;
            let read = client.prepare_cached(LANES_WAITING).await?;
            let rows = client.query(&read, &[&accounts, &regions]).await?;
            Ok(rows.iter().map(|row| ((row.get(0), row.get(1)), row.get(2))).collect())
        })
        .await
    }

    /// How long the lines of these keys are, by ARN. Jobs that ended out of turn are counted until they are passed, those
    /// that have not joined yet are not. A key that is not among the keys has no line yet.
    pub async fn lines_waiting(&self, arns: &[String]) -> Result<HashMap<String, i64>, StoreError> {
        self.retrying(|| async {
            let client = self.client().await?;
            let read = client.prepare_cached(LINES_WAITING).await?;
            let rows = client.query(&read, &[&arns]).await?;
            Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
        })
        .await
    }

    /// How many jobs wait in all, as far as that is folded: late by what the next fold brings, and next to free.
    pub async fn backlog(&self) -> Result<u64, StoreError> {
        const READ: &str = "select coalesce(sum(waiting), 0)::bigint from backlog";
        self.retrying(|| async {
            let client = self.client().await?;
            let read = client.prepare_cached(READ).await?;
            // An end can be folded before the beginning, which was committed late.
            Ok(u64::try_from(client.query_one(&read, &[]).await?.get::<_, i64>(0)).unwrap_or(0))
        })
        .await
    }

    /// Folds a page of changes into the principals' rows, and those of accounts and Regions. `after` is a hint, which keeps it away from the dead entries of
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
