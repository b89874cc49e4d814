//! A symmetric key with several materials: each is remembered, and each can be imported again by itself.

use crate::support::proof::decrypts;
use crate::support::world::{Tuning, World, random, request};
use aws_sdk_kms::types::ImportType;
use serde_json::{Value, json};
use time::format_description::well_known::Rfc3339;

/// A key that Keyferry has given two materials, the second after a rotation that somebody else made.
pub struct Rotated {
    pub world: World,
    pub arn: String,
    /// AWS's ids of the two.
    pub old: String,
    pub new: String,
    pub new_bytes: Vec<u8>,
}

pub async fn rotated(tuning: Tuning) -> Rotated {
    let mut world = World::with_worker(tuning).await;
    let arn = world.fake.key().await;
    world.symmetric_key("old").await;
    world.publish(request("old", &arn, json!({"source_key_identifier": "old"}))).await;
    let old = material_id(&world.succeeded("old").await.result.unwrap());
    let new_bytes = random(32);
    world.fake.stranger_imports_as(&arn, &new_bytes, Some(ImportType::NewKeyMaterial), None).await;
    world.fake.stranger_rotates(&arn).await;
    world.import_key("new", "SYMMETRIC_DEFAULT", &new_bytes).await;
    world.publish(request("new", &arn, json!({"source_key_identifier": "new"}))).await;
    let new = material_id(&world.succeeded("new").await.result.unwrap());
    Rotated { world, arn, old, new, new_bytes }
}

fn material_id(result: &Value) -> String {
    result["key_material_id"].as_str().unwrap().to_owned()
}

impl Rotated {
    pub async fn ask(&mut self, id: &str, more: Value) {
        self.world.publish(request(id, &self.arn, more)).await;
    }

    /// The double's word on a material.
    pub async fn shown(&self, material_id: &str) -> Value {
        let key = self.world.fake.show(&self.arn).await;
        key["materials"].as_array().unwrap().iter().find(|held| held["key_material_id"] == material_id).unwrap().clone()
    }

    pub async fn state(&self) -> String {
        self.world.fake.show(&self.arn).await["state"].as_str().unwrap().to_owned()
    }
}

