//! The page walk of a PC's CPU (Intel SDM vol. 3, chapter 5): 32-bit, PAE, 4-level and 5-level paging.
//!
//! Invariant: at most five reads a walk, whatever the tables hold.

use std::fmt::Write;

use super::boot::cr0;
use super::state::CpuState;
use crate::arch::{Page, Walk};
use crate::memory::Memory;

const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Addresses in entries: bits 51 to 12.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// One level of tables.
struct Level {
    name: &'static str,
    shift: u32,
    bits: u32,
    /// An entry may be a page.
    large: bool,
    /// An entry carries access rights.
    rights: bool,
}

const fn level(name: &'static str, shift: u32, bits: u32, large: bool) -> Level {
    Level { name, shift, bits, large, rights: true }
}

const LONG: [Level; 5] = [
    level("PML5E", 48, 9, false),
    level("PML4E", 39, 9, false),
    level("PDPTE", 30, 9, true),
    level("PDE", 21, 9, true),
    level("PTE", 12, 9, false),
];
const PAE: [Level; 3] = [
    Level { name: "PDPTE", shift: 30, bits: 2, large: false, rights: false },
    level("PDE", 21, 9, true),
    level("PTE", 12, 9, false),
];
const OLD: [Level; 2] = [level("PDE", 22, 10, true), level("PTE", 12, 10, false)];

/// The flags of an entry by their names in the SDM.
fn flags(entry: u64) -> String {
    let names =
        [(0, "P"), (1, "RW"), (2, "US"), (3, "PWT"), (4, "PCD"), (5, "A"), (6, "D"), (7, "PS"), (8, "G"), (63, "XD")];
    names.iter().filter(|(bit, _)| entry >> bit & 1 == 1).map(|(_, name)| *name).collect::<Vec<_>>().join(" ")
}

impl CpuState {
    /// Linear addresses have this many bits.
    fn width(&self) -> u32 {
        match (self.sregs.efer & EFER_LMA != 0, self.sregs.cr4 & CR4_LA57 != 0) {
            (false, _) => 32,
            (true, false) => 48,
            (true, true) => 57,
        }
    }

    /// All bits above the last that is translated are like it.
    pub(super) fn is_canonical(&self, linear: u64) -> bool {
        let width = self.width();
        let high = linear.cast_signed() >> (width - 1);
        if width == 32 { linear >> 32 == 0 } else { high == 0 || high == -1 }
    }

    /// How the CPU's page tables translate `linear`.
    pub fn walk(&self, memory: &Memory, linear: u64) -> Walk {
        let s = &self.sregs;
        let mut steps = Vec::new();
        if s.cr0 & cr0::PG == 0 {
            steps.push("paging is off (CR0.PG): linear addresses are physical".into());
            let page = Page { physical: linear & 0xffff_ffff, write: true, user: true, execute: true };
            return Walk { steps, end: Ok(page) };
        }
        if !self.is_canonical(linear) {
            let bits = self.width() - 1;
            return Walk { steps, end: Err(format!("not canonical: bits 63 to {bits} are not all the same")) };
        }
        let end = self.descend(memory, linear, &mut steps);
        Walk { steps, end }
    }

    fn levels(&self) -> (&'static [Level], usize, u64) {
        let s = &self.sregs;
        match (self.width(), s.cr4 & CR4_PAE != 0) {
            (57, _) => (&LONG, 8, s.cr3 & ADDRESS),
            (48, _) => (LONG.get(1..).unwrap_or_default(), 8, s.cr3 & ADDRESS),
            (_, true) => (&PAE, 8, s.cr3 & 0xffff_ffe0),
            (_, false) => (&OLD, 4, s.cr3 & 0xffff_f000),
        }
    }

    fn descend(&self, memory: &Memory, linear: u64, steps: &mut Vec<String>) -> Result<Page, String> {
        let (levels, size, mut table) = self.levels();
        let mut page = Page { physical: 0, write: true, user: true, execute: true };
        for level in levels {
            let index = linear >> level.shift & ((1 << level.bits) - 1);
            let at = table.wrapping_add(index * size as u64);
            let mut raw = [0; 8];
            let step = format!("{}[{index}] at {at:#x}", level.name);
            if raw.get_mut(..size).is_none_or(|raw| memory.read(at, raw).is_err()) {
                steps.push(format!("{step}: not RAM"));
                return Err(format!("the table that holds {} {index} is at {table:#x}, which is not RAM", level.name));
            }
            let entry = u64::from_le_bytes(raw);
            let mut step = format!("{step} = {entry:#x}");
            if entry & PRESENT == 0 {
                steps.push(step + ": not present");
                return Err(format!("{} {index} is not present", level.name));
            }
            let _ = write!(step, ": {}", flags(entry));
            steps.push(step);
            if level.rights {
                page.write &= entry & WRITE != 0;
                page.user &= entry & USER != 0;
            }
            if size == 8 && entry & NO_EXECUTE != 0 {
                if self.sregs.efer & EFER_NXE == 0 {
                    return Err(format!(
                        "{} {index} has XD (bit 63) set, which is reserved without EFER.NXE",
                        level.name
                    ));
                }
                page.execute = false;
            }
            let inside = (1u64 << level.shift) - 1;
            let pse = size == 8 || self.sregs.cr4 & CR4_PSE != 0;
            let leaf = level.shift == 12 || (entry & LARGE != 0 && level.large && pse);
            if !leaf && entry & LARGE != 0 && size == 8 {
                return Err(format!("{} {index} has bit 7 set, which is reserved there", level.name));
            }
            table = entry & if size == 8 { ADDRESS } else { 0xffff_f000 };
            if leaf {
                page.physical = table & !inside | linear & inside;
                // PSE-36: bits 20 to 13 of a 4 MiB page are bits 39 to 32 of its address.
                if size == 4 && level.shift == 22 {
                    page.physical |= (entry >> 13 & 0xff) << 32;
                }
                return Ok(page);
            }
        }
        Err("the tables have no last level".into())
    }
}

