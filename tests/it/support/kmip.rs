//! KMIP servers for tests: the run's PyKMIP, a double that answers what it is told to, and a line that can be cut.

use super::variable;
use keyferry::config::{DsmConnection, DsmProtocol};
use keyferry::job::{DsmKeyRef, KeyKind};
use keyferry::source::{Dsm, DsmError, FetchedKey};
use keyferry::telemetry::Metrics;
use keyferry::tls;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{RootCertStore, ServerConfig, server::WebPkiClientVerifier};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

/// A file of the run's KMIP server: certificates, keys, what was registered.
pub fn file(name: &str) -> PathBuf {
    PathBuf::from(variable("KEYFERRY_TEST_KMIP_DIR")).join(name)
}

/// `host:port` of the run's KMIP server.
pub fn address() -> String {
    variable("KEYFERRY_TEST_KMIP")
}

/// The settings of a connection `prod` to the server of the run.
pub fn section() -> String {
    format!(
        "[dsm.prod]\nservers = [\"{}\"]\nca_file = \"{}\"\ncert_file = \"{}\"\nkey_file = \"{}\"\n",
        address(),
        file("ca.crt").display(),
        file("client.crt").display(),
        file("client.key").display()
    )
}

/// What was registered under a label: its unique identifier and what has to come out.
pub fn registered(label: &str) -> (String, Vec<u8>) {
    let seed: Value = serde_json::from_slice(&std::fs::read(file("seed.json")).unwrap()).unwrap();
    let text = |key: &str| seed[label][key].as_str().unwrap_or_else(|| panic!("{label} is not registered")).to_owned();
    (text("id"), hex::decode(text("holds")).unwrap())
}

/// Settings by which a server is soon asked again.
pub fn hasty(servers: &[&str]) -> DsmConnection {
    DsmConnection { connect_timeout_ms: 500, ..settings(servers, "client") }
}

/// Settings of a connection with the client certificate of that name.
pub fn settings(servers: &[&str], client: &str) -> DsmConnection {
    DsmConnection {
        servers: servers.iter().map(|server| (*server).to_owned()).collect(),
        ca_file: file("ca.crt"),
        cert_file: file(&format!("{client}.crt")),
        key_file: file(&format!("{client}.key")),
        server_name: None,
        protocol: DsmProtocol::Auto,
        max_connections: 4,
        connect_timeout_ms: 5_000,
        request_timeout_ms: 5_000,
    }
}

/// The tier with one connection, `prod`, and its metrics.
pub struct Tier {
    pub dsm: Dsm,
    pub metrics: Metrics,
}

impl Tier {
    pub fn new(settings: DsmConnection) -> Self {
        Self::of([("prod", settings)])
    }

    pub fn of<const N: usize>(connections: [(&str, DsmConnection); N]) -> Self {
        let metrics = Metrics::new().unwrap();
        let connections = connections.map(|(name, settings)| (name.to_owned(), settings));
        Self { dsm: Dsm::new(&BTreeMap::from(connections), None, &metrics).unwrap(), metrics }
    }

    /// The run's own server.
    pub fn usual() -> Self {
        Self::new(settings(&[&address()], "client"))
    }

    pub async fn fetch(&self, key: &str, kind: KeyKind) -> Result<FetchedKey, DsmError> {
        self.dsm.fetch(&DsmKeyRef::parse(key).unwrap(), kind).await
    }

    /// An AES key's fault.
    pub async fn fault(&self, key: &str) -> DsmError {
        self.fetch(key, KeyKind::SymmetricDefault).await.unwrap_err()
    }

    /// A metric's value; series as in the exposition, labels included.
    pub fn metric(&self, series: &str) -> f64 {
        let text = self.metrics.render().unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("there is no {series}:\n{text}")).parse().unwrap()
    }
}

