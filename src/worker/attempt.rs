//! One attempt at one job, step by step. Follow [`Run::steps`] from top to bottom, then the file of the operation.
//!
//! Every step ends in one of two ways: it gives the next step what it needs, or it gives the
//! [`Settlement`] that ends the attempt.

mod authorise;
mod choose;
mod delete;
mod dry_run;
mod end;
mod import;
mod judge;
mod remove;
mod replicate;
mod rotate;
mod slot;
mod source_key;
mod verify;

use super::Context;
use super::batcher::Batcher;
use crate::audit::Fact;
use crate::job::{Expiry, FailureCode, KeyArn, KeyKind, Partition, Scarce, Work};
use crate::kms::{HeldMaterial, KeyDescription, LeaseGuard};
use crate::source::PlainKey;
use crate::store::{
    Answered, ClaimedJob, Ending, Parameters, Prepared, QuotaAnswer, QuotaAsk, QuotaLane, QuotaSlot, Removed, Replicas,
    Settlement, SettlementKind, Step, StoreError,
};
pub(super) use end::Broken;
use source_key::SourceKey;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// How long after its deadline a job still tries to learn what an unanswered call did.
const SETTLE_AFTER_DEADLINE: time::Duration = time::Duration::days(1);

/// What an attempt needs beside its job.
pub(super) struct Attempt {
    pub(super) context: Arc<Context>,
    pub(super) steps: Batcher<Step, Result<Prepared, StoreError>>,
    pub(super) quota: Batcher<QuotaAsk, Result<QuotaAnswer, StoreError>>,
    /// For opening and wrapping, which take a core for less than a millisecond.
    pub(super) computing: Arc<Semaphore>,
    /// For generating, which takes one for seconds, and must not keep the others waiting.
    pub(super) generating: Arc<Semaphore>,
    pub(super) give_back: CancellationToken,
    pub(super) guard: LeaseGuard,
}

/// Either what the next step needs, or the end of the attempt.
type Or<T> = Result<T, End>;

/// How an attempt ends; `None`: the lease is another's, and nothing may be written.
type End = Option<Box<Settlement>>;

/// An attempt under way: the job and what it has found out.
struct Run {
    attempt: Attempt,
    job: ClaimedJob,
    facts: Vec<Fact>,
    /// The chosen key, once it is.
    source_key: Option<SourceKey>,
    /// The bytes of a key that a KMIP server gave in this attempt, until they are wrapped.
    fetched: Option<PlainKey>,
    /// What the mutating calls do, once that is committed.
    effect: Option<String>,
    /// A mutating call of this or an earlier attempt may have taken effect.
    in_doubt: bool,
    /// A mutating call of this attempt was not answered, and may still take effect.
    unanswered: bool,
    /// AWS answered every mutating call; what is left is to see it.
    answered: Option<Answered>,
    /// The id of a rotate's own material, once AWS has said that the key has it.
    waiting: Option<String>,
    /// The material that was in force when a rotate first committed itself to bring another.
    rotated_from: Option<String>,
    /// How far a rotate has come in the other Regions.
    replicas: Replicas,
    /// The Region in which the job is at work just now, if it is not its key's.
    elsewhere: Option<String>,
    /// Rotations of the key that AWS showed in this attempt.
    rotations: Option<u32>,
    /// What AWS said in this attempt that it deleted.
    removed: Removed,
    /// What becomes of the import parameters.
    parameters: Parameters,
    /// This attempt has written something that the next one must know.
    has_committed: bool,
    /// A slot that was not used yet.
    slot: Option<QuotaSlot>,
    /// Where the last call with a scarce quota had its slot.
    last_lane: Option<QuotaLane>,
    /// Where calls of this attempt had theirs.
    had_slots: Vec<QuotaLane>,
}

