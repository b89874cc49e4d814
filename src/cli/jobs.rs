//! `keyferry jobs`.

use super::Failed;
use super::abandon::Abandon;
use super::cancel::Cancel;
use super::output::{Output, duration, printable};
use super::retry::Retry;
use super::sender::principal;
use crate::app::{open_broker, open_store};
use crate::config::Loaded;
use crate::policy::Identity;
use crate::store::{JobFilter, JobView, Store};
use anyhow::anyhow;
use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::{BTreeMap, HashMap};
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Ids asked of the store at once.
const PAGE: usize = 500;
const POLL: Duration = Duration::from_millis(200);

#[derive(Debug, Subcommand)]
pub(super) enum Jobs {
    /// List jobs, newest first; those of one key by their place in its line, last first.
    List(List),
    /// Show one job, or the refusal of a request, with its result.
    ///
    /// The id of a request means the last of its job's retries, here and in every other command; it is shown first, and after
    /// it those that it does again, the first job last. `retry_of` and `retried_by` say which is which: the one that is not
    /// retried is the one that the id means. A job's own id shows that job alone.
    Show {
        /// The job's id, its event's if it was refused, or the id of its request.
        id: String,
        #[command(flatten)]
        sent: Sent,
    },
    /// Wait until jobs have ended. Exit code 3 if one did not succeed, 4 if it took too long.
    Wait(Wait),
    /// Cancel jobs that have not ended.
    Cancel(Cancel),
    /// Do failed jobs again.
    Retry(Retry),
    /// Give up a job of which it cannot be learnt what AWS did.
    Abandon(Abandon),
}

/// How requests were sent that are asked for by their own ids.
#[derive(Debug, Args)]
pub(super) struct Sent {
    /// The CloudEvents `source` of the requests: their ids are unique within it, and are looked up in it alone.
    /// Not needed for requests that came without an envelope, and for ids of jobs and events.
    #[arg(long, value_name = "URI", default_value = "", hide_default_value = true)]
    pub(super) source: String,
    /// Who sent the requests: their ids are unique within a principal. Absent: the one that the policy has for the user of
    /// `rabbitmq.url`. Not needed for ids of jobs and events.
    #[arg(long, value_name = "NAME")]
    principal: Option<String>,
}

impl Sent {
    pub(super) fn principal(&self, loaded: &Loaded) -> anyhow::Result<String> {
        // Whoever only looks at jobs need not have the broker's settings.
        let user = open_broker(loaded).ok().and_then(|broker| broker.user().map(str::to_owned));
        principal(loaded, user.map(Identity::RabbitMqUser).as_ref(), self.principal.clone())
    }
}

#[derive(Debug, Args)]
pub(super) struct List {
    /// Only jobs in this state. Reads from the newest on until --limit of them are found, or all were read.
    #[arg(long)]
    state: Option<State>,
    /// Only jobs on this KMS key: its ARN, or the id that Keyferry gave it.
    #[arg(long)]
    key: Option<String>,
    /// Only jobs of this batch.
    #[arg(long)]
    batch: Option<String>,
    /// Rows at most.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(i64).range(1..=10_000))]
    limit: i64,
    /// Only jobs older than this one: the last id of the page before.
    #[arg(long, value_name = "ID")]
    before: Option<Uuid>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum State {
    Waiting,
    Succeeded,
    Failed,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("which").required(true).args(["ids", "batch"]))]
pub(super) struct Wait {
    /// Ids of jobs, of the events of refusals, or of requests.
    ids: Vec<String>,
    #[command(flatten)]
    sent: Sent,
    /// All jobs of this batch: until there are some, and none of them waits.
    #[arg(long, value_name = "NAME")]
    batch: Option<String>,
    /// Give up after this time.
    #[arg(long, default_value = "5m", value_name = "TIME", value_parser = duration)]
    timeout: Duration,
}

