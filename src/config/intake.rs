//! `[intake]`: how many jobs may wait.

use super::Rule;
use serde::{Deserialize, Serialize};

/// What is refused, and when no more is taken, because too many jobs wait. Principals have limits of their own in the
/// policy.
///
/// Waiting jobs cost disk and nothing else: ten million on one key were measured. So the limits stop a publisher that has
/// run wild, and nobody who means it; no one key, account or Region reaches the fuse alone.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Intake {
    /// Jobs of one KMS key that wait at most; more are refused (`line_full`).
    pub max_waiting_per_key: u64,
    /// Jobs of one account and Region that wait at most; more are refused (`lane_full`).
    pub max_waiting_per_lane: u64,
    /// Jobs that wait in all, above which no more messages are taken from the queues.
    pub pause_above: u64,
    /// Jobs that wait in all, below which they are again.
    pub resume_below: u64,
}

impl Default for Intake {
    fn default() -> Self {
        Self {
            max_waiting_per_key: 10_000_000,
            max_waiting_per_lane: 10_000_000,
            pause_above: 20_000_000,
            resume_below: 18_000_000,
        }
    }
}

impl Intake {
    /// What its values must keep to, as `(setting, holds, rule)`.
    pub(super) fn rules(&self) -> [Rule; 4] {
        let is_count = |count: u64| (1..=1_000_000_000_000).contains(&count);
        let count = "1 to 1000000000000";
        [
            ("intake.max_waiting_per_key", is_count(self.max_waiting_per_key), count),
            ("intake.max_waiting_per_lane", is_count(self.max_waiting_per_lane), count),
            ("intake.pause_above", is_count(self.pause_above), count),
            (
                "intake.resume_below",
                (1..=self.pause_above).contains(&self.resume_below),
                "1 to intake.pause_above, and well below it: each turn costs what is in hand a delivery",
            ),
        ]
    }
}
