//! Wraps material under the public key that AWS hands out. Pure computation.

use crate::job::{Wrapping, WrappingAlgorithm, WrappingKeySpec};
use aes_kw::KwpAes256;
use aes_kw::cipher::KeyInit as _;
use rsa::pkcs8::{DecodePublicKey as _, EncodePublicKey as _};
use rsa::traits::PublicKeyParts as _;
use rsa::{BoxedUint, PublicKey};
use sha1::Sha1;
use sha2::Sha256;
use zeroize::Zeroizing;

/// RFC 5649, 3: KWP pads to whole semiblocks and puts one before them.
const SEMIBLOCK_BYTES: usize = 8;

/// Why material cannot be wrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WrapError {
    /// Not a DER `SubjectPublicKeyInfo` of an RSA key.
    #[error("AWS's public key is not an RSA SubjectPublicKeyInfo")]
    NotAPublicKey,
    /// The modulus is not of the size that was asked for.
    #[error("AWS's public key is not of the size that was asked for")]
    WrongModulus,
    /// More bytes than the wrapping carries under this key.
    #[error("the material does not fit the wrapping key")]
    TooLong,
    /// No randomness for the padding or the AES key.
    #[error("the operating system gave no random bytes")]
    Random,
}

/// Wraps `material` so that AWS's private key opens it.
///
/// `public_key` is the DER `SubjectPublicKeyInfo` of `GetParametersForImport`.
///
/// - RSAES-OAEP: one block of the modulus's size; OAEP and MGF1 use the same hash and the label is empty (RFC 8017, 7.1).
/// - RSA-AES key wrap: a fresh AES-256 key under OAEP, then the material under that key by RFC 5649, which adds 8 bytes to
///   the next multiple of 8. It is the layout of PKCS#11's `CKM_RSA_AES_KEY_WRAP`.
///
/// Both as AWS's KMS Developer Guide has it, "Encrypt the key material".
pub fn wrap(material: &[u8], public_key: &[u8], wrapping: Wrapping) -> Result<Vec<u8>, WrapError> {
    let Wrapping { algorithm, key_spec: spec } = wrapping;
    let key = PublicKey::from_public_key_der(public_key).map_err(|_| WrapError::NotAPublicKey)?;
    // A shorter modulus than the one asked for would weaken the wrap without anybody noticing.
    if key.size() != spec.modulus_bytes() || key.n().bit_width() as usize != 8 * spec.modulus_bytes() {
        return Err(WrapError::WrongModulus);
    }
    match algorithm {
        WrappingAlgorithm::OaepSha256 | WrappingAlgorithm::OaepSha1 => oaep(material, &key, algorithm),
        WrappingAlgorithm::RsaAesSha256 | WrappingAlgorithm::RsaAesSha1 => {
            let mut aes_key = Zeroizing::new([0; 32]);
            getrandom::fill(&mut *aes_key).map_err(|_| WrapError::Random)?;
            let mut wrapped = oaep(&*aes_key, &key, algorithm)?;
            // The crate's key schedule zeroises itself.
            let kwp = KwpAes256::new((&*aes_key).into());
            let length = material.len().next_multiple_of(SEMIBLOCK_BYTES) + SEMIBLOCK_BYTES;
            // Grown before the material is copied in, to be encrypted in place.
            wrapped.resize(spec.modulus_bytes() + length, 0);
            kwp.wrap_key(material, &mut wrapped[spec.modulus_bytes()..]).map_err(|_| WrapError::TooLong)?;
            Ok(wrapped)
        }
    }
}

/// A public key whose private key nobody knows, for wraps of dummy bytes that only show whether sizes fit.
///
/// DER `SubjectPublicKeyInfo`. The modulus is a random odd number and no product of two primes: it keeps no secret.
pub fn throw_away_public_key(spec: WrappingKeySpec) -> Result<Vec<u8>, WrapError> {
    let mut modulus = vec![0; spec.modulus_bytes()];
    getrandom::fill(&mut modulus).map_err(|_| WrapError::Random)?;
    if let [first, .., last] = modulus.as_mut_slice() {
        *first |= 0x80;
        *last |= 1;
    }
    let key = PublicKey::new(BoxedUint::from_be_slice_vartime(&modulus), BoxedUint::from(65537_u64));
    let der = key.map_err(|_| WrapError::NotAPublicKey)?.to_public_key_der();
    Ok(der.map_err(|_| WrapError::NotAPublicKey)?.into_vec())
}

