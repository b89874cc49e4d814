//! What a check found, in words for people and codes for programs.

use crate::cli::output::printable;
use serde::Serialize;

/// How it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    Ok,
    /// A worker runs, and somebody should look at this.
    Warning,
    /// A worker cannot start or cannot do its work.
    Failed,
    /// Not looked at, for a reason.
    Skipped,
}

impl Verdict {
    pub(super) const ALL: [Self; 4] = [Self::Failed, Self::Warning, Self::Skipped, Self::Ok];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Finding {
    /// What was looked at, such as `postgres.clock`; with the one that is meant where there are several.
    pub(super) check: String,
    pub(super) verdict: Verdict,
    /// Stable. `ok` where all is well.
    pub(super) code: &'static str,
    /// A sentence.
    pub(super) message: String,
    /// What to type, or to mend.
    pub(super) advice: Option<String>,
}

impl Finding {
    pub(super) fn ok(check: impl Into<String>, message: impl AsRef<str>) -> Self {
        Self::new(check, Verdict::Ok, "ok", message, None)
    }

    pub(super) fn skipped(check: impl Into<String>, code: &'static str, message: impl AsRef<str>) -> Self {
        Self::new(check, Verdict::Skipped, code, message, None)
    }

    pub(super) fn warning(
        check: impl Into<String>,
        code: &'static str,
        message: impl AsRef<str>,
        advice: impl AsRef<str>,
    ) -> Self {
        Self::new(check, Verdict::Warning, code, message, Some(advice.as_ref()))
    }

    pub(super) fn failed(
        check: impl Into<String>,
        code: &'static str,
        message: impl AsRef<str>,
        advice: impl AsRef<str>,
    ) -> Self {
        Self::new(check, Verdict::Failed, code, message, Some(advice.as_ref()))
    }

    /// Servers' own words are in some of the sentences.
    fn new(
        check: impl Into<String>,
        verdict: Verdict,
        code: &'static str,
        message: impl AsRef<str>,
        advice: Option<&str>,
    ) -> Self {
        let (message, advice) = (printable(message.as_ref()), advice.map(printable));
        Self { check: check.into(), verdict, code, message, advice }
    }
}
