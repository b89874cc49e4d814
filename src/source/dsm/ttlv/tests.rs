//! What is written is read back; nothing else gets through, and nothing panics.

use super::*;
use proptest::prelude::*;

const LIMITS: Limits = Limits { bytes: 4096, depth: 8, items: 64 };
const TAG: Tag = Tag(0x42_0001);

/// A tree of items that can be written.
#[derive(Clone, Debug)]
enum Tree {
    Structure(u32, Vec<Tree>),
    Integer(u32, i32),
    Enumeration(u32, u32),
    Boolean(u32, bool),
    Text(u32, String),
    Bytes(u32, Vec<u8>),
    BigInteger(u32, Vec<u8>),
}

impl Tree {
    fn write(&self, writer: &mut Writer) {
        match self {
            Self::Structure(tag, inside) => {
                writer.structure(Tag(*tag), |writer| inside.iter().for_each(|tree| tree.write(writer)));
            }
            Self::Integer(tag, number) => writer.integer(Tag(*tag), *number),
            Self::Enumeration(tag, number) => writer.enumeration(Tag(*tag), *number),
            Self::Boolean(tag, value) => writer.boolean(Tag(*tag), *value),
            Self::Text(tag, text) => writer.text(Tag(*tag), text),
            Self::Bytes(tag, bytes) => writer.bytes(Tag(*tag), bytes),
            Self::BigInteger(tag, bytes) => writer.big_integer(Tag(*tag), bytes),
        }
    }

    fn is(&self, item: Item<'_>) -> bool {
        match (self, item.value) {
            (Self::Structure(tag, inside), Value::Structure(structure)) => {
                Tag(*tag) == item.tag
                    && structure.items().count() == inside.len()
                    && inside.iter().zip(structure.items()).all(|(tree, item)| tree.is(item))
            }
            (Self::Integer(tag, number), Value::Integer(read)) => Tag(*tag) == item.tag && *number == read,
            (Self::Enumeration(tag, number), Value::Enumeration(read)) => Tag(*tag) == item.tag && *number == read,
            (Self::Boolean(tag, value), Value::Boolean(read)) => Tag(*tag) == item.tag && *value == read,
            (Self::Text(tag, text), Value::Text(read)) => Tag(*tag) == item.tag && text == read,
            (Self::Bytes(tag, bytes), Value::Bytes(read)) | (Self::BigInteger(tag, bytes), Value::BigInteger(read)) => {
                Tag(*tag) == item.tag && bytes == read
            }
            _ => false,
        }
    }
}

fn tree() -> impl Strategy<Value = Tree> {
    let tag = 0..=0xFF_FFFF_u32;
    let leaf = prop_oneof![
        (tag.clone(), any::<i32>()).prop_map(|(tag, number)| Tree::Integer(tag, number)),
        (tag.clone(), any::<u32>()).prop_map(|(tag, number)| Tree::Enumeration(tag, number)),
        (tag.clone(), any::<bool>()).prop_map(|(tag, value)| Tree::Boolean(tag, value)),
        (tag.clone(), ".{0,12}").prop_map(|(tag, text)| Tree::Text(tag, text)),
        (tag.clone(), prop::collection::vec(any::<u8>(), 0..20)).prop_map(|(tag, bytes)| Tree::Bytes(tag, bytes)),
        (tag.clone(), prop::collection::vec(any::<[u8; 8]>(), 1..4))
            .prop_map(|(tag, words)| Tree::BigInteger(tag, words.concat())),
    ];
    leaf.prop_recursive(5, 40, 4, move |inner| {
        (tag.clone(), prop::collection::vec(inner, 0..4)).prop_map(|(tag, inside)| Tree::Structure(tag, inside))
    })
}

