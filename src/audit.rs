//! What is recorded of every change. Sealing and verification will come to live here.
//!
//! An entry is its canonical bytes (RFC 8785; an entry holds no fractions, for which serde's sorted maps
//! print just that form). Entries about one subject are numbered 1..n.

use crate::job::rfc3339;
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use uuid::Uuid;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A message became a job.
    Accepted,
    /// A message was refused. With `folded`: so many within a minute, beyond those that have entries of their own.
    Refused,
    /// Which source key a job imports was committed; the import is about to be sent.
    MaterialChosen,
    /// AWS gave a public key and an import token.
    ParametersObtained,
    /// The import is about to be sent again.
    ImportIntended,
    /// AWS said that it took the material.
    MaterialImported,
    /// Deletions are about to be sent.
    DeletionIntended,
    /// AWS said that it deleted a material, or, for as long as it was asked, that there was none.
    MaterialDeleted,
    /// An attempt did not come to an end; another follows.
    AttemptFailed,
    /// The job's outcome.
    Succeeded,
    /// The job's outcome.
    Failed,
    /// An operator cancelled the job; it ends as soon as nothing is in doubt.
    CancelRequested,
    /// An operator stopped what is within a scope.
    Held,
    /// An operator let it go on.
    HoldReleased,
    /// An operator made a source key, or a job did.
    SourceKeyCreated,
    /// An operator brought a source key.
    SourceKeyImported,
    /// An operator erased a source key.
    SourceKeyDeleted,
}

impl Kind {
    /// The word in the entry.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Refused => "refused",
            Self::MaterialChosen => "material_chosen",
            Self::ParametersObtained => "parameters_obtained",
            Self::ImportIntended => "import_intended",
            Self::MaterialImported => "material_imported",
            Self::DeletionIntended => "deletion_intended",
            Self::MaterialDeleted => "material_deleted",
            Self::AttemptFailed => "attempt_failed",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::CancelRequested => "cancel_requested",
            Self::Held => "held",
            Self::HoldReleased => "hold_released",
            Self::SourceKeyCreated => "source_key_created",
            Self::SourceKeyImported => "source_key_imported",
            Self::SourceKeyDeleted => "source_key_deleted",
        }
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
