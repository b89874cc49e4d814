//! Multi-Region keys, and Regions that are not like the others.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::json;

use super::kinds::some_pair;
use super::{REGION, Trial, code, id_of};
use crate::crypto;
use crate::kinds::{Operation, WrappingAlgorithm};
use crate::world::Options;

const NEW: &str = "NEW_KEY_MATERIAL";
const EXISTING: &str = "EXISTING_KEY_MATERIAL";
const INCORRECT: &str = "IncorrectKeyMaterialException";
const UNSUPPORTED: &str = "UnsupportedOperationException";

fn family(trial: &Trial, spec: &str) -> (String, String) {
    let primary = trial.seed(&json!({ "spec": spec, "multi_region": true }));
    let replica = trial.seed(&json!({ "replica_of": primary, "region": "us-east-1" }));
    assert_eq!(replica, primary.replace(REGION, "us-east-1"));
    (primary, replica)
}

#[tokio::test]
async fn both_sides_know_each_other() {
    let trial = Trial::new(Options::default());
    let (primary, replica) = family(&trial, "SYMMETRIC_DEFAULT");
    for (arn, kind) in [(&primary, "PRIMARY"), (&replica, "REPLICA")] {
        let metadata = trial.describe(arn).await;
        let expected = json!({
            "MultiRegionKeyType": kind,
            "PrimaryKey": { "Arn": primary, "Region": REGION },
            "ReplicaKeys": [{ "Arn": replica, "Region": "us-east-1" }],
        });
        assert_eq!((&metadata["MultiRegionConfiguration"], &metadata["MultiRegion"]), (&expected, &json!(true)));
        assert_eq!(metadata["KeyState"], "PendingImport");
    }
    let single = trial.describe(&trial.seed(&json!({}))).await;
    assert_eq!((single.get("MultiRegionConfiguration"), &single["MultiRegion"]), (None, &json!(false)));
}

#[tokio::test]
async fn a_replica_takes_what_its_primary_was_given() {
    let trial = Trial::new(Options::default());
    let (primary, replica) = family(&trial, "SYMMETRIC_DEFAULT");
    assert_eq!(code(trial.import_as(&replica, &[1; 32], EXISTING).await), INCORRECT);
    let id = id_of(&trial.import_as(&primary, &[1; 32], NEW).await.unwrap());
    let metadata = trial.describe(&replica).await;
    assert_eq!((&metadata["KeyState"], &metadata["CurrentKeyMaterialId"]), (&json!("PendingImport"), &json!(id)));
    assert_eq!(trial.materials(&replica).await, [(id.clone(), "CURRENT".to_owned(), "PENDING_IMPORT".to_owned())]);
    assert_eq!(code(trial.import_as(&replica, &[1; 32], NEW).await), UNSUPPORTED);
    assert_eq!(code(trial.import(&replica, &[1; 32], WrappingAlgorithm::OaepSha256).await), UNSUPPORTED);
    assert_eq!(code(trial.import_as(&replica, &[2; 32], EXISTING).await), INCORRECT);
    assert_eq!(id_of(&trial.import_as(&replica, &[1; 32], EXISTING).await.unwrap()), id);
    assert_eq!(trial.describe(&replica).await["KeyState"], "Enabled");
    // Later imports need not say it.
    trial.import(&replica, &[1; 32], WrappingAlgorithm::OaepSha256).await.unwrap();
    // A deletion in one Region is not seen in another.
    trial.ask(Operation::DeleteImportedKeyMaterial, &replica).await.unwrap();
    assert_eq!(trial.describe(&replica).await["KeyState"], "PendingImport");
    assert_eq!(trial.describe(&primary).await["KeyState"], "Enabled");

    trial.0.state().options.replica_needs_existing = false;
    let other = trial.seed(&json!({ "replica_of": primary, "region": "us-west-2" }));
    trial.import(&other, &[1; 32], WrappingAlgorithm::OaepSha256).await.unwrap();
}

