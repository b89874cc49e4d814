//! Pairs in every form in which they come, and everything else in the forms in which it is given by mistake.

use crate::job::{Curve, KeyKind, Shape};
use crate::source::{KeyMaterial, MaterialFault, PlainKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rsa::pkcs8::der::asn1::{AnyRef, OctetStringRef};
use rsa::pkcs8::der::{Decode as _, Encode as _, Reader as _, SliceReader};
use rsa::pkcs8::{ObjectIdentifier, PrivateKeyInfoRef};

const ED25519: &str = "1.3.101.112";
const ECDSA: &str = "1.2.840.10045.2.1";
const RSA: &str = "1.2.840.113549.1.1.1";
const P256: &str = "1.2.840.10045.3.1.7";

/// PKCS#8 of OpenSSL's making.
fn fixture(kind: KeyKind) -> &'static [u8] {
    match kind {
        KeyKind::Rsa2048 => include_bytes!("../../../tests/fixtures/material/rsa_2048.der"),
        KeyKind::Rsa3072 => include_bytes!("../../../tests/fixtures/material/rsa_3072.der"),
        KeyKind::Rsa4096 => include_bytes!("../../../tests/fixtures/material/rsa_4096.der"),
        KeyKind::EccNistP256 => include_bytes!("../../../tests/fixtures/material/p256.der"),
        KeyKind::EccNistP384 => include_bytes!("../../../tests/fixtures/material/p384.der"),
        KeyKind::EccNistP521 => include_bytes!("../../../tests/fixtures/material/p521.der"),
        KeyKind::EccSecgP256k1 => include_bytes!("../../../tests/fixtures/material/secp256k1.der"),
        _ => panic!("{kind} is no pair"),
    }
}

fn pairs() -> impl Iterator<Item = KeyKind> {
    KeyKind::ALL.into_iter().filter(|kind| kind.is_pair())
}

fn parse(kind: KeyKind, bytes: &[u8]) -> Result<PlainKey, MaterialFault> {
    PlainKey::parse(kind, KeyMaterial::new(bytes.to_vec()))
}

fn fault(kind: KeyKind, bytes: &[u8]) -> MaterialFault {
    parse(kind, bytes).unwrap_err()
}

/// One DER element around others.
fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let body = parts.concat();
    let length = body.len().to_be_bytes();
    let significant = &length[length.iter().position(|byte| *byte != 0).unwrap_or(7)..];
    match body.len() {
        0..128 => [&[tag, significant[0]], body.as_slice()].concat(),
        _ => [&[tag, 0x80 | u8::try_from(significant.len()).unwrap()], significant, &body].concat(),
    }
}

fn sequence(parts: &[&[u8]]) -> Vec<u8> {
    der(0x30, parts)
}

/// A number that is not negative.
fn integer(value: &[u8]) -> Vec<u8> {
    let first = value.iter().position(|byte| *byte != 0).unwrap_or(value.len() - 1);
    let sign: &[u8] = if value[first] < 0x80 { &[] } else { &[0] };
    der(2, &[sign, &value[first..]])
}

fn oid(text: &str) -> Vec<u8> {
    ObjectIdentifier::new_unwrap(text).to_der().unwrap()
}

fn pkcs8(algorithm: &[&[u8]], inner: &[u8], rest: &[&[u8]]) -> Vec<u8> {
    let version: &[u8] = if rest.iter().any(|field| field[0] == 0x81) { &[1] } else { &[0] };
    sequence(&[&integer(version), &sequence(algorithm), &der(4, &[inner]), &rest.concat()])
}

/// A P-256 key's scalar and its public point, uncompressed.
fn p256() -> (Vec<u8>, Vec<u8>) {
    let bytes = fixture(KeyKind::EccNistP256);
    (bytes[36..68].to_vec(), bytes[73..138].to_vec())
}

fn ec_key(scalar: &[u8], rest: &[&[u8]]) -> Vec<u8> {
    sequence(&[&integer(&[1]), &der(4, &[scalar]), &rest.concat()])
}

fn bits(tag: u8, bytes: &[u8]) -> Vec<u8> {
    der(tag, &[&[0], bytes])
}

fn on_p256(inner: &[u8], rest: &[&[u8]]) -> Vec<u8> {
    pkcs8(&[&oid(ECDSA), &oid(P256)], inner, rest)
}

