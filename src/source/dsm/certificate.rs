//! Whose a certificate is and until when (RFC 5280, 4.1): for people, after TLS has verified it.

use rsa::pkcs8::ObjectIdentifier;
use rsa::pkcs8::der::asn1::{AnyRef, GeneralizedTime, UtcTime};
use rsa::pkcs8::der::{self, DateTime, Decode as _, Reader as _, SliceReader, Tag, Tagged as _};
use serde::Serialize;

/// A certificate's subject and end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// Its common name, where it has one.
    pub common_name: Option<String>,
    /// Its last second, RFC 3339.
    pub not_after: String,
}

const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");

/// Reads a certificate in DER.
pub(super) fn holder(certificate: &[u8]) -> Option<Holder> {
    read(certificate).ok()
}

fn read(certificate: &[u8]) -> der::Result<Holder> {
    let mut whole = SliceReader::new(certificate)?;
    whole.sequence(|certificate| -> der::Result<Holder> {
        let holder = certificate.sequence(|signed| -> der::Result<Holder> {
            // [0] version, serial number, signature, issuer.
            let first = AnyRef::decode(signed)?;
            for _ in 0..(if first.tag().is_context_specific() { 3 } else { 2 }) {
                AnyRef::decode(signed)?;
            }
            let not_after = signed.sequence(|validity| -> der::Result<DateTime> {
                AnyRef::decode(validity)?;
                let end = AnyRef::decode(validity)?;
                match end.tag() {
                    Tag::UtcTime => Ok(end.decode_as::<UtcTime>()?.to_date_time()),
                    _ => Ok(end.decode_as::<GeneralizedTime>()?.to_date_time()),
                }
            })?;
            let common_name = signed.sequence(|subject| -> der::Result<Option<String>> {
                let mut found = None;
                while !subject.is_finished() {
                    let set = AnyRef::decode(subject)?;
                    let mut pairs = SliceReader::new(set.value())?;
                    while !pairs.is_finished() {
                        let (kind, value) = pairs.sequence(|pair| -> der::Result<_> {
                            Ok((ObjectIdentifier::decode(pair)?, AnyRef::decode(pair)?))
                        })?;
                        if kind == COMMON_NAME {
                            found = std::str::from_utf8(value.value()).ok().map(super::answers::shorten);
                        }
                    }
                }
                Ok(found)
            })?;
            signed.drain(signed.remaining_len())?;
            Ok(Holder { common_name, not_after: not_after.to_string() })
        })?;
        certificate.drain(certificate.remaining_len())?;
        Ok(holder)
    })
}
