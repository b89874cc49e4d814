//! Keyferry carries key material into AWS KMS ("bring your own key").
//!
//! # The path of one job
//!
//! ```text
//!  RabbitMQ, SQS                                                        RabbitMQ or SQS
//!     | message                                                            ^ event, confirmed
//!     v                                                                    |
//!  ingress --Delivery--> intake --Candidate--> store::accept            outbox::Relay
//!     ^                  parse, target, policy    | commit                 ^ store::take_events
//!     +---- Settlement: done, or dead letter <----+                        |
//!                                                 v                        |
//!  worker::run --> store::claim (lease, slot) --> worker::attempt          |
//!                    may run? -> DescribeKey -> source key (store, or KMIP server) -> GetParametersForImport
//!                    -> store::prepare -> wrap -> ImportKeyMaterial -> verify
//!                    (a rotate: the same as new material -> each replica -> store::prepare -> RotateKeyOnDemand -> verify)
//!                    (a delete: which materials -> store::prepare -> DeleteImportedKeyMaterial -> verify)
//!                                                 |                        |
//!                                                 +--> store::settle ------+
//!                                                      outcome, audit entries, event, next head
//! ```
//!
//! # Rooms
//!
//! | room | responsibility | imports |
//! |---|---|---|
//! | [`job`] | what a valid request is, how its job may end; no I/O | - |
//! | [`policy`] | who may ask for what, which targets exist; pure | `job` |
//! | [`quota`] | when calls may be made under a quota; pure | - |
//! | [`retry`] | error class and attempt in, delay out; the only user of `backoff` | - |
//! | [`source`] | obtains key material, holds it briefly, zeroises it | `job`; for servers also `config`, `retry`, `telemetry`, `tls` |
//! | [`wrap`](mod@wrap) | wraps material under a public key; pure | `job` |
//! | [`audit`] | what is recorded | `job` |
//! | [`kms`] | performs one AWS call truthfully, as the key's account lets it | `job`, `telemetry`, `words` |
//! | [`tls`] | who a client is and whom it trusts | - |
//! | [`amqp`] | connections to RabbitMQ | `config`, `tls` |
//! | [`sqs`] | performs calls and batches of SQS truthfully | `retry`, `telemetry`, `words` |
//! | [`ingress`] | broker deliveries in, settlements out | `job`, `amqp`, `sqs`, `retry`, `telemetry` |
//! | [`store`] | every SQL statement and transaction | `job`, `audit`, `quota`, the sealed types of `source`, `config`, `telemetry`, `tls`, `words` |
//! | [`intake`] | parse, authorise, accept or refuse, settle | `ingress`, `job`, `policy`, `retry`, `source`, `store`, `telemetry` |
//! | [`dead`] | dead letters: shown, matched to their refusals, sent again | `amqp`, `sqs`, `ingress`, `job`, `policy`, `retry`, `source`, `store` |
//! | [`outbox`] | committed events to the broker until confirmed | `amqp`, `sqs`, `retry`, `store`, `telemetry` |
//! | [`worker`] | drives a job | `audit`, `config`, `job`, `kms`, `policy`, `retry`, `source`, `store`, `telemetry`, `wrap` |
//! | [`topology`] | RabbitMQ's queues as data, compared over its management API | `tls` |
//! | [`words`] | closed sets of words; others' words, made harmless | - |
//! | [`config`] | settings | `job`, `policy`, `quota` |
//! | [`telemetry`] | logs, metrics, traces, admin HTTP | `config`, `tls`, `words` |
//! | [`app`], [`cli`] | composition; commands | all |
//!
//! `tests/it/architecture.rs` reads this table: the code imports what it says, no more and no less. `aws_*`, `lapin` and
//! `tokio_postgres` types stay in the rooms that talk to these systems.
//!
//! # What holds whatever happens
//!
//! - A message is settled only once its job, or its refusal, is durable.
//! - Every write after a claim names the lease's token: a worker whose lease was taken over cannot commit.
//! - Which bytes a job imports is durable before AWS is changed; every attempt imports the same.
//! - AWS cannot be fenced. A call leaves only while its answer still falls into the lease, and a line stays closed
//!   to jobs that would contradict a call that may still take effect.
//! - A call with a scarce quota leaves in its slot of one schedule that all workers follow.
//! - No lock and no transaction is held across a network call or a wrap.

#[macro_use]
mod failpoint;
#[macro_use]
pub mod words;

pub mod amqp;
pub mod app;
pub mod audit;
pub mod cli;
pub mod config;
pub mod dead;
pub mod ingress;
pub mod intake;
pub mod job;
pub mod kms;
pub mod outbox;
pub mod policy;
pub mod quota;
pub mod retry;
pub mod source;
pub mod sqs;
pub mod store;
pub mod telemetry;
pub mod tls;
pub mod topology;
pub mod worker;
pub mod wrap;
