//! An abandoned rotate: its material that still waits for the rotation is taken away again, if it is known to be its own.
//!
//! AWS computes a material's id from its bytes, so that an id which AWS has given this job's bytes is nobody else's. One
//! try: whoever abandons a job wants it to end.

use super::rotate::{Place, place};
use super::{Or, Run};
use crate::audit::{Fact, Kind};
use crate::job::{FailureCode, Work};
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
        self.waiting.clone().or_else(|| {
            // What the failed job had come to know, if this one is there to remove it.
            self.job.retry_of?;
            let chosen = self.chosen_source_key()?;
            let known = self.job.materials.iter().filter(|known| known.is_own);
            known
                .filter(|known| known.fingerprint == *chosen.fingerprint())
                .find_map(|known| known.key_material_id.clone())
        })
    }

    /// Ends the job, with its material gone if it waited.
    pub(super) async fn remove(&mut self, id: &str) -> Or<Settlement> {
        self.source_key = self.chosen_source_key();
        self.waiting = Some(id.to_owned());
        self.not_stopping()?;
        let held = match self.attempt.context.kms.materials(&self.job.key, &self.attempt.guard).await {
            Ok(held) => held,
            Err(error) => return self.is_left(id, &error.to_string()),
        };
        match place(&held, id) {
            Place::Waits | Place::WaitsForReplicas => {}
            Place::InForce | Place::Before => {
                let message = "abandoned by an operator; its material has come into force meanwhile, and stays";
                return self.fail(FailureCode::Abandoned, message);
            }
            Place::Taken(_) | Place::Gone => {
                let message = "abandoned by an operator; its material waits on the key no longer";
                return self.fail(FailureCode::Abandoned, message);
            }
        }
        let details = json!({"attempt": self.job.attempt, "key_material_ids": [id]});
        let effect = self.effect_known_early().unwrap_or_default();
        let intent = Intent::Remove { material_id: id.to_owned() };
        self.commit(intent, effect, vec![Fact::new(Kind::DeletionIntended, details)]).await?;
        crate::failpoint!("worker.after_remove_prepare");
        let timing = self.attempt.context.meters.time(Stage::Delete);
        let answer = self.attempt.context.kms.delete(&self.job.key, Some(id), &self.attempt.guard).await;
        drop(timing);
        match answer {
            Ok(deleted) => {
                let answer =
                    json!({"aws_request_id": deleted.aws_request_id, "key_material_id": deleted.key_material_id});
                let details = json!({"attempt": self.job.attempt, "key_material_id": id, "answer": answer});
                self.facts.push(Fact::new(Kind::MaterialDeleted, details));
                self.removed = Removed::Materials(vec![id.to_owned()]);
                let message = format!("abandoned by an operator; its material {id}, which waited, was removed again");
                self.fail(FailureCode::Abandoned, &message)
            }
            Err(error) => {
                self.unanswered = error.kind.may_have_taken_effect();
                self.is_left(id, &error.to_string())
            }
        }
    }

    fn is_left<T>(&mut self, id: &str, why: &str) -> Or<T> {
        let message = format!(
            "abandoned by an operator; its material {id} may still wait on the key, as it could not be removed: {why}; \
             keyferry jobs abandon tries that again"
        );
        self.fail(FailureCode::Abandoned, &message)
    }
}
