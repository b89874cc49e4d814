//! Key blocks (KMIP 1.4, 2.1.3 to 2.1.7): what a server holds, brought to what a kind of key demands.

use super::answers::{Attributes, Object};
use super::tags::{
    CRYPTOGRAPHIC_ALGORITHM, CRYPTOGRAPHIC_LENGTH, D, KEY, KEY_FORMAT_TYPE, KEY_MATERIAL, KEY_VALUE, KEY_WRAPPING_DATA,
    MODULUS, P, PRIVATE_EXPONENT, PUBLIC_EXPONENT, Q, RECOMMENDED_CURVE, algorithm, curve, key_format, object_type,
    usage,
};
use super::transparent;
use super::ttlv::{Structure, Value};
use crate::job::{Curve, KeyKind, Shape};
use crate::source::{KeyMaterial, MaterialFault, PlainKey};
use rsa::pkcs8::der::asn1::{AnyRef, OctetStringRef};
use rsa::pkcs8::der::{Decode as _, Reader as _, SecretDocument, SliceReader, Tag, TagNumber};
use rsa::pkcs8::spki::AlgorithmIdentifierRef;
use rsa::pkcs8::{ObjectIdentifier, PrivateKeyInfoRef};

/// Why an object is not the key that is needed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum KeyFault {
    /// Under another key.
    Wrapped,
    /// Its bytes are missing.
    NotGiven,
    /// Another kind of key; says which.
    WrongKind(String),
    /// Its usage mask contradicts; says what would have been enough.
    WrongUsage(u32, &'static str),
    /// Its structure is not what KMIP demands.
    Malformed(&'static str),
    /// Its bytes are no sound key.
    Material(MaterialFault),
}

impl From<MaterialFault> for KeyFault {
    fn from(fault: MaterialFault) -> Self {
        match fault {
            MaterialFault::WrongAlgorithm { .. }
            | MaterialFault::WrongCurve { .. }
            | MaterialFault::WrongModulus { .. } => Self::WrongKind(fault.to_string()),
            fault => Self::Material(fault),
        }
    }
}

/// The State of an object, where it keeps it from being used (KMIP 1.4, 3.22).
pub(super) fn unusable_state(state: u32) -> Option<&'static str> {
    match state {
        1 => Some("Pre-Active"),
        2 => None,
        3 => Some("Deactivated"),
        4 => Some("Compromised"),
        5 => Some("Destroyed"),
        6 => Some("Destroyed Compromised"),
        _ => Some("in an unknown state"),
    }
}

/// The key that an object holds. Takes milliseconds for RSA: not for an async thread.
pub(super) fn open(kind: KeyKind, object: &Object<'_>, attributes: &Attributes) -> Result<PlainKey, KeyFault> {
    check_object_type(kind, object.kind)?;
    let block = KeyBlock::read(object.key_block.ok_or(KeyFault::Malformed("its object holds no key block"))?)?;
    let algorithm = block.algorithm.or(attributes.algorithm);
    let length = block.length.or(attributes.length);
    check_algorithm(kind, algorithm)?;
    check_usage(kind, attributes.usage_mask)?;
    match (kind.shape(), block.material) {
        (Shape::Bytes(needed), material) => {
            check_length(length, needed * 8)?;
            let bytes = match (block.format, material) {
                (key_format::RAW | key_format::OPAQUE, Value::Bytes(bytes)) => bytes,
                (key_format::TRANSPARENT_SYMMETRIC_KEY, Value::Structure(key)) => key
                    .first(KEY)
                    .and_then(Value::bytes)
                    .ok_or(KeyFault::Malformed("its transparent key has no bytes"))?,
                (format, _) => return Err(unknown_format(format)),
            };
            Ok(PlainKey::parse(kind, KeyMaterial::new(bytes.to_vec()))?)
        }
        (Shape::Rsa(bits), Value::Structure(key)) if block.format == key_format::TRANSPARENT_RSA_PRIVATE_KEY => {
            check_length(length, bits)?;
            let number = |tag| key.first(tag).and_then(Value::big_integer);
            let numbers = transparent::Numbers {
                modulus: number(MODULUS),
                public_exponent: number(PUBLIC_EXPONENT),
                private_exponent: number(PRIVATE_EXPONENT),
                p: number(P),
                q: number(Q),
            };
            Ok(PlainKey::parse(kind, transparent::rsa(bits, &numbers)?)?)
        }
        (Shape::Ecc(needed), Value::Structure(key)) if is_transparent_ec(block.format) => {
            let given = key.first(RECOMMENDED_CURVE).and_then(Value::enumeration);
            check_curve(needed, given.or(attributes.curve).ok_or(MaterialFault::MissingCurve)?)?;
            let scalar = key.first(D).and_then(Value::big_integer);
            let scalar = scalar.ok_or(KeyFault::Malformed("its transparent key has no private value"))?;
            Ok(PlainKey::parse(kind, transparent::ec(needed, scalar)?)?)
        }
        (Shape::Rsa(_) | Shape::Ecc(_), Value::Bytes(bytes)) => {
            if let Shape::Rsa(bits) = kind.shape() {
                check_length(length, bits)?;
            }
            open_encoded(kind, block.format, bytes, attributes)
        }
        _ => Err(unknown_format(block.format)),
    }
}

