//! Series of closed sets, made beforehand and found by their place: no look-up, and all are there at zero.

use super::Metrics;
use crate::words::Words;
use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Instant;

/// A series for each word of a closed set.
#[derive(Debug)]
pub struct Closed<W, S> {
    /// By place.
    series: Arc<[S]>,
    words: PhantomData<fn(W)>,
}

impl<W, S> Clone for Closed<W, S> {
    fn clone(&self) -> Self {
        Self { series: Arc::clone(&self.series), words: PhantomData }
    }
}

impl<W: Words, S> Closed<W, S> {
    /// Makes the series of all words.
    pub fn make(series: impl Fn(&'static str) -> S) -> Self {
        Self { series: W::ALL.iter().map(|word| series(word.as_str())).collect(), words: PhantomData }
    }

    /// The series of a word.
    pub fn of(&self, word: W) -> &S {
        // One for each place, by how they are made.
        &self.series[word.place()]
    }
}

impl<W: Words> Closed<W, IntCounter> {
    /// The series of a metric with one label.
    pub fn counters(metric: &IntCounterVec) -> Self {
        Self::make(|word| metric.with_label_values(&[word]))
    }
}

impl<W: Words> Closed<W, IntGauge> {
    /// The series of a metric with one label.
    pub fn gauges(metric: &IntGaugeVec) -> Self {
        Self::make(|word| metric.with_label_values(&[word]))
    }
}

impl<W: Words> Closed<W, Histogram> {
    /// The series of a metric with one label.
    pub fn histograms(metric: &HistogramVec) -> Self {
        Self::make(|word| metric.with_label_values(&[word]))
    }
}

/// Calls of AWS by operation and by what went wrong.
#[derive(Debug)]
pub struct AwsCalls<O, F>(Closed<O, Meter<F>>);

#[derive(Debug)]
struct Meter<F> {
    ok: IntCounter,
    failed: Closed<F, IntCounter>,
    seconds: Histogram,
}

impl<O, F> Clone for AwsCalls<O, F> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<O: Words, F: Words> AwsCalls<O, F> {
    /// Their series.
    pub fn of(metrics: &Metrics) -> Self {
        Self(Closed::make(|operation| Meter {
            ok: metrics.aws_calls.with_label_values(&[operation, "ok"]),
            failed: Closed::make(|fault| metrics.aws_calls.with_label_values(&[operation, fault])),
            seconds: metrics.aws_call_seconds.with_label_values(&[operation]),
        }))
    }

    /// A call that was sent at this time was answered, or never will be.
    pub fn took(&self, operation: O, since: Instant) {
        self.0.of(operation).seconds.observe(since.elapsed().as_secs_f64());
    }

    /// What became of a call.
    pub fn ended(&self, operation: O, fault: Option<F>) {
        let meter = self.0.of(operation);
        fault.map_or(&meter.ok, |fault| meter.failed.of(fault)).inc();
    }
}
