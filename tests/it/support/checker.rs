//! The invariants, I1 to I8, judged over a [`Snapshot`]. Pure, so that it can be shown to fail.

mod rotations;

use super::broker::Message;
use super::fake::WORKER;
use super::snapshot::{Fold, Job, Refusal, Secret, Snapshot, SourceKey};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

/// Codes that end a job before anything but read-only calls was made.
const PREFLIGHT: [&str; 23] = [
    "source_key_unknown",
    "source_key_wrong_kind",
    "source_key_required",
    "source_key_deleted",
    "key_not_customer_managed",
    "key_not_found",
    "key_not_external",
    "key_disabled",
    "key_pending_deletion",
    "unexpected_current_material",
    "wrapping_not_allowed",
    "description_not_allowed",
    "key_kind_not_supported",
    "material_id_not_allowed",
    "material_unknown",
    "material_pending",
    "rotation_not_supported",
    "rotation_on_replica",
    "nothing_to_rotate",
    "rotations_spent",
    "rotation_too_soon",
    "replica_not_a_target",
    "replica_not_allowed",
];

const REFUSED_BODY: &str = "the body of a refused message";

/// Everything that is not as it must be.
pub fn violations(snapshot: &Snapshot) -> Vec<String> {
    let mut found = Vec::new();
    every_message_has_one_end(snapshot, &mut found);
    lines_were_kept_in_order(snapshot, &mut found);
    keys_hold_what_jobs_brought(snapshot, &mut found);
    rotations::were_made_once(snapshot, &mut found);
    the_record_is_true(snapshot, &mut found);
    deletes_left_nothing(snapshot, &mut found);
    every_outcome_was_told(snapshot, &mut found);
    the_audit_trail_is_whole(snapshot, &mut found);
    the_audit_trail_tells_who_asked(snapshot, &mut found);
    nothing_secret_shows(snapshot, &mut found);
    everything_is_drained(snapshot, &mut found);
    aws_is_called_for_jobs_only(snapshot, &mut found);
    found
}

/// I1: a message is one job, one refusal or a copy; a job ends once.
fn every_message_has_one_end(snapshot: &Snapshot, found: &mut Vec<String>) {
    let different: BTreeSet<&Message> = snapshot.published.iter().collect();
    // A retry is no message's.
    let jobs: Vec<&Job> = snapshot.jobs.iter().filter(|job| job.retry_of.is_none()).collect();
    let refusals = snapshot.refusals.len() + snapshot.folds.iter().map(|fold| size(fold.forgotten)).sum::<usize>();
    let rows = jobs.len() + refusals;
    if rows + snapshot.respelt != different.len() + snapshot.redriven {
        found.push(format!(
            "I1: {} different messages ({} of them respelt, {} redriven), but {} jobs and {} refusals",
            different.len(),
            snapshot.respelt,
            snapshot.redriven,
            jobs.len(),
            refusals
        ));
    }
    for fold in &snapshot.folds {
        let rows = snapshot.refusals.iter().filter(|refusal| refusal.fold == Some(fold.id)).count();
        if rows + size(fold.forgotten) != size(fold.count) {
            found.push(format!("I1: {fold:?} has {rows} refusals"));
        }
    }
    let mut ids = HashSet::new();
    for job in &snapshot.jobs {
        if !ids.insert((&job.principal, &job.request_id, job.retry_of)) {
            found.push(format!("I1: two jobs for request {} of {}", job.request_id, job.principal));
        }
        let is_whole = match job.state.as_str() {
            "succeeded" => job.result.is_some() && job.error.is_none(),
            "failed" => job.result.is_none() && !job.code().is_empty(),
            _ => false,
        };
        if !is_whole {
            found.push(format!("I1: job of request {} is {}, {:?}", job.request_id, job.state, job.error));
        }
    }
    let bodies: HashSet<&[u8]> = snapshot.published.iter().map(|message| message.body.as_slice()).collect();
    let dead: HashSet<&[u8]> = snapshot.dead.iter().map(Vec::as_slice).collect();
    if let Some(body) = dead.iter().find(|body| !bodies.contains(**body)) {
        found.push(format!("I1: a dead letter that nobody published: {}", String::from_utf8_lossy(body)));
    }
    let refused_bodies: HashSet<&[u8]> = snapshot
        .published
        .iter()
        .filter(|message| dead.contains(message.body.as_slice()))
        .map(|message| message.body.as_slice())
        .collect();
    if refused_bodies.len() > refusals || (dead.is_empty() && refusals > snapshot.redriven) {
        found.push(format!("I1: {refusals} refusals, {} different dead letters", dead.len()));
    }
}

