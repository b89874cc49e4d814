//! `keyferry jobs retry`, as an operator runs it.

use crate::support::proof::decrypts;
use crate::support::world::{Ran, Tuning, World, request};
use serde_json::{Value, json};
use uuid::Uuid;

const IMPORT: &str = "ImportKeyMaterial";

fn error(code: &str) -> Value {
    json!({"kind": "error", "code": code, "message": "ordered by a test"})
}

fn became(ran: &Ran) -> Vec<String> {
    ran.json().as_array().unwrap().iter().map(|line| line["became"].as_str().unwrap().to_owned()).collect()
}

fn made(ran: &Ran) -> Uuid {
    ran.json()[0]["retry"].as_str().unwrap().parse().unwrap()
}

/// Waits until a job has ended; its state.
async fn ended(world: &World, id: Uuid) -> String {
    crate::support::eventually(&format!("{id} ends"), || async {
        let row = world.client.query_one("select state from job where id = $1", &[&id]).await.unwrap();
        Some(row.get::<_, String>(0)).filter(|state| state != "waiting")
    })
    .await
}

async fn source_key(world: &World, id: Uuid) -> Uuid {
    world.client.query_one("select source_key_id from job where id = $1", &[&id]).await.unwrap().get(0)
}

#[tokio::test]
async fn a_failed_import_is_done_again_with_the_key_that_it_had_generated() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arn = world.fake.key().await;
    world.fake.fault(IMPORT, &arn, Some(1), error("AccessDeniedException")).await;
    world.publish(request("r1", &arn, json!({"batch": "b"}))).await;
    let failed = world.failed("r1", "access_denied").await;
    world.publish(request("r2", "nonsense", json!({}))).await;
    world.refused(1).await;

    let dry = world.run(&["jobs", "retry", "r1", "--dry-run", "--json"]).await;
    assert!(dry.code == Some(0) && became(&dry) == ["would_retry"] && dry.json()[0]["retry"].is_null(), "{dry:?}");
    assert_eq!(world.count("select count(*) from job").await, 1);
    world.fake.fault("DescribeKey", &arn, Some(1), json!({"kind": "hold"})).await;
    let ran = world.run(&["jobs", "retry", "r1", "--json"]).await;
    assert!(ran.code == Some(0) && became(&ran) == ["retried"], "{ran:?}");
    let retry = made(&ran);
    world.fake.held(1, "DescribeKey", &arn).await;
    let again = world.run(&["jobs", "retry", "r1", &failed.id.to_string(), "--json"]).await;
    assert!(again.code == Some(0) && became(&again) == ["retry_open", "retry_open"], "{again:?}");
    assert_eq!(made(&again), retry);
    let running = world.run(&["jobs", "retry", &retry.to_string(), "--json"]).await;
    assert!(running.code == Some(1) && became(&running) == ["running"], "{running:?}");
    world.fake.release(&arn).await;
    assert_eq!(ended(&world, retry).await, "succeeded");
    // The key that the failed job had made, and no other.
    assert_eq!(source_key(&world, retry).await, source_key(&world, failed.id).await);
    assert_eq!(world.count("select count(*) from source_key").await, 1);

    let over = world.run(&["jobs", "retry", "r1", &retry.to_string(), "r2", "nobody", "--json"]).await;
    assert_eq!(became(&over), ["retry_succeeded", "succeeded", "refused", "unknown"], "{over:?}");
    assert_eq!(over.code, Some(1));
    let waited = world.run(&["jobs", "wait", "--batch", "b", "--json"]).await;
    assert_eq!((waited.code, waited.json()), (Some(0), json!([{"state": "succeeded", "code": "", "count": 1}])));
    let shown = world.run(&["jobs", "show", &failed.id.to_string(), "--json"]).await;
    assert_eq!((&shown.json()[0]["retried_by"], &shown.json()[0]["retry_of"]), (&json!(retry), &Value::Null));
    assert_eq!(shown.json().as_array().unwrap().len(), 1);
    let shown = world.run(&["jobs", "show", &retry.to_string(), "--json"]).await;
    assert_eq!(shown.json()[0]["retry_of"], json!(failed.id));
    let told = world.events_of("r1").await;
    let of_retry = told.iter().find(|event| event["id"] == json!(retry)).unwrap();
    assert_eq!(of_retry["data"]["job"]["retry_of"], json!(failed.id));
    assert_eq!(world.run(&["jobs", "retry", "--batch", "nobody"]).await.code, Some(1));
    assert_eq!(world.run(&["jobs", "retry", "--code", "access_denied", "r1"]).await.code, Some(2));
    assert_eq!(world.run(&["jobs", "retry", "--batch", "b", "--code", "no-such-code"]).await.code, Some(2));
    world.finish().await;
}

