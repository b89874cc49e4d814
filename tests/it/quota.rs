//! The quota governor with real workers and a double that throttles as AWS does.

use crate::support::fake::{ACCOUNT, REGION};
use crate::support::world::{Tuning, UNGOVERNED, World, request};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Instant;

const GET: &str = "GetParametersForImport";
const IMPORT: &str = "ImportKeyMaterial";
const DELETE: &str = "DeleteImportedKeyMaterial";
const ROTATE: &str = "RotateKeyOnDemand";

/// A world whose double has these quotas, and whose workers know of them.
async fn governed(rates: &[(&str, f64)], quota: &str) -> World {
    let world = World::new(Tuning { concurrency: 8, ..Tuning::default() }).await;
    world.symmetric_key("payroll").await;
    let given: Vec<String> = rates.iter().map(|(operation, rate)| format!("{operation} = {rate:?}")).collect();
    world.respell(UNGOVERNED, &format!("quota.rates = {{ {} }}\n{quota}", given.join(", ")));
    let of_fake: BTreeMap<&str, f64> = rates.iter().copied().collect();
    world.fake.quotas(json!({"enabled": true, "rates": of_fake})).await;
    world
}

fn imports(arns: &[String], id: &str) -> Vec<Value> {
    let request =
        |(n, arn): (usize, &String)| request(&format!("{id}-{n}"), arn, json!({"source_key_identifier": "payroll"}));
    arns.iter().enumerate().map(request).collect()
}

async fn calls(world: &World, operation: &str, outcome: &str) -> usize {
    world.fake.journal(&format!("operation={operation}&outcome={outcome}")).await.len()
}

async fn ended(world: &World, count: i64) {
    crate::support::eventually("all jobs end", || async {
        (world.count("select count(*) from job where state <> 'waiting'").await == count).then_some(())
    })
    .await;
    assert_eq!(world.count("select count(*) from job where state = 'succeeded'").await, count);
}

/// How many calls were counted, as far as all workers say.
async fn sum(world: &World, series: &str) -> f64 {
    let mut sum = 0.0;
    for worker in &world.workers {
        sum += worker.metric(series).await;
    }
    sum
}

#[tokio::test]
async fn workers_share_a_quota_and_waste_none_of_it() {
    // The double bears ten at once: how exactly a busy machine keeps time is not judged.
    let mut world = governed(&[(GET, 10.0), (IMPORT, 150.0)], "quota.reserve = 0.0").await;
    for _ in 0..3 {
        world.serve().await;
    }
    let arns = world.fake.seed(json!({"count": 60})).await;
    let begun = Instant::now();
    world.publish_all(imports(&arns, "r")).await;
    ended(&world, 60).await;
    let seconds = begun.elapsed().as_secs_f64();
    assert!(seconds > 5.4, "60 calls at 9.8/s and five at once took {seconds} s");
    // Each job one set and one import: a throttled call is the only one that is made twice.
    assert_eq!((calls(&world, GET, "ok").await, calls(&world, IMPORT, "ok").await), (60, 60));
    let throttled = calls(&world, GET, "throttled").await + calls(&world, IMPORT, "throttled").await;
    assert!(throttled <= 6, "{throttled} calls were throttled");
    let slots = sum(&world, &format!("keyferry_quota_slots_total{{operation=\"{GET}\"}}")).await;
    assert!(slots >= 60.0, "{slots}");
    world.finish().await;
}

#[tokio::test]
async fn a_job_that_finds_no_slot_for_its_import_keeps_its_parameters() {
    let mut world = governed(&[(GET, 500.0), (IMPORT, 5.0)], "quota.reserve = 0.0").await;
    world.serve().await;
    let arns = world.fake.seed(json!({"count": 24})).await;
    world.publish_all(imports(&arns, "r")).await;
    ended(&world, 24).await;
    assert_eq!((calls(&world, GET, "ok").await, calls(&world, IMPORT, "ok").await), (24, 24));
    let waits = sum(&world, &format!("keyferry_quota_waits_total{{operation=\"{IMPORT}\"}}")).await;
    assert!(waits > 0.0, "the import's quota was never short");
    // To wait is neither an attempt nor an entry.
    assert_eq!(world.count("select count(*) from audit_entry where entry like '%attempt_failed%'").await, 0);
    assert_eq!(world.count("select count(*) from job where attempts <> 1").await, 0);
    world.finish().await;
}

