//! Jobs whose material comes from a KMIP server, from the message to the proof that KMS holds it.

use crate::materials::sentence;
use crate::support::fake::WORKER;
use crate::support::kmip::{
    Act, DISCOVER_VERSIONS, Double, address, aes, attributes, file, found, message, refused, registered, versions,
};
use crate::support::proof::{decrypts, macs, signs};
use crate::support::world::{Tuning, World, random, request};
use keyferry::job::KeyKind;
use keyferry::source::{KeyMaterial, PlainKey};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};

/// Settings of connections: a name and its servers.
fn dsm(connections: &[(&str, &[&str])]) -> String {
    let tables = connections.iter().map(|(name, servers)| {
        format!(
            "[dsm.{name}]\nservers = {servers:?}\nca_file = \"{}\"\ncert_file = \"{}\"\nkey_file = \"{}\"\n\
             connect_timeout_ms = 2000\nrequest_timeout_ms = 2000\n",
            file("ca.crt").display(),
            file("client.crt").display(),
            file("client.key").display()
        )
    });
    tables.collect()
}

async fn world(tuning: Tuning, settings: &str) -> World {
    let world = World::new(tuning).await;
    world.configure(settings);
    world
}

/// Tells the checker what the run's server holds.
fn note(world: &mut World, connection: &str, label: &str) {
    let (id, bytes) = registered(label);
    world.note_dsm_key(&format!("{connection}/{id}"), &bytes);
}

fn named(key: &str) -> Value {
    json!({"source_key_tier": "dsm", "source_key_identifier": key})
}

#[tokio::test]
async fn every_kind_of_key_goes_from_the_server_to_kms() {
    let mut world = world(Tuning::default(), &dsm(&[("prod-eu", &[&address()])])).await;
    world.serve().await;
    let cases = [
        ("aes-256", "SYMMETRIC_DEFAULT"),
        ("hmac-224", "HMAC_224"),
        ("hmac-256", "HMAC_256"),
        ("hmac-384", "HMAC_384"),
        ("hmac-512", "HMAC_512"),
        ("rsa-2048", "RSA_2048"),
        ("rsa-2048-pkcs1", "RSA_2048"),
        ("rsa-3072", "RSA_3072"),
        ("rsa-4096", "RSA_4096"),
        ("p256", "ECC_NIST_P256"),
        ("p384-sec1", "ECC_NIST_P384"),
        ("p521", "ECC_NIST_P521"),
        ("secp256k1", "ECC_SECG_P256K1"),
    ];
    let mut held = Vec::new();
    for (number, (label, kind)) in cases.into_iter().enumerate() {
        let (id, bytes) = registered(label);
        world.note_dsm_key(&format!("prod-eu/{id}"), &bytes);
        let arn = world.fake.seed(json!({"spec": kind})).await.remove(0);
        // By name, by name with the connection before it, by the server's identifier.
        let key = [label.to_owned(), format!("prod-eu/{label}"), id.clone()][number % 3].clone();
        world.publish(request(label, &arn, named(&key))).await;
        held.push((label, kind, id, bytes, arn));
    }
    for (label, kind, id, bytes, arn) in held {
        let result = world.succeeded(label).await.result.unwrap();
        assert_eq!(result["dsm_key_id"], format!("prod-eu/{id}"));
        assert!(result["dsm_key_name"].as_str().unwrap().starts_with("prod-eu/"), "{result:#}");
        assert_eq!(result["local_key_id"], Value::Null);
        let is_proved = match kind {
            "SYMMETRIC_DEFAULT" => decrypts(&world.fake, &arn, &bytes).await,
            kind if kind.starts_with("HMAC") => macs(&world.fake, &arn, kind, &bytes).await,
            kind => {
                let key = PlainKey::parse(KeyKind::parse(kind).unwrap(), KeyMaterial::new(bytes)).unwrap();
                signs(&world.fake, &arn, kind, key.public_key().unwrap()).await
            }
        };
        assert!(is_proved, "{label}");
    }
    let events = world.events_of("aes-256").await;
    assert!(events[0]["data"]["result"]["dsm_key_name"].is_string());
    assert_eq!(world.count("select count(*) from source_key").await, 0, "nothing is kept of them");
    world.finish().await;
}

