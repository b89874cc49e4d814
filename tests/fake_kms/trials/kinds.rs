//! Every kind of key takes its own material, and no other.

use aws_lc_rs::encoding::AsDer as _;
use aws_lc_rs::rsa;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256K1_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING,
    ECDSA_P521_SHA512_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _,
};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use super::{Trial, code};
use crate::crypto::sha256;
use crate::kinds::{KeySpec, Operation, WrappingAlgorithm};
use crate::world::Options;

const INCORRECT: &str = "IncorrectKeyMaterialException";
const UNSUPPORTED: &str = "UnsupportedOperationException";
const PAIRS: [&str; 7] =
    ["RSA_2048", "RSA_3072", "RSA_4096", "ECC_NIST_P256", "ECC_NIST_P384", "ECC_NIST_P521", "ECC_SECG_P256K1"];
/// Two-prime RSA and named curves are required; these are what is not.
const UNFIT: [(&str, &[u8]); 2] = [
    ("RSA_2048", include_bytes!("../fixtures/rsa_2048_three_primes.der")),
    ("ECC_NIST_P256", include_bytes!("../fixtures/ec_p256_explicit_curve.der")),
];

/// A public key and its private key in PKCS#8. Curves give a new pair every time.
pub fn some_pair(spec: &str) -> (Vec<u8>, Vec<u8>) {
    let rsa = |pkcs8: &[u8]| {
        let pair = rsa::KeyPair::from_pkcs8(pkcs8).unwrap();
        (pair.public_key().as_der().unwrap().as_ref().to_vec(), pkcs8.to_vec())
    };
    let algorithm = match spec {
        "RSA_2048" => return rsa(include_bytes!("../fixtures/wrapping_rsa_2048_a.der")),
        "RSA_3072" => return rsa(include_bytes!("../fixtures/wrapping_rsa_3072_a.der")),
        "RSA_4096" => return rsa(include_bytes!("../fixtures/wrapping_rsa_4096_a.der")),
        "ECC_NIST_P256" => &ECDSA_P256_SHA256_ASN1_SIGNING,
        "ECC_NIST_P384" => &ECDSA_P384_SHA384_ASN1_SIGNING,
        "ECC_NIST_P521" => &ECDSA_P521_SHA512_ASN1_SIGNING,
        "ECC_SECG_P256K1" => &ECDSA_P256K1_SHA256_ASN1_SIGNING,
        other => panic!("{other} is no pair"),
    };
    let pair = EcdsaKeyPair::generate(algorithm).unwrap();
    (pair.public_key().as_der().unwrap().as_ref().to_vec(), pair.to_pkcs8v1().unwrap().as_ref().to_vec())
}

#[tokio::test]
async fn every_pair_is_imported_and_signs() {
    let trial = Trial::new(Options::default());
    for name in PAIRS {
        let arn = trial.seed(&json!({ "spec": name }));
        let (public_key, private_key) = some_pair(name);
        let imported = trial.import(&arn, &private_key, WrappingAlgorithm::AesKeyWrapSha256).await.unwrap();
        assert_eq!(imported, json!({ "KeyId": arn }), "{name}");
        let spec = KeySpec::parse(name).unwrap();
        let algorithms: Vec<_> = spec.signing().iter().map(|algorithm| algorithm.name()).collect();
        let expected = json!({
            "KeyId": arn,
            "PublicKey": BASE64.encode(&public_key),
            "CustomerMasterKeySpec": name,
            "KeySpec": name,
            "KeyUsage": "SIGN_VERIFY",
            "SigningAlgorithms": algorithms,
        });
        assert_eq!(trial.ask(Operation::GetPublicKey, &arn).await.unwrap(), expected);
        let metadata = trial.describe(&arn).await;
        assert_eq!((&metadata["KeySpec"], &metadata["SigningAlgorithms"]), (&json!(name), &json!(algorithms)));
        assert_eq!(metadata.get("CurrentKeyMaterialId"), None);
        for algorithm in algorithms {
            let mut body = json!({ "KeyId": arn, "Message": "bWVzc2FnZQ==", "SigningAlgorithm": algorithm });
            let signed = trial.call(Operation::Sign, body.clone()).await.unwrap();
            assert_eq!(signed["SigningAlgorithm"], algorithm);
            body["Signature"] = signed["Signature"].clone();
            assert_eq!(trial.call(Operation::Verify, body.clone()).await.unwrap()["SignatureValid"], true);
            body["Message"] = json!("bWFzc2FnZQ==");
            assert_eq!(code(trial.call(Operation::Verify, body).await), "KMSInvalidSignatureException");
        }
        let wrong = json!({ "KeyId": arn, "Message": "AAAA", "SigningAlgorithm": "ECDSA_SHA_384" });
        let refused = code(trial.call(Operation::Sign, wrong).await);
        assert_eq!(refused, if name == "ECC_NIST_P384" { "ok" } else { "InvalidKeyUsageException" });
    }
}

