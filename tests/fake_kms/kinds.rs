//! The closed vocabularies of the KMS interface: operations, key specs, wrapping algorithms and so on.
//!
//! Every one is parsed from and printed as AWS's own text, so that nothing else in this program compares strings.

use std::time::Duration;

/// Declares an enumeration whose variants have AWS's names.
macro_rules! named {
    ($(#[$meta:meta])* $name:ident { $($variant:ident = $text:literal),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs, reason = "the variants are AWS's own names")]
        pub enum $name { $($variant),* }

        impl $name {
            /// Every value, in AWS's order; used for the texts of validation errors.
            pub const NAMES: &'static [&'static str] = &[$($text),*];

            /// AWS's text for this value.
            #[allow(dead_code, reason = "not every enumeration is printed")]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
            }

            /// The value that AWS's text stands for.
            pub fn parse(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$variant),)* _ => None }
            }
        }

        impl Choice for $name {
            const NAMES: &'static [&'static str] = Self::NAMES;
            fn choose(text: &str) -> Option<Self> { Self::parse(text) }
        }
    };
}

/// What the request parser needs to know about an enumeration.
pub trait Choice: Sized {
    /// Every accepted text.
    const NAMES: &'static [&'static str];
    /// The value behind a text.
    fn choose(text: &str) -> Option<Self>;
}

named! {
    /// The operations this double answers.
    Operation {
        CreateKey = "CreateKey",
        DescribeKey = "DescribeKey",
        GetParametersForImport = "GetParametersForImport",
        ImportKeyMaterial = "ImportKeyMaterial",
        DeleteImportedKeyMaterial = "DeleteImportedKeyMaterial",
        ListKeyRotations = "ListKeyRotations",
        RotateKeyOnDemand = "RotateKeyOnDemand",
        GetKeyRotationStatus = "GetKeyRotationStatus",
        GetPublicKey = "GetPublicKey",
        ScheduleKeyDeletion = "ScheduleKeyDeletion",
        CancelKeyDeletion = "CancelKeyDeletion",
        EnableKey = "EnableKey",
        DisableKey = "DisableKey",
        ListKeys = "ListKeys",
        Encrypt = "Encrypt",
        Decrypt = "Decrypt",
        GenerateMac = "GenerateMac",
        VerifyMac = "VerifyMac",
        Sign = "Sign",
        Verify = "Verify",
        ListResourceTags = "ListResourceTags",
        GetKeyPolicy = "GetKeyPolicy",
        ListAliases = "ListAliases",
        AssumeRole = "AssumeRole",
        GetCallerIdentity = "GetCallerIdentity",
    }
}

impl Operation {
    /// Whether it changes a key that exists.
    pub fn changes_a_key(self) -> bool {
        matches!(
            self,
            Self::ImportKeyMaterial
                | Self::DeleteImportedKeyMaterial
                | Self::RotateKeyOnDemand
                | Self::ScheduleKeyDeletion
                | Self::CancelKeyDeletion
                | Self::EnableKey
                | Self::DisableKey
        )
    }

    /// Whether it is one of STS, not of KMS.
    pub fn is_of_sts(self) -> bool {
        matches!(self, Self::AssumeRole | Self::GetCallerIdentity)
    }
}

named! {
    /// The key specs this double can hold; what each of them is stands in [`crate::specs`].
    KeySpec {
        SymmetricDefault = "SYMMETRIC_DEFAULT",
        Hmac224 = "HMAC_224",
        Hmac256 = "HMAC_256",
        Hmac384 = "HMAC_384",
        Hmac512 = "HMAC_512",
        Rsa2048 = "RSA_2048",
        Rsa3072 = "RSA_3072",
        Rsa4096 = "RSA_4096",
        EccNistP256 = "ECC_NIST_P256",
        EccNistP384 = "ECC_NIST_P384",
        EccNistP521 = "ECC_NIST_P521",
        EccSecgP256k1 = "ECC_SECG_P256K1",
    }
}

named! {
    /// What a key may be used for; fixed by its spec, except for RSA and the curves of NIST.
    KeyUsage {
        EncryptDecrypt = "ENCRYPT_DECRYPT",
        GenerateVerifyMac = "GENERATE_VERIFY_MAC",
        SignVerify = "SIGN_VERIFY",
        KeyAgreement = "KEY_AGREEMENT",
    }
}

named! {
    /// Where a key's material comes from.
    Origin { AwsKms = "AWS_KMS", External = "EXTERNAL" }
}

named! {
    /// `KeyState` as `DescribeKey` reports it.
    KeyState {
        Enabled = "Enabled",
        Disabled = "Disabled",
        PendingDeletion = "PendingDeletion",
        PendingImport = "PendingImport",
    }
}

named! {
    /// How key material is wrapped for the way to KMS.
    WrappingAlgorithm {
        OaepSha256 = "RSAES_OAEP_SHA_256",
        OaepSha1 = "RSAES_OAEP_SHA_1",
        AesKeyWrapSha256 = "RSA_AES_KEY_WRAP_SHA_256",
        AesKeyWrapSha1 = "RSA_AES_KEY_WRAP_SHA_1",
    }
}

