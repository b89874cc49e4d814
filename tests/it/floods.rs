//! Floods over every transport: refusals that fold and can still be sent again, limits of keys, accounts and Regions, and
//! the fuse that pauses intake. The checker counts what was folded.

use crate::support::broker::{Message, Received};
use crate::support::contract;
use crate::support::eventually;
use crate::support::sqs::Role;
use crate::support::world::{Carriage, Tuning, World, request};
use keyferry::store::{KEPT, TOLD_A_MINUTE};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use time::format_description::well_known::Rfc3339;

contract!(
    a_flood_is_told_of_together_and_each_can_be_sent_again,
    a_folded_refusal_that_was_committed_and_not_settled_is_counted_once,
    a_fold_is_told_of_though_its_worker_died_before_it_was_committed,
    a_fold_is_told_of_though_its_worker_died_after_it_was_committed,
    letters_of_a_flood_that_nobody_remembers_are_told_as_such,
    too_many_waiting_jobs_pause_intake_until_few_are_left,
);

/// Where no request may go, until a test allows it.
const ELSEWHERE: &str = "us-west-2";
/// More than are told of one by one.
const FLOOD: usize = 14;
const FOLDED: &str = "select coalesce(sum(count), 0)::bigint from refusal_fold";
const UNTOLD: &str = "select count(*) from refusal_fold where told_at is null";

fn told_each() -> usize {
    usize::try_from(TOLD_A_MINUTE).unwrap()
}

fn transport(world: &World) -> &'static str {
    if world.carriage.requests[0].is_sqs() { "sqs" } else { "rabbitmq" }
}

/// Messages that are refused for one reason, at the beginning of a minute: they are one flood however long it takes.
async fn flood(world: &mut World, count: usize) -> Vec<String> {
    let left = "select ceil(61 - extract(second from keyferry_now()))::bigint";
    let left = world.count(left).await;
    world.db.advance(Duration::from_secs(u64::try_from(left).unwrap())).await;
    let arn = elsewhere(world).await;
    let ids: Vec<String> = (0..count).map(|number| format!("r{number}")).collect();
    world.publish_all(ids.iter().map(|id| refused(id, &arn)).collect()).await;
    ids
}

async fn elsewhere(world: &World) -> String {
    world.fake.seed(json!({"count": 1, "region": ELSEWHERE})).await.remove(0)
}

/// A request that is refused as long as nobody may go elsewhere; then its job ends with one call.
fn refused(id: &str, arn: &str) -> Value {
    request(id, arn, json!({"source_key_identifier": "no-such-key"}))
}

/// Waits until so many dead letters can be had.
async fn dead(world: &World, count: usize) {
    let count = u32::try_from(count).unwrap();
    eventually("all are dead-lettered", || async { (world.ready_in(Role::Dead).await == count).then_some(()) }).await;
}

async fn ok(world: &World, arguments: &[&str]) -> Value {
    let ran = world.run(arguments).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    ran.json()
}

/// Lets the minute pass.
async fn pass(world: &World) {
    world.db.advance(Duration::from_secs(60)).await;
    world.until("the fold is told of", UNTOLD, 0).await;
}

async fn a_flood_is_told_of_together_and_each_can_be_sent_again(carriage: Carriage) {
    let mut world = World::over(Tuning::default(), carriage).await;
    world.serve().await;
    let ids = flood(&mut world, FLOOD).await;
    world.send(Message { body: b"for another reason".to_vec(), ..Message::default() }).await;
    dead(&world, FLOOD + 1).await;
    // What came for another reason is not hidden.
    let folded = FLOOD - told_each();
    assert_eq!(world.count("select count(*) from refusal where code = 'not_json'").await, 1);
    assert_eq!(world.count("select count(*) from refusal_folded").await, i64::try_from(folded).unwrap());
    pass(&world).await;
    world.until("events are told", "select count(*) from outbox", 0).await;
    let events: Vec<Value> = world.events().await.iter().map(Received::json).collect();
    assert_eq!(events.len(), told_each() + 2);
    let all: Vec<&Value> = events.iter().filter(|event| !event["data"]["folded"].is_null()).collect();
    assert_eq!(all.len(), 1);
    assert_eq!(
        (&all[0]["data"]["folded"]["count"], &all[0]["data"]["error"]["code"], &all[0]["type"]),
        (&json!(folded), &json!("unknown_target"), &json!("io.keyferry.job.rejected"))
    );

    // Each is a refusal of its own to whoever looks, with its reason.
    let listed = ok(&world, &["dead", "list", "--code", "unknown_target", "--json"]).await;
    let letters = listed["letters"].as_array().unwrap();
    assert_eq!((letters.len(), &listed["recorded"]), (FLOOD, &json!(0)));
    let of_fold: Vec<&Value> = letters.iter().filter(|letter| letter["fold"] == all[0]["id"]).collect();
    assert_eq!(of_fold.len(), folded);
    assert!(letters.iter().all(|letter| letter["principal"] == "anonymous" && letter["field"] == "key"));
    let id = of_fold[0]["refusal"].as_str().unwrap();
    let shown = ok(&world, &["dead", "show", id, "--json"]).await;
    assert_eq!((&shown["code"], &shown["request_id"]), (&json!("unknown_target"), &of_fold[0]["request_id"]));
    let asked = of_fold[0]["request_id"].as_str().unwrap();
    let job = ok(&world, &["jobs", "show", asked, "--json"]).await;
    assert!(job.to_string().contains("unknown_target"), "{job}");

    // The cause is mended.
    world.workers[0].stop().await;
    world.configure(&format!("[[targets]]\naccount = \"111122223333\"\nregions = [\"{ELSEWHERE}\"]\n"));
    world.serve().await;
    let done = ok(&world, &["dead", "redrive", "--code", "unknown_target", "--json"]).await;
    assert_eq!(done["redriven"], json!(FLOOD));
    for id in &ids {
        world.ended(id).await;
    }
    world.note_redriven(FLOOD);
    world.finish().await;
}

