//! Who may ask for what. Pure.

use crate::job::{KeyArn, Request};
use serde::Deserialize;
use std::collections::HashSet;

/// The rules. There is one so far, and it must be written out: `policy = "allow-all"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Everybody who can write to the queue may ask for everything.
    AllowAll,
}

/// What the policy says to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Allowed.
    Allowed,
    /// Not allowed.
    Denied,
}

impl Policy {
    /// Judges a request. Asked at intake and again at each claim.
    pub fn judge(self, _principal: &str, _request: &Request) -> Verdict {
        match self {
            Self::AllowAll => Verdict::Allowed,
        }
    }
}

/// Accounts and Regions that requests may name.
#[derive(Clone, Debug, Default)]
pub struct Targets(HashSet<(String, String, String)>);

impl Targets {
    /// From partition, account and Region of each.
    pub fn new(each: impl IntoIterator<Item = (String, String, String)>) -> Self {
        Self(each.into_iter().collect())
    }

    /// Whether the key lies in one of them.
    pub fn contains(&self, key: &KeyArn) -> bool {
        self.0.contains(&(key.partition().to_owned(), key.account().to_owned(), key.region().to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_partition_account_and_region_together() {
        let targets = Targets::new([("aws".into(), "111122223333".into(), "eu-central-1".into())]);
        let holds = |start: &str| {
            let arn = format!("{start}:key/031c5703-aaf7-425e-a141-7e0c6f5886ab");
            targets.contains(&KeyArn::parse(&arn).unwrap())
        };
        assert!(holds("arn:aws:kms:eu-central-1:111122223333"));
        assert!(!holds("arn:aws:kms:us-east-1:111122223333"));
        assert!(!holds("arn:aws:kms:eu-central-1:111122223334"));
        assert!(!holds("arn:aws-cn:kms:eu-central-1:111122223333"));
    }
}
