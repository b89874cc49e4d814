//! Connections to RabbitMQ, for whoever consumes or publishes. Each has its own.

use lapin::{Connection, ConnectionProperties};
use std::time::Duration;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No answer in time; lapin sets no limit.
    #[error("no answer within {} ms", .0.as_millis())]
    Timeout(Duration),
    /// The broker, or the way to it.
    #[error(transparent)]
    Broker(#[from] lapin::Error),
}

/// Connects under a name that the broker's pages show. lapin's recovery stays off: a session that broke is
/// built anew by its owner, with everything that belongs to it.
pub async fn connect(url: &str, name: &str, timeout: Duration) -> Result<Connection, ConnectError> {
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let connecting = Connection::connect(url, properties);
    Ok(tokio::time::timeout(timeout, connecting).await.map_err(|_| ConnectError::Timeout(timeout))??)
}
