//! Pairs in PKCS#8: the envelope (RFC 5208, RFC 5958), and what is common to both families.

mod ecc;
mod rsa;
#[cfg(test)]
mod tests;

use super::fault::MaterialFault;
use super::{KeyMaterial, recognise};
use crate::job::Curve;
use ::rsa::pkcs8::der::{Decode as _, SecretDocument};
use ::rsa::pkcs8::{Document, PrivateKeyInfoRef};
use k256::Secp256k1;
use p256::NistP256;
use p384::NistP384;
use p521::NistP521;

/// A private key as AWS is sent it, with its public key.
#[derive(Debug)]
pub(super) struct Pair {
    /// PKCS#8 DER in the one form that is kept: version 0, no attributes.
    pub(super) pkcs8: KeyMaterial,
    /// DER `SubjectPublicKeyInfo`.
    pub(super) public_key: Vec<u8>,
}

impl Pair {
    /// A new RSA pair with the public exponent 65537.
    pub(super) fn generate_rsa(bits: usize) -> Result<Self, getrandom::Error> {
        rsa::generate(bits)
    }

    /// A new pair on a curve.
    pub(super) fn generate_ecc(curve: Curve) -> Result<Self, getrandom::Error> {
        match curve {
            Curve::P256 => ecc::generate::<NistP256>(),
            Curve::P384 => ecc::generate::<NistP384>(),
            Curve::P521 => ecc::generate::<NistP521>(),
            Curve::K256 => ecc::generate::<Secp256k1>(),
        }
    }

    /// Reads the PKCS#8 of an RSA pair whose modulus has so many bits.
    pub(super) fn parse_rsa(bits: usize, pkcs8: &[u8]) -> Result<Self, MaterialFault> {
        rsa::parse(bits, &envelope(pkcs8)?)
    }

    /// Reads the PKCS#8 of a pair on a curve.
    pub(super) fn parse_ecc(curve: Curve, pkcs8: &[u8]) -> Result<Self, MaterialFault> {
        let key = envelope(pkcs8)?;
        match curve {
            Curve::P256 => ecc::parse::<NistP256>(curve, &key),
            Curve::P384 => ecc::parse::<NistP384>(curve, &key),
            Curve::P521 => ecc::parse::<NistP521>(curve, &key),
            Curve::K256 => ecc::parse::<Secp256k1>(curve, &key),
        }
    }

    /// `None` where an encoder failed, which none does for a valid key.
    fn new(pkcs8: Option<SecretDocument>, public_key: Option<Document>) -> Option<Self> {
        let (mut bytes, public_key) = (pkcs8?.to_bytes(), public_key?.into_vec());
        Some(Self { pkcs8: KeyMaterial::new(std::mem::take(&mut *bytes)), public_key })
    }
}

/// Reads the envelope. Attributes are dropped: AWS does not want them, and they would outgrow an OAEP block.
fn envelope(pkcs8: &[u8]) -> Result<PrivateKeyInfoRef<'_>, MaterialFault> {
    PrivateKeyInfoRef::from_der(pkcs8).map_err(|_| recognise::instead_of_pkcs8(pkcs8))
}
