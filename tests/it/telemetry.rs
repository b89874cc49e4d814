//! What a worker tells about itself: metrics, logs, the admin port.

use crate::support::broker::Message;
use crate::support::world::{Tuning, World, request};
use crate::support::{eventually, http, variable};
use keyferry::audit::Kind;
use keyferry::job::{FailureCode, RefusalCode};
use serde_json::{Value, json};
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
