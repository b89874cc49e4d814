//! A rotate and what AWS shows late, or has not said: what is in doubt is settled before anything is concluded from it.

use crate::rotations::{Case, IMPORT, ROTATE, case, sentence, two_regions};
use crate::support::world::Tuning;
use aws_sdk_kms::types::ImportType;
use serde_json::{Value, json};
use std::time::Duration;

#[tokio::test]
async fn a_rotation_that_takes_its_time_is_awaited_and_asked_for_once() {
    let mut case = case(Tuning::hasty()).await;
    case.world.fake.options(json!({"rotation_ms": 30_000})).await;
    case.ask("r1", json!({})).await;
    case.world.until("AWS was asked to rotate", "select count(*) from progress where imported", 1).await;
    // Another worker goes on looking.
    case.world.workers[0].kill();
    case.world.serve().await;
    case.world.db.advance(Duration::from_secs(31)).await;
    let looks = "select count(*) from progress where (last_error ->> 'times')::int > 1";
    case.world.until("it looks again", looks, 1).await;
    assert_eq!(case.roles().await, ["CURRENT", "PENDING_ROTATION"]);
    case.world.fake.advance(30).await;
    case.world.succeeded("r1").await;
    assert_eq!((case.roles().await, case.calls(ROTATE).await), (vec!["NON_CURRENT".into(), "CURRENT".into()], 1));
    case.world.finish().await;
}

