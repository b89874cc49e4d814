//! Completion events: CloudEvents 1.0, structured JSON.

use super::{Failure, JobResult, KeyArn};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

/// An event ready for the broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Fixed per outcome, so that consumers can drop copies.
    pub id: Uuid,
    /// `job.<outcome>.<operation>.<account>.<region>`.
    pub routing_key: String,
    /// The CloudEvents envelope as JSON text.
    pub body: String,
}

/// What an event says of an accepted job.
#[derive(Clone, Debug)]
pub struct JobSummary {
    /// The job's id; also the id of its outcome's event.
    pub id: Uuid,
    /// The KMS key.
    pub key: KeyArn,
    /// The failed job that it does again.
    pub retry_of: Option<Uuid>,
    /// Who asked.
    pub principal: String,
    /// The request's idempotency key.
    pub request_id: String,
    /// The operation's name.
    pub operation: &'static str,
    /// Nothing was changed, whatever the outcome says.
    pub dry_run: bool,
    /// The batch it belongs to.
    pub batch: Option<String>,
    /// Place in the line.
    pub sequence: i64,
    /// When it was accepted.
    pub accepted_at: OffsetDateTime,
    /// W3C trace context of the request.
    pub traceparent: Option<String>,
}

/// What an event says of a refused message.
#[derive(Clone, Debug)]
pub struct RefusalSummary<'a> {
    /// The refusal's id, and its event's.
    pub id: Uuid,
    /// Who asked.
    pub principal: &'a str,
    /// The request's idempotency key, if it is usable.
    pub request_id: Option<&'a str>,
    /// The operation's name, if the message is a valid request.
    pub operation: Option<&'a str>,
    /// The KMS key, if the message names one.
    pub key: Option<&'a KeyArn>,
    /// Why.
    pub code: &'a str,
    /// The field at fault, when one is.
    pub field: Option<&'a str>,
    /// What was expected.
    pub message: &'a str,
    /// W3C trace context of the message.
    pub traceparent: Option<&'a str>,
}

/// Refusals of one sender with one code within a minute, beyond those that have events of their own.
#[derive(Clone, Debug)]
pub struct RefusalFold<'a> {
    /// The fold's id, and its event's.
    pub id: Uuid,
    /// Who asked.
    pub principal: &'a str,
    /// The code of all of them.
    pub code: &'a str,
    /// When the first of them was refused.
    pub from: OffsetDateTime,
    /// And the last.
    pub to: OffsetDateTime,
    /// How many there are.
    pub count: i64,
}

impl Event {
    /// The event of a job that ended.
    pub fn of_job(job: &JobSummary, outcome: &Result<JobResult, Failure>, at: OffsetDateTime) -> Self {
        match outcome {
            Ok(result) => Self::of_end(job, Ok(&result.0), at),
            Err(failure) => Self::of_end(job, Err(&failure_json(failure)), at),
        }
    }

    /// The same from what its row has: a result or an error. Whatever comes to be added here must leave the events of jobs
    /// that ended before as they are, byte for byte: they are made again.
    pub fn of_end(job: &JobSummary, end: Result<&Value, &Value>, at: OffsetDateTime) -> Self {
        let (word, result, error) = match end {
            Ok(result) => ("succeeded", result.clone(), Value::Null),
            Err(error) => ("failed", Value::Null, error.clone()),
        };
        let mut envelope = json!({
            "specversion": "1.0",
            "id": job.id,
            "source": "keyferry",
            "type": format!("io.keyferry.job.{word}"),
            "subject": job.key.to_string(),
            "time": rfc3339(at),
            "datacontenttype": "application/json",
            // CloudEvents "sequence" extension: a string that orders the events of one line.
            "sequence": format!("{:020}", job.sequence),
            "data": {
                "job": {
                    "id": job.id,
                    "request_id": job.request_id,
                    "principal": job.principal,
                    "operation": job.operation,
                    "dry_run": job.dry_run,
                    "key": job.key.to_string(),
                    "batch": job.batch,
                    "state": word,
                    "accepted_at": rfc3339(job.accepted_at),
                    "finished_at": rfc3339(at),
                },
                "result": result,
                "error": error,
            },
        });
        if let Some(failed) = job.retry_of {
            envelope["data"]["job"]["retry_of"] = json!(failed);
        }
        if let (Some(trace), Some(fields)) = (&job.traceparent, envelope.as_object_mut()) {
            fields.insert("traceparent".to_owned(), json!(trace));
        }
        Self {
            id: job.id,
            routing_key: format!("job.{word}.{}.{}.{}", job.operation, job.key.account(), job.key.region()),
            body: envelope.to_string(),
        }
    }