async fn a_folded_refusal_that_was_committed_and_not_settled_is_counted_once(carriage: Carriage) {
    let mut world = World::over(Tuning::hasty(), carriage).await;
    let arn = elsewhere(&world).await;
    let first = world.serve().await;
    world.publish(refused("r0", &arn)).await;
    dead(&world, 1).await;
    world.workers[first].stop().await;
    // A minute that has seen enough, and does not end on the way.
    let long = "update refusal_meter set minute = minute + interval '1 hour', seen = $1";
    world.client.execute(long, &[&TOLD_A_MINUTE]).await.unwrap();
    world.publish_all((1..FLOOD).map(|number| refused(&format!("r{number}"), &arn)).collect()).await;
    let second = world.start("intake.after_commit=return").await;
    assert!(world.workers[second].aborted().await);
    assert!(world.count(FOLDED).await > 0);
    assert_eq!(world.ready_in(Role::Dead).await, 1, "nothing was settled");
    world.serve().await;
    dead(&world, FLOOD).await;
    let folded = i64::try_from(FLOOD).unwrap() - 1;
    assert_eq!((world.count(FOLDED).await, world.count("select count(*) from refusal_folded").await), (folded, folded));
    world.db.advance(Duration::from_secs(3_600)).await;
    world.finish().await;
}

async fn a_fold_is_told_of_though_its_worker_died_before_it_was_committed(carriage: Carriage) {
    a_fold_outlives_a_worker_that_died("folds.before_commit=return", 0, carriage).await;
}

async fn a_fold_is_told_of_though_its_worker_died_after_it_was_committed(carriage: Carriage) {
    a_fold_outlives_a_worker_that_died("folds.after_commit=return", 1, carriage).await;
}

/// At the end of the minute, with or without having told.
async fn a_fold_outlives_a_worker_that_died(failpoint: &str, told: i64, carriage: Carriage) {
    let mut world = World::over(Tuning::hasty(), carriage).await;
    let first = world.start(failpoint).await;
    flood(&mut world, FLOOD).await;
    dead(&world, FLOOD).await;
    world.db.advance(Duration::from_secs(60)).await;
    assert!(world.workers[first].aborted().await);
    let entries = "select count(*) from audit_entry where subject in (select id from refusal_fold)";
    assert_eq!((world.count(UNTOLD).await, world.count(entries).await), (1 - told, told));
    world.db.advance(Duration::from_secs(31)).await;
    world.serve().await;
    world.until("the fold is told of", UNTOLD, 0).await;
    assert_eq!(world.count(entries).await, 1);
    world.finish().await;
}

async fn letters_of_a_flood_that_nobody_remembers_are_told_as_such(carriage: Carriage) {
    let mut world = World::over(Tuning::default(), carriage).await;
    world.serve().await;
    let arn = elsewhere(&world).await;
    world.publish(refused("r0", &arn)).await;
    dead(&world, 1).await;
    world.client.execute("update refusal_meter set kept = $1", &[&KEPT]).await.unwrap();
    // In how many minutes they come is chance: these are more than are told of one by one in two.
    let count = 2 * told_each() + 5;
    world.publish_all((1..count).map(|number| refused(&format!("r{number}"), &arn)).collect()).await;
    dead(&world, count).await;
    let forgotten = usize::try_from(world.count("select sum(forgotten)::bigint from refusal_fold").await).unwrap();
    assert!(forgotten >= 4, "{forgotten}");
    let listed = ok(&world, &["dead", "list", "--json"]).await;
    assert_eq!(listed["recorded"], json!(forgotten));
    let codes = listed["letters"].as_array().unwrap().iter().map(|letter| letter["code"].as_str().unwrap());
    let (of_flood, others): (Vec<&str>, Vec<&str>) = codes.partition(|code| *code == "refused_in_flood");
    assert_eq!((of_flood.len(), others.len()), (forgotten, count - forgotten));
    assert!(others.iter().all(|code| *code == "unknown_target"), "{others:?}");
    // Without a policy they can be sent again all the same.
    let would = ok(&world, &["dead", "redrive", "--code", "refused_in_flood", "--dry-run", "--json"]).await;
    assert_eq!(would["matched"], json!(forgotten));
    // They have a row each, and are counted by the fold.
    world.note_redriven(forgotten);
    world.finish().await;
}

