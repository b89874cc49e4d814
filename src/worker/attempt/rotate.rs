//! A rotate: prove or bring the new material, give it to the replicas, ask for the rotation, see it in force.
//!
//! A key holds one material at most that waits for its rotation, and `RotateKeyOnDemand` does not name it. So the job asks
//! for the rotation only while AWS shows its own material as the one that waits, and asks once: a call that was not
//! answered is waited out before another is sent.

use super::choose::{exists, fits};
use super::import::expiry_text;
use super::source_key::SourceKey;
use super::{Or, Run};
use crate::audit::{Fact, Kind};
use crate::job::{FailureCode, KeyKind, Scarce, SourceMaterial, Wrapping};
use crate::kms::{CallError, ErrorKind, HeldMaterial, KeyDescription, MaterialRole, MaterialState, RegionRole};
use crate::retry::Class;
use crate::store::{Answered, Intent, Parameters, Removed, ReplicaStep, Settlement};
use crate::worker::meters::Stage;
use serde_json::{Value, json};
use std::time::Duration;
use time::OffsetDateTime;

/// AWS rotates a key on demand so many times, for good (`RotateKeyOnDemand`, AWS KMS API Reference). Older pages say 10:
/// where that holds, AWS's own refusal ends the job.
pub(super) const MOST_ROTATIONS: u32 = 25;

impl Run {
    pub(super) async fn rotate(
        &mut self,
        asked: &SourceMaterial,
        kind: KeyKind,
        before: KeyDescription,
    ) -> Or<Settlement> {
        self.is_rotatable(kind, &before)?;
        let mut held = self.shown_materials().await?;
        if let Some(id) = self.answered.clone().and_then(|answered| answered.key_material_id) {
            self.source_key = self.chosen_source_key();
            return self.verify_rotation(asked, kind, &held, &id).await;
        }
        // A retry finds in force what the failed job had brought, whoever has rotated to it since.
        let in_force = self.brought_before().filter(|id| before.current_material.as_ref() == Some(id));
        let id = if let Some(id) = self.waiting.clone().or(in_force) {
            self.source_key = self.chosen_source_key();
            id
        } else {
            match self.bring(asked, kind, &before, &held).await? {
                Brought::Material(id) => {
                    held = self.shown_materials().await?;
                    id
                }
                Brought::WouldBe(end) => return Ok(*end),
            }
        };
        self.turn(asked, kind, &before, held, &id).await
    }

    /// Whether AWS rotates such a key at all. Changes nothing.
    fn is_rotatable(&mut self, kind: KeyKind, key: &KeyDescription) -> Or<()> {
        if !kind.has_material_ids() {
            let message = format!("AWS rotates symmetric keys only; make a new KMS key of kind {kind} instead");
            return self.fail(FailureCode::RotationNotSupported, &message);
        }
        if key.role == RegionRole::Replica {
            let primary = match &key.regions {
                Some(regions) => regions.primary.to_string(),
                None => "its primary".to_owned(),
            };
            let message = format!("the key is a replica, which is rotated by its primary: ask for {primary}");
            return self.fail(FailureCode::RotationOnReplica, &message);
        }
        if self.answered.is_some() || self.has_begun() {
            return Ok(());
        }
        if key.current_material.is_none() {
            if self.job.materials.iter().any(|held| held.is_own) {
                let message = "the key does not show yet that it holds material";
                return self.wait_for_aws("DescribeKey", message, None, FailureCode::NothingToRotate);
            }
            let message = "the key has never had material: send an import for the first";
            return self.fail(FailureCode::NothingToRotate, message);
        }
        if key.state != "Enabled" {
            let message = "a material of the key is missing, and AWS rotates none that is not usable: import it again; \
                           keyferry kms-keys show tells from which source keys";
            return self.wait_for_aws("DescribeKey", message, None, FailureCode::KeyInvalidState);
        }
        Ok(())
    }

    /// Whether this job, or the failed one that it does again, may have sent its material already.
    fn has_begun(&self) -> bool {
        // The choice is committed directly before the material is sent.
        self.in_doubt || self.waiting.is_some() || (self.job.retry_of.is_some() && self.job.progress.is_chosen)
    }

    /// Every material, and how much of the budget is used up.
    async fn shown_materials(&mut self) -> Or<Vec<HeldMaterial>> {
        let held = self.materials().await?;
        self.rotations = Some(rotations(&held));
        Ok(held)
    }

