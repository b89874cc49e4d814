use super::super::answers::Object;
use super::super::tags::{
    KEY_BLOCK, OBJECT_TYPE, PRIVATE_KEY, RESPONSE_PAYLOAD, SECRET_DATA, SYMMETRIC_KEY, UNIQUE_IDENTIFIER,
};
use super::super::ttlv::{self, Limits, Writer};
use super::*;
use proptest::prelude::*;
use rsa::PrivateKey;
use rsa::pkcs8::DecodePrivateKey as _;
use rsa::traits::{PrivateKeyParts as _, PublicKeyParts as _};

const P256: &[u8] = include_bytes!("../../../../tests/fixtures/material/p256.der");
const P384: &[u8] = include_bytes!("../../../../tests/fixtures/material/p384.der");
const P521: &[u8] = include_bytes!("../../../../tests/fixtures/material/p521.der");
const K256: &[u8] = include_bytes!("../../../../tests/fixtures/material/secp256k1.der");
const RSA_2048: &[u8] = include_bytes!("../../../../tests/fixtures/material/rsa_2048.der");

const CURVES: [(KeyKind, &[u8], u32); 4] = [
    (KeyKind::EccNistP256, P256, curve::P_256),
    (KeyKind::EccNistP384, P384, curve::P_384),
    (KeyKind::EccNistP521, P521, curve::P_521),
    (KeyKind::EccSecgP256k1, K256, curve::SECP256K1),
];

/// A key block and what is said about it.
#[derive(Clone)]
struct Given {
    object_type: u32,
    format: u32,
    algorithm: Option<u32>,
    length: Option<i32>,
    material: Material,
    is_wrapped: bool,
    attributes: Attributes,
}

#[derive(Clone)]
enum Material {
    None,
    Bytes(Vec<u8>),
    Numbers(Vec<(ttlv::Tag, Vec<u8>)>),
    Curve(u32, Vec<u8>),
    Key(Vec<u8>),
    Opaque(Vec<u8>),
}

impl Given {
    fn secret(format: u32, algorithm: u32, bytes: &[u8]) -> Self {
        Self {
            object_type: object_type::SYMMETRIC_KEY,
            format,
            algorithm: Some(algorithm),
            length: i32::try_from(bytes.len() * 8).ok(),
            material: Material::Bytes(bytes.to_vec()),
            is_wrapped: false,
            attributes: Attributes::default(),
        }
    }

    fn private(format: u32, algorithm: u32, material: Material) -> Self {
        let secret = Self::secret(format, algorithm, &[]);
        Self { object_type: object_type::PRIVATE_KEY, length: None, material, ..secret }
    }

    fn open(&self, kind: KeyKind) -> Result<PlainKey, KeyFault> {
        let tag = match self.object_type {
            object_type::SYMMETRIC_KEY => SYMMETRIC_KEY,
            object_type::SECRET_DATA => SECRET_DATA,
            _ => PRIVATE_KEY,
        };
        let message = Writer::message(RESPONSE_PAYLOAD, |payload| {
            payload.enumeration(OBJECT_TYPE, self.object_type);
            payload.text(UNIQUE_IDENTIFIER, "id");
            payload.structure(tag, |object| object.structure(KEY_BLOCK, |block| self.write(block)));
        });
        let payload = ttlv::parse(&message, Limits::MESSAGE).unwrap().value.structure().unwrap();
        open(kind, &Object::read(payload).unwrap(), &self.attributes)
    }

    fn write(&self, block: &mut Writer) {
        block.enumeration(KEY_FORMAT_TYPE, self.format);
        match &self.material {
            Material::None => {}
            Material::Opaque(bytes) => block.bytes(KEY_VALUE, bytes),
            material => block.structure(KEY_VALUE, |value| match material {
                Material::Bytes(bytes) => value.bytes(KEY_MATERIAL, bytes),
                Material::Key(bytes) => value.structure(KEY_MATERIAL, |key| key.bytes(KEY, bytes)),
                Material::Numbers(numbers) => value.structure(KEY_MATERIAL, |key| {
                    for (tag, number) in numbers {
                        key.big_integer(*tag, number);
                    }
                }),
                Material::Curve(curve, scalar) => value.structure(KEY_MATERIAL, |key| {
                    key.enumeration(RECOMMENDED_CURVE, *curve);
                    key.big_integer(D, scalar);
                }),
                Material::None | Material::Opaque(_) => {}
            }),
        }
        if let Some(algorithm) = self.algorithm {
            block.enumeration(CRYPTOGRAPHIC_ALGORITHM, algorithm);
        }
        if let Some(length) = self.length {
            block.integer(CRYPTOGRAPHIC_LENGTH, length);
        }
        if self.is_wrapped {
            block.structure(KEY_WRAPPING_DATA, |_| ());
        }
    }
}