named! {
    /// The RSA key that wraps key material for the way to KMS.
    WrappingKeySpec { Rsa2048 = "RSA_2048", Rsa3072 = "RSA_3072", Rsa4096 = "RSA_4096" }
}

named! {
    /// Whether imported material expires.
    ExpirationModel { Expires = "KEY_MATERIAL_EXPIRES", DoesNotExpire = "KEY_MATERIAL_DOES_NOT_EXPIRE" }
}

named! {
    /// Whether an import brings new material or material that the key had before.
    ImportType { New = "NEW_KEY_MATERIAL", Existing = "EXISTING_KEY_MATERIAL" }
}

named! {
    /// Which materials `ListKeyRotations` lists.
    IncludeKeyMaterial { All = "ALL_KEY_MATERIAL", RotationsOnly = "ROTATIONS_ONLY" }
}

named! {
    /// What a material is to its key.
    Role {
        Current = "CURRENT",
        NonCurrent = "NON_CURRENT",
        PendingRotation = "PENDING_ROTATION",
        PendingReplicas = "PENDING_MULTI_REGION_IMPORT_AND_ROTATION",
    }
}

named! {
    /// The MAC algorithms of HMAC keys.
    MacAlgorithm {
        Sha224 = "HMAC_SHA_224",
        Sha256 = "HMAC_SHA_256",
        Sha384 = "HMAC_SHA_384",
        Sha512 = "HMAC_SHA_512",
    }
}

named! {
    /// The signature algorithms of key pairs, in the order in which AWS lists them.
    SigningAlgorithm {
        Pkcs1Sha256 = "RSASSA_PKCS1_V1_5_SHA_256",
        Pkcs1Sha384 = "RSASSA_PKCS1_V1_5_SHA_384",
        Pkcs1Sha512 = "RSASSA_PKCS1_V1_5_SHA_512",
        PssSha256 = "RSASSA_PSS_SHA_256",
        PssSha384 = "RSASSA_PSS_SHA_384",
        PssSha512 = "RSASSA_PSS_SHA_512",
        EcdsaSha256 = "ECDSA_SHA_256",
        EcdsaSha384 = "ECDSA_SHA_384",
        EcdsaSha512 = "ECDSA_SHA_512",
    }
}

named! {
    /// Whether what is to be signed is the message, or its digest.
    MessageType { Raw = "RAW", Digest = "DIGEST" }
}

impl Role {
    /// Whether the material waits for its rotation. Such material is not yet tied to the key.
    pub fn is_pending(self) -> bool {
        matches!(self, Self::PendingRotation | Self::PendingReplicas)
    }
}

impl WrappingAlgorithm {
    /// Whether the RSA part carries a one-time AES key instead of the material itself.
    pub fn is_hybrid(self) -> bool {
        matches!(self, Self::AesKeyWrapSha256 | Self::AesKeyWrapSha1)
    }
}

impl WrappingKeySpec {
    /// The length of the modulus, which is the length of an OAEP ciphertext.
    pub fn modulus_length(self) -> usize {
        match self {
            Self::Rsa2048 => 256,
            Self::Rsa3072 => 384,
            Self::Rsa4096 => 512,
        }
    }
}

/// Milliseconds since 1970 by the double's own clock.
pub type Millis = i64;

/// One day.
pub const DAY: Millis = 86_400_000;

/// An instant as AWS's JSON prints it: seconds since 1970, with a fraction.
pub fn epoch_seconds(at: Millis) -> serde_json::Value {
    let at = Duration::from_millis(u64::try_from(at).unwrap_or(0));
    if at.subsec_millis() == 0 { at.as_secs().into() } else { at.as_secs_f64().into() }
}

/// An instant as AWS's JSON reads it; what lies before 1970 counts as 1970.
pub fn from_epoch_seconds(seconds: f64) -> Millis {
    Duration::try_from_secs_f64(seconds).map_or(0, |at| i64::try_from(at.as_millis()).unwrap_or(i64::MAX))
}

/// An instant as RFC 3339 with milliseconds, for the journal and the control interface.
pub fn rfc3339(at: Millis) -> String {
    let format =
        time::macros::format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    time::OffsetDateTime::from_unix_timestamp_nanos(i128::from(at) * 1_000_000)
        .ok()
        .and_then(|at| at.format(&format).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_agree() {
        for name in Operation::NAMES {
            assert_eq!(Operation::parse(name).map(Operation::name), Some(*name));
        }
        for name in KeySpec::NAMES {
            assert_eq!(KeySpec::parse(name).map(KeySpec::name), Some(*name));
        }
        assert_eq!(KeySpec::parse("ML_DSA_44"), None);
    }

    #[test]
    fn instants_survive_the_wire() {
        assert_eq!(from_epoch_seconds(1_700_000_000.25), 1_700_000_000_250);
        assert_eq!(from_epoch_seconds(-1.0), 0);
        assert_eq!(epoch_seconds(1_700_000_000_000), serde_json::json!(1_700_000_000));
        assert_eq!(rfc3339(1_700_000_000_250), "2023-11-14T22:13:20.250Z");
    }
}
