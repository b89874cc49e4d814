//! Dead letters in a queue of `RabbitMQ`.
//!
//! They are consumed and never given back one by one: a message that is given back counts as delivered once more, and may
//! come back in another place. When the channel is closed, everything that it holds goes back at once, in its order.

use super::{Census, Chosen, DeadLetters, Letter, Sent, Stamp};
use crate::amqp::{Broker, SessionError, within};
use crate::ingress::{REDRIVE_HEADER, SIGNATURE_HEADER, Sender};
use crate::policy::Signed;
use futures_util::{FutureExt as _, StreamExt as _};
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection, Consumer, Queue as Declared};
use std::collections::BTreeMap;
use std::time::Duration;
use time::OffsetDateTime;

/// Letters that the first consumer may hold: few, since each may be large and mostly few are wanted. lapin's buffer has no bound but this; without one, RabbitMQ has its own.
const FIRST_WINDOW: u32 = 50;
/// How long a queue may be silent before it is asked whether it holds anything more.
const SILENCE: Duration = Duration::from_secs(1);
/// Survives the broker's restart (AMQP 0-9-1).
const PERSISTENT: u8 = 2;

/// The two queues.
#[derive(Clone, Debug)]
pub struct Queues {
    /// The broker.
    pub broker: Broker,
    /// Where dead letters are.
    pub dead: String,
    /// Where they go back to.
    pub requests: String,
    /// As whom: AMQP `user-id`.
    pub user_id: Option<String>,
    /// By which they are signed.
    pub stamp: Option<Stamp>,
}

/// One connection; one channel that reads, one that publishes.
pub struct Session {
    connection: Connection,
    reading: Channel,
    publishing: Channel,
    consumer: Option<Consumer>,
    queues: Queues,
    census: Census,
    /// Letters that are still to be shown.
    left: u64,
    /// Consumers so far.
    consumers: u32,
    /// What the last one may hold, and holds.
    prefetch: u16,
    held: u16,
    batch: Vec<Delivery>,
}

impl DeadLetters for Queues {
    const TRANSPORT: &'static str = "rabbitmq";
    type Session = Session;

    fn requests(&self) -> &str {
        &self.requests
    }

    fn dead(&self) -> &str {
        &self.dead
    }

    async fn open(&self) -> Result<Session, SessionError> {
        let opening = async {
            let connection = self.broker.connect("keyferry dead").await?;
            let (reading, publishing) = (connection.create_channel().await?, connection.create_channel().await?);
            publishing.confirm_select(ConfirmSelectOptions::default()).await?;
            let declared = look(&reading, &self.dead).await?;
            let waiting = u64::from(declared.message_count());
            let readers = declared.consumer_count();
            let caution = (readers > 0).then(|| {
                format!("the queue {} has {readers} other readers; the letters that they hold are not shown", self.dead)
            });
            Ok(Session {
                connection,
                reading,
                publishing,
                consumer: None,
                queues: self.clone(),
                census: Census { waiting, cautions: caution.into_iter().collect() },
                left: waiting,
                consumers: 0,
                prefetch: 0,
                held: 0,
                batch: Vec::new(),
            })
        };
        within(self.broker.timeout(), opening).await
    }
}

impl super::Session for Session {
    type Error = SessionError;

    fn census(&self) -> &Census {
        &self.census
    }

    async fn next_batch(&mut self, most: usize) -> Result<Vec<Letter>, SessionError> {
        self.batch.clear();
        let most = most.min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if most == 0 {
            return Ok(Vec::new());
        }
        let Some(first) = self.first().await? else {
            // Another reader was faster, or letters ran out of time.
            self.left = 0;
            return Ok(Vec::new());
        };
        self.take(first);
        while self.batch.len() < most && self.held < self.prefetch {
            match self.consumer.as_mut().and_then(|consumer| consumer.next().now_or_never()) {
                Some(Some(next)) => self.take(next?),
                _ => break,
            }
        }
        self.left = self.left.saturating_sub(self.batch.len() as u64);
        Ok(self.batch.iter().map(letter).collect())
    }

    async fn redrive(&mut self, chosen: &[Chosen]) -> Result<Vec<Sent>, SessionError> {
        let name = &self.queues.requests;
        let redriving = async {
            let mut confirmations = Vec::with_capacity(chosen.len());
            for one in chosen {
                let delivery = &self.batch[one.place];
                let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
                let queue = name.as_str().into();
                let properties = self.queues.redriven(delivery, &one.refusal.to_string())?;
                let sent = self.publishing.basic_publish("".into(), queue, options, &delivery.data, properties);
                confirmations.push((delivery.delivery_tag, sent.await?));
            }
            let mut outcomes = Vec::with_capacity(chosen.len());
            let mut moved = Vec::with_capacity(chosen.len());
            for (tag, confirmation) in confirmations {
                outcomes.push(match confirmation.await? {
                    Confirmation::Ack(None) => {
                        moved.push(tag);
                        Sent::Moved
                    }
                    Confirmation::Ack(Some(_)) => {
                        Sent::Stopped(format!("there is no queue {name}; make it with: keyferry topology apply"))
                    }
                    Confirmation::Nack(_) | Confirmation::NotRequested => Sent::Stopped(format!(
                        "the queue {name} is full: RabbitMQ would not take a message; try again later"
                    )),
                });
            }
            // From here on until the queue knows of it, a letter is there twice: intake knows the second as a copy.
            crate::failpoint!("dead.after_publish");
            for tag in moved {
                self.reading.basic_ack(tag, BasicAckOptions::default()).await?;
                self.held = self.held.saturating_sub(1);
            }
            Ok(outcomes)
        };
        within(self.queues.broker.timeout(), redriving).await
    }

