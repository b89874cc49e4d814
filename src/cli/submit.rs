//! `keyferry submit`: publishes requests, and follows them.

use super::Failed;
use super::jobs::{finish, follow, progress_bar};
use super::output::{Output, duration};
use super::publish::Link;
use super::sender::SignArgs;
use crate::app::open_store;
use crate::config::{Loaded, Transport};
use crate::job::{MAX_BODY_BYTES, RequestId};
use anyhow::{Context as _, anyhow, bail};
use clap::{ArgGroup, Args};
use serde_json::{Map, Value, json};
use std::io::BufRead as _;
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::mpsc;
use uuid::Uuid;

/// Requests published before their confirmations are awaited.
const WINDOW: usize = 200;

/// Publish one request from flags, or many from JSON Lines. A request without an id is given one; the same id
/// with the same content is carried out once, so sending a file again is harmless if its lines have ids.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("what").required(true).args(["key", "file"]))]
#[command(after_help = "Examples:\n  \
    keyferry submit --key arn:aws:kms:eu-central-1:111122223333:key/... --source-key payroll --wait\n  \
    keyferry submit --key ... --source-key payroll --valid-to 2027-01-31T12:00:00Z\n  \
    keyferry submit --key ... --source-key payroll --dry-run --wait\n  \
    keyferry submit --key ... --operation rotate --wait\n  \
    keyferry submit --key ... --operation delete --urgent --wait\n  \
    keyferry submit --key ... --source-key payroll --sign-key-file payroll.pem --sign-key-id payroll-2026\n  \
    keyferry submit --file requests.jsonl --wait --timeout 10m\n  \
    generate-requests | keyferry submit --file -")]
pub(super) struct Submit {
    /// The KMS key: its ARN, or the id that Keyferry gave it.
    #[arg(long)]
    key: Option<String>,
    /// Idempotency key; a random one if absent.
    #[arg(long, requires = "key", value_parser = request_id)]
    id: Option<String>,
    /// What is to be done: import, rotate (new material comes into force) or delete.
    #[arg(long, value_name = "NAME", requires = "key")]
    operation: Option<String>,
    /// The source key's name or id; absent: a new key is generated, or that of --key-material-id is taken.
    #[arg(long, value_name = "NAME", requires = "key")]
    source_key: Option<String>,
    /// The source key's tier.
    #[arg(long, value_name = "TIER", requires = "key")]
    tier: Option<String>,
    /// The material expires then (RFC 3339); absent: never.
    #[arg(long, value_name = "TIME", requires = "key")]
    valid_to: Option<String>,
    /// As AWS names it, such as `RSAES_OAEP_SHA_256`; absent: the strongest that AWS allows.
    #[arg(long, value_name = "NAME", requires = "key")]
    wrapping_algorithm: Option<String>,
    /// As AWS names it, such as `RSA_4096`; absent: the strongest.
    #[arg(long, value_name = "NAME", requires = "key")]
    wrapping_key_spec: Option<String>,
    /// Text that AWS keeps with the material of a symmetric key.
    #[arg(long, value_name = "TEXT", requires = "key")]
    description: Option<String>,
    /// Which of the key's materials is imported again, or deleted; absent: the current one.
    #[arg(long, value_name = "ID", requires = "key")]
    key_material_id: Option<String>,
    /// For a delete: current (default) or all, every material that the key is tied to.
    #[arg(long, value_name = "SCOPE", requires = "key")]
    scope: Option<String>,
    /// For a delete: overtake the jobs that wait on the key.
    #[arg(long, requires = "key")]
    urgent: bool,
    /// Make every check, change nothing, and tell in the result what would happen.
    #[arg(long, requires = "key")]
    dry_run: bool,
    /// Fail if AWS holds another current material than this id.
    #[arg(long, value_name = "ID", requires = "key")]
    expect_current_material: Option<String>,
    /// The job joins its key's line then (RFC 3339, at most 30 days ahead); absent: now.
    #[arg(long, value_name = "TIME", requires = "key")]
    not_before: Option<String>,
    /// The job gives up then (RFC 3339); absent: after 3 days.
    #[arg(long, value_name = "TIME", requires = "key")]
    deadline: Option<String>,
    /// A name under which jobs are followed together.
    #[arg(long, requires = "key")]
    batch: Option<String>,
    /// JSON Lines, one request a line; - for standard input.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// What carries the requests: rabbitmq or sqs; absent: the first of `requests_from`.
    #[arg(long, value_name = "NAME", value_parser = transport)]
    over: Option<Transport>,
    /// Follow the jobs until they have ended. Exit code 3 if one did not succeed, 4 if it took too long.
    #[arg(long)]
    wait: bool,
    /// Wait at most this long.
    #[arg(long, default_value = "5m", value_name = "TIME", requires = "wait", value_parser = duration)]
    timeout: Duration,
    #[command(flatten)]
    sign: SignArgs,
    /// Follow the requests under this principal; absent: the one that the policy has for this sender.
    #[arg(long, value_name = "NAME", requires = "wait")]
    principal: Option<String>,
}

/// A request ready to be published.
pub(super) struct Message {
    pub(super) id: String,
    pub(super) body: String,
    /// The KMS key as it is named there; SQS orders by it.
    pub(super) key: Option<String>,
}

