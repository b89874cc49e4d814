//! Deletes of imported material: what is meant, what is repeated, what is left alone.

use crate::materials::{Rotated, rotated, sentence};
use crate::support::fake::WORKER;
use crate::support::world::{Tuning, World, random, request};
use aws_sdk_kms::types::ImportType;
use serde_json::{Value, json};
use std::time::Duration;
use time::format_description::well_known::Rfc3339;

const DELETE: &str = "DeleteImportedKeyMaterial";

fn delete(mut more: Value) -> Value {
    more["operation"] = "delete".into();
    more
}

fn error(code: &str) -> Value {
    json!({"kind": "error", "code": code, "message": "ordered by a test"})
}

impl Rotated {
    async fn deletions(&self) -> Vec<Value> {
        let calls = self.world.fake.journal(&format!("key={}&operation={DELETE}", self.arn)).await;
        calls.into_iter().filter(|call| call["access_key"] == WORKER).collect()
    }

    async fn is_there(&self, id: &str) -> bool {
        self.shown(id).await["imported"] == true
    }
}

#[tokio::test]
async fn the_material_in_force_goes_and_the_source_key_stays() {
    let mut case = rotated(Tuning::default()).await;
    case.ask("d1", delete(json!({"expect_current_material": case.new}))).await;
    let result = case.world.succeeded("d1").await.result.unwrap();
    assert_eq!(result["key_material_ids"], json!([case.new]));
    assert_eq!(result["aws_param"]["KeyState"], "PendingImport");
    assert!(!case.is_there(&case.new).await && case.is_there(&case.old).await);
    let events = case.world.events_of("d1").await;
    assert_eq!(events[0]["data"]["job"]["operation"], "delete");
    let last = case.world.events().await.last().unwrap();
    assert!(last.routing_key.starts_with("job.succeeded.delete."), "{}", last.routing_key);
    // It stays tied to the key, so its bytes must not be lost.
    let ran = case.world.run(&["keys", "delete", "new"]).await;
    assert!(ran.code != Some(0) && ran.err.contains("is tied to"), "{ran:?}");
    // And it comes back by its source key.
    case.ask("back", json!({"source_key_identifier": "new"})).await;
    case.world.succeeded("back").await;
    assert_eq!(case.state().await, "Enabled");
    case.world.finish().await;
}

#[tokio::test]
async fn one_by_its_id_or_all_of_them() {
    let mut case = rotated(Tuning::default()).await;
    case.ask("one", delete(json!({"key_material_id": case.old}))).await;
    assert_eq!(case.world.succeeded("one").await.result.unwrap()["key_material_ids"], json!([case.old]));
    assert!(!case.is_there(&case.old).await && case.is_there(&case.new).await);
    // What is gone already is deleted once more, which does nothing.
    case.ask("all", delete(json!({"scope": "all"}))).await;
    assert_eq!(case.world.succeeded("all").await.result.unwrap()["key_material_ids"], json!([case.new, case.old]));
    assert!(!case.is_there(&case.new).await);
    let named: Vec<Value> = case.deletions().await.iter().map(|call| call["outcome"].clone()).collect();
    assert_eq!(named, ["ok", "ok", "ok"]);
    case.ask("again", delete(json!({}))).await;
    case.world.succeeded("again").await;
    case.world.finish().await;
}

#[tokio::test]
async fn material_that_waits_for_its_rotation_is_left_alone() {
    let mut case = rotated(Tuning::default()).await;
    let bytes = random(32);
    let pending =
        case.world.fake.stranger_imports_as(&case.arn, &bytes, Some(ImportType::NewKeyMaterial), None).await.unwrap();
    case.ask("pending", delete(json!({"key_material_id": pending}))).await;
    assert!(!case.world.failed("pending", "material_pending").await.aws_changed());
    // Also when somebody has made it known to Keyferry meanwhile.
    case.world.import_key("pending", "SYMMETRIC_DEFAULT", &bytes).await;
    case.ask("known", json!({"source_key_identifier": "pending", "key_material_id": pending})).await;
    case.world.succeeded("known").await;
    case.ask("pending-again", delete(json!({"key_material_id": pending}))).await;
    case.world.failed("pending-again", "material_pending").await;
    case.ask("all", delete(json!({"scope": "all"}))).await;
    case.world.succeeded("all").await;
    assert!(case.is_there(&pending).await);
    case.world.finish().await;
}

