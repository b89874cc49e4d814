//! This process and its host.

use super::finding::Finding;
use crate::cli::health::is_worker;
use crate::config::Loaded;
use rustix::process::{DumpableBehavior, Resource, dumpable_behavior, getrlimit};
use std::time::Duration;

/// Files and sockets beside those that the settings tell of: the log, libraries, name servers, the runtime's own.
const FILES_BESIDE: u64 = 64;

pub(super) async fn check(loaded: &Loaded, timeout: Duration) -> Vec<Finding> {
    memory().into_iter().chain([open_files(loaded), admin(loaded, timeout).await]).collect()
}

/// What the process did at its start, seen by its effect.
pub(super) fn memory() -> Vec<Finding> {
    let is_dumped = getrlimit(Resource::Core).current != Some(0);
    let is_traced = !matches!(dumpable_behavior(), Ok(DumpableBehavior::NotDumpable));
    let open = [(is_dumped, "core dumps are on"), (is_traced, "debuggers may attach")];
    let open: Vec<&str> = open.into_iter().filter_map(|(is_open, words)| is_open.then_some(words)).collect();
    vec![if open.is_empty() {
        Finding::ok("host.memory", "core dumps are off and debuggers are shut out")
    } else {
        let advice = "ulimit -c 0, and let the worker call prctl: both would show key material";
        Finding::warning("host.memory", "memory_unprotected", open.join(", "), advice)
    }]
}

fn open_files(loaded: &Loaded) -> Finding {
    let settings = &loaded.settings;
    let dsm: usize = settings.dsm.values().map(|connection| connection.max_connections).sum();
    // A job has one call to AWS under way, and its connection may not be the one of the call before.
    let sockets = settings.database.connections + 2 * settings.worker.concurrency + 2 * settings.sqs.pollers + dsm;
    let needed = FILES_BESIDE + sockets as u64;
    match getrlimit(Resource::Nofile).current {
        Some(limit) if limit < needed => Finding::warning(
            "host.open_files",
            "few_open_files",
            format!("a process may open {limit} files, and these settings need up to {needed}"),
            format!("ulimit -n {needed}, LimitNOFILE={needed} in systemd, or a smaller worker.concurrency"),
        ),
        limit => {
            let limit = limit.map_or_else(|| "as many as it likes".into(), |limit| limit.to_string());
            Finding::ok("host.open_files", format!("a process may open {limit}; these settings need up to {needed}"))
        }
    }
}

async fn admin(loaded: &Loaded, timeout: Duration) -> Finding {
    const CHECK: &str = "host.admin";
    let listen = loaded.settings.admin.listen;
    // A port of the system's own choice: the configured one is left to the worker that is just starting.
    if let Err(error) = tokio::net::TcpListener::bind((listen.ip(), 0)).await {
        let message = format!("nothing can listen on the address of admin.listen = {listen}: {error}");
        return Finding::failed(CHECK, "admin_address", message, "name an address of this host, such as 127.0.0.1");
    }
    match is_worker(listen, timeout.min(Duration::from_secs(3))).await {
        Some(true) => Finding::ok(CHECK, format!("a worker runs here and answers on {listen}")),
        None => Finding::ok(CHECK, format!("{listen} is free for a worker's health and metrics")),
        Some(false) => Finding::failed(
            CHECK,
            "admin_port_taken",
            format!("something else listens on admin.listen = {listen}, so that no worker can start"),
            "stop it, or choose another port for admin.listen",
        ),
    }
}