impl Attempt {
    /// Runs the attempt; `None` when its lease is another's.
    pub(super) async fn run(self, mut job: ClaimedJob) -> Option<Settlement> {
        let slot = job.slot.take();
        let progress = &job.progress;
        let mut run = Run {
            in_doubt: progress.in_doubt,
            unanswered: false,
            answered: progress.answered.then(|| Answered { key_material_id: progress.key_material_id.clone() }),
            waiting: progress.key_material_id.clone(),
            rotated_from: progress.rotated_from.clone(),
            replicas: progress.replicas.clone(),
            elsewhere: None,
            rotations: None,
            removed: Removed::Nothing,
            parameters: if progress.parameters.is_some() { Parameters::Kept } else { Parameters::Absent },
            effect: progress.effect.clone(),
            source_key: None,
            fetched: None,
            has_committed: false,
            slot,
            last_lane: None,
            had_slots: Vec::new(),
            attempt: self,
            facts: Vec::new(),
            job,
        };
        let end = run.steps().await;
        run.give_back_slot();
        match end {
            Ok(settlement) => Some(settlement),
            Err(end) => end.map(|settlement| *settlement),
        }
    }
}

impl Run {
    async fn steps(&mut self) -> Or<Settlement> {
        if let Some(id) = self.to_remove() {
            return self.remove(&id).await;
        }
        self.authorise().await?;
        self.may_run()?;
        let before = self.describe().await?;
        let kind = self.preflight(&before)?;
        match self.job.request.work.clone() {
            Work::Import(asked) => self.import(&asked, kind, before).await,
            Work::Rotate(asked) => self.rotate(&asked, kind, before).await,
            Work::Delete(target) => self.delete(&target, kind, before).await,
        }
    }

    /// What is judged before anything is asked of AWS.
    fn may_run(&mut self) -> Or<()> {
        let job = &self.job;
        if let Some(ending) = job.ending
            && (ending == Ending::Abandoned || !(self.in_doubt || self.answered.is_some()))
        {
            return self.ended_by_operator(ending);
        }
        if !self.attempt.context.targets.contains(&job.key) {
            return self
                .fail(FailureCode::TargetRemoved, "the account and Region are no longer among the configured targets");
        }
        if job.now >= job.deadline {
            if !(self.in_doubt || self.answered.is_some()) {
                let last =
                    job.progress.last_error.as_ref().and_then(|error| error["message"].as_str()).unwrap_or("none");
                let message = format!("the deadline passed; the last error was: {last}");
                return self.fail(FailureCode::DeadlineExceeded, &message);
            }
            if job.now >= job.deadline.saturating_add(SETTLE_AFTER_DEADLINE) {
                let message = "the deadline passed, and a day later AWS still had not said what became of the job; \
                               look at the key in AWS";
                return self.fail(FailureCode::OutcomeUnknown, message);
            }
        }
        if self.effect_is_known_early() {
            self.judge_late(self.own_effect().as_ref())?;
        }
        let job = &self.job;
        if let Some(Expiry::At(valid_to)) = job.request.work.material().map(|asked| asked.expiry)
            && valid_to <= job.now
            // What AWS has taken is only looked at.
            && self.answered.is_none()
        {
            return self.fail(FailureCode::ValidToPassed, "valid_to passed while the job waited; send a new request");
        }
        Ok(())
    }

    /// A call of an earlier job may still take effect, and would undo this one, unless it does the same.
    fn judge_late(&mut self, own_effect: Option<&String>) -> Or<()> {
        // A dry run changes nothing that a late call could undo.
        self.wait_out(|run, late| own_effect != Some(late) && !run.job.request.dry_run)
    }

    /// The line stays closed while a call that was sent before may take effect, and this effect stands against the next step.
    fn wait_out(&mut self, stands_against: impl FnOnce(&Self, &String) -> bool) -> Or<()> {
        match &self.job.late {
            Some((late, until)) if stands_against(self, late) => {
                self.attempt.context.metrics.lines_closed.inc();
                let (until, deadline) = (*until, self.job.deadline);
                Err(self.settled(SettlementKind::PutBack { until, deadline }))
            }
            _ => Ok(()),
        }
    }

    /// Which object on a KMIP server a name means is known only when it was fetched.
    fn effect_is_known_early(&self) -> bool {
        let is_import = matches!(self.job.request.work, Work::Import(_));
        self.effect.is_some() || !is_import || self.job.request.work.dsm_key().is_none()
    }

    async fn describe(&mut self) -> Or<KeyDescription> {
        self.not_stopping()?;
        match self.attempt.context.kms.describe(&self.job.key, &self.attempt.guard).await {
            Ok(description) => Ok(description),
            Err(error) => self.read_failed(&error),
        }
    }

