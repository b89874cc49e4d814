//! `[[targets]]`: accounts and Regions that requests may name, and how the worker acts in each.

use super::{ConfigError, Loaded, open_to_others, redacted};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::time::Duration;
use url::{Host, Url};

/// Partitions, and how the names of their Regions begin (AWS SDKs, `partitions.json`). A Region that AWS opens tomorrow
/// needs no new version.
const PARTITIONS: [(&str, &[&str]); 8] = [
    ("aws", &["af", "ap", "ca", "eu", "il", "me", "mx", "sa", "us"]),
    ("aws-cn", &["cn"]),
    ("aws-us-gov", &["us-gov"]),
    ("aws-eusc", &["eusc-de"]),
    ("aws-iso", &["us-iso"]),
    ("aws-iso-b", &["us-isob"]),
    ("aws-iso-e", &["eu-isoe"]),
    ("aws-iso-f", &["us-isof"]),
];

/// Variables by which the SDK goes to another host than AWS's, of all services, of KMS, of STS.
const ENDPOINT_VARIABLES: [&str; 3] = ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_KMS", "AWS_ENDPOINT_URL_STS"];

/// An account and its Regions.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// 12 digits.
    pub account: String,
    /// `aws`, `aws-us-gov`, ...
    #[serde(default = "default_partition")]
    pub partition: String,
    /// Region names.
    pub regions: Vec<String>,
    /// The role that is assumed for calls in this account. Absent: the worker's own credentials are of this account.
    #[serde(default)]
    pub role_arn: Option<String>,
    /// The external id that the role's trust policy asks for. Better in a file.
    #[serde(default, serialize_with = "redacted")]
    pub external_id: Option<SecretString>,
    /// A file that holds it.
    #[serde(default)]
    pub external_id_file: Option<PathBuf>,
    /// What `CloudTrail` of this account calls the worker's sessions.
    #[serde(default = "default_session_name")]
    pub session_name: String,
    /// Seconds for which the credentials of a session are good. They are renewed before. The role must allow as much.
    #[serde(default = "default_session_s")]
    pub session_s: u64,
    /// The Region whose STS gives out the sessions. Absent: the first of `regions`.
    #[serde(default)]
    pub sts_region: Option<String>,
    /// Whether to use AWS's FIPS endpoints of KMS and STS. Not every Region has one of STS: see `sts_region`.
    #[serde(default)]
    pub fips: bool,
    /// Whether to use AWS's endpoints that are reached by `IPv6` as well.
    #[serde(default)]
    pub dual_stack: bool,
    /// Endpoints of KMS by Region, where they are not AWS's own: those of a VPC, for instance.
    #[serde(default)]
    pub endpoints: BTreeMap<String, String>,
}

/// What can be wrong with a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetFault {
    /// The same account and Region twice.
    Duplicate,
    /// No partition of AWS.
    Partition,
    /// No Region of the partition.
    Region,
    /// No ARN of a role.
    Role,
    /// A role of another account.
    RoleAccount,
    /// A role of another partition.
    RolePartition,
    /// An external id that AWS does not take, twice, or without a role.
    ExternalId,
    /// A session's name that AWS does not take.
    SessionName,
    /// A session that is too short or too long.
    SessionLife,
    /// No URL, or none that keeps what is said to itself.
    Endpoint,
    /// An endpoint for a Region that is no target.
    EndpointRegion,
    /// AWS's FIPS endpoint, and another one.
    FipsEndpoint,
    /// AWS's dual-stack endpoint, and another one.
    DualStackEndpoint,
}

