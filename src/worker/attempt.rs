//! One attempt at one import, step by step. Follow [`Attempt::run`] from top to bottom.
//!
//! Every step ends in one of two ways: it gives the next step what it needs, or it gives the
//! [`Settlement`] that ends the attempt.

mod judge;
mod verify;

use super::Context;
use super::batcher::Batcher;
use crate::audit::{Fact, Kind};
use crate::job::{
    Expiry, Failure, FailureCode, ImportParameters, JobSummary, KeyKind, Operation, Partition, SourceKeyRef, Wrapping,
    rfc3339,
};
use crate::kms::{CallError, ImportCall, KeyDescription, LeaseGuard, MaterialRole};
use crate::policy::Verdict;
use crate::retry::{self, Class};
use crate::source::{KekError, OpenError, PlainKey, SealedKey};
use crate::store::{
    ClaimedJob, Material, Parameters, Prepared, RetryState, Settlement, SettlementKind, Step, StoreError,
};
use crate::wrap::{WrapError, wrap};
use judge::{Verdict as ErrorVerdict, judge};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Kept parameters are used while at least this much of their day is left.
const PARAMETERS_MARGIN: time::Duration = time::Duration::minutes(10);
/// Attempts in a row that AWS is given to show what was made or changed moments ago: about a minute and a half.
const MOST_LOOKS: u32 = 15;
/// How long after its deadline a job still tries to learn what an unanswered call did.
const SETTLE_AFTER_DEADLINE: time::Duration = time::Duration::days(1);

/// What an attempt needs beside its job.
pub(super) struct Attempt {
    pub(super) context: Arc<Context>,
    pub(super) steps: Batcher<Step, Result<Prepared, StoreError>>,
    pub(super) wrapping: Arc<Semaphore>,
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
    source_key: Option<SealedKey>,
    /// A mutating call of this or an earlier attempt may have taken effect.
    in_doubt: bool,
    /// The mutating call of this attempt was not answered, and may still take effect.
    unanswered: bool,
    /// What becomes of the import parameters.
    parameters: Parameters,
}

impl Attempt {
    /// Runs the attempt; `None` when its lease is another's.
    pub(super) async fn run(self, job: ClaimedJob) -> Option<Settlement> {
        let mut run = Run {
            in_doubt: job.progress.in_doubt,
            unanswered: false,
            parameters: if job.progress.parameters.is_some() { Parameters::Kept } else { Parameters::Absent },
            source_key: None,
            attempt: self,
            job,
            facts: Vec::new(),
        };
        match run.steps().await {
            Ok(settlement) => Some(settlement),
            Err(end) => end.map(|settlement| *settlement),
        }
    }
}

impl Run {
    async fn steps(&mut self) -> Or<Settlement> {
        self.may_run()?;
        let before = self.describe().await?;
        let kind = self.preflight(&before)?;
        if self.job.progress.imported {
            let id = self.job.progress.key_material_id.clone();
            self.source_key.clone_from(&self.job.source_key);
            return self.verify(before, id).await;
        }
        let (key, is_new) = self.choose_source_key(kind, &before)?;
        self.source_key = Some(key.clone());
        let wrapping = self.choose_wrapping(kind)?;
        let (parameters, are_new) = self.parameters(wrapping).await?;
        self.commit_step(&key, is_new, &parameters, are_new).await?;
        let wrapped = self.wrap(key, &parameters).await?;
        let imported = self.import(kind, &before, &parameters, wrapped).await?;
        crate::failpoint!("worker.after_import");
        let after = match self.describe().await {
            Ok(after) => after,
            // The import was answered: what is left is to see it.
            Err(end) => return Err(self.after_import(end, imported)),
        };
        self.verify(after, imported).await
    }

