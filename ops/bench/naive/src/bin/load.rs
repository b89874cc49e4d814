//! The load generator, over `KEYFERRY_RABBITMQ__URL`.
//!
//! `load publish FILE`      each line to `keyferry.jobs`, confirmed in windows
//! `load paced FILE RATE`   the same, one by one at so many a second, and how long each took to its event, as JSON
//! `load drain QUEUE`       takes what is there and says, as JSON, how many messages and which CloudEvents these were

use anyhow::Context as _;
use futures_util::StreamExt as _;
use futures_util::future::try_join_all;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer};
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

const REQUESTS: &str = "keyferry.jobs";
const EVENTS: &str = "keyferry.events.all";
const WINDOW: usize = 500;
const PERSISTENT: u8 = 2;
const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["publish", file] => publish(&lines(file)?).await,
        ["paced", file, rate] => paced(&lines(file)?, rate.parse()?).await,
        ["drain", queue] => drain(queue).await,
        _ => anyhow::bail!("load publish FILE | load paced FILE RATE | load drain QUEUE"),
    }
}

fn lines(file: &str) -> anyhow::Result<Vec<String>> {
    Ok(std::fs::read_to_string(file).context(file.to_owned())?.lines().map(str::to_owned).collect())
}

async fn channel() -> anyhow::Result<(Connection, Channel)> {
    let url = std::env::var("KEYFERRY_RABBITMQ__URL").context("KEYFERRY_RABBITMQ__URL")?;
    let connection = Connection::connect(&url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok((connection, channel))
}

async fn send(
    channel: &Channel,
    body: &str,
) -> anyhow::Result<impl Future<Output = lapin::Result<Confirmation>> + use<>> {
    let properties =
        BasicProperties::default().with_delivery_mode(PERSISTENT).with_content_type("application/json".into());
    let options = BasicPublishOptions::default();
    Ok(channel.basic_publish("".into(), REQUESTS.into(), options, body.as_bytes(), properties).await?)
}

async fn publish(bodies: &[String]) -> anyhow::Result<()> {
    let (connection, channel) = channel().await?;
    for window in bodies.chunks(WINDOW) {
        let mut confirmations = Vec::with_capacity(window.len());
        for body in window {
            confirmations.push(send(&channel, body).await?);
        }
        let confirmed = try_join_all(confirmations).await?;
        anyhow::ensure!(confirmed.iter().all(|answer| matches!(answer, Confirmation::Ack(None))), "not confirmed");
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

/// Without acknowledgements: the broker's CPU is to be that of the worker's traffic.
async fn consume(channel: &Channel, queue: &str) -> anyhow::Result<Consumer> {
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    Ok(channel.basic_consume(queue.into(), "load".into(), options, FieldTable::default()).await?)
}

/// The events' queue is a quorum queue: what it delivers, it has also confirmed.
async fn paced(bodies: &[String], rate: f64) -> anyhow::Result<()> {
    let (connection, consuming) = channel().await?;
    let mut consumer = consume(&consuming, EVENTS).await?;
    let expected = bodies.len();
    let receiving = tokio::spawn(async move {
        let mut received = HashMap::with_capacity(expected);
        while received.len() < expected {
            let next = tokio::time::timeout(PATIENCE, consumer.next()).await.context("an event did not come")?;
            let at = Instant::now();
            let delivery = next.context("cancelled")??;
            let event: Value = serde_json::from_slice(&delivery.data)?;
            let id = event["data"]["job"]["request_id"].as_str().context("no request id")?.to_owned();
            received.entry(id).or_insert((at, event["type"] == "io.keyferry.job.succeeded"));
        }
        anyhow::Ok(received)
    });
    let (other, publishing) = channel().await?;
    let mut sent = Vec::with_capacity(expected);
    let start = Instant::now();
    for (number, body) in (0_u32..).zip(bodies) {
        let id = serde_json::from_str::<Value>(body)?["id"].as_str().context("no id")?.to_owned();
        tokio::time::sleep_until((start + Duration::from_secs_f64(f64::from(number) / rate)).into()).await;
        sent.push((id, Instant::now()));
        // The confirmation is not waited for, so that a slow broker does not slow the offer down.
        drop(send(&publishing, body).await?);
    }
    let received = receiving.await??;
    let mut took: Vec<f64> = sent
        .iter()
        .filter_map(|(id, at)| Some(received.get(id)?.0.saturating_duration_since(*at).as_secs_f64() * 1_000.0))
        .collect();
    took.sort_by(f64::total_cmp);
    anyhow::ensure!(took.len() == expected, "{} events for {expected} requests", took.len());
    // The smallest value that so many hundredths do not exceed.
    let percentile = |of: usize| took[(took.len() * of).div_ceil(100).saturating_sub(1)];
    println!(
        "{}",
        json!({
            "offered": expected,
            "rate": rate,
            "succeeded": received.values().filter(|(_, succeeded)| *succeeded).count(),
            "p50_ms": percentile(50),
            "p90_ms": percentile(90),
            "p99_ms": percentile(99),
            "max_ms": took.last(),
        })
    );
    connection.close(200, "done".into()).await?;
    other.close(200, "done".into()).await?;
    Ok(())
}

async fn drain(queue: &str) -> anyhow::Result<()> {
    let (connection, channel) = channel().await?;
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let count = channel.queue_declare(queue.into(), passive, FieldTable::default()).await?.message_count();
    let mut consumer = consume(&channel, queue).await?;
    let (mut ids, mut requests, mut types) = (HashSet::new(), HashSet::new(), HashMap::<String, usize>::new());
    for _ in 0..count {
        let next = tokio::time::timeout(PATIENCE, consumer.next()).await.context("the queue went silent")?;
        let event: Value = serde_json::from_slice(&next.context("cancelled")??.data).unwrap_or_default();
        if let Some(id) = event["id"].as_str() {
            ids.insert(id.to_owned());
        }
        if let Some(id) = event["data"]["job"]["request_id"].as_str() {
            requests.insert(id.to_owned());
        }
        *types.entry(event["type"].as_str().unwrap_or("none").to_owned()).or_default() += 1;
    }
    println!("{}", json!({"messages": count, "events": ids.len(), "requests": requests.len(), "types": types}));
    connection.close(200, "done".into()).await?;
    Ok(())
}
