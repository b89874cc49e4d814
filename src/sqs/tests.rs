//! What the real SDK makes of a server's answers, and what we make of that. The answers are SQS's, as documented and as
//! its JSON protocol spells them.

use super::*;
use aws_credential_types::Credentials;
use aws_sdk_sqs::config::SharedCredentialsProvider;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// Status, query error and body of an answer.
type Answer = (u16, &'static str, String);

/// Answers one request after the other; the last answer is given for ever. Keeps the requests' bodies.
async fn server(answers: Vec<Answer>) -> (String, Arc<Mutex<Vec<serde_json::Value>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answers = Arc::new(Mutex::new(VecDeque::from(answers)));
    let requests = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&requests);
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let (answers, kept) = (Arc::clone(&answers), Arc::clone(&kept));
            tokio::spawn(async move {
                let body = read(&mut socket).await;
                let (status, code, text) = {
                    let mut answers = answers.lock().unwrap();
                    kept.lock().unwrap().push(body);
                    let next = answers.front().cloned().unwrap();
                    if answers.len() > 1 {
                        answers.pop_front();
                    }
                    next
                };
                let query =
                    if code.is_empty() { String::new() } else { format!("x-amzn-query-error: {code};Sender\r\n") };
                let length = text.len();
                let answer = format!(
                    "HTTP/1.1 {status} X\r\n{query}content-type: application/x-amz-json-1.0\r\n\
                     content-length: {length}\r\nconnection: close\r\n\r\n{text}"
                );
                let _written = socket.write_all(answer.as_bytes()).await;
            });
        }
    });
    (format!("http://{address}"), requests)
}

async fn read(socket: &mut TcpStream) -> serde_json::Value {
    let mut request = Vec::new();
    loop {
        let mut part = [0; 4096];
        let count = socket.read(&mut part).await.unwrap();
        request.extend(&part[..count]);
        let text = String::from_utf8_lossy(&request);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
        if body.len() >= length.unwrap_or(0) {
            return serde_json::from_str(body).unwrap();
        }
    }
}

fn queue_at(endpoint: &str, name: &str, credentials: Option<Credentials>) -> Queue {
    let mut config = SdkConfig::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .region(Region::new("eu-central-1"))
        .endpoint_url(endpoint);
    config.set_credentials_provider(credentials.map(SharedCredentialsProvider::new));
    let sqs = Sqs::with_config(&config.build(), &Metrics::new().unwrap());
    sqs.queue(&format!("https://sqs.eu-central-1.amazonaws.com/111122223333/{name}"))
}

async fn queue(name: &str, answers: Vec<Answer>) -> (Queue, Arc<Mutex<Vec<serde_json::Value>>>) {
    let (endpoint, requests) = server(answers).await;
    (queue_at(&endpoint, name, Some(Credentials::for_tests())), requests)
}

fn ok(body: &serde_json::Value) -> Answer {
    (200, "", body.to_string())
}

fn entries(done: &[usize], failed: &[(usize, bool, &str)]) -> Answer {
    let done: Vec<_> = done
        .iter()
        .map(|id| serde_json::json!({"Id": id.to_string(), "MessageId": "m", "MD5OfMessageBody": "x"}))
        .collect();
    let failed: Vec<_> = failed
        .iter()
        .map(|(id, fault, code)| serde_json::json!({"Id": id.to_string(), "SenderFault": fault, "Code": code}))
        .collect();
    ok(&serde_json::json!({"Successful": done, "Failed": failed}))
}

fn message(body: &str, group: Option<&str>) -> Outgoing {
    let order = group.map(|group| Order { group: group.to_owned(), deduplication: body.to_owned() });
    Outgoing { body: body.to_owned(), attributes: vec![Attribute::text("content-type", "application/json")], order }
}

fn sent(requests: &Mutex<Vec<serde_json::Value>>) -> Vec<Vec<String>> {
    let requests = requests.lock().unwrap();
    let of_request = |request: &serde_json::Value| {
        let entries = request["Entries"].as_array().cloned().unwrap_or_default();
        entries.iter().map(|entry| entry["MessageBody"].as_str().unwrap().to_owned()).collect()
    };
    requests.iter().map(of_request).collect()
}