    /// Every material of a symmetric key.
    async fn materials(&mut self) -> Or<Vec<HeldMaterial>> {
        let key = self.job.key.clone();
        self.materials_of(&key).await
    }

    /// The same of the job's key in another Region.
    async fn materials_of(&mut self, key: &KeyArn) -> Or<Vec<HeldMaterial>> {
        self.not_stopping()?;
        self.slot(key, Scarce::ListKeyRotations).await?;
        match self.attempt.context.kms.materials(key, &self.attempt.guard).await {
            Ok(materials) => Ok(materials),
            Err(error) => self.read_failed(&error),
        }
    }

    /// Whether the key can take the material, or give it up, as far as `DescribeKey` shows. Changes nothing.
    fn preflight(&mut self, key: &KeyDescription) -> Or<KeyKind> {
        let is_delete = matches!(self.job.request.work, Work::Delete(_));
        if !key.is_customer_managed {
            return self.fail(FailureCode::KeyNotCustomerManaged, "the key is managed by AWS and takes no material");
        }
        if !key.is_external {
            let message =
                format!("the key's origin is {}, imports need a key created with Origin=EXTERNAL", key.origin);
            return self.fail(FailureCode::KeyNotExternal, &message);
        }
        let Some(kind) = KeyKind::of_key(&key.key_spec, self.partition()) else {
            let message = format!("AWS takes no imported material into {} keys, as far as is known", key.key_spec);
            return self.fail(FailureCode::KeyKindNotSupported, &message);
        };
        match key.state.as_str() {
            // What AWS has taken is only looked at, whatever has become of the key since.
            _ if self.answered.is_some() => {}
            "PendingImport" | "Enabled" => {}
            // AWS deletes material in these states too, and leaves the state as it is.
            "Disabled" | "PendingDeletion" if is_delete => {}
            "PendingDeletion" | "PendingReplicaDeletion" => {
                return self
                    .fail(FailureCode::KeyPendingDeletion, "the key is scheduled for deletion; cancel that first");
            }
            // What becomes of the state by an import is UNVERIFIED.
            "Disabled" => return self.fail(FailureCode::KeyDisabled, "the key is disabled; enable it first"),
            state => {
                let message = format!("the key is in state {state}");
                return self.wait_for_aws("DescribeKey", &message, None, FailureCode::KeyInvalidState);
            }
        }
        let Some(expected) = &self.job.request.expect_current_material else { return Ok(kind) };
        if !kind.has_material_ids() {
            let message = format!(
                "AWS gives ids to materials of symmetric keys only; leave expect_current_material out for {kind}"
            );
            return self.fail(FailureCode::MaterialIdNotAllowed, &message);
        }
        // An import that may have taken effect may itself have made it untrue; a delete has committed what it means.
        let is_past = self.in_doubt
            || self.answered.is_some()
            || self.waiting.is_some()
            || self.brought_before().is_some()
            || self.job.progress.delete_ids.is_some();
        if key.current_material.as_ref() != Some(expected) && !is_past {
            let message = "AWS holds another current material than expect_current_material names";
            return self.fail(FailureCode::UnexpectedCurrentMaterial, message);
        }
        Ok(kind)
    }

    /// What the mutating calls do, as far as it can be told already.
    fn own_effect(&self) -> Option<String> {
        let computed = || match &self.job.request.work {
            Work::Import(asked) => {
                Some(import::effect(&self.job.source_key.as_ref()?.id.to_string(), asked.material.expiry))
            }
            Work::Rotate(_) => self.effect_known_early(),
            Work::Delete(_) => None,
        };
        self.effect.clone().or_else(computed)
    }

    /// A rotate's effect is its own: not even one with the same source key may pass a late one.
    fn effect_known_early(&self) -> Option<String> {
        matches!(self.job.request.work, Work::Rotate(_)).then(|| format!("rotate {}", self.job.id))
    }

    fn partition(&self) -> Partition {
        Partition::of(self.job.key.partition())
    }
}

fn sha256_hex(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    hex::encode(sha2::Sha256::digest(bytes))
}
