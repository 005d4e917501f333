//! A guest file, or bytes that are built in, read in bounded pieces.
//!
//! Invariant: nothing is mapped (a file cut short under us is an error, not a SIGBUS), nothing is read whole, and no
//! read goes past the length that the file had when it was opened.

use std::borrow::Cow;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::packed::{self, Packed};
use crate::error::{Refusal, refuse};
use crate::memory::{Memory, Span};

/// A guest, or a file that is handed to one.
#[derive(Debug)]
pub struct Image {
    name: String,
    len: u64,
    source: Source,
}

#[derive(Debug)]
enum Source {
    File(File),
    Bytes(Cow<'static, [u8]>),
    /// What is packed in a file.
    Packed(Box<Image>, Packed),
}

/// The `N` bytes at `offset` of a file's first ones, if they are there.
pub fn at<const N: usize>(head: &[u8], offset: usize) -> Option<[u8; N]> {
    head.get(offset..)?.first_chunk().copied()
}

/// A path as one line of plain text, whatever bytes it has.
fn printable(path: &Path) -> String {
    let text = path.to_string_lossy();
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

impl Image {
    /// Opens a regular file. Never blocks, whatever the path names.
    ///
    /// # Errors
    /// It is not there, not readable, empty, or something else than a regular file.
    pub fn open(path: &Path) -> Result<Self> {
        let name = printable(path);
        // Without NONBLOCK a FIFO would wait for its writer; without NOCTTY a terminal would become ours.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| match e {
            Errno::NXIO => refuse(format!("{name} is a socket or a device, not a regular file")),
            _ => refuse(format!("cannot open {name}: {e}")),
        })?;
        let stat = rustix::fs::fstat(&fd).map_err(|e| refuse(format!("cannot look at {name}: {e}")))?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => None,
            FileType::Directory => Some("a directory"),
            FileType::Fifo => Some("a FIFO"),
            FileType::CharacterDevice | FileType::BlockDevice => Some("a device"),
            _ => Some("something else"),
        };
        if let Some(kind) = kind {
            return Err(refuse(format!("{name} is {kind}, not a regular file")).into());
        }
        match u64::try_from(stat.st_size) {
            Ok(len) if len > 0 => Ok(Self { name, len, source: Source::File(fd.into()) }),
            _ => Err(refuse(format!("{name} is empty")).into()),
        }
    }

    /// Bytes that are part of Bantam.
    pub fn builtin(name: &'static str, bytes: &'static [u8]) -> Image {
        Self { name: name.to_owned(), len: bytes.len() as u64, source: Source::Bytes(Cow::Borrowed(bytes)) }
    }

    /// Bytes in memory.
    pub fn from_bytes(name: impl Into<String>, bytes: Vec<u8>) -> Image {
        Self { name: name.into(), len: bytes.len() as u64, source: Source::Bytes(Cow::Owned(bytes)) }
    }

    /// What is packed in this file, instead of the file. It can be read from its start only.
    #[must_use]
    pub fn unpacked(self, packed: Packed) -> Image {
        Self { name: self.name.clone(), len: self.len, source: Source::Packed(Box::new(self), packed) }
    }

    /// How it is packed, where it is.
    pub fn packed(&self) -> Option<Packed> {
        match &self.source {
            Source::Packed(_, packed) => Some(*packed),
            Source::File(_) | Source::Bytes(_) => None,
        }
    }

    /// What to call it: the path it was opened by, or its built-in name; always one line.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes; at the time of opening, for a file.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// There are no bytes; no file is so.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Reads `into.len()` bytes at `offset`.
    ///
    /// # Errors
    /// The file ends before, or cannot be read.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let size = into.len() as u64;
        self.check("what is read", offset, size)?;
        match &self.source {
            Source::File(file) => {
                file.read_exact_at(into, offset).with_context(|| format!("reading {size} bytes at {offset:#x}"))?;
            }
            Source::Bytes(bytes) => into.copy_from_slice(piece(bytes, offset, size)?),
            Source::Packed(..) => return Err(refuse("what is packed in it cannot be read from its middle").into()),
        }
        Ok(())
    }

    /// The first bytes, at most `most`.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn head(&self, most: usize) -> Result<Vec<u8>> {
        if let Source::Packed(file, packed) = &self.source {
            return packed::head(file, *packed, most);
        }
        let mut head = vec![0; usize::try_from(self.len).map_or(most, |len| len.min(most))];
        self.read_at(0, &mut head)?;
        Ok(head)
    }

    /// Copies `[offset, offset + span.size)` into guest RAM.
    ///
    /// # Errors
    /// The file ends before or cannot be read, or the span is not RAM.
    pub fn copy_to(&self, memory: &Memory, span: Span, offset: u64) -> Result<()> {
        self.check("what is loaded", offset, span.size)?;
        match &self.source {
            Source::File(file) => memory.fill_from(span, file, offset),
            Source::Bytes(bytes) => memory.write(span.start, piece(bytes, offset, span.size)?),
            Source::Packed(..) => Err(refuse("what is packed in it cannot be loaded in parts").into()),
        }
    }

    /// Copies all of it to the start of `span`, of a file that is not packed no more than fits; says how much it was.
    ///
    /// # Errors
    /// It cannot be read, what is packed is broken or does not fit, or the span is not RAM.
    pub fn pour(&self, memory: &Memory, span: Span) -> Result<u64> {
        let Source::Packed(file, packed) = &self.source else {
            let Some(part) = Span::new(span.start, self.len.min(span.size)) else { return Ok(0) };
            return self.copy_to(memory, part, 0).map(|()| part.size);
        };
        let write = |offset, piece: &[u8]| memory.write(span.start.saturating_add(offset), piece).map(|()| true);
        // The rest of RAM is not used yet, so that much of it is to spare.
        let ram: u64 = memory.slots().iter().map(|slot| slot.span.size).sum();
        let spare = packed::KEPT.saturating_add(ram.saturating_sub(span.size));
        packed::unpack(file, *packed, span.size, spare, write)
    }

    /// Shows its first `limit` bytes to `look`, piece by piece with their offsets, until that answers false; of what zstd
    /// has packed, the first 32 MiB at most.
    ///
    /// # Errors
    /// It cannot be read, or what is packed is broken.
    pub fn scan(&self, limit: u64, mut look: impl FnMut(u64, &[u8]) -> bool) -> Result<()> {
        if let Source::Packed(file, packed) = &self.source {
            let limit = limit.min(packed.scanned());
            return packed::unpack(file, *packed, limit, packed::KEPT, |at, piece| Ok(look(at, piece))).map(|_| ());
        }
        let (end, mut at, mut piece) = (self.len.min(limit), 0, vec![0; 1 << 16]);
        while at < end {
            let size = usize::try_from(end - at).map_or(piece.len(), |left| left.min(piece.len()));
            let part = piece.get_mut(..size).context("buffer")?;
            self.read_at(at, part)?;
            if !look(at, part) {
                break;
            }
            at += size as u64;
        }
        Ok(())
    }

    /// `[offset, offset + size)` lies in the file.
    ///
    /// # Errors
    /// It does not: the file is cut short, and where.
    pub fn check(&self, what: &str, offset: u64, size: u64) -> Result<(), Refusal> {
        let len = self.len;
        match offset.checked_add(size) {
            Some(end) if end <= len => Ok(()),
            Some(end) => {
                Err(refuse(format!("cut short: {what} ends at byte {end:#x} of the file, which ends at {len:#x}")))
            }
            None => Err(refuse(format!("{what}, {size:#x} bytes at {offset:#x} of the file, wraps around 2^64"))),
        }
    }
}

