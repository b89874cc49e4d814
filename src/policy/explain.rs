//! A policy in plain words, and what is new in one.

use super::book::{Book, Expiring, Operation, Principal, Rule};
use super::{Identity, Policy, Proof};
use std::collections::BTreeMap;
use std::time::Duration;

/// What a new policy adds to the one before, changes of it, or takes away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// `principal NAME` and `rule "NAME"`, each list sorted by them.
    pub added: Vec<String>,
    /// The same name, other content.
    pub changed: Vec<String>,
    /// No longer there.
    pub removed: Vec<String>,
}

/// Compares two policies.
pub fn changes(before: &Policy, after: &Policy) -> Change {
    let (before, after) = (named_parts(before), named_parts(after));
    let added = after.keys().filter(|name| !before.contains_key(*name)).cloned().collect();
    let removed = before.keys().filter(|name| !after.contains_key(*name)).cloned().collect();
    let is_changed = |(name, part): &(&String, &String)| before.get(*name).is_some_and(|other| other != *part);
    let changed = after.iter().filter(is_changed).map(|(name, _)| name.clone()).collect();
    Change { added, changed, removed }
}

fn named_parts(policy: &Policy) -> BTreeMap<String, String> {
    let Policy::Rules(book) = policy else { return BTreeMap::new() };
    let principals =
        book.principals.iter().map(|(name, principal)| (format!("principal {name}"), format!("{principal:?}")));
    let rules = book.rules.iter().map(|rule| (format!("rule \"{}\"", rule.name), format!("{rule:?}")));
    principals.chain(rules).collect()
}

impl Policy {
    /// Who may what, a line each.
    pub fn explain(&self) -> Vec<String> {
        match self {
            Self::AllowAll => vec![
                "policy = \"allow-all\": whoever can write to the queue may ask for everything, and nobody is asked who \
                 they are"
                    .into(),
            ],
            Self::Rules(book) => {
                let principals = book.principals.iter().map(|(name, principal)| principal_line(name, principal));
                let rules = book.rules.iter().zip(1..).map(|(rule, number)| rule_line(number, rule));
                principals.chain(rules).chain(["whatever no rule allows is refused".to_owned()]).collect()
            }
        }
    }

    /// What an ingress that demands this proof should know: nobody may be able to give it.
    pub fn unproved(&self, ingress: &str, proof: &Proof) -> Option<String> {
        let Self::Rules(book) = self else { return None };
        let (wanted, setting): (fn(&Identity) -> bool, _) = match (proof, ingress) {
            (Proof::Nothing, _) => return None,
            (Proof::Signature { .. }, _) => (|one| matches!(one, Identity::SigningKey(_)), "signing_keys"),
            (Proof::Broker, "sqs") => (|one| matches!(one, Identity::AwsRole(_)), "sqs_roles"),
            (Proof::Broker, _) => (|one| matches!(one, Identity::RabbitMqUser(_)), "rabbitmq_users"),
        };
        let is_nobody = !book.identities.keys().any(wanted);
        is_nobody.then(|| format!("no principal has {setting}: everything that comes over {ingress} is refused"))
    }

    /// The rules in the file's order.
    pub fn rules(&self) -> &[Rule] {
        match self {
            Self::AllowAll => &[],
            Self::Rules(book) => &book.rules,
        }
    }

    /// The principals by their names.
    pub fn principals(&self) -> impl Iterator<Item = (&str, &Principal)> {
        let book: Option<&Book> = match self {
            Self::AllowAll => None,
            Self::Rules(book) => Some(book),
        };
        book.into_iter().flat_map(|book| &book.principals).map(|(name, principal)| (name.as_str(), principal))
    }
}

fn principal_line(name: &str, principal: &Principal) -> String {
    let identities: Vec<String> = principal.identities.iter().map(ToString::to_string).collect();
    let redrive = if principal.redrive { "; it may send refused messages of others again, in their names" } else { "" };
    let most = principal.max_waiting.map_or_else(String::new, |most| format!("; at most {most} of its jobs may wait"));
    format!("{name} is {}{redrive}{most}", identities.join(" or "))
}

fn rule_line(number: usize, rule: &Rule) -> String {
    let principals: Vec<&str> = rule.principals.iter().map(String::as_str).collect();
    let operations: Vec<&str> = rule.operations.iter().map(|operation| operation.as_str()).collect();
    let words = format!(
        "{number}. \"{}\": {} may {} {}",
        rule.name,
        principals.join(" and "),
        operations.join(" and "),
        rule.scope_words(),
    );
    [vec![words], rule.condition_words()].concat().join("; ")
}

impl Rule {
    /// On which keys, and with which material.
    pub fn scope_words(&self) -> String {
        let any = |list: Option<Vec<String>>, what: &str| {
            list.map_or_else(|| format!("any {what}"), |list| format!("{what} {}", list.join(" or ")))
        };
        let texts = |globs: &Vec<super::glob::Glob>| globs.iter().map(ToString::to_string).collect::<Vec<_>>();
        let words = format!(
            "on {}, in {}, {}",
            any(self.keys.as_ref().map(texts), "key"),
            any(self.accounts.as_ref().map(|all| all.iter().cloned().collect()), "account"),
            any(self.regions.as_ref().map(texts), "Region"),
        );
        if !self.operations.iter().any(|operation| operation.takes_source()) {
            return words;
        }
        let sources = self.source_keys.as_ref().map(|all| all.iter().map(ToString::to_string).collect());
        format!(
            "{words}, with {} of {}",
            any(sources, "source key"),
            any(self.tiers.as_ref().map(|all| all.iter().cloned().collect()), "tier"),
        )
    }

    /// The conditions, each as a sentence's part.
    pub fn condition_words(&self) -> Vec<String> {
        let mut found = Vec::new();
        match self.expiring {
            Expiring::Required(Some(longest)) => {
                found.push(format!("material must expire, after {} at most", duration(longest)));
            }
            Expiring::Required(None) => found.push("material must expire".into()),
            Expiring::Optional => {}
        }
        if self.operations.contains(&Operation::Rotate) {
            found.push(format!("rotations at least {} apart", duration(self.shortest_rotation_interval)));
        }
        if self.urgent {
            found.push("deletes may be urgent".into());
        }
        found
    }
}

/// As the file writes it.
pub(super) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    for (unit, size) in [("d", 86_400), ("h", 3_600), ("m", 60)] {
        if seconds >= size && seconds.is_multiple_of(size) {
            return format!("{}{unit}", seconds / size);
        }
    }
    format!("{seconds}s")
}
