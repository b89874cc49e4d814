//! Keys in several accounts, each by a role of its own: side by side, and none of them delayed by another's STS.

use crate::support::eventually;
use crate::support::fake::{ACCOUNT, Fake, REGION};
use crate::support::world::{Tuning, World, request};
use serde_json::{Value, json};
use sha2::Digest as _;

const OTHER: &str = "444455556666";
const THIRD: &str = "777788889999";
const EXTERNAL_ID: &str = "kf-external-id-8d1f";
const ASSUME: &str = "AssumeRole";

fn role(account: &str) -> String {
    format!("arn:aws:iam::{account}:role/teams/keyferry")
}

impl World {
    /// A target of this account with the role that it is reached by, and more lines.
    fn target(&self, account: &str, more: &str) -> String {
        self.write("external-id", &format!("{EXTERNAL_ID}\n"));
        format!(
            "[[targets]]\naccount = {account:?}\nregions = [{REGION:?}, \"us-east-1\"]\nrole_arn = {:?}\n\
             external_id_file = {:?}\n{more}\n",
            role(account),
            self.path("external-id").display().to_string()
        )
    }

    /// Configures these accounts, whose roles ask for the external id.
    async fn with_accounts(&self, accounts: &[&str]) {
        let targets: Vec<String> = accounts.iter().map(|account| self.target(account, "")).collect();
        self.configure(&targets.concat());
        for account in accounts {
            self.fake.role(&role(account), json!({"external_id": EXTERNAL_ID})).await;
        }
    }

    /// Keys of an account.
    async fn keys_of(&self, account: &str, region: &str, count: usize) -> Vec<String> {
        self.fake.seed(json!({"account": account, "region": region, "count": count})).await
    }

    /// Publishes an import into each.
    async fn ask_each(&mut self, prefix: &str, arns: &[String]) {
        for (number, arn) in arns.iter().enumerate() {
            let id = format!("{prefix}-{number}");
            self.publish(request(&id, arn, json!({"source_key_identifier": "payroll"}))).await;
        }
    }

    /// Each has succeeded, and the keys hold the bytes.
    async fn imported(&self, prefix: &str, arns: &[String], bytes: &[u8]) {
        for (number, arn) in arns.iter().enumerate() {
            self.succeeded(&format!("{prefix}-{number}")).await;
            let held = self.fake.show(arn).await;
            assert_eq!(held["materials"][0]["material_sha256"], hex::encode(sha2::Sha256::digest(bytes)), "{held:#}");
        }
    }

    async fn assumed(&self, account: &str, outcome: &str) -> usize {
        self.fake.journal(&format!("operation={ASSUME}&key={}&outcome={outcome}", role(account))).await.len()
    }

    /// Everything that sessions are made of shows nowhere.
    async fn note_session_secrets(&mut self) {
        for secret in self.fake.session_secrets().await {
            self.note_secret("a session's secret or token", secret.as_bytes());
        }
        self.note_secret("the external id", EXTERNAL_ID.as_bytes());
    }
}

fn assume_calls(result: &str) -> String {
    format!("keyferry_aws_calls_total{{operation=\"{ASSUME}\",result=\"{result}\"}}")
}

/// A world whose worker is not started yet, with a source key.
async fn world(tuning: Tuning, accounts: &[&str]) -> (World, Vec<u8>) {
    let world = World::new(tuning).await;
    let bytes = world.symmetric_key("payroll").await;
    world.with_accounts(accounts).await;
    (world, bytes)
}

