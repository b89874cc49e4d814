//! Every metric of the process. Labels come from closed sets only.

use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

/// Handles of all metrics; a clone counts into the same series.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    /// Messages decided at intake, by transport and verdict: accepted, duplicate, refused.
    pub intake_messages: IntCounterVec,
    /// Jobs that ended, by outcome.
    pub jobs_finished: IntCounterVec,
    /// Attempts that will be repeated, by the class of their error.
    pub retries: IntCounterVec,
    /// AWS calls by operation and result.
    pub aws_calls: IntCounterVec,
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
    /// Whether RabbitMQ takes no messages on a session's connection, for want of memory or disk, by transport and role.
    pub broker_blocked: IntGaugeVec,
    /// Transactions that Postgres did not carry out, by what ailed it: see the store's kinds.
    pub store_faults: IntCounterVec,
    /// Messages of SQS that this process could do no more about and that come again, by reason: `not_deleted`,
    /// `not_dead_lettered`, `receipt_lost`.
    pub sqs_messages_left: IntCounterVec,
    /// Jobs under way.
    pub jobs_running: IntGauge,
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
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let counter = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            let gauge = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        // A server in the same room answers in milliseconds; a request is given up after a minute at most.
        let seconds = HistogramOpts::new("keyferry_dsm_request_seconds", "Round trips to KMIP servers.")
            .buckets(vec![0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]);
        let dsm_request_seconds = HistogramVec::new(seconds, &["connection"])?;
        registry.register(Box::new(dsm_request_seconds.clone()))?;
        build_info(&registry)?;
        registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        let metrics = Self {
            intake_messages: counters(
                "keyferry_intake_messages_total",
                "Messages decided at intake.",
                &["transport", "verdict"],
            )?,
            jobs_finished: counters("keyferry_jobs_finished_total", "Jobs that ended.", &["outcome", "code"])?,
            retries: counters("keyferry_retries_total", "Attempts that will be repeated.", &["reason"])?,
            aws_calls: counters("keyferry_aws_calls_total", "AWS calls.", &["operation", "result"])?,
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
            broker_blocked: broker_blocked(&registry)?,
            store_faults: store_faults(&registry)?,
            sqs_messages_left: counters(
                "keyferry_sqs_messages_left_total",
                "Messages of SQS that could not be settled and come again.",
                &["reason"],
            )?,
            jobs_running: gauge(&registry, "keyferry_jobs_running", "Jobs under way in this process.")?,
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
            dsm_request_seconds,
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
            registry,
        };
        for transport in ["rabbitmq", "sqs"] {
            for verdict in ["accepted", "duplicate", "refused"] {
                metrics.intake_messages.with_label_values(&[transport, verdict]);
            }
            for role in ["ingress", "events"] {
                metrics.broker_sessions.with_label_values(&[transport, role]);
                metrics.broker_sessions_broken.with_label_values(&[transport, role]);
            }
        }
        for reason in ["not_deleted", "not_dead_lettered", "receipt_lost"] {
            metrics.sqs_messages_left.with_label_values(&[reason]);
        }
        metrics.jobs_finished.with_label_values(&["succeeded", ""]);
        Ok(metrics)
    }

    /// The exposition in Prometheus's text format.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

fn broker_blocked(registry: &Registry) -> Result<IntGaugeVec, prometheus::Error> {
    let help = Opts::new("keyferry_broker_blocked", "Whether the broker takes no messages for want of memory or disk.");
    let gauge = IntGaugeVec::new(help, &["transport", "role"])?;
    registry.register(Box::new(gauge.clone()))?;
    // It blocks none but those who publish.
    gauge.with_label_values(&["rabbitmq", "events"]);
    Ok(gauge)
}

/// The store knows the kinds.
fn store_faults(registry: &Registry) -> Result<IntCounterVec, prometheus::Error> {
    let help =
        Opts::new("keyferry_store_faults_total", "Transactions that Postgres did not carry out, by what ailed it.");
    let counter = IntCounterVec::new(help, &["kind"])?;
    registry.register(Box::new(counter.clone()))?;
    Ok(counter)
}

fn policy_reloads(registry: &Registry) -> Result<IntCounterVec, prometheus::Error> {
    let help = Opts::new("keyferry_policy_reloads_total", "Times that the policy's file was read again.");
    let counter = IntCounterVec::new(help, &["result"])?;
    registry.register(Box::new(counter.clone()))?;
    for result in ["loaded", "failed"] {
        counter.with_label_values(&[result]);
    }
    Ok(counter)
}

fn build_info(registry: &Registry) -> Result<(), prometheus::Error> {
    let build = IntGauge::with_opts(
        Opts::new("keyferry_build_info", "Always 1; the version is a label.")
            .const_label("version", env!("CARGO_PKG_VERSION")),
    )?;
    build.set(1);
    registry.register(Box::new(build))
}

fn gauge(registry: &Registry, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
    let gauge = IntGauge::new(name, help)?;
    registry.register(Box::new(gauge.clone()))?;
    Ok(gauge)
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
            "keyferry_broker_blocked{role=\"events\",transport=\"rabbitmq\"} 0",
            "keyferry_broker_sessions_total{role=\"ingress\",transport=\"rabbitmq\"} 0",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
