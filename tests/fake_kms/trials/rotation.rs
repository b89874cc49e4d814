//! Symmetric keys have several materials, of which one is in force.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use super::{Trial, code, id_of};
use crate::crypto;
use crate::kinds::{Operation, WrappingAlgorithm};
use crate::world::Options;

const NEW: &str = "NEW_KEY_MATERIAL";
const EXISTING: &str = "EXISTING_KEY_MATERIAL";

#[tokio::test]
async fn a_rotated_key_encrypts_with_the_new_and_decrypts_with_the_old() {
    let trial = Trial::new(Options::default());
    let arn = trial.seed(&json!({}));
    let encrypt = async || {
        let answer = trial.call(Operation::Encrypt, json!({ "KeyId": arn, "Plaintext": "AAAA" })).await.unwrap();
        BASE64.decode(answer["CiphertextBlob"].as_str().unwrap()).unwrap()
    };
    let decrypt =
        async |blob: &[u8]| trial.call(Operation::Decrypt, json!({ "CiphertextBlob": BASE64.encode(blob) })).await;
    let first = id_of(&trial.import_as(&arn, &[1; 32], NEW).await.unwrap());
    let old = encrypt().await;
    let second = id_of(&trial.import_as(&arn, &[2; 32], NEW).await.unwrap());
    // Nothing changes before the rotation.
    assert!(crypto::decrypt(&[1; 32], &encrypt().await).is_ok());
    assert_eq!(trial.describe(&arn).await["CurrentKeyMaterialId"], *first);
    trial.ask(Operation::RotateKeyOnDemand, &arn).await.unwrap();
    assert!(crypto::decrypt(&[2; 32], &encrypt().await).is_ok());
    assert_eq!(trial.describe(&arn).await["CurrentKeyMaterialId"], *second);
    assert_eq!(decrypt(&old).await.unwrap()["KeyMaterialId"], *first);

    // A key is usable only while all materials that are tied to it are there.
    let by_id = |id: &str| json!({ "KeyId": arn, "KeyMaterialId": id });
    let deleted = trial.call(Operation::DeleteImportedKeyMaterial, by_id(&first)).await.unwrap();
    assert_eq!(deleted, by_id(&first));
    assert_eq!(trial.describe(&arn).await["KeyState"], "PendingImport");
    assert_eq!(code(decrypt(&old).await), "KMSInvalidStateException");
    assert_eq!(
        trial.materials(&arn).await,
        [
            (first.clone(), "NON_CURRENT".to_owned(), "PENDING_IMPORT".to_owned()),
            (second.clone(), "CURRENT".to_owned(), "IMPORTED".to_owned()),
        ]
    );
    assert_eq!(id_of(&trial.import_as(&arn, &[1; 32], EXISTING).await.unwrap()), first);
    assert_eq!(decrypt(&old).await.unwrap()["KeyMaterialId"], *first);
    // Whatever was tied to the key once is not new.
    for bytes in [[1; 32], [2; 32]] {
        assert_eq!(code(trial.import_as(&arn, &bytes, NEW).await), "IncorrectKeyMaterialException");
    }
}

