//! Logs, metrics and the admin HTTP server. Knows no domain type.

mod admin;
mod logs;
mod metrics;

pub use admin::{Health, Part, Wait, serve_admin};
pub use logs::start_logs;
pub use metrics::Metrics;
