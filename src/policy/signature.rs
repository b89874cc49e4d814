//! Detached signatures: for brokers that many share.
//!
//! ```text
//! keyferry-signature: v1;key=ID;audience=TEXT;expires=2027-01-31T12:00:00Z;sig=BASE64
//! ```
//!
//! `sig` is Ed25519 (RFC 8032) over these lines, each ended by a line feed but for the last:
//! `keyferry-signature-v1`, the key's id, the audience, the expiry as it stands in the header, the header
//! `keyferry-redrive` or nothing, the content type or nothing, and the body's SHA-256 in lower-case hex.
//!
//! There is one way to write each signature: anything else is refused, so that two readers cannot read it differently.

use super::identity::is_key_id;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::{Signature as Ed25519, Signer as _, SigningKey as Ed25519Key, VerifyingKey};
use sha2::{Digest as _, Sha256};
use std::fmt;
use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime, UtcOffset};
use zeroize::Zeroizing;

/// The furthest that a signature may expire ahead, when it is received.
pub const LONGEST_LIFE: Duration = Duration::days(14);
/// Longest header in bytes; the longest that is well formed is shorter.
const LONGEST_HEADER: usize = 1_024;
/// Longest audience in bytes: as long as a queue's URL may be.
const LONGEST_AUDIENCE: usize = 512;

/// `SubjectPublicKeyInfo` of an Ed25519 key up to its 32 bytes (RFC 8410, 4).
const SPKI: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
/// `OneAsymmetricKey`, version 1, of an Ed25519 key up to its 32 bytes (RFC 8410, 7).
const PKCS8: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// A header, read but not believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// Which key is said to have signed.
    pub key: String,
    /// For whom.
    pub audience: String,
    /// Until when it may be received.
    pub expires: OffsetDateTime,
    bytes: [u8; 64],
}

/// What is signed beside the header's own words.
#[derive(Clone, Copy, Debug)]
pub struct Signed<'a> {
    /// The header `keyferry-redrive`, as it stands.
    pub redrive: Option<&'a str>,
    /// The transport's content type, as it stands.
    pub content_type: Option<&'a str>,
    /// The body.
    pub body: &'a [u8],
}

/// A public key that signatures are verified with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey(VerifyingKey);

/// A private key that signs. Zeroised when it goes, never printed.
pub struct SigningKey(Ed25519Key);

/// A key that is of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyFault {
    /// Not PEM, or PEM of something else.
    #[error("expected one PEM block {0}, as openssl writes it for Ed25519")]
    NotPem(&'static str),
    /// A key of another algorithm, or more than the key alone.
    #[error("it is no Ed25519 key as openssl genpkey -algorithm ed25519 makes it")]
    NotEd25519,
    /// A point of small order: anybody can make signatures that it verifies.
    #[error("it is a weak key, for which anybody can sign: make another")]
    Weak,
}

impl Signature {
    /// Reads a header; nothing but the one canonical form.
    pub fn parse(header: &str) -> Option<Self> {
        if header.len() > LONGEST_HEADER {
            return None;
        }
        let mut parts = header.split(';');
        let mut next = |name: &str| parts.next()?.strip_prefix(name);
        next("v1").filter(|rest| rest.is_empty())?;
        let (key, audience) = (next("key=")?, next("audience=")?);
        let (expires, sig) = (next("expires=")?, next("sig=")?);
        if parts.next().is_some() || !is_key_id(key) || !is_audience(audience) {
            return None;
        }
        let expires = parse_expiry(expires)?;
        let bytes: [u8; 64] = STANDARD.decode(sig).ok()?.try_into().ok()?;
        let read = Self { key: key.to_owned(), audience: audience.to_owned(), expires, bytes };
        // Whatever a parser of a part bears beside the one form is not borne here.
        (read.to_string() == header).then_some(read)
    }

    /// Whether the key signed just this.
    pub fn is_by(&self, key: &PublicKey, signed: Signed<'_>) -> bool {
        let Some(text) = signing_text(&self.key, &self.audience, self.expires, signed) else { return false };
        key.0.verify_strict(text.as_bytes(), &Ed25519::from_bytes(&self.bytes)).is_ok()
    }
}

/// The one form.
impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, audience, expires, bytes } = self;
        write!(f, "v1;key={key};audience={audience};expires={};sig={}", expiry(*expires), STANDARD.encode(bytes))
    }
}

impl PublicKey {
    /// Reads `-----BEGIN PUBLIC KEY-----`, as `openssl pkey -pubout` writes it.
    pub fn from_pem(text: &str) -> Result<Self, KeyFault> {
        let der = read_pem(text, "PUBLIC KEY")?;
        let bytes = der.strip_prefix(&SPKI).and_then(|rest| rest.try_into().ok()).ok_or(KeyFault::NotEd25519)?;
        let key = VerifyingKey::from_bytes(bytes).map_err(|_| KeyFault::NotEd25519)?;
        if key.is_weak() { Err(KeyFault::Weak) } else { Ok(Self(key)) }
    }
}

