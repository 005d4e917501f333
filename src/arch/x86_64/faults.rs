//! What the instruction at rip does wrong: the exception that it raises (Intel SDM vol. 3, 7.15), found by doing with
//! registers, tables and memory what the CPU does, as far as a report needs it.
//!
//! Invariant: it reads, and never runs, the guest's code; where it is not sure it says nothing.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::boot::cr0;
use super::decode::{is_memory, size};
use super::state::CpuState;
use crate::arch::word;
use crate::memory::Memory;

const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXSAVE: u64 = 1 << 18;
const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR0_WP: u64 = 1 << 16;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const MSR_EFER: u64 = 0xc000_0080;

/// An exception, and why it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cause {
    /// Its vector.
    pub vector: u8,
    /// Why, in words.
    pub why: String,
    /// What to do.
    pub hint: Option<&'static str>,
    /// It is an INT instruction, not a fault.
    pub software: bool,
}

fn cause(vector: u8, why: impl Into<String>) -> Cause {
    Cause { vector, why: why.into(), hint: None, software: false }
}

impl Cause {
    fn hint(self, hint: &'static str) -> Self {
        Self { hint: Some(hint), ..self }
    }
}

/// An exception's mnemonic (SDM vol. 3, table 7-1).
pub(super) fn name(vector: u8) -> String {
    const NAMES: [&str; 22] = [
        "#DE divide error",
        "#DB debug exception",
        "NMI",
        "#BP breakpoint",
        "#OF overflow",
        "#BR bound range exceeded",
        "#UD invalid opcode",
        "#NM device not available",
        "#DF double fault",
        "coprocessor segment overrun",
        "#TS invalid TSS",
        "#NP segment not present",
        "#SS stack-segment fault",
        "#GP general protection",
        "#PF page fault",
        "vector 15",
        "#MF x87 error",
        "#AC alignment check",
        "#MC machine check",
        "#XM SIMD error",
        "#VE virtualisation",
        "#CP control protection",
    ];
    NAMES.get(usize::from(vector)).map_or_else(|| format!("vector {vector}"), |name| (*name).to_owned())
}

/// How memory is used.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    Read,
    Write,
    Fetch,
}

impl CpuState {
    /// The privilege level.
    fn ring(&self) -> u8 {
        if self.sregs.cr0 & cr0::PE == 0 { 0 } else { self.sregs.ss.dpl }
    }

    /// What is wrong with using `address` so; none where the page tables allow it.
    pub(super) fn wrong(&self, memory: &Memory, address: u64, what: Use) -> Option<String> {
        let page = match self.walk(memory, address).end {
            Ok(page) => page,
            Err(why) => return Some(format!("is not mapped ({why})")),
        };
        let user = self.ring() == 3;
        match what {
            _ if user && !page.user => Some("is a page of the kernel's, and the CPU is in ring 3".into()),
            Use::Write if !page.write && (user || self.sregs.cr0 & CR0_WP != 0) => {
                Some("is in a page that may not be written (RW clear, CR0.WP set)".into())
            }
            Use::Fetch if !page.execute => Some("is in a page that may not be executed (XD set)".into()),
            _ => None,
        }
    }

    /// The exception that executing the instruction at rip raises, as far as it can be told.
    pub(super) fn cause(&self, memory: &Memory) -> Option<Cause> {
        let pc = self.pc();
        if !self.is_canonical(pc) {
            return Some(cause(13, format!("rip {pc:#x} is not a canonical address")));
        }
        if let Some(why) = self.wrong(memory, pc, Use::Fetch) {
            let hint = "rip is where no code can be: a jump through a wrong pointer, a return with a broken stack, or page tables that do not map the code";
            return Some(cause(14, format!("there is no instruction to fetch: {pc:#x} {why}")).hint(hint));
        }
        let i = self.instruction(memory)?;
        if i.is_invalid() {
            return Some(cause(6, "the bytes at rip are no instruction"));
        }
        self.by_name(memory, &i)
            .or_else(|| self.by_privilege(&i))
            .or_else(|| self.by_segment(memory, &i))
            .or_else(|| self.by_vectors(memory, &i))
            .or_else(|| self.by_memory(memory, &i))
            .or_else(|| self.by_stack(memory, &i))
    }

