//! A request: parsed once, then always valid.

mod fields;

use super::{DsmKeyRef, KeyArn, Refusal, RefusalCode, Scarce, WrappingAlgorithm, WrappingKeySpec};
use fields::Fields;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::fmt;
use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime, UtcOffset};
use uuid::Uuid;

/// Largest message body in bytes.
pub const MAX_BODY_BYTES: usize = 64 * 1024;
/// Content type of a CloudEvents 1.0 structured envelope.
pub const CONTENT_TYPE_CLOUDEVENTS: &str = "application/cloudevents+json";

/// AWS takes at most 365 days from its own now; an hour less bears clock skew and queueing
/// (`ImportKeyMaterial`, `ValidTo`).
const LONGEST_VALIDITY: Duration = Duration::seconds(364 * 86_400 + 23 * 3_600);
const LONGEST_WAIT: Duration = Duration::days(30);
/// How long a job is tried when the request sets no `deadline`.
const DEFAULT_PATIENCE: Duration = Duration::days(3);
/// How long after its start a job may be tried at most.
const LONGEST_PATIENCE: Duration = Duration::days(90);
/// AWS allows 256; the rest is the job's mark.
const LONGEST_DESCRIPTION: usize = 200;

const FIELDS: &[&str] = &[
    "id",
    "operation",
    "key",
    "source_key_tier",
    "source_key_identifier",
    "key_expiration",
    "valid_to",
    "wrapping_algorithm",
    "wrapping_key_spec",
    "key_material_description",
    "key_material_id",
    "scope",
    "expect_current_material",
    "not_before",
    "deadline",
    "batch",
    "urgent",
    "dry_run",
];

/// What only takes who brings material.
const MATERIAL_ONLY: &[&str] = &[
    "source_key_tier",
    "source_key_identifier",
    "key_expiration",
    "valid_to",
    "wrapping_algorithm",
    "wrapping_key_spec",
    "key_material_description",
];

/// What the transport delivered.
#[derive(Clone, Copy, Debug)]
pub struct Envelope<'a> {
    /// The bytes as published.
    pub body: &'a [u8],
    /// The transport's content type.
    pub content_type: Option<&'a str>,
    /// The transport's message id; stands in for a missing `id`.
    pub message_id: Option<&'a str>,
}

/// A message that is no valid request, with what could still be read of it.
#[derive(Clone, Debug)]
pub struct Rejected {
    /// The id, if it is usable.
    pub id: Option<RequestId>,
    /// The CloudEvents source, else empty.
    pub source: String,
    /// The key, if the message names one by ARN.
    pub key: Option<KeyArn>,
    /// Why.
    pub refusal: Refusal,
}

/// An idempotency key: 1 to 128 of `A-Z a-z 0-9 . _ : -`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(String);

impl RequestId {
    /// Reads an id; `None` when it breaks the rule.
    pub fn parse(text: &str) -> Option<Self> {
        is_token(text).then(|| Self(text.to_owned()))
    }

    /// The id's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of what is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// First import, or reimport of the same material.
    Import,
    /// New material comes into force under the same key; what was in force before goes on decrypting.
    Rotate,
    /// Deletion of imported material; the source key stays.
    Delete,
}

impl Operation {
    /// The operation's name in requests, events and routing keys.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Import => "import",
            Self::Rotate => "rotate",
            Self::Delete => "delete",
        }
    }
}

/// What is to be done, with all that it needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// First import, or reimport of the same material.
    Import(Import),
    /// New material, and the rotation to it. Symmetric keys only.
    Rotate(SourceMaterial),
    /// Deletion of imported material.
    Delete(DeleteTarget),
}

impl Work {
    /// The material that it brings; `None`: none.
    pub fn material(&self) -> Option<&SourceMaterial> {
        match self {
            Self::Import(asked) => Some(&asked.material),
            Self::Rotate(asked) => Some(asked),
            Self::Delete(_) => None,
        }
    }

