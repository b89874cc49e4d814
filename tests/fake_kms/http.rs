//! The AWS JSON 1.1 front: who calls, what for, and how the answer looks on the wire.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::Response;
use axum::routing::any;
use serde::Deserialize;
use serde_json::json;
use time::OffsetDateTime;

use crate::engine::{Answer, Attendance, answer};
use crate::journal::Entry;
use crate::kinds::Operation;
use crate::listener::Line;
use crate::refusal::Refusal;
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
    let operation = operation(&headers);
    let caller = match authenticate(&world, &method, &uri, &headers, &body) {
        Ok(caller) => caller,
        Err(refusal) => {
            note_refused(&world, operation, None, &refusal);
            return refused(&refusal);
        }
    };
    let Some(operation) = operation else {
        let refusal = Refusal::new("UnknownOperationException", "");
        note_refused(&world, None, Some(&caller), &refusal);
        return refused(&refusal);
    };
    let (principal, region) = caller;
    let key_arn = serde_json::from_slice::<Named>(&body)
        .ok()
        .and_then(|named| request::key_arn(&named.key_id?, &principal.account, &region).ok());
    let call = Call {
        operation,
        body,
        principal,
        region,
        key_arn: key_arn.map(Into::into),
        fault: None,
        late: false,
        gone: Arc::new(AtomicBool::new(false)),
    };
    let attendance = Attendance::of(&call);
    // A task of its own: it goes on when the client hangs up and this handler is dropped.
    let answer = tokio::spawn(answer(world, call)).await;
    attendance.end();
    match answer {
        Ok(Answer::Reply(Ok(body))) => respond(StatusCode::OK, body.to_string()),
        Ok(Answer::Reply(Err(refusal))) => refused(&refusal),
        Ok(Answer::Cut(after)) => {
            tokio::time::sleep(after).await;
            line.cut();
            respond(StatusCode::OK, String::new())
        }
        Err(_) => respond(StatusCode::INTERNAL_SERVER_ERROR, String::new()),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Named {
    key_id: Option<String>,
}

fn operation(headers: &HeaderMap) -> Option<Operation> {
    Operation::parse(headers.get("x-amz-target")?.to_str().ok()?.strip_prefix("TrentService.")?)
}

fn authenticate(
    world: &World,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<(Principal, Arc<str>), Refusal> {
    let claim = Claim::read(headers)?;
    let credential = world.credentials.get(claim.access_key).ok_or_else(sigv4::unknown_access_key)?;
    let signed = sigv4::Request {
        method: method.as_str(),
        path: uri.path(),
        query: uri.query().unwrap_or_default(),
        headers,
        body,
    };
    claim.verify(signed, &credential.secret, OffsetDateTime::now_utc(), world.signature_life)?;
    let region = world.state().region(claim.region);
    Ok((credential.principal.clone(), region))
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
        outcome: refusal.code.clone(),
        fault: None,
        late: false,
        effect: None,
    };
    world.state().journal.push(entry);
}

fn refused(refusal: &Refusal) -> Response {
    let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = respond(status, json!({ "__type": refusal.code, "message": refusal.message }).to_string());
    if let Ok(code) = HeaderValue::from_str(&refusal.code) {
        response.headers_mut().insert("x-amzn-errortype", code);
    }
    response
}

fn respond(status: StatusCode, body: String) -> Response {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-amz-json-1.1"));
    if let Ok(id) = HeaderValue::from_str(&uuid::Uuid::new_v4().to_string()) {
        headers.insert("x-amzn-requestid", id);
    }
    response
}
