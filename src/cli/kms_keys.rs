//! `keyferry kms-keys`: what is in AWS, by our record.

use super::output::{Output, duration};
use super::{Coded, Failed};
use crate::app::open_store;
use crate::config::Loaded;
use crate::job::rfc3339;
use crate::store::{KmsKeyFilter, KmsKeyView, MaterialView};
use clap::{Args, Subcommand};
use std::time::Duration;
use time::OffsetDateTime;

#[derive(Debug, Subcommand)]
pub(super) enum KmsKeys {
    /// List the KMS keys on which there were jobs, in the order of their ARNs. AWS is not asked: state and material are as
    /// the last job that succeeded saw them, and what others have changed since is not known.
    List(List),
    /// Show one KMS key with every material that jobs have put on it, or may have.
    Show {
        /// Its ARN, or the id that Keyferry gave it.
        key: String,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    keyferry kms-keys list --expires-within 30d      what to renew within a month\n  \
    keyferry kms-keys list --source-key payroll      where a source key is in use\n  \
    keyferry kms-keys list --json --limit 1000 --after arn:aws:kms:...   the next page\n\n\
    The rights to read are enough: database.url may be that of keyferry_reader.")]
pub(super) struct List {
    /// Only keys of this AWS account.
    #[arg(long, value_name = "ID")]
    account: Option<String>,
    /// Only keys of this Region.
    #[arg(long, value_name = "NAME")]
    region: Option<String>,
    /// Only keys with a material that ends within this time, such as 12h or 30d, or has ended.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    expires_within: Option<Duration>,
    /// Only keys that hold, may hold, or have held the material of this source key: its name or id, or
    /// CONNECTION/IDENTIFIER of a key on a KMIP server.
    #[arg(long, value_name = "NAME")]
    source_key: Option<String>,
    /// Rows at most.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(i64).range(1..=1_000))]
    limit: i64,
    /// Only keys after this ARN: the last of the page before.
    #[arg(long, value_name = "ARN")]
    after: Option<String>,
}

impl KmsKeys {
    pub(super) async fn run(self, loaded: &Loaded, output: Output) -> Result<(), Failed> {
        let store = open_store(loaded).await?;
        match self {
            Self::List(List { account, region, expires_within, source_key, limit, after }) => {
                let filter = KmsKeyFilter { account, region, source_key, expires_within, after, limit };
                let keys = store.kms_keys(&filter).await?;
                output.table(
                    &keys,
                    ["ARN", "KIND", "STATE", "SOURCE KEY", "EXPIRES", "LAST JOB", "WAITING", "HELD"],
                    |key| {
                        [
                            key.arn.clone(),
                            key.kind.clone().unwrap_or_default(),
                            key.state.clone().unwrap_or_default(),
                            key.current_material.as_ref().map(source).unwrap_or_default(),
                            key.expires_at.map(rfc3339).unwrap_or_default(),
                            last(key),
                            key.waiting.to_string(),
                            key.holds.iter().map(|hold| hold.scope.as_str()).collect::<Vec<_>>().join(", "),
                        ]
                    },
                );
            }
            Self::Show { key } => {
                let Some(found) = store.kms_key(&key).await? else {
                    let message = format!("no job ever was for the KMS key {key}; see keyferry kms-keys list");
                    return Err(Coded { code: "kms_key_unknown", message }.into());
                };
                output.value(&found, shown);
            }
        }
        Ok(())
    }
}

/// For people.
fn shown(key: &KmsKeyView) -> String {
    let time = |at: Option<OffsetDateTime>| at.map_or_else(|| "-".to_owned(), rfc3339);
    let state = match (&key.state, key.seen_at) {
        (Some(state), Some(at)) => format!("{state}, as seen at {}", rfc3339(at)),
        _ => "not seen: no job has succeeded".to_owned(),
    };
    let current = match &key.current_material {
        Some(held) => format!("{}{}", source(held), id(held)),
        None => "none on record, or gone".to_owned(),
    };
    let mut lines = vec![
        format!("key        {}", key.arn),
        format!("id         {}", key.id),
        format!("kind       {}", key.kind.as_deref().unwrap_or("-")),
        format!("state      {state}"),
        format!("material   {current}"),
        format!("expires    {}", time(key.expires_at)),
        format!("last job   {}", last(key)),
        format!("waiting    {}{}", key.waiting, if key.is_running { ", one of them under way" } else { "" }),
    ];
    if let Some(used) = key.rotations {
        lines.push(format!("rotations  {used} on demand; AWS allows 25, for good"));
    }
    if let Some(until) = key.closed_until {
        let until = rfc3339(until);
        lines.push(format!("closed     until {until} to jobs that contradict an unanswered call"));
    }
    for hold in &key.holds {
        let reason = hold.reason.as_deref().map(|reason| format!(": {reason}")).unwrap_or_default();
        let what = format!("{} {}", hold.scope, hold.value);
        lines.push(format!("held       {}, by {} since {}{reason}", what.trim_end(), hold.by, rfc3339(hold.at)));
    }
    lines.extend(key.other_regions.iter().map(|arn| format!("also       {arn}")));
    for held in &key.materials {
        let became = match (held.imported_at, held.removed_at) {
            (_, Some(at)) => format!("gone since {}", rfc3339(at)),
            (Some(at), None) => format!("imported {}", rfc3339(at)),
            (None, None) => "may be there: AWS's answer was never learnt".to_owned(),
        };
        let ends = held.valid_to.map_or_else(|| "for ever".to_owned(), |at| format!("until {}", rfc3339(at)));
        lines.push(format!("           {}{}  {became}, {ends}, by job {}", source(held), id(held), held.job_id));
    }
    lines.join("\n")
}

fn source(held: &MaterialView) -> String {
    match held.source_key_tier.as_str() {
        "local" => held.source_key_name.clone(),
        tier => format!("{tier} {}", held.source_key_name),
    }
}

fn id(held: &MaterialView) -> String {
    held.key_material_id.as_deref().map(|id| format!(" ({id})")).unwrap_or_default()
}

fn last(key: &KmsKeyView) -> String {
    let Some(job) = &key.last_job else { return String::new() };
    let code = job.code.as_deref().map(|code| format!(" ({code})")).unwrap_or_default();
    format!("{} {}{code}", job.operation, job.state)
}
