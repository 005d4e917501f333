//! Times, counted in log-linear buckets: sixteen to each power of two, so that a value is known to 6 %.
//!
//! Not the hdrhistogram crate: its counters are plain numbers, so that a reader on another thread needs a lock, and
//! the writer is a CPU between two exits. Invariant: one thread writes, any thread may read, nobody waits.

use std::sync::atomic::{AtomicU64, Ordering};

/// log2 of the buckets in each power of two.
const FINE: u32 = 4;
/// Times of 2^40 ns, a quarter of an hour, and longer share the last bucket.
const LARGEST: u32 = 40;
const BUCKETS: usize = ((LARGEST - FINE + 1) as usize) << FINE;

/// Adds without a lock, where only one thread ever does.
pub fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
}

/// The counts of one kind of exit.
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum: AtomicU64,
    largest: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; BUCKETS], sum: AtomicU64::new(0), largest: AtomicU64::new(0) }
    }
}

/// Values below 2^FINE have a bucket each; above, the bits behind the first one choose among those of its power.
fn bucket(value: u64) -> usize {
    let power = value.checked_ilog2().unwrap_or(0);
    let shift = power.saturating_sub(FINE);
    let place = u64::from(shift << FINE) + (value >> shift);
    usize::try_from(place).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

/// The largest value that a bucket holds.
fn top(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    match bucket >> FINE {
        0 | 1 => bucket,
        power => {
            let shift = power - 1;
            ((bucket - (shift << FINE) + 1) << shift) - 1
        }
    }
}

impl Histogram {
    /// Counts one value. For one thread only.
    pub fn record(&self, value: u64) {
        if let Some(bucket) = self.buckets.get(bucket(value)) {
            add(bucket, 1);
        }
        add(&self.sum, value);
        if value > self.largest.load(Ordering::Relaxed) {
            self.largest.store(value, Ordering::Relaxed);
        }
    }

    /// What has been counted so far, on top of what `counts` holds already.
    pub fn add_to(&self, counts: &mut Counts) {
        counts.buckets.resize(BUCKETS, 0);
        for (sum, bucket) in counts.buckets.iter_mut().zip(&self.buckets) {
            let more = bucket.load(Ordering::Relaxed);
            *sum += more;
            counts.count += more;
        }
        counts.sum = counts.sum.wrapping_add(self.sum.load(Ordering::Relaxed));
        counts.largest = counts.largest.max(self.largest.load(Ordering::Relaxed));
    }
}

/// What a histogram held when it was read.
#[derive(Debug, Default, Clone)]
pub struct Counts {
    buckets: Vec<u64>,
    /// How many values.
    pub count: u64,
    /// Their sum.
    pub sum: u64,
    /// The largest.
    pub largest: u64,
}

impl Counts {
    /// The value that `percent` of all values are at most; the true one is at most 6 % less.
    pub fn rank(&self, percent: u64) -> u64 {
        let wanted = (u128::from(self.count) * u128::from(percent)).div_ceil(100).max(1);
        let mut seen = 0u128;
        for (i, count) in self.buckets.iter().enumerate() {
            seen += u128::from(*count);
            if seen >= wanted {
                return top(i).min(self.largest);
            }
        }
        self.largest
    }

    /// The two together.
    pub fn merge(&mut self, other: &Self) {
        self.buckets.resize(BUCKETS, 0);
        for (sum, more) in self.buckets.iter_mut().zip(&other.buckets) {
            *sum += more;
        }
        self.count += other.count;
        self.sum = self.sum.wrapping_add(other.sum);
        self.largest = self.largest.max(other.largest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_a_bucket_that_ends_close_above_it() {
        let mut last = 0;
        for value in (0..4000).chain((12..40).flat_map(|p| [(1 << p) - 1, 1 << p, (1 << p) + 1])) {
            let (at, end) = (bucket(value), top(bucket(value)));
            assert!(end >= value && end - value <= value / 16, "{value}: {at} {end}");
            assert!(at >= last, "{value}");
            last = at;
        }
        assert_eq!((bucket(u64::MAX), bucket(1 << 41)), (BUCKETS - 1, BUCKETS - 1));
        assert!((0..BUCKETS).all(|b| bucket(top(b)) == b));
    }

    #[test]
    fn ranks_are_known_to_six_percent_and_the_largest_exactly() {
        let histogram = Histogram::default();
        (1..=10_000).for_each(|value| histogram.record(value));
        let mut counts = Counts::default();
        histogram.add_to(&mut counts);
        assert_eq!((counts.count, counts.sum, counts.largest, counts.rank(100)), (10_000, 50_005_000, 10_000, 10_000));
        for (percent, value) in [(50, 5000), (90, 9000), (99, 9900)] {
            assert!(
                (value..=value + value / 16).contains(&counts.rank(percent)),
                "{percent}: {}",
                counts.rank(percent)
            );
        }
        let mut twice = counts.clone();
        twice.merge(&counts);
        assert_eq!((twice.count, twice.rank(50)), (20_000, counts.rank(50)));
        assert_eq!(Counts::default().rank(99), 0);
    }
}
