//! Dead letters over every transport: shown without being lost or moved, matched to their refusals, sent again.

use crate::support::broker::{DEAD, JOBS, Message, Received};
use crate::support::contract;
use crate::support::eventually;
use crate::support::sqs::Role;
use crate::support::sqs_proxy::Kind;
use crate::support::world::{Carriage, Ran, Tuning, World, request};
use lapin::BasicProperties;
use lapin::options::{BasicGetOptions, BasicNackOptions, BasicPublishOptions};
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use uuid::Uuid;

contract!(
    many_letters_are_looked_at_twice_and_none_is_lost_or_moved,
    letters_are_told_with_their_refusals_and_chosen_by_them,
    a_letter_whose_cause_was_mended_becomes_a_job,
    a_letter_that_is_refused_again_comes_back_and_is_not_chased,
    a_redrive_that_dies_between_publishing_and_settling_makes_a_copy,
    a_letter_that_the_broker_took_away_is_told_of_and_sent_again,
    a_copy_of_an_accepted_request_is_no_refusal_and_stays,
    letters_leave_no_faster_than_asked_and_stay_where_nothing_takes_them,
);

const REFUSED: &str = "select count(*) from refused";
/// Where no request may go, until a test allows it.
const ELSEWHERE: &str = "us-west-2";

async fn ok(world: &World, arguments: &[&str]) -> Ran {
    let ran = world.run(arguments).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    ran
}

/// `dead list` with more arguments. SQS promises no order: there the oldest refusal comes first here.
async fn list(world: &World, more: &[&str]) -> Value {
    let mut listed = ok(world, &[&["dead", "list", "--json"], more].concat()).await.json();
    if is_sqs(world) {
        let letters = listed["letters"].as_array_mut().unwrap();
        letters.sort_by_key(|letter| letter["refusal"].as_str().unwrap_or_default().to_owned());
    }
    listed
}

fn is_sqs(world: &World) -> bool {
    world.carriage.requests[0].is_sqs()
}

/// A worker's verdicts so far.
async fn verdicts(world: &World, at: usize, verdict: &str) -> f64 {
    let transport = if is_sqs(world) { "sqs" } else { "rabbitmq" };
    let series = format!("keyferry_intake_messages_total{{transport=\"{transport}\",verdict=\"{verdict}\"}}");
    world.workers[at].metric(&series).await
}

async fn serving(carriage: Carriage) -> World {
    let mut world = World::over(Tuning::default(), carriage).await;
    world.serve().await;
    world
}

fn sorted(mut texts: Vec<String>) -> Vec<String> {
    texts.sort();
    texts
}

fn column(list: &Value, name: &str) -> Vec<String> {
    let letters = list["letters"].as_array().unwrap();
    letters.iter().map(|letter| letter[name].as_str().unwrap_or_default().to_owned()).collect()
}

async fn redrive(world: &World, more: &[&str]) -> Value {
    ok(world, &[&["dead", "redrive", "--json"], more].concat()).await.json()
}

/// Waits until so many messages can be had from a queue.
async fn holds(world: &World, role: Role, count: u32) {
    eventually(&format!("{role:?} holds {count}"), || async { (world.ready_in(role).await == count).then_some(()) })
        .await;
}

/// Puts dead letters, past Keyferry.
async fn put_dead(world: &World, bodies: impl IntoIterator<Item = String>) {
    let mut sent = Vec::new();
    for body in bodies {
        if is_sqs(world) {
            let message = Message { body: body.into_bytes(), ..Message::default() };
            world.queues.put(Role::Dead, &message, &Uuid::new_v4().to_string()).await;
            continue;
        }
        let (options, properties) = (BasicPublishOptions::default(), BasicProperties::default().with_delivery_mode(2));
        let channel = world.vhost.channel();
        sent.push(channel.basic_publish("".into(), DEAD.into(), options, body.as_bytes(), properties).await.unwrap());
    }
    for confirmation in sent {
        confirmation.await.unwrap();
    }
}