/// The nine numbers of an RSA key: version, n, e, d, p, q, dp, dq, qinv.
fn rsa_numbers(pkcs8: &[u8]) -> Vec<Vec<u8>> {
    let key = PrivateKeyInfoRef::from_der(pkcs8).unwrap();
    let inner: &OctetStringRef = key.private_key;
    SliceReader::new(inner.as_bytes())
        .unwrap()
        .sequence(|reader| {
            let mut numbers = Vec::new();
            while !reader.is_finished() {
                numbers.push(AnyRef::decode(reader)?.value().to_vec());
            }
            Ok::<_, rsa::pkcs8::der::Error>(numbers)
        })
        .unwrap()
}

fn rsa_key(numbers: &[Vec<u8>]) -> Vec<u8> {
    let numbers: Vec<Vec<u8>> = numbers.iter().map(|number| integer(number)).collect();
    let inner = sequence(&numbers.iter().map(Vec::as_slice).collect::<Vec<_>>());
    pkcs8(&[&oid(RSA), &der(5, &[])], &inner, &[])
}

#[test]
fn what_is_generated_is_read_back_as_it_is_and_has_the_expected_size() {
    for kind in KeyKind::ALL {
        let key = PlainKey::generate(kind).unwrap();
        let bytes = key.material().expose();
        let sizes = match kind.shape() {
            Shape::Bytes(length) => length..=length,
            Shape::Ecc(Curve::P256) => 138..=138,
            Shape::Ecc(Curve::K256) => 135..=135,
            Shape::Ecc(Curve::P384) => 185..=185,
            Shape::Ecc(Curve::P521) => 241..=241,
            // A number whose first byte is small is a byte shorter.
            Shape::Rsa(bits) => bits * 9 / 16 + 40..=kind.most_material_bytes(),
        };
        assert!(sizes.contains(&bytes.len()), "{kind}: {} bytes", bytes.len());
        let again = parse(kind, bytes).unwrap();
        assert_eq!((again.material().expose(), again.public_key()), (bytes, key.public_key()), "{kind}");
        assert_ne!(PlainKey::generate(kind).unwrap().material().expose(), bytes);
    }
}

#[test]
fn openssls_keys_are_kept_as_they_are() {
    for kind in pairs() {
        let key = parse(kind, fixture(kind)).unwrap();
        assert_eq!(key.material().expose(), fixture(kind), "{kind}");
        assert!(key.public_key().is_some());
    }
}

#[test]
fn every_legal_form_of_a_key_on_a_curve_becomes_the_one_form() {
    let (scalar, point) = p256();
    let compressed = [&[2 + point[64] % 2], &point[1..33]].concat();
    let [named, whole, short] =
        [der(0xa0, &[&oid(P256)]), der(0xa1, &[&bits(3, &point)]), der(0xa1, &[&bits(3, &compressed)])];
    let attribute = sequence(&[&oid("1.2.840.113549.1.9.20"), &der(0x31, &[&der(12, &[b"name"])])]);
    for (form, given) in [
        ("no public key", on_p256(&ec_key(&scalar, &[]), &[])),
        ("compressed public key", on_p256(&ec_key(&scalar, &[&short]), &[])),
        ("curve repeated", on_p256(&ec_key(&scalar, &[&named, &whole]), &[])),
        ("attributes", on_p256(&ec_key(&scalar, &[&whole]), &[&der(0xa0, &[&attribute])])),
        ("version 2", on_p256(&ec_key(&scalar, &[]), &[&bits(0x81, &point)])),
    ] {
        let key = parse(KeyKind::EccNistP256, &given).unwrap_or_else(|fault| panic!("{form}: {fault}"));
        assert_eq!(key.material().expose(), fixture(KeyKind::EccNistP256), "{form}");
    }
    // A scalar without its leading zero.
    let small = [&[0], &scalar[1..]].concat();
    let [with, without] = [&small, &small[1..]].map(|scalar| {
        parse(KeyKind::EccNistP256, &on_p256(&ec_key(scalar, &[]), &[])).unwrap().material().expose().to_vec()
    });
    assert_eq!(with, without);
}