/// The sentence of a failure.
pub fn sentence(job: &crate::support::snapshot::Job) -> String {
    job.error.as_ref().unwrap()["message"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_material_comes_back_by_its_id_alone() {
    let mut case = rotated(Tuning::default()).await;
    for id in [case.old.clone(), case.new.clone()] {
        case.world.fake.stranger_deletes(&case.arn, Some(&id)).await;
    }
    assert_eq!(case.state().await, "PendingImport");
    // No source key is named: ours is the record of where the material came from.
    case.ask("back-1", json!({"key_material_id": case.old})).await;
    let first = case.world.succeeded("back-1").await.result.unwrap();
    assert_eq!((&first["local_key_name"], &first["key_material_id"]), (&json!("old"), &json!(case.old)));
    // One missing material makes the key unusable, and the result says which.
    assert_eq!(first["aws_param"]["KeyState"], "PendingImport");
    assert_eq!(first["missing_key_materials"], json!([{"key_material_id": case.new, "local_key_name": "new"}]));
    case.ask("back-2", json!({"key_material_id": case.new, "source_key_identifier": "new"})).await;
    let second = case.world.succeeded("back-2").await.result.unwrap();
    assert_eq!(second["missing_key_materials"], Value::Null);
    assert_eq!(case.state().await, "Enabled");
    assert!(decrypts(&case.world.fake, &case.arn, &case.new_bytes).await, "the current one is the current one still");
    case.world.finish().await;
}

#[tokio::test]
async fn an_old_material_that_expired_is_the_one_that_is_imported_again() {
    let mut case = rotated(Tuning::default()).await;
    let day = time::Duration::days(1);
    let valid_to = (case.world.now().await + day).format(&Rfc3339).unwrap();
    case.ask("expires", json!({"key_material_id": case.old, "key_expiration": true, "valid_to": valid_to})).await;
    let expires = case.world.succeeded("expires").await.result.unwrap();
    // The key shows the earliest expiry of all: that of a material which is not in force.
    assert!(
        expires["aws_param"]["ValidTo"].is_string() && expires["aws_param"]["CurrentKeyMaterialId"] == json!(case.new)
    );
    case.world.fake.advance(2 * day.whole_seconds()).await;
    assert_eq!(case.state().await, "PendingImport");
    // The double's clock has gone ahead of the store's, in which two days more lie in the past for AWS.
    let later: time::OffsetDateTime = case.world.now().await + day * 9;
    let valid_to = later.format(&Rfc3339).unwrap();
    case.ask("again", json!({"key_material_id": case.old, "key_expiration": true, "valid_to": valid_to})).await;
    case.world.succeeded("again").await;
    assert_eq!(case.state().await, "Enabled");
    assert_eq!(case.shown(&case.new.clone()).await["valid_to"], Value::Null, "each has an expiry of its own");
    case.world.finish().await;
}

#[tokio::test]
async fn what_a_request_means_is_never_guessed() {
    let mut case = rotated(Tuning::default()).await;
    case.world.symmetric_key("third").await;
    let unknown = "ab".repeat(32);
    let imports = case.world.fake.journal(&format!("key={}&operation=ImportKeyMaterial", case.arn)).await.len();
    for (id, more, code, said) in [
        // An older material is imported again only when the request says so.
        ("older", json!({"source_key_identifier": "old"}), "other_material", case.old.clone()),
        ("third", json!({"source_key_identifier": "third"}), "other_material", "source key new".into()),
        ("none", json!({}), "source_key_required", "source_key_identifier = new".into()),
        (
            "contradiction",
            json!({"source_key_identifier": "new", "key_material_id": case.old}),
            "other_material",
            "came from source key old".into(),
        ),
        ("unknown", json!({"key_material_id": unknown}), "source_key_required", "source_key_identifier".into()),
        (
            "not-its",
            json!({"source_key_identifier": "new", "key_material_id": unknown}),
            "other_material",
            format!("is the material {}", case.new),
        ),
        (
            "expected",
            json!({"source_key_identifier": "new", "expect_current_material": case.old}),
            "unexpected_current_material",
            "expect_current_material".into(),
        ),
    ] {
        case.ask(id, more).await;
        let job = case.world.failed(id, code).await;
        assert!(!job.aws_changed() && sentence(&job).contains(&said), "{id}: {}", sentence(&job));
    }
    let after = case.world.fake.journal(&format!("key={}&operation=ImportKeyMaterial", case.arn)).await.len();
    assert_eq!(after, imports, "AWS was not asked to import anything");
    case.ask("right", json!({"source_key_identifier": "new", "expect_current_material": case.new})).await;
    case.world.succeeded("right").await;
    case.world.finish().await;
}

/// Somebody rotates the key to material that Keyferry has never seen.
#[tokio::test]
async fn a_rotation_by_somebody_else_is_found_before_anything_is_sent() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arn = world.fake.key().await;
    world.symmetric_key("ours").await;
    world.publish(request("r1", &arn, json!({"source_key_identifier": "ours"}))).await;
    let ours = material_id(&world.succeeded("r1").await.result.unwrap());
    let theirs = random(32);
    world.fake.stranger_imports_as(&arn, &theirs, Some(ImportType::NewKeyMaterial), None).await;
    // While it waits for its rotation, nothing changes for the material in force.
    world.publish(request("r2", &arn, json!({"source_key_identifier": "ours"}))).await;
    world.succeeded("r2").await;
    world.fake.stranger_rotates(&arn).await;
    world.publish(request("r3", &arn, json!({"source_key_identifier": "ours"}))).await;
    let job = world.failed("r3", "other_material").await;
    assert!(!job.aws_changed());
    assert!(sentence(&job).contains("Keyferry did not import") && sentence(&job).contains(&ours), "{}", sentence(&job));
    world.publish(request("r4", &arn, json!({"source_key_identifier": "ours", "key_material_id": ours}))).await;
    world.succeeded("r4").await;
    assert!(decrypts(&world.fake, &arn, &theirs).await, "theirs is left in force");
    // AWS compares what is not on record: bytes that it never had are refused.
    world.symmetric_key("guess").await;
    world.publish(request("r5", &arn, json!({"source_key_identifier": "guess"}))).await;
    assert!(!world.failed("r5", "other_material").await.aws_changed());
    world.finish().await;
}

#[tokio::test]
async fn keys_without_material_ids_take_none() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arn = world.fake.seed(json!({"spec": "HMAC_256"})).await.remove(0);
    world.import_key("mac", "HMAC_256", &random(32)).await;
    let id = "ab".repeat(32);
    world.publish(request("import", &arn, json!({"source_key_identifier": "mac", "key_material_id": id}))).await;
    world
        .publish(request("expected", &arn, json!({"source_key_identifier": "mac", "expect_current_material": id})))
        .await;
    world.publish(request("delete", &arn, json!({"operation": "delete", "key_material_id": id}))).await;
    world
        .publish(request("described", &arn, json!({"source_key_identifier": "mac", "key_material_description": "x"})))
        .await;
    for (id, code) in [
        ("import", "material_id_not_allowed"),
        ("delete", "material_id_not_allowed"),
        ("expected", "material_id_not_allowed"),
        ("described", "description_not_allowed"),
    ] {
        assert!(!world.failed(id, code).await.aws_changed());
    }
    world.finish().await;
}

