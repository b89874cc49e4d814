//! Whole answers and near misses, put together by hand: what mutations start from, and the first seeds of the fuzzer.

use super::super::tags::{
    ATTRIBUTE, ATTRIBUTE_NAME, ATTRIBUTE_VALUE, ATTRIBUTES, BATCH_COUNT, BATCH_ITEM, CRYPTOGRAPHIC_ALGORITHM,
    CRYPTOGRAPHIC_DOMAIN_PARAMETERS, CRYPTOGRAPHIC_LENGTH, CRYPTOGRAPHIC_USAGE_MASK, D, KEY, KEY_BLOCK,
    KEY_FORMAT_TYPE, KEY_MATERIAL, KEY_VALUE, KEY_WRAPPING_DATA, MODULUS, NAME, NAME_TYPE, NAME_VALUE, OBJECT_TYPE,
    OPERATION, P, PRIVATE_EXPONENT, PRIVATE_KEY, PROTOCOL_VERSION, PROTOCOL_VERSION_MAJOR, PROTOCOL_VERSION_MINOR,
    PUBLIC_EXPONENT, Q, RECOMMENDED_CURVE, RESPONSE_MESSAGE, RESPONSE_PAYLOAD, RESULT_MESSAGE, RESULT_REASON,
    RESULT_STATUS, SECRET_DATA, STATE, SYMMETRIC_KEY, UNIQUE_BATCH_ITEM_ID, UNIQUE_IDENTIFIER, algorithm, curve,
    key_format, object_type, usage,
};
use super::super::ttlv::Tag;
use super::oracle::Reached;
use rsa::pkcs8::{DecodePrivateKey as _, PrivateKeyInfoRef};
use rsa::traits::{PrivateKeyParts as _, PublicKeyParts as _};

const RSA_2048: &[u8] = include_bytes!("../../../../tests/fixtures/material/rsa_2048.der");
const RSA_3072: &[u8] = include_bytes!("../../../../tests/fixtures/material/rsa_3072.der");
const RSA_4096: &[u8] = include_bytes!("../../../../tests/fixtures/material/rsa_4096.der");

const CURVES: [(&str, &[u8], u32); 4] = [
    ("p256", include_bytes!("../../../../tests/fixtures/material/p256.der"), curve::P_256),
    ("p384", include_bytes!("../../../../tests/fixtures/material/p384.der"), curve::P_384),
    ("p521", include_bytes!("../../../../tests/fixtures/material/p521.der"), curve::P_521),
    ("k256", include_bytes!("../../../../tests/fixtures/material/secp256k1.der"), curve::SECP256K1),
];

pub const BIG_INTEGER: u8 = 4;

/// In the header of a response, and of extensions: nobody looks at them.
const TIME_STAMP: Tag = Tag(0x42_0092);
const EXTENSION: Tag = Tag(0x54_0001);

const DISCOVER_VERSIONS: u32 = 0x1E;
const LOCATE: u32 = 0x08;
const GET_ATTRIBUTES: u32 = 0x0B;
const GET: u32 = 0x0A;

/// An answer, and how far it gets.
pub struct Sample {
    pub name: String,
    pub bytes: Vec<u8>,
    pub reaches: Reached,
}

