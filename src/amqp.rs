//! Connections to RabbitMQ, for whoever consumes or publishes. Each has its own.
//!
//! TCP and TLS are made here and handed to lapin: its own way adds a configured authority to the system's instead of
//! trusting it alone, and shows a client's key in `Debug`.

mod address;
mod attempt;
mod refusal;

pub use refusal::Refusal;

use crate::config::{ConfigError, RabbitMq};
use crate::tls::{self, Fault, FileError, Files, OwnFiles};
use address::{Address, Mechanism};
use attempt::Guard;
use lapin::auth::AuthProvider;
use lapin::tcp::RustlsConnector;
use lapin::types::{LongString, ShortString};
use lapin::uri::AMQPUri;
use lapin::{AsyncTcpStream, Channel, Connection, ConnectionProperties, ErrorKind};
use rustls::pki_types::ServerName;
use secrecy::{ExposeSecret as _, SecretString};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A session is of no more use; its owner builds another.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No answer in time; lapin sets no limit.
    #[error("RabbitMQ did not answer within {} ms", .0.as_millis())]
    Timeout(Duration),
    /// The broker, or the way to it.
    #[error("RabbitMQ: {0}")]
    Broker(lapin::Error),
    /// TLS could not be agreed on, with the settings to look at.
    #[error("TLS with RabbitMQ: {fault}; see {settings}")]
    Tls {
        /// Why.
        fault: Fault,
        /// Their names.
        settings: &'static str,
    },
    /// The connection ended while it was made. With TLS 1.3 the broker's verdict on a certificate comes after the
    /// handshake, and is lost if it closes before it has read what follows.
    #[error(
        "RabbitMQ ended the connection in or right after the TLS handshake ({0}); if it looks at its clients' \
         certificates, see rabbitmq.cert_file and rabbitmq.key_file"
    )]
    Dropped(lapin::Error),
    /// The password's file.
    #[error("the file {} of rabbitmq.password_file cannot be used: {reason}", path.display())]
    Password {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A message whose content type no signature can cover.
    #[error(
        "a message cannot be signed: its content type, the key's id or the audience has characters that none can hold"
    )]
    Unsigned,
    /// The broker cancelled the consumer, or the stream ended without a word.
    #[error("RabbitMQ cancelled the consumer; is the queue still there?")]
    Cancelled,
    /// The channel is gone, and with it what was sent on it without an answer.
    #[error("the channel to RabbitMQ is closed")]
    Closed,
}

/// Where the broker is and who we are there. A clone is the same broker.
#[derive(Clone, Debug)]
pub struct Broker(Arc<Inner>);

struct Inner {
    address: Address,
    /// With an `amqps` URL only.
    tls: Option<Tls>,
    password_file: Option<PathBuf>,
    timeout: Duration,
}

struct Tls {
    identity: tls::Identity,
    /// What the broker's certificate has to be for: a DNS name or an IP address.
    name: String,
}

impl Broker {
    /// From the settings and `rabbitmq.url`. Reads the files that they name, connects nowhere.
    pub fn new(settings: &RabbitMq, url: &str) -> Result<Self, ConfigError> {
        let address = Address::parse(url).map_err(|expected| invalid("rabbitmq.url", expected))?;
        check_settings(settings, &address)?;
        let tls = if address.is_tls() {
            let (setting, name) = match &settings.server_name {
                Some(name) => ("rabbitmq.server_name", name.clone()),
                None => ("rabbitmq.url", address.host().to_owned()),
            };
            ServerName::try_from(name.as_str()).map_err(|_| invalid(setting, "a DNS name or an IP address"))?;
            Some(Tls { identity: identity(settings)?, name })
        } else {
            None
        };
        if let Some(path) = &settings.password_file {
            let unusable =
                |reason| ConfigError::Unusable { name: "rabbitmq.password_file".into(), path: path.clone(), reason };
            read_password(path).map_err(unusable)?;
        }
        let timeout = Duration::from_millis(settings.connect_timeout_ms);
        Ok(Self(Arc::new(Inner { address, tls, password_file: settings.password_file.clone(), timeout })))
    }

