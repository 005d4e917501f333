//! Guests: recognising a file, settling what its format implies, loading it into RAM.
//!
//! Three steps, in this order: [`identify`] looks at the file alone, [`settle`] at the file and the user's words,
//! [`load`] also at RAM. Each refuses what it can, so that a hopeless start ends before a machine is built. Invariant:
//! the file is an enemy. No value from it sizes an allocation, bounds a loop or leads to an address unchecked, and
//! nothing is written outside of RAM and the boot tables.

mod describe;
mod elf;
mod flat;
mod fuzz;
mod image;
mod linux;
// Multiboot is of the PC; other architectures recognise it, to say so.
mod multiboot;
mod multiboot1;
mod multiboot2;
mod place;
mod program;
mod symbols;
#[cfg(test)]
mod tests;

use anyhow::{Context, Result};

pub use fuzz::fuzz_one;
pub use image::Image;
pub use multiboot::AddressFields;
pub use multiboot1::Header as Multiboot1Header;
pub use multiboot2::Header as Multiboot2Header;
pub use program::{Program, Segment};
pub use symbols::SectionTable;

use crate::arch::{self, BootRegs, Layout};
use crate::board;
use crate::config::{Config, CpuMode, Cpuid, IrqChip};
use crate::error::{Refusal, refuse, usage};
use crate::memory::{Memory, Span};
use place::Places;

/// A guest and what it was found to be.
#[derive(Debug)]
pub struct Guest {
    /// What it is.
    pub format: Format,
    /// Its bytes.
    pub image: Image,
}

/// The formats that Bantam runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Format {
    /// Machine code and nothing else.
    Flat,
    /// A 32-bit ELF program.
    Elf32(Program),
    /// A 64-bit ELF program.
    Elf64(Program),
    /// A Multiboot 1 kernel, ELF or not.
    Multiboot1 {
        /// What it asks for.
        header: Multiboot1Header,
        /// What to load.
        program: Program,
    },
    /// A Multiboot 2 kernel, ELF or not.
    Multiboot2 {
        /// What it asks for.
        header: Multiboot2Header,
        /// What to load.
        program: Program,
    },
}

impl Format {
    /// Its name, with an article.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Flat => "a flat binary",
            Self::Elf32(_) => "an ELF32 file",
            Self::Elf64(_) => "an ELF64 file",
            Self::Multiboot1 { .. } => "a multiboot 1 kernel",
            Self::Multiboot2 { .. } => "a multiboot 2 kernel",
        }
    }

    /// What to load, where the file says it.
    pub fn program(&self) -> Option<&Program> {
        match self {
            Self::Flat => None,
            Self::Elf32(program) | Self::Elf64(program) => Some(program),
            Self::Multiboot1 { program, .. } | Self::Multiboot2 { program, .. } => Some(program),
        }
    }

    /// The mode it is entered in; for a flat guest, unless its user says otherwise.
    pub fn cpu_mode(&self) -> CpuMode {
        match self {
            Self::Flat => arch::FLAT_MODE,
            Self::Elf64(_) => arch::ELF64_MODE,
            Self::Elf32(_) | Self::Multiboot1 { .. } | Self::Multiboot2 { .. } => CpuMode::Protected,
        }
    }

    fn is_multiboot(&self) -> bool {
        matches!(self, Self::Multiboot1 { .. } | Self::Multiboot2 { .. })
    }
}

/// Finds out what a file is.
///
/// # Errors
/// It is nothing that this host can run, and why.
pub fn identify(image: Image) -> Result<Guest> {
    let format = format(&image).with_context(|| image.name().to_owned())?;
    Ok(Guest { format, image })
}

fn format(image: &Image) -> Result<Format> {
    if image.is_empty() {
        return Err(refuse("it is empty").into());
    }
    let head = image.head(multiboot2::SEARCH)?;
    linux::refuse_image(&head)?;
    let elf = if elf::is_elf(&head) { Some(elf::read(image, &head)?) } else { None };
    if let Some(format) = multiboot(image, &head, elf.as_ref())? {
        return Ok(format);
    }
    let Some(elf) = elf else { return Ok(Format::Flat) };
    match elf.system {
        Some(elf::System::Linux) => return Err(linux::not_yet("a Linux kernel (vmlinux)").into()),
        Some(elf::System::Program) => return Err(elf::program_of_a_system("it has a GNU ABI tag").into()),
        None => {}
    }
    elf.program.check_entry()?;
    Ok(if elf.wide { Format::Elf64(elf.program) } else { Format::Elf32(elf.program) })
}

fn multiboot(image: &Image, head: &[u8], elf: Option<&elf::Elf>) -> Result<Option<Format>> {
    // An ELF that another architecture can run is no PC's kernel, whatever bytes are in it.
    let here = multiboot::check_here();
    if elf.is_some() && here.is_err() {
        return Ok(None);
    }
    let program = || elf.map(|e| e.program.clone());
    if let Some(header) = multiboot2::find(head)? {
        here?;
        let program = header.program(image, program())?;
        multiboot::check(&program)?;
        return Ok(Some(Format::Multiboot2 { header, program }));
    }
    if let Some(header) = multiboot1::find(head)? {
        here?;
        let program = header.program(image, program())?;
        multiboot::check(&program)?;
        return Ok(Some(Format::Multiboot1 { header, program }));
    }
    Ok(None)
}