    /// The material is on the key when this returns, and its id is known. It is proved where AWS shows one that waits:
    /// AWS compares the bytes with those that it has under that id.
    async fn bring(
        &mut self,
        asked: &SourceMaterial,
        kind: KeyKind,
        before: &KeyDescription,
        held: &[HeldMaterial],
    ) -> Or<Brought> {
        let source = self.named_source_key(asked, kind).await?;
        self.source_key.clone_from(&source);
        // Now by the name of the key that it is.
        self.authorise().await?;
        let usable =
            exists(asked, source.as_ref()).and_then(|()| source.as_ref().map_or(Ok(()), |key| fits(key, kind)));
        if let Err(none) = usable {
            return self.fail(none.code, &none.message);
        }
        self.may_rotate(held)?;
        self.may_reach_replicas(before.regions.as_ref()).await?;
        let wrapping = self.choose_wrapping(asked, kind)?;
        let role = match (waits(held), &source) {
            (Some(pending), Some(_)) => MaterialRole::Existing(Some(pending.id.clone())),
            (Some(pending), None) => {
                let id = pending.id.clone();
                return self.is_foreign(&id);
            }
            (None, Some(key)) if !self.has_begun() && self.is_tied_to(key, held) => return self.is_not_new(),
            (None, _) => MaterialRole::New,
        };
        if self.job.request.dry_run {
            return self.would_rotate(kind, before, held, &role, wrapping).await;
        }
        if !self.has_begun() {
            self.rotated_from.clone_from(&before.current_material);
        }
        let key = self.job.key.clone();
        let (parameters, are_new) = self.parameters(&key, wrapping).await?;
        crate::failpoint!("worker.after_parameters");
        let wrapped = self.commit_and_wrap(asked, kind, source, &parameters, are_new).await?;
        let answer = self.call_import(&key, asked, kind, role.clone(), &parameters, wrapped.clone()).await?;
        let answer = match (&role, answer) {
            // The bytes are the key's already. Whoever rotated: a call of this job's may have brought them.
            (MaterialRole::New, Err(error)) if is_other_material(&error) && self.has_begun() => {
                self.has_not_expired(asked, &error)?;
                if self.rotated_from.is_some() && self.rotated_from == before.current_material {
                    // In force since before the first call: that has brought nothing, as far as AWS shows.
                    return self.is_still_not_new(&error);
                }
                self.commit_again(asked).await?;
                let current = MaterialRole::Existing(before.current_material.clone());
                self.call_import(&key, asked, kind, current, &parameters, wrapped).await?
            }
            (_, answer) => answer,
        };
        crate::failpoint!("worker.after_import");
        match answer {
            Ok(imported) => {
                self.parameters = Parameters::Used;
                let Some(id) = imported.key_material_id else {
                    self.in_doubt = true;
                    let message = "AWS took the material without giving its id";
                    return self.wait_for_aws("ImportKeyMaterial", message, None, FailureCode::UnexpectedAnswer);
                };
                self.in_doubt = false;
                self.waiting = Some(id.clone());
                Ok(Brought::Material(id))
            }
            Err(error) if is_other_material(&error) => {
                self.has_not_expired(asked, &error)?;
                match role {
                    MaterialRole::Existing(Some(pending)) => self.is_not_ours(&pending, &error).await,
                    _ => self.is_still_not_new(&error),
                }
            }
            Err(error) => self.import_refused(&error),
        }
    }

    /// A second call of this attempt is on record before it is sent, as the first is.
    async fn commit_again(&mut self, asked: &SourceMaterial) -> Or<()> {
        let Some(source) = self.source_key.as_ref().map(SourceKey::chosen) else { return Ok(()) };
        let details = json!({"attempt": self.job.attempt, "expiry": expiry_text(asked.expiry)});
        let intent = Intent::Import { source, generated: None, parameters: None, rotated_from: None };
        let effect = self.effect_known_early().unwrap_or_default();
        self.commit_all(intent, effect, [Fact::new(Kind::ImportIntended, details)]).await
    }