impl TargetFault {
    /// Stable, for programs.
    pub fn code(self) -> &'static str {
        match self {
            Self::Duplicate => "target_duplicate",
            Self::Partition => "target_partition_unknown",
            Self::Region => "target_region_unknown",
            Self::Role => "target_role_malformed",
            Self::RoleAccount => "target_role_other_account",
            Self::RolePartition => "target_role_other_partition",
            Self::ExternalId => "target_external_id",
            Self::SessionName => "target_session_name",
            Self::SessionLife => "target_session_s",
            Self::Endpoint => "target_endpoint_malformed",
            Self::EndpointRegion => "target_endpoint_region",
            Self::FipsEndpoint => "target_fips_with_endpoint",
            Self::DualStackEndpoint => "target_dual_stack_with_endpoint",
        }
    }

    /// The setting, the part of it that is wrong, and the rule.
    fn told(self) -> (&'static str, &'static str) {
        match self {
            Self::Duplicate => ("targets.regions", "each account and Region once"),
            Self::Partition => {
                ("targets.partition", "aws, aws-cn, aws-us-gov, aws-eusc, aws-iso, aws-iso-b, aws-iso-e or aws-iso-f")
            }
            Self::Region => ("targets.regions", "Regions of the target's partition, sts_region included"),
            Self::Role => ("targets.role_arn", "arn:<partition>:iam::<account>:role/<path and name>"),
            Self::RoleAccount => ("targets.role_arn", "a role of the target's own account"),
            Self::RolePartition => ("targets.role_arn", "a role of the target's own partition"),
            Self::ExternalId => (
                "targets.external_id",
                "2 to 1224 of A-Z a-z 0-9 _ + = , . @ : / -, as external_id or in external_id_file, for a role_arn",
            ),
            Self::SessionName => ("targets.session_name", "2 to 64 of A-Z a-z 0-9 _ + = , . @ -"),
            Self::SessionLife => ("targets.session_s", "900 to 43200"),
            Self::Endpoint => (
                "targets.endpoints",
                "https://host each, without a path, user or query; http only to this machine's own 127.0.0.1 or [::1]",
            ),
            Self::EndpointRegion => ("targets.endpoints", "Regions that are among the target's regions"),
            Self::FipsEndpoint => (
                "targets.fips",
                "AWS's own endpoints: leave out endpoints and the variables AWS_ENDPOINT_URL, AWS_ENDPOINT_URL_KMS and \
                 AWS_ENDPOINT_URL_STS, or name a FIPS endpoint by endpoints alone",
            ),
            Self::DualStackEndpoint => (
                "targets.dual_stack",
                "AWS's own endpoints: leave out endpoints and the variables AWS_ENDPOINT_URL, AWS_ENDPOINT_URL_KMS and \
                 AWS_ENDPOINT_URL_STS",
            ),
        }
    }
}

impl Target {
    /// `session_s`.
    pub fn session(&self) -> Duration {
        Duration::from_secs(self.session_s)
    }

    /// The Region whose STS is asked.
    pub fn sts_region(&self) -> &str {
        self.sts_region.as_deref().or(self.regions.first().map(String::as_str)).unwrap_or_default()
    }

    fn fault(&self) -> Option<TargetFault> {
        let regions = || self.regions.iter().chain(&self.sts_region);
        let is_elsewhere =
            || !self.endpoints.is_empty() || ENDPOINT_VARIABLES.iter().any(|name| std::env::var_os(name).is_some());
        let Some((_, beginnings)) = PARTITIONS.iter().find(|(name, _)| *name == self.partition) else {
            return Some(TargetFault::Partition);
        };
        let has_external_id = self.external_id.is_some() || self.external_id_file.is_some();
        let external_id = self.external_id.as_ref().map(ExposeSecret::expose_secret);
        let rules = [
            (TargetFault::Region, regions().all(|region| is_region(region, beginnings))),
            (
                TargetFault::ExternalId,
                external_id.is_none_or(is_external_id)
                    && !(self.external_id.is_some() && self.external_id_file.is_some())
                    && (self.role_arn.is_some() || !has_external_id),
            ),
            (TargetFault::SessionName, is_session_name(&self.session_name)),
            (TargetFault::SessionLife, (900..=43_200).contains(&self.session_s)),
            (TargetFault::Endpoint, self.endpoints.values().all(|url| is_endpoint(url))),
            (TargetFault::EndpointRegion, self.endpoints.keys().all(|region| self.regions.contains(region))),
            (TargetFault::FipsEndpoint, !(self.fips && is_elsewhere())),
            (TargetFault::DualStackEndpoint, !(self.dual_stack && is_elsewhere())),
        ];
        self.role_fault().or_else(|| rules.into_iter().find(|(_, holds)| !holds).map(|(fault, _)| fault))
    }

    fn role_fault(&self) -> Option<TargetFault> {
        let parts: Vec<&str> = self.role_arn.as_deref()?.splitn(6, ':').collect();
        let ["arn", partition, "iam", "", account, resource] = parts[..] else { return Some(TargetFault::Role) };
        let is_role = resource.strip_prefix("role/").is_some_and(|name| {
            // A path of at most 512 and a name of at most 64 (IAM API Reference, `CreateRole`).
            (1..=576).contains(&name.len()) && !name.ends_with('/') && name.bytes().all(|b| is_word(b) || b == b'/')
        });
        match () {
            () if !is_role => Some(TargetFault::Role),
            () if partition != self.partition => Some(TargetFault::RolePartition),
            () if account != self.account => Some(TargetFault::RoleAccount),
            () => None,
        }
    }
}

impl Loaded {
    /// The external id of a target, from the setting or its file.
    pub fn external_id(&self, target: &Target) -> Result<Option<SecretString>, ConfigError> {
        let Some(path) = &target.external_id_file else { return Ok(target.external_id.clone()) };
        let text = std::fs::read_to_string(path).map(SecretString::from).map_err(|error| ConfigError::File {
            name: "targets.external_id_file",
            path: path.clone(),
            error,
        })?;
        let id = text.expose_secret().trim_end_matches(['\r', '\n']);
        if !is_external_id(id) {
            let (_, expected) = TargetFault::ExternalId.told();
            let (name, reason) = ("targets.external_id_file".to_owned(), format!("expected {expected}"));
            return Err(ConfigError::Unusable { name, path: path.clone(), reason });
        }
        Ok(Some(id.into()))
    }

