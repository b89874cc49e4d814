//! `keyferry keys`: the local store by its operators' commands.

use crate::support::world::{Tuning, World, random, request};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use keyferry::job::KeyKind;
use keyferry::source::PlainKey;
use serde_json::{Value, json};

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
        (import("other", "hex"), "zz", "not hex"),
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
async fn source_keys_of_every_kind_are_made_brought_and_listed() {
    let world = World::with_worker(Tuning::default()).await;
    for kind in KeyKind::ALL {
        let (made, brought) = (format!("made-{kind}"), format!("brought-{kind}"));
        let created = world.run(&["keys", "create", "--name", &made, "--kind", kind.as_str(), "--json"]).await;
        assert!(created.code == Some(0) && created.json()["kind"] == kind.as_str(), "{created:?}");
        let key = PlainKey::generate(kind).unwrap();
        std::fs::write(world.path("key"), key.material().expose()).unwrap();
        let import = ["keys", "import", "--name", &brought, "--kind", kind.as_str(), "--file", "key"];
        let imported = world.run(&import).await;
        assert_eq!(imported.code, Some(0), "{imported:?}");
    }
    // The one form that is kept, whatever the encoding.
    let der = include_bytes!("../fixtures/material/p384.der");
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", STANDARD.encode(der));
    let import = ["keys", "import", "--name", "pem", "--kind", "ECC_NIST_P384", "--file", "-", "--encoding", "pem"];
    let imported = world.run_with(&import, &[], &pem).await;
    assert_eq!(imported.code, Some(0), "{imported:?}");
    let listed = world.run(&["keys", "list", "--json"]).await.json();
    for kind in KeyKind::ALL {
        let of_kind = listed.as_array().unwrap().iter().filter(|key| key["kind"] == kind.as_str()).count();
        assert_eq!(of_kind, if kind == KeyKind::EccNistP384 { 3 } else { 2 }, "{kind}");
    }
    let help = world.run(&["keys", "create", "--help"]).await;
    assert!(help.out.contains("RSA private key of 4096 bits") && help.out.contains("secp256k1"), "{help:?}");
    world.finish().await;
}

#[tokio::test]
async fn material_that_is_refused_is_refused_by_a_code() {
    let world = World::with_worker(Tuning::default()).await;
    let (p256, rsa) = (
        include_bytes!("../fixtures/material/p256.der").as_slice(),
        include_bytes!("../fixtures/material/rsa_2048.der").as_slice(),
    );
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", STANDARD.encode(p256));
    let mut foreign = p256.to_vec();
    *foreign.last_mut().unwrap() ^= 1;
    let much = "x".repeat(70_000);
    let three_primes = include_bytes!("../fixtures/material/rsa_2048_three_primes.der");
    for (kind, encoding, bytes, code) in [
        ("HMAC_256", "raw", [7; 31].as_slice(), "material_wrong_length"),
        ("HMAC_256", "raw", hex::encode([7; 32]).as_bytes(), "material_is_hex"),
        ("HMAC_256", "hex", hex::encode(hex::encode([7; 32])).as_bytes(), "material_is_hex"),
        ("HMAC_256", "base64", STANDARD.encode(STANDARD.encode([7; 32])).as_bytes(), "material_is_base64"),
        ("HMAC_256", "hex", b"zz", "material_wrong_encoding"),
        ("ECC_NIST_P256", "raw", pem.as_bytes(), "material_is_pem"),
        ("ECC_NIST_P256", "pem", p256, "material_not_pem"),
        ("ECC_NIST_P256", "raw", &p256[29..], "material_is_sec1"),
        ("ECC_NIST_P256", "raw", &p256[1..], "material_not_pkcs8"),
        ("ECC_NIST_P256", "raw", &foreign, "material_foreign_public_key"),
        ("ECC_NIST_P384", "raw", p256, "material_wrong_curve"),
        ("RSA_2048", "raw", p256, "material_wrong_algorithm"),
        ("RSA_2048", "raw", &rsa[26..], "material_is_pkcs1"),
        ("RSA_3072", "raw", rsa, "material_wrong_modulus"),
        ("RSA_2048", "raw", three_primes, "material_multi_prime"),
        ("RSA_2048", "raw", much.as_bytes(), "material_too_large"),
    ] {
        std::fs::write(world.path("key"), bytes).unwrap();
        let import = ["keys", "import", "--name", "refused", "--kind", kind, "--file", "key", "--encoding", encoding];
        let said = world.run(&import).await;
        assert!(said.code == Some(1) && said.err.starts_with("keyferry: ") && said.out.is_empty(), "{said:?}");
        let ran = world.run(&[import.as_slice(), &["--json"]].concat()).await;
        assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""), "{ran:?}");
        let error: Value = serde_json::from_str(&ran.err).unwrap_or_else(|error| panic!("{error}: {ran:?}"));
        assert_eq!(error["error"]["code"], code, "{ran:?}");
        assert!(said.err.contains(error["error"]["message"].as_str().unwrap()), "{said:?} {ran:?}");
    }
    let other = world.run(&["keys", "show", "nobody", "--json"]).await;
    let error: Value = serde_json::from_str(&other.err).unwrap();
    assert_eq!((other.code, &error["error"]["code"]), (Some(1), &json!("source_key_unknown")), "{other:?}");
    assert_eq!(world.run(&["keys", "list", "--json"]).await.json(), json!([]));
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