#[tokio::test]
async fn accounts_import_side_by_side_each_by_its_own_role() {
    let (mut world, bytes) = world(Tuning::default(), &[OTHER, THIRD]).await;
    world.serve().await;
    let page = world.workers[0].get("metrics").await.unwrap().1;
    for result in ["ok", "access_denied", "throttled", "unanswered"] {
        assert!(page.contains(&assume_calls(result)), "{result} is not there at zero");
    }
    let mut all = Vec::new();
    for (account, region) in
        [(ACCOUNT, REGION), (OTHER, REGION), (OTHER, "us-east-1"), (THIRD, REGION), (THIRD, "us-east-1")]
    {
        all.push((format!("{account}.{region}"), account, world.keys_of(account, region, 3).await));
    }
    for (prefix, _, arns) in &all {
        world.ask_each(prefix, arns).await;
    }
    for (prefix, account, arns) in &all {
        world.imported(prefix, arns, &bytes).await;
        // By whom, AWS's own record says.
        for call in world.fake.journal(&format!("effect=imported&key={}", arns[0])).await {
            assert_eq!(call["account"], *account);
            let session = format!("arn:aws:sts::{account}:assumed-role/keyferry/keyferry");
            let expected = if *account == ACCOUNT { Value::Null } else { json!(session) };
            assert_eq!(call["session"], expected);
        }
    }
    // One session for all Regions of an account.
    for account in [OTHER, THIRD] {
        assert_eq!(world.assumed(account, "ok").await, 1, "{account}");
    }
    assert!((world.workers[0].metric(&assume_calls("ok")).await - 2.0).abs() < 0.5);
    let shown = world.run(&["config", "show"]).await;
    assert!(shown.out.contains(&role(OTHER)) && !shown.out.contains(EXTERNAL_ID), "{shown:?}");
    world.note_session_secrets().await;
    world.finish().await;
}

#[tokio::test]
async fn a_role_that_cannot_be_assumed_is_waited_for_and_then_told() {
    let (mut world, bytes) = world(Tuning::default(), &[OTHER, THIRD]).await;
    world.fake.role(&role(OTHER), json!({"external_id": "another"})).await;
    world.serve().await;
    let (denied, good) = (world.keys_of(OTHER, REGION, 1).await, world.keys_of(THIRD, REGION, 3).await);
    world.ask_each("denied", &denied).await;
    world.ask_each("good", &good).await;
    world.imported("good", &good, &bytes).await;
    let job = world.failed_after_looking("denied-0", "role_not_assumable").await;
    assert!(!job.aws_changed());
    let error = job.error.unwrap();
    let message = error["message"].as_str().unwrap();
    for words in [&*role(OTHER), OTHER, "sts:AssumeRole", "external id"] {
        assert!(message.contains(words) && !message.contains(EXTERNAL_ID), "{message}");
    }
    assert_eq!(world.fake.journal(&format!("key={}", denied[0])).await.len(), 0, "nothing was asked of KMS");
    assert!(world.workers[0].metric(&assume_calls("access_denied")).await >= 1.0);
    assert!(world.workers[0].metric(&assume_calls("ok")).await >= 1.0);
    // The trust policy is mended while a job waits.
    world.ask_each("mended", &denied).await;
    let waiting = "select count(*) from progress where last_error ->> 'step' = 'AssumeRole'";
    world.until("the job waits for the role", waiting, 1).await;
    world.fake.role(&role(OTHER), json!({"external_id": EXTERNAL_ID})).await;
    world.imported("mended", &denied, &bytes).await;
    world.note_session_secrets().await;
    world.finish().await;
}

/// STS takes the call and says nothing, for longer than this test lasts: whoever waited for it would wait in vain.
#[tokio::test]
async fn an_sts_that_hangs_delays_no_other_account() {
    let tuning = Tuning { concurrency: 4, aws_timeout_ms: 60_000, lease_ms: 180_000, ..Tuning::default() };
    let (mut world, bytes) = world(tuning, &[OTHER, THIRD]).await;
    let hold = json!({"operation": ASSUME, "key": role(OTHER), "fault": {"kind": "hold"}});
    world.fake.order(hold).await;
    world.serve().await;
    let (slow, quick) = (world.keys_of(OTHER, REGION, 24).await, world.keys_of(THIRD, REGION, 8).await);
    world.ask_each("slow", &slow).await;
    world.fake.held(1, ASSUME, &role(OTHER)).await;
    let tried = "select count(*) from progress where last_error ->> 'step' = 'AssumeRole'";
    eventually("all permits have been had", || async { (world.count(tried).await >= 8).then_some(()) }).await;
    world.ask_each("quick", &quick).await;
    world.imported("quick", &quick, &bytes).await;
    let waiting = "select count(*) from job where state = 'waiting'";
    assert_eq!(world.count(waiting).await, 24, "the others still wait");
    assert_eq!(world.count("select count(*) from progress where in_doubt").await, 0, "nothing was sent to KMS");
    // One call, whoever waits for it.
    world.fake.held(1, ASSUME, &role(OTHER)).await;
    world.fake.clear_faults().await;
    world.fake.release(&role(OTHER)).await;
    world.imported("slow", &slow, &bytes).await;
    assert_eq!(world.assumed(OTHER, "ok").await, 1);
    world.note_session_secrets().await;
    world.finish().await;
}

