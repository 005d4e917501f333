//! The instruction behind an exit, for a trace.
//!
//! KVM leaves `rip` at an instruction that reads, since the next KVM_RUN completes it, and past one that writes or halts;
//! but some hosts stay at a write too. So the bytes on both sides are looked at, and what is told is what encodes the exit.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic};

use super::decode::{is_memory, size, text};
use super::state::CpuState;
use crate::arch::bytes;
use crate::bus::{Exit, Space};
use crate::memory::Memory;

/// The longest instruction.
const LONGEST: usize = 15;

impl CpuState {
    /// The instruction that caused an exit; none where no instruction at or before the program counter can have.
    pub fn culprit(&self, memory: &Memory, exit: &Exit<'_>) -> Option<String> {
        let at = || self.decode_at(memory, self.pc(), LONGEST).filter(|i| self.encodes(i, memory, exit));
        let before = || self.just_before(memory, exit);
        let found = match exit {
            Exit::Read { .. } => at().or_else(before),
            Exit::Write { .. } | Exit::Halt => before().or_else(at),
            _ => None,
        };
        found.as_ref().map(text)
    }

    /// The instruction that begins at an address and has at most so many bytes.
    fn decode_at(&self, memory: &Memory, at: u64, most: usize) -> Option<Instruction> {
        let code = bytes(self, memory, at, most);
        let ip = at.wrapping_sub(self.pc()).wrapping_add(self.regs.rip);
        let mut decoder = Decoder::with_ip(self.bits(), &code, ip, DecoderOptions::NONE);
        Some(decoder.decode()).filter(|instruction| !instruction.is_invalid())
    }

    /// The shortest instruction that ends at the program counter and encodes the exit; with its prefix if that repeats it.
    fn just_before(&self, memory: &Memory, exit: &Exit<'_>) -> Option<Instruction> {
        let ending = |length: usize| {
            let start = self.pc().checked_sub(length as u64)?;
            self.decode_at(memory, start, length).filter(|i| i.len() == length && self.encodes(i, memory, exit))
        };
        let found = (1..=LONGEST).find_map(ending)?;
        Some(ending(found.len() + 1).filter(|i| i.has_rep_prefix() || i.has_repne_prefix()).unwrap_or(found))
    }

    /// Whether an instruction can have made an exit.
    fn encodes(&self, instruction: &Instruction, memory: &Memory, exit: &Exit<'_>) -> bool {
        use Mnemonic::{Hlt, In, Insb, Insd, Insw, Out, Outsb, Outsd, Outsw};
        let (space, addr, width) = match exit {
            Exit::Halt => return instruction.mnemonic() == Hlt,
            Exit::Read { space, addr, width, .. } | Exit::Write { space, addr, width, .. } => (*space, *addr, *width),
            _ => return false,
        };
        let write = matches!(exit, Exit::Write { .. });
        match space {
            Space::Pio => match (instruction.mnemonic(), write) {
                (Out, true) => self.port(instruction, 0) == Some(addr) && registers(instruction, 1) == width,
                (In, false) => self.port(instruction, 1) == Some(addr) && registers(instruction, 0) == width,
                (Outsb, true) | (Insb, false) => width == 1,
                (Outsw, true) | (Insw, false) => width == 2,
                (Outsd, true) | (Insd, false) => width == 4,
                _ => false,
            },
            // What goes over the end of a page comes in parts.
            Space::Mmio => (0..instruction.op_count()).any(|number| {
                is_memory(instruction, number)
                    && self.address(instruction, number).is_some_and(|linear| {
                        let place = self.walk(memory, linear).end.map_or(linear, |page| page.physical);
                        place == addr && size(instruction) == width
                    })
            }),
        }
    }

    /// The port that an operand names.
    fn port(&self, instruction: &Instruction, number: u32) -> Option<u64> {
        match self.register(instruction.op_register(number)) {
            Some(value) if instruction.op_register(number) != iced_x86::Register::None => Some(value),
            _ => Some(u64::from(instruction.immediate8())),
        }
    }
}

/// Bytes of the register that is an operand of IN or OUT.
fn registers(instruction: &Instruction, number: u32) -> usize {
    use iced_x86::Register;
    match instruction.op_register(number) {
        Register::AL => 1,
        Register::AX => 2,
        _ => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::super::boot::BootRegs;
    use super::*;
    use crate::memory::Span;

    /// What is found for an exit of a CPU in real mode that is at 0x1000 + `rip`, with `code` at 0x1000; DX is 0x3f8, DI
    /// 0x8000.
    fn cause(code: &[u8], rip: u64, exit: &Exit<'_>) -> Option<String> {
        let memory = Memory::new(&[Span { start: 0, size: 0x10_0000 }], false).unwrap();
        memory.write(0x1000, code).unwrap();
        let boot = BootRegs::real();
        let mut state = CpuState { regs: boot.regs, sregs: boot.sregs, event: None };
        (state.regs.rip, state.regs.rdx, state.regs.rdi) = (0x1000 + rip, 0x3f8, 0x8000);
        (state.sregs.cs.base, state.sregs.ds.base) = (0, 0);
        state.culprit(&memory, exit)
    }

    fn out(width: usize) -> Exit<'static> {
        Exit::Write { space: Space::Pio, addr: 0x3f8, width, data: &[0; 4] }
    }

    #[test]
    fn an_out_is_found_past_it_and_at_it() {
        let code = [0x90, 0xee, 0x90];
        assert_eq!(cause(&code, 2, &out(1)).as_deref(), Some("out dx, al"));
        assert_eq!(cause(&code, 1, &out(1)).as_deref(), Some("out dx, al"));
        assert_eq!(cause(&code, 0, &out(1)), None);
        assert_eq!(cause(&code, 2, &out(2)), None, "another width");
        assert_eq!(cause(&[0x66, 0xef], 2, &out(4)).as_deref(), Some("out dx, eax"));
        assert_eq!(cause(&[0xf3, 0x6e], 2, &out(1)).as_deref(), Some("rep outsb dx, [si]"));
        assert_eq!(cause(&[0xe6, 0xf8], 2, &out(1)), None, "another port");
    }

    #[test]
    fn a_read_is_at_rip_and_a_halt_past_it() {
        let mut data = [0];
        let read = Exit::Read { space: Space::Pio, addr: 0x3f8, width: 1, data: &mut data };
        assert_eq!(cause(&[0xec, 0xec], 0, &read).as_deref(), Some("in al, dx"));
        assert_eq!(cause(&[0xf4, 0x90], 1, &Exit::Halt).as_deref(), Some("hlt"));
        assert_eq!(cause(&[0xf4], 1, &Exit::Shutdown), None);
    }

    #[test]
    fn a_store_is_known_by_its_address_and_width() {
        let write = |addr, width| Exit::Write { space: Space::Mmio, addr, width, data: &[0; 2] };
        // mov [di], ax
        let code = [0x89, 0x05, 0x90];
        assert_eq!(cause(&code, 2, &write(0x8000, 2)).as_deref(), Some("mov [di], ax"));
        assert_eq!(cause(&code, 2, &write(0x9000, 2)), None);
        assert_eq!(cause(&code, 2, &write(0x8000, 1)), None);
    }
}
