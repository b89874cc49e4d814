//! One queue and its calls.

use super::message::{Message, Outgoing};
use super::{Call, CallError, EntryError, Fault, timeouts};
use crate::telemetry::AwsCalls;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::config::Config;
use aws_sdk_sqs::error::BuildError;
use aws_sdk_sqs::types::{
    BatchResultErrorEntry, ChangeMessageVisibilityBatchRequestEntry, DeleteMessageBatchRequestEntry, QueueAttributeName,
};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Longest visibility of a message from its receipt (SQS API Reference, `ChangeMessageVisibility`).
pub const MOST_VISIBILITY: Duration = Duration::from_secs(12 * 3_600);
/// Bytes of a message at most, whatever the queue (SQS Developer Guide, "Amazon SQS message quotas").
const MOST_MESSAGE_BYTES: usize = 1024 * 1024;
/// What an answer may take beside the time that a receive waits for messages.
const BESIDE_WAITING: Duration = Duration::from_secs(5);

/// A queue, by its URL.
#[derive(Clone, Debug)]
pub struct Queue {
    pub(super) client: Client,
    url: String,
    calls: AwsCalls<Call, Fault>,
}

/// What the checks look at; the rest of a queue's attributes is left aside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueAttributes {
    /// `QueueArn`.
    pub arn: String,
    /// `FifoQueue`.
    pub is_fifo: bool,
    /// Of `RedrivePolicy`: where messages go that were received too often.
    pub dead_letter_arn: Option<String>,
    /// Of `RedrivePolicy`: how often is too often.
    pub max_receive_count: Option<u32>,
    /// `MessageRetentionPeriod`.
    pub retention: Duration,
    /// `ApproximateNumberOfMessages`: those that can be received.
    pub waiting: u64,
    /// `ApproximateNumberOfMessagesNotVisible` and `ApproximateNumberOfMessagesDelayed`: those that cannot, for now.
    pub hidden: u64,
    /// `MaximumMessageSize`.
    pub most_bytes: usize,
}

/// Sends, counts and classifies a call. A macro: each of the SDK's builders is a type of its own.
macro_rules! send {
    ($queue:expr, $operation:expr, $request:expr) => {{
        let begun = Instant::now();
        let answer = $request.send().await.map_err(|error| CallError::of($operation.as_str(), $queue.name(), &error));
        $queue.calls.took($operation, begun);
        $queue.calls.ended($operation, answer.as_ref().err().map(|error| error.fault));
        answer
    }};
}

/// What a batch's answer says of each entry, in the entries' order.
pub(super) type Entries = Vec<Result<(), EntryError>>;

impl Queue {
    pub(super) fn new(client: Client, url: &str, calls: AwsCalls<Call, Fault>) -> Self {
        Self { client, url: url.to_owned(), calls }
    }

    /// Its URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Its name: the last part of the URL.
    pub fn name(&self) -> &str {
        self.url.rsplit('/').next().unwrap_or_default()
    }

    /// Whether it is a FIFO queue. SQS has their names end so (`CreateQueue`), and no others.
    pub fn is_fifo(&self) -> bool {
        std::path::Path::new(self.name()).extension().is_some_and(|extension| extension == "fifo")
    }

    /// `ReceiveMessage`: up to `most` (1 to 10) messages, waiting up to `wait` (at most 20 s) for the first. They are
    /// hidden from others for `visibility`.
    pub async fn receive(&self, most: usize, wait: Duration, visibility: Duration) -> Result<Vec<Message>, CallError> {
        const OPERATION: Call = Call::ReceiveMessage;
        let request = self
            .client
            .receive_message()
            .queue_url(&self.url)
            .max_number_of_messages(i32::try_from(most).unwrap_or(10))
            .wait_time_seconds(seconds(wait))
            .visibility_timeout(seconds(visibility))
            .set_message_system_attribute_names(Some(Message::SYSTEM_ATTRIBUTES.to_vec()))
            .message_attribute_names("All")
            .customize()
            .config_override(Config::builder().timeout_config(timeouts(wait + BESIDE_WAITING)));
        let answer = send!(self, OPERATION, request)?;
        let answered = answer.messages.unwrap_or_default();
        let count = answered.len();
        let messages: Vec<Message> = answered.into_iter().filter_map(Message::of).collect();
        if messages.len() < count {
            // Nothing can be done about these, and the others are hidden from everyone else by now.
            tracing::warn!(
                queue.name = self.name(),
                messages.count = count - messages.len(),
                "messages came without id or receipt: they come again after the visibility timeout"
            );
        }
        Ok(messages)
    }

