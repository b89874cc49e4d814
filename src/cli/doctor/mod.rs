//! `keyferry doctor`: whether everything is there that a worker needs, and what to type where it is not.
//!
//! ```text
//! settings -> host                        no network
//!          -> database -> key, aws        one connection; which KMS keys were used last
//!          -> rabbitmq, sqs               beside it
//!          -> dsm                         beside both
//! ```
//!
//! It changes nothing anywhere. Each check has its time, so that one server that hangs hides nothing of the others.

mod aws;
mod clock;
mod database;
mod dsm;
mod finding;
mod host;
mod key;
mod rabbitmq;
mod settings;
mod sqs;

use super::Failed;
use super::output::{Output, duration};
use crate::config::{ConfigError, Loaded};
use clap::Args;
use finding::{Finding, Verdict};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug, Args)]
#[command(
    after_help = "It changes nothing, and may run beside a worker. Run it as the worker's user, with the worker's environment:\n\
    rights on files, limits and AWS credentials are looked at as this process has them.\n\n\
    Each finding is ok, a warning, failed, or skipped for a reason, and has a code for programs (--json).\n\
    Exit codes: 0 nothing failed; 1 something did."
)]
pub(super) struct Doctor {
    /// How long one server may take.
    #[arg(long, value_name = "TIME", default_value = "15s", value_parser = duration)]
    timeout: Duration,
}

impl Doctor {
    /// Settings that cannot be read are a finding like any other.
    pub(super) async fn run(self, loaded: Result<Loaded, ConfigError>, output: Output) -> Result<(), Failed> {
        let findings = match loaded {
            Ok(loaded) => self.look(loaded).await?,
            Err(error) => settings::unreadable(&error).into_iter().chain(host::memory()).collect(),
        };
        let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
        let is_sound = count(Verdict::Failed) == 0;
        let counts: serde_json::Map<_, _> =
            Verdict::ALL.iter().map(|verdict| (verdict.as_str().to_owned(), count(*verdict).into())).collect();
        let report = json!({"ok": is_sound, "counts": counts, "checks": findings});
        output.value(&report, |_| {
            let mut lines: Vec<String> = findings.iter().map(line).collect();
            let counts = Verdict::ALL.map(|verdict| format!("{} {}", count(verdict), verdict.as_str()));
            lines.push(format!("\n{}", counts.join(", ")));
            lines.join("\n")
        });
        if is_sound { Ok(()) } else { Err(Failed::Said) }
    }

    /// All findings, in the order in which their subjects depend on each other.
    async fn look(&self, loaded: Loaded) -> anyhow::Result<Vec<Finding>> {
        let mut findings = settings::check(&loaded);
        findings.extend(host::check(&loaded, self.timeout).await);
        let (loaded, timeout) = (Arc::new(loaded), self.timeout);
        // Tasks of their own: what one of them computes must not make the answers of the others look late.
        let tasks = [
            tokio::spawn(store(Arc::clone(&loaded), timeout)),
            tokio::spawn(brokers(Arc::clone(&loaded), timeout)),
            tokio::spawn(async move { dsm::check(&loaded, timeout).await }),
        ];
        for task in tasks {
            findings.extend(task.await??);
        }
        Ok(findings)
    }
}

/// What is in the database, and what depends on it.
async fn store(loaded: Arc<Loaded>, timeout: Duration) -> anyhow::Result<Vec<Finding>> {
    let (mut found, seen) = database::check(&loaded, timeout).await;
    found.push(key::check(&loaded, seen.as_ref()));
    found.extend(aws::check(&loaded, seen.as_ref(), timeout).await?);
    Ok(found)
}

async fn brokers(loaded: Arc<Loaded>, timeout: Duration) -> anyhow::Result<Vec<Finding>> {
    let mut found = rabbitmq::check(&loaded, timeout).await;
    found.extend(sqs::check(&loaded, timeout).await?);
    Ok(found)
}

/// Within the time of a check, or the finding that it took longer.
async fn within<T>(
    timeout: Duration,
    check: &str,
    code: &'static str,
    work: impl Future<Output = T>,
) -> Result<T, Finding> {
    tokio::time::timeout(timeout, work).await.map_err(|_| {
        let message = format!("no answer within {} s", timeout.as_secs_f32());
        Finding::failed(check, code, message, "see whether the server hangs, or give it more time by --timeout")
    })
}

fn line(finding: &Finding) -> String {
    let Finding { check, verdict, code, message, advice } = finding;
    let code = if *verdict == Verdict::Ok { String::new() } else { format!(" [{code}]") };
    let advice = advice.as_ref().map_or_else(String::new, |advice| format!("\n         {advice}"));
    format!("{:<8} {check}: {message}{code}{advice}", verdict.as_str())
}
