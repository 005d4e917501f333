//! The words of `--disk`, and the file that they name: opened once, looked at through that opening, and locked.
//!
//! Invariant: what is not certainly a disk that may be used in this way is refused before the guest starts.

use std::fs::{File, Metadata};
use std::io::{ErrorKind, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{AtFlags, OFlags, StatxFlags};

use super::limit::Rate;
use super::request::{ID, Medium, SECTOR};
use crate::config::Words;
use crate::error::{Refusal, refuse};
use crate::host::sys::disk;
use crate::memory::pages::data;

/// The most queues of one disk.
pub const MOST_QUEUES: usize = 16;

/// How an image lies in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Byte for byte.
    Raw,
    /// As QEMU's own format has it.
    Qcow2,
}

/// What a disk is whose writes do not go to its file, which is only read, but to one that is gone when the machine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Own {
    /// What is written is kept beside it.
    Overlay,
    /// A copy of all.
    Copy,
}

/// The words of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Its file.
    pub path: PathBuf,
    /// Nothing is written.
    pub read_only: bool,
    /// None: raw, if it does not look like anything else.
    pub format: Option<Format>,
    /// How many queues.
    pub queues: usize,
    /// Past the host's page cache.
    pub direct: bool,
    /// What the guest knows it by.
    pub serial: Option<String>,
    /// How fast it may be.
    pub rate: Option<Rate>,
    /// The one file that a qcow2 image may stand on.
    pub backing: Option<PathBuf>,
    /// Writes do not go to its file.
    pub own: Option<Own>,
}

impl Options {
    /// Takes the words apart.
    ///
    /// # Errors
    /// They say nothing, or too much.
    pub fn parse(words: &Words) -> Result<Self, Refusal> {
        let mut words = words.take("--disk");
        let formats = [("raw", Format::Raw), ("qcow2", Format::Qcow2)];
        let options = Self {
            path: words.first().into(),
            read_only: words.flag("ro")?,
            format: words.choice("format", &formats)?,
            queues: words.value("queues")?.unwrap_or(1),
            direct: words.choice("cache", &[("writeback", false), ("none", true)])?.unwrap_or(false),
            serial: words.value("serial")?,
            rate: words.value("rate")?,
            backing: words.value("backing")?,
            own: match (words.flag("overlay")?, words.flag("copy")?) {
                (false, false) => None,
                (true, false) => Some(Own::Overlay),
                (false, true) => Some(Own::Copy),
                (true, true) => return Err(words.refuse("overlay or copy: which?")),
            },
        };
        if options.path.as_os_str().is_empty() {
            return Err(words.refuse("which file?"));
        }
        if !(1..=MOST_QUEUES).contains(&options.queues) {
            return Err(words.refuse(format_args!("a disk has 1 to {MOST_QUEUES} queues")));
        }
        let graphic = |serial: &String| serial.len() <= ID && serial.bytes().all(|byte| byte.is_ascii_graphic());
        if options.serial.as_ref().is_some_and(|serial| !graphic(serial)) {
            return Err(words.refuse(format_args!("serial has at most {ID} letters, of ASCII, and no spaces")));
        }
        if options.format != Some(Format::Qcow2) && options.backing.is_some() {
            return Err(words.refuse("backing is for format=qcow2"));
        }
        if options.format == Some(Format::Qcow2) && options.direct {
            return Err(words.refuse("cache=none is for raw disks"));
        }
        if options.own.is_some() && options.read_only {
            return Err(words.refuse("ro: nothing is written, so there is nothing to be kept in an overlay or a copy"));
        }
        if options.own == Some(Own::Overlay) && (options.direct || options.backing.is_some()) {
            let refusal = words.refuse("overlay is for disks without cache=none and backing");
            return Err(refusal.hint("copy is for all"));
        }
        words.end()?;
        Ok(options)
    }