    /// `GetQueueAttributes`.
    pub async fn attributes(&self) -> Result<QueueAttributes, CallError> {
        const OPERATION: Call = Call::GetQueueAttributes;
        let request = self.client.get_queue_attributes().queue_url(&self.url).attribute_names(QueueAttributeName::All);
        let found = send!(self, OPERATION, request)?.attributes.unwrap_or_default();
        let text = |name: &QueueAttributeName| found.get(name).map(String::as_str);
        let redrive: serde_json::Value = text(&QueueAttributeName::RedrivePolicy)
            .and_then(|policy| serde_json::from_str(policy).ok())
            .unwrap_or_default();
        // A number, or text that is one: both are accepted when it is set.
        let count = &redrive["maxReceiveCount"];
        let count = count.as_u64().or_else(|| count.as_str()?.parse().ok());
        let number = |name| text(&name).and_then(|text| text.parse::<u64>().ok()).unwrap_or_default();
        let most_bytes = text(&QueueAttributeName::MaximumMessageSize).and_then(|text| text.parse().ok());
        Ok(QueueAttributes {
            arn: text(&QueueAttributeName::QueueArn)
                .ok_or_else(|| CallError::incomplete(OPERATION.as_str(), self.name(), "QueueArn"))?
                .to_owned(),
            is_fifo: text(&QueueAttributeName::FifoQueue) == Some("true"),
            dead_letter_arn: redrive["deadLetterTargetArn"].as_str().map(str::to_owned),
            max_receive_count: count.and_then(|count| u32::try_from(count).ok()),
            retention: Duration::from_secs(number(QueueAttributeName::MessageRetentionPeriod)),
            waiting: number(QueueAttributeName::ApproximateNumberOfMessages),
            hidden: number(QueueAttributeName::ApproximateNumberOfMessagesNotVisible)
                + number(QueueAttributeName::ApproximateNumberOfMessagesDelayed),
            most_bytes: most_bytes.unwrap_or(MOST_MESSAGE_BYTES).min(MOST_MESSAGE_BYTES),
        })
    }

    /// `CreateQueue` under this queue's name; does nothing where it is there with the same attributes.
    pub(super) async fn create(&self, attributes: HashMap<QueueAttributeName, String>) -> Result<(), CallError> {
        let request = self.client.create_queue().queue_name(self.name()).set_attributes(Some(attributes));
        send!(self, Call::CreateQueue, request).map(drop)
    }

    /// `SendMessageBatch`, one call.
    pub(super) async fn send(&self, messages: &[&Outgoing]) -> Result<Entries, CallError> {
        const OPERATION: Call = Call::SendMessageBatch;
        let entries = messages.iter().enumerate().map(|(at, message)| message.to_aws(at.to_string()));
        let entries = self.built(OPERATION, entries.collect())?;
        let request = self.client.send_message_batch().queue_url(&self.url).set_entries(Some(entries));
        let answer = send!(self, OPERATION, request)?;
        let done = answer.successful.iter().map(|entry| entry.id.as_str());
        Ok(by_entry(messages.len(), done, &answer.failed))
    }

    /// `DeleteMessageBatch`, one call.
    pub(super) async fn delete(&self, receipts: &[&str]) -> Result<Entries, CallError> {
        const OPERATION: Call = Call::DeleteMessageBatch;
        let entries = receipts.iter().enumerate().map(|(at, receipt)| {
            DeleteMessageBatchRequestEntry::builder().id(at.to_string()).receipt_handle(*receipt).build()
        });
        let entries = self.built(OPERATION, entries.collect())?;
        let request = self.client.delete_message_batch().queue_url(&self.url).set_entries(Some(entries));
        let answer = send!(self, OPERATION, request)?;
        let done = answer.successful.iter().map(|entry| entry.id.as_str());
        Ok(by_entry(receipts.len(), done, &answer.failed))
    }

    /// `ChangeMessageVisibilityBatch`, one call.
    pub(super) async fn change_visibility(&self, changes: &[(&str, Duration)]) -> Result<Entries, CallError> {
        const OPERATION: Call = Call::ChangeMessageVisibilityBatch;
        let entries = changes.iter().enumerate().map(|(at, (receipt, timeout))| {
            ChangeMessageVisibilityBatchRequestEntry::builder()
                .id(at.to_string())
                .receipt_handle(*receipt)
                .visibility_timeout(seconds(*timeout))
                .build()
        });
        let entries = self.built(OPERATION, entries.collect())?;
        let request = self.client.change_message_visibility_batch().queue_url(&self.url).set_entries(Some(entries));
        let answer = send!(self, OPERATION, request)?;
        let done = answer.successful.iter().map(|entry| entry.id.as_str());
        Ok(by_entry(changes.len(), done, &answer.failed))
    }

    fn built<T>(&self, operation: Call, entries: Result<Vec<T>, BuildError>) -> Result<Vec<T>, CallError> {
        entries.map_err(|error| CallError {
            operation: operation.as_str(),
            queue: self.name().to_owned(),
            fault: Fault::Refused,
            code: None,
            message: error.to_string(),
        })
    }
}

fn by_entry<'a>(count: usize, done: impl Iterator<Item = &'a str>, failed: &[BatchResultErrorEntry]) -> Entries {
    // What the answer does not mention was not done, as far as is known.
    let unmentioned = EntryError {
        is_senders_fault: false,
        code: "Unmentioned".to_owned(),
        message: "the answer does not mention this entry".to_owned(),
    };
    let mut entries: Entries = vec![Err(unmentioned); count];
    let done = done.map(|id| (id, Ok(())));
    let failed = failed.iter().map(|entry| {
        let error = EntryError {
            is_senders_fault: entry.sender_fault,
            code: entry.code.clone(),
            message: entry.message.clone().unwrap_or_default(),
        };
        (entry.id.as_str(), Err(error))
    });
    for (id, outcome) in done.chain(failed) {
        if let Some(place) = id.parse::<usize>().ok().and_then(|at| entries.get_mut(at)) {
            *place = outcome;
        }
    }
    entries
}

/// SQS counts in whole seconds; a part of one is cut off, so that nothing is longer than asked for.
fn seconds(duration: Duration) -> i32 {
    i32::try_from(duration.as_secs()).unwrap_or(i32::MAX)
}