impl Jobs {
    pub(super) async fn run(self, loaded: &Loaded, output: Output) -> Result<(), Failed> {
        let store = open_store(loaded).await?;
        match self {
            Self::List(list) => {
                let state = list.state.map(|state| match state {
                    State::Waiting => "waiting".to_owned(),
                    State::Succeeded => "succeeded".to_owned(),
                    State::Failed => "failed".to_owned(),
                });
                let filter =
                    JobFilter { state, key: list.key, batch: list.batch, before: list.before, limit: list.limit };
                let jobs = store.jobs(&filter).await?.ok_or_else(|| {
                    anyhow!("no job ever was for the KMS key {}", filter.key.as_deref().unwrap_or_default())
                })?;
                print_jobs(output, &jobs);
            }
            Self::Show { id, sent } => {
                let found = store.find_jobs(&sent.principal(loaded)?, &sent.source, std::slice::from_ref(&id)).await?;
                let mut found: Vec<JobView> = found.into_iter().map(|(_, view)| view).collect();
                if let Some(last) = found.first().filter(|last| Uuid::try_parse(&id) != Ok(last.id)) {
                    let before = store.retried_before(last.id).await?;
                    found.splice(1..1, before);
                }
                if found.is_empty() {
                    let message = format!(
                        "no job and no refusal has the id {id}; see keyferry jobs list, --source for a request in a \
                         CloudEvents envelope, and --principal for one of another sender"
                    );
                    return Err(anyhow!(message).into());
                }
                output.value(&found, |found| {
                    found
                        .iter()
                        .map(|job| serde_json::to_string_pretty(job).unwrap_or_default())
                        .collect::<Vec<_>>()
                        .join("\n")
                });
            }
            Self::Wait(wait) => {
                let followed = if let Some(batch) = &wait.batch {
                    follow_batch(&store, batch, wait.timeout).await?
                } else {
                    let principal = wait.sent.principal(loaded)?;
                    follow(&store, &principal, &wait.sent.source, wait.ids, wait.timeout).await?
                };
                finish(output, &followed)?;
            }
            Self::Cancel(cancel) => cancel.run(loaded, &store, output).await?,
            Self::Retry(retry) => retry.run(loaded, &store, output).await?,
            Self::Abandon(abandon) => abandon.run(loaded, &store, output).await?,
        }
        Ok(())
    }
}

/// Jobs that were waited for.
#[derive(Default)]
pub(super) struct Followed {
    /// How many ended in which state, with which code.
    ended: BTreeMap<(String, String), u64>,
    missing: u64,
    /// What the first of those say that did not succeed.
    reasons: Vec<String>,
}

/// So many reasons are told one by one.
const MOST_REASONS: usize = 10;

/// Waits for requests or jobs to end, with a progress bar on a terminal.
pub(super) async fn follow(
    store: &Store,
    principal: &str,
    source: &str,
    ids: Vec<String>,
    timeout: Duration,
) -> Result<Followed, Failed> {
    let until = Instant::now() + timeout;
    let mut waiting = ids;
    waiting.sort_unstable();
    // One that was named twice would be waited for once more than it ends.
    waiting.dedup();
    let bar = progress_bar(waiting.len() as u64, "jobs");
    let mut followed = Followed::default();
    loop {
        let mut left = Vec::new();
        for page in waiting.chunks(PAGE) {
            let mut by_id = ended_by_id(store.find_jobs(principal, source, page).await?);
            for id in page {
                match by_id.remove(id) {
                    Some(view) => {
                        bar.inc(1);
                        followed.reasons.extend(reason(id, &view).filter(|_| followed.reasons.len() < MOST_REASONS));
                        *followed.ended.entry((view.state.clone(), error_code(&view))).or_default() += 1;
                    }
                    None => left.push(id.clone()),
                }
            }
        }
        bar.set_message(format!("{} failed, {} refused", followed.count("failed"), followed.count("rejected")));
        waiting = left;
        if waiting.is_empty() || Instant::now() >= until {
            break;
        }
        tokio::time::sleep(POLL).await;
    }
    bar.finish();
    followed.missing = waiting.len() as u64;
    Ok(followed)
}