fn size(count: i64) -> usize {
    usize::try_from(count).unwrap_or_default()
}

/// Refusals that have an entry and an event of their own.
fn told(snapshot: &Snapshot) -> impl Iterator<Item = &Refusal> {
    snapshot.refusals.iter().filter(|refusal| refusal.fold.is_none())
}

/// I1: one job of a line after the other, in the order of their places; urgent ones in theirs. A cancelled or abandoned job
/// ends when somebody says so.
fn lines_were_kept_in_order(snapshot: &Snapshot, found: &mut Vec<String>) {
    let mut last: BTreeMap<(i64, bool), &Job> = BTreeMap::new();
    let mut placed: Vec<&Job> = snapshot
        .jobs
        .iter()
        .filter(|job| job.seq.is_some() && !["cancelled", "abandoned"].contains(&job.code()))
        .collect();
    placed.sort_by_key(|job| (job.line_id, job.seq));
    for job in placed {
        if let Some(before) = last.insert((job.line_id, job.urgent), job)
            && before.finished_at > job.finished_at
        {
            found.push(format!("I1: request {} ended before request {}", job.request_id, before.request_id));
        }
    }
}

/// What is done to a key.
#[derive(Clone, Debug, PartialEq)]
enum Effect {
    /// Which bytes were imported, until when.
    Import { sha256: String, valid_to: Option<i64> },
    /// The material with this id was deleted.
    Delete(String),
}

/// What a job may do to its key.
#[derive(Debug)]
enum Deed {
    Import {
        sha256: String,
        valid_to: Option<i64>,
        /// What an abandoned rotate took away again.
        removed: Vec<String>,
    },
    /// The materials with these ids; none: the only one.
    Delete(Vec<String>),
}

impl Deed {
    fn of(snapshot: &Snapshot, job: &Job) -> Option<Self> {
        // As it was committed before the first call.
        let intended = entries_of(snapshot, job).find(|entry| entry["kind"] == "deletion_intended");
        let ids = intended.as_ref().and_then(|entry| entry["details"]["key_material_ids"].as_array());
        let removed = ids.map(|ids| ids.iter().filter_map(|id| Some(id.as_str()?.to_owned())).collect::<Vec<String>>());
        if job.operation == "delete" {
            return Some(Self::Delete(removed?));
        }
        let removed = removed.unwrap_or_default();
        let local = snapshot.source_keys.iter().find(|key| Some(key.id) == job.source_key_id).map(SourceKey::sha256);
        let of_dsm = || {
            let chosen = entries_of(snapshot, job).find(|entry| entry["kind"] == "material_chosen")?;
            snapshot.dsm_keys.get(chosen["details"]["source_key_id"].as_str()?).cloned()
        };
        Some(Self::Import { sha256: local.or_else(of_dsm)?, valid_to: job.valid_to, removed })
    }

    fn allows(&self, effect: &Effect) -> bool {
        match (self, effect) {
            (Self::Import { sha256, valid_to, .. }, Effect::Import { sha256: seen, valid_to: until }) => {
                sha256 == seen && valid_to == until
            }
            (Self::Import { removed, .. }, Effect::Delete(id)) => removed.contains(id),
            // Keys without material ids have one, which the double names all the same.
            (Self::Delete(ids), Effect::Delete(id)) => ids.is_empty() || ids.contains(id),
            _ => false,
        }
    }

