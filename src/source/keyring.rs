//! The key-encryption key and the fingerprint key.

use super::{KeyMaterial, PlainKey};
use crate::job::KeyKind;
use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Nonce};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac};
use sha2::Sha256;
use uuid::Uuid;
use zeroize::Zeroizing;

const NONCE_BYTES: usize = 12;
const KEY_BYTES: usize = 32;

/// A keyed hash of material. Tells whether two materials are the same to whoever holds the key, and
/// nothing to anybody else.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Fingerprint {
    /// Which fingerprint key made it.
    pub version: i32,
    /// HMAC-SHA-256.
    pub hash: Vec<u8>,
}

/// Why the key-encryption key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KekError {
    /// Neither base64 nor hex of 32 bytes.
    #[error(
        "the key-encryption key must be 32 bytes as base64 or 64 hex digits; make one with: openssl rand -base64 32"
    )]
    Malformed,
    /// The store was sealed under another key.
    #[error(
        "the key-encryption key is not the one that this database was sealed under \
         (given {given}, sealed under {sealed}); give the right key in keys.kek_file or KEYFERRY_KEYS__KEK"
    )]
    Wrong {
        /// Id of the key that was given.
        given: String,
        /// Id of the key that sealed the store.
        sealed: String,
    },
    /// The seal is broken although the id fits.
    #[error("the sealed fingerprint key is damaged; restore the table fingerprint_key from a backup")]
    Damaged,
    /// No randomness.
    #[error("the operating system gave no random bytes: {0}")]
    Random(#[from] getrandom::Error),
}

/// The key-encryption key: seals data keys and the fingerprint key.
#[derive(Debug)]
pub struct Kek {
    key: KeyMaterial,
    id: String,
}

impl Kek {
    /// Reads 32 bytes as base64 or hex; white space around is ignored.
    pub fn parse(text: &str) -> Result<Self, KekError> {
        let text = text.trim();
        let bytes = if text.len() == 2 * KEY_BYTES { hex::decode(text).ok() } else { STANDARD.decode(text).ok() };
        let key = KeyMaterial::new(bytes.ok_or(KekError::Malformed)?);
        if key.expose().len() != KEY_BYTES {
            return Err(KekError::Malformed);
        }
        let id = hex::encode(&keyed_hash(&key, &[b"keyferry kek id"])[..8]);
        Ok(Self { key, id })
    }

    /// A short name of the key that does not reveal it.
    pub fn id(&self) -> &str {
        &self.id
    }
}

/// A fingerprint key as it is stored.
#[derive(Clone, Debug)]
pub struct SealedFingerprintKey {
    /// Grows when the key is replaced.
    pub version: i32,
    /// Sealed under the key-encryption key.
    pub sealed_key: Vec<u8>,
    /// Which key-encryption key sealed it.
    pub kek_id: String,
}

/// The key of all keyed hashes; its own, so that re-keying the store does not change fingerprints.
#[derive(Debug)]
struct FingerprintKey {
    version: i32,
    key: KeyMaterial,
}

/// The keys that a process holds for as long as it runs.
#[derive(Debug)]
pub struct Keyring {
    kek: Kek,
    fingerprint: FingerprintKey,
}

impl Keyring {
    /// Makes the first fingerprint key of an empty store.
    pub fn new_fingerprint_key(kek: &Kek) -> Result<SealedFingerprintKey, KekError> {
        let key = KeyMaterial::random(KEY_BYTES)?;
        let sealed_key = seal(&kek.key, &fingerprint_aad(1), key.expose())?;
        Ok(SealedFingerprintKey { version: 1, sealed_key, kek_id: kek.id.clone() })
    }

