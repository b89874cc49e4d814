//! How material is wrapped: algorithms, wrapping keys, and the one table of what AWS takes for which kind.

use super::key_kind::{Curve, KeyKind, Partition, Shape};
use std::fmt;

/// How material is wrapped, named as AWS's `WrappingAlgorithm`.
///
/// `SM2PKE` (China only) is not carried out; `RSAES_PKCS1_V1_5` ended in October 2023.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WrappingAlgorithm {
    /// RSAES-OAEP with SHA-256 and MGF1-SHA-256.
    OaepSha256,
    /// An AES key under OAEP (SHA-256), the material under the AES key (RFC 5649).
    RsaAesSha256,
    /// RSAES-OAEP with SHA-1 and MGF1-SHA-1.
    OaepSha1,
    /// An AES key under OAEP (SHA-1), the material under the AES key (RFC 5649).
    RsaAesSha1,
}

impl WrappingAlgorithm {
    /// Every algorithm, the strongest first.
    pub const ALL: [Self; 4] = [Self::OaepSha256, Self::RsaAesSha256, Self::OaepSha1, Self::RsaAesSha1];

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

    fn is_hybrid(self) -> bool {
        matches!(self, Self::RsaAesSha256 | Self::RsaAesSha1)
    }
}

/// The wrapping key that AWS is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WrappingKeySpec {
    /// 4096-bit modulus.
    Rsa4096,
    /// 3072-bit modulus.
    Rsa3072,
    /// 2048-bit modulus.
    Rsa2048,
}

impl WrappingKeySpec {
    /// Every spec, the strongest first.
    pub const ALL: [Self; 3] = [Self::Rsa4096, Self::Rsa3072, Self::Rsa2048];

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

    /// Size of the modulus in bytes, which is the size of an OAEP block.
    pub fn modulus_bytes(self) -> usize {
        match self {
            Self::Rsa2048 => 256,
            Self::Rsa3072 => 384,
            Self::Rsa4096 => 512,
        }
    }
}

/// An algorithm and a wrapping key that go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Wrapping {
    /// How.
    pub algorithm: WrappingAlgorithm,
    /// Under which key.
    pub key_spec: WrappingKeySpec,
}

/// AWS takes no material of the kind wrapped as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct NoWrapping {
    kind: KeyKind,
    partition: Partition,
}

impl Wrapping {
    /// The strongest that AWS takes for the kind, within what was asked for.
    pub fn choose(
        kind: KeyKind,
        partition: Partition,
        algorithm: Option<WrappingAlgorithm>,
        key_spec: Option<WrappingKeySpec>,
    ) -> Result<Self, NoWrapping> {
        Self::legal(kind, partition)
            .find(|choice| {
                algorithm.is_none_or(|asked| asked == choice.algorithm)
                    && key_spec.is_none_or(|asked| asked == choice.key_spec)
            })
            .ok_or(NoWrapping { kind, partition })
    }

    /// What AWS takes for the kind, the strongest first.
    pub fn legal(kind: KeyKind, partition: Partition) -> impl Iterator<Item = Self> {
        WrappingAlgorithm::ALL
            .into_iter()
            .flat_map(|algorithm| WrappingKeySpec::ALL.map(|key_spec| Self { algorithm, key_spec }))
            .filter(move |choice| choice.is_legal(kind, partition))
    }

    /// The table of "Download the wrapping public key and import token" (AWS KMS Developer Guide): RSA private keys
    /// fit no OAEP block and raw bytes are not taken in a hybrid wrap, P-521 does not fit under `RSA_2048`, and
    /// the China Regions have no hybrid wrap.
    fn is_legal(self, kind: KeyKind, partition: Partition) -> bool {
        match (kind.shape(), self.algorithm.is_hybrid()) {
            (Shape::Bytes(_), hybrid) => !hybrid,
            (Shape::Rsa(_), false) => false,
            (Shape::Ecc(Curve::P521), false) => self.key_spec != WrappingKeySpec::Rsa2048,
            (Shape::Ecc(_), false) => true,
            (Shape::Rsa(_) | Shape::Ecc(_), true) => partition == Partition::Standard,
        }
    }
}

