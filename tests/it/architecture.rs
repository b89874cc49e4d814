//! The rooms' import edges: what the table in `src/lib.rs` draws is what the code does, no more and no less.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Crates whose types stay in the rooms that talk to these systems.
const ADAPTERS: &[(&str, &[&str])] = &[
    ("aws_lc_rs", &["wrap"]),
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

/// What a room may import, as the table says.
#[derive(Debug)]
enum Drawn {
    All,
    Only(BTreeSet<String>),
}

/// Macros, which have no path.
const EVERYWHERE: &str = "failpoint";

/// The table of rooms in `src/lib.rs`.
fn drawing() -> BTreeMap<String, Drawn> {
    let rows = include_str!("../../src/lib.rs").lines().filter_map(|line| line.strip_prefix("//! | [`"));
    let drawn: BTreeMap<String, Drawn> = rows
        .flat_map(|row| {
            let cells: Vec<&str> = row.split(" | ").collect();
            let imports = cells[2].trim_end_matches(" |");
            let quoted = |text: &str| text.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
            quoted(&format!("`{}", cells[0])).into_iter().map(move |room| {
                let drawn =
                    if imports == "all" { Drawn::All } else { Drawn::Only(quoted(imports).into_iter().collect()) };
                (room, drawn)
            })
        })
        .collect();
    assert!(drawn.len() > 20, "the table was not found");
    drawn
}

#[test]
fn rooms_import_what_the_drawing_says() {
    let drawing = drawing();
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut broken = BTreeSet::new();
    for (room, path, text) in sources() {
        let others = imported(&text).into_iter().filter(|other| *other != room && other != EVERYWHERE);
        for other in others.filter(|_| !["lib", "main"].contains(&room.as_str())) {
            match drawing.get(&room) {
                None if room == EVERYWHERE => {}
                None => drop(broken.insert(format!("{}: the room {room} is not drawn", path.display()))),
                Some(Drawn::Only(allowed)) if !allowed.contains(&other) => {
                    broken.insert(format!("{}: {room} imports {other}", path.display()));
                }
                Some(_) => drop(found.entry(room.clone()).or_default().insert(other)),
            }
        }
    }
    for (room, drawn) in &drawing {
        let Drawn::Only(drawn) = drawn else { continue };
        let used = found.remove(room).unwrap_or_default();
        broken.extend(drawn.difference(&used).map(|other| format!("{room} is drawn to import {other}, and does not")));
    }
    assert!(broken.is_empty(), "{}", broken.into_iter().collect::<Vec<_>>().join("\n"));
}

#[test]
fn foreign_types_stay_in_their_rooms() {
    let mut broken = BTreeSet::new();
    for (room, path, text) in sources() {
        for krate in roots(&text) {
            let at_home = ADAPTERS.iter().find(|(name, _)| match name.strip_suffix('_') {
                Some(_) => krate.starts_with(name),
                None => krate == *name,
            });
            if at_home.is_some_and(|(_, rooms)| !rooms.contains(&room.as_str())) {
                broken.insert(format!("{}: {krate}", path.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.into_iter().collect::<Vec<_>>().join("\n"));
}

#[test]
fn every_way_to_name_another_room_is_seen() {
    let text = "use crate::{\n    amqp::{self, Broker},\n    job,\n};\nfn f() -> crate::store::Store { super::x($crate::words::W) }";
    assert_eq!(imported(text), ["amqp", "job", "store", "words"].map(str::to_owned).into());
    let text = "use lapin;\nuse aws_sdk_kms::Client;\nfn f(x: &tokio_postgres::Row) { a::rsa::b(); let lapin = aws_lc_rs::x(); }";
    assert_eq!(roots(text), ["lapin", "aws_sdk_kms", "tokio_postgres", "a", "aws_lc_rs"].into());
}

#[test]
fn no_package_has_unsafe_code() {
    for manifest in ["Cargo.toml", "ops/bench/naive/Cargo.toml", "tests/fuzz/Cargo.toml"] {
        let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(manifest)).unwrap();
        assert!(text.contains("\n[lints.rust]\nunsafe_code = \"forbid\"\n"), "{manifest}");
    }
}

/// Every file of the sources with its room, without comments.
pub fn sources() -> Vec<(String, PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    assert!(files.len() > 30, "the sources were not found");
    let read = |path: PathBuf| {
        let inside = path.strip_prefix(&root).unwrap();
        let room = inside.iter().next().unwrap().to_string_lossy().trim_end_matches(".rs").to_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let kept: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        let text = kept.join("\n");
        (room, path, text)
    };
    files.into_iter().map(read).collect()
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

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

fn name(text: &str) -> &str {
    &text[..text.find(|c| !is_name(c)).unwrap_or(text.len())]
}

/// Rooms named as `crate::room`, or in the braces of `crate::{...}`.
fn imported(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, start) in text.match_indices("crate::").filter(|(at, _)| !text[..*at].ends_with(is_name)) {
        let rest = &text[at + start.len()..];
        let Some(braces) = rest.strip_prefix('{') else {
            found.insert(name(rest).to_owned());
            continue;
        };
        let (mut depth, mut is_first) = (1, true);
        for (at, c) in braces.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => is_first = true,
                _ if is_first && depth == 1 && is_name(c) => {
                    found.insert(name(&braces[at..]).to_owned());
                    is_first = false;
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    found
}

/// Names with which paths begin, in `use` lines and elsewhere.
fn roots(text: &str) -> BTreeSet<&str> {
    let starts = text.match_indices("::").filter_map(|(at, _)| {
        let before = &text[..at];
        let from = before.rfind(|c| !is_name(c)).map_or(0, |last| last + 1);
        (!before[..from].ends_with("::") && from < at).then(|| &before[from..])
    });
    let whole = text.lines().filter_map(|line| Some(name(line.trim_start().strip_prefix("use ")?)));
    starts.chain(whole).collect()
}
