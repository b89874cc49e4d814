//! Amazon SQS: one call or one batch, told truthfully, for whoever receives or sends.
//!
//! One owner of retries: the SDK makes every call once. What a batch left undone is tried again here with a bound
//! ([`Queue::carry_out`]); what follows after that is decided by the callers.
//!
//! Limits are those of "Amazon SQS message quotas" (SQS Developer Guide): 10 entries a batch, 1 to 10 messages a receive,
//! 10 attributes a message, 12 hours of visibility from a receipt.

mod batch;
mod call_error;
mod message;
mod queue;
mod topology;

pub use batch::{Batch, Outcome, Visibility};
pub use call_error::{CallError, EntryError, Fault};
pub use message::{Attribute, Message, Order, Outgoing, Value};
pub use queue::{MOST_VISIBILITY, Queue, QueueAttributes};
pub use topology::{Finding, Queues};

use crate::telemetry::{AwsCalls, Metrics};
use aws_config::{BehaviorVersion, SdkConfig};
use aws_sdk_sqs::Client;
use aws_sdk_sqs::config::retry::RetryConfig;
use aws_sdk_sqs::config::timeout::TimeoutConfig;
use aws_sdk_sqs::config::{Config, Region};
use std::time::Duration;

/// How long a call may take that does not wait for messages. The SDK sets no such limit.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// The SDK's own default is as long.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(3_100);

words! {
    /// The calls that are made.
    pub(crate) Call {
        /// Waits for messages.
        ReceiveMessage = "ReceiveMessage",
        /// Events and dead letters.
        SendMessageBatch = "SendMessageBatch",
        /// What is settled.
        DeleteMessageBatch = "DeleteMessageBatch",
        /// What is kept hidden, or given back.
        ChangeMessageVisibilityBatch = "ChangeMessageVisibilityBatch",
        /// Whether a queue is there, and how it is made.
        GetQueueAttributes = "GetQueueAttributes",
        /// Not of a worker: `topology apply`.
        CreateQueue = "CreateQueue",
    }
}

/// A client for the queues of one Region.
#[derive(Clone, Debug)]
pub struct Sqs {
    client: Client,
    calls: AwsCalls<Call, Fault>,
}

impl Sqs {
    /// Builds the client; connects nowhere. Credentials and endpoint come from the SDK's own chain
    /// (`AWS_ENDPOINT_URL_SQS`, profiles, roles), and so does the Region where none is given.
    pub async fn connect(region: Option<&str>, metrics: &Metrics) -> Self {
        let shared = aws_config::defaults(BehaviorVersion::v2026_01_12());
        let shared = match region {
            Some(region) => shared.region(Region::new(region.to_owned())),
            None => shared,
        };
        Self::with_config(&shared.load().await, metrics)
    }

    fn with_config(shared: &SdkConfig, metrics: &Metrics) -> Self {
        let config = Config::from(shared)
            .to_builder()
            .timeout_config(timeouts(CALL_TIMEOUT))
            .retry_config(RetryConfig::disabled())
            .build();
        Self { client: Client::from_conf(config), calls: AwsCalls::of(metrics) }
    }

    /// A queue by its URL. Asks nobody whether it is there.
    pub fn queue(&self, url: &str) -> Queue {
        Queue::new(self.client.clone(), url, self.calls.clone())
    }
}

fn timeouts(attempt: Duration) -> TimeoutConfig {
    TimeoutConfig::builder().connect_timeout(CONNECT_TIMEOUT).operation_attempt_timeout(attempt).build()
}

#[cfg(test)]
mod tests;
