//! The commands, as a person or a script runs them.

use crate::support::broker::{JOBS, Message};
use crate::support::db::TestDb;
use crate::support::variable;
use crate::support::world::{Ran, Tuning, World, request};
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use url::Url;

/// What `submit` publishes for a request.
fn submitted(request: &Value) -> Message {
    Message {
        body: request.to_string().into_bytes(),
        content_type: Some("application/json".into()),
        message_id: request["id"].as_str().map(str::to_owned),
        ..Message::default()
    }
}

#[track_caller]
fn ended(ran: &Ran, code: i32, says: &str) {
    assert!(
        ran.code == Some(code) && format!("{}{}", ran.out, ran.err).contains(says),
        "expected {code}, {says}: {ran:?}"
    );
}

#[tokio::test]
async fn a_request_from_flags_is_published_and_followed() {
    let mut world = World::with_worker(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    let ahead = (world.now().await + time::Duration::days(30)).replace_nanosecond(0).unwrap();
    let ahead = ahead.format(&time::format_description::well_known::Rfc3339).unwrap();
    let flags = ["--id", "f1", "--key", &arn, "--source-key", "payroll", "--tier", "local", "--batch", "b"];
    let ran = world.run(&[&["submit"], &flags[..], &["--valid-to", &ahead, "--wait", "--json"]].concat()).await;
    ended(&ran, 0, "succeeded");
    assert_eq!(ran.json(), json!([{"state": "succeeded", "code": "", "count": 1}]));
    let more = json!({"source_key_identifier": "payroll", "source_key_tier": "local", "batch": "b",
                      "key_expiration": true, "valid_to": ahead});
    world.note_published([submitted(&request("f1", &arn, more))]);
    // Without waiting, and without an id: one is made.
    let ran = world.run(&["submit", "--key", &arn, "--source-key", "payroll", "--json"]).await;
    ended(&ran, 0, "published");
    let id = ran.json()["id"].as_str().unwrap().to_owned();
    world.note_published([submitted(&request(&id, &arn, json!({"source_key_identifier": "payroll"})))]);
    let ran = world.run(&["jobs", "wait", &id]).await;
    ended(&ran, 0, "succeeded");
    world.finish().await;
}

#[tokio::test]
async fn a_file_of_requests_is_followed_to_its_end() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arns = world.fake.seed(json!({"count": 4})).await;
    let requests = [
        request("ok", &arns[0], json!({})),
        request("fails", &arns[1], json!({"source_key_identifier": "no-such-key"})),
        request("refused", "nonsense", json!({})),
    ];
    world.write("requests.jsonl", &requests.each_ref().map(Value::to_string).join("\n\n"));
    let ran = world.run(&["submit", "--file", "requests.jsonl", "--wait", "--json"]).await;
    ended(&ran, 3, "source_key_unknown");
    assert_eq!(ran.json().as_array().unwrap().len(), 3, "{ran:?}");
    // From standard input; the same again does no harm.
    let ran = world.run_with(&["submit", "--file", "-", "--wait"], &[], &requests[0].to_string()).await;
    ended(&ran, 0, "succeeded");
    world.note_published(requests.iter().map(submitted));
    let long = format!("\n{}", json!({"id": "x".repeat(300)}));
    for (input, says) in [
        ("{\"id\":\"x\"", "line 1"),
        ("[]", "not a JSON object"),
        ("{\"id\":7}", "expected a string"),
        ("\n{\"id\":\"white space\"}", "line 2: id: expected 1 to 128"),
        (&long, "line 2: id: expected 1 to 128"),
    ] {
        let ran = world.run_with(&["submit", "--file", "-", "--wait"], &[], input).await;
        ended(&ran, 1, says);
    }
    for id in ["", "white space", &"x".repeat(129)] {
        ended(&world.run(&["submit", "--key", &arns[0], "--id", id, "--wait"]).await, 2, "expected 1 to 128");
    }
    // Too long: the worker is held.
    world.fake.fault("DescribeKey", &arns[2], Some(1), json!({"kind": "hold"})).await;
    let ran = world.run(&["submit", "--id", "slow", "--key", &arns[2], "--wait", "--timeout", "1s"]).await;
    ended(&ran, 4, "not ended");
    world.note_published([submitted(&request("slow", &arns[2], json!({})))]);
    world.fake.release(&arns[2]).await;
    ended(&world.run(&["jobs", "wait", "slow", "ok"]).await, 0, "succeeded");
    let ran = world.run(&["jobs", "wait", "fails"]).await;
    ended(&ran, 3, "source_key_unknown");
    ended(&ran, 3, "fails: ");
    ended(&world.run(&["submit", "--file", "no-such-file"]).await, 1, "no-such-file");
    ended(&world.run(&["submit"]).await, 2, "--key");
    world.finish().await;
}

