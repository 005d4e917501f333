//! A small initial RAM disk, made here: a cpio archive (Linux Documentation/driver-api/early-userspace/buffer-format.rst,
//! "newc") with a console and a first process.
//!
//! Invariant: no length in it has more than 32 bits.

use super::image::Image;

/// File types and modes as stat(2) has them.
const FOLDER: u32 = 0o040_755;
const CONSOLE: u32 = 0o020_600;
const PROGRAM: u32 = 0o100_755;
/// Linux Documentation/admin-guide/devices.txt: 5:1 is the console.
const CONSOLE_NUMBER: (u32, u32) = (5, 1);

/// An archive whose first process is `init`.
pub fn archive(init: &[u8]) -> Image {
    let mut bytes = Vec::new();
    entry(&mut bytes, "dev", FOLDER, (0, 0), &[]);
    entry(&mut bytes, "dev/console", CONSOLE, CONSOLE_NUMBER, &[]);
    entry(&mut bytes, "init", PROGRAM, (0, 0), init);
    entry(&mut bytes, "TRAILER!!!", 0, (0, 0), &[]);
    Image::from_bytes("the built-in initial RAM disk", bytes)
}

/// An entry: magic number, thirteen numbers in eight hexadecimal digits each, name and content to multiples of four.
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
    let size = |bytes: usize| u32::try_from(bytes).unwrap_or(0);
    let name_size = size(name.len()) + 1;
    // Inode (its place, so that no two are one file), mode, owner, group, links, time, size, device, special device, name.
    let inode = size(archive.len()) + 1;
    let numbers = [inode, mode, 0, 0, 1, 0, size(content.len()), 0, 0, major, minor, name_size, 0];
    archive.extend(b"070701");
    numbers.iter().for_each(|number| archive.extend(format!("{number:08x}").as_bytes()));
    archive.extend(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_what_cpio_reads() {
        let image = archive(b"#!/x\n");
        let bytes = image.head(4096).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        assert!(bytes.len().is_multiple_of(4) && text.starts_with("070701"));
        // Header 110 bytes, "dev" and NUL, to a multiple of 4.
        assert_eq!((&bytes[110..114], &bytes[116..122]), (&b"dev\0"[..], &b"070701"[..]));
        let at = text.find("init\0").unwrap();
        assert_eq!((&text[at - 110 + 54..][..8], text[at..].find("#!/x")), ("00000005", Some(6)));
        assert!(text.trim_end_matches('\0').ends_with("TRAILER!!!"));
    }
}