fn ids(ran: &Ran) -> Vec<String> {
    ran.json().as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn the_id_of_a_request_means_the_last_of_its_retries() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arn = world.fake.key().await;
    assert_eq!(world.run(&["hold", "everything"]).await.code, Some(0));
    world.publish(request("r1", &arn, json!({}))).await;
    world.until("it waits", "select count(*) from job", 1).await;
    assert_eq!(world.run(&["jobs", "cancel", "r1"]).await.code, Some(0));
    let first = world.job("r1").await.unwrap().id.to_string();
    let second = made(&world.run(&["jobs", "retry", "r1", "--json"]).await).to_string();
    // What has not ended is what is waited for, told of, cancelled and abandoned; not the job that failed first.
    let waited = world.run(&["jobs", "wait", "r1", "--timeout", "1s"]).await;
    assert_eq!(waited.code, Some(4), "{waited:?}");
    let told = world.run(&["events", "republish", "--job", "r1"]).await;
    assert!(told.code == Some(1) && told.err.contains("has not ended"), "{told:?}");
    let cancelled = world.run(&["jobs", "cancel", "r1", "--json"]).await;
    assert_eq!((ids(&cancelled), became(&cancelled)), (vec![second.clone()], vec!["cancelled".into()]));
    let third = made(&world.run(&["jobs", "retry", "r1", "--json"]).await).to_string();
    let abandoned = world.run(&["jobs", "abandon", "r1", "--yes", "--json"]).await;
    assert_eq!((&abandoned.json()["id"], &abandoned.json()["became"]), (&json!(third), &json!("abandoned")));
    let shown = world.run(&["jobs", "show", "r1", "--json"]).await;
    assert_eq!(ids(&shown), [third.clone(), second.clone(), first.clone()], "{shown:?}");
    let links = |at: usize| (shown.json()[at]["retry_of"].clone(), shown.json()[at]["retried_by"].clone());
    assert_eq!(links(0), (json!(second), Value::Null));
    assert_eq!(links(1), (json!(first), json!(third)));
    assert_eq!(links(2), (Value::Null, json!(second)));
    // A job's own id means that job.
    for (id, wait) in [(&first, 3), (&second, 3)] {
        assert_eq!(ids(&world.run(&["jobs", "show", id, "--json"]).await), std::slice::from_ref(id));
        assert_eq!(world.run(&["jobs", "wait", id]).await.code, Some(wait));
    }
    assert_eq!(world.run(&["release", "everything"]).await.code, Some(0));
    world.finish().await;
}

#[tokio::test]
async fn no_more_jobs_are_retried_than_may_wait() {
    let mut world = World::new(Tuning::default()).await;
    world.serve().await;
    let arns = world.fake.seed(json!({"count": 2})).await;
    assert_eq!(world.run(&["hold", "everything"]).await.code, Some(0));
    let requests = (0..6).map(|n| request(&format!("r{n}"), &arns[n / 4], json!({"batch": "b"}))).collect();
    world.publish_all(requests).await;
    world.until("all wait", "select count(*) from job", 6).await;
    assert_eq!(world.run(&["jobs", "cancel", "--batch", "b"]).await.code, Some(0));
    world.configure("[intake]\nmax_waiting_per_key = 2\nmax_waiting_per_lane = 3\n");
    let retry = ["jobs", "retry", "--batch", "b", "--json"];
    let dry = world.run(&[&retry[..], &["--dry-run"]].concat()).await;
    for ran in [dry, world.run(&retry).await] {
        assert_eq!((ran.code, &ran.json()["retried"]), (Some(1), &json!(3)), "{ran:?}");
        let left = ran.json()["left"].clone();
        let left: Vec<_> = left.as_array().unwrap().iter().map(|left| (&left["became"], &left["count"])).collect();
        assert_eq!(left, [(&json!("lane_full"), &json!(1)), (&json!("line_full"), &json!(2))], "{ran:?}");
    }
    assert_eq!(world.count("select count(*) from job where state = 'waiting'").await, 3);
    let one = world.run(&["jobs", "retry", "r5", "--json"]).await;
    assert_eq!((one.code, became(&one)), (Some(1), vec!["lane_full".into()]), "{one:?}");
    assert_eq!(world.run(&["jobs", "cancel", "--batch", "b"]).await.code, Some(0));
    assert_eq!(world.run(&["release", "everything"]).await.code, Some(0));
    world.finish().await;
}

#[tokio::test]
async fn a_failed_delete_is_done_again_and_leaves_the_line_in_order() {
    let mut world = World::with_worker(Tuning::default()).await;
    let bytes = world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    let named = json!({"source_key_identifier": "payroll"});
    world.publish(request("r1", &arn, named.clone())).await;
    world.succeeded("r1").await;
    world.fake.fault("DeleteImportedKeyMaterial", &arn, Some(1), error("AccessDeniedException")).await;
    world.publish(request("d", &arn, json!({"operation": "delete"}))).await;
    world.failed("d", "access_denied").await;
    assert!(decrypts(&world.fake, &arn, &bytes).await);
    let ran = world.run(&["jobs", "retry", "d", "--json"]).await;
    assert_eq!(became(&ran), ["retried"], "{ran:?}");
    assert_eq!(ended(&world, made(&ran)).await, "succeeded");
    assert_eq!(world.fake.show(&arn).await["materials"][0]["imported"], false);
    world.publish(request("r2", &arn, named)).await;
    world.succeeded("r2").await;
    assert!(decrypts(&world.fake, &arn, &bytes).await);
    world.finish().await;
}

