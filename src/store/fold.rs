//! Folded refusals: counted while their minute lasts, told of once it is over, forgotten when their letters are old.

use super::accept::{NewRefusal, insert_audit, insert_events};
use super::refuse::{Kin, METERS, columns, release};
use super::{Store, StoreError};
use crate::audit::{Fact, Kind};
use crate::job::{Event, RefusalFold, rfc3339};
use deadpool_postgres::Transaction;
use futures_util::FutureExt as _;
use serde_json::json;
use std::collections::{BTreeMap, HashSet};
use std::time::Duration;
use time::OffsetDateTime;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// Folds that are told of, and rows that are forgotten, in one transaction at most.
pub const FOLDS_PAGE: usize = 1_000;
/// How long a folded refusal is remembered: as long as SQS keeps a letter at most.
const REMEMBERED: Duration = Duration::from_secs(14 * 86_400);
/// How much later than it was refused a letter can have died, by the broker's clock, or how much earlier.
const LATE: Duration = Duration::from_secs(600);
const EARLY: Duration = Duration::from_secs(60);

/// Folds whose minute is over. What is being added to one just now is waited for by the next look.
pub const DUE_FOLDS: &str = "
    select id, principal, identity, ingress, code, policy, first_at, last_at, count, (select keyferry_now())
    from refusal_fold where told_at is null and minute <= (select keyferry_now() - interval '1 minute')
    order by minute, id limit $1 for update skip locked";

/// What is added to a fold.
pub(super) struct Addition<'a> {
    pub(super) id: Uuid,
    pub(super) kin: Kin<'a>,
    pub(super) minute: OffsetDateTime,
    pub(super) count: usize,
    /// How many of these have no row.
    pub(super) forgotten: usize,
    pub(super) policy: &'a str,
}

/// Adds to folds, or begins them. One that was told of meanwhile has its minute behind it: whoever adds to it is late, and
/// counts in the next.
pub(super) async fn add(
    transaction: &Transaction<'_>,
    mut additions: Vec<Addition<'_>>,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    const ADD: &str = "
        insert into refusal_fold as fold (id, principal, identity, ingress, code, policy, minute, first_at, last_at, count,
                                          forgotten)
        select id, principal, nullif(identity, ''), ingress, code, policy, minute, $10, $10, count, forgotten
        from unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::timestamptz[],
                    $8::bigint[], $9::bigint[])
             as new(id, principal, identity, ingress, code, policy, minute, count, forgotten)
        order by id
        on conflict (id) do update
        set count = fold.count + excluded.count, forgotten = fold.forgotten + excluded.forgotten,
            last_at = greatest(fold.last_at, excluded.last_at), policy = excluded.policy
        where fold.told_at is null";
    if additions.is_empty() {
        return Ok(());
    }
    additions.sort_unstable_by_key(|addition| addition.id);
    let ids: Vec<Uuid> = additions.iter().map(|addition| addition.id).collect();
    let kins: Vec<Kin<'_>> = additions.iter().map(|addition| addition.kin).collect();
    let [principals, identities, ingresses, codes] = columns(&kins);
    let policies: Vec<&str> = additions.iter().map(|addition| addition.policy).collect();
    let minutes: Vec<OffsetDateTime> = additions.iter().map(|addition| addition.minute).collect();
    let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
    let counts: Vec<i64> = additions.iter().map(|addition| number(addition.count)).collect();
    let forgotten: Vec<i64> = additions.iter().map(|addition| number(addition.forgotten)).collect();
    let add = transaction.prepare_cached(ADD).await?;
    let values: [&(dyn ToSql + Sync); 10] =
        [&ids, &principals, &identities, &ingresses, &codes, &policies, &minutes, &counts, &forgotten, &now];
    let added = transaction.execute(&add, &values).await?;
    if usize::try_from(added) == Ok(additions.len()) {
        Ok(())
    } else {
        Err(StoreError::Conflict("the minute of a fold is over".into()))
    }
}

