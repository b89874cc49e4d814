//! Refusals become durable. The first of a minute have an audit entry and an event each; those beyond are folded.
//!
//! What folds together is of one sender and for one reason: nobody hides another's refusal behind a flood of his own.
//! Whoever writes refusals first waits for his turn among those who refuse the like, and locks the meters of their kin, so that
//! each message is counted once, by whichever worker and transport and however often it comes. Only those beyond [`KEPT`], of which nothing is remembered, are counted again when they come
//! again.

use super::accept::{NewRefusal, insert_audit, insert_events};
use super::{StoreError, fold};
use crate::audit::{Fact, Kind};
use crate::job::{Event, Operation, RefusalCode, RefusalSummary};
use deadpool_postgres::Transaction;
use futures_util::try_join;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use time::OffsetDateTime;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// Refusals of one sender and one code within a minute that are told of one by one.
pub const TOLD_A_MINUTE: i64 = 10;
/// Folded refusals of one sender and one code that are remembered at a time, for their dead letters. So many can be sent
/// again once what they were refused for is mended; a flood takes no more room than these.
pub const KEPT: i64 = 100_000;

/// Waits for the turn of whoever refuses messages of the same senders for the same reasons, by whichever transport they came:
/// a message that comes over two is one. Held until the transaction ends, and taken in one order. Rows, which only a worker may
/// lock: an advisory lock could be kept from us by anybody who may connect.
pub const TURNS: &str = "select from refusal_turn where turn = any($1::integer[]) order by turn for no key update";

/// Rows of `refusal_turn`: from zero on.
const TURN_COUNT: u16 = 1024;

/// Locks meters, in the order of their keys.
pub const METERS: &str = "
    select asked.place, meter.minute, meter.seen, meter.kept, date_trunc('minute', keyferry_now()),
           -- One that was told of takes no more: where a clock was put back its minute can come again.
           case when not exists (select from refusal_fold where id = meter.fold_id and told_at is not null)
                then meter.fold_id end
    from unnest($1::text[], $2::text[], $3::text[], $4::text[]) with ordinality
         as asked(principal, identity, ingress, code, place)
    join refusal_meter as meter using (principal, identity, ingress, code)
    order by principal, identity, ingress, code for no key update of meter";

/// Which of these verdicts stand already. A statement of its own, after the locks: it sees what was committed while they
/// were waited for.
pub const KNOWN_REFUSALS: &str = "
    select asked.place
    from unnest($1::text[], $2::bytea[], $3::bytea[], $4::text[], $5::text[], $6::boolean[]) with ordinality
         as asked(principal, id_hash, digest, code, identity, identity_verified, place)
    join refused using (principal, id_hash, digest, code, identity_verified)
    where refused.identity is not distinct from asked.identity";

/// Refusals that fold together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Kin<'a> {
    pub(super) principal: &'a str,
    /// Empty where nothing was proved: what a message says of itself would make as many kins as it likes.
    pub(super) identity: &'a str,
    pub(super) ingress: &'a str,
    pub(super) code: &'a str,
}

impl<'a> Kin<'a> {
    fn of(new: &'a NewRefusal) -> Self {
        let proved = new.sender.identity.as_deref().filter(|_| new.sender.is_verified);
        Self {
            principal: &new.principal,
            identity: proved.unwrap_or_default(),
            ingress: new.ingress,
            code: new.refusal.code.as_str(),
        }
    }

    /// By which whoever refuses the like waits for each other. Two that share one by chance wait for nothing.
    fn turn(&self) -> i32 {
        let mut hash = Sha256::new();
        for part in ["keyferry refusals", self.principal, self.identity, self.code] {
            hash.update(part.len().to_be_bytes());
            hash.update(part);
        }
        let [first, second, ..] = <[u8; 32]>::from(hash.finalize());
        i32::from(u16::from_be_bytes([first, second]) % TURN_COUNT)
    }
}

/// What has been counted of a kin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Meter {
    minute: OffsetDateTime,
    /// Refusals within that minute.
    seen: i64,
    /// Their fold, if some are folded.
    fold: Option<Uuid>,
    /// Folded refusals that are remembered, of whichever minute.
    kept: i64,
}

impl Meter {
    /// As it stands in a minute. Time does not go back: who waited for the lock may have an old one.
    fn at(self, minute: OffsetDateTime) -> Self {
        if minute > self.minute { Self { minute, seen: 0, fold: None, kept: self.kept } } else { self }
    }

