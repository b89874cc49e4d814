//! What only AWS or the source can say no to: an event and a reason, and nothing but read-only calls.

use crate::support::proof::decrypts;
use crate::support::world::{Tuning, World, random, request};
use serde_json::json;

const READ_ONLY: [&str; 3] = ["DescribeKey", "GetParametersForImport", "ListKeyRotations"];

/// Expects the job to fail so, with no more than read-only calls of the worker's.
async fn fails(world: &mut World, id: &str, arn: &str, code: &str) {
    let job = world.failed(id, code).await;
    assert!(!job.aws_changed());
    let journal = world.fake.journal(&format!("key={arn}")).await;
    let calls = journal.iter().filter(|call| call["access_key"] == crate::support::fake::WORKER);
    for call in calls {
        assert!(READ_ONLY.contains(&call["operation"].as_str().unwrap()), "{call}");
    }
    let events = world.events_of(id).await;
    assert!(events.is_empty() || events[0]["data"]["error"]["code"] == code, "{events:?}");
    let message = job.error.unwrap()["message"].as_str().unwrap().to_owned();
    assert!(message.len() > 20, "a sentence that says what to do: {message}");
}

#[tokio::test]
async fn a_key_that_cannot_take_the_material_is_left_alone() {
    let mut world = World::with_worker(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    world.import_key("mac", "HMAC_512", &random(64)).await;
    let named = |name: &str| json!({"source_key_identifier": name});
    let arns = world.fake.seed(json!({"count": 7})).await;
    let stranger = world.fake.stranger("eu-central-1");
    let ours = world.fake.seed(json!({"origin": "AWS_KMS"})).await.remove(0);
    let mac = world.fake.seed(json!({"spec": "HMAC_256"})).await.remove(0);
    stranger.schedule_key_deletion().key_id(&arns[2]).pending_window_in_days(7).send().await.unwrap();
    for (id, arn, more) in [
        ("unknown-key", &arns[0], named("no-such-key")),
        ("wrong-kind", &arns[1], named("mac")),
        ("wrong-length", &mac, named("mac")),
        ("not-external", &ours, named("payroll")),
        ("pending-deletion", &arns[2], named("payroll")),
        ("wrap", &arns[3], json!({"wrapping_algorithm": "RSA_AES_KEY_WRAP_SHA_256"})),
        ("expected", &arns[4], json!({"expect_current_material": "ab".repeat(32)})),
    ] {
        world.publish(request(id, arn, more)).await;
    }
    for (id, arn, code) in [
        ("unknown-key", &arns[0], "source_key_unknown"),
        ("wrong-kind", &arns[1], "source_key_wrong_kind"),
        ("wrong-length", &mac, "source_key_wrong_kind"),
        ("not-external", &ours, "key_not_external"),
        ("pending-deletion", &arns[2], "key_pending_deletion"),
        ("wrap", &arns[3], "wrapping_not_allowed"),
        ("expected", &arns[4], "unexpected_current_material"),
    ] {
        fails(&mut world, id, arn, code).await;
    }
    // A failure does not stop the line.
    world.publish(request("after", &arns[0], named("payroll"))).await;
    world.succeeded("after").await;
    assert_eq!(world.dead().await.len(), 0, "failures are never dead-lettered");
    world.finish().await;
}

#[tokio::test]
async fn a_disabled_key_is_left_alone() {
    let mut world = World::with_worker(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    let named = json!({"source_key_identifier": "payroll"});
    world.publish(request("first", &arn, named.clone())).await;
    world.succeeded("first").await;
    world.fake.stranger("eu-central-1").disable_key().key_id(&arn).send().await.unwrap();
    world.publish(request("again", &arn, named)).await;
    world.failed("again", "key_disabled").await;
    let imports = world.fake.journal(&format!("key={arn}&operation=ImportKeyMaterial")).await;
    assert_eq!(imports.len(), 1);
    world.finish().await;
}

#[tokio::test]
async fn a_key_takes_no_other_material_than_before_and_is_told_which() {
    let mut world = World::with_worker(Tuning::default()).await;
    let bytes = world.symmetric_key("first-one").await;
    world.symmetric_key("other-one").await;
    let arn = world.fake.key().await;
    world.publish(request("r1", &arn, json!({"source_key_identifier": "first-one"}))).await;
    world.succeeded("r1").await;
    world.publish(request("other", &arn, json!({"source_key_identifier": "other-one"}))).await;
    world.publish(request("none", &arn, json!({}))).await;
    let other = world.failed("other", "other_material").await;
    let none = world.failed("none", "source_key_required").await;
    for job in [&other, &none] {
        assert!(job.error.as_ref().unwrap()["message"].as_str().unwrap().contains("first-one"), "{job:?}");
        assert!(!job.aws_changed());
    }
    let imports = world.fake.journal(&format!("key={arn}&operation=ImportKeyMaterial")).await;
    assert_eq!(imports.len(), 1, "AWS was not asked");
    assert!(decrypts(&world.fake, &arn, &bytes).await);
    // A HMAC key has no material id that would tell.
    let mac = world.fake.seed(json!({"spec": "HMAC_256"})).await.remove(0);
    world.import_key("mac-1", "HMAC_256", &random(32)).await;
    world.import_key("mac-2", "HMAC_256", &random(32)).await;
    world.publish(request("m1", &mac, json!({"source_key_identifier": "mac-1"}))).await;
    world.publish(request("m2", &mac, json!({"source_key_identifier": "mac-2"}))).await;
    world.succeeded("m1").await;
    world.failed("m2", "other_material").await;
    world.finish().await;
}

#[tokio::test]
async fn material_that_a_stranger_imported_is_respected() {
    let mut world = World::with_worker(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    let theirs = random(32);
    world.fake.stranger_imports(&arn, &theirs).await;
    world.publish(request("generated", &arn, json!({}))).await;
    world.publish(request("named", &arn, json!({"source_key_identifier": "payroll"}))).await;
    world.failed("generated", "source_key_required").await;
    world.failed("named", "other_material").await;
    assert!(decrypts(&world.fake, &arn, &theirs).await);
    // Whoever brings the same bytes as a source key may go on with it.
    world.import_key("theirs", "SYMMETRIC_DEFAULT", &theirs).await;
    world.publish(request("same", &arn, json!({"source_key_identifier": "theirs"}))).await;
    world.succeeded("same").await;
    world.finish().await;
}
