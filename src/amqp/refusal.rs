//! Why the broker refused, by AMQP's reply codes.

use super::SessionError;
use lapin::ErrorKind;

/// What a person has to mend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// `ACCESS_REFUSED`: of a login the user or the password, else a right.
    Access,
    /// `NOT_FOUND`.
    NotFound,
    /// `NOT_ALLOWED`: of a login the virtual host, which is not there or not this user's.
    NotAllowed,
    /// `PRECONDITION_FAILED`: a right was there, and what was asked for makes no sense.
    Precondition,
}

impl SessionError {
    /// Why the broker refused, if it did and it is for a person to mend.
    pub fn refusal(&self) -> Option<Refusal> {
        let (Self::Broker(error) | Self::Dropped(error)) = self else { return None };
        let ErrorKind::ProtocolError(error) = error.kind() else { return None };
        match error.kind().get_id() {
            403 => Some(Refusal::Access),
            404 => Some(Refusal::NotFound),
            406 => Some(Refusal::Precondition),
            530 => Some(Refusal::NotAllowed),
            _ => None,
        }
    }
}
