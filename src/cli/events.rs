//! `keyferry events`.

use super::dead::{Since, since};
use super::jobs::{Sent, progress_bar};
use super::output::Output;
use super::{Coded, Failed, operator};
use crate::app::open_store;
use crate::config::Loaded;
use crate::store::{JobView, REPUBLISH_PAGE, Republication, Store, Told};
use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use indicatif::ProgressBar;
use serde::Serialize;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// With so many events in the outbox, more are only put there as these leave it: events of jobs that end meanwhile come
/// after what is there already.
const ROOM: i64 = 1_000;
/// The outcome of a refusal.
const REJECTED: &str = "rejected";
const POLL: Duration = Duration::from_millis(200);
/// How long the outbox may not get any emptier.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Subcommand)]
pub(super) enum Events {
    /// Publish events once more: the same ids, the same bytes.
    Republish(Republish),
}

/// Publish events of jobs that have ended, and of refusals, once more: the same ids, the same bytes, so that consumers who
/// have them drop them. They go through the outbox like all others, and are published by the workers; it is filled no
/// faster than they empty it. If this is killed, what was put there is published; giving the command again does no harm.
///
/// Refusals that were told of together have one event. Events of refusals that a version before this one recorded cannot be
/// made again: see keyferry dead list for these.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("which").required(true).args(["job", "batch", "since"]))]
#[command(after_help = "Examples:\n  \
    keyferry events republish --job 0198f0c2-...\n  \
    keyferry events republish --since 2027-01-31T10:00:00Z --until 2027-01-31T11:00:00Z --dry-run\n  \
    keyferry events republish --since 2h --outcome failed")]
pub(super) struct Republish {
    /// The event of this job or refusal: its id, or the id of its request, which means the last retry of its job, and the
    /// refusals only if there is no job.
    #[arg(long, value_name = "ID")]
    job: Option<String>,
    #[command(flatten)]
    sent: Sent,
    /// The events of this batch.
    #[arg(long, value_name = "NAME")]
    batch: Option<String>,
    /// The events of jobs that ended, and of messages that were refused, since then: a time (RFC 3339) or an age, such as 90s,
    /// 5m or 2h. A job that was accepted more than 34 days before that has to be named by --job.
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<Since>,
    /// And before then; absent: until now.
    #[arg(long, value_name = "TIME", value_parser = since, conflicts_with_all = ["job", "batch"])]
    until: Option<Since>,
    /// Only those of this outcome.
    #[arg(long, value_name = "NAME")]
    outcome: Option<Outcome>,
    /// Say how many there are, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Outcome {
    Succeeded,
    Failed,
    Rejected,
}

/// What was done.
#[derive(Serialize)]
struct Done {
    /// By which the audit trail knows it; nothing where nothing was done.
    republication: Option<Uuid>,
    /// Events that are in the outbox now, or would be.
    events: u64,
    /// Events that this version cannot make.
    unreadable: u64,
    dry_run: bool,
}

impl Events {
    pub(super) async fn run(self, loaded: &Loaded, output: Output) -> Result<(), Failed> {
        let Self::Republish(republish) = self;
        republish.run(loaded, output).await
    }
}

impl Republish {
    async fn run(self, loaded: &Loaded, output: Output) -> Result<(), Failed> {
        let store = open_store(loaded).await?;
        let now = store.now().await?;
        let outcome = self.outcome.map(|outcome| match outcome {
            Outcome::Succeeded => "succeeded",
            Outcome::Failed => "failed",
            Outcome::Rejected => REJECTED,
        });
        let mut desk = Desk {
            store: &store,
            republication: Republication { id: Uuid::now_v7(), operator: operator() },
            bar: progress_bar(0, "events"),
            is_dry: self.dry_run,
            pages: 0,
            done: Done { republication: None, events: 0, unreadable: 0, dry_run: self.dry_run },
        };
        match (self.job, self.batch, self.since) {
            (Some(job), ..) => {
                let principal = self.sent.principal(loaded)?;
                desk.add(&one(&store, &principal, &self.sent.source, &job, outcome).await?).await?;
            }
            (None, Some(batch), _) => desk.all(&Told::OfBatch(batch), outcome).await?,
            (None, None, since) => {
                let until = self.until.map_or(now, |until| until.at(now));
                let since = since.map_or(until, |since| since.at(now));
                desk.all(&Told::Between(since, until), outcome).await?;
            }
        }
        desk.bar.finish_and_clear();
        output.value(&desk.done, |done| {
            let what =
                if done.dry_run { "events would be published again" } else { "events are being published again" };
            let unreadable = match done.unreadable {
                0 => String::new(),
                count => format!("; {count} could not be made"),
            };
            format!("{} {what}{unreadable}", done.events)
        });
        if desk.done.unreadable == 0 { Ok(()) } else { Err(Failed::Said) }
    }
}

