//! TTLV, the binary encoding of KMIP messages (KMIP 1.4, 9.1; KMIP 2.0, 11.1): tag, type, length and value.
//!
//! A message is checked as a whole before anything is read from it: every length lies inside its structure, every type
//! has its size, padding is zero, and depth, number of items and total length are bounded. What is read afterwards are
//! slices of the message; nothing is copied, so that key bytes stay in the one buffer that its owner zeroises.
//!
//! Depends on `thiserror` alone: a fuzzer includes this file as it is, by `#[path]`, and calls [`parse`] and, of what is
//! valid, `format!("{item:?}")`, which visits every item.

use std::fmt;

/// Bytes of an item before its value: a tag of three, a type of one, a length of four.
pub const HEADER: usize = 8;

/// Values are padded to a multiple of so many bytes (KMIP 1.4, 9.1.1.4).
const ALIGNMENT: usize = 8;

/// What an item is about: three bytes. Those of the standard begin with 42, those of extensions with 54.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Tag(pub u32);

/// How large a message may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes in total, the first header included.
    pub bytes: usize,
    /// Structures inside each other, the message included.
    pub depth: usize,
    /// Items in total, the message included.
    pub items: usize,
}

impl Limits {
    /// For a server's answer: far more than the attributes and the bytes of any key.
    pub const MESSAGE: Self = Self { bytes: 64 * 1024, depth: 32, items: 4096 };
}

/// Why bytes are not a message. Positions are offsets from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The message, or what it says of itself, is longer than allowed.
    #[error("the message is longer than {0} bytes")]
    TooLong(usize),
    /// Structures are nested too deeply.
    #[error("structures are nested more than {0} deep")]
    TooDeep(usize),
    /// There are too many items.
    #[error("the message has more than {0} items")]
    TooMany(usize),
    /// The bytes end inside an item, or an item ends outside its structure.
    #[error("the item at byte {0} is cut off")]
    CutOff(usize),
    /// Bytes follow the message.
    #[error("bytes follow the message, from byte {0}")]
    Trailing(usize),
    /// The message is not a structure.
    #[error("the message is not a structure")]
    NotAStructure,
    /// A type that the standard does not know.
    #[error("the item at byte {0} is of an unknown type")]
    UnknownType(usize),
    /// A length that the type does not have.
    #[error("the item at byte {0} has a length that its type does not have")]
    WrongLength(usize),
    /// A value that the type does not have: a boolean of 2, a text that is not UTF-8.
    #[error("the item at byte {0} has a value that its type does not have")]
    WrongValue(usize),
    /// Padding other than zero.
    #[error("the item at byte {0} is padded with something else than zeros")]
    WrongPadding(usize),
}

/// An item of a checked message.
#[derive(Clone, Copy, PartialEq)]
pub struct Item<'a> {
    /// What it is about.
    pub tag: Tag,
    /// What it says.
    pub value: Value<'a>,
}