/// Rows for folded refusals, by which their letters and copies of them are known. What somebody else has recorded meanwhile,
/// who does not wait for his turn as an older version does not, would be counted twice: the next look finds it known.
pub(super) async fn remember(
    transaction: &Transaction<'_>,
    folded: &[(Uuid, &NewRefusal)],
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    const REMEMBER: &str = "
        insert into refusal_folded (id, fold_id, principal, id_hash, digest, code, field, request_id, ingress, identity,
                                    identity_verified, refused_at)
        select *, $12 from unnest($1::uuid[], $2::uuid[], $3::text[], $4::bytea[], $5::bytea[], $6::text[], $7::text[],
                             $8::text[], $9::text[], $10::text[], $11::boolean[])
                      as new(id, fold_id, principal, id_hash, digest)
        order by id_hash, digest
        on conflict do nothing";
    if folded.is_empty() {
        return Ok(());
    }
    let ids: Vec<Uuid> = folded.iter().map(|(_, new)| new.id).collect();
    let folds: Vec<Uuid> = folded.iter().map(|(fold, _)| *fold).collect();
    let principals: Vec<&str> = folded.iter().map(|(_, new)| new.principal.as_str()).collect();
    let hashes: Vec<&[u8]> = folded.iter().map(|(_, new)| new.id_hash.as_slice()).collect();
    let digests: Vec<&[u8]> = folded.iter().map(|(_, new)| new.digest.bytes()).collect();
    let codes: Vec<&str> = folded.iter().map(|(_, new)| new.refusal.code.as_str()).collect();
    let fields: Vec<Option<&str>> = folded.iter().map(|(_, new)| new.refusal.field.as_deref()).collect();
    let request_ids: Vec<Option<&str>> = folded.iter().map(|(_, new)| new.request_id.as_deref()).collect();
    let ingresses: Vec<&str> = folded.iter().map(|(_, new)| new.ingress).collect();
    let identities: Vec<Option<&str>> = folded.iter().map(|(_, new)| new.sender.identity.as_deref()).collect();
    let verified: Vec<bool> = folded.iter().map(|(_, new)| new.sender.is_verified).collect();
    let remember = transaction.prepare_cached(REMEMBER).await?;
    let values: [&(dyn ToSql + Sync); 12] = [
        &ids,
        &folds,
        &principals,
        &hashes,
        &digests,
        &codes,
        &fields,
        &request_ids,
        &ingresses,
        &identities,
        &verified,
        &now,
    ];
    let remembered = transaction.execute(&remember, &values).await?;
    if usize::try_from(remembered) == Ok(folded.len()) {
        Ok(())
    } else {
        Err(StoreError::Conflict("a refusal was recorded meanwhile".into()))
    }
}

impl Store {
    /// Gives folds whose minute is over their audit entry and their event; how many, and more may be left when it is
    /// [`FOLDS_PAGE`].
    pub async fn tell_folds(&self) -> Result<usize, StoreError> {
        self.retrying(|| self.tell_folds_once()).await
    }

    async fn tell_folds_once(&self) -> Result<usize, StoreError> {
        const MARK: &str = "update refusal_fold set told_at = $2 where id = any($1)";
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let due = transaction.prepare_cached(DUE_FOLDS).await?;
        let most = i64::try_from(FOLDS_PAGE).unwrap_or(i64::MAX);
        let rows = transaction.query(&due, &[&most]).await?;
        let Some(first) = rows.first() else { return Ok(0) };
        let now: OffsetDateTime = first.get(9);
        let ids: Vec<Uuid> = rows.iter().map(|row| row.get(0)).collect();
        let mark = transaction.prepare_cached(MARK).await?;
        let marked: [&(dyn ToSql + Sync); 2] = [&ids, &now];
        let events: Vec<Event> = rows.iter().map(|row| Event::of_fold(&summary(row), now)).collect();
        super::together(vec![
            async { Ok(transaction.execute(&mark, &marked).await.map(drop)?) }.boxed(),
            insert_audit(&transaction, rows.iter().map(|row| entry(row, now)).collect()).boxed(),
            insert_events(&transaction, &events).boxed(),
        ])
        .await?;
        crate::failpoint!("folds.before_commit");
        transaction.commit().await?;
        self.written.entries(std::iter::repeat_n(Kind::Refused, ids.len()));
        Ok(ids.len())
    }

    /// Forgets folded refusals that are too old; how many, and more may be left when it is [`FOLDS_PAGE`].
    pub async fn forget_folded(&self) -> Result<usize, StoreError> {
        self.retrying(|| self.forget_folded_once()).await
    }