    /// The key on a KMIP server whose material it brings.
    pub fn dsm_key(&self) -> Option<&DsmKeyRef> {
        match &self.material()?.source_key {
            SourceKeyRef::Dsm(key) => Some(key),
            SourceKeyRef::Local(_) => None,
        }
    }
}

/// An import as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    /// What is brought.
    pub material: SourceMaterial,
    /// Which of the key's materials is imported again; `None`: the current one, or the first.
    pub key_material_id: Option<String>,
}

/// Material that is brought, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceMaterial {
    /// The source key.
    pub source_key: SourceKeyRef,
    /// The material's end of life.
    pub expiry: Expiry,
    /// `None`: the strongest for the key.
    pub wrapping_algorithm: Option<WrappingAlgorithm>,
    /// `None`: the strongest.
    pub wrapping_key_spec: Option<WrappingKeySpec>,
    /// Text kept by AWS with the material.
    pub description: Option<String>,
}

/// Which of a key's materials a delete means, in the one Region that the request names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeleteTarget {
    /// The one in force.
    Current,
    /// One by AWS's id.
    Material(String),
    /// The current one and all before it. One that waits for its rotation is not among them.
    All,
}

/// The AWS operation with a scarce quota that a job needs next: the third part of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScarceCall {
    /// 1/s by default.
    GetParametersForImport,
    /// 15/s by default.
    ImportKeyMaterial,
    /// 15/s by default.
    DeleteImportedKeyMaterial,
    /// 5/s by default.
    RotateKeyOnDemand,
    /// 100/s by default.
    ListKeyRotations,
    /// None: only calls with wide quotas.
    Nothing,
}

impl ScarceCall {
    /// Every one.
    pub const ALL: [Self; 6] = [
        Self::GetParametersForImport,
        Self::ImportKeyMaterial,
        Self::DeleteImportedKeyMaterial,
        Self::RotateKeyOnDemand,
        Self::ListKeyRotations,
        Self::Nothing,
    ];

    /// The word in the lane.
    pub fn as_str(self) -> &'static str {
        self.operation().map_or("nothing", Scarce::as_str)
    }

    /// The operation, if any.
    pub fn operation(self) -> Option<Scarce> {
        match self {
            Self::GetParametersForImport => Some(Scarce::GetParametersForImport),
            Self::ImportKeyMaterial => Some(Scarce::ImportKeyMaterial),
            Self::DeleteImportedKeyMaterial => Some(Scarce::DeleteImportedKeyMaterial),
            Self::RotateKeyOnDemand => Some(Scarce::RotateKeyOnDemand),
            Self::ListKeyRotations => Some(Scarce::ListKeyRotations),
            Self::Nothing => None,
        }
    }
}

/// The two names of a KMS key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyRef {
    /// AWS's.
    Arn(KeyArn),
    /// The one that Keyferry gave it.
    Id(Uuid),
}

/// Which source key is imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceKeyRef {
    /// A key of the local store, by name or id; `None`: a new key is generated.
    Local(Option<String>),
    /// A key that a KMIP server holds.
    Dsm(DsmKeyRef),
}

/// Whether the material expires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// `KEY_MATERIAL_DOES_NOT_EXPIRE`.
    Never,
    /// `KEY_MATERIAL_EXPIRES`, in whole seconds, the precision that AWS is sent.
    At(OffsetDateTime),
}

/// A valid request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The idempotency key.
    pub id: RequestId,
    /// The CloudEvents source, else empty; a namespace of ids.
    pub source: String,
    /// The KMS key.
    pub key: KeyRef,
    /// What is to be done.
    pub work: Work,
    /// Every check and no change.
    pub dry_run: bool,
    /// The material id that AWS must hold as current.
    pub expect_current_material: Option<String>,
    /// When the job joins its line.
    pub not_before: Option<OffsetDateTime>,
    /// When it gives up.
    pub deadline: Option<OffsetDateTime>,
    /// A name under which jobs are followed together.
    pub batch: Option<String>,
    /// Overtakes its line; deletes only.
    pub urgent: bool,
    canonical: String,
}

