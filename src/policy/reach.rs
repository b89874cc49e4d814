//! Which rules others stand before. Comparing is careful one way: what is called covered is covered.

use super::book::{Book, Expiring, Operation, Rule, SourcePattern};
use super::glob::Glob;
use std::borrow::Cow;
use std::collections::BTreeSet;

/// Parts of a rule that are compared with the rules before it at most; one with more is taken as reachable.
const MOST_PARTS: usize = 100_000;

/// A small part of a rule's scope. Where a rule names none the widest pattern stands, and for a delete no source at all.
struct Part<'a> {
    principal: &'a str,
    operation: Operation,
    account: Option<&'a str>,
    region: Cow<'a, Glob>,
    key: Cow<'a, Glob>,
    tier: Option<&'a str>,
    source: Option<&'a SourcePattern>,
}

/// The names of the rules before `at` that together leave nothing to it.
pub(super) fn covering(rules: &[Rule], at: usize) -> Option<BTreeSet<&str>> {
    let (before, rule) = (&rules[..at], &rules[at]);
    let mut names = BTreeSet::new();
    for (number, part) in parts(rule).enumerate() {
        if number >= MOST_PARTS {
            return None;
        }
        names.insert(before.iter().find(|earlier| covers(earlier, &part))?.name.as_str());
    }
    Some(names)
}

/// Whether keys, accounts and Regions of a rule leave no key at all.
pub(super) fn is_void(rule: &Rule) -> bool {
    let Some(keys) = &rule.keys else { return false };
    let everything = everything();
    let regions = rule.regions.as_deref().unwrap_or(std::slice::from_ref(&everything));
    let accounts: Vec<Option<&str>> = match &rule.accounts {
        None => vec![None],
        Some(accounts) => accounts.iter().map(|account| Some(account.as_str())).collect(),
    };
    !accounts.iter().any(|account| {
        let arns = regions.iter().map(|region| Glob::arns(*account, region));
        arns.into_iter().any(|arns| keys.iter().any(|key| key.meets(&arns)))
    })
}

/// Warnings about rules that stand in each other's way, and about principals without any.
pub(super) fn warnings(book: &Book) -> Vec<String> {
    let mut found = Vec::new();
    for (at, rule) in book.rules.iter().enumerate() {
        for earlier in book.rules[..at].iter().filter(|earlier| meets(earlier, rule)) {
            if let Some(difference) = difference(earlier, rule) {
                found.push(format!(
                    "the rules \"{}\" and \"{}\" overlap and differ in {difference}: where both fit, \"{}\" decides \
                     alone, since it comes first",
                    earlier.name, rule.name, earlier.name
                ));
            }
        }
    }
    for (name, principal) in &book.principals {
        if !principal.redrive && !book.rules.iter().any(|rule| rule.principals.contains(name)) {
            found.push(format!("no rule is for the principal {name}: all that it asks for is refused"));
        }
    }
    found
}

fn parts(rule: &Rule) -> impl Iterator<Item = Part<'_>> {
    let accounts: Vec<Option<&str>> = match &rule.accounts {
        None => vec![None],
        Some(accounts) => accounts.iter().map(|account| Some(account.as_str())).collect(),
    };
    let (regions, keys) = (globs(rule.regions.as_ref()), globs(rule.keys.as_ref()));
    let tiers: Vec<Option<&str>> = match &rule.tiers {
        None => vec![None],
        Some(tiers) => tiers.iter().map(|tier| Some(tier.as_str())).collect(),
    };
    let sources: Vec<Option<&SourcePattern>> = match &rule.source_keys {
        None => vec![None],
        Some(sources) => sources.iter().map(Some).collect(),
    };
    rule.principals.iter().flat_map(move |principal| {
        let (accounts, regions, keys) = (accounts.clone(), regions.clone(), keys.clone());
        let (tiers, sources) = (tiers.clone(), sources.clone());
        rule.operations.iter().flat_map(move |operation| {
            let is_sourced = operation.takes_source();
            let tiers = if is_sourced { tiers.clone() } else { vec![None] };
            let sources = if is_sourced { sources.clone() } else { vec![None] };
            let mut parts = Vec::new();
            for account in &accounts {
                for region in &regions {
                    for key in &keys {
                        for tier in &tiers {
                            for source in &sources {
                                parts.push(Part {
                                    principal,
                                    operation: *operation,
                                    account: *account,
                                    region: region.clone(),
                                    key: key.clone(),
                                    tier: *tier,
                                    source: *source,
                                });
                                if parts.len() > MOST_PARTS {
                                    return parts;
                                }
                            }
                        }
                    }
                }
            }
            parts
        })
    })
}

