//! A consuming session with `RabbitMQ`.
//!
//! A session is rebuilt, never mended: lapin's recovery is off, and any error or end of the consumer's stream
//! ends the session with everything that belongs to it. A delivery can therefore only be settled on the
//! channel that delivered it; after that it is the broker's again.

use super::{Delivery, Ingress, REDRIVE_HEADER, SIGNATURE_HEADER, Sender, Settlement};
use crate::amqp::{Broker, SessionError, check, within};
use futures_util::{FutureExt as _, StreamExt as _};
use lapin::message::Delivery as AmqpDelivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, BasicRejectOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, Consumer};
use std::time::Duration;
use tokio::time::Instant;

/// The queue, and how to consume it.
#[derive(Clone, Debug)]
pub struct Queue {
    /// The broker.
    pub broker: Broker,
    /// The queue's name.
    pub name: String,
    /// Unsettled messages in hand at most: lapin's own buffer has no bound but this.
    pub prefetch: u16,
}

/// One connection, one channel, one consumer.
pub struct Session {
    connection: Connection,
    channel: Channel,
    consumer: Consumer,
    timeout: Duration,
    /// Of the batch in hand.
    tags: Vec<u64>,
    /// Highest delivery tag taken from the stream.
    last_tag: u64,
    /// Highest delivery tag below which everything is settled. To name a settled tag again is a protocol error.
    settled_tag: u64,
}

impl Ingress for Queue {
    const TRANSPORT: &'static str = "rabbitmq";
    type Session = Session;

    fn queue(&self) -> &str {
        &self.name
    }

    /// Connects, makes sure that the queue exists, and consumes.
    async fn open(&self) -> Result<Session, SessionError> {
        let timeout = self.broker.timeout();
        let opening = async {
            let connection = self.broker.connect("keyferry ingress").await?;
            let channel = connection.create_channel().await?;
            let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
            channel.queue_declare(self.name.as_str().into(), passive, FieldTable::default()).await?;
            channel.basic_qos(self.prefetch, BasicQosOptions::default()).await?;
            let consumer = channel
                .basic_consume(
                    self.name.as_str().into(),
                    "keyferry".into(),
                    BasicConsumeOptions::default(),
                    FieldTable::default(),
                )
                .await?;
            Ok(Session { connection, channel, consumer, timeout, tags: Vec::new(), last_tag: 0, settled_tag: 0 })
        };
        within(timeout, opening).await
    }
}

impl super::Session for Session {
    type Error = SessionError;

    async fn next_batch(&mut self, most: usize) -> Result<Vec<Delivery>, SessionError> {
        let first = self.consumer.next().await.ok_or(SessionError::Cancelled)??;
        let mut batch = Vec::with_capacity(most.min(64));
        self.tags = vec![first.delivery_tag];
        batch.push(delivery(first));
        while batch.len() < most {
            match self.consumer.next().now_or_never() {
                Some(Some(Ok(next))) => {
                    self.tags.push(next.delivery_tag);
                    batch.push(delivery(next));
                }
                // An error shows again at the next wait, after this batch.
                _ => break,
            }
        }
        self.last_tag = self.tags.last().copied().unwrap_or(self.last_tag);
        Ok(batch)
    }

    /// Refusals one by one, then everything else at once.
    async fn settle(&mut self, settlements: &[Settlement]) -> Result<(), SessionError> {
        let mut last_done = None;
        for (tag, settlement) in self.tags.iter().zip(settlements) {
            match settlement {
                Settlement::Done => last_done = Some(*tag),
                Settlement::DeadLetter => {
                    self.channel.basic_reject(*tag, BasicRejectOptions { requeue: false }).await?;
                }
            }
        }
        // Lower tags are all decided: batches are settled in the order in which they were taken, and a tag that
        // was rejected is no longer outstanding.
        if let Some(tag) = last_done {
            self.channel.basic_ack(tag, BasicAckOptions { multiple: true }).await?;
        }
        self.settled_tag = self.last_tag;
        check(&self.channel)
    }

    /// `nack` says "not now", which since 4.3 does
    /// not count as a delivery. A broker that does not answer gets everything back when the connection is gone.
    async fn give_back(mut self) -> Result<(), SessionError> {
        let timeout = self.timeout;
        let giving_back = async {
            self.channel.basic_cancel(self.consumer.tag(), BasicCancelOptions::default()).await?;
            while let Some(Some(Ok(left))) = self.consumer.next().now_or_never() {
                self.last_tag = left.delivery_tag;
            }
            if self.last_tag > self.settled_tag {
                let all = BasicNackOptions { multiple: true, requeue: true };
                self.channel.basic_nack(self.last_tag, all).await?;
            }
            self.connection.close(200, "stopping".into()).await?;
            Ok(())
        };
        within(timeout, giving_back).await
    }

    /// A broker has everything back when the connection is gone, which is when this value is.
    async fn abandon(self) {}
}

fn delivery(amqp: AmqpDelivery) -> Delivery {
    let properties = &amqp.properties;
    Delivery {
        content_type: properties.content_type().as_ref().map(ToString::to_string),
        message_id: properties.message_id().as_ref().map(ToString::to_string),
        traceparent: header(properties, "traceparent"),
        sender: properties.user_id().as_ref().map(|user| sender(user.as_str(), properties)),
        signature: header(properties, SIGNATURE_HEADER),
        redrive: header(properties, REDRIVE_HEADER),
        received: Instant::now(),
        body: amqp.data,
    }
}

/// A `user-id` is compared with the user of the connection when a message is published, and kept when a broker passes it
/// on: by dead-lettering, a shovel or a federation link. Their headers stay with it.
fn sender(user: &str, properties: &BasicProperties) -> Sender {
    let is_passed_on = properties.headers().as_ref().is_some_and(|headers| {
        headers.inner().keys().any(|name| {
            let name = name.as_str();
            ["x-death", "x-shovelled", "x-received-from"].contains(&name)
                || ["x-first-death-", "x-last-death-", "x-shovelled-"].iter().any(|start| name.starts_with(start))
        })
    });
    if is_passed_on { Sender::PassedOn(user.to_owned()) } else { Sender::RabbitMqUser(user.to_owned()) }
}

fn header(properties: &BasicProperties, name: &str) -> Option<String> {
    match properties.headers().as_ref()?.inner().get(name)? {
        AMQPValue::LongString(text) => Some(text.to_string()),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        _ => None,
    }
}
