//! Tests of the double as a whole: calls as a client makes them, without the wire and the signature.

mod answers;
mod control;
mod kinds;
mod lags;
mod regions;
mod rotation;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrapPadded as _};
use aws_lc_rs::rsa::{OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepPublicEncryptingKey, PublicEncryptingKey};
use axum::body::Bytes;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::control_keys::seed;
use crate::crypto::random;
use crate::engine::{Answer, answer};
use crate::kinds::{Operation, WrappingAlgorithm};
use crate::world::{Call, Options, Principal, World};

const REGION: &str = "eu-central-1";

/// A double to make calls to.
struct Trial(Arc<World>);

/// An exception: its code and its text.
type Refused = (String, String);

impl Trial {
    fn new(options: Options) -> Self {
        Self::that_is(false, options)
    }

    /// With `--unwrap lazy`.
    fn lazy() -> Self {
        Self::that_is(true, Options::default())
    }

    fn that_is(lazy: bool, options: Options) -> Self {
        let world = World::new(HashMap::new(), lazy, time::Duration::ZERO, 0, false, 1_000);
        world.state().options = options;
        Self(Arc::new(world))
    }

    /// A key as the control interface makes them.
    fn seed(&self, wanted: &Value) -> String {
        let answer = seed(&self.0, wanted.to_string().as_bytes()).unwrap_or_else(|bad| panic!("{}", bad.1));
        answer["arns"][0].as_str().unwrap().to_owned()
    }

    /// A call in the Region of the key that it names.
    async fn call(&self, operation: Operation, body: Value) -> Result<Value, Refused> {
        let region = body["KeyId"].as_str().and_then(|arn| arn.split(':').nth(3)).unwrap_or(REGION).to_owned();
        self.call_in(&region, operation, body).await
    }

    async fn call_in(&self, region: &str, operation: Operation, body: Value) -> Result<Value, Refused> {
        let call = Call {
            operation,
            body: Bytes::from(body.to_string()),
            principal: Principal { access_key: "AKIA".into(), account: "111122223333".into(), session: None },
            region: region.into(),
            key_arn: body["KeyId"].as_str().map(Into::into),
            fault: None,
            late: false,
            gone: Arc::new(AtomicBool::new(false)),
        };
        match answer(Arc::clone(&self.0), call).await {
            Answer::Reply(reply) => reply.map_err(|refusal| (refusal.code.into_owned(), refusal.message)),
            Answer::Cut(_) => panic!("there are no faults here"),
        }
    }

    /// Imports for ever, by the whole procedure.
    async fn import(&self, arn: &str, bytes: &[u8], algorithm: WrappingAlgorithm) -> Result<Value, Refused> {
        self.import_with(arn, bytes, algorithm, json!({ "ExpirationModel": "KEY_MATERIAL_DOES_NOT_EXPIRE" })).await
    }

    /// Imports symmetric material for ever, as new or as existing.
    async fn import_as(&self, arn: &str, bytes: &[u8], import_type: &str) -> Result<Value, Refused> {
        let more = json!({ "ExpirationModel": "KEY_MATERIAL_DOES_NOT_EXPIRE", "ImportType": import_type });
        self.import_with(arn, bytes, WrappingAlgorithm::OaepSha256, more).await
    }

    async fn import_with(
        &self,
        arn: &str,
        bytes: &[u8],
        algorithm: WrappingAlgorithm,
        more: Value,
    ) -> Result<Value, Refused> {
        let parameters = self.parameters(arn, algorithm, "RSA_3072").await?;
        let public_key = BASE64.decode(parameters["PublicKey"].as_str().unwrap()).unwrap();
        let mut body = more;
        body["KeyId"] = json!(arn);
        body["ImportToken"] = parameters["ImportToken"].clone();
        body["EncryptedKeyMaterial"] = json!(BASE64.encode(wrap(&public_key, algorithm, bytes)));
        self.call(Operation::ImportKeyMaterial, body).await
    }

    async fn parameters(&self, arn: &str, algorithm: WrappingAlgorithm, spec: &str) -> Result<Value, Refused> {
        let body = json!({ "KeyId": arn, "WrappingAlgorithm": algorithm.name(), "WrappingKeySpec": spec });
        self.call(Operation::GetParametersForImport, body).await
    }

    /// A call that names nothing but the key.
    async fn ask(&self, operation: Operation, arn: &str) -> Result<Value, Refused> {
        self.call(operation, json!({ "KeyId": arn })).await
    }

    /// `DescribeKey`'s metadata.
    async fn describe(&self, arn: &str) -> Value {
        self.ask(Operation::DescribeKey, arn).await.unwrap()["KeyMetadata"].take()
    }

    /// Id, state and import state of every material.
    async fn materials(&self, arn: &str) -> Vec<(String, String, String)> {
        let body = json!({ "KeyId": arn, "IncludeKeyMaterial": "ALL_KEY_MATERIAL" });
        let listed = self.call(Operation::ListKeyRotations, body).await.unwrap();
        let text = |entry: &Value, name: &str| entry[name].as_str().unwrap().to_owned();
        listed["Rotations"]
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| (text(entry, "KeyMaterialId"), text(entry, "KeyMaterialState"), text(entry, "ImportState")))
            .collect()
    }
}

/// The id of the material that an answer names.
fn id_of(answer: &Value) -> String {
    answer["KeyMaterialId"].as_str().unwrap().to_owned()
}

/// The code of a refusal.
fn code<T>(result: Result<T, Refused>) -> String {
    result.map_or_else(|(code, _)| code, |_| "ok".to_owned())
}

/// Wraps as a client does.
pub fn wrap(public_key: &[u8], algorithm: WrappingAlgorithm, plaintext: &[u8]) -> Vec<u8> {
    let key = OaepPublicEncryptingKey::new(PublicEncryptingKey::from_der(public_key).unwrap()).unwrap();
    let oaep = match algorithm {
        WrappingAlgorithm::OaepSha256 | WrappingAlgorithm::AesKeyWrapSha256 => &OAEP_SHA256_MGF1SHA256,
        WrappingAlgorithm::OaepSha1 | WrappingAlgorithm::AesKeyWrapSha1 => &OAEP_SHA1_MGF1SHA1,
    };
    let mut blob = vec![0; key.ciphertext_size()];
    if algorithm.is_hybrid() {
        let kek: [u8; 32] = random().unwrap();
        key.encrypt(oaep, &kek, &mut blob, None).unwrap();
        let mut wrapped = vec![0; plaintext.len() + 16];
        let kek = AesKek::new(&AES_256, &kek).unwrap();
        blob.extend_from_slice(kek.wrap_with_padding(plaintext, &mut wrapped).unwrap());
    } else {
        key.encrypt(oaep, plaintext, &mut blob, None).unwrap();
    }
    blob
}
