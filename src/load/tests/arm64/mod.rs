//! The guests of arm64: flat binaries and ELF64, their device tree, what is another architecture's.

mod linux;

use super::samples::{CODE, Elf, config, multiboot1, multiboot2, run};
use crate::arch::layout::RAM;
use crate::config::CpuMode;
use crate::load::{Image, identify};

/// The twelve words of system D.
const HELLO: [u32; 12] = [
    0xd281_32c4,
    0xd280_0905,
    0x3900_0085,
    0xd280_0ca5,
    0x3900_0085,
    0xd280_0d85,
    0x3900_0085,
    0x3900_0085,
    0xd280_0de5,
    0x3900_0085,
    0xd280_0145,
    0x3900_0085,
];

fn hello() -> Vec<u8> {
    HELLO.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn elf(machine: u16) -> Elf {
    let mut elf = Elf::new(true);
    (elf.machine, elf.entry) = (machine, 0x10_0004);
    elf
}

fn refused(words: &[&str], bytes: &[u8], status: u8, why: &[&str]) {
    let refused = run(words, bytes).unwrap_err();
    assert_eq!(refused.status, status, "{words:?}: {}", refused.text);
    for why in why {
        assert!(refused.text.contains(why), "{words:?}: {why:?} is not in {}", refused.text);
    }
}

fn magic(started: &super::samples::Started, at: u64) -> Vec<u8> {
    started.read(at, 4)
}

#[test]
fn a_flat_guest_starts_at_the_start_of_ram_with_its_tree_at_the_end() {
    let started = run(&["--reg", "x7=9"], &hello()).unwrap();
    assert_eq!(started.read(RAM, 48), hello());
    let boot = started.boot;
    assert_eq!((boot.pc, boot.x[7], boot.pstate), (RAM, 9, 0x3c5));
    assert!(boot.x[0] > RAM + (4 << 20) - 8192 && boot.x[0].is_multiple_of(16), "{:#x}", boot.x[0]);
    assert_eq!(boot.sp, boot.x[0], "the stack is below the tree");
    assert_eq!(magic(&started, boot.x[0]), [0xd0, 0x0d, 0xfe, 0xed]);
    assert_eq!(started.config.cpu_mode, Some(CpuMode::El1));
}

#[test]
fn system_d_has_one_page_at_0x10000() {
    let words = ["--memory", "4K", "--ram-base", "0x10000", "--debugcon", "mmio:0x996"];
    let started = run(&words, &hello()).unwrap();
    assert_eq!((started.boot.pc, started.read(0x10000, 48)), (0x10000, hello()));
    assert_eq!(magic(&started, started.boot.x[0]), [0xd0, 0x0d, 0xfe, 0xed]);
}

#[test]
fn a_guest_that_leaves_no_room_has_no_tree() {
    let started = run(&["--memory", "4K"], &[0x1f; 4096]).unwrap();
    assert_eq!((started.boot.x[0], started.boot.sp), (0, RAM + 4096));
    assert_eq!(started.read(RAM, 4096), [0x1f; 4096]);
}

#[test]
fn a_tree_lies_where_its_user_says_and_nowhere_else() {
    let started = run(&["--fdt-at", "0x40100000"], &hello()).unwrap();
    assert_eq!((started.boot.x[0], started.boot.sp), (0x4010_0000, RAM + (4 << 20)));
    assert_eq!(magic(&started, 0x4010_0000), [0xd0, 0x0d, 0xfe, 0xed]);
    refused(
        &["--fdt-at", "0x40000000"],
        &hello(),
        125,
        &["the device tree at 0x40000000..=", "the guest at 0x40000000..=0x4000002f"],
    );
    refused(&["--fdt-at", "0x403ffff8"], &hello(), 125, &["outside RAM", "0x40000000..=0x403fffff"]);
    refused(&["--fdt-at", "0x40100004"], &hello(), 2, &["multiple of 8"]);
    refused(&["--fdt-at", "0xfffffffffffffff8"], &hello(), 2, &["2^64"]);
    refused(&["--fdt-at", "0x40100000", "--reg", "x0=1", "--memory", "4M"], &hello(), 2, &["x0"]);
}

#[test]
fn an_elf_is_loaded_at_its_physical_addresses_and_entered_at_el1() {
    let started = run(&["--ram-base", "0"], &elf(183).build()).unwrap();
    assert_eq!((started.boot.pc, started.config.cpu_mode), (0x10_0004, Some(CpuMode::El1)));
    assert_eq!(started.read(0x10_0000, CODE.len()), CODE);
    assert_eq!(started.read(0x10_2000, 8), b"data\0\0\0\0");
    assert_eq!(magic(&started, started.boot.x[0]), [0xd0, 0x0d, 0xfe, 0xed]);
    let mut odd = elf(183);
    odd.entry = 0x10_0002;
    refused(&["--ram-base", "0"], &odd.build(), 125, &["0x100002", "multiple of 4"]);
    refused(&[], &elf(183).build(), 125, &["outside RAM"]);
}

#[test]
fn guests_of_other_architectures_are_refused_by_name() {
    refused(&[], &elf(62).build(), 125, &["this is an x86-64 guest; this host is arm64"]);
    refused(&[], &Elf::new(false).build(), 125, &["32-bit x86", "arm64"]);
    let mut arm32 = Elf::new(false);
    arm32.machine = 40;
    refused(&[], &arm32.build(), 125, &["this is an arm guest; this host is arm64"]);
    let kernel = multiboot1(1 << 16, &[0x10_0000, 0x10_0000, 0, 0, 0x10_0020]);
    refused(&[], &kernel, 125, &["x86 multiboot guest", "arm64"]);
    refused(&[], &multiboot2(&[]), 125, &["x86 multiboot guest", "arm64"]);
    // The marks of a PC's kernel in an arm64 ELF are chance.
    let mut chance = elf(183);
    chance.parts[0].bytes.extend(multiboot1(3, &[]));
    chance.parts[0].memory = chance.parts[0].bytes.len() as u64;
    assert!(run(&["--ram-base", "0"], &chance.build()).is_ok());
}

#[test]
fn words_that_mean_nothing_are_refused_with_status_2() {
    for words in [
        &["--cpu-mode", "real"][..],
        &["--cpu-mode", "long"],
        &["--entry", "0x1000:0"],
        &["--entry", "0x40000002"],
        &["--cmdline", "x"],
        &["--reg", "rax=1"],
    ] {
        refused(words, &hello(), 2, &[]);
    }
    refused(&["--load-at", "0x40000000", "--ram-base", "0"], &elf(183).build(), 2, &["--load-at"]);
}

#[test]
fn inspect_speaks_of_arm64() {
    let guest = identify(Image::from_bytes("x", elf(183).build())).unwrap().to_string();
    for line in ["format: ELF64 file", "architecture: arm64", "mode: el1", "entry: 0x100004"] {
        assert!(guest.contains(line), "{guest}");
    }
    let flat = identify(Image::from_bytes("x", hello())).unwrap().to_string();
    assert!(flat.contains("taken for arm64") && flat.contains("0x40000000"), "{flat}");
    let _ = config(&[]);
}
