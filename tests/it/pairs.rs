//! Key pairs end to end: from a message to a signature that the public key verifies.

use crate::materials::sentence;
use crate::support::fake::WORKER;
use crate::support::proof::{decrypts, macs, signs};
use crate::support::world::{Tuning, World, random, request};
use aws_lc_rs::encoding::{AsDer as _, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256K1_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING,
    ECDSA_P521_SHA512_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _,
};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use time::format_description::well_known::Rfc3339;

const KINDS: [&str; 7] =
    ["RSA_2048", "RSA_3072", "RSA_4096", "ECC_NIST_P256", "ECC_NIST_P384", "ECC_NIST_P521", "ECC_SECG_P256K1"];

/// A pair that another library has made.
struct Pair {
    pkcs8: Vec<u8>,
    public_key: Vec<u8>,
}

impl Pair {
    fn new(kind: &str) -> Self {
        let ecc = |algorithm| {
            let pair = EcdsaKeyPair::generate(algorithm).unwrap();
            let pkcs8 = pair.to_pkcs8v1().unwrap().as_ref().to_vec();
            let public_key: PublicKeyX509Der = pair.public_key().as_der().unwrap();
            Self { pkcs8, public_key: public_key.as_ref().to_vec() }
        };
        let rsa = |size| {
            let pair = KeyPair::generate(size).unwrap();
            let pkcs8: Pkcs8V1Der = pair.as_der().unwrap();
            let public_key: PublicKeyX509Der = pair.public_key().as_der().unwrap();
            Self { pkcs8: pkcs8.as_ref().to_vec(), public_key: public_key.as_ref().to_vec() }
        };
        match kind {
            "RSA_2048" => rsa(KeySize::Rsa2048),
            "RSA_3072" => rsa(KeySize::Rsa3072),
            "RSA_4096" => rsa(KeySize::Rsa4096),
            "ECC_NIST_P256" => ecc(&ECDSA_P256_SHA256_ASN1_SIGNING),
            "ECC_NIST_P384" => ecc(&ECDSA_P384_SHA384_ASN1_SIGNING),
            "ECC_NIST_P521" => ecc(&ECDSA_P521_SHA512_ASN1_SIGNING),
            "ECC_SECG_P256K1" => ecc(&ECDSA_P256K1_SHA256_ASN1_SIGNING),
            other => panic!("no kind of pair: {other}"),
        }
    }

    fn shown(&self) -> Value {
        json!(STANDARD.encode(&self.public_key))
    }
}

/// A worker, a KMS key of a kind, and a pair that is a source key.
struct Case {
    world: World,
    kind: &'static str,
    arn: String,
    pair: Pair,
}

async fn case(kind: &'static str, tuning: Tuning) -> Case {
    let mut world = World::new(tuning).await;
    let pair = Pair::new(kind);
    world.import_key("pair", kind, &pair.pkcs8).await;
    let arn = world.fake.seed(json!({"spec": kind})).await.remove(0);
    world.serve().await;
    Case { world, kind, arn, pair }
}

impl Case {
    async fn ask(&mut self, id: &str, mut more: Value) {
        if more["source_key_identifier"].is_null() && more["operation"].is_null() {
            more["source_key_identifier"] = "pair".into();
        }
        self.world.publish(request(id, &self.arn, more)).await;
    }

    async fn calls(&self, operation: &str) -> usize {
        let calls = self.world.fake.journal(&format!("key={}&operation={operation}", self.arn)).await;
        calls.iter().filter(|call| call["access_key"] == WORKER).count()
    }

    async fn proves(&self) {
        assert!(signs(&self.world.fake, &self.arn, self.kind, &self.pair.public_key).await);
        let other = Pair::new("ECC_NIST_P256").public_key;
        if self.kind == "ECC_NIST_P256" {
            assert!(!signs(&self.world.fake, &self.arn, self.kind, &other).await, "a proof that cannot fail");
        }
    }
}

