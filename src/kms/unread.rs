//! For the kill tests: a call has changed AWS, and nobody has read so.

use aws_sdk_kms::config::interceptors::BeforeDeserializationInterceptorContextRef;
use aws_sdk_kms::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_kms::error::BoxError;

/// Ends the process when an answer of this operation has come, and nothing of it has been read.
#[derive(Debug)]
pub(super) struct Unread(pub(super) &'static str);

impl Intercept for Unread {
    fn name(&self) -> &'static str {
        "Unread"
    }

    fn read_after_transmit(
        &self,
        _context: &BeforeDeserializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if ["ImportKeyMaterial", "DeleteImportedKeyMaterial"].contains(&self.0) {
            crate::failpoint!("kms.before_answer");
        }
        if self.0 == "RotateKeyOnDemand" {
            crate::failpoint!("kms.before_rotate_answer");
        }
        Ok(())
    }
}
