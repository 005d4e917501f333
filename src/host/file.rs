//! Files that somebody may read at any time: each appears whole, or stays as it was.
//!
//! Invariant: what is not finished bears a name of its own, ends in `.partial`, and is taken away where it fails.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::Result;

/// Makes a file for its owner alone, or empties the one that is there. Nobody may have to wait for who reads a pipe.
fn open(path: &Path, flags: i32) -> io::Result<File> {
    let mut options = File::options();
    options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NONBLOCK | flags).open(path)
}

/// The same for what is no file, as a device, and is written to as it is.
///
/// # Errors
/// It cannot be opened.
pub fn in_place(path: &Path) -> io::Result<File> {
    open(path, 0)
}

/// Puts what `write` writes where `path` names a file, at once; who may read it is its owner, or whom `like` names.
///
/// # Errors
/// It cannot be written whole.
pub fn replace(path: &Path, like: Option<Permissions>, write: impl FnOnce(File) -> Result<()>) -> Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let file = open(Path::new(&partial), libc::O_NOFOLLOW)?;
    let ready = like.map_or(Ok(()), |permissions| file.set_permissions(permissions));
    let written = ready.map_err(anyhow::Error::from).and_then(|()| write(file));
    written.and_then(|()| Ok(std::fs::rename(&partial, path)?)).inspect_err(|_| {
        let _ = std::fs::remove_file(&partial);
    })
}