/// The jobs that one id means, or else the refusals. A request that was sent again has one.
async fn one(
    store: &Store,
    principal: &str,
    source: &str,
    id: &str,
    outcome: Option<&str>,
) -> Result<Vec<Uuid>, Failed> {
    let found = store.find_jobs(principal, source, &[id.to_owned()]).await?;
    let views: Vec<JobView> = found.into_iter().map(|(_, view)| view).collect();
    let (refused, jobs): (Vec<&JobView>, Vec<&JobView>) = views.iter().partition(|view| view.state == REJECTED);
    let meant = if jobs.is_empty() || outcome == Some(REJECTED) { refused } else { jobs };
    if meant.is_empty() {
        let message = format!("no job and no refusal has the id {id}; see keyferry jobs list and dead list");
        return Err(Coded { code: "job_unknown", message }.into());
    }
    let mut ended: Vec<Uuid> = meant
        .iter()
        .filter(|view| view.finished_at.is_some() && outcome.is_none_or(|outcome| outcome == view.state))
        .map(|view| view.id)
        .collect();
    ended.dedup();
    if ended.is_empty() && meant.iter().all(|view| view.finished_at.is_none()) {
        let message = format!("{id} has not ended: there is no event yet");
        return Err(Coded { code: "job_not_ended", message }.into());
    }
    Ok(ended)
}

/// Where events are put again, and how far that has come.
struct Desk<'a> {
    store: &'a Store,
    republication: Republication,
    bar: ProgressBar,
    is_dry: bool,
    pages: i32,
    done: Done,
}

impl Desk<'_> {
    async fn all(&mut self, told: &Told, outcome: Option<&str>) -> Result<(), Failed> {
        let mut after = Some(Uuid::nil());
        while let Some(from) = after.filter(|_| outcome != Some(REJECTED)) {
            let page = self.store.ended_jobs(told, outcome, from).await?;
            self.add(&page.ids).await?;
            after = page.after;
        }
        let mut after = Some(Uuid::nil());
        while let Some(from) = after.filter(|_| outcome.is_none_or(|outcome| outcome == REJECTED)) {
            let page = self.store.refusals_told(told, from).await?;
            self.add(&page.ids).await?;
            after = page.after;
        }
        Ok(())
    }

    async fn add(&mut self, ends: &[Uuid]) -> Result<(), Failed> {
        for page in ends.chunks(REPUBLISH_PAGE) {
            if self.is_dry {
                self.done.events += page.len() as u64;
                continue;
            }
            self.has_room().await?;
            self.pages += 1;
            let became = self.store.republish(&self.republication, self.pages, page).await?;
            if became.events == 0 {
                self.pages -= 1;
            } else {
                self.done.republication = Some(self.republication.id);
            }
            self.done.events += became.events;
            self.done.unreadable += became.unreadable.len() as u64;
            self.bar.suspend(|| became.unreadable.iter().for_each(|message| eprintln!("{message}")));
            self.bar.set_length(self.done.events);
            self.bar.set_position(self.done.events);
            crate::failpoint!("republish.after_page");
        }
        Ok(())
    }

    /// Waits until there is room in the outbox.
    async fn has_room(&self) -> Result<(), Failed> {
        let until = Instant::now() + PATIENCE;
        while !self.store.outbox_has_room(ROOM).await? {
            if Instant::now() >= until {
                let message = format!(
                    "the outbox stayed full for {} s: is a worker running, and does the broker take events? {} were put \
                     there before",
                    PATIENCE.as_secs(),
                    self.done.events
                );
                return Err(Coded { code: "outbox_full", message }.into());
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }
}
