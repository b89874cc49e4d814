//! Request quotas: one token bucket per account, Region and operation, with a burst of one second.
//!
//! They run by the double's own clock, so that a test refills them by moving it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::kinds::{Millis, Operation};

/// All buckets.
#[derive(Debug, Default)]
pub struct Quotas {
    /// Whether calls are counted at all.
    pub enabled: bool,
    /// Rates that differ from AWS's defaults.
    pub rates: HashMap<Operation, f64>,
    buckets: HashMap<(Arc<str>, Arc<str>, Operation), Bucket>,
}

impl Quotas {
    /// Full buckets at AWS's default rates.
    pub fn new(enabled: bool) -> Self {
        Self { enabled, ..Self::default() }
    }

    /// Whether the call is within the quota; if so it is counted.
    pub fn admit(&mut self, account: &Arc<str>, region: &Arc<str>, operation: Operation, now: Millis) -> bool {
        let Some(rate) = self.rates.get(&operation).copied().or_else(|| default_rate(operation)) else {
            return true;
        };
        if !self.enabled {
            return true;
        }
        let burst = rate.max(1.0);
        let bucket = self
            .buckets
            .entry((Arc::clone(account), Arc::clone(region), operation))
            .or_insert(Bucket { level: burst, at: now });
        let passed = Duration::from_millis(u64::try_from(now - bucket.at).unwrap_or(0));
        bucket.level = (bucket.level + passed.as_secs_f64() * rate).min(burst);
        bucket.at = now;
        let admitted = bucket.level >= 1.0;
        if admitted {
            bucket.level -= 1.0;
        }
        admitted
    }

    /// Empties the record: every bucket is full again.
    pub fn refill(&mut self) {
        self.buckets.clear();
    }
}

#[derive(Debug)]
struct Bucket {
    level: f64,
    at: Millis,
}

/// AWS's default per second, by the reference; `None` where it gives none.
fn default_rate(operation: Operation) -> Option<f64> {
    match operation {
        Operation::GetParametersForImport => Some(1.0),
        Operation::ImportKeyMaterial | Operation::DeleteImportedKeyMaterial | Operation::ScheduleKeyDeletion => {
            Some(15.0)
        }
        Operation::CreateKey
        | Operation::RotateKeyOnDemand
        | Operation::CancelKeyDeletion
        | Operation::EnableKey
        | Operation::DisableKey => Some(5.0),
        Operation::DescribeKey | Operation::GetPublicKey => Some(2_000.0),
        Operation::ListKeyRotations => Some(100.0),
        Operation::GetKeyPolicy | Operation::GetKeyRotationStatus => Some(1_000.0),
        Operation::ListKeys | Operation::ListAliases => Some(500.0),
        Operation::Encrypt
        | Operation::Decrypt
        | Operation::GenerateMac
        | Operation::VerifyMac
        | Operation::Sign
        | Operation::Verify
        | Operation::ListResourceTags
        | Operation::AssumeRole
        | Operation::GetCallerIdentity => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMPORT: Operation = Operation::ImportKeyMaterial;

    #[test]
    fn a_bucket_holds_one_second_and_refills_with_time() {
        let mut quotas = Quotas::new(true);
        let (account, region) = (Arc::from("1"), Arc::from("eu-central-1"));
        let mut admitted =
            |calls, operation, now| (0..calls).filter(|_| quotas.admit(&account, &region, operation, now)).count();
        assert_eq!(admitted(20, IMPORT, 0), 15);
        assert_eq!(admitted(20, IMPORT, 200), 3);
        assert_eq!(admitted(20, IMPORT, 60_000), 15);
        assert_eq!(admitted(3, Operation::GetParametersForImport, 0), 1);
        assert_eq!(admitted(3, Operation::GetParametersForImport, 999), 0);
        assert_eq!(admitted(3, Operation::GetParametersForImport, 1_000), 1);
        assert_eq!(admitted(9_999, Operation::Encrypt, 0), 9_999);
    }

    #[test]
    fn accounts_and_regions_do_not_share() {
        let mut quotas = Quotas::new(true);
        quotas.rates.insert(IMPORT, 0.25);
        let mut admit = |account: &str, region: &str| quotas.admit(&account.into(), &region.into(), IMPORT, 0);
        assert!(admit("1", "eu-central-1"));
        assert!(!admit("1", "eu-central-1"));
        assert!(admit("2", "eu-central-1"));
        assert!(admit("1", "us-east-1"));
    }

    #[test]
    fn without_quotas_nothing_is_throttled() {
        let mut quotas = Quotas::default();
        assert!((0..100).all(|_| quotas.admit(&"1".into(), &"r".into(), Operation::GetParametersForImport, 0)));
    }
}
