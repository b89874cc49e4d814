//! Long polls, one after the other, as long as there is room.

use super::hand::{Hand, MOST_RECEIVED};
use crate::retry::{Attempts, Class};
use crate::sqs::{Fault, Queue};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Receives of one poller that may fail in a row before the session is taken for broken: some seconds, in which SQS
/// may be busy and nothing in hand has to be given back. Throttled ones do not count: another session would be
/// throttled as well.
const MOST_FAILURES: u32 = 6;

/// Receives until `stop`. A receive that is under way then is ended by its answer, since what it brings is hidden from
/// everyone else.
pub(super) async fn poll(queue: Queue, hand: Arc<Hand>, wait: Duration, visibility: Duration, stop: CancellationToken) {
    let mut failed = 0;
    let (mut away, mut throttled) = (Attempts::new(Class::Reconnect), Attempts::new(Class::Throttled));
    while hand.reserve(&stop).await {
        let outcome = queue.receive(MOST_RECEIVED, wait, visibility).await;
        let error = match outcome {
            Ok(messages) => {
                hand.register(messages);
                failed = 0;
                away.reset();
                throttled.reset();
                continue;
            }
            Err(error) => error,
        };
        hand.register(Vec::new());
        failed += u32::from(error.fault != Fault::Throttled);
        if error.fault == Fault::Gone || failed >= MOST_FAILURES {
            // The others have no more luck: the session is ended as a whole.
            hand.fail(error);
            stop.cancel();
            return;
        }
        let delay = match error.fault.class() {
            Class::Throttled => throttled.next_delay(),
            _ => away.next_delay(),
        };
        tracing::warn!(error.message = %error, retry.delay_ms = delay.as_millis(), "a receive failed");
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(delay) => {}
        }
    }
}