fn message(trees: &[Tree]) -> Vec<u8> {
    Writer::message(TAG, |writer| trees.iter().for_each(|tree| tree.write(writer)))
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(trees in prop::collection::vec(tree(), 0..4)) {
        let bytes = message(&trees);
        let item = parse(&bytes, Limits { items: 1000, ..LIMITS }).unwrap();
        prop_assert!(Tree::Structure(TAG.0, trees).is(item));
        let header = *bytes.first_chunk::<HEADER>().unwrap();
        prop_assert_eq!(announced_length(header, LIMITS), Ok(bytes.len()));
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(item) = parse(&bytes, LIMITS) {
            drop(format!("{item:?}"));
        }
    }

    #[test]
    fn no_change_makes_it_panic_or_read_outside(
        trees in prop::collection::vec(tree(), 1..4),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = message(&trees);
        for (at, to) in changes {
            let at = at.index(bytes.len());
            bytes[at] = to;
        }
        for bytes in [&bytes[..], &bytes[..cut.index(bytes.len())]] {
            if let Ok(item) = parse(bytes, LIMITS) {
                let depth = format!("{item:?}").bytes().fold((0, 0), |(open, most), byte| match byte {
                    b'[' => (open + 1, (open + 1).max(most)),
                    b']' => (open - 1, most),
                    _ => (open, most),
                });
                prop_assert!(depth.1 <= LIMITS.depth);
            }
        }
    }

    #[test]
    fn no_valid_message_is_valid_when_it_is_cut_or_followed_by_something(trees in prop::collection::vec(tree(), 0..3)) {
        let mut bytes = message(&trees);
        for end in 0..bytes.len() {
            prop_assert!(parse(&bytes[..end], LIMITS).is_err());
        }
        bytes.push(0);
        prop_assert!(parse(&bytes, LIMITS).is_err());
    }
}

/// The examples of the specification (KMIP 1.4, 9.1.2).
#[test]
fn the_examples_of_the_specification_are_read() {
    let of = |hex: &str| {
        let inner = hex::decode(hex.replace([' ', '|'], "")).unwrap();
        let length = u32::try_from(inner.len()).unwrap().to_be_bytes();
        [&[0x42, 0, 0x20, STRUCTURE][..], &length, &inner].concat()
    };
    for (hex, value) in [
        ("42 00 20 | 02 | 00 00 00 04 | 00 00 00 08 00 00 00 00", Value::Integer(8)),
        ("42 00 20 | 03 | 00 00 00 08 | 01 B6 9B 4B A5 74 92 00", Value::LongInteger(123_456_789_000_000_000)),
        (
            "42 00 20 | 04 | 00 00 00 10 | 00 00 00 00 03 FD 35 EB 6B C2 DF 46 18 08 00 00",
            Value::BigInteger(&[0, 0, 0, 0, 3, 0xFD, 0x35, 0xEB, 0x6B, 0xC2, 0xDF, 0x46, 0x18, 8, 0, 0]),
        ),
        ("42 00 20 | 05 | 00 00 00 04 | 00 00 00 FF 00 00 00 00", Value::Enumeration(255)),
        ("42 00 20 | 06 | 00 00 00 08 | 00 00 00 00 00 00 00 01", Value::Boolean(true)),
        ("42 00 20 | 07 | 00 00 00 0B | 48 65 6C 6C 6F 20 57 6F 72 6C 64 00 00 00 00 00", Value::Text("Hello World")),
        ("42 00 20 | 08 | 00 00 00 03 | 01 02 03 00 00 00 00 00", Value::Bytes(&[1, 2, 3])),
        ("42 00 20 | 09 | 00 00 00 08 | 00 00 00 00 47 DA 67 F8", Value::DateTime(0x47DA_67F8)),
        ("42 00 20 | 0A | 00 00 00 04 | 00 0D 2F 00 00 00 00 00", Value::Interval(864_000)),
    ] {
        let bytes = of(hex);
        let item = parse(&bytes, LIMITS).unwrap();
        assert_eq!(item.value.structure().unwrap().first(Tag(0x42_0020)), Some(value), "{hex}");
    }
    let nested = "42 00 20 | 01 | 00 00 00 20 | 42 00 04 | 05 | 00 00 00 04 | 00 00 00 FE 00 00 00 00 | \
                  42 00 05 | 02 | 00 00 00 04 | 00 00 00 FF 00 00 00 00";
    let bytes = of(nested);
    let inside = parse(&bytes, LIMITS).unwrap().value.structure().unwrap();
    let inside = inside.first(Tag(0x42_0020)).and_then(Value::structure).unwrap();
    assert_eq!(inside.first(Tag(0x42_0004)).and_then(Value::enumeration), Some(254));
    assert_eq!(inside.first(Tag(0x42_0005)).and_then(Value::integer), Some(255));
}

