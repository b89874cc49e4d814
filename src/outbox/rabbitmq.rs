//! A publishing session with `RabbitMQ`: confirms on, mandatory, persistent, on a connection of its own, so that
//! flow control on publishers never stalls acknowledgements.

use crate::amqp::{SessionError, check, connect, within};
use crate::store::OutboxRow;
use futures_util::future::try_join_all;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Confirmation, Connection, ExchangeKind};
use std::time::Duration;

/// `delivery_mode` of a message that survives the broker's restart (AMQP 0-9-1).
const PERSISTENT: u8 = 2;

/// What the broker said of one event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Publication {
    /// In a queue, on disk.
    Confirmed,
    /// Confirmed and returned: no queue is bound for it.
    Unroutable,
    /// The broker would not take it, as a full queue does.
    Refused,
}

/// One connection, one channel with confirms.
pub(super) struct Publisher {
    connection: Connection,
    channel: Channel,
    exchange: String,
    timeout: Duration,
}

impl Publisher {
    pub(super) async fn open(url: &str, exchange: &str, timeout: Duration) -> Result<Self, SessionError> {
        let opening = async {
            let connection = connect(url, "keyferry events", timeout).await?;
            let channel = connection.create_channel().await?;
            let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
            channel.exchange_declare(exchange.into(), ExchangeKind::Topic, passive, FieldTable::default()).await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            Ok(Self { connection, channel, exchange: exchange.to_owned(), timeout })
        };
        within(timeout, opening).await
    }

    /// Publishes a window and waits for all its confirmations; outcomes are in the rows' order.
    pub(super) async fn publish(&self, rows: &[OutboxRow]) -> Result<Vec<Publication>, SessionError> {
        let publishing = async {
            let mut confirmations = Vec::with_capacity(rows.len());
            for row in rows {
                let properties = BasicProperties::default()
                    .with_content_type("application/cloudevents+json".into())
                    .with_delivery_mode(PERSISTENT)
                    .with_message_id(row.event_id.to_string().into())
                    .with_app_id("keyferry".into());
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
        within(self.timeout, publishing).await
    }

    /// Whether the session still stands; an idle one learns of its end no other way.
    pub(super) fn check(&self) -> Result<(), SessionError> {
        check(&self.channel)
    }

    pub(super) async fn close(self) {
        // The broker forgets an unclosed connection as well.
        drop(tokio::time::timeout(self.timeout, self.connection.close(200, "stopping".into())).await);
    }
}

fn outcome(confirmation: &Confirmation) -> Publication {
    match confirmation {
        Confirmation::Ack(None) => Publication::Confirmed,
        Confirmation::Ack(Some(_)) => Publication::Unroutable,
        Confirmation::Nack(_) | Confirmation::NotRequested => Publication::Refused,
    }
}
