//! How often values of which size were seen.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Upper bounds of buckets of durations, in seconds. A last bucket takes everything above.
const SECONDS: [f64; 19] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0,
    10.0, 30.0, 60.0, 120.0,
];
/// The same of counts.
const COUNTS: [f64; 15] = [
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0,
    16384.0,
];

/// A histogram that any thread may add to, in the form that Prometheus has them.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [f64],
    counts: Box<[AtomicU64]>,
    /// The bits of an `f64`.
    sum: AtomicU64,
}

impl Histogram {
    /// Of durations.
    pub fn of_seconds() -> Self {
        Self::new(&SECONDS)
    }

    /// Of how many there were of something.
    pub fn of_counts() -> Self {
        Self::new(&COUNTS)
    }

    fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum: AtomicU64::new(0) }
    }

    /// Adds a duration.
    pub fn observe_duration(&self, duration: Duration) {
        self.observe(duration.as_secs_f64());
    }

    /// Adds a value.
    pub fn observe(&self, value: f64) {
        let bucket = self.bounds.partition_point(|&bound| bound < value);
        self.counts[bucket].fetch_add(1, Relaxed);
        let add = |bits: u64| Some((f64::from_bits(bits) + value).to_bits());
        // Always adds, so always succeeds.
        let _ = self.sum.fetch_update(Relaxed, Relaxed, add);
    }

    /// `(upper bound, how many were at most that)`, the last bound infinite.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        bounds.zip(&self.counts).scan(0, |total, (bound, count)| {
            *total += count.load(Relaxed);
            Some((bound, *total))
        })
    }

    /// All values together.
    pub fn sum(&self) -> f64 {
        f64::from_bits(self.sum.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_in_every_bucket_that_reaches_it() {
        let histogram = Histogram::of_counts();
        for value in [1.0, 3.0, 4.0, 100_000.0] {
            histogram.observe(value);
        }
        let seen: Vec<(f64, u64)> = histogram.cumulative().collect();
        assert_eq!(seen[..4], [(1.0, 1), (2.0, 1), (4.0, 3), (8.0, 3)]);
        assert_eq!(seen[14..], [(16384.0, 3), (f64::INFINITY, 4)]);
        assert_eq!(histogram.sum(), 100_008.0);
    }
}