#[tokio::test]
async fn the_list_says_which_materials_came_by_a_rotation() {
    let trial = Trial::new(Options::default());
    let arn = trial.seed(&json!({}));
    let list = async |more: Value| {
        let mut body = more;
        body["KeyId"] = json!(arn);
        trial.call(Operation::ListKeyRotations, body).await.unwrap()
    };
    let mut ids = vec![id_of(&trial.import_as(&arn, &[0; 32], NEW).await.unwrap())];
    for round in 1..=3 {
        ids.push(id_of(&trial.import_as(&arn, &[round; 32], NEW).await.unwrap()));
        if round < 3 {
            trial.0.advance(60_000);
            trial.ask(Operation::RotateKeyOnDemand, &arn).await.unwrap();
        }
    }
    let all = list(json!({ "IncludeKeyMaterial": "ALL_KEY_MATERIAL" })).await;
    let seen: Vec<_> = all["Rotations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| (id_of(entry), entry["KeyMaterialState"].as_str().unwrap(), entry["RotationType"].as_str()))
        .collect();
    let expected = [
        ("NON_CURRENT", None),
        ("NON_CURRENT", Some("ON_DEMAND")),
        ("CURRENT", Some("ON_DEMAND")),
        ("PENDING_ROTATION", None),
    ];
    for ((seen, id), (state, kind)) in seen.iter().zip(&ids).zip(expected) {
        assert_eq!(*seen, (id.clone(), state, kind));
    }
    assert_eq!((seen.len(), &all["Truncated"]), (4, &json!(false)));
    let dates: Vec<_> =
        all["Rotations"].as_array().unwrap().iter().filter_map(|it| it["RotationDate"].as_f64()).collect();
    assert!(dates.len() == 2 && dates[1] - dates[0] >= 60.0, "{dates:?}");

    // The default leaves out what no rotation brought; pages of one show the same.
    let mut marker = None;
    for id in &ids[1..3] {
        let page = match marker.take() {
            None => list(json!({ "Limit": 1 })).await,
            Some(marker) => list(json!({ "Limit": 1, "Marker": marker })).await,
        };
        assert_eq!(page["Rotations"].as_array().unwrap().len(), 1);
        assert_eq!(id_of(&page["Rotations"][0]), *id);
        marker = page.get("NextMarker").cloned();
        assert_eq!(page["Truncated"], marker.is_some());
    }
    assert_eq!(marker, None);
    let status = trial.ask(Operation::GetKeyRotationStatus, &arn).await.unwrap();
    assert_eq!(status["KeyRotationEnabled"], false);
}

#[tokio::test]
async fn each_material_has_its_own_expiry() {
    let trial = Trial::new(Options::default());
    let arn = trial.seed(&json!({}));
    let import = async |bytes: u8, import_type: &str, seconds: i64| {
        let valid_to = trial.0.now() / 1_000 + seconds;
        let more = json!({ "ValidTo": valid_to, "ImportType": import_type });
        trial.import_with(&arn, &[bytes; 32], WrappingAlgorithm::OaepSha1, more).await.unwrap();
        valid_to
    };
    let later = import(1, NEW, 2_000).await;
    let sooner = import(2, NEW, 1_000).await;
    // The pending material's expiry is not the key's, until it has become the current one.
    assert_eq!(trial.describe(&arn).await["ValidTo"], later);
    trial.ask(Operation::RotateKeyOnDemand, &arn).await.unwrap();
    assert_eq!(trial.describe(&arn).await["ValidTo"], sooner);
    trial.0.advance(1_001_000);
    assert_eq!(trial.describe(&arn).await["KeyState"], "PendingImport");
    let states: Vec<_> = trial.materials(&arn).await.into_iter().map(|(_, _, state)| state).collect();
    assert_eq!(states, ["IMPORTED", "PENDING_IMPORT"]);
    import(2, EXISTING, 1_000).await;
    assert_eq!(trial.describe(&arn).await["KeyState"], "Enabled");
    // Token and public key live for a day.
    let parameters = trial.parameters(&arn, WrappingAlgorithm::OaepSha256, "RSA_2048").await.unwrap();
    trial.0.advance(86_400_000);
    let body = json!({
        "KeyId": arn,
        "ImportToken": parameters["ImportToken"],
        "EncryptedKeyMaterial": BASE64.encode([0; 256]),
        "ExpirationModel": "KEY_MATERIAL_DOES_NOT_EXPIRE",
    });
    assert_eq!(code(trial.call(Operation::ImportKeyMaterial, body).await), "ExpiredImportTokenException");
}

#[tokio::test]
async fn a_rotation_that_takes_its_time_is_under_way_until_it_has_happened() {
    let trial = Trial::new(Options { rotation_ms: 60_000, ..Options::default() });
    let arn = trial.seed(&json!({}));
    let first = id_of(&trial.import_as(&arn, &[1; 32], NEW).await.unwrap());
    let second = id_of(&trial.import_as(&arn, &[2; 32], NEW).await.unwrap());
    let status = async || trial.ask(Operation::GetKeyRotationStatus, &arn).await.unwrap();
    assert!(status().await.get("OnDemandRotationStartDate").is_none());
    trial.ask(Operation::RotateKeyOnDemand, &arn).await.unwrap();
    assert!(status().await["OnDemandRotationStartDate"].is_number());
    assert_eq!(trial.describe(&arn).await["CurrentKeyMaterialId"], *first);
    assert_eq!(code(trial.ask(Operation::RotateKeyOnDemand, &arn).await), "ConflictException");
    trial.0.advance(60_000);
    assert_eq!(trial.describe(&arn).await["CurrentKeyMaterialId"], *second);
    assert!(status().await.get("OnDemandRotationStartDate").is_none());
    assert_eq!(code(trial.ask(Operation::RotateKeyOnDemand, &arn).await), "KMSInvalidStateException");

    // Material that is gone by then does not come into force.
    let third = id_of(&trial.import_as(&arn, &[3; 32], NEW).await.unwrap());
    trial.ask(Operation::RotateKeyOnDemand, &arn).await.unwrap();
    let by_id = json!({ "KeyId": arn, "KeyMaterialId": third });
    trial.call(Operation::DeleteImportedKeyMaterial, by_id).await.unwrap();
    trial.0.advance(60_000);
    assert_eq!(trial.describe(&arn).await["CurrentKeyMaterialId"], *second);
    let rotated = trial.0.state().journal.from(0).filter(|(_, entry)| entry.operation == "RotateKey").count();
    assert_eq!(rotated, 1);
}
