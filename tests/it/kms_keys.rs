//! `keyferry kms-keys`, with no more than the rights to read.

use crate::support::world::{Tuning, World, request};
use serde_json::json;
use time::format_description::well_known::Rfc3339;

#[tokio::test]
async fn what_is_in_aws_is_listed_and_shown_by_our_record() {
    let mut world = World::with_worker(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    let arns = world.fake.seed(json!({"count": 3})).await;
    let ahead = (world.now().await + time::Duration::days(20)).replace_nanosecond(0).unwrap();
    let ahead = ahead.format(&Rfc3339).unwrap();
    let named = json!({"source_key_identifier": "payroll"});
    world.publish(request("one", &arns[0], named.clone())).await;
    let expiring = json!({"source_key_identifier": "payroll", "key_expiration": true, "valid_to": ahead});
    world.publish(request("two", &arns[1], expiring)).await;
    world.publish(request("three", &arns[2], json!({"source_key_identifier": "none"}))).await;
    world.succeeded("one").await;
    world.succeeded("two").await;
    world.failed("three", "source_key_unknown").await;
    assert_eq!(world.run(&["hold", "key", &arns[0], "--reason", "an incident"]).await.code, Some(0));
    world.publish(request("waits", &arns[0], named)).await;
    world.until("it is parked", "select count(*) from line where parked_by is not null", 1).await;

    let reader = world.db.reader_url();
    let reading = [("KEYFERRY_DATABASE__URL", reader.as_str())];
    let run = async |arguments: &[&str]| world.run_with(&[&["kms-keys"], arguments].concat(), &reading, "").await;
    let all = run(&["list", "--json"]).await;
    assert_eq!(all.code, Some(0), "{all:?}");
    let all = all.json();
    let listed: Vec<&str> = all.as_array().unwrap().iter().map(|key| key["arn"].as_str().unwrap()).collect();
    let mut sorted = arns.clone();
    sorted.sort();
    assert_eq!(listed, sorted);
    let of = |arn: &str| all.as_array().unwrap().iter().find(|key| key["arn"] == arn).unwrap();
    let one = of(&arns[0]);
    assert!(one["kind"] == "SYMMETRIC_DEFAULT" && one["state"] == "Enabled" && one["waiting"] == 1, "{one:#}");
    assert_eq!(one["current_material"]["source_key_name"], "payroll");
    assert_eq!(one["holds"][0]["reason"], "an incident");
    assert_eq!(of(&arns[1])["expires_at"], json!(ahead));
    let three = of(&arns[2]);
    assert!(three["state"].is_null() && three["last_job"]["code"] == "source_key_unknown", "{three:#}");
    for (arguments, expected) in [
        (["list", "--expires-within", "30d"], vec![&arns[1]]),
        (["list", "--expires-within", "5d"], vec![]),
        (["list", "--source-key", "payroll"], sorted.iter().filter(|arn| **arn != arns[2]).collect()),
        (["list", "--account", "111122223334"], vec![]),
        (["list", "--after", &sorted[1]], vec![&sorted[2]]),
        (["list", "--limit", "1"], vec![&sorted[0]]),
    ] {
        let ran = run(&[&arguments[..], &["--json"]].concat()).await;
        let found = ran.json();
        let found: Vec<&str> = found.as_array().unwrap().iter().map(|key| key["arn"].as_str().unwrap()).collect();
        assert_eq!(found, expected, "{arguments:?}");
    }
    let table = run(&["list"]).await;
    assert!(table.out.starts_with("ARN") && table.out.contains("import failed (source_key_unknown)"), "{table:?}");
    let shown = run(&["show", one["id"].as_str().unwrap()]).await;
    assert_eq!(shown.code, Some(0), "{shown:?}");
    for said in ["Enabled, as seen at", "payroll", "held       key", "an incident", "imported 20", "for ever"] {
        assert!(shown.out.contains(said), "{said}: {shown:?}");
    }
    let unknown = run(&["show", "nonsense", "--json"]).await;
    assert!(unknown.code == Some(1) && unknown.err.contains("kms_key_unknown"), "{unknown:?}");
    assert_eq!(world.run(&["release", "key", &arns[0]]).await.code, Some(0));
    world.succeeded("waits").await;
    world.finish().await;
}
