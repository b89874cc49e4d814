//! Answers (KMIP 1.4, 4, 6 and 7; KMIP 2.0, 6 and 8): whose they are, what they hold, and what was refused.

use super::messages::{ASKED_ATTRIBUTES, Ask, Version, batch_id};
use super::tags::{
    ATTRIBUTE, ATTRIBUTE_NAME, ATTRIBUTE_VALUE, ATTRIBUTES, BATCH_ITEM, CRYPTOGRAPHIC_ALGORITHM,
    CRYPTOGRAPHIC_DOMAIN_PARAMETERS, CRYPTOGRAPHIC_LENGTH, CRYPTOGRAPHIC_USAGE_MASK, KEY_BLOCK, NAME, NAME_VALUE,
    OBJECT_TYPE, OPERATION, PRIVATE_KEY, PROTOCOL_VERSION, PROTOCOL_VERSION_MAJOR, PROTOCOL_VERSION_MINOR,
    RECOMMENDED_CURVE, RESPONSE_MESSAGE, RESPONSE_PAYLOAD, RESULT_MESSAGE, RESULT_REASON, RESULT_STATUS, SECRET_DATA,
    STATE, SYMMETRIC_KEY, UNIQUE_BATCH_ITEM_ID, UNIQUE_IDENTIFIER, object_type,
};
use super::ttlv::{self, Fault, Limits, Structure, Tag, Value};
use std::fmt;
use zeroize::Zeroizing;

/// Why a message is no answer to what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum AnswerFault {
    /// Not TTLV.
    #[error("the answer is not KMIP: {0}")]
    Encoding(#[from] Fault),
    /// TTLV, and not what KMIP puts there.
    #[error("the answer is not what KMIP demands: {0}")]
    Content(&'static str),
}

/// What a server would not do (KMIP 1.4, 6.9 to 6.11).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// Result Reason; 0 where none was given.
    pub(super) reason: u32,
    /// The server's own words, shortened and without control characters.
    pub(super) message: String,
}

/// Result Reasons (KMIP 1.4, 9.1.3.2.29; KMIP 2.0, 11.49).
impl Refusal {
    pub(super) fn is_not_found(&self) -> bool {
        // Item Not Found; Object Not Found.
        matches!(self.reason, 0x01 | 0x37)
    }

    pub(super) fn is_unauthenticated(&self) -> bool {
        // Authentication Not Successful; Attestation Required, Attestation Failed.
        matches!(self.reason, 0x03 | 0x14 | 0x15)
    }

    pub(super) fn is_denied(&self) -> bool {
        // Permission Denied; Not Authorised.
        matches!(self.reason, 0x0C | 0x39)
    }

    pub(super) fn is_withheld(&self) -> bool {
        // Key Value Not Present; Sensitive; Not Extractable.
        matches!(self.reason, 0x13 | 0x16 | 0x17)
    }

    /// Object Archived, Object Destroyed, Wrong Key Lifecycle State.
    pub(super) fn wrong_state(&self) -> Option<&'static str> {
        match self.reason {
            0x0D => Some("Archived"),
            0x36 => Some("Destroyed"),
            0x43 => Some("in a state that the server does not give keys out in"),
            _ => None,
        }
    }

    pub(super) fn is_passing(&self) -> bool {
        // General Failure; Internal Server Error; Server Limit Exceeded; Protection Storage Unavailable.
        matches!(self.reason, 0x100 | 0x2A | 0x3A | 0x44)
    }

    /// Whether it may be the message that was refused and not what it asks for: Invalid Message, Operation Not Supported,
    /// Invalid Field, Feature Not Supported, Unsupported Protocol Version; or nothing was said.
    pub(super) fn is_of_message(&self) -> bool {
        matches!(self.reason, 0 | 0x04 | 0x05 | 0x07 | 0x08 | 0x3F)
    }

    pub(super) fn is_unsupported_operation(&self) -> bool {
        self.reason == 0x05
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "result reason {:#x}", self.reason)?;
        if self.message.is_empty() { Ok(()) } else { write!(f, ", \"{}\"", self.message) }
    }
}