/// As KMIP writes a number that is not negative: a multiple of eight bytes, the first bit 0.
fn big(number: &[u8]) -> Vec<u8> {
    let digits = number.iter().position(|byte| *byte != 0).map_or(&[][..], |first| &number[first..]);
    let length = (digits.len() + 1).next_multiple_of(8);
    let mut bytes = vec![0; length - digits.len()];
    bytes.extend(digits);
    bytes
}

fn inner(pkcs8: &[u8]) -> &[u8] {
    PrivateKeyInfoRef::try_from(pkcs8).unwrap().private_key.as_bytes()
}

/// The private value of a fixture: version, then an OCTET STRING.
fn scalar(pkcs8: &[u8]) -> &[u8] {
    let sec1 = inner(pkcs8);
    let at = sec1.windows(4).position(|window| window[..3] == [2, 1, 1] && window[3] == 4).unwrap() + 5;
    &sec1[at..at + usize::from(sec1[at - 1])]
}

/// An `ECPrivateKey` of a private value alone, or with what follows it.
fn sec1(scalar: &[u8], further: &[u8]) -> Vec<u8> {
    let short = |length: usize| u8::try_from(length).unwrap();
    let mut bytes = vec![0x30, short(5 + scalar.len() + further.len()), 2, 1, 1, 4, short(scalar.len())];
    bytes.extend(scalar);
    bytes.extend(further);
    bytes
}

fn expect(opened: &Result<PlainKey, KeyFault>, pkcs8: &[u8], kind: KeyKind) {
    let wanted = PlainKey::parse(kind, KeyMaterial::new(pkcs8.to_vec())).unwrap();
    assert_eq!(opened.as_ref().unwrap().material().expose(), wanted.material().expose());
}

fn wrong_kind(opened: Result<PlainKey, KeyFault>, says: &str) {
    let fault = opened.unwrap_err();
    assert!(matches!(&fault, KeyFault::WrongKind(reason) if reason.contains(says)), "{fault:?}");
}

#[test]
fn secrets_come_raw_opaque_or_transparent() {
    use algorithm::{AES, HMAC_SHA224, HMAC_SHA256, HMAC_SHA384, HMAC_SHA512, SM4};
    for (kind, algorithm) in [
        (KeyKind::SymmetricDefault, AES),
        (KeyKind::Sm4, SM4),
        (KeyKind::Hmac224, HMAC_SHA224),
        (KeyKind::Hmac256, HMAC_SHA256),
        (KeyKind::Hmac384, HMAC_SHA384),
        (KeyKind::Hmac512, HMAC_SHA512),
    ] {
        let Shape::Bytes(length) = kind.shape() else { panic!("{kind}") };
        let bytes: Vec<u8> = (0..length).map(|at| u8::try_from(at).unwrap()).collect();
        for given in [
            Given::secret(key_format::RAW, algorithm, &bytes),
            Given::secret(key_format::OPAQUE, algorithm, &bytes),
            Given {
                material: Material::Key(bytes.clone()),
                ..Given::secret(key_format::TRANSPARENT_SYMMETRIC_KEY, algorithm, &bytes)
            },
            Given { algorithm: None, length: None, ..Given::secret(key_format::RAW, algorithm, &bytes) },
            Given { length: Some(0), ..Given::secret(key_format::RAW, algorithm, &bytes) },
        ] {
            assert_eq!(given.open(kind).unwrap().material().expose(), bytes, "{kind}");
        }
        let secret = Given {
            object_type: object_type::SECRET_DATA,
            algorithm: None,
            ..Given::secret(key_format::RAW, algorithm, &bytes)
        };
        match kind {
            KeyKind::SymmetricDefault | KeyKind::Sm4 => wrong_kind(secret.open(kind), "secret data"),
            _ => assert_eq!(secret.open(kind).unwrap().material().expose(), bytes),
        }
    }
}