impl Request {
    /// Reads a message. Whether its times fit is for [`Self::judge_times`] to say: a copy of an accepted request is
    /// a duplicate, however late it comes.
    pub fn parse(envelope: Envelope<'_>) -> Result<Self, Box<Rejected>> {
        let mut rejected = Rejected {
            id: envelope.message_id.and_then(RequestId::parse),
            source: String::new(),
            key: None,
            refusal: Refusal::whole(RefusalCode::NotJson, ""),
        };
        Self::read(envelope, &mut rejected).map_err(|refusal| {
            rejected.refusal = refusal;
            Box::new(rejected)
        })
    }

    /// Reads the canonical form that [`Self::canonical`] gave. Times are not judged again.
    pub fn from_canonical(canonical: &str, id: RequestId, source: String) -> Result<Self, Refusal> {
        let mut fields = Fields::read(canonical.as_bytes())?;
        Self::from_fields(&mut fields, id, source)
    }

    /// Only the fields that were given, parsed and printed again: sorted names, no white space, times in
    /// UTC. This is RFC 8785 for the strings and booleans that a request consists of.
    pub fn canonical(&self) -> &str {
        &self.canonical
    }

    /// SHA-256 of the canonical form: two requests are equal when their digests are.
    pub fn digest(&self) -> [u8; 32] {
        Sha256::digest(self.canonical.as_bytes()).into()
    }

    /// The key of the idempotency table within a principal.
    pub fn id_hash(&self) -> [u8; 32] {
        id_hash(&self.source, &self.id)
    }

    /// The name of what is to be done.
    pub fn operation(&self) -> Operation {
        match self.work {
            Work::Import(_) => Operation::Import,
            Work::Rotate(_) => Operation::Rotate,
            Work::Delete(_) => Operation::Delete,
        }
    }

    /// The scarce call that the job needs first.
    pub fn first_call(&self) -> ScarceCall {
        match self.work {
            _ if self.dry_run => ScarceCall::Nothing,
            Work::Import(_) | Work::Rotate(_) => ScarceCall::GetParametersForImport,
            Work::Delete(_) => ScarceCall::DeleteImportedKeyMaterial,
        }
    }

    /// When the job gives up.
    pub fn deadline_from(&self, accepted_at: OffsetDateTime) -> OffsetDateTime {
        let start = self.not_before.map_or(accepted_at, |not_before| not_before.max(accepted_at));
        self.deadline.unwrap_or(start.saturating_add(DEFAULT_PATIENCE))
    }

    /// When a job that does this once more gives up: as long after its start as the former, which is in the store and may be
    /// older than the bound of a deadline.
    pub fn deadline_again(
        &self,
        now: OffsetDateTime,
        accepted_at: OffsetDateTime,
        deadline: OffsetDateTime,
    ) -> OffsetDateTime {
        let start = |at: OffsetDateTime| self.not_before.map_or(at, |not_before| not_before.max(at));
        start(now).saturating_add((deadline - start(accepted_at)).min(LONGEST_PATIENCE))
    }

    /// Whether its times fit at `now`, the store's clock.
    pub fn judge_times(&self, now: OffsetDateTime) -> Result<(), Refusal> {
        let start = self.not_before.unwrap_or(now).max(now);
        if let Some(not_before) = self.not_before
            && not_before - now > LONGEST_WAIT
        {
            return Err(Refusal::of(
                "not_before",
                RefusalCode::InvalidValue,
                "not_before: expected at most 30 days ahead",
            ));
        }
        if let Some(deadline) = self.deadline
            && deadline <= start
        {
            return Err(Refusal::of(
                "deadline",
                RefusalCode::InvalidValue,
                "deadline: expected a time after now and after not_before",
            ));
        }
        if let Some(deadline) = self.deadline
            && deadline - start > LONGEST_PATIENCE
        {
            return Err(Refusal::of(
                "deadline",
                RefusalCode::InvalidValue,
                "deadline: expected at most 90 days after now and after not_before",
            ));
        }
        self.judge_expiry(start)
    }