#[test]
fn a_key_on_a_curve_is_refused_for_its_own_fault() {
    use MaterialFault::{ExplicitCurve, ForeignPublicKey, Malformed, MissingCurve, ScalarOutOfRange};
    let (scalar, point) = p256();
    let inner = ec_key(&scalar, &[]);
    let other = parse(KeyKind::EccNistP256, PlainKey::generate(KeyKind::EccNistP256).unwrap().material().expose());
    let foreign = other.unwrap().public_key().unwrap()[26..].to_vec();
    let order = hex::decode("ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551").unwrap();
    let public = |point: &[u8]| der(0xa1, &[&bits(3, point)]);
    for (given, expected) in [
        (pkcs8(&[&oid(ECDSA)], &inner, &[]), MissingCurve),
        (pkcs8(&[&oid(ECDSA), &der(5, &[])], &inner, &[]), MissingCurve),
        (pkcs8(&[&oid(ECDSA), &sequence(&[&integer(&[1])])], &inner, &[]), ExplicitCurve),
        (on_p256(&ec_key(&scalar, &[&der(0xa0, &[&sequence(&[&integer(&[1])])])]), &[]), ExplicitCurve),
        (on_p256(&ec_key(&scalar, &[&public(&foreign)]), &[]), ForeignPublicKey),
        (on_p256(&ec_key(&scalar, &[&public(&point[..64])]), &[]), ForeignPublicKey),
        (on_p256(&inner, &[&bits(0x81, &foreign)]), ForeignPublicKey),
        (on_p256(&ec_key(&[0; 32], &[]), &[]), ScalarOutOfRange),
        (on_p256(&ec_key(&order, &[]), &[]), ScalarOutOfRange),
        (on_p256(&ec_key(&[1; 33], &[]), &[]), ScalarOutOfRange),
        (on_p256(&ec_key(&[1; 16], &[]), &[]), ScalarOutOfRange),
        (on_p256(&[], &[]), Malformed),
        (on_p256(&scalar, &[]), Malformed),
        (on_p256(&[inner.as_slice(), &[0]].concat(), &[]), Malformed),
        (on_p256(&ec_key(&scalar, &[&public(&point), &public(&point)]), &[]), Malformed),
    ] {
        assert_eq!(fault(KeyKind::EccNistP256, &given), expected, "{}", hex::encode(&given));
    }
}

#[test]
fn a_key_of_another_kind_is_named() {
    let said = |kind, bytes: &[u8]| {
        let fault = fault(kind, bytes);
        (fault.code(), fault.to_string())
    };
    let inner = der(4, &[&[1; 32]]);
    for (kind, bytes, code, names) in [
        (KeyKind::EccNistP256, fixture(KeyKind::EccNistP384), "material_wrong_curve", ["NIST P-384", "NIST P-256"]),
        (KeyKind::EccNistP256, fixture(KeyKind::EccSecgP256k1), "material_wrong_curve", ["secp256k1", "NIST P-256"]),
        (KeyKind::EccNistP256, fixture(KeyKind::Rsa2048), "material_wrong_algorithm", ["RSA", "elliptic"]),
        (KeyKind::Rsa2048, fixture(KeyKind::EccNistP256), "material_wrong_algorithm", ["elliptic", "RSA"]),
        (KeyKind::Rsa2048, fixture(KeyKind::Rsa3072), "material_wrong_modulus", ["3072 bits", "2048 bits"]),
        (KeyKind::Rsa2048, &pkcs8(&[&oid(ED25519)], &inner, &[]), "material_wrong_algorithm", ["Ed25519", "RSA"]),
        (
            KeyKind::Rsa2048,
            &pkcs8(&[&oid("1.2.840.113549.1.1.10")], &inner, &[]),
            "material_wrong_algorithm",
            ["RSASSA-PSS", "RSA"],
        ),
        (KeyKind::Rsa2048, &pkcs8(&[&oid("1.3.9999")], &inner, &[]), "material_wrong_algorithm", ["1.3.9999", "RSA"]),
        (
            KeyKind::EccNistP256,
            &pkcs8(&[&oid(ECDSA), &oid("1.3.36.3.3.2.8.1.1.7")], &inner, &[]),
            "material_wrong_curve",
            ["brainpoolP256r1", "P-256"],
        ),
    ] {
        let (given, text) = said(kind, bytes);
        assert!(given == code && names.iter().all(|name| text.contains(name)), "{given}: {text}");
    }
}