#[tokio::test]
async fn a_key_takes_only_the_same_dsm_key_again() {
    let mut world = world(Tuning::default(), &dsm(&[("prod", &[&address()])])).await;
    world.serve().await;
    note(&mut world, "prod", "aes-256");
    world.symmetric_key("local-one").await;
    let arn = world.fake.key().await;
    world.publish(request("r1", &arn, named("aes-256"))).await;
    world.succeeded("r1").await;
    // The same again, by its identifier; another one, another tier, none.
    world.publish(request("r2", &arn, named(&registered("aes-256").0))).await;
    world.succeeded("r2").await;
    for (id, more, code) in [
        ("other", named("exportable"), "other_material"),
        ("local", json!({"source_key_identifier": "local-one"}), "other_material"),
        ("none", json!({}), "source_key_required"),
    ] {
        world.publish(request(id, &arn, more)).await;
        let job = world.failed(id, code).await;
        assert!(!job.aws_changed() && sentence(&job).contains("prod/aes-256"), "{}", sentence(&job));
    }
    let imports = world.fake.journal(&format!("key={arn}&operation=ImportKeyMaterial")).await;
    assert_eq!(imports.len(), 2, "AWS was not asked");
    world.finish().await;
}

#[tokio::test]
async fn what_the_server_does_not_give_is_a_failure_that_says_why() {
    let mut world = world(Tuning::default(), &dsm(&[("prod", &[&address()])])).await;
    world.serve().await;
    let cases = [
        ("no-such-key", "SYMMETRIC_DEFAULT", "source_key_unknown"),
        ("twin", "SYMMETRIC_DEFAULT", "source_key_ambiguous"),
        ("pre-active", "SYMMETRIC_DEFAULT", "source_key_wrong_state"),
        ("deactivated", "SYMMETRIC_DEFAULT", "source_key_wrong_state"),
        ("compromised", "SYMMETRIC_DEFAULT", "source_key_wrong_state"),
        ("only-derives", "SYMMETRIC_DEFAULT", "source_key_wrong_usage"),
        ("wrapped", "SYMMETRIC_DEFAULT", "source_key_wrapped"),
        ("hmac-256", "RSA_2048", "source_key_wrong_kind"),
        ("p256", "ECC_NIST_P384", "source_key_wrong_kind"),
    ];
    for (number, (key, kind, _)) in cases.iter().enumerate() {
        let arn = world.fake.seed(json!({"spec": kind})).await.remove(0);
        let mut more = named(key);
        more["dry_run"] = json!(number % 2 == 1);
        world.publish(request(&format!("{key}-{kind}"), &arn, more)).await;
    }
    for (key, kind, code) in cases {
        let job = world.failed(&format!("{key}-{kind}"), code).await;
        assert!(!job.aws_changed() && sentence(&job).len() > 20, "{}", sentence(&job));
    }
    let calls = world.fake.journal("").await;
    let calls = calls.iter().filter(|call| call["access_key"] == WORKER && call["operation"] != "DescribeKey");
    assert_eq!(calls.count(), 0, "only read-only calls with wide quotas");
    world.finish().await;
}

#[tokio::test]
async fn a_tier_or_connection_that_is_not_configured_is_refused() {
    let mut plain = World::with_worker(Tuning::default()).await;
    let arn = plain.fake.key().await;
    plain.publish(request("r1", &arn, named("payroll"))).await;
    plain.publish(request("r2", &arn, json!({"source_key_tier": "dsm"}))).await;
    plain.publish(request("r3", &arn, named("prod/a/b\u{7}"))).await;
    let refusals = plain.refused(3).await;
    let code = |id: &str| refusals.iter().find(|one| one.request_id.as_deref() == Some(id)).unwrap().code.clone();
    assert_eq!([code("r1"), code("r2"), code("r3")], ["tier_not_configured", "missing_field", "invalid_value"]);
    plain.finish().await;

    let servers: &[&str] = &[&address()];
    let mut world = world(Tuning::default(), &dsm(&[("eu", servers), ("us", servers)])).await;
    world.serve().await;
    let arn = world.fake.key().await;
    world.publish(request("unnamed", &arn, named("aes-256"))).await;
    world.publish(request("unknown", &arn, named("asia/aes-256"))).await;
    let refusals = world.refused(2).await;
    assert!(
        refusals.iter().all(|one| one.code == "tier_not_configured" && one.message.contains("eu, us")),
        "{refusals:?}"
    );
    note(&mut world, "us", "aes-256");
    world.publish(request("named", &arn, named("us/aes-256"))).await;
    assert_eq!(world.succeeded("named").await.result.unwrap()["dsm_key_name"], "us/aes-256");
    world.finish().await;
}

