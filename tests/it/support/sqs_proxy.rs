//! Stands between a worker and the double of SQS: goes away, refuses entries of batches, throttles, loses answers, and
//! keeps count of receipts. What it answers by itself is spelled as SQS spells it.

use super::variable;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use url::Url;

/// What is to go wrong.
#[derive(Clone, Debug)]
pub struct Trouble {
    /// The operation, as in `DeleteMessageBatch`.
    pub operation: &'static str,
    /// Part of a queue's name.
    pub queue: String,
    /// Part of an entry's text; for whole calls of no meaning.
    pub marker: String,
    /// How.
    pub kind: Kind,
    /// How often still.
    pub times: usize,
}

#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// These entries fail, the others go through.
    Entries { code: &'static str, is_senders_fault: bool },
    /// The call as a whole is refused.
    Call { status: u16, code: &'static str },
    /// The call goes through and its answer is lost.
    LoseAnswer,
    /// The call goes nowhere, and is never answered.
    Hang,
}

#[derive(Default)]
struct State {
    troubles: Vec<Trouble>,
    /// Highest receive count seen, by SQS's id of the message.
    receipts: BTreeMap<String, u64>,
    /// Calls by operation.
    calls: BTreeMap<String, usize>,
}

/// The proxy. Ends with the runtime of its test.
pub struct Proxy {
    port: u16,
    is_open: watch::Sender<bool>,
    state: Arc<Mutex<State>>,
}

impl Proxy {
    /// Starts it, open.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (is_open, gate) = watch::channel(true);
        let state = Arc::<Mutex<State>>::default();
        let shared = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let (mut gate, shared) = (gate.clone(), Arc::clone(&shared));
                tokio::spawn(async move {
                    tokio::select! {
                        // Closed: this connection is cut, and so is each that comes.
                        _ = gate.wait_for(|is_open| !is_open) => {}
                        _ = pass(near, &shared) => {}
                    }
                });
            }
        });
        Self { port, is_open, state }
    }

    /// For `AWS_ENDPOINT_URL_SQS`.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Cuts every connection, and lets none through.
    pub fn close(&self) {
        self.is_open.send_replace(false);
    }

    /// Lets connections through again.
    pub fn open(&self) {
        self.is_open.send_replace(true);
    }

    /// Makes something go wrong so many times.
    pub fn trouble(&self, operation: &'static str, queue: &str, marker: &str, kind: Kind, times: usize) {
        let trouble = Trouble { operation, queue: queue.to_owned(), marker: marker.to_owned(), kind, times };
        self.state.lock().unwrap().troubles.push(trouble);
    }

    /// Nothing goes wrong any more.
    pub fn calm(&self) {
        self.state.lock().unwrap().troubles.clear();
    }

    /// How often the message was received that was received most often.
    pub fn most_receipts(&self) -> u64 {
        self.state.lock().unwrap().receipts.values().copied().max().unwrap_or(0)
    }

    /// Calls of an operation so far.
    pub fn calls(&self, operation: &str) -> usize {
        self.state.lock().unwrap().calls.get(operation).copied().unwrap_or(0)
    }
}

/// One request of a connection, then its end.
async fn pass(mut near: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let Some((head, body)) = read_message(&mut near).await? else { return Ok(()) };
    let operation = header(&head, "x-amz-target").unwrap_or_default();
    let operation = operation.rsplit('.').next().unwrap_or_default().to_owned();
    let request: Value = serde_json::from_slice(&body).unwrap_or_default();
    *state.lock().unwrap().calls.entry(operation.clone()).or_default() += 1;
    let (trouble, chosen) = choose(state, &operation, &request);
    match trouble {
        Some(Kind::Call { status, code }) => {
            let body = json!({"__type": format!("com.amazonaws.sqs#{code}"), "message": "made to fail"});
            return near.write_all(answer(status, &body.to_string(), Some(code)).as_bytes()).await;
        }
        Some(Kind::Entries { .. }) => {
            let mut passing = request["Entries"].as_array().cloned().unwrap_or_default();
            passing.retain(|entry| !chosen.iter().any(|failed| failed["Id"] == entry["Id"]));
            let mut answered = json!({"Successful": [], "Failed": []});
            if !passing.is_empty() {
                let mut rest = request.clone();
                rest["Entries"] = json!(passing);
                answered = serde_json::from_str(&forward(&head, rest.to_string().as_bytes()).await?.1).unwrap();
            }
            let mut failed = answered["Failed"].as_array().cloned().unwrap_or_default();
            failed.extend(chosen);
            answered["Failed"] = json!(failed);
            return near.write_all(answer(200, &answered.to_string(), None).as_bytes()).await;
        }
        Some(Kind::LoseAnswer) => {
            forward(&head, &body).await?;
            return Ok(());
        }
        Some(Kind::Hang) => return std::future::pending().await,
        None => {}
    }
    let (raw, text) = forward(&head, &body).await?;
    if operation == "ReceiveMessage" {
        let answered: Value = serde_json::from_str(&text).unwrap_or_default();
        let mut state = state.lock().unwrap();
        for message in answered["Messages"].as_array().into_iter().flatten() {
            let count = message["Attributes"]["ApproximateReceiveCount"].as_str().and_then(|count| count.parse().ok());
            let id = message["MessageId"].as_str().unwrap_or_default().to_owned();
            state.receipts.insert(id, count.unwrap_or(0));
        }
    }
    near.write_all(&raw).await
}

