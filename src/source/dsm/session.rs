//! One connection to one server: mutual TLS, one request in flight, a time-out on every step.

use super::answers::{Answer, AnswerFault, Refusal, Response, common_version};
use super::identity::Identity;
use super::messages::{Ask, Version, request};
use super::ttlv::{self, HEADER, Limits, announced_length};
use crate::config::DsmProtocol;
use crate::tls::Fault;
use rustls::pki_types::ServerName;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use zeroize::Zeroizing;

/// How a connection is made.
pub(super) struct Setup {
    pub(super) identity: Arc<Identity>,
    pub(super) protocol: DsmProtocol,
    pub(super) connect_timeout: Duration,
    pub(super) request_timeout: Duration,
}

/// A server to connect to.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    pub(super) host: String,
    pub(super) port: u16,
    /// What its certificate has to be for.
    pub(super) name: ServerName<'static>,
}

/// A connection on which requests can be made.
pub(super) struct Session {
    stream: TlsStream<TcpStream>,
    version: Version,
    request_timeout: Duration,
}

/// Why a connection was not made, or is no longer one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SessionError {
    /// A step took too long.
    #[error("no {step} within {} ms", .after.as_millis())]
    Timeout { step: &'static str, after: Duration },
    /// TCP or TLS broke off.
    #[error("{0}")]
    Broken(String),
    /// The server's certificate is not what it has to be.
    #[error("{0}")]
    Untrusted(String),
    /// The client's certificate is not taken.
    #[error("{0}")]
    Unauthenticated(String),
    /// TLS or KMIP could not be agreed on, or is not spoken.
    #[error("{0}")]
    Protocol(String),
    /// The server is not able to answer now.
    #[error("the server failed: {0}")]
    Failed(String),
}

impl Session {
    /// Connects, and agrees on a version.
    pub(super) async fn open(endpoint: &Endpoint, setup: &Setup) -> Result<Self, SessionError> {
        let within = setup.connect_timeout;
        let step = |step| move |_| SessionError::Timeout { step, after: within };
        let tcp = timeout(within, TcpStream::connect((endpoint.host.as_str(), endpoint.port))).await;
        let tcp = tcp.map_err(step("TCP connection"))?.map_err(|error| SessionError::Broken(error.to_string()))?;
        tcp.set_nodelay(true).map_err(|error| SessionError::Broken(error.to_string()))?;
        let identity = Arc::clone(&setup.identity);
        let config = tokio::task::spawn_blocking(move || identity.current()).await;
        let connector = TlsConnector::from(config.map_err(|error| SessionError::Broken(error.to_string()))?);
        let handshake = timeout(within, connector.connect(endpoint.name.clone(), tcp)).await;
        let stream = handshake.map_err(step("TLS handshake"))?.map_err(|error| broken(&error))?;
        let version = Version::pinned(setup.protocol).unwrap_or(Version::V1_2);
        let mut session = Self { stream, version, request_timeout: setup.request_timeout };
        if setup.protocol == DsmProtocol::Auto {
            session.version = session.negotiate().await?;
        }
        Ok(session)
    }

    /// The version that is spoken.
    pub(super) fn version(&self) -> Version {
        self.version
    }

    /// TLS's side of the connection.
    pub(super) fn tls(&self) -> &rustls::ClientConnection {
        self.stream.get_ref().1
    }

