//! RabbitMQ: the way in, what the settings name, what the worker may do with it, the topology, and who the worker is there.

use super::finding::Finding;
use super::{settings, within};
use crate::amqp::{Broker, Refusal, SessionError};
use crate::app::open_broker;
use crate::cli::topology::{management, rabbitmq_differences};
use crate::config::{Loaded, Transport};
use crate::topology::Difference;
use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions, ExchangeDeclareOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Connection, ExchangeKind};
use std::time::Duration;

const CONNECTION: &str = "rabbitmq.connection";
const TOPOLOGY: &str = "rabbitmq.topology";
const USER: &str = "rabbitmq.user";

/// Tags that let a user do more than a worker has to.
const MIGHTY: [&str; 4] = ["administrator", "policymaker", "management", "impersonator"];

pub(super) async fn check(loaded: &Loaded, timeout: Duration) -> Vec<Finding> {
    if !loaded.uses(Transport::RabbitMq) {
        return vec![Finding::skipped("rabbitmq", "not_used", "neither requests nor events go over RabbitMQ")];
    }
    if loaded.amqp_url().is_err() {
        return vec![Finding::skipped("rabbitmq", "setting_missing", "rabbitmq.url is missing")];
    }
    let broker = match open_broker(loaded) {
        Ok(broker) => broker,
        Err(error) => return vec![settings::of("rabbitmq", &error)],
    };
    let (mut found, topology) = tokio::join!(connection(loaded, &broker, timeout), topology(loaded, &broker, timeout));
    found.extend(topology);
    found
}

async fn connection(loaded: &Loaded, broker: &Broker, timeout: Duration) -> Vec<Finding> {
    let looking = async {
        match broker.connect("keyferry doctor").await {
            Ok(connection) => {
                let found = ends(loaded, broker, &connection).await;
                // Whatever it says, if it says anything: the looks are done. One that is short of memory or disk answers the
                // first publish of a connection, and reads nothing after that.
                drop(tokio::time::timeout(timeout / 4, connection.close(200, "".into())).await);
                found
            }
            Err(error) => vec![unconnected(&error)],
        }
    };
    within(timeout, CONNECTION, "rabbitmq_unreachable", looking).await.unwrap_or_else(|finding| vec![finding])
}

/// What a setting names, and what a worker does with it.
#[derive(Clone, Copy)]
enum End {
    /// It is consumed: the right `read`.
    Requests,
    /// The broker itself moves messages there: no right.
    DeadLetters,
    /// It is published to: the right `write`.
    Events,
}

/// What messages are taken from and events are sent to.
async fn ends(loaded: &Loaded, broker: &Broker, connection: &Connection) -> Vec<Finding> {
    let (settings, rabbitmq) = (&loaded.settings, &loaded.settings.rabbitmq);
    let mut found = vec![Finding::ok(CONNECTION, "RabbitMQ lets the worker in")];
    if settings.requests_from.contains(&Transport::RabbitMq) {
        found.push(end(broker, connection, "queue", End::Requests, &rabbitmq.queue).await);
        found.push(end(broker, connection, "dead_letter_queue", End::DeadLetters, &rabbitmq.dead_letter_queue).await);
    }
    if settings.events_to == Transport::RabbitMq {
        found.push(end(broker, connection, "exchange", End::Events, &rabbitmq.exchange).await);
    }
    found
}

async fn end(broker: &Broker, connection: &Connection, setting: &str, end: End, name: &str) -> Finding {
    let check = format!("rabbitmq.{setting}");
    let looked = match declared(connection, end, name).await {
        Ok(()) => usable(connection, end, name).await,
        Err(error) => Err(error),
    };
    let Err(error) = looked else {
        let told = match end {
            End::Requests => format!("{name} is there, and may be read"),
            End::DeadLetters => format!("{name} is there"),
            End::Events => format!("{name} is there, and may be written"),
        };
        return Finding::ok(check, told);
    };
    let error = SessionError::from(error);
    match error.refusal() {
        Some(Refusal::NotFound) => Finding::failed(
            check,
            "rabbitmq_missing",
            format!("{name}, which rabbitmq.{setting} names, is not there"),
            "keyferry topology apply",
        ),
        Some(Refusal::Access) => {
            Finding::failed(check, "rabbitmq_no_rights", error.to_string(), rights(broker, end, name))
        }
        _ => Finding::failed(check, "rabbitmq_failed", error.to_string(), "see RabbitMQ's log"),
    }
}

/// What to type.
fn rights(broker: &Broker, end: End, name: &str) -> String {
    let (vhost, user) = (broker.vhost(), broker.user().unwrap_or("USER"));
    let right = if matches!(end, End::Events) { "WRITE" } else { "READ" };
    format!("rabbitmqctl set_permissions -p {vhost} {user} CONFIGURE WRITE READ, where {right} has to match {name}")
}

/// On a channel of its own: a refusal ends it. A passive declaration takes no right: anybody may see what is there.
async fn declared(connection: &Connection, end: End, name: &str) -> lapin::Result<()> {
    let channel = connection.create_channel().await?;
    match end {
        End::Requests | End::DeadLetters => {
            let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
            channel.queue_declare(name.into(), passive, FieldTable::default()).await.map(drop)
        }
        End::Events => {
            let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
            channel.exchange_declare(name.into(), ExchangeKind::Topic, passive, FieldTable::default()).await
        }
    }
}

