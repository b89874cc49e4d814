//! `keyferry hold` and `keyferry release`.

use super::jobs::progress_bar;
use super::output::Output;
use super::{Failed, operator};
use crate::app::open_store;
use crate::config::Loaded;
use crate::job::{KeyArn, rfc3339};
use crate::store::{Held, Scope, Store};
use anyhow::anyhow;
use clap::{Args, Subcommand};
use serde_json::json;
use std::time::Duration;
use uuid::Uuid;

const POLL: Duration = Duration::from_millis(200);

/// Stop jobs at once, in every worker, until they are released. What waits goes on waiting, dry runs too; a call to AWS
/// that is under way, or is about to be sent, goes on to its answer, and no other step follows it; --wait waits for that.
/// Deadlines go on counting: a job whose deadline passes while it is held fails when it is released. Jobs behind a held one
/// on the same key wait with it.
#[derive(Debug, Args)]
pub(super) struct Hold {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Every job.
    Everything(Because),
    /// Jobs on KMS keys of an AWS account.
    Account {
        /// The account's 12 digits.
        #[arg(value_parser = account)]
        account: String,
        #[command(flatten)]
        because: Because,
    },
    /// Jobs on KMS keys of a Region.
    Region {
        /// Its name, such as eu-central-1.
        region: String,
        #[command(flatten)]
        because: Because,
    },
    /// Jobs that a principal asked for.
    Principal {
        /// Its name.
        principal: String,
        #[command(flatten)]
        because: Because,
    },
    /// Jobs on one KMS key; of a multi-Region key, in all Regions.
    Key {
        /// Its ARN, or the id that Keyferry gave it.
        key: String,
        #[command(flatten)]
        because: Because,
    },
    /// List what is held.
    List,
}

#[derive(Debug, Args)]
struct Because {
    /// Why, for the list and the audit trail.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Wait until no job within it is under way any more. Exit code 4 if that takes more than five minutes.
    #[arg(long)]
    wait: bool,
}

/// Let go on what was held, by the same words. Jobs that another hold stops too go on waiting.
#[derive(Debug, Args)]
pub(super) struct Release {
    #[command(subcommand)]
    what: Released,
}

#[derive(Debug, Subcommand)]
enum Released {
    /// What was held as everything; other holds stay.
    Everything,
    /// An AWS account.
    Account {
        /// The account's 12 digits.
        #[arg(value_parser = account)]
        account: String,
    },
    /// A Region.
    Region {
        /// Its name.
        region: String,
    },
    /// A principal.
    Principal {
        /// Its name.
        principal: String,
    },
    /// One KMS key.
    Key {
        /// Its ARN, or the id that Keyferry gave it.
        key: String,
    },
}

impl Hold {
    pub(super) async fn run(self, loaded: &Loaded, output: Output) -> Result<(), Failed> {
        let store = open_store(loaded).await?;
        let (scope, because) = match self.what {
            What::List => return list(&store, output).await,
            What::Everything(because) => (Scope::Everything, because),
            What::Account { account, because } => (Scope::Account(account), because),
            What::Region { region, because } => (Scope::Region(region), because),
            What::Principal { principal, because } => (Scope::Principal(principal), because),
            What::Key { key, because } => (Scope::Key(key_of(&store, &key).await?), because),
        };
        warn_of_strangers(loaded, &scope);
        let held = store.hold(&scope, because.reason.as_deref(), &operator()).await?;
        let mut left = store.under_way(&scope).await?;
        if because.wait {
            left = wait_for(&store, &scope, left).await?;
        }
        let (is_new, hold) = match held {
            Held::Now(hold) => (true, hold),
            Held::Before(hold) => (false, hold),
        };
        output.value(&json!({"held": hold, "is_new": is_new, "under_way": left}), |_| {
            let name = name_of(&hold.scope, &hold.value);
            let since =
                if is_new { String::new() } else { format!(" already, by {} since {}", hold.by, rfc3339(hold.at)) };
            let left = match left {
                0 => "no job within it is under way".to_owned(),
                left => format!("{left} jobs within it are under way and stop at their next step"),
            };
            format!("{name} is held{since}; {left}")
        });
        Ok(())
    }
}

