//! The part of the key state machine that takes material in.

use std::sync::Arc;

use crate::crypto::{Opened, Sealed, Unopened, sha256};
use crate::keys::Key;
use crate::kinds::{ExpirationModel, ImportType, KeySpec, Millis, Origin, Role};
use crate::materials::{Contents, Digests, Material, MaterialId, Secret};
use crate::refusal::{self, Refusal};

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
    /// Whether the first import into a replica must say that the material exists.
    pub replica_needs_existing: bool,
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
    Open(Opened),
    /// Still wrapped; only a key without any material takes it like that.
    Sealed(Arc<Sealed>),
}

/// What an import did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// The material's id.
    pub id: MaterialId,
    /// The material's digests, if it was unwrapped.
    pub digests: Option<Digests>,
    /// Whether the key had never had material before.
    pub first: bool,
    /// Whether the key had this very material before.
    pub again: bool,
}

impl Key {
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
        if self.is_replica() && self.spec == KeySpec::SymmetricDefault {
            // By AWS's text a key that never had material is given new material unless told otherwise, and a replica
            // takes none. That it refuses then, and how, is UNVERIFIED.
            let new = import.kind == Some(ImportType::New);
            let unsaid = import.kind.is_none() && import.replica_needs_existing && !self.was_given_material();
            if new || unsaid {
                return Err(refusal::unsupported(format!(
                    "{} is a multi-Region replica key: new key material can be imported into its primary key only.",
                    self.arn
                )));
            }
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

    /// Only a key whose material comes from outside takes part.
    pub fn check_external(&self) -> Result<(), Refusal> {
        match self.origin {
            Origin::External => Ok(()),
            Origin::AwsKms => Err(refusal::wrong_origin(&self.arn, self.origin.name())),
        }
    }

    /// Imports material. Every material that is still sealed must have been opened before, unless there is none at all.
    pub fn import(&mut self, now: Millis, import: &Import, offered: Offered) -> Result<Imported, Refusal> {
        self.check_import(now, import)?;
        let contents = match offered {
            // UNVERIFIED code: the description of the exception fits.
            Offered::Open(opened) => self.accept(opened).map_err(refusal::incorrect_material)?,
            Offered::Sealed(sealed) => Contents::Sealed(sealed),
        };
        let first = !self.was_given_material();
        let known = contents
            .identity()
            .and_then(|own| self.materials.iter().position(|material| material.contents.identity() == Some(own)));
        let old = known.and_then(|at| self.materials.get(at));
        let id = old.map_or_else(|| self.derive_id(&contents), |old| old.id);
        let again = old.is_some_and(|old| old.given);
        let outcome = Imported { id, digests: contents.digests().cloned(), first, again };
        let default = if first && !self.is_replica() { ImportType::New } else { ImportType::Existing };
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
        self.note_change(now);
        let material = if let Some(old) = known.and_then(|at| self.materials.get_mut(at)) {
            old.contents = contents;
            old
        } else {
            let role = if first { Role::Current } else { Role::PendingRotation };
            // Of a million keys, nearly all have one.
            self.materials.reserve_exact(1);
            self.materials.push_mut(Material::new(id, role, contents))
        };
        material.imported = true;
        material.given = true;
        material.model = Some(import.model);
        material.valid_to = import.valid_to;
        if import.description.is_some() {
            material.description.clone_from(&import.description);
        }
        Ok(outcome)
    }

    /// Puts the unwrapped bytes where the sealed ones were.
    pub fn open(&mut self, sealed: &Arc<Sealed>, opened: Result<Opened, Unopened>) {
        let mut contents = match opened {
            Ok(opened) => self.accept(opened).unwrap_or_else(Contents::Broken),
            Err(Unopened) => Contents::Broken("The key material does not unwrap."),
        };
        let is_it =
            |material: &&mut Material| matches!(&material.contents, Contents::Sealed(own) if Arc::ptr_eq(own, sealed));
        if let Some(material) = self.materials.iter_mut().find(is_it) {
            if !material.imported {
                contents.forget();
            }
            material.contents = contents;
        }
    }

    fn was_given_material(&self) -> bool {
        self.materials.iter().any(|material| material.given)
    }

    /// What has been unwrapped, if a key of this spec can hold it.
    fn accept(&self, opened: Opened) -> Result<Contents, &'static str> {
        match (self.spec.material_length(&self.region), &opened.pair) {
            (Some(length), None) if length != opened.bytes.len() => Err("The key material has an invalid length."),
            (Some(_), None) => Ok(Contents::of(opened)),
            (None, Some(pair)) if pair.spec == self.spec => Ok(Contents::of(opened)),
            _ => Err("The key material is not a private key of this key spec in PKCS#8."),
        }
    }

    fn admit_new(&self, offered: &Imported, repeat: RepeatedNew) -> Result<(), Refusal> {
        let pending = self.materials.iter().find(|material| material.role.is_pending());
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

    /// AWS's derivation is not published; this one is ours. It knows the key by its id alone, so that the Regions of a
    /// multi-Region key agree. Sealed material is named after its wrapped form.
    fn derive_id(&self, contents: &Contents) -> MaterialId {
        let (label, bytes) = match contents {
            Contents::Known { secret: Some(Secret::Bytes(bytes)), .. } => ("fake-kms material", bytes.as_slice()),
            Contents::Known { secret: Some(Secret::Pair(pair)), .. } => ("fake-kms pair", &*pair.public),
            Contents::Sealed(sealed) => ("fake-kms sealed material", sealed.blob.as_slice()),
            Contents::Known { secret: None, .. } | Contents::Broken(_) => ("fake-kms material", &[][..]),
        };
        sha256(&[label.as_bytes(), self.id().as_bytes(), bytes])
    }
}
