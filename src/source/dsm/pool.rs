//! A named connection's sessions: few, shared by waiting in a fair line, made anew when broken, on the first server that
//! answers.

use super::answers::{Answer, Response};
use super::error::DsmError;
use super::idle::Idle;
use super::messages::{Ask, Version};
use super::server::{Probe, Server};
use super::session::{Endpoint, Session, SessionError, Setup, answers};
use crate::telemetry::Metrics;
use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::timeout;

/// Sessions of one named connection.
pub(super) struct Pool {
    name: String,
    servers: Vec<Server>,
    setup: Setup,
    /// One place for each session that may be open. Its line is first come, first served.
    places: Semaphore,
    /// Wakes the line when a server goes away: there may be nothing left to wait for.
    went_away: Notify,
    idle: Mutex<Idle<Open>>,
    counts: Counts,
}

/// An answer, and whose it is.
pub(super) struct Answered {
    pub(super) response: Response,
    pub(super) server: usize,
}

/// A session, counted as long as it is open.
struct Open {
    session: Session,
    server: usize,
    _counted: Counted,
}

struct Counted(IntGauge);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

struct Counts {
    requests: IntCounterVec,
    seconds: Histogram,
    open: IntGauge,
    reconnects: IntCounter,
    /// A series only for a server that was asked: one that never was is neither up nor down.
    up: IntGaugeVec,
}

/// Why a job is through with a server.
struct Met {
    server: usize,
    verdict: Verdict,
    reason: String,
}

/// What a fault means for a job. Of several servers' the first outweighs: what may heal by itself before what somebody has
/// to mend.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Unavailable,
    Untrusted,
    Unauthenticated,
    Protocol,
}

/// Outcomes in metrics.
const OUTCOMES: [&str; 3] = ["ok", "refused", "failed"];
const OPERATIONS: [&str; 4] = ["discover_versions", "locate", "get_attributes", "get"];

impl Pool {
    /// No session yet. `endpoints` in the order in which they are asked.
    pub(super) fn new(
        name: &str,
        endpoints: Vec<Endpoint>,
        setup: Setup,
        max_connections: usize,
        metrics: &Metrics,
    ) -> Self {
        for (operation, outcome) in OPERATIONS.iter().flat_map(|operation| OUTCOMES.map(|outcome| (operation, outcome)))
        {
            metrics.dsm_requests.with_label_values(&[name, operation, outcome]);
        }
        Self {
            name: name.to_owned(),
            servers: endpoints.into_iter().map(|endpoint| Server::new(endpoint, setup.connect_timeout)).collect(),
            setup,
            places: Semaphore::new(max_connections),
            went_away: Notify::new(),
            idle: Mutex::default(),
            counts: Counts {
                requests: metrics.dsm_requests.clone(),
                seconds: metrics.dsm_request_seconds.with_label_values(&[name]),
                open: metrics.dsm_connections.with_label_values(&[name]),
                reconnects: metrics.dsm_reconnects.with_label_values(&[name]),
                up: metrics.dsm_servers_up.clone(),
            },
        }
    }