fn piece(bytes: &[u8], offset: u64, size: u64) -> Result<&[u8]> {
    let at = usize::try_from(offset).ok().and_then(|start| bytes.get(start..));
    at.zip(usize::try_from(size).ok()).and_then(|(rest, size)| rest.get(..size)).context("reading past the end")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::verdict;
    use std::time::Instant;

    fn refused(path: &Path) -> String {
        let start = Instant::now();
        let error = Image::open(path).unwrap_err();
        assert!(start.elapsed().as_millis() < 500, "{}", path.display());
        assert_eq!(verdict(&error).0, 125, "{error:#}");
        let text = format!("{error:#}");
        assert!(!text.contains(char::is_control), "{text:?}");
        text
    }

    #[test]
    fn only_a_regular_file_with_something_in_it_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("empty"), b"").unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, path("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        std::os::unix::fs::symlink(path("loop"), path("loop")).unwrap();
        for (name, why) in [
            ("absent", "No such file"),
            (".", "directory"),
            ("empty", "empty"),
            ("fifo", "FIFO"),
            ("socket", "socket"),
            ("loop", "symbolic"),
            ("a\nb", "a\\nb"),
        ] {
            assert!(refused(&path(name)).contains(why), "{name}: {}", refused(&path(name)));
        }
        assert!(refused(Path::new("/dev/null")).contains("device"));
        assert!(refused(Path::new("nul\0byte")).contains("cannot open"));
    }

    #[test]
    fn reads_stay_inside_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ten");
        std::fs::write(&path, b"0123456789").unwrap();
        for image in [Image::open(&path).unwrap(), Image::builtin("ten", b"0123456789")] {
            assert_eq!(image.len(), 10);
            let mut two = [0; 2];
            image.read_at(8, &mut two).unwrap();
            assert_eq!(&two, b"89");
            for offset in [9, 10, u64::MAX] {
                assert_eq!(verdict(&image.read_at(offset, &mut two).unwrap_err()).0, 125);
            }
            assert_eq!(image.head(4).unwrap(), b"0123");
            assert_eq!(image.head(40).unwrap().len(), 10);
            let memory = Memory::new(&[Span { start: 0, size: 0x1000 }], false).unwrap();
            image.copy_to(&memory, Span { start: 0x10, size: 3 }, 7).unwrap();
            let mut back = [0; 4];
            memory.read(0x10, &mut back).unwrap();
            assert_eq!(&back, b"789\0");
            assert!(image.copy_to(&memory, Span { start: 0, size: 4 }, 7).is_err());
            assert!(image.copy_to(&memory, Span { start: 0xfff, size: 2 }, 0).is_err());
        }
    }

    #[test]
    fn a_file_that_shrinks_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shrinks");
        std::fs::write(&path, [1; 5000]).unwrap();
        let image = Image::open(&path).unwrap();
        std::fs::write(&path, b"1").unwrap();
        let memory = Memory::new(&[Span { start: 0, size: 0x2000 }], false).unwrap();
        assert!(image.head(10).is_err());
        assert!(image.copy_to(&memory, Span { start: 0, size: 5000 }, 0).is_err());
    }
}
