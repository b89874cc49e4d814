//! The key state machine: what imports, deletions and the passing of time do to a key and its materials.
//!
//! Pure: no lock, no I/O, no clock of its own; every function is told what time it is. Materials are a list, of which at
//! most one is current and at most one waits for its rotation, so that on-demand rotation fits in without a change of
//! shape.

use std::sync::Arc;

use crate::crypto::{Plain, Sealed, Unopened, sha256};
use crate::kinds::{DAY, ExpirationModel, ImportType, KeySpec, KeyState, KeyUsage, Millis, Origin, Role};
use crate::refusal::{self, Refusal};

/// The raw form of AWS's `KeyMaterialId`.
pub type MaterialId = [u8; 32];

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
    /// Whether it is a multi-Region primary; replicas do not exist here.
    pub multi_region: bool,
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
    /// What `DescribeKey` said before the last change, for the fault that imitates eventual consistency.
    pub before: Option<Box<View>>,
}

/// One material of a key.
#[derive(Debug)]
pub struct Material {
    /// Its id; for symmetric keys the client sees it.
    pub id: MaterialId,
    /// What it is to the key.
    pub role: Role,
    /// Whether its bytes are there.
    pub imported: bool,
    /// The bytes, as far as known.
    pub contents: Contents,
    /// The client's text.
    pub description: Option<String>,
    /// Set while imported.
    pub model: Option<ExpirationModel>,
    /// When it goes, if it expires.
    pub valid_to: Option<Millis>,
}

/// What is known of a material's bytes.
#[derive(Debug)]
pub enum Contents {
    /// Unwrapped. The bytes are gone once the material is deleted; the digest stays, to know the material again.
    Known {
        /// SHA-256 over the bytes.
        sha256: [u8; 32],
        /// The bytes, while imported.
        bytes: Option<Plain>,
    },
    /// Not unwrapped yet (`--unwrap lazy`).
    Sealed(Arc<Sealed>),
    /// Did not unwrap when somebody looked (`--unwrap lazy`): the text says why.
    Broken(&'static str),
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

/// The parameters of an import, but for the token and the material itself.
#[derive(Clone, Debug)]
pub struct Import {
    /// New or existing; `None` lets the key's history decide.
    pub kind: Option<ImportType>,
    /// The id the client expects.
    pub material_id: Option<MaterialId>,
    /// Replaces the old text if given.
    pub description: Option<String>,
    /// Whether it expires.
    pub model: ExpirationModel,
    /// When it expires.
    pub valid_to: Option<Millis>,
    /// What to answer to a repeated import of the material that is pending already.
    pub repeat: RepeatedNew,
}

/// What AWS says to `NEW_KEY_MATERIAL` with the bytes that are pending already is UNVERIFIED; a test can choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RepeatedNew {
    /// `IncorrectKeyMaterialException`.
    #[default]
    IncorrectKeyMaterial,
    /// `KMSInvalidStateException ... is pending rotation`.
    InvalidState,
}

/// The material that comes with an import.
#[derive(Debug)]
pub enum Offered {
    /// In the clear.
    Plain(Plain),
    /// Still wrapped; only a key without any material takes it like that.
    Sealed(Arc<Sealed>),
}

/// What an import did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// The material's id.
    pub id: MaterialId,
    /// SHA-256 over the material, if it was unwrapped.
    pub sha256: Option<[u8; 32]>,
    /// Whether the key had never had material before.
    pub first: bool,
    /// Whether the key had this very material before.
    pub again: bool,
}

/// What a deletion or an expiry removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deleted {
    /// The material's id.
    pub id: MaterialId,
    /// SHA-256 over the material, if known.
    pub sha256: Option<[u8; 32]>,
}

impl Key {
    /// The id, which is the ARN's last part.
    pub fn id(&self) -> &str {
        self.arn.rsplit('/').next().unwrap_or_default()
    }

