//! What the real SDK makes of a server's behaviour, and what we make of that.

use super::*;
use aws_config::retry::RetryConfig as SharedRetry;
use aws_credential_types::Credentials;
use aws_sdk_kms::config::SharedCredentialsProvider;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

const TIMEOUT: Duration = Duration::from_millis(400);
const ARN: &str = "arn:aws:kms:eu-central-1:111122223333:key/031c5703-aaf7-425e-a141-7e0c6f5886ab";

/// A server that reads a request and answers with these bytes, or with nothing.
async fn server(answer: Option<&'static str>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let mut request = vec![0; 16 * 1024];
            let _read = socket.read(&mut request).await;
            if let Some(answer) = answer {
                let _written = socket.write_all(answer.as_bytes()).await;
            }
        }
    });
    format!("http://{address}")
}

fn kms(endpoint: &str, credentials: Option<Credentials>) -> Kms {
    let mut config = SdkConfig::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .endpoint_url(endpoint)
        .retry_config(SharedRetry::disabled());
    config.set_credentials_provider(credentials.map(SharedCredentialsProvider::new));
    Kms::with_config(&config.build(), vec![account()], TIMEOUT, &Metrics::new().unwrap())
}

/// Without a role.
fn account() -> Account {
    Account {
        partition: "aws".into(),
        account: "111122223333".into(),
        regions: vec!["eu-central-1".into()],
        role: None,
        sts_region: "eu-central-1".into(),
        is_fips: false,
        is_dual_stack: false,
        endpoints: BTreeMap::new(),
    }
}

fn credentials() -> Credentials {
    Credentials::for_tests()
}

async fn import(kms: &Kms, lease: Duration) -> CallError {
    let call = ImportCall {
        import_token: b"token",
        wrapped: vec![0; 512],
        expiry: Expiry::Never,
        role: MaterialRole::First,
        description: None,
    };
    let guard = LeaseGuard::new(Instant::now(), lease);
    kms.import(&KeyArn::parse(ARN).unwrap(), call, &guard).await.unwrap_err()
}

const LONG: Duration = Duration::from_secs(30);

#[tokio::test]
async fn nobody_there_means_not_sent() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    assert_eq!(import(&kms(&endpoint, Some(credentials())), LONG).await.kind, ErrorKind::NotSent);
}

#[tokio::test]
async fn a_connection_that_breaks_may_have_taken_effect() {
    let error = import(&kms(&server(None).await, Some(credentials())), LONG).await;
    assert_eq!(error.kind, ErrorKind::Unanswered);
    assert!(error.kind.may_have_taken_effect());
}

#[tokio::test]
async fn silence_may_have_taken_effect() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    assert_eq!(import(&kms(&endpoint, Some(credentials())), LONG).await.kind, ErrorKind::Unanswered);
}

#[tokio::test]
async fn an_answer_that_cannot_be_read_may_have_taken_effect() {
    for answer in ["garbage\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\n{{{"] {
        let error = import(&kms(&server(Some(answer)).await, Some(credentials())), LONG).await;
        assert!(error.kind.may_have_taken_effect(), "{answer}: {error:?}");
    }
}

