//! What only SQS can do to a worker: batches of which a part fails, receipts that are lost, queues that do not fit.

use crate::support::broker::Message;
use crate::support::eventually;
use crate::support::sqs::Role;
use crate::support::sqs_proxy::Kind;
use crate::support::world::{Carriage, Tuning, World, request};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

const SERVER_FAULT: Kind = Kind::Entries { code: "InternalError", is_senders_fault: false };
const SENDER_FAULT: Kind = Kind::Entries { code: "InvalidMessageContents", is_senders_fault: true };

async fn serving(tuning: Tuning, carriage: Carriage) -> World {
    let mut world = World::over(tuning, carriage).await;
    world.serve().await;
    world
}

async fn left(world: &World, reason: &str) -> f64 {
    world.workers[0].metric(&format!("keyferry_sqs_messages_left_total{{reason=\"{reason}\"}}")).await
}

async fn says(world: &World, at: usize, wanted: &str) {
    eventually(&format!("/readyz says {wanted}"), || async {
        (world.workers[at].ready().await?.1.trim() == wanted).then_some(())
    })
    .await;
}

async fn logs(world: &World, at: usize, wanted: &str) {
    eventually(&format!("the log says {wanted}"), || async { world.workers[at].log().contains(wanted).then_some(()) })
        .await;
}

fn bad(number: usize, headers: &[(&str, &str)]) -> Message {
    let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Message {
        body: format!("{{\"id\":\"bad-{number}\",\"key\":\"nonsense\"}}").into_bytes(),
        headers,
        ..Message::default()
    }
}

#[tokio::test]
async fn without_queues_it_is_not_ready_until_they_are_made() {
    for carriage in [Carriage::SQS, Carriage::SQS_FIFO] {
        let mut world = World::bare(Tuning { visibility_s: 7, ..Tuning::default() }, carriage).await;
        let at = world.start("").await;
        says(&world, at, "not ready: sqs ingress, events").await;
        logs(&world, at, "make the queue, or mend its URL").await;
        let checked = world.run(&["topology", "check"]).await;
        assert_eq!(checked.code, Some(1), "{checked:?}");
        assert_eq!(checked.out.matches("is missing").count(), 3, "{checked:?}");
        let applied = world.run(&["topology", "apply"]).await;
        assert_eq!(applied.code, Some(0), "{applied:?}");
        says(&world, at, "ready").await;
        let requests = world.queues.attributes(Role::Requests).await;
        let policy: Value = serde_json::from_str(requests["RedrivePolicy"].as_str().unwrap()).unwrap();
        assert_eq!((&requests["VisibilityTimeout"], &policy["maxReceiveCount"]), (&json!("7"), &json!(5)));
        let dead = world.queues.attributes(Role::Dead).await;
        assert_eq!(
            (&dead["MessageRetentionPeriod"], &policy["deadLetterTargetArn"]),
            (&json!("1209600"), &dead["QueueArn"])
        );
        let arn = world.fake.key().await;
        world.publish(request("r1", &arn, json!({}))).await;
        world.succeeded("r1").await;
        // And once more while it runs: the queue goes, and comes again.
        world.queues.delete(Role::Requests).await;
        says(&world, at, "not ready: sqs ingress").await;
        assert_eq!(world.run(&["topology", "apply"]).await.code, Some(0));
        says(&world, at, "ready").await;
        world.publish(request("r2", &arn, json!({}))).await;
        world.failed("r2", "source_key_required").await;
        world.finish().await;
    }
}

#[tokio::test]
async fn queues_that_do_not_fit_are_told() {
    let mut world = World::bare(Tuning::default(), Carriage::SQS).await;
    for role in [Role::Dead, Role::Requests, Role::Events] {
        world.queues.make(role, json!({})).await;
    }
    let at = world.serve().await;
    // Without a redrive policy it works, and says so.
    logs(&world, at, "has no redrive policy").await;
    let checked = world.run(&["topology", "check"]).await;
    assert_eq!(checked.code, Some(1));
    assert!(checked.out.contains("maxReceiveCount"), "{checked:?}");
    world.workers[at].stop().await;
    // Of two types: nothing is received.
    let settings = std::fs::read_to_string(world.path("keyferry.toml")).unwrap();
    let (dead, fifo) = (world.queues.url(Role::Dead), format!("{}.fifo", world.queues.url(Role::Dead)));
    world.write("keyferry.toml", &settings.replace(&format!("{dead}\""), &format!("{fifo}\"")));
    let at = world.start("").await;
    logs(&world, at, "make the queue").await;
    world.workers[at].kill();
    world.write(
        "keyferry.toml",
        &settings.replace(&format!("{dead}\""), &format!("{}\"", world.queues.url(Role::Requests))),
    );
    let checked = world.run(&["config", "check"]).await;
    assert!(checked.code == Some(2) && checked.err.contains("sqs.dead_letter_queue_url"), "{checked:?}");
    world.write("keyferry.toml", &settings);
    world.finish().await;
}

