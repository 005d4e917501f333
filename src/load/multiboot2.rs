//! Multiboot 2 (specification 2.0): its header tags and its information tags.
//!
//! Invariant: a header counts only with its checksum, in the first 32768 bytes; a tag that is not optional and that
//! Bantam cannot honour is refused by its number and name.

use anyhow::Result;

use super::image::Image;
use super::multiboot::{AddressFields, Handover, LOADER, low};
use super::program::Program;
use crate::error::{Refusal, refuse};

/// The header lies in this many first bytes of the file (MB2 3.1).
pub const SEARCH: usize = 32768;
const MAGIC: u32 = 0xe852_50d6;
/// What EAX holds when the kernel is entered (MB2 3.3).
pub const LOADED: u32 = 0x36d7_6289;
/// Header fields before the tags.
const FIXED: usize = 16;

/// A Multiboot 2 header.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Header {
    /// Its place in the file.
    pub at: u64,
    /// Where to load a kernel that brings no ELF headers (tag 2).
    pub addresses: Option<AddressFields>,
    /// Where to enter it (tag 3).
    pub entry: Option<u32>,
    /// It can run elsewhere, between these addresses (tag 10).
    pub relocatable: Option<(u32, u32)>,
    /// Information it asks for (tag 1).
    pub requests: Vec<u32>,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|b| u32::from_le_bytes(*b))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|b| u16::from_le_bytes(*b))
}

/// Information tags by number (MB2 3.6).
pub fn information_name(kind: u32) -> &'static str {
    match kind {
        0 => "end",
        1 => "command line",
        2 => "boot loader name",
        3 => "modules",
        4 => "basic memory information",
        5 => "BIOS boot device",
        6 => "memory map",
        7 => "VBE",
        8 => "framebuffer",
        9 => "ELF symbols",
        10 => "APM table",
        11 => "EFI 32-bit system table",
        12 => "EFI 64-bit system table",
        13 => "SMBIOS tables",
        14 => "ACPI 1.0 tables",
        15 => "ACPI 2.0 tables",
        16 => "network",
        17 => "EFI memory map",
        18 => "EFI boot services",
        19 => "EFI 32-bit image handle",
        20 => "EFI 64-bit image handle",
        21 => "image load base address",
        _ => "unknown",
    }
}

/// The last information tag of the specification. One that a kernel asks for and that this machine has nothing to say of
/// (there is no display, no firmware) is left out; only one that no specification knows is an error (MB2 3.1.4).
const LAST_KNOWN: u32 = 21;

/// Information tags that Bantam gives where they apply.
pub const GIVEN: [u32; 8] = [0, 1, 2, 3, 4, 6, 9, 21];

/// Looks for a header.
///
/// # Errors
/// There is one and it is cut short, broken, or requires what Bantam does not have.
pub fn find(head: &[u8]) -> Result<Option<Header>, Refusal> {
    let head = head.get(..SEARCH).unwrap_or(head);
    let found = (0..head.len()).step_by(8).find_map(|at| {
        let [magic, architecture, length, checksum] =
            [word(head, at)?, word(head, at + 4)?, word(head, at + 8)?, word(head, at + 12)?];
        let sum = magic.wrapping_add(architecture).wrapping_add(length).wrapping_add(checksum);
        (magic == MAGIC && sum == 0).then_some((at, architecture, length))
    });
    let Some((at, architecture, length)) = found else { return Ok(None) };
    if architecture != 0 {
        let name =
            if architecture == 4 { "mips".to_owned() } else { format!("multiboot-2-architecture-{architecture}") };
        return Err(super::linux::foreign(&name));
    }
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    let tags = at.checked_add(length).and_then(|end| head.get(at + FIXED..end));
    let tags = tags.ok_or_else(|| {
        let what = format!("the multiboot 2 header, {length} bytes at {at:#x}, does not end");
        refuse(format!("cut short: {what} in the first {} bytes of the file", head.len()))
    })?;
    let mut header = Header { at: at as u64, ..Header::default() };
    header.read_tags(tags)?;
    Ok(Some(header))
}

