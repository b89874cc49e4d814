//! The yardstick: a plain consumer that makes the same four AWS calls for a job as Keyferry, and keeps nothing.
//!
//! `naive JOBS IN_FLIGHT` consumes `keyferry.jobs` of `KEYFERRY_RABBITMQ__URL`. It prints `ready` once it consumes and,
//! when so many jobs are acknowledged, one line of JSON: the mean latency of each AWS call in milliseconds.

use anyhow::Context as _;
use aws_config::BehaviorVersion;
use aws_sdk_kms::Client;
use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::{AlgorithmSpec, ExpirationModelType, KeyState, OriginType, WrappingKeySpec};
use futures_util::StreamExt as _;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties};
use rsa::PublicKey;
use rsa::pkcs8::DecodePublicKey as _;
use serde::Deserialize;
use sha2::Sha256;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// The same as Keyferry's default.
const PREFETCH: u16 = 400;
const CALLS: [&str; 4] = ["describe", "parameters", "import", "verify"];

#[derive(Deserialize)]
struct Request {
    key: String,
    wrapping_algorithm: String,
    wrapping_key_spec: String,
}

struct Shared {
    kms: Client,
    material: [u8; 32],
    /// Wraps under way are no more than cores: the strongest simple arrangement.
    wrapping: Arc<Semaphore>,
    /// Microseconds spent in each call.
    spent: [AtomicU64; CALLS.len()],
}

impl Shared {
    async fn timed<T>(&self, call: usize, answer: impl Future<Output = T>) -> T {
        let from = Instant::now();
        let answer = answer.await;
        self.spent[call].fetch_add(u64::try_from(from.elapsed().as_micros()).unwrap_or(0), Ordering::Relaxed);
        answer
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<usize>());
    let (Some(Ok(jobs)), Some(Ok(in_flight))) = (arguments.next(), arguments.next()) else {
        anyhow::bail!("naive JOBS IN_FLIGHT");
    };
    let mut material = [0; 32];
    getrandom::fill(&mut material)?;
    let shared = Arc::new(Shared {
        kms: Client::new(&aws_config::defaults(BehaviorVersion::v2026_01_12()).load().await),
        material,
        wrapping: Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from))),
        spent: Default::default(),
    });
    let url = std::env::var("KEYFERRY_RABBITMQ__URL").context("KEYFERRY_RABBITMQ__URL")?;
    let connection = Connection::connect(&url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let mut consumer =
        channel.basic_consume("keyferry.jobs".into(), "naive".into(), options, FieldTable::default()).await?;
    // From here on the end of the process is an orderly one, with every acknowledgement sent.
    let mut told = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    println!("ready");
    let permits = Arc::new(Semaphore::new(in_flight));
    let mut running = JoinSet::new();
    for _ in 0..jobs {
        let permit = Arc::clone(&permits).acquire_owned().await?;
        let delivery = consumer.next().await.context("the consumer was cancelled")??;
        let shared = Arc::clone(&shared);
        running.spawn(async move {
            let done = handle(&shared, delivery).await;
            drop(permit);
            done
        });
        while let Some(ended) = running.try_join_next() {
            ended??;
        }
    }
    while let Some(ended) = running.join_next().await {
        ended??;
    }
    let mean = |at: usize| {
        #[expect(clippy::cast_precision_loss, reason = "a mean for a table")]
        let ms = shared.spent[at].load(Ordering::Relaxed) as f64 / 1_000.0 / jobs.max(1) as f64;
        (CALLS[at].to_owned(), serde_json::json!(ms))
    };
    println!("{}", serde_json::Value::Object((0..CALLS.len()).map(mean).collect()));
    // Waits until it is told that it was measured.
    told.recv().await;
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn handle(shared: &Shared, delivery: Delivery) -> anyhow::Result<()> {
    let request: Request = serde_json::from_slice(&delivery.data)?;
    let kms = &shared.kms;
    let before = shared.timed(0, kms.describe_key().key_id(&request.key).send()).await?;
    let external = before.key_metadata.is_some_and(|key| key.origin == Some(OriginType::External));
    anyhow::ensure!(external, "{} takes no material", request.key);
    let parameters = kms
        .get_parameters_for_import()
        .key_id(&request.key)
        .wrapping_algorithm(AlgorithmSpec::from(request.wrapping_algorithm.as_str()))
        .wrapping_key_spec(WrappingKeySpec::from(request.wrapping_key_spec.as_str()));
    let parameters = shared.timed(1, parameters.send()).await?;
    let public_key = parameters.public_key.context("no public key")?;
    let material = shared.material;
    let permit = Arc::clone(&shared.wrapping).acquire_owned().await?;
    let wrapped = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        let key = PublicKey::from_public_key_der(public_key.as_ref())?;
        anyhow::Ok(key.oaep_encrypt::<Sha256>(&material)?)
    })
    .await??;
    let import = kms
        .import_key_material()
        .key_id(&request.key)
        .set_import_token(parameters.import_token)
        .encrypted_key_material(Blob::new(wrapped))
        .expiration_model(ExpirationModelType::KeyMaterialDoesNotExpire);
    shared.timed(2, import.send()).await?;
    let after = shared.timed(3, kms.describe_key().key_id(&request.key).send()).await?;
    let enabled = after.key_metadata.is_some_and(|key| key.key_state == Some(KeyState::Enabled));
    anyhow::ensure!(enabled, "{} is not enabled", request.key);
    delivery.ack(BasicAckOptions::default()).await?;
    Ok(())
}
