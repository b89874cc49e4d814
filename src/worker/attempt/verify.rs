//! Proof, as far as AWS lets one have it, that the key holds what was imported; and the result.

use super::import::expiry_text;
use super::{Or, Run};
use crate::job::{Expiry, FailureCode, JobResult, KeyKind, SourceMaterial, rfc3339};
use crate::kms::{ErrorKind, HeldMaterial, KeyDescription};
use crate::store::{Settlement, SettlementKind};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

impl Run {
    /// Looks until AWS shows the material as it was imported.
    pub(super) async fn verify_import(
        &mut self,
        asked: &SourceMaterial,
        kind: KeyKind,
        key: KeyDescription,
    ) -> Or<Settlement> {
        let material_id = self.answered.clone().and_then(|answer| answer.key_material_id);
        let mut result = self.result(&key, kind);
        if !shows(&key, asked.expiry, material_id.as_deref()) {
            let missing = match &material_id {
                Some(id) if kind.has_material_ids() => missing_beside(&self.materials().await?, id, asked.expiry, &key),
                _ => None,
            };
            let Some(missing) = missing else {
                let message = format!(
                    "AWS took the material but does not show it yet: state {}, expiry {}",
                    key.state,
                    key.expiry.map_or("none".to_owned(), expiry_text)
                );
                return self.wait_for_aws("verify", &message, None, FailureCode::UnexpectedAnswer);
            };
            if !missing.is_empty() {
                result["missing_key_materials"] = self.with_sources(missing);
            }
        }
        if kind.is_pair() {
            let public_key = self.verify_public_key(kind).await?;
            result["public_key"] = json!(STANDARD.encode(public_key));
        }
        Ok(self.brought(asked, result, material_id))
    }

    /// The end of a job that has brought material.
    pub(super) fn brought(
        &mut self,
        asked: &SourceMaterial,
        mut result: Value,
        material_id: Option<String>,
    ) -> Settlement {
        let source = self.source_key.clone();
        self.name_source(&mut result);
        result["key_expiration"] = json!(asked.expiry != Expiry::Never);
        if let Some(id) = &material_id {
            result["key_material_id"] = json!(id);
            result["aws_param"]["KeyMaterialId"] = json!(id);
        }
        let material = source.as_ref().map(|source| self.material(source, material_id, true));
        let source_key_id = source.and_then(|key| key.local_id());
        self.settlement(SettlementKind::Ended { outcome: Ok(JobResult(result)), source_key_id, material })
    }

    /// After an import `GetPublicKey` gives exactly the public key of the imported pair.
    async fn verify_public_key(&mut self, kind: KeyKind) -> Or<Vec<u8>> {
        self.not_stopping()?;
        let theirs = match self.attempt.context.kms.public_key(&self.job.key, &self.attempt.guard).await {
            Ok(theirs) => theirs,
            Err(error) if error.kind == ErrorKind::InvalidState => {
                let (text, id) = (error.to_string(), error.aws_request_id.as_deref());
                return self.wait_for_aws(error.operation, &text, id, FailureCode::UnexpectedAnswer);
            }
            Err(error) => return self.read_failed(&error),
        };
        if self.is_own_public_key(kind, &theirs) {
            return Ok(theirs);
        }
        let message = "AWS answered that it took the pair, and GetPublicKey shows another; do not use the key";
        self.fail(FailureCode::UnexpectedAnswer, message)
    }

    /// Names the source key, in the field of its tier.
    pub(super) fn name_source(&self, told: &mut Value) {
        if let Some(key) = &self.source_key {
            let tier = key.tier();
            told[format!("{tier}_key_id")] = json!(key.id());
            told[format!("{tier}_key_name")] = json!(key.name());
        }
    }

    /// The flat shape of the original call's answer, without what only an import tells.
    pub(super) fn result(&self, key: &KeyDescription, kind: KeyKind) -> Value {
        json!({
            "id": self.job.key_id,
            "createdAt": rfc3339(self.job.key_created_at),
            "updatedAt": rfc3339(self.job.now),
            "synced_at": rfc3339(self.job.now),
            "region": self.job.key.region(),
            "cloud_name": "aws",
            "key_type": kind.key_type(),
            "key_material_origin": "keyferry",
            "rotation_status": "",
            "gone": false,
            "aws_param": key.aws_param,
        })
    }

    /// Each material with the source key that it came from, as far as that is on record.
    pub(super) fn with_sources(&self, ids: Vec<String>) -> Value {
        let named = |id: String| {
            let held = self.job.materials.iter().find(|held| held.key_material_id.as_ref() == Some(&id));
            let mut material = json!({"key_material_id": id});
            if let Some(held) = held {
                material[format!("{}_key_name", held.source_tier)] = json!(held.source_key_name);
            }
            material
        };
        ids.into_iter().map(named).collect()
    }
}

/// States in which a key shows that its material is there. It may have been disabled since AWS took the material.
fn has_material(state: &str) -> bool {
    matches!(state, "Enabled" | "Disabled" | "PendingDeletion")
}

/// `DescribeKey` is enough when the key has one material.
fn shows(key: &KeyDescription, expiry: Expiry, material_id: Option<&str>) -> bool {
    let is_current = material_id.is_none() || key.current_material.as_deref() == material_id;
    has_material(&key.state) && key.expiry == Some(expiry) && is_current
}

/// A key with several materials shows the earliest expiry of all, and is pending import while any of them
/// is missing; `ListKeyRotations` shows each. The others that are missing, once this one is there: `None`, not yet.
fn missing_beside(materials: &[HeldMaterial], id: &str, expiry: Expiry, key: &KeyDescription) -> Option<Vec<String>> {
    let is_there = materials.iter().any(|held| held.id == id && held.is_imported && held.expiry == Some(expiry));
    let missing: Vec<String> =
        materials.iter().filter(|held| held.is_permanent() && !held.is_imported).map(|held| held.id.clone()).collect();
    // With nothing missing the state lags behind.
    (is_there && (has_material(&key.state) || !missing.is_empty())).then_some(missing)
}
