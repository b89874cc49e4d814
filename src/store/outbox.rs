//! The outbox: events until the broker has confirmed them.

use super::claim::millis;
use super::{Store, StoreError};
use std::time::Duration;
use time::OffsetDateTime;
use uuid::Uuid;

/// An event that this process may publish until its lease ends.
#[derive(Clone, Debug)]
pub struct OutboxRow {
    /// Place in the outbox.
    pub id: i64,
    /// The event's id.
    pub event_id: Uuid,
    /// Topic.
    pub routing_key: String,
    /// CloudEvents JSON.
    pub body: String,
    /// Attempts made, this one included.
    pub attempts: i32,
    /// When it was due.
    pub due_at: OffsetDateTime,
}

/// The two queues of the outbox. Neither delays the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// Never refused by the broker.
    Fresh,
    /// The broker could not route them, or would not take them.
    Held,
}

impl Store {
    /// Takes up to `most` due events for `lease`.
    ///
    /// `from` is a lower bound of `due_at` that keeps the scan away from dead index entries.
    pub async fn take_events(
        &self,
        queue: Queue,
        most: i64,
        lease: Duration,
        from: Option<OffsetDateTime>,
    ) -> Result<Vec<OutboxRow>, StoreError> {
        // Two statements, so that each has its own partial index.
        macro_rules! take {
            ($queue:literal) => {
                concat!(
                    "with due as materialized (
                        select id, due_at from outbox where held_because ",
                    $queue,
                    " and due_at >= coalesce($3::timestamptz, '-infinity') and due_at <= (select keyferry_now())
                        order by due_at limit $1 for update skip locked)
                    update outbox set due_at = keyferry_now() + $2 * interval '1 ms', attempts = attempts + 1
                    from due where outbox.id = due.id
                    returning outbox.id, event_id, routing_key, body, attempts, due.due_at"
                )
            };
        }
        let statement = match queue {
            Queue::Fresh => take!("is null"),
            Queue::Held => take!("is not null"),
        };
        self.retrying(|| async {
            let client = self.client().await?;
            let take = client.prepare_cached(statement).await?;
            let rows = client.query(&take, &[&most, &millis(lease), &from]).await?;
            let mut taken: Vec<OutboxRow> = rows
                .iter()
                .map(|row| OutboxRow {
                    id: row.get(0),
                    event_id: row.get(1),
                    routing_key: row.get(2),
                    body: row.get(3),
                    attempts: row.get(4),
                    due_at: row.get(5),
                })
                .collect();
            taken.sort_unstable_by_key(|row| row.id);
            Ok(taken)
        })
        .await
    }

    /// Keeps events for another `lease`, counted from now: those that nobody else has taken since.
    pub async fn keep_events(&self, rows: &[OutboxRow], lease: Duration) -> Result<(), StoreError> {
        const KEEP: &str = "
            with kept as materialized (
                select outbox.id from unnest($1::bigint[], $2::integer[]) as asked(id, attempts)
                join outbox on outbox.id = asked.id and outbox.attempts = asked.attempts
                order by outbox.id for update of outbox)
            update outbox set due_at = keyferry_now() + $3 * interval '1 ms' from kept where outbox.id = kept.id";
        let ids: Vec<i64> = rows.iter().map(|row| row.id).collect();
        let attempts: Vec<i32> = rows.iter().map(|row| row.attempts).collect();
        self.retrying(|| async {
            let client = self.client().await?;
            let keep = client.prepare_cached(KEEP).await?;
            client.execute(&keep, &[&ids, &attempts, &millis(lease)]).await?;
            Ok(())
        })
        .await
    }

    /// Forgets events that the broker has confirmed.
    pub async fn forget_events(&self, ids: &[i64]) -> Result<(), StoreError> {
        const FORGET: &str = "
            delete from outbox where id in (select id from outbox where id = any($1) order by id for update)";
        self.retrying(|| async {
            let client = self.client().await?;
            let forget = client.prepare_cached(FORGET).await?;
            client.execute(&forget, &[&ids]).await?;
            Ok(())
        })
        .await
    }

    /// Holds events that the broker would not take: each waits for its delay, apart from the others.
    pub async fn hold_events(&self, held: &[(i64, Duration, &'static str)]) -> Result<(), StoreError> {
        const HOLD: &str = "
            update outbox set due_at = keyferry_now() + held.delay * interval '1 ms', held_because = held.reason
            from unnest($1::bigint[], $2::float8[], $3::text[]) as held(id, delay, reason)
            where outbox.id = held.id";
        let mut held = held.to_vec();
        held.sort_unstable_by_key(|(id, ..)| *id);
        let ids: Vec<i64> = held.iter().map(|(id, ..)| *id).collect();
        let delays: Vec<f64> = held.iter().map(|(_, delay, _)| millis(*delay)).collect();
        let reasons: Vec<&str> = held.iter().map(|(.., reason)| *reason).collect();
        self.retrying(|| async {
            let client = self.client().await?;
            let hold = client.prepare_cached(HOLD).await?;
            client.execute(&hold, &[&ids, &delays, &reasons]).await?;
            Ok(())
        })
        .await
    }
}
