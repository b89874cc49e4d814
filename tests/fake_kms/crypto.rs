//! All cryptography of the double, on aws-lc-rs alone.
//!
//! The product wraps with another library; what the two agree on is therefore not one library's private opinion.
//!
//! # Layout of an `Encrypt` answer
//!
//! `0x01 || 32 bytes KeyMaterialId (raw) || 12 bytes nonce || AES-256-GCM(ciphertext || 16 bytes tag)`, under the key
//! material itself, with empty additional data. Whoever holds the material can decrypt it without this program; that is
//! the proof that the right bytes arrived. (AWS's own layout is not published.) In China Regions, where the material is
//! an SM4 key of 16 bytes, AES-128-GCM stands in for SM4, which the library does not have.
//!
//! # MACs
//!
//! `GenerateMac` is plain HMAC (RFC 2104) under the key material itself.

use std::sync::{Arc, LazyLock};

use aws_lc_rs::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::encoding::AsDer as _;
use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrapPadded as _};
use aws_lc_rs::rsa::{
    OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepAlgorithm, OaepPrivateDecryptingKey, PrivateDecryptingKey,
};
use aws_lc_rs::{digest, hmac};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use zeroize::Zeroizing;

use crate::kinds::{KeySpec, MacAlgorithm, WrappingAlgorithm, WrappingKeySpec};
use crate::pairs::Pair;

/// Key material in the clear.
pub type Plain = Zeroizing<Vec<u8>>;

/// Unwrapped key material.
#[derive(Debug)]
pub struct Opened {
    /// What was wrapped.
    pub bytes: Plain,
    /// The pair that the bytes are the private key of, where they are for a key of that kind and fit it.
    pub pair: Option<Arc<Pair>>,
}

/// Something that would not open; deliberately without a reason, as in AWS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unopened;

/// How many private keys there are of each wrapping spec. They are handed out in turn, so that a client which pairs one
/// answer's token with another answer's public key is found out.
pub const KEYS_PER_SPEC: u8 = 2;

/// Wrapped key material together with all that is needed to unwrap it.
#[derive(Debug)]
pub struct Sealed {
    /// The algorithm the token was issued for.
    pub algorithm: WrappingAlgorithm,
    /// The wrapping key's spec.
    pub spec: WrappingKeySpec,
    /// Which of the spec's keys.
    pub index: u8,
    /// The wrapped material.
    pub blob: Vec<u8>,
}

impl Sealed {
    /// Unwraps the material and reads what a key of the spec needs of it. Never call it under the state's lock.
    pub fn open(&self, spec: KeySpec) -> Result<Opened, Unopened> {
        let bytes = self.unwrap()?;
        let pair = if spec.is_pair() { Pair::read(spec, &bytes).map(Arc::new) } else { None };
        Ok(Opened { bytes, pair })
    }

    /// Unwraps the material. Costs an RSA private operation.
    pub fn unwrap(&self) -> Result<Plain, Unopened> {
        let oaep = match self.algorithm {
            WrappingAlgorithm::OaepSha256 | WrappingAlgorithm::AesKeyWrapSha256 => &OAEP_SHA256_MGF1SHA256,
            WrappingAlgorithm::OaepSha1 | WrappingAlgorithm::AesKeyWrapSha1 => &OAEP_SHA1_MGF1SHA1,
        };
        let wrapping = WrappingKey::get(self.spec, self.index).ok_or(Unopened)?;
        if !self.algorithm.is_hybrid() {
            return wrapping.decrypt(oaep, &self.blob);
        }
        // The RSA part comes first.
        let (wrapped_key, wrapped_material) = self.blob.split_at_checked(self.spec.modulus_length()).ok_or(Unopened)?;
        let key = wrapping.decrypt(oaep, wrapped_key)?;
        let kek = AesKek::new(&AES_256, &key).map_err(|_| Unopened)?;
        let mut output = Zeroizing::new(vec![0; wrapped_material.len()]);
        let length = kek.unwrap_with_padding(wrapped_material, &mut output).map_err(|_| Unopened)?.len();
        output.truncate(length);
        Ok(output)
    }
}

/// The public half of a wrapping key as `GetParametersForImport` hands it out: DER `SubjectPublicKeyInfo` in base64.
pub fn public_key(spec: WrappingKeySpec, index: u8) -> Option<&'static str> {
    WrappingKey::get(spec, index).map(|key| key.public.as_str())
}