    async fn give_back(self) -> Result<(), SessionError> {
        let closing = async {
            // Its answer comes after the acknowledgements were taken.
            self.reading.close(200, "done".into()).await?;
            self.connection.close(200, "done".into()).await?;
            Ok(())
        };
        within(self.queues.broker.timeout(), closing).await
    }
}

impl Session {
    fn take(&mut self, delivery: Delivery) {
        self.held = self.held.saturating_add(1);
        self.batch.push(delivery);
    }

    /// The next letter; nothing if the queue has no more.
    async fn first(&mut self) -> Result<Option<Delivery>, SessionError> {
        let mut silent = Duration::ZERO;
        loop {
            if self.held >= self.prefetch {
                self.follow_on().await?;
            }
            let Some(consumer) = self.consumer.as_mut() else { return Err(SessionError::Cancelled) };
            match tokio::time::timeout(SILENCE, consumer.next()).await {
                Ok(next) => return Ok(Some(next.ok_or(SessionError::Cancelled)??)),
                Err(_) => silent += SILENCE,
            }
            let patience = self.queues.broker.timeout();
            let declared = within(patience, look(&self.reading, &self.queues.dead)).await?;
            if declared.message_count() == 0 {
                // What was on its way when the queue was asked has arrived by now.
                let last = self.consumer.as_mut().and_then(|consumer| consumer.next().now_or_never());
                return Ok(last.flatten().transpose()?);
            }
            if silent >= patience {
                return Err(SessionError::Timeout(patience));
            }
        }
    }

    /// Another consumer, for the letters after those that the last one holds. It cannot be let have more: RabbitMQ 3.10
    /// fails over a consumer that begins anew under its old tag. When the channel is closed, letters go back consumer by
    /// consumer, in the order of their tags as long as these are no more than 32: so each may hold twice as many.
    async fn follow_on(&mut self) -> Result<(), SessionError> {
        let following = async {
            if let Some(consumer) = self.consumer.take() {
                self.reading.basic_cancel(consumer.tag(), BasicCancelOptions::default()).await?;
            }
            // Eleven times is past what AMQP can say.
            self.prefetch = u16::try_from(FIRST_WINDOW << self.consumers.min(11)).unwrap_or(u16::MAX);
            self.held = 0;
            self.reading.basic_qos(self.prefetch, BasicQosOptions::default()).await?;
            let (queue, tag) = (self.queues.dead.as_str().into(), format!("keyferry-dead-{:05}", self.consumers));
            self.consumers += 1;
            let options = BasicConsumeOptions::default();
            self.consumer = Some(self.reading.basic_consume(queue, tag.into(), options, FieldTable::default()).await?);
            Ok(())
        };
        within(self.queues.broker.timeout(), following).await
    }
}

async fn look(channel: &Channel, queue: &str) -> Result<Declared, SessionError> {
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    Ok(channel.queue_declare(queue.into(), passive, FieldTable::default()).await?)
}

fn letter(delivery: &Delivery) -> Letter {
    let properties = &delivery.properties;
    let death = properties.headers().as_ref().and_then(last_death);
    let told = |name: &str| death.and_then(|death| death.inner().get(name)).and_then(text);
    Letter {
        content_type: properties.content_type().as_ref().map(ToString::to_string),
        message_id: properties.message_id().as_ref().map(ToString::to_string),
        sender: properties.user_id().as_ref().map(|user| Sender::RabbitMqUser(user.to_string())),
        headers: headers(properties).filter_map(|(name, value)| Some((name.to_string(), text(value)?))).collect(),
        origin: told("queue"),
        reason: told("reason"),
        died_at: death.and_then(|death| match death.inner().get("time") {
            Some(AMQPValue::Timestamp(seconds)) => {
                OffsetDateTime::from_unix_timestamp(i64::try_from(*seconds).ok()?).ok()
            }
            _ => None,
        }),
        body: delivery.data.clone(),
    }
}

/// `x-death` lists deaths with the last one first.
fn last_death(headers: &FieldTable) -> Option<&FieldTable> {
    match headers.inner().get("x-death")? {
        AMQPValue::FieldArray(deaths) => match deaths.as_slice().first()? {
            AMQPValue::FieldTable(death) => Some(death),
            _ => None,
        },
        _ => None,
    }
}

