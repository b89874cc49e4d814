//! What AWS allows each account and Region: the settings, and what Service Quotas says where its words were saved.

use super::{ConfigError, Loaded, Quota, Target};
use crate::config::quota::{RATES, closest};
use crate::job::Scarce;
use crate::quota::Pace;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

/// The setting that names the files.
const SETTING: &str = "quota.service_quotas_files";
/// Such a file is some 50 KiB.
const MOST_BYTES: u64 = 4 << 20;

/// Calls a second, by account, Region and operation.
#[derive(Clone, Debug)]
pub struct Rates {
    quota: Quota,
    figures: Figures,
    warnings: Vec<String>,
}

/// Those of Service Quotas.
type Figures = BTreeMap<Place, f64>;

/// Account, Region and operation.
type Place = (String, String, Scarce);

impl Loaded {
    /// What holds, the files of Service Quotas read.
    pub fn rates(&self) -> Result<Rates, ConfigError> {
        let quota = self.settings.quota.clone();
        let (mut figures, mut warnings) = (Figures::new(), quota.warnings());
        for path in &quota.service_quotas_files {
            let unusable = |reason| ConfigError::Unusable { name: SETTING.to_owned(), path: path.clone(), reason };
            let text = text(path).map_err(|error| ConfigError::File { name: SETTING, path: path.clone(), error })?;
            for (place, rate) in read(&text).map_err(unusable)? {
                if let Some(other) = figures.insert(place.clone(), rate)
                    && (other - rate).abs() > f64::EPSILON
                {
                    let (account, region, operation) = place;
                    return Err(unusable(format!(
                        "it allows account {account} in {region} {rate} {} a second, another file {other}",
                        operation.as_str()
                    )));
                }
            }
        }
        warnings.extend(strangers(&figures, &self.settings.targets));
        Ok(Rates { quota, figures, warnings })
    }
}

impl Rates {
    /// How far apart the calls of an account and Region are to be; `None`: they are not counted. What the settings say of
    /// that account goes before what Service Quotas says, and that before what they say of all.
    pub fn pace(&self, account: &str, region: &str, operation: Scarce) -> Option<Pace> {
        // Asked before every call with a scarce quota: without files nothing is copied for it.
        let figure = || {
            let place = (!self.figures.is_empty()).then(|| (account.to_owned(), region.to_owned(), operation))?;
            self.figures.get(&place).copied()
        };
        closest(&self.quota, account, region, operation, figure)
    }

    /// Accounts and Regions of which Service Quotas says something.
    pub fn places(&self) -> usize {
        places(&self.figures).len()
    }

