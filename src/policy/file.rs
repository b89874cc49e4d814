//! The policy file: TOML, read strictly.
//!
//! ```toml
//! [principals.payroll]
//! rabbitmq_users = ["payroll"]
//! sqs_roles = ["AROAEXAMPLEEXAMPLE12"]
//! max_waiting = 10000
//! [[principals.payroll.signing_keys]]
//! id = "payroll-2026"
//! public_key = """-----BEGIN PUBLIC KEY-----..."""
//!
//! [[rules]]
//! name = "payroll imports"
//! principals = ["payroll"]
//! operations = ["import"]
//! keys = ["arn:aws:kms:eu-*:111122223333:key/*"]
//! source_keys = ["payroll-*"]
//! expiry = "required"
//! longest_validity = "30d"
//! ```

use super::book::{Book, Expiring, Operation, Principal, Rule, SourcePattern};
use super::glob::Glob;
use super::identity::{Identity, is_key_id, is_role, is_user};
use super::judge::is_reserved;
use super::reach;
use super::signature::PublicKey;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::time::Duration;
use toml::Spanned;

/// `shortest_rotation_interval` where a rule says none.
pub(super) const ROTATION_INTERVAL: Duration = Duration::from_secs(3_600);
/// No duration is longer: a mistake, and one that could not be added to a time.
const LONGEST: Duration = Duration::from_secs(3_660 * 86_400);
const TIERS: [&str; 2] = ["local", "dsm"];

