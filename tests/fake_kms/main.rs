//! `fake-kms`: a test double of AWS KMS, as far as importing key material goes, and of as much of STS as its callers need.
//!
//! A process of its own that speaks AWS JSON 1.1 over HTTP (and for STS forms and XML, on the same port), checks signatures, holds real wrapping keys and really
//! unwraps, so that the whole AWS SDK stack is exercised. It shares no code with the product. What it answers follows
//! `aws-kms-import.md`, the project's reference; where the reference does not know what AWS does, the code says
//! UNVERIFIED. The control interface is described in [`control`], the layout of ciphertexts in [`crypto`].

#![expect(clippy::disallowed_methods, reason = "this is AWS's clock, not Keyferry's")]

mod control;
mod control_keys;
mod crypto;
mod crypto_ops;
mod engine;
mod faults;
mod http;
mod import_ops;
mod imports;
mod journal;
mod keys;
mod kinds;
mod listener;
mod materials;
mod metadata;
mod operations;
mod pair_ops;
mod pairs;
mod query;
mod quotas;
mod refusal;
mod request;
mod roles;
mod rotation_ops;
mod sigv4;
mod specs;
mod sts_ops;
mod table;
mod tokens;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]
mod trials;
mod world;

use std::collections::HashMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::listener::{CuttableListener, Line};
use crate::world::{Credential, Principal, World};

/// A test double of AWS KMS.
#[derive(Parser)]
struct Arguments {
    /// Where to listen; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: String,
    /// Write the port number to this file once connections are accepted.
    #[arg(long)]
    port_file: Option<PathBuf>,
    /// Who may call, as ACCESSKEY:SECRET:ACCOUNT; may be repeated.
    #[arg(long, default_value = "AKIAFAKEKEYFERRY0001:fake-secret:111122223333")]
    credential: Vec<String>,
    /// How long every answer takes at least.
    #[arg(long, default_value_t = 0)]
    latency_ms: u64,
    /// Whether a key's first material is unwrapped at once, or only when somebody looks at it (for benchmarks).
    #[arg(long, value_enum, default_value_t = Unwrap::Eager)]
    unwrap: Unwrap,
    /// Whether AWS's default request quotas hold.
    #[arg(long, value_enum, default_value_t = Quota::None)]
    quota: Quota,
    /// How far the time of a signature may be off.
    #[arg(long, default_value_t = 300)]
    signature_life_seconds: i64,
    /// How many journal entries are kept.
    #[arg(long, default_value_t = 1_000_000)]
    journal_limit: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Unwrap {
    Eager,
    Lazy,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Quota {
    None,
    Aws,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime").and_then(
            |runtime| {
                let result = runtime.block_on(serve(&arguments));
                // Held and hanging calls must not delay the end.
                runtime.shutdown_timeout(Duration::from_secs(1));
                result
            },
        );
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fake-kms: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(arguments: &Arguments) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let world = Arc::new(World::new(
        credentials(&arguments.credential)?,
        arguments.unwrap == Unwrap::Lazy,
        time::Duration::seconds(arguments.signature_life_seconds),
        arguments.latency_ms,
        arguments.quota == Quota::Aws,
        arguments.journal_limit.max(1),
    ));
    let listener =
        TcpListener::bind(&arguments.listen).await.with_context(|| format!("listening on {}", arguments.listen))?;
    let address = listener.local_addr()?;
    if let Some(path) = &arguments.port_file {
        // In one step, so that nobody reads half a number.
        let draft = path.with_extension("tmp");
        std::fs::write(&draft, address.port().to_string()).with_context(|| format!("writing {}", draft.display()))?;
        std::fs::rename(&draft, path).with_context(|| format!("writing {}", path.display()))?;
    }
    let mut stdout = std::io::stdout();
    writeln!(stdout, "listening on http://{address}")?;
    stdout.flush()?;
    let router = http::router(Arc::clone(&world)).merge(control::router(world));
    let server = axum::serve(CuttableListener(listener), router.into_make_service_with_connect_info::<Line>());
    tokio::select! {
        ended = server.into_future() => ended.context("serving"),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
}

fn credentials(texts: &[String]) -> anyhow::Result<HashMap<String, Credential>> {
    texts
        .iter()
        .map(|text| {
            let [access_key, secret, account] = text.split(':').collect::<Vec<_>>()[..] else {
                anyhow::bail!("a credential is ACCESSKEY:SECRET:ACCOUNT");
            };
            let principal = Principal { access_key: access_key.into(), account: account.into(), session: None };
            Ok((access_key.to_owned(), Credential { secret: secret.to_owned(), principal }))
        })
        .collect()
}
