//! Clocks that should show the same.

use super::finding::Finding;
use time::{Duration, OffsetDateTime};

/// Nobody minds less: answers take their time, and AWS's date has whole seconds.
const NEAR: Duration = Duration::seconds(5);
/// AWS takes no signature that is further off than five minutes (General Reference, "Signature Version 4"); half of that
/// is a clock on its way there.
const FAR: Duration = Duration::seconds(150);

/// Another clock was read between two looks at this host's.
pub(super) fn compare(
    check: String,
    whose: &str,
    theirs: OffsetDateTime,
    before: OffsetDateTime,
    after: OffsetDateTime,
) -> Finding {
    // What the answer may have taken is in nobody's favour.
    let off = if theirs < before {
        theirs - before
    } else if theirs > after {
        theirs - after
    } else {
        Duration::ZERO
    };
    let ours = if off.is_negative() { "ahead of" } else { "behind" };
    let message = format!("this host's clock is {:.1} s {ours} {whose}", off.abs().as_seconds_f64());
    let advice = "set this host's clock by NTP: timedatectl set-ntp true";
    match off.abs() {
        off if off <= NEAR => Finding::ok(check, format!("this host's clock agrees with {whose}")),
        off if off < FAR => Finding::warning(check, "clock_off", message, advice),
        _ => Finding::failed(check, "clock_off", message, advice),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;
    use time::macros::datetime;

    #[test]
    fn a_clock_may_be_a_little_off_and_not_much() {
        let before = datetime!(2026-01-01 00:00 UTC);
        let after = before + Duration::seconds(2);
        let of = |theirs| {
            let found = compare("clock".into(), "Postgres's", theirs, before, after);
            (found.verdict, found.message)
        };
        assert_eq!(of(before + Duration::seconds(1)).0, Verdict::Ok);
        assert_eq!(of(after + NEAR).0, Verdict::Ok);
        assert_eq!(of(before - NEAR).0, Verdict::Ok);
        let (verdict, message) = of(after + Duration::seconds(6));
        assert_eq!((verdict, message.as_str()), (Verdict::Warning, "this host's clock is 6.0 s behind Postgres's"));
        let (verdict, message) = of(before - Duration::seconds(150));
        assert_eq!((verdict, message.as_str()), (Verdict::Failed, "this host's clock is 150.0 s ahead of Postgres's"));
    }
}
