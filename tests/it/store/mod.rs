//! The store against a real Postgres, as the worker's role.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers may stop at the first surprise, as tests may")]

mod accept;
mod bisection;
mod claim;
mod connection;
mod given;
mod keys;
mod outbox;
mod plans;
mod read;
mod rights;
mod settle;
