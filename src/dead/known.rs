//! Which refusal a letter is of, known as intake knew it.

use super::Letter;
use crate::ingress::{SIGNATURE_HEADER, Sender};
use crate::job::{Envelope, KeyArn, KeyRef, Operation, Refusal, RefusalCode, Rejected, Request, id_hash};
use crate::policy::{Identity, Proof, Signature};
use crate::source::Keyring;
use crate::store::{
    Candidate, LetterKey, MessageDigest, NewRefusal, RefusalRow, Sender as NewSender, Store, StoreError, Verdict,
    bisect,
};
use uuid::Uuid;

/// Matches letters to refusals.
#[derive(Clone, Copy, Debug)]
pub struct Matcher<'a> {
    /// The refusals.
    pub store: &'a Store,
    /// For keyed hashes of bodies.
    pub keyring: &'a Keyring,
    /// The queue of requests, in whose name bodies are hashed unless a letter names its own.
    pub requests: &'a str,
    /// The transport, for new rows.
    pub transport: &'static str,
    /// Whose letters those without a row are.
    pub stranger: &'a str,
    /// The digest of the policy in force, for new rows.
    pub policy: &'a str,
    /// What senders prove: a letter is read as intake read it.
    pub proof: &'a Proof,
}

/// A letter with what is known of it.
#[derive(Clone, Debug)]
pub struct Known {
    /// The letter.
    pub letter: Letter,
    /// What it asks for, where it can be read.
    pub operation: Option<Operation>,
    /// The KMS key that it names, by ARN or id.
    pub key: Option<String>,
    /// The request's id, where it is usable.
    pub request_id: Option<String>,
    /// What became of it.
    pub standing: Standing,
}

/// What became of a letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It was refused.
    Refused(RefusalRow),
    /// The broker took it away before Keyferry decided, somebody put it here, or its refusal is forgotten: it was given a
    /// row just now.
    Recorded(RefusalRow),
    /// The same, but it has no row: nothing was to be written, or Postgres would not take it.
    Unrecorded,
    /// Its request was accepted before: it is a copy of what became a job.
    Accepted,
}

impl Standing {
    /// The refusal.
    pub fn row(&self) -> Option<&RefusalRow> {
        match self {
            Self::Refused(row) | Self::Recorded(row) => Some(row),
            Self::Unrecorded | Self::Accepted => None,
        }
    }
}

/// What a letter says of itself.
struct Facts {
    /// As it is known to intake, most exact first.
    keys: Vec<LetterKey>,
    /// The identity that it says it comes from.
    claim: Option<String>,
    digest: MessageDigest,
    operation: Option<Operation>,
    key: Option<KeyRef>,
    request_id: Option<String>,
}

