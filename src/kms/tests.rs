//! What the real SDK makes of a server's behaviour, and what we make of that.

use super::*;
use aws_config::retry::RetryConfig as SharedRetry;
use aws_credential_types::Credentials;
use aws_sdk_kms::config::SharedCredentialsProvider;
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
