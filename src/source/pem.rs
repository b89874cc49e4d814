//! PKCS#8 in PEM's armour (RFC 7468).

use super::{KeyMaterial, MaterialFault, recognise};
use pem_rfc7468::{Decoder, PemLabel as _};
use rsa::pkcs8::PrivateKeyInfoRef;
use zeroize::Zeroizing;

/// Takes the armour off a single `PRIVATE KEY`. What is inside is read by [`super::PlainKey::parse`].
///
/// Lines may have any one width, and text may stand before the armour but not behind it. Anything else is refused for what
/// it is: a password, an older format, a public key.
pub fn open_pem(text: &[u8]) -> Result<KeyMaterial, MaterialFault> {
    let broken = |_| {
        // RFC 1421, 4.6.1.1: so older formats say that there is a password.
        if recognise::contains(text, b"Proc-Type: 4,ENCRYPTED") {
            MaterialFault::Encrypted
        } else {
            MaterialFault::BrokenPem
        }
    };
    let mut decoder = Decoder::new_detect_wrap(text).map_err(broken)?;
    let mut der = Zeroizing::new(vec![0; decoder.remaining_len()]);
    decoder.decode(&mut der).map_err(broken)?;
    if decoder.type_label() == PrivateKeyInfoRef::PEM_LABEL {
        Ok(KeyMaterial::new(std::mem::take(&mut *der)))
    } else {
        Err(recognise::instead_of_pkcs8(&der))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;

    fn armoured(label: &str, bytes: &[u8], width: usize) -> String {
        let text = STANDARD.encode(bytes);
        let lines: Vec<&str> = text.as_bytes().chunks(width).map(|line| std::str::from_utf8(line).unwrap()).collect();
        format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
    }

    #[test]
    fn the_armour_is_taken_off_a_private_key_alone() {
        let der = include_bytes!("../../tests/fixtures/material/p384.der");
        let open = |text: &str| open_pem(text.as_bytes()).map(|material| material.expose().to_vec());
        let pem = armoured("PRIVATE KEY", der, 64);
        for text in [
            pem.clone(),
            pem.replace('\n', "\r\n"),
            armoured("PRIVATE KEY", der, 76),
            format!("Bag Attributes\n    localKeyID: 01\n{pem}"),
        ] {
            assert_eq!(open(&text).as_deref(), Ok(der.as_slice()), "{text}");
        }
        for (text, expected) in [
            (pem.replace("END PRIVATE", "END PUBLIC"), MaterialFault::BrokenPem),
            (pem.replace('M', "*"), MaterialFault::BrokenPem),
            (pem[..100].to_owned(), MaterialFault::BrokenPem),
            (format!("{pem}{pem}"), MaterialFault::BrokenPem),
            (String::new(), MaterialFault::BrokenPem),
            (armoured("CERTIFICATE", der, 64), MaterialFault::NotPkcs8),
            (armoured("EC PRIVATE KEY", &der[27..], 64), MaterialFault::Sec1),
            (pem.replace("KEY-----\nM", "KEY-----\nProc-Type: 4,ENCRYPTED\n\nM"), MaterialFault::Encrypted),
        ] {
            assert_eq!(open(&text), Err(expected), "{text}");
        }
    }
}