    /// What is judged before anything is asked of AWS.
    fn may_run(&mut self) -> Or<()> {
        let job = &self.job;
        if self.attempt.context.policy.judge(&job.principal, &job.request) == Verdict::Denied {
            return self.fail(FailureCode::Revoked, "the policy no longer allows this; ask its keeper");
        }
        if !self.attempt.context.targets.contains(&job.key) {
            return self
                .fail(FailureCode::TargetRemoved, "the account and Region are no longer among the configured targets");
        }
        let is_open = job.progress.in_doubt || job.progress.imported;
        if job.now >= job.deadline {
            if !is_open {
                let last =
                    job.progress.last_error.as_ref().and_then(|error| error["message"].as_str()).unwrap_or("none");
                let message = format!("the deadline passed; the last error was: {last}");
                return self.fail(FailureCode::DeadlineExceeded, &message);
            }
            if job.now >= job.deadline + SETTLE_AFTER_DEADLINE {
                let message = "the deadline passed, and a day later AWS still had not said what became of the import; \
                               look at the key in AWS";
                return self.fail(FailureCode::OutcomeUnknown, message);
            }
        }
        let own_effect = job.progress.effect.clone().or_else(|| Some(self.effect(job.source_key.as_ref()?)));
        if let Some((late, until)) = &job.late
            && own_effect.as_ref() != Some(late)
        {
            // A call of an earlier job may still take effect, and would undo this one.
            self.attempt.context.metrics.lines_closed.inc();
            return Err(self.settled(SettlementKind::PutBack { until: *until, deadline: job.deadline }));
        }
        if let Expiry::At(valid_to) = job.request.expiry
            && valid_to <= job.now
        {
            return self.fail(FailureCode::ValidToPassed, "valid_to passed while the job waited; send a new request");
        }
        Ok(())
    }

    async fn describe(&mut self) -> Or<KeyDescription> {
        self.not_stopping()?;
        match self.attempt.context.kms.describe(&self.job.key, &self.attempt.guard).await {
            Ok(description) => Ok(description),
            Err(error) => self.read_failed(&error),
        }
    }

    /// Whether the key can take the material, as far as `DescribeKey` shows. Changes nothing.
    fn preflight(&mut self, key: &KeyDescription) -> Or<KeyKind> {
        if !key.is_customer_managed {
            return self.fail(FailureCode::KeyNotCustomerManaged, "the key is managed by AWS and takes no material");
        }
        if !key.is_external {
            let message =
                format!("the key's origin is {}, imports need a key created with Origin=EXTERNAL", key.origin);
            return self.fail(FailureCode::KeyNotExternal, &message);
        }
        let Some(kind) = KeyKind::of_key(&key.key_spec, Partition::of(self.job.key.partition())) else {
            let message = format!("this version imports no material into {} keys", key.key_spec);
            return self.fail(FailureCode::KeyKindNotSupported, &message);
        };
        match key.state.as_str() {
            "PendingImport" | "Enabled" => {}
            "PendingDeletion" | "PendingReplicaDeletion" => {
                return self
                    .fail(FailureCode::KeyPendingDeletion, "the key is scheduled for deletion; cancel that first");
            }
            "Disabled" => return self.fail(FailureCode::KeyDisabled, "the key is disabled; enable it first"),
            state => {
                let message = format!("the key is in state {state}");
                return self.wait_for_aws("DescribeKey", &message, None, FailureCode::KeyInvalidState);
            }
        }
        if let Some(expected) = &self.job.request.expect_current_material
            && key.current_material.as_ref() != Some(expected)
            && !self.in_doubt
            && !self.job.progress.imported
        {
            let message = "AWS holds another current material than expect_current_material names";
            return self.fail(FailureCode::UnexpectedCurrentMaterial, message);
        }
        Ok(kind)
    }

