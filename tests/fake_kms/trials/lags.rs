//! What has happened is seen late, if so ordered.

use serde_json::json;

use super::kinds::some_pair;
use super::{Trial, code, id_of};
use crate::kinds::{Operation, WrappingAlgorithm};
use crate::world::Options;

#[tokio::test]
async fn a_new_key_is_not_known_at_once() {
    let trial = Trial::new(Options { creation_lag_ms: 5_000, ..Options::default() });
    let created = trial.call(Operation::CreateKey, json!({ "Origin": "EXTERNAL" })).await.unwrap();
    let arn = created["KeyMetadata"]["Arn"].as_str().unwrap().to_owned();
    for operation in [Operation::DescribeKey, Operation::ListKeyRotations, Operation::DeleteImportedKeyMaterial] {
        let refused = ("NotFoundException".to_owned(), format!("Key '{arn}' does not exist"));
        assert_eq!(trial.ask(operation, &arn).await, Err(refused), "{operation:?}");
    }
    let oaep = WrappingAlgorithm::OaepSha256;
    assert_eq!(code(trial.parameters(&arn, oaep, "RSA_2048").await), "NotFoundException");
    let listed = async || trial.call(Operation::ListKeys, json!({})).await.unwrap()["Keys"].as_array().unwrap().len();
    assert_eq!(listed().await, 0);
    trial.0.advance(5_000);
    assert_eq!(listed().await, 1);
    trial.import(&arn, &[1; 32], oaep).await.unwrap();
}

#[tokio::test]
async fn a_change_is_seen_late_but_holds_at_once() {
    let trial = Trial::new(Options { change_lag_ms: 60_000, ..Options::default() });
    let arn = trial.seed(&json!({}));
    let state = async || trial.describe(&arn).await["KeyState"].as_str().unwrap().to_owned();
    let first = id_of(&trial.import_as(&arn, &[1; 32], "NEW_KEY_MATERIAL").await.unwrap());
    assert_eq!((state().await.as_str(), trial.materials(&arn).await.len()), ("PendingImport", 0));
    assert_eq!(code(trial.call(Operation::Encrypt, json!({ "KeyId": arn, "Plaintext": "AAAA" })).await), "ok");
    trial.0.advance(60_000);
    assert_eq!((state().await.as_str(), trial.materials(&arn).await.len()), ("Enabled", 1));

    let second = id_of(&trial.import_as(&arn, &[2; 32], "NEW_KEY_MATERIAL").await.unwrap());
    trial.0.advance(60_000);
    trial.ask(Operation::RotateKeyOnDemand, &arn).await.unwrap();
    let seen = async || {
        let current = trial.describe(&arn).await["CurrentKeyMaterialId"].as_str().unwrap().to_owned();
        (current, trial.materials(&arn).await.pop().unwrap().1)
    };
    assert_eq!(seen().await, (first, "PENDING_ROTATION".to_owned()));
    trial.0.advance(60_000);
    assert_eq!(seen().await, (second, "CURRENT".to_owned()));
}

#[tokio::test]
async fn a_public_key_comes_and_goes_late() {
    let trial = Trial::new(Options { change_lag_ms: 60_000, ..Options::default() });
    let arn = trial.seed(&json!({ "spec": "ECC_NIST_P256" }));
    let told = async || code(trial.ask(Operation::GetPublicKey, &arn).await);
    trial.import(&arn, &some_pair("ECC_NIST_P256").1, WrappingAlgorithm::OaepSha256).await.unwrap();
    assert_eq!(told().await, "KMSInvalidStateException");
    trial.0.advance(60_000);
    assert_eq!(told().await, "ok");
    trial.ask(Operation::DeleteImportedKeyMaterial, &arn).await.unwrap();
    assert_eq!(told().await, "ok");
    trial.0.advance(60_000);
    assert_eq!(told().await, "KMSInvalidStateException");
}