    /// The file, opened and locked, and what disk a raw image in it is.
    ///
    /// # Errors
    /// It is not to be had, is no disk, or is somebody else's.
    pub fn open(&self) -> Result<(File, Medium)> {
        let file = open(&self.path, self.read_only || self.own.is_some())?;
        let say = |why: String| refuse(format!("--disk {}: {why}", self.path.display()));
        let capacity = (&file).seek(SeekFrom::End(0)).map_err(|e| say(format!("cannot find its end: {e}")))?;
        let mut magic = [0; 4];
        let looks = self.format.is_none() && file.read_exact_at(&mut magic, 0).is_ok() && magic == *b"QFI\xfb";
        if looks {
            let hint = "say format=qcow2, or format=raw if the guest is to see the file as it is";
            return Err(say("it is a qcow2 image, and which format is meant is not guessed".into()).hint(hint).into());
        }
        let serial = self.serial.clone().map_or_else(|| serial(&self.path), Ok)?;
        let mut id = [0; ID];
        id.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        let read_only = self.read_only;
        let mut medium = Medium { capacity, read_only, block: SECTOR as u32, serial: id };
        let file = match self.own {
            Some(Own::Copy) => nameless(&file, &self.path).map_err(|e| say(format!("cannot copy it: {e}")))?,
            _ => file,
        };
        if self.format == Some(Format::Qcow2) {
            return Ok((file, medium));
        }
        if self.direct {
            medium.block = direct(&file).map_err(|why| {
                say(format!("cache=none: {why}")).hint("cache=writeback (the default) works with every file")
            })?;
        }
        if capacity == 0 {
            return Err(say("it is empty".into())
                .hint("make it as large as the disk is to be: truncate -s 1G FILE")
                .into());
        }
        if !capacity.is_multiple_of(medium.block.into()) {
            let block = medium.block;
            let hint = format!("truncate -s %{block} FILE makes it larger; a qcow2 image wants format=qcow2");
            return Err(say(format!("its {capacity} bytes are not a multiple of {block}")).hint(hint).into());
        }
        Ok((file, medium))
    }
}

/// Opens a file that may be anything: nobody may have to wait for the other end of a FIFO.
fn at_once(path: &Path, write: bool) -> std::io::Result<File> {
    File::options().read(true).write(write).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

/// Opens and locks what holds a disk.
///
/// # Errors
/// It is not to be had, is no disk, or is somebody else's.
pub fn open(path: &Path, read_only: bool) -> Result<File> {
    let say = |why: String| refuse(format!("--disk {}: {why}", path.display()));
    let file = at_once(path, !read_only).map_err(|e| {
        let refusal = say(e.to_string());
        match e.kind() {
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem if !read_only => {
                refusal.hint("a disk that is only read: --disk FILE,ro")
            }
            ErrorKind::NotFound => refusal.hint("an empty disk: truncate -s 1G FILE"),
            _ => refusal,
        }
    })?;
    let about = file.metadata().with_context(|| path.display().to_string())?;
    let kind = about.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let what = match kind {
            kind if kind.is_dir() => "a directory",
            kind if kind.is_fifo() => "a FIFO",
            _ => "a device for characters",
        };
        return Err(say(format!("it is {what}; a disk is a file or a block device")).into());
    }
    // With it io_uring would give up where it should wait.
    let flags = rustix::fs::fcntl_getfl(&file)? - OFlags::NONBLOCK;
    rustix::fs::fcntl_setfl(&file, flags)?;
    match disk::lock(&file, !read_only) {
        Ok(()) => Ok(file),
        Err(e) if e.kind() == ErrorKind::WouldBlock => {
            let who = owner(&about).map_or_else(|| "another process".into(), |pid| format!("process {pid}"));
            let hint = match read_only {
                true => "that one writes to it; two can share a disk if both say ro",
                false => "two can share a disk if both say ro",
            };
            Err(say(format!("it is locked by {who}")).hint(hint).into())
        }
        Err(e) => Err(say(format!("cannot lock it: {e}")).into()),
    }
}

/// A copy of a file that has no name, so that it ends with this process. A file system that can has both share what they
/// have in common.
fn nameless(file: &File, path: &Path) -> std::io::Result<File> {
    let beside = path.parent().and_then(|folder| tempfile::tempfile_in(folder).ok());
    if let Some(beside) = beside
        && rustix::fs::ioctl_ficlone(&beside, file).is_ok()
    {
        return Ok(beside);
    }
    let own = tempfile::tempfile()?;
    copy(file, &own, || true)?;
    Ok(own)
}

