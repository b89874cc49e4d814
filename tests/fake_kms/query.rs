//! The AWS query protocol, which STS speaks: forms in, XML out, and names of its own for the same faults.

use axum::body::Bytes;
use axum::http::{HeaderMap, header};
use serde_json::{Map, Value};

use crate::kinds::Operation;
use crate::refusal::Refusal;

/// Whether a request speaks it.
pub fn is_spoken(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    kind.is_some_and(|kind| kind.starts_with("application/x-www-form-urlencoded"))
}

/// What is asked for, and the form as JSON.
pub fn read(body: &[u8]) -> (Option<Operation>, Bytes) {
    let form: Map<String, Value> = url::form_urlencoded::parse(body)
        .map(|(name, value)| (name.into_owned(), Value::String(value.into_owned())))
        .collect();
    let operation = form.get("Action").and_then(Value::as_str).and_then(Operation::parse);
    (operation.filter(|operation| operation.is_of_sts()), Bytes::from(Value::Object(form).to_string()))
}

/// An answer.
pub fn answered(operation: Operation, body: &Value, request_id: &str) -> String {
    let (name, members) = (operation.name(), written(body));
    format!(
        "<{name}Response xmlns=\"{NAMESPACE}\"><{name}Result>{members}</{name}Result>\
         <ResponseMetadata><RequestId>{request_id}</RequestId></ResponseMetadata></{name}Response>"
    )
}

/// An error answer, by the name that STS has for it.
pub fn refused(refusal: &Refusal, request_id: &str) -> (u16, String) {
    let (code, status) = match &*refusal.code {
        "ThrottlingException" => ("Throttling", 400),
        "ValidationException" => ("ValidationError", 400),
        "UnrecognizedClientException" => ("InvalidClientTokenId", 403),
        "InvalidSignatureException" => ("SignatureDoesNotMatch", 403),
        "IncompleteSignatureException" => ("IncompleteSignature", 400),
        "MissingAuthenticationTokenException" => ("MissingAuthenticationToken", 403),
        "ExpiredTokenException" => ("ExpiredToken", 403),
        "KMSInternalException" => ("InternalFailure", 500),
        "UnknownOperationException" => ("InvalidAction", 400),
        own => (own, refusal.status),
    };
    let (said, message) = (escaped(code), escaped(&refusal.message));
    let answer = format!(
        "<ErrorResponse xmlns=\"{NAMESPACE}\"><Error><Type>Sender</Type><Code>{said}</Code><Message>{message}</Message>\
         </Error><RequestId>{request_id}</RequestId></ErrorResponse>"
    );
    (status, answer)
}

const NAMESPACE: &str = "https://sts.amazonaws.com/doc/2011-06-15/";

fn written(value: &Value) -> String {
    match value {
        Value::Object(members) => {
            let member =
                |(name, member): (&String, &Value)| ["<", name, ">", &written(member), "</", name, ">"].concat();
            members.iter().map(member).collect()
        }
        Value::String(text) => escaped(text),
        other => other.to_string(),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_form_is_read_and_an_answer_written() {
        let (operation, body) = read(b"Action=AssumeRole&Version=2011-06-15&RoleArn=arn%3Aaws%3Aiam%3A%3A1%3Arole%2Fa");
        assert_eq!(operation, Some(Operation::AssumeRole));
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["RoleArn"], "arn:aws:iam::1:role/a");
        assert_eq!(read(b"Action=CreateKey").0, None);
        let xml = answered(Operation::GetCallerIdentity, &json!({"Arn": "a<&b", "Deep": {"Er": "x"}}), "id");
        assert!(xml.contains("<GetCallerIdentityResult><Arn>a&lt;&amp;b</Arn><Deep><Er>x</Er></Deep>"), "{xml}");
    }

    #[test]
    fn faults_have_the_names_of_sts() {
        let refusal = Refusal::new("ThrottlingException", "slow");
        assert!(refused(&refusal, "id").1.contains("<Code>Throttling</Code><Message>slow</Message>"));
        let own = Refusal { status: 403, code: "AccessDenied".into(), message: String::new() };
        assert_eq!(refused(&own, "id").0, 403);
    }
}
