//! The rights that a worker needs, as the migrations grant them, compared with those that a role has.
//!
//! The migrations are the one source: a table that a new one brings is looked at without a word here.

use super::schema::migration_texts;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

/// The role of workers.
const WORKER: &str = "keyferry_worker";

/// What the migrations of this binary grant to workers.
pub(super) static GRANTS: LazyLock<Vec<Grant>> =
    LazyLock::new(|| migration_texts().flat_map(|text| grants(&text)).collect());

/// A privilege on a table, or on some of its columns.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Grant {
    table: String,
    privilege: String,
    /// Empty: all of them.
    columns: Vec<String>,
}

/// A privilege on a column, or on a table where it knows no columns, and whether a role has it.
#[derive(Clone, Debug)]
pub(super) struct Right {
    pub(super) table: String,
    pub(super) column: Option<String>,
    pub(super) privilege: String,
    pub(super) is_held: bool,
}

/// How rights differ, in words such as `update (state) on job`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RightsFound {
    /// Needed, and not there.
    pub missing: Vec<String>,
    /// There, and not needed.
    pub beyond: Vec<String>,
}

/// By table and privilege: the columns, or all of them.
pub(super) type Needed = BTreeMap<(String, String), Columns>;

/// Columns of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Columns {
    All,
    Some(BTreeSet<String>),
}

impl Columns {
    fn has(&self, column: Option<&str>) -> bool {
        match self {
            Self::All => true,
            Self::Some(names) => column.is_some_and(|column| names.contains(column)),
        }
    }
}

/// Grants taken together.
pub(super) fn needed(grants: &[Grant]) -> Needed {
    let mut needed = Needed::new();
    for Grant { table, privilege, columns } in grants {
        let place = needed.entry((table.clone(), privilege.clone())).or_insert(Columns::Some(BTreeSet::new()));
        match place {
            Columns::All => {}
            _ if columns.is_empty() => *place = Columns::All,
            Columns::Some(names) => names.extend(columns.iter().cloned()),
        }
    }
    needed
}

impl RightsFound {
    /// Only of tables that the migrations know: others are nobody's business here.
    pub(super) fn compare(needed: &Needed, held: &[Right]) -> Self {
        let known: BTreeSet<&str> = needed.keys().map(|(table, _)| table.as_str()).collect();
        let (mut missing, mut beyond) = (Said::default(), Said::default());
        for right in held.iter().filter(|right| known.contains(right.table.as_str())) {
            let wanted = needed.get(&(right.table.clone(), right.privilege.clone()));
            let is_wanted = wanted.is_some_and(|columns| columns.has(right.column.as_deref()));
            match (is_wanted, right.is_held) {
                // Of a whole table no column is named.
                (true, false) => missing.note(right, matches!(wanted, Some(Columns::All))),
                (false, true) => beyond.note(right, wanted.is_none()),
                _ => {}
            }
        }
        let there: BTreeSet<&str> = held.iter().map(|right| right.table.as_str()).collect();
        let gone = known.difference(&there).map(|table| format!("the table {table}"));
        Self { missing: gone.chain(missing.words()).collect(), beyond: beyond.words().collect() }
    }
}

/// Differences, one for each privilege on a table.
#[derive(Default)]
struct Said(BTreeMap<(String, String), Vec<String>>);

impl Said {
    fn note(&mut self, right: &Right, is_whole: bool) {
        let columns = self.0.entry((right.table.clone(), right.privilege.clone())).or_default();
        if !is_whole {
            columns.extend(right.column.clone());
        }
    }

    fn words(self) -> impl Iterator<Item = String> {
        self.0.into_iter().map(|((table, privilege), columns)| match columns.as_slice() {
            [] => format!("{privilege} on {table}"),
            columns => format!("{privilege} ({}) on {table}", columns.join(", ")),
        })
    }
}

