//! The yardstick over SQS: what receives and deletes, and does nothing with what it receives. And what fills a queue.
//!
//! `sqs fill FILE URL`                each line as a message, in batches
//! `sqs drain URL COUNT POLLERS`      prints `ready`, then, once so many are deleted, a line

use anyhow::Context as _;
use aws_config::BehaviorVersion;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::{DeleteMessageBatchRequestEntry, MessageSystemAttributeName, SendMessageBatchRequestEntry};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::task::JoinSet;

const BATCH: usize = 10;
const SENDERS: usize = 4;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let client = Client::new(&aws_config::defaults(BehaviorVersion::v2026_01_12()).load().await);
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["fill", file, url] => fill(&client, file, url).await,
        ["drain", url, count, pollers] => drain(&client, url, count.parse()?, pollers.parse()?).await,
        _ => anyhow::bail!("sqs fill FILE URL | sqs drain URL COUNT POLLERS"),
    }
}

async fn fill(client: &Client, file: &str, url: &str) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(file).context(file.to_owned())?;
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let mut running = JoinSet::new();
    for batch in lines.chunks(BATCH) {
        if running.len() >= SENDERS {
            running.join_next().await.context("nothing runs")???;
        }
        let entry = |(at, body): (usize, &String)| {
            SendMessageBatchRequestEntry::builder().id(at.to_string()).message_body(body).build()
        };
        let entries: Vec<_> = batch.iter().enumerate().map(entry).collect::<Result<_, _>>()?;
        let sending = client.send_message_batch().queue_url(url).set_entries(Some(entries)).send();
        running.spawn(async move {
            let answer = sending.await?;
            anyhow::ensure!(answer.failed.is_empty(), "{:?}", answer.failed);
            anyhow::Ok(())
        });
    }
    while let Some(ended) = running.join_next().await {
        ended??;
    }
    Ok(())
}

async fn drain(client: &Client, url: &str, count: usize, pollers: usize) -> anyhow::Result<()> {
    let deleted = Arc::new(AtomicUsize::new(0));
    println!("ready");
    let mut running = JoinSet::new();
    for _ in 0..pollers {
        let (client, url, deleted) = (client.clone(), url.to_owned(), Arc::clone(&deleted));
        running.spawn(async move {
            while deleted.load(Ordering::Relaxed) < count {
                // The same is asked for as Keyferry asks for.
                let received = client
                    .receive_message()
                    .queue_url(&url)
                    .max_number_of_messages(10)
                    .wait_time_seconds(1)
                    .visibility_timeout(60)
                    .message_system_attribute_names(MessageSystemAttributeName::All)
                    .message_attribute_names("All")
                    .send()
                    .await?;
                let messages = received.messages.unwrap_or_default();
                if messages.is_empty() {
                    continue;
                }
                let entries = messages.into_iter().enumerate().map(|(at, message)| {
                    DeleteMessageBatchRequestEntry::builder()
                        .id(at.to_string())
                        .set_receipt_handle(message.receipt_handle)
                        .build()
                });
                let entries: Vec<_> = entries.collect::<Result<_, _>>()?;
                let done = client.delete_message_batch().queue_url(&url).set_entries(Some(entries)).send().await?;
                anyhow::ensure!(done.failed.is_empty(), "{:?}", done.failed);
                if deleted.fetch_add(done.successful.len(), Ordering::Relaxed) + done.successful.len() >= count {
                    println!("done");
                }
            }
            anyhow::Ok(())
        });
    }
    while let Some(ended) = running.join_next().await {
        ended??;
    }
    Ok(())
}
