//! Looking at a CPU: its registers as text, where it is, whether anything can wake it.

use std::fmt;
use std::io;

use anyhow::{Context, Result};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;

use super::boot::cr0;
use crate::memory::Memory;

/// RFLAGS.IF.
const INTERRUPTS: u64 = 1 << 9;

/// The registers that a report shows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
}

impl CpuState {
    /// Asks KVM for them.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn read(fd: &VcpuFd) -> Result<Self> {
        let regs = fd.get_regs().map_err(io::Error::from).context("KVM_GET_REGS")?;
        let sregs = fd.get_sregs().map_err(io::Error::from).context("KVM_GET_SREGS")?;
        Ok(Self { regs, sregs })
    }

    /// The linear address of the next instruction.
    pub fn pc(&self) -> u64 {
        let pc = self.sregs.cs.base.wrapping_add(self.regs.rip);
        if self.sregs.cs.l == 1 { self.regs.rip } else { pc & 0xffff_ffff }
    }

    /// The CPU is in its state after power-on (Intel SDM vol. 3, table 10-1): SVM puts it there at a triple fault, so
    /// the registers of the fault are lost.
    pub fn is_after_reset(&self) -> bool {
        self.regs.rip == 0xfff0 && self.sregs.cs.base == 0xffff_0000
    }

    /// The mode, in words.
    pub fn mode(&self) -> &'static str {
        match (self.sregs.cr0 & cr0::PE != 0, self.sregs.efer & 1 << 10 != 0, self.sregs.cs) {
            (false, ..) => "real mode",
            (true, true, kvm_segment { l: 1, .. }) => "64-bit mode",
            (true, true, _) => "compatibility mode",
            (true, false, kvm_segment { db: 1, .. }) => "32-bit protected mode",
            _ => "16-bit protected mode",
        }
    }
}

impl fmt::Display for CpuState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (r, s) = (&self.regs, &self.sregs);
        let rows = [
            [("rax", r.rax), ("rbx", r.rbx), ("rcx", r.rcx), ("rdx", r.rdx)],
            [("rsi", r.rsi), ("rdi", r.rdi), ("rbp", r.rbp), ("rsp", r.rsp)],
            [("r8 ", r.r8), ("r9 ", r.r9), ("r10", r.r10), ("r11", r.r11)],
            [("r12", r.r12), ("r13", r.r13), ("r14", r.r14), ("r15", r.r15)],
            [("rip", r.rip), ("flg", r.rflags), ("cr0", s.cr0), ("cr2", s.cr2)],
            [("cr3", s.cr3), ("cr4", s.cr4), ("efr", s.efer), ("apc", s.apic_base)],
        ];
        for row in rows {
            let words: Vec<_> = row.iter().map(|(name, value)| format!("{name} {value:016x}")).collect();
            writeln!(f, "  {}", words.join("  "))?;
        }
        for (name, segment) in [("cs", s.cs), ("ss", s.ss), ("ds", s.ds), ("es", s.es), ("fs", s.fs), ("gs", s.gs)] {
            let kvm_segment { selector, base, limit, type_, .. } = segment;
            writeln!(f, "  {name} {selector:04x} base {base:016x} limit {limit:08x} type {type_:x}")?;
        }
        let (gdt, idt) = (s.gdt, s.idt);
        write!(
            f,
            "  gdt base {:016x} limit {:04x}  idt base {:016x} limit {:04x}",
            gdt.base, gdt.limit, idt.base, idt.limit
        )
    }
}

/// The guest-physical address behind a linear one, as the CPU's own page tables have it now.
pub fn translate(fd: &VcpuFd, _memory: &Memory, linear: u64) -> Option<u64> {
    fd.translate_gva(linear).ok().filter(|t| t.valid != 0).map(|t| t.physical_address)
}

/// A CPU of a PC that has lost its way shuts down.
pub fn lost(_fd: &VcpuFd) -> Option<String> {
    None
}

/// The CPU would take a maskable interrupt.
fn interrupts_on(fd: &VcpuFd) -> bool {
    fd.get_regs().is_ok_and(|regs| regs.rflags & INTERRUPTS != 0)
}

/// The CPU is halted with interrupts off, or waits for a start-up IPI: only another CPU could wake it.
pub fn halted_for_good(fd: &VcpuFd) -> bool {
    match fd.get_mp_state().map(|state| state.mp_state) {
        Ok(KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED) => true,
        Ok(KVM_MP_STATE_HALTED) => !interrupts_on(fd),
        _ => false,
    }
}