    /// What may be meant otherwise, as sentences.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

fn text(path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(path)?.take(MOST_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

/// What `ListServiceQuotas` answers (Service Quotas API Reference), as far as it is of use here.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    quotas: Vec<Entry>,
    /// The client joins pages by itself, unless told not to.
    next_token: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    quota_arn: Option<String>,
    quota_name: Option<String>,
    value: Option<f64>,
    period: Option<Period>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Period {
    period_value: Option<u32>,
    period_unit: Option<String>,
}

fn read(text: &str) -> Result<Vec<(Place, f64)>, String> {
    let hint = "expected what 'aws service-quotas list-service-quotas --service-code kms --output json' prints";
    let answer: Answer = serde_json::from_str(text)
        .map_err(|error| format!("line {}, column {}: {hint}", error.line(), error.column()))?;
    if answer.next_token.is_some() {
        return Err("it is one page of several: save it without --no-paginate and --max-items".into());
    }
    let mut found = Vec::new();
    for entry in answer.quotas {
        let name = entry.quota_name.as_deref().unwrap_or_default();
        let Some(operation) = name.strip_suffix(" request rate").and_then(Scarce::parse) else { continue };
        let (account, region) = entry.quota_arn.as_deref().and_then(place).ok_or_else(|| {
            format!("the quota {name} is of no account and Region: save list-service-quotas, not the defaults of AWS")
        })?;
        let is_a_second = entry
            .period
            .as_ref()
            .is_none_or(|period| period.period_value == Some(1) && period.period_unit.as_deref() == Some("SECOND"));
        match entry.value {
            Some(rate) if is_a_second && (RATES.0..=RATES.1).contains(&rate) => {
                found.push(((account, region, operation), rate));
            }
            _ => return Err(format!("the quota {name} has no value from {} to {} a second", RATES.0, RATES.1)),
        }
    }
    if found.is_empty() {
        return Err(format!("it has no request rate of KMS that is counted here: {hint}"));
    }
    Ok(found)
}

/// Account and Region of `arn:aws:servicequotas:eu-central-1:111122223333:kms/L-...`.
fn place(arn: &str) -> Option<(String, String)> {
    let parts: Vec<&str> = arn.split(':').collect();
    match parts[..] {
        ["arn", _, "servicequotas", region, account, quota]
            if !region.is_empty() && !account.is_empty() && quota.starts_with("kms/") =>
        {
            Some((account.to_owned(), region.to_owned()))
        }
        _ => None,
    }
}

/// Accounts and Regions, each once.
fn places(figures: &Figures) -> Vec<(&str, &str)> {
    let mut places: Vec<_> = figures.keys().map(|(account, region, _)| (account.as_str(), region.as_str())).collect();
    places.dedup();
    places
}

/// Figures that nothing asks for: a file of the wrong account, as likely as not.
fn strangers(figures: &Figures, targets: &[Target]) -> Vec<String> {
    let is_target = |account: &str, region: &str| {
        targets.iter().any(|target| target.account == account && target.regions.iter().any(|own| own == region))
    };
    let odd = places(figures).into_iter().filter(|(account, region)| !is_target(account, region));
    odd.map(|(account, region)| format!("{SETTING} tells of account {account} in {region}, which is no target"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const EU: &str = "arn:aws:servicequotas:eu-central-1:111122223333:kms/L-DC14942D";

    fn saved(name: &str, value: f64, arn: &str) -> String {
        let other = json!({"ServiceCode": "kms", "QuotaArn": arn, "QuotaName": "Aliases per CMK", "Value": 50.0});
        let entry = json!({"ServiceCode": "kms", "QuotaArn": arn, "QuotaName": name, "Value": value, "Unit": "None",
                           "Adjustable": true, "Period": {"PeriodValue": 1, "PeriodUnit": "SECOND"}});
        json!({"Quotas": [other, entry]}).to_string()
    }

    fn loaded(files: &[String], quota: &str) -> (tempfile::TempDir, Result<Rates, ConfigError>) {
        let directory = tempfile::tempdir().unwrap();
        let mut names = Vec::new();
        for (number, text) in files.iter().enumerate() {
            let path = directory.path().join(format!("{number}.json"));
            std::fs::write(&path, text).unwrap();
            names.push(path);
        }
        let settings = directory.path().join("k.toml");
        let targets = "[[targets]]\naccount = \"111122223333\"\nregions = [\"eu-central-1\", \"us-east-1\"]\n";
        std::fs::write(&settings, format!("{targets}[quota]\nservice_quotas_files = {names:?}\n{quota}")).unwrap();
        (directory, Loaded::read(Some(&settings)).unwrap().rates())
    }

    fn rate(rates: &Rates, region: &str, operation: Scarce) -> f64 {
        let pace = rates.pace("111122223333", region, operation).unwrap();
        (100_000.0 / pace.interval_ms / 0.9).round() / 100.0
    }

    #[test]
    fn what_service_quotas_says_goes_between_what_is_said_of_one_account_and_of_all() {
        let files = [
            saved("GetParametersForImport request rate", 7.0, EU),
            saved("ImportKeyMaterial request rate", 40.0, &EU.replace("eu-central-1", "us-east-1")),
        ];
        let rates = loaded(&files, "[quota.rates]\nGetParametersForImport = 3\n").1.unwrap();
        assert!((rate(&rates, "eu-central-1", Scarce::GetParametersForImport) - 7.0).abs() < 0.01);
        assert!((rate(&rates, "us-east-1", Scarce::GetParametersForImport) - 3.0).abs() < 0.01);
        assert!((rate(&rates, "us-east-1", Scarce::ImportKeyMaterial) - 40.0).abs() < 0.01);
        assert!((rate(&rates, "eu-central-1", Scarce::ImportKeyMaterial) - 15.0).abs() < 0.01);
        assert_eq!((rates.places(), rates.warnings().len()), (2, 0));
        let own = "[[quota.overrides]]\naccount = \"111122223333\"\nrates = { GetParametersForImport = 2 }\n";
        let rates = loaded(&files, own).1.unwrap();
        assert!((rate(&rates, "eu-central-1", Scarce::GetParametersForImport) - 2.0).abs() < 0.01);
    }

    #[test]
    fn a_file_that_is_no_answer_of_service_quotas_is_refused_and_says_what_would_be() {
        let get = "GetParametersForImport request rate";
        for (files, said) in [
            (vec!["{}".to_owned()], "list-service-quotas"),
            (vec![json!({"Quotas": []}).to_string()], "no request rate"),
            (vec![json!({"Quotas": [], "NextToken": "x"}).to_string()], "one page"),
            (vec![saved(get, 0.0, EU)], "no value from 0.001"),
            (vec![saved(get, 1e9, EU)], "no value from 0.001"),
            (vec![saved(get, 5.0, EU).replace("SECOND", "MINUTE")], "a second"),
            (vec![saved(get, 5.0, "arn:aws:servicequotas:eu-central-1::kms/L-DC14942D")], "not the defaults"),
            (vec![saved(get, 5.0, EU), saved(get, 6.0, EU)], "another file 5"),
        ] {
            let error = loaded(&files, "").1.unwrap_err();
            let text = error.to_string();
            assert!(matches!(error, ConfigError::Unusable { .. }), "{text}");
            assert!(text.contains(said) && text.contains(SETTING) && text.contains(".json"), "{text}");
        }
        let missing = "[[targets]]\naccount = \"111122223333\"\nregions = [\"eu-central-1\"]\n[quota]\nservice_quotas_files = [\"none\"]";
        let directory = tempfile::tempdir().unwrap();
        let settings = directory.path().join("k.toml");
        std::fs::write(&settings, missing).unwrap();
        let error = Loaded::read(Some(&settings)).unwrap().rates().unwrap_err();
        assert!(matches!(error, ConfigError::File { name: SETTING, .. }), "{error}");
    }

    #[test]
    fn figures_of_what_is_no_target_are_told() {
        let files = [saved("GetParametersForImport request rate", 7.0, &EU.replace("111122223333", "999999999999"))];
        let rates = loaded(&files, "").1.unwrap();
        assert!(rates.warnings()[0].contains("999999999999"), "{:?}", rates.warnings());
    }
}
