//! The kinds of key material, and which KMS key takes which.

use std::fmt;

/// A kind of key material. All but [`Self::Sm4`] are named as AWS's `KeySpec`.
///
/// The list is that of "Create a KMS key with imported key material" (AWS KMS Developer Guide). `ML_DSA_*`
/// cannot be imported; for `ML_KEM_*` and `ECC_NIST_EDWARDS25519` it is UNVERIFIED, so they are not here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyKind {
    /// AES-256: exactly 32 bytes.
    SymmetricDefault,
    /// SM4: exactly 16 bytes, what a `SYMMETRIC_DEFAULT` key takes in the China Regions.
    Sm4,
    /// HMAC with SHA-224: exactly 28 bytes.
    Hmac224,
    /// HMAC with SHA-256: exactly 32 bytes.
    Hmac256,
    /// HMAC with SHA-384: exactly 48 bytes.
    Hmac384,
    /// HMAC with SHA-512: exactly 64 bytes.
    Hmac512,
    /// RSA pair with a 2048-bit modulus.
    Rsa2048,
    /// RSA pair with a 3072-bit modulus.
    Rsa3072,
    /// RSA pair with a 4096-bit modulus.
    Rsa4096,
    /// Pair on NIST P-256.
    EccNistP256,
    /// Pair on NIST P-384.
    EccNistP384,
    /// Pair on NIST P-521.
    EccNistP521,
    /// Pair on secp256k1.
    EccSecgP256k1,
}

/// What material of a kind looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Exactly so many raw bytes.
    Bytes(usize),
    /// The PKCS#8 of an RSA private key with a modulus of so many bits.
    Rsa(usize),
    /// The PKCS#8 of a private key on a named curve.
    Ecc(Curve),
}

/// A named curve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Curve {
    /// secp256r1.
    P256,
    /// secp384r1.
    P384,
    /// secp521r1.
    P521,
    /// secp256k1.
    K256,
}

/// Whose rules hold: the China Regions differ in symmetric keys and in wrapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Partition {
    /// `aws-cn`.
    China,
    /// Every other.
    Standard,
}

impl Partition {
    /// From the partition of an ARN.
    pub fn of(name: &str) -> Self {
        if name == "aws-cn" { Self::China } else { Self::Standard }
    }
}

impl KeyKind {
    /// Every kind, in AWS's order.
    pub const ALL: [Self; 13] = [
        Self::SymmetricDefault,
        Self::Sm4,
        Self::Hmac224,
        Self::Hmac256,
        Self::Hmac384,
        Self::Hmac512,
        Self::Rsa2048,
        Self::Rsa3072,
        Self::Rsa4096,
        Self::EccNistP256,
        Self::EccNistP384,
        Self::EccNistP521,
        Self::EccSecgP256k1,
    ];

    /// Reads a kind's name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }

    /// The kind of material that a KMS key takes, by AWS's `KeySpec`; `None`: it takes none.
    pub fn of_key(key_spec: &str, partition: Partition) -> Option<Self> {
        match (Self::parse(key_spec)?, partition) {
            (Self::SymmetricDefault, Partition::China) => Some(Self::Sm4),
            // A name of ours, not of AWS.
            (Self::Sm4, _) => None,
            (kind, _) => Some(kind),
        }
    }

