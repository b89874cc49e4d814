//! What `ListKeyRotations` says of one material.

use super::description::{expiry, to_time};
use super::taken::material_id;
use crate::job::Expiry;
use aws_sdk_kms::types::{ImportState, KeyMaterialState, RotationsListEntry};
use time::OffsetDateTime;

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
    /// When it came into force, if by a rotation.
    pub rotated_at: Option<OffsetDateTime>,
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
    /// The same, and a replica has yet to be given it.
    PendingReplicas,
}

impl HeldMaterial {
    /// `None`: the entry lacks what its documentation promises.
    pub(super) fn of(entry: &RotationsListEntry) -> Option<Self> {
        let state = match entry.key_material_state()? {
            KeyMaterialState::Current => MaterialState::Current,
            KeyMaterialState::NonCurrent => MaterialState::NonCurrent,
            KeyMaterialState::PendingMultiRegionImportAndRotation => MaterialState::PendingReplicas,
            // Also whatever AWS may add: not tied to the key.
            _ => MaterialState::Pending,
        };
        Some(Self {
            id: material_id(entry.key_material_id()?)?,
            state,
            is_imported: *entry.import_state()? == ImportState::Imported,
            expiry: expiry(entry.expiration_model(), entry.valid_to().copied()),
            rotated_at: entry.rotation_date().copied().and_then(to_time),
        })
    }

    /// Whether the key is tied to it for good.
    pub fn is_permanent(&self) -> bool {
        matches!(self.state, MaterialState::Current | MaterialState::NonCurrent)
    }
}