#[tokio::test]
async fn settled_messages_that_are_not_deleted_are_tried_again() {
    let mut world = serving(Tuning::hasty(), Carriage::SQS).await;
    let arns = world.fake.seed(json!({"count": 10})).await;
    let queue = world.queues.name_of(Role::Requests);
    // Some entries, then a call that is throttled, then one whose answer is lost.
    world.proxy.trouble("DeleteMessageBatch", &queue, "", SERVER_FAULT, 1);
    world.proxy.trouble("DeleteMessageBatch", &queue, "", Kind::Call { status: 403, code: "RequestThrottled" }, 1);
    world.proxy.trouble("DeleteMessageBatch", &queue, "", Kind::LoseAnswer, 1);
    for (number, arn) in arns.iter().enumerate() {
        world.publish(request(&format!("r{number}"), arn, json!({}))).await;
    }
    for number in 0..arns.len() {
        world.succeeded(&format!("r{number}")).await;
    }
    assert!(left(&world, "not_deleted").await < 0.5);
    assert_eq!(world.proxy.most_receipts(), 1);
    world.finish().await;
}

#[tokio::test]
async fn a_message_that_cannot_be_deleted_comes_again_as_a_duplicate() {
    let mut world = serving(Tuning::hasty(), Carriage::SQS).await;
    let arn = world.fake.key().await;
    let queue = world.queues.name_of(Role::Requests);
    world.proxy.trouble("DeleteMessageBatch", &queue, "", SERVER_FAULT, 4);
    world.publish(request("r1", &arn, json!({}))).await;
    world.succeeded("r1").await;
    eventually("it is let go", || async { (left(&world, "not_deleted").await > 0.5).then_some(()) }).await;
    let sessions = "keyferry_broker_sessions_total{role=\"ingress\",transport=\"sqs\"}";
    assert!(world.workers[0].metric(sessions).await < 1.5, "the session goes on");
    eventually("it comes again", || async {
        let series = "keyferry_intake_messages_total{transport=\"sqs\",verdict=\"duplicate\"}";
        (world.workers[0].metric(series).await > 0.5).then_some(())
    })
    .await;
    world.finish().await;
}

#[tokio::test]
async fn a_dead_letter_whose_attributes_sqs_refuses_goes_without_them() {
    for carriage in [Carriage::SQS, Carriage::SQS_FIFO] {
        let mut world = serving(Tuning::default(), carriage).await;
        let queue = world.queues.name_of(Role::Dead);
        let kept = [("keyferry-signature", "v1;key=a"), ("keyferry-redrive", "no refusal")];
        let marked = [&[("colour", "refused-colour")], &kept[..]].concat();
        // Some entries fail for a while, one for its attribute.
        world.proxy.trouble("SendMessageBatch", &queue, "refused-colour", SENDER_FAULT, usize::MAX);
        world.proxy.trouble("SendMessageBatch", &queue, "bad-2", SERVER_FAULT, 2);
        world.send(Message { content_type: Some("application/json".into()), ..bad(1, &marked) }).await;
        world.send(bad(2, &[("colour", "red")])).await;
        world.send(bad(3, &[])).await;
        world.dead_letters(3).await;
        let letters = world.dead().await;
        assert!(letters.iter().any(|one| one.content_type.as_deref() == Some("application/json")), "{letters:?}");
        let dead: BTreeMap<String, BTreeMap<String, String>> =
            letters.iter().map(|one| (one.json()["id"].as_str().unwrap().to_owned(), one.headers.clone())).collect();
        let of = |headers: &[(&str, &str)]| bad(0, headers).headers;
        assert_eq!(dead["bad-1"], of(&kept));
        assert_eq!(dead["bad-2"], of(&[("colour", "red")]));
        assert_eq!(dead["bad-3"], BTreeMap::new());
        logs(&world, 0, "dead-lettered without its attributes").await;
        world.finish().await;
    }
}