#[tokio::test]
async fn an_exhausted_lane_keeps_no_other_waiting() {
    let mut world = governed(&[(GET, 1.0), (DELETE, 15.0)], "").await;
    world.serve().await;
    let arns = world.fake.seed(json!({"count": 300})).await;
    world.publish_all(imports(&arns, "night")).await;
    world.fake.wait(1, &format!("operation={GET}&outcome=ok")).await;
    let elsewhere = world.fake.seed(json!({"region": "us-east-1"})).await.remove(0);
    world.publish(request("other", &elsewhere, json!({"source_key_identifier": "payroll"}))).await;
    let other = world.succeeded("other").await;
    let before = world.count("select count(*) from job where state = 'waiting'").await;
    assert!(before > 250, "{before} still wait in {REGION}");
    let took = "select extract(epoch from finished_at - accepted_at)::float8 from job where request_id = 'other'";
    let seconds: f64 = world.client.query_one(took, &[]).await.unwrap().get(0);
    assert!(seconds < 30.0, "{seconds} s for a job whose lane is free: {other:?}");
}

#[tokio::test]
async fn a_throttled_job_goes_first_again_and_keeps_what_it_has() {
    let mut world = governed(&[(GET, 20.0), (IMPORT, 20.0)], "").await;
    let arn = world.fake.key().await;
    world.fake.fault(IMPORT, &arn, Some(2), json!({"kind": "throttle"})).await;
    world.serve().await;
    world.publish_all(imports(std::slice::from_ref(&arn), "r")).await;
    let job = world.succeeded("r-0").await;
    assert_eq!(job.attempts, 3, "attempts that made a call");
    assert_eq!((calls(&world, GET, "ok").await, calls(&world, IMPORT, "throttled").await), (1, 2));
    assert_eq!(world.count("select count(*) from audit_entry where entry like '%attempt_failed%'").await, 2);
    // One key alone is no sign of a quota.
    assert_eq!(world.count("select count(*) from lane where factor < 1").await, 0);
    assert!(world.workers[0].metric(&format!("keyferry_quota_throttled_total{{operation=\"{IMPORT}\"}}")).await > 1.5);
    world.finish().await;
}

#[tokio::test]
async fn a_hot_key_slows_nobody_else_down() {
    let mut world = governed(&[(GET, 50.0), (IMPORT, 50.0)], "").await;
    world.fake.quotas(json!({"enabled": true, "hot_key": 0.4})).await;
    let arns = world.fake.seed(json!({"count": 6})).await;
    world.serve().await;
    let hot = arns[0].clone();
    for n in 0..3 {
        world.publish(request(&format!("hot-{n}"), &hot, json!({"source_key_identifier": "payroll"}))).await;
    }
    world.publish_all(imports(&arns[1..], "r")).await;
    ended(&world, 8).await;
    let throttled = world.fake.journal(&format!("operation={IMPORT}&outcome=throttled")).await;
    assert!(!throttled.is_empty() && throttled.iter().all(|call| call["key_arn"] == *hot), "{throttled:#?}");
    assert_eq!(world.count("select count(*) from lane where factor < 1").await, 0);
    assert_eq!((calls(&world, GET, "ok").await, calls(&world, IMPORT, "ok").await), (8, 8));
    world.finish().await;
}

#[tokio::test]
async fn a_throttled_rotation_slows_its_own_lane() {
    let mut world = governed(&[(ROTATE, 20.0), ("ListKeyRotations", 90.0)], "").await;
    let arns = world.fake.seed(json!({"count": 2})).await;
    world.serve().await;
    world.publish_all(imports(&arns, "first")).await;
    ended(&world, 2).await;
    for (n, arn) in arns.iter().enumerate() {
        world.fake.fault(ROTATE, arn, Some(1), json!({"kind": "throttle"})).await;
        world.publish(request(&format!("r-{n}"), arn, json!({"operation": "rotate"}))).await;
    }
    ended(&world, 4).await;
    let slowed = "select array_agg(operation) from lane where factor < 1";
    let slowed: Option<Vec<String>> = world.client.query_one(slowed, &[]).await.unwrap().get(0);
    assert_eq!(slowed, Some(vec![ROTATE.to_owned()]));
    world.finish().await;
}