#[tokio::test]
async fn every_kind_of_pair_goes_from_a_message_to_a_signature() {
    let mut world = World::with_worker(Tuning::default()).await;
    let mut held = Vec::new();
    for kind in KINDS {
        let pair = Pair::new(kind);
        world.import_key(kind, kind, &pair.pkcs8).await;
        let arn = world.fake.seed(json!({"spec": kind})).await.remove(0);
        world.publish(request(kind, &arn, json!({"source_key_identifier": kind}))).await;
        held.push((kind, pair, arn));
    }
    for (kind, pair, arn) in held {
        let result = world.succeeded(kind).await.result.unwrap();
        assert!(signs(&world.fake, &arn, kind, &pair.public_key).await, "{kind}");
        assert_eq!((&result["public_key"], &result["key_type"]), (&pair.shown(), &json!("asymmetric")), "{kind}");
        assert!(result["aws_param"]["SigningAlgorithms"].is_array(), "{result:#}");
        let algorithm = if kind.starts_with("RSA") { "RSA_AES_KEY_WRAP_SHA_256" } else { "RSAES_OAEP_SHA_256" };
        let job = world.job(kind).await.unwrap().id;
        let obtained =
            format!("select count(*) from audit_entry where subject = '{job}' and entry like '%{algorithm}%'");
        assert_eq!(world.count(&obtained).await, 1, "{kind}");
    }
    world.finish().await;
}

#[tokio::test]
async fn a_pair_is_generated_when_none_is_named() {
    let mut world = World::with_worker(Tuning::default()).await;
    let kinds = ["RSA_2048", "ECC_NIST_P256", "ECC_NIST_P384", "ECC_NIST_P521", "ECC_SECG_P256K1"];
    let mut held = Vec::new();
    for kind in kinds {
        let arn = world.fake.seed(json!({"spec": kind})).await.remove(0);
        world.publish(request(kind, &arn, json!({}))).await;
        held.push((kind, arn));
    }
    for (kind, arn) in held {
        let result = world.succeeded(kind).await.result.unwrap();
        let public_key = STANDARD.decode(result["public_key"].as_str().unwrap()).unwrap();
        assert!(signs(&world.fake, &arn, kind, &public_key).await, "{kind}");
    }
    world.finish().await;
}

/// What AWS's table allows beside the default, and what it does not.
#[tokio::test]
async fn a_wrap_that_is_asked_for_is_used_or_refused() {
    let mut world = World::with_worker(Tuning::default()).await;
    let cases = [
        ("ECC_NIST_P521", json!({"wrapping_key_spec": "RSA_2048"}), Ok("RSA_AES_KEY_WRAP_SHA_256")),
        ("ECC_NIST_P521", json!({"wrapping_key_spec": "RSA_2048", "wrapping_algorithm": "RSAES_OAEP_SHA_1"}), Err(())),
        ("ECC_NIST_P384", json!({"wrapping_key_spec": "RSA_2048"}), Ok("RSAES_OAEP_SHA_256")),
        ("ECC_SECG_P256K1", json!({"wrapping_algorithm": "RSA_AES_KEY_WRAP_SHA_1"}), Ok("RSA_AES_KEY_WRAP_SHA_1")),
        ("RSA_2048", json!({"wrapping_algorithm": "RSAES_OAEP_SHA_256"}), Err(())),
        ("HMAC_384", json!({"wrapping_algorithm": "RSA_AES_KEY_WRAP_SHA_256"}), Err(())),
    ];
    for (number, (kind, more, _)) in cases.iter().enumerate() {
        let arn = world.fake.seed(json!({"spec": kind})).await.remove(0);
        world.publish(request(&format!("r{number}"), &arn, more.clone())).await;
    }
    for (number, (kind, _, expected)) in cases.iter().enumerate() {
        let id = format!("r{number}");
        let Ok(algorithm) = expected else {
            let job = world.failed(&id, "wrapping_not_allowed").await;
            assert!(sentence(&job).contains("leave wrapping_algorithm"), "{}", sentence(&job));
            continue;
        };
        let job = world.succeeded(&id).await;
        let obtained =
            format!("select count(*) from audit_entry where subject = '{}' and entry like '%{algorithm}%'", job.id);
        assert_eq!(world.count(&obtained).await, 1, "{kind}");
    }
    world.finish().await;
}

#[tokio::test]
async fn a_lost_answer_about_a_pair_is_repaired() {
    let mut case = case("ECC_NIST_P384", Tuning::default()).await;
    case.world.fake.fault("ImportKeyMaterial", &case.arn, Some(1), json!({"kind": "lose_answer"})).await;
    case.ask("r1", json!({})).await;
    // The lost call used up its import token: one attempt finds that out.
    assert!((2..=3).contains(&case.world.succeeded("r1").await.attempts));
    assert_eq!(case.world.fake.journal(&format!("key={}&effect=imported", case.arn)).await.len(), 2);
    case.proves().await;
    case.world.finish().await;
}

