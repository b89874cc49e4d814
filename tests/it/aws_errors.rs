//! What AWS answers when it does not do as asked, and what follows; above all the answers that never come.

use crate::support::proof::decrypts;
use crate::support::world::{Tuning, World, random, request};
use serde_json::{Value, json};
use time::format_description::well_known::Rfc3339;

const IMPORT: &str = "ImportKeyMaterial";

struct Case {
    world: World,
    arn: String,
    bytes: Vec<u8>,
}

/// A worker, a source key, a KMS key.
async fn case(tuning: Tuning) -> Case {
    let mut world = World::new(tuning).await;
    let bytes = world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    world.serve().await;
    Case { world, arn, bytes }
}

fn error(code: &str) -> Value {
    json!({"kind": "error", "code": code, "message": "ordered by a test"})
}

impl Case {
    async fn ask(&mut self, id: &str, more: Value) {
        let mut request = request(id, &self.arn, json!({"source_key_identifier": "payroll"}));
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.world.publish(request).await;
    }

    async fn fault(&self, operation: &str, times: u64, fault: Value) {
        self.world.fake.fault(operation, &self.arn, Some(times), fault).await;
    }

    async fn calls(&self, query: &str) -> usize {
        self.world.fake.journal(&format!("key={}&{query}", self.arn)).await.len()
    }

    /// The job succeeds, and the key holds the bytes.
    async fn succeeds(self) {
        self.world.succeeded("r1").await;
        assert!(decrypts(&self.world.fake, &self.arn, &self.bytes).await);
        self.world.finish().await;
    }
}

#[tokio::test]
async fn throttled_calls_are_made_again() {
    let mut case = case(Tuning::default()).await;
    for operation in ["DescribeKey", "GetParametersForImport", IMPORT] {
        case.fault(operation, 1, json!({"kind": "throttle"})).await;
    }
    case.ask("r1", json!({})).await;
    let job = case.world.succeeded("r1").await;
    assert_eq!(case.world.workers[0].ready().await.unwrap().1.trim(), "ready");
    // The SDK repeats nothing: each throttled call costs an attempt.
    assert_eq!(job.attempts, 4);
    assert_eq!(case.calls("effect=imported").await, 1);
    // What was obtained before the import was throttled is used again: its quota is scarce.
    assert_eq!(case.calls("operation=GetParametersForImport&outcome=ok").await, 1);
    case.succeeds().await;
}

#[tokio::test]
async fn faults_inside_aws_are_borne() {
    let mut case = case(Tuning::default()).await;
    case.fault("GetParametersForImport", 1, error("DependencyTimeoutException")).await;
    case.fault(IMPORT, 1, error("KMSInternalException")).await;
    case.ask("r1", json!({})).await;
    case.world.succeeded("r1").await;
    // Not by the SDK behind our back: one call an attempt.
    assert_eq!(case.calls("operation=ImportKeyMaterial").await, 2);
    case.succeeds().await;
}

#[tokio::test]
async fn a_fault_inside_aws_after_the_effect_is_borne() {
    let mut case = case(Tuning::default()).await;
    let fault = json!({"kind": "error", "code": "KMSInternalException", "after_effect": true});
    case.fault(IMPORT, 1, fault).await;
    case.ask("r1", json!({})).await;
    case.succeeds().await;
}

const TOKEN_ERRORS: [(&str, &str); 3] = [
    ("ExpiredImportTokenException", "import_parameters_refused"),
    ("InvalidImportTokenException", "import_parameters_refused"),
    ("InvalidCiphertextException", "ciphertext_refused"),
];

#[tokio::test]
async fn import_parameters_that_aws_refuses_are_renewed_once() {
    let Case { mut world, bytes, .. } = case(Tuning::default()).await;
    let arns = world.fake.seed(json!({"count": TOKEN_ERRORS.len()})).await;
    for (arn, (code, _)) in arns.iter().zip(TOKEN_ERRORS) {
        world.fake.fault(IMPORT, arn, Some(1), error(code)).await;
        world.publish(request(code, arn, json!({"source_key_identifier": "payroll"}))).await;
    }
    for (arn, (code, _)) in arns.iter().zip(TOKEN_ERRORS) {
        world.succeeded(code).await;
        let sets = world.fake.journal(&format!("key={arn}&operation=GetParametersForImport")).await;
        assert_eq!(sets.len(), 2, "{code}");
        assert!(decrypts(&world.fake, arn, &bytes).await);
    }
    world.finish().await;
}

#[tokio::test]
async fn import_parameters_that_aws_refuses_twice_are_the_end() {
    let Case { mut world, .. } = case(Tuning::default()).await;
    let arns = world.fake.seed(json!({"count": TOKEN_ERRORS.len()})).await;
    for (arn, (code, _)) in arns.iter().zip(TOKEN_ERRORS) {
        world.fake.fault(IMPORT, arn, Some(2), error(code)).await;
        world.publish(request(code, arn, json!({"source_key_identifier": "payroll"}))).await;
        // The next job in the line is not affected.
        world.publish(request(&format!("{code}-2"), arn, json!({"source_key_identifier": "payroll"}))).await;
    }
    for (code, failure) in TOKEN_ERRORS {
        let job = world.failed(code, failure).await;
        assert!(!job.aws_changed() && job.error.unwrap()["message"].as_str().unwrap().contains(code));
        world.succeeded(&format!("{code}-2")).await;
    }
    world.finish().await;
}