/// A worker dies after AWS took the material; the next one fetches the same key again.
#[tokio::test]
async fn a_dead_workers_choice_is_fetched_again() {
    for failpoint in ["worker.after_prepare", "worker.after_answer", "worker.after_import"] {
        let mut world = world(Tuning::hasty(), &dsm(&[("prod", &[&address()])])).await;
        note(&mut world, "prod", "p256");
        let arn = world.fake.seed(json!({"spec": "ECC_NIST_P256"})).await.remove(0);
        world.publish(request("r1", &arn, named("p256"))).await;
        let first = world.start(&format!("{failpoint}=return")).await;
        assert!(world.workers[first].aborted().await);
        let chosen = "select count(*) from progress where dsm_key_id is not null and dsm_fingerprint is not null";
        assert_eq!(world.count(chosen).await, 1);
        world.serve().await;
        world.succeeded("r1").await;
        let key = PlainKey::parse(KeyKind::EccNistP256, KeyMaterial::new(registered("p256").1)).unwrap();
        assert!(signs(&world.fake, &arn, "ECC_NIST_P256", key.public_key().unwrap()).await);
        world.finish().await;
    }
}

/// The server gives other bytes under the same identifier after the job has chosen: it imports those or nothing.
#[tokio::test]
async fn a_key_that_changes_under_a_job_is_found() {
    let bytes = Arc::new(Mutex::new(random(32)));
    let double = Double::start({
        let bytes = Arc::clone(&bytes);
        move |asked| {
            let items = asked.operations.iter().map(|operation| match *operation {
                DISCOVER_VERSIONS => versions(),
                crate::support::kmip::LOCATE => found(&["7"]),
                crate::support::kmip::GET_ATTRIBUTES => attributes("7"),
                _ => aes("7", &bytes.lock().unwrap()),
            });
            Act::Answer(message(&items.collect::<Vec<_>>()))
        }
    })
    .await;
    let mut world = world(Tuning::default(), &dsm(&[("prod", &[&double.address])])).await;
    world.serve().await;
    let arn = world.fake.key().await;
    world.fake.fault("ImportKeyMaterial", &arn, Some(1), json!({"kind": "throttle"})).await;
    world.publish(request("r1", &arn, named("payroll"))).await;
    world.until("the import was throttled", "select count(*) from progress where last_error is not null", 1).await;
    *bytes.lock().unwrap() = random(32);
    let job = world.failed("r1", "source_key_changed").await;
    assert!(!job.aws_changed(), "{job:?}");
    assert_eq!(world.fake.show(&arn).await["state"], "PendingImport");
    world.finish().await;
}

/// While no server answers, jobs wait; when one does, they go on.
#[tokio::test]
async fn jobs_wait_for_a_server_that_is_away() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = listener.local_addr().unwrap().to_string();
    drop(listener);
    let mut world = world(Tuning::default(), &dsm(&[("prod", &[&nobody])])).await;
    note(&mut world, "prod", "aes-256");
    let at = world.serve().await;
    let arn = world.fake.key().await;
    world.publish(request("r1", &arn, named("aes-256"))).await;
    let waits =
        "select count(*) from progress where last_error ->> 'step' = 'dsm' and last_error ->> 'class' = 'transient'";
    world.until("the job waits", waits, 1).await;
    world.workers[at].stop().await;
    world.configure(&dsm(&[("prod", &[&nobody, &address()])]));
    world.serve().await;
    world.db.advance(std::time::Duration::from_secs(60)).await;
    world.succeeded("r1").await;
    world.finish().await;
}