/// Whether the worker may do there what it does. Nothing is taken and nothing is published: RabbitMQ is asked for what it
/// cannot do, and looks at the right first. Without the right it says `ACCESS_REFUSED`, with it `PRECONDITION_FAILED`.
///
/// To consume or get in earnest would count a delivery of a message that is then given back, `queue.purge` asks for the
/// same right and empties the queue, and what is published in earnest reaches consumers: a queue is bound to all events.
async fn usable(connection: &Connection, end: End, name: &str) -> lapin::Result<()> {
    let channel = connection.create_channel().await?;
    let refused = match end {
        End::DeadLetters => return Ok(()),
        End::Requests => {
            // Should a broker ever take it: one message, which goes back with the channel.
            channel.basic_qos(1, BasicQosOptions::default()).await?;
            let mut no_priority = FieldTable::default();
            no_priority.insert("x-priority".into(), AMQPValue::LongString("none".into()));
            let consuming =
                channel.basic_consume(name.into(), "doctor".into(), BasicConsumeOptions::default(), no_priority);
            consuming.await.map(drop)
        }
        End::Events => {
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let never = BasicProperties::default().with_expiration("never".into());
            // One that events have: RabbitMQ 3 looks at the rights on topics as well.
            let sent =
                channel.basic_publish(name.into(), "job.rejected.unknown.unknown.unknown".into(), options, &[], never);
            match sent.await {
                Ok(confirmation) => confirmation.await.map(drop),
                Err(error) => Err(error),
            }
        }
    };
    match refused {
        Err(error) if SessionError::from(error.clone()).refusal() == Some(Refusal::Precondition) => Ok(()),
        otherwise => otherwise,
    }
}

fn unconnected(error: &SessionError) -> Finding {
    let (code, advice) = match (error, error.refusal()) {
        (_, Some(Refusal::Access)) => {
            ("rabbitmq_password", "look at user and password in rabbitmq.url, or rabbitmq.password_file")
        }
        (_, Some(Refusal::NotAllowed)) => (
            "rabbitmq_vhost",
            "look at the virtual host at the end of rabbitmq.url: rabbitmqctl add_vhost VHOST, and set_permissions -p VHOST USER",
        ),
        (SessionError::Tls { .. } | SessionError::Dropped(_), _) => {
            ("rabbitmq_tls", "look at the settings that are named")
        }
        (SessionError::Password { .. }, _) => ("file_wrong", "mend the file, or name the right one"),
        _ => ("rabbitmq_unreachable", "look at the host and port of rabbitmq.url, and whether RabbitMQ runs there"),
    };
    Finding::failed(CONNECTION, code, error.to_string(), advice)
}

/// What only the management API tells.
async fn topology(loaded: &Loaded, broker: &Broker, timeout: Duration) -> Vec<Finding> {
    if loaded.rabbitmq_api_url().is_err() {
        let message = "rabbitmq.api_url is not set: kinds of queues, policies, bindings and users cannot be looked at";
        return vec![Finding::skipped(TOPOLOGY, "no_api_url", message)];
    }
    let looking = async {
        let mut found = match rabbitmq_differences(loaded).await {
            Ok(differences) if differences.is_empty() => {
                vec![Finding::ok(TOPOLOGY, "queues, exchange, bindings and policies are as they should be")]
            }
            Ok(differences) => differences.iter().map(different).collect(),
            Err(error) => return vec![api_failed(TOPOLOGY, &error)],
        };
        found.push(user(loaded, broker).await);
        found
    };
    within(timeout, TOPOLOGY, "rabbitmq_api", looking).await.unwrap_or_else(|finding| vec![finding])
}

fn different(Difference { kind, name, problem }: &Difference) -> Finding {
    let message = format!("{kind} {name}: {problem}");
    if *kind == "user" {
        let advice = format!("rabbitmqctl set_user_tags {name}");
        return Finding::warning(USER, "rabbitmq_impersonator", message, advice);
    }
    if *kind == "shovel" {
        let advice = "set dest-add-forward-headers in the shovel's parameters, or identity_proof = \"signature\"";
        return Finding::warning(USER, "rabbitmq_shovel", message, advice);
    }
    let advice = "keyferry topology apply makes what is missing; what is there and different is yours to change";
    Finding::failed(TOPOLOGY, "rabbitmq_topology", message, advice)
}

async fn user(loaded: &Loaded, broker: &Broker) -> Finding {
    let Some(user) = broker.user() else {
        return Finding::skipped(
            USER,
            "by_certificate",
            "the login is a certificate; which user that is, RabbitMQ knows",
        );
    };
    let asked = async { anyhow::Ok(management(loaded)?.user_tags(user).await?) };
    let tags = match asked.await {
        Ok(tags) => tags,
        Err(error) => return api_failed(USER, &error),
    };
    let mighty: Vec<&str> = MIGHTY.into_iter().filter(|tag| tags.iter().any(|held| held == tag)).collect();
    if mighty.is_empty() {
        return Finding::ok(USER, format!("the user {user} has no tag that a worker does not need"));
    }
    let message = format!("the worker's user {user} has the tag {}, which a worker does not need", mighty.join(", "));
    let advice = "give the worker a user without tags, and rabbitmq.api_url one that only topology commands use";
    Finding::warning(USER, "rabbitmq_user_tags", message, advice)
}

fn api_failed(check: &str, error: &anyhow::Error) -> Finding {
    let advice = "look at rabbitmq.api_url: the management plugin's address, and a user with the tag administrator";
    Finding::failed(check, "rabbitmq_api", format!("{error:#}"), advice)
}
