//! What an AWS call that did not succeed means.
//!
//! The classes follow the error lists of `GetParametersForImport` and `ImportKeyMaterial` (AWS KMS API
//! Reference). Throttling, validation and access errors are not modelled by the SDK; their codes are.

use super::guard::{Departure, Dropped};
use super::taken;
use crate::words::printable;
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_kms::config::http::HttpResponse;
use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_kms::operation::RequestId;
use std::error::Error as StdError;
use std::fmt;

/// An AWS call that did not succeed.
#[derive(Clone, Debug)]
pub struct CallError {
    /// The operation.
    pub operation: &'static str,
    /// What it means.
    pub kind: ErrorKind,
    /// AWS's error code, when AWS answered.
    pub code: Option<String>,
    /// AWS's text, or what happened to the call.
    pub message: String,
    /// AWS's id of the call.
    pub aws_request_id: Option<String>,
}

words! {
    /// Classes of errors; each is either retried with a bound or ends the job with a reason.
    pub ErrorKind {
        /// Never left: too little of the lease was left.
        Dropped = "dropped",
        /// Never reached AWS.
        NotSent = "not_sent",
        /// Sent, perhaps; no answer.
        Unanswered = "unanswered",
        /// AWS failed inside (HTTP 5xx).
        ServerFault = "server_fault",
        /// A request quota, or a hot key.
        Throttled = "throttled",
        /// The import token is older than 24 hours.
        ExpiredImportToken = "expired_import_token",
        /// The import token is damaged, used up, or another key's.
        InvalidImportToken = "invalid_import_token",
        /// AWS could not unwrap.
        InvalidCiphertext = "invalid_ciphertext",
        /// Unwrapped, but not the material that the key may take.
        IncorrectKeyMaterial = "incorrect_key_material",
        /// The key's state forbids it.
        InvalidState = "invalid_state",
        /// No such key, or not yet visible.
        NotFound = "not_found",
        /// AWS does something else with the key just now (`ConflictException` of `RotateKeyOnDemand`).
        Conflict = "conflict",
        /// A limit of the key that nobody can raise (`LimitExceededException` of `RotateKeyOnDemand`).
        LimitExceeded = "limit_exceeded",
        /// The key's origin or kind forbids it.
        Unsupported = "unsupported",
        /// IAM, key policy, or control policy.
        AccessDenied = "access_denied",
        /// Credentials are missing, expired or wrong.
        Credentials = "credentials",
        /// A rule of AWS is broken.
        Refused = "refused",
        /// An answer without what its documentation promises.
        Incomplete = "incomplete",
        /// No client for the account and Region.
        NoTarget = "no_target",
        /// Nothing was done: for the moment there are no credentials of the account's role.
        NoSession = "no_session",
        /// Nothing was sent: STS does not let the account's role be assumed.
        RoleDenied = "role_denied",
    }
}

impl ErrorKind {
    /// Whether a mutating call may have taken effect, now or later.
    ///
    /// A 5xx is an answer, but AWS does not say that nothing happened.
    pub fn may_have_taken_effect(self) -> bool {
        matches!(self, Self::Unanswered | Self::ServerFault | Self::Incomplete)
    }

    fn of_code(code: &str) -> Option<Self> {
        Some(match code {
            "ThrottlingException" | "Throttling" | "TooManyRequestsException" | "RequestLimitExceeded" => {
                Self::Throttled
            }
            "DependencyTimeoutException" | "KMSInternalException" | "InternalFailure" | "ServiceUnavailable" => {
                Self::ServerFault
            }
            "ExpiredImportTokenException" => Self::ExpiredImportToken,
            "InvalidImportTokenException" => Self::InvalidImportToken,
            "InvalidCiphertextException" => Self::InvalidCiphertext,
            "IncorrectKeyMaterialException" => Self::IncorrectKeyMaterial,
            "KMSInvalidStateException" => Self::InvalidState,
            "NotFoundException" => Self::NotFound,
            "ConflictException" => Self::Conflict,
            "LimitExceededException" => Self::LimitExceeded,
            "UnsupportedOperationException" => Self::Unsupported,
            // The second is STS's.
            "AccessDeniedException" | "AccessDenied" => Self::AccessDenied,
            "ExpiredTokenException"
            | "ExpiredToken"
            | "SignatureDoesNotMatch"
            | "UnrecognizedClientException"
            | "InvalidClientTokenId"
            | "InvalidSignatureException"
            | "MissingAuthenticationToken"
            | "MissingAuthenticationTokenException"
            | "IncompleteSignature"
            | "IncompleteSignatureException"
            | "RequestExpired" => Self::Credentials,
            _ => return None,
        })
    }
}