/// Each call may take five seconds, and each message several calls: the end does not wait for all of them.
#[tokio::test]
async fn a_stop_has_an_end_while_sqs_does_not_answer() {
    let mut world = serving(Tuning { grace_ms: 1_000, ..Tuning::hasty() }, Carriage::SQS).await;
    let arn = world.fake.key().await;
    let queue = world.queues.name_of(Role::Requests);
    for operation in ["DeleteMessageBatch", "ChangeMessageVisibilityBatch"] {
        world.proxy.trouble(operation, &queue, "", Kind::Hang, usize::MAX);
    }
    world.publish(request("r1", &arn, json!({}))).await;
    world.succeeded("r1").await;
    let from = std::time::Instant::now();
    world.workers[0].signal(rustix::process::Signal::TERM);
    world.workers[0].ends_well().await;
    // Settling 5 s, a receive under way 2 s, the last beat 5 s, giving back 5 s.
    assert!(from.elapsed() < Duration::from_secs(18), "{:?}", from.elapsed());
    world.proxy.calm();
    world.serve().await;
    world.finish().await;
}

#[tokio::test]
async fn a_refused_message_that_cannot_be_dead_lettered_stays() {
    let mut world = serving(Tuning::default(), Carriage::SQS).await;
    let queue = world.queues.name_of(Role::Dead);
    world.proxy.trouble("SendMessageBatch", &queue, "bad-1", SENDER_FAULT, usize::MAX);
    world.send(bad(1, &[])).await;
    world.send(bad(2, &[])).await;
    world.dead_letters(1).await;
    eventually("it is let go", || async { (left(&world, "not_dead_lettered").await > 0.5).then_some(()) }).await;
    assert_eq!(world.queues.ready(Role::Requests).await + world.queues.hidden(Role::Requests).await, 1);
    world.proxy.calm();
    world.dead_letters(2).await;
    assert_eq!(world.refused(2).await.len(), 2, "however often it came");
    world.finish().await;
}

#[tokio::test]
async fn a_death_after_the_dead_letter_sends_it_twice_and_refuses_once() {
    let mut world = World::over(Tuning::hasty(), Carriage::SQS).await;
    world.send(bad(1, &[])).await;
    let first = world.start("sqs.after_dead_letter=return").await;
    assert!(world.workers[first].aborted().await);
    assert_eq!(world.dead().await.len(), 1);
    world.serve().await;
    world.dead_letters(2).await;
    assert_eq!(world.refused(1).await.len(), 1);
    // The relay died with the rest.
    let events = world.events_of("bad-1").await;
    assert!(!events.is_empty() && events.iter().all(|event| event["id"] == events[0]["id"]), "{events:#?}");
    world.finish().await;
}

#[tokio::test]
async fn a_lost_receipt_is_told_and_its_message_left_to_others() {
    let mut world = serving(Tuning { visibility_s: 5, ..Tuning::default() }, Carriage::SQS).await;
    let arns = world.fake.seed(json!({"count": 3})).await;
    let queue = world.queues.name_of(Role::Requests);
    world.lock_postgres().await;
    for (number, arn) in arns.iter().enumerate() {
        world.publish(request(&format!("r{number}"), arn, json!({}))).await;
    }
    eventually("all are in hand", || async { (world.waiting().await == 0).then_some(()) }).await;
    // Throttled for a while, which loses nothing; then SQS says that one receipt is of no more use.
    let throttled = Kind::Call { status: 403, code: "RequestThrottled" };
    world.proxy.trouble("ChangeMessageVisibilityBatch", &queue, "", throttled, 2);
    logs(&world, 0, "could not be kept hidden").await;
    assert!(left(&world, "receipt_lost").await < 0.5);
    let gone = Kind::Entries { code: "ReceiptHandleIsInvalid", is_senders_fault: true };
    world.proxy.trouble("ChangeMessageVisibilityBatch", &queue, "", gone, 1);
    eventually("a receipt is lost", || async { (left(&world, "receipt_lost").await > 0.5).then_some(()) }).await;
    world.unlock_postgres().await;
    for number in 0..arns.len() {
        world.succeeded(&format!("r{number}")).await;
    }
    world.finish().await;
}

