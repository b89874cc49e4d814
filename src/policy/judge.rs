//! The verdict on a request.
//!
//! Nothing is allowed that no rule allows. The first rule whose scope (principal, operation, account, Region, key, tier,
//! source key) fits decides, and its conditions (expiry, longest validity, urgent) decide alone: a request that breaks
//! them does not fall through to a later rule.

use super::book::{Book, Expiring, Operation, Rule, SourcePattern};
use super::{ANONYMOUS, Policy, UNIDENTIFIED};
use crate::job::{Expiry, Import, KeyArn, Request, SourceKeyRef, Work};
use std::time::Duration;
use time::OffsetDateTime;

/// What is asked, by whom.
#[derive(Clone, Debug)]
pub struct Ask<'a> {
    /// Who asks.
    pub principal: &'a str,
    /// For what.
    pub operation: Operation,
    /// On which key.
    pub key: &'a KeyArn,
    /// With which source key.
    pub source: Source<'a>,
    /// Until when; `None`: for ever, or it brings no material.
    pub valid_to: Option<OffsetDateTime>,
    /// When the job starts at the earliest.
    pub start: OffsetDateTime,
    /// Whether it is to overtake its line.
    pub urgent: bool,
}

/// The source key, as far as it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source<'a> {
    /// It brings no material.
    None,
    /// One is made for the job.
    Generated,
    /// A key of this tier. Which one is known when the store or the server has told; a rule about source keys fits as far
    /// as that is left open.
    Open(&'static str),
    /// A key by its name: of the tier `dsm` `CONNECTION/NAME`.
    Named {
        /// `local` or `dsm`.
        tier: &'static str,
        /// The name.
        name: &'a str,
        /// The identifier, where rules may spell one out.
        id: Option<&'a str>,
    },
}

/// What the policy says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may be done.
    Allowed(Grant),
    /// It may not; with the rule whose condition it breaks, if one fits at all.
    Denied {
        /// The rule that decided.
        rule: Option<String>,
        /// Why, and what to do.
        why: String,
    },
}

/// What a rule allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The rule that decided; `None`: no file, or one of several, told apart when the source key is known.
    pub rule: Option<String>,
    /// For the part that rotates: no rotation of the key within this time after the one before.
    pub shortest_rotation_interval: Duration,
}

/// A rule that does not fit, and why not.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Near {
    /// The rule.
    pub rule: String,
    /// What of its scope does not fit.
    pub because: Vec<String>,
}

impl<'a> Ask<'a> {
    /// A request for a key, by a principal, at a time of the store. `dsm` is the full name of its key, if the request
    /// names one of that tier.
    pub fn of(
        principal: &'a str,
        request: &'a Request,
        key: &'a KeyArn,
        dsm: Option<&'a str>,
        now: OffsetDateTime,
    ) -> Self {
        let valid_to = match request.work.material().map(|asked| asked.expiry) {
            Some(Expiry::At(at)) => Some(at),
            Some(Expiry::Never) | None => None,
        };
        Self {
            principal,
            operation: request.operation().into(),
            key,
            source: Source::asked(&request.work, dsm),
            valid_to,
            start: request.not_before.unwrap_or(now).max(now),
            urgent: request.urgent,
        }
    }

    /// The same, now that it is known which source key that is: its name and its identifier.
    #[must_use]
    pub fn with_known(self, name: &'a str, id: &'a str) -> Self {
        match &self.source {
            // What was made for the job has a name by now.
            Source::Generated | Source::None => self,
            Source::Open("dsm") | Source::Named { tier: "dsm", .. } => {
                self.with_source(Source::Named { tier: "dsm", name, id: Some(id) })
            }
            Source::Open(_) | Source::Named { .. } => self.with_source(Source::Named { tier: "local", name, id: None }),
        }
    }

    /// The same with a source key that is known by now.
    #[must_use]
    pub fn with_source(self, source: Source<'a>) -> Self {
        Self { source, ..self }
    }
}

