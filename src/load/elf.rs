//! ELF guests: read header by header (System V ABI, chapters 4 and 5), never as a whole.
//!
//! Invariant: what [`read`] accepts is for this host's architecture and is a program without an operating system.

use anyhow::{Context, Result};
use elf::abi;
use elf::endian::LittleEndian;
use elf::file::{Class, FileHeader, parse_ident};
use elf::note::{Note, NoteIterator};
use elf::parse::{ParseAt, ParsingTable};
use elf::section::SectionHeader;
use elf::segment::ProgramHeader;

use super::image::Image;
use super::linux::foreign;
use super::program::{Program, Segment};
use super::symbols::SectionTable;
use crate::arch;
use crate::error::{Refusal, refuse};
use crate::memory::Span;

/// How much of a file's notes is looked at; Linux has a few hundred bytes of them.
const NOTES: u64 = 64 << 10;

/// What an ELF file holds.
#[derive(Debug)]
pub struct Elf {
    /// 64-bit.
    pub wide: bool,
    /// What to load.
    pub program: Program,
    /// What its notes say.
    pub notes: Notes,
}

/// What the notes of an ELF say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Notes {
    /// What it is for.
    pub system: Option<System>,
    /// Where it is entered as a PVH guest: in 32-bit mode, at this physical address.
    pub pvh: Option<u64>,
}

/// Who an ELF is by its notes, where that makes it no guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum System {
    /// A Linux kernel.
    Linux,
    /// A program for an operating system.
    Program,
}

/// The file is an ELF, as far as its first four bytes say.
pub fn is_elf(head: &[u8]) -> bool {
    head.starts_with(&abi::ELFMAGIC)
}

/// Architectures by ELF machine number (System V ABI and its registry).
pub fn machine_name(machine: u16) -> Option<&'static str> {
    Some(match machine {
        2 | 18 | 43 => "sparc",
        3 => "32-bit x86",
        4 => "m68k",
        8 => "mips",
        20 => "ppc",
        21 => "ppc64",
        22 => "s390",
        40 => "arm",
        50 => "ia64",
        62 => "x86-64",
        94 => "xtensa",
        183 => "arm64",
        243 => "riscv",
        247 => "bpf",
        258 => "loongarch",
        _ => return None,
    })
}

fn file_header(image: &Image, head: &[u8]) -> Result<FileHeader<LittleEndian>> {
    image.check("the ELF header", 0, 16)?;
    let (ident, rest) = head.split_at_checked(16).context("the ELF header is cut short")?;
    if ident.get(abi::EI_DATA) == Some(&abi::ELFDATA2MSB) {
        let machine = rest.get(2..4).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_be_bytes(*b));
        let name = machine_name(machine).map_or_else(|| format!("machine-{machine}"), str::to_owned);
        return Err(foreign(&format!("big-endian {name}")).into());
    }
    let ident = parse_ident::<LittleEndian>(ident).map_err(|e| refuse(format!("its ELF header is broken: {e}")))?;
    let size = if ident.1 == Class::ELF64 { 64 } else { 52 };
    image.check("the ELF header", 0, size)?;
    FileHeader::parse_tail(ident, rest).map_err(|e| refuse(format!("its ELF header is broken: {e}")).into())
}

/// It is a program for this architecture.
fn check_kind(header: &FileHeader<LittleEndian>) -> Result<(), Refusal> {
    let wide = header.class == Class::ELF64;
    if arch::elf_mode(wide, header.e_machine).is_none() {
        return Err(match machine_name(header.e_machine) {
            Some(name) => foreign(name),
            None => foreign(&format!("machine-{}", header.e_machine)),
        });
    }
    let bits = if wide { 64 } else { 32 };
    match header.e_type {
        abi::ET_EXEC | abi::ET_DYN => Ok(()),
        abi::ET_REL => Err(refuse(format!("this {bits}-bit ELF is an object file, not yet a program"))
            .hint("link it, as in: ld -Ttext=0x100000 -o guest guest.o")),
        abi::ET_CORE => Err(refuse(format!("this {bits}-bit ELF is a core dump, not a program"))),
        other => Err(refuse(format!("this {bits}-bit ELF is of type {other}, not a program"))),
    }
}

fn program_headers(image: &Image, header: &FileHeader<LittleEndian>) -> Result<Vec<ProgramHeader>> {
    let (count, size) = (usize::from(header.e_phnum), ProgramHeader::size_for(header.class));
    if count == 0 {
        return Err(refuse("this ELF has no program headers: there is nothing to load in it").into());
    }
    if header.e_phnum == abi::PN_XNUM {
        return Err(refuse("this ELF has more than 65,534 program headers").into());
    }
    if usize::from(header.e_phentsize) != size {
        let what = format!("its program headers have {} bytes each, not {size}", header.e_phentsize);
        return Err(refuse(what).into());
    }
    // At most 3.6 MB, and no more than the file has.
    let bytes = count * size;
    image.check("the program header table", header.e_phoff, bytes as u64)?;
    let mut table = vec![0; bytes];
    image.read_at(header.e_phoff, &mut table)?;
    let parsed = ParsingTable::<_, ProgramHeader>::new(LittleEndian, header.class, &table);
    let all: Vec<_> = parsed.iter().collect();
    (all.len() == count).then_some(all).context("its program headers are broken")
}