    /// Instructions that fault by what they are, and by their values.
    fn by_name(&self, memory: &Memory, i: &Instruction) -> Option<Cause> {
        let software = |vector: u8| Cause { software: true, ..cause(vector, format!("int {vector:#x} asks for it")) };
        match i.mnemonic() {
            Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => {
                let hint = "compilers put ud2 where code must not arrive: a panic, an abort, unreachable code";
                Some(cause(6, "ud2 is the instruction that is never valid").hint(hint))
            }
            Mnemonic::Int => Some(software(i.immediate(0) as u8)),
            Mnemonic::Int3 => Some(Cause { software: true, ..cause(3, "int3 is a breakpoint") }),
            Mnemonic::Int1 => Some(Cause { software: true, ..cause(1, "int1 is a debug exception") }),
            Mnemonic::Div | Mnemonic::Idiv => self.division(memory, i),
            Mnemonic::Mov if i.op_kind(0) == OpKind::Register => self.control(i),
            Mnemonic::Wrmsr => self.write_msr(),
            Mnemonic::Rdmsr => {
                let msr = self.regs.rcx & 0xffff_ffff;
                Some(cause(13, format!("it reads MSR {msr:#x}, which this CPU does not have")))
            }
            _ => None,
        }
    }

    fn division(&self, memory: &Memory, i: &Instruction) -> Option<Cause> {
        let (divisor, size) = (self.operand(memory, i, 0)?, if is_memory(i, 0) { size(i) } else { 0 });
        if divisor == 0 {
            return Some(cause(0, "it divides by zero"));
        }
        let wide = size == 8 || (Register::RAX..=Register::R15).contains(&i.op_register(0));
        (wide && i.mnemonic() == Mnemonic::Div && self.regs.rdx >= divisor)
            .then(|| cause(0, "the quotient does not fit: rdx is not less than the divisor"))
    }

    /// Writes to control registers (SDM vol. 2, MOV to control registers, exceptions).
    fn control(&self, i: &Instruction) -> Option<Cause> {
        let s = &self.sregs;
        let value = self.register(i.op_register(1))?;
        match i.op_register(0) {
            Register::CR0 if value & cr0::PG != 0 && value & cr0::PE == 0 => {
                Some(cause(13, "it turns paging on (CR0.PG) without protection (CR0.PE)"))
            }
            Register::CR0 if value & cr0::PG != 0 && s.efer & EFER_LME != 0 && s.cr4 & CR4_PAE == 0 => {
                let hint = "long mode wants, in this order: CR4.PAE, CR3, EFER.LME, CR0.PG";
                Some(cause(13, "it turns paging on for long mode (EFER.LME) without CR4.PAE").hint(hint))
            }
            Register::CR0 if value >> 32 != 0 => Some(cause(13, "it sets reserved bits of CR0 (63 to 32)")),
            Register::CR0 if value >> 29 & 3 == 1 => Some(cause(13, "it sets CR0.NW without CR0.CD")),
            Register::CR4 if s.efer & EFER_LMA != 0 && value & CR4_PAE == 0 => {
                Some(cause(13, "it clears CR4.PAE in long mode"))
            }
            Register::CR4 => {
                Some(cause(13, format!("it writes {value:#x} to CR4, with bits that this CPU does not have")))
            }
            _ => None,
        }
    }

