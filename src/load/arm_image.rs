//! Linux for arm64: the `Image` (Linux Documentation/arch/arm64/booting.rst), its header and the places it wants.
//!
//! Invariant: what [`find`] accepts is little-endian; kernel, initial RAM disk and device tree lie in RAM, apart from
//! one another, and where the boot protocol allows.

use anyhow::{Context, Result};

use super::Guest;
use super::image::{Image, at};
use super::linux::{Initrd, command_line};
use super::place::{Places, list, prepare, prepare_linux};
use crate::arch::{self, BootRegs, Layout};
use crate::board::{self, Chosen};
use crate::config::{Config, CpuMode, Entry};
use crate::error::{Refusal, refuse, usage};
use crate::host::random;
use crate::memory::{Memory, Span};

/// Bytes of the header.
const SIZE: usize = 64;
/// The kernel's base is a multiple of this, and a device tree crosses none of its multiples.
pub const BLOCK: u64 = 2 << 20;
/// How far a kernel older than Linux 4.2 looks for its device tree.
const TREE_REACH: u64 = 512 << 20;
/// The kernel and its RAM disk lie in one window of 32 GiB that begins at a multiple of 1 GiB.
const WINDOW: u64 = 32 << 30;
const WINDOW_ALIGN: u64 = 1 << 30;
/// A kernel that does not say how much it needs, before Linux 3.17: where it is, and what its zeroed data may take.
const OLD_OFFSET: u64 = 0x8_0000;
const OLD_BSS: u64 = 16 << 20;
/// The most that such a kernel, packed, is taken to have.
const OLD_PACKED: u64 = 64 << 20;
/// How much of a kernel is looked through for its version.
const LARGEST: u64 = 256 << 20;
/// The longest command line: Linux's COMMAND_LINE_SIZE, less the NUL.
const CMDLINE: u64 = 2047;
/// Bytes of random numbers: 8 for the place of the kernel, the others for its generator.
const SEED: usize = 72;

/// What an image says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Where it wants to be, after a multiple of 2 MiB.
    pub text_offset: u64,
    /// Bytes that it takes, zeroed data included; 0 where it does not say.
    pub image_size: u64,
    /// Bytes that it has, as far as its header as an EFI program says; 0 where there is none.
    pub filled: u64,
    /// Its page size.
    pub page: Option<u32>,
}

/// What a file that begins with `head` says, where it is a kernel for arm64.
///
/// # Errors
/// It is one, but broken, cut short, or big-endian.
pub fn find(head: &[u8]) -> Result<Option<Header>, Refusal> {
    if at(head, 0x38) != Some(*b"ARM\x64") {
        return Ok(None);
    }
    if head.len() < SIZE {
        let what = format!(
            "cut short: the arm64 image header ends at byte {SIZE:#x} of the file, which ends at {:#x}",
            head.len()
        );
        return Err(refuse(what));
    }
    let long = |offset| at(head, offset).map_or(0, u64::from_le_bytes);
    if long(0) == 0 {
        return Err(refuse("its header is broken: it begins with no instruction"));
    }
    let (text_offset, image_size, flags) = (long(8), long(16), long(24));
    if image_size == 0 {
        // The byte order of the offset was not said then.
        return Ok(Some(Header { text_offset: OLD_OFFSET, image_size, filled: 0, page: None }));
    }
    if flags & 1 != 0 {
        return Err(refuse("this is a big-endian arm64 kernel; Bantam starts little-endian ones"));
    }
    if image_size < SIZE as u64 {
        return Err(refuse(format!("its header is broken: an image of {image_size} bytes, said at byte 0x10")));
    }
    if text_offset % 4 != 0 {
        let what = format!("its header is broken: its offset, {text_offset:#x} at byte 8, is not a multiple of 4");
        return Err(refuse(what));
    }
    let page = match flags >> 1 & 3 {
        1 => Some(4 << 10),
        2 => Some(16 << 10),
        3 => Some(64 << 10),
        _ => None,
    };
    Ok(Some(Header { text_offset, image_size, filled: filled(head).unwrap_or(0), page }))
}

/// Where the last section of an EFI program ends in its file (PE format, "Section Table").
fn filled(head: &[u8]) -> Option<u64> {
    let word = |offset| at(head, offset).map(u32::from_le_bytes);
    let half = |offset| at(head, offset).map(u16::from_le_bytes).map(usize::from);
    let pe = usize::try_from(word(0x3c)?).ok()?;
    if !head.starts_with(b"MZ") || at(head, pe)? != *b"PE\0\0" {
        return None;
    }
    let table = pe.checked_add(24)?.checked_add(half(pe.checked_add(20)?)?)?;
    // As many as lie in the head, which ends some time.
    (0..half(pe.checked_add(6)?)?)
        .map_while(|number| {
            let section = table.checked_add(number * 40)?;
            Some(u64::from(word(section.checked_add(16)?)?) + u64::from(word(section.checked_add(20)?)?))
        })
        .max()
}

