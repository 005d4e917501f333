//! The states an x86-64 CPU is entered in: real, protected and long mode.
//!
//! A `BootRegs` is data; [`crate::vcpu::Vcpu::enter`] applies it. Invariant: each of them passes the checks that the SDM
//! lists for VM entry (Vol. 3, "Checks on the Guest State Area"), since VT-x refuses states that other hosts accept.

use std::io;

use anyhow::Context;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{Cap, Kvm, SyncReg, VcpuFd};

use crate::explain::{call, tell};
use crate::memory::{Memory, Span};

/// CR0: protection enable, monitor coprocessor, extension type, numeric error, write protect, paging (SDM vol. 3, 2.5).
pub mod cr0 {
    /// Protection enable.
    pub const PE: u64 = 1;
    /// Monitor coprocessor.
    pub const MP: u64 = 1 << 1;
    /// Extension type: always 1.
    pub const ET: u64 = 1 << 4;
    /// Numeric error: native x87 exceptions.
    pub const NE: u64 = 1 << 5;
    /// Paging.
    pub const PG: u64 = 1 << 31;
}
/// CR4: physical address extension, and the two bits that switch SSE on.
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
/// EFER: long mode enabled and active.
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Code and data selectors of the GDT that Bantam makes.
pub const CODE: u16 = 0x08;
/// Data.
pub const DATA: u16 = 0x10;

const CODE64: u64 = 0x00af_9b00_0000_ffff;
const CODE32: u64 = 0x00cf_9b00_0000_ffff;
const DATA32: u64 = 0x00cf_9300_0000_ffff;

const PAGE: u64 = 0x1000;
const GIB: u64 = 1 << 30;
/// Present, writable, accessed; and for the last level: dirty, 2 MiB page.
const TABLE: u64 = 0x23;
const LARGE: u64 = 0xe3;

/// The registers a CPU starts with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BootRegs {
    /// General registers, rip and rflags.
    pub regs: kvm_regs,
    /// Segments, descriptor tables and control registers.
    pub sregs: kvm_sregs,
}

fn segment(selector: u16, base: u64, limit: u32, kind: u8) -> kvm_segment {
    kvm_segment { base, limit, selector, type_: kind, present: 1, s: 1, ..Default::default() }
}

/// The hidden part of a segment register, as loading `descriptor` from the GDT makes it.
fn flat(selector: u16, descriptor: u64) -> kvm_segment {
    let bit = |n: u32| u8::from(descriptor >> n & 1 == 1);
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: (descriptor >> 40 & 0xf) as u8,
        s: bit(44),
        dpl: (descriptor >> 45 & 3) as u8,
        present: bit(47),
        avl: bit(52),
        l: bit(53),
        db: bit(54),
        g: bit(55),
        ..Default::default()
    }
}

/// KVM_SYNC_X86_REGS and KVM_SYNC_X86_SREGS.
const SYNC_REGS: i32 = 3;

impl Default for BootRegs {
    fn default() -> Self {
        Self::real()
    }
}

impl BootRegs {
    /// The address of the first instruction.
    pub fn entry(&self) -> u64 {
        self.sregs.cs.base.wrapping_add(self.regs.rip)
    }

    /// A PC's guests are not told of a device tree; the board makes none.
    pub fn hand_over(&mut self, _tree: Option<Span>) {}

    /// What a person wants to know of them.
    fn summary(&self) -> String {
        let (r, s) = (&self.regs, &self.sregs);
        let mode = match (s.cr0 & cr0::PE != 0, s.efer & EFER_LMA != 0) {
            (false, _) => "real mode",
            (true, false) => "protected mode",
            (true, true) => "long mode",
        };
        let start = format!("{mode}, cs {:#x} (base {:#x}), rip {:#x}", s.cs.selector, s.cs.base, r.rip);
        format!(
            "{start}, rsp {:#x}, rflags {:#x}, rax {:#x}, rbx {:#x}, cr0 {:#x}",
            r.rsp, r.rflags, r.rax, r.rbx, s.cr0
        )
    }

