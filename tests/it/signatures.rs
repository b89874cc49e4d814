//! Who asks, by a signature: for brokers that many share. Made by OpenSSL, by Python's `cryptography` and by `submit`.

use crate::support::broker::{DEAD, Message};
use crate::support::eventually;
use crate::support::snapshot::Refusal;
use crate::support::variable;
use crate::support::world::{Carriage, Tuning, World, request};
use keyferry::policy::{Signed, SigningKey};
use serde_json::json;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

const AUDIENCE: &str = "test/keyferry.jobs";
const SETTINGS: &str = "identity = \"required\"\nidentity_proof = \"signature\"\naudience = \"test/keyferry.jobs\"";
const HEADER: &str = keyferry::ingress::SIGNATURE_HEADER;

fn run(program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let pipe = Stdio::piped;
    let mut child = Command::new(program).args(arguments).stdin(pipe()).stdout(pipe()).stderr(pipe()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A private key in a file, as OpenSSL writes it, and its public half.
fn key_pair(file: &Path) -> String {
    let file = file.to_str().unwrap();
    run("openssl", &["genpkey", "-algorithm", "ed25519", "-out", file], b"");
    String::from_utf8(run("openssl", &["pkey", "-in", file, "-pubout"], b"")).unwrap()
}

/// A world whose principal `payroll` signs with a key, and another with another.
struct Scene {
    world: World,
    arn: String,
    payroll: SigningKey,
    other: SigningKey,
}

async fn signed_world() -> Scene {
    signed_world_over(Carriage::RABBITMQ).await
}

async fn signed_world_over(carriage: Carriage) -> Scene {
    let mut world = World::over(Tuning::default(), carriage).await;
    let (mine, others) = (key_pair(&world.path("payroll.pem")), key_pair(&world.path("other.pem")));
    let principal = |name: &str, public: &str| {
        format!(
            "[principals.{name}]\n[[principals.{name}.signing_keys]]\nid = \"{name}-2026\"\n\
             public_key = \"\"\"\n{public}\"\"\"\n"
        )
    };
    let policy = format!(
        "{}{}[[rules]]\nname = \"imports\"\nprincipals = [\"payroll\", \"other\"]\noperations = [\"import\"]\n",
        principal("payroll", &mine),
        principal("other", &others)
    );
    world.with_policy(&policy, SETTINGS);
    world.serve().await;
    let key = |name: &str| SigningKey::from_pem(&std::fs::read_to_string(world.path(name)).unwrap()).unwrap();
    let (payroll, other) = (key("payroll.pem"), key("other.pem"));
    let arn = world.fake.key().await;
    Scene { world, arn, payroll, other }
}

/// A message with a signature over it as it is.
fn signed(message: Message, key: &SigningKey, id: &str, audience: &str, expires: OffsetDateTime) -> Message {
    let redrive = message.headers.get("keyferry-redrive").cloned();
    let over =
        Signed { redrive: redrive.as_deref(), content_type: message.content_type.as_deref(), body: &message.body };
    let header = key.sign(id, audience, expires, over).unwrap().to_string();
    message.with(HEADER, &header)
}

fn by_code<'a>(refusals: &'a [Refusal], request_id: &str) -> (&'a str, &'a str, bool, &'a str) {
    let one = refusals.iter().find(|one| one.request_id.as_deref() == Some(request_id));
    let one = one.unwrap_or_else(|| panic!("{request_id}: {refusals:#?}"));
    (&one.principal, one.identity.as_deref().unwrap_or_default(), one.identity_verified, &one.code)
}

#[tokio::test]
async fn a_signature_holds_for_one_message_one_queue_and_a_while() {
    let Scene { mut world, arn, payroll, other } = signed_world().await;
    world.symmetric_key("payroll").await;
    let now = world.now().await;
    let (soon, past) = (now + time::Duration::hours(1), now - time::Duration::hours(1));
    let body = |id: &str| request(id, &arn, json!({"source_key_identifier": "payroll"}));
    let asked = |id: &str| Message::of(&body(id));
    let right = |message: Message| signed(message, &payroll, "payroll-2026", AUDIENCE, soon);
    let json_type = |message: Message| Message { content_type: Some("application/json".into()), ..message };

    let good = right(json_type(asked("good")));
    world.send(good.clone()).await;
    let job = world.succeeded("good").await;
    assert_eq!((job.principal.as_str(), job.identity.as_deref()), ("payroll", Some("key:payroll-2026")));

    // Sent again, by whomever: a copy. So is one that comes too late, or by another queue, if it was accepted in time.
    world.send(good.clone()).await;
    world.send(signed(json_type(asked("good")), &payroll, "payroll-2026", AUDIENCE, past)).await;
    world.send(signed(json_type(asked("good")), &payroll, "payroll-2026", "prod/keyferry.jobs", soon)).await;
    world.note_respelt();
    world.note_respelt();

    let header = |message: &Message| message.headers[HEADER].clone();
    let mut changed = right(asked("altered"));
    changed.body = request("altered", &arn, json!({})).to_string().into_bytes();
    // Well formed, and by nobody.
    let whole = header(&right(asked("forged")));
    let forged = format!("{}{}==", whole.split_once("sig=").unwrap().0.to_owned() + "sig=", "A".repeat(86));
    // A signature for one id under another: the id is in the body.
    let replayed = asked("replayed").with(HEADER, &header(&good));
    let messages = [
        asked("missing"),
        asked("garbled").with(HEADER, "v1;key=payroll-2026"),
        asked("forged").with(HEADER, &forged),
        signed(asked("other-key"), &other, "payroll-2026", AUDIENCE, soon),
        signed(asked("unknown-key"), &payroll, "nobody-2026", AUDIENCE, soon),
        json_type(right(asked("content-type"))),
        replayed,
        changed,
        signed(asked("stale"), &payroll, "payroll-2026", AUDIENCE, past),
        signed(asked("too-long"), &payroll, "payroll-2026", AUDIENCE, now + time::Duration::days(15)),
        signed(asked("audience"), &payroll, "payroll-2026", "prod/keyferry.jobs", soon),
        // No user of the broker vouches for anything here; the message's own id is not what was signed.
        Message { message_id: Some("from-outside".into()), ..right(Message::of(&json!({"key": arn}))) },
        right(asked("redrive").with("keyferry-redrive", &uuid::Uuid::from_u128(1).to_string())),
    ];
    let count = messages.len();
    for message in messages {
        world.send(message).await;
    }
    let refusals = world.refused(count).await;
    let key = "key:payroll-2026";
    for (id, expected) in [
        ("missing", ("unidentified", "", false, "identity_missing")),
        ("garbled", ("unidentified", "", false, "signature_invalid")),
        ("forged", ("unidentified", key, false, "signature_invalid")),
        ("other-key", ("unidentified", key, false, "signature_invalid")),
        ("unknown-key", ("unidentified", "key:nobody-2026", false, "identity_unknown")),
        ("content-type", ("unidentified", key, false, "signature_invalid")),
        ("replayed", ("unidentified", key, false, "signature_invalid")),
        ("altered", ("unidentified", key, false, "signature_invalid")),
        ("stale", ("payroll", key, true, "signature_expired")),
        ("too-long", ("payroll", key, true, "signature_expired")),
        ("audience", ("payroll", key, true, "signature_audience")),
        // Who sends a message again proves nothing of who sent it first.
        ("redrive", ("payroll", key, false, "redrive_not_allowed")),
    ] {
        assert_eq!(by_code(&refusals, id), expected, "{id}");
    }
    let no_id = refusals.iter().find(|one| one.request_id.is_none()).unwrap();
    assert_eq!((no_id.code.as_str(), no_id.field.as_deref()), ("missing_field", Some("id")));
    world.dead_letters(count).await;
    let imports = world.fake.journal("operation=ImportKeyMaterial").await;
    assert_eq!(imports.len(), 1, "no AWS call for a refusal or a copy");
    world.finish().await;
}

#[tokio::test]
async fn a_large_batch_of_signatures_is_verified() {
    let Scene { mut world, payroll, .. } = signed_world().await;
    world.workers[0].stop().await;
    let arns = world.fake.seed(json!({"count": 40})).await;
    let soon = world.now().await + time::Duration::hours(1);
    for (number, arn) in arns.iter().enumerate() {
        let asked = Message::of(&request(&format!("r{number}"), arn, json!({})));
        world.send(signed(asked, &payroll, "payroll-2026", AUDIENCE, soon)).await;
    }
    world.serve().await;
    for number in 0..arns.len() {
        assert_eq!(world.succeeded(&format!("r{number}")).await.principal, "payroll");
    }
    world.finish().await;
}

#[tokio::test]
async fn openssl_python_and_submit_sign_alike() {
    let Scene { mut world, arn, .. } = signed_world().await;
    let key_file = world.path("payroll.pem").to_str().unwrap().to_owned();
    let expires = (world.now().await + time::Duration::hours(1)).replace_nanosecond(0).unwrap();
    let expires = expires.format(&Rfc3339).unwrap();
    let message = |body: Vec<u8>, header: &[u8]| {
        let header = String::from_utf8(header.to_vec()).unwrap();
        let content_type = Some("application/json".into());
        Message { body, content_type, ..Message::default() }.with(HEADER, header.trim_end())
    };
    let python = variable("KEYFERRY_TEST_PYTHON");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/sign.py");
    let body = request("python", &arn, json!({})).to_string().into_bytes();
    let arguments = [script.to_str().unwrap(), &key_file, "payroll-2026", AUDIENCE, &expires, "application/json"];
    let header = run(&python, &arguments, &body);
    world.send(message(body, &header)).await;
    world.succeeded("python").await;

    // The recipe of the manual, as it stands there.
    let manual = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("ops/manual/policy.md")).unwrap();
    let recipe = manual.split("# Sign request.json\n").nth(1).unwrap().split("```").next().unwrap();
    let arns = world.fake.seed(json!({"count": 2})).await;
    let body = request("openssl", &arns[0], json!({})).to_string().into_bytes();
    std::fs::write(world.path("request.json"), &body).unwrap();
    let script = format!(
        "cd {}; key=payroll.pem id=payroll-2026 audience={AUDIENCE} expires={expires}\n{recipe}",
        world.path("").display()
    );
    let header = run("bash", &["-euc", &script], b"");
    world.send(message(body, &header)).await;
    world.succeeded("openssl").await;

    let more = ["--sign-key-file", &key_file, "--sign-key-id", "payroll-2026", "--wait", "--json"];
    let ran = world.run(&[&["submit", "--id", "submit", "--key", &arns[1]], &more[..]].concat()).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let job = world.succeeded("submit").await;
    assert_eq!((job.principal.as_str(), job.identity.as_deref()), ("payroll", Some("key:payroll-2026")));
    world.note_published([Message::of(&request("submit", &arns[1], json!({})))]);

    // What it cannot sign it does not send.
    let unsigned = world.run(&["submit", "--key", &arns[1]]).await;
    assert!(unsigned.code == Some(1) && unsigned.err.contains("--sign-key-file"), "{unsigned:?}");
    std::fs::write(world.path("wrong.pem"), "no key").unwrap();
    let wrong = ["submit", "--key", &arns[1], "--sign-key-file", "wrong.pem", "--sign-key-id", "x"];
    let ran = world.run(&wrong).await;
    assert!(ran.code == Some(1) && ran.err.contains("wrong.pem") && ran.err.contains("PRIVATE KEY"), "{ran:?}");
    assert!(ran.err.contains("chmod 600"), "the file is open to others: {ran:?}");
    world.finish().await;
}

