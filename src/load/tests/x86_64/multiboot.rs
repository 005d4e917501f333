//! Both multiboot formats, seen from the kernel that is entered.

use crate::load::multiboot::{Handover, LOADER, memory_map};
use crate::load::tests::samples::{CODE, Elf, Started, multiboot1, multiboot2, part, patch, run, tag};
use crate::memory::Span;

const LOW: Span = Span { start: 0x1000, size: 0x9_f000 };

fn one(flags: u32) -> Vec<u8> {
    Elf::with(false, &multiboot1(flags, &[])).build()
}

fn two(wide: bool, tags: &[Vec<u8>]) -> Vec<u8> {
    Elf::with(wide, &multiboot2(tags)).build()
}

fn refused(words: &[&str], bytes: &[u8], why: &[&str]) {
    let refused = run(words, bytes).unwrap_err();
    assert_eq!(refused.status, 125, "{}", refused.text);
    for why in why {
        assert!(refused.text.contains(why), "{why:?} is not in {}", refused.text);
    }
}

/// The information tags of a Multiboot 2 kernel: number, and where the body is.
fn tags(started: &Started) -> Vec<(u64, u64, usize)> {
    let info = started.boot.regs.rbx;
    assert_eq!(info % 8, 0);
    let end = info + started.word(info);
    let (mut at, mut tags) = (info + 8, Vec::new());
    loop {
        let (kind, size) = (started.word(at), started.word(at + 4));
        tags.push((kind, at + 8, size as usize - 8));
        at += size.next_multiple_of(8);
        if kind == 0 {
            assert_eq!(at, end);
            return tags;
        }
    }
}

fn find(started: &Started, kind: u64) -> u64 {
    tags(started).iter().find(|t| t.0 == kind).unwrap().1
}

fn assert_entry_state(started: &Started, magic: u32) {
    let (regs, sregs) = (started.boot.regs, started.boot.sregs);
    assert_eq!((regs.rax, regs.rip, regs.rflags), (magic.into(), 0x10_0001, 2));
    assert_eq!((sregs.cs.db, sregs.cs.l, sregs.cr0 & 1, sregs.cr0 >> 31, sregs.efer), (1, 0, 1, 0, 0));
    assert!(LOW.contains(&Span { start: regs.rbx, size: 1 }), "{:#x}", regs.rbx);
}

#[test]
fn a_multiboot_1_kernel_is_told_all_it_may_ask() {
    let started = run(&["--cmdline", "a=1 b"], &one(3)).unwrap();
    assert_entry_state(&started, 0x2bad_b002);
    let info = started.boot.regs.rbx;
    let word = |at| started.word(info + at);
    assert_eq!(word(0), 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9);
    assert_eq!((word(4), word(8)), (640, 3 * 1024));
    assert_eq!(started.text(word(16)), "a=1 b");
    assert_eq!(word(20), 0);
    assert_eq!(started.text(word(64)), LOADER);
    let (length, map) = (word(44), word(48));
    let areas: Vec<_> = (0..length / 24)
        .map(|i| map + 24 * i)
        .map(|at| (started.word(at), started.long(at + 4), started.long(at + 12), started.word(at + 20)))
        .collect();
    let expected = [(20, 0, 0xa_0000, 1), (20, 0xa_0000, 0x6_0000, 2), (20, 0x10_0000, (4 << 20) - 0x10_0000, 1)];
    assert_eq!(areas, expected);
}

#[test]
fn a_multiboot_2_kernel_is_told_all_it_may_ask() {
    let request = tag(1, 0, &[1, 2, 3, 4, 6, 8, 9, 14, 15, 21]);
    let harmless = [tag(6, 0, &[]), tag(7, 0, &[]), tag(8, 0, &[0]), tag(9, 0, &[0]), tag(4, 0, &[2])];
    let optional = [tag(5, 1, &[0, 0, 0]), tag(4, 1, &[1]), tag(77, 1, &[]), tag(1, 1, &[8, 99])];
    for wide in [false, true] {
        let bytes = two(wide, &[&[request.clone()][..], &harmless, &optional].concat());
        let started = run(&["--cmdline", "x"], &bytes).unwrap();
        assert_entry_state(&started, 0x36d7_6289);
        assert_eq!(started.text(find(&started, 1)), "x");
        assert_eq!(started.text(find(&started, 2)), LOADER);
        let memory = find(&started, 4);
        assert_eq!((started.word(memory), started.word(memory + 4)), (640, 3 * 1024));
        let map = find(&started, 6);
        assert_eq!((started.word(map), started.word(map + 4)), (24, 0));
        assert_eq!((started.long(map + 8 + 48), started.long(map + 16 + 48)), (0x10_0000, 3 << 20));
        assert!(tags(&started).iter().all(|t| t.0 != 21));
    }
}