/// Opens the file of a disk that this process writes to, for reading; nobody else's, if that has its name now.
///
/// # Errors
/// It is not there any more.
pub fn open_own(path: &Path) -> std::io::Result<File> {
    let file = at_once(path, false)?;
    match disk::lock(&file, false) {
        // That of the device.
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(file),
        _ => Err(std::io::Error::new(ErrorKind::NotFound, "another file has its name now")),
    }
}

/// Copies a disk to a file that is empty, as long as `goes_on` says so; where the file system can, both share what they have
/// in common.
///
/// # Errors
/// The host cannot read or write, or it was not to go on.
pub fn copy(mut file: &File, copy: &File, goes_on: impl Fn() -> bool) -> std::io::Result<()> {
    if rustix::fs::ioctl_ficlone(copy, file).is_ok() {
        return Ok(());
    }
    // Of a block device the metadata do not say it.
    let size = file.seek(SeekFrom::End(0))?;
    copy.set_len(size)?;
    let mut bytes = vec![0; 1 << 20];
    for (start, long) in data(file, 0, size) {
        let mut at = start;
        while at < start + long {
            if !goes_on() {
                return Err(std::io::Error::new(ErrorKind::Interrupted, "the machine is to end"));
            }
            let piece = bytes.get_mut(..(start + long - at).min(1 << 20) as usize).unwrap_or_default();
            file.read_exact_at(piece, at)?;
            copy.write_all_at(piece, at)?;
            at += piece.len() as u64;
        }
    }
    Ok(())
}

/// Turns the host's page cache off for a file; gives what its offsets have to be multiples of.
fn direct(file: &File) -> Result<u32, String> {
    let flags = rustix::fs::fcntl_getfl(file).map_err(|e| e.to_string())?;
    rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT)
        .map_err(|_| "its file system knows no O_DIRECT".to_owned())?;
    // STATX_DIOALIGN, since Linux 6.1; before, and where a file system does not say, a sector of the disk below has to do.
    let wanted = StatxFlags::from_bits_retain(0x2000);
    let about = rustix::fs::statx(file.as_fd(), c"", AtFlags::EMPTY_PATH, wanted).map_err(|e| e.to_string())?;
    let said = about.stx_mask & wanted.bits() != 0;
    let align = if said { about.stx_dio_offset_align.max(about.stx_dio_mem_align) } else { logical(file) };
    match align.max(SECTOR as u32) {
        _ if said && about.stx_dio_offset_align == 0 => Err("its file system knows no O_DIRECT for it".into()),
        align @ ..=4096 if align.is_power_of_two() => Ok(align),
        align => Err(format!("its file system wants blocks of {align} bytes")),
    }
}

/// A sector of a block device; 0 for what is none.
fn logical(file: &File) -> u32 {
    let is_device = file.metadata().is_ok_and(|about| about.file_type().is_block_device());
    if is_device { rustix::fs::ioctl_blksszget(file).unwrap_or(0) } else { 0 }
}

/// A serial number that stays as long as the path does (FNV-1a).
///
/// # Errors
/// There is no such file.
pub fn serial(path: &Path) -> Result<String> {
    let path = path.canonicalize().with_context(|| path.display().to_string())?;
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = path.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325, step);
    Ok(format!("bantam{:012x}", hash >> 16))
}

/// Who has locked a file, where this user may see it. /proc/locks has no process for locks of this kind, since an opening
/// can have several; /proc/PID/fdinfo has the locks of each opening that a process has.
fn owner(about: &Metadata) -> Option<u32> {
    let processes = std::fs::read_dir("/proc").ok()?;
    let numbers = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    numbers.into_iter().find(|pid| {
        let Ok(descriptors) = std::fs::read_dir(format!("/proc/{pid}/fdinfo")) else { return false };
        descriptors.flatten().any(|entry| {
            let fd = Path::new("/proc").join(pid.to_string()).join("fd").join(entry.file_name());
            let same = fd.metadata().is_ok_and(|fd| (fd.dev(), fd.ino()) == (about.dev(), about.ino()));
            same && std::fs::read_to_string(entry.path()).is_ok_and(|text| text.contains("\nlock:"))
        })
    })
}