/// The publisher's own headers: without those that brokers write on the way, by which a redriven message would look as
/// if it had died already or had been passed on, and without those that would have it delivered elsewhere as well.
fn headers(properties: &BasicProperties) -> impl Iterator<Item = (&ShortString, &AMQPValue)> {
    let all = properties.headers().as_ref().into_iter().flat_map(FieldTable::inner);
    all.filter(|(name, _)| {
        let name = name.as_str();
        let is_brokers = name == "x-death"
            || name.starts_with("x-first-death-")
            || name.starts_with("x-last-death-")
            || name.starts_with("x-shovelled")
            || name == "x-received-from"
            || name == "x-delivery-count";
        !is_brokers && name != "CC" && name != "BCC"
    })
}

impl Queues {
    /// What a letter is sent again with, by whoever sends it again.
    fn redriven(&self, delivery: &Delivery, refusal: &str) -> Result<BasicProperties, SessionError> {
        let mut new = redriven(&delivery.properties, refusal);
        if let Some(user) = &self.user_id {
            new = new.with_user_id(user.as_str().into());
        }
        let mut headers = new.headers().clone().unwrap_or_default();
        let Some(stamp) = &self.stamp else { return Ok(new) };
        let content_type = new.content_type().as_ref().map(ToString::to_string);
        let signed = Signed { redrive: Some(refusal), content_type: content_type.as_deref(), body: &delivery.data };
        let header = stamp.header(signed).ok_or(SessionError::Unsigned)?;
        headers.insert(SIGNATURE_HEADER.into(), AMQPValue::LongString(header.into()));
        Ok(new.with_headers(headers))
    }
}

/// What a letter is sent again with. Not its `user-id`: the broker takes no other than the connection's own, and who asked is
/// told by the refusal. Not its `expiration`: that may be what it died of.
fn redriven(old: &BasicProperties, refusal: &str) -> BasicProperties {
    let mut kept: BTreeMap<ShortString, AMQPValue> =
        headers(old).map(|(name, value)| (name.clone(), value.clone())).collect();
    kept.insert(REDRIVE_HEADER.into(), AMQPValue::LongString(refusal.into()));
    let mut new = BasicProperties::default().with_delivery_mode(PERSISTENT).with_headers(FieldTable::from(kept));
    macro_rules! keep {
        ($($get:ident => $with:ident,)*) => {
            $(if let Some(value) = old.$get() { new = new.$with(value.clone()); })*
        };
    }
    keep! {
        content_type => with_content_type,
        content_encoding => with_content_encoding,
        priority => with_priority,
        correlation_id => with_correlation_id,
        reply_to => with_reply_to,
        message_id => with_message_id,
        timestamp => with_timestamp,
        kind => with_type,
        app_id => with_app_id,
        cluster_id => with_cluster_id,
    }
    new
}

fn text(value: &AMQPValue) -> Option<String> {
    Some(match value {
        AMQPValue::LongString(text) => text.to_string(),
        AMQPValue::ShortString(text) => text.to_string(),
        AMQPValue::Boolean(value) => value.to_string(),
        AMQPValue::ShortShortInt(value) => value.to_string(),
        AMQPValue::ShortShortUInt(value) => value.to_string(),
        AMQPValue::ShortInt(value) => value.to_string(),
        AMQPValue::ShortUInt(value) => value.to_string(),
        AMQPValue::LongInt(value) => value.to_string(),
        AMQPValue::LongUInt(value) => value.to_string(),
        AMQPValue::LongLongInt(value) => value.to_string(),
        AMQPValue::Timestamp(value) => value.to_string(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::types::FieldArray;

    #[test]
    fn what_the_broker_wrote_on_the_way_stays_behind() {
        let mut table = FieldTable::default();
        for name in ["x-first-death-queue", "x-last-death-reason", "x-delivery-count", "CC", "keyferry-signature"] {
            table.insert(name.into(), AMQPValue::LongString("x".into()));
        }
        table.insert("x-death".into(), AMQPValue::FieldArray(FieldArray::default()));
        let old = BasicProperties::default()
            .with_headers(table)
            .with_user_id("payroll".into())
            .with_message_id("m".into())
            .with_content_type("application/json".into())
            .with_correlation_id("c".into())
            .with_priority(3)
            .with_type("t".into());
        let new = redriven(&old, "r");
        let names: Vec<&str> = new.headers().as_ref().unwrap().inner().keys().map(ShortString::as_str).collect();
        assert_eq!(names, [REDRIVE_HEADER, "keyferry-signature"]);
        assert_eq!(new.user_id(), &None);
        assert_eq!(*new.delivery_mode(), Some(PERSISTENT));
        assert_eq!((new.message_id(), new.content_type()), (old.message_id(), old.content_type()));
        assert_eq!(
            (new.correlation_id(), new.priority(), new.kind()),
            (old.correlation_id(), old.priority(), old.kind())
        );
    }
}