    /// The connection's name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Where it may connect to, in order.
    pub(super) fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.servers.iter().map(|server| &server.endpoint)
    }

    /// How it connects.
    pub(super) fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Asks on some session. All that is ever asked only reads: where a session that lay idle does not answer, it is asked
    /// again on a fresh one, and where a server does not speak as it should, of the next server. The time-out of a fresh
    /// session is not waited for twice.
    ///
    /// What goes wrong on a session may be about what was asked: it costs that session, and no other job notices.
    pub(super) async fn exchange(&self, asks: &[Ask<'_>]) -> Result<Answered, DsmError> {
        let _place = self.place().await?;
        let mut met = Vec::new();
        // The server whose session had gone stale, and since when that one lay idle.
        let mut stale = None;
        // Each turn ends it, finds the one stale session, or is through with another server.
        loop {
            let lying = if stale.is_none() { self.take_idle(&met) } else { None };
            let (mut open, lay_since, _probe) = if let Some((open, since)) = lying {
                (open, Some(since), None)
            } else {
                let (open, probe) = self.connect(&mut met).await?;
                (open, None, probe)
            };
            let (server, started) = (open.server, Instant::now());
            let received = open.session.exchange(asks).await;
            let checked = received.and_then(|response| {
                let outcomes = outcomes(&answers(&response, asks)?);
                Ok((response, outcomes))
            });
            match (checked, lay_since) {
                (Ok((response, outcomes)), _) => {
                    self.counts.seconds.observe(started.elapsed().as_secs_f64());
                    self.count(asks, &outcomes);
                    self.answered(server, open.session.version());
                    let mut idle = locked(&self.idle);
                    // A fresh one did better at the same: those that lay there for as long are no better.
                    if let Some((stale, since)) = stale
                        && stale == server
                    {
                        idle.forget(server, since);
                    }
                    idle.put(open, server, Instant::now());
                    return Ok(Answered { response, server });
                }
                // It was closed or lost while it lay idle: no fault yet.
                (Err(error), Some(since)) if error.is_broken() || error.is_timeout() => {
                    stale = Some((server, since));
                    self.counts.reconnects.inc();
                }
                (Err(error), _) => {
                    self.count(asks, &vec!["failed"; asks.len()]);
                    let is_timeout = error.is_timeout();
                    if is_timeout {
                        self.silent(server, &error);
                    }
                    met.push(Met { server, verdict: Verdict::of(&error), reason: error.to_string() });
                    if is_timeout {
                        return Err(self.error(&met));
                    }
                }
            }
        }
    }

    /// A place, in its turn. Nobody stands in line for servers that are all left alone.
    async fn place(&self) -> Result<SemaphorePermit<'_>, DsmError> {
        let mut place = pin!(timeout(self.setup.request_timeout, self.places.acquire()));
        loop {
            // Made before the look: what happens in between is not missed.
            let went_away = self.went_away.notified();
            if self.places.available_permits() == 0
                && let Some(error) = self.all_left_alone()
            {
                return Err(error);
            }
            tokio::select! {
                biased;
                place = &mut place => {
                    // Nobody closes the semaphore: what is left is the time-out.
                    let Ok(Ok(place)) = place else { return Err(DsmError::Busy { connection: self.name.clone() }) };
                    return Ok(place);
                }
                () = went_away => {}
            }
        }
    }

    fn all_left_alone(&self) -> Option<DsmError> {
        let now = Instant::now();
        let met = self.servers.iter().enumerate().map(|(at, server)| Some(Met::away(at, server.left_alone(now)?)));
        met.collect::<Option<Vec<_>>>().map(|met| self.error(&met))
    }

    /// A session on the first server that answers, other than those that were met. Whoever looks whether a server is back
    /// holds on to that until it has answered.
    async fn connect(&self, met: &mut Vec<Met>) -> Result<(Open, Option<Probe>), DsmError> {
        for (at, server) in self.servers.iter().enumerate() {
            if met.iter().any(|met| met.server == at) {
                continue;
            }
            let probe = match server.ask(Instant::now()) {
                Ok(probe) => probe,
                Err(reason) => {
                    met.push(Met::away(at, reason));
                    continue;
                }
            };
            match Session::open(&server.endpoint, &self.setup).await {
                Ok(session) => {
                    if let Some(is_news) = server.connected() {
                        self.is_up(server, session.version(), is_news);
                    }
                    self.counts.open.inc();
                    return Ok((Open { session, server: at, _counted: Counted(self.counts.open.clone()) }, probe));
                }
                Err(error) => {
                    let is_news = server.failed(&error, Instant::now());
                    self.is_down(server, &error, is_news);
                    met.push(Met::connecting(at, &error));
                }
            }
        }
        Err(self.error(met))
    }

    fn answered(&self, at: usize, version: Version) {
        if let Some(server) = self.servers.get(at) {
            self.is_up(server, version, server.answered());
        }
    }

    fn silent(&self, at: usize, error: &SessionError) {
        let Some(server) = self.servers.get(at) else { return };
        if let Some(is_news) = server.silent(error, Instant::now()) {
            self.is_down(server, error, is_news);
        }
    }

    fn is_up(&self, server: &Server, version: Version, is_news: bool) {
        self.counts.up.with_label_values(&[&self.name, &server.address]).set(1);
        if is_news {
            tracing::info!(
                dsm.connection = %self.name, dsm.server = %server.address, kmip.version = %version,
                "the dsm server answers"
            );
        }
    }

    fn is_down(&self, server: &Server, error: &SessionError, is_news: bool) {
        self.counts.up.with_label_values(&[&self.name, &server.address]).set(0);
        self.went_away.notify_waiters();
        if is_news {
            tracing::warn!(
                dsm.connection = %self.name, dsm.server = %server.address, error.message = %error,
                "the dsm server does not answer; it is asked again now and then"
            );
        }
    }

    /// The one that was used last: the others may grow old and be closed.
    fn take_idle(&self, met: &[Met]) -> Option<(Open, Instant)> {
        locked(&self.idle).take(Instant::now(), |server| met.iter().all(|met| met.server != server))
    }

    fn count(&self, asks: &[Ask<'_>], outcomes: &[&'static str]) {
        for (ask, outcome) in asks.iter().zip(outcomes) {
            self.counts.requests.with_label_values(&[self.name.as_str(), ask.operation(), outcome]).inc();
        }
    }

    /// What a fault on a session of one server comes to.
    pub(super) fn fault(&self, server: usize, error: &SessionError) -> DsmError {
        self.error(&[Met { server, verdict: Verdict::of(error), reason: error.to_string() }])
    }

    fn error(&self, met: &[Met]) -> DsmError {
        let name = |at: usize| self.servers.get(at).map_or("?", |server| server.address.as_str());
        let reasons: Vec<String> = met.iter().map(|met| format!("{}: {}", name(met.server), met.reason)).collect();
        let (connection, reason) = (self.name.clone(), reasons.join("; "));
        match met.iter().map(|met| met.verdict).min() {
            Some(Verdict::Protocol) => DsmError::Protocol { connection, reason },
            Some(Verdict::Unauthenticated) => DsmError::Unauthenticated { connection, reason },
            Some(Verdict::Untrusted) => DsmError::Untrusted { connection, reason },
            Some(Verdict::Unavailable) | None => DsmError::Unavailable { connection, reason },
        }
    }
}

