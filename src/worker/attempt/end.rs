//! The ends of an attempt: retried with a bound, failed with a reason, given back.

use super::judge::{Verdict, judge};
use super::source_key::SourceKey;
use super::{End, Or, Run};
use crate::job::{Expiry, Failure, FailureCode, JobSummary, ScarceCall, Work};
use crate::kms::CallError;
use crate::retry::{self, Class};
use crate::store::{ClaimedJob, Ending, Material, Parameters, Removed, RetryState, Settlement, SettlementKind};
use serde_json::json;
use std::borrow::Cow;
use std::time::Duration;

/// Attempts in a row that AWS is given to show what was made or changed moments ago: about a minute and a half.
const MOST_LOOKS: u32 = 15;
/// The same once AWS has answered that it did as asked: more than ten minutes, where AWS says "several".
const MOST_LOOKS_AFTER_ANSWER: u32 = 100;

impl Run {
    /// A read-only call that did not succeed.
    pub(super) fn read_failed<T>(&mut self, error: &CallError) -> Or<T> {
        let (step, text, id) = (error.operation, error.to_string(), error.aws_request_id.as_deref());
        match judge(error) {
            Verdict::Retry(class) => self.retry(class, step, &text, id),
            Verdict::Await(give_up) => self.wait_for_aws(step, &text, id, give_up),
            Verdict::Refresh(_) => self.retry(Class::Transient, step, &text, id),
            Verdict::Fail(code, advice) => self.fail(code, &format!("{text}; {advice}")),
        }
    }

    /// Tries again later; the deadline ends it.
    pub(super) fn retry<T>(&mut self, class: Class, step: &str, message: &str, aws_request_id: Option<&str>) -> Or<T> {
        let message = self.placed(message);
        let times = self.times(class);
        let reason = |run: &Self| {
            json!({
                "step": step,
                "class": class.as_str(),
                "times": times,
                "message": message,
                "aws_request_id": aws_request_id,
                "aws_changed": run.may_have_changed_aws(),
            })
        };
        if class == Class::Throttled
            && let Some(end) = self.throttled(step, times, reason)
        {
            return end;
        }
        let delay = retry::delay(class, times, retry::random_unit());
        self.attempt.context.meters.retried(class);
        tracing::warn!(
            job.id = %self.job.id, job.attempt = self.job.attempt, kms.key.arn = %self.job.key, job.step = step, retry.class = class.as_str(),
            retry.delay_ms = delay.as_millis(), "attempt failed: {message}"
        );
        let reason = reason(self);
        let again = self.again(delay, reason);
        Err(self.settled(again))
    }