    /// What is wrong with who may read the files of external ids.
    pub fn target_file_warnings(&self) -> Vec<String> {
        let warning = |target: &Target| {
            let path = target.external_id_file.as_ref()?;
            open_to_others(path).map(|mode| {
                format!(
                    "the file {} of targets.external_id_file is open to more than its owner (mode {mode:o}): who can read it \
                     knows half of what the role of account {} asks for; chmod 600 unless something else keeps others away",
                    path.display(),
                    target.account
                )
            })
        };
        self.settings.targets.iter().filter_map(warning).collect()
    }
}

/// The first rule that a target breaks.
pub(super) fn broken_rule(targets: &[Target]) -> Option<ConfigError> {
    let of = |target: &Target, fault: TargetFault| {
        let (name, expected) = fault.told();
        ConfigError::Target { name, account: target.account.clone(), fault, expected }
    };
    let mut seen = HashSet::new();
    targets.iter().find_map(|target| {
        let mut is_new = |region| seen.insert((&target.partition, &target.account, region));
        let are_new = target.regions.iter().all(&mut is_new);
        let fault = target.fault().or((!are_new).then_some(TargetFault::Duplicate));
        fault.map(|fault| of(target, fault))
    })
}

/// `eu-central-1`: the beginning, words, a number.
fn is_region(region: &str, beginnings: &[&str]) -> bool {
    let is_rest = |rest: &str| {
        let Some((words, number)) = rest.rsplit_once('-') else { return false };
        let is_word = |word: &str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase());
        words.split('-').all(is_word) && (1..=2).contains(&number.len()) && number.bytes().all(|b| b.is_ascii_digit())
    };
    // `us-gov-west-1` begins like a Region of the first partition, and has a word too many for it.
    let words = |text: &str| text.matches('-').count();
    let rest = |beginning: &&str| region.strip_prefix(*beginning).and_then(|rest| rest.strip_prefix('-'));
    beginnings.iter().any(|beginning| rest(beginning).is_some_and(is_rest) && words(region) == words(beginning) + 2)
}

/// What AWS takes (STS API Reference, `AssumeRole`).
fn is_external_id(id: &str) -> bool {
    (2..=1224).contains(&id.len()) && id.bytes().all(|b| is_word(b) || b == b':' || b == b'/')
}

/// The same of a session's name.
fn is_session_name(name: &str) -> bool {
    (2..=64).contains(&name.len()) && name.bytes().all(is_word)
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_+=,.@-".contains(&byte)
}

/// What is said there is signed, but not what is answered: whoever is on the way could answer with a public key of his own, and
/// would be sent every key wrapped for him.
fn is_endpoint(text: &str) -> bool {
    let Ok(url) = Url::parse(text) else { return false };
    let is_bare = url.path() == "/" && url.query().is_none() && url.fragment().is_none();
    let is_anonymous = url.username().is_empty() && url.password().is_none();
    let is_here = match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        Some(Host::Domain(_)) | None => false,
    };
    url.has_host() && is_bare && is_anonymous && (url.scheme() == "https" || (url.scheme() == "http" && is_here))
}

fn default_partition() -> String {
    "aws".into()
}

fn default_session_name() -> String {
    "keyferry".into()
}

