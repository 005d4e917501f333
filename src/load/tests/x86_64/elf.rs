//! All three steps for ELF programs, and what holds for every format.

use crate::load::tests::samples::{
    CODE, Elf, Part, Refused, config, multiboot1, multiboot2, part, patch, run, start, tag,
};
use crate::load::*;

fn refused(words: &[&str], bytes: &[u8], status: u8, why: &[&str]) {
    let Refused { status: got, text } = run(words, bytes).unwrap_err();
    assert_eq!(got, status, "{text}");
    for why in why {
        assert!(text.contains(why), "{why:?} is not in {text}");
    }
}

/// One of each format that can be cut short, and where its last loaded byte ends.
fn each() -> Vec<(&'static str, Vec<u8>)> {
    let two = [multiboot2(&[tag(1, 0, &[4, 6])]), CODE.to_vec()].concat();
    let raw = [0x10_0000, 0x10_0000, 0x10_0040, 0x10_1000];
    let raw_two = multiboot2(&[tag(2, 0, &raw), tag(3, 0, &[0x10_0008])]);
    let pad = |mut bytes: Vec<u8>| {
        bytes.resize(64, 0x90);
        bytes
    };
    vec![
        ("ELF32", Elf::new(false).build()),
        ("ELF64", Elf::new(true).build()),
        ("multiboot 1", Elf::with(false, &[multiboot1(3, &[]), CODE.to_vec()].concat()).build()),
        ("multiboot 2", Elf::with(true, &two).build()),
        ("multiboot 1, addresses", pad(multiboot1(1 << 16, &[&raw[..], &[0x10_0020]].concat()))),
        ("multiboot 2, addresses", pad(raw_two)),
    ]
}

#[test]
fn an_elf_is_loaded_at_its_physical_addresses_and_entered_in_the_mode_of_its_class() {
    for (wide, mode) in [(false, CpuMode::Protected), (true, CpuMode::Long)] {
        let started = run(&["--reg", "rdi=7"], &Elf::new(wide).build()).unwrap();
        assert_eq!(started.config.cpu_mode, Some(mode));
        assert_eq!(started.config.irqchip, Some(IrqChip::Kernel));
        assert_eq!(started.read(0x10_0000, CODE.len()), CODE);
        assert_eq!(started.read(0x10_2000, 8), b"data\0\0\0\0");
        let regs = started.boot.regs;
        assert_eq!((regs.rip, regs.rsp, regs.rdi, regs.rflags), (0x10_0001, 4 << 20, 7, 2));
        assert_eq!(started.boot.sregs.cs.l, u8::from(wide));
    }
    let mut x32 = Elf::new(false);
    x32.machine = 62;
    assert!(run(&[], &x32.build()).is_ok());
}

#[test]
fn an_entry_at_a_virtual_address_means_the_same_byte_of_the_physical_one() {
    let mut elf = Elf::new(true);
    elf.parts[0].vaddr = 0xffff_ffff_8010_0000;
    elf.entry = 0xffff_ffff_8010_0002;
    assert_eq!(run(&[], &elf.build()).unwrap().boot.regs.rip, 0x10_0002);
    elf.entry = 0x10_0003;
    assert_eq!(run(&[], &elf.build()).unwrap().boot.regs.rip, 0x10_0003);
    for entry in [0, 0x10_0000 + CODE.len() as u64, 0xffff_ffff_8010_0000 + CODE.len() as u64] {
        elf.entry = entry;
        refused(&[], &elf.build(), 125, &["entry", "none of its segments"]);
    }
}

#[test]
fn a_file_cut_short_anywhere_is_refused() {
    for (name, bytes) in each() {
        run(&[], &bytes).unwrap_or_else(|e| panic!("{name}: {}", e.text));
        let last = bytes.len();
        let from = if bytes.starts_with(b"\x7fELF") { 4 } else { 48 };
        for cut in from..last {
            let refused = run(&[], &bytes[..cut]).expect_err(name);
            assert_eq!(refused.status, 125, "{name} cut to {cut}: {}", refused.text);
            // Before a machine is built.
            assert!(identify(Image::from_bytes("cut", bytes[..cut].to_vec())).is_err());
        }
        // Shorter ones are something else, if anything; they do not panic.
        for cut in 0..from {
            let _ = run(&[], &bytes[..cut]);
        }
    }
    refused(&[], &Elf::new(true).build()[..0x40], 125, &["cut short", "0x40"]);
}

