//! Key kinds, wrapping algorithms and wrapping key specs, and which go together.

use std::fmt;

/// The kind of a KMS key that can hold imported material, named as AWS's `KeySpec`.
///
/// Key pairs (RSA, ECC) come later; a job for one fails with `key_kind_not_supported`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyKind {
    /// AES-256: exactly 32 bytes.
    SymmetricDefault,
    /// HMAC with SHA-224: exactly 28 bytes.
    Hmac224,
    /// HMAC with SHA-256: exactly 32 bytes.
    Hmac256,
    /// HMAC with SHA-384: exactly 48 bytes.
    Hmac384,
    /// HMAC with SHA-512: exactly 64 bytes.
    Hmac512,
}

impl KeyKind {
    /// Every kind, in AWS's order.
    pub const ALL: [Self; 5] = [Self::SymmetricDefault, Self::Hmac224, Self::Hmac256, Self::Hmac384, Self::Hmac512];

    /// Reads AWS's name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }

    /// AWS's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SymmetricDefault => "SYMMETRIC_DEFAULT",
            Self::Hmac224 => "HMAC_224",
            Self::Hmac256 => "HMAC_256",
            Self::Hmac384 => "HMAC_384",
            Self::Hmac512 => "HMAC_512",
        }
    }

    /// Length of the material in bytes.
    ///
    /// AWS's pages disagree whether HMAC keys may be longer than their spec; the spec's own length is
    /// accepted by both ("Create a KMS key with imported key material", "Encrypt the key material").
    pub fn material_bytes(self) -> usize {
        match self {
            Self::SymmetricDefault | Self::Hmac256 => 32,
            Self::Hmac224 => 28,
            Self::Hmac384 => 48,
            Self::Hmac512 => 64,
        }
    }

    /// Whether AWS gives materials of this key an id and lets a key have several.
    pub fn has_material_ids(self) -> bool {
        self == Self::SymmetricDefault
    }

    /// The word of the result's `key_type`.
    pub fn key_type(self) -> &'static str {
        match self {
            Self::SymmetricDefault => "symmetric",
            _ => "hmac",
        }
    }

    /// Whether AWS accepts material of this kind wrapped so
    /// ("Encrypt the key material", table of wrapping algorithms).
    pub fn allows(self, algorithm: WrappingAlgorithm) -> bool {
        match self {
            Self::SymmetricDefault | Self::Hmac224 | Self::Hmac256 | Self::Hmac384 | Self::Hmac512 => {
                matches!(algorithm, WrappingAlgorithm::OaepSha256 | WrappingAlgorithm::OaepSha1)
            }
        }
    }
}

impl fmt::Display for KeyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How material is wrapped, named as AWS's `WrappingAlgorithm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WrappingAlgorithm {
    /// RSAES-OAEP with SHA-256 and MGF1-SHA-256.
    OaepSha256,
    /// RSAES-OAEP with SHA-1 and MGF1-SHA-1.
    OaepSha1,
    /// An AES key under OAEP (SHA-256), the material under the AES key (RFC 5649).
    RsaAesSha256,
    /// The same with SHA-1.
    RsaAesSha1,
}

impl WrappingAlgorithm {
    const ALL: [Self; 4] = [Self::OaepSha256, Self::OaepSha1, Self::RsaAesSha256, Self::RsaAesSha1];

    /// Reads AWS's name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.as_str() == name)
    }

    /// AWS's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::OaepSha256 => "RSAES_OAEP_SHA_256",
            Self::OaepSha1 => "RSAES_OAEP_SHA_1",
            Self::RsaAesSha256 => "RSA_AES_KEY_WRAP_SHA_256",
            Self::RsaAesSha1 => "RSA_AES_KEY_WRAP_SHA_1",
        }
    }
}

/// The wrapping key that AWS is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WrappingKeySpec {
    /// 2048-bit modulus.
    Rsa2048,
    /// 3072-bit modulus.
    Rsa3072,
    /// 4096-bit modulus.
    Rsa4096,
}

impl WrappingKeySpec {
    const ALL: [Self; 3] = [Self::Rsa2048, Self::Rsa3072, Self::Rsa4096];

    /// Reads AWS's name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|spec| spec.as_str() == name)
    }

    /// AWS's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rsa2048 => "RSA_2048",
            Self::Rsa3072 => "RSA_3072",
            Self::Rsa4096 => "RSA_4096",
        }
    }

    /// Size of the modulus in bytes, which is the size of a wrapped block.
    pub fn modulus_bytes(self) -> usize {
        match self {
            Self::Rsa2048 => 256,
            Self::Rsa3072 => 384,
            Self::Rsa4096 => 512,
        }
    }
}

/// What is used when the request does not choose: the strongest that AWS allows for the kind.
pub fn strongest_wrapping(kind: KeyKind) -> (WrappingAlgorithm, WrappingKeySpec) {
    let algorithm = WrappingAlgorithm::ALL
        .into_iter()
        .find(|algorithm| kind.allows(*algorithm))
        .unwrap_or(WrappingAlgorithm::OaepSha256);
    (algorithm, WrappingKeySpec::Rsa4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for kind in KeyKind::ALL {
            assert_eq!(KeyKind::parse(kind.as_str()), Some(kind));
        }
        for algorithm in WrappingAlgorithm::ALL {
            assert_eq!(WrappingAlgorithm::parse(algorithm.as_str()), Some(algorithm));
        }
        assert_eq!(WrappingAlgorithm::parse("RSAES_PKCS1_V1_5"), None);
    }

    #[test]
    fn the_default_wrap_is_allowed_and_fits() {
        for kind in KeyKind::ALL {
            let (algorithm, spec) = strongest_wrapping(kind);
            assert_eq!(algorithm, WrappingAlgorithm::OaepSha256);
            assert!(kind.allows(algorithm));
            assert!(kind.material_bytes() <= spec.modulus_bytes() - 2 * 32 - 2);
            assert!(!kind.allows(WrappingAlgorithm::RsaAesSha256));
        }
    }
}