#[tokio::test]
async fn over_sqs_it_is_the_same() {
    let Scene { mut world, arn, payroll, other } = signed_world_over(Carriage::SQS).await;
    let soon = world.now().await + time::Duration::hours(1);
    let asked = |id: &str| Message {
        content_type: Some("application/json".into()),
        ..Message::of(&request(id, &arn, json!({})))
    };
    world.send(signed(asked("good"), &payroll, "payroll-2026", AUDIENCE, soon)).await;
    assert_eq!(world.succeeded("good").await.identity.as_deref(), Some("key:payroll-2026"));
    world.send(signed(asked("forged"), &other, "payroll-2026", AUDIENCE, soon)).await;
    world.send(signed(asked("audience"), &payroll, "payroll-2026", "prod/keyferry.jobs", soon)).await;
    world.send(asked("missing")).await;
    let refusals = world.refused(3).await;
    assert_eq!(by_code(&refusals, "forged").3, "signature_invalid");
    assert_eq!(by_code(&refusals, "audience"), ("payroll", "key:payroll-2026", true, "signature_audience"));
    assert_eq!(by_code(&refusals, "missing").3, "identity_missing");
    let key_file = world.path("payroll.pem").to_str().unwrap().to_owned();
    let more = world.fake.key().await;
    let signing = ["--sign-key-file", &key_file, "--sign-key-id", "payroll-2026", "--wait", "--json"];
    let ran = world.run(&[&["submit", "--id", "submit", "--key", &more], &signing[..]].concat()).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    world.note_published([Message::of(&request("submit", &more, json!({})))]);
    world.finish().await;
}

