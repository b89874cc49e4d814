//! Rotations: new material under the same key, once, whatever happens in between.

use crate::support::fake::WORKER;
use crate::support::proof::decrypts;
use crate::support::snapshot::Job;
use crate::support::world::{Tuning, World, random, request};
use aws_sdk_kms::types::ImportType;
use serde_json::{Value, json};
use std::time::Duration;

pub const IMPORT: &str = "ImportKeyMaterial";
pub const ROTATE: &str = "RotateKeyOnDemand";

pub fn rotate(id: &str, arn: &str, mut more: Value) -> Value {
    more["operation"] = "rotate".into();
    request(id, arn, more)
}

/// A key with the material of the source key `first`, and a worker.
pub struct Case {
    pub world: World,
    pub arn: String,
    pub first: Vec<u8>,
}

pub async fn case(tuning: Tuning) -> Case {
    let mut world = World::with_worker(tuning).await;
    let arn = world.fake.key().await;
    let first = world.symmetric_key("first").await;
    world.publish(request("first", &arn, json!({"source_key_identifier": "first"}))).await;
    world.succeeded("first").await;
    Case { world, arn, first }
}

impl Case {
    pub async fn ask(&mut self, id: &str, more: Value) {
        self.world.publish(rotate(id, &self.arn, more)).await;
    }

    pub async fn fault(&self, operation: &str, fault: Value) {
        self.world.fake.fault(operation, &self.arn, Some(1), fault).await;
    }

    /// The worker's calls of an operation on the key. A late effect is no call of its own.
    pub async fn calls(&self, operation: &str) -> usize {
        let calls = self.world.fake.journal(&format!("key={}&operation={operation}", self.arn)).await;
        let is_late = |call: &Value| call["late"] == true && call["fault"] == "late" && call["outcome"] != "late";
        calls.iter().filter(|call| call["access_key"] == WORKER && !is_late(call)).count()
    }

    /// The next worker may reach a third Region too; this one is stopped.
    pub async fn gets_a_third_region(&mut self) {
        self.world.respell(
            r#"regions = ["eu-central-1", "us-east-1"]"#,
            r#"regions = ["eu-central-1", "us-east-1", "eu-west-1"]"#,
        );
        self.world.workers[0].stop().await;
    }

    /// The materials as roles, in the double's order.
    pub async fn roles(&self) -> Vec<String> {
        let key = self.world.fake.show(&self.arn).await;
        let role = |held: &Value| held["role"].as_str().unwrap_or_default().to_owned();
        key["materials"].as_array().unwrap().iter().map(role).collect()
    }

    async fn stranger_brings(&self) -> String {
        let new = Some(ImportType::NewKeyMaterial);
        self.world.fake.stranger_imports_as(&self.arn, &random(32), new, None).await.unwrap()
    }
}