#[tokio::test]
async fn errors_are_told_apart() {
    let text = |name: &str| format!(r#"{{"__type":"com.amazonaws.sqs#{name}","message":"so it is"}}"#);
    for (answer, fault) in [
        ((400, "AWS.SimpleQueueService.NonExistentQueue", text("QueueDoesNotExist")), Fault::Gone),
        ((400, "", text("QueueDoesNotExist")), Fault::Gone),
        ((403, "RequestThrottled", text("RequestThrottled")), Fault::Throttled),
        ((400, "", text("ThrottlingException")), Fault::Throttled),
        ((403, "OverLimit", text("OverLimit")), Fault::Throttled),
        ((403, "AccessDenied", text("AccessDeniedException")), Fault::Denied),
        ((400, "KMS.DisabledException", text("KmsDisabled")), Fault::Denied),
        ((400, "KMS.ThrottlingException", text("KmsThrottled")), Fault::Throttled),
        ((400, "", text("InvalidSignatureException")), Fault::Denied),
        ((500, "", text("InternalFailure")), Fault::Away),
        ((503, "", "<html>".to_owned()), Fault::Away),
        ((404, "", "<html>".to_owned()), Fault::Away),
        ((400, "InvalidParameterValue", text("InvalidParameterValue")), Fault::Refused),
    ] {
        let shown = format!("{answer:?}");
        let (queue, _) = queue("q", vec![answer]).await;
        let error = queue.attributes().await.unwrap_err();
        assert_eq!(error.fault, fault, "{shown}: {error}");
        assert!(error.to_string().contains("GetQueueAttributes on q"), "{error}");
    }
}

#[tokio::test]
async fn without_credentials_or_without_a_server_it_says_so() {
    let (endpoint, requests) = server(vec![ok(&serde_json::json!({}))]).await;
    let error = queue_at(&endpoint, "q", None).attributes().await.unwrap_err();
    assert_eq!(error.fault, Fault::Denied, "{error}");
    assert!(requests.lock().unwrap().is_empty());
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", nobody.local_addr().unwrap());
    drop(nobody);
    let error = queue_at(&endpoint, "q", Some(Credentials::for_tests())).attributes().await.unwrap_err();
    assert_eq!(error.fault, Fault::Away, "{error}");
}

#[tokio::test]
async fn a_call_that_is_not_answered_ends() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let queue = queue_at(&endpoint, "q", Some(Credentials::for_tests()));
    let from = Instant::now();
    assert_eq!(queue.attributes().await.unwrap_err().fault, Fault::Away);
    assert!((4..9).contains(&from.elapsed().as_secs()), "{:?}", from.elapsed());
}

#[tokio::test]
async fn what_failed_in_a_batch_is_sent_again_and_nothing_else() {
    let (queue, requests) = queue(
        "q",
        vec![entries(&[0, 3], &[(1, false, "InternalError"), (2, true, "InvalidMessageContents")]), entries(&[0], &[])],
    )
    .await;
    let messages: Vec<Outgoing> = ["a", "b", "c", "d"].iter().map(|body| message(body, None)).collect();
    let outcomes = queue.carry_out(Batch::Send(&messages), 3).await;
    assert_eq!(sent(&requests), [vec!["a", "b", "c", "d"], vec!["b"]]);
    assert!(matches!(outcomes[..], [Outcome::Done, Outcome::Done, Outcome::Refused(_), Outcome::Done]), "{outcomes:?}");
}

