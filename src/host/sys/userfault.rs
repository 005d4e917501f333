//! Being asked before somebody writes to memory (userfaultfd(2), Documentation/admin-guide/mm/userfaultfd.rst): whoever
//! does, guest or device or this program, waits until it is let.
//!
//! Invariant: all wait at most as long as a [`Guarded`] lives.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};

/// UFFD_API, and what is needed of it: write protection, also of memory files (Linux 5.19; arm64: 6.10).
const API: u64 = 0xaa;
const FEATURES: u64 = 1 | 1 << 12;
/// UFFDIO_API, UFFDIO_REGISTER, UFFDIO_WRITEPROTECT: `_IOWR(0xaa, number, size)`.
const UFFDIO_API: u64 = request(0x3f, size_of::<[u64; 3]>());
const UFFDIO_REGISTER: u64 = request(0x00, size_of::<[u64; 4]>());
const UFFDIO_WRITEPROTECT: u64 = request(0x06, size_of::<[u64; 3]>());
/// UFFDIO_REGISTER_MODE_WP, UFFDIO_WRITEPROTECT_MODE_WP
const REGISTER_WP: u64 = 2;
const WP: u64 = 1;
/// Bytes of `struct uffd_msg`, whose first is UFFD_EVENT_PAGEFAULT and whose third word is the address.
const MESSAGE: usize = 32;
const PAGEFAULT: u8 = 0x12;

const fn request(number: u64, size: usize) -> u64 {
    3 << 30 | (size as u64) << 16 | API << 8 | number
}

/// Memory that nobody writes to unasked.
pub struct Guarded(File);

impl Guarded {
    /// None yet.
    ///
    /// # Errors
    /// The host has no such thing, or not for this user: faults inside KVM count too, so it takes root, CAP_SYS_PTRACE or
    /// vm.unprivileged_userfaultfd=1.
    pub fn new() -> io::Result<Self> {
        // SAFETY: a plain call.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: the call has just given it to us alone.
        let own = Self(unsafe { File::from_raw_fd(fd) });
        own.ask(UFFDIO_API, &mut [API, FEATURES, 0])?;
        Ok(own)
    }

    fn ask<const N: usize>(&self, request: u64, words: &mut [u64; N]) -> io::Result<()> {
        // SAFETY: the kernel reads and writes so many words, which the request's number says.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, words.as_mut_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Memory that this process has mapped is to be guarded; it is not yet.
    ///
    /// # Errors
    /// It is of a kind that cannot be: neither a memory file nor this process's alone.
    pub fn register(&self, start: usize, size: usize) -> io::Result<()> {
        self.ask(UFFDIO_REGISTER, &mut [start as u64, size as u64, REGISTER_WP, 0])
    }

    /// Guards whole pages of what was registered, from now on.
    ///
    /// # Errors
    /// They were not.
    pub fn guard(&self, start: usize, size: usize) -> io::Result<()> {
        self.ask(UFFDIO_WRITEPROTECT, &mut [start as u64, size as u64, WP])
    }

    /// Lets all write there, who waits first.
    ///
    /// # Errors
    /// It was not registered.
    pub fn allow(&self, start: usize, size: usize) -> io::Result<()> {
        self.ask(UFFDIO_WRITEPROTECT, &mut [start as u64, size as u64, 0])
    }

    /// Where somebody waits to write, if anybody does who was not told of yet.
    pub fn waiting(&self) -> Option<usize> {
        let mut message = [0; MESSAGE];
        let count = (&self.0).read(&mut message).ok()?;
        let (words, _) = message.as_chunks::<8>();
        let told = count == MESSAGE && message.first() == Some(&PAGEFAULT);
        words.get(2).filter(|_| told).map(|address| usize::from_ne_bytes(*address))
    }
}

/// Whether this host can.
pub fn is_there() -> io::Result<()> {
    Guarded::new().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_numbers_of_the_kernels_header() {
        assert_eq!(UFFDIO_API, 0xc018_aa3f);
        assert_eq!(UFFDIO_REGISTER, 0xc020_aa00);
        assert_eq!(UFFDIO_WRITEPROTECT, 0xc018_aa06);
    }
}
