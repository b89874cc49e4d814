//! The lease, measured by this machine's monotonic clock, and the gate that every AWS call passes.

use aws_sdk_kms::config::interceptors::BeforeTransmitInterceptorContextRef;
use aws_sdk_kms::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_kms::error::BoxError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// How long this process may still act for a line. Shared by the job that acts and the heartbeat that
/// renews.
#[derive(Clone, Debug)]
pub struct LeaseGuard {
    epoch: Instant,
    /// Milliseconds after `epoch` at which the lease ends. Zero: lost.
    until: Arc<AtomicU64>,
}

impl LeaseGuard {
    /// A lease of `length` that was asked for at `asked_at`: the database counts from later than that.
    pub fn new(asked_at: Instant, length: Duration) -> Self {
        let guard = Self { epoch: asked_at, until: Arc::new(AtomicU64::new(0)) };
        guard.until.store(millis(length), Ordering::Release);
        guard
    }

    /// The lease was renewed for `length` by a statement sent at `asked_at`. A lost lease stays lost.
    pub fn renew(&self, asked_at: Instant, length: Duration) {
        let until = millis(asked_at.saturating_duration_since(self.epoch) + length);
        let later = |now: u64| (now != 0 && now < until).then_some(until);
        let _nothing_to_renew = self.until.fetch_update(Ordering::AcqRel, Ordering::Acquire, later);
    }

    /// The lease was taken over, or its fate is unknown.
    pub fn lose(&self) {
        self.until.store(0, Ordering::Release);
    }

    /// What is left.
    pub fn remaining(&self) -> Duration {
        let until = Duration::from_millis(self.until.load(Ordering::Acquire));
        until.saturating_sub(self.epoch.elapsed())
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A call was dropped before a byte of it left.
#[derive(Debug, thiserror::Error)]
#[error("too little of the lease was left to make the call")]
pub(super) struct Dropped;

/// Whether a call got past the gate, and with which access key it was signed. One that did not has changed nothing,
/// whatever its error says.
#[derive(Clone, Debug, Default)]
pub(super) struct Departure(Arc<OnceLock<Option<String>>>);

impl Departure {
    pub(super) fn happened(&self) -> bool {
        self.0.get().is_some()
    }

    /// The access key's id, which is no secret.
    pub(super) fn signer(&self) -> Option<&str> {
        self.0.get()?.as_deref()
    }
}

/// Checks the lease after signing, just before bytes leave.
#[derive(Debug)]
pub(super) struct Gate {
    guard: LeaseGuard,
    needed: Duration,
    departure: Departure,
}

impl Gate {
    pub(super) fn new(guard: LeaseGuard, needed: Duration) -> (Self, Departure) {
        let departure = Departure::default();
        (Self { guard, needed, departure: departure.clone() }, departure)
    }
}

impl Intercept for Gate {
    fn name(&self) -> &'static str {
        "LeaseGate"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if self.guard.remaining() < self.needed {
            return Err(Dropped.into());
        }
        let signer = context.request().headers().get("authorization").and_then(signer).map(str::to_owned);
        // It leaves once: the SDK repeats nothing.
        self.departure.0.get_or_init(|| signer);
        Ok(())
    }
}

/// `AWS4-HMAC-SHA256 Credential=AKIA.../20261124/...`.
fn signer(authorization: &str) -> Option<&str> {
    let (_, credential) = authorization.split_once("Credential=")?;
    credential.split('/').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signer_is_read() {
        let header =
            "AWS4-HMAC-SHA256 Credential=ASIA1/20261124/eu-central-1/kms/aws4_request, SignedHeaders=host, Signature=0";
        assert_eq!(signer(header), Some("ASIA1"));
        assert_eq!(signer("Bearer x"), None);
    }

    #[test]
    fn a_lease_runs_out_is_renewed_and_once_lost_stays_lost() {
        let start = Instant::now();
        let guard = LeaseGuard::new(start, Duration::from_secs(30));
        assert!(guard.remaining() > Duration::from_secs(20));
        guard.renew(start, Duration::from_secs(60));
        assert!(guard.remaining() > Duration::from_secs(50));
        guard.renew(start, Duration::from_secs(10));
        assert!(guard.remaining() > Duration::from_secs(50), "a late answer must not shorten the lease");
        guard.lose();
        guard.renew(Instant::now(), Duration::from_secs(60));
        assert_eq!(guard.remaining(), Duration::ZERO);
    }
}
