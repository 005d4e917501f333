//! What Bantam refuses, each with the status and the reason that a person can act on.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;
use common::{bantam, file, have, kvm, root, run_bytes, skipped};

const HALT: &[u8] = &[0xf4];

fn image(name: &str) -> &'static [u8] {
    (guests::find(name).unwrap().image)()
}

#[test]
fn files_that_are_not_guests() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    bantam("run").arg(path("none")).run().refused(125).said("No such file");
    bantam("run").arg(dir.path()).run().refused(125).said("directory");
    std::fs::write(path("empty"), "").unwrap();
    bantam("run").arg(path("empty")).run().refused(125).said("empty");
    let fifo = std::process::Command::new("mkfifo").arg(path("fifo")).status().unwrap();
    assert!(fifo.success());
    let outcome = bantam("run").arg(path("fifo")).run();
    outcome.refused(125);
    assert!(outcome.took.as_secs() < 1);
    bantam("inspect").arg(path("none")).run().refused(125);
    let fifo = path("fifo").display().to_string();
    bantam(&format!("example add --serial file:{fifo}")).run().refused(125).said("--serial");
    bantam(&format!("example add --trace={fifo}")).run().refused(125).said("--trace");
}

#[test]
fn a_guest_that_is_larger_than_ram() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let sparse = std::fs::File::create(path("sparse")).unwrap();
    sparse.set_len(100 << 30).unwrap();
    let outcome = bantam("run").arg(path("sparse")).run();
    outcome.refused(125).said("RAM");
    assert!(outcome.took.as_secs() < 1);
    run_bytes(HALT, "--memory 4K").refused(125).said("0x1000");
}

#[test]
fn a_file_that_may_not_be_read() {
    use std::os::unix::fs::PermissionsExt;
    if !root() || !have("setpriv") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let copy = dir.path().join("bantam");
    std::fs::copy(common::program(), &copy).unwrap();
    let secret = dir.path().join("secret");
    std::fs::write(&secret, HALT).unwrap();
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).unwrap();
    let words = ["--reuid=65534", "--regid=65534", "--clear-groups"].map(Into::into);
    let outcome = common::Run::of("setpriv".as_ref(), words).arg(&copy).arg("run").arg(&secret).run();
    outcome.refused(125).said("Permission denied");
}

#[test]
fn words_that_mean_nothing() {
    let guest = file(HALT);
    let cases = [
        ("--reg xyz=1", "xyz"),
        ("--reg rax", "NAME=VALUE"),
        ("--reg ax=0x10000", "16-bit"),
        ("--memory 12Q", "12Q"),
        ("--load-at 0xg", "0xg"),
        ("--no-such-flag", "--no-such-flag"),
        ("--cpus 0", "--cpus"),
        ("--cpus 2 --irqchip none", "--irqchip"),
        ("--cmdline x", "flat"),
        ("--initrd /dev/null", "flat"),
        ("--debugcon pio:0x3f8", "serial"),
        ("--debugcon mmio:0x1000", "RAM"),
        ("--load-at 0x10000", "--entry 0x1000:0"),
        ("--entry 0x10000", "0x1000:0"),
        ("--cpu-mode long --entry 1:2", "real"),
        ("--ram-base 0x123", "--ram-base"),
        ("--timeout x", "x"),
        ("--timeout -1", "not"),
        ("--cpus -1", "not a number"),
        ("--cpus 0x100000000", "32 bits"),
        ("--max-exits 0", "--max-exits"),
        ("--memory 1T", "K, M or G"),
        ("--config /dev/zero", "/dev/zero"),
    ];
    for (words, reason) in cases {
        bantam("run").arg(guest.path()).words(words).run().refused(2).said(reason);
    }
    let elf = file(image("elf64"));
    for words in ["--cpu-mode long", "--cmdline x", "--load-at 0x1000", "--entry 0x1000"] {
        let option = words.split(' ').next().unwrap();
        bantam("run").arg(elf.path()).words(words).run().refused(2).said(option).said("ELF");
    }
    bantam("run").arg(guest.path()).words("--irqchip split").run().refused(125).said("not yet");
}

