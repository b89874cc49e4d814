//! Every metric of the process. Labels come from closed sets only.

mod catalogue;
mod closed;

pub use catalogue::Family;
pub use closed::{AwsCalls, Closed};

use catalogue::Catalogue;
use prometheus::{
    Gauge, GaugeVec, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry, TextEncoder,
};
use std::sync::Arc;

/// The text that [`Metrics::render`] gives.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A call to a server in the same room takes milliseconds; one is given up after a minute at most.
const CALL_SECONDS: [f64; 14] = [0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
/// From a step of a lone job to one that waits its turn behind a large batch, or three days for its deadline.
const JOB_SECONDS: [f64; 16] =
    [0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 15.0, 60.0, 300.0, 3_600.0, 21_600.0, 86_400.0];

/// Handles of all metrics; a clone counts into the same series.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    families: Arc<[Family]>,
    /// Messages decided at intake, by transport and verdict: accepted, duplicate, refused.
    pub intake_messages: IntCounterVec,
    /// Jobs that ended, by outcome.
    pub jobs_finished: IntCounterVec,
    /// Attempts that will be repeated, by the class of their error.
    pub retries: IntCounterVec,
    /// AWS calls by operation and result.
    pub aws_calls: IntCounterVec,
    /// How long an answer to a call of AWS took, by operation. A receive of SQS waits for messages.
    pub aws_call_seconds: HistogramVec,
    /// How long the steps of jobs took, by stage.
    pub job_stage_seconds: HistogramVec,
    /// From acceptance, or `not_before`, to the end of jobs that were under way here, by outcome.
    pub job_seconds: HistogramVec,
    /// Slots that were reserved for calls with a scarce quota, by operation.
    pub quota_slots: IntCounterVec,
    /// Jobs given back because no such slot was near, by operation.
    pub quota_waits: IntCounterVec,
    /// Calls that AWS throttled although they had a slot, by operation.
    pub quota_throttled: IntCounterVec,
    /// The lowest part of its rate that a lane of the whole store has, by operation.
    pub quota_factor: GaugeVec,
    /// Lanes of the whole store that have less than all of it, by operation.
    pub quota_lanes_slowed: IntGaugeVec,
    /// Leases that another worker took over or that ran out.
    pub leases_lost: IntCounter,
    /// Claims put back because a late effect may still contradict them.
    pub lines_closed: IntCounter,
    /// Events confirmed by the broker.
    pub events_published: IntCounter,
    /// Publishes that the broker could not route or would not take.
    pub events_held: IntCounter,
    /// Sessions opened with a broker, by transport and role: ingress, events.
    pub broker_sessions: IntCounterVec,
    /// Those of them that ended by a fault, by the same.
    pub broker_sessions_broken: IntCounterVec,
    /// Tries to open a session that failed, by the same.
    pub broker_sessions_failed: IntCounterVec,
    /// Whether RabbitMQ takes no messages on a session's connection, for want of memory or disk, by transport and role.
    pub broker_blocked: IntGaugeVec,
    /// Transactions that Postgres did not carry out, by what ailed it: see the store's kinds.
    pub store_faults: IntCounterVec,
    /// Connections to Postgres that were made: the first ones, and those in the place of others.
    pub store_connects: IntCounter,
    /// Tries to connect to Postgres that failed.
    pub store_connects_failed: IntCounter,
    /// Messages of SQS that this process could do no more about and that come again, by reason: `not_deleted`,
    /// `not_dead_lettered`, `receipt_lost`.
    pub sqs_messages_left: IntCounterVec,
    /// Whether no messages are taken because too many jobs wait, by transport.
    pub ingress_paused: IntGaugeVec,
    /// Jobs under way.
    pub jobs_running: IntGauge,
    /// Messages refused, by code: once for each refusal, however often its message comes.
    pub refusals: IntCounterVec,
    /// Entries of the audit trail that this process wrote, by kind.
    pub audit_entries: IntCounterVec,
    /// Jobs that wait, those under way included, in the whole store.
    pub jobs_waiting: IntGauge,
    /// Age of the oldest job that is under way, tried again, or next in its lane.
    pub oldest_job: Gauge,
    /// How long the job has been due that no worker has claimed for the longest time.
    pub oldest_due: Gauge,
    /// Lanes of the whole store, by state.
    pub lanes: IntGaugeVec,
    /// Events of the whole store that no broker has confirmed, by state.
    pub outbox_events: IntGaugeVec,
    /// Age of the oldest of them.
    pub oldest_event: Gauge,
    /// KMS keys with material that expires soon, by how soon.
    pub keys_expiring: IntGaugeVec,
    /// KMS keys that can be rotated on demand no more, or few times only.
    pub keys_rotations_left: IntGaugeVec,
    /// KMS keys with material that has expired.
    pub keys_expired: IntGauge,
    /// Those of them that have within the last hour.
    pub keys_expired_lately: IntGauge,
    /// When the gauges of the whole store were last read.
    pub store_sampled: IntGauge,
    /// Connections of the pool, by state.
    pub store_connections: IntGaugeVec,
    /// Connections that the pool may have.
    pub store_connections_max: IntGauge,
    /// Who waits for one.
    pub store_waiters: IntGauge,
    /// Whether a part of this process works, by part.
    pub parts_up: IntGaugeVec,
    /// Times that the policy's file was read again, by result: loaded, failed.
    pub policy_reloads: IntCounterVec,
    /// When the policy in force was loaded, as on record, in seconds since 1970.
    pub policy_loaded: IntGauge,
    /// Holds of operators that are in force.
    pub holds: IntGauge,
    /// KMIP operations by connection, operation and outcome: ok, refused, failed. Connections are those of the settings.
    pub dsm_requests: IntCounterVec,
    /// Round trips to KMIP servers by connection; a message may hold several operations.
    pub dsm_request_seconds: HistogramVec,
    /// Connections open to KMIP servers, by connection.
    pub dsm_connections: IntGaugeVec,
    /// Idle connections that a KMIP server had closed, by connection.
    pub dsm_reconnects: IntCounterVec,
    /// Whether a KMIP server answered when it was last asked, by connection and server.
    pub dsm_servers_up: IntGaugeVec,
}

