//! Every built-in guest does what its description says; formats, modes, CPUs and RAM of every kind.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;
use common::{Run, bantam, file, kvm, run_bytes};

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
    let cases = [
        ("add", 0, "4\n"),
        ("add-nasm", 0, "4\\"),
        ("counter", 124, ""),
        ("reader", 124, ""),
        ("hello-protected", 0, "Hello from protected mode\n"),
        ("hello-long", 0, "Hello from long mode\n"),
        ("modes", 0, "real\nprotected\nlong\n"),
        ("timer", 7, "tick\ntick\ntick\n"),
        ("elf32", 0, "Hello from a 32-bit ELF file\nbss is zero\n"),
        ("elf64", 0, "Hello from a 64-bit ELF file\nbss is zero\n"),
        ("exit", 43, ""),
        ("poweroff", 0, ""),
        ("reset", 0, ""),
    ];
    for (name, status, text) in cases {
        example(name, "").run().expect(status).printed(text);
    }
}

#[test]
fn the_guest_sees_a_cpu_with_long_mode() {
    if !kvm() {
        return;
    }
    let out = example("cpuid", "").run().expect(0).out();
    assert!(out.contains("long mode: yes"), "{out}");
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
fn a_multiboot_kernel_gets_what_the_specification_promises() {
    if !kvm() {
        return;
    }
    let module = file(b"I am a module");
    for name in ["multiboot", "multiboot2"] {
        let outcome = example(name, "--memory 64M --cmdline root=/dev/null --initrd").arg(module.path()).run();
        let out = outcome.expect(0).out();
        for line in ["root=/dev/null", "Bantam"] {
            assert!(out.contains(line), "{name}: {line} is not in {out}");
        }
        let module_name = module.path().file_name().unwrap().to_str().unwrap();
        assert!(out.contains(module_name), "{name}: {out}");
    }
}

#[test]
fn string_io_is_exact_in_every_width() {
    if !kvm() {
        return;
    }
    test_guest("strings", "").expect(1).printed("Hello\nolleH\n");
}

#[test]
fn wide_accesses_reach_each_narrow_register() {
    if !kvm() {
        return;
    }
    test_guest("serial-wide", "").expect(1).printed("wW\n");
}

#[test]
fn a_halted_machine_ends_whatever_its_irqchip() {
    if !kvm() {
        return;
    }
    let second = std::time::Duration::from_secs(1);
    for words in ["--irqchip none", "--irqchip kernel", "--irqchip kernel --cpus 3"] {
        let outcome = test_guest("halt-off", words);
        outcome.expect(0).never_said("hint");
        assert!(outcome.took < 2 * second, "{:?}", outcome.took);
    }
    let outcome = test_guest("smp-halt-off", "");
    assert_eq!(outcome.expect(0).out(), "hhhh");
    test_guest("halt-if-on", "--irqchip none").expect(0).said("--irqchip kernel");
    test_guest("halt-if-on", "--irqchip kernel --timeout 1.5").expect(124);
}

#[test]
fn a_halted_machine_ends_though_a_timer_ticks() {
    if !kvm() {
        return;
    }
    // The local APIC's timer, periodic, each millisecond: spurious vector and enable, divide by 1, LVT, initial count.
    let mut code = Vec::new();
    for (register, value) in
        [(0xfee0_00f0u32, 0x1ffu32), (0xfee0_03e0, 0xb), (0xfee0_0320, 0x2_0020), (0xfee0_0380, 1_000_000)]
    {
        code.extend([0xc7, 0x05]);
        code.extend(register.to_le_bytes());
        code.extend(value.to_le_bytes());
    }
    code.extend([0xfa, 0xf4]);
    run_bytes(&code, "--cpu-mode protected --irqchip kernel --timeout 5").expect(0);
}

#[test]
fn ram_of_every_size_is_there() {
    if !kvm() {
        return;
    }
    // mov al, [rsi]; cmp al, 0; jne bad; mov byte [rsi], 1; cmp byte [rsi], 1; jne bad; mov al, 5; out 0xf4, al;
    // bad: mov al, 6; out 0xf4, al
    let touch: &[u8] = &[
        0x8a, 0x06, 0x3c, 0x00, 0x75, 0x0c, 0xc6, 0x06, 0x01, 0x80, 0x3e, 0x01, 0x75, 0x04, 0xb0, 0x05, 0xe6, 0xf4,
        0xb0, 0x06, 0xe6, 0xf4,
    ];
    let cases = [
        ("1M", 0xf_ffffu64),
        ("512000000", 511_999_999),
        ("3G", (3 << 30) - 1),
        ("4G", (5 << 30) - 1),
        ("6G", (7 << 30) - 1),
        ("6G", 4 << 30),
        ("40G", (41 << 30) - 1),
    ];
    for (memory, address) in cases {
        let words = format!("--cpu-mode long --memory {memory} --reg rsi={address:#x}");
        run_bytes(touch, &words).expect(11);
    }
    let outcome = run_bytes(touch, "--cpu-mode long --memory 6G --reg rsi=0xc0000000");
    assert_eq!(outcome.expect(13).status, 13, "the hole reads as ones");
}

#[test]
fn the_entry_states_are_as_documented() {
    if !kvm() {
        return;
    }
    // out 0x10, ax (66-prefixed in 32- and 64-bit code); the trace shows ax. First mov ax, cs / mov eax, esp …
    let cs = run_bytes(&[0x8c, 0xc8, 0xe7, 0x10, 0xf4], "--load-at 0x2000 --entry 0x100:0x1000 --trace");
    assert_eq!(cs.expect(0).trace()[0], "out 0x0010 ← 0x0100 (2 bytes, no device)");
    for mode in ["protected", "long"] {
        let words = format!("--cpu-mode {mode} --memory 16M --trace");
        // mov ax, cs; out 0x10, ax; mov ax, ds; out; mov eax, esp; out 0x10, eax; hlt
        let code =
            [0x66, 0x8c, 0xc8, 0x66, 0xe7, 0x10, 0x66, 0x8c, 0xd8, 0x66, 0xe7, 0x10, 0x89, 0xe0, 0xe7, 0x10, 0xf4];
        let trace = run_bytes(&code, &words).expect(0).trace();
        assert_eq!(trace[0], "out 0x0010 ← 0x0008 (2 bytes, no device)");
        assert_eq!(trace[1], "out 0x0010 ← 0x0010 (2 bytes, no device)");
        assert_eq!(trace[2], "out 0x0010 ← 0x01000000 (4 bytes, no device)");
    }
}

#[test]
fn the_debug_console_is_where_it_is_asked_for() {
    if !kvm() {
        return;
    }
    // mov al, 'x'; out 0xe9, al; hlt
    let code = [0xb0, b'x', 0xe6, 0xe9, 0xf4];
    run_bytes(&code, "--debugcon").expect(0).printed("x").said_nothing();
    run_bytes(&code, "").expect(0).printed("").said("no device answers: 1, the first: out 0x00e9");
    run_bytes(&code, "--debugcon pio:0xe9 --serial none").expect(0).printed("x");
    // mov byte [rsi], 'm'; hlt
    let store = [0xc6, 0x06, b'm', 0xf4];
    let words = "--cpu-mode long --debugcon mmio:0xd0000000 --reg rsi=0xd0000000 --until m";
    run_bytes(&store, words).expect(0).printed("m");
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
    // in al, 0x71 after index 0x40 would be state; RAM is fresh each time, so the guest counts on the trace: each life
    // writes once to port 0x10, then resets.
    let code = [0xb0, 0x01, 0xe6, 0x10, 0xb0, 0xfe, 0xe6, 0x64, 0xf4];
    run_bytes(&code, "").expect(0);
    let outcome = run_bytes(&code, "--reboot --max-exits 7 --trace");
    outcome.expect(124);
    let writes = outcome.trace().iter().filter(|l| l.starts_with("out 0x0010")).count();
    assert!(writes >= 3, "{writes}");
}

#[test]
fn a_guest_that_may_ask_is_told_its_cpu() {
    if !kvm() {
        return;
    }
    // xor eax,eax; cpuid; out 0xf4,al: the highest leaf, without the exit status's own bit.
    let ask = [0x66, 0x31, 0xc0, 0x0f, 0xa2, 0xe6, 0xf4];
    assert!(run_bytes(&ask, "").status > 3);
    run_bytes(&ask, "--cpuid none").expect(1);
    // Long mode with RAM beyond 36 bits of address: the width comes from CPUID. mov al,5; mov [rsi],al; out 0xf4,al
    let far = [0xb0, 0x05, 0x88, 0x06, 0xe6, 0xf4];
    run_bytes(&far, "--cpu-mode long --memory 80G --reg rsi=0x1400000000").expect(11);
    run_bytes(&far, "--cpu-mode long --memory 4M --ram-base 0x200000000 --load-at 0x200000000 --reg rsi=0x200001000")
        .expect(11);
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
    let outcome = example("hello-long", "--hugepages --memory 8M").run();
    let refused = example("hello-long", "--hugepages --memory 8G").run();
    let odd = example("hello-long", "--hugepages --memory 3M").run();
    std::fs::write(pool, before.trim()).unwrap();
    refused.refused(125).said("huge pages").said("nr_hugepages");
    odd.refused(125).said("page size");
    if there < 8 {
        return common::skipped("the host has no 8 huge pages to spare");
    }
    outcome.expect(0).printed("Hello from long mode\n");
}
