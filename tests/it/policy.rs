//! Who asks, by RabbitMQ's own word, and what the policy lets them do. The checker sees to rows, entries and events.

use crate::support::broker::{DEAD, JOBS, Message, User};
use crate::support::private_broker::PrivateBroker;
use crate::support::snapshot::Refusal;
use crate::support::world::{Tuning, World, request};
use serde_json::json;
use time::format_description::well_known::Rfc3339;

/// A user and their principal's name, and more lines of it.
fn principal(name: &str, users: &[&User], more: &str) -> String {
    let users: Vec<&str> = users.iter().map(|user| user.name.as_str()).collect();
    format!("[principals.{name}]\nrabbitmq_users = {users:?}\n{more}\n")
}

fn rule(name: &str, principals: &[&str], operations: &[&str], more: &str) -> String {
    format!("[[rules]]\nname = \"{name}\"\nprincipals = {principals:?}\noperations = {operations:?}\n{more}\n")
}

/// Who asked, as the refusal has it: principal, identity, whether that is proved, and the code.
fn told(refusal: &Refusal) -> (&str, &str, bool, &str) {
    let identity = refusal.identity.as_deref().unwrap_or_default();
    (&refusal.principal, identity, refusal.identity_verified, &refusal.code)
}

#[tokio::test]
async fn the_brokers_word_says_who_asks() {
    let mut world = World::new(Tuning::default()).await;
    let (payroll, other, stranger) =
        (world.vhost.user("").await, world.vhost.user("").await, world.vhost.user("").await);
    let policy = format!("{}{}", principal("payroll", &[&payroll], ""), rule("imports", &["payroll"], &["import"], ""));
    world.with_policy(&policy, "identity = \"required\"");
    world.serve().await;
    let arns = world.fake.seed(json!({"count": 2})).await;
    let asked = |id: &str| Message::of(&request(id, &arns[0], json!({})));
    world.send_by(&payroll, asked("r1").by(&payroll.name)).await;
    let job = world.succeeded("r1").await;
    let identity = format!("rabbitmq:{}", payroll.name);
    assert_eq!((job.principal.as_str(), job.identity.as_deref()), ("payroll", Some(identity.as_str())));
    let accepted: String = world
        .client
        .query_one("select entry from audit_entry where subject = $1 and n = 1", &[&job.id])
        .await
        .unwrap()
        .get(0);
    assert!(accepted.contains(r#""rule":"imports""#) && accepted.contains(&identity), "{accepted}");

    // Who says nothing, who is nobody's, and whose word is old.
    let elsewhere = |id: &str| Message::of(&request(id, &arns[1], json!({})));
    world.send_by(&payroll, elsewhere("silent")).await;
    world.send_by(&stranger, elsewhere("stranger").by(&stranger.name)).await;
    for header in ["x-death", "x-first-death-queue", "x-last-death-queue", "x-shovelled", "x-received-from"] {
        world.send_by(&payroll, elsewhere(header).by(&payroll.name).with(header, "x")).await;
    }
    // And what a message asks does not matter then: it may be no request at all.
    world.send_by(&stranger, Message { body: b"not a request at all".to_vec(), ..Message::default() }).await;
    // Nor does it help to name another: the broker itself compares.
    let error = other.publish(&elsewhere("lie").by(&payroll.name)).await.unwrap_err().to_string();
    assert!(error.contains("PRECONDITION") || error.contains("user_id"), "{error}");
    let refusals = world.refused(8).await;
    let by_id = |id: Option<&str>| told(refusals.iter().find(|one| one.request_id.as_deref() == id).unwrap());
    assert_eq!(by_id(Some("silent")), ("unidentified", "", false, "identity_missing"));
    let unknown = format!("rabbitmq:{}", stranger.name);
    assert_eq!(by_id(Some("stranger")), ("unidentified", unknown.as_str(), true, "identity_unknown"));
    assert_eq!(by_id(Some("x-death")), ("unidentified", identity.as_str(), false, "identity_missing"));
    assert_eq!(by_id(None), ("unidentified", "", false, "identity_missing"));
    assert!(refusals.iter().filter(|one| one.code == "identity_missing").count() == 7);
    world.dead_letters(8).await;
    assert_eq!(world.fake.journal(&format!("key={}", arns[1])).await.len(), 0, "no AWS call for a refusal");
    world.finish().await;
}

#[tokio::test]
async fn ids_are_a_principals_own_whatever_it_sends_with() {
    let mut world = World::new(Tuning::default()).await;
    let (one, two, other) = (world.vhost.user("").await, world.vhost.user("").await, world.vhost.user("").await);
    let policy = format!(
        "{}{}{}",
        principal("payroll", &[&one, &two], ""),
        principal("other", &[&other], ""),
        rule("imports", &["payroll", "other"], &["import"], "")
    );
    world.with_policy(&policy, "");
    world.serve().await;
    world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    let asked = Message::of(&request("r1", &arn, json!({"source_key_identifier": "payroll"})));
    world.send_by(&one, asked.clone().by(&one.name)).await;
    world.send_by(&two, asked.clone().by(&two.name)).await;
    world.note_respelt();
    world.send_by(&other, asked.clone().by(&other.name)).await;
    // The same id with other content is a conflict within the principal only.
    world.send_by(&two, Message::of(&request("r1", &arn, json!({}))).by(&two.name)).await;
    world.until("two principals' jobs end", "select count(*) from job where state = 'succeeded'", 2).await;
    let refusals = world.refused(1).await;
    let identity = format!("rabbitmq:{}", two.name);
    assert_eq!(told(&refusals[0]), ("payroll", identity.as_str(), true, "id_conflict"));
    assert_eq!(world.count("select count(distinct principal) from job where request_id = 'r1'").await, 2);
    world.finish().await;
}

#[tokio::test]
async fn what_no_rule_allows_causes_no_call() {
    let mut world = World::new(Tuning::default()).await;
    let payroll = world.vhost.user("").await;
    let conditions =
        "regions = [\"eu-*\"]\nsource_keys = [\"payroll*\"]\nexpiry = \"required\"\nlongest_validity = \"30d\"";
    let policy = format!(
        "{}{}{}",
        principal("payroll", &[&payroll], ""),
        rule("imports", &["payroll"], &["import"], conditions),
        rule("deletes", &["payroll"], &["delete"], "regions = [\"eu-*\"]"),
    );
    world.with_policy(&policy, "");
    world.serve().await;
    world.symmetric_key("payroll").await;
    world.symmetric_key("finance").await;
    let finance: uuid::Uuid =
        world.client.query_one("select id from source_key where name = 'finance'", &[]).await.unwrap().get(0);
    let payroll_id: uuid::Uuid =
        world.client.query_one("select id from source_key where name = 'payroll'", &[]).await.unwrap().get(0);
    let arns = world.fake.seed(json!({"count": 3})).await;
    let far = world.fake.seed(json!({"region": "us-east-1"})).await;
    let now = world.now().await;
    let until = |days: i64| (now + time::Duration::days(days)).replace_nanosecond(0).unwrap().format(&Rfc3339).unwrap();
    let with = |source: &str, days: i64| json!({"source_key_identifier": source, "key_expiration": true, "valid_to": until(days)});
    let denied = [
        ("region", request("region", &far[0], with("payroll", 7))),
        ("source", request("source", &arns[0], with("finance", 7))),
        ("generated", request("generated", &arns[0], json!({"key_expiration": true, "valid_to": until(7)}))),
        ("forever", request("forever", &arns[0], json!({"source_key_identifier": "payroll"}))),
        ("too-long", request("too-long", &arns[0], with("payroll", 31))),
        ("urgent", request("urgent", &arns[0], json!({"operation": "delete", "urgent": true}))),
    ];
    for (_, request) in &denied {
        world.send_by(&payroll, Message::of(request).by(&payroll.name)).await;
    }
    let refusals = world.refused(denied.len()).await;
    for refusal in &refusals {
        assert_eq!((refusal.principal.as_str(), refusal.code.as_str()), ("payroll", "not_allowed"), "{refusal:?}");
    }
    let why = |id: &str| &refusals.iter().find(|one| one.request_id.as_deref() == Some(id)).unwrap().message;
    assert!(why("source").contains("no rule") && why("generated").contains("no rule"));
    assert!(why("forever").contains("\"imports\"") && why("forever").contains("expiry"), "{}", why("forever"));
    assert!(why("too-long").contains("longest_validity") && why("urgent").contains("urgent"));
    world.dead_letters(denied.len()).await;
    assert_eq!(world.fake.journal("").await.len(), 0, "no AWS call for a refusal");

    // A source key's id goes round no rule, and is as good as its name.
    let by_id = request("by-id", &arns[1], with(&payroll_id.to_string(), 7));
    world.send_by(&payroll, Message::of(&by_id).by(&payroll.name)).await;
    world.succeeded("by-id").await;
    let round = request("round", &arns[2], with(&finance.to_string(), 7));
    world.send_by(&payroll, Message::of(&round).by(&payroll.name)).await;
    let job = world.failed("round", "revoked").await;
    assert!(!job.aws_changed());
    assert_eq!(world.fake.journal(&format!("key={}", arns[2])).await.len(), 0);
    world.finish().await;
}

#[tokio::test]
async fn a_refused_message_is_sent_again_in_its_senders_name_or_not_at_all() {
    let mut world = World::new(Tuning::default()).await;
    let (payroll, operator) = (world.vhost.user("").await, world.vhost.user("").await);
    let principals =
        format!("{}{}", principal("payroll", &[&payroll], ""), principal("operator", &[&operator], "redrive = true"));
    let none = format!("{principals}{}", rule("deletes", &["payroll"], &["delete"], ""));
    world.with_policy(&none, "");
    world.serve().await;
    let arn = world.fake.key().await;
    let asked = Message::of(&request("r1", &arn, json!({})));
    world.send_by(&payroll, asked.clone().by(&payroll.name)).await;
    let first = world.refused(1).await.remove(0);
    let identity = format!("rabbitmq:{}", payroll.name);
    assert_eq!(told(&first), ("payroll", identity.as_str(), true, "not_allowed"));
    let redriven = |id: &str, user: &User| asked.clone().by(&user.name).with("keyferry-redrive", id);
    let (id, unknown) = (first.id.to_string(), uuid::Uuid::from_u128(1).to_string());

    // Refused again while the policy is as it was: the same verdict, under the same identity.
    world.send_by(&operator, redriven(&id, &operator)).await;
    world.note_respelt();
    world.dead_letters(2).await;
    // Not by its own sender, not as another refusal's, and no other message.
    world.send_by(&payroll, redriven(&id, &payroll)).await;
    world.send_by(&operator, redriven(&unknown, &operator)).await;
    let other = Message::of(&request("r2", &arn, json!({}))).by(&operator.name).with("keyferry-redrive", &id);
    world.send_by(&operator, other).await;
    let refusals = world.refused(4).await;
    let by = |user: &User| format!("rabbitmq:{}", user.name);
    let codes: Vec<(String, String)> =
        refusals[1..].iter().map(|one| (one.identity.clone().unwrap(), one.code.clone())).collect();
    for expected in [(by(&payroll), "redrive_not_allowed".to_owned()), (by(&operator), "redrive_mismatch".to_owned())] {
        assert!(codes.contains(&expected), "{codes:?}");
    }
    world.dead_letters(5).await;
    // The policy is mended: now it runs, as payroll's.
    world.load_policy(0, &format!("{principals}{}", rule("imports", &["payroll"], &["import"], ""))).await;
    let again = redriven(&id, &operator).with("x-attempt", "2");
    world.send_by(&operator, again).await;
    let job = world.succeeded("r1").await;
    assert_eq!((job.principal.as_str(), job.identity.as_deref()), ("payroll", Some(identity.as_str())));
    world.finish().await;
}

#[tokio::test]
async fn dead_letters_are_put_back_by_whoever_may_do_that() {
    let mut world = World::new(Tuning::default()).await;
    let (payroll, operator) = (world.vhost.user("").await, world.vhost.user("").await);
    let principals =
        format!("{}{}", principal("payroll", &[&payroll], ""), principal("operator", &[&operator], "redrive = true"));
    world.with_policy(&format!("{principals}{}", rule("deletes", &["payroll"], &["delete"], "")), "");
    world.serve().await;
    let arn = world.fake.key().await;
    world.send_by(&payroll, Message::of(&request("r1", &arn, json!({}))).by(&payroll.name)).await;
    let id = world.refused(1).await.remove(0).id.to_string();
    world.load_policy(0, &format!("{principals}{}", rule("imports", &["payroll"], &["import"], ""))).await;
    crate::support::eventually("it is dead-lettered", || async { (world.vhost.ready(DEAD).await == 1).then_some(()) })
        .await;
    let as_operator = [("KEYFERRY_RABBITMQ__URL", operator.url.as_str())];
    let ran = world.run_with(&["dead", "redrive", &id, "--json"], &as_operator, "").await;
    assert_eq!((ran.code, &ran.json()["redriven"]), (Some(0), &json!(1)), "{ran:?}");
    let job = world.succeeded("r1").await;
    assert_eq!(job.identity, Some(format!("rabbitmq:{}", payroll.name)));
    world.note_redriven(1);
    world.finish().await;
}

#[tokio::test]
async fn no_more_jobs_of_a_principal_wait_than_it_may_have() {
    let mut world = World::new(Tuning::default()).await;
    let (payroll, other) = (world.vhost.user("").await, world.vhost.user("").await);
    let policy = format!(
        "{}{}{}",
        principal("payroll", &[&payroll], "max_waiting = 2"),
        principal("other", &[&other], ""),
        rule("imports", &["payroll", "other"], &["import"], "")
    );
    world.with_policy(&policy, "");
    world.serve().await;
    let arns = world.fake.seed(json!({"count": 2})).await;
    let at = (world.now().await + time::Duration::hours(1)).format(&Rfc3339).unwrap();
    let later = |id: &str| Message::of(&request(id, &arns[0], json!({"not_before": at})));
    for (number, id) in (1..).zip(["r1", "r2"]) {
        world.send_by(&payroll, later(id).by(&payroll.name)).await;
        world.until("it waits", "select count(*) from future", number).await;
    }
    world.send_by(&payroll, later("r3").by(&payroll.name)).await;
    let refusal = world.refused(1).await.remove(0);
    assert_eq!((refusal.principal.as_str(), refusal.code.as_str()), ("payroll", "backlog_full"));
    // A copy is a copy, and the limit is the principal's own.
    world.send_by(&payroll, later("r1").by(&payroll.name)).await;
    world.send_by(&other, Message::of(&request("r4", &arns[1], json!({}))).by(&other.name)).await;
    world.succeeded("r4").await;
    world.db.advance(std::time::Duration::from_secs(7_200)).await;
    world.ended("r1").await;
    world.ended("r2").await;
    world.send_by(&payroll, Message::of(&request("r5", &arns[0], json!({}))).by(&payroll.name)).await;
    world.ended("r5").await;
    world.finish().await;
}

#[tokio::test]
async fn without_policy_anyone_may_send_a_refused_message_again() {
    let mut world = World::with_worker(Tuning::default()).await;
    let elsewhere = world.fake.key().await.replace("111122223333", "444455556666");
    let asked = Message::of(&request("r1", &elsewhere, json!({})));
    world.send(asked.clone()).await;
    let first = world.refused(1).await.remove(0);
    assert_eq!(told(&first), ("anonymous", "", false, "unknown_target"));
    world.send(asked.clone().with("keyferry-redrive", &first.id.to_string())).await;
    world.note_respelt();
    world.send(asked.with("keyferry-redrive", &uuid::Uuid::from_u128(1).to_string())).await;
    world.refused(2).await;
    world.dead_letters(3).await;
    world.finish().await;
}

#[tokio::test]
async fn whoever_may_send_as_anybody_is_found() {
    let world = World::new(Tuning::default()).await;
    let payroll = world.vhost.user("").await;
    let policy = format!("{}{}", principal("payroll", &[&payroll], ""), rule("imports", &["payroll"], &["import"], ""));
    world.with_policy(&policy, "");
    assert_eq!(world.run(&["topology", "check"]).await.code, Some(0));
    let liar = world.vhost.user("impersonator").await;
    let ran = world.run(&["topology", "check", "--json"]).await;
    assert_eq!((ran.code, &ran.json()[0]["kind"]), (Some(1), &json!("user")), "{ran:?}");
    assert_eq!(ran.json()[0]["name"], liar.name.as_str());
    // Where nobody asks who they are it is nobody's business.
    let plain = World::new(Tuning::default()).await;
    let _liar = plain.vhost.user("impersonator").await;
    assert_eq!(plain.run(&["topology", "check"]).await.code, Some(0));
}

#[tokio::test]
async fn a_shovel_that_leaves_no_mark_is_found() {
    let broker = PrivateBroker::start().await;
    let world = World::beside(Tuning::default(), &broker).await;
    let payroll = world.vhost.user("").await;
    let policy = format!("{}{}", principal("payroll", &[&payroll], ""), rule("imports", &["payroll"], &["import"], ""));
    world.with_policy(&policy, "");
    assert_eq!(world.run(&["topology", "check"]).await.code, Some(0), "without the plugin there is none");
    broker.enable_shovels().await;
    world.vhost.declare_classic("side-door").await;
    let shovel = |marked: bool| {
        json!({
            "src-uri": "amqp://", "src-queue": "side-door", "dest-uri": format!("amqp:///{}", world.vhost.name()), "dest-queue": JOBS,
            "dest-add-forward-headers": marked
        })
    };
    world.vhost.set_shovel("marked", shovel(true)).await;
    assert_eq!(world.run(&["topology", "check"]).await.code, Some(0));
    world.vhost.set_shovel("quiet", shovel(false)).await;
    let ran = world.run(&["topology", "check", "--json"]).await;
    assert_eq!((ran.code, &ran.json()[0]["kind"]), (Some(1), &json!("shovel")), "{ran:?}");
    assert!(ran.json()[0]["name"].as_str().unwrap().starts_with("quiet of virtual host"), "{ran:?}");
    let ran = world.run(&["doctor", "--json"]).await;
    let checks = ran.json()["checks"].as_array().unwrap().clone();
    assert_eq!(checks.iter().filter(|one| one["code"] == "rabbitmq_shovel").count(), 1, "{ran:?}");
}

#[tokio::test]
async fn dead_letters_that_the_broker_moves_back_prove_nothing() {
    let mut world = World::new(Tuning::default()).await;
    let payroll = world.vhost.user("").await;
    let policy = format!("{}{}", principal("payroll", &[&payroll], ""), rule("deletes", &["payroll"], &["delete"], ""));
    world.with_policy(&policy, "");
    world.serve().await;
    let arn = world.fake.key().await;
    // As the broker has it then: with the user-id, and with what dead-lettering wrote beside it.
    world.vhost.move_dead_letters_back(true).await;
    world.send_by(&payroll, Message::of(&request("r1", &arn, json!({}))).by(&payroll.name)).await;
    world.note_published([Message::of(&request("r1", &arn, json!({}))).with("x-death", "by the broker")]);
    let refusals = world.refused(2).await;
    world.vhost.move_dead_letters_back(false).await;
    let identity = format!("rabbitmq:{}", payroll.name);
    assert_eq!(told(&refusals[1]), ("unidentified", identity.as_str(), false, "identity_missing"));
    world.finish().await;
}