    /// Counts new refusals.
    fn count(self, new: usize) -> (Self, Share) {
        let share = Share::of(new, self.seen, self.kept);
        let added = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let fold = self.fold.or_else(|| (share.folded() > 0).then(Uuid::now_v7));
        let seen = self.seen.saturating_add(added(new));
        (Self { seen, fold, kept: self.kept + added(share.kept), ..self }, share)
    }
}

/// What becomes of new refusals, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Share {
    /// Told of one by one.
    told: usize,
    /// Folded and remembered.
    kept: usize,
    /// Folded, and no more than counted.
    forgotten: usize,
}

impl Share {
    fn of(new: usize, seen: i64, kept: i64) -> Self {
        let left = |most: i64, used: i64| usize::try_from(most - used.min(most)).unwrap_or(usize::MAX);
        let told = new.min(left(TOLD_A_MINUTE, seen));
        let kept = (new - told).min(left(KEPT, kept));
        Self { told, kept, forgotten: new - told - kept }
    }

    fn folded(self) -> usize {
        self.kept + self.forgotten
    }
}

/// What was written, for those who count.
#[derive(Debug, Default)]
pub(super) struct Refused {
    /// The codes of new verdicts, folded ones too.
    pub(super) codes: Vec<RefusalCode>,
    /// How many have an audit entry of their own.
    pub(super) told: usize,
}

/// Writes refusals that are new verdicts: rows of their own with audit entry and event, or folded ones.
pub(super) async fn write_refusals(
    transaction: &Transaction<'_>,
    refusals: &[NewRefusal],
    now: OffsetDateTime,
) -> Result<Refused, StoreError> {
    if refusals.is_empty() {
        return Ok(Refused::default());
    }
    let mut different = HashSet::new();
    let candidates: Vec<&NewRefusal> = refusals.iter().filter(|new| different.insert(verdict(new))).collect();
    let kins: BTreeSet<Kin<'_>> = candidates.iter().map(|new| Kin::of(new)).collect();
    let kins: Vec<Kin<'_>> = kins.into_iter().collect();
    let (meters, known) = read(transaction, &kins, &candidates).await?;
    let mut new_ones: BTreeMap<Kin<'_>, Vec<&NewRefusal>> = BTreeMap::new();
    for (new, _) in candidates.iter().zip(0..).filter(|(_, place)| !known.contains(place)) {
        new_ones.entry(Kin::of(new)).or_default().push(new);
    }
    let (mut told, mut folded, mut folds, mut counted) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut refused = Refused::default();
    for (kin, new) in new_ones {
        refused.codes.extend(new.iter().map(|new| new.refusal.code));
        let Some(meter) = meters.get(&kin) else {
            return Err(StoreError::Conflict("a meter of refusals is not there yet".into()));
        };
        let (meter, share) = meter.count(new.len());
        let (single, rest) = new.split_at(share.told);
        told.extend_from_slice(single);
        if let (Some(id), Some(last)) = (meter.fold, rest.last()) {
            folded.extend(rest[..share.kept].iter().map(|new| (id, *new)));
            let policy = last.sender.policy.as_str();
            let (count, forgotten) = (share.folded(), share.forgotten);
            folds.push(fold::Addition { id, kin, minute: meter.minute, count, forgotten, policy });
        }
        counted.push((kin, meter));
    }
    let (told, (), (), ()) = try_join!(
        insert(transaction, &told, now),
        write_meters(transaction, &counted),
        fold::add(transaction, folds, now),
        fold::remember(transaction, &folded, now),
    )?;
    tell(transaction, &told, now).await?;
    refused.told = told.len();
    Ok(refused)
}

/// By which a verdict is known: the same one makes no second row.
fn verdict(new: &NewRefusal) -> (&str, [u8; 32], &[u8], &str, Option<&str>, bool) {
    let identity = new.sender.identity.as_deref();
    let NewRefusal { principal, id_hash, digest, refusal, sender, .. } = new;
    (principal, *id_hash, digest.bytes(), refusal.code.as_str(), identity, sender.is_verified)
}

