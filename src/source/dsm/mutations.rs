//! Answers that are almost answers, by the thousand. The long search for inputs is `tests/fuzz`, target `ttlv`; this is what of
//! it belongs into every run: the corpus that it left, and changes of whole answers where a decoder goes wrong.

mod oracle;
mod samples;

use super::tags::PRIVATE_KEY;
use super::ttlv::{self, HEADER, Item, Limits, Value};
use oracle::{Reached, check};
use samples::Sample;
use std::path::Path;

/// An answer with a pair in it: arithmetic is slow without optimisation, and whoever changes what is not the pair pays it.
fn is_dear(bytes: &[u8]) -> bool {
    let tag = PRIVATE_KEY.0.to_be_bytes();
    bytes.windows(3).any(|window| window == &tag[1..])
}

/// Where items begin in a message.
fn beginnings(bytes: &[u8]) -> Vec<usize> {
    fn walk(item: Item<'_>, at: usize, found: &mut Vec<usize>) -> usize {
        found.push(at);
        let length = match item.value {
            Value::Structure(inside) => return inside.items().fold(at + HEADER, |at, item| walk(item, at, found)),
            Value::Text(text) => text.len(),
            Value::Bytes(bytes) | Value::BigInteger(bytes) => bytes.len(),
            _ => HEADER,
        };
        at + HEADER + length.next_multiple_of(8)
    }
    let mut found = Vec::new();
    if let Ok(message) = ttlv::parse(bytes, Limits::MESSAGE) {
        assert_eq!(walk(message, 0, &mut found), bytes.len());
    }
    found
}

fn with(bytes: &[u8], at: usize, other: &[u8]) -> Vec<u8> {
    let mut changed = bytes.to_vec();
    changed[at..at + other.len()].copy_from_slice(other);
    changed
}

#[test]
fn the_fuzzers_corpus_is_read_or_refused() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus/ttlv");
    let mut reached = [0; 5];
    for entry in std::fs::read_dir(corpus).unwrap() {
        reached[check(&std::fs::read(entry.unwrap().path()).unwrap()) as usize] += 1;
    }
    assert!(reached.iter().all(|inputs| *inputs >= 5), "{reached:?}");
}

#[test]
fn every_sample_gets_as_far_as_it_should() {
    for Sample { name, bytes, reaches } in samples::all() {
        assert_eq!(check(&bytes), reaches, "{name}");
    }
}

#[test]
fn no_answer_is_one_when_it_is_cut() {
    for Sample { name, bytes, .. } in samples::all() {
        let whole = bytes.first_chunk().map(|header| ttlv::announced_length(*header, Limits::MESSAGE));
        let whole = whole.and_then(Result::ok).unwrap_or(bytes.len());
        for length in 0..whole.min(bytes.len()) {
            assert_eq!(check(&bytes[..length]), Reached::Nothing, "{name}, {length} bytes");
        }
    }
}

#[test]
fn no_bit_and_no_lie_breaks_the_decoder() {
    for (number, Sample { bytes, .. }) in samples::all().into_iter().enumerate() {
        if bytes.len() > 1500 {
            continue;
        }
        let items = beginnings(&bytes);
        // Here and there a bit and some of the items, in each answer others; of dear ones fewer, and no large pair.
        let is_dear = is_dear(&bytes);
        let (stride, step) = if is_dear { (2 * bytes.len(), 11) } else { (29, 5) };
        for bit in (number % stride..8 * bytes.len()).step_by(stride) {
            check(&with(&bytes, bit / 8, &[bytes[bit / 8] ^ 1 << (bit % 8)]));
        }
        for at in items.iter().copied().skip(number % step).step_by(step) {
            for kind in 0..=12 {
                check(&with(&bytes, at + 3, &[kind]));
            }
            let length = u32::from_be_bytes(*bytes[at + 4..].first_chunk().unwrap());
            for lie in [0, 1, 3, 4, 5, 7, 8, 9, 16, length ^ 8, length + 1, length + 8, length.wrapping_sub(8)] {
                check(&with(&bytes, at + 4, &lie.to_be_bytes()));
            }
            for lie in [0x7fff_ffff, 0x8000_0000, u32::MAX - 8, u32::MAX - 7, u32::MAX] {
                check(&with(&bytes, at + 4, &lie.to_be_bytes()));
            }
        }
    }
}

#[test]
fn no_item_breaks_the_reader_in_the_place_of_another() {
    let samples = samples::all();
    let whole = samples.iter().filter(|sample| !is_dear(&sample.bytes) && sample.reaches > Reached::Nothing);
    let whole: Vec<_> = whole.map(|sample| (&sample.bytes, beginnings(&sample.bytes))).collect();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for (one, places) in &whole {
        for _ in 0..40 {
            let (other, parts) = &whole[random.below(whole.len())];
            let (Some(from), Some(to)) = (random.of(parts), random.of(places)) else { continue };
            // Over the item, header and all, and then the header alone.
            let length = (other.len() - from).min(one.len() - to).min(8 + 8 * random.below(6));
            check(&with(one, to, &other[from..from + length]));
            check(&with(one, to, &other[from..from + 3]));
            check(&[&one[..to], &other[from..]].concat());
            // Put in between, with the message's own length put right.
            let mut longer = [&one[..to], &other[from..from + length], &one[to..]].concat();
            let inside = u32::try_from(longer.len() - HEADER).unwrap();
            longer[4..HEADER].copy_from_slice(&inside.to_be_bytes());
            check(&longer);
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

    fn of(&mut self, places: &[usize]) -> Option<usize> {
        if places.is_empty() { None } else { places.get(self.below(places.len())).copied() }
    }
}