    fn write_msr(&self) -> Option<Cause> {
        let (msr, value) = (self.regs.rcx & 0xffff_ffff, self.regs.rdx << 32 | self.regs.rax & 0xffff_ffff);
        let changes = |bit: u64| (value ^ self.sregs.efer) & bit != 0;
        Some(match msr {
            MSR_EFER if changes(EFER_LME) && self.sregs.cr0 & cr0::PG != 0 => {
                cause(13, "it changes EFER.LME while paging is on")
            }
            MSR_EFER => cause(13, format!("it writes {value:#x} to EFER, with bits that this CPU does not have")),
            0xc000_0100..=0xc000_0102 if !self.is_canonical(value) => {
                cause(13, format!("it writes {value:#x}, which is not canonical, to the base of fs or gs"))
            }
            _ => cause(
                13,
                format!("it writes {value:#x} to MSR {msr:#x}, which this CPU does not have or does not let be"),
            ),
        })
    }

    /// Instructions of the kernel's in ring 3.
    fn by_privilege(&self, i: &Instruction) -> Option<Cause> {
        use Mnemonic::*;
        let kernels = matches!(
            i.mnemonic(),
            Hlt | Lgdt | Lidt | Lldt | Ltr | Clts | Invd | Wbinvd | Invlpg | Lmsw | Swapgs | Sysret | Sysexit
        );
        let io = matches!(i.mnemonic(), In | Out | Cli | Sti) && u64::from(self.ring()) > self.regs.rflags >> 12 & 3;
        (self.ring() != 0 && (kernels || io)).then(|| cause(13, "only ring 0 may execute it"))
    }

    /// Loads of segment registers and of the task register.
    fn by_segment(&self, memory: &Memory, i: &Instruction) -> Option<Cause> {
        if self.sregs.cr0 & cr0::PE == 0 {
            return None;
        }
        let segments = Register::ES..=Register::GS;
        let (selector, code) = match i.mnemonic() {
            Mnemonic::Mov if segments.contains(&i.op_register(0)) => (self.operand(memory, i, 1)?, false),
            Mnemonic::Ltr | Mnemonic::Lldt => (self.operand(memory, i, 0)?, false),
            Mnemonic::Pop if segments.contains(&i.op_register(0)) => (self.pushed(memory, 0)?, false),
            Mnemonic::Jmp | Mnemonic::Call if matches!(i.op_kind(0), OpKind::FarBranch32 | OpKind::FarBranch16) => {
                (i.far_branch_selector().into(), true)
            }
            Mnemonic::Retf | Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => (self.pushed(memory, 1)?, true),
            _ => return None,
        };
        let why = self.segment(memory, (selector & 0xffff) as u16, code)?;
        let hint =
            "load a GDT (lgdt) that has the selector before using it; Bantam's own has code at 8 and data at 0x10";
        Some(cause(13, why).hint(hint))
    }

    /// A word of the stack.
    fn pushed(&self, memory: &Memory, index: u64) -> Option<u64> {
        let size = u64::from(self.bits() / 8);
        let at = self.register(Register::SS)?.wrapping_add(self.regs.rsp).wrapping_add(index * size);
        word(self, memory, at, size as usize)
    }

    /// What is wrong with loading this selector.
    pub(super) fn segment(&self, memory: &Memory, selector: u16, code: bool) -> Option<String> {
        let (gdt, offset) = (&self.sregs.gdt, u64::from(selector & !7));
        if selector & !3 == 0 {
            return code.then(|| "the selector of the code segment is 0, which means none".into());
        }
        if selector & 4 != 0 {
            return None;
        }
        let what = format!("selector {selector:#x}");
        if offset + 7 > gdt.limit.into() {
            return Some(format!("{what} lies beyond the GDT at {:#x}, whose limit is {:#x}", gdt.base, gdt.limit));
        }
        let at = gdt.base.wrapping_add(offset);
        let Some(entry) = word(self, memory, at, 8) else {
            return Some(format!("{what} is in a GDT at {:#x}, which is not mapped RAM", gdt.base));
        };
        if entry >> 47 & 1 == 0 {
            return Some(format!("{what} names the GDT's entry at {at:#x}, {entry:#018x}, which is not present"));
        }
        (code && entry >> 43 & 3 != 3).then(|| format!("{what} names {entry:#018x}, which is not a code segment"))
    }