/// Locks the meters, and then finds the places of those verdicts that stand already.
async fn read<'a>(
    transaction: &Transaction<'_>,
    kins: &[Kin<'a>],
    candidates: &[&NewRefusal],
) -> Result<(BTreeMap<Kin<'a>, Meter>, HashSet<usize>), StoreError> {
    let lock = transaction.prepare_cached(METERS).await?;
    let known = transaction.prepare_cached(KNOWN_REFUSALS).await?;
    let [principals, identities, ingresses, codes] = columns(kins);
    let verdicts: Vec<_> = candidates.iter().map(|new| verdict(new)).collect();
    let askers: Vec<&str> = verdicts.iter().map(|verdict| verdict.0).collect();
    let hashes: Vec<&[u8]> = verdicts.iter().map(|verdict| verdict.1.as_slice()).collect();
    let digests: Vec<&[u8]> = verdicts.iter().map(|verdict| verdict.2).collect();
    let reasons: Vec<&str> = verdicts.iter().map(|verdict| verdict.3).collect();
    let claims: Vec<Option<&str>> = verdicts.iter().map(|verdict| verdict.4).collect();
    let proved: Vec<bool> = verdicts.iter().map(|verdict| verdict.5).collect();
    let (metered, asked): ([&(dyn ToSql + Sync); 4], [&(dyn ToSql + Sync); 6]) =
        ([&principals, &identities, &ingresses, &codes], [&askers, &hashes, &digests, &reasons, &claims, &proved]);
    let turns: BTreeSet<i32> = kins.iter().map(Kin::turn).collect();
    let turns: Vec<i32> = turns.into_iter().collect();
    let taking: [&(dyn ToSql + Sync); 1] = [&turns];
    let take = transaction.prepare_cached(TURNS).await?;
    // One round trip: they run in this order.
    let (_, (), rows, known) = try_join!(
        async { Ok::<_, StoreError>(transaction.query(&take, &taking).await?) },
        make_meters(transaction, kins),
        async { Ok(transaction.query(&lock, &metered).await?) },
        async { Ok(transaction.query(&known, &asked).await?) },
    )?;
    // Postgres counts from one.
    let place = |row: &Row| usize::try_from(row.get::<_, i64>(0)).ok()?.checked_sub(1);
    let meters = rows.iter().filter_map(|row| {
        let meter = Meter { minute: row.get(1), seen: row.get(2), kept: row.get(3), fold: row.get(5) };
        Some((*kins.get(place(row)?)?, meter.at(row.get(4))))
    });
    Ok((meters.collect(), known.iter().filter_map(place).collect()))
}

/// Makes the meters that are not there yet.
async fn make_meters(transaction: &Transaction<'_>, kins: &[Kin<'_>]) -> Result<(), StoreError> {
    const MAKE: &str = "
        insert into refusal_meter (principal, identity, ingress, code, minute, seen, kept)
        select *, 'epoch'::timestamptz, 0, 0 from unnest($1::text[], $2::text[], $3::text[], $4::text[])
        order by 1, 2, 3, 4 on conflict do nothing";
    let [principals, identities, ingresses, codes] = columns(kins);
    let make = transaction.prepare_cached(MAKE).await?;
    transaction.execute(&make, &[&principals, &identities, &ingresses, &codes]).await?;
    Ok(())
}

/// Under their locks.
async fn write_meters(transaction: &Transaction<'_>, counted: &[(Kin<'_>, Meter)]) -> Result<(), StoreError> {
    const WRITE: &str = "
        update refusal_meter as meter
        set minute = new.minute, seen = new.seen, fold_id = new.fold_id, kept = new.kept
        from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::timestamptz[], $6::bigint[], $7::uuid[],
                    $8::bigint[]) as new(principal, identity, ingress, code, minute, seen, fold_id, kept)
        where meter.principal = new.principal and meter.identity = new.identity and meter.ingress = new.ingress
          and meter.code = new.code";
    let kins: Vec<Kin<'_>> = counted.iter().map(|(kin, _)| *kin).collect();
    let [principals, identities, ingresses, codes] = columns(&kins);
    let minutes: Vec<OffsetDateTime> = counted.iter().map(|(_, meter)| meter.minute).collect();
    let seen: Vec<i64> = counted.iter().map(|(_, meter)| meter.seen).collect();
    let folds: Vec<Option<Uuid>> = counted.iter().map(|(_, meter)| meter.fold).collect();
    let kept: Vec<i64> = counted.iter().map(|(_, meter)| meter.kept).collect();
    let write = transaction.prepare_cached(WRITE).await?;
    let values: [&(dyn ToSql + Sync); 8] =
        [&principals, &identities, &ingresses, &codes, &minutes, &seen, &folds, &kept];
    transaction.execute(&write, &values).await?;
    Ok(())
}