impl Header {
    /// The file has all that its header speaks of.
    ///
    /// # Errors
    /// It is cut short, and where.
    pub fn check(&self, len: u64) -> Result<(), Refusal> {
        let most = if self.image_size == 0 { u64::MAX } else { self.image_size };
        match self.filled.min(most) {
            filled if filled > len => Err(refuse(format!(
                "cut short: the kernel ends at byte {filled:#x} of its image, which ends at {len:#x}"
            ))),
            _ => Ok(()),
        }
    }

    /// The version that the kernel says of itself.
    pub fn version(&self, image: &Image) -> Option<String> {
        version(image, if self.image_size == 0 { OLD_PACKED } else { self.image_size.min(LARGEST) })
    }

    /// Where the kernel goes in RAM: as low as can be, since a kernel before Linux 4.6 cannot use what is below it.
    /// `len` is the size of the file, for a kernel that does not say its own.
    ///
    /// # Errors
    /// RAM has no such place.
    pub fn place(&self, layout: &Layout, len: u64) -> Result<Span, Refusal> {
        let size = if self.image_size == 0 { len.saturating_add(OLD_BSS) } else { self.image_size };
        let in_ram = |ram: &Span| {
            let start = ram.start.checked_next_multiple_of(BLOCK)?.checked_add(self.text_offset)?;
            Span::new(start, size).filter(|span| ram.contains(span))
        };
        layout.ram.iter().find_map(in_ram).ok_or_else(|| {
            let first = layout.ram.first().and_then(|ram| ram.start.checked_next_multiple_of(BLOCK)).unwrap_or(0);
            let wanted = match first.checked_add(self.text_offset).and_then(|start| Span::new(start, size)) {
                Some(span) => format!("would be at {span}"),
                None => format!("wants {size} bytes, {:#x} after a multiple of 2 MiB", self.text_offset),
            };
            refuse(format!("the kernel {wanted}; RAM is at {}", list(&layout.ram)))
                .hint("give the machine more --memory")
        })
    }
}

/// Loads the kernel, its initial RAM disk and its device tree.
///
/// # Errors
/// Something has no room in RAM, or a file cannot be read.
pub fn load(config: &Config, guest: &Guest, header: &Header, memory: &Memory, layout: &Layout) -> Result<BootRegs> {
    let image = &guest.image;
    let mut places = Places::new(&layout.ram, layout.ram.clone());
    let kernel = header.place(layout, if image.packed().is_some() { OLD_PACKED } else { image.len() })?;
    places.claim(kernel, "the kernel")?;
    prepare(memory, kernel, "the kernel");
    let filled = image.pour(memory, kernel)?;
    header.check(filled)?;
    let text = command_line(config, true, CMDLINE)?;
    let initrd = Initrd::open(config, guest)?;
    prepare_linux(memory, &layout.ram, kernel.last(), initrd.as_ref().map_or(0, Initrd::size));
    let initrd = initrd.map(|files| files.load(memory, &mut places, window_last(kernel))).transpose()?;
    let seed = random::<SEED>()?;
    let tree = board::device_tree(config, layout, &Chosen { cmdline: Some(&text), initrd, seed: Some(&seed) })?;
    let tree = tree.context("a machine without a device tree")?;
    let span = place_tree(config, &mut places, kernel, tree.len() as u64)?;
    memory.write(span.start, &tree)?;
    super::write_parts(config, memory)?;
    let mut boot = arch::enter_linux(CpuMode::El1, Entry::Linear(kernel.start), memory, layout)?;
    boot.hand_over(Some(span));
    Ok(boot)
}

/// The end of the window that holds both the kernel and its initial RAM disk.
fn window_last(kernel: Span) -> u64 {
    (kernel.start - kernel.start % WINDOW_ALIGN).saturating_add(WINDOW - 1)
}

/// Takes the place of a device tree of `size` bytes: the user's, or one where a kernel of any age finds it; in one
/// block.
///
/// # Errors
/// There is none, or the tree is too large.
fn place_tree(config: &Config, places: &mut Places, kernel: Span, size: u64) -> Result<Span, Refusal> {
    if size > BLOCK {
        return Err(refuse(format!("the device tree has {size} bytes; Linux takes one of at most {BLOCK}")));
    }
    if let Some(at) = config.fdt_at {
        let span =
            Span::new(at.0, size).filter(|span| span.start % 8 == 0 && span.start / BLOCK == span.last() / BLOCK);
        let span = span.ok_or_else(|| {
            usage(format!(
                "--fdt-at {at}: Linux takes a multiple of 8 from which {size} bytes cross no multiple of 2 MiB"
            ))
        })?;
        places.claim(span, "the device tree")?;
        return Ok(span);
    }
    let last = (kernel.start - kernel.start % BLOCK).saturating_add(TREE_REACH - 1);
    // A multiple of a power of two that is as large as the tree: no block ends within it.
    let span = places.highest(size, size.next_power_of_two().max(8), last);
    span.ok_or_else(|| places.no_room("the device tree", size))
}