#[tokio::test]
async fn dead_letters_are_put_back_with_an_operators_signature() {
    let Scene { mut world, arn, payroll, .. } = signed_world().await;
    let soon = world.now().await + time::Duration::hours(1);
    let asked = Message::of(&request("r1", &arn, json!({"operation": "delete"})));
    world.send(signed(asked, &payroll, "payroll-2026", AUDIENCE, soon)).await;
    let id = world.refused(1).await.remove(0).id.to_string();
    let policy = std::fs::read_to_string(world.path("policy.toml")).unwrap();
    let policy = policy.replace("[principals.other]", "[principals.other]\nredrive = true");
    world.load_policy(0, &policy.replace("[\"import\"]", "[\"import\", \"delete\"]")).await;
    eventually("it is dead-lettered", || async { (world.vhost.ready(DEAD).await == 1).then_some(()) }).await;
    let unsigned = world.run(&["dead", "redrive", &id]).await;
    assert!(unsigned.code == Some(1) && unsigned.err.contains("--sign-key-file"), "{unsigned:?}");
    let key_file = world.path("other.pem").to_str().unwrap().to_owned();
    let signing = ["--sign-key-file", &key_file, "--sign-key-id", "other-2026", "--json"];
    let ran = world.run(&[&["dead", "redrive", &id], &signing[..]].concat()).await;
    assert_eq!((ran.code, &ran.json()["redriven"]), (Some(0), &json!(1)), "{ran:?}");
    assert_eq!(world.succeeded("r1").await.identity.as_deref(), Some("key:payroll-2026"));
    world.note_redriven(1);
    world.finish().await;
}