impl Header {
    /// Follows the tags to the end tag, or to the end of the header. Each is at least 8 bytes, so that this ends.
    fn read_tags(&mut self, mut tags: &[u8]) -> Result<(), Refusal> {
        while let (Some(kind), Some(flags), Some(size)) = (half(tags, 0), half(tags, 2), word(tags, 4)) {
            if kind == 0 {
                break;
            }
            let size = usize::try_from(size).unwrap_or(usize::MAX);
            let tag = tags.get(..size).filter(|tag| tag.len() >= 8).ok_or_else(|| {
                refuse(format!(
                    "its multiboot 2 header is broken: tag {kind} has {size} bytes where {} are",
                    tags.len()
                ))
            })?;
            let short = || refuse(format!("its multiboot 2 header is broken: tag {kind} is too short, {size} bytes"));
            self.read_tag(kind, flags & 1 != 0, tag)?.ok_or_else(short)?;
            tags = tags.get(size.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(())
    }

    /// Takes one tag; none where it is too short (MB2 3.1.3 to 3.1.14).
    fn read_tag(&mut self, kind: u16, optional: bool, tag: &[u8]) -> Result<Option<()>, Refusal> {
        let field = |index: usize| word(tag, 8 + 4 * index);
        let four = || Some([field(0)?, field(1)?, field(2)?, field(3)?]);
        match kind {
            1 => self.request(tag, optional)?,
            2 => {
                let Some([header, load, load_end, bss_end]) = four() else { return Ok(None) };
                self.addresses = Some(AddressFields { header, load, load_end, bss_end });
            }
            3 => {
                let Some(entry) = field(0) else { return Ok(None) };
                self.entry = Some(entry);
            }
            4 => match field(0) {
                None => return Ok(None),
                Some(flags) if flags & 1 != 0 && !optional => return Err(no_display("a console (header tag 4)")),
                Some(_) => {}
            },
            5 if !optional => return Err(no_display("a framebuffer (header tag 5)")),
            // Modules are page-aligned always (6); EFI is not there, and its tags speak of nothing else (7, 8, 9).
            5..=9 => {}
            10 => {
                let Some([lowest, highest, _, _]) = four() else { return Ok(None) };
                self.relocatable = Some((lowest, highest));
            }
            _ if optional => {}
            _ => return Err(refuse(format!("this multiboot 2 kernel requires header tag {kind}, which is unknown"))),
        }
        Ok(Some(()))
    }

    fn request(&mut self, tag: &[u8], optional: bool) -> Result<(), Refusal> {
        let asked = tag.get(8..).unwrap_or_default().chunks_exact(4).filter_map(|b| word(b, 0));
        for kind in asked {
            if !optional && kind > LAST_KNOWN {
                let name = information_name(kind);
                let what = format!("this multiboot 2 kernel requires the {name} information (tag {kind})");
                return Err(refuse(format!("{what}, which Bantam does not give")));
            }
            self.requests.push(kind);
        }
        Ok(())
    }

    /// What to load: by the address tag where there is one, else by the ELF headers (MB2 3.1.5).
    pub fn program(&self, image: &Image, elf: Option<Program>) -> Result<Program, Refusal> {
        let mut program = match (self.addresses, self.entry, elf) {
            (Some(fields), Some(entry), _) => {
                // MB2 3.1.5: -1 loads the file from its beginning.
                let at = u32::try_from(self.at).unwrap_or(u32::MAX);
                let start = if fields.load == u32::MAX { fields.header.saturating_sub(at) } else { fields.load };
                AddressFields { load: start, ..fields }.program(image, self.at, entry)?
            }
            (Some(_), None, _) => {
                return Err(refuse("this multiboot 2 kernel has an address tag and no entry address tag"));
            }
            (None, _, Some(program)) => program,
            (None, _, None) => {
                return Err(refuse(
                    "this multiboot 2 kernel is no ELF and has no address tag: nothing says where it goes",
                ));
            }
        };
        if let Some(entry) = self.entry {
            program.entry = entry.into();
        }
        // The kernel is loaded where it is linked, the preferred place; it must allow that.
        if let Some((lowest, highest)) = self.relocatable
            && (program.base() < lowest.into() || program.last() > highest.into())
        {
            let (base, last) = (program.base(), program.last());
            let what = format!("this multiboot 2 kernel is linked to {base:#x}..={last:#x}");
            return Err(refuse(format!("{what} and wants to be moved to {lowest:#x}..={highest:#x}: not yet"))
                .hint("link it to an address between the two"));
        }
        Ok(program)
    }
}

fn no_display(what: &str) -> Refusal {
    refuse(format!("this multiboot 2 kernel requires {what}; there is no display"))
        .hint("make the tag optional; the serial port is at 0x3f8")
}

/// The information tags (MB2 3.6); wherever they are put, they are the same.
pub fn information(handover: &Handover, header: &Header) -> Result<Vec<u8>> {
    let mut info = vec![0; 8];
    let mut tag = |kind: u32, parts: &[&[u8]]| -> Result<()> {
        let body = parts.concat();
        info.extend(kind.to_le_bytes());
        info.extend(low(8 + body.len() as u64)?);
        info.extend(body);
        info.resize(info.len().next_multiple_of(8), 0);
        Ok(())
    };
    tag(1, &[handover.cmdline.as_bytes(), &[0]])?;
    tag(2, &[LOADER.as_bytes(), &[0]])?;
    for module in &handover.modules {
        tag(3, &[&low(module.span.start)?, &low(module.span.last() + 1)?, &module.name, &[0]])?;
    }
    let (lower, upper) = handover.kib();
    tag(4, &[&lower.to_le_bytes(), &upper.to_le_bytes()])?;
    let mut map = [24u32.to_le_bytes(), [0; 4]].concat();
    for area in &handover.map {
        map.extend([area.span.start.to_le_bytes(), area.span.size.to_le_bytes()].concat());
        map.extend([area.kind.to_le_bytes(), [0; 4]].concat());
    }
    tag(6, &[&map])?;
    if let Some(symbols) = &handover.symbols {
        // 32-bit fields, as GRUB writes them and kernels read them; the specification's text has 16-bit ones.
        let table = symbols.table;
        let (count, size) = (low(table.count.into())?, low(table.entry_size.into())?);
        tag(9, &[&count, &size, &low(table.names.into())?, &symbols.headers])?;
    }
    if header.relocatable.is_some() {
        tag(21, &[&low(handover.base)?])?;
    }
    tag(0, &[])?;
    let size = low(info.len() as u64)?;
    if let Some(total) = info.first_chunk_mut() {
        *total = size;
    }
    Ok(info)
}