/// More than one page of jobs, none of which runs: the command is killed after the first, and given again.
#[tokio::test]
async fn a_batch_is_retried_once_also_after_a_kill() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arns = world.fake.seed(json!({"count": 5})).await;
    assert_eq!(world.run(&["hold", "everything"]).await.code, Some(0));
    let requests = (0..205).map(|n| request(&format!("b{n}"), &arns[n % 5], json!({"batch": "night"}))).collect();
    world.publish_all(requests).await;
    world.until("all are accepted", "select count(*) from job", 205).await;
    let (batch, cancel) = (["--batch", "night"], ["jobs", "cancel", "--batch", "night"]);
    let retry = |more: &[&'static str]| [&["jobs", "retry", "--json"], &batch[..], more].concat();
    assert_eq!(world.run(&cancel).await.code, Some(0));
    let dry = world.run(&retry(&["--dry-run"])).await;
    assert_eq!(dry.json(), json!({"batch": "night", "retried": 205, "left": []}), "{dry:?}");
    let other = world.run(&retry(&["--code", "key_disabled"])).await;
    assert!(other.code == Some(0) && other.json()["retried"] == 0, "{other:?}");
    let killed = world.run_with(&retry(&[]), &[("FAILPOINTS", "retry.after_page=return")], "").await;
    assert_eq!(killed.code, None, "{killed:?}");
    let retries = "select count(*) from job where retry_of is not null";
    assert_eq!(world.count(retries).await, 200);
    let rest = world.run(&retry(&["--code", "cancelled"])).await;
    assert!(rest.code == Some(0) && rest.json()["retried"] == 5, "{rest:?}");
    // The retries belong to the batch: where they fail too, it is they that are retried.
    assert_eq!(world.run(&cancel).await.code, Some(0));
    let again = world.run(&retry(&[])).await;
    assert!(again.code == Some(0) && again.json()["retried"] == 205, "{again:?}");
    let links = "select count(distinct retry_of) from job where retry_of is not null";
    assert_eq!((world.count(links).await, world.count(retries).await), (410, 410));
    assert_eq!(world.run(&cancel).await.code, Some(0));
    assert_eq!(world.run(&["release", "everything"]).await.code, Some(0));
    world.finish().await;
}

#[tokio::test]
async fn a_retry_is_judged_in_the_name_of_whoever_asked() {
    let mut world = World::new(Tuning::default()).await;
    let payroll = world.vhost.user("").await;
    let policy = |operations: &str, more: &str| {
        format!(
            "[principals.payroll]\nrabbitmq_users = [\"{}\"]\n{more}\n
             [[rules]]\nname = \"what payroll may\"\nprincipals = [\"payroll\"]\noperations = [{operations}]\n",
            payroll.name
        )
    };
    world.with_policy(&policy("\"import\"", ""), "identity = \"required\"");
    world.serve().await;
    let arn = world.fake.key().await;
    let unknown = json!({"source_key_identifier": "later"});
    let message = crate::support::broker::Message::of(&request("r1", &arn, unknown)).by(&payroll.name);
    world.send_by(&payroll, message).await;
    let failed = world.failed("r1", "source_key_unknown").await.id.to_string();
    let retry = ["jobs", "retry", failed.as_str(), "--json"];
    for (policy, word, says) in [
        (policy("\"delete\"", ""), "not_allowed", "no rule of the policy allows this"),
        (
            policy("\"import\"", "").replace(&payroll.name, "somebody"),
            "not_allowed",
            "is no longer the principal payroll",
        ),
        (policy("\"import\"", "") + "expiry = \"required\"\n", "not_allowed", "expiry is required"),
    ] {
        world.write("policy.toml", &policy);
        let ran = world.run(&retry).await;
        assert!(ran.code == Some(1) && became(&ran) == [word] && ran.out.contains(says), "{says}: {ran:?}");
    }
    assert_eq!(world.count("select count(*) from job").await, 1);
    // By its id for the principal: whoever runs the command is nobody's.
    world.write("policy.toml", &policy("\"import\"", ""));
    world.symmetric_key("later").await;
    let ran = world.run(&["jobs", "retry", "r1", "--principal", "payroll", "--json"]).await;
    assert_eq!(became(&ran), ["retried"], "{ran:?}");
    assert_eq!(ended(&world, made(&ran)).await, "succeeded");
    let accepted: String = world
        .client
        .query_one("select entry from audit_entry where subject = $1 and n = 1", &[&made(&ran)])
        .await
        .unwrap()
        .get(0);
    for said in [r#""operator":"tester (uid "#, r#""principal":"payroll""#, r#""rule":"what payroll may""#, &failed] {
        assert!(accepted.contains(said), "{said}: {accepted}");
    }
    world.finish().await;
}
