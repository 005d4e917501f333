//! Registers in words: control registers, flags and segments by their names in the Intel SDM (vol. 3, chapter 2).

use std::fmt;

use kvm_bindings::kvm_segment;

use super::state::CpuState;

type Names = &'static [(u32, &'static str)];

const CR0: Names = &[
    (0, "PE"),
    (1, "MP"),
    (2, "EM"),
    (3, "TS"),
    (4, "ET"),
    (5, "NE"),
    (16, "WP"),
    (18, "AM"),
    (29, "NW"),
    (30, "CD"),
    (31, "PG"),
];
const CR4: Names = &[
    (0, "VME"),
    (1, "PVI"),
    (2, "TSD"),
    (3, "DE"),
    (4, "PSE"),
    (5, "PAE"),
    (6, "MCE"),
    (7, "PGE"),
    (8, "PCE"),
    (9, "OSFXSR"),
    (10, "OSXMMEXCPT"),
    (11, "UMIP"),
    (12, "LA57"),
    (13, "VMXE"),
    (14, "SMXE"),
    (16, "FSGSBASE"),
    (17, "PCIDE"),
    (18, "OSXSAVE"),
    (20, "SMEP"),
    (21, "SMAP"),
    (22, "PKE"),
    (23, "CET"),
];
const EFER: Names = &[(0, "SCE"), (8, "LME"), (10, "LMA"), (11, "NXE"), (12, "SVME"), (14, "FFXSR")];
const RFLAGS: Names = &[
    (0, "CF"),
    (2, "PF"),
    (4, "AF"),
    (6, "ZF"),
    (7, "SF"),
    (8, "TF"),
    (9, "IF"),
    (10, "DF"),
    (11, "OF"),
    (14, "NT"),
    (16, "RF"),
    (17, "VM"),
    (18, "AC"),
    (21, "ID"),
];

/// The names of the bits that are set; a bit without a name by its number.
fn names(value: u64, known: Names) -> String {
    let name = |bit: u32| {
        let known = known.iter().find(|(number, _)| *number == bit);
        known.map_or_else(|| format!("bit{bit}"), |(_, name)| (*name).to_owned())
    };
    let set: Vec<_> = (0..64).filter(|bit| value >> bit & 1 == 1).map(name).collect();
    if set.is_empty() { "none".into() } else { set.join(" ") }
}

/// What a segment register holds, in words.
fn describe(s: &kvm_segment) -> String {
    if s.unusable != 0 || s.present == 0 {
        return "not usable".into();
    }
    let kind = match (s.s, s.type_ & 8 != 0, s.l, s.db) {
        (0, ..) => return "system".into(),
        (_, true, 1, _) => "64-bit code",
        (_, true, _, 1) => "32-bit code",
        (_, true, ..) => "16-bit code",
        (_, false, ..) if s.type_ & 2 == 0 => "read-only data",
        (_, false, ..) => "data",
    };
    format!("{kind}, ring {}", s.dpl)
}

impl fmt::Display for CpuState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (r, s) = (&self.regs, &self.sregs);
        let rows = [
            [("rax", r.rax), ("rbx", r.rbx), ("rcx", r.rcx), ("rdx", r.rdx)],
            [("rsi", r.rsi), ("rdi", r.rdi), ("rbp", r.rbp), ("rsp", r.rsp)],
            [("r8 ", r.r8), ("r9 ", r.r9), ("r10", r.r10), ("r11", r.r11)],
            [("r12", r.r12), ("r13", r.r13), ("r14", r.r14), ("r15", r.r15)],
            [("rip", r.rip), ("flg", r.rflags), ("cr0", s.cr0), ("cr2", s.cr2)],
            [("cr3", s.cr3), ("cr4", s.cr4), ("efr", s.efer), ("apc", s.apic_base)],
        ];
        for row in rows {
            let words: Vec<_> = row.iter().map(|(name, value)| format!("{name} {value:016x}")).collect();
            writeln!(f, "  {}", words.join("  "))?;
        }
        writeln!(f, "  cr0: {}", names(s.cr0, CR0))?;
        writeln!(f, "  cr4: {}", names(s.cr4, CR4))?;
        writeln!(f, "  efer: {}", names(s.efer, EFER))?;
        // Bit 1 is always set, bits 12 and 13 are the I/O privilege level.
        let interrupts = if r.rflags & 1 << 9 == 0 { "off" } else { "on" };
        let flags = names(r.rflags & !0x3002, RFLAGS);
        writeln!(f, "  rflags: {flags}; interrupts {interrupts}, IOPL {}", r.rflags >> 12 & 3)?;
        let segments = [
            ("cs", s.cs),
            ("ss", s.ss),
            ("ds", s.ds),
            ("es", s.es),
            ("fs", s.fs),
            ("gs", s.gs),
            ("tr", s.tr),
            ("ldt", s.ldt),
        ];
        for (name, segment) in segments {
            let words = describe(&segment);
            let kvm_segment { selector, base, limit, type_, .. } = segment;
            writeln!(f, "  {name:3} {selector:04x} base {base:016x} limit {limit:08x} type {type_:x}: {words}")?;
        }
        let (gdt, idt) = (s.gdt, s.idt);
        write!(
            f,
            "  gdt base {:016x} limit {:04x}  idt base {:016x} limit {:04x}",
            gdt.base, gdt.limit, idt.base, idt.limit
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_named_and_those_without_a_name_numbered() {
        assert_eq!(names(0x8000_0031, CR0), "PE ET NE PG");
        assert_eq!(names(0x620, CR4), "PAE OSFXSR OSXMMEXCPT");
        assert_eq!(names(1 << 40 | 1, CR0), "PE bit40");
        assert_eq!(names(0, EFER), "none");
    }
}