#[test]
fn the_memory_map_is_a_pcs_whatever_the_ram() {
    let span = |start, size| Span { start, size };
    let map = |ram: &[Span]| memory_map(ram).iter().map(|a| (a.span, a.kind)).collect::<Vec<_>>();
    assert_eq!(map(&[span(0, 0x2000)]), [(span(0, 0x2000), 1)]);
    assert_eq!(map(&[span(0, 0xa_1000)]), [(span(0, 0xa_0000), 1), (span(0xa_0000, 0x1000), 2)]);
    let large = [span(0, 0xc000_0000), span(1 << 32, 1 << 30)];
    let expected = [
        (span(0, 0xa_0000), 1),
        (span(0xa_0000, 0x6_0000), 2),
        (span(0x10_0000, 0xbff0_0000), 1),
        (span(1 << 32, 1 << 30), 1),
    ];
    assert_eq!(map(&large), expected);
    let handover = Handover { cmdline: "", modules: vec![], map: memory_map(&large), symbols: None, base: 0 };
    assert_eq!(handover.kib(), (640, 0xbff0_0000 / 1024));
}

#[test]
fn a_kernel_fits_in_three_pages() {
    let mut elf = Elf::with(false, &multiboot1(3, &[]));
    elf.parts = vec![part(0x1000, &elf.parts[0].bytes)];
    elf.entry = 0x1000;
    let started = run(&["--memory", "12K"], &elf.build()).unwrap();
    assert_eq!((started.boot.regs.rbx, started.word(started.boot.regs.rbx + 4)), (0x1010, 12));
    elf.parts[0].memory = 0x2000;
    refused(&["--memory", "12K"], &elf.build(), &["0x0..=0x2fff", "0x1000..=0x2fff"]);
}

#[test]
fn modules_lie_page_aligned_above_the_kernel() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("first"), vec![1; 5000]).unwrap();
    std::fs::write(path("second"), b"2").unwrap();
    let words = ["--initrd", &path("first"), "--initrd", &path("second")];
    let started = run(&words, &one(1)).unwrap();
    let info = started.boot.regs.rbx;
    let (count, at) = (started.word(info + 20), started.word(info + 24));
    let module = |i: u64| [0, 4, 8, 12].map(|field| started.word(at + 16 * i + field));
    let ([a, a_end, a_name, _], [b, b_end, b_name, zero]) = (module(0), module(1));
    assert_eq!((count, a, a_end, b, b_end, zero), (2, 0x10_3000, 0x10_3000 + 5000, 0x10_5000, 0x10_5001, 0));
    assert_eq!((started.text(a_name), started.text(b_name)), ("first".into(), "second".into()));
    assert!(started.read(a, 5000) == [1; 5000] && started.read(b, 2) == b"2\0");
    let started = run(&words, &two(true, &[])).unwrap();
    let at = find(&started, 3);
    assert_eq!((started.word(at), started.word(at + 4)), (0x10_3000, 0x10_3000 + 5000));
    assert_eq!(started.text(at + 8), "first");
    assert_eq!(tags(&started).iter().filter(|t| t.0 == 3).count(), 2);
}

#[test]
fn modules_go_below_1_mib_only_where_ram_ends_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m").to_str().unwrap().to_owned();
    std::fs::write(&path, [3; 100]).unwrap();
    let low = Elf { parts: vec![part(0x2000, &multiboot1(0, &[]))], entry: 0x2000, ..Elf::new(false) };
    let module = |memory| {
        let started = run(&["--memory", memory, "--initrd", &path], &low.build()).unwrap();
        started.word(started.word(started.boot.regs.rbx + 24))
    };
    assert_eq!((module("2M"), module("640K")), (0x10_0000, 0x1000));
}

#[test]
fn what_does_not_fit_is_refused_with_both_ranges() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::File::create(path("big")).unwrap().set_len(100 << 30).unwrap();
    refused(&["--initrd", &path("big")], &one(0), &["big, 107374182400 bytes", "0x100000..=0x3fffff", "segment"]);
    refused(&["--initrd", &path("none")], &one(0), &["No such file"]);
    refused(&["--cmdline", &"x".repeat(2 << 20), "--memory", "2M"], &one(0), &["command line", "0x0..=0x9ffff"]);
    let high = Elf { parts: vec![part(1 << 32, &multiboot1(0, &[]))], entry: 1 << 32, ..Elf::new(true) };
    refused(&["--memory", "4G"], &high.build(), &["0x100000000", "reach"]);
}

