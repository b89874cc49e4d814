//! What a call to SQS that did not succeed means, and what a batch's entry that did not.
//!
//! The classes follow the error lists of the SQS API Reference. Clients of the JSON protocol are told the codes of the
//! older query protocol (`AWS.SimpleQueueService.NonExistentQueue`); both spellings are known here.

use crate::retry::Class;
use crate::words::printable;
use aws_sdk_sqs::config::http::HttpResponse;
use aws_sdk_sqs::error::{ProvideErrorMetadata, SdkError};
use std::error::Error as StdError;
use std::fmt;

/// Longest text of AWS's that is kept: a long page of some proxy helps nobody.
const MOST_TEXT: usize = 300;

words! {
    /// What a failed call means for what comes next.
    pub Fault {
        /// A request quota, or too many messages in flight (`OverLimit`).
        Throttled = "throttled",
        /// No answer, an answer that is not AWS's, or a 5xx.
        Away = "away",
        /// No such queue.
        Gone = "gone",
        /// Credentials, IAM or queue policy, or the KMS key of an encrypted queue: a person must act.
        Denied = "denied",
        /// The call breaks a rule of SQS; the same call breaks it again.
        Refused = "refused",
    }
}

impl Fault {
    /// How long to wait before the same is tried again.
    pub fn class(self) -> Class {
        match self {
            Self::Throttled => Class::Throttled,
            _ => Class::Reconnect,
        }
    }

    fn of_code(code: &str) -> Option<Self> {
        let code = code.strip_prefix("AWS.SimpleQueueService.").unwrap_or(code);
        Some(match code {
            "RequestThrottled"
            | "ThrottlingException"
            | "Throttling"
            | "TooManyRequestsException"
            | "RequestLimitExceeded"
            | "OverLimit"
            | "KmsThrottled"
            | "KMS.ThrottlingException" => Self::Throttled,
            "InternalError" | "InternalFailure" | "ServiceUnavailable" | "RequestTimeout" => Self::Away,
            "QueueDoesNotExist" | "NonExistentQueue" | "QueueDeletedRecently" => Self::Gone,
            "AccessDenied"
            | "AccessDeniedException"
            | "InvalidSecurity"
            | "InvalidAddress"
            | "ExpiredToken"
            | "ExpiredTokenException"
            | "UnrecognizedClientException"
            | "InvalidClientTokenId"
            | "InvalidSignatureException"
            | "SignatureDoesNotMatch"
            | "MissingAuthenticationToken"
            | "MissingAuthenticationTokenException"
            | "IncompleteSignature"
            | "IncompleteSignatureException"
            | "RequestExpired"
            | "OptInRequired" => Self::Denied,
            code if code.starts_with("Kms") || code.starts_with("KMS.") => Self::Denied,
            _ => return None,
        })
    }
}

/// A call that did not succeed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallError {
    /// The operation.
    pub operation: &'static str,
    /// The queue's name.
    pub queue: String,
    /// What it means.
    pub fault: Fault,
    /// AWS's error code, when AWS answered.
    pub code: Option<String>,
    /// AWS's text, or what happened to the call.
    pub message: String,
}

impl CallError {
    pub(super) fn of<E>(operation: &'static str, queue: &str, error: &SdkError<E, HttpResponse>) -> Self
    where
        E: ProvideErrorMetadata + StdError + 'static,
    {
        let code = ProvideErrorMetadata::code(error).map(|code| printable(code).take(MOST_TEXT).collect::<String>());
        let fault = match error {
            SdkError::ServiceError(answer) => match code.as_deref().and_then(Fault::of_code) {
                Some(fault) => fault,
                None if answer.raw().status().is_server_error() => Fault::Away,
                None if answer.raw().status().as_u16() == 429 => Fault::Throttled,
                None if code.is_some() => Fault::Refused,
                // Not AWS's words: something on the way spoke.
                None => Fault::Away,
            },
            // Without a Region there is no address, and without credentials no signature. For the latter the SDK has no
            // type that is public here.
            SdkError::ConstructionFailure(_) => Fault::Denied,
            SdkError::DispatchFailure(_) if mentions_credentials(error) => Fault::Denied,
            _ => Fault::Away,
        };
        let message = ProvideErrorMetadata::message(error).map_or_else(|| root_cause(error), str::to_owned);
        let message = printable(&message).take(MOST_TEXT).collect();
        Self { operation, queue: queue.to_owned(), fault, code, message }
    }

    pub(super) fn incomplete(operation: &'static str, queue: &str, part: &str) -> Self {
        let message = format!("the answer has no {part}");
        Self { operation, queue: queue.to_owned(), fault: Fault::Away, code: None, message }
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { operation, queue, fault, code, message } = self;
        write!(f, "SQS {operation} on {queue}: {}: {message}", code.as_deref().unwrap_or(fault.as_str()))?;
        f.write_str(match fault {
            Fault::Gone => "; make the queue, or mend its URL in [sqs]",
            Fault::Denied => "; look at the worker's AWS credentials and at its rights on the queue",
            Fault::Throttled | Fault::Away | Fault::Refused => "",
        })
    }
}

impl StdError for CallError {}

/// What SQS said of one entry of a batch that otherwise went through (`BatchResultErrorEntry`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryError {
    /// Whether the entry itself is to blame: sent again, it fails again.
    pub is_senders_fault: bool,
    /// AWS's error code.
    pub code: String,
    /// AWS's text.
    pub message: String,
}

impl EntryError {
    /// Whether the receipt is of no more use: the message is another's by now, or gone.
    ///
    /// SQS has two spellings for it: the documented codes, and `InvalidParameterValue` about the parameter
    /// `ReceiptHandle` (UNVERIFIED in documentation, seen in answers to `ChangeMessageVisibility`).
    pub fn is_receipt_gone(&self) -> bool {
        let code = self.code.strip_prefix("AWS.SimpleQueueService.").unwrap_or(&self.code);
        matches!(code, "ReceiptHandleIsInvalid" | "MessageNotInflight")
            || code == "InvalidParameterValue" && self.message.contains("ReceiptHandle")
    }

    /// Whether another attempt can go better.
    pub(super) fn is_worth_another(&self) -> bool {
        !self.is_senders_fault || Fault::of_code(&self.code) == Some(Fault::Throttled)
    }
}

impl fmt::Display for EntryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text: String = printable(&self.message).take(MOST_TEXT).collect();
        let code: String = printable(&self.code).take(MOST_TEXT).collect();
        write!(f, "{code}: {text}")
    }
}

fn mentions_credentials(error: &(dyn StdError + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.to_string().contains("credential") {
            return true;
        }
        cause = error.source();
    }
    false
}

fn root_cause(error: &(dyn StdError + 'static)) -> String {
    let mut root = error;
    while let Some(cause) = root.source() {
        root = cause;
    }
    root.to_string()
}