/// What an item says. `Debug` shows numbers and structure, never the bytes.
#[derive(Clone, Copy, PartialEq)]
pub enum Value<'a> {
    /// Further items.
    Structure(Structure<'a>),
    /// 32 bits, signed; masks too.
    Integer(i32),
    /// 64 bits, signed.
    LongInteger(i64),
    /// Big-endian two's complement; a multiple of eight bytes.
    BigInteger(&'a [u8]),
    /// One of a closed set of numbers.
    Enumeration(u32),
    /// Yes or no.
    Boolean(bool),
    /// UTF-8.
    Text(&'a str),
    /// Anything.
    Bytes(&'a [u8]),
    /// Seconds since 1970.
    DateTime(i64),
    /// Seconds.
    Interval(u32),
    /// Microseconds since 1970 (KMIP 2.0).
    DateTimeExtended(i64),
}

/// The items of a checked structure, in their order.
#[derive(Clone, Copy, Default, PartialEq)]
pub struct Structure<'a>(&'a [u8]);

/// The length of the message that begins with this header, the header included: how many bytes have to be read.
pub fn announced_length(header: [u8; HEADER], limits: Limits) -> Result<usize, Fault> {
    let head = Head::read(&header, 0)?;
    if head.kind != STRUCTURE {
        return Err(Fault::NotAStructure);
    }
    if head.length % ALIGNMENT != 0 {
        return Err(Fault::WrongLength(0));
    }
    match HEADER.checked_add(head.length) {
        Some(total) if total <= limits.bytes => Ok(total),
        _ => Err(Fault::TooLong(limits.bytes)),
    }
}

/// Checks a whole message, which has to be one structure and nothing behind it.
pub fn parse(bytes: &[u8], limits: Limits) -> Result<Item<'_>, Fault> {
    if bytes.len() > limits.bytes {
        return Err(Fault::TooLong(limits.bytes));
    }
    let head = Head::read(bytes, 0)?;
    if head.kind != STRUCTURE {
        return Err(Fault::NotAStructure);
    }
    let end = head.end(0, bytes.len())?;
    if end < bytes.len() {
        return Err(Fault::Trailing(end));
    }
    check(bytes, limits)?;
    read(bytes, 0, end).map(|(item, _)| item)
}

/// Walks all items with the ends of the open structures kept by hand: no input makes the stack grow.
fn check(bytes: &[u8], limits: Limits) -> Result<(), Fault> {
    let mut open: Vec<usize> = Vec::new();
    let (mut at, mut items) = (0, 0_usize);
    loop {
        while open.last().is_some_and(|end| *end == at) {
            open.pop();
        }
        let within = match open.last() {
            Some(end) => *end,
            None if at == 0 => bytes.len(),
            None => return Ok(()),
        };
        items += 1;
        if items > limits.items {
            return Err(Fault::TooMany(limits.items));
        }
        let (item, next) = read(bytes, at, within)?;
        at = if let Value::Structure(_) = item.value {
            if open.len() >= limits.depth {
                return Err(Fault::TooDeep(limits.depth));
            }
            open.push(next);
            at + HEADER
        } else {
            next
        };
    }
}

const STRUCTURE: u8 = 0x01;
const INTEGER: u8 = 0x02;
const LONG_INTEGER: u8 = 0x03;
const BIG_INTEGER: u8 = 0x04;
const ENUMERATION: u8 = 0x05;
const BOOLEAN: u8 = 0x06;
const TEXT_STRING: u8 = 0x07;
const BYTE_STRING: u8 = 0x08;
const DATE_TIME: u8 = 0x09;
const INTERVAL: u8 = 0x0A;
const DATE_TIME_EXTENDED: u8 = 0x0B;

struct Head {
    tag: Tag,
    kind: u8,
    length: usize,
}

impl Head {
    fn read(bytes: &[u8], at: usize) -> Result<Self, Fault> {
        let header = bytes.get(at..).and_then(|rest| rest.first_chunk::<HEADER>()).ok_or(Fault::CutOff(at))?;
        let [t0, t1, t2, kind, l0, l1, l2, l3] = *header;
        let length = usize::try_from(u32::from_be_bytes([l0, l1, l2, l3])).map_err(|_| Fault::CutOff(at))?;
        Ok(Self { tag: Tag(u32::from_be_bytes([0, t0, t1, t2])), kind, length })
    }

    /// Where the next item begins: behind value and padding, inside the structure that this one is in.
    fn end(&self, at: usize, within: usize) -> Result<usize, Fault> {
        self.length
            .checked_next_multiple_of(ALIGNMENT)
            .and_then(|padded| at.checked_add(HEADER)?.checked_add(padded))
            .filter(|end| *end <= within)
            .ok_or(Fault::CutOff(at))
    }
}

/// The item at a position and where the next begins. Of a structure only its own length is looked at.
fn read(bytes: &[u8], at: usize, within: usize) -> Result<(Item<'_>, usize), Fault> {
    let head = Head::read(bytes, at)?;
    let end = head.end(at, within)?;
    let padded = bytes.get(at + HEADER..end).ok_or(Fault::CutOff(at))?;
    let (value, padding) = padded.split_at_checked(head.length).ok_or(Fault::CutOff(at))?;
    if padding.iter().any(|byte| *byte != 0) {
        return Err(Fault::WrongPadding(at));
    }
    let four = || value.try_into().map_err(|_| Fault::WrongLength(at));
    let eight = || value.try_into().map_err(|_| Fault::WrongLength(at));
    let is_whole = value.len() % ALIGNMENT == 0;
    let value = match head.kind {
        STRUCTURE if is_whole => Value::Structure(Structure(value)),
        INTEGER => Value::Integer(i32::from_be_bytes(four()?)),
        LONG_INTEGER => Value::LongInteger(i64::from_be_bytes(eight()?)),
        BIG_INTEGER if is_whole && !value.is_empty() => Value::BigInteger(value),
        STRUCTURE | BIG_INTEGER => return Err(Fault::WrongLength(at)),
        ENUMERATION => Value::Enumeration(u32::from_be_bytes(four()?)),
        BOOLEAN => match u64::from_be_bytes(eight()?) {
            0 => Value::Boolean(false),
            1 => Value::Boolean(true),
            _ => return Err(Fault::WrongValue(at)),
        },
        TEXT_STRING => Value::Text(std::str::from_utf8(value).map_err(|_| Fault::WrongValue(at))?),
        BYTE_STRING => Value::Bytes(value),
        DATE_TIME => Value::DateTime(i64::from_be_bytes(eight()?)),
        INTERVAL => Value::Interval(u32::from_be_bytes(four()?)),
        DATE_TIME_EXTENDED => Value::DateTimeExtended(i64::from_be_bytes(eight()?)),
        _ => return Err(Fault::UnknownType(at)),
    };
    Ok((Item { tag: head.tag, value }, end))
}

impl<'a> Structure<'a> {
    /// Its items.
    pub fn items(self) -> impl Iterator<Item = Item<'a>> {
        let mut at = 0;
        std::iter::from_fn(move || {
            // The whole message was checked: this ends at the structure's end.
            let (item, next) = read(self.0, at, self.0.len()).ok()?;
            at = next;
            Some(item)
        })
    }

    /// The values under a tag, in their order.
    pub fn all(self, tag: Tag) -> impl Iterator<Item = Value<'a>> {
        self.items().filter(move |item| item.tag == tag).map(|item| item.value)
    }

    /// The first value under a tag.
    pub fn first(self, tag: Tag) -> Option<Value<'a>> {
        self.all(tag).next()
    }
}

