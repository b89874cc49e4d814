//! What each ingress wants to know of its senders.

use super::Transport;
use crate::policy::{Policy, Proof, is_audience};
use serde::{Deserialize, Serialize};

/// Of one ingress. Part of its section.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Senders {
    /// Whether senders must say who they are. Absent: with a policy file they must, with `allow-all` nobody asks.
    pub identity: Option<Identity>,
    /// By what they say it. Absent: by the broker's word.
    pub identity_proof: Option<IdentityProof>,
    /// The text that signers must name: one for each queue of each deployment, such as `prod/keyferry.jobs`.
    pub audience: Option<String>,
}

/// Whether senders must say who they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", rename_all = "lowercase")]
pub enum Identity {
    /// They must.
    Required,
    /// Nobody asks.
    Ignored,
}

/// By what senders say who they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", rename_all = "lowercase")]
pub enum IdentityProof {
    /// The broker's word.
    Broker,
    /// A signature over each message.
    Signature,
}

// The error names the setting: in a part of a section serde does not.
impl TryFrom<String> for Identity {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        match text.as_str() {
            "required" => Ok(Self::Required),
            "ignored" => Ok(Self::Ignored),
            _ => Err("identity: expected required or ignored"),
        }
    }
}

impl TryFrom<String> for IdentityProof {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        match text.as_str() {
            "broker" => Ok(Self::Broker),
            "signature" => Ok(Self::Signature),
            _ => Err("identity_proof: expected broker or signature"),
        }
    }
}

/// Names of the settings, by which a wrong one is told.
pub(super) struct Names {
    pub(super) identity: &'static str,
    pub(super) identity_proof: &'static str,
    pub(super) audience: &'static str,
}

impl Names {
    /// Of the transport's section.
    pub(super) fn of(transport: Transport) -> &'static Self {
        match transport {
            Transport::RabbitMq => &Self {
                identity: "rabbitmq.identity",
                identity_proof: "rabbitmq.identity_proof",
                audience: "rabbitmq.audience",
            },
            Transport::Sqs => {
                &Self { identity: "sqs.identity", identity_proof: "sqs.identity_proof", audience: "sqs.audience" }
            }
        }
    }
}

impl Senders {
    /// What the ingress demands under a policy. A written setting that the policy contradicts is an error with its name and
    /// what was expected: a changed `policy` must not quietly switch identities off.
    pub(super) fn proof(&self, policy: &Policy, names: &Names) -> Result<Proof, (&'static str, &'static str)> {
        let Self { identity, identity_proof, audience } = self;
        match (policy, identity, identity_proof) {
            (Policy::AllowAll, Some(Identity::Required), _) => {
                Err((names.identity, "ignored or nothing beside policy = \"allow-all\", which knows no principals"))
            }
            (Policy::AllowAll, _, Some(_)) => {
                Err((names.identity_proof, "nothing beside policy = \"allow-all\", which asks nobody who they are"))
            }
            (Policy::AllowAll, _, None) => Ok(Proof::Nothing),
            (Policy::Rules(_), Some(Identity::Ignored), _) => {
                Err((names.identity, "required or nothing beside a policy file, which is about principals"))
            }
            (Policy::Rules(_), _, Some(IdentityProof::Signature)) => match audience {
                Some(audience) if is_audience(audience) => Ok(Proof::Signature { audience: audience.clone() }),
                _ => Err((
                    names.audience,
                    "with identity_proof = \"signature\" 1 to 512 printable ASCII characters without a semicolon, one \
                     text for each queue of each deployment, such as prod/keyferry.jobs",
                )),
            },
            (Policy::Rules(_), _, Some(IdentityProof::Broker) | None) if audience.is_some() => {
                Err((names.audience, "nothing unless identity_proof = \"signature\": only signatures name an audience"))
            }
            (Policy::Rules(_), _, Some(IdentityProof::Broker) | None) => Ok(Proof::Broker),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proof(policy: &Policy, identity: &str, proof: &str, audience: &str) -> Result<Proof, &'static str> {
        let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let senders = Senders {
            identity: given(identity).map(|text| text.try_into().unwrap()),
            identity_proof: given(proof).map(|text| text.try_into().unwrap()),
            audience: given(audience),
        };
        senders.proof(policy, Names::of(Transport::RabbitMq)).map_err(|(name, _)| name)
    }

    #[test]
    fn what_is_written_must_fit_the_policy() {
        let text = "[principals.p]\nrabbitmq_users = [\"p\"]\n[[rules]]\nname = \"r\"\nprincipals = [\"p\"]\n\
                    operations = [\"import\"]";
        let (everybody, rules) = (Policy::AllowAll, Policy::parse(text).unwrap());
        assert_eq!(proof(&everybody, "", "", ""), Ok(Proof::Nothing));
        assert_eq!(proof(&everybody, "ignored", "", ""), Ok(Proof::Nothing));
        assert_eq!(proof(&everybody, "required", "", ""), Err("rabbitmq.identity"));
        assert_eq!(proof(&everybody, "", "signature", ""), Err("rabbitmq.identity_proof"));
        assert_eq!(proof(&rules, "", "", ""), Ok(Proof::Broker));
        assert_eq!(proof(&rules, "required", "broker", ""), Ok(Proof::Broker));
        assert_eq!(proof(&rules, "ignored", "", ""), Err("rabbitmq.identity"));
        assert_eq!(proof(&rules, "", "", "prod/jobs"), Err("rabbitmq.audience"));
        assert_eq!(proof(&rules, "", "signature", ""), Err("rabbitmq.audience"));
        assert_eq!(proof(&rules, "", "signature", "a;b"), Err("rabbitmq.audience"));
        let audience = "prod/jobs".to_owned();
        assert_eq!(proof(&rules, "", "signature", "prod/jobs"), Ok(Proof::Signature { audience }));
    }
}
