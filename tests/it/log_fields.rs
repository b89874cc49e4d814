//! Fields of log lines and spans: each has a dotted name, which says whose it is and which unit it has.

use crate::architecture::sources;
use std::collections::BTreeSet;

/// Macros that take fields.
const MACROS: [&str; 10] = [
    "trace!(",
    "debug!(",
    "info!(",
    "warn!(",
    "error!(",
    "trace_span!(",
    "debug_span!(",
    "info_span!(",
    "warn_span!(",
    "error_span!(",
];

/// The arguments of a macro, of what follows its opening bracket.
fn arguments(text: &str) -> Vec<&str> {
    let (mut found, mut from, mut depth, mut is_text, mut is_escaped) = (Vec::new(), 0, 0, false, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' if is_text => is_escaped = true,
            '"' => is_text = !is_text,
            _ if is_text => {}
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' if depth == 0 => {
                found.push(text[from..at].trim());
                break;
            }
            ')' | ']' | '}' => depth -= 1,
            ',' if depth == 0 => {
                found.push(text[from..at].trim());
                from = at + 1;
            }
            _ => {}
        }
    }
    found.retain(|argument| !argument.is_empty());
    found
}

/// The names of fields in a source.
fn fields(source: &str) -> Vec<&str> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
    let mut found = Vec::new();
    for name in MACROS {
        for (at, _) in source.match_indices(name).filter(|(at, _)| !source[..*at].ends_with(is_name)) {
            let mut arguments = arguments(&source[at + name.len()..]);
            // A span's name comes first; an event's message comes last, and behind it what that is formatted with.
            if name.contains("_span") {
                arguments.remove(0);
            }
            let fields = arguments.into_iter().take_while(|argument| !argument.starts_with('"'));
            found.extend(fields.map(|field| {
                let field = field.trim_start_matches(['%', '?']);
                &field[..field.find(|c| !is_name(c)).unwrap_or(field.len())]
            }));
        }
    }
    found
}

#[test]
fn fields_have_dotted_names() {
    let mut count = 0;
    let mut plain = BTreeSet::new();
    for (_, path, text) in sources() {
        assert!(!text.contains("#[instrument") && !text.contains("#[tracing::instrument"), "{}", path.display());
        for field in fields(&text) {
            count += 1;
            if !field.contains('.') {
                plain.insert(format!("{}: {field}", path.display()));
            }
        }
    }
    assert!(count > 100, "only {count} fields were found");
    assert!(plain.is_empty(), "{}", plain.into_iter().collect::<Vec<_>>().join("\n"));
}

#[test]
fn all_ways_to_write_a_field_are_seen() {
    let source = r#"
        tracing::warn!(%error, job.id = %id(1, "a, b"), step, retry.delay_ms = x as u64, "said: {a}, {}", b = 1);
        tracing::debug_span!("attempt", otel.kind = "consumer", plain = f("x\", y)"));
        not_an_error!(other); writeln!(f, "x");
    "#;
    let expected = ["error", "job.id", "step", "retry.delay_ms", "otel.kind", "plain"];
    assert_eq!(fields(source).into_iter().collect::<BTreeSet<_>>(), expected.into());
}
