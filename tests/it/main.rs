//! The integration suite: one binary, real servers.

mod store;
mod support;
