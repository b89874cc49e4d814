//! What is recorded of every change. Sealing and verification will come to live here.
//!
//! An entry is its canonical bytes (RFC 8785; an entry holds no fractions, for which serde's sorted maps
//! print just that form). Entries about one subject are numbered 1..n.

use crate::job::rfc3339;
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use uuid::Uuid;

words! {
    /// What happened.
    pub Kind {
        /// A message became a job.
        Accepted = "accepted",
        /// A message was refused. With `folded`: so many within a minute, beyond those that have entries of their own.
        Refused = "refused",
        /// Which source key a job imports was committed; the import is about to be sent.
        MaterialChosen = "material_chosen",
        /// AWS gave a public key and an import token.
        ParametersObtained = "parameters_obtained",
        /// The import is about to be sent again.
        ImportIntended = "import_intended",
        /// AWS said that it took the material.
        MaterialImported = "material_imported",
        /// The rotation to the material that waits is about to be asked for.
        RotationIntended = "rotation_intended",
        /// AWS said that it rotates.
        KeyRotated = "key_rotated",
        /// Deletions are about to be sent.
        DeletionIntended = "deletion_intended",
        /// AWS said that it deleted a material, or, for as long as it was asked, that there was none.
        MaterialDeleted = "material_deleted",
        /// An attempt did not come to an end; another follows.
        AttemptFailed = "attempt_failed",
        /// The job's outcome.
        Succeeded = "succeeded",
        /// The job's outcome.
        Failed = "failed",
        /// An operator cancelled the job; it ends as soon as nothing is in doubt.
        CancelRequested = "cancel_requested",
        /// An operator abandoned the job; it ends even if something is in doubt.
        AbandonRequested = "abandon_requested",
        /// An operator had events published once more.
        EventsRepublished = "events_republished",
        /// An operator stopped what is within a scope.
        Held = "held",
        /// An operator let it go on.
        HoldReleased = "hold_released",
        /// An operator made a source key, or a job did.
        SourceKeyCreated = "source_key_created",
        /// An operator brought a source key.
        SourceKeyImported = "source_key_imported",
        /// An operator erased a source key.
        SourceKeyDeleted = "source_key_deleted",
    }
}

/// A fact that still needs its number and its time, both given by the transaction that writes it.
#[derive(Clone, Debug)]
pub struct Fact {
    kind: Kind,
    details: Map<String, Value>,
}

impl Fact {
    /// `details` is an object without fractions and without secrets.
    pub fn new(kind: Kind, details: Value) -> Self {
        let details = match details {
            Value::Object(details) => details,
            _ => Map::new(),
        };
        Self { kind, details }
    }

    /// What happened.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The entry's canonical bytes.
    pub fn entry(&self, subject: Uuid, n: i32, at: OffsetDateTime) -> String {
        json!({
            "v": 1,
            "subject": subject,
            "n": n,
            "at": rfc3339(at),
            "kind": self.kind.as_str(),
            "details": self.details,
        })
        .to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

    #[test]
    fn an_entry_is_canonical() {
        let fact = Fact::new(Kind::Accepted, json!({"z": "ä\n", "a": {"y": 1, "b": null}}));
        assert_eq!(
            fact.entry(Uuid::nil(), 1, datetime!(2026-01-01 0:00 UTC)),
            r#"{"at":"2026-01-01T00:00:00Z","details":{"a":{"b":null,"y":1},"z":"ä\n"},"kind":"accepted","n":1,"subject":"00000000-0000-0000-0000-000000000000","v":1}"#
        );
    }
}
