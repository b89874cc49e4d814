//! Tables for people, JSON for programs.

use serde::Serialize;
use std::io::Write as _;
use std::time::Duration;

/// How a command prints.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    pub(super) json: bool,
}

impl Output {
    /// Prints a value as JSON, or as the text that `human` makes of it.
    pub(super) fn value<T: Serialize>(self, value: &T, human: impl FnOnce(&T) -> String) {
        let text = if self.json {
            serde_json::to_string_pretty(value).unwrap_or_else(|error| error.to_string())
        } else {
            human(value)
        };
        print(&text);
    }

    /// Says on standard error why a command could not be carried out.
    pub(super) fn error(self, code: &str, error: &anyhow::Error) {
        if self.json {
            eprintln!("{}", serde_json::json!({"error": {"code": code, "message": format!("{error:#}")}}));
        } else {
            eprintln!("keyferry: {error:#}");
        }
    }

    /// Prints rows as a JSON array, or as a table.
    pub(super) fn table<T: Serialize, const N: usize>(
        self,
        rows: &[T],
        head: [&str; N],
        columns: impl Fn(&T) -> [String; N],
    ) {
        self.value(&rows, |rows| {
            let cells: Vec<[String; N]> = rows.iter().map(columns).collect();
            table(head, &cells)
        });
    }
}

/// Reads a duration such as `90`, `90s`, `5m`, `2h` or `30d`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(['s', 'm', 'h', 'd']);
    let factor = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return Err(EXPECTED.into()),
    };
    let count: u64 = digits.parse().map_err(|_| EXPECTED)?;
    count.checked_mul(factor).map(Duration::from_secs).ok_or_else(|| EXPECTED.into())
}

const EXPECTED: &str = "expected a number of seconds, or one with s, m, h or d, such as 90, 5m, 2h or 30d";

/// Others' words, without what a terminal would take for a command.
pub(super) fn printable(text: &str) -> String {
    crate::words::printable(text).collect()
}

/// A reader that has gone away, as `head` does, is no error.
fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    drop(writeln!(out, "{text}").and_then(|()| out.flush()));
}

pub(super) fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    // Cells hold what senders, brokers and AWS wrote.
    let rows: Vec<[String; N]> = rows.iter().map(|row| std::array::from_fn(|column| printable(&row[column]))).collect();
    let widths: [usize; N] = std::array::from_fn(|column| {
        rows.iter().map(|row| row[column].chars().count()).chain([head[column].len()]).max().unwrap_or(0)
    });
    let line = |cells: [&str; N]| {
        let padded = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(head)];
    lines.extend(rows.iter().map(|row| line(std::array::from_fn(|column| row[column].as_str()))));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(duration("2h"), Ok(Duration::from_secs(7_200)));
        assert_eq!(duration("30d"), Ok(Duration::from_secs(30 * 86_400)));
        for text in ["", "m", "5mm", "-1", "5 m", "99999999999999999999", "9999999999999999h"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["a".to_owned(), "long".to_owned()], ["bcd".to_owned(), String::new()]];
        assert_eq!(table(["X", "Y"], &rows), "X    Y\na    long\nbcd");
    }

    #[test]
    fn a_cell_is_one_cell_and_moves_no_cursor() {
        let rows = [["a\x1b[2J\nb".to_owned(), "c".to_owned()]];
        assert_eq!(table(["X", "Y"], &rows), "X        Y\na [2J b  c");
    }
}
