//! Bad input over the real broker: refused with a row, an audit entry, an event and a dead letter, and no AWS call.
//! The checker sees to all of that but the verdicts themselves.

use crate::support::broker::Message;
use crate::support::eventually;
use crate::support::world::{Carriage, Carrier, Tuning, World, request};
use serde_json::{Value, json};
use time::format_description::well_known::Rfc3339;

fn raw(body: &[u8]) -> Message {
    Message { body: body.to_vec(), ..Message::default() }
}

#[tokio::test]
async fn what_is_no_request_is_refused_by_name() {
    every_bad_input_is_refused_by_name(Carriage::RABBITMQ).await;
}

/// Over one carrier, as far as that can carry it.
pub async fn every_bad_input_is_refused_by_name(carriage: Carriage) {
    let mut world = World::over(Tuning::default(), carriage).await;
    world.serve().await;
    let arn = world.fake.key().await;
    let now = world.now().await;
    let at = |ahead: time::Duration| (now + ahead).format(&Rfc3339).unwrap();
    let past = json!({"key_expiration": true, "valid_to": at(time::Duration::days(-1))});
    let far = json!({"key_expiration": true, "valid_to": at(time::Duration::days(365))});
    let big = request("big", &arn, json!({"batch": "x".repeat(65 * 1024)}));
    let elsewhere = arn.replace("111122223333", "444455556666");
    let region = arn.replace("eu-central-1", "eu-north-1");
    let unknown_id = uuid::Uuid::from_u128(1).to_string();
    let asked = |id: &str, more: Value| raw(request(id, &arn, more).to_string().as_bytes());
    let mut cases: Vec<(&str, Option<&str>, Message)> = vec![
        ("not_json", None, raw(b"hello")),
        ("not_json", None, raw(b"")),
        ("not_json", None, raw(b"{\"id\":\"cut off\"")),
        ("not_an_object", None, raw(b"[]")),
        ("not_utf8", None, raw(b"{\"id\":\"\xff\"}")),
        ("nul_character", None, raw(b"{\"id\":\"a\0\"}")),
        ("nul_character", None, raw(br#"{"id":"a\u0000b"}"#)),
        ("body_too_large", None, raw(big.to_string().as_bytes())),
        ("missing_field", Some("key"), raw(br#"{"id":"no-key"}"#)),
        ("missing_field", Some("id"), raw(json!({"key": arn}).to_string().as_bytes())),
        ("unknown_field", Some("colour"), asked("unknown", json!({"colour": "red"}))),
        ("wrong_type", Some("key_expiration"), asked("type-1", json!({"key_expiration": "true"}))),
        ("wrong_type", Some("valid_to"), asked("type-2", json!({"valid_to": 7}))),
        ("wrong_type", Some("key"), raw(br#"{"id":"type-3","key":["x"]}"#)),
        ("wrong_type", Some("id"), raw(json!({"id": 7, "key": arn}).to_string().as_bytes())),
        ("invalid_value", Some("id"), asked("white space", json!({}))),
        ("invalid_arn", Some("key"), raw(br#"{"id":"arn-1","key":"arn:aws:s3:::bucket"}"#)),
        (
            "invalid_arn",
            Some("key"),
            raw(arn.replace("key/", "alias/").pipe(|key| json!({"id": "arn-2", "key": key})).to_string().as_bytes()),
        ),
        ("unknown_target", Some("key"), raw(request("target-1", &elsewhere, json!({})).to_string().as_bytes())),
        ("unknown_target", Some("key"), raw(request("target-2", &region, json!({})).to_string().as_bytes())),
        ("unknown_key", Some("key"), raw(request("no-such-key", &unknown_id, json!({})).to_string().as_bytes())),
        ("valid_to_past", Some("valid_to"), asked("past", past)),
        ("valid_to_too_far", Some("valid_to"), asked("far", far)),
        ("valid_to_missing", Some("valid_to"), asked("missing", json!({"key_expiration": true}))),
        (
            "valid_to_without_expiration",
            Some("key_expiration"),
            asked("without", json!({"valid_to": at(time::Duration::days(1))})),
        ),
        ("invalid_value", Some("valid_to"), asked("time", json!({"key_expiration": true, "valid_to": "tomorrow"}))),
        ("unknown_tier", Some("source_key_tier"), asked("tier", json!({"source_key_tier": "moon"}))),
        (
            "tier_not_configured",
            Some("source_key_tier"),
            asked("dsm", json!({"source_key_tier": "dsm", "source_key_identifier": "k"})),
        ),
        ("unknown_operation", Some("operation"), asked("operation", json!({"operation": "explode"}))),
        ("field_not_allowed", Some("scope"), asked("rotate", json!({"operation": "rotate", "scope": "all"}))),
        ("invalid_value", Some("wrapping_algorithm"), asked("wrap", json!({"wrapping_algorithm": "ROT13"}))),
        ("duplicate_field", Some("key"), raw(format!(r#"{{"id":"twice","key":"{arn}","key":"{arn}"}}"#).as_bytes())),
        (
            "invalid_envelope",
            Some("specversion"),
            Message {
                content_type: Some("application/cloudevents+json".into()),
                ..raw(br#"{"id":"e","source":"s","type":"t","data":{}}"#)
            },
        ),
    ];
    let all = cases.len();
    cases.retain(|(.., message)| carriage.requests[0].carries(message));
    assert!(cases.len() == all || carriage.requests[0] != Carrier::RabbitMq && cases.len() + 4 >= all);
    for (_, _, message) in &cases {
        world.send(message.clone()).await;
    }
    let refusals = world.refused(cases.len()).await;
    for refusal in &refusals {
        // It says what was expected; a field's name stands before it.
        let field = refusal.field.as_deref().unwrap_or_default();
        assert!(refusal.message.len() > 10 && refusal.message.contains(field), "{refusal:?}");
    }
    let mut found: Vec<(String, Option<String>)> = refusals.into_iter().map(|one| (one.code, one.field)).collect();
    let mut expected: Vec<(String, Option<String>)> =
        cases.iter().map(|(code, field, _)| ((*code).to_owned(), field.map(str::to_owned))).collect();
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    let mut dead = world.dead_letters(cases.len()).await;
    let mut sent: Vec<Vec<u8>> = cases.into_iter().map(|(.., message)| message.body).collect();
    dead.sort();
    sent.sort();
    assert!(dead == sent, "the dead-letter queue holds what was sent, byte for byte");
    assert_eq!(world.count("select count(*) from job").await, 0);
    assert_eq!(world.fake.journal("").await.len(), 0, "no AWS call for a refusal");
    // The worker is none the worse for it.
    world.publish(request("good", &arn, json!({}))).await;
    world.succeeded("good").await;
    world.finish().await;
}

/// Method-call form of a function, for the table above.
trait Pipe: Sized {
    fn pipe<T>(self, function: impl FnOnce(Self) -> T) -> T {
        function(self)
    }
}

impl<T> Pipe for T {}

#[tokio::test]
async fn a_secret_in_a_field_that_nobody_knows_appears_nowhere() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arn = world.fake.key().await;
    let secret = "hunter2-correct-horse-battery-staple";
    world.note_secret("a publisher's secret", secret.as_bytes());
    // In a field that no request has, however deep; in a value of the wrong type; in a known field; in broken JSON.
    for body in [
        request("s1", &arn, json!({"password": secret})).to_string(),
        request("s2", &arn, json!({"password": {"deep": [secret]}})).to_string(),
        request("s3", &arn, json!({"valid_to": [secret]})).to_string(),
        request("s4", &arn, json!({"wrapping_algorithm": secret})).to_string(),
        request("s5", &arn, json!({"source_key_tier": secret})).to_string(),
        json!({"id": "s6", "key": secret}).to_string(),
        format!("{{\"id\":\"s7\",\"x\":{secret}}}"),
        request("s8", &arn, json!({"valid_to": secret, "key_expiration": true})).to_string(),
    ] {
        world.send(raw(body.as_bytes())).await;
    }
    world.refused(8).await;
    world.dead_letters(8).await;
    world.finish().await;
}

#[tokio::test]
async fn copies_change_nothing() {
    let mut world = World::with_worker(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    let good = request("r1", &arn, json!({"source_key_identifier": "payroll"}));
    let bad = json!({"id": "r2", "key": "nonsense"});
    for _ in 0..3 {
        world.publish(good.clone()).await;
        world.publish(bad.clone()).await;
    }
    world.succeeded("r1").await;
    // The same request in another spelling; the same content in another order.
    world
        .send(raw(
            format!("{{ \"source_key_identifier\": \"payroll\", \"key\": \"{arn}\", \"id\": \"r1\" }}").as_bytes()
        ))
        .await;
    world.note_respelt();
    // And with other content: the first one stands.
    world.publish(request("r1", &arn, json!({}))).await;
    world.publish(request("r1", &arn, json!({}))).await;
    assert_eq!(world.dead_letters(5).await.len(), 5, "every copy of a refusal is dead-lettered as the first was");
    let codes: Vec<String> = world.refused(2).await.into_iter().map(|one| one.code).collect();
    assert_eq!(codes.len(), 2, "{codes:?}");
    assert!(codes.contains(&"invalid_arn".to_owned()) && codes.contains(&"id_conflict".to_owned()), "{codes:?}");
    let events = world.events_of("r1").await;
    assert_eq!(events.len(), 2, "one success, one refusal: {events:#?}");
    let imports = world.fake.journal(&format!("key={arn}&operation=ImportKeyMaterial")).await;
    assert_eq!(imports.len(), 1);
    eventually("the copies are counted", || async {
        let copies = world.workers[0]
            .metric("keyferry_intake_messages_total{transport=\"rabbitmq\",verdict=\"duplicate\"}")
            .await;
        (copies > 2.5).then_some(())
    })
    .await;
    world.finish().await;
}

#[tokio::test]
async fn everything_may_come_in_one_batch() {
    let mut world = World::new(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    let arns = world.fake.seed(json!({"count": 3})).await;
    let named = json!({"source_key_identifier": "payroll"});
    for number in 0..30 {
        world.publish(request(&format!("r{number}"), &arns[number % 2], named.clone())).await;
        // A copy, the same id with other content, and what is no request at all.
        world.publish(request(&format!("r{number}"), &arns[number % 2], named.clone())).await;
        if number % 10 == 0 {
            world.publish(request(&format!("r{number}"), &arns[2], named.clone())).await;
            world.send(raw(format!("no request {number}").as_bytes())).await;
        }
    }
    world.serve().await;
    for number in 0..30_usize {
        let job = world.succeeded(&format!("r{number}")).await;
        assert_eq!(job.seq, i64::try_from(number / 2 + 1).ok(), "places are in the order of the messages");
    }
    assert_eq!(world.refused(6).await.len(), 6);
    assert_eq!(world.dead_letters(6).await.len(), 6);
    world.finish().await;
}

#[tokio::test]
async fn a_row_that_postgres_refuses_does_not_take_its_batch_with_it() {
    let mut world = World::new(Tuning::default()).await;
    let arns = world.fake.seed(json!({"count": 20})).await;
    world.client.batch_execute("alter table job add check (request_id <> 'poison')").await.unwrap();
    for (number, arn) in arns.iter().enumerate() {
        let id = if number == 7 { "poison".to_owned() } else { format!("r{number}") };
        world.publish(request(&id, arn, json!({}))).await;
    }
    // All of them are in one batch.
    world.serve().await;
    for number in (0..arns.len()).filter(|number| *number != 7) {
        world.succeeded(&format!("r{number}")).await;
    }
    let refused = world.refused(1).await;
    assert_eq!((refused.len(), refused[0].code.as_str()), (1, "unstorable"));
    assert_eq!(world.dead_letters(1).await.len(), 1);
    world.finish().await;
}

#[tokio::test]
async fn an_outcome_that_postgres_refuses_ends_its_job_and_no_other() {
    let mut world = World::new(Tuning::default()).await;
    let arns = world.fake.seed(json!({"count": 8})).await;
    world.client.batch_execute("alter table job add check (request_id <> 'poison' or result is null)").await.unwrap();
    for (number, arn) in arns.iter().enumerate() {
        let id = if number == 3 { "poison".to_owned() } else { format!("r{number}") };
        world.publish(request(&id, arn, json!({}))).await;
    }
    world.serve().await;
    for number in (0..arns.len()).filter(|number| *number != 3) {
        world.succeeded(&format!("r{number}")).await;
    }
    assert!(world.failed("poison", "unstorable").await.aws_changed());
    world.finish().await;
}