#[tokio::test]
async fn an_sts_that_throttles_or_fails_is_asked_again() {
    let (mut world, bytes) = world(Tuning::default(), &[OTHER]).await;
    let faults = [
        json!({"kind": "throttle"}),
        json!({"kind": "error", "code": "InternalFailure", "status": 500}),
        json!({"kind": "error", "code": "ExpiredTokenException", "message": "ordered by a test"}),
        json!({"kind": "lose_answer"}),
    ];
    for fault in &faults {
        world.fake.order(json!({"operation": ASSUME, "key": role(OTHER), "times": 1, "fault": fault})).await;
    }
    world.serve().await;
    let arns = world.keys_of(OTHER, REGION, 2).await;
    world.ask_each("r", &arns).await;
    let over = "select count(*) from job where state = 'succeeded'";
    eventually("both have succeeded", || async {
        // For those that wait for a person to mend the credentials.
        world.db.advance(std::time::Duration::from_secs(5)).await;
        tokio::time::sleep(std::time::Duration::from_millis(150)).await;
        (world.count(over).await == 2).then_some(())
    })
    .await;
    world.imported("r", &arns, &bytes).await;
    for result in ["throttled", "server_fault", "credentials", "unanswered"] {
        assert!((world.workers[0].metric(&assume_calls(result)).await - 1.0).abs() < 0.5, "{result}");
    }
    world.note_session_secrets().await;
    world.finish().await;
}

#[tokio::test]
async fn an_sts_that_is_away_leaves_accounts_without_a_role_alone() {
    let (mut world, bytes) = world(Tuning::default(), &[OTHER]).await;
    world.environment.push(("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:1".into()));
    world.serve().await;
    let (away, own) = (world.keys_of(OTHER, REGION, 1).await, world.keys_of(ACCOUNT, REGION, 2).await);
    world.ask_each("away", &away).await;
    let waiting = "select count(*) from progress
                   where last_error ->> 'step' = 'AssumeRole' and last_error ->> 'class' = 'transient' and not in_doubt";
    world.until("the job waits for STS", waiting, 1).await;
    world.ask_each("own", &own).await;
    world.imported("own", &own, &bytes).await;
    assert!(world.workers[0].metric(&assume_calls("not_sent")).await >= 1.0);
    world.workers[0].stop().await;
    world.environment.clear();
    world.serve().await;
    world.db.advance(std::time::Duration::from_secs(60)).await;
    world.imported("away", &away, &bytes).await;
    world.finish().await;
}

#[tokio::test]
async fn credentials_that_end_in_the_midst_of_a_run_are_renewed() {
    let (mut world, bytes) = world(Tuning::default(), &[OTHER]).await;
    world.serve().await;
    let arns = world.keys_of(OTHER, REGION, 9).await;
    world.ask_each("before", &arns[..4]).await;
    world.imported("before", &arns[..4], &bytes).await;
    // One job is between two calls when they end, by AWS's clock.
    world.fake.fault("ImportKeyMaterial", &arns[4], Some(1), json!({"kind": "hold"})).await;
    world.ask_each("amid", &arns[4..5]).await;
    world.fake.held(1, "ImportKeyMaterial", &arns[4]).await;
    world.fake.advance(3_700).await;
    world.fake.release(&arns[4]).await;
    world.ask_each("after", &arns[5..]).await;
    world.imported("amid", &arns[4..5], &bytes).await;
    world.imported("after", &arns[5..], &bytes).await;
    assert_eq!(world.count("select count(*) from job where state = 'failed'").await, 0);
    let refused = world.fake.journal("outcome=ExpiredTokenException").await;
    assert!(!refused.is_empty(), "nothing ended");
    assert_eq!(world.assumed(OTHER, "ok").await, 2);
    let credentials = world.workers[0].metric("keyferry_retries_total{reason=\"credentials\"}").await;
    assert!(credentials < 0.5, "nobody has to act");
    world.note_session_secrets().await;
    world.finish().await;
}

