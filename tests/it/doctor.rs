//! The doctor: a healthy world is all well, and each fault has its own code.

use crate::support::broker::{DEAD, JOBS, Message, Rights};
use crate::support::db::TestDb;
use crate::support::eventually;
use crate::support::fake::ACCOUNT;
use crate::support::kmip;
use crate::support::sqs::Role;
use crate::support::world::{Carriage, Carrier, Ran, Tuning, World, request};
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use url::Url;

/// Everything that can be configured, so that everything is looked at.
const CARRIAGE: Carriage = Carriage { requests: &[Carrier::RabbitMq, Carrier::Sqs], events: Carrier::RabbitMq };

/// A run of the doctor, and what it found.
struct Report {
    ran: Ran,
    found: Vec<Value>,
}

impl Report {
    /// The one finding with a code.
    #[track_caller]
    fn of(&self, code: &str) -> &Value {
        let with_code: Vec<&Value> = self.found.iter().filter(|finding| finding["code"] == code).collect();
        assert_eq!(with_code.len(), 1, "{code}: {:#?}", self.found);
        with_code[0]
    }

    /// Everything that is neither well nor left out.
    fn troubles(&self) -> Vec<(&str, &str)> {
        let text = |value: &'_ Value| value.as_str().map(str::to_owned).unwrap_or_default();
        let bad = self.found.iter().filter(|finding| !["ok", "skipped"].contains(&&*text(&finding["verdict"])));
        bad.map(|finding| (finding["check"].as_str().unwrap(), finding["code"].as_str().unwrap())).collect()
    }
}

async fn look(world: &World, environment: &[(&str, &str)]) -> Report {
    let ran = world.run_with(&["doctor", "--timeout", "60s", "--json"], environment, "").await;
    let report = ran.json();
    let found = report["checks"].as_array().unwrap().clone();
    let has_failed = found.iter().any(|finding| finding["verdict"] == "failed");
    assert_eq!((ran.code, report["ok"] == true), (Some(i32::from(has_failed)), !has_failed), "{report:#}");
    for finding in &found {
        let is_advised = finding["advice"].as_str().is_some_and(|advice| !advice.is_empty());
        let needs_advice = ["failed", "warning"].contains(&finding["verdict"].as_str().unwrap());
        assert_eq!(is_advised, needs_advice, "{finding:#}");
    }
    Report { ran, found }
}

/// A world as an operator should have it, with a user of the broker who may no more than a worker has to.
async fn healthy(carriage: Carriage) -> (World, crate::support::broker::User) {
    let world = World::over(Tuning::default(), carriage).await;
    let user = world.vhost.user_with("", &Rights::of_a_worker()).await;
    let own = std::fs::read_to_string(world.path("settings.toml")).unwrap();
    let plain = format!("{:?}", world.vhost.url());
    assert!(own.contains(&plain) && own.contains("[database]"));
    // No finding is to be about a machine that has other things to do.
    let own = own.replacen("[database]", "[database]\nconnect_timeout_ms = 30000", 1);
    let own = own.replacen("[rabbitmq]", "[rabbitmq]\nconnect_timeout_ms = 30000", 1);
    let dsm = kmip::section();
    world.write("keyferry.toml", &format!("{}\n{dsm}", own.replacen(&plain, &format!("{:?}", user.url), 1)));
    for file in ["keyferry.toml", "kek"] {
        std::fs::set_permissions(world.path(file), PermissionsExt::from_mode(0o600)).unwrap();
    }
    // Binds the database to the key.
    assert_eq!(world.run(&["keys", "create", "--name", "first"]).await.code, Some(0));
    (world, user)
}

/// Another value of a setting, changed as a URL.
fn changed(url: &str, change: impl Fn(&mut Url)) -> String {
    let mut url: Url = url.parse().unwrap();
    change(&mut url);
    url.into()
}

