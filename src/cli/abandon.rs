//! `keyferry jobs abandon`.

use super::jobs::Sent;
use super::output::{Output, printable};
use super::{Coded, Failed, operator};
use crate::config::Loaded;
use crate::job::rfc3339;
use crate::store::{Cancelled, JobView, NewRetry, Retried, Standing, Store};
use clap::Args;
use serde::Serialize;
use std::io::{IsTerminal as _, Write as _};
use uuid::Uuid;

/// Give up a job of which it cannot be learnt what AWS did, such as one whose key AWS does not let anybody look at any more.
/// It ends as failed with the code `abandoned`, and its event says whether AWS may have been changed. A job that waits ends
/// at once, one that a worker has under way between two of its steps. See `jobs cancel` first: that waits until nothing is
/// in doubt.
///
/// A rotate may have brought material that waits on its key: that is taken away again, if AWS has said that it is the job's
/// own; of one that has failed already, too, by a job that is made for that.
///
/// What is risked: the next job on the key begins without knowing what this one did. It looks at the key as AWS shows it,
/// and fails, or finds material there that nobody has announced, if AWS did take it. Whatever this job may have put on the
/// key stays on record as perhaps there. Jobs that would contradict a call that was not answered still wait until that can
/// no longer take effect (`worker.signature_life_ms` after it was made, 10 minutes unless set otherwise).
#[derive(Debug, Args)]
pub(super) struct Abandon {
    /// The job's id, or the id of its request.
    id: String,
    #[command(flatten)]
    sent: Sent,
    /// Do not ask. Needed without a terminal, where a job is ended or material may be deleted in AWS.
    #[arg(long)]
    yes: bool,
}

/// What became of the job.
#[derive(Serialize)]
struct Ended {
    /// The job's id.
    id: Uuid,
    /// In one word: abandoned, requested or ended.
    became: &'static str,
    /// The same in a sentence.
    message: String,
}

impl Abandon {
    pub(super) async fn run(self, loaded: &Loaded, store: &Store, output: Output) -> Result<(), Failed> {
        let principal = self.sent.principal(loaded)?;
        let found = store.find_jobs(&principal, &self.sent.source, std::slice::from_ref(&self.id)).await?;
        let mut jobs: Vec<JobView> =
            found.into_iter().map(|(_, view)| view).filter(|view| view.state != "rejected").collect();
        jobs.dedup_by_key(|job| job.id);
        let job = match jobs.as_slice() {
            [job] => job,
            [] => return Err(unknown(&self.id).into()),
            _ => {
                let message = format!("{} is the id of several jobs; give the job's own id", self.id);
                return Err(Coded { code: "job_ambiguous", message }.into());
            }
        };
        if job.state == "waiting" {
            self.confirm(job, Deed::End)?;
        }
        if job.state == "failed" && job.operation.as_deref() == Some("rotate") {
            return self.clear_away(job, loaded, store, output).await;
        }
        let became = store.abandon(&[job.id], &operator()).await?.into_iter().next().unwrap_or(Cancelled::Unknown);
        let (word, message) = match became {
            Cancelled::Ended => ("abandoned", "it has ended; the next job on its key goes on".to_owned()),
            Cancelled::Requested => (
                "requested",
                "a worker has it under way: it ends between two of its steps, or when the worker's lease ends; follow it \
                 with keyferry jobs wait"
                    .to_owned(),
            ),
            Cancelled::EndedBefore { code: Some(code), .. } if code == "abandoned" => {
                ("abandoned", "it was abandoned before".to_owned())
            }
            Cancelled::EndedBefore { state, code } => {
                let code = code.map(|code| format!(" ({code})")).unwrap_or_default();
                ("ended", format!("it had {state} before{code}"))
            }
            Cancelled::Unreadable(message) => return Err(Coded { code: "job_unreadable", message }.into()),
            Cancelled::Unknown => return Err(unknown(&self.id).into()),
        };
        output.value(&Ended { id: job.id, became: word, message }, |ended| format!("{}  {}", ended.id, ended.message));
        if word == "ended" { Err(Failed::Said) } else { Ok(()) }
    }

    /// A rotate that has failed may have left material that waits: another job takes that away, and ends.
    async fn clear_away(&self, job: &JobView, loaded: &Loaded, store: &Store, output: Output) -> Result<(), Failed> {
        let policy = loaded.policy()?.digest().to_owned();
        let clearing = match store.standing(&[job.id]).await?.into_iter().next() {
            Some(Standing::Failed(failed)) if failed.choice.is_some() => {
                self.confirm(job, Deed::TakeAway)?;
                let retry = NewRetry { id: Uuid::now_v7(), of: failed.id, rule: None, policy, abandons: true };
                let id = retry.id;
                match store.retry(&[retry], &operator()).await?.first() {
                    Some(Retried::Made) => Some(id),
                    Some(Retried::SourceKeyDeleted) => {
                        let message = "the source key was deleted: look at the key in AWS, and delete what waits there";
                        return Err(Coded { code: "source_key_deleted", message: message.into() }.into());
                    }
                    _ => None,
                }
            }
            _ => None,
        };
        let (id, word, message) = match clearing {
            Some(id) => (
                id,
                "requested",
                "it has failed; if its material waits on the key still, this job takes that away and ends as abandoned: \
                 follow it with keyferry jobs wait",
            ),
            None => (
                job.id,
                "ended",
                "it had failed before it brought anything, or a retry of it is under way or has succeeded",
            ),
        };
        let ended = Ended { id, became: word, message: message.to_owned() };
        output.value(&ended, |ended| format!("{}  {}", ended.id, ended.message));
        if clearing.is_none() { Err(Failed::Said) } else { Ok(()) }
    }

    /// Asks on a terminal; without one it has to be said.
    fn confirm(&self, job: &JobView, deed: Deed) -> Result<(), Failed> {
        if self.yes {
            return Ok(());
        }
        let refused = |message: String| Coded { code: "not_confirmed", message };
        if !std::io::stdin().is_terminal() {
            let message = format!("to abandon {}: say --yes, or run this on a terminal", deed.means());
            return Err(refused(message).into());
        }
        let last = job.error.as_ref().and_then(|error| error["message"].as_str()).unwrap_or("none");
        eprint!(
            "{} of {} on {}\n  accepted {}, {} attempts, last error: {}\n\
             To abandon {}. Abandon it? Type yes: ",
            job.operation.as_deref().unwrap_or_default(),
            printable(&job.principal),
            printable(job.key.as_deref().unwrap_or_default()),
            rfc3339(job.accepted_at),
            job.attempts,
            printable(last),
            deed.means(),
        );
        std::io::stderr().flush()?;
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer)?;
        if answer.trim() == "yes" { Ok(()) } else { Err(refused("nothing was done".to_owned()).into()) }
    }
}

/// What to abandon a job comes to.
#[derive(Clone, Copy)]
enum Deed {
    /// It has not ended.
    End,
    /// It is a rotate that has failed after it chose its material.
    TakeAway,
}

impl Deed {
    /// After "to abandon".
    fn means(self) -> &'static str {
        match self {
            Self::End => "a job is to end it without knowing what AWS did with it",
            Self::TakeAway => {
                "a rotate that has failed is to delete its material in AWS, if that waits on its key still"
            }
        }
    }
}

fn unknown(id: &str) -> Coded {
    let message = format!("no job has the id {id}; see keyferry jobs list, and --source for an envelope's id");
    Coded { code: "job_unknown", message }
}
