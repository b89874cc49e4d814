//! The operations, each one function over the locked state.
//!
//! An operation that needs a private key's work stops and says so; the engine performs it outside the lock and runs the
//! operation again from the start, against whatever the state has become in the meantime.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::crypto::{self, Opened, Plain, Sealed, Unopened};
use crate::journal::Effect;
use crate::keys::{Family, Key};
use crate::kinds::{KeySpec, KeyState, KeyUsage, Millis, Operation, Origin, Role, SigningAlgorithm, epoch_seconds};
use crate::materials::{Contents, Material};
use crate::metadata::metadata;
use crate::pairs::Pair;
use crate::refusal::{self, Refusal};
use crate::request::{self, choice, number, parse, required};
use crate::world::{Call, State};
use crate::{crypto_ops, import_ops, pair_ops, rotation_ops, sts_ops};

/// What an operation works on besides the state.
pub struct Work<'a> {
    /// The call.
    pub call: &'a Call,
    /// The time.
    pub now: Millis,
    /// Whether first imports stay wrapped.
    pub lazy: bool,
    /// Whether `DescribeKey` shall answer with old knowledge.
    pub outdated: bool,
    /// The material that came with the call, once it has been unwrapped.
    pub offered: Option<Result<Opened, Unopened>>,
    /// The signature that the call asks for, once it has been made.
    pub signature: Option<Result<Vec<u8>, Unopened>>,
}

/// A finished operation.
pub struct Done {
    /// The answer.
    pub body: Value,
    /// What it changed.
    pub effect: Option<Effect>,
    /// The key, where the call does not name it.
    pub key_arn: Option<Arc<str>>,
}

/// Why an operation has not finished.
pub enum Halt {
    /// KMS says no.
    Refused(Refusal),
    /// Something must be done outside the lock first.
    First(Errand),
}

/// Work for a private key.
pub enum Errand {
    /// Material is to be unwrapped.
    Unwrap(Vec<Job>),
    /// A message is to be signed.
    Sign(Arc<Pair>, SigningAlgorithm, Vec<u8>),
}

/// One thing to unwrap.
pub struct Job {
    /// The key whose stored material it is; absent for the material that came with the call.
    pub key_arn: Option<Arc<str>>,
    /// What kind of material it should be.
    pub spec: KeySpec,
    /// The wrapped material.
    pub sealed: Arc<Sealed>,
}

impl Job {
    /// All that is left to unwrap of a key's materials.
    pub fn all_of(key: &Key) -> Vec<Self> {
        let job = |sealed| Self { key_arn: Some(Arc::clone(&key.arn)), spec: key.spec, sealed: Arc::clone(sealed) };
        key.sealed().map(job).collect()
    }
}

impl From<Refusal> for Halt {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<Value> for Done {
    fn from(body: Value) -> Self {
        Self { body, effect: None, key_arn: None }
    }
}

impl Done {
    /// An answer together with what has been changed.
    pub fn with(body: Value, effect: Effect) -> Self {
        Self { body, effect: Some(effect), key_arn: None }
    }
}

impl Work<'_> {
    /// The ARN of the key that the call names.
    pub fn key_arn(&self, key_id: Option<&str>) -> Result<String, Refusal> {
        let key_id = required(key_id, "keyId")?;
        let arn = request::key_arn(key_id, &self.call.principal.account, &self.call.region)?;
        // Another Region's keys do not exist here; the text for an ARN, rather than an id, is UNVERIFIED.
        if arn.split(':').nth(3) != Some(&self.call.region) {
            return Err(refusal::not_found(&arn));
        }
        // Key policies here let in nobody but the key's own account.
        if arn.split(':').nth(4) != Some(&self.call.principal.account) {
            return Err(refusal::not_authorised(self.call.principal.arn(), self.call.operation.name(), &arn));
        }
        Ok(arn)
    }
}

/// Runs a call against the state.
pub fn apply(state: &mut State, work: &mut Work<'_>) -> Result<Done, Halt> {
    match work.call.operation {
        Operation::CreateKey => create_key(state, work),
        Operation::DescribeKey => describe_key(state, work),
        Operation::GetParametersForImport => import_ops::get_parameters_for_import(state, work),
        Operation::ImportKeyMaterial => import_ops::import_key_material(state, work),
        Operation::DeleteImportedKeyMaterial => import_ops::delete_imported_key_material(state, work),
        Operation::ListKeyRotations => rotation_ops::list_key_rotations(state, work),
        Operation::RotateKeyOnDemand => rotation_ops::rotate_key_on_demand(state, work),
        Operation::GetKeyRotationStatus => rotation_ops::get_key_rotation_status(state, work),
        Operation::GetPublicKey => pair_ops::get_public_key(state, work),
        Operation::ScheduleKeyDeletion => schedule_key_deletion(state, work),
        Operation::CancelKeyDeletion => cancel_key_deletion(state, work),
        Operation::EnableKey => set_disabled(state, work, false),
        Operation::DisableKey => set_disabled(state, work, true),
        Operation::ListKeys => list_keys(state, work),
        Operation::Encrypt => crypto_ops::encrypt(state, work),
        Operation::Decrypt => crypto_ops::decrypt(state, work),
        Operation::GenerateMac => crypto_ops::generate_mac(state, work),
        Operation::VerifyMac => crypto_ops::verify_mac(state, work),
        Operation::Sign => pair_ops::sign(state, work),
        Operation::Verify => pair_ops::verify(state, work),
        Operation::ListResourceTags => list_resource_tags(state, work),
        Operation::GetKeyPolicy => get_key_policy(state, work),
        Operation::ListAliases => Ok(json!({ "Aliases": [], "Truncated": false }).into()),
        Operation::AssumeRole => sts_ops::assume_role(state, work),
        Operation::GetCallerIdentity => Ok(sts_ops::get_caller_identity(work)),
    }
}

