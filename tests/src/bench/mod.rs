//! What benches share: samples with their percentiles, rows against floors, the machine, table and JSON.

pub mod keeper;
pub mod machine;
pub mod report;

use std::time::Duration;

use hdrhistogram::Histogram;

/// Durations of one kind of operation. Kept to three digits, in nanoseconds.
#[derive(Debug)]
pub struct Samples(Histogram<u64>);

impl Default for Samples {
    fn default() -> Self {
        Self(Histogram::new(3).expect("three digits are a valid precision"))
    }
}

impl Samples {
    /// Adds one.
    pub fn record(&mut self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.0.record(ns).expect("the histogram grows as needed");
    }

    /// Adds all of another.
    pub fn merge(&mut self, other: &Self) {
        self.0.add(&other.0).expect("both grow as needed");
    }

    /// How many there are.
    pub fn n(&self) -> u64 {
        self.0.len()
    }

    /// Microseconds that this part (0 to 1) of the samples stays at or below; at 1 the longest.
    pub fn quantile_us(&self, part: f64) -> f64 {
        let ns = Duration::from_nanos(self.0.value_at_quantile(part));
        ns.as_secs_f64() * 1e6
    }
}

/// One kind of operation, measured.
#[derive(Debug)]
pub struct Row {
    /// Names it in the table and for [`Row::floor`].
    pub name: &'static str,
    /// From what to what the clock runs; of a floor, what it does.
    pub window: &'static str,
    /// The row it is compared with; `None` for floors.
    pub floor: Option<&'static str>,
    /// What was measured.
    pub samples: Samples,
}

impl Row {
    /// A floor, without samples yet.
    pub fn floor(name: &'static str, window: &'static str) -> Self {
        Self { name, window, floor: None, samples: Samples::default() }
    }

    /// Something of the product, to be compared with a floor.
    pub fn measured(name: &'static str, floor: &'static str, window: &'static str) -> Self {
        Self { name, window, floor: Some(floor), samples: Samples::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_microseconds_and_the_last_is_the_longest() {
        let mut samples = Samples::default();
        for us in 1..=100 {
            samples.record(Duration::from_micros(us));
        }
        assert_eq!(samples.n(), 100);
        assert!((samples.quantile_us(0.5) - 50.0).abs() < 0.1);
        assert!((samples.quantile_us(1.0) - 100.0).abs() < 0.2);
    }
}