#[tokio::test]
async fn what_aws_forbids_ends_the_job_and_says_what_to_allow() {
    let operations = ["DescribeKey", "GetParametersForImport", IMPORT];
    let Case { mut world, .. } = case(Tuning::default()).await;
    let arns = world.fake.seed(json!({"count": operations.len()})).await;
    for (arn, operation) in arns.iter().zip(operations) {
        world.fake.fault(operation, arn, Some(1), error("AccessDeniedException")).await;
        world.publish(request(operation, arn, json!({"source_key_identifier": "payroll"}))).await;
    }
    for operation in operations {
        let job = world.failed(operation, "access_denied").await;
        assert!(!job.aws_changed());
        let message = job.error.unwrap()["message"].as_str().unwrap().to_owned();
        assert!(message.contains(operation) && message.contains("kms:ImportKeyMaterial"), "{message}");
    }
    world.finish().await;
}

#[tokio::test]
async fn a_lost_answer_is_repaired_by_the_identical_import() {
    let mut case = case(Tuning::default()).await;
    case.fault(IMPORT, 1, json!({"kind": "lose_answer"})).await;
    case.ask("r1", json!({})).await;
    case.world.succeeded("r1").await;
    let shown = case.world.fake.show(&case.arn).await;
    assert_eq!(shown["materials"].as_array().unwrap().len(), 1, "{shown:#}");
    assert_eq!(case.calls("effect=imported").await, 2);
    case.succeeds().await;
}

#[tokio::test]
async fn a_lost_answer_about_a_hmac_key_is_repaired_too() {
    let mut world = World::with_worker(Tuning::default()).await;
    let bytes = random(48);
    world.import_key("mac", "HMAC_384", &bytes).await;
    let arn = world.fake.seed(json!({"spec": "HMAC_384"})).await.remove(0);
    world.fake.fault(IMPORT, &arn, Some(1), json!({"kind": "lose_answer"})).await;
    world.publish(request("r1", &arn, json!({"source_key_identifier": "mac"}))).await;
    world.succeeded("r1").await;
    assert!(crate::support::proof::macs(&world.fake, &arn, "HMAC_384", &bytes).await);
    world.finish().await;
}

#[tokio::test]
async fn a_late_effect_keeps_its_line_closed_to_what_contradicts_it() {
    // The life of a signature is passed by moving the clock, so that it cannot be over too early.
    let mut case = case(Tuning { signature_life_ms: 600_000, ..Tuning::hasty() }).await;
    let valid_to = (case.world.now().await + time::Duration::days(9)).format(&Rfc3339).unwrap();
    // The repetition uses the same import token; were it good for one import only, the late effect could not happen.
    case.world.fake.options(json!({"single_use_tokens": false})).await;
    // No answer within the time-out, and no effect yet; the repetition is answered.
    case.fault(IMPORT, 1, json!({"kind": "late", "hang_ms": 5_000})).await;
    case.ask("r1", json!({})).await;
    case.world.fake.pending_late(1, &case.arn).await;
    // An identical job, and one that contradicts the call that is still under way.
    case.ask("same", json!({})).await;
    case.ask("other", json!({"key_expiration": true, "valid_to": valid_to})).await;
    case.world.succeeded("r1").await;
    case.world.succeeded("same").await;
    case.world.until("the line is closed", CLOSED, 1).await;
    assert_eq!(case.world.job("other").await.unwrap().state, "waiting");
    assert!(case.world.workers[0].metric("keyferry_lines_closed_total").await >= 1.0);
    // The effect happens while the line is closed, as AWS may do for as long as the signature lives.
    assert_eq!(case.world.fake.release_late().await, 1);
    assert_eq!(case.calls("effect=imported").await, 3);
    case.world.db.advance(std::time::Duration::from_secs(600)).await;
    let other = case.world.succeeded("other").await;
    assert!(other.result.unwrap()["aws_param"]["ValidTo"].is_string());
    assert_eq!(other.attempts, 1, "waiting is no attempt");
    let shown = case.world.fake.show(&case.arn).await;
    assert_eq!(shown["expiration_model"], "KEY_MATERIAL_EXPIRES", "the late effect did not undo the later job");
    case.world.finish().await;
}

/// Lines whose head waits until a call of an earlier job can no longer take effect.
pub const CLOSED: &str = "select count(*) from line where token is null and due_at = late_until";

