//! Mutated guest files through recognising, settling and loading: nothing panics, loops or writes outside RAM.
//!
//! Case `i` depends on `BANTAM_SOAK_SEED + i` alone; `cargo xtask soak` runs them by the million.

#![allow(clippy::unwrap_used, missing_docs)]

use bantam::load::fuzz_one;

struct Random(u64);

impl Random {
    /// SplitMix64: a good stream from any seed, 0 included.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit.max(1) as u64).unwrap()
    }
}

/// Values that break arithmetic.
const EDGES: [u64; 12] = [
    0,
    1,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0xffff_f000,
    0x10_0000,
    0x1f_ffff,
    0x7fff_ffff_ffff_ffff,
    u64::MAX,
];

/// Restores a multiboot header's checksum now and then, or no mutant would pass the first door.
fn reseal(bytes: &mut [u8]) {
    let word = |bytes: &[u8], at: usize| bytes.get(at..at + 4).map(|b| u32::from_le_bytes(b.try_into().unwrap()));
    for at in (0..bytes.len()).step_by(4) {
        let (sum_at, words) = match word(bytes, at) {
            Some(0x1bad_b002) => (at + 8, 2),
            Some(0xe852_50d6) => (at + 12, 3),
            _ => continue,
        };
        let sum = (0..words).filter_map(|i| word(bytes, at + 4 * i)).fold(0u32, u32::wrapping_add);
        if let Some(slot) = bytes.get_mut(sum_at..sum_at + 4) {
            slot.copy_from_slice(&sum.wrapping_neg().to_le_bytes());
        }
    }
}

fn mutant(seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let names = ["elf32", "elf64", "multiboot", "multiboot2", "add"];
    let mut bytes = (guests::find(names[random.below(names.len())]).unwrap().image)().to_vec();
    for _ in 0..=random.below(6) {
        // Headers are at the front: most mutations go there.
        let range = if random.below(4) > 0 { bytes.len().min(160) } else { bytes.len() };
        let at = random.below(range);
        let size = 1 << random.below(4);
        let value = if random.below(2) == 0 { EDGES[random.below(EDGES.len())] } else { random.next() };
        let end = (at + size).min(bytes.len());
        bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
    }
    if random.below(3) == 0 {
        bytes.truncate(random.below(bytes.len() + 1));
    }
    if random.below(4) > 0 {
        reseal(&mut bytes);
    }
    bytes
}

#[test]
fn no_file_breaks_a_loader() {
    let number = |name: &str, default: u64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let (seed, count) = (number("BANTAM_SOAK_SEED", 1), number("BANTAM_SOAK_COUNT", 3000));
    let mut loaded = 0;
    for case in seed..seed.saturating_add(count) {
        let bytes = mutant(case);
        let outcome = std::panic::catch_unwind(|| fuzz_one(&bytes));
        assert!(outcome.is_ok(), "case {case}");
        loaded += u64::from(outcome.unwrap());
    }
    // The mutants must get past the first door, or the test is worth nothing.
    assert!(count < 1000 || loaded > count / 50, "{loaded} of {count}");
    println!("{loaded} of {count} mutants were loaded");
}