    /// Whether the key is as the deed leaves it.
    fn stands(&self, key: &Value) -> bool {
        let materials = key["materials"].as_array().cloned().unwrap_or_default();
        let mut held = materials.iter().filter(|held| held["imported"] == true);
        match self {
            Self::Import { sha256, valid_to, .. } => {
                held.any(|held| held["material_sha256"] == sha256.as_str() && seconds(&held["valid_to"]) == *valid_to)
            }
            Self::Delete(ids) => {
                held.all(|held| !ids.is_empty() && !ids.iter().any(|id| held["key_material_id"] == id.as_str()))
            }
        }
    }
}

/// I2: the worker's effects on a key are those of its jobs, in their order; the last one stands.
fn keys_hold_what_jobs_brought(snapshot: &Snapshot, found: &mut Vec<String>) {
    for key in snapshot.kms_keys.iter().filter(|key| key["origin"] == "EXTERNAL") {
        let arn = key["arn"].as_str().unwrap_or_default();
        // What jobs may have done, in the order in which they ended: no job begins to change a key before the one that
        // changed it last has ended, urgent or not.
        let mut jobs: Vec<&Job> = snapshot
            .jobs
            .iter()
            .filter(|job| job.reaches(arn) && !job.dry_run && (job.state == "succeeded" || job.aws_changed()))
            .collect();
        jobs.sort_by_key(|job| job.finished_at);
        let allowed: Vec<(Deed, bool)> =
            jobs.into_iter().filter_map(|job| Some((Deed::of(snapshot, job)?, job.state == "succeeded"))).collect();
        let effects = effects(snapshot, arn, |access_key| access_key == WORKER);
        let mut at = 0;
        for effect in &effects {
            match allowed[at..].iter().position(|(deed, _)| deed.allows(effect)) {
                Some(ahead) => at += ahead,
                None => found.push(format!("I2: {arn} was given {effect:?} out of turn; jobs allow {allowed:?}")),
            }
        }
        for (wanted, _) in allowed.iter().filter(|(_, succeeded)| *succeeded) {
            let Deed::Import { sha256, valid_to, .. } = wanted else { continue };
            let wanted = Effect::Import { sha256: sha256.clone(), valid_to: *valid_to };
            let jobs = allowed.iter().filter(|(deed, succeeded)| *succeeded && deed.allows(&wanted)).count();
            let times = effects.iter().filter(|effect| **effect == wanted).count();
            // A rotate does not bring to a replica again what that has already.
            let is_primary = snapshot.jobs.iter().any(|job| job.arn == arn);
            if is_primary && times < jobs {
                found.push(format!("I2: {jobs} jobs say that they gave {arn} {wanted:?}; KMS saw {times}"));
            }
        }
        let was_touched = !is_untouched_by_others(snapshot, arn);
        let last = allowed.iter().rposition(|(_, succeeded)| *succeeded);
        if let (Some(last), false) = (last, was_touched)
            && !allowed[last..].iter().any(|(deed, _)| deed.stands(key))
        {
            found.push(format!("I2: {arn} holds {}; the latest job did {:?}", key["materials"], allowed[last].0));
        }
        let was_given = allowed.iter().any(|(deed, _)| matches!(deed, Deed::Import { .. }));
        // Of what its primary was given a replica knows at once.
        let holds = key["materials"].as_array().is_some_and(|held| held.iter().any(|held| held["imported"] == true));
        if !was_given && !was_touched && holds {
            found.push(format!("I2: {arn} holds material although no job brought any"));
        }
    }
}

/// I2: the record says of each material whether it is there, as far as only the worker has touched it since.
fn the_record_is_true(snapshot: &Snapshot, found: &mut Vec<String>) {
    for material in snapshot.materials.iter().filter(|material| material.is_certain) {
        let names_it = |change: &Value| match &material.key_material_id {
            Some(id) => change["key_material_id"] == id.as_str(),
            None => true,
        };
        let last = snapshot.journal.iter().rfind(|entry| {
            entry["key_arn"] == material.arn.as_str()
                && ["imported", "deleted"].iter().any(|kind| entry["effect"].get(kind).is_some_and(names_it))
        });
        let Some(last) = last.filter(|last| last["access_key"] == WORKER) else { continue };
        if last["effect"].get("deleted").is_some() != material.is_removed {
            found.push(format!("I2: the record says {material:?}, KMS saw last: {}", last["effect"]));
        }
    }
}

