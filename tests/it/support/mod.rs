//! What the end-to-end tests stand on: servers of their own where that is cheap, shares of the run's servers where
//! it is not, and one check of everything at the end.

pub mod broker;
pub mod checker;
pub mod db;
pub mod fake;
pub mod kmip;
pub mod link;
pub mod looking;
pub mod private_broker;
pub mod private_postgres;
pub mod process;
pub mod proof;
mod script;
pub mod snapshot;
pub mod sqs;
pub mod sqs_proxy;
pub mod world;

use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Long enough for a loaded machine; a test that gets here has failed.
const PATIENCE: Duration = Duration::from_secs(40);
/// Between two looks at something that tells nobody when it changes.
const LOOK: Duration = Duration::from_millis(20);

/// A variable that `ops/test` sets.
pub fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!(
            "{name} is not set: these tests need private servers. Run them by `ops/test`, or some of them by \
             `ops/test --services cargo nextest run --features failpoints --test it NAME`"
        )
    })
}

/// Looks until the probe finds what it is after.
pub async fn eventually<T, F, Fut>(what: &str, mut probe: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(Instant::now() < end, "waited in vain for: {what}");
        tokio::time::sleep(LOOK).await;
    }
}

/// The program under test.
pub fn keyferry() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_keyferry"))
}

/// The double of AWS KMS, which Cargo builds beside the program.
pub fn fake_kms() -> PathBuf {
    let path = keyferry().with_file_name("examples").join("fake-kms");
    assert!(path.exists(), "{} is missing: cargo build --features failpoints --examples", path.display());
    path
}

/// An HTTP client for the control interfaces of this machine.
pub fn http() -> reqwest::Client {
    // The system's authorities are many, and read once.
    static TLS: LazyLock<rustls::ClientConfig> = LazyLock::new(|| keyferry::tls::client_config(None).unwrap());
    reqwest::Client::builder()
        .tls_backend_preconfigured(TLS.clone())
        .no_proxy()
        .timeout(Duration::from_secs(60))
        .build()
        .unwrap()
}

/// Runs a clean-up that must be awaited from where nothing can be: a destructor.
pub fn finish_blocking(work: impl Future<Output = ()> + Send + 'static) {
    let thread = std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        if let Ok(runtime) = runtime {
            runtime.block_on(work);
        }
    });
    // A clean-up that failed has nobody left to tell.
    drop(thread.join());
}

/// Each of these functions, as a test over each transport.
macro_rules! contract {
    ($($test:ident),* $(,)?) => {
        mod rabbitmq {
            $(#[tokio::test] async fn $test() { super::$test($crate::support::world::Carriage::RABBITMQ).await; })*
        }
        mod sqs {
            $(#[tokio::test] async fn $test() { super::$test($crate::support::world::Carriage::SQS).await; })*
        }
        mod sqs_fifo {
            $(#[tokio::test] async fn $test() { super::$test($crate::support::world::Carriage::SQS_FIFO).await; })*
        }
    };
}
pub(crate) use contract;