/// Takes all dead letters, unseen by the checker.
async fn take_dead(world: &World) -> Vec<Received> {
    if is_sqs(world) { world.queues.take(Role::Dead).await } else { world.vhost.take(DEAD).await }
}

/// Lets requests go elsewhere too, from the next start on.
fn allow_elsewhere(world: &World) {
    world.configure(&format!("[[targets]]\naccount = \"111122223333\"\nregions = [\"{ELSEWHERE}\"]\n"));
}

/// So many requests that are refused as long as nobody may go elsewhere, and a worker that has refused them and is gone.
async fn refused_world(tuning: Tuning, carriage: Carriage, count: usize) -> World {
    let mut world = World::over(tuning, carriage).await;
    world.serve().await;
    let arns = world.fake.seed(json!({"count": count, "region": ELSEWHERE})).await;
    for (number, arn) in arns.iter().enumerate() {
        world.publish(request(&format!("r{number}"), arn, json!({}))).await;
    }
    world.refused(count).await;
    holds(&world, Role::Dead, u32::try_from(count).unwrap()).await;
    world.workers[0].stop().await;
    world
}

async fn many_letters_are_looked_at_twice_and_none_is_lost_or_moved(carriage: Carriage) {
    // Of SQS's heartbeat something is to be seen.
    let world = World::over(Tuning { visibility_s: 5, ..Tuning::default() }, carriage).await;
    let arn = world.fake.key().await;
    // More than a consumer is let have at once, and more than RabbitMQ lets have where no prefetch is set.
    let count = if is_sqs(&world) { 400_u32 } else { 2_300 };
    let ids: Vec<String> = (0..count).map(|number| format!("l{number:04}")).collect();
    put_dead(&world, ids.iter().map(|id| request(id, &arn, json!({})).to_string())).await;
    holds(&world, Role::Dead, count).await;
    let mut rows = Vec::new();
    for round in 0..2 {
        let listed = list(&world, &["--limit", "5000"]).await;
        let told = column(&listed, "request_id");
        assert_eq!(if is_sqs(&world) { sorted(told) } else { told }, ids, "in the queue's order");
        // Nobody has refused them: they are given rows, once.
        assert_eq!(
            (&listed["recorded"], &listed["waiting"]),
            (&json!(if round == 0 { count } else { 0 }), &json!(count))
        );
        assert!(column(&listed, "code").iter().all(|code| code == "dead_lettered_by_broker"));
        rows.push(column(&listed, "refusal"));
        holds(&world, Role::Dead, count).await;
    }
    assert_eq!(rows[0], rows[1]);
    assert_eq!(world.count(REFUSED).await, i64::from(count));
    // Beyond the first of a minute they are told of together.
    let told = world.count("select count(*) from refusal").await;
    assert!((10..i64::from(count)).contains(&told), "{told}");
    assert_eq!(world.count("select count(*) from audit_entry").await, told);
    assert_eq!(world.count("select count(*) from outbox").await, told);
    let left = take_dead(&world).await;
    let left: Vec<String> = left.iter().map(|letter| letter.json()["id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(if is_sqs(&world) { sorted(left) } else { left }, ids);
}

async fn letters_are_told_with_their_refusals_and_chosen_by_them(carriage: Carriage) {
    let mut world = serving(carriage).await;
    let arn = world.fake.key().await;
    let secret = "hunter2-correct-horse";
    world.note_secret("a publisher's secret", secret.as_bytes());
    let elsewhere = arn.replace("eu-central-1", ELSEWHERE);
    let bodies = [
        request("a", &elsewhere, json!({})).to_string(),
        request("b", &arn, json!({"password": secret})).to_string(),
        format!("no request, but {secret}"),
        request("d", &elsewhere, json!({"batch": "x"})).to_string(),
    ];
    for (number, body) in bodies.iter().enumerate() {
        world.send(Message { body: body.clone().into_bytes(), ..Message::default() }).await;
        world.refused(number + 1).await;
        holds(&world, Role::Dead, u32::try_from(number + 1).unwrap()).await;
    }
    let all = list(&world, &[]).await;
    assert_eq!(column(&all, "code"), ["unknown_target", "unknown_field", "not_json", "unknown_target"]);
    assert_eq!(column(&all, "request_id"), ["a", "b", "", "d"]);
    assert_eq!(column(&all, "field"), ["key", "password", "", "key"]);
    assert_eq!(column(&all, "operation"), ["import", "", "", "import"]);
    assert_eq!(column(&all, "key"), [elsewhere.as_str(), &arn, "", &elsewhere]);
    // Of what a worker has sent, SQS says no more than that.
    let (queue, reason) = if is_sqs(&world) { ("", Value::Null) } else { (JOBS, json!("rejected")) };
    assert!(column(&all, "queue").iter().all(|told| told == queue));
    assert!(column(&all, "principal").iter().all(|principal| principal == "anonymous"));
    assert_eq!((&all["recorded"], &all["waiting"]), (&json!(0), &json!(4)));
    let rows = world.refused(4).await;
    assert!(column(&all, "refusal").iter().all(|id| rows.iter().any(|row| row.id.to_string() == *id)));
    for (arguments, found) in [
        (vec!["--code", "unknown_target"], vec!["a", "d"]),
        (vec!["--code", "unknown_target", "--limit", "1"], vec!["a"]),
        (vec!["--principal", "anonymous", "--code", "unknown_field"], vec!["b"]),
        (vec!["--principal", "somebody"], vec![]),
        (vec!["--since", "1h", "--code", "unknown_field"], vec!["b"]),
        (vec!["--since", "2099-01-01T00:00:00Z"], vec![]),
    ] {
        let told = column(&list(&world, &arguments).await, "request_id");
        // Which one comes first, SQS does not promise.
        let is_any = is_sqs(&world) && arguments.contains(&"--limit");
        assert!(if is_any { told.len() == 1 } else { told == found }, "{arguments:?}: {told:?}");
    }
    let human = ok(&world, &["dead", "list"]).await;
    assert!(human.out.starts_with("REFUSAL") && human.err.contains("4 shown, 4 in the queue"), "{human:?}");
    assert!(!human.out.contains(secret) && !all.to_string().contains(secret));

    let id = &column(&all, "refusal")[1];
    let shown = ok(&world, &["dead", "show", id, "--json"]).await;
    assert!(!shown.out.contains(secret), "{shown:?}");
    let shown = shown.json();
    assert_eq!(shown["body"]["password"], format!("({} characters)", secret.len()));
    assert_eq!((&shown["reason"], &shown["code"]), (&reason, &json!("unknown_field")));
    assert!(shown["message"].as_str().unwrap().contains("password"));
    let whole = ok(&world, &["dead", "show", id, "--unmasked", "--json"]).await.json();
    assert_eq!(whole["body"], serde_json::from_str::<Value>(&bodies[1]).unwrap());
    let unknown = world.run(&["dead", "show", "00000000-0000-0000-0000-000000000001", "--json"]).await;
    assert!(unknown.code == Some(1) && unknown.err.contains("dead_letter_unknown"), "{unknown:?}");
    holds(&world, Role::Dead, 4).await;
    world.finish().await;
}

async fn a_letter_whose_cause_was_mended_becomes_a_job(carriage: Carriage) {
    let mut world = refused_world(Tuning::default(), carriage, 6).await;
    // Mended, and sent again while no worker runs.
    allow_elsewhere(&world);
    let listed = list(&world, &[]).await;
    let ids: BTreeMap<String, String> =
        column(&listed, "request_id").into_iter().zip(column(&listed, "refusal")).collect();
    let done = redrive(&world, &[&ids["r4"], &ids["r1"]]).await;
    assert_eq!((&done["matched"], &done["redriven"], &done["seen"]), (&json!(2), &json!(2), &json!(6)));
    holds(&world, Role::Requests, 2).await;
    holds(&world, Role::Dead, 4).await;
    assert_eq!(
        {
            let told = column(&list(&world, &[]).await, "request_id");
            if is_sqs(&world) { sorted(told) } else { told }
        },
        ["r0", "r2", "r3", "r5"],
        "those left keep their places"
    );
    let at = world.serve().await;
    for id in ["r1", "r4"] {
        world.succeeded(id).await;
    }
    // And while one runs.
    let done = redrive(&world, &["--code", "unknown_target", "--limit", "3"]).await;
    assert_eq!(done["redriven"], json!(3));
    let missing = world.run(&["dead", "redrive", &ids["r1"], "--json"]).await;
    assert!(missing.code == Some(1) && missing.err.contains("1 of the refusals named"), "{missing:?}");
    assert_eq!(redrive(&world, &["--all"]).await["redriven"], json!(1));
    for number in 0..6 {
        world.succeeded(&format!("r{number}")).await;
    }
    assert!(verdicts(&world, at, "accepted").await > 5.5);
    world.note_redriven(6);
    world.finish().await;
}

async fn a_letter_that_is_refused_again_comes_back_and_is_not_chased(carriage: Carriage) {
    let mut world = refused_world(Tuning::default(), carriage, 3).await;
    let at = world.serve().await;
    let done = redrive(&world, &["--all"]).await;
    assert_eq!((&done["seen"], &done["redriven"]), (&json!(3), &json!(3)));
    eventually("they are refused again", || async { (verdicts(&world, at, "refused").await > 2.5).then_some(()) })
        .await;
    holds(&world, Role::Dead, 3).await;
    assert_eq!(world.count(REFUSED).await, 3, "the same verdict has one row");
    world.finish().await;
}

async fn a_redrive_that_dies_between_publishing_and_settling_makes_a_copy(carriage: Carriage) {
    // SQS hides the letter for so long after the death.
    let tuning = Tuning { visibility_s: 5, ..Tuning::default() };
    let mut world = refused_world(tuning, carriage, 1).await;
    allow_elsewhere(&world);
    let variables = [("FAILPOINTS", "dead.after_publish=return")];
    let died = world.run_with(&["dead", "redrive", "--all"], &variables, "").await;
    assert_eq!(died.code, None, "{died:?}");
    holds(&world, Role::Requests, 1).await;
    holds(&world, Role::Dead, 1).await;
    assert_eq!(redrive(&world, &["--all"]).await["redriven"], json!(1));
    holds(&world, Role::Requests, 2).await;
    holds(&world, Role::Dead, 0).await;
    let at = world.serve().await;
    world.succeeded("r0").await;
    eventually("the copy is known as one", || async { (verdicts(&world, at, "duplicate").await > 0.5).then_some(()) })
        .await;
    world.note_redriven(1);
    world.finish().await;
}

async fn a_letter_that_the_broker_took_away_is_told_of_and_sent_again(carriage: Carriage) {
    let mut world = World::over(Tuning::default(), carriage).await;
    let arn = world.fake.key().await;
    world.publish(request("poison", &arn, json!({}))).await;
    // As if its consumer had died with it again and again.
    eventually("the broker gives up", || async {
        if is_sqs(&world) {
            world.queues.fumble().await;
            return (world.ready_in(Role::Dead).await == 1).then_some(());
        }
        let channel = world.vhost.channel();
        let taken = channel.basic_get(JOBS.into(), BasicGetOptions::default()).await.unwrap();
        if let Some(message) = taken {
            let again = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
            channel.basic_nack(message.delivery.delivery_tag, again).await.unwrap();
        }
        (world.vhost.ready(DEAD).await == 1).then_some(())
    })
    .await;
    // Nothing is changed where nothing is to be changed.
    let would = redrive(&world, &["--all", "--dry-run"]).await;
    assert_eq!((&would["matched"], &would["redriven"], &would["recorded"]), (&json!(1), &json!(0), &json!(0)));
    assert_eq!((world.count(REFUSED).await, world.count("select count(*) from outbox").await), (0, 0));
    holds(&world, Role::Dead, 1).await;
    assert_eq!(world.ready_in(Role::Requests).await, 0);
    let listed = list(&world, &[]).await;
    assert_eq!(
        (listed["recorded"].clone(), column(&listed, "code")),
        (json!(1), vec!["dead_lettered_by_broker".into()])
    );
    let shown = ok(&world, &["dead", "show", &column(&listed, "refusal")[0], "--json"]).await.json();
    // The double of SQS does not say whence it moved a message.
    assert_eq!(shown["reason"], if is_sqs(&world) { Value::Null } else { json!("delivery_limit") });
    world.serve().await;
    let done = redrive(&world, &["--code", "dead_lettered_by_broker"]).await;
    assert_eq!((&done["redriven"], &done["recorded"]), (&json!(1), &json!(0)));
    world.succeeded("poison").await;
    assert_eq!(world.events_of("poison").await.len(), 2, "it was told as refused, and as done");
    world.note_redriven(1);
    world.finish().await;
}

async fn a_copy_of_an_accepted_request_is_no_refusal_and_stays(carriage: Carriage) {
    let mut world = serving(carriage).await;
    let arn = world.fake.key().await;
    let good = request("good", &arn, json!({}));
    world.publish(good.clone()).await;
    world.succeeded("good").await;
    put_dead(&world, [good.to_string()]).await;
    let listed = list(&world, &[]).await;
    assert_eq!((column(&listed, "code"), &listed["recorded"]), (vec!["accepted_before".to_owned()], &json!(0)));
    let done = redrive(&world, &["--all"]).await;
    assert_eq!((&done["redriven"], &done["copies_of_accepted"]), (&json!(0), &json!(1)));
    holds(&world, Role::Dead, 1).await;
    take_dead(&world).await;
    world.finish().await;
}

#[tokio::test]
async fn everything_of_a_message_but_its_user_and_its_deaths_is_sent_again() {
    let mut world = World::with_worker(Tuning::default()).await;
    let user = url::Url::parse(&world.vhost.url()).unwrap().username().to_owned();
    let mut headers = FieldTable::default();
    headers.insert("traceparent".into(), AMQPValue::LongString("00-x".into()));
    headers.insert("number".into(), AMQPValue::LongInt(7));
    let properties = BasicProperties::default()
        .with_headers(headers)
        .with_user_id(user.as_str().into())
        .with_message_id("m1".into())
        .with_content_type("application/json".into())
        .with_correlation_id("c1".into())
        .with_reply_to("somewhere".into())
        .with_timestamp(1_700_000_000)
        .with_app_id("payroll".into());
    let channel = world.vhost.channel();
    let sent = channel.basic_publish("".into(), JOBS.into(), BasicPublishOptions::default(), b"{}", properties);
    sent.await.unwrap().await.unwrap();
    world.refused(1).await;
    holds(&world, Role::Dead, 1).await;
    world.workers[0].stop().await;
    let listed = list(&world, &[]).await;
    let id = &column(&listed, "refusal")[0];
    let shown = ok(&world, &["dead", "show", id, "--json"]).await.json();
    assert_eq!(shown["sender"], json!({"kind": "rabbitmq_user", "name": user}));
    assert_eq!(shown["headers"], json!({"traceparent": "(4 characters)", "number": "(1 character)"}));
    redrive(&world, &["--all"]).await;
    holds(&world, Role::Requests, 1).await;
    let got = world.vhost.channel().basic_get(JOBS.into(), BasicGetOptions { no_ack: true }).await.unwrap().unwrap();
    let properties = &got.delivery.properties;
    assert_eq!(got.delivery.data, b"{}");
    let headers = properties.headers().as_ref().unwrap().inner();
    let names: Vec<&str> =
        headers.keys().map(lapin::types::ShortString::as_str).filter(|name| *name != "x-delivery-count").collect();
    assert_eq!(names, ["keyferry-redrive", "number", "traceparent"]);
    assert_eq!(headers["keyferry-redrive"], AMQPValue::LongString(id.as_str().into()));
    assert_eq!(headers["number"], AMQPValue::LongInt(7));
    // As whoever sends it again: the broker takes no other.
    let sender = properties.user_id().as_ref().map(lapin::types::ShortString::as_str);
    assert_eq!((sender, *properties.delivery_mode()), (Some(user.as_str()), Some(2)));
    assert_eq!(*properties.timestamp(), Some(1_700_000_000));
    let texts = [
        properties.message_id(),
        properties.content_type(),
        properties.correlation_id(),
        properties.reply_to(),
        properties.app_id(),
    ];
    let texts: Vec<&str> = texts.into_iter().map(|text| text.as_ref().unwrap().as_str()).collect();
    assert_eq!(texts, ["m1", "application/json", "c1", "somewhere", "payroll"]);
}

async fn letters_leave_no_faster_than_asked_and_stay_where_nothing_takes_them(carriage: Carriage) {
    let world = refused_world(Tuning::default(), carriage, 20).await;
    let from = Instant::now();
    let done = redrive(&world, &["--all", "--rate", "10/s", "--limit", "15"]).await;
    assert_eq!(done["redriven"], json!(15));
    // The fifteenth not before 1.4 s.
    assert!(from.elapsed() >= Duration::from_millis(1_400), "{:?}", from.elapsed());
    holds(&world, Role::Dead, 5).await;
    if is_sqs(&world) {
        world.queues.delete(Role::Requests).await;
    } else {
        world.vhost.delete_queue(JOBS).await;
    }
    let lost = world.run(&["dead", "redrive", "--all"]).await;
    assert!(lost.code == Some(1) && lost.err.contains("there is no queue "), "{lost:?}");
    holds(&world, Role::Dead, 5).await;
    // All of them have to be meant.
    for arguments in [&["dead", "redrive"][..], &["dead", "redrive", "--all", "--code", "not_json"]] {
        assert_eq!(world.run(arguments).await.code, Some(2), "{arguments:?}");
    }
    if is_sqs(&world) {
        world.queues.delete(Role::Dead).await;
    } else {
        world.vhost.delete_queue(DEAD).await;
    }
    let gone = world.run(&["dead", "list"]).await;
    assert!(gone.code == Some(1) && gone.err.contains("the dead-letter queue cannot be read"), "{gone:?}");
}

#[tokio::test]
async fn a_policy_under_which_letters_would_be_lost_is_found() {
    let world = World::new(Tuning::default()).await;
    let check = async || world.run(&["topology", "check"]).await;
    assert_eq!(check().await.code, Some(0));
    // A policy of the house takes the place of the one that is still there.
    let broad = json!({"pattern": ".*", "apply-to": "queues", "priority": 200, "definition": {"delivery-limit": 5}});
    world.vhost.set_policy("house", broad).await;
    let checked = check().await;
    assert!(
        checked.code == Some(1) && checked.out.contains("keyferry.dead: its delivery-limit in force is 5"),
        "{checked:?}"
    );
    let own = [("KEYFERRY_RABBITMQ__DEAD_LETTER_QUEUE", "own.dead")];
    let checked = world.run_with(&["topology", "check"], &own, "").await;
    assert!(checked.code == Some(1) && checked.out.contains("queue own.dead: is missing"), "{checked:?}");
}

#[tokio::test]
async fn attributes_and_group_go_back_to_sqs_and_what_has_no_room_stays() {
    for carriage in [Carriage::SQS, Carriage::SQS_FIFO] {
        let mut world = serving(carriage).await;
        let keys = world.fake.seed(json!({"count": 3, "region": ELSEWHERE})).await;
        for (number, attributes) in [(0, 2), (1, 10), (2, 2)] {
            let headers = (0..attributes).map(|at| (format!("team-{at}"), format!("payroll-{number}"))).collect();
            let body = request(&format!("r{number}"), &keys[number], json!({})).to_string().into_bytes();
            world.send(Message { body, headers, ..Message::default() }).await;
        }
        let refused = world.refused(3).await;
        holds(&world, Role::Dead, 3).await;
        world.workers[0].stop().await;
        // One that SQS refuses alone stays; answers that are lost or entries that fail once cost nothing.
        let jobs = world.queues.name_of(Role::Requests);
        let dead = world.queues.name_of(Role::Dead);
        let refusing = Kind::Entries { code: "InvalidMessageContents", is_senders_fault: true };
        let failing = Kind::Entries { code: "InternalError", is_senders_fault: false };
        world.proxy.trouble("SendMessageBatch", &jobs, &keys[2], refusing, 1);
        world.proxy.trouble("DeleteMessageBatch", &dead, "", failing, 1);
        world.proxy.trouble("ChangeMessageVisibilityBatch", &dead, "", failing, 1);
        world.proxy.trouble("ReceiveMessage", &dead, "", Kind::Call { status: 503, code: "ServiceUnavailable" }, 1);
        let done = world.run(&["dead", "redrive", "--all", "--json"]).await;
        assert_eq!((done.code, &done.json()["redriven"], &done.json()["left"]), (Some(1), &json!(1), &json!(2)));
        for (request, reason) in [("r1", "no room for keyferry-redrive"), ("r2", "InvalidMessageContents")] {
            let row = list(&world, &[]).await["letters"]
                .as_array()
                .unwrap()
                .iter()
                .find(|letter| letter["request_id"] == request)
                .unwrap()["refusal"]
                .clone();
            let said = format!("{}: stays: ", row.as_str().unwrap());
            assert!(done.err.lines().any(|line| line.contains(&said) && line.contains(reason)), "{done:?}");
        }
        holds(&world, Role::Dead, 2).await;
        let sent = world.queues.take(Role::Requests).await;
        assert_eq!((sent.len(), &sent[0].json()["id"]), (1, &json!("r0")));
        let names: Vec<&str> = sent[0].headers.keys().map(String::as_str).collect();
        assert_eq!(names, ["keyferry-redrive", "team-0", "team-1"]);
        assert!(refused.iter().any(|row| row.id.to_string() == sent[0].headers["keyferry-redrive"]));
        let group = (carriage.requests == Carriage::SQS_FIFO.requests).then_some(keys[0].as_str());
        assert_eq!(sent[0].group.as_deref(), group);
    }
}

#[tokio::test]
async fn a_policy_by_which_sqs_would_move_dead_letters_away_is_found_and_over_chooses() {
    let world = World::over(Tuning::default(), Carriage::SQS).await;
    assert_eq!(world.run(&["topology", "check"]).await.code, Some(0));
    let target = world.queues.attributes(Role::Events).await["QueueArn"].clone();
    let policy = json!({"deadLetterTargetArn": target, "maxReceiveCount": 3}).to_string();
    world.queues.set(Role::Dead, json!({"RedrivePolicy": policy})).await;
    let checked = world.run(&["topology", "check"]).await;
    assert!(checked.code == Some(1) && checked.out.contains("has a redrive policy of its own"), "{checked:?}");
    let listed = ok(&world, &["dead", "list", "--over", "sqs"]).await;
    assert!(listed.err.contains("has a redrive policy: each look is a receipt"), "{listed:?}");
    // Of RabbitMQ these settings say nothing.
    let other = world.run(&["dead", "list", "--over", "rabbitmq"]).await;
    assert!(other.code.is_some_and(|code| code > 0), "{other:?}");
}