    /// Opens the stored fingerprint key, which proves that the key-encryption key is the right one.
    pub fn open(kek: Kek, stored: &SealedFingerprintKey) -> Result<Self, KekError> {
        if stored.kek_id != kek.id {
            return Err(KekError::Wrong { given: kek.id, sealed: stored.kek_id.clone() });
        }
        let key = unseal(&kek.key, &fingerprint_aad(stored.version), &stored.sealed_key).ok_or(KekError::Damaged)?;
        Ok(Self { kek, fingerprint: FingerprintKey { version: stored.version, key } })
    }

    /// Which key-encryption key seals new rows.
    pub fn kek_id(&self) -> &str {
        self.kek.id()
    }

    /// The fingerprint of a key: by its bytes, a pair by its public key, since one private key has many encodings.
    pub fn fingerprint(&self, key: &PlainKey) -> Fingerprint {
        match key.public_key() {
            Some(public_key) => self.fingerprint_of_public_key(key.kind(), public_key),
            None => self.keyed(&[b"material", key.kind().as_str().as_bytes(), key.material().expose()]),
        }
    }

    /// The fingerprint of the pair that has this public key, a DER `SubjectPublicKeyInfo`: what AWS shows is compared
    /// with it, and no private key is opened for that.
    pub fn fingerprint_of_public_key(&self, kind: KeyKind, public_key: &[u8]) -> Fingerprint {
        self.keyed(&[b"public key", kind.as_str().as_bytes(), public_key])
    }

    fn keyed(&self, parts: &[&[u8]]) -> Fingerprint {
        let hash = keyed_hash(&self.fingerprint.key, parts);
        Fingerprint { version: self.fingerprint.version, hash: hash.to_vec() }
    }

    /// A keyed hash of a message body, by which a message without a usable id is known.
    pub fn body_hash(&self, queue: &str, body: &[u8]) -> [u8; 32] {
        keyed_hash(&self.fingerprint.key, &[b"body", queue.as_bytes(), body])
    }

    /// Seals material under a fresh data key, and that under the key-encryption key; both bound to the row.
    pub(super) fn seal_row(
        &self,
        row: Uuid,
        kind: &str,
        material: &KeyMaterial,
    ) -> Result<(Vec<u8>, Vec<u8>), KekError> {
        let data_key = KeyMaterial::random(KEY_BYTES)?;
        let sealed_material = seal(&data_key, &row_aad("material", row, kind), material.expose())?;
        let sealed_data_key = seal(&self.kek.key, &row_aad("data key", row, kind), data_key.expose())?;
        Ok((sealed_material, sealed_data_key))
    }

    /// Opens what [`Self::seal_row`] sealed; `None` when the row was changed or moved.
    pub(super) fn open_row(
        &self,
        row: Uuid,
        kind: &str,
        sealed_material: &[u8],
        sealed_data_key: &[u8],
    ) -> Option<KeyMaterial> {
        let data_key = unseal(&self.kek.key, &row_aad("data key", row, kind), sealed_data_key)?;
        unseal(&data_key, &row_aad("material", row, kind), sealed_material)
    }
}

fn fingerprint_aad(version: i32) -> Vec<u8> {
    format!("keyferry v1 fingerprint key {version}").into_bytes()
}

fn row_aad(part: &str, row: Uuid, kind: &str) -> Vec<u8> {
    format!("keyferry v1 {part} {row} {kind}").into_bytes()
}

