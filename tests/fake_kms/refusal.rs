//! The answers with which KMS refuses a call: code, HTTP status and text.
//!
//! Texts that the reference quotes from AWS are used word for word. A text or code marked UNVERIFIED is this double's
//! own best guess; nothing may be concluded about AWS from it.

use std::borrow::Cow;

/// An error answer of AWS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status.
    pub status: u16,
    /// The exception's name, as in `__type`.
    pub code: Cow<'static, str>,
    /// The text for humans.
    pub message: String,
}

impl Refusal {
    /// A refusal with HTTP status 400, as nearly all of KMS's are.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { status: 400, code: Cow::Borrowed(code), message: message.into() }
    }
}

/// A broken rule of a parameter.
pub fn validation(message: impl Into<String>) -> Refusal {
    Refusal::new("ValidationException", message)
}

/// A parameter that is absent, or whose value breaks a constraint of the service model.
pub fn constraint(value: &str, field: &str, rule: &str) -> Refusal {
    validation(format!("1 validation error detected: Value {value} at '{field}' failed to satisfy constraint: {rule}"))
}

/// A body that is not what the protocol says. UNVERIFIED text.
pub fn serialization(message: impl Into<String>) -> Refusal {
    Refusal::new("SerializationException", message)
}

/// The request quota is used up.
pub fn throttled() -> Refusal {
    Refusal::new(
        "ThrottlingException",
        "You have exceeded the rate at which you may call KMS. Reduce the frequency of your calls.",
    )
}

/// No such key in the caller's account and Region.
pub fn not_found(arn: &str) -> Refusal {
    Refusal::new("NotFoundException", format!("Key '{arn}' does not exist"))
}

/// The key's policy does not let the caller in.
pub fn not_authorised(caller: impl std::fmt::Display, operation: &str, arn: &str) -> Refusal {
    let text = format!(
        "User: {caller} is not authorized to perform: kms:{operation} on resource: {arn} because no resource-based policy \
         allows the kms:{operation} action"
    );
    Refusal::new("AccessDeniedException", text)
}

/// The session's credentials have come to their end.
pub fn expired_session() -> Refusal {
    Refusal::new("ExpiredTokenException", "The security token included in the request is expired")
}

/// The key's material is not imported.
pub fn wrong_origin(arn: &str, origin: &str) -> Refusal {
    unsupported(format!("{arn} origin is {origin} which is not valid for this operation."))
}

/// The key or the parameter is of a kind that the operation does not take.
pub fn unsupported(message: impl Into<String>) -> Refusal {
    Refusal::new("UnsupportedOperationException", message)
}

/// The key's state forbids the operation.
pub fn invalid_state(message: impl Into<String>) -> Refusal {
    Refusal::new("KMSInvalidStateException", message)
}

/// The key has no material yet, or lost some.
pub fn pending_import(arn: &str) -> Refusal {
    invalid_state(format!("{arn} is pending import."))
}

/// The key is going to be deleted. UNVERIFIED text.
pub fn pending_deletion(arn: &str) -> Refusal {
    invalid_state(format!("{arn} is pending deletion."))
}

/// Second new material while one waits for its rotation.
pub fn pending_rotation(new: &str, key_id: &str, pending: &str) -> Refusal {
    invalid_state(format!(
        "New key material (id: {new}) cannot be imported into KMS key {key_id}, because another key material (id: {pending}) is pending rotation."
    ))
}

/// `RotateKeyOnDemand` where no material waits for its rotation.
pub fn nothing_pending(arn: &str) -> Refusal {
    invalid_state(format!("No available key material pending rotation for the key: {arn}."))
}

/// A rotation is under way already. AWS names this code for automatic rotations; for those on demand, and the text, it is
/// UNVERIFIED.
pub fn rotation_under_way(arn: &str) -> Refusal {
    Refusal::new("ConflictException", format!("A rotation is already in progress for the key: {arn}"))
}

/// The key has been rotated as often as a key can be. The second sentence is UNVERIFIED.
pub fn rotation_limit(arn: &str) -> Refusal {
    Refusal::new(
        "LimitExceededException",
        format!(
            "The on-demand rotations limit has been reached for the given keyId. No more on-demand rotations can be performed for this key: {arn}"
        ),
    )
}

/// The key's spec is not one that the operation takes. UNVERIFIED text.
pub fn wrong_spec(arn: &str, spec: &str) -> Refusal {
    unsupported(format!("{arn} key spec is {spec} which is not valid for this operation."))
}

/// The key's use is not what the operation is for. UNVERIFIED text.
pub fn wrong_usage(arn: &str, usage: &str) -> Refusal {
    Refusal::new(
        "InvalidKeyUsageException",
        format!("{arn} key usage is {usage} which is not valid for this operation."),
    )
}

/// The key's spec does not know the algorithm. UNVERIFIED text.
pub fn wrong_algorithm(algorithm: &str, spec: &str) -> Refusal {
    Refusal::new("InvalidKeyUsageException", format!("Algorithm {algorithm} is incompatible with key spec {spec}."))
}

/// The key is disabled. UNVERIFIED text.
pub fn disabled(arn: &str) -> Refusal {
    Refusal::new("DisabledException", format!("{arn} is disabled."))
}

/// The token is older than a day. UNVERIFIED text.
pub fn expired_token() -> Refusal {
    Refusal::new("ExpiredImportTokenException", "The import token has expired.")
}

/// The token is unknown, damaged, another key's or used up. UNVERIFIED text.
pub fn invalid_token(message: &str) -> Refusal {
    Refusal::new("InvalidImportTokenException", message)
}

/// The blob does not unwrap. UNVERIFIED text.
pub fn invalid_ciphertext(message: &str) -> Refusal {
    Refusal::new("InvalidCiphertextException", message)
}

/// The blob unwraps to material that this key cannot take. UNVERIFIED text.
pub fn incorrect_material(message: impl Into<String>) -> Refusal {
    Refusal::new("IncorrectKeyMaterialException", message)
}
