//! All three steps for Linux and for PVH kernels.

use crate::arch::layout::ACPI;
use crate::config::Platform;
use crate::load::bzimage::tests::sample;
use crate::load::tests::samples::{Elf, Part, Refused, Started, config, part, run, start};
use crate::load::*;

/// A PVH kernel with its entry in the first segment; `linux` as Linux has it.
fn pvh(linux: bool) -> Vec<u8> {
    let note = |owner: &[u8], kind: u32, desc: &[u8]| {
        let sizes = [owner.len() as u32, desc.len() as u32, kind];
        let mut bytes: Vec<u8> = sizes.iter().flat_map(|word| word.to_le_bytes()).collect();
        for part in [owner, desc] {
            bytes.extend(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    };
    let mut notes = note(b"Xen\0", 18, &0x10_0001u32.to_le_bytes());
    if linux {
        notes.extend(note(b"Linux\0", 0x101, &[0; 4]));
    }
    let mut elf = Elf::new(true);
    elf.parts.push(Part { kind: 4, ..part(0x20_0000, &notes) });
    elf.build()
}

fn refused(words: &[&str], bytes: &[u8], status: u8, why: &str) {
    let Refused { status: got, text } = run(words, bytes).unwrap_err();
    assert!(got == status && text.contains(why), "{got} {text}");
}

fn with_initrd(words: &[&str], kernel: &[u8], sizes: &[usize]) -> Result<Started, Refused> {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(words);
    for (n, size) in sizes.iter().enumerate() {
        let path = folder.path().join(n.to_string());
        std::fs::write(&path, vec![n as u8 + 1; *size]).unwrap();
        config.initrd.push(path);
    }
    start(&config, Image::from_bytes("guest", kernel.to_vec()))
}

#[test]
fn a_bzimage_is_entered_in_64_bit_mode_with_a_zero_page() {
    let started = run(&["--cmdline", "quiet root=/dev/vda"], &sample()).unwrap();
    assert_eq!(started.config.platform, Some(Platform::Acpi));
    let (regs, sregs) = (started.boot.regs, started.boot.sregs);
    assert_eq!((regs.rip, sregs.cs.selector, sregs.ds.selector), (0x10_0200, 0x10, 0x18));
    assert_eq!(started.long(sregs.gdt.base + 0x10) >> 53 & 1, 1, "64-bit code at 0x10");
    assert_eq!((sregs.gdt.limit, started.long(sregs.gdt.base), started.long(sregs.gdt.base + 8)), (0x1f, 0, 0));
    assert_eq!(started.read(0x10_0000, 2), [0xf4; 2]);
    let page = regs.rsi;
    assert_eq!((started.read(page + 0x202, 4), started.long(page + 0x70)), (b"HdrS".to_vec(), ACPI));
    let text = started.text(started.word(page + 0x228));
    assert!(text.starts_with("console=ttyS0 ") && text.ends_with(" quiet root=/dev/vda"), "{text}");
    assert_eq!(started.read(ACPI, 8), b"RSD PTR ");
    // The map: low RAM, the ROM's place, RAM from 1 MiB on.
    assert_eq!((started.read(page + 0x1e8, 1)[0], started.word(page + 0x2d0 + 20 + 16)), (3, 2));
}

#[test]
fn without_a_64_bit_entry_it_is_entered_in_protected_mode() {
    let mut kernel = sample();
    kernel[0x236] = 0;
    let started = run(&[], &kernel).unwrap();
    assert_eq!((started.boot.regs.rip, started.boot.sregs.efer), (0x10_0000, 0));
    assert_eq!(started.read(started.boot.regs.rsi + 0x202, 4), b"HdrS");
}

#[test]
fn where_it_prefers_to_lie_and_cannot_it_lies_higher_and_aligned() {
    let mut kernel = sample();
    kernel[0x258..0x260].copy_from_slice(&0x10_1000u64.to_le_bytes());
    kernel[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes());
    // Preferred and free: there, aligned or not.
    assert_eq!(run(&[], &kernel).unwrap().boot.regs.rip, 0x10_1200);
    // In the hole of a machine's ROMs: elsewhere.
    kernel[0x258..0x260].copy_from_slice(&0xd_0000u64.to_le_bytes());
    assert_eq!(run(&[], &kernel).unwrap().boot.regs.rip, 0x20_0200);
    refused(&["--memory", "2M"], &kernel, 125, "does not fit in RAM");
    kernel[0x234] = 0;
    refused(&[], &kernel, 125, "overlaps the ");
    kernel[0x258..0x260].copy_from_slice(&0x40_0000u64.to_le_bytes());
    refused(&[], &kernel, 125, "outside RAM");
}

#[test]
fn initial_ram_disks_become_one_as_high_as_the_header_allows() {
    let mut kernel = sample();
    let placed = |started: &Started| {
        let page = started.boot.regs.rsi;
        (started.word(page + 0x218), started.word(page + 0x21c))
    };
    let started = with_initrd(&[], &kernel, &[5, 4096]).unwrap();
    assert_eq!(placed(&started), (0x3f_e000, 8 + 4096));
    assert_eq!(started.read(0x3f_e000, 10), [1, 1, 1, 1, 1, 0, 0, 0, 2, 2]);
    kernel[0x22c..0x230].copy_from_slice(&0x2f_ffffu32.to_le_bytes());
    assert_eq!(placed(&with_initrd(&[], &kernel, &[4096]).unwrap()), (0x2f_f000, 4096));
    let Refused { status, text } = with_initrd(&[], &kernel, &[4 << 20]).unwrap_err();
    assert!(status == 125 && text.contains("initial RAM disk") && text.contains("4194304"), "{text}");
    refused(&["--initrd", "/nowhere"], &kernel, 125, "--initrd");
}

#[test]
fn the_command_line_is_completed_unless_the_user_said_it() {
    let text = |words: &[&str]| {
        let started = run(words, &sample()).unwrap();
        started.text(started.word(started.boot.regs.rsi + 0x228))
    };
    assert!(text(&[]).contains("console=ttyS0"));
    assert!(!text(&["--cmdline", "console=tty0 x"]).contains("ttyS0"));
    assert!(text(&[]).contains("cryptomgr.notests"));
    assert!(!text(&["--cmdline", "cryptomgr.notests=0"]).contains("notests "));
    assert_eq!(text(&["--cmdline", "a b", "--cmdline-raw"]), "a b");
    assert_eq!(text(&["--cmdline-raw"]), "");
    refused(&["--cmdline", &"x".repeat(2048)], &sample(), 125, "takes at most 2047");
    assert!(run(&["--cmdline", &"x".repeat(2047), "--cmdline-raw"], &sample()).is_ok());
}

#[test]
fn a_pvh_kernel_is_entered_in_protected_mode_with_its_start_info() {
    let started = with_initrd(&["--cmdline", "hello"], &pvh(false), &[100]).unwrap();
    assert_eq!(started.guest.format.name(), "a PVH kernel");
    let info = started.boot.regs.rbx;
    assert_eq!((started.boot.regs.rip, started.boot.sregs.efer, started.word(info)), (0x10_0001, 0, 0x336e_c578));
    assert_eq!(started.text(started.long(info + 24)), "hello");
    assert_eq!((started.long(info + 32), started.word(info + 48)), (ACPI, 3));
    let module = started.long(info + 16);
    assert_eq!((started.long(module) % 4096, started.long(module + 8)), (0, 100));
    let linux = run(&["--cmdline", "hello"], &pvh(true)).unwrap();
    assert!(linux.text(linux.long(linux.boot.regs.rbx + 24)).starts_with("console=ttyS0"));
}

#[test]
fn words_that_mean_nothing_for_linux_are_refused() {
    for words in [&["--load-at", "0x1000"][..], &["--entry", "0x1000"], &["--cpu-mode", "long"]] {
        refused(words, &sample(), 2, "means nothing for a Linux kernel");
    }
    refused(&["--cmdline-raw"], &[0xf4], 2, "means nothing for a flat binary");
    refused(&["--ram-base", "0x100000"], &sample(), 125, "RAM from address 0");
}

#[test]
fn what_a_kernel_is_shows_in_lines() {
    let text = run(&[], &sample()).unwrap().guest.to_string();
    for line in
        ["format: Linux kernel (bzImage)", "boot protocol: 2.15", "version: 6.99.0-test (a[2J) #1", "at most 2047"]
    {
        assert!(text.contains(line), "{line:?}: {text}");
    }
}

#[test]
fn a_kernel_cut_at_any_page_is_refused() {
    let whole = sample();
    for cut in (0x400..whole.len()).step_by(0x800) {
        refused(&[], &whole[..cut], 125, "cut short");
    }
}