/// A pair as some DER. Servers say Raw and Opaque of all of them.
fn open_encoded(kind: KeyKind, format: u32, bytes: &[u8], attributes: &Attributes) -> Result<PlainKey, KeyFault> {
    let as_given = || PlainKey::parse(kind, KeyMaterial::new(bytes.to_vec()));
    let pkcs8 = match (format, kind.shape()) {
        (key_format::PKCS_1, Shape::Rsa(_)) => from_pkcs1(bytes)?,
        (key_format::EC_PRIVATE_KEY, Shape::Ecc(curve)) => from_sec1(curve, bytes, attributes)?,
        (key_format::PKCS_8 | key_format::RAW | key_format::OPAQUE, shape) => match (as_given(), shape) {
            (Err(MaterialFault::Pkcs1), Shape::Rsa(_)) if format != key_format::PKCS_8 => from_pkcs1(bytes)?,
            (Err(MaterialFault::Sec1), Shape::Ecc(curve)) if format != key_format::PKCS_8 => {
                from_sec1(curve, bytes, attributes)?
            }
            (parsed, _) => return Ok(parsed?),
        },
        (format, _) => return Err(unknown_format(format)),
    };
    Ok(PlainKey::parse(kind, pkcs8)?)
}

/// What stands in a key block, unwrapped.
struct KeyBlock<'a> {
    format: u32,
    algorithm: Option<u32>,
    length: Option<i32>,
    material: Value<'a>,
}

impl<'a> KeyBlock<'a> {
    fn read(block: Structure<'a>) -> Result<Self, KeyFault> {
        if block.first(KEY_WRAPPING_DATA).is_some() {
            return Err(KeyFault::Wrapped);
        }
        let format = block.first(KEY_FORMAT_TYPE).and_then(Value::enumeration);
        let material = match block.first(KEY_VALUE).ok_or(KeyFault::NotGiven)? {
            Value::Structure(value) => value.first(KEY_MATERIAL).ok_or(KeyFault::NotGiven)?,
            // A byte string is what wrapping makes of it (KMIP 1.4, 2.1.4).
            _ => return Err(KeyFault::Wrapped),
        };
        Ok(Self {
            format: format.ok_or(KeyFault::Malformed("its key block names no format"))?,
            algorithm: block.first(CRYPTOGRAPHIC_ALGORITHM).and_then(Value::enumeration),
            length: block.first(CRYPTOGRAPHIC_LENGTH).and_then(Value::integer),
            material,
        })
    }
}

/// An HMAC key may be Secret Data, for servers that know no such algorithms.
fn check_object_type(kind: KeyKind, given: u32) -> Result<(), KeyFault> {
    let is_right = match kind.shape() {
        Shape::Bytes(_) if given == object_type::SECRET_DATA => !kind.has_material_ids(),
        Shape::Bytes(_) => given == object_type::SYMMETRIC_KEY,
        Shape::Rsa(_) | Shape::Ecc(_) => given == object_type::PRIVATE_KEY,
    };
    if is_right {
        return Ok(());
    }
    let name = match given {
        object_type::CERTIFICATE => "a certificate",
        object_type::SYMMETRIC_KEY => "a symmetric key",
        object_type::PUBLIC_KEY => "a public key; the private key has another identifier",
        object_type::PRIVATE_KEY => "a private key",
        object_type::SPLIT_KEY => "a part of a split key",
        object_type::SECRET_DATA => "secret data",
        object_type::OPAQUE_OBJECT => "an opaque object",
        _ => "an object of another type",
    };
    Err(KeyFault::WrongKind(format!("it is {name}")))
}

