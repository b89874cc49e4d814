//! Events to an SQS queue, in batches.
//!
//! On a FIFO queue the events of one KMS key are in order, as far as they are published in one window, and a copy within
//! five minutes is dropped by SQS itself: its deduplication id is the event's id.

use super::{Destination, Publication};
use crate::sqs::{Attribute, Batch, CallError, Order, Outcome, Outgoing, Queue};
use crate::store::OutboxRow;
use serde::Deserialize;
use std::time::Duration;
use tokio::time::Instant;

/// Calls for one event before it is held.
const ATTEMPTS: u32 = 3;
/// Calls for a window begin within this: with the last one's own timeout well within the lease that a relay has on its
/// events. On FIFO a window whose events are all of one key takes as many calls as events, one after the other.
const WINDOW_TIMEOUT: Duration = Duration::from_secs(20);

/// A queue of events.
#[derive(Clone, Debug)]
pub struct Events {
    /// The queue.
    pub queue: Queue,
}

/// Why events cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// SQS, or the way to it.
    #[error(transparent)]
    Call(#[from] CallError),
    /// Nothing of a window was taken for so long.
    #[error("SQS took no event of a window within {} s", .0.as_secs())]
    Timeout(Duration),
}

/// A queue that was there when it was last asked for.
#[derive(Debug)]
pub struct Publisher {
    queue: Queue,
}

/// Of an event, what the queue's attributes and order are made of.
#[derive(Default, Deserialize)]
struct Head {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    subject: Option<String>,
    #[serde(default)]
    traceparent: Option<String>,
}

impl Destination for Events {
    const TRANSPORT: &'static str = "sqs";
    type Publisher = Publisher;

    async fn open(&self) -> Result<Publisher, PublishError> {
        self.queue.attributes().await?;
        Ok(Publisher { queue: self.queue.clone() })
    }
}

impl super::Publisher for Publisher {
    type Error = PublishError;

    /// A window of which SQS took nothing, for want of SQS, is an error; one of which it took a part is not: the rest is
    /// held, and nothing that was taken is sent twice. What there was no time for is left to the next window, so that each
    /// gets further than the one before.
    async fn publish(&self, rows: &[OutboxRow]) -> Result<Vec<Publication>, PublishError> {
        let messages: Vec<Outgoing> = rows.iter().map(|row| message(row, self.queue.is_fifo())).collect();
        let until = Instant::now() + WINDOW_TIMEOUT;
        let outcomes = self.queue.carry_out_until(Batch::Send(&messages), ATTEMPTS, until).await;
        let failed = outcomes.iter().find_map(|outcome| match outcome {
            Outcome::Failed(error) => Some(error.clone()),
            _ => None,
        });
        if let Some(error) = failed
            && !outcomes.contains(&Outcome::Done)
        {
            return Err(error.into());
        }
        if !outcomes.is_empty() && outcomes.iter().all(|outcome| *outcome == Outcome::Late) {
            return Err(PublishError::Timeout(WINDOW_TIMEOUT));
        }
        let told = rows.iter().zip(outcomes).map(|(row, outcome)| match outcome {
            Outcome::Done => Publication::Confirmed,
            Outcome::Late => Publication::Late,
            outcome => {
                tracing::warn!(
                    event.id = %row.event_id, queue.name = self.queue.name(), sqs.outcome = %outcome,
                    "an event was not sent"
                );
                Publication::Refused
            }
        });
        Ok(told.collect())
    }

    /// There is no connection that could break unseen.
    fn check(&self) -> Result<(), PublishError> {
        Ok(())
    }

    async fn close(self) {}
}

fn message(row: &OutboxRow, is_fifo: bool) -> Outgoing {
    // An event that cannot be read is sent as it is.
    let Head { kind, subject, traceparent } = serde_json::from_str(&row.body).unwrap_or_default();
    let id = row.event_id.to_string();
    let group = subject.filter(|subject| Order::is_group(subject)).unwrap_or_else(|| id.clone());
    let mut attributes = vec![
        Attribute::text("content-type", "application/cloudevents+json"),
        Attribute::text("routing-key", row.routing_key.as_str()),
    ];
    // SQS takes no empty value.
    if !kind.is_empty() {
        attributes.push(Attribute::text("type", kind));
    }
    attributes.extend(traceparent.map(|trace| Attribute::text("traceparent", trace)));
    let order = is_fifo.then_some(Order { group, deduplication: id });
    Outgoing { body: row.body.clone(), attributes, order }
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::OffsetDateTime;
    use uuid::Uuid;

    fn row(body: &str) -> OutboxRow {
        OutboxRow {
            id: 1,
            event_id: Uuid::from_u128(7),
            routing_key: "job.failed.import.111122223333.eu-central-1".into(),
            body: body.into(),
            attempts: 1,
            due_at: OffsetDateTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn an_event_is_ordered_by_its_key_and_known_by_its_id() {
        let arn = "arn:aws:kms:eu-central-1:111122223333:key/031c5703-aaf7-425e-a141-7e0c6f5886ab";
        let id = Uuid::from_u128(7).to_string();
        let body = format!(r#"{{"type":"io.keyferry.job.failed","subject":"{arn}"}}"#);
        let event = message(&row(&body), true);
        assert_eq!(event.order, Some(Order { group: arn.into(), deduplication: id.clone() }));
        assert_eq!(event.body, body);
        let names: Vec<&str> = event.attributes.iter().map(|attribute| attribute.name.as_str()).collect();
        assert_eq!(names, ["content-type", "routing-key", "type"]);
        assert_eq!(message(&row(&body), false).order, None);
        // A refusal has no key; a subject that SQS would not take is none.
        for body in ["{}", r#"{"subject":"a b"}"#, r#"{"subject":""}"#, "no JSON"] {
            assert_eq!(message(&row(body), true).order.unwrap().group, id, "{body}");
        }
    }
}