#[test]
fn pairs_come_in_every_format() {
    use algorithm::{EC, ECDH, ECDSA, RSA};
    for format in [key_format::PKCS_8, key_format::RAW, key_format::OPAQUE] {
        let given = Given::private(format, RSA, Material::Bytes(RSA_2048.to_vec()));
        expect(&given.open(KeyKind::Rsa2048), RSA_2048, KeyKind::Rsa2048);
    }
    for format in [key_format::PKCS_1, key_format::RAW, key_format::OPAQUE] {
        let given = Given::private(format, RSA, Material::Bytes(inner(RSA_2048).to_vec()));
        expect(&given.open(KeyKind::Rsa2048), RSA_2048, KeyKind::Rsa2048);
    }
    for (kind, pkcs8, curve) in CURVES {
        for algorithm in [EC, ECDSA, ECDH] {
            let given = Given::private(key_format::PKCS_8, algorithm, Material::Bytes(pkcs8.to_vec()));
            expect(&given.open(kind), pkcs8, kind);
        }
        // The fixtures' inner keys name no curve and have a public key.
        for format in [key_format::EC_PRIVATE_KEY, key_format::RAW, key_format::OPAQUE] {
            let given = Given::private(format, EC, Material::Bytes(inner(pkcs8).to_vec()));
            expect(&given.open(kind), pkcs8, kind);
        }
        for format in [
            key_format::TRANSPARENT_EC_PRIVATE_KEY,
            key_format::TRANSPARENT_ECDSA_PRIVATE_KEY,
            key_format::TRANSPARENT_ECDH_PRIVATE_KEY,
        ] {
            let given = Given::private(format, EC, Material::Curve(curve, big(scalar(pkcs8))));
            expect(&given.open(kind), pkcs8, kind);
        }
    }
}

#[test]
fn an_rsa_key_in_numbers_needs_enough_of_them_and_all_to_agree() {
    let key = PrivateKey::from_pkcs8_der(RSA_2048).unwrap();
    let number = |tag| {
        let bytes = match tag {
            MODULUS => key.as_public_key().n().to_be_bytes(),
            PUBLIC_EXPONENT => key.as_public_key().e().to_be_bytes(),
            PRIVATE_EXPONENT => key.d().to_be_bytes(),
            P => key.primes()[0].to_be_bytes(),
            _ => key.primes()[1].to_be_bytes(),
        };
        (tag, big(&bytes))
    };
    let of = |tags: &[ttlv::Tag]| tags.iter().map(|tag| number(*tag)).collect::<Vec<_>>();
    let open = |numbers: Vec<(ttlv::Tag, Vec<u8>)>| {
        let format = key_format::TRANSPARENT_RSA_PRIVATE_KEY;
        Given::private(format, algorithm::RSA, Material::Numbers(numbers)).open(KeyKind::Rsa2048)
    };
    for tags in [
        &[MODULUS, PRIVATE_EXPONENT, PUBLIC_EXPONENT, P, Q][..],
        &[MODULUS, PRIVATE_EXPONENT, PUBLIC_EXPONENT],
        &[MODULUS, PRIVATE_EXPONENT, PUBLIC_EXPONENT, P],
        &[MODULUS, PUBLIC_EXPONENT, P, Q],
    ] {
        expect(&open(of(tags)), RSA_2048, KeyKind::Rsa2048);
    }
    // Without the sign's leading zeros.
    let bare = of(&[MODULUS, PUBLIC_EXPONENT, P, Q])
        .into_iter()
        .map(|(tag, bytes)| (tag, if bytes.len() > 8 && bytes[..8] == [0; 8] { bytes[8..].to_vec() } else { bytes }));
    expect(&open(bare.collect()), RSA_2048, KeyKind::Rsa2048);
    for tags in [&[MODULUS][..], &[MODULUS, PUBLIC_EXPONENT], &[MODULUS, PUBLIC_EXPONENT, P], &[PRIVATE_EXPONENT]] {
        assert_eq!(open(of(tags)).unwrap_err(), KeyFault::Material(MaterialFault::Malformed), "{tags:?}");
    }
    let whole = of(&[MODULUS, PUBLIC_EXPONENT, PRIVATE_EXPONENT, P, Q]);
    let with = |at: usize, number: &[u8]| {
        let mut numbers = whole.clone();
        numbers[at].1 = big(number);
        numbers
    };
    for (numbers, expected) in [
        (with(1, &[2]), MaterialFault::BadExponent),
        (with(1, &[1]), MaterialFault::BadExponent),
        (with(1, &[]), MaterialFault::BadExponent),
        (with(1, &[9; 9]), MaterialFault::BadExponent),
        (with(1, &[3]), MaterialFault::Inconsistent),
        (with(2, &[]), MaterialFault::Inconsistent),
        (with(2, &[7]), MaterialFault::Inconsistent),
        (with(2, &[7; 300]), MaterialFault::Inconsistent),
        (with(3, &[]), MaterialFault::Inconsistent),
        (with(3, &[7; 128]), MaterialFault::Inconsistent),
        (with(3, &[7; 200]), MaterialFault::Inconsistent),
        (with(4, &[1]), MaterialFault::Inconsistent),
    ] {
        assert_eq!(open(numbers).unwrap_err(), KeyFault::Material(expected));
    }
    // Nothing but n, e and d, and they lie.
    for lie in [vec![1], vec![7; 256], vec![0xFF; 256]] {
        let mut numbers = with(2, &lie);
        numbers.truncate(3);
        assert_eq!(open(numbers).unwrap_err(), KeyFault::Material(MaterialFault::Inconsistent), "{}", lie.len());
    }
    let small = [(MODULUS, big(&[0x80; 128])), number(PUBLIC_EXPONENT), number(PRIVATE_EXPONENT)];
    wrong_kind(open(small.to_vec()), "1024 bits");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_numbers_make_it_panic(
        mut modulus in prop::collection::vec(any::<u8>(), 256),
        exponent in prop_oneof![Just(vec![1, 0, 1]), prop::collection::vec(any::<u8>(), 1..6)],
        private in prop::option::of(prop::collection::vec(any::<u8>(), 0..257)),
        primes in prop::option::of((prop::collection::vec(any::<u8>(), 0..129), prop::collection::vec(any::<u8>(), 128))),
    ) {
        modulus[0] |= 0x80;
        let mut numbers = vec![(MODULUS, big(&modulus)), (PUBLIC_EXPONENT, big(&exponent))];
        numbers.extend(private.map(|private| (PRIVATE_EXPONENT, big(&private))));
        if let Some((p, q)) = primes {
            numbers.extend([(P, big(&p)), (Q, big(&q))]);
        }
        let format = key_format::TRANSPARENT_RSA_PRIVATE_KEY;
        let given = Given::private(format, algorithm::RSA, Material::Numbers(numbers));
        prop_assert!(given.open(KeyKind::Rsa2048).is_err());
    }
}

