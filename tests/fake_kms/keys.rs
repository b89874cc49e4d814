//! The key state machine: what imports, rotations, deletions and the passing of time do to a key and its materials.
//!
//! Pure: no lock, no I/O, no clock of its own; every function is told what time it is. Materials are a list, of which
//! at most one is current and at most one waits for its rotation. What an import does stands in [`crate::imports`],
//! what the Regions of one key tell each other in [`crate::table`].

use std::sync::Arc;

use crate::crypto::Sealed;
use crate::kinds::{DAY, ExpirationModel, KeySpec, KeyState, KeyUsage, Millis, Origin, Role};
use crate::materials::{Contents, Deleted, Digests, Listed, Material, MaterialId, Notice};
use crate::refusal::{self, Refusal};

/// How often a key can be rotated on demand.
pub const ROTATIONS: usize = 25;

/// A KMS key.
#[derive(Debug)]
pub struct Key {
    /// The full ARN.
    pub arn: Arc<str>,
    /// Account that owns it.
    pub account: Arc<str>,
    /// Region it lives in.
    pub region: Arc<str>,
    /// Kind of key.
    pub spec: KeySpec,
    /// What it may be used for.
    pub usage: KeyUsage,
    /// Where its material comes from.
    pub origin: Origin,
    /// Free text.
    pub description: String,
    /// Its place among the Regions.
    pub family: Family,
    /// When it was made.
    pub created_at: Millis,
    /// Tags, in the order given.
    pub tags: Vec<(String, String)>,
    /// All materials it ever took, oldest first, imported at the moment or not.
    pub materials: Vec<Material>,
    /// Switched off by `DisableKey`, or by a cancelled deletion.
    pub disabled: bool,
    /// When it ceases to exist, if a deletion is scheduled.
    pub deletion_at: Option<Millis>,
    /// A rotation that was asked for and has yet to happen.
    pub turning: Option<Turning>,
    /// What was to be seen before the last change, for all that imitates eventual consistency.
    pub before: Option<Box<Before>>,
}

/// A rotation under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turning {
    /// To which material.
    pub id: MaterialId,
    /// When it was asked for.
    pub asked_at: Millis,
    /// When it happens.
    pub due_at: Millis,
    /// The access key of whoever asked.
    pub by: Arc<str>,
}

/// What comes with time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Passed {
    /// Material has expired.
    Expired(Deleted),
    /// A rotation has happened.
    Rotated {
        /// To which material.
        id: MaterialId,
        /// What it is known again by.
        digests: Option<Digests>,
        /// The access key of whoever asked.
        by: Arc<str>,
    },
}

/// A key's place among the Regions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Family {
    /// It lives in one Region only.
    Single,
    /// A multi-Region key that has, or may have, replicas.
    Primary {
        /// The ARNs of its replicas.
        replicas: Vec<Arc<str>>,
    },
    /// A replica.
    Replica {
        /// The ARN of its primary.
        primary: Arc<str>,
    },
}

/// What is shown of a key's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// AWS's `KeyState`.
    pub state: KeyState,
    /// AWS's `CurrentKeyMaterialId`, for symmetric keys.
    pub current: Option<MaterialId>,
    /// AWS's `ExpirationModel`.
    pub model: Option<ExpirationModel>,
    /// The earliest expiry over all permanently associated materials.
    pub valid_to: Option<Millis>,
    /// When the key ceases to exist.
    pub deletion_at: Option<Millis>,
}

/// Everything about a key that may be seen late.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// For `DescribeKey`.
    pub view: View,
    /// For `ListKeyRotations`.
    pub materials: Vec<Listed>,
    /// For `GetPublicKey`.
    pub public_key: Option<Arc<[u8]>>,
}

/// What was to be seen before a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Before {
    /// When the change was.
    pub changed_at: Millis,
    /// What was to be seen.
    pub shown: Shown,
}

impl Key {
    /// The id, which is the ARN's last part.
    pub fn id(&self) -> &str {
        self.arn.rsplit('/').next().unwrap_or_default()
    }

    /// Whether it is the replica of a multi-Region key.
    pub fn is_replica(&self) -> bool {
        matches!(self.family, Family::Replica { .. })
    }

    /// Whether it has been there long enough to be known everywhere.
    pub fn is_known(&self, now: Millis, lag: Millis) -> bool {
        lag == 0 || now >= self.created_at.saturating_add(lag)
    }

    /// AWS's `KeyState`. A key is usable only while all of its permanently associated materials are there.
    pub fn state(&self) -> KeyState {
        let mut permanent = self.materials.iter().filter(|material| material.is_permanent()).peekable();
        // Pairs of KMS's own are keys in name only here.
        let complete = (self.origin == Origin::AwsKms && self.spec.is_pair())
            || (permanent.peek().is_some() && permanent.all(|material| material.imported));
        if self.deletion_at.is_some() {
            KeyState::PendingDeletion
        } else if !complete {
            KeyState::PendingImport
        } else if self.disabled {
            // UNVERIFIED for an import into a disabled key: it stays disabled here.
            KeyState::Disabled
        } else {
            KeyState::Enabled
        }
    }

