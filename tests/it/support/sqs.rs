//! Queues of the run's double of SQS for one test, and what is sent and received there. Speaks HTTP by itself: what is
//! proven about the program must not rest on the program's own client.

use super::broker::{Message, Received};
use super::{finish_blocking, http, variable};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;
use uuid::Uuid;

/// What the worker is given; the double does not look at signatures.
pub const SQS_REGION: &str = "eu-central-1";
/// Receipts until SQS itself moves a message away: more than any scenario needs.
const MAX_RECEIVE_COUNT: u32 = 30;

/// Queues of one test, deleted when they are dropped.
pub struct Queues {
    http: reqwest::Client,
    prefix: String,
    requests: &'static str,
    events: &'static str,
}

/// Between two looks at a queue.
const LOOK: Duration = Duration::from_millis(200);

/// One of the three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Requests,
    Dead,
    Events,
}

impl Queues {
    /// Names for queues, FIFO or not. Makes none.
    pub fn name(are_requests_fifo: bool, are_events_fifo: bool) -> Self {
        let suffix = |is_fifo| if is_fifo { ".fifo" } else { "" };
        Self {
            http: http(),
            prefix: format!("kf-test-{}", Uuid::new_v4().simple()),
            requests: suffix(are_requests_fifo),
            events: suffix(are_events_fifo),
        }
    }

    /// Makes all three.
    pub async fn create(&self) {
        self.make(Role::Dead, json!({})).await;
        let attributes = self.call("GetQueueAttributes", Role::Dead, json!({"AttributeNames": ["QueueArn"]})).await;
        let target = &attributes["Attributes"]["QueueArn"];
        let policy = json!({"deadLetterTargetArn": target, "maxReceiveCount": MAX_RECEIVE_COUNT});
        self.make(Role::Requests, json!({"RedrivePolicy": policy.to_string()})).await;
        self.make(Role::Events, json!({})).await;
    }

    /// Makes one.
    pub async fn make(&self, role: Role, mut attributes: Value) {
        if self.is_fifo(role) {
            attributes["FifoQueue"] = json!("true");
        }
        let name = self.name_of(role);
        let made = send(&self.http, "CreateQueue", json!({"QueueName": name, "Attributes": attributes})).await;
        assert!(made["QueueUrl"].is_string(), "{made}");
    }

    /// Deletes one.
    pub async fn delete(&self, role: Role) {
        self.call("DeleteQueue", role, json!({})).await;
    }

    pub fn is_fifo(&self, role: Role) -> bool {
        let suffix = if role == Role::Events { self.events } else { self.requests };
        !suffix.is_empty()
    }

    pub fn name_of(&self, role: Role) -> String {
        match role {
            Role::Requests => format!("{}-jobs{}", self.prefix, self.requests),
            Role::Dead => format!("{}-dead{}", self.prefix, self.requests),
            Role::Events => format!("{}-events{}", self.prefix, self.events),
        }
    }

    /// As the worker's settings name it. Only the last part of its path counts.
    pub fn url(&self, role: Role) -> String {
        format!("{}/123456789012/{}", variable("KEYFERRY_TEST_SQS"), self.name_of(role))
    }

    /// Sends a request, in a group on FIFO. Every message is one of its own, even where its bytes are not.
    pub async fn send(&self, message: &Message, group: &str) {
        self.put(Role::Requests, message, group).await;
    }

    /// The same into any of them.
    pub async fn put(&self, role: Role, message: &Message, group: &str) {
        let text = |value: &str| json!({"DataType": "String", "StringValue": value});
        let mut attributes: BTreeMap<&str, Value> =
            message.headers.iter().map(|(name, value)| (name.as_str(), text(value))).collect();
        if let Some(content_type) = &message.content_type {
            attributes.insert("content-type", text(content_type));
        }
        let mut request = json!({"MessageBody": String::from_utf8(message.body.clone()).unwrap()});
        if !attributes.is_empty() {
            request["MessageAttributes"] = json!(attributes);
        }
        if self.is_fifo(role) {
            request["MessageGroupId"] = json!(group);
            request["MessageDeduplicationId"] = json!(Uuid::new_v4().to_string());
        }
        self.call("SendMessage", role, request).await;
    }

    /// Receives requests as if each consumer died with them, once.
    pub async fn fumble(&self) {
        let asked = json!({"MaxNumberOfMessages": 10, "WaitTimeSeconds": 0, "VisibilityTimeout": 0});
        self.call("ReceiveMessage", Role::Requests, asked).await;
    }

    /// Sets attributes.
    pub async fn set(&self, role: Role, attributes: Value) {
        self.call("SetQueueAttributes", role, json!({"Attributes": attributes})).await;
    }

