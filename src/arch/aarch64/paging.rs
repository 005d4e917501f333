//! Stage 1 translation as the guest's own tables have it (Arm ARM D8, VMSAv8-64), for reports and for finding out what a
//! CPU executes. KVM has no call for it on arm64.
//!
//! Invariant: at most four reads a walk, whatever the tables hold. 52-bit addresses are not understood: none is found.

use crate::arch::{Page, Walk};
use crate::memory::Memory;

/// The registers that a walk begins with.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tables {
    /// SCTLR_EL1.
    pub sctlr: u64,
    /// TCR_EL1.
    pub tcr: u64,
    /// TTBR0_EL1 and TTBR1_EL1.
    pub ttbr: [u64; 2],
}

/// Output addresses and table addresses: bits 47 to 12.
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

impl Tables {
    /// The MMU is on.
    pub fn on(&self) -> bool {
        self.sctlr & 1 != 0
    }

    /// The physical address behind a virtual one.
    pub fn translate(&self, memory: &Memory, address: u64) -> Option<u64> {
        self.walk(memory, address).end.ok().map(|page| page.physical)
    }

    /// How the tables translate `address`.
    pub fn walk(&self, memory: &Memory, address: u64) -> Walk {
        let mut steps = Vec::new();
        if !self.on() {
            steps.push("the MMU is off (SCTLR_EL1.M): addresses are physical".into());
            let page = Page { physical: address, write: true, user: true, execute: true };
            return Walk { steps, end: Ok(page) };
        }
        // Bits 63 to 56 are copies of bit 55, unless TBI0 or TBI1 has the CPU ignore them (Arm ARM D8.8, address tagging).
        let upper = address >> 55 & 1 == 1;
        let ignored = self.tcr >> if upper { 38 } else { 37 } & 1 == 1;
        let end = if !ignored && address >> 56 != if upper { 0xff } else { 0 } {
            Err("its bits 63 to 56 are no copies of bit 55, and TCR_EL1 does not have them ignored".into())
        } else {
            self.descend(memory, address, &mut steps)
        };
        Walk { steps, end }
    }

    fn descend(&self, memory: &Memory, address: u64, steps: &mut Vec<String>) -> Result<Page, String> {
        // TCR_EL1: T0SZ and TG0 for the lower half, T1SZ and TG1, with another code, for the upper.
        let upper = address >> 55 & 1 == 1;
        let (size, granule) = match upper {
            false => (self.tcr & 0x3f, [12, 16, 14, 0].get((self.tcr >> 14 & 3) as usize)),
            true => (self.tcr >> 16 & 0x3f, [0, 14, 12, 16].get((self.tcr >> 30 & 3) as usize)),
        };
        // EPD0 and EPD1.
        if self.tcr >> if upper { 23 } else { 7 } & 1 == 1 {
            return Err(format!(
                "TCR_EL1 switches the {} half of all addresses off",
                if upper { "upper" } else { "lower" }
            ));
        }
        let page: u32 = *granule.filter(|shift| **shift != 0).ok_or("TCR_EL1 names a page size that does not exist")?;
        let bits = u32::try_from(64 - size).ok().filter(|bits| (page + 1..=48).contains(bits));
        let bits = bits.ok_or_else(|| format!("TCR_EL1 names an address size of {} bits", 64 - size))?;
        let offset = address & ((1 << bits) - 1);
        let sign = if upper { (1 << (55 - bits)) - 1 } else { 0 };
        if address >> bits & ((1 << (55 - bits)) - 1) != sign {
            return Err(format!("TCR_EL1 has {bits} bits of address, and it has more"));
        }
        let step = page - 3;
        let levels = (bits - page).div_ceil(step);
        let mut shift = page + step * (levels - 1);
        let first = 8u64 << (bits - shift);
        let [lower, higher] = self.ttbr;
        let mut table = (if upper { higher } else { lower }) & (ADDRESS | 0xffe) & !(first - 1);
        for level in (0..levels).rev() {
            let index = offset >> shift & ((1 << step) - 1);
            let (number, at) = (3 - level.min(3), table.wrapping_add(8 * index));
            let mut entry = [0; 8];
            if memory.read(at, &mut entry).is_err() {
                steps.push(format!("L{number}[{index}] at {at:#x}: not RAM"));
                return Err(format!("the level {number} table is at {table:#x}, which is not RAM"));
            }
            let entry = u64::from_le_bytes(entry);
            let inside = (1u64 << shift) - 1;
            let step_text = format!("L{number}[{index}] at {at:#x} = {entry:#x}");
            // A block, which only level 2 has, and with pages of 4 KiB level 1; or at the last level a page.
            let is_block = entry & 3 == 1 && (level == 1 || level == 2 && page == 12);
            match (entry & 3, level) {
                _ if is_block || (entry & 3, level) == (3, 0) => {
                    steps.push(format!("{step_text}: {}{}", if level == 0 { "page" } else { "block" }, flags(entry)));
                    return Ok(Page {
                        physical: entry & ADDRESS & !inside | offset & inside,
                        write: entry & READ_ONLY == 0,
                        user: entry & USER != 0,
                        execute: entry & NO_EXECUTE == 0,
                    });
                }
                (3, _) => {
                    steps.push(format!("{step_text}: table"));
                    table = entry & ADDRESS & !((1 << page) - 1);
                }
                _ => {
                    steps.push(format!("{step_text}: not valid"));
                    return Err(format!("the level {number} entry {index} is not valid"));
                }
            }
            shift = shift.saturating_sub(step);
        }
        Err("the tables have no last level".into())
    }
}

