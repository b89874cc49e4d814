//! The operations of the import procedure.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::json;

use crate::crypto::{self, Sealed, Unopened};
use crate::journal::Effect;
use crate::keys::{Import, Offered};
use crate::kinds::{
    DAY, ExpirationModel, ImportType, IncludeKeyMaterial, KeySpec, Millis, Role, WrappingAlgorithm, WrappingKeySpec,
    epoch_seconds, from_epoch_seconds,
};
use crate::operations::{Done, Halt, Job, Work, internal, named_key};
use crate::refusal::{self, Refusal};
use crate::request::{Blob, blob, choice, material_id, number, parse, required};
use crate::tokens::TOKEN_LIFE;
use crate::world::State;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct GetParameters {
    key_id: Option<String>,
    wrapping_algorithm: Option<String>,
    wrapping_key_spec: Option<String>,
}

/// `GetParametersForImport`.
pub fn get_parameters_for_import(state: &mut State, work: &Work<'_>) -> Result<Done, Halt> {
    let request: GetParameters = parse(&work.call.body)?;
    let algorithm = required(request.wrapping_algorithm, "wrappingAlgorithm")?;
    let spec = required(request.wrapping_key_spec, "wrappingKeySpec")?;
    if ["SM2PKE", "RSAES_PKCS1_V1_5"].contains(&algorithm.as_str()) || spec == "SM2" {
        // They are in AWS's enumerations, but not to be had; code and text UNVERIFIED.
        return Err(refusal::unsupported(format!("{algorithm} with {spec} is not supported.")).into());
    }
    let algorithm: WrappingAlgorithm = required(choice(Some(&algorithm), "wrappingAlgorithm")?, "wrappingAlgorithm")?;
    let spec: WrappingKeySpec = required(choice(Some(&spec), "wrappingKeySpec")?, "wrappingKeySpec")?;
    let arn = work.key_arn(request.key_id.as_deref())?;
    let key = state.keys.find(&arn, work.now, &mut state.journal)?;
    key.check_import_state()?;
    if algorithm.is_hybrid() && !state.options.hybrid_wrap_for_symmetric {
        // Whether AWS refuses here or in ImportKeyMaterial is UNVERIFIED.
        let text = format!("{} is not valid for key spec {}.", algorithm.name(), key.spec.name());
        return Err(refusal::unsupported(text).into());
    }
    let (bytes, token) = state
        .tokens
        .issue(Arc::clone(&key.arn), algorithm, spec, work.now)
        .map_err(|Unopened| internal("no random bytes"))?;
    let public = crypto::public_key(spec, token.index).ok_or_else(|| internal("no wrapping key"))?;
    Ok(json!({
        "KeyId": arn,
        "ImportToken": BASE64.encode(bytes),
        "PublicKey": public,
        "ParametersValidTo": epoch_seconds(work.now + TOKEN_LIFE),
    })
    .into())
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ImportKeyMaterial {
    key_id: Option<String>,
    import_token: Option<Blob>,
    encrypted_key_material: Option<Blob>,
    valid_to: Option<f64>,
    expiration_model: Option<String>,
    import_type: Option<String>,
    key_material_description: Option<String>,
    key_material_id: Option<String>,
}

/// `ImportKeyMaterial`.
pub fn import_key_material(state: &mut State, work: &mut Work<'_>) -> Result<Done, Halt> {
    let request: ImportKeyMaterial = parse(&work.call.body)?;
    let import = check_parameters(&request, work.now, state)?;
    let arn = work.key_arn(request.key_id.as_deref())?;
    let token_bytes = blob(request.import_token, "importToken", 6_144)?;
    let wrapped = blob(request.encrypted_key_material, "encryptedKeyMaterial", 6_144)?;
    let key = state.keys.find(&arn, work.now, &mut state.journal)?;
    key.check_import(work.now, &import)?;
    let token = state.tokens.check(&token_bytes, &arn, work.now, state.options.single_use_tokens)?;
    if !token.algorithm.is_hybrid() && wrapped.len() != token.spec.modulus_length() {
        // UNVERIFIED: known from another emulator's comment.
        return Err(refusal::validation("Invalid encrypted key size.").into());
    }
    let offered_job = || Job {
        key_arn: None,
        sealed: Arc::new(Sealed {
            algorithm: token.algorithm,
            spec: token.spec,
            index: token.index,
            blob: wrapped.clone(),
        }),
    };
    let mut jobs: Vec<_> =
        key.sealed().map(|sealed| Job { key_arn: Some(Arc::clone(&key.arn)), sealed: Arc::clone(sealed) }).collect();
    let stays_sealed = work.lazy && key.materials.is_empty() && work.offered.is_none();
    if work.offered.is_none() && !stays_sealed {
        jobs.push(offered_job());
    }
    if !jobs.is_empty() {
        return Err(Halt::Unwrap(jobs));
    }
    let offered = match work.offered.take() {
        Some(Ok(plain)) => Offered::Plain(plain),
        Some(Err(Unopened)) => {
            return Err(refusal::invalid_ciphertext("The encrypted key material cannot be decrypted.").into());
        }
        None => Offered::Sealed(offered_job().sealed),
    };
    let imported = key.import(work.now, &import, offered)?;
    state.tokens.burn(&token_bytes);
    let mut body = json!({ "KeyId": arn });
    if key.spec == KeySpec::SymmetricDefault {
        body["KeyMaterialId"] = json!(hex::encode(imported.id));
    }
    Ok(Done::with(
        body,
        Effect::Imported {
            id: imported.id,
            sha256: imported.sha256,
            model: import.model,
            valid_to: import.valid_to,
            first: imported.first,
            again: imported.again,
        },
    ))
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DeleteImported {
    key_material_id: Option<String>,
}

/// `DeleteImportedKeyMaterial`.
pub fn delete_imported_key_material(state: &mut State, work: &Work<'_>) -> Result<Done, Halt> {
    let request: DeleteImported = parse(&work.call.body)?;
    let id = material_id(request.key_material_id.as_deref())?;
    let key = named_key(state, work)?;
    let deleted = key.delete_material(id.as_ref())?;
    let mut body = json!({ "KeyId": &*key.arn });
    let shown = deleted.as_ref().map(|deleted| deleted.id).or(key.view().current);
    if let Some(id) = shown.filter(|_| key.spec == KeySpec::SymmetricDefault) {
        body["KeyMaterialId"] = json!(hex::encode(id));
    }
    Ok(Done { body, effect: deleted.map(Effect::Deleted), key_arn: None })
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ListKeyRotations {
    include_key_material: Option<String>,
    limit: Option<i64>,
    marker: Option<String>,
}

/// `ListKeyRotations`, oldest first. Nothing rotates here, so only `ALL_KEY_MATERIAL` shows anything.
pub fn list_key_rotations(state: &mut State, work: &Work<'_>) -> Result<Done, Halt> {
    let request: ListKeyRotations = parse(&work.call.body)?;
    let include = choice(request.include_key_material.as_deref(), "includeKeyMaterial")?
        .unwrap_or(IncludeKeyMaterial::RotationsOnly);
    let limit = usize::try_from(number(request.limit, "limit", 1, 1_000, 100)?).unwrap_or(100);
    let start = match request.marker {
        None => 0,
        Some(marker) => {
            marker.parse::<usize>().map_err(|_| Refusal::new("InvalidMarkerException", "The marker is not valid."))?
        }
    };
    let key = named_key(state, work)?;
    if key.spec != KeySpec::SymmetricDefault {
        // UNVERIFIED text.
        let text = format!("{} key spec is {} which is not valid for this operation.", key.arn, key.spec.name());
        return Err(refusal::unsupported(text).into());
    }
    let shown = if include == IncludeKeyMaterial::All { key.materials.as_slice() } else { &[] };
    let entries: Vec<_> = shown
        .iter()
        .skip(start)
        .take(limit)
        .map(|material| {
            let mut entry = json!({
                "KeyId": &*key.arn,
                "KeyMaterialId": hex::encode(material.id),
                "ImportState": if material.imported { "IMPORTED" } else { "PENDING_IMPORT" },
                "KeyMaterialState": material.role.name(),
            });
            if let Some(description) = &material.description {
                entry["KeyMaterialDescription"] = json!(description);
            }
            if let Some(model) = material.model {
                entry["ExpirationModel"] = json!(model.name());
            }
            if let Some(at) = material.valid_to {
                entry["ValidTo"] = epoch_seconds(at);
            }
            entry
        })
        .collect();
    let next = start.saturating_add(entries.len());
    let truncated = next < shown.len();
    let mut body = json!({ "Rotations": entries, "Truncated": truncated });
    if truncated {
        body["NextMarker"] = json!(next.to_string());
    }
    debug_assert!(key.materials.iter().filter(|material| material.role == Role::PendingRotation).count() <= 1);
    Ok(body.into())
}

/// Rules that need no key. The order in which AWS checks them is UNVERIFIED, and so are all texts but the first.
fn check_parameters(request: &ImportKeyMaterial, now: Millis, state: &State) -> Result<Import, Refusal> {
    let model = choice(request.expiration_model.as_deref(), "expirationModel")?.unwrap_or(ExpirationModel::Expires);
    let valid_to = request.valid_to.map(from_epoch_seconds);
    match (model, valid_to) {
        (ExpirationModel::Expires, None) => {
            return Err(refusal::validation(
                "A validTo date must be set if the ExpirationModel is KEY_MATERIAL_EXPIRES",
            ));
        }
        (ExpirationModel::DoesNotExpire, Some(_)) => {
            return Err(refusal::validation(
                "A validTo date must not be set if the ExpirationModel is KEY_MATERIAL_DOES_NOT_EXPIRE",
            ));
        }
        (ExpirationModel::Expires, Some(at)) if at > now + 365 * DAY => {
            return Err(refusal::validation("The validTo date must not be more than 365 days in the future"));
        }
        _ => {}
    }
    if let Some(text) = &request.key_material_description {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b":/_.-".contains(&byte) || byte.is_ascii_whitespace();
        if text.len() > 256 || !text.bytes().all(allowed) {
            let rule =
                "Member must have length at most 256 and satisfy regular expression pattern: ^[a-zA-Z0-9:/_\\s.-]+$";
            return Err(refusal::constraint("[description]", "keyMaterialDescription", rule));
        }
    }
    let import_type = choice(request.import_type.as_deref(), "importType")?;
    let material_id = material_id(request.key_material_id.as_deref())?;
    if import_type == Some(ImportType::New) && material_id.is_some() {
        return Err(refusal::validation("KeyMaterialId must not be set if the ImportType is NEW_KEY_MATERIAL"));
    }
    Ok(Import {
        kind: import_type,
        material_id,
        description: request.key_material_description.clone(),
        model,
        valid_to,
        repeat: state.options.repeated_new_material,
    })
}