    /// The kind's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SymmetricDefault => "SYMMETRIC_DEFAULT",
            Self::Sm4 => "SM4",
            Self::Hmac224 => "HMAC_224",
            Self::Hmac256 => "HMAC_256",
            Self::Hmac384 => "HMAC_384",
            Self::Hmac512 => "HMAC_512",
            Self::Rsa2048 => "RSA_2048",
            Self::Rsa3072 => "RSA_3072",
            Self::Rsa4096 => "RSA_4096",
            Self::EccNistP256 => "ECC_NIST_P256",
            Self::EccNistP384 => "ECC_NIST_P384",
            Self::EccNistP521 => "ECC_NIST_P521",
            Self::EccSecgP256k1 => "ECC_SECG_P256K1",
        }
    }

    /// What material of this kind looks like.
    ///
    /// AWS's pages disagree whether HMAC keys may be longer than their spec; the spec's own length is
    /// accepted by both ("Create a KMS key with imported key material", "Encrypt the key material").
    pub fn shape(self) -> Shape {
        match self {
            Self::SymmetricDefault | Self::Hmac256 => Shape::Bytes(32),
            Self::Sm4 => Shape::Bytes(16),
            Self::Hmac224 => Shape::Bytes(28),
            Self::Hmac384 => Shape::Bytes(48),
            Self::Hmac512 => Shape::Bytes(64),
            Self::Rsa2048 => Shape::Rsa(2048),
            Self::Rsa3072 => Shape::Rsa(3072),
            Self::Rsa4096 => Shape::Rsa(4096),
            Self::EccNistP256 => Shape::Ecc(Curve::P256),
            Self::EccNistP384 => Shape::Ecc(Curve::P384),
            Self::EccNistP521 => Shape::Ecc(Curve::P521),
            Self::EccSecgP256k1 => Shape::Ecc(Curve::K256),
        }
    }

    /// The longest that material of this kind is, as Keyferry writes it.
    pub fn most_material_bytes(self) -> usize {
        match self.shape() {
            Shape::Bytes(length) => length,
            Shape::Rsa(bits) if bits <= 2048 => 1222,
            Shape::Rsa(bits) if bits <= 3072 => 1798,
            Shape::Rsa(_) => 2378,
            Shape::Ecc(Curve::K256) => 135,
            Shape::Ecc(Curve::P256) => 138,
            Shape::Ecc(Curve::P384) => 185,
            Shape::Ecc(Curve::P521) => 241,
        }
    }

    /// Whether AWS gives materials of this key an id, keeps a description of each and lets a key have several.
    pub fn has_material_ids(self) -> bool {
        matches!(self, Self::SymmetricDefault | Self::Sm4)
    }

    /// Whether it is a pair, whose public key AWS shows.
    pub fn is_pair(self) -> bool {
        !matches!(self.shape(), Shape::Bytes(_))
    }

    /// The word of the result's `key_type`.
    pub fn key_type(self) -> &'static str {
        match self {
            Self::SymmetricDefault | Self::Sm4 => "symmetric",
            Self::Hmac224 | Self::Hmac256 | Self::Hmac384 | Self::Hmac512 => "hmac",
            _ => "asymmetric",
        }
    }
}

impl fmt::Display for KeyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(length) => write!(f, "{length} raw bytes"),
            Self::Rsa(bits) => write!(f, "PKCS#8 DER of an RSA private key of {bits} bits"),
            Self::Ecc(curve) => write!(f, "PKCS#8 DER of a private key on {curve}"),
        }
    }
}

impl fmt::Display for Curve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::P256 => "NIST P-256",
            Self::P384 => "NIST P-384",
            Self::P521 => "NIST P-521",
            Self::K256 => "secp256k1",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for kind in KeyKind::ALL {
            assert_eq!(KeyKind::parse(kind.as_str()), Some(kind));
        }
        assert_eq!(KeyKind::parse("ML_DSA_44"), None);
    }

    #[test]
    fn the_china_regions_take_sm4_where_others_take_aes() {
        let of = KeyKind::of_key;
        assert_eq!(of("SYMMETRIC_DEFAULT", Partition::of("aws")), Some(KeyKind::SymmetricDefault));
        assert_eq!(of("SYMMETRIC_DEFAULT", Partition::of("aws-us-gov")), Some(KeyKind::SymmetricDefault));
        assert_eq!(of("SYMMETRIC_DEFAULT", Partition::of("aws-cn")), Some(KeyKind::Sm4));
        assert_eq!(of("SM4", Partition::China), None);
        assert_eq!(of("SM2", Partition::China), None);
        assert_eq!(of("HMAC_256", Partition::China), Some(KeyKind::Hmac256));
    }
}