/// Waits until no job of a batch waits any more.
async fn follow_batch(store: &Store, batch: &str, timeout: Duration) -> Result<Followed, Failed> {
    let until = Instant::now() + timeout;
    let bar = progress_bar(0, "jobs");
    loop {
        let asked_at = Instant::now();
        let mut counts = store.batch_counts(batch).await?;
        let all: u64 = counts.values().sum();
        let missing = counts.remove(&("waiting".to_owned(), String::new())).unwrap_or(0);
        let followed = Followed { ended: counts, missing, reasons: Vec::new() };
        bar.set_length(all);
        bar.set_position(all - missing);
        bar.set_message(format!("{} failed", followed.count("failed")));
        if (all > 0 && missing == 0) || Instant::now() >= until {
            bar.finish();
            // A batch that nobody has heard of has not ended.
            let missing = if all == 0 { 1 } else { missing };
            return Ok(Followed { missing, ..followed });
        }
        // Counting a large batch must not become the store's main work.
        tokio::time::sleep(POLL.max(asked_at.elapsed() * 10)).await;
    }
}

impl Followed {
    fn count(&self, wanted: &str) -> u64 {
        self.ended.iter().filter(|((state, _), _)| state == wanted).map(|(_, count)| count).sum()
    }
}

/// Why it did not succeed, in one line.
fn reason(id: &str, view: &JobView) -> Option<String> {
    let error = view.error.as_ref().filter(|_| view.state != "succeeded")?;
    Some(printable(&format!("{id}: {}", error["message"].as_str()?)))
}

/// Summarises and gives the exit code.
pub(super) fn finish(output: Output, followed: &Followed) -> Result<(), Failed> {
    let mut rows: Vec<serde_json::Value> = followed
        .ended
        .iter()
        .map(|((state, code), count)| serde_json::json!({"state": state, "code": code, "count": count}))
        .collect();
    if followed.missing > 0 {
        rows.push(serde_json::json!({"state": "not ended", "code": "", "count": followed.missing}));
    }
    rows.sort_by_key(|row| (row["state"].to_string(), row["code"].to_string()));
    output.table(&rows, ["STATE", "CODE", "COUNT"], |row| {
        [text(&row["state"]), text(&row["code"]), row["count"].to_string()]
    });
    if !output.json {
        followed.reasons.iter().for_each(|reason| eprintln!("{reason}"));
    }
    if followed.missing > 0 {
        Err(Failed::Timeout)
    } else if followed.ended.keys().all(|(state, _)| state == "succeeded") {
        Ok(())
    } else {
        Err(Failed::Jobs)
    }
}

/// A bar on a terminal, nothing elsewhere.
pub(super) fn progress_bar(length: u64, what: &'static str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(length);
    let template = format!("{{bar:40}} {{pos}}/{{len}} {what}  {{msg}}");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar
}

/// What has ended, under the id by which it was asked for. A request that was refused and also accepted is the job.
fn ended_by_id(found: Vec<(String, JobView)>) -> HashMap<String, JobView> {
    let (refusals, jobs): (Vec<_>, Vec<_>) = found.into_iter().partition(|(_, view)| view.state == "rejected");
    let mut by_id: HashMap<String, JobView> = refusals.into_iter().collect();
    for (asked, job) in jobs {
        if job.finished_at.is_some() {
            by_id.insert(asked, job);
        } else {
            by_id.remove(&asked);
        }
    }
    by_id
}

fn print_jobs(output: Output, jobs: &[JobView]) {
    output.table(jobs, ["ID", "REQUEST", "STATE", "CODE", "KEY", "ACCEPTED"], |job| {
        [
            job.id.to_string(),
            job.request_id.clone().unwrap_or_default(),
            job.state.clone(),
            error_code(job),
            job.key.clone().unwrap_or_default(),
            crate::job::rfc3339(job.accepted_at),
        ]
    });
}

fn error_code(job: &JobView) -> String {
    job.error
        .as_ref()
        .and_then(|error| error["code"].as_str().or_else(|| error["class"].as_str()))
        .unwrap_or("")
        .to_owned()
}

fn text(value: &serde_json::Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
