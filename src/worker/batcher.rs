//! Takes what is there and writes it at once. A lone item waits for nobody.

use futures_util::FutureExt as _;
use std::panic::AssertUnwindSafe;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// A batch of more than this says that there is much to do.
const FEW: usize = 8;
/// While there is much to do, batches begin at least this far apart: what a transaction costs is shared by more.
const PACE: Duration = Duration::from_millis(10);

/// Hands items to a task that runs a verb on slices of them.
#[derive(Debug)]
pub(super) struct Batcher<T, R> {
    queue: mpsc::Sender<(T, oneshot::Sender<R>)>,
}

impl<T, R> Clone for Batcher<T, R> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone() }
    }
}

impl<T: Send + 'static, R: Send + 'static> Batcher<T, R> {
    /// The handle, and the task to spawn. While the verb runs, the next batch gathers.
    pub(super) fn new<F, Fut>(most: usize, verb: F) -> (Self, impl Future<Output = ()> + Send + 'static)
    where
        F: Fn(Vec<T>) -> Fut + Send + 'static,
        Fut: Future<Output = Vec<R>> + Send,
    {
        let (queue, mut waiting) = mpsc::channel::<(T, oneshot::Sender<R>)>(most);
        let running = async move {
            let mut taken = Vec::with_capacity(most);
            while waiting.recv_many(&mut taken, most).await > 0 {
                let (begun, count) = (Instant::now(), taken.len());
                let (items, answers): (Vec<T>, Vec<_>) = taken.drain(..).unzip();
                // A panic costs its batch, whose leases run out, and not the worker.
                let Ok(outcomes) = AssertUnwindSafe(verb(items)).catch_unwind().await else {
                    tracing::error!(batch.items = count, "a batch broke off by a fault of Keyferry's own");
                    continue;
                };
                for (outcome, answer) in outcomes.into_iter().zip(answers) {
                    // Nobody waits any more: the job was dropped with its process.
                    drop(answer.send(outcome));
                }
                if count > FEW {
                    tokio::time::sleep_until(begun + PACE).await;
                }
            }
        };
        (Self { queue }, running)
    }

    /// Submits an item and waits for its outcome; `None` when the task is gone.
    pub(super) async fn submit(&self, item: T) -> Option<R> {
        let (answer, outcome) = oneshot::channel();
        self.queue.send((item, answer)).await.ok()?;
        outcome.await.ok()
    }

    /// Leaves an item that nobody waits for. It may be lost where very many wait.
    pub(super) fn post(&self, item: T) {
        let (answer, _) = oneshot::channel();
        drop(self.queue.try_send((item, answer)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[tokio::test]
    async fn what_gathers_while_the_verb_runs_goes_together_and_a_lone_item_at_once() {
        let sizes = Arc::new(Mutex::new(Vec::new()));
        let (open, gate) = tokio::sync::watch::channel(false);
        let seen = Arc::clone(&sizes);
        let (batcher, running) = Batcher::new(3, move |items: Vec<u32>| {
            seen.lock().unwrap().push(items.len());
            let mut gate = gate.clone();
            async move {
                gate.wait_for(|open| *open).await.unwrap();
                items.into_iter().map(|item| item * 2).collect()
            }
        });
        let task = tokio::spawn(running);
        let first = tokio::spawn({
            let batcher = batcher.clone();
            async move { batcher.submit(1).await }
        });
        while sizes.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        let others: Vec<_> = (2..=5)
            .map(|item| {
                let batcher = batcher.clone();
                tokio::spawn(async move { batcher.submit(item).await })
            })
            .collect();
        while batcher.queue.capacity() > 0 {
            tokio::task::yield_now().await;
        }
        open.send(true).unwrap();
        assert_eq!(first.await.unwrap(), Some(2));
        for (task, expected) in others.into_iter().zip([4, 6, 8, 10]) {
            assert_eq!(task.await.unwrap(), Some(expected));
        }
        assert_eq!(sizes.lock().unwrap()[0..2], [1, 3]);
        drop(batcher);
        task.await.unwrap();
    }

    #[tokio::test]
    async fn a_panic_costs_its_batch_and_no_other() {
        let (batcher, running) = Batcher::new(3, |items: Vec<u32>| async move {
            assert!(!items.contains(&13), "on purpose");
            items
        });
        let task = tokio::spawn(running);
        assert_eq!(batcher.submit(13).await, None);
        assert_eq!(batcher.submit(14).await, Some(14));
        drop(batcher);
        task.await.unwrap();
    }
}
