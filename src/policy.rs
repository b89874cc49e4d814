//! Who may ask for what. Pure.

use crate::job::Request;
use serde::Deserialize;

/// The rules. There is one so far, and it must be written out: `policy = "allow-all"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Everybody who can write to the queue may ask for everything.
    AllowAll,
}

/// What the policy says to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Allowed.
    Allowed,
    /// Not allowed.
    Denied,
}

impl Policy {
    /// Judges a request. Asked at intake and again at each claim.
    pub fn judge(self, _principal: &str, _request: &Request) -> Verdict {
        match self {
            Self::AllowAll => Verdict::Allowed,
        }
    }
}
