//! What a dead guest leaves behind: which CPU died, why, every CPU's registers, the bytes it was at.
//!
//! Invariant: everything printed is numbers and our own words; reading guest memory is bounded and never fails the report.

use std::fmt::Write;

use crate::arch;
use crate::bus::FaultInfo;
use crate::memory::Memory;
use crate::vcpu::Vcpu;

/// Bytes shown at the program counter.
const WINDOW: usize = 16;

/// The report of a guest that died on CPU `cpu`.
pub fn death(cpu: u32, fault: &FaultInfo, vcpus: &[Vcpu], memory: &Memory) -> String {
    let mut text = format!("bantam: the guest died: vCPU {cpu}: {}: {}", fault.name, fault.detail);
    if !fault.bytes.is_empty() {
        let _ = write!(text, "\n  KVM could not emulate: {}", hex(&fault.bytes));
    }
    for vcpu in vcpus {
        let _ = write!(text, "\nvCPU {}", vcpu.id());
        match vcpu.state() {
            Err(e) => {
                let _ = write!(text, ": no registers: {e:#}");
            }
            Ok(state) => {
                let pc = state.pc();
                let _ = write!(
                    text,
                    ": {}, at {pc:#x}\n{state}\n  bytes there: {}",
                    state.mode(),
                    bytes_at(vcpu, memory, pc)
                );
                if vcpu.id() == cpu && state.is_after_reset() {
                    text.push_str(
                        "\n  these are a CPU's registers after power-on: this host's KVM resets them at a triple fault",
                    );
                }
            }
        }
    }
    text
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ")
}

/// The bytes at a linear address, page by page, as far as they are mapped RAM.
fn bytes_at(vcpu: &Vcpu, memory: &Memory, linear: u64) -> String {
    let read = |i: usize| {
        let physical = arch::translate(vcpu.fd(), memory, linear.checked_add(i as u64)?)?;
        let mut byte = [0];
        memory.read(physical, &mut byte).ok().map(|()| byte[0])
    };
    let bytes: Vec<u8> = (0..WINDOW).map_while(read).collect();
    if bytes.is_empty() { "none (not mapped, or not RAM)".into() } else { hex(&bytes) }
}