fn check_algorithm(kind: KeyKind, given: Option<u32>) -> Result<(), KeyFault> {
    use algorithm::{AES, EC, ECDH, ECDSA, HMAC_SHA224, HMAC_SHA256, HMAC_SHA384, HMAC_SHA512, RSA, SM4};
    let fitting: &[u32] = match kind {
        KeyKind::SymmetricDefault => &[AES],
        KeyKind::Sm4 => &[SM4],
        KeyKind::Hmac224 => &[HMAC_SHA224],
        KeyKind::Hmac256 => &[HMAC_SHA256],
        KeyKind::Hmac384 => &[HMAC_SHA384],
        KeyKind::Hmac512 => &[HMAC_SHA512],
        KeyKind::Rsa2048 | KeyKind::Rsa3072 | KeyKind::Rsa4096 => &[RSA],
        KeyKind::EccNistP256 | KeyKind::EccNistP384 | KeyKind::EccNistP521 | KeyKind::EccSecgP256k1 => {
            &[EC, ECDSA, ECDH]
        }
    };
    match given {
        Some(given) if !fitting.contains(&given) => {
            let name = algorithm::NAMES.iter().find(|(number, _)| *number == given);
            let name = name.map_or_else(|| format!("algorithm {given:#x}"), |(_, name)| (*name).to_owned());
            Err(KeyFault::WrongKind(format!("it is a key for {name}")))
        }
        _ => Ok(()),
    }
}

/// Whether a Cryptographic Usage Mask (KMIP 1.4, 3.19) lets AWS have a key.
///
/// Export is enough, and so is Unrestricted. Most servers do not set Export, and Get does not ask for it (KMIP 1.4, 4.11:
/// what must stay inside is Sensitive or not Extractable, which the server itself refuses). So without Export one of the uses
/// that AWS would make of the key has to be allowed; a key for none of them is meant for something else. An empty mask, as
/// secrets are stored with, says nothing.
fn check_usage(kind: KeyKind, mask: Option<u32>) -> Result<(), KeyFault> {
    use usage::{
        DECRYPT, ENCRYPT, EXPORT, KEY_AGREEMENT, MAC_GENERATE, MAC_VERIFY, SIGN, UNRESTRICTED, UNWRAP_KEY, VERIFY,
        WRAP_KEY,
    };
    let (uses, needed) = match kind {
        KeyKind::SymmetricDefault | KeyKind::Sm4 => {
            (ENCRYPT | DECRYPT | WRAP_KEY | UNWRAP_KEY, "Encrypt, Decrypt, Wrap Key or Unwrap Key")
        }
        KeyKind::Hmac224 | KeyKind::Hmac256 | KeyKind::Hmac384 | KeyKind::Hmac512 => {
            (MAC_GENERATE | MAC_VERIFY | SIGN | VERIFY, "MAC Generate or MAC Verify")
        }
        KeyKind::Rsa2048 | KeyKind::Rsa3072 | KeyKind::Rsa4096 => {
            (SIGN | usage::CERTIFICATE_SIGN | usage::CRL_SIGN | DECRYPT | UNWRAP_KEY, "Sign, Decrypt or Unwrap Key")
        }
        KeyKind::EccNistP256 | KeyKind::EccNistP384 | KeyKind::EccNistP521 | KeyKind::EccSecgP256k1 => {
            (SIGN | usage::CERTIFICATE_SIGN | usage::CRL_SIGN | KEY_AGREEMENT, "Sign or Key Agreement")
        }
    };
    match mask {
        Some(mask) if mask != 0 && mask & (uses | EXPORT | UNRESTRICTED) == 0 => {
            Err(KeyFault::WrongUsage(mask, needed))
        }
        _ => Ok(()),
    }
}

fn check_length(given: Option<i32>, needed: usize) -> Result<(), KeyFault> {
    match given {
        // Some servers leave it at zero for what has no length of its own.
        Some(given) if given != 0 && usize::try_from(given) != Ok(needed) => {
            Err(KeyFault::WrongKind(format!("it has {given} bits, where {needed} are needed")))
        }
        _ => Ok(()),
    }
}