    /// Instructions of SSE and AVX where they are switched off.
    fn by_vectors(&self, memory: &Memory, i: &Instruction) -> Option<Cause> {
        let s = &self.sregs;
        let first = word(self, memory, self.pc(), 1)?;
        let vex = matches!(first, 0xc4 | 0xc5) && self.bits() == 64;
        let vector = |r: Register| (Register::XMM0..=Register::ZMM31).contains(&r);
        if vex && s.cr4 & CR4_OSXSAVE == 0 {
            let hint = "AVX wants CR4.OSXSAVE and XCR0 (xsetbv) first, or code that is compiled without it";
            return Some(cause(6, "it is an AVX instruction, and CR4.OSXSAVE is clear").hint(hint));
        }
        if vex || !(0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && vector(i.op_register(n))) {
            return None;
        }
        let hint = "SSE wants CR0.EM clear, CR0.MP and CR4.OSFXSR set; or compile the guest without it (-mno-sse)";
        match (s.cr0 & CR0_EM != 0, s.cr4 & CR4_OSFXSR == 0, s.cr0 & CR0_TS != 0) {
            (true, ..) => Some(cause(6, "it is an SSE instruction, and CR0.EM is set").hint(hint)),
            (_, true, _) => Some(cause(6, "it is an SSE instruction, and CR4.OSFXSR is clear").hint(hint)),
            (_, _, true) => Some(cause(7, "it is an SSE instruction, and CR0.TS is set")),
            _ => None,
        }
    }

    fn by_memory(&self, memory: &Memory, i: &Instruction) -> Option<Cause> {
        use Mnemonic::*;
        if matches!(i.mnemonic(), Lea | Nop | Invlpg | Prefetcht0 | Prefetchnta | Prefetchw) {
            return None;
        }
        let reads = matches!(
            i.mnemonic(),
            Cmp | Test
                | Push
                | Call
                | Jmp
                | Div
                | Idiv
                | Mul
                | Imul
                | Bt
                | Lgdt
                | Lidt
                | Ltr
                | Lldt
                | Outsb
                | Outsw
                | Outsd
        );
        for number in (0..i.op_count()).filter(|n| is_memory(i, *n)) {
            let address = self.address(i, number)?;
            let what = if number == 0 && !reads { Use::Write } else { Use::Read };
            let does = if what == Use::Write { "writes" } else { "reads" };
            if !self.is_canonical(address) {
                return Some(cause(13, format!("it {does} {address:#x}, which is not a canonical address")));
            }
            let last = address.wrapping_add(size(i) as u64 - 1);
            let wrong = self.wrong(memory, address, what).or_else(|| self.wrong(memory, last, what));
            if let Some(why) = wrong {
                return Some(cause(14, format!("it {does} {address:#x}, which {why}")));
            }
        }
        None
    }

    fn by_stack(&self, memory: &Memory, i: &Instruction) -> Option<Cause> {
        use Mnemonic::*;
        let size = u64::from(self.bits() / 8);
        let (at, what) = match i.mnemonic() {
            Push | Pushf | Pushfd | Pushfq | Pusha | Pushad | Call => (self.regs.rsp.wrapping_sub(size), Use::Write),
            Pop | Popf | Popfd | Popfq | Popa | Popad | Ret | Retf | Iret | Iretd | Iretq => (self.regs.rsp, Use::Read),
            _ => return None,
        };
        self.stack_trouble(memory, at, what)
    }

    /// What is wrong with the stack at `at`, an offset in the stack's segment.
    pub(super) fn stack_trouble(&self, memory: &Memory, at: u64, what: Use) -> Option<Cause> {
        let linear = self.on_stack(at);
        let hint = "give rsp the end of memory that is mapped and RAM before the first push, call or interrupt";
        if !self.is_canonical(linear) {
            return Some(cause(12, format!("the stack is at {linear:#x}, which is not canonical")).hint(hint));
        }
        let why = self.wrong(memory, linear, what)?;
        Some(cause(14, format!("it uses the stack, and {linear:#x} {why}")).hint(hint))
    }
}
