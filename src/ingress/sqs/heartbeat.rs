//! Keeps what is in hand hidden from others, for as long as it is in hand.

use super::hand::{Due, Hand};
use super::lose;
use crate::sqs::{Batch, Outcome, Queue, Visibility};
use crate::telemetry::Metrics;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Looks in a visibility timeout: a message is due at a third of it, and a call that fails then can be made a few times
/// more before the message shows up elsewhere.
const LOOKS: u32 = 12;

/// Extends what is due until `stop`.
pub(super) async fn beat(
    queue: Queue,
    hand: Arc<Hand>,
    visibility: Duration,
    metrics: Metrics,
    stop: CancellationToken,
) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(visibility / LOOKS) => {}
        }
        let _round = hand.round().await;
        let asked = Instant::now();
        for Due { key, .. } in hand.due(asked).iter().filter(|due| due.hidden.is_none()) {
            lose(&queue, &hand, *key, &metrics).await;
        }
        // Asked anew: what was let go with them is not to be hidden again.
        let mut due = hand.due(asked);
        due.retain(|due| due.hidden.is_some());
        let changes: Vec<Visibility<'_>> =
            due.iter().filter_map(|due| Some((due.receipt.as_str(), due.hidden?))).collect();
        // One attempt: the next look is the next one.
        let outcomes = queue.carry_out(Batch::Visibility(&changes), 1).await;
        for (Due { key, .. }, outcome) in due.iter().zip(outcomes) {
            match outcome {
                Outcome::Done => hand.extended(*key, asked),
                Outcome::Refused(error) if error.is_receipt_gone() => lose(&queue, &hand, *key, &metrics).await,
                outcome => {
                    tracing::warn!(
                        queue.name = queue.name(), sqs.outcome = %outcome,
                        "a message in hand could not be kept hidden"
                    );
                }
            }
        }
    }
}
