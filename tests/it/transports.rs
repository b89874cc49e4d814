//! One contract, every transport: the same bodies over RabbitMQ, SQS and SQS FIFO, each carrying requests and events.
//! What holds alike is told by the same test; the checker's invariants are judged at the end of each.

use crate::refused::every_bad_input_is_refused_by_name;
use crate::support::broker::Message;
use crate::support::contract;
use crate::support::eventually;
use crate::support::fake::WORKER;
use crate::support::world::{Carriage, Carrier, Tuning, World, request};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

contract!(
    a_request_becomes_a_job_and_its_outcome_an_event,
    copies_are_one_job,
    what_was_received_by_a_worker_that_died_is_received_again,
    what_was_committed_and_not_settled_is_a_duplicate,
    what_was_refused_and_not_settled_is_refused_once,
    bad_input_is_refused_by_name,
    a_dead_letter_is_what_was_sent,
    a_broker_that_goes_away_in_the_middle_costs_nothing,
    a_store_that_is_away_costs_no_receipt,
    what_is_in_hand_is_given_back_at_once,
    a_thousand_messages_are_drained_once,
    requests_for_one_key_keep_their_order,
    a_poison_message_takes_nothing_with_it,
    an_event_is_published_again_after_a_death,
    death_at_every_boundary_under_load,
);

/// What an audit entry says of a job's ingress, and which entries do.
const INGRESS: &str = "entry::jsonb #>> '{details,ingress}'";
const ACCEPTED: &str = "from audit_entry where entry::jsonb ->> 'kind' = 'accepted'";

async fn serving(tuning: Tuning, carriage: Carriage) -> World {
    let mut world = World::over(tuning, carriage).await;
    world.serve().await;
    world
}

fn transport(carriage: Carriage) -> &'static str {
    if carriage.requests[0].is_sqs() { "sqs" } else { "rabbitmq" }
}

/// Verdicts of a worker so far.
async fn verdicts(world: &World, at: usize, carriage: Carriage, verdict: &str) -> f64 {
    let transport = transport(carriage);
    let series = format!("keyferry_intake_messages_total{{transport=\"{transport}\",verdict=\"{verdict}\"}}");
    world.workers[at].metric(&series).await
}

async fn imports(world: &World, arn: &str) -> usize {
    let imports = world.fake.journal(&format!("key={arn}&effect=imported")).await;
    imports.iter().filter(|call| call["access_key"] == WORKER).count()
}

async fn a_request_becomes_a_job_and_its_outcome_an_event(carriage: Carriage) {
    let mut world = serving(Tuning::default(), carriage).await;
    world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    let body = request("r1", &arn, json!({"source_key_identifier": "payroll"})).to_string().into_bytes();
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let headers = BTreeMap::from([("traceparent".to_owned(), traceparent.to_owned())]);
    world.send(Message { body, content_type: Some("application/json".into()), headers, ..Message::default() }).await;
    world.succeeded("r1").await;
    let kept: (String, Option<String>) = {
        let accepted = format!("select {INGRESS}, (select traceparent from job) {ACCEPTED}");
        let row = world.client.query_one(&accepted, &[]).await.unwrap();
        (row.get(0), row.get(1))
    };
    assert_eq!(kept, (transport(carriage).to_owned(), Some(traceparent.to_owned())));
    let events = world.events_of("r1").await;
    assert_eq!((events.len(), &events[0]["subject"]), (1, &json!(arn)));
    let event = world.events().await[0].clone();
    assert_eq!(
        (&events[0]["traceparent"], &event.headers["traceparent"]),
        (&json!(traceparent), &traceparent.to_owned())
    );
    match carriage.events {
        Carrier::RabbitMq => {}
        Carrier::Sqs => assert_eq!((event.group, &event.headers["type"]), (None, &"io.keyferry.job.succeeded".into())),
        Carrier::SqsFifo => assert_eq!(event.group.as_deref(), Some(arn.as_str())),
    }
    for role in ["ingress", "events"] {
        let sessions =
            format!("keyferry_broker_sessions_total{{role=\"{role}\",transport=\"{}\"}}", transport(carriage));
        assert!(world.workers[0].metric(&sessions).await >= 1.0, "{role}");
    }
    world.finish().await;
}