#[tokio::test]
async fn new_material_waits_for_every_region() {
    let trial = Trial::new(Options::default());
    let (primary, replica) = family(&trial, "SYMMETRIC_DEFAULT");
    trial.import_as(&primary, &[1; 32], NEW).await.unwrap();
    trial.import_as(&replica, &[1; 32], EXISTING).await.unwrap();
    let second = id_of(&trial.import_as(&primary, &[2; 32], NEW).await.unwrap());
    let pending = |role: &str, state: &str| Some((second.clone(), role.to_owned(), state.to_owned()));
    let everywhere = "PENDING_MULTI_REGION_IMPORT_AND_ROTATION";
    assert_eq!(trial.materials(&primary).await.pop(), pending(everywhere, "IMPORTED"));
    assert_eq!(trial.materials(&replica).await.pop(), pending(everywhere, "PENDING_IMPORT"));
    assert_eq!(code(trial.ask(Operation::RotateKeyOnDemand, &primary).await), "KMSInvalidStateException");
    // What is not yet tied to the key does not make it unusable.
    assert_eq!(trial.describe(&replica).await["KeyState"], "Enabled");
    trial.import_as(&replica, &[2; 32], EXISTING).await.unwrap();
    for arn in [&primary, &replica] {
        assert_eq!(trial.materials(arn).await.pop(), pending("PENDING_ROTATION", "IMPORTED"));
    }
    assert_eq!(code(trial.ask(Operation::RotateKeyOnDemand, &replica).await), UNSUPPORTED);
    trial.ask(Operation::RotateKeyOnDemand, &primary).await.unwrap();
    for arn in [&primary, &replica] {
        assert_eq!(trial.materials(arn).await.pop(), pending("CURRENT", "IMPORTED"));
        let answer = trial.call(Operation::Encrypt, json!({ "KeyId": arn, "Plaintext": "AAAA" })).await.unwrap();
        let blob = BASE64.decode(answer["CiphertextBlob"].as_str().unwrap()).unwrap();
        assert!(crypto::decrypt(&[2; 32], &blob).is_ok());
    }
}

#[tokio::test]
async fn pending_material_goes_everywhere_when_the_primary_gives_it_up() {
    let trial = Trial::new(Options::default());
    let (primary, replica) = family(&trial, "SYMMETRIC_DEFAULT");
    trial.import_as(&primary, &[1; 32], NEW).await.unwrap();
    for give_up_on in [&primary, &replica] {
        let second = id_of(&trial.import_as(&primary, &[2; 32], NEW).await.unwrap());
        trial.import_as(&replica, &[2; 32], EXISTING).await.unwrap();
        let body = json!({ "KeyId": give_up_on, "KeyMaterialId": second });
        trial.call(Operation::DeleteImportedKeyMaterial, body).await.unwrap();
        let left = [trial.materials(&primary).await.len(), trial.materials(&replica).await.len()];
        assert_eq!(left, if give_up_on == &primary { [1, 1] } else { [2, 2] });
    }
    let (_, role, state) = trial.materials(&replica).await.pop().unwrap();
    assert_eq!((role.as_str(), state.as_str()), ("PENDING_MULTI_REGION_IMPORT_AND_ROTATION", "PENDING_IMPORT"));
}

#[tokio::test]
async fn pairs_have_replicas_too() {
    let trial = Trial::new(Options::default());
    let (primary, replica) = family(&trial, "ECC_NIST_P256");
    let (_, private_key) = some_pair("ECC_NIST_P256");
    let wrapping = WrappingAlgorithm::AesKeyWrapSha256;
    assert_eq!(code(trial.import(&replica, &private_key, wrapping).await), INCORRECT);
    trial.import(&primary, &private_key, wrapping).await.unwrap();
    assert_eq!(code(trial.ask(Operation::GetPublicKey, &replica).await), "KMSInvalidStateException");
    assert_eq!(code(trial.import(&replica, &some_pair("ECC_NIST_P256").1, wrapping).await), INCORRECT);
    trial.import(&replica, &private_key, wrapping).await.unwrap();
    let public_key = async |arn: &str| trial.ask(Operation::GetPublicKey, arn).await.unwrap()["PublicKey"].take();
    assert_eq!(public_key(&primary).await, public_key(&replica).await);
}

#[tokio::test]
async fn china_has_keys_of_its_own() {
    let trial = Trial::new(Options::default());
    let arn = trial.seed(&json!({ "region": "cn-north-1" }));
    assert!(arn.starts_with("arn:aws-cn:kms:cn-north-1:"));
    let oaep = WrappingAlgorithm::OaepSha256;
    assert_eq!(code(trial.import(&arn, &[1; 32], oaep).await), INCORRECT);
    trial.import(&arn, &[1; 16], oaep).await.unwrap();
    let answer = trial.call(Operation::Encrypt, json!({ "KeyId": arn, "Plaintext": "AAAA" })).await.unwrap();
    let blob = BASE64.decode(answer["CiphertextBlob"].as_str().unwrap()).unwrap();
    assert!(crypto::decrypt(&[1; 16], &blob).is_ok());
    for (spec, algorithm, expected) in [
        ("RSA_2048", WrappingAlgorithm::AesKeyWrapSha256, UNSUPPORTED),
        ("RSA_2048", oaep, UNSUPPORTED),
        ("ECC_NIST_P256", WrappingAlgorithm::AesKeyWrapSha1, UNSUPPORTED),
        ("ECC_NIST_P256", oaep, "ok"),
    ] {
        let arn = trial.seed(&json!({ "region": "cn-northwest-1", "spec": spec }));
        assert_eq!(code(trial.parameters(&arn, algorithm, "RSA_4096").await), expected, "{spec} {algorithm:?}");
    }
    assert!(trial.seed(&json!({ "region": "us-gov-west-1" })).starts_with("arn:aws-us-gov:kms:us-gov-west-1:"));
}
