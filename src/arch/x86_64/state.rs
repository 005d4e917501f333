//! Looking at a CPU: its registers as text, where it is, whether anything can wake it.

use std::io;

use anyhow::{Context, Result};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, kvm_regs,
    kvm_segment, kvm_sregs,
};
use kvm_ioctls::{SyncReg, VcpuFd};

use super::boot::cr0;
use crate::bus::FaultInfo;
use crate::memory::Memory;

/// RFLAGS.IF.
const INTERRUPTS: u64 = 1 << 9;

/// The registers that a report shows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CpuState {
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    /// The exception that KVM was about to deliver: its vector and error code.
    pub(super) event: Option<(u8, Option<u32>)>,
}

impl CpuState {
    /// Asks KVM for them.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn read(fd: &VcpuFd) -> Result<Self> {
        let regs = fd.get_regs().map_err(io::Error::from).context("KVM_GET_REGS")?;
        let sregs = fd.get_sregs().map_err(io::Error::from).context("KVM_GET_SREGS")?;
        let event = fd.get_vcpu_events().ok().map(|events| events.exception);
        let event = event.filter(|e| e.injected != 0 || e.pending != 0);
        let event = event.map(|e| (e.nr, (e.has_error_code != 0).then_some(e.error_code)));
        Ok(Self { regs, sregs, event })
    }

    /// The linear address of the next instruction.
    pub fn pc(&self) -> u64 {
        linear(&self.sregs.cs, self.regs.rip)
    }

    /// The CPU is in its state after power-on (Intel SDM vol. 3, table 10-1): SVM puts it there at a triple fault, so
    /// the registers of the fault are lost.
    pub fn is_after_reset(&self) -> bool {
        self.regs.rip == 0xfff0 && self.sregs.cs.base == 0xffff_0000
    }

    /// The registers in the order of Linux's `struct user_regs_struct`.
    pub fn core_registers(&self) -> Vec<u64> {
        let (r, s) = (&self.regs, &self.sregs);
        let general =
            [r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx, r.rdx, r.rsi, r.rdi];
        let selector = |segment: &kvm_segment| u64::from(segment.selector);
        let rest = [u64::MAX, r.rip, selector(&s.cs), r.rflags, r.rsp, selector(&s.ss), s.fs.base, s.gs.base];
        let segments = [&s.ds, &s.es, &s.fs, &s.gs].map(selector);
        general.into_iter().chain(rest).chain(segments).collect()
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

/// The linear address of an instruction.
fn linear(cs: &kvm_segment, rip: u64) -> u64 {
    if cs.l == 1 { rip } else { cs.base.wrapping_add(rip) & 0xffff_ffff }
}

/// Lets KVM show the registers in `kvm_run` at each exit, for [`pc`].
pub fn show_pc(fd: &mut VcpuFd) {
    fd.set_sync_valid_reg(SyncReg::Register);
    fd.set_sync_valid_reg(SyncReg::SystemRegister);
}

/// Where the guest is, as of its last exit: the linear address of the next instruction, or of the one that exited.
/// `whole`: [`seen`] will be asked too.
///
/// That address takes the base of CS, one of the system registers, which KVM collects for longer than all the rest. But
/// rip has more than 32 bits in 64-bit mode only (SDM vol. 3, *Checks on Guest RIP*), where the base is none. So while
/// a guest is up there, as a kernel mostly is, KVM shows the general registers alone; when it comes down it is asked.
pub fn pc(fd: &mut VcpuFd, whole: bool) -> u64 {
    if !shows(fd, SyncReg::Register) {
        return seen(fd).map_or(0, |state| state.pc());
    }
    let shown = shows(fd, SyncReg::SystemRegister);
    let sync = fd.sync_regs_mut();
    let rip = sync.regs.rip;
    match (rip > u64::from(u32::MAX), shown) {
        (true, _) => {
            if !whole {
                fd.clear_sync_valid_reg(SyncReg::SystemRegister);
            }
            rip
        }
        (false, true) => linear(&sync.sregs.cs, rip),
        (false, false) => seen(fd).map_or(0, |state| state.pc()),
    }
}

fn shows(fd: &mut VcpuFd, registers: SyncReg) -> bool {
    fd.get_kvm_run().kvm_valid_regs & registers as u64 != 0
}

/// The registers as of the last exit.
pub fn seen(fd: &mut VcpuFd) -> Option<CpuState> {
    if !shows(fd, SyncReg::Register) {
        return CpuState::read(fd).ok();
    }
    let shown = shows(fd, SyncReg::SystemRegister);
    fd.set_sync_valid_reg(SyncReg::SystemRegister);
    let sync = fd.sync_regs();
    let sregs = if shown { sync.sregs } else { fd.get_sregs().ok()? };
    Some(CpuState { regs: sync.regs, sregs, event: None })
}

/// A CPU of a PC that has lost its way shuts down.
pub fn lost(_fd: &VcpuFd, _memory: Option<&Memory>) -> Option<FaultInfo> {
    None
}

/// An exception in the handler of an exception ends in a shutdown.
pub fn trapped(_fd: &VcpuFd) -> Option<([u64; 2], FaultInfo)> {
    None
}

/// The CPU runs no instructions: it waits for an interrupt, or to be started.
pub fn rests(fd: &VcpuFd, _memory: Option<&Memory>) -> bool {
    fd.get_mp_state().is_ok_and(|state| state.mp_state != KVM_MP_STATE_RUNNABLE)
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

/// Tells the guest that its CPU was stopped for a while, so that it takes the gap for no stall (KVM_KVMCLOCK_CTRL).
pub fn was_stopped(fd: &VcpuFd) {
    // Fails for a guest that has no kvmclock, which nobody can tell then.
    let _ = fd.kvmclock_ctrl();
}