fn check_curve(needed: Curve, given: u32) -> Result<(), KeyFault> {
    let number = match needed {
        Curve::P256 => curve::P_256,
        Curve::P384 => curve::P_384,
        Curve::P521 => curve::P_521,
        Curve::K256 => curve::SECP256K1,
    };
    if given == number {
        Ok(())
    } else {
        Err(KeyFault::WrongKind(format!("it is a key on another curve than {needed}")))
    }
}

fn is_transparent_ec(format: u32) -> bool {
    matches!(
        format,
        key_format::TRANSPARENT_EC_PRIVATE_KEY
            | key_format::TRANSPARENT_ECDSA_PRIVATE_KEY
            | key_format::TRANSPARENT_ECDH_PRIVATE_KEY
    )
}

fn unknown_format(format: u32) -> KeyFault {
    KeyFault::WrongKind(format!("it comes in key format {format:#x}, which this kind of key does not have"))
}

/// PKCS#8 around an `RSAPrivateKey` (RFC 8017, A.1.2), which is not looked into.
fn from_pkcs1(pkcs1: &[u8]) -> Result<KeyMaterial, MaterialFault> {
    envelope(AlgorithmIdentifierRef { oid: rsa::pkcs1::ALGORITHM_OID, parameters: Some(AnyRef::NULL) }, pkcs1)
}

/// PKCS#8 around an `ECPrivateKey` (RFC 5915, 3).
///
/// It may leave out its curve. Then the server has to name it, or the public key beside the private one to show it: else a
/// key on one curve would pass for one on another of the same length.
fn from_sec1(curve: Curve, sec1: &[u8], attributes: &Attributes) -> Result<KeyMaterial, KeyFault> {
    if let Some(given) = attributes.curve {
        check_curve(curve, given)?;
    } else if !names_curve(sec1) {
        return Err(MaterialFault::MissingCurve.into());
    }
    Ok(wrap_sec1(curve, sec1)?)
}

/// PKCS#8 around an `ECPrivateKey` that is known to lie on a curve.
pub(super) fn wrap_sec1(curve: Curve, sec1: &[u8]) -> Result<KeyMaterial, MaterialFault> {
    let curve = match curve {
        Curve::P256 => "1.2.840.10045.3.1.7",
        Curve::P384 => "1.3.132.0.34",
        Curve::P521 => "1.3.132.0.35",
        Curve::K256 => "1.3.132.0.10",
    };
    let curve = ObjectIdentifier::new(curve).map_err(|_| MaterialFault::MissingCurve)?;
    envelope(
        AlgorithmIdentifierRef { oid: p256::elliptic_curve::ALGORITHM_OID, parameters: Some((&curve).into()) },
        sec1,
    )
}

/// Whether it says its curve, or has a public key that is checked on the curve that it is taken for. What cannot be read is
/// refused by whoever reads it next.
fn names_curve(sec1: &[u8]) -> bool {
    let fields = SliceReader::new(sec1).and_then(|mut reader| {
        reader.sequence(|reader| -> rsa::pkcs8::der::Result<usize> {
            let (_version, _scalar) = (u8::decode(reader)?, <&OctetStringRef>::decode(reader)?);
            let mut fields = 0;
            while !reader.is_finished() {
                let field = AnyRef::decode(reader)?;
                let is_constructed = |number| Tag::ContextSpecific { constructed: true, number: TagNumber(number) };
                fields +=
                    usize::from([is_constructed(0), is_constructed(1)].contains(&rsa::pkcs8::der::Tagged::tag(&field)));
            }
            Ok(fields)
        })
    });
    fields != Ok(0)
}

fn envelope(algorithm: AlgorithmIdentifierRef<'_>, key: &[u8]) -> Result<KeyMaterial, MaterialFault> {
    let key = <&OctetStringRef>::try_from(key).map_err(|_| MaterialFault::TooLarge)?;
    let document =
        SecretDocument::try_from(&PrivateKeyInfoRef::new(algorithm, key)).map_err(|_| MaterialFault::TooLarge)?;
    let mut bytes = document.to_bytes();
    Ok(KeyMaterial::new(std::mem::take(&mut *bytes)))
}

#[cfg(test)]
mod tests;
