//! Committed events to the broker, until confirmed.
//!
//! At least once: an event whose confirmation was lost is published again, under the same id.

pub mod rabbitmq;
pub mod sqs;

use crate::retry::{self, Attempts, Class};
use crate::store::{OutboxRow, Queue, Store, StoreError};
use crate::telemetry::{Health, Metrics, Part};
use std::convert::Infallible;
use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// Events under way at most; the broker gains little from a wider window.
const WINDOW: i64 = 200;
/// Held events tried beside a window of fresh ones.
const HELD_WINDOW: i64 = 20;
/// How long a relay may take for a window before another may publish it.
const LEASE: Duration = Duration::from_secs(30);
/// How often the lease on a window is taken anew while the broker blocks it: well before it ends.
const KEEP: Duration = Duration::from_secs(5);
/// How often an idle relay looks for events of processes that died, and for held ones.
const POLL: Duration = Duration::from_secs(1);
/// How often it is looked whether the broker blocks what is under way.
const LOOK: Duration = Duration::from_millis(250);
/// Covers transactions that stamped an event and have not yet committed.
const MARGIN: time::Duration = time::Duration::seconds(15);
/// Every so many looks one ignores the lower bound.
const WHOLE_INDEX_EVERY: u64 = 20;

/// Where events go.
pub trait Destination: Send + Sync {
    /// The transport, as logs and metrics name it.
    const TRANSPORT: &'static str;
    /// What publishes.
    type Publisher: Publisher;

    /// Connects. A session is rebuilt, never mended.
    fn open(&self) -> impl Future<Output = Result<Self::Publisher, PublisherFault<Self>>> + Send;
}

/// Why a publisher of this destination is of no more use.
pub type PublisherFault<D> = <<D as Destination>::Publisher as Publisher>::Error;

/// A session that publishes.
pub trait Publisher: Send + Sync {
    /// Why it is of no more use.
    type Error: fmt::Display + Send;

    /// Publishes a window and waits for all its confirmations; outcomes are in the rows' order.
    fn publish(&self, rows: &[OutboxRow]) -> impl Future<Output = Result<Vec<Publication>, Self::Error>> + Send;

    /// Whether the session still stands; an idle one learns of its end no other way.
    fn check(&self) -> Result<(), Self::Error>;

    /// Whether the broker takes no messages for now and asks to wait, however long it takes.
    fn is_blocked(&self) -> bool {
        false
    }

    /// Ends the session; nothing is under way.
    fn close(self) -> impl Future<Output = ()> + Send;
}

/// What the broker said of one event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Publication {
    /// The broker has it on disk.
    Confirmed,
    /// Confirmed and returned: no queue is bound for it.
    Unroutable,
    /// The broker would not take it, as a full queue does.
    Refused,
    /// There was no time left for it. It stays this relay's, and is published next.
    Late,
}

/// What the relay works with.
#[derive(Debug)]
pub struct Relay<D> {
    /// The broker.
    pub destination: D,
    /// The outbox.
    pub store: Store,
    /// Counters.
    pub metrics: Metrics,
    /// Told when publishing works.
    pub health: Health,
    /// Rung when there are events.
    pub events: Arc<Notify>,
}

impl<D: Destination> Relay<D> {
    /// Publishes until `drain`, and after that until the outbox holds nothing that could be published.
    pub async fn run(self, drain: CancellationToken) {
        let mut failures = Attempts::new(Class::Reconnect);
        let mut cursor = Cursor::default();
        loop {
            let error = match self.destination.open().await {
                Ok(publisher) => {
                    self.metrics.broker_sessions.with_label_values(&[D::TRANSPORT, "events"]).inc();
                    self.health.set(Part::Events, true);
                    let ended = self.publish(&publisher, &drain, &mut cursor, &mut failures).await;
                    self.health.set(Part::Events, false);
                    self.tell_blocked(false);
                    match ended {
                        Ok(()) => {
                            publisher.close().await;
                            return;
                        }
                        Err(error) => {
                            self.metrics.broker_sessions_broken.with_label_values(&[D::TRANSPORT, "events"]).inc();
                            error
                        }
                    }
                }
                Err(error) => {
                    self.metrics.broker_sessions_failed.with_label_values(&[D::TRANSPORT, "events"]).inc();
                    error
                }
            };
            let delay = failures.next_delay();
            tracing::error!(
                error.message = %error, broker.transport = D::TRANSPORT, retry.delay_ms = delay.as_millis(),
                "events are not being published"
            );
            tokio::time::sleep(delay).await;
        }
    }