    /// What `DescribeKey` shows.
    pub fn view(&self) -> View {
        let permanent = || self.materials.iter().filter(|material| material.is_permanent());
        let model = if permanent().any(|material| material.model == Some(ExpirationModel::Expires)) {
            Some(ExpirationModel::Expires)
        } else {
            permanent().find_map(|material| material.model)
        };
        View {
            state: self.state(),
            // A replica shows its primary's, whether or not it was given the material itself: UNVERIFIED.
            current: self.current().filter(|_| self.spec == KeySpec::SymmetricDefault).map(|material| material.id),
            model: model.filter(|_| self.origin == Origin::External),
            valid_to: permanent().filter_map(|material| material.valid_to).min(),
            deletion_at: self.deletion_at,
        }
    }

    /// Everything that is to be seen.
    pub fn shown(&self) -> Shown {
        Shown {
            view: self.view(),
            materials: self.materials.iter().map(Material::listed).collect(),
            public_key: self.current().and_then(Material::pair).map(|pair| Arc::clone(&pair.public)),
        }
    }

    /// What is seen instead, if the last change is younger than the lag.
    pub fn outdated(&self, now: Millis, lag: Millis) -> Option<&Shown> {
        self.before.as_ref().filter(|before| now < before.changed_at.saturating_add(lag)).map(|before| &before.shown)
    }

    /// Keeps what is to be seen, because it is about to change. One call may change a key twice, through its relatives.
    pub fn note_change(&mut self, now: Millis) {
        if self.before.as_ref().is_some_and(|before| before.changed_at == now) {
            return;
        }
        self.before = Some(Box::new(Before { changed_at: now, shown: self.shown() }));
    }

    /// Whether the key has ceased to exist.
    pub fn is_gone(&self, now: Millis) -> bool {
        self.deletion_at.is_some_and(|at| at <= now)
    }

    /// Lets the time pass: what has expired is deleted, and a rotation whose time has come happens, one after the other.
    pub fn settle(&mut self, now: Millis) -> Vec<Passed> {
        let due_at = self.turning.as_ref().map(|turning| turning.due_at).filter(|at| *at <= now);
        let mut passed = self.expire(due_at.unwrap_or(now));
        if due_at.is_some() {
            passed.extend(self.turning.take().and_then(|turning| self.turn_late(turning)));
            passed.extend(self.expire(now));
        }
        passed
    }

    fn expire(&mut self, now: Millis) -> Vec<Passed> {
        let expired: Vec<_> = self
            .materials
            .iter()
            .filter(|material| material.imported)
            .filter_map(|material| Some((material.valid_to.filter(|at| *at <= now)?, material.id)))
            .collect();
        expired.into_iter().filter_map(|(at, id)| self.remove(at, &id)).map(Passed::Expired).collect()
    }

    /// What becomes of a rotation whose material is gone by then is UNVERIFIED: nothing.
    fn turn_late(&mut self, Turning { id, due_at, by, .. }: Turning) -> Option<Passed> {
        let waits = |material: &Material| material.id == id && material.role.is_pending() && material.imported;
        self.materials.iter().any(waits).then(|| self.turn(due_at, &id))?;
        let material = self.current()?;
        Some(Passed::Rotated { id, digests: material.contents.digests().cloned(), by })
    }

    /// Deletes one material, the current one unless told otherwise. `None`: there was nothing to delete.
    pub fn delete_material(&mut self, now: Millis, id: Option<&MaterialId>) -> Result<Option<Deleted>, Refusal> {
        self.check_external()?;
        let id = match id {
            // UNVERIFIED code and text.
            Some(_) if self.spec != KeySpec::SymmetricDefault => {
                return Err(refusal::unsupported(format!(
                    "{} KeyMaterialId is valid for symmetric encryption keys only.",
                    self.arn
                )));
            }
            Some(id) if !self.materials.iter().any(|material| material.id == *id) => {
                return Err(Refusal::new(
                    "NotFoundException",
                    format!("Key material (id: {}) does not exist in KMS key {}", hex::encode(id), self.id()),
                ));
            }
            Some(id) => Some(*id),
            None => self.current().map(|material| material.id),
        };
        Ok(id.and_then(|id| self.remove(now, &id)))
    }

    /// `RotateKeyOnDemand`. How long a rotation takes, nothing or some time, is said by the caller. The order in which AWS
    /// checks is UNVERIFIED. `None`: it will happen.
    pub fn rotate(&mut self, now: Millis, takes: Millis, by: &Arc<str>) -> Result<Option<&Material>, Refusal> {
        if self.spec != KeySpec::SymmetricDefault {
            return Err(refusal::wrong_spec(&self.arn, self.spec.name()));
        }
        if self.origin == Origin::AwsKms {
            return Err(refusal::unsupported("This test double rotates keys with imported material only."));
        }
        if self.is_replica() {
            // UNVERIFIED code and text.
            return Err(refusal::unsupported(format!("{} is a multi-Region replica key.", self.arn)));
        }
        self.check_usable()?;
        if self.turning.is_some() {
            return Err(refusal::rotation_under_way(&self.arn));
        }
        if self.materials.iter().filter(|material| material.rotated_at.is_some()).count() >= ROTATIONS {
            return Err(refusal::rotation_limit(&self.arn));
        }
        // What AWS says while replicas still lack the material is UNVERIFIED.
        let is_ready = |material: &Material| material.role == Role::PendingRotation && material.imported;
        let Some(id) = self.materials.iter().find(|material| is_ready(material)).map(|material| material.id) else {
            return Err(refusal::nothing_pending(&self.arn));
        };
        if takes > 0 {
            self.turning = Some(Turning { id, asked_at: now, due_at: now + takes, by: Arc::clone(by) });
            return Ok(None);
        }
        self.turn(now, &id);
        Ok(self.current())
    }

