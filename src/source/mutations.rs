//! Keys that are almost keys, by the thousand. The long search for inputs is `tests/fuzz`; this is what of it belongs into
//! every run: the corpus that it left, and changes of whole keys where a parser goes wrong.

use super::{KeyMaterial, PlainKey, open_pem};
use crate::job::KeyKind;
use std::path::Path;

const KEYS: [(KeyKind, &[u8]); 7] = [
    (KeyKind::EccNistP256, include_bytes!("../../tests/fixtures/material/p256.der")),
    (KeyKind::EccSecgP256k1, include_bytes!("../../tests/fixtures/material/secp256k1.der")),
    (KeyKind::EccNistP384, include_bytes!("../../tests/fixtures/material/p384.der")),
    (KeyKind::EccNistP521, include_bytes!("../../tests/fixtures/material/p521.der")),
    (KeyKind::Rsa2048, include_bytes!("../../tests/fixtures/material/rsa_2048.der")),
    (KeyKind::Rsa3072, include_bytes!("../../tests/fixtures/material/rsa_3072.der")),
    (KeyKind::Rsa4096, include_bytes!("../../tests/fixtures/material/rsa_4096.der")),
];

/// What is taken is taken again as the same key; what is refused has a code and a sentence. True if it was taken.
fn check(kind: KeyKind, bytes: &[u8]) -> bool {
    match PlainKey::parse(kind, KeyMaterial::new(bytes.to_vec())) {
        Ok(key) => {
            let kept = key.material().expose();
            assert!(kept.len() <= kind.most_material_bytes(), "{kind}: {}", kept.len());
            let again = PlainKey::parse(kind, KeyMaterial::new(kept.to_vec())).unwrap();
            assert_eq!((again.material().expose(), again.public_key()), (kept, key.public_key()));
            true
        }
        Err(fault) => {
            assert!(fault.code().starts_with("material_") && !fault.to_string().is_empty());
            false
        }
    }
}

#[test]
fn the_fuzzers_corpus_is_taken_or_refused() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus/material");
    let (mut taken, mut refused) = (0, 0);
    for entry in std::fs::read_dir(corpus).unwrap() {
        let input = std::fs::read(entry.unwrap().path()).unwrap();
        let Some((first, bytes)) = input.split_first() else { continue };
        // As tests/fuzz/fuzz_targets/material.rs reads it.
        match KeyKind::ALL.get(usize::from(*first) % (KeyKind::ALL.len() + 1)) {
            Some(kind) if check(*kind, bytes) => taken += 1,
            Some(_) => refused += 1,
            None => drop(open_pem(bytes).map(|der| KeyKind::ALL.map(|kind| check(kind, der.expose())))),
        }
    }
    assert!(taken >= 7 && refused >= 100, "{taken} taken, {refused} refused");
}

#[test]
fn no_change_of_a_key_breaks_the_parser() {
    for (kind, key) in KEYS {
        assert!(check(kind, key));
        for length in 0..key.len() {
            assert!(!check(kind, &key[..length]), "{kind} of {length} bytes");
        }
        // Every bit of what stands before the numbers, and here and there one of what follows. One curve is as good as
        // another, and arithmetic on the larger ones is slow without optimisation.
        let step = if matches!(kind, KeyKind::EccNistP256 | KeyKind::Rsa2048) { 1 } else { 25 };
        let stride = step * key.len().div_ceil(240);
        let places = (0..40).flat_map(|at| (0..8).map(move |bit| (at, bit))).step_by(step);
        for (at, bit) in places.chain((40..key.len()).step_by(stride).map(|at| (at, at % 8))) {
            let mut changed = key.to_vec();
            changed[at] ^= 1 << bit;
            check(kind, &changed);
        }
        // Lengths that lie, and tags of something else.
        for at in (0..40).step_by(step).chain((40..key.len()).step_by(4 * stride)) {
            for byte in [0x00, 0x02, 0x30, 0x7f, 0x80, 0x81, 0x84, 0xff] {
                let mut changed = key.to_vec();
                changed[at] = byte;
                check(kind, &changed);
            }
        }
    }
}

#[test]
fn two_keys_spliced_are_no_third() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for (kind, one) in KEYS {
        for (other_kind, other) in KEYS {
            for _ in 0..40 {
                let (from, to) = (random.below(one.len()), random.below(other.len()));
                let spliced = [&one[..from], &other[to..]].concat();
                for kind in [kind, other_kind] {
                    if check(kind, &spliced) {
                        assert!(spliced == one || spliced == other, "{kind}: a new key from {from} and {to}");
                    }
                }
                let mut within = one.to_vec();
                let length = random.below(40).min(one.len() - from).min(other.len() - to);
                within[from..from + length].copy_from_slice(&other[to..to + length]);
                check(kind, &within);
            }
        }
    }
}

/// Xorshift (Marsaglia): the same changes in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % bound as u64).unwrap()
    }
}