    /// The event of a refused message. As of jobs: what comes to be added must leave older events as they are.
    pub fn of_refusal(refusal: &RefusalSummary<'_>, at: OffsetDateTime) -> Self {
        let RefusalSummary { id, principal, request_id, operation, key, code, field, message, traceparent } = refusal;
        let mut envelope = json!({
            "specversion": "1.0",
            "id": id,
            "source": "keyferry",
            "type": "io.keyferry.job.rejected",
            "time": rfc3339(at),
            "datacontenttype": "application/json",
            "data": {
                "job": { "id": Value::Null, "request_id": request_id, "principal": principal, "state": "rejected" },
                "result": Value::Null,
                "error": { "code": code, "field": field, "message": message, "aws_changed": false },
            },
        });
        if let (Some(key), Some(fields)) = (key, envelope.as_object_mut()) {
            fields.insert("subject".to_owned(), json!(key.to_string()));
        }
        if let (Some(trace), Some(fields)) = (traceparent, envelope.as_object_mut()) {
            fields.insert("traceparent".to_owned(), json!(trace));
        }
        let operation = operation.unwrap_or("unknown");
        let (account, region) = key.map_or(("unknown", "unknown"), |key| (key.account(), key.region()));
        Self {
            id: *id,
            routing_key: format!("job.rejected.{operation}.{account}.{region}"),
            body: envelope.to_string(),
        }
    }

    /// The event of refusals that are told of together. They can be of any operation and key, so that it has none.
    pub fn of_fold(fold: &RefusalFold<'_>, at: OffsetDateTime) -> Self {
        let RefusalFold { id, principal, code, from, to, count } = fold;
        let envelope = json!({
            "specversion": "1.0",
            "id": id,
            "source": "keyferry",
            "type": "io.keyferry.job.rejected",
            "time": rfc3339(at),
            "datacontenttype": "application/json",
            "data": {
                "job": { "id": Value::Null, "request_id": Value::Null, "principal": principal, "state": "rejected" },
                "result": Value::Null,
                "error": {
                    "code": code,
                    "field": Value::Null,
                    "message": "more messages of this sender were refused with this code within the minute than are \
                                told of one by one: see them with keyferry dead list",
                    "aws_changed": false,
                },
                "folded": { "count": count, "from": rfc3339(*from), "to": rfc3339(*to), "code": code },
            },
        });
        Self { id: *id, routing_key: "job.rejected.unknown.unknown.unknown".to_owned(), body: envelope.to_string() }
    }
}

/// A failure as it stands in events and in the job's row.
pub fn failure_json(failure: &Failure) -> Value {
    let mut json = json!({
        "code": failure.code.as_str(),
        "message": failure.message,
        "aws_changed": failure.aws_changed,
    });
    if let Some(policy) = &failure.policy {
        json["policy"] = json!(policy);
    }
    json
}

