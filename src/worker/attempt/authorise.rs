//! Whether the job's principal may still do this: asked of the policy in force, at each attempt and before each call that
//! changes AWS.

use super::{Or, Run};
use crate::job::{FailureCode, KeyArn};
use crate::policy::{Ask, Grant, Policy, Verdict};
use crate::retry::Class;
use crate::store::SettlementKind;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

/// How long a job that this worker would end is left to one that has the newest policy.
const LEFT_TO_OTHERS: Duration = Duration::from_secs(30);

impl Run {
    /// Goes on if it may. A job is ended by the newest policy that a worker has loaded, and by no older one: workers
    /// learn of a new one at different times.
    pub(super) async fn authorise(&mut self) -> Or<()> {
        let key = self.job.key.clone();
        self.authorise_on(&key, FailureCode::Revoked).await
    }

    /// The same on the job's key in another Region.
    pub(super) async fn authorise_on(&mut self, key: &KeyArn, code: FailureCode) -> Or<()> {
        loop {
            let policy = self.attempt.context.policy.get();
            let Err(why) = self.judged(&policy, key) else { return Ok(()) };
            let newest = self.attempt.context.store.newest_policy().await;
            if !Arc::ptr_eq(&policy, &self.attempt.context.policy.get()) {
                continue;
            }
            return match newest {
                Ok(Some(newest)) if newest != policy.digest() => self.leave_to_others(),
                Ok(_) => {
                    let message = match code {
                        FailureCode::Revoked => format!("no longer allowed: {why}"),
                        _ => format!("not allowed in {}, where the key has a replica: {why}", key.region()),
                    };
                    self.fail_by(code, &message, Some(policy.digest().to_owned()))
                }
                Err(error) => {
                    let message = error.to_string();
                    self.retry(Class::Transient, "policy", &message, None)
                }
            };
        }
    }

    fn leave_to_others<T>(&mut self) -> Or<T> {
        tracing::warn!(
            job.id = %self.job.id,
            "the policy of this worker does not allow the job, but is not the newest: left to another worker; send this one SIGHUP"
        );
        if !self.has_committed {
            // What ends it under any policy ends it here: there may be no worker any more that has loaded the newest.
            self.may_run()?;
            let until = self.job.now + LEFT_TO_OTHERS;
            return Err(self.settled(SettlementKind::PutBack { until, deadline: self.job.deadline }));
        }
        let reason = json!({
            "step": "policy",
            "class": Class::Transient.as_str(),
            "times": 1,
            "message": "the worker that had it has not loaded the newest policy",
            "aws_changed": self.may_have_changed_aws(),
        });
        let again = self.again(LEFT_TO_OTHERS, reason);
        Err(self.settled(again))
    }

    /// What the policy of this worker says to the job on this key: its own, or another Region's; or why it may not.
    pub(super) fn judged(&self, policy: &Policy, key: &KeyArn) -> Result<Grant, String> {
        let job = &self.job;
        if let Some(why) = policy.disowns(&job.principal, job.identity.as_deref()) {
            return Err(why);
        }
        let known = self.source_key.clone().or_else(|| self.chosen_source_key());
        let known = known.as_ref().map(|key| (key.name(), key.id()));
        // As the request says it, while no more is known.
        let dsm = job.request.work.dsm_key();
        let stated = dsm.and_then(|reference| self.attempt.context.dsm.full_name(reference).ok());
        let ask = Ask::of(&job.principal, &job.request, key, stated.as_deref(), job.now);
        let ask = match &known {
            Some((name, id)) => ask.with_known(name, id),
            None => ask,
        };
        match policy.judge(&ask) {
            Verdict::Allowed(grant) => Ok(grant),
            Verdict::Denied { why, .. } => Err(why),
        }
    }
}
