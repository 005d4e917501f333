//! What Multiboot 1 and 2 have in common: kernels described by address fields, the memory map, modules, the entry state.
//!
//! Specifications: Multiboot 0.6.96 and Multiboot2 2.0, cited as MB1 and MB2. Invariant: all that the kernel is told of
//! lies in RAM below 4 GiB, in places that nothing else has.

use anyhow::{Context, Result};

use super::image::Image;
use super::linux::foreign;
use super::place::{Places, REACH};
use super::program::{Program, Segment};
use super::symbols::Symbols;
use super::{multiboot1, multiboot2};
use crate::arch::{self, BootRegs, Layout};
use crate::config::{Config, CpuMode, Entry, RegValue};
use crate::error::{Refusal, refuse};
use crate::memory::{Memory, Span};

/// Who loaded the kernel.
pub const LOADER: &str = concat!("Bantam ", env!("CARGO_PKG_VERSION"));

/// Video memory and BIOS ROMs on a PC. RAM here, but kernels treat it as a PC's, so nothing of ours goes there.
const ROM: Span = Span { start: 0xa_0000, size: 0x6_0000 };
/// The first page keeps what a PC keeps there: vectors and the BIOS data area.
const LOWEST: u64 = 0x1000;

/// Where a kernel that brings no ELF headers is loaded (MB1 3.1.3, MB2 3.1.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressFields {
    /// Physical address of the header itself: ties addresses to places in the file.
    pub header: u32,
    /// Physical address of the first byte to load.
    pub load: u32,
    /// One past the last byte to load; 0: to the end of the file.
    pub load_end: u32,
    /// One past the last byte of bss; 0: there is none.
    pub bss_end: u32,
}

impl AddressFields {
    /// The one segment that they describe, with the header at byte `at` of the file.
    pub fn program(&self, image: &Image, at: u64, entry: u32) -> Result<Program, Refusal> {
        let broken = |what: &str| refuse(format!("its multiboot addresses contradict each other: {what}"));
        let ahead = self.header.checked_sub(self.load).ok_or_else(|| broken("the header lies before load_addr"))?;
        let offset =
            at.checked_sub(ahead.into()).ok_or_else(|| broken("load_addr lies before the start of the file"))?;
        let ends = |end: u32, name| {
            end.checked_sub(self.load).map(u64::from).ok_or_else(|| broken(&format!("{name} lies before load_addr")))
        };
        let bss = if self.bss_end == 0 { 0 } else { ends(self.bss_end, "bss_end_addr")? };
        let (filled, size) = match self.load_end {
            0 => (image.len() - offset.min(image.len()), bss.max(image.len() - offset.min(image.len()))),
            end => {
                let filled = ends(end, "load_end_addr")?;
                if bss != 0 && bss < filled {
                    return Err(broken("bss_end_addr lies before load_end_addr"));
                }
                (filled, bss.max(filled))
            }
        };
        let span = Span::new(self.load.into(), size).ok_or_else(|| broken("there is nothing to load"))?;
        Program::new(image, vec![Segment { number: 0, offset, filled, span, flags: 7 }], entry.into())
    }
}

/// A module: where it is, and its string.
#[derive(Debug)]
pub struct Module {
    /// Where it is.
    pub span: Span,
    /// The file's name.
    pub name: Vec<u8>,
}

/// One range of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    /// Addresses.
    pub span: Span,
    /// 1: available RAM, 2: reserved (MB1 3.3, MB2 3.6.8).
    pub kind: u32,
}

/// All that the kernel is told, before it has a form.
#[derive(Debug)]
pub struct Handover<'a> {
    /// The command line, without a NUL.
    pub cmdline: &'a str,
    /// Modules, in the order of the command line.
    pub modules: Vec<Module>,
    /// The memory map, ascending.
    pub map: Vec<Area>,
    /// ELF sections.
    pub symbols: Option<Symbols>,
    /// The lowest address of the kernel.
    pub base: u64,
}

impl Handover<'_> {
    /// KiB of RAM from 0, and from 1 MiB, without a gap (MB1 3.3, MB2 3.6.4).
    pub fn kib(&self) -> (u32, u32) {
        let from = |start| {
            let area = self.map.iter().find(|a| a.kind == 1 && a.span.start == start);
            area.map_or(0, |a| u32::try_from(a.span.size / 1024).unwrap_or(u32::MAX))
        };
        (from(0), from(ROM.last() + 1))
    }

    /// The information structure at `at`.
    fn form(&self, header: Option<&multiboot2::Header>, at: u64) -> Result<Vec<u8>> {
        match header {
            None => multiboot1::information(self, at),
            Some(header) => multiboot2::information(self, header),
        }
    }
}