/// AP[1], AP[2], the access flag and PXN (Arm ARM D8.3).
const USER: u64 = 1 << 6;
const READ_ONLY: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 10;
const NO_EXECUTE: u64 = 1 << 53;

fn flags(entry: u64) -> String {
    let mut text = if entry & READ_ONLY == 0 { ", read-write".to_owned() } else { ", read-only".into() };
    let marks = [
        (entry & USER != 0, ", EL0"),
        (entry & ACCESSED == 0, ", access flag clear"),
        (entry & NO_EXECUTE != 0, ", PXN"),
    ];
    marks.iter().filter(|(set, _)| *set).for_each(|(_, mark)| text.push_str(mark));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Span;

    const RAM: u64 = 0x4000_0000;

    fn memory(entries: &[(u64, u64)]) -> Memory {
        let memory = Memory::new(&[Span { start: RAM, size: 0x10_0000 }], false).unwrap();
        for (at, entry) in entries {
            memory.write(*at, &entry.to_le_bytes()).unwrap();
        }
        memory
    }

    #[test]
    fn with_the_mmu_off_addresses_are_physical() {
        assert_eq!(Tables::default().translate(&memory(&[]), 0x1234), Some(0x1234));
    }

    #[test]
    fn pages_and_blocks_of_4_kib_tables_are_found_in_both_halves() {
        // T0SZ = T1SZ = 25: 39 bits, three levels; TG0 = 4 KiB (0), TG1 = 4 KiB (2).
        let tables = Tables { sctlr: 1, tcr: 25 | 25 << 16 | 2 << 30, ttbr: [RAM, RAM + 0x1000] };
        let memory = memory(&[
            (RAM + 8, RAM | 0x401),
            (RAM + 0x1000 + 8 * 511, (RAM + 0x2000) | 3),
            (RAM + 0x2000, (RAM + 0x3000) | 3),
            (RAM + 0x2000 + 8, 0x8000_0000 | 0x401),
            (RAM + 0x3000 + 8 * 5, (RAM + 0x5000) | 0x403),
        ]);
        let find = |address| tables.translate(&memory, address);
        assert_eq!(find(0x4012_3456), Some(0x4012_3456));
        assert_eq!(find(0xffff_ffff_c000_5678), Some(RAM + 0x5678));
        assert_eq!(find(0xffff_ffff_c020_1234), Some(0x8000_1234));
        for nothing in [0, 0xffff_ffff_c000_6000, 0xffff_ff7f_c000_5678, 0x80_4012_3456, 0x8000_0000] {
            assert_eq!(find(nothing), None, "{nothing:#x}");
        }
    }

    #[test]
    fn a_tag_is_ignored_only_where_the_guest_asked_for_that() {
        let memory = memory(&[(RAM, RAM | 0x401), (RAM + 0x1000 + 8 * 511, RAM | 0x401)]);
        let find = |more: u64, address| {
            let tables = Tables { sctlr: 1, tcr: 25 | 25 << 16 | 2 << 30 | more, ttbr: [RAM, RAM + 0x1000] };
            tables.translate(&memory, address)
        };
        let (low, high) = (0x5a00_0000_0000_1234, 0x5aff_ffff_c000_1234);
        assert_eq!((find(0, low), find(0, high), find(0, 0x1234)), (None, None, Some(RAM + 0x1234)));
        assert_eq!((find(1 << 37, low), find(1 << 37, high)), (Some(RAM + 0x1234), None));
        assert_eq!((find(1 << 38, low), find(1 << 38, high)), (None, Some(RAM + 0x1234)));
    }

    #[test]
    fn a_half_that_is_switched_off_is_told() {
        let tables = Tables { sctlr: 1, tcr: 25 | 25 << 16 | 1 << 23, ttbr: [RAM, RAM] };
        let end = |address| tables.walk(&memory(&[(RAM, RAM | 0x401)]), address).end;
        assert!(end(0x1000).is_ok());
        assert_eq!(end(u64::MAX - 15).unwrap_err(), "TCR_EL1 switches the upper half of all addresses off");
    }

    #[test]
    fn the_other_granules_and_the_longest_walk_are_found() {
        // 48 bits of 4 KiB pages: four levels.
        let tables = Tables { sctlr: 1, tcr: 16, ttbr: [RAM, 0] };
        let chain =
            [(RAM, RAM + 0x1003), (RAM + 0x1008, RAM + 0x2003), (RAM + 0x2010, RAM + 0x3003), (RAM + 0x3018, 0x7003)];
        assert_eq!(tables.translate(&memory(&chain), 0x4040_3abc), Some(0x7abc));
        // What would be a block is none at level 0, nor at level 1 of 16 KiB pages.
        assert_eq!(tables.translate(&memory(&[(RAM, RAM | 1)]), 0x1234), None);
        let sixteen = Tables { sctlr: 1, tcr: 17 | 2 << 14, ttbr: [RAM, 0] };
        assert_eq!(sixteen.translate(&memory(&[(RAM, RAM | 1)]), 0x1234), None);
        // 42 bits of 64 KiB pages: two levels. 36 bits of 16 KiB pages: two levels.
        let tables = Tables { sctlr: 1, tcr: 22 | 1 << 14, ttbr: [RAM, 0] };
        let chain = [(RAM + 8, RAM + 0x1_0003), (RAM + 0x1_0010, 0x9_0003)];
        assert_eq!(tables.translate(&memory(&chain), 0x2002_1234), Some(0x9_1234));
        let tables = Tables { sctlr: 1, tcr: 28 | 2 << 14, ttbr: [RAM, 0] };
        let chain = [(RAM + 8, RAM + 0x4003), (RAM + 0x4010, 0x1_4003)];
        assert_eq!(tables.translate(&memory(&chain), 0x200_9234), Some(0x1_5234));
    }

    proptest::proptest! {
        #[test]
        fn no_tables_and_no_address_panic(sctlr: u64, tcr: u64, low: u64, high: u64, address: u64, entry: u64) {
            let tables = Tables { sctlr: sctlr | 1, tcr, ttbr: [RAM | low & 0xfff, high] };
            let _ = tables.translate(&memory(&[(RAM, entry), (RAM + 8, RAM | 3)]), address);
        }
    }
}