/// RFC 3339 in UTC.
pub fn rfc3339(at: OffsetDateTime) -> String {
    // Formatting fails only outside the years 0 to 9999, which no clock of ours shows.
    at.to_offset(time::UtcOffset::UTC).format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::FailureCode;
    use time::macros::datetime;

    fn summary() -> JobSummary {
        JobSummary {
            id: Uuid::from_u128(7),
            key: KeyArn::parse("arn:aws:kms:eu-central-1:111122223333:key/031c5703-aaf7-425e-a141-7e0c6f5886ab")
                .unwrap(),
            retry_of: None,
            principal: "anonymous".into(),
            request_id: "order-1".into(),
            operation: "import",
            dry_run: false,
            batch: None,
            sequence: 3,
            accepted_at: datetime!(2026-01-01 0:00 UTC),
            traceparent: None,
        }
    }

    #[test]
    fn the_outcome_decides_type_and_routing_key_and_the_id_is_the_jobs() {
        let failure = Failure { code: FailureCode::KeyDisabled, message: "m".into(), aws_changed: false, policy: None };
        let event = Event::of_job(&summary(), &Err(failure), datetime!(2026-01-01 0:00:01 UTC));
        let body: Value = serde_json::from_str(&event.body).unwrap();
        assert_eq!(event.routing_key, "job.failed.import.111122223333.eu-central-1");
        assert_eq!(body["id"], json!(event.id));
        assert_eq!(body["type"], "io.keyferry.job.failed");
        assert_eq!(body["sequence"], "00000000000000000003");
        assert_eq!(body["data"]["error"]["code"], "key_disabled");
        assert_eq!(body["data"]["result"], Value::Null);
    }

    /// Consumers have events like these: made again, they are the same bytes.
    #[test]
    fn an_event_keeps_its_bytes() {
        let at = datetime!(2026-01-01 0:00:01 UTC);
        let plain = Event::of_end(&summary(), Err(&json!({"code": "key_disabled"})), at);
        assert_eq!(
            plain.body,
            r#"{"data":{"error":{"code":"key_disabled"},"job":{"accepted_at":"2026-01-01T00:00:00Z","batch":null,"dry_run":false,"finished_at":"2026-01-01T00:00:01Z","id":"00000000-0000-0000-0000-000000000007","key":"arn:aws:kms:eu-central-1:111122223333:key/031c5703-aaf7-425e-a141-7e0c6f5886ab","operation":"import","principal":"anonymous","request_id":"order-1","state":"failed"},"result":null},"datacontenttype":"application/json","id":"00000000-0000-0000-0000-000000000007","sequence":"00000000000000000003","source":"keyferry","specversion":"1.0","subject":"arn:aws:kms:eu-central-1:111122223333:key/031c5703-aaf7-425e-a141-7e0c6f5886ab","time":"2026-01-01T00:00:01Z","type":"io.keyferry.job.failed"}"#
        );
        let retry = JobSummary { retry_of: Some(Uuid::from_u128(6)), traceparent: Some("00-t".into()), ..summary() };
        let retried: Value = serde_json::from_str(&Event::of_end(&retry, Ok(&json!({})), at).body).unwrap();
        assert_eq!(retried["data"]["job"]["retry_of"], json!(Uuid::from_u128(6)));
        assert_eq!(retried["traceparent"], "00-t");
    }

    #[test]
    fn a_refusal_without_a_key_is_routed_to_unknown() {
        let refusal = RefusalSummary {
            id: Uuid::from_u128(1),
            principal: "p",
            request_id: None,
            operation: None,
            key: None,
            code: "not_json",
            field: None,
            message: "expected JSON",
            traceparent: None,
        };
        let event = Event::of_refusal(&refusal, datetime!(2026-01-01 0:00 UTC));
        assert_eq!(
            event.body,
            r#"{"data":{"error":{"aws_changed":false,"code":"not_json","field":null,"message":"expected JSON"},"job":{"id":null,"principal":"p","request_id":null,"state":"rejected"},"result":null},"datacontenttype":"application/json","id":"00000000-0000-0000-0000-000000000001","source":"keyferry","specversion":"1.0","time":"2026-01-01T00:00:00Z","type":"io.keyferry.job.rejected"}"#
        );
        assert_eq!(event.routing_key, "job.rejected.unknown.unknown.unknown");
        let (key, traceparent) = (summary().key, Some("00-t"));
        let named = RefusalSummary { operation: Some("delete"), key: Some(&key), traceparent, ..refusal };
        let event = Event::of_refusal(&named, datetime!(2026-01-01 0:00 UTC));
        assert_eq!(event.routing_key, "job.rejected.delete.111122223333.eu-central-1");
        let body: Value = serde_json::from_str(&event.body).unwrap();
        assert_eq!((&body["subject"], &body["traceparent"]), (&json!(key.to_string()), &json!("00-t")));
    }

    #[test]
    fn folded_refusals_are_counted_in_their_event() {
        let (from, to) = (datetime!(2026-01-01 0:00:01 UTC), datetime!(2026-01-01 0:00:59 UTC));
        let fold = RefusalFold { id: Uuid::from_u128(1), principal: "p", code: "not_json", from, to, count: 7 };
        let event = Event::of_fold(&fold, datetime!(2026-01-01 0:01 UTC));
        let body: Value = serde_json::from_str(&event.body).unwrap();
        assert_eq!((&body["id"], &body["type"]), (&json!(event.id), &json!("io.keyferry.job.rejected")));
        let folded =
            json!({"count": 7, "from": "2026-01-01T00:00:01Z", "to": "2026-01-01T00:00:59Z", "code": "not_json"});
        assert_eq!((&body["data"]["folded"], &body["data"]["error"]["code"]), (&folded, &json!("not_json")));
    }
}
