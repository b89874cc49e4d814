//! `keyferry jobs retry`.

use super::jobs::{Sent, progress_bar};
use super::output::Output;
use super::{Failed, operator};
use crate::app::{limits, targets};
use crate::config::Loaded;
use crate::intake::{Crowd, Limits};
use crate::job::{FailureCode, RefusalCode};
use crate::policy::{Ask, Policy, Targets, Verdict};
use crate::store::{FailedChoice, FailedJob, JobView, NewRetry, RETRY_PAGE, Retried, Standing, Store};
use clap::builder::PossibleValuesParser;
use clap::{ArgGroup, Args};
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};
use time::OffsetDateTime;
use uuid::Uuid;

/// Do failed jobs again: each becomes a new job at the end of its line, with the id of the same request, the same time
/// until its deadline, and, if the failed job had chosen its material, just those bytes and no others. A delete means the
/// materials that the failed job meant, without those that AWS said it deleted.
///
/// The new job is judged by the policy of these settings, in the name of whoever asked first, and again by its worker. A job
/// is never done twice at a time: while its retry is open, that one is named and none is made; where its retry failed too,
/// that one is retried. Exit code 1 if one was not retried and is not being retried.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("which").required(true).args(["ids", "batch"]))]
#[command(after_help = "What became of a job, in the column BECAME and in --json:\n  \
    retried             a new job waits\n  \
    would_retry         the same, had it not been for --dry-run\n  \
    retry_open          its retry has not ended; nothing is made\n  \
    retry_succeeded     its retry has succeeded; nothing is made\n  \
    succeeded, waiting, running   it has not failed: there is nothing to do again\n  \
    refused             the request was refused; see keyferry dead redrive\n  \
    not_allowed         the policy does not allow it any more; its words follow\n  \
    backlog_full, line_full, lane_full, unknown_target, tier_not_configured, valid_to_past   as for a new request\n  \
    source_key_deleted  the source key that it had chosen is erased\n  \
    nothing_left        a delete of which AWS has said that all is deleted\n  \
    unknown, unreadable\n\n\
    Examples:\n  \
    keyferry jobs retry 0198f0c2-...                       one failed job\n  \
    keyferry jobs retry --batch night --code access_denied --dry-run\n  \
    keyferry jobs retry --batch night && keyferry jobs wait --batch night")]