fn globs(of: Option<&Vec<Glob>>) -> Vec<Cow<'_, Glob>> {
    of.map_or_else(|| vec![Cow::Owned(everything())], |globs| globs.iter().map(Cow::Borrowed).collect())
}

fn everything() -> Glob {
    Glob::parse("*").unwrap_or_else(|_| Glob::literal(""))
}

fn covers(rule: &Rule, part: &Part<'_>) -> bool {
    let covers_glob = |globs: Option<&Vec<Glob>>, part: &Glob| match globs {
        None => true,
        Some(globs) => globs.iter().any(|glob| glob.covers(part)),
    };
    let is_account_covered = match (&rule.accounts, part.account) {
        (None, _) => true,
        (Some(accounts), Some(account)) => accounts.contains(account),
        (Some(_), None) => false,
    };
    rule.principals.contains(part.principal)
        && rule.operations.contains(&part.operation)
        && is_account_covered
        && covers_glob(rule.regions.as_ref(), &part.region)
        && covers_glob(rule.keys.as_ref(), &part.key)
        && (!part.operation.takes_source() || covers_source(rule, part))
}

fn covers_source(rule: &Rule, part: &Part<'_>) -> bool {
    let is_tier_covered = match (&rule.tiers, part.tier) {
        (None, _) => true,
        (Some(tiers), Some(tier)) => tiers.contains(tier),
        (Some(_), None) => false,
    };
    let is_key_covered = match (&rule.source_keys, part.source) {
        (None, _) => true,
        (Some(mine), Some(part)) => mine.iter().any(|mine| mine.covers(part)),
        (Some(mine), None) => mine.iter().any(SourcePattern::is_everything),
    };
    is_tier_covered && is_key_covered
}

fn meets(one: &Rule, other: &Rule) -> bool {
    let meet_globs = |one: Option<&Vec<Glob>>, other: Option<&Vec<Glob>>| match (one, other) {
        (Some(one), Some(other)) => one.iter().any(|one| other.iter().any(|other| one.meets(other))),
        _ => true,
    };
    let meet_words = |one: Option<&BTreeSet<String>>, other: Option<&BTreeSet<String>>| match (one, other) {
        (Some(one), Some(other)) => !one.is_disjoint(other),
        _ => true,
    };
    let meet_sources = || match (&one.source_keys, &other.source_keys) {
        (Some(one), Some(other)) => one.iter().any(|one| other.iter().any(|other| one.meets(other))),
        _ => true,
    };
    let shared: Vec<&Operation> = one.operations.intersection(&other.operations).collect();
    !one.principals.is_disjoint(&other.principals)
        && meet_words(one.accounts.as_ref(), other.accounts.as_ref())
        && meet_globs(one.regions.as_ref(), other.regions.as_ref())
        && meet_globs(one.keys.as_ref(), other.keys.as_ref())
        && shared.iter().any(|operation| {
            !operation.takes_source() || (meet_words(one.tiers.as_ref(), other.tiers.as_ref()) && meet_sources())
        })
}

/// Which condition differs, of those that concern an operation of both.
fn difference(one: &Rule, other: &Rule) -> Option<&'static str> {
    let both = |operation| one.operations.contains(&operation) && other.operations.contains(&operation);
    let is_sourced = both(Operation::Import) || both(Operation::Rotate);
    if is_sourced && one.expiring != other.expiring {
        return Some(match (one.expiring, other.expiring) {
            (Expiring::Required(_), Expiring::Required(_)) => "longest_validity",
            _ => "expiry",
        });
    }
    if both(Operation::Rotate) && one.shortest_rotation_interval != other.shortest_rotation_interval {
        return Some("shortest_rotation_interval");
    }
    (both(Operation::Delete) && one.urgent != other.urgent).then_some("urgent")
}