/// SHA-256 over the parts, one after the other.
pub fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in parts {
        context.update(part);
    }
    let mut output = [0; 32];
    output.copy_from_slice(context.finish().as_ref());
    output
}

/// Encrypts under the material, in the layout of the module's documentation.
pub fn encrypt(material: &[u8], material_id: &[u8; 32], plaintext: &[u8]) -> Result<Vec<u8>, Unopened> {
    let nonce: [u8; aead::NONCE_LEN] = random()?;
    let mut body = plaintext.to_vec();
    gcm(material)?
        .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::empty(), &mut body)
        .map_err(|_| Unopened)?;
    Ok([&[LAYOUT][..], material_id, &nonce, &body].concat())
}

/// The id of the material that an `Encrypt` answer was made with.
pub fn material_id_of(ciphertext: &[u8]) -> Option<[u8; 32]> {
    let (&layout, rest) = ciphertext.split_first()?;
    (layout == LAYOUT).then_some(())?;
    rest.first_chunk().copied()
}

/// Decrypts an `Encrypt` answer.
pub fn decrypt(material: &[u8], ciphertext: &[u8]) -> Result<Plain, Unopened> {
    let rest = ciphertext.get(1 + 32..).ok_or(Unopened)?;
    let (nonce, body) = rest.split_first_chunk::<{ aead::NONCE_LEN }>().ok_or(Unopened)?;
    let mut body = Zeroizing::new(body.to_vec());
    let length = gcm(material)?
        .open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::empty(), &mut body)
        .map_err(|_| Unopened)?
        .len();
    body.truncate(length);
    Ok(body)
}

/// The MAC of a message under the material.
pub fn mac(algorithm: MacAlgorithm, material: &[u8], message: &[u8]) -> Vec<u8> {
    hmac::sign(&mac_key(algorithm, material), message).as_ref().to_vec()
}

/// Whether a MAC is right.
pub fn mac_is_valid(algorithm: MacAlgorithm, material: &[u8], message: &[u8], tag: &[u8]) -> bool {
    hmac::verify(&mac_key(algorithm, material), message, tag).is_ok()
}

/// One step of the signature's key derivation, and its last step.
pub fn hmac_sha256(key: &[u8], message: &[u8]) -> hmac::Tag {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), message)
}

/// Random bytes.
pub fn random<const N: usize>() -> Result<[u8; N], Unopened> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| Unopened)?;
    Ok(bytes)
}

const LAYOUT: u8 = 1;

struct WrappingKey {
    private: OaepPrivateDecryptingKey,
    public: String,
}

/// Read on first use: parsing checks the key, which takes a while.
static WRAPPING_KEYS: [LazyLock<Option<WrappingKey>>; 6] = [
    LazyLock::new(|| WrappingKey::read(include_bytes!("fixtures/wrapping_rsa_2048_a.der"))),
    LazyLock::new(|| WrappingKey::read(include_bytes!("fixtures/wrapping_rsa_2048_b.der"))),
    LazyLock::new(|| WrappingKey::read(include_bytes!("fixtures/wrapping_rsa_3072_a.der"))),
    LazyLock::new(|| WrappingKey::read(include_bytes!("fixtures/wrapping_rsa_3072_b.der"))),
    LazyLock::new(|| WrappingKey::read(include_bytes!("fixtures/wrapping_rsa_4096_a.der"))),
    LazyLock::new(|| WrappingKey::read(include_bytes!("fixtures/wrapping_rsa_4096_b.der"))),
];

impl WrappingKey {
    fn get(spec: WrappingKeySpec, index: u8) -> Option<&'static Self> {
        let first = match spec {
            WrappingKeySpec::Rsa2048 => 0,
            WrappingKeySpec::Rsa3072 => 2,
            WrappingKeySpec::Rsa4096 => 4,
        };
        WRAPPING_KEYS.get(first + usize::from(index % KEYS_PER_SPEC))?.as_ref()
    }

    fn read(pkcs8: &[u8]) -> Option<Self> {
        let private = PrivateDecryptingKey::from_pkcs8(pkcs8).ok()?;
        let public = BASE64.encode(private.public_key().as_der().ok()?.as_ref());
        Some(Self { private: OaepPrivateDecryptingKey::new(private).ok()?, public })
    }

    fn decrypt(&self, oaep: &'static OaepAlgorithm, ciphertext: &[u8]) -> Result<Plain, Unopened> {
        let mut output = Zeroizing::new(vec![0; self.private.min_output_size()]);
        let length = self.private.decrypt(oaep, ciphertext, &mut output, None).map_err(|_| Unopened)?.len();
        output.truncate(length);
        Ok(output)
    }
}