    /// The material that waited comes into force.
    fn turn(&mut self, now: Millis, id: &MaterialId) {
        self.note_change(now);
        for material in &mut self.materials {
            if material.id == *id {
                material.role = Role::Current;
                material.rotated_at = Some(now);
            } else if material.role == Role::Current {
                material.role = Role::NonCurrent;
            }
        }
    }

    /// A replica learns which materials its primary has, in the primary's order, and gives up what the primary has
    /// given up.
    pub fn learn(&mut self, now: Millis, notices: &[Notice]) -> Vec<Deleted> {
        let agreed = self.materials.len() == notices.len()
            && self.materials.iter().zip(notices).all(|(material, notice)| material.agrees(notice));
        if agreed {
            return Vec::new();
        }
        self.note_change(now);
        let mut old = std::mem::take(&mut self.materials);
        for notice in notices {
            let known = old.iter().position(|material| material.id == notice.id).map(|at| old.remove(at));
            if let Some(mut material) = known {
                material.heed(notice);
                self.materials.push(material);
            } else {
                self.materials.extend(Material::announced(notice));
            }
        }
        old.into_iter().filter(|material| material.imported).map(|mut material| material.forget()).collect()
    }

    /// `EnableKey` and `DisableKey`.
    pub fn set_disabled(&mut self, now: Millis, disabled: bool) -> Result<(), Refusal> {
        match self.state() {
            KeyState::PendingImport => Err(refusal::pending_import(&self.arn)),
            KeyState::PendingDeletion => Err(refusal::pending_deletion(&self.arn)),
            KeyState::Enabled | KeyState::Disabled => {
                self.note_change(now);
                self.disabled = disabled;
                Ok(())
            }
        }
    }

    /// `ScheduleKeyDeletion`.
    pub fn schedule_deletion(&mut self, now: Millis, days: i64) -> Result<Millis, Refusal> {
        if self.deletion_at.is_some() {
            return Err(refusal::pending_deletion(&self.arn));
        }
        self.note_change(now);
        let at = now + days * DAY;
        self.deletion_at = Some(at);
        Ok(at)
    }

    /// `CancelKeyDeletion`, which leaves a complete key disabled.
    pub fn cancel_deletion(&mut self, now: Millis) -> Result<(), Refusal> {
        if self.deletion_at.is_none() {
            // UNVERIFIED text.
            return Err(refusal::invalid_state(format!("{} is not pending deletion.", self.arn)));
        }
        self.note_change(now);
        self.deletion_at = None;
        self.disabled = true;
        Ok(())
    }

    /// Whether cryptographic operations may run.
    pub fn check_usable(&self) -> Result<(), Refusal> {
        usable(&self.arn, self.state())
    }

    /// The material in force.
    pub fn current(&self) -> Option<&Material> {
        self.materials.iter().find(|material| material.role == Role::Current)
    }

    /// The material that waits for its rotation.
    pub fn pending_mut(&mut self) -> Option<&mut Material> {
        self.materials.iter_mut().find(|material| material.role.is_pending())
    }

    /// The materials that nobody has looked into yet.
    pub fn sealed(&self) -> impl Iterator<Item = &Arc<Sealed>> {
        self.materials.iter().filter_map(|material| match &material.contents {
            Contents::Sealed(sealed) => Some(sealed),
            Contents::Known { .. } | Contents::Broken(_) => None,
        })
    }

    fn remove(&mut self, now: Millis, id: &MaterialId) -> Option<Deleted> {
        let at = self.materials.iter().position(|material| material.id == *id && material.imported)?;
        self.note_change(now);
        let keeps = self.is_replica();
        let material = self.materials.get_mut(at)?;
        let deleted = material.forget();
        if !material.is_permanent() && !keeps {
            // Not yet permanently associated, so other material may take its place. UNVERIFIED on AWS.
            self.materials.remove(at);
        }
        Some(deleted)
    }
}

/// Whether a key in this state may be used.
pub fn usable(arn: &str, state: KeyState) -> Result<(), Refusal> {
    match state {
        KeyState::Enabled => Ok(()),
        KeyState::Disabled => Err(refusal::disabled(arn)),
        KeyState::PendingImport => Err(refusal::pending_import(arn)),
        KeyState::PendingDeletion => Err(refusal::pending_deletion(arn)),
    }
}

#[cfg(test)]
#[path = "keys_tests.rs"]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests;
