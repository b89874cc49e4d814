//! The admin HTTP server: `/metrics`, `/livez`, `/readyz`.

use super::Metrics;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// What must work before the process is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The store answers.
    Store,
    /// Requests are consumed from RabbitMQ.
    RabbitMq,
    /// Requests are consumed from SQS.
    Sqs,
    /// Events can be published.
    Events,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Store => "store",
            Self::RabbitMq => "rabbitmq ingress",
            Self::Sqs => "sqs ingress",
            Self::Events => "events",
        }
    }
}

/// Which of the parts that this process has work now.
#[derive(Clone, Debug)]
pub struct Health(Arc<[(Part, Condition)]>);

#[derive(Debug, Default)]
struct Condition {
    works: AtomicBool,
    is_blocked: AtomicBool,
    waiting: AtomicUsize,
}

/// Somebody waits for a part, which is not ready as long as this lives.
#[derive(Debug)]
pub struct Wait {
    health: Health,
    part: Part,
}

impl Health {
    /// For a process with these parts. None works yet.
    pub fn of(parts: &[Part]) -> Self {
        Self(parts.iter().map(|part| (*part, Condition::default())).collect())
    }

    /// A part began or ceased to work.
    pub fn set(&self, part: Part, works: bool) {
        self.states(part).for_each(|state| state.works.store(works, Ordering::Release));
    }

    /// The other side of a part asks to wait, or no longer does.
    pub fn set_blocked(&self, part: Part, is_blocked: bool) {
        self.states(part).for_each(|state| state.is_blocked.store(is_blocked, Ordering::Release));
    }

    /// Somebody waits for a part. A part that others find in order is not for whoever cannot go on without it.
    #[must_use]
    pub fn wait(&self, part: Part) -> Wait {
        for state in self.states(part) {
            state.waiting.fetch_add(1, Ordering::AcqRel);
        }
        Wait { health: self.clone(), part }
    }

    /// What does not work, and why if that is known.
    pub fn missing(&self) -> Vec<String> {
        self.0.iter().filter_map(|(part, state)| state.missing(*part)).collect()
    }

    fn states(&self, part: Part) -> impl Iterator<Item = &Condition> {
        self.0.iter().filter(move |(known, _)| *known == part).map(|(_, state)| state)
    }
}

impl Condition {
    fn missing(&self, part: Part) -> Option<String> {
        if !self.works.load(Ordering::Acquire) || self.waiting.load(Ordering::Acquire) > 0 {
            return Some(part.name().into());
        }
        self.is_blocked.load(Ordering::Acquire).then(|| format!("{} (blocked by the broker)", part.name()))
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        for state in self.health.states(self.part) {
            state.waiting.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// Binds at once, so that a taken address is an error at start; the returned future serves until `stop`.
pub async fn serve_admin(
    listen: SocketAddr,
    metrics: Metrics,
    health: Health,
    stop: CancellationToken,
) -> std::io::Result<(SocketAddr, impl Future<Output = std::io::Result<()>>)> {
    let listener = TcpListener::bind(listen).await?;
    let address = listener.local_addr()?;
    let router = Router::new()
        .route("/metrics", get(|State((metrics, _)): State<(Metrics, Health)>| async move { render(&metrics) }))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(|State((_, health)): State<(Metrics, Health)>| async move { ready(&health) }))
        .with_state((metrics, health));
    let serving = async move { axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await };
    Ok((address, serving))
}

fn render(metrics: &Metrics) -> (StatusCode, String) {
    match metrics.render() {
        Ok(text) => (StatusCode::OK, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

fn ready(health: &Health) -> (StatusCode, String) {
    match health.missing() {
        missing if missing.is_empty() => (StatusCode::OK, "ready\n".into()),
        missing => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {}\n", missing.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_ready_when_it_works_and_nobody_waits_for_it() {
        let health = Health::of(&[Part::Store, Part::Events]);
        assert_eq!(health.missing(), ["store", "events"]);
        health.set(Part::Store, true);
        health.set(Part::Events, true);
        assert!(health.missing().is_empty());
        let (first, second) = (health.wait(Part::Store), health.wait(Part::Store));
        // Another finds it in order.
        health.set(Part::Store, true);
        drop(first);
        assert_eq!(health.missing(), ["store"]);
        drop(second);
        health.set_blocked(Part::Events, true);
        assert_eq!(health.missing(), ["events (blocked by the broker)"]);
        // One that this process has not is nothing to wait for.
        drop(health.wait(Part::Sqs));
        health.set_blocked(Part::Events, false);
        assert!(health.missing().is_empty());
    }
}
