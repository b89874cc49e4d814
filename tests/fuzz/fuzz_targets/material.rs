//! Material from elsewhere: one byte for the kind, then the bytes. Behind the last kind, PEM for each kind.

#![no_main]

use keyferry_fuzz::job::KeyKind;
use keyferry_fuzz::source::{KeyMaterial, PlainKey, open_pem};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((first, bytes)) = data.split_first() else { return };
    match KeyKind::ALL.get(usize::from(*first) % (KeyKind::ALL.len() + 1)) {
        Some(kind) => check(*kind, bytes),
        None => match open_pem(bytes) {
            Ok(material) => KeyKind::ALL.into_iter().for_each(|kind| check(kind, material.expose())),
            Err(fault) => assert!(fault.code().starts_with("material_")),
        },
    }
});

/// What is taken is taken again as the same key; what is refused has a code and a sentence.
fn check(kind: KeyKind, bytes: &[u8]) {
    match PlainKey::parse(kind, KeyMaterial::new(bytes.to_vec())) {
        Ok(key) => {
            let kept = key.material().expose();
            let again = PlainKey::parse(kind, KeyMaterial::new(kept.to_vec())).expect("it was taken before");
            assert_eq!((again.material().expose(), again.public_key()), (kept, key.public_key()));
            assert_eq!(key.public_key().is_some(), kind.is_pair());
        }
        Err(fault) => assert!(fault.code().starts_with("material_") && !fault.to_string().is_empty()),
    }
}
