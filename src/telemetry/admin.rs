//! The admin HTTP server: `/metrics`, `/livez`, `/readyz`.
//!
//! Whoever can reach the port can open connections and say nothing. So there are few at a time, each is for one request,
//! and each ends soon, whatever its client does.

mod listener;

use super::{CONTENT_TYPE, Metrics};
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CONNECTION, CONTENT_TYPE as CONTENT_TYPE_HEADER};
use axum::response::IntoResponse;
use axum::routing::get;
use listener::Few;
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
    /// It rests on purpose, which is a state and no fault.
    is_paused: AtomicBool,
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
        self.conditions(part).for_each(|condition| condition.works.store(works, Ordering::Release));
    }

    /// Tells it as metrics.
    fn note(&self, metrics: &Metrics) {
        for (part, condition) in self.0.iter() {
            let up = metrics.parts_up.with_label_values(&[part.name()]);
            up.set(i64::from(condition.missing(*part).is_none()));
        }
    }

    /// A part rests, or no longer.
    pub fn pause(&self, part: Part, is_paused: bool) {
        self.conditions(part).for_each(|condition| condition.is_paused.store(is_paused, Ordering::Release));
    }

    /// The other side of a part asks to wait, or no longer does.
    pub fn set_blocked(&self, part: Part, is_blocked: bool) {
        self.conditions(part).for_each(|condition| condition.is_blocked.store(is_blocked, Ordering::Release));
    }

    /// Somebody waits for a part. A part that others find in order is not for whoever cannot go on without it.
    #[must_use]
    pub fn wait(&self, part: Part) -> Wait {
        for condition in self.conditions(part) {
            condition.waiting.fetch_add(1, Ordering::AcqRel);
        }
        Wait { health: self.clone(), part }
    }

    /// What does not work and should, and why if that is known.
    pub fn missing(&self) -> Vec<String> {
        self.0.iter().filter_map(|(part, condition)| condition.missing(*part)).collect()
    }

    /// The names of the parts that rest.
    pub fn paused(&self) -> Vec<&'static str> {
        let resting = self.0.iter().filter(|(_, condition)| condition.is_paused.load(Ordering::Acquire));
        resting.map(|(part, _)| part.name()).collect()
    }

    fn conditions(&self, part: Part) -> impl Iterator<Item = &Condition> {
        self.0.iter().filter(move |(known, _)| *known == part).map(|(_, condition)| condition)
    }
}

impl Condition {
    fn missing(&self, part: Part) -> Option<String> {
        let is_away = !self.works.load(Ordering::Acquire) && !self.is_paused.load(Ordering::Acquire);
        if is_away || self.waiting.load(Ordering::Acquire) > 0 {
            return Some(part.name().into());
        }
        self.is_blocked.load(Ordering::Acquire).then(|| format!("{} (blocked by the broker)", part.name()))
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        for condition in self.health.conditions(self.part) {
            condition.waiting.fetch_sub(1, Ordering::AcqRel);
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
        .route(
            "/metrics",
            get(|State((metrics, health)): State<(Metrics, Health)>| async move { render(&metrics, &health) }),
        )
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(|State((_, health)): State<(Metrics, Health)>| async move { ready(&health) }))
        .with_state((metrics, health))
        .layer(axum::middleware::map_response(async |answer: axum::response::Response| {
            ([(CONNECTION, "close")], answer)
        }));
    let serving =
        async move { axum::serve(Few::of(listener), router).with_graceful_shutdown(stop.cancelled_owned()).await };
    Ok((address, serving))
}

fn render(metrics: &Metrics, health: &Health) -> axum::response::Response {
    health.note(metrics);
    match metrics.render() {
        Ok(text) => ([(CONTENT_TYPE_HEADER, CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

fn ready(health: &Health) -> (StatusCode, String) {
    let (missing, paused) = (health.missing(), health.paused());
    let mut text = if missing.is_empty() { "ready".to_owned() } else { format!("not ready: {}", missing.join(", ")) };
    if !paused.is_empty() {
        text = format!("{text}; paused, since too many jobs wait: {}", paused.join(", "));
    }
    let status = if missing.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, format!("{text}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_rests_is_named_and_not_missed() {
        let health = Health::of(&[Part::Store, Part::RabbitMq, Part::Events]);
        health.set(Part::Store, true);
        health.pause(Part::RabbitMq, true);
        let paused = "; paused, since too many jobs wait: rabbitmq ingress\n";
        assert_eq!(ready(&health), (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: events{paused}")));
        health.set(Part::Events, true);
        assert_eq!(ready(&health), (StatusCode::OK, format!("ready{paused}")));
        health.pause(Part::RabbitMq, false);
        assert_eq!(ready(&health), (StatusCode::SERVICE_UNAVAILABLE, "not ready: rabbitmq ingress\n".into()));
        health.set(Part::RabbitMq, true);
        assert_eq!(ready(&health), (StatusCode::OK, "ready\n".into()));
    }

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