/// I2: a delete that succeeded has, directly after its last call, left none of what it meant.
fn deletes_left_nothing(snapshot: &Snapshot, found: &mut Vec<String>) {
    for job in snapshot.jobs.iter().filter(|job| job.operation == "delete" && job.state == "succeeded") {
        let Some(Deed::Delete(ids)) = Deed::of(snapshot, job) else { continue };
        let told: BTreeSet<String> = entries_of(snapshot, job)
            .filter(|entry| entry["kind"] == "material_deleted")
            .filter_map(|entry| Some(entry["details"]["key_material_id"].as_str()?.to_owned()))
            .collect();
        if ids.iter().any(|id| !told.contains(id)) {
            found.push(format!("I2: request {} meant to delete {ids:?}, and tells of {told:?}", job.request_id));
        }
        let calls = calls(snapshot, &job.arn, Some("DeleteImportedKeyMaterial"));
        if calls < ids.len().max(1) {
            found.push(format!("I2: request {} deleted {ids:?} in {calls} calls", job.request_id));
        }
    }
}

/// Imports and deletions by some callers, in their order.
fn effects(snapshot: &Snapshot, arn: &str, by: impl Fn(&str) -> bool) -> Vec<Effect> {
    snapshot
        .journal
        .iter()
        .filter(|entry| entry["key_arn"] == arn && entry["access_key"].as_str().is_some_and(&by))
        .filter_map(|entry| {
            if let Some(imported) = entry["effect"].get("imported") {
                let sha256 = imported["material_sha256"].as_str()?.to_owned();
                return Some(Effect::Import { sha256, valid_to: seconds(&imported["valid_to"]) });
            }
            Some(Effect::Delete(entry["effect"].get("deleted")?["key_material_id"].as_str()?.to_owned()))
        })
        .collect()
}

/// Whether nobody but the worker has changed the key's materials or state, and none of them has expired.
fn is_untouched_by_others(snapshot: &Snapshot, arn: &str) -> bool {
    let is_other = |entry: &Value| {
        entry["key_arn"] == arn
            && entry["access_key"] != WORKER
            && entry["effect"].as_object().is_some_and(|effect| !effect.contains_key("created"))
    };
    !snapshot.journal.iter().any(is_other)
}

fn entries_of<'a>(snapshot: &'a Snapshot, job: &Job) -> impl Iterator<Item = Value> + 'a {
    let id = job.id;
    let entries = snapshot.audit.iter().filter(move |entry| entry.subject == id);
    entries.filter_map(|entry| serde_json::from_str(&entry.text).ok())
}

fn seconds(time: &Value) -> Option<i64> {
    OffsetDateTime::parse(time.as_str()?, &Rfc3339).ok().map(OffsetDateTime::unix_timestamp)
}