/// Locks meters that are there, and takes so many remembered refusals off each.
pub(super) async fn release(transaction: &Transaction<'_>, gone: &[(Kin<'_>, i64)]) -> Result<(), StoreError> {
    const RELEASE: &str = "
        update refusal_meter as meter set kept = meter.kept - gone.count
        from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[])
             as gone(principal, identity, ingress, code, count)
        where meter.principal = gone.principal and meter.identity = gone.identity and meter.ingress = gone.ingress
          and meter.code = gone.code";
    let kins: Vec<Kin<'_>> = gone.iter().map(|(kin, _)| *kin).collect();
    let [principals, identities, ingresses, codes] = columns(&kins);
    let counts: Vec<i64> = gone.iter().map(|(_, count)| *count).collect();
    let release = transaction.prepare_cached(RELEASE).await?;
    transaction.execute(&release, &[&principals, &identities, &ingresses, &codes, &counts]).await?;
    Ok(())
}

/// Keys of meters, as arrays.
pub(super) fn columns<'a>(kins: &[Kin<'a>]) -> [Vec<&'a str>; 4] {
    let column = |of: fn(&Kin<'a>) -> &'a str| kins.iter().map(of).collect();
    [column(|kin| kin.principal), column(|kin| kin.identity), column(|kin| kin.ingress), column(|kin| kin.code)]
}

/// Rows of their own; those that are new.
async fn insert<'a>(
    transaction: &Transaction<'_>,
    refusals: &[&'a NewRefusal],
    now: OffsetDateTime,
) -> Result<Vec<&'a NewRefusal>, StoreError> {
    const INSERT: &str = "
        insert into refusal (id, principal, id_hash, digest, code, field, message, request_id, ingress, identity,
                             identity_verified, policy, operation, key, traceparent, refused_at, is_whole)
        select *, $16, true from unnest($1::uuid[], $2::text[], $3::bytea[], $4::bytea[], $5::text[], $6::text[],
                             $7::text[], $8::text[], $9::text[], $10::text[], $11::boolean[], $12::text[], $13::text[],
                             $14::text[], $15::text[])
                      as new(id, principal, id_hash, digest, code)
        order by 2, 3, 4, 5, 10, 11
        on conflict do nothing returning id";
    if refusals.is_empty() {
        return Ok(Vec::new());
    }
    let ids: Vec<Uuid> = refusals.iter().map(|new| new.id).collect();
    let principals: Vec<&str> = refusals.iter().map(|new| new.principal.as_str()).collect();
    let hashes: Vec<&[u8]> = refusals.iter().map(|new| new.id_hash.as_slice()).collect();
    let digests: Vec<&[u8]> = refusals.iter().map(|new| new.digest.bytes()).collect();
    let codes: Vec<&str> = refusals.iter().map(|new| new.refusal.code.as_str()).collect();
    let fields: Vec<Option<&str>> = refusals.iter().map(|new| new.refusal.field.as_deref()).collect();
    let messages: Vec<&str> = refusals.iter().map(|new| new.refusal.message.as_str()).collect();
    let request_ids: Vec<Option<&str>> = refusals.iter().map(|new| new.request_id.as_deref()).collect();
    let ingresses: Vec<&str> = refusals.iter().map(|new| new.ingress).collect();
    let insert = transaction.prepare_cached(INSERT).await?;
    let identities: Vec<Option<&str>> = refusals.iter().map(|new| new.sender.identity.as_deref()).collect();
    let verified: Vec<bool> = refusals.iter().map(|new| new.sender.is_verified).collect();
    let policies: Vec<&str> = refusals.iter().map(|new| new.sender.policy.as_str()).collect();
    let operations: Vec<Option<&str>> = refusals.iter().map(|new| new.operation.map(Operation::as_str)).collect();
    let keys: Vec<Option<String>> = refusals.iter().map(|new| new.key.as_ref().map(ToString::to_string)).collect();
    let traces: Vec<Option<&str>> = refusals.iter().map(|new| new.traceparent.as_deref()).collect();
    let columns: [&(dyn ToSql + Sync); 16] = [
        &ids,
        &principals,
        &hashes,
        &digests,
        &codes,
        &fields,
        &messages,
        &request_ids,
        &ingresses,
        &identities,
        &verified,
        &policies,
        &operations,
        &keys,
        &traces,
        &now,
    ];
    let rows = transaction.query(&insert, &columns).await?;
    let new: HashSet<Uuid> = rows.iter().map(|row| row.get(0)).collect();
    Ok(refusals.iter().filter(|refusal| new.contains(&refusal.id)).copied().collect())
}

