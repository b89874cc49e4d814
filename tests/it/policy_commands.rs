//! What the commands say of a policy, and what `serve` demands of it.

use crate::support::world::{Ran, Tuning, World, request};
use serde_json::{Value, json};

const ARN: &str = "arn:aws:kms:eu-central-1:111122223333:key/031c5703-aaf7-425e-a141-7e0c6f5886ab";
const POLICY: &str = r#"
[principals.payroll]
rabbitmq_users = ["payroll"]
sqs_roles = ["AROAEXAMPLEEXAMPLE12"]
max_waiting = 100

[principals.operator]
rabbitmq_users = ["operator"]
redrive = true

[[rules]]
name = "payroll imports"
principals = ["payroll"]
operations = ["import"]
regions = ["eu-*"]
source_keys = ["payroll-*", "prod/payroll-*"]
expiry = "required"
longest_validity = "300d"

[[rules]]
name = "deletes"
principals = ["payroll"]
operations = ["delete", "rotate"]
urgent = true
"#;

#[track_caller]
fn ended(ran: &Ran, code: i32, says: &[&str]) {
    let all = format!("{}{}", ran.out, ran.err);
    assert!(ran.code == Some(code) && says.iter().all(|says| all.contains(says)), "expected {code}, {says:?}: {ran:?}");
}

#[tokio::test]
async fn it_is_said_whether_somebody_may_and_by_which_rule() {
    let world = World::new(Tuning::default()).await;
    world.with_policy(POLICY, "");
    let valid_to = (world.now().await + time::Duration::days(30)).replace_nanosecond(0).unwrap();
    let valid_to = valid_to.format(&time::format_description::well_known::Rfc3339).unwrap();
    let test = async |who: &str, more: &[&str]| {
        world.run(&[&["policy", "test", "--as", who, "--key", ARN], more].concat()).await
    };
    let good = ["--source-key", "payroll-1", "--valid-to", &valid_to];
    for who in ["rabbitmq:payroll", "aws:AROAEXAMPLEEXAMPLE12", "payroll"] {
        ended(&test(who, &good).await, 0, &["allowed to payroll", "\"payroll imports\"", "after 300d at most"]);
    }
    let dsm = ["--tier", "dsm", "--source-key", "prod/payroll-1", "--valid-to", &valid_to];
    ended(&test("payroll", &dsm).await, 0, &["payroll imports"]);
    ended(&test("payroll", &["--operation", "delete", "--urgent"]).await, 0, &["\"deletes\"", "urgent"]);
    // A key that only the store can tell.
    let open = ["--source-key", "031c5703-aaf7-425e-a141-7e0c6f5886ab", "--valid-to", &valid_to];
    ended(&test("payroll", &open).await, 0, &["allowed to payroll"]);

    ended(
        &test("payroll", &["--source-key", "payroll-1"]).await,
        1,
        &["denied", "payroll imports", "expiry is required"],
    );
    let other = ["--source-key", "finance", "--valid-to", &valid_to];
    ended(
        &test("payroll", &other).await,
        1,
        &["denied to payroll", "\"payroll imports\" does not fit by its source_keys"],
    );
    ended(&test("operator", &good).await, 1, &["denied to operator", "principals: payroll"]);
    ended(&test("rabbitmq:nobody", &good).await, 1, &["no principal for rabbitmq:nobody"]);
    ended(&test("nobody", &good).await, 1, &["no principal for nobody"]);

    let ran = world.run(&["policy", "test", "--json", "--as", "payroll", "--key", ARN]).await;
    ended(&ran, 1, &[]);
    let answer = ran.json();
    assert_eq!((&answer["allowed"], &answer["rule"]), (&json!(false), &Value::Null), "{answer}");
    assert_eq!(answer["nearest"][0]["rule"], "payroll imports", "{answer}");
    let body = request("r", ARN, json!({"operation": "delete"})).to_string();
    let ran = world.run_with(&["policy", "test", "--json", "--as", "payroll", "--request", "-"], &[], &body).await;
    assert_eq!(
        ran.json(),
        json!({"allowed": true, "principal": "payroll", "rule": "deletes",
        "conditions": ["rotations at least 1h apart", "deletes may be urgent"]})
    );
    // What is no request is not the policy's business.
    let ran = world.run_with(&["policy", "test", "--as", "payroll", "--request", "-"], &[], "{}").await;
    ended(&ran, 1, &["before it looks at the policy", "key"]);
}