impl Metrics {
    /// Makes and registers everything; series that are known exist at zero.
    #[expect(clippy::too_many_lines, reason = "some lines for each metric; nothing branches")]
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Catalogue::new();
        let counters = |name: &str, help: &str, labels: &[&str]| registry.counters(name, help, labels);
        let counter = |name: &str, help: &str| registry.counter(name, help);
        let gauges = |name: &str, help: &str, labels: &[&str]| registry.gauges(name, help, labels);
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        registry.info("keyferry_build_info", "Always 1; the version is a label.", &version)?;
        registry.foreign(prometheus::process_collector::ProcessCollector::for_self())?;
        let metrics = Self {
            intake_messages: counters(
                "keyferry_intake_messages_total",
                "Messages decided at intake.",
                &["transport", "verdict"],
            )?,
            jobs_finished: counters("keyferry_jobs_finished_total", "Jobs that ended.", &["outcome", "code"])?,
            retries: counters("keyferry_retries_total", "Attempts that will be repeated.", &["reason"])?,
            aws_calls: counters("keyferry_aws_calls_total", "AWS calls.", &["operation", "result"])?,
            aws_call_seconds: registry.histograms(
                "keyferry_aws_call_seconds",
                "How long answers of AWS took.",
                &["operation"],
                &CALL_SECONDS,
            )?,
            job_stage_seconds: registry.histograms(
                "keyferry_job_stage_seconds",
                "How long the steps of jobs took.",
                &["stage"],
                &JOB_SECONDS,
            )?,
            job_seconds: registry.histograms(
                "keyferry_job_seconds",
                "From acceptance to the end of jobs.",
                &["outcome"],
                &JOB_SECONDS,
            )?,
            quota_slots: counters(
                "keyferry_quota_slots_total",
                "Slots reserved for calls with a scarce quota.",
                &["operation"],
            )?,
            quota_waits: counters(
                "keyferry_quota_waits_total",
                "Jobs given back because no slot was near.",
                &["operation"],
            )?,
            quota_throttled: counters(
                "keyferry_quota_throttled_total",
                "Calls that AWS throttled although they had a slot.",
                &["operation"],
            )?,
            quota_factor: registry.reals(
                "keyferry_quota_lowest_factor",
                "The lowest part of its rate that a lane has after AWS throttled, in the whole store.",
                &["operation"],
            )?,
            quota_lanes_slowed: gauges(
                "keyferry_quota_lanes_slowed",
                "Lanes of the whole store that have less than all of their rate.",
                &["operation"],
            )?,
            leases_lost: counter("keyferry_leases_lost_total", "Leases taken over by another worker or run out.")?,
            lines_closed: counter(
                "keyferry_lines_closed_total",
                "Claims put back because a late effect may contradict them.",
            )?,
            events_published: counter("keyferry_events_published_total", "Events confirmed by the broker.")?,
            events_held: counter(
                "keyferry_events_held_total",
                "Publishes that the broker could not route or refused.",
            )?,
            broker_sessions: counters(
                "keyferry_broker_sessions_total",
                "Sessions opened with a broker.",
                &["transport", "role"],
            )?,
            broker_sessions_broken: counters(
                "keyferry_broker_sessions_broken_total",
                "Sessions with a broker that ended by a fault.",
                &["transport", "role"],
            )?,
            broker_sessions_failed: counters(
                "keyferry_broker_sessions_failed_total",
                "Tries to open a session with a broker that failed.",
                &["transport", "role"],
            )?,
            broker_blocked: broker_blocked(&registry)?,
            store_faults: store_faults(&registry)?,
            store_connects: counter("keyferry_store_connects_total", "Connections to PostgreSQL that were made.")?,
            store_connects_failed: counter(
                "keyferry_store_connects_failed_total",
                "Tries to connect to PostgreSQL that failed.",
            )?,
            sqs_messages_left: counters(
                "keyferry_sqs_messages_left_total",
                "Messages of SQS that could not be settled and come again.",
                &["reason"],
            )?,
            ingress_paused: ingress_paused(&registry)?,
            jobs_running: gauge(&registry, "keyferry_jobs_running", "Jobs under way in this process.")?,
            refusals: counters("keyferry_refusals_total", "Refusals put on record.", &["code"])?,
            audit_entries: counters(
                "keyferry_audit_entries_total",
                "Entries of the audit trail that this process wrote.",
                &["kind"],
            )?,
            jobs_waiting: gauge(&registry, "keyferry_jobs_waiting", "Jobs that have not ended, in the whole store.")?,
            oldest_job: registry.real(
                "keyferry_oldest_job_age_seconds",
                "Age of the oldest job under way, tried again, or next in its lane.",
            )?,
            oldest_due: registry
                .real("keyferry_oldest_due_age_seconds", "How long a job has been due that no worker has claimed.")?,
            lanes: gauges("keyferry_lanes", "Lanes of the whole store.", &["state"])?,
            outbox_events: gauges(
                "keyferry_outbox_events",
                "Events that no broker has confirmed, among the oldest 2,000.",
                &["state"],
            )?,
            oldest_event: registry.real("keyferry_oldest_event_age_seconds", "Age of the oldest unpublished event.")?,
            keys_expiring: gauges(
                "keyferry_keys_expiring",
                "KMS keys with material that expires so soon; 5,000 stands for that many or more.",
                &["within"],
            )?,
            keys_rotations_left: gauges(
                "keyferry_keys_rotations_left",
                "KMS keys that can be rotated on demand so many times more; 5,000 stands for that many or more.",
                &["left"],
            )?,
            keys_expired: gauge(
                &registry,
                "keyferry_keys_expired",
                "KMS keys with material that has expired; 5,000 stands for that many or more.",
            )?,
            keys_expired_lately: gauge(
                &registry,
                "keyferry_keys_expired_last_hour",
                "KMS keys with material that has expired within the last hour; 5,000 stands for that many or more.",
            )?,
            store_sampled: gauge(
                &registry,
                "keyferry_store_sampled_timestamp_seconds",
                "When the gauges of the whole store were last read, in seconds since 1970.",
            )?,
            store_connections: gauges("keyferry_store_connections", "Connections to PostgreSQL.", &["state"])?,
            store_connections_max: gauge(
                &registry,
                "keyferry_store_connections_max",
                "Connections to PostgreSQL at most.",
            )?,
            store_waiters: gauge(&registry, "keyferry_store_waiters", "Who waits for a connection to PostgreSQL.")?,
            parts_up: gauges("keyferry_part_up", "Whether a part of this process works.", &["part"])?,
            policy_reloads: policy_reloads(&registry)?,
            policy_loaded: gauge(
                &registry,
                "keyferry_policy_loaded_timestamp_seconds",
                "When the policy in force was loaded, in seconds since 1970.",
            )?,
            holds: gauge(&registry, "keyferry_holds", "Holds of operators that are in force.")?,
            dsm_requests: counters(
                "keyferry_dsm_requests_total",
                "KMIP operations.",
                &["connection", "operation", "outcome"],
            )?,
            dsm_request_seconds: registry.histograms(
                "keyferry_dsm_request_seconds",
                "Round trips to KMIP servers.",
                &["connection"],
                &CALL_SECONDS,
            )?,
            dsm_connections: gauges("keyferry_dsm_connections", "Connections open to KMIP servers.", &["connection"])?,
            dsm_reconnects: counters(
                "keyferry_dsm_reconnects_total",
                "Idle connections that a KMIP server had closed.",
                &["connection"],
            )?,
            dsm_servers_up: gauges(
                "keyferry_dsm_server_up",
                "Whether a KMIP server answered when it was last asked.",
                &["connection", "server"],
            )?,
            registry: Registry::new(),
            families: Arc::default(),
        };
        let (registry, families) = registry.into_parts();
        let metrics = Self { registry, families: families.into(), ..metrics };
        for transport in ["rabbitmq", "sqs"] {
            for verdict in ["accepted", "duplicate", "refused"] {
                metrics.intake_messages.with_label_values(&[transport, verdict]);
            }
            for role in ["ingress", "events"] {
                metrics.broker_sessions.with_label_values(&[transport, role]);
                metrics.broker_sessions_broken.with_label_values(&[transport, role]);
                metrics.broker_sessions_failed.with_label_values(&[transport, role]);
            }
        }
        for reason in ["not_deleted", "not_dead_lettered", "receipt_lost"] {
            metrics.sqs_messages_left.with_label_values(&[reason]);
        }
        Ok(metrics)
    }

    /// Every metric with a name of Keyferry's own.
    pub fn families(&self) -> &[Family] {
        &self.families
    }

    /// The exposition in Prometheus's text format.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

