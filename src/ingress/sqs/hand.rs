//! What a session holds: every message that was received and is not settled.

use super::sender;
use crate::ingress::{Delivery, REDRIVE_HEADER, SIGNATURE_HEADER};
use crate::sqs::{CallError, MOST_VISIBILITY, Message};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Mutex as AsyncMutex, MutexGuard as AsyncGuard, Notify};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Messages of one receive at most (SQS API Reference, `ReceiveMessage`).
pub(super) const MOST_RECEIVED: usize = 10;
/// Bytes in hand at most, those that receives under way may bring included. Three receives of the largest messages.
const MOST_BYTES: usize = 32 * 1024 * 1024;

/// The bounds of a hand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Messages held at most, those that receives under way may bring included.
    pub(super) messages: usize,
    /// Bytes of a message at most, as the queue takes them.
    pub(super) message_bytes: usize,
    /// How long a message stays hidden from its receipt or its last heartbeat.
    pub(super) visibility: Duration,
    /// Whether later messages of a group fall with an earlier one.
    pub(super) is_fifo: bool,
}

/// Shared by the pollers, the heartbeat and the session.
#[derive(Debug)]
pub(super) struct Hand {
    limits: Limits,
    state: Mutex<State>,
    /// Rung when a message arrives, or the pollers have given up.
    arrived: Notify,
    /// Rung when there is more room.
    room: Notify,
    /// Locked for a round of the heartbeat.
    round: AsyncMutex<()>,
}

#[derive(Debug, Default)]
struct State {
    /// By number, in the order of receipt.
    held: BTreeMap<u64, Held>,
    /// Those that intake has not taken yet.
    waiting: VecDeque<u64>,
    next: u64,
    /// Room for what receives under way may bring.
    reserved: usize,
    bytes: usize,
    fault: Option<CallError>,
}

#[derive(Debug)]
struct Held {
    message: Message,
    received: Instant,
    /// When the heartbeat is next due.
    beat_at: Instant,
    /// Whether it is being deleted: no heartbeat, and a receipt that is of no more use is no loss.
    is_settling: bool,
}

/// A message whose receipt is of no more use, and the receipts of those that must not go before it.
pub(super) struct Loss {
    pub(super) message: String,
    pub(super) behind: Vec<String>,
}

/// A message that the heartbeat is due for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) key: u64,
    pub(super) receipt: String,
    /// How long it is to be hidden from now; nothing once SQS allows no more.
    pub(super) hidden: Option<Duration>,
}

