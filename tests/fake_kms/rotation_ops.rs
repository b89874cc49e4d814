//! The operations that rotate a key and list what it was rotated to.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::json;

use crate::journal::Effect;
use crate::kinds::{IncludeKeyMaterial, KeySpec, epoch_seconds};
use crate::materials::Listed;
use crate::operations::{Done, Halt, Work, named_key};
use crate::refusal::{self, Refusal};
use crate::request::{choice, number, parse};
use crate::world::State;

/// `RotateKeyOnDemand`. AWS rotates some time after it has answered, the double before, unless told otherwise. Whether the
/// answer names the key by its ARN is UNVERIFIED.
pub fn rotate_key_on_demand(state: &mut State, work: &Work<'_>) -> Result<Done, Halt> {
    let takes = state.options.rotation_ms;
    let key = named_key(state, work)?;
    let material = key.rotate(work.now, takes, &work.call.principal.access_key)?;
    let effect =
        material.map(|material| Effect::Rotated { id: material.id, digests: material.contents.digests().cloned() });
    let arn = Arc::clone(&key.arn);
    state.keys.synchronise(&arn, work.now, &mut state.journal);
    Ok(Done { body: json!({ "KeyId": &*arn }), effect, key_arn: None })
}

/// `GetKeyRotationStatus`: nothing rotates by itself.
pub fn get_key_rotation_status(state: &mut State, work: &Work<'_>) -> Result<Done, Halt> {
    let key = named_key(state, work)?;
    let mut body = json!({ "KeyId": &*key.arn, "KeyRotationEnabled": false });
    if let Some(turning) = &key.turning {
        body["OnDemandRotationStartDate"] = epoch_seconds(turning.asked_at);
    }
    Ok(body.into())
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ListKeyRotations {
    include_key_material: Option<String>,
    limit: Option<i64>,
    marker: Option<String>,
}

/// `ListKeyRotations`, oldest first; AWS's order is UNVERIFIED.
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
    let lag = state.options.change_lag_ms;
    let key = named_key(state, work)?;
    if key.spec != KeySpec::SymmetricDefault {
        return Err(refusal::wrong_spec(&key.arn, key.spec.name()).into());
    }
    let materials = match key.outdated(work.now, lag) {
        Some(shown) => shown.materials.clone(),
        None => key.shown().materials,
    };
    let listed: Vec<_> = materials
        .iter()
        .filter(|material| include == IncludeKeyMaterial::All || material.rotated_at.is_some())
        .collect();
    let rotations: Vec<_> = listed.iter().skip(start).take(limit).map(|material| entry(&key.arn, material)).collect();
    let next = start.saturating_add(rotations.len());
    let truncated = next < listed.len();
    let mut body = json!({ "Rotations": rotations, "Truncated": truncated });
    if truncated {
        body["NextMarker"] = json!(next.to_string());
    }
    Ok(body.into())
}

fn entry(arn: &str, material: &Listed) -> serde_json::Value {
    let mut entry = json!({
        "KeyId": arn,
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
    if let Some(at) = material.rotated_at {
        entry["RotationDate"] = epoch_seconds(at);
        entry["RotationType"] = json!("ON_DEMAND");
    }
    entry
}
