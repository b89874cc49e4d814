//! SIGTERM: no more is taken, what runs ends or is given back, events are told, the exit code is 0.

use crate::support::world::{Tuning, World, request};
use rustix::process::Signal;
use serde_json::json;
use std::time::{Duration, Instant};

#[tokio::test]
async fn an_idle_worker_stops_at_once() {
    let mut world = World::with_worker(Tuning::default()).await;
    let from = Instant::now();
    world.workers[0].stop().await;
    assert!(from.elapsed() < Duration::from_secs(5), "{:?}", from.elapsed());
    world.finish().await;
}

#[tokio::test]
async fn jobs_under_way_are_finished_and_their_events_told() {
    let mut world = World::with_worker(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    let arns = world.fake.seed(json!({"count": 3})).await;
    for (number, arn) in arns.iter().enumerate() {
        world.fake.fault("ImportKeyMaterial", arn, Some(1), json!({"kind": "hold"})).await;
        world.publish(request(&format!("r{number}"), arn, json!({"source_key_identifier": "payroll"}))).await;
        world.fake.held(1, "ImportKeyMaterial", arn).await;
    }
    world.workers[0].signal(Signal::TERM);
    crate::support::eventually("intake has stopped", || async {
        world.workers[0].log().contains("stopping").then_some(())
    })
    .await;
    // What comes now is for the next worker.
    world.publish(request("later", &arns[0], json!({"source_key_identifier": "payroll"}))).await;
    for arn in &arns {
        world.fake.release(arn).await;
    }
    world.workers[0].ends_well().await;
    assert_eq!(world.count("select count(*) from job where state = 'succeeded'").await, 3);
    assert_eq!(world.count("select count(*) from outbox").await, 0);
    for number in 0..3 {
        assert_eq!(world.events_of(&format!("r{number}")).await.len(), 1);
    }
    assert_eq!(world.vhost.ready(crate::support::broker::JOBS).await, 1, "the message is given back");
    world.serve().await;
    world.succeeded("later").await;
    world.finish().await;
}

#[tokio::test]
async fn jobs_that_do_not_end_in_time_are_given_back() {
    let tuning = Tuning { grace_ms: 500, aws_timeout_ms: 2_000, lease_ms: 30_000, ..Tuning::hasty() };
    let mut world = World::with_worker(tuning).await;
    world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    world.fake.fault("DescribeKey", &arn, Some(1), json!({"kind": "hold"})).await;
    world.publish(request("r1", &arn, json!({"source_key_identifier": "payroll"}))).await;
    world.fake.held(1, "DescribeKey", &arn).await;
    world.workers[0].signal(Signal::TERM);
    // Past the grace time the call ends by its own time-out or by its answer; the next step is not begun.
    crate::support::eventually("the grace time is over", || async {
        world.workers[0].log().contains("the grace time is over").then_some(())
    })
    .await;
    world.fake.release(&arn).await;
    world.workers[0].ends_well().await;
    let free = "select count(*) from line where token is null and due_at is not null";
    assert_eq!(world.count(free).await, 1, "the line is free long before its lease runs out");
    world.serve().await;
    world.succeeded("r1").await;
    world.finish().await;
}
