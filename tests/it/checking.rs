//! The checker can fail: a sound snapshot passes, and every way of spoiling it is found.

use crate::support::broker::{Message, Received};
use crate::support::checker::violations;
use crate::support::fake::WORKER;
use crate::support::snapshot::{Entry, Fold, Job, Line, Material, Refusal, Secret, Snapshot, SourceKey};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use time::OffsetDateTime;
use uuid::Uuid;

const ARN: &str = "arn:aws:kms:eu-central-1:111122223333:key/031c5703-aaf7-425e-a141-7e0c6f5886ab";
const JOB: Uuid = Uuid::from_u128(1);
const REFUSAL: Uuid = Uuid::from_u128(2);
const SOURCE: Uuid = Uuid::from_u128(3);

fn event(id: Uuid, outcome: &str, operation: &str, request_id: &str) -> Received {
    let body = json!({
        "id": id, "type": format!("io.keyferry.job.{outcome}"),
        "data": {"job": {"state": outcome, "request_id": request_id}},
    });
    Received {
        routing_key: format!("job.{outcome}.{operation}.111122223333.eu-central-1"),
        body: body.to_string().into_bytes(),
        message_id: Some(id.to_string()),
        content_type: Some("application/cloudevents+json".into()),
        delivery_mode: Some(2),
        headers: BTreeMap::new(),
        redelivered: false,
        group: None,
    }
}

fn entry(subject: Uuid, n: i32, kind: &str, details: Value) -> Entry {
    let mut entry = json!({"v": 1, "subject": subject, "n": n, "at": "2026-01-01T00:00:00Z", "kind": kind});
    entry["details"] = details;
    Entry { subject, n, text: entry.to_string() }
}

/// One job that succeeded, one refusal.
fn sound() -> Snapshot {
    let message = |body: &str| Message { body: body.into(), ..Message::default() };
    let source = SourceKey {
        id: SOURCE,
        name: "s".into(),
        kind: "SYMMETRIC_DEFAULT".into(),
        origin: "imported".into(),
        material: (1..=32).collect(),
    };
    let material =
        json!({"material_sha256": source.sha256(), "key_material_id": "m", "imported": true, "valid_to": null});
    let call = |operation: &str, effect: Value| {
        json!({"key_arn": ARN, "access_key": WORKER, "operation": operation, "outcome": "ok", "late": false,
               "fault": null, "effect": effect})
    };
    Snapshot {
        published: vec![message("one"), message("two"), message("one")],
        jobs: vec![Job {
            id: JOB,
            principal: "p".into(),
            identity: Some("rabbitmq:p".into()),
            retry_of: None,
            request_id: "r1".into(),
            arn: ARN.into(),
            line_id: 1,
            seq: Some(1),
            operation: "import".into(),
            dry_run: false,
            urgent: false,
            state: "succeeded".into(),
            finished_at: Some(OffsetDateTime::UNIX_EPOCH),
            attempts: 1,
            source_key_id: Some(SOURCE),
            valid_to: None,
            result: Some(json!({})),
            error: None,
        }],
        refusals: vec![Refusal {
            id: REFUSAL,
            principal: "unidentified".into(),
            identity: None,
            identity_verified: false,
            request_id: Some("r2".into()),
            code: "invalid_arn".into(),
            field: None,
            message: "m".into(),
            fold: None,
        }],
        audit: vec![
            entry(JOB, 1, "accepted", json!({"principal": "p", "identity": "rabbitmq:p", "policy": "allow-all"})),
            entry(JOB, 2, "material_chosen", json!({})),
            entry(JOB, 3, "parameters_obtained", json!({})),
            entry(JOB, 4, "succeeded", json!({})),
            entry(
                REFUSAL,
                1,
                "refused",
                json!({"code": "invalid_arn", "principal": "unidentified", "identity": null,
                       "identity_verified": false, "policy": "allow-all"}),
            ),
            entry(SOURCE, 1, "source_key_imported", json!({})),
        ],
        source_keys: vec![source],
        materials: vec![Material {
            arn: ARN.into(),
            key_material_id: Some("m".into()),
            is_certain: true,
            is_removed: false,
        }],
        lines: vec![Line { id: 1, head: 2, tail: 1, is_due: false, is_leased: false }],
        left: [("outbox".to_owned(), 0)].into(),
        events: vec![event(JOB, "succeeded", "import", "r1"), event(REFUSAL, "rejected", "unknown", "r2")],
        dead: vec![b"two".to_vec()],
        journal: vec![call("DescribeKey", Value::Null), call("ImportKeyMaterial", json!({"imported": material}))],
        kms_keys: vec![json!({"arn": ARN, "origin": "EXTERNAL", "materials": [material]})],
        secrets: vec![Secret { name: "hidden".into(), bytes: b"do not show".to_vec() }],
        texts: vec![("job.request".into(), b"{}".to_vec())],
        ..Snapshot::default()
    }
}