    async fn publish(
        &self,
        publisher: &D::Publisher,
        drain: &CancellationToken,
        cursor: &mut Cursor,
        failures: &mut Attempts,
    ) -> Result<(), PublisherFault<D>> {
        let mut outage = Attempts::new(Class::Reconnect);
        let mut waiting = None;
        loop {
            self.tell_blocked(publisher.is_blocked());
            // Asked before the look: what is committed during a look may not be in it.
            let is_last = drain.is_cancelled();
            let rows = match self.take(cursor).await {
                Ok(rows) => rows,
                Err(error) => {
                    waiting.get_or_insert_with(|| self.health.wait(Part::Store));
                    let delay = outage.next_delay();
                    tracing::error!(
                        error.message = %error, retry.delay_ms = delay.as_millis(),
                        "the outbox cannot be read"
                    );
                    tokio::time::sleep(delay).await;
                    continue;
                }
            };
            outage.reset();
            waiting = None;
            if rows.is_empty() {
                if is_last {
                    return Ok(());
                }
                tokio::select! {
                    () = self.events.notified() => {}
                    () = tokio::time::sleep(POLL) => publisher.check()?,
                    () = drain.cancelled() => {}
                }
                continue;
            }
            // What a broken session leaves unconfirmed is this relay's for the rest of the lease.
            cursor.unconfirmed.clone_from(&rows);
            let outcomes = self.watched(publisher, &rows).await?;
            failures.reset();
            crate::failpoint!("outbox.after_publish");
            self.record(&rows, &outcomes).await;
            cursor.judge_held(&rows, &outcomes);
            cursor.unconfirmed = late(rows, &outcomes);
            self.keep(&cursor.unconfirmed).await;
        }
    }

    /// Publishes a window, and tells meanwhile whether the broker blocks it. As long as it does, the window stays this
    /// relay's: another would only publish the same again, once the broker goes on.
    async fn watched(
        &self,
        publisher: &D::Publisher,
        rows: &[OutboxRow],
    ) -> Result<Vec<Publication>, PublisherFault<D>> {
        let mut publishing = pin!(publisher.publish(rows));
        let mut looking = pin!(self.look_after(publisher, rows));
        tokio::select! {
            published = &mut publishing => published,
            never = &mut looking => match never {},
        }
    }

    async fn look_after(&self, publisher: &D::Publisher, rows: &[OutboxRow]) -> Infallible {
        let mut kept_at: Option<Instant> = None;
        loop {
            tokio::time::sleep(LOOK).await;
            let is_blocked = publisher.is_blocked();
            self.tell_blocked(is_blocked);
            if is_blocked && kept_at.is_none_or(|at| at.elapsed() >= KEEP) {
                kept_at = Some(Instant::now());
                self.keep(rows).await;
            }
        }
    }

    /// They stay this relay's for another lease.
    async fn keep(&self, rows: &[OutboxRow]) {
        if !rows.is_empty()
            && let Err(error) = self.store.keep_events(rows, LEASE).await
        {
            tracing::warn!(
                error.message = %error,
                "events that wait for the broker could not be kept: others may publish them too"
            );
        }
    }

    fn tell_blocked(&self, is_blocked: bool) {
        let gauge = self.metrics.broker_blocked.with_label_values(&[D::TRANSPORT, "events"]);
        if gauge.get() == i64::from(is_blocked) {
            return;
        }
        gauge.set(i64::from(is_blocked));
        self.health.set_blocked(Part::Events, is_blocked);
        if is_blocked {
            tracing::warn!(
                broker.transport = D::TRANSPORT,
                "the broker takes no messages, for want of memory or disk: events wait"
            );
        } else {
            tracing::info!(broker.transport = D::TRANSPORT, "the broker no longer blocks events");
        }
    }

