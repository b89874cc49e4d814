//! What a worker tells about itself: metrics, logs, the admin port.

use crate::support::broker::Message;
use crate::support::kmip;
use crate::support::world::{Carriage, Carrier, Tuning, World, random, request};
use crate::support::{eventually, http, variable};
use keyferry::audit::Kind;
use keyferry::job::{FailureCode, RefusalCode};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;
use time::format_description::well_known::Rfc3339;

/// A word that stands in message bodies and may stand nowhere else.
const MARKER: &str = "sesame-4711";

#[tokio::test]
async fn a_job_is_seen_in_every_series_that_it_passes() {
    let mut world = World::with_worker(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    let page = world.workers[0].get("metrics").await.unwrap().1;
    let zero = |series: String| assert!(page.contains(&format!("{series} 0\n")), "{series} is not there at zero");
    for code in FailureCode::ALL {
        zero(format!("keyferry_jobs_finished_total{{code=\"{}\",outcome=\"failed\"}}", code.as_str()));
    }
    for code in RefusalCode::ALL {
        zero(format!("keyferry_refusals_total{{code=\"{}\"}}", code.as_str()));
    }
    for kind in Kind::ALL {
        zero(format!("keyferry_audit_entries_total{{kind=\"{}\"}}", kind.as_str()));
    }
    zero("keyferry_aws_calls_total{operation=\"ImportKeyMaterial\",result=\"throttled\"}".into());

    let valid_to = (world.now().await + Duration::from_secs(3 * 86_400)).replace_nanosecond(0).unwrap();
    let fields = json!({
        "source_key_identifier": "payroll", "key_expiration": true, "valid_to": valid_to.format(&Rfc3339).unwrap()
    });
    world.publish(request("r1", &arn, fields)).await;
    world.succeeded("r1").await;
    world.publish(json!({"id": "r2", "key": arn, MARKER: true})).await;
    world.refused(1).await;

    let worker = &world.workers[0];
    // The last of them all.
    eventually("the end is counted", || async {
        let series = "keyferry_job_seconds_count{outcome=\"succeeded\"}";
        (worker.metric(series).await > 0.5).then_some(())
    })
    .await;
    for stage in ["queue", "parameters", "prepare", "wrap", "import", "verify", "settle"] {
        let series = format!("keyferry_job_stage_seconds_count{{stage=\"{stage}\"}}");
        assert!((worker.metric(&series).await - 1.0).abs() < 0.5, "{stage}");
    }
    for (series, expected) in [
        ("keyferry_job_seconds_count{outcome=\"succeeded\"}", 1.0),
        ("keyferry_job_stage_seconds_count{stage=\"delete\"}", 0.0),
        ("keyferry_aws_calls_total{operation=\"ImportKeyMaterial\",result=\"ok\"}", 1.0),
        ("keyferry_aws_call_seconds_count{operation=\"ImportKeyMaterial\"}", 1.0),
        ("keyferry_part_up{part=\"store\"}", 1.0),
        ("keyferry_part_up{part=\"events\"}", 1.0),
    ] {
        assert!((worker.metric(series).await - expected).abs() < 0.5, "{series}");
    }
    assert!(worker.metric("keyferry_store_connections_max").await > 0.5);
    for (kind, count) in [("accepted", 1.0), ("refused", 1.0), ("material_imported", 1.0), ("succeeded", 1.0)] {
        eventually(&format!("an entry {kind} is counted"), || async {
            let counted = worker.metric(&format!("keyferry_audit_entries_total{{kind=\"{kind}\"}}")).await;
            ((counted - count).abs() < 0.5).then_some(())
        })
        .await;
    }
    assert!((worker.metric("keyferry_refusals_total{code=\"unknown_field\"}").await - 1.0).abs() < 0.5);

    // Expiry is read when a worker starts.
    let second = world.serve().await;
    eventually("the key is seen to expire", || async {
        let soon = world.workers[second].metric("keyferry_keys_expiring{within=\"7d\"}").await;
        (soon > 0.5).then_some(())
    })
    .await;
    let worker = &world.workers[second];
    assert!(worker.metric("keyferry_keys_expiring{within=\"1d\"}").await < 0.5);
    eventually("the store is sampled", || async {
        (worker.metric("keyferry_store_sampled_timestamp_seconds").await > 1e9).then_some(())
    })
    .await;
    world.finish().await;
}

/// Values of labels that the README explains and does not list: too many, or those of the settings.
const UNLISTED: [(&str, &str); 6] = [
    ("keyferry_aws_calls_total", "result"),
    ("keyferry_aws_calls_total", "operation"),
    ("keyferry_aws_call_seconds", "operation"),
    ("keyferry_jobs_finished_total", "code"),
    ("keyferry_dsm_requests_total", "operation"),
    ("keyferry_build_info", "version"),
];

/// What stands between backquotes.
fn quoted(text: &str) -> BTreeSet<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// The values of a metric's label on a page.
fn values<'a>(page: &'a str, metric: &str, label: &str) -> BTreeSet<&'a str> {
    let series = page.lines().filter_map(|line| line.split_once('{')).filter(|(name, _)| {
        let name = name.strip_suffix("_bucket").or(name.strip_suffix("_count")).or(name.strip_suffix("_sum"));
        name == Some(metric)
    });
    let plain = page.lines().filter_map(|line| line.split_once('{')).filter(|(name, _)| *name == metric);
    series
        .chain(plain)
        .filter_map(|(_, rest)| {
            let start = format!("{label}=\"");
            let at = rest.find(&format!(",{start}")).map(|at| at + 1).or(rest.starts_with(&start).then_some(0))?;
            rest[at + start.len()..].split('"').next()
        })
        .collect()
}

