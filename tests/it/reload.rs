//! Policies that change while jobs wait and run, and workers that learn of it at different times.

use crate::support::broker::{Message, User};
use crate::support::eventually;
use crate::support::world::{Tuning, World, request};
use rustix::process::Signal;
use serde_json::json;
use std::time::Duration;
use time::format_description::well_known::Rfc3339;

fn policy(users: &[&User], operations: &[&str]) -> String {
    let users: Vec<&str> = users.iter().map(|user| user.name.as_str()).collect();
    format!(
        "[principals.payroll]\nrabbitmq_users = {users:?}\n\
         [[rules]]\nname = \"r\"\nprincipals = [\"payroll\"]\noperations = {operations:?}\n"
    )
}

async fn with_policy(operations: &[&str]) -> (World, User) {
    let mut world = World::new(Tuning::default()).await;
    let user = world.vhost.user("").await;
    world.with_policy(&policy(&[&user], operations), "");
    world.serve().await;
    (world, user)
}

async fn send(world: &mut World, user: &User, request: serde_json::Value) {
    world.send_by(user, Message::of(&request).by(&user.name)).await;
}

/// A time that the store's clock reaches when it is put two hours ahead.
async fn later(world: &World) -> String {
    (world.now().await + time::Duration::hours(1)).format(&Rfc3339).unwrap()
}

#[tokio::test]
async fn whose_right_is_taken_away_waits_in_vain() {
    let (mut world, user) = with_policy(&["import"]).await;
    let other = world.vhost.user("").await;
    let arns = world.fake.seed(json!({"count": 2})).await;
    let at = later(&world).await;
    send(&mut world, &user, request("rule", &arns[0], json!({"not_before": at}))).await;
    world.until("it waits", "select count(*) from future", 1).await;
    world.load_policy(0, &policy(&[&user], &["delete"])).await;
    world.db.advance(Duration::from_secs(7_200)).await;
    let job = world.failed("rule", "revoked").await;
    assert!(!job.aws_changed());
    let digest = job.error.unwrap()["policy"].as_str().unwrap().to_owned();
    let newest = "select digest from policy_load order by loaded_at desc limit 1";
    assert_eq!(digest, world.client.query_one(newest, &[]).await.unwrap().get::<_, String>(0));

    // The same when the principal stays and the identity goes: a user that was taken away, a key that leaked.
    world.load_policy(0, &policy(&[&user], &["import"])).await;
    let at = later(&world).await;
    send(&mut world, &user, request("identity", &arns[1], json!({"not_before": at}))).await;
    world.until("it waits", "select count(*) from future", 1).await;
    world.load_policy(0, &policy(&[&other], &["import"])).await;
    world.db.advance(Duration::from_secs(7_200)).await;
    world.failed("identity", "revoked").await;
    assert_eq!(world.fake.journal("").await.len(), 0, "no AWS call for what may not be");
    world.finish().await;
}

/// Its own worker's policy denies it and is not the newest; whoever had the newest is gone.
#[tokio::test]
async fn a_job_that_nobody_may_end_ends_at_its_deadline() {
    let (mut world, user) = with_policy(&["import"]).await;
    let arns = world.fake.seed(json!({"count": 1})).await;
    let at = later(&world).await;
    send(&mut world, &user, request("r1", &arns[0], json!({"not_before": at}))).await;
    world.until("it waits", "select count(*) from future", 1).await;
    world.load_policy(0, &policy(&[&user], &["delete"])).await;
    let newest = "insert into policy_load values ('another', keyferry_now() + interval '1 year')";
    world.client.batch_execute(newest).await.unwrap();
    world.db.advance(Duration::from_secs(7_200)).await;
    crate::support::eventually("it is left to others", || async {
        world.workers[0].log().contains("left to another worker").then_some(())
    })
    .await;
    world.db.advance(Duration::from_secs(10 * 86_400)).await;
    world.failed("r1", "deadline_exceeded").await;
    assert_eq!(world.fake.journal("").await.len(), 0);
    world.finish().await;
}

