//! Which source key an import takes, and as what AWS is to take it. Pure: it judges by the request, by our record of the
//! key's materials and by what `DescribeKey` shows.

use super::source_key::SourceKey;
use crate::job::{FailureCode, Import, KeyKind, SourceKeyRef, SourceMaterial};
use crate::kms::{KeyDescription, MaterialRole, RegionRole};
use crate::source::Fingerprint;
use crate::store::{ClaimedJob, KnownMaterial};

/// Why there is no choice. Nothing was changed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NoChoice {
    pub(super) code: FailureCode,
    pub(super) message: String,
}

/// As what AWS is to take the source key, or, without one, a key that is generated.
pub(super) fn choose(
    job: &ClaimedJob,
    asked: &Import,
    kind: KeyKind,
    shown: &KeyDescription,
    source: Option<&SourceKey>,
) -> Result<MaterialRole, NoChoice> {
    if asked.key_material_id.is_some() && !kind.has_material_ids() {
        let message =
            format!("AWS gives ids to materials of symmetric keys only; leave key_material_id out for {kind}");
        return no(FailureCode::MaterialIdNotAllowed, message);
    }
    exists(&asked.material, source)?;
    let Some(key) = source else { return generated(asked, &job.materials, shown) };
    fits(key, kind)?;
    if kind.has_material_ids() {
        role_of_one_among_many(key, asked, &job.materials, shown, job.progress.in_doubt)
    } else {
        only_the_same_again(key, &job.materials)?;
        Ok(MaterialRole::First)
    }
}

/// Whether the local key that is named is there.
pub(super) fn exists(asked: &SourceMaterial, source: Option<&SourceKey>) -> Result<(), NoChoice> {
    if source.is_none() && matches!(asked.source_key, SourceKeyRef::Local(Some(_))) {
        let message = "there is no local key with this source_key_identifier; see keyferry keys list";
        return no(FailureCode::SourceKeyUnknown, message.into());
    }
    Ok(())
}

/// Whether a KMS key of this kind could hold it.
pub(super) fn fits(key: &SourceKey, kind: KeyKind) -> Result<(), NoChoice> {
    let SourceKey::Local(key) = key else { return Ok(()) };
    if key.sealed_material.is_none() {
        return no(FailureCode::SourceKeyDeleted, format!("the source key {} was deleted", key.name));
    }
    if key.kind != kind {
        let message = format!(
            "the source key {} is of kind {} ({}), the KMS key needs {kind} ({})",
            key.name,
            key.kind,
            key.kind.shape(),
            kind.shape()
        );
        return no(FailureCode::SourceKeyWrongKind, message);
    }
    Ok(())
}

fn no<T>(code: FailureCode, message: String) -> Result<T, NoChoice> {
    Err(NoChoice { code, message })
}

/// A key is generated only where there has never been one.
fn generated(asked: &Import, known: &[KnownMaterial], shown: &KeyDescription) -> Result<MaterialRole, NoChoice> {
    let meant = known.iter().find(|held| held.key_material_id == asked.key_material_id);
    if let (Some(_), Some(held)) = (&asked.key_material_id, meant) {
        let message = format!("the material came from {}: name that", held.source());
        return no(FailureCode::SourceKeyRequired, message);
    }
    if asked.key_material_id.is_some() {
        let message = "Keyferry did not import the material that key_material_id names: \
                       name its source key in source_key_identifier";
        return no(FailureCode::SourceKeyRequired, message.into());
    }
    if let Some(last) = known.last() {
        let message = format!(
            "the key holds material already and takes only the same again: name its source key, {}",
            last.as_fields()
        );
        return no(FailureCode::SourceKeyRequired, message);
    }
    if shown.has_had_material() {
        let message = "the key holds material that was not imported by Keyferry and takes only the same again: \
                       import that as a source key and name it in source_key_identifier";
        return no(FailureCode::SourceKeyRequired, message.into());
    }
    if shown.role == RegionRole::Replica {
        let message = "a replica takes only what its primary was given: import into the primary first, \
                       then name the same source key in source_key_identifier";
        return no(FailureCode::SourceKeyRequired, message.into());
    }
    Ok(MaterialRole::First)
}

