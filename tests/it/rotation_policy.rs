//! Rotations and what may change between two of them: a policy's own interval, its Regions, a target that goes.

use crate::support::broker::{Message, User};
use crate::support::fake::REGION;
use crate::support::snapshot::Job;
use crate::support::world::{Tuning, World, request};
use serde_json::{Value, json};
use std::time::Duration;

/// What the one sender may do: import anywhere, and rotate as told.
fn policy(user: &User, rotate: &str) -> String {
    format!(
        "[principals.payroll]\nrabbitmq_users = [{:?}]\n\
         [[rules]]\nname = \"imports\"\nprincipals = [\"payroll\"]\noperations = [\"import\"]\n\
         [[rules]]\nname = \"rotates\"\nprincipals = [\"payroll\"]\noperations = [\"rotate\"]\n{rotate}\n",
        user.name
    )
}

async fn ask(world: &mut World, user: &User, body: Value) {
    world.send_by(user, Message::of(&body).by(&user.name)).await;
}

fn rotate(id: &str, arn: &str) -> Value {
    request(id, arn, json!({"operation": "rotate"}))
}

fn sentence(job: &Job) -> String {
    job.error.as_ref().unwrap()["message"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_policys_own_interval_allows_and_refuses_instead_of_the_built_in_hour() {
    let mut world = World::new(Tuning::default()).await;
    let user = world.vhost.user("").await;
    world.with_policy(&policy(&user, "shortest_rotation_interval = \"10m\""), "");
    world.serve().await;
    let arn = world.fake.key().await;
    ask(&mut world, &user, request("first", &arn, json!({}))).await;
    world.succeeded("first").await;
    ask(&mut world, &user, rotate("r1", &arn)).await;
    world.succeeded("r1").await;
    // Sooner than the ten minutes; then later than they, and sooner than an hour.
    ask(&mut world, &user, rotate("soon", &arn)).await;
    assert!(sentence(&world.failed("soon", "rotation_too_soon").await).contains("600 s"));
    world.db.advance(Duration::from_secs(601)).await;
    ask(&mut world, &user, rotate("r2", &arn)).await;
    world.succeeded("r2").await;
    // Later than an hour, and sooner than two.
    world.load_policy(0, &policy(&user, "shortest_rotation_interval = \"2h\"")).await;
    world.db.advance(Duration::from_secs(3_601)).await;
    ask(&mut world, &user, rotate("too-soon", &arn)).await;
    let job = world.failed("too-soon", "rotation_too_soon").await;
    assert!(!job.aws_changed() && sentence(&job).contains("7200 s"), "{}", sentence(&job));
    assert_eq!(world.fake.journal(&format!("key={arn}&operation=RotateKeyOnDemand")).await.len(), 2);
    world.finish().await;
}

#[tokio::test]
async fn a_policy_that_allows_the_primarys_region_alone_rotates_no_key_with_a_replica() {
    let mut world = World::new(Tuning::default()).await;
    let user = world.vhost.user("").await;
    world.with_policy(&policy(&user, &format!("regions = [{REGION:?}]")), "");
    world.serve().await;
    world.symmetric_key("first").await;
    let alone = world.fake.seed(json!({"multi_region": true})).await.remove(0);
    let arn = world.fake.seed(json!({"multi_region": true})).await.remove(0);
    let replica = world.fake.replica(&arn, "us-east-1").await;
    for (id, arn) in [("first", &arn), ("replica", &replica), ("alone", &alone)] {
        ask(&mut world, &user, request(id, arn, json!({"source_key_identifier": "first"}))).await;
        world.succeeded(id).await;
    }
    ask(&mut world, &user, rotate("r1", &arn)).await;
    let job = world.failed("r1", "replica_not_allowed").await;
    assert!(!job.aws_changed() && sentence(&job).contains("us-east-1"), "{}", sentence(&job));
    for arn in [&arn, &replica] {
        let held = world.fake.show(arn).await["materials"].as_array().unwrap().len();
        let asked = world.fake.journal(&format!("key={arn}&operation=RotateKeyOnDemand")).await.len();
        assert_eq!((held, asked), (1, 0), "{arn}");
    }
    ask(&mut world, &user, rotate("r2", &alone)).await;
    world.succeeded("r2").await;
    // Where the other Region is allowed as well, the same is done.
    world.load_policy(0, &policy(&user, &format!("regions = [{REGION:?}, \"us-east-1\"]"))).await;
    ask(&mut world, &user, rotate("r3", &arn)).await;
    let result = world.succeeded("r3").await.result.unwrap();
    assert_eq!(result["replicas"], json!({"us-east-1": "imported"}));
    world.finish().await;
}

#[tokio::test]
async fn a_job_whose_target_was_removed_while_it_waited_fails_without_a_call() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arn = world.fake.seed(json!({"region": "us-east-1"})).await.remove(0);
    let here = world.fake.key().await;
    let held = world.run(&["hold", "everything", "--reason", "a test"]).await;
    assert_eq!(held.code, Some(0), "{held:?}");
    for (id, arn) in [("gone", &arn), ("kept", &here)] {
        world.publish(request(id, arn, json!({}))).await;
    }
    world.until("they wait", "select count(*) from job where state = 'waiting'", 2).await;
    world.workers[0].stop().await;
    world.respell(&format!("regions = [{REGION:?}, \"us-east-1\"]"), &format!("regions = [{REGION:?}]"));
    world.serve().await;
    let released = world.run(&["release", "everything"]).await;
    assert_eq!(released.code, Some(0), "{released:?}");
    let job = world.failed("gone", "target_removed").await;
    assert!(!job.aws_changed(), "{job:?}");
    assert_eq!(world.fake.journal(&format!("key={arn}")).await.len(), 0);
    world.succeeded("kept").await;
    world.finish().await;
}
