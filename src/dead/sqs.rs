//! Dead letters in a queue of SQS.
//!
//! A look receives every letter once and keeps it hidden until all were seen; then all are made visible at once. SQS
//! counts a look as a receipt: under a redrive policy of the dead-letter queue's own, looks would move letters away.
//! A look that dies leaves letters hidden for as long as they were last hidden for, and no longer.

use super::{Census, Chosen, DeadLetters, Letter, Sent, Stamp};
use crate::ingress::sqs::sender;
use crate::ingress::{REDRIVE_HEADER, SIGNATURE_HEADER};
use crate::policy::Signed;
use crate::retry::{Attempts, Class};
use crate::sqs::{
    Attribute, Batch, CallError, Fault, MOST_VISIBILITY, Message, Order, Outcome, Outgoing, Queue, Value, Visibility,
};
use futures_util::future::join_all;
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use time::OffsetDateTime;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Looks of the heartbeat in the time for which a letter is hidden at first: each is due at half of it, and a call that
/// fails then can be made a few times more.
const BEATS: u32 = 12;
/// Longest session: well within what SQS lets a message be hidden for.
const LONGEST: Duration = Duration::from_secs(11 * 3_600);
/// Letters of one receive at most (SQS API Reference, `ReceiveMessage`).
const MOST_RECEIVED: usize = 10;
/// Receives beside each other.
const RECEIVES: usize = 4;
/// Empty rounds after which nothing is left. A short poll asks only some of SQS's servers, and may miss what is there.
const QUIET_ROUNDS: u32 = 3;
/// How long a round waits after an empty one: by waiting, it asks all of SQS's servers.
const LAST_WAIT: Duration = Duration::from_secs(1);
/// Calls for one letter or receive.
const ATTEMPTS: u32 = 4;
/// Letters given back between two looks at whether SQS still answers.
const GIVEN_AT_ONCE: usize = 1_000;
/// Attributes of a message at most (SQS Developer Guide, "Amazon SQS message metadata").
const MOST_ATTRIBUTES: usize = 10;
/// A letter that is so much younger than the session is for the next one: else a look at a queue that fills all the
/// time would never end. Wide, because SQS's clock is not ours.
const YOUNG: time::Duration = time::Duration::minutes(15);

/// The two queues.
#[derive(Clone, Debug)]
pub struct Queues {
    /// Where dead letters are.
    pub dead: Queue,
    /// Where they go back to.
    pub requests: Queue,
    /// How long a letter is hidden at first.
    pub visibility: Duration,
    /// By which copies are signed.
    pub stamp: Option<Stamp>,
}

/// Why a session is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// SQS, or the way to it.
    #[error(transparent)]
    Call(#[from] CallError),
    /// SQS would show letters again, whatever is done.
    #[error("a look may last {} hours, for so long SQS hides what was received; the rest is for another", .0.as_secs() / 3_600)]
    TooLong(Duration),
    /// Letters come back by themselves, later.
    #[error("{count} dead letters could not be given back: SQS hides them for up to {} s more; {first}", .hidden.as_secs())]
    NotGivenBack {
        /// So many.
        count: usize,
        /// For how long they were last hidden.
        hidden: Duration,
        /// What became of the first of them.
        first: String,
    },
}

/// Letters received, and a heartbeat that keeps them hidden.
pub struct Session {
    queues: Queues,
    census: Census,
    opened_at: OffsetDateTime,
    holding: Arc<Holding>,
    heartbeat: JoinSet<()>,
    /// Refusals that letters were sent again for: a letter that names one of them has come back.
    redriven: HashSet<String>,
    batch: Vec<Message>,
}

/// What a session has received. Of each letter no more is kept than what gives it back.
#[derive(Debug)]
struct Holding {
    opened: Instant,
    visibility: Duration,
    /// By SQS's id.
    seen: Mutex<HashMap<String, Held>>,
}

#[derive(Debug)]
enum Held {
    /// Hidden by this receipt; at this time that has to be asked for again.
    Hidden { receipt: String, due: Instant },
    /// Sent again, or another's by now. Known, so that it is not shown twice.
    Gone,
}

impl DeadLetters for Queues {
    const TRANSPORT: &'static str = "sqs";
    type Session = Session;

    fn requests(&self) -> &str {
        self.requests.name()
    }

    fn dead(&self) -> &str {
        self.dead.name()
    }

