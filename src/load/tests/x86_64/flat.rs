//! Flat guests of the PC.

use crate::config::{Config, CpuMode};
use crate::load::Image;
use crate::load::flat::may_ask_cpuid;
use crate::load::tests::samples::{self, config};

const ADD: &[u8] = &[0xba, 0xf8, 0x03, 0x00, 0xd8, 0x04, 0x30, 0xee, 0xb0, 0x0a, 0xee, 0xf4];

fn run(config: &Config) -> Result<samples::Started, samples::Refused> {
    samples::start(config, Image::builtin("add", ADD))
}

fn refused(words: &[&str], status: u8, why: &[&str]) {
    let refused = run(&config(words)).unwrap_err();
    assert_eq!(refused.status, status, "{words:?}: {}", refused.text);
    for why in why {
        assert!(refused.text.contains(why), "{words:?}: {}", refused.text);
    }
}

#[test]
fn it_is_loaded_at_0x1000_in_real_mode() {
    let started = run(&config(&["--reg", "rax=2", "--reg", "rbx=2"])).unwrap();
    assert_eq!(started.read(0x1000, ADD.len()), ADD);
    let (regs, sregs) = (started.boot.regs, started.boot.sregs);
    assert_eq!((regs.rip, regs.rax, regs.rbx, regs.rsp, regs.rflags), (0x1000, 2, 2, 0, 2));
    assert_eq!((sregs.cs.base, sregs.cs.selector, sregs.cr0 & 1), (0, 0, 0));
    assert_eq!(started.config.cpu_mode, Some(CpuMode::Real));
}

#[test]
fn system_a_starts_where_its_author_starts_it() {
    let mut words = vec!["--memory", "512000000", "--load-at", "0", "--entry", "0x1000:0"];
    for reg in ["ss=0x1000", "ds=0x1000", "es=0x1000", "fs=0x1000", "gs=0x1000", "rsp=0xffffffff"] {
        words.extend(["--reg", reg]);
    }
    let started = run(&config(&words)).unwrap();
    let s = started.boot.sregs;
    for segment in [s.cs, s.ss, s.ds, s.es, s.fs, s.gs] {
        assert_eq!((segment.selector, segment.base), (0x1000, 0x10000));
    }
    assert_eq!((started.boot.regs.rip, started.boot.regs.rsp), (0, 0xffff_ffff));
    assert_eq!(started.read(0, ADD.len()), ADD);
}

#[test]
fn system_b_has_one_page_at_0x1000() {
    let started = run(&config(&["--memory", "4K", "--ram-base", "0x1000"])).unwrap();
    assert_eq!((started.read(0x1000, 2), started.boot.regs.rip), (ADD[..2].to_vec(), 0x1000));
}

#[test]
fn protected_and_long_mode_have_tables_and_a_stack() {
    for mode in ["protected", "long"] {
        let started = run(&config(&["--cpu-mode", mode, "--load-at", "0x20000", "--entry", "0x20003"])).unwrap();
        assert_eq!((started.boot.regs.rip, started.boot.regs.rsp), (0x20003, 4 << 20));
        assert_eq!(started.boot.sregs.cs.l, u8::from(mode == "long"));
        let gdt = started.boot.sregs.gdt.base;
        assert_eq!(started.read(gdt, 8), [0; 8]);
        assert_ne!(started.read(gdt + 8, 8), [0; 8]);
    }
}

#[test]
fn what_is_not_in_ram_is_refused_with_both_ranges() {
    refused(&["--memory", "4K"], 125, &["0x1000..=0x100b", "0x0..=0xfff"]);
    refused(&["--load-at", "0x3ffff8", "--cpu-mode", "long"], 125, &["0x3ffff8..=0x400003", "0x0..=0x3fffff"]);
    refused(&["--load-at", "0xfffffffffffffff8", "--entry", "0"], 125, &["2^64"]);
    refused(&["--entry", "0xffff:0xffff", "--memory", "64K"], 125, &["0xffff:0xffff", "0x0..=0xffff"]);
    refused(&["--entry", "0x400000", "--cpu-mode", "long"], 125, &["0x400000"]);
    // The boot tables' place is memory, but no RAM.
    refused(&["--load-at", "0xf8000000", "--cpu-mode", "long"], 125, &["RAM is at 0x0..=0x3fffff"]);
}

#[test]
fn entries_that_real_mode_does_not_have_are_refused_before_a_machine_is_built() {
    refused(&["--load-at", "0x10000"], 2, &["0x10000", "--entry 0x1000:0x0"]);
    refused(&["--entry", "0x10010"], 2, &["--entry 0x1001:0x0"]);
    refused(&["--cpu-mode", "long", "--entry", "1:0"], 2, &["SEG:OFF"]);
    refused(&["--cpu-mode", "protected", "--load-at", "0x100000000"], 2, &["eip"]);
}

#[test]
fn a_sparse_file_of_100_gib_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse");
    std::fs::File::create(&path).unwrap().set_len(100 << 30).unwrap();
    let start = std::time::Instant::now();
    let refused = samples::start(&config(&[]), Image::open(&path).unwrap()).unwrap_err();
    assert_eq!(refused.status, 125, "{}", refused.text);
    assert!(start.elapsed().as_millis() < 500);
}

#[test]
fn only_a_tiny_guest_without_the_instructions_is_not_told_its_cpu() {
    let asks = |bytes: &[u8]| may_ask_cpuid(&Image::from_bytes("x", bytes.to_vec()), 0x0f).unwrap();
    assert!(!asks(&[0xf4]) && !asks(&[0; 512]));
    assert!(asks(&[0; 513]));
    // cpuid; wrmsr; fxsave [0x2000].
    assert!(asks(&[0x0f, 0xa2]) && asks(&[0x90, 0x0f, 0x30, 0x90]) && asks(&[0x0f, 0xae, 0x06, 0x00, 0x20]));
}