fn gcm(material: &[u8]) -> Result<LessSafeKey, Unopened> {
    let algorithm = if material.len() == 16 { &aead::AES_128_GCM } else { &aead::AES_256_GCM };
    UnboundKey::new(algorithm, material).map(LessSafeKey::new).map_err(|_| Unopened)
}

fn mac_key(algorithm: MacAlgorithm, material: &[u8]) -> hmac::Key {
    let algorithm = match algorithm {
        MacAlgorithm::Sha224 => hmac::HMAC_SHA224,
        MacAlgorithm::Sha256 => hmac::HMAC_SHA256,
        MacAlgorithm::Sha384 => hmac::HMAC_SHA384,
        MacAlgorithm::Sha512 => hmac::HMAC_SHA512,
    };
    hmac::Key::new(algorithm, material)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::trials::wrap;

    fn seal(algorithm: WrappingAlgorithm, spec: WrappingKeySpec, index: u8, plaintext: &[u8]) -> Sealed {
        let public_key = BASE64.decode(public_key(spec, index).unwrap()).unwrap();
        Sealed { algorithm, spec, index, blob: wrap(&public_key, algorithm, plaintext) }
    }

    #[test]
    fn every_algorithm_and_key_unwraps() {
        for algorithm in WrappingAlgorithm::NAMES {
            for spec in WrappingKeySpec::NAMES {
                for index in 0..KEYS_PER_SPEC {
                    let algorithm = WrappingAlgorithm::parse(algorithm).unwrap();
                    let spec = WrappingKeySpec::parse(spec).unwrap();
                    let sealed = seal(algorithm, spec, index, b"thirty-one bytes of key materia");
                    assert_eq!(*sealed.unwrap().unwrap(), b"thirty-one bytes of key materia");
                }
            }
        }
    }

    #[test]
    fn the_wrong_key_hash_or_blob_does_not_unwrap() {
        let spec = WrappingKeySpec::Rsa2048;
        let other_key = Sealed { index: 1, ..seal(WrappingAlgorithm::OaepSha256, spec, 0, &[7; 32]) };
        assert_eq!(other_key.unwrap(), Err(Unopened));
        let other_hash =
            Sealed { algorithm: WrappingAlgorithm::OaepSha1, ..seal(WrappingAlgorithm::OaepSha256, spec, 0, &[7; 32]) };
        assert_eq!(other_hash.unwrap(), Err(Unopened));
        let mut damaged = seal(WrappingAlgorithm::AesKeyWrapSha256, spec, 0, &[7; 32]);
        *damaged.blob.last_mut().unwrap() ^= 1;
        assert_eq!(damaged.unwrap(), Err(Unopened));
    }

    #[test]
    fn an_encrypt_answer_names_its_material() {
        let blob = encrypt(&[1; 32], &[2; 32], b"text").unwrap();
        assert_eq!(material_id_of(&blob), Some([2; 32]));
        assert_eq!(*decrypt(&[1; 32], &blob).unwrap(), b"text");
        assert_eq!(decrypt(&[3; 32], &blob), Err(Unopened));
        assert_eq!(*decrypt(&[1; 16], &encrypt(&[1; 16], &[2; 32], b"text").unwrap()).unwrap(), b"text");
        assert_eq!(material_id_of(&blob[..20]), None);
    }

    #[test]
    fn macs_are_those_of_rfc_4231() {
        // RFC 4231, test case 2.
        let (key, message) = (b"Jefe", b"what do ya want for nothing?");
        for (algorithm, tag) in [
            (MacAlgorithm::Sha224, "a30e01098bc6dbbf45690f3a7e9e6d0f8bbea2a39e6148008fd05e44"),
            (MacAlgorithm::Sha256, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"),
        ] {
            assert_eq!(hex::encode(mac(algorithm, key, message)), tag);
        }
    }
}