/// I3: every outcome has its event; all copies are one.
fn every_outcome_was_told(snapshot: &Snapshot, found: &mut Vec<String>) {
    let mut told: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for event in &snapshot.events {
        let Ok(body) = serde_json::from_slice::<Value>(&event.body) else {
            found.push("I3: an event is not JSON".to_owned());
            continue;
        };
        let id = body["id"].as_str().unwrap_or_default().to_owned();
        if event.message_id.as_deref() != Some(id.as_str())
            || event.content_type.as_deref() != Some("application/cloudevents+json")
            || event.delivery_mode != Some(2)
        {
            found.push(format!("I3: the event {id} has wrong properties: {event:?}"));
        }
        let outcome = body["type"].as_str().unwrap_or_default().rsplit('.').next().unwrap_or_default();
        if !event.routing_key.starts_with(&format!("job.{outcome}.")) || event.routing_key.matches('.').count() != 4 {
            found.push(format!("I3: the event {id} came with routing key {}", event.routing_key));
        }
        told.entry(id).or_default().push(body);
    }
    let outcomes = snapshot.jobs.iter().map(|job| (job.id, job.state.clone(), Some(job.request_id.clone())));
    let refused = self::told(snapshot).map(|one| (one.id, "rejected".to_owned(), one.request_id.clone()));
    let folded = snapshot.folds.iter().map(|fold| (fold.id, "rejected".to_owned(), None));
    let counts: BTreeMap<Uuid, &Fold> = snapshot.folds.iter().map(|fold| (fold.id, fold)).collect();
    for (id, state, request_id) in outcomes.chain(refused).chain(folded) {
        let copies = told.remove(&id.to_string()).unwrap_or_default();
        let Some(first) = copies.first() else {
            found.push(format!("I3: no event tells that request {request_id:?} {state}"));
            continue;
        };
        if copies.iter().any(|copy| copy != first) {
            found.push(format!("I3: the copies of event {id} differ"));
        }
        if !tells_how_many(&first["data"], counts.get(&id).copied())
            || first["type"] != format!("io.keyferry.job.{state}")
            || first["data"]["job"]["state"] != state
            || first["data"]["job"]["request_id"] != serde_json::json!(request_id)
        {
            found.push(format!("I3: the event of request {request_id:?} does not say {state}: {first}"));
        }
    }
    found.extend(told.keys().map(|id| format!("I3: the event {id} tells of nothing that is on record")));
}

/// Whether an event or an entry counts just the refusals of a fold; without a fold, none.
fn tells_how_many(told: &Value, fold: Option<&Fold>) -> bool {
    let folded = &told["folded"];
    fold.map_or(folded.is_null(), |fold| folded["count"] == fold.count && folded["code"] == fold.code.as_str())
}

