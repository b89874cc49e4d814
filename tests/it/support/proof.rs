//! Proof of which bytes a key at AWS holds, by whoever holds the same: what KMS encrypts is decrypted, what it MACs
//! is computed again, what it signs is verified.

use super::fake::{Fake, region_of};
use aes_gcm::aead::{Aead as _, KeyInit as _};
use aes_gcm::{Aes256Gcm, Nonce};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256K1_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, ECDSA_P521_SHA512_ASN1,
    RSA_PSS_2048_8192_SHA256, UnparsedPublicKey, VerificationAlgorithm,
};
use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::{MacAlgorithmSpec, SigningAlgorithmSpec};
use hmac::Hmac;

const MESSAGE: &[u8] = b"what only the holder of the key can read";

/// Whether what KMS encrypts under the key opens with these bytes. The layout is the double's own: version, id of
/// the material, nonce, ciphertext.
pub async fn decrypts(fake: &Fake, arn: &str, bytes: &[u8]) -> bool {
    let client = fake.stranger(region_of(arn));
    let answer = client.encrypt().key_id(arn).plaintext(Blob::new(MESSAGE)).send().await.unwrap();
    let blob = answer.ciphertext_blob.unwrap().into_inner();
    let cipher = Aes256Gcm::new_from_slice(bytes).unwrap();
    let nonce: [u8; 12] = blob[33..45].try_into().unwrap();
    cipher.decrypt(&Nonce::from(nonce), &blob[45..]).is_ok_and(|plain| plain == MESSAGE)
}

/// Whether KMS's MAC under the key is the one that these bytes give.
pub async fn macs(fake: &Fake, arn: &str, kind: &str, bytes: &[u8]) -> bool {
    let algorithm = MacAlgorithmSpec::from(kind.replace("HMAC_", "HMAC_SHA_").as_str());
    let client = fake.stranger(region_of(arn));
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

/// Whether KMS's signature under the key is one of the pair with this public key, a DER `SubjectPublicKeyInfo`.
pub async fn signs(fake: &Fake, arn: &str, kind: &str, public_key: &[u8]) -> bool {
    let (name, algorithm): (_, &'static dyn VerificationAlgorithm) = match kind {
        "RSA_2048" | "RSA_3072" | "RSA_4096" => (SigningAlgorithmSpec::RsassaPssSha256, &RSA_PSS_2048_8192_SHA256),
        "ECC_NIST_P256" => (SigningAlgorithmSpec::EcdsaSha256, &ECDSA_P256_SHA256_ASN1),
        "ECC_NIST_P384" => (SigningAlgorithmSpec::EcdsaSha384, &ECDSA_P384_SHA384_ASN1),
        "ECC_NIST_P521" => (SigningAlgorithmSpec::EcdsaSha512, &ECDSA_P521_SHA512_ASN1),
        "ECC_SECG_P256K1" => (SigningAlgorithmSpec::EcdsaSha256, &ECDSA_P256K1_SHA256_ASN1),
        other => panic!("no kind of pair: {other}"),
    };
    let client = fake.stranger(region_of(arn));
    let answer = client.sign().key_id(arn).signing_algorithm(name).message(Blob::new(MESSAGE)).send().await.unwrap();
    let signature = answer.signature.unwrap().into_inner();
    UnparsedPublicKey::new(algorithm, public_key).verify(MESSAGE, &signature).is_ok()
}

fn hmac_of<M: hmac::Mac + hmac::KeyInit>(bytes: &[u8]) -> Vec<u8> {
    let mut mac = <M as hmac::KeyInit>::new_from_slice(bytes).unwrap();
    mac.update(MESSAGE);
    mac.finalize().into_bytes().to_vec()
}