    #[expect(clippy::disallowed_methods, reason = "it is compared with SQS's clock, not with the store's")]
    async fn open(&self) -> Result<Session, SessionError> {
        let found = self.dead.attributes().await?;
        let name = self.dead.name();
        let hidden = (found.hidden > 0).then(|| {
            format!("about {} letters of the queue {name} are hidden, as those in another reader's hand; they are not shown", found.hidden)
        });
        let policy = found.dead_letter_arn.map(|target| {
            format!("the queue {name} has a redrive policy: each look is a receipt, and SQS moves letters to {target} after some; remove it")
        });
        let holding = Arc::new(Holding { opened: Instant::now(), visibility: self.visibility, seen: Mutex::default() });
        let mut heartbeat = JoinSet::new();
        heartbeat.spawn(beat(self.dead.clone(), Arc::clone(&holding)));
        Ok(Session {
            queues: self.clone(),
            census: Census { waiting: found.waiting, cautions: hidden.into_iter().chain(policy).collect() },
            opened_at: OffsetDateTime::now_utc(),
            holding,
            heartbeat,
            redriven: HashSet::new(),
            batch: Vec::new(),
        })
    }
}

impl super::Session for Session {
    type Error = SessionError;

    fn census(&self) -> &Census {
        &self.census
    }

    async fn next_batch(&mut self, most: usize) -> Result<Vec<Letter>, SessionError> {
        self.batch.clear();
        if self.holding.opened.elapsed() >= LONGEST {
            return Err(SessionError::TooLong(LONGEST));
        }
        let mut quiet = 0;
        while self.batch.len() < most && quiet < QUIET_ROUNDS {
            let wait = if quiet == 0 { Duration::ZERO } else { LAST_WAIT };
            let is_any = self.round(most - self.batch.len(), wait).await?;
            match (is_any, self.batch.is_empty()) {
                (true, _) => quiet = 0,
                (false, true) => quiet += 1,
                // Whether there is more is asked when these were seen.
                (false, false) => break,
            }
        }
        Ok(self.batch.iter().map(letter).collect())
    }

    async fn redrive(&mut self, chosen: &[Chosen]) -> Result<Vec<Sent>, SessionError> {
        let mut outcomes: Vec<Option<Sent>> = vec![None; chosen.len()];
        // What goes out: its place among the chosen, and its receipt.
        let (mut going, mut copies) = (Vec::new(), Vec::new());
        for (at, one) in chosen.iter().enumerate() {
            let message = &self.batch[one.place];
            match (
                self.holding.receipt(&message.id),
                redriven(message, one, self.queues.stamp.as_ref(), self.queues.requests.is_fifo()),
            ) {
                (None, _) => outcomes[at] = Some(Sent::Left("it is in another reader's hand by now".into())),
                (_, Err(why)) => outcomes[at] = Some(Sent::Left(why)),
                (Some(receipt), Ok(copy)) => {
                    // Before it leaves: a worker can be faster than the answer.
                    self.redriven.insert(one.refusal.to_string());
                    going.push((at, receipt));
                    copies.push(copy);
                }
            }
        }
        let told = self.queues.requests.carry_out(Batch::Send(&copies), ATTEMPTS).await;
        let mut taken = Vec::new();
        for ((at, receipt), outcome) in going.into_iter().zip(told) {
            match self.unsent(outcome) {
                None => taken.push((at, receipt)),
                stays => outcomes[at] = stays,
            }
        }
        // From here on until the dead letter is deleted, it is there twice: intake knows the second as a copy.
        crate::failpoint!("dead.after_publish");
        let receipts: Vec<&str> = taken.iter().map(|(_, receipt)| receipt.as_str()).collect();
        let told = self.queues.dead.carry_out(Batch::Delete(&receipts), ATTEMPTS).await;
        for ((at, _), outcome) in taken.iter().zip(told) {
            outcomes[*at] = Some(match outcome {
                Outcome::Done => {
                    self.holding.let_go(&self.batch[chosen[*at].place].id);
                    Sent::Moved
                }
                outcome => Sent::Copied(outcome.to_string()),
            });
        }
        Ok(outcomes.into_iter().map(|sent| sent.unwrap_or_else(|| Sent::Left("it was not tried".into()))).collect())
    }