    /// The key whose bytes this job imports, and whether it was made just now.
    fn choose_source_key(&mut self, kind: KeyKind, description: &KeyDescription) -> Or<(SealedKey, bool)> {
        let SourceKeyRef::Local(named) = &self.job.request.source_key;
        let last = self.job.last_material.as_ref();
        let (key, is_new) = match (&self.job.source_key, named) {
            (Some(key), _) => (key.clone(), false),
            (None, Some(_)) => {
                let message = "there is no local key with this source_key_identifier; see keyferry keys list";
                return self.fail(FailureCode::SourceKeyUnknown, message);
            }
            (None, None) if last.is_some() || description.has_had_material() => {
                let message = match last {
                    Some(last) => format!(
                        "the key holds material already and takes only the same again: \
                         name its source key, source_key_identifier = {}",
                        last.source_key_name
                    ),
                    None => "the key holds material that was not imported by Keyferry and takes only the same again: \
                             import that as a source key and name it in source_key_identifier"
                        .to_owned(),
                };
                return self.fail(FailureCode::SourceKeyRequired, &message);
            }
            (None, None) => {
                let name = format!("keyferry-{}", self.job.id);
                let keyring = &self.attempt.context.keyring;
                let sealed = PlainKey::generate(kind)
                    .map_err(KekError::from)
                    .and_then(|plain| SealedKey::seal(keyring, uuid::Uuid::now_v7(), name, &plain));
                match sealed {
                    Ok(key) => (key, true),
                    Err(error) => {
                        let message = error.to_string();
                        return self.retry(Class::Transient, "generate", &message, None);
                    }
                }
            }
        };
        if key.sealed_material.is_none() {
            return self.fail(FailureCode::SourceKeyDeleted, "the source key was deleted");
        }
        if key.kind != kind {
            let message = format!(
                "the source key {} is of kind {} ({}), the KMS key needs {kind} ({})",
                key.name,
                key.kind,
                key.kind.shape(),
                kind.shape()
            );
            return self.fail(FailureCode::SourceKeyWrongKind, &message);
        }
        if let Some(last) = last
            && last.fingerprint.version == key.fingerprint.version
            && last.fingerprint != key.fingerprint
        {
            let message = format!(
                "the KMS key holds the material of source key {}; it takes only that one again",
                last.source_key_name
            );
            return self.fail(FailureCode::OtherMaterial, &message);
        }
        Ok((key, is_new))
    }

    fn choose_wrapping(&mut self, kind: KeyKind) -> Or<Wrapping> {
        let (request, partition) = (&self.job.request, Partition::of(self.job.key.partition()));
        let chosen = Wrapping::choose(kind, partition, request.wrapping_algorithm, request.wrapping_key_spec);
        let wrapping = match chosen {
            Ok(wrapping) => wrapping,
            Err(none) => return self.fail(FailureCode::WrappingNotAllowed, &none.to_string()),
        };
        if self.job.request.description.is_some() && !kind.has_material_ids() {
            let message = "AWS keeps a key_material_description for symmetric keys only; leave it out";
            return self.fail(FailureCode::DescriptionNotAllowed, message);
        }
        Ok(wrapping)
    }

    /// The set kept from an earlier attempt while it is good, else a fresh one, and whether it is fresh.
    async fn parameters(&mut self, wrapping: Wrapping) -> Or<(ImportParameters, bool)> {
        if let Some(kept) = &self.job.progress.parameters
            && kept.valid_to - self.job.now > PARAMETERS_MARGIN
            && kept.wrapping == wrapping
        {
            return Ok((kept.clone(), false));
        }
        self.not_stopping()?;
        match self.attempt.context.kms.parameters(&self.job.key, wrapping, &self.attempt.guard).await {
            Ok(parameters) => Ok((parameters, true)),
            Err(error) => self.read_failed(&error),
        }
    }

    /// From here on every attempt, by any worker, imports the same bytes, and a successor knows that a call
    /// may be under way.
    async fn commit_step(
        &mut self,
        key: &SealedKey,
        is_new: bool,
        parameters: &ImportParameters,
        are_new: bool,
    ) -> Or<()> {
        let mut facts = Vec::new();
        let (attempt, expiry) = (self.job.attempt, expiry_text(self.job.request.expiry));
        // Either says that an import is about to be sent; the first also that no other material ever will be.
        facts.push(if self.job.progress.is_chosen {
            Fact::new(Kind::ImportIntended, json!({"attempt": attempt, "expiry": expiry}))
        } else {
            Fact::new(
                Kind::MaterialChosen,
                json!({
                    "tier": "local",
                    "source_key_id": key.id,
                    "source_key_name": key.name,
                    "generated": is_new,
                    "attempt": attempt,
                    "expiry": expiry,
                }),
            )
        });
        if are_new {
            facts.push(Fact::new(
                Kind::ParametersObtained,
                json!({
                    "wrapping_algorithm": parameters.wrapping.algorithm.as_str(),
                    "wrapping_key_spec": parameters.wrapping.key_spec.as_str(),
                    "public_key_sha256": sha256_hex(&parameters.public_key),
                    "valid_to": rfc3339(parameters.valid_to),
                    "aws_request_id": parameters.aws_request_id,
                }),
            ));
        }
        let step = Step {
            lease: self.job.lease,
            job_id: self.job.id,
            source_key_id: key.id,
            generated: is_new.then(|| key.clone()),
            effect: self.effect(key),
            parameters: are_new.then(|| parameters.clone()),
            facts,
        };
        match self.attempt.steps.submit(step).await {
            Some(Ok(Prepared::Ready)) => {}
            Some(Ok(Prepared::LeaseLost)) | None => return Err(None),
            Some(Ok(Prepared::SourceKeyDeleted)) => {
                return self.fail(FailureCode::SourceKeyDeleted, "the source key was deleted");
            }
            Some(Err(error)) => {
                let message = error.to_string();
                return self.retry(Class::Transient, "store", &message, None);
            }
        }
        self.parameters = Parameters::Kept;
        crate::failpoint!("worker.after_prepare");
        if self.attempt.give_back.is_cancelled() {
            // The step said that a call may be under way; none is.
            let state = self.state();
            return Err(self.settled(self.given_back(state)));
        }
        Ok(())
    }