#[tokio::test]
async fn a_right_that_goes_while_the_job_runs_stops_it_before_aws_is_changed() {
    let (mut world, user) = with_policy(&["import", "delete"]).await;
    let arns = world.fake.seed(json!({"count": 2})).await;
    send(&mut world, &user, request("before", &arns[1], json!({}))).await;
    world.succeeded("before").await;
    world.fake.fault("GetParametersForImport", &arns[0], Some(1), json!({"kind": "hold"})).await;
    world.fake.fault("DescribeKey", &arns[1], Some(1), json!({"kind": "hold"})).await;
    send(&mut world, &user, request("import", &arns[0], json!({}))).await;
    send(&mut world, &user, request("delete", &arns[1], json!({"operation": "delete"}))).await;
    world.fake.held(1, "GetParametersForImport", &arns[0]).await;
    world.fake.held(1, "DescribeKey", &arns[1]).await;
    let nobody = policy(&[&user], &["rotate"]);
    world.load_policy(0, &nobody).await;
    world.fake.release(&arns[0]).await;
    world.fake.release(&arns[1]).await;
    for id in ["import", "delete"] {
        let job = world.failed(id, "revoked").await;
        assert!(!job.aws_changed(), "{job:?}");
    }
    assert_eq!(world.fake.journal(&format!("key={}&operation=ImportKeyMaterial", arns[0])).await.len(), 0);
    assert_eq!(world.fake.journal(&format!("key={}&operation=DeleteImportedKeyMaterial", arns[1])).await.len(), 0);
    world.finish().await;
}

#[tokio::test]
async fn a_right_that_goes_between_two_deletions_stops_the_second() {
    let (mut world, user) = with_policy(&["import", "delete"]).await;
    world.symmetric_key("first").await;
    let arn = world.fake.key().await;
    send(&mut world, &user, request("import", &arn, json!({"source_key_identifier": "first"}))).await;
    world.succeeded("import").await;
    let second = crate::support::world::random(32);
    world
        .fake
        .stranger_imports_as(&arn, &second, Some(aws_sdk_kms::types::ImportType::NewKeyMaterial), None)
        .await
        .unwrap();
    world.fake.stranger_rotates(&arn).await;
    world.fake.fault("DeleteImportedKeyMaterial", &arn, Some(1), json!({"kind": "hold"})).await;
    send(&mut world, &user, request("delete", &arn, json!({"operation": "delete", "scope": "all"}))).await;
    world.fake.held(1, "DeleteImportedKeyMaterial", &arn).await;
    world.load_policy(0, &policy(&[&user], &["import"])).await;
    world.fake.release(&arn).await;
    let job = world.failed("delete", "revoked").await;
    assert!(job.aws_changed(), "one material is gone: {job:?}");
    assert_eq!(world.fake.journal(&format!("key={arn}&operation=DeleteImportedKeyMaterial")).await.len(), 1);
    world.finish().await;
}

#[tokio::test]
async fn a_right_that_goes_while_a_call_is_in_doubt_leaves_the_doubt_on_record() {
    let (mut world, user) = with_policy(&["import"]).await;
    world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    // It takes effect, and nobody is told.
    world.fake.fault("ImportKeyMaterial", &arn, Some(1), json!({"kind": "lose_answer"})).await;
    world.fake.fault_after("DescribeKey", &arn, 1, json!({"kind": "hold"})).await;
    send(&mut world, &user, request("r1", &arn, json!({"source_key_identifier": "payroll"}))).await;
    world.fake.held(1, "DescribeKey", &arn).await;
    world.load_policy(0, &policy(&[&user], &["delete"])).await;
    world.fake.release(&arn).await;
    let job = world.failed("r1", "revoked").await;
    assert!(job.aws_changed(), "{job:?}");
    assert_eq!(world.fake.journal(&format!("key={arn}&operation=ImportKeyMaterial")).await.len(), 1);
    world.finish().await;
}

