//! How a message or a job ends: refusal codes, failure codes and the result.

use serde::{Deserialize, Serialize};

/// Why a message did not become a job. Decided without AWS or source I/O.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Stable, for programs.
    pub code: RefusalCode,
    /// The field at fault, when one is.
    pub field: Option<String>,
    /// What was expected and what to do. Never quotes a value of the message.
    pub message: String,
}

impl Refusal {
    /// A refusal about one field.
    pub fn of(field: &str, code: RefusalCode, message: impl Into<String>) -> Self {
        Self { code, field: Some(field.to_owned()), message: message.into() }
    }

    /// A refusal of the whole message.
    pub fn whole(code: RefusalCode, message: impl Into<String>) -> Self {
        Self { code, field: None, message: message.into() }
    }
}

words! {
    /// Stable codes of refusals.
    pub RefusalCode {
        /// Over 64 KiB.
        BodyTooLarge = "body_too_large",
        /// Not UTF-8.
        NotUtf8 = "not_utf8",
        /// Not JSON.
        NotJson = "not_json",
        /// JSON, but no object.
        NotAnObject = "not_an_object",
        /// A NUL character somewhere.
        NulCharacter = "nul_character",
        /// A CloudEvents envelope that breaks its specification.
        InvalidEnvelope = "invalid_envelope",
        /// The same field twice.
        DuplicateField = "duplicate_field",
        /// A field that no request has.
        UnknownField = "unknown_field",
        /// A field that is required.
        MissingField = "missing_field",
        /// A field that this operation does not take.
        FieldNotAllowed = "field_not_allowed",
        /// A field of the wrong JSON type.
        WrongType = "wrong_type",
        /// A field whose value breaks its rule.
        InvalidValue = "invalid_value",
        /// An ARN that is none.
        InvalidArn = "invalid_arn",
        /// An account or Region that is not configured.
        UnknownTarget = "unknown_target",
        /// A key id that Keyferry has not given.
        UnknownKey = "unknown_key",
        /// An operation that does not exist.
        UnknownOperation = "unknown_operation",
        /// A field or operation that the version which refused it did not carry out. Since rotations exist there is none.
        NotSupported = "not_supported",
        /// A tier that does not exist.
        UnknownTier = "unknown_tier",
        /// A tier without configuration.
        TierNotConfigured = "tier_not_configured",
        /// `valid_to` in the past.
        ValidToPast = "valid_to_past",
        /// `valid_to` further away than AWS allows.
        ValidToTooFar = "valid_to_too_far",
        /// `key_expiration` without `valid_to`.
        ValidToMissing = "valid_to_missing",
        /// `valid_to` without `key_expiration`.
        ValidToWithoutExpiration = "valid_to_without_expiration",
        /// The same id with other content.
        IdConflict = "id_conflict",
        /// Nothing proves who sent it.
        IdentityMissing = "identity_missing",
        /// The policy has no principal for who sent it.
        IdentityUnknown = "identity_unknown",
        /// The signature is not over this message, or is no signature.
        SignatureInvalid = "signature_invalid",
        /// The signature is past its end, or its end is too far away.
        SignatureExpired = "signature_expired",
        /// The signature is for another queue or deployment.
        SignatureAudience = "signature_audience",
        /// The policy does not allow it.
        NotAllowed = "not_allowed",
        /// Too many jobs of the principal wait.
        BacklogFull = "backlog_full",
        /// Too many jobs of the KMS key wait.
        LineFull = "line_full",
        /// Too many jobs of the account and Region wait.
        LaneFull = "lane_full",
        /// Whoever sent a refused message again may not, or nobody may.
        RedriveNotAllowed = "redrive_not_allowed",
        /// A refused message that was sent again is not the one that was refused.
        RedriveMismatch = "redrive_mismatch",
        /// Postgres refuses the row, for a reason of the row's own.
        Unstorable = "unstorable",
        /// The broker dead-lettered it before it was decided on, or somebody moved it there.
        DeadLetteredByBroker = "dead_lettered_by_broker",
        /// A dead letter of which no refusal is remembered, from a time in which more messages were refused than are.
        RefusedInFlood = "refused_in_flood",
    }
}

