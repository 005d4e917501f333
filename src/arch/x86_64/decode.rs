//! Instructions as text, and where their operands are.

use iced_x86::{Decoder, DecoderError, DecoderOptions, FastFormatter, Instruction, MemorySize, OpKind, Register};

use super::boot::cr0;
use super::state::CpuState;
use crate::arch::{Line, bytes};
use crate::memory::Memory;

/// The longest instruction.
const LONGEST: usize = 15;

/// Intel syntax, as assemblers for the PC read it.
pub(super) fn text(instruction: &Instruction) -> String {
    let mut formatter = FastFormatter::new();
    let options = formatter.options_mut();
    options.set_space_after_operand_separator(true);
    options.set_use_hex_prefix(true);
    options.set_uppercase_hex(false);
    let mut text = String::new();
    formatter.format(instruction, &mut text);
    text
}

impl CpuState {
    /// The size of code that the CPU executes.
    pub(super) fn bits(&self) -> u32 {
        let s = &self.sregs;
        match (s.cr0 & cr0::PE, s.cs.l, s.cs.db) {
            (0, ..) => 16,
            (_, 1, _) => 64,
            (_, _, 1) => 32,
            _ => 16,
        }
    }

    /// The instruction at the CPU's program counter; none where its bytes cannot be read.
    pub(super) fn instruction(&self, memory: &Memory) -> Option<Instruction> {
        let code = bytes(self, memory, self.pc(), LONGEST);
        (!code.is_empty()).then(|| Decoder::with_ip(self.bits(), &code, self.regs.rip, DecoderOptions::NONE).decode())
    }

    /// The instructions that `code`, read at the linear address `at`, holds; at most `most`.
    pub fn disassemble(&self, at: u64, code: &[u8], most: usize) -> Vec<Line> {
        let ip = at.wrapping_sub(self.pc()).wrapping_add(self.regs.rip);
        let mut decoder = Decoder::with_ip(self.bits(), code, ip, DecoderOptions::NONE);
        let (mut lines, mut from) = (Vec::new(), 0);
        while decoder.can_decode() && lines.len() < most {
            let instruction = decoder.decode();
            // What is cut short at the end of `code` is not there; what is no instruction is one byte of something else.
            if decoder.last_error() == DecoderError::NoMoreBytes {
                break;
            }
            let to = if instruction.is_invalid() { from + 1 } else { decoder.position() };
            if decoder.set_position(to).is_err() {
                break;
            }
            decoder.set_ip(ip.wrapping_add(to as u64));
            let bytes = code.get(from..to).unwrap_or_default().to_vec();
            let text = if instruction.is_invalid() { "no instruction".into() } else { text(&instruction) };
            lines.push(Line { at: at.wrapping_add(from as u64), bytes, text });
            from = to;
        }
        lines
    }

    /// The value of a register; of a segment register, its base.
    pub(super) fn register(&self, register: Register) -> Option<u64> {
        let (r, s) = (&self.regs, &self.sregs);
        let long = self.bits() == 64;
        let flat = |base: u64| if long { 0 } else { base };
        match register {
            Register::CS => return Some(flat(s.cs.base)),
            Register::DS => return Some(flat(s.ds.base)),
            Register::ES => return Some(flat(s.es.base)),
            Register::SS => return Some(flat(s.ss.base)),
            Register::FS => return Some(s.fs.base),
            Register::GS => return Some(s.gs.base),
            Register::None => return Some(0),
            _ => {}
        }
        let all = [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14,
            r.r15,
        ];
        let nth = |first: Register| all.get((register as usize).checked_sub(first as usize)?).copied();
        let wide = nth(Register::RAX);
        let wide = wide.or_else(|| nth(Register::EAX).map(|value| value & 0xffff_ffff));
        let wide = wide.or_else(|| nth(Register::AX).map(|value| value & 0xffff));
        wide.or_else(|| {
            // AL CL DL BL, AH CH DH BH, SPL BPL SIL DIL, R8L …
            let number = (register as usize).checked_sub(Register::AL as usize)?;
            let (index, shift) = match number {
                0..=3 => (number, 0),
                4..=7 => (number - 4, 8),
                _ => (number - 4, 0),
            };
            all.get(index).map(|value| value >> shift & 0xff)
        })
    }

