//! How a PC's CPU died, in words: from the instruction at rip through the IDT to the triple fault.

use super::boot::cr0;
use super::decode::text;
use super::faults::{Cause, Use, name};
use super::state::CpuState;
use crate::arch::{Stack, Story, bytes, word};
use crate::bus::FaultInfo;
use crate::memory::Memory;

const PAGE_FAULT: u8 = 14;
const DOUBLE_FAULT: u8 = 8;

const EFER_LMA: u64 = 1 << 10;

/// A gate of the IDT.
struct Gate {
    at: u64,
    /// Its first eight bytes.
    low: u64,
    handler: u64,
}

/// Why an exception reached no handler.
struct Undelivered {
    /// The exception that this raises in turn.
    vector: u8,
    why: String,
    hint: Option<&'static str>,
}

const NO_IDT: &str =
    "load an IDT (lidt) before anything can fault: a table with present gates for at least the exceptions 0 to 31";

impl CpuState {
    /// Where to look at instructions.
    pub fn sites(&self) -> Vec<u64> {
        vec![self.pc()]
    }

    /// The addresses whose translation a person wants to see.
    pub fn places(&self) -> Vec<(&'static str, u64)> {
        let mut all = vec![("rip", self.pc()), ("the next push,", self.next_push())];
        if self.sregs.cr2 != 0 {
            all.push(("cr2", self.sregs.cr2));
        }
        all
    }

    /// Where the stack is.
    pub fn stack(&self) -> Stack {
        let word = (self.bits() / 8) as usize;
        Stack { top: self.on_stack(self.regs.rsp), frame: self.on_stack(self.regs.rbp), word }
    }

    /// The linear address of an offset in the stack segment. The segment says how wide it is (SDM vol. 1, 6.2.3), and it
    /// wraps before the base is added.
    pub(super) fn on_stack(&self, offset: u64) -> u64 {
        let ss = &self.sregs.ss;
        match (self.bits(), ss.db) {
            (64, _) => offset,
            (_, 1) => ss.base.wrapping_add(offset & 0xffff_ffff) & 0xffff_ffff,
            _ => ss.base.wrapping_add(offset & 0xffff) & 0xffff_ffff,
        }
    }

    fn next_push(&self) -> u64 {
        self.on_stack(self.regs.rsp.wrapping_sub(u64::from(self.bits() / 8)))
    }

    /// What happened, as far as it can be told, and what to look at. Without a `fault` the CPU still runs.
    pub fn story(&self, fault: Option<&FaultInfo>, memory: &Memory) -> Story {
        let mut story = Story::default();
        let instruction = self.instruction(memory);
        let words = instruction.filter(|i| !i.is_invalid()).map_or(String::new(), |i| format!(": {}", text(&i)));
        story.lines.push(format!("The CPU was in {} at {:#x}{words}", self.mode(), self.pc()));
        match fault.map(|f| f.name.as_str()) {
            Some("KVM_EXIT_SHUTDOWN") => self.triple_fault(memory, &mut story),
            Some("KVM_EXIT_INTERNAL_ERROR") => self.not_emulated(memory, &mut story),
            _ => {}
        }
        self.usual_mistakes(memory, fault.is_none(), &mut story);
        story
    }

    fn triple_fault(&self, memory: &Memory, story: &mut Story) {
        let Some(first) = self.first(memory, story) else { return };
        let own = (0..32).find(|vector| self.gate(memory, *vector).is_some_and(|gate| gate.handler == self.pc()));
        if let Some(vector) = own {
            story.lines.push(format!("{:#x} is what the IDT names as the handler of {}", self.pc(), name(vector)));
        }
        let Err(second) = self.deliver(memory, first.vector) else {
            story.lines.push(format!(
                "For {} the IDT has a gate and the gate a handler: the fault is in what came before or after",
                name(first.vector)
            ));
            return;
        };
        story.lines.push(format!("To deliver it the CPU needs gate {} of the IDT: {}", first.vector, second.why));
        second.hint.into_iter().for_each(|hint| story.hint(hint));
        // SDM vol. 3, table 7-5: two contributory exceptions, or one after a page fault, are a double fault.
        let contributory = |vector: u8| matches!(vector, 0 | 10..=13);
        if !first.software && (contributory(first.vector) || first.vector == PAGE_FAULT) {
            let then =
                format!("That is {} while delivering {}: a double fault", name(second.vector), name(first.vector));
            self.second(memory, story, then);
            return;
        }
        match self.deliver(memory, second.vector) {
            Err(third) => {
                let then = format!(
                    "That raises {}, whose gate {} fails too: {}",
                    name(second.vector),
                    second.vector,
                    third.why
                );
                self.second(memory, story, format!("{then}. That is a double fault"));
            }
            Ok(_) => story.lines.push(format!("That raises {}, which has a gate and a handler", name(second.vector))),
        }
    }

