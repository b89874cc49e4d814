//! Versions, operations and requests (KMIP 1.4, 4 and 7; KMIP 2.0, 6 and 8).
//!
//! Several operations go in one message, so that a key and its state come in one round trip. They are carried out in
//! order, and what follows a failed one is not carried out.

use super::tags::{
    ATTRIBUTE, ATTRIBUTE_NAME, ATTRIBUTE_REFERENCE, ATTRIBUTE_VALUE, ATTRIBUTES, BATCH_COUNT, BATCH_ITEM,
    BATCH_ORDER_OPTION, CRYPTOGRAPHIC_ALGORITHM, CRYPTOGRAPHIC_DOMAIN_PARAMETERS, CRYPTOGRAPHIC_LENGTH,
    CRYPTOGRAPHIC_USAGE_MASK, MAXIMUM_ITEMS, MAXIMUM_RESPONSE_SIZE, NAME, NAME_TYPE, NAME_VALUE, OBJECT_TYPE,
    OPERATION, PROTOCOL_VERSION, PROTOCOL_VERSION_MAJOR, PROTOCOL_VERSION_MINOR, REQUEST_HEADER, REQUEST_MESSAGE,
    REQUEST_PAYLOAD, STATE, UNIQUE_BATCH_ITEM_ID, UNIQUE_IDENTIFIER,
};
use super::ttlv::{Limits, Tag, Writer};
use crate::config::DsmProtocol;
use std::fmt;

/// A version of the protocol that this client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Version {
    /// KMIP 1.2.
    V1_2,
    /// KMIP 1.4.
    V1_4,
    /// KMIP 2.0.
    V2_0,
}

impl Version {
    /// All, the lowest first.
    pub(super) const ALL: [Self; 3] = [Self::V1_2, Self::V1_4, Self::V2_0];

    /// The one that is pinned by the settings.
    pub(super) fn pinned(protocol: DsmProtocol) -> Option<Self> {
        match protocol {
            DsmProtocol::Auto => None,
            DsmProtocol::V1_2 => Some(Self::V1_2),
            DsmProtocol::V1_4 => Some(Self::V1_4),
            DsmProtocol::V2_0 => Some(Self::V2_0),
        }
    }

    pub(super) fn numbers(self) -> (i32, i32) {
        match self {
            Self::V1_2 => (1, 2),
            Self::V1_4 => (1, 4),
            Self::V2_0 => (2, 0),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.numbers();
        write!(f, "{major}.{minor}")
    }
}

/// An operation to ask for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ask<'a> {
    /// Which versions the server knows of ours (KMIP 1.4, 4.26).
    DiscoverVersions,
    /// Which objects have a name, or which there are (KMIP 1.4, 4.9).
    Locate { name: Option<&'a str>, at_most: i32 },
    /// What is known about an object (KMIP 1.4, 4.12).
    GetAttributes(&'a str),
    /// An object with its bytes (KMIP 1.4, 4.11).
    Get(&'a str),
}

/// The attributes that are asked for: how KMIP 1.x calls them, and their tags.
pub(super) const ASKED_ATTRIBUTES: [(&str, Tag); 7] = [
    ("State", STATE),
    ("Cryptographic Usage Mask", CRYPTOGRAPHIC_USAGE_MASK),
    ("Object Type", OBJECT_TYPE),
    ("Cryptographic Algorithm", CRYPTOGRAPHIC_ALGORITHM),
    ("Cryptographic Length", CRYPTOGRAPHIC_LENGTH),
    ("Cryptographic Domain Parameters", CRYPTOGRAPHIC_DOMAIN_PARAMETERS),
    ("Name", NAME),
];

impl Ask<'_> {
    /// The word in metrics.
    pub(super) fn operation(&self) -> &'static str {
        match self {
            Self::DiscoverVersions => "discover_versions",
            Self::Locate { .. } => "locate",
            Self::GetAttributes(_) => "get_attributes",
            Self::Get(_) => "get",
        }
    }

    /// Its number (KMIP 1.4, 9.1.3.2.27).
    pub(super) fn number(&self) -> u32 {
        match self {
            Self::DiscoverVersions => 0x1E,
            Self::Locate { .. } => 0x08,
            Self::GetAttributes(_) => 0x0B,
            Self::Get(_) => 0x0A,
        }
    }

    fn write(&self, version: Version, payload: &mut Writer) {
        match self {
            Self::DiscoverVersions => Version::ALL.iter().rev().for_each(|version| write_version(payload, *version)),
            Self::Locate { name, at_most } => {
                payload.integer(MAXIMUM_ITEMS, *at_most);
                if let Some(name) = name {
                    write_name(payload, version, name);
                }
            }
            Self::GetAttributes(id) => {
                payload.text(UNIQUE_IDENTIFIER, id);
                for (name, tag) in ASKED_ATTRIBUTES {
                    match version {
                        Version::V1_2 | Version::V1_4 => payload.text(ATTRIBUTE_NAME, name),
                        Version::V2_0 => payload.enumeration(ATTRIBUTE_REFERENCE, tag.0),
                    }
                }
            }
            Self::Get(id) => payload.text(UNIQUE_IDENTIFIER, id),
        }
    }
}

/// Attributes are named and valued in KMIP 1.x (1.4, 2.1.1), and stand under their own tags in 2.0 (2.0, 4).
fn write_name(payload: &mut Writer, version: Version, name: &str) {
    const UNINTERPRETED_TEXT_STRING: u32 = 1;
    let value = |writer: &mut Writer| {
        writer.text(NAME_VALUE, name);
        writer.enumeration(NAME_TYPE, UNINTERPRETED_TEXT_STRING);
    };
    match version {
        Version::V1_2 | Version::V1_4 => payload.structure(ATTRIBUTE, |attribute| {
            attribute.text(ATTRIBUTE_NAME, "Name");
            attribute.structure(ATTRIBUTE_VALUE, value);
        }),
        Version::V2_0 => payload.structure(ATTRIBUTES, |attributes| attributes.structure(NAME, value)),
    }
}

fn write_version(writer: &mut Writer, version: Version) {
    let (major, minor) = version.numbers();
    writer.structure(PROTOCOL_VERSION, |writer| {
        writer.integer(PROTOCOL_VERSION_MAJOR, major);
        writer.integer(PROTOCOL_VERSION_MINOR, minor);
    });
}

/// A message that asks for a few operations.
pub(super) fn request(version: Version, asks: &[Ask<'_>]) -> Vec<u8> {
    Writer::message(REQUEST_MESSAGE, |message| {
        message.structure(REQUEST_HEADER, |header| {
            write_version(header, version);
            header.integer(MAXIMUM_RESPONSE_SIZE, small(Limits::MESSAGE.bytes));
            header.boolean(BATCH_ORDER_OPTION, true);
            header.integer(BATCH_COUNT, small(asks.len()));
        });
        for (at, ask) in asks.iter().enumerate() {
            message.structure(BATCH_ITEM, |item| {
                item.enumeration(OPERATION, ask.number());
                if asks.len() > 1 {
                    item.bytes(UNIQUE_BATCH_ITEM_ID, &batch_id(at));
                }
                item.structure(REQUEST_PAYLOAD, |payload| ask.write(version, payload));
            });
        }
    })
}

/// Unique within a message (KMIP 1.4, 6.4).
pub(super) fn batch_id(at: usize) -> [u8; 1] {
    [u8::try_from(at).unwrap_or(u8::MAX)]
}

fn small(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests;
