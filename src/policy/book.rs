//! A policy as it was read from its file: everything in it holds together.

use super::glob::Glob;
use super::identity::Identity;
use super::signature::PublicKey;
use crate::job;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::time::Duration;

/// Principals and rules.
#[derive(Clone, Debug)]
pub struct Book {
    /// SHA-256 of the file in hex.
    pub(super) digest: String,
    pub(super) principals: BTreeMap<String, Principal>,
    /// In the file's order, which decides.
    pub(super) rules: Vec<Rule>,
    pub(super) identities: HashMap<Identity, String>,
    pub(super) keys: HashMap<String, PublicKey>,
    pub(super) warnings: Vec<String>,
}

/// Somebody who asks, under one name on all transports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    /// As whom it is known.
    pub identities: BTreeSet<Identity>,
    /// Its signing keys by their ids.
    pub keys: BTreeMap<String, PublicKey>,
    /// Whether it may send others' messages again, in their names.
    pub redrive: bool,
    /// How many of its jobs may wait at once.
    pub max_waiting: Option<u32>,
}

/// What some principals may ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its name, of its own.
    pub name: String,
    /// For whom it is.
    pub principals: BTreeSet<String>,
    /// For what.
    pub operations: BTreeSet<Operation>,
    /// On keys of these accounts; `None`: any.
    pub accounts: Option<BTreeSet<String>>,
    /// In these Regions; `None`: any.
    pub regions: Option<Vec<Glob>>,
    /// On these keys, by ARN; `None`: any.
    pub keys: Option<Vec<Glob>>,
    /// From these tiers; `None`: any. Does not concern deletes.
    pub tiers: Option<BTreeSet<String>>,
    /// With these source keys; `None`: any, and generated ones. Does not concern deletes.
    pub source_keys: Option<Vec<SourcePattern>>,
    /// Whether material must expire.
    pub expiring: Expiring,
    /// How long a principal waits between two rotations of a key. Nothing judges by it here: it is carried in the verdict
    /// for the part that rotates.
    pub shortest_rotation_interval: Duration,
    /// Whether deletes may overtake their line.
    pub urgent: bool,
}

/// What may be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// The first material, or the same again.
    Import,
    /// Other material.
    Rotate,
    /// Taking material away.
    Delete,
}

/// Which source keys a rule means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourcePattern {
    /// `<generated>`: a key that is made for the job.
    Generated,
    /// A key by name. With a slash it is one of the tier `dsm`, `CONNECTION/NAME`; without, one of `local`. A lone `*` is
    /// any key of any tier, and a generated one.
    Named(Glob),
}

/// Whether material must expire, and how late at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiring {
    /// As the request says.
    Optional,
    /// It must, at most so long after the job's start, where a longest time is set.
    Required(Option<Duration>),
}

impl Operation {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Import, Self::Rotate, Self::Delete];

    /// Its word in the file.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Import => "import",
            Self::Rotate => "rotate",
            Self::Delete => "delete",
        }
    }

    /// Whether it brings material from a source.
    pub fn takes_source(self) -> bool {
        self != Self::Delete
    }
}

impl From<job::Operation> for Operation {
    fn from(operation: job::Operation) -> Self {
        match operation {
            job::Operation::Import => Self::Import,
            job::Operation::Rotate => Self::Rotate,
            job::Operation::Delete => Self::Delete,
        }
    }
}

impl SourcePattern {
    /// How a generated key is written.
    pub const GENERATED: &str = "<generated>";

    /// Whether it means every key.
    pub(super) fn is_everything(&self) -> bool {
        matches!(self, Self::Named(glob) if glob.is_everything())
    }

    /// Whether every key that `other` means is known to be meant by this one.
    pub(super) fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            _ if self.is_everything() => true,
            (Self::Generated, Self::Generated) => true,
            (Self::Named(mine), Self::Named(other)) => mine.covers(other) && is_dsm(mine) == is_dsm(other),
            _ => false,
        }
    }

    /// Whether some key is meant by both.
    pub(super) fn meets(&self, other: &Self) -> bool {
        match (self, other) {
            _ if self.is_everything() || other.is_everything() => true,
            (Self::Generated, Self::Generated) => true,
            (Self::Named(mine), Self::Named(other)) => mine.meets(other) && is_dsm(mine) == is_dsm(other),
            _ => false,
        }
    }

    /// Whether it means a key of this name.
    pub(super) fn means(&self, name: &str) -> bool {
        match self {
            _ if self.is_everything() => true,
            Self::Generated => false,
            Self::Named(glob) => is_dsm(glob) == name.contains('/') && glob.matches(name),
        }
    }

    /// Whether it means a key by this identifier, spelt out. A pattern does not: it would mean identifiers by chance.
    pub(super) fn means_exactly(&self, id: &str) -> bool {
        matches!(self, Self::Named(glob) if glob.is_literal() && glob.matches(id))
    }
}

fn is_dsm(glob: &Glob) -> bool {
    glob.as_str().contains('/')
}

impl fmt::Display for SourcePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Generated => f.write_str(Self::GENERATED),
            Self::Named(glob) => glob.fmt(f),
        }
    }
}