/// What came of one operation; `None`: the server did not come to it.
pub(super) type Answer<'a> = Option<Result<Structure<'a>, Refusal>>;

/// A server's answer, checked. Its buffer is zeroised when it goes.
pub(super) struct Response(Zeroizing<Vec<u8>>);

impl Response {
    /// Takes over a whole message.
    pub(super) fn new(bytes: Zeroizing<Vec<u8>>) -> Result<Self, AnswerFault> {
        ttlv::parse(&bytes, Limits::MESSAGE)?;
        Ok(Self(bytes))
    }

    /// The answers to what was asked, in the same order.
    pub(super) fn answers(&self, asks: &[Ask<'_>]) -> Result<Vec<Answer<'_>>, AnswerFault> {
        let message = ttlv::parse(&self.0, Limits::MESSAGE)?;
        let items = message.value.structure().filter(|_| message.tag == RESPONSE_MESSAGE);
        let items = items.ok_or(AnswerFault::Content("no response message"))?;
        let mut answers: Vec<Answer<'_>> = vec![None; asks.len()];
        for (position, item) in items.all(BATCH_ITEM).enumerate() {
            let item = item.structure().ok_or(AnswerFault::Content("a batch item that is no structure"))?;
            let id = item.first(UNIQUE_BATCH_ITEM_ID).and_then(Value::bytes);
            let at = match id {
                Some(id) => asks.iter().enumerate().position(|(at, _)| batch_id(at) == id),
                None => Some(position),
            };
            let slot = at.and_then(|at| Some((asks.get(at)?, answers.get_mut(at)?)));
            let (ask, slot) = slot.ok_or(AnswerFault::Content("an answer to what was not asked"))?;
            let is_of = item.first(OPERATION).is_none_or(|operation| operation.enumeration() == Some(ask.number()));
            if !is_of || slot.is_some() {
                return Err(AnswerFault::Content("an answer to another operation"));
            }
            *slot = Some(outcome(item)?);
        }
        if answers.iter().all(Option::is_none) {
            return Err(AnswerFault::Content("no answer"));
        }
        Ok(answers)
    }
}

impl fmt::Debug for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Response({} bytes)", self.0.len())
    }
}

fn outcome(item: Structure<'_>) -> Result<Result<Structure<'_>, Refusal>, AnswerFault> {
    match item.first(RESULT_STATUS).and_then(Value::enumeration) {
        // An operation without results may leave the payload out.
        Some(0) => Ok(Ok(item.first(RESPONSE_PAYLOAD).and_then(Value::structure).unwrap_or_default())),
        Some(1) => Ok(Err(Refusal {
            reason: item.first(RESULT_REASON).and_then(Value::enumeration).unwrap_or_default(),
            message: item.first(RESULT_MESSAGE).and_then(Value::text).map(shorten).unwrap_or_default(),
        })),
        // Pending is for clients that asked to be called back, Undone for batches that asked for it.
        Some(_) => Err(AnswerFault::Content("a result status that was not asked for")),
        None => Err(AnswerFault::Content("a batch item without a result status")),
    }
}

/// A stranger's text, fit for a log.
pub(super) fn shorten(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

/// The highest version that both sides know.
pub(super) fn common_version(payload: Structure<'_>) -> Option<Version> {
    let offered = payload.all(PROTOCOL_VERSION).filter_map(Value::structure).filter_map(|version| {
        let number = |tag| version.first(tag).and_then(Value::integer);
        Some((number(PROTOCOL_VERSION_MAJOR)?, number(PROTOCOL_VERSION_MINOR)?))
    });
    offered.filter_map(|offered| Version::ALL.into_iter().find(|version| version.numbers() == offered)).max()
}

/// The identifiers of what was found. Nothing else goes into a row, a log or another request.
pub(super) fn located(payload: Structure<'_>) -> Result<Vec<&str>, AnswerFault> {
    let ids = payload.all(UNIQUE_IDENTIFIER).map(|id| id.text().filter(|id| is_identifier(id)));
    ids.collect::<Option<_>>().ok_or(AnswerFault::Content("a unique identifier that is not 1 to 256 printable ASCII"))
}

/// How many objects were found.
pub(super) fn count_located(payload: Structure<'_>) -> usize {
    payload.all(UNIQUE_IDENTIFIER).count()
}

fn is_identifier(id: &str) -> bool {
    (1..=256).contains(&id.len()) && id.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic())
}

/// Whose attributes an answer holds, where it says so.
pub(super) fn described(payload: Structure<'_>) -> Option<&str> {
    payload.first(UNIQUE_IDENTIFIER).and_then(Value::text)
}

/// What is known about an object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) state: Option<u32>,
    pub(super) usage_mask: Option<u32>,
    pub(super) algorithm: Option<u32>,
    pub(super) length: Option<i32>,
    pub(super) curve: Option<u32>,
    pub(super) name: Option<String>,
}