fn broker_blocked(registry: &Catalogue) -> Result<IntGaugeVec, prometheus::Error> {
    let help = "Whether the broker takes no messages for want of memory or disk.";
    let gauge = registry.gauges("keyferry_broker_blocked", help, &["transport", "role"])?;
    // It blocks none but those who publish.
    gauge.with_label_values(&["rabbitmq", "events"]);
    Ok(gauge)
}

/// The store knows the kinds.
fn store_faults(registry: &Catalogue) -> Result<IntCounterVec, prometheus::Error> {
    let help = "Transactions that Postgres did not carry out, by what ailed it.";
    registry.counters("keyferry_store_faults_total", help, &["kind"])
}

fn ingress_paused(registry: &Catalogue) -> Result<IntGaugeVec, prometheus::Error> {
    let help = "Whether no messages are taken because too many jobs wait.";
    let gauge = registry.gauges("keyferry_ingress_paused", help, &["transport"])?;
    for transport in ["rabbitmq", "sqs"] {
        gauge.with_label_values(&[transport]);
    }
    Ok(gauge)
}

fn policy_reloads(registry: &Catalogue) -> Result<IntCounterVec, prometheus::Error> {
    let help = "Times that the policy's file was read again.";
    let counter = registry.counters("keyferry_policy_reloads_total", help, &["result"])?;
    for result in ["loaded", "failed"] {
        counter.with_label_values(&[result]);
    }
    Ok(counter)
}

