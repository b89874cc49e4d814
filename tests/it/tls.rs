//! RabbitMQ over TLS that looks at both sides' certificates: who is let in, who is not, and what is said about it.

use crate::support::broker::{Message, Vhost};
use crate::support::kmip::Line;
use crate::support::world::{Tuning, World, request};
use crate::support::{eventually, variable};
use keyferry::amqp::{Broker, SessionError};
use keyferry::config::{ConfigError, RabbitMq};
use serde_json::json;
use std::io::{Read as _, Write as _};
use std::net::TcpListener as StdListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;
use url::Url;

/// A file of the broker's certificates.
fn file(name: &str) -> PathBuf {
    PathBuf::from(variable("KEYFERRY_TEST_RABBITMQ_TLS_DIR")).join(name)
}

/// The URL of a virtual host over TLS, by way of an address.
fn url_by(plain: &str, address: &str) -> Url {
    let mut url: Url = plain.replacen("amqp:", "amqps:", 1).parse().unwrap();
    let (host, port) = address.rsplit_once(':').unwrap();
    url.set_host(Some(host)).unwrap();
    url.set_port(Some(port.parse().unwrap())).unwrap();
    url
}

fn url(plain: &str) -> Url {
    url_by(plain, &format!("127.0.0.1:{}", variable("KEYFERRY_TEST_RABBITMQ_TLS_PORT")))
}

/// A login by certificate.
fn external(mut url: Url) -> Url {
    url.set_username("").unwrap();
    url.set_password(None).unwrap();
    url.set_query(Some("auth_mechanism=external"));
    url
}

/// Settings with the client certificate of that name.
fn settings(client: &str) -> RabbitMq {
    RabbitMq {
        ca_file: Some(file("ca.crt")),
        cert_file: Some(file(&format!("{client}.crt"))),
        key_file: Some(file(&format!("{client}.key"))),
        ..RabbitMq::default()
    }
}

async fn refused(settings: RabbitMq, url: &Url) -> SessionError {
    Broker::new(&settings, url.as_str()).unwrap().connect("tests").await.expect_err("nobody should be let in")
}

/// The lines of `[rabbitmq]` for these settings.
fn lines(settings: &RabbitMq, url: &Url) -> String {
    let files = [("ca_file", &settings.ca_file), ("cert_file", &settings.cert_file), ("key_file", &settings.key_file)];
    let files =
        files.into_iter().filter_map(|(name, path)| Some(format!("{name} = \"{}\"\n", path.as_ref()?.display())));
    format!("url = \"{url}\"\n{}", files.collect::<String>())
}

/// Puts these lines in the place of the world's own AMQP URL.
fn reconfigure(world: &World, lines: &str) {
    let own = std::fs::read_to_string(world.path("settings.toml")).unwrap();
    let plain = format!("url = \"{}\"\n", world.vhost.url());
    assert!(own.contains(&plain));
    world.write("keyferry.toml", &own.replace(&plain, &format!("{lines}\n")));
}

#[tokio::test]
async fn a_job_passes_over_tls_with_the_certificate_as_the_login() {
    let mut world = World::new(Tuning::default()).await;
    let url = external(url(&world.vhost.url()));
    reconfigure(&world, &lines(&settings("client"), &url));
    world.serve().await;
    let arn = world.fake.key().await;
    let id = "by-certificate";
    let submitted = world.run(&["submit", "--key", &arn, "--id", id, "--wait"]).await;
    assert_eq!(submitted.code, Some(0), "{submitted:?}");
    let body = request(id, &arn, json!({})).to_string().into_bytes();
    world.note_published([Message { body, message_id: Some(id.into()), ..Message::default() }]);
    assert_eq!(world.events_of(id).await.len(), 1);
    for role in ["ingress", "events"] {
        let labels = format!("{{role=\"{role}\",transport=\"rabbitmq\"}}");
        assert!(world.workers[0].metric(&format!("keyferry_broker_sessions_total{labels}")).await > 0.5, "{role}");
        assert!(
            world.workers[0].metric(&format!("keyferry_broker_sessions_broken_total{labels}")).await < 0.5,
            "{role}"
        );
    }
    world.finish().await;
}

