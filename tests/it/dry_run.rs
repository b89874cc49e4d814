//! Dry runs: every check, nothing changed, and the same refusal as the real thing.

use crate::aws_errors::CLOSED;
use crate::materials::rotated;
use crate::support::fake::WORKER;
use crate::support::world::{Tuning, World, random, request};
use serde_json::{Value, json};
use time::format_description::well_known::Rfc3339;

fn dry(mut more: Value) -> Value {
    more["dry_run"] = true.into();
    more
}

#[tokio::test]
async fn it_tells_what_would_happen_and_nothing_does() {
    let mut world = World::with_worker(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    let arns = world.fake.seed(json!({"count": 2})).await;
    world.publish(request("named", &arns[0], dry(json!({"source_key_identifier": "payroll"})))).await;
    world.publish(request("made", &arns[1], dry(json!({"wrapping_key_spec": "RSA_3072"})))).await;
    let named = world.succeeded("named").await.result.unwrap();
    let would = &named["would"];
    assert_eq!(named["dry_run"], true);
    for (field, expected) in [
        ("operation", json!("import")),
        ("generate", json!(false)),
        ("local_key_name", json!("payroll")),
        ("import_type", Value::Null),
        ("wrapping_algorithm", json!("RSAES_OAEP_SHA_256")),
        ("wrapping_key_spec", json!("RSA_4096")),
        ("wrapped_bytes", json!(512)),
        ("expiry", json!("never")),
        ("waits_until", Value::Null),
    ] {
        assert_eq!(would[field], expected, "{field} of {would:#}");
    }
    assert!(would["left_to_aws"][0].as_str().unwrap().contains("ImportKeyMaterial"));
    let made = world.succeeded("made").await.result.unwrap();
    assert_eq!((&made["would"]["generate"], &made["would"]["wrapped_bytes"]), (&json!(true), &json!(384)));
    for arn in &arns {
        assert_eq!(world.fake.show(arn).await["state"], "PendingImport");
    }
    let calls = world.fake.journal("").await;
    let calls = calls.iter().filter(|call| call["access_key"] == WORKER);
    assert!(calls.clone().count() > 0);
    for call in calls {
        assert_eq!(call["operation"], "DescribeKey", "no scarce quota is used");
    }
    assert_eq!(world.count("select count(*) from source_key").await, 1, "nothing was generated to stay");
    assert_eq!(world.count("select count(*) from kms_material").await, 0);
    // Whoever listens for outcomes can tell.
    assert_eq!(world.events_of("named").await[0]["data"]["job"]["dry_run"], true);
    // The real thing comes after, under an id of its own, and says that it is.
    world.publish(request("real", &arns[0], json!({"source_key_identifier": "payroll"}))).await;
    world.succeeded("real").await;
    assert_eq!(world.events_of("real").await[0]["data"]["job"]["dry_run"], false);
    world.finish().await;
}

#[tokio::test]
async fn it_tells_which_material_would_be_imported_again_or_deleted() {
    let mut case = rotated(Tuning::default()).await;
    case.ask("dry-old", dry(json!({"key_material_id": case.old}))).await;
    case.ask("dry-all", dry(json!({"operation": "delete", "scope": "all"}))).await;
    let old = case.world.succeeded("dry-old").await.result.unwrap();
    assert_eq!(old["would"]["import_type"], "EXISTING_KEY_MATERIAL");
    assert_eq!((&old["would"]["key_material_id"], &old["would"]["local_key_name"]), (&json!(case.old), &json!("old")));
    let all = case.world.succeeded("dry-all").await.result.unwrap();
    let expected = json!([
        {"key_material_id": case.new, "local_key_name": "new"},
        {"key_material_id": case.old, "local_key_name": "old"},
    ]);
    assert_eq!(all["would"]["key_materials"], expected);
    assert_eq!(case.state().await, "Enabled");
    case.world.finish().await;
}

#[tokio::test]
async fn it_fails_as_the_real_thing_would() {
    let mut world = World::with_worker(Tuning::default()).await;
    world.import_key("mac", "HMAC_256", &random(32)).await;
    world.symmetric_key("ours").await;
    world.symmetric_key("other").await;
    let arn = world.fake.key().await;
    let foreign = world.fake.seed(json!({"origin": "AWS_KMS"})).await.remove(0);
    world.publish(request("first", &arn, json!({"source_key_identifier": "ours"}))).await;
    world.succeeded("first").await;
    for (id, key, more, code) in [
        ("kind", &arn, json!({"source_key_identifier": "mac"}), "source_key_wrong_kind"),
        ("other", &arn, json!({"source_key_identifier": "other"}), "other_material"),
        ("unknown", &arn, json!({"source_key_identifier": "nobody"}), "source_key_unknown"),
        (
            "wrap",
            &arn,
            json!({"source_key_identifier": "ours", "wrapping_algorithm": "RSA_AES_KEY_WRAP_SHA_256"}),
            "wrapping_not_allowed",
        ),
        ("origin", &foreign, json!({}), "key_not_external"),
        ("delete", &foreign, json!({"operation": "delete"}), "key_not_external"),
    ] {
        world.publish(request(id, key, dry(more.clone()))).await;
        let job = world.failed(id, code).await;
        assert!(!job.aws_changed());
        assert_eq!(world.events_of(id).await[0]["data"]["job"]["dry_run"], true);
        let real = format!("{id}-real");
        world.publish(request(&real, key, more)).await;
        assert_eq!(world.failed(&real, code).await.error, job.error, "the same words");
    }
    world.finish().await;
}

/// A call of an earlier job may still take effect: a dry run does not wait for that, but says so.
#[tokio::test]
async fn it_runs_while_its_line_is_closed() {
    let mut world = World::with_worker(Tuning { signature_life_ms: 600_000, ..Tuning::hasty() }).await;
    world.symmetric_key("ours").await;
    let arn = world.fake.key().await;
    world.fake.options(json!({"single_use_tokens": false})).await;
    world.fake.fault("ImportKeyMaterial", &arn, Some(1), json!({"kind": "late", "hang_ms": 5_000})).await;
    world.publish(request("r1", &arn, json!({"source_key_identifier": "ours"}))).await;
    world.fake.pending_late(1, &arn).await;
    let valid_to = (world.now().await + time::Duration::days(9)).format(&Rfc3339).unwrap();
    let other = json!({"source_key_identifier": "ours", "key_expiration": true, "valid_to": valid_to});
    world.publish(request("dry", &arn, dry(other.clone()))).await;
    world.publish(request("real", &arn, other)).await;
    world.succeeded("r1").await;
    let result = world.succeeded("dry").await.result.unwrap();
    assert!(result["would"]["waits_until"].is_string(), "{result:#}");
    world.until("the line is closed to the real one", CLOSED, 1).await;
    assert_eq!(world.fake.release_late().await, 1);
    world.db.advance(std::time::Duration::from_secs(600)).await;
    world.succeeded("real").await;
    world.finish().await;
}
