//! Messages as this program sees them, without the SDK's types.

use aws_sdk_sqs::error::BuildError;
use aws_sdk_sqs::primitives::Blob;
use aws_sdk_sqs::types::{
    Message as AwsMessage, MessageAttributeValue, MessageSystemAttributeName, SendMessageBatchRequestEntry,
};
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;

/// Longest `MessageGroupId` (SQS API Reference, `SendMessage`).
const MOST_GROUP: usize = 128;

/// The value of an attribute. Types are SQS's: `String`, `Number`, `Binary`, each with an optional `.label`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// `String` and `Number`.
    Text(String),
    /// `Binary`.
    Bytes(Vec<u8>),
}

/// A message attribute: at most 10 a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attribute {
    /// 1 to 256 characters.
    pub name: String,
    /// With its label.
    pub data_type: String,
    /// What it says.
    pub value: Value,
}

impl Attribute {
    /// A plain text.
    pub fn text(name: &str, value: impl Into<String>) -> Self {
        Self { name: name.to_owned(), data_type: "String".to_owned(), value: Value::Text(value.into()) }
    }

    /// Bytes that count towards a message's size: name, type and value (SQS Developer Guide, "Amazon SQS message
    /// metadata").
    fn size(&self) -> usize {
        let value = match &self.value {
            Value::Text(text) => text.len(),
            Value::Bytes(bytes) => bytes.len(),
        };
        self.name.len() + self.data_type.len() + value
    }

    fn to_aws(&self) -> Result<MessageAttributeValue, BuildError> {
        let value = MessageAttributeValue::builder().data_type(&self.data_type);
        match &self.value {
            Value::Text(text) => value.string_value(text),
            Value::Bytes(bytes) => value.binary_value(Blob::new(bytes.as_slice())),
        }
        .build()
    }
}

/// A message in flight.
#[derive(Clone, Debug, Default)]
pub struct Message {
    /// SQS's own id, the same at each receipt.
    pub id: String,
    /// Names this receipt of it.
    pub receipt: String,
    /// As sent.
    pub body: String,
    /// All of them.
    pub attributes: Vec<Attribute>,
    /// System attribute `SenderId`: who sent it, by AWS's word.
    pub sender_id: Option<String>,
    /// System attribute `MessageGroupId`.
    pub group: Option<String>,
    /// System attribute `MessageDeduplicationId`.
    pub deduplication: Option<String>,
    /// System attribute `DeadLetterQueueSourceArn`: the queue out of which SQS itself moved it.
    pub moved_from: Option<String>,
    /// System attribute `SentTimestamp`. SQS keeps that of the first queue where it moves a message of a standard queue.
    pub sent_at: Option<OffsetDateTime>,
    /// System attribute `ApproximateReceiveCount`, this receipt included.
    pub receive_count: u32,
}

impl Message {
    /// The attributes of SQS's own that are asked for.
    pub(super) const SYSTEM_ATTRIBUTES: [MessageSystemAttributeName; 6] = [
        MessageSystemAttributeName::SenderId,
        MessageSystemAttributeName::ApproximateReceiveCount,
        MessageSystemAttributeName::MessageGroupId,
        MessageSystemAttributeName::MessageDeduplicationId,
        MessageSystemAttributeName::DeadLetterQueueSourceArn,
        MessageSystemAttributeName::SentTimestamp,
    ];

    /// Nothing where SQS left out what a message cannot be without.
    pub(super) fn of(message: AwsMessage) -> Option<Self> {
        let mut system = message.attributes.unwrap_or_default();
        let attributes = message.message_attributes.unwrap_or_default().into_iter();
        let mut attributes: Vec<Attribute> = attributes
            .filter_map(|(name, value)| {
                let data_type = value.data_type;
                let bytes = value.binary_value.map(|blob| Value::Bytes(blob.into_inner()));
                let value = value.string_value.map(Value::Text).or(bytes)?;
                Some(Attribute { name, data_type, value })
            })
            .collect();
        attributes.sort_by(|a, b| a.name.cmp(&b.name));
        Some(Self {
            id: message.message_id?,
            receipt: message.receipt_handle?,
            body: message.body.unwrap_or_default(),
            attributes,
            sender_id: system.remove(&MessageSystemAttributeName::SenderId),
            group: system.remove(&MessageSystemAttributeName::MessageGroupId),
            deduplication: system.remove(&MessageSystemAttributeName::MessageDeduplicationId),
            moved_from: system.remove(&MessageSystemAttributeName::DeadLetterQueueSourceArn),
            sent_at: system.remove(&MessageSystemAttributeName::SentTimestamp).and_then(|ms| {
                OffsetDateTime::from_unix_timestamp_nanos(ms.parse::<i128>().ok()?.checked_mul(1_000_000)?).ok()
            }),
            receive_count: system
                .remove(&MessageSystemAttributeName::ApproximateReceiveCount)
                .and_then(|count| count.parse().ok())
                .unwrap_or(0),
        })
    }

    /// The text of an attribute.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|attribute| attribute.name == name).and_then(|attribute| match &attribute.value {
            Value::Text(text) => Some(text.as_str()),
            Value::Bytes(_) => None,
        })
    }

    /// Bytes of body and attributes.
    pub fn size(&self) -> usize {
        size(&self.body, &self.attributes)
    }
}

/// What a FIFO queue orders and drops copies by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// `MessageGroupId`: 1 to 128 letters, digits and punctuation.
    pub group: String,
    /// `MessageDeduplicationId`, of the same characters: a copy within 5 minutes is taken and not kept.
    pub deduplication: String,
}

impl Order {
    /// Whether SQS takes it as a group: letters, digits and punctuation of ASCII.
    pub fn is_group(text: &str) -> bool {
        (1..=MOST_GROUP).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
    }

    /// The group of a request: those for one key are in order. One that names no key is known by its bytes.
    pub fn group_of(key: Option<&str>, body: &str) -> String {
        key.filter(|key| Self::is_group(key)).map_or_else(|| hex::encode(Sha256::digest(body)), str::to_owned)
    }
}

/// A message to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// Unicode that XML can hold; never empty.
    pub body: String,
    /// At most 10.
    pub attributes: Vec<Attribute>,
    /// On FIFO queues, and only there.
    pub order: Option<Order>,
}

impl Outgoing {
    /// Bytes of body and attributes.
    pub fn size(&self) -> usize {
        size(&self.body, &self.attributes)
    }

    pub(super) fn to_aws(&self, id: String) -> Result<SendMessageBatchRequestEntry, BuildError> {
        let mut entry = SendMessageBatchRequestEntry::builder().id(id).message_body(&self.body);
        for attribute in &self.attributes {
            entry = entry.message_attributes(&attribute.name, attribute.to_aws()?);
        }
        if let Some(Order { group, deduplication }) = &self.order {
            entry = entry.message_group_id(group).message_deduplication_id(deduplication);
        }
        entry.build()
    }
}

fn size(body: &str, attributes: &[Attribute]) -> usize {
    body.len() + attributes.iter().map(Attribute::size).sum::<usize>()
}
