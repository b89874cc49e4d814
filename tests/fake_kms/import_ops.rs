//! The operations of the import procedure.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::json;

use crate::crypto::{self, Sealed, Unopened};
use crate::imports::{Import, Offered};
use crate::journal::Effect;
use crate::keys::Family;
use crate::kinds::{
    DAY, ExpirationModel, ImportType, KeySpec, Millis, WrappingAlgorithm, WrappingKeySpec, epoch_seconds,
    from_epoch_seconds,
};
use crate::operations::{Done, Errand, Halt, Job, Work, internal, named_key};
use crate::refusal::{self, Refusal};
use crate::request::{Blob, blob, choice, material_id, parse, required};
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
    let may_be_hybrid = state.options.hybrid_wrap_for_symmetric;
    let key = state.keys.known(&arn, work.now, state.options.creation_lag_ms, &mut state.journal)?;
    key.check_import_state()?;
    let is_waived = may_be_hybrid && algorithm.is_hybrid() && !key.spec.is_pair();
    if !is_waived && !key.spec.takes(algorithm, spec, &key.region) {
        // Whether AWS refuses here or in ImportKeyMaterial, and the code, are UNVERIFIED.
        let text = format!("{} with {} is not valid for key spec {}.", algorithm.name(), spec.name(), key.spec.name());
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
    let key = state.keys.known(&arn, work.now, state.options.creation_lag_ms, &mut state.journal)?;
    key.check_import(work.now, &import)?;
    let token = state.tokens.check(&token_bytes, &arn, work.now, state.options.single_use_tokens)?;
    if !token.algorithm.is_hybrid() && wrapped.len() != token.spec.modulus_length() {
        // UNVERIFIED: known from another emulator's comment.
        return Err(refusal::validation("Invalid encrypted key size.").into());
    }
    let offered_job = || Job {
        key_arn: None,
        spec: key.spec,
        sealed: Arc::new(Sealed {
            algorithm: token.algorithm,
            spec: token.spec,
            index: token.index,
            blob: wrapped.clone(),
        }),
    };
    let mut jobs = Job::all_of(key);
    // Others must be told what the material is, be it other Regions or whoever asks for the public key.
    let may_stay_sealed = work.lazy && !key.spec.is_pair() && key.family == Family::Single;
    let stays_sealed = may_stay_sealed && key.materials.is_empty() && work.offered.is_none();
    if work.offered.is_none() && !stays_sealed {
        jobs.push(offered_job());
    }
    if !jobs.is_empty() {
        return Err(Halt::First(Errand::Unwrap(jobs)));
    }
    let offered = match work.offered.take() {
        Some(Ok(opened)) => Offered::Open(opened),
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
    state.keys.synchronise(&arn, work.now, &mut state.journal);
    Ok(Done::with(
        body,
        Effect::Imported {
            id: imported.id,
            digests: imported.digests,
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
    let deleted = key.delete_material(work.now, id.as_ref())?;
    let mut body = json!({ "KeyId": &*key.arn });
    let shown = deleted.as_ref().map(|deleted| deleted.id).or(key.view().current);
    if let Some(id) = shown.filter(|_| key.spec == KeySpec::SymmetricDefault) {
        body["KeyMaterialId"] = json!(hex::encode(id));
    }
    let arn = Arc::clone(&key.arn);
    state.keys.synchronise(&arn, work.now, &mut state.journal);
    Ok(Done { body, effect: deleted.map(Effect::Deleted), key_arn: None })
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
        replica_needs_existing: state.options.replica_needs_existing,
    })
}
