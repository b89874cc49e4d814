//! Obtains key material from a tier, holds it briefly, zeroises it.

mod keyring;
mod local;
mod material;
mod plain;

pub use keyring::{Fingerprint, Kek, KekError, Keyring, SealedFingerprintKey};
pub use local::{OpenError, SealedKey};
pub use material::KeyMaterial;
pub use plain::{MaterialFault, PlainKey};
