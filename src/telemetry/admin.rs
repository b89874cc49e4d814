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
use std::sync::atomic::{AtomicBool, Ordering};
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
pub struct Health(Arc<[(Part, AtomicBool)]>);

impl Health {
    /// For a process with these parts. None works yet.
    pub fn of(parts: &[Part]) -> Self {
        Self(parts.iter().map(|part| (*part, AtomicBool::new(false))).collect())
    }

    /// A part began or ceased to work.
    pub fn set(&self, part: Part, works: bool) {
        for (_, state) in self.0.iter().filter(|(known, _)| *known == part) {
            state.store(works, Ordering::Release);
        }
    }

    /// Tells it as metrics.
    fn note(&self, metrics: &Metrics) {
        for (part, works) in self.0.iter() {
            let up = metrics.parts_up.with_label_values(&[part.name()]);
            up.set(i64::from(works.load(Ordering::Acquire)));
        }
    }

    /// The names of the parts that do not work.
    pub fn missing(&self) -> Vec<&'static str> {
        self.0.iter().filter(|(_, works)| !works.load(Ordering::Acquire)).map(|(part, _)| part.name()).collect()
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
    match health.missing() {
        missing if missing.is_empty() => (StatusCode::OK, "ready\n".into()),
        missing => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {}\n", missing.join(", "))),
    }
}