impl CallError {
    pub(super) fn of<E>(operation: &'static str, error: &SdkError<E, HttpResponse>, departure: &Departure) -> Self
    where
        E: ProvideErrorMetadata + RequestId + StdError + 'static,
    {
        // There were no credentials to sign it with, and what is said of that is said already.
        if let Some(of_session) = cause::<Self>(error) {
            return of_session.clone();
        }
        let code = ProvideErrorMetadata::code(error).and_then(taken::word);
        let kind = match error {
            _ if cause::<Dropped>(error).is_some() => ErrorKind::Dropped,
            // It did not get as far as the gate: without credentials a request cannot even be signed.
            _ if !departure.happened() => ErrorKind::Credentials,
            SdkError::ServiceError(answer) => match code.as_deref().and_then(ErrorKind::of_code) {
                Some(kind) => kind,
                None if answer.raw().status().is_server_error() => ErrorKind::ServerFault,
                None if code.is_some() => ErrorKind::Refused,
                None if answer.raw().status().as_u16() == 429 => ErrorKind::Throttled,
                None if answer.raw().status().is_success() => ErrorKind::Incomplete,
                // Not AWS's words: something on the way spoke, and may have passed the call on.
                None => ErrorKind::Unanswered,
            },
            SdkError::DispatchFailure(_) if was_refused(error) => ErrorKind::NotSent,
            _ => ErrorKind::Unanswered,
        };
        let message = match ProvideErrorMetadata::message(error) {
            Some(text) => text.to_owned(),
            None => root_cause(error),
        };
        // Postgres stores no NUL, logs are lines, and a long page of some proxy helps nobody.
        let message = printable(&message).take(500).collect();
        Self { operation, kind, code, message, aws_request_id: error.request_id().and_then(taken::word) }
    }

    /// For the SDK, from which [`CallError::of`] has it back.
    pub(super) fn into_credentials_error(self) -> CredentialsError {
        CredentialsError::provider_error(self)
    }

    /// AWS does not know these credentials, or no longer.
    pub(super) fn says_credentials_are_over(&self) -> bool {
        let codes = ["ExpiredTokenException", "ExpiredToken", "UnrecognizedClientException", "InvalidClientTokenId"];
        self.code.as_deref().is_some_and(|code| codes.contains(&code))
    }

    pub(super) fn incomplete(operation: &'static str, part: &str) -> Self {
        let message = format!("AWS's answer has no {part}");
        Self { operation, kind: ErrorKind::Incomplete, code: None, message, aws_request_id: None }
    }

    pub(super) fn no_target(operation: &'static str, region: &str) -> Self {
        let message = format!("{region} is not a configured target");
        Self { operation, kind: ErrorKind::NoTarget, code: None, message, aws_request_id: None }
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = self.code.as_deref().unwrap_or(self.kind.as_str());
        write!(f, "{}: {code}: {}", self.operation, self.message)
    }
}

impl StdError for CallError {}

/// The connection was refused: nobody was there to take the call.
fn was_refused(error: &(dyn StdError + 'static)) -> bool {
    causes(error).any(|cause| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == std::io::ErrorKind::ConnectionRefused)
    })
}

fn cause<'a, E: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a E> {
    causes(error).find_map(|cause| cause.downcast_ref())
}

fn causes<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

fn root_cause(error: &(dyn StdError + 'static)) -> String {
    let mut root = error;
    while let Some(cause) = root.source() {
        root = cause;
    }
    root.to_string()
}