/// A way to the broker that loses everything once publisher confirms are switched on: to the client it looks like a
/// broker that has stopped reading.
async fn deaf_broker(url: &Url) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    const CONFIRM_SELECT: [u8; 4] = [0, 85, 0, 10];
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut through = url.clone();
    through.set_port(Some(listener.local_addr().unwrap().port())).unwrap();
    let broker = (url.host_str().unwrap().to_owned(), url.port().unwrap());
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.unwrap();
        let (mut from_broker, mut to_broker) = tokio::net::TcpStream::connect(broker).await.unwrap().into_split();
        let (mut from_client, mut to_client) = client.into_split();
        tokio::spawn(async move { tokio::io::copy(&mut from_broker, &mut to_client).await });
        let (mut is_deaf, mut bytes) = (false, [0; 4096]);
        while let Ok(length @ 1..) = from_client.read(&mut bytes).await {
            if !is_deaf {
                to_broker.write_all(&bytes[..length]).await.unwrap();
            }
            is_deaf |= bytes[..length].windows(4).any(|window| window == CONFIRM_SELECT);
        }
    });
    through.to_string()
}

#[tokio::test]
async fn a_broker_that_takes_nothing_is_not_waited_for_without_end() {
    let world = World::new(Tuning::default()).await;
    let deaf = deaf_broker(&world.vhost.url().parse().unwrap()).await;
    let settings = [("KEYFERRY_RABBITMQ__URL", deaf.as_str()), ("KEYFERRY_RABBITMQ__CONNECT_TIMEOUT_MS", "1500")];
    let ran = world.run_with(&["submit", "--key", "x"], &settings, "").await;
    ended(&ran, 1, "0 requests were published, and up to 1 more may have been, before this: RabbitMQ did not answer");
    assert_eq!(world.vhost.ready(JOBS).await, 0);
}

#[tokio::test]
async fn jobs_are_listed_and_shown() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arns = world.fake.seed(json!({"count": 2})).await;
    world.publish(request("one", &arns[0], json!({"batch": "night"}))).await;
    world.publish(request("two", &arns[1], json!({"source_key_identifier": "no-such-key"}))).await;
    world.publish(request("three", "nonsense", json!({}))).await;
    let one = world.succeeded("one").await;
    world.failed("two", "source_key_unknown").await;
    world.refused(1).await;
    let listed = |ran: &Ran| -> Vec<String> {
        let rows = ran.json();
        rows.as_array().unwrap().iter().map(|job| job["request_id"].as_str().unwrap().to_owned()).collect()
    };
    let all = world.run(&["jobs", "list", "--json"]).await;
    assert_eq!(listed(&all), ["two", "one"], "newest first");
    for (flags, expected) in [
        (["--state", "failed"], "two"),
        (["--batch", "night"], "one"),
        (["--key", arns[0].as_str()], "one"),
        (["--limit", "1"], "two"),
    ] {
        let ran = world.run(&[&["jobs", "list", "--json"], &flags[..]].concat()).await;
        assert_eq!(listed(&ran), [expected], "{flags:?}");
    }
    let before = all.json()[0]["id"].as_str().unwrap().to_owned();
    assert_eq!(listed(&world.run(&["jobs", "list", "--json", "--before", &before]).await), ["one"]);
    ended(&world.run(&["jobs", "list"]).await, 0, "REQUEST");
    for id in ["one", &one.id.to_string()] {
        let shown = world.run(&["jobs", "show", id, "--json"]).await;
        ended(&shown, 0, "");
        assert_eq!(shown.json()[0]["result"], one.result.clone().unwrap());
        assert_eq!(shown.json()[0]["sequence"], 1);
    }
    let refused = world.run(&["jobs", "show", "three", "--json"]).await;
    assert_eq!(refused.json()[0]["error"]["code"], "invalid_arn");
    assert_eq!(refused.json()[0]["state"], "rejected");
    let id = refused.json()[0]["id"].as_str().unwrap().to_owned();
    ended(&world.run(&["jobs", "show", &id]).await, 0, "invalid_arn");
    ended(&world.run(&["jobs", "wait", &id, "three", "one", "one"]).await, 3, "invalid_arn");
    ended(&world.run(&["jobs", "show", "four"]).await, 1, "no job and no refusal");
    ended(&world.run(&["jobs", "list", "--key", "four"]).await, 1, "no job ever was for the KMS key four");
    // In an envelope, ids are the source's own.
    let envelope = json!({"specversion": "1.0", "source": "/orders", "type": "t", "id": "four",
                          "data": {"key": arns[0]}});
    let content_type = Some("application/cloudevents+json".into());
    world.send(Message { body: envelope.to_string().into_bytes(), content_type, ..Message::default() }).await;
    world.ended("four").await;
    ended(&world.run(&["jobs", "show", "four"]).await, 1, "--source");
    ended(&world.run(&["jobs", "show", "four", "--source", "/orders"]).await, 0, "four");
    ended(&world.run(&["jobs", "wait", "four", "--source", "/orders"]).await, 3, "source_key_required");
    world.finish().await;
}