impl SigningKey {
    /// Reads `-----BEGIN PRIVATE KEY-----`, as `openssl genpkey -algorithm ed25519` writes it.
    pub fn from_pem(text: &str) -> Result<Self, KeyFault> {
        let der = read_pem(text, "PRIVATE KEY")?;
        let bytes = der.strip_prefix(&PKCS8).and_then(|rest| rest.try_into().ok()).ok_or(KeyFault::NotEd25519)?;
        Ok(Self(Ed25519Key::from_bytes(bytes)))
    }

    /// Its public half.
    pub fn public_key(&self) -> PublicKey {
        PublicKey(self.0.verifying_key())
    }

    /// The header for a message; `None` when the id, the audience, the expiry or what is signed cannot stand in one.
    pub fn sign(&self, id: &str, audience: &str, expires: OffsetDateTime, signed: Signed<'_>) -> Option<Signature> {
        if !is_key_id(id) || !is_audience(audience) {
            return None;
        }
        let expires = expires.to_offset(UtcOffset::UTC).replace_nanosecond(0).ok()?;
        let text = signing_text(id, audience, expires, signed)?;
        let bytes = self.0.sign(text.as_bytes()).to_bytes();
        Some(Signature { key: id.to_owned(), audience: audience.to_owned(), expires, bytes })
    }
}

/// A key with all that a sender says beside it.
#[derive(Debug)]
pub struct Signer {
    /// The key.
    pub key: SigningKey,
    /// Under which id the policy knows it.
    pub id: String,
    /// For whom.
    pub audience: String,
    /// How long a message may be on its way.
    pub life: std::time::Duration,
}

impl Signer {
    /// The header for a message that is sent now; see [`SigningKey::sign`].
    pub fn header(&self, now: OffsetDateTime, signed: Signed<'_>) -> Option<String> {
        let Self { key, id, audience, life } = self;
        key.sign(id, audience, now + *life, signed).map(|signature| signature.to_string())
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SigningKey(..)")
    }
}

/// What is signed; `None` where a part could pass for two.
fn signing_text(key: &str, audience: &str, expires: OffsetDateTime, signed: Signed<'_>) -> Option<String> {
    let Signed { redrive, content_type, body } = signed;
    let (redrive, content_type) = (redrive.unwrap_or_default(), content_type.unwrap_or_default());
    if redrive.chars().chain(content_type.chars()).any(char::is_control) {
        return None;
    }
    let (expires, body) = (expiry(expires), hex::encode(Sha256::digest(body)));
    Some(format!("keyferry-signature-v1\n{key}\n{audience}\n{expires}\n{redrive}\n{content_type}\n{body}"))
}

/// 1 to 512 printable ASCII characters but the semicolon, which ends it.
pub fn is_audience(text: &str) -> bool {
    (1..=LONGEST_AUDIENCE).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic() && b != b';')
}

/// Whole seconds in UTC, in the one form that is printed.
fn parse_expiry(text: &str) -> Option<OffsetDateTime> {
    let at = OffsetDateTime::parse(text, &Rfc3339).ok()?;
    (text.len() == 20 && text.ends_with('Z')).then_some(at)
}

fn expiry(at: OffsetDateTime) -> String {
    crate::job::rfc3339(at)
}

