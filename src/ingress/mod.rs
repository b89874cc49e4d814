//! Broker deliveries in, settlements out.
//!
//! One shape for every transport: an [`Ingress`] opens sessions, a [`Session`] gives batches and takes their settlements.

pub mod rabbitmq;
pub mod sqs;

use crate::job::Envelope;
use std::fmt;
use std::time::Duration;
use tokio::time::Instant;

/// A queue that requests come from.
pub trait Ingress: Send + Sync {
    /// The transport, as rows, entries, logs and metrics name it.
    const TRANSPORT: &'static str;
    /// What consumes.
    type Session: Session;

    /// The queue, as an operator names it. Part of a body's keyed hash and of a signature's audience.
    fn queue(&self) -> &str;

    /// Connects and consumes. A session is rebuilt, never mended.
    fn open(&self) -> impl Future<Output = Result<Self::Session, SessionFault<Self>>> + Send;
}

/// Why a session of this ingress is of no more use.
pub type SessionFault<I> = <<I as Ingress>::Session as Session>::Error;

/// A consumer with at most one batch in hand. What it holds is the broker's again once it has ended.
pub trait Session: Send {
    /// Why it is of no more use.
    type Error: fmt::Display + Send;

    /// Waits for a message, then takes what is already there, up to `most`. Safe to drop while waiting.
    fn next_batch(&mut self, most: usize) -> impl Future<Output = Result<Vec<Delivery>, Self::Error>> + Send;

    /// Settles the batch in hand, in its order.
    fn settle(&mut self, settlements: &[Settlement]) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Ends the session: takes no more, gives back what is in hand.
    fn give_back(self) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Ends a session that is of no more use: what it holds and the broker would not have back by itself is given back,
    /// as far as that goes within a bound.
    fn abandon(self) -> impl Future<Output = ()> + Send;
}

/// A message in hand.
#[derive(Debug)]
pub struct Delivery {
    /// As published.
    pub body: Vec<u8>,
    /// The transport's content type.
    pub content_type: Option<String>,
    /// The transport's message id, where it has one that the publisher sets.
    pub message_id: Option<String>,
    /// As sent; see [`Self::traceparent`].
    pub traceparent: Option<String>,
    /// Whom the broker says it comes from.
    pub sender: Option<Sender>,
    /// The header [`SIGNATURE_HEADER`], unverified.
    pub signature: Option<String>,
    /// The header [`REDRIVE_HEADER`], unverified: the refusal of which this is the message, sent again.
    pub redrive: Option<String>,
    /// When it was received.
    pub received: Instant,
}

/// Header or attribute that holds a detached signature over the body.
pub const SIGNATURE_HEADER: &str = "keyferry-signature";
/// Header or attribute that names the refusal of a message that is sent again.
pub const REDRIVE_HEADER: &str = "keyferry-redrive";

/// Whom a broker says a message comes from, by its own word.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Sender {
    /// The property `user-id`, which RabbitMQ compares with the connection's user.
    RabbitMqUser(String),
    /// The role part of SQS's `SenderId`: `AROA...`.
    AwsRole(String),
    /// A `user-id` that RabbitMQ has not compared with whoever put the message into this queue: a broker passed it on.
    PassedOn(String),
}

/// How a message is settled, once its verdict is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// Its job is in the inbox, now or from before.
    Done,
    /// It was refused: to the dead-letter queue.
    DeadLetter,
}

impl Delivery {
    /// What was delivered, as the parser takes it.
    pub fn envelope(&self) -> Envelope<'_> {
        Envelope {
            body: &self.body,
            content_type: self.content_type.as_deref(),
            message_id: self.message_id.as_deref(),
        }
    }

    /// W3C trace context, if the publisher sent a well-formed one.
    pub fn traceparent(&self) -> Option<&str> {
        self.traceparent.as_deref().filter(|text| is_traceparent(text))
    }

    /// How long it has been in hand.
    pub fn age(&self) -> Duration {
        self.received.elapsed()
    }
}

/// `version-trace-parent-flags` in lower-case hex (W3C Trace Context, 3.2). Ids of zeros and the version `ff` are invalid.
fn is_traceparent(text: &str) -> bool {
    let lengths = [2, 32, 16, 2];
    let parts: Vec<&str> = text.split('-').collect();
    let is_hex = |part: &str| part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let is_zero = |part: &str| part.bytes().all(|b| b == b'0');
    let [version, trace, parent, _] = parts[..] else { return false };
    parts.iter().zip(lengths).all(|(part, length)| part.len() == length && is_hex(part))
        && version != "ff"
        && !is_zero(trace)
        && !is_zero(parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_is_four_hex_fields() {
        assert!(is_traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"));
        for text in [
            "",
            "00-4bf9-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-",
            "a\nb",
        ] {
            assert!(!is_traceparent(text), "{text}");
        }
    }
}
