//! Transparent keys (KMIP 1.4, 2.1.7): numbers in structures, written as PKCS#8.

use super::key_block::wrap_sec1;
use crate::job::Curve;
use crate::source::{KeyMaterial, MaterialFault};
use rsa::pkcs8::EncodePrivateKey as _;
use rsa::traits::PublicKeyParts as _;
use rsa::{BoxedUint, PrivateKey};
use zeroize::Zeroizing;

/// A Transparent RSA Private Key's numbers (KMIP 1.4, 2.1.7.4). What follows from them is computed anew.
#[derive(Clone, Copy)]
pub(super) struct Numbers<'a> {
    pub(super) modulus: Option<&'a [u8]>,
    pub(super) public_exponent: Option<&'a [u8]>,
    pub(super) private_exponent: Option<&'a [u8]>,
    pub(super) p: Option<&'a [u8]>,
    pub(super) q: Option<&'a [u8]>,
}

/// Below it the primes cannot be found from the exponents (NIST SP 800-56B Rev. 2, C.2).
const LEAST_RECOVERABLE: [u8; 3] = [1, 0, 1];

/// The PKCS#8 of an RSA key whose modulus has so many bits. Needs n and e, and p and q or d.
pub(super) fn rsa(bits: usize, numbers: &Numbers<'_>) -> Result<KeyMaterial, MaterialFault> {
    let modulus = unsigned(numbers.modulus.ok_or(MaterialFault::Malformed)?);
    let exponent = unsigned(numbers.public_exponent.ok_or(MaterialFault::Malformed)?);
    // Sizes first, so that no input takes longer than a sound key.
    let given = 8 * modulus.len() - modulus.first().map_or(0, |first| first.leading_zeros() as usize);
    if given != bits {
        return Err(MaterialFault::WrongModulus { given, needed: bits });
    }
    if exponent.len() > 5 || exponent.last().is_none_or(|last| last % 2 == 0) || exponent == [1] {
        return Err(MaterialFault::BadExponent);
    }
    let primes = match (numbers.p, numbers.q) {
        (Some(one), Some(other)) => vec![number(one, bits / 2)?, number(other, bits / 2)?],
        _ => Vec::new(),
    };
    let key = match numbers.private_exponent {
        Some(private) => {
            let is_recoverable = exponent.len() > 3 || exponent.len() == 3 && *exponent >= LEAST_RECOVERABLE[..];
            if primes.is_empty() && !is_recoverable {
                return Err(MaterialFault::Malformed);
            }
            if unsigned(private).is_empty() {
                return Err(MaterialFault::Inconsistent);
            }
            PrivateKey::from_components(number(modulus, bits)?, number(exponent, 64)?, number(private, bits)?, primes)
        }
        None if primes.is_empty() => return Err(MaterialFault::Malformed),
        None => PrivateKey::from_primes(primes, number(exponent, 64)?),
    };
    let key = key.map_err(|_| MaterialFault::Inconsistent)?;
    if **key.as_public_key().n() != number(modulus, bits)? {
        return Err(MaterialFault::Inconsistent);
    }
    let document = key.to_pkcs8_der().map_err(|_| MaterialFault::Inconsistent)?;
    let mut bytes = document.to_bytes();
    Ok(KeyMaterial::new(std::mem::take(&mut *bytes)))
}

/// A number of at most so many bits.
fn number(bytes: &[u8], bits: usize) -> Result<BoxedUint, MaterialFault> {
    let bits = u32::try_from(bits).map_err(|_| MaterialFault::TooLarge)?;
    BoxedUint::from_be_slice(unsigned(bytes), bits).map_err(|_| MaterialFault::Inconsistent)
}

/// The PKCS#8 of a private value on a curve (KMIP 1.4, 2.1.7.15).
pub(super) fn ec(curve: Curve, scalar: &[u8]) -> Result<KeyMaterial, MaterialFault> {
    let length: u8 = match curve {
        Curve::P256 | Curve::K256 => 32,
        Curve::P384 => 48,
        Curve::P521 => 66,
    };
    let scalar = unsigned(scalar);
    let missing = usize::from(length).checked_sub(scalar.len()).ok_or(MaterialFault::ScalarOutOfRange)?;
    // RFC 5915, 3: version 1 and the value, as long as the curve's order. All lengths are below 128.
    let mut sec1 = Zeroizing::new(Vec::with_capacity(usize::from(length) + 7));
    sec1.extend_from_slice(&[0x30, length + 5, 0x02, 0x01, 0x01, 0x04, length]);
    sec1.extend(std::iter::repeat_n(0, missing));
    sec1.extend_from_slice(scalar);
    wrap_sec1(curve, &sec1)
}

/// Without leading zeros. No number of a key is negative: what looks so comes from servers that leave out the sign's bit.
fn unsigned(number: &[u8]) -> &[u8] {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    number.get(zeros..).unwrap_or_default()
}