#[tokio::test]
async fn a_worker_that_dies_with_a_pair_in_hand_leaves_it_to_another() {
    let mut world = World::new(Tuning::hasty()).await;
    let arn = world.fake.seed(json!({"spec": "ECC_NIST_P256"})).await.remove(0);
    world.publish(request("r1", &arn, json!({}))).await;
    let first = world.start("worker.after_answer=return").await;
    assert!(world.workers[first].aborted().await);
    world.serve().await;
    let result = world.succeeded("r1").await.result.unwrap();
    let public_key = STANDARD.decode(result["public_key"].as_str().unwrap()).unwrap();
    assert!(signs(&world.fake, &arn, "ECC_NIST_P256", &public_key).await);
    assert_eq!(world.count("select count(*) from source_key").await, 1, "one pair was generated");
    world.finish().await;
}

/// Between our look at the key and our import, with the answer lost: what `GetPublicKey` shows is not ours, and since a
/// pair has one material for life, ours cannot have been there.
#[tokio::test]
async fn a_stranger_who_was_faster_with_a_pair_is_told_from_us() {
    let mut case = case("ECC_NIST_P256", Tuning::hasty()).await;
    let theirs = Pair::new("ECC_NIST_P256");
    case.world.fake.fault("GetParametersForImport", &case.arn, Some(1), json!({"kind": "hold"})).await;
    case.ask("r1", json!({})).await;
    case.world.fake.held(1, "GetParametersForImport", &case.arn).await;
    case.world.fake.stranger_imports(&case.arn, &theirs.pkcs8).await;
    case.world.fake.fault("ImportKeyMaterial", &case.arn, Some(1), json!({"kind": "lose_answer"})).await;
    case.world.fake.release(&case.arn).await;
    let job = case.world.failed("r1", "other_material").await;
    assert!(!job.aws_changed() && job.attempts == 2, "{job:?}");
    assert!(signs(&case.world.fake, &case.arn, "ECC_NIST_P256", &theirs.public_key).await, "theirs is left in place");
    case.world.finish().await;
}

#[tokio::test]
async fn a_stranger_who_was_faster_with_a_mac_key_is_told_from_us() {
    let mut world = World::with_worker(Tuning::hasty()).await;
    let theirs = random(32);
    world.import_key("mac", "HMAC_256", &random(32)).await;
    let arn = world.fake.seed(json!({"spec": "HMAC_256"})).await.remove(0);
    world.fake.fault("GetParametersForImport", &arn, Some(1), json!({"kind": "hold"})).await;
    world.publish(request("r1", &arn, json!({"source_key_identifier": "mac"}))).await;
    world.fake.held(1, "GetParametersForImport", &arn).await;
    world.fake.stranger_imports(&arn, &theirs).await;
    world.fake.fault("ImportKeyMaterial", &arn, Some(1), json!({"kind": "lose_answer"})).await;
    world.fake.release(&arn).await;
    let job = world.failed("r1", "other_material").await;
    assert!(!job.aws_changed(), "the identical import was refused, so the first one was too: {job:?}");
    assert!(macs(&world.fake, &arn, "HMAC_256", &theirs).await, "theirs is left in place");
    // Nothing uncertain stays on record, and whoever brings their bytes may go on.
    assert_eq!(world.count("select count(*) from kms_material").await, 0);
    world.import_key("theirs", "HMAC_256", &theirs).await;
    world.publish(request("r2", &arn, json!({"source_key_identifier": "theirs"}))).await;
    world.succeeded("r2").await;
    world.finish().await;
}

#[tokio::test]
async fn a_pair_that_is_not_the_keys_own_costs_no_scarce_call() {
    let mut case = case("RSA_2048", Tuning::default()).await;
    let theirs = Pair::new("RSA_2048");
    case.world.fake.stranger_imports(&case.arn, &theirs.pkcs8).await;
    case.ask("r1", json!({})).await;
    let job = case.world.failed("r1", "other_material").await;
    assert!(!job.aws_changed() && sentence(&job).contains("GetPublicKey"), "{}", sentence(&job));
    case.ask("dry", json!({"dry_run": true})).await;
    case.world.failed("dry", "other_material").await;
    assert_eq!((case.calls("GetParametersForImport").await, case.calls("ImportKeyMaterial").await), (0, 0));
    case.world.import_key("theirs", "RSA_2048", &theirs.pkcs8).await;
    case.ask("dry-theirs", json!({"source_key_identifier": "theirs", "dry_run": true})).await;
    let would = case.world.succeeded("dry-theirs").await.result.unwrap()["would"].clone();
    assert_eq!(would["wrapping_algorithm"], "RSA_AES_KEY_WRAP_SHA_256");
    assert!((1736..=1744).contains(&would["wrapped_bytes"].as_u64().unwrap()), "{would:#}");
    case.ask("r2", json!({"source_key_identifier": "theirs"})).await;
    case.world.succeeded("r2").await;
    case.ask("none", json!({"source_key_identifier": "pair"})).await;
    let job = case.world.failed("none", "other_material").await;
    assert!(sentence(&job).contains("source key theirs"), "{}", sentence(&job));
    case.world.finish().await;
}

