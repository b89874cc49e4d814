//! A new policy without a stop: on SIGHUP the file is read again.

use crate::config::{ConfigError, PolicySource};
use crate::policy::{Current, Keeper, Policy, changes, current};
use crate::retry::{Attempts, Class};
use crate::store::Store;
use crate::telemetry::Metrics;
use time::OffsetDateTime;
use tokio::signal::unix::Signal;
use tokio_util::sync::CancellationToken;

/// The policy in force, and where it comes from.
pub(super) struct Reload {
    source: PolicySource,
    keeper: Keeper,
    store: Store,
    metrics: Metrics,
}

impl Reload {
    /// Puts the first policy in force, and on record.
    pub(super) async fn start(
        source: PolicySource,
        policy: Policy,
        store: Store,
        metrics: Metrics,
    ) -> Result<(Self, Current), crate::store::StoreError> {
        warn_of(&policy);
        let loaded_at = store.record_policy(policy.digest()).await?;
        tracing::info!(policy.digest = policy.digest(), "the policy is in force");
        let (keeper, current) = current(policy);
        let reload = Self { source, keeper, store, metrics };
        reload.note_loaded(loaded_at);
        Ok((reload, current))
    }

    /// Loads the file again at each SIGHUP, until `stop`.
    pub(super) async fn run(self, mut hang_up: Signal, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(()) = hang_up.recv() => {}
            }
            if self.source == PolicySource::AllowAll {
                tracing::warn!("SIGHUP: policy = \"allow-all\" has no file to load; another setting takes a restart");
                continue;
            }
            let source = self.source.clone();
            // A file can lie on a disk that does not answer.
            let read = tokio::task::spawn_blocking(move || source.read()).await;
            match read.unwrap_or_else(|error| Err(broken_off(&error))) {
                Ok(policy) => self.put_in_force(policy, &stop).await,
                Err(error) => {
                    self.metrics.policy_reloads.with_label_values(&["failed"]).inc();
                    tracing::error!(
                        policy.digest = self.keeper.get().digest(),
                        "the new policy is not loaded, and the old one stays in force: {error}. Mend it, see keyferry \
                         policy check, and send SIGHUP again"
                    );
                }
            }
        }
    }

    async fn put_in_force(&self, policy: Policy, stop: &CancellationToken) {
        warn_of(&policy);
        let digest = policy.digest().to_owned();
        let change = changes(&self.keeper.get(), &policy);
        let before = self.keeper.replace(policy);
        self.metrics.policy_reloads.with_label_values(&["loaded"]).inc();
        tracing::info!(
            policy.digest = digest,
            policy.digest_before = before.digest(),
            policy.added = change.added.join(", "),
            policy.changed = change.changed.join(", "),
            policy.removed = change.removed.join(", "),
            "a new policy is in force"
        );
        // Until it is on record this worker ends no job that the policy no longer allows: others may judge by a newer one.
        let mut outage = Attempts::new(Class::Reconnect);
        loop {
            let error = match self.store.record_policy(&digest).await {
                Ok(loaded_at) => return self.note_loaded(loaded_at),
                Err(error) => error,
            };
            let delay = outage.next_delay();
            tracing::error!(
                error.message = %error, retry.delay_ms = delay.as_millis(),
                "the new policy is not on record yet"
            );
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(delay) => {}
            }
        }
    }

    fn note_loaded(&self, at: OffsetDateTime) {
        self.metrics.policy_loaded.set(at.unix_timestamp());
    }
}

fn broken_off(error: &tokio::task::JoinError) -> ConfigError {
    ConfigError::Unusable { name: "policy".into(), path: std::path::PathBuf::new(), reason: error.to_string() }
}

fn warn_of(policy: &Policy) {
    for warning in policy.warnings() {
        tracing::warn!("policy: {warning}");
    }
}