async fn copies_are_one_job(carriage: Carriage) {
    let mut world = serving(Tuning::default(), carriage).await;
    world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    for _ in 0..4 {
        world.publish(request("r1", &arn, json!({"source_key_identifier": "payroll"}))).await;
    }
    world.succeeded("r1").await;
    eventually("copies are counted", || async {
        (verdicts(&world, 0, carriage, "duplicate").await > 2.5).then_some(())
    })
    .await;
    assert_eq!(imports(&world, &arn).await, 1);
    world.finish().await;
}

/// One request, a worker that dies at the failpoint, and what is in the tables then.
async fn killed_at(failpoint: &str, body: Value, carriage: Carriage) -> World {
    let mut world = World::over(Tuning::hasty(), carriage).await;
    world.publish(body).await;
    let first = world.start(failpoint).await;
    assert!(world.workers[first].aborted().await, "{failpoint} did not end the worker");
    world
}

async fn what_was_received_by_a_worker_that_died_is_received_again(carriage: Carriage) {
    let mut world = killed_at("intake.after_receive=return", json!({"id": "r1", "key": "nonsense"}), carriage).await;
    assert_eq!(world.count("select (select count(*) from job) + (select count(*) from refusal)").await, 0);
    world.serve().await;
    assert_eq!(world.refused(1).await.len(), 1);
    assert_eq!(world.dead_letters(1).await.len(), 1);
    world.finish().await;
}

async fn what_was_committed_and_not_settled_is_a_duplicate(carriage: Carriage) {
    let mut world = World::over(Tuning::hasty(), carriage).await;
    world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    world.publish(request("r1", &arn, json!({"source_key_identifier": "payroll"}))).await;
    let first = world.start("intake.after_commit=return").await;
    assert!(world.workers[first].aborted().await);
    assert_eq!(world.count("select count(*) from job").await, 1);
    let second = world.serve().await;
    world.succeeded("r1").await;
    eventually("it comes again", || async {
        (verdicts(&world, second, carriage, "duplicate").await > 0.5).then_some(())
    })
    .await;
    assert_eq!(imports(&world, &arn).await, 1);
    world.finish().await;
}

async fn what_was_refused_and_not_settled_is_refused_once(carriage: Carriage) {
    let mut world = killed_at("intake.after_commit=return", json!({"id": "bad", "key": "nonsense"}), carriage).await;
    world.refused(1).await;
    assert_eq!(world.dead().await.len(), 0);
    world.serve().await;
    assert_eq!(world.dead_letters(1).await.len(), 1);
    assert_eq!(world.refused(1).await.len(), 1);
    assert_eq!(world.events_of("bad").await.len(), 1);
    world.finish().await;
}

async fn bad_input_is_refused_by_name(carriage: Carriage) {
    every_bad_input_is_refused_by_name(carriage).await;
}

async fn a_dead_letter_is_what_was_sent(carriage: Carriage) {
    let mut world = serving(Tuning::default(), carriage).await;
    let sent: Vec<Message> = (0..12)
        .map(|number| Message {
            body: format!("{{\"id\":\"bad-{number}\",\"key\":\"käse {number}\"}}\n").into_bytes(),
            content_type: Some("application/json".into()),
            headers: BTreeMap::from([
                ("keyferry-signature".to_owned(), format!("v1;key={number}")),
                ("team".to_owned(), "payroll".to_owned()),
            ]),
            ..Message::default()
        })
        .collect();
    for message in &sent {
        world.send(message.clone()).await;
    }
    world.dead_letters(sent.len()).await;
    let dead: BTreeSet<Message> = world
        .dead()
        .await
        .iter()
        .map(|one| Message {
            body: one.body.clone(),
            content_type: one.content_type.clone(),
            headers: one.headers.clone(),
            ..Message::default()
        })
        .collect();
    assert_eq!(dead, sent.into_iter().collect());
    world.finish().await;
}