impl Matcher<'_> {
    /// Looks letters up, and changes nothing.
    pub async fn look(&self, letters: Vec<Letter>) -> Result<Vec<Known>, StoreError> {
        let facts: Vec<Facts> = letters.iter().map(|letter| self.facts(letter)).collect();
        let rows = self.rows(&facts).await?;
        Ok(known(letters, facts, rows, |row| row.map_or(Standing::Unrecorded, Standing::Refused)))
    }

    /// Looks letters up, and gives those a refusal that have none, with its audit entry and its event.
    pub async fn record(&self, letters: Vec<Letter>) -> Result<Vec<Known>, StoreError> {
        let facts: Vec<Facts> = letters.iter().map(|letter| self.facts(letter)).collect();
        let rows = self.rows(&facts).await?;
        let strangers: Vec<usize> = (0..facts.len()).filter(|place| rows[*place].is_none()).collect();
        let died_at: Vec<_> = strangers.iter().map(|place| letters[*place].died_at).collect();
        let forgotten = self.store.may_be_forgotten(self.transport, &died_at).await?;
        let mut candidates = Vec::with_capacity(strangers.len());
        for (place, is_forgotten) in strangers.iter().zip(forgotten) {
            let refusal = if is_forgotten && letters[*place].was_refused() { in_flood() } else { by_broker() };
            candidates.push(Candidate::Refusal(self.refusal(&facts[*place], refusal).await?));
        }
        let verdicts = bisect(&candidates, |range| self.store.accept(&candidates[range])).await?;
        let mut standings: Vec<Standing> =
            rows.into_iter().map(|row| row.map_or(Standing::Unrecorded, Standing::Refused)).collect();
        // Read again: of two letters that say the same, one row is of both.
        let asked: Vec<_> = strangers.iter().map(|place| (facts[*place].keys[0], None)).collect();
        let rows = self.store.refusals_of(&asked).await?;
        for ((place, row), verdict) in strangers.into_iter().zip(rows).zip(verdicts) {
            standings[place] = match (verdict, row) {
                (Ok(Verdict::Duplicate | Verdict::Accepted), _) => Standing::Accepted,
                (_, Some(row)) => Standing::Recorded(row),
                (Ok(Verdict::Refused) | Err(_), None) => Standing::Unrecorded,
            };
        }
        let mut standings = standings.into_iter();
        Ok(known(letters, facts, Vec::new(), |_| standings.next().unwrap_or(Standing::Unrecorded)))
    }

    fn facts(&self, letter: &Letter) -> Facts {
        let queue = letter.origin.as_deref().unwrap_or(self.requests);
        let body = self.keyring.body_hash(queue, &letter.body);
        // A request that Postgres would not take is known by its body too.
        let whole = (body, body);
        let claim = self.claim(letter);
        match Request::parse(self.envelope(letter)) {
            Ok(request) => Facts {
                claim,
                keys: vec![(request.id_hash(), request.digest()), whole],
                digest: MessageDigest::Request(request.digest()),
                operation: Some(request.operation()),
                request_id: Some(request.id.as_str().to_owned()),
                key: Some(request.key),
            },
            Err(rejected) => {
                let Rejected { id, source, key, .. } = *rejected;
                let first = (id.as_ref().map_or(body, |id| id_hash(&source, id)), body);
                Facts {
                    claim,
                    keys: if first == whole { vec![whole] } else { vec![first, whole] },
                    digest: MessageDigest::Body(body),
                    operation: None,
                    request_id: id.map(|id| id.as_str().to_owned()),
                    key: key.map(KeyRef::Arn),
                }
            }
        }
    }

    /// A signature does not cover the transport's message id, so that it names no request.
    fn envelope<'l>(&self, letter: &'l Letter) -> Envelope<'l> {
        let envelope = letter.envelope();
        match self.proof {
            Proof::Signature { .. } => Envelope { message_id: None, ..envelope },
            Proof::Broker | Proof::Nothing => envelope,
        }
    }

    fn claim(&self, letter: &Letter) -> Option<String> {
        let identity = match (self.proof, &letter.sender) {
            (Proof::Signature { .. }, _) => {
                Identity::SigningKey(Signature::parse(letter.headers.get(SIGNATURE_HEADER)?)?.key)
            }
            (Proof::Broker, Some(Sender::RabbitMqUser(name) | Sender::PassedOn(name))) => {
                Identity::parse(&format!("rabbitmq:{name}"))?
            }
            (Proof::Broker, Some(Sender::AwsRole(name))) => Identity::parse(&format!("aws:{name}"))?,
            (Proof::Broker, None) | (Proof::Nothing, _) => return None,
        };
        Some(identity.to_string())
    }

    /// The refusal of each letter, by the most exact way in which it is known.
    async fn rows(&self, facts: &[Facts]) -> Result<Vec<Option<RefusalRow>>, StoreError> {
        let mut asked: Vec<(LetterKey, Option<&str>)> = Vec::with_capacity(facts.len());
        for Facts { keys, claim, .. } in facts {
            asked.extend(keys.iter().map(|key| (*key, claim.as_deref())));
        }
        let mut found = self.store.refusals_of(&asked).await?.into_iter();
        let of_each = facts.iter().map(|facts| {
            // The whole share is taken, whichever of it is used.
            let share: Vec<Option<RefusalRow>> = found.by_ref().take(facts.keys.len()).collect();
            share.into_iter().flatten().next()
        });
        Ok(of_each.collect())
    }

    async fn refusal(&self, facts: &Facts, refusal: Refusal) -> Result<NewRefusal, StoreError> {
        let key: Option<KeyArn> = match &facts.key {
            Some(KeyRef::Arn(arn)) => Some(arn.clone()),
            Some(KeyRef::Id(id)) => self.store.resolve_keys(&[*id]).await?.remove(id),
            None => None,
        };
        Ok(NewRefusal {
            id: Uuid::now_v7(),
            principal: self.stranger.to_owned(),
            id_hash: facts.keys[0].0,
            digest: facts.digest,
            refusal,
            request_id: facts.request_id.clone(),
            operation: facts.operation,
            key,
            ingress: self.transport,
            // Whom it says it comes from is proved by nothing any more.
            sender: NewSender { identity: None, is_verified: false, policy: self.policy.to_owned() },
            rule: None,
            // It came long ago, and maybe nobody follows it any more.
            traceparent: None,
        })
    }
}

fn by_broker() -> Refusal {
    Refusal::whole(
        RefusalCode::DeadLetteredByBroker,
        "the broker dead-lettered this message before Keyferry decided on it, or it was put there by hand; \
         its sender can send it again, and under policy = \"allow-all\" so can keyferry dead redrive",
    )
}

fn in_flood() -> Refusal {
    Refusal::whole(
        RefusalCode::RefusedInFlood,
        "more messages were refused at that time than are remembered one by one, and this is likely one of them: the \
         events and audit entries of that minute count them by code; its sender can send it again, and under \
         policy = \"allow-all\" so can keyferry dead redrive",
    )
}

fn known(
    letters: Vec<Letter>,
    facts: Vec<Facts>,
    rows: Vec<Option<RefusalRow>>,
    mut standing: impl FnMut(Option<RefusalRow>) -> Standing,
) -> Vec<Known> {
    let mut rows = rows.into_iter();
    let each = letters.into_iter().zip(facts).map(|(letter, facts)| Known {
        letter,
        operation: facts.operation,
        key: facts.key.map(|key| match key {
            KeyRef::Arn(arn) => arn.to_string(),
            KeyRef::Id(id) => id.to_string(),
        }),
        request_id: facts.request_id,
        standing: standing(rows.next().flatten()),
    });
    each.collect()
}
