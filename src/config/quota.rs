//! `[quota]`: how many calls AWS allows, and what part of that is Keyferry's.

use super::{ConfigError, Target};
use crate::job::Scarce;
use crate::quota::Pace;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// The highest rate that is believed, and the lowest.
pub(super) const RATES: (f64, f64) = (0.001, 10_000.0);
/// The word for no limit.
const UNLIMITED: &str = "unlimited";

/// AWS's quotas for calls that change keys. All workers share them: each call has its slot in one schedule.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Quota {
    /// Calls a second that AWS allows an account and Region, by operation, as Service Quotas shows them; "unlimited": not
    /// counted here. What is left out is AWS's default.
    #[serde(deserialize_with = "with_defaults")]
    pub rates: BTreeMap<String, Rate>,
    /// The part of each that is kept free for people and other programs: 0 to 0.9.
    pub reserve: f64,
    /// Calls that may be made at once after a pause, in seconds' worth of the rate: 0 to 1. AWS bears about a second's.
    pub burst: f64,
    /// Files with what Service Quotas says of an account and Region, as
    /// `aws service-quotas list-service-quotas --service-code kms --output json` prints it there. It goes before `rates`.
    pub service_quotas_files: Vec<PathBuf>,
    /// Accounts, or single Regions of them, that AWS allows other rates; without a region, all of the account's:
    /// `{ account = "111122223333", region = "eu-central-1", rates = { GetParametersForImport = 5 } }`.
    pub overrides: Vec<QuotaOverride>,
}

/// What differs for an account, or for one Region of it.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct QuotaOverride {
    /// 12 digits.
    pub account: String,
    /// Absent: every Region of the account.
    pub region: Option<String>,
    /// As above; what is left out is as above.
    pub rates: BTreeMap<String, Rate>,
}

/// Calls a second.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum Rate {
    /// So many.
    PerSecond(f64),
    /// `unlimited`; any other word is an error that names its setting.
    Word(String),
}

impl Default for Quota {
    fn default() -> Self {
        Self { rates: defaults(), reserve: 0.1, burst: 0.5, service_quotas_files: Vec::new(), overrides: Vec::new() }
    }
}

/// How far apart the calls of an account and Region are to be; `None`: they are not counted. `figure` is what Service Quotas
/// says.
pub(super) fn closest(
    quota: &Quota,
    account: &str,
    region: &str,
    operation: Scarce,
    figure: impl FnOnce() -> Option<f64>,
) -> Option<Pace> {
    let of = |wanted: Option<&str>| {
        let fits = |entry: &&QuotaOverride| entry.account == account && entry.region.as_deref() == wanted;
        quota.overrides.iter().find(fits).and_then(|entry| rate(&entry.rates, operation)).cloned()
    };
    let found = of(Some(region)).or_else(|| of(None)).or_else(|| figure().map(Rate::PerSecond));
    match found.or_else(|| rate(&quota.rates, operation).cloned()) {
        Some(Rate::PerSecond(rate)) => Some(Pace::of(rate, quota.reserve, quota.burst)),
        Some(Rate::Word(_)) => None,
        None => Some(Pace::of(operation.default_rate(), quota.reserve, quota.burst)),
    }
}

impl Quota {
    /// The first thing that is wrong with it.
    pub(super) fn check(&self, targets: &[Target]) -> Result<(), ConfigError> {
        let wrong = |code, name: &str, expected| Err(ConfigError::Quota { code, name: name.to_owned(), expected });
        check_rates("quota.rates", &self.rates)?;
        if !(0.0..=0.9).contains(&self.reserve) {
            return wrong("quota_reserve_out_of_range", "quota.reserve", "a part of 0 to 0.9, as in 0.1");
        }
        if !(0.0..=1.0).contains(&self.burst) {
            return wrong("quota_burst_out_of_range", "quota.burst", "0 to 1 seconds' worth of calls, as in 0.5");
        }
        let mut seen = BTreeSet::new();
        for (at, entry) in self.overrides.iter().enumerate() {
            let name = |field: &str| format!("quota.overrides[{at}].{field}");
            let Some(target) = targets.iter().find(|target| target.account == entry.account) else {
                return wrong("quota_account_no_target", &name("account"), "an account of [[targets]]");
            };
            // An account may have several entries among the targets.
            let mut of_account = targets.iter().filter(|other| other.account == target.account);
            if let Some(region) = &entry.region
                && !of_account.any(|target| target.regions.contains(region))
            {
                return wrong("quota_region_no_target", &name("region"), "a Region of this account in [[targets]]");
            }
            if !seen.insert((&entry.account, &entry.region)) {
                return wrong("quota_override_twice", &name("account"), "one entry for an account and Region");
            }
            check_rates(&name("rates"), &entry.rates)?;
        }
        Ok(())
    }