#[tokio::test]
async fn a_healthy_world_is_all_well_and_is_left_as_it_was() {
    let (world, _user) = healthy(CARRIAGE).await;
    let dump = "select (select count(*) from audit_entry), (select count(*) from fingerprint_key),
                       (select count(*) from policy_load)";
    let before = world.client.query_one(dump, &[]).await.unwrap();
    let report = look(&world, &[]).await;
    assert_eq!(report.troubles(), []);
    let checks: Vec<&str> = report.found.iter().map(|finding| finding["check"].as_str().unwrap()).collect();
    for check in [
        "settings",
        "quota",
        "policy",
        "files",
        "host.memory",
        "host.open_files",
        "host.admin",
        "postgres.connection",
        "postgres.tls",
        "postgres.version",
        "postgres.clock",
        "postgres.schema",
        "postgres.rights",
        "key",
        &format!("aws.{ACCOUNT}.eu-central-1"),
        &format!("aws.{ACCOUNT}.us-east-1"),
        "aws.clock",
        "rabbitmq.connection",
        "rabbitmq.queue",
        "rabbitmq.dead_letter_queue",
        "rabbitmq.exchange",
        "rabbitmq.topology",
        "rabbitmq.user",
        "sqs",
        "dsm.prod",
    ] {
        let of_check = report.found.iter().find(|finding| finding["check"] == check);
        assert_eq!(of_check.map(|finding| &finding["verdict"]), Some(&json!("ok")), "{check}: {checks:?}");
    }
    let after = world.client.query_one(dump, &[]).await.unwrap();
    let counts = |row: &tokio_postgres::Row| [row.get::<_, i64>(0), row.get(1), row.get(2)];
    assert_eq!(counts(&before), counts(&after));
    // For people: a line each, and a count.
    let told = world.run(&["doctor"]).await;
    assert!(told.code == Some(0) && told.out.contains("0 failed, 0 warning"), "{told:?}");
}

#[tokio::test]
async fn faults_of_postgres_are_told_apart() {
    let (world, _user) = healthy(Carriage::RABBITMQ).await;
    let url = world.db.worker_url();
    let empty = TestDb::create_empty().await;
    let unencrypted = changed(&url, |url| url.set_query(Some("sslmode=disable")));
    for (code, value) in [
        ("postgres_password", changed(&url, |url| url.set_password(Some("wr0ng")).unwrap())),
        ("postgres_no_database", changed(&url, |url| url.set_path("no_such_database"))),
        ("postgres_unreachable", changed(&url, |url| url.set_port(Some(1)).unwrap())),
        ("schema_absent", empty.worker_url()),
        ("rights_beyond_need", world.db.owner_url()),
        ("rights_missing", world.db.reader_url()),
        ("postgres_plaintext", unencrypted),
    ] {
        let report = look(&world, &[("KEYFERRY_DATABASE__URL", &value)]).await;
        let is_warning = ["rights_beyond_need", "postgres_plaintext"].contains(&code);
        assert_eq!(report.of(code)["verdict"], if is_warning { "warning" } else { "failed" });
        assert!(!report.ran.out.contains("wr0ng"));
        // The others are looked at all the same.
        assert!(report.found.iter().any(|finding| finding["check"] == "rabbitmq.queue"));
    }
}

#[tokio::test]
async fn faults_of_the_schema_and_its_clock_are_told_apart() {
    let (world, _user) = healthy(Carriage::RABBITMQ).await;
    let other_authority = kmip::file("ca.crt").display().to_string();
    look(&world, &[("KEYFERRY_DATABASE__CA_FILE", &other_authority)]).await.of("postgres_tls");
    world.db.advance(Duration::from_secs(90)).await;
    assert_eq!(look(&world, &[]).await.troubles(), [("postgres.clock", "store_clock_moved")]);
    let oldest = "update clock_offset set ahead = '0'; update schema_tolerance set oldest_binary = 1000000";
    world.client.batch_execute(oldest).await.unwrap();
    assert_eq!(look(&world, &[]).await.troubles(), [("postgres.schema", "binary_too_old")]);
    let newest = "delete from refinery_schema_history
                  where version = (select max(version) from refinery_schema_history)";
    world.client.batch_execute(newest).await.unwrap();
    assert_eq!(look(&world, &[]).await.troubles(), [("postgres.schema", "schema_too_old")]);
}

#[tokio::test]
async fn faults_of_the_brokers_are_told_apart() {
    let (world, user) = healthy(Carriage::RABBITMQ).await;
    let mighty = world.vhost.user("administrator").await;
    for (code, value) in [
        ("rabbitmq_password", changed(&user.url, |url| url.set_password(Some("wr0ng")).unwrap())),
        ("rabbitmq_vhost", changed(&user.url, |url| url.set_path("no-such-vhost"))),
        ("rabbitmq_unreachable", changed(&user.url, |url| url.set_port(Some(1)).unwrap())),
        ("rabbitmq_user_tags", mighty.url.clone()),
    ] {
        let report = look(&world, &[("KEYFERRY_RABBITMQ__URL", &value)]).await;
        report.of(code);
        assert!(!report.ran.out.contains("wr0ng"));
    }
    let api = "http://guest:wr0ng@127.0.0.1:1";
    let report = look(&world, &[("KEYFERRY_RABBITMQ__API_URL", api)]).await;
    assert_eq!(report.troubles(), [("rabbitmq.topology", "rabbitmq_api")]);
    assert!(!report.ran.out.contains("wr0ng"));
}

