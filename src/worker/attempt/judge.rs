//! What follows an AWS error: retried with a bound, or ended with a reason.
//!
//! After the error lists of `GetParametersForImport` and `ImportKeyMaterial` (AWS KMS API Reference).

use crate::job::FailureCode;
use crate::kms::{CallError, ErrorKind};
use crate::retry::Class;

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Again after a delay, until the job's deadline.
    Retry(Class),
    /// Again after a delay, since AWS may not have caught up with itself; after some attempts the end, with this code.
    Await(FailureCode),
    /// Again with fresh import parameters; if those are refused too the end, with this code.
    Refresh(FailureCode),
    /// The end, with advice.
    Fail(FailureCode, &'static str),
}

/// Judges an error whose call changed nothing: a read-only one, or one that AWS answered.
pub(super) fn judge(error: &CallError) -> Verdict {
    match error.kind {
        ErrorKind::Dropped
        | ErrorKind::NotSent
        | ErrorKind::Unanswered
        | ErrorKind::ServerFault
        | ErrorKind::NoSession
        | ErrorKind::Conflict
        | ErrorKind::Incomplete => Verdict::Retry(Class::Transient),
        ErrorKind::Throttled => Verdict::Retry(Class::Throttled),
        ErrorKind::Credentials => Verdict::Retry(Class::Credentials),
        // A key that was made, or changed, moments ago.
        ErrorKind::NotFound => Verdict::Await(FailureCode::KeyNotFound),
        ErrorKind::InvalidState => Verdict::Await(FailureCode::KeyInvalidState),
        ErrorKind::LimitExceeded => {
            Verdict::Fail(FailureCode::RotationsSpent, "make a new KMS key and let its alias point to that")
        }
        // IAM shows a new role or trust policy late, as KMS a new key, and a slip in one trust policy is every waiting job
        // of its account: it gets the time of a key that is not visible yet, a minute and a half, and then the end, since
        // only a person can mend it.
        ErrorKind::RoleDenied => Verdict::Await(FailureCode::RoleNotAssumable),
        ErrorKind::ExpiredImportToken | ErrorKind::InvalidImportToken => {
            Verdict::Refresh(FailureCode::ImportParametersRefused)
        }
        ErrorKind::InvalidCiphertext => Verdict::Refresh(FailureCode::CiphertextRefused),
        ErrorKind::IncorrectKeyMaterial => Verdict::Fail(
            FailureCode::OtherMaterial,
            "the key holds or held other material and takes only the same again; name that source key",
        ),
        ErrorKind::Unsupported => Verdict::Fail(FailureCode::AwsRefused, "the key's origin or kind does not allow it"),
        ErrorKind::AccessDenied => Verdict::Fail(
            FailureCode::AccessDenied,
            "allow the worker kms:DescribeKey, kms:GetParametersForImport, kms:ImportKeyMaterial, kms:ListKeyRotations, \
             kms:GetPublicKey, for deletes kms:DeleteImportedKeyMaterial and for rotations kms:RotateKeyOnDemand",
        ),
        ErrorKind::NoTarget => {
            Verdict::Fail(FailureCode::TargetRemoved, "configure the target, or ask for another key")
        }
        ErrorKind::Refused => Verdict::Fail(FailureCode::AwsRefused, "the request breaks a rule of AWS"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(kind: ErrorKind) -> CallError {
        CallError { operation: "ImportKeyMaterial", kind, code: None, message: String::new(), aws_request_id: None }
    }

    #[test]
    fn what_may_have_taken_effect_is_never_ended_at_once() {
        for kind in ErrorKind::ALL.iter().copied().filter(|kind| kind.may_have_taken_effect()) {
            assert_eq!(judge(&error(kind)), Verdict::Retry(Class::Transient), "{kind:?}");
        }
    }

    #[test]
    fn only_what_aws_or_an_operator_must_change_ends_a_job_at_once() {
        let ended: Vec<ErrorKind> =
            ErrorKind::ALL.iter().copied().filter(|kind| matches!(judge(&error(*kind)), Verdict::Fail(..))).collect();
        assert_eq!(
            ended,
            [
                ErrorKind::IncorrectKeyMaterial,
                ErrorKind::LimitExceeded,
                ErrorKind::Unsupported,
                ErrorKind::AccessDenied,
                ErrorKind::Refused,
                ErrorKind::NoTarget,
            ]
        );
    }
}