#[tokio::test]
async fn sessions_that_are_cut_in_the_middle_of_a_job_are_made_again() {
    let mut world = World::new(Tuning::default()).await;
    let line = Line::to(format!("127.0.0.1:{}", variable("KEYFERRY_TEST_RABBITMQ_TLS_PORT"))).await;
    reconfigure(&world, &lines(&settings("client"), &url_by(&world.vhost.url(), &line.address)));
    world.serve().await;
    let arn = world.fake.key().await;
    world.fake.fault("ImportKeyMaterial", &arn, Some(1), json!({"kind": "hold"})).await;
    world.publish(request("r1", &arn, json!({}))).await;
    world.fake.held(1, "ImportKeyMaterial", &arn).await;
    line.cut();
    eventually("it is no longer ready", || async {
        let (status, _) = world.workers[0].ready().await?;
        (status == 503).then_some(())
    })
    .await;
    world.fake.release(&arn).await;
    world.succeeded("r1").await;
    line.mend();
    world.until("its event is told", "select count(*) from outbox", 0).await;
    world.publish(request("r2", &world.fake.key().await, json!({}))).await;
    world.succeeded("r2").await;
    for role in ["ingress", "events"] {
        let labels = format!("{{role=\"{role}\",transport=\"rabbitmq\"}}");
        let broken = world.workers[0].metric(&format!("keyferry_broker_sessions_broken_total{labels}")).await;
        assert!((0.5..1.5).contains(&broken), "{role}: {broken}");
    }
    let log = world.workers[0].log();
    assert!(log.contains("the session with the broker ended") && log.contains("events are not being published"));
    world.finish().await;
}

#[tokio::test]
async fn nobody_else_is_let_in_and_nobody_else_is_trusted() {
    let vhost = Vhost::create().await;
    let url = url(&vhost.url());
    assert!(Broker::new(&settings("client"), url.as_str()).unwrap().connect("tests").await.is_ok());
    let wrong_ca = RabbitMq { ca_file: Some(file("wrong-ca.crt")), ..settings("client") };
    // Their authority is in no system's store.
    let systems = RabbitMq { ca_file: None, ..settings("client") };
    let misnamed = RabbitMq { server_name: Some("mq.example.com".into()), ..settings("client") };
    for (settings, words) in [(wrong_ca, "UnknownIssuer"), (systems, "UnknownIssuer"), (misnamed, "not valid for name")]
    {
        let error = refused(settings, &url).await;
        let text = error.to_string();
        assert!(matches!(error, SessionError::Tls { .. }) && text.contains(words), "{text}");
        assert!(text.contains("rabbitmq.ca_file") && text.contains("rabbitmq.server_name"), "{text}");
    }
    let without = RabbitMq { cert_file: None, key_file: None, ..settings("client") };
    for settings in [without, settings("expired"), settings("stranger")] {
        let error = refused(settings, &url).await;
        let text = error.to_string();
        let is_told = matches!(error, SessionError::Tls { .. } | SessionError::Dropped(_));
        assert!(is_told && text.contains("rabbitmq.cert_file"), "{text}");
    }
    // Its certificate is taken, but the broker knows no user of that name.
    let error = refused(settings("other"), &external(url.clone())).await.to_string();
    assert!(error.contains("ACCESS_REFUSED") || error.contains("ACCESS-REFUSED"), "{error}");
    let named = RabbitMq { server_name: Some("localhost".into()), ..settings("client") };
    assert!(Broker::new(&named, url.as_str()).unwrap().connect("tests").await.is_ok());
}

#[tokio::test]
async fn the_management_api_is_trusted_by_the_same_authority() {
    let world = World::without_topology(Tuning::default()).await;
    let mut api: Url = variable("KEYFERRY_TEST_RABBITMQ_API").parse().unwrap();
    let port = variable("KEYFERRY_TEST_RABBITMQ_API_TLS_PORT");
    api.set_port(Some(port.parse().unwrap())).unwrap();
    let api = api.as_str().replacen("http:", "https:", 1);
    let variables = [("KEYFERRY_RABBITMQ__API_URL", api.as_str())];
    reconfigure(&world, &lines(&settings("client"), &url(&world.vhost.url())));
    let applied = world.run_with(&["topology", "apply"], &variables, "").await;
    assert_eq!(applied.code, Some(0), "{applied:?}");
    let wrong = RabbitMq { ca_file: Some(file("wrong-ca.crt")), ..settings("client") };
    reconfigure(&world, &lines(&wrong, &url(&world.vhost.url())));
    let checked = world.run_with(&["topology", "check"], &variables, "").await;
    assert_eq!(checked.code, Some(1), "{checked:?}");
    assert!(checked.err.contains("UnknownIssuer"), "{checked:?}");
}

