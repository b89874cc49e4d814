//! What the reference quotes from AWS is what the double answers, code and text.

use serde_json::json;

use super::kinds::some_pair;
use super::{Trial, code, id_of};
use crate::kinds::{Operation, WrappingAlgorithm};
use crate::world::Options;

const STATE: &str = "KMSInvalidStateException";

#[tokio::test]
async fn a_key_of_another_origin_is_refused() {
    let trial = Trial::new(Options::default());
    let arn = trial.seed(&json!({ "origin": "AWS_KMS" }));
    let expected = (
        "UnsupportedOperationException".to_owned(),
        format!("{arn} origin is AWS_KMS which is not valid for this operation."),
    );
    let parameters = trial.parameters(&arn, WrappingAlgorithm::OaepSha256, "RSA_2048").await;
    assert_eq!(parameters.unwrap_err(), expected);
    assert_eq!(trial.ask(Operation::DeleteImportedKeyMaterial, &arn).await.unwrap_err(), expected);
}

#[tokio::test]
async fn without_material_a_key_is_pending_import() {
    let trial = Trial::new(Options::default());
    let symmetric = trial.seed(&json!({}));
    let pair = trial.seed(&json!({ "spec": "ECC_NIST_P256" }));
    let (_, private_key) = some_pair("ECC_NIST_P256");
    let encrypt = json!({ "KeyId": symmetric, "Plaintext": "AAAA" });
    let sign = json!({ "KeyId": pair, "Message": "AAAA", "SigningAlgorithm": "ECDSA_SHA_256" });
    for model in [None, Some(())] {
        let refused = |arn: &str| Err((STATE.to_owned(), format!("{arn} is pending import.")));
        assert_eq!(trial.call(Operation::Encrypt, encrypt.clone()).await, refused(&symmetric));
        assert_eq!(trial.ask(Operation::RotateKeyOnDemand, &symmetric).await, refused(&symmetric));
        assert_eq!(trial.ask(Operation::GetPublicKey, &pair).await, refused(&pair));
        assert_eq!(trial.call(Operation::Sign, sign.clone()).await, refused(&pair));
        let metadata = trial.describe(&symmetric).await;
        assert_eq!((&metadata["KeyState"], &metadata["Enabled"]), (&json!("PendingImport"), &json!(false)));
        assert_eq!(metadata.get("ExpirationModel"), None);
        // The first time round there never was any.
        assert_eq!(metadata.get("CurrentKeyMaterialId").is_some(), model.is_some());
        for (arn, bytes) in [(&symmetric, &[1; 32][..]), (&pair, &private_key)] {
            trial.import(arn, bytes, WrappingAlgorithm::OaepSha256).await.unwrap();
            let metadata = trial.describe(arn).await;
            assert_eq!((&metadata["KeyState"], &metadata["Enabled"]), (&json!("Enabled"), &json!(true)));
            assert_eq!(metadata["ExpirationModel"], "KEY_MATERIAL_DOES_NOT_EXPIRE");
            trial.ask(Operation::DeleteImportedKeyMaterial, arn).await.unwrap();
        }
    }
}

#[tokio::test]
async fn what_expires_needs_a_date() {
    let trial = Trial::new(Options::default());
    let arn = trial.seed(&json!({}));
    for more in [json!({}), json!({ "ExpirationModel": "KEY_MATERIAL_EXPIRES" })] {
        assert_eq!(
            trial.import_with(&arn, &[1; 32], WrappingAlgorithm::OaepSha256, more).await.unwrap_err(),
            (
                "ValidationException".to_owned(),
                "A validTo date must be set if the ExpirationModel is KEY_MATERIAL_EXPIRES".to_owned()
            )
        );
    }
}

#[tokio::test]
async fn a_second_new_material_and_a_rotation_to_nothing_are_refused() {
    let trial = Trial::new(Options::default());
    let arn = trial.seed(&json!({}));
    let key_id = arn.rsplit('/').next().unwrap();
    trial.import_as(&arn, &[1; 32], "NEW_KEY_MATERIAL").await.unwrap();
    assert_eq!(
        trial.ask(Operation::RotateKeyOnDemand, &arn).await.unwrap_err(),
        (STATE.to_owned(), format!("No available key material pending rotation for the key: {arn}."))
    );
    let pending = id_of(&trial.import_as(&arn, &[2; 32], "NEW_KEY_MATERIAL").await.unwrap());
    let (code, text) = trial.import_as(&arn, &[3; 32], "NEW_KEY_MATERIAL").await.unwrap_err();
    let refused = text.strip_prefix("New key material (id: ").and_then(|rest| rest.split_once(") ")).unwrap();
    assert_eq!((code.as_str(), refused.0.len()), (STATE, 64));
    assert_eq!(
        refused.1,
        format!(
            "cannot be imported into KMS key {key_id}, because another key material (id: {pending}) is pending rotation."
        )
    );
    // The id is the one that the material gets once there is room.
    trial.ask(Operation::RotateKeyOnDemand, &arn).await.unwrap();
    let third = id_of(&trial.import_as(&arn, &[3; 32], "NEW_KEY_MATERIAL").await.unwrap());
    assert_eq!(third, refused.0);
}

