//! What the worker counts and measures, by closed sets.

use crate::audit::Kind;
use crate::job::{FailureCode, RefusalCode, Scarce};
use crate::retry::Class;
use crate::store::{PoolUse, Store, Unpublished, Work};
use crate::telemetry::{Closed, Metrics};
use prometheus::{Gauge, Histogram, HistogramTimer, IntCounter, IntGauge};
use std::time::Duration;
use tracing::Span;

words! {
    /// A step of a job that takes time.
    pub(super) Stage {
        /// From acceptance, or `not_before`, to the first claim.
        Queue = "queue",
        /// The source key is fetched from its server.
        Source = "source",
        /// Import parameters are obtained from AWS.
        Parameters = "parameters",
        /// A key is generated.
        Generate = "generate",
        /// The intent is made durable.
        Prepare = "prepare",
        /// The material is opened and wrapped.
        Wrap = "wrap",
        /// AWS is asked to take the material.
        Import = "import",
        /// AWS is asked to rotate to it.
        Rotate = "rotate",
        /// AWS is asked to delete it.
        Delete = "delete",
        /// AWS is asked for what it shows afterwards.
        Verify = "verify",
        /// The end of the attempt is made durable.
        Settle = "settle",
    }
}

words! {
    /// How a job ends.
    pub(super) Outcome {
        /// As asked.
        Succeeded = "succeeded",
        /// With a code.
        Failed = "failed",
    }
}

words! {
    /// What a lane is doing.
    Lane {
        /// Nothing waits in it.
        Idle = "idle",
        /// All that is in it is under way, or waits for its time.
        Later = "later",
        /// A job could be claimed.
        Due = "due",
        /// A job is due, and the lane is closed.
        Closed = "closed",
        /// All that is in it is held by operators.
        Held = "held",
    }
}

words! {
    /// What an event that no broker has confirmed waits for.
    Unsent {
        /// Its turn.
        Fresh = "fresh",
        /// The broker refused it: the next try.
        Held = "held",
    }
}

words! {
    /// A connection of the pool.
    Connection {
        /// At work.
        Busy = "busy",
        /// Open.
        Idle = "idle",
    }
}

words! {
    /// How soon material expires.
    pub(super) Within {
        /// Tomorrow.
        Day = "1d",
        /// Next week.
        Week = "7d",
        /// Next month.
        Month = "30d",
        /// Next quarter.
        Quarter = "90d",
    }
}

words! {
    /// How often a key can still be rotated on demand, where that is few.
    pub(super) RotationsLeft {
        /// AWS allows 25 for good.
        None = "0",
        /// Time to plan for another key.
        Few = "1-5",
    }
}

impl Within {
    pub(super) fn span(self) -> Duration {
        let days = match self {
            Self::Day => 1,
            Self::Week => 7,
            Self::Month => 30,
            Self::Quarter => 90,
        };
        Duration::from_secs(days * 86_400)
    }
}

/// The series that a worker writes. Clones write the same ones.
#[derive(Clone, Debug)]
pub struct Meters {
    stages: Closed<Stage, Histogram>,
    seconds: Closed<Outcome, Histogram>,
    succeeded: IntCounter,
    failed: Closed<FailureCode, IntCounter>,
    retries: Closed<Class, IntCounter>,
    entries: Closed<Kind, IntCounter>,
    refusals: Closed<RefusalCode, IntCounter>,
    lanes: Closed<Lane, IntGauge>,
    events: Closed<Unsent, IntGauge>,
    connections: Closed<Connection, IntGauge>,
    expiring: Closed<Within, IntGauge>,
    rotations_left: Closed<RotationsLeft, IntGauge>,
    slots: Closed<Scarce, IntCounter>,
    waits: Closed<Scarce, IntCounter>,
    throttled: Closed<Scarce, IntCounter>,
    factors: Closed<Scarce, Gauge>,
    slowed: Closed<Scarce, IntGauge>,
    metrics: Metrics,
}

/// Measures a step until it is dropped, however the step ends.
#[must_use]
pub(super) struct Timing {
    _timer: HistogramTimer,
    /// The attempt's child, where traces are exported.
    _span: Span,
}

impl Meters {
    /// Makes the series; all of them are there at zero.
    pub fn of(metrics: &Metrics) -> Self {
        Self {
            stages: Closed::histograms(&metrics.job_stage_seconds),
            seconds: Closed::histograms(&metrics.job_seconds),
            succeeded: metrics.jobs_finished.with_label_values(&["succeeded", ""]),
            failed: Closed::make(|code| metrics.jobs_finished.with_label_values(&["failed", code])),
            retries: Closed::counters(&metrics.retries),
            entries: Closed::counters(&metrics.audit_entries),
            refusals: Closed::counters(&metrics.refusals),
            lanes: Closed::gauges(&metrics.lanes),
            events: Closed::gauges(&metrics.outbox_events),
            connections: Closed::gauges(&metrics.store_connections),
            expiring: Closed::gauges(&metrics.keys_expiring),
            rotations_left: Closed::gauges(&metrics.keys_rotations_left),
            slots: Closed::counters(&metrics.quota_slots),
            waits: Closed::counters(&metrics.quota_waits),
            throttled: Closed::counters(&metrics.quota_throttled),
            factors: Closed::make(|operation| {
                let factor = metrics.quota_factor.with_label_values(&[operation]);
                factor.set(1.0);
                factor
            }),
            slowed: Closed::gauges(&metrics.quota_lanes_slowed),
            metrics: metrics.clone(),
        }
    }

