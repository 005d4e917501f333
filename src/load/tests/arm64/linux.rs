//! Linux on arm64: where a kernel, its initial RAM disk and its device tree lie, and what has no room.

use super::super::samples::{Refused, Started, arm_image, config, gzip, patch, run, start, zboot, zstd};
use crate::arch::layout::RAM;
use crate::load::{Image, identify};
use crate::memory::Span;

const MIB: u64 = 1 << 20;

fn refused(words: &[&str], bytes: &[u8], why: &[&str]) {
    let Refused { status, text } = run(words, bytes).unwrap_err();
    assert!(status == 125 && why.iter().all(|why| text.contains(why)), "{status} {text}");
}

fn with_initrd(words: &[&str], kernel: Vec<u8>, size: usize) -> Result<Started, Refused> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, &vec![7; size]).unwrap();
    let mut config = config(words);
    config.initrd.push(file.path().to_owned());
    start(&config, Image::from_bytes("guest", kernel))
}

/// The device tree: its place, and its bytes.
fn tree(started: &Started) -> (Span, Vec<u8>) {
    let at = started.boot.x[0];
    assert_eq!(started.read(at, 4), [0xd0, 0x0d, 0xfe, 0xed]);
    let size = started.read(at + 4, 4).try_into().map(u32::from_be_bytes).unwrap();
    (Span { start: at, size: size.into() }, started.read(at, size as usize))
}

fn holds(tree: &[u8], bytes: &[u8]) -> bool {
    tree.windows(bytes.len()).any(|window| window == bytes)
}

#[test]
fn a_kernel_of_any_packing_is_loaded_whole() {
    let image = arm_image();
    for bytes in [image.clone(), gzip(&image), zstd(&image), zboot("gzip", &gzip(&image)), zboot("zstd", &zstd(&image))]
    {
        let started = run(&[], &bytes).unwrap();
        assert!(started.read(RAM, image.len()) == image);
        assert_eq!(started.read(RAM + MIB, 4096), [0; 4096], "its zeroed data");
        assert_eq!((started.boot.pc, &started.boot.x[1..4], started.boot.pstate), (RAM, &[0; 3][..], 0x3c5));
    }
}

#[test]
fn a_kernel_lies_at_its_offset_after_a_multiple_of_2_mib() {
    let mut image = arm_image();
    patch(&mut image, 8, &0x8_0000u64.to_le_bytes());
    assert_eq!(run(&[], &image).unwrap().boot.pc, RAM + 0x8_0000);
    let words = ["--ram-base", "0x10000", "--memory", "8M"];
    assert_eq!(run(&words, &image).unwrap().boot.pc, 0x28_0000);
    // One that does not say what it needs: 0x80000, and room for its zeroed data.
    patch(&mut image, 8, &[0; 16]);
    let started = run(&["--memory", "32M"], &image).unwrap();
    assert_eq!((started.boot.pc, started.read(RAM + 0x8_0000, 64)), (RAM + 0x8_0000, image[..64].to_vec()));
    refused(&[], &image, &["the kernel would be at 0x40080000..=0x4117ffff", "RAM is at 0x40000000..=0x403fffff"]);
}

#[test]
fn the_kernel_is_told_of_its_words_its_disk_and_seeds() {
    let started = with_initrd(&["--cmdline", "hello"], arm_image(), 100_000).unwrap();
    let (span, bytes) = tree(&started);
    assert!(
        holds(&bytes, b"console=ttyAMA0 cma=0 cryptomgr.notests hello\0") && holds(&bytes, b"linux,initrd-start\0")
    );
    assert!(holds(&bytes, b"kaslr-seed\0") && holds(&bytes, b"rng-seed\0"));
    // As high as it goes, and the tree below it.
    let disk = RAM + 4 * MIB - 102_400;
    assert!(holds(&bytes, &disk.to_be_bytes()) && holds(&bytes, &(disk + 100_000).to_be_bytes()));
    assert_eq!(started.read(disk, 100_000), [7; 100_000]);
    assert!(span.last() < disk && span.start > RAM + 2 * MIB && span.start % 8 == 0);
    let other = with_initrd(&["--cmdline", "hello"], arm_image(), 100_000).unwrap();
    assert!(tree(&other).1 != bytes, "the seeds are never the same");
    assert!(!holds(&tree(&run(&["--cmdline-raw"], &arm_image()).unwrap()).1, b"console="));
}

