//! Linux's bzImage (Linux Documentation/arch/x86/boot.rst): real-mode setup code with a header in it, and behind that the
//! kernel, which unpacks itself.
//!
//! Invariant: all that [`find`] returns has been checked against the file, so what is left for loading is RAM.

use anyhow::Result;

use super::image::{Image, at};
use crate::error::{Refusal, refuse};

/// The setup header begins here in the file and in the zero page.
pub const SETUP: usize = 0x1f1;
const SECTOR: u64 = 512;
/// What a file without a number of setup sectors means.
const SETUP_SECTORS: u8 = 4;
/// The oldest protocol that says where the kernel wants to lie and how much memory it takes: Linux 2.6.31.
const OLDEST: u16 = 0x20a;
/// loadflags: the kernel is loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1;
/// xloadflags: there is an entry for 64-bit mode, 0x200 behind the other.
const KERNEL_64: u16 = 1;
/// The longest version that is shown.
const VERSION: usize = 128;

/// What the header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The boot protocol: major in the high byte, minor in the low one.
    pub protocol: u16,
    /// The kernel's own version.
    pub version: String,
    /// Where the kernel begins in the file, and its bytes.
    pub code: (u64, u64),
    /// Where it wants to lie, what it then takes to unpack itself, and to what it must be aligned elsewhere.
    pub preferred: u64,
    /// Bytes from there on that it takes.
    pub memory: u64,
    /// The alignment elsewhere; none for a kernel that runs where it prefers only.
    pub alignment: Option<u64>,
    /// How the kernel is compressed.
    pub compression: &'static str,
    /// There is an entry for 64-bit mode.
    pub wide: bool,
    /// The most bytes of its command line, without the NUL.
    pub cmdline: u64,
    /// The last address of an initial RAM disk.
    pub initrd_last: u64,
    /// The header itself, which goes into the zero page.
    pub setup: Vec<u8>,
}

/// Little-endian fields at their offsets in the file.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, offset: usize) -> Result<[u8; N], Refusal> {
        at(self.0, offset).ok_or_else(|| refuse(format!("cut short: the setup header has a field at {offset:#x}")))
    }

    fn byte(&self, offset: usize) -> Result<u8, Refusal> {
        self.bytes::<1>(offset).map(|[byte]| byte)
    }

    fn short(&self, offset: usize) -> Result<u16, Refusal> {
        self.bytes(offset).map(u16::from_le_bytes)
    }

    fn long(&self, offset: usize) -> Result<u32, Refusal> {
        self.bytes(offset).map(u32::from_le_bytes)
    }
}

/// The file's first bytes have the marks of a bzImage.
pub fn is_bzimage(head: &[u8]) -> bool {
    at(head, 0x1fe) == Some([0x55, 0xaa]) && at(head, 0x202) == Some(*b"HdrS")
}

/// The header of a bzImage; none where the file is something else.
///
/// # Errors
/// It is cut short, broken, or too old.
pub fn find(image: &Image, head: &[u8]) -> Result<Option<Header>> {
    if !is_bzimage(head) {
        return Ok(None);
    }
    let field = Fields(head);
    let protocol = field.short(0x206)?;
    if protocol < OLDEST {
        let [major, minor] = protocol.to_be_bytes();
        let what = format!("a Linux kernel of boot protocol {major}.{minor:02}, before 2.10 (Linux 2.6.31)");
        return Err(refuse(what).hint("a kernel since 2009 boots").into());
    }
    if field.byte(0x211)? & LOADED_HIGH == 0 {
        return Err(refuse("a Linux zImage, which loads below 1 MiB").hint("build a bzImage").into());
    }
    let sectors = match field.byte(SETUP)? {
        0 => SETUP_SECTORS,
        sectors => sectors,
    };
    let start = (u64::from(sectors) + 1) * SECTOR;
    // In units of 16 bytes; old kernels count a last incomplete one.
    let size = u64::from(field.long(0x1f4)?) * 16;
    let size = if (1..16).contains(&(start + size).saturating_sub(image.len())) {
        image.len().saturating_sub(start)
    } else {
        size
    };
    image.check("the kernel", start, size)?;
    if size == 0 {
        return Err(refuse("its setup header says that the kernel has no bytes").into());
    }
    let length = 0x202 - SETUP + usize::from(field.byte(0x201)?);
    let setup = head.get(SETUP..).and_then(|rest| rest.get(..length));
    let setup = setup.ok_or_else(|| refuse("cut short: inside the setup header"))?.to_vec();
    let alignment = u64::from(field.long(0x230)?);
    let relocatable = field.byte(0x234)? != 0;
    if relocatable && !alignment.is_power_of_two() {
        return Err(refuse(format!("its setup header has an alignment of {alignment:#x}, no power of two")).into());
    }
    Ok(Some(Header {
        protocol,
        version: version(head, field.short(0x20e)?),
        code: (start, size),
        preferred: u64::from_le_bytes(field.bytes(0x258)?),
        memory: u64::from(field.long(0x260)?).max(size),
        alignment: relocatable.then_some(alignment),
        compression: compression(image, start.saturating_add(field.long(0x248)?.into())),
        wide: protocol >= 0x20c && field.short(0x236)? & KERNEL_64 != 0,
        cmdline: field.long(0x238)?.into(),
        initrd_last: field.long(0x22c)?.into(),
        setup,
    }))
}

