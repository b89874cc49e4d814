//! The double of AWS KMS, a process of its own, and what tests ask of it.

use super::process::Process;
use super::{eventually, fake_kms, http};
use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrapPadded as _};
use aws_lc_rs::rsa::{OAEP_SHA256_MGF1SHA256, OaepPublicEncryptingKey, PublicEncryptingKey};
use aws_sdk_kms::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_kms::primitives::{Blob, DateTime};
use aws_sdk_kms::types::{AlgorithmSpec, ExpirationModelType, ImportType, WrappingKeySpec};
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

    /// A replica of a multi-Region key, without material of its own.
    pub async fn replica(&self, primary_arn: &str, region: &str) -> String {
        self.seed(json!({"replica_of": primary_arn, "region": region})).await.remove(0)
    }

    /// The time by the double's own clock, in seconds since 1970.
    pub async fn now(&self) -> i64 {
        let now = self.get("clock").await["now"].as_str().unwrap().to_owned();
        time::OffsetDateTime::parse(&now, &time::format_description::well_known::Rfc3339).unwrap().unix_timestamp()
    }

    /// Moves that clock, by which quotas, tokens, expiries and lags run, but not the age of signatures.
    pub async fn advance(&self, seconds: i64) {
        self.post("clock", json!({"advance_seconds": seconds})).await;
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

    /// Orders a fault in the control interface's own words.
    pub async fn order(&self, order: Value) {
        self.post("faults", order).await;
    }

    /// Takes all orders back.
    pub async fn clear_faults(&self) {
        Self::read(self.client.delete(format!("{}/_fake/faults", self.url))).await;
    }

    /// Adds a role that the worker's account may assume, or changes it: with `external_id`, `trusts`,
    /// `max_session_seconds`.
    pub async fn role(&self, arn: &str, more: Value) {
        let mut role = json!({"arn": arn, "trusts": ACCOUNT});
        role.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.post("roles", role).await;
    }

    /// Secrets and tokens of all sessions that were given out.
    pub async fn session_secrets(&self) -> Vec<String> {
        let answer = self.get("roles").await;
        let texts = |session: &Value| ["secret", "token"].map(|name| session[name].as_str().unwrap().to_owned());
        answer["sessions"].as_array().unwrap().iter().flat_map(texts).collect()
    }

    /// Says whether calls are counted, and at which rates.
    pub async fn quotas(&self, quotas: Value) {
        self.post("quota", quotas).await;
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
        self.stranger_imports_as(arn, bytes, None, None).await;
    }

    /// Imports material, for a pair its private key in PKCS#8, and says its id if AWS does: that of symmetric keys.
    /// `valid_to` is in seconds since 1970.
    pub async fn stranger_imports_as(
        &self,
        arn: &str,
        bytes: &[u8],
        import_type: Option<ImportType>,
        valid_to: Option<i64>,
    ) -> Option<String> {
        let client = self.stranger(region_of(arn));
        let spec = self.show(arn).await["spec"].as_str().unwrap().to_owned();
        let is_pair = spec.starts_with("RSA_") || spec.starts_with("ECC_");
        let algorithm = if is_pair { AlgorithmSpec::RsaAesKeyWrapSha256 } else { AlgorithmSpec::RsaesOaepSha256 };
        let parameters = client
            .get_parameters_for_import()
            .key_id(arn)
            .wrapping_algorithm(algorithm)
            .wrapping_key_spec(WrappingKeySpec::Rsa2048)
            .send()
            .await
            .unwrap();
        let public_key = parameters.public_key().unwrap().as_ref();
        let wrapped = if is_pair { wrap_by_way_of_aes(public_key, bytes) } else { wrap(public_key, bytes) };
        let model = match valid_to {
            Some(_) => ExpirationModelType::KeyMaterialExpires,
            None => ExpirationModelType::KeyMaterialDoesNotExpire,
        };
        let imported = client
            .import_key_material()
            .key_id(arn)
            .set_import_token(parameters.import_token.clone())
            .encrypted_key_material(Blob::new(wrapped))
            .expiration_model(model)
            .set_valid_to(valid_to.map(DateTime::from_secs))
            .set_import_type(import_type)
            .send()
            .await
            .unwrap();
        imported.key_material_id
    }

    /// Makes the material that waits for its rotation the current one.
    pub async fn stranger_rotates(&self, arn: &str) {
        self.stranger(region_of(arn)).rotate_key_on_demand().key_id(arn).send().await.unwrap();
    }

    /// Deletes the material with this id, or the current one.
    pub async fn stranger_deletes(&self, arn: &str, material_id: Option<&str>) {
        self.stranger(region_of(arn))
            .delete_imported_key_material()
            .key_id(arn)
            .set_key_material_id(material_id.map(ToOwned::to_owned))
            .send()
            .await
            .unwrap();
    }
}

/// The Region that an ARN names.
pub fn region_of(arn: &str) -> &str {
    arn.split(':').nth(3).unwrap()
}

/// `RSAES_OAEP_SHA_256`.
fn wrap(public_key: &[u8], bytes: &[u8]) -> Vec<u8> {
    let key = OaepPublicEncryptingKey::new(PublicEncryptingKey::from_der(public_key).unwrap()).unwrap();
    let mut wrapped = vec![0; key.ciphertext_size()];
    key.encrypt(&OAEP_SHA256_MGF1SHA256, bytes, &mut wrapped, None).unwrap();
    wrapped
}

/// `RSA_AES_KEY_WRAP_SHA_256`: a fresh AES key under the public key, then the material under the AES key.
fn wrap_by_way_of_aes(public_key: &[u8], bytes: &[u8]) -> Vec<u8> {
    let mut aes_key = [0; 32];
    aws_lc_rs::rand::fill(&mut aes_key).unwrap();
    let mut buffer = vec![0; bytes.len() + 16];
    let wrapped = AesKek::new(&AES_256, &aes_key).unwrap().wrap_with_padding(bytes, &mut buffer).unwrap();
    [wrap(public_key, &aes_key).as_slice(), wrapped].concat()
}