    /// Sends many requests, ten at a time. On FIFO each is in a group of its own.
    pub async fn send_all(&self, messages: &[Message]) {
        for batch in messages.chunks(10) {
            let entry = |(at, message): (usize, &Message)| {
                let body = String::from_utf8(message.body.clone()).unwrap();
                let mut entry = json!({"Id": at.to_string(), "MessageBody": body});
                if self.is_fifo(Role::Requests) {
                    let id = Uuid::new_v4().to_string();
                    entry["MessageGroupId"] = json!(id);
                    entry["MessageDeduplicationId"] = json!(id);
                }
                entry
            };
            let entries: Vec<Value> = batch.iter().enumerate().map(entry).collect();
            let answer = self.call("SendMessageBatch", Role::Requests, json!({"Entries": entries})).await;
            assert_eq!(answer["Successful"].as_array().map(Vec::len), Some(batch.len()), "{answer}");
        }
    }

    /// Takes everything that is visible.
    pub async fn take(&self, role: Role) -> Vec<Received> {
        let mut taken = Vec::new();
        loop {
            let asked = json!({"MaxNumberOfMessages": 10, "WaitTimeSeconds": 0, "VisibilityTimeout": 30,
                "MessageAttributeNames": ["All"], "MessageSystemAttributeNames": ["All"]});
            let answer = self.call("ReceiveMessage", role, asked).await;
            let Some(messages) = answer["Messages"].as_array().filter(|messages| !messages.is_empty()) else {
                return taken;
            };
            taken.extend(messages.iter().map(received));
            let entry = |(at, message): (usize, &Value)| json!({"Id": at.to_string(), "ReceiptHandle": message["ReceiptHandle"]});
            let entries: Vec<Value> = messages.iter().enumerate().map(entry).collect();
            self.call("DeleteMessageBatch", role, json!({"Entries": entries})).await;
        }
    }

    /// Messages that wait for a consumer.
    pub async fn ready(&self, role: Role) -> u32 {
        self.count(role, "ApproximateNumberOfMessages").await
    }

    /// Messages in a consumer's hand, or hidden for another reason.
    pub async fn hidden(&self, role: Role) -> u32 {
        self.count(role, "ApproximateNumberOfMessagesNotVisible").await
    }

    async fn count(&self, role: Role, name: &str) -> u32 {
        // Whoever waits for a count asks again and again, and the double serves all tests with one thread at a time.
        tokio::time::sleep(LOOK).await;
        let answer = self.call("GetQueueAttributes", role, json!({"AttributeNames": [name]})).await;
        answer["Attributes"][name].as_str().unwrap().parse().unwrap()
    }

    /// All attributes.
    pub async fn attributes(&self, role: Role) -> Value {
        let answer = self.call("GetQueueAttributes", role, json!({"AttributeNames": ["All"]})).await;
        answer["Attributes"].clone()
    }

    async fn call(&self, operation: &str, role: Role, mut request: Value) -> Value {
        request["QueueUrl"] = json!(self.url(role));
        send(&self.http, operation, request).await
    }
}

impl Drop for Queues {
    fn drop(&mut self) {
        let urls = [Role::Requests, Role::Dead, Role::Events].map(|role| self.url(role));
        finish_blocking(async move {
            for url in urls {
                drop(try_send(&http(), "DeleteQueue", json!({"QueueUrl": url})).await);
            }
        });
    }
}

async fn send(http: &reqwest::Client, operation: &str, request: Value) -> Value {
    let (status, text) = try_send(http, operation, request).await.unwrap();
    assert_eq!(status, 200, "{operation}: {text}");
    serde_json::from_str(&text).unwrap_or(Value::Null)
}

async fn try_send(http: &reqwest::Client, operation: &str, request: Value) -> Result<(u16, String), reqwest::Error> {
    // The double reads the Region from the scope of the credentials, and nothing else.
    let scope = format!("tests/20260101/{SQS_REGION}/sqs/aws4_request");
    let answer = http
        .post(variable("KEYFERRY_TEST_SQS"))
        .header("x-amz-target", format!("AmazonSQS.{operation}"))
        .header("content-type", "application/x-amz-json-1.0")
        .header("authorization", format!("AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=none"))
        .timeout(Duration::from_secs(30))
        .body(request.to_string())
        .send()
        .await?;
    Ok((answer.status().as_u16(), answer.text().await?))
}

fn received(message: &Value) -> Received {
    let attributes = message["MessageAttributes"].as_object().cloned().unwrap_or_default();
    let mut headers: BTreeMap<String, String> = attributes
        .iter()
        .filter_map(|(name, value)| Some((name.clone(), value["StringValue"].as_str()?.to_owned())))
        .collect();
    let body = message["Body"].as_str().unwrap();
    let id = serde_json::from_str::<Value>(body).ok().and_then(|body| Some(body["id"].as_str()?.to_owned()));
    Received {
        routing_key: headers.remove("routing-key").unwrap_or_default(),
        content_type: headers.remove("content-type"),
        // SQS has none of a sender's; events are known by the one in their body.
        message_id: id,
        // SQS forgets nothing.
        delivery_mode: Some(2),
        body: body.as_bytes().to_vec(),
        redelivered: false,
        group: message["Attributes"]["MessageGroupId"].as_str().map(str::to_owned),
        headers,
    }
}
