//! `keyferry topology`: what has to be there at the brokers that the settings use.

use super::Failed;
use super::output::Output;
use crate::amqp;
use crate::app::open_broker;
use crate::config::{Loaded, Transport};
use crate::policy::Proof;
use crate::sqs::{Queues, Sqs};
use crate::telemetry::Metrics;
use crate::topology::{Difference, Management, Names, own_names};
use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub(super) enum Topology {
    /// Make what is missing: RabbitMQ's default topology over its management API (`rabbitmq.api_url`), and the queues that
    /// `[sqs]` names. What is there stays as it is.
    Apply,
    /// Compare with what is there; exit code 1 when something differs. A queue or an exchange of RabbitMQ that only the
    /// settings name has to be there and is not looked into.
    Check,
}

impl Topology {
    /// Of the transports that carry requests or events.
    pub(super) async fn run(self, loaded: &Loaded, output: Output) -> Result<(), Failed> {
        let mut found = Vec::new();
        if loaded.uses(Transport::RabbitMq) {
            found.extend(self.rabbitmq(loaded).await?);
        }
        if loaded.uses(Transport::Sqs) {
            found.extend(self.sqs(loaded).await?);
        }
        output.value(&found, |found| match found.as_slice() {
            [] => "the topology is as it should be".into(),
            found => {
                let lines = found.iter().map(|one| format!("{} {}: {}", one.kind, one.name, one.problem));
                lines.collect::<Vec<_>>().join("\n")
            }
        });
        if found.is_empty() { Ok(()) } else { Err(Failed::Said) }
    }

    async fn rabbitmq(&self, loaded: &Loaded) -> anyhow::Result<Vec<Difference>> {
        if matches!(self, Self::Apply) {
            let own = own_names(&names(loaded))?;
            management(loaded)?.apply().await?;
            if !own.is_empty() {
                eprintln!(
                    "keyferry: only the default topology is made; yours to make, with their bindings and policies: {}",
                    own.join(", ")
                );
            }
        }
        rabbitmq_differences(loaded).await
    }

    async fn sqs(&self, loaded: &Loaded) -> anyhow::Result<Vec<Difference>> {
        let queues = sqs_queues(loaded).await?;
        if matches!(self, Self::Apply) {
            queues.apply().await?;
        }
        let found = queues.check().await?.into_iter();
        Ok(found.map(|(name, finding)| Difference { kind: "queue", name, problem: finding.to_string() }).collect())
    }
}

/// What differs at RabbitMQ, users and shovels included that undo what a policy goes by.
pub(super) async fn rabbitmq_differences(loaded: &Loaded) -> anyhow::Result<Vec<Difference>> {
    let management = management(loaded)?;
    let mut found = management.check(&names(loaded)).await?;
    // Only where a policy goes by RabbitMQ's word.
    let is_word_taken = match loaded.settings.policy {
        Some(_) if loaded.settings.requests_from.contains(&Transport::RabbitMq) => {
            loaded.proof(Transport::RabbitMq, &loaded.policy()?)? == Proof::Broker
        }
        _ => false,
    };
    if is_word_taken {
        found.extend(management.impersonators().await?);
        found.extend(management.shovels().await?);
    }
    Ok(found)
}

/// RabbitMQ's management API, of the broker's virtual host.
pub(super) fn management(loaded: &Loaded) -> anyhow::Result<Management> {
    let broker = open_broker(loaded)?;
    let (tls, _) = amqp::identity(&loaded.settings.rabbitmq)?.current();
    Ok(Management::new(loaded.rabbitmq_api_url()?, broker.vhost(), &tls)?)
}

fn names(loaded: &Loaded) -> Names<'_> {
    let rabbitmq = &loaded.settings.rabbitmq;
    Names { queue: &rabbitmq.queue, dead_letter_queue: &rabbitmq.dead_letter_queue, exchange: &rabbitmq.exchange }
}

/// The queues of SQS that the settings name. Asks nobody whether they are there.
pub(super) async fn sqs_queues(loaded: &Loaded) -> anyhow::Result<Queues> {
    let settings = &loaded.settings;
    let client = Sqs::connect(settings.sqs.region.as_deref(), &Metrics::new()?).await;
    let requests = if settings.requests_from.contains(&Transport::Sqs) {
        let (requests, dead_letters) = loaded.sqs_requests_urls()?;
        Some((client.queue(requests), client.queue(dead_letters)))
    } else {
        None
    };
    let events = match settings.events_to {
        Transport::Sqs => Some(client.queue(loaded.sqs_events_url()?)),
        Transport::RabbitMq => None,
    };
    Ok(Queues { requests, events, visibility: settings.sqs.visibility() })
}