impl<'a> Value<'a> {
    /// A structure's items.
    pub fn structure(self) -> Option<Structure<'a>> {
        if let Self::Structure(structure) = self { Some(structure) } else { None }
    }

    /// An integer or a mask.
    pub fn integer(self) -> Option<i32> {
        if let Self::Integer(number) = self { Some(number) } else { None }
    }

    /// An enumeration.
    pub fn enumeration(self) -> Option<u32> {
        if let Self::Enumeration(number) = self { Some(number) } else { None }
    }

    /// A text.
    pub fn text(self) -> Option<&'a str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    /// A byte string.
    pub fn bytes(self) -> Option<&'a [u8]> {
        if let Self::Bytes(bytes) = self { Some(bytes) } else { None }
    }

    /// A big integer's bytes.
    pub fn big_integer(self) -> Option<&'a [u8]> {
        if let Self::BigInteger(bytes) = self { Some(bytes) } else { None }
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:06X}", self.0)
    }
}

impl fmt::Debug for Item<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {:?}", self.tag, self.value)
    }
}

impl fmt::Debug for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Structure(structure) => structure.fmt(f),
            Self::Integer(number) => number.fmt(f),
            Self::LongInteger(number) | Self::DateTime(number) | Self::DateTimeExtended(number) => number.fmt(f),
            Self::Enumeration(number) | Self::Interval(number) => number.fmt(f),
            Self::Boolean(value) => value.fmt(f),
            Self::Text(text) => write!(f, "(text of {} bytes)", text.len()),
            Self::BigInteger(bytes) | Self::Bytes(bytes) => write!(f, "({} bytes)", bytes.len()),
        }
    }
}

impl fmt::Debug for Structure<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.items()).finish()
    }
}

/// Writes a message. For requests, which hold names and no key: its buffer grows and is not zeroised.
#[derive(Debug, Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    /// One structure with what `fill` writes into it.
    pub fn message(tag: Tag, fill: impl FnOnce(&mut Self)) -> Vec<u8> {
        let mut writer = Self::default();
        writer.structure(tag, fill);
        writer.0
    }

    /// A structure with what `fill` writes into it.
    pub fn structure(&mut self, tag: Tag, fill: impl FnOnce(&mut Self)) {
        self.head(tag, STRUCTURE, 0);
        let start = self.0.len();
        fill(self);
        let length = length(self.0.len() - start).to_be_bytes();
        if let Some(place) = self.0.get_mut(start - length.len()..start) {
            place.copy_from_slice(&length);
        }
    }

    /// An integer or a mask.
    pub fn integer(&mut self, tag: Tag, number: i32) {
        self.item(tag, INTEGER, &number.to_be_bytes());
    }

    /// An enumeration.
    pub fn enumeration(&mut self, tag: Tag, number: u32) {
        self.item(tag, ENUMERATION, &number.to_be_bytes());
    }

    /// A boolean.
    pub fn boolean(&mut self, tag: Tag, value: bool) {
        self.item(tag, BOOLEAN, &u64::from(value).to_be_bytes());
    }

    /// A text.
    pub fn text(&mut self, tag: Tag, text: &str) {
        self.item(tag, TEXT_STRING, text.as_bytes());
    }

    /// A byte string.
    pub fn bytes(&mut self, tag: Tag, bytes: &[u8]) {
        self.item(tag, BYTE_STRING, bytes);
    }

    /// A big integer, as long as it is given.
    #[cfg(test)]
    pub fn big_integer(&mut self, tag: Tag, bytes: &[u8]) {
        self.item(tag, BIG_INTEGER, bytes);
    }

    fn item(&mut self, tag: Tag, kind: u8, value: &[u8]) {
        self.head(tag, kind, length(value.len()));
        self.0.extend_from_slice(value);
        let padded = self.0.len().next_multiple_of(ALIGNMENT);
        self.0.resize(padded, 0);
    }

    fn head(&mut self, tag: Tag, kind: u8, length: u32) {
        let [_, t0, t1, t2] = tag.0.to_be_bytes();
        self.0.extend_from_slice(&[t0, t1, t2, kind]);
        self.0.extend_from_slice(&length.to_be_bytes());
    }
}

/// Requests are a few hundred bytes. A longer one than the format can say would be refused by every reader.
fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
