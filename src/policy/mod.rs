//! Who may ask for what. Pure.
//!
//! ```text
//! Identity (broker's word, or a Signature verified) --Policy::principal--> principal
//! principal + request + source key (Ask) --Policy::judge--> Verdict
//! ```
//!
//! The file's form is told in `file.rs`; what makes a rule match, and why nothing falls through to a later one, in `judge.rs`.

mod book;
mod current;
mod explain;
mod file;
mod glob;
mod identity;
mod judge;
mod reach;
mod signature;

pub use book::{Expiring, Operation, Principal, Rule};
pub use current::{Current, Keeper, current};
pub use explain::{Change, changes};
pub use file::PolicyError;
pub use identity::{Identity, Proof, claimed};
pub use judge::{Ask, Grant, Near, Source, Verdict};
pub use signature::{KeyFault, LONGEST_LIFE, PublicKey, Signature, Signed, Signer, SigningKey, is_audience};

use crate::job::KeyArn;
use book::Book;
use std::collections::HashSet;

/// Who asks, where nobody is asked who they are.
pub const ANONYMOUS: &str = "anonymous";
/// Who asks, where that could not be told.
pub const UNIDENTIFIED: &str = "unidentified";
/// What stands for the digest of a policy that has no file.
pub const ALLOW_ALL: &str = "allow-all";

/// Who may ask for what.
#[derive(Clone, Debug)]
pub enum Policy {
    /// Everybody who can write to the queue may ask for everything.
    AllowAll,
    /// What a file says.
    Rules(Box<Book>),
}

impl Policy {
    /// Reads a policy file.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        file::read(text).map(|book| Self::Rules(Box::new(book)))
    }

    /// SHA-256 of the file in hex, or [`ALLOW_ALL`].
    pub fn digest(&self) -> &str {
        match self {
            Self::AllowAll => ALLOW_ALL,
            Self::Rules(book) => &book.digest,
        }
    }

    /// Whose identity it is.
    pub fn principal(&self, identity: &Identity) -> Option<&str> {
        match self {
            Self::AllowAll => None,
            Self::Rules(book) => book.identities.get(identity).map(String::as_str),
        }
    }

    /// The key with this id.
    pub fn signing_key(&self, id: &str) -> Option<&PublicKey> {
        match self {
            Self::AllowAll => None,
            Self::Rules(book) => book.keys.get(id),
        }
    }

    /// Whether a principal may send others' messages again, in their names.
    pub fn may_redrive(&self, principal: &str) -> bool {
        match self {
            Self::AllowAll => true,
            Self::Rules(book) => book.principals.get(principal).is_some_and(|principal| principal.redrive),
        }
    }

    /// How many jobs of a principal may wait at once; `None`: any number.
    pub fn max_waiting(&self, principal: &str) -> Option<u32> {
        match self {
            Self::AllowAll => None,
            Self::Rules(book) => book.principals.get(principal)?.max_waiting,
        }
    }

    /// Whether there is a principal of this name.
    pub fn knows(&self, principal: &str) -> bool {
        match self {
            Self::AllowAll => principal == ANONYMOUS,
            Self::Rules(book) => book.principals.contains_key(principal),
        }
    }

    /// Why who asked no longer stands for the principal of a job. So a signing key that leaked, or a user that was taken
    /// away, stops what waits in its name.
    pub fn disowns(&self, principal: &str, identity: Option<&str>) -> Option<String> {
        if matches!(self, Self::AllowAll) {
            return None;
        }
        let Some(identity) = identity else {
            let message =
                "the job was accepted when nobody was asked who they are, and its principal is not in the policy";
            return (!self.knows(principal)).then(|| message.to_owned());
        };
        let owner = Identity::parse(identity).and_then(|identity| self.principal(&identity).map(str::to_owned));
        (owner.as_deref() != Some(principal))
            .then(|| format!("{identity}, who asked, is no longer the principal {principal}"))
    }

    /// What its keeper should look at, in sentences.
    pub fn warnings(&self) -> &[String] {
        match self {
            Self::AllowAll => &[],
            Self::Rules(book) => &book.warnings,
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