#[test]
fn segments_that_cannot_be_are_refused_with_their_ranges() {
    let with = |change: &dyn Fn(&mut Elf)| {
        let mut elf = Elf::new(true);
        change(&mut elf);
        elf.build()
    };
    refused(&[], &with(&|e| e.parts[1].paddr = 0x10_0008), 125, &["segments 0 and 1 overlap", "0x100008"]);
    refused(&[], &with(&|e| e.parts[1].paddr = 0x40_0000), 125, &["0x400000..=0x4000ff", "0x0..=0x3fffff"]);
    refused(&[], &with(&|e| e.parts[1].paddr = 0x3f_ff01), 125, &["0x3fff01..=0x400000", "0x0..=0x3fffff"]);
    refused(&[], &with(&|e| e.parts[1].paddr = 0xf800_0000), 125, &["outside RAM"]);
    refused(&["--memory", "4K", "--ram-base", "0x800000"], &with(&|_| ()), 125, &["outside RAM, 0x800000..=0x800fff"]);
    refused(&[], &with(&|e| e.parts[1].paddr = u64::MAX - 0xfe), 125, &["2^64"]);
    refused(&[], &with(&|e| e.parts[1].memory = u64::MAX), 125, &["2^64"]);
    refused(&[], &with(&|e| e.parts[1].memory = 0), 125, &["0x4 bytes in the file, 0x0 in memory"]);
    refused(&[], &with(&|e| e.parts[1].memory = 3), 125, &["0x4 bytes in the file, 0x3 in memory"]);
    refused(&[], &with(&|e| e.parts.iter_mut().for_each(|p| p.kind = 2)), 125, &["no segment to load"]);
    refused(&[], &with(&|e| e.parts.clear()), 125, &["no program headers"]);
    let narrow = Elf { parts: vec![part(0xffff_f000, &[0; 0x1001])], entry: 0xffff_f000, ..Elf::new(false) };
    refused(&["--memory", "5G"], &narrow.build(), 125, &["outside RAM"]);
    let empty = with(&|e| e.parts.push(Part { memory: 0, ..part(0x10_0000, b"") }));
    assert!(run(&[], &empty).is_ok());
}

#[test]
fn sizes_and_offsets_of_the_file_are_never_believed() {
    // e_phoff, e_phentsize and e_phnum, p_offset and p_filesz, of a 64-bit ELF.
    for (at, value, why) in [
        (32, &[0xff; 8][..], "wraps"),
        (32, &[0xff, 0xff, 0, 0, 0, 0, 0, 0], "cut short"),
        (54, &[57, 0], "57 bytes"),
        (56, &[0xfe, 0xff], "cut short"),
        (56, &[0xff, 0xff], "65,534"),
        (64 + 8, &[0xff; 8], "wraps"),
        (64 + 8, &[0, 0, 0, 0, 0, 0, 0, 0x10], "cut short"),
        (64 + 32, &[0xff; 8], "in memory"),
        (4, &[3], "broken"),
        (5, &[7], "broken"),
        (6, &[0], "broken"),
    ] {
        let mut bytes = Elf::new(true).build();
        patch(&mut bytes, at, value);
        refused(&[], &bytes, 125, &[why]);
    }
}

