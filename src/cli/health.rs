//! `keyferry health`: whether the worker of these settings is alive and ready, as it says itself.

use super::Failed;
use super::output::{Output, duration, printable};
use crate::config::{ConfigError, Loaded};
use clap::Args;
use serde::Serialize;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// A worker's answer is a line. Of a stranger's no more is read.
const MOST_BYTES: u64 = 4 * 1024;

#[derive(Debug, Args)]
#[command(after_help = "Exit codes: 0 ready; 1 not ready, or nobody answers.\n\n\
    In a Dockerfile:\n  \
    HEALTHCHECK --interval=10s --timeout=5s CMD [\"keyferry\", \"health\"]\n\n\
    --live is for whatever restarts what does not answer: a database that is away is no reason to restart a worker.")]
pub(super) struct Health {
    /// Ask only whether the worker answers; its database and its brokers may be away.
    #[arg(long)]
    live: bool,
    /// How long an answer is waited for.
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = duration)]
    timeout: Duration,
}

/// What the worker says.
#[derive(Debug, Serialize)]
struct Report {
    healthy: bool,
    code: &'static str,
    message: String,
    /// The parts that do not work.
    missing: Vec<String>,
}

impl Health {
    /// Asks no database and no broker: the worker knows.
    pub(super) async fn run(self, loaded: &Loaded, output: Output) -> Result<(), Failed> {
        let address = reachable(loaded.settings.admin.listen)?;
        let report = look(address, self.live, self.timeout).await;
        output.value(&report, |report| report.message.clone());
        if report.healthy { Ok(()) } else { Err(Failed::Said) }
    }
}

/// What the worker at an address says of itself.
async fn look(address: SocketAddr, live: bool, timeout: Duration) -> Report {
    let page = if live { "/livez" } else { "/readyz" };
    let unhealthy = |code, message: String| Report { healthy: false, code, message, missing: Vec::new() };
    let answer = match tokio::time::timeout(timeout, get(address, page)).await {
        Err(_) => {
            let waited = timeout.as_millis();
            return unhealthy("no_answer", format!("what listens on {address} did not answer within {waited} ms"));
        }
        Ok(Err(error)) => {
            let message = format!("no worker answers on {address} (admin.listen): {error}");
            return unhealthy("no_worker", message);
        }
        Ok(Ok(answer)) => answer,
    };
    // What rests is told after it: a state, and no fault.
    let head = |body: &str| body.split("; ").next().unwrap_or_default().to_owned();
    match answer {
        Some((200, body)) if head(&body) == if live { "ok" } else { "ready" } => {
            Report { healthy: true, code: "ok", message: body, missing: Vec::new() }
        }
        Some((503, body)) if !live && body.starts_with("not ready: ") => {
            let missing = head(&body).trim_start_matches("not ready: ").split(", ").map(str::to_owned).collect();
            Report { missing, ..unhealthy("not_ready", body) }
        }
        _ => unhealthy("not_a_worker", format!("what listens on {address} is no Keyferry worker; see admin.listen")),
    }
}

/// Whether a worker answers at the address of its admin port. `None`: nobody does.
pub(super) async fn is_worker(listen: SocketAddr, timeout: Duration) -> Option<bool> {
    let address = reachable(listen).ok()?;
    match look(address, true, timeout).await.code {
        "ok" => Some(true),
        "no_worker" => None,
        _ => Some(false),
    }
}

/// Where a worker that listens there is reached from its own host.
fn reachable(listen: SocketAddr) -> Result<SocketAddr, ConfigError> {
    if listen.port() == 0 {
        let expected = "a port other than 0, for a worker that is to be found";
        return Err(ConfigError::Invalid { name: "admin.listen".into(), expected });
    }
    let host = match listen.ip() {
        IpAddr::V4(host) if host.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(host) if host.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        host => host,
    };
    Ok(SocketAddr::new(host, listen.port()))
}

/// Status and body. By hand: it is our own plain HTTP, and no proxy of the environment may come between.
async fn get(address: SocketAddr, page: &str) -> std::io::Result<Option<(u16, String)>> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {page} HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut bytes = Vec::new();
    stream.take(MOST_BYTES).read_to_end(&mut bytes).await?;
    Ok(parse(&String::from_utf8_lossy(&bytes)))
}

fn parse(answer: &str) -> Option<(u16, String)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    Some((status, printable(body.trim_end())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_and_a_strangers_is_not_taken_for_one() {
        assert_eq!(parse("HTTP/1.0 200 OK\r\na: b\r\n\r\nready\n"), Some((200, "ready".into())));
        assert_eq!(parse("HTTP/1.1 503 x\r\n\r\nnot ready: store\n"), Some((503, "not ready: store".into())));
        for strange in ["", "SSH-2.0-x\r\n", "HTTP/1.1\r\n\r\n", "HTTP/1.1 x\r\n\r\n", "HTTP/1.1 200 OK\r\n"] {
            assert_eq!(parse(strange), None, "{strange}");
        }
    }

    #[test]
    fn a_worker_that_listens_everywhere_is_asked_on_its_own_host() {
        let at = |text: &str| reachable(text.parse().unwrap()).map(|address| address.to_string()).ok();
        assert_eq!(at("0.0.0.0:1").as_deref(), Some("127.0.0.1:1"));
        assert_eq!(at("[::]:1").as_deref(), Some("[::1]:1"));
        assert_eq!(at("192.0.2.1:1").as_deref(), Some("192.0.2.1:1"));
        assert_eq!(at("127.0.0.1:0"), None);
    }
}
