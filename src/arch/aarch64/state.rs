//! Looking at a CPU: its registers as text, where it is, whether anything can wake it.

use std::fmt;

use anyhow::Result;
use kvm_bindings::KVM_MP_STATE_STOPPED;
use kvm_ioctls::VcpuFd;

use super::paging::Tables;
use super::registers::{
    CNTP_CTL_EL0, CNTV_CTL_EL0, ELR_EL1, ESR_EL1, FAR_EL1, MAIR_EL1, PC, PSTATE, SCTLR_EL1, SP_EL0, SP_EL1, SPSR_EL1,
    TCR_EL1, TTBR0_EL1, TTBR1_EL1, VBAR_EL1, get, x,
};
use crate::bus::FaultInfo;
use crate::memory::Memory;

/// The instruction WFI (Arm ARM C6.2.471).
const WAIT: u32 = 0xd503_207f;

/// The registers that a report shows.
#[derive(Debug, Clone, PartialEq)]
pub struct CpuState {
    pub(super) x: [u64; 31],
    pc: u64,
    pub(super) pstate: u64,
    pub(super) sp: [u64; 2],
    /// By name, in the order of the report.
    system: Vec<(&'static str, u64)>,
}

impl CpuState {
    /// Asks KVM for them.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn read(fd: &VcpuFd) -> Result<Self> {
        let system = [
            ("elr", ELR_EL1),
            ("spsr", SPSR_EL1),
            ("esr", ESR_EL1),
            ("far", FAR_EL1),
            ("vbar", VBAR_EL1),
            ("sctlr", SCTLR_EL1),
            ("tcr", TCR_EL1),
            ("mair", MAIR_EL1),
            ("ttbr0", TTBR0_EL1),
            ("ttbr1", TTBR1_EL1),
        ];
        let mut general = [0; 31];
        for (number, slot) in (0..).zip(&mut general) {
            *slot = get(fd, x(number))?;
        }
        Ok(Self {
            x: general,
            pc: get(fd, PC)?,
            pstate: get(fd, PSTATE)?,
            sp: [get(fd, SP_EL0)?, get(fd, SP_EL1)?],
            system: system.into_iter().map(|(name, id)| Ok((name, get(fd, id)?))).collect::<Result<_>>()?,
        })
    }

    /// A system register of the report.
    pub(super) fn system(&self, wanted: &str) -> u64 {
        self.system.iter().find(|(name, _)| *name == wanted).map_or(0, |(_, value)| *value)
    }

    /// The address of the next instruction.
    pub fn pc(&self) -> u64 {
        self.pc
    }

    /// KVM keeps a CPU's registers here, whatever it died of.
    pub fn is_after_reset(&self) -> bool {
        false
    }

    /// The mode, in words.
    pub fn mode(&self) -> &'static str {
        let mmu = self.system.iter().any(|(name, value)| *name == "sctlr" && value & 1 == 1);
        match (self.pstate & 0x1f, mmu) {
            (0x10.., _) => "AArch32",
            (0, false) => "EL0, MMU off",
            (0, true) => "EL0, MMU on",
            (_, false) => "EL1, MMU off",
            (_, true) => "EL1, MMU on",
        }
    }
}

/// Exception classes that guests die of (Arm ARM D24.2.40, ESR_EL1.EC).
pub(super) fn exception(esr: u64) -> Option<&'static str> {
    Some(match esr >> 26 & 0x3f {
        0x00 => "unknown or undefined instruction",
        0x01 => "trapped WFI or WFE",
        0x07 => "floating point or SIMD switched off (CPACR_EL1.FPEN)",
        0x0e => "illegal execution state",
        0x15 => "SVC",
        0x18 => "trapped system register access",
        0x20 | 0x21 => "instruction abort",
        0x22 => "misaligned program counter",
        0x24 | 0x25 => "data abort",
        0x26 => "misaligned stack pointer",
        0x2f => "SError",
        0x3c => "BRK",
        _ => return None,
    })
}

