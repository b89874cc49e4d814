//! I8: a rotate brings one new material at most and rotates once at most, whatever happens.

use super::{Deed, calls, entries_of};
use crate::support::fake::WORKER;
use crate::support::snapshot::{Job, Snapshot};
use std::collections::{BTreeMap, BTreeSet};

/// I8: a rotate brings one new material at most, and rotates once at most; one that succeeded has its material in force.
pub(super) fn were_made_once(snapshot: &Snapshot, found: &mut Vec<String>) {
    let mut rotated: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    let mut brought: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for entry in &snapshot.journal {
        let Some(arn) = entry["key_arn"].as_str() else { continue };
        let is_ours = entry["access_key"] == WORKER;
        if let Some(sha256) = entry["effect"]["rotated"]["material_sha256"].as_str().filter(|_| is_ours) {
            *rotated.entry((arn, sha256)).or_default() += 1;
        }
        let imported = &entry["effect"]["imported"];
        let is_new = imported["first"] == false && imported["again"] == false && is_ours;
        if let Some(sha256) = imported["material_sha256"].as_str().filter(|_| is_new) {
            *brought.entry((arn, sha256)).or_default() += 1;
        }
    }
    let rotates: Vec<(&Job, String)> = snapshot
        .jobs
        .iter()
        .filter(|job| job.operation == "rotate" && !job.dry_run)
        .filter_map(|job| match Deed::of(snapshot, job)? {
            Deed::Import { sha256, .. } => Some((job, sha256)),
            Deed::Delete(_) => None,
        })
        .collect();
    for ((arn, sha256), times) in &rotated {
        let jobs = rotates.iter().filter(|(job, own)| job.arn == *arn && own == sha256).count();
        if *times > 1 || jobs == 0 {
            found.push(format!("I8: {arn} was rotated {times} times to {sha256}, which {jobs} jobs asked for"));
        }
    }
    for (arn, sha256) in brought.keys() {
        if !rotates.iter().any(|(job, own)| job.reaches(arn) && own == sha256) {
            found.push(format!("I8: {arn} was given the new material {sha256}, for which no rotate asked"));
        }
    }
    for (job, _) in &rotates {
        let intended = entries_of(snapshot, job).filter(|entry| entry["kind"] == "rotation_intended").count();
        let told = entries_of(snapshot, job).filter(|entry| entry["kind"] == "key_rotated").count();
        if told > 1 || told > intended {
            found.push(format!("I8: request {} tells of {told} rotations, and meant {intended}", job.request_id));
        }
    }
    for arn in rotates.iter().map(|(job, _)| job.arn.as_str()).collect::<BTreeSet<_>>() {
        let of_key = snapshot.jobs.iter().filter(|job| job.arn == arn).flat_map(|job| entries_of(snapshot, job));
        let intended = of_key.filter(|entry| entry["kind"] == "rotation_intended").count();
        let sent = calls(snapshot, arn, Some("RotateKeyOnDemand"));
        if sent > intended {
            found.push(format!("I4: {sent} rotations of {arn} were asked for, {intended} were on record before"));
        }
    }
    for (job, sha256) in rotates.iter().filter(|(job, _)| job.state == "succeeded") {
        let was_in_force = snapshot.journal.iter().any(|entry| {
            entry["key_arn"] == job.arn.as_str() && entry["effect"]["rotated"]["material_sha256"] == sha256.as_str()
        });
        if !was_in_force {
            found.push(format!("I8: request {} succeeded, and its material was never in force", job.request_id));
        }
    }
}
