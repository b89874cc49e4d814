//! `keyferry jobs cancel`.

use super::jobs::{Sent, progress_bar};
use super::output::Output;
use super::{Failed, operator};
use crate::config::Loaded;
use crate::store::{CANCEL_PAGE, Cancelled, JobView, Store};
use clap::{ArgGroup, Args};
use serde::Serialize;
use std::collections::HashMap;
use uuid::Uuid;

/// Cancel jobs that have not ended. One that waits ends at once, as failed with the code `cancelled`; one that a worker
/// has under way ends between two of its steps, once nothing that it sent to AWS is in doubt. Exit code 1 if one is
/// unknown or had ended otherwise.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("which").required(true).args(["ids", "batch"]))]
pub(super) struct Cancel {
    /// Ids of jobs or of requests.
    ids: Vec<String>,
    #[command(flatten)]
    sent: Sent,
    /// All jobs of this batch that have not ended.
    #[arg(long, value_name = "NAME")]
    batch: Option<String>,
}

/// What became of one job.
#[derive(Serialize)]
struct Line {
    /// By which it was asked for.
    asked: String,
    /// The job's id, if there is one.
    id: Option<Uuid>,
    /// In one word: cancelled, requested, ended, refused, unknown or unreadable.
    became: &'static str,
    /// The same in a sentence.
    message: String,
}

/// What became of a batch.
#[derive(Serialize)]
struct OfBatch {
    batch: String,
    /// Jobs that ended at once.
    cancelled: u64,
    /// Jobs that end between two of their steps.
    requested: u64,
    /// Jobs that ended by themselves meanwhile.
    ended: u64,
    /// Jobs that this version cannot read.
    unreadable: u64,
}

impl Cancel {
    pub(super) async fn run(self, loaded: &Loaded, store: &Store, output: Output) -> Result<(), Failed> {
        if let Some(batch) = self.batch {
            return cancel_batch(store, batch, output).await;
        }
        let principal = self.sent.principal(loaded)?;
        cancel_each(store, &principal, &self.sent.source, &self.ids, output).await
    }
}

async fn cancel_each(
    store: &Store,
    principal: &str,
    source: &str,
    ids: &[String],
    output: Output,
) -> Result<(), Failed> {
    let mut found: HashMap<String, Vec<JobView>> = HashMap::new();
    for (asked, view) in store.find_jobs(principal, source, ids).await? {
        found.entry(asked).or_default().push(view);
    }
    let mut jobs: Vec<Uuid> =
        found.values().flatten().filter(|view| view.state != "rejected").map(|view| view.id).collect();
    jobs.sort_unstable();
    jobs.dedup();
    let mut became: HashMap<Uuid, Cancelled> = HashMap::new();
    for page in jobs.chunks(CANCEL_PAGE) {
        became.extend(page.iter().copied().zip(store.cancel(page, &operator()).await?));
    }
    let mut lines = Vec::new();
    for asked in ids {
        let views = found.get(asked).map(Vec::as_slice).unwrap_or_default();
        let of_jobs = views.iter().filter_map(|view| Some((view.id, became.get(&view.id)?)));
        let of_jobs: Vec<Line> = of_jobs.map(|(id, became)| line(asked, Some(id), became)).collect();
        match (of_jobs.is_empty(), views.first()) {
            (false, _) => lines.extend(of_jobs),
            (true, Some(refused)) => lines.push(Line {
                asked: asked.clone(),
                id: Some(refused.id),
                became: "refused",
                message: "the request was refused: there is no job to cancel".into(),
            }),
            (true, None) => lines.push(line(asked, None, &Cancelled::Unknown)),
        }
    }
    output.table(&lines, ["ASKED FOR", "JOB", "BECAME", ""], |line| {
        let id = line.id.map(|id| id.to_string()).unwrap_or_default();
        [line.asked.clone(), id, line.became.to_owned(), line.message.clone()]
    });
    let is_done = |line: &Line| matches!(line.became, "cancelled" | "requested");
    if lines.iter().all(is_done) { Ok(()) } else { Err(Failed::Said) }
}

/// In short transactions: nothing else of the store waits for more than one of them.
async fn cancel_batch(store: &Store, batch: String, output: Output) -> Result<(), Failed> {
    let counts = store.batch_counts(&batch).await?;
    let waiting: u64 = counts.iter().filter(|((state, _), _)| state == "waiting").map(|(_, count)| count).sum();
    if counts.is_empty() {
        return Err(anyhow::anyhow!("no job is of the batch {batch}; see keyferry jobs list").into());
    }
    let bar = progress_bar(waiting, "jobs cancelled");
    let mut done = OfBatch { batch, cancelled: 0, requested: 0, ended: 0, unreadable: 0 };
    let mut after = Some(Uuid::nil());
    while let Some(from) = after {
        let waiting = store.waiting_of_batch(&done.batch, from).await?;
        for page in waiting.ids.chunks(CANCEL_PAGE) {
            for became in store.cancel(page, &operator()).await? {
                match became {
                    Cancelled::Ended => done.cancelled += 1,
                    Cancelled::Requested => done.requested += 1,
                    Cancelled::EndedBefore { .. } | Cancelled::Unknown => done.ended += 1,
                    Cancelled::Unreadable(message) => {
                        bar.suspend(|| eprintln!("{message}"));
                        done.unreadable += 1;
                    }
                }
            }
            bar.inc(page.len() as u64);
            crate::failpoint!("cancel.after_page");
        }
        after = waiting.after;
    }
    bar.finish_and_clear();
    output.value(&done, |done| {
        format!(
            "{} jobs cancelled; {} under way or in doubt end between two of their steps; {} ended meanwhile",
            done.cancelled, done.requested, done.ended
        )
    });
    if done.unreadable == 0 { Ok(()) } else { Err(Failed::Said) }
}

fn line(asked: &str, id: Option<Uuid>, became: &Cancelled) -> Line {
    let (word, message) = match became {
        Cancelled::Ended => ("cancelled", "it has ended; nothing more is done".to_owned()),
        Cancelled::Requested => (
            "requested",
            "a worker has it under way, or its last call was not answered: it ends once nothing is in doubt; \
             follow it with keyferry jobs wait"
                .to_owned(),
        ),
        Cancelled::EndedBefore { code: Some(code), .. } if code == "cancelled" => {
            ("cancelled", "it was cancelled before".to_owned())
        }
        Cancelled::EndedBefore { state, code } => {
            let code = code.as_ref().map(|code| format!(" ({code})")).unwrap_or_default();
            ("ended", format!("it had {state} before{code}"))
        }
        Cancelled::Unreadable(message) => ("unreadable", message.clone()),
        Cancelled::Unknown => {
            ("unknown", "no job has this id; see keyferry jobs list, and --source for an envelope's id".to_owned())
        }
    };
    Line { asked: asked.to_owned(), id, became: word, message }
}
