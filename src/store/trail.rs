//! The audit trail as it is read: page by page, each a statement of its own.

use super::{Store, StoreError};
use std::fmt;
use std::str::FromStr;
use uuid::Uuid;

/// A page of the whole trail.
pub const TRAIL: &str = "
    select subject, n, entry from audit_entry where (subject, n) > ($1, $2) order by subject, n limit $3";
/// A page of one subject's entries.
const SUBJECT: &str = "
    select subject, n, entry from audit_entry where subject = $4 and (subject, n) > ($1, $2) order by n limit $3";

/// A place in the trail: that of an entry, whose own fields say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// What the entry is about.
    pub subject: Uuid,
    /// Its number within that.
    pub n: i32,
}

impl Position {
    /// Before every entry.
    pub const START: Self = Self { subject: Uuid::nil(), n: 0 };
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.subject, self.n)
    }
}

impl FromStr for Position {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const EXPECTED: &str = "expected SUBJECT/N, the two fields of an entry, as in 0193a1b2-....../3";
        let (subject, n) = text.split_once('/').ok_or(EXPECTED)?;
        let subject = Uuid::try_parse(subject).map_err(|_| EXPECTED)?;
        let n = n.parse().ok().filter(|n| *n >= 0).ok_or(EXPECTED)?;
        Ok(Self { subject, n })
    }
}

/// An entry, and where it stands.
#[derive(Clone, Debug)]
pub struct TrailRow {
    /// By the columns that find it.
    pub position: Position,
    /// Its canonical bytes.
    pub entry: String,
}

impl Store {
    /// The entries after a position, in the trail's order: subjects by their ids, the entries of each by their number. All,
    /// or those of one subject.
    pub async fn trail(&self, subject: Option<Uuid>, after: Position, limit: i64) -> Result<Vec<TrailRow>, StoreError> {
        self.retrying(|| async {
            let client = self.client().await?;
            let rows = match &subject {
                None => {
                    let page = client.prepare_cached(TRAIL).await?;
                    client.query(&page, &[&after.subject, &after.n, &limit]).await?
                }
                Some(subject) => {
                    let page = client.prepare_cached(SUBJECT).await?;
                    client.query(&page, &[&after.subject, &after.n, &limit, subject]).await?
                }
            };
            let read = |row: &tokio_postgres::Row| TrailRow {
                position: Position { subject: row.get(0), n: row.get(1) },
                entry: row.get(2),
            };
            Ok(rows.iter().map(read).collect())
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_what_an_entry_says_of_itself() {
        let position = Position { subject: Uuid::from_u128(7), n: 3 };
        assert_eq!(position.to_string().parse(), Ok(position));
        for text in ["", "7/3", "00000000-0000-0000-0000-000000000007", "00000000-0000-0000-0000-000000000007/-1"] {
            assert!(text.parse::<Position>().is_err(), "{text}");
        }
    }
}