async fn too_many_waiting_jobs_pause_intake_until_few_are_left(carriage: Carriage) {
    let mut world = World::over(Tuning::default(), carriage).await;
    world.configure("[intake]\npause_above = 4\nresume_below = 3\n");
    world.serve().await;
    let arns = world.fake.seed(json!({"count": 10})).await;
    let named = json!({"source_key_identifier": "no-such-key"});
    let at = (world.now().await + time::Duration::hours(1)).format(&Rfc3339).unwrap();
    for (number, arn) in arns[..5].iter().enumerate() {
        let more = json!({"source_key_identifier": "no-such-key", "not_before": at});
        world.publish(request(&format!("r{number}"), arn, more)).await;
    }
    let gauge = format!("keyferry_ingress_paused{{transport=\"{}\"}}", transport(&world));
    let paused = async |world: &World, at: usize, is_paused: bool| {
        eventually("it turns", || async {
            ((world.workers[at].metric(&gauge).await > 0.5) == is_paused).then_some(())
        })
        .await;
    };
    paused(&world, 0, true).await;
    assert_eq!(world.count("select count(*) from future").await, 5);
    // It rests, and nothing is wrong.
    let (status, text) = world.workers[0].ready().await.unwrap();
    assert!(status == 200 && text.starts_with("ready; paused") && text.contains("ingress"), "{text}");
    let admin = world.workers[0].address().to_owned();
    let asked = world.run_with(&["health"], &[("KEYFERRY_ADMIN__LISTEN", &admin)], "").await;
    assert_eq!(asked.code, Some(0), "{asked:?}");
    // Messages stay where they are, also with a worker that starts only now, and such a one stops at once.
    for (number, arn) in arns.iter().enumerate().skip(5) {
        world.publish(request(&format!("r{number}"), arn, named.clone())).await;
    }
    let second = world.serve().await;
    paused(&world, second, true).await;
    assert_eq!(world.waiting().await, 5);
    let from = Instant::now();
    world.workers[second].stop().await;
    assert!(from.elapsed() < Duration::from_secs(10), "{:?}", from.elapsed());
    assert_eq!((world.waiting().await, world.count("select count(*) from job").await), (5, 5));
    world.db.advance(Duration::from_secs(3_600)).await;
    paused(&world, 0, false).await;
    for number in 0..arns.len() {
        world.failed(&format!("r{number}"), "source_key_unknown").await;
    }
    let log = world.workers[0].log();
    assert!(log.contains("more jobs wait than intake.pause_above") && log.contains("messages are taken again"));
    if carriage.requests[0].is_sqs() {
        assert!(world.proxy.most_receipts() <= 2, "each turn costs a message one receipt at most");
    }
    world.finish().await;
}

/// Folded or not, a refused message is judged again as its sender's, whoever sends it again.
#[tokio::test]
async fn a_folded_refusal_is_sent_again_in_its_senders_name() {
    let mut world = World::new(Tuning::default()).await;
    let (payroll, operator) = (world.vhost.user("").await, world.vhost.user("").await);
    let policy = |operation: &str| {
        format!(
            "[principals.payroll]\nrabbitmq_users = [{:?}]\n[principals.operator]\nrabbitmq_users = [{:?}]\n\
             redrive = true\n[[rules]]\nname = \"r\"\nprincipals = [\"payroll\"]\noperations = [{operation:?}]\n",
            payroll.name, operator.name
        )
    };
    world.with_policy(&policy("delete"), "");
    world.serve().await;
    let arns = world.fake.seed(json!({"count": FLOOD})).await;
    for (number, arn) in arns.iter().enumerate() {
        world.send_by(&payroll, Message::of(&request(&format!("r{number}"), arn, json!({}))).by(&payroll.name)).await;
    }
    dead(&world, FLOOD).await;
    let refusals = world.refused(FLOOD).await;
    let folded = refusals.iter().find(|one| one.fold.is_some()).unwrap();
    let identity = format!("rabbitmq:{}", payroll.name);
    assert_eq!((folded.principal.as_str(), folded.identity.as_ref()), ("payroll", Some(&identity)));
    let as_operator = [("KEYFERRY_RABBITMQ__URL", operator.url.as_str())];
    let id = folded.id.to_string();
    // Not before the policy lets its sender do it.
    let ran = world.run_with(&["dead", "redrive", &id, "--json"], &as_operator, "").await;
    assert_eq!((ran.code, &ran.json()["redriven"]), (Some(0), &json!(1)), "{ran:?}");
    dead(&world, FLOOD).await;
    world.load_policy(0, &policy("import")).await;
    let ran = world.run_with(&["dead", "redrive", &id, "--json"], &as_operator, "").await;
    assert_eq!((ran.code, &ran.json()["redriven"]), (Some(0), &json!(1)), "{ran:?}");
    let job = world.succeeded(folded.request_id.as_ref().unwrap()).await;
    assert_eq!((job.principal.as_str(), job.identity), ("payroll", Some(identity)));
    world.note_redriven(1);
    world.finish().await;
}

