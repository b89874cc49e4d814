//! The product's own source files of the parser, and nothing else of it.

#![allow(dead_code, missing_docs)]

#[path = "../../src/job"]
pub mod job {
    mod key_kind;

    pub use key_kind::{Curve, KeyKind, Shape};
}

#[path = "../../src/source"]
pub mod source {
    mod fault;
    mod material;
    mod pair;
    mod pem;
    mod plain;
    mod recognise;

    pub use fault::{MaterialFault, Oid};
    pub use material::KeyMaterial;
    pub use pem::open_pem;
    pub use plain::PlainKey;
}