/// What a file's notes say. A broken note says nothing.
///
/// A note of the owner "Linux" is in every Linux kernel since 2007 (include/linux/elfnote.h). The GNU ABI tag comes with
/// the C library's start files: a program that has it calls an operating system, even where it is linked statically. The
/// entry of PVH is note 18 of the owner "Xen" (xen/include/public/elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY).
fn notes(image: &Image, header: &FileHeader<LittleEndian>, programs: &[ProgramHeader]) -> Notes {
    const PHYS32_ENTRY: u64 = 18;
    let (mut budget, mut found) = (NOTES, Notes::default());
    for segment in programs.iter().filter(|p| p.p_type == abi::PT_NOTE) {
        let size = segment.p_filesz.min(budget);
        budget -= size;
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        if image.read_at(segment.p_offset, &mut bytes).is_err() {
            continue;
        }
        let align = if segment.p_align == 8 { 8 } else { 4 };
        for note in NoteIterator::new(LittleEndian, header.class, align, &bytes) {
            match note {
                Note::Unknown(any) if any.name == b"Linux\0" => found.system = Some(System::Linux),
                Note::GnuAbiTag(_) => found.system = found.system.or(Some(System::Program)),
                Note::Unknown(any) if any.name == b"Xen\0" && any.n_type == PHYS32_ENTRY => {
                    found.pvh = any.desc.first_chunk().map(|entry| u32::from_le_bytes(*entry).into());
                }
                _ => {}
            }
        }
    }
    found
}

fn segments(programs: &[ProgramHeader]) -> Result<Vec<Segment>, Refusal> {
    let mut segments = Vec::new();
    for (number, p) in programs.iter().enumerate().filter(|(_, p)| p.p_type == abi::PT_LOAD) {
        if p.p_filesz > p.p_memsz {
            let what = format!("segment {number} has {:#x} bytes in the file, {:#x} in memory", p.p_filesz, p.p_memsz);
            return Err(refuse(what));
        }
        if p.p_memsz == 0 {
            continue;
        }
        let span = Span::new(p.p_paddr, p.p_memsz).ok_or_else(|| {
            refuse(format!("segment {number}, {:#x} bytes at {:#x}, wraps around 2^64", p.p_memsz, p.p_paddr))
        })?;
        segments.push(Segment { number, offset: p.p_offset, filled: p.p_filesz, span, flags: p.p_flags });
    }
    Ok(segments)
}

/// The entry as a physical address. Many kernels are linked at virtual addresses; as GRUB does, an entry in a
/// segment's virtual range means the same byte of its physical one.
fn entry(header: &FileHeader<LittleEndian>, programs: &[ProgramHeader]) -> u64 {
    let physical = |p: &ProgramHeader| {
        let offset = header.e_entry.checked_sub(p.p_vaddr).filter(|offset| *offset < p.p_memsz)?;
        p.p_paddr.checked_add(offset)
    };
    programs.iter().filter(|p| p.p_type == abi::PT_LOAD).find_map(physical).unwrap_or(header.e_entry)
}

/// An ELF that cannot run on a bare machine.
pub fn program_of_a_system(why: &str) -> Refusal {
    refuse(format!("this ELF is a program for an operating system ({why}), not a bare-metal guest"))
        .hint("link a guest statically, with no standard library and no start files")
}

fn section_table(header: &FileHeader<LittleEndian>) -> Option<SectionTable> {
    let sound = header.e_shoff != 0
        && header.e_shnum != 0
        && usize::from(header.e_shentsize) == SectionHeader::size_for(header.class);
    sound.then_some(SectionTable {
        class: header.class,
        offset: header.e_shoff,
        count: header.e_shnum,
        entry_size: header.e_shentsize,
        names: header.e_shstrndx,
    })
}

/// The section headers of a file that need not be a guest.
///
/// # Errors
/// It is no ELF, or cut short.
pub fn sections(image: &Image) -> Result<Option<SectionTable>> {
    let head = image.head(64)?;
    if !is_elf(&head) {
        return Err(refuse("it is no ELF file").into());
    }
    Ok(section_table(&file_header(image, &head)?))
}

/// Reads the headers of an ELF file whose first bytes are `head`.
///
/// # Errors
/// It is cut short, broken, or for something else than a bare machine of this architecture.
pub fn read(image: &Image, head: &[u8]) -> Result<Elf> {
    let header = file_header(image, head)?;
    check_kind(&header)?;
    let programs = program_headers(image, &header)?;
    if programs.iter().any(|p| p.p_type == abi::PT_INTERP) {
        return Err(program_of_a_system("it names a dynamic linker").into());
    }
    let segments = segments(&programs)?;
    if segments.is_empty() {
        return Err(refuse("this ELF has no segment to load").into());
    }
    let mut program = Program::new(image, segments, entry(&header, &programs))?;
    program.sections = section_table(&header);
    Ok(Elf { wide: header.class == Class::ELF64, program, notes: notes(image, &header, &programs) })
}