pub(super) struct Retry {
    /// Ids of jobs or of requests.
    ids: Vec<String>,
    #[command(flatten)]
    sent: Sent,
    /// All failed jobs of this batch that were not retried before.
    #[arg(long, value_name = "NAME")]
    batch: Option<String>,
    /// Of the batch only jobs that failed with this code.
    #[arg(long, value_name = "CODE", conflicts_with = "ids", value_parser = codes(), hide_possible_values = true)]
    code: Option<String>,
    /// Say what would be retried, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

/// What became of one job.
#[derive(Debug, Serialize)]
struct Line {
    /// By which it was asked for.
    asked: String,
    /// The failed job, or the last of its retries; for a refused request the refusal.
    job: Option<Uuid>,
    /// The job that does it again.
    retry: Option<Uuid>,
    /// In one word.
    became: &'static str,
    /// The same in a sentence.
    message: String,
}

/// What became of a batch.
#[derive(Serialize)]
struct OfBatch {
    batch: String,
    /// New jobs, or those that would be made.
    retried: u64,
    /// Jobs that stay as they are, by word and sentence.
    left: Vec<Left>,
}

#[derive(Serialize)]
struct Left {
    became: &'static str,
    message: String,
    count: u64,
}

/// A job is not retried: in one word, and in a sentence.
type No = (&'static str, String);

impl Retry {
    pub(super) async fn run(self, loaded: &Loaded, store: &Store, output: Output) -> Result<(), Failed> {
        let policy = loaded.policy()?;
        let limits = limits(&loaded.settings.intake);
        let desk = Desk { loaded, store, policy, limits, targets: targets(loaded)?, is_dry: self.dry_run };
        if let Some(batch) = self.batch {
            return desk.batch(batch, self.code.as_deref(), output).await;
        }
        let principal = self.sent.principal(loaded)?;
        desk.each(&principal, &self.sent.source, &self.ids, output).await
    }
}

/// What jobs are judged by, and where they are made.
struct Desk<'a> {
    loaded: &'a Loaded,
    store: &'a Store,
    policy: Policy,
    limits: Limits,
    targets: Targets,
    is_dry: bool,
}

impl Desk<'_> {
    async fn each(&self, principal: &str, source: &str, ids: &[String], output: Output) -> Result<(), Failed> {
        let mut found: HashMap<String, Vec<JobView>> = HashMap::new();
        for (asked, view) in self.store.find_jobs(principal, source, ids).await? {
            found.entry(asked).or_default().push(view);
        }
        let all = found.iter().flat_map(|(asked, views)| views.iter().map(move |view| (asked, view)));
        let mut jobs: Vec<Uuid> =
            all.filter(|(_, view)| view.state != "rejected").map(|(asked, view)| looked_at(asked, view)).collect();
        jobs.sort_unstable();
        jobs.dedup();
        let (mut became, mut crowd) = (HashMap::new(), Crowd::default());
        for page in jobs.chunks(RETRY_PAGE) {
            became.extend(page.iter().copied().zip(self.page(page, &mut crowd).await?));
        }
        let mut lines = Vec::new();
        for asked in ids {
            let views = found.get(asked).map(Vec::as_slice).unwrap_or_default();
            let of_jobs = views.iter().filter_map(|view| became.get(&looked_at(asked, view)));
            let of_jobs: Vec<Line> = of_jobs.map(|became: &Became| became.line(asked)).collect();
            match (of_jobs.is_empty(), views.first()) {
                (false, _) => lines.extend(of_jobs),
                (true, Some(refused)) => {
                    let message = "the request was refused, there is no job: see keyferry dead redrive".to_owned();
                    lines.push(Became::not(Some(refused.id), ("refused", message)).line(asked));
                }
                (true, None) => lines.push(Became::not(None, unknown()).line(asked)),
            }
        }
        output.table(&lines, ["ASKED FOR", "JOB", "BECAME", "RETRY", ""], |line| {
            let text = |id: Option<Uuid>| id.map(|id| id.to_string()).unwrap_or_default();
            [line.asked.clone(), text(line.job), line.became.to_owned(), text(line.retry), line.message.clone()]
        });
        let is_done = |line: &Line| matches!(line.became, "retried" | "would_retry" | "retry_open");
        if lines.iter().all(is_done) { Ok(()) } else { Err(Failed::Said) }
    }

    /// In short transactions, and nothing that was accepted since this began: retries belong to the batch too, and those that
    /// fail at once would be retried without end.
    async fn batch(&self, batch: String, code: Option<&str>, output: Output) -> Result<(), Failed> {
        let start = self.store.now().await?;
        let counts = self.store.batch_counts(&batch).await?;
        if counts.is_empty() {
            return Err(anyhow::anyhow!("no job is of the batch {batch}; see keyferry jobs list").into());
        }
        let is_meant = |(state, why): &(String, String)| state == "failed" && code.is_none_or(|code| code == why);
        let bar = progress_bar(counts.iter().filter(|(end, _)| is_meant(end)).map(|(_, count)| count).sum(), "jobs");
        let (mut retried, mut after, mut crowd) = (0, Some(Uuid::nil()), Crowd::default());
        let mut left: BTreeMap<No, u64> = BTreeMap::new();
        while let Some(from) = after {
            let failed = self.store.failed_of_batch(&batch, code, from, start).await?;
            for page in failed.ids.chunks(RETRY_PAGE) {
                for became in self.page(page, &mut crowd).await? {
                    match became.end {
                        Ok(Made { is_new: true, .. }) => retried += 1,
                        Ok(_) => *left.entry(("retry_open", "somebody retried it meanwhile".into())).or_default() += 1,
                        Err(no) => *left.entry(no).or_default() += 1,
                    }
                }
                bar.inc(page.len() as u64);
                crate::failpoint!("retry.after_page");
            }
            after = failed.after;
        }
        bar.finish_and_clear();
        let is_whole = left.keys().all(|(why, _)| *why == "retry_open");
        let left = left.into_iter().map(|((became, message), count)| Left { became, message, count }).collect();
        output.value(&OfBatch { batch, retried, left }, |done| {
            let would = if self.is_dry { "would be retried" } else { "are retried" };
            let lines = done.left.iter().map(|left| format!("\n{}  {}: {}", left.count, left.became, left.message));
            format!("{} jobs of {} {would}{}", done.retried, done.batch, lines.collect::<String>())
        });
        if is_whole { Ok(()) } else { Err(Failed::Said) }
    }

