//! What AWS gives for one import.

use super::Wrapping;
use std::fmt;
use time::OffsetDateTime;

/// A set of `GetParametersForImport`: public key and token belong together and live for 24 hours.
#[derive(Clone)]
pub struct ImportParameters {
    /// The Region whose key the set is of.
    pub region: String,
    /// What the set is bound to.
    pub wrapping: Wrapping,
    /// DER `SubjectPublicKeyInfo`.
    pub public_key: Vec<u8>,
    /// Opaque.
    pub import_token: Vec<u8>,
    /// The set's end of life.
    pub valid_to: OffsetDateTime,
    /// AWS's id of the call, for the audit trail.
    pub aws_request_id: Option<String>,
}

impl fmt::Debug for ImportParameters {
    /// Without the token: whoever has it may import.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImportParameters")
            .field("region", &self.region)
            .field("wrapping", &self.wrapping)
            .field("valid_to", &self.valid_to)
            .finish_non_exhaustive()
    }
}
