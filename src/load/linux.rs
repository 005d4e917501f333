//! Linux, and kernels that are entered as it is: which there are, where their parts go in RAM, and Linux images of other
//! architectures, recognised so that nobody wonders why one runs as if it were a flat binary.
//!
//! Invariant: only marks that no other format has are looked at, and nothing of a kernel's is placed but in RAM that
//! nothing else has.

use anyhow::{Context, Result};

use super::Guest;
use super::elf::machine_name;
use super::image::{Image, at};
use super::multiboot::memory_map;
use super::place::{Places, REACH, list, prepare, prepare_linux};
use super::program::Program;
use super::start_info::{PAGE, Told, start_info, zero_page};
use super::{arm_image, bzimage};
use crate::arch::{self, BootRegs, Layout};
use crate::board;
use crate::config::{Config, CpuMode, Entry, RegValue};
use crate::error::{Refusal, refuse};
use crate::explain::tell;
use crate::memory::{Memory, Span};

/// A kernel that is told what there is in Linux's way or in PVH's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kernel {
    /// A bzImage.
    Bz(bzimage::Header),
    /// Linux as an ELF, entered in 64-bit mode.
    Vmlinux(Program),
    /// An ELF with an entry for PVH; Linux or not.
    Pvh {
        /// What to load; its entry is PVH's.
        program: Program,
        /// It is a Linux kernel.
        linux: bool,
    },
    /// An arm64 Image.
    Arm(arm_image::Header),
}

/// The most bytes of a command line, where no header says so: Linux's COMMAND_LINE_SIZE, less the NUL.
const CMDLINE: u64 = 2047;
/// The first page keeps what a PC keeps there.
const LOWEST: u64 = 0x1000;
/// The 64-bit entry of a bzImage, from the start of its code.
const ENTRY_64: u64 = 0x200;

impl Kernel {
    /// Its name, with an article.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Bz(_) => "a Linux kernel (bzImage)",
            Self::Vmlinux(_) => "a Linux kernel (vmlinux)",
            Self::Pvh { linux: true, .. } => "a Linux kernel (vmlinux with a PVH entry)",
            Self::Pvh { linux: false, .. } => "a PVH kernel",
            Self::Arm(_) => "a Linux kernel (arm64 Image)",
        }
    }

    /// What to load, where the file is an ELF.
    pub fn program(&self) -> Option<&Program> {
        match self {
            Self::Bz(_) | Self::Arm(_) => None,
            Self::Vmlinux(program) | Self::Pvh { program, .. } => Some(program),
        }
    }

    /// It is Linux: its command line is for Bantam to complete.
    pub fn is_linux(&self) -> bool {
        !matches!(self, Self::Pvh { linux: false, .. })
    }

    /// The mode that it is entered in.
    pub fn cpu_mode(&self) -> CpuMode {
        match self {
            Self::Bz(header) if header.wide => CpuMode::Long,
            Self::Vmlinux(_) => CpuMode::Long,
            Self::Bz(_) | Self::Pvh { .. } => CpuMode::Protected,
            Self::Arm(_) => CpuMode::El1,
        }
    }

    /// Puts the kernel into RAM; gives its entry.
    fn place(&self, image: &Image, memory: &Memory, places: &mut Places) -> Result<u64> {
        let Self::Bz(header) = self else {
            let program = self.program().context("a kernel without a program")?;
            program.load(image, memory, places)?;
            return Ok(program.entry);
        };
        let preferred = Span::new(header.preferred, header.memory).context("its setup header wraps around 2^64")?;
        let what = "the unpacked kernel";
        let span = match (places.claim(preferred, what), header.alignment) {
            (Ok(()), _) => preferred,
            (Err(refusal), None) => return Err(refusal.into()),
            // It unpacks itself to no place below the one that it prefers.
            (Err(_), Some(align)) => places.need(header.memory, align, header.preferred, what)?,
        };
        prepare(memory, span, what);
        let (at, size) = header.code;
        let code = Span::new(span.start, size).context("the kernel has no bytes")?;
        image.copy_to(memory, code, at)?;
        Ok(code.start + if header.wide { ENTRY_64 } else { 0 })
    }

    /// What it is told, in its form.
    fn form(&self, told: &Told, at: u64) -> Vec<u8> {
        match self {
            Self::Bz(header) => zero_page(Some(&header.setup), told),
            Self::Vmlinux(_) | Self::Arm(_) => zero_page(None, told),
            Self::Pvh { .. } => start_info(told, at),
        }
    }
}

