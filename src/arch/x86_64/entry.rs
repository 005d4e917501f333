//! From "where and in which mode" to an entry state: what x86-64 knows that loaders need not.
//!
//! Invariant: what [`enter`] returns, a CPU accepts; what a user asks for and no CPU can do is refused with status 2
//! by [`linear_entry`], before a machine is built.

use anyhow::{Context, Result};

use super::{BootRegs, boot, layout};
use crate::arch::Layout;
use crate::config::{Config, CpuMode, Entry};
use crate::error::{Refusal, refuse, usage};
use crate::memory::Memory;

/// ELF machine numbers (System V ABI): 32-bit x86, x86-64.
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;

/// Where a flat guest is loaded unless its user says otherwise: clear of the real-mode vector table and BIOS data area.
pub fn flat_load(_config: &Config) -> u64 {
    0x1000
}

/// The mode an ELF of this class and machine is entered in; none where it is for another architecture.
pub fn elf_mode(wide: bool, machine: u16) -> Option<CpuMode> {
    match (wide, machine) {
        (false, EM_386 | EM_X86_64) => Some(CpuMode::Protected),
        (true, EM_X86_64) => Some(CpuMode::Long),
        _ => None,
    }
}

/// The address of the first instruction.
///
/// # Errors
/// The mode cannot be entered there: status 2.
pub fn linear_entry(mode: CpuMode, entry: Entry) -> Result<u64, Refusal> {
    match (mode, entry) {
        (CpuMode::El1, _) => Err(usage("--cpu-mode el1: an x86-64 CPU has real, protected and long")),
        (CpuMode::Real, Entry::Far(segment, offset)) => Ok((u64::from(segment) << 4) + u64::from(offset)),
        (_, Entry::Far(..)) => Err(usage(format!("--entry {entry}: SEG:OFF means nothing in {mode} mode"))
            .hint("give --entry a linear address, or --cpu-mode real")),
        (CpuMode::Real, Entry::Linear(address)) if address > 0xffff => {
            let what = format!("a real-mode guest cannot be entered at {address:#x}: ip has 16 bits");
            // SEG:OFF with the largest segment reaches 0xfffff without wrapping around 1 MiB.
            Err(usage(what).hint(match u16::try_from(address >> 4) {
                Ok(segment) => format!("write it as SEG:OFF: --entry {segment:#x}:{:#x}", address & 0xf),
                Err(_) => "real mode ends at 1 MiB: give a lower address, or --cpu-mode protected or long".into(),
            }))
        }
        (CpuMode::Protected, Entry::Linear(address)) if address >> 32 != 0 => {
            Err(usage(format!("a protected-mode guest cannot be entered at {address:#x}: eip has 32 bits"))
                .hint("--cpu-mode long reaches all of RAM"))
        }
        (_, Entry::Linear(address)) => Ok(address),
    }
}

/// The state of a CPU that starts at `entry`, its tables written to their place in the layout.
///
/// # Errors
/// The mode cannot be entered there, or needs RAM for a stack below 4 GiB and there is none.
pub fn enter(mode: CpuMode, entry: Entry, memory: &Memory, map: &Layout) -> Result<BootRegs> {
    let rip = linear_entry(mode, entry)?;
    if mode == CpuMode::Real {
        let mut boot = BootRegs::real();
        boot.regs.rip = rip;
        if let Entry::Far(segment, offset) = entry {
            boot.regs.rip = offset.into();
            boot.sregs.cs.selector = segment;
            boot.sregs.cs.base = u64::from(segment) << 4;
        }
        return Ok(boot);
    }
    let tables = map.tables.context("the layout has no place for the boot tables of this mode")?;
    // A 64-bit guest whose RAM all lies above 4 GiB has its stack there.
    let above = map.ram.last().filter(|_| mode == CpuMode::Long).map(|span| span.start + span.size);
    let rsp = layout::top_below_4g(map).or(above).ok_or_else(|| {
        refuse(format!("{mode} mode needs RAM below 4 GiB for its stack, and there is none"))
            .hint("give a lower --ram-base, or none")
    })?;
    if mode == CpuMode::Long {
        boot::write_long_tables(memory, tables, &map.ram)?;
        return Ok(BootRegs::long(tables, rip, rsp));
    }
    boot::write_protected_tables(memory, tables)?;
    Ok(BootRegs::protected(tables, rip, rsp))
}

/// The same for Linux, whose boot protocol wants its own selectors (boot.rst: __BOOT_CS 0x10, __BOOT_DS 0x18).
///
/// # Errors
/// As [`enter`].
pub fn enter_linux(mode: CpuMode, entry: Entry, memory: &Memory, map: &Layout) -> Result<BootRegs> {
    let mut boot = enter(mode, entry, memory, map)?;
    boot::select_for_linux(&mut boot, memory)?;
    Ok(boot)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Addr, Size};
    use crate::error::verdict;

    fn at(mode: CpuMode, entry: &str, ram_base: u64) -> Result<BootRegs> {
        let config =
            Config { memory: Size(1 << 20), ram_base: Some(Addr(ram_base)), cpu_mode: Some(mode), ..Config::default() };
        let map = layout::layout(&config)?;
        let memory = Memory::new(&map.memory(), false)?;
        enter(mode, entry.parse().unwrap(), &memory, &map)
    }

    #[test]
    fn every_mode_is_entered_in_a_state_that_a_cpu_accepts() {
        for mode in [CpuMode::Real, CpuMode::Protected, CpuMode::Long] {
            let boot = at(mode, "0x1000", 0).unwrap();
            boot::tests::assert_enterable(&boot);
            assert_eq!((boot.regs.rip, boot.sregs.cs.base, boot.regs.rflags), (0x1000, 0, 2));
            assert_eq!(boot.regs.rsp, if mode == CpuMode::Real { 0 } else { 1 << 20 });
        }
    }

    #[test]
    fn a_far_entry_sets_cs_and_the_offset_only() {
        let boot = at(CpuMode::Real, "0x1000:2", 0).unwrap();
        boot::tests::assert_enterable(&boot);
        let sregs = boot.sregs;
        assert_eq!((sregs.cs.selector, sregs.cs.base, boot.regs.rip), (0x1000, 0x10000, 2));
        assert_eq!((sregs.ds.selector, sregs.ds.base), (0, 0));
    }

    #[test]
    fn entries_that_no_mode_has_are_refused_with_the_words_that_work() {
        for (mode, entry, hint) in [
            (CpuMode::Real, "0x10000", "--entry 0x1000:0x0"),
            (CpuMode::Real, "0x12345", "--entry 0x1234:0x5"),
            (CpuMode::Real, "0x100000", "1 MiB"),
            (CpuMode::Real, "0xffffffffffffffff", "1 MiB"),
            (CpuMode::Long, "1:2", "linear"),
            (CpuMode::Protected, "0x100000000", "long"),
        ] {
            let error = at(mode, entry, 0).unwrap_err();
            let (status, said) = verdict(&error);
            assert_eq!(status, 2, "{error:#}");
            assert!(said.unwrap().contains(hint), "{said:?}");
        }
    }

    #[test]
    fn the_stack_of_a_64_bit_guest_may_lie_above_4_gib() {
        assert!(at(CpuMode::Long, "0x200000000", 8 << 30).unwrap().regs.rsp > 8 << 30);
        assert!(at(CpuMode::Real, "0", 8 << 30).is_ok());
        assert_eq!(verdict(&at(CpuMode::Protected, "0x1000", 8 << 30).unwrap_err()).0, 125);
    }
}
