//! Wraps material under the public key that AWS hands out. Pure computation.

use crate::job::{Wrapping, WrappingAlgorithm};
use rsa::PublicKey;
use rsa::pkcs8::DecodePublicKey as _;
use rsa::traits::PublicKeyParts as _;
use sha1::Sha1;
use sha2::Sha256;

/// Why material cannot be wrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WrapError {
    /// Not a DER `SubjectPublicKeyInfo` of an RSA key.
    #[error("AWS's public key is not an RSA SubjectPublicKeyInfo")]
    NotAPublicKey,
    /// The modulus is not of the size that was asked for.
    #[error("AWS's public key is not of the size that was asked for")]
    WrongModulus,
    /// More bytes than OAEP carries under this key.
    #[error("the material does not fit the wrapping key")]
    TooLong,
    /// Not carried out for the key kinds of this version.
    #[error("the wrapping algorithm is not available")]
    Unavailable,
}

/// Wraps `material` so that AWS's private key opens it.
///
/// `public_key` is the DER `SubjectPublicKeyInfo` of `GetParametersForImport`. For RSAES-OAEP the answer
/// is one block of the modulus's size; OAEP and MGF1 use the same hash and the label is empty
/// (AWS KMS Developer Guide, "Encrypt the key material"; RFC 8017, 7.1).
pub fn wrap(material: &[u8], public_key: &[u8], wrapping: Wrapping) -> Result<Vec<u8>, WrapError> {
    let Wrapping { algorithm, key_spec: spec } = wrapping;
    let key = PublicKey::from_public_key_der(public_key).map_err(|_| WrapError::NotAPublicKey)?;
    // A shorter modulus than the one asked for would weaken the wrap without anybody noticing.
    if key.size() != spec.modulus_bytes() || key.n().bit_width() as usize != 8 * spec.modulus_bytes() {
        return Err(WrapError::WrongModulus);
    }
    let wrapped = match algorithm {
        WrappingAlgorithm::OaepSha256 => key.oaep_encrypt::<Sha256>(material),
        WrappingAlgorithm::OaepSha1 => key.oaep_encrypt::<Sha1>(material),
        WrappingAlgorithm::RsaAesSha256 | WrappingAlgorithm::RsaAesSha1 => return Err(WrapError::Unavailable),
    };
    wrapped.map_err(|_| WrapError::TooLong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::WrappingKeySpec;
    use aws_lc_rs::encoding::AsDer as _;
    use aws_lc_rs::rsa::{
        KeySize, OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, PrivateDecryptingKey,
    };

    /// Opened by another implementation than the one that wrapped.
    #[test]
    fn an_independent_implementation_opens_what_was_wrapped() {
        for (size, spec) in [
            (KeySize::Rsa2048, WrappingKeySpec::Rsa2048),
            (KeySize::Rsa3072, WrappingKeySpec::Rsa3072),
            (KeySize::Rsa4096, WrappingKeySpec::Rsa4096),
        ] {
            let private = PrivateDecryptingKey::generate(size).unwrap();
            let public = private.public_key().as_der().unwrap();
            for (ours, theirs) in [
                (WrappingAlgorithm::OaepSha256, &OAEP_SHA256_MGF1SHA256),
                (WrappingAlgorithm::OaepSha1, &OAEP_SHA1_MGF1SHA1),
            ] {
                let wrapped = wrap(&[42; 64], public.as_ref(), Wrapping { algorithm: ours, key_spec: spec }).unwrap();
                assert_eq!(wrapped.len(), spec.modulus_bytes());
                let mut plain = vec![0; spec.modulus_bytes()];
                let opener = OaepPrivateDecryptingKey::new(private.clone()).unwrap();
                assert_eq!(opener.decrypt(theirs, &wrapped, &mut plain, None).unwrap(), &[42; 64]);
                let longest = spec.modulus_bytes() - 2 * if ours == WrappingAlgorithm::OaepSha1 { 20 } else { 32 } - 2;
                assert!(wrap(&vec![1; longest], public.as_ref(), Wrapping { algorithm: ours, key_spec: spec }).is_ok());
                assert_eq!(
                    wrap(&vec![1; longest + 1], public.as_ref(), Wrapping { algorithm: ours, key_spec: spec }),
                    Err(WrapError::TooLong)
                );
            }
            for other in [WrappingKeySpec::Rsa2048, WrappingKeySpec::Rsa3072, WrappingKeySpec::Rsa4096] {
                let outcome = wrap(
                    &[1; 32],
                    public.as_ref(),
                    Wrapping { algorithm: WrappingAlgorithm::OaepSha256, key_spec: other },
                );
                assert_eq!(outcome.is_ok(), other == spec);
            }
        }
    }

    #[test]
    fn what_is_no_public_key_is_refused() {
        let outcome = wrap(
            &[1; 32],
            b"garbage",
            Wrapping { algorithm: WrappingAlgorithm::OaepSha256, key_spec: WrappingKeySpec::Rsa4096 },
        );
        assert_eq!(outcome, Err(WrapError::NotAPublicKey));
    }
}
