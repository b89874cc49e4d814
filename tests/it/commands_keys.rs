//! `keyferry keys`: the local store by its operators' commands.

use crate::support::world::{Tuning, World, random, request};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

#[tokio::test]
async fn source_keys_are_made_brought_listed_and_shown() {
    let mut world = World::with_worker(Tuning::default()).await;
    let created = world.run(&["keys", "create", "--name", "made", "--kind", "HMAC_384", "--json"]).await;
    assert_eq!(created.code, Some(0), "{created:?}");
    assert_eq!(created.json()["kind"], "HMAC_384");
    let bytes = random(32);
    let import = |name: &'static str, encoding: &'static str| {
        ["keys", "import", "--name", name, "--file", "-", "--encoding", encoding]
    };
    let spellings = [("as-hex", "hex", hex::encode(&bytes) + "\n"), ("as-base64", "base64", STANDARD.encode(&bytes))];
    for (name, encoding, text) in &spellings {
        let ran = world.run_with(&import(name, encoding), &[], text).await;
        assert_eq!(ran.code, Some(0), "{ran:?}");
    }
    std::fs::write(world.path("raw.key"), &bytes).unwrap();
    let raw = world.run(&["keys", "import", "--name", "as-raw", "--file", "raw.key"]).await;
    assert_eq!(raw.code, Some(0), "{raw:?}");
    let listed = world.run(&["keys", "list", "--json"]).await.json();
    let names: Vec<&str> = listed.as_array().unwrap().iter().map(|key| key["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["as-raw", "as-base64", "as-hex", "made"], "newest first");
    let before = listed[1]["id"].as_str().unwrap();
    let page = world.run(&["keys", "list", "--json", "--limit", "1", "--before", before]).await.json();
    assert_eq!((page.as_array().unwrap().len(), &page[0]), (1, &listed[2]));
    // All three are the same bytes: a KMS key takes each of them in turn.
    let arn = world.fake.key().await;
    for name in ["as-hex", "as-base64", "as-raw"] {
        world.publish(request(name, &arn, json!({"source_key_identifier": name}))).await;
        world.succeeded(name).await;
    }
    let shown = world.run(&["keys", "show", "as-raw", "--json"]).await;
    assert_eq!(shown.json()["used_by"], json!([arn]));
    assert!(!shown.out.contains(&hex::encode(&bytes)) && !shown.out.contains(&STANDARD.encode(&bytes)));
    for (arguments, input, says) in [
        (import("short", "hex"), "00ff", "exactly 32 bytes"),
        (import("other", "hex"), "zz", "not Hex"),
        (import("made", "hex"), &hex::encode(&bytes), "choose another"),
    ] {
        let ran = world.run_with(&arguments, &[], input).await;
        assert!(ran.code == Some(1) && ran.err.contains(says), "{ran:?}");
        assert!(!ran.err.contains(&hex::encode(&bytes)), "{ran:?}");
    }
    let id_like = uuid::Uuid::new_v4().to_string();
    for name in ["", "white space", &id_like] {
        assert_eq!(world.run(&["keys", "create", "--name", name]).await.code, Some(2), "{name}");
    }
    let reserved = world.run(&["keys", "create", "--name", "keyferry-mine"]).await;
    assert!(reserved.code == Some(2) && reserved.err.contains("keys that jobs generate"), "{reserved:?}");
    world.finish().await;
}

#[tokio::test]
async fn a_key_that_a_kms_key_is_tied_to_is_not_deleted() {
    let mut world = World::with_worker(Tuning::default()).await;
    for name in ["tied", "chosen", "free"] {
        world.symmetric_key(name).await;
    }
    let arns = world.fake.seed(json!({"count": 3})).await;
    world.publish(request("r1", &arns[0], json!({"source_key_identifier": "tied"}))).await;
    world.succeeded("r1").await;
    // A job is about to import it.
    world.fake.fault("ImportKeyMaterial", &arns[1], Some(1), json!({"kind": "hold"})).await;
    world.publish(request("r2", &arns[1], json!({"source_key_identifier": "chosen"}))).await;
    world.fake.held(1, "ImportKeyMaterial", &arns[1]).await;
    for (name, arn) in [("tied", &arns[0]), ("chosen", &arns[1])] {
        let refused = world.run(&["keys", "delete", name]).await;
        assert!(refused.code == Some(1) && refused.err.contains(arn.as_str()), "{refused:?}");
    }
    world.fake.release(&arns[1]).await;
    world.succeeded("r2").await;
    let deleted = world.run(&["keys", "delete", "free"]).await;
    assert_eq!(deleted.code, Some(0), "{deleted:?}");
    assert_eq!(world.run(&["keys", "delete", "free"]).await.code, Some(1));
    let sealed = "select count(*) from source_key where name = 'free'
                  and (sealed_material is not null or sealed_data_key is not null)";
    assert_eq!(world.count(sealed).await, 0);
    // The name never means other bytes, and a job that names it is told.
    assert_eq!(world.run(&["keys", "create", "--name", "free"]).await.code, Some(1));
    let listed = world.run(&["keys", "list", "--json"]).await;
    assert_eq!(listed.json().as_array().unwrap().len(), 2);
    let all = world.run(&["keys", "list", "--deleted", "--json"]).await;
    assert_eq!(all.json().as_array().unwrap().len(), 3);
    world.publish(request("r3", &arns[2], json!({"source_key_identifier": "free"}))).await;
    world.failed("r3", "source_key_deleted").await;
    world.finish().await;
}
