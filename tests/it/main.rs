//! The integration suite: one binary, real servers. Run it by `ops/test`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(missing_docs, reason = "nothing here is for others; what is not obvious says so all the same")]

mod checking;
mod failed;
mod happy;
mod refused;
mod store;
mod support;
