//! `keyferry audit`: the trail of what was done.

use super::dead::{Since, since};
use super::output::Output;
use super::{Coded, Failed};
use crate::app::open_store;
use crate::config::Loaded;
use crate::store::{Position, TrailRow};
use clap::{Args, Subcommand};
use std::io::{ErrorKind, Write};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

/// Entries read at once.
const PAGE: i64 = 1_000;

#[derive(Debug, Subcommand)]
pub(super) enum Audit {
    /// Print the entries of the audit trail, a line each, byte for byte as they were recorded (JSON Lines).
    Export(Export),
}

#[derive(Debug, Args)]
#[command(
    after_help = "Entries come by their subjects (a job, a refusal, a source key, a hold), and of each in the order in\n\
    which they were recorded. That order never changes, so that an export which broke off goes on where it ended:\n\
    the last whole line says its own position by its fields subject and n.\n\n\
    A subject may get further entries at any time. To have everything, export everything again, or everything\n\
    since the time of the last export.\n\n\
    Examples:\n  \
    keyferry audit export >trail.jsonl\n  \
    keyferry audit export --after 01933c5e-7c1a-7000-8000-000000000000/4 >>trail.jsonl\n  \
    keyferry audit export --since 24h\n  \
    keyferry audit export --job 01933c5e-7c1a-7000-8000-000000000000"
)]
pub(super) struct Export {
    /// Only entries recorded since then: a time (RFC 3339) or an age, such as 90s, 5m or 2h.
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<Since>,
    /// Only entries recorded before then.
    #[arg(long, value_name = "TIME", value_parser = since)]
    until: Option<Since>,
    /// Only entries about this job, by its id; refusals, source keys and holds have ids too.
    #[arg(long, value_name = "ID")]
    job: Option<Uuid>,
    /// Only entries after this position: SUBJECT/N.
    #[arg(long, value_name = "POSITION")]
    after: Option<Position>,
}

/// The time within which an entry was recorded.
struct Period {
    from: Option<OffsetDateTime>,
    to: Option<OffsetDateTime>,
}

impl Audit {
    pub(super) async fn run(self, loaded: &Loaded, output: Output) -> Result<(), Failed> {
        let Self::Export(export) = self;
        export.run(loaded, output).await
    }
}

impl Export {
    async fn run(self, loaded: &Loaded, output: Output) -> Result<(), Failed> {
        let store = open_store(loaded).await?;
        let now = store.now().await?;
        let at = |given: Option<Since>| given.map(|given| given.at(now));
        let period = Period { from: at(self.since), to: at(self.until) };
        let (mut after, mut count) = (self.after.unwrap_or(Position::START), 0_u64);
        loop {
            let page = store.trail(self.job, after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after = last.position;
            match write(&page, &period) {
                Ok(written) => count += written,
                // A reader that has gone away, as `head` does, is no error.
                Err(Unwritten::Output(error)) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
                Err(Unwritten::Output(error)) => return Err(error.into()),
                Err(Unwritten::Damaged(position)) => {
                    let message = format!(
                        "the entry {position} is not one line: it is not as Keyferry wrote it. What came before is exported; \
                         look at it in the table audit_entry, and go on with --after {position}"
                    );
                    return Err(Coded { code: "audit_entry_damaged", message }.into());
                }
            }
        }
        if !output.json {
            let read_to =
                if count == 0 && after == Position::START { String::new() } else { format!(", up to {after}") };
            eprintln!("keyferry: {count} entries{read_to}");
        }
        Ok(())
    }
}

enum Unwritten {
    Output(std::io::Error),
    Damaged(Position),
}

/// Writes a page's entries that are of the period; how many they were.
fn write(page: &[TrailRow], period: &Period) -> Result<u64, Unwritten> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let mut count = 0;
    for row in page.iter().filter(|row| period.has(&row.entry)) {
        if row.entry.contains(['\n', '\r']) {
            out.flush().map_err(Unwritten::Output)?;
            return Err(Unwritten::Damaged(row.position));
        }
        writeln!(out, "{}", row.entry).map_err(Unwritten::Output)?;
        count += 1;
    }
    out.flush().map_err(Unwritten::Output)?;
    Ok(count)
}

impl Period {
    /// An entry whose time cannot be read is of every period: it is not as we wrote it, and must not be overlooked.
    fn has(&self, entry: &str) -> bool {
        if self.from.is_none() && self.to.is_none() {
            return true;
        }
        recorded_at(entry).is_none_or(|at| self.from.is_none_or(|from| from <= at) && self.to.is_none_or(|to| at < to))
    }
}

/// The canonical form begins with the time.
fn recorded_at(entry: &str) -> Option<OffsetDateTime> {
    let (at, _) = entry.strip_prefix("{\"at\":\"")?.split_once('"')?;
    OffsetDateTime::parse(at, &Rfc3339).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

    #[test]
    fn a_period_has_its_beginning_and_not_its_end() {
        let period = |from, to| Period { from, to };
        let (early, late) = (datetime!(2026-01-01 12:00 UTC), datetime!(2026-01-01 13:00 UTC));
        let entry = "{\"at\":\"2026-01-01T12:00:00Z\",\"n\":1}";
        assert!(period(Some(early), Some(late)).has(entry));
        assert!(!period(None, Some(early)).has(entry));
        assert!(!period(Some(late), None).has(entry));
        for damaged in ["{\"at\":\"soon\"}", "{}", "{\"at\":\""] {
            assert!(period(Some(late), None).has(damaged), "{damaged}");
        }
    }
}