#[tokio::test]
async fn the_topology_is_compared_in_depth() {
    let world = World::new(Tuning::default()).await;
    ended(&world.run(&["topology", "check"]).await, 0, "as it should be");
    // The kind of a queue is not seen by a passive declaration.
    world.vhost.delete_queue(JOBS).await;
    let missing = world.run(&["topology", "check", "--json"]).await;
    ended(&missing, 1, JOBS);
    assert_eq!(missing.json()[0]["problem"], "is missing", "{missing:?}");
    world.vhost.declare_classic(JOBS).await;
    let classic = world.run(&["topology", "check"]).await;
    ended(&classic, 1, JOBS);
    assert!(classic.out.contains("quorum"), "{classic:?}");
    // Applying does not hide it.
    ended(&world.run(&["topology", "apply"]).await, 1, "quorum");
    world.vhost.delete_queue(JOBS).await;
    ended(&world.run(&["topology", "apply"]).await, 0, "as it should be");
    ended(&world.run(&["topology", "apply"]).await, 0, "as it should be");
    // Names that only the settings have.
    let own = [("KEYFERRY_RABBITMQ__QUEUE", "own.jobs"), ("KEYFERRY_RABBITMQ__EXCHANGE", "own.events")];
    let checked = world.run_with(&["topology", "check", "--json"], &own, "").await;
    let missing = |kind: &str, name: &str| json!({"kind": kind, "name": name, "problem": "is missing"});
    assert_eq!(checked.json(), json!([missing("queue", "own.jobs"), missing("exchange", "own.events")]));
    let applied = world.run_with(&["topology", "apply"], &own, "").await;
    ended(&applied, 1, "queue own.jobs: is missing");
    assert!(applied.err.contains("only the default topology is made") && applied.err.contains("own.events"));
    world.vhost.declare_classic("own.jobs").await;
    ended(&world.run_with(&["topology", "check"], &own[..1], "").await, 0, "as it should be");
    let wrong = [("KEYFERRY_RABBITMQ__API_URL", "http://guest:wrong@127.0.0.1:1")];
    let unreachable = world.run_with(&["topology", "check"], &wrong, "").await;
    ended(&unreachable, 1, "does not answer");
    assert!(!unreachable.err.contains("wrong"), "{unreachable:?}");
    ended(&world.run(&["submit", "--key", "x", "--id", "nobody"]).await, 0, "published");
    world.vhost.delete_queue(JOBS).await;
    ended(&world.run(&["submit", "--key", "x"]).await, 1, "topology apply");
}

#[tokio::test]
async fn migrations_run_once_however_often_and_at_once() {
    let world = World::new(Tuning::default()).await;
    let empty = TestDb::create_empty().await;
    let (owner, worker) = (empty.owner_url(), empty.worker_url());
    let urls = [("KEYFERRY_DATABASE__OWNER_URL", owner.as_str()), ("KEYFERRY_DATABASE__URL", worker.as_str())];
    ended(&world.run_with(&["serve"], &urls, "").await, 1, "keyferry migrate");
    let runs = futures_util::future::join_all((0..4).map(|_| world.run_with(&["migrate", "--json"], &urls, ""))).await;
    let mut applied = 0;
    for ran in &runs {
        ended(ran, 0, "version");
        applied += usize::from(!ran.json()["applied"].as_array().unwrap().is_empty());
    }
    assert_eq!(applied, 1, "{runs:?}");
    ended(&world.run_with(&["migrate"], &urls, "").await, 0, "up to date");
    // The worker's role is no owner.
    let not_owner = [("KEYFERRY_DATABASE__OWNER_URL", worker.as_str())];
    ended(&world.run_with(&["migrate"], &not_owner, "").await, 1, "permission denied");
}