    /// What may be meant otherwise, as sentences.
    pub fn warnings(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self.reserve >= 0.5 {
            found.push(format!("quota.reserve keeps {:.0} % of every quota from Keyferry", self.reserve * 100.0));
        }
        for entry in &self.overrides {
            let place = entry
                .region
                .as_ref()
                .map_or_else(|| entry.account.clone(), |region| format!("{} in {region}", entry.account));
            if entry.rates.is_empty() {
                found.push(format!("quota.overrides says nothing of {place}: it has no rates"));
            }
            for &operation in Scarce::ALL {
                match rate(&entry.rates, operation) {
                    Some(Rate::PerSecond(rate)) if *rate < operation.default_rate() => found.push(format!(
                        "quota.overrides gives {place} fewer {} a second ({rate}) than AWS's default ({})",
                        operation.as_str(),
                        operation.default_rate()
                    )),
                    Some(Rate::Word(_)) => found.push(format!(
                        "quota.overrides does not limit {} of {place}: AWS does, and throttles whoever uses it",
                        operation.as_str()
                    )),
                    _ => {}
                }
            }
        }
        found
    }
}

fn check_rates(section: &str, rates: &BTreeMap<String, Rate>) -> Result<(), ConfigError> {
    let number = "calls a second, from 0.001 to 10000, or \"unlimited\"";
    for (name, rate) in rates {
        let wrong = |code, expected| Err(ConfigError::Quota { code, name: format!("{section}.{name}"), expected });
        if operation(name).is_none() {
            let known = "GetParametersForImport, ImportKeyMaterial, DeleteImportedKeyMaterial, RotateKeyOnDemand or \
                         ListKeyRotations";
            return wrong("quota_operation_unknown", known);
        }
        match rate {
            Rate::Word(word) if word == UNLIMITED => {}
            Rate::Word(_) => return wrong("quota_rate_not_a_number", number),
            Rate::PerSecond(rate) if rate.is_nan() => return wrong("quota_rate_not_a_number", number),
            Rate::PerSecond(rate) if *rate < 0.0 => return wrong("quota_rate_negative", number),
            Rate::PerSecond(rate) if *rate == 0.0 => {
                return wrong(
                    "quota_rate_zero",
                    "more than 0 calls a second; keyferry hold stops an account or Region",
                );
            }
            Rate::PerSecond(rate) if *rate < RATES.0 => return wrong("quota_rate_too_small", number),
            Rate::PerSecond(rate) if *rate > RATES.1 => return wrong("quota_rate_too_large", number),
            Rate::PerSecond(_) => {}
        }
    }
    Ok(())
}

/// By AWS's name, or as the environment spells it, where all letters are small. What is last in order, and that is the
/// environment, counts.
fn rate(rates: &BTreeMap<String, Rate>, wanted: Scarce) -> Option<&Rate> {
    rates.iter().rev().find(|(name, _)| operation(name) == Some(wanted)).map(|(_, rate)| rate)
}

fn operation(name: &str) -> Option<Scarce> {
    Scarce::ALL.iter().copied().find(|operation| operation.as_str().eq_ignore_ascii_case(name))
}

fn defaults() -> BTreeMap<String, Rate> {
    let rate = |operation: &Scarce| (operation.as_str().to_owned(), Rate::PerSecond(operation.default_rate()));
    Scarce::ALL.iter().map(rate).collect()
}

