//! Proof of which bytes a key at AWS holds, by whoever holds the same: what KMS encrypts is decrypted, what it MACs
//! is computed again.

use super::fake::Fake;
use aes_gcm::aead::{Aead as _, KeyInit as _};
use aes_gcm::{Aes256Gcm, Nonce};
use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::MacAlgorithmSpec;
use hmac::Hmac;

const MESSAGE: &[u8] = b"what only the holder of the key can read";

/// Whether what KMS encrypts under the key opens with these bytes. The layout is the double's own: version, id of
/// the material, nonce, ciphertext.
pub async fn decrypts(fake: &Fake, arn: &str, bytes: &[u8]) -> bool {
    let client = fake.stranger(region(arn));
    let answer = client.encrypt().key_id(arn).plaintext(Blob::new(MESSAGE)).send().await.unwrap();
    let blob = answer.ciphertext_blob.unwrap().into_inner();
    let cipher = Aes256Gcm::new_from_slice(bytes).unwrap();
    let nonce: [u8; 12] = blob[33..45].try_into().unwrap();
    cipher.decrypt(&Nonce::from(nonce), &blob[45..]).is_ok_and(|plain| plain == MESSAGE)
}

/// Whether KMS's MAC under the key is the one that these bytes give.
pub async fn macs(fake: &Fake, arn: &str, kind: &str, bytes: &[u8]) -> bool {
    let algorithm = MacAlgorithmSpec::from(kind.replace("HMAC_", "HMAC_SHA_").as_str());
    let client = fake.stranger(region(arn));
    let answer = client.generate_mac().key_id(arn).mac_algorithm(algorithm).message(Blob::new(MESSAGE)).send().await;
    let expected = match kind {
        "HMAC_224" => hmac_of::<Hmac<sha2::Sha224>>(bytes),
        "HMAC_256" => hmac_of::<Hmac<sha2::Sha256>>(bytes),
        "HMAC_384" => hmac_of::<Hmac<sha2::Sha384>>(bytes),
        "HMAC_512" => hmac_of::<Hmac<sha2::Sha512>>(bytes),
        other => panic!("no HMAC kind: {other}"),
    };
    answer.unwrap().mac.unwrap().into_inner() == expected
}

fn hmac_of<M: hmac::Mac + hmac::KeyInit>(bytes: &[u8]) -> Vec<u8> {
    let mut mac = <M as hmac::KeyInit>::new_from_slice(bytes).unwrap();
    mac.update(MESSAGE);
    mac.finalize().into_bytes().to_vec()
}

fn region(arn: &str) -> &str {
    arn.split(':').nth(3).unwrap()
}