#[tokio::test]
async fn every_kind_and_state_that_aws_lets_give_up_material() {
    let mut world = World::with_worker(Tuning::default()).await;
    let stranger = world.fake.stranger("eu-central-1");
    let arns = world.fake.seed(json!({"count": 4})).await;
    let mac = world.fake.seed(json!({"spec": "HMAC_512"})).await.remove(0);
    for (number, arn) in arns[1..].iter().chain([&mac]).enumerate() {
        world.publish(request(&format!("i{number}"), arn, json!({}))).await;
    }
    for number in 0..4 {
        world.succeeded(&format!("i{number}")).await;
    }
    stranger.disable_key().key_id(&arns[2]).send().await.unwrap();
    stranger.schedule_key_deletion().key_id(&arns[3]).pending_window_in_days(7).send().await.unwrap();
    for (id, arn) in
        [("never", &arns[0]), ("enabled", &arns[1]), ("disabled", &arns[2]), ("dying", &arns[3]), ("mac", &mac)]
    {
        world.publish(request(id, arn, delete(json!({})))).await;
    }
    for (id, arn) in
        [("never", &arns[0]), ("enabled", &arns[1]), ("disabled", &arns[2]), ("dying", &arns[3]), ("mac", &mac)]
    {
        world.succeeded(id).await;
        let shown = world.fake.show(arn).await;
        let materials = shown["materials"].as_array().unwrap();
        assert!(materials.iter().all(|held| held["imported"] == false), "{id}: {shown:#}");
    }
    let ours = world.fake.seed(json!({"origin": "AWS_KMS"})).await.remove(0);
    world.publish(request("ours", &ours, delete(json!({})))).await;
    assert!(!world.failed("ours", "key_not_external").await.aws_changed());
    world.finish().await;
}

#[tokio::test]
async fn a_key_that_has_no_such_material_is_looked_at_for_a_while() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arn = world.fake.key().await;
    world.publish(request("i", &arn, json!({}))).await;
    world.succeeded("i").await;
    world.publish(request("d", &arn, delete(json!({"key_material_id": "ab".repeat(32)})))).await;
    let job = world.failed_after_looking("d", "material_unknown").await;
    assert!(!job.aws_changed() && job.attempts > 5, "{job:?}");
    world.finish().await;
}

#[tokio::test]
async fn a_lost_answer_is_repaired_by_the_same_delete() {
    let mut case = rotated(Tuning::default()).await;
    case.world.fake.fault(DELETE, &case.arn, Some(1), json!({"kind": "lose_answer"})).await;
    case.ask("d", delete(json!({}))).await;
    let job = case.world.succeeded("d").await;
    assert_eq!(job.attempts, 2);
    assert_eq!(case.deletions().await.len(), 2);
    case.world.finish().await;
}

/// Its answer lost and without effect, and the key rotated before the next attempt: `current` is another by now.
#[tokio::test]
async fn what_is_meant_is_committed_before_the_first_call() {
    let mut case = rotated(Tuning::hasty()).await;
    let third = random(32);
    case.world.fake.stranger_imports_as(&case.arn, &third, Some(ImportType::NewKeyMaterial), None).await;
    case.world.fake.fault(DELETE, &case.arn, Some(1), json!({"kind": "hold"})).await;
    case.ask("d", delete(json!({}))).await;
    case.world.fake.held(1, DELETE, &case.arn).await;
    case.world.fake.stranger_rotates(&case.arn).await;
    let third = case.world.fake.show(&case.arn).await["current_key_material_id"].as_str().unwrap().to_owned();
    assert_ne!(third, case.new);
    // The client gives up waiting; what is held takes effect late.
    let result = case.world.succeeded("d").await.result.unwrap();
    case.world.fake.release(&case.arn).await;
    assert_eq!(result["key_material_ids"], json!([case.new]));
    assert!(case.is_there(&third).await, "what came later is not what was meant");
    assert!(!case.is_there(&case.new).await);
    case.world.finish().await;
}

