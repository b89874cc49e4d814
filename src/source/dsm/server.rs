//! How a server has fared, and who may ask it. One that is away is left alone for a while; then one job at a time looks
//! whether it is back, so that a server that is dead costs one place and not all of them.

use super::session::{Endpoint, SessionError};
use crate::retry::{Class, envelope, random_unit};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Time-outs of fresh sessions in a row, without any answer between them, after which a server is away. One alone may be
/// about the one thing that was asked.
const MOST_SILENT: u32 = 3;

/// A server of a connection.
pub(super) struct Server {
    pub(super) endpoint: Endpoint,
    pub(super) address: String,
    /// The least time that it is left alone for: as long as a job loses over it.
    least: Duration,
    health: Mutex<Health>,
    probe: Arc<Semaphore>,
}

#[derive(Default)]
struct Health {
    /// Faults in a row.
    faults: u32,
    /// Time-outs of fresh sessions in a row.
    silent: u32,
    /// Why it is away, and until when it is left alone. Nothing while it answers.
    away: Option<(String, Instant)>,
    is_known: bool,
}

/// Held by the job that looks whether a server is back.
pub(super) type Probe = OwnedSemaphorePermit;

impl Server {
    pub(super) fn new(endpoint: Endpoint, connect_timeout: Duration) -> Self {
        Self {
            address: endpoint.to_string(),
            endpoint,
            least: connect_timeout,
            health: Mutex::default(),
            probe: Arc::new(Semaphore::new(1)),
        }
    }

    /// Whether a job may connect: freely, or as the only one; else why the server is away.
    pub(super) fn ask(&self, now: Instant) -> Result<Option<Probe>, String> {
        let health = self.health();
        match &health.away {
            None => Ok(None),
            Some((reason, until)) if now < *until => Err(reason.clone()),
            Some((reason, _)) => Arc::clone(&self.probe).try_acquire_owned().map(Some).map_err(|_| reason.clone()),
        }
    }

    /// Why nobody else may connect now.
    pub(super) fn left_alone(&self, now: Instant) -> Option<String> {
        let is_probed = self.probe.available_permits() == 0;
        let health = self.health();
        health.away.as_ref().filter(|(_, until)| is_probed || now < *until).map(|(reason, _)| reason.clone())
    }

    /// A session was made. Whether that is news; nothing if it has yet to show that it also answers.
    pub(super) fn connected(&self) -> Option<bool> {
        let mut health = self.health();
        (health.silent < MOST_SILENT).then(|| health.answers())
    }

    /// It answered. Whether that is news.
    pub(super) fn answered(&self) -> bool {
        let mut health = self.health();
        health.silent = 0;
        health.answers()
    }

    /// No session could be made. Whether that is news.
    pub(super) fn failed(&self, error: &SessionError, now: Instant) -> bool {
        self.health().is_away(error, self.least, now)
    }

    /// A fresh session gave no answer in time. Whether it is news that the server is away; nothing if it is not.
    pub(super) fn silent(&self, error: &SessionError, now: Instant) -> Option<bool> {
        let mut health = self.health();
        health.silent = health.silent.saturating_add(1);
        (health.silent >= MOST_SILENT).then(|| health.is_away(error, self.least, now))
    }

    /// Held for a few instructions, never across a wait.
    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Health {
    fn answers(&mut self) -> bool {
        let is_news = !self.is_known || self.away.is_some();
        self.is_known = true;
        self.faults = 0;
        self.away = None;
        is_news
    }

    fn is_away(&mut self, error: &SessionError, least: Duration, now: Instant) -> bool {
        let is_news = !self.is_known || self.away.is_none();
        self.is_known = true;
        self.faults = self.faults.saturating_add(1);
        // Half of the envelope is sure: with all of it drawn, a dead server would now and then be asked at once again.
        let further = envelope(Class::Reconnect, self.faults).mul_f64(0.5 + random_unit() / 2.0);
        self.away = Some((error.to_string(), now + least + further));
        is_news
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::pki_types::ServerName;

    const LEAST: Duration = Duration::from_secs(5);

    fn server() -> Server {
        let name = ServerName::try_from("h".to_owned()).unwrap();
        Server::new(Endpoint { host: "h".into(), port: 1, name }, LEAST)
    }

    fn fault() -> SessionError {
        SessionError::Protocol("no TLS".into())
    }

    #[test]
    fn a_server_that_is_away_is_asked_by_one_job_at_a_time() {
        let (server, now) = (server(), Instant::now());
        // Before it is known, anybody may.
        assert!(server.ask(now).unwrap().is_none());
        assert!(server.failed(&fault(), now) && !server.failed(&fault(), now));
        assert_eq!(server.ask(now + LEAST).unwrap_err(), "no TLS");
        let later = now + 3 * LEAST;
        assert_eq!(server.left_alone(later), None);
        let probe = server.ask(later).unwrap();
        assert!(probe.is_some());
        assert_eq!(server.ask(later).unwrap_err(), "no TLS");
        assert_eq!(server.left_alone(later).as_deref(), Some("no TLS"));
        // Whoever looked has gone: another may.
        drop(probe);
        assert!(server.ask(later).unwrap().is_some());
        assert_eq!(server.connected(), Some(true));
        assert_eq!(server.connected(), Some(false));
        assert!(server.ask(now).unwrap().is_none());
    }

    #[test]
    fn a_server_that_only_takes_connections_is_away_until_it_answers() {
        let (server, now) = (server(), Instant::now());
        assert_eq!(server.connected(), Some(true));
        assert_eq!(server.silent(&fault(), now), None);
        // An answer to another job in between: it was about what was asked.
        assert!(!server.answered());
        assert_eq!([(); 3].map(|()| server.silent(&fault(), now)), [None, None, Some(true)]);
        assert_eq!(server.connected(), None);
        assert!(server.left_alone(now).is_some());
        assert!(server.answered());
        assert_eq!((server.left_alone(now), server.connected()), (None, Some(false)));
    }
}
