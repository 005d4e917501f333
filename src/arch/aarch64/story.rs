//! How an arm64 CPU came to grief, in words: registers in words, the instructions around the program counter, and hints.

use super::cause::nothing_loaded;
use super::paging::Tables;
use super::state::{CAUGHT, CpuState, ENDLESS, STANDS, in_vectors, slot};
use crate::arch::{Line, Stack, Story, Walk, word};
use crate::bus::FaultInfo;
use crate::memory::Memory;

/// The bits of SCTLR_EL1 that bare-metal code meets (Arm ARM D24.2.129).
pub(super) fn control(sctlr: u64) -> String {
    let names = [(0, "M"), (1, "A"), (2, "C"), (3, "SA"), (12, "I"), (19, "WXN"), (25, "EE")];
    let set: Vec<_> = names.iter().filter(|(bit, _)| sctlr >> bit & 1 == 1).map(|(_, name)| *name).collect();
    let on = |bit: u32| if sctlr >> bit & 1 == 1 { "on" } else { "off" };
    let set = if set.is_empty() { "none".into() } else { set.join(" ") };
    format!("{set}; MMU {}, data cache {}, instruction cache {}, alignment check {}", on(0), on(2), on(12), on(1))
}

/// PSTATE in words (Arm ARM C5.2.19).
pub(super) fn flags(pstate: u64) -> String {
    let name = |(bit, name): &(u32, &'static str)| (pstate >> bit & 1 == 1).then_some(*name);
    let conditions = [(31, "N"), (30, "Z"), (29, "C"), (28, "V")];
    let masks = [(9, "D"), (8, "A"), (7, "I"), (6, "F")];
    let join = |names: &[(u32, &'static str)]| names.iter().filter_map(name).collect::<Vec<_>>().join("");
    let stack = if pstate & 1 == 0 { "SP_EL0" } else { "SP_EL1" };
    format!("EL{}, stack {stack}, conditions [{}], masked [{}]", pstate >> 2 & 3, join(&conditions), join(&masks))
}

/// The instruction as text, as far as a report needs it; the others by their word.
pub(super) fn text(at: u64, word: u32) -> String {
    let offset = |bits: u32, from: u32| {
        let value = i64::from(word << (32 - bits - from)).cast_unsigned() as u32;
        i64::from(value.cast_signed() >> (32 - bits)) * 4
    };
    let target = |bits, from| at.wrapping_add_signed(offset(bits, from));
    let immediate = word >> 5 & 0xffff;
    let register = word >> 5 & 0x1f;
    match word {
        0xd503_201f => "nop".into(),
        0xd503_205f => "wfe".into(),
        0xd503_207f => "wfi".into(),
        0xd503_3fdf => "isb".into(),
        0xd69f_03e0 => "eret".into(),
        _ if word >> 16 == 0 => format!("udf #{:#x}", word & 0xffff),
        _ if word & 0xffe0_001f == 0xd400_0001 => format!("svc #{immediate:#x}"),
        _ if word & 0xffe0_001f == 0xd400_0002 => format!("hvc #{immediate:#x}"),
        _ if word & 0xffe0_001f == 0xd400_0003 => format!("smc #{immediate:#x}"),
        _ if word & 0xffe0_001f == 0xd420_0000 => format!("brk #{immediate:#x}"),
        _ if word & 0xffe0_001f == 0xd440_0000 => format!("hlt #{immediate:#x}"),
        _ if word & 0xffff_fc1f == 0xd61f_0000 => format!("br x{register}"),
        _ if word & 0xffff_fc1f == 0xd63f_0000 => format!("blr x{register}"),
        _ if word & 0xffff_fc1f == 0xd65f_0000 => format!("ret x{register}"),
        _ if word >> 26 == 0x05 => format!("b {:#x}", target(26, 0)),
        _ if word >> 26 == 0x25 => format!("bl {:#x}", target(26, 0)),
        _ if word & 0xff00_0010 == 0x5400_0000 => format!("b.cond {:#x}", target(19, 5)),
        _ if word & 0x3a00_0000 == 0x2800_0000 => {
            let does = if word >> 22 & 1 == 1 { "ldp" } else { "stp" };
            format!("{does} of a pair of registers, at x{register}")
        }
        _ if word & 0xbfff_fc00 == 0x885f_fc00 => format!("ldaxr {}, [{}]", general(word >> 30, word), base(word)),
        _ if word & 0xbfc0_0000 == 0xb940_0000 => format!("ldr {}, {}", general(word >> 30, word), place(word)),
        _ if word & 0xbfc0_0000 == 0xb900_0000 => format!("str {}, {}", general(word >> 30, word), place(word)),
        _ if word & 0xfff0_0000 == 0xd530_0000 => format!("mrs x{}, {}", word & 0x1f, system_register(word)),
        _ if word & 0xfff0_0000 == 0xd510_0000 => format!("msr {}, x{}", system_register(word), word & 0x1f),
        _ if word & 0xffe0_0000 == 0xd500_0000 => "access to a system register".into(),
        _ => format!(".inst {word:#010x}"),
    }
}

/// The register that an instruction loads or stores; `size` is 2 for 32 bits and 3 for 64.
fn general(size: u32, word: u32) -> String {
    format!("{}{}", if size == 3 { "x" } else { "w" }, word & 0x1f)
}

/// The register with the address.
fn base(word: u32) -> String {
    match word >> 5 & 0x1f {
        31 => "sp".into(),
        number => format!("x{number}"),
    }
}

/// An address with an offset, which counts in units of the access's size.
fn place(word: u32) -> String {
    match (word >> 10 & 0xfff) << (word >> 30) {
        0 => format!("[{}]", base(word)),
        offset => format!("[{}, {offset:#x}]", base(word)),
    }
}

/// The register of MRS or MSR as assemblers take it, whatever its name.
fn system_register(word: u32) -> String {
    let part = |from: u32, mask: u32| word >> from & mask;
    format!("s{}_{}_c{}_c{}_{}", part(19, 3), part(16, 7), part(12, 15), part(8, 15), part(5, 7))
}

const OVERWRITTEN: &str =
    "The exception that began it is overwritten by those that followed: ELR, ESR and FAR are the last one's";
const LET_THEM_STAND: &str =
    "to see the exception that began it, let each vector branch to itself (b .): the next report then names it";

impl CpuState {
    /// How the CPU's page tables translate `address`.
    pub fn walk(&self, memory: &Memory, address: u64) -> Walk {
        let tables = Tables {
            sctlr: self.system("sctlr"),
            tcr: self.system("tcr"),
            ttbr: [self.system("ttbr0"), self.system("ttbr1")],
        };
        tables.walk(memory, address)
    }

    /// The addresses whose translation a person wants to see.
    pub fn places(&self) -> Vec<(&'static str, u64)> {
        let mut all = vec![("pc", self.pc()), ("the next push,", self.stack().top.wrapping_sub(16))];
        if self.system("far") != 0 {
            all.push(("far", self.system("far")));
        }
        all
    }

    /// Where to look at instructions: at those that took the exception, before those of its vector.
    pub fn sites(&self) -> Vec<u64> {
        let (pc, elr) = (self.pc(), self.system("elr"));
        let in_vector = in_vectors(pc, self.system("vbar")) && elr != pc && elr % 4 == 0;
        if in_vector { vec![elr, pc] } else { vec![pc] }
    }

    /// The registers in the order of Linux's `struct user_pt_regs`.
    pub fn core_registers(&self) -> Vec<u64> {
        let [sp_el0, sp_el1] = self.sp;
        let sp = if self.pstate & 1 == 0 { sp_el0 } else { sp_el1 };
        self.x.into_iter().chain([sp, self.pc(), self.pstate]).collect()
    }

    /// Where the stack is.
    pub fn stack(&self) -> Stack {
        let [sp_el0, sp_el1] = self.sp;
        let [.., frame, _] = self.x;
        Stack { top: if self.pstate & 1 == 0 { sp_el0 } else { sp_el1 }, frame, word: 8 }
    }

    /// The instructions that `code`, read at `at`, holds; at most `most`.
    pub fn disassemble(&self, at: u64, code: &[u8], most: usize) -> Vec<Line> {
        let words = code.as_chunks::<4>().0.iter().take(most);
        let addresses = (0u64..).map(|number| at.wrapping_add(4 * number));
        let line = |(at, bytes): (u64, &[u8; 4])| Line {
            at,
            bytes: bytes.to_vec(),
            text: text(at, u32::from_le_bytes(*bytes)),
        };
        addresses.zip(words).map(line).collect()
    }

    /// What happened, as far as it can be told, and what to look at. Without a `fault` the CPU still runs.
    pub fn story(&self, fault: Option<&FaultInfo>, memory: &Memory) -> Story {
        let mut story = Story::default();
        let code = word(self, memory, self.pc(), 4).map(|word| word as u32);
        let what =
            code.map_or_else(|| " (nothing to be read there)".into(), |code| format!(": {}", text(self.pc(), code)));
        story.lines.push(format!("The CPU was in {}, at {:#x}{what}", self.mode(), self.pc()));
        match fault.map(|f| f.name.as_str()) {
            Some("KVM_EXIT_ARM_NISV") => {
                story.lines.push("It accessed a place that is no RAM. For such an access to reach a device, the CPU must say which register and how wide; of this instruction it does not".into());
                story.hint("use plain ldr and str of one register for devices (in C: volatile, -mgeneral-regs-only, no memcpy), or look at the address: it may have been meant for RAM");
            }
            Some(ENDLESS) => self.endless(memory, &mut story),
            Some(CAUGHT) => self.caught(memory, &mut story),
            Some(STANDS) => {
                let vbar = self.system("vbar");
                let slot = slot(self.pc(), vbar).unwrap_or("of another kind");
                story.lines.push(format!("That is its own vector {slot}, at {vbar:#x}, which branches to itself"));
                self.cause(memory, &mut story);
            }
            _ => {}
        }
        if code == Some(0) && fault.is_none_or(|fault| fault.name != ENDLESS) {
            nothing_loaded(&mut story);
        }
        story
    }

    /// The CPU does not leave its vectors.
    fn caught(&self, memory: &Memory, story: &mut Story) {
        let (vbar, elr) = (self.system("vbar"), self.system("elr"));
        story.lines.push(format!(
            "It is in its own vectors (VBAR_EL1 is {vbar:#x}), at {:#x} from there",
            self.pc().wrapping_sub(vbar)
        ));
        self.cause(memory, story);
        if in_vectors(elr, vbar) {
            story.lines.push(OVERWRITTEN.into());
            story.hint("an instruction of the handler faults, which enters the handler anew, for ever: look at the one that ELR_EL1 names");
            story.hint(LET_THEM_STAND);
        } else {
            story.hint(
                "interrupts are masked, so nothing but another CPU or a device can end the loop that the handler is in",
            );
        }
    }

    /// The exception's handler takes an exception.
    fn endless(&self, memory: &Memory, story: &mut Story) {
        let vbar = self.system("vbar");
        let there = word(self, memory, vbar.wrapping_add(0x200), 4);
        story.lines.push(format!(
            "It is at its own exception vector (VBAR_EL1 is {vbar:#x}), whose first instruction takes an exception, for ever"
        ));
        if vbar == 0 {
            story.hint("VBAR_EL1 is 0, as after a reset: nobody has set a vector table. Write its address, a multiple of 0x800, to VBAR_EL1 first");
        } else if let Err(why) = self.walk(memory, vbar).end {
            story.hint(format!("VBAR_EL1 is {vbar:#x}, which the page tables do not map: {why}. Map the code and the vectors before the MMU is switched on"));
        } else if there.is_none() {
            story.hint(format!("VBAR_EL1 is {vbar:#x}, where no RAM is"));
        } else if there == Some(0) {
            story.hint(format!("the vector table at {vbar:#x} holds zeroes: nobody has filled it in, or VBAR_EL1 has another address than the table"));
        } else {
            story.hint("the vector table is there, but its first instruction faults");
            self.cause(memory, story);
        }
        story.lines.push(OVERWRITTEN.into());
        story.hint(LET_THEM_STAND);
        if self.system("sctlr") & 1 == 0 {
            story.hint("the MMU is off, so all memory is Device memory: an access that is not aligned to its size faults (as compilers make of packed structures and memcpy: -mstrict-align)");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_instructions_of_a_death_have_their_text() {
        for (word, said) in [
            (0xd503_207f, "wfi"),
            (0, "udf #0x0"),
            (0xd400_0003, "smc #0x0"),
            (0x1400_0000, "b 0x1000"),
            (0x17ff_ffff, "b 0xffc"),
            (0xd65f_03c0, "ret x30"),
            (0xa940_0440, "ldp of a pair of registers, at x2"),
            (0x8b01_0000, ".inst 0x8b010000"),
            (0xf940_0020, "ldr x0, [x1]"),
            (0xb900_07e0, "str w0, [sp, 0x4]"),
            (0x885f_fc20, "ldaxr w0, [x1]"),
            (0xd53c_1100, "mrs x0, s3_4_c1_c1_0"),
            (0xd518_c009, "msr s3_0_c12_c0_0, x9"),
        ] {
            assert_eq!(text(0x1000, word), said);
        }
    }
}
