//! A lease on a file that is read (fcntl(2), F_SETLEASE): whoever opens it to write, or cuts it, waits for its end, and this
//! process hears of it by [`LOST`] first.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Somebody wants to change a file that this process has a lease on; the kernel lets them after a while
/// (/proc/sys/fs/lease-break-time, 45 s).
pub const LOST: i32 = libc::SIGIO;

/// Takes a lease, which ends with the file's last descriptor.
///
/// # Errors
/// Somebody has the file open to write to it (`WouldBlock`), it is another user's, or the file system has no leases.
pub fn take(file: &File) -> io::Result<()> {
    // It waits for whoever listens, from [`super::control_signals`] on.
    super::hold(LOST)?;
    // SAFETY: a plain call on a descriptor that is open.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
