//! The instruction behind an exit, for a trace: a load or store of one register, since only for those the CPU tells KVM
//! what is accessed (Arm ARM, ESR_EL2.ISS, ISV).

use super::state::CpuState;
use super::story;
use crate::arch::word;
use crate::bus::Exit;
use crate::memory::Memory;

impl CpuState {
    /// The instruction that caused an exit: the one at the program counter, which KVM moves on at the next entry.
    pub fn culprit(&self, memory: &Memory, exit: &Exit<'_>) -> Option<String> {
        if !matches!(exit, Exit::Read { .. } | Exit::Write { .. }) {
            return None;
        }
        let code = word(self, memory, self.pc(), 4)? as u32;
        Some(access(code).unwrap_or_else(|| story::text(self.pc(), code)))
    }
}

/// A load or store of one register (Arm ARM C4.1.94.32 to 40), if it is one.
fn access(code: u32) -> Option<String> {
    let field = |from: u32, bits: u32| code >> from & ((1 << bits) - 1);
    // Bits 29 to 27 are the group; bit 26 would be a vector register.
    if field(27, 3) != 0b111 || field(26, 1) != 0 || field(25, 1) != 0 {
        return None;
    }
    let (size, kind) = (field(30, 2), field(22, 2));
    let word = if kind == 2 { "w" } else { "" };
    let suffix = ["b", "h", word, ""].into_iter().nth(size as usize)?;
    let name = match kind {
        0 => format!("str{suffix}"),
        1 => format!("ldr{suffix}"),
        _ if size == 3 => return None,
        _ => format!("ldrs{suffix}"),
    };
    let wide = if kind >= 2 { kind == 2 } else { size == 3 };
    let general = |number: u32, wide: bool, last: &str| match (number, wide) {
        (31, _) => last.to_owned(),
        (_, true) => format!("x{number}"),
        (_, false) => format!("w{number}"),
    };
    let value = general(field(0, 5), wide, if wide { "xzr" } else { "wzr" });
    let base = general(field(5, 5), true, "sp");
    let signed = i64::from(field(12, 9)) - if field(20, 1) == 1 { 512 } else { 0 };
    let at = match (field(24, 1), field(21, 1), field(10, 2)) {
        (1, ..) => match field(10, 12) << size {
            0 => format!("[{base}]"),
            offset => format!("[{base}, #{offset:#x}]"),
        },
        (0, 0, 0) => {
            return Some(format!(
                "{}, [{base}, #{signed}]",
                name.replace("str", "stur").replace("ldr", "ldur") + " " + &value
            ));
        }
        (0, 0, 1) => format!("[{base}], #{signed}"),
        (0, 0, 3) => format!("[{base}, #{signed}]!"),
        (0, 1, 2) => {
            let index = general(field(16, 5), field(13, 1) == 1, "xzr");
            let extend = ["uxtw", "lsl", "sxtw", "sxtx"].get((field(15, 1) << 1 | field(13, 1)) as usize)?;
            let shift = if field(12, 1) == 1 { size } else { 0 };
            format!("[{base}, {index}, {extend} #{shift}]")
        }
        _ => return None,
    };
    Some(format!("{name} {value}, {at}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_reaches_a_device_is_told() {
        for (code, text) in [
            (0x3900_0281, "strb w1, [x20]"),
            (0xb940_1a80, "ldr w0, [x20, #0x18]"),
            (0xf900_07e3, "str x3, [sp, #0x8]"),
            (0x7940_0aa2, "ldrh w2, [x21, #0x4]"),
            (0x3980_0041, "ldrsb x1, [x2]"),
            (0xb800_4401, "str w1, [x0], #4"),
            (0xb85f_c020, "ldur w0, [x1, #-4]"),
            (0xb821_7802, "str w2, [x0, x1, lsl #2]"),
            (0xb862_5820, "ldr w0, [x1, w2, uxtw #2]"),
            (0xb900_029f, "str wzr, [x20]"),
        ] {
            assert_eq!(access(code).as_deref(), Some(text), "{code:#x}");
        }
        // nop, ldp x0, x1, [x2], str q0, [x0]
        for code in [0xd503_201f, 0xa940_0440, 0x3d80_0000] {
            assert_eq!(access(code), None, "{code:#x}");
        }
    }
}