/// What is wrong with a policy file, where, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {place}{problem}")]
pub struct PolicyError {
    /// Stable, for programs.
    pub code: &'static str,
    /// From one.
    pub line: usize,
    place: String,
    problem: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    #[serde(default)]
    principals: BTreeMap<Spanned<String>, RawPrincipal>,
    #[serde(default)]
    rules: Vec<Spanned<RawRule>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPrincipal {
    #[serde(default)]
    rabbitmq_users: Vec<Spanned<String>>,
    #[serde(default)]
    sqs_roles: Vec<Spanned<String>>,
    #[serde(default)]
    signing_keys: Vec<RawKey>,
    #[serde(default)]
    redrive: bool,
    max_waiting: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawKey {
    id: Spanned<String>,
    public_key: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRule {
    name: Spanned<String>,
    principals: Spanned<Vec<Spanned<String>>>,
    operations: Spanned<Vec<Spanned<String>>>,
    accounts: Option<Spanned<Vec<Spanned<String>>>>,
    regions: Option<Spanned<Vec<Spanned<String>>>>,
    keys: Option<Spanned<Vec<Spanned<String>>>>,
    tiers: Option<Spanned<Vec<Spanned<String>>>>,
    source_keys: Option<Spanned<Vec<Spanned<String>>>>,
    expiry: Option<Spanned<String>>,
    longest_validity: Option<Spanned<String>>,
    shortest_rotation_interval: Option<Spanned<String>>,
    urgent: Option<Spanned<bool>>,
}

/// Reads a file.
pub(super) fn read(text: &str) -> Result<Book, PolicyError> {
    let reader = Reader { text };
    let raw: RawFile = toml::from_str(text).map_err(|error| {
        let span = error.span().unwrap_or(0..0);
        reader.error("policy_unreadable", &span, "", error.message().trim_end().replace('\n', "; "))
    })?;
    if raw.rules.is_empty() {
        let (code, problem) = if raw.principals.is_empty() {
            (
                "policy_empty",
                "the file is empty: write principals and rules, or policy = \"allow-all\" into the settings",
            )
        } else {
            ("no_rules", "there is no rule, so that everything would be refused: write [[rules]]")
        };
        return Err(reader.error(code, &(0..0), "", problem));
    }
    let mut book = Book {
        digest: hex::encode(Sha256::digest(text.as_bytes())),
        principals: BTreeMap::new(),
        rules: Vec::new(),
        identities: HashMap::new(),
        keys: HashMap::new(),
        warnings: Vec::new(),
    };
    for (name, principal) in &raw.principals {
        reader.principal(name, principal, &mut book)?;
    }
    for rule in &raw.rules {
        let read = reader.rule(rule.as_ref(), &book)?;
        reader.reach(rule.as_ref(), read, &mut book)?;
    }
    book.warnings = reach::warnings(&book);
    Ok(book)
}

struct Reader<'a> {
    text: &'a str,
}

impl Reader<'_> {
    fn error(&self, code: &'static str, at: &Range<usize>, place: &str, problem: impl Into<String>) -> PolicyError {
        let before = self.text.get(..at.start).unwrap_or_default();
        let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
        let place = if place.is_empty() { String::new() } else { format!("{place}: ") };
        PolicyError { code, line, place, problem: problem.into() }
    }

    fn principal(&self, name: &Spanned<String>, raw: &RawPrincipal, book: &mut Book) -> Result<(), PolicyError> {
        let place = format!("principal \"{}\"", name.as_ref());
        let wrong = |at: &Range<usize>, field: &str, expected: &str| {
            self.error("value_wrong", at, &format!("{place}: {field}"), expected)
        };
        if is_reserved(name.as_ref()) {
            let problem = "this name is Keyferry's own, for messages of nobody in particular: take another";
            return Err(self.error("name_reserved", &name.span(), &place, problem));
        }
        if !is_name(name.as_ref()) {
            return Err(wrong(&name.span(), "its name", "expected 1 to 64 of A-Z a-z 0-9 . _ -"));
        }
        let mut identities = Vec::new();
        for user in &raw.rabbitmq_users {
            if !is_user(user.as_ref()) {
                return Err(wrong(&user.span(), "rabbitmq_users", "expected the name of a user, of 1 to 255 bytes"));
            }
            identities.push((Identity::RabbitMqUser(user.as_ref().clone()), user.span()));
        }
        for role in &raw.sqs_roles {
            if !is_role(role.as_ref()) {
                let expected = "expected a role's unique id, AROA..., as aws iam get-role shows it in RoleId";
                return Err(wrong(&role.span(), "sqs_roles", expected));
            }
            identities.push((Identity::AwsRole(role.as_ref().clone()), role.span()));
        }
        let mut keys = BTreeMap::new();
        for key in &raw.signing_keys {
            let (id, pem) = (&key.id, &key.public_key);
            if !is_key_id(id.as_ref()) {
                return Err(wrong(&id.span(), "signing_keys: id", "expected 1 to 64 of A-Z a-z 0-9 . _ -"));
            }
            let public = PublicKey::from_pem(pem.as_ref())
                .map_err(|fault| wrong(&pem.span(), "signing_keys: public_key", &fault.to_string()))?;
            if let Some((other, _)) = book.keys.iter().chain(&keys).find(|(_, known)| **known == public) {
                let problem = format!("its key is that of the id \"{other}\" too: a key has one id");
                return Err(self.error("identity_twice", &pem.span(), &place, problem));
            }
            keys.insert(id.as_ref().clone(), public);
            identities.push((Identity::SigningKey(id.as_ref().clone()), id.span()));
        }
        if identities.is_empty() {
            let problem =
                "it has no identity, so that nobody can be it: write rabbitmq_users, sqs_roles or signing_keys";
            return Err(self.error("principal_unreachable", &name.span(), &place, problem));
        }
        for (identity, at) in &identities {
            if let Some(other) = book.identities.insert(identity.clone(), name.as_ref().clone()) {
                let problem = format!(
                    "{identity} is also of principal \"{other}\": an identity is one principal's, and said once"
                );
                return Err(self.error("identity_twice", at, &place, problem));
            }
        }
        book.keys.extend(keys.iter().map(|(id, key)| (id.clone(), key.clone())));
        let identities: BTreeSet<Identity> = identities.into_iter().map(|(identity, _)| identity).collect();
        let principal = Principal { identities, keys, redrive: raw.redrive, max_waiting: raw.max_waiting };
        book.principals.insert(name.as_ref().clone(), principal);
        Ok(())
    }

    fn rule(&self, raw: &RawRule, book: &Book) -> Result<Rule, PolicyError> {
        let name = raw.name.as_ref();
        if name.is_empty() || name.chars().count() > 100 || name.chars().any(|c| c.is_control() || c == '"') {
            let expected = "expected 1 to 100 printable characters without quotation marks";
            return Err(self.error("value_wrong", &raw.name.span(), "a rule's name", expected));
        }
        if book.rules.iter().any(|other| other.name == *name) {
            let problem = "an earlier rule has this name: give each its own";
            return Err(self.error("rule_name_twice", &raw.name.span(), &format!("rule \"{name}\""), problem));
        }
        let fields = Fields { reader: self, rule: name };
        let principals = fields.each("principals", &raw.principals, |text| {
            if book.principals.contains_key(text) {
                Ok(text.to_owned())
            } else {
                Err(("principal_unknown", format!("there is no [principals.{text}]")))
            }
        })?;
        let operations = fields.each("operations", &raw.operations, |text| {
            let known = Operation::ALL.into_iter().find(|operation| operation.as_str() == text);
            known.ok_or_else(|| wrong("expected import, rotate or delete"))
        })?;
        let accounts = fields.each_of("accounts", raw.accounts.as_ref(), |text| {
            let is_account = text.len() == 12 && text.bytes().all(|b| b.is_ascii_digit());
            if is_account { Ok(text.to_owned()) } else { Err(wrong("expected 12 digits")) }
        })?;
        let glob = |text: &str| Glob::parse(text).map_err(wrong);
        let regions = fields.each_of("regions", raw.regions.as_ref(), glob)?;
        let keys = fields.each_of("keys", raw.keys.as_ref(), |text| {
            if text == "*" || text.starts_with("arn:") {
                glob(text)
            } else {
                Err(wrong("expected a pattern of ARNs, such as arn:aws:kms:*:111122223333:key/*"))
            }
        })?;
        let tiers = fields.each_of("tiers", raw.tiers.as_ref(), |text| {
            if TIERS.contains(&text) { Ok(text.to_owned()) } else { Err(wrong("expected local or dsm")) }
        })?;
        let source_keys = fields.each_of("source_keys", raw.source_keys.as_ref(), |text| match text {
            SourcePattern::GENERATED => Ok(SourcePattern::Generated),
            text => glob(text).map(SourcePattern::Named),
        })?;
        let expiring = fields.expiring(raw)?;
        let interval = raw.shortest_rotation_interval.as_ref();
        let interval = interval.map(|text| fields.duration("shortest_rotation_interval", text)).transpose()?;
        let rule = Rule {
            name: name.clone(),
            principals: principals.into_iter().collect(),
            operations: operations.into_iter().collect(),
            accounts: accounts.map(|all| all.into_iter().collect()),
            regions,
            keys,
            tiers: tiers.map(|all| all.into_iter().collect()),
            source_keys,
            expiring,
            shortest_rotation_interval: interval.unwrap_or(ROTATION_INTERVAL),
            urgent: raw.urgent.as_ref().is_some_and(|urgent| *urgent.as_ref()),
        };
        fields.have_effect(raw, &rule)?;
        Ok(rule)
    }

    /// A rule that nothing ever reaches is a mistake of whoever wrote it, and often a dangerous one.
    fn reach(&self, raw: &RawRule, rule: Rule, book: &mut Book) -> Result<(), PolicyError> {
        let place = format!("rule \"{}\"", rule.name);
        let unreachable = |problem: String| self.error("rule_unreachable", &raw.name.span(), &place, problem);
        if reach::is_void(&rule) {
            return Err(unreachable("no key fits its accounts, regions and keys at once: mend one of them".into()));
        }
        book.rules.push(rule);
        match reach::covering(&book.rules, book.rules.len() - 1) {
            None => Ok(()),
            Some(earlier) => {
                let names: Vec<String> = earlier.into_iter().map(|name| format!("\"{name}\"")).collect();
                let names = names.join(", ");
                Err(unreachable(format!(
                    "everything that it fits is decided by {names} before it: put it before, or take it out"
                )))
            }
        }
    }
}

/// What is wrong with a value: code and rule.
type Wrong = (&'static str, String);

fn wrong(expected: &str) -> Wrong {
    ("value_wrong", expected.to_owned())
}

struct Fields<'a> {
    reader: &'a Reader<'a>,
    rule: &'a str,
}

impl Fields<'_> {
    fn error(&self, code: &'static str, at: &Range<usize>, field: &str, problem: impl Into<String>) -> PolicyError {
        self.reader.error(code, at, &format!("rule \"{}\": {field}", self.rule), problem)
    }

