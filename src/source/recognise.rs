//! What bytes are that are not the material they should be, so that whoever gave them is told what to do.
//!
//! Only ever called for bytes that were refused: a wrong guess gives a poorer sentence, never another key. Nothing here
//! allocates by what the bytes claim.

use super::fault::MaterialFault;
use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use rsa::pkcs8::der::{self, Decode as _, Header, Reader as _, SliceReader, Tag};
use zeroize::Zeroizing;

/// What is there instead of so many raw bytes.
pub(super) fn instead_of_bytes(bytes: &[u8], needed: usize) -> MaterialFault {
    let wrong_length = MaterialFault::WrongLength { given: bytes.len(), needed };
    match text(bytes) {
        // Other text may be anything: bytes that happen to be letters are no encoding of the key.
        Some(Text::Hex(length) | Text::Base64(length)) if length != needed => wrong_length,
        Some(text) => text.fault(),
        None => wrong_length,
    }
}

/// What is there instead of PKCS#8 DER.
pub(super) fn instead_of_pkcs8(bytes: &[u8]) -> MaterialFault {
    if let Some(text) = text(bytes) {
        return text.fault();
    }
    match bytes {
        [0x30, 0x80, ..] => MaterialFault::IndefiniteLength,
        [0x30, ..] => sequence(bytes),
        _ => MaterialFault::NotPkcs8,
    }
}

/// Kinds of text, with the number of bytes that it spells.
enum Text {
    Pem,
    Jwk,
    Hex(usize),
    Base64(usize),
}

impl Text {
    fn fault(&self) -> MaterialFault {
        match self {
            Self::Pem => MaterialFault::Pem,
            Self::Jwk => MaterialFault::Jwk,
            Self::Hex(_) => MaterialFault::Hex,
            Self::Base64(_) => MaterialFault::Base64,
        }
    }
}

fn text(bytes: &[u8]) -> Option<Text> {
    if !bytes.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace()) {
        return None;
    }
    // Whatever stands before the first armour, as `openssl pkcs12` writes it.
    if contains(bytes, b"-----BEGIN ") {
        return Some(Text::Pem);
    }
    if bytes.trim_ascii_start().starts_with(b"{") && contains(bytes, b"\"kty\"") {
        return Some(Text::Jwk);
    }
    let mut dense = Zeroizing::new(Vec::with_capacity(bytes.len()));
    dense.extend(bytes.iter().filter(|byte| !byte.is_ascii_whitespace()));
    if dense.is_empty() {
        return None;
    }
    if dense.len() % 2 == 0 && dense.iter().all(u8::is_ascii_hexdigit) {
        return Some(Text::Hex(dense.len() / 2));
    }
    let config = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    [alphabet::STANDARD, alphabet::URL_SAFE].iter().find_map(|alphabet| {
        // Its own buffer: what was decoded before a fault is zeroised too.
        let mut decoded = Zeroizing::new(vec![0; dense.len()]);
        GeneralPurpose::new(alphabet, config).decode_slice(&*dense, &mut decoded).ok().map(Text::Base64)
    })
}

/// Whether a word stands anywhere.
pub(super) fn contains(bytes: &[u8], word: &[u8]) -> bool {
    bytes.windows(word.len()).any(|window| window == word)
}

/// Tells the structures that begin with a SEQUENCE by the tags of what is in them.
fn sequence(bytes: &[u8]) -> MaterialFault {
    match elements(bytes) {
        Ok(Elements { trailing: true, .. }) => MaterialFault::TrailingBytes,
        Ok(Elements { tags, first, .. }) => match tags.as_slice() {
            // RSAPrivateKey has nine numbers.
            [Some(Tag::Integer), Some(Tag::Integer), Some(Tag::Integer)] => MaterialFault::Pkcs1,
            [Some(Tag::Integer), Some(Tag::OctetString), _] => MaterialFault::Sec1,
            // PKCS#12 begins with version 3 and a ContentInfo, PKCS#7 with the type of its content.
            [Some(Tag::Integer), Some(Tag::Sequence), _] if first == [3] => MaterialFault::Container,
            [Some(Tag::ObjectIdentifier), ..] => MaterialFault::Container,
            [Some(Tag::Sequence), Some(Tag::OctetString), None] => MaterialFault::Encrypted,
            // RSAPublicKey with two numbers; SubjectPublicKeyInfo; a certificate or a request with its signature.
            [Some(Tag::Integer), Some(Tag::Integer), None]
            | [Some(Tag::Sequence), Some(Tag::BitString), None]
            | [Some(Tag::Sequence), Some(Tag::Sequence), Some(Tag::BitString)] => MaterialFault::PublicKey,
            _ => MaterialFault::NotPkcs8,
        },
        Err(error) if matches!(error.kind(), der::ErrorKind::Incomplete { .. }) => MaterialFault::Truncated,
        Err(error) if error.kind() == der::ErrorKind::IndefiniteLength => MaterialFault::IndefiniteLength,
        Err(_) => MaterialFault::NotPkcs8,
    }
}

/// The tags of a SEQUENCE's first three elements, and the first one's value.
struct Elements<'a> {
    tags: [Option<Tag>; 3],
    first: &'a [u8],
    trailing: bool,
}

fn elements(bytes: &[u8]) -> der::Result<Elements<'_>> {
    let mut reader = SliceReader::new(bytes)?;
    let whole = Header::decode(&mut reader)?;
    let value = reader.read_slice(whole.length())?;
    let mut found = Elements { tags: [None; 3], first: &[], trailing: !reader.is_finished() };
    let mut inside = SliceReader::new(value)?;
    for (at, tag) in found.tags.iter_mut().enumerate() {
        if inside.is_finished() {
            break;
        }
        let header = Header::decode(&mut inside)?;
        let element = inside.read_slice(header.length())?;
        *tag = Some(header.tag());
        if at == 0 {
            found.first = element;
        }
    }
    Ok(found)
}