    /// What the budget and the policy say. What has begun is brought to its end: AWS itself keeps to its limit.
    fn may_rotate(&mut self, held: &[HeldMaterial]) -> Or<()> {
        if self.in_doubt {
            return Ok(());
        }
        let used = rotations(held);
        if used >= MOST_ROTATIONS {
            let message = format!(
                "the key was rotated on demand {used} times, and AWS allows {MOST_ROTATIONS} for good: make a new KMS key \
                 and let its alias point to that"
            );
            return self.fail(FailureCode::RotationsSpent, &message);
        }
        let policy = self.attempt.context.policy.get();
        let interval = self.judged(&policy, &self.job.key).map(|grant| grant.shortest_rotation_interval);
        let last = held.iter().filter_map(|held| held.rotated_at).max();
        if let (Ok(interval), Some(last)) = (interval, last)
            && let Some(from) = too_soon(last, interval, self.job.now)
        {
            let message = format!(
                "the key was rotated at {}, and the policy's shortest_rotation_interval is {} s: ask again from {} on",
                crate::job::rfc3339(last),
                interval.as_secs(),
                crate::job::rfc3339(from)
            );
            return self.fail(FailureCode::RotationTooSoon, &message);
        }
        Ok(())
    }

    /// Whether the key is tied to the source key's material, which a job has brought. One that waited and was deleted is new.
    fn is_tied_to(&self, key: &SourceKey, held: &[HeldMaterial]) -> bool {
        let ids = self.job.materials.iter().filter(|known| known.fingerprint == *key.fingerprint());
        let mut ids = ids.filter_map(|known| known.key_material_id.as_ref());
        ids.any(|id| held.iter().any(|held| held.id == *id && held.is_permanent()))
    }

    fn is_not_new<T>(&mut self) -> Or<T> {
        let message = "the key has, or had, this very material: a rotation brings new; name another source key, or leave \
                       source_key_identifier out and one is generated";
        self.fail(FailureCode::MaterialNotNew, message)
    }

    /// The same said by AWS. A call without an answer may have brought it, and AWS may not show it yet.
    fn is_still_not_new<T>(&mut self, error: &CallError) -> Or<T> {
        if self.in_doubt && !self.has_looked_enough() {
            let (text, id) = (error.to_string(), error.aws_request_id.as_deref());
            return self.wait_for_aws(error.operation, &text, id, FailureCode::MaterialNotNew);
        }
        self.is_not_new()
    }

    /// AWS says that the material that waited a moment ago is another than the job's. It may be gone by now.
    async fn is_not_ours<T>(&mut self, pending: &str, error: &CallError) -> Or<T> {
        let held = self.shown_materials().await?;
        if waits(&held).is_some_and(|held| held.id == pending) {
            return self.is_foreign(pending);
        }
        let (text, id) = (error.to_string(), error.aws_request_id.as_deref());
        self.wait_for_aws(error.operation, &text, id, FailureCode::PendingForeign)
    }

    fn is_foreign<T>(&mut self, pending: &str) -> Or<T> {
        let on_record = self.job.materials.iter().find(|held| held.key_material_id.as_deref() == Some(pending));
        let whose = match on_record {
            Some(held) => format!(
                "of {}, which a failed job brought: go on with that by keyferry jobs retry, or remove it by keyferry jobs \
                 abandon",
                held.source()
            ),
            None => "which is not this job's: whoever brought it may rotate to it, or delete it".to_owned(),
        };
        let message = format!("the material {pending} waits for its rotation on this key already, {whose}");
        self.fail(FailureCode::PendingForeign, &message)
    }