impl<'a> Source<'a> {
    /// As a request says it. A local key that is named by its id, or by the id of a material, is told by the store only.
    fn asked(asked: &'a Work, dsm: Option<&'a str>) -> Self {
        let Some(material) = asked.material() else { return Self::None };
        let again = matches!(asked, Work::Import(Import { key_material_id: Some(_), .. }));
        match (&material.source_key, dsm) {
            (SourceKeyRef::Local(Some(name)), _) if uuid::Uuid::try_parse(name).is_ok() => Self::Open("local"),
            (SourceKeyRef::Local(Some(name)), _) => Self::Named { tier: "local", name, id: None },
            (SourceKeyRef::Local(None), _) if again => Self::Open("local"),
            (SourceKeyRef::Local(None), _) => Self::Generated,
            (SourceKeyRef::Dsm(_), Some(name)) => Self::Named { tier: "dsm", name, id: Some(name) },
            (SourceKeyRef::Dsm(_), None) => Self::Open("dsm"),
        }
    }

    fn tier(&self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Generated => Some("local"),
            Self::Open(tier) | Self::Named { tier, .. } => Some(tier),
        }
    }
}

impl Policy {
    /// Judges what is asked. At intake, at each attempt, and before each call that changes AWS.
    pub fn judge(&self, ask: &Ask<'_>) -> Verdict {
        match self {
            Self::AllowAll => {
                Verdict::Allowed(Grant { rule: None, shortest_rotation_interval: super::file::ROTATION_INTERVAL })
            }
            Self::Rules(book) => book.judge(ask),
        }
    }

    /// The rules that come nearest, the best first, and what of them does not fit.
    pub fn nearest(&self, ask: &Ask<'_>) -> Vec<Near> {
        let Self::Rules(book) = self else { return Vec::new() };
        let near = book.rules.iter().map(|rule| Near { rule: rule.name.clone(), because: misfits(rule, ask) });
        let mut near: Vec<Near> = near.filter(|near| !near.because.is_empty()).collect();
        near.sort_by_key(|near| near.because.len());
        near.truncate(3);
        near
    }
}