#[test]
fn a_sound_snapshot_passes() {
    assert_eq!(violations(&sound()), [""; 0]);
}

/// Spoils a snapshot and expects the invariant, and no other, to be named.
#[track_caller]
fn spoilt(invariant: &str, spoil: impl FnOnce(&mut Snapshot)) {
    let mut snapshot = sound();
    spoil(&mut snapshot);
    let found = violations(&snapshot);
    assert!(found.iter().any(|one| one.starts_with(invariant)), "{invariant} is not found in {found:?}");
}

#[test]
fn who_asked_must_be_on_record() {
    spoilt("I4", |s| s.jobs[0].identity = Some("rabbitmq:other".into()));
    spoilt("I4", |s| s.jobs[0].principal = "other".into());
    spoilt("I4", |s| s.refusals[0].identity = Some("rabbitmq:other".into()));
    spoilt("I4", |s| s.refusals[0].identity_verified = true);
}

#[test]
fn lost_doubled_and_invented_messages_are_found() {
    spoilt("I1", |s| s.published.push(Message { body: "three".into(), ..Message::default() }));
    spoilt("I1", |s| s.jobs.push(s.jobs[0].clone()));
    spoilt("I1", |s| s.jobs[0].state = "waiting".into());
    spoilt("I1", |s| s.jobs[0].result = None);
    spoilt("I1", |s| s.dead.push(b"four".to_vec()));
    spoilt("I1", |s| s.dead.clear());
    spoilt("I1", |s| s.dead.push(b"one".to_vec()));
}

/// The refusal of [`sound`], one that is folded, and one of which nothing but the count is left.
fn folded() -> Snapshot {
    const FOLD: Uuid = Uuid::from_u128(7);
    let mut snapshot = sound();
    for body in ["three", "four"] {
        snapshot.published.push(Message { body: body.into(), ..Message::default() });
        snapshot.dead.push(body.into());
    }
    let mut refusal = snapshot.refusals[0].clone();
    (refusal.id, refusal.fold, refusal.request_id) = (Uuid::from_u128(8), Some(FOLD), Some("r8".into()));
    snapshot.refusals.push(refusal);
    snapshot.folds.push(Fold {
        id: FOLD,
        principal: "unidentified".into(),
        identity: None,
        code: "invalid_arn".into(),
        count: 2,
        forgotten: 1,
    });
    let folded = json!({"count": 2, "code": "invalid_arn"});
    let details = json!({"principal": "unidentified", "identity": null, "policy": "allow-all", "folded": folded});
    snapshot.audit.push(entry(FOLD, 1, "refused", details));
    let mut event = event(FOLD, "rejected", "unknown", "");
    let mut body = event.json();
    (body["data"]["job"]["request_id"], body["data"]["folded"]) = (Value::Null, folded);
    event.body = body.to_string().into_bytes();
    snapshot.events.push(event);
    snapshot
}

#[test]
fn folds_that_are_miscounted_or_not_told_of_are_found() {
    assert_eq!(violations(&folded()), [""; 0]);
    let spoilt = |invariant: &str, spoil: fn(&mut Snapshot)| {
        let mut snapshot = folded();
        spoil(&mut snapshot);
        let found = violations(&snapshot);
        assert!(found.iter().any(|one| one.starts_with(invariant)), "{invariant} is not found in {found:?}");
    };
    spoilt("I1", |s| s.folds[0].forgotten = 0);
    spoilt("I1", |s| s.folds[0].count = 3);
    spoilt("I1", |s| drop(s.refusals.pop()));
    spoilt("I3", |s| drop(s.events.pop()));
    spoilt("I3", |s| s.refusals[1].fold = None);
    spoilt("I3", |s| (s.folds[0].count, s.folds[0].forgotten) = (3, 2));
    spoilt("I4", |s| drop(s.audit.pop()));
    spoilt("I4", |s| s.folds[0].principal = "other".into());
}

