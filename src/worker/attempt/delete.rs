//! A delete: which materials, commit, send, verify. The source keys stay, and the key stays tied to the materials.

use super::judge::{Verdict, judge};
use super::{Or, Run};
use crate::audit::{Fact, Kind};
use crate::job::{DeleteTarget, FailureCode, JobResult, KeyKind, Scarce};
use crate::kms::{CallError, ErrorKind, HeldMaterial, KeyDescription};
use crate::retry::Class;
use crate::store::{Answered, Ending, Intent, Removed, Settlement, SettlementKind, Stop};
use crate::worker::meters::Stage;
use serde_json::json;

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
        if kind.has_material_ids() && ids.is_empty() {
            // Without a name a late call could mean what somebody imports later: nothing is sent.
            return Ok(self.deleted(kind, &before, &ids));
        }
        if self.answered.is_none() {
            self.commit_delete(&ids).await?;
            self.send_deletes(&ids).await?;
            crate::failpoint!("worker.after_delete");
            let _timing = self.attempt.context.meters.time(Stage::Verify);
            let after = self.describe().await?;
            return self.verify_delete(kind, &after, &ids).await;
        }
        self.verify_delete(kind, &before, &ids).await
    }

    /// The ids that are meant; none for a key without material ids, and for one that has never had material. The one
    /// in force comes first: without it the key stops at once.
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
        if let (DeleteTarget::Current, Some(current)) = (target, &before.current_material) {
            return Ok(vec![current.clone()]);
        }
        let listed = self.listed(before).await?;
        let is_pending = |id: &String| listed.iter().any(|held| held.id == *id && !held.is_permanent());
        // What jobs have put there is there, even if AWS does not show it yet.
        let on_record = self.job.materials.iter().filter(|held| held.is_own);
        let on_record: Vec<String> =
            on_record.filter_map(|held| held.key_material_id.clone()).filter(|id| !is_pending(id)).collect();
        let current = before.current_material.clone().or_else(|| on_record.last().cloned());
        match target {
            DeleteTarget::Current => Ok(current.into_iter().collect()),
            DeleteTarget::All => {
                let permanent = listed.iter().filter(|held| held.is_permanent()).map(|held| held.id.clone());
                let mut others: Vec<String> =
                    permanent.chain(on_record).filter(|id| Some(id) != current.as_ref()).collect();
                others.sort_unstable();
                others.dedup();
                Ok(current.into_iter().chain(others).collect())
            }
            // Whose it is cannot be told here, and what is deleted now could not come back.
            DeleteTarget::Material(id) if is_pending(id) => self.fail(
                FailureCode::MaterialPending,
                "the material waits for its rotation and is not tied to the key yet; a delete leaves it alone",
            ),
            DeleteTarget::Material(id)
                if listed.iter().any(|held| held.id == *id)
                    || on_record.contains(id)
                    || current.as_ref() == Some(id) =>
            {
                Ok(vec![id.clone()])
            }
            DeleteTarget::Material(_) => {
                let message = "the key has no material with this key_material_id";
                self.wait_for_aws("ListKeyRotations", message, None, FailureCode::MaterialUnknown)
            }
        }
    }

    /// A key that waits for its own deletion may not show its materials (UNVERIFIED).
    async fn listed(&mut self, key: &KeyDescription) -> Or<Vec<HeldMaterial>> {
        self.not_stopping()?;
        self.slot(&self.job.key.clone(), Scarce::ListKeyRotations).await?;
        match self.attempt.context.kms.materials(&self.job.key, &self.attempt.guard).await {
            Ok(materials) => Ok(materials),
            Err(error) if error.kind == ErrorKind::InvalidState && key.state == "PendingDeletion" => Ok(Vec::new()),
            Err(error) => self.read_failed(&error),
        }
    }

    async fn commit_delete(&mut self, ids: &[String]) -> Or<()> {
        let details = json!({"attempt": self.job.attempt, "key_material_ids": self.left_of(ids)});
        let facts = vec![Fact::new(Kind::DeletionIntended, details)];
        self.commit(Intent::Delete { material_ids: ids.to_vec() }, effect(ids), facts).await?;
        crate::failpoint!("worker.after_prepare");
        self.not_stopping()
    }

    /// What AWS has not said yet that it deleted. What it has deleted may have been brought back since, and stays.
    fn left_of(&self, ids: &[String]) -> Vec<String> {
        ids.iter().filter(|id| !self.job.progress.deleted_ids.contains(id)).cloned().collect()
    }

    async fn send_deletes(&mut self, ids: &[String]) -> Or<()> {
        if ids.is_empty() {
            self.send_delete(None).await?;
        }
        for (number, id) in self.left_of(ids).iter().enumerate() {
            // The first may be in doubt, and is settled; the others were never sent.
            if number > 0 && self.job.now >= self.job.deadline {
                let message = "the deadline passed when a part of the materials was deleted; see key_material_ids of \
                               the audit trail";
                return self.fail(FailureCode::DeadlineExceeded, message);
            }
            if number > 0 {
                self.may_go_on().await?;
            }
            self.send_delete(Some(id)).await?;
        }
        self.in_doubt = false;
        self.answered = Some(Answered::default());
        Ok(())
    }

    /// Between two mutating calls: whether an operator has said that there is to be no other.
    pub(super) async fn may_go_on(&mut self) -> Or<()> {
        // An abandoned rotate that takes its material away is ending already; what is in doubt is settled first.
        let despite = match self.job.ending {
            Some(Ending::Abandoned) => Some(Ending::Abandoned),
            _ => (self.in_doubt || self.answered.is_some()).then_some(Ending::Cancelled),
        };
        match self.attempt.context.store.is_stopped(self.job.id, despite).await {
            Ok(None) => Ok(()),
            Ok(Some(Stop::Ending(ending))) => self.ended_by_operator(ending),
            Ok(Some(Stop::Held)) => self.held(),
            Err(error) => {
                let message = error.to_string();
                self.retry(Class::Transient, "store", &message, None)
            }
        }
    }

    /// One mutating call. Repeating it is harmless: it names the material.
    async fn send_delete(&mut self, id: Option<&String>) -> Or<()> {
        self.not_stopping()?;
        self.slot(&self.job.key.clone(), Scarce::DeleteImportedKeyMaterial).await?;
        self.authorise().await?;
        let timing = self.attempt.context.meters.time(Stage::Delete);
        let call = self.attempt.context.kms.delete(&self.job.key, id.map(String::as_str), &self.attempt.guard);
        let answer = call.await;
        drop(timing);
        crate::failpoint!("worker.after_answer");
        match answer {
            Ok(deleted) => {
                self.in_doubt = false;
                let answer =
                    json!({"aws_request_id": deleted.aws_request_id, "key_material_id": deleted.key_material_id});
                self.note_removed(id, &answer);
                Ok(())
            }
            Err(error) => self.delete_failed(id, &error).await,
        }
    }

    fn note_removed(&mut self, id: Option<&String>, answer: &serde_json::Value) {
        let details = json!({"attempt": self.job.attempt, "key_material_id": id, "answer": answer});
        self.facts.push(Fact::new(Kind::MaterialDeleted, details));
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
        // What AWS answers to the deletion of a material that is not there is UNVERIFIED. The same answers come while it
        // has not caught up with itself, so that absence is believed only when it lasts.
        let may_be_gone =
            matches!(error.kind, ErrorKind::NotFound | ErrorKind::InvalidState | ErrorKind::IncorrectKeyMaterial);
        if let (Some(id), true) = (id, may_be_gone) {
            if !self.has_looked_enough() {
                return self.wait_for_aws(step, &text, request_id, FailureCode::KeyInvalidState);
            }
            if is_absent(&self.materials().await?, id) {
                self.in_doubt = false;
                self.note_removed(Some(id), &json!({"aws_request_id": request_id, "error": text}));
                return Ok(());
            }
        }
        match judge(error) {
            Verdict::Retry(class) => self.retry(class, step, &text, request_id),
            Verdict::Await(give_up) => self.wait_for_aws(step, &text, request_id, give_up),
            Verdict::Refresh(code) => self.fail(code, &text),
            Verdict::Fail(code, advice) => self.fail(code, &format!("{text}; {advice}")),
        }
    }

    /// Looks until AWS shows that the materials are gone.
    async fn verify_delete(&mut self, kind: KeyKind, after: &KeyDescription, ids: &[String]) -> Or<Settlement> {
        let is_gone = if kind.has_material_ids() {
            let listed = self.listed(after).await?;
            ids.iter().all(|id| is_absent(&listed, id))
        } else {
            after.expiry.is_none()
        };
        if is_gone {
            return Ok(self.deleted(kind, after, ids));
        }
        let message = format!("AWS deleted the material but still shows it: state {}", after.state);
        self.wait_for_aws("verify", &message, None, FailureCode::UnexpectedAnswer)
    }

    fn deleted(&mut self, kind: KeyKind, shown: &KeyDescription, ids: &[String]) -> Settlement {
        let mut result = self.result(shown, kind);
        result["key_material_ids"] = json!(ids);
        self.settlement(SettlementKind::Ended { outcome: Ok(JobResult(result)), source_key_id: None, material: None })
    }

    fn would_delete(&mut self, kind: KeyKind, before: &KeyDescription, ids: Vec<String>) -> Settlement {
        let own_effect = effect(&ids);
        let would = json!({"operation": "delete", "key_materials": self.with_sources(ids)});
        self.would(before, kind, would, Some(&own_effect), &["whether the worker may call DeleteImportedKeyMaterial"])
    }
}

/// What a delete does. It names the materials, so that a late one cannot mean another.
fn effect(ids: &[String]) -> String {
    let mut ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    ids.sort_unstable();
    format!("delete {}", ids.join(" "))
}

fn is_absent(materials: &[HeldMaterial], id: &str) -> bool {
    !materials.iter().any(|held| held.id == id && held.is_imported)
}