#[tokio::test]
async fn a_pair_goes_and_comes_back_with_another_end_of_life() {
    let mut case = case("ECC_NIST_P521", Tuning::default()).await;
    case.ask("r1", json!({})).await;
    case.world.succeeded("r1").await;
    let valid_to = (case.world.now().await + time::Duration::days(9)).format(&Rfc3339).unwrap();
    case.ask("r2", json!({"key_expiration": true, "valid_to": valid_to})).await;
    case.world.succeeded("r2").await;
    case.ask("d", json!({"operation": "delete"})).await;
    let deleted = case.world.succeeded("d").await.result.unwrap();
    assert_eq!(deleted["aws_param"]["KeyState"], "PendingImport");
    case.ask("r3", json!({})).await;
    let result = case.world.succeeded("r3").await.result.unwrap();
    assert_eq!(result["aws_param"]["ExpirationModel"], "KEY_MATERIAL_DOES_NOT_EXPIRE");
    case.proves().await;
    case.world.finish().await;
}

/// The public key is seen some time after the import was answered.
#[tokio::test]
async fn a_public_key_that_is_shown_late_is_waited_for() {
    let mut case = case("ECC_NIST_P256", Tuning::default()).await;
    case.world.fake.options(json!({"change_lag_ms": 20_000})).await;
    case.ask("r1", json!({})).await;
    let waits = "select count(*) from progress where imported and last_error ->> 'class' = 'not_yet_visible'";
    case.world.until("the import is not seen yet", waits, 1).await;
    case.world.fake.advance(20).await;
    case.world.succeeded("r1").await;
    assert_eq!(case.calls("ImportKeyMaterial").await, 1);
    case.world.finish().await;
}

#[tokio::test]
async fn the_china_regions_have_rules_of_their_own() {
    let mut world = World::with_worker(Tuning::default()).await;
    let region = "cn-north-1";
    let bytes = random(16);
    world.import_key("sm4", "SM4", &bytes).await;
    world.symmetric_key("aes").await;
    let seed = async |spec: &str| world.fake.seed(json!({"spec": spec, "region": region})).await.remove(0);
    let (named, made, wrong) =
        (seed("SYMMETRIC_DEFAULT").await, seed("SYMMETRIC_DEFAULT").await, seed("SYMMETRIC_DEFAULT").await);
    let (ecc, rsa) = (seed("ECC_NIST_P384").await, seed("RSA_2048").await);
    assert!(named.starts_with("arn:aws-cn:"));
    for (id, arn, more) in [
        ("named", &named, json!({"source_key_identifier": "sm4"})),
        ("made", &made, json!({})),
        ("wrong", &wrong, json!({"source_key_identifier": "aes"})),
        ("ecc", &ecc, json!({})),
        ("rsa", &rsa, json!({})),
    ] {
        world.publish(request(id, arn, more)).await;
    }
    for id in ["named", "made", "ecc"] {
        world.succeeded(id).await;
    }
    assert_eq!(world.fake.show(&named).await["state"], "Enabled");
    let wrong = world.failed("wrong", "source_key_wrong_kind").await;
    assert!(sentence(&wrong).contains("needs SM4 (16 raw bytes)"), "{}", sentence(&wrong));
    assert!(sentence(&world.failed("rsa", "wrapping_not_allowed").await).contains("SM2PKE"));
    // The same source key goes nowhere else.
    let arn = world.fake.key().await;
    world.publish(request("elsewhere", &arn, json!({"source_key_identifier": "sm4"}))).await;
    world.failed("elsewhere", "source_key_wrong_kind").await;
    let aes = world.fake.key().await;
    world.publish(request("aes", &aes, json!({"source_key_identifier": "aes"}))).await;
    world.succeeded("aes").await;
    assert!(!decrypts(&world.fake, &aes, &random(32)).await);
    world.finish().await;
}
