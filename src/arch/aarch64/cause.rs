//! What an exception says of its cause: ESR_EL1, ELR_EL1 and FAR_EL1 in words, and what to look at.
//!
//! Invariant: all is of the last exception to EL1. Who asks knows whether that is the one that began it.

use super::state::{CpuState, exception};
use super::story::text;
use crate::arch::{Story, word};
use crate::memory::Memory;

/// The fault status of an abort (Arm ARM D24.2.40, ISS encoding for an abort).
fn status(esr: u64) -> String {
    let level = esr & 3;
    match esr & 0x3f {
        0x00..=0x03 => format!("an address size fault at level {level}"),
        0x04..=0x07 => format!("a translation fault at level {level}: no table entry"),
        0x08..=0x0b => format!("an access flag fault at level {level}: the entry's bit 10 is clear"),
        0x0c..=0x0f => format!("a permission fault at level {level}"),
        0x10 => "an external abort: there is nothing at that address".into(),
        0x14..=0x17 => "an external abort: a page table is where nothing is".into(),
        0x21 => "an alignment fault: the address is no multiple of the access's size".into(),
        other => format!("fault status {other:#x}"),
    }
}

impl CpuState {
    /// Says what the last exception was, and what to look at.
    pub(super) fn cause(&self, memory: &Memory, story: &mut Story) {
        let (esr, elr, far) = (self.system("esr"), self.system("elr"), self.system("far"));
        let class = esr >> 26 & 0x3f;
        let code = word(self, memory, elr, 4).map(|word| word as u32);
        let name = exception(esr).unwrap_or("an exception");
        // A misaligned program counter points to no instruction.
        let there = code.filter(|_| class != 0x22).map_or_else(String::new, |code| format!(": {}", text(elr, code)));
        story.lines.push(format!("The exception came at {elr:#x}{there}"));
        let walk = self.walk(memory, far).end;
        let why = walk.err().map_or_else(String::new, |why| format!(" ({why})"));
        let detail = match class {
            0x20 | 0x21 => format!(": there is no instruction to fetch at {far:#x}: {}{why}", status(esr)),
            0x24 | 0x25 => {
                let does = if esr >> 6 & 1 == 1 { "writes" } else { "reads" };
                format!(": it {does} {far:#x}: {}{why}", status(esr))
            }
            0x26 => format!(": sp is {:#x}, which is no multiple of 16", self.stack().top),
            0x15 | 0x3c => format!(" #{:#x}", esr & 0xffff),
            _ => String::new(),
        };
        story.lines.push(format!("It is: {name}{detail}"));
        if class == 0 && code == Some(0) {
            nothing_loaded(story);
        } else if let Some(hint) = hint(esr, code) {
            story.hint(hint);
        }
        if matches!(class, 0x24 | 0x25) && far.wrapping_sub(self.stack().top.wrapping_sub(512)) <= 512 {
            story.hint(format!(
                "the address is at the stack pointer, {:#x}: give sp the end of memory that is mapped and RAM before the first push or call",
                self.stack().top
            ));
        }
    }
}

/// There are zeroes where instructions should be.
pub(super) fn nothing_loaded(story: &mut Story) {
    story.lines.push("The bytes there are zeroes, which are no program: nothing was loaded at this address".into());
    story.hint(
        "a jump through a null pointer, or a guest that is linked for another address than it is loaded at (--load-at)",
    );
}

/// The usual mistake behind an exception; `code` is the instruction that took it.
fn hint(esr: u64, code: Option<u32>) -> Option<&'static str> {
    // MRS and MSR of a register (Arm ARM C6.2): op1 is 4 for EL2 and 6 for EL3.
    let register = code.filter(|code| code >> 20 & 0xffd == 0xd51);
    Some(match (esr >> 26 & 0x3f, esr & 0x3f) {
        (0x00, _) if register.is_some_and(|code| code >> 16 & 7 >= 4) => {
            "the guest runs at EL1: registers of EL2 and EL3 (hcr_el2, scr_el3, …) are undefined here. Read CurrentEL first"
        }
        (0x00, _) if register.is_some() => "a system register that this CPU does not have: read its ID registers first",
        (0x00, _) => {
            "udf is what compilers put where no code should come to: a panic, an abort, a missing return; or the CPU lacks the instruction"
        }
        (0x07, _) => {
            "set CPACR_EL1 bits 20 and 21 (FPEN) and isb before the first floating-point or SIMD instruction, or compile without them (-mgeneral-regs-only): compilers use them for copies too"
        }
        (0x0e, _) => {
            "eret went to a state that does not exist here: SPSR_EL1 must name EL1 (0x5, 0x4) or EL0 (0x0), and AArch64. There is no EL2 or EL3 to return to"
        }
        (0x20 | 0x21, 0x0c..=0x0f) => {
            "the page is mapped without the right to execute: PXN (bit 53), or writable to EL0, which no code of EL1 may be, or SCTLR_EL1.WXN"
        }
        (0x20 | 0x21, _) => {
            "the program counter is where no code can be: a jump through a wrong pointer, a return with a broken stack, or page tables that do not map the code"
        }
        (0x22, _) => {
            "a branch through a wrong pointer, or a return with a broken x30: instructions are at multiples of 4"
        }
        (0x24 | 0x25, 0x04..=0x07) => {
            "the page walk of far shows the entry that is missing. A pointer that is wrong, or tables that do not map a device or RAM"
        }
        (0x24 | 0x25, 0x08..=0x0b) => "set the access flag (bit 10) in each block and page entry",
        (0x24 | 0x25, 0x0c..=0x0f) => "the page walk of far shows the rights: bit 7 of the entry makes it read-only",
        (0x24 | 0x25, 0x21) => {
            "with the MMU off all memory is Device memory, where every access must be aligned to its size, as exclusive and atomic ones must be everywhere: packed structures, memcpy; -mstrict-align"
        }
        (0x26, _) => {
            "sp must be a multiple of 16 whenever it addresses memory: keep 16 bytes for a push of one register too"
        }
        (0x3c, _) => "brk is what compilers make of a panic, an abort or a trap: look at the callers",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_level() {
        assert_eq!(status(0x9600_0005), "a translation fault at level 1: no table entry");
        assert_eq!(status(0x9600_004f), "a permission fault at level 3");
        assert!(status(0x9600_0061).starts_with("an alignment fault"));
        assert_eq!(status(0x9600_003d), "fault status 0x3d");
    }

    #[test]
    fn an_undefined_instruction_gets_the_hint_of_its_kind() {
        // mrs x0, hcr_el2; mrs x0, s3_0_c15_c0_0; udf.
        assert!(hint(0, Some(0xd53c_1100)).is_some_and(|hint| hint.contains("EL2")));
        assert!(hint(0, Some(0xd538_f000)).is_some_and(|hint| hint.contains("ID registers")));
        assert!(hint(0, Some(42)).is_some_and(|hint| hint.starts_with("udf")));
    }
}
