//! Unix sockets by their paths, for those who never wait: one that listens is taken away with its owner.
//!
//! Invariant: a socket that somebody answers is never taken away, nor is anything that is no socket; who connects is this
//! user or root.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::refuse;

/// The longest path of a socket, which the system call's structure sets.
pub const MAX_PATH: usize = 107;
/// Connections to a [`Listener`] that wait to be accepted.
const BACKLOG: i32 = 1024;
/// How often, and after which pauses, the folder's lock is tried while another start holds it.
const TRIES: u32 = 200;
const TRY: Duration = Duration::from_millis(5);

/// The paths of all that listen: a process that ends without dropping anything takes them away by [`remove_all`].
static PATHS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A socket that listens at a path.
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Takes the path, also from one who is dead.
    ///
    /// # Errors
    /// Somebody listens there, or something is there that is no socket, or the folder cannot be written to.
    pub fn new(path: &Path) -> Result<Self> {
        let what = || path.display().to_string();
        check_path(path, 0)?;
        // Two starts at once must not both find the same socket dead. Whoever may write there may also hold the lock for
        // ever; that is no reason not to start.
        let _lock = (0..TRIES).find_map(|_| lock(path));
        if !clear(path)? {
            let hint = "each machine needs a path of its own";
            return Err(refuse(format!("{}: somebody listens there already", what())).hint(hint).into());
        }
        let socket = listen(path, BACKLOG).with_context(what)?;
        enter(path);
        Ok(Self { socket, path: path.into() })
    }

    /// The next who connected; none where nobody waits.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn accept(&self) -> rustix::io::Result<Option<UnixStream>> {
        match rustix::net::accept_with(&self.socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
            Ok(socket) => Ok(Some(socket.into())),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // While it still listens: afterwards another may take the path.
        let _ = std::fs::remove_file(&self.path);
        leave(&self.path);
    }
}

/// A path that [`remove_all`] is to take away.
pub fn enter(path: &Path) {
    PATHS.lock().unwrap_or_else(PoisonError::into_inner).push(path.into());
}

/// One that is gone.
pub fn leave(gone: &Path) {
    PATHS.lock().unwrap_or_else(PoisonError::into_inner).retain(|path| path != gone);
}

/// Takes all sockets that listen away, at the end of the process.
pub fn remove_all() {
    for path in PATHS.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        let _ = std::fs::remove_file(path);
    }
}

/// Refuses a path that no socket can have, once `more` bytes are added to it.
///
/// # Errors
/// As said.
pub fn check_path(path: &Path, more: usize) -> Result<()> {
    let most = MAX_PATH - more;
    if path.as_os_str().len() > most || path.as_os_str().is_empty() {
        let why = format!("a socket's path has 1 to {most} bytes here: {}", path.display());
        return Err(refuse(why).hint("a path from the current folder is shorter").into());
    }
    Ok(())
}

/// Locks the folder; none while another start does.
fn lock(path: &Path) -> Option<OwnedFd> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let fd = rustix::fs::open(folder, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let locked = rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive);
    if locked.is_err() {
        std::thread::sleep(TRY);
    }
    locked.ok().map(|()| fd)
}

/// Makes way at a path for a socket, also where one lies whose owner is dead; false where somebody still listens there, even
/// if he is stopped or busy. Two starts at once must hold a lock, or both find the same socket dead.
///
/// # Errors
/// Something is there that is no socket, or the folder cannot be written to.
pub fn clear(path: &Path) -> Result<bool> {
    let what = || path.display().to_string();
    match rustix::fs::lstat(path) {
        Err(Errno::NOENT) => Ok(true),
        Err(e) => Err(e).with_context(what),
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => {
            Err(refuse(format!("{} is there and is no socket", what())).hint("remove it").into())
        }
        Ok(_) if matches!(connect(path), Err(Errno::CONNREFUSED)) => {
            std::fs::remove_file(path).with_context(what).map(|()| true)
        }
        Ok(_) => Ok(false),
    }
}

fn socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Listens at a path where there is nothing, for this user alone, without ever waiting; so many may wait to be accepted.
///
/// # Errors
/// The host refuses.
pub fn listen(path: &Path, backlog: i32) -> rustix::io::Result<UnixListener> {
    let socket = socket()?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR)?;
    rustix::net::listen(&socket, backlog)?;
    Ok(socket.into())
}

/// Connects without waiting, to a socket that will not wait either.
///
/// # Errors
/// Nobody listens there, or (AGAIN) too many others wait to be accepted.
pub fn connect(path: &Path) -> rustix::io::Result<UnixStream> {
    let socket = socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_taken_from_the_dead_and_never_from_the_living() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let first = Listener::new(&path).unwrap();
        let said = Listener::new(&path).err().unwrap().to_string();
        assert!(said.contains("somebody listens"), "{said}");
        assert!(connect(&path).is_ok() && first.accept().unwrap().is_some());
        // As a process that was killed leaves it.
        let Listener { socket, .. } = &first;
        let other = folder.path().join("t");
        let dead = listen(&other, BACKLOG).unwrap();
        drop(dead);
        assert!(other.exists() && Listener::new(&other).is_ok());
        assert!(!other.exists() && path.exists());
        assert!(socket.local_addr().is_ok());
        drop(first);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_socket_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        std::fs::write(&file, "x").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for path in [&file, &link] {
            let said = Listener::new(path).err().unwrap().to_string();
            assert!(said.contains("is no socket"), "{said}");
        }
        assert_eq!(std::fs::read(&link).unwrap(), b"x");
        assert!(Listener::new(&folder.path().join("x".repeat(120))).is_err());
    }
}