#[tokio::test]
async fn the_twenty_sixth_rotation_is_refused() {
    let trial = Trial::new(Options::default());
    let arn = trial.seed(&json!({}));
    trial.import_as(&arn, &[0; 32], "NEW_KEY_MATERIAL").await.unwrap();
    for round in 1..=25 {
        trial.import_as(&arn, &[round; 32], "NEW_KEY_MATERIAL").await.unwrap();
        trial.ask(Operation::RotateKeyOnDemand, &arn).await.unwrap();
    }
    trial.import_as(&arn, &[26; 32], "NEW_KEY_MATERIAL").await.unwrap();
    let (code, text) = trial.ask(Operation::RotateKeyOnDemand, &arn).await.unwrap_err();
    assert_eq!(code, "LimitExceededException");
    assert!(text.starts_with("The on-demand rotations limit has been reached for the given keyId. "), "{text}");
}

#[tokio::test]
async fn an_unknown_key_does_not_exist() {
    let trial = Trial::new(Options::default());
    let arn = trial.seed(&json!({}));
    let key_id = arn.rsplit('/').next().unwrap();
    let elsewhere = format!("arn:aws:kms:us-east-1:111122223333:key/{key_id}");
    let unknown = arn.replace(key_id, "b0bb1e5c-0000-4000-8000-000000000000");
    let refused = |arn: &str| Err(("NotFoundException".to_owned(), format!("Key '{arn}' does not exist")));
    let by_id = json!({ "KeyId": key_id });
    assert_eq!(trial.call_in("us-east-1", Operation::DescribeKey, by_id).await, refused(&elsewhere));
    let by_arn = json!({ "KeyId": arn });
    assert_eq!(trial.call_in("us-east-1", Operation::DescribeKey, by_arn).await, refused(&arn));
    for operation in [
        Operation::DescribeKey,
        Operation::ListKeyRotations,
        Operation::GetPublicKey,
        Operation::RotateKeyOnDemand,
        Operation::DeleteImportedKeyMaterial,
    ] {
        assert_eq!(trial.ask(operation, &unknown).await, refused(&unknown), "{operation:?}");
    }
}

#[tokio::test]
async fn a_call_over_the_quota_is_throttled() {
    let trial = Trial::new(Options::default());
    let arn = trial.seed(&json!({}));
    trial.0.state().quotas.rates.insert(Operation::GetParametersForImport, 0.001);
    trial.0.state().quotas.enabled = true;
    trial.parameters(&arn, WrappingAlgorithm::OaepSha256, "RSA_2048").await.unwrap();
    assert_eq!(
        trial.parameters(&arn, WrappingAlgorithm::OaepSha256, "RSA_2048").await.unwrap_err(),
        (
            "ThrottlingException".to_owned(),
            "You have exceeded the rate at which you may call KMS. Reduce the frequency of your calls.".to_owned()
        )
    );
}

/// The reference's table of section 4, by calls.
#[tokio::test]
async fn states_admit_what_the_table_says() {
    let trial = Trial::new(Options::default());
    let arn = trial.seed(&json!({}));
    let encrypt = json!({ "KeyId": arn, "Plaintext": "AAAA" });
    let answers = async || {
        [
            code(trial.import(&arn, &[1; 32], WrappingAlgorithm::OaepSha256).await),
            code(trial.call(Operation::Encrypt, encrypt.clone()).await),
        ]
    };
    assert_eq!(answers().await, ["ok", "ok"]);
    trial.ask(Operation::DisableKey, &arn).await.unwrap();
    assert_eq!(answers().await, ["ok", "DisabledException"]);
    assert_eq!(code(trial.ask(Operation::RotateKeyOnDemand, &arn).await), "DisabledException");
    trial.ask(Operation::ScheduleKeyDeletion, &arn).await.unwrap();
    assert_eq!(answers().await, [STATE, STATE]);
    assert_eq!(code(trial.ask(Operation::RotateKeyOnDemand, &arn).await), STATE);
    assert_eq!(code(trial.ask(Operation::DeleteImportedKeyMaterial, &arn).await), "ok");
    assert_eq!(trial.describe(&arn).await["KeyState"], "PendingDeletion");
}