    /// The double fault, and how it became a triple one.
    fn second(&self, memory: &Memory, story: &mut Story, then: String) {
        story.lines.push(then);
        story.lines.push(match self.deliver(memory, DOUBLE_FAULT) {
            Err(last) => format!(
                "For the double fault the CPU needs gate 8: {}. An exception while reporting a double fault is a triple fault, and the CPU shuts down",
                last.why
            ),
            Ok(handler) => format!("Gate 8 leads to a handler at {handler:#x}, which faulted in turn"),
        });
    }

    /// The exception that began it.
    fn first(&self, memory: &Memory, story: &mut Story) -> Option<Cause> {
        let found = self.cause(memory);
        match &found {
            Some(cause) => {
                let what = if cause.software { "That is" } else { "That raises" };
                story.lines.push(format!("{what} {}: {}", name(cause.vector), cause.why));
                cause.hint.into_iter().for_each(|hint| story.hint(hint));
            }
            None => {
                story.lines.push("Nothing is wrong with that instruction itself, as far as the registers tell".into());
            }
        }
        if let Some((vector, error)) = self.event {
            let error = error.map_or(String::new(), |code| format!(", error code {code:#x}"));
            story.lines.push(format!("KVM had {}{error} to deliver", name(vector)));
        }
        found.or_else(|| {
            let vector = self.event.map(|(vector, _)| vector).filter(|v| *v != DOUBLE_FAULT)?;
            Some(Cause { vector, why: String::new(), hint: None, software: false })
        })
    }

    /// The gate of `vector` as it stands in the IDT of protected or long mode; none where that is not mapped.
    fn gate(&self, memory: &Memory, vector: u8) -> Option<Gate> {
        let long = self.sregs.efer & EFER_LMA != 0;
        let size = if long { 16 } else { 8 };
        let at = self.sregs.idt.base.wrapping_add(u64::from(vector) * size);
        let low = word(self, memory, at, 8)?;
        let high = if long { word(self, memory, at.wrapping_add(8), 4)? } else { 0 };
        let handler = high << 32 | low >> 48 << 16 | low & 0xffff;
        Some(Gate { at, low, handler })
    }

    /// What the CPU does to find the handler of `vector` (SDM vol. 3, 7.12 and 7.14); its address.
    fn deliver(&self, memory: &Memory, vector: u8) -> Result<u64, Undelivered> {
        let general = |why: String, hint| Err(Undelivered { vector: 13, why, hint: Some(hint) });
        let (idt, long) = (&self.sregs.idt, self.sregs.efer & EFER_LMA != 0);
        let real = self.sregs.cr0 & cr0::PE == 0;
        let size = if real { 4 } else { 8 << u32::from(long) };
        let end = u64::from(vector) * size + size - 1;
        if end > idt.limit.into() {
            return general(
                format!("the IDT at {:#x} has limit {:#x} and ends before it", idt.base, idt.limit),
                NO_IDT,
            );
        }
        if real {
            let entry = word(self, memory, idt.base.wrapping_add(end - 3), 4).unwrap_or(0);
            return Ok((entry >> 16 << 4) + (entry & 0xffff));
        }
        let Some(Gate { at, low, handler }) = self.gate(memory, vector) else {
            let why = format!("the IDT lies at {:#x}, where no RAM is mapped", idt.base);
            let hint = "the IDT's address (lidt) is a linear one: the page tables must map it";
            return Err(Undelivered { vector: PAGE_FAULT, why, hint: Some(hint) });
        };
        let kind = low >> 40 & 0x1f;
        if !matches!(kind, 0xe | 0xf) && (long || !matches!(kind, 5..=7)) {
            let hint =
                "gates of the IDT are interrupt gates (type 0xe) or trap gates (0xf) with the present bit (0x80) set";
            return general(format!("at {at:#x} is {low:#018x}, which is no interrupt or trap gate"), hint);
        }
        if low >> 47 & 1 == 0 {
            return Err(Undelivered { vector: 11, why: format!("the gate at {at:#x} is not present"), hint: None });
        }
        if let Some(why) = self.segment(memory, (low >> 16 & 0xffff) as u16, true) {
            let hint = "the selectors in the IDT's gates must name a code segment of the GDT that is loaded";
            return general(format!("the gate at {at:#x} names a bad code segment: {why}"), hint);
        }
        self.handler(memory, handler)
    }

