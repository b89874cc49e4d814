//! The control interface: how tests seed, look into and disturb the double. JSON, unsigned, on the same port.
//!
//! | Call | Body or query | Answer |
//! |---|---|---|
//! | `GET /_fake/health` | | `{"status","now","unwrap","keys","tokens","journal_next"}` |
//! | `POST /_fake/keys` | `{"count","spec","usage","region","account","origin","description","multi_region","tags":{}}` | `{"arns":[...]}` |
//! | `POST /_fake/keys` | `{"replica_of":"<ARN of a multi-Region primary>","region","description","tags":{}}` | `{"arns":[...]}` |
//! | `GET /_fake/keys` | `account`, `region` | `{"keys":[...]}`, each as below |
//! | `GET /_fake/keys/<id or ARN>` | | state and materials, with the SHA-256 of each material and of a pair's public key |
//! | `GET /_fake/journal` | `from`, `limit` and the filters | `{"entries":[...],"next":n,"oldest":n}` |
//! | `GET /_fake/wait` | `count`, `from`, `timeout_ms` and the filters | `{"count":n,"reached":bool,"next":n}` |
//! | `GET /_fake/clock`, `POST` | `{"advance_seconds":n}` | `{"now"}` |
//! | `POST /_fake/latency` | `{"ms":n}` | `{"ms":n}` |
//! | `GET /_fake/quota` | | `{"enabled":bool,"strangers":[{"account","region","operation","taken"}]}` |
//! | `POST /_fake/quota` | `{"enabled":bool,"rates":{"GetParametersForImport":0.25},"strangers":{"ImportKeyMaterial":5},"hot_key":0.5}` | the same |
//! | `GET /_fake/options`, `POST` | any of [`crate::world::Options`] | all options |
//! | `GET /_fake/faults`, `POST`, `DELETE` | `{"operation","key","times","skip","fault":{"kind",...}}`; `?id=` for one | the orders; `{"id":n}`; `{}` |
//! | `GET /_fake/roles`, `POST`, `DELETE` | [`crate::roles::Role`]; `?arn=` | `{"roles":[...],"sessions":[{"access_key","secret","token"}]}` |
//! | `GET /_fake/waiting` | `operation`, `key`, `at_least`, `timeout_ms` | `{"waiting":n,"reached":bool,"calls":[...]}` |
//! | `POST /_fake/release` | `{"operation","key","count"}`, all optional | `{"released":n}` |
//! | `GET /_fake/pending_late` | `operation`, `key`, `at_least`, `timeout_ms` | `{"pending":n,"reached":bool,"calls":[...]}` |
//! | `POST /_fake/release_late` | | `{"released":n}`, once the effects have happened |
//!
//! Filters of the journal: `operation`, `key` (ARN or id), `outcome`, `effect` (`created`, `imported`, `deleted`, `rotated`,
//! `state`, `any`, `none`), `late` (`true`, `false`). A call with a `late` fault has two entries: the call itself with outcome
//! `late`, and later its effect with `"late":true`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use crate::control_keys::{list_keys, seed_keys, show_key};
use crate::engine::release_late;
use crate::faults::Order;
use crate::journal::{Filter, names};
use crate::kinds::{Operation, rfc3339};
use crate::roles::{Role, Session};
use crate::world::{Call, World};

/// The routes of the control interface.
pub fn router(world: Arc<World>) -> Router {
    Router::new()
        .route("/_fake/health", get(health))
        .route("/_fake/keys", get(list_keys).post(seed_keys))
        .route("/_fake/keys/{*key}", get(show_key))
        .route("/_fake/journal", get(journal))
        .route("/_fake/wait", get(wait))
        .route("/_fake/clock", get(show_clock).post(move_clock))
        .route("/_fake/latency", post(set_latency))
        .route("/_fake/quota", get(show_quota).post(set_quota))
        .route("/_fake/options", get(show_options).post(set_options))
        .route("/_fake/faults", get(list_faults).post(add_fault).delete(clear_faults))
        .route("/_fake/roles", get(list_roles).post(set_role).delete(remove_role))
        .route("/_fake/waiting", get(waiting))
        .route("/_fake/release", post(release))
        .route("/_fake/pending_late", get(pending_late))
        .route("/_fake/release_late", post(release_all_late))
        .with_state(world)
}

