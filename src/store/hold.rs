//! Holds: what an operator has stopped, at once, in every worker, for as long as it is not released.
//!
//! A claim that finds its job held parks the line: it is due at no time, and remembers the hold. A release is committed
//! first, and then wakes the lines in pages; a line that is parked by a hold that was released meanwhile, by a claim
//! that had read of it before, or whose release was killed, is woken by the housekeeping of whichever worker is next.
//! So neither a park nor a wake is lost, and nobody waits for a lock.
//!
//! An urgent job that is held is parked by itself, and its line goes on with what is not, unless something of it is in
//! doubt, which is settled first.

use super::accept::insert_audit;
use super::{ClaimedJob, Ending, ReplicaStep, Replicas, Store, StoreError, urgent};
use crate::audit::{Fact, Kind};
use crate::job::KeyArn;
use deadpool_postgres::Transaction;
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use time::OffsetDateTime;
use tokio_postgres::Row;
use uuid::Uuid;

/// Lines that one transaction wakes at most.
const WAKE_PAGE: i64 = 500;

/// What a hold stops.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Every job.
    Everything,
    /// Jobs on KMS keys of this AWS account.
    Account(String),
    /// Jobs on KMS keys of this Region.
    Region(String),
    /// Jobs that this principal asked for.
    Principal(String),
    /// Jobs on this KMS key; of a multi-Region key, in all Regions.
    Key(KeyArn),
}

impl Scope {
    /// The word for it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Everything => "everything",
            Self::Account(_) => "account",
            Self::Region(_) => "region",
            Self::Principal(_) => "principal",
            Self::Key(_) => "key",
        }
    }

    /// What it names; a key by the name of its line.
    pub fn value(&self) -> String {
        match self {
            Self::Everything => String::new(),
            Self::Account(value) | Self::Region(value) | Self::Principal(value) => value.clone(),
            Self::Key(key) => key.order_key(),
        }
    }

    /// The scopes within which a job is.
    fn of_job(principal: &str, key: &KeyArn) -> [Self; 5] {
        [
            Self::Everything,
            Self::Account(key.account().to_owned()),
            Self::Region(key.region().to_owned()),
            Self::Principal(principal.to_owned()),
            Self::Key(key.clone()),
        ]
    }
}

/// A hold that is in force.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Hold {
    /// Its id, by which the audit trail knows it.
    pub id: Uuid,
    /// `everything`, `account`, `region`, `principal` or `key`.
    pub scope: String,
    /// What it names; empty for everything.
    pub value: String,
    /// Why, as the operator said.
    pub reason: Option<String>,
    /// Who.
    pub by: String,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
}

/// What became of a hold that was asked for.
#[derive(Debug)]
pub enum Held {
    /// It is in force now.
    Now(Hold),
    /// The same was held before, and stays so.
    Before(Hold),
}

/// What stops a job between two of its steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// An operator wants it ended: it ends.
    Ending(Ending),
    /// It is within a hold: it waits.
    Held,
}

/// Holds in force, as jobs are compared with them.
#[derive(Debug, Default)]
pub(super) struct Holds(HashMap<(String, String), Uuid>);

impl Holds {
    /// Reads what is in force.
    pub(super) async fn read(transaction: &Transaction<'_>) -> Result<Self, StoreError> {
        let read = transaction.prepare_cached("select scope, value, id from hold where released_at is null").await?;
        let rows = transaction.query(&read, &[]).await?;
        Ok(Self(rows.iter().map(|row| ((row.get(0), row.get(1)), row.get(2))).collect()))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One that stops such a job.
    pub(super) fn on(&self, principal: &str, key: &KeyArn) -> Option<Uuid> {
        if self.is_empty() {
            return None;
        }
        let scopes = Scope::of_job(principal, key);
        scopes.iter().find_map(|scope| self.0.get(&(scope.kind().to_owned(), scope.value())).copied())
    }
}

const COLUMNS: &str = "id, scope, value, reason, held_by, held_at";

impl Store {
    /// Stops what is within a scope. Once this has returned no worker begins a job within it, nor commits itself to another
    /// step; what was committed before is still done: a call under way, or one that a worker is about to send.
    /// [`Self::under_way`] counts these.
    pub async fn hold(&self, scope: &Scope, reason: Option<&str>, operator: &str) -> Result<Held, StoreError> {
        let id = Uuid::now_v7();
        self.retrying(|| self.hold_once(id, scope, reason, operator)).await
    }

