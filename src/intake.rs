//! Who sends, what is asked, may it be: accept or refuse, and settle. One batch after the other.

mod crowd;
mod fuse;
mod senders;

pub use crowd::{Crowd, Limits};
pub use fuse::{Fuse, Marks, Watch};

use crate::ingress::{Delivery, Ingress, Session as _, SessionFault, Settlement};
use crate::job::{Envelope, KeyArn, KeyRef, Refusal, RefusalCode, Rejected, Request};
use crate::policy::{Ask, Current, Policy, Proof, Targets, Verdict as PolicyVerdict};
use crate::retry::{Attempts, Class};
use crate::source::{Dsm, DsmError, Keyring};
use crate::store::{Candidate, NewJob, NewRefusal, RefusalRecord, Store, StoreError, Verdict, bisect};
use crate::telemetry::{Health, Metrics, Part};
use senders::{Asker, Asks, Senders, Told, known_by, tell};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Messages of one transaction at most.
const BATCH: usize = 200;

/// For the batch in hand at the end: what was committed and not settled would come again.
const LAST_DECISION: Duration = Duration::from_secs(1);
/// The same: dead letters that were sent and not settled would be sent twice.
const LAST_SETTLING: Duration = Duration::from_secs(5);

/// A message as the parser took it.
type Read = Result<Request, Box<Rejected>>;

/// What the intake of one queue works with.
#[derive(Debug)]
pub struct Intake<I> {
    /// The queue.
    pub ingress: I,
    /// Where verdicts become durable.
    pub store: Store,
    /// For keyed hashes of bodies.
    pub keyring: Arc<Keyring>,
    /// Who may ask for what.
    pub policy: Current,
    /// What senders must prove.
    pub proof: Proof,
    /// Which accounts and Regions may be named.
    pub targets: Targets,
    /// Which connections of the dsm tier there are.
    pub dsm: Arc<Dsm>,
    /// Counters.
    pub metrics: Metrics,
    /// Told when consuming works.
    pub health: Health,
    /// Which part of it this queue is.
    pub part: Part,
    /// How many jobs of a key, and of an account and Region, may wait.
    pub limits: Limits,
    /// Whether messages are taken at all.
    pub fuse: Fuse,
    /// Rung when jobs were accepted.
    pub jobs: Arc<Notify>,
    /// Rung when refusals wait to be published.
    pub events: Arc<Notify>,
}

/// What the store has told about a batch.
struct Lookup {
    /// The store's time.
    now: OffsetDateTime,
    /// Keys that are named by Keyferry's own ids.
    keys: HashMap<Uuid, KeyArn>,
    /// Refusals that messages name which are sent again.
    refusals: HashMap<Uuid, RefusalRecord>,
    /// How many jobs wait.
    crowd: Crowd,
}

/// Why a session that was of use is given back.
enum End {
    /// The process stops.
    Stopped,
    /// Too many jobs wait.
    Paused,
}

