//! The key-encryption key: whether it is one, and the one that this database was sealed under.

use super::database::Seen;
use super::finding::Finding;
use super::settings;
use crate::app::open_kek;
use crate::config::{ConfigError, Loaded};
use crate::source::{KekError, Keyring};

const CHECK: &str = "key";

pub(super) fn check(loaded: &Loaded, seen: Option<&Seen>) -> Finding {
    let kek = match open_kek(loaded) {
        Ok(kek) => kek,
        Err(error @ (ConfigError::Unusable { .. } | ConfigError::Invalid { .. })) => {
            let advice = "restore the right one; for a new installation: openssl rand -base64 32";
            return Finding::failed(CHECK, "kek_malformed", error.to_string(), advice);
        }
        Err(error) => return settings::of(CHECK, &error),
    };
    let Some(seen) = seen else {
        let message = "it can be read; whether it is the right one is told by the database, which was not reached";
        return Finding::skipped(CHECK, "needs_postgres", message);
    };
    let Some(stored) = &seen.fingerprint_key else {
        return Finding::ok(
            CHECK,
            "nothing is sealed yet: the first start binds the database to this key; keep a copy of it",
        );
    };
    match Keyring::open(kek, stored) {
        Ok(keyring) => Finding::ok(CHECK, format!("the key {} opens what is sealed", keyring.kek_id())),
        Err(error) => {
            let (code, advice) = match &error {
                KekError::Wrong { .. } => {
                    ("kek_wrong", "give the right key; a new one cannot open what the old one sealed")
                }
                _ => ("kek_damaged", "restore the table fingerprint_key from a backup"),
            };
            Finding::failed(CHECK, code, error.to_string(), advice)
        }
    }
}