/// The grants to workers in a migration. It reads what our migrations write; a test compares with what Postgres made of
/// them.
fn grants(text: &str) -> Vec<Grant> {
    let code: Vec<&str> = text.lines().map(|line| line.split("--").next().unwrap_or_default()).collect();
    let code = code.join(" ").to_lowercase();
    let mut found = Vec::new();
    for statement in code.split(';') {
        let Some(rest) = statement.trim().strip_prefix("grant ") else { continue };
        let Some((privileges, rest)) = rest.split_once(" on ") else { continue };
        let Some((tables, roles)) = rest.split_once(" to ") else { continue };
        let is_ours = roles.split(',').any(|role| role.trim() == WORKER);
        if !is_ours || tables.trim().starts_with("schema ") {
            continue;
        }
        for privilege in outer_parts(privileges) {
            let (privilege, columns) = match privilege.split_once('(') {
                Some((privilege, columns)) => (privilege.trim(), names(columns.trim_end().trim_end_matches(')'))),
                None => (privilege.trim(), Vec::new()),
            };
            found.extend(names(tables).into_iter().map(|table| Grant {
                table,
                privilege: privilege.to_owned(),
                columns: columns.clone(),
            }));
        }
    }
    found
}

fn names(list: &str) -> Vec<String> {
    list.split(',').map(|name| name.trim().to_owned()).collect()
}

/// Splits at commas outside of parentheses.
fn outer_parts(list: &str) -> Vec<&str> {
    let mut depth = 0;
    let is_comma = |c: char| {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        c == ',' && depth == 0
    };
    list.split(is_comma).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(rights: &[(&str, Option<&str>, &str, bool)]) -> Vec<Right> {
        let held = |(table, column, privilege, is_held): &(&str, Option<&str>, &str, bool)| Right {
            table: (*table).to_owned(),
            column: column.map(str::to_owned),
            privilege: (*privilege).to_owned(),
            is_held: *is_held,
        };
        rights.iter().map(held).collect()
    }

    #[test]
    fn grants_are_read_as_they_are_written() {
        let text = "-- grant all on x to keyferry_worker;\n\
            grant usage on schema public to keyferry_worker;\n\
            grant select, update (a,\n b) on job, line to keyferry_worker, keyferry_reader; -- both\n\
            grant delete on job to keyferry_reader;";
        let grant = |table: &str, privilege: &str, columns: &[&str]| Grant {
            table: table.into(),
            privilege: privilege.into(),
            columns: columns.iter().map(|name| (*name).to_owned()).collect(),
        };
        assert_eq!(
            grants(text),
            [
                grant("job", "select", &[]),
                grant("line", "select", &[]),
                grant("job", "update", &["a", "b"]),
                grant("line", "update", &["a", "b"]),
            ]
        );
    }

    #[test]
    fn what_is_missing_and_what_is_beyond_is_said() {
        let needed = needed(&grants(
            "grant select on job to keyferry_worker; grant update (a) on job to keyferry_worker; \
             grant select on gone to keyferry_worker;",
        ));
        let good = [
            ("job", Some("a"), "select", true),
            ("job", Some("b"), "select", true),
            ("job", Some("a"), "update", true),
            ("job", Some("b"), "update", false),
            ("job", None, "delete", false),
            ("gone", Some("a"), "select", true),
            ("a_strangers", Some("a"), "update", true),
        ];
        assert_eq!(RightsFound::compare(&needed, &held(&good)), RightsFound::default());
        let bad = [
            ("job", Some("a"), "select", false),
            ("job", Some("b"), "select", false),
            ("job", Some("a"), "update", false),
            ("job", Some("b"), "update", true),
            ("job", None, "delete", true),
        ];
        let found = RightsFound::compare(&needed, &held(&bad));
        assert_eq!(found.missing, ["the table gone", "select on job", "update (a) on job"]);
        assert_eq!(found.beyond, ["delete on job", "update (b) on job"]);
    }
}