impl fmt::Display for CpuState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let general = self.x.iter().enumerate().map(|(i, value)| (format!("x{i}"), *value));
        let [sp_el0, sp_el1] = self.sp;
        let special = [("sp_el0", sp_el0), ("sp_el1", sp_el1), ("pc", self.pc), ("pstate", self.pstate)];
        let special = special.into_iter().chain(self.system.iter().copied()).map(|(name, v)| (name.to_owned(), v));
        let all: Vec<_> = general.chain(special).map(|(name, value)| format!("{name:6} {value:016x}")).collect();
        let rows: Vec<_> = all.chunks(4).map(|row| format!("  {}", row.join("  "))).collect();
        write!(f, "{}", rows.join("\n"))?;
        let of = |wanted| self.system(wanted);
        write!(f, "\n  sctlr: {}", super::story::control(of("sctlr")))?;
        write!(f, "\n  pstate: {}", super::story::flags(self.pstate))?;
        match (of("esr"), exception(of("esr"))) {
            (1.., Some(what)) => write!(f, "\n  the last exception to EL1: {what}, at {:#x}", of("elr")),
            _ => Ok(()),
        }
    }
}

fn tables(fd: &VcpuFd) -> Option<Tables> {
    let get = |id| get(fd, id).ok();
    Some(Tables { sctlr: get(SCTLR_EL1)?, tcr: get(TCR_EL1)?, ttbr: [get(TTBR0_EL1)?, get(TTBR1_EL1)?] })
}

/// The guest-physical address behind a virtual one, as the CPU's own page tables have it now.
pub fn translate(fd: &VcpuFd, memory: &Memory, address: u64) -> Option<u64> {
    tables(fd)?.translate(memory, address)
}

/// A timer that will, or would, raise its interrupt: enabled and not masked.
fn timer_armed(fd: &VcpuFd) -> bool {
    [CNTV_CTL_EL0, CNTP_CTL_EL0].into_iter().any(|timer| get(fd, timer).is_ok_and(|control| control & 3 == 1))
}

fn is_off(fd: &VcpuFd) -> bool {
    fd.get_mp_state().is_ok_and(|state| state.mp_state == KVM_MP_STATE_STOPPED)
}

/// Whether the CPU, which hardly uses any time, looks as if nothing of its own could wake it: it is off, or no timer is
/// armed. That it waits, and that no interrupt is enabled, only [`waiting`] and the interrupt controller can tell, once
/// all CPUs have stopped.
pub fn halted_for_good(fd: &VcpuFd) -> bool {
    is_off(fd) || !timer_armed(fd)
}

/// Nothing to prepare: [`pc`] asks KVM.
pub fn show_pc(_fd: &mut VcpuFd) {}

/// Where the guest is: at the instruction that exited.
pub fn pc(fd: &mut VcpuFd, _whole: bool) -> u64 {
    get(fd, PC).unwrap_or(0)
}

/// The registers as of the last exit.
pub fn seen(fd: &mut VcpuFd) -> Option<CpuState> {
    CpuState::read(fd).ok()
}

/// A branch to itself.
const STAND: u32 = 0x1400_0000;

/// What the CPU is lost in, if it is. It is what a triple fault is on a PC; KVM does not tell. Either the first
/// instruction of its exception handler takes an exception itself, to itself, and so on without end: mostly nobody has
/// set VBAR_EL1, or the stack is gone. Or the handler of a fault is nothing but a branch to itself, and no interrupt can
/// take the CPU out of it.
pub fn lost(fd: &VcpuFd, memory: Option<&Memory>) -> Option<FaultInfo> {
    let get = |id| get(fd, id).ok();
    let (pc, esr, elr, vbar) = (get(PC)?, get(ESR_EL1)?, get(ELR_EL1)?, get(VBAR_EL1)?);
    let slot = slot(pc, vbar)?;
    if is_off(fd) {
        return None;
    }
    // A CPU that starts at 0 looks the same, but has had no exception: KVM leaves a pattern that is none in ESR_EL1.
    let what = exception(esr)?;
    let (name, detail) = if elr == pc {
        (
            ENDLESS,
            format!(
                "the first instruction of its exception handler, at {pc:#x}, takes an exception itself ({what}), for ever"
            ),
        )
    } else {
        let stands =
            esr >> 26 & 0x3f != SVC && get(PSTATE)? & MASKED == MASKED && instruction(fd, memory?, pc) == Some(STAND);
        (
            STANDS,
            stands.then(|| {
                format!("its vector {slot}, at {pc:#x}, branches to itself; the exception is: {what}, at {elr:#x}")
            })?,
        )
    };
    Some(FaultInfo { name: name.into(), detail, bytes: Vec::new() })
}

