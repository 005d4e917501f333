//! What Bantam refuses, each with the status and the reason that a person can act on.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;
use common::code::HALT;
use common::{arch, bantam, file, have, kvm, root, run_bytes, skipped, within};

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
    assert!(outcome.took < within(1.0));
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
    assert!(outcome.took < within(1.0));
    let (words, place) = arch::BEYOND_RAM;
    run_bytes(HALT, words).refused(125).said(place);
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
    common::copy_program(&copy);
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
        ("--memory 12Q", "12Q"),
        ("--load-at 0xg", "0xg"),
        ("--no-such-flag", "--no-such-flag"),
        ("--cpus 0", "--cpus"),
        ("--cmdline x", "flat"),
        ("--initrd /dev/null", "flat"),
        ("--ram-base 0x124", "--ram-base"),
        ("--timeout x", "x"),
        ("--timeout -1", "not"),
        ("--cpus -1", "not a number"),
        ("--cpus 0x100000000", "32 bits"),
        ("--max-exits 0", "--max-exits"),
        ("--memory 1T", "K, M or G"),
        ("--config /dev/zero", "/dev/zero"),
    ];
    for (words, reason) in cases.iter().chain(arch::WORDS) {
        bantam("run").arg(guest.path()).words(words).run().refused(2).said(reason);
    }
    let elf = file(image("elf64"));
    for words in ["--cmdline x", "--load-at 0x1000", "--entry 0x1000"].iter().chain(arch::ELF_WORDS) {
        let option = words.split(' ').next().unwrap();
        bantam("run").arg(elf.path()).words(words).run().refused(2).said(option).said("ELF");
    }
}

#[test]
fn ram_that_cannot_be() {
    let guest = file(HALT);
    for (words, reason) in [
        ("--memory 0", "RAM"),
        ("--memory 4097", "page size"),
        ("--memory 1", "page size"),
        ("--memory 8388608G", "--memory"),
        ("--memory 16777216G", "--memory"),
    ] {
        bantam("run").arg(guest.path()).words(words).run().refused(125).said(reason);
    }
}

#[test]
fn guests_of_another_kind() {
    let (machine, reason) = arch::FOREIGN;
    let mut elf = image("elf64").to_vec();
    elf[18..20].copy_from_slice(&machine.to_le_bytes());
    run_bytes(&elf, "").refused(125).said(reason);
    let (pc, arm) = arch::LINUX;
    let mut linux = vec![0; 0x1000];
    linux[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    linux[0x202..0x206].copy_from_slice(b"HdrS");
    run_bytes(&linux, "").refused(125).said(pc);
    let mut linux = vec![0; 0x1000];
    linux[0x38..0x3c].copy_from_slice(b"ARM\x64");
    run_bytes(&linux, "").refused(125).said(arm);
}

/// A bzImage whose 64-bit entry is `code`.
fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 0x400 + 0x1000];
    let fields: [(usize, &[u8]); 9] = [
        (0x1f1, &[1]),
        (0x1f4, &[0, 1, 0, 0]),
        (0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]),
        (0x202, b"HdrS\x0f\x02"),
        (0x211, &[1]),
        (0x22c, &[0xff, 0xff, 0xff, 0x7f]),
        (0x236, &[1]),
        (0x238, &[0xff, 7, 0, 0]),
        (0x25a, &[0x10]),
    ];
    for (at, field) in fields {
        bytes[at..at + field.len()].copy_from_slice(field);
    }
    bytes[0x600..0x600 + code.len()].copy_from_slice(code);
    bytes
}

#[test]
fn linux_on_a_host_that_emulates_ends_in_a_clear_sentence() {
    if !kvm() {
        return;
    }
    if cfg!(not(target_arch = "x86_64")) {
        return skipped("arm64's KVM emulates no instructions");
    }
    // shlx eax, eax, edx, which Linux unpacks itself with; mov al, 21; out 0xf4, al.
    let outcome = run_bytes(&bzimage(&[0xc4, 0xe2, 0x69, 0xf7, 0xc0, 0xb0, 21, 0xe6, 0xf4]), "--timeout 20");
    if outcome.status == 43 {
        return skipped("this host's KVM lets the CPU execute the guest's instructions");
    }
    let last = outcome.expect(126).stderr.lines().last().unwrap_or_default().to_owned();
    assert!(last.contains("Linux cannot run here") && last.contains("cargo xtask host x86_64"), "{last}");
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
    for guest in ["elf32", "elf64"].into_iter().filter_map(guests::find) {
        let whole = (guest.image)();
        let end = end_of_last_segment(whole);
        for length in (4..end).step_by(29).chain([4, 5, 51, 52, 63, 64, end - 1]) {
            run_bytes(&whole[..length], "").refused(125);
        }
        bantam("inspect").arg(file(whole).path()).run().expect(0).said_nothing();
    }
    for guest in ["multiboot", "multiboot2"].into_iter().filter_map(guests::find) {
        let whole = (guest.image)();
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
        let Some(guest) = guests::find(name) else { continue };
        let guest = file((guest.image)());
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
    run_bytes(HALT, "--cpus 100000 --irqchip kernel").refused(arch::TOO_MANY_CPUS).said("100000");
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
