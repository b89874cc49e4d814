//! Tests of the key state machine; a file of their own because `keys.rs` is long enough.

use zeroize::Zeroizing;

use super::*;
use crate::crypto::{Opened, Unopened};
use crate::imports::{Import, Offered, RepeatedNew};
use crate::kinds::{ImportType, WrappingAlgorithm, WrappingKeySpec};

const ARN: &str = "arn:aws:kms:eu-central-1:111122223333:key/k1";
const FOREVER: Import = Import {
    kind: None,
    material_id: None,
    description: None,
    model: ExpirationModel::DoesNotExpire,
    valid_to: None,
    repeat: RepeatedNew::IncorrectKeyMaterial,
    replica_needs_existing: true,
};
const NEW: Import = Import { kind: Some(ImportType::New), ..FOREVER };
const EXISTING: Import = Import { kind: Some(ImportType::Existing), ..FOREVER };

fn key(spec: KeySpec) -> Key {
    Key {
        arn: ARN.into(),
        account: "111122223333".into(),
        region: "eu-central-1".into(),
        spec,
        usage: *spec.usages().first().unwrap(),
        origin: Origin::External,
        description: String::new(),
        family: Family::Single,
        created_at: 0,
        tags: Vec::new(),
        materials: Vec::new(),
        disabled: false,
        deletion_at: None,
        turning: None,
        before: None,
    }
}

fn opened(fill: u8, length: usize) -> Opened {
    Opened { bytes: Zeroizing::new(vec![fill; length]), pair: None }
}

fn plain(fill: u8, length: usize) -> Offered {
    Offered::Open(opened(fill, length))
}

fn bytes(fill: u8) -> Offered {
    plain(fill, 32)
}

fn until(at: Millis) -> Import {
    Import { model: ExpirationModel::Expires, valid_to: Some(at), ..FOREVER }
}

fn code<T>(result: Result<T, Refusal>) -> String {
    result.map_or_else(|refusal| refusal.code.into_owned(), |_| "ok".to_owned())
}

/// The reference's table of section 4.
#[test]
fn each_state_admits_what_the_table_says() {
    const STATE: &str = "KMSInvalidStateException";
    type Prepare = fn(&mut Key);
    let set_up: [(KeyState, Prepare); 4] = [
        (KeyState::PendingImport, |_| ()),
        (KeyState::Enabled, |key| {
            key.import(0, &FOREVER, bytes(1)).unwrap();
        }),
        (KeyState::Disabled, |key| {
            key.import(0, &FOREVER, bytes(1)).unwrap();
            key.set_disabled(0, true).unwrap();
        }),
        (KeyState::PendingDeletion, |key| {
            key.import(0, &FOREVER, bytes(1)).unwrap();
            key.schedule_deletion(0, 7).unwrap();
        }),
    ];
    let expected = [
        // GetParametersForImport, ImportKeyMaterial, DeleteImportedKeyMaterial, cryptographic operations
        ["ok", "ok", "ok", STATE],
        ["ok", "ok", "ok", "ok"],
        ["ok", "ok", "ok", "DisabledException"],
        [STATE, STATE, "ok", STATE],
    ];
    for ((state, prepare), expected) in set_up.into_iter().zip(expected) {
        let prepared = || {
            let mut key = key(KeySpec::SymmetricDefault);
            prepare(&mut key);
            assert_eq!(key.state(), state);
            key
        };
        let seen = [
            code(prepared().check_import_state()),
            code(prepared().import(1, &FOREVER, bytes(1))),
            code(prepared().delete_material(0, None)),
            code(prepared().check_usable()),
        ];
        assert_eq!(seen, expected, "{state:?}");
    }
}

#[test]
fn a_key_of_kms_itself_takes_no_part() {
    let mut key = Key { origin: Origin::AwsKms, ..key(KeySpec::SymmetricDefault) };
    let refused = key.check_import_state().unwrap_err();
    assert_eq!(refused.code, "UnsupportedOperationException");
    assert_eq!(refused.message, format!("{ARN} origin is AWS_KMS which is not valid for this operation."));
    assert_eq!(key.import(0, &FOREVER, bytes(1)).unwrap_err(), refused);
    assert_eq!(key.delete_material(0, None).unwrap_err(), refused);
}

#[test]
fn a_symmetric_key_knows_its_materials_again() {
    let mut key = key(KeySpec::SymmetricDefault);
    assert_eq!(code(key.import(0, &EXISTING, bytes(1))), "IncorrectKeyMaterialException");
    let first = key.import(0, &Import { description: Some("one".into()), ..FOREVER }, bytes(1)).unwrap();
    assert!(first.first && !first.again);
    assert_eq!(code(key.import(1, &FOREVER, bytes(2))), "IncorrectKeyMaterialException");
    assert_eq!(code(key.import(1, &NEW, bytes(1))), "IncorrectKeyMaterialException");
    let again = key.import(1, &until(500), bytes(1)).unwrap();
    assert!(!again.first && again.again);
    assert_eq!(again.id, first.id);
    assert_eq!(key.view().valid_to, Some(500));
    assert_eq!(key.materials.first().unwrap().description.as_deref(), Some("one"));
    let wrong_id = Import { material_id: Some([0; 32]), ..FOREVER };
    assert_eq!(code(key.import(1, &wrong_id, bytes(1))), "IncorrectKeyMaterialException");
}

