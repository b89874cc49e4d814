//! Key pairs: private keys in PKCS#8, what is public of them, and signatures.
//!
//! As everything in [`crate::crypto`] on aws-lc-rs alone, which reads DER; AWS takes BER too.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::encoding::AsDer as _;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256K1_SHA256_ASN1, ECDSA_P256K1_SHA256_ASN1_SIGNING,
    ECDSA_P384_SHA384_ASN1, ECDSA_P384_SHA384_ASN1_SIGNING, ECDSA_P521_SHA512_ASN1, ECDSA_P521_SHA512_ASN1_SIGNING,
    EcdsaKeyPair, EcdsaSigningAlgorithm, EcdsaVerificationAlgorithm, KeyPair as _, RSA_PKCS1_2048_8192_SHA256,
    RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512,
    RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384, RSA_PSS_2048_8192_SHA512, RSA_PSS_SHA256, RSA_PSS_SHA384,
    RSA_PSS_SHA512, RsaParameters, RsaSignatureEncoding, UnparsedPublicKey,
};

use crate::crypto::Unopened;
use crate::kinds::{KeySpec, SigningAlgorithm};

/// A key pair.
pub struct Pair {
    /// Its kind.
    pub spec: KeySpec,
    /// The public key: DER `SubjectPublicKeyInfo`.
    pub public: Arc<[u8]>,
    private: Private,
}

enum Private {
    Rsa(Box<rsa::KeyPair>),
    Ecdsa(EcdsaKeyPair),
}

impl Pair {
    /// Reads an unencrypted PKCS#8 private key of exactly this spec. Checks the key, which takes a while: never call it
    /// under the state's lock.
    pub fn read(spec: KeySpec, pkcs8: &[u8]) -> Option<Self> {
        let (private, public) = if let Some(length) = spec.modulus_length() {
            // Takes keys of two primes only, as AWS does.
            let pair = rsa::KeyPair::from_pkcs8(pkcs8).ok()?;
            if !has_modulus_of(pair.public_key().as_ref(), length) {
                return None;
            }
            let public = pair.public_key().as_der().ok()?.as_ref().into();
            (Private::Rsa(Box::new(pair)), public)
        } else {
            let curve = Curve::of(spec)?;
            if !curve.is_named_by(pkcs8) {
                return None;
            }
            let pair = EcdsaKeyPair::from_pkcs8(curve.signing, pkcs8).ok()?;
            let public = pair.public_key().as_der().ok()?.as_ref().into();
            (Private::Ecdsa(pair), public)
        };
        Some(Self { spec, public, private })
    }

    /// Signs a message. An RSA private operation: never call it under the state's lock.
    pub fn sign(&self, algorithm: SigningAlgorithm, message: &[u8]) -> Result<Vec<u8>, Unopened> {
        match &self.private {
            Private::Rsa(pair) => {
                let (encoding, _) = rsa_signature(algorithm).ok_or(Unopened)?;
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(encoding, &SystemRandom::new(), message, &mut signature).map_err(|_| Unopened)?;
                Ok(signature)
            }
            Private::Ecdsa(pair) => {
                pair.sign(&SystemRandom::new(), message).map(|it| it.as_ref().to_vec()).map_err(|_| Unopened)
            }
        }
    }

    /// Whether the signature is the message's.
    pub fn verify(&self, algorithm: SigningAlgorithm, message: &[u8], signature: &[u8]) -> bool {
        if let Some(curve) = Curve::of(self.spec) {
            return UnparsedPublicKey::new(curve.verification, &self.public).verify(message, signature).is_ok();
        }
        rsa_signature(algorithm).is_some_and(|(_, parameters)| {
            UnparsedPublicKey::new(parameters, &self.public).verify(message, signature).is_ok()
        })
    }
}

/// Shows nothing of the private key.
impl fmt::Debug for Pair {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Pair").field("spec", &self.spec).finish_non_exhaustive()
    }
}