#[tokio::test]
async fn the_material_of_a_pair_is_for_life_and_known_by_its_public_key() {
    let trial = Trial::new(Options::default());
    let arn = trial.seed(&json!({ "spec": "ECC_NIST_P384" }));
    // The same private key in other words.
    let private_key: &[u8] = include_bytes!("../fixtures/ec_p384_compressed_point.der");
    let same: &[u8] = include_bytes!("../fixtures/ec_p384_without_point.der");
    let wrapping = WrappingAlgorithm::OaepSha256;
    trial.import(&arn, private_key, wrapping).await.unwrap();
    let public_key = trial.ask(Operation::GetPublicKey, &arn).await.unwrap();
    let (_, other) = some_pair("ECC_NIST_P384");
    assert_eq!(code(trial.import(&arn, &other, wrapping).await), INCORRECT);
    trial.ask(Operation::DeleteImportedKeyMaterial, &arn).await.unwrap();
    assert_eq!(code(trial.import(&arn, &other, wrapping).await), INCORRECT);
    trial.import(&arn, same, wrapping).await.unwrap();
    assert_eq!(trial.ask(Operation::GetPublicKey, &arn).await.unwrap(), public_key);
    let new = trial.import_as(&arn, &other, "NEW_KEY_MATERIAL").await;
    assert_eq!(code(new), UNSUPPORTED);
    assert_eq!(code(trial.ask(Operation::RotateKeyOnDemand, &arn).await), UNSUPPORTED);
    assert_eq!(code(trial.ask(Operation::ListKeyRotations, &arn).await), UNSUPPORTED);

    // Both digests are on record, for every import.
    let effects: Vec<_> = trial
        .0
        .state()
        .journal
        .from(0)
        .map(|(number, entry)| entry.json(number)["effect"]["imported"].clone())
        .filter(Value::is_object)
        .collect();
    let public_key = BASE64.decode(public_key["PublicKey"].as_str().unwrap()).unwrap();
    for (effect, bytes, again) in [(&effects[0], private_key, false), (&effects[1], same, true)] {
        assert_eq!(effect["material_sha256"], hex::encode(sha256(&[bytes])));
        assert_eq!(effect["public_key_sha256"], hex::encode(sha256(&[&public_key])));
        assert_eq!(effect["again"], again);
    }
}

#[tokio::test]
async fn what_is_not_of_the_keys_own_kind_is_incorrect() {
    let trial = Trial::new(Options::default());
    let wrapping = WrappingAlgorithm::AesKeyWrapSha256;
    for name in PAIRS {
        let arn = trial.seed(&json!({ "spec": name }));
        for other in PAIRS.into_iter().filter(|other| *other != name) {
            assert_eq!(code(trial.import(&arn, &some_pair(other).1, wrapping).await), INCORRECT, "{other} for {name}");
        }
        assert_eq!(code(trial.import(&arn, &[1; 32], wrapping).await), INCORRECT);
        assert_eq!(trial.describe(&arn).await["KeyState"], "PendingImport");
    }
    for (name, private_key) in UNFIT {
        let arn = trial.seed(&json!({ "spec": name }));
        assert_eq!(code(trial.import(&arn, private_key, wrapping).await), INCORRECT, "{name}");
    }
    for spec in ["SYMMETRIC_DEFAULT", "HMAC_256"] {
        let arn = trial.seed(&json!({ "spec": spec }));
        assert_eq!(code(trial.import(&arn, &[1; 16], WrappingAlgorithm::OaepSha256).await), INCORRECT, "{spec}");
        assert_eq!(code(trial.ask(Operation::GetPublicKey, &arn).await), UNSUPPORTED, "{spec}");
    }
}

