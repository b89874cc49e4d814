use super::super::answers::*;
use super::super::tags::{
    KEY_BLOCK, RESPONSE_MESSAGE, RESPONSE_PAYLOAD, RESULT_MESSAGE, RESULT_REASON, RESULT_STATUS, SYMMETRIC_KEY,
};
use super::super::ttlv::{self, Value};
use super::*;
use proptest::prelude::*;
use zeroize::Zeroizing;

fn response(fill: impl FnOnce(&mut Writer)) -> Result<Response, AnswerFault> {
    Response::new(Zeroizing::new(Writer::message(RESPONSE_MESSAGE, fill)))
}

/// A batch item: its operation and place, where given, and what came of it.
fn item(message: &mut Writer, operation: Option<u32>, id: Option<u8>, status: u32, fill: impl FnOnce(&mut Writer)) {
    message.structure(BATCH_ITEM, |item| {
        if let Some(operation) = operation {
            item.enumeration(OPERATION, operation);
        }
        if let Some(id) = id {
            item.bytes(UNIQUE_BATCH_ITEM_ID, &[id]);
        }
        item.enumeration(RESULT_STATUS, status);
        fill(item);
    });
}

const ASKS: [Ask<'static>; 2] = [Ask::GetAttributes("7"), Ask::Get("7")];

#[test]
fn versions_differ_in_how_attributes_are_written() {
    let texts = |version, ask| {
        let bytes = request(version, &[ask]);
        let message = ttlv::parse(&bytes, Limits::MESSAGE).unwrap();
        let message = message.value.structure().unwrap();
        let header = message.first(REQUEST_HEADER).and_then(Value::structure).unwrap();
        assert_eq!(common_version(header), Some(version));
        let item = message.first(BATCH_ITEM).and_then(Value::structure).unwrap();
        let payload = item.first(REQUEST_PAYLOAD).and_then(Value::structure).unwrap();
        format!("{:?}", payload.items().map(|item| item.tag).collect::<Vec<_>>())
    };
    let locate = Ask::Locate { name: Some("n"), at_most: 3 };
    assert_eq!(texts(Version::V1_2, locate), "[42004F, 420008]");
    assert_eq!(texts(Version::V1_4, locate), "[42004F, 420008]");
    assert_eq!(texts(Version::V2_0, locate), "[42004F, 420125]");
    let known = Ask::GetAttributes("7");
    assert_eq!(texts(Version::V1_4, known), format!("[420094{}]", ", 42000A".repeat(7)));
    assert_eq!(texts(Version::V2_0, known), format!("[420094{}]", ", 42013B".repeat(7)));
    assert_eq!(texts(Version::V2_0, Ask::Get("7")), "[420094]");
    assert_eq!(texts(Version::V1_2, Ask::DiscoverVersions), "[420069, 420069, 420069]");
}

#[test]
fn the_highest_common_version_is_taken() {
    let offered = |versions: &[(i32, i32)]| {
        let bytes = Writer::message(RESPONSE_PAYLOAD, |payload| {
            for (major, minor) in versions {
                payload.structure(PROTOCOL_VERSION, |version| {
                    version.integer(PROTOCOL_VERSION_MAJOR, *major);
                    version.integer(PROTOCOL_VERSION_MINOR, *minor);
                });
            }
        });
        common_version(ttlv::parse(&bytes, Limits::MESSAGE).unwrap().value.structure().unwrap())
    };
    assert_eq!(offered(&[(1, 0), (1, 2), (1, 4), (2, 0), (2, 1)]), Some(Version::V2_0));
    assert_eq!(offered(&[(1, 4), (1, 2)]), Some(Version::V1_4));
    assert_eq!(offered(&[(1, 3), (2, 1)]), None);
    assert_eq!(offered(&[]), None);
}

#[test]
fn answers_are_matched_to_what_was_asked() {
    let swapped = response(|message| {
        item(message, Some(0x0A), Some(1), 0, |item| item.structure(RESPONSE_PAYLOAD, |_| ()));
        item(message, Some(0x0B), Some(0), 1, |item| {
            item.enumeration(RESULT_REASON, 0x0C);
            item.text(RESULT_MESSAGE, "go\naway");
        });
    })
    .unwrap();
    let answers = swapped.answers(&ASKS).unwrap();
    let refusal = answers[0].clone().unwrap().unwrap_err();
    assert!(refusal.is_denied() && answers[1].clone().unwrap().is_ok());
    assert_eq!(refusal.to_string(), "result reason 0xc, \"goaway\"");
    // Batches that stop at the first fault, and servers that answer for the message as a whole.
    let stopped = response(|message| item(message, None, None, 1, |_| ())).unwrap();
    let answers = stopped.answers(&ASKS).unwrap();
    assert!(matches!(&answers[0], Some(Err(refusal)) if refusal.is_of_message()) && answers[1].is_none());
}

#[test]
fn answers_to_something_else_are_refused() {
    let of = |fill: fn(&mut Writer)| response(fill).unwrap().answers(&ASKS).unwrap_err().to_string();
    for (fill, says) in [
        ((|_| ()) as fn(&mut Writer), "no answer"),
        (|message| item(message, Some(0x08), Some(0), 0, |_| ()), "another operation"),
        (|message| item(message, Some(0x0A), Some(2), 0, |_| ()), "not asked"),
        (|message| (0..2).for_each(|_| item(message, Some(0x0B), Some(0), 0, |_| ())), "another operation"),
        (|message| item(message, Some(0x0B), Some(0), 2, |_| ()), "result status"),
        (|message| message.integer(BATCH_ITEM, 7), "no structure"),
        (|message| message.structure(BATCH_ITEM, |_| ()), "without a result status"),
    ] {
        let fault = of(fill);
        assert!(fault.contains(says), "{says}: {fault}");
    }
    let request = Response::new(Zeroizing::new(request(Version::V1_2, &ASKS))).unwrap();
    assert!(request.answers(&ASKS).is_err());
    assert!(Response::new(Zeroizing::new(b"HTTP/1.1 400 Bad Request".to_vec())).is_err());
}

#[test]
fn attributes_are_read_in_either_encoding() {
    let name = |writer: &mut Writer| {
        writer.text(NAME_VALUE, "payroll");
        writer.enumeration(NAME_TYPE, 1);
    };
    let named = |payload: &mut Writer, name: &str, fill: &dyn Fn(&mut Writer)| {
        payload.structure(ATTRIBUTE, |attribute| {
            attribute.text(ATTRIBUTE_NAME, name);
            fill(attribute);
        });
    };
    let old = Writer::message(RESPONSE_PAYLOAD, |payload| {
        payload.text(UNIQUE_IDENTIFIER, "7");
        named(payload, "State", &|attribute| attribute.enumeration(ATTRIBUTE_VALUE, 2));
        named(payload, "Cryptographic Usage Mask", &|attribute| attribute.integer(ATTRIBUTE_VALUE, 12));
        named(payload, "Cryptographic Length", &|attribute| attribute.integer(ATTRIBUTE_VALUE, 256));
        named(payload, "Name", &|attribute| attribute.structure(ATTRIBUTE_VALUE, name));
        named(payload, "x-unknown", &|attribute| attribute.integer(ATTRIBUTE_VALUE, 7));
        named(payload, "State of mind", &|_| ());
    });
    let new = Writer::message(RESPONSE_PAYLOAD, |payload| {
        payload.text(UNIQUE_IDENTIFIER, "7");
        payload.structure(ATTRIBUTES, |attributes| {
            attributes.enumeration(STATE, 2);
            attributes.integer(CRYPTOGRAPHIC_USAGE_MASK, 12);
            attributes.integer(CRYPTOGRAPHIC_LENGTH, 256);
            attributes.structure(NAME, name);
            attributes.integer(Tag(0x54_0001), 7);
        });
    });
    let expected = Attributes {
        state: Some(2),
        usage_mask: Some(12),
        length: Some(256),
        name: Some("payroll".into()),
        ..Attributes::default()
    };
    for bytes in [old, new] {
        let payload = ttlv::parse(&bytes, Limits::MESSAGE).unwrap().value.structure().unwrap();
        assert_eq!(Attributes::read(payload), expected);
    }
}

proptest! {
    #[test]
    fn no_answer_makes_it_panic(
        good in any::<bool>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
    ) {
        let mut bytes = Writer::message(RESPONSE_MESSAGE, |message| {
            item(message, Some(0x0B), good.then_some(0), 0, |item| item.structure(RESPONSE_PAYLOAD, |payload| {
                payload.structure(ATTRIBUTES, |attributes| attributes.enumeration(STATE, 2));
            }));
            item(message, Some(0x0A), good.then_some(1), 0, |item| item.structure(RESPONSE_PAYLOAD, |payload| {
                payload.enumeration(OBJECT_TYPE, 2);
                payload.text(UNIQUE_IDENTIFIER, "7");
                payload.structure(SYMMETRIC_KEY, |key| key.structure(KEY_BLOCK, |_| ()));
            }));
        });
        for (at, to) in changes {
            let at = at.index(bytes.len());
            bytes[at] = to;
        }
        if let Ok(response) = Response::new(Zeroizing::new(bytes))
            && let Ok(answers) = response.answers(&ASKS)
        {
            for payload in answers.into_iter().flatten().flatten() {
                drop((Attributes::read(payload), located(payload).is_ok(), Object::read(payload).is_some()));
            }
        }
    }
}