impl Attributes {
    /// From an answer in either version's encoding.
    pub(super) fn read(payload: Structure<'_>) -> Self {
        let mut attributes = Self::default();
        for attribute in payload.all(ATTRIBUTE).filter_map(Value::structure) {
            let name = attribute.first(ATTRIBUTE_NAME).and_then(Value::text);
            let known = ASKED_ATTRIBUTES.iter().find(|(known, _)| Some(*known) == name);
            if let (Some((_, tag)), Some(value)) = (known, attribute.first(ATTRIBUTE_VALUE)) {
                attributes.take(*tag, value);
            }
        }
        for item in payload.first(ATTRIBUTES).and_then(Value::structure).into_iter().flat_map(Structure::items) {
            attributes.take(item.tag, item.value);
        }
        attributes
    }

    fn take(&mut self, tag: Tag, value: Value<'_>) {
        match tag {
            STATE => self.state = value.enumeration(),
            CRYPTOGRAPHIC_USAGE_MASK => self.usage_mask = value.integer().map(i32::cast_unsigned),
            CRYPTOGRAPHIC_ALGORITHM => self.algorithm = value.enumeration(),
            CRYPTOGRAPHIC_LENGTH => self.length = value.integer(),
            CRYPTOGRAPHIC_DOMAIN_PARAMETERS => {
                self.curve = value.structure().and_then(|domain| domain.first(RECOMMENDED_CURVE)?.enumeration());
            }
            NAME if self.name.is_none() => {
                let name = value.structure().and_then(|name| name.first(NAME_VALUE)?.text());
                self.name = name.map(shorten).filter(|name| !name.is_empty());
            }
            _ => {}
        }
    }
}

/// An object as Get answers it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Object<'a> {
    pub(super) unique_identifier: &'a str,
    pub(super) kind: u32,
    /// Of the kinds of object that hold one.
    pub(super) key_block: Option<Structure<'a>>,
}

impl<'a> Object<'a> {
    /// From a Get's answer (KMIP 1.4, 4.11).
    pub(super) fn read(payload: Structure<'a>) -> Option<Self> {
        let object_type = payload.first(OBJECT_TYPE)?.enumeration()?;
        let tag = match object_type {
            object_type::SYMMETRIC_KEY => Some(SYMMETRIC_KEY),
            object_type::PRIVATE_KEY => Some(PRIVATE_KEY),
            object_type::SECRET_DATA => Some(SECRET_DATA),
            _ => None,
        };
        let object = tag.and_then(|tag| payload.first(tag)).and_then(Value::structure);
        Some(Self {
            unique_identifier: payload.first(UNIQUE_IDENTIFIER)?.text()?,
            kind: object_type,
            key_block: object.and_then(|object| object.first(KEY_BLOCK)).and_then(Value::structure),
        })
    }
}
