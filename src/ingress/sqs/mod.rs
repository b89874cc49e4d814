//! A receiving session with SQS.
//!
//! ```text
//!  pollers --register--> Hand --take--> Session --Delivery--> intake
//!  heartbeat --extend--> Hand <--settled-- Session <--Settlement--
//! ```
//!
//! A message is in the `Hand` from the moment in which SQS's answer is there until it is settled, lost, or given
//! back; for so long the heartbeat keeps it hidden from others. So an outage of Postgres costs it no receipt.
//! At its end, orderly or not, a session gives back what it holds, so that nobody waits for a visibility timeout.

mod hand;
mod heartbeat;
mod poller;
pub mod sender;
mod settle;

use super::{Delivery, Ingress, Settlement};
use crate::sqs::{Batch, CallError, Finding, Queue, Visibility};
use crate::telemetry::Metrics;
use hand::{Hand, Limits, Loss};
use std::sync::{Arc, Once};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Beyond the longest wait of a receive in flight, its answer's way.
const BESIDE_WAITING: Duration = Duration::from_secs(1);
/// For the last round of the heartbeat: one call's timeout.
const LAST_BEAT: Duration = Duration::from_secs(5);
/// For all that is given back at a session's end.
const GIVING_BACK: Duration = Duration::from_secs(5);

/// The queues, and how to receive.
#[derive(Debug)]
pub struct Source {
    /// Where requests come from.
    pub requests: Queue,
    /// Where refused ones go.
    pub dead_letters: Queue,
    /// Receives under way beside each other.
    pub pollers: usize,
    /// How long a receive waits for messages. An orderly end waits for receives in flight.
    pub wait: Duration,
    /// How long a message stays hidden without a heartbeat.
    pub visibility: Duration,
    /// Messages in hand at most.
    pub in_hand: usize,
    /// Counters.
    pub metrics: Metrics,
    /// A queue that is not as it should be is told once, not with every session.
    pub told: Once,
}

/// Why a session could not begin, or is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// SQS, or the way to it.
    #[error(transparent)]
    Call(#[from] CallError),
    /// Queues with which nothing can be received safely.
    #[error("the queue {queue} of sqs.requests_queue_url {finding}")]
    Unfit {
        /// The queue of requests.
        queue: String,
        /// What is wrong.
        finding: Finding,
    },
}

/// Pollers, a heartbeat, and what they hold.
pub struct Session {
    requests: Queue,
    dead_letters: Queue,
    metrics: Metrics,
    wait: Duration,
    hand: Arc<Hand>,
    /// Of the batch in hand.
    keys: Vec<u64>,
    polling: CancellationToken,
    pollers: JoinSet<()>,
    beating: CancellationToken,
    heartbeat: JoinSet<()>,
}

impl Ingress for Source {
    const TRANSPORT: &'static str = "sqs";
    type Session = Session;

    fn queue(&self) -> &str {
        self.requests.name()
    }

    /// Looks at both queues, then receives.
    async fn open(&self) -> Result<Session, SessionError> {
        let (requests, dead_letters) =
            futures_util::try_join!(self.requests.attributes(), self.dead_letters.attributes())?;
        let mut findings = Finding::of_requests(&requests, &dead_letters);
        if let Some(at) = findings.iter().position(Finding::is_fatal) {
            return Err(SessionError::Unfit { queue: self.queue().to_owned(), finding: findings.swap_remove(at) });
        }
        self.told.call_once(|| {
            for finding in &findings {
                tracing::warn!(queue.name = self.queue(), "the queue of requests {finding}");
            }
        });
        let limits = Limits {
            messages: self.in_hand,
            message_bytes: requests.most_bytes,
            visibility: self.visibility,
            is_fifo: requests.is_fifo,
        };
        let hand = Arc::new(Hand::new(limits));
        let (polling, beating) = (CancellationToken::new(), CancellationToken::new());
        let (mut pollers, mut heartbeat) = (JoinSet::new(), JoinSet::new());
        for _ in 0..self.pollers {
            let (queue, hand, polling) = (self.requests.clone(), Arc::clone(&hand), polling.clone());
            pollers.spawn(poller::poll(queue, hand, self.wait, self.visibility, polling));
        }
        let (queue, metrics) = (self.requests.clone(), self.metrics.clone());
        heartbeat.spawn(heartbeat::beat(queue, Arc::clone(&hand), self.visibility, metrics, beating.clone()));
        Ok(Session {
            requests: self.requests.clone(),
            dead_letters: self.dead_letters.clone(),
            metrics: self.metrics.clone(),
            wait: self.wait,
            hand,
            keys: Vec::new(),
            polling,
            pollers,
            beating,
            heartbeat,
        })
    }
}

impl super::Session for Session {
    type Error = SessionError;

    async fn next_batch(&mut self, most: usize) -> Result<Vec<Delivery>, SessionError> {
        let (keys, batch) = self.hand.next_batch(most).await?.into_iter().unzip();
        self.keys = keys;
        Ok(batch)
    }

    /// One failed call is no reason to end the session: what is not settled comes again, and is known by then.
    async fn settle(&mut self, settlements: &[Settlement]) -> Result<(), SessionError> {
        let keys = std::mem::take(&mut self.keys);
        settle::settle(self, &keys, settlements).await;
        Ok(())
    }

    async fn give_back(self) -> Result<(), SessionError> {
        self.end().await;
        Ok(())
    }

    async fn abandon(self) {
        self.end().await;
    }
}

impl Session {
    /// What a receive in flight brings must be known before anything is given back: else it would stay hidden for the
    /// whole timeout, or be received here once more.
    async fn end(mut self) {
        self.polling.cancel();
        let all = async { while self.pollers.join_next().await.is_some() {} };
        if tokio::time::timeout(self.wait + BESIDE_WAITING, all).await.is_err() {
            tracing::warn!(
                queue.name = self.requests.name(),
                "a receive was not answered in time: what it may have brought comes again after the visibility timeout"
            );
            self.pollers.shutdown().await;
        }
        // It would hide what is given back.
        self.beating.cancel();
        let last = async { while self.heartbeat.join_next().await.is_some() {} };
        if tokio::time::timeout(LAST_BEAT, last).await.is_err() {
            self.heartbeat.shutdown().await;
        }
        let held = self.hand.empty();
        let bounded = tokio::time::timeout(GIVING_BACK, release(&self.requests, &held, Duration::ZERO));
        if bounded.await.is_err() {
            tracing::warn!(
                queue.name = self.requests.name(),
                messages.count = held.len(),
                "messages could not be given back in time"
            );
        }
    }
}

/// Shortens how long messages stay hidden. What fails is not tried long: they come again all the same, later.
async fn release(queue: &Queue, receipts: &[String], hidden: Duration) {
    let changes: Vec<Visibility<'_>> = receipts.iter().map(|receipt| (receipt.as_str(), hidden)).collect();
    queue.carry_out(Batch::Visibility(&changes), 2).await;
}

/// Counts and tells what can be done no more about a message, and lets go of those behind it in its group.
async fn lose(queue: &Queue, hand: &Hand, key: u64, metrics: &Metrics) {
    let Some(Loss { message, behind }) = hand.lose(key) else { return };
    metrics.sqs_messages_left.with_label_values(&["receipt_lost"]).inc();
    tracing::warn!(
        queue.name = queue.name(),
        message.id = message,
        messages.behind = behind.len(),
        "the receipt of a message is no longer valid: it is another's, or gone"
    );
    release(queue, &behind, Duration::ZERO).await;
}