    /// Whether the material's end of life fits a job that starts then.
    pub fn judge_expiry(&self, start: OffsetDateTime) -> Result<(), Refusal> {
        if let Some(SourceMaterial { expiry: Expiry::At(valid_to), .. }) = self.work.material() {
            let valid_to = *valid_to;
            if valid_to <= start {
                let message = "valid_to: expected a time in the future, after not_before";
                return Err(Refusal::of("valid_to", RefusalCode::ValidToPast, message));
            }
            if valid_to - start > LONGEST_VALIDITY {
                let message = "valid_to: expected at most 364 days and 23 hours ahead, AWS takes no more";
                return Err(Refusal::of("valid_to", RefusalCode::ValidToTooFar, message));
            }
        }
        Ok(())
    }

    fn read(envelope: Envelope<'_>, seen: &mut Rejected) -> Result<Self, Refusal> {
        let mut fields = open_envelope(envelope, seen)?;
        // What can be read is kept for the refusal's row and event, whatever else is wrong.
        if let Some(KeyRef::Arn(arn)) = fields.peek("key").and_then(|text| key_ref(text).ok()) {
            seen.key = Some(arn);
        }
        if let Some(text) = fields.optional_string("id")? {
            seen.id = Some(RequestId::parse(&text).ok_or_else(|| {
                Refusal::of("id", RefusalCode::InvalidValue, "id: expected 1 to 128 of A-Z a-z 0-9 . _ : -")
            })?);
        }
        let id = seen.id.clone().ok_or_else(|| {
            Refusal::of(
                "id",
                RefusalCode::MissingField,
                "id: required, as a field, as the CloudEvents id or as the AMQP message_id \
                 (1 to 128 of A-Z a-z 0-9 . _ : -)",
            )
        })?;
        Self::from_fields(&mut fields, id, seen.source.clone())
    }

    fn from_fields(fields: &mut Fields, id: RequestId, source: String) -> Result<Self, Refusal> {
        fields.only(FIELDS)?;
        let mut given = Map::new();
        let operation = read_operation(fields, &mut given)?;
        let key = fields.required_string("key")?;
        let key = key_ref(&key).map_err(|expected| {
            Refusal::of(
                "key",
                RefusalCode::InvalidArn,
                format!("key: {expected}, or the id that Keyferry gave the key"),
            )
        })?;
        given.insert("key".into(), json!(key.to_string()));

        let work = match operation {
            Operation::Import => Work::Import(read_import(fields, &mut given)?),
            Operation::Rotate => Work::Rotate(read_rotation(fields, &mut given)?),
            Operation::Delete => Work::Delete(read_delete_target(fields, &mut given)?),
        };
        let expect_current_material = read_material_id(fields, &mut given, "expect_current_material")?;
        let not_before = read_time(fields, &mut given, "not_before")?;
        let deadline = read_time(fields, &mut given, "deadline")?;
        let batch = fields.optional_string("batch")?;
        if let Some(name) = &batch {
            check("batch", is_token(name), "1 to 128 of A-Z a-z 0-9 . _ : -")?;
            given.insert("batch".into(), json!(name));
        }
        let urgent = fields.optional_bool("urgent")?.unwrap_or(false);
        if urgent {
            if operation != Operation::Delete {
                let advice = "urgent: only a delete overtakes its line; what brings material waits for its turn";
                return Err(Refusal::of("urgent", RefusalCode::FieldNotAllowed, advice));
            }
            given.insert("urgent".into(), json!(true));
        }
        let dry_run = fields.optional_bool("dry_run")?.unwrap_or(false);
        if dry_run {
            given.insert("dry_run".into(), json!(true));
        }
        // A map of serde_json is sorted by name.
        let canonical = Value::Object(given).to_string();
        Ok(Self {
            id,
            source,
            key,
            work,
            dry_run,
            expect_current_material,
            not_before,
            deadline,
            batch,
            urgent,
            canonical,
        })
    }
}

