//! `keyferry events republish`: the same events once more, byte for byte.

use crate::support::broker::{Message, Received};
use crate::support::world::{Tuning, World, request};
use serde_json::{Value, json};
use std::collections::BTreeMap;

fn by_id(events: &[Received]) -> BTreeMap<String, Vec<(String, Vec<u8>)>> {
    let mut all: BTreeMap<String, Vec<(String, Vec<u8>)>> = BTreeMap::new();
    for event in events {
        all.entry(event.message_id.clone().unwrap()).or_default().push((event.routing_key.clone(), event.body.clone()));
    }
    all
}

/// One end of every sort.
async fn lived_in() -> World {
    let mut world = World::with_worker(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    let arns = world.fake.seed(json!({"count": 3})).await;
    let ahead = (world.now().await + time::Duration::hours(1)).replace_nanosecond(0).unwrap();
    let ahead = ahead.format(&time::format_description::well_known::Rfc3339).unwrap();
    let named = |more: Value| {
        let mut all = json!({"source_key_identifier": "payroll", "batch": "night"});
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    };
    let traced = Message::of(&request("import", &arns[0], named(json!({}))))
        .with("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    world.send(traced).await;
    world.publish(request("dry", &arns[0], named(json!({"dry_run": true})))).await;
    world.publish(request("delete", &arns[0], json!({"operation": "delete"}))).await;
    world.publish(request("later", &arns[1], named(json!({"not_before": ahead})))).await;
    world.publish(request("fails", &arns[1], json!({"source_key_identifier": "none"}))).await;
    world.publish(request("made", &arns[2], json!({}))).await;
    for id in ["import", "dry", "delete", "made"] {
        world.succeeded(id).await;
    }
    world.failed("fails", "source_key_unknown").await;
    assert_eq!(world.run(&["jobs", "cancel", "later"]).await.code, Some(0));
    assert_eq!(world.run(&["jobs", "retry", "fails"]).await.code, Some(0));
    world.until("all have ended", "select count(*) from job where finished_at is not null", 7).await;
    world.until("all are told", "select count(*) from outbox", 0).await;
    world
}

#[tokio::test]
async fn every_event_is_published_again_byte_for_byte() {
    let mut world = lived_in().await;
    let first = by_id(world.events().await);
    assert_eq!((first.len(), first.values().map(Vec::len).sum::<usize>()), (7, 7));
    let dry = world.run(&["events", "republish", "--since", "1h", "--dry-run", "--json"]).await;
    assert!(dry.json()["events"] == 7 && dry.json()["republication"].is_null(), "{dry:?}");
    let ran = world.run(&["events", "republish", "--since", "1h", "--json"]).await;
    assert!(ran.code == Some(0) && ran.json()["events"] == 7, "{ran:?}");
    world.until("all are told", "select count(*) from outbox", 0).await;
    let both = by_id(world.events().await);
    assert_eq!(both.len(), 7);
    for (id, copies) in &both {
        assert_eq!(copies.len(), 2, "{id}");
        assert_eq!(copies[0], copies[1], "{}", String::from_utf8_lossy(&copies[1].1));
    }
    let entry: String = world
        .client
        .query_one("select entry from audit_entry where entry like '%\"kind\":\"events_republished\"%'", &[])
        .await
        .unwrap()
        .get(0);
    assert!(entry.contains(r#""operator":"tester (uid "#) && first.keys().all(|id| entry.contains(id)), "{entry}");
    world.finish().await;
}

#[tokio::test]
async fn events_of_refusals_carry_their_trace_and_are_published_again() {
    const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let mut world = World::with_worker(Tuning::default()).await;
    let arn = world.fake.key().await;
    let elsewhere = arn.replace("eu-central-1", "eu-west-3");
    world.send(Message::of(&request("no-target", &elsewhere, json!({}))).with("traceparent", TRACE)).await;
    world.publish_all((0..12).map(|n| request(&format!("odd-{n}"), &arn, json!({"colour": n}))).collect()).await;
    world.refused(13).await;
    world.db.advance(std::time::Duration::from_secs(120)).await;
    world.until("the fold is told of", "select count(*) from refusal_fold where told_at is null", 0).await;
    world.until("all are told", "select count(*) from outbox", 0).await;
    let told = by_id(world.events().await);
    assert_eq!(told.len(), 12, "one for itself, ten of a code, and one for the other two");
    let traced: Vec<&Received> =
        world.events().await.iter().filter(|event| event.headers.contains_key("traceparent")).collect();
    let body: Value = serde_json::from_slice(&traced[0].body).unwrap();
    assert_eq!(
        (traced.len(), &traced[0].headers["traceparent"], &body["traceparent"]),
        (1, &TRACE.to_owned(), &json!(TRACE))
    );
    assert_eq!(traced[0].routing_key, "job.rejected.import.111122223333.eu-west-3");

    let republish = async |world: &World, arguments: &[&str]| {
        let ran = world.run(&[&["events", "republish", "--json"], arguments].concat()).await;
        world.until("all are told", "select count(*) from outbox", 0).await;
        ran
    };
    let ran = republish(&world, &["--since", "1h", "--outcome", "rejected"]).await;
    assert_eq!((ran.code, &ran.json()["events"]), (Some(0), &json!(12)), "{ran:?}");
    for (id, copies) in by_id(world.events().await) {
        assert!(copies.len() == 2 && copies[0] == copies[1], "{id}: {copies:?}");
    }
    for (arguments, events) in [
        (["--since", "1h", "--outcome", "succeeded"], 0),
        (["--since", "1h", "--until", "0s"], 12),
        (["--job", "no-target", "--outcome", "rejected"], 1),
    ] {
        let ran = republish(&world, &[&arguments[..], &["--dry-run"]].concat()).await;
        assert_eq!((ran.code, &ran.json()["events"]), (Some(0), &json!(events)), "{arguments:?}: {ran:?}");
    }
    // Whichever of the folded ones is named, it is their one event.
    let folded: uuid::Uuid = world.client.query_one("select id from refusal_folded limit 1", &[]).await.unwrap().get(0);
    let ran = republish(&world, &["--job", &folded.to_string()]).await;
    assert_eq!((ran.code, &ran.json()["events"]), (Some(0), &json!(1)), "{ran:?}");
    // What an older version recorded of a refusal is not all that its event said.
    world.client.batch_execute("update refusal set is_whole = false where request_id = 'no-target'").await.unwrap();
    let ran = republish(&world, &["--job", "no-target"]).await;
    assert!(ran.code == Some(1) && ran.json()["unreadable"] == 1 && ran.json()["events"] == 0, "{ran:?}");
    world.finish().await;
}

#[tokio::test]
async fn what_is_meant_is_chosen_by_job_batch_time_and_outcome() {
    let mut world = lived_in().await;
    let import = world.job("import").await.unwrap();
    let count = async |world: &World, arguments: &[&str]| -> Value {
        let ran = world.run(&[&["events", "republish", "--json", "--dry-run"], arguments].concat()).await;
        assert_eq!(ran.code, Some(0), "{ran:?}");
        ran.json()["events"].clone()
    };
    for (arguments, events) in [
        (vec!["--batch", "night"], 3),
        (vec!["--batch", "night", "--outcome", "succeeded"], 2),
        (vec!["--batch", "nobody"], 0),
        (vec!["--job", "import"], 1),
        (vec!["--job", "import", "--outcome", "failed"], 0),
        (vec!["--since", "1h", "--outcome", "failed"], 3),
        (vec!["--since", "2h", "--until", "1h"], 0),
        (vec!["--since", "2026-01-01T00:00:00Z", "--until", "2026-01-02T00:00:00Z"], 0),
    ] {
        assert_eq!(count(&world, &arguments).await, events, "{arguments:?}");
    }
    let ran = world.run(&["events", "republish", "--job", &import.id.to_string()]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    world.until("it is told", "select count(*) from outbox", 0).await;

    assert_eq!(world.events_of("import").await.len(), 2);
    for (arguments, code) in [
        (vec!["--job", "nobody"], 1),
        (vec![], 2),
        (vec!["--job", "import", "--batch", "night"], 2),
        (vec!["--job", "import", "--until", "1h"], 2),
        (vec!["--since", "yesterday"], 2),
    ] {
        let ran = world.run(&[&["events", "republish"], &arguments[..]].concat()).await;
        assert_eq!(ran.code, Some(code), "{arguments:?}: {ran:?}");
    }
    world.finish().await;
}

/// The command dies with a part of the events in the outbox, and is given again.
#[tokio::test]
async fn a_kill_loses_nothing() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arns = world.fake.seed(json!({"count": 5})).await;
    assert_eq!(world.run(&["hold", "everything"]).await.code, Some(0));
    let requests = (0..205).map(|n| request(&format!("r{n}"), &arns[n % 5], json!({"batch": "b"}))).collect();
    world.publish_all(requests).await;
    world.until("all are accepted", "select count(*) from job", 205).await;
    assert_eq!(world.run(&["jobs", "cancel", "--batch", "b"]).await.code, Some(0));
    world.until("all are told", "select count(*) from outbox", 0).await;
    let dies = [("FAILPOINTS", "republish.after_page=return")];
    let killed = world.run_with(&["events", "republish", "--batch", "b"], &dies, "").await;
    assert_eq!(killed.code, None, "{killed:?}");
    world.until("its page is told", "select count(*) from outbox", 0).await;
    let ran = world.run(&["events", "republish", "--batch", "b", "--json"]).await;
    assert!(ran.code == Some(0) && ran.json()["events"] == 205, "{ran:?}");
    world.until("all are told", "select count(*) from outbox", 0).await;
    assert_eq!(world.events().await.len(), 205 + 200 + 205);
    assert_eq!(world.run(&["release", "everything"]).await.code, Some(0));
    world.finish().await;
}