#[test]
fn a_trail_that_denies_a_change_is_found() {
    spoilt("I4", |s| {
        let more = [
            entry(JOB, 4, "material_imported", json!({})),
            entry(JOB, 5, "attempt_failed", json!({"aws_changed": false})),
            entry(JOB, 6, "succeeded", json!({})),
        ];
        s.audit.splice(3..4, more);
    });
}

#[test]
fn wrong_material_is_found() {
    spoilt("I2", |s| s.journal[1]["effect"]["imported"]["material_sha256"] = "other".into());
    spoilt("I2", |s| s.journal[1]["effect"] = Value::Null);
    spoilt("I2", |s| s.journal[1]["effect"]["imported"]["valid_to"] = "2027-01-01T00:00:00Z".into());
    spoilt("I2", |s| s.kms_keys[0]["materials"][0]["material_sha256"] = "other".into());
    // An effect of an earlier job after that of a later one.
    spoilt("I2", |s| {
        let mut later = s.jobs[0].clone();
        (later.id, later.seq, later.valid_to) = (Uuid::from_u128(9), Some(2), Some(0));
        s.jobs.push(later);
        let mut late = s.journal[1].clone();
        late["effect"]["imported"]["valid_to"] = "1970-01-01T00:00:00Z".into();
        s.journal.insert(1, late);
    });
}

/// The import of [`sound`], then a delete of what it brought.
fn deleted() -> Snapshot {
    const DELETE: Uuid = Uuid::from_u128(9);
    let mut snapshot = sound();
    let mut delete = snapshot.jobs[0].clone();
    (delete.id, delete.seq, delete.request_id) = (DELETE, Some(2), "r9".into());
    (delete.operation, delete.source_key_id) = ("delete".into(), None);
    snapshot.jobs.push(delete);
    snapshot.published.push(Message { body: "nine".into(), ..Message::default() });
    snapshot.audit.extend([
        entry(DELETE, 1, "accepted", json!({"principal": "p", "identity": "rabbitmq:p", "policy": "allow-all"})),
        entry(DELETE, 2, "deletion_intended", json!({"key_material_ids": ["m"]})),
        entry(DELETE, 3, "material_deleted", json!({"key_material_id": "m"})),
        entry(DELETE, 4, "succeeded", json!({})),
    ]);
    (snapshot.lines[0].head, snapshot.lines[0].tail) = (3, 2);
    snapshot.events.push(event(DELETE, "succeeded", "delete", "r9"));
    snapshot.journal.push(json!({
        "key_arn": ARN, "access_key": WORKER, "operation": "DeleteImportedKeyMaterial", "outcome": "ok", "late": false,
        "fault": null, "effect": {"deleted": {"key_material_id": "m"}},
    }));
    snapshot.materials[0].is_removed = true;
    snapshot.kms_keys[0]["materials"][0]["imported"] = false.into();
    snapshot
}

