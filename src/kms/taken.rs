//! What is taken from AWS's answers. It is stored and told in events, which brokers take up to a size only: so nothing is longer
//! than AWS promises, whoever answered in its name.

use aws_sdk_kms::primitives::Blob;
use serde_json::Value;

/// Characters of a word.
const LONGEST: usize = 256;
/// Bytes of a public key or of a token, some more than AWS documents.
const MOST_BYTES: usize = 8192;
/// Entries of a list: algorithms, replicas.
pub(super) const MOST_ENTRIES: usize = 64;

/// An id, a state, a name: at most 256 printable ASCII characters.
pub(super) fn word(text: &str) -> Option<String> {
    is_word(text).then(|| text.to_owned())
}

fn is_word(text: &str) -> bool {
    text.len() <= LONGEST && text.bytes().all(is_printable)
}

/// Whose credentials are used. IAM's paths are long.
pub(super) fn arn(text: &str) -> Option<String> {
    (text.len() <= 2048 && text.bytes().all(is_printable)).then(|| text.to_owned())
}

fn is_printable(byte: u8) -> bool {
    (b' '..=b'~').contains(&byte)
}

/// A material's id: 64 hexadecimal digits.
pub(super) fn material_id(text: &str) -> Option<String> {
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    (text.len() == 64 && text.bytes().all(is_digit)).then(|| text.to_owned())
}

/// A public key, or an import token.
pub(super) fn bytes(blob: Blob) -> Option<Vec<u8>> {
    let bytes = blob.into_inner();
    (1..=MOST_BYTES).contains(&bytes.len()).then_some(bytes)
}

/// Whether every text is a word, and every list short.
pub(super) fn is_bounded(value: &Value) -> bool {
    match value {
        Value::String(text) => is_word(text),
        Value::Array(entries) => entries.len() <= MOST_ENTRIES && entries.iter().all(is_bounded),
        Value::Object(fields) => fields.values().all(is_bounded),
        Value::Null | Value::Bool(_) | Value::Number(_) => true,
    }
}