#[test]
fn rsa_numbers_have_to_belong_together() {
    use MaterialFault::{BadExponent, Inconsistent, Malformed, MultiPrime};
    let numbers = rsa_numbers(fixture(KeyKind::Rsa2048));
    let kind = KeyKind::Rsa2048;
    assert_eq!(parse(kind, &rsa_key(&numbers)).unwrap().material().expose(), fixture(kind));
    // Every one of the numbers, a little off or put in another's place.
    for (at, fault_of_it) in [1, 2, 3, 4, 5, 6, 7, 8].map(|at| (at, if at == 2 { BadExponent } else { Inconsistent })) {
        let mut changed = numbers.clone();
        *changed[at].last_mut().unwrap() ^= 1;
        assert_eq!(fault(kind, &rsa_key(&changed)), fault_of_it, "number {at}");
        let mut changed = numbers.clone();
        *changed[at].last_mut().unwrap() ^= 2;
        assert_eq!(fault(kind, &rsa_key(&changed)), Inconsistent, "number {at}");
    }
    for (at, value, expected) in [
        (2, vec![1], BadExponent),
        (2, vec![2, 0, 0, 0, 1], BadExponent),
        (2, vec![1; 256], BadExponent),
        (3, vec![0], Inconsistent),
        (3, vec![1; 4_000], Inconsistent),
        (4, vec![0], Inconsistent),
        (4, vec![1], Inconsistent),
        (5, numbers[4].clone(), Inconsistent),
        (5, vec![1; 4_000], Inconsistent),
        (8, vec![0], Inconsistent),
        (0, vec![1], MultiPrime),
        (0, vec![2], Malformed),
    ] {
        let mut changed = numbers.clone();
        changed[at] = value;
        assert_eq!(fault(kind, &rsa_key(&changed)), expected, "number {at}");
    }
    // n = n * 1, which belongs together and is no key.
    let mut changed = numbers.clone();
    (changed[4], changed[5]) = (numbers[1].clone(), vec![1]);
    assert_eq!(fault(kind, &rsa_key(&changed)), Inconsistent);
    // The primes the other way round need another coefficient.
    let mut swapped = numbers.clone();
    swapped.swap(4, 5);
    swapped.swap(6, 7);
    assert_eq!(fault(kind, &rsa_key(&swapped)), Inconsistent);
    assert_eq!(fault(kind, &rsa_key(&numbers[..8])), Malformed);
    let three_primes = include_bytes!("../../../tests/fixtures/material/rsa_2048_three_primes.der");
    assert_eq!(fault(kind, three_primes), MultiPrime);
}

#[test]
fn an_rsa_key_is_taken_without_null_and_with_its_public_key() {
    let kind = KeyKind::Rsa2048;
    let bytes = fixture(kind);
    let key = PrivateKeyInfoRef::from_der(bytes).unwrap();
    let inner = key.private_key.as_bytes();
    let numbers = rsa_numbers(bytes);
    let public = |n: &[u8]| bits(0x81, &sequence(&[&integer(n), &integer(&numbers[2])]));
    for given in [pkcs8(&[&oid(RSA)], inner, &[]), pkcs8(&[&oid(RSA), &der(5, &[])], inner, &[&public(&numbers[1])])] {
        assert_eq!(parse(kind, &given).unwrap().material().expose(), bytes);
    }
    let foreign = pkcs8(&[&oid(RSA), &der(5, &[])], inner, &[&public(&[9; 256])]);
    assert_eq!(fault(kind, &foreign), MaterialFault::ForeignPublicKey);
    let parameters = pkcs8(&[&oid(RSA), &sequence(&[])], inner, &[]);
    assert_eq!(fault(kind, &parameters), MaterialFault::Malformed);
}