#[tokio::test]
async fn attempts_have_a_bound() {
    let (queue, requests) = queue("q", vec![entries(&[], &[(0, false, "InternalError")])]).await;
    let outcomes = queue.carry_out(Batch::Delete(&["r"]), 2).await;
    assert!(matches!(&outcomes[..], [Outcome::Undone(text)] if text.contains("InternalError")), "{outcomes:?}");
    assert_eq!(requests.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn an_entry_that_the_answer_leaves_out_is_not_taken_for_done() {
    let (queue, _) = queue("q", vec![ok(&serde_json::json!({"Successful": [], "Failed": []}))]).await;
    let outcomes = queue.carry_out(Batch::Visibility(&[("r", Duration::ZERO)]), 1).await;
    assert!(matches!(outcomes[..], [Outcome::Undone(_)]), "{outcomes:?}");
}

#[tokio::test]
async fn a_rule_that_one_breaks_does_not_stop_the_others() {
    let broken =
        (400, "InvalidMessageContents", r#"{"__type":"InvalidMessageContents","message":"characters"}"#.to_owned());
    // Refused together, then one by one: last first.
    let (queue, requests) = queue("q", vec![broken.clone(), entries(&[0], &[]), broken]).await;
    let outcomes = queue.carry_out(Batch::Send(&[message("bad", None), message("good", None)]), 3).await;
    assert_eq!(sent(&requests), [vec!["bad", "good"], vec!["good"], vec!["bad"]]);
    assert!(matches!(outcomes[..], [Outcome::Refused(_), Outcome::Done]), "{outcomes:?}");
}

#[tokio::test]
async fn on_fifo_nothing_passes_an_earlier_one_of_its_group() {
    // Of a1 and b1 the first fails, as often as it is tried; b2 goes on, a2 does not.
    let (queue, requests) = queue(
        "q.fifo",
        vec![
            entries(&[1], &[(0, false, "InternalError")]),
            entries(&[], &[(0, false, "InternalError")]),
            entries(&[0], &[]),
        ],
    )
    .await;
    let messages =
        [message("a1", Some("a")), message("b1", Some("b")), message("a2", Some("a")), message("b2", Some("b"))];
    let outcomes = queue.carry_out(Batch::Send(&messages), 2).await;
    assert_eq!(sent(&requests), [vec!["a1", "b1"], vec!["a1"], vec!["b2"]]);
    assert!(
        matches!(outcomes[..], [Outcome::Undone(_), Outcome::Done, Outcome::Behind, Outcome::Done]),
        "{outcomes:?}"
    );
}

/// A window of one key's events on FIFO: one call each. What was done in time is known, and the rest is in order still.
#[tokio::test]
async fn what_there_is_no_time_for_is_told_and_what_was_done_is_not_forgotten() {
    let (queue, requests) = queue("q.fifo", vec![entries(&[0], &[])]).await;
    // More than the fastest machine sends in that time.
    let messages: Vec<Outgoing> = (0..20_000).map(|at| message(&at.to_string(), Some("a"))).collect();
    let until = tokio::time::Instant::now() + Duration::from_millis(700);
    let outcomes = queue.carry_out_until(Batch::Send(&messages), 3, until).await;
    let done = outcomes.iter().take_while(|outcome| **outcome == Outcome::Done).count();
    assert!((1..20_000).contains(&done), "{done}");
    assert!(outcomes[done..].iter().all(|outcome| *outcome == Outcome::Late), "{outcomes:?}");
    assert_eq!(requests.lock().unwrap().len(), done);
}

/// The delay of a throttled call may be longer than what is left of the time.
#[tokio::test]
async fn no_attempt_begins_when_the_time_is_over() {
    let throttled = (403, "RequestThrottled", r#"{"__type":"RequestThrottled"}"#.to_owned());
    for name in ["q", "q.fifo"] {
        let (queue, _) = queue(name, vec![throttled.clone()]).await;
        let group = queue.is_fifo().then_some("a");
        let from = tokio::time::Instant::now();
        let messages = [message("a1", group), message("a2", group)];
        let until = from + Duration::from_millis(500);
        let outcomes = queue.carry_out_until(Batch::Send(&messages), 1_000, until).await;
        assert_eq!(outcomes, [Outcome::Late, Outcome::Late], "{name}");
        assert!(from.elapsed() < Duration::from_secs(6), "{name}");
    }
}

#[tokio::test]
async fn a_queue_that_is_gone_is_not_asked_again() {
    let gone = (400, "AWS.SimpleQueueService.NonExistentQueue", r#"{"__type":"QueueDoesNotExist"}"#.to_owned());
    let (queue, requests) = queue("q", vec![gone]).await;
    let outcomes = queue.carry_out(Batch::Delete(&["r"]), 5).await;
    assert!(matches!(&outcomes[..], [Outcome::Failed(error)] if error.fault == Fault::Gone), "{outcomes:?}");
    assert_eq!(requests.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_message_is_received_whole_and_everything_is_asked_for() {
    let (queue, requests) = queue(
        "q",
        vec![ok(&serde_json::json!({"Messages": [{
            "MessageId": "m1", "ReceiptHandle": "r1", "Body": "{}",
            "Attributes": {"SenderId": "AROAX:s", "ApproximateReceiveCount": "3", "MessageGroupId": "g"},
            "MessageAttributes": {
                "content-type": {"DataType": "String.x", "StringValue": "application/json"},
                "blob": {"DataType": "Binary", "BinaryValue": "AAEC"}
            }
        }, {"MessageId": "m2", "Body": "without a receipt"}]}))],
    )
    .await;
    let received = queue.receive(7, Duration::from_secs(2), Duration::from_millis(5_900)).await.unwrap();
    let [message] = &received[..] else { panic!("{received:?}") };
    assert_eq!((message.sender_id.as_deref(), message.group.as_deref()), (Some("AROAX:s"), Some("g")));
    assert_eq!((message.receive_count, message.text("content-type")), (3, Some("application/json")));
    let blob = Attribute { name: "blob".into(), data_type: "Binary".into(), value: Value::Bytes(vec![0, 1, 2]) };
    assert_eq!(message.attributes[0], blob);
    assert_eq!(message.size(), 2 + (4 + 6 + 3) + (12 + 8 + 16));
    let request = requests.lock().unwrap()[0].clone();
    assert_eq!(request["MaxNumberOfMessages"], 7);
    assert_eq!((&request["WaitTimeSeconds"], &request["VisibilityTimeout"]), (&2.into(), &5.into()));
    assert_eq!(
        request["MessageSystemAttributeNames"],
        serde_json::json!([
            "SenderId",
            "ApproximateReceiveCount",
            "MessageGroupId",
            "MessageDeduplicationId",
            "DeadLetterQueueSourceArn",
            "SentTimestamp"
        ])
    );
    assert_eq!(request["MessageAttributeNames"], serde_json::json!(["All"]));
}

#[tokio::test]
async fn what_sqs_says_stays_in_its_line() {
    let error = EntryError { is_senders_fault: true, code: "Bad\r".into(), message: "no\n\u{1b}[2J".into() };
    assert_eq!(error.to_string(), "Bad : no  [2J");
    let said = r#"{"__type":"InvalidParameterValue","message":"no\n2026-11-28 all is well"}"#.to_owned();
    let (queue, _) = queue("q", vec![(400, "InvalidParameterValue", said)]).await;
    assert_eq!(queue.attributes().await.unwrap_err().message, "no 2026-11-28 all is well");
}

#[test]
fn a_receipt_is_gone_only_when_sqs_says_so() {
    let error =
        |code: &str, message: &str| EntryError { is_senders_fault: true, code: code.into(), message: message.into() };
    for (code, message, is_gone) in [
        ("ReceiptHandleIsInvalid", "", true),
        ("AWS.SimpleQueueService.MessageNotInflight", "", true),
        (
            "InvalidParameterValue",
            "Value x for parameter ReceiptHandle is invalid. Reason: Message does not exist",
            true,
        ),
        ("InvalidParameterValue", "Value 60 for parameter VisibilityTimeout is invalid", false),
        ("InternalError", "", false),
        ("RequestThrottled", "", false),
    ] {
        assert_eq!(error(code, message).is_receipt_gone(), is_gone, "{code} {message}");
    }
}
