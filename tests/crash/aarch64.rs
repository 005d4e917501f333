//! An arm64 CPU does not die of an exception. It goes to a vector, and Bantam finds it there.

use super::{Core, example};
use std::time::Duration;

use crate::common::{kvm, run_bytes, within};

/// What the registers of a core file hold after a death: their number in `struct user_pt_regs` (x0 is the first, pc the
/// thirty-third), and the value.
pub const CORE: Core = Core {
    guest: "crash-translation",
    note: 392,
    registers: &[(32, 0x4000_0a00), (1, 0x2_0000_0000), (9, 0x4001_0000)],
    code: (0x4000_0070, &[0x20, 0x00, 0x40, 0xf9]),
    besides: Some(0x090c_0000),
};
/// The page walk that each report ends with, and the mode that `echo` runs in.
pub const LAST_WALK: &str = "page walk of pc";
pub const ECHO_MODE: &str = "The CPU was in EL1, MMU off";
/// This file, which must name every example.
pub const SOURCE: &str = include_str!("aarch64.rs");
pub const AT_LEAST: usize = 15;

pub fn loses_registers() -> bool {
    false
}

/// What the report of each says: what happened, and what to do.
const EXCEPTIONS: &[(&str, &str, &str)] = &[
    ("crash-vectors", "VBAR_EL1 is 0x0), whose first instruction takes an exception", "nobody has set a vector table"),
    ("crash-vectors-unmapped", "VBAR_EL1 is 0xdead0000)", "VBAR_EL1 is 0xdead0000, where no RAM is"),
    ("crash-vectors-empty", "at 0x40000a00: udf #0x0", "the vector table at 0x40000800 holds zeroes"),
    (
        "crash-tables",
        "EL1, MMU on, at 0x40000a00 (nothing to be read there)",
        "which the page tables do not map: the level 1 entry 1 is not valid",
    ),
    (
        "crash-stack",
        "it writes 0xfffffffffffffff0: a translation fault at level 0",
        "the address is at the stack pointer, 0x0",
    ),
    ("crash-undefined", "The exception came at 0x40000010: udf #0x2a", "udf is what compilers put"),
    ("crash-zeroes", "The exception came at 0x40010800: udf #0x0", "a jump through a null pointer"),
    ("crash-jump", "there is no instruction to fetch at 0xdead000: an external abort", "where no code can be"),
    ("crash-pc", "The exception came at 0x40000802\n", "instructions are at multiples of 4"),
    // Whether it reads or writes is left out: of a load with FEAT_LSE2 QEMU says that it writes.
    ("crash-unaligned", " 0x40000c0f: an alignment fault", "-mstrict-align"),
    (
        "crash-translation",
        "it reads 0x200000000: a translation fault at level 1: no table entry (the level 1 entry 8 is not valid)",
        "the entry that is missing",
    ),
    ("crash-permission", "it writes 0x100000100: a permission fault at level 1", "bit 7 of the entry"),
    ("crash-noexec", "no instruction to fetch at 0x100000000: a permission fault at level 1", "PXN (bit 53)"),
    ("crash-brk", "It is: BRK #0x1", "look at the callers"),
    ("crash-el", "It is: illegal execution state", "There is no EL2 or EL3 to return to"),
    ("crash-sysreg", "mrs x0, s3_4_c1_c1_0", "the guest runs at EL1"),
    ("crash-fpu", "floating point or SIMD switched off (CPACR_EL1.FPEN)", "-mgeneral-regs-only"),
];

#[test]
fn every_exception_is_told_by_its_cause() {
    if !kvm() {
        return;
    }
    for (name, cause, hint) in EXCEPTIONS {
        let outcome = example(name);
        outcome
            .expect(126)
            .printed("")
            .said("the guest died: vCPU 0: an exception")
            .said("\nvCPU 0")
            .said(cause)
            .said(hint);
        assert!(outcome.took < within(2.0), "{name}: {:?}", outcome.took);
    }
    example("crash").expect(126).said("KVM_EXIT_ARM_NISV").said("use plain ldr and str");
}

/// Nothing of what is looked for without a watchdog is so here; with one, which these examples have, ESR_EL1 and FAR_EL1
/// are seen not to change while the CPU is in its vectors.
#[test]
fn a_handler_that_faults_is_found_by_the_watchdog() {
    if !kvm() {
        return;
    }
    let outcome = example("crash-handler");
    outcome.expect(126).printed("").said("the guest died: vCPU 0: an exception that does not end");
    outcome.said("The exception came at 0x40000a04: udf #0x9").said("enters the handler anew, for ever");
    assert!(!outcome.stderr.contains("is stalled"), "{}", outcome.stderr);
    assert!(outcome.took >= Duration::from_secs(1) && outcome.took < within(4.0), "{:?}", outcome.took);
    // Without one nobody finds it.
    let handler = (guests::find("crash-handler").unwrap().image)();
    run_bytes(handler, &format!("--timeout {}", within(1.5).as_secs_f64())).expect(124);
    // Whoever waits for an interrupt in a handler, or makes exits there, is not lost.
    let words = format!("--watchdog 0.4 --timeout {}", within(1.5).as_secs_f64());
    run_bytes((guests::find("timer").unwrap().image)(), &words).expect(7);
}

#[test]
fn the_page_has_all_its_parts() {
    if !kvm() {
        return;
    }
    let outcome = example("crash-translation");
    for part in [
        "sctlr: M",
        "MMU on",
        "pstate: EL1, stack SP_EL1",
        "masked [DAIF]",
        "the last exception to EL1: data abort, at 0x40000070",
        "→ 0x0040000070  20 00 40 f9",
        "→ 0x0040000a00  00 00 00 14",
        "page walk of far 0x200000000",
        "L1[8] at 0x40010040 = 0x0: not valid",
        "→ not mapped: the level 1 entry 8 is not valid",
        "L1[1] at 0x40010008 = 0x40000705: block, read-write",
    ] {
        outcome.said(part);
    }
}
