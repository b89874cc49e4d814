//! The refusals behind dead letters.

use super::{Store, StoreError};
use crate::job::RefusalCode;
use time::OffsetDateTime;
use tokio_postgres::Row;
use uuid::Uuid;

/// By which a message is known: its id's hash and the digest of what it says, or a keyed hash of its body.
pub type LetterKey = ([u8; 32], [u8; 32]);

/// A refused message, as its row remembers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusalRow {
    /// The refusal's id, and its event's.
    pub id: Uuid,
    /// Who asked.
    pub principal: String,
    /// What the message says: a redriven one has to say the same.
    pub digest: Vec<u8>,
    /// Why it was refused.
    pub code: String,
    /// The field at fault.
    pub field: Option<String>,
    /// What was expected.
    pub message: String,
    /// The request's id, if it was usable.
    pub request_id: Option<String>,
    /// The transport that it came by.
    pub ingress: String,
    /// When it was first refused so.
    pub refused_at: OffsetDateTime,
    /// The fold that it was told of with, if it was not told of by itself.
    pub fold: Option<Uuid>,
}

/// The refusals of letters; of each the last one stands.
pub const REFUSALS_OF: &str = "
    select id, principal, refused.digest, code, field, message, request_id, ingress, refused_at, fold_id, place
    from unnest($1::bytea[], $2::bytea[], $3::text[]) with ordinality as asked(id_hash, digest, claim, place)
    join refused on refused.id_hash = asked.id_hash and refused.digest = asked.digest
    order by place, coalesce(identity = claim, false) and identity_verified, identity_verified and code <> all($4),
             code <> all($4), refused_at, id";

impl Store {
    /// The refusal of each message, in the slice's order. The same message may have been refused to several principals, and
    /// for several reasons: first comes one of the sender that the letter itself names, then one that can be sent again in
    /// a proved name, then the newest. So a stranger's copy does not take the place of the original.
    pub async fn refusals_of(
        &self,
        letters: &[(LetterKey, Option<&str>)],
    ) -> Result<Vec<Option<RefusalRow>>, StoreError> {
        let hashes: Vec<&[u8]> = letters.iter().map(|((hash, _), _)| hash.as_slice()).collect();
        let digests: Vec<&[u8]> = letters.iter().map(|((_, digest), _)| digest.as_slice()).collect();
        let claims: Vec<Option<&str>> = letters.iter().map(|(_, claim)| *claim).collect();
        let spent = RefusalCode::NOT_REDRIVEN.map(RefusalCode::as_str);
        self.retrying(|| async {
            let client = self.client().await?;
            let statement = client.prepare_cached(REFUSALS_OF).await?;
            let mut found = vec![None; letters.len()];
            for row in client.query(&statement, &[&hashes, &digests, &claims, &spent.as_slice()]).await? {
                let place = usize::try_from(row.get::<_, i64>(10)).unwrap_or_default();
                // The last one stands.
                if let Some(found) = place.checked_sub(1).and_then(|place| found.get_mut(place)) {
                    *found = Some(refusal_row(&row));
                }
            }
            Ok(found)
        })
        .await
    }

    /// A refusal by its id.
    pub async fn refusal(&self, id: Uuid) -> Result<Option<RefusalRow>, StoreError> {
        const READ: &str = "
            select id, principal, digest, code, field, message, request_id, ingress, refused_at, fold_id
            from refused where id = $1";
        self.retrying(|| async {
            let client = self.client().await?;
            let statement = client.prepare_cached(READ).await?;
            Ok(client.query_opt(&statement, &[&id]).await?.as_ref().map(refusal_row))
        })
        .await
    }
}

fn refusal_row(row: &Row) -> RefusalRow {
    RefusalRow {
        id: row.get(0),
        principal: row.get(1),
        digest: row.get(2),
        code: row.get(3),
        field: row.get(4),
        message: row.get(5),
        request_id: row.get(6),
        ingress: row.get(7),
        refused_at: row.get(8),
        fold: row.get(9),
    }
}
