//! The other Regions of a multi-Region key: each of them is given the material that its primary was given, in its own
//! Region and under its own quota, before the key is rotated.
//!
//! A Region that stays away is tried last: the others come as far as they can meanwhile.

use super::import::{expiry_text, obtained};
use super::judge::{Verdict, judge};
use super::{Or, Run};
use crate::audit::{Fact, Kind};
use crate::job::{FailureCode, KeyArn, KeyKind, SourceMaterial};
use crate::kms::{ErrorKind, MaterialRole, Regions};
use crate::retry::Class;
use crate::store::{Intent, Parameters, ReplicaStep};
use serde_json::json;

impl Run {
    /// Before anything is changed: whether every replica is one that this deployment and this principal may touch.
    pub(super) async fn may_reach_replicas(&mut self, regions: Option<&Regions>) -> Or<()> {
        let Some(regions) = regions else { return Ok(()) };
        for replica in &regions.replicas {
            self.may_reach(replica).await?;
        }
        Ok(())
    }

    async fn may_reach(&mut self, replica: &KeyArn) -> Or<()> {
        if !self.attempt.context.targets.contains(replica) {
            let message = format!(
                "the key has a replica in {}, which is no configured target; AWS rotates a key only when every replica has \
                 the material: configure it, or delete the replica",
                replica.region()
            );
            return self.fail(FailureCode::ReplicaNotATarget, &message);
        }
        self.authorise_on(replica, FailureCode::ReplicaNotAllowed).await
    }

    /// Every replica has the material when this returns. Which there are is read anew.
    pub(super) async fn replicate(&mut self, asked: &SourceMaterial, kind: KeyKind, id: &str) -> Or<()> {
        let regions = self.describe().await?.regions;
        let mut replicas = regions.map(|regions| regions.replicas).unwrap_or_default();
        // First the one whose quota this attempt was given a slot of.
        let at_hand = self.slot.as_ref().map(|slot| slot.lane.region.clone());
        // Of several that stay away another begins each time.
        let turn = usize::try_from(self.job.attempt).unwrap_or(0) % replicas.len().max(1);
        replicas.rotate_left(turn);
        replicas.sort_by_key(|replica| {
            let was_tried = self.replicas.0.get(replica.region()) == Some(&ReplicaStep::Tried);
            (at_hand.as_deref() != Some(replica.region()), was_tried)
        });
        for replica in &replicas {
            self.may_reach(replica).await?;
            self.elsewhere = Some(replica.region().to_owned());
            self.replicas.0.insert(replica.region().to_owned(), ReplicaStep::Tried);
            self.give(replica, asked, kind, id).await?;
            self.replicas.0.insert(replica.region().to_owned(), ReplicaStep::Imported);
            self.elsewhere = None;
        }
        Ok(())
    }

    /// An operator can hold the replica's Region, or the replica itself. Its own key's hold parks the job; this one makes it
    /// try later.
    pub(super) async fn is_not_held(&mut self, replica: &KeyArn) -> Or<()> {
        match self.attempt.context.store.is_held(&self.job.principal, replica).await {
            Ok(false) => Ok(()),
            Ok(true) => self.retry(Class::Transient, "hold", "an operator holds the replica", None),
            Err(error) => {
                let message = error.to_string();
                self.retry(Class::Transient, "store", &message, None)
            }
        }
    }

    /// One replica. Repeating it is harmless: AWS compares the bytes with those of the id.
    async fn give(&mut self, replica: &KeyArn, asked: &SourceMaterial, kind: KeyKind, id: &str) -> Or<()> {
        let held = self.materials_of(replica).await?;
        if held.iter().any(|held| held.id == id && held.is_imported && held.expiry == Some(asked.expiry)) {
            return Ok(());
        }
        self.is_in_time("its replicas")?;
        self.may_go_on().await?;
        self.is_not_held(replica).await?;
        let Some(source) = self.source_again(asked, kind).await? else {
            return self.fail(FailureCode::SourceKeyDeleted, "the source key is not on record any more");
        };
        let wrapping = self.choose_wrapping(asked, kind)?;
        let (parameters, are_new) = self.parameters(replica, wrapping).await?;
        crate::failpoint!("worker.after_replica_parameters");
        let was_in_doubt = self.in_doubt;
        let details = json!({
            "attempt": self.job.attempt,
            "region": replica.region(),
            "key_material_id": id,
            "expiry": expiry_text(asked.expiry),
        });
        let facts =
            are_new.then(|| obtained(&parameters)).into_iter().chain([Fact::new(Kind::ImportIntended, details)]);
        let intent = Intent::Replicate {
            replica: replica.clone(),
            material_id: id.to_owned(),
            replicas: self.replicas.clone(),
            parameters: Box::new(parameters.clone()),
        };
        let effect = self.effect_known_early().unwrap_or_default();
        self.commit_all(intent, effect, facts).await?;
        // In the place of the set that brought the material to the primary, which is used up.
        self.parameters = Parameters::Kept;
        crate::failpoint!("worker.after_replica_prepare");
        self.not_stopping()?;
        let wrapped = self.wrap(source, &parameters).await?;
        let role = MaterialRole::Existing(Some(id.to_owned()));
        match self.call_import(replica, asked, kind, role, &parameters, wrapped).await? {
            Ok(_) => {
                // A rotation that was asked for before may still be.
                self.in_doubt = was_in_doubt;
                self.parameters = Parameters::Used;
                crate::failpoint!("worker.after_replica_import");
                Ok(())
            }
            Err(error) if error.kind == ErrorKind::IncorrectKeyMaterial => {
                self.has_not_expired(asked, &error)?;
                // The primary may not have told it yet.
                let (text, aws_id) = (error.to_string(), error.aws_request_id.as_deref());
                self.wait_for_aws(error.operation, &text, aws_id, FailureCode::OtherMaterial)
            }
            Err(error) => {
                if let Verdict::Refresh(_) = judge(&error) {
                    // Another set is fetched for the next try.
                    self.parameters = Parameters::Refused;
                }
                self.read_failed(&error)
            }
        }
    }
}