/// The first trouble, if any. Of those with entries each one that there is, and what the answer is to say of its entries.
fn choose(state: &Mutex<State>, operation: &str, request: &Value) -> (Option<Kind>, Vec<Value>) {
    let mut state = state.lock().unwrap();
    let queue = request["QueueUrl"].as_str().unwrap_or_default();
    let mut failed: Vec<Value> = Vec::new();
    let mut first = None;
    for trouble in &mut state.troubles {
        if trouble.times == 0 || trouble.operation != operation || !queue.contains(&trouble.queue) {
            continue;
        }
        let Kind::Entries { code, is_senders_fault } = trouble.kind else {
            if failed.is_empty() {
                trouble.times -= 1;
                return (Some(trouble.kind), Vec::new());
            }
            continue;
        };
        let entries = request["Entries"].as_array().into_iter().flatten();
        let ids: Vec<&Value> = entries
            .filter(|entry| entry.to_string().contains(&trouble.marker))
            .map(|entry| &entry["Id"])
            .filter(|id| !failed.iter().any(|failed| failed["Id"] == **id))
            .collect();
        if !ids.is_empty() {
            trouble.times -= 1;
            first = Some(trouble.kind);
            failed.extend(
                ids.into_iter().map(
                    |id| json!({"Id": id, "Code": code, "SenderFault": is_senders_fault, "Message": "made to fail"}),
                ),
            );
        }
    }
    (first, failed)
}

/// The answer as it came, and its body.
async fn forward(head: &str, body: &[u8]) -> std::io::Result<(Vec<u8>, String)> {
    let target: Url = variable("KEYFERRY_TEST_SQS").parse().unwrap();
    let mut far = TcpStream::connect((target.host_str().unwrap(), target.port().unwrap())).await?;
    let kept: String = head
        .lines()
        .filter(|line| {
            let line = line.to_ascii_lowercase();
            !line.starts_with("content-length:") && !line.starts_with("connection:") && !line.is_empty()
        })
        .fold(String::new(), |kept, line| kept + line + "\r\n");
    let head = format!("{kept}content-length: {}\r\nconnection: close\r\n\r\n", body.len());
    far.write_all(head.as_bytes()).await?;
    far.write_all(body).await?;
    let mut raw = Vec::new();
    far.read_to_end(&mut raw).await?;
    let text = String::from_utf8_lossy(&raw);
    let text = text.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned();
    Ok((raw, text))
}

async fn read_message(stream: &mut TcpStream) -> std::io::Result<Option<(String, Vec<u8>)>> {
    let mut read = Vec::new();
    let mut part = vec![0; 16 * 1024];
    loop {
        if let Some(end) = read.windows(4).position(|four| four == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&read[..end]).into_owned();
            let length: usize = header(&head, "content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
            if read.len() >= end + 4 + length {
                return Ok(Some((head, read[end + 4..end + 4 + length].to_vec())));
            }
        }
        let count = stream.read(&mut part).await?;
        if count == 0 {
            return Ok(None);
        }
        read.extend_from_slice(&part[..count]);
    }
}

fn header(head: &str, name: &str) -> Option<String> {
    head.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        found.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
    })
}

fn answer(status: u16, body: &str, code: Option<&str>) -> String {
    let query = code.map(|code| format!("x-amzn-query-error: {code};Sender\r\n")).unwrap_or_default();
    format!(
        "HTTP/1.1 {status} X\r\n{query}content-type: application/x-amz-json-1.0\r\ncontent-length: {}\r\n\
         connection: close\r\n\r\n{body}",
        body.len()
    )
}
