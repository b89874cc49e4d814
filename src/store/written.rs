//! What the transactions of this process have put on record, counted once they were committed.
//!
//! A commit whose answer was lost is not counted: these are numbers for a dashboard, the trail itself is what proves.

use super::Store;
use super::refuse::Refused;
use crate::audit::Kind;
use crate::job::RefusalCode;
use crate::words::Words as _;
use std::sync::atomic::{AtomicU64, Ordering};

/// Numbers since the process began.
#[derive(Debug)]
pub(super) struct Tally {
    entries: [AtomicU64; Kind::ALL.len()],
    refusals: [AtomicU64; RefusalCode::ALL.len()],
}

impl Tally {
    pub(super) fn new() -> Self {
        Self { entries: [const { AtomicU64::new(0) }; _], refusals: [const { AtomicU64::new(0) }; _] }
    }

    /// Entries of the audit trail.
    pub(super) fn entries(&self, kinds: impl IntoIterator<Item = Kind>) {
        for kind in kinds {
            self.entries[kind.place()].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Refusals that were not there before. A folded one has no entry of its own.
    pub(super) fn refusals(&self, refused: &Refused) {
        for code in &refused.codes {
            self.refusals[code.place()].fetch_add(1, Ordering::Relaxed);
        }
        self.entries(std::iter::repeat_n(Kind::Refused, refused.told));
    }
}

impl Store {
    /// Entries of the audit trail that this process wrote.
    pub fn entries_written(&self, kind: Kind) -> u64 {
        self.written.entries[kind.place()].load(Ordering::Relaxed)
    }

    /// Refusals that this process put on record.
    pub fn refusals_written(&self, code: RefusalCode) -> u64 {
        self.written.refusals[code.place()].load(Ordering::Relaxed)
    }
}