    /// From here on the material is known to be on the key. Asks for the rotation if it is this material that waits, and looks
    /// again.
    async fn turn(
        &mut self,
        asked: &SourceMaterial,
        kind: KeyKind,
        before: &KeyDescription,
        mut held: Vec<HeldMaterial>,
        id: &str,
    ) -> Or<Settlement> {
        self.waiting = Some(id.to_owned());
        // Replicas that were given it by another job may hold it for another time.
        let are_known = self.replicas.0.values().all(|step| *step == ReplicaStep::Imported)
            && before.regions.as_ref().is_none_or(|all| all.replicas.len() <= self.replicas.0.len());
        let at = place(&held, id);
        if at == Place::WaitsForReplicas || (at == Place::Waits && !are_known) {
            self.replicate(asked, kind, id).await?;
            held = self.shown_materials().await?;
        }
        match place(&held, id) {
            Place::InForce => {
                self.answered = Some(Answered { key_material_id: Some(id.to_owned()) });
                return self.verify_rotation(asked, kind, &held, id).await;
            }
            Place::Waits => {}
            Place::WaitsForReplicas => {
                let message = "AWS has the material in every Region, but does not say so yet";
                return self.wait_for_aws("ListKeyRotations", message, None, FailureCode::UnexpectedAnswer);
            }
            // Its own rotation had no answer, and has come.
            Place::Before if self.in_doubt && self.job.progress.rotation_sent => {
                self.answered = Some(Answered { key_material_id: Some(id.to_owned()) });
                return self.verify_rotation(asked, kind, &held, id).await;
            }
            Place::Before => {
                let message = "the key was rotated on to another material before this job asked for its rotation";
                return self.fail(FailureCode::RotationSuperseded, message);
            }
            Place::Taken(other) => return self.is_foreign(&other),
            Place::Gone => {
                let message = "the new material waited for its rotation and is gone: somebody deleted it, or it expired; \
                               keyferry jobs retry brings the same again";
                if self.has_looked_enough() {
                    self.removed = Removed::Materials(vec![id.to_owned()]);
                }
                return self.wait_for_aws("ListKeyRotations", message, None, FailureCode::PendingLost);
            }
        }
        self.no_rotation_may_be_under_way()?;
        self.is_in_time("its rotation")?;
        self.may_go_on().await?;
        // The wait for a slot lies before the last look, not between that and the call.
        self.slot(&self.job.key.clone(), Scarce::RotateKeyOnDemand).await?;
        let lane = self.last_lane.clone();
        if place(&self.shown_materials().await?, id) != Place::Waits {
            let message = "the key changed between two looks";
            return self.retry(Class::Immediate, "ListKeyRotations", message, None);
        }
        let intent = Intent::Rotate { material_id: id.to_owned(), replicas: self.replicas.clone() };
        let effect = self.effect_known_early().unwrap_or_default();
        let details = json!({"attempt": self.job.attempt, "key_material_id": id, "rotations": self.rotations});
        self.commit_all(intent, effect, [Fact::new(Kind::RotationIntended, details)]).await?;
        crate::failpoint!("worker.after_turn_prepare");
        self.not_stopping()?;
        // The look took a slot of its own: where the rotation is throttled, it is its own lane that slows down.
        self.last_lane = lane;
        self.send_rotation(id).await?;
        crate::failpoint!("worker.after_rotate");
        let held = self.shown_materials().await?;
        self.verify_rotation(asked, kind, &held, id).await
    }

    /// A step after others of the same attempt: what they have learnt becomes durable with it.
    pub(super) async fn commit_all(
        &mut self,
        intent: Intent,
        effect: String,
        facts: impl IntoIterator<Item = Fact>,
    ) -> Or<()> {
        let facts = self.facts.iter().cloned().chain(facts).collect();
        self.commit(intent, effect, facts).await?;
        self.facts.clear();
        Ok(())
    }

    /// What is in doubt is settled after the deadline too, and no other step is made then.
    pub(super) fn is_in_time(&mut self, for_what: &str) -> Or<()> {
        if self.job.now < self.job.deadline {
            return Ok(());
        }
        let message = format!(
            "the deadline passed when the new material waited for {for_what}; keyferry jobs retry goes on with it, keyferry \
             jobs abandon takes it away"
        );
        self.fail(FailureCode::DeadlineExceeded, &message)
    }

    /// A rotation that was asked for without an answer may come yet. Another one now could turn the key a second time,
    /// should somebody bring material in between.
    fn no_rotation_may_be_under_way(&mut self) -> Or<()> {
        let may_come = self.in_doubt && self.job.progress.rotation_sent;
        self.wait_out(|run, late| may_come && Some(late) == run.effect.as_ref())
    }

    /// The one call that turns the key.
    async fn send_rotation(&mut self, id: &str) -> Or<()> {
        self.authorise().await?;
        let timing = self.attempt.context.meters.time(Stage::Rotate);
        let answer = self.attempt.context.kms.rotate(&self.job.key, &self.attempt.guard).await;
        drop(timing);
        crate::failpoint!("worker.after_rotate_answer");
        match answer {
            Ok(aws_request_id) => {
                self.in_doubt = false;
                let details =
                    json!({"attempt": self.job.attempt, "key_material_id": id, "aws_request_id": aws_request_id});
                self.facts.push(Fact::new(Kind::KeyRotated, details));
                self.answered = Some(Answered { key_material_id: Some(id.to_owned()) });
                Ok(())
            }
            Err(error) => {
                let may_come = error.kind.may_have_taken_effect();
                self.unanswered |= may_come;
                // Where one is under way, it may be the one that this job has asked for.
                if error.kind != ErrorKind::Conflict {
                    self.in_doubt = may_come;
                }
                self.import_refused(&error)
            }
        }
    }