    async fn give_back(mut self) -> Result<(), SessionError> {
        // It would hide what is given back.
        self.heartbeat.shutdown().await;
        let hidden = self.holding.next_visibility(Instant::now());
        let receipts = self.holding.empty();
        let (mut count, mut first) = (0, None);
        for (at, some) in receipts.chunks(GIVEN_AT_ONCE).enumerate() {
            let changes: Vec<Visibility<'_>> = some.iter().map(|receipt| (receipt.as_str(), Duration::ZERO)).collect();
            let outcomes = self.queues.dead.carry_out(Batch::Visibility(&changes), ATTEMPTS).await;
            let mut is_answering = true;
            for outcome in outcomes {
                is_answering &= !matches!(outcome, Outcome::Failed(_));
                // A receipt that is gone means that the letter is visible, or another's.
                if !is_done(&outcome) {
                    count += 1;
                    first.get_or_insert(outcome);
                }
            }
            if !is_answering {
                count += receipts.len().saturating_sub((at + 1) * GIVEN_AT_ONCE);
                break;
            }
        }
        match first {
            None => Ok(()),
            Some(first) => Err(SessionError::NotGivenBack { count, hidden, first: first.to_string() }),
        }
    }
}

impl Session {
    /// Some receives beside each other. Whether they brought a letter of this session, not seen before.
    async fn round(&mut self, most: usize, wait: Duration) -> Result<bool, SessionError> {
        let sizes = (0..RECEIVES).map(|at| most.saturating_sub(at * MOST_RECEIVED).min(MOST_RECEIVED));
        let receives = sizes.filter(|size| *size > 0).map(|size| receive(&self.queues, size, wait));
        let (mut is_any, mut fault) = (false, None);
        for answer in join_all(receives).await {
            // What others brought is to be given back, too, when one has failed.
            match answer {
                Ok(messages) => {
                    for message in messages {
                        let is_new = self.holding.take(&message);
                        if is_new && self.is_of_this_session(&message) {
                            is_any = true;
                            self.batch.push(message);
                        }
                    }
                }
                Err(error) => fault = Some(error),
            }
        }
        fault.map_or(Ok(is_any), |error| Err(error.into()))
    }

    /// Not, if it came meanwhile: it is held until the end, so that it does not come again and again.
    fn is_of_this_session(&self, message: &Message) -> bool {
        let has_come_back = message.text(REDRIVE_HEADER).is_some_and(|refusal| self.redriven.contains(refusal));
        let is_young = message.sent_at.is_some_and(|sent_at| sent_at > self.opened_at + YOUNG);
        !has_come_back && !is_young
    }

    /// Why a letter was not sent; nothing if it was.
    fn unsent(&self, outcome: Outcome) -> Option<Sent> {
        let name = self.queues.requests.name();
        Some(match outcome {
            Outcome::Done => return None,
            Outcome::Failed(error) if error.fault == Fault::Gone => {
                Sent::Stopped(format!("there is no queue {name}; make it with: keyferry topology apply"))
            }
            Outcome::Failed(error) => Sent::Stopped(error.to_string()),
            outcome => Sent::Left(outcome.to_string()),
        })
    }
}

impl Holding {
    /// Takes note of a receipt. Whether the letter was not seen before: SQS may deliver it twice.
    fn take(&self, message: &Message) -> bool {
        let held = Held::Hidden { receipt: message.receipt.clone(), due: Instant::now() + self.visibility / 2 };
        self.seen().insert(message.id.clone(), held).is_none()
    }

    fn receipt(&self, id: &str) -> Option<String> {
        match self.seen().get(id)? {
            Held::Hidden { receipt, .. } => Some(receipt.clone()),
            Held::Gone => None,
        }
    }

    fn let_go(&self, id: &str) {
        if let Some(held) = self.seen().get_mut(id) {
            *held = Held::Gone;
        }
    }

    /// As long as the session has lasted, so that many letters are not asked for all the time, and that after a death
    /// nobody waits for longer than he has waited already.
    fn next_visibility(&self, now: Instant) -> Duration {
        let lasted = now - self.opened;
        let most = MOST_VISIBILITY.saturating_sub(lasted + Duration::from_secs(1));
        lasted.max(self.visibility).min(most)
    }

    fn due(&self, now: Instant) -> Vec<(String, String)> {
        let due = |(id, held): (&String, &Held)| match held {
            Held::Hidden { receipt, due } if *due <= now => Some((id.clone(), receipt.clone())),
            _ => None,
        };
        self.seen().iter().filter_map(due).collect()
    }

    /// What became of asking for more time. A letter that was received anew meanwhile has another receipt.
    fn extended(&self, id: &str, asked: &str, until: Result<Instant, ()>) {
        if let Some(held) = self.seen().get_mut(id)
            && let Held::Hidden { receipt, due } = held
            && receipt == asked
        {
            match until {
                Ok(until) => *due = until,
                Err(()) => *held = Held::Gone,
            }
        }
    }

