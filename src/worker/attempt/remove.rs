//! An abandoned rotate: its material that still waits for the rotation is taken away again, if it is known to be its own.
//!
//! AWS computes a material's id from its bytes, so that an id which AWS has given this job's bytes is nobody else's. Whoever
//! abandons a job wants it to end: an error that AWS answers, or a call without an answer, ends it too.

use super::rotate::{Place, place};
use super::{Or, Run};
use crate::audit::{Fact, Kind};
use crate::job::{FailureCode, Scarce, Work};
use crate::kms::{CallError, ErrorKind};
use crate::store::{Ending, Intent, Removed, Settlement};
use crate::worker::meters::Stage;
use serde_json::json;

impl Run {
    /// The id of the material that an abandoned rotate is to take away; `None`: it has none to its name.
    pub(super) fn to_remove(&self) -> Option<String> {
        let is_abandoned =
            self.job.ending == Some(Ending::Abandoned) && matches!(self.job.request.work, Work::Rotate(_));
        if !is_abandoned || self.answered.is_some() {
            return None;
        }
        self.waiting.clone().or_else(|| self.brought_before())
    }

    /// What the failed job that this one does again had come to know of its material.
    pub(super) fn brought_before(&self) -> Option<String> {
        self.job.retry_of.filter(|_| self.job.progress.is_chosen)?;
        let chosen = self.chosen_source_key()?;
        let known = self.job.materials.iter().filter(|known| known.is_own);
        known.filter(|known| known.fingerprint == *chosen.fingerprint()).find_map(|known| known.key_material_id.clone())
    }

    /// Ends the job, with its material gone if it waited.
    pub(super) async fn remove(&mut self, id: &str) -> Or<Settlement> {
        // A call that may still come could turn the key to it, or bring it again.
        self.wait_out(|_, _| true)?;
        self.source_key = self.chosen_source_key();
        self.waiting = Some(id.to_owned());
        self.not_stopping()?;
        self.slot(&self.job.key.clone(), Scarce::ListKeyRotations).await?;
        let held = match self.attempt.context.kms.materials(&self.job.key, &self.attempt.guard).await {
            Ok(held) => held,
            Err(error) => return self.not_removed(id, &error),
        };
        match place(&held, id) {
            Place::Waits | Place::WaitsForReplicas => {}
            // Its bytes are gone, and it stands in the way all the same.
            Place::Gone if held.iter().any(|held| held.id == id) => {}
            Place::InForce | Place::Before => {
                let message = "abandoned by an operator; its material has come into force meanwhile, and stays";
                return self.fail(FailureCode::Abandoned, message);
            }
            Place::Taken(_) | Place::Gone => {
                let message = "abandoned by an operator; its material waits on the key no longer";
                if self.has_looked_enough() {
                    self.removed = Removed::Materials(vec![id.to_owned()]);
                }
                return self.wait_for_aws("ListKeyRotations", message, None, FailureCode::Abandoned);
            }
        }
        let details = json!({"attempt": self.job.attempt, "key_material_ids": [id]});
        let effect = self.effect_known_early().unwrap_or_default();
        let intent = Intent::Remove { material_id: id.to_owned() };
        self.commit(intent, effect, vec![Fact::new(Kind::DeletionIntended, details)]).await?;
        crate::failpoint!("worker.after_remove_prepare");
        self.slot(&self.job.key.clone(), Scarce::DeleteImportedKeyMaterial).await?;
        let timing = self.attempt.context.meters.time(Stage::Delete);
        let answer = self.attempt.context.kms.delete(&self.job.key, Some(id), &self.attempt.guard).await;
        drop(timing);
        match answer {
            Ok(deleted) => {
                let answer =
                    json!({"aws_request_id": deleted.aws_request_id, "key_material_id": deleted.key_material_id});
                let details = json!({"attempt": self.job.attempt, "key_material_id": id, "answer": answer});
                self.facts.push(Fact::new(Kind::MaterialDeleted, details));
                self.removed = Removed::Waiting(id.to_owned());
                let message = format!("abandoned by an operator; its material {id}, which waited, was removed again");
                self.fail(FailureCode::Abandoned, &message)
            }
            Err(error) => {
                self.unanswered = error.kind.may_have_taken_effect();
                self.not_removed(id, &error)
            }
        }
    }

    /// A call that was turned away, or never left, is made again while the job's time lasts; any other end is one.
    fn not_removed<T>(&mut self, id: &str, error: &CallError) -> Or<T> {
        let was_turned_away =
            matches!(error.kind, ErrorKind::Throttled | ErrorKind::NoSession | ErrorKind::Dropped | ErrorKind::NotSent);
        if was_turned_away && self.job.now < self.job.deadline {
            return self.read_failed(error);
        }
        let message = format!(
            "abandoned by an operator; its material {id} may still wait on the key, as it could not be removed: {error}; \
             keyferry jobs abandon tries that again"
        );
        self.fail(FailureCode::Abandoned, &message)
    }
}
