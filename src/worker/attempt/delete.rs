//! A delete: which materials, commit, send, verify. The source keys stay, and the key stays tied to the materials.

use super::judge::{Verdict, judge};
use super::{Or, Run};
use crate::audit::{Fact, Kind};
use crate::job::{DeleteTarget, FailureCode, JobResult, KeyKind};
use crate::kms::{CallError, ErrorKind, HeldMaterial, KeyDescription};
use crate::store::{Answered, Intent, Removed, Settlement, SettlementKind};
use serde_json::{Value, json};

impl Run {
    pub(super) async fn delete(
        &mut self,
        target: &DeleteTarget,
        kind: KeyKind,
        before: KeyDescription,
    ) -> Or<Settlement> {
        // What is committed stands, whatever the key has become since: `current` may be another material by now.
        let ids = match self.job.progress.delete_ids.clone() {
            Some(ids) => ids,
            None => self.materials_meant(target, kind, &before).await?,
        };
        if self.job.request.dry_run {
            return Ok(self.would_delete(kind, &before, ids));
        }
        if self.answered.is_some() {
            return self.verify_delete(kind, &before, ids).await;
        }
        let details = json!({"attempt": self.job.attempt, "key_material_ids": ids});
        let facts = vec![Fact::new(Kind::DeletionIntended, details)];
        self.commit(Intent::Delete { material_ids: ids.clone() }, effect(&ids), facts).await?;
        crate::failpoint!("worker.after_prepare");
        if ids.is_empty() {
            self.send_delete(None).await?;
        }
        for id in &ids {
            self.send_delete(Some(id)).await?;
        }
        self.answered = Some(Answered::default());
        crate::failpoint!("worker.after_delete");
        let after = self.describe().await?;
        self.verify_delete(kind, &after, ids).await
    }

    /// The ids that are meant; none for a key without material ids. The one in force comes first: without it the
    /// key stops at once.
    async fn materials_meant(
        &mut self,
        target: &DeleteTarget,
        kind: KeyKind,
        before: &KeyDescription,
    ) -> Or<Vec<String>> {
        if !kind.has_material_ids() {
            if let DeleteTarget::Material(_) = target {
                let message =
                    format!("AWS gives ids to materials of symmetric keys only; leave key_material_id out for {kind}");
                return self.fail(FailureCode::MaterialIdNotAllowed, &message);
            }
            return Ok(Vec::new());
        }
        // What jobs have put there is there, even if AWS does not show it yet.
        let on_record: Vec<String> = self
            .job
            .materials
            .iter()
            .filter(|held| held.is_own)
            .filter_map(|held| held.key_material_id.clone())
            .collect();
        let current = before.current_material.clone().or_else(|| on_record.last().cloned());
        match target {
            DeleteTarget::Current => Ok(current.into_iter().collect()),
            DeleteTarget::All => {
                let listed = self.materials().await?;
                let listed = listed.into_iter().filter(HeldMaterial::is_permanent).map(|held| held.id);
                let mut others: Vec<String> =
                    listed.chain(on_record).filter(|id| Some(id) != current.as_ref()).collect();
                others.sort_unstable();
                others.dedup();
                Ok(current.into_iter().chain(others).collect())
            }
            DeleteTarget::Material(id) if on_record.contains(id) || current.as_ref() == Some(id) => {
                Ok(vec![id.clone()])
            }
            DeleteTarget::Material(id) => {
                let listed = self.materials().await?;
                match listed.iter().find(|held| held.id == *id) {
                    Some(held) if held.is_permanent() => Ok(vec![id.clone()]),
                    // Whose it is cannot be told here, and what is deleted now could not come back.
                    Some(_) => self.fail(
                        FailureCode::MaterialPending,
                        "the material waits for its rotation and is not tied to the key yet; a delete leaves it alone",
                    ),
                    None => {
                        let message = "the key has no material with this key_material_id";
                        self.wait_for_aws("ListKeyRotations", message, None, FailureCode::MaterialUnknown)
                    }
                }
            }
        }
    }