#[tokio::test]
async fn the_rights_of_the_manual_are_enough_for_the_doctor_and_a_worker_and_without_one_the_doctor_says_so() {
    let (mut world, user) = healthy(Carriage::RABBITMQ).await;
    // A delivery would count against the queue's limit, and lose what the message was published with.
    let waiting = Message { body: b"waits".to_vec(), ..Message::default() };
    world.vhost.publish(&waiting).await;
    assert_eq!(look(&world, &[]).await.troubles(), []);
    let none = || "^$".to_owned();
    for (check, rights, word) in [
        ("rabbitmq.queue", Rights { read: none(), ..Rights::of_a_worker() }, "READ"),
        ("rabbitmq.exchange", Rights { write: none(), ..Rights::of_a_worker() }, "WRITE"),
        ("rabbitmq.queue", Rights { read: format!("^{}$", DEAD.replace('.', r"\.")), ..Rights::all() }, "READ"),
    ] {
        let poor = world.vhost.user_with("", &rights).await;
        let report = look(&world, &[("KEYFERRY_RABBITMQ__URL", &poor.url)]).await;
        assert_eq!(report.troubles(), [(check, "rabbitmq_no_rights")], "{rights:?}");
        let advice = report.of("rabbitmq_no_rights")["advice"].as_str().unwrap().to_owned();
        assert!(advice.contains(&poor.name) && advice.contains(&format!("where {word} has to match")), "{advice}");
    }
    // Nothing was taken, and nothing was published.
    let left = world.vhost.take(JOBS).await;
    assert!(left.len() == 1 && !left[0].redelivered, "{left:?}");
    assert!(world.vhost.take_events().await.is_empty());

    let arn = world.fake.key().await;
    world.serve().await;
    world.publish(request("one", &arn, json!({"source_key_identifier": "first"}))).await;
    world.succeeded("one").await;
    eventually("its event is there", || async { (!world.vhost.take_events().await.is_empty()).then_some(()) }).await;
    assert!(world.workers[0].log().lines().all(|line| !line.contains("ACCESS_REFUSED")));
    drop(user);
}

#[tokio::test]
async fn faults_of_the_topology_are_told_apart() {
    let (world, _user) = healthy(Carriage::RABBITMQ).await;
    let names = [("KEYFERRY_RABBITMQ__QUEUE", "q"), ("KEYFERRY_RABBITMQ__EXCHANGE", "x")];
    let report = look(&world, &names).await;
    for check in ["rabbitmq.queue", "rabbitmq.exchange"] {
        assert!(report.troubles().contains(&(check, "rabbitmq_missing")), "{:?}", report.troubles());
    }
    world.vhost.delete_queue(DEAD).await;
    world.vhost.declare_classic(DEAD).await;
    let report = look(&world, &[]).await;
    assert!(report.troubles().contains(&("rabbitmq.topology", "rabbitmq_topology")), "{:?}", report.troubles());
    assert_eq!(report.troubles().iter().filter(|(check, _)| *check != "rabbitmq.topology").count(), 0);
}

#[tokio::test]
async fn faults_of_sqs_are_told_apart() {
    let (world, _user) = healthy(CARRIAGE).await;
    world.queues.delete(Role::Requests).await;
    look(&world, &[]).await.of("sqs_missing");
    world.queues.make(Role::Requests, json!({})).await;
    assert_eq!(look(&world, &[]).await.of("sqs_no_redrive")["verdict"], "warning");
    look(&world, &[("AWS_ENDPOINT_URL_SQS", "http://127.0.0.1:1")]).await.of("sqs_unreachable");
}

