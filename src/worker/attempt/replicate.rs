//! The other Regions of a multi-Region key: each of them is given the material that its primary was given, in its own
//! Region and under its own quota, before the key is rotated.
//!
//! A Region that stays away is tried last: the others come as far as they can meanwhile.

use super::import::{expiry_text, obtained};
use super::{Or, Run};
use crate::audit::{Fact, Kind};
use crate::job::{FailureCode, KeyArn, KeyKind, SourceMaterial};
use crate::kms::{ErrorKind, MaterialRole, Regions};
use crate::store::{Intent, ReplicaStep};
use serde_json::json;

impl Run {
    /// Before anything is changed: whether every replica is one that this deployment and this principal may touch.
    pub(super) fn may_reach_replicas(&mut self, regions: Option<&Regions>) -> Or<()> {
        let Some(regions) = regions else { return Ok(()) };
        for replica in &regions.replicas {
            self.may_reach(replica)?;
        }
        Ok(())
    }

    fn may_reach(&mut self, replica: &KeyArn) -> Or<()> {
        if !self.attempt.context.targets.contains(replica) {
            let message = format!(
                "the key has a replica in {}, which is no configured target; AWS rotates a key only when every replica has \
                 the material: configure it, or delete the replica",
                replica.region()
            );
            return self.fail(FailureCode::ReplicaNotATarget, &message);
        }
        let policy = self.attempt.context.policy.get();
        if let Err(why) = self.judged(&policy, replica) {
            let message = format!("the key has a replica in {}: {why}", replica.region());
            return self.fail(FailureCode::ReplicaNotAllowed, &message);
        }
        Ok(())
    }

    /// Every replica has the material when this returns. Which there are is read anew.
    pub(super) async fn replicate(&mut self, asked: &SourceMaterial, kind: KeyKind, id: &str) -> Or<()> {
        let regions = self.describe().await?.regions;
        let mut replicas = regions.map(|regions| regions.replicas).unwrap_or_default();
        replicas.sort_by_key(|replica| self.replicas.0.get(replica.region()) == Some(&ReplicaStep::Tried));
        for replica in &replicas {
            self.may_reach(replica)?;
            self.elsewhere = Some(replica.region().to_owned());
            self.replicas.0.insert(replica.region().to_owned(), ReplicaStep::Tried);
            self.give(replica, asked, kind, id).await?;
            self.replicas.0.insert(replica.region().to_owned(), ReplicaStep::Imported);
            self.elsewhere = None;
        }
        Ok(())
    }

    /// One replica. Repeating it is harmless: AWS compares the bytes with those of the id.
    async fn give(&mut self, replica: &KeyArn, asked: &SourceMaterial, kind: KeyKind, id: &str) -> Or<()> {
        let held = self.materials_of(replica).await?;
        if held.iter().any(|held| held.id == id && held.is_imported && held.expiry == Some(asked.expiry)) {
            return Ok(());
        }
        self.may_go_on().await?;
        let Some(source) = self.source_again(asked, kind).await? else {
            return self.fail(FailureCode::SourceKeyDeleted, "the source key is not on record any more");
        };
        let wrapping = self.choose_wrapping(asked, kind)?;
        let parameters = self.fresh_parameters(replica, wrapping).await?;
        crate::failpoint!("worker.after_replica_parameters");
        let was_in_doubt = self.in_doubt;
        let details = json!({
            "attempt": self.job.attempt,
            "region": replica.region(),
            "key_material_id": id,
            "expiry": expiry_text(asked.expiry),
        });
        let facts = [obtained(&parameters, replica.region()), Fact::new(Kind::ImportIntended, details)];
        let intent = Intent::Replicate { material_id: id.to_owned(), replicas: self.replicas.clone() };
        let effect = self.effect_known_early().unwrap_or_default();
        self.commit_all(intent, effect, facts).await?;
        crate::failpoint!("worker.after_replica_prepare");
        self.not_stopping()?;
        let wrapped = self.wrap(source, &parameters).await?;
        let role = MaterialRole::Existing(Some(id.to_owned()));
        match self.call_import(replica, asked, kind, role, &parameters, wrapped).await? {
            Ok(_) => {
                // A rotation that was asked for before may still be.
                self.in_doubt = was_in_doubt;
                crate::failpoint!("worker.after_replica_import");
                Ok(())
            }
            Err(error) if error.kind == ErrorKind::IncorrectKeyMaterial => {
                self.has_not_expired(asked, &error)?;
                // The primary may not have told it yet.
                let (text, aws_id) = (error.to_string(), error.aws_request_id.as_deref());
                self.wait_for_aws(error.operation, &text, aws_id, FailureCode::OtherMaterial)
            }
            // Another set is fetched for every try.
            Err(error) => self.read_failed(&error),
        }
    }
}