#[tokio::test]
async fn an_endpoint_serves_its_own_region() {
    let (mut world, bytes) = world(Tuning::default(), &[]).await;
    let directory = tempfile::tempdir().unwrap();
    let vpc = Fake::start(directory.path()).await;
    world.configure(&world.target(OTHER, &format!("endpoints = {{ us-east-1 = {:?} }}", vpc.url())));
    world.fake.role(&role(OTHER), json!({"external_id": EXTERNAL_ID})).await;
    // The endpoint is another double, which knows nothing of the first one's sessions.
    let there = vpc.seed(json!({"account": OTHER, "region": "us-east-1"})).await;
    let here = world.keys_of(OTHER, REGION, 1).await;
    world.serve().await;
    world.ask_each("here", &here).await;
    world.ask_each("there", &there).await;
    world.imported("here", &here, &bytes).await;
    vpc.wait(1, "outcome=UnrecognizedClientException").await;
    assert_eq!(world.fake.journal(&format!("key={}", there[0])).await.len(), 0);
    assert_eq!(world.run(&["jobs", "cancel", "there-0"]).await.code, Some(0));
    world.failed("there-0", "cancelled").await;
    world.finish().await;
}

#[tokio::test]
async fn a_message_chooses_no_role_and_no_account() {
    let (mut world, _) = world(Tuning::default(), &[OTHER]).await;
    world.serve().await;
    eventually("the role is assumed", || async { (world.assumed(OTHER, "ok").await == 1).then_some(()) }).await;
    world.fake.role(&role(THIRD), json!({})).await;
    let (known, stranger) = (world.keys_of(OTHER, REGION, 1).await, world.keys_of(THIRD, REGION, 1).await);
    for (field, value) in [("role_arn", role(THIRD)), ("external_id", "x".into()), ("endpoint", "http://h".into())] {
        world.publish(request(field, &known[0], json!({field: value}))).await;
    }
    world.publish(request("account", &stranger[0], json!({}))).await;
    let refused = world.refused(4).await;
    for refusal in &refused {
        let expected =
            if refusal.request_id.as_deref() == Some("account") { "unknown_target" } else { "unknown_field" };
        assert_eq!(refusal.code, expected);
    }
    assert_eq!(world.fake.journal(&format!("operation={ASSUME}")).await.len(), 1, "none but the configured one");
    world.finish().await;
}