#[tokio::test]
async fn the_readme_names_the_values_that_labels_have() {
    let carriage = Carriage { requests: &[Carrier::RabbitMq, Carrier::Sqs], events: Carrier::RabbitMq };
    let mut world = World::over(Tuning::default(), carriage).await;
    world.configure(&kmip::section());
    world.serve().await;
    let page = world.workers[0].get("metrics").await.unwrap().1;
    let readme = include_str!("../../README.md");
    let table = readme.split("\n## Metrics\n").nth(1).unwrap().split("\n## ").next().unwrap();
    let mut listed = 0;
    for row in table.lines().filter(|line| line.starts_with("| `keyferry_")) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let (metric, labels, named) = (cells[1].trim_matches('`'), quoted(cells[3]), quoted(cells[4]));
        let mut unknown = named.clone();
        unknown.retain(|word| !labels.contains(word) && word.chars().all(|c| c.is_ascii_lowercase() || c == '_'));
        for &label in &labels {
            let values: BTreeSet<&str> =
                values(&page, metric, label).into_iter().filter(|one| !one.is_empty()).collect();
            unknown.retain(|word| !values.contains(word));
            if !UNLISTED.contains(&(metric, label)) && !values.is_disjoint(&named) {
                let missing: Vec<&&str> = values.difference(&named).collect();
                assert!(missing.is_empty(), "{metric} has {missing:?} as {label}, which the README does not name");
                listed += 1;
            }
        }
        let other = ["rabbitmq", "not_before"];
        unknown.retain(|word| !other.contains(word));
        assert!(labels.is_empty() || unknown.is_empty(), "the README gives {metric} {unknown:?}, which it has not");
    }
    assert!(listed > 12, "the README lists values of {listed} labels only");
    // Whose calls are counted.
    let calls = table.lines().find(|row| row.contains("`keyferry_aws_calls_total`")).unwrap();
    for (service, operation) in [("KMS", "DescribeKey"), ("SQS", "ReceiveMessage"), ("STS", "AssumeRole")] {
        assert!(values(&page, "keyferry_aws_calls_total", "operation").contains(operation) && calls.contains(service));
    }
    world.finish().await;
}

#[tokio::test]
async fn a_line_of_the_log_is_an_object_and_a_failure_is_one_line() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arn = world.fake.key().await;
    let body = request("r1", &arn, json!({"source_key_identifier": MARKER})).to_string().into_bytes();
    // A trace context that is none is dropped, and refuses nothing.
    let message = Message { body, ..Message::default() }.with("traceparent", "00-0-0-00");
    world.send(message).await;
    let job = world.failed("r1", "source_key_unknown").await;
    world.publish(json!({"id": "r2", "key": arn, MARKER: MARKER})).await;
    world.refused(1).await;
    assert_eq!(world.count("select count(*) from job where traceparent is not null").await, 0);

    let log = world.workers[0].log();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let about: Vec<&Value> = lines.iter().filter(|line| line["job.id"] == json!(job.id)).collect();
    assert_eq!(about.len(), 1, "{log}");
    assert_eq!((&about[0]["kms.key.arn"], &about[0]["error.code"]), (&json!(arn), &json!("source_key_unknown")));
    assert!(!log.contains(MARKER), "what messages say is in the log:\n{log}");
    world.finish().await;
}

