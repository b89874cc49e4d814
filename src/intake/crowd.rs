//! How many jobs wait of those who have limits: of a principal, of a KMS key, of an account and Region.

use super::Read;
use crate::job::{KeyArn, KeyRef, Refusal, RefusalCode, Request};
use crate::policy::Policy;
use crate::store::{Store, StoreError};
use std::collections::{BTreeSet, HashMap};
use uuid::Uuid;

/// How many jobs of one KMS key, and of one account and Region, may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Of a key.
    pub line: u64,
    /// Of an account and Region.
    pub lane: u64,
}

/// So many jobs arrive at most between two looks at the backlog.
const ARRIVING: u64 = 1_000_000;

impl Limits {
    /// Whether with so many jobs waiting in all one of them may be reached. If not, nothing need be asked.
    pub(super) fn may_be_reached(self, waiting: u64) -> bool {
        waiting.saturating_add(ARRIVING) >= self.line.min(self.lane)
    }
}

/// What waited before a batch. By so much as the batch each limit may be overshot, by each worker that does not count what
/// it lets in.
#[derive(Debug, Default)]
pub struct Crowd {
    principals: HashMap<String, i64>,
    /// By ARN.
    lines: HashMap<String, i64>,
    lanes: HashMap<(String, String), i64>,
}

impl Crowd {
    /// Asks the store about those of these who have limits.
    pub async fn look(
        store: &Store,
        policy: &Policy,
        limits: Option<Limits>,
        principals: &BTreeSet<&str>,
        keys: &BTreeSet<&KeyArn>,
    ) -> Result<Self, StoreError> {
        let limited = principals.iter().copied().filter(|principal| policy.max_waiting(principal).is_some());
        let limited: Vec<&str> = limited.collect();
        let principals = if limited.is_empty() { HashMap::new() } else { store.waiting(&limited).await? };
        if limits.is_none() || keys.is_empty() {
            return Ok(Self { principals, ..Self::default() });
        }
        let arns: Vec<String> = keys.iter().map(ToString::to_string).collect();
        let lanes: BTreeSet<(&str, &str)> = keys.iter().map(|key| (key.account(), key.region())).collect();
        let lanes = store.lanes_waiting(&lanes.into_iter().collect::<Vec<_>>()).await?;
        Ok(Self { principals, lines: store.lines_waiting(&arns).await?, lanes })
    }

    /// One more job waits.
    pub fn count(&mut self, principal: &str, key: &KeyArn) {
        *self.principals.entry(principal.to_owned()).or_default() += 1;
        *self.lines.entry(key.to_string()).or_default() += 1;
        *self.lanes.entry((key.account().to_owned(), key.region().to_owned())).or_default() += 1;
    }

    /// Beside these, those wait.
    pub fn add(&mut self, others: &Self) {
        for (principal, count) in &others.principals {
            *self.principals.entry(principal.clone()).or_default() += count;
        }
        for (line, count) in &others.lines {
            *self.lines.entry(line.clone()).or_default() += count;
        }
        for (lane, count) in &others.lanes {
            *self.lanes.entry(lane.clone()).or_default() += count;
        }
    }

    /// Whether one more job may wait.
    pub fn judge(&self, policy: &Policy, limits: Limits, principal: &str, key: &KeyArn) -> Result<(), Refusal> {
        let is_full = |waiting: Option<&i64>, most: u64| {
            waiting.is_some_and(|waiting| u64::try_from(*waiting).is_ok_and(|waiting| waiting >= most))
        };
        let most = policy.max_waiting(principal).map_or(u64::MAX, u64::from);
        let lane = (key.account().to_owned(), key.region().to_owned());
        let (code, message) = if is_full(self.principals.get(principal), most) {
            let message = "as many jobs of this principal wait as the policy allows: try again when some have ended";
            (RefusalCode::BacklogFull, message)
        } else if is_full(self.lines.get(&key.to_string()), limits.line) {
            let message = "as many jobs of this KMS key wait as intake.max_waiting_per_key allows: try again when some \
                           have ended";
            (RefusalCode::LineFull, message)
        } else if is_full(self.lanes.get(&lane), limits.lane) {
            let message = "as many jobs of this account and Region wait as intake.max_waiting_per_lane allows: try again \
                           when some have ended";
            (RefusalCode::LaneFull, message)
        } else {
            return Ok(());
        };
        Err(Refusal::whole(code, message))
    }
}

/// The keys that a batch names, by whichever name.
pub(super) fn keys_of<'a>(read: &'a [Read], known: &'a HashMap<Uuid, KeyArn>) -> BTreeSet<&'a KeyArn> {
    let key = |read: &'a Read| match read {
        Ok(Request { key: KeyRef::Arn(arn), .. }) => Some(arn),
        Ok(Request { key: KeyRef::Id(id), .. }) => known.get(id),
        Err(_) => None,
    };
    read.iter().filter_map(key).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_far_from_every_limit_is_not_asked_about() {
        let limits = Limits { line: 10_000_000, lane: 20_000_000 };
        assert!(!limits.may_be_reached(8_999_999));
        assert!(limits.may_be_reached(9_000_000) && limits.may_be_reached(u64::MAX));
        assert!(Limits { line: 5, lane: 20_000_000 }.may_be_reached(0));
    }

    #[test]
    fn the_fullest_is_named_by_its_own_code() {
        let key = |n: u8| {
            let id = format!("arn:aws:kms:eu-central-1:111122223333:key/031c5703-aaf7-425e-a141-7e0c6f5886a{n}");
            KeyArn::parse(&id).unwrap()
        };
        let limits = Limits { line: 3, lane: 5 };
        let lane = ("111122223333".to_owned(), "eu-central-1".to_owned());
        let crowd = |line: i64, in_lane: i64| Crowd {
            lines: [(key(1).to_string(), line)].into(),
            lanes: [(lane.clone(), in_lane)].into(),
            ..Crowd::default()
        };
        let code = |crowd: Crowd, n| {
            crowd.judge(&Policy::AllowAll, limits, "anonymous", &key(n)).err().map(|refusal| refusal.code)
        };
        assert_eq!(code(crowd(2, 4), 1), None);
        assert_eq!(code(crowd(3, 4), 1), Some(RefusalCode::LineFull));
        assert_eq!(code(crowd(3, 4), 2), None, "another key has its own line");
        assert_eq!(code(crowd(2, 5), 2), Some(RefusalCode::LaneFull));
        assert_eq!(code(Crowd::default(), 1), None);
        // What is let in is counted, beside what was let in before.
        let (mut now, mut before) = (crowd(1, 3), Crowd::default());
        before.count("anonymous", &key(1));
        now.add(&before);
        assert_eq!(code(Crowd { lanes: now.lanes.clone(), lines: now.lines.clone(), ..Crowd::default() }, 1), None);
        now.count("anonymous", &key(1));
        assert_eq!(code(now, 1), Some(RefusalCode::LineFull));
    }
}