    async fn hold_once(
        &self,
        id: Uuid,
        scope: &Scope,
        reason: Option<&str>,
        operator: &str,
    ) -> Result<Held, StoreError> {
        const INSERT: &str = "
            insert into hold (id, scope, value, reason, held_by, held_at) values ($1, $2, $3, $4, $5, keyferry_now())
            on conflict (scope, value) where released_at is null do nothing";
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let value = scope.value();
        let new = transaction.execute(INSERT, &[&id, &scope.kind(), &value, &reason, &operator]).await? == 1;
        let read = format!("select {COLUMNS} from hold where released_at is null and scope = $1 and value = $2");
        let Some(row) = transaction.query_opt(&read, &[&scope.kind(), &value]).await? else {
            // Released between the two statements.
            return Err(StoreError::Conflict("the hold was released at the same time".into()));
        };
        let hold = hold_of(&row);
        if !new {
            return Ok(Held::Before(hold));
        }
        let details = json!({"scope": hold.scope, "value": hold.value, "reason": reason, "operator": operator});
        insert_audit(&transaction, vec![(id, 1, Fact::new(Kind::Held, details).entry(id, 1, hold.at))]).await?;
        transaction.commit().await?;
        Ok(Held::Now(hold))
    }

    /// Ends the hold on just this scope; `None` when there is none. The lines that it parked are woken by
    /// [`Self::wake_parked`], here or in any worker.
    pub async fn release(&self, scope: &Scope, operator: &str) -> Result<Option<Hold>, StoreError> {
        self.retrying(|| self.release_once(scope, operator)).await
    }

    async fn release_once(&self, scope: &Scope, operator: &str) -> Result<Option<Hold>, StoreError> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let update = format!(
            "update hold set released_by = $3, released_at = keyferry_now()
             where released_at is null and scope = $1 and value = $2 returning {COLUMNS}, released_at"
        );
        let row = transaction.query_opt(&update, &[&scope.kind(), &scope.value(), &operator]).await?;
        let Some(row) = row else { return Ok(None) };
        let (hold, now) = (hold_of(&row), row.get(6));
        let details = json!({"scope": hold.scope, "value": hold.value, "operator": operator});
        insert_audit(&transaction, vec![(hold.id, 2, Fact::new(Kind::HoldReleased, details).entry(hold.id, 2, now))])
            .await?;
        transaction.commit().await?;
        Ok(Some(hold))
    }

    /// Holds in force, the oldest first.
    pub async fn holds(&self) -> Result<Vec<Hold>, StoreError> {
        let list = format!("select {COLUMNS} from hold where released_at is null order by held_at, id");
        self.retrying(|| async {
            let client = self.client().await?;
            let list = client.prepare_cached(&list).await?;
            Ok(client.query(&list, &[]).await?.iter().map(hold_of).collect())
        })
        .await
    }

    /// Whether an operator has stopped a job since its last step, other than by an ending that it goes on despite. Asked
    /// between two mutating calls of an attempt.
    pub async fn is_stopped(&self, job: Uuid, despite: Option<Ending>) -> Result<Option<Stop>, StoreError> {
        const CANCELLED: &str = "select abandons from cancellation where job_id = $1";
        self.retrying(|| async {
            let mut client = self.client().await?;
            let transaction = client.transaction().await?;
            let read = transaction.prepare_cached(CANCELLED).await?;
            let ending = transaction.query_opt(&read, &[&job]).await?.map(|row| Ending::of(row.get(0)));
            if let Some(ending) = ending.filter(|ending| Some(*ending) != despite) {
                return Ok(Some(Stop::Ending(ending)));
            }
            let held = held_jobs(&transaction, &[(job, None)]).await?;
            Ok((!held.is_empty()).then_some(Stop::Held))
        })
        .await
    }

    /// Whether an operator holds what this principal does to this key.
    pub async fn is_held(&self, principal: &str, key: &KeyArn) -> Result<bool, StoreError> {
        self.retrying(|| async {
            let mut client = self.client().await?;
            let transaction = client.transaction().await?;
            Ok(Holds::read(&transaction).await?.on(principal, key).is_some())
        })
        .await
    }

    /// How many jobs within a scope are under way: each ends the step that it is in.
    pub async fn under_way(&self, scope: &Scope) -> Result<usize, StoreError> {
        const LEASED: &str = "
            select job.principal, kms_key.arn, progress.replicas from line
            join job on job.line_id = line.id and job.seq = coalesce(line.urgent_seq, line.head_seq)
            join kms_key on kms_key.id = job.kms_key_id
            left join progress on progress.job_id = job.id
            where line.token is not null and line.due_at > keyferry_now()";
        let client = self.client().await?;
        let is_within = |row: &&Row| {
            let key = KeyArn::parse(row.get(1));
            key.is_ok_and(|key| {
                let (kind, value) = (scope.kind(), scope.value());
                let replicas = Replicas::read(row.get(2));
                // A rotate is at work in other Regions as well.
                let is_elsewhere = kind == "region" && replicas.0.get(&value) == Some(&ReplicaStep::Tried);
                is_elsewhere
                    || Scope::of_job(row.get(0), &key).iter().any(|of| of.kind() == kind && of.value() == value)
            })
        };
        Ok(client.query(LEASED, &[]).await?.iter().filter(is_within).count())
    }