#[tokio::test]
async fn a_file_is_checked_and_explained() {
    let world = World::new(Tuning::default()).await;
    world.with_policy(POLICY, "");
    ended(&world.run(&["policy", "check"]).await, 0, &["policy.toml is good"]);
    ended(
        &world.run(&["policy", "show"]).await,
        0,
        &[
            "payroll is rabbitmq:payroll or aws:AROAEXAMPLEEXAMPLE12; at most 100 of its jobs may wait",
            "operator is rabbitmq:operator; it may send refused messages of others again",
            "1. \"payroll imports\": payroll may import on any key",
            "whatever no rule allows is refused",
        ],
    );
    let checked = world.run(&["config", "check"]).await;
    ended(&checked, 0, &["1. \"payroll imports\"", "the settings are complete"]);
    let json = world.run(&["config", "check", "--json"]).await.json();
    assert_eq!(json["policy"]["digest"].as_str().map(str::len), Some(64), "{json}");

    let second = POLICY
        .replacen("name = \"deletes\"", "name = \"imports too\"", 1)
        .replace("[\"delete\", \"rotate\"]", "[\"import\"]");
    world.write("overlap.toml", &second.replace("urgent = true", ""));
    ended(&world.run(&["policy", "check", "overlap.toml"]).await, 0, &["warning", "imports too", "expiry"]);
    world.write(
        "broken.toml",
        &POLICY.replace("[\"payroll\"]\noperations = [\"import\"]", "[\"nobody\"]\noperations = [\"import\"]"),
    );
    ended(&world.run(&["policy", "check", "broken.toml"]).await, 1, &["broken.toml, line 13", "[principals.nobody]"]);
    let json = world.run(&["policy", "check", "broken.toml", "--json"]).await.json();
    assert_eq!((&json["ok"], &json["line"], &json["code"]), (&json!(false), &json!(13), &json!("principal_unknown")));
    let none = world.run(&["policy", "check", "no-such-file.toml"]).await;
    ended(&none, 1, &["no-such-file.toml"]);
}

#[tokio::test]
async fn serve_does_not_start_without_a_policy_or_with_one_that_the_settings_contradict() {
    let world = World::new(Tuning::default()).await;
    let own = std::fs::read_to_string(world.path("settings.toml")).unwrap();
    let with = |policy: &str, rabbitmq: &str| {
        let text = own.replacen("policy = \"allow-all\"", policy, 1);
        world.write("keyferry.toml", &text.replacen("[rabbitmq]", &format!("[rabbitmq]\n{rabbitmq}"), 1));
    };
    world.write("policy.toml", POLICY);
    world.write("broken.toml", "colour = 1");
    for (policy, rabbitmq, says) in [
        ("", "", &["policy", "KEYFERRY_POLICY"][..]),
        ("policy = \"no-such-file.toml\"", "", &["policy", "no-such-file.toml"]),
        ("policy = \"broken.toml\"", "", &["broken.toml", "line 1", "colour"]),
        ("policy = \"allow-all\"", "identity = \"required\"", &["rabbitmq.identity"]),
        ("policy = \"allow-all\"", "identity_proof = \"broker\"", &["rabbitmq.identity_proof"]),
        ("policy = \"policy.toml\"", "identity = \"ignored\"", &["rabbitmq.identity"]),
        ("policy = \"policy.toml\"", "identity_proof = \"signature\"", &["rabbitmq.audience"]),
        ("policy = \"policy.toml\"", "audience = \"x\"", &["rabbitmq.audience"]),
    ] {
        with(policy, rabbitmq);
        for command in [&["serve"][..], &["config", "check"]] {
            ended(&world.run(command).await, 2, says);
        }
    }
}
