//! When calls may be made under a quota. Pure: times come in and go out as milliseconds of one clock.
//!
//! The generic cell rate algorithm: a schedule is one number, the theoretical arrival time of the next call. Workers do
//! not come to this file for a slot, they ask Postgres, so that all of them follow one schedule; the store's statements do
//! the same arithmetic, and tests hold them to it.

/// Slots are given out when they are no further away. A worker that dies loses no more.
pub const AHEAD_MS: f64 = 250.0;

/// This much of a quota stays free whatever is configured: calls do not keep their distance exactly on their way, and where
/// AWS allows one a second, one that comes a moment early is one too many.
const LEAST_RESERVE: f64 = 0.02;

/// How far apart calls are to be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// From one call to the next.
    pub interval_ms: f64,
    /// By how much a call may come before its theoretical time: what may be made at once after a pause.
    pub tolerance_ms: f64,
}

/// When a call may be made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slot {
    /// Not before this.
    pub at: f64,
    /// The theoretical arrival time of the next call.
    pub after: f64,
}

impl Pace {
    /// Of `rate` calls a second the part that is not kept free; `burst` seconds' worth of them, and one at least, may be
    /// made at once.
    pub fn of(rate: f64, reserve: f64, burst: f64) -> Self {
        let interval_ms = 1_000.0 / (rate * (1.0 - reserve.max(LEAST_RESERVE)));
        Self { interval_ms, tolerance_ms: (burst * 1_000.0 - interval_ms).max(0.0) }
    }

    /// How late a call may be made without a slot of its own for that. AWS lets a second's worth of calls through at once,
    /// as far as is known: what the burst leaves of that. Where it is one call a second, hardly anything.
    pub fn grace_ms(&self) -> f64 {
        (1_000.0 - self.tolerance_ms - self.interval_ms).clamp(10.0, 500.0)
    }

    /// How long before the next slot it can be claimed. Of calls that are near each other some are claimed together.
    fn opening_ms(&self) -> f64 {
        if self.interval_ms > AHEAD_MS { AHEAD_MS } else { AHEAD_MS / 2.0 }
    }
}

/// The schedule of a lane.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The theoretical arrival time of the next call.
    pub tat: f64,
}

impl Schedule {
    /// How many slots are near enough to be given out.
    pub fn free(&self, now: f64, pace: Pace) -> u32 {
        let first = self.tat.max(now) - pace.tolerance_ms;
        let intervals = ((now + AHEAD_MS - first) / pace.interval_ms).floor();
        if intervals < 0.0 { 0 } else { whole(intervals + 1.0) }
    }

    /// Gives out the next slots, as many as are wanted and free.
    pub fn reserve(&mut self, now: f64, wanted: u32, pace: Pace) -> Vec<Slot> {
        let (base, count) = (self.tat.max(now), wanted.min(self.free(now, pace)));
        let slots: Vec<Slot> = (0..count).map(|nth| nth_slot(now, base, nth, pace)).collect();
        self.tat = slots.last().map_or(self.tat, |slot| slot.after);
        slots
    }

    /// Takes back a slot that was not used. Only the last can be: what was given out after it stands.
    pub fn take_back(&mut self, slot: Slot, pace: Pace) -> bool {
        let is_last = (self.tat - slot.after).abs() < 0.001;
        if is_last {
            self.tat = slot.after - pace.interval_ms;
        }
        is_last
    }

    /// From when on the lane is worth a look.
    pub fn opens_at(&self, pace: Pace) -> f64 {
        self.tat - pace.tolerance_ms - pace.opening_ms()
    }
}