    /// The value of a register or immediate operand.
    pub(super) fn operand(&self, memory: &Memory, instruction: &Instruction, number: u32) -> Option<u64> {
        match instruction.op_kind(number) {
            OpKind::Register => self.register(instruction.op_register(number)),
            _ if is_memory(instruction, number) => {
                let size = size(instruction).min(8);
                crate::arch::word(self, memory, self.address(instruction, number)?, size)
            }
            _ => None,
        }
    }

    /// The linear address of a memory operand.
    pub(super) fn address(&self, instruction: &Instruction, number: u32) -> Option<u64> {
        let address = instruction.virtual_address(number, 0, |register, _, _| self.register(register))?;
        Some(if self.bits() == 64 { address } else { address & 0xffff_ffff })
    }
}

/// Bytes of the memory operand; 1 where that does not matter to a report.
pub(super) fn size(instruction: &Instruction) -> usize {
    use MemorySize::*;
    match instruction.memory_size() {
        UInt16 | Int16 => 2,
        UInt32 | Int32 | Float32 => 4,
        UInt64 | Int64 | Float64 => 8,
        _ => 1,
    }
}

/// The operand is in memory.
pub(super) fn is_memory(instruction: &Instruction, number: u32) -> bool {
    use OpKind::*;
    matches!(
        instruction.op_kind(number),
        Memory
            | MemorySegSI
            | MemorySegESI
            | MemorySegRSI
            | MemorySegDI
            | MemorySegEDI
            | MemorySegRDI
            | MemoryESDI
            | MemoryESEDI
            | MemoryESRDI
    )
}

#[cfg(test)]
mod tests {
    use super::super::boot::BootRegs;
    use super::*;
    use crate::memory::Span;

    fn state() -> CpuState {
        let boot = BootRegs::long(Span { start: 0, size: 0x10_0000 }, 0x1000, 0x8000);
        let mut state = CpuState { regs: boot.regs, sregs: boot.sregs, event: None };
        (state.regs.rax, state.regs.rbx, state.regs.r9) = (0x1122_3344_5566_7788, 0x2000, 0x9999);
        state
    }

    #[test]
    fn bytes_become_text() {
        let lines = state().disassemble(0x1000, &[0x48, 0x8b, 0x03, 0x0f, 0x0b, 0x06, 0xf4, 0xc5], 9);
        let text: Vec<_> = lines.iter().map(|l| (l.at, l.text.as_str())).collect();
        assert_eq!(text, [(0x1000, "mov rax, [rbx]"), (0x1003, "ud2"), (0x1005, "no instruction"), (0x1006, "hlt")]);
        assert_eq!(lines[0].bytes, [0x48, 0x8b, 3]);
    }

    #[test]
    fn registers_of_every_size_have_their_value() {
        let state = state();
        for (register, value) in [
            (Register::RAX, 0x1122_3344_5566_7788),
            (Register::EAX, 0x5566_7788),
            (Register::AX, 0x7788),
            (Register::AL, 0x88),
            (Register::AH, 0x77),
            (Register::R9, 0x9999),
            (Register::R9L, 0x99),
            (Register::SPL, 0),
            (Register::DS, 0),
        ] {
            assert_eq!(state.register(register), Some(value), "{register:?}");
        }
        assert_eq!(state.register(Register::XMM0), None);
    }

    #[test]
    fn memory_operands_have_their_address() {
        let state = state();
        let decode = |bytes: &[u8]| Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE).decode();
        assert_eq!(state.address(&decode(&[0x48, 0x8b, 0x43, 0x10]), 1), Some(0x2010));
        assert_eq!(state.address(&decode(&[0x48, 0x8b, 0x05, 1, 0, 0, 0]), 1), Some(0x1008));
        assert!(is_memory(&decode(&[0xa4]), 0) && !is_memory(&decode(&[0x90]), 0));
    }
}