    /// Sets a CPU's registers: with the first KVM_RUN where the host synchronises registers (KVM_CAP_SYNC_REGS), else by
    /// two calls.
    ///
    /// # Errors
    /// KVM refuses the state.
    pub fn apply(&self, fd: &mut VcpuFd, kvm: &Kvm) -> anyhow::Result<()> {
        if kvm.check_extension_int(Cap::SyncRegs) & SYNC_REGS == SYNC_REGS {
            let why = "With the first KVM_RUN: KVM takes the registers from the shared page (KVM_CAP_SYNC_REGS), one call instead of three. \
                       This stands for KVM_SET_SREGS and KVM_SET_REGS.";
            tell("kvm_run.s.regs", || self.summary(), why);
            let sync = fd.sync_regs_mut();
            sync.regs = self.regs;
            sync.sregs = self.sregs;
            fd.set_sync_dirty_reg(SyncReg::Register);
            fd.set_sync_dirty_reg(SyncReg::SystemRegister);
            return Ok(());
        }
        let segments = || (self.summary(), "Segments and control registers: which mode the CPU starts in.");
        call("KVM_SET_SREGS", segments, || fd.set_sregs(&self.sregs))
            .map_err(io::Error::from)
            .context("KVM_SET_SREGS")?;
        let general = || (self.summary(), "General registers: where the CPU starts, and with what.");
        call("KVM_SET_REGS", general, || fd.set_regs(&self.regs)).map_err(io::Error::from).context("KVM_SET_REGS")
    }

    /// Real mode at 0:0, as after power-on but for cs and rip: every register 0, rflags 2, no caching disabled.
    pub fn real() -> Self {
        let data = segment(0, 0, 0xffff, 3);
        let sregs = kvm_sregs {
            cs: segment(0, 0, 0xffff, 0xb),
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            // SDM vol. 3, table 10-1: TR holds a present, busy 16-bit TSS after power-on; VT-x wants it so.
            tr: kvm_segment { s: 0, ..segment(0, 0, 0xffff, 0xb) },
            ldt: kvm_segment { s: 0, ..segment(0, 0, 0xffff, 2) },
            gdt: kvm_dtable { limit: 0xffff, ..Default::default() },
            idt: kvm_dtable { limit: 0xffff, ..Default::default() },
            cr0: cr0::ET,
            // SDM vol. 3, "IA32_APIC_BASE": enabled, at its usual place; CPU 0 is the bootstrap processor.
            apic_base: super::layout::LOCAL_APIC | 1 << 11 | 1 << 8,
            ..Default::default()
        };
        Self { regs: kvm_regs { rflags: 2, ..Default::default() }, sregs }
    }

    fn flat_mode(tables: Span, code: u64) -> Self {
        let mut boot = Self::real();
        let data = flat(DATA, DATA32);
        let sregs = &mut boot.sregs;
        sregs.cs = flat(CODE, code);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.gdt = kvm_dtable { base: tables.start, limit: 3 * 8 - 1, ..Default::default() };
        sregs.idt = kvm_dtable::default();
        sregs.cr0 = cr0::PE | cr0::ET | cr0::NE;
        boot
    }

    /// 32-bit protected mode at `rip`: flat segments, no paging, interrupts off.
    pub fn protected(tables: Span, rip: u64, rsp: u64) -> Self {
        let mut boot = Self::flat_mode(tables, CODE32);
        (boot.regs.rip, boot.regs.rsp) = (rip, rsp);
        boot
    }

    /// 64-bit mode at `rip`: RAM and the first 4 GiB identity-mapped, SSE on, interrupts off.
    pub fn long(tables: Span, rip: u64, rsp: u64) -> Self {
        let mut boot = Self::flat_mode(tables, CODE64);
        (boot.regs.rip, boot.regs.rsp) = (rip, rsp);
        boot.sregs.cr3 = tables.start + PAGE;
        boot.sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
        boot.sregs.cr0 |= cr0::PG | cr0::MP;
        boot.sregs.efer = EFER_LME | EFER_LMA;
        boot
    }
}

/// The GiB that long mode maps: the first four and all that hold RAM.
fn mapped_gibs(ram: &[Span]) -> Vec<u64> {
    let mut gibs: Vec<u64> = (0..4).chain(ram.iter().flat_map(|s| s.start / GIB..=s.last() / GIB)).collect();
    gibs.sort_unstable();
    gibs.dedup();
    gibs
}

/// Bytes that [`write_long_tables`] fills: the GDT's page, the PML4, a PDPT for each 512 GiB and a directory for each GiB.
pub fn long_mode_tables_size(ram: &[Span]) -> u64 {
    let gibs = mapped_gibs(ram);
    let mut pdpts: Vec<u64> = gibs.iter().map(|g| g / 512).collect();
    pdpts.dedup();
    PAGE * (2 + pdpts.len() as u64 + gibs.len() as u64)
}

