//! What a request is meant to lead to.

use crate::support::broker::Message;
use crate::support::eventually;
use crate::support::proof::{decrypts, macs};
use crate::support::world::{Tuning, World, random, request};
use serde_json::{Value, json};
use std::time::Duration;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

fn rfc3339(at: OffsetDateTime) -> String {
    at.format(&Rfc3339).unwrap()
}

#[tokio::test]
async fn a_named_key_is_imported_and_the_result_has_the_original_shape() {
    let mut world = World::with_worker(Tuning::default()).await;
    let bytes = world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    let named = json!({"operation": "import", "source_key_tier": "local", "source_key_identifier": "payroll"});
    world.publish(request("r1", &arn, named)).await;
    let job = world.succeeded("r1").await;
    assert!(decrypts(&world.fake, &arn, &bytes).await);
    assert!(!decrypts(&world.fake, &arn, &random(32)).await, "a proof that cannot fail proves nothing");

    let result = job.result.clone().unwrap();
    let source: uuid::Uuid =
        world.client.query_one("select id from source_key where name = 'payroll'", &[]).await.unwrap().get(0);
    let key_id: uuid::Uuid = world.client.query_one("select id from kms_key", &[]).await.unwrap().get(0);
    for (field, expected) in [
        ("id", json!(key_id)),
        ("region", json!("eu-central-1")),
        ("local_key_id", json!(source)),
        ("local_key_name", json!("payroll")),
        ("key_type", json!("symmetric")),
        ("key_expiration", json!(false)),
        ("rotation_status", json!("")),
        ("cloud_name", json!("aws")),
        ("gone", json!(false)),
    ] {
        assert_eq!(result[field], expected, "{field} of {result:#}");
    }
    for field in ["createdAt", "updatedAt", "synced_at"] {
        assert!(OffsetDateTime::parse(result[field].as_str().unwrap(), &Rfc3339).is_ok(), "{field} of {result:#}");
    }
    assert!(result["key_material_origin"].is_string());
    let shown = world.fake.show(&arn).await;
    for (field, expected) in [
        ("Arn", json!(arn)),
        ("AWSAccountId", json!("111122223333")),
        ("KeyID", shown["key_id"].clone()),
        ("KeyState", json!("Enabled")),
        ("Enabled", json!(true)),
        ("Origin", json!("EXTERNAL")),
        ("KeySpec", json!("SYMMETRIC_DEFAULT")),
        ("CustomerMasterKeySpec", json!("SYMMETRIC_DEFAULT")),
        ("KeyUsage", json!("ENCRYPT_DECRYPT")),
        ("KeyManager", json!("CUSTOMER")),
        ("EncryptionAlgorithms", json!(["SYMMETRIC_DEFAULT"])),
        ("ExpirationModel", json!("KEY_MATERIAL_DOES_NOT_EXPIRE")),
        ("ValidTo", Value::Null),
        ("CurrentKeyMaterialId", shown["current_key_material_id"].clone()),
        ("MultiRegion", json!(false)),
    ] {
        assert_eq!(result["aws_param"][field], expected, "{field} of {result:#}");
    }
    let events = world.events_of("r1").await;
    assert_eq!(events.len(), 1);
    for (attribute, expected) in [
        ("specversion", json!("1.0")),
        ("source", json!("keyferry")),
        ("type", json!("io.keyferry.job.succeeded")),
        ("id", json!(job.id)),
        ("datacontenttype", json!("application/json")),
    ] {
        assert_eq!(events[0][attribute], expected, "{attribute} of {:#}", events[0]);
    }
    assert_eq!(events[0]["data"]["result"], result);
    assert_eq!(events[0]["subject"], json!(arn));
    assert_eq!(events[0]["sequence"], "00000000000000000001");
    assert_eq!(world.events().await[0].routing_key, "job.succeeded.import.111122223333.eu-central-1");
    // A first import costs four calls at most.
    assert!(
        world
            .fake
            .journal(&format!("key={arn}"))
            .await
            .iter()
            .filter(|call| call["access_key"] == crate::support::fake::WORKER)
            .count()
            <= 4
    );
    world.finish().await;
}

