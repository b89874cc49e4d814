//! Tests of key pairs, with keys that another implementation made.

use super::*;
use crate::crypto::sha256;

const RSA_2048: &[u8] = include_bytes!("fixtures/wrapping_rsa_2048_a.der");
const RSA_4096: &[u8] = include_bytes!("fixtures/wrapping_rsa_4096_a.der");
const THREE_PRIMES: &[u8] = include_bytes!("fixtures/rsa_2048_three_primes.der");
const EXPLICIT_CURVE: &[u8] = include_bytes!("fixtures/ec_p256_explicit_curve.der");
const COMPRESSED_POINT: &[u8] = include_bytes!("fixtures/ec_p384_compressed_point.der");
const WITHOUT_POINT: &[u8] = include_bytes!("fixtures/ec_p384_without_point.der");

#[test]
fn every_algorithm_signs_what_it_verifies() {
    let rsa = Pair::read(KeySpec::Rsa2048, RSA_2048).unwrap();
    let mut signatures = Vec::new();
    for algorithm in rsa.spec.signing() {
        let signature = rsa.sign(*algorithm, b"message").unwrap();
        for other in rsa.spec.signing() {
            assert_eq!(rsa.verify(*other, b"message", &signature), algorithm == other);
        }
        assert!(!rsa.verify(*algorithm, b"massage", &signature));
        signatures.push(sha256(&[&signature]));
    }
    assert_eq!(signatures.len(), 6);
    for spec in [KeySpec::EccNistP256, KeySpec::EccNistP384, KeySpec::EccNistP521, KeySpec::EccSecgP256k1] {
        let document = EcdsaKeyPair::generate(Curve::of(spec).unwrap().signing).unwrap().to_pkcs8v1().unwrap();
        let pair = Pair::read(spec, document.as_ref()).unwrap();
        let algorithm = *spec.signing().first().unwrap();
        let signature = pair.sign(algorithm, b"message").unwrap();
        assert!(pair.verify(algorithm, b"message", &signature));
        assert!(!pair.verify(algorithm, b"massage", &signature));
    }
}

#[test]
fn a_pair_is_of_its_own_spec_only() {
    for (spec, own) in [
        (KeySpec::Rsa2048, false),
        (KeySpec::Rsa3072, false),
        (KeySpec::Rsa4096, true),
        (KeySpec::EccNistP384, false),
        (KeySpec::SymmetricDefault, false),
    ] {
        assert_eq!(Pair::read(spec, RSA_4096).is_some(), own, "{spec:?}");
    }
    for (spec, own) in [
        (KeySpec::EccNistP256, false),
        (KeySpec::EccNistP384, true),
        (KeySpec::EccNistP521, false),
        (KeySpec::EccSecgP256k1, false),
        (KeySpec::Rsa2048, false),
    ] {
        assert_eq!(Pair::read(spec, COMPRESSED_POINT).is_some(), own, "{spec:?}");
    }
}

#[test]
fn what_aws_refuses_is_no_pair() {
    assert!(Pair::read(KeySpec::Rsa2048, THREE_PRIMES).is_none());
    assert!(Pair::read(KeySpec::EccNistP256, EXPLICIT_CURVE).is_none());
    assert!(Pair::read(KeySpec::Rsa2048, RSA_2048.get(..1_000).unwrap()).is_none());
    assert!(Pair::read(KeySpec::Rsa2048, &[]).is_none());
}

#[test]
fn the_public_key_does_not_depend_on_how_the_point_was_written() {
    let public = |pkcs8| Pair::read(KeySpec::EccNistP384, pkcs8).unwrap().public;
    let public_key = public(COMPRESSED_POINT);
    assert_eq!(public_key, public(WITHOUT_POINT));
    // Sequence, identifier, bit string, and an uncompressed point.
    assert_eq!((public_key.len(), public_key.get(23)), (120, Some(&0x04)));
}
