//! Connections to RabbitMQ, for whoever consumes or publishes. Each has its own.

use lapin::{Channel, Connection, ConnectionProperties};
use std::time::Duration;

/// A session is of no more use; its owner builds another.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No answer in time; lapin sets no limit.
    #[error("RabbitMQ did not answer within {} ms", .0.as_millis())]
    Timeout(Duration),
    /// The broker, or the way to it.
    #[error("RabbitMQ: {0}")]
    Broker(#[from] lapin::Error),
    /// The broker cancelled the consumer, or the stream ended without a word.
    #[error("RabbitMQ cancelled the consumer; is the queue still there?")]
    Cancelled,
    /// The channel is gone, and with it what was sent on it without an answer.
    #[error("the channel to RabbitMQ is closed")]
    Closed,
}

/// Connects under a name that the broker's pages show. lapin's recovery stays off: a session that broke is
/// built anew by its owner, with everything that belongs to it.
pub async fn connect(url: &str, name: &str, timeout: Duration) -> Result<Connection, SessionError> {
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    within(timeout, async { Ok(Connection::connect(url, properties).await?) }).await
}

/// Gives up on a broker that does not answer.
pub async fn within<T>(
    timeout: Duration,
    work: impl Future<Output = Result<T, SessionError>>,
) -> Result<T, SessionError> {
    tokio::time::timeout(timeout, work).await.map_err(|_| SessionError::Timeout(timeout))?
}

/// Whether the channel still stands; an idle owner learns of its end no other way.
pub fn check(channel: &Channel) -> Result<(), SessionError> {
    if channel.status().connected() { Ok(()) } else { Err(SessionError::Closed) }
}
