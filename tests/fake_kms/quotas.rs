//! Request quotas: one token bucket per account, Region and operation, with a burst of one second.
//!
//! They run by the double's own clock, so that a test refills them by moving it. Strangers who share a quota are no more
//! than tokens that are gone: about so many a second, at times that nobody can foretell.
//!
//! Beside them a bucket for each key, if so ordered: AWS throttles a "hot" key, one that is changed often, below the quota
//! as well. It says neither from how many changes on nor whether a call that is throttled for that counts; here it does.

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
    /// Calls a second of strangers, in each account and Region.
    pub strangers: HashMap<Operation, f64>,
    /// From how many changes a second on a key is hot; `None`: never.
    pub hot_key: Option<f64>,
    keys: HashMap<Arc<str>, Bucket>,
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
        let place = (Arc::clone(account), Arc::clone(region), operation);
        let bucket = self.buckets.entry(place).or_insert_with(|| Bucket::full(rate, now));
        let ms = bucket.ms_at(now);
        if let Some(strangers) = self.strangers.get(&operation).filter(|rate| **rate > 0.0) {
            bucket.strangers_call(ms, rate, 1_000.0 / strangers);
        }
        bucket.call(ms, rate)
    }

    /// Whether the key may be changed so soon after its last changes.
    pub fn admit_change(&mut self, key_arn: &Arc<str>, operation: Operation, now: Millis) -> bool {
        let Some(rate) = self.hot_key.filter(|_| self.enabled && operation.changes_a_key()) else { return true };
        let bucket = self.keys.entry(Arc::clone(key_arn)).or_insert_with(|| Bucket::full(rate, now));
        bucket.call(bucket.ms_at(now), rate)
    }

    /// How many calls of strangers were within the quota, by account, Region and operation.
    pub fn taken(&self) -> impl Iterator<Item = (&str, &str, Operation, u64)> {
        self.buckets
            .iter()
            .map(|((account, region, operation), bucket)| (&**account, &**region, *operation, bucket.taken))
    }

    /// Empties the record: every bucket is full again.
    pub fn refill(&mut self) {
        self.buckets.clear();
        self.keys.clear();
    }
}

#[derive(Debug)]
struct Bucket {
    begun: Millis,
    /// As of `ms` after that.
    level: f64,
    ms: f64,
    /// When the next stranger calls.
    stranger_ms: f64,
    draw: u64,
    taken: u64,
}

impl Bucket {
    fn full(rate: f64, now: Millis) -> Self {
        Self { level: rate.max(1.0), ms: 0.0, begun: now, stranger_ms: 0.0, draw: 1, taken: 0 }
    }

    fn ms_at(&self, now: Millis) -> f64 {
        seconds(now - self.begun) * 1_000.0
    }

    fn call(&mut self, ms: f64, rate: f64) -> bool {
        self.level = (self.level + (ms - self.ms).max(0.0) / 1_000.0 * rate).min(rate.max(1.0));
        self.ms = self.ms.max(ms);
        let admitted = self.level >= 1.0;
        if admitted {
            self.level -= 1.0;
        }
        admitted
    }

    /// Each at its own time. Between two of them lies nothing, twice the mean, or anything between.
    fn strangers_call(&mut self, until_ms: f64, rate: f64, mean_ms: f64) {
        while self.stranger_ms <= until_ms {
            self.taken += u64::from(self.call(self.stranger_ms, rate));
            self.draw = self.draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let part = u32::try_from(self.draw >> 33).map_or(0.5, |bits| f64::from(bits) / f64::from(1_u32 << 31));
            self.stranger_ms += 2.0 * part * mean_ms;
        }
    }
}

fn seconds(passed: Millis) -> f64 {
    Duration::from_millis(u64::try_from(passed).unwrap_or(0)).as_secs_f64()
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
    fn strangers_take_their_part() {
        let mut quotas = Quotas::new(true);
        quotas.strangers.insert(IMPORT, 5.0);
        let (account, region) = (Arc::from("1"), Arc::from("eu-central-1"));
        // Who leaves them their part is not throttled, and they get it.
        let calls = (0..60_000).filter(|ms| ms % 125 == 0);
        let admitted = calls.filter(|ms| quotas.admit(&account, &region, IMPORT, *ms)).count();
        let taken = quotas.taken().map(|(.., taken)| taken).sum::<u64>();
        assert_eq!(admitted, 480);
        assert!((270..=330).contains(&taken), "{taken}");
        // Who asks for all gets no more than there is.
        quotas.refill();
        let admitted = (0..60_000).filter(|ms| quotas.admit(&account, &region, IMPORT, *ms)).count();
        let all = u64::try_from(admitted).unwrap() + quotas.taken().map(|(.., taken)| taken).sum::<u64>();
        assert!((912..=915).contains(&all), "{all}");
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
    fn a_key_that_is_changed_often_is_hot_and_others_are_not() {
        let mut quotas = Quotas::new(true);
        quotas.hot_key = Some(0.5);
        let mut admitted = |key: &str, operation, now| quotas.admit_change(&key.into(), operation, now);
        assert!(admitted("a", IMPORT, 0));
        assert!(!admitted("a", Operation::RotateKeyOnDemand, 1_000), "all changes of a key count together");
        assert!(admitted("b", IMPORT, 1_000));
        assert!((0..99).all(|_| admitted("a", Operation::GetParametersForImport, 1_000)), "nothing is changed by it");
        assert!(admitted("a", IMPORT, 2_000));
    }

    #[test]
    fn without_quotas_nothing_is_throttled() {
        let mut quotas = Quotas::default();
        assert!((0..100).all(|_| quotas.admit(&"1".into(), &"r".into(), Operation::GetParametersForImport, 0)));
    }
}