#[tokio::test]
async fn every_kind_of_key_takes_its_bytes_under_every_wrap() {
    let mut world = World::with_worker(Tuning::default()).await;
    let kinds = [("SYMMETRIC_DEFAULT", 32), ("HMAC_224", 28), ("HMAC_256", 32), ("HMAC_384", 48), ("HMAC_512", 64)];
    let wraps = [
        ("RSAES_OAEP_SHA_256", "RSA_2048"),
        ("RSAES_OAEP_SHA_1", "RSA_3072"),
        ("RSAES_OAEP_SHA_256", "RSA_4096"),
        ("RSAES_OAEP_SHA_1", "RSA_2048"),
        ("RSAES_OAEP_SHA_256", "RSA_3072"),
    ];
    let mut held = Vec::new();
    for ((kind, length), (algorithm, spec)) in kinds.into_iter().zip(wraps) {
        let (bytes, name) = (random(length), format!("named-{kind}"));
        world.import_key(&name, kind, &bytes).await;
        let arns = world.fake.seed(json!({"spec": kind, "count": 2, "region": "us-east-1"})).await;
        let named = json!({"source_key_identifier": name, "wrapping_algorithm": algorithm, "wrapping_key_spec": spec});
        world.publish(request(&name, &arns[0], named)).await;
        // The other key gets bytes that Keyferry makes.
        world.publish(request(&format!("made-{kind}"), &arns[1], json!({}))).await;
        held.push((kind, bytes, arns, algorithm, spec));
    }
    for (kind, bytes, arns, algorithm, spec) in held {
        let job = world.succeeded(&format!("named-{kind}")).await;
        let made = world.succeeded(&format!("made-{kind}")).await.result.unwrap();
        assert_eq!(
            made["local_key_name"],
            format!("keyferry-{}", world.job(&format!("made-{kind}")).await.unwrap().id)
        );
        if kind == "SYMMETRIC_DEFAULT" {
            assert!(decrypts(&world.fake, &arns[0], &bytes).await);
            assert!(!decrypts(&world.fake, &arns[1], &bytes).await);
        } else {
            assert!(macs(&world.fake, &arns[0], kind, &bytes).await, "{kind}");
            assert!(!macs(&world.fake, &arns[1], kind, &bytes).await, "{kind}");
            assert_eq!(made["key_type"], "hmac");
            assert_eq!(made["aws_param"]["KeyUsage"], "GENERATE_VERIFY_MAC");
        }
        let entry: String = world
            .client
            .query_one(
                "select entry from audit_entry where subject = $1 and entry::jsonb ->> 'kind' = 'parameters_obtained'",
                &[&job.id],
            )
            .await
            .unwrap()
            .get(0);
        assert!(
            entry.contains(&format!(r#""wrapping_algorithm":"{algorithm}","wrapping_key_spec":"{spec}""#)),
            "{entry}"
        );
    }
    world.finish().await;
}

#[tokio::test]
async fn material_expires_when_it_should_and_is_imported_again_with_another_end() {
    let mut world = World::with_worker(Tuning::default()).await;
    let bytes = world.symmetric_key("rotor").await;
    let arn = world.fake.key().await;
    let now = world.now().await;
    let first = (now + time::Duration::days(3)).replace_nanosecond(123_456_789).unwrap();
    let until =
        |at: OffsetDateTime| json!({"source_key_identifier": "rotor", "key_expiration": true, "valid_to": rfc3339(at)});
    world.publish(request("r1", &arn, until(first))).await;
    let result = world.succeeded("r1").await.result.unwrap();
    // AWS keeps whole seconds.
    let kept = rfc3339(first.replace_nanosecond(0).unwrap());
    assert_eq!(result["aws_param"]["ValidTo"], json!(kept));
    assert_eq!(result["aws_param"]["ExpirationModel"], "KEY_MATERIAL_EXPIRES");
    assert_eq!(result["key_expiration"], true);
    // Farthest allowed, then none at all.
    let farthest = now + time::Duration::days(364) + time::Duration::hours(22);
    world.publish(request("r2", &arn, until(farthest))).await;
    world.publish(request("r3", &arn, json!({"source_key_identifier": "rotor", "key_expiration": false}))).await;
    let second = world.succeeded("r2").await.result.unwrap();
    let third = world.succeeded("r3").await.result.unwrap();
    assert_eq!(second["aws_param"]["ValidTo"], json!(rfc3339(farthest.replace_nanosecond(0).unwrap())));
    assert_eq!(third["aws_param"]["ExpirationModel"], "KEY_MATERIAL_DOES_NOT_EXPIRE");
    assert_eq!(third["aws_param"]["CurrentKeyMaterialId"], result["aws_param"]["CurrentKeyMaterialId"]);
    assert!(decrypts(&world.fake, &arn, &bytes).await);
    let shown = world.fake.show(&arn).await;
    assert_eq!(shown["materials"].as_array().unwrap().len(), 1, "{shown:#}");
    let mark = format!("keyferry:{}", world.job("r1").await.unwrap().id);
    assert_eq!(shown["materials"][0]["description"], json!(mark));
    world.finish().await;
}

#[tokio::test]
async fn a_request_may_come_in_an_envelope_and_take_its_id_from_outside() {
    let mut world = World::with_worker(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    let arns = world.fake.seed(json!({"count": 4})).await;
    let data = |arn: &str| json!({"key": arn, "source_key_identifier": "payroll"});
    let envelope = |source: &str, data: Value| json!({"specversion": "1.0", "source": source, "type": "t", "id": "e1", "data": data, "traceid": "x"});
    let cloud_event = |body: Value| Message {
        body: body.to_string().into_bytes(),
        content_type: Some("application/cloudevents+json; charset=utf-8".into()),
        ..Message::default()
    };
    world.send(cloud_event(envelope("/orders", data(&arns[0])))).await;
    world.succeeded("e1").await;
    // Ids are unique within a source: the same one from elsewhere is another request; the data's own id comes first.
    world.send(cloud_event(envelope("/else", json!({"id": "d1", "key": arns[1]})))).await;
    world.succeeded("d1").await;
    let outside = Message { message_id: Some("m1".into()), ..Message::of(&data(&arns[2])) };
    world.send(outside).await;
    world.succeeded("m1").await;
    // The key by the name that Keyferry gave it.
    let id = world.job("m1").await.unwrap().result.unwrap()["id"].clone();
    world.publish(request("u1", id.as_str().unwrap(), json!({"source_key_identifier": "payroll"}))).await;
    let by_id = world.succeeded("u1").await;
    assert_eq!((by_id.arn.as_str(), by_id.seq), (arns[2].as_str(), Some(2)));
    // The source key by its id; a description of the publisher's own before the job's mark.
    let source = world.job("m1").await.unwrap().source_key_id.unwrap();
    let more = json!({"source_key_identifier": source, "key_material_description": "for orders", "batch": "b1"});
    world.publish(request("s1", &arns[3], more)).await;
    let job = world.succeeded("s1").await;
    let shown = world.fake.show(&arns[3]).await;
    assert_eq!(shown["materials"][0]["description"], format!("for orders keyferry:{}", job.id));
    assert_eq!(world.events_of("s1").await[0]["data"]["job"]["batch"], "b1");
    world.finish().await;
}

#[tokio::test]
async fn one_key_is_served_in_order_and_others_beside_it() {
    let mut world = World::with_worker(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    let arns = world.fake.seed(json!({"count": 2})).await;
    let now = world.now().await;
    world.fake.fault("ImportKeyMaterial", &arns[0], Some(1), json!({"kind": "hold"})).await;
    for number in 1..=6_i64 {
        let valid_to = rfc3339((now + time::Duration::days(number)).replace_nanosecond(0).unwrap());
        let more = json!({"source_key_identifier": "payroll", "key_expiration": true, "valid_to": valid_to});
        world.publish(request(&format!("in-line-{number}"), &arns[0], more)).await;
    }
    world.fake.held(1, "ImportKeyMaterial", &arns[0]).await;
    world.publish(request("beside", &arns[1], json!({"source_key_identifier": "payroll"}))).await;
    world.succeeded("beside").await;
    assert_eq!(world.count("select count(*) from job where state = 'waiting'").await, 6);
    world.fake.release(&arns[0]).await;
    for number in 1..=6_i64 {
        assert_eq!(world.succeeded(&format!("in-line-{number}")).await.seq, Some(number));
    }
    let order: Vec<String> = world
        .client
        .query("select request_id from job where line_id = (select line_id from job where request_id = 'in-line-1') order by finished_at, seq", &[])
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(order, (1..=6).map(|number| format!("in-line-{number}")).collect::<Vec<_>>());
    // The checker compares the journal's order with the line's.
    world.finish().await;
}

#[tokio::test]
async fn a_job_joins_its_line_when_its_time_has_come() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arn = world.fake.key().await;
    let later = rfc3339(world.now().await + time::Duration::hours(5));
    world.publish(request("later", &arn, json!({"not_before": later}))).await;
    world.until("the job waits apart", "select count(*) from future", 1).await;
    let job = world.job("later").await.unwrap();
    assert_eq!((job.state.as_str(), job.seq), ("waiting", None));
    assert_eq!(world.fake.journal(&format!("key={arn}")).await.len(), 0);
    world.db.advance(Duration::from_secs(5 * 3_600)).await;
    assert_eq!(world.succeeded("later").await.seq, Some(1));
    world.finish().await;
}

#[tokio::test]
async fn a_job_gives_up_at_its_deadline() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arn = world.fake.key().await;
    world.fake.fault("DescribeKey", &arn, None, json!({"kind": "throttle"})).await;
    let deadline = rfc3339(world.now().await + time::Duration::hours(1));
    world.publish(request("r1", &arn, json!({"deadline": deadline}))).await;
    world.until("an attempt failed", THROTTLED, 1).await;
    world.db.advance(Duration::from_secs(3_600)).await;
    let job = world.failed("r1", "deadline_exceeded").await;
    assert!(!job.aws_changed());
    assert!(job.error.unwrap()["message"].as_str().unwrap().contains("ThrottlingException"));
    world.finish().await;
}

#[tokio::test]
async fn a_job_whose_material_would_have_expired_meanwhile_gives_up() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arn = world.fake.key().await;
    world.fake.fault("DescribeKey", &arn, None, json!({"kind": "throttle"})).await;
    let valid_to = rfc3339(world.now().await + time::Duration::hours(1));
    world.publish(request("r1", &arn, json!({"key_expiration": true, "valid_to": valid_to}))).await;
    world.until("an attempt failed", THROTTLED, 1).await;
    world.db.advance(Duration::from_secs(3_600)).await;
    assert!(!world.failed("r1", "valid_to_passed").await.aws_changed());
    world.finish().await;
}

#[tokio::test]
async fn a_copy_is_a_duplicate_however_late_it_comes() {
    let mut world = World::with_worker(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    let valid_to = rfc3339(world.now().await + time::Duration::hours(1));
    let asked = json!({"source_key_identifier": "payroll", "key_expiration": true, "valid_to": valid_to});
    world.publish(request("r1", &arn, asked.clone())).await;
    world.succeeded("r1").await;
    // By now the request itself would be refused: its time has passed.
    world.db.advance(Duration::from_secs(7_200)).await;
    world.publish(request("r1", &arn, asked.clone())).await;
    eventually("the copy is counted", || async {
        let copies = world.workers[0]
            .metric("keyferry_intake_messages_total{transport=\"rabbitmq\",verdict=\"duplicate\"}")
            .await;
        (copies > 0.5).then_some(())
    })
    .await;
    world.publish(request("r2", &arn, asked)).await;
    let refused = world.refused(1).await;
    assert_eq!((refused[0].request_id.as_deref(), refused[0].code.as_str()), (Some("r2"), "valid_to_past"));
    world.finish().await;
}

/// Jobs of which an attempt has been throttled.
const THROTTLED: &str = "select count(*) from progress where last_error ->> 'class' = 'throttled'";