    /// The virtual host.
    pub fn vhost(&self) -> &str {
        self.0.address.vhost()
    }

    /// The user as whom connections are made; `None` where a client certificate says it.
    pub fn user(&self) -> Option<&str> {
        match self.0.address.mechanism() {
            Mechanism::Plain => Some(self.0.address.user()),
            Mechanism::External => None,
        }
    }

    /// How long a connection may take until it can be used.
    pub fn timeout(&self) -> Duration {
        self.0.timeout
    }

    /// Connects under a name that the broker's pages show. Certificates and password are read anew: a renewed one needs
    /// no restart. lapin's recovery stays off: a session that broke is built anew by its owner, with everything that
    /// belongs to it.
    pub async fn connect(&self, name: &str) -> Result<Connection, SessionError> {
        self.connect_with(name, self.0.address.uri()).await
    }

    /// The same for a session that only publishes. It takes a fraction of the memory.
    pub async fn connect_to_publish(&self, name: &str) -> Result<Connection, SessionError> {
        self.connect_with(name, self.0.address.uri_to_publish()).await
    }

    async fn connect_with(&self, name: &str, address: AMQPUri) -> Result<Connection, SessionError> {
        // Large, and rare.
        within(self.0.timeout, Box::pin(self.attempt(name, address))).await
    }

    async fn attempt(&self, name: &str, address: AMQPUri) -> Result<Connection, SessionError> {
        let inner = Arc::clone(&self.0);
        let read = tokio::task::spawn_blocking(move || inner.read());
        let (login, tls) = read.await.map_err(io::Error::other)??;
        let host = (self.0.address.host(), address.authority.port);
        let found: Vec<SocketAddr> = tokio::net::lookup_host(host).await?.collect();
        let properties = ConnectionProperties::default().with_connection_name(name.into()).with_auth_provider(login);
        let guard = Guard::default();
        let attempt = guard.attempt(self.0.timeout);
        let connecting = Connection::connector(
            address,
            lapin::runtime::default_runtime()?,
            async move |_, runtime| {
                let stream = attempt.step(AsyncTcpStream::connect(&runtime, found.clone())).await?;
                if let AsyncTcpStream::Plain(tcp) = &stream {
                    attempt.connected(tcp.get_ref())?;
                }
                Ok(match &tls {
                    None => stream,
                    Some((connector, name)) => attempt.step(stream.into_rustls(connector, name)).await?,
                })
            },
            properties,
        );
        let connection = connecting.await.map_err(|error| match error.kind() {
            ErrorKind::IOError(io) if self.0.tls.is_some() && is_end(io.kind()) => SessionError::Dropped(error),
            _ => error.into(),
        })?;
        guard.release();
        Ok(connection)
    }
}

impl Inner {
    /// What a connection needs from files.
    fn read(&self) -> Result<(Login, Option<(RustlsConnector, String)>), SessionError> {
        let password = match &self.password_file {
            Some(path) => {
                read_password(path).map_err(|reason| SessionError::Password { path: path.clone(), reason })?
            }
            None => self.address.password().clone(),
        };
        let tls = self.tls.as_ref().map(|tls| {
            let (config, error) = tls.identity.current();
            if let Some(error) = error {
                tracing::warn!(
                    error.message = %error,
                    "RabbitMQ's certificate files cannot be read again: what they held before is used"
                );
            }
            (RustlsConnector::from(config), tls.name.clone())
        });
        let (mechanism, user) = (self.address.mechanism(), self.address.user().to_owned());
        Ok((Login { mechanism, user, password }, tls))
    }
}

/// Neither the password nor the way to the client's key.
impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, tls, .. } = self;
        f.debug_struct("Broker").field("host", &address.host()).field("is_tls", &tls.is_some()).finish_non_exhaustive()
    }
}