impl RefusalCode {
    /// Reads the stable text.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.as_str() == text)
    }

    /// Refusals whose message cannot be sent again as it is. Where the sender's own proof is at fault, only the sender can
    /// mend it; a refusal of a redrive says nothing of the sender.
    pub const NOT_REDRIVEN: [Self; 6] = [
        Self::IdentityMissing,
        Self::SignatureInvalid,
        Self::SignatureExpired,
        Self::SignatureAudience,
        Self::RedriveNotAllowed,
        Self::RedriveMismatch,
    ];

    /// Whether the message may be sent again as it is, in its sender's name.
    pub fn can_be_redriven(self) -> bool {
        !Self::NOT_REDRIVEN.contains(&self)
    }
}

words! {
    /// Stable codes of failures: what AWS or the source told us.
    pub FailureCode {
        /// No such source key.
        SourceKeyUnknown = "source_key_unknown",
        /// The source key was deleted.
        SourceKeyDeleted = "source_key_deleted",
        /// The source key is of another kind or length than the KMS key needs.
        SourceKeyWrongKind = "source_key_wrong_kind",
        /// The KMS key holds material already, so the source key must be named.
        SourceKeyRequired = "source_key_required",
        /// The sealed material does not open, or the server's key block does not hold together.
        SourceKeyDamaged = "source_key_damaged",
        /// Several keys on the server have this name.
        SourceKeyAmbiguous = "source_key_ambiguous",
        /// The server does not hold the key as active.
        SourceKeyWrongState = "source_key_wrong_state",
        /// The server does not let the key be used so.
        SourceKeyWrongUsage = "source_key_wrong_usage",
        /// The server keeps the key's bytes to itself.
        SourceKeyNotExportable = "source_key_not_exportable",
        /// The server gives the key wrapped only.
        SourceKeyWrapped = "source_key_wrapped",
        /// The server gives other bytes than the job has chosen.
        SourceKeyChanged = "source_key_changed",
        /// No KMIP server is configured any more.
        DsmNotConfigured = "dsm_not_configured",
        /// The connection is not configured any more.
        DsmConnectionUnknown = "dsm_connection_unknown",
        /// No server of the connection answers.
        DsmUnavailable = "dsm_unavailable",
        /// The server's certificate is not what the settings demand.
        DsmUntrusted = "dsm_untrusted",
        /// The server does not take the client's certificate.
        DsmUnauthenticated = "dsm_unauthenticated",
        /// The server does not give this client the key.
        DsmDenied = "dsm_denied",
        /// The server answers what KMIP does not allow.
        DsmProtocol = "dsm_protocol",
        /// Not material of the kind: larger than any encoding of any key.
        MaterialTooLarge = "material_too_large",
        /// Not material of the kind: raw bytes, and not as many as the kind demands.
        MaterialWrongLength = "material_wrong_length",
        /// Not material of the kind: PEM text.
        MaterialIsPem = "material_is_pem",
        /// Not material of the kind: text that is not one whole PEM block.
        MaterialNotPem = "material_not_pem",
        /// Not material of the kind: base64 text of something.
        MaterialIsBase64 = "material_is_base64",
        /// Not material of the kind: hex text of something.
        MaterialIsHex = "material_is_hex",
        /// Not material of the kind: a JSON Web Key (RFC 7517).
        MaterialIsJwk = "material_is_jwk",
        /// Not material of the kind: PKCS#8 under a password.
        MaterialIsEncrypted = "material_is_encrypted",
        /// Not material of the kind: PKCS#12 or PKCS#7: a container.
        MaterialIsContainer = "material_is_container",
        /// Not material of the kind: a bare `RSAPrivateKey` (RFC 8017).
        MaterialIsPkcs1 = "material_is_pkcs1",
        /// Not material of the kind: a bare `ECPrivateKey` (RFC 5915).
        MaterialIsSec1 = "material_is_sec1",
        /// Not material of the kind: a public key, a certificate or a request for one.
        MaterialIsPublicKey = "material_is_public_key",
        /// Not material of the kind: BER of indefinite length (X.690, 8.1.3.6).
        MaterialIndefiniteLength = "material_indefinite_length",
        /// Not material of the kind: DER with bytes behind it.
        MaterialTrailingBytes = "material_trailing_bytes",
        /// Not material of the kind: DER that ends too early.
        MaterialTruncated = "material_truncated",
        /// Not material of the kind: none of the above, and not PKCS#8.
        MaterialNotPkcs8 = "material_not_pkcs8",
        /// Not material of the kind: PKCS#8 around something that is not the key that it announces.
        MaterialMalformed = "material_malformed",
        /// Not material of the kind: a private key of another algorithm.
        MaterialWrongAlgorithm = "material_wrong_algorithm",
        /// Not material of the kind: a private key on another curve.
        MaterialWrongCurve = "material_wrong_curve",
        /// Not material of the kind: a curve written out in numbers.
        MaterialExplicitCurve = "material_explicit_curve",
        /// Not material of the kind: an EC key that does not say its curve.
        MaterialMissingCurve = "material_missing_curve",
        /// Not material of the kind: an RSA modulus of another size.
        MaterialWrongModulus = "material_wrong_modulus",
        /// Not material of the kind: an RSA key of more than two primes.
        MaterialMultiPrime = "material_multi_prime",
        /// Not material of the kind: a public exponent that is even, or below 3, or above 2^33 - 1.
        MaterialBadExponent = "material_bad_exponent",
        /// Not material of the kind: an EC private key that is no scalar of its curve.
        MaterialScalarOutOfRange = "material_scalar_out_of_range",
        /// Not material of the kind: a public key beside the private key that does not belong to it.
        MaterialForeignPublicKey = "material_foreign_public_key",
        /// Not material of the kind: RSA numbers that do not belong together.
        MaterialInconsistent = "material_inconsistent",
        /// The KMS key holds, or held, other material.
        OtherMaterial = "other_material",
        /// `expect_current_material` does not hold.
        UnexpectedCurrentMaterial = "unexpected_current_material",
        /// AWS knows no such key.
        KeyNotFound = "key_not_found",
        /// Origin is not EXTERNAL.
        KeyNotExternal = "key_not_external",
        /// The key is an AWS managed one.
        KeyNotCustomerManaged = "key_not_customer_managed",
        /// The key is disabled.
        KeyDisabled = "key_disabled",
        /// The key waits for its deletion.
        KeyPendingDeletion = "key_pending_deletion",
        /// The key is in a state that forbids an import.
        KeyInvalidState = "key_invalid_state",
        /// AWS takes no imported material of that kind.
        KeyKindNotSupported = "key_kind_not_supported",
        /// The wrapping algorithm is not allowed for the kind.
        WrappingNotAllowed = "wrapping_not_allowed",
        /// AWS gives ids to materials of symmetric keys only.
        MaterialIdNotAllowed = "material_id_not_allowed",
        /// The KMS key has no material with this id.
        MaterialUnknown = "material_unknown",
        /// The material waits for its rotation.
        MaterialPending = "material_pending",
        /// AWS rotates symmetric keys only.
        RotationNotSupported = "rotation_not_supported",
        /// A replica is rotated by its primary.
        RotationOnReplica = "rotation_on_replica",
        /// The key has never had material.
        NothingToRotate = "nothing_to_rotate",
        /// AWS rotates a key on demand so many times and no more.
        RotationsSpent = "rotations_spent",
        /// The policy wants more time between two rotations.
        RotationTooSoon = "rotation_too_soon",
        /// The key is tied to the material already.
        MaterialNotNew = "material_not_new",
        /// Somebody else's material waits for the rotation.
        PendingForeign = "pending_foreign",
        /// The job's own material waited for the rotation, and is gone.
        PendingLost = "pending_lost",
        /// Somebody rotated the key on before this job could.
        RotationSuperseded = "rotation_superseded",
        /// A replica lives in a Region that is no target.
        ReplicaNotATarget = "replica_not_a_target",
        /// The policy does not allow it for a replica.
        ReplicaNotAllowed = "replica_not_allowed",
        /// The description is not possible for the kind.
        DescriptionNotAllowed = "description_not_allowed",
        /// `valid_to` passed while the job waited.
        ValidToPassed = "valid_to_passed",
        /// IAM, the key policy or a control policy says no.
        AccessDenied = "access_denied",
        /// STS does not let the account's role be assumed.
        RoleNotAssumable = "role_not_assumable",
        /// AWS refuses the import parameters a second time.
        ImportParametersRefused = "import_parameters_refused",
        /// AWS could not unwrap, a second time.
        CiphertextRefused = "ciphertext_refused",
        /// AWS breaks off with a rule of its own.
        AwsRefused = "aws_refused",
        /// AWS answers what its documentation does not allow.
        UnexpectedAnswer = "unexpected_answer",
        /// The deadline passed.
        DeadlineExceeded = "deadline_exceeded",
        /// The deadline passed and what AWS did could not be learnt.
        OutcomeUnknown = "outcome_unknown",
        /// The account or Region is no longer a target.
        TargetRemoved = "target_removed",
        /// The policy no longer allows it.
        Revoked = "revoked",
        /// An operator cancelled it.
        Cancelled = "cancelled",
        /// An operator gave up learning what AWS did.
        Abandoned = "abandoned",
        /// Postgres refuses the outcome's row.
        Unstorable = "unstorable",
    }
}