/// Refuses the options that mean nothing for this guest.
fn refuse_words(config: &Config, format: &Format) -> Result<(), Refusal> {
    let (flat, multiboot) = (matches!(format, Format::Flat), format.is_multiboot());
    let options = [
        ("--load-at", config.load_at.is_some(), flat),
        ("--entry", config.entry.is_some(), flat),
        ("--cpu-mode", config.cpu_mode.is_some(), flat),
        ("--cmdline", config.cmdline.is_some(), multiboot),
        ("--initrd", !config.initrd.is_empty(), multiboot),
        ("--ram-base", config.ram_base.is_some(), !multiboot),
        ("--fdt-at", config.fdt_at.is_some(), !multiboot),
    ];
    match options.iter().find(|(_, given, sensible)| *given && !sensible) {
        Some((option, ..)) => Err(usage(format!("{option} means nothing for {}", format.name()))),
        None => Ok(()),
    }
}

/// Fills in what the guest's format implies: afterwards the mode, the interrupt controllers and a flat guest's place
/// are always said.
///
/// # Errors
/// An option that means nothing for this guest, or a value that no machine can have: status 2.
pub fn settle(config: &Config, guest: &Guest) -> Result<Config> {
    refuse_words(config, &guest.format)?;
    let mut settled = config.clone();
    if config.max_exits == Some(0) {
        return Err(usage("--max-exits 0: a guest makes at least one exit").into());
    }
    if config.until.as_ref().is_some_and(String::is_empty) {
        return Err(usage("--until: an empty text is never shown").into());
    }
    if config.cmdline.as_ref().is_some_and(|text| text.contains('\0')) {
        return Err(usage("--cmdline holds a NUL, which would end it").into());
    }
    let flat = matches!(guest.format, Format::Flat);
    if flat {
        flat::settle(&mut settled)?;
    } else {
        settled.cpu_mode = Some(guest.format.cpu_mode());
    }
    settled.irqchip = Some(match (config.irqchip, config.cpus) {
        (_, 0) => return Err(usage("--cpus 0: a machine has at least one CPU").into()),
        (Some(IrqChip::Split), _) => {
            return Err(refuse("--irqchip split: not yet").hint("--irqchip kernel works").into());
        }
        (Some(IrqChip::None), 2..) if arch::SMP_NEEDS_IRQCHIP => {
            let what = format!("--irqchip none with --cpus {}: CPUs are started through local APICs", config.cpus);
            return Err(usage(what).hint("leave --irqchip out, or give it kernel").into());
        }
        (Some(chip), _) => chip,
        (None, 1) if flat => arch::FLAT_IRQCHIP,
        (None, _) => IrqChip::Kernel,
    });
    if let (None, Some(mark)) = (settled.cpuid, arch::ASKS_CPUID) {
        let simple = flat && settled.irqchip == Some(IrqChip::None) && settled.cpu_mode == Some(CpuMode::Real);
        let asks = !simple || flat::may_ask_cpuid(&guest.image, mark)?;
        settled.cpuid = Some(if asks { Cpuid::Host } else { Cpuid::None });
    }
    let mut boot = BootRegs::default();
    apply(&settled, guest, &mut boot)?;
    Ok(settled)
}

/// Sets the registers that the user asks for, over what the format says.
fn apply(config: &Config, guest: &Guest, boot: &mut BootRegs) -> Result<(), Refusal> {
    let mode = config.cpu_mode.unwrap_or(guest.format.cpu_mode());
    config.reg.iter().try_for_each(|reg| arch::set_register(boot, mode, reg))
}

/// Writes the guest, and all that it is told, into RAM; returns the registers of its first CPU.
///
/// `config` is settled and `memory` fresh: what a guest expects to be zero is not written.
///
/// # Errors
/// RAM does not hold the guest, or its file cannot be read.
pub fn load(config: &Config, guest: &Guest, memory: &Memory, layout: &Layout) -> Result<BootRegs> {
    let mut boot = place(config, guest, memory, layout).with_context(|| guest.image.name().to_owned())?;
    apply(config, guest, &mut boot)?;
    Ok(boot)
}

fn place(config: &Config, guest: &Guest, memory: &Memory, layout: &Layout) -> Result<BootRegs> {
    let image = &guest.image;
    let mut places = Places::new(&layout.ram, layout.ram.clone());
    let mut boot = match &guest.format {
        Format::Flat => flat::load(config, image, memory, layout, &mut places)?,
        Format::Elf32(program) | Format::Elf64(program) => {
            program.load(image, memory, &mut places)?;
            arch::enter(guest.format.cpu_mode(), crate::config::Entry::Linear(program.entry), memory, layout)?
        }
        Format::Multiboot1 { program, .. } => return multiboot::load(config, image, (program, None), memory, layout),
        Format::Multiboot2 { header, program } => {
            return multiboot::load(config, image, (program, Some(header)), memory, layout);
        }
    };
    boot.hand_over(device_tree(config, memory, layout, &mut places)?);
    Ok(boot)
}

/// Writes the machine's device tree, where it has one, to the place that the user names, or else as high in RAM as it
/// fits; a guest without room for it gets none.
fn device_tree(config: &Config, memory: &Memory, layout: &Layout, places: &mut Places) -> Result<Option<Span>> {
    /// The format asks for 8 (Devicetree Specification 0.4, 5.2); a stack below the tree likes 16.
    const ALIGN: u64 = 16;
    let Some(tree) = board::device_tree(config, layout)? else { return Ok(None) };
    let size = tree.len() as u64;
    let span = match config.fdt_at {
        None => places.highest(size, ALIGN),
        Some(at) => {
            let span = Span::new(at.0, size).filter(|span| span.start % 8 == 0);
            let span =
                span.ok_or_else(|| usage(format!("--fdt-at {at}: give it a multiple of 8 below 2^64 - {size}")))?;
            places.claim(span, "the device tree")?;
            Some(span)
        }
    };
    span.map(|span| memory.write(span.start, &tree).map(|()| span)).transpose()
}