    /// Opens the sealed material and wraps it, off the async threads and no more at once than there are cores.
    async fn wrap(&mut self, key: SealedKey, parameters: &ImportParameters) -> Or<Vec<u8>> {
        enum Outcome {
            Wrapped(Vec<u8>),
            Sealed(OpenError),
            Unwrapped(WrapError),
        }
        let permit = Arc::clone(&self.attempt.wrapping).acquire_owned().await;
        let context = Arc::clone(&self.attempt.context);
        let public_key = parameters.public_key.clone();
        let wrapping = parameters.wrapping;
        let outcome = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let key = match key.open(&context.keyring) {
                Ok(key) => key,
                Err(error) => return Outcome::Sealed(error),
            };
            match wrap(key.material().expose(), &public_key, wrapping) {
                Ok(wrapped) => Outcome::Wrapped(wrapped),
                Err(error) => Outcome::Unwrapped(error),
            }
        })
        .await;
        match outcome {
            Ok(Outcome::Wrapped(wrapped)) => Ok(wrapped),
            Ok(Outcome::Sealed(error)) => self.fail(FailureCode::SourceKeyDamaged, &error.to_string()),
            Ok(Outcome::Unwrapped(error)) => {
                // A set that cannot be used: ask for another, once.
                let message = error.to_string();
                self.refresh("wrap", &message, None, FailureCode::UnexpectedAnswer)
            }
            Err(_) => self.retry(Class::Transient, "wrap", "wrapping broke off", None),
        }
    }

    /// The one mutating call. Gives the id that AWS gave the material.
    async fn import(
        &mut self,
        kind: KeyKind,
        before: &KeyDescription,
        parameters: &ImportParameters,
        wrapped: Vec<u8>,
    ) -> Or<Option<String>> {
        let role = match &before.current_material {
            Some(id) if kind.has_material_ids() => MaterialRole::Existing(id.clone()),
            _ => MaterialRole::First,
        };
        let call = ImportCall {
            import_token: &parameters.import_token,
            wrapped,
            expiry: self.job.request.expiry,
            description: self.description(kind, &role),
            role,
        };
        let answer = self.attempt.context.kms.import(&self.job.key, call, &self.attempt.guard).await;
        crate::failpoint!("worker.after_answer");
        match answer {
            Ok(imported) => {
                self.in_doubt = false;
                self.facts.push(Fact::new(
                    Kind::MaterialImported,
                    json!({
                        "attempt": self.job.attempt,
                        "key_material_id": imported.key_material_id,
                        "expiry": expiry_text(self.job.request.expiry),
                        "aws_request_id": imported.aws_request_id,
                    }),
                ));
                Ok(imported.key_material_id)
            }
            Err(error) => self.import_failed(&error),
        }
    }

    /// The job's mark, by which its material is known as ours; on a reimport AWS keeps the old text unless a
    /// new one is given.
    fn description(&self, kind: KeyKind, role: &MaterialRole) -> Option<String> {
        let given = self.job.request.description.as_deref();
        match role {
            _ if !kind.has_material_ids() => None,
            MaterialRole::Existing(_) if given.is_none() => None,
            _ => Some([given.unwrap_or(""), &format!("keyferry:{}", self.job.id)].join(" ").trim_start().to_owned()),
        }
    }

    /// A read-only call that did not succeed.
    fn read_failed<T>(&mut self, error: &CallError) -> Or<T> {
        let (step, text, id) = (error.operation, error.to_string(), error.aws_request_id.as_deref());
        match judge(error) {
            ErrorVerdict::Retry(class) => self.retry(class, step, &text, id),
            ErrorVerdict::Await(give_up) => self.wait_for_aws(step, &text, id, give_up),
            ErrorVerdict::Refresh(_) => self.retry(Class::Transient, step, &text, id),
            ErrorVerdict::Fail(code, advice) => self.fail(code, &format!("{text}; {advice}")),
        }
    }

    /// The import did not succeed, or was not answered.
    fn import_failed<T>(&mut self, error: &CallError) -> Or<T> {
        let (step, text, id) = (error.operation, error.to_string(), error.aws_request_id.as_deref());
        if error.kind.may_have_taken_effect() {
            self.in_doubt = true;
            self.unanswered = true;
        }
        match judge(error) {
            ErrorVerdict::Retry(class) => self.retry(class, step, &text, id),
            ErrorVerdict::Await(give_up) => self.wait_for_aws(step, &text, id, give_up),
            ErrorVerdict::Refresh(give_up) => self.refresh(step, &text, id, give_up),
            ErrorVerdict::Fail(code, advice) => self.fail(code, &format!("{text}; {advice}")),
        }
    }

    /// Throws the parameters away and tries at once with fresh ones. Refused a second time it is the end, unless an
    /// earlier call may have used the first set up: then it goes on, slowly, until the outcome is known.
    fn refresh<T>(&mut self, step: &str, message: &str, aws_request_id: Option<&str>, give_up: FailureCode) -> Or<T> {
        let class = match self.job.progress.refreshes {
            0 => Class::Immediate,
            _ if self.in_doubt => Class::Transient,
            _ => return self.fail(give_up, &format!("{message}; fresh import parameters did not help")),
        };
        self.parameters = Parameters::Refused;
        let state = self.state();
        Err(self.again(class, step, message, aws_request_id, state))
    }

    /// Tries again later; the deadline ends it.
    fn retry<T>(&mut self, class: Class, step: &str, message: &str, aws_request_id: Option<&str>) -> Or<T> {
        let state = self.state();
        Err(self.again(class, step, message, aws_request_id, state))
    }

    /// Tries again while AWS may not have caught up with itself.
    fn wait_for_aws<T>(
        &mut self,
        step: &str,
        message: &str,
        aws_request_id: Option<&str>,
        give_up: FailureCode,
    ) -> Or<T> {
        if self.times(Class::NotYetVisible) >= MOST_LOOKS {
            return self.fail(give_up, message);
        }
        self.retry(Class::NotYetVisible, step, message, aws_request_id)
    }

    fn again(
        &mut self,
        class: Class,
        step: &str,
        message: &str,
        aws_request_id: Option<&str>,
        state: RetryState,
    ) -> End {
        let times = self.times(class);
        let delay = retry::delay(class, times, retry::random_unit());
        self.attempt.context.metrics.retries.with_label_values(&[class.as_str()]).inc();
        tracing::warn!(
            job.id = %self.job.id, key = %self.job.key, step, attempt = self.job.attempt, retry.class = class.as_str(),
            retry.delay_ms = delay.as_millis(), "attempt failed: {message}"
        );
        let reason = json!({
            "step": step,
            "class": class.as_str(),
            "times": times,
            "message": message,
            "aws_request_id": aws_request_id,
            "aws_changed": state.in_doubt || self.job.progress.imported,
        });
        self.settled(SettlementKind::Retry { delay, deadline: self.job.deadline, reason, state })
    }

    /// How often this class has come up in a row, this time included.
    fn times(&self, class: Class) -> u32 {
        let before = self
            .job
            .progress
            .last_error
            .as_ref()
            .filter(|error| error["class"] == class.as_str())
            .and_then(|error| error["times"].as_u64())
            .unwrap_or(0);
        u32::try_from(before).unwrap_or(u32::MAX).saturating_add(1)
    }

    fn state(&self) -> RetryState {
        RetryState {
            in_doubt: self.in_doubt,
            parameters: self.parameters,
            reset_refreshes: self.unanswered,
            ..RetryState::default()
        }
    }

    fn fail<T>(&mut self, code: FailureCode, message: &str) -> Or<T> {
        let aws_changed = self.in_doubt || self.job.progress.imported;
        let source = self.source_key.as_ref().or(self.job.source_key.as_ref());
        let material = source.filter(|_| aws_changed).map(|key| self.material(key, None, self.job.progress.imported));
        let failure = Failure { code, message: message.to_owned(), aws_changed };
        tracing::warn!(job.id = %self.job.id, key = %self.job.key, error.code = code.as_str(), "job failed: {message}");
        let source_key_id = source.map(|key| key.id);
        Err(self.settled(SettlementKind::Ended { outcome: Err(failure), source_key_id, material }))
    }

    fn material(&self, key: &SealedKey, key_material_id: Option<String>, is_certain: bool) -> Material {
        Material {
            fingerprint: key.fingerprint.clone(),
            source_key_id: key.id,
            source_key_name: key.name.clone(),
            key_material_id,
            valid_to: match self.job.request.expiry {
                Expiry::Never => None,
                Expiry::At(at) => Some(at),
            },
            is_certain,
        }
    }

    /// What the mutating call does: equal texts mean that repeating one changes nothing.
    fn effect(&self, key: &SealedKey) -> String {
        format!("{} {} {}", Operation::Import.as_str(), key.id, expiry_text(self.job.request.expiry))
    }

    /// Between two steps a stopping worker gives the job back.
    fn not_stopping(&mut self) -> Or<()> {
        if self.attempt.give_back.is_cancelled() {
            return Err(self.settled(SettlementKind::PutBack { until: self.job.now, deadline: self.job.deadline }));
        }
        Ok(())
    }

    /// Given back by a stopping worker after something was learnt that must not be lost.
    fn given_back(&self, state: RetryState) -> SettlementKind {
        let reason = json!({
            "step": "stop",
            "class": Class::Immediate.as_str(),
            "times": 1,
            "message": "given back by a stopping worker",
            "aws_changed": state.in_doubt || state.imported.is_some(),
        });
        SettlementKind::Retry { delay: Duration::ZERO, deadline: self.job.deadline, reason, state }
    }

    #[expect(clippy::unnecessary_wraps, reason = "the other end, a lost lease, settles nothing")]
    fn settled(&mut self, kind: SettlementKind) -> End {
        Some(Box::new(self.settlement(kind)))
    }

    fn settlement(&mut self, kind: SettlementKind) -> Settlement {
        let late = self.source_key.as_ref().filter(|_| self.unanswered);
        Settlement {
            late_effect: late.map(|key| self.effect(key)),
            lease: self.job.lease,
            job: summary(&self.job),
            key_id: self.job.key_id,
            facts: std::mem::take(&mut self.facts),
            kind,
        }
    }
}

