//! A decided batch: refused messages to the dead-letter queue, then everything off the queue of requests.

use super::{Session, release};
use crate::ingress::{REDRIVE_HEADER, SIGNATURE_HEADER, Settlement};
use crate::sqs::{Batch, Message, Order, Outcome, Outgoing, Queue};
use std::time::Duration;

/// Calls for one message, for each of its two steps.
const ATTEMPTS: u32 = 4;
/// How soon a message that could not be settled comes again. Not at once: where nothing takes it away that would be a
/// busy loop.
const LEFT_FOR: Duration = Duration::from_secs(5);
/// Attributes without which a dead letter could not be sent again under its signature.
const OF_USE_LATER: [&str; 3] = [SIGNATURE_HEADER, REDRIVE_HEADER, "content-type"];

/// Settles what is still held of a batch. What cannot be settled is let go, and comes again: then it is a duplicate, or
/// the same refusal. Whatever happens, nothing of the batch is held afterwards.
pub(super) async fn settle(session: &Session, keys: &[u64], settlements: &[Settlement]) {
    let of = |wanted: Settlement| -> Vec<u64> {
        keys.iter().zip(settlements).filter(|(_, one)| **one == wanted).map(|(key, _)| *key).collect()
    };
    let refused = of(Settlement::DeadLetter);
    let (mut decided, mut stay) = (of(Settlement::Done), Vec::new());
    if !refused.is_empty() {
        let letters = session.hand.messages(&refused);
        let (sent, left) = dead_letter(&session.dead_letters, letters).await;
        crate::failpoint!("sqs.after_dead_letter");
        decided.extend(sent);
        stay = left;
    }
    // The heartbeat goes on beside this: it would find the receipts of what is deleted gone.
    session.hand.begin_settling(&decided);
    delete(session, &decided).await;
    let receipts: Vec<String> = session.hand.receipts(&stay).into_iter().map(|(_, receipt)| receipt).collect();
    session.hand.forget(keys);
    if !stay.is_empty() {
        session.metrics.sqs_messages_left.with_label_values(&["not_dead_lettered"]).inc_by(stay.len() as u64);
        // A beat under way would land last, and hide them for the whole timeout.
        drop(session.hand.round().await);
        release(&session.requests, &receipts, LEFT_FOR).await;
    }
}

/// Sends copies, body and attributes as they came. Tells which are there, and which are not.
async fn dead_letter(queue: &Queue, letters: Vec<(u64, Message)>) -> (Vec<u64>, Vec<u64>) {
    let copies: Vec<Outgoing> = letters.iter().map(|(_, message)| copy(queue, message)).collect();
    let outcomes = queue.carry_out(Batch::Send(&copies), ATTEMPTS).await;
    let (mut sent, mut left, mut again) = (Vec::new(), Vec::new(), Vec::new());
    for ((key, message), outcome) in letters.into_iter().zip(outcomes) {
        match outcome {
            Outcome::Done => sent.push(key),
            Outcome::Refused(_) => again.push((key, message)),
            outcome => {
                tracing::error!(queue.name = queue.name(), message.id, message.receive_count, sqs.outcome = %outcome,
                                "a refused message could not be dead-lettered; it comes again");
                left.push(key);
            }
        }
    }
    // What SQS will not take as it came, it may take without what it came with, but for the signature and what
    // that covers.
    let bare: Vec<Outgoing> = again
        .iter()
        .map(|(_, message)| {
            let mut bare = copy(queue, message);
            bare.attributes.retain(|attribute| OF_USE_LATER.contains(&attribute.name.as_str()));
            bare
        })
        .collect();
    let outcomes = queue.carry_out(Batch::Send(&bare), ATTEMPTS).await;
    for ((key, message), outcome) in again.into_iter().zip(outcomes) {
        if outcome == Outcome::Done {
            tracing::warn!(
                queue.name = queue.name(),
                message.id,
                "a refused message was dead-lettered without its attributes"
            );
            sent.push(key);
        } else {
            tracing::error!(queue.name = queue.name(), message.id, message.receive_count, sqs.outcome = %outcome,
                            "SQS does not take a refused message; it is left to the redrive policy of its own queue");
            left.push(key);
        }
    }
    (sent, left)
}

fn copy(queue: &Queue, message: &Message) -> Outgoing {
    // Dead letters have no order among each other, and the same one sent again is one.
    let order = queue.is_fifo().then(|| Order { group: message.id.clone(), deduplication: message.id.clone() });
    Outgoing { body: message.body.clone(), attributes: message.attributes.clone(), order }
}

/// Each receipt once more, with a bound; a message that stays comes again and is a duplicate then.
async fn delete(session: &Session, keys: &[u64]) {
    let held = session.hand.receipts(keys);
    let receipts: Vec<&str> = held.iter().map(|(_, receipt)| receipt.as_str()).collect();
    let outcomes = session.requests.carry_out(Batch::Delete(&receipts), ATTEMPTS).await;
    let left: Vec<&Outcome> = outcomes
        .iter()
        .filter(|outcome| match outcome {
            Outcome::Done => false,
            Outcome::Refused(error) => !error.is_receipt_gone(),
            _ => true,
        })
        .collect();
    if let Some(outcome) = left.first() {
        session.metrics.sqs_messages_left.with_label_values(&["not_deleted"]).inc_by(left.len() as u64);
        tracing::warn!(queue.name = session.requests.name(), messages.count = left.len(), sqs.outcome = %outcome,
                       "settled messages could not be deleted; they come again as duplicates");
    }
}