    /// AWS's `KeyState`. A key is usable only while all of its permanently associated materials are there.
    pub fn state(&self) -> KeyState {
        let mut permanent = self.materials.iter().filter(|material| material.is_permanent()).peekable();
        let complete = self.spec.material_length().is_none()
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
            current: self.current().filter(|_| self.spec == KeySpec::SymmetricDefault).map(|material| material.id),
            model: model.filter(|_| self.origin == Origin::External),
            valid_to: permanent().filter_map(|material| material.valid_to).min(),
            deletion_at: self.deletion_at,
        }
    }

    /// Whether the key has ceased to exist.
    pub fn is_gone(&self, now: Millis) -> bool {
        self.deletion_at.is_some_and(|at| at <= now)
    }

    /// Lets the time pass: what has expired is deleted.
    pub fn settle(&mut self, now: Millis) -> Vec<Deleted> {
        let expired: Vec<_> = self
            .materials
            .iter()
            .filter(|material| material.imported && material.valid_to.is_some_and(|at| at <= now))
            .map(|material| material.id)
            .collect();
        expired.into_iter().filter_map(|id| self.remove(&id)).collect()
    }

    /// Everything that forbids an import before the material is looked at. The order in which AWS checks is UNVERIFIED.
    pub fn check_import(&self, now: Millis, import: &Import) -> Result<(), Refusal> {
        self.check_import_state()?;
        if self.spec != KeySpec::SymmetricDefault
            && (import.kind.is_some() || import.material_id.is_some() || import.description.is_some())
        {
            // UNVERIFIED code and text.
            return Err(refusal::unsupported(format!(
                "{} ImportType, KeyMaterialId and KeyMaterialDescription are valid for symmetric encryption keys only.",
                self.arn
            )));
        }
        match (import.model, import.valid_to) {
            (ExpirationModel::Expires, Some(at)) if at <= now => {
                Err(refusal::incorrect_material("The key material has expired."))
            }
            _ => Ok(()),
        }
    }

    /// Origin and state that both steps of the import procedure ask for.
    pub fn check_import_state(&self) -> Result<(), Refusal> {
        self.check_external()?;
        if self.deletion_at.is_some() {
            return Err(refusal::pending_deletion(&self.arn));
        }
        Ok(())
    }

    /// Imports material. Every material that is still sealed must have been opened before, unless there is none at all.
    pub fn import(&mut self, now: Millis, import: &Import, offered: Offered) -> Result<Imported, Refusal> {
        self.check_import(now, import)?;
        let contents = match offered {
            Offered::Plain(bytes) => {
                // UNVERIFIED code: the description of the exception fits.
                if self.spec.material_length() != Some(bytes.len()) {
                    return Err(refusal::incorrect_material("The key material has an invalid length."));
                }
                Contents::Known { sha256: sha256(&[&bytes]), bytes: Some(bytes) }
            }
            Offered::Sealed(sealed) => Contents::Sealed(sealed),
        };
        let first = self.materials.is_empty();
        let default = if first { ImportType::New } else { ImportType::Existing };
        let known = contents
            .sha256()
            .and_then(|digest| self.materials.iter().position(|material| material.contents.sha256() == Some(digest)));
        let id = known.and_then(|at| self.materials.get(at)).map_or_else(|| self.derive_id(&contents), |old| old.id);
        let outcome = Imported { id, sha256: contents.sha256(), first, again: known.is_some() };
        match import.kind.unwrap_or(default) {
            ImportType::New => self.admit_new(&outcome, import.repeat)?,
            ImportType::Existing if known.is_none() => {
                return Err(refusal::incorrect_material(
                    "The key material does not match the key material that was previously imported into this KMS key.",
                ));
            }
            ImportType::Existing => {}
        }
        if import.material_id.is_some_and(|expected| expected != id) {
            return Err(refusal::incorrect_material("The key material does not match the given KeyMaterialId."));
        }
        self.before = Some(Box::new(self.view()));
        let material = if let Some(old) = known.and_then(|at| self.materials.get_mut(at)) {
            old.contents = contents;
            old
        } else {
            let role = if first { Role::Current } else { Role::PendingRotation };
            self.materials.push_mut(Material::new(id, role, contents))
        };
        material.imported = true;
        material.model = Some(import.model);
        material.valid_to = import.valid_to;
        if import.description.is_some() {
            material.description.clone_from(&import.description);
        }
        Ok(outcome)
    }

    /// Deletes one material, the current one unless told otherwise. `None`: there was nothing to delete.
    pub fn delete_material(&mut self, id: Option<&MaterialId>) -> Result<Option<Deleted>, Refusal> {
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
        Ok(id.and_then(|id| self.remove(&id)))
    }

    /// `EnableKey` and `DisableKey`.
    pub fn set_disabled(&mut self, disabled: bool) -> Result<(), Refusal> {
        match self.state() {
            KeyState::PendingImport => Err(refusal::pending_import(&self.arn)),
            KeyState::PendingDeletion => Err(refusal::pending_deletion(&self.arn)),
            KeyState::Enabled | KeyState::Disabled => {
                self.before = Some(Box::new(self.view()));
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
        self.before = Some(Box::new(self.view()));
        let at = now + days * DAY;
        self.deletion_at = Some(at);
        Ok(at)
    }

    /// `CancelKeyDeletion`, which leaves a complete key disabled.
    pub fn cancel_deletion(&mut self) -> Result<(), Refusal> {
        if self.deletion_at.is_none() {
            // UNVERIFIED text.
            return Err(refusal::invalid_state(format!("{} is not pending deletion.", self.arn)));
        }
        self.before = Some(Box::new(self.view()));
        self.deletion_at = None;
        self.disabled = true;
        Ok(())
    }

    /// Whether cryptographic operations may run.
    pub fn check_usable(&self) -> Result<(), Refusal> {
        match self.state() {
            KeyState::Enabled => Ok(()),
            KeyState::Disabled => Err(refusal::disabled(&self.arn)),
            KeyState::PendingImport => Err(refusal::pending_import(&self.arn)),
            KeyState::PendingDeletion => Err(refusal::pending_deletion(&self.arn)),
        }
    }

    /// The material in force.
    pub fn current(&self) -> Option<&Material> {
        self.materials.iter().find(|material| material.role == Role::Current)
    }

    /// The materials that nobody has looked into yet.
    pub fn sealed(&self) -> impl Iterator<Item = &Arc<Sealed>> {
        self.materials.iter().filter_map(|material| match &material.contents {
            Contents::Sealed(sealed) => Some(sealed),
            Contents::Known { .. } | Contents::Broken(_) => None,
        })
    }

    /// Puts the unwrapped bytes where the sealed ones were.
    pub fn open(&mut self, sealed: &Arc<Sealed>, opened: Result<Plain, Unopened>) {
        let length = self.spec.material_length();
        for material in &mut self.materials {
            if matches!(&material.contents, Contents::Sealed(own) if Arc::ptr_eq(own, sealed)) {
                material.contents = match opened {
                    Ok(bytes) if Some(bytes.len()) == length => {
                        Contents::Known { sha256: sha256(&[&bytes]), bytes: material.imported.then_some(bytes) }
                    }
                    Ok(_) => Contents::Broken("the key material has an invalid length"),
                    Err(Unopened) => Contents::Broken("the key material does not unwrap"),
                };
                return;
            }
        }
    }

    fn check_external(&self) -> Result<(), Refusal> {
        match self.origin {
            Origin::External => Ok(()),
            Origin::AwsKms => Err(refusal::wrong_origin(&self.arn, self.origin.name())),
        }
    }

    fn admit_new(&self, offered: &Imported, repeat: RepeatedNew) -> Result<(), Refusal> {
        let pending = self.materials.iter().find(|material| material.role == Role::PendingRotation);
        let is_repeat = pending.is_some_and(|pending| pending.id == offered.id);
        match pending {
            Some(pending) if !offered.again || (is_repeat && repeat == RepeatedNew::InvalidState) => {
                Err(refusal::pending_rotation(&hex::encode(offered.id), self.id(), &hex::encode(pending.id)))
            }
            _ if offered.again => {
                Err(refusal::incorrect_material("The key material is already associated with this KMS key."))
            }
            _ => Ok(()),
        }
    }

    /// AWS's derivation is not published; this one is ours. Sealed material is named after its wrapped form.
    fn derive_id(&self, contents: &Contents) -> MaterialId {
        let (label, bytes) = match contents {
            Contents::Known { bytes: Some(bytes), .. } => ("fake-kms material", bytes.as_slice()),
            Contents::Sealed(sealed) => ("fake-kms sealed material", sealed.blob.as_slice()),
            Contents::Known { bytes: None, .. } | Contents::Broken(_) => ("fake-kms material", &[][..]),
        };
        sha256(&[label.as_bytes(), self.id().as_bytes(), bytes])
    }

    fn remove(&mut self, id: &MaterialId) -> Option<Deleted> {
        let at = self.materials.iter().position(|material| material.id == *id && material.imported)?;
        self.before = Some(Box::new(self.view()));
        let material = self.materials.get_mut(at)?;
        let deleted = Deleted { id: material.id, sha256: material.contents.sha256() };
        material.imported = false;
        material.model = None;
        material.valid_to = None;
        if let Contents::Known { bytes, .. } = &mut material.contents {
            *bytes = None;
        }
        if !material.is_permanent() {
            // Not yet permanently associated, so other material may take its place. UNVERIFIED on AWS.
            self.materials.remove(at);
        }
        Some(deleted)
    }
}

impl Material {
    /// A material whose expiry is set later.
    pub fn new(id: MaterialId, role: Role, contents: Contents) -> Self {
        Self { id, role, imported: true, contents, description: None, model: None, valid_to: None }
    }

    /// The bytes, if they are there and known.
    pub fn bytes(&self) -> Option<&Plain> {
        match &self.contents {
            Contents::Known { bytes, .. } => bytes.as_ref(),
            Contents::Sealed(_) | Contents::Broken(_) => None,
        }
    }

    fn is_permanent(&self) -> bool {
        self.role != Role::PendingRotation
    }
}

impl Contents {
    /// The digest by which a material is known again.
    pub fn sha256(&self) -> Option<[u8; 32]> {
        match self {
            Self::Known { sha256, .. } => Some(*sha256),
            Self::Sealed(_) | Self::Broken(_) => None,
        }
    }
}

#[cfg(test)]
#[path = "keys_tests.rs"]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests;
