//! What operators do to jobs that wait: urgent deletes, cancellations, holds.

use crate::support::snapshot::Job;
use crate::support::world::{Tuning, World, request};
use serde_json::{Value, json};

const IMPORT: &str = "ImportKeyMaterial";
const DELETE: &str = "DeleteImportedKeyMaterial";

/// A worker, a source key, a KMS key.
struct Case {
    world: World,
    arn: String,
}

async fn case(tuning: Tuning) -> Case {
    let mut world = World::new(tuning).await;
    world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    world.serve().await;
    Case { world, arn }
}

impl Case {
    async fn import(&mut self, id: &str) {
        self.import_with(id, json!({})).await;
    }

    async fn import_with(&mut self, id: &str, mut more: Value) {
        more["source_key_identifier"] = json!("payroll");
        self.world.publish(request(id, &self.arn, more)).await;
    }

    async fn urgent(&mut self, id: &str) {
        self.world.publish(request(id, &self.arn, json!({"operation": "delete", "urgent": true}))).await;
    }

    async fn accepted(&self, count: i64) {
        self.world.until("the jobs are accepted", "select count(*) from job", count).await;
    }

    async fn calls(&self, operation: &str) -> usize {
        self.world.fake.journal(&format!("key={}&operation={operation}", self.arn)).await.len()
    }

    async fn is_imported(&self) -> bool {
        let key = self.world.fake.show(&self.arn).await;
        key["materials"].as_array().unwrap().iter().any(|held| held["imported"] == true)
    }
}

fn error(code: &str) -> Value {
    json!({"kind": "error", "code": code, "message": "ordered by a test"})
}

fn before(first: &Job, second: &Job) -> bool {
    first.finished_at.unwrap() < second.finished_at.unwrap()
}

#[tokio::test]
async fn urgent_deletes_overtake_fifty_waiting_imports_in_their_own_order() {
    let mut case = case(Tuning::default()).await;
    case.import("r0").await;
    case.world.succeeded("r0").await;
    // The line stands at its first import, which has not changed anything yet.
    case.world.fake.fault("GetParametersForImport", &case.arn, Some(1), json!({"kind": "hold"})).await;
    for number in 1..=50 {
        case.import(&format!("r{number}")).await;
    }
    case.world.fake.held(1, "GetParametersForImport", &case.arn).await;
    for number in 1..=3 {
        case.urgent(&format!("u{number}")).await;
    }
    case.accepted(54).await;
    case.world.fake.release(&case.arn).await;
    let urgent = [case.world.succeeded("u1").await, case.world.succeeded("u2").await, case.world.succeeded("u3").await];
    let last = case.world.succeeded("r50").await;
    let second = case.world.succeeded("r2").await;
    assert!(before(&urgent[0], &urgent[1]) && before(&urgent[1], &urgent[2]) && before(&urgent[2], &second));
    assert!(before(&second, &last) && case.is_imported().await);
    let told = &case.world.events_of("u1").await[0];
    assert_eq!(told["sequence"], format!("{:020}", urgent[0].seq.unwrap()), "its place, not its turn");
    case.world.finish().await;
}

#[tokio::test]
async fn an_urgent_delete_waits_while_the_heads_import_is_in_doubt() {
    let mut case = case(Tuning::hasty()).await;
    // No answer comes, and the next attempts cannot even look.
    case.world.fake.fault(IMPORT, &case.arn, Some(1), json!({"kind": "hold"})).await;
    case.import("r1").await;
    case.import("r2").await;
    case.world.fake.held(1, IMPORT, &case.arn).await;
    case.world.fake.fault("DescribeKey", &case.arn, None, error("KMSInternalException")).await;
    case.urgent("u").await;
    case.accepted(3).await;
    let doubt = "select count(*) from progress join job on job.id = job_id where in_doubt and request_id = 'r1'";
    case.world.until("the first is in doubt", doubt, 1).await;
    case.world
        .until("it is tried again", "select count(*) from progress where last_error ->> 'step' = 'DescribeKey'", 1)
        .await;
    assert_eq!((case.calls(DELETE).await, case.world.job("u").await.unwrap().attempts), (0, 0));
    case.world.fake.release(&case.arn).await;
    case.world.fake.clear_faults().await;
    let (first, urgent) = (case.world.succeeded("r1").await, case.world.succeeded("u").await);
    let second = case.world.succeeded("r2").await;
    assert!(before(&first, &urgent) && before(&urgent, &second));
    case.world.finish().await;
}

#[tokio::test]
async fn an_urgent_delete_does_not_wait_for_a_heads_long_back_off() {
    let mut case = case(Tuning::default()).await;
    case.import("r0").await;
    case.world.succeeded("r0").await;
    case.world.fake.fault("GetParametersForImport", &case.arn, None, json!({"kind": "throttle"})).await;
    case.import("r1").await;
    let throttled = "select count(*) from progress where last_error ->> 'class' = 'throttled'";
    case.world.until("the head waits", throttled, 1).await;
    // Longer than any test is patient.
    let far = "update line set due_at = keyferry_now() + interval '1 h' where token is null";
    crate::support::eventually("the head waits for an hour", || async {
        (case.world.client.execute(far, &[]).await.unwrap() == 1).then_some(())
    })
    .await;
    case.urgent("u").await;
    let urgent = case.world.succeeded("u").await;
    assert!(urgent.attempts == 1 && !case.is_imported().await);
    case.world.fake.clear_faults().await;
    let waits = "select count(*) from line where due_at > keyferry_now() + interval '50 min'";
    assert_eq!(case.world.count(waits).await, 1, "the head waits as it was to");
    case.world.db.advance(std::time::Duration::from_secs(3_600)).await;
    case.world.succeeded("r1").await;
    case.world.finish().await;
}

/// Dies with an urgent delete half done; the successor ends it, and only then the line's own jobs.
#[tokio::test]
async fn a_worker_dies_over_an_urgent_delete() {
    for failpoint in ["worker.after_claim", "worker.after_prepare", "worker.after_answer", "worker.after_settle"] {
        let mut case = case(Tuning::hasty()).await;
        case.import("r0").await;
        case.world.succeeded("r0").await;
        case.world.workers[0].stop().await;
        case.import("r1").await;
        case.urgent("u").await;
        let dying = case.world.start(&format!("{failpoint}=return")).await;
        assert!(case.world.workers[dying].aborted().await, "{failpoint}");
        case.world.serve().await;
        case.world.succeeded("u").await;
        case.world.succeeded("r1").await;
        case.world.finish().await;
    }
}