#[tokio::test]
async fn a_delete_of_many_that_breaks_off_goes_on_or_says_that_aws_was_changed() {
    let mut case = rotated(Tuning::default()).await;
    case.world.fake.fault_after(DELETE, &case.arn, 1, json!({"kind": "throttle"})).await;
    case.ask("throttled", delete(json!({"scope": "all"}))).await;
    let job = case.world.succeeded("throttled").await;
    assert_eq!(job.attempts, 2);
    assert_eq!(case.deletions().await.len(), 3, "what AWS has answered is not deleted again");
    for (id, name) in [(case.old.clone(), "old"), (case.new.clone(), "new")] {
        assert!(!case.is_there(&id).await);
        case.ask(&format!("back-{name}"), json!({"key_material_id": id})).await;
        case.world.succeeded(&format!("back-{name}")).await;
    }
    case.world.fake.fault_after(DELETE, &case.arn, 1, error("AccessDeniedException")).await;
    case.ask("denied", delete(json!({"scope": "all"}))).await;
    let job = case.world.failed("denied", "access_denied").await;
    assert!(job.aws_changed() && sentence(&job).contains("kms:DeleteImportedKeyMaterial"), "{job:?}");
    // What was deleted is on record as that, although the job failed.
    let removed = "select key_material_id from kms_material where removed_at is not null";
    let removed: String = case.world.client.query_one(removed, &[]).await.unwrap().get(0);
    assert_eq!(removed, case.new);
    case.world.finish().await;
}

/// What AWS says to the deletion of a material that is not there is not known; it is not this job's failure.
#[tokio::test]
async fn a_refusal_to_delete_what_is_gone_is_no_failure() {
    let mut case = rotated(Tuning::default()).await;
    case.world.fake.stranger_deletes(&case.arn, Some(&case.old.clone())).await;
    for (id, code) in [("n", "NotFoundException"), ("s", "KMSInvalidStateException")] {
        case.world.fake.fault(DELETE, &case.arn, None, error(code)).await;
        case.ask(id, delete(json!({"key_material_id": case.old}))).await;
        // The same answers come while AWS has not caught up with itself: absence is believed when it lasts.
        let job = case.world.ended_after_looking(id).await;
        assert!(job.state == "succeeded" && job.attempts >= 15, "{job:?}");
        case.world.fake.clear_faults().await;
    }
    // What is there and cannot be deleted is that job's failure.
    case.world.fake.fault(DELETE, &case.arn, None, error("KMSInvalidStateException")).await;
    case.ask("there", delete(json!({"key_material_id": case.new}))).await;
    case.world.failed_after_looking("there", "key_invalid_state").await;
    case.world.fake.clear_faults().await;
    case.world.finish().await;
}

#[tokio::test]
async fn what_aws_forbids_or_breaks_is_retried_or_ended() {
    let mut case = rotated(Tuning::default()).await;
    case.world.fake.fault(DELETE, &case.arn, Some(1), error("AccessDeniedException")).await;
    case.ask("denied", delete(json!({}))).await;
    assert!(!case.world.failed("denied", "access_denied").await.aws_changed());
    case.world.fake.fault(DELETE, &case.arn, Some(1), error("KMSInternalException")).await;
    case.ask("broken", delete(json!({}))).await;
    assert_eq!(case.world.succeeded("broken").await.attempts, 2);
    case.world.finish().await;
}

#[tokio::test]
async fn a_late_delete_keeps_the_line_closed_to_an_import_and_the_other_way_round() {
    let mut case = rotated(Tuning { signature_life_ms: 600_000, ..Tuning::hasty() }).await;
    case.world.fake.fault(DELETE, &case.arn, Some(1), json!({"kind": "late", "hang_ms": 5_000})).await;
    case.ask("d", delete(json!({}))).await;
    case.world.fake.pending_late(1, &case.arn).await;
    case.ask("back", json!({"source_key_identifier": "new"})).await;
    case.world.succeeded("d").await;
    case.world.until("the line is closed", crate::aws_errors::CLOSED, 1).await;
    assert_eq!(case.world.job("back").await.unwrap().state, "waiting");
    assert_eq!(case.world.fake.release_late().await, 1);
    case.world.db.advance(Duration::from_secs(600)).await;
    case.world.succeeded("back").await;
    assert!(case.is_there(&case.new).await, "the late effect did not undo the later job");
    case.world.fake.options(json!({"single_use_tokens": false})).await;
    case.world.fake.fault("ImportKeyMaterial", &case.arn, Some(1), json!({"kind": "late", "hang_ms": 5_000})).await;
    case.ask("import", json!({"source_key_identifier": "new"})).await;
    case.world.fake.pending_late(1, &case.arn).await;
    case.ask("d2", delete(json!({}))).await;
    case.world.succeeded("import").await;
    case.world.until("the line is closed", crate::aws_errors::CLOSED, 1).await;
    assert_eq!(case.world.fake.release_late().await, 1);
    case.world.db.advance(Duration::from_secs(600)).await;
    case.world.succeeded("d2").await;
    assert!(!case.is_there(&case.new).await);
    case.world.finish().await;
}