#[test]
fn multiboot_wins_over_the_elf_class_and_2_over_1() {
    let both = [multiboot2(&[]), multiboot1(0, &[])].concat();
    assert_eq!(run(&[], &Elf::with(true, &both).build()).unwrap().boot.regs.rax, 0x36d7_6289);
}

#[test]
fn a_header_counts_only_aligned_and_among_the_first_bytes() {
    let (one, two) = (multiboot1(0, &[]), multiboot2(&[]));
    for (header, at, found) in [
        (&one, 8180, true),
        (&one, 8184, false),
        (&one, 4, true),
        (&one, 2, false),
        (&two, 32744, true),
        (&two, 32760, false),
        (&two, 8, true),
        (&two, 4, false),
    ] {
        // A file that is nothing else: found, it lacks addresses; not found, the file is flat.
        let bytes = [&vec![0; at][..], header, &[0; 64]].concat();
        assert_eq!(run(&[], &bytes).is_err(), found, "{at}");
    }
    let mut wrong = one;
    wrong[8] ^= 1;
    assert!(run(&[], &wrong).is_ok(), "without its checksum it is no header");
}

#[test]
fn address_fields_load_what_they_say() {
    let mut bytes = vec![0xcc; 16];
    bytes.extend(multiboot1(1 << 16, &[0x20_0008, 0x20_0000, 0, 0x20_1000, 0x20_0028]));
    bytes.extend(CODE);
    let started = run(&[], &bytes).unwrap();
    assert_eq!((started.boot.regs.rip, started.boot.regs.rax), (0x20_0028, 0x2bad_b002));
    assert_eq!(started.read(0x20_0028, CODE.len()), CODE);
    assert_eq!(started.read(0x1f_fff8, 16), [vec![0; 8], vec![0xcc; 8]].concat());
    let from_start = [u32::MAX, 0, 0].map(|w| w);
    let fields = [&[0x20_0010][..], &from_start].concat();
    let mut bytes = vec![0xcc; 16];
    bytes.extend(multiboot2(&[tag(2, 0, &fields), tag(3, 0, &[0x20_0004])]));
    let started = run(&[], &bytes).unwrap();
    assert_eq!((started.boot.regs.rip, started.read(0x20_0000, 16)), (0x20_0004, vec![0xcc; 16]));
}

#[test]
fn addresses_that_contradict_each_other_are_refused() {
    let raw = |fields: [u32; 5]| [vec![0; 16], multiboot1(1 << 16, &fields), vec![0; 64]].concat();
    let (at, end) = (0x20_0010, 0x20_0040);
    for (fields, why) in [
        ([at, at + 1, 0, 0, at], "before load_addr"),
        ([at, at - 17, 0, 0, at], "start of the file"),
        ([at, at - 16, at - 17, 0, at], "load_end_addr"),
        ([at, at - 16, at - 16, 0, at], "nothing to load"),
        ([at, at - 16, end, at, at], "bss_end_addr"),
        ([at, at - 16, end, at - 17, at], "bss_end_addr"),
        ([at, at - 16, 0x30_0000, 0, at], "cut short"),
        ([at, at - 16, end, 0, end], "entry"),
        ([at, at - 16, end, u32::MAX, at], "RAM"),
        ([0xffff_fff0, 0xffff_ffe0, 0, 0, 0xffff_fff0], "reach"),
    ] {
        refused(&[], &raw(fields), &[why]);
    }
    refused(&[], &[multiboot1(0, &[]), vec![0; 64]].concat(), &["no ELF"]);
    refused(&[], &multiboot2(&[]), &["no ELF"]);
    refused(&[], &multiboot2(&[tag(2, 0, &[0; 4])]), &["no entry"]);
    refused(&[], &multiboot1(1 << 16, &[0x20_0000]), &["cut short"]);
}

#[test]
fn what_a_kernel_requires_and_bantam_lacks_is_refused_by_name() {
    refused(&[], &one(1 << 2), &["video mode"]);
    refused(&[], &one(1 << 5 | 1 << 9), &["0x220"]);
    assert!(run(&[], &one(1 << 20)).is_ok());
    for (tag, why) in [
        (tag(5, 0, &[0, 0, 0]), "framebuffer"),
        (tag(4, 0, &[1]), "console"),
        (tag(1, 0, &[1000]), "unknown information (tag 1000)"),
        (tag(11, 0, &[]), "header tag 11"),
        ([tag(3, 0, &[0x10_0000]), tag(12, 0, &[])].concat(), "header tag 12"),
        (tag(3, 0, &[]), "too short"),
        (tag(2, 0, &[0; 3]), "too short"),
        (tag(10, 0, &[0; 3]), "too short"),
        (tag(10, 0, &[0x20_0000, 0x30_0000, 0x1000, 0]), "not yet"),
        ([6, 0, 0, 0, 7, 0, 0, 0].to_vec(), "broken"),
        ([6, 0, 0, 0, 0xff, 0xff, 0xff, 0xff].to_vec(), "broken"),
    ] {
        refused(&[], &two(true, &[tag]), &[why]);
    }
    let mut mips = multiboot2(&[]);
    patch(&mut mips, 4, &4u32.to_le_bytes());
    let sum = 0u32.wrapping_sub(0xe852_50d6 + 4 + 24);
    patch(&mut mips, 12, &sum.to_le_bytes());
    refused(&[], &mips, &["this is a mips guest"]);
}