    /// One mutating call. Repeating it is harmless: it names the material.
    async fn send_delete(&mut self, id: Option<&String>) -> Or<()> {
        self.not_stopping()?;
        let call = self.attempt.context.kms.delete(&self.job.key, id.map(String::as_str), &self.attempt.guard);
        let answer = call.await;
        crate::failpoint!("worker.after_answer");
        match answer {
            Ok(deleted) => {
                // As long as others are to follow, the job has changed AWS and is not at its end.
                self.in_doubt = true;
                self.note_removed(id);
                self.facts.push(Fact::new(
                    Kind::MaterialDeleted,
                    json!({
                        "attempt": self.job.attempt,
                        "key_material_id": deleted.key_material_id,
                        "aws_request_id": deleted.aws_request_id,
                    }),
                ));
                Ok(())
            }
            Err(error) => self.delete_failed(id, &error).await,
        }
    }

    fn note_removed(&mut self, id: Option<&String>) {
        match (id, &mut self.removed) {
            (None, removed) => *removed = Removed::Only,
            (Some(id), Removed::Materials(ids)) => ids.push(id.clone()),
            (Some(id), removed) => *removed = Removed::Materials(vec![id.clone()]),
        }
    }

    async fn delete_failed(&mut self, id: Option<&String>, error: &CallError) -> Or<()> {
        let (step, text, request_id) = (error.operation, error.to_string(), error.aws_request_id.as_deref());
        if error.kind.may_have_taken_effect() {
            self.in_doubt = true;
            self.unanswered = true;
        }
        // What AWS answers to the deletion of a material that is not there is UNVERIFIED.
        if let (Some(id), ErrorKind::NotFound | ErrorKind::InvalidState | ErrorKind::IncorrectKeyMaterial) =
            (id, error.kind)
            && is_absent(&self.materials().await?, id)
        {
            self.note_removed(Some(id));
            return Ok(());
        }
        match judge(error) {
            Verdict::Retry(class) => self.retry(class, step, &text, request_id),
            Verdict::Await(give_up) => self.wait_for_aws(step, &text, request_id, give_up),
            Verdict::Refresh(code) => self.fail(code, &text),
            Verdict::Fail(code, advice) => self.fail(code, &format!("{text}; {advice}")),
        }
    }

    /// Looks until AWS shows that the materials are gone.
    async fn verify_delete(&mut self, kind: KeyKind, after: &KeyDescription, ids: Vec<String>) -> Or<Settlement> {
        let is_gone = if kind.has_material_ids() && !ids.is_empty() {
            self.not_stopping()?;
            match self.attempt.context.kms.materials(&self.job.key, &self.attempt.guard).await {
                Ok(materials) => ids.iter().all(|id| is_absent(&materials, id)),
                // A key that waits for its own deletion may not show its materials (UNVERIFIED): AWS's answer counts.
                Err(error) if error.kind == ErrorKind::InvalidState && after.state == "PendingDeletion" => true,
                Err(error) => return self.read_failed(&error),
            }
        } else {
            after.expiry.is_none()
        };
        if !is_gone {
            let message = format!("AWS deleted the material but still shows it: state {}", after.state);
            return self.wait_for_aws("verify", &message, None, FailureCode::UnexpectedAnswer);
        }
        self.in_doubt = false;
        let mut result = self.result(after, kind);
        result["key_material_ids"] = json!(ids);
        Ok(self.settlement(SettlementKind::Ended {
            outcome: Ok(JobResult(result)),
            source_key_id: None,
            material: None,
        }))
    }

    fn would_delete(&mut self, kind: KeyKind, before: &KeyDescription, ids: Vec<String>) -> Settlement {
        let materials: Value = self.with_sources(ids);
        let would = json!({"operation": "delete", "key_materials": materials, "key_state_now": before.state});
        self.would(before, kind, would, &["whether the worker may call DeleteImportedKeyMaterial"])
    }
}

/// What a delete does. It names the materials, so that a late one cannot mean another.
fn effect(ids: &[String]) -> String {
    let mut ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    ids.sort_unstable();
    format!("delete {}", ids.join(" "))
}

fn is_absent(materials: &[HeldMaterial], id: &str) -> bool {
    !materials.iter().any(|held| held.id == id && held.expiry.is_some())
}
