//! Who sends: by a broker's word or by a signature.

use std::fmt;

/// Longest name in bytes: what AMQP carries as `user-id`.
const LONGEST: usize = 255;

/// Whom a message comes from, once that is proved. Printed as `rabbitmq:payroll`, `aws:AROA...` or `key:payroll-2026`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Identity {
    /// A user of `RabbitMQ`.
    RabbitMqUser(String),
    /// The unique id of a role of AWS, which no later role of the same name gets.
    AwsRole(String),
    /// The id of a key that signs. Another key needs another id.
    SigningKey(String),
}

impl Identity {
    /// Reads what [`fmt::Display`] printed; `None` for a kind that is not known or a name that breaks its rule.
    pub fn parse(text: &str) -> Option<Self> {
        let (kind, name) = text.split_once(':')?;
        match kind {
            "rabbitmq" if is_user(name) => Some(Self::RabbitMqUser(name.to_owned())),
            "aws" if is_role(name) => Some(Self::AwsRole(name.to_owned())),
            "key" if is_key_id(name) => Some(Self::SigningKey(name.to_owned())),
            _ => None,
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RabbitMqUser(name) => write!(f, "rabbitmq:{name}"),
            Self::AwsRole(name) => write!(f, "aws:{name}"),
            Self::SigningKey(name) => write!(f, "key:{name}"),
        }
    }
}

/// A user's name as it can be told and asked for.
pub(super) fn is_user(text: &str) -> bool {
    (1..=LONGEST).contains(&text.len()) && !text.chars().any(char::is_control)
}

/// The unique id of a role (IAM User Guide, "Unique identifiers"), the only one that SQS's `SenderId` tells apart from the
/// account's other users.
pub(super) fn is_role(text: &str) -> bool {
    (16..=128).contains(&text.len())
        && text.starts_with("AROA")
        && text.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
}

/// 1 to 64 of `A-Z a-z 0-9 . _ -`.
pub(super) fn is_key_id(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// What a message says of its sender, cut and made printable, for a record of what nobody has proved.
pub fn claimed(kind: &str, name: &str) -> String {
    let printable = name.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c });
    let mut text = format!("{kind}:");
    for c in printable {
        if text.len() + c.len_utf8() > LONGEST {
            break;
        }
        text.push(c);
    }
    text
}

/// What an ingress wants to know of its senders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proof {
    /// Nothing: whoever can write to the queue is [`super::ANONYMOUS`].
    Nothing,
    /// The broker's own word.
    Broker,
    /// A signature for this audience.
    Signature {
        /// The text that signers must name: opaque, one for each queue of each deployment.
        audience: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_identity_is_read_as_it_is_printed() {
        for text in ["rabbitmq:payroll", "rabbitmq:a:b", "aws:AROAEXAMPLEEXAMPLE12", "key:payroll-2026"] {
            assert_eq!(Identity::parse(text).unwrap().to_string(), text);
        }
        for text in ["", "payroll", "rabbitmq:", "rabbitmq:a\nb", "aws:payroll", "key:a b", "key:", "user:x"] {
            assert_eq!(Identity::parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_claim_is_printable_and_bounded(name in "\\PC{0,300}|[\\x00-\\x20]{0,9}") {
            let text = claimed("rabbitmq", &name);
            prop_assert!(text.len() <= LONGEST && !text.chars().any(char::is_control));
        }
    }
}
