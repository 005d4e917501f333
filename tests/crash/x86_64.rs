//! A PC dies of a triple fault, or of what KVM cannot emulate.

use super::{Core, example};
use crate::common::{arch, bantam, kvm};

/// What the registers of a core file then hold: their number in
/// `struct user_regs_struct`, and the value. rip is the seventeenth, rax the eleventh.
pub const CORE: Core = Core {
    guest: "crash-idt",
    note: 336,
    registers: &[(16, 0x100f), (10, 42), (14, 0x400_0000_0000)],
    code: (0x100f, &[0x89, 0x07]),
    besides: Some(0xf800_0000),
};
/// The page walk that each report ends with, and the mode that `echo` runs in.
pub const LAST_WALK: &str = "page walk of rip";
pub const ECHO_MODE: &str = "The CPU was in real mode";
/// This file, which must name every example.
pub const SOURCE: &str = include_str!("x86_64.rs");
pub const AT_LEAST: usize = 20;

/// This host's KVM clears a CPU's registers before it tells of a triple fault.
pub fn loses_registers() -> bool {
    std::path::Path::new("/sys/module/kvm_amd").exists()
}

/// What the report of each says, on every host that keeps the registers: what happened, and what to do.
const TRIPLE_FAULTS: &[(&str, &str, &str)] = &[
    ("crash", "#PF page fault: it reads 0xdeadbeef000, which is not mapped (PML4E 27 is not present)", "load an IDT"),
    ("crash-idt", "gate 14 of the IDT: the IDT at 0x0 has limit 0x0 and ends before it", "load an IDT (lidt)"),
    ("crash-idt-unmapped", "the IDT lies at 0xdead0000000, where no RAM is mapped", "the page tables must map it"),
    ("crash-gates", "at 0x8060 is 0x0000000000000000, which is no interrupt or trap gate", "present bit"),
    ("crash-handler", "0xdea00000000 is what the IDT names as the handler of #UD", "rip is where no code can be"),
    ("crash-gdt", "selector 0x10 lies beyond the GDT at 0x0, whose limit is 0x0", "load a GDT (lgdt)"),
    ("crash-stack", "it uses the stack, and 0x7fffeffffff8 is not mapped", "give rsp the end of memory"),
    (
        "crash-tables",
        "there is no instruction to fetch: 0x1008 is not mapped (PML4E 0 is",
        "page tables that do not map",
    ),
    ("crash-readonly", "it writes 0x200000, which is in a page that may not be written", "load an IDT"),
    ("crash-noexec", "0x200000 is in a page that may not be executed (XD set)", "rip is where no code can be"),
    ("crash-zeroes", "The bytes there are zeroes", "a jump through a null pointer"),
    ("crash-load-address", "nothing was loaded at this address", "--load-at"),
    ("crash-sse", "#UD invalid opcode: it is an SSE instruction, and CR4.OSFXSR is clear", "-mno-sse"),
    ("crash-div0", "#DE divide error: it divides by zero", "load an IDT"),
    ("crash-ud", "#UD invalid opcode: ud2", "a panic, an abort"),
    ("crash-canonical", "it reads 0x1234567890abcdef, which is not a canonical address", "load an IDT"),
    ("crash-msr", "it writes 0x1 to MSR 0x12345678", "load an IDT"),
    ("crash-iret", "the selector of the code segment is 0", "load a GDT"),
    ("crash-ltr", "selector 0x28 lies beyond the GDT at 0xf8000000, whose limit is 0x17", "load a GDT"),
];

#[test]
fn every_triple_fault_is_told_by_its_cause() {
    if !kvm() {
        return;
    }
    for told in TRIPLE_FAULTS {
        is_told(told);
    }
}

#[test]
fn paging_for_long_mode_without_pae_is_told_by_its_cause() {
    if !kvm() {
        return;
    }
    if crate::common::host_is_emulated() {
        return crate::common::skipped(
            "QEMU's TCG has no fault for it, and its CPU never comes back from such a guest",
        );
    }
    is_told(&("crash-pae", "it turns paging on for long mode (EFER.LME) without CR4.PAE", "in this order: CR4.PAE"));
}

fn is_told((name, cause, hint): &(&str, &str, &str)) {
    let outcome = example(name);
    outcome.expect(126).printed("").said("KVM_EXIT_SHUTDOWN").said("what happened").said("\nvCPU 0");
    if loses_registers() {
        outcome.said("this host's KVM resets a CPU's registers at a triple fault");
    } else {
        outcome.said(cause).said(hint).said("page walk of rip").said("a triple fault");
    }
}

/// Where KVM emulates, the emulator gives up; where a CPU runs it, it faults.
#[test]
fn what_kvm_cannot_emulate_is_told_by_its_cause() {
    if !kvm() {
        return;
    }
    for (name, emulated, run) in [
        ("crash-vex", "no VEX", "it is an AVX instruction, and CR4.OSXSAVE is clear"),
        ("crash-int", "for want of gate 128: the IDT at 0x0 has limit 0x0", "int 0x80 asks for it"),
    ] {
        let outcome = example(name);
        outcome.expect(126);
        if arch::must_emulate() {
            outcome.said("KVM_INTERNAL_ERROR_EMULATION").said(emulated);
        } else if !loses_registers() {
            outcome.said(run);
        }
    }
    example("crash-past").expect(126).said("No RAM is there").said("has run or jumped out of its RAM");
}

#[test]
fn the_page_has_all_its_parts() {
    if !kvm() || loses_registers() {
        return;
    }
    let outcome = example("crash-idt");
    for part in [
        "  cr0: PE MP ET NE PG",
        "  cr4: PAE OSFXSR OSXMMEXCPT",
        "  efer: LME LMA",
        "interrupts off, IOPL 0",
        "64-bit code, ring 0",
        "page walk of rip 0x100f",
        "  PDE[0] at 0xf8003000 = 0xe3: P RW A D PS",
        "page walk of cr2 0x40000000000",
        "PML4E[8] at 0xf8001040 = 0x0: not present",
        "not mapped: PML4E 8 is not present",
        "→ 0x000000100f  89 07",
        "mov [rdi], eax",
        "mov eax, 0x2a",
        "instructions",
    ] {
        outcome.said(part);
    }
}

#[test]
fn a_report_shows_the_last_exits_unless_told_not_to() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let outcome = bantam(&format!("example crash --core={}", dir.path().join("core").display())).run();
    outcome.expect(126).said("the last exits, the newest last\n  cpu0 shutdown  pc 0x");
    let outcome = bantam("example crash --last-exits off --timeout 20").run();
    assert!(!outcome.expect(126).stderr.contains("the last exits, the newest last"));
    // Without a word the CPU keeps them itself, with the names of devices.
    example("crash").expect(126).said("the last exits, the newest last\n  cpu0 shutdown");
}