/// Whom a connection trusts and which certificate it shows, by `rabbitmq.ca_file`, `cert_file` and `key_file`.
pub fn identity(settings: &RabbitMq) -> Result<tls::Identity, ConfigError> {
    let own = match (&settings.cert_file, &settings.key_file) {
        (Some(certificate), Some(key)) => Some(OwnFiles { certificate: certificate.clone(), key: key.clone() }),
        (None, None) => None,
        (Some(_), None) => return Err(invalid("rabbitmq.key_file", "the private key of rabbitmq.cert_file")),
        (None, Some(_)) => return Err(invalid("rabbitmq.cert_file", "the certificate of rabbitmq.key_file")),
    };
    tls::Identity::read(Files { authorities: settings.ca_file.clone(), own }).map_err(|error| {
        let FileError { setting, path, reason } = error;
        ConfigError::Unusable { name: format!("rabbitmq.{setting}"), path, reason }
    })
}

/// Settings that would have no effect, or two for one thing, are not what their writer means.
fn check_settings(settings: &RabbitMq, address: &Address) -> Result<(), ConfigError> {
    let RabbitMq { cert_file, key_file, server_name, password_file, ca_file, api_url, .. } = settings;
    let is_external = address.mechanism() == Mechanism::External;
    let is_api_tls = api_url.as_ref().is_some_and(|url| url.expose_secret().starts_with("https:"));
    let rules = [
        (
            "rabbitmq.url",
            address.is_tls() || is_api_tls || (ca_file.is_none() && cert_file.is_none() && key_file.is_none()),
            "amqps://..., where rabbitmq.ca_file or rabbitmq.cert_file is set: amqp:// is not encrypted",
        ),
        ("rabbitmq.server_name", address.is_tls() || server_name.is_none(), "nothing, unless rabbitmq.url is amqps"),
        (
            "rabbitmq.url",
            !is_external || (address.is_tls() && cert_file.is_some()),
            "amqps and rabbitmq.cert_file with auth_mechanism=external: the certificate is the login",
        ),
        (
            "rabbitmq.password_file",
            password_file.is_none() || !is_external,
            "nothing, with auth_mechanism=external: the certificate is the login",
        ),
        (
            "rabbitmq.url",
            password_file.is_none() || !address.has_password(),
            "no password, where rabbitmq.password_file is set",
        ),
        (
            "rabbitmq.url",
            password_file.is_none() || address.has_user(),
            "the name of the user whose password is in rabbitmq.password_file",
        ),
    ];
    match rules.into_iter().find(|(_, holds, _)| !holds) {
        Some((name, _, expected)) => Err(invalid(name, expected)),
        None => Ok(()),
    }
}

fn invalid(name: &'static str, expected: &'static str) -> ConfigError {
    ConfigError::Invalid { name: name.into(), expected }
}

/// The file's text without the newline that editors leave.
fn read_password(path: &Path) -> Result<SecretString, String> {
    let text = SecretString::from(std::fs::read_to_string(path).map_err(|error| error.to_string())?);
    let password = text.expose_secret().trim_end_matches(['\r', '\n']);
    if password.is_empty() { Err("it is empty".into()) } else { Ok(SecretString::from(password)) }
}

/// The first words to the broker. lapin's own provider would keep the password in the clear as long as the connection.
struct Login {
    mechanism: Mechanism,
    user: String,
    password: SecretString,
}

impl AuthProvider for Login {
    fn mechanism(&self) -> ShortString {
        self.mechanism.name().into()
    }

    fn auth_starter(&self) -> Result<LongString, String> {
        Ok(match self.mechanism {
            Mechanism::Plain => format!("\0{}\0{}", self.user, self.password.expose_secret()).into(),
            Mechanism::External => LongString::default(),
        })
    }
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

/// The other side went away.
fn is_end(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(kind, BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}

impl From<lapin::Error> for SessionError {
    fn from(error: lapin::Error) -> Self {
        let ErrorKind::IOError(io) = error.kind() else { return Self::Broker(error) };
        let Some(fault) = Fault::of(io) else { return Self::Broker(error) };
        let settings = match &fault {
            Fault::Untrusted(_) => "rabbitmq.ca_file and rabbitmq.server_name",
            Fault::Unauthenticated(_) => "rabbitmq.cert_file and rabbitmq.key_file",
            Fault::Protocol(_) => "the port in rabbitmq.url",
        };
        Self::Tls { fault, settings }
    }
}

impl From<io::Error> for SessionError {
    fn from(error: io::Error) -> Self {
        lapin::Error::from(error).into()
    }
}
