//! Mutated guest files through recognising, settling and loading: nothing panics, loops or writes outside RAM.
//!
//! Case `i` depends on `BANTAM_SOAK_SEED + i` alone; `cargo xtask soak` runs them by the million.

#![allow(clippy::unwrap_used, missing_docs)]

mod random;

use std::io::Write;
use std::sync::LazyLock;

use bantam::load::fuzz_one;
use random::Random;

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

/// An arm64 kernel as far as its header goes, bare and packed (x86-64 reads as much of it as it takes to refuse it).
fn kernels() -> [Vec<u8>; 4] {
    let mut image = vec![0x1f; 200 << 10];
    image[..0x200].fill(0);
    let mut put = |at: usize, bytes: &[u8]| image[at..][..bytes.len()].copy_from_slice(bytes);
    put(0, b"MZ");
    put(16, &(1u64 << 20).to_le_bytes());
    put(24, &[0xa]);
    put(0x38, b"ARM\x64\x40");
    put(0x40, b"PE\0\0\x64\xaa\x01");
    put(0x68, &(200u32 << 10).to_le_bytes());
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&image).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd = ruzstd::encoding::compress_to_vec(&image[..], ruzstd::encoding::CompressionLevel::Fastest);
    let mut zboot = [b"MZ\0\0zimg\x40\0\0\0".to_vec(), (gzip.len() as u32).to_le_bytes().to_vec()].concat();
    zboot.resize(24, 0);
    zboot.extend(b"gzip");
    zboot.resize(0x40, 0);
    zboot.extend(&gzip);
    [image, gzip, zstd, zboot]
}

fn sample(random: &mut Random) -> Vec<u8> {
    static KERNELS: LazyLock<[Vec<u8>; 4]> = LazyLock::new(kernels);
    let names = ["elf32", "elf64", "multiboot", "multiboot2", "add"];
    let guests: Vec<_> = names.into_iter().filter_map(guests::find).collect();
    let which = random.index(guests.len() + KERNELS.len());
    guests.get(which).map_or_else(|| KERNELS[which - guests.len()].clone(), |guest| (guest.image)().to_vec())
}

fn mutant(seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = sample(&mut random);
    for _ in 0..=random.index(6) {
        // Headers are at the front: most mutations go there.
        let range = if random.index(4) > 0 { bytes.len().min(160) } else { bytes.len() };
        let at = random.index(range);
        let size = 1 << random.index(4);
        let value = if random.index(2) == 0 { EDGES[random.index(EDGES.len())] } else { random.next() };
        let end = (at + size).min(bytes.len());
        bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
    }
    if random.index(3) == 0 {
        bytes.truncate(random.index(bytes.len() + 1));
    }
    if random.index(4) > 0 {
        reseal(&mut bytes);
    }
    bytes
}

#[test]
fn no_file_breaks_a_loader() {
    let (seed, count) = random::sample(3000);
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