/// One OAEP block with the hash of the algorithm.
fn oaep(text: &[u8], key: &PublicKey, algorithm: WrappingAlgorithm) -> Result<Vec<u8>, WrapError> {
    let block = match algorithm {
        WrappingAlgorithm::OaepSha256 | WrappingAlgorithm::RsaAesSha256 => key.oaep_encrypt::<Sha256>(text),
        WrappingAlgorithm::OaepSha1 | WrappingAlgorithm::RsaAesSha1 => key.oaep_encrypt::<Sha1>(text),
    };
    block.map_err(|error| if matches!(error, rsa::Error::Rng) { WrapError::Random } else { WrapError::TooLong })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{KeyKind, Partition, Shape};
    use aes_kw::{KwpAes192, KwpAes256};
    use aws_lc_rs::encoding::AsDer as _;
    use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrapPadded as _};
    use aws_lc_rs::rsa::{OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, PrivateDecryptingKey};

    /// A wrapping key whose private half another implementation holds than the one that wraps.
    struct Opener {
        private: OaepPrivateDecryptingKey,
        public: Vec<u8>,
        modulus: usize,
    }

    impl Opener {
        fn new(spec: WrappingKeySpec) -> Self {
            let pkcs8: &[u8] = match spec {
                WrappingKeySpec::Rsa2048 => include_bytes!("../tests/fixtures/material/rsa_2048.der"),
                WrappingKeySpec::Rsa3072 => include_bytes!("../tests/fixtures/material/rsa_3072.der"),
                WrappingKeySpec::Rsa4096 => include_bytes!("../tests/fixtures/material/rsa_4096.der"),
            };
            let private = PrivateDecryptingKey::from_pkcs8(pkcs8).unwrap();
            let public = private.public_key().as_der().unwrap().as_ref().to_vec();
            let private = OaepPrivateDecryptingKey::new(private).unwrap();
            Self { private, public, modulus: spec.modulus_bytes() }
        }

        fn open(&self, algorithm: WrappingAlgorithm, wrapped: &[u8]) -> Vec<u8> {
            let (oaep, is_hybrid) = match algorithm {
                WrappingAlgorithm::OaepSha256 => (&OAEP_SHA256_MGF1SHA256, false),
                WrappingAlgorithm::OaepSha1 => (&OAEP_SHA1_MGF1SHA1, false),
                WrappingAlgorithm::RsaAesSha256 => (&OAEP_SHA256_MGF1SHA256, true),
                WrappingAlgorithm::RsaAesSha1 => (&OAEP_SHA1_MGF1SHA1, true),
            };
            let (block, rest) = wrapped.split_at(self.modulus);
            let mut output = vec![0; self.modulus];
            let opened = self.private.decrypt(oaep, block, &mut output, None).unwrap();
            if !is_hybrid {
                assert!(rest.is_empty());
                return opened.to_vec();
            }
            let mut output = vec![0; rest.len()];
            AesKek::new(&AES_256, opened).unwrap().unwrap_with_padding(rest, &mut output).unwrap().to_vec()
        }
    }

    fn material(kind: KeyKind) -> Vec<u8> {
        match kind {
            KeyKind::Rsa2048 => include_bytes!("../tests/fixtures/material/rsa_2048.der").to_vec(),
            KeyKind::Rsa3072 => include_bytes!("../tests/fixtures/material/rsa_3072.der").to_vec(),
            KeyKind::Rsa4096 => include_bytes!("../tests/fixtures/material/rsa_4096.der").to_vec(),
            KeyKind::EccNistP256 => include_bytes!("../tests/fixtures/material/p256.der").to_vec(),
            KeyKind::EccNistP384 => include_bytes!("../tests/fixtures/material/p384.der").to_vec(),
            KeyKind::EccNistP521 => include_bytes!("../tests/fixtures/material/p521.der").to_vec(),
            KeyKind::EccSecgP256k1 => include_bytes!("../tests/fixtures/material/secp256k1.der").to_vec(),
            _ => match kind.shape() {
                Shape::Bytes(length) => (1..).take(length).collect(),
                shape => panic!("{kind} is {shape}"),
            },
        }
    }

    #[test]
    fn an_independent_implementation_opens_every_kind_wrapped_in_every_legal_way() {
        let openers = WrappingKeySpec::ALL.map(|spec| (spec, Opener::new(spec)));
        for kind in KeyKind::ALL {
            let material = &material(kind);
            for wrapping in Wrapping::legal(kind, Partition::Standard) {
                let (_, opener) = openers.iter().find(|(spec, _)| *spec == wrapping.key_spec).unwrap();
                let wrapped = wrap(material, &opener.public, wrapping).unwrap();
                let expected = match wrapping.algorithm {
                    WrappingAlgorithm::OaepSha256 | WrappingAlgorithm::OaepSha1 => opener.modulus,
                    _ => opener.modulus + material.len().next_multiple_of(8) + 8,
                };
                assert_eq!(wrapped.len(), expected, "{kind} {wrapping:?}");
                assert_eq!(&opener.open(wrapping.algorithm, &wrapped), material, "{kind} {wrapping:?}");
                // ImportKeyMaterial takes no more.
                assert!(wrapped.len() <= 6144);
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for spec in WrappingKeySpec::ALL {
            let public_key = throw_away_public_key(spec).unwrap();
            for (algorithm, hash) in [(WrappingAlgorithm::OaepSha256, 32), (WrappingAlgorithm::OaepSha1, 20)] {
                let wrapping = Wrapping { algorithm, key_spec: spec };
                // RFC 8017, 7.1.1.
                let longest = spec.modulus_bytes() - 2 * hash - 2;
                assert!(wrap(&vec![1; longest], &public_key, wrapping).is_ok());
                assert_eq!(wrap(&vec![1; longest + 1], &public_key, wrapping), Err(WrapError::TooLong));
            }
        }
    }

    #[test]
    fn a_key_of_another_size_or_of_no_size_is_refused() {
        let wrapping = |key_spec| Wrapping { algorithm: WrappingAlgorithm::RsaAesSha256, key_spec };
        for spec in WrappingKeySpec::ALL {
            let public_key = throw_away_public_key(spec).unwrap();
            for other in WrappingKeySpec::ALL {
                let outcome = wrap(&[1; 32], &public_key, wrapping(other));
                assert_eq!(outcome.err(), (other != spec).then_some(WrapError::WrongModulus));
            }
        }
        let outcome = wrap(&[1; 32], b"garbage", wrapping(WrappingKeySpec::Rsa4096));
        assert_eq!(outcome, Err(WrapError::NotAPublicKey));
    }

    #[test]
    fn two_wraps_have_nothing_in_common() {
        let public_key = throw_away_public_key(WrappingKeySpec::Rsa2048).unwrap();
        let wrapping = Wrapping { algorithm: WrappingAlgorithm::RsaAesSha1, key_spec: WrappingKeySpec::Rsa2048 };
        let [one, other] = [(); 2].map(|()| wrap(&[7; 138], &public_key, wrapping).unwrap());
        assert!(one[..256] != other[..256] && one[256..] != other[256..]);
        assert_ne!(public_key, throw_away_public_key(WrappingKeySpec::Rsa2048).unwrap());
    }

    /// RFC 5649, 6: its examples have a 192-bit key.
    #[test]
    fn key_wrap_with_padding_gives_the_examples_of_its_rfc() {
        let kwp = KwpAes192::new_from_slice(&hex::decode("5840df6e29b02af1ab493b705bf16ea1ae8338f4dcc176a8").unwrap());
        for (key, wrapped) in [
            (
                "c37b7e6492584340bed12207808941155068f738",
                "138bdeaa9b8fa7fc61f97742e72248ee5ae6ae5360d1ae6a5f54f373fa543b6a",
            ),
            ("466f7250617369", "afbeb0f07dfbf5419200f2ccb50bb24f"),
        ] {
            let mut output = [0; 64];
            let given = kwp.as_ref().unwrap().wrap_key(&hex::decode(key).unwrap(), &mut output).unwrap();
            assert_eq!(hex::encode(given), wrapped);
        }
    }

    #[test]
    fn key_wrap_with_padding_gives_what_wycheproof_expects() {
        let vectors = include_str!("../tests/fixtures/aes_256_kwp.txt");
        let mut count = 0;
        for line in vectors.lines().filter(|line| !line.starts_with('#')) {
            let fields: Vec<&str> = line.split(' ').collect();
            let [case, key, message, expected] = fields[..] else { panic!("{line}") };
            let mut output = [0; 512];
            let kwp = KwpAes256::new_from_slice(&hex::decode(key).unwrap()).unwrap();
            let given = kwp.wrap_key(&hex::decode(message).unwrap(), &mut output).unwrap();
            assert_eq!(hex::encode(given), expected, "test case {case}");
            count += 1;
        }
        assert_eq!(count, 25);
    }

    /// What a broken tag or padding must not open, the two implementations open neither.
    #[test]
    fn key_wrap_with_padding_gives_and_refuses_what_nist_expects() {
        let vectors = include_str!("../tests/fixtures/aes_256_kwp_nist.txt");
        let mut counts = [0; 3];
        for line in vectors.lines().filter(|line| !line.starts_with('#')) {
            let fields: Vec<&str> = line.split(' ').collect();
            let [case, key, message, wrapped] = fields[..] else { panic!("{line}") };
            let (key, mut output) = (hex::decode(key).unwrap(), [0; 1024]);
            let kwp = KwpAes256::new_from_slice(&key).unwrap();
            let wrapped = hex::decode(wrapped).unwrap();
            let kek = AesKek::new(&AES_256, &key).unwrap();
            match (&case[..2], message) {
                ("AE", message) => {
                    let given = kwp.wrap_key(&hex::decode(message).unwrap(), &mut output).unwrap();
                    assert_eq!(given, wrapped, "test case {case}");
                    counts[0] += 1;
                }
                (_, "FAIL") => {
                    assert!(kwp.unwrap_key(&wrapped, &mut output).is_err(), "test case {case}");
                    assert!(kek.unwrap_with_padding(&wrapped, &mut output).is_err(), "test case {case}");
                    counts[1] += 1;
                }
                (_, message) => {
                    let message = hex::decode(message).unwrap();
                    assert_eq!(kwp.unwrap_key(&wrapped, &mut output).unwrap(), message, "test case {case}");
                    assert_eq!(kek.unwrap_with_padding(&wrapped, &mut output).unwrap(), message, "test case {case}");
                    counts[2] += 1;
                }
            }
        }
        assert_eq!(counts, [10, 10, 5]);
    }
}
