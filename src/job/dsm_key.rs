//! How a request names a dsm key.

use std::fmt;

/// Longest reference in bytes.
const LONGEST: usize = 256;

/// A key by unique identifier or name, on a named connection or the default one: `prod-eu/payroll-master`,
/// `payroll-master`.
///
/// The first slash ends the connection's name: a key whose own name has a slash is written with its connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DsmKeyRef {
    connection: Option<String>,
    key: String,
}

/// Why a text is no reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a dsm key as CONNECTION/KEY or KEY: 1 to 256 printable ASCII characters, neither part empty")]
pub struct NotAKeyRef;

impl DsmKeyRef {
    /// Reads a reference.
    pub fn parse(text: &str) -> Result<Self, NotAKeyRef> {
        let is_printable = text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
        if !(1..=LONGEST).contains(&text.len()) || !is_printable {
            return Err(NotAKeyRef);
        }
        let (connection, key) = text.split_once('/').map_or((None, text), |(connection, key)| (Some(connection), key));
        if key.trim().is_empty() || connection.is_some_and(|connection| connection.trim().is_empty()) {
            return Err(NotAKeyRef);
        }
        Ok(Self { connection: connection.map(str::to_owned), key: key.to_owned() })
    }

    /// The connection's name, where one is given.
    pub fn connection(&self) -> Option<&str> {
        self.connection.as_deref()
    }

    /// Unique identifier or name.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Whether the key looks like what servers give out as unique identifiers: a number, a UUID, or 32 and more hex digits.
    ///
    /// It is then tried as one first, and as a name only if the server shows the client no object of that identifier: anybody
    /// who may store objects can choose a name, and nobody an identifier.
    pub fn looks_like_identifier(&self) -> bool {
        let key = &self.key;
        let is_number = key.bytes().all(|byte| byte.is_ascii_digit());
        let is_hex = key.len() >= 32 && key.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_number || is_hex || uuid::Uuid::try_parse(key).is_ok()
    }
}

impl fmt::Display for DsmKeyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(connection) = &self.connection {
            write!(f, "{connection}/")?;
        }
        f.write_str(&self.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_reference_is_a_key_with_or_without_its_connection() {
        let parts = |text: &str| {
            let parsed = DsmKeyRef::parse(text)?;
            Ok((parsed.connection().map(str::to_owned), parsed.key().to_owned()))
        };
        assert_eq!(parts("payroll-master"), Ok((None, "payroll-master".into())));
        assert_eq!(parts("prod-eu/payroll-master"), Ok((Some("prod-eu".into()), "payroll-master".into())));
        assert_eq!(parts("prod-eu/team a/key"), Ok((Some("prod-eu".into()), "team a/key".into())));
        assert!(parts(&"k".repeat(256)).is_ok());
        for text in ["", "/", "/key", "prod/", " ", "a\nb", "a\0", "schlüssel", "prod/ ", &"k".repeat(257)] {
            assert_eq!(parts(text), Err(NotAKeyRef), "{text}");
        }
    }

    #[test]
    fn identifiers_are_told_from_names_by_their_look() {
        for (text, is_identifier) in [
            ("7", true),
            ("1f165d65-cbbd-4bd6-9867-80e0b390acf9", true),
            ("1F165D65CBBD4BD6986780E0B390ACF9", true),
            ("0a48d2f8dd4e4ec3b2d86ae0dd4e4ec3b2d86ae00a48d2f8dd4e4ec3b2d86ae0", true),
            ("payroll-master", false),
            ("deadbeef", false),
            ("7 ", false),
        ] {
            assert_eq!(DsmKeyRef::parse(text).unwrap().looks_like_identifier(), is_identifier, "{text}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_read_is_shown_as_it_was(text in ".{0,40}") {
            if let Ok(parsed) = DsmKeyRef::parse(&text) {
                prop_assert_eq!(parsed.to_string(), text);
            }
        }
    }
}