fn read_pem(text: &str, label: &'static str) -> Result<Zeroizing<Vec<u8>>, KeyFault> {
    match pem_rfc7468::decode_vec(text.trim().as_bytes()) {
        Ok((found, der)) if found == label => Ok(Zeroizing::new(der)),
        Ok((_, der)) => {
            drop(Zeroizing::new(der));
            Err(KeyFault::NotPem(label))
        }
        Err(_) => Err(KeyFault::NotPem(label)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use time::macros::datetime;

    const PLAIN: Signed<'_> = Signed { redrive: None, content_type: None, body: b"{}" };

    fn key() -> SigningKey {
        SigningKey(Ed25519Key::from_bytes(&[7; 32]))
    }

    fn header() -> String {
        key().sign("payroll-2026", "prod/keyferry.jobs", datetime!(2027-01-31 12:00 UTC), PLAIN).unwrap().to_string()
    }

    #[test]
    fn a_signature_holds_for_just_what_was_signed() {
        let signature = Signature::parse(&header()).unwrap();
        let public = key().public_key();
        assert!(signature.is_by(&public, PLAIN));
        let redriven = "01a20c4c-a802-7353-80a0-12f45829ee64";
        for other in [
            Signed { body: b"{ }", ..PLAIN },
            Signed { redrive: Some(redriven), ..PLAIN },
            Signed { content_type: Some("application/json"), ..PLAIN },
            // Lines moved from one place to another.
            Signed { redrive: Some("\n"), ..PLAIN },
        ] {
            assert!(!signature.is_by(&public, other), "{other:?}");
        }
        assert!(!signature.is_by(&SigningKey(Ed25519Key::from_bytes(&[8; 32])).public_key(), PLAIN));
        for changed in [
            Signature { key: "other".into(), ..signature.clone() },
            Signature { audience: "test/keyferry.jobs".into(), ..signature.clone() },
            Signature { expires: signature.expires + Duration::seconds(1), ..signature.clone() },
        ] {
            assert!(!changed.is_by(&public, PLAIN), "{changed:?}");
        }
    }

    #[test]
    fn there_is_one_way_to_write_it() {
        let good = header();
        assert!(Signature::parse(&good).is_some());
        // The same bytes, with bits set that base64 throws away.
        let last = good.trim_end_matches('=').chars().next_back().unwrap();
        let next = char::from_u32(u32::from(last) + 1).unwrap();
        let loose = format!("{}{next}==", good.trim_end_matches('=').strip_suffix(last).unwrap());
        for bad in [
            good.replace("v1;", "v2;"),
            good.replace("v1;", ""),
            good.replace("v1;", "v1; "),
            good.replace(
                "key=payroll-2026;audience=prod/keyferry.jobs",
                "audience=prod/keyferry.jobs;key=payroll-2026",
            ),
            good.replace("payroll-2026", ""),
            good.replace("payroll-2026", "pay roll"),
            good.replace("payroll-2026", &"k".repeat(65)),
            good.replace("12:00:00Z", "12:00:00.0Z"),
            good.replace("12:00:00Z", "12:00:00+00:00"),
            good.replace("T12:00:00Z", "t12:00:00z"),
            good.replace("T12:00:00Z", " 12:00:00Z"),
            good.replace("sig=", "sig= "),
            good.replace("==", ""),
            good.replace("==", "===="),
            loose.clone(),
            format!("{good};"),
            format!("{good};x=y"),
            format!(" {good}"),
            format!("{good}\n"),
            good.to_uppercase(),
        ] {
            assert_eq!(Signature::parse(&bad), None, "{bad}");
        }
    }

    #[test]
    fn keys_are_read_in_the_one_form_and_weak_ones_refused() {
        let pem =
            |label: &str, der: &[u8]| pem_rfc7468::encode_string(label, pem_rfc7468::LineEnding::LF, der).unwrap();
        let private = pem("PRIVATE KEY", &[PKCS8.as_slice(), &[7; 32]].concat());
        let key = SigningKey::from_pem(&private).unwrap();
        let public = pem("PUBLIC KEY", &[SPKI.as_slice(), key.0.verifying_key().as_bytes()].concat());
        assert_eq!(PublicKey::from_pem(&public), Ok(key.public_key()));
        assert_eq!(format!("{key:?}"), "SigningKey(..)");
        let mut identity_point = [0; 32];
        identity_point[0] = 1;
        let weak = pem("PUBLIC KEY", &[SPKI.as_slice(), &identity_point].concat());
        assert_eq!(PublicKey::from_pem(&weak), Err(KeyFault::Weak));
        assert_eq!(PublicKey::from_pem(&private), Err(KeyFault::NotPem("PUBLIC KEY")));
        assert_eq!(PublicKey::from_pem("payroll"), Err(KeyFault::NotPem("PUBLIC KEY")));
        let long = pem("PUBLIC KEY", &[SPKI.as_slice(), &[1; 33]].concat());
        assert_eq!(PublicKey::from_pem(&long), Err(KeyFault::NotEd25519));
        assert!(SigningKey::from_pem(&public).is_err());
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_round_trips(
            text in "v1;key=[a-z]{1,3};audience=[a-z/]{1,9};expires=2027-0[1-9]-[0-3][0-9]T1[0-9]:00:00Z;sig=[A-Za-z0-9+/]{86}==|\\PC{0,90}",
        ) {
            if let Some(read) = Signature::parse(&text) {
                prop_assert_eq!(read.to_string(), text);
            }
        }

        #[test]
        fn what_is_signed_is_read_and_verified(
            id in "[A-Za-z0-9._-]{1,64}", audience in "[!-:<-~]{1,512}", seconds in 0_i64..4_000_000_000,
            body in proptest::collection::vec(any::<u8>(), 0..64), content_type in proptest::option::of("[ -~]{0,30}"),
        ) {
            let signed = Signed { redrive: None, content_type: content_type.as_deref(), body: &body };
            let expires = OffsetDateTime::from_unix_timestamp(seconds).unwrap();
            let header = key().sign(&id, &audience, expires, signed).unwrap().to_string();
            prop_assert!(Signature::parse(&header).unwrap().is_by(&key().public_key(), signed));
        }
    }
}