/// One item of any type.
pub fn encode(tag: Tag, kind: u8, value: &[u8]) -> Vec<u8> {
    let mut bytes = tag.0.to_be_bytes()[1..].to_vec();
    bytes.push(kind);
    bytes.extend(u32::try_from(value.len()).unwrap().to_be_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

fn structure(tag: Tag, inside: &[Vec<u8>]) -> Vec<u8> {
    encode(tag, 1, &inside.concat())
}

fn integer(tag: Tag, number: i32) -> Vec<u8> {
    encode(tag, 2, &number.to_be_bytes())
}

fn enumeration(tag: Tag, number: u32) -> Vec<u8> {
    encode(tag, 5, &number.to_be_bytes())
}

fn text(tag: Tag, text: &str) -> Vec<u8> {
    encode(tag, 7, text.as_bytes())
}

fn bytes(tag: Tag, bytes: &[u8]) -> Vec<u8> {
    encode(tag, 8, bytes)
}

/// As KMIP writes a number that is not negative: a multiple of eight bytes, the first bit 0.
fn big_integer(tag: Tag, number: &[u8]) -> Vec<u8> {
    let mut padded = vec![0; (number.len() + 1).next_multiple_of(8) - number.len()];
    padded.extend(number);
    encode(tag, BIG_INTEGER, &padded)
}

fn version(major: i32, minor: i32) -> Vec<u8> {
    let numbers = [integer(PROTOCOL_VERSION_MAJOR, major), integer(PROTOCOL_VERSION_MINOR, minor)];
    structure(PROTOCOL_VERSION, &numbers)
}

fn message(items: &[Vec<u8>]) -> Vec<u8> {
    let count = integer(BATCH_COUNT, i32::try_from(items.len()).unwrap());
    let header = structure(Tag(0x42_007A), &[version(1, 4), encode(TIME_STAMP, 9, &[0; 8]), count]);
    structure(RESPONSE_MESSAGE, &[vec![header], items.to_vec()].concat())
}

/// A batch item that went well; with its place where there are several.
fn done(operation: u32, id: Option<u8>, payload: &[Vec<u8>]) -> Vec<u8> {
    let id = id.map(|id| bytes(UNIQUE_BATCH_ITEM_ID, &[id])).unwrap_or_default();
    let payload = structure(RESPONSE_PAYLOAD, payload);
    structure(BATCH_ITEM, &[enumeration(OPERATION, operation), id, enumeration(RESULT_STATUS, 0), payload])
}

fn refused(operation: Option<u32>, id: Option<u8>, reason: u32) -> Vec<u8> {
    let operation = operation.map(|operation| enumeration(OPERATION, operation)).unwrap_or_default();
    let id = id.map(|id| bytes(UNIQUE_BATCH_ITEM_ID, &[id])).unwrap_or_default();
    let said = text(RESULT_MESSAGE, "no\n");
    structure(BATCH_ITEM, &[operation, id, enumeration(RESULT_STATUS, 1), enumeration(RESULT_REASON, reason), said])
}

/// Attributes as KMIP 1.x names them.
fn named(mask: u32, curve: Option<u32>) -> Vec<Vec<u8>> {
    let attribute = |name: &str, value| structure(ATTRIBUTE, &[text(ATTRIBUTE_NAME, name), value]);
    let mut all = vec![
        text(UNIQUE_IDENTIFIER, "7"),
        attribute("State", enumeration(ATTRIBUTE_VALUE, 2)),
        attribute("Cryptographic Usage Mask", integer(ATTRIBUTE_VALUE, mask.cast_signed())),
        attribute("Name", structure(ATTRIBUTE_VALUE, &[text(NAME_VALUE, "n"), enumeration(NAME_TYPE, 1)])),
        attribute("x-Owner", text(ATTRIBUTE_VALUE, "o")),
    ];
    all.extend(curve.map(|curve| {
        let value = structure(ATTRIBUTE_VALUE, &[enumeration(RECOMMENDED_CURVE, curve)]);
        attribute("Cryptographic Domain Parameters", value)
    }));
    all
}

/// Attributes under their tags, as in KMIP 2.0.
fn tagged(algorithm: u32, length: i32) -> Vec<Vec<u8>> {
    let inside = [
        enumeration(STATE, 2),
        integer(CRYPTOGRAPHIC_USAGE_MASK, 0x0C),
        enumeration(OBJECT_TYPE, object_type::SYMMETRIC_KEY),
        enumeration(CRYPTOGRAPHIC_ALGORITHM, algorithm),
        integer(CRYPTOGRAPHIC_LENGTH, length),
        structure(CRYPTOGRAPHIC_DOMAIN_PARAMETERS, &[enumeration(RECOMMENDED_CURVE, curve::P_256)]),
        structure(NAME, &[text(NAME_VALUE, "n"), enumeration(NAME_TYPE, 1)]),
    ];
    vec![text(UNIQUE_IDENTIFIER, "7"), structure(ATTRIBUTES, &inside)]
}

/// What Get answers: an object of a key block of these items.
fn object(object_type: u32, block: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let tag = match object_type {
        object_type::SYMMETRIC_KEY => SYMMETRIC_KEY,
        object_type::SECRET_DATA => SECRET_DATA,
        _ => PRIVATE_KEY,
    };
    let object = structure(tag, &[structure(KEY_BLOCK, block)]);
    vec![enumeration(OBJECT_TYPE, object_type), text(UNIQUE_IDENTIFIER, "7"), object]
}

fn block(format: u32, algorithm: u32, length: i32, material: Vec<u8>) -> Vec<Vec<u8>> {
    let value = structure(KEY_VALUE, &[material]);
    let said = [enumeration(CRYPTOGRAPHIC_ALGORITHM, algorithm), integer(CRYPTOGRAPHIC_LENGTH, length)];
    [vec![enumeration(KEY_FORMAT_TYPE, format), value], said.to_vec()].concat()
}

fn secret(format: u32, algorithm: u32, material: &[u8]) -> Vec<Vec<u8>> {
    let length = i32::try_from(material.len() * 8).unwrap();
    let material = match format {
        key_format::TRANSPARENT_SYMMETRIC_KEY => structure(KEY_MATERIAL, &[bytes(KEY, material)]),
        _ => bytes(KEY_MATERIAL, material),
    };
    block(format, algorithm, length, material)
}

fn inner(pkcs8: &[u8]) -> &[u8] {
    PrivateKeyInfoRef::try_from(pkcs8).unwrap().private_key.as_bytes()
}

/// The private value of an elliptic fixture: version, then an OCTET STRING.
fn scalar(pkcs8: &[u8]) -> &[u8] {
    let sec1 = inner(pkcs8);
    let at = sec1.windows(4).position(|window| window == [2, 1, 1, 4]).unwrap() + 5;
    &sec1[at..at + usize::from(sec1[at - 1])]
}

/// The numbers of an RSA key that are asked for.
fn numbers(pkcs8: &[u8], tags: &[Tag]) -> Vec<u8> {
    let key = rsa::PrivateKey::from_pkcs8_der(pkcs8).unwrap();
    let number = |tag: &Tag| {
        let number = match *tag {
            MODULUS => key.as_public_key().n().to_be_bytes(),
            PUBLIC_EXPONENT => key.as_public_key().e().to_be_bytes(),
            PRIVATE_EXPONENT => key.d().to_be_bytes(),
            P => key.primes()[0].to_be_bytes(),
            _ => key.primes()[1].to_be_bytes(),
        };
        big_integer(*tag, &number)
    };
    structure(KEY_MATERIAL, &tags.iter().map(number).collect::<Vec<_>>())
}

/// Structures inside each other, the message included.
fn nested(depth: usize) -> Vec<u8> {
    (1..depth).fold(structure(EXTENSION, &[]), |inside, at| {
        structure(if at + 1 == depth { RESPONSE_MESSAGE } else { EXTENSION }, &[inside])
    })
}

/// All samples.
pub fn all() -> Vec<Sample> {
    let mut samples = Vec::new();
    let mut add = |name: &str, bytes: Vec<u8>, reaches| samples.push(Sample { name: name.to_owned(), bytes, reaches });
    answers(&mut add);
    secrets(&mut add);
    pairs(&mut add);
    batches(&mut add);
    lies(&mut add);
    samples
}

fn answers(add: &mut impl FnMut(&str, Vec<u8>, Reached)) {
    let versions = [version(2, 1), version(2, 0), version(1, 4), version(1, 2)];
    add("versions", message(&[done(DISCOVER_VERSIONS, None, &versions)]), Reached::Answer);
    add("version", message(&[done(DISCOVER_VERSIONS, None, &[version(1, 4)])]), Reached::Answer);
    add("no_versions", message(&[done(DISCOVER_VERSIONS, None, &[])]), Reached::Answer);
    let ids: Vec<_> = (0..17).map(|id| text(UNIQUE_IDENTIFIER, &id.to_string())).collect();
    add("located_none", message(&[done(LOCATE, None, &[])]), Reached::Answer);
    add("located", message(&[done(LOCATE, None, &ids[7..8])]), Reached::Answer);
    add("located_many", message(&[done(LOCATE, None, &ids)]), Reached::Answer);
    add("attributes", message(&[done(GET_ATTRIBUTES, None, &named(3, Some(curve::P_256)))]), Reached::Answer);
    add("attributes_2", message(&[done(GET_ATTRIBUTES, None, &tagged(algorithm::AES, 256))]), Reached::Answer);
    for reason in [0x01, 0x03, 0x05, 0x0C, 0x0D, 0x16, 0x100] {
        add(&format!("refused_{reason:x}"), message(&[refused(Some(GET), None, reason)]), Reached::Answer);
    }
    add("refused_message", message(&[refused(None, None, 0x04)]), Reached::Answer);
    let types = [
        encode(EXTENSION, 3, &[7; 8]),
        encode(EXTENSION, BIG_INTEGER, &[7; 16]),
        encode(EXTENSION, 6, &[0, 0, 0, 0, 0, 0, 0, 1]),
        encode(EXTENSION, 10, &[7; 4]),
        encode(EXTENSION, 11, &[7; 8]),
        text(EXTENSION, "ÄÖÜ€"),
    ];
    add("types", structure(RESPONSE_MESSAGE, &types), Reached::Message);
    add("pending", message(&[structure(BATCH_ITEM, &[enumeration(RESULT_STATUS, 2)])]), Reached::Message);
    add("no_status", message(&[structure(BATCH_ITEM, &[])]), Reached::Message);
    add("no_response", structure(BATCH_ITEM, &[]), Reached::Message);
}

fn got(object: &[Vec<u8>]) -> Vec<u8> {
    message(&[done(GET, None, object)])
}

fn secrets(add: &mut impl FnMut(&str, Vec<u8>, Reached)) {
    use algorithm::{AES, HMAC_SHA224, HMAC_SHA256, HMAC_SHA384, HMAC_SHA512, SM4};
    use key_format::{OPAQUE, RAW, TRANSPARENT_SYMMETRIC_KEY};
    let symmetric = |block: &[Vec<u8>]| got(&object(object_type::SYMMETRIC_KEY, block));
    for (name, format, algorithm, length) in [
        ("aes", RAW, AES, 32),
        ("aes_transparent", TRANSPARENT_SYMMETRIC_KEY, AES, 32),
        ("sm4", OPAQUE, SM4, 16),
        ("hmac_224", RAW, HMAC_SHA224, 28),
        ("hmac_256", RAW, HMAC_SHA256, 32),
        ("hmac_384", TRANSPARENT_SYMMETRIC_KEY, HMAC_SHA384, 48),
        ("hmac_512", OPAQUE, HMAC_SHA512, 64),
    ] {
        add(name, symmetric(&secret(format, algorithm, &vec![7; length])), Reached::Key);
    }
    add("aes_128", symmetric(&secret(RAW, AES, &[7; 16])), Reached::Object);
    let bare = &secret(RAW, AES, &[7; 32])[..2];
    add("secret_data", got(&object(object_type::SECRET_DATA, bare)), Reached::Key);
    let wrapping = structure(KEY_WRAPPING_DATA, &[enumeration(Tag(0x42_009E), 1)]);
    add("wrapped", symmetric(&[secret(RAW, AES, &[7; 40]), vec![wrapping]].concat()), Reached::Object);
    add("wrapped_whole", symmetric(&[enumeration(KEY_FORMAT_TYPE, RAW), bytes(KEY_VALUE, &[7; 40])]), Reached::Object);
    add("no_value", symmetric(&[enumeration(KEY_FORMAT_TYPE, RAW)]), Reached::Object);
    add("no_material", symmetric(&[enumeration(KEY_FORMAT_TYPE, RAW), structure(KEY_VALUE, &[])]), Reached::Object);
    let certificate = [enumeration(OBJECT_TYPE, object_type::CERTIFICATE), text(UNIQUE_IDENTIFIER, "7")];
    add("certificate", got(&certificate), Reached::Object);
    let public = object(object_type::PUBLIC_KEY, &secret(key_format::PKCS_8, algorithm::RSA, &[7; 8]));
    add("public_key", got(&public), Reached::Object);
}

fn pairs(add: &mut impl FnMut(&str, Vec<u8>, Reached)) {
    use algorithm::{EC, ECDH, ECDSA, RSA};
    let private = |block: &[Vec<u8>]| got(&object(object_type::PRIVATE_KEY, block));
    for (bits, pkcs8) in [(2048, RSA_2048), (3072, RSA_3072), (4096, RSA_4096)] {
        for (name, format, der) in [
            ("pkcs8", key_format::PKCS_8, pkcs8),
            ("pkcs1", key_format::PKCS_1, inner(pkcs8)),
            ("raw", key_format::RAW, inner(pkcs8)),
        ] {
            let block = block(format, RSA, bits, bytes(KEY_MATERIAL, der));
            add(&format!("rsa_{bits}_{name}"), private(&block), Reached::Key);
        }
        for (name, tags) in [
            ("whole", &[MODULUS, PRIVATE_EXPONENT, PUBLIC_EXPONENT, P, Q][..]),
            ("primes", &[MODULUS, PUBLIC_EXPONENT, P, Q]),
            ("exponents", &[MODULUS, PRIVATE_EXPONENT, PUBLIC_EXPONENT]),
        ] {
            let block = block(key_format::TRANSPARENT_RSA_PRIVATE_KEY, RSA, bits, numbers(pkcs8, tags));
            add(&format!("rsa_{bits}_transparent_{name}"), private(&block), Reached::Key);
        }
    }
    for (name, pkcs8, number) in CURVES {
        for (form, format, der) in [
            ("pkcs8", key_format::PKCS_8, pkcs8),
            ("sec1", key_format::EC_PRIVATE_KEY, inner(pkcs8)),
            ("raw", key_format::OPAQUE, inner(pkcs8)),
        ] {
            add(&format!("{name}_{form}"), private(&block(format, EC, 0, bytes(KEY_MATERIAL, der))), Reached::Key);
        }
        let given = [enumeration(RECOMMENDED_CURVE, number), big_integer(D, scalar(pkcs8))];
        for (algorithm, format) in [
            (EC, key_format::TRANSPARENT_EC_PRIVATE_KEY),
            (ECDSA, key_format::TRANSPARENT_ECDSA_PRIVATE_KEY),
            (ECDH, key_format::TRANSPARENT_ECDH_PRIVATE_KEY),
        ] {
            let block = block(format, algorithm, 0, structure(KEY_MATERIAL, &given));
            add(&format!("{name}_transparent_{format:x}"), private(&block), Reached::Key);
        }
    }
}

/// Several operations in one message.
fn batches(add: &mut impl FnMut(&str, Vec<u8>, Reached)) {
    let aes = object(object_type::SYMMETRIC_KEY, &secret(key_format::RAW, algorithm::AES, &[7; 32]));
    let located = done(LOCATE, Some(0), &[text(UNIQUE_IDENTIFIER, "7")]);
    let of = |mask| done(GET_ATTRIBUTES, Some(1), &named(mask, None));
    let got = done(GET, Some(2), &aes);
    add("batch", message(&[located.clone(), of(usage::DECRYPT), got.clone()]), Reached::Key);
    add("batch_swapped", message(&[got.clone(), located.clone(), of(usage::EXPORT)]), Reached::Key);
    add("batch_wrong_usage", message(&[located.clone(), of(usage::KEY_AGREEMENT), got.clone()]), Reached::Object);
    add("batch_stopped", message(&[located.clone(), refused(Some(GET_ATTRIBUTES), Some(1), 0x01)]), Reached::Answer);
    add("batch_doubled", message(&[located.clone(), got.clone(), got]), Reached::Message);
    add("batch_unasked", message(&[located, done(DISCOVER_VERSIONS, Some(9), &[])]), Reached::Message);
    // An elliptic key that names no curve, where the server does.
    let (_, pkcs8, number) = CURVES[0];
    let bare = [&[0x30, 37, 2, 1, 1, 4, 32][..], scalar(pkcs8)].concat();
    let bare = block(key_format::EC_PRIVATE_KEY, algorithm::EC, 256, bytes(KEY_MATERIAL, &bare));
    let bare = object(object_type::PRIVATE_KEY, &bare);
    let known = done(GET_ATTRIBUTES, Some(0), &named(usage::SIGN, Some(number)));
    add("bare_curve", message(&[done(GET, None, &bare)]), Reached::Object);
    add("bare_curve_named", message(&[known, done(GET, Some(1), &bare)]), Reached::Key);
    let known = done(GET_ATTRIBUTES, Some(0), &tagged(algorithm::AES, 256));
    add("batch_2", message(&[known, done(GET, Some(1), &aes)]), Reached::Key);
}

/// What is no message, or hardly one.
fn lies(add: &mut impl FnMut(&str, Vec<u8>, Reached)) {
    add("nested", nested(32), Reached::Message);
    add("nested_deeper", nested(33), Reached::Nothing);
    add("many", structure(RESPONSE_MESSAGE, &vec![structure(EXTENSION, &[]); 60]), Reached::Message);
    let whole = message(&[done(LOCATE, None, &[text(UNIQUE_IDENTIFIER, "seven")])]);
    let with = |at: usize, byte: u8| {
        let mut changed = whole.clone();
        changed[at] = byte;
        changed
    };
    let last = whole.len();
    add("longer", with(4, 0xFF), Reached::Nothing);
    add("shorter", with(7, 8), Reached::Nothing);
    add("uneven", with(7, whole[7] - 1), Reached::Nothing);
    add("longer_inside", with(last - 9, 0x10), Reached::Nothing);
    add("shorter_inside", with(last - 9, 1), Reached::Nothing);
    add("padded", with(last - 1, 1), Reached::Nothing);
    add("no_text", with(last - 8, 0xFF), Reached::Nothing);
    add("unknown_type", with(last - 13, 0x0C), Reached::Nothing);
    // What follows is not read: the session ends at the announced length.
    add("trailing", [&whole[..], &[0; 8]].concat(), Reached::Answer);
    add("http", b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), Reached::Nothing);
}