impl fmt::Display for KeyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Arn(arn) => arn.fmt(f),
            Self::Id(id) => id.fmt(f),
        }
    }
}

const ALGORITHMS: &str = "RSAES_OAEP_SHA_256, RSAES_OAEP_SHA_1, RSA_AES_KEY_WRAP_SHA_256 or RSA_AES_KEY_WRAP_SHA_1";
const SPECS: &str = "RSA_2048, RSA_3072 or RSA_4096";

/// The key of the idempotency table within a principal, for an id that is usable.
pub fn id_hash(source: &str, id: &RequestId) -> [u8; 32] {
    // A source cannot hold NUL, so the two parts cannot run into each other.
    let mut hash = Sha256::new();
    hash.update(source.as_bytes());
    hash.update([0]);
    hash.update(id.as_str().as_bytes());
    hash.finalize().into()
}

/// Unwraps a CloudEvents envelope, or takes the body as it is.
fn open_envelope(envelope: Envelope<'_>, seen: &mut Rejected) -> Result<Fields, Refusal> {
    let Envelope { body, content_type, .. } = envelope;
    if body.len() > MAX_BODY_BYTES {
        return Err(Refusal::whole(RefusalCode::BodyTooLarge, "the message is larger than 64 KiB"));
    }
    let fields = Fields::read(body)?;
    let media_type = content_type.and_then(|text| text.split(';').next()).unwrap_or("").trim();
    if !media_type.eq_ignore_ascii_case(CONTENT_TYPE_CLOUDEVENTS) {
        return Ok(fields);
    }
    let mut outer = fields;
    let invalid = |field: &str, expected: &str| {
        Refusal::of(field, RefusalCode::InvalidEnvelope, format!("CloudEvents {field}: expected {expected}"))
    };
    if outer.peek("specversion") != Some("1.0") {
        return Err(invalid("specversion", "\"1.0\""));
    }
    for name in ["source", "type", "id"] {
        if outer.peek(name).is_none_or(str::is_empty) {
            return Err(invalid(name, "a string that is not empty"));
        }
    }
    let source = outer.optional_string("source")?.unwrap_or_default();
    if source.len() > 512 {
        return Err(invalid("source", "at most 512 bytes"));
    }
    seen.source = source;
    // The envelope's id stands in for a missing one in the data; it need not fit our rule if that has one.
    seen.id = outer.optional_string("id")?.as_deref().and_then(RequestId::parse);
    if outer.has("data_base64") {
        return Err(invalid("data", "JSON, not data_base64"));
    }
    outer.object("data").ok_or_else(|| invalid("data", "a JSON object"))
}

fn read_operation(fields: &mut Fields, given: &mut Map<String, Value>) -> Result<Operation, Refusal> {
    match fields.optional_string("operation")?.as_deref() {
        None => Ok(Operation::Import),
        Some("import") => {
            given.insert("operation".into(), json!("import"));
            Ok(Operation::Import)
        }
        Some("delete") => {
            given.insert("operation".into(), json!("delete"));
            Ok(Operation::Delete)
        }
        Some("rotate") => {
            given.insert("operation".into(), json!("rotate"));
            Ok(Operation::Rotate)
        }
        Some(_) => {
            let expected = "operation: expected import, rotate or delete";
            Err(Refusal::of("operation", RefusalCode::UnknownOperation, expected))
        }
    }
}

fn read_import(fields: &mut Fields, given: &mut Map<String, Value>) -> Result<Import, Refusal> {
    if fields.has("scope") {
        let advice = "scope: an import brings one material; name another than the current one by key_material_id";
        return Err(Refusal::of("scope", RefusalCode::FieldNotAllowed, advice));
    }
    let key_material_id = read_material_id(fields, given, "key_material_id")?;
    Ok(Import { material: read_material(fields, given)?, key_material_id })
}

