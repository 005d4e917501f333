//! `vmlinux` out of a bzImage: the kernel that the image unpacks and jumps to, as an ELF file.
//!
//! Invariant: where the payload is, the image's own header says (Documentation/arch/x86/boot.rst, since protocol 2.08);
//! nothing is searched for.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::filter;
use crate::sh;

/// Magic numbers of payloads, and the programs that unpack them: each is in the Debian package of its name, but for xz's.
const PROGRAMS: [(&[u8], &str, &str); 4] = [
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd"),
    (b"\xfd7zXZ\0", "xz", "xz-utils"),
    (b"\x02\x21\x4c\x18", "lz4", "lz4"),
    (b"\x1f\x8b", "gzip", "gzip"),
];

/// Writes to `to` the kernel that is in `image`.
pub fn vmlinux(image: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(image).with_context(|| image.display().to_string())?;
    let payload = payload(&bytes).with_context(|| format!("{}: no bzImage with a payload", image.display()))?;
    let known = PROGRAMS.iter().find(|(magic, _, _)| payload.starts_with(magic));
    let Some((_, program, package)) = known else {
        bail!("{}: its payload is compressed in a way that is not known here", image.display())
    };
    ensure!(sh::require(program, package), "{}: {program} is needed to unpack it", image.display());
    // The program must not see the size behind the stream, and reads the file that there is to be in its place.
    fs::write(to, payload).with_context(|| to.display().to_string())?;
    let elf = filter(sh::program(program, &["-dc"]), fs::File::open(to)?)?;
    ensure!(elf.starts_with(b"\x7fELF"), "{}: what is in it is no ELF file", image.display());
    fs::write(to, elf).with_context(|| to.display().to_string())
}

/// The compressed kernel in an image, without the size of the uncompressed one, 4 bytes that the kernel's build puts
/// behind a stream that does not end with it itself, as gzip's does.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize);
    let protocol = word(0x206)? & 0xffff;
    if word(0x202)? != u32::from_le_bytes(*b"HdrS") as usize || protocol < 0x208 {
        return None;
    }
    // 0 stands for 4, for the sake of very old loaders.
    let sectors = match word(0x1f1)? & 0xff {
        0 => 4,
        sectors => sectors,
    };
    let start = (sectors + 1) * 512 + word(0x248)?;
    let payload = image.get(start..start.checked_add(word(0x24c)?)?)?;
    if payload.starts_with(b"\x1f\x8b") { Some(payload) } else { payload.get(..payload.len().checked_sub(4)?) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_says_where_the_payload_is() {
        let mut image = vec![0; 2048];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&[0x0f, 0x02]);
        image[0x248] = 0x10;
        image[0x24c] = 0x20;
        let (start, zstd) = (1024 + 0x10, b"\x28\xb5\x2f\xfd");
        image[start..start + 4].copy_from_slice(zstd);
        assert_eq!(payload(&image), Some(&image[start..start + 0x1c]));
        image[start..start + 2].copy_from_slice(b"\x1f\x8b");
        assert_eq!(payload(&image), Some(&image[start..start + 0x20]));
        assert_eq!(payload(&image[..start + 0x1f]), None);
        image[0x206] = 0x07;
        assert_eq!(payload(&image), None);
    }
}
