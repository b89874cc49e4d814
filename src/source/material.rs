//! The one type in which key bytes live.

use std::fmt;
use zeroize::Zeroizing;

/// Plaintext key bytes. Zeroised when dropped; cannot be cloned, printed or serialised.
pub struct KeyMaterial(Zeroizing<Vec<u8>>);

impl KeyMaterial {
    /// Takes bytes over; the vector's buffer is zeroised with this value.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// `len` bytes from the operating system's generator.
    pub fn random(len: usize) -> Result<Self, getrandom::Error> {
        let mut bytes = Zeroizing::new(vec![0; len]);
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// The bytes, for the call that needs them. Copy them nowhere.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for KeyMaterial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyMaterial(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_nothing() {
        let material = KeyMaterial::new(b"AAAABBBB".to_vec());
        assert_eq!(format!("{material:?} {:?}", Some(&material)), "KeyMaterial(..) Some(KeyMaterial(..))");
    }
}