/// What a new key is made of, but for its identity.
pub struct NewKey {
    /// Kind.
    pub spec: KeySpec,
    /// Use.
    pub usage: KeyUsage,
    /// Origin.
    pub origin: Origin,
    /// Text.
    pub description: String,
    /// Whether it is a multi-Region primary.
    pub multi_region: bool,
    /// Tags.
    pub tags: Vec<(String, String)>,
}

/// Makes a key. One whose material is KMS's own gets random bytes at once, unless it is a pair.
pub fn new_key(new: NewKey, account: &Arc<str>, region: &Arc<str>, now: Millis) -> Result<Key, Refusal> {
    let id = if new.multi_region {
        format!("mrk-{}", uuid::Uuid::new_v4().simple())
    } else {
        uuid::Uuid::new_v4().to_string()
    };
    let mut key = Key {
        arn: request::new_arn(&id, account, region).into(),
        account: Arc::clone(account),
        region: Arc::clone(region),
        spec: new.spec,
        usage: new.usage,
        origin: new.origin,
        description: new.description,
        family: if new.multi_region { Family::Primary { replicas: Vec::new() } } else { Family::Single },
        created_at: now,
        tags: new.tags,
        materials: Vec::new(),
        disabled: false,
        deletion_at: None,
        turning: None,
        before: None,
    };
    if let (Origin::AwsKms, Some(length)) = (key.origin, key.spec.material_length(region)) {
        let random: [u8; 64] = crypto::random().map_err(|Unopened| internal("no random bytes"))?;
        let bytes = Plain::new(random.iter().copied().take(length).collect());
        let id = crypto::sha256(&[id.as_bytes(), &bytes]);
        key.materials.push(Material::new(id, Role::Current, Contents::of(Opened { bytes, pair: None })));
    }
    Ok(key)
}