/// The answer to the import was lost, and then the server no longer knows the key: only the same bytes settle it.
#[tokio::test]
async fn an_import_in_doubt_is_not_ended_by_what_the_server_says() {
    let (bytes, is_gone) = (random(32), Arc::new(Mutex::new(false)));
    let double = Double::start({
        let (bytes, is_gone) = (bytes.clone(), Arc::clone(&is_gone));
        move |asked| {
            let gone = *is_gone.lock().unwrap();
            let items = asked.operations.iter().map(|operation| match *operation {
                crate::support::kmip::LOCATE if gone => found(&[]),
                crate::support::kmip::LOCATE => found(&["7"]),
                other if gone => refused(Some(other), 1),
                crate::support::kmip::GET_ATTRIBUTES => attributes("7"),
                _ => aes("7", &bytes),
            });
            Act::Answer(message(&items.collect::<Vec<_>>()))
        }
    })
    .await;
    let mut world = world(Tuning::hasty(), &dsm(&[("prod", &[&double.address])])).await;
    world.note_dsm_key("prod/7", &bytes);
    world.serve().await;
    let arn = world.fake.key().await;
    world.fake.fault("ImportKeyMaterial", &arn, Some(1), json!({"kind": "hold"})).await;
    world.publish(request("r1", &arn, named("payroll"))).await;
    world.fake.held(1, "ImportKeyMaterial", &arn).await;
    *is_gone.lock().unwrap() = true;
    let waits = "select count(*) from progress where in_doubt and last_error ->> 'class' = 'credentials'";
    world.until("the job waits for the key", waits, 1).await;
    world.fake.release(&arn).await;
    *is_gone.lock().unwrap() = false;
    world.db.advance(std::time::Duration::from_secs(300)).await;
    world.succeeded("r1").await;
    assert!(decrypts(&world.fake, &arn, &bytes).await);
    world.finish().await;
}

/// What AWS has taken is verified by what it shows: the server may be gone by then.
#[tokio::test]
async fn a_pair_that_aws_has_taken_needs_its_server_no_more() {
    let mut world = world(Tuning::default(), &dsm(&[("prod", &[&address()])])).await;
    note(&mut world, "prod", "p384");
    let at = world.serve().await;
    let arn = world.fake.seed(json!({"spec": "ECC_NIST_P384"})).await.remove(0);
    world.fake.options(json!({"change_lag_ms": 20_000})).await;
    world.publish(request("r1", &arn, named("p384"))).await;
    world.until("AWS has answered", "select count(*) from progress where imported", 1).await;
    world.workers[at].stop().await;
    world.configure("");
    world.serve().await;
    world.fake.advance(20).await;
    assert!(world.succeeded("r1").await.result.unwrap()["public_key"].is_string());
    world.finish().await;
}

/// Two jobs that do the same: the second does not wait until a call of the first can no longer take effect.
#[tokio::test]
async fn the_identical_import_goes_at_once_and_another_waits() {
    let tuning = Tuning { signature_life_ms: 600_000, ..Tuning::hasty() };
    let mut world = world(tuning, &dsm(&[("prod", &[&address()])])).await;
    note(&mut world, "prod", "aes-256");
    world.serve().await;
    let arn = world.fake.key().await;
    world.fake.options(json!({"single_use_tokens": false})).await;
    world.fake.fault("ImportKeyMaterial", &arn, Some(1), json!({"kind": "late", "hang_ms": 5_000})).await;
    world.publish(request("r1", &arn, named("aes-256"))).await;
    world.fake.pending_late(1, &arn).await;
    let mut expires = named("aes-256");
    let valid_to = (world.now().await + time::Duration::days(9)).format(&time::format_description::well_known::Rfc3339);
    expires["key_expiration"] = true.into();
    expires["valid_to"] = valid_to.unwrap().into();
    world.publish(request("same", &arn, named(&registered("aes-256").0))).await;
    world.publish(request("other", &arn, expires)).await;
    world.succeeded("r1").await;
    world.succeeded("same").await;
    world.until("the line is closed", crate::aws_errors::CLOSED, 1).await;
    assert_eq!(world.fake.release_late().await, 1);
    world.db.advance(std::time::Duration::from_secs(600)).await;
    world.succeeded("other").await;
    world.finish().await;
}