#[test]
fn ram_that_cannot_be() {
    let guest = file(HALT);
    for (words, reason) in [
        ("--memory 0", "RAM"),
        ("--memory 4097", "page size"),
        ("--memory 1", "page size"),
        ("--memory 64T", "--memory"),
        ("--memory 16777216G", "--memory"),
    ] {
        let words = words.replace("64T", "65536G");
        bantam("run").arg(guest.path()).words(&words).run().refused(125).said(reason);
    }
}

#[test]
fn guests_of_another_kind() {
    let mut elf = image("elf64").to_vec();
    elf[18..20].copy_from_slice(&183u16.to_le_bytes());
    run_bytes(&elf, "").refused(125).said("this is an arm64 guest; this host is x86-64");
    let mut linux = vec![0; 0x1000];
    linux[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    linux[0x202..0x206].copy_from_slice(b"HdrS");
    run_bytes(&linux, "").refused(125).said("Linux").said("not yet");
    let mut arm = vec![0; 0x1000];
    arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
    run_bytes(&arm, "").refused(125).said("arm64");
}

/// From the program headers of a well-formed ELF file.
fn end_of_last_segment(elf: &[u8]) -> usize {
    let number = |at: usize, size: usize| {
        elf[at..at + size].iter().rev().fold(0usize, |value, byte| value << 8 | usize::from(*byte))
    };
    let wide = elf[4] == 2;
    let (table, size, count) =
        if wide { (number(32, 8), 56, number(56, 2)) } else { (number(28, 4), 32, number(44, 2)) };
    let ends = (0..count).map(|i| table + i * size).filter(|at| number(*at, 4) == 1);
    let ends = ends
        .map(|at| if wide { number(at + 8, 8) + number(at + 32, 8) } else { number(at + 4, 4) + number(at + 16, 4) });
    ends.max().unwrap()
}

/// Each cut of the small ELF and multiboot guests, through the real command for a sample and `inspect` for the rest.
#[test]
fn guests_cut_short() {
    for name in ["elf32", "elf64"] {
        let whole = image(name);
        let end = end_of_last_segment(whole);
        for length in (4..end).step_by(29).chain([4, 5, 51, 52, 63, 64, end - 1]) {
            run_bytes(&whole[..length], "").refused(125);
        }
        bantam("inspect").arg(file(whole).path()).run().expect(0).said_nothing();
    }
    for name in ["multiboot", "multiboot2"] {
        let whole = image(name);
        let header =
            whole.windows(4).position(|w| w == [0x02, 0xb0, 0xad, 0x1b] || w == [0xd6, 0x50, 0x52, 0xe8]).unwrap();
        for length in (header + 64..whole.len()).step_by(101) {
            run_bytes(&whole[..length], "").refused(125);
        }
    }
}

#[test]
fn inspect_says_what_was_found() {
    for (name, format) in [
        ("add", "flat"),
        ("elf32", "ELF32"),
        ("elf64", "ELF64"),
        ("multiboot", "Multiboot 1"),
        ("multiboot2", "Multiboot 2"),
    ] {
        let guest = file(image(name));
        let outcome = bantam("inspect").arg(guest.path()).run();
        outcome.expect(0).said_nothing();
        assert!(outcome.out().to_lowercase().contains(&format.to_lowercase()), "{}", outcome.out());
    }
}

#[test]
fn more_cpus_than_kvm_has() {
    if !kvm() {
        return;
    }
    run_bytes(HALT, "--cpus 100000 --irqchip kernel").refused(125).said("CPUs");
    if std::thread::available_parallelism().is_ok_and(|n| n.get() < 20) {
        run_bytes(HALT, "--cpus 20 --timeout 20").expect(0).said("warning");
    } else {
        skipped("this host recommends 20 CPUs and more");
    }
}

#[test]
fn ram_that_this_host_cannot_map() {
    if !kvm() || !have("prlimit") {
        return;
    }
    let guest = file(HALT);
    let words = ["--as=200000000"].map(Into::into);
    let run = common::Run::of("prlimit".as_ref(), words).arg(common::program()).arg("run").arg(guest.path());
    run.words("--memory 1G").run().refused(125).said("RAM");
}
