//! Dead letters: looked at without taking them, matched to their refusals, and sent again.
//!
//! One shape for every transport: a [`DeadLetters`] opens a [`Session`] that holds every letter it has shown, in the
//! queue's order, until it gives all of them back at once. None is settled but one that was sent again and confirmed.

pub mod known;
pub mod mask;
pub mod rabbitmq;
pub mod sqs;

use crate::ingress::Sender;
use crate::job::Envelope;
use crate::policy::{Signed, Signer};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use time::OffsetDateTime;
use tokio::time::Instant;
use uuid::Uuid;

/// A dead-letter queue and the queue of requests that its letters go back to.
pub trait DeadLetters: Send + Sync {
    /// The transport, as rows name it.
    const TRANSPORT: &'static str;
    /// What reads.
    type Session: Session;

    /// The queue of requests, as bodies' keyed hashes know it.
    fn requests(&self) -> &str;

    /// The dead-letter queue's name.
    fn dead(&self) -> &str;

    /// Connects. Nothing is taken yet.
    fn open(&self) -> impl Future<Output = Result<Self::Session, SessionFault<Self>>> + Send;
}

/// Why a session with these dead letters is of no more use.
pub type SessionFault<D> = <<D as DeadLetters>::Session as Session>::Error;

/// A reader. What it has shown is hidden from other readers until it is gone.
pub trait Session: Send {
    /// Why it is of no more use. Everything that was not sent again is the queue's.
    type Error: std::error::Error + Send + Sync + 'static;

    /// What was there when it was opened.
    fn census(&self) -> &Census;

    /// The next letters, up to `most`, in the queue's order where it has one. None: everything that was there when the session was opened
    /// has been shown. What comes meanwhile, as a letter that was sent again and refused again, is for the next session.
    fn next_batch(&mut self, most: usize) -> impl Future<Output = Result<Vec<Letter>, Self::Error>> + Send;

    /// Sends letters of the last batch again, and settles those that are confirmed; outcomes are in the slice's order.
    fn redrive(&mut self, chosen: &[Chosen]) -> impl Future<Output = Result<Vec<Sent>, Self::Error>> + Send;

    /// Gives back what was not sent again, all at once and in its order.
    fn give_back(self) -> impl Future<Output = Result<(), Self::Error>> + Send;
}

/// What a session finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Census {
    /// Letters that wait.
    pub waiting: u64,
    /// What whoever looks should know of this look, as of letters that cannot be seen.
    pub cautions: Vec<String>,
}

/// Signs what is sent again, by the store's clock. A redrive can take longer than a signature lives.
#[derive(Clone)]
pub struct Stamp {
    signer: Arc<Signer>,
    asked: OffsetDateTime,
    since: Instant,
}

impl Stamp {
    /// With the store's time of now.
    pub fn new(signer: Signer, now: OffsetDateTime) -> Self {
        Self { signer: Arc::new(signer), asked: now, since: Instant::now() }
    }

    /// The header `keyferry-signature`; `None` where a part cannot be signed.
    pub fn header(&self, signed: Signed<'_>) -> Option<String> {
        self.signer.header(self.asked + self.since.elapsed(), signed)
    }
}

impl fmt::Debug for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stamp(..)")
    }
}

/// A letter to be sent again.
#[derive(Clone, Copy, Debug)]
pub struct Chosen {
    /// Its place in the batch.
    pub place: usize,
    /// The refusal that it is sent again for.
    pub refusal: Uuid,
}

/// What became of a letter that was sent again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The queue of requests has it, the dead letter is gone.
    Moved,
    /// The queue of requests has it, and the dead letter could not be removed, for this reason.
    Copied(String),
    /// This one stays, for this reason; others may go.
    Left(String),
    /// It stays, and so would all others, for this reason: as a queue that is full, or not there.
    Stopped(String),
}

/// A dead letter in hand.
#[derive(Clone, Debug)]
pub struct Letter {
    /// As published.
    pub body: Vec<u8>,
    /// The transport's content type.
    pub content_type: Option<String>,
    /// The transport's message id.
    pub message_id: Option<String>,
    /// Whom the broker said it came from.
    pub sender: Option<Sender>,
    /// Further headers, as text. Their values are the publisher's.
    pub headers: BTreeMap<String, String>,
    /// The queue that it came from.
    pub origin: Option<String>,
    /// Why it left that, in the broker's word: `rejected`, `delivery_limit`, ...
    pub reason: Option<String>,
    /// When.
    pub died_at: Option<OffsetDateTime>,
}

impl Letter {
    /// Whether a worker can have refused it, as far as the queue tells: RabbitMQ says why a letter died, and SQS from where
    /// it moved one by itself.
    pub fn was_refused(&self) -> bool {
        self.reason.as_deref().is_none_or(|reason| reason == "rejected")
    }

    /// As the parser takes it.
    pub fn envelope(&self) -> Envelope<'_> {
        Envelope {
            body: &self.body,
            content_type: self.content_type.as_deref(),
            message_id: self.message_id.as_deref(),
        }
    }
}