/// Bytes of the vectors (Arm ARM D1.3.1.3).
const VECTORS: u64 = 0x800;

/// An address lies in the vectors.
pub(super) fn in_vectors(address: u64, vbar: u64) -> bool {
    address.wrapping_sub(vbar) < VECTORS
}

/// The CPU is in its own vectors, and what is there took an exception itself or cannot be interrupted: what it is in, by
/// ESR_EL1 and FAR_EL1, and in words. A handler may be so for a moment; one that is for long, and makes no exit, never ends.
pub fn trapped(fd: &VcpuFd) -> Option<([u64; 2], FaultInfo)> {
    let get = |id| get(fd, id).ok();
    let (pc, elr, vbar) = (get(PC)?, get(ELR_EL1)?, get(VBAR_EL1)?);
    let (esr, far) = (get(ESR_EL1)?, get(FAR_EL1)?);
    let what = exception(esr)?;
    let itself = in_vectors(elr, vbar);
    let stuck = itself || esr >> 26 & 0x3f != SVC && get(PSTATE)? & MASKED == MASKED;
    if !in_vectors(pc, vbar) || !stuck || is_off(fd) {
        return None;
    }
    let who = if itself { ", its own handler's" } else { "" };
    let detail = format!(
        "the CPU does not leave its vectors, where it is at {pc:#x}, and ESR_EL1 and FAR_EL1 do not change; the exception is{who}: {what}, at {elr:#x}"
    );
    Some(([esr, far], FaultInfo { name: CAUGHT.into(), detail, bytes: Vec::new() }))
}

/// Names of deaths.
pub(super) const CAUGHT: &str = "an exception that does not end";
pub(super) const ENDLESS: &str = "an exception without end";
pub(super) const STANDS: &str = "an exception that nobody handles";
/// The exception class of SVC, which asks for something and is no fault.
const SVC: u64 = 0x15;
/// PSTATE with IRQ and FIQ masked.
const MASKED: u64 = 0xc0;

/// The vectors for exceptions from EL1 itself that are no interrupts (Arm ARM D1.3.1.3).
pub(super) fn slot(pc: u64, vbar: u64) -> Option<&'static str> {
    match pc.wrapping_sub(vbar) {
        0 => Some("for synchronous exceptions from EL1 on SP_EL0 (VBAR_EL1)"),
        0x180 => Some("for SError from EL1 on SP_EL0 (VBAR_EL1 + 0x180)"),
        0x200 => Some("for synchronous exceptions from EL1 (VBAR_EL1 + 0x200)"),
        0x380 => Some("for SError from EL1 (VBAR_EL1 + 0x380)"),
        _ => None,
    }
}

/// The instruction at a virtual address.
fn instruction(fd: &VcpuFd, memory: &Memory, address: u64) -> Option<u32> {
    let mut word = [0; 4];
    memory.read(translate(fd, memory, address)?, &mut word).ok()?;
    Some(u32::from_le_bytes(word))
}

/// What a stopped CPU was doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// It has been switched off, or never on.
    Off,
    /// WFI was its last instruction (KVM steps over it when it is interrupted), and no timer is armed.
    ForInterrupt,
    /// Anything else.
    No,
}

/// The CPU runs no instructions: it is off, or WFI was its last one.
pub fn rests(fd: &VcpuFd, memory: Option<&Memory>) -> bool {
    is_off(fd) || memory.is_some_and(|memory| last(fd, memory) == Some(WAIT))
}

/// The instruction before the next one.
fn last(fd: &VcpuFd, memory: &Memory) -> Option<u32> {
    instruction(fd, memory, get(fd, PC).ok()?.checked_sub(4)?)
}

/// What a stopped CPU was doing.
pub fn waiting(fd: &VcpuFd, memory: &Memory) -> Waiting {
    if is_off(fd) {
        Waiting::Off
    } else if last(fd, memory) == Some(WAIT) && !timer_armed(fd) {
        Waiting::ForInterrupt
    } else {
        Waiting::No
    }
}

/// There is no way to tell a guest that its CPU was stopped: its counter went on.
pub fn was_stopped(_fd: &VcpuFd) {}
