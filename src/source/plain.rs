//! A source key in the clear: parsed once, then always what its kind demands.

use super::KeyMaterial;
use crate::job::{KeyKind, Shape};

/// Key material that is valid for its kind.
#[derive(Debug)]
pub struct PlainKey {
    kind: KeyKind,
    material: KeyMaterial,
    /// DER `SubjectPublicKeyInfo`; pairs only.
    public_key: Option<Vec<u8>>,
}

impl PlainKey {
    /// Generates a key. Takes seconds for RSA: not for an async thread.
    pub fn generate(kind: KeyKind) -> Result<Self, getrandom::Error> {
        match kind.shape() {
            Shape::Bytes(length) => Ok(Self { kind, material: KeyMaterial::random(length)?, public_key: None }),
            Shape::Rsa(_) | Shape::Ecc(_) => Err(getrandom::Error::UNSUPPORTED),
        }
    }

    /// Reads material that came from elsewhere.
    pub fn parse(kind: KeyKind, material: KeyMaterial) -> Result<Self, MaterialFault> {
        match kind.shape() {
            Shape::Bytes(length) if material.expose().len() == length => Ok(Self { kind, material, public_key: None }),
            _ => Err(MaterialFault::WrongLength),
        }
    }

    /// What it is.
    pub fn kind(&self) -> KeyKind {
        self.kind
    }

    /// The bytes that AWS is sent, wrapped.
    pub fn material(&self) -> &KeyMaterial {
        &self.material
    }

    /// DER `SubjectPublicKeyInfo`, as AWS's `GetPublicKey` gives it; pairs only.
    pub fn public_key(&self) -> Option<&[u8]> {
        self.public_key.as_deref()
    }
}

/// Why bytes are not material of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MaterialFault {
    /// Not of the length of the kind.
    #[error("the material is not of the length that its kind demands")]
    WrongLength,
}
