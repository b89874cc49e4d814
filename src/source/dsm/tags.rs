//! Numbers of the KMIP specification that this client uses (KMIP 1.4, 9.1.3; KMIP 2.0, 11).

use super::ttlv::Tag;

macro_rules! tags {
    ($($name:ident = $number:literal),* $(,)?) => { $(pub(super) const $name: Tag = Tag($number);)* };
}

tags! {
    ATTRIBUTE = 0x42_0008,
    ATTRIBUTE_NAME = 0x42_000A,
    ATTRIBUTE_VALUE = 0x42_000B,
    BATCH_COUNT = 0x42_000D,
    BATCH_ITEM = 0x42_000F,
    BATCH_ORDER_OPTION = 0x42_0010,
    CRYPTOGRAPHIC_ALGORITHM = 0x42_0028,
    CRYPTOGRAPHIC_DOMAIN_PARAMETERS = 0x42_0029,
    CRYPTOGRAPHIC_LENGTH = 0x42_002A,
    CRYPTOGRAPHIC_USAGE_MASK = 0x42_002C,
    D = 0x42_002E,
    KEY = 0x42_003F,
    KEY_BLOCK = 0x42_0040,
    KEY_FORMAT_TYPE = 0x42_0042,
    KEY_MATERIAL = 0x42_0043,
    KEY_VALUE = 0x42_0045,
    KEY_WRAPPING_DATA = 0x42_0046,
    MAXIMUM_ITEMS = 0x42_004F,
    MAXIMUM_RESPONSE_SIZE = 0x42_0050,
    MODULUS = 0x42_0052,
    NAME = 0x42_0053,
    NAME_TYPE = 0x42_0054,
    NAME_VALUE = 0x42_0055,
    OBJECT_TYPE = 0x42_0057,
    OPERATION = 0x42_005C,
    P = 0x42_005E,
    PRIVATE_EXPONENT = 0x42_0063,
    PRIVATE_KEY = 0x42_0064,
    PROTOCOL_VERSION = 0x42_0069,
    PROTOCOL_VERSION_MAJOR = 0x42_006A,
    PROTOCOL_VERSION_MINOR = 0x42_006B,
    PUBLIC_EXPONENT = 0x42_006C,
    Q = 0x42_0071,
    RECOMMENDED_CURVE = 0x42_0075,
    REQUEST_HEADER = 0x42_0077,
    REQUEST_MESSAGE = 0x42_0078,
    REQUEST_PAYLOAD = 0x42_0079,
    RESPONSE_MESSAGE = 0x42_007B,
    RESPONSE_PAYLOAD = 0x42_007C,
    RESULT_MESSAGE = 0x42_007D,
    RESULT_REASON = 0x42_007E,
    RESULT_STATUS = 0x42_007F,
    SECRET_DATA = 0x42_0085,
    STATE = 0x42_008D,
    SYMMETRIC_KEY = 0x42_008F,
    UNIQUE_BATCH_ITEM_ID = 0x42_0093,
    UNIQUE_IDENTIFIER = 0x42_0094,
    ATTRIBUTES = 0x42_0125,
    ATTRIBUTE_REFERENCE = 0x42_013B,
}

/// Object Type.
pub(super) mod object_type {
    pub(in super::super) const CERTIFICATE: u32 = 1;
    pub(in super::super) const SYMMETRIC_KEY: u32 = 2;
    pub(in super::super) const PUBLIC_KEY: u32 = 3;
    pub(in super::super) const PRIVATE_KEY: u32 = 4;
    pub(in super::super) const SPLIT_KEY: u32 = 5;
    pub(in super::super) const SECRET_DATA: u32 = 7;
    pub(in super::super) const OPAQUE_OBJECT: u32 = 8;
}

