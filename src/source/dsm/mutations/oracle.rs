//! What holds of any bytes that a server may send. The unit tests ask it, and by `#[path]` the fuzzer's target `ttlv`.

use super::super::answers::{Answer, AnswerFault, Attributes, Object, Refusal, Response, common_version, located};
use super::super::key_block::{self, KeyFault};
use super::super::messages::{Ask, Version};
use super::super::ttlv::{self, Fault, HEADER, Item, Limits, Structure, Value, Writer};
use super::samples::{BIG_INTEGER, encode};
use crate::job::KeyKind;
use crate::source::{KeyMaterial, PlainKey};
use zeroize::Zeroizing;

/// How far bytes got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reached {
    /// No message.
    Nothing,
    /// Well encoded, and no answer to anything that is asked.
    Message,
    /// An answer.
    Answer,
    /// An answer with an object in it.
    Object,
    /// An object that is a key of some kind.
    Key,
}

/// What a connection asks in one message.
const BATCHES: [&[Ask<'static>]; 6] = [
    &[Ask::DiscoverVersions],
    &[Ask::Locate { name: None, at_most: 1 }],
    &[Ask::Locate { name: Some("n"), at_most: 17 }, Ask::GetAttributes("7"), Ask::Get("7")],
    &[Ask::GetAttributes("7"), Ask::Get("7")],
    &[Ask::GetAttributes("7")],
    &[Ask::Get("7")],
];

/// So narrow that short inputs meet all three.
const NARROW: Limits = Limits { bytes: 512, depth: 6, items: 24 };

/// Bytes that one item is shown in, at most.
const MOST_SHOWN: usize = 40;

/// Reads bytes as a session and a connection do, as every kind of key. Panics where something does not hold.
pub fn check(bytes: &[u8]) -> Reached {
    let announced = bytes.first_chunk::<HEADER>().map(|header| ttlv::announced_length(*header, Limits::MESSAGE));
    let narrow = ttlv::parse(bytes, NARROW);
    match ttlv::parse(bytes, Limits::MESSAGE) {
        Ok(message) => {
            assert_eq!(announced, Some(Ok(bytes.len())));
            check_message(message, bytes);
            match narrow {
                Ok(narrow) => assert!(narrow == message),
                Err(fault) => {
                    assert!(matches!(fault, Fault::TooLong(512) | Fault::TooDeep(6) | Fault::TooMany(24)), "{fault}");
                }
            }
        }
        Err(fault) => assert!(narrow.is_err() && !fault.to_string().is_empty()),
    }
    // A session reads as much as is announced, and nothing behind it.
    let message = announced.and_then(Result::ok).and_then(|length| bytes.get(..length));
    let Some(response) = message.and_then(|message| Response::new(Zeroizing::new(message.to_vec())).ok()) else {
        return Reached::Nothing;
    };
    BATCHES.into_iter().map(|asks| read(&response, asks)).max().unwrap_or(Reached::Message)
}

/// What is decoded is encoded again in the same bytes: nothing is overlooked, and nothing can be said in two ways.
fn check_message(message: Item<'_>, bytes: &[u8]) {
    let (items, depth) = size(message);
    assert!(items <= Limits::MESSAGE.items && depth <= Limits::MESSAGE.depth, "{items} items, {depth} deep");
    assert!(format!("{message:?}").len() <= MOST_SHOWN * items);
    assert_eq!(again(message), bytes);
    let (mut is_writable, inside) = (true, message.value.structure().unwrap_or_default());
    let written = Writer::message(message.tag, |writer| is_writable = write(writer, inside));
    assert!(!is_writable || written == bytes);
}

/// Items, and structures inside each other.
fn size(item: Item<'_>) -> (usize, usize) {
    let Value::Structure(structure) = item.value else { return (1, 0) };
    let sizes = structure.items().map(size);
    let (items, depth) = sizes.fold((0, 0), |(items, depth), (more, deeper)| (items + more, depth.max(deeper)));
    (items + 1, depth + 1)
}

fn again(item: Item<'_>) -> Vec<u8> {
    let of = |kind, value: &[u8]| encode(item.tag, kind, value);
    match item.value {
        Value::Structure(structure) => of(1, &structure.items().map(again).collect::<Vec<_>>().concat()),
        Value::Integer(number) => of(2, &number.to_be_bytes()),
        Value::LongInteger(number) => of(3, &number.to_be_bytes()),
        Value::BigInteger(bytes) => of(BIG_INTEGER, bytes),
        Value::Enumeration(number) => of(5, &number.to_be_bytes()),
        Value::Boolean(value) => of(6, &u64::from(value).to_be_bytes()),
        Value::Text(text) => of(7, text.as_bytes()),
        Value::Bytes(bytes) => of(8, bytes),
        Value::DateTime(number) => of(9, &number.to_be_bytes()),
        Value::Interval(number) => of(10, &number.to_be_bytes()),
        Value::DateTimeExtended(number) => of(11, &number.to_be_bytes()),
    }
}

/// Writes what requests are made of; false where there was something else.
fn write(writer: &mut Writer, structure: Structure<'_>) -> bool {
    structure.items().all(|Item { tag, value }| {
        let mut is_writable = true;
        match value {
            Value::Structure(inside) => writer.structure(tag, |writer| is_writable = write(writer, inside)),
            Value::Integer(number) => writer.integer(tag, number),
            Value::Enumeration(number) => writer.enumeration(tag, number),
            Value::Boolean(value) => writer.boolean(tag, value),
            Value::Text(text) => writer.text(tag, text),
            Value::Bytes(bytes) => writer.bytes(tag, bytes),
            _ => is_writable = false,
        }
        is_writable
    })
}

fn read(response: &Response, asks: &[Ask<'_>]) -> Reached {
    let answers = match response.answers(asks) {
        Ok(answers) => answers,
        Err(fault) => {
            assert!(matches!(fault, AnswerFault::Content(_)), "it was decoded before: {fault}");
            return Reached::Message;
        }
    };
    assert!(answers.len() == asks.len() && answers.iter().any(Option::is_some));
    let mut attributes = Attributes::default();
    asks.iter()
        .zip(answers)
        .map(|(ask, answer)| read_answer(ask, answer, &mut attributes))
        .max()
        .unwrap_or(Reached::Answer)
}

fn read_answer(ask: &Ask<'_>, answer: Answer<'_>, attributes: &mut Attributes) -> Reached {
    let payload = match answer {
        None => return Reached::Answer,
        Some(Err(refusal)) => {
            check_refusal(&refusal);
            return Reached::Answer;
        }
        Some(Ok(payload)) => payload,
    };
    match ask {
        Ask::DiscoverVersions => {
            assert!(common_version(payload).is_none_or(|version| Version::ALL.contains(&version)));
        }
        Ask::Locate { .. } => assert!(located(payload).map_or(0, |ids| ids.len()) <= Limits::MESSAGE.items),
        Ask::GetAttributes(_) => {
            *attributes = Attributes::read(payload);
            let name = attributes.name.as_deref();
            assert!(name.is_none_or(|name| !name.is_empty() && is_for_a_log(name)));
            assert!(attributes.state.is_none_or(|state| key_block::unusable_state(state).is_none() == (state == 2)));
        }
        Ask::Get(_) => {
            if let Some(object) = Object::read(payload) {
                return open(&object, attributes);
            }
        }
    }
    Reached::Answer
}

fn check_refusal(refusal: &Refusal) {
    assert!(is_for_a_log(&refusal.message) && refusal.to_string().contains(&refusal.message));
    // Each reason means one thing to a connection.
    let meanings = [
        refusal.is_not_found(),
        refusal.wrong_state().is_some(),
        refusal.is_unauthenticated(),
        refusal.is_denied(),
        refusal.is_withheld(),
        refusal.is_passing(),
        refusal.is_of_message(),
    ];
    assert!(meanings.into_iter().filter(|is_meant| *is_meant).count() <= 1, "{refusal}");
    assert!(!refusal.is_unsupported_operation() || refusal.is_of_message());
}

/// A stranger's text as it is kept.
fn is_for_a_log(text: &str) -> bool {
    text.chars().count() <= 200 && !text.chars().any(char::is_control)
}

/// Opens an object as every kind of key. No pair passes for two kinds.
fn open(object: &Object<'_>, attributes: &Attributes) -> Reached {
    let (mut reached, mut pair) = (Reached::Object, None);
    for kind in KeyKind::ALL {
        match key_block::open(kind, object, attributes) {
            Ok(key) => {
                check_key(kind, &key);
                if kind.is_pair() {
                    assert_eq!(pair.replace(kind), None, "also {kind}");
                }
                reached = Reached::Key;
            }
            Err(KeyFault::WrongKind(reason)) => assert!(!reason.is_empty() && reason.len() <= 200, "{reason}"),
            Err(KeyFault::Material(fault)) => assert!(fault.code().starts_with("material_")),
            Err(fault) => drop(format!("{fault:?}")),
        }
    }
    reached
}

/// What is opened is taken again as the same key.
fn check_key(kind: KeyKind, key: &PlainKey) {
    let kept = key.material().expose();
    assert!(key.kind() == kind && kept.len() <= kind.most_material_bytes());
    match PlainKey::parse(kind, KeyMaterial::new(kept.to_vec())) {
        Ok(again) => assert_eq!((again.material().expose(), again.public_key()), (kept, key.public_key())),
        Err(fault) => panic!("{kind} was taken before: {fault}"),
    }
}
