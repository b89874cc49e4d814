//! What is registered, and how it is described.

use prometheus::core::Collector;
use prometheus::{
    Error, Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
};
use std::cell::RefCell;

/// A metric, whether it has series yet or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Family {
    /// Its name.
    pub name: String,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// The names of its labels, sorted.
    pub labels: Vec<String>,
}

/// A registry that remembers what it was given: without a series a metric is not in what the registry gathers.
pub(super) struct Catalogue {
    registry: Registry,
    families: RefCell<Vec<Family>>,
}

impl Catalogue {
    pub(super) fn new() -> Self {
        Self { registry: Registry::new(), families: RefCell::default() }
    }

    pub(super) fn counter(&self, name: &str, help: &str) -> Result<IntCounter, Error> {
        self.keep("counter", IntCounter::new(name, help)?)
    }

    pub(super) fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, Error> {
        self.keep("counter", IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, Error> {
        self.keep("gauge", IntGauge::new(name, help)?)
    }

    /// A gauge of fractions.
    pub(super) fn real(&self, name: &str, help: &str) -> Result<Gauge, Error> {
        self.keep("gauge", Gauge::new(name, help)?)
    }

    pub(super) fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, Error> {
        self.keep("gauge", IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    /// Gauges of fractions.
    pub(super) fn reals(&self, name: &str, help: &str, labels: &[&str]) -> Result<GaugeVec, Error> {
        self.keep("gauge", GaugeVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn info(&self, name: &str, help: &str, labels: &[(&str, &str)]) -> Result<(), Error> {
        let options =
            labels.iter().fold(Opts::new(name, help), |options, (label, value)| options.const_label(*label, *value));
        self.keep("gauge", IntGauge::with_opts(options)?).map(|info| info.set(1))
    }

    pub(super) fn histograms(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: &[f64],
    ) -> Result<HistogramVec, Error> {
        self.keep("histogram", HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels)?)
    }

    /// What the process is said to be by the kernel; described elsewhere.
    pub(super) fn foreign(&self, collector: impl Collector + 'static) -> Result<(), Error> {
        self.registry.register(Box::new(collector))
    }

    pub(super) fn into_parts(self) -> (Registry, Vec<Family>) {
        (self.registry, self.families.into_inner())
    }

    fn keep<C: Collector + Clone + 'static>(&self, kind: &'static str, collector: C) -> Result<C, Error> {
        self.registry.register(Box::new(collector.clone()))?;
        for described in collector.desc() {
            let constant = described.const_label_pairs.iter().map(|pair| pair.name().to_owned());
            let mut labels: Vec<String> = described.variable_labels.iter().cloned().chain(constant).collect();
            labels.sort_unstable();
            self.families.borrow_mut().push(Family { name: described.fq_name.clone(), kind, labels });
        }
        Ok(collector)
    }
}