#[tokio::test]
async fn faults_of_aws_are_told_apart() {
    let (mut world, _user) = healthy(Carriage::RABBITMQ).await;
    let targets = |code: &'static str, report: &Report| {
        let found: Vec<&Value> = report.found.iter().filter(|finding| finding["code"] == code).collect();
        assert!(
            found.iter().filter(|finding| finding["check"].as_str().unwrap().starts_with("aws.")).count() == 3,
            "{code}: {:#?}",
            report.found
        );
    };
    targets("aws_unreachable", &look(&world, &[("AWS_ENDPOINT_URL_KMS", "http://127.0.0.1:1")]).await);
    targets("aws_no_credentials", &look(&world, &[("AWS_ACCESS_KEY_ID", ""), ("AWS_SECRET_ACCESS_KEY", "")]).await);
    targets("aws_credentials_refused", &look(&world, &[("AWS_SECRET_ACCESS_KEY", "another")]).await);
    // A key that jobs are about.
    world.serve().await;
    let arn = world.fake.key().await;
    world.publish(request("one", &arn, json!({}))).await;
    world.succeeded("one").await;
    world.workers[0].stop().await;
    let of_key = look(&world, &[]).await;
    assert_eq!(of_key.troubles(), []);
    assert!(of_key.ran.out.contains(&arn), "{}", of_key.ran.out);
    let denied = json!({"kind": "error", "code": "AccessDeniedException", "message": "not \u{1b}[31mallowed"});
    world.fake.fault("DescribeKey", &arn, Some(1), denied).await;
    let report = look(&world, &[]).await;
    assert_eq!(report.of("aws_denied")["verdict"], "failed");
    assert!(!report.ran.out.contains("\\u001b"), "{}", report.ran.out);
    let gone = json!({"kind": "error", "code": "NotFoundException", "message": "no such key"});
    world.fake.fault("DescribeKey", &arn, Some(1), gone).await;
    assert_eq!(look(&world, &[]).await.of("kms_key_gone")["verdict"], "warning");
}

/// A server that answers every request so.
async fn aws_that_says(answer: String) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut request = vec![0; 16 * 1024];
                // The whole of it comes at once: it is small.
                drop(socket.read(&mut request).await);
                drop(socket.write_all(answer.as_bytes()).await);
            });
        }
    });
    format!("http://{address}")
}