    /// Wakes a page of lines, and of urgent jobs, that are parked by holds which are no longer in force. Says how many; nothing is left when
    /// there were none.
    pub async fn wake_parked(&self) -> Result<usize, StoreError> {
        self.retrying(|| self.wake_parked_once()).await
    }

    async fn wake_parked_once(&self) -> Result<usize, StoreError> {
        // From one hold that parks anything to the next, along the indexes.
        const RELEASED: &str = "
            with recursive parking(id) as (
                select '00000000-0000-0000-0000-000000000000'::uuid
                union all
                select (select parked_by from (
                            select parked_by from line where parked_by > parking.id
                            union all
                            select parked_by from urgent where parked_by > parking.id
                        ) as parked order by parked_by limit 1)
                from parking where parking.id is not null
            )
            select array_agg(parking.id) from parking join hold on hold.id = parking.id where hold.released_at is not null";
        const WAKE: &str = "
            with woken as materialized (
                select id from line where parked_by = any($1) order by parked_by, id limit $2 for no key update skip locked
            )
            update line set due_at = keyferry_now(), parked_by = null from woken where line.id = woken.id";
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let released = transaction.prepare_cached(RELEASED).await?;
        let Some(released) = transaction.query_one(&released, &[]).await?.get::<_, Option<Vec<Uuid>>>(0) else {
            return Ok(0);
        };
        let wake = transaction.prepare_cached(WAKE).await?;
        let woken = transaction.execute(&wake, &[&released, &WAKE_PAGE]).await?;
        let woken = woken + urgent::wake(&transaction, &released, WAKE_PAGE).await?;
        transaction.commit().await?;
        Ok(usize::try_from(woken).unwrap_or(0))
    }
}

/// A job that was claimed just now, and the hold on it.
pub(super) struct Parked<'a> {
    pub(super) by: Uuid,
    pub(super) job: &'a ClaimedJob,
}

/// Parks lines that were claimed just now, each by a hold on its job. Their claims do not count.
pub(super) async fn park(transaction: &Transaction<'_>, lines: &BTreeMap<i64, Parked<'_>>) -> Result<(), StoreError> {
    const URGENT: &str = "select id, urgent_seq from line where id = any($1) and urgent_seq is not null";
    const PARK: &str = "
        update line set token = null, urgent_seq = null, due_at = 'infinity', parked_by = held.hold,
                        attempt = line.attempt - (line.urgent_seq is null)::int
        from unnest($1::bigint[], $2::uuid[]) as held(id, hold) where line.id = held.id";
    let Some(now) = lines.values().next().map(|parked| parked.job.now) else { return Ok(()) };
    let (ids, holds): (Vec<i64>, Vec<Uuid>) = lines.iter().map(|(line, parked)| (*line, parked.by)).unzip();
    let overtaken = transaction.prepare_cached(URGENT).await?;
    let rows = transaction.query(&overtaken, &[&ids]).await?;
    let places: Vec<(i64, i64)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    urgent::uncount(transaction, &places).await?;
    let park = transaction.prepare_cached(PARK).await?;
    transaction.execute(&park, &[&ids, &holds]).await?;
    let aside = places.iter().filter_map(|(line, seq)| {
        let parked = lines.get(line).filter(|parked| !parked.job.progress.may_have_changed_aws())?;
        Some((*line, *seq, parked.by))
    });
    urgent::step_aside(transaction, &aside.collect::<Vec<_>>(), now).await
}

const JOBS: &str = "
    select job.id, job.principal, kms_key.arn from job join kms_key on kms_key.id = job.kms_key_id
    where job.id = any($1)";

/// Which of these jobs are held, each on its own key and, where one is named, on that key's replica in which it is at work.
/// Asked before AWS is changed; costs one look where nothing is.
pub(super) async fn held_jobs(
    transaction: &Transaction<'_>,
    jobs: &[(Uuid, Option<&KeyArn>)],
) -> Result<Vec<Uuid>, StoreError> {
    let holds = Holds::read(transaction).await?;
    if holds.is_empty() {
        return Ok(Vec::new());
    }
    let replicas: HashMap<Uuid, &KeyArn> = jobs.iter().filter_map(|(job, replica)| Some((*job, (*replica)?))).collect();
    let ids: Vec<Uuid> = jobs.iter().map(|(job, _)| *job).collect();
    let read = transaction.prepare_cached(JOBS).await?;
    let rows = transaction.query(&read, &[&ids]).await?;
    let is_held = |row: &&Row| {
        let on = |key: &KeyArn| holds.on(row.get(1), key).is_some();
        KeyArn::parse(row.get(2)).is_ok_and(|key| on(&key))
            || replicas.get(&row.get(0)).is_some_and(|replica| on(replica))
    };
    Ok(rows.iter().filter(is_held).map(|row| row.get(0)).collect())
}

fn hold_of(row: &Row) -> Hold {
    Hold { id: row.get(0), scope: row.get(1), value: row.get(2), reason: row.get(3), by: row.get(4), at: row.get(5) }
}
