//! A stream of numbers from a seed: what the cases of the fuzzers are made of.
#![allow(dead_code)]

/// The number of the first case, and how many there are: what a soak or a test host says, or so many from 1 on.
pub fn sample(count: u64) -> (u64, u64) {
    let number = |name: &str| std::env::var(name).ok()?.parse().ok();
    (number("BANTAM_SOAK_SEED").unwrap_or(1), number("BANTAM_SOAK_COUNT").unwrap_or(count))
}

/// SplitMix64: a good stream from any seed, 0 included.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    pub fn index(&mut self, limit: usize) -> usize {
        usize::try_from(self.below(limit as u64)).unwrap()
    }

    pub fn one(&mut self, of: &[u64]) -> u64 {
        of[self.index(of.len())]
    }

    /// Once in so many.
    pub fn rarely(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }
}