#[tokio::test]
async fn parameters_are_given_for_what_the_kind_may_be_wrapped_with() {
    let trial = Trial::new(Options::default());
    let (oaep, hybrid) = (WrappingAlgorithm::OaepSha256, WrappingAlgorithm::AesKeyWrapSha1);
    for (name, algorithm, spec, expected) in [
        ("SYMMETRIC_DEFAULT", hybrid, "RSA_4096", UNSUPPORTED),
        ("HMAC_512", hybrid, "RSA_4096", UNSUPPORTED),
        ("RSA_2048", oaep, "RSA_4096", UNSUPPORTED),
        ("RSA_4096", hybrid, "RSA_2048", "ok"),
        ("ECC_NIST_P521", oaep, "RSA_2048", UNSUPPORTED),
        ("ECC_NIST_P521", oaep, "RSA_3072", "ok"),
        ("ECC_NIST_P521", hybrid, "RSA_2048", "ok"),
        ("ECC_SECG_P256K1", oaep, "RSA_2048", "ok"),
    ] {
        let arn = trial.seed(&json!({ "spec": name }));
        assert_eq!(code(trial.parameters(&arn, algorithm, spec).await), expected, "{name} {algorithm:?} {spec}");
    }
    trial.0.state().options.hybrid_wrap_for_symmetric = true;
    for (name, expected) in [("SYMMETRIC_DEFAULT", "ok"), ("HMAC_224", "ok")] {
        let arn = trial.seed(&json!({ "spec": name }));
        assert_eq!(code(trial.parameters(&arn, hybrid, "RSA_2048").await), expected, "{name}");
    }
    let arn = trial.seed(&json!({ "spec": "RSA_2048" }));
    assert_eq!(code(trial.parameters(&arn, oaep, "RSA_2048").await), UNSUPPORTED);
}

#[tokio::test]
async fn every_kind_is_created_for_the_uses_it_has() {
    let trial = Trial::new(Options::default());
    let create = async |spec: &str, usage: Option<&str>| {
        let mut body = json!({ "KeySpec": spec, "Origin": "EXTERNAL" });
        if let Some(usage) = usage {
            body["KeyUsage"] = json!(usage);
        }
        trial.call(Operation::CreateKey, body).await.map(|mut answer| answer["KeyMetadata"].take())
    };
    let ecdh = json!(["ECDH"]);
    for (spec, usage, member, expected) in [
        ("SYMMETRIC_DEFAULT", None, "EncryptionAlgorithms", json!(["SYMMETRIC_DEFAULT"])),
        ("HMAC_384", Some("GENERATE_VERIFY_MAC"), "MacAlgorithms", json!(["HMAC_SHA_384"])),
        (
            "RSA_3072",
            Some("ENCRYPT_DECRYPT"),
            "EncryptionAlgorithms",
            json!(["RSAES_OAEP_SHA_1", "RSAES_OAEP_SHA_256"]),
        ),
        ("ECC_NIST_P256", Some("KEY_AGREEMENT"), "KeyAgreementAlgorithms", ecdh.clone()),
        ("ECC_NIST_P521", Some("KEY_AGREEMENT"), "KeyAgreementAlgorithms", ecdh),
        ("ECC_SECG_P256K1", Some("SIGN_VERIFY"), "SigningAlgorithms", json!(["ECDSA_SHA_256"])),
    ] {
        let metadata = create(spec, usage).await.unwrap();
        assert_eq!(metadata[member], expected, "{spec}");
        assert_eq!(metadata["KeyState"], "PendingImport");
    }
    for (spec, usage) in [
        ("RSA_2048", None),
        ("HMAC_256", None),
        ("ECC_SECG_P256K1", Some("KEY_AGREEMENT")),
        ("ECC_NIST_P256", Some("ENCRYPT_DECRYPT")),
        ("RSA_2048", Some("KEY_AGREEMENT")),
        ("ML_DSA_65", Some("SIGN_VERIFY")),
    ] {
        assert_eq!(code(create(spec, usage).await), "ValidationException", "{spec} {usage:?}");
    }
}