/// A failure of the double itself.
pub fn internal(message: &str) -> Refusal {
    Refusal { status: 500, code: "KMSInternalException".into(), message: message.to_owned() }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct KeyOnly {
    key_id: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Tag {
    tag_key: String,
    tag_value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct CreateKey {
    description: Option<String>,
    key_usage: Option<String>,
    key_spec: Option<String>,
    customer_master_key_spec: Option<String>,
    origin: Option<String>,
    multi_region: Option<bool>,
    #[serde(default)]
    tags: Vec<Tag>,
}

fn create_key(state: &mut State, work: &Work<'_>) -> Result<Done, Halt> {
    let request: CreateKey = parse(&work.call.body)?;
    let spec = choice(request.key_spec.as_deref().or(request.customer_master_key_spec.as_deref()), "keySpec")?
        .unwrap_or(KeySpec::SymmetricDefault);
    let origin = choice(request.origin.as_deref(), "origin")?.unwrap_or(Origin::AwsKms);
    let usage = choice(request.key_usage.as_deref(), "keyUsage")?;
    let usage = match usage {
        Some(usage) if spec.usages().contains(&usage) => usage,
        // AWS assumes encryption where nothing is said, which suits symmetric keys alone. UNVERIFIED texts.
        None if spec == KeySpec::SymmetricDefault => KeyUsage::EncryptDecrypt,
        None => {
            return Err(refusal::validation("You must specify a KeyUsage value for this KeySpec.").into());
        }
        Some(usage) => {
            let text = format!("KeyUsage {} is not compatible with KeySpec {}", usage.name(), spec.name());
            return Err(refusal::validation(text).into());
        }
    };
    let new = NewKey {
        spec,
        usage,
        origin,
        description: request.description.unwrap_or_default(),
        multi_region: request.multi_region.unwrap_or(false),
        tags: request.tags.into_iter().map(|tag| (tag.tag_key, tag.tag_value)).collect(),
    };
    let key = new_key(new, &work.call.principal.account, &work.call.region, work.now)?;
    let mut body = metadata(&key, &key.view());
    let arn = Arc::clone(&key.arn);
    state.keys.insert(key);
    add_configuration(&mut body, state, &arn, work.now);
    let body = json!({ "KeyMetadata": body });
    Ok(Done { body, effect: Some(Effect::Created), key_arn: Some(arn) })
}

fn describe_key(state: &mut State, work: &Work<'_>) -> Result<Done, Halt> {
    let lag = if work.outdated { Millis::MAX } else { state.options.change_lag_ms };
    let key = named_key(state, work)?;
    let mut body = match key.outdated(work.now, lag) {
        Some(shown) => metadata(key, &shown.view),
        None => metadata(key, &key.view()),
    };
    let arn = Arc::clone(&key.arn);
    add_configuration(&mut body, state, &arn, work.now);
    Ok(json!({ "KeyMetadata": body }).into())
}

fn add_configuration(body: &mut Value, state: &State, arn: &str, now: Millis) {
    if let Some(configuration) = state.keys.configuration(arn, now) {
        body["MultiRegionConfiguration"] = configuration;
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ScheduleKeyDeletion {
    pending_window_in_days: Option<i64>,
}

fn schedule_key_deletion(state: &mut State, work: &Work<'_>) -> Result<Done, Halt> {
    let request: ScheduleKeyDeletion = parse(&work.call.body)?;
    let days = number(request.pending_window_in_days, "pendingWindowInDays", 7, 30, 30)?;
    let key = named_key(state, work)?;
    let at = key.schedule_deletion(work.now, days)?;
    let body = json!({
        "KeyId": &*key.arn,
        "DeletionDate": epoch_seconds(at),
        "KeyState": KeyState::PendingDeletion.name(),
        "PendingWindowInDays": days,
    });
    Ok(Done::with(body, Effect::State(KeyState::PendingDeletion.name())))
}

fn cancel_key_deletion(state: &mut State, work: &Work<'_>) -> Result<Done, Halt> {
    let key = named_key(state, work)?;
    key.cancel_deletion(work.now)?;
    Ok(Done::with(json!({ "KeyId": &*key.arn }), Effect::State(key.state().name())))
}

fn set_disabled(state: &mut State, work: &Work<'_>, disabled: bool) -> Result<Done, Halt> {
    let key = named_key(state, work)?;
    key.set_disabled(work.now, disabled)?;
    Ok(Done::with(json!({}), Effect::State(key.state().name())))
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Page {
    limit: Option<i64>,
    marker: Option<String>,
}

fn list_keys(state: &mut State, work: &Work<'_>) -> Result<Done, Halt> {
    let page: Page = parse(&work.call.body)?;
    let limit = usize::try_from(number(page.limit, "limit", 1, 1_000, 100)?).unwrap_or(100);
    let (account, region) = (&work.call.principal.account, &work.call.region);
    let keys = state.keys.list(work.now, |key| {
        key.account == *account
            && key.region == *region
            && key.is_known(work.now, state.options.creation_lag_ms)
            && page.marker.as_deref().is_none_or(|marker| &*key.arn > marker)
    });
    let truncated = keys.len() > limit;
    let keys = keys.get(..limit.min(keys.len())).unwrap_or_default();
    let mut body = json!({
        "Keys": keys.iter().map(|key| json!({ "KeyId": key.id(), "KeyArn": &*key.arn })).collect::<Vec<_>>(),
        "Truncated": truncated,
    });
    if let Some(last) = keys.last().filter(|_| truncated) {
        body["NextMarker"] = json!(&*last.arn);
    }
    Ok(body.into())
}

fn list_resource_tags(state: &mut State, work: &Work<'_>) -> Result<Done, Halt> {
    let key = named_key(state, work)?;
    let tags: Vec<_> = key.tags.iter().map(|(name, value)| json!({ "TagKey": name, "TagValue": value })).collect();
    Ok(json!({ "Tags": tags, "Truncated": false }).into())
}

fn get_key_policy(state: &mut State, work: &Work<'_>) -> Result<Done, Halt> {
    let key = named_key(state, work)?;
    let policy = json!({
        "Version": "2012-10-17",
        "Statement": [{
            "Effect": "Allow",
            "Principal": { "AWS": format!("arn:aws:iam::{}:root", key.account) },
            "Action": "kms:*",
            "Resource": "*",
        }],
    });
    Ok(json!({ "Policy": policy.to_string(), "PolicyName": "default" }).into())
}

/// The key that the call's `KeyId` names.
pub fn named_key<'a>(state: &'a mut State, work: &Work<'_>) -> Result<&'a mut Key, Refusal> {
    let request: KeyOnly = parse(&work.call.body)?;
    let arn = work.key_arn(request.key_id.as_deref())?;
    known_key(state, work, &arn)
}

/// The key behind an ARN.
pub fn known_key<'a>(state: &'a mut State, work: &Work<'_>, arn: &str) -> Result<&'a mut Key, Refusal> {
    state.keys.known(arn, work.now, state.options.creation_lag_ms, &mut state.journal)
}
