//! Every built-in guest does what its description says; formats, modes, CPUs and RAM of every kind.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;
use common::{Run, arch, bantam, code, kvm, run_bytes, within};

/// What only this architecture has.
#[cfg_attr(target_arch = "aarch64", path = "guests/aarch64.rs")]
#[cfg_attr(target_arch = "x86_64", path = "guests/x86_64.rs")]
mod own;

fn example(name: &str, words: &str) -> Run {
    bantam("example").arg(name).words(words)
}

/// A guest that only tests use, with its own words.
fn test_guest(name: &str, words: &str) -> common::Outcome {
    let guest = guests::find(name).unwrap();
    run_bytes((guest.image)(), &format!("{} {words}", guest.words.join(" ")))
}

#[test]
fn the_list_names_every_example() {
    let list = bantam("example").run();
    list.expect(0).said_nothing();
    for guest in guests::all() {
        assert!(list.out().contains(guest.name) && list.out().contains(guest.about));
    }
}

#[test]
fn the_simple_examples_print_and_end_as_described() {
    if !kvm() {
        return;
    }
    for (name, status, text) in arch::EXAMPLES {
        example(name, "").run().expect(*status).printed(text);
    }
}

#[test]
fn the_clock_is_the_hosts() {
    if !kvm() {
        return;
    }
    let now = |out: &std::process::Output| String::from_utf8(out.stdout.clone()).unwrap();
    let date = || now(&std::process::Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%SZ"]).output().unwrap());
    let before = date();
    let shown = example("clock", "").run().expect(0).out();
    let after = date();
    assert!(before.trim() <= shown.trim() && shown.trim() <= after.trim(), "{before} {shown} {after}");
}

#[cfg(target_arch = "x86_64")]
#[test]
fn writes_that_do_nothing_by_themselves_come_in_time_without_an_exit() {
    if !kvm() {
        return;
    }
    let said = |words: &str| {
        let outcome = example("clock", &format!("--memory 2M {words}")).run();
        let shown = outcome.expect(0).out();
        assert!(shown.starts_with("20") && shown.trim().ends_with('Z'), "{shown}");
        outcome.stderr
    };
    let (exits, late) = (said("--stats"), said("--stats --platform acpi"));
    let writes = |text: &str| text.lines().any(|line| line.contains("io-out") && line.contains("cmos"));
    assert!(writes(&exits) && !writes(&late), "{exits}{late}");
    assert!(said("--trace --platform acpi").contains("out 0x0070 "));
}

#[test]
fn echo_gives_back_what_it_gets_until_ctrl_d_or_the_end() {
    if !kvm() {
        return;
    }
    for name in ["echo", "echo-irq"] {
        example(name, "").input(b"hello\n\x04not this").run().expect(0).printed("hello\n");
        example(name, "").input(b"to the end").run().expect(0).printed("to the end");
        example(name, "").run().expect(0).printed("");
    }
    let long: String = (0..2000).map(|i| char::from(b'a' + (i % 26) as u8)).collect();
    example("echo-irq", "").input(long.as_bytes()).run().expect(0).printed(&long);
}

#[test]
fn every_cpu_says_its_number() {
    if !kvm() {
        return;
    }
    for cpus in [1, 2, 4, 7] {
        let outcome = example("smp", &format!("--cpus {cpus}")).run();
        let mut lines: Vec<_> = outcome.expect(0).out().lines().map(str::to_owned).collect();
        lines.sort();
        let all: Vec<_> = (0..cpus).map(|n| format!("CPU {n}")).collect();
        assert_eq!(lines, all);
    }
}

#[test]
fn wide_accesses_reach_each_narrow_register() {
    if !kvm() {
        return;
    }
    test_guest("serial-wide", "").expect(1).printed(arch::SERIAL_WIDE);
}

#[test]
fn a_halted_machine_ends_whatever_its_irqchip() {
    if !kvm() {
        return;
    }
    for words in ["--irqchip none", "--irqchip kernel", "--irqchip kernel --cpus 3"] {
        let outcome = test_guest("halt-off", words);
        outcome.expect(0).never_said("hint");
        assert!(outcome.took < within(2.0), "{:?}", outcome.took);
    }
    let outcome = test_guest("smp-halt-off", "");
    assert_eq!(outcome.expect(0).out(), "hhhh");
    test_guest("halt-if-on", "--irqchip kernel --timeout 1.5").expect(124);
}

#[test]
fn ram_of_every_size_is_there() {
    if !kvm() {
        return;
    }
    for (memory, address) in arch::RAM {
        let words = format!("{} --memory {memory} --reg {}={address:#x}", arch::TOUCH, arch::POINTER);
        run_bytes(code::TOUCH, &words).expect(11);
    }
    let words = format!("{} --memory 6G --reg {}={:#x}", arch::TOUCH, arch::POINTER, arch::HOLE);
    let outcome = run_bytes(code::TOUCH, &words);
    assert_eq!(outcome.expect(13).status, 13, "the hole reads as ones");
}

#[test]
fn serial_output_goes_to_a_file_or_nowhere() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    example("add", &format!("--serial file:{}", path.display())).run().expect(0).printed("");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "4\n");
    example("add", "--serial none").run().expect(0).printed("");
}

#[test]
fn a_serial_socket_carries_both_directions() {
    use std::io::{Read, Write};
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let run = example("echo", &format!("--serial unix:{}", path.display())).start();
    let mut client = loop {
        match std::os::unix::net::UnixStream::connect(&path) {
            Ok(client) => break client,
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(5)),
        }
    };
    client.write_all(b"ping\x04").unwrap();
    let mut answer = [0; 4];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"ping");
    run.wait().expect(0).printed("");
    assert!(!path.exists(), "the socket is left behind");
}

#[test]
fn a_reset_ends_the_machine_or_starts_it_anew() {
    if !kvm() {
        return;
    }
    // RAM is fresh each time, so the trace counts: each life writes once to nothing, then resets.
    run_bytes(code::LIFE, "").expect(0);
    let outcome = run_bytes(code::LIFE, "--reboot --max-exits 7 --trace");
    outcome.expect(124);
    let writes = outcome.trace().iter().filter(|l| l.starts_with(arch::LIFE_WRITES)).count();
    assert!(writes >= 3, "{writes}");
}

#[test]
fn ram_can_be_huge_pages() {
    if !kvm() || !common::root() {
        return;
    }
    let pool = "/proc/sys/vm/nr_hugepages";
    let before = std::fs::read_to_string(pool).unwrap();
    let _ = std::fs::write(pool, "8");
    let there = std::fs::read_to_string(pool).unwrap().trim().parse().unwrap_or(0);
    let (name, text) = arch::LINE;
    let outcome = example(name, "--hugepages --memory 8M").run();
    let refused = example(name, "--hugepages --memory 8G").run();
    let odd = example(name, "--hugepages --memory 3M").run();
    std::fs::write(pool, before.trim()).unwrap();
    refused.refused(125).said("huge pages").said("nr_hugepages");
    odd.refused(125).said("page size");
    if there < 8 {
        return common::skipped("the host has no 8 huge pages to spare");
    }
    outcome.expect(0).printed(text);
}
