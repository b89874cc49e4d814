//! What can be wrong with material that came from elsewhere: one variant for each cause, said so that it can be mended.

use rsa::pkcs8::ObjectIdentifier;
use std::fmt;

/// Why bytes are not material of a kind. Says what is wrong and what to do; never quotes the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MaterialFault {
    /// Larger than any encoding of any key.
    #[error("the material is longer than 64 KiB, more than any key; is it the right file?")]
    TooLarge,
    /// Raw bytes, and not as many as the kind demands.
    #[error(
        "the material has {given} bytes where exactly {needed} bytes are needed; give the bare bytes of the key, \
         without a line break at the end"
    )]
    WrongLength {
        /// Its length in bytes.
        given: usize,
        /// The kind's length in bytes.
        needed: usize,
    },
    /// PEM text.
    #[error(
        "the material is PEM text; say so (keyferry keys import --encoding pem), or give DER: openssl pkcs8 -topk8 -nocrypt -in key.pem -outform DER -out key.der"
    )]
    Pem,
    /// Text that is not one whole PEM block.
    #[error("the material is not one whole PEM block, from -----BEGIN PRIVATE KEY----- to the end")]
    BrokenPem,
    /// Base64 text of something.
    #[error("the material is base64 text; decode it once more and give the bytes: base64 -d")]
    Base64,
    /// Hex text of something.
    #[error("the material is hex text; decode it once more and give the bytes: xxd -r -p")]
    Hex,
    /// A JSON Web Key (RFC 7517).
    #[error("the material is a JSON Web Key; give the key it holds: PKCS#8 DER of a pair, the bytes of a secret")]
    Jwk,
    /// PKCS#8 under a password.
    #[error(
        "the material is an encrypted PKCS#8 key; take the password off: \
         openssl pkcs8 -inform DER -in key.der -outform DER -out plain.der"
    )]
    Encrypted,
    /// PKCS#12 or PKCS#7: a container.
    #[error(
        "the material is a container (PKCS#12 or PKCS#7); take the private key out: \
         openssl pkcs12 -nocerts -noenc -in key.p12 | openssl pkcs8 -topk8 -nocrypt -outform DER -out key.der"
    )]
    Container,
    /// A bare `RSAPrivateKey` (RFC 8017).
    #[error(
        "the material is a PKCS#1 RSA key; give PKCS#8: \
         openssl pkcs8 -topk8 -nocrypt -inform DER -in key.der -outform DER -out key.p8"
    )]
    Pkcs1,
    /// A bare `ECPrivateKey` (RFC 5915).
    #[error(
        "the material is a SEC 1 EC key; give PKCS#8: \
         openssl pkcs8 -topk8 -nocrypt -inform DER -in key.der -outform DER -out key.p8"
    )]
    Sec1,
    /// A public key, a certificate or a request for one.
    #[error("the material is a public key or a certificate; give the private key as PKCS#8 DER")]
    PublicKey,
    /// BER of indefinite length (X.690, 8.1.3.6).
    #[error(
        "the material is BER of indefinite length; give DER: openssl pkcs8 -topk8 -nocrypt -inform DER -outform DER"
    )]
    IndefiniteLength,
    /// DER with bytes behind it.
    #[error("bytes follow the key in the material; give the PKCS#8 DER alone, without a line break at the end")]
    TrailingBytes,
    /// DER that ends too early.
    #[error("the material ends before its DER does; was the file cut off?")]
    Truncated,
    /// None of the above, and not PKCS#8.
    #[error("the material is not PKCS#8 DER; openssl pkcs8 -topk8 -nocrypt -outform DER makes it of other formats")]
    NotPkcs8,
    /// PKCS#8 around something that is not the key that it announces.
    #[error("the PKCS#8 in the material holds no well-formed private key; export the key again")]
    Malformed,
    /// A private key of another algorithm.
    #[error("the material is a key for {given}, where {needed} is needed; is the kind right?")]
    WrongAlgorithm {
        /// The key's algorithm.
        given: Oid,
        /// The kind's algorithm.
        needed: &'static str,
    },
    /// A private key on another curve.
    #[error("the material is a key on {given}, where {needed} is needed; is the kind right?")]
    WrongCurve {
        /// The key's curve.
        given: Oid,
        /// The kind's curve.
        needed: crate::job::Curve,
    },
    /// A curve written out in numbers.
    #[error(
        "the key spells its curve's parameters out, and AWS takes named curves only: \
         openssl pkey -inform DER -in key.der -ec_param_enc named_curve -outform DER -out named.der"
    )]
    ExplicitCurve,
    /// An EC key that does not say its curve.
    #[error("the key does not name its curve; export it again with a named curve")]
    MissingCurve,
    /// An RSA modulus of another size.
    #[error("the key has a modulus of {given} bits, where {needed} bits are needed; is the kind right?")]
    WrongModulus {
        /// The size of the key's modulus in bits.
        given: usize,
        /// The kind's size in bits.
        needed: usize,
    },
    /// An RSA key of more than two primes.
    #[error("the key is a multi-prime RSA key, and AWS takes keys of two primes only; a new key is needed")]
    MultiPrime,
    /// A public exponent that is even, or below 3, or above 2^33 - 1.
    #[error(
        "the key's public exponent is not an odd number from 3 to 2^33 - 1; a new key is needed, usually with 65537"
    )]
    BadExponent,
    /// An EC private key that is no scalar of its curve.
    #[error("the private key is zero, or not below the order of its curve, or not of its length; export the key again")]
    ScalarOutOfRange,
    /// A public key beside the private key that does not belong to it.
    #[error("the public key in the material does not belong to the private key; export the key again")]
    ForeignPublicKey,
    /// RSA numbers that do not belong together.
    #[error(
        "the key's numbers (n, e, d, p, q and what follows from them) do not belong together; export the key again"
    )]
    Inconsistent,
}

