//! A publishing session with `RabbitMQ`: confirms on, mandatory, persistent, on a connection of its own, so that
//! flow control on publishers never stalls acknowledgements.

use super::{Destination, LOOK, Publication, traceparent};
use crate::amqp::{Broker, Refusal, SessionError, check, within};
use crate::store::OutboxRow;
use futures_util::future::try_join_all;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ExchangeKind};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// `delivery_mode` of a message that survives the broker's restart (AMQP 0-9-1).
const PERSISTENT: u8 = 2;

/// After so long no other event of a window is begun one by one: the rest is taken anew.
const WINDOW_TIMEOUT: Duration = Duration::from_secs(15);

/// A topic exchange.
#[derive(Clone, Debug)]
pub struct Exchange {
    broker: Broker,
    name: String,
    /// The broker has refused a message of the window, and it is not known which. Outlives sessions: such a refusal may end
    /// one.
    has_culprit: Arc<AtomicBool>,
}

impl Exchange {
    /// By its name.
    pub fn new(broker: Broker, name: String) -> Self {
        Self { broker, name, has_culprit: Arc::default() }
    }
}

/// One connection, one channel with confirms. A channel that the broker closed over an event has a successor.
pub struct Publisher {
    connection: Connection,
    channel: Mutex<Channel>,
    exchange: String,
    timeout: Duration,
    has_culprit: Arc<AtomicBool>,
}

impl Destination for Exchange {
    const TRANSPORT: &'static str = "rabbitmq";
    type Publisher = Publisher;

    async fn open(&self) -> Result<Publisher, SessionError> {
        let Self { broker, name, has_culprit } = self;
        let timeout = broker.timeout();
        let opening = async {
            let connection = broker.connect_to_publish("keyferry events").await?;
            let channel = confirming(&connection).await?;
            let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
            channel.exchange_declare(name.as_str().into(), ExchangeKind::Topic, passive, FieldTable::default()).await?;
            let (exchange, has_culprit) = (name.clone(), Arc::clone(has_culprit));
            Ok(Publisher { connection, channel: Mutex::new(channel), exchange, timeout, has_culprit })
        };
        within(timeout, opening).await
    }
}

impl super::Publisher for Publisher {
    type Error = SessionError;

    /// The broker closes the channel over a message that it will never take, such as one beyond its `max_message_size`, and
    /// the connection, where the rest of that message comes when the channel is gone. In a window it is not known which it is:
    /// they are sent one by one, if need be on the next connection, and only that one is held.
    async fn publish(&self, rows: &[OutboxRow]) -> Result<Vec<Publication>, SessionError> {
        let until = Instant::now() + WINDOW_TIMEOUT;
        if !self.has_culprit.load(Ordering::Relaxed) {
            match self.publish_together(rows).await {
                Err(error) if self.is_of_a_message(&error) => {
                    self.has_culprit.store(true, Ordering::Relaxed);
                    self.renew().await?;
                }
                outcome => return outcome,
            }
        }
        let outcomes = self.publish_one_by_one(rows, until).await?;
        self.has_culprit.store(outcomes.contains(&Publication::Late), Ordering::Relaxed);
        Ok(outcomes)
    }

    fn check(&self) -> Result<(), SessionError> {
        check(&self.channel())
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
    async fn publish_together(&self, rows: &[OutboxRow]) -> Result<Vec<Publication>, SessionError> {
        let channel = self.channel();
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
                let sent = channel.basic_publish(
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

    /// Each waits for its confirmation. What there is no time for, or no connection any more, is left to the next window.
    async fn publish_one_by_one(&self, rows: &[OutboxRow], until: Instant) -> Result<Vec<Publication>, SessionError> {
        let mut outcomes = Vec::with_capacity(rows.len());
        for row in rows {
            if Instant::now() >= until {
                break;
            }
            match self.publish_together(std::slice::from_ref(row)).await {
                Ok(published) => outcomes.extend(published),
                Err(error) if self.is_of_a_message(&error) => {
                    let bytes = row.body.len();
                    tracing::warn!(
                        event.id = %row.event_id, event.bytes = bytes, error.message = %error, "an event was not sent"
                    );
                    outcomes.push(Publication::Refused);
                    // What was learnt must not be lost with the connection.
                    if self.renew().await.is_err() {
                        break;
                    }
                }
                Err(error) => return Err(error),
            }
        }
        outcomes.resize(rows.len(), Publication::Late);
        Ok(outcomes)
    }

    /// Whether the broker closed the channel over an event. A right that is missing, or the exchange, is no fault of one.
    fn is_of_a_message(&self, error: &SessionError) -> bool {
        let has_lost_only_the_channel = self.connection.status().connected() && !self.channel().status().connected();
        match error.refusal() {
            Some(refusal) => refusal == Refusal::Precondition,
            // Whoever comes after it on the channel is told no more than that.
            None => has_lost_only_the_channel,
        }
    }

    /// Another channel on the same connection.
    async fn renew(&self) -> Result<(), SessionError> {
        let channel = within(self.timeout, confirming(&self.connection)).await?;
        *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = channel;
        Ok(())
    }

    fn channel(&self) -> Channel {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

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

async fn confirming(connection: &Connection) -> Result<Channel, SessionError> {
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok(channel)
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