#[tokio::test]
async fn throttled_receives_and_slow_answers_end_no_session() {
    let mut world = serving(Tuning::hasty(), Carriage::SQS).await;
    let arn = world.fake.key().await;
    let queue = world.queues.name_of(Role::Requests);
    world.proxy.trouble("ReceiveMessage", &queue, "", Kind::Call { status: 403, code: "RequestThrottled" }, 2);
    logs(&world, 0, "a receive failed").await;
    // What the double has hidden for a receive whose answer was lost comes again.
    world.proxy.trouble("ReceiveMessage", &queue, "", Kind::LoseAnswer, 1);
    world.publish(request("r1", &arn, json!({}))).await;
    world.succeeded("r1").await;
    let sessions = "keyferry_broker_sessions_total{role=\"ingress\",transport=\"sqs\"}";
    assert!(world.workers[0].metric(sessions).await < 1.5);
    world.finish().await;
}

#[tokio::test]
async fn sqs_that_is_away_for_long_is_told_and_waited_for() {
    let mut world = serving(Tuning::hasty(), Carriage::SQS).await;
    let arn = world.fake.key().await;
    world.proxy.close();
    says(&world, 0, "not ready: sqs ingress").await;
    world.proxy.open();
    says(&world, 0, "ready").await;
    world.publish(request("r1", &arn, json!({}))).await;
    world.succeeded("r1").await;
    // Events wait in the outbox meanwhile.
    world.until("all is told", "select count(*) from outbox", 0).await;
    world.finish().await;
}

#[tokio::test]
async fn events_of_which_a_part_fails_are_all_told_in_the_end() {
    for carriage in [Carriage::SQS, Carriage::SQS_FIFO] {
        let mut world = World::over(Tuning::default(), carriage).await;
        let queue = world.queues.name_of(Role::Events);
        let arns = world.fake.seed(json!({"count": 6})).await;
        // Transient; for its content; a lost answer; a throttled call.
        world.proxy.trouble("SendMessageBatch", &queue, "\\\"r2\\\"", SERVER_FAULT, 2);
        world.proxy.trouble("SendMessageBatch", &queue, "\\\"r4\\\"", SENDER_FAULT, usize::MAX);
        world.proxy.trouble("SendMessageBatch", &queue, "", Kind::Call { status: 403, code: "RequestThrottled" }, 1);
        world.proxy.trouble("SendMessageBatch", &queue, "", Kind::LoseAnswer, 1);
        for (number, arn) in arns.iter().enumerate() {
            world.publish(request(&format!("r{number}"), arn, json!({}))).await;
        }
        world.serve().await;
        for number in 0..arns.len() {
            world.succeeded(&format!("r{number}")).await;
        }
        world.until("one event is held", "select count(*) from outbox where held_because is not null", 1).await;
        world.until("the others are told", "select count(*) from outbox where held_because is null", 0).await;
        world.proxy.calm();
        world.db.advance(Duration::from_secs(60)).await;
        world.until("all events are told", "select count(*) from outbox", 0).await;
        for number in 0..arns.len() {
            assert!(!world.events_of(&format!("r{number}")).await.is_empty(), "r{number}");
        }
        world.finish().await;
    }
}

#[tokio::test]
async fn submit_publishes_over_sqs() {
    for carriage in [Carriage::SQS, Carriage::SQS_FIFO] {
        let mut world = serving(Tuning::default(), carriage).await;
        let arns = world.fake.seed(json!({"count": 25})).await;
        let queue = world.queues.name_of(Role::Requests);
        world.proxy.trouble("SendMessageBatch", &queue, "\\\"r7\\\"", SERVER_FAULT, 1);
        let requests: Vec<Value> =
            arns.iter().enumerate().map(|(number, arn)| request(&format!("r{number}"), arn, json!({}))).collect();
        let lines: Vec<String> = requests.iter().map(Value::to_string).collect();
        let ran = world.run_with(&["submit", "--file", "-", "--wait", "--json"], &[], &lines.join("\n")).await;
        assert_eq!(ran.code, Some(0), "{ran:?}");
        let submitted = lines.into_iter().map(|line| Message {
            body: line.into_bytes(),
            content_type: Some("application/json".into()),
            ..Message::default()
        });
        world.note_published(submitted);
        // One that SQS will not have is told, and so is a transport that has no settings.
        world.proxy.trouble("SendMessageBatch", &queue, "\\\"refused\\\"", SENDER_FAULT, 1);
        let ran = world.run(&["submit", "--key", &arns[0], "--id", "refused", "--over", "sqs"]).await;
        assert!(ran.code == Some(1) && ran.err.contains("did not take 1 of 1"), "{ran:?}");
        let ran = world.run(&["submit", "--key", &arns[0], "--over", "rabbitmq"]).await;
        assert!(ran.code == Some(2) && ran.err.contains("rabbitmq.url"), "{ran:?}");
        world.finish().await;
    }
}
