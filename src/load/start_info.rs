//! What a kernel of the PC is told: Linux's zero page (Documentation/arch/x86/zero-page.rst) and the start info of PVH
//! (Xen's "x86/HVM direct boot ABI", which KVM's guests share).
//!
//! Invariant: both are pure functions of what they tell.

use super::bzimage::SETUP;
use super::multiboot::Area;
use crate::memory::Span;

/// Bytes of the zero page.
pub const PAGE: u64 = 4096;
/// Entries of its memory map.
const MAP_ENTRIES: usize = 128;

/// All that a kernel is told.
#[derive(Debug, Default)]
pub struct Told {
    /// Where the command line lies, NUL-terminated.
    pub cmdline: u64,
    /// The initial RAM disk.
    pub initrd: Option<Span>,
    /// The memory map, ascending.
    pub map: Vec<Area>,
    /// The root of the ACPI tables, if there are any.
    pub rsdp: Option<u64>,
}

fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = page.get_mut(at..).and_then(|rest| rest.get_mut(..bytes.len())) {
        place.copy_from_slice(bytes);
    }
}

/// A value in two parts: its low 32 bits at one place, its high ones at another.
fn put_halves(page: &mut [u8], (low, high): (usize, usize), value: u64) {
    let bytes = value.to_le_bytes();
    let (first, second) = bytes.split_at(4);
    put(page, low, first);
    put(page, high, second);
}

/// The zero page; `setup` is the kernel's own header, or none for a kernel without one.
pub fn zero_page(setup: Option<&[u8]>, told: &Told) -> Vec<u8> {
    let mut page = vec![0; PAGE as usize];
    match setup {
        Some(setup) => put(&mut page, SETUP, setup),
        None => {
            // boot_flag, header, version 2.12.
            put(&mut page, 0x1fe, &[0x55, 0xaa]);
            put(&mut page, 0x202, b"HdrS\x0c\x02");
        }
    }
    // vid_mode: normal; type_of_loader: none that has a number; loadflags: LOADED_HIGH.
    put(&mut page, 0x1fa, &[0xff, 0xff]);
    put(&mut page, 0x210, &[0xff]);
    put(&mut page, 0x211, &[1]);
    put_halves(&mut page, (0x228, 0x0c8), told.cmdline);
    if let Some(initrd) = told.initrd {
        put_halves(&mut page, (0x218, 0x0c0), initrd.start);
        put_halves(&mut page, (0x21c, 0x0c4), initrd.size);
    }
    put(&mut page, 0x070, &told.rsdp.unwrap_or(0).to_le_bytes());
    let map = told.map.iter().take(MAP_ENTRIES);
    put(&mut page, 0x1e8, &[map.len().to_le_bytes()[0]]);
    for (area, at) in map.zip((0x2d0..).step_by(20)) {
        put(&mut page, at, &area.span.start.to_le_bytes());
        put(&mut page, at + 8, &area.span.size.to_le_bytes());
        put(&mut page, at + 16, &area.kind.to_le_bytes());
    }
    page
}

/// PVH's structure: magic number, version 1, and behind it the list of modules and the memory map. It lies at `at`.
pub fn start_info(told: &Told, at: u64) -> Vec<u8> {
    const MAGIC: u32 = 0x336e_c578;
    const SIZE: u64 = 56;
    const MODULE: u64 = 32;
    let modules = u32::from(told.initrd.is_some());
    let list = at.saturating_add(SIZE);
    let map = list.saturating_add(MODULE * u64::from(modules));
    let areas = u32::try_from(told.map.len()).unwrap_or(0);
    let mut bytes = Vec::new();
    [MAGIC, 1, 0, modules].iter().for_each(|word| bytes.extend(word.to_le_bytes()));
    let list = if modules == 0 { 0 } else { list };
    for word in [list, told.cmdline, told.rsdp.unwrap_or(0), map] {
        bytes.extend(word.to_le_bytes());
    }
    [areas, 0].iter().for_each(|word| bytes.extend(word.to_le_bytes()));
    if let Some(initrd) = told.initrd {
        [initrd.start, initrd.size, 0, 0].iter().for_each(|word| bytes.extend(word.to_le_bytes()));
    }
    for area in &told.map {
        bytes.extend(area.span.start.to_le_bytes());
        bytes.extend(area.span.size.to_le_bytes());
        [area.kind, 0].iter().for_each(|word| bytes.extend(word.to_le_bytes()));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told() -> Told {
        let span = |start, size| Span { start, size };
        Told {
            cmdline: 0x1_0002_0000,
            initrd: Some(span(0x2_0000_1000, 0x1_0000_0003)),
            map: vec![Area { span: span(0, 0xa0000), kind: 1 }, Area { span: span(0xa0000, 0x60000), kind: 2 }],
            rsdp: Some(0xe0000),
        }
    }

    fn long(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(*bytes[at..].first_chunk().unwrap())
    }

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(*bytes[at..].first_chunk().unwrap())
    }

    #[test]
    fn the_zero_page_has_each_field_where_linux_looks() {
        let page = zero_page(Some(&[7, 8]), &told());
        assert_eq!((page.len(), page[0x1f1], page[0x1f2]), (4096, 7, 8));
        assert_eq!((word(&page, 0x228), word(&page, 0xc8)), (0x2_0000, 1));
        assert_eq!((word(&page, 0x218), word(&page, 0xc0)), (0x1000, 2));
        assert_eq!((word(&page, 0x21c), word(&page, 0xc4)), (3, 1));
        assert_eq!((long(&page, 0x70), page[0x1e8], page[0x210], page[0x211]), (0xe0000, 2, 0xff, 1));
        assert_eq!((long(&page, 0x2e4), long(&page, 0x2ec), word(&page, 0x2f4)), (0xa0000, 0x60000, 2));
        assert_eq!(&zero_page(None, &Told::default())[0x1fe..0x208], b"\x55\xaa\0\0HdrS\x0c\x02");
    }

    #[test]
    fn the_start_info_points_at_what_is_behind_it() {
        let bytes = start_info(&told(), 0x5000);
        assert_eq!((word(&bytes, 0), word(&bytes, 4), word(&bytes, 12)), (0x336e_c578, 1, 1));
        assert_eq!((long(&bytes, 16), long(&bytes, 24), long(&bytes, 32)), (0x5038, 0x1_0002_0000, 0xe0000));
        assert_eq!((long(&bytes, 40), word(&bytes, 48)), (0x5058, 2));
        assert_eq!((long(&bytes, 0x38), long(&bytes, 0x40)), (0x2_0000_1000, 0x1_0000_0003));
        assert_eq!((long(&bytes, 0x70), long(&bytes, 0x78), word(&bytes, 0x80)), (0xa0000, 0x60000, 2));
        assert_eq!(bytes.len(), 0x58 + 48);
        let none = start_info(&Told::default(), 0x5000);
        assert_eq!((long(&none, 16), none.len()), (0, 56));
    }
}