#[test]
fn a_relocatable_kernel_is_told_where_it_is() {
    let started = run(&[], &two(false, &[tag(10, 0, &[0x10_0000, 0x20_0000, 0x1000, 0])])).unwrap();
    assert_eq!(started.word(find(&started, 21)), 0x10_0000);
    let started = run(&[], &two(true, &[tag(3, 0, &[0x10_0004])])).unwrap();
    assert_eq!(started.boot.regs.rip, 0x10_0004);
}

fn with_symbols(wide: bool, header: &[u8]) -> Vec<u8> {
    let sections = vec![(2, vec![7; 40]), (8, vec![]), (3, b"\0names\0".to_vec())];
    Elf { sections, ..Elf::with(wide, header) }.build()
}

#[test]
fn symbols_are_placed_in_ram_and_their_headers_say_where() {
    let started = run(&[], &with_symbols(false, &multiboot1(0, &[]))).unwrap();
    let info = started.boot.regs.rbx;
    assert_eq!(started.word(info) >> 5 & 1, 1);
    let [count, size, at, names] = [28, 32, 36, 40].map(|offset| started.word(info + offset));
    assert_eq!((count, size, names), (4, 40, 3));
    let address = |i: u64| started.word(at + 40 * i + 12);
    assert_eq!(address(0), 0);
    assert_eq!(started.read(address(1), 40), [7; 40]);
    assert_eq!(started.text(address(3) + 1), "names");
    assert!(address(1) >= 0x10_2100);
    let started = run(&[], &with_symbols(true, &multiboot2(&[]))).unwrap();
    let at = find(&started, 9);
    assert_eq!([0, 4, 8].map(|o| started.word(at + o)), [4, 64, 3]);
    assert_eq!(started.read(started.long(at + 12 + 64 + 16), 40), [7; 40]);
}

#[test]
fn a_broken_symbol_table_only_loses_symbols() {
    let whole = with_symbols(false, &multiboot1(0, &[]));
    let has = |bytes: &[u8]| {
        let started = run(&[], bytes).unwrap();
        started.word(started.boot.regs.rbx) >> 5 & 1 == 1
    };
    assert!(has(&whole));
    let table = whole.len() - 4 * 40;
    // e_shoff, e_shentsize, e_shnum, e_shstrndx; then offset and size of the first section.
    for (at, value) in [
        (32, &[0xff; 4][..]),
        (46, &[41]),
        (48, &[0xff, 0xff]),
        (50, &[4]),
        (table + 40 + 16, &[0xff; 4]),
        (table + 40 + 20, &[0xff; 4]),
    ] {
        let mut bytes = whole.clone();
        patch(&mut bytes, at, value);
        assert!(!has(&bytes), "{at}");
    }
    // An odd section counts even where a segment is to bring it along.
    let mut bytes = whole.clone();
    patch(&mut bytes, table + 40 + 8, &[2]);
    assert!(has(&bytes));
    patch(&mut bytes, table + 40 + 16, &[0xff; 4]);
    assert!(!has(&bytes));
    let loaded = Elf::with(false, &multiboot1(0, &[])).build().len();
    for cut in loaded..whole.len() {
        assert!(!has(&whole[..cut]), "{cut}");
    }
}

#[test]
fn sections_that_lie_on_top_of_each_other_cost_no_memory() {
    let sections = (0..200).map(|_| (2, vec![0; 20_000])).collect();
    let mut bytes = Elf { sections, ..Elf::with(false, &multiboot1(0, &[])) }.build();
    let table = bytes.len() - 201 * 40;
    for i in 1..201 {
        let all = (bytes.len() as u32).to_le_bytes();
        patch(&mut bytes, table + 40 * i + 16, &[0; 4]);
        patch(&mut bytes, table + 40 * i + 20, &all);
    }
    let started = run(&["--memory", "3G"], &bytes).unwrap();
    assert_eq!(started.word(started.boot.regs.rbx) >> 5 & 1, 0);
}
