//! What a valid request is and how its job may end. No I/O, no clock of its own.

mod arn;
mod dsm_key;
mod ending;
mod event;
mod key_kind;
mod parameters;
mod request;
mod scarce;
mod wrapping;

pub use arn::KeyArn;
pub use dsm_key::{DsmKeyRef, NotAKeyRef};
pub use ending::{Failure, FailureCode, JobResult, Refusal, RefusalCode};
pub use event::{Event, JobSummary, RefusalFold, RefusalSummary, failure_json, rfc3339};
pub use key_kind::{Curve, KeyKind, Partition, Shape};
pub use parameters::ImportParameters;
pub use request::{
    CONTENT_TYPE_CLOUDEVENTS, DeleteTarget, Envelope, Expiry, Import, KeyRef, MAX_BODY_BYTES, Operation, Rejected,
    Request, RequestId, ScarceCall, SourceKeyRef, SourceMaterial, Work, id_hash,
};
pub use scarce::Scarce;
pub use wrapping::{NoWrapping, Wrapping, WrappingAlgorithm, WrappingKeySpec};
