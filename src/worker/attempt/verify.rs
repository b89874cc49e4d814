//! Proof, as far as AWS lets one have it, that the key holds what was imported; and the result.

use super::{End, Or, Run, expiry_text};
use crate::job::{Expiry, FailureCode, JobResult, KeyKind, rfc3339};
use crate::kms::KeyDescription;
use crate::store::{RetryState, Settlement, SettlementKind};
use serde_json::{Value, json};

impl Run {
    /// Looks until AWS shows the material as it was imported.
    pub(super) async fn verify(&mut self, mut key: KeyDescription, material_id: Option<String>) -> Or<Settlement> {
        let is_shown = self.shows(&key, material_id.as_deref())
            || self
                .lists(&key, material_id.as_deref())
                .await
                .map_err(|end| self.after_import(end, material_id.clone()))?;
        if !is_shown {
            let message = format!(
                "AWS took the material but does not show it yet: state {}, expiry {}",
                key.state,
                key.expiry.map_or("none".to_owned(), expiry_text)
            );
            let end = self.wait_for_aws::<()>("verify", &message, None, FailureCode::UnexpectedAnswer).err().flatten();
            return Err(self.after_import(end, material_id));
        }
        if let (Some(id), Some(fields)) = (&material_id, key.aws_param.as_object_mut()) {
            fields.insert("KeyMaterialId".into(), json!(id));
        }
        let result = JobResult(self.result(&key));
        let source = self.source_key.clone();
        let material = source.as_ref().map(|source| self.material(source, material_id, true));
        let kind = SettlementKind::Ended { outcome: Ok(result), source_key_id: source.map(|key| key.id), material };
        Ok(self.settlement(kind))
    }

    /// The import was answered; whatever ends this attempt, the next one only has to see it.
    pub(super) fn after_import(&self, mut end: End, material_id: Option<String>) -> End {
        if let Some(settlement) = &mut end {
            let learnt = RetryState {
                imported: Some(material_id.clone()),
                parameters: self.parameters,
                ..RetryState::default()
            };
            match &mut settlement.kind {
                SettlementKind::Retry { state, reason, .. } => {
                    *state = learnt;
                    reason["aws_changed"] = json!(true);
                }
                SettlementKind::Ended { outcome: Err(failure), material, .. } => {
                    failure.aws_changed = true;
                    *material = self.source_key.as_ref().map(|key| self.material(key, material_id, true));
                }
                SettlementKind::PutBack { .. } => settlement.kind = self.given_back(learnt),
                SettlementKind::Ended { .. } => {}
            }
        }
        end
    }

    /// `DescribeKey` is enough when the key has one material.
    fn shows(&self, key: &KeyDescription, material_id: Option<&str>) -> bool {
        let is_current = material_id.is_none() || key.current_material.as_deref() == material_id;
        key.state == "Enabled" && key.expiry == Some(self.job.request.expiry) && is_current
    }

    /// A key with several materials shows the earliest expiry of all, and is pending import while any of them
    /// is missing. `ListKeyRotations` shows each.
    async fn lists(&mut self, key: &KeyDescription, material_id: Option<&str>) -> Or<bool> {
        let has_ids = KeyKind::parse(&key.key_spec).is_some_and(KeyKind::has_material_ids);
        let Some(id) = material_id.filter(|_| has_ids) else { return Ok(false) };
        self.not_stopping()?;
        match self.attempt.context.kms.material(&self.job.key, id, &self.attempt.guard).await {
            Ok(found) => Ok(found == Some(self.job.request.expiry)),
            Err(error) => self.read_failed(&error),
        }
    }

    /// The flat shape of the original call's answer.
    fn result(&self, key: &KeyDescription) -> Value {
        let source = self.source_key.as_ref();
        json!({
            "id": self.job.key_id,
            "createdAt": rfc3339(self.job.key_created_at),
            "updatedAt": rfc3339(self.job.now),
            "synced_at": rfc3339(self.job.now),
            "region": self.job.key.region(),
            "cloud_name": "aws",
            "local_key_id": source.map(|key| key.id.to_string()),
            "local_key_name": source.map(|key| key.name.clone()),
            "key_type": KeyKind::parse(&key.key_spec).map(KeyKind::key_type),
            "key_material_origin": "keyferry",
            "key_expiration": self.job.request.expiry != Expiry::Never,
            "rotation_status": "",
            "gone": false,
            "aws_param": key.aws_param,
        })
    }
}
