//! How AWS describes a key.

use serde_json::{Value, json};

use crate::keys::{Family, Key, View};
use crate::kinds::{KeySpec, KeyState, KeyUsage, SigningAlgorithm, epoch_seconds};

/// AWS's `KeyMetadata`, but for what lies in other Regions.
pub fn metadata(key: &Key, view: &View) -> Value {
    let mut body = json!({
        "AWSAccountId": &*key.account,
        "KeyId": key.id(),
        "Arn": &*key.arn,
        "CreationDate": epoch_seconds(key.created_at),
        "Enabled": view.state == KeyState::Enabled,
        "Description": key.description,
        "KeyUsage": key.usage.name(),
        "KeyState": view.state.name(),
        "Origin": key.origin.name(),
        "KeyManager": "CUSTOMER",
        "CustomerMasterKeySpec": key.spec.name(),
        "KeySpec": key.spec.name(),
        "MultiRegion": key.family != Family::Single,
    });
    let mut put = |name: &str, value: Value| body[name] = value;
    let (name, algorithms) = algorithms(key.spec, key.usage);
    put(name, algorithms);
    if let Some(id) = view.current {
        put("CurrentKeyMaterialId", json!(hex::encode(id)));
    }
    if let Some(model) = view.model {
        put("ExpirationModel", json!(model.name()));
    }
    if let Some(at) = view.valid_to {
        put("ValidTo", epoch_seconds(at));
    }
    if let Some(at) = view.deletion_at {
        put("DeletionDate", epoch_seconds(at));
    }
    body
}

/// The member that lists what a key can do, and the list.
pub fn algorithms(spec: KeySpec, usage: KeyUsage) -> (&'static str, Value) {
    match usage {
        KeyUsage::GenerateVerifyMac => {
            ("MacAlgorithms", spec.mac().into_iter().map(|mac| json!(mac.name())).collect::<Value>())
        }
        KeyUsage::EncryptDecrypt if spec == KeySpec::SymmetricDefault => {
            ("EncryptionAlgorithms", json!(["SYMMETRIC_DEFAULT"]))
        }
        KeyUsage::EncryptDecrypt => ("EncryptionAlgorithms", json!(["RSAES_OAEP_SHA_1", "RSAES_OAEP_SHA_256"])),
        KeyUsage::SignVerify => {
            ("SigningAlgorithms", spec.signing().iter().copied().map(SigningAlgorithm::name).collect::<Value>())
        }
        KeyUsage::KeyAgreement => ("KeyAgreementAlgorithms", json!(["ECDH"])),
    }
}
