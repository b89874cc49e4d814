//! Drives jobs: claim, source key, parameters, wrap, import, verify, settle.
//!
//! One process runs one worker: a loop that claims as many lines as there are free permits, a task for each
//! job under way, a heartbeat for all leases together, and two batchers that write what is there.

mod attempt;
mod batcher;
mod leases;
mod meters;
mod sampler;

use crate::config::{Rates, Worker as WorkerSettings};
use crate::job::{Failure, FailureCode};
use crate::kms::{Kms, LeaseGuard};
use crate::policy::{Current, Targets};
use crate::retry::{Attempts, Class};
use crate::source::{Dsm, Keyring};
use crate::store::{
    Claimed, ClaimedJob, FOLD_PAGE, FOLDS_PAGE, Fault, FaultKind, Hold, JOIN_PAGE, Prepared, QuotaAnswer, QuotaAsk,
    Scan, Settled, Settlement, SettlementKind, Step, Store, StoreError, bisect,
};
use crate::telemetry::{Health, Metrics, Part, follow};
use attempt::Attempt;
use batcher::Batcher;
use futures_util::FutureExt as _;
use leases::Leases;
pub use meters::Meters;
use meters::{Outcome, Stage};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

/// Rows of one transaction at most.
const BATCH: usize = 200;
/// So often a claim ignores the lanes' lower bounds, which are hints. By time: it may have to read every dead entry
/// that a long snapshot keeps.
const WHOLE_INDEX_EVERY: Duration = Duration::from_secs(5);
/// With less than this part of the permits free, a claim waits a moment.
const CLAIM_SHARE: usize = 4;
const CLAIM_PACE: Duration = Duration::from_millis(10);
/// So soon at the earliest a lane that opens is looked for.
const SOON: Duration = Duration::from_millis(5);
const HOUSEKEEPING: Duration = Duration::from_secs(1);
/// Pages of one kind of housekeeping before the others have their turn.
const PAGES: usize = 4;
/// So often the backlog's changes are folded from the first on, for those that were committed late, and old refusals
/// forgotten.
const THOROUGH_EVERY: Duration = Duration::from_secs(60);
/// How often it is looked whether the store's disk has room.
const ROOM_EVERY: Duration = Duration::from_secs(15);

/// What a worker works with.
#[derive(Debug)]
pub struct Context {
    /// Every SQL statement.
    pub store: Store,
    /// AWS.
    pub kms: Kms,
    /// The keys of the local tier.
    pub keyring: Arc<Keyring>,
    /// The servers of the dsm tier.
    pub dsm: Arc<Dsm>,
    /// Asked again at each attempt and before each call that changes AWS.
    pub policy: Current,
    /// Accounts and Regions that may be touched.
    pub targets: Targets,
    /// Limits and times.
    pub settings: WorkerSettings,
    /// Which calls are counted.
    pub rates: Rates,
    /// Counters.
    pub metrics: Metrics,
    /// Those of them that jobs write.
    pub meters: Meters,
    /// Told whether the store answers.
    pub health: Health,
    /// Rung when there may be jobs to claim.
    pub jobs: Arc<Notify>,
    /// Rung when there are events to publish.
    pub events: Arc<Notify>,
}