    /// With the Region, where that is not the key's.
    fn placed<'a>(&self, message: &'a str) -> Cow<'a, str> {
        match &self.elsewhere {
            Some(region) => format!("{region}: {message}").into(),
            None => message.into(),
        }
    }

    /// Tries again while AWS may not have caught up with itself.
    pub(super) fn wait_for_aws<T>(
        &mut self,
        step: &str,
        message: &str,
        aws_request_id: Option<&str>,
        give_up: FailureCode,
    ) -> Or<T> {
        if self.has_looked_enough() {
            return self.fail(give_up, message);
        }
        self.retry(Class::NotYetVisible, step, message, aws_request_id)
    }

    /// Whether AWS has had its time to catch up with itself.
    pub(super) fn has_looked_enough(&self) -> bool {
        // Whoever abandons a job waits for its end.
        let has_answered = self.answered.is_some() || (self.waiting.is_some() && self.job.ending.is_none());
        let most = if has_answered { MOST_LOOKS_AFTER_ANSWER } else { MOST_LOOKS };
        self.times(Class::NotYetVisible) >= most
    }

    /// The job's end.
    pub(super) fn fail<T>(&mut self, code: FailureCode, message: &str) -> Or<T> {
        self.fail_by(code, message, None)
    }

    /// The job's end, by a policy of this digest if by one.
    pub(super) fn fail_by<T>(&mut self, code: FailureCode, message: &str, policy: Option<String>) -> Or<T> {
        let aws_changed = self.may_have_changed_aws();
        let source = self.source_key.clone().or_else(|| self.chosen_source_key());
        let id = self.answered.clone().and_then(|answer| answer.key_material_id).or_else(|| self.waiting.clone());
        let is_certain = self.answered.is_some() || self.waiting.is_some();
        let material = source.as_ref().filter(|_| aws_changed).map(|key| self.material(key, id, is_certain));
        let message = self.placed(message);
        let failure = Failure { code, message: message.clone().into_owned(), aws_changed, policy };
        tracing::warn!(
            job.id = %self.job.id, kms.key.arn = %self.job.key, error.code = code.as_str(), "job failed: {message}"
        );
        // A dry run brings nothing, whichever key it looked at.
        let source_key_id = source.filter(|_| !self.job.request.dry_run).and_then(|key| key.local_id());
        Err(self.settled(SettlementKind::Ended { outcome: Err(failure), source_key_id, material }))
    }

    /// An operator wants the job ended, and nothing stands against that.
    pub(super) fn ended_by_operator<T>(&mut self, ending: Ending) -> Or<T> {
        let is_rotate = matches!(self.job.request.work, Work::Rotate(_));
        if ending == Ending::Abandoned && self.answered.is_none() && self.waiting.is_some() && is_rotate {
            // Its next claim begins with taking its material away.
            return self.give_back("abandon", "given back: an operator has abandoned it, and its material waits");
        }
        let answered = self.answered.as_ref().filter(|_| matches!(self.job.request.work, Work::Import(_)));
        let Failure { code, message, .. } = match (ending, answered) {
            (Ending::Abandoned, Some(answer)) => Failure::abandoned_after_answer(answer.key_material_id.as_deref()),
            _ => ending.failure(self.may_have_changed_aws()),
        };
        self.fail(code, &message)
    }

    /// Between two steps a stopping worker gives the job back.
    pub(super) fn not_stopping(&mut self) -> Or<()> {
        if !self.attempt.give_back.is_cancelled() {
            return Ok(());
        }
        self.give_back("stop", "given back by a stopping worker")
    }

    /// An operator holds what the job is within: its next claim finds that, and the line is parked.
    pub(super) fn held<T>(&mut self) -> Or<T> {
        tracing::info!(job.id = %self.job.id, kms.key.arn = %self.job.key, "given back: an operator holds it");
        self.give_back("hold", "given back: an operator holds it")
    }

    fn give_back<T>(&mut self, step: &str, message: &str) -> Or<T> {
        if !self.has_committed {
            return Err(self.settled(SettlementKind::PutBack { until: self.job.now, deadline: self.job.deadline }));
        }
        // What was learnt must not be lost, nor a step stand that says a call may be under way when none is.
        let reason = json!({
            "step": step,
            "class": Class::Immediate.as_str(),
            "times": 1,
            "message": message,
            "aws_changed": self.may_have_changed_aws(),
        });
        let again = self.again(Duration::ZERO, reason);
        Err(self.settled(again))
    }

    /// The record of what this job puts, or may have put, on the key.
    pub(super) fn material(&self, key: &SourceKey, key_material_id: Option<String>, is_certain: bool) -> Material {
        let valid_to = match self.job.request.work.material().map(|asked| asked.expiry) {
            Some(Expiry::At(at)) => Some(at),
            Some(Expiry::Never) | None => None,
        };
        Material {
            fingerprint: key.fingerprint().clone(),
            source_tier: key.tier(),
            source_key_id: key.id(),
            source_key_name: key.name(),
            key_material_id,
            valid_to,
            is_certain,
        }
    }

    #[expect(clippy::unnecessary_wraps, reason = "the other end, a lost lease, settles nothing")]
    pub(super) fn settled(&mut self, kind: SettlementKind) -> End {
        Some(Box::new(self.settlement(kind)))
    }

    pub(super) fn settlement(&mut self, kind: SettlementKind) -> Settlement {
        Settlement {
            late_effect: self.effect.clone().filter(|_| self.unanswered),
            removed: std::mem::take(&mut self.removed),
            lease: self.job.lease,
            job: summary(&self.job),
            key_id: self.job.key_id,
            rotations: self.rotations,
            facts: std::mem::take(&mut self.facts),
            kind,
        }
    }

    pub(super) fn may_have_changed_aws(&self) -> bool {
        self.in_doubt
            || self.answered.is_some()
            || self.waiting.is_some()
            || self.removed != Removed::Nothing
            || !self.job.progress.deleted_ids.is_empty()
    }

    pub(super) fn again(&self, delay: Duration, reason: serde_json::Value) -> SettlementKind {
        let state = self.retry_state();
        let next = match (&self.answered, &self.waiting, self.parameters) {
            (Some(_), ..) => ScarceCall::Nothing,
            (None, Some(_), _) => ScarceCall::RotateKeyOnDemand,
            (None, None, Parameters::Kept) => ScarceCall::ImportKeyMaterial,
            (None, None, _) => self.job.request.first_call(),
        };
        SettlementKind::Retry { delay, deadline: self.job.deadline, reason, state, next }
    }

    pub(super) fn retry_state(&self) -> RetryState {
        RetryState {
            in_doubt: self.in_doubt,
            parameters: self.parameters,
            answered: self.answered.clone(),
            waiting: self.waiting.clone(),
            replicas: self.replicas.clone(),
            reset_refreshes: self.unanswered,
        }
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
}

/// What is needed to end an attempt that broke off by a panic.
pub(in crate::worker) struct Broken {
    settlement: Settlement,
}

impl Broken {
    pub(in crate::worker) fn of(job: &ClaimedJob) -> Self {
        // Whether a call was sent is not known here; a dry run sends none.
        let in_doubt = !job.request.dry_run;
        let reason = json!({"step": "internal", "class": Class::Transient.as_str(), "times": job.attempt,
                            "message": "the attempt broke off by a fault of Keyferry's own", "aws_changed": in_doubt});
        let delay = retry::delay(Class::Transient, job.attempt, retry::random_unit()).max(Duration::from_secs(1));
        let kind = SettlementKind::Retry {
            delay,
            deadline: job.deadline,
            reason,
            state: RetryState { in_doubt, ..RetryState::default() },
            next: job.request.first_call(),
        };
        // Nor with which key: an effect that no job has closes the line to all of them for a while.
        let late_effect = in_doubt.then(|| job.progress.effect.clone().unwrap_or_else(|| "unknown".into()));
        let settlement = Settlement {
            lease: job.lease,
            job: summary(job),
            key_id: job.key_id,
            rotations: None,
            facts: Vec::new(),
            late_effect,
            removed: Removed::Nothing,
            kind,
        };
        Self { settlement }
    }

    pub(in crate::worker) fn retry(self) -> Settlement {
        tracing::error!(job.id = %self.settlement.job.id, "an attempt panicked; this is a fault of Keyferry's own");
        self.settlement
    }
}

fn summary(job: &ClaimedJob) -> JobSummary {
    JobSummary {
        id: job.id,
        key: job.key.clone(),
        retry_of: job.retry_of,
        principal: job.principal.clone(),
        request_id: job.request.id.as_str().to_owned(),
        operation: job.request.operation().as_str(),
        dry_run: job.request.dry_run,
        batch: job.request.batch.clone(),
        sequence: job.sequence,
        accepted_at: job.accepted_at,
        traceparent: job.traceparent.clone(),
    }
}