#[tokio::test]
async fn a_replica_takes_what_its_primary_was_given_and_nothing_else() {
    let mut world = World::with_worker(Tuning::default()).await;
    let primary = world.fake.seed(json!({"multi_region": true})).await.remove(0);
    let replica = world.fake.replica(&primary, "us-east-1").await;
    let bytes = world.symmetric_key("ours").await;
    world.symmetric_key("other").await;
    // A replica is never the first, and nothing is generated for it.
    world.publish(request("none", &replica, json!({}))).await;
    assert!(sentence(&world.failed("none", "source_key_required").await).contains("primary"));
    world.publish(request("early", &replica, json!({"source_key_identifier": "ours"}))).await;
    assert!(!world.failed("early", "other_material").await.aws_changed());
    world.publish(request("primary", &primary, json!({"source_key_identifier": "ours"}))).await;
    world.succeeded("primary").await;
    // What the primary was given is on record for all Regions.
    world.publish(request("unnamed", &replica, json!({}))).await;
    assert!(sentence(&world.failed("unnamed", "source_key_required").await).contains("source_key_identifier = ours"));
    world.publish(request("other", &replica, json!({"source_key_identifier": "other"}))).await;
    world.failed("other", "other_material").await;
    world.publish(request("replica", &replica, json!({"source_key_identifier": "ours"}))).await;
    let result = world.succeeded("replica").await.result.unwrap();
    assert_eq!(result["aws_param"]["MultiRegionKeyType"], "REPLICA");
    assert!(decrypts(&world.fake, &replica, &bytes).await);
    // A delete means the one Region that it names.
    world.publish(request("delete", &replica, json!({"operation": "delete", "scope": "all"}))).await;
    world.succeeded("delete").await;
    assert_eq!(world.fake.show(&replica).await["state"], "PendingImport");
    assert_eq!(world.fake.show(&primary).await["state"], "Enabled");
    let removed = "select count(*) from kms_material where removed_at is not null";
    assert_eq!(world.count(removed).await, 1);
    world.publish(request("back", &replica, json!({"source_key_identifier": "ours"}))).await;
    world.succeeded("back").await;
    assert_eq!(world.count(removed).await, 0);
    world.finish().await;
}

/// AWS is late with everything: the key is seen after a while, and so is each change.
#[tokio::test]
async fn what_aws_shows_late_is_waited_for() {
    let mut world = World::with_worker(Tuning::default()).await;
    world.symmetric_key("ours").await;
    world.fake.options(json!({"creation_lag_ms": 20_000, "change_lag_ms": 20_000})).await;
    let arn = world.fake.key().await;
    world.publish(request("r1", &arn, json!({"source_key_identifier": "ours"}))).await;
    let waits = |text: &'static str| {
        format!(
            "select count(*) from progress where last_error ->> 'class' = 'not_yet_visible'
             and last_error ->> 'message' like '%{text}%'"
        )
    };
    world.until("the key is not seen yet", &waits("NotFoundException"), 1).await;
    world.fake.advance(20).await;
    world.until("the import is not seen yet", &waits("AWS took the material"), 1).await;
    world.fake.advance(20).await;
    world.succeeded("r1").await;
    world.publish(request("r2", &arn, json!({"operation": "delete"}))).await;
    world.until("the delete is not seen yet", &waits("AWS deleted the material"), 1).await;
    world.fake.advance(20).await;
    world.succeeded("r2").await;
    for operation in ["ImportKeyMaterial", "DeleteImportedKeyMaterial"] {
        let calls = world.fake.journal(&format!("key={arn}&operation={operation}")).await;
        assert_eq!(calls.len(), 1, "what AWS has answered is not sent again: {calls:#?}");
    }
    world.finish().await;
}

/// The answer to a reimport is lost, and the key rotated before the next attempt: the same import settles it.
#[tokio::test]
async fn a_reimport_in_doubt_is_settled_whatever_is_in_force_by_then() {
    let mut case = rotated(Tuning::hasty()).await;
    let third = random(32);
    case.world.fake.stranger_imports_as(&case.arn, &third, Some(ImportType::NewKeyMaterial), None).await;
    case.world.fake.fault("ImportKeyMaterial", &case.arn, Some(1), json!({"kind": "hold"})).await;
    case.ask("r", json!({"source_key_identifier": "new"})).await;
    case.world.fake.held(1, "ImportKeyMaterial", &case.arn).await;
    case.world.fake.stranger_rotates(&case.arn).await;
    let result = case.world.succeeded("r").await.result.unwrap();
    case.world.fake.release(&case.arn).await;
    assert_eq!(result["key_material_id"], json!(case.new));
    assert!(decrypts(&case.world.fake, &case.arn, &third).await);
    case.world.finish().await;
}

/// AWS has taken the material; what becomes of the key before it is seen is no failure of the import.
#[tokio::test]
async fn a_key_that_is_disabled_after_its_import_was_taken_has_taken_it() {
    let mut world = World::with_worker(Tuning::default()).await;
    world.symmetric_key("ours").await;
    let arn = world.fake.key().await;
    world.fake.options(json!({"change_lag_ms": 20_000})).await;
    world.publish(request("r1", &arn, json!({"source_key_identifier": "ours"}))).await;
    world.until("the import was answered", "select count(*) from progress where imported", 1).await;
    world.fake.advance(20).await;
    world.fake.stranger("eu-central-1").disable_key().key_id(&arn).send().await.unwrap();
    world.fake.advance(20).await;
    let job = world.ended("r1").await;
    assert_eq!(job.state, "succeeded", "{job:?}");
    world.finish().await;
}
