//! The store against a real Postgres, as the worker's role.

mod accept;
mod backlog;
mod bisection;
mod cancel;
mod claim;
mod connection;
mod given;
mod hold;
mod keys;
mod look;
mod outbox;
mod plans;
mod read;
mod rights;
mod settle;
mod trail;
mod urgent;