    /// Takes all receipts out.
    fn empty(&self) -> Vec<String> {
        let held = std::mem::take(&mut *self.seen()).into_values();
        held.filter_map(|held| match held {
            Held::Hidden { receipt, .. } => Some(receipt),
            Held::Gone => None,
        })
        .collect()
    }

    fn seen(&self) -> MutexGuard<'_, HashMap<String, Held>> {
        // Nothing under this lock can leave it half-changed.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps letters hidden, until it is stopped.
async fn beat(queue: Queue, holding: Arc<Holding>) {
    loop {
        tokio::time::sleep(holding.visibility / BEATS).await;
        let asked = Instant::now();
        let hidden = holding.next_visibility(asked);
        let due = holding.due(asked);
        let changes: Vec<Visibility<'_>> = due.iter().map(|(_, receipt)| (receipt.as_str(), hidden)).collect();
        // One attempt: the next look is the next one.
        let outcomes = queue.carry_out(Batch::Visibility(&changes), 1).await;
        for ((id, receipt), outcome) in due.iter().zip(outcomes) {
            match outcome {
                Outcome::Done => holding.extended(id, receipt, Ok(asked + hidden / 2)),
                Outcome::Refused(error) if error.is_receipt_gone() => holding.extended(id, receipt, Err(())),
                outcome => {
                    tracing::warn!(
                        queue.name = queue.name(), sqs.outcome = %outcome,
                        "a dead letter could not be kept hidden"
                    );
                }
            }
        }
    }
}

/// `ReceiveMessage`, with a few attempts.
async fn receive(
    Queues { dead, visibility, .. }: &Queues,
    most: usize,
    wait: Duration,
) -> Result<Vec<Message>, CallError> {
    let mut delays = Attempts::new(Class::Transient);
    for _ in 1..ATTEMPTS {
        match dead.receive(most, wait, *visibility).await {
            Err(error) if matches!(error.fault, Fault::Throttled | Fault::Away) => {
                tokio::time::sleep(delays.next_delay()).await;
            }
            answer => return answer,
        }
    }
    dead.receive(most, wait, *visibility).await
}

fn is_done(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Done => true,
        Outcome::Refused(error) => error.is_receipt_gone(),
        _ => false,
    }
}

fn letter(message: &Message) -> Letter {
    let headers: BTreeMap<String, String> = message
        .attributes
        .iter()
        .filter(|attribute| attribute.name != CONTENT_TYPE)
        .filter_map(|attribute| match &attribute.value {
            Value::Text(text) => Some((attribute.name.clone(), text.clone())),
            Value::Bytes(_) => None,
        })
        .collect();
    let moved_from = message.moved_from.as_deref();
    Letter {
        body: message.body.clone().into_bytes(),
        content_type: message.text(CONTENT_TYPE).map(str::to_owned),
        // SQS has none that a publisher sets.
        message_id: None,
        // What SQS did not move itself was sent here by a worker.
        sender: moved_from.and(message.sender_id.as_deref()).and_then(sender::parse),
        headers,
        origin: moved_from.and_then(|arn| arn.rsplit(':').next()).map(str::to_owned),
        reason: moved_from.map(|_| "maxReceiveCount".to_owned()),
        // What SQS moves has the time of its first sending, and none of its death.
        died_at: if moved_from.is_some() { None } else { message.sent_at },
    }
}

/// The attribute that stands for AMQP's content type.
const CONTENT_TYPE: &str = "content-type";

/// What a letter is sent again as, or why it cannot be.
fn redriven(message: &Message, chosen: &Chosen, stamp: Option<&Stamp>, is_fifo: bool) -> Result<Outgoing, String> {
    let refusal = chosen.refusal.to_string();
    let own = |attribute: &&Attribute| {
        attribute.name != REDRIVE_HEADER && (stamp.is_none() || attribute.name != SIGNATURE_HEADER)
    };
    let mut attributes: Vec<Attribute> = message.attributes.iter().filter(own).cloned().collect();
    if let Some(stamp) = stamp {
        let content_type = message.text(CONTENT_TYPE);
        let signed = Signed { redrive: Some(&refusal), content_type, body: message.body.as_bytes() };
        let header = stamp.header(signed).ok_or("its content type has characters that a signature cannot hold")?;
        attributes.push(Attribute::text(SIGNATURE_HEADER, header));
    }
    attributes.push(Attribute::text(REDRIVE_HEADER, refusal));
    if attributes.len() > MOST_ATTRIBUTES {
        return Err(format!(
            "it would have more than {MOST_ATTRIBUTES} attributes, as many as SQS allows: there is no room for {REDRIVE_HEADER}"
        ));
    }
    let order = is_fifo.then(|| Order { group: group(message), deduplication: deduplication(message) });
    Ok(Outgoing { body: message.body.clone(), attributes, order })
}

