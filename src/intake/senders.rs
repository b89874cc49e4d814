//! Who a message comes from: by the broker's word or by a signature, in whose name if it is sent again.

use super::Read;
use crate::ingress::{Delivery, Sender as Word};
use crate::job::{Refusal, RefusalCode, Rejected, id_hash};
use crate::policy::{ANONYMOUS, Identity, LONGEST_LIFE, Policy, Proof, Signature, Signed, UNIDENTIFIED, claimed};
use crate::store::{MessageDigest, RefusalRecord, Sender};
use std::collections::HashMap;
use time::OffsetDateTime;
use uuid::Uuid;

/// With more signatures than this, verifying them is done where it delays nobody else.
const FEW: usize = 8;

/// What a message proves of its sender. Found once, however often the store has to be asked about the rest.
#[derive(Clone, Debug)]
pub(super) enum Told {
    /// Nobody was asked.
    Nobody,
    /// This is who it is. A signature's times are still to be judged.
    Proved(Identity, Option<Signature>),
    /// Nothing, and why; what it says of itself.
    Unproved(Option<String>, Refusal),
}

/// In whose name a message asks.
#[derive(Clone, Debug)]
pub(super) struct Asker {
    pub(super) principal: String,
    pub(super) sender: Sender,
}

impl Asker {
    /// Who sends a message again has not proved to be its first sender: no later redrive may speak in this name.
    fn into_messenger(mut self) -> Self {
        self.sender.is_verified = false;
        self
    }
}

/// Somebody who asks, or the reason why nobody does; the latter is recorded under a name too.
pub(super) type Asks = Result<Asker, Box<(Asker, Refusal)>>;

/// Reads the proof of each message.
pub(super) fn tell(batch: &[Delivery], policy: &Policy, proof: &Proof) -> Vec<Told> {
    let all = || batch.iter().map(|delivery| told(delivery, policy, proof)).collect();
    match proof {
        Proof::Signature { .. } if batch.len() > FEW => tokio::task::block_in_place(all),
        _ => all(),
    }
}

fn told(delivery: &Delivery, policy: &Policy, proof: &Proof) -> Told {
    match proof {
        Proof::Nothing => Told::Nobody,
        Proof::Broker => by_word(delivery.sender.as_ref()),
        Proof::Signature { .. } => by_signature(delivery, policy),
    }
}

fn by_word(word: Option<&Word>) -> Told {
    let (kind, name) = match word {
        None => {
            let message = "nothing says who sent this: over RabbitMQ set the property user-id to the connection's user, \
                           over SQS send with the credentials of a role";
            return Told::Unproved(None, Refusal::whole(RefusalCode::IdentityMissing, message));
        }
        Some(Word::PassedOn(name)) => {
            let message = "a broker passed this message on, so that its user-id proves nothing: its sender has to publish \
                           it to this queue";
            let claim = claimed("rabbitmq", name);
            return Told::Unproved(Some(claim), Refusal::whole(RefusalCode::IdentityMissing, message));
        }
        Some(Word::RabbitMqUser(name)) => ("rabbitmq", name),
        Some(Word::AwsRole(name)) => ("aws", name),
    };
    match Identity::parse(&format!("{kind}:{name}")) {
        Some(identity) => Told::Proved(identity, None),
        // A name that no policy can hold.
        None => Told::Unproved(Some(claimed(kind, name)), unknown()),
    }
}

fn by_signature(delivery: &Delivery, policy: &Policy) -> Told {
    let Some(header) = &delivery.signature else {
        let message = "nothing says who sent this: sign it, in the header keyferry-signature";
        return Told::Unproved(None, Refusal::whole(RefusalCode::IdentityMissing, message));
    };
    let invalid = |claim, message: &str| Told::Unproved(claim, Refusal::whole(RefusalCode::SignatureInvalid, message));
    let Some(signature) = Signature::parse(header) else {
        let message = "the header keyferry-signature is not understood: expected \
                       v1;key=ID;audience=TEXT;expires=YYYY-MM-DDThh:mm:ssZ;sig=BASE64, just so";
        return invalid(None, message);
    };
    let claim = Some(claimed("key", &signature.key));
    let Some(key) = policy.signing_key(&signature.key) else { return Told::Unproved(claim, unknown()) };
    let Delivery { redrive, content_type, body, .. } = delivery;
    let signed = Signed { redrive: redrive.as_deref(), content_type: content_type.as_deref(), body };
    if signature.is_by(key, signed) {
        Told::Proved(Identity::SigningKey(signature.key.clone()), Some(signature))
    } else {
        let message = "the signature is not over this message: sign the exact body, content type and header \
                       keyferry-redrive with the key of that id";
        invalid(claim, message)
    }
}

fn unknown() -> Refusal {
    Refusal::whole(RefusalCode::IdentityUnknown, "the policy has no principal for who sent this; ask its keeper")
}

/// What is known of the message's sender and, where it is one that is sent again, of the refusal that it names.
pub(super) struct Senders<'a> {
    pub(super) policy: &'a Policy,
    pub(super) proof: &'a Proof,
    /// Refusals that messages of the batch name.
    pub(super) refusals: &'a HashMap<Uuid, RefusalRecord>,
    /// The store's time.
    pub(super) now: OffsetDateTime,
}