    /// Looks until AWS shows the material in force.
    async fn verify_rotation(
        &mut self,
        asked: &SourceMaterial,
        kind: KeyKind,
        held: &[HeldMaterial],
        id: &str,
    ) -> Or<Settlement> {
        let timing = self.attempt.context.meters.time(Stage::Verify);
        let expiry = held.iter().find(|held| held.id == id && held.is_imported).map(|held| held.expiry);
        let message = match place(held, id) {
            Place::InForce if expiry.is_some_and(|expiry| expiry != Some(asked.expiry)) => {
                "AWS rotated to the material but shows another end of its life"
            }
            // Somebody may have rotated on since: it was in force.
            Place::InForce | Place::Before => {
                let key = self.describe().await?;
                drop(timing);
                if place(held, id) == Place::Before || key.current_material.as_deref() == Some(id) {
                    return Ok(self.rotated(asked, kind, &key, held, id));
                }
                "AWS rotated to the material but DescribeKey does not show it yet"
            }
            _ => "AWS was asked to rotate but does not show the material in force yet",
        };
        self.wait_for_aws("verify", message, None, FailureCode::UnexpectedAnswer)
    }

    fn rotated(
        &mut self,
        asked: &SourceMaterial,
        kind: KeyKind,
        key: &KeyDescription,
        held: &[HeldMaterial],
        id: &str,
    ) -> Settlement {
        let mut result = self.result(key, kind);
        result["rotation_status"] = json!("rotated");
        let rotated_at = held.iter().find(|held| held.id == id).and_then(|held| held.rotated_at);
        result["rotated_at"] = json!(rotated_at.map(crate::job::rfc3339));
        result["rotations"] = budget(rotations(held));
        if !self.replicas.0.is_empty() {
            result["replicas"] =
                self.replicas.0.iter().map(|(region, step)| (region.clone(), json!(step.as_str()))).collect();
        }
        self.brought(asked, result, Some(id.to_owned()))
    }

    async fn would_rotate(
        &mut self,
        kind: KeyKind,
        before: &KeyDescription,
        held: &[HeldMaterial],
        role: &MaterialRole,
        wrapping: Wrapping,
    ) -> Or<Brought> {
        let wrapped_bytes = self.would_wrap(kind, wrapping).await?;
        let replicas = before.regions.as_ref().map(|regions| &regions.replicas);
        let regions: Vec<&str> = replicas.into_iter().flatten().map(crate::job::KeyArn::region).collect();
        let (import_type, pending) = match role {
            MaterialRole::Existing(id) => ("EXISTING_KEY_MATERIAL", id.as_deref()),
            _ => ("NEW_KEY_MATERIAL", None),
        };
        let mut would = json!({
            "operation": "rotate",
            "import_type": import_type,
            "key_material_id": pending,
            "generate": self.source_key.is_none(),
            "wrapping_algorithm": wrapping.algorithm.as_str(),
            "wrapping_key_spec": wrapping.key_spec.as_str(),
            "wrapped_bytes": wrapped_bytes,
            "rotations": budget(rotations(held)),
            "replicas": regions,
        });
        self.name_source(&mut would);
        let mut left =
            vec!["whether the worker may call GetParametersForImport, ImportKeyMaterial and RotateKeyOnDemand"];
        if pending.is_some() {
            left.push("whether the source key is the material that waits for its rotation");
        }
        let own_effect = self.own_effect();
        Ok(Brought::WouldBe(Box::new(self.would(before, kind, would, own_effect.as_ref(), &left))))
    }
}

/// What became of bringing the material.
enum Brought {
    /// It is on the key under this id.
    Material(String),
    /// A dry run goes no further.
    WouldBe(Box<Settlement>),
}

