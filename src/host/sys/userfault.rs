//! Being asked before somebody writes to memory, or touches what was never touched (userfaultfd(2),
//! Documentation/admin-guide/mm/userfaultfd.rst): whoever does, guest or device or this program, waits until it is let.
//!
//! Invariant: all wait at most as long as a [`Guarded`] lives.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};

/// UFFD_API, and what is needed of it: to be told of what is touched first in memory files; and write protection, also of
/// those (Linux 5.19; arm64: 6.10).
const API: u64 = 0xaa;
const OF_FIRST: u64 = 1 << 5;
const OF_WRITES: u64 = 1 | 1 << 12;
/// UFFDIO_API, UFFDIO_REGISTER, UFFDIO_COPY, UFFDIO_ZEROPAGE, UFFDIO_WRITEPROTECT, UFFDIO_WAKE
const UFFDIO_API: u64 = request(BOTH, 0x3f, size_of::<[u64; 3]>());
const UFFDIO_REGISTER: u64 = request(BOTH, 0x00, size_of::<[u64; 4]>());
const UFFDIO_COPY: u64 = request(BOTH, 0x03, size_of::<[u64; 5]>());
const UFFDIO_ZEROPAGE: u64 = request(BOTH, 0x04, size_of::<[u64; 4]>());
const UFFDIO_WRITEPROTECT: u64 = request(BOTH, 0x06, size_of::<[u64; 3]>());
const UFFDIO_WAKE: u64 = request(READ, 0x02, size_of::<[u64; 2]>());
/// UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP; UFFDIO_WRITEPROTECT_MODE_WP
const FIRST: u64 = 1;
const WRITES: u64 = 2;
const WP: u64 = 1;
/// Bytes of `struct uffd_msg`, whose first is UFFD_EVENT_PAGEFAULT, whose second word are flags and whose third is the address.
const MESSAGE: usize = 32;
const PAGEFAULT: u8 = 0x12;
/// UFFD_PAGEFAULT_FLAG_WP
const PROTECTED: u64 = 2;

/// `_IOR` and `_IOWR`.
const READ: u64 = 2;
const BOTH: u64 = 3;

const fn request(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | API << 8 | number
}

/// Somebody waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// To write to this address, which is guarded.
    Write(usize),
    /// To touch this address, where there was nothing yet.
    First(usize),
}

/// Memory that nobody writes to unasked, or touches first.
pub struct Guarded {
    file: File,
    /// What whoever does waits for, as [`Guarded::register`] says it.
    mode: u64,
}

impl Guarded {
    /// None yet.
    ///
    /// # Errors
    /// The host has no such thing, or not for this user: faults inside KVM count too, so it takes root, CAP_SYS_PTRACE or
    /// vm.unprivileged_userfaultfd=1.
    pub fn new() -> io::Result<Self> {
        Self::of(OF_FIRST | OF_WRITES, FIRST | WRITES)
    }

    /// The same for memory that anybody may write to once it was touched.
    ///
    /// # Errors
    /// The same.
    pub fn first() -> io::Result<Self> {
        Self::of(OF_FIRST, FIRST)
    }

    fn of(features: u64, mode: u64) -> io::Result<Self> {
        // SAFETY: a plain call.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: the call has just given it to us alone.
        let file = unsafe { File::from_raw_fd(fd) };
        let own = Self { file, mode };
        own.ask(UFFDIO_API, &mut [API, features, 0])?;
        Ok(own)
    }

    fn ask<const N: usize>(&self, request: u64, words: &mut [u64; N]) -> io::Result<()> {
        // SAFETY: the kernel reads and writes so many words, which the request's number says.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), request, words.as_mut_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Memory that this process has mapped is to be guarded; it is not yet.
    ///
    /// # Errors
    /// It is of a kind that cannot be: neither a memory file nor anonymous.
    pub fn register(&self, start: usize, size: usize) -> io::Result<()> {
        self.ask(UFFDIO_REGISTER, &mut [start as u64, size as u64, self.mode, 0])
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

    /// Puts zeroes on a page where nothing was; who waits for it goes on.
    ///
    /// # Errors
    /// It was not registered.
    pub fn begin(&self, page: usize, size: usize) -> io::Result<()> {
        match self.ask(UFFDIO_ZEROPAGE, &mut [page as u64, size as u64, 0, 0]) {
            // Somebody was faster.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                self.ask(UFFDIO_WAKE, &mut [page as u64, size as u64])
            }
            result => result,
        }
    }

    /// Puts `bytes`, whole pages of them, on memory that nobody touched yet; what somebody did stays as it is. Who waits for
    /// any of it goes on.
    ///
    /// # Errors
    /// It was not registered, or the host has no memory left.
    pub fn put(&self, start: usize, bytes: &[u8]) -> io::Result<()> {
        let (mut done, page) = (0, rustix::param::page_size());
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            let mut words = [(start + done) as u64, rest.as_ptr().expose_provenance() as u64, rest.len() as u64, 0, 0];
            let asked = self.ask(UFFDIO_COPY, &mut words);
            let [.., copied] = words;
            // As many bytes as it says, or none and why.
            let copied = usize::try_from(copied.cast_signed()).unwrap_or(0);
            match asked {
                Err(e) if copied == 0 && e.kind() == io::ErrorKind::AlreadyExists => done += page,
                Err(e) if copied == 0 && e.kind() != io::ErrorKind::WouldBlock => return Err(e),
                _ => done += copied,
            }
        }
        // Nobody was told of what was there.
        self.ask(UFFDIO_WAKE, &mut [start as u64, bytes.len() as u64])
    }

    /// Who waits, if anybody does who was not told of yet.
    pub fn waiting(&self) -> Option<Fault> {
        let mut message = [0; MESSAGE];
        let count = (&self.file).read(&mut message).ok()?;
        let (words, _) = message.as_chunks::<8>();
        let [_, flags, address, ..] = words else { return None };
        (count == MESSAGE && message.first() == Some(&PAGEFAULT)).then_some(())?;
        let address = usize::from_ne_bytes(*address);
        Some(if u64::from_ne_bytes(*flags) & PROTECTED == 0 { Fault::First(address) } else { Fault::Write(address) })
    }
}

impl AsFd for Guarded {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_numbers_of_the_kernels_header() {
        assert_eq!(UFFDIO_API, 0xc018_aa3f);
        assert_eq!(UFFDIO_REGISTER, 0xc020_aa00);
        assert_eq!(UFFDIO_WRITEPROTECT, 0xc018_aa06);
        assert_eq!(UFFDIO_COPY, 0xc028_aa03);
        assert_eq!(UFFDIO_ZEROPAGE, 0xc020_aa04);
        assert_eq!(UFFDIO_WAKE, 0x8010_aa02);
    }
}