    /// Judges up to [`RETRY_PAGE`] jobs and makes the retries that may be; what became of each, in their order. `made`:
    /// what would wait, had it not been for `--dry-run`.
    async fn page(&self, asked: &[Uuid], made: &mut Crowd) -> Result<Vec<Became>, Failed> {
        let now = self.store.now().await?;
        let standing = self.store.standing(asked).await?;
        let mut crowd = self.crowd(&standing).await?;
        crowd.add(made);
        let mut making: Vec<NewRetry> = Vec::new();
        let mut became = Vec::with_capacity(asked.len());
        for (asked, standing) in asked.iter().zip(&standing) {
            became.push(match standing {
                // Two that were asked for can have the same last retry.
                Standing::Failed(job) if making.iter().any(|made| made.of == job.id) => {
                    let made = making.iter().find(|made| made.of == job.id).map(|made| made.id);
                    Became { job: Some(job.id), end: Ok(Made { retry: made, is_new: false }) }
                }
                Standing::Failed(job) => match self.judge(job, now, &crowd) {
                    Ok(rule) => {
                        crowd.count(&job.principal, &job.key);
                        if self.is_dry {
                            made.count(&job.principal, &job.key);
                        }
                        let id = Uuid::now_v7();
                        making.push(NewRetry {
                            id,
                            of: job.id,
                            rule,
                            policy: self.policy.digest().to_owned(),
                            abandons: false,
                        });
                        Became { job: Some(job.id), end: Ok(Made { retry: Some(id), is_new: true }) }
                    }
                    Err(no) => Became::not(Some(job.id), no),
                },
                standing => Became::of_another(*asked, standing),
            });
        }
        if self.is_dry {
            // Nothing is made: the ids are nobody's.
            let made = |id: &Uuid| making.iter().any(|made| made.id == *id);
            for end in became.iter_mut().filter_map(|became| became.end.as_mut().ok()) {
                end.retry = end.retry.filter(|id| !made(id));
            }
            return Ok(became);
        }
        let outcomes = self.store.retry(&making, &operator()).await?;
        let outcomes: HashMap<Uuid, Retried> = making.iter().map(|made| made.of).zip(outcomes).collect();
        for became in &mut became {
            match became.job.and_then(|job| outcomes.get(&job)) {
                Some(Retried::Before) => became.end = Ok(Made { retry: None, is_new: false }),
                Some(Retried::SourceKeyDeleted) => became.end = Err(source_key_deleted()),
                Some(Retried::Made) | None => {}
            }
        }
        Ok(became)
    }

    /// How many jobs wait of those that failed ones are of.
    async fn crowd(&self, standing: &[Standing]) -> Result<Crowd, Failed> {
        let failed: Vec<&FailedJob> = standing
            .iter()
            .filter_map(|standing| match standing {
                Standing::Failed(job) => Some(&**job),
                _ => None,
            })
            .collect();
        let principals = failed.iter().map(|job| job.principal.as_str()).collect();
        let keys = failed.iter().map(|job| &job.key).collect();
        Ok(Crowd::look(self.store, &self.policy, Some(self.limits), &principals, &keys).await?)
    }

    /// Whether a job may be done again, by the rule that says so; as at intake, in the name of whoever asked first.
    fn judge(&self, job: &FailedJob, now: OffsetDateTime, crowd: &Crowd) -> Result<Option<String>, No> {
        match &job.choice {
            Some(FailedChoice::Local { is_deleted: true, .. }) => return Err(source_key_deleted()),
            Some(FailedChoice::Delete { is_done: true, .. }) => {
                let message = "AWS has said that it deleted all that the job meant; send a new request to delete what was \
                               imported since";
                return Err(("nothing_left", message.into()));
            }
            _ => {}
        }
        if !self.targets.contains(&job.key) {
            let message = "the account and Region of the key are not among the configured targets";
            return Err((RefusalCode::UnknownTarget.as_str(), message.into()));
        }
        job.request.judge_expiry(job.start(now)).map_err(|refusal| (refusal.code.as_str(), refusal.message))?;
        let stated = self.dsm_name(job)?;
        if let Some(why) = self.policy.disowns(&job.principal, job.identity.as_deref()) {
            return Err((RefusalCode::NotAllowed.as_str(), why));
        }
        let known = job.known_source();
        let ask = Ask::of(&job.principal, &job.request, &job.key, stated.as_deref(), now);
        let ask = match &known {
            Some((name, id)) => ask.with_known(name, id),
            None => ask,
        };
        let rule = match self.policy.judge(&ask) {
            Verdict::Allowed(grant) => grant.rule,
            Verdict::Denied { why, .. } => return Err((RefusalCode::NotAllowed.as_str(), why)),
        };
        let judged = crowd.judge(&self.policy, self.limits, &job.principal, &job.key);
        judged.map_err(|refusal| (refusal.code.as_str(), refusal.message))?;
        Ok(rule)
    }

