//! Rows as a table for people and as JSON for programs.

use std::fmt::Write;

use serde_json::{Value, json};

use super::Row;

const QUANTILES: [(&str, f64); 4] = [("p50_us", 0.5), ("p90_us", 0.9), ("p99_us", 0.99), ("max_us", 1.0)];

/// How many times its floor a row took, by medians. `None` without a floor or without samples.
pub fn ratio(row: &Row, rows: &[Row]) -> Option<f64> {
    let floor = rows.iter().find(|other| Some(other.name) == row.floor)?;
    let (ours, theirs) = (row.samples.quantile_us(0.5), floor.samples.quantile_us(0.5));
    (row.samples.n() > 0 && theirs > 0.0).then_some(ours / theirs)
}

/// One line per row, then what each clock window covers.
pub fn table(rows: &[Row]) -> String {
    let mut text = String::new();
    let header = ("us", "n", "p50", "p90", "p99", "max", "x floor", "floor");
    let (name, n, p50, p90, p99, max, times, floor) = header;
    let _ = writeln!(text, "{name:<24} {n:>6} {p50:>9} {p90:>9} {p99:>9} {max:>9} {times:>8}  {floor}");
    for row in rows {
        let [p50, p90, p99, max] = QUANTILES.map(|(_, part)| row.samples.quantile_us(part));
        let times = ratio(row, rows).map_or_else(String::new, |ratio| format!("{ratio:.2}"));
        let (name, n, floor) = (row.name, row.samples.n(), row.floor.unwrap_or(""));
        let _ = writeln!(text, "{name:<24} {n:>6} {p50:>9.0} {p90:>9.0} {p99:>9.0} {max:>9.0} {times:>8}  {floor}");
    }
    text.push('\n');
    for row in rows {
        let _ = writeln!(text, "{:<24} {}", row.name, row.window);
    }
    text
}

/// The same as JSON.
pub fn json(rows: &[Row]) -> Value {
    let one = |row: &Row| {
        let mut value = json!({
            "name": row.name,
            "window": row.window,
            "n": row.samples.n(),
            "floor": row.floor,
            "ratio": ratio(row, rows),
        });
        for (name, part) in QUANTILES {
            value[name] = json!(row.samples.quantile_us(part));
        }
        value
    };
    rows.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_row_is_compared_with_the_median_of_its_floor() {
        let mut rows = [Row::measured("x", "bare", "all"), Row::floor("bare", "little")];
        assert_eq!(ratio(&rows[0], &rows), None);
        for us in [10, 30, 1000] {
            rows[0].samples.record(Duration::from_micros(us));
            rows[1].samples.record(Duration::from_micros(us / 2));
        }
        assert!((ratio(&rows[0], &rows).unwrap() - 2.0).abs() < 0.01);
        assert_eq!(ratio(&rows[1], &rows), None);
        assert!(table(&rows).lines().next().unwrap().contains("p99"));
        assert_eq!(json(&rows)[1]["n"], 3);
    }
}