/// The version that a kernel says of itself: the letters, digits and points after "Linux version", wherever that is.
fn version(image: &Image, limit: u64) -> Option<String> {
    const MARK: &[u8] = b"Linux version ";
    const LONGEST: usize = 64;
    let mut found = None;
    let mut tail: Vec<u8> = Vec::new();
    let look = |_offset, piece: &[u8]| {
        tail.extend_from_slice(piece);
        let text =
            tail.windows(MARK.len() + 1).position(|w| w.starts_with(MARK) && w.last().is_some_and(u8::is_ascii_digit));
        if let Some(text) = text.and_then(|at| tail.get(at + MARK.len()..)) {
            let version = text.iter().take(LONGEST).take_while(|c| c.is_ascii_alphanumeric() || b".-+_~".contains(c));
            let version: String = version.map(|c| char::from(*c)).collect();
            found = (version.len() < text.len()).then_some(version);
        }
        // One may be cut in two.
        tail.drain(..tail.len().saturating_sub(MARK.len() + LONGEST));
        found.is_none()
    };
    // What comes after a place that cannot be read is not looked for.
    let _ = image.scan(limit, look);
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::tests::samples::{arm_image, gzip, patch};

    fn header(image: &[u8]) -> Header {
        find(image).unwrap().unwrap()
    }

    #[test]
    fn a_header_is_read_as_the_boot_protocol_has_it() {
        let mut image = arm_image();
        let all = Header { text_offset: 0, image_size: 2 << 20, filled: 1 << 20, page: Some(4096) };
        assert_eq!(header(&image), all);
        for (flags, page) in [(8, None), (8 | 2 << 1, Some(16 << 10)), (8 | 3 << 1, Some(64 << 10))] {
            patch(&mut image, 24, &[flags]);
            assert_eq!(header(&image).page, page);
        }
        patch(&mut image, 0, &[1; 2]);
        assert_eq!(header(&image).filled, 0, "it is no EFI program");
        patch(&mut image, 8, &0x8_0000u64.to_le_bytes());
        assert_eq!(header(&image).text_offset, 0x8_0000);
        patch(&mut image, 8, &[0xff; 16]);
        patch(&mut image, 16, &[0; 8]);
        let old = Header { text_offset: 0x8_0000, image_size: 0, filled: 0, page: None };
        assert_eq!(header(&image), old);
        assert_eq!(find(b"anything else").unwrap(), None);
    }

    #[test]
    fn a_header_that_cannot_be_is_refused() {
        for (at, bytes, why) in
            [(24, &[1u8][..], "big-endian"), (16, &[1, 0, 0, 0], "an image of 1 bytes"), (8, &[2], "0x2 at byte 8")]
        {
            let mut image = arm_image();
            patch(&mut image, at, bytes);
            let text = find(&image).unwrap_err().to_string();
            assert!(text.contains(why), "{text}");
        }
        let image = arm_image();
        for cut in 60..64 {
            assert!(find(&image[..cut]).unwrap_err().to_string().contains("cut short"));
        }
        for cut in (0..60).chain([0]) {
            assert_eq!(find(&image[..cut]).unwrap(), None);
        }
        for cut in 64..0x400 {
            let _ = find(&image[..cut]).unwrap();
        }
    }

    #[test]
    fn an_efi_header_of_nonsense_says_nothing() {
        for (at, bytes) in [(0x3c, [0xff; 4]), (0x54, [0xff; 4]), (0x46, [0xff; 4])] {
            let mut image = arm_image();
            patch(&mut image, at, &bytes);
            let _ = find(&image).unwrap();
        }
        let image = arm_image();
        assert!(header(&image).check((1 << 20) - 1).unwrap_err().to_string().contains("0xfffff"));
        header(&image).check(1 << 20).unwrap();
    }

    #[test]
    fn a_version_is_found_wherever_it_is_and_is_plain_text() {
        let version = |bytes: Vec<u8>| {
            let image = super::super::packed::open(Image::from_bytes("x", bytes), 1 << 10).unwrap().0;
            version(&image, 2 << 20)
        };
        assert_eq!(version(arm_image()).unwrap(), "6.1.0-9-test");
        assert_eq!(version(gzip(&arm_image())).unwrap(), "6.1.0-9-test");
        let mut image = arm_image();
        patch(&mut image, 0x4_0000 - 20 + 14, b"6.1\x1b[2J");
        assert_eq!(version(image).unwrap(), "6.1");
        let mut image = arm_image();
        patch(&mut image, 0x4_0000 - 20, b"linux");
        assert_eq!(version(image), None);
    }
}
