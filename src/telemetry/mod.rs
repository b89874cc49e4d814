//! Logs, metrics, traces and the admin HTTP server. Knows no domain type.

mod admin;
mod logs;
mod metrics;
#[cfg(feature = "otlp")]
mod otlp;

pub use admin::{Health, Part, Wait, serve_admin};
pub use logs::{Logs, follow, start_logs};
pub use metrics::{AwsCalls, CONTENT_TYPE, Closed, Family, Metrics};
