//! Systems A, B and C.

use crate::common::{bantam, host_is_emulated, kvm, run_bytes, skipped};

/// `xor ax,ax; L: out 0x10,ax; inc ax; jmp L`.
const COUNTER: &[u8] = &[0x31, 0xc0, 0xe7, 0x10, 0x40, 0xeb, 0xfb];
/// `in ax,0x10; jmp`.
const READER: &[u8] = &[0xe5, 0x10, 0xeb, 0xfc];
const ADDER: &[u8] = &[0xba, 0xf8, 0x03, 0x00, 0xd8, 0x04, 0x30, 0xee, 0xb0, 0x0a, 0xee, 0xf4];

const COUNTED: [&str; 4] = [
    "out 0x0010 ← 0x0000 (2 bytes, no device)",
    "out 0x0010 ← 0x0001 (2 bytes, no device)",
    "out 0x0010 ← 0x0002 (2 bytes, no device)",
    "out 0x0010 ← 0x0003 (2 bytes, no device)",
];

#[test]
fn system_a_counts_from_the_sensible_start() {
    if !kvm() {
        return;
    }
    let words = "--memory 512000000 --load-at 0x10000 --entry 0x1000:0 --trace --max-exits 4";
    let outcome = run_bytes(COUNTER, words);
    outcome.expect(124).printed("").said("--max-exits");
    assert_eq!(outcome.trace(), COUNTED);
}

/// The code is at 0, the CPU starts at 0x10000: it runs through 64 KiB of zeroes, off the end of the segment, and gets
/// to 0:0 by way of the zeroes where the general-protection vector should be.
#[test]
fn system_a_counts_from_its_published_start() {
    if !kvm() {
        return;
    }
    if host_is_emulated() {
        return skipped("QEMU's TCG wraps IP at the end of a segment");
    }
    let segments =
        "--reg ss=0x1000 --reg ds=0x1000 --reg es=0x1000 --reg fs=0x1000 --reg gs=0x1000 --reg rsp=0xffffffff";
    let words = format!("--memory 512000000 --load-at 0 --entry 0x1000:0 {segments} --trace --max-exits 4");
    let outcome = run_bytes(COUNTER, &words);
    outcome.expect(124).printed("");
    assert_eq!(outcome.trace(), COUNTED);
}

#[test]
fn system_as_second_guest_reads_the_empty_bus() {
    if !kvm() {
        return;
    }
    let outcome = run_bytes(READER, "--load-at 0x10000 --entry 0x1000:0 --trace --max-exits 2");
    outcome.expect(124);
    assert_eq!(outcome.trace(), ["in 0x0010 → 0xffff (2 bytes, no device)"; 2]);
}

#[test]
fn system_b_adds_on_one_page_of_ram() {
    if !kvm() {
        return;
    }
    let outcome = run_bytes(ADDER, "--memory 4K --ram-base 0x1000 --reg rax=2 --reg rbx=2 --trace");
    outcome.expect(0).printed("4\n");
    let trace = ["out 0x03f8 ← 0x34 (1 bytes, serial.THR)", "out 0x03f8 ← 0x0a (1 bytes, serial.THR)", "hlt"];
    assert_eq!(outcome.trace(), trace);
    // With the RAM that everyone has, and other numbers.
    run_bytes(ADDER, "--reg rax=3 --reg rbx=4").expect(0).printed("7\n").said_nothing();
}

#[test]
fn system_c_prints_what_nasm_made_of_it() {
    if !kvm() {
        return;
    }
    let mut nasm = ADDER.to_vec();
    nasm[9] = 0x5c;
    run_bytes(&nasm, "--reg rax=2 --reg rbx=2").expect(0).printed("4\\");
    run_bytes(ADDER, "--reg rax=2 --reg rbx=2").expect(0).printed("4\n");
}

/// System E's calls that only x86 has.
#[test]
fn system_es_pc_parts_are_in_check() {
    if !kvm() {
        return;
    }
    let out = bantam("check").run().expect(0).out();
    assert!(out.contains("MSRs to save") && out.contains("KVM_CAP_IRQCHIP"), "{out}");
}