#[test]
fn an_ec_key_without_its_curve_needs_the_server_to_name_it() {
    let (bytes, public) = (scalar(P256), MaterialFault::MissingCurve);
    let bare = Given::private(key_format::EC_PRIVATE_KEY, algorithm::EC, Material::Bytes(sec1(bytes, &[])));
    // It would pass for a key on either curve of 256 bits.
    assert_eq!(bare.open(KeyKind::EccNistP256).unwrap_err(), KeyFault::Material(public));
    assert_eq!(bare.open(KeyKind::EccSecgP256k1).unwrap_err(), KeyFault::Material(public));
    let named = Attributes { curve: Some(curve::P_256), ..Attributes::default() };
    let named = Given { attributes: named, ..bare };
    expect(&named.open(KeyKind::EccNistP256), P256, KeyKind::EccNistP256);
    wrong_kind(named.open(KeyKind::EccSecgP256k1), "another curve");
    // Its own name: id-prime256v1.
    let inside = sec1(bytes, &[0xA0, 10, 6, 8, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 3, 1, 7]);
    let inside = Given::private(key_format::EC_PRIVATE_KEY, algorithm::EC, Material::Bytes(inside));
    expect(&inside.open(KeyKind::EccNistP256), P256, KeyKind::EccNistP256);
    wrong_kind(inside.open(KeyKind::EccSecgP256k1), "NIST P-256");
    let public = Given::private(key_format::EC_PRIVATE_KEY, algorithm::EC, Material::Bytes(inner(P256).to_vec()));
    assert_eq!(public.open(KeyKind::EccSecgP256k1).unwrap_err(), KeyFault::Material(MaterialFault::ForeignPublicKey));
    let transparent = |curve, scalar: &[u8]| {
        Given::private(key_format::TRANSPARENT_EC_PRIVATE_KEY, algorithm::EC, Material::Curve(curve, big(scalar)))
            .open(KeyKind::EccNistP256)
    };
    wrong_kind(transparent(curve::SECP256K1, bytes), "another curve");
    for scalar in [&[0; 32][..], &[0xFF; 32], &[1; 33]] {
        assert_eq!(
            transparent(curve::P_256, scalar).unwrap_err(),
            KeyFault::Material(MaterialFault::ScalarOutOfRange),
            "{}",
            scalar.len()
        );
    }
    assert!(transparent(curve::P_256, &[1]).is_ok());
}

