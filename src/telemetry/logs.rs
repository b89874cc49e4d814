//! The log: one line an event, human or JSON, on standard error.

use crate::config::{Log, LogFormat};
use tracing_subscriber::EnvFilter;

/// Starts logging for the process. The error says what is wrong with `log.filter`.
pub fn start_logs(log: &Log) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let filter = EnvFilter::try_new(&log.filter)?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match log.format {
        LogFormat::Human => builder.with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    }
}
