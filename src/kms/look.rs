//! Harmless calls for whoever wants to know whether AWS is there, lets it in, and as whom, and shows the same time.

use super::{Call, CallError, Kms, LeaseGuard, taken};
use crate::job::KeyArn;
use aws_sdk_kms::config::interceptors::BeforeDeserializationInterceptorContextRef;
use aws_sdk_kms::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_kms::error::BoxError;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use time::macros::format_description;
use time::{OffsetDateTime, PrimitiveDateTime};

/// What came of it.
#[derive(Clone, Debug)]
pub struct Look {
    /// Whether AWS described the key.
    pub outcome: Result<(), CallError>,
    /// AWS's clock, in whole seconds, if it answered.
    pub date: Option<OffsetDateTime>,
}

/// Whose credentials calls about a key are signed with.
#[derive(Clone, Debug)]
pub struct Whose {
    /// 12 digits.
    pub account: String,
    /// The user's, role's or session's.
    pub arn: String,
}

impl Kms {
    /// Has the role of the key's account assumed; says nothing more of it, since STS's answer must be of that account.
    /// Waits for STS as long as a call may take. `None`: the account has no role.
    pub async fn assume(&self, key: &KeyArn) -> Option<Result<(), CallError>> {
        let session = self.accounts.way(key)?.session.as_ref()?;
        Some(session.credentials_at_length().await.map(drop))
    }

    /// `GetCallerIdentity` with the worker's own credentials, by the STS that the key's account is set to. Read-only.
    pub async fn whose(&self, key: &KeyArn) -> Result<Whose, CallError> {
        const OPERATION: Call = Call::GetCallerIdentity;
        let unknown = || CallError::no_target(OPERATION.as_str(), key.region());
        let request = self.accounts.way(key).ok_or_else(unknown)?.sts.get_caller_identity();
        let (gate, departure) = self.gate(&LeaseGuard::new(Instant::now(), 2 * self.attempt_timeout));
        let answer = request.customize().interceptor(gate).send().await;
        let answer = answer.map_err(|error| CallError::of(OPERATION.as_str(), &error, &departure));
        let part = |name| CallError::incomplete(OPERATION.as_str(), name);
        self.counted(
            OPERATION,
            answer.and_then(|answer| {
                Ok(Whose {
                    account: answer.account().and_then(taken::word).ok_or_else(|| part("Account"))?,
                    arn: answer.arn().and_then(taken::arn).ok_or_else(|| part("Arn"))?,
                })
            }),
        )
    }

    /// `DescribeKey`, whatever comes of it. Read-only.
    pub async fn look(&self, key: &KeyArn) -> Look {
        const OPERATION: Call = Call::DescribeKey;
        let client = match self.client(key, OPERATION) {
            Ok(client) => client,
            Err(error) => return Look { outcome: Err(error), date: None },
        };
        // No lease: nothing is changed, and the time-out bounds it.
        let guard = LeaseGuard::new(Instant::now(), 2 * self.attempt_timeout);
        let (gate, departure) = self.gate(&guard);
        let clock = Clock::default();
        let request = client.describe_key().key_id(key.to_string());
        let answer = request.customize().interceptor(gate).interceptor(clock.clone()).send().await;
        let outcome = answer.map(drop).map_err(|error| CallError::of(OPERATION.as_str(), &error, &departure));
        Look { outcome: self.counted(OPERATION, outcome), date: clock.seen() }
    }
}

/// Reads the `Date` of an answer.
#[derive(Clone, Debug, Default)]
struct Clock(Arc<Mutex<Option<OffsetDateTime>>>);

impl Clock {
    fn seen(&self) -> Option<OffsetDateTime> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Intercept for Clock {
    fn name(&self) -> &'static str {
        "Clock"
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let date = context.response().headers().get("date").and_then(parse);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = date;
        Ok(())
    }
}

/// `Tue, 24 Nov 2026 12:00:00 GMT` (RFC 9110, 5.6.7).
fn parse(text: &str) -> Option<OffsetDateTime> {
    let form =
        format_description!("[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT");
    PrimitiveDateTime::parse(text, form).ok().map(PrimitiveDateTime::assume_utc)
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

    #[test]
    fn a_date_is_read() {
        assert_eq!(parse("Tue, 24 Nov 2026 12:34:56 GMT"), Some(datetime!(2026-11-24 12:34:56 UTC)));
        for text in ["", "soon", "2026-11-24T12:34:56Z"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