impl Met {
    /// A server that is left alone. Whatever the fault was, it was another job's, and may be over.
    fn away(server: usize, reason: String) -> Self {
        Self { server, verdict: Verdict::Unavailable, reason }
    }

    /// A server without a session. What does not speak TLS or KMIP may be a load balancer whose servers are away, or one
    /// that is being set up.
    fn connecting(server: usize, error: &SessionError) -> Self {
        let verdict = match Verdict::of(error) {
            Verdict::Protocol => Verdict::Unavailable,
            verdict => verdict,
        };
        Self { server, verdict, reason: error.to_string() }
    }
}

impl Verdict {
    fn of(error: &SessionError) -> Self {
        match error {
            SessionError::Broken(_) | SessionError::Timeout { .. } | SessionError::Failed(_) => Self::Unavailable,
            SessionError::Untrusted(_) => Self::Untrusted,
            SessionError::Unauthenticated(_) => Self::Unauthenticated,
            SessionError::Protocol(_) => Self::Protocol,
        }
    }
}

fn outcomes(answers: &[Answer<'_>]) -> Vec<&'static str> {
    let outcome = |answer: &Answer<'_>| match answer {
        Some(Ok(_)) => "ok",
        Some(Err(_)) | None => "refused",
    };
    answers.iter().map(outcome).collect()
}

/// Held for a few instructions, never across a wait.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
