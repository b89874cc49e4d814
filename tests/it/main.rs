//! The integration suite: one binary, real servers. Run it by `ops/test`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(missing_docs, reason = "nothing here is for others; what is not obvious says so all the same")]

mod abandoned;
mod accounts;
mod architecture;
mod aws_errors;
mod broken_links;
mod checking;
mod commands;
mod commands_keys;
mod dashboards;
mod dead;
mod deletes;
mod doctor;
mod dry_run;
mod dsm_check;
mod dsm_jobs;
mod dsm_servers;
mod dsm_source;
mod failed;
mod faults;
mod first_day;
mod floods;
mod happy;
mod kills;
mod kms_keys;
mod log_fields;
mod materials;
mod operators;
mod pairs;
mod policy;
mod policy_commands;
mod procedure;
mod quota;
mod refused;
mod reload;
mod republish;
mod retries;
mod rotation_doubts;
mod rotation_kills;
mod rotation_policy;
mod rotations;
mod signatures;
mod sqs;
mod stopping;
mod store;
mod support;
mod takeover;
mod telemetry;
mod tls;
#[cfg(feature = "otlp")]
mod traces;
mod transports;
mod wrapping;