/// An object identifier, shown by the name of what it stands for, where that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Oid(pub(super) ObjectIdentifier);

impl MaterialFault {
    /// A stable word for programs. All begin with `material_`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::TooLarge => "material_too_large",
            Self::WrongLength { .. } => "material_wrong_length",
            Self::Pem => "material_is_pem",
            Self::BrokenPem => "material_not_pem",
            Self::Base64 => "material_is_base64",
            Self::Hex => "material_is_hex",
            Self::Jwk => "material_is_jwk",
            Self::Encrypted => "material_is_encrypted",
            Self::Container => "material_is_container",
            Self::Pkcs1 => "material_is_pkcs1",
            Self::Sec1 => "material_is_sec1",
            Self::PublicKey => "material_is_public_key",
            Self::IndefiniteLength => "material_indefinite_length",
            Self::TrailingBytes => "material_trailing_bytes",
            Self::Truncated => "material_truncated",
            Self::NotPkcs8 => "material_not_pkcs8",
            Self::Malformed => "material_malformed",
            Self::WrongAlgorithm { .. } => "material_wrong_algorithm",
            Self::WrongCurve { .. } => "material_wrong_curve",
            Self::ExplicitCurve => "material_explicit_curve",
            Self::MissingCurve => "material_missing_curve",
            Self::WrongModulus { .. } => "material_wrong_modulus",
            Self::MultiPrime => "material_multi_prime",
            Self::BadExponent => "material_bad_exponent",
            Self::ScalarOutOfRange => "material_scalar_out_of_range",
            Self::ForeignPublicKey => "material_foreign_public_key",
            Self::Inconsistent => "material_inconsistent",
        }
    }
}

impl fmt::Display for Oid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.iter().find(|(oid, _)| *oid == self.0) {
            Some((_, name)) => f.write_str(name),
            None => write!(f, "the object identifier {}", self.0),
        }
    }
}

/// Algorithms and curves of private keys that are met in practice.
const NAMES: &[(ObjectIdentifier, &str)] = &[
    (oid("1.2.840.113549.1.1.1"), "RSA"),
    (oid("1.2.840.113549.1.1.7"), "RSAES-OAEP alone"),
    (oid("1.2.840.113549.1.1.10"), "RSASSA-PSS alone"),
    (oid("1.2.840.10045.2.1"), "elliptic curves"),
    (oid("1.3.132.1.12"), "ECDH alone"),
    (oid("1.2.840.10040.4.1"), "DSA"),
    (oid("1.2.840.113549.1.3.1"), "Diffie-Hellman"),
    (oid("1.2.840.10046.2.1"), "Diffie-Hellman"),
    (oid("1.3.101.110"), "X25519"),
    (oid("1.3.101.111"), "X448"),
    (oid("1.3.101.112"), "Ed25519"),
    (oid("1.3.101.113"), "Ed448"),
    (oid("2.16.840.1.101.3.4.3.17"), "ML-DSA-44"),
    (oid("2.16.840.1.101.3.4.3.18"), "ML-DSA-65"),
    (oid("2.16.840.1.101.3.4.3.19"), "ML-DSA-87"),
    (oid("2.16.840.1.101.3.4.4.1"), "ML-KEM-512"),
    (oid("2.16.840.1.101.3.4.4.2"), "ML-KEM-768"),
    (oid("2.16.840.1.101.3.4.4.3"), "ML-KEM-1024"),
    (oid("1.2.840.10045.3.1.1"), "NIST P-192"),
    (oid("1.3.132.0.33"), "NIST P-224"),
    (oid("1.2.840.10045.3.1.7"), "NIST P-256"),
    (oid("1.3.132.0.34"), "NIST P-384"),
    (oid("1.3.132.0.35"), "NIST P-521"),
    (oid("1.3.132.0.10"), "secp256k1"),
    (oid("1.2.156.10197.1.301"), "SM2"),
    (oid("1.3.36.3.3.2.8.1.1.7"), "brainpoolP256r1"),
    (oid("1.3.36.3.3.2.8.1.1.8"), "brainpoolP256t1"),
    (oid("1.3.36.3.3.2.8.1.1.11"), "brainpoolP384r1"),
    (oid("1.3.36.3.3.2.8.1.1.12"), "brainpoolP384t1"),
    (oid("1.3.36.3.3.2.8.1.1.13"), "brainpoolP512r1"),
    (oid("1.3.36.3.3.2.8.1.1.14"), "brainpoolP512t1"),
];

const fn oid(text: &str) -> ObjectIdentifier {
    ObjectIdentifier::new_unwrap(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_identifier_is_shown_by_its_name() {
        assert_eq!(Oid(oid("1.3.101.112")).to_string(), "Ed25519");
        assert_eq!(Oid(oid("1.3.9999.1")).to_string(), "the object identifier 1.3.9999.1");
    }
}