/// The slot that comes so many after the first of a reservation, which began at `base`.
fn nth_slot(now: f64, base: f64, nth: u32, pace: Pace) -> Slot {
    let tat = base + f64::from(nth) * pace.interval_ms;
    Slot { at: now.max(tat - pace.tolerance_ms), after: tat + pace.interval_ms }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a cast of floats saturates, and none is less than one"
)]
fn whole(number: f64) -> u32 {
    number as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_a_second_keeps_its_distance_and_fifteen_come_in_a_burst() {
        let slow = Pace::of(1.0, 0.0, 0.5);
        assert!((slow.interval_ms - 1_020.4).abs() < 0.1 && slow.tolerance_ms < 0.001, "{slow:?}");
        assert!((slow.grace_ms() - 10.0).abs() < 0.001 && Pace::of(15.0, 0.0, 0.5).grace_ms() > 400.0);
        let mut schedule = Schedule { tat: f64::NEG_INFINITY };
        assert_eq!(schedule.reserve(5_000.0, 9, slow).iter().map(|slot| slot.at).collect::<Vec<_>>(), [5_000.0]);
        assert_eq!(schedule.reserve(5_001.0, 9, slow), []);
        let opens_at = schedule.opens_at(slow);
        assert!((opens_at - 5_770.4).abs() < 0.1, "{opens_at}");
        assert_eq!(schedule.reserve(opens_at, 9, slow).len(), 1);

        let fast = Pace::of(15.0, 0.1, 0.5);
        let mut schedule = Schedule { tat: 0.0 };
        let at_once = |slots: &[Slot]| slots.iter().filter(|slot| slot.at <= 9_000.0).count();
        let slots = schedule.reserve(9_000.0, 99, fast);
        assert_eq!((at_once(&slots), slots.len()), (6, 10));
    }

    #[test]
    fn what_is_kept_free_is_never_less_than_what_the_way_needs() {
        assert_eq!(Pace::of(1.0, 0.0, 0.5), Pace::of(1.0, 0.01, 0.5));
        assert!((Pace::of(10.0, 0.2, 0.5).interval_ms - 125.0).abs() < 0.001);
    }

    /// What workers do to a lane.
    #[derive(Clone, Debug)]
    enum Act {
        Reserve(u32),
        Wait(f64),
        /// The slot that was given out so many before the last.
        TakeBack(usize),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            (1..40_u32).prop_map(Act::Reserve),
            (0.0..3_000.0_f64).prop_map(Act::Wait),
            (0..3_usize).prop_map(Act::TakeBack),
        ]
    }

    proptest! {
        /// Whatever happens, no window holds more slots than its length allows and a burst.
        #[test]
        fn no_window_holds_more_than_rate_and_burst(
            rate in 0.1..200.0_f64, reserve in 0.0..0.5_f64, burst in 0.0..1.0_f64, acts in prop::collection::vec(act(), 1..60)
        ) {
            let pace = Pace::of(rate, reserve, burst);
            let (mut schedule, mut now, mut given) = (Schedule { tat: 0.0 }, 1_000_000.0, Vec::<Slot>::new());
            for act in acts {
                match act {
                    Act::Wait(ms) => now += ms,
                    Act::Reserve(wanted) => {
                        let slots = schedule.reserve(now, wanted, pace);
                        prop_assert!(slots.iter().all(|slot| slot.at >= now && slot.at <= now + AHEAD_MS + 0.001));
                        // Nothing is lost: a lane that gives fewer than are wanted has none that is near.
                        prop_assert!(u32::try_from(slots.len()).unwrap() == wanted || schedule.free(now, pace) == 0);
                        given.extend(slots);
                    }
                    Act::TakeBack(before_last) => {
                        if let Some(at) = given.len().checked_sub(before_last + 1)
                            && schedule.take_back(given[at], pace)
                        {
                            given.remove(at);
                        }
                    }
                }
            }
            let most_at_once = pace.tolerance_ms / pace.interval_ms + 1.0;
            for (first, from) in given.iter().enumerate() {
                for (count, to) in (1_u32..).zip(&given[first..]) {
                    let allowed = (to.at - from.at) / pace.interval_ms + most_at_once;
                    prop_assert!(f64::from(count) <= allowed + 0.001, "{count} slots, {allowed} allowed");
                }
            }
        }

        /// Whoever looks as soon as the lane opens uses all of the quota, but for what stays free.
        #[test]
        fn nothing_is_lost_where_there_is_always_work(rate in 0.2..120.0_f64, burst in 0.0..1.0_f64) {
            let pace = Pace::of(rate, 0.1, burst);
            let (mut schedule, mut now, begun) = (Schedule { tat: 0.0 }, 10_000.0, 10_000.0);
            let mut given = 0;
            while now < begun + 60_000.0 {
                let slots = schedule.reserve(now, 1_000, pace);
                prop_assert!(!slots.is_empty(), "an open lane has a slot");
                given += slots.len();
                now = schedule.opens_at(pace).max(now);
            }
            prop_assert!(f64::from(u32::try_from(given).unwrap()) >= 60_000.0 / pace.interval_ms);
        }
    }
}