/// The original's group, where SQS moved the letter with it. What a worker has dead-lettered is a group of its own, named
/// as its deduplication id: then the group is as `keyferry submit` would choose it.
fn group(message: &Message) -> String {
    match &message.group {
        Some(group) if message.deduplication.as_ref() != Some(group) => group.clone(),
        _ => {
            let body: serde_json::Value = serde_json::from_str(&message.body).unwrap_or_default();
            Order::group_of(body["key"].as_str(), &message.body)
        }
    }
}

/// One for each letter and receipt: an attempt made again is one message, and a redrive on another day is not dropped as a
/// copy of the first, as it would be by the body's hash.
fn deduplication(message: &Message) -> String {
    hex::encode(Sha256::new().chain_update(&message.id).chain_update([0]).chain_update(&message.receipt).finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn message(attributes: usize) -> Message {
        Message {
            id: "m".into(),
            receipt: "r".into(),
            body: r#"{"key":"arn:k"}"#.into(),
            attributes: (0..attributes).map(|number| Attribute::text(&format!("a{number}"), "v")).collect(),
            ..Message::default()
        }
    }

    const CHOSEN: Chosen = Chosen { place: 0, refusal: Uuid::from_u128(7) };

    #[test]
    fn the_refusal_needs_room_or_takes_the_last_ones_place() {
        let sent = redriven(&message(9), &CHOSEN, None, false).unwrap();
        assert_eq!((sent.attributes.len(), sent.order), (10, None));
        assert!(redriven(&message(10), &CHOSEN, None, false).is_err());
        let mut again = message(9);
        again.attributes.push(Attribute::text(REDRIVE_HEADER, "of another day"));
        let sent = redriven(&again, &CHOSEN, None, false).unwrap();
        assert_eq!(sent.attributes[9], Attribute::text(REDRIVE_HEADER, CHOSEN.refusal.to_string()));
        assert_eq!(sent.attributes.len(), 10);
    }

    #[test]
    fn a_letter_goes_back_to_its_group_and_is_new_with_each_receipt() {
        let order = |message: &Message| redriven(message, &CHOSEN, None, true).unwrap().order.unwrap();
        let moved = Message { group: Some("g".into()), deduplication: Some("d".into()), ..message(0) };
        assert_eq!(order(&moved).group, "g");
        let copied = Message { group: Some("x".into()), deduplication: Some("x".into()), ..message(0) };
        assert_eq!(order(&copied).group, "arn:k");
        let no_request = Message { body: "no JSON".into(), ..copied };
        assert_eq!(order(&no_request).group, hex::encode(Sha256::digest("no JSON")));
        assert_eq!(order(&moved).deduplication, order(&moved.clone()).deduplication);
        let later = Message { receipt: "r2".into(), ..moved.clone() };
        assert_ne!(order(&later).deduplication, order(&moved).deduplication);
    }

    #[test]
    fn letters_are_hidden_for_as_long_as_the_look_has_lasted() {
        const VISIBILITY: Duration = Duration::from_secs(60);
        let start = Instant::now();
        let holding = Holding { opened: start, visibility: VISIBILITY, seen: Mutex::default() };
        assert!(holding.take(&message(0)));
        assert!(!holding.take(&Message { receipt: "r2".into(), ..message(0) }), "delivered twice, shown once");
        assert_eq!(holding.due(start), []);
        let later = Instant::now() + VISIBILITY / 2;
        assert_eq!(holding.due(later), [("m".to_owned(), "r2".to_owned())]);
        // An answer about the first receipt says nothing of the second.
        holding.extended("m", "r", Err(()));
        holding.extended("m", "r2", Ok(later + VISIBILITY / 2));
        assert_eq!(holding.due(later), []);
        assert_eq!(holding.next_visibility(start), VISIBILITY);
        assert_eq!(holding.next_visibility(start + Duration::from_secs(3_600)), Duration::from_secs(3_600));
        assert!(holding.next_visibility(start + LONGEST) + LONGEST < MOST_VISIBILITY);
        assert_eq!(holding.empty(), ["r2"]);
    }
}