impl<I: Ingress> Intake<I> {
    /// Consumes until `stop`, through as many sessions as it takes.
    pub async fn run(self, stop: CancellationToken) {
        let mut failures = Attempts::new(Class::Reconnect);
        while !stop.is_cancelled() {
            if self.fuse.is_paused() {
                self.rest(&stop).await;
                continue;
            }
            self.health.pause(self.part, false);
            let outcome = tokio::select! {
                () = stop.cancelled() => return,
                outcome = self.open() => outcome,
            };
            let error = match outcome {
                Ok(mut session) => {
                    self.metrics.broker_sessions.with_label_values(&[I::TRANSPORT, "ingress"]).inc();
                    self.health.set(self.part, true);
                    tracing::info!(broker.transport = I::TRANSPORT, queue.name = self.ingress.queue(), "consuming");
                    let ended = self.consume(&mut session, &stop, &mut failures).await;
                    self.health.pause(self.part, matches!(ended, Ok(End::Paused)));
                    self.health.set(self.part, false);
                    match ended {
                        Ok(end) => {
                            if let Err(error) = session.give_back().await {
                                tracing::warn!(
                                    error.message = %error, broker.transport = I::TRANSPORT,
                                    "what was in hand could not be given back"
                                );
                            }
                            match end {
                                End::Stopped => return,
                                End::Paused => continue,
                            }
                        }
                        Err(error) => {
                            self.metrics.broker_sessions_broken.with_label_values(&[I::TRANSPORT, "ingress"]).inc();
                            session.abandon().await;
                            error
                        }
                    }
                }
                Err(error) => {
                    self.metrics.broker_sessions_failed.with_label_values(&[I::TRANSPORT, "ingress"]).inc();
                    error
                }
            };
            let delay = failures.next_delay();
            tracing::error!(
                error.message = %error, broker.transport = I::TRANSPORT, retry.delay_ms = delay.as_millis(),
                "the session with the broker ended"
            );
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(delay) => {}
            }
        }
    }

    /// Takes nothing until enough of the jobs that wait have ended, or until `stop`.
    async fn rest(&self, stop: &CancellationToken) {
        let paused = self.metrics.ingress_paused.with_label_values(&[I::TRANSPORT]);
        paused.set(1);
        self.health.pause(self.part, true);
        let waiting = self.fuse.waiting();
        tracing::warn!(
            broker.transport = I::TRANSPORT,
            jobs.waiting = waiting,
            "paused: more jobs wait than intake.pause_above"
        );
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.fuse.until(false) => {
                let waiting = self.fuse.waiting();
                tracing::info!(broker.transport = I::TRANSPORT, jobs.waiting = waiting, "messages are taken again");
            }
        }
        paused.set(0);
    }

    /// Nothing is taken from the broker while Postgres is away: each message so taken would be given back and
    /// counted as another delivery.
    async fn open(&self) -> Result<I::Session, SessionFault<I>> {
        let mut outage = Attempts::new(Class::Reconnect);
        let mut waiting = None;
        while let Err(error) = self.store.check_writable().await {
            waiting.get_or_insert_with(|| self.health.wait(Part::Store));
            let delay = outage.next_delay();
            tracing::error!(
                error.message = %error, retry.delay_ms = delay.as_millis(),
                "not consuming: the store is away"
            );
            tokio::time::sleep(delay).await;
        }
        drop(waiting);
        self.ingress.open().await
    }

    /// Until `stop`, until too many jobs wait, or until the session is of no more use. The caller ends it.
    async fn consume(
        &self,
        session: &mut I::Session,
        stop: &CancellationToken,
        failures: &mut Attempts,
    ) -> Result<End, SessionFault<I>> {
        loop {
            let batch = tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(End::Stopped),
                () = self.fuse.until(true) => return Ok(End::Paused),
                batch = session.next_batch(BATCH) => batch?,
            };
            crate::failpoint!("intake.after_receive");
            let verdicts = tokio::select! {
                verdicts = self.decide(&batch) => verdicts,
                () = after(stop, LAST_DECISION) => return Ok(End::Stopped),
            };
            failures.reset();
            crate::failpoint!("intake.after_commit");
            let settlements: Vec<Settlement> = verdicts
                .iter()
                .map(|verdict| match verdict {
                    Verdict::Accepted | Verdict::Duplicate => Settlement::Done,
                    Verdict::Refused => Settlement::DeadLetter,
                })
                .collect();
            self.announce(&verdicts);
            crate::failpoint!("intake.before_settle");
            tokio::select! {
                settled = session.settle(&settlements) => settled?,
                // What is not settled comes again, as a duplicate.
                () = after(stop, LAST_SETTLING) => return Ok(End::Stopped),
            }
            crate::failpoint!("intake.after_settle");
        }
    }

    fn announce(&self, verdicts: &[Verdict]) {
        for verdict in verdicts {
            let word = match verdict {
                Verdict::Accepted => "accepted",
                Verdict::Duplicate => "duplicate",
                Verdict::Refused => "refused",
            };
            self.metrics.intake_messages.with_label_values(&[I::TRANSPORT, word]).inc();
        }
        if verdicts.contains(&Verdict::Accepted) {
            self.jobs.notify_one();
        }
        if verdicts.contains(&Verdict::Refused) {
            self.events.notify_one();
        }
    }

    /// Decides a batch however long Postgres stays away: the session is kept, and holds what it holds.
    async fn decide(&self, batch: &[Delivery]) -> Vec<Verdict> {
        let mut outage = Attempts::new(Class::Reconnect);
        // Ids are drawn once: a batch whose commit's answer was lost is known as itself when it is tried again.
        let ids: Vec<Uuid> = batch.iter().map(|_| Uuid::now_v7()).collect();
        let mut policy = self.policy.get();
        let mut told = tell(batch, &policy, &self.proof);
        let mut waiting = None;
        loop {
            match self.decide_once(batch, &ids, &policy, &told).await {
                Ok(verdicts) => return verdicts,
                Err(error) => {
                    waiting.get_or_insert_with(|| self.health.wait(Part::Store));
                    let delay = outage.next_delay();
                    tracing::error!(
                        error.message = %error, messages.count = batch.len(), retry.delay_ms = delay.as_millis(),
                        "intake waits for the store"
                    );
                    tokio::time::sleep(delay).await;
                }
            }
            let newer = self.policy.get();
            if !Arc::ptr_eq(&policy, &newer) {
                told = tell(batch, &newer, &self.proof);
                policy = newer;
            }
        }
    }

    async fn decide_once(
        &self,
        batch: &[Delivery],
        ids: &[Uuid],
        policy: &Policy,
        told: &[Told],
    ) -> Result<Vec<Verdict>, StoreError> {
        let read: Vec<Read> = batch.iter().map(|delivery| Request::parse(self.envelope(delivery))).collect();
        let mut lookup = self.look_up(batch, &read).await?;
        let senders = Senders { policy, proof: &self.proof, refusals: &lookup.refusals, now: lookup.now };
        let asks: Vec<Asks> = batch
            .iter()
            .zip(told)
            .zip(&read)
            .map(|((delivery, told), read)| senders.asker(told, delivery, read, || self.body_hash(delivery)))
            .collect();
        let limits = self.limits.may_be_reached(self.fuse.waiting()).then_some(self.limits);
        let keys = crowd::keys_of(&read, &lookup.keys);
        let principals = asks.iter().filter_map(|asks| Some(asks.as_ref().ok()?.principal.as_str())).collect();
        lookup.crowd = Crowd::look(&self.store, policy, limits, &principals, &keys).await?;
        let mut candidates = Vec::with_capacity(batch.len());
        let mut askers = Vec::with_capacity(batch.len());
        for (((read, delivery), asks), id) in read.into_iter().zip(batch).zip(asks).zip(ids) {
            let (asker, candidate) = match asks {
                Err(refused) => {
                    let (asker, refusal) = *refused;
                    let candidate = self.refusal(read, delivery, asker.clone(), refusal, None);
                    (asker, candidate)
                }
                Ok(asker) => {
                    let candidate = self.judge(read, delivery, asker.clone(), *id, policy, &lookup);
                    (asker, candidate)
                }
            };
            askers.push(asker);
            candidates.push(candidate);
        }
        let outcomes = bisect(&candidates, |range| self.store.accept(&candidates[range])).await?;
        let mut verdicts = Vec::with_capacity(outcomes.len());
        for ((outcome, delivery), asker) in outcomes.into_iter().zip(batch).zip(askers) {
            verdicts.push(match outcome {
                Ok(verdict) => verdict,
                Err(error) => self.refuse_unstorable(delivery, asker, &error).await?,
            });
        }
        Ok(verdicts)
    }

    /// All that the store is asked before the verdicts.
    async fn look_up(&self, batch: &[Delivery], read: &[Read]) -> Result<Lookup, StoreError> {
        let named: Vec<Uuid> = read
            .iter()
            .filter_map(|request| match request {
                Ok(Request { key: KeyRef::Id(id), .. }) => Some(*id),
                _ => None,
            })
            .collect();
        let redriven: Vec<Uuid> =
            batch.iter().filter_map(|delivery| Uuid::try_parse(delivery.redrive.as_deref()?).ok()).collect();
        Ok(Lookup {
            now: self.store.now().await?,
            keys: if named.is_empty() { HashMap::new() } else { self.store.resolve_keys(&named).await? },
            refusals: self.store.refusals(&redriven).await?,
            crowd: Crowd::default(),
        })
    }

    /// What was delivered, as the parser takes it. A signature does not cover the transport's message id.
    fn envelope<'a>(&self, delivery: &'a Delivery) -> Envelope<'a> {
        match self.proof {
            Proof::Signature { .. } => Envelope { message_id: None, ..delivery.envelope() },
            Proof::Nothing | Proof::Broker => delivery.envelope(),
        }
    }

    /// Keyed: a body can hold a secret that a plain hash would let one guess.
    fn body_hash(&self, delivery: &Delivery) -> [u8; 32] {
        self.keyring.body_hash(self.ingress.queue(), &delivery.body)
    }

    /// A tier, or a connection of one, that is not configured.
    fn judge_tier(&self, request: &Request) -> Result<(), Refusal> {
        let Some(reference) = request.work.dsm_key() else { return Ok(()) };
        self.dsm.knows(reference).map_err(|error| {
            let message = match error {
                // The name is the message's own word, and is not repeated.
                DsmError::UnknownConnection { configured, .. } => {
                    format!("source_key_identifier: names no dsm connection that is configured here: {configured}")
                }
                error => format!("source_key_tier: {error}"),
            };
            Refusal::of("source_key_tier", RefusalCode::TierNotConfigured, message)
        })
    }

    /// What is asked: readable, in time, on a target, by a tier that is there, allowed, and not too much. None asks AWS or
    /// a source.
    fn judge(
        &self,
        read: Read,
        delivery: &Delivery,
        asker: Asker,
        id: Uuid,
        policy: &Policy,
        lookup: &Lookup,
    ) -> Candidate {
        let request = match read {
            Ok(request) => request,
            Err(rejected) => {
                let refusal = rejected.refusal.clone();
                return self.refusal(Err(rejected), delivery, asker, refusal, None);
            }
        };
        let key = lookup.key_of(&request).cloned();
        let judged = request
            .judge_times(lookup.now)
            .and_then(|()| self.judge_target(key.as_ref()))
            .and_then(|known| self.judge_tier(&request).map(|()| known.clone()));
        let key = match judged {
            Ok(key) => key,
            Err(refusal) => return self.refusal_on(key, Ok(request), delivery, asker, refusal, None),
        };
        let dsm = request.work.dsm_key().and_then(|reference| self.dsm.full_name(reference).ok());
        let verdict = policy.judge(&Ask::of(&asker.principal, &request, &key, dsm.as_deref(), lookup.now));
        let grant = match verdict {
            PolicyVerdict::Allowed(grant) => grant,
            PolicyVerdict::Denied { rule, why } => {
                let refusal = Refusal::whole(RefusalCode::NotAllowed, why);
                return self.refusal_on(Some(key), Ok(request), delivery, asker, refusal, rule);
            }
        };
        if let Err(refusal) = lookup.crowd.judge(policy, self.limits, &asker.principal, &key) {
            return self.refusal_on(Some(key), Ok(request), delivery, asker, refusal, grant.rule);
        }
        Candidate::Job(NewJob {
            id,
            principal: asker.principal,
            key,
            traceparent: delivery.traceparent().map(str::to_owned),
            ingress: I::TRANSPORT,
            request,
            sender: asker.sender,
            rule: grant.rule,
        })
    }

    fn judge_target<'k>(&self, key: Option<&'k KeyArn>) -> Result<&'k KeyArn, Refusal> {
        match key {
            None => {
                let message =
                    "key: no KMS key has this id here; name it by its ARN, the first accepted job registers it";
                Err(Refusal::of("key", RefusalCode::UnknownKey, message))
            }
            Some(key) if !self.targets.contains(key) => {
                let message = "key: its account and Region are not among the configured targets";
                Err(Refusal::of("key", RefusalCode::UnknownTarget, message))
            }
            Some(key) => Ok(key),
        }
    }

    /// A refusal of a message whose key is as it says itself.
    fn refusal(
        &self,
        read: Read,
        delivery: &Delivery,
        asker: Asker,
        refusal: Refusal,
        rule: Option<String>,
    ) -> Candidate {
        let key = match &read {
            Ok(Request { key: KeyRef::Arn(arn), .. }) => Some(arn.clone()),
            Ok(_) => None,
            Err(rejected) => rejected.key.clone(),
        };
        self.refusal_on(key, read, delivery, asker, refusal, rule)
    }

    /// A message that is no request is known by its id, if that is usable, and by its body.
    fn refusal_on(
        &self,
        key: Option<KeyArn>,
        read: Read,
        delivery: &Delivery,
        asker: Asker,
        refusal: Refusal,
        rule: Option<String>,
    ) -> Candidate {
        let (id_hash, digest) = known_by(&read, || self.body_hash(delivery));
        let (request_id, operation) = match read {
            Ok(request) => (Some(request.id.as_str().to_owned()), Some(request.operation())),
            Err(rejected) => (rejected.id.map(|id| id.as_str().to_owned()), None),
        };
        Candidate::Refusal(NewRefusal {
            id: Uuid::now_v7(),
            principal: asker.principal,
            id_hash,
            digest,
            refusal,
            request_id,
            operation,
            key,
            ingress: I::TRANSPORT,
            sender: asker.sender,
            rule,
            traceparent: delivery.traceparent().map(str::to_owned),
        })
    }

    /// A row that Postgres would not take is refused without any text of the message's own.
    async fn refuse_unstorable(
        &self,
        delivery: &Delivery,
        asker: Asker,
        error: &StoreError,
    ) -> Result<Verdict, StoreError> {
        let refusal =
            Refusal::whole(RefusalCode::Unstorable, "Postgres does not take this request; see the worker's log");
        let rejected = Rejected { id: None, source: String::new(), key: None, refusal: refusal.clone() };
        let candidate = self.refusal(Err(Box::new(rejected)), delivery, asker, refusal, None);
        if let Candidate::Refusal(refusal) = &candidate {
            tracing::error!(error.message = %error, refusal.id = %refusal.id, "a message cannot be stored: refused");
        }
        match self.store.accept(&[candidate]).await {
            // Even without a row the message is not lost: it goes to the dead-letter queue.
            Ok(_) | Err(StoreError::Data(_)) => Ok(Verdict::Refused),
            Err(other) => Err(other),
        }
    }
}

impl Lookup {
    fn key_of<'a>(&'a self, request: &'a Request) -> Option<&'a KeyArn> {
        match &request.key {
            KeyRef::Arn(arn) => Some(arn),
            KeyRef::Id(id) => self.keys.get(id),
        }
    }
}

/// So long after the stop.
async fn after(stop: &CancellationToken, grace: Duration) {
    stop.cancelled().await;
    tokio::time::sleep(grace).await;
}