/// Writes the GDT of protected mode.
///
/// # Errors
/// `tables` is not in `memory`.
pub fn write_protected_tables(memory: &Memory, tables: Span) -> anyhow::Result<()> {
    write_gdt(memory, tables, CODE32)
}

fn write_gdt(memory: &Memory, tables: Span, code: u64) -> anyhow::Result<()> {
    let gdt: Vec<u8> = [0, code, DATA32].iter().flat_map(|d: &u64| d.to_le_bytes()).collect();
    memory.write(tables.start, &gdt)
}

/// Puts code and data of the GDT where Linux wants them: at 0x10 and 0x18.
///
/// # Errors
/// The GDT is not in `memory`.
pub fn select_for_linux(boot: &mut BootRegs, memory: &Memory) -> anyhow::Result<()> {
    const STEP: u16 = 8;
    let sregs = &mut boot.sregs;
    let (mut gdt, first) = (vec![0; usize::from(sregs.gdt.limit) + 1], sregs.gdt.base);
    memory.read(first, &mut gdt)?;
    // All but the null descriptor moves up by one.
    let used = gdt.get(usize::from(STEP)..).unwrap_or_default();
    memory.write(first + u64::from(2 * STEP), used)?;
    memory.write(first + u64::from(STEP), &[0; 8])?;
    sregs.gdt.limit += STEP;
    for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        segment.selector += STEP;
    }
    Ok(())
}

/// Writes the GDT and the identity map of long mode, in 2 MiB pages.
///
/// # Errors
/// `tables` is not in `memory` or is smaller than [`long_mode_tables_size`].
pub fn write_long_tables(memory: &Memory, tables: Span, ram: &[Span]) -> anyhow::Result<()> {
    write_gdt(memory, tables, CODE64)?;
    let pml4 = tables.start + PAGE;
    let mut free = pml4 + PAGE;
    let mut pdpt = None;
    for gib in mapped_gibs(ram) {
        let (slot, index) = (gib / 512, gib % 512);
        let table = match pdpt {
            Some((of, at)) if of == slot => at,
            _ => {
                memory.write(pml4 + 8 * slot, &(free | TABLE).to_le_bytes())?;
                pdpt = Some((slot, free));
                free += PAGE;
                free - PAGE
            }
        };
        memory.write(table + 8 * index, &(free | TABLE).to_le_bytes())?;
        let pages: Vec<u8> = (0..512).flat_map(|i| ((gib * GIB + i * (2 << 20)) | LARGE).to_le_bytes()).collect();
        memory.write(free, &pages)?;
        free += PAGE;
    }
    Ok(())
}

#[cfg(test)]
#[allow(missing_docs)]
pub mod tests {
    use super::*;
    use crate::config::Size;

    const TABLES: Span = Span { start: 0xf800_0000, size: 0x10_0000 };

    /// Intel SDM vol. 3, "Checks on the Guest State Area", for what KVM passes through from user space, on a CPU
    /// with unrestricted guest; KVM itself fixes the bits of CR0 and CR4 that VMX operation wants set.
    pub fn assert_enterable(boot: &BootRegs) {
        let (s, r) = (&boot.sregs, &boot.regs);
        let long = s.efer & EFER_LMA != 0;
        let canonical = |a: u64| (a as i64) << 16 >> 16 == a as i64;
        // Control registers, debug registers and MSRs.
        assert!(s.cr0 & cr0::PG == 0 || s.cr0 & cr0::PE != 0, "CR0.PG without PE");
        assert!(s.cr0 >> 32 == 0 && s.cr0 & cr0::ET != 0);
        assert_eq!(long, s.efer & EFER_LME != 0 && s.cr0 & cr0::PG != 0, "EFER.LMA = LME and CR0.PG");
        assert!(!long || s.cr4 & CR4_PAE != 0, "IA-32e mode needs CR4.PAE");
        assert!(s.cr3 < 1 << 46);
        // Segment registers.
        assert!(s.tr.present == 1 && s.tr.s == 0 && s.tr.unusable == 0 && s.tr.type_ == 11 && s.tr.selector & 4 == 0);
        assert!(s.ldt.unusable == 1 || (s.ldt.type_ == 2 && s.ldt.s == 0 && s.ldt.present == 1));
        let protected = s.cr0 & cr0::PE != 0;
        assert!(if protected {
            [9, 11, 13, 15].contains(&s.cs.type_)
        } else {
            [3, 9, 11, 13, 15].contains(&s.cs.type_)
        });
        assert!(s.cs.s == 1 && s.cs.present == 1 && s.cs.dpl == s.ss.dpl);
        assert!(!(long && s.cs.l == 1 && s.cs.db == 1), "CS.L and CS.D");
        for segment in [&s.ds, &s.es, &s.fs, &s.gs, &s.ss] {
            assert!(segment.s == 1 && segment.present == 1 && segment.type_ & 1 == 1, "accessed data segment");
            assert!(segment.type_ & 8 == 0 || segment.type_ & 2 != 0, "readable if code");
        }
        assert!([3, 7].contains(&s.ss.type_));
        for segment in [&s.cs, &s.ds, &s.es, &s.fs, &s.gs, &s.ss, &s.tr, &s.ldt] {
            assert!(segment.limit & 0xfff == 0xfff || segment.g == 0, "a limit with low bits clear needs G = 0");
            assert!(segment.limit >> 20 == 0 || segment.g == 1, "a limit over 1 MiB needs G = 1");
            assert!(canonical(segment.base) && segment.avl <= 1);
            assert_eq!(segment.padding, 0);
        }
        for segment in [&s.cs, &s.ss, &s.ds, &s.es] {
            assert_eq!(segment.base >> 32, 0);
        }
        assert!(canonical(s.gdt.base) && canonical(s.idt.base));
        // RIP and RFLAGS.
        assert!(if long && s.cs.l == 1 { canonical(r.rip) } else { r.rip >> 32 == 0 });
        assert!(r.rflags & 2 != 0 && r.rflags & !0x3f_7fd7 == 0 && r.rflags & 1 << 17 == 0);
    }

