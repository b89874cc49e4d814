//! Pairs on named curves: RFC 5915 inside PKCS#8.
//!
//! The crates zeroise their keys and encodings. The scalar that the public key is computed from is copied by value and
//! stays on the stack until it is written over.

use super::Pair;
use crate::job::Curve;
use crate::source::fault::{MaterialFault, Oid};
use p256::elliptic_curve::sec1::{FromSec1Point, ModulusSize, ToSec1Point};
use p256::elliptic_curve::{self, ALGORITHM_OID, CurveArithmetic, Generate as _, PublicKey, SecretKey};
use p256::pkcs8::der::asn1::{AnyRef, BitStringRef, ContextSpecific, OctetStringRef};
use p256::pkcs8::der::{self, Decode as _, Reader as _, SliceReader, Tag, TagNumber};
use p256::pkcs8::{AssociatedOid, EncodePrivateKey as _, EncodePublicKey as _, PrivateKeyInfoRef};

/// A curve with all that its keys are read and written by.
pub(super) trait NamedCurve:
    AssociatedOid
    + elliptic_curve::Curve<FieldBytesSize: ModulusSize>
    + CurveArithmetic<AffinePoint: FromSec1Point<Self> + ToSec1Point<Self>>
{
}

impl NamedCurve for k256::Secp256k1 {}
impl NamedCurve for p256::NistP256 {}
impl NamedCurve for p384::NistP384 {}
impl NamedCurve for p521::NistP521 {}

/// A new pair.
pub(super) fn generate<C: NamedCurve>() -> Result<Pair, getrandom::Error> {
    let key = SecretKey::<C>::try_generate()?;
    write(&key, &key.public_key()).ok_or(getrandom::Error::UNEXPECTED)
}

/// Reads what the envelope holds. The public key is computed anew; one that was given has to be the same.
pub(super) fn parse<C: NamedCurve>(curve: Curve, pkcs8: &PrivateKeyInfoRef<'_>) -> Result<Pair, MaterialFault> {
    if pkcs8.algorithm.oid != ALGORITHM_OID {
        return Err(MaterialFault::WrongAlgorithm { given: Oid(pkcs8.algorithm.oid), needed: "elliptic curves" });
    }
    let parameters = pkcs8.algorithm.parameters.ok_or(MaterialFault::MissingCurve)?;
    check_curve::<C>(curve, parameters)?;
    let inner = EcPrivateKey::read(pkcs8.private_key.as_bytes()).map_err(|_| MaterialFault::Malformed)?;
    if let Some(parameters) = inner.parameters {
        check_curve::<C>(curve, parameters)?;
    }
    // Shorter ones come from software that drops leading zeros, against RFC 5915, 3.
    let key = SecretKey::<C>::from_slice(inner.scalar).map_err(|_| MaterialFault::ScalarOutOfRange)?;
    let public_key = key.public_key();
    let envelopes =
        pkcs8.public_key.as_ref().map(|given| given.as_bytes().ok_or(MaterialFault::Malformed)).transpose()?;
    for given in [inner.public_key, envelopes].into_iter().flatten() {
        if PublicKey::<C>::from_sec1_bytes(given).ok() != Some(public_key) {
            return Err(MaterialFault::ForeignPublicKey);
        }
    }
    write(&key, &public_key).ok_or(MaterialFault::Malformed)
}

/// Writes the pair: the curve's name in the algorithm alone, the public key uncompressed.
fn write<C: NamedCurve>(key: &SecretKey<C>, public_key: &PublicKey<C>) -> Option<Pair> {
    Pair::new(key.to_pkcs8_der().ok(), public_key.to_public_key_der().ok())
}

fn check_curve<C: NamedCurve>(needed: Curve, parameters: AnyRef<'_>) -> Result<(), MaterialFault> {
    match der::Tagged::tag(&parameters) {
        Tag::ObjectIdentifier => {
            let given = parameters.decode_as().map_err(|_| MaterialFault::Malformed)?;
            if given == C::OID { Ok(()) } else { Err(MaterialFault::WrongCurve { given: Oid(given), needed }) }
        }
        Tag::Sequence => Err(MaterialFault::ExplicitCurve),
        Tag::Null => Err(MaterialFault::MissingCurve),
        _ => Err(MaterialFault::Malformed),
    }
}

/// RFC 5915, 3.
struct EcPrivateKey<'a> {
    scalar: &'a [u8],
    parameters: Option<AnyRef<'a>>,
    public_key: Option<&'a [u8]>,
}

impl<'a> EcPrivateKey<'a> {
    /// By hand, since the crates' own reader knows no parameters but a name.
    fn read(bytes: &'a [u8]) -> der::Result<Self> {
        let mut reader = SliceReader::new(bytes)?;
        let key = reader.sequence(|reader| -> der::Result<Self> {
            if u8::decode(reader)? != 1 {
                return Err(reader.error(Tag::Integer.value_error()));
            }
            let scalar = <&OctetStringRef>::decode(reader)?.as_bytes();
            let mut key = Self { scalar, parameters: None, public_key: None };
            while !reader.is_finished() {
                let field = ContextSpecific::<AnyRef<'_>>::decode(reader)?;
                match field.tag_number {
                    TagNumber(0) if key.parameters.is_none() && key.public_key.is_none() => {
                        key.parameters = Some(field.value);
                    }
                    TagNumber(1) if key.public_key.is_none() => {
                        let bits = field.value.decode_as::<BitStringRef<'_>>()?;
                        key.public_key = Some(bits.as_bytes().ok_or(Tag::BitString.value_error())?);
                    }
                    _ => return Err(reader.error(Tag::Sequence.value_error())),
                }
            }
            Ok(key)
        })?;
        reader.finish()?;
        Ok(key)
    }
}
