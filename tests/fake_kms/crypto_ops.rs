//! Operations that use a key, which prove what material is in force.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::json;

use crate::crypto::{self, Plain, Unopened};
use crate::keys::Key;
use crate::kinds::{KeySpec, KeyUsage, MacAlgorithm};
use crate::materials::{Material, MaterialId};
use crate::operations::{Done, Errand, Halt, Job, Work, internal, known_key};
use crate::refusal::{self, Refusal};
use crate::request::{Blob, blob, choice, parse, required};
use crate::world::State;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Encrypt {
    key_id: Option<String>,
    plaintext: Option<Blob>,
    #[serde(default)]
    encryption_context: BTreeMap<String, String>,
}

/// `Encrypt`, in the layout that [`crate::crypto`] documents.
pub fn encrypt(state: &mut State, work: &Work<'_>) -> Result<Done, Halt> {
    let request: Encrypt = parse(&work.call.body)?;
    let plaintext = blob(request.plaintext, "plaintext", 4_096)?;
    refuse_context(&request.encryption_context)?;
    let arn = work.key_arn(request.key_id.as_deref())?;
    let key = usable_key(state, work, &arn)?;
    check_usage(key, KeyUsage::EncryptDecrypt)?;
    let (id, bytes) = bytes_of(key, key.current())?;
    let ciphertext = crypto::encrypt(bytes, id, &plaintext).map_err(|Unopened| internal("encryption failed"))?;
    Ok(json!({
        "CiphertextBlob": BASE64.encode(ciphertext),
        "KeyId": arn,
        "EncryptionAlgorithm": "SYMMETRIC_DEFAULT",
    })
    .into())
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Decrypt {
    key_id: Option<String>,
    ciphertext_blob: Option<Blob>,
    #[serde(default)]
    encryption_context: BTreeMap<String, String>,
}

/// `Decrypt`. Without a `KeyId` the key is found by the material's id within the ciphertext.
pub fn decrypt(state: &mut State, work: &Work<'_>) -> Result<Done, Halt> {
    let request: Decrypt = parse(&work.call.body)?;
    let ciphertext = blob(request.ciphertext_blob, "ciphertextBlob", 6_144)?;
    refuse_context(&request.encryption_context)?;
    let id = crypto::material_id_of(&ciphertext).ok_or_else(|| refusal::invalid_ciphertext(""))?;
    let (account, region) = (&work.call.principal.account, &work.call.region);
    let arn = match request.key_id.as_deref() {
        Some(key_id) => work.key_arn(Some(key_id))?,
        None => state
            .keys
            .list(work.now, |key| {
                key.account == *account
                    && key.region == *region
                    && key.is_known(work.now, state.options.creation_lag_ms)
                    && material(key, &id).is_some()
            })
            .first()
            .map(|key| key.arn.to_string())
            .ok_or_else(|| refusal::invalid_ciphertext(""))?,
    };
    let key = usable_key(state, work, &arn)?;
    check_usage(key, KeyUsage::EncryptDecrypt)?;
    let Some(material) = material(key, &id) else {
        let text = "The key ID in the request does not identify a CMK that can perform this operation.";
        return Err(Refusal::new("IncorrectKeyException", text).into());
    };
    let (id, bytes) = bytes_of(key, Some(material))?;
    let plaintext = crypto::decrypt(bytes, &ciphertext).map_err(|Unopened| refusal::invalid_ciphertext(""))?;
    let mut done = Done::from(json!({
        "KeyId": arn,
        "Plaintext": BASE64.encode(&*plaintext),
        "EncryptionAlgorithm": "SYMMETRIC_DEFAULT",
        "KeyMaterialId": hex::encode(id),
    }));
    done.key_arn = Some(Arc::clone(&key.arn));
    Ok(done)
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct MacRequest {
    key_id: Option<String>,
    message: Option<Blob>,
    mac_algorithm: Option<String>,
    mac: Option<Blob>,
}

/// `GenerateMac`.
pub fn generate_mac(state: &mut State, work: &Work<'_>) -> Result<Done, Halt> {
    let request: MacRequest = parse(&work.call.body)?;
    let (arn, algorithm, bytes, message) = mac_key(state, work, request)?;
    Ok(json!({
        "Mac": BASE64.encode(crypto::mac(algorithm, bytes, &message)),
        "MacAlgorithm": algorithm.name(),
        "KeyId": arn,
    })
    .into())
}

/// `VerifyMac`.
pub fn verify_mac(state: &mut State, work: &Work<'_>) -> Result<Done, Halt> {
    let request: MacRequest = parse(&work.call.body)?;
    let tag = blob(request.mac.clone(), "mac", 6_144)?;
    let (arn, algorithm, bytes, message) = mac_key(state, work, request)?;
    if !crypto::mac_is_valid(algorithm, bytes, &message, &tag) {
        return Err(Refusal::new("KMSInvalidMacException", "").into());
    }
    Ok(json!({ "MacValid": true, "MacAlgorithm": algorithm.name(), "KeyId": arn }).into())
}

fn mac_key<'a>(
    state: &'a mut State,
    work: &Work<'_>,
    request: MacRequest,
) -> Result<(String, MacAlgorithm, &'a Plain, Vec<u8>), Halt> {
    let message = blob(request.message, "message", 4_096)?;
    let algorithm = required(choice(request.mac_algorithm.as_deref(), "macAlgorithm")?, "macAlgorithm")?;
    let arn = work.key_arn(request.key_id.as_deref())?;
    let key = usable_key(state, work, &arn)?;
    check_usage(key, KeyUsage::GenerateVerifyMac)?;
    if key.spec.mac() != Some(algorithm) {
        return Err(refusal::wrong_algorithm(algorithm.name(), key.spec.name()).into());
    }
    let (_, bytes) = bytes_of(key, key.current())?;
    Ok((arn, algorithm, bytes, message))
}

/// A key in a state to be used, with nothing sealed in it.
fn usable_key<'a>(state: &'a mut State, work: &Work<'_>, arn: &str) -> Result<&'a Key, Halt> {
    let key = known_key(state, work, arn)?;
    key.check_usable()?;
    let jobs = Job::all_of(key);
    if jobs.is_empty() { Ok(key) } else { Err(Halt::First(Errand::Unwrap(jobs))) }
}

fn check_usage(key: &Key, usage: KeyUsage) -> Result<(), Refusal> {
    if key.usage != usage {
        return Err(refusal::wrong_usage(&key.arn, key.usage.name()));
    }
    if usage == KeyUsage::EncryptDecrypt && key.spec != KeySpec::SymmetricDefault {
        return Err(refusal::unsupported("This test double encrypts with symmetric keys only."));
    }
    Ok(())
}

fn bytes_of<'a>(key: &Key, material: Option<&'a Material>) -> Result<(&'a MaterialId, &'a Plain), Refusal> {
    let material = material.ok_or_else(|| refusal::pending_import(&key.arn))?;
    let bytes = material
        .bytes()
        .ok_or_else(|| internal("the key material that was imported (--unwrap lazy) is not acceptable"))?;
    Ok((&material.id, bytes))
}

fn material<'a>(key: &'a Key, id: &MaterialId) -> Option<&'a Material> {
    key.materials.iter().find(|material| material.id == *id && material.is_permanent())
}

/// A limit of this double, whose layout has no additional data.
fn refuse_context(context: &BTreeMap<String, String>) -> Result<(), Refusal> {
    if context.is_empty() {
        return Ok(());
    }
    Err(refusal::unsupported("This test double takes no encryption context."))
}