impl Senders<'_> {
    /// In whose name the message asks. `body` is the keyed hash of its body, wanted only if it was sent again.
    pub(super) fn asker(&self, told: &Told, delivery: &Delivery, read: &Read, body: impl Fn() -> [u8; 32]) -> Asks {
        let by = self.sender(told, delivery);
        match &delivery.redrive {
            None => by,
            Some(refusal) => by
                .map_err(|refused| Box::new((refused.0.into_messenger(), refused.1)))
                .and_then(|by| self.redriven(by, refusal, read, body)),
        }
    }

    /// Who sends the message.
    fn sender(&self, told: &Told, delivery: &Delivery) -> Asks {
        match told {
            Told::Nobody => Ok(self.named(ANONYMOUS, None, false)),
            Told::Unproved(claim, refusal) => {
                Err(Box::new((self.named(UNIDENTIFIED, claim.clone(), false), refusal.clone())))
            }
            Told::Proved(identity, signature) => {
                let asker = self.mapped(identity)?;
                match signature.as_ref().map_or(Ok(()), |signature| self.judge_signature(signature, delivery)) {
                    Ok(()) => Ok(asker),
                    // Under the principal all the same: a copy of what was accepted in time is a duplicate.
                    Err(refusal) => Err(Box::new((asker, refusal))),
                }
            }
        }
    }

    fn named(&self, principal: &str, identity: Option<String>, is_verified: bool) -> Asker {
        let sender = Sender { identity, is_verified, policy: self.policy.digest().to_owned() };
        Asker { principal: principal.to_owned(), sender }
    }

    fn mapped(&self, identity: &Identity) -> Asks {
        let text = Some(identity.to_string());
        match self.policy.principal(identity) {
            Some(principal) => Ok(self.named(principal, text, true)),
            None => Err(Box::new((self.named(UNIDENTIFIED, text, true), unknown()))),
        }
    }

    /// For whom it was signed, and whether in time. It is judged at receipt: what waited here for the store was in time.
    fn judge_signature(&self, signature: &Signature, delivery: &Delivery) -> Result<(), Refusal> {
        let Proof::Signature { audience } = self.proof else { return Ok(()) };
        if signature.audience != *audience {
            let message = "the signature is for another audience: sign for the one of this queue";
            return Err(Refusal::whole(RefusalCode::SignatureAudience, message));
        }
        let received = self.now - delivery.age();
        let message = if signature.expires <= received {
            "the signature has expired: sign the message anew"
        } else if signature.expires - received > LONGEST_LIFE {
            "the signature expires more than 14 days ahead: sign for less"
        } else {
            return Ok(());
        };
        Err(Refusal::whole(RefusalCode::SignatureExpired, message))
    }

    /// A refused message that is sent again asks in its first sender's name, if whoever sends it may do that, and if it is
    /// that message. Nothing else than that, and never in the name of whoever sends it.
    fn redriven(&self, by: Asker, refusal: &str, read: &Read, body: impl Fn() -> [u8; 32]) -> Asks {
        let refuse =
            |by: Asker, code, message: &str| Err(Box::new((by.into_messenger(), Refusal::whole(code, message))));
        if !self.policy.may_redrive(&by.principal) {
            let message = "the header keyferry-redrive is for principals with redrive = true: leave it out, or ask the \
                           policy's keeper";
            return refuse(by, RefusalCode::RedriveNotAllowed, message);
        }
        let record = Uuid::try_parse(refusal).ok().and_then(|id| self.refusals.get(&id));
        let Some(record) = record.filter(|record| is_same(record, read, body)) else {
            let message = "the header keyferry-redrive names no refusal of just this message";
            return refuse(by, RefusalCode::RedriveMismatch, message);
        };
        if RefusalCode::parse(&record.code).is_none_or(|code| !code.can_be_redriven()) {
            let message = "the refused message lacked a valid proof of its sender, who alone can send it again";
            return refuse(by, RefusalCode::RedriveNotAllowed, message);
        }
        if matches!(self.policy, Policy::AllowAll) {
            let sender = Sender {
                identity: record.identity.clone(),
                is_verified: record.identity_verified,
                policy: by.sender.policy,
            };
            return Ok(Asker { sender, ..by });
        }
        let first = record.identity.as_deref().filter(|_| record.identity_verified).and_then(Identity::parse);
        let Some(first) = first else {
            let message = "nothing proved who sent the refused message, so that nobody can send it in their name";
            return refuse(by, RefusalCode::RedriveNotAllowed, message);
        };
        self.mapped(&first)
    }
}

/// By id and content, as a refusal is known: two requests of one content and different ids are two.
fn is_same(record: &RefusalRecord, read: &Read, body: impl Fn() -> [u8; 32]) -> bool {
    let (id, digest) = known_by(read, &body);
    let body = body();
    // It may have become readable since.
    let is_same_id = record.id_hash == id || record.id_hash == body;
    is_same_id && (record.digest == digest_bytes(&digest) || record.digest == body)
}

fn digest_bytes(digest: &MessageDigest) -> [u8; 32] {
    let (MessageDigest::Request(bytes) | MessageDigest::Body(bytes)) = digest;
    *bytes
}

/// The id's hash and the content's digest under which a message is refused.
pub(super) fn known_by(read: &Read, body: impl Fn() -> [u8; 32]) -> ([u8; 32], MessageDigest) {
    match read {
        Ok(request) => (request.id_hash(), MessageDigest::Request(request.digest())),
        Err(rejected) => {
            let body = body();
            let Rejected { id, source, .. } = rejected.as_ref();
            (id.as_ref().map_or(body, |id| id_hash(source, id)), MessageDigest::Body(body))
        }
    }
}

#[cfg(test)]
mod tests;