impl Submit {
    pub(super) async fn run(mut self, loaded: &Loaded, output: Output) -> Result<(), Failed> {
        // Before anything is published: following needs the store.
        let store = if self.wait { Some(open_store(loaded).await?) } else { None };
        let first = loaded.settings.requests_from.first().copied();
        let transport = self.over.or(first).unwrap_or(Transport::RabbitMq);
        let sender = std::mem::take(&mut self.sign).sender(loaded, transport)?;
        let principal = if self.wait { sender.principal(loaded, self.principal.take())? } else { String::new() };
        let link = Link::open(loaded, transport, sender).await?;
        let (timeout, is_waiting) = (self.timeout, self.wait);

        let (reading, mut messages) = mpsc::channel(WINDOW);
        let reader = tokio::task::spawn_blocking(move || self.read(&reading));
        let bar = progress_bar(0, "requests sent");
        let mut sent: Vec<String> = Vec::new();
        let mut window = Vec::with_capacity(WINDOW);
        let mut count = 0_u64;
        while messages.recv_many(&mut window, WINDOW).await > 0 {
            link.publish(&window).await.with_context(|| {
                let more = window.len();
                format!("{count} requests were published, and up to {more} more may have been, before this")
            })?;
            count += window.len() as u64;
            bar.set_length(count);
            bar.set_position(count);
            if is_waiting || count <= 1 {
                sent.extend(window.iter().map(|message| message.id.clone()));
            }
            window.clear();
        }
        bar.finish_and_clear();
        let read = reader.await?;
        link.close().await?;
        read.with_context(|| format!("{count} requests were published before this"))?;
        if let Some(store) = store {
            let followed = follow(&store, &principal, "", sent, timeout).await?;
            return finish(output, &followed);
        }
        output.value(&json!({"published": count, "id": sent.first()}), |_| match (count, sent.first()) {
            (1, Some(id)) => format!("published request {id}; follow it with: keyferry jobs wait {id}"),
            _ => format!("published {count} requests"),
        });
        Ok(())
    }

    /// Hands requests over as they are read: a long file is never held as a whole.
    fn read(self, sender: &mpsc::Sender<Message>) -> anyhow::Result<()> {
        let Some(file) = &self.file else {
            // An error means that publishing has failed, which says more.
            drop(sender.blocking_send(self.flags_message()?));
            return Ok(());
        };
        let reader: Box<dyn std::io::BufRead> = if file.as_os_str() == "-" {
            Box::new(std::io::stdin().lock())
        } else {
            let opened =
                std::fs::File::open(file).with_context(|| format!("the file {} cannot be read", file.display()))?;
            Box::new(std::io::BufReader::new(opened))
        };
        for (number, line) in reader.lines().enumerate() {
            let line = line.with_context(|| format!("line {} cannot be read", number + 1))?;
            if line.trim().is_empty() {
                continue;
            }
            let message = from_line(&line).with_context(|| format!("line {}", number + 1))?;
            if sender.blocking_send(message).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn flags_message(&self) -> anyhow::Result<Message> {
        let id = self.id.clone().unwrap_or_else(|| Uuid::new_v4().to_string());
        let mut fields = Map::new();
        let mut put = |name: &str, value: Option<&String>| {
            if let Some(value) = value {
                fields.insert(name.to_owned(), json!(value));
            }
        };
        put("id", Some(&id));
        put("key", self.key.as_ref());
        put("operation", self.operation.as_ref());
        put("source_key_tier", self.tier.as_ref());
        put("source_key_identifier", self.source_key.as_ref());
        put("valid_to", self.valid_to.as_ref());
        put("wrapping_algorithm", self.wrapping_algorithm.as_ref());
        put("wrapping_key_spec", self.wrapping_key_spec.as_ref());
        put("key_material_description", self.description.as_ref());
        put("key_material_id", self.key_material_id.as_ref());
        put("scope", self.scope.as_ref());
        put("expect_current_material", self.expect_current_material.as_ref());
        put("not_before", self.not_before.as_ref());
        put("deadline", self.deadline.as_ref());
        put("batch", self.batch.as_ref());
        if self.valid_to.is_some() {
            fields.insert("key_expiration".into(), json!(true));
        }
        if self.urgent {
            fields.insert("urgent".into(), json!(true));
        }
        if self.dry_run {
            fields.insert("dry_run".into(), json!(true));
        }
        Ok(Message { id, body: serde_json::to_string(&Value::Object(fields))?, key: self.key.clone() })
    }
}

/// What a line asks for is for the worker to judge; here it only has to be an object with an id that can be
/// followed, or gets one.
fn from_line(line: &str) -> anyhow::Result<Message> {
    // serde's words would quote the line.
    let mut fields: Map<String, Value> =
        serde_json::from_str(line).map_err(|error| anyhow!("not a JSON object (column {})", error.column()))?;
    if line.len() > MAX_BODY_BYTES {
        bail!("larger than 64 KiB");
    }
    let key = fields.get("key").and_then(Value::as_str).map(str::to_owned);
    match fields.get("id") {
        Some(Value::String(id)) => {
            let id = request_id(id).map_err(|expected| anyhow!("id: {expected}"))?;
            Ok(Message { id, body: line.to_owned(), key })
        }
        Some(_) => bail!("id: expected a string"),
        None => {
            let id = Uuid::new_v4().to_string();
            fields.insert("id".into(), json!(id));
            Ok(Message { id, body: serde_json::to_string(&fields)?, key })
        }
    }
}

/// AMQP cannot carry a longer id, and a request with a wrong one could not be followed: its refusal has none.
fn request_id(text: &str) -> Result<String, String> {
    let id = RequestId::parse(text).ok_or("expected 1 to 128 of A-Z a-z 0-9 . _ : -")?;
    Ok(id.as_str().to_owned())
}

pub(super) fn transport(text: &str) -> Result<Transport, String> {
    match text {
        "rabbitmq" => Ok(Transport::RabbitMq),
        "sqs" => Ok(Transport::Sqs),
        _ => Err("expected rabbitmq or sqs".to_owned()),
    }
}