#[cfg(test)]
mod tests {
    use super::super::boot::BootRegs;
    use super::*;
    use crate::memory::Span;

    fn memory(entries: &[(u64, u64)]) -> Memory {
        let memory = Memory::new(&[Span { start: 0, size: 0x1_0000 }], false).unwrap();
        entries.iter().for_each(|(at, entry)| memory.write(*at, &entry.to_le_bytes()).unwrap());
        memory
    }

    fn state(cr4: u64, efer: u64) -> CpuState {
        let mut boot = BootRegs::real();
        boot.sregs.cr0 = cr0::PE | cr0::PG;
        (boot.sregs.cr3, boot.sregs.cr4, boot.sregs.efer) = (0x1000, cr4, efer);
        CpuState { regs: boot.regs, sregs: boot.sregs, event: None }
    }

    #[test]
    fn four_levels_are_walked_and_the_entry_that_fails_is_named() {
        let memory = memory(&[
            (0x1000, 0x2003),
            (0x2000, 0x3003),
            (0x3000, 0xe3),
            (0x3008, 0x4003),
            (0x4008, 0x8000_0000_0000_5001),
        ]);
        let state = state(CR4_PAE, EFER_LMA | EFER_NXE);
        let end = |linear| state.walk(&memory, linear).end;
        assert_eq!(end(0x1234).unwrap(), Page { physical: 0x1234, write: true, user: false, execute: true });
        assert_eq!(end(0x20_1234).unwrap(), Page { physical: 0x5234, write: false, user: false, execute: false });
        assert_eq!(end(0x20_0000).unwrap_err(), "PTE 0 is not present");
        assert_eq!(end(0x0000_0dea_dbee_f000).unwrap_err(), "PML4E 27 is not present");
        assert!(end(0x8000_0000_0000).unwrap_err().contains("not canonical"));
        let walk = state.walk(&memory, 0x20_0000);
        assert_eq!(walk.steps.len(), 4);
        assert_eq!(walk.steps[0], "PML4E[0] at 0x1000 = 0x2003: P RW");
        assert_eq!(walk.steps[3], "PTE[0] at 0x4000 = 0x0: not present");
    }

    #[test]
    fn reserved_bits_and_tables_outside_ram_fail_the_walk() {
        let memory = memory(&[(0x1000, 0x2083), (0x1008, 0xdead_f003), (0x1ff8, 0x1003), (0x2000, 1 << 63 | 3)]);
        let state = state(CR4_PAE, EFER_LMA);
        assert!(state.walk(&memory, 0).end.unwrap_err().contains("bit 7"));
        assert!(state.walk(&memory, 1 << 39).end.unwrap_err().contains("not RAM"));
        // A table that holds itself: the walk ends.
        assert_eq!(state.walk(&memory, u64::MAX).end.unwrap().physical, 0x1fff);
    }

    #[test]
    fn the_older_formats_are_walked() {
        let memory = memory(&[(0x1000, 0x2001), (0x2000, 0x87), (0x2008, 0x3007), (0x3000, 0x7003)]);
        let pae = state(CR4_PAE, 0);
        assert_eq!(pae.walk(&memory, 0x20_0abc).end.unwrap().physical, 0x7abc);
        assert_eq!(pae.walk(&memory, 0xabc).end.unwrap().physical, 0xabc);
        let memory = memory_32();
        let old = state(CR4_PSE, 0);
        assert_eq!(old.walk(&memory, 0x1abc).end.unwrap().physical, 0x7abc);
        assert_eq!(old.walk(&memory, 0x40_1abc).end.unwrap().physical, 0x80_1abc);
        assert_eq!(old.walk(&memory, 0x80_0000).end.unwrap_err(), "PDE 2 is not present");
    }

    fn memory_32() -> Memory {
        memory(&[(0x1000, 0x0080_0083_0000_2003), (0x2000, 0x7003_0000_0000)])
    }
}