impl Release {
    pub(super) async fn run(self, loaded: &Loaded, output: Output) -> Result<(), Failed> {
        let store = open_store(loaded).await?;
        let scope = match self.what {
            Released::Everything => Scope::Everything,
            Released::Account { account } => Scope::Account(account),
            Released::Region { region } => Scope::Region(region),
            Released::Principal { principal } => Scope::Principal(principal),
            Released::Key { key } => Scope::Key(key_of(&store, &key).await?),
        };
        let Some(hold) = store.release(&scope, &operator()).await? else {
            let name = name_of(scope.kind(), &scope.value());
            return Err(anyhow!("{name} is not held; see keyferry hold list").into());
        };
        crate::failpoint!("release.after_commit");
        // Workers would do it too.
        let mut woken = 0;
        while let more @ 1.. = store.wake_parked().await? {
            woken += more;
        }
        output.value(&json!({"released": hold, "keys_woken": woken}), |_| {
            format!("{} is released; {woken} keys had jobs waiting for that", name_of(&hold.scope, &hold.value))
        });
        Ok(())
    }
}

async fn list(store: &Store, output: Output) -> Result<(), Failed> {
    let holds = store.holds().await?;
    output.table(&holds, ["SCOPE", "NAME", "BY", "SINCE", "REASON"], |hold| {
        let reason = hold.reason.clone().unwrap_or_default();
        [hold.scope.clone(), hold.value.clone(), hold.by.clone(), rfc3339(hold.at), reason]
    });
    Ok(())
}

/// Until nothing within the scope is under way.
async fn wait_for(store: &Store, scope: &Scope, mut left: usize) -> Result<usize, Failed> {
    const PATIENCE: Duration = Duration::from_secs(300);
    let until = std::time::Instant::now() + PATIENCE;
    let bar = progress_bar(left as u64, "jobs under way have stopped");
    while left > 0 {
        if std::time::Instant::now() >= until {
            return Err(Failed::Timeout);
        }
        tokio::time::sleep(POLL).await;
        left = store.under_way(scope).await?;
        bar.set_position(bar.length().unwrap_or(0).saturating_sub(left as u64));
    }
    bar.finish_and_clear();
    Ok(left)
}

async fn key_of(store: &Store, key: &str) -> Result<KeyArn, Failed> {
    let Ok(id) = Uuid::try_parse(key) else {
        return Ok(
            KeyArn::parse(key).map_err(|expected| anyhow!("{key}: {expected}, or the id that Keyferry gave it"))?
        );
    };
    let known = store.resolve_keys(&[id]).await?.remove(&id);
    Ok(known.ok_or_else(|| anyhow!("no job ever was for the KMS key {key}; give its ARN"))?)
}

/// A name with a slip in it would hold nothing, and nobody would notice.
fn warn_of_strangers(loaded: &Loaded, scope: &Scope) {
    let targets = &loaded.settings.targets;
    let (is_known, name) = match scope {
        Scope::Everything | Scope::Principal(_) | Scope::Key(_) => return,
        Scope::Account(account) => (targets.iter().any(|target| target.account == *account), account),
        Scope::Region(region) => (targets.iter().any(|target| target.regions.contains(region)), region),
    };
    if !is_known {
        eprintln!(
            "keyferry: warning: no target of these settings is in {name}; is it spelt right? It is held all the same"
        );
    }
}

fn name_of(scope: &str, value: &str) -> String {
    format!("{scope} {value}").trim_end().to_owned()
}

fn account(text: &str) -> Result<String, String> {
    let is_account = text.len() == 12 && text.bytes().all(|byte| byte.is_ascii_digit());
    if is_account { Ok(text.to_owned()) } else { Err("expected the 12 digits of an AWS account".into()) }
}