impl Hand {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            state: Mutex::default(),
            arrived: Notify::new(),
            room: Notify::new(),
            round: AsyncMutex::default(),
        }
    }

    /// Waits for room for a receive, and keeps it. Not, once `stop` is told.
    pub(super) async fn reserve(&self, stop: &CancellationToken) -> bool {
        loop {
            let told = self.room.notified();
            tokio::pin!(told);
            // From here on no ring is missed.
            told.as_mut().enable();
            if stop.is_cancelled() {
                return false;
            }
            {
                let mut state = self.state();
                let taken = state.held.len() + state.reserved;
                // A receive brings ten messages at most, whatever their size.
                let receives = state.reserved / MOST_RECEIVED + 1;
                let bytes = state.bytes + receives * MOST_RECEIVED * self.limits.message_bytes;
                if taken + MOST_RECEIVED <= self.limits.messages && bytes <= MOST_BYTES {
                    state.reserved += MOST_RECEIVED;
                    return true;
                }
            }
            tokio::select! {
                () = told => {}
                () = stop.cancelled() => return false,
            }
        }
    }

    /// Takes over what a receive brought, which may be nothing; the room kept for it is free again.
    pub(super) fn register(&self, messages: Vec<Message>) {
        // SQS hides messages when it answers; a third of the timeout is left for the answer's way and for more.
        let now = Instant::now();
        let mut state = self.state();
        state.reserved = state.reserved.saturating_sub(MOST_RECEIVED);
        for message in messages {
            let key = state.next;
            state.next += 1;
            state.bytes += message.size();
            state.waiting.push_back(key);
            let beat_at = now + self.limits.visibility / 3;
            state.held.insert(key, Held { message, received: now, beat_at, is_settling: false });
        }
        drop(state);
        self.arrived.notify_one();
        self.room.notify_waiters();
    }

    /// The pollers have given up.
    pub(super) fn fail(&self, error: CallError) {
        self.state().fault.get_or_insert(error);
        self.arrived.notify_one();
    }

    /// Waits for a message, then takes what is there, up to `most`, in the order of receipt.
    pub(super) async fn next_batch(&self, most: usize) -> Result<Vec<(u64, Delivery)>, CallError> {
        loop {
            {
                let mut state = self.state();
                if !state.waiting.is_empty() {
                    let count = most.min(state.waiting.len());
                    let keys: Vec<u64> = state.waiting.drain(..count).collect();
                    let held = keys.iter().filter_map(|key| Some((*key, state.held.get(key)?)));
                    return Ok(held.map(|(key, held)| (key, held.delivery())).collect());
                }
                // What was received before it is decided all the same.
                if let Some(error) = &state.fault {
                    return Err(error.clone());
                }
            }
            // A ring while nobody waits is kept.
            self.arrived.notified().await;
        }
    }

    /// The messages with these numbers that are still held, for settling.
    pub(super) fn messages(&self, keys: &[u64]) -> Vec<(u64, Message)> {
        let state = self.state();
        keys.iter().filter_map(|key| Some((*key, state.held.get(key)?.message.clone()))).collect()
    }

    /// The receipts of those with these numbers that are still held.
    pub(super) fn receipts(&self, keys: &[u64]) -> Vec<(u64, String)> {
        let state = self.state();
        keys.iter().filter_map(|key| Some((*key, state.held.get(key)?.message.receipt.clone()))).collect()
    }

    /// These are about to be deleted.
    pub(super) fn begin_settling(&self, keys: &[u64]) {
        let mut state = self.state();
        for key in keys {
            if let Some(held) = state.held.get_mut(key) {
                held.is_settling = true;
            }
        }
    }

    /// Waits for the round of the heartbeat that is under way, and holds off the next: of what is forgotten or settling
    /// by then nothing is hidden again.
    pub(super) async fn round(&self) -> AsyncGuard<'_, ()> {
        self.round.lock().await
    }

    /// These are no longer held, whatever became of them.
    pub(super) fn forget(&self, keys: &[u64]) {
        let mut state = self.state();
        for key in keys {
            state.remove(*key);
        }
        drop(state);
        self.room.notify_waiters();
    }

    /// A receipt is of no more use. What intake has not taken yet is not decided: the message is another's. On FIFO
    /// those behind it in its group go as well, so that none is decided before it.
    pub(super) fn lose(&self, key: u64) -> Option<Loss> {
        let mut state = self.state();
        if state.held.get(&key)?.is_settling {
            return None;
        }
        let lost = state.remove(key)?;
        let behind: Vec<u64> = match &lost.message.group {
            Some(group) if self.limits.is_fifo => {
                let is_behind = |later: &&u64| {
                    let held = state.held.get(later);
                    **later > key && held.is_some_and(|held| held.message.group.as_ref() == Some(group))
                };
                state.waiting.iter().filter(is_behind).copied().collect()
            }
            _ => Vec::new(),
        };
        let behind = behind.iter().filter_map(|key| state.remove(*key)).map(|held| held.message.receipt).collect();
        drop(state);
        self.room.notify_waiters();
        Some(Loss { message: lost.message.id, behind })
    }

    /// The messages that the heartbeat is due for at `now`.
    pub(super) fn due(&self, now: Instant) -> Vec<Due> {
        let state = self.state();
        let due = state.held.iter().filter(|(_, held)| held.beat_at <= now && !held.is_settling);
        due.map(|(key, held)| {
            let left = MOST_VISIBILITY.saturating_sub(now - held.received);
            // Whole seconds: the last one is SQS's to round.
            let hidden = (left > Duration::from_secs(1)).then(|| self.limits.visibility.min(left));
            Due { key: *key, receipt: held.message.receipt.clone(), hidden }
        })
        .collect()
    }

    /// SQS hides it for another timeout, asked for at `asked`.
    pub(super) fn extended(&self, key: u64, asked: Instant) {
        if let Some(held) = self.state().held.get_mut(&key) {
            held.beat_at = asked + self.limits.visibility / 3;
        }
    }

    /// Takes everything out: the receipts of all that is held.
    pub(super) fn empty(&self) -> Vec<String> {
        let mut state = self.state();
        state.waiting.clear();
        state.bytes = 0;
        std::mem::take(&mut state.held).into_values().map(|held| held.message.receipt).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing under this lock can leave the state half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn remove(&mut self, key: u64) -> Option<Held> {
        let held = self.held.remove(&key)?;
        self.bytes -= held.message.size();
        if let Ok(at) = self.waiting.binary_search(&key) {
            self.waiting.remove(at);
        }
        Some(held)
    }
}