#[tokio::test]
async fn a_broken_file_changes_nothing_and_is_told() {
    let (mut world, user) = with_policy(&["import"]).await;
    let arn = world.fake.key().await;
    let good = policy(&[&user], &["import"]);
    let failed = "keyferry_policy_reloads_total{result=\"failed\"}";
    let broken = [format!("{good}colour = 1\n"), String::new(), good.replace("\"r\"", "\"\"")];
    for (number, text) in (1_i32..).zip(&broken) {
        world.write("policy.toml", text);
        world.workers[0].signal(Signal::HUP);
        eventually("the broken file is counted", || async {
            (world.workers[0].metric(failed).await > f64::from(number) - 0.5).then_some(())
        })
        .await;
    }
    let log = world.workers[0].log();
    assert!(log.contains("policy.toml") && log.contains("line 7") && log.contains("colour"), "{log}");
    assert!(log.contains("keyferry policy check") && log.contains("the file is empty"), "{log}");
    send(&mut world, &user, request("r1", &arn, json!({}))).await;
    world.succeeded("r1").await;
    let loaded_at = world.workers[0].metric("keyferry_policy_loaded_timestamp_seconds").await;
    assert!(loaded_at > 1.0e9);

    let added = format!("{good}[[rules]]\nname = \"more\"\nprincipals = [\"payroll\"]\noperations = [\"delete\"]\n");
    world.load_policy(0, &added).await;
    let log = world.workers[0].log();
    let line = log.lines().rfind(|line| line.contains("a new policy is in force")).unwrap();
    let digests = "select count(*) from policy_load";
    world.until("both are on record", digests, 2).await;
    assert!(line.contains("rule \\\"more\\\"") && line.contains("policy.digest_before"), "{line}");
    send(&mut world, &user, request("r2", &arn, json!({"operation": "delete"}))).await;
    world.succeeded("r2").await;
    world.finish().await;
}

#[tokio::test]
async fn a_worker_with_an_older_policy_ends_nobodys_job() {
    let (mut world, user) = with_policy(&["import"]).await;
    let arn = world.fake.key().await;
    let at = later(&world).await;
    send(&mut world, &user, request("r1", &arn, json!({"not_before": at}))).await;
    world.until("it waits", "select count(*) from future", 1).await;
    world.load_policy(0, &policy(&[&user], &["delete"])).await;
    // Another worker loads a newer one, which allows it, and goes.
    world.write("policy.toml", &policy(&[&user], &["import"]));
    let newer = world.serve().await;
    world.workers[newer].stop().await;
    world.db.advance(Duration::from_secs(7_200)).await;
    eventually("the job is left to others", || async {
        world.workers[0].log().contains("left to another worker").then_some(())
    })
    .await;
    assert_eq!(world.job("r1").await.unwrap().state, "waiting");
    world.load_policy(0, &policy(&[&user], &["import"])).await;
    world.db.advance(Duration::from_secs(31)).await;
    world.succeeded("r1").await;
    world.finish().await;
}

#[tokio::test]
async fn a_hang_up_ends_no_worker() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arn = world.fake.key().await;
    world.workers[0].signal(Signal::HUP);
    eventually("it says that there is no file", || async {
        world.workers[0].log().contains("has no file to load").then_some(())
    })
    .await;
    world.publish(request("r1", &arn, json!({}))).await;
    world.succeeded("r1").await;
    world.finish().await;
}

#[tokio::test]
async fn jobs_from_before_the_policy_are_nobodys() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arn = world.fake.key().await;
    let at = later(&world).await;
    world.publish(request("r1", &arn, json!({"not_before": at}))).await;
    world.until("it waits", "select count(*) from future", 1).await;
    world.workers[0].stop().await;
    let user = world.vhost.user("").await;
    world.with_policy(&policy(&[&user], &["import"]), "");
    world.serve().await;
    world.db.advance(Duration::from_secs(7_200)).await;
    world.failed("r1", "revoked").await;
    world.finish().await;
}
