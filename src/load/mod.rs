//! Guests: recognising a file, settling what its format implies, loading it into RAM.
//!
//! Three steps, in this order: [`identify`] looks at the file alone, [`settle`] at the file and the user's words,
//! [`load`] also at RAM. Each refuses what it can, so that a hopeless start ends before a machine is built. Invariant:
//! the file is an enemy. No value from it sizes an allocation, bounds a loop or leads to an address unchecked, and
//! nothing is written outside of RAM and the boot tables.

mod arm_image;
mod bzimage;
mod describe;
mod elf;
mod flat;
mod fuzz;
mod image;
mod initramfs;
mod linux;
// Multiboot is of the PC; other architectures recognise it, to say so.
mod multiboot;
mod multiboot1;
mod multiboot2;
mod packed;
mod place;
mod program;
mod start_info;
mod symbols;
#[cfg(test)]
mod tests;

use anyhow::{Context, Result};

pub use bzimage::Header as BzHeader;
pub use fuzz::fuzz_one;
pub use image::Image;
pub use initramfs::archive;
pub use linux::Kernel;
pub use multiboot::AddressFields;
pub use multiboot1::Header as Multiboot1Header;
pub use multiboot2::Header as Multiboot2Header;
pub use program::{Program, Segment};
pub use symbols::SectionTable;

use crate::arch::{self, BootRegs, Layout};
use crate::board::{self, Chosen};
use crate::config::{Config, CpuMode, Cpuid, IrqChip, Switch};
use crate::error::{Refusal, refuse, usage};
use crate::memory::{Memory, Span};
use crate::trace::Symbols as Names;
use place::Places;

/// A guest and what it was found to be.
#[derive(Debug)]
pub struct Guest {
    /// What it is.
    pub format: Format,
    /// Its bytes.
    pub image: Image,
    /// An initial RAM disk that comes with it, before those of `--initrd`.
    pub initrd: Option<Image>,
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
    /// Linux, or a kernel that is entered as Linux can be.
    Linux(Kernel),
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
            Self::Linux(kernel) => kernel.name(),
        }
    }

    /// What to load, where the file says it.
    pub fn program(&self) -> Option<&Program> {
        match self {
            Self::Flat => None,
            Self::Linux(kernel) => kernel.program(),
            Self::Elf32(program) | Self::Elf64(program) => Some(program),
            Self::Multiboot1 { program, .. } | Self::Multiboot2 { program, .. } => Some(program),
        }
    }

    /// The mode it is entered in; for a flat guest, unless its user says otherwise.
    pub fn cpu_mode(&self) -> CpuMode {
        match self {
            Self::Flat => arch::FLAT_MODE,
            Self::Elf64(_) => arch::ELF64_MODE,
            Self::Linux(kernel) => kernel.cpu_mode(),
            Self::Elf32(_) | Self::Multiboot1 { .. } | Self::Multiboot2 { .. } => CpuMode::Protected,
        }
    }

    /// The page size that its page tables will have, where it says it.
    pub fn page_size(&self) -> Option<u32> {
        match self {
            Self::Linux(Kernel::Arm(header)) => header.page,
            _ => None,
        }
    }

    fn is_multiboot(&self) -> bool {
        matches!(self, Self::Multiboot1 { .. } | Self::Multiboot2 { .. })
    }
}

/// Names for the addresses of a guest: from the file of `--symbols`, or else from the guest itself.
///
/// # Errors
/// The file of `--symbols` cannot be read, is no ELF, or names no code.
pub fn symbols(config: &Config, guest: Option<&Guest>) -> Result<Names> {
    let Some(path) = &config.symbols else {
        let own = |guest: &Guest| Some(symbols::names(&guest.image, guest.format.program()?.sections?));
        return Ok(Names::new(guest.and_then(own).unwrap_or_default()));
    };
    let file = Image::open(path).context("--symbols")?;
    let table = elf::sections(&file).with_context(|| format!("--symbols {}", file.name()))?;
    let names = Names::new(table.map(|table| symbols::names(&file, table)).unwrap_or_default());
    if names.is_empty() {
        return Err(refuse(format!("--symbols {}: it names no code", file.name())).into());
    }
    Ok(names)
}

/// Finds out what a file is.
///
/// # Errors
/// It is nothing that this host can run, and why.
pub fn identify(image: Image) -> Result<Guest> {
    let name = image.name().to_owned();
    recognise(image).context(name)
}

fn recognise(image: Image) -> Result<Guest> {
    if image.is_empty() {
        return Err(refuse("it is empty").into());
    }
    let (image, head) = packed::open(image, multiboot2::SEARCH)?;
    Ok(Guest { format: format(&image, &head)?, image, initrd: None })
}