/// HMAC keys and pairs have one material for life.
fn only_the_same_again(key: &SourceKey, known: &[KnownMaterial]) -> Result<(), NoChoice> {
    match comparable(known, key.fingerprint()).last() {
        Some(last) if !known.iter().any(|held| held.fingerprint == *key.fingerprint()) => {
            no(FailureCode::OtherMaterial, other_material(last))
        }
        _ => Ok(()),
    }
}

/// Which of a symmetric key's materials the source key is.
fn role_of_one_among_many(
    key: &SourceKey,
    asked: &Import,
    known: &[KnownMaterial],
    shown: &KeyDescription,
    in_doubt: bool,
) -> Result<MaterialRole, NoChoice> {
    let own_id = known
        .iter()
        .filter(|held| held.fingerprint == *key.fingerprint())
        .find_map(|held| held.key_material_id.as_ref());
    let other_with = |id: &str| {
        comparable(known, key.fingerprint())
            .find(|held| held.key_material_id.as_deref() == Some(id) && held.fingerprint != *key.fingerprint())
    };
    if let Some(id) = &asked.key_material_id {
        return match (own_id, other_with(id)) {
            (_, Some(other)) => {
                let message = format!(
                    "the material {id} came from {}; name that one, or leave source_key_identifier out",
                    other.source()
                );
                no(FailureCode::OtherMaterial, message)
            }
            (Some(own), None) if own != id => {
                let message = format!("{} key {} is the material {own} of this key, not {id}", key.tier(), key.name());
                no(FailureCode::OtherMaterial, message)
            }
            // Where there is no record, AWS compares.
            _ => Ok(MaterialRole::Existing(Some(id.clone()))),
        };
    }
    match (own_id, &shown.current_material) {
        // An import that may have taken effect is settled by the same again, whatever is in force by now.
        (Some(own), Some(current)) if own != current && !in_doubt => {
            let holder = match other_with(current) {
                Some(other) => format!("that of {}", other.source()),
                None => "one that Keyferry did not import".to_owned(),
            };
            let message = format!(
                "the key's current material is {holder}; {} key {} is an older one: to import that again, \
                 give key_material_id = {own}",
                key.tier(),
                key.name()
            );
            no(FailureCode::OtherMaterial, message)
        }
        (Some(own), _) => Ok(MaterialRole::Existing(Some(own.clone()))),
        (None, Some(current)) => match other_with(current) {
            Some(other) => no(FailureCode::OtherMaterial, other_material(other)),
            // Not on record: AWS compares. NEW is never sent, so it cannot become a pending rotation by surprise.
            None => Ok(MaterialRole::Existing(Some(current.clone()))),
        },
        (None, None) => match comparable(known, key.fingerprint()).last() {
            Some(last) => no(FailureCode::OtherMaterial, other_material(last)),
            // A replica never takes NEW; whether it may be left out there is UNVERIFIED.
            None if shown.role == RegionRole::Replica => Ok(MaterialRole::Existing(None)),
            None => Ok(MaterialRole::First),
        },
    }
}

/// Hashes under different fingerprint keys say nothing of each other.
fn comparable<'a>(
    known: &'a [KnownMaterial],
    with: &'a Fingerprint,
) -> impl DoubleEndedIterator<Item = &'a KnownMaterial> {
    known.iter().filter(|held| held.fingerprint.version == with.version)
}

