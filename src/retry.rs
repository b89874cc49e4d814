//! Error class and attempt in, delay out. The only user of `backoff`.
//!
//! `backoff` computes the envelope alone: its own jitter is symmetric and not injectable. Delays are
//! drawn from the whole envelope ("full jitter", AWS Architecture Blog, "Exponential Backoff and Jitter").

use backoff::ExponentialBackoff;
use backoff::backoff::Backoff as _;
use std::time::Duration;

words! {
    /// Why something is tried again.
    pub Class {
        /// A connection to broker or database is made again.
        Reconnect = "reconnect",
        /// The other side failed or did not answer.
        Transient = "transient",
        /// AWS asks to slow down.
        Throttled = "throttled",
        /// AWS has not yet caught up with itself (AWS KMS eventual consistency: usually seconds, at most minutes).
        NotYetVisible = "not_yet_visible",
        /// Credentials are missing or expired; a person or a provider must act.
        Credentials = "credentials",
        /// Material or a row of ours needs a second look at once.
        Immediate = "immediate",
        /// The broker would not take an event.
        Unroutable = "unroutable",
    }
}

impl Class {
    /// First and longest delay.
    fn bounds(self) -> (Duration, Duration) {
        let ms = Duration::from_millis;
        match self {
            Self::Reconnect => (ms(100), ms(5_000)),
            Self::Transient => (ms(500), ms(60_000)),
            Self::Throttled | Self::Unroutable => (ms(1_000), ms(60_000)),
            Self::NotYetVisible => (ms(250), ms(15_000)),
            Self::Credentials => (ms(5_000), ms(300_000)),
            Self::Immediate => (ms(0), ms(0)),
        }
    }
}

/// The longest delay before attempt number `attempt + 1`, `attempt` counting from 1.
pub fn envelope(class: Class, attempt: u32) -> Duration {
    let (first, longest) = class.bounds();
    let mut backoff = ExponentialBackoff {
        current_interval: first,
        initial_interval: first,
        randomization_factor: 0.0,
        multiplier: 2.0,
        max_interval: longest,
        // Its own limit is 15 minutes; ours are attempts and deadlines.
        max_elapsed_time: None,
        ..ExponentialBackoff::default()
    };
    // The envelope is flat long before 32 doublings.
    let steps = attempt.clamp(1, 32);
    (0..steps).filter_map(|_| backoff.next_backoff()).last().unwrap_or(longest).min(longest)
}

/// A delay drawn from the envelope; `unit` is from `0.0..1.0`.
pub fn delay(class: Class, attempt: u32, unit: f64) -> Duration {
    envelope(class, attempt).mul_f64(unit.clamp(0.0, 1.0))
}

/// A number from `0.0..1.0` of the operating system's generator.
pub fn random_unit() -> f64 {
    // Without randomness the middle of the envelope is a fair delay.
    getrandom::u32().map_or(0.5, |bits| f64::from(bits) / (f64::from(u32::MAX) + 1.0))
}

/// Counts the attempts of a loop that reconnects.
#[derive(Debug)]
pub struct Attempts {
    class: Class,
    made: u32,
}

impl Attempts {
    /// None made yet.
    pub fn new(class: Class) -> Self {
        Self { class, made: 0 }
    }

    /// The delay after another failed attempt.
    pub fn next_delay(&mut self) -> Duration {
        self.made = self.made.saturating_add(1);
        delay(self.class, self.made, random_unit())
    }

    /// An attempt succeeded.
    pub fn reset(&mut self) {
        self.made = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_envelope_grows_to_its_bound_and_never_shrinks() {
        for &class in Class::ALL {
            let (first, longest) = class.bounds();
            assert_eq!(envelope(class, 1), first);
            assert_eq!(envelope(class, 1_000_000), longest);
            for attempt in 1..40 {
                assert!(envelope(class, attempt) <= envelope(class, attempt + 1));
            }
        }
    }

    proptest! {
        #[test]
        fn delays_lie_in_the_envelope(at in 0..Class::ALL.len(), attempt in any::<u32>(), unit in -1.0..2.0_f64) {
            let class = Class::ALL[at];
            prop_assert!(delay(class, attempt, unit) <= envelope(class, attempt));
        }
    }

    #[test]
    fn random_units_are_units_and_differ() {
        let drawn: Vec<f64> = (0..32).map(|_| random_unit()).collect();
        assert!(drawn.iter().all(|unit| (0.0..1.0).contains(unit)));
        assert!(drawn.windows(2).any(|pair| pair[0].to_bits() != pair[1].to_bits()));
    }
}