/// Where AWS shows the job's material.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// It waits for its rotation.
    Waits,
    /// It waits, and a replica has yet to be given it.
    WaitsForReplicas,
    /// It is the current one.
    InForce,
    /// It was in force before the one that is now.
    Before,
    /// It is not there, or not its bytes; another waits.
    Taken(String),
    /// It is not there, or not its bytes.
    Gone,
}

pub(super) fn place(held: &[HeldMaterial], id: &str) -> Place {
    match held.iter().find(|held| held.id == id) {
        Some(own) => match own.state {
            MaterialState::Current => Place::InForce,
            MaterialState::NonCurrent => Place::Before,
            _ if !own.is_imported => Place::Gone,
            MaterialState::Pending => Place::Waits,
            MaterialState::PendingReplicas => Place::WaitsForReplicas,
        },
        None => waits(held).map_or(Place::Gone, |other| Place::Taken(other.id.clone())),
    }
}

/// The one material that waits for its rotation.
fn waits(held: &[HeldMaterial]) -> Option<&HeldMaterial> {
    held.iter().find(|held| !held.is_permanent())
}

/// How often the key was rotated on demand. No other rotation brings imported material.
fn rotations(held: &[HeldMaterial]) -> u32 {
    u32::try_from(held.iter().filter(|held| held.is_permanent() && held.rotated_at.is_some()).count())
        .unwrap_or(u32::MAX)
}

fn budget(used: u32) -> Value {
    json!({"used": used, "left": MOST_ROTATIONS.saturating_sub(used)})
}

/// From when on the key may be rotated again, if that lies ahead.
fn too_soon(last: OffsetDateTime, interval: Duration, now: OffsetDateTime) -> Option<OffsetDateTime> {
    let from = last.checked_add(time::Duration::try_from(interval).ok()?)?;
    (from > now).then_some(from)
}

fn is_other_material(error: &CallError) -> bool {
    error.kind == ErrorKind::IncorrectKeyMaterial
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

    fn held(id: &str, state: MaterialState, is_imported: bool) -> HeldMaterial {
        let rotated_at = matches!(state, MaterialState::Current | MaterialState::NonCurrent)
            .then_some(datetime!(2026-11-24 12:00 UTC));
        HeldMaterial { id: id.into(), state, is_imported, expiry: None, rotated_at }
    }

    #[test]
    fn only_the_jobs_own_material_that_waits_with_its_bytes_is_rotated_to() {
        use MaterialState::{Current, NonCurrent, Pending, PendingReplicas};
        for (shown, expected) in [
            (vec![held("own", Pending, true)], Place::Waits),
            (vec![held("own", PendingReplicas, true)], Place::WaitsForReplicas),
            (vec![held("own", Pending, false)], Place::Gone),
            (vec![held("own", PendingReplicas, false)], Place::Gone),
            (vec![held("own", Current, true)], Place::InForce),
            // In force, though its bytes are gone since.
            (vec![held("own", Current, false)], Place::InForce),
            (vec![held("own", NonCurrent, true), held("other", Current, true)], Place::Before),
            (vec![held("other", Pending, true)], Place::Taken("other".into())),
            (vec![held("other", Pending, false)], Place::Taken("other".into())),
            (vec![held("other", Current, true)], Place::Gone),
            (vec![], Place::Gone),
        ] {
            assert_eq!(place(&shown, "own"), expected, "{shown:?}");
        }
    }

    #[test]
    fn the_first_material_and_one_that_waits_are_no_rotations() {
        let first = HeldMaterial { rotated_at: None, ..held("first", MaterialState::NonCurrent, true) };
        let shown = [first, held("second", MaterialState::Current, true), held("third", MaterialState::Pending, true)];
        assert_eq!(rotations(&shown), 1);
        assert_eq!(budget(1), json!({"used": 1, "left": 24}));
        assert_eq!(budget(26), json!({"used": 26, "left": 0}));
    }

    #[test]
    fn an_interval_is_over_at_its_end() {
        let (last, hour) = (datetime!(2026-11-24 12:00 UTC), Duration::from_secs(3_600));
        assert_eq!(too_soon(last, hour, datetime!(2026-11-24 12:59:59 UTC)), Some(datetime!(2026-11-24 13:00 UTC)));
        assert_eq!(too_soon(last, hour, datetime!(2026-11-24 13:00 UTC)), None);
        assert_eq!(too_soon(last, Duration::from_secs(u64::MAX), last), None, "no interval that cannot be added");
    }
}