#[tokio::test]
async fn for_people_a_failure_is_one_line_as_well_and_says_nothing_of_the_message() {
    let mut world = World::new(Tuning::default()).await;
    world.respell("format = \"json\"", "format = \"human\"");
    world.serve().await;
    let bytes = world.symmetric_key("payroll").await;
    let arns = world.fake.seed(json!({"count": 2})).await;
    let said = "not\nallowed\u{1b}[31m at all";
    let denied = json!({"kind": "error", "code": "AccessDeniedException", "message": said});
    world.fake.fault("ImportKeyMaterial", &arns[0], Some(1), denied).await;
    world.publish(request("r1", &arns[0], json!({"source_key_identifier": "payroll"}))).await;
    let job = world.failed("r1", "access_denied").await;
    world.publish(request("r2", &arns[1], json!({"source_key_identifier": MARKER}))).await;
    let other = world.failed("r2", "source_key_unknown").await;
    world.publish(json!({"id": "r3", "key": arns[0], MARKER: MARKER})).await;
    world.refused(1).await;

    let log = world.workers[0].log();
    for (id, code) in [(job.id, "access_denied"), (other.id, "source_key_unknown")] {
        let about: Vec<&str> = log.lines().filter(|line| line.contains(&id.to_string())).collect();
        assert_eq!(about.len(), 1, "{log}");
        assert!(about[0].contains(" WARN ") && about[0].contains(&format!("error.code=\"{code}\"")), "{}", about[0]);
    }
    // Nothing breaks a line or paints it, whatever AWS says.
    for line in log.lines() {
        let stamp = line.split(' ').next().unwrap();
        assert!(time::OffsetDateTime::parse(stamp, &Rfc3339).is_ok(), "a line begins with no time: {line:?}\n{log}");
        assert!(!line.contains('\u{1b}'), "{line:?}");
    }
    let hex = hex::encode(&bytes);
    assert!(!log.contains(MARKER) && !log.contains(&hex), "what messages or keys say is in the log:\n{log}");
    world.finish().await;
}

/// Names and labels of all series, without their values.
fn series(page: &str) -> BTreeSet<&str> {
    page.lines().filter(|line| !line.starts_with('#')).filter_map(|line| Some(line.rsplit_once(' ')?.0)).collect()
}

/// Messages as somebody might send them who wants to fill a monitoring system: no two are alike.
fn hostile(number: usize, arn: &str) -> Message {
    let name = format!("{number}-{}", hex::encode(random(8)));
    let body = match number % 8 {
        0 => return Message { body: random(1 + number), ..Message::default() },
        1 => json!({"id": name, "key": arn, &name: name}),
        2 => json!({"id": name, "key": arn, "operation": name}),
        3 => json!({"id": name.repeat(200), "key": arn}),
        4 => json!({"id": name, "key": format!("arn:aws:kms:{name}:{number:012}:key/{name}")}),
        5 => json!({"id": name, "key": arn, "source_key_tier": name, "source_key_identifier": name.repeat(100)}),
        6 => json!({"id": name, "key": arn, "operation": ["rotate", name], "batch": name.repeat(300)}),
        _ => json!({"id": name, "key": format!("arn:{name}:kms:eu-central-1:111122223333:key/{name}")}),
    };
    let message = Message::of(&body).with("traceparent", &name).with(&name, &name);
    Message { content_type: Some(name.clone()), message_id: Some(name), ..message }
}

#[tokio::test]
async fn a_thousand_hostile_messages_add_no_series() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arn = world.fake.key().await;
    let before = world.workers[0].get("metrics").await.unwrap().1;
    for number in 0..1_000 {
        let message = hostile(number, &arn);
        world.send(message).await;
    }
    let refused = "keyferry_intake_messages_total{transport=\"rabbitmq\",verdict=\"refused\"}";
    eventually("all are refused", || async { (world.workers[0].metric(refused).await > 999.5).then_some(()) }).await;
    let after = world.workers[0].get("metrics").await.unwrap().1;
    let (before, after) = (series(&before), series(&after));
    assert!(before.len() > 500 && before == after, "{:?}", after.symmetric_difference(&before).collect::<Vec<_>>());
    world.finish().await;
}

#[tokio::test]
async fn the_admin_port_says_what_it_gives_and_that_it_ends() {
    let world = World::with_worker(Tuning::default()).await;
    let address = world.workers[0].address();
    for (page, content_type) in [
        ("metrics", "text/plain; version=0.0.4; charset=utf-8"),
        ("livez", "text/plain; charset=utf-8"),
        ("readyz", "text/plain; charset=utf-8"),
    ] {
        let answer = http().get(format!("http://{address}/{page}")).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{page}");
        assert_eq!(answer.headers()["content-type"], content_type, "{page}");
        assert_eq!(answer.headers()["connection"], "close", "{page}");
    }
    world.finish().await;
}

/// Whatever is asked of the log.
#[tokio::test]
async fn no_filter_brings_a_body_or_a_password_into_the_log() {
    let password = url::Url::parse(&variable("KEYFERRY_TEST_AMQP")).unwrap().password().unwrap().to_owned();
    // As text, and as the bytes of a buffer are printed.
    let bytes = |text: &str| text.bytes().map(|byte| byte.to_string()).collect::<Vec<_>>().join(", ");
    for filter in ["trace", "info,lapin=trace,lapin::channel=trace,tokio_postgres=trace,aws_smithy_runtime=trace"] {
        let mut world = World::new(Tuning::default()).await;
        world.environment.push(("KEYFERRY_LOG__FILTER", filter.into()));
        let at = world.start("").await;
        let arn = world.fake.key().await;
        world.publish(json!({"id": "r1", "key": arn, MARKER: true})).await;
        world.refused(1).await;
        let log = world.workers[at].log();
        for secret in [MARKER, &password] {
            assert!(!log.contains(secret) && !log.contains(&bytes(secret)), "{filter}");
        }
        world.finish().await;
    }
}