/// How what lies at `at` of the file is compressed, by its first bytes.
fn compression(image: &Image, at: u64) -> &'static str {
    let mut first = [0; 4];
    let known: [(&[u8], &str); 7] = [
        (b"\x1f\x8b", "gzip"),
        (b"\xfd7zX", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x02\x21\x4c\x18", "lz4"),
        (b"\x5d\0\0", "lzma"),
        (b"BZh", "bzip2"),
        (b"\x89LZO", "lzo"),
    ];
    let read = image.read_at(at, &mut first);
    known.iter().find(|(mark, _)| read.is_ok() && first.starts_with(mark)).map_or("unknown", |(_, name)| name)
}

/// The version text, which lies 0x200 behind where the header says. Only what shows as it is.
fn version(head: &[u8], at: u16) -> String {
    let text = head.get(usize::from(at).saturating_add(0x200)..).filter(|_| at != 0).unwrap_or_default();
    let text = text.iter().take(VERSION).take_while(|byte| **byte != 0);
    text.filter(|byte| byte.is_ascii_graphic() || **byte == b' ').map(|byte| char::from(*byte)).collect()
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::error::verdict;

    /// A bzImage of one setup sector and two pages of kernel.
    pub fn sample() -> Vec<u8> {
        let mut bytes = vec![0; 0x400 + 0x2000];
        let mut put = |at: usize, what: &[u8]| bytes[at..][..what.len()].copy_from_slice(what);
        put(0x1f1, &[1]);
        put(0x1f4, &0x200u32.to_le_bytes());
        put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
        put(0x202, b"HdrS\x0f\x02");
        put(0x20e, &0x100u16.to_le_bytes());
        put(0x211, &[LOADED_HIGH]);
        put(0x22c, &0x7fff_ffffu32.to_le_bytes());
        put(0x230, &0x20_0000u32.to_le_bytes());
        put(0x234, &[1]);
        put(0x236, &KERNEL_64.to_le_bytes());
        put(0x238, &2047u32.to_le_bytes());
        put(0x258, &0x10_0000u64.to_le_bytes());
        put(0x260, &0x3000u32.to_le_bytes());
        put(0x300, b"6.99.0-test (a\x1b[2J) #1\0");
        put(0x400, &[0xf4; 0x2000]);
        bytes
    }

    fn read(bytes: Vec<u8>) -> Result<Option<Header>> {
        let image = Image::from_bytes("test", bytes);
        let head = image.head(0x8000)?;
        find(&image, &head)
    }

    #[test]
    fn a_header_is_read_as_the_protocol_has_it() {
        let header = read(sample()).unwrap().unwrap();
        assert_eq!((header.protocol, header.code), (0x20f, (0x400, 0x2000)));
        assert_eq!(header.version, "6.99.0-test (a[2J) #1");
        assert_eq!((header.preferred, header.memory, header.alignment), (0x10_0000, 0x3000, Some(0x20_0000)));
        assert!(header.wide);
        assert_eq!((header.cmdline, header.initrd_last), (2047, 0x7fff_ffff));
        assert_eq!(header.setup.len(), 0x202 - 0x1f1 + 0x6a);
        assert_eq!(read(vec![0; 0x1000]).unwrap(), None);
    }

    #[test]
    fn a_file_cut_at_any_byte_is_refused_or_something_else() {
        let whole = sample();
        for cut in (1..0x400).chain((0x400..whole.len() - 16).step_by(61)) {
            match read(whole[..cut].to_vec()) {
                Ok(found) => assert!(found.is_none() && cut < 0x206, "{cut:#x}"),
                Err(e) => assert!(verdict(&e).0 == 125 && format!("{e:#}").contains("cut short"), "{cut:#x} {e:#}"),
            }
        }
    }

    #[test]
    fn kernels_that_cannot_be_booted_are_refused_by_name() {
        for (at, byte, why) in
            [(0x206, 9, "2.09"), (0x211, 0, "zImage"), (0x1f6, 0xff, "cut short"), (0x231, 3, "power")]
        {
            let mut bytes = sample();
            bytes[at] = byte;
            let error = read(bytes).unwrap_err();
            assert!(format!("{error:#}").contains(why), "{at:#x}: {error:#}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_header_panics(at in 0x1f1usize..0x280, bytes: [u8; 8]) {
            let mut whole = sample();
            whole[at..][..8].copy_from_slice(&bytes);
            let _ = read(whole);
        }
    }
}
