//! What `bantam inspect` prints of a guest: one fact a line, `key: value`.
//!
//! Invariant: of the file's own text only a kernel's version is printed, and of that only what shows as it is, so that no
//! file can write to a terminal.

use std::fmt;

use super::arm_image::Header as ArmHeader;
use super::bzimage::Header;
use super::image::Image;
use super::packed::Packed;
use super::program::{Program, Segment};
use super::{Format, Guest, Kernel, multiboot2};
use crate::arch;
use crate::config::Config;

impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "file: {}", self.image.name())?;
        writeln!(f, "size: {} bytes", self.image.len())?;
        let format = self.format.name().split_once(' ').map_or("", |(_article, name)| name);
        writeln!(f, "format: {format}")?;
        if let Format::Linux(Kernel::Bz(header)) = &self.format {
            return bzimage(f, header);
        }
        if let Format::Linux(Kernel::Arm(header)) = &self.format {
            return arm_image(f, &self.image, header);
        }
        let Some(program) = self.format.program() else {
            writeln!(f, "architecture: not said by the file; taken for {}", arch::NAME)?;
            writeln!(
                f,
                "entry: where it is loaded ({:#x} unless --load-at), unless --entry",
                arch::flat_load(&Config::default())
            )?;
            writeln!(f, "mode: {} unless --cpu-mode", arch::FLAT_MODE)?;
            return writeln!(f, "needs: {} bytes of RAM where it is loaded", self.image.len());
        };
        writeln!(f, "architecture: {}", arch::NAME)?;
        writeln!(f, "entry: {:#x}", program.entry)?;
        writeln!(f, "mode: {}", self.format.cpu_mode())?;
        segments(f, program)?;
        if let Format::Multiboot1 { header, .. } = &self.format {
            writeln!(f, "header: at {:#x} of the file, flags {:#x}", header.at, header.flags)?;
        }
        if let Format::Multiboot2 { header, .. } = &self.format {
            writeln!(f, "header: at {:#x} of the file", header.at)?;
            for kind in &header.requests {
                let given = if multiboot2::GIVEN.contains(kind) { "" } else { ", which this machine has not" };
                writeln!(f, "asks for: {} (tag {kind}){given}", multiboot2::information_name(*kind))?;
            }
            if let Some((lowest, highest)) = header.relocatable {
                writeln!(f, "relocatable: {lowest:#x}..={highest:#x}")?;
            }
        }
        if let Some(table) = program.sections {
            writeln!(f, "section headers: {}", table.count)?;
        }
        writeln!(f, "needs: RAM at {:#x}..={:#x}", program.base(), program.last())
    }
}

fn arm_image(f: &mut fmt::Formatter<'_>, image: &Image, header: &ArmHeader) -> fmt::Result {
    writeln!(f, "architecture: arm64")?;
    if let Some(version) = header.version(image) {
        writeln!(f, "version: {version}")?;
    }
    if let Some(Packed { method, at, size, zboot }) = image.packed() {
        let program = if zboot { ", an EFI program that would unpack itself" } else { "" };
        writeln!(f, "packed: {}, {size} bytes at {at:#x} of the file{program}", method.name())?;
    }
    writeln!(f, "text offset: {:#x}, after a multiple of 2 MiB", header.text_offset)?;
    match header.page {
        Some(page) => writeln!(f, "page size: {page} bytes")?,
        None => writeln!(f, "page size: not said")?,
    }
    writeln!(f, "entry: where it is loaded")?;
    writeln!(f, "mode: el1")?;
    match header.image_size {
        0 => writeln!(f, "needs: it does not say how much RAM (older than Linux 3.17)"),
        size => writeln!(f, "needs: {size} bytes of RAM, zeroed data included, and a device tree"),
    }
}

fn bzimage(f: &mut fmt::Formatter<'_>, header: &Header) -> fmt::Result {
    let [major, minor] = header.protocol.to_be_bytes();
    writeln!(f, "architecture: x86-64")?;
    writeln!(f, "version: {}", header.version)?;
    writeln!(f, "boot protocol: {major}.{minor:02}")?;
    let entries = if header.wide { "64-bit (0x200 behind the start of the kernel), 32-bit" } else { "32-bit" };
    writeln!(f, "entries: {entries}")?;
    writeln!(f, "kernel: {} bytes, from {:#x} of the file", header.code.1, header.code.0)?;
    writeln!(f, "compression: {}", header.compression)?;
    writeln!(f, "command line: at most {} bytes", header.cmdline)?;
    writeln!(f, "initial RAM disk: below {:#x}", header.initrd_last.saturating_add(1))?;
    let elsewhere = match header.alignment {
        Some(align) => format!("or above that, at a multiple of {align:#x}"),
        None => "and nowhere else".into(),
    };
    writeln!(f, "needs: {} bytes of RAM at {:#x}, {elsewhere}", header.memory, header.preferred)
}

fn segments(f: &mut fmt::Formatter<'_>, program: &Program) -> fmt::Result {
    for Segment { number, offset, filled, span, flags } in &program.segments {
        let letter = |bit: u32, letter| if flags >> bit & 1 == 1 { letter } else { '-' };
        let flags = [letter(2, 'r'), letter(1, 'w'), letter(0, 'x')].iter().collect::<String>();
        let place = format!("{:#012x}..={:#012x} {flags}", span.start, span.last());
        writeln!(
            f,
            "segment {number}: {place} {:>10} bytes, {filled} of them from {offset:#x} of the file",
            span.size
        )?;
    }
    Ok(())
}