fn gauge(registry: &Catalogue, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
    registry.gauge(name, help)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_series_exist_at_zero() {
        let text = Metrics::new().unwrap().render().unwrap();
        for line in [
            "keyferry_intake_messages_total{transport=\"sqs\",verdict=\"duplicate\"} 0",
            "keyferry_events_held_total 0",
            "keyferry_ingress_paused{transport=\"sqs\"} 0",
            "keyferry_broker_blocked{role=\"events\",transport=\"rabbitmq\"} 0",
            "keyferry_broker_sessions_total{role=\"ingress\",transport=\"rabbitmq\"} 0",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }

    /// `name type labels`, of each row of the table in the README.
    fn documented() -> Vec<String> {
        let readme = include_str!("../../README.md");
        let section = readme.split("\n## Metrics\n").nth(1).unwrap().split("\n## ").next().unwrap();
        let rows = section.lines().filter(|line| line.starts_with("| `keyferry_"));
        rows.map(|row| {
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            format!("{} {} {}", cells[1].trim_matches('`'), cells[2], cells[3].replace(['`', '-'], ""))
        })
        .collect()
    }

    #[test]
    fn the_readme_has_a_row_for_each_metric_and_no_other() {
        let metrics = Metrics::new().unwrap();
        let described = |family: &Family| format!("{} {} {}", family.name, family.kind, family.labels.join(", "));
        let mut registered: Vec<String> = metrics.families().iter().map(described).collect();
        let mut documented = documented();
        registered.sort_unstable();
        documented.sort_unstable();
        assert_eq!(registered, documented);
    }

    #[test]
    fn names_follow_the_conventions() {
        for Family { name, kind, labels } in Metrics::new().unwrap().families() {
            assert!(name.starts_with("keyferry_"), "{name}");
            assert_eq!(name.ends_with("_total"), *kind == "counter", "{name} is a {kind}");
            assert!(*kind != "histogram" || name.ends_with("_seconds"), "{name} has no unit");
            assert!(labels.iter().all(|label| !["job", "instance", "le"].contains(&label.as_str())), "{name}");
        }
    }
}