/// HMAC-SHA-256 over the parts, each with its length, so that parts cannot run into each other.
fn keyed_hash(key: &KeyMaterial, parts: &[&[u8]]) -> [u8; 32] {
    // HMAC takes keys of any length (RFC 2104), so this cannot fail.
    let Ok(mut mac) = <Hmac<Sha256> as KeyInit>::new_from_slice(key.expose()) else { return [0; 32] };
    for part in parts {
        mac.update(&(part.len() as u64).to_be_bytes());
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

/// AES-256-GCM: nonce || ciphertext || tag. Every key seals one text only, except the key-encryption
/// key, whose 96-bit random nonces are good for 2^32 rows (NIST SP 800-38D, 8.3).
fn seal(key: &KeyMaterial, aad: &[u8], text: &[u8]) -> Result<Vec<u8>, KekError> {
    let mut nonce = [0; NONCE_BYTES];
    getrandom::fill(&mut nonce)?;
    let cipher = Aes256Gcm::new_from_slice(key.expose()).map_err(|_| KekError::Malformed)?;
    let sealed = cipher.encrypt(&Nonce::from(nonce), Payload { msg: text, aad }).map_err(|_| KekError::Malformed)?;
    Ok([nonce.as_slice(), &sealed].concat())
}

fn unseal(key: &KeyMaterial, aad: &[u8], sealed: &[u8]) -> Option<KeyMaterial> {
    let (nonce, text) = sealed.split_first_chunk::<NONCE_BYTES>()?;
    let cipher = Aes256Gcm::new_from_slice(key.expose()).ok()?;
    // The buffer is zeroised on every path: the cipher writes into it before it has checked the tag.
    let mut buffer = Zeroizing::new(text.to_vec());
    aes_gcm::aead::AeadInOut::decrypt_in_place(&cipher, &Nonce::from(*nonce), aad, &mut *buffer).ok()?;
    Some(KeyMaterial::new(std::mem::take(&mut *buffer)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keyring() -> Keyring {
        let kek = Kek::parse(&hex::encode([7; 32])).unwrap();
        let sealed = Keyring::new_fingerprint_key(&kek).unwrap();
        Keyring::open(kek, &sealed).unwrap()
    }

    #[test]
    fn a_sealed_row_opens_only_as_itself() {
        let keyring = keyring();
        let (row, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let material = KeyMaterial::new(vec![9; 32]);
        let (sealed, data_key) = keyring.seal_row(row, "HMAC_256", &material).unwrap();
        assert_eq!(keyring.open_row(row, "HMAC_256", &sealed, &data_key).unwrap().expose(), &[9; 32]);
        assert!(keyring.open_row(other, "HMAC_256", &sealed, &data_key).is_none());
        assert!(keyring.open_row(row, "SYMMETRIC_DEFAULT", &sealed, &data_key).is_none());
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(keyring.open_row(row, "HMAC_256", &changed, &data_key).is_none());
        }
        assert!(keyring.open_row(row, "HMAC_256", &sealed[..5], &data_key).is_none());
    }

    #[test]
    fn another_kek_is_refused_by_name() {
        let kek = Kek::parse(&hex::encode([7; 32])).unwrap();
        let sealed = Keyring::new_fingerprint_key(&kek).unwrap();
        let other = Kek::parse(&STANDARD.encode([8; 32])).unwrap();
        let error = Keyring::open(other, &sealed).unwrap_err();
        assert!(matches!(error, KekError::Wrong { .. }), "{error}");
    }

    #[test]
    fn a_kek_is_base64_or_hex_of_32_bytes() {
        assert!(Kek::parse(&format!(" {}\n", STANDARD.encode([1; 32]))).is_ok());
        for text in ["", "AAAA", &hex::encode([1; 31]), &STANDARD.encode([1; 33]), "not base64 at all!"] {
            assert!(Kek::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn fingerprints_tell_equal_material_of_one_kind() {
        let keyring = keyring();
        let print = |kind, byte| keyring.fingerprint(&PlainKey::parse(kind, KeyMaterial::new(vec![byte; 32])).unwrap());
        assert_eq!(print(KeyKind::Hmac256, 1), print(KeyKind::Hmac256, 1));
        assert_ne!(print(KeyKind::Hmac256, 1), print(KeyKind::Hmac256, 2));
        assert_ne!(print(KeyKind::Hmac256, 1), print(KeyKind::SymmetricDefault, 1));
    }

    #[test]
    fn debug_shows_no_key() {
        let shown = format!("{:?}", keyring());
        assert!(!shown.contains("7, 7") && shown.contains("KeyMaterial(..)"), "{shown}");
    }
}
