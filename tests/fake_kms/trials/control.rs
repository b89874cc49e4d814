//! What the control interface makes and shows.

use serde_json::{Value, json};

use super::kinds::some_pair;
use super::{Trial, code};
use crate::control_keys::{seed, show};
use crate::crypto::sha256;
use crate::kinds::WrappingAlgorithm;
use crate::world::Options;

async fn shown(trial: &Trial, arn: &str) -> Value {
    show(&trial.0, |key| &*key.arn == arn).await.remove(0)
}

#[tokio::test]
async fn materials_are_shown_with_their_digests() {
    let trial = Trial::new(Options::default());
    let (public_key, private_key) = some_pair("RSA_2048");
    let pair = trial.seed(&json!({ "spec": "RSA_2048", "usage": "ENCRYPT_DECRYPT" }));
    trial.import(&pair, &private_key, WrappingAlgorithm::AesKeyWrapSha1).await.unwrap();
    let symmetric = trial.seed(&json!({}));
    trial.import(&symmetric, &[1; 32], WrappingAlgorithm::OaepSha1).await.unwrap();

    let key = shown(&trial, &pair).await;
    assert_eq!((&key["usage"], &key["multi_region"]), (&json!("ENCRYPT_DECRYPT"), &Value::Null));
    assert_eq!(key["materials"][0]["material_sha256"], hex::encode(sha256(&[&private_key])));
    assert_eq!(key["materials"][0]["public_key_sha256"], hex::encode(sha256(&[&public_key])));
    let key = shown(&trial, &symmetric).await;
    assert_eq!(key["materials"][0]["material_sha256"], hex::encode(sha256(&[&[1; 32]])));
    assert_eq!(key["materials"][0].get("public_key_sha256"), None);
}

#[tokio::test]
async fn only_what_nobody_else_must_know_stays_wrapped() {
    let trial = Trial::lazy();
    let oaep = WrappingAlgorithm::OaepSha256;
    let sealed = |arn: &str| {
        trial.0.state().keys.list(0, |key| &*key.arn == arn).first().is_some_and(|key| key.sealed().count() == 1)
    };
    for (spec, length) in [("SYMMETRIC_DEFAULT", 32), ("HMAC_384", 48)] {
        let (good, bad) = (trial.seed(&json!({ "spec": spec })), trial.seed(&json!({ "spec": spec })));
        trial.import(&good, &vec![1; length], oaep).await.unwrap();
        trial.import(&bad, &[1; 5], oaep).await.unwrap();
        assert!(sealed(&good) && sealed(&bad), "{spec}");
        let material = shown(&trial, &good).await["materials"][0].take();
        assert_eq!(material["material_sha256"], hex::encode(sha256(&[&vec![1; length]])));
        assert_eq!(shown(&trial, &bad).await["materials"][0]["error"], "The key material has an invalid length.");
        assert!(!sealed(&good) && !sealed(&bad), "{spec}");
        trial.import(&good, &vec![1; length], oaep).await.unwrap();
    }
    let pair = trial.seed(&json!({ "spec": "ECC_NIST_P256" }));
    assert_eq!(code(trial.import(&pair, &[1; 32], oaep).await), "IncorrectKeyMaterialException");
    let primary = trial.seed(&json!({ "multi_region": true }));
    assert_eq!(code(trial.import(&primary, &[1; 5], oaep).await), "IncorrectKeyMaterialException");
}

#[tokio::test]
async fn a_key_that_cannot_be_is_not_made() {
    let trial = Trial::new(Options::default());
    let single = trial.seed(&json!({}));
    let primary = trial.seed(&json!({ "multi_region": true }));
    let replica = trial.seed(&json!({ "replica_of": primary, "region": "us-east-1" }));
    for wanted in [
        json!({ "spec": "ML_DSA_44" }),
        json!({ "spec": "ECC_SECG_P256K1", "usage": "KEY_AGREEMENT" }),
        json!({ "replica_of": single, "region": "us-east-1" }),
        json!({ "replica_of": replica, "region": "us-west-2" }),
        json!({ "replica_of": primary, "region": "us-east-1" }),
        json!({ "replica_of": primary, "region": "eu-central-1" }),
        json!({ "replica_of": "arn:aws:kms:eu-central-1:111122223333:key/mrk-0", "region": "us-east-1" }),
    ] {
        assert!(seed(&trial.0, wanted.to_string().as_bytes()).is_err(), "{wanted}");
    }
}