#[tokio::test]
async fn codes_and_statuses_are_classified() {
    macro_rules! answer {
        ($status:literal, $body:literal) => {
            concat!(
                "HTTP/1.1 ",
                $status,
                "\r\nx-amzn-requestid: r-1\r\ncontent-type: application/x-amz-json-1.1\r\n",
                "connection: close\r\n\r\n",
                $body
            )
        };
    }
    for (answer, kind) in [
        (answer!("400 Bad Request", r#"{"__type":"ThrottlingException","message":"slow down"}"#), ErrorKind::Throttled),
        (answer!("400 Bad Request", r#"{"__type":"ExpiredImportTokenException"}"#), ErrorKind::ExpiredImportToken),
        (answer!("400 Bad Request", r#"{"__type":"IncorrectKeyMaterialException"}"#), ErrorKind::IncorrectKeyMaterial),
        (answer!("400 Bad Request", r#"{"__type":"AccessDeniedException","Message":"no"}"#), ErrorKind::AccessDenied),
        (answer!("400 Bad Request", r#"{"__type":"ValidationException","message":"bad"}"#), ErrorKind::Refused),
        (answer!("400 Bad Request", r#"{"__type":"ExpiredTokenException"}"#), ErrorKind::Credentials),
        (answer!("500 Internal Server Error", r#"{"__type":"KMSInternalException"}"#), ErrorKind::ServerFault),
        (answer!("500 Internal Server Error", r#"{"__type":"DependencyTimeoutException"}"#), ErrorKind::ServerFault),
        (answer!("503 Service Unavailable", "<html>busy</html>"), ErrorKind::ServerFault),
        (answer!("400 Bad Request", r#"{"__type":"RequestExpired"}"#), ErrorKind::Credentials),
        (answer!("429 Too Many Requests", "slow down"), ErrorKind::Throttled),
        (answer!("408 Request Timeout", "a proxy's words"), ErrorKind::Unanswered),
    ] {
        let error = import(&kms(&server(Some(answer)).await, Some(credentials())), LONG).await;
        assert_eq!(error.kind, kind, "{answer}: {error:?}");
        assert_eq!(error.aws_request_id.as_deref(), Some("r-1"));
    }
}

/// A server that gives this body to every call.
async fn answering(body: &Value) -> Kms {
    let head =
        "HTTP/1.1 200 OK\r\nx-amzn-requestid: r-1\r\ncontent-type: application/x-amz-json-1.1\r\nconnection: close";
    let answer = format!("{head}\r\n\r\n{body}").leak();
    kms(&server(Some(answer)).await, Some(credentials()))
}

const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const MRK: &str = "arn:aws:kms:eu-central-1:111122223333:key/mrk-0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a";

/// Such ids are in no event and in no result.
fn no_ids() -> [String; 4] {
    [ID[1..].to_owned(), format!("{ID}0"), ID.to_uppercase(), "x".repeat(200_000)]
}

#[tokio::test]
async fn a_description_is_as_short_as_aws_promises() {
    let key = KeyArn::parse(MRK).unwrap();
    let replicas = |count: usize| -> Vec<Value> {
        (0..count).map(|at| json!({"Arn": MRK.replace("eu-central-1", &format!("eu-x-{at}"))})).collect()
    };
    let good = json!({
        "KeyId": "mrk-1", "Arn": MRK, "KeyState": "Enabled", "CurrentKeyMaterialId": ID,
        "MultiRegionConfiguration": {
            "MultiRegionKeyType": "PRIMARY", "PrimaryKey": {"Arn": MRK}, "ReplicaKeys": replicas(64)
        }
    });
    let described = async |metadata: &Value| {
        let kms = answering(&json!({"KeyMetadata": metadata})).await;
        kms.describe(&key, &LeaseGuard::new(Instant::now(), LONG)).await
    };
    let of_good = described(&good).await.unwrap();
    assert_eq!((of_good.regions.unwrap().replicas.len(), of_good.current_material.as_deref()), (64, Some(ID)));

    let (long, line) = (json!("x".repeat(257)), json!("Enabled\n"));
    let other = json!({"Arn": MRK.replace("mrk-0a", "mrk-0b")});
    let ids = no_ids().map(|id| ("/CurrentKeyMaterialId", json!(id)));
    let bad = [
        ("/KeyState", long.clone()),
        ("/KeyState", line),
        ("/Arn", long),
        ("/MultiRegionConfiguration/ReplicaKeys", json!(replicas(65))),
        ("/MultiRegionConfiguration/ReplicaKeys/7", other.clone()),
        ("/MultiRegionConfiguration/PrimaryKey", other),
        ("/MultiRegionConfiguration/PrimaryKey", json!({"Arn": "x".repeat(200_000)})),
    ];
    for (place, value) in bad.into_iter().chain(ids) {
        let mut metadata = good.clone();
        *metadata.pointer_mut(place).unwrap() = value;
        let error = described(&metadata).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Incomplete, "{place}: {error}");
        assert!(error.to_string().len() < 200, "{place}");
    }
    let mut metadata = good;
    metadata["SigningAlgorithms"] = json!(vec!["RSASSA_PSS_SHA_256"; 65]);
    assert_eq!(described(&metadata).await.unwrap_err().kind, ErrorKind::Incomplete);
}

#[tokio::test]
async fn materials_are_named_by_ids_and_are_not_without_number() {
    let key = KeyArn::parse(ARN).unwrap();
    let listed = async |ids: &[&str]| {
        let entry = |id: &&str| json!({"KeyMaterialId": id, "KeyMaterialState": "CURRENT", "ImportState": "IMPORTED"});
        let kms = answering(&json!({"Rotations": ids.iter().map(entry).collect::<Vec<_>>(), "Truncated": false})).await;
        kms.materials(&key, &LeaseGuard::new(Instant::now(), LONG)).await
    };
    assert_eq!(listed(&[ID; 256]).await.unwrap().len(), 256);
    assert_eq!(listed(&[ID; 257]).await.unwrap_err().kind, ErrorKind::Incomplete);
    for id in no_ids() {
        assert_eq!(listed(&[&id]).await.unwrap_err().kind, ErrorKind::Incomplete);
        let kms = answering(&json!({"KeyId": ARN, "KeyMaterialId": id})).await;
        let imported = import(&kms, LONG).await;
        let deleted = kms.delete(&key, None, &LeaseGuard::new(Instant::now(), LONG)).await.unwrap_err();
        for error in [imported, deleted] {
            assert_eq!(error.kind, ErrorKind::Incomplete);
            assert!(error.kind.may_have_taken_effect() && error.to_string().len() < 200);
        }
    }
}

#[tokio::test]
async fn what_aws_says_stays_in_its_line() {
    let answer = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/x-amz-json-1.1\r\nconnection: close\r\n\r\n\
                  {\"__type\":\"ValidationException\",\"message\":\"no\\n2026-11-28 job succeeded\\u001b[2J\"}";
    let error = import(&kms(&server(Some(answer)).await, Some(credentials())), LONG).await;
    assert_eq!(error.message, "no 2026-11-28 job succeeded [2J");
}

#[tokio::test]
async fn without_credentials_nothing_leaves() {
    let error = import(&kms(&server(None).await, None), LONG).await;
    assert_eq!(error.kind, ErrorKind::Credentials, "{error:?}");
}

#[tokio::test]
async fn a_lease_that_does_not_outlive_the_call_drops_it() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let error = import(&kms(&endpoint, Some(credentials())), TIMEOUT / 2).await;
    assert_eq!(error.kind, ErrorKind::Dropped, "{error:?}");
    let connected = tokio::time::timeout(Duration::from_millis(50), listener.accept()).await;
    assert!(connected.is_err(), "a dropped call must not even connect");
}
