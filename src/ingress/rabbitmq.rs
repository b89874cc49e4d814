//! A consuming session with `RabbitMQ`.
//!
//! A session is rebuilt, never mended: lapin's recovery is off, and any error or end of the consumer's stream
//! ends the session with everything that belongs to it. A delivery can therefore only be settled on the
//! channel that delivered it; after that it is the broker's again.

use super::{Delivery, Settlement};
use crate::amqp::{SessionError, check, connect, within};
use futures_util::{FutureExt as _, StreamExt as _};
use lapin::message::Delivery as AmqpDelivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, BasicRejectOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, Consumer};
use std::time::Duration;

/// Where and how to consume.
#[derive(Clone, Debug)]
pub struct Options {
    /// The queue.
    pub queue: String,
    /// Unsettled messages in hand at most: lapin's own buffer has no bound but this.
    pub prefetch: u16,
    /// How long a connection may take; lapin sets no limit.
    pub connect_timeout: Duration,
}

/// One connection, one channel, one consumer.
pub struct Session {
    connection: Connection,
    channel: Channel,
    consumer: Consumer,
    timeout: Duration,
    /// Highest delivery tag taken from the stream.
    last_tag: u64,
    /// Highest delivery tag below which everything is settled. To name a settled tag again is a protocol error.
    settled_tag: u64,
}

impl Session {
    /// Connects, makes sure that the queue exists, and consumes.
    pub async fn open(url: &str, options: &Options) -> Result<Self, SessionError> {
        let opening = async {
            let connection = connect(url, "keyferry ingress", options.connect_timeout).await?;
            let channel = connection.create_channel().await?;
            let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
            channel.queue_declare(options.queue.as_str().into(), passive, FieldTable::default()).await?;
            channel.basic_qos(options.prefetch, BasicQosOptions::default()).await?;
            let consumer = channel
                .basic_consume(
                    options.queue.as_str().into(),
                    "keyferry".into(),
                    BasicConsumeOptions::default(),
                    FieldTable::default(),
                )
                .await?;
            Ok(Self { connection, channel, consumer, timeout: options.connect_timeout, last_tag: 0, settled_tag: 0 })
        };
        within(options.connect_timeout, opening).await
    }

    /// Waits for a message, then takes what is already there, up to `most`. Safe to drop while waiting.
    pub async fn next_batch(&mut self, most: usize) -> Result<Vec<Delivery>, SessionError> {
        let first = self.consumer.next().await.ok_or(SessionError::Cancelled)??;
        let mut batch = Vec::with_capacity(most.min(64));
        batch.push(delivery(first));
        while batch.len() < most {
            match self.consumer.next().now_or_never() {
                Some(Some(Ok(next))) => batch.push(delivery(next)),
                // An error shows again at the next wait, after this batch.
                _ => break,
            }
        }
        self.last_tag = batch.last().map_or(self.last_tag, |delivery| delivery.tag);
        Ok(batch)
    }

    /// Settles a whole batch, the only one in hand: refusals one by one, then everything else at once.
    pub async fn settle(&mut self, batch: &[Delivery], settlements: &[Settlement]) -> Result<(), SessionError> {
        let mut last_done = None;
        for (delivery, settlement) in batch.iter().zip(settlements) {
            match settlement {
                Settlement::Done => last_done = Some(delivery.tag),
                Settlement::DeadLetter => {
                    self.channel.basic_reject(delivery.tag, BasicRejectOptions { requeue: false }).await?;
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

    /// Ends the session: takes no more, gives back what is in hand. `nack` says "not now", which since 4.3 does
    /// not count as a delivery. A broker that does not answer gets everything back when the connection is gone.
    pub async fn give_back(mut self) -> Result<(), SessionError> {
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
}

fn delivery(amqp: AmqpDelivery) -> Delivery {
    let properties = &amqp.properties;
    let traceparent = properties.headers().as_ref().and_then(|headers| match headers.inner().get("traceparent") {
        Some(AMQPValue::LongString(text)) => Some(text.to_string()),
        Some(AMQPValue::ShortString(text)) => Some(text.to_string()),
        _ => None,
    });
    Delivery {
        content_type: properties.content_type().as_ref().map(ToString::to_string),
        message_id: properties.message_id().as_ref().map(ToString::to_string),
        traceparent,
        tag: amqp.delivery_tag,
        body: amqp.data,
    }
}