fn default_session_s() -> u64 {
    3_600
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fault of a target of account 111122223333 with these lines.
    fn fault(lines: &str) -> Option<TargetFault> {
        let regions = if lines.contains("regions =") { "" } else { "regions = [\"eu-central-1\"]" };
        let target: Target = toml::from_str(&format!("account = \"111122223333\"\n{regions}\n{lines}")).unwrap();
        target.fault()
    }

    fn role(arn: &str) -> Option<TargetFault> {
        fault(&format!("role_arn = {arn:?}"))
    }

    #[test]
    fn a_role_is_of_the_targets_own_account_and_partition() {
        assert_eq!(role("arn:aws:iam::111122223333:role/keyferry"), None);
        assert_eq!(role("arn:aws:iam::111122223333:role/teams/keys/Key.Ferry@prod"), None);
        assert_eq!(role("arn:aws:iam::111122223334:role/keyferry"), Some(TargetFault::RoleAccount));
        assert_eq!(role("arn:aws-cn:iam::111122223333:role/keyferry"), Some(TargetFault::RolePartition));
        for arn in [
            "keyferry",
            "arn:aws:iam::111122223333:user/keyferry",
            "arn:aws:iam::111122223333:role/",
            "arn:aws:iam:eu-central-1:111122223333:role/keyferry",
            "arn:aws:sts::111122223333:assumed-role/keyferry/x",
            "arn:aws:iam::111122223333:role/key ferry",
        ] {
            assert_eq!(role(arn), Some(TargetFault::Role), "{arn}");
        }
    }

    #[test]
    fn regions_are_of_the_partition() {
        for (partition, region) in [
            ("aws", "eu-central-1"),
            ("aws", "ap-southeast-17"),
            ("aws", "mx-central-1"),
            ("aws-cn", "cn-northwest-1"),
            ("aws-us-gov", "us-gov-west-1"),
            ("aws-iso-b", "us-isob-east-1"),
            ("aws-eusc", "eusc-de-east-1"),
        ] {
            assert_eq!(fault(&format!("partition = {partition:?}\nregions = [{region:?}]")), None, "{region}");
            let other = if partition == "aws" { "aws-cn" } else { "aws" };
            let of_other = fault(&format!("partition = {other:?}\nregions = [{region:?}]"));
            assert_eq!(of_other, Some(TargetFault::Region), "{region} in {other}");
        }
        for region in
            ["", "eu", "eu-central", "eu-central-x", "EU-central-1", "eu--1", "eu-central-1a", "eu-central-123"]
        {
            assert_eq!(fault(&format!("regions = [{region:?}]")), Some(TargetFault::Region), "{region}");
        }
        assert_eq!(fault("partition = \"aws-moon\""), Some(TargetFault::Partition));
        assert_eq!(fault("sts_region = \"cn-north-1\""), Some(TargetFault::Region));
    }

    #[test]
    fn endpoints_are_https_but_on_this_machine() {
        for url in ["https://vpce-0a.kms.eu-central-1.vpce.amazonaws.com", "http://127.0.0.1:4599", "http://[::1]:1/"] {
            assert!(is_endpoint(url), "{url}");
        }
        for url in [
            "",
            "kms.eu-central-1.amazonaws.com",
            "http://kms.eu-central-1.amazonaws.com",
            "http://localhost:4599",
            "http://10.0.0.1",
            "https://user@host",
            "https://host/path",
            "https://host?x=1",
            "ftp://host",
        ] {
            assert!(!is_endpoint(url), "{url}");
        }
        let there = |region: &str| fault(&format!("endpoints = {{ {region} = \"https://host\" }}"));
        assert_eq!(there("eu-central-1"), None);
        assert_eq!(there("us-east-1"), Some(TargetFault::EndpointRegion));
        let with = |switch: &str| fault(&format!("{switch} = true\nendpoints = {{ eu-central-1 = \"https://host\" }}"));
        assert_eq!(with("fips"), Some(TargetFault::FipsEndpoint));
        assert_eq!(with("dual_stack"), Some(TargetFault::DualStackEndpoint));
    }

    #[test]
    fn sessions_are_as_sts_takes_them() {
        let role = "role_arn = \"arn:aws:iam::111122223333:role/keyferry\"";
        assert_eq!(fault(&format!("{role}\nexternal_id = \"prod/42\"")), None);
        for lines in [
            "external_id = \"prod\"".to_owned(),
            format!("{role}\nexternal_id = \"x\""),
            format!("{role}\nexternal_id = \"a b\""),
            format!("{role}\nexternal_id = \"ab\"\nexternal_id_file = \"f\""),
        ] {
            assert_eq!(fault(&lines), Some(TargetFault::ExternalId), "{lines}");
        }
        assert_eq!(fault("session_name = \"a b\""), Some(TargetFault::SessionName));
        assert_eq!(fault("session_s = 899"), Some(TargetFault::SessionLife));
        assert_eq!(fault("session_s = 43201"), Some(TargetFault::SessionLife));
    }

    #[test]
    fn an_account_and_region_is_a_target_once() {
        let of = |text: &str| {
            #[derive(Deserialize)]
            struct All {
                targets: Vec<Target>,
            }
            let all: All = toml::from_str(text).unwrap();
            broken_rule(&all.targets).map(|error| error.to_string())
        };
        let one = "[[targets]]\naccount = \"111122223333\"\nregions = [\"eu-central-1\"]\n";
        assert_eq!(of(one), None);
        assert!(of(&format!("{one}{one}")).is_some_and(|told| told.contains("111122223333")));
        assert!(of(&one.replace("[\"eu-central-1\"]", "[\"eu-central-1\", \"eu-central-1\"]")).is_some());
        assert_eq!(of(&format!("{one}{}", one.replace("3333", "3334"))), None);
        assert_eq!(of(&format!("{one}{}", one.replace("eu-central-1", "eu-west-1"))), None);
        assert_eq!(of(&format!("{one}{}partition = \"aws-cn\"", one.replace("eu-central-1", "cn-north-1"))), None);
    }
}