/// What aws-lc-rs calls an elliptic curve, and how PKCS#8 names it.
struct Curve {
    signing: &'static EcdsaSigningAlgorithm,
    verification: &'static EcdsaVerificationAlgorithm,
    /// DER: `AlgorithmIdentifier { id-ecPublicKey, namedCurve }`.
    identifier: &'static [u8],
}

impl Curve {
    fn of(spec: KeySpec) -> Option<Self> {
        let (signing, verification, identifier): (_, _, &[u8]) = match spec {
            KeySpec::EccNistP256 => (
                &ECDSA_P256_SHA256_ASN1_SIGNING,
                &ECDSA_P256_SHA256_ASN1,
                b"\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07",
            ),
            KeySpec::EccNistP384 => (
                &ECDSA_P384_SHA384_ASN1_SIGNING,
                &ECDSA_P384_SHA384_ASN1,
                b"\x30\x10\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x05\x2b\x81\x04\x00\x22",
            ),
            KeySpec::EccNistP521 => (
                &ECDSA_P521_SHA512_ASN1_SIGNING,
                &ECDSA_P521_SHA512_ASN1,
                b"\x30\x10\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x05\x2b\x81\x04\x00\x23",
            ),
            KeySpec::EccSecgP256k1 => (
                &ECDSA_P256K1_SHA256_ASN1_SIGNING,
                &ECDSA_P256K1_SHA256_ASN1,
                b"\x30\x10\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x05\x2b\x81\x04\x00\x0a",
            ),
            _ => return None,
        };
        Some(Self { signing, verification, identifier })
    }

    /// Whether a PKCS#8 document says by its name that it is for this curve. AWS-LC would know the curve by its
    /// parameters as well, which AWS KMS refuses.
    fn is_named_by(&self, pkcs8: &[u8]) -> bool {
        let header = match pkcs8 {
            [0x30, length, ..] if *length < 0x80 => 2,
            [0x30, 0x81, ..] => 3,
            [0x30, 0x82, ..] => 4,
            _ => return false,
        };
        pkcs8
            .get(header..)
            .and_then(|body| body.strip_prefix(b"\x02\x01\x00"))
            .is_some_and(|rest| rest.starts_with(self.identifier))
    }
}

/// Whether a DER `RSAPublicKey` has a modulus of so many bytes, every bit of them used.
fn has_modulus_of(public: &[u8], length: usize) -> bool {
    // From 2048 bits on, sequence and integer have lengths of two bytes; a leading zero keeps the number positive.
    let Ok(length) = u16::try_from(length + 1) else { return false };
    let [high, low] = length.to_be_bytes();
    public.get(4..).is_some_and(|body| body.starts_with(&[0x02, 0x82, high, low, 0x00]))
}

fn rsa_signature(algorithm: SigningAlgorithm) -> Option<(&'static RsaSignatureEncoding, &'static RsaParameters)> {
    match algorithm {
        SigningAlgorithm::Pkcs1Sha256 => Some((&RSA_PKCS1_SHA256, &RSA_PKCS1_2048_8192_SHA256)),
        SigningAlgorithm::Pkcs1Sha384 => Some((&RSA_PKCS1_SHA384, &RSA_PKCS1_2048_8192_SHA384)),
        SigningAlgorithm::Pkcs1Sha512 => Some((&RSA_PKCS1_SHA512, &RSA_PKCS1_2048_8192_SHA512)),
        SigningAlgorithm::PssSha256 => Some((&RSA_PSS_SHA256, &RSA_PSS_2048_8192_SHA256)),
        SigningAlgorithm::PssSha384 => Some((&RSA_PSS_SHA384, &RSA_PSS_2048_8192_SHA384)),
        SigningAlgorithm::PssSha512 => Some((&RSA_PSS_SHA512, &RSA_PSS_2048_8192_SHA512)),
        SigningAlgorithm::EcdsaSha256 | SigningAlgorithm::EcdsaSha384 | SigningAlgorithm::EcdsaSha512 => None,
    }
}

#[cfg(test)]
#[path = "pairs_tests.rs"]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests;
