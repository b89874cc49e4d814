//! `keyferry jobs abandon`: what cannot be settled is given up, and the line goes on.

use crate::support::world::{Tuning, World, request};
use serde_json::{Value, json};

const IMPORT: &str = "ImportKeyMaterial";

fn named(more: &Value) -> Value {
    let mut all = json!({"source_key_identifier": "payroll"});
    all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    all
}

/// A job whose import is not answered, and after which nobody may look at the key.
async fn in_doubt() -> (World, String) {
    let mut world = World::with_worker(Tuning::hasty()).await;
    world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    world.fake.fault(IMPORT, &arn, Some(1), json!({"kind": "hold"})).await;
    world.publish(request("r1", &arn, named(&json!({})))).await;
    world.publish(request("r2", &arn, named(&json!({})))).await;
    world.publish(request("d", &arn, json!({"operation": "delete"}))).await;
    world.fake.held(1, IMPORT, &arn).await;
    let fault = json!({"kind": "error", "code": "KMSInternalException", "message": "ordered by a test"});
    world.fake.fault("DescribeKey", &arn, None, fault).await;
    let looked = "select count(*) from progress where in_doubt and last_error ->> 'step' = 'DescribeKey'";
    world.until("the job is in doubt", looked, 1).await;
    (world, arn)
}

#[tokio::test]
async fn a_job_in_doubt_is_given_up_and_its_line_goes_on() {
    let (world, arn) = in_doubt().await;
    assert_eq!(world.run(&["jobs", "cancel", "r1"]).await.code, Some(0));
    let asked = world.run(&["jobs", "abandon", "r1", "--json"]).await;
    assert!(asked.code == Some(1) && asked.err.contains("not_confirmed"), "{asked:?}");
    assert_eq!(world.job("r1").await.unwrap().state, "waiting");
    // At once, or between two of its steps, as it happens to wait or to be looked at.
    let ran = world.run(&["jobs", "abandon", "r1", "--yes", "--json"]).await;
    let became = ran.json()["became"].clone();
    assert!(ran.code == Some(0) && (became == "abandoned" || became == "requested"), "{ran:?}");
    let job = world.failed("r1", "abandoned").await;
    assert!(job.aws_changed());
    assert_eq!(world.count("select count(*) from kms_material where imported_at is null").await, 1);
    let in_use = world.run(&["keys", "delete", "payroll"]).await;
    assert_eq!(in_use.code, Some(1), "{in_use:?}");
    // The import takes effect after all; the same again is no contradiction.
    world.fake.release(&arn).await;
    world.fake.clear_faults().await;
    world.succeeded("r2").await;
    world.succeeded("d").await;
    let again = world.run(&["jobs", "abandon", "r1", "--json"]).await;
    assert!(again.code == Some(0) && again.json()["became"] == "abandoned", "{again:?}");
    let late = world.run(&["jobs", "abandon", "r2", "--yes", "--json"]).await;
    assert!(late.code == Some(1) && late.json()["became"] == "ended", "{late:?}");
    let nobody = world.run(&["jobs", "abandon", "nobody", "--yes", "--json"]).await;
    assert!(nobody.code == Some(1) && nobody.err.contains("job_unknown"), "{nobody:?}");
    let retried = world.run(&["jobs", "retry", "r1", "--json"]).await;
    assert_eq!(retried.code, Some(0), "{retried:?}");
    world.until("all have ended", "select count(*) from job where state = 'succeeded'", 3).await;
    world.finish().await;
}

/// A delete behind it would contradict the import that may still take effect: it waits until that cannot be any more.
#[tokio::test]
async fn the_line_stays_closed_to_what_would_contradict() {
    let (world, arn) = in_doubt().await;
    assert_eq!(world.run(&["jobs", "cancel", "r2"]).await.code, Some(0));
    let ran = world.run(&["jobs", "abandon", "r1", "--yes"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    world.failed("r1", "abandoned").await;
    let closed = world.client.query_one("select late_until from line", &[]).await.unwrap();
    let until: time::OffsetDateTime = closed.get(0);
    world.fake.clear_faults().await;
    let deleted = world.succeeded("d").await;
    assert!(deleted.finished_at.unwrap() > until, "{deleted:?} before {until}");
    let shown = world.run(&["kms-keys", "show", &arn]).await;
    assert!(shown.code == Some(0) && shown.out.contains("may be there"), "{shown:?}");
}