impl fmt::Display for NoWrapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut algorithms: Vec<&str> =
            Wrapping::legal(self.kind, self.partition).map(|choice| choice.algorithm.as_str()).collect();
        algorithms.dedup();
        if algorithms.is_empty() {
            return write!(
                f,
                "the China Regions take {} material wrapped by SM2PKE only, which Keyferry does not carry out",
                self.kind
            );
        }
        let but = match (self.kind.shape(), self.partition) {
            (Shape::Ecc(Curve::P521), Partition::Standard) => ", and RSA_2048 with RSA_AES_KEY_WRAP only",
            (Shape::Ecc(Curve::P521), Partition::China) => ", and not under RSA_2048",
            _ => "",
        };
        write!(
            f,
            "AWS takes {} material wrapped by {} only{but}; leave wrapping_algorithm and wrapping_key_spec out \
             for the strongest",
            self.kind,
            algorithms.join(" or ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use WrappingAlgorithm::{OaepSha1, OaepSha256, RsaAesSha1, RsaAesSha256};
    use WrappingKeySpec::{Rsa2048, Rsa3072, Rsa4096};

    #[test]
    fn names_are_read_back() {
        for algorithm in WrappingAlgorithm::ALL {
            assert_eq!(WrappingAlgorithm::parse(algorithm.as_str()), Some(algorithm));
        }
        for spec in WrappingKeySpec::ALL {
            assert_eq!(WrappingKeySpec::parse(spec.as_str()), Some(spec));
        }
        assert_eq!(WrappingAlgorithm::parse("RSAES_PKCS1_V1_5"), None);
        assert_eq!(WrappingKeySpec::parse("SM2"), None);
    }

    /// The reference's table, line by line: which algorithms, and which specs each.
    #[test]
    fn the_table_is_the_one_that_aws_publishes() {
        let all = WrappingKeySpec::ALL.as_slice();
        let not_2048 = [Rsa4096, Rsa3072].as_slice();
        let legal = |kind, partition| -> Vec<Wrapping> { Wrapping::legal(kind, partition).collect() };
        let table = |lines: &[(WrappingAlgorithm, &[WrappingKeySpec])]| -> Vec<Wrapping> {
            lines
                .iter()
                .flat_map(|(algorithm, specs)| {
                    specs.iter().map(|key_spec| Wrapping { algorithm: *algorithm, key_spec: *key_spec })
                })
                .collect()
        };
        let (standard, china) = (Partition::Standard, Partition::China);
        for kind in KeyKind::ALL {
            let (expected, expected_in_china) = match kind.shape() {
                Shape::Bytes(_) => {
                    let oaep = table(&[(OaepSha256, all), (OaepSha1, all)]);
                    (oaep.clone(), oaep)
                }
                Shape::Rsa(_) => (table(&[(RsaAesSha256, all), (RsaAesSha1, all)]), Vec::new()),
                Shape::Ecc(Curve::P521) => (
                    table(&[(OaepSha256, not_2048), (RsaAesSha256, all), (OaepSha1, not_2048), (RsaAesSha1, all)]),
                    table(&[(OaepSha256, not_2048), (OaepSha1, not_2048)]),
                ),
                Shape::Ecc(_) => (
                    table(&[(OaepSha256, all), (RsaAesSha256, all), (OaepSha1, all), (RsaAesSha1, all)]),
                    table(&[(OaepSha256, all), (OaepSha1, all)]),
                ),
            };
            assert_eq!(legal(kind, standard), expected, "{kind}");
            assert_eq!(legal(kind, china), expected_in_china, "{kind} in China");
        }
    }

    #[test]
    fn what_is_not_asked_for_is_the_strongest_that_goes_with_the_rest() {
        let choose = |kind, algorithm, spec| {
            Wrapping::choose(kind, Partition::Standard, algorithm, spec)
                .map(|choice| (choice.algorithm, choice.key_spec))
        };
        assert_eq!(choose(KeyKind::SymmetricDefault, None, None), Ok((OaepSha256, Rsa4096)));
        assert_eq!(choose(KeyKind::Rsa2048, None, None), Ok((RsaAesSha256, Rsa4096)));
        assert_eq!(choose(KeyKind::EccNistP521, None, Some(Rsa2048)), Ok((RsaAesSha256, Rsa2048)));
        assert_eq!(choose(KeyKind::EccNistP384, Some(OaepSha1), None), Ok((OaepSha1, Rsa4096)));
        let refused = choose(KeyKind::EccNistP521, Some(OaepSha256), Some(Rsa2048)).unwrap_err();
        assert!(refused.to_string().contains("RSA_2048 with RSA_AES_KEY_WRAP only"), "{refused}");
        let refused = choose(KeyKind::Hmac256, Some(RsaAesSha256), None).unwrap_err();
        assert!(refused.to_string().contains("RSAES_OAEP_SHA_256 or RSAES_OAEP_SHA_1 only"), "{refused}");
        let refused = Wrapping::choose(KeyKind::Rsa4096, Partition::China, None, None).unwrap_err();
        assert!(refused.to_string().contains("SM2PKE"), "{refused}");
    }

    /// RFC 8017, 7.1.1: a block carries the modulus less two hashes and two bytes.
    #[test]
    fn what_goes_into_one_block_fits() {
        for kind in KeyKind::ALL {
            // PKCS#8 with the public key, as it is written here.
            let length = match kind.shape() {
                Shape::Bytes(length) => length,
                Shape::Ecc(Curve::P256 | Curve::K256) => 138,
                Shape::Ecc(Curve::P384) => 185,
                Shape::Ecc(Curve::P521) => 241,
                Shape::Rsa(_) => continue,
            };
            for choice in Wrapping::legal(kind, Partition::Standard).filter(|choice| !choice.algorithm.is_hybrid()) {
                let hash = if choice.algorithm == OaepSha1 { 20 } else { 32 };
                assert!(length <= choice.key_spec.modulus_bytes() - 2 * hash - 2, "{kind} {choice:?}");
            }
        }
    }
}