#[tokio::test]
async fn a_stranger_who_was_faster_is_found_even_when_the_answer_is_lost() {
    let mut case = case(Tuning::hasty()).await;
    let theirs = random(32);
    // Between our look at the key and our import.
    case.fault("GetParametersForImport", 1, json!({"kind": "hold"})).await;
    case.ask("r1", json!({})).await;
    case.world.fake.held(1, "GetParametersForImport", &case.arn).await;
    let arn = case.arn.clone();
    case.world.fake.stranger_imports(&arn, &theirs).await;
    case.fault(IMPORT, 1, json!({"kind": "lose_answer"})).await;
    case.world.fake.release(&arn).await;
    let job = case.world.failed("r1", "other_material").await;
    assert!(job.aws_changed(), "whether the first import took effect could not be learnt");
    assert!(decrypts(&case.world.fake, &arn, &theirs).await, "theirs is left in place");
    case.world.finish().await;
}

#[tokio::test]
async fn a_key_that_is_not_visible_yet_is_waited_for() {
    let mut case = case(Tuning::default()).await;
    case.fault("DescribeKey", 2, error("NotFoundException")).await;
    case.ask("r1", json!({})).await;
    case.succeeds().await;
}

#[tokio::test]
async fn a_description_that_lags_behind_is_looked_at_again() {
    let mut case = case(Tuning::default()).await;
    // The look after the import shows the state before it.
    let order = json!({"kind": "stale_describe"});
    case.world.fake.fault_after("DescribeKey", &case.arn, 1, order).await;
    case.ask("r1", json!({})).await;
    case.world.succeeded("r1").await;
    assert_eq!(case.calls("effect=imported").await, 1, "what AWS took is not sent again");
    case.succeeds().await;
}

#[tokio::test]
async fn while_credentials_are_wrong_jobs_wait() {
    let mut case = case(Tuning::default()).await;
    case.fault("DescribeKey", 1, error("ExpiredTokenException")).await;
    case.ask("r1", json!({})).await;
    let sql = "select count(*) from progress where last_error ->> 'class' = 'credentials'";
    case.world.until("the job waits", sql, 1).await;
    case.world.db.advance(std::time::Duration::from_secs(10)).await;
    case.succeeds().await;
}

/// An answer is lost, and from then on AWS refuses every set of parameters: the job goes on looking, but slowly.
#[tokio::test]
async fn parameters_that_stay_refused_while_in_doubt_are_asked_for_slowly() {
    let mut case = case(Tuning::hasty()).await;
    case.fault(IMPORT, 1, json!({"kind": "lose_answer"})).await;
    case.world.fake.fault(IMPORT, &case.arn, None, error("InvalidCiphertextException")).await;
    case.ask("r1", json!({})).await;
    let doubtful =
        "select count(*) from progress where in_doubt and refreshes >= 2 and last_error ->> 'class' = 'transient'";
    case.world.until("the second refusal is on record", doubtful, 1).await;
    let so_far = case.calls("operation=GetParametersForImport").await;
    assert!(so_far <= 4, "{so_far} sets of parameters in a moment");
    assert_eq!(case.world.count("select count(*) from job where state = 'waiting'").await, 1);
    case.world.fake.clear_faults().await;
    case.succeeds().await;
}

/// What happened is told apart by its count, and each costs one call more, not many.
#[tokio::test]
async fn each_way_to_go_wrong_has_a_count_of_its_own() {
    let tuning = Tuning { aws_timeout_ms: 5_000, ..Tuning::default() };
    let Case { mut world, .. } = case(tuning).await;
    let ways = [
        ("throttled", json!({"kind": "throttle"})),
        ("server_fault", error("KMSInternalException")),
        ("unanswered", json!({"kind": "hang"})),
        ("unanswered", json!({"kind": "lose_answer"})),
        ("unanswered", json!({"kind": "late", "ms": 1})),
    ];
    let arns = world.fake.seed(json!({"count": ways.len()})).await;
    for (number, (arn, (_, fault))) in arns.iter().zip(&ways).enumerate() {
        world.fake.fault(IMPORT, arn, Some(1), fault.clone()).await;
        world.publish(request(&format!("r{number}"), arn, json!({"source_key_identifier": "payroll"}))).await;
    }
    for (number, (arn, (_, fault))) in arns.iter().zip(&ways).enumerate() {
        world.succeeded(&format!("r{number}")).await;
        // One that was not answered; one that finds the token used up, where it took effect; and the one that succeeds.
        let sent = world.fake.journal(&format!("key={arn}&operation={IMPORT}&late=false")).await;
        assert!((2..=3).contains(&sent.len()), "{fault}: {sent:#?}");
    }
    for (result, count) in [("throttled", 1.0), ("server_fault", 1.0), ("unanswered", 3.0), ("ok", 5.0)] {
        // None that was not ordered goes wrong, but on a machine that takes longer than the time-out for an answer.
        let most = if result == "unanswered" { 5.0 } else { count };
        let series = format!("keyferry_aws_calls_total{{operation=\"{IMPORT}\",result=\"{result}\"}}");
        let seen = world.workers[0].metric(&series).await;
        assert!((count - 0.5..most + 0.5).contains(&seen), "{result}: {seen}");
    }
    world.finish().await;
}