/// A rotate brings new material: none that the key has could be meant.
fn read_rotation(fields: &mut Fields, given: &mut Map<String, Value>) -> Result<SourceMaterial, Refusal> {
    if let Some(name) = ["key_material_id", "scope"].into_iter().find(|name| fields.has(name)) {
        let message = format!("{name}: a rotate brings new material, to which AWS gives an id; leave it out");
        return Err(Refusal::of(name, RefusalCode::FieldNotAllowed, message));
    }
    read_material(fields, given)
}

fn read_material(fields: &mut Fields, given: &mut Map<String, Value>) -> Result<SourceMaterial, Refusal> {
    let source_key = read_source_key(fields, given)?;
    let expiry = read_expiry(fields, given)?;
    let wrapping_algorithm = named(fields, given, "wrapping_algorithm", WrappingAlgorithm::parse, ALGORITHMS)?;
    let wrapping_key_spec = named(fields, given, "wrapping_key_spec", WrappingKeySpec::parse, SPECS)?;
    let description = fields.optional_string("key_material_description")?;
    if let Some(text) = &description {
        let expected = "1 to 200 of A-Z a-z 0-9 : / _ . - and white space";
        check("key_material_description", is_description(text), expected)?;
        given.insert("key_material_description".into(), json!(text));
    }
    Ok(SourceMaterial { source_key, expiry, wrapping_algorithm, wrapping_key_spec, description })
}

fn read_source_key(fields: &mut Fields, given: &mut Map<String, Value>) -> Result<SourceKeyRef, Refusal> {
    let tier = fields.optional_string("source_key_tier")?;
    if let Some(tier) = &tier {
        given.insert("source_key_tier".into(), json!(tier));
    }
    let identifier = fields.optional_string("source_key_identifier")?;
    if let Some(name) = &identifier {
        given.insert("source_key_identifier".into(), json!(name));
    }
    match tier.as_deref() {
        None | Some("local") => {
            let is_name = identifier.as_deref().is_none_or(is_token);
            check("source_key_identifier", is_name, "1 to 128 of A-Z a-z 0-9 . _ : -")?;
            Ok(SourceKeyRef::Local(identifier))
        }
        Some("dsm") => {
            let field = "source_key_identifier";
            let Some(key) = identifier else {
                let message = "source_key_identifier: required for the tier dsm, which generates no keys";
                return Err(Refusal::of(field, RefusalCode::MissingField, message));
            };
            let invalid = |expected| Refusal::of(field, RefusalCode::InvalidValue, format!("{field}: {expected}"));
            DsmKeyRef::parse(&key).map(SourceKeyRef::Dsm).map_err(invalid)
        }
        Some(_) => {
            let expected = "source_key_tier: expected local or dsm";
            Err(Refusal::of("source_key_tier", RefusalCode::UnknownTier, expected))
        }
    }
}

/// A delete takes nothing that is about the material's source or its way to AWS.
fn read_delete_target(fields: &mut Fields, given: &mut Map<String, Value>) -> Result<DeleteTarget, Refusal> {
    if let Some(name) = MATERIAL_ONLY.iter().find(|name| fields.has(name)) {
        let message = format!("{name}: a delete takes no such field; leave it out");
        return Err(Refusal::of(name, RefusalCode::FieldNotAllowed, message));
    }
    let material = read_material_id(fields, given, "key_material_id")?;
    let scope = fields.optional_string("scope")?;
    if let Some(scope) = &scope {
        check("scope", matches!(scope.as_str(), "current" | "all"), "current or all")?;
        given.insert("scope".into(), json!(scope));
    }
    match (material, scope.as_deref()) {
        (Some(_), Some(_)) => {
            let message = "scope: key_material_id says already which material is meant; leave one of the two out";
            Err(Refusal::of("scope", RefusalCode::FieldNotAllowed, message))
        }
        (Some(id), None) => Ok(DeleteTarget::Material(id)),
        (None, Some("all")) => Ok(DeleteTarget::All),
        (None, _) => Ok(DeleteTarget::Current),
    }
}