    /// The stack that the CPU pushes to, and the handler's first instruction.
    fn handler(&self, memory: &Memory, handler: u64) -> Result<u64, Undelivered> {
        // Long mode aligns the stack first (SDM vol. 3, 7.14.2).
        let long = self.sregs.efer & EFER_LMA != 0;
        let push = if long { (self.regs.rsp & !15).wrapping_sub(8) } else { self.regs.rsp.wrapping_sub(4) };
        if let Some(trouble) = self.stack_trouble(memory, push, Use::Write) {
            let why = format!("its handler is at {handler:#x}, but the CPU cannot push to the stack: {}", trouble.why);
            return Err(Undelivered { vector: trouble.vector, why, hint: trouble.hint });
        }
        match self.wrong(memory, handler, Use::Fetch) {
            Some(why) => {
                let hint =
                    "a gate's handler is not where the gate says: the address in the gate is wrong or not mapped";
                let why = format!("its handler cannot be executed: {handler:#x} {why}");
                Err(Undelivered { vector: PAGE_FAULT, why, hint: Some(hint) })
            }
            None => Ok(handler),
        }
    }

    /// KVM gave up on an instruction that a real CPU executes.
    fn not_emulated(&self, memory: &Memory, story: &mut Story) {
        let code = bytes(self, memory, self.pc(), 2);
        if code.is_empty() {
            story.lines.push(format!("No RAM is there, so there are no instructions: {}", self.no_ram(memory)));
            story.hint(
                "the guest has run or jumped out of its RAM: a wrong pointer, a missing end, or too little --memory",
            );
        }
        // KVM's emulator does not know software interrupts outside of real mode.
        if let Some(cause) = self.cause(memory).filter(|cause| cause.software) {
            story.lines.push(format!("That is {}: {}", name(cause.vector), cause.why));
            if let Err(Undelivered { why, hint, .. }) = self.deliver(memory, cause.vector) {
                story.lines.push(format!("On a real CPU it fails too, for want of gate {}: {why}", cause.vector));
                hint.into_iter().for_each(|hint| story.hint(hint));
            }
        }
        if matches!(code.first(), Some(0xc4 | 0xc5 | 0x62)) && self.bits() == 64 {
            story.lines.push("It has a VEX or EVEX prefix: an instruction of AVX or of its kind".into());
            story.hint("this host's KVM runs the guest's code by emulating it, and its emulator knows no VEX: compile the guest without AVX (-mno-avx), or use a host with VT-x or SVM");
        }
    }

    fn no_ram(&self, memory: &Memory) -> String {
        match self.walk(memory, self.pc()).end {
            Ok(page) => format!("rip is at the guest-physical address {:#x}", page.physical),
            Err(why) => why,
        }
    }