fn format(image: &Image, head: &[u8]) -> Result<Format> {
    linux::refuse_image(head)?;
    if let Some(header) = arm_image::find(head)? {
        if image.packed().is_none() {
            header.check(image.len())?;
        }
        return Ok(Format::Linux(Kernel::Arm(header)));
    }
    if let Some(packed) = image.packed() {
        let what = format!("what is packed in it ({}) is no Linux kernel for {}", packed.method.name(), arch::NAME);
        return Err(refuse(what).hint("unpack it first, if it is a guest").into());
    }
    if let Some(header) = bzimage::find(image, head)? {
        return Ok(Format::Linux(Kernel::Bz(header)));
    }
    let elf = if elf::is_elf(head) { Some(elf::read(image, head)?) } else { None };
    if let Some(format) = multiboot(image, head, elf.as_ref())? {
        return Ok(format);
    }
    let Some(elf) = elf else { return Ok(Format::Flat) };
    let linux = elf.notes.system == Some(elf::System::Linux);
    if let Some(entry) = elf.notes.pvh {
        let program = Program { entry, ..elf.program };
        program.check_below(place::REACH, "out of the reach of 32-bit code")?;
        program.check_entry()?;
        return Ok(Format::Linux(Kernel::Pvh { program, linux }));
    }
    elf.program.check_entry()?;
    match elf.notes.system {
        Some(elf::System::Linux) => return Ok(Format::Linux(Kernel::Vmlinux(elf.program))),
        Some(elf::System::Program) => return Err(elf::program_of_a_system("it has a GNU ABI tag").into()),
        None => {}
    }
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
    let linux = matches!(format, Format::Linux(_));
    let options = [
        ("--load-at", config.load_at.is_some(), flat),
        ("--entry", config.entry.is_some(), flat),
        ("--cpu-mode", config.cpu_mode.is_some(), flat),
        ("--cmdline", config.cmdline.is_some(), multiboot || linux),
        ("--cmdline-raw", config.cmdline_raw, linux),
        ("--initrd", !config.initrd.is_empty(), multiboot || linux),
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
    check(config)?;
    let mut settled = config.clone();
    if config.cmdline.as_ref().is_some_and(|text| text.contains('\0')) {
        return Err(usage("--cmdline holds a NUL, which would end it").into());
    }
    let flat = matches!(guest.format, Format::Flat);
    let linux = matches!(guest.format, Format::Linux(_));
    if flat {
        flat::settle(&mut settled)?;
    } else {
        settled.cpu_mode = Some(guest.format.cpu_mode());
    }
    if linux {
        settled.platform = config.platform.or(arch::LINUX_PLATFORM);
    }
    settled.rng = Some(config.rng.unwrap_or(if linux { Switch::On } else { Switch::Off }));
    settled.irqchip = Some(match (config.irqchip, config.cpus.count()) {
        (Some(IrqChip::None), 2..) if arch::SMP_NEEDS_IRQCHIP => {
            let what =
                format!("--irqchip none with --cpus {}: CPUs are started through local APICs", config.cpus.count());
            return Err(usage(what).hint("leave --irqchip out, or give it kernel").into());
        }
        (Some(chip), _) => chip,
        (None, 1) if flat && settled.virtio_devices() == 0 => arch::FLAT_IRQCHIP,
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

/// Refuses values that no machine can have.
///
/// # Errors
/// One that it has.
pub fn check(config: &Config) -> Result<(), Refusal> {
    if config.max_exits == Some(0) {
        return Err(usage("--max-exits 0: a guest makes at least one exit"));
    }
    if config.until.as_ref().is_some_and(String::is_empty) {
        return Err(usage("--until: an empty text is never shown"));
    }
    if config.cpus.count() == 0 {
        return Err(usage("--cpus 0: a machine has at least one CPU"));
    }
    Ok(())
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
        Format::Linux(Kernel::Arm(header)) => return arm_image::load(config, guest, header, memory, layout),
        Format::Linux(kernel) => {
            linux::check_ram(layout)?;
            return linux::load(config, guest, kernel, memory, layout);
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
    let Some(tree) = board::device_tree(config, layout, &Chosen::default())? else { return Ok(None) };
    let size = tree.len() as u64;
    let span = match config.fdt_at {
        None => places.highest(size, ALIGN, u64::MAX),
        Some(at) => {
            let span = Span::new(at.0, size).filter(|span| span.start % 8 == 0);
            let span =
                span.ok_or_else(|| usage(format!("--fdt-at {at}: give it a multiple of 8 below 2^64 - {size}")))?;
            places.claim(span, "the device tree")?;
            Some(span)
        }
    };
    write_parts(config, memory)?;
    span.map(|span| memory.write(span.start, &tree).map(|()| span)).transpose()
}

/// Writes what lies beside RAM when a guest begins that has a device tree to find it by.
fn write_parts(config: &Config, memory: &Memory) -> Result<()> {
    board::firmware(config)?.parts.iter().try_for_each(|(_, at, bytes)| memory.write(*at, bytes))
}