/// One item of TTLV, put together by hand.
pub fn ttlv(tag: u32, kind: u8, value: &[u8]) -> Vec<u8> {
    let mut bytes = tag.to_be_bytes()[1..].to_vec();
    bytes.push(kind);
    bytes.extend(u32::try_from(value.len()).unwrap().to_be_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

pub fn structure(tag: u32, inside: &[Vec<u8>]) -> Vec<u8> {
    ttlv(tag, 1, &inside.concat())
}

pub fn integer(tag: u32, number: i32) -> Vec<u8> {
    ttlv(tag, 2, &number.to_be_bytes())
}

pub fn enumeration(tag: u32, number: u32) -> Vec<u8> {
    ttlv(tag, 5, &number.to_be_bytes())
}

pub fn text(tag: u32, text: &str) -> Vec<u8> {
    ttlv(tag, 7, text.as_bytes())
}

pub const DISCOVER_VERSIONS: u32 = 0x1E;
pub const LOCATE: u32 = 0x08;
pub const GET_ATTRIBUTES: u32 = 0x0B;
pub const GET: u32 = 0x0A;

/// A response message of these batch items.
pub fn message(items: &[Vec<u8>]) -> Vec<u8> {
    let version = structure(0x42_0069, &[integer(0x42_006A, 1), integer(0x42_006B, 4)]);
    let count = integer(0x42_000D, i32::try_from(items.len()).unwrap());
    let header = structure(0x42_007A, &[version, ttlv(0x42_0092, 9, &[0; 8]), count]);
    structure(0x42_007B, &[vec![header], items.to_vec()].concat())
}

/// A batch item that went well.
pub fn done(operation: u32, payload: &[Vec<u8>]) -> Vec<u8> {
    let payload = structure(0x42_007C, payload);
    structure(0x42_000F, &[enumeration(0x42_005C, operation), enumeration(0x42_007F, 0), payload])
}

/// A batch item that was refused.
pub fn refused(operation: Option<u32>, reason: u32) -> Vec<u8> {
    let operation = operation.map(|operation| enumeration(0x42_005C, operation));
    let said = [enumeration(0x42_007F, 1), enumeration(0x42_007E, reason), text(0x42_007D, "no")];
    structure(0x42_000F, &operation.into_iter().chain(said).collect::<Vec<_>>())
}

pub fn versions() -> Vec<u8> {
    let version = structure(0x42_0069, &[integer(0x42_006A, 1), integer(0x42_006B, 4)]);
    done(DISCOVER_VERSIONS, &[version])
}

pub fn found(ids: &[&str]) -> Vec<u8> {
    done(LOCATE, &ids.iter().map(|id| text(0x42_0094, id)).collect::<Vec<_>>())
}

/// An Active key's attributes.
pub fn attributes(id: &str) -> Vec<u8> {
    let state = structure(0x42_0008, &[text(0x42_000A, "State"), enumeration(0x42_000B, 2)]);
    done(GET_ATTRIBUTES, &[text(0x42_0094, id), state])
}

/// An AES key.
pub fn aes(id: &str, bytes: &[u8]) -> Vec<u8> {
    let value = structure(0x42_0045, &[ttlv(0x42_0043, 8, bytes)]);
    let block = structure(0x42_0040, &[enumeration(0x42_0042, 1), value, enumeration(0x42_0028, 3)]);
    done(GET, &[enumeration(0x42_0057, 2), text(0x42_0094, id), structure(0x42_008F, &[block])])
}

/// What the double was asked.
pub struct Asked {
    /// The number of the connection, from 0.
    pub connection: usize,
    /// The number of the request on it, from 0.
    pub request: usize,
    /// Operations, in order.
    pub operations: Vec<u32>,
    /// Unique identifiers, in order.
    pub ids: Vec<String>,
}

/// What it does.
pub enum Act {
    Answer(Vec<u8>),
    /// A byte each time.
    Drip(Vec<u8>, Duration),
    /// Says this, and is gone.
    Leave(Vec<u8>),
    /// Says nothing more.
    Hang,
}

/// A double of a KMIP server, with the run's server certificate. Ends when it is dropped.
pub struct Double {
    pub address: String,
    /// Connections that were made.
    pub connections: Arc<AtomicUsize>,
    /// Messages that were asked.
    pub requests: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Drop for Double {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Double {
    /// Answers Discover Versions by 1.4 and everything else by `act`.
    pub async fn start(act: impl Fn(&Asked) -> Act + Send + Sync + 'static) -> Self {
        Self::raw(move |asked| match asked.operations.as_slice() {
            [DISCOVER_VERSIONS] => Act::Answer(message(&[versions()])),
            _ => act(asked),
        })
        .await
    }

    /// Answers everything by `act`.
    pub async fn raw(act: impl Fn(&Asked) -> Act + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (acceptor, act) = (acceptor(), Arc::new(act));
        let (connections, requests) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (made, asked) = (Arc::clone(&connections), Arc::clone(&requests));
        let task = tokio::spawn(async move {
            let mut open = tokio::task::JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                let connection = made.fetch_add(1, SeqCst);
                let (acceptor, act, asked) = (acceptor.clone(), Arc::clone(&act), Arc::clone(&asked));
                open.spawn(async move {
                    let Ok(mut tls) = acceptor.accept(tcp).await else { return };
                    let mut request = 0;
                    while let Some((operations, ids)) = receive(&mut tls).await {
                        asked.fetch_add(1, SeqCst);
                        // The client may go at any time.
                        match act(&Asked { connection, request, operations, ids }) {
                            Act::Answer(bytes) => drop(tls.write_all(&bytes).await),
                            Act::Drip(bytes, each) => {
                                for byte in bytes {
                                    drop(tls.write_all(&[byte]).await);
                                    drop(tls.flush().await);
                                    tokio::time::sleep(each).await;
                                }
                            }
                            Act::Leave(bytes) => {
                                drop(tls.write_all(&bytes).await);
                                drop(tls.flush().await);
                                return;
                            }
                            Act::Hang => std::future::pending().await,
                        }
                        drop(tls.flush().await);
                        request += 1;
                    }
                });
            }
        });
        Self { address, connections, requests, task }
    }

    pub fn connections(&self) -> usize {
        self.connections.load(SeqCst)
    }

    pub fn requests(&self) -> usize {
        self.requests.load(SeqCst)
    }
}

/// The operations of the next request, and the unique identifiers in it.
async fn receive(tls: &mut tokio_rustls::server::TlsStream<TcpStream>) -> Option<(Vec<u32>, Vec<String>)> {
    let mut header = [0; 8];
    tls.read_exact(&mut header).await.ok()?;
    let mut body = vec![0; u32::from_be_bytes(header[4..].try_into().unwrap()) as usize];
    tls.read_exact(&mut body).await.ok()?;
    let operations = body.windows(12).filter(|window| window.starts_with(&[0x42, 0, 0x5C, 5, 0, 0, 0, 4]));
    let operations = operations.map(|window| u32::from_be_bytes(window[8..].try_into().unwrap())).collect();
    let places = (0..body.len().saturating_sub(8)).filter(|at| body[*at..].starts_with(&[0x42, 0, 0x94, 7]));
    let ids = places.map(|at| {
        let length = u32::from_be_bytes(body[at + 4..at + 8].try_into().unwrap()) as usize;
        String::from_utf8(body[at + 8..at + 8 + length].to_vec()).unwrap()
    });
    Some((operations, ids.collect()))
}

fn acceptor() -> TlsAcceptor {
    let mut roots = RootCertStore::empty();
    for certificate in tls::certificates(&file("ca.crt")).unwrap() {
        roots.add(certificate).unwrap();
    }
    let provider = Arc::new(default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build().unwrap();
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            tls::certificates(&file("server.crt")).unwrap(),
            PrivateKeyDer::from_pem_file(file("server.key")).unwrap(),
        )
        .unwrap();
    TlsAcceptor::from(Arc::new(config))
}

/// A line to a server that counts what goes through it, and can be cut and mended.
pub struct Line {
    pub address: String,
    /// Connections at a time, at most.
    pub most: Arc<AtomicUsize>,
    whole: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Drop for Line {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Line {
    pub async fn to(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (whole, looks) = watch::channel(true);
        let (most, now) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(0)));
        let seen = Arc::clone(&most);
        let task = tokio::spawn(async move {
            let mut open = tokio::task::JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                let (mut looks, seen, now, server) =
                    (looks.clone(), Arc::clone(&seen), Arc::clone(&now), server.clone());
                open.spawn(async move {
                    if !*looks.borrow_and_update() {
                        return;
                    }
                    {
                        let mut now = now.lock().unwrap();
                        *now += 1;
                        seen.fetch_max(*now, SeqCst);
                    }
                    if let Ok(mut far) = TcpStream::connect(server).await {
                        tokio::select! {
                            _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                            _ = looks.wait_for(|whole| !whole) => {}
                        }
                    }
                    *now.lock().unwrap() -= 1;
                });
            }
        });
        Self { address, most, whole, task }
    }

    /// Cuts every connection; new ones are closed at once.
    pub fn cut(&self) {
        self.whole.send_replace(false);
    }

    /// Lets new connections through again.
    pub fn mend(&self) {
        self.whole.send_replace(true);
    }

    /// Connections at a time, at most, so far.
    pub fn most(&self) -> usize {
        self.most.load(SeqCst)
    }
}
