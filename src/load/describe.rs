//! What `bantam inspect` prints of a guest: one fact a line, `key: value`.
//!
//! Invariant: nothing of the file's own text is printed, so that no file can write to a terminal.

use std::fmt;

use super::program::{Program, Segment};
use super::{Format, Guest, multiboot2};
use crate::arch;
use crate::config::Config;

impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "file: {}", self.image.name())?;
        writeln!(f, "size: {} bytes", self.image.len())?;
        let format = self.format.name().split_once(' ').map_or("", |(_article, name)| name);
        writeln!(f, "format: {format}")?;
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
