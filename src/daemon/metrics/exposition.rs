//! The lists of series of each metric, and how they are written.

use std::fmt;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

/// The value of a series.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    Count(u64),
    Number(f64),
}

impl From<u64> for Value {
    fn from(count: u64) -> Self {
        Value::Count(count)
    }
}

impl From<bool> for Value {
    fn from(is_so: bool) -> Self {
        Value::Count(u64::from(is_so))
    }
}

/// In seconds.
impl From<Duration> for Value {
    fn from(time: Duration) -> Self {
        Value::Number(time.as_secs_f64())
    }
}

/// The labels of a series, in order.
pub type Labels = Vec<(&'static str, String)>;

/// A metric with its series.
#[derive(Clone, Debug)]
pub struct Metric {
    name: &'static str,
    help: &'static str,
    is_counter: bool,
    series: Vec<(Labels, Value)>,
}

/// All metrics, in the order in which they are written.
#[derive(Clone, Debug, Default)]
pub struct Exposition(Vec<Metric>);

impl Exposition {
    /// Adds a metric whose value goes up and down.
    pub fn gauge(
        &mut self,
        name: &'static str,
        help: &'static str,
        series: impl IntoIterator<Item = (Labels, Value)>,
    ) {
        self.add(false, name, help, series);
    }

    /// Adds a metric that only grows. Its `name` is without the ending `_total`.
    pub fn counter(
        &mut self,
        name: &'static str,
        help: &'static str,
        series: impl IntoIterator<Item = (Labels, Value)>,
    ) {
        self.add(true, name, help, series);
    }

    fn add(
        &mut self,
        is_counter: bool,
        name: &'static str,
        help: &'static str,
        series: impl IntoIterator<Item = (Labels, Value)>,
    ) {
        self.0.push(Metric {
            name,
            help,
            is_counter,
            series: series.into_iter().collect(),
        });
    }
}

impl Collector for Exposition {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for metric in &self.0 {
            let kind = match metric.is_counter {
                true => MetricType::Counter,
                false => MetricType::Gauge,
            };
            let mut of_metric = encoder.encode_descriptor(metric.name, metric.help, None, kind)?;
            for (labels, value) in &metric.series {
                write(of_metric.encode_family(labels)?, metric.is_counter, *value)?;
            }
        }
        Ok(())
    }
}

fn write(mut encoder: MetricEncoder<'_>, is_counter: bool, value: Value) -> fmt::Result {
    match (is_counter, value) {
        (true, Value::Count(count)) => encoder.encode_counter::<NoLabelSet, u64, f64>(&count, None),
        (true, Value::Number(number)) => {
            encoder.encode_counter::<NoLabelSet, f64, f64>(&number, None)
        }
        (false, Value::Count(count)) => encoder.encode_gauge(&count),
        (false, Value::Number(number)) => encoder.encode_gauge(&number),
    }
}