#[tokio::test]
async fn no_more_jobs_of_a_key_or_of_an_account_and_region_wait_than_may() {
    let mut world = World::new(Tuning::default()).await;
    world.configure("[intake]\nmax_waiting_per_key = 2\nmax_waiting_per_lane = 3\n");
    world.serve().await;
    let arns = world.fake.seed(json!({"count": 3})).await;
    let other = world.fake.seed(json!({"count": 1, "region": "us-east-1"})).await.remove(0);
    let ran = world.run(&["hold", "everything"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let named = json!({"source_key_identifier": "no-such-key"});
    let waiting = "select count(*) from job where state = 'waiting'";
    for (number, arn) in [(1, &arns[0]), (2, &arns[0]), (3, &arns[1])] {
        world.publish(request(&format!("r{number}"), arn, named.clone())).await;
        world.until("it waits", waiting, number).await;
        if number == 2 {
            world.publish(request("line", &arns[0], named.clone())).await;
            assert_eq!(world.refused(1).await[0].code, "line_full");
        }
    }
    world.publish(request("lane", &arns[2], named.clone())).await;
    assert_eq!(world.refused(2).await[1].code, "lane_full");
    // Another Region is another lane, and a copy is a copy.
    world.publish(request("r4", &other, named.clone())).await;
    world.until("it waits", waiting, 4).await;
    world.publish(request("r1", &arns[0], named.clone())).await;
    let ran = world.run(&["release", "everything"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    for number in 1..=4 {
        world.failed(&format!("r{number}"), "source_key_unknown").await;
    }
    for (id, arn) in [("r5", &arns[0]), ("r6", &arns[2])] {
        world.publish(request(id, arn, named.clone())).await;
        world.failed(id, "source_key_unknown").await;
    }
    assert_eq!(world.refused(2).await.len(), 2);
    world.finish().await;
}

/// What a flood costs. `KEYFERRY_FLOOD=20000` for one that is worth measuring.
#[tokio::test]
async fn a_flood_costs_the_store_next_to_nothing() {
    let count: u32 = std::env::var("KEYFERRY_FLOOD").map_or(1_000, |text| text.parse().unwrap());
    let mut world = World::new(Tuning::default()).await;
    let arn = world.fake.key().await.replace("eu-central-1", ELSEWHERE);
    world.publish_all((0..count).map(|number| request(&format!("r{number}"), &arn, json!({}))).collect()).await;
    let from = Instant::now();
    world.serve().await;
    let end = from + Duration::from_secs(600);
    while world.ready_in(Role::Dead).await < count {
        assert!(Instant::now() < end, "the flood is not refused in time");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let refused = from.elapsed();
    world.until("events are told", "select count(*) from outbox", 0).await;
    let drained = from.elapsed();
    world.db.advance(Duration::from_secs(60)).await;
    world.until("folds are told of", UNTOLD, 0).await;
    world.until("events are told", "select count(*) from outbox", 0).await;
    let told = world.events().await.len();
    let entries = world.count("select count(*) from audit_entry").await;
    let bytes = world.count("select pg_database_size(current_database())").await;
    println!("{count} refused in {refused:?}, told of in {drained:?}: {entries} entries, {told} events, {bytes} bytes");
    // One fold a minute, in as many minutes as it takes, and ten that are told of.
    let minutes = usize::try_from(drained.as_secs() / 60).unwrap() + 2;
    assert!(told <= minutes * (told_each() + 1), "{told} events");
    assert_eq!(entries, i64::try_from(told).unwrap());
    assert_eq!(world.count("select count(*) from refused").await, i64::from(count));
}