#[test]
fn another_kind_of_key_is_refused_saying_what_it_is() {
    let aes = Given::secret(key_format::RAW, algorithm::AES, &[7; 32]);
    wrong_kind(aes.open(KeyKind::Hmac256), "a key for AES");
    wrong_kind(aes.open(KeyKind::Rsa2048), "a symmetric key");
    wrong_kind(Given::secret(key_format::RAW, algorithm::AES, &[7; 16]).open(KeyKind::SymmetricDefault), "128 bits");
    wrong_kind(Given::secret(key_format::RAW, 0x99, &[7; 32]).open(KeyKind::SymmetricDefault), "algorithm 0x99");
    let by_attributes = Given {
        algorithm: None,
        attributes: Attributes { algorithm: Some(algorithm::HMAC_SHA256), ..Attributes::default() },
        ..aes.clone()
    };
    wrong_kind(by_attributes.open(KeyKind::SymmetricDefault), "HMAC-SHA256");
    let rsa = Given::private(key_format::PKCS_8, algorithm::RSA, Material::Bytes(RSA_2048.to_vec()));
    wrong_kind(rsa.open(KeyKind::EccNistP256), "a key for RSA");
    wrong_kind(rsa.open(KeyKind::Rsa3072), "2048 bits");
    wrong_kind(Given { algorithm: None, ..rsa.clone() }.open(KeyKind::EccNistP256), "elliptic curves");
    for (object_type, says) in [
        (object_type::PUBLIC_KEY, "public key"),
        (object_type::CERTIFICATE, "certificate"),
        (object_type::SPLIT_KEY, "split"),
        (object_type::OPAQUE_OBJECT, "opaque"),
        (99, "another type"),
    ] {
        wrong_kind(Given { object_type, ..rsa.clone() }.open(KeyKind::Rsa2048), says);
    }
    wrong_kind(Given { format: 0x16, ..rsa.clone() }.open(KeyKind::Rsa2048), "0x16");
    wrong_kind(Given { format: key_format::PKCS_8, ..aes }.open(KeyKind::SymmetricDefault), "0x4");
    let p256 = Given::private(key_format::PKCS_8, algorithm::EC, Material::Bytes(P256.to_vec()));
    wrong_kind(p256.open(KeyKind::EccNistP384), "NIST P-256");
}

#[test]
fn what_is_wrapped_missing_or_broken_is_refused() {
    let aes = Given::secret(key_format::RAW, algorithm::AES, &[7; 32]);
    let of = |given: Given| given.open(KeyKind::SymmetricDefault).unwrap_err();
    assert_eq!(of(Given { is_wrapped: true, ..aes.clone() }), KeyFault::Wrapped);
    assert_eq!(of(Given { material: Material::Opaque(vec![7; 40]), ..aes.clone() }), KeyFault::Wrapped);
    assert_eq!(of(Given { material: Material::None, ..aes.clone() }), KeyFault::NotGiven);
    let short = Given { length: None, material: Material::Bytes(vec![7; 31]), ..aes };
    assert_eq!(of(short), KeyFault::Material(MaterialFault::WrongLength { given: 31, needed: 32 }));
    let encrypted = Given::private(key_format::PKCS_8, algorithm::EC, Material::Bytes(inner(P256).to_vec()));
    assert_eq!(encrypted.open(KeyKind::EccNistP256).unwrap_err(), KeyFault::Material(MaterialFault::Sec1));
}

#[test]
fn only_active_keys_are_used() {
    let words =
        [(1, "Pre-Active"), (3, "Deactivated"), (4, "Compromised"), (5, "Destroyed"), (6, "Destroyed Compromised")];
    for (state, word) in words {
        assert_eq!(unusable_state(state), Some(word));
    }
    assert_eq!(unusable_state(2), None);
    assert_eq!(unusable_state(7), Some("in an unknown state"));
}

#[test]
fn a_usage_mask_must_not_contradict() {
    for kind in KeyKind::ALL {
        let allowed = match kind.key_type() {
            "symmetric" => usage::DECRYPT,
            "hmac" => usage::MAC_GENERATE,
            _ => usage::SIGN,
        };
        for mask in [None, Some(0), Some(allowed), Some(usage::EXPORT), Some(usage::UNRESTRICTED), Some(0xFFFF_FFFF)] {
            assert_eq!(check_usage(kind, mask), Ok(()), "{kind} {mask:?}");
        }
        // Derive Key alone.
        assert!(matches!(check_usage(kind, Some(0x200)), Err(KeyFault::WrongUsage(0x200, _))), "{kind}");
    }
    assert!(check_usage(KeyKind::EccNistP256, Some(usage::VERIFY)).is_err());
    assert!(check_usage(KeyKind::SymmetricDefault, Some(usage::SIGN)).is_err());
}