pub fn sentence(job: &Job) -> String {
    job.error.as_ref().unwrap()["message"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn new_material_comes_into_force_and_the_old_goes_on_decrypting() {
    let mut case = case(Tuning::default()).await;
    let second = case.world.symmetric_key("second").await;
    let before = case.world.fake.show(&case.arn).await;
    case.ask("r1", json!({"source_key_identifier": "second", "key_material_description": "of 2027"})).await;
    let result = case.world.succeeded("r1").await.result.unwrap();
    assert_eq!((&result["local_key_name"], &result["rotation_status"]), (&json!("second"), &json!("rotated")));
    assert_eq!(result["rotations"], json!({"used": 1, "left": 24}));
    assert_eq!(result["aws_param"]["CurrentKeyMaterialId"], result["key_material_id"]);
    assert!(result["rotated_at"].is_string() && result["replicas"].is_null(), "{result:#}");
    assert_eq!(case.roles().await, ["NON_CURRENT", "CURRENT"]);
    assert!(decrypts(&case.world.fake, &case.arn, &second).await);
    let shown = case.world.fake.show(&case.arn).await;
    assert_eq!(before["materials"][0]["material_sha256"], shown["materials"][0]["material_sha256"]);
    assert!(shown["materials"][1]["description"].as_str().unwrap().starts_with("of 2027 keyferry:"), "{shown:#}");
    assert_eq!((case.calls(IMPORT).await, case.calls(ROTATE).await), (2, 1));
    let events = case.world.events_of("r1").await;
    assert_eq!(events[0]["data"]["job"]["operation"], "rotate");
    // One that is generated, after the interval; and the budget is on record.
    case.world.db.advance(Duration::from_secs(3_601)).await;
    case.ask("r2", json!({})).await;
    let result = case.world.succeeded("r2").await.result.unwrap();
    assert_eq!(result["rotations"], json!({"used": 2, "left": 23}));
    assert!(result["local_key_name"].as_str().unwrap().starts_with("keyferry-"), "{result:#}");
    assert_eq!(case.world.count("select rotations::bigint from kms_key").await, 2);
    // Each of the three can be imported again by itself.
    let ids: Vec<Value> = case.world.fake.show(&case.arn).await["materials"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["key_material_id"].clone())
        .collect();
    for (number, id) in ids.iter().enumerate() {
        let message = request(&format!("again{number}"), &case.arn, json!({"key_material_id": id}));
        case.world.publish(message).await;
        case.world.succeeded(&format!("again{number}")).await;
    }
    case.world.finish().await;
}

#[tokio::test]
async fn what_cannot_be_rotated_is_said_before_anything_is_changed() {
    let mut case = case(Tuning::default()).await;
    let world = &mut case.world;
    world.symmetric_key("new").await;
    let mac = world.fake.seed(json!({"spec": "HMAC_256"})).await.remove(0);
    let pair = world.fake.seed(json!({"spec": "ECC_NIST_P256"})).await.remove(0);
    let empty = world.fake.key().await;
    let primary = world.fake.seed(json!({"multi_region": true})).await.remove(0);
    let replica = world.fake.replica(&primary, "us-east-1").await;
    let away = world.fake.seed(json!({"multi_region": true})).await.remove(0);
    world.fake.replica(&away, "ap-south-1").await;
    for (id, arn) in [("import-mac", &mac), ("import-away", &away)] {
        world.publish(request(id, arn, json!({}))).await;
        world.succeeded(id).await;
    }
    for (id, arn, more, code, said) in [
        ("mac", &mac, json!({}), "rotation_not_supported", "symmetric keys only"),
        ("pair", &pair, json!({}), "rotation_not_supported", "symmetric keys only"),
        ("replica", &replica, json!({}), "rotation_on_replica", primary.as_str()),
        ("empty", &empty, json!({}), "nothing_to_rotate", "send an import"),
        ("same", &case.arn, json!({"source_key_identifier": "first"}), "material_not_new", "this very material"),
        ("unknown", &case.arn, json!({"source_key_identifier": "nobody"}), "source_key_unknown", "keyferry keys list"),
        ("away", &away, json!({}), "replica_not_a_target", "ap-south-1"),
    ] {
        world.publish(rotate(id, arn, more)).await;
        let job = world.failed(id, code).await;
        assert!(!job.aws_changed() && sentence(&job).contains(said), "{id}: {}", sentence(&job));
    }
    // The policy's interval counts from the last rotation, whoever made it.
    world.fake.stranger_imports_as(&case.arn, &random(32), Some(ImportType::NewKeyMaterial), None).await;
    world.fake.stranger_rotates(&case.arn).await;
    world.publish(rotate("soon", &case.arn, json!({"source_key_identifier": "new"}))).await;
    let job = world.failed("soon", "rotation_too_soon").await;
    assert!(!job.aws_changed() && sentence(&job).contains("3600 s"), "{}", sentence(&job));
    // A dry run says the same, and what it would do once it may.
    world.publish(rotate("dry-soon", &case.arn, json!({"dry_run": true}))).await;
    world.failed("dry-soon", "rotation_too_soon").await;
    world.db.advance(Duration::from_secs(3_601)).await;
    world.publish(rotate("dry", &case.arn, json!({"dry_run": true, "source_key_identifier": "new"}))).await;
    let would = world.succeeded("dry").await.result.unwrap()["would"].clone();
    assert_eq!((&would["import_type"], &would["rotations"]["left"]), (&json!("NEW_KEY_MATERIAL"), &json!(24)));
    assert_eq!(case.roles().await, ["NON_CURRENT", "CURRENT"]);
    case.world.finish().await;
}

#[tokio::test]
async fn a_spent_budget_is_told_and_nothing_is_brought() {
    let mut case = case(Tuning::default()).await;
    for _ in 0..25 {
        case.stranger_brings().await;
        case.world.fake.stranger_rotates(&case.arn).await;
    }
    case.world.db.advance(Duration::from_secs(3_601)).await;
    case.ask("r1", json!({})).await;
    let job = case.world.failed("r1", "rotations_spent").await;
    assert!(!job.aws_changed() && sentence(&job).contains("25 times"), "{}", sentence(&job));
    assert_eq!((case.calls(IMPORT).await, case.calls(ROTATE).await), (1, 0));
    assert_eq!(case.world.count("select rotations::bigint from kms_key").await, 25);
    case.world.finish().await;
}

#[tokio::test]
async fn a_strangers_material_that_waits_is_never_touched() {
    let mut case = case(Tuning::default()).await;
    case.world.symmetric_key("second").await;
    let pending = case.stranger_brings().await;
    // Without a source key there is nothing that could be proved.
    case.ask("generated", json!({})).await;
    let job = case.world.failed("generated", "pending_foreign").await;
    assert!(!job.aws_changed() && sentence(&job).contains(&pending), "{}", sentence(&job));
    assert_eq!(case.calls(IMPORT).await, 1);
    // With one AWS is asked whether these bytes are its own; they are not.
    case.ask("named", json!({"source_key_identifier": "second"})).await;
    assert!(!case.world.failed("named", "pending_foreign").await.aws_changed());
    assert_eq!(case.roles().await, ["CURRENT", "PENDING_ROTATION"]);
    assert_eq!(case.calls(ROTATE).await, 0);
    // Whoever owns it goes on; then it is our turn again.
    case.world.fake.stranger_rotates(&case.arn).await;
    case.world.db.advance(Duration::from_secs(3_601)).await;
    case.ask("third", json!({"source_key_identifier": "second"})).await;
    case.world.succeeded("third").await;
    case.world.finish().await;
}

#[tokio::test]
async fn an_answer_that_was_lost_is_learnt_from_aws() {
    for operation in [IMPORT, ROTATE] {
        for repeat in ["incorrect_key_material", "invalid_state"] {
            let mut case = case(Tuning::hasty()).await;
            case.world.fake.options(json!({"repeated_new_material": repeat})).await;
            case.world.symmetric_key("second").await;
            case.fault(operation, json!({"kind": "lose_answer"})).await;
            case.ask("r1", json!({"source_key_identifier": "second"})).await;
            let result = case.world.succeeded("r1").await.result.unwrap();
            assert_eq!(result["rotations"]["used"], 1, "{operation} {repeat}");
            assert_eq!(case.calls(ROTATE).await, 1, "{operation} {repeat}");
            assert_eq!(case.roles().await, ["NON_CURRENT", "CURRENT"]);
            case.world.finish().await;
        }
    }
}

#[tokio::test]
async fn a_rotation_that_may_still_come_is_waited_out_before_another_is_asked_for() {
    let mut case = case(Tuning { signature_life_ms: 60_000, aws_timeout_ms: 1_000, ..Tuning::default() }).await;
    // It hangs, and has not happened when the worker looks again.
    case.fault(ROTATE, json!({"kind": "late", "hang_ms": 3_000})).await;
    case.ask("r1", json!({})).await;
    case.world.fake.pending_late(1, &case.arn).await;
    case.world
        .until(
            "it waits",
            "select count(*) from line where late_until is not null and token is null and due_at = late_until",
            1,
        )
        .await;
    assert_eq!(case.calls(ROTATE).await, 1);
    // It comes after all: the job needs no other.
    case.world.fake.release_late().await;
    case.world.db.advance(Duration::from_secs(61)).await;
    case.world.succeeded("r1").await;
    assert_eq!(case.calls(ROTATE).await, 1);
    // One that never comes is asked for again when the first can come no more.
    case.world.db.advance(Duration::from_secs(3_601)).await;
    case.fault(ROTATE, json!({"kind": "hang", "ms": 3_000})).await;
    case.ask("r2", json!({})).await;
    case.world.fake.wait(3, &format!("operation={ROTATE}&key={}", case.arn)).await;
    case.world
        .until(
            "it waits",
            "select count(*) from line where late_until > keyferry_now() and token is null and due_at = late_until",
            1,
        )
        .await;
    case.world.db.advance(Duration::from_secs(61)).await;
    case.world.succeeded("r2").await;
    assert_eq!(case.calls(ROTATE).await, 3);
    case.world.finish().await;
}

/// Between the import and the rotation a stranger does something to the key.
#[tokio::test]
async fn who_meddles_in_between_is_found_and_not_fought() {
    // He rotates himself: the material is in force, and the job asks for nothing more.
    let mut case = case(Tuning::default()).await;
    case.world.fake.fault_after("ListKeyRotations", &case.arn, 1, json!({"kind": "hold"})).await;
    case.ask("rotated", json!({})).await;
    case.world.fake.held(1, "ListKeyRotations", &case.arn).await;
    case.world.fake.stranger_rotates(&case.arn).await;
    case.world.fake.release(&case.arn).await;
    case.world.succeeded("rotated").await;
    assert_eq!(case.calls(ROTATE).await, 0);
    case.world.finish().await;

    // He rotates, and on to his own.
    let mut case = self::case(Tuning::default()).await;
    case.world.fake.fault_after("ListKeyRotations", &case.arn, 1, json!({"kind": "hold"})).await;
    case.ask("superseded", json!({})).await;
    case.world.fake.held(1, "ListKeyRotations", &case.arn).await;
    case.world.fake.stranger_rotates(&case.arn).await;
    case.stranger_brings().await;
    case.world.fake.stranger_rotates(&case.arn).await;
    case.world.fake.release(&case.arn).await;
    assert!(case.world.failed("superseded", "rotation_superseded").await.aws_changed());
    assert_eq!(case.calls(ROTATE).await, 0);
    case.world.finish().await;

    // He deletes it, and brings his own in its place: that is not rotated to.
    for replaces in [false, true] {
        let mut case = self::case(Tuning::default()).await;
        case.world.fake.fault_after("ListKeyRotations", &case.arn, 1, json!({"kind": "hold"})).await;
        case.ask("r1", json!({})).await;
        case.world.fake.held(1, "ListKeyRotations", &case.arn).await;
        let pending = case.world.fake.show(&case.arn).await["materials"][1]["key_material_id"].clone();
        case.world.fake.stranger_deletes(&case.arn, pending.as_str()).await;
        if replaces {
            case.stranger_brings().await;
        }
        case.world.fake.release(&case.arn).await;
        let job = if replaces {
            case.world.failed("r1", "pending_foreign").await
        } else {
            case.world.failed_after_looking("r1", "pending_lost").await
        };
        assert!(job.aws_changed());
        assert_eq!(case.calls(ROTATE).await, 0);
        // Nothing of his is touched; what was lost comes by a retry, with the same bytes.
        if !replaces {
            let ran = case.world.run(&["jobs", "retry", "r1", "--json"]).await;
            assert_eq!(ran.code, Some(0), "{ran:?}");
            case.world
                .until(
                    "the retry succeeds",
                    "select count(*) from job where retry_of is not null and state = 'succeeded'",
                    1,
                )
                .await;
        }
        case.world.finish().await;
    }
}

#[tokio::test]
async fn a_dead_jobs_material_is_adopted_by_its_retry_and_by_nobody_else() {
    let mut case = case(Tuning::default()).await;
    case.fault(ROTATE, json!({"kind": "error", "code": "AccessDeniedException", "message": "ordered by a test"})).await;
    case.ask("r1", json!({})).await;
    let job = case.world.failed("r1", "access_denied").await;
    assert!(job.aws_changed());
    assert_eq!(case.roles().await, ["CURRENT", "PENDING_ROTATION"]);
    case.ask("other", json!({})).await;
    let other = case.world.failed("other", "pending_foreign").await;
    assert!(!other.aws_changed() && sentence(&other).contains("keyferry jobs retry"), "{}", sentence(&other));
    let ran = case.world.run(&["jobs", "retry", "r1", "--json"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    case.world
        .until("it succeeds", "select count(*) from job where retry_of is not null and state = 'succeeded'", 1)
        .await;
    assert_eq!(case.roles().await, ["NON_CURRENT", "CURRENT"]);
    assert_eq!(case.world.count("select count(*) from source_key").await, 2);
    assert!(!decrypts(&case.world.fake, &case.arn, &case.first).await, "the old is not in force any more");
    case.world.finish().await;
}

/// A multi-Region key whose primary and replica hold the material of the source key `first`.
pub async fn two_regions(tuning: Tuning) -> (Case, String) {
    let mut world = World::with_worker(tuning).await;
    let arn = world.fake.seed(json!({"multi_region": true})).await.remove(0);
    let replica = world.fake.replica(&arn, "us-east-1").await;
    let first = world.symmetric_key("first").await;
    for (id, arn) in [("first", &arn), ("replica", &replica)] {
        world.publish(request(id, arn, json!({"source_key_identifier": "first"}))).await;
        world.succeeded(id).await;
    }
    (Case { world, arn, first }, replica)
}

async fn is_in_force(case: &Case, replica: &str, bytes: &[u8]) {
    for arn in [&case.arn, replica] {
        assert!(decrypts(&case.world.fake, arn, bytes).await, "{arn}");
    }
}

#[tokio::test]
async fn every_region_is_given_the_material_before_the_key_is_rotated() {
    let (mut case, replica) = two_regions(Tuning::default()).await;
    let second = case.world.symmetric_key("second").await;
    case.ask("dry", json!({"source_key_identifier": "second", "dry_run": true})).await;
    let dry = case.world.succeeded("dry").await.result.unwrap();
    assert_eq!(dry["would"]["replicas"], json!(["us-east-1"]));
    case.ask("r1", json!({"source_key_identifier": "second"})).await;
    let result = case.world.succeeded("r1").await.result.unwrap();
    assert_eq!(result["replicas"], json!({"us-east-1": "imported"}));
    is_in_force(&case, &replica, &second).await;
    // In the replica's own Region, as material that exists.
    let calls = case.world.fake.journal(&format!("key={replica}&operation={IMPORT}")).await;
    assert_eq!(calls.len(), 2, "{calls:#?}");
    assert_eq!(case.calls(ROTATE).await, 1);
    case.world.finish().await;
}

#[tokio::test]
async fn a_region_that_stays_away_leaves_the_job_resumable_and_shows_how_far_it_came() {
    let (mut case, replica) = two_regions(Tuning::hasty()).await;
    let second = case.world.symmetric_key("second").await;
    let away = json!({"operation": "GetParametersForImport", "key": replica, "times": null,
                      "fault": {"kind": "error", "code": "KMSInternalException", "message": "ordered by a test"}});
    case.world.fake.order(away).await;
    case.ask("r1", json!({"source_key_identifier": "second"})).await;
    case.world.until("it was tried", "select count(*) from progress where replicas ->> 'us-east-1' = 'tried'", 1).await;
    let shown = case.world.run(&["jobs", "show", "r1", "--json"]).await.json();
    assert_eq!(shown[0]["replicas"], json!({"us-east-1": "tried"}), "{shown:#}");
    let why = crate::support::eventually("it says why", || async {
        let shown = case.world.run(&["jobs", "show", "r1", "--json"]).await.json();
        shown[0]["error"]["message"].as_str().map(ToOwned::to_owned)
    })
    .await;
    assert!(why.starts_with("us-east-1: GetParametersForImport"), "{why}");
    assert_eq!(case.roles().await[1], "PENDING_MULTI_REGION_IMPORT_AND_ROTATION");
    assert_eq!((case.calls(ROTATE).await, case.calls(IMPORT).await), (0, 2));
    // Another worker goes on where it was left.
    case.world.workers[0].kill();
    case.world.fake.clear_faults().await;
    case.world.serve().await;
    case.world.db.advance(Duration::from_secs(120)).await;
    let result = case.world.succeeded("r1").await.result.unwrap();
    assert_eq!(result["replicas"], json!({"us-east-1": "imported"}));
    is_in_force(&case, &replica, &second).await;
    assert_eq!((case.calls(ROTATE).await, case.calls(IMPORT).await), (1, 2));
    case.world.finish().await;
}

#[tokio::test]
async fn a_replica_that_came_meanwhile_is_not_forgotten() {
    let (mut case, _) = two_regions(Tuning::hasty()).await;
    case.gets_a_third_region().await;
    case.world.serve().await;
    let second = case.world.symmetric_key("second").await;
    case.world.fake.fault_after("ListKeyRotations", &case.arn, 1, json!({"kind": "hold"})).await;
    case.ask("r1", json!({"source_key_identifier": "second"})).await;
    case.world.fake.held(1, "ListKeyRotations", &case.arn).await;
    let third = case.world.fake.replica(&case.arn, "eu-west-1").await;
    case.world.fake.stranger_imports_as(&third, &case.first.clone(), Some(ImportType::ExistingKeyMaterial), None).await;
    case.world.fake.release(&case.arn).await;
    let result = case.world.succeeded("r1").await.result.unwrap();
    assert_eq!(result["replicas"], json!({"us-east-1": "imported", "eu-west-1": "imported"}));
    is_in_force(&case, &third, &second).await;
    case.world.finish().await;
}

#[tokio::test]
async fn an_answer_of_a_replica_that_was_lost_is_asked_for_again() {
    let (mut case, replica) = two_regions(Tuning::hasty()).await;
    let second = case.world.symmetric_key("second").await;
    case.world.fake.fault(IMPORT, &replica, Some(1), json!({"kind": "lose_answer"})).await;
    case.ask("r1", json!({"source_key_identifier": "second"})).await;
    case.world.succeeded("r1").await;
    is_in_force(&case, &replica, &second).await;
    assert_eq!(case.calls(ROTATE).await, 1);
    case.world.finish().await;
}

#[tokio::test]
async fn a_replicas_import_parameters_are_kept_for_its_retries() {
    let (mut case, replica) = two_regions(Tuning::hasty()).await;
    let sets = async |case: &Case| {
        case.world.fake.journal(&format!("key={replica}&operation=GetParametersForImport&outcome=ok")).await.len()
    };
    let before = sets(&case).await;
    let error = |code: &str| json!({"kind": "error", "code": code, "message": "ordered by a test"});
    case.world.fake.fault(IMPORT, &replica, Some(2), error("KMSInternalException")).await;
    case.ask("r1", json!({})).await;
    case.world.succeeded("r1").await;
    assert_eq!(sets(&case).await - before, 1, "one set for three tries");
    // One that AWS does not take is thrown away.
    case.world.db.advance(Duration::from_secs(3_601)).await;
    case.world.fake.fault(IMPORT, &replica, Some(1), error("InvalidImportTokenException")).await;
    case.ask("r2", json!({})).await;
    case.world.succeeded("r2").await;
    assert_eq!(sets(&case).await - before, 3);
    case.world.finish().await;
}

#[tokio::test]
async fn an_abandoned_rotate_takes_its_own_material_away_and_nobody_elses() {
    let denied = json!({"kind": "error", "code": "AccessDeniedException", "message": "ordered by a test"});
    let mut case = case(Tuning::default()).await;
    // One that is dead already.
    case.fault(ROTATE, denied.clone()).await;
    case.ask("dead", json!({})).await;
    let dead = case.world.failed("dead", "access_denied").await;
    assert_eq!(case.roles().await, ["CURRENT", "PENDING_ROTATION"]);
    let asked = case.world.run(&["jobs", "abandon", "dead", "--json"]).await;
    assert!(asked.code == Some(1) && asked.err.contains("not_confirmed"), "it deletes in AWS: {asked:?}");
    assert_eq!(case.world.count("select count(*) from job where retry_of is not null").await, 0);
    let ran = case.world.run(&["jobs", "abandon", "dead", "--yes", "--json"]).await;
    assert_eq!((ran.code, &ran.json()["became"]), (Some(0), &json!("requested")), "{ran:?}");
    let id = ran.json()["id"].as_str().unwrap().to_owned();
    case.world.run(&["jobs", "wait", &id]).await;
    let shown = case.world.run(&["jobs", "show", &id, "--json"]).await;
    assert_eq!(shown.json()[0]["error"]["code"], "abandoned", "{shown:?}");
    assert!(shown.json()[0]["error"]["message"].as_str().unwrap().contains("was removed again"), "{shown:?}");
    assert_eq!((case.roles().await, case.calls(ROTATE).await), (vec!["CURRENT".to_owned()], 1));
    assert_ne!(id, dead.id.to_string());
    // One that is on its way, and comes to no end.
    case.world.fake.fault(ROTATE, &case.arn, None, json!({"kind": "throttle"})).await;
    case.ask("stuck", json!({})).await;
    case.world
        .until(
            "it is stuck",
            "select count(*) from progress where key_material_id is not null and last_error is not null",
            1,
        )
        .await;
    let ran = case.world.run(&["jobs", "abandon", "stuck", "--yes", "--json"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let job = case.world.failed("stuck", "abandoned").await;
    assert!(job.aws_changed() && sentence(&job).contains("was removed again"), "{}", sentence(&job));
    assert_eq!(case.roles().await, ["CURRENT"]);
    case.world.fake.clear_faults().await;
    // Where a stranger's has taken its place, that stays.
    case.fault(ROTATE, denied).await;
    case.ask("replaced", json!({})).await;
    case.world.failed("replaced", "access_denied").await;
    let own = case.world.fake.show(&case.arn).await["materials"][1]["key_material_id"].clone();
    case.world.fake.stranger_deletes(&case.arn, own.as_str()).await;
    case.stranger_brings().await;
    let ran = case.world.run(&["jobs", "abandon", "replaced", "--yes", "--json"]).await;
    let id = ran.json()["id"].as_str().unwrap().to_owned();
    case.world.look_until("select count(*) from job where id::text = $1 and state = 'failed'", &id).await;
    let shown = case.world.run(&["jobs", "show", &id, "--json"]).await;
    assert!(shown.json()[0]["error"]["message"].as_str().unwrap().contains("no longer"), "{shown:?}");
    assert_eq!(case.roles().await, ["CURRENT", "PENDING_ROTATION"]);
    case.world.finish().await;
}

#[tokio::test]
async fn what_only_waited_and_was_taken_away_ties_no_source_key() {
    let mut case = case(Tuning::default()).await;
    case.world.symmetric_key("spare").await;
    case.fault(ROTATE, json!({"kind": "error", "code": "AccessDeniedException", "message": "ordered by a test"})).await;
    case.ask("dead", json!({"source_key_identifier": "spare"})).await;
    case.world.failed("dead", "access_denied").await;
    let delete = ["keys", "delete", "spare"];
    let ran = case.world.run(&delete).await;
    assert!(ran.code != Some(0) && ran.err.contains("tied"), "it waits: {ran:?}");
    let ran = case.world.run(&["jobs", "abandon", "dead", "--yes", "--json"]).await;
    case.world.run(&["jobs", "wait", ran.json()["id"].as_str().unwrap()]).await;
    // The checker opens every source key.
    case.world.judge().await;
    let shown = case.world.run(&["kms-keys", "show", &case.arn, "--json"]).await;
    assert!(shown.out.contains("spare"), "what was there is still told: {shown:?}");
    let ran = case.world.run(&delete).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
}

#[tokio::test]
async fn a_retry_of_a_rotate_that_brought_nothing_is_no_success() {
    let mut case = case(Tuning::default()).await;
    case.ask("same", json!({"source_key_identifier": "first"})).await;
    case.world.failed("same", "material_not_new").await;
    let ran = case.world.run(&["jobs", "retry", "same", "--json"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let failed = "select count(*) from job where retry_of is not null and error ->> 'code' = 'material_not_new'";
    case.world.until("it fails again", failed, 1).await;
    // There is nothing to take away either.
    let ran = case.world.run(&["jobs", "abandon", "same", "--json"]).await;
    assert!(ran.code != Some(0) && ran.json()["became"] == "ended", "{ran:?}");
    assert_eq!((case.roles().await, case.calls(IMPORT).await), (vec!["CURRENT".to_owned()], 1));
    case.world.finish().await;
}

#[tokio::test]
async fn a_rotate_that_is_only_looked_at_any_more_can_be_abandoned() {
    let mut case = case(Tuning::default()).await;
    let away = json!({"operation": "ListKeyRotations", "key": case.arn, "times": null, "skip": 3,
                      "fault": {"kind": "error", "code": "KMSInternalException", "message": "ordered by a test"}});
    case.world.fake.order(away).await;
    case.ask("r1", json!({})).await;
    case.world.until("AWS was asked to rotate", "select count(*) from progress where imported", 1).await;
    let ran = case.world.run(&["jobs", "abandon", "r1", "--yes", "--json"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let job = case.world.failed("r1", "abandoned").await;
    assert!(job.aws_changed(), "{job:?}");
    // What came into force stays.
    assert_eq!(case.roles().await, ["NON_CURRENT", "CURRENT"]);
    case.world.fake.clear_faults().await;
    // Its retry finds that, and is content.
    let ran = case.world.run(&["jobs", "retry", "r1", "--json"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let succeeded = "select count(*) from job where retry_of is not null and state = 'succeeded'";
    case.world.until("it succeeds", succeeded, 1).await;
    assert_eq!(case.calls(ROTATE).await, 1);
    case.world.finish().await;
}

#[tokio::test]
async fn a_held_key_keeps_what_an_abandoned_rotate_would_take_away() {
    let mut case = case(Tuning::default()).await;
    case.world.fake.fault(ROTATE, &case.arn, None, json!({"kind": "throttle"})).await;
    case.ask("r1", json!({})).await;
    let stuck = "select count(*) from progress where key_material_id is not null and last_error is not null";
    case.world.until("it is stuck", stuck, 1).await;
    let ran = case.world.run(&["hold", "key", &case.arn, "--reason", "a test"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let ran = case.world.run(&["jobs", "abandon", "r1", "--yes", "--json"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    case.world.until("the line is parked", "select count(*) from line where parked_by is not null", 1).await;
    assert_eq!(case.roles().await, ["CURRENT", "PENDING_ROTATION"]);
    let ran = case.world.run(&["release", "key", &case.arn]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let job = case.world.failed("r1", "abandoned").await;
    assert!(sentence(&job).contains("was removed again"), "{}", sentence(&job));
    assert_eq!(case.roles().await, ["CURRENT"]);
    case.world.finish().await;
}

#[tokio::test]
async fn a_rotation_that_may_still_come_is_not_overtaken_by_its_own_removal() {
    let mut case = case(Tuning { signature_life_ms: 60_000, aws_timeout_ms: 1_000, ..Tuning::default() }).await;
    case.fault(ROTATE, json!({"kind": "late", "hang_ms": 3_000})).await;
    case.ask("r1", json!({})).await;
    case.world.fake.pending_late(1, &case.arn).await;
    let waits = "select count(*) from line where late_until is not null and token is null and due_at = late_until";
    case.world.until("it waits", waits, 1).await;
    let ran = case.world.run(&["jobs", "abandon", "r1", "--yes", "--json"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    case.world.until("it waits again", waits, 1).await;
    // It comes: nothing that is in force is taken away.
    case.world.fake.release_late().await;
    case.world.db.advance(Duration::from_secs(61)).await;
    let job = case.world.failed("r1", "abandoned").await;
    assert!(sentence(&job).contains("come into force"), "{}", sentence(&job));
    assert_eq!(case.roles().await, ["NON_CURRENT", "CURRENT"]);
    case.world.finish().await;
}
