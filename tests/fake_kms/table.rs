//! All keys, and what the Regions of a multi-Region key tell each other.
//!
//! The primary's materials, with their ids and texts, are known to its replicas at once; the bytes never are. New
//! material stays `PENDING_MULTI_REGION_IMPORT_AND_ROTATION` until every Region was given it.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::journal::{Effect, Entry, Journal};
use crate::keys::{Family, Key, Passed};
use crate::kinds::{Millis, Role};
use crate::materials::Material;
use crate::refusal::{self, Refusal};

/// All keys, by ARN. Whoever looks one up by an ARN of his own account and Region finds only those.
#[derive(Default)]
pub struct Keys(HashMap<Arc<str>, Key>);

impl Keys {
    /// The key, after the time that has passed has done its work.
    pub fn find(&mut self, arn: &str, now: Millis, journal: &mut Journal) -> Result<&mut Key, Refusal> {
        let is_single = self.0.get(arn).ok_or_else(|| refusal::not_found(arn))?.family == Family::Single;
        if !is_single {
            for relative in self.family(arn, now) {
                self.0.get_mut(&relative).into_iter().for_each(|key| settle(key, now, journal));
            }
            self.synchronise(arn, now, journal);
        }
        let key = self.0.get_mut(arn).ok_or_else(|| refusal::not_found(arn))?;
        settle(key, now, journal);
        if key.is_gone(now) { Err(refusal::not_found(arn)) } else { Ok(key) }
    }

    /// The key as operations find it: one that was made a moment ago is not known everywhere yet.
    pub fn known(&mut self, arn: &str, now: Millis, lag: Millis, journal: &mut Journal) -> Result<&mut Key, Refusal> {
        let key = self.find(arn, now, journal)?;
        if key.is_known(now, lag) { Ok(key) } else { Err(refusal::not_found(arn)) }
    }

    /// Adds a key.
    pub fn insert(&mut self, key: Key) {
        self.0.insert(Arc::clone(&key.arn), key);
    }

    /// Adds a replica, which learns at once what its primary has.
    pub fn insert_replica(&mut self, key: Key, now: Millis, journal: &mut Journal) {
        let arn = Arc::clone(&key.arn);
        if let Family::Replica { primary } = &key.family
            && let Some(Key { family: Family::Primary { replicas }, .. }) = self.0.get_mut(primary)
        {
            replicas.push(Arc::clone(&arn));
        }
        self.insert(key);
        self.synchronise(&arn, now, journal);
    }

    /// All keys that satisfy a condition and exist, by ARN.
    pub fn list(&self, now: Millis, condition: impl Fn(&Key) -> bool) -> Vec<&Key> {
        let mut keys: Vec<_> = self.0.values().filter(|key| !key.is_gone(now) && condition(key)).collect();
        keys.sort_unstable_by(|one, other| one.arn.cmp(&other.arn));
        keys
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// To be called after every change of a key's materials: its replicas learn of it. On a single-Region key it does
    /// nothing.
    pub fn synchronise(&mut self, arn: &str, now: Millis, journal: &mut Journal) {
        let family = self.family(arn, now);
        let Some((primary, replicas)) = family.split_first() else { return };
        let role = if replicas.iter().all(|replica| self.holds_pending_of(primary, replica)) {
            Role::PendingRotation
        } else {
            Role::PendingReplicas
        };
        let Some(key) = self.0.get_mut(primary) else { return };
        if key.pending_mut().is_some_and(|pending| pending.role != role) {
            key.note_change(now);
            key.pending_mut().into_iter().for_each(|pending| pending.role = role);
        }
        let notices: Vec<_> = key.materials.iter().map(Material::notice).collect();
        for replica in replicas {
            let Some(key) = self.0.get_mut(replica) else { continue };
            for deleted in key.learn(now, &notices) {
                journal.push(of_kms_itself(key, "SynchronizeMultiRegionKey", now, Effect::Deleted(deleted)));
            }
        }
    }

    /// AWS's `MultiRegionConfiguration`; `None` for a key of one Region.
    pub fn configuration(&self, arn: &str, now: Millis) -> Option<Value> {
        let family = self.family(arn, now);
        let (primary, replicas) = family.split_first()?;
        let place = |arn: &Arc<str>| json!({ "Arn": &**arn, "Region": self.0.get(arn).map(|key| &*key.region) });
        Some(json!({
            "MultiRegionKeyType": if &**primary == arn { "PRIMARY" } else { "REPLICA" },
            "PrimaryKey": place(primary),
            "ReplicaKeys": replicas.iter().map(place).collect::<Vec<_>>(),
        }))
    }

    /// The primary of a multi-Region key and, after it, all replicas that exist. Empty for a key of one Region.
    fn family(&self, arn: &str, now: Millis) -> Vec<Arc<str>> {
        let primary = match self.0.get(arn).map(|key| (&key.arn, &key.family)) {
            None | Some((_, Family::Single)) => return Vec::new(),
            Some((own, Family::Primary { .. })) => own,
            Some((_, Family::Replica { primary })) => primary,
        };
        let Some(Key { family: Family::Primary { replicas }, .. }) = self.0.get(primary) else { return Vec::new() };
        let exists = |arn: &&Arc<str>| self.0.get(*arn).is_some_and(|key| !key.is_gone(now));
        std::iter::once(primary).chain(replicas.iter().filter(exists)).cloned().collect()
    }

    fn holds_pending_of(&self, primary: &str, replica: &str) -> bool {
        let pending =
            self.0.get(primary).and_then(|key| key.materials.iter().find(|material| material.role.is_pending()));
        pending.is_none_or(|pending| {
            self.0
                .get(replica)
                .is_some_and(|key| key.materials.iter().any(|material| material.id == pending.id && material.imported))
        })
    }
}

/// Lets the time pass.
fn settle(key: &mut Key, now: Millis, journal: &mut Journal) {
    for passed in key.settle(now) {
        journal.push(match passed {
            Passed::Expired(deleted) => of_kms_itself(key, "DeleteExpiredKeyMaterial", now, Effect::Deleted(deleted)),
            // Nobody calls, but somebody has asked for it.
            Passed::Rotated { id, digests, by } => {
                let entry = of_kms_itself(key, "RotateKey", now, Effect::Rotated { id, digests });
                Entry { access_key: Some(by), ..entry }
            }
        });
    }
}

/// The journal's line for what KMS does without being called.
fn of_kms_itself(key: &Key, operation: &'static str, now: Millis, effect: Effect) -> Entry {
    Entry {
        at: now,
        operation,
        key_arn: Some(Arc::clone(&key.arn)),
        account: Some(Arc::clone(&key.account)),
        region: Some(Arc::clone(&key.region)),
        access_key: None,
        session: None,
        outcome: "ok".into(),
        fault: None,
        late: false,
        effect: Some(Box::new(effect)),
    }
}