#[test]
fn a_delete_that_is_not_as_its_job_says_is_found() {
    assert_eq!(violations(&deleted()), [""; 0]);
    let spoilt = |invariant: &str, spoil: &dyn Fn(&mut Snapshot)| {
        let mut snapshot = deleted();
        spoil(&mut snapshot);
        let found = violations(&snapshot);
        assert!(found.iter().any(|one| one.starts_with(invariant)), "{invariant} is not found in {found:?}");
    };
    // It is still there, another one went, it went before it came.
    spoilt("I2", &|s| s.kms_keys[0]["materials"][0]["imported"] = true.into());
    spoilt("I2", &|s| s.journal[2]["effect"]["deleted"]["key_material_id"] = "other".into());
    spoilt("I2", &|s| s.journal.swap(1, 2));
    // The record denies it; the trail does not tell of it; nothing was called.
    spoilt("I2", &|s| s.materials[0].is_removed = false);
    spoilt("I2", &|s| s.audit.retain(|entry| !entry.text.contains("material_deleted")));
    spoilt("I2", &|s| s.journal.truncate(2));
    // Nothing said before that it would be sent, or it was sent once more.
    spoilt("I4", &|s| s.audit.retain(|entry| !entry.text.contains("deletion_intended")));
    spoilt("I4", &|s| s.journal.push(s.journal[2].clone()));
    // The job says that nothing was changed.
    spoilt("I4", &|s| {
        s.jobs[1].state = "failed".into();
        let failed = json!({"aws_changed": false});
        let at = s.audit.len() - 1;
        s.audit[at] = entry(s.jobs[1].id, 4, "failed", failed);
    });
}

/// The job of [`sound`] as a rotate.
fn rotated() -> Snapshot {
    let mut snapshot = sound();
    snapshot.jobs[0].operation = "rotate".into();
    snapshot.events[0] = event(JOB, "succeeded", "rotate", "r1");
    let intended = json!({"key_material_id": "m"});
    snapshot.audit[3] = entry(JOB, 4, "rotation_intended", intended.clone());
    snapshot.audit.extend([entry(JOB, 5, "key_rotated", intended), entry(JOB, 6, "succeeded", json!({}))]);
    let imported = &mut snapshot.journal[1]["effect"]["imported"];
    (imported["first"], imported["again"]) = (false.into(), false.into());
    let effect = json!({"rotated": {"key_material_id": "m", "material_sha256": imported["material_sha256"]}});
    snapshot.journal.push(json!({
        "key_arn": ARN, "access_key": WORKER, "operation": "RotateKeyOnDemand", "outcome": "ok", "late": false,
        "fault": null, "effect": effect,
    }));
    snapshot
}

#[test]
fn a_rotate_that_is_not_as_its_job_says_is_found() {
    assert_eq!(violations(&rotated()), [""; 0]);
    let spoilt = |invariant: &str, spoil: &dyn Fn(&mut Snapshot)| {
        let mut snapshot = rotated();
        spoil(&mut snapshot);
        let found = violations(&snapshot);
        assert!(found.iter().any(|one| one.starts_with(invariant)), "{invariant} is not found in {found:?}");
    };
    // Twice, never, to a stranger's material, and by a job that asked for something else.
    spoilt("I8", &|s| s.journal.push(s.journal[2].clone()));
    spoilt("I8", &|s| s.journal.truncate(2));
    spoilt("I8", &|s| s.journal[2]["effect"]["rotated"]["material_sha256"] = "other".into());
    spoilt("I8", &|s| s.jobs[0].operation = "import".into());
    // The trail tells of more than was meant; nothing said before that it would be sent.
    spoilt("I8", &|s| s.audit.push(entry(JOB, 7, "key_rotated", json!({}))));
    spoilt("I4", &|s| s.audit.retain(|entry| !entry.text.contains("rotation_intended")));
}

#[test]
fn a_dry_run_that_does_something_is_found() {
    // The only job of the key says that it was one.
    spoilt("I2", |s| s.jobs[0].dry_run = true);
    spoilt("I4", |s| s.jobs[0].dry_run = true);
    spoilt("I2", |s| s.materials[0].is_removed = true);
    spoilt("I7", |s| s.jobs[0].dry_run = true);
}

#[test]
fn a_private_number_of_a_pair_is_found() {
    let pkcs8 = include_bytes!("../fake_kms/fixtures/ec_p384_without_point.der");
    let mut snapshot = sound();
    snapshot.source_keys[0].kind = "ECC_NIST_P384".into();
    snapshot.source_keys[0].material = pkcs8.to_vec();
    let scalar = snapshot.source_keys[0].secret_parts().remove(0);
    assert_eq!(scalar.len(), 48);
    snapshot.texts.push(("a log".into(), hex::encode(&scalar).into_bytes()));
    let found = violations(&snapshot);
    assert!(found.iter().any(|one| one.starts_with("I5")), "{found:?}");
}

