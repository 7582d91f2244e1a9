//! All ended operations, as histograms: per sandbox, operation and phase, and over all sandboxes of the engine.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Operation, Phase, Span};

/// Whose times.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// Every sandbox this engine has had, removed ones too.
    All,
    /// One sandbox.
    Sandbox(String),
}

type Key = (Subject, Operation, Option<Phase>);

/// Histograms in nanoseconds at two significant digits (1 % of the value): about 6 KB each, so that a thousand
/// sandboxes cost what one program does.
const SIGNIFICANT_DIGITS: u8 = 2;

/// The engine's record of latencies. Any thread may write; an entry costs well under a microsecond a phase.
#[derive(Debug, Default)]
pub struct Book(Mutex<BTreeMap<Key, Histogram<u32>>>);

/// One line of `stats`: a whole operation, or one phase of it. Times are in microseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Row {
    /// `create`, `exec`, `rm`.
    pub operation: String,
    /// The phase; absent for the whole operation.
    pub phase: Option<String>,
    /// How many were recorded.
    pub n: u64,
    /// Mean.
    pub mean_us: f64,
    /// Median.
    pub p50_us: f64,
    /// 90th percentile.
    pub p90_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p999_us: f64,
    /// Longest.
    pub max_us: f64,
}

impl Book {
    /// Takes an ended span in, for its sandbox and for all.
    pub fn record(&self, sandbox: &str, span: &Span) {
        let mut histograms = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for subject in [Subject::All, Subject::Sandbox(sandbox.to_owned())] {
            let mut put = |phase, took: Duration| {
                let Ok(histogram) = new_histogram() else { return };
                let key = (subject.clone(), span.operation(), phase);
                let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
                // Grows as needed (`saturating_record` would not); a u64 of nanoseconds always fits.
                let _ = histograms.entry(key).or_insert(histogram).record(ns);
            };
            put(None, span.total());
            for (phase, took) in span.phases() {
                put(Some(*phase), *took);
            }
        }
    }

    /// Drops a sandbox's own histograms; those of all sandboxes keep what it gave.
    pub fn forget(&self, sandbox: &str) {
        let mut histograms = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        histograms.retain(|(subject, ..), _| *subject != Subject::Sandbox(sandbox.to_owned()));
    }

    /// The rows of a subject: by operation, the whole first, then its phases in their order.
    pub fn rows(&self, subject: &Subject) -> Vec<Row> {
        let histograms = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_subject = histograms.iter().filter(|((whose, ..), _)| whose == subject);
        of_subject.map(|((_, operation, phase), histogram)| row(*operation, *phase, histogram)).collect()
    }
}

/// Grows as needed; fails only for impossible precisions.
fn new_histogram() -> Result<Histogram<u32>, hdrhistogram::CreationError> {
    let mut histogram = Histogram::new(SIGNIFICANT_DIGITS)?;
    histogram.auto(true);
    Ok(histogram)
}

fn row(operation: Operation, phase: Option<Phase>, histogram: &Histogram<u32>) -> Row {
    // From nanoseconds; the histogram's own precision is far below that of f64.
    let us = |ns: u64| Duration::from_nanos(ns).as_secs_f64() * 1e6;
    let at = |quantile| us(histogram.value_at_quantile(quantile));
    Row {
        operation: operation.name().to_owned(),
        phase: phase.map(|phase| phase.name().to_owned()),
        n: histogram.len(),
        mean_us: histogram.mean() / 1e3,
        p50_us: at(0.5),
        p90_us: at(0.9),
        p99_us: at(0.99),
        p999_us: at(0.999),
        max_us: us(histogram.max()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(operation: Operation) -> Span {
        let mut span = Span::begin(operation);
        span.end_of(Phase::Queue);
        span.end_of(Phase::Start);
        span
    }

    #[test]
    fn operations_and_phases_are_counted_per_sandbox_and_over_all() {
        let book = Book::default();
        book.record("a", &span(Operation::Exec));
        book.record("a", &span(Operation::Exec));
        book.record("b", &span(Operation::Exec));
        let shape = |subject: &Subject| {
            let rows = book.rows(subject).into_iter();
            rows.map(|row| (row.operation, row.phase, row.n)).collect::<Vec<_>>()
        };
        let exec = |phase: Option<&str>, n| ("exec".to_owned(), phase.map(str::to_owned), n);
        assert_eq!(shape(&Subject::All), [exec(None, 3), exec(Some("queue"), 3), exec(Some("start"), 3)]);
        assert_eq!(shape(&Subject::Sandbox("a".to_owned()))[0], exec(None, 2));
        book.forget("a");
        assert_eq!(shape(&Subject::Sandbox("a".to_owned())), []);
        assert_eq!(shape(&Subject::All)[0], exec(None, 3));
    }

    #[test]
    fn percentiles_are_within_two_digits_of_the_values_recorded() {
        let mut histogram = new_histogram().unwrap();
        for us in 1..=1000_u64 {
            histogram.record(us * 1000).unwrap();
        }
        let row = row(Operation::Create, None, &histogram);
        for (seen, exact) in [(row.p50_us, 500.0), (row.p90_us, 900.0), (row.p99_us, 990.0), (row.max_us, 1000.0)] {
            assert!((seen - exact).abs() / exact < 0.011, "{seen} is not {exact}");
        }
        assert_eq!(row.n, 1000);
    }
}