#[tokio::test]
async fn a_clock_that_aws_does_not_share_is_told() {
    let (world, _user) = healthy(Carriage::RABBITMQ).await;
    let answer = |date: &str, kind: &str, message: &str| {
        let body = json!({"__type": kind, "message": message}).to_string();
        format!(
            "HTTP/1.1 400 Bad Request\r\nContent-Type: application/x-amz-json-1.1\r\nDate: {date}\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )
    };
    let long_ago = aws_that_says(answer("Thu, 01 Jan 2026 00:00:00 GMT", "NotFoundException", "no such key")).await;
    let report = look(&world, &[("AWS_ENDPOINT_URL_KMS", &long_ago)]).await;
    assert_eq!(report.troubles(), [("aws.clock", "clock_off")]);
    let words = "Signature expired: 20260101T000000Z is now earlier than 20260101T010000Z";
    let refused = aws_that_says(answer("Thu, 01 Jan 2026 00:00:00 GMT", "InvalidSignatureException", words)).await;
    let report = look(&world, &[("AWS_ENDPOINT_URL_KMS", &refused)]).await;
    assert_eq!(report.troubles().iter().filter(|(_, code)| *code == "aws_clock_off").count(), 3);
}

#[tokio::test]
async fn faults_of_settings_and_keys_are_told_apart() {
    let (world, _user) = healthy(Carriage::RABBITMQ).await;
    let settings = std::fs::read_to_string(world.path("keyferry.toml")).unwrap();
    let kek_file = format!("kek_file = \"{}\"", world.path("kek").display());
    world.write("keyferry.toml", &settings.replacen(&kek_file, "", 1));
    for (code, key) in [("kek_wrong", "11".repeat(32)), ("kek_malformed", "sh0rt".to_owned())] {
        let report = look(&world, &[("KEYFERRY_KEYS__KEK", &key)]).await;
        report.of(code);
        assert!(!report.ran.out.contains(&key));
    }
    assert_eq!(look(&world, &[]).await.troubles(), [("key", "setting_missing")]);
    world.write("keyferry.toml", &settings);
    assert_eq!(look(&world, &[("KEYFERRY_LOG__FILTER", "a=b=c")]).await.troubles(), [("settings", "setting_wrong")]);
    look(&world, &[("KEYFERRY_WORKER__LEASE_MS", "1")]).await.of("setting_wrong");
    let many = [("KEYFERRY_DATABASE__URL", ""), ("KEYFERRY_RABBITMQ__URL", "")];
    let missing = look(&world, &many).await;
    assert_eq!(missing.troubles(), [("settings", "setting_missing"), ("settings", "setting_missing")]);
}

#[tokio::test]
async fn faults_of_files_are_told_apart() {
    let (world, _user) = healthy(Carriage::RABBITMQ).await;
    let settings = std::fs::read_to_string(world.path("keyferry.toml")).unwrap();
    world.write("policy.toml", "[principals.a]\nrabbitmq_users = [\"a\"]\n");
    look(&world, &[("KEYFERRY_POLICY", "policy.toml")]).await.of("policy_broken");
    look(&world, &[("KEYFERRY_POLICY", "no-such.toml")]).await.of("file_unreadable");
    std::fs::set_permissions(world.path("kek"), PermissionsExt::from_mode(0o640)).unwrap();
    assert_eq!(look(&world, &[]).await.troubles(), [("files", "file_open_to_others")]);
    std::fs::set_permissions(world.path("kek"), PermissionsExt::from_mode(0o600)).unwrap();
    std::fs::set_permissions(world.path("keyferry.toml"), PermissionsExt::from_mode(0o644)).unwrap();
    assert_eq!(look(&world, &[]).await.troubles(), [("files", "file_open_to_others")]);
    std::fs::set_permissions(world.path("keyferry.toml"), PermissionsExt::from_mode(0o600)).unwrap();
    world.write("keyferry.toml", &format!("colour = 1\n{settings}"));
    let unreadable = look(&world, &[]).await;
    assert_eq!(unreadable.troubles(), [("settings", "settings_unreadable")]);
    std::fs::remove_file(world.path("keyferry.toml")).unwrap();
    look(&world, &[]).await.of("settings_no_file");
}

#[tokio::test]
async fn what_is_taken_or_hangs_is_told_and_hides_nothing() {
    let (world, _user) = healthy(CARRIAGE).await;
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap();
    let taken = address.to_string();
    assert_eq!(
        look(&world, &[("KEYFERRY_ADMIN__LISTEN", &taken)]).await.troubles(),
        [("host.admin", "admin_port_taken")]
    );
    look(&world, &[("KEYFERRY_ADMIN__LISTEN", "192.0.2.1:1")]).await.of("admin_address");
    look(&world, &[("KEYFERRY_DSM__PROD__SERVERS", "[\"127.0.0.1:1\"]")]).await.of("dsm_unavailable");
    // Servers that take connections and say nothing.
    let database = changed(&world.db.worker_url(), |url| url.set_port(Some(address.port())).unwrap());
    let broker = changed(&world.vhost.url(), |url| url.set_port(Some(address.port())).unwrap());
    let endpoint = format!("http://{address}");
    let hanging = [
        ("KEYFERRY_DATABASE__URL", database.as_str()),
        ("KEYFERRY_RABBITMQ__URL", broker.as_str()),
        ("AWS_ENDPOINT_URL_KMS", endpoint.as_str()),
        ("AWS_ENDPOINT_URL_SQS", endpoint.as_str()),
    ];
    let begun = Instant::now();
    let ran = world.run_with(&["doctor", "--timeout", "10s", "--json"], &hanging, "").await;
    assert!(begun.elapsed() < Duration::from_secs(120), "{:?}", begun.elapsed());
    let report = ran.json();
    let codes: Vec<&str> =
        report["checks"].as_array().unwrap().iter().map(|finding| finding["code"].as_str().unwrap()).collect();
    for code in ["postgres_no_answer", "rabbitmq_unreachable", "aws_unreachable", "sqs_unreachable"] {
        assert!(codes.contains(&code), "{code}: {report:#}");
    }
    let dsm = report["checks"].as_array().unwrap().iter().find(|finding| finding["check"] == "dsm.prod").unwrap();
    assert_eq!(dsm["verdict"], "ok");
}

/// Whoever is on the way there could have every key wrapped for himself.
#[tokio::test]
async fn plain_http_to_another_machine_is_refused_unless_it_is_allowed() {
    let world = World::new(Tuning::default()).await;
    let far = world.fake.url().replace("127.0.0.1", "kms.invalid");
    for variable in ["AWS_ENDPOINT_URL_KMS", "AWS_ENDPOINT_URL_STS"] {
        let environment = [(variable, &*far)];
        let report = look(&world, &environment).await;
        assert!(report.of("aws_endpoint_http")["message"].as_str().unwrap().contains("http://kms.invalid"));
        let ran = world.run_with(&["serve", "--json"], &environment, "").await;
        assert_eq!(ran.code, Some(1), "{ran:?}");
        assert!(ran.err.contains("http://kms.invalid") && ran.err.contains("worker.allow_aws_over_http"), "{ran:?}");
    }
    let allowed = ("KEYFERRY_WORKER__ALLOW_AWS_OVER_HTTP", "true");
    let report = look(&world, &[allowed]).await;
    assert_eq!(report.of("aws_over_http")["verdict"], "warning");
    look(&world, &[allowed, ("AWS_ENDPOINT_URL_KMS", &far)]).await.of("aws_over_http");
}