fn other_material(held: &KnownMaterial) -> String {
    format!("the KMS key holds the material of {}; it takes only that one again", held.source())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Expiry;
    use crate::source::SealedKey;
    use serde_json::Value;
    use uuid::Uuid;

    const OURS: u8 = 1;
    const OTHER: u8 = 2;

    fn fingerprint(of: u8) -> Fingerprint {
        Fingerprint { version: 1, hash: vec![of] }
    }

    fn stored(kind: KeyKind) -> SourceKey {
        SourceKey::Local(SealedKey {
            id: Uuid::nil(),
            name: "ours".into(),
            kind,
            fingerprint: fingerprint(OURS),
            kek_id: String::new(),
            sealed_material: Some(Vec::new()),
            sealed_data_key: Some(Vec::new()),
        })
    }

    fn held(of: u8, id: Option<&str>) -> KnownMaterial {
        KnownMaterial {
            is_own: true,
            fingerprint: fingerprint(of),
            source_tier: "local".into(),
            source_key_name: if of == OURS { "ours".into() } else { "theirs".into() },
            key_material_id: id.map(str::to_owned),
        }
    }

    fn shown(current: Option<&str>, role: RegionRole) -> KeyDescription {
        KeyDescription {
            origin: "EXTERNAL".into(),
            is_external: true,
            is_customer_managed: true,
            key_spec: String::new(),
            state: "Enabled".into(),
            role,
            regions: None,
            current_material: current.map(str::to_owned),
            expiry: None,
            aws_param: Value::Null,
        }
    }

    fn asked(key_material_id: Option<&str>) -> Import {
        Import {
            material: SourceMaterial {
                source_key: SourceKeyRef::Local(None),
                expiry: Expiry::Never,
                wrapping_algorithm: None,
                wrapping_key_spec: None,
                description: None,
            },
            key_material_id: key_material_id.map(str::to_owned),
        }
    }

    fn existing(id: &str) -> MaterialRole {
        MaterialRole::Existing(Some(id.to_owned()))
    }

    /// Known materials, AWS's current one, the id that was asked for; and what follows.
    #[test]
    fn a_symmetric_key_takes_one_of_its_materials_and_the_request_says_which() {
        use FailureCode::OtherMaterial;
        let (a, b) = (held(OURS, Some("a")), held(OTHER, Some("b")));
        let other_version =
            KnownMaterial { fingerprint: Fingerprint { version: 2, hash: vec![OTHER] }, ..held(OTHER, Some("b")) };
        for (known, current, asked_id, expected) in [
            (vec![], None, None, Ok(MaterialRole::First)),
            (vec![], Some("x"), None, Ok(existing("x"))),
            (vec![], Some("x"), Some("y"), Ok(existing("y"))),
            (vec![a.clone()], Some("a"), None, Ok(existing("a"))),
            (vec![a.clone()], None, None, Ok(existing("a"))),
            (vec![a.clone()], Some("x"), None, Err(OtherMaterial)),
            (vec![a.clone()], Some("x"), Some("a"), Ok(existing("a"))),
            (vec![a.clone()], Some("a"), Some("x"), Err(OtherMaterial)),
            (vec![b.clone()], Some("b"), None, Err(OtherMaterial)),
            (vec![b.clone()], None, None, Err(OtherMaterial)),
            (vec![b.clone()], Some("x"), None, Ok(existing("x"))),
            (vec![b.clone()], Some("b"), Some("b"), Err(OtherMaterial)),
            (vec![a.clone(), b.clone()], Some("b"), None, Err(OtherMaterial)),
            (vec![a.clone(), b.clone()], Some("b"), Some("a"), Ok(existing("a"))),
            (vec![a, b], Some("b"), Some("b"), Err(OtherMaterial)),
            // Nothing can be told: AWS compares.
            (vec![other_version], Some("b"), None, Ok(existing("b"))),
        ] {
            let shown = shown(current, RegionRole::Single);
            let key = stored(KeyKind::SymmetricDefault);
            let role = role_of_one_among_many(&key, &asked(asked_id), &known, &shown, false).map_err(|no| no.code);
            assert_eq!(role, expected, "{known:?} {current:?} {asked_id:?}");
        }
    }

    #[test]
    fn what_is_in_doubt_is_settled_by_the_same_again() {
        let (known, shown) = ([held(OURS, Some("a"))], shown(Some("x"), RegionRole::Single));
        let role = role_of_one_among_many(&stored(KeyKind::SymmetricDefault), &asked(None), &known, &shown, true);
        assert_eq!(role, Ok(existing("a")));
    }

    #[test]
    fn a_replica_is_never_given_new_material() {
        let replica = shown(None, RegionRole::Replica);
        let role = role_of_one_among_many(&stored(KeyKind::SymmetricDefault), &asked(None), &[], &replica, false);
        assert_eq!(role, Ok(MaterialRole::Existing(None)));
        assert_eq!(generated(&asked(None), &[], &replica).unwrap_err().code, FailureCode::SourceKeyRequired);
    }

    #[test]
    fn other_keys_have_one_material_for_life() {
        let key = stored(KeyKind::Hmac256);
        assert_eq!(only_the_same_again(&key, &[]), Ok(()));
        assert_eq!(only_the_same_again(&key, &[held(OURS, None)]), Ok(()));
        assert_eq!(only_the_same_again(&key, &[held(OTHER, None)]).unwrap_err().code, FailureCode::OtherMaterial);
    }
}
