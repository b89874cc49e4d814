//! The fuse: with too many jobs waiting no more messages are taken, until there are few enough again.

use crate::store::{Store, StoreError};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// So often the jobs that wait are looked at. Folding them takes a second as well, so that between the mark and the pause
/// there is what arrives in some two seconds.
const LOOK: Duration = Duration::from_secs(1);

/// How many waiting jobs pause intake, and how few let it go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// More than this many pause it.
    pub pause_above: u64,
    /// Fewer than this many let it go on.
    pub resume_below: u64,
}

/// What was seen last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    waiting: u64,
    is_paused: bool,
}

impl Seen {
    /// Between the marks it stays as it is, so that it does not turn with every job.
    fn next(self, waiting: u64, marks: Marks) -> Self {
        let is_paused = if self.is_paused { waiting >= marks.resume_below } else { waiting > marks.pause_above };
        Self { waiting, is_paused }
    }
}

/// Looks at the backlog.
#[derive(Debug)]
pub struct Watch {
    store: Store,
    marks: Marks,
    seen: watch::Sender<Seen>,
}

/// What the intakes of a process see of it.
#[derive(Clone, Debug)]
pub struct Fuse(watch::Receiver<Seen>);

impl Watch {
    /// Looks for the first time, before any message is taken.
    pub async fn start(store: Store, marks: Marks) -> Result<(Self, Fuse), StoreError> {
        let (seen, fuse) = watch::channel(Seen { waiting: 0, is_paused: false }.next(store.backlog().await?, marks));
        Ok((Self { store, marks, seen }, Fuse(fuse)))
    }

    /// Goes on looking until `stop`. While the store is away it stays as it was: what is in hand is kept then anyway.
    pub async fn run(self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            match self.store.backlog().await {
                Ok(waiting) => self.seen.send_modify(|seen| *seen = seen.next(waiting, self.marks)),
                Err(error) => tracing::debug!(error.message = %error, "the backlog could not be looked at"),
            }
        }
    }
}

impl Fuse {
    /// Whether no message is to be taken.
    pub fn is_paused(&self) -> bool {
        self.0.borrow().is_paused
    }

    /// How many jobs waited at the last look.
    pub fn waiting(&self) -> u64 {
        self.0.borrow().waiting
    }

    /// Waits until intake is paused, or goes on.
    pub async fn until(&self, is_paused: bool) {
        let mut seen = self.0.clone();
        if seen.wait_for(|seen| seen.is_paused == is_paused).await.is_err() {
            // Nobody looks any more: the process stops.
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_turns_at_the_marks_and_not_between_them() {
        let marks = Marks { pause_above: 10, resume_below: 6 };
        let mut seen = Seen { waiting: 0, is_paused: false };
        let turns = [0, 6, 10, 11, 10, 6, 5, 6, 10, 11, 0].map(|waiting| {
            seen = seen.next(waiting, marks);
            seen.is_paused
        });
        assert_eq!(turns, [false, false, false, true, true, true, false, false, false, true, false]);
        // One mark for both.
        let marks = Marks { pause_above: 5, resume_below: 5 };
        assert!(Seen { waiting: 0, is_paused: true }.next(5, marks).is_paused);
        assert!(!Seen { waiting: 0, is_paused: false }.next(5, marks).is_paused);
    }
}