    /// What a broken session left, else fresh events, else, once in a while, held ones.
    async fn take(&self, cursor: &mut Cursor) -> Result<Vec<OutboxRow>, StoreError> {
        if !cursor.unconfirmed.is_empty() {
            return Ok(cursor.unconfirmed.clone());
        }
        cursor.looks += 1;
        let from = cursor.from.filter(|_| !cursor.looks.is_multiple_of(WHOLE_INDEX_EVERY));
        let mut rows = self.store.take_events(Queue::Fresh, WINDOW, LEASE, from).await?;
        if let Some(first) = rows.iter().map(|row| row.due_at).min() {
            cursor.from = Some(first - MARGIN);
        }
        if cursor.held_at.is_none_or(|at| at.elapsed() >= POLL) {
            cursor.held_at = Some(Instant::now());
            let held = self.store.take_events(Queue::Held, HELD_WINDOW, LEASE, None).await?;
            cursor.held = held.iter().map(|row| row.id).collect();
            rows.extend(held);
        }
        Ok(rows)
    }

    /// Forgets what was confirmed, holds what was not; a store that is away only leads to a second copy.
    async fn record(&self, rows: &[OutboxRow], outcomes: &[Publication]) {
        let confirmed: Vec<i64> = rows
            .iter()
            .zip(outcomes)
            .filter(|(_, outcome)| **outcome == Publication::Confirmed)
            .map(|(row, _)| row.id)
            .collect();
        let held: Vec<(i64, Duration, &'static str)> = rows
            .iter()
            .zip(outcomes)
            .filter_map(|(row, outcome)| {
                let reason = match outcome {
                    Publication::Confirmed | Publication::Late => return None,
                    Publication::Unroutable => "unroutable",
                    Publication::Refused => "refused by the broker",
                };
                let attempt = u32::try_from(row.attempts).unwrap_or(1);
                let delay = retry::envelope(Class::Unroutable, attempt);
                tracing::warn!(event.id = %row.event_id, event.routing_key = row.routing_key, retry.delay_ms = delay.as_millis(),
                               "event held: {reason}");
                Some((row.id, delay, reason))
            })
            .collect();
        self.metrics.events_published.inc_by(confirmed.len() as u64);
        self.metrics.events_held.inc_by(held.len() as u64);
        let forgotten = async {
            if !confirmed.is_empty() {
                self.store.forget_events(&confirmed).await?;
            }
            if !held.is_empty() {
                self.store.hold_events(&held).await?;
            }
            Ok::<(), StoreError>(())
        };
        if let Err(error) = forgotten.await {
            tracing::error!(
                error.message = %error, events.count = rows.len(),
                "published events could not be marked; they will be published again"
            );
        }
    }
}

/// The trace context that an event carries: consumers find it where their transport keeps it, without reading the body.
fn traceparent(body: &str) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Head {
        traceparent: Option<String>,
    }
    // Most events have none, and bodies are long.
    if !body.contains("\"traceparent\":") {
        return None;
    }
    serde_json::from_str::<Head>(body).ok()?.traceparent
}

/// What comes next, in its order: events of one key must not pass each other.
fn late(rows: Vec<OutboxRow>, outcomes: &[Publication]) -> Vec<OutboxRow> {
    rows.into_iter().zip(outcomes).filter(|(_, outcome)| **outcome == Publication::Late).map(|(row, _)| row).collect()
}

/// Where the relay stands.
#[derive(Default)]
struct Cursor {
    unconfirmed: Vec<OutboxRow>,
    /// No fresh event is due before this, as far as is known.
    from: Option<OffsetDateTime>,
    looks: u64,
    /// When held events were last tried, and which.
    held_at: Option<Instant>,
    held: Vec<i64>,
}

impl Cursor {
    /// A full window of held events that the broker now took: whatever was wrong is mended, on with the next.
    fn judge_held(&mut self, rows: &[OutboxRow], outcomes: &[Publication]) {
        let held = std::mem::take(&mut self.held);
        let is_full = i64::try_from(held.len()) == Ok(HELD_WINDOW);
        let mut of_held = rows.iter().zip(outcomes).filter(|(row, _)| held.contains(&row.id));
        if is_full && of_held.all(|(_, outcome)| *outcome == Publication::Confirmed) {
            self.held_at = None;
        }
    }
}