/// Runs until `stop`; then lets jobs under way end for the grace time, gives back the rest between two
/// steps, and returns when all of it is written.
pub async fn run(context: Arc<Context>, stop: CancellationToken) {
    let settings = &context.settings;
    let give_back = CancellationToken::new();
    let leases = Leases::default();
    let background = TaskTracker::new();
    let finished = CancellationToken::new();
    let steps = {
        let store = context.store.clone();
        let (steps, running) = Batcher::new(BATCH, move |steps: Vec<Step>| {
            let store = store.clone();
            async move { prepare(&store, steps).await }
        });
        background.spawn(running);
        steps
    };
    let quota = {
        let context = Arc::clone(&context);
        let (quota, running) = Batcher::new(BATCH, move |asks: Vec<QuotaAsk>| {
            let context = Arc::clone(&context);
            async move { ask_quota(&context, asks).await }
        });
        background.spawn(running);
        quota
    };
    let settler = {
        let context = Arc::clone(&context);
        let (settler, running) = Batcher::new(BATCH, move |ends: Vec<Settlement>| {
            let context = Arc::clone(&context);
            async move { settle(&context, ends).await }
        });
        background.spawn(running);
        settler
    };
    background.spawn(leases.clone().beat(Arc::clone(&context), finished.clone()));
    background.spawn(keep_house(Arc::clone(&context), stop.clone()));
    background.spawn(sampler::sample(Arc::clone(&context), stop.clone()));

    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let pool = Pool {
        context: Arc::clone(&context),
        permits: Arc::new(Semaphore::new(settings.concurrency)),
        computing: Arc::new(Semaphore::new(cores)),
        generating: Arc::new(Semaphore::new(cores.div_ceil(2))),
        leases,
        steps,
        quota,
        settler,
        give_back: give_back.clone(),
        jobs: TaskTracker::new(),
    };
    pool.claim_until(&stop).await;
    pool.jobs.close();
    if tokio::time::timeout(settings.grace(), pool.jobs.wait()).await.is_err() {
        tracing::warn!(jobs.running = pool.jobs.len(), "the grace time is over: giving back jobs between two steps");
        give_back.cancel();
        // A step is one AWS call or one transaction.
        let last_step = settings.aws_timeout() + Duration::from_secs(10);
        if tokio::time::timeout(last_step, pool.jobs.wait()).await.is_err() {
            tracing::error!(jobs.running = pool.jobs.len(), "jobs are left to their leases: the store does not answer");
        }
    }
    finished.cancel();
    // Dropping the senders ends the batchers.
    drop(pool);
    background.close();
    drop(tokio::time::timeout(Duration::from_secs(5), background.wait()).await);
}

struct Pool {
    context: Arc<Context>,
    permits: Arc<Semaphore>,
    computing: Arc<Semaphore>,
    generating: Arc<Semaphore>,
    leases: Leases,
    steps: Batcher<Step, Result<Prepared, StoreError>>,
    quota: Batcher<QuotaAsk, Result<QuotaAnswer, StoreError>>,
    settler: Batcher<Settlement, bool>,
    give_back: CancellationToken,
    jobs: TaskTracker,
}

