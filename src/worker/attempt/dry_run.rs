//! A dry run: every check, read-only calls, a wrap under a throw-away key. It creates and changes nothing.

use super::import::{effect, expiry_text};
use super::{Or, Run};
use crate::job::{FailureCode, JobResult, KeyKind, SourceMaterial, Wrapping, rfc3339};
use crate::kms::{KeyDescription, MaterialRole};
use crate::store::{Settlement, SettlementKind};
use crate::wrap::{throw_away_public_key, wrap};
use serde_json::{Value, json};
use std::sync::Arc;

impl Run {
    /// Goes up to the door of an import.
    pub(super) async fn would_import(
        &mut self,
        asked: &SourceMaterial,
        kind: KeyKind,
        before: &KeyDescription,
        role: MaterialRole,
        wrapping: Wrapping,
    ) -> Or<Settlement> {
        let source = self.source_key.clone();
        let wrapped_bytes = self.would_wrap(kind, wrapping).await?;
        let (import_type, material_id) = match role {
            MaterialRole::First => (None, None),
            MaterialRole::New => (Some("NEW_KEY_MATERIAL"), None),
            MaterialRole::Existing(id) => (Some("EXISTING_KEY_MATERIAL"), id),
        };
        // A pair was compared already.
        let takes_only_the_same = import_type.is_some() || (before.has_had_material() && !kind.is_pair());
        let is_on_record = source
            .as_ref()
            .is_some_and(|key| self.job.materials.iter().any(|held| held.fingerprint == *key.fingerprint()));
        let mut left_to_aws = vec!["whether the worker may call GetParametersForImport and ImportKeyMaterial"];
        if takes_only_the_same && !is_on_record {
            left_to_aws.push("whether the source key is the material that the key was given before");
        }
        let mut would = json!({
            "operation": "import",
            "import_type": import_type,
            "key_material_id": material_id,
            "generate": source.is_none(),
            "expiry": expiry_text(asked.expiry),
            "wrapping_algorithm": wrapping.algorithm.as_str(),
            "wrapping_key_spec": wrapping.key_spec.as_str(),
            "wrapped_bytes": wrapped_bytes,
        });
        self.name_source(&mut would);
        let own_effect = source.as_ref().map(|key| effect(&key.id(), asked.expiry));
        Ok(self.would(before, kind, would, own_effect.as_ref(), &left_to_aws))
    }

    /// Wraps bytes of the material's length under a throw-away key; says how many come of it.
    pub(super) async fn would_wrap(&mut self, kind: KeyKind, wrapping: Wrapping) -> Or<usize> {
        let length = match self.source_key.clone() {
            // Opened, so that a damaged seal is found.
            Some(key) => self.with_plain(key, |key| key.material().expose().len()).await?,
            None => kind.most_material_bytes(),
        };
        // Not the key's own bytes: nothing is known of a random modulus's strength.
        let wrapped = self
            .compute(Arc::clone(&self.attempt.computing), move || {
                wrap(&vec![0; length], &throw_away_public_key(wrapping.key_spec)?, wrapping)
            })
            .await?;
        match wrapped {
            Ok(wrapped) => Ok(wrapped.len()),
            Err(error) => self.fail(FailureCode::WrappingNotAllowed, &error.to_string()),
        }
    }

    /// The end of a dry run that nothing refuses.
    pub(super) fn would(
        &mut self,
        shown: &KeyDescription,
        kind: KeyKind,
        mut would: Value,
        own_effect: Option<&String>,
        left_to_aws: &[&str],
    ) -> Settlement {
        would["left_to_aws"] = json!(left_to_aws);
        let waits_for = self.job.late.as_ref().filter(|(late, _)| own_effect != Some(late));
        would["waits_until"] = json!(waits_for.map(|(_, until)| rfc3339(*until)));
        let mut result = self.result(shown, kind);
        result["dry_run"] = json!(true);
        result["would"] = would;
        self.settlement(SettlementKind::Ended { outcome: Ok(JobResult(result)), source_key_id: None, material: None })
    }
}
