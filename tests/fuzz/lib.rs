//! The product's own source files of the parser of key material and of KMIP's answers, and nothing else of it.

#![allow(dead_code, missing_docs)]

#[path = "../../src/config"]
pub mod config {
    mod dsm;

    pub use dsm::DsmProtocol;
}

#[path = "../../src/job"]
pub mod job {
    mod key_kind;

    pub use key_kind::{Curve, KeyKind, Shape};
}

#[path = "../../src/source"]
pub mod source {
    pub mod dsm {
        mod answers;
        mod key_block;
        mod messages;
        mod tags;
        mod transparent;
        mod ttlv;

        pub mod mutations {
            pub mod oracle;
            pub mod samples;
        }
    }
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