#[tokio::test]
async fn what_a_worker_cannot_start_with_is_named() {
    let world = World::new(Tuning::default()).await;
    let settings = std::fs::read_to_string(world.path("keyferry.toml")).unwrap();
    let mode = |mode: u32| std::fs::set_permissions(world.path("kek"), PermissionsExt::from_mode(mode)).unwrap();
    mode(0o640);
    let readable = world.run(&["config", "check"]).await;
    ended(&readable, 0, "complete");
    assert!(readable.err.contains("mode 640"), "{readable:?}");
    ended(&world.run(&["keys", "create", "--name", "by-all"]).await, 0, "mode 640");
    mode(0o600);
    let ran = world.run(&["config", "check"]).await;
    ended(&ran, 0, "complete");
    assert_eq!(ran.err, "");
    // The first start binds the database to a key-encryption key.
    ended(&world.run(&["keys", "create", "--name", "k"]).await, 0, "k");
    world.write("keyferry.toml", &settings.replace("policy = \"allow-all\"", ""));
    ended(&world.run(&["serve"]).await, 2, "policy");
    ended(&world.run(&["config", "check"]).await, 2, "policy");
    world.write("keyferry.toml", &settings.replace("kek_file", "# kek_file"));
    ended(&world.run(&["serve"]).await, 2, "keys.kek_file");
    let other = "11".repeat(32);
    let wrong = [("KEYFERRY_KEYS__KEK", other.as_str())];
    let refused = world.run_with(&["serve"], &wrong, "").await;
    ended(&refused, 1, "not the one that this database was sealed under");
    assert!(!format!("{refused:?}").contains(&other));
    ended(&world.run_with(&["serve"], &[("KEYFERRY_KEYS__KEK", "short")], "").await, 2, "32 bytes");
    world.write("keyferry.toml", &settings.replace(&world.path("kek").display().to_string(), "/no/such/file"));
    ended(&world.run(&["serve"]).await, 2, "/no/such/file");
    world.write("keyferry.toml", &settings.replace("lease_ms = 30000", "lease_ms = 1"));
    ended(&world.run(&["serve"]).await, 2, "worker.lease_ms");
    world.write("keyferry.toml", &format!("colour = 1\n{settings}"));
    ended(&world.run(&["serve"]).await, 2, "colour");
    world.write("keyferry.toml", &settings);
    let nobody = [("KEYFERRY_DATABASE__URL", "postgres://u:p4ssw0rd@127.0.0.1:1/d")];
    let unreachable = world.run_with(&["serve"], &nobody, "").await;
    ended(&unreachable, 1, "Postgres is not available");
    assert!(!unreachable.err.contains("p4ssw0rd"));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    ended(&world.run_with(&["serve"], &[("KEYFERRY_ADMIN__LISTEN", &address)], "").await, 1, "admin.listen");
}

#[tokio::test]
async fn settings_are_shown_without_their_secrets() {
    let world = World::new(Tuning::default()).await;
    let amqp: Url = variable("KEYFERRY_TEST_AMQP").parse().unwrap();
    let kek = "0123456789abcdef".repeat(4);
    for arguments in [&["config", "show"][..], &["config", "show", "--json"]] {
        let shown = world.run_with(arguments, &[("KEYFERRY_KEYS__KEK", &kek)], "").await;
        ended(&shown, 0, "(set)");
        let settings = shown.json();
        assert_eq!(settings["rabbitmq"]["queue"], JOBS);
        assert_eq!(settings["worker"]["concurrency"], 16);
        for secret in [
            variable("KEYFERRY_TEST_WORKER_PASSWORD"),
            variable("KEYFERRY_TEST_OWNER_PASSWORD"),
            amqp.password().unwrap().to_owned(),
            kek.clone(),
        ] {
            assert!(!shown.out.contains(&secret) && !shown.err.contains(&secret), "{shown:?}");
        }
    }
}