/// Nothing is sent in the clear to a server that speaks no TLS, and the attempt ends with its socket.
#[tokio::test]
async fn a_server_without_tls_is_told_nothing() {
    for answer in [b"AMQP\0\0\x09\x01".as_slice(), b""] {
        let listener = StdListener::bind("127.0.0.1:0").unwrap();
        let url = url_by("amqp://somebody:hunter2@h/v", &listener.local_addr().unwrap().to_string());
        let heard = tokio::task::spawn_blocking(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            stream.write_all(answer).unwrap();
            let mut heard = Vec::new();
            // The end, or a reset: either way nobody holds the other end any more.
            let mut part = [0; 4096];
            while let Ok(count @ 1..) = stream.read(&mut part) {
                heard.extend(&part[..count]);
            }
            heard
        });
        let settings = RabbitMq { connect_timeout_ms: 1_000, ..settings("client") };
        let error = refused(settings, &url).await;
        if answer.is_empty() {
            assert!(matches!(error, SessionError::Timeout(_)), "{error}");
        } else {
            assert!(error.to_string().contains("does not speak TLS"), "{error}");
        }
        let heard = heard.await.unwrap();
        // A handshake record that begins with ClientHello (RFC 8446, 5.1 and 4).
        assert_eq!((heard[0], heard[1], heard[5]), (22, 3, 1), "{heard:?}");
        let has = |word: &[u8]| heard.windows(word.len()).any(|part| part == word);
        assert!(!has(b"hunter2") && !has(b"somebody") && !has(b"AMQP"));
    }
}

/// A broker that takes connections and says nothing costs neither threads nor sockets.
#[tokio::test]
async fn a_silent_broker_costs_nothing_that_stays() {
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
    let url = format!("amqp://{}/v", listener.local_addr().unwrap());
    let settings = RabbitMq { connect_timeout_ms: 100, ..RabbitMq::default() };
    let broker = Broker::new(&settings, &url).unwrap();
    let io_loops = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.filter(|name| name.trim() == "lapin-io-loop").count()
    };
    for _ in 0..5 {
        let error = broker.connect("tests").await.err().unwrap();
        assert!(matches!(error, SessionError::Timeout(_)), "{error}");
    }
    eventually("lapin's threads end", || async { (io_loops() == 0).then_some(()) }).await;
}

#[tokio::test]
async fn the_password_comes_from_a_file_that_may_change() {
    let vhost = Vhost::create().await;
    let plain: Url = vhost.url().parse().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("password");
    std::fs::write(&path, format!("{}\n", plain.password().unwrap())).unwrap();
    let mut url = plain.clone();
    url.set_password(None).unwrap();
    let settings = RabbitMq { password_file: Some(path.clone()), ..RabbitMq::default() };
    let broker = Broker::new(&settings, url.as_str()).unwrap();
    assert!(broker.connect("tests").await.is_ok());
    std::fs::write(&path, "another").unwrap();
    let error = broker.connect("tests").await.err().unwrap().to_string();
    assert!(error.contains("ACCESS_REFUSED") || error.contains("ACCESS-REFUSED"), "{error}");
    std::fs::remove_file(&path).unwrap();
    let error = broker.connect("tests").await.err().unwrap().to_string();
    assert!(error.contains("rabbitmq.password_file"), "{error}");
    std::fs::write(&path, plain.password().unwrap()).unwrap();
    assert!(broker.connect("tests").await.is_ok());
    assert!(!format!("{broker:?}").contains(plain.password().unwrap()));
}