    fn each<T: PartialEq>(
        &self,
        field: &str,
        list: &Spanned<Vec<Spanned<String>>>,
        read: impl Fn(&str) -> Result<T, Wrong>,
    ) -> Result<Vec<T>, PolicyError> {
        if list.as_ref().is_empty() {
            let problem = "the list is empty, so that the rule would fit nothing: write what it is to fit";
            return Err(self.error("rule_unreachable", &list.span(), field, problem));
        }
        let mut found = Vec::new();
        for text in list.as_ref() {
            let value =
                read(text.as_ref()).map_err(|(code, problem)| self.error(code, &text.span(), field, problem))?;
            if found.contains(&value) {
                return Err(self.error("value_wrong", &text.span(), field, "it stands there twice: take one out"));
            }
            found.push(value);
        }
        Ok(found)
    }

    fn each_of<T: PartialEq>(
        &self,
        field: &str,
        list: Option<&Spanned<Vec<Spanned<String>>>>,
        read: impl Fn(&str) -> Result<T, Wrong>,
    ) -> Result<Option<Vec<T>>, PolicyError> {
        list.map(|list| self.each(field, list, read)).transpose()
    }

    fn duration(&self, field: &str, text: &Spanned<String>) -> Result<Duration, PolicyError> {
        duration(text.as_ref()).ok_or_else(|| {
            let expected = "expected a whole number with s, m, h or d, above zero and at most ten years, such as 30d";
            self.error("value_wrong", &text.span(), field, expected)
        })
    }