    /// Asks, and reads the whole answer. After an error, or when this was not waited for to its end, the connection is of
    /// no more use: whoever holds it drops it.
    pub(super) async fn exchange(&mut self, asks: &[Ask<'_>]) -> Result<Response, SessionError> {
        let sent = request(self.version, asks);
        match timeout(self.request_timeout, self.send_and_receive(&sent)).await {
            Ok(received) => received,
            Err(_) => Err(SessionError::Timeout { step: "whole answer", after: self.request_timeout }),
        }
    }

    async fn send_and_receive(&mut self, request: &[u8]) -> Result<Response, SessionError> {
        self.stream.write_all(request).await.map_err(|error| broken(&error))?;
        self.stream.flush().await.map_err(|error| broken(&error))?;
        let mut header = [0; HEADER];
        self.stream.read_exact(&mut header).await.map_err(|error| broken(&error))?;
        let length = announced_length(header, Limits::MESSAGE).map_err(not_kmip)?;
        // As large as it becomes at once: a buffer that grows leaves copies behind.
        let mut message = Zeroizing::new(vec![0; length]);
        let (head, rest) = message.split_at_mut(HEADER);
        head.copy_from_slice(&header);
        self.stream.read_exact(rest).await.map_err(|error| broken(&error))?;
        Response::new(message).map_err(|fault| protocol(&fault))
    }

    /// The highest version that both sides know, by Discover Versions (KMIP 1.4, 4.26).
    ///
    /// The question itself is in some version: the lowest first, since a server refuses those that it does not know. One that
    /// knows no such operation has taken the version that it was asked in.
    async fn negotiate(&mut self) -> Result<Version, SessionError> {
        let mut refused = None;
        for version in Version::ALL {
            self.version = version;
            let asks = [Ask::DiscoverVersions];
            let response = self.exchange(&asks).await?;
            match response.answers(&asks).map_err(|fault| protocol(&fault))?.pop() {
                Some(Some(Ok(payload))) => {
                    return common_version(payload).ok_or_else(|| {
                        SessionError::Protocol("the server knows none of KMIP 1.2, 1.4 and 2.0".into())
                    });
                }
                Some(Some(Err(refusal))) if refusal.is_unsupported_operation() => return Ok(version),
                Some(Some(Err(refusal))) if refusal.is_of_message() => refused = Some(refusal),
                Some(Some(Err(refusal))) => return Err(general(&refusal)),
                _ => return Err(SessionError::Protocol("no answer to Discover Versions".into())),
            }
        }
        let reason = refused.map(|refusal| refusal.to_string()).unwrap_or_default();
        Err(SessionError::Protocol(format!("KMIP 1.2, 1.4 and 2.0 were refused: {reason}")))
    }
}

impl SessionError {
    /// Whether a fresh connection may do better at once.
    pub(super) fn is_broken(&self) -> bool {
        matches!(self, Self::Broken(_))
    }

    /// Whether time was lost over it.
    pub(super) fn is_timeout(&self) -> bool {
        matches!(self, Self::Timeout { .. })
    }
}

/// A refusal that is about the client or the server, whatever was asked.
pub(super) fn general(refusal: &Refusal) -> SessionError {
    if refusal.is_unauthenticated() || refusal.is_denied() {
        SessionError::Unauthenticated(refusal.to_string())
    } else if refusal.is_passing() {
        SessionError::Failed(refusal.to_string())
    } else {
        SessionError::Protocol(refusal.to_string())
    }
}

/// Checks that an answer was given.
pub(super) fn given<T>(answer: Option<T>) -> Result<T, SessionError> {
    answer.ok_or_else(|| SessionError::Protocol("the server left an operation out".into()))
}

/// The answers of a response.
pub(super) fn answers<'a>(response: &'a Response, asks: &[Ask<'_>]) -> Result<Vec<Answer<'a>>, SessionError> {
    response.answers(asks).map_err(|fault| protocol(&fault))
}

pub(super) fn protocol(fault: &AnswerFault) -> SessionError {
    SessionError::Protocol(fault.to_string())
}

fn not_kmip(fault: ttlv::Fault) -> SessionError {
    protocol(&fault.into())
}

fn broken(error: &io::Error) -> SessionError {
    match Fault::of(error) {
        Some(Fault::Untrusted(reason)) => SessionError::Untrusted(reason),
        Some(Fault::Unauthenticated(reason)) => SessionError::Unauthenticated(reason),
        Some(Fault::Protocol(reason)) => SessionError::Protocol(reason),
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            SessionError::Broken("the server closed the connection".into())
        }
        None => SessionError::Broken(error.to_string()),
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}
