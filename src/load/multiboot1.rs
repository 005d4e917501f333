//! Multiboot 1 (specification 0.6.96): its header and its information structure.
//!
//! Invariant: a header counts only with its checksum, whole, in the first 8192 bytes; what it requires and Bantam does
//! not have is refused.

use anyhow::Result;

use super::image::Image;
use super::multiboot::{AddressFields, Handover, LOADER, low};
use super::program::Program;
use crate::error::{Refusal, refuse};

/// The header lies in this many first bytes of the file (MB1 3.1).
const SEARCH: usize = 8192;
const MAGIC: u32 = 0x1bad_b002;
/// What EAX holds when the kernel is entered (MB1 3.2).
pub const LOADED: u32 = 0x2bad_b002;

/// Header flags (MB1 3.1.2): page-aligned modules, memory information; both always given. Then video, which is not.
const ALIGN: u32 = 1;
const MEMORY: u32 = 1 << 1;
const VIDEO: u32 = 1 << 2;
/// The address fields are valid.
const ADDRESSES: u32 = 1 << 16;
/// Flags that a loader must understand.
const REQUIRED: u32 = 0xffff;

/// A Multiboot 1 header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Its place in the file.
    pub at: u64,
    /// What the kernel asks for.
    pub flags: u32,
    /// Where to load it and enter it, where it brings no ELF headers.
    pub addresses: Option<(AddressFields, u32)>,
}

/// Looks for a header.
///
/// # Errors
/// There is one and it is cut short, or requires what Bantam does not have.
pub fn find(head: &[u8]) -> Result<Option<Header>, Refusal> {
    let head = head.get(..SEARCH).unwrap_or(head);
    let found = (0..head.len()).step_by(4).find_map(|at| {
        let [magic, flags, checksum] = words(head, at)?;
        (magic == MAGIC && magic.wrapping_add(flags).wrapping_add(checksum) == 0).then_some((at, flags))
    });
    let Some((at, flags)) = found else { return Ok(None) };
    if flags & VIDEO != 0 {
        return Err(refuse("this multiboot 1 kernel requires a video mode (header flag 2); there is no display")
            .hint("build it without the video request; the serial port is at 0x3f8"));
    }
    let unknown = flags & REQUIRED & !(ALIGN | MEMORY | VIDEO);
    if unknown != 0 {
        let what = format!("this multiboot 1 kernel requires features that do not exist (header flags {unknown:#x})");
        return Err(refuse(what));
    }
    let mut addresses = None;
    if flags & ADDRESSES != 0 {
        let [header, load, load_end, bss_end, entry] = words(head, at + 12)
            .ok_or_else(|| refuse(format!("cut short: the multiboot 1 header at {at:#x} of the file has no end")))?;
        addresses = Some((AddressFields { header, load, load_end, bss_end }, entry));
    }
    Ok(Some(Header { at: at as u64, flags, addresses }))
}

/// `N` 32-bit numbers.
fn words<const N: usize>(bytes: &[u8], at: usize) -> Option<[u32; N]> {
    let bytes = bytes.get(at..)?.get(..4 * N)?;
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = bytes.first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
    }
    Some(words)
}

impl Header {
    /// What to load: by the address fields where there are some, else by the ELF headers (MB1 3.1.2, bit 16).
    pub fn program(&self, image: &Image, elf: Option<Program>) -> Result<Program, Refusal> {
        match (&self.addresses, elf) {
            (Some((fields, entry)), _) => fields.program(image, self.at, *entry),
            (None, Some(program)) => Ok(program),
            (None, None) => {
                Err(refuse("this multiboot 1 kernel is no ELF and has no address fields: nothing says where it goes"))
            }
        }
    }
}

/// Offsets of the information structure that do not follow from writing it in order (MB1 3.3).
const FIXED: u64 = 120;

/// The information structure at `at`, with all it points to behind it.
pub fn information(handover: &Handover, at: u64) -> Result<Vec<u8>> {
    let mut tail = Vec::new();
    let mut put = |bytes: &[u8]| {
        let place = at + FIXED + tail.len() as u64;
        tail.extend_from_slice(bytes);
        tail.resize(tail.len().next_multiple_of(8), 0);
        low(place)
    };
    let mut flags = 1u32 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
    let (lower, upper) = handover.kib();
    let cmdline = put(&[handover.cmdline.as_bytes(), &[0]].concat())?;
    let mut entries = Vec::new();
    for module in &handover.modules {
        let name = put(&[module.name.as_slice(), &[0]].concat())?;
        entries.extend([low(module.span.start)?, low(module.span.last() + 1)?, name, [0; 4]].concat());
    }
    let modules = put(&entries)?;
    let mut map = Vec::new();
    for area in &handover.map {
        // The size field does not count itself.
        map.extend(20u32.to_le_bytes());
        map.extend([area.span.start.to_le_bytes(), area.span.size.to_le_bytes()].concat());
        map.extend(area.kind.to_le_bytes());
    }
    let map_at = put(&map)?;
    let loader = put(&[LOADER.as_bytes(), &[0]].concat())?;
    let mut sections = [0; 16];
    if let Some(symbols) = &handover.symbols {
        flags |= 1 << 5;
        let (count, size) = (u64::from(symbols.table.count), u64::from(symbols.table.entry_size));
        let place = put(&symbols.headers)?;
        let names = low(symbols.table.names.into())?;
        sections.copy_from_slice(&[low(count)?, low(size)?, place, names].concat());
    }
    let mut info = Vec::new();
    for word in [flags.to_le_bytes(), lower.to_le_bytes(), upper.to_le_bytes(), [0; 4], cmdline] {
        info.extend(word);
    }
    info.extend([low(handover.modules.len() as u64)?, modules].concat());
    info.extend(sections);
    info.extend([low(map.len() as u64)?, map_at].concat());
    // Drives and the ROM configuration table: none.
    info.extend([0; 12]);
    info.extend(loader);
    info.resize(usize::try_from(FIXED)?, 0);
    info.extend(tail);
    Ok(info)
}