impl Held {
    fn delivery(&self) -> Delivery {
        let message = &self.message;
        let text = |name: &str| message.text(name).map(str::to_owned);
        Delivery {
            body: message.body.clone().into_bytes(),
            content_type: text("content-type"),
            // SQS has none that a publisher sets.
            message_id: None,
            traceparent: text("traceparent"),
            sender: message.sender_id.as_deref().and_then(sender::parse),
            signature: text(SIGNATURE_HEADER),
            redrive: text(REDRIVE_HEADER),
            received: self.received,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VISIBILITY: Duration = Duration::from_secs(30);

    fn hand(messages: usize, is_fifo: bool) -> Hand {
        Hand::new(Limits { messages, message_bytes: 1024 * 1024, visibility: VISIBILITY, is_fifo })
    }

    fn message(id: &str, group: Option<&str>) -> Message {
        Message {
            id: id.to_owned(),
            receipt: format!("r-{id}"),
            body: id.to_owned(),
            group: group.map(str::to_owned),
            receive_count: 1,
            ..Message::default()
        }
    }

    async fn bodies(hand: &Hand, most: usize) -> Vec<String> {
        let batch = hand.next_batch(most).await.unwrap();
        batch.into_iter().map(|(_, delivery)| String::from_utf8(delivery.body).unwrap()).collect()
    }

    #[tokio::test]
    async fn room_is_kept_for_receives_and_freed_by_settling() {
        let hand = hand(20, false);
        let stop = CancellationToken::new();
        assert!(hand.reserve(&stop).await && hand.reserve(&stop).await);
        let mut third = std::pin::pin!(hand.reserve(&stop));
        assert!(futures_util::poll!(&mut third).is_pending(), "two receives may bring twenty");
        hand.register((0..10).map(|n| message(&n.to_string(), None)).collect());
        assert!(futures_util::poll!(&mut third).is_pending());
        assert_eq!(bodies(&hand, 3).await, ["0", "1", "2"]);
        assert!(futures_util::poll!(&mut third).is_pending(), "what is decided is still held");
        hand.forget(&(0..10).collect::<Vec<_>>());
        assert!(third.await);
        stop.cancel();
        assert!(!hand.reserve(&stop).await);
    }

    #[tokio::test]
    async fn large_messages_take_the_room_of_many() {
        let hand = hand(400, false);
        let stop = CancellationToken::new();
        let large = Message { body: "x".repeat(MOST_BYTES), ..message("l", None) };
        assert!(hand.reserve(&stop).await);
        hand.register(vec![large]);
        assert!(futures_util::poll!(std::pin::pin!(hand.reserve(&stop))).is_pending());
        hand.forget(&[0]);
        // As much may be on its way.
        for _ in 0..3 {
            assert!(hand.reserve(&stop).await);
        }
        assert!(futures_util::poll!(std::pin::pin!(hand.reserve(&stop))).is_pending(), "40 MiB might come");
    }

    /// A heartbeat that meets the deletion is told that the receipt is gone.
    #[tokio::test]
    async fn what_is_being_deleted_is_neither_kept_hidden_nor_lost() {
        let hand = hand(400, true);
        hand.register(["a1", "a2", "a3"].map(|id| message(id, Some("a"))).into());
        assert_eq!(bodies(&hand, 1).await, ["a1"]);
        hand.begin_settling(&[0]);
        let due: Vec<u64> = hand.due(Instant::now() + VISIBILITY).iter().map(|due| due.key).collect();
        assert_eq!(due, [1, 2]);
        assert!(hand.lose(0).is_none());
        hand.forget(&[0]);
        assert!(hand.lose(0).is_none());
        assert_eq!(bodies(&hand, 10).await, ["a2", "a3"], "nothing behind it is thrown out");
    }

    #[tokio::test]
    async fn what_is_lost_is_not_decided_and_nothing_of_its_group_before_it() {
        for is_fifo in [true, false] {
            let hand = hand(400, is_fifo);
            let all = [("a1", "a"), ("b1", "b"), ("a2", "a"), ("b2", "b"), ("a3", "a")];
            hand.register(all.map(|(id, group)| message(id, Some(group))).into());
            // a1 is being decided when a2 is lost.
            assert_eq!(bodies(&hand, 1).await, ["a1"]);
            let loss = hand.lose(2).unwrap();
            assert_eq!((loss.message.as_str(), loss.behind.len()), ("a2", usize::from(is_fifo)));
            assert!(hand.lose(2).is_none());
            let left = if is_fifo { vec!["b1", "b2"] } else { vec!["b1", "b2", "a3"] };
            assert_eq!(bodies(&hand, 10).await, left);
            assert_eq!(hand.empty().len(), 1 + left.len());
        }
    }

    #[test]
    fn the_heartbeat_is_due_at_a_third_and_ends_at_twelve_hours() {
        let hand = hand(400, false);
        hand.register(vec![message("m", None)]);
        // Received a little after this.
        let start = Instant::now();
        let due = |after: Duration| hand.due(start + after);
        assert_eq!(due(Duration::from_secs(9)), []);
        let found = due(VISIBILITY / 3);
        assert_eq!(found, [Due { key: 0, receipt: "r-m".into(), hidden: Some(VISIBILITY) }]);
        hand.extended(0, start + VISIBILITY / 3);
        assert_eq!(due(VISIBILITY / 3), []);
        // Twelve hours are from the receipt: of the last timeout only a part is left, then nothing.
        let last = due(Duration::from_secs(12 * 3_600 - 7))[0].hidden.unwrap();
        assert!((5..=7).contains(&last.as_secs()), "{last:?}");
        assert_eq!(due(Duration::from_millis(12 * 3_600_000 - 900))[0].hidden, None);
        assert_eq!(due(MOST_VISIBILITY + VISIBILITY)[0].hidden, None);
    }

    #[tokio::test]
    async fn the_pollers_fault_ends_the_wait() {
        let hand = hand(400, false);
        let mut waiting = Box::pin(hand.next_batch(1));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        hand.register(vec![message("m", None)]);
        assert_eq!(waiting.await.unwrap().len(), 1);
        hand.register(vec![message("n", None)]);
        hand.fail(CallError {
            operation: "ReceiveMessage",
            queue: "q".into(),
            fault: crate::sqs::Fault::Gone,
            code: None,
            message: String::new(),
        });
        assert_eq!(bodies(&hand, 1).await, ["n"], "what came before the fault comes first");
        assert_eq!(hand.next_batch(1).await.unwrap_err().fault, crate::sqs::Fault::Gone);
    }
}