#[test]
fn a_wrong_setting_is_named_before_anything_is_connected() {
    let directory = tempfile::tempdir().unwrap();
    let written = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        Some(path)
    };
    let password = written("password", "p");
    let none = RabbitMq::default;
    let with_password = || RabbitMq { password_file: password.clone(), ..none() };
    let cases: Vec<(&str, RabbitMq, &str)> = vec![
        ("mq:5672", none(), "rabbitmq.url"),
        ("http://h", none(), "rabbitmq.url"),
        ("amqps://h?cacertfile=/ca.pem", none(), "rabbitmq.url"),
        ("amqps://h?auth_mechanism=magic", none(), "auth_mechanism"),
        ("amqp://h", settings("client"), "amqps"),
        ("amqp://h", RabbitMq { server_name: Some("h".into()), ..none() }, "rabbitmq.server_name"),
        ("amqps://h", RabbitMq { server_name: Some("a b".into()), ..settings("client") }, "rabbitmq.server_name"),
        ("amqps://h", RabbitMq { key_file: None, ..settings("client") }, "rabbitmq.key_file"),
        ("amqps://h", RabbitMq { cert_file: None, ..settings("client") }, "rabbitmq.cert_file"),
        ("amqps://h", RabbitMq { ca_file: Some("/no/ca.pem".into()), ..none() }, "rabbitmq.ca_file"),
        ("amqps://h", RabbitMq { ca_file: written("ca", "no certificate"), ..none() }, "rabbitmq.ca_file"),
        ("amqps://h", RabbitMq { cert_file: written("c", ""), ..settings("client") }, "rabbitmq.cert_file"),
        ("amqps://h", RabbitMq { key_file: written("k", ""), ..settings("client") }, "rabbitmq.key_file"),
        // Another's key.
        ("amqps://h", RabbitMq { key_file: Some(file("other.key")), ..settings("client") }, "rabbitmq.key_file"),
        ("amqp://h?auth_mechanism=external", none(), "rabbitmq.url"),
        ("amqps://h?auth_mechanism=external", none(), "rabbitmq.cert_file"),
        (
            "amqps://h?auth_mechanism=external",
            RabbitMq { password_file: password.clone(), ..settings("client") },
            "rabbitmq.password_file",
        ),
        ("amqp://u:p@h", with_password(), "rabbitmq.password_file"),
        ("amqp://h", with_password(), "rabbitmq.password_file"),
        ("amqp://u@h", RabbitMq { password_file: written("empty", "\n"), ..none() }, "rabbitmq.password_file"),
        ("amqp://u@h", RabbitMq { password_file: Some("/no/password".into()), ..none() }, "rabbitmq.password_file"),
    ];
    for (url, settings, named) in cases {
        let error: ConfigError = Broker::new(&settings, url).err().unwrap_or_else(|| panic!("{url}: {settings:?}"));
        assert!(error.to_string().contains(named), "{url}: {error}");
    }
    assert!(Broker::new(&with_password(), "amqp://u@h").is_ok());
    let shown = format!("{:?}", Broker::new(&settings("client"), "amqps://u:hunter2@h").unwrap());
    let key = std::fs::read_to_string(file("client.key")).unwrap();
    assert!(!shown.contains("hunter2") && key.lines().all(|line| !shown.contains(line)), "{shown}");
}

#[tokio::test]
async fn a_worker_does_not_start_with_them_and_files_open_to_others_are_told_of() {
    let world = World::new(Tuning::default()).await;
    let url = url(&world.vhost.url());
    reconfigure(&world, &lines(&RabbitMq { ca_file: Some("/no/ca.pem".into()), ..settings("client") }, &url));
    for command in ["serve", "config"] {
        let arguments = [command, "check"];
        let ran = world.run(if command == "serve" { &arguments[..1] } else { &arguments }).await;
        assert_eq!(ran.code, Some(2), "{ran:?}");
        assert!(ran.err.contains("rabbitmq.ca_file"), "{ran:?}");
    }
    world.write("password", "secret");
    let mode = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(world.path("password"), mode).unwrap();
    let plain: Url = world.vhost.url().parse().unwrap();
    let mut bare = plain.clone();
    bare.set_password(None).unwrap();
    reconfigure(&world, &format!("url = \"{bare}\"\npassword_file = \"{}\"", world.path("password").display()));
    let checked = world.run(&["config", "check"]).await;
    assert_eq!(checked.code, Some(0), "{checked:?}");
    assert!(checked.err.contains("rabbitmq.password_file is open to more than its owner"), "{checked:?}");
    assert!(!world.run(&["config", "show"]).await.out.contains("secret"));
}
