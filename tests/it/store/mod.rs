//! The store against a real Postgres, as the worker's role.

mod abandon;
mod accept;
mod backlog;
mod batch;
mod bisection;
mod cancel;
mod claim;
mod connection;
mod floods;
mod given;
mod hold;
mod keys;
mod kms_keys;
mod look;
mod observe;
mod outbox;
mod plans;
mod quota;
mod read;
mod republish;
mod retry;
mod rights;
mod settle;
mod trail;
mod urgent;
