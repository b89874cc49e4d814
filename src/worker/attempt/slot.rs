//! Slots of scarce quotas: taken directly before the call that needs one, given back where it was not made.

use super::{Or, Run};
use crate::job::{KeyArn, Scarce};
use crate::retry::Class;
use crate::store::{QuotaAnswer, QuotaAsk, QuotaLane, SettlementKind};
use serde_json::Value;
use std::time::{Duration, Instant};

/// Throttled calls of a job in a row after which it waits like others that failed: it is its key that is hot, or AWS has
/// nothing to give, and the lane's slots are better used by other keys.
const MOST_THROTTLED: u32 = 3;
/// Who waits longer for a slot asks once more whether the call is still wanted.
const LONG: Duration = Duration::from_millis(500);

impl Run {
    /// Waits until the quota of this key's account and Region has a slot for a call; directly before the call. Where none
    /// is near, the job goes back to the front of that lane: what it has committed stays, so that this costs nothing.
    pub(super) async fn slot(&mut self, key: &KeyArn, operation: Scarce) -> Or<()> {
        self.last_lane = None;
        if self.attempt.context.rates.pace(key.account(), key.region(), operation).is_none() {
            return Ok(());
        }
        let lane = QuotaLane::of(key, operation);
        // An attempt that needs several of a lane would never get them, were it sent back for each.
        let is_again = self.had_slots.contains(&lane);
        let slot = match self.slot.take_if(|slot| slot.lane == lane) {
            Some(slot) if !slot.is_missed() => slot,
            missed => match self.attempt.quota.submit(QuotaAsk::Slot { lane: lane.clone(), missed, is_again }).await {
                Some(Ok(QuotaAnswer::Slot(slot))) => slot,
                Some(Ok(QuotaAnswer::Free)) => return Ok(()),
                Some(Ok(QuotaAnswer::None | QuotaAnswer::Noted)) => return self.await_slot(lane, None),
                Some(Err(error)) => {
                    let message = error.to_string();
                    return self.retry(Class::Transient, "store", &message, None);
                }
                None => return Err(None),
            },
        };
        let waited = self.wait_until(slot.at, key).await;
        if waited.is_err() {
            self.attempt.quota.post(QuotaAsk::GiveBack(slot));
            return waited;
        }
        if !is_again {
            self.had_slots.push(lane.clone());
        }
        self.last_lane = Some(lane);
        Ok(())
    }

    async fn wait_until(&mut self, at: Instant, key: &KeyArn) -> Or<()> {
        let give_back = self.attempt.give_back.clone();
        let is_far = at > Instant::now() + LONG;
        tokio::select! {
            biased;
            () = tokio::time::sleep_until(at.into()) => {}
            () = give_back.cancelled() => return self.not_stopping(),
        }
        if !is_far {
            return Ok(());
        }
        self.may_go_on().await?;
        if *key == self.job.key { Ok(()) } else { self.is_not_held(key).await }
    }

    /// The job waits in the lane, before all others there.
    fn await_slot<T>(&mut self, lane: QuotaLane, throttled: Option<Value>) -> Or<T> {
        self.attempt.context.meters.waits_for_slot(lane.operation);
        let state = self.has_committed.then(|| self.retry_state());
        let deadline = self.job.deadline;
        Err(self.settled(SettlementKind::AwaitSlot { deadline, state, lane, throttled }))
    }

    /// AWS throttled a call that had its slot: all workers slow down. The job is tried again as soon as the lane has a slot.
    /// `None`: it waits as others do that failed.
    pub(super) fn throttled<T>(
        &mut self,
        step: &str,
        times: u32,
        reason: impl FnOnce(&Self) -> Value,
    ) -> Option<Or<T>> {
        let lane = self.last_lane.take().filter(|lane| lane.operation.as_str() == step)?;
        self.attempt.context.meters.throttled(lane.operation);
        self.attempt.quota.post(QuotaAsk::Throttled { lane: lane.clone(), line_id: self.job.lease.line_id });
        if times > MOST_THROTTLED {
            return None;
        }
        self.attempt.context.meters.retried(Class::Throttled);
        let reason = reason(self);
        // What the job knew before this attempt and what it has learnt since must both be told.
        let state = Some(self.retry_state());
        let deadline = self.job.deadline;
        Some(Err(self.settled(SettlementKind::AwaitSlot { deadline, state, lane, throttled: Some(reason) })))
    }

    /// The attempt is over: what it did not use is another's.
    pub(super) fn give_back_slot(&mut self) {
        if let Some(slot) = self.slot.take() {
            self.attempt.quota.post(QuotaAsk::GiveBack(slot));
        }
    }
}