#[test]
fn missing_and_contradicting_events_are_found() {
    spoilt("I3", |s| {
        s.events.remove(0);
    });
    spoilt("I3", |s| s.events[0] = event(JOB, "failed", "import", "r1"));
    spoilt("I3", |s| s.events[0].message_id = None);
    spoilt("I3", |s| s.events.push(event(JOB, "succeeded", "import", "r9")));
    spoilt("I3", |s| s.events.push(event(Uuid::from_u128(8), "succeeded", "import", "r1")));
    let mut copy = sound();
    copy.events.push(copy.events[0].clone());
    assert_eq!(violations(&copy), [""; 0]);
}

#[test]
fn a_damaged_trail_is_found() {
    for at in 0..sound().audit.len() {
        spoilt("I4", |s| {
            s.audit.remove(at);
        });
    }
    spoilt("I4", |s| s.audit[0].text = s.audit[0].text.replace("\"v\":1", "\"v\": 1"));
    spoilt("I4", |s| s.audit[1].text = s.audit[1].text.replace("\"n\":2", "\"n\":3"));
    spoilt("I4", |s| s.audit.push(entry(Uuid::from_u128(7), 1, "accepted", json!({}))));
    spoilt("I4", |s| s.journal.push(s.journal[1].clone()));
}

#[test]
fn a_secret_is_found_in_any_spelling() {
    let bytes: Vec<u8> = (1..=32).collect();
    for spelling in [
        bytes.clone(),
        hex::encode(&bytes).into_bytes(),
        hex::encode_upper(&bytes).into_bytes(),
        "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=".into(),
        format!("KeyMaterial({bytes:?})").into_bytes(),
        b"so do not show it".to_vec(),
    ] {
        spoilt("I5", |s| s.texts.push(("a log".into(), [b"x".as_slice(), &spelling, b"y"].concat())));
        spoilt("I5", |s| s.events[0].body.extend(&spelling));
    }
}

#[test]
fn a_refused_body_is_found() {
    let body = "a body that nobody should have sent";
    spoilt("I5", |s| {
        s.dead.push(body.into());
        s.texts.push(("a log".into(), format!("refused: {body}").into_bytes()));
    });
}

#[test]
fn a_job_that_ended_out_of_turn_is_found() {
    let out_of_turn = |s: &mut Snapshot, urgent: bool, code: &str| {
        let mut later = s.jobs[0].clone();
        (later.id, later.seq, later.request_id) = (Uuid::from_u128(9), Some(2), "r9".into());
        (later.urgent, later.state, later.result) = (urgent, "failed".into(), None);
        later.error = Some(json!({"code": code, "aws_changed": false}));
        later.finished_at = Some(OffsetDateTime::UNIX_EPOCH - time::Duration::seconds(1));
        s.jobs.push(later);
    };
    spoilt("I1: request r9 ended before", |s| out_of_turn(s, false, "key_disabled"));
    for (urgent, code) in [(true, "key_disabled"), (false, "cancelled")] {
        let mut snapshot = sound();
        out_of_turn(&mut snapshot, urgent, code);
        let found = violations(&snapshot);
        assert!(!found.iter().any(|one| one.contains("ended before")), "{found:?}");
    }
}

#[test]
fn what_still_waits_is_found() {
    spoilt("I6", |s| s.left.values_mut().for_each(|count| *count = 1));
    spoilt("I6", |s| s.lines[0].is_due = true);
    spoilt("I6", |s| s.lines[0].is_leased = true);
    spoilt("I6", |s| s.lines[0].head = 1);
    spoilt("I6", |s| s.jobs[0].seq = None);
}

#[test]
fn calls_without_a_job_are_found() {
    spoilt("I7", |s| {
        let other = format!("{ARN}x");
        s.kms_keys.push(json!({"arn": other, "materials": []}));
        s.journal.push(json!({"key_arn": other, "access_key": WORKER, "operation": "DescribeKey", "effect": null}));
    });
    spoilt("I7", |s| s.jobs[0].attempts = 0);
    spoilt("I7", |s| {
        s.jobs[0].state = "failed".into();
        s.jobs[0].error = Some(json!({"code": "key_disabled", "aws_changed": false}));
    });
}