/// An audit entry and an event for each.
async fn tell(transaction: &Transaction<'_>, new: &[&NewRefusal], now: OffsetDateTime) -> Result<(), StoreError> {
    let entries = new.iter().map(|new| {
        let fact = Fact::new(
            Kind::Refused,
            json!({
                "principal": new.principal,
                "identity": new.sender.identity,
                "identity_verified": new.sender.is_verified,
                "rule": new.rule,
                "policy": new.sender.policy,
                "ingress": new.ingress,
                "request_id": new.request_id,
                "key": new.key.as_ref().map(ToString::to_string),
                "code": new.refusal.code.as_str(),
                "field": new.refusal.field,
            }),
        );
        (new.id, 1, fact.entry(new.id, 1, now))
    });
    insert_audit(transaction, entries.collect()).await?;
    let events = new.iter().map(|new| Event::of_refusal(&summary(new), now));
    insert_events(transaction, &events.collect::<Vec<_>>()).await
}

fn summary(new: &NewRefusal) -> RefusalSummary<'_> {
    RefusalSummary {
        id: new.id,
        principal: &new.principal,
        request_id: new.request_id.as_deref(),
        operation: new.operation.map(Operation::as_str),
        key: new.key.as_ref(),
        code: new.refusal.code.as_str(),
        field: new.refusal.field.as_deref(),
        message: &new.refusal.message,
        traceparent: new.traceparent.as_deref(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use time::Duration;

    const START: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    fn empty() -> Meter {
        Meter { minute: START, seen: 0, fold: None, kept: 0 }
    }

    #[test]
    fn the_first_of_a_minute_are_told_and_the_rest_is_one_fold() {
        let (meter, share) = empty().count(9);
        assert_eq!((share, meter.fold), (Share { told: 9, kept: 0, forgotten: 0 }, None));
        let (meter, share) = meter.at(START).count(9);
        assert_eq!(share, Share { told: 1, kept: 8, forgotten: 0 });
        let fold = meter.fold.unwrap();
        // A worker whose clock was read before the lock was had.
        let (meter, share) = meter.at(START - Duration::minutes(1)).count(3);
        assert_eq!((share.told, share.kept, meter.fold, meter.kept), (0, 3, Some(fold), 11));
        let (next, share) = meter.at(START + Duration::minutes(1)).count(11);
        assert_eq!((share.told, share.kept, next.kept), (10, 1, 12));
        assert_ne!(next.fold, Some(fold));
    }

    #[test]
    fn no_more_are_remembered_than_there_is_room_for() {
        let full = Meter { seen: TOLD_A_MINUTE, kept: KEPT - 2, ..empty() };
        let (meter, share) = full.count(5);
        assert_eq!((share, meter.kept), (Share { told: 0, kept: 2, forgotten: 3 }, KEPT));
        let (meter, share) = meter.at(START + Duration::minutes(1)).count(12);
        assert_eq!((share, meter.kept), (Share { told: 10, kept: 0, forgotten: 2 }, KEPT));
    }

    proptest! {
        /// However a minute's refusals come in slices, and whenever a new one begins.
        #[test]
        fn nothing_is_lost_or_counted_twice(slices in prop::collection::vec((0_usize..400, any::<bool>()), 1..40)) {
            let (mut meter, mut told, mut rows, mut all) = (empty(), 0, 0, 0);
            for (count, is_next) in slices {
                if is_next {
                    (meter, told) = (meter.at(meter.minute + Duration::minutes(1)), 0);
                }
                let (next, share) = meter.count(count);
                prop_assert_eq!(share.told + share.kept + share.forgotten, count);
                (told, rows, all) = (told + share.told, rows + share.told + share.folded(), all + count);
                // The first ones are told of before anything is folded.
                let most = usize::try_from(TOLD_A_MINUTE).unwrap();
                prop_assert!(told <= most && (share.folded() == 0 || told == most));
                prop_assert_eq!(next.fold.is_some(), meter.fold.is_some() || share.folded() > 0);
                meter = next;
            }
            prop_assert_eq!(rows, all);
        }
    }
}
