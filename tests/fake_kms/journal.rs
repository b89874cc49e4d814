//! The record of every call and every effect, by which tests check what really happened at "AWS".
//!
//! Entries hold shared strings and raw digests; they become JSON only when somebody asks.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::kinds::{ExpirationModel, Millis, rfc3339};
use crate::materials::{Deleted, Digests, MaterialId};

/// What one call changed.
#[derive(Clone, Debug)]
pub enum Effect {
    /// A key came into being.
    Created,
    /// Material was imported.
    Imported {
        /// Id of the material.
        id: MaterialId,
        /// Digests of the material, unless it was left sealed.
        digests: Option<Digests>,
        /// Whether it expires.
        model: ExpirationModel,
        /// When it expires.
        valid_to: Option<Millis>,
        /// Whether it is the key's first.
        first: bool,
        /// Whether the key had had it before.
        again: bool,
    },
    /// Material was deleted by a call, or has expired.
    Deleted(Deleted),
    /// Material that waited for it became the current one.
    Rotated {
        /// Id of the material.
        id: MaterialId,
        /// Digests of the material.
        digests: Option<Digests>,
    },
    /// The key's state was changed.
    State(&'static str),
}

/// One line of the journal.
#[derive(Clone, Debug)]
pub struct Entry {
    /// When, by the double's clock.
    pub at: Millis,
    /// Operation, as the client named it if it is known.
    pub operation: &'static str,
    /// Key, if the call names one; of `AssumeRole` the role.
    pub key_arn: Option<Arc<str>>,
    /// Account of the caller; absent if the caller could not be authenticated.
    pub account: Option<Arc<str>>,
    /// Region of the call.
    pub region: Option<Arc<str>>,
    /// Access key of the caller, or of whoever assumed the caller's role; absent for what KMS does by itself.
    pub access_key: Option<Arc<str>>,
    /// The caller's session, as an ARN, if the caller assumed a role.
    pub session: Option<Arc<str>>,
    /// `ok`, an error code, `throttled`, `hang` or `late`.
    pub outcome: Cow<'static, str>,
    /// The fault that was applied, if any.
    pub fault: Option<&'static str>,
    /// Whether this happened when the client could no longer learn of it.
    pub late: bool,
    /// The change, if any.
    pub effect: Option<Box<Effect>>,
}

/// The bounded list of entries, numbered from 1 without gaps.
#[derive(Debug)]
pub struct Journal {
    entries: VecDeque<Entry>,
    limit: usize,
    dropped: u64,
    grown: Arc<Notify>,
}

/// Which entries somebody is interested in. Absent means any.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Operation's name.
    pub operation: Option<String>,
    /// Key's ARN, or its id.
    pub key: Option<String>,
    /// Outcome.
    pub outcome: Option<String>,
    /// Name of an effect, or `any`, or `none`.
    pub effect: Option<String>,
    /// Whether late.
    pub late: Option<bool>,
}

impl Journal {
    /// An empty journal that forgets its oldest entries beyond the limit.
    pub fn new(limit: usize, grown: Arc<Notify>) -> Self {
        Self { entries: VecDeque::new(), limit, dropped: 0, grown }
    }

    /// Adds an entry and wakes those who wait for one.
    pub fn push(&mut self, entry: Entry) {
        if self.entries.len() >= self.limit && self.entries.pop_front().is_some() {
            self.dropped += 1;
        }
        self.entries.push_back(entry);
        self.grown.notify_waiters();
    }

    /// Number of the next entry.
    pub fn next(&self) -> u64 {
        self.dropped + u64::try_from(self.entries.len()).unwrap_or(0) + 1
    }

    /// Number of the oldest entry that is still there.
    pub fn oldest(&self) -> u64 {
        self.dropped + 1
    }

    /// The entries from a number on, with their numbers.
    pub fn from(&self, number: u64) -> impl Iterator<Item = (u64, &Entry)> {
        let skip = usize::try_from(number.saturating_sub(self.oldest())).unwrap_or(usize::MAX);
        (self.oldest()..).zip(&self.entries).skip(skip.min(self.entries.len()))
    }
}