#[tokio::test]
async fn a_target_that_cannot_be_meant_is_told_with_its_setting_and_file() {
    let world = World::new(Tuning::default()).await;
    let target = |lines: &str| format!("[[targets]]\naccount = {OTHER:?}\nregions = [{REGION:?}]\n{lines}\n");
    let fips = "fips = true\nendpoints = { eu-central-1 = \"https://kms.example.com\" }";
    for (code, name, lines) in [
        ("target_role_other_account", "targets.role_arn", format!("role_arn = {:?}", role(THIRD))),
        ("target_role_other_partition", "targets.role_arn", format!("role_arn = \"arn:aws-cn:iam::{OTHER}:role/x\"")),
        ("target_role_malformed", "targets.role_arn", "role_arn = \"keyferry\"".into()),
        ("target_region_unknown", "targets.regions", "partition = \"aws-us-gov\"".into()),
        ("target_partition_unknown", "targets.partition", "partition = \"aws-moon\"".into()),
        ("target_fips_with_endpoint", "targets.fips", fips.into()),
        ("target_endpoint_malformed", "targets.endpoints", "endpoints = { eu-central-1 = \"http://h\" }".into()),
        ("target_external_id", "targets.external_id", format!("external_id = {EXTERNAL_ID:?}")),
        ("target_duplicate", "targets.regions", target("")),
    ] {
        world.configure(&target(&lines));
        let ran = world.run(&["config", "check", "--json"]).await;
        assert_eq!((ran.code, ran.out.as_str()), (Some(2), ""), "{code}: {ran:?}");
        let error: Value = serde_json::from_str(&ran.err).unwrap_or_else(|error| panic!("{error}: {ran:?}"));
        assert_eq!(error["error"]["code"], code, "{ran:?}");
        let message = error["error"]["message"].as_str().unwrap();
        let file = world.path("keyferry.toml").display().to_string();
        assert!(message.contains(name) && message.contains(OTHER) && message.contains(&file), "{message}");
        assert!(!ran.err.contains(EXTERNAL_ID), "{ran:?}");
        let report = world.run(&["doctor", "--json"]).await.json();
        assert_eq!(report["checks"][0]["code"], code, "{report:#}");
    }
    world.configure(&world.target(OTHER, ""));
    assert_eq!(world.run(&["config", "check"]).await.code, Some(0));
    world.write("external-id", "not an id");
    let ran = world.run(&["config", "check"]).await;
    assert!(ran.code == Some(2) && ran.err.contains("targets.external_id_file"), "{ran:?}");
    assert!(!ran.err.contains("not an id"), "{ran:?}");
}

/// The verdict and code of a check.
fn found(report: &Value, check: &str) -> (String, String) {
    let checks = report["checks"].as_array().unwrap();
    let of = checks.iter().find(|finding| finding["check"] == check).unwrap_or_else(|| panic!("{check}: {report:#}"));
    let text = |name: &str| of[name].as_str().unwrap().to_owned();
    (text("verdict"), text("code"))
}

#[tokio::test]
async fn the_doctor_looks_at_roles_and_at_whose_the_credentials_are() {
    let (world, _) = world(Tuning::default(), &[OTHER]).await;
    let (own, role_check) = (format!("aws.{ACCOUNT}.identity"), format!("aws.{OTHER}.role"));
    let region = format!("aws.{OTHER}.{REGION}");
    let is = |verdict: &str, code: &str| (verdict.to_owned(), code.to_owned());
    let report = world.run(&["doctor", "--json"]).await.json();
    assert_eq!(found(&report, &own), is("ok", "ok"));
    assert_eq!(found(&report, &role_check), is("ok", "ok"));
    assert_eq!(found(&report, &region), is("ok", "ok"));
    world.fake.role(&role(OTHER), json!({"external_id": "another"})).await;
    let ran = world.run(&["doctor", "--json"]).await;
    assert_eq!(found(&ran.json(), &role_check), is("failed", "aws_role_denied"));
    assert_eq!(found(&ran.json(), &region), is("skipped", "needs_role"));
    assert!(ran.out.contains("aws iam get-role --role-name keyferry") && !ran.out.contains(EXTERNAL_ID), "{ran:?}");
    let away = [("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:1")];
    let report = world.run_with(&["doctor", "--json"], &away, "").await.json();
    assert_eq!(found(&report, &role_check), is("failed", "sts_unavailable"));
    assert_eq!(found(&report, &own), is("skipped", "aws_identity_unseen"));
    // Without the role, the worker's own credentials are all there is.
    world.configure(&format!("[[targets]]\naccount = {OTHER:?}\nregions = [{REGION:?}]"));
    let ran = world.run(&["doctor", "--json"]).await;
    assert_eq!(found(&ran.json(), &format!("aws.{OTHER}.identity")), is("failed", "aws_other_account"));
    assert!(ran.out.contains(&format!("arn:aws:iam::{OTHER}:role/NAME")), "{ran:?}");
}
