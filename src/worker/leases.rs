//! The heartbeat: all leases of the process renewed in one statement.

use super::Context;
use crate::kms::LeaseGuard;
use crate::store::Lease;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio_util::sync::CancellationToken;

/// The leases that this process holds.
#[derive(Clone, Debug, Default)]
pub(super) struct Leases(Arc<Mutex<HashMap<Lease, LeaseGuard>>>);

impl Leases {
    pub(super) fn hold(&self, lease: Lease, guard: LeaseGuard) {
        self.map().insert(lease, guard);
    }

    pub(super) fn release(&self, lease: Lease) {
        self.map().remove(&lease);
    }

    /// Renews every third of a lease until `finished`.
    pub(super) async fn beat(self, context: Arc<Context>, finished: CancellationToken) {
        let length = context.settings.lease();
        loop {
            tokio::select! {
                () = finished.cancelled() => return,
                () = tokio::time::sleep(length / 3) => {}
            }
            let held: Vec<Lease> = self.map().keys().copied().collect();
            if held.is_empty() {
                continue;
            }
            let asked_at = Instant::now();
            match context.store.renew(&held, length).await {
                Ok(renewed) => {
                    let map = self.map();
                    renewed
                        .held
                        .iter()
                        .filter_map(|lease| map.get(lease))
                        .for_each(|guard| guard.renew(asked_at, length));
                    renewed.lost.iter().filter_map(|lease| map.get(lease)).for_each(LeaseGuard::lose);
                }
                // The guards run out by themselves, and no AWS call leaves after that.
                Err(error) => {
                    tracing::warn!(error.message = %error, leases.count = held.len(), "leases could not be renewed");
                }
            }
        }
    }

    fn map(&self) -> MutexGuard<'_, HashMap<Lease, LeaseGuard>> {
        // Nothing under this lock can leave the map half-changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
