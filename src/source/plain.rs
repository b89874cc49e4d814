//! A source key in the clear: parsed once, then always what its kind demands.

use super::fault::MaterialFault;
use super::pair::Pair;
use super::{KeyMaterial, recognise};
use crate::job::{KeyKind, Shape};

/// Far more than any encoding of the longest key: what is larger is not looked into.
const LARGEST: usize = 64 * 1024;

/// Key material that is valid for its kind.
///
/// Of a pair it is PKCS#8 DER in one form (RFC 5208, version 0, no attributes), however it was given, so that its size is
/// known: 138 bytes on P-256, 135 on secp256k1, 185 on P-384, 241 on P-521; of RSA at most 1220, 1796 and 2376, or a few
/// bytes less.
#[derive(Debug)]
pub struct PlainKey {
    kind: KeyKind,
    material: KeyMaterial,
    /// DER `SubjectPublicKeyInfo`; pairs only.
    public_key: Option<Vec<u8>>,
}

impl PlainKey {
    /// Generates a key. Takes seconds for RSA: not for an async thread. Fails when the system gives no randomness.
    pub fn generate(kind: KeyKind) -> Result<Self, getrandom::Error> {
        match kind.shape() {
            Shape::Bytes(length) => Ok(Self { kind, material: KeyMaterial::random(length)?, public_key: None }),
            Shape::Rsa(bits) => Ok(Self::of_pair(kind, Pair::generate_rsa(bits)?)),
            Shape::Ecc(curve) => Ok(Self::of_pair(kind, Pair::generate_ecc(curve)?)),
        }
    }

    /// Reads material that came from elsewhere: raw bytes of exactly the kind's length, or the PKCS#8 DER of a pair
    /// whose parts belong together.
    pub fn parse(kind: KeyKind, material: KeyMaterial) -> Result<Self, MaterialFault> {
        let bytes = material.expose();
        if bytes.len() > LARGEST {
            return Err(MaterialFault::TooLarge);
        }
        match kind.shape() {
            Shape::Bytes(length) if bytes.len() == length => Ok(Self { kind, material, public_key: None }),
            Shape::Bytes(needed) => Err(recognise::instead_of_bytes(bytes, needed)),
            Shape::Rsa(bits) => Ok(Self::of_pair(kind, Pair::parse_rsa(bits, bytes)?)),
            Shape::Ecc(curve) => Ok(Self::of_pair(kind, Pair::parse_ecc(curve, bytes)?)),
        }
    }

    fn of_pair(kind: KeyKind, pair: Pair) -> Self {
        Self { kind, material: pair.pkcs8, public_key: Some(pair.public_key) }
    }

    /// What it is.
    pub fn kind(&self) -> KeyKind {
        self.kind
    }

    /// The bytes that AWS is sent, wrapped.
    pub fn material(&self) -> &KeyMaterial {
        &self.material
    }

    /// DER `SubjectPublicKeyInfo`, as AWS's `GetPublicKey` gives it; pairs only. It is computed from the private key.
    pub fn public_key(&self) -> Option<&[u8]> {
        self.public_key.as_deref()
    }
}
