//! Obtains key material from a tier, holds it briefly, zeroises it.

mod dsm;
mod fault;
mod keyring;
mod local;
mod material;
#[cfg(test)]
mod mutations;
mod pair;
mod pem;
mod plain;
mod recognise;

pub use dsm::{Dsm, DsmError, FetchedKey, ServerDetails, ServerReport};
pub use fault::{MaterialFault, Oid};
pub use keyring::{Fingerprint, Kek, KekError, Keyring, SealedFingerprintKey};
pub use local::{OpenError, SealedKey};
pub use material::KeyMaterial;
pub use pem::open_pem;
pub use plain::PlainKey;