/// What is needed to end an attempt that broke off by a panic.
pub(super) struct Broken {
    settlement: Settlement,
}

impl Broken {
    pub(super) fn of(job: &ClaimedJob) -> Self {
        let reason = json!({"step": "internal", "class": Class::Transient.as_str(), "times": job.attempt,
                            "message": "the attempt broke off by a fault of Keyferry's own", "aws_changed": true});
        // Whether the import was sent is not known here.
        let state = RetryState { in_doubt: true, ..RetryState::default() };
        let delay = retry::delay(Class::Transient, job.attempt, retry::random_unit()).max(Duration::from_secs(1));
        let kind = SettlementKind::Retry { delay, deadline: job.deadline, reason, state };
        // Nor with which key: an effect that no job has closes the line to all of them for a while.
        let late_effect = Some(job.progress.effect.clone().unwrap_or_else(|| "unknown".into()));
        let settlement = Settlement {
            lease: job.lease,
            job: summary(job),
            key_id: job.key_id,
            facts: Vec::new(),
            late_effect,
            kind,
        };
        Self { settlement }
    }

    pub(super) fn retry(self) -> Settlement {
        tracing::error!(job.id = %self.settlement.job.id, "an attempt panicked; this is a fault of Keyferry's own");
        self.settlement
    }
}

fn summary(job: &ClaimedJob) -> JobSummary {
    JobSummary {
        id: job.id,
        key: job.key.clone(),
        principal: job.principal.clone(),
        request_id: job.request.id.as_str().to_owned(),
        operation: job.request.operation.as_str(),
        batch: job.request.batch.clone(),
        sequence: job.sequence,
        accepted_at: job.accepted_at,
        traceparent: job.traceparent.clone(),
    }
}

fn expiry_text(expiry: Expiry) -> String {
    match expiry {
        Expiry::Never => "never".into(),
        Expiry::At(at) => rfc3339(at),
    }
}

fn sha256_hex(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    hex::encode(sha2::Sha256::digest(bytes))
}
