//! RSA pairs: a two-prime `RSAPrivateKey` (RFC 8017, A.1.2) inside PKCS#8.
//!
//! The crate zeroises its keys and encodings. In between it leaves copies behind in freed memory: numbers that it makes
//! wider or narrower, and remainders.

use super::Pair;
use crate::source::fault::{MaterialFault, Oid};
use rsa::PrivateKey;
use rsa::pkcs1::der::asn1::UintRef;
use rsa::pkcs1::der::{self, Decode as _, Reader as _, SliceReader};
use rsa::pkcs1::{self, EncodeRsaPrivateKey as _, RsaPrivateKeyRef};
use rsa::pkcs8::{EncodePrivateKey as _, EncodePublicKey as _, PrivateKeyInfoRef};

/// The crate's bound, 2^33 - 1, has so many bytes.
const LONGEST_EXPONENT: usize = 5;

/// A new pair with the public exponent 65537.
pub(super) fn generate(bits: usize) -> Result<Pair, getrandom::Error> {
    // The crate does not say why there was no randomness.
    let key = PrivateKey::new(&mut getrandom::SysRng, bits).map_err(|_| getrandom::Error::UNEXPECTED)?;
    write(&key).ok_or(getrandom::Error::UNEXPECTED)
}

/// Reads what the envelope holds. All numbers have to belong together; whether p and q are prime is not asked. Sizes are
/// looked at before anything is computed, so that no input takes longer than a sound key.
pub(super) fn parse(bits: usize, pkcs8: &PrivateKeyInfoRef<'_>) -> Result<Pair, MaterialFault> {
    if pkcs8.algorithm.oid != pkcs1::ALGORITHM_OID {
        return Err(MaterialFault::WrongAlgorithm { given: Oid(pkcs8.algorithm.oid), needed: "RSA" });
    }
    // RFC 8017, A.1 demands NULL; some software leaves it out.
    if pkcs8.algorithm.parameters.is_some_and(|parameters| !parameters.is_null()) {
        return Err(MaterialFault::Malformed);
    }
    let inner = pkcs8.private_key.as_bytes();
    if is_multi_prime(inner) {
        return Err(MaterialFault::MultiPrime);
    }
    let given = RsaPrivateKeyRef::from_der(inner).map_err(|_| MaterialFault::Malformed)?;
    let size = bit_length(given.modulus);
    if size != bits {
        return Err(MaterialFault::WrongModulus { given: size, needed: bits });
    }
    check_exponent(given.public_exponent)?;
    let key = PrivateKey::try_from(given.clone()).map_err(|_| MaterialFault::Inconsistent)?;
    let pair = write(&key).ok_or(MaterialFault::Inconsistent)?;
    let computed = key.to_pkcs1_der().map_err(|_| MaterialFault::Inconsistent)?;
    // n, e, d, p and q were taken over, the rest was computed anew: DER has one form for each number.
    if computed.as_bytes() != inner {
        return Err(MaterialFault::Inconsistent);
    }
    let envelopes =
        pkcs8.public_key.as_ref().map(|given| given.as_bytes().ok_or(MaterialFault::Malformed)).transpose()?;
    if let Some(given) = envelopes {
        let computed = pkcs1::EncodeRsaPublicKey::to_pkcs1_der(key.as_public_key());
        if computed.ok().is_none_or(|computed| computed.as_bytes() != given) {
            return Err(MaterialFault::ForeignPublicKey);
        }
    }
    Ok(pair)
}

fn write(key: &PrivateKey) -> Option<Pair> {
    Pair::new(key.to_pkcs8_der().ok(), key.as_public_key().to_public_key_der().ok())
}

/// By its version alone: the crates' reader does not tell a wrong version from other faults.
fn is_multi_prime(inner: &[u8]) -> bool {
    let version = SliceReader::new(inner).and_then(|mut reader| {
        reader.sequence(|reader| -> der::Result<u8> {
            let version = u8::decode(reader)?;
            reader.drain(reader.remaining_len())?;
            Ok(version)
        })
    });
    version == Ok(1)
}

fn bit_length(number: UintRef<'_>) -> usize {
    let bytes = number.as_bytes();
    let leading = bytes.first().map_or(0, |first| first.leading_zeros() as usize);
    8 * bytes.len() - leading.min(8 * bytes.len())
}

fn check_exponent(exponent: UintRef<'_>) -> Result<(), MaterialFault> {
    let bytes = exponent.as_bytes();
    let is_odd = bytes.last().is_some_and(|last| last % 2 == 1);
    let value = bytes.iter().take(LONGEST_EXPONENT + 1).fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
    if is_odd && bytes.len() <= LONGEST_EXPONENT && (3..=rsa::PublicKey::MAX_PUB_EXPONENT).contains(&value) {
        Ok(())
    } else {
        Err(MaterialFault::BadExponent)
    }
}