/// AWS's `KeyMaterialId` is 64 of `a-f 0-9`.
fn read_material_id(
    fields: &mut Fields,
    given: &mut Map<String, Value>,
    name: &str,
) -> Result<Option<String>, Refusal> {
    let Some(id) = fields.optional_string(name)? else { return Ok(None) };
    let is_material_id = id.len() == 64 && id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    check(name, is_material_id, "64 of 0-9 a-f, as AWS shows KeyMaterialId")?;
    given.insert(name.to_owned(), json!(id));
    Ok(Some(id))
}

fn read_expiry(fields: &mut Fields, given: &mut Map<String, Value>) -> Result<Expiry, Refusal> {
    let expires = fields.optional_bool("key_expiration")?;
    if let Some(expires) = expires {
        given.insert("key_expiration".into(), json!(expires));
    }
    let valid_to = read_time(fields, given, "valid_to")?;
    match (expires.unwrap_or(false), valid_to) {
        (false, None) => Ok(Expiry::Never),
        (true, Some(at)) => Ok(Expiry::At(at.replace_nanosecond(0).unwrap_or(at))),
        (true, None) => {
            Err(Refusal::of("valid_to", RefusalCode::ValidToMissing, "valid_to: required when key_expiration is true"))
        }
        (false, Some(_)) => Err(Refusal::of(
            "key_expiration",
            RefusalCode::ValidToWithoutExpiration,
            "key_expiration: expected true when valid_to is given",
        )),
    }
}

fn read_time(
    fields: &mut Fields,
    given: &mut Map<String, Value>,
    name: &str,
) -> Result<Option<OffsetDateTime>, Refusal> {
    let Some(text) = fields.optional_string(name)? else { return Ok(None) };
    let expected = || {
        Refusal::of(name, RefusalCode::InvalidValue, format!("{name}: expected RFC 3339, such as 2027-01-31T12:00:00Z"))
    };
    let at = OffsetDateTime::parse(&text, &Rfc3339).map_err(|_| expected())?;
    let at = at.checked_to_offset(UtcOffset::UTC).ok_or_else(expected)?;
    let printed = at.format(&Rfc3339).map_err(|_| expected())?;
    given.insert(name.into(), json!(printed));
    Ok(Some(at))
}

fn named<T>(
    fields: &mut Fields,
    given: &mut Map<String, Value>,
    name: &str,
    parse: impl Fn(&str) -> Option<T>,
    expected: &str,
) -> Result<Option<T>, Refusal> {
    let Some(text) = fields.optional_string(name)? else { return Ok(None) };
    let value = parse(&text)
        .ok_or_else(|| Refusal::of(name, RefusalCode::InvalidValue, format!("{name}: expected {expected}")))?;
    given.insert(name.into(), json!(text));
    Ok(Some(value))
}

fn key_ref(text: &str) -> Result<KeyRef, &'static str> {
    match Uuid::try_parse(text) {
        Ok(id) => Ok(KeyRef::Id(id)),
        Err(_) => KeyArn::parse(text).map(KeyRef::Arn),
    }
}

fn check(field: &str, holds: bool, expected: &str) -> Result<(), Refusal> {
    if holds {
        Ok(())
    } else {
        Err(Refusal::of(field, RefusalCode::InvalidValue, format!("{field}: expected {expected}")))
    }
}

fn is_token(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b':' | b'-'))
}

/// AWS's pattern for `KeyMaterialDescription` is `^[a-zA-Z0-9:/_\s.-]+$`.
fn is_description(text: &str) -> bool {
    (1..=LONGEST_DESCRIPTION).contains(&text.len())
        && text.bytes().all(|b| {
            b.is_ascii_alphanumeric() || matches!(b, b':' | b'/' | b'_' | b'.' | b'-' | b' ' | b'\t' | b'\n' | b'\r')
        })
}

#[cfg(test)]
mod tests;
