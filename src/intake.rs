//! Parse, authorise, accept or refuse, settle: one batch after the other.

use crate::ingress::{Delivery, Ingress, Session as _, SessionFault, Settlement};
use crate::job::{Import, KeyArn, KeyRef, Refusal, RefusalCode, Rejected, Request, SourceKeyRef, Work, id_hash};
use crate::policy::{Policy, Targets, Verdict as PolicyVerdict};
use crate::retry::{Attempts, Class};
use crate::source::{Dsm, DsmError, Keyring};
use crate::store::{Candidate, MessageDigest, NewJob, NewRefusal, Store, StoreError, Verdict, bisect};
use crate::telemetry::{Health, Metrics, Part};
use std::collections::HashMap;
use std::sync::Arc;
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Messages of one transaction at most.
const BATCH: usize = 200;
/// Who asks, while brokers' identities are ignored.
pub const ANONYMOUS: &str = "anonymous";

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
    pub policy: Policy,
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
    /// Rung when jobs were accepted.
    pub jobs: Arc<Notify>,
    /// Rung when refusals wait to be published.
    pub events: Arc<Notify>,
}

impl<I: Ingress> Intake<I> {
    /// Consumes until `stop`, through as many sessions as it takes.
    pub async fn run(self, stop: CancellationToken) {
        let mut failures = Attempts::new(Class::Reconnect);
        while !stop.is_cancelled() {
            let outcome = tokio::select! {
                () = stop.cancelled() => return,
                outcome = self.open() => outcome,
            };
            let error = match outcome {
                Ok(mut session) => {
                    self.metrics.broker_sessions.with_label_values(&[I::TRANSPORT, "ingress"]).inc();
                    self.health.set(self.part, true);
                    tracing::info!(ingress = I::TRANSPORT, queue = self.ingress.queue(), "consuming");
                    let ended = self.consume(&mut session, &stop, &mut failures).await;
                    self.health.set(self.part, false);
                    match ended {
                        Ok(()) => {
                            if let Err(error) = session.give_back().await {
                                tracing::warn!(%error, ingress = I::TRANSPORT, "what was in hand could not be given back");
                            }
                            return;
                        }
                        Err(error) => {
                            self.metrics.broker_sessions_broken.with_label_values(&[I::TRANSPORT, "ingress"]).inc();
                            session.abandon().await;
                            error
                        }
                    }
                }
                Err(error) => error,
            };
            let delay = failures.next_delay();
            tracing::error!(%error, ingress = I::TRANSPORT, retry.delay_ms = delay.as_millis(), "the session with the broker ended");
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(delay) => {}
            }
        }
    }

    /// Nothing is taken from the broker while Postgres is away: each message so taken would be given back and
    /// counted as another delivery.
    async fn open(&self) -> Result<I::Session, SessionFault<I>> {
        let mut outage = Attempts::new(Class::Reconnect);
        while let Err(error) = self.store.now().await {
            self.health.set(Part::Store, false);
            let delay = outage.next_delay();
            tracing::error!(%error, retry.delay_ms = delay.as_millis(), "not consuming: the store is away");
            tokio::time::sleep(delay).await;
        }
        self.health.set(Part::Store, true);
        self.ingress.open().await
    }

    /// Until `stop`, or until the session is of no more use. The caller ends it.
    async fn consume(
        &self,
        session: &mut I::Session,
        stop: &CancellationToken,
        failures: &mut Attempts,
    ) -> Result<(), SessionFault<I>> {
        loop {
            let batch = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                batch = session.next_batch(BATCH) => batch?,
            };
            crate::failpoint!("intake.after_receive");
            let verdicts = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                verdicts = self.decide(&batch) => verdicts,
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
            session.settle(&settlements).await?;
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
        loop {
            match self.decide_once(batch, &ids).await {
                Ok(verdicts) => {
                    self.health.set(Part::Store, true);
                    return verdicts;
                }
                Err(error) => {
                    self.health.set(Part::Store, false);
                    let delay = outage.next_delay();
                    tracing::error!(%error, messages = batch.len(), retry.delay_ms = delay.as_millis(), "intake waits for the store");
                    tokio::time::sleep(delay).await;
                }
            }
        }
    }

    async fn decide_once(&self, batch: &[Delivery], ids: &[Uuid]) -> Result<Vec<Verdict>, StoreError> {
        let now = self.store.now().await?;
        let read: Vec<Result<Request, _>> = batch.iter().map(|delivery| Request::parse(delivery.envelope())).collect();
        let named: Vec<Uuid> = read
            .iter()
            .filter_map(|request| match request {
                Ok(Request { key: KeyRef::Id(id), .. }) => Some(*id),
                _ => None,
            })
            .collect();
        let known = if named.is_empty() { HashMap::new() } else { self.store.resolve_keys(&named).await? };
        let candidates: Vec<Candidate> = read
            .into_iter()
            .zip(batch)
            .zip(ids)
            .map(|((read, delivery), id)| match read {
                Ok(request) => self.judge(request, delivery, *id, &known, now),
                Err(rejected) => {
                    let rejected = *rejected;
                    Candidate::Refusal(self.unreadable(delivery, rejected))
                }
            })
            .collect();
        let outcomes = bisect(&candidates, |range| self.store.accept(&candidates[range])).await?;
        let mut verdicts = Vec::with_capacity(outcomes.len());
        for (outcome, delivery) in outcomes.into_iter().zip(batch) {
            verdicts.push(match outcome {
                Ok(verdict) => verdict,
                Err(error) => self.refuse_unstorable(delivery, &error).await?,
            });
        }
        Ok(verdicts)
    }

    /// A tier, or a connection of one, that is not configured.
    fn judge_tier(&self, request: &Request) -> Result<(), Refusal> {
        let Work::Import(Import { source_key: SourceKeyRef::Dsm(reference), .. }) = &request.work else {
            return Ok(());
        };
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

    /// Times, targets and policy. None asks AWS or a source.
    fn judge(
        &self,
        request: Request,
        delivery: &Delivery,
        id: Uuid,
        known: &HashMap<Uuid, KeyArn>,
        now: OffsetDateTime,
    ) -> Candidate {
        let key = match &request.key {
            KeyRef::Arn(arn) => Some(arn.clone()),
            KeyRef::Id(id) => known.get(id).cloned(),
        };
        let refusal = match &key {
            None => Refusal::of(
                "key",
                RefusalCode::UnknownKey,
                "key: no KMS key has this id here; name it by its ARN, the first accepted job registers it",
            ),
            Some(key) if !self.targets.contains(key) => Refusal::of(
                "key",
                RefusalCode::UnknownTarget,
                "key: its account and Region are not among the configured targets",
            ),
            Some(_) if self.policy.judge(ANONYMOUS, &request) == PolicyVerdict::Denied => {
                Refusal::whole(RefusalCode::NotAllowed, "the policy does not allow this; ask its keeper")
            }
            Some(key) => match request.judge_times(now).and_then(|()| self.judge_tier(&request)) {
                Err(refusal) => refusal,
                Ok(()) => {
                    return Candidate::Job(NewJob {
                        id,
                        principal: ANONYMOUS.into(),
                        key: key.clone(),
                        traceparent: delivery.traceparent().map(str::to_owned),
                        ingress: I::TRANSPORT,
                        request,
                    });
                }
            },
        };
        Candidate::Refusal(NewRefusal {
            id: Uuid::now_v7(),
            principal: ANONYMOUS.into(),
            id_hash: request.id_hash(),
            digest: MessageDigest::Request(request.digest()),
            refusal,
            request_id: Some(request.id.as_str().to_owned()),
            operation: Some(request.operation()),
            key,
            ingress: I::TRANSPORT,
        })
    }

    /// A message that is no request is known by its id, if that is usable, and by its body.
    fn unreadable(&self, delivery: &Delivery, rejected: Rejected) -> NewRefusal {
        // Keyed: a body can hold a secret that a plain hash would let one guess.
        let body = self.keyring.body_hash(self.ingress.queue(), delivery.envelope().body);
        NewRefusal {
            id: Uuid::now_v7(),
            principal: ANONYMOUS.into(),
            id_hash: rejected.id.as_ref().map_or(body, |id| id_hash(&rejected.source, id)),
            digest: MessageDigest::Body(body),
            refusal: rejected.refusal,
            request_id: rejected.id.map(|id| id.as_str().to_owned()),
            operation: None,
            key: rejected.key,
            ingress: I::TRANSPORT,
        }
    }

    /// A row that Postgres would not take is refused without any text of the message's own.
    async fn refuse_unstorable(&self, delivery: &Delivery, error: &StoreError) -> Result<Verdict, StoreError> {
        let refusal =
            Refusal::whole(RefusalCode::Unstorable, "Postgres does not take this request; see the worker's log");
        let refusal = self.unreadable(delivery, Rejected { id: None, source: String::new(), key: None, refusal });
        tracing::error!(%error, refusal.id = %refusal.id, "a message cannot be stored: refused");
        match self.store.accept(&[Candidate::Refusal(refusal)]).await {
            // Even without a row the message is not lost: it goes to the dead-letter queue.
            Ok(_) | Err(StoreError::Data(_)) => Ok(Verdict::Refused),
            Err(other) => Err(other),
        }
    }
}