/// Key Format Type.
pub(super) mod key_format {
    pub(in super::super) const RAW: u32 = 0x01;
    pub(in super::super) const OPAQUE: u32 = 0x02;
    pub(in super::super) const PKCS_1: u32 = 0x03;
    pub(in super::super) const PKCS_8: u32 = 0x04;
    pub(in super::super) const EC_PRIVATE_KEY: u32 = 0x06;
    pub(in super::super) const TRANSPARENT_SYMMETRIC_KEY: u32 = 0x07;
    pub(in super::super) const TRANSPARENT_RSA_PRIVATE_KEY: u32 = 0x0A;
    pub(in super::super) const TRANSPARENT_ECDSA_PRIVATE_KEY: u32 = 0x0E;
    pub(in super::super) const TRANSPARENT_ECDH_PRIVATE_KEY: u32 = 0x10;
    pub(in super::super) const TRANSPARENT_EC_PRIVATE_KEY: u32 = 0x14;
}

/// Cryptographic Algorithm.
pub(super) mod algorithm {
    pub(in super::super) const AES: u32 = 0x03;
    pub(in super::super) const RSA: u32 = 0x04;
    pub(in super::super) const ECDSA: u32 = 0x06;
    pub(in super::super) const HMAC_SHA224: u32 = 0x08;
    pub(in super::super) const HMAC_SHA256: u32 = 0x09;
    pub(in super::super) const HMAC_SHA384: u32 = 0x0A;
    pub(in super::super) const HMAC_SHA512: u32 = 0x0B;
    pub(in super::super) const ECDH: u32 = 0x0E;
    pub(in super::super) const EC: u32 = 0x1A;
    pub(in super::super) const SM4: u32 = 0x2D;

    /// Names of those that are met, for sentences.
    pub(in super::super) const NAMES: &[(u32, &str)] = &[
        (0x01, "DES"),
        (0x02, "3DES"),
        (AES, "AES"),
        (RSA, "RSA"),
        (0x05, "DSA"),
        (ECDSA, "ECDSA"),
        (0x07, "HMAC-SHA1"),
        (HMAC_SHA224, "HMAC-SHA224"),
        (HMAC_SHA256, "HMAC-SHA256"),
        (HMAC_SHA384, "HMAC-SHA384"),
        (HMAC_SHA512, "HMAC-SHA512"),
        (0x0C, "HMAC-MD5"),
        (0x0D, "DH"),
        (ECDH, "ECDH"),
        (0x12, "Camellia"),
        (EC, "EC"),
        (0x1C, "ChaCha20"),
        (0x29, "ARIA"),
        (0x2B, "SM2"),
        (SM4, "SM4"),
        (0x37, "Ed25519"),
        (0x38, "Ed448"),
    ];
}

/// Recommended Curve, those that AWS takes.
pub(super) mod curve {
    pub(in super::super) const P_256: u32 = 0x07;
    pub(in super::super) const P_384: u32 = 0x0A;
    pub(in super::super) const P_521: u32 = 0x0D;
    pub(in super::super) const SECP256K1: u32 = 0x19;
}

/// Bits of the Cryptographic Usage Mask (KMIP 1.4, 9.1.3.3.1; KMIP 2.0, 11.9).
pub(super) mod usage {
    pub(in super::super) const SIGN: u32 = 0x0000_0001;
    pub(in super::super) const VERIFY: u32 = 0x0000_0002;
    pub(in super::super) const ENCRYPT: u32 = 0x0000_0004;
    pub(in super::super) const DECRYPT: u32 = 0x0000_0008;
    pub(in super::super) const WRAP_KEY: u32 = 0x0000_0010;
    pub(in super::super) const UNWRAP_KEY: u32 = 0x0000_0020;
    pub(in super::super) const EXPORT: u32 = 0x0000_0040;
    pub(in super::super) const MAC_GENERATE: u32 = 0x0000_0080;
    pub(in super::super) const MAC_VERIFY: u32 = 0x0000_0100;
    pub(in super::super) const KEY_AGREEMENT: u32 = 0x0000_0800;
    pub(in super::super) const CERTIFICATE_SIGN: u32 = 0x0000_1000;
    pub(in super::super) const CRL_SIGN: u32 = 0x0000_2000;
    pub(in super::super) const UNRESTRICTED: u32 = 0x0020_0000;
}