/// A control call that makes no sense: the text says why.
pub struct Bad(pub StatusCode, pub String);

/// What a control call answers.
pub type Answer = Result<Json, Bad>;

/// A JSON body.
pub struct Json(pub Value);

impl IntoResponse for Json {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.0.to_string()));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }
}

impl IntoResponse for Bad {
    fn into_response(self) -> Response {
        let mut response = Json(json!({ "error": self.1 })).into_response();
        *response.status_mut() = self.0;
        response
    }
}

async fn health(State(world): State<Arc<World>>) -> Answer {
    let now = rfc3339(world.now());
    let state = world.state();
    Ok(Json(json!({
        "status": "ok",
        "now": now,
        "unwrap": if world.lazy { "lazy" } else { "eager" },
        "keys": state.keys.len(),
        "tokens": state.tokens.len(),
        "journal_next": state.journal.next(),
    })))
}

async fn journal(State(world): State<Arc<World>>, uri: Uri) -> Answer {
    let query = Query::of(&uri);
    let filter = query.filter()?;
    let (from, limit) = (query.number("from")?.unwrap_or(0), query.number("limit")?);
    let limit = limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
    // Copied under the lock, rendered outside it.
    let (entries, next, oldest) = {
        let state = world.state();
        let mut next = from.max(state.journal.oldest());
        let mut entries = Vec::new();
        for (number, entry) in state.journal.from(from) {
            if entries.len() == limit {
                break;
            }
            if filter.admits(entry) {
                entries.push((number, entry.clone()));
            }
            next = number + 1;
        }
        (entries, next, state.journal.oldest())
    };
    let entries: Vec<_> = entries.iter().map(|(number, entry)| entry.json(*number)).collect();
    Ok(Json(json!({ "entries": entries, "next": next, "oldest": oldest })))
}

async fn wait(State(world): State<Arc<World>>, uri: Uri) -> Answer {
    let query = Query::of(&uri);
    let filter = query.filter()?;
    let wanted = query.number("count")?.unwrap_or(1);
    let (mut next, mut count) = (query.number("from")?.unwrap_or(0), 0);
    let deadline = query.deadline()?;
    loop {
        let grown = world.grown.notified();
        tokio::pin!(grown);
        grown.as_mut().enable();
        {
            let state = world.state();
            for (number, entry) in state.journal.from(next) {
                count += u64::from(filter.admits(entry));
                next = number + 1;
            }
        }
        if count >= wanted || timeout_at(deadline, grown).await.is_err() {
            return Ok(Json(json!({ "count": count, "reached": count >= wanted, "next": next })));
        }
    }
}