impl Pool {
    async fn claim_until(&self, stop: &CancellationToken) {
        let mut outage = Attempts::new(Class::Reconnect);
        let mut waiting = None;
        let mut whole_index_at = Instant::now();
        loop {
            let first = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                permit = Arc::clone(&self.permits).acquire_owned() => permit,
            };
            // The semaphore is never closed.
            let Ok(first) = first else { return };
            let mut permits = vec![first];
            self.gather(stop).await;
            while let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() {
                permits.push(permit);
            }
            let asked_at = Instant::now();
            let settings = &self.context.settings;
            let scan = if asked_at >= whole_index_at { Scan::Whole } else { Scan::FromBounds };
            if scan == Scan::Whole {
                whole_index_at = asked_at + WHOLE_INDEX_EVERY;
            }
            let claimed =
                self.context.store.claim(permits.len(), settings.lease(), settings.signature_life(), scan).await;
            let pause = match claimed {
                Ok(mut claimed) => {
                    outage.reset();
                    waiting = None;
                    let found = !claimed.jobs.is_empty() || claimed.put_aside > 0;
                    self.note_slots(&mut claimed);
                    for (job, permit) in claimed.jobs.into_iter().zip(permits) {
                        self.start(job, permit, asked_at);
                    }
                    if found {
                        continue;
                    }
                    let opens_in = claimed.opens_in.unwrap_or(Duration::MAX);
                    opens_in.clamp(SOON, Duration::from_millis(settings.poll_ms).max(SOON))
                }
                Err(error) => {
                    waiting.get_or_insert_with(|| self.context.health.wait(Part::Store));
                    let delay = outage.next_delay();
                    tracing::error!(error.message = %error, retry.delay_ms = delay.as_millis(), "claiming failed");
                    delay
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.context.jobs.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Counts the slots that a claim brought, and gives back those that nobody needs.
    fn note_slots(&self, claimed: &mut Claimed) {
        for slot in claimed.jobs.iter().filter_map(|job| job.slot.as_ref()).chain(&claimed.unused) {
            self.context.meters.took_slot(slot.lane.operation);
        }
        for slot in claimed.unused.drain(..) {
            self.quota.post(QuotaAsk::GiveBack(slot));
        }
    }

    /// While most permits are out, waits a moment for more of them: a claim costs much the same for one line as for
    /// many.
    async fn gather(&self, stop: &CancellationToken) {
        let share = u32::try_from(self.context.settings.concurrency / CLAIM_SHARE).unwrap_or(u32::MAX);
        tokio::select! {
            () = stop.cancelled() => {}
            // They are free again at once, to be taken one by one.
            _ = self.permits.acquire_many(share) => {}
            () = tokio::time::sleep(CLAIM_PACE) => {}
        }
    }

    fn start(&self, job: ClaimedJob, permit: OwnedSemaphorePermit, asked_at: Instant) {
        crate::failpoint!("worker.after_claim");
        let guard = LeaseGuard::new(asked_at, self.context.settings.lease());
        self.leases.hold(job.lease, guard.clone());
        let attempt = Attempt {
            context: Arc::clone(&self.context),
            steps: self.steps.clone(),
            quota: self.quota.clone(),
            computing: Arc::clone(&self.computing),
            generating: Arc::clone(&self.generating),
            give_back: self.give_back.clone(),
            guard,
        };
        let (leases, settler) = (self.leases.clone(), self.settler.clone());
        let (metrics, meters) = (self.context.metrics.clone(), self.context.meters.clone());
        self.jobs.spawn(async move {
            metrics.jobs_running.inc();
            let lease = job.lease;
            let waited = waited(&job);
            if job.attempt == 1 {
                meters.waited(waited);
            }
            let span = tracing::debug_span!(
                "attempt", otel.kind = "consumer", job.id = %job.id, job.attempt = job.attempt, kms.key.arn = %job.key
            );
            follow(&span, job.traceparent.as_deref());
            let fallback = attempt::Broken::of(&job);
            // A job that panics is this job's failure, not the worker's.
            let end = AssertUnwindSafe(attempt.run(job).instrument(span))
                .catch_unwind()
                .await
                .unwrap_or_else(|_| Some(fallback.retry()));
            let held = match end {
                Some(end) => {
                    let outcome = outcome(&end);
                    let settling = meters.time(Stage::Settle);
                    let held = settler.submit(end).await.unwrap_or(false);
                    drop(settling);
                    if let Some(outcome) = outcome.filter(|_| held) {
                        meters.took(outcome, waited + asked_at.elapsed());
                    }
                    held
                }
                None => false,
            };
            if !held {
                metrics.leases_lost.inc();
            }
            leases.release(lease);
            metrics.jobs_running.dec();
            drop(permit);
        });
    }
}

/// How long a job could have run before it was claimed. By the store's clock alone.
fn waited(job: &ClaimedJob) -> Duration {
    let ready = job.request.not_before.map_or(job.accepted_at, |not_before| not_before.max(job.accepted_at));
    Duration::try_from(job.now - ready).unwrap_or_default()
}

fn outcome(end: &Settlement) -> Option<Outcome> {
    match &end.kind {
        SettlementKind::Ended { outcome: Ok(_), .. } => Some(Outcome::Succeeded),
        SettlementKind::Ended { outcome: Err(_), .. } => Some(Outcome::Failed),
        _ => None,
    }
}

/// Writes steps; a row that Postgres refuses fails alone.
async fn prepare(store: &Store, steps: Vec<Step>) -> Vec<Result<Prepared, StoreError>> {
    let rows: Vec<&Step> = steps.iter().collect();
    match bisect(&rows, |range| store.prepare(&rows[range])).await {
        Ok(outcomes) => outcomes,
        Err(error) => {
            let fault = match error {
                StoreError::Unavailable(fault) => fault,
                other => Fault { kind: FaultKind::Other, reason: other.to_string() },
            };
            steps.iter().map(|_| Err(StoreError::Unavailable(fault.clone()))).collect()
        }
    }
}

/// Asks for slots. None of these rows can be at fault.
async fn ask_quota(context: &Context, asks: Vec<QuotaAsk>) -> Vec<Result<QuotaAnswer, StoreError>> {
    let rows: Vec<&QuotaAsk> = asks.iter().collect();
    match context.store.quota(&rows).await {
        Ok(answers) => {
            for answer in &answers {
                if let QuotaAnswer::Slot(slot) = answer {
                    context.meters.took_slot(slot.lane.operation);
                }
            }
            answers.into_iter().map(Ok).collect()
        }
        Err(error) => {
            let fault = match error {
                StoreError::Unavailable(fault) => fault,
                other => Fault { kind: FaultKind::Other, reason: other.to_string() },
            };
            asks.iter().map(|_| Err(StoreError::Unavailable(fault.clone()))).collect()
        }
    }
}

/// Writes ends of attempts, however long Postgres stays away: the token decides whether they still count.
async fn settle(context: &Context, mut ends: Vec<Settlement>) -> Vec<bool> {
    let signature_life = context.settings.signature_life();
    let mut outage = Attempts::new(Class::Reconnect);
    let mut waiting = None;
    loop {
        crate::failpoint!("worker.before_settle");
        let rows: Vec<&Settlement> = ends.iter().collect();
        let outcomes = match bisect(&rows, |range| context.store.settle(&rows[range], signature_life)).await {
            Ok(outcomes) => outcomes,
            Err(error) => {
                waiting.get_or_insert_with(|| context.health.wait(Part::Store));
                let delay = outage.next_delay();
                tracing::error!(error.message = %error, retry.delay_ms = delay.as_millis(), "settling failed");
                tokio::time::sleep(delay).await;
                continue;
            }
        };
        let refused: Vec<usize> =
            outcomes.iter().enumerate().filter_map(|(at, outcome)| outcome.is_err().then_some(at)).collect();
        let mut settled: Vec<Settled> =
            outcomes.iter().map(|outcome| *outcome.as_ref().unwrap_or(&Settled::Lost)).collect();
        for at in refused {
            tracing::error!(job.id = %ends[at].job.id, "Postgres refuses the outcome of a job: it ends as unstorable");
            ends[at].make_storable();
            let again = context.store.settle(&[&ends[at]], signature_life).await;
            settled[at] = again.ok().and_then(|settled| settled.first().copied()).unwrap_or(Settled::Lost);
        }
        crate::failpoint!("worker.after_settle");
        for (end, settled) in ends.iter().zip(&settled) {
            count(&context.meters, end, *settled);
        }
        // The lines' next heads may be ready, and events wait.
        context.jobs.notify_one();
        context.events.notify_one();
        return settled.into_iter().map(Settled::is_held).collect();
    }
}

impl Settlement {
    /// The same end without any text that came from elsewhere.
    fn make_storable(&mut self) {
        let (source_key_id, material) = match &mut self.kind {
            SettlementKind::Ended { source_key_id, material, .. } => (*source_key_id, material.take()),
            _ => (None, None),
        };
        let failure = Failure {
            code: FailureCode::Unstorable,
            message: "the outcome holds text that Postgres does not store; see the worker's log".into(),
            aws_changed: !self.job.dry_run,
            policy: None,
        };
        self.facts.clear();
        self.kind = SettlementKind::Ended { outcome: Err(failure), source_key_id, material };
    }
}

fn count(meters: &Meters, end: &Settlement, settled: Settled) {
    match (settled, &end.kind) {
        (Settled::Ended(ending), _) => meters.finished(Some(ending.failure(false).code)),
        (Settled::Written, SettlementKind::Ended { outcome: Ok(_), .. }) => meters.finished(None),
        (Settled::Written, SettlementKind::Ended { outcome: Err(failure), .. }) => meters.finished(Some(failure.code)),
        _ => {}
    }
}

/// Tells what is held, and wakes some of the lines that were parked by what no longer is; says whether more may be left.
async fn see_holds(context: &Context, seen: &mut Vec<Hold>, stop: &CancellationToken) -> Result<bool, StoreError> {
    let holds = context.store.holds().await?;
    for hold in holds.iter().filter(|hold| !seen.iter().any(|known| known.id == hold.id)) {
        let reason = hold.reason.as_deref().unwrap_or("none given");
        tracing::warn!(
            hold.id = %hold.id, hold.scope = hold.scope, hold.value = hold.value, hold.by = hold.by, hold.reason = reason,
            "held"
        );
    }
    for hold in seen.iter().filter(|known| !holds.iter().any(|hold| hold.id == known.id)) {
        tracing::info!(hold.id = %hold.id, hold.scope = hold.scope, hold.value = hold.value, "a hold was released");
    }
    context.metrics.holds.set(i64::try_from(holds.len()).unwrap_or(i64::MAX));
    *seen = holds;
    for _ in 0..PAGES {
        if stop.is_cancelled() || context.store.wake_parked().await? == 0 {
            return Ok(false);
        }
        context.jobs.notify_one();
    }
    Ok(true)
}

/// Folds some of the backlog's changes, on from where it was; says whether more may be left.
async fn fold_backlog(context: &Context, after: &mut i64, stop: &CancellationToken) -> Result<bool, StoreError> {
    for _ in 0..PAGES {
        let folded = context.store.fold_backlog(*after).await?;
        *after = folded.last;
        if stop.is_cancelled() || folded.count < FOLD_PAGE {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Tells of folded refusals whose minute is over, and forgets old ones; says whether more may be left.
async fn see_folds(context: &Context, forget: bool) -> Result<bool, StoreError> {
    let told = context.store.tell_folds().await?;
    if told > 0 {
        crate::failpoint!("folds.after_commit");
        context.events.notify_one();
    }
    let forgotten = if forget { context.store.forget_folded().await? } else { 0 };
    Ok(told == FOLDS_PAGE || forgotten == FOLDS_PAGE)
}

/// Lets waiting jobs join their lines and moves the lanes' lower bounds, and looks after what folds.
async fn keep_house(context: Arc<Context>, stop: CancellationToken) {
    let mut pause = HOUSEKEEPING;
    let mut holds = Vec::new();
    let (mut folded, mut thorough_at) = (0, Instant::now());
    let (mut has_room, mut room_at) = (true, Instant::now());
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = HOUSEKEEPING;
        let is_thorough = Instant::now() >= thorough_at;
        if is_thorough {
            (folded, thorough_at) = (0, Instant::now() + THOROUGH_EVERY);
        }
        // Said at once: what comes next may wait as long for the same.
        let away = |_: &StoreError| context.health.set(Part::Store, false);
        let woken = see_holds(&context, &mut holds, &stop).await.inspect_err(away);
        let woken = woken.inspect_err(|error| tracing::warn!(error.message = %error, "holds could not be looked at"));
        let folding = fold_backlog(&context, &mut folded, &stop).await.inspect_err(away);
        let folding = folding
            .inspect_err(|error| tracing::warn!(error.message = %error, "the backlog's changes could not be folded"));
        let seeing = see_folds(&context, is_thorough).await;
        let seeing =
            seeing.inspect_err(|error| tracing::warn!(error.message = %error, "folded refusals could not be told of"));
        if !has_room || Instant::now() >= room_at {
            room_at = Instant::now() + ROOM_EVERY;
            let room = context.store.check_room().await.inspect_err(away);
            has_room = room
                .inspect_err(|error| tracing::warn!(error.message = %error, "the store has no room for writes"))
                .is_ok();
        }
        let is_whole = [&woken, &folding, &seeing].into_iter().all(Result::is_ok) && has_room;
        if [woken, folding, seeing].into_iter().any(|more| more.unwrap_or(false)) {
            pause = Duration::ZERO;
        }
        let kept = context.store.keep_house().await;
        context.health.set(Part::Store, is_whole && kept.is_ok());
        match kept {
            Ok(0) => {}
            Ok(joined) => {
                context.jobs.notify_one();
                if joined == JOIN_PAGE {
                    pause = Duration::ZERO;
                }
            }
            Err(error) => tracing::warn!(error.message = %error, "housekeeping failed"),
        }
    }
}
