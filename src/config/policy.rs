//! Where the policy is, and how its file is read.

use super::ConfigError;
use crate::policy::{ALLOW_ALL, Policy};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A policy file is no larger.
const MOST_BYTES: u64 = 4 * 1024 * 1024;

/// The setting `policy`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(from = "String", into = "String")]
pub enum PolicySource {
    /// `allow-all`.
    AllowAll,
    /// A file, relative to the settings file.
    File(PathBuf),
}

impl From<String> for PolicySource {
    fn from(text: String) -> Self {
        if text == ALLOW_ALL { Self::AllowAll } else { Self::File(text.into()) }
    }
}

impl From<PolicySource> for String {
    fn from(source: PolicySource) -> Self {
        match source {
            PolicySource::AllowAll => ALLOW_ALL.into(),
            PolicySource::File(path) => path.to_string_lossy().into_owned(),
        }
    }
}

impl PolicySource {
    /// With a relative path made one from `directory`.
    pub(super) fn within(self, directory: &Path) -> Self {
        match self {
            Self::AllowAll => Self::AllowAll,
            Self::File(path) => Self::File(directory.join(path)),
        }
    }

    /// Reads the policy. A file is read twice and has to say the same: one that is being written is not taken by half.
    pub fn read(&self) -> Result<Policy, ConfigError> {
        let Self::File(path) = self else { return Ok(Policy::AllowAll) };
        let unreadable = |error| ConfigError::File { name: "policy", path: path.clone(), error };
        let unusable = |reason| ConfigError::Unusable { name: "policy".into(), path: path.clone(), reason };
        let once = || {
            let length = std::fs::metadata(path)?.len();
            if length > MOST_BYTES {
                return Err(std::io::Error::other("it is larger than 4 MiB"));
            }
            std::fs::read_to_string(path)
        };
        let text = once().map_err(unreadable)?;
        if text != once().map_err(unreadable)? {
            let reason = "it is being written: write a new file and rename it to this name, then load it again";
            return Err(unusable(reason.into()));
        }
        Policy::parse(&text).map_err(|error| unusable(error.to_string()))
    }
}