#[test]
fn every_lie_is_refused_for_what_it_is() {
    let with = |kind: u8, length: u32, value: &[u8]| {
        let mut inner = vec![0x42, 0, 2, kind];
        inner.extend(length.to_be_bytes());
        inner.extend(value);
        let mut bytes = vec![0x42, 0, 1, STRUCTURE];
        bytes.extend(u32::try_from(inner.len()).unwrap().to_be_bytes());
        bytes.extend(inner);
        parse(&bytes, LIMITS).map(|_| ())
    };
    let zeros = [0; 16];
    for (kind, length, value, expected) in [
        (INTEGER, 3, &zeros[..8], Fault::WrongLength(8)),
        (INTEGER, 8, &zeros[..8], Fault::WrongLength(8)),
        (LONG_INTEGER, 4, &zeros[..8], Fault::WrongLength(8)),
        (BIG_INTEGER, 0, &zeros[..0], Fault::WrongLength(8)),
        (BIG_INTEGER, 9, &zeros[..16], Fault::WrongLength(8)),
        (BOOLEAN, 8, &[0, 0, 0, 0, 0, 0, 0, 2][..], Fault::WrongValue(8)),
        (TEXT_STRING, 1, &[0xFF, 0, 0, 0, 0, 0, 0, 0][..], Fault::WrongValue(8)),
        (BYTE_STRING, 1, &[0, 1, 0, 0, 0, 0, 0, 0][..], Fault::WrongPadding(8)),
        (BYTE_STRING, 9, &zeros[..8], Fault::CutOff(8)),
        (BYTE_STRING, u32::MAX, &zeros[..8], Fault::CutOff(8)),
        (STRUCTURE, u32::MAX - 7, &zeros[..8], Fault::CutOff(8)),
        (STRUCTURE, 4, &zeros[..8], Fault::WrongLength(8)),
        (STRUCTURE, 8, &zeros[..8], Fault::UnknownType(16)),
        (0, 0, &zeros[..0], Fault::UnknownType(8)),
        (0x0C, 8, &zeros[..8], Fault::UnknownType(8)),
    ] {
        assert_eq!(with(kind, length, value), Err(expected), "{kind} {length}");
    }
    assert_eq!(parse(&[0x42, 0, 1, INTEGER, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0], LIMITS), Err(Fault::NotAStructure));
    assert_eq!(parse(&vec![0; 5000], LIMITS), Err(Fault::TooLong(4096)));
}

#[test]
fn depth_items_and_length_are_bounded() {
    let nested = |depth: usize| {
        let mut bytes = Vec::new();
        for at in 0..depth {
            bytes.extend([0x42, 0, 1, STRUCTURE]);
            bytes.extend(u32::try_from((depth - at - 1) * HEADER).unwrap().to_be_bytes());
        }
        bytes
    };
    assert!(parse(&nested(LIMITS.depth), LIMITS).is_ok());
    assert_eq!(parse(&nested(LIMITS.depth + 1), LIMITS), Err(Fault::TooDeep(LIMITS.depth)));
    // As deep as a message can be.
    let deepest = nested(Limits::MESSAGE.bytes / HEADER);
    assert_eq!(parse(&deepest, Limits::MESSAGE), Err(Fault::TooDeep(32)));
    let many = |items: usize| Writer::message(TAG, |writer| (1..items).for_each(|_| writer.structure(TAG, |_| ())));
    assert!(parse(&many(LIMITS.items), LIMITS).is_ok());
    assert_eq!(parse(&many(LIMITS.items + 1), LIMITS), Err(Fault::TooMany(LIMITS.items)));
    let header = |length: u32| {
        let [a, b, c, d] = length.to_be_bytes();
        announced_length([0x42, 0, 1, STRUCTURE, a, b, c, d], LIMITS)
    };
    assert_eq!(header(4088), Ok(4096));
    assert_eq!(header(4096), Err(Fault::TooLong(4096)));
    assert_eq!(header(u32::MAX - 7), Err(Fault::TooLong(4096)));
    assert_eq!(header(12), Err(Fault::WrongLength(0)));
    assert_eq!(announced_length(*b"HTTP/1.1", LIMITS), Err(Fault::NotAStructure));
}

#[test]
fn what_is_shown_holds_no_bytes() {
    let bytes = Writer::message(TAG, |writer| {
        writer.bytes(TAG, b"SECRETSECRET");
        writer.big_integer(TAG, b"SECRETSECRETSECR");
        writer.text(TAG, "SECRET");
        writer.integer(TAG, 7);
    });
    let shown = format!("{:?}", parse(&bytes, LIMITS).unwrap());
    assert!(!shown.contains("SECRET") && !shown.contains("83, 69"), "{shown}");
    assert!(shown.contains("(12 bytes)") && shown.contains('7'), "{shown}");
}
