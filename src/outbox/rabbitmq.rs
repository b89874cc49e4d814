//! A publishing session with `RabbitMQ`: confirms on, mandatory, persistent, on a connection of its own, so that
//! flow control on publishers never stalls acknowledgements.

use super::{Destination, LOOK, Publication, traceparent};
use crate::amqp::{Broker, SessionError, check, within};
use crate::store::OutboxRow;
use futures_util::future::try_join_all;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ExchangeKind};
use std::pin::pin;
use std::time::{Duration, Instant};

/// `delivery_mode` of a message that survives the broker's restart (AMQP 0-9-1).
const PERSISTENT: u8 = 2;

/// A topic exchange.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// The broker.
    pub broker: Broker,
    /// The exchange's name.
    pub name: String,
}

/// One connection, one channel with confirms.
pub struct Publisher {
    connection: Connection,
    channel: Channel,
    exchange: String,
    timeout: Duration,
}

impl Destination for Exchange {
    const TRANSPORT: &'static str = "rabbitmq";
    type Publisher = Publisher;

    async fn open(&self) -> Result<Publisher, SessionError> {
        let Self { broker, name } = self;
        let timeout = broker.timeout();
        let opening = async {
            let connection = broker.connect("keyferry events").await?;
            let channel = connection.create_channel().await?;
            let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
            channel.exchange_declare(name.as_str().into(), ExchangeKind::Topic, passive, FieldTable::default()).await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            Ok(Publisher { connection, channel, exchange: name.clone(), timeout })
        };
        within(timeout, opening).await
    }
}

impl super::Publisher for Publisher {
    type Error = SessionError;

    async fn publish(&self, rows: &[OutboxRow]) -> Result<Vec<Publication>, SessionError> {
        let publishing = async {
            let mut confirmations = Vec::with_capacity(rows.len());
            for row in rows {
                let properties = BasicProperties::default()
                    .with_content_type("application/cloudevents+json".into())
                    .with_delivery_mode(PERSISTENT)
                    .with_message_id(row.event_id.to_string().into())
                    .with_app_id("keyferry".into());
                let properties = match traceparent(&row.body) {
                    Some(trace) => properties.with_headers(headers(trace)),
                    None => properties,
                };
                let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
                let exchange = self.exchange.as_str().into();
                let sent = self.channel.basic_publish(
                    exchange,
                    row.routing_key.as_str().into(),
                    options,
                    row.body.as_bytes(),
                    properties,
                );
                confirmations.push(sent.await?);
            }
            let confirmed = try_join_all(confirmations).await?;
            Ok(confirmed.iter().map(outcome).collect())
        };
        self.unless_silent(publishing).await
    }

    fn check(&self) -> Result<(), SessionError> {
        check(&self.channel)
    }

    fn is_blocked(&self) -> bool {
        self.connection.status().blocked()
    }

    async fn close(self) {
        // The broker forgets an unclosed connection as well.
        drop(tokio::time::timeout(self.timeout, self.connection.close(200, "stopping".into())).await);
    }
}

impl Publisher {
    /// Gives up on a broker that is silent. One that has said that it is short of memory or disk is waited for: to publish
    /// on another connection would only give it the same again.
    async fn unless_silent<T>(&self, work: impl Future<Output = Result<T, SessionError>>) -> Result<T, SessionError> {
        let mut work = pin!(work);
        let mut silent_since = Instant::now();
        loop {
            match tokio::time::timeout(LOOK, &mut work).await {
                Ok(outcome) => return outcome,
                Err(_) if self.connection.status().blocked() => silent_since = Instant::now(),
                Err(_) if silent_since.elapsed() >= self.timeout => return Err(SessionError::Timeout(self.timeout)),
                Err(_) => {}
            }
        }
    }
}

fn headers(traceparent: String) -> FieldTable {
    let mut headers = FieldTable::default();
    headers.insert("traceparent".into(), AMQPValue::LongString(traceparent.into()));
    headers
}

fn outcome(confirmation: &Confirmation) -> Publication {
    match confirmation {
        Confirmation::Ack(None) => Publication::Confirmed,
        Confirmation::Ack(Some(_)) => Publication::Unroutable,
        Confirmation::Nack(_) | Confirmation::NotRequested => Publication::Refused,
    }
}
