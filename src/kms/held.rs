//! What `ListKeyRotations` says of one material.

use super::description::expiry;
use crate::job::Expiry;
use aws_sdk_kms::types::{ImportState, KeyMaterialState, RotationsListEntry};

/// A material of a symmetric key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldMaterial {
    /// AWS's id.
    pub id: String,
    /// What it is to the key.
    pub state: MaterialState,
    /// Whether its bytes are there: not expired, not deleted.
    pub is_imported: bool,
    /// Its end of life, as long as it is there.
    pub expiry: Option<Expiry>,
}

/// What a material is to its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaterialState {
    /// In force.
    Current,
    /// In force before; decrypts what was encrypted then.
    NonCurrent,
    /// Waits for its rotation. The key is not tied to it yet.
    Pending,
}

impl HeldMaterial {
    /// `None`: the entry lacks what its documentation promises.
    pub(super) fn of(entry: &RotationsListEntry) -> Option<Self> {
        let state = match entry.key_material_state()? {
            KeyMaterialState::Current => MaterialState::Current,
            KeyMaterialState::NonCurrent => MaterialState::NonCurrent,
            // Also PENDING_MULTI_REGION_IMPORT_AND_ROTATION, and whatever AWS may add: not tied to the key.
            _ => MaterialState::Pending,
        };
        Some(Self {
            id: entry.key_material_id()?.to_owned(),
            state,
            is_imported: *entry.import_state()? == ImportState::Imported,
            expiry: expiry(entry.expiration_model(), entry.valid_to().copied()),
        })
    }

    /// Whether the key is tied to it for good.
    pub fn is_permanent(&self) -> bool {
        self.state != MaterialState::Pending
    }
}