#[test]
fn at_most_one_new_material_waits() {
    let mut key = key(KeySpec::SymmetricDefault);
    let first = key.import(0, &NEW, bytes(1)).unwrap();
    let second = key.import(0, &NEW, bytes(2)).unwrap();
    assert!(!second.first);
    assert_eq!(key.current().unwrap().id, first.id);
    let third = key.import(0, &NEW, bytes(3)).unwrap_err();
    assert_eq!(third.code, "KMSInvalidStateException");
    let id = hex::encode(second.id);
    assert!(third.message.ends_with(&format!(
        "cannot be imported into KMS key k1, because another key material (id: {id}) is pending rotation."
    )));
    assert_eq!(code(key.import(0, &NEW, bytes(2))), "IncorrectKeyMaterialException");
    let other = Import { repeat: RepeatedNew::InvalidState, ..NEW };
    assert_eq!(code(key.import(0, &other, bytes(2))), "KMSInvalidStateException");
    assert_eq!(code(key.import(0, &other, bytes(1))), "IncorrectKeyMaterialException");
    assert!(key.import(0, &EXISTING, bytes(2)).unwrap().again);
    // A deleted pending material leaves the key usable and makes room.
    key.delete_material(0, Some(&second.id)).unwrap().unwrap();
    assert_eq!(key.state(), KeyState::Enabled);
    key.import(0, &NEW, bytes(3)).unwrap();
    assert_eq!(key.materials.len(), 2);
}

#[test]
fn an_hmac_key_has_one_material_for_life() {
    for (spec, length) in
        [(KeySpec::Hmac224, 28), (KeySpec::Hmac256, 32), (KeySpec::Hmac384, 48), (KeySpec::Hmac512, 64)]
    {
        let mut key = key(spec);
        assert_eq!(code(key.import(0, &FOREVER, plain(1, length + 1))), "IncorrectKeyMaterialException");
        assert_eq!(code(key.import(0, &NEW, plain(1, length))), "UnsupportedOperationException");
        key.import(0, &FOREVER, plain(1, length)).unwrap();
        assert_eq!(key.view().current, None);
        key.import(0, &FOREVER, plain(1, length)).unwrap();
        key.delete_material(0, None).unwrap().unwrap();
        assert_eq!(code(key.import(0, &FOREVER, plain(2, length))), "IncorrectKeyMaterialException");
        key.import(0, &FOREVER, plain(1, length)).unwrap();
        assert_eq!(key.state(), KeyState::Enabled);
    }
}

#[test]
fn a_deletion_removes_the_bytes_and_remembers_the_material() {
    let mut key = key(KeySpec::SymmetricDefault);
    assert_eq!(key.delete_material(0, None).unwrap(), None);
    let first = key.import(0, &FOREVER, bytes(1)).unwrap();
    assert_eq!(key.delete_material(1, None).unwrap(), Some(Deleted { id: first.id, digests: first.digests }));
    let view = key.view();
    assert_eq!((view.state, view.current, view.model), (KeyState::PendingImport, Some(first.id), None));
    assert!(key.current().unwrap().bytes().is_none());
    assert_eq!(key.before.as_ref().unwrap().shown.view.state, KeyState::Enabled);
    assert_eq!(code(key.delete_material(0, Some(&[0; 32]))), "NotFoundException");
    assert_eq!(code(key.import(0, &FOREVER, bytes(2))), "IncorrectKeyMaterialException");
    assert_eq!(key.import(0, &FOREVER, bytes(1)).unwrap().id, first.id);
}

#[test]
fn material_expires_on_the_instant() {
    let mut key = key(KeySpec::SymmetricDefault);
    assert_eq!(code(key.import(500, &until(500), bytes(1))), "IncorrectKeyMaterialException");
    let first = key.import(0, &until(500), bytes(1)).unwrap();
    key.import(0, &Import { kind: Some(ImportType::New), ..until(300) }, bytes(2)).unwrap();
    // The pending material's expiry is not the key's.
    assert_eq!(key.view().valid_to, Some(500));
    assert_eq!(key.settle(299), []);
    assert_eq!(key.settle(300).len(), 1);
    assert_eq!(key.state(), KeyState::Enabled);
    assert_eq!(key.settle(500), [Passed::Expired(Deleted { id: first.id, digests: first.digests })]);
    assert_eq!(key.settle(500), []);
    assert_eq!(key.state(), KeyState::PendingImport);
}

#[test]
fn a_cancelled_deletion_leaves_the_key_disabled() {
    let mut key = key(KeySpec::SymmetricDefault);
    assert_eq!(code(key.cancel_deletion(0)), "KMSInvalidStateException");
    key.import(0, &FOREVER, bytes(1)).unwrap();
    assert_eq!(key.schedule_deletion(0, 7).unwrap(), 7 * DAY);
    assert!(!key.is_gone(7 * DAY - 1) && key.is_gone(7 * DAY));
    assert_eq!(code(key.set_disabled(0, false)), "KMSInvalidStateException");
    key.cancel_deletion(0).unwrap();
    assert_eq!(key.state(), KeyState::Disabled);
    key.set_disabled(0, false).unwrap();
    assert_eq!(key.state(), KeyState::Enabled);
}

#[test]
fn sealed_material_is_opened_later() {
    let sealed = |blob: u8| {
        Arc::new(Sealed {
            algorithm: WrappingAlgorithm::OaepSha256,
            spec: WrappingKeySpec::Rsa2048,
            index: 0,
            blob: vec![blob; 256],
        })
    };
    let mut key = key(KeySpec::SymmetricDefault);
    let first = sealed(1);
    let imported = key.import(0, &FOREVER, Offered::Sealed(Arc::clone(&first))).unwrap();
    assert_eq!((imported.digests, key.state()), (None, KeyState::Enabled));
    key.open(&sealed(1), Err(Unopened));
    assert_eq!(key.sealed().count(), 1);
    key.open(&first, Ok(opened(1, 32)));
    assert_eq!(key.sealed().count(), 0);
    assert_eq!(key.import(0, &FOREVER, bytes(1)).unwrap().id, imported.id);
}