/// The second of two materials is throttled past the deadline; what was never sent is not sent any more.
#[tokio::test]
async fn after_its_deadline_a_delete_begins_nothing() {
    let mut case = rotated(Tuning::default()).await;
    let order = json!({"operation": DELETE, "key": case.arn, "skip": 1, "fault": {"kind": "throttle"}});
    case.world.fake.order(order).await;
    let deadline = (case.world.now().await + time::Duration::hours(1)).format(&Rfc3339).unwrap();
    case.ask("d", delete(json!({"scope": "all", "deadline": deadline}))).await;
    let throttled = "select count(*) from progress where deleted_ids <> '{}' and not in_doubt";
    case.world.until("the first is gone", throttled, 1).await;
    case.world.fake.clear_faults().await;
    case.world.db.advance(Duration::from_secs(7_200)).await;
    let job = case.world.ended("d").await;
    // The worker may have been just about to try again when the faults were lifted.
    if job.state == "failed" {
        assert!(job.code() == "deadline_exceeded" && job.aws_changed(), "{job:?}");
        assert!(!case.is_there(&case.new).await && case.is_there(&case.old).await);
    }
    case.world.finish().await;
}

/// AWS has deleted the first of two, and somebody brings it back before the job goes on.
#[tokio::test]
async fn what_was_deleted_and_brought_back_is_not_deleted_again() {
    let mut case = rotated(Tuning::default()).await;
    let order = json!({"operation": DELETE, "key": case.arn, "skip": 1, "fault": {"kind": "throttle"}});
    case.world.fake.order(order).await;
    case.ask("d", delete(json!({"scope": "all"}))).await;
    let throttled = "select count(*) from progress where deleted_ids <> '{}'";
    case.world.until("the first is gone", throttled, 1).await;
    let bytes = case.new_bytes.clone();
    case.world.fake.stranger_imports_as(&case.arn, &bytes, Some(ImportType::ExistingKeyMaterial), None).await;
    case.world.fake.clear_faults().await;
    let expected = "select count(*) from progress where last_error ->> 'step' = 'verify'";
    case.world.until("the job sees that one of the two is there", expected, 1).await;
    assert!(case.is_there(&case.new).await && !case.is_there(&case.old).await);
    // It goes on looking: what it was asked for is not so. Whoever brought it back takes it away again.
    let new = case.new.clone();
    case.world.fake.stranger_deletes(&case.arn, Some(&new)).await;
    case.world.succeeded("d").await;
    assert_eq!(case.deletions().await.iter().filter(|call| call["outcome"] == "ok").count(), 2);
    case.world.finish().await;
}

/// Death at each boundary of a delete, one after the other; the successor ends it.
#[tokio::test]
async fn a_worker_that_dies_leaves_a_delete_that_another_ends() {
    for failpoint in ["worker.after_claim", "worker.after_prepare", "worker.after_answer", "worker.after_delete"] {
        let mut world = World::new(Tuning::hasty()).await;
        let arn = world.fake.key().await;
        world.serve().await;
        world.publish(request("i", &arn, json!({}))).await;
        world.succeeded("i").await;
        world.workers[0].stop().await;
        world.publish(request("d", &arn, delete(json!({"scope": "all"})))).await;
        let first = world.start(&format!("{failpoint}=return")).await;
        assert!(world.workers[first].aborted().await, "{failpoint} did not end the worker");
        world.serve().await;
        world.succeeded("d").await;
        assert_eq!(world.fake.show(&arn).await["state"], "PendingImport", "{failpoint}");
        world.finish().await;
    }
}