#[tokio::test]
async fn an_operator_signs_what_they_send_again() {
    let Scene { mut world, arn, payroll, other } = signed_world().await;
    let soon = world.now().await + time::Duration::hours(1);
    let asked = Message::of(&request("r1", &arn, json!({"operation": "delete"})));
    world.send(signed(asked.clone(), &payroll, "payroll-2026", AUDIENCE, soon)).await;
    let first = world.refused(1).await.remove(0);
    assert_eq!(first.code, "not_allowed");
    // The other principal becomes the operator, and deletes become allowed.
    let policy = std::fs::read_to_string(world.path("policy.toml")).unwrap();
    let policy = policy.replace("[principals.other]", "[principals.other]\nredrive = true");
    world.load_policy(0, &policy.replace("[\"import\"]", "[\"import\", \"delete\"]")).await;
    let again = asked.with("keyferry-redrive", &first.id.to_string());
    // A header that was put beside an operator's signature is not what they signed.
    let bare =
        signed(Message::of(&request("r1", &arn, json!({"operation": "delete"}))), &other, "other-2026", AUDIENCE, soon);
    world.send(bare.with("keyferry-redrive", &first.id.to_string())).await;
    world.refused(2).await;
    assert_eq!(by_code(&world.refused(2).await[1..], "r1").3, "signature_invalid");
    world.send(signed(again, &other, "other-2026", AUDIENCE, soon)).await;
    let job = world.succeeded("r1").await;
    assert_eq!((job.principal.as_str(), job.identity.as_deref()), ("payroll", Some("key:payroll-2026")));
    world.finish().await;
}
