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

    /// The job that has sent an import cannot even look whether it took effect.
    async fn is_left_in_doubt(&self) {
        self.world.fake.fault("DescribeKey", &self.arn, None, error("KMSInternalException")).await;
        let looked = "select count(*) from progress where in_doubt and last_error ->> 'step' = 'DescribeKey'";
        self.world.until("the job is in doubt", looked, 1).await;
    }

    /// The head waits for longer than any test is patient.
    async fn stands_still(&self) {
        let far = "update line set due_at = keyferry_now() + interval '1 h' where token is null
                   and exists (select from progress)";
        crate::support::eventually("the head waits for an hour", || async {
            (self.world.client.execute(far, &[]).await.unwrap() == 1).then_some(())
        })
        .await;
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
    case.urgent("u").await;
    case.accepted(3).await;
    case.is_left_in_doubt().await;
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
    case.stands_still().await;
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

#[tokio::test]
async fn jobs_are_cancelled_by_the_command() {
    let mut case = case(Tuning::default()).await;
    case.world.fake.fault("GetParametersForImport", &case.arn, Some(1), json!({"kind": "hold"})).await;
    for id in ["r1", "r2", "r3", "r4"] {
        case.import(id).await;
    }
    let ahead = (case.world.now().await + time::Duration::hours(1)).replace_nanosecond(0).unwrap();
    let ahead = ahead.format(&time::format_description::well_known::Rfc3339).unwrap();
    case.import_with("later", json!({"not_before": ahead})).await;
    case.world.publish(request("refused", "nonsense", json!({}))).await;
    case.world.fake.held(1, "GetParametersForImport", &case.arn).await;
    case.accepted(5).await;
    case.world.refused(1).await;
    let r3 = case.world.job("r3").await.unwrap().id.to_string();
    let ran = case.world.run(&["jobs", "cancel", "r1", "r2", &r3, "later", "--json"]).await;
    let became: Vec<Value> = ran.json().as_array().unwrap().iter().map(|line| line["became"].clone()).collect();
    assert!(ran.code == Some(0) && became == ["requested", "cancelled", "cancelled", "cancelled"], "{ran:?}");
    for id in ["r2", "r3", "later"] {
        assert!(!case.world.failed(id, "cancelled").await.aws_changed());
    }
    assert_eq!(case.world.events_of("r2").await.len(), 1);
    case.world.fake.release(&case.arn).await;
    let first = case.world.failed("r1", "cancelled").await;
    assert!(!first.aws_changed() && case.calls(IMPORT).await <= 1, "it ended before its import");
    case.world.succeeded("r4").await;
    let ran = case.world.run(&["jobs", "cancel", "r1", "r4", "refused", "nobody"]).await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    for said in ["cancelled before", "it had succeeded before", "was refused", "no job has this id"] {
        assert!(ran.out.contains(said), "{said}: {ran:?}");
    }
    assert_eq!(case.world.run(&["jobs", "cancel", "r1"]).await.code, Some(0), "once more does no harm");
    assert_eq!(case.world.run(&["jobs", "cancel"]).await.code, Some(2));
    case.world.finish().await;
}

#[tokio::test]
async fn a_cancelled_job_in_doubt_is_settled_first() {
    let mut case = case(Tuning::hasty()).await;
    case.world.fake.fault(IMPORT, &case.arn, Some(1), json!({"kind": "hold"})).await;
    case.import("r1").await;
    case.import("r2").await;
    case.world.fake.held(1, IMPORT, &case.arn).await;
    case.accepted(2).await;
    case.is_left_in_doubt().await;
    let ran = case.world.run(&["jobs", "cancel", "r1"]).await;
    assert!(ran.code == Some(0) && ran.out.contains("requested"), "{ran:?}");
    case.world.fake.release(&case.arn).await;
    case.world.fake.clear_faults().await;
    // What it sent has taken effect: the truth is that it succeeded.
    case.world.succeeded("r1").await;
    case.world.succeeded("r2").await;
    case.world.finish().await;
}

#[tokio::test]
async fn a_delete_of_many_is_cancelled_between_two_calls() {
    let mut case = crate::materials::rotated(Tuning::default()).await;
    case.world.fake.fault(DELETE, &case.arn, Some(1), json!({"kind": "hold"})).await;
    case.ask("d", json!({"operation": "delete", "scope": "all"})).await;
    case.world.fake.held(1, DELETE, &case.arn).await;
    assert_eq!(case.world.run(&["jobs", "cancel", "d"]).await.code, Some(0));
    case.world.fake.release(&case.arn).await;
    let job = case.world.failed("d", "cancelled").await;
    assert!(job.aws_changed());
    let shown = case.shown(&case.old.clone()).await;
    assert!(shown["imported"] == true && case.shown(&case.new.clone()).await["imported"] == false);
    case.world.finish().await;
}

/// A batch on one key, the command killed in the middle and given again.
#[tokio::test]
async fn a_batch_is_cancelled_listed_and_waited_for() {
    let mut case = case(Tuning::default()).await;
    case.world.fake.fault("GetParametersForImport", &case.arn, None, json!({"kind": "throttle"})).await;
    case.import("first").await;
    case.stands_still().await;
    for number in 0..450 {
        case.import_with(&format!("b{number}"), json!({"batch": "night"})).await;
    }
    case.import("last").await;
    case.accepted(452).await;
    let waiting = case.world.run(&["jobs", "wait", "--batch", "night", "--timeout", "1s"]).await;
    assert!(waiting.code == Some(4) && waiting.out.contains("450"), "{waiting:?}");
    let killed = case
        .world
        .run_with(&["jobs", "cancel", "--batch", "night"], &[("FAILPOINTS", "cancel.after_page=return")], "")
        .await;
    assert_eq!(killed.code, None, "{killed:?}");
    let ended = "select count(*) from job where error ->> 'code' = 'cancelled'";
    assert_eq!(case.world.count(ended).await, 200);
    let ran = case.world.run(&["jobs", "cancel", "--batch", "night", "--json"]).await;
    let told = json!({"batch": "night", "cancelled": 250, "requested": 0, "ended": 0, "unreadable": 0});
    assert_eq!(ran.json(), told, "{ran:?}");
    let waited = case.world.run(&["jobs", "wait", "--batch", "night", "--json"]).await;
    assert_eq!(waited.json(), json!([{"state": "failed", "code": "cancelled", "count": 450}]));
    assert_eq!(waited.code, Some(3));
    let listed = case.world.run(&["jobs", "list", "--batch", "night", "--limit", "500", "--json"]).await;
    assert_eq!(listed.json().as_array().unwrap().len(), 450);
    case.world.fake.clear_faults().await;
    case.world.db.advance(std::time::Duration::from_secs(3_600)).await;
    case.world.succeeded("last").await;
    assert_eq!(case.world.run(&["jobs", "cancel", "--batch", "nobody"]).await.code, Some(1));
    case.world.finish().await;
}

#[tokio::test]
async fn a_hold_stops_jobs_under_way_in_all_workers_until_it_is_released() {
    let mut case = case(Tuning::default()).await;
    case.world.serve().await;
    let arns = case.world.fake.seed(json!({"count": 12})).await;
    // One stands before its import.
    case.world.fake.fault("GetParametersForImport", &case.arn, Some(1), json!({"kind": "hold"})).await;
    case.import("under-way").await;
    case.world.fake.held(1, "GetParametersForImport", &case.arn).await;
    let ran = case.world.run(&["hold", "everything", "--reason", "an incident", "--json"]).await;
    assert!(ran.code == Some(0) && ran.json()["under_way"] == 1, "{ran:?}");
    let uid = rustix::process::getuid().as_raw();
    assert_eq!(
        ran.json()["held"]["by"],
        format!("tester (uid {uid})"),
        "the name is the environment's, the number is not"
    );
    case.world.fake.release(&case.arn).await;
    for (number, arn) in arns.iter().enumerate() {
        let more = json!({"source_key_identifier": "payroll", "dry_run": number % 3 == 0});
        case.world.publish(request(&format!("r{number}"), arn, more)).await;
    }
    case.accepted(13).await;
    case.world.until("every line is parked", "select count(*) from line where parked_by is not null", 13).await;
    assert_eq!(case.world.fake.journal("operation=ImportKeyMaterial").await.len(), 0);
    assert_eq!(case.world.fake.journal(&format!("key={}", arns[0])).await.len(), 0, "a dry run is held as well");
    let listed = case.world.run(&["hold", "list"]).await;
    assert!(listed.out.contains("an incident") && listed.out.contains("tester"), "{listed:?}");
    crate::support::eventually("the workers say so", || async {
        let held =
            case.world.workers[0].metric("keyferry_holds").await + case.world.workers[1].metric("keyferry_holds").await;
        (held > 1.5 && case.world.workers.iter().all(|worker| worker.log().contains("\"held\""))).then_some(())
    })
    .await;
    let again = case.world.run(&["hold", "everything"]).await;
    assert!(again.code == Some(0) && again.out.contains("already"), "{again:?}");
    assert_eq!(case.world.run(&["release", "account", "111122223333"]).await.code, Some(1));
    let released = case.world.run(&["release", "everything"]).await;
    assert!(released.code == Some(0) && released.out.contains("is released"), "{released:?}");
    case.world.succeeded("under-way").await;
    for number in 0..arns.len() {
        case.world.succeeded(&format!("r{number}")).await;
    }
    case.world.finish().await;
}

/// A worker dies over a held line, and the command that releases dies before it has woken anything.
#[tokio::test]
async fn deaths_lose_no_held_line() {
    let mut case = case(Tuning::hasty()).await;
    let key = case.arn.clone();
    assert_eq!(case.world.run(&["hold", "key", &key]).await.code, Some(0));
    for id in ["r1", "r2"] {
        case.import(id).await;
    }
    case.accepted(2).await;
    case.world.until("the line is parked", "select count(*) from line where parked_by is not null", 1).await;
    case.world.workers[0].kill();
    let killed =
        case.world.run_with(&["release", "key", &key], &[("FAILPOINTS", "release.after_commit=return")], "").await;
    assert_eq!(killed.code, None, "{killed:?}");
    assert_eq!(case.world.count("select count(*) from line where parked_by is not null").await, 1);
    case.world.serve().await;
    case.world.succeeded("r2").await;
    case.world.finish().await;
}

#[tokio::test]
async fn each_scope_is_held_by_its_name() {
    let mut case = case(Tuning::default()).await;
    let key = case.arn.clone();
    let parked = "select count(*) from line where parked_by is not null";
    let scopes = [
        vec!["account", "111122223333"],
        vec!["region", "eu-central-1"],
        vec!["principal", "anonymous"],
        vec!["key", &key],
    ];
    for (number, scope) in scopes.into_iter().enumerate() {
        let ran = case.world.run(&[&["hold"], &scope[..], &["--wait"]].concat()).await;
        assert!(ran.code == Some(0) && !ran.err.contains("warning"), "{ran:?}");
        let id = format!("r{number}");
        case.import(&id).await;
        case.world.until("it is parked", parked, 1).await;
        assert_eq!(case.world.run(&[&["release"], &scope[..]].concat()).await.code, Some(0));
        case.world.succeeded(&id).await;
    }
    // By Keyferry's own id of the key.
    let id = case.world.job("r0").await.unwrap().result.unwrap()["id"].as_str().unwrap().to_owned();
    assert_eq!(case.world.run(&["hold", "key", &id]).await.code, Some(0));
    assert_eq!(case.world.run(&["release", "key", &key]).await.code, Some(0), "both names mean one");
    for (wrong, code, says) in [
        (["hold", "key", "nonsense"], 1, "the id that Keyferry gave it"),
        (["hold", "account", "12"], 2, "12 digits"),
        (["release", "region", "eu-west-1"], 1, "is not held"),
    ] {
        let ran = case.world.run(&wrong).await;
        assert!(ran.code == Some(code) && ran.err.contains(says), "{ran:?}");
    }
    let far = case.world.run(&["hold", "region", "mars-north-1"]).await;
    assert!(far.code == Some(0) && far.err.contains("spelt right"), "{far:?}");
    assert_eq!(case.world.run(&["release", "region", "mars-north-1"]).await.code, Some(0));
    case.world.finish().await;
}

#[tokio::test]
async fn a_delete_of_many_is_held_between_two_calls() {
    let mut case = crate::materials::rotated(Tuning::default()).await;
    case.world.fake.fault(DELETE, &case.arn, Some(1), json!({"kind": "hold"})).await;
    case.ask("d", json!({"operation": "delete", "scope": "all"})).await;
    case.world.fake.held(1, DELETE, &case.arn).await;
    assert_eq!(case.world.run(&["hold", "principal", "anonymous"]).await.code, Some(0));
    case.world.fake.release(&case.arn).await;
    case.world.until("the line is parked", "select count(*) from line where parked_by is not null", 1).await;
    let shown = case.shown(&case.old.clone()).await;
    assert!(shown["imported"] == true && case.shown(&case.new.clone()).await["imported"] == false);
    assert_eq!(case.world.run(&["release", "principal", "anonymous"]).await.code, Some(0));
    case.world.succeeded("d").await;
    assert_eq!(case.world.fake.journal(&format!("key={}&operation={DELETE}", case.arn)).await.len(), 2);
    case.world.finish().await;
}
