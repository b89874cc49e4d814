//! The part of the control interface that makes keys and looks into them.

use std::collections::HashMap;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{StatusCode, Uri};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::control::{Answer, Bad, Json, Query, bad, parse};
use crate::engine::open_all;
use crate::journal::{named, names};
use crate::keys::{Family, Key};
use crate::kinds::{ExpirationModel, KeySpec, KeyUsage, Origin, rfc3339};
use crate::materials::{Contents, Material};
use crate::operations::{Job, NewKey, new_key};
use crate::request::new_arn;
use crate::world::World;

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Seed {
    count: usize,
    spec: String,
    usage: Option<String>,
    region: String,
    account: String,
    origin: String,
    description: String,
    multi_region: bool,
    replica_of: Option<String>,
    tags: HashMap<String, String>,
}

impl Default for Seed {
    fn default() -> Self {
        Self {
            count: 1,
            spec: KeySpec::SymmetricDefault.name().to_owned(),
            usage: None,
            region: "eu-central-1".to_owned(),
            account: "111122223333".to_owned(),
            origin: Origin::External.name().to_owned(),
            description: String::new(),
            multi_region: false,
            replica_of: None,
            tags: HashMap::new(),
        }
    }
}

/// `POST /_fake/keys`.
pub async fn seed_keys(State(world): State<Arc<World>>, body: Bytes) -> Answer {
    seed(&world, &body).map(Json)
}

/// Makes the keys that are asked for.
pub fn seed(world: &World, body: &[u8]) -> Result<Value, Bad> {
    let mut seed: Seed = parse(body)?;
    if let Some(primary) = seed.replica_of.take() {
        return seed_replica(world, &primary, seed);
    }
    let spec = KeySpec::parse(&seed.spec).ok_or_else(|| bad("unknown spec"))?;
    let origin = Origin::parse(&seed.origin).ok_or_else(|| bad("unknown origin"))?;
    let usage = match seed.usage.as_deref() {
        None => spec.usages().first().copied(),
        Some(usage) => KeyUsage::parse(usage).filter(|usage| spec.usages().contains(usage)),
    };
    let usage = usage.ok_or_else(|| bad("unknown usage, or none for this spec"))?;
    let tags = sorted(seed.tags);
    let account: Arc<str> = seed.account.into();
    let now = world.now();
    let mut state = world.state();
    let region = state.region(&seed.region);
    let mut arns = Vec::with_capacity(seed.count);
    for _ in 0..seed.count {
        let new = NewKey {
            spec,
            usage,
            origin,
            description: seed.description.clone(),
            multi_region: seed.multi_region,
            tags: tags.clone(),
        };
        let key = new_key(new, &account, &region, now).map_err(|refusal| bad(refusal.message))?;
        arns.push(key.arn.to_string());
        state.keys.insert(key);
    }
    Ok(json!({ "arns": arns }))
}

/// What `ReplicateKey` would do: the id and the kind of the primary, but never its bytes.
fn seed_replica(world: &World, primary: &str, seed: Seed) -> Result<Value, Bad> {
    let now = world.now();
    let mut guard = world.state();
    let state = &mut *guard;
    let region = state.region(&seed.region);
    let primary = state.keys.find(primary, now, &mut state.journal).map_err(|refusal| bad(refusal.message))?;
    if !matches!(primary.family, Family::Primary { .. }) {
        return Err(bad("replica_of names no multi-Region primary"));
    }
    let arn: Arc<str> = new_arn(primary.id(), &primary.account, &region).into();
    let key = Key {
        arn: Arc::clone(&arn),
        account: Arc::clone(&primary.account),
        region,
        spec: primary.spec,
        usage: primary.usage,
        origin: primary.origin,
        description: seed.description,
        family: Family::Replica { primary: Arc::clone(&primary.arn) },
        created_at: now,
        tags: sorted(seed.tags),
        materials: Vec::new(),
        disabled: false,
        deletion_at: None,
        turning: None,
        before: None,
    };
    if state.keys.find(&arn, now, &mut state.journal).is_ok() {
        return Err(bad("the key lives in that Region already"));
    }
    state.keys.insert_replica(key, now, &mut state.journal);
    Ok(json!({ "arns": [&*arn] }))
}

/// `GET /_fake/keys`.
pub async fn list_keys(State(world): State<Arc<World>>, uri: Uri) -> Answer {
    let query = Query::of(&uri);
    let wanted = |key: &Key| {
        query.text("account").is_none_or(|account| account == &*key.account)
            && query.text("region").is_none_or(|region| region == &*key.region)
    };
    Ok(Json(json!({ "keys": show(&world, wanted).await })))
}

/// `GET /_fake/keys/<id or ARN>`.
pub async fn show_key(State(world): State<Arc<World>>, Path(wanted): Path<String>) -> Answer {
    let keys = show(&world, |key| names(&wanted, &key.arn)).await;
    keys.into_iter().next().map(Json).ok_or_else(|| Bad(StatusCode::NOT_FOUND, "no such key".to_owned()))
}

/// The keys that satisfy a condition, after time and unwrapping have been caught up with.
pub async fn show(world: &World, wanted: impl Fn(&Key) -> bool) -> Vec<Value> {
    let now = world.now();
    let jobs = {
        let mut guard = world.state();
        let state = &mut *guard;
        let arns: Vec<_> = state.keys.list(now, &wanted).iter().map(|key| Arc::clone(&key.arn)).collect();
        let mut jobs = Vec::new();
        for arn in arns {
            if let Ok(key) = state.keys.find(&arn, now, &mut state.journal) {
                jobs.extend(Job::all_of(key));
            }
        }
        jobs
    };
    open_all(world, jobs).await;
    world.state().keys.list(now, &wanted).into_iter().map(render).collect()
}

fn render(key: &Key) -> Value {
    let view = key.view();
    json!({
        "key_id": key.id(),
        "arn": &*key.arn,
        "account": &*key.account,
        "region": &*key.region,
        "spec": key.spec.name(),
        "usage": key.usage.name(),
        "origin": key.origin.name(),
        "description": key.description,
        "multi_region": match &key.family {
            Family::Single => None,
            Family::Primary { .. } => Some("PRIMARY"),
            Family::Replica { .. } => Some("REPLICA"),
        },
        "state": view.state.name(),
        "current_key_material_id": view.current.map(hex::encode),
        "expiration_model": view.model.map(ExpirationModel::name),
        "valid_to": view.valid_to.map(rfc3339),
        "deletion_date": view.deletion_at.map(rfc3339),
        "materials": key.materials.iter().map(render_material).collect::<Vec<_>>(),
    })
}

fn render_material(material: &Material) -> Value {
    let mut body = named(&material.id, material.contents.digests());
    body["role"] = json!(material.role.name());
    body["imported"] = json!(material.imported);
    body["description"] = json!(material.description);
    body["expiration_model"] = json!(material.model.map(ExpirationModel::name));
    body["valid_to"] = json!(material.valid_to.map(rfc3339));
    body["rotated_at"] = json!(material.rotated_at.map(rfc3339));
    body["error"] = match &material.contents {
        Contents::Broken(error) => json!(error),
        Contents::Known { .. } | Contents::Sealed(_) => Value::Null,
    };
    body
}

fn sorted(tags: HashMap<String, String>) -> Vec<(String, String)> {
    let mut tags: Vec<_> = tags.into_iter().collect();
    tags.sort();
    tags
}