impl FailureCode {
    /// Reads the stable text.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.as_str() == text)
    }
}

/// Why a job failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Stable, for programs.
    pub code: FailureCode,
    /// What happened and what to do. Never holds key material.
    pub message: String,
    /// Whether AWS may have been changed by this job.
    pub aws_changed: bool,
    /// The digest of the policy that ended it, if one did.
    pub policy: Option<String>,
}

impl Failure {
    /// An operator cancelled the job, and nothing is in doubt.
    pub fn cancelled(aws_changed: bool) -> Self {
        let message = if aws_changed {
            "cancelled by an operator between two steps, when AWS was changed already; the audit trail tells of each"
        } else {
            "cancelled by an operator before anything was changed"
        };
        Self { code: FailureCode::Cancelled, message: message.into(), aws_changed, policy: None }
    }

    /// An operator abandoned the job, whatever is in doubt.
    pub fn abandoned(aws_changed: bool) -> Self {
        let message = if aws_changed {
            "abandoned by an operator before it was learnt what AWS did: look at the key in AWS; keyferry jobs retry settles \
             it with the same material"
        } else {
            "abandoned by an operator before anything was changed"
        };
        Self { code: FailureCode::Abandoned, message: message.into(), aws_changed, policy: None }
    }

    /// An operator abandoned an import that AWS had answered, and that was still to be seen. The id is that of a symmetric
    /// key's material.
    pub fn abandoned_after_answer(key_material_id: Option<&str>) -> Self {
        let id = key_material_id.map(|id| format!(" {id}")).unwrap_or_default();
        let message = format!(
            "abandoned by an operator after AWS had answered that it took the material{id}, and before AWS showed it: look \
             at the key in AWS; keyferry jobs retry settles it with the same material"
        );
        Self { code: FailureCode::Abandoned, message, aws_changed: true, policy: None }
    }
}

/// The result of an import in the flat shape of the original call's answer.
///
/// The body is kept as JSON because its `aws_param` carries AWS's own names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobResult(pub serde_json::Value);
