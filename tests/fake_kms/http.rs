//! The front: who calls, what for, and how the answer looks on the wire, in AWS JSON 1.1 or in [`query`]'s way.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::Response;
use axum::routing::any;
use serde::Deserialize;
use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::engine::{Answer, Attendance, answer};
use crate::journal::Entry;
use crate::kinds::Operation;
use crate::listener::Line;
use crate::query;
use crate::refusal::{self, Refusal};
use crate::request;
use crate::sigv4::{self, Claim};
use crate::world::{Call, Principal, World};

/// The route of all AWS calls.
pub fn router(world: Arc<World>) -> Router {
    Router::new().route("/", any(call)).with_state(world)
}

async fn call(
    State(world): State<Arc<World>>,
    ConnectInfo(line): ConnectInfo<Line>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let speech = if query::is_spoken(&headers) { Speech::Query } else { Speech::Json };
    let (operation, asked) = match speech {
        Speech::Json => (operation(&headers), body.clone()),
        Speech::Query => query::read(&body),
    };
    let caller = match authenticate(&world, speech, &method, &uri, &headers, &body) {
        Ok(caller) => caller,
        Err(refusal) => {
            note_refused(&world, operation, None, &refusal);
            return speech.refused(&refusal);
        }
    };
    let Some(operation) = operation else {
        let refusal = Refusal::new("UnknownOperationException", "");
        note_refused(&world, None, Some(&caller), &refusal);
        return speech.refused(&refusal);
    };
    let (principal, region) = caller;
    let named = serde_json::from_slice::<Named>(&asked).unwrap_or_default();
    let key_arn = named.key_id.and_then(|id| request::key_arn(&id, &principal.account, &region).ok());
    let call = Call {
        operation,
        body: asked,
        principal,
        region,
        key_arn: key_arn.or(named.role_arn).map(Into::into),
        fault: None,
        late: false,
        gone: Arc::new(AtomicBool::new(false)),
    };
    let attendance = Attendance::of(&call);
    // A task of its own: it goes on when the client hangs up and this handler is dropped.
    let answer = tokio::spawn(answer(world, call)).await;
    attendance.end();
    match answer {
        Ok(Answer::Reply(Ok(body))) => speech.answered(operation, &body),
        Ok(Answer::Reply(Err(refusal))) => speech.refused(&refusal),
        Ok(Answer::Cut(after)) => {
            tokio::time::sleep(after).await;
            line.cut();
            respond(StatusCode::OK, JSON, String::new(), None)
        }
        Err(_) => respond(StatusCode::INTERNAL_SERVER_ERROR, JSON, String::new(), None),
    }
}

/// The two protocols.
#[derive(Clone, Copy)]
enum Speech {
    /// KMS's.
    Json,
    /// STS's.
    Query,
}

const JSON: HeaderValue = HeaderValue::from_static("application/x-amz-json-1.1");
const XML: HeaderValue = HeaderValue::from_static("text/xml");

impl Speech {
    fn service(self) -> &'static str {
        match self {
            Self::Json => "kms",
            Self::Query => "sts",
        }
    }

    fn answered(self, operation: Operation, body: &Value) -> Response {
        let id = uuid::Uuid::new_v4().to_string();
        match self {
            Self::Json => respond(StatusCode::OK, JSON, body.to_string(), Some(&id)),
            Self::Query => respond(StatusCode::OK, XML, query::answered(operation, body, &id), Some(&id)),
        }
    }

    fn refused(self, refusal: &Refusal) -> Response {
        let id = uuid::Uuid::new_v4().to_string();
        let status = |status| StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        match self {
            Self::Json => {
                let body = json!({ "__type": refusal.code, "message": refusal.message }).to_string();
                let mut response = respond(status(refusal.status), JSON, body, Some(&id));
                if let Ok(code) = HeaderValue::from_str(&refusal.code) {
                    response.headers_mut().insert("x-amzn-errortype", code);
                }
                response
            }
            Self::Query => {
                let (number, body) = query::refused(refusal, &id);
                respond(status(number), XML, body, Some(&id))
            }
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Named {
    key_id: Option<String>,
    role_arn: Option<String>,
}

fn operation(headers: &HeaderMap) -> Option<Operation> {
    let operation = Operation::parse(headers.get("x-amz-target")?.to_str().ok()?.strip_prefix("TrentService.")?);
    operation.filter(|operation| !operation.is_of_sts())
}

fn authenticate(
    world: &World,
    speech: Speech,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<(Principal, Arc<str>), Refusal> {
    let claim = Claim::read(headers)?;
    let (secret, principal) = match world.credentials.get(claim.access_key) {
        Some(credential) => (credential.secret.clone(), credential.principal.clone()),
        None => of_session(world, claim.access_key, headers)?,
    };
    let signed = sigv4::Request {
        method: method.as_str(),
        path: uri.path(),
        query: uri.query().unwrap_or_default(),
        headers,
        body,
    };
    claim.verify(signed, speech.service(), &secret, OffsetDateTime::now_utc(), world.signature_life)?;
    let region = world.state().region(claim.region);
    Ok((principal, region))
}

/// The secret and the caller of a session, which has to come with its token. The order of the checks is UNVERIFIED.
fn of_session(world: &World, access_key: &str, headers: &HeaderMap) -> Result<(String, Principal), Refusal> {
    let now = world.now();
    let state = world.state();
    let session = state.roles.session(access_key).ok_or_else(sigv4::unknown_access_key)?;
    if headers.get("x-amz-security-token").is_none_or(|token| token.as_bytes() != session.token.as_bytes()) {
        return Err(sigv4::unknown_access_key());
    }
    if now >= session.ends_at {
        return Err(refusal::expired_session());
    }
    Ok((session.secret.clone(), session.principal.clone()))
}

fn note_refused(
    world: &World,
    operation: Option<Operation>,
    caller: Option<&(Principal, Arc<str>)>,
    refusal: &Refusal,
) {
    let entry = Entry {
        at: world.now(),
        operation: operation.map_or("Unknown", Operation::name),
        key_arn: None,
        account: caller.map(|(principal, _)| Arc::clone(&principal.account)),
        region: caller.map(|(_, region)| Arc::clone(region)),
        access_key: caller.map(|(principal, _)| Arc::clone(&principal.access_key)),
        session: caller.and_then(|(principal, _)| principal.session.clone()),
        outcome: refusal.code.clone(),
        fault: None,
        late: false,
        effect: None,
    };
    world.state().journal.push(entry);
}

fn respond(status: StatusCode, kind: HeaderValue, body: String, request_id: Option<&str>) -> Response {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, kind);
    if let Some(Ok(id)) = request_id.map(HeaderValue::from_str) {
        headers.insert("x-amzn-requestid", id);
    }
    response
}