    /// A step begins.
    pub(super) fn time(&self, stage: Stage) -> Timing {
        Timing {
            _timer: self.stages.of(stage).start_timer(),
            _span: tracing::debug_span!("step", otel.name = stage.as_str()),
        }
    }

    /// A job was claimed for the first time.
    pub(super) fn waited(&self, time: Duration) {
        self.stages.of(Stage::Queue).observe(time.as_secs_f64());
    }

    /// A job that was under way here ended so long after its acceptance.
    pub(super) fn took(&self, outcome: Outcome, time: Duration) {
        self.seconds.of(outcome).observe(time.as_secs_f64());
    }

    /// A job ended; with a code if it failed.
    pub(super) fn finished(&self, failed: Option<FailureCode>) {
        failed.map_or(&self.succeeded, |code| self.failed.of(code)).inc();
    }

    /// An attempt will be repeated.
    pub(super) fn retried(&self, class: Class) {
        self.retries.of(class).inc();
    }

    /// What this process knows of its own store.
    pub(super) fn note_own(&self, store: &Store) {
        for &kind in Kind::ALL {
            up_to(self.entries.of(kind), store.entries_written(kind));
        }
        for &code in RefusalCode::ALL {
            up_to(self.refusals.of(code), store.refusals_written(code));
        }
        let PoolUse { busy, idle, most, waiters } = store.pool_use();
        self.connections.of(Connection::Busy).set(gauge(busy));
        self.connections.of(Connection::Idle).set(gauge(idle));
        self.metrics.store_connections_max.set(gauge(most));
        self.metrics.store_waiters.set(gauge(waiters));
    }

    /// What all workers together have to do.
    #[expect(
        clippy::disallowed_methods,
        reason = "a scraper compares the time with its own, and decides nothing by it"
    )]
    pub(super) fn note_work(&self, work: &Work, events: &Unpublished) {
        self.metrics.jobs_waiting.set(work.waiting);
        self.metrics.oldest_job.set(work.oldest);
        self.metrics.oldest_due.set(work.oldest_due);
        self.lanes.of(Lane::Idle).set(work.idle);
        self.lanes.of(Lane::Later).set(work.later);
        self.lanes.of(Lane::Due).set(work.due);
        self.lanes.of(Lane::Closed).set(work.closed);
        self.lanes.of(Lane::Held).set(work.held);
        self.events.of(Unsent::Fresh).set(events.fresh);
        self.events.of(Unsent::Held).set(events.held);
        self.metrics.oldest_event.set(events.oldest);
        self.metrics.store_sampled.set(time::OffsetDateTime::now_utc().unix_timestamp());
    }

    /// A slot was reserved.
    pub(super) fn took_slot(&self, operation: Scarce) {
        self.slots.of(operation).inc();
    }

    /// A job was given back because no slot was near.
    pub(super) fn waits_for_slot(&self, operation: Scarce) {
        self.waits.of(operation).inc();
    }

    /// A call was throttled that had its slot.
    pub(super) fn throttled(&self, operation: Scarce) {
        self.throttled.of(operation).inc();
    }

    /// How far AWS's throttling has slowed lanes down: by operation the lowest part of its rate, and how many have not all.
    pub(super) fn note_slowed(&self, slowed: &[(Scarce, f64, i64)]) {
        for (operation, factor, lanes) in slowed {
            self.factors.of(*operation).set(*factor);
            self.slowed.of(*operation).set(*lanes);
        }
    }

    /// How many keys can be rotated no more, and how many few times only.
    pub(super) fn note_rotations_left(&self, none: i64, few: i64) {
        self.rotations_left.of(RotationsLeft::None).set(none);
        self.rotations_left.of(RotationsLeft::Few).set(few);
    }

    /// How many keys have material that expires so soon.
    pub(super) fn note_expiring(&self, within: Within, keys: i64) {
        self.expiring.of(within).set(keys);
    }

    /// How many have material that has expired, and how many of them within the last hour.
    pub(super) fn note_expired(&self, keys: i64, lately: i64) {
        self.metrics.keys_expired.set(keys);
        self.metrics.keys_expired_lately.set(lately);
    }
}

fn up_to(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

fn gauge(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
