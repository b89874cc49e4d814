//! The double of AWS KMS, a process of its own, and what tests ask of it.

use super::process::Process;
use super::{eventually, fake_kms, http};
use aws_sdk_kms::config::{BehaviorVersion, Credentials, Region};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

/// The account that all keys are in.
pub const ACCOUNT: &str = "111122223333";
/// The Region that keys are in unless a test says otherwise.
pub const REGION: &str = "eu-central-1";
/// The worker's access key. The journal tells by it who called.
pub const WORKER: &str = "AKIAFAKEKEYFERRY0001";
/// Somebody else with rights to the same keys.
pub const STRANGER: &str = "AKIAFAKESTRANGER0001";
/// The secret of both.
pub const SECRET: &str = "fake-secret";

/// A running double.
pub struct Fake {
    process: Process,
    client: reqwest::Client,
    url: String,
}

impl Fake {
    /// Starts one.
    pub async fn start(directory: &Path) -> Self {
        let port_file = directory.join("fake-kms.port");
        let mut command = Command::new(fake_kms());
        command.env_clear().arg("--port-file").arg(&port_file);
        for access_key in [WORKER, STRANGER] {
            command.arg("--credential").arg(format!("{access_key}:{SECRET}:{ACCOUNT}"));
        }
        let process = Process::start(&mut command, directory.join("fake-kms.log"));
        let port = eventually("the double's port", || async { std::fs::read_to_string(&port_file).ok() }).await;
        Self { process, client: http(), url: format!("http://127.0.0.1:{port}") }
    }

    /// Where it answers.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What it has written.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// A symmetric key without material.
    pub async fn key(&self) -> String {
        self.seed(json!({})).await.remove(0)
    }

    /// Keys as asked for: `count`, `spec`, `region`, `origin`, ...
    pub async fn seed(&self, wanted: Value) -> Vec<String> {
        let answer = self.post("keys", wanted).await;
        answer["arns"].as_array().unwrap().iter().map(|arn| arn.as_str().unwrap().to_owned()).collect()
    }

    /// State and materials of a key.
    pub async fn show(&self, arn: &str) -> Value {
        self.get(&format!("keys/{arn}")).await
    }

    /// All keys.
    pub async fn keys(&self) -> Vec<Value> {
        self.get("keys").await["keys"].as_array().unwrap().clone()
    }

    /// The journal, whole or filtered by a query such as `operation=DescribeKey&key=...`.
    pub async fn journal(&self, query: &str) -> Vec<Value> {
        self.get(&format!("journal?{query}")).await["entries"].as_array().unwrap().clone()
    }

    /// Waits until the journal holds `count` entries that fit the query.
    pub async fn wait(&self, count: usize, query: &str) {
        let answer = self.get(&format!("wait?count={count}&timeout_ms=40000&{query}")).await;
        assert_eq!(answer["reached"], true, "{count} times {query}: {answer}; journal: {:#?}", self.journal("").await);
    }

    /// Orders a fault for the next call of an operation on a key.
    pub async fn fault(&self, operation: &str, key: &str, times: Option<u64>, fault: Value) {
        let order = json!({"operation": operation, "key": key, "times": times, "fault": fault});
        self.post("faults", order).await;
    }

    /// The same for one call, after so many that pass.
    pub async fn fault_after(&self, operation: &str, key: &str, skip: u64, fault: Value) {
        let order = json!({"operation": operation, "key": key, "times": 1, "skip": skip, "fault": fault});
        self.post("faults", order).await;
    }

    /// Takes all orders back.
    pub async fn clear_faults(&self) {
        Self::read(self.client.delete(format!("{}/_fake/faults", self.url))).await;
    }

    /// Chooses between behaviours that nobody knows of AWS.
    pub async fn options(&self, changes: Value) {
        self.post("options", changes).await;
    }

    /// Waits until so many calls of the operation on the key are held.
    pub async fn held(&self, count: usize, operation: &str, key: &str) {
        let query = format!("waiting?operation={operation}&key={key}&at_least={count}&timeout_ms=40000");
        let answer = self.get(&query).await;
        assert_eq!(answer["reached"], true, "{query}: {answer}");
    }

    /// Lets held calls go on.
    pub async fn release(&self, key: &str) {
        self.post("release", json!({"key": key})).await;
    }

    /// Lets late effects happen; says how many.
    pub async fn release_late(&self) -> u64 {
        self.post("release_late", json!({})).await["released"].as_u64().unwrap()
    }

    /// Waits until so many effects are pending.
    pub async fn pending_late(&self, count: usize, key: &str) {
        let answer = self.get(&format!("pending_late?key={key}&at_least={count}&timeout_ms=40000")).await;
        assert_eq!(answer["reached"], true, "{answer}");
    }

    /// AWS's own client, as the stranger.
    pub fn stranger(&self, region: &str) -> aws_sdk_kms::Client {
        let config = aws_sdk_kms::Config::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .region(Region::new(region.to_owned()))
            .endpoint_url(&self.url)
            .credentials_provider(Credentials::new(STRANGER, SECRET, None, None, "tests"))
            .build();
        aws_sdk_kms::Client::from_conf(config)
    }

    async fn get(&self, path: &str) -> Value {
        Self::read(self.client.get(format!("{}/_fake/{path}", self.url))).await
    }

    async fn post(&self, path: &str, body: Value) -> Value {
        Self::read(self.client.post(format!("{}/_fake/{path}", self.url)).json(&body)).await
    }

    async fn read(request: reqwest::RequestBuilder) -> Value {
        let answer = request.send().await.unwrap();
        let status = answer.status();
        let body: Value = answer.json().await.unwrap();
        assert!(status.is_success(), "the double refuses: {body}");
        body
    }
}

/// What a stranger does, by AWS's published procedure and with another library than the worker's.
impl Fake {
    /// Imports material that never expires.
    pub async fn stranger_imports(&self, arn: &str, bytes: &[u8]) {
        use aws_lc_rs::rsa::{OAEP_SHA256_MGF1SHA256, OaepPublicEncryptingKey, PublicEncryptingKey};
        use aws_sdk_kms::primitives::Blob;
        use aws_sdk_kms::types::{AlgorithmSpec, ExpirationModelType, WrappingKeySpec};

        let client = self.stranger(REGION);
        let parameters = client
            .get_parameters_for_import()
            .key_id(arn)
            .wrapping_algorithm(AlgorithmSpec::RsaesOaepSha256)
            .wrapping_key_spec(WrappingKeySpec::Rsa2048)
            .send()
            .await
            .unwrap();
        let key = PublicEncryptingKey::from_der(parameters.public_key().unwrap().as_ref()).unwrap();
        let key = OaepPublicEncryptingKey::new(key).unwrap();
        let mut wrapped = vec![0; key.ciphertext_size()];
        let wrapped = key.encrypt(&OAEP_SHA256_MGF1SHA256, bytes, &mut wrapped, None).unwrap();
        client
            .import_key_material()
            .key_id(arn)
            .set_import_token(parameters.import_token.clone())
            .encrypted_key_material(Blob::new(&*wrapped))
            .expiration_model(ExpirationModelType::KeyMaterialDoesNotExpire)
            .send()
            .await
            .unwrap();
    }
}
