//! The rooms' import edges, held by reading `use crate::` lines: what `src/lib.rs` draws is what the code does.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Which rooms a room may import. `app` and `cli` may import everything.
const EDGES: &[(&str, &[&str])] = &[
    ("amqp", &["config", "tls"]),
    ("audit", &["job"]),
    ("config", &["job", "policy", "quota"]),
    ("dead", &["amqp", "ingress", "job", "policy", "retry", "source", "sqs", "store"]),
    ("failpoint", &[]),
    ("ingress", &["amqp", "job", "retry", "sqs", "telemetry"]),
    ("intake", &["ingress", "job", "policy", "retry", "source", "store", "telemetry"]),
    ("job", &[]),
    ("kms", &["job", "telemetry", "words"]),
    ("outbox", &["amqp", "retry", "sqs", "store", "telemetry"]),
    ("policy", &["job"]),
    ("quota", &[]),
    ("retry", &[]),
    ("source", &["config", "job", "retry", "telemetry", "tls"]),
    ("sqs", &["retry", "telemetry", "words"]),
    ("store", &["audit", "config", "job", "quota", "source", "telemetry", "tls", "words"]),
    ("telemetry", &["config", "tls", "words"]),
    ("tls", &[]),
    ("topology", &["tls"]),
    ("worker", &["audit", "config", "job", "kms", "policy", "quota", "retry", "source", "store", "telemetry", "wrap"]),
    ("words", &[]),
    ("wrap", &["job"]),
];

/// Crates whose types stay in the rooms that talk to these systems.
const ADAPTERS: &[(&str, &[&str])] = &[
    ("aws_", &["kms", "sqs"]),
    ("backoff", &["retry"]),
    ("deadpool_postgres", &["store"]),
    ("ed25519_dalek", &["policy"]),
    ("aes_kw", &["wrap"]),
    ("k256", &["source"]),
    ("opentelemetry", &["telemetry"]),
    ("tracing_opentelemetry", &["telemetry"]),
    ("lapin", &["amqp", "cli", "dead", "ingress", "outbox"]),
    ("p256", &["source"]),
    ("p384", &["source"]),
    ("p521", &["source"]),
    ("rsa", &["source", "wrap"]),
    ("tokio_postgres", &["store"]),
];

#[test]
fn rooms_import_only_what_the_drawing_allows() {
    let allowed: BTreeMap<&str, &[&str]> = EDGES.iter().copied().collect();
    let mut broken = Vec::new();
    for (room, path, line) in lines() {
        if ["app", "cli", "lib", "main"].contains(&room.as_str()) {
            continue;
        }
        let Some(allowed) = allowed.get(room.as_str()) else {
            broken.push(format!("{}: the room {room} is not drawn", path.display()));
            continue;
        };
        for other in imported(&line).into_iter().filter(|other| *other != room && !allowed.contains(&other.as_str())) {
            broken.push(format!("{}: {room} imports {other}: {}", path.display(), line.trim()));
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn foreign_types_stay_in_their_rooms() {
    let broken: Vec<String> = lines()
        .filter(|(.., line)| line.trim_start().starts_with("use "))
        .filter_map(|(room, path, line)| {
            let used = line.trim_start().trim_start_matches("use ");
            let (_, rooms) = ADAPTERS.iter().find(|(krate, _)| used.starts_with(krate))?;
            let is_at_home = rooms.contains(&room.as_str()) || room == "wrap" && used.starts_with("aws_lc_rs");
            (!is_at_home).then(|| format!("{}: {}", path.display(), line.trim()))
        })
        .collect();
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

/// Every line of the sources with its room, without comments.
fn lines() -> impl Iterator<Item = (String, PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    assert!(files.len() > 30, "the sources were not found");
    files.into_iter().flat_map(move |path| {
        let inside = path.strip_prefix(&root).unwrap();
        let room = inside.iter().next().unwrap().to_string_lossy().trim_end_matches(".rs").to_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let kept: Vec<String> =
            text.lines().filter(|line| !line.trim_start().starts_with("//")).map(str::to_owned).collect();
        kept.into_iter().map(move |line| (room.clone(), path.clone(), line))
    })
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Rooms named as `crate::room` in a line.
fn imported(line: &str) -> BTreeSet<String> {
    line.match_indices("crate::")
        .map(|(at, found)| {
            let rest = &line[at + found.len()..];
            rest.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect::<String>()
        })
        .filter(|room| !room.is_empty() && room != "failpoint")
        .collect()
}