    /// The full name of the key on a KMIP server that the request names, if it names one.
    fn dsm_name(&self, job: &FailedJob) -> Result<Option<String>, No> {
        let Some(reference) = job.request.work.dsm_key() else { return Ok(None) };
        let settings = &self.loaded.settings;
        let only = settings.dsm.keys().next().filter(|_| settings.dsm.len() == 1);
        let connection = reference.connection().or(settings.dsm_default.as_deref()).or(only.map(String::as_str));
        let Some(connection) = connection.filter(|name| settings.dsm.contains_key(*name)) else {
            let message = "these settings have no dsm connection for the source key that the request names";
            return Err((RefusalCode::TierNotConfigured.as_str(), message.into()));
        };
        Ok(Some(format!("{connection}/{}", reference.key())))
    }
}

/// The job whose standing tells what becomes of `asked`. By a request's id the last of its retries is found: as the retry of
/// the one before it.
fn looked_at(asked: &str, view: &JobView) -> Uuid {
    let is_own = Uuid::try_parse(asked).is_ok_and(|id| id == view.id);
    view.retry_of.filter(|_| !is_own).unwrap_or(view.id)
}

/// What became of one job.
struct Became {
    job: Option<Uuid>,
    end: Result<Made, No>,
}

/// A job that does another again.
struct Made {
    /// Not known where somebody else made it just now.
    retry: Option<Uuid>,
    is_new: bool,
}

impl Became {
    fn not(job: Option<Uuid>, no: No) -> Self {
        Self { job, end: Err(no) }
    }

    /// One that has not failed, or whose retry has not.
    fn of_another(asked: Uuid, standing: &Standing) -> Self {
        match standing {
            Standing::Open { id, .. } if *id != asked => {
                Self { job: Some(asked), end: Ok(Made { retry: Some(*id), is_new: false }) }
            }
            Standing::Open { is_running: true, .. } => {
                Self::not(Some(asked), ("running", "a worker has it under way; see keyferry jobs wait".into()))
            }
            Standing::Open { .. } => Self::not(Some(asked), ("waiting", "it has not ended".into())),
            Standing::Succeeded(id) if *id != asked => {
                Self::not(Some(asked), ("retry_succeeded", format!("its retry {id} has succeeded")))
            }
            Standing::Succeeded(_) => Self::not(Some(asked), ("succeeded", "it has succeeded".into())),
            Standing::Unreadable(message) => Self::not(Some(asked), ("unreadable", message.clone())),
            Standing::Unknown | Standing::Failed(_) => Self::not(Some(asked), unknown()),
        }
    }

    fn line(&self, asked: &str) -> Line {
        let (retry, became, message) = match &self.end {
            Ok(Made { retry: Some(id), is_new: true }) => {
                (Some(*id), "retried", "follow it with keyferry jobs wait".to_owned())
            }
            Ok(Made { retry: None, is_new: true }) => (None, "would_retry", String::new()),
            Ok(Made { retry, is_new: false }) => (*retry, "retry_open", "its retry has not ended; none is made".into()),
            Err((word, message)) => (None, *word, message.clone()),
        };
        Line { asked: asked.to_owned(), job: self.job, retry, became, message }
    }
}

fn unknown() -> No {
    ("unknown", "no job has this id; see keyferry jobs list, and --source for an envelope's id".into())
}

fn source_key_deleted() -> No {
    let message =
        "the bytes of the source key that it had chosen are erased: the same material cannot be imported again";
    (FailureCode::SourceKeyDeleted.as_str(), message.into())
}

/// Every code that a job can fail with.
fn codes() -> PossibleValuesParser {
    PossibleValuesParser::new(FailureCode::ALL.iter().map(|code| code.as_str()))
}
