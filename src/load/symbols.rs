//! ELF section headers for the guest's own debugger: the table, and the sections that no segment brings along.
//!
//! Invariant: nothing here can fail a start. A table that is unsound in any part, or finds no room, is left out
//! (the guest loses its symbols), and what is copied is never more than the file has bytes.

use elf::endian::LittleEndian;
use elf::file::Class;
use elf::parse::{ParseAt, ParsingTable};
use elf::section::SectionHeader;
use elf::symbol::Symbol;

use super::image::Image;
use super::place::Places;
use crate::memory::{Memory, Span};

/// Sections without content of their own, and the flag of those that segments load (System V ABI, sections).
const SHT_NULL: u32 = 0;
const SHT_NOBITS: u32 = 8;
const SHF_ALLOC: u64 = 2;

/// Where a file says that its section headers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SectionTable {
    /// 32 or 64 bits.
    pub class: Class,
    /// Its place in the file.
    pub offset: u64,
    /// Headers.
    pub count: u16,
    /// Bytes of each, as the file has it.
    pub entry_size: u16,
    /// The header of the section that holds the names.
    pub names: u16,
}

/// Section headers as the guest gets them.
#[derive(Debug)]
pub struct Symbols {
    /// The headers, with the addresses of what was placed.
    pub headers: Vec<u8>,
    /// What the file says of them.
    pub table: SectionTable,
}

/// One section to bring along: its header's index, its place in the file and in the block.
struct Content {
    index: usize,
    file: u64,
    size: u64,
    block: u64,
}

/// What a symbol table, or its names, may have at the most; Linux with debug information has a tenth.
const MOST: u64 = 64 << 20;
/// Bytes of a name, and symbols, that are looked at.
const LONGEST: usize = 200;
const SYMBOLS: usize = 1 << 19;
/// Symbol tables, of a program and of a shared object; types of symbols that name code (System V ABI, symbol table).
const SHT_SYMTAB: u32 = 2;
const SHT_DYNSYM: u32 = 11;
const STT_NOTYPE: u8 = 0;
const STT_FUNC: u8 = 2;

/// The names of a program's code: address, size, name. A broken table has none.
pub fn names(image: &Image, table: SectionTable) -> Vec<(u64, u64, String)> {
    read_names(image, table).unwrap_or_default()
}

fn read_names(image: &Image, table: SectionTable) -> Option<Vec<(u64, u64, String)>> {
    let symbols = Symbols::read(image, table)?;
    let headers = ParsingTable::<LittleEndian, SectionHeader>::new(LittleEndian, table.class, &symbols.headers);
    let find = |kind| headers.iter().find(|h| h.sh_type == kind);
    let header = find(SHT_SYMTAB).or_else(|| find(SHT_DYNSYM))?;
    let section = |header: &SectionHeader| {
        image.check("symbols", header.sh_offset, header.sh_size).ok()?;
        let mut bytes = vec![0; usize::try_from(header.sh_size).ok().filter(|_| header.sh_size <= MOST)?];
        image.read_at(header.sh_offset, &mut bytes).ok()?;
        Some(bytes)
    };
    let texts = section(&headers.get(usize::try_from(header.sh_link).ok()?).ok()?)?;
    let entries = section(&header)?;
    let entries = ParsingTable::<LittleEndian, Symbol>::new(LittleEndian, table.class, &entries);
    let code = |s: &Symbol| s.st_shndx != 0 && matches!(s.st_symtype(), STT_FUNC | STT_NOTYPE);
    // Names may overlap, so that a small file could have gigabytes of them.
    let name = |s: &Symbol| {
        let bytes = texts.get(usize::try_from(s.st_name).ok()?..)?;
        let name: Vec<_> = bytes.iter().copied().take(LONGEST).take_while(|byte| *byte != 0).collect();
        String::from_utf8(name).ok().filter(|name| !name.is_empty())
    };
    let named = entries.iter().filter(code).filter_map(|s| Some((s.st_value, s.st_size, name(&s)?)));
    Some(named.take(SYMBOLS).collect())
}

/// The sections to bring along, one after the other, and the size of all; none where the table is unsound.
fn contents(image: &Image, headers: &ParsingTable<LittleEndian, SectionHeader>) -> Option<(Vec<Content>, u64)> {
    let (mut found, mut end) = (Vec::new(), 0u64);
    for index in 0..headers.len() {
        let header = headers.get(index).ok()?;
        let (file, size) = (header.sh_offset, header.sh_size);
        if matches!(header.sh_type, SHT_NULL | SHT_NOBITS) || size == 0 {
            continue;
        }
        image.check("section", file, size).ok()?;
        if header.sh_flags & SHF_ALLOC == 0 && header.sh_addr == 0 {
            let block = end.checked_next_multiple_of(16)?;
            end = block.checked_add(size)?;
            found.push(Content { index, file, size, block });
        }
    }
    // Sections of a real file do not overlap; of a hostile one they could make gigabytes of one page.
    (end <= image.len().checked_add(16 * found.len() as u64)?).then_some((found, end))
}

impl Symbols {
    /// Reads the table.
    pub fn read(image: &Image, table: SectionTable) -> Option<Self> {
        if usize::from(table.entry_size) != SectionHeader::size_for(table.class) || table.names >= table.count {
            return None;
        }
        // Checked before it is allocated: the count is the file's word.
        let size = usize::from(table.entry_size).checked_mul(table.count.into())?;
        image.check("table", table.offset, size as u64).ok()?;
        let mut headers = vec![0; size];
        image.read_at(table.offset, &mut headers).ok()?;
        Some(Self { headers, table })
    }

    /// Places the sections that the table speaks of, at or after `from`; none where that cannot be.
    pub fn fill(&mut self, image: &Image, memory: &Memory, places: &mut Places, from: u64) -> Option<()> {
        let parsed = ParsingTable::new(LittleEndian, self.table.class, &self.headers);
        let (found, size) = contents(image, &parsed)?;
        if size == 0 {
            return Some(());
        }
        let block = places.find(size, 4096, from, "symbols")?;
        let entry = usize::from(self.table.entry_size);
        for Content { index, file, size, block: offset } in found {
            let span = Span::new(block.start.checked_add(offset)?, size)?;
            image.copy_to(memory, span, file).ok()?;
            let header = self.headers.get_mut(index.checked_mul(entry)?..)?;
            // sh_addr: Elf32_Shdr offset 12, Elf64_Shdr offset 16.
            match self.table.class {
                Class::ELF32 => {
                    header.get_mut(12..16)?.copy_from_slice(&u32::try_from(span.start).ok()?.to_le_bytes());
                }
                Class::ELF64 => header.get_mut(16..24)?.copy_from_slice(&span.start.to_le_bytes()),
            }
        }
        Some(())
    }
}
