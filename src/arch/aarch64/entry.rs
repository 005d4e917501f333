//! From "where and in which mode" to an entry state: what arm64 knows that loaders need not.
//!
//! Invariant: what a user asks for and no CPU can do is refused with status 2 by [`linear_entry`], before a machine is
//! built.

use anyhow::Result;

use super::{BootRegs, layout};
use crate::arch::Layout;
use crate::config::{Config, CpuMode, Entry};
use crate::error::{Refusal, refuse, usage};
use crate::memory::Memory;

/// ELF machine number (ELF for the Arm 64-bit Architecture, 5.1).
const EM_AARCH64: u16 = 183;

/// The mode an ELF of this class and machine is entered in; none where it is for another architecture.
pub fn elf_mode(wide: bool, machine: u16) -> Option<CpuMode> {
    (wide && machine == EM_AARCH64).then_some(CpuMode::El1)
}

/// Where a flat guest is loaded unless its user says otherwise: at the start of RAM.
pub fn flat_load(config: &Config) -> u64 {
    config.ram_base.map_or(layout::RAM, |base| base.0)
}

/// The address of the first instruction.
///
/// # Errors
/// The mode is no arm64 CPU's, or nothing can be executed there: status 2.
pub fn linear_entry(mode: CpuMode, entry: Entry) -> Result<u64, Refusal> {
    match (mode, entry) {
        (CpuMode::El1, Entry::Linear(address)) if address.is_multiple_of(4) => Ok(address),
        (CpuMode::El1, Entry::Linear(address)) => {
            Err(usage(format!("the entry, {address:#x}, is not a multiple of 4, as arm64 instructions are")))
        }
        (CpuMode::El1, Entry::Far(..)) => Err(usage(format!("--entry {entry}: SEG:OFF means nothing on arm64"))),
        _ => Err(usage(format!("--cpu-mode {mode}: an arm64 CPU has el1 only")).hint("leave --cpu-mode out")),
    }
}

/// The state of a CPU that starts at `entry`, its stack at the end of RAM.
///
/// # Errors
/// The file's entry is none for an arm64 CPU.
pub fn enter(_mode: CpuMode, entry: Entry, _memory: &Memory, layout: &Layout) -> Result<BootRegs> {
    let sp = layout.ram.last().map_or(0, |ram| ram.start + ram.size);
    match entry {
        Entry::Linear(pc) if pc.is_multiple_of(4) => Ok(BootRegs { pc, sp, ..BootRegs::default() }),
        _ => Err(refuse(format!("its entry, {entry}, is not a multiple of 4, as arm64 instructions are")).into()),
    }
}

/// The same: booting.rst asks for nothing more.
///
/// # Errors
/// As [`enter`].
pub fn enter_linux(mode: CpuMode, entry: Entry, memory: &Memory, layout: &Layout) -> Result<BootRegs> {
    enter(mode, entry, memory, layout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_arm64_cpu_does_not_have_is_refused_with_status_2() {
        for (mode, entry) in
            [(CpuMode::Real, "0x1000"), (CpuMode::Long, "0x1000"), (CpuMode::El1, "0x1002"), (CpuMode::El1, "1:4")]
        {
            assert_eq!(linear_entry(mode, entry.parse().unwrap()).unwrap_err().status, 2, "{mode} {entry}");
        }
        assert_eq!(linear_entry(CpuMode::El1, Entry::Linear(0x10000)).unwrap(), 0x10000);
    }

    #[test]
    fn only_64_bit_arm_elves_run() {
        assert_eq!(elf_mode(true, 183), Some(CpuMode::El1));
        assert_eq!((elf_mode(false, 183), elf_mode(false, 40), elf_mode(true, 62)), (None, None, None));
    }
}