#[test]
fn a_tree_crosses_no_multiple_of_2_mib_and_lies_in_the_first_512() {
    for memory in ["3M", "4M", "5M", "600M", "5G"] {
        let (span, _) = tree(&run(&["--memory", memory], &arm_image()).unwrap());
        assert!(span.start / (2 * MIB) == span.last() / (2 * MIB) && span.last() < RAM + 512 * MIB, "{memory} {span}");
    }
    let at = |at: &str| run(&["--fdt-at", at], &arm_image());
    assert_eq!(at("0x40300000").unwrap().boot.x[0], 0x4030_0000);
    for (place, status, why) in [
        ("0x40300004", 2, "multiple of 8"),
        ("0x403ffff8", 2, "cross no multiple of 2 MiB"),
        ("0x40100000", 125, "the kernel at 0x40000000..=0x401fffff"),
        ("0x50000000", 125, "outside RAM"),
    ] {
        let refused = at(place).unwrap_err();
        assert!(refused.status == status && refused.text.contains(why), "{} {}", refused.status, refused.text);
    }
}

#[test]
fn a_disk_goes_beyond_4_gib_but_not_beyond_the_window() {
    let place = |words: &[&str]| {
        let bytes = tree(&with_initrd(words, arm_image(), 4096).unwrap()).1;
        // Values begin at multiples of 4; across two of them any number may stand.
        let says = |number: u64| bytes.windows(8).step_by(4).any(|window| window == number.to_be_bytes());
        [4 * MIB, 5 << 30, 32 << 30].into_iter().find(|end| says(RAM + end)).unwrap()
    };
    assert_eq!(place(&[]), 4 * MIB);
    assert_eq!(place(&["--memory", "5G"]), 5 << 30);
    assert_eq!(place(&["--memory", "40G"]), 32 << 30);
}

#[test]
fn what_has_no_room_is_refused_with_its_place() {
    refused(&["--memory", "1M"], &arm_image(), &["the kernel would be at 0x40000000..=0x401fffff", "0x400fffff"]);
    refused(&["--memory", "2M"], &arm_image(), &["the device tree", "the kernel is at 0x40000000..=0x401fffff"]);
    let text = with_initrd(&[], arm_image(), 3 << 20).unwrap_err().text;
    assert!(text.contains("initial RAM disk, 3145728 bytes") && text.contains("0x40000000..=0x401fffff"), "{text}");
    let long = "x".repeat(3000);
    refused(&["--cmdline", &long], &arm_image(), &["takes at most 2047"]);
    let mut huge = arm_image();
    patch(&mut huge, 16, &[0xff; 8]);
    refused(&[], &huge, &["the kernel wants 18446744073709551615 bytes"]);
    patch(&mut huge, 8, &[0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    refused(&[], &huge, &["the kernel wants"]);
}

#[test]
fn a_kernel_that_is_cut_short_is_refused_with_its_end() {
    let image = arm_image();
    for cut in (64..0x1a0).chain((0x1000..image.len()).step_by(4096)) {
        // Before its EFI header ends, it says nothing of its size.
        let result = run(&[], &image[..cut]);
        assert!(cut < 0x160 || result.as_ref().unwrap_err().text.contains("cut short"), "{cut:#x}: {result:?}");
    }
    for packed in [gzip(&image), zstd(&image)] {
        for cut in (20..60).chain((60..packed.len()).step_by(4096)) {
            refused(&[], &packed[..cut], &["cut short"]);
        }
    }
    // Whole as a stream, but too little of a kernel.
    refused(&[], &gzip(&image[..500_000]), &["cut short: the kernel ends at byte 0x100000"]);
}

#[test]
fn a_bomb_ends_where_the_kernel_says_that_it_ends() {
    let mut image = arm_image();
    image.resize(64 << 20, 0);
    for bytes in [gzip(&image), zstd(&image)] {
        refused(&[], &bytes, &["has more than the 2097152 bytes that it says it needs"]);
    }
}

#[test]
fn what_is_packed_and_no_kernel_is_refused() {
    refused(&[], &gzip(b"\x7fELF or so"), &["what is packed in it (gzip) is no Linux kernel for arm64", "unpack it"]);
    let mut big = arm_image();
    patch(&mut big, 24, &[0xb]);
    refused(&[], &gzip(&big), &["big-endian arm64 kernel"]);
}

#[test]
fn inspect_says_what_a_kernel_is() {
    let text = |bytes: Vec<u8>| identify(Image::from_bytes("x", bytes)).unwrap().to_string();
    let all = text(zboot("gzip", &gzip(&arm_image())));
    for line in [
        "format: Linux kernel (arm64 Image)",
        "version: 6.1.0-9-test",
        "packed: gzip, ",
        " bytes at 0x200 of the file, an EFI program",
        "text offset: 0x0,",
        "page size: 4096 bytes",
        "mode: el1",
        "needs: 2097152 bytes of RAM",
    ] {
        assert!(all.contains(line), "{line}: {all}");
    }
    assert!(!text(arm_image()).contains("packed:"));
}
