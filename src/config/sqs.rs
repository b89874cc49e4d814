//! `[sqs]`, and which transport carries what.

use super::{Rule, Senders};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What carries requests or events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// `[rabbitmq]`.
    RabbitMq,
    /// `[sqs]`.
    Sqs,
}

impl Transport {
    /// As settings and metrics name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RabbitMq => "rabbitmq",
            Self::Sqs => "sqs",
        }
    }
}

/// `SQS`. Credentials and endpoint are the SDK's: profiles, roles, `AWS_ENDPOINT_URL_SQS`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sqs {
    /// The Region of all its queues; the SDK's own chain decides if it is absent.
    pub region: Option<String>,
    /// Where requests arrive.
    pub requests_queue_url: Option<String>,
    /// Where refused ones go.
    pub dead_letter_queue_url: Option<String>,
    /// Where events go.
    pub events_queue_url: Option<String>,
    /// Receives under way beside each other.
    pub pollers: usize,
    /// Seconds for which a receive waits for messages. A worker that is told to stop waits so long at most, so that
    /// nothing that was just received stays hidden.
    pub wait_s: u64,
    /// Seconds for which a received message stays hidden from others when its worker dies. A heartbeat extends them.
    pub visibility_timeout_s: u64,
    /// Received and unsettled messages at most.
    pub in_hand: usize,
    /// What is asked of senders.
    #[serde(flatten)]
    pub senders: Senders,
}

impl Default for Sqs {
    fn default() -> Self {
        Self {
            region: None,
            requests_queue_url: None,
            dead_letter_queue_url: None,
            events_queue_url: None,
            pollers: 2,
            wait_s: 20,
            visibility_timeout_s: 60,
            in_hand: 400,
            senders: Senders::default(),
        }
    }
}

impl Sqs {
    /// `wait_s`.
    pub fn wait(&self) -> Duration {
        Duration::from_secs(self.wait_s)
    }

    /// `visibility_timeout_s`.
    pub fn visibility(&self) -> Duration {
        Duration::from_secs(self.visibility_timeout_s)
    }

    /// What its values must keep to, as `(setting, holds, rule)`. Limits of SQS are those of `ReceiveMessage`.
    pub(super) fn rules(&self) -> [Rule; 8] {
        let is_queue = |url: &Option<String>| url.as_deref().is_none_or(is_queue_url);
        let url = "a queue's URL, as in https://sqs.eu-central-1.amazonaws.com/111122223333/keyferry-jobs";
        [
            ("sqs.requests_queue_url", is_queue(&self.requests_queue_url), url),
            ("sqs.dead_letter_queue_url", is_queue(&self.dead_letter_queue_url), url),
            ("sqs.events_queue_url", is_queue(&self.events_queue_url), url),
            (
                "sqs.dead_letter_queue_url",
                self.requests_queue_url.is_none() || self.requests_queue_url != self.dead_letter_queue_url,
                "another queue than sqs.requests_queue_url: a refused message would be received again and again",
            ),
            ("sqs.pollers", (1..=50).contains(&self.pollers), "1 to 50"),
            ("sqs.wait_s", (1..=20).contains(&self.wait_s), "1 to 20"),
            ("sqs.visibility_timeout_s", (5..=43_200).contains(&self.visibility_timeout_s), "5 to 43200"),
            (
                "sqs.in_hand",
                (10 * self.pollers..=10_000).contains(&self.in_hand),
                "ten times sqs.pollers, what these may receive at once, to 10000",
            ),
        ]
    }
}

/// Something with a host and, last, a name that SQS allows (`CreateQueue`).
fn is_queue_url(text: &str) -> bool {
    let Ok(url) = url::Url::parse(text) else { return false };
    let Some(name) = url.path_segments().and_then(|mut parts| parts.next_back()) else { return false };
    let stem = name.strip_suffix(".fifo").unwrap_or(name);
    ["http", "https"].contains(&url.scheme())
        && url.has_host()
        && (1..=80).contains(&name.len())
        && !stem.is_empty()
        && stem.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_url_has_a_host_and_a_name() {
        for url in [
            "https://sqs.eu-central-1.amazonaws.com/111122223333/keyferry-jobs",
            "https://sqs.eu-central-1.amazonaws.com/111122223333/keyferry-jobs.fifo",
            "http://127.0.0.1:5000/123456789012/a_B-9",
        ] {
            assert!(is_queue_url(url), "{url}");
        }
        for url in [
            "",
            "keyferry-jobs",
            "arn:aws:sqs:eu-central-1:111122223333:jobs",
            "https://host",
            "https://host/",
            "https://host/1/.fifo",
            "https://host/1/a.b",
            "ftp://host/1/a",
        ] {
            assert!(!is_queue_url(url), "{url}");
        }
    }
}