/// I4: entries are numbered without gaps, their bytes are canonical, and every change has its own.
fn the_audit_trail_is_whole(snapshot: &Snapshot, found: &mut Vec<String>) {
    let mut trails: BTreeMap<Uuid, Vec<Value>> = BTreeMap::new();
    for entry in &snapshot.audit {
        let trail = trails.entry(entry.subject).or_default();
        let parsed: Value = serde_json::from_str(&entry.text).unwrap_or(Value::Null);
        let canonical = parsed.to_string();
        let is_whole = parsed["v"] == 1
            && parsed["subject"] == entry.subject.to_string()
            && parsed["n"] == entry.n
            && entry.text == canonical;
        if !is_whole {
            found.push(format!("I4: entry {} of {} is not canonical: {}", entry.n, entry.subject, entry.text));
        }
        trail.push(parsed);
        if i32::try_from(trail.len()) != Ok(entry.n) {
            found.push(format!("I4: the entries of {} have a gap before {}", entry.subject, entry.n));
        }
    }
    for job in &snapshot.jobs {
        let trail = trails.remove(&job.id).unwrap_or_default();
        let kinds: Vec<&str> = trail.iter().map(|entry| entry["kind"].as_str().unwrap_or_default()).collect();
        let count = |wanted: &str| kinds.iter().filter(|kind| **kind == wanted).count();
        let ends = count("succeeded") + count("failed");
        if kinds.first() != Some(&"accepted") || kinds.last() != Some(&job.state.as_str()) || ends != 1 {
            found.push(format!("I4: request {}, {}: its trail is {kinds:?}", job.request_id, job.state));
        }
        // Once AWS has said that it took the material, nothing may say that it was not changed.
        let is_change = |entry: &Value| entry["kind"] == "material_imported" || entry["kind"] == "material_deleted";
        let mut since_import = trail.iter().skip_while(|entry| !is_change(entry));
        if since_import.any(|entry| entry["details"]["aws_changed"] == false) {
            found.push(format!("I4: request {}: its trail denies that AWS was changed", job.request_id));
        }
        let is_told = match job.operation.as_str() {
            // A dry run is accepted and ends; what it saw is in its result.
            _ if job.dry_run => kinds.iter().all(|kind| {
                ["accepted", "attempt_failed", "cancel_requested", "abandon_requested", &job.state].contains(kind)
            }),
            // Nothing was meant where there has never been material.
            "delete" if job.result.as_ref().is_some_and(|result| result["key_material_ids"] == json!([])) => true,
            "delete" => count("deletion_intended") > 0 || job.state == "failed",
            // A retry that finds in force what the failed job had brought has nothing to send.
            "rotate" if job.retry_of.is_some() && count("parameters_obtained") == 0 => count("material_imported") == 0,
            _ => (count("material_chosen") == 1 && count("parameters_obtained") > 0) || job.state == "failed",
        };
        let asked = match job.code() {
            "cancelled" => Some("cancel_requested"),
            "abandoned" => Some("abandon_requested"),
            _ => None,
        };
        if !is_told || asked.is_some_and(|kind| count(kind) != 1) {
            found.push(format!("I4: request {}, {}: its trail is {kinds:?}", job.request_id, job.state));
        }
    }
    for fold in &snapshot.folds {
        let trail = trails.remove(&fold.id).unwrap_or_default();
        let is_whole = trail.len() == 1
            && trail[0]["kind"] == "refused"
            && tells_how_many(&trail[0]["details"], Some(fold))
            && tells_who(&trail[0], &fold.principal, fold.identity.as_ref());
        if !is_whole {
            found.push(format!("I4: {fold:?} has the trail {trail:?}"));
        }
    }
    for refusal in told(snapshot) {
        let trail = trails.remove(&refusal.id).unwrap_or_default();
        let is_whole = trail.len() == 1
            && trail[0]["kind"] == "refused"
            && trail[0]["details"]["code"] == refusal.code
            && tells_how_many(&trail[0]["details"], None)
            && trail[0]["details"]["identity_verified"] == refusal.identity_verified
            && tells_who(&trail[0], &refusal.principal, refusal.identity.as_ref());
        if !is_whole {
            found.push(format!("I4: the refusal {} has the trail {trail:?}", refusal.id));
        }
    }
    for key in snapshot.source_keys.iter().filter(|key| key.origin == "imported") {
        if trails.remove(&key.id).is_none_or(|trail| trail[0]["kind"] != "source_key_imported") {
            found.push(format!("I4: nothing says where the source key {} comes from", key.name));
        }
    }
    for id in &snapshot.holds {
        if trails.remove(id).is_none_or(|trail| trail[0]["kind"] != "held" || trail.len() > 2) {
            found.push(format!("I4: nothing says who held what by {id}"));
        }
    }
    // What an operator had published again; which events they are is compared with those that came.
    trails.retain(|_, trail| trail.iter().any(|entry| entry["kind"] != "events_republished"));
    let known: HashSet<Uuid> = snapshot.source_keys.iter().map(|key| key.id).collect();
    found.extend(
        trails.keys().filter(|id| !known.contains(id)).map(|id| format!("I4: entries about {id}, which is unknown")),
    );
    every_call_is_announced(snapshot, found);
}

