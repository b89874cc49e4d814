//! Broker deliveries in, settlements out.

pub mod rabbitmq;

use crate::job::Envelope;

/// A message in hand.
#[derive(Debug)]
pub struct Delivery {
    body: Vec<u8>,
    content_type: Option<String>,
    message_id: Option<String>,
    traceparent: Option<String>,
    tag: u64,
}

/// How a message is settled, once its verdict is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// Its job is in the inbox, now or from before.
    Done,
    /// It was refused: to the dead-letter queue.
    DeadLetter,
}

impl Delivery {
    /// What was delivered, as the parser takes it.
    pub fn envelope(&self) -> Envelope<'_> {
        Envelope {
            body: &self.body,
            content_type: self.content_type.as_deref(),
            message_id: self.message_id.as_deref(),
        }
    }

    /// W3C trace context, if the publisher sent a well-formed one.
    pub fn traceparent(&self) -> Option<&str> {
        self.traceparent.as_deref().filter(|text| is_traceparent(text))
    }
}

/// `version-trace-parent-flags` in lower-case hex (W3C Trace Context, 3.2).
fn is_traceparent(text: &str) -> bool {
    let lengths = [2, 32, 16, 2];
    let parts: Vec<&str> = text.split('-').collect();
    parts.len() == lengths.len()
        && parts.iter().zip(lengths).all(|(part, length)| {
            part.len() == length && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_is_four_hex_fields() {
        assert!(is_traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"));
        for text in
            ["", "00-4bf9-00f067aa0ba902b7-01", "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", "a\nb"]
        {
            assert!(!is_traceparent(text), "{text}");
        }
    }
}