impl Filter {
    /// Whether the entry is of interest.
    pub fn admits(&self, entry: &Entry) -> bool {
        let is = |wanted: &Option<String>, value: &str| wanted.as_deref().is_none_or(|wanted| wanted == value);
        is(&self.operation, entry.operation)
            && is(&self.outcome, &entry.outcome)
            && self.late.is_none_or(|late| late == entry.late)
            && self.key.as_deref().is_none_or(|wanted| entry.key_arn.as_deref().is_some_and(|arn| names(wanted, arn)))
            && match self.effect.as_deref() {
                None => true,
                Some("any") => entry.effect.is_some(),
                Some("none") => entry.effect.is_none(),
                Some(wanted) => entry.effect.as_ref().is_some_and(|effect| effect.name() == wanted),
            }
    }
}

/// Whether a control caller's key, an ARN or an id, is this one.
pub fn names(wanted: &str, arn: &str) -> bool {
    wanted == arn || arn.rsplit('/').next() == Some(wanted)
}

impl Entry {
    /// The entry as the control interface shows it.
    pub fn json(&self, number: u64) -> Value {
        json!({
            "n": number,
            "at": rfc3339(self.at),
            "operation": self.operation,
            "key_arn": self.key_arn.as_deref(),
            "account": self.account.as_deref(),
            "region": self.region.as_deref(),
            "access_key": self.access_key.as_deref(),
            "session": self.session.as_deref(),
            "outcome": self.outcome,
            "fault": self.fault,
            "late": self.late,
            "effect": self.effect.as_ref().map(|effect| effect.json(self.late)),
        })
    }
}

impl Effect {
    fn name(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Imported { .. } => "imported",
            Self::Deleted(_) => "deleted",
            Self::Rotated { .. } => "rotated",
            Self::State(_) => "state",
        }
    }

    fn json(&self, late: bool) -> Value {
        let body = match self {
            Self::Created => json!({}),
            Self::Imported { id, digests, model, valid_to, first, again } => {
                let mut body = named(id, digests.as_ref());
                body["expiration_model"] = json!(model.name());
                body["valid_to"] = json!(valid_to.map(rfc3339));
                body["first"] = json!(first);
                body["again"] = json!(again);
                body["late"] = json!(late);
                body
            }
            Self::Deleted(Deleted { id, digests }) | Self::Rotated { id, digests } => named(id, digests.as_ref()),
            Self::State(state) => json!(state),
        };
        json!({ self.name(): body })
    }
}

/// A material as the control interface names it. Only pairs have a public key.
pub fn named(id: &MaterialId, digests: Option<&Digests>) -> Value {
    let mut body = json!({
        "key_material_id": hex::encode(id),
        "material_sha256": digests.map(|digests| hex::encode(digests.material)),
    });
    if let Some(public_key) = digests.and_then(|digests| digests.public_key) {
        body["public_key_sha256"] = json!(hex::encode(public_key));
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(operation: &'static str, key: &str) -> Entry {
        Entry {
            at: 0,
            operation,
            key_arn: Some(format!("arn:aws:kms:r:1:key/{key}").into()),
            account: None,
            region: None,
            access_key: None,
            session: None,
            outcome: "ok".into(),
            fault: None,
            late: false,
            effect: Some(Box::new(Effect::Created)),
        }
    }

    #[test]
    fn it_numbers_without_gaps_and_forgets_the_oldest() {
        let mut journal = Journal::new(3, Arc::default());
        for _ in 0..5 {
            journal.push(entry("CreateKey", "a"));
        }
        let numbers = |from| journal.from(from).map(|(number, _)| number).collect::<Vec<_>>();
        assert_eq!(numbers(0), [3, 4, 5]);
        assert_eq!(numbers(5), [5]);
        assert_eq!(numbers(6), [0; 0]);
        assert_eq!((journal.oldest(), journal.next()), (3, 6));
    }

    #[test]
    fn it_is_filtered_by_every_column() {
        let entry = entry("CreateKey", "a");
        let some = |text: &str| Some(text.to_owned());
        assert!(Filter::default().admits(&entry));
        assert!(Filter { key: some("a"), effect: some("created"), ..Filter::default() }.admits(&entry));
        assert!(!Filter { key: some("b"), ..Filter::default() }.admits(&entry));
        assert!(!Filter { effect: some("none"), ..Filter::default() }.admits(&entry));
        assert!(!Filter { operation: some("ListKeys"), ..Filter::default() }.admits(&entry));
        assert!(!Filter { late: Some(true), ..Filter::default() }.admits(&entry));
    }
}