impl Book {
    fn judge(&self, ask: &Ask<'_>) -> Verdict {
        // While the source key is open, rules that fit but for it may each turn out to decide.
        let mut open: Vec<(&Rule, Result<(), String>)> = Vec::new();
        for rule in &self.rules {
            match fits(rule, ask) {
                Fit::No => {}
                Fit::Perhaps => open.push((rule, conditions(rule, ask))),
                Fit::Yes => {
                    open.push((rule, conditions(rule, ask)));
                    break;
                }
            }
        }
        let is_decided = open.len() == 1;
        if let Some((rule, _)) = open.iter().find(|(_, met)| met.is_ok()) {
            return Verdict::Allowed(Grant {
                rule: is_decided.then(|| rule.name.clone()),
                shortest_rotation_interval: rule.shortest_rotation_interval,
            });
        }
        match open.into_iter().next() {
            Some((rule, Err(why))) => Verdict::Denied {
                why: format!("the policy's rule \"{}\": {why}", rule.name),
                rule: Some(rule.name.clone()),
            },
            _ => Verdict::Denied { rule: None, why: "no rule of the policy allows this; ask its keeper".into() },
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fit {
    Yes,
    /// But for the source key, which is not known.
    Perhaps,
    No,
}

fn fits(rule: &Rule, ask: &Ask<'_>) -> Fit {
    let is_for_it = rule.principals.contains(ask.principal)
        && rule.operations.contains(&ask.operation)
        && rule.accounts.as_ref().is_none_or(|accounts| accounts.contains(ask.key.account()))
        && fits_any(rule.regions.as_deref(), ask.key.region())
        && rule.keys.as_deref().is_none_or(|keys| fits_any(Some(keys), &ask.key.to_string()))
        && fits_tier(rule, ask);
    if is_for_it { fits_source(rule, &ask.source) } else { Fit::No }
}

fn fits_any(globs: Option<&[super::glob::Glob]>, text: &str) -> bool {
    globs.is_none_or(|globs| globs.iter().any(|glob| glob.matches(text)))
}

fn fits_tier(rule: &Rule, ask: &Ask<'_>) -> bool {
    match (&rule.tiers, ask.source.tier()) {
        (Some(tiers), Some(tier)) => tiers.contains(tier),
        _ => true,
    }
}

fn fits_source(rule: &Rule, source: &Source<'_>) -> Fit {
    let Some(patterns) = &rule.source_keys else { return Fit::Yes };
    let is_meant = match source {
        Source::None => true,
        Source::Open(_) if patterns.iter().any(SourcePattern::is_everything) => true,
        Source::Open(_) => return Fit::Perhaps,
        Source::Generated => {
            patterns.iter().any(|pattern| *pattern == SourcePattern::Generated || pattern.is_everything())
        }
        Source::Named { name, id, .. } => {
            patterns.iter().any(|pattern| pattern.means(name) || id.is_some_and(|id| pattern.means_exactly(id)))
        }
    };
    if is_meant { Fit::Yes } else { Fit::No }
}

/// Whether what a rule demands is met; else what is demanded.
fn conditions(rule: &Rule, ask: &Ask<'_>) -> Result<(), String> {
    if ask.urgent && !rule.urgent {
        return Err("urgent is not allowed: leave it out".into());
    }
    if !ask.operation.takes_source() {
        return Ok(());
    }
    let Expiring::Required(longest) = rule.expiring else { return Ok(()) };
    let Some(valid_to) = ask.valid_to else {
        return Err("expiry is required: send key_expiration and valid_to".into());
    };
    match longest.and_then(|longest| time::Duration::try_from(longest).ok()) {
        Some(longest) if valid_to - ask.start > longest => Err(format!(
            "longest_validity is {}: send an earlier valid_to",
            super::explain::duration(longest.unsigned_abs())
        )),
        _ => Ok(()),
    }
}

/// What of a rule's scope does not fit.
fn misfits(rule: &Rule, ask: &Ask<'_>) -> Vec<String> {
    let mut found = Vec::new();
    let mut note = |fits: bool, what: &str, has: String| {
        if !fits {
            found.push(format!("{what}: {has}"));
        }
    };
    let list = |globs: Option<&Vec<super::glob::Glob>>| {
        globs.into_iter().flatten().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    };
    let words = |words: Option<&std::collections::BTreeSet<String>>| {
        words.into_iter().flatten().cloned().collect::<Vec<_>>().join(", ")
    };
    note(rule.principals.contains(ask.principal), "principals", words(Some(&rule.principals)));
    let operations: Vec<&str> = rule.operations.iter().map(|operation| operation.as_str()).collect();
    note(rule.operations.contains(&ask.operation), "operations", operations.join(", "));
    let account = ask.key.account();
    note(rule.accounts.as_ref().is_none_or(|all| all.contains(account)), "accounts", words(rule.accounts.as_ref()));
    note(fits_any(rule.regions.as_deref(), ask.key.region()), "regions", list(rule.regions.as_ref()));
    note(fits_any(rule.keys.as_deref(), &ask.key.to_string()), "keys", list(rule.keys.as_ref()));
    note(fits_tier(rule, ask), "tiers", words(rule.tiers.as_ref()));
    let sources: Vec<String> = rule.source_keys.iter().flatten().map(ToString::to_string).collect();
    note(fits_source(rule, &ask.source) != Fit::No, "source_keys", sources.join(", "));
    found
}

/// Whether a name is one that no principal may have.
pub(super) fn is_reserved(name: &str) -> bool {
    name == ANONYMOUS || name == UNIDENTIFIED
}