async fn show_clock(State(world): State<Arc<World>>) -> Answer {
    Ok(Json(json!({ "now": rfc3339(world.now()) })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Advance {
    advance_seconds: i64,
}

async fn move_clock(State(world): State<Arc<World>>, body: Bytes) -> Answer {
    let advance: Advance = parse(&body)?;
    world.advance(advance.advance_seconds.saturating_mul(1_000));
    show_clock(State(world)).await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Latency {
    ms: u64,
}

async fn set_latency(State(world): State<Arc<World>>, body: Bytes) -> Answer {
    let latency: Latency = parse(&body)?;
    world.set_latency_ms(latency.ms);
    Ok(Json(json!({ "ms": latency.ms })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Quota {
    enabled: bool,
    #[serde(default)]
    rates: HashMap<String, f64>,
    #[serde(default)]
    strangers: HashMap<String, f64>,
    /// Changes a second from which on a key is hot.
    hot_key: Option<f64>,
}

async fn show_quota(State(world): State<Arc<World>>) -> Answer {
    let state = world.state();
    let taken = |(account, region, operation, taken): (&str, &str, Operation, u64)| json!({ "account": account, "region": region, "operation": operation.name(), "taken": taken });
    let strangers: Vec<Value> = state.quotas.taken().map(taken).collect();
    Ok(Json(json!({ "enabled": state.quotas.enabled, "strangers": strangers })))
}

async fn set_quota(State(world): State<Arc<World>>, body: Bytes) -> Answer {
    let quota: Quota = parse(&body)?;
    let operations = |rates: HashMap<String, f64>| -> Result<HashMap<Operation, f64>, Bad> {
        let named = rates.into_iter().map(|(name, rate)| {
            let operation = Operation::parse(&name).ok_or_else(|| bad(format!("unknown operation {name}")))?;
            Ok((operation, rate))
        });
        named.collect()
    };
    let (rates, strangers) = (operations(quota.rates)?, operations(quota.strangers)?);
    {
        let mut state = world.state();
        state.quotas.rates.extend(rates);
        state.quotas.strangers.extend(strangers);
        state.quotas.hot_key = quota.hot_key;
        state.quotas.enabled = quota.enabled;
        state.quotas.refill();
    }
    show_quota(State(world)).await
}

async fn show_options(State(world): State<Arc<World>>) -> Answer {
    Ok(Json(json!(world.state().options)))
}

async fn set_options(State(world): State<Arc<World>>, body: Bytes) -> Answer {
    let changes: serde_json::Map<String, Value> = parse(&body)?;
    {
        let mut state = world.state();
        let mut options = json!(state.options);
        for (name, value) in changes {
            options[name] = value;
        }
        state.options = serde_json::from_value(options).map_err(|error| bad(error.to_string()))?;
    }
    show_options(State(world)).await
}

async fn list_faults(State(world): State<Arc<World>>) -> Answer {
    let state = world.state();
    let orders: Vec<_> = state
        .faults
        .orders()
        .iter()
        .map(|(id, order)| {
            let mut order = json!(order);
            order["id"] = json!(id);
            order
        })
        .collect();
    Ok(Json(json!({ "faults": orders })))
}

async fn add_fault(State(world): State<Arc<World>>, body: Bytes) -> Answer {
    let order: Order = parse(&body)?;
    // A misspelt operation would make a test pass for the wrong reason.
    if let Some(name) = order.operation.as_deref().filter(|name| Operation::parse(name).is_none()) {
        return Err(bad(format!("unknown operation {name}")));
    }
    Ok(Json(json!({ "id": world.state().faults.add(order) })))
}

async fn clear_faults(State(world): State<Arc<World>>, uri: Uri) -> Answer {
    let id = Query::of(&uri).number("id")?;
    world.state().faults.clear(id);
    Ok(Json(json!({})))
}

async fn list_roles(State(world): State<Arc<World>>) -> Answer {
    let state = world.state();
    let session = |(access_key, session): (&String, &Session)| json!({ "access_key": access_key, "secret": session.secret, "token": session.token });
    let sessions: Vec<_> = state.roles.sessions().map(session).collect();
    Ok(Json(json!({ "roles": state.roles.list(), "sessions": sessions })))
}

async fn set_role(State(world): State<Arc<World>>, body: Bytes) -> Answer {
    let role: Role = parse(&body)?;
    // A misspelt role would make a test pass for the wrong reason.
    let parts: Vec<_> = role.arn.splitn(6, ':').collect();
    if !matches!(parts[..], ["arn", _, "iam", "", _, name] if name.starts_with("role/")) {
        return Err(bad("arn is not a role's"));
    }
    world.state().roles.set(role);
    list_roles(State(world)).await
}

async fn remove_role(State(world): State<Arc<World>>, uri: Uri) -> Answer {
    let query = Query::of(&uri);
    let arn = query.text("arn").ok_or_else(|| bad("which role?"))?;
    if !world.state().roles.remove(arn) {
        return Err(bad("no such role"));
    }
    list_roles(State(world)).await
}

async fn waiting(State(world): State<Arc<World>>, uri: Uri) -> Answer {
    poll(&world, &uri, "waiting", |world| {
        world.state().held.iter().map(|held| (held.id, Some(held.call.clone()))).collect()
    })
    .await
}

async fn pending_late(State(world): State<Arc<World>>, uri: Uri) -> Answer {
    poll(&world, &uri, "pending", |world| world.state().late.iter().map(|late| (late.id, late.call.clone())).collect())
        .await
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Release {
    operation: Option<String>,
    key: Option<String>,
    count: Option<usize>,
}

async fn release(State(world): State<Arc<World>>, body: Bytes) -> Answer {
    let wanted: Release = parse(&body)?;
    let released = {
        let mut state = world.state();
        let (mut released, mut rest) = (Vec::new(), Vec::new());
        for held in std::mem::take(&mut state.held) {
            let matches = is_of(&held.call, wanted.operation.as_deref(), wanted.key.as_deref())
                && wanted.count.is_none_or(|count| released.len() < count);
            if matches {
                released.push(held);
            } else {
                rest.push(held);
            }
        }
        state.held = rest;
        released
    };
    let count = released.into_iter().filter_map(|held| held.release.send(()).ok()).count();
    Ok(Json(json!({ "released": count })))
}

async fn release_all_late(State(world): State<Arc<World>>) -> Answer {
    Ok(Json(json!({ "released": release_late(&world).await })))
}

/// Waits until enough calls are held or late.
async fn poll(world: &World, uri: &Uri, name: &str, calls: impl Fn(&World) -> Vec<(u64, Option<Call>)>) -> Answer {
    let query = Query::of(uri);
    let wanted = usize::try_from(query.number("at_least")?.unwrap_or(0)).unwrap_or(usize::MAX);
    let deadline = query.deadline()?;
    loop {
        let moved = world.moved.notified();
        tokio::pin!(moved);
        moved.as_mut().enable();
        let calls: Vec<_> = calls(world)
            .into_iter()
            .filter_map(|(id, call)| Some((id, call?)))
            .filter(|(_, call)| is_of(call, query.text("operation"), query.text("key")))
            .map(|(id, call)| {
                json!({
                    "id": id,
                    "operation": call.operation.name(),
                    "key_arn": call.key_arn.as_deref(),
                    "client_gone": call.gone.load(std::sync::atomic::Ordering::Acquire),
                })
            })
            .collect();
        let reached = calls.len() >= wanted;
        if reached || timeout_at(deadline, moved).await.is_err() {
            return Ok(Json(json!({ name: calls.len(), "reached": reached, "calls": calls })));
        }
    }
}

fn is_of(call: &Call, operation: Option<&str>, key: Option<&str>) -> bool {
    operation.is_none_or(|operation| operation == call.operation.name())
        && key.is_none_or(|key| call.key_arn.as_deref().is_some_and(|arn| names(key, arn)))
}

/// The query string of a control call.
pub struct Query(HashMap<String, String>);

impl Query {
    /// Reads it.
    pub fn of(uri: &Uri) -> Self {
        Self(url::form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()).into_owned().collect())
    }

    /// A value, if it is there.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    fn number(&self, name: &str) -> Result<Option<u64>, Bad> {
        self.text(name).map(|text| text.parse().map_err(|_| bad(format!("{name} is not a number")))).transpose()
    }

    fn deadline(&self) -> Result<Instant, Bad> {
        Ok(Instant::now() + Duration::from_millis(self.number("timeout_ms")?.unwrap_or(0)))
    }

    fn filter(&self) -> Result<Filter, Bad> {
        let owned = |name: &str| self.text(name).map(ToOwned::to_owned);
        Ok(Filter {
            operation: owned("operation"),
            key: owned("key"),
            outcome: owned("outcome"),
            effect: owned("effect"),
            late: self.text("late").map(|text| text.parse().map_err(|_| bad("late is true or false"))).transpose()?,
        })
    }
}

/// The body of a control call.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Bad> {
    serde_json::from_slice(if body.is_empty() { b"{}" } else { body }).map_err(|error| bad(error.to_string()))
}

/// A control call that asks for nonsense.
pub fn bad(message: impl Into<String>) -> Bad {
    Bad(StatusCode::BAD_REQUEST, message.into())
}