    async fn forget_folded_once(&self) -> Result<usize, StoreError> {
        const OLD: &str = "
            select one.id, fold.principal, coalesce(fold.identity, ''), fold.ingress, fold.code
            from (select id, fold_id, refused_at from refusal_folded
                  where refused_at < (select keyferry_now()) - $1 * interval '1 ms' order by refused_at limit $2) as one
            join refusal_fold as fold on fold.id = one.fold_id";
        const FORGET: &str = "
            with gone as (
                delete from refusal_folded where id = any($1) returning fold_id),
            counted as (select fold_id, count(*) as count from gone group by fold_id order by fold_id)
            update refusal_fold as fold set forgotten = fold.forgotten + counted.count
            from counted where fold.id = counted.fold_id
            returning fold.principal, coalesce(fold.identity, ''), fold.ingress, fold.code, counted.count";
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let old = transaction.prepare_cached(OLD).await?;
        let most = i64::try_from(FOLDS_PAGE).unwrap_or(i64::MAX);
        let rows = transaction.query(&old, &[&super::claim::millis(REMEMBERED), &most]).await?;
        if rows.is_empty() {
            return Ok(0);
        }
        let ids: Vec<Uuid> = rows.iter().map(|row| row.get(0)).collect();
        // The meters first, as whoever refuses does it: nobody else touches the rows then.
        let mut kins: Vec<Kin<'_>> = rows.iter().map(|row| kin(row, 1)).collect();
        kins.sort_unstable();
        kins.dedup();
        let [principals, identities, ingresses, codes] = columns(&kins);
        let meters = transaction.prepare_cached(METERS).await?;
        transaction.execute(&meters, &[&principals, &identities, &ingresses, &codes]).await?;
        let forget = transaction.prepare_cached(FORGET).await?;
        let rows = transaction.query(&forget, &[&ids]).await?;
        let mut gone: BTreeMap<Kin<'_>, i64> = BTreeMap::new();
        for row in &rows {
            *gone.entry(kin(row, 0)).or_default() += row.get::<_, i64>(4);
        }
        release(&transaction, &gone.into_iter().collect::<Vec<_>>()).await?;
        transaction.commit().await?;
        Ok(ids.len())
    }

    /// Which of the letters that died at these times may be of refusals that a fold has counted and nothing remembers.
    pub async fn may_be_forgotten(
        &self,
        ingress: &str,
        died_at: &[Option<OffsetDateTime>],
    ) -> Result<Vec<bool>, StoreError> {
        const READ: &str = "
            select asked.place from unnest($1::timestamptz[]) with ordinality as asked(at, place)
            where exists (select from refusal_fold as fold
                          where fold.forgotten > 0 and fold.ingress = $2
                            and fold.minute between asked.at - $3 * interval '1 ms' and asked.at + $4 * interval '1 ms')";
        // A minute begins before its refusals.
        let late = super::claim::millis(LATE + Duration::from_secs(60));
        self.retrying(|| async {
            let client = self.client().await?;
            let read = client.prepare_cached(READ).await?;
            let early = super::claim::millis(EARLY);
            let rows = client.query(&read, &[&died_at, &ingress, &late, &early]).await?;
            let places: HashSet<i64> = rows.iter().map(|row| row.get(0)).collect();
            // Postgres counts from one.
            Ok(died_at.iter().zip(1..).map(|(_, place)| places.contains(&place)).collect())
        })
        .await
    }
}

fn kin(row: &Row, first: usize) -> Kin<'_> {
    Kin {
        principal: row.get(first),
        identity: row.get(first + 1),
        ingress: row.get(first + 2),
        code: row.get(first + 3),
    }
}

/// From the columns of [`DUE_FOLDS`], the last of which is when it is told.
pub(super) fn summary(row: &Row) -> RefusalFold<'_> {
    RefusalFold {
        id: row.get(0),
        principal: row.get(1),
        code: row.get(4),
        from: row.get(6),
        to: row.get(7),
        count: row.get(8),
    }
}

fn entry(row: &Row, now: OffsetDateTime) -> (Uuid, i32, String) {
    let RefusalFold { id, principal, code, from, to, count } = summary(row);
    let identity: Option<&str> = row.get(2);
    let fact = Fact::new(
        Kind::Refused,
        json!({
            "principal": principal,
            "identity": identity,
            "identity_verified": identity.is_some(),
            "policy": row.get::<_, &str>(5),
            "ingress": row.get::<_, &str>(3),
            "code": code,
            "folded": {"count": count, "from": rfc3339(from), "to": rfc3339(to), "code": code},
        }),
    );
    (id, 1, fact.entry(id, 1, now))
}