    #[test]
    fn every_entry_state_passes_the_sdms_checks() {
        assert_enterable(&BootRegs::real());
        assert_enterable(&BootRegs::protected(TABLES, 0x10_0000, 0x8000_0000));
        assert_enterable(&BootRegs::long(TABLES, 0x10_0000, 0x8000_0000));
    }

    #[test]
    #[should_panic(expected = "CS.L and CS.D")]
    fn the_checks_can_fail() {
        let mut boot = BootRegs::long(TABLES, 0, 0);
        boot.sregs.cs.db = 1;
        assert_enterable(&boot);
    }

    fn walk(memory: &Memory, cr3: u64, address: u64) -> Option<u64> {
        let entry = |table: u64, index: u64| {
            let mut bytes = [0; 8];
            memory.read((table & !0xfff) + 8 * (index & 511), &mut bytes).unwrap();
            Some(u64::from_le_bytes(bytes)).filter(|e| e & 1 == 1)
        };
        let pdpt = entry(cr3, address >> 39)?;
        let directory = entry(pdpt, address >> 30)?;
        let page = entry(directory, address >> 21)?;
        assert_eq!(page & 0x80, 0x80);
        Some((page & !0x1f_ffff) + (address & 0x1f_ffff))
    }

    #[test]
    fn the_identity_map_covers_ram_and_the_first_4_gib() {
        for (memory, ram_base) in [(4096, None), (5 << 30, None), (1 << 40, None), (4096, Some(600 << 30))] {
            let config = crate::config::Config {
                memory: Size(memory),
                ram_base: ram_base.map(crate::config::Addr),
                cpu_mode: Some(crate::config::CpuMode::Long),
                ..Default::default()
            };
            let map = super::super::layout(&config).unwrap();
            let tables = map.tables.unwrap();
            let memory = Memory::new(&[tables], false).unwrap();
            write_long_tables(&memory, tables, &map.ram).unwrap();
            let cr3 = BootRegs::long(tables, 0, 0).sregs.cr3;
            let last = map.ram.iter().map(Span::last).max().unwrap();
            for address in [0, 0x1000, 0xffff_ffff, last, map.ram[0].start] {
                assert_eq!(walk(&memory, cr3, address), Some(address), "{address:#x}");
            }
            assert_eq!(walk(&memory, cr3, (last / GIB).max(3) * GIB + GIB), None);
        }
    }

    #[test]
    fn the_gdt_matches_the_hidden_parts() {
        let code = flat(CODE, CODE64);
        assert_eq!((code.type_, code.s, code.present, code.l, code.db, code.g), (0xb, 1, 1, 1, 0, 1));
        let code = flat(CODE, CODE32);
        assert_eq!((code.l, code.db), (0, 1));
        let data = flat(DATA, DATA32);
        assert_eq!((data.type_, data.db, data.g), (3, 1, 1));
    }
}