#[tokio::test]
async fn a_rotation_under_way_of_which_no_answer_came_is_not_made_twice() {
    let mut case = case(Tuning { signature_life_ms: 1_500, aws_timeout_ms: 1_000, ..Tuning::default() }).await;
    case.world.fake.options(json!({"rotation_ms": 60_000})).await;
    case.fault(ROTATE, json!({"kind": "lose_answer"})).await;
    case.ask("r1", json!({})).await;
    // What was sent can take no effect any more, and still is under way: AWS says so.
    let refused = format!("key={}&operation={ROTATE}&outcome=ConflictException", case.arn);
    case.world.fake.wait(1, &refused).await;
    // It may be the one that the job has asked for: until that is known, it is not cancelled.
    let ran = case.world.run(&["jobs", "cancel", "r1", "--json"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    case.world.fake.wait(2, &refused).await;
    case.world.fake.advance(60).await;
    case.world.db.advance(Duration::from_secs(61)).await;
    let result = case.world.succeeded("r1").await.result.unwrap();
    assert_eq!(result["rotations"], json!({"used": 1, "left": 24}));
    case.world.finish().await;
}

#[tokio::test]
async fn what_was_in_force_before_is_not_new_even_if_the_first_call_had_no_answer() {
    let mut case = case(Tuning { signature_life_ms: 2_000, aws_timeout_ms: 1_000, ..Tuning::default() }).await;
    let (same, arn) = (case.world.symmetric_key("same").await, case.world.fake.key().await);
    case.world.fake.stranger_imports_as(&arn, &same, None, None).await.unwrap();
    case.arn.clone_from(&arn);
    case.fault(IMPORT, json!({"kind": "hang", "ms": 3_000})).await;
    case.ask("r1", json!({"source_key_identifier": "same"})).await;
    let job = case.world.ended_after_looking("r1").await;
    assert_eq!(job.code(), "material_not_new");
    assert!(job.aws_changed(), "whether the call that hung has done anything is not known: {job:?}");
    // Its retry remembers what was in force then.
    let ran = case.world.run(&["jobs", "retry", "r1", "--json"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let failed = "select count(*) from job where retry_of is not null and error ->> 'code' = 'material_not_new'";
    case.world.until("it fails again", failed, 1).await;
    assert_eq!((case.roles().await, case.calls(ROTATE).await), (vec!["CURRENT".to_owned()], 0));
    case.world.finish().await;
}

fn error(code: &str) -> Value {
    json!({"kind": "error", "code": code, "message": "ordered by a test"})
}

impl Case {
    /// From now on AWS shows a change after a minute.
    async fn shows_late(&self) {
        self.world.fake.options(json!({"change_lag_ms": 60_000})).await;
        self.world.fake.advance(61).await;
    }
}

#[tokio::test]
async fn an_import_that_had_no_answer_and_is_not_shown_yet_is_no_failure() {
    let mut case = case(Tuning::hasty()).await;
    case.shows_late().await;
    case.fault(IMPORT, json!({"kind": "lose_answer"})).await;
    case.ask("r1", json!({})).await;
    // AWS has the bytes, says so in its way, and shows nothing.
    let refused = format!("key={}&operation={IMPORT}&outcome=IncorrectKeyMaterialException", case.arn);
    case.world.fake.wait(2, &refused).await;
    case.world.fake.options(json!({"change_lag_ms": 0})).await;
    case.world.succeeded("r1").await;
    assert_eq!((case.roles().await, case.calls(ROTATE).await), (vec!["NON_CURRENT".into(), "CURRENT".into()], 1));
    case.world.finish().await;
}

#[tokio::test]
async fn an_abandoned_rotate_looks_until_aws_shows_what_it_brought() {
    let mut case = case(Tuning::hasty()).await;
    case.shows_late().await;
    case.ask("r1", json!({})).await;
    let looks = "select count(*) from progress where key_material_id is not null and last_error is not null";
    case.world.until("it looks for its material", looks, 1).await;
    let ran = case.world.run(&["jobs", "abandon", "r1", "--yes", "--json"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let looked = format!("key={}&operation=ListKeyRotations", case.arn);
    let before = case.world.fake.journal(&looked).await.len();
    case.world.fake.wait(before + 2, &looked).await;
    assert_eq!(case.world.job("r1").await.unwrap().state, "waiting");
    case.world.fake.options(json!({"change_lag_ms": 0})).await;
    let job = case.world.failed("r1", "abandoned").await;
    assert!(sentence(&job).contains("was removed again"), "{}", sentence(&job));
    assert_eq!(case.roles().await, ["CURRENT"]);
    case.world.finish().await;
}

#[tokio::test]
async fn a_rotate_remembers_what_it_rotates_from_when_its_first_call_that_may_have_brought_something_is_made() {
    let mut case = case(Tuning { aws_timeout_ms: 1_000, ..Tuning::default() }).await;
    let same = case.world.symmetric_key("same").await;
    // The first call is turned away. Before the second a stranger brings the very same, and rotates to it.
    case.fault(IMPORT, json!({"kind": "throttle"})).await;
    case.world.fake.fault_after("DescribeKey", &case.arn, 1, json!({"kind": "hold"})).await;
    case.ask("r1", json!({"source_key_identifier": "same"})).await;
    case.world.fake.held(1, "DescribeKey", &case.arn).await;
    case.world.workers[0].kill();
    case.world.fake.release(&case.arn).await;
    let new = Some(ImportType::NewKeyMaterial);
    case.world.fake.stranger_imports_as(&case.arn, &same, new, None).await.unwrap();
    case.world.fake.stranger_rotates(&case.arn).await;
    case.fault(IMPORT, json!({"kind": "hang", "ms": 3_000})).await;
    // The interval of allow-all is over.
    case.world.db.advance(Duration::from_secs(3_601)).await;
    case.world.serve().await;
    let job = case.world.ended_after_looking("r1").await;
    assert_eq!(job.code(), "material_not_new", "{job:?}");
    assert_eq!(case.calls(ROTATE).await, 0);
    case.world.finish().await;
}

#[tokio::test]
async fn of_two_regions_that_stayed_away_the_one_that_is_back_is_served() {
    let (mut case, replica) = two_regions(Tuning::hasty()).await;
    case.gets_a_third_region().await;
    let third = case.world.fake.replica(&case.arn, "eu-west-1").await;
    let first = case.first.clone();
    case.world.fake.stranger_imports_as(&third, &first, Some(ImportType::ExistingKeyMaterial), None).await.unwrap();
    for arn in [&replica, &third] {
        case.world.fake.fault("GetParametersForImport", arn, None, error("KMSInternalException")).await;
    }
    case.world.serve().await;
    case.ask("r1", json!({})).await;
    let tried = "select count(*) from progress where replicas = '{\"us-east-1\": \"tried\", \"eu-west-1\": \"tried\"}'";
    case.world.until("both were tried", tried, 1).await;
    case.world.fake.clear_faults().await;
    case.world.fake.fault("GetParametersForImport", &replica, None, error("KMSInternalException")).await;
    let served = "select count(*) from progress where replicas ->> 'eu-west-1' = 'imported'";
    case.world.until("the other is served", served, 1).await;
    case.world.fake.clear_faults().await;
    case.world.succeeded("r1").await;
    case.world.finish().await;
}

#[tokio::test]
async fn a_hold_on_a_replicas_region_stops_the_job_there_and_counts_it() {
    let (mut case, replica) = two_regions(Tuning::hasty()).await;
    case.world.fake.fault("GetParametersForImport", &replica, Some(1), json!({"kind": "hold"})).await;
    case.ask("r1", json!({})).await;
    case.world.fake.held(1, "GetParametersForImport", &replica).await;
    let hold = ["hold", "region", "us-east-1", "--reason", "a test", "--json"];
    let ran = case.world.run(&hold).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    case.world.fake.release(&replica).await;
    let waits = "select count(*) from progress where last_error ->> 'message' like '%an operator holds the replica%'";
    case.world.until("it waits for the release", waits, 1).await;
    let imports = format!("key={replica}&operation={IMPORT}");
    assert_eq!(case.world.fake.journal(&imports).await.len(), 1, "the first material alone");
    case.world.fake.fault(IMPORT, &replica, Some(1), json!({"kind": "hold"})).await;
    let ran = case.world.run(&["release", "region", "us-east-1"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    // What is under way there is counted, and goes on to its answer.
    case.world.fake.held(1, IMPORT, &replica).await;
    let ran = case.world.run(&hold).await;
    assert_eq!((ran.code, &ran.json()["under_way"]), (Some(0), &json!(1)), "{ran:?}");
    case.world.fake.release(&replica).await;
    case.world.succeeded("r1").await;
    case.world.finish().await;
}
