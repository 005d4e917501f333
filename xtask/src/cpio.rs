//! cpio archives in the format that Linux unpacks into its first file system (Documentation/driver-api/early-userspace/
//! buffer-format.rst).
//!
//! Invariant: an archive depends on what is put into it and in which order, and on nothing else: times, owners and inode
//! numbers of this machine stay here.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result};

/// A cpio archive in the "newc" format.
pub struct Archive<W: Write> {
    out: W,
    files: u32,
}

impl<W: Write> Archive<W> {
    /// An archive that goes to `out`.
    pub fn new(out: W) -> Self {
        Self { out, files: 0 }
    }

    /// Adds one file, folder or link. `mode` has its type.
    pub fn add(&mut self, name: &[u8], mode: u32, data: &[u8]) -> Result<()> {
        self.files += 1;
        let (size, length) = (u32::try_from(data.len()).context("a file of 4 GiB or more")?, name.len() + 1);
        let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
        // Magic, inode, mode, user, group, links, time, size, four of devices, length of the name, checksum.
        write!(self.out, "070701{:08x}{mode:08x}{:016x}{links:08x}{:08x}{size:08x}", self.files, 0, 0)?;
        write!(self.out, "{:032x}{length:08x}{:08x}", 0, 0)?;
        self.out.write_all(name)?;
        // The header is 110 bytes; names and contents end on a multiple of 4.
        self.out.write_all(&[0; 4][..1 + pad(110 + length)])?;
        self.out.write_all(data)?;
        Ok(self.out.write_all(&[0; 3][..pad(data.len())])?)
    }

    /// Adds a folder.
    pub fn folder(&mut self, name: &str) -> Result<()> {
        self.add(name.as_bytes(), 0o040_755, &[])
    }

    /// Adds a file of these words.
    pub fn text(&mut self, name: &str, mode: u32, text: &str) -> Result<()> {
        self.add(name.as_bytes(), 0o100_000 | mode, text.as_bytes())
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, name: &str, to: &str) -> Result<()> {
        self.add(name.as_bytes(), 0o120_777, to.as_bytes())
    }

    /// Adds a file of this machine.
    pub fn file(&mut self, name: &OsStr, from: &Path) -> Result<()> {
        let mode = fs::metadata(from).with_context(|| from.display().to_string())?.permissions().mode();
        let data = fs::read(from).with_context(|| from.display().to_string())?;
        self.add(name.as_bytes(), 0o100_000 | (mode & 0o7777), &data)
    }

    /// Adds what is in a folder of this machine, without the folders that are left out.
    pub fn tree(&mut self, root: &Path, left_out: &[&str]) -> Result<()> {
        self.branch(root, root, left_out)
    }

    fn branch(&mut self, root: &Path, folder: &Path, left_out: &[&str]) -> Result<()> {
        let mut entries: Vec<_> = fs::read_dir(folder)?.collect::<std::io::Result<_>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = entry.path();
            let name = path.strip_prefix(root)?;
            if left_out.iter().any(|out| name == Path::new(out)) {
                continue;
            }
            let meta = fs::symlink_metadata(&path)?;
            let bytes = name.as_os_str().as_bytes();
            if meta.is_symlink() {
                self.add(bytes, 0o120_777, fs::read_link(&path)?.as_os_str().as_bytes())?;
            } else if meta.is_dir() {
                self.add(bytes, meta.mode(), &[])?;
                self.branch(root, &path, left_out)?;
            } else {
                self.file(name.as_os_str(), &path)?;
            }
        }
        Ok(())
    }

    /// Ends the archive; what follows is another one.
    pub fn finish(mut self) -> Result<W> {
        self.add(b"TRAILER!!!", 0, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }
}

/// Bytes from `length` to the next multiple of 4.
fn pad(length: usize) -> usize {
    length.wrapping_neg() % 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_made_of_aligned_entries() {
        let mut archive = Archive::new(Vec::new());
        archive.text("a", 0o644, "hello").unwrap();
        let bytes = archive.finish().unwrap();
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.starts_with("07070100000001000081a4"), "{text}");
        assert_eq!(&bytes[54..62], b"00000005");
        assert_eq!(&bytes[94..102], b"00000002");
        assert_eq!(&bytes[110..120], b"a\0hello\0\0\0");
        assert_eq!(&bytes[120..126], b"070701");
        assert_eq!(bytes.len() % 4, 0);
    }
}
