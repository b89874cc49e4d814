//! The table of import tokens, and the rules by which one is accepted.
//!
//! A token is random bytes without meaning; only its digest is kept, so that a million of them fit into memory.

use std::collections::HashMap;
use std::sync::Arc;

use crate::crypto::{KEYS_PER_SPEC, Unopened, random, sha256};
use crate::kinds::{DAY, Millis, WrappingAlgorithm, WrappingKeySpec};
use crate::refusal::{self, Refusal};

/// How long a set of public key and token is valid.
pub const TOKEN_LIFE: Millis = DAY;

/// AWS's published example has about this length.
pub const TOKEN_LENGTH: usize = 1_720;

/// What a token stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// The one key that it imports into.
    pub key: Arc<str>,
    /// The one algorithm to wrap with.
    pub algorithm: WrappingAlgorithm,
    /// Spec of the wrapping key.
    pub spec: WrappingKeySpec,
    /// Which wrapping key of the spec.
    pub index: u8,
    issued_at: Millis,
    used: bool,
}

/// All tokens ever issued.
#[derive(Debug, Default)]
pub struct Tokens {
    table: HashMap<[u8; 32], Token>,
    issued: u8,
}

impl Tokens {
    /// Issues a token. Older ones stay valid: that AWS does not invalidate them is UNVERIFIED.
    pub fn issue(
        &mut self,
        key: Arc<str>,
        algorithm: WrappingAlgorithm,
        spec: WrappingKeySpec,
        now: Millis,
    ) -> Result<([u8; TOKEN_LENGTH], Token), Unopened> {
        let bytes: [u8; TOKEN_LENGTH] = random()?;
        self.issued = self.issued.wrapping_add(1);
        let token = Token { key, algorithm, spec, index: self.issued % KEYS_PER_SPEC, issued_at: now, used: false };
        self.table.insert(sha256(&[&bytes]), token.clone());
        Ok((bytes, token))
    }

    /// The token behind the bytes, if it may be used for this key at this time.
    pub fn check(&self, bytes: &[u8], key: &str, now: Millis, single_use: bool) -> Result<&Token, Refusal> {
        let token = self
            .table
            .get(&sha256(&[bytes]))
            .ok_or_else(|| refusal::invalid_token("The import token is not valid."))?;
        if &*token.key != key {
            return Err(refusal::invalid_token("The import token was issued for another KMS key."));
        }
        if now >= token.issued_at + TOKEN_LIFE {
            return Err(refusal::expired_token());
        }
        // UNVERIFIED: AWS documents a new set for every import, but no check.
        if single_use && token.used {
            return Err(refusal::invalid_token("The import token has been used already."));
        }
        Ok(token)
    }

    /// Notes a successful import. A rejected call does not burn its token.
    pub fn burn(&mut self, bytes: &[u8]) {
        if let Some(token) = self.table.get_mut(&sha256(&[bytes])) {
            token.used = true;
        }
    }

    /// How many have been issued.
    pub fn len(&self) -> usize {
        self.table.len()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_one_key_one_day_and_one_success() {
        let mut tokens = Tokens::default();
        let (bytes, token) =
            tokens.issue("key-1".into(), WrappingAlgorithm::OaepSha256, WrappingKeySpec::Rsa4096, 1_000).unwrap();
        let code = |tokens: &Tokens, bytes: &[u8], key, now, single_use| {
            tokens.check(bytes, key, now, single_use).cloned().map_err(|refusal| refusal.code.into_owned())
        };
        let invalid = Err("InvalidImportTokenException".to_owned());

        assert_eq!(code(&tokens, &bytes, "key-1", 1_000, true), Ok(token.clone()));
        assert_eq!(code(&tokens, &bytes, "key-1", 1_000 + DAY - 1, true), Ok(token.clone()));
        assert_eq!(code(&tokens, &bytes, "key-2", 1_000, true), invalid);
        assert_eq!(code(&tokens, &bytes[1..], "key-1", 1_000, true), invalid);
        assert_eq!(code(&tokens, &bytes, "key-1", 1_000 + DAY, true), Err("ExpiredImportTokenException".to_owned()));
        tokens.burn(&bytes);
        assert_eq!(code(&tokens, &bytes, "key-1", 1_000, true), invalid);
        assert!(code(&tokens, &bytes, "key-1", 1_000, false).is_ok());
    }

    #[test]
    fn sets_of_one_spec_use_different_keys_and_stay_valid_side_by_side() {
        let mut tokens = Tokens::default();
        let mut issue =
            || tokens.issue("key-1".into(), WrappingAlgorithm::OaepSha1, WrappingKeySpec::Rsa2048, 0).unwrap();
        let (first, second) = (issue(), issue());
        assert_ne!(first.1.index, second.1.index);
        assert!(tokens.check(&first.0, "key-1", 1, true).is_ok());
        assert!(tokens.check(&second.0, "key-1", 1, true).is_ok());
        assert_eq!(tokens.len(), 2);
    }
}