#[test]
fn other_architectures_and_other_kinds_of_elf_are_named() {
    let with = |change: &dyn Fn(&mut Elf)| {
        let mut elf = Elf::new(true);
        change(&mut elf);
        elf.build()
    };
    refused(&[], &with(&|e| e.machine = 183), 125, &["this is an arm64 guest; this host is x86-64"]);
    refused(&[], &with(&|e| e.machine = 243), 125, &["a riscv guest"]);
    refused(&[], &with(&|e| e.machine = 0x1234), 125, &["a machine-4660 guest"]);
    refused(&[], &with(&|e| e.machine = 3), 125, &["a 32-bit x86 guest"]);
    refused(&[], &with(&|e| e.kind = 1), 125, &["object file"]);
    refused(&[], &with(&|e| e.kind = 4), 125, &["core dump"]);
    refused(&[], &with(&|e| e.kind = 9), 125, &["type 9"]);
    assert!(run(&[], &with(&|e| e.kind = 3)).is_ok());
    let interpreter = Part { kind: 3, ..part(0x20_0000, b"/lib/ld.so\0") };
    refused(&[], &with(&|e| e.parts.push(interpreter.clone())), 125, &["operating system"]);
    let mut big = Elf::new(true).build();
    patch(&mut big, 5, &[2]);
    patch(&mut big, 18, &[0, 21]);
    refused(&[], &big, 125, &["this is a big-endian ppc64 guest"]);
    patch(&mut big, 5, &[2]);
    refused(&[], &big[..16], 125, &["big-endian"]);
}

/// An ELF with one note.
fn with_note(owner: &[u8], kind: u32, size: u32) -> Vec<u8> {
    let mut bytes: Vec<u8> = [owner.len() as u32, size, kind].iter().flat_map(|w| w.to_le_bytes()).collect();
    bytes.extend(owner);
    bytes.resize(bytes.len().next_multiple_of(4) + 16, 0);
    let mut elf = Elf::new(true);
    elf.parts.push(Part { kind: 4, ..part(0x20_0000, &bytes) });
    elf.build()
}

#[test]
fn linux_and_its_programs_are_recognised_by_their_notes_and_broken_notes_are_none() {
    let linux = run(&[], &with_note(b"Linux\0", 0x101, 4)).unwrap().guest;
    assert_eq!(linux.format.name(), "a Linux kernel (vmlinux)");
    refused(&[], &with_note(b"GNU\0", 1, 16), 125, &["operating system"]);
    for (owner, kind, size) in [(&b"Other\0"[..], 1, 4), (b"Linux\0", 1, 255), (b"GNU\0", 3, 16), (b"GNU\0", 1, 15)] {
        run(&[], &with_note(owner, kind, size)).unwrap();
    }
    let mut outside = with_note(b"Linux\0", 0x101, 4);
    patch(&mut outside, 64 + 2 * 56 + 8, &[0xff; 8]);
    assert!(run(&[], &outside).is_ok());
}

#[test]
fn sixty_thousand_segments_end_at_once() {
    let tiny = |n: u64| Part { memory: 1, ..part(0x10_0000 + 2 * n, b"x") };
    let elf = Elf { parts: (0..0xfffe).map(tiny).collect(), entry: 0x10_0000, ..Elf::new(true) };
    let bytes = elf.build();
    let begin = std::time::Instant::now();
    run(&[], &bytes).unwrap();
    // The same number of notes, and the same segment again and again.
    let notes = Elf { parts: (0..0xfffe).map(|n| Part { kind: 4, ..tiny(n) }).collect(), ..Elf::new(true) };
    assert!(run(&[], &notes.build()).is_err());
    assert!(begin.elapsed().as_secs() < 20, "{:?}", begin.elapsed());
}

#[test]
fn options_that_mean_nothing_for_the_format_are_refused_by_both_names() {
    let flat = vec![0xf4];
    let elf = Elf::new(true).build();
    let one = Elf::with(false, &multiboot1(0, &[])).build();
    let two = Elf::with(true, &multiboot2(&[])).build();
    for (bytes, name, options) in [
        (&flat, "a flat binary", &["--cmdline", "--initrd"][..]),
        (&elf, "an ELF64 file", &["--cmdline", "--initrd", "--load-at", "--entry", "--cpu-mode"]),
        (&one, "a multiboot 1 kernel", &["--ram-base", "--load-at", "--entry", "--cpu-mode"]),
        (&two, "a multiboot 2 kernel", &["--ram-base", "--load-at", "--entry", "--cpu-mode"]),
    ] {
        for option in options {
            let value = if *option == "--cpu-mode" { "long" } else { "0x100000" };
            refused(&[option, value], bytes, 2, &[option, "means nothing for", name]);
        }
    }
}