/// What is left out is shown as what holds.
fn with_defaults<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, Rate>, D::Error> {
    let given = BTreeMap::<String, Rate>::deserialize(deserializer)?;
    let is_given = |name: &str| given.keys().any(|other| other.eq_ignore_ascii_case(name));
    let left_out: Vec<(String, Rate)> = defaults().into_iter().filter(|(name, _)| !is_given(name)).collect();
    Ok(given.into_iter().chain(left_out).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Loaded;

    const TARGETS: &str = "[[targets]]\naccount = \"111122223333\"\nregions = [\"eu-central-1\", \"us-east-1\"]\n\
                           [[targets]]\naccount = \"444455556666\"\nregions = [\"eu-central-1\"]\n";

    fn read(quota: &str) -> Result<Quota, ConfigError> {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("k.toml");
        std::fs::write(&file, format!("{TARGETS}{quota}")).unwrap();
        Loaded::read(Some(&file)).map(|loaded| loaded.settings.quota)
    }

    fn rate_of(quota: &Quota, account: &str, region: &str, operation: Scarce) -> Option<f64> {
        let pace = closest(quota, account, region, operation, || None)?;
        Some((100_000.0 / pace.interval_ms / (1.0 - quota.reserve)).round() / 100.0)
    }

    #[test]
    fn what_is_closest_counts_and_the_rest_is_as_aws_has_it() {
        let quota = read(
            "[quota]\nreserve = 0.2\n[quota.rates]\nImportKeyMaterial = 30\n\
             [[quota.overrides]]\naccount = \"111122223333\"\nrates = { GetParametersForImport = 5, ListKeyRotations = 7 }\n\
             [[quota.overrides]]\naccount = \"111122223333\"\nregion = \"us-east-1\"\n\
             rates = { GetParametersForImport = \"unlimited\" }\n",
        )
        .unwrap();
        let rate = |account: &str, region: &str, operation| rate_of(&quota, account, region, operation);
        let (eu, us) = ("eu-central-1", "us-east-1");
        assert_eq!(rate("111122223333", eu, Scarce::GetParametersForImport), Some(5.0));
        assert_eq!(rate("111122223333", us, Scarce::GetParametersForImport), None);
        assert_eq!(rate("111122223333", us, Scarce::ListKeyRotations), Some(7.0));
        assert_eq!(rate("444455556666", eu, Scarce::GetParametersForImport), Some(1.0));
        assert_eq!(rate("444455556666", eu, Scarce::ImportKeyMaterial), Some(30.0));
        assert_eq!(rate("444455556666", eu, Scarce::RotateKeyOnDemand), Some(5.0));
        let shown = serde_json::to_value(&quota).unwrap();
        assert_eq!(shown["rates"]["ImportKeyMaterial"], 30.0);
        assert_eq!(shown["rates"]["DeleteImportedKeyMaterial"], 15.0);
    }

    #[test]
    #[expect(clippy::result_large_err, reason = "figment's jail wants figment's error")]
    fn the_environment_goes_before_the_file() {
        figment::Jail::expect_with(|jail| {
            jail.create_file("k.toml", &format!("{TARGETS}[quota.rates]\nGetParametersForImport = 3\n"))?;
            jail.set_env("KEYFERRY_QUOTA__RATES__GETPARAMETERSFORIMPORT", "4");
            let loaded = Loaded::read(Some(std::path::Path::new("k.toml"))).map_err(|error| error.to_string())?;
            let quota = &loaded.settings.quota;
            assert_eq!(rate_of(quota, "111122223333", "eu-central-1", Scarce::GetParametersForImport), Some(4.0));
            Ok(())
        });
    }

    #[test]
    fn each_fault_names_its_setting_and_has_a_code_of_its_own() {
        let over = |text: &str| format!("[[quota.overrides]]\n{text}\n");
        let first = "quota.rates.GetParametersForImport";
        for (text, name, code) in [
            ("[quota.rates]\nGetParametersForImport = 0".to_owned(), first, "quota_rate_zero"),
            ("[quota.rates]\nGetParametersForImport = -1".into(), first, "quota_rate_negative"),
            ("[quota.rates]\nGetParametersForImport = nan".into(), first, "quota_rate_not_a_number"),
            ("[quota.rates]\nGetParametersForImport = \"many\"".into(), first, "quota_rate_not_a_number"),
            ("[quota.rates]\nGetParametersForImport = 10001".into(), first, "quota_rate_too_large"),
            ("[quota.rates]\nGetParametersForImport = inf".into(), first, "quota_rate_too_large"),
            ("[quota.rates]\nGetParametersForImport = 0.0001".into(), first, "quota_rate_too_small"),
            ("[quota.rates]\nDescribeKey = 5".into(), "quota.rates.DescribeKey", "quota_operation_unknown"),
            ("[quota]\nreserve = 1".into(), "quota.reserve", "quota_reserve_out_of_range"),
            ("[quota]\nreserve = nan".into(), "quota.reserve", "quota_reserve_out_of_range"),
            ("[quota]\nburst = -0.5".into(), "quota.burst", "quota_burst_out_of_range"),
            (over("account = \"999999999999\"\nrates = {}"), "quota.overrides[0].account", "quota_account_no_target"),
            (
                over("account = \"444455556666\"\nregion = \"us-east-1\"\nrates = {}"),
                "quota.overrides[0].region",
                "quota_region_no_target",
            ),
            (
                over("account = \"444455556666\"\nrates = {}").repeat(2),
                "quota.overrides[1].account",
                "quota_override_twice",
            ),
            (
                over("account = \"444455556666\"\nrates = { ListKeyRotations = 0 }"),
                "quota.overrides[0].rates.ListKeyRotations",
                "quota_rate_zero",
            ),
        ] {
            let error = read(&text).unwrap_err();
            assert!(matches!(error, ConfigError::Quota { code: found, .. } if found == code), "{text}: {error:?}");
            assert!(error.to_string().contains(name), "{text}: {error}");
        }
    }

    #[test]
    fn what_may_be_meant_otherwise_is_told() {
        let quota = read(
            "[quota]\nreserve = 0.6\n[[quota.overrides]]\naccount = \"444455556666\"\n\
             rates = { GetParametersForImport = 0.25, ImportKeyMaterial = \"unlimited\", RotateKeyOnDemand = 50 }\n",
        )
        .unwrap();
        let warnings = quota.warnings();
        assert_eq!(warnings.len(), 3, "{warnings:?}");
        assert!(warnings[1].contains("GetParametersForImport") && warnings[1].contains("0.25"), "{warnings:?}");
        assert_eq!(Quota::default().warnings(), [""; 0]);
    }
}