/// I4: what changes AWS was on record before.
fn every_call_is_announced(snapshot: &Snapshot, found: &mut Vec<String>) {
    for arn in snapshot.kms_keys.iter().filter_map(|key| key["arn"].as_str()) {
        let of_key: HashSet<Uuid> = snapshot.jobs.iter().filter(|job| job.reaches(arn)).map(|job| job.id).collect();
        let intended = snapshot
            .audit
            .iter()
            .filter(|entry| of_key.contains(&entry.subject))
            // The choice of the material announces the first import, an entry of its own each further one.
            .filter(|entry| {
                ["material_chosen", "import_intended"]
                    .iter()
                    .any(|kind| entry.text.contains(&format!(r#""kind":"{kind}""#)))
            })
            .count();
        let calls = calls(snapshot, arn, Some("ImportKeyMaterial"));
        if calls > intended {
            found.push(format!("I4: {calls} imports into {arn} were sent, {intended} were on record before"));
        }
        let jobs = snapshot.jobs.iter().filter(|job| job.arn == arn);
        let intended: usize = jobs
            .flat_map(|job| entries_of(snapshot, job))
            .filter(|entry| entry["kind"] == "deletion_intended")
            .map(|entry| entry["details"]["key_material_ids"].as_array().map_or(0, Vec::len).max(1))
            .sum();
        let calls = self::calls(snapshot, arn, Some("DeleteImportedKeyMaterial"));
        if calls > intended {
            found.push(format!("I4: {calls} deletions from {arn} were sent, {intended} were on record before"));
        }
    }
}

/// I4: the trail says who asked, whether that was proved, and by which policy it was judged.
fn the_audit_trail_tells_who_asked(snapshot: &Snapshot, found: &mut Vec<String>) {
    for job in &snapshot.jobs {
        let trail: Vec<Value> = entries_of(snapshot, job).collect();
        let is_told_who = trail.first().is_some_and(|entry| tells_who(entry, &job.principal, job.identity.as_ref()));
        let is_told_why = trail
            .last()
            .is_some_and(|entry| entry["details"]["code"] != "revoked" || entry["details"]["policy"].is_string());
        if !is_told_who || !is_told_why {
            found.push(format!("I4: request {}: its trail does not tell by whom and by which policy", job.request_id));
        }
    }
    for refusal in told(snapshot) {
        let entry = snapshot.audit.iter().find(|entry| entry.subject == refusal.id);
        let entry: Value = entry.and_then(|entry| serde_json::from_str(&entry.text).ok()).unwrap_or_default();
        if !tells_who(&entry, &refusal.principal, refusal.identity.as_ref())
            || entry["details"]["identity_verified"] != refusal.identity_verified
        {
            found.push(format!("I4: the refusal {} does not tell by whom and by which policy: {entry}", refusal.id));
        }
    }
}

/// Whether an entry says who asked, and by which policy that was judged.
fn tells_who(entry: &Value, principal: &str, identity: Option<&String>) -> bool {
    let details = &entry["details"];
    details["principal"] == principal && details["identity"] == json!(identity) && details["policy"].is_string()
}

/// I5: no key bytes and no secret of a message, in any spelling; no refused message as a whole.
fn nothing_secret_shows(snapshot: &Snapshot, found: &mut Vec<String>) {
    let material = snapshot.source_keys.iter().flat_map(|key| {
        let name = format!("the bytes of source key {}", key.name);
        key.secret_parts().into_iter().map(move |bytes| Secret { name: name.clone(), bytes })
    });
    let secrets: Vec<(String, Vec<Vec<u8>>)> =
        snapshot.secrets.iter().cloned().chain(material).map(|one| (one.name, spellings(&one.bytes))).collect();
    let told = snapshot.events.iter().map(|event| ("an event".to_owned(), event.body.clone()));
    let texts: Vec<(String, Vec<u8>)> = snapshot.texts.iter().cloned().chain(told).collect();
    // What a publisher sent and should not have; shorter ones can be found by chance.
    let bodies = snapshot.dead.iter().filter(|body| body.len() >= 24);
    let bodies = bodies.map(|body| (REFUSED_BODY.to_owned(), vec![body.clone()]));
    for (name, spellings) in secrets.into_iter().chain(bodies) {
        for (place, text) in &texts {
            // What was accepted is kept there in canonical form, which can be what another message lacked an id for.
            let is_own = place == "job.request" && name == REFUSED_BODY;
            if !is_own && spellings.iter().any(|spelling| holds(text, spelling)) {
                found.push(format!("I5: {place} shows {name}"));
            }
        }
    }
}

fn spellings(bytes: &[u8]) -> Vec<Vec<u8>> {
    let debug = format!("{bytes:?}");
    vec![
        bytes.to_vec(),
        hex::encode(bytes).into_bytes(),
        hex::encode_upper(bytes).into_bytes(),
        STANDARD.encode(bytes).into_bytes(),
        STANDARD_NO_PAD.encode(bytes).into_bytes(),
        URL_SAFE_NO_PAD.encode(bytes).into_bytes(),
        debug.trim_matches(['[', ']']).as_bytes().to_vec(),
    ]
}

fn holds(text: &[u8], part: &[u8]) -> bool {
    let Some(first) = part.first() else { return false };
    text.iter().enumerate().any(|(at, byte)| byte == first && text[at..].starts_with(part))
}

/// I6: nothing waits any more.
fn everything_is_drained(snapshot: &Snapshot, found: &mut Vec<String>) {
    found.extend(
        snapshot.left.iter().filter(|(_, count)| **count != 0).map(|(place, count)| format!("I6: {count} in {place}")),
    );
    for line in &snapshot.lines {
        if line.is_due || line.is_leased || line.head != line.tail + 1 {
            found.push(format!("I6: a line is not empty: {line:?}"));
        }
        let places: BTreeSet<i64> =
            snapshot.jobs.iter().filter(|job| job.line_id == line.id).filter_map(|job| job.seq).collect();
        if !places.iter().copied().eq(1..=line.tail) {
            found.push(format!("I6: places of line {} are {places:?}, its tail is {}", line.id, line.tail));
        }
    }
}

/// I7: no call for a copy or a refusal, read-only ones for a failed pre-flight.
fn aws_is_called_for_jobs_only(snapshot: &Snapshot, found: &mut Vec<String>) {
    for arn in snapshot.kms_keys.iter().filter_map(|key| key["arn"].as_str()) {
        let jobs: Vec<&Job> = snapshot.jobs.iter().filter(|job| job.reaches(arn)).collect();
        let all = calls(snapshot, arn, None);
        if jobs.is_empty() && all > 0 {
            found.push(format!("I7: {all} AWS calls for {arn}, on which there is no job"));
        }
        let sent = calls(snapshot, arn, Some("ImportKeyMaterial"));
        let changing = sent
            + calls(snapshot, arn, Some("DeleteImportedKeyMaterial"))
            + calls(snapshot, arn, Some("RotateKeyOnDemand"));
        if !jobs.is_empty() && jobs.iter().all(|job| PREFLIGHT.contains(&job.code())) && changing > 0 {
            found.push(format!("I7: {changing} changes of {arn}, whose jobs all failed before"));
        }
        let scarce = changing + calls(snapshot, arn, Some("GetParametersForImport"));
        if !jobs.is_empty() && jobs.iter().all(|job| job.dry_run) && scarce > 0 {
            found.push(format!("I7: {scarce} scarce calls for {arn}, whose jobs were dry runs"));
        }
        // A rotate that is in doubt may have to ask twice: whether the material is new, and whether it is in force.
        let attempts: i32 = jobs.iter().map(|job| job.attempts * if job.operation == "rotate" { 2 } else { 1 }).sum();
        if i32::try_from(sent).is_ok_and(|sent| sent > attempts) {
            found.push(format!("I7: {sent} imports into {arn} in {attempts} attempts"));
        }
        let changed = effects(snapshot, arn, |access_key| access_key == WORKER).len();
        if jobs.iter().all(|job| job.state == "failed" && !job.aws_changed()) && changed > 0 {
            found.push(format!("I7: {arn} was changed, and its jobs say that it was not"));
        }
    }
}

/// Calls of the worker for a key. A late effect is no call of its own.
fn calls(snapshot: &Snapshot, arn: &str, operation: Option<&str>) -> usize {
    snapshot
        .journal
        .iter()
        .filter(|entry| entry["access_key"] == WORKER && entry["key_arn"] == arn)
        .filter(|entry| operation.is_none_or(|operation| entry["operation"] == operation))
        .filter(|entry| !(entry["late"] == true && entry["fault"] == "late" && entry["outcome"] != "late"))
        .count()
}
