//! The `local` tier: keys sealed in Keyferry's own store.

use super::{Fingerprint, KekError, Keyring, PlainKey};
use crate::job::KeyKind;
use uuid::Uuid;

/// A local key as it is stored.
#[derive(Clone, Debug)]
pub struct SealedKey {
    /// The key's id; part of what is sealed.
    pub id: Uuid,
    /// The key's name.
    pub name: String,
    /// What it is for; part of what is sealed.
    pub kind: KeyKind,
    /// Keyed hash of the material.
    pub fingerprint: Fingerprint,
    /// Which key-encryption key seals it.
    pub kek_id: String,
    /// Material under the data key; `None` once the key is deleted.
    pub sealed_material: Option<Vec<u8>>,
    /// Data key under the key-encryption key; `None` once the key is deleted.
    pub sealed_data_key: Option<Vec<u8>>,
}

/// Why a local key gives no material.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// It was deleted.
    #[error("the source key was deleted")]
    Deleted,
    /// The seal does not open.
    #[error("the source key's row was changed or is sealed under another key-encryption key")]
    Damaged,
}

impl SealedKey {
    /// Generates and seals a key. Takes seconds for RSA: not for an async thread.
    pub fn generate(keyring: &Keyring, id: Uuid, name: String, kind: KeyKind) -> Result<Self, KekError> {
        Self::seal(keyring, id, name, &PlainKey::generate(kind)?)
    }

    /// Seals a key under a row's id and name.
    pub fn seal(keyring: &Keyring, id: Uuid, name: String, key: &PlainKey) -> Result<Self, KekError> {
        let (sealed_material, sealed_data_key) = keyring.seal_row(id, key.kind().as_str(), key.material())?;
        Ok(Self {
            id,
            name,
            kind: key.kind(),
            fingerprint: keyring.fingerprint(key),
            kek_id: keyring.kek_id().to_owned(),
            sealed_material: Some(sealed_material),
            sealed_data_key: Some(sealed_data_key),
        })
    }

    /// Opens a stored key. Material whose fingerprint is not the row's is damage too: the row was put
    /// together from two.
    pub fn open(&self, keyring: &Keyring) -> Result<PlainKey, OpenError> {
        let (Some(material), Some(data_key)) = (&self.sealed_material, &self.sealed_data_key) else {
            return Err(OpenError::Deleted);
        };
        let kind = self.kind.as_str();
        let material = keyring.open_row(self.id, kind, material, data_key).ok_or(OpenError::Damaged)?;
        let key = PlainKey::parse(self.kind, material).map_err(|_| OpenError::Damaged)?;
        if keyring.fingerprint(&key) == self.fingerprint { Ok(key) } else { Err(OpenError::Damaged) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Kek;

    #[test]
    fn a_generated_key_opens_until_it_is_deleted_or_changed() {
        let kek = Kek::parse(&hex::encode([7; 32])).unwrap();
        let sealed = Keyring::new_fingerprint_key(&kek).unwrap();
        let keyring = Keyring::open(kek, &sealed).unwrap();
        for kind in KeyKind::ALL {
            let plain = PlainKey::generate(kind).unwrap();
            let key = SealedKey::seal(&keyring, Uuid::new_v4(), "n".into(), &plain).unwrap();
            let opened = key.open(&keyring).unwrap();
            assert_eq!(opened.material().expose(), plain.material().expose());
            assert_eq!(opened.public_key(), plain.public_key());
            assert_eq!(plain.public_key().is_some(), kind.is_pair());
            let deleted = SealedKey { sealed_material: None, sealed_data_key: None, ..key.clone() };
            assert_eq!(deleted.open(&keyring).unwrap_err(), OpenError::Deleted);
            let other = Fingerprint { version: 1, hash: vec![0; 32] };
            let forged = SealedKey { fingerprint: other, ..key };
            assert_eq!(forged.open(&keyring).unwrap_err(), OpenError::Damaged);
        }
    }
}