/// Loads a kernel of the PC and all that it is told.
///
/// # Errors
/// Something has no room in RAM, or a file cannot be read.
pub fn load(config: &Config, guest: &Guest, kernel: &Kernel, memory: &Memory, layout: &Layout) -> Result<BootRegs> {
    let map = memory_map(&layout.ram);
    let usable = map.iter().filter(|a| a.kind == 1).map(|a| a.span).collect();
    let mut places = Places::new(&layout.ram, usable);
    let rsdp = firmware(config, memory, &mut places)?;
    let entry = kernel.place(&guest.image, memory, &mut places)?;
    let end = places.top().saturating_sub(1);
    let (most, last) = match kernel {
        Kernel::Bz(header) => (header.cmdline, header.initrd_last),
        _ => (CMDLINE, REACH - 1),
    };
    let text = command_line(config, kernel.is_linux(), most)?;
    let cmdline = places.need(text.len() as u64 + 1, 16, LOWEST, "the command line")?;
    memory.write(cmdline.start, text.as_bytes())?;
    let initrd = Initrd::open(config, guest)?;
    if kernel.is_linux() {
        prepare_linux(memory, &layout.ram, end, initrd.as_ref().map_or(0, Initrd::size));
    }
    let initrd = initrd.map(|files| files.load(memory, &mut places, last)).transpose()?;
    let told = Told { cmdline: cmdline.start, initrd, map, rsdp };
    // Its size does not depend on its place.
    let room = kernel.form(&told, 0).len() as u64;
    let page = places.need(room, PAGE, LOWEST, "what the kernel is told")?;
    memory.write(page.start, &kernel.form(&told, page.start))?;
    let mode = kernel.cpu_mode();
    let mut boot = arch::enter_linux(mode, Entry::Linear(entry), memory, layout)?;
    // boot.rst "64-bit boot protocol", "32-bit boot protocol"; PVH: ebx.
    let register = match (kernel, mode) {
        (Kernel::Pvh { .. }, _) => "ebx",
        (_, CpuMode::Long) => "rsi",
        _ => "esi",
    };
    arch::set_register(&mut boot, mode, &RegValue { name: register.into(), value: page.start })?;
    Ok(boot)
}

/// Writes what a firmware would have left; gives the address of the RSDP.
fn firmware(config: &Config, memory: &Memory, places: &mut Places) -> Result<Option<u64>> {
    let firmware = board::firmware(config)?;
    for (what, at, bytes) in &firmware.parts {
        let span = Span::new(*at, bytes.len() as u64).with_context(|| format!("{what}: empty"))?;
        places.claim(span, what)?;
        memory.write(*at, bytes)?;
        let why = "What a PC's firmware leaves in its ROM's place: what the machine has (ACPI), and how to restart it.";
        tell("firmware", || format!("{what}: {} bytes at {at:#x}", bytes.len()), why);
    }
    Ok(firmware.rsdp)
}

/// Of a word of the command line, what is before its `=`.
fn name(word: &str) -> &str {
    word.split('=').next().unwrap_or(word)
}

/// The command line: the user's words, and before them what the board adds unless they say otherwise.
///
/// # Errors
/// It is longer than the `most` bytes that the kernel takes.
pub fn command_line(config: &Config, linux: bool, most: u64) -> Result<String, Refusal> {
    let own = config.cmdline.as_deref().unwrap_or_default();
    let said = |added: &str| own.split_whitespace().any(|word| name(word) == name(added));
    let added = if linux && !config.cmdline_raw { board::linux_words(config) } else { Vec::new() };
    let words: Vec<_> = added.into_iter().filter(|word| !said(word)).chain((!own.is_empty()).then_some(own)).collect();
    let text = words.join(" ");
    if text.len() as u64 > most {
        let what = format!("the command line has {} bytes, and this kernel takes at most {most}", text.len());
        return Err(refuse(what).hint("shorten --cmdline; --cmdline-raw leaves out what Bantam adds"));
    }
    let why = "The kernel's command line, as it sees it: yours, and the console and what makes it boot fast unless you \
               said otherwise (--cmdline-raw).";
    tell("command line", || text.clone(), why);
    Ok(text)
}

/// The guest's own initial RAM disk and the files of `--initrd`, which become one.
pub struct Initrd<'a> {
    own: Option<&'a Image>,
    files: Vec<Image>,
    size: u64,
}

/// Archives in one initial RAM disk begin at multiples of 4 (Linux initramfs buffer format).
const ALIGN: u64 = 4;

impl<'a> Initrd<'a> {
    /// Opens them; none where there are none.
    ///
    /// # Errors
    /// One cannot be opened.
    pub fn open(config: &Config, guest: &'a Guest) -> Result<Option<Self>> {
        let files = config.initrd.iter().map(|path| Image::open(path).context("--initrd")).collect::<Result<_>>()?;
        let mut all = Self { own: guest.initrd.as_ref(), files, size: 0 };
        let end = |size: u64, file: &Image| size.checked_add(file.len())?.checked_next_multiple_of(ALIGN);
        let size = all.parts().try_fold(0, end);
        all.size = size.ok_or_else(|| refuse("--initrd: the files together have more than 2^64 bytes"))?;
        Ok((all.size > 0).then_some(all))
    }

