//! Keyferry carries key material into AWS KMS.

#[macro_use]
mod failpoint;

pub mod app;
pub mod audit;
pub mod cli;
pub mod config;
pub mod ingress;
pub mod intake;
pub mod job;
pub mod kms;
pub mod outbox;
pub mod policy;
pub mod retry;
pub mod source;
pub mod store;
pub mod telemetry;
pub mod tls;
pub mod topology;
pub mod worker;
pub mod wrap;
