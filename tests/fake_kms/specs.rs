//! What each key spec is: its material, its uses, its algorithms, and how its material may be wrapped.

use crate::kinds::{KeySpec, KeyUsage, MacAlgorithm, SigningAlgorithm, WrappingAlgorithm, WrappingKeySpec};
use crate::request::is_china;

const SYMMETRIC: &[KeyUsage] = &[KeyUsage::EncryptDecrypt];
const HMAC: &[KeyUsage] = &[KeyUsage::GenerateVerifyMac];
const RSA: &[KeyUsage] = &[KeyUsage::SignVerify, KeyUsage::EncryptDecrypt];
const NIST: &[KeyUsage] = &[KeyUsage::SignVerify, KeyUsage::KeyAgreement];
const SECG: &[KeyUsage] = &[KeyUsage::SignVerify];

impl KeySpec {
    /// Whether the material is the private key of a pair.
    pub fn is_pair(self) -> bool {
        match self {
            Self::SymmetricDefault | Self::Hmac224 | Self::Hmac256 | Self::Hmac384 | Self::Hmac512 => false,
            Self::Rsa2048
            | Self::Rsa3072
            | Self::Rsa4096
            | Self::EccNistP256
            | Self::EccNistP384
            | Self::EccNistP521
            | Self::EccSecgP256k1 => true,
        }
    }

    /// The exact number of bytes of the key's material; `None` for pairs. In China `SYMMETRIC_DEFAULT` is SM4.
    pub fn material_length(self, region: &str) -> Option<usize> {
        match self {
            Self::SymmetricDefault if is_china(region) => Some(16),
            Self::SymmetricDefault | Self::Hmac256 => Some(32),
            Self::Hmac224 => Some(28),
            Self::Hmac384 => Some(48),
            Self::Hmac512 => Some(64),
            _ => None,
        }
    }

    /// The number of bytes of an RSA pair's modulus.
    pub fn modulus_length(self) -> Option<usize> {
        match self {
            Self::Rsa2048 => Some(256),
            Self::Rsa3072 => Some(384),
            Self::Rsa4096 => Some(512),
            _ => None,
        }
    }

    /// What a key may be made for; the first is what a seeded key is for.
    pub fn usages(self) -> &'static [KeyUsage] {
        match self {
            Self::SymmetricDefault => SYMMETRIC,
            Self::Hmac224 | Self::Hmac256 | Self::Hmac384 | Self::Hmac512 => HMAC,
            Self::Rsa2048 | Self::Rsa3072 | Self::Rsa4096 => RSA,
            Self::EccNistP256 | Self::EccNistP384 | Self::EccNistP521 => NIST,
            Self::EccSecgP256k1 => SECG,
        }
    }

    /// The one MAC algorithm of an HMAC key.
    pub fn mac(self) -> Option<MacAlgorithm> {
        match self {
            Self::Hmac224 => Some(MacAlgorithm::Sha224),
            Self::Hmac256 => Some(MacAlgorithm::Sha256),
            Self::Hmac384 => Some(MacAlgorithm::Sha384),
            Self::Hmac512 => Some(MacAlgorithm::Sha512),
            _ => None,
        }
    }

    /// The signature algorithms of a pair.
    pub fn signing(self) -> &'static [SigningAlgorithm] {
        match self {
            Self::Rsa2048 | Self::Rsa3072 | Self::Rsa4096 => &[
                SigningAlgorithm::Pkcs1Sha256,
                SigningAlgorithm::Pkcs1Sha384,
                SigningAlgorithm::Pkcs1Sha512,
                SigningAlgorithm::PssSha256,
                SigningAlgorithm::PssSha384,
                SigningAlgorithm::PssSha512,
            ],
            Self::EccNistP256 | Self::EccSecgP256k1 => &[SigningAlgorithm::EcdsaSha256],
            Self::EccNistP384 => &[SigningAlgorithm::EcdsaSha384],
            Self::EccNistP521 => &[SigningAlgorithm::EcdsaSha512],
            Self::SymmetricDefault | Self::Hmac224 | Self::Hmac256 | Self::Hmac384 | Self::Hmac512 => &[],
        }
    }

    /// Whether KMS takes material of this kind wrapped like that.
    pub fn takes(self, algorithm: WrappingAlgorithm, wrapping: WrappingKeySpec, region: &str) -> bool {
        let hybrid = algorithm.is_hybrid();
        match self {
            _ if hybrid && is_china(region) => false,
            Self::SymmetricDefault | Self::Hmac224 | Self::Hmac256 | Self::Hmac384 | Self::Hmac512 => !hybrid,
            Self::Rsa2048 | Self::Rsa3072 | Self::Rsa4096 => hybrid,
            // Its private key is too long for that.
            Self::EccNistP521 => hybrid || wrapping != WrappingKeySpec::Rsa2048,
            Self::EccNistP256 | Self::EccNistP384 | Self::EccSecgP256k1 => true,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    /// The reference's table of section 1.2, without the algorithms that the double does not have.
    #[test]
    fn each_kind_is_wrapped_as_the_table_says() {
        const REGION: &str = "eu-central-1";
        for name in KeySpec::NAMES {
            let spec = KeySpec::parse(name).unwrap();
            for algorithm in WrappingAlgorithm::NAMES {
                for wrapping in WrappingKeySpec::NAMES {
                    let expected = match (*name, *algorithm) {
                        ("SYMMETRIC_DEFAULT" | "HMAC_224" | "HMAC_256" | "HMAC_384" | "HMAC_512", algorithm) => {
                            algorithm.starts_with("RSAES_OAEP")
                        }
                        ("RSA_2048" | "RSA_3072" | "RSA_4096", algorithm) => algorithm.starts_with("RSA_AES_KEY_WRAP"),
                        ("ECC_NIST_P521", "RSAES_OAEP_SHA_256" | "RSAES_OAEP_SHA_1") => *wrapping != "RSA_2048",
                        _ => true,
                    };
                    let (algorithm, wrapping) =
                        (WrappingAlgorithm::parse(algorithm).unwrap(), WrappingKeySpec::parse(wrapping).unwrap());
                    assert_eq!(spec.takes(algorithm, wrapping, REGION), expected, "{name} {algorithm:?} {wrapping:?}");
                    assert_eq!(
                        spec.takes(algorithm, wrapping, "cn-north-1"),
                        expected && !algorithm.is_hybrid(),
                        "{name} {algorithm:?} {wrapping:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn material_is_either_of_one_length_or_a_pair() {
        for name in KeySpec::NAMES {
            let spec = KeySpec::parse(name).unwrap();
            assert_eq!(spec.material_length("eu-central-1").is_none(), spec.is_pair(), "{name}");
            assert_eq!(spec.signing().is_empty(), !spec.is_pair(), "{name}");
        }
        assert_eq!(KeySpec::SymmetricDefault.material_length("cn-northwest-1"), Some(16));
        assert_eq!(KeySpec::Hmac256.material_length("cn-northwest-1"), Some(32));
    }
}
