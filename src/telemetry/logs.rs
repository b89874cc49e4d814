//! The log: one line an event, human or JSON, on standard error.
//!
//! Fields have dotted names, `job.id`, `kms.key.arn`, `error.message`; times have their unit in the name. Nothing of a
//! message's body and no key byte is ever a field. `tests/it/log_fields.rs` reads the names in the sources.

use crate::config::{Log, LogFormat};
use std::borrow::Cow;
use std::io::{self, IsTerminal as _, Write};
use tracing::level_filters::LevelFilter;
use tracing::{Metadata, Span};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::{FilterExt as _, filter_fn};
use tracing_subscriber::fmt::layer;
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;

/// What others print when they are let: lapin passwords and the bodies of messages, the driver of Postgres every value that is
/// written, the AWS SDK whole requests with import tokens, wrapped material and external ids, and the command that gives credentials.
const TALKATIVE: [(&str, LevelFilter); 7] = [
    ("lapin", LevelFilter::INFO),
    ("amq_protocol", LevelFilter::INFO),
    ("tokio_postgres", LevelFilter::INFO),
    ("aws_smithy_runtime", LevelFilter::WARN),
    ("aws_runtime", LevelFilter::WARN),
    ("aws_config", LevelFilter::DEBUG),
    ("aws_sigv4", LevelFilter::WARN),
];

/// What has been started.
#[derive(Debug)]
pub struct Logs {
    #[cfg(feature = "otlp")]
    exporting: Option<super::otlp::Exporting>,
}

/// Why it cannot be.
type Fault = Box<dyn std::error::Error + Send + Sync>;

/// Starts logging for the process. The error says what is wrong with `log.filter`.
pub fn start_logs(log: &Log) -> Result<Logs, Fault> {
    let filter = EnvFilter::try_new(&log.filter)?.and(filter_fn(keeps_secrets).with_max_level_hint(LevelFilter::TRACE));
    #[cfg(feature = "otlp")]
    {
        let exporting = super::otlp::Exporting::start()?;
        let spans = exporting.as_ref().map(|exporting| {
            let ours = filter_fn(|about| about.is_span() && about.target().starts_with("keyferry"));
            tracing_opentelemetry::layer()
                .with_tracer(exporting.tracer())
                .with_location(false)
                .with_threads(false)
                .with_filter(ours)
        });
        // Each with its own filter: what is exported does not depend on what is logged.
        tracing_subscriber::registry().with(spans).with(lines(log.format).with_filter(filter)).try_init()?;
        Ok(Logs { exporting })
    }
    #[cfg(not(feature = "otlp"))]
    {
        tracing_subscriber::registry().with(lines(log.format).with_filter(filter)).try_init()?;
        Ok(Logs {})
    }
}

/// Whether a line may be written at all, whatever `log.filter` says.
fn keeps_secrets(about: &Metadata<'_>) -> bool {
    let is_of =
        |name: &str| about.target().strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with(':'));
    TALKATIVE.iter().all(|(name, most)| *about.level() <= *most || !is_of(name))
}

impl Logs {
    /// Nothing of it is lost at the end of the process.
    #[cfg_attr(not(feature = "otlp"), expect(clippy::unused_async, reason = "what is exported has to be waited for"))]
    pub async fn end(self) {
        #[cfg(feature = "otlp")]
        if let Some(exporting) = self.exporting {
            exporting.end().await;
        }
    }
}

/// A span becomes a part of the trace that a message brought, where traces are exported.
pub fn follow(span: &Span, traceparent: Option<&str>) {
    #[cfg(feature = "otlp")]
    if let Some(traceparent) = traceparent
        && !span.is_disabled()
    {
        super::otlp::follow(span, traceparent);
    }
    #[cfg(not(feature = "otlp"))]
    let _ = (span, traceparent);
}

fn lines<S>(format: LogFormat) -> Box<dyn tracing_subscriber::Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'span> LookupSpan<'span>,
{
    match format {
        LogFormat::Human => {
            layer().with_writer(|| OneLine).with_target(false).with_ansi(io::stderr().is_terminal()).boxed()
        }
        LogFormat::Json => {
            let lines = layer().with_writer(io::stderr).json();
            lines.flatten_event(true).with_current_span(false).with_span_list(false).boxed()
        }
    }
}

/// Standard error, to which an event is one line: what AWS or a server says could otherwise look like lines of our own.
struct OneLine;

impl Write for OneLine {
    /// Of a whole event: that is how they are written.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        io::stderr().write_all(&one_line(event))?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

fn one_line(event: &[u8]) -> Cow<'_, [u8]> {
    let text = event.strip_suffix(b"\n").unwrap_or(event);
    if !text.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
        return event.into();
    }
    let mut line = Vec::with_capacity(event.len() + 8);
    for byte in text {
        match byte {
            b'\n' => line.extend_from_slice(b"\\n"),
            b'\r' => line.extend_from_slice(b"\\r"),
            other => line.push(*other),
        }
    }
    line.push(b'\n');
    line.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_stands_in_it() {
        assert_eq!(&*one_line(b"as it is\n"), b"as it is\n");
        assert_eq!(&*one_line(b"one\r\n2026-01-01 INFO not ours\n\n"), b"one\\r\\n2026-01-01 INFO not ours\\n\n");
    }
}
