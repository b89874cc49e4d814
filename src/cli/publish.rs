//! Requests to the queue of one transport, confirmed.

use super::sender::Sender;
use super::submit::Message;
use crate::amqp::{SessionError, within};
use crate::app::open_broker;
use crate::config::{Loaded, Transport};
use crate::ingress::SIGNATURE_HEADER;
use crate::policy::Signed;
use crate::sqs::{Attribute, Batch, Order, Outcome, Outgoing, Queue, Sqs};
use crate::telemetry::Metrics;
use anyhow::{Context as _, bail};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection};
use sha2::{Digest as _, Sha256};
use std::time::Duration;

/// Calls to SQS for one request.
const ATTEMPTS: u32 = 5;

/// What every request is sent as.
const CONTENT_TYPE: &str = "application/json";

/// Where requests go, and what proves their sender.
pub(super) struct Link {
    carrier: Carrier,
    sender: Sender,
}

enum Carrier {
    RabbitMq(Box<Amqp>),
    Sqs(Box<Queue>),
}

/// A connection that publishes with confirmations.
pub(super) struct Amqp {
    connection: Connection,
    channel: Channel,
    queue: String,
    patience: Duration,
}

impl Link {
    pub(super) async fn open(loaded: &Loaded, transport: Transport, sender: Sender) -> anyhow::Result<Self> {
        let settings = &loaded.settings;
        let carrier = match transport {
            Transport::RabbitMq => {
                let broker = open_broker(loaded)?;
                let patience = broker.timeout();
                let connection =
                    broker.connect_to_publish("keyferry submit").await.context("RabbitMQ cannot be reached")?;
                let channel = within(patience, async {
                    let channel = connection.create_channel().await?;
                    channel.confirm_select(ConfirmSelectOptions::default()).await?;
                    Ok(channel)
                })
                .await?;
                let queue = settings.rabbitmq.queue.clone();
                Carrier::RabbitMq(Box::new(Amqp { connection, channel, queue, patience }))
            }
            // A publisher needs no right but to send.
            Transport::Sqs => {
                let client = Sqs::connect(settings.sqs.region.as_deref(), &Metrics::new()?).await;
                Carrier::Sqs(Box::new(client.queue(loaded.sqs_requests_url()?)))
            }
        };
        Ok(Self { carrier, sender })
    }

    /// Returns once the broker has all of them; an error says nothing of how many it took.
    pub(super) async fn publish(&self, messages: &[Message]) -> anyhow::Result<()> {
        let signatures = messages.iter().map(|message| self.sign(message)).collect::<anyhow::Result<Vec<_>>>()?;
        match &self.carrier {
            Carrier::RabbitMq(amqp) => {
                let Amqp { channel, queue, patience, .. } = amqp.as_ref();
                let user_id = self.sender.user_id.as_deref();
                // A broker that is short of memory or disk stops reading and says nothing to a publisher.
                taken(queue, &within(*patience, over_amqp(channel, queue, user_id, messages, signatures)).await?)
            }
            Carrier::Sqs(queue) => over_sqs(queue, messages, signatures).await,
        }
    }

    pub(super) async fn close(self) -> anyhow::Result<()> {
        match self.carrier {
            Carrier::RabbitMq(amqp) => {
                let Amqp { connection, patience, .. } = *amqp;
                Ok(within(patience, async { Ok(connection.close(200, "done".into()).await?) }).await?)
            }
            Carrier::Sqs(_) => Ok(()),
        }
    }

    fn sign(&self, message: &Message) -> anyhow::Result<Option<String>> {
        self.sender.sign(Signed { redrive: None, content_type: Some(CONTENT_TYPE), body: message.body.as_bytes() })
    }
}

async fn over_amqp(
    channel: &Channel,
    queue: &str,
    user_id: Option<&str>,
    messages: &[Message],
    signatures: Vec<Option<String>>,
) -> Result<Vec<Confirmation>, SessionError> {
    let mut sent = Vec::with_capacity(messages.len());
    for (message, signature) in messages.iter().zip(signatures) {
        let mut properties = BasicProperties::default()
            .with_content_type(CONTENT_TYPE.into())
            .with_delivery_mode(2)
            .with_message_id(message.id.as_str().into());
        if let Some(user) = user_id {
            properties = properties.with_user_id(user.into());
        }
        if let Some(signature) = signature {
            let mut headers = FieldTable::default();
            headers.insert(SIGNATURE_HEADER.into(), AMQPValue::LongString(signature.into()));
            properties = properties.with_headers(headers);
        }
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let body = message.body.as_bytes();
        sent.push(channel.basic_publish("".into(), queue.into(), options, body, properties).await?);
    }
    let mut confirmations = Vec::with_capacity(sent.len());
    for confirmation in sent {
        confirmations.push(confirmation.await?);
    }
    Ok(confirmations)
}

/// Whether the broker took every request of a window.
fn taken(queue: &str, confirmations: &[Confirmation]) -> anyhow::Result<()> {
    for confirmation in confirmations {
        match confirmation {
            Confirmation::Ack(None) => {}
            Confirmation::Ack(Some(_)) => bail!("there is no queue {queue}; make it with: keyferry topology apply"),
            Confirmation::Nack(_) | Confirmation::NotRequested => {
                bail!("the queue {queue} is full: RabbitMQ would not take a request")
            }
        }
    }
    Ok(())
}

async fn over_sqs(queue: &Queue, messages: &[Message], signatures: Vec<Option<String>>) -> anyhow::Result<()> {
    let signed = messages.iter().zip(signatures);
    let messages: Vec<Outgoing> = signed.map(|(message, by)| outgoing(message, by, queue.is_fifo())).collect();
    let outcomes = queue.carry_out(Batch::Send(&messages), ATTEMPTS).await;
    let untaken: Vec<&Outcome> = outcomes.iter().filter(|outcome| **outcome != Outcome::Done).collect();
    match untaken.first() {
        None => Ok(()),
        Some(first) => bail!("SQS did not take {} of {} requests: {first}", untaken.len(), outcomes.len()),
    }
}

/// On FIFO the requests for one key are in order. Copies are known by their bytes: one id with two contents is for the
/// worker to judge, and SQS would silently drop the second.
fn outgoing(message: &Message, signature: Option<String>, is_fifo: bool) -> Outgoing {
    let digest = hex::encode(Sha256::digest(&message.body));
    let group = Order::group_of(message.key.as_deref(), &message.body);
    let signature = signature.map(|signature| Attribute::text(SIGNATURE_HEADER, signature));
    Outgoing {
        body: message.body.clone(),
        attributes: [Attribute::text("content-type", CONTENT_TYPE)].into_iter().chain(signature).collect(),
        order: is_fifo.then_some(Order { group, deduplication: digest }),
    }
}
