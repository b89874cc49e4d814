//! A request: parsed once, then always valid.

mod fields;

use super::{KeyArn, Refusal, RefusalCode, WrappingAlgorithm, WrappingKeySpec};
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

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// First import, or reimport of the same material.
    Import,
}

impl Operation {
    /// The operation's name in requests, events and routing keys.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Import => "import",
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
}

/// Whether the material expires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// `KEY_MATERIAL_DOES_NOT_EXPIRE`.
    Never,
    /// `KEY_MATERIAL_EXPIRES`, in whole seconds, the precision that AWS is sent.
    At(OffsetDateTime),
}

/// A valid request to import material.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The idempotency key.
    pub id: RequestId,
    /// The CloudEvents source, else empty; a namespace of ids.
    pub source: String,
    /// What is to be done.
    pub operation: Operation,
    /// The KMS key.
    pub key: KeyRef,
    /// The material.
    pub source_key: SourceKeyRef,
    /// The material's end of life.
    pub expiry: Expiry,
    /// `None`: the strongest for the key.
    pub wrapping_algorithm: Option<WrappingAlgorithm>,
    /// `None`: the strongest.
    pub wrapping_key_spec: Option<WrappingKeySpec>,
    /// Text kept by AWS with the material.
    pub description: Option<String>,
    /// The material id that AWS must hold as current.
    pub expect_current_material: Option<String>,
    /// When the job joins its line.
    pub not_before: Option<OffsetDateTime>,
    /// When it gives up.
    pub deadline: Option<OffsetDateTime>,
    /// A name under which jobs are followed together.
    pub batch: Option<String>,
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

    /// When the job gives up.
    pub fn deadline_from(&self, accepted_at: OffsetDateTime) -> OffsetDateTime {
        let start = self.not_before.map_or(accepted_at, |not_before| not_before.max(accepted_at));
        self.deadline.unwrap_or(start + DEFAULT_PATIENCE)
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
        if let Expiry::At(valid_to) = self.expiry {
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

        let tier = fields.optional_string("source_key_tier")?;
        if let Some(tier) = &tier {
            given.insert("source_key_tier".into(), json!(tier));
        }
        let identifier = fields.optional_string("source_key_identifier")?;
        if let Some(name) = &identifier {
            check("source_key_identifier", is_token(name), "1 to 128 of A-Z a-z 0-9 . _ : -")?;
            given.insert("source_key_identifier".into(), json!(name));
        }
        let source_key = match tier.as_deref() {
            None | Some("local") => SourceKeyRef::Local(identifier),
            Some("dsm") => {
                return Err(Refusal::of(
                    "source_key_tier",
                    RefusalCode::TierNotConfigured,
                    "source_key_tier: dsm is not configured here; use local",
                ));
            }
            Some(_) => {
                let expected = "source_key_tier: expected local or dsm";
                return Err(Refusal::of("source_key_tier", RefusalCode::UnknownTier, expected));
            }
        };

        let expiry = read_expiry(fields, &mut given)?;
        let wrapping_algorithm = named(fields, &mut given, "wrapping_algorithm", WrappingAlgorithm::parse, ALGORITHMS)?;
        let wrapping_key_spec = named(fields, &mut given, "wrapping_key_spec", WrappingKeySpec::parse, SPECS)?;

        let description = fields.optional_string("key_material_description")?;
        if let Some(text) = &description {
            check(
                "key_material_description",
                is_description(text),
                "1 to 200 of A-Z a-z 0-9 : / _ . - and white space",
            )?;
            given.insert("key_material_description".into(), json!(text));
        }
        let expect_current_material = fields.optional_string("expect_current_material")?;
        if let Some(id) = &expect_current_material {
            let is_material_id = id.len() == 64 && id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
            check("expect_current_material", is_material_id, "64 of 0-9 a-f, as AWS shows CurrentKeyMaterialId")?;
            given.insert("expect_current_material".into(), json!(id));
        }
        let not_before = read_time(fields, &mut given, "not_before")?;
        let deadline = read_time(fields, &mut given, "deadline")?;
        let batch = fields.optional_string("batch")?;
        if let Some(name) = &batch {
            check("batch", is_token(name), "1 to 128 of A-Z a-z 0-9 . _ : -")?;
            given.insert("batch".into(), json!(name));
        }
        for name in ["key_material_id", "scope"] {
            if fields.optional_string(name)?.is_some() {
                return Err(not_supported(name, "this version imports a key's only material"));
            }
        }
        if fields.optional_bool("urgent")? == Some(true) {
            return Err(not_supported("urgent", "only a delete may overtake its line"));
        }
        if fields.optional_bool("dry_run")? == Some(true) {
            return Err(not_supported("dry_run", "this version has no dry run"));
        }
        // A map of serde_json is sorted by name.
        let canonical = Value::Object(given).to_string();
        Ok(Self {
            id,
            source,
            operation,
            key,
            source_key,
            expiry,
            wrapping_algorithm,
            wrapping_key_spec,
            description,
            expect_current_material,
            not_before,
            deadline,
            batch,
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
        Some("rotate" | "delete") => Err(not_supported("operation", "this version carries out import only")),
        Some(_) => {
            let expected = "operation: expected import";
            Err(Refusal::of("operation", RefusalCode::UnknownOperation, expected))
        }
    }
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

fn not_supported(field: &str, why: &str) -> Refusal {
    Refusal::of(field, RefusalCode::NotSupported, format!("{field}: {why}"))
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