/// The memory map of a PC with this RAM.
pub fn memory_map(ram: &[Span]) -> Vec<Area> {
    let cut = |span: &Span, from: u64, to: u64, kind| {
        let (start, end) = (span.start.max(from), span.last().min(to));
        let size = end.checked_sub(start)?.saturating_add(1);
        Some(Area { span: Span { start, size }, kind })
    };
    ram.iter()
        .flat_map(|span| {
            [
                cut(span, 0, ROM.start - 1, 1),
                cut(span, ROM.start, ROM.last(), 2),
                cut(span, ROM.last() + 1, u64::MAX, 1),
            ]
        })
        .flatten()
        .collect()
}

/// The low 32 bits of an address that is known to have no more.
pub fn low(address: u64) -> Result<[u8; 4]> {
    u32::try_from(address).map(u32::to_le_bytes).context("an address for the kernel lies beyond 4 GiB")
}

/// Places and loads the files of `--initrd`, above the kernel and 1 MiB where RAM reaches so far.
fn modules(config: &Config, memory: &Memory, places: &mut Places) -> Result<Vec<Module>> {
    let above = places.top().max(ROM.last() + 1);
    let mut modules = Vec::new();
    for path in &config.initrd {
        let file = Image::open(path)?;
        let what = format!("module {}", file.name());
        let span = match places.find(file.len(), 4096, above, &what) {
            Some(span) => span,
            None => places.need(file.len(), 4096, LOWEST, &what)?,
        };
        file.copy_to(memory, span, 0).context(what)?;
        let name = path.file_name().unwrap_or(path.as_os_str());
        modules.push(Module { span, name: name.as_encoded_bytes().to_vec() });
    }
    Ok(modules)
}

/// Loads a kernel and all that it is told; `header` is that of a Multiboot 2 kernel.
///
/// # Errors
/// Something has no room in RAM, or a file cannot be read.
pub fn load(
    config: &Config,
    image: &Image,
    (program, header): (&Program, Option<&multiboot2::Header>),
    memory: &Memory,
    layout: &Layout,
) -> Result<BootRegs> {
    let map = memory_map(&layout.ram);
    let usable = map.iter().filter(|a| a.kind == 1).map(|a| a.span).collect();
    let mut places = Places::new(&layout.ram, usable);
    program.load(image, memory, &mut places)?;
    let modules = modules(config, memory, &mut places)?;
    let symbols = program.sections.and_then(|table| Symbols::read(image, table));
    let cmdline = config.cmdline.as_deref().unwrap_or_default();
    let mut handover = Handover { cmdline, modules, map, symbols, base: program.base() };
    let above = places.top().max(LOWEST);
    let what = "the multiboot information with its command line";
    // Its size does not depend on its place. Symbols, which may be large, give way.
    let size = handover.form(header, 0)?.len() as u64;
    let span = match places.find(size, 16, LOWEST, what) {
        Some(span) => span,
        None => {
            handover.symbols = None;
            let size = handover.form(header, 0)?.len() as u64;
            places.need(size, 16, LOWEST, what)?
        }
    };
    if handover.symbols.as_mut().is_some_and(|s| s.fill(image, memory, &mut places, above).is_none()) {
        handover.symbols = None;
    }
    memory.write(span.start, &handover.form(header, span.start)?)?;
    let mut boot = arch::enter(CpuMode::Protected, Entry::Linear(program.entry), memory, layout)?;
    // MB1 3.2, MB2 3.3: what a kernel knows its loader by, and where the information is.
    let loaded = if header.is_some() { multiboot2::LOADED } else { multiboot1::LOADED };
    for (name, value) in [("eax", loaded.into()), ("ebx", span.start)] {
        arch::set_register(&mut boot, CpuMode::Protected, &RegValue { name: name.into(), value })?;
    }
    Ok(boot)
}

/// This host's CPU can run kernels of a PC.
pub fn check_here() -> Result<(), Refusal> {
    arch::elf_mode(false, elf::abi::EM_386).map(|_| ()).ok_or_else(|| foreign("x86 multiboot"))
}

/// Checks what makes a kernel possible to load at all.
pub fn check(program: &Program) -> Result<(), Refusal> {
    program.check_below(REACH, "out of a multiboot kernel's reach")?;
    program.check_entry()
}