    /// Bytes of all.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn parts(&self) -> impl Iterator<Item = &Image> {
        self.own.into_iter().chain(&self.files)
    }

    /// Puts them as high in RAM as `last` allows.
    ///
    /// # Errors
    /// There is no room.
    pub fn load(&self, memory: &Memory, places: &mut Places, last: u64) -> Result<Span> {
        let what = "the initial RAM disk";
        let span = places.highest(self.size, PAGE, last);
        let span = span.ok_or_else(|| places.no_room(what, self.size))?;
        prepare(memory, span, what);
        let mut at = span.start;
        for file in self.parts() {
            let part = Span::new(at, file.len()).context("an empty file")?;
            file.copy_to(memory, part, 0).with_context(|| format!("--initrd {}", file.name()))?;
            at = (at + file.len()).next_multiple_of(ALIGN);
        }
        Ok(span)
    }
}

/// A kernel of the PC has the RAM that it needs in this machine.
///
/// # Errors
/// RAM does not begin at 0, as a PC's does.
pub fn check_ram(layout: &Layout) -> Result<(), Refusal> {
    if layout.ram.first().is_some_and(|ram| ram.start == 0) {
        return Ok(());
    }
    Err(refuse(format!("a kernel of the PC needs RAM from address 0 on, and there is {}", list(&layout.ram)))
        .hint("leave --ram-base out"))
}

/// A guest of another architecture.
pub fn foreign(name: &str) -> Refusal {
    let article = if name.starts_with(['a', 'e', 'i', 'o', 'u', 'x']) { "an" } else { "a" };
    refuse(format!("this is {article} {name} guest; this host is {}", arch::NAME))
}

/// Refuses what is a Linux image in a format of Linux's own.
pub fn refuse_image(head: &[u8]) -> Result<(), Refusal> {
    if bzimage::is_bzimage(head) && arch::NAME != "x86-64" {
        return Err(foreign("x86-64"));
    }
    // Documentation/arch/arm64/booting.rst and arch/riscv/boot-image-header.rst: the magic number at byte 56.
    if at(head, 0x38) == Some(*b"ARM\x64") && arch::NAME != "arm64" {
        return Err(foreign("arm64"));
    }
    if at(head, 0x38) == Some(*b"RSC\x05") {
        return Err(foreign("riscv"));
    }
    Ok(())
}

/// The architecture of a PE file (PE format, "Machine Types").
pub fn pe_machine(head: &[u8]) -> Option<&'static str> {
    let pe = usize::try_from(u32::from_le_bytes(at(head, 0x3c)?)).ok()?;
    let signature: [u8; 6] = at(head, pe)?;
    match signature {
        [b'P', b'E', 0, 0, 0x64, 0xaa] => machine_name(183),
        [b'P', b'E', 0, 0, 0x64, 0x86] => machine_name(62),
        [b'P', b'E', 0, 0, 0x64, 0x50] => machine_name(243),
        [b'P', b'E', 0, 0, 0x64, 0x62] => machine_name(258),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(marks: &[(usize, &[u8])]) -> String {
        let mut head = vec![0; 0x400];
        for (offset, bytes) in marks {
            head[*offset..][..bytes.len()].copy_from_slice(bytes);
        }
        for cut in 0..head.len() {
            let _ = refuse_image(&head[..cut]);
        }
        refuse_image(&head).map_or_else(|e| e.to_string(), |()| String::new())
    }

    #[test]
    fn linux_images_are_recognised_by_their_own_marks() {
        for (name, marks) in [
            ("x86-64", &[(0x1fe, &b"\x55\xaa"[..]), (0x202, b"HdrS\x0f\x02")][..]),
            ("arm64", &[(0x38, b"ARM\x64")]),
            ("riscv", &[(0x38, b"RSC\x05")]),
        ] {
            let text = with(marks);
            assert_eq!(text.is_empty(), name == arch::NAME, "{text}");
            assert!(text.is_empty() || text.ends_with(&format!("{name} guest; this host is {}", arch::NAME)), "{text}");
        }
    }

    #[test]
    fn the_architecture_of_an_efi_program_is_known() {
        for (code, name) in [(b"\x64\xaa", Some("arm64")), (b"\x64\x86", Some("x86-64")), (b"\0\0", None)] {
            let head = [&b"MZ"[..], &[0; 0x3a], &[0x80], &[0; 0x43], b"PE\0\0", code].concat();
            assert_eq!(pe_machine(&head), name);
            assert!((0..head.len()).all(|cut| pe_machine(&head[..cut]).is_none()));
        }
    }

    #[test]
    fn half_a_mark_is_none() {
        assert_eq!(with(&[(0x1fe, b"\x55\xaa")]), "");
        assert_eq!(with(&[(0x202, b"HdrS")]), "");
        assert_eq!(with(&[(0, b"MZ")]), "");
    }
}