#[test]
fn what_is_given_by_mistake_is_recognised() {
    use MaterialFault::{
        Base64, Container, Encrypted, Hex, IndefiniteLength, Jwk, NotPkcs8, Pem, Pkcs1, PublicKey, Sec1, TooLarge,
        TrailingBytes, Truncated,
    };
    let (scalar, point) = p256();
    let whole = fixture(KeyKind::EccNistP256);
    let rsa = fixture(KeyKind::Rsa2048);
    let algorithm = sequence(&[&oid(ECDSA), &oid(P256)]);
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", STANDARD.encode(whole));
    let numbers = rsa_numbers(rsa);
    let text = |text: String| text.into_bytes();
    for (given, expected) in [
        (text(pem.clone()), Pem),
        (text(format!("Bag Attributes\n    friendlyName: x\n{pem}")), Pem),
        (text(STANDARD.encode(whole)), Base64),
        (text(STANDARD.encode(&pem) + "\n"), Base64),
        (text(STANDARD.encode(whole).replace('+', "-").replace('/', "_").replace('=', "")), Base64),
        (text(hex::encode(whole) + "\n"), Hex),
        (text(r#" {"kty": "EC", "crv": "P-256"}"#.to_owned()), Jwk),
        (text("{}".to_owned()), NotPkcs8),
        (sequence(&[&algorithm, &der(4, &[&[7; 64]])]), Encrypted),
        (sequence(&[&algorithm, &bits(3, &point)]), PublicKey),
        (sequence(&[&sequence(&[&integer(&[9])]), &algorithm, &bits(3, &[1; 70])]), PublicKey),
        (sequence(&[&integer(&numbers[1]), &integer(&numbers[2])]), PublicKey),
        (PrivateKeyInfoRef::from_der(rsa).unwrap().private_key.as_bytes().to_vec(), Pkcs1),
        (ec_key(&scalar, &[&der(0xa0, &[&oid(P256)])]), Sec1),
        (sequence(&[&integer(&[3]), &sequence(&[&oid("1.2.840.113549.1.7.1")])]), Container),
        (sequence(&[&oid("1.2.840.113549.1.7.2"), &der(0xa0, &[])]), Container),
        ([&[0x30, 0x80], &whole[3..], &[0, 0]].concat(), IndefiniteLength),
        ([whole, b"\n"].concat(), TrailingBytes),
        (whole[..100].to_vec(), Truncated),
        (whole[..2].to_vec(), Truncated),
        (whole[1..].to_vec(), NotPkcs8),
        (Vec::new(), NotPkcs8),
        (vec![0x30], Truncated),
        (vec![0x30, 0], NotPkcs8),
        (vec![0x30, 0x84, 0xff, 0xff, 0xff, 0xff], NotPkcs8),
        (vec![0x42; 64 * 1024 + 1], TooLarge),
    ] {
        for kind in [KeyKind::EccNistP256, KeyKind::Rsa2048] {
            assert_eq!(fault(kind, &given), expected, "{}", hex::encode(&given[..given.len().min(80)]));
        }
    }
}

#[test]
fn bytes_of_another_length_are_told_from_their_text() {
    use MaterialFault::{Base64, Hex, Jwk, Pem, TooLarge, WrongLength};
    let (kind, bytes) = (KeyKind::SymmetricDefault, [0xa5; 32]);
    assert!(parse(kind, &bytes).is_ok());
    for (given, expected) in [
        (hex::encode(bytes), Hex),
        (hex::encode(bytes) + "\r\n", Hex),
        (STANDARD.encode(bytes), Base64),
        (STANDARD.encode(bytes) + "\n", Base64),
        (STANDARD.encode([1; 31]), WrongLength { given: 44, needed: 32 }),
        (hex::encode([1; 16]) + "\n", WrongLength { given: 33, needed: 32 }),
        ("-----BEGIN PRIVATE KEY-----".to_owned(), Pem),
        (r#"{"kty":"oct","k":"AAAA"}"#.to_owned(), Jwk),
        ("x".repeat(31), WrongLength { given: 31, needed: 32 }),
        (String::new(), WrongLength { given: 0, needed: 32 }),
        ("x".repeat(70_000), TooLarge),
    ] {
        assert_eq!(fault(kind, given.as_bytes()), expected, "{given:.80}");
    }
}

#[test]
fn faults_and_keys_show_no_bytes() {
    for kind in KeyKind::ALL {
        let key = PlainKey::generate(kind).unwrap();
        let shown = format!("{key:?}");
        assert!(shown.contains("KeyMaterial(..)") && shown.len() < 4_000, "{shown}");
    }
    let (scalar, _) = p256();
    let fault = fault(KeyKind::EccNistP256, &ec_key(&scalar, &[]));
    assert!(!format!("{fault:?} {fault}").contains(&hex::encode(&scalar)[..8]));
    assert!(fault.code().starts_with("material_"));
}