    /// What beginners run into, seen in the state alone.
    fn usual_mistakes(&self, memory: &Memory, runs: bool, story: &mut Story) {
        let code = bytes(self, memory, self.pc(), 8);
        if code.len() == 8 && code.iter().all(|byte| *byte == 0) {
            story
                .lines
                .push("The bytes there are zeroes, which are no program: nothing was loaded at this address".into());
            story.hint("code that consists of zeroes (add [rax], al): a jump through a null pointer, or a guest that is linked for another address than it is loaded at (--load-at)");
        }
        let protected = self.sregs.cr0 & cr0::PE != 0;
        if protected && self.wrong(memory, self.next_push(), Use::Write).is_some() {
            story.hint("the stack is in unmapped memory: the next push, call or interrupt faults");
        }
        let halted = runs && code.first() == Some(&0xf4) && self.regs.rflags & 1 << 9 == 0;
        if halted {
            story.hint("the CPU is at hlt with interrupts off (RFLAGS.IF): nothing can wake it; sti comes before hlt");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::boot::BootRegs;
    use super::*;
    use crate::memory::Span;

    /// xorshift64*: the same numbers each time.
    fn random(seed: &mut u64) -> u64 {
        *seed ^= *seed >> 12;
        *seed ^= *seed << 25;
        *seed ^= *seed >> 27;
        seed.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Numbers of every size, many of them addresses of RAM.
    fn number(seed: &mut u64) -> u64 {
        let value = random(seed);
        match random(seed) % 5 {
            0 => value,
            1 => u64::MAX - (value & 0xf),
            2 => value & 0xffff_ffff,
            _ => value & 0xffff,
        }
    }

    fn any_state(seed: &mut u64) -> CpuState {
        let mut boot = BootRegs::real();
        let (r, s) = (&mut boot.regs, &mut boot.sregs);
        for register in [
            &mut r.rip,
            &mut r.rsp,
            &mut r.rbp,
            &mut r.rax,
            &mut r.rbx,
            &mut r.rcx,
            &mut r.rdx,
            &mut r.rsi,
            &mut r.rdi,
            &mut r.rflags,
            &mut s.cr0,
            &mut s.cr2,
            &mut s.cr3,
            &mut s.cr4,
            &mut s.efer,
            &mut s.gdt.base,
            &mut s.idt.base,
            &mut s.cs.base,
            &mut s.ss.base,
            &mut s.fs.base,
        ] {
            *register = number(seed);
        }
        (s.gdt.limit, s.idt.limit) = (number(seed) as u16, number(seed) as u16);
        (s.cs.l, s.cs.db, s.ss.dpl) = ((random(seed) & 1) as u8, (random(seed) & 1) as u8, (random(seed) & 3) as u8);
        if random(seed).is_multiple_of(2) {
            (s.cr0, s.cr4, s.efer) = (0x8000_0001, 0x20, 0x500);
        }
        CpuState { regs: boot.regs, sregs: boot.sregs, event: None }
    }

    #[test]
    fn a_push_wraps_in_its_segment_before_the_base_is_added() {
        let push = |db: u8, base: u64, rsp: u64| {
            let mut boot = BootRegs::real();
            (boot.sregs.cr0, boot.sregs.cs.db, boot.sregs.ss.db) = (1, db, db);
            (boot.sregs.ss.base, boot.regs.rsp) = (base, rsp);
            let state = CpuState { regs: boot.regs, sregs: boot.sregs, event: None };
            (state.stack().top, state.places()[1].1)
        };
        assert_eq!(push(0, 0x2_0000, 0), (0x2_0000, 0x2_fffe));
        assert_eq!(push(0, 0x2_0000, 0xabc_0010), (0x2_0010, 0x2_000e));
        assert_eq!(push(1, 0x10_0000, 2), (0x10_0002, 0xf_fffe));
    }

    #[test]
    fn no_registers_and_no_memory_break_the_story() {
        let seed = &mut 0x1234_5678_9abc_def1;
        let memory = Memory::new(&[Span { start: 0, size: 0x1_0000 }], false).unwrap();
        for name in ["KVM_EXIT_SHUTDOWN", "KVM_EXIT_INTERNAL_ERROR", "other"].iter().cycle().take(3000) {
            let content: Vec<u8> = (0..64).flat_map(|_| number(seed).to_le_bytes()).collect();
            memory.write(random(seed) & 0xf000, &content).unwrap();
            let state = any_state(seed);
            let fault = FaultInfo { name: (*name).into(), detail: String::new(), bytes: Vec::new() };
            let story = state.story(Some(&fault), &memory);
            assert!(!story.lines.is_empty() && story.lines.len() < 12, "{story:?}");
            for (_, address) in state.places() {
                assert!(state.walk(&memory, address).steps.len() <= 5);
            }
            let code = bytes(&state, &memory, state.pc(), 64);
            assert!(state.disassemble(state.pc(), &code, 5).len() <= 5);
            let _ = state.to_string();
        }
    }
}