    fn expiring(&self, raw: &RawRule) -> Result<Expiring, PolicyError> {
        let is_required = match &raw.expiry {
            None => false,
            Some(text) => match text.as_ref().as_str() {
                "required" => true,
                "optional" => false,
                _ => {
                    return Err(self.error("value_wrong", &text.span(), "expiry", "expected required or optional"));
                }
            },
        };
        match &raw.longest_validity {
            Some(text) if !is_required => {
                let problem = "without expiry = \"required\" material that never expires would pass: write that too";
                Err(self.error("condition_without_effect", &text.span(), "longest_validity", problem))
            }
            Some(text) => Ok(Expiring::Required(Some(self.duration("longest_validity", text)?))),
            None if is_required => Ok(Expiring::Required(None)),
            None => Ok(Expiring::Optional),
        }
    }

    /// A condition about operations that the rule is not for would only look as if it held something back.
    fn have_effect(&self, raw: &RawRule, rule: &Rule) -> Result<(), PolicyError> {
        let is_for = |operation| rule.operations.contains(&operation);
        let is_sourced = rule.operations.iter().any(|operation| operation.takes_source());
        let vain = [
            ("tiers", raw.tiers.as_ref().map(Spanned::span), is_sourced, "import or rotate"),
            ("source_keys", raw.source_keys.as_ref().map(Spanned::span), is_sourced, "import or rotate"),
            ("expiry", raw.expiry.as_ref().map(Spanned::span), is_sourced, "import or rotate"),
            ("urgent", raw.urgent.as_ref().map(Spanned::span), is_for(Operation::Delete), "delete"),
            (
                "shortest_rotation_interval",
                raw.shortest_rotation_interval.as_ref().map(Spanned::span),
                is_for(Operation::Rotate),
                "rotate",
            ),
        ];
        for (field, span, has_effect, operation) in vain {
            if let (Some(span), false) = (span, has_effect) {
                let problem = format!("it only concerns {operation}, which is not among the operations: take it out");
                return Err(self.error("condition_without_effect", &span, field, problem));
            }
        }
        Ok(())
    }
}

fn is_name(text: &str) -> bool {
    is_key_id(text)
}

fn duration(text: &str) -> Option<Duration> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match text.get(digits.len()..)? {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return None,
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let duration = Duration::from_secs(digits.parse::<u64>().ok()?.checked_mul(factor)?);
    (!duration.is_zero() && duration <= LONGEST).then_some(duration)
}

#[cfg(test)]
mod tests;
