//! Sessions that nobody uses at the moment. They go stale without a word: whatever lies between may have dropped them.

use std::time::{Duration, Instant};

/// How long a session may lie idle and still be used: less than servers and firewalls usually allow.
const LONGEST: Duration = Duration::from_secs(60);

/// The one that was used last comes last.
#[derive(Debug)]
pub(super) struct Idle<T>(Vec<Lying<T>>);

#[derive(Debug)]
struct Lying<T> {
    session: T,
    server: usize,
    since: Instant,
}

impl<T> Default for Idle<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Idle<T> {
    pub(super) fn put(&mut self, session: T, server: usize, now: Instant) {
        self.0.push(Lying { session, server, since: now });
    }

    /// The one that was used last, of a server that will do, and since when it lay idle. What is too old is closed.
    pub(super) fn take(&mut self, now: Instant, will_do: impl Fn(usize) -> bool) -> Option<(T, Instant)> {
        self.0.retain(|lying| now.saturating_duration_since(lying.since) <= LONGEST);
        let at = self.0.iter().rposition(|lying| will_do(lying.server))?;
        let lying = self.0.remove(at);
        Some((lying.session, lying.since))
    }

    /// Closes those of a server that have lain idle as long as one that was found to be stale.
    pub(super) fn forget(&mut self, server: usize, since: Instant) {
        self.0.retain(|lying| lying.server != server || lying.since > since);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_used_is_used_again_and_none_beyond_its_age() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut idle = Idle::default();
        for (session, server, seconds) in [("a", 0, 0), ("b", 1, 10), ("c", 0, 20), ("d", 0, 30)] {
            idle.put(session, server, at(seconds));
        }
        assert_eq!(idle.take(at(60), |_| true), Some(("d", at(30))));
        assert_eq!(idle.take(at(60), |server| server == 1), Some(("b", at(10))));
        // "a" has grown too old meanwhile.
        assert_eq!(idle.take(at(61), |_| true), Some(("c", at(20))));
        assert_eq!(idle.take(at(61), |_| true), None);
    }

    #[test]
    fn what_lay_no_longer_than_a_stale_one_is_kept() {
        let start = Instant::now();
        let later = start + Duration::from_secs(1);
        let mut idle = Idle::default();
        idle.put("old", 0, start);
        idle.put("of another", 1, start);
        idle.put("young", 0, later);
        idle.forget(0, start);
        assert_eq!(idle.take(later, |server| server == 0).map(|(session, _)| session), Some("young"));
        assert_eq!(idle.take(later, |_| true).map(|(session, _)| session), Some("of another"));
        assert_eq!(idle.take(later, |_| true), None);
    }
}