#[tokio::test]
async fn who_waits_long_for_a_slot_asks_again_whether_the_call_is_wanted() {
    // Slots are five seconds apart.
    let mut world = governed(&[(GET, 0.2)], "quota.reserve = 0.0").await;
    world.serve().await;
    let arns = world.fake.seed(json!({"count": 2})).await;
    let (late, other) = (&arns[0], &arns[1]);
    world.fake.fault("DescribeKey", late, Some(1), json!({"kind": "hold"})).await;
    world.publish(request("late", late, json!({"source_key_identifier": "payroll"}))).await;
    world.fake.held(1, "DescribeKey", late).await;
    world.publish(request("other", other, json!({"source_key_identifier": "payroll"}))).await;
    // It has the next slot, behind the one that the first job misses.
    world.fake.wait(1, &format!("operation=DescribeKey&key={other}")).await;
    world.fake.release(late).await;
    world.fake.wait(1, &format!("operation=DescribeKey&key={late}&outcome=ok")).await;
    let ran = world.run(&["hold", "key", late, "--reason", "a test"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    world.until("the line is parked", "select count(*) from line where parked_by is not null", 1).await;
    assert_eq!(world.fake.journal(&format!("operation={GET}&key={late}")).await.len(), 0);
    let ran = world.run(&["release", "key", late]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    ended(&world, 2).await;
    world.finish().await;
}

#[tokio::test]
async fn a_cancelled_job_that_waits_long_for_a_slot_settles_what_is_in_doubt_first() {
    // Slots are two and a half seconds apart.
    let mut world = governed(&[(GET, 0.4)], "quota.reserve = 0.0").await;
    let arns = world.fake.seed(json!({"count": 2})).await;
    let (doubted, other) = (&arns[0], &arns[1]);
    world.fake.fault(IMPORT, doubted, Some(1), json!({"kind": "lose_answer"})).await;
    // Its third attempt stands still there.
    world.fake.fault_after("DescribeKey", doubted, 2, json!({"kind": "hold"})).await;
    world.serve().await;
    world.publish(request("doubted", doubted, json!({"source_key_identifier": "payroll"}))).await;
    // Its parameters are used up: it needs others, and so a slot, to learn what became of its import.
    world.fake.wait(1, &format!("operation={IMPORT}&key={doubted}&outcome=InvalidImportTokenException")).await;
    world.fake.held(1, "DescribeKey", doubted).await;
    let ran = world.run(&["jobs", "cancel", "doubted", "--json"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    world.publish(request("other", other, json!({"source_key_identifier": "payroll"}))).await;
    world.fake.wait(1, &format!("operation=DescribeKey&key={other}")).await;
    world.fake.release(doubted).await;
    let job = world.succeeded("doubted").await;
    assert!(job.error.is_none(), "{job:?}");
    world.succeeded("other").await;
    world.finish().await;
}

#[tokio::test]
async fn an_attempt_that_needs_several_slots_of_a_slow_lane_gets_them() {
    let mut world = governed(&[("ListKeyRotations", 0.6)], "quota.reserve = 0.0").await;
    let arn = world.fake.key().await;
    world.serve().await;
    world.publish(request("first", &arn, json!({"source_key_identifier": "payroll"}))).await;
    world.succeeded("first").await;
    world.publish(request("turn", &arn, json!({"operation": "rotate"}))).await;
    world.succeeded("turn").await;
    world.finish().await;
}

#[tokio::test]
async fn what_service_quotas_says_holds_for_its_account_and_region() {
    let world = World::new(Tuning::default()).await;
    let saved = json!({"Quotas": [{"QuotaArn": format!("arn:aws:servicequotas:{REGION}:{ACCOUNT}:kms/L-1"),
                                   "QuotaName": format!("{GET} request rate"), "Value": 8.0}]});
    world.write("quotas.json", &saved.to_string());
    let file = world.path("quotas.json");
    world.respell(UNGOVERNED, &format!("quota.service_quotas_files = [{file:?}]\nquota.reserve = 0.2"));
    let mut world = world;
    world.serve().await;
    let paced =
        "select count(*) from lane where operation = 'GetParametersForImport' and round(interval_ms::numeric, 2) = ";
    assert_eq!(world.count(&format!("{paced} 156.25 and region = '{REGION}'")).await, 1);
    assert_eq!(world.count(&format!("{paced} 1250 and region = 'us-east-1'")).await, 1);
    let ran = world.run(&["--json", "doctor"]).await;
    let told = ran.out.contains("1 those of Service Quotas");
    assert!(told, "{ran:?}");
    world.write("quotas.json", "{}");
    let ran = world.run(&["--json", "config", "check"]).await;
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.err.contains("service_quotas_files") && ran.err.contains("list-service-quotas"), "{ran:?}");
    world.finish().await;
}

#[tokio::test]
async fn a_stranger_slows_all_workers_down_and_every_job_ends() {
    // AWS gives a third of what is configured: as if a stranger took the rest.
    let mut world = governed(&[(GET, 9.0), (IMPORT, 150.0)], "quota.reserve = 0.0").await;
    world.fake.quotas(json!({"enabled": true, "rates": {GET: 3.0}})).await;
    let arns = world.fake.seed(json!({"count": 40})).await;
    world.publish_all(imports(&arns, "r")).await;
    for _ in 0..2 {
        world.serve().await;
    }
    ended(&world, 40).await;
    assert_eq!(calls(&world, GET, "ok").await, 40);
    let throttled = calls(&world, GET, "throttled").await;
    assert!((1..=60).contains(&throttled), "{throttled} calls were throttled");
    let factor = "select min(factor) from lane where operation = 'GetParametersForImport'";
    let factor: f64 = world.client.query_one(factor, &[]).await.unwrap().get(0);
    assert!(factor < 0.8, "{factor}");
    world.finish().await;
}

#[tokio::test]
async fn slots_of_jobs_that_end_before_their_call_are_used_by_others() {
    // Half of the keys take no material: their jobs fail by DescribeKey alone.
    let mut world = governed(&[(GET, 0.25)], "quota.reserve = 0.0").await;
    let bad = world.fake.seed(json!({"count": 4, "origin": "AWS_KMS"})).await;
    let good = world.fake.seed(json!({"count": 4})).await;
    let mixed: Vec<String> = bad.into_iter().zip(good).flat_map(|(bad, good)| [bad, good]).collect();
    world.publish_all(imports(&mixed, "r")).await;
    world.serve().await;
    crate::support::eventually("all jobs end", || async {
        (world.count("select count(*) from job where state <> 'waiting'").await == 8).then_some(())
    })
    .await;
    let between =
        "select extract(epoch from max(finished_at) - min(finished_at))::float8 from job where state = 'succeeded'";
    let seconds: f64 = world.client.query_one(between, &[]).await.unwrap().get(0);
    // Four seconds apart; the other four jobs' slots would be sixteen seconds more.
    assert!(seconds < 22.0, "4 calls took {seconds} s from the first to the last: slots were lost");
    assert_eq!(world.count("select count(*) from job where state = 'succeeded'").await, 4);
    world.finish().await;
}

#[tokio::test]
async fn a_dry_run_waits_for_no_quota() {
    let mut world = governed(&[(GET, 0.001)], "").await;
    world.serve().await;
    let arns = world.fake.seed(json!({"count": 3})).await;
    for (n, arn) in arns.iter().enumerate() {
        let asked = json!({"source_key_identifier": "payroll", "dry_run": true});
        world.publish(request(&format!("r-{n}"), arn, asked)).await;
    }
    ended(&world, 3).await;
    assert!(sum(&world, &format!("keyferry_quota_slots_total{{operation=\"{GET}\"}}")).await < 0.5);
    world.finish().await;
}

#[tokio::test]
async fn a_quota_that_makes_no_sense_is_refused_with_a_code() {
    let world = World::new(Tuning::default()).await;
    world.respell(UNGOVERNED, "quota.rates = { GetParametersForImport = 0 }");
    for command in [["config", "check"], ["config", "show"]] {
        let ran = world.run(&["--json", command[0], command[1]]).await;
        assert_eq!(ran.code, Some(2), "{ran:?}");
        let error: Value = serde_json::from_str(&ran.err).unwrap();
        assert_eq!(error["error"]["code"], "quota_rate_zero");
        let message = error["error"]["message"].as_str().unwrap();
        assert!(
            message.contains("quota.rates.GetParametersForImport") && message.contains("keyferry.toml"),
            "{message}"
        );
    }
    let ran = world.run(&["--json", "doctor"]).await;
    let report: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(report["checks"][0]["code"], "quota_rate_zero");
}
