//! Real, protected and long mode; ports; multiboot.

use super::{example, test_guest};
use crate::common::{file, kvm, run_bytes};

#[test]
fn the_guest_sees_a_cpu_with_long_mode() {
    if !kvm() {
        return;
    }
    let out = example("cpuid", "").run().expect(0).out();
    assert!(out.contains("long mode: yes"), "{out}");
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
fn a_halted_machine_ends_though_a_timer_ticks() {
    if !kvm() {
        return;
    }
    // The local APIC's timer, periodic: spurious vector and enable, divide by 1, LVT, initial count. Each 20 ms, since a
    // tick each millisecond keeps the CPU of a test host busy.
    let mut code = Vec::new();
    for (register, value) in
        [(0xfee0_00f0u32, 0x1ffu32), (0xfee0_03e0, 0xb), (0xfee0_0320, 0x2_0020), (0xfee0_0380, 20_000_000)]
    {
        code.extend([0xc7, 0x05]);
        code.extend(register.to_le_bytes());
        code.extend(value.to_le_bytes());
    }
    code.extend([0xfa, 0xf4]);
    run_bytes(&code, "--cpu-mode protected --irqchip kernel --timeout 5").expect(0);
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
fn a_halt_with_interrupts_on_and_no_irqchip_ends_with_a_hint() {
    if !kvm() {
        return;
    }
    test_guest("halt-if-on", "--irqchip none").expect(0).said("--irqchip kernel");
}

#[test]
fn p16_a_triple_fault_resets_a_machine_that_may_reboot() {
    if !kvm() {
        return;
    }
    let outcome = example("crash", "--reboot --timeout 0.7").run();
    outcome.expect(124).said("KVM_EXIT_SHUTDOWN");
    assert_eq!(outcome.stderr.matches("the guest died").count(), 1, "one report a second");
}

#[test]
fn an_io_apic_of_our_own_leaves_local_apics_to_kvm() {
    if !kvm() {
        return;
    }
    let outcome = example("smp", "--irqchip split --cpus 3").run();
    assert_eq!(outcome.expect(0).out().lines().count(), 3);
}

#[test]
fn a_trace_knows_where_the_guest_is_in_every_mode() {
    if !kvm() {
        return;
    }
    let places = [0x1040u64, 0x80_0000_1080, 0x80_0000_1082, 0x10c0, 0x1100];
    for words in ["--trace", "--trace --trace-insn"] {
        let outcome = test_guest("high-and-low", words);
        let lines: Vec<_> = outcome.expect(0).stderr.lines().filter(|line| line.contains(" out ")).collect();
        assert_eq!(lines.len(), places.len(), "{lines:?}");
        for (line, place) in lines.into_iter().zip(places) {
            // Past the instruction or at it, as the host has it.
            let pc = [place, place + 2].map(|pc| format!(", pc {pc:#x}"));
            assert!(pc.iter().any(|pc| line.split(": out").next().unwrap().ends_with(pc)), "{line}: {place:#x}");
            assert!(!words.ends_with("insn") || line.ends_with(", al"), "{line}");
        }
    }
}

#[test]
fn the_last_part_of_an_instruction_may_stop_a_machine_that_is_being_stopped() {
    use bantam::arch::BootRegs;
    use bantam::bus::{Builder, Space};
    use bantam::device::debug_exit::DebugExit;
    use bantam::memory::{Memory, Span};
    use bantam::vcpu::{Stop, dispatch};
    if !kvm() {
        return;
    }
    // mov eax, 0x12345678; mov [0x2ffe], eax: two bytes to the end of a page, two to the device on the next.
    let code = [0x66, 0xb8, 0x78, 0x56, 0x34, 0x12, 0x66, 0xa3, 0xfe, 0x2f, 0xf4];
    let memory = Memory::new(&[Span { start: 0x1000, size: 0x1000 }], false).unwrap();
    memory.write(0x1000, &code).unwrap();
    let vm = bantam::vm::Vm::new(0).unwrap();
    vm.map(&memory).unwrap();
    let mut builder = Builder::default();
    builder.place(Space::Mmio, Span { start: 0x3000, size: 4 }, DebugExit).unwrap();
    let buses = builder.finish();
    let mut vcpu = vm.vcpu(0).unwrap();
    let mut boot = BootRegs::real();
    boot.regs.rip = 0x1000;
    vcpu.enter(&boot).unwrap();
    dispatch(&mut vcpu.run(), &buses);
    assert_eq!(vcpu.settle(&buses), Some(Stop::DebugExit(0x1234)));
    assert_eq!(vcpu.settle(&buses), None);
}