async fn a_broker_that_goes_away_in_the_middle_costs_nothing(carriage: Carriage) {
    let mut world = serving(Tuning::hasty(), carriage).await;
    world.symmetric_key("payroll").await;
    let arns = world.fake.seed(json!({"count": 40})).await;
    for (number, arn) in arns.iter().enumerate() {
        world.publish(request(&format!("r{number}"), arn, json!({"source_key_identifier": "payroll"}))).await;
        if number % 15 == 7 {
            if carriage.requests[0].is_sqs() {
                world.proxy.close();
                eventually("the worker notices", || async {
                    world.workers[0].log().contains("a receive failed").then_some(())
                })
                .await;
                world.proxy.open();
            } else {
                world.vhost.cut_connections("keyferry ingress").await;
            }
        }
    }
    for number in 0..arns.len() {
        world.succeeded(&format!("r{number}")).await;
    }
    world.finish().await;
}

/// Longer than SQS hides a message by itself: the heartbeat holds it.
async fn a_store_that_is_away_costs_no_receipt(carriage: Carriage) {
    const AWAY: Duration = Duration::from_secs(12);
    let mut world = serving(Tuning { visibility_s: 5, ..Tuning::default() }, carriage).await;
    world.symmetric_key("payroll").await;
    let arns = world.fake.seed(json!({"count": 5})).await;
    world.lock_postgres().await;
    let from = Instant::now();
    for (number, arn) in arns.iter().enumerate() {
        world.publish(request(&format!("r{number}"), arn, json!({"source_key_identifier": "payroll"}))).await;
    }
    eventually("all are in hand", || async { (world.waiting().await == 0).then_some(()) }).await;
    while from.elapsed() < AWAY {
        assert_eq!(world.waiting().await, 0, "a message shows up while it is in hand");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    world.unlock_postgres().await;
    for number in 0..arns.len() {
        world.succeeded(&format!("r{number}")).await;
    }
    let sessions = format!("keyferry_broker_sessions_total{{role=\"ingress\",transport=\"{}\"}}", transport(carriage));
    assert!(world.workers[0].metric(&sessions).await < 1.5, "the consumer is not rebuilt");
    assert!(verdicts(&world, 0, carriage, "duplicate").await < 0.5, "nothing came twice");
    if carriage.requests[0].is_sqs() {
        assert_eq!(world.proxy.most_receipts(), 1);
        assert!(world.proxy.calls("ChangeMessageVisibilityBatch") >= 4);
    }
    world.finish().await;
}

async fn what_is_in_hand_is_given_back_at_once(carriage: Carriage) {
    let mut world = serving(Tuning::default(), carriage).await;
    let arns = world.fake.seed(json!({"count": 25})).await;
    world.lock_postgres().await;
    for (number, arn) in arns.iter().enumerate() {
        world.publish(request(&format!("r{number}"), arn, json!({}))).await;
    }
    eventually("all are in hand", || async { (world.waiting().await == 0).then_some(()) }).await;
    let from = Instant::now();
    world.workers[0].signal(Signal::TERM);
    eventually("all are back", || async { (world.waiting().await == 25).then_some(()) }).await;
    // SQS would hide them for a minute; a receive that is under way is awaited for a second.
    assert!(from.elapsed() < Duration::from_secs(15), "{:?}", from.elapsed());
    world.workers[0].ends_well().await;
    assert_eq!(world.waiting().await, 25);
    world.unlock_postgres().await;
    world.serve().await;
    for number in 0..arns.len() {
        world.succeeded(&format!("r{number}")).await;
    }
    world.finish().await;
}

async fn a_thousand_messages_are_drained_once(carriage: Carriage) {
    const COUNT: usize = 1_000;
    const REQUESTS: usize = 200;
    let mut world = World::over(Tuning { visibility_s: 120, ..Tuning::default() }, carriage).await;
    let arns = world.fake.seed(json!({"count": 20})).await;
    // Each five times, and jobs that end with one call: tried is the way of messages, and jobs cost the checker.
    let named = json!({"source_key_identifier": "no-such-key"});
    let one = |number: usize| request(&format!("r{number}"), &arns[number % arns.len()], named.clone());
    world.publish_all((0..COUNT).map(|number| one(number % REQUESTS)).collect()).await;
    for _ in 0..2 {
        world.serve().await;
    }
    let end = Instant::now() + Duration::from_secs(200);
    let told = loop {
        let mut told = BTreeMap::new();
        for at in 0..2 {
            for verdict in ["accepted", "duplicate", "refused"] {
                *told.entry(verdict).or_default() += verdicts(&world, at, carriage, verdict).await;
            }
        }
        if told.values().sum::<f64>() > 999.5 || Instant::now() > end {
            break told;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    // Each message was decided once: none is lost, and none came twice.
    assert_eq!(told, BTreeMap::from([("accepted", 200.0), ("duplicate", 800.0), ("refused", 0.0)]));
    if carriage.requests[0].is_sqs() {
        assert_eq!(world.proxy.most_receipts(), 1);
    }
    world.until("all jobs have ended", "select count(*) from job where state = 'failed'", 200).await;
    world.finish().await;
}

async fn requests_for_one_key_keep_their_order(carriage: Carriage) {
    // A standard queue promises no order.
    if carriage.requests[0] == Carrier::Sqs {
        return;
    }
    // The double gives one group to two receives at once, which SQS does not.
    let mut world = World::over(Tuning { pollers: 1, ..Tuning::default() }, carriage).await;
    world.symmetric_key("payroll").await;
    let arns = world.fake.seed(json!({"count": 2})).await;
    for number in 0..12 {
        let named = json!({"source_key_identifier": "payroll"});
        world.publish(request(&format!("r{number}"), &arns[number % 2], named)).await;
    }
    world.serve().await;
    for number in 0..12_usize {
        let job = world.succeeded(&format!("r{number}")).await;
        assert_eq!(job.seq, i64::try_from(number / 2 + 1).ok(), "r{number}");
    }
    world.finish().await;
}

async fn a_poison_message_takes_nothing_with_it(carriage: Carriage) {
    let mut world = World::over(Tuning::default(), carriage).await;
    let arns = world.fake.seed(json!({"count": 12})).await;
    world.client.batch_execute("alter table job add check (request_id <> 'poison')").await.unwrap();
    for (number, arn) in arns.iter().enumerate() {
        let id = if number == 5 { "poison".to_owned() } else { format!("r{number}") };
        world.publish(request(&id, arn, json!({}))).await;
    }
    world.serve().await;
    for number in (0..arns.len()).filter(|number| *number != 5) {
        world.succeeded(&format!("r{number}")).await;
    }
    let refused = world.refused(1).await;
    assert_eq!((refused.len(), refused[0].code.as_str()), (1, "unstorable"));
    assert_eq!(world.dead_letters(1).await.len(), 1);
    world.finish().await;
}

async fn an_event_is_published_again_after_a_death(carriage: Carriage) {
    let mut world = World::over(Tuning::hasty(), carriage).await;
    let arn = world.fake.key().await;
    world.publish(request("r1", &arn, json!({}))).await;
    let first = world.start("outbox.after_publish=return").await;
    assert!(world.workers[first].aborted().await);
    assert_eq!(world.events_now("r1").await.len(), 1);
    assert_eq!(world.count("select count(*) from outbox").await, 1);
    world.db.advance(Duration::from_secs(31)).await;
    world.serve().await;
    world.until("the event is published again", "select count(*) from outbox", 0).await;
    // FIFO forgets what was taken out, the double does at least: copies have one id all the same.
    let events = world.events_of("r1").await;
    assert!((1..=2).contains(&events.len()) && events.iter().all(|event| event == &events[0]), "{events:#?}");
    world.finish().await;
}

async fn death_at_every_boundary_under_load(carriage: Carriage) {
    const FAILPOINTS: [&str; 10] = [
        "intake.after_receive",
        "intake.after_commit",
        "sqs.after_dead_letter",
        "worker.after_claim",
        "worker.after_prepare",
        "worker.after_answer",
        "worker.after_import",
        "worker.before_settle",
        "worker.after_settle",
        "outbox.after_publish",
    ];
    let mut world = World::over(Tuning::hasty(), carriage).await;
    world.symmetric_key("payroll").await;
    let arns = world.fake.seed(json!({"count": 12})).await;
    let named = json!({"source_key_identifier": "payroll"});
    for (number, arn) in arns.iter().enumerate() {
        world.publish(request(&format!("r{number}"), arn, named.clone())).await;
        world.publish(request(&format!("r{number}"), arn, named.clone())).await;
        if number % 3 == 0 {
            world.publish(json!({"id": format!("bad-{number}"), "key": "nonsense"})).await;
        }
    }
    for failpoint in FAILPOINTS {
        // Not the first time it is passed, but where several jobs are under way. What is left may not reach it.
        let at = world.start(&format!("{failpoint}=1*off->return")).await;
        let end = Instant::now() + Duration::from_secs(4);
        while world.workers[at].is_running() && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        world.workers[at].kill();
    }
    world.serve().await;
    for number in 0..arns.len() {
        world.succeeded(&format!("r{number}")).await;
    }
    world.refused(4).await;
    world.db.advance(Duration::from_secs(31)).await;
    world.finish().await;
}

#[tokio::test]
async fn both_transports_feed_one_worker() {
    const CARRIAGE: Carriage = Carriage { requests: &[Carrier::Sqs, Carrier::RabbitMq], events: Carrier::RabbitMq };
    let mut world = serving(Tuning::default(), CARRIAGE).await;
    world.symmetric_key("payroll").await;
    let arns = world.fake.seed(json!({"count": 20})).await;
    for (number, arn) in arns.iter().enumerate() {
        let carrier = CARRIAGE.requests[number % 2];
        let body = request(&format!("r{number}"), arn, json!({"source_key_identifier": "payroll"})).to_string();
        let message = Message { body: body.into_bytes(), ..Message::default() };
        world.send_over(carrier, message.clone()).await;
        // The same request by the other way is a duplicate.
        if number < 4 {
            world.send_over(CARRIAGE.requests[(number + 1) % 2], message).await;
        }
    }
    for number in 0..arns.len() {
        world.succeeded(&format!("r{number}")).await;
    }
    for carrier in CARRIAGE.requests {
        let body = format!("no request, over {carrier:?}").into_bytes();
        world.send_over(*carrier, Message { body, ..Message::default() }).await;
    }
    assert_eq!(world.dead_letters(2).await.len(), 2);
    let by: Vec<(String, i64)> = world
        .client
        .query(&format!("select {INGRESS}, count(*) {ACCEPTED} group by 1 order by 1"), &[])
        .await
        .unwrap()
        .iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect();
    assert_eq!(by.iter().map(|(_, count)| count).sum::<i64>(), 20);
    assert_eq!(by.len(), 2, "{by:?}");
    world.finish().await;
}

#[tokio::test]
async fn requests_over_rabbitmq_may_have_their_events_on_sqs() {
    const CARRIAGE: Carriage = Carriage { requests: &[Carrier::RabbitMq], events: Carrier::SqsFifo };
    let mut world = serving(Tuning::default(), CARRIAGE).await;
    let arn = world.fake.key().await;
    for number in 0..3 {
        world.publish(request(&format!("r{number}"), &arn, json!({"source_key_identifier": "no-such-key"}))).await;
    }
    for number in 0..3 {
        world.failed(&format!("r{number}"), "source_key_unknown").await;
        assert_eq!(world.events_of(&format!("r{number}")).await.len(), 1);
    }
    let sequence: Vec<Value> = world.events().await.iter().map(|event| event.json()["sequence"].clone()).collect();
    assert_eq!(sequence.len(), 3);
    assert!(world.events().await.iter().all(|event| event.group.as_deref() == Some(arn.as_str())));
    world.finish().await;
}