#[test]
fn machines_that_cannot_be_are_refused() {
    for bytes in [vec![0xf4], Elf::new(false).build()] {
        refused(&["--cpus", "0"], &bytes, 2, &["--cpus 0"]);
        refused(&["--irqchip", "none", "--cpus", "2"], &bytes, 2, &["--irqchip none with --cpus 2"]);
        refused(&["--reg", "xyz=1"], &bytes, 2, &["xyz"]);
        refused(&["--reg", "rip=0x1000000000000000"], &bytes, 2, &["rip"]);
    }
    let flat = identify(Image::builtin("flat", &[0xf4])).unwrap();
    for words in [["--reg", "xyz=1"], ["--entry", "0x10000"]] {
        let error = settle(&config(&words), &flat).unwrap_err();
        assert_eq!(crate::error::verdict(&error).0, 2, "before a machine is built");
    }
    let with_nul = Config { cmdline: Some("a\0b".into()), ..config(&[]) };
    let kernel = Elf::with(false, &multiboot1(0, &[])).build();
    assert_eq!(start(&with_nul, Image::from_bytes("k", kernel)).unwrap_err().status, 2);
}

#[test]
fn interrupt_controllers_are_there_unless_a_flat_guest_is_alone() {
    let chip = |words: &[&str], bytes: &[u8]| run(words, bytes).unwrap().config.irqchip;
    assert_eq!(chip(&[], &[0xf4]), Some(IrqChip::None));
    assert_eq!(chip(&["--cpus", "2"], &[0xf4]), Some(IrqChip::Kernel));
    assert_eq!(chip(&["--irqchip", "kernel"], &[0xf4]), Some(IrqChip::Kernel));
    assert_eq!(chip(&["--irqchip", "none"], &Elf::new(true).build()), Some(IrqChip::None));
}

#[test]
fn inspect_says_what_was_found() {
    let text = |bytes: &[u8]| identify(Image::from_bytes("guest", bytes.to_vec())).unwrap().to_string();
    for (_, bytes) in each() {
        assert!(text(&bytes).lines().all(|line| line.contains(": ")), "{}", text(&bytes));
    }
    let elf = text(&Elf::new(true).build());
    for fact in
        ["format: ELF64 file", "architecture: x86-64", "entry: 0x100001", "segment 1: 0x0000102000..=0x00001020ff r-x"]
    {
        assert!(elf.contains(fact), "{elf}");
    }
    assert!(text(&each()[3].1).contains("asks for: memory map (tag 6)"), "{}", text(&each()[3].1));
    assert!(text(&[0xf4]).contains("format: flat binary"));
}

#[test]
fn an_empty_built_in_guest_is_refused() {
    refused(&[], &[], 125, &["empty"]);
}

#[test]
fn files_are_read_like_bytes() {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in each() {
        let path = dir.path().join("guest");
        std::fs::write(&path, &bytes).unwrap();
        let started = start(&config(&[]), Image::open(&path).unwrap()).unwrap();
        assert_eq!(started.guest.format, identify(Image::from_bytes("", bytes)).unwrap().format, "{name}");
    }
}

/// A small generator (Numerical Recipes' LCG), so that every run breaks the same files.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

#[test]
fn broken_headers_never_panic_loop_or_write_outside_ram() {
    let interesting = [0, 1, 0x7f, 0x80, 0xff, 0x1000, 0xffff, 0x10_0000, 0x8000_0000, 0xffff_ffff, u64::MAX, 1 << 63];
    let mut state = 1;
    let mut accepted = 0;
    for round in 0..1500 {
        for (_, mut bytes) in each() {
            for _ in 0..=round % 4 {
                let at = usize::try_from(random(&mut state)).unwrap() % bytes.len();
                let value = match random(&mut state) % 3 {
                    0 => random(&mut state),
                    _ => interesting[random(&mut state) as usize % interesting.len()],
                };
                let width = [1, 2, 4, 8][random(&mut state) as usize % 4].min(bytes.len() - at);
                patch(&mut bytes, at, &value.to_le_bytes()[..width]);
            }
            accepted += u32::from(fuzz_one(&bytes));
        }
    }
    assert!(accepted > 100, "only {accepted} were accepted: the mutations reach nothing");
}
