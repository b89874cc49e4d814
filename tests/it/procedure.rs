//! AWS's own client and OpenSSL, by AWS's published procedure, against the double: what it is like from outside.

use crate::support::fake::Fake;
use crate::support::proof::{decrypts, signs};
use crate::support::variable;
use aws_lc_rs::encoding::{AsDer as _, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256K1_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING,
    ECDSA_P521_SHA512_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _,
};
use aws_sdk_kms::types::ImportType;
use serde_json::json;
use std::process::Command;

/// Runs a part of the procedure. The parts are tests of their own because the client takes a second for every call.
async fn procedure(part: &'static str) {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::start(directory.path()).await;
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_kms/procedure.sh");
    let mut command = Command::new("bash");
    command
        .arg(script)
        .arg(part)
        .env("AWS_CLI", variable("KEYFERRY_TEST_AWS_CLI"))
        .env("PYTHON", variable("KEYFERRY_TEST_PYTHON"))
        .env("FAKE_KMS_URL", fake.url())
        .env("NO_PROXY", "127.0.0.1");
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.trim_end().ends_with("procedure ok"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test]
async fn awss_own_client_imports_symmetric_material_by_awss_own_procedure() {
    procedure("symmetric").await;
}

#[tokio::test]
async fn awss_own_client_imports_hmac_keys_by_awss_own_procedure() {
    procedure("hmac").await;
}

#[tokio::test]
async fn awss_own_client_imports_pairs_by_awss_own_procedure() {
    procedure("pairs").await;
}

#[tokio::test]
async fn awss_own_client_assumes_a_role() {
    procedure("roles").await;
}

/// A pair of this kind: its private key in PKCS#8, and its public key.
fn pair(kind: &str) -> (Vec<u8>, Vec<u8>) {
    let algorithm = match kind {
        "ECC_NIST_P256" => &ECDSA_P256_SHA256_ASN1_SIGNING,
        "ECC_NIST_P384" => &ECDSA_P384_SHA384_ASN1_SIGNING,
        "ECC_NIST_P521" => &ECDSA_P521_SHA512_ASN1_SIGNING,
        "ECC_SECG_P256K1" => &ECDSA_P256K1_SHA256_ASN1_SIGNING,
        _ => {
            let pair = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
            let private_key: Pkcs8V1Der<'_> = pair.as_der().unwrap();
            return (private_key.as_ref().to_vec(), pair.public_key().as_der().unwrap().as_ref().to_vec());
        }
    };
    let pair = EcdsaKeyPair::generate(algorithm).unwrap();
    let public_key: PublicKeyX509Der<'_> = pair.public_key().as_der().unwrap();
    (pair.to_pkcs8v1().unwrap().as_ref().to_vec(), public_key.as_ref().to_vec())
}

#[tokio::test]
async fn pairs_are_imported_and_proven_by_their_signatures() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::start(directory.path()).await;
    for kind in ["RSA_2048", "ECC_NIST_P256", "ECC_NIST_P384", "ECC_NIST_P521", "ECC_SECG_P256K1"] {
        let arn = fake.seed(json!({"spec": kind, "region": "us-east-1"})).await.remove(0);
        let (private_key, public_key) = pair(kind);
        assert_eq!(fake.stranger_imports_as(&arn, &private_key, None, None).await, None);
        let told = fake.stranger("us-east-1").get_public_key().key_id(&arn).send().await.unwrap();
        assert_eq!(told.public_key.unwrap().into_inner(), public_key, "{kind}");
        assert!(signs(&fake, &arn, kind, &public_key).await, "{kind}");
        assert!(!signs(&fake, &arn, kind, &pair(kind).1).await, "{kind}");
        fake.stranger_deletes(&arn, None).await;
        fake.stranger_imports(&arn, &private_key).await;
    }
}

#[tokio::test]
async fn a_stranger_can_do_all_that_a_worker_may_meet() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::start(directory.path()).await;

    let primary = fake.seed(json!({"multi_region": true})).await.remove(0);
    let first = fake.stranger_imports_as(&primary, &[1; 32], None, None).await.unwrap();
    let replica = fake.replica(&primary, "us-east-1").await;
    let existing = Some(ImportType::ExistingKeyMaterial);
    let again = fake.stranger_imports_as(&replica, &[1; 32], existing.clone(), None).await;
    assert_eq!(again.as_ref(), Some(&first));
    let second = fake.stranger_imports_as(&primary, &[2; 32], Some(ImportType::NewKeyMaterial), None).await.unwrap();
    let role = async || fake.show(&primary).await["materials"][1]["role"].as_str().unwrap().to_owned();
    assert_eq!(role().await, "PENDING_MULTI_REGION_IMPORT_AND_ROTATION");
    fake.stranger_imports_as(&replica, &[2; 32], existing, None).await;
    assert_eq!(role().await, "PENDING_ROTATION");
    fake.stranger_rotates(&primary).await;
    for arn in [&primary, &replica] {
        assert!(decrypts(&fake, arn, &[2; 32]).await);
        assert_eq!(fake.show(arn).await["current_key_material_id"], *second);
    }
    fake.stranger_deletes(&primary, Some(&first)).await;
    assert_eq!(fake.show(&primary).await["state"], "PendingImport");
    assert_eq!(fake.show(&replica).await["state"], "Enabled");

    let arn = fake.key().await;
    fake.stranger_imports_as(&arn, &[3; 32], None, Some(fake.now().await + 3_600)).await;
    assert_eq!(fake.show(&arn).await["state"], "Enabled");
    fake.advance(3_601).await;
    assert_eq!(fake.show(&arn).await["state"], "PendingImport");
}
