//! One part of a file that guest RAM is in, mapped at a place under which the host can put huge pages.
//!
//! Invariant: a mapping lives as long as its [`Mapping`], and nothing else unmaps it.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::AtomicU16;

use vm_memory::FileOffset;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};

use super::HUGE_PAGE;
use crate::host::sys::state;

/// What stays free between this program and guest RAM, for what the program maps later.
const GAP: usize = 1 << 30;

/// A part of a file in this process's addresses.
pub struct Mapping {
    addr: usize,
    size: usize,
}

/// An address in this program. The host puts it where nobody can guess, and what lies so far below it is as hard to guess.
pub fn program() -> usize {
    static HERE: u8 = 0;
    (&raw const HERE).addr().saturating_sub(GAP)
}

/// The highest place of `size` bytes below `top` whose distance to a huge page's start is that of the guest's address
/// `guest`: only then can the host's page tables and KVM's both map it by huge pages.
fn place(top: usize, size: usize, guest: u64) -> Option<usize> {
    let huge = usize::try_from(HUGE_PAGE).ok()?;
    let odd = usize::try_from(guest % HUGE_PAGE).ok()?;
    top.checked_sub(size)?.checked_sub(huge).map(|top| top / huge * huge + odd)
}

/// Such a place below the program; or, where that lies too low for it, as one does that is not relocated, below what the host
/// gives when it is asked for a bit more. It may be taken until it is used; then the host chooses.
fn wish(top: usize, size: usize, guest: u64) -> Option<usize> {
    if let below @ Some(_) = place(top, size, guest).filter(|place| *place > GAP) {
        return below;
    }
    let more = size.checked_add(2 * usize::try_from(HUGE_PAGE).ok()?)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: without MAP_FIXED the kernel takes free addresses only.
    let free = unsafe { libc::mmap(ptr::null_mut(), more, libc::PROT_NONE, flags, -1, 0) };
    if free == libc::MAP_FAILED {
        return None;
    }
    // SAFETY: this mapping was just made, and nobody knows of it.
    unsafe { libc::munmap(free, more) };
    place(free.addr().checked_add(more)?, size, guest)
}

impl Mapping {
    /// Maps `size` bytes of `file` from `offset` on, readable and writable, below `top` if there is room. `guest` is the
    /// address that the guest will see there.
    pub fn new(file: &File, offset: u64, size: usize, (guest, top): (u64, usize), flags: i32) -> io::Result<Self> {
        let offset = offset.try_into().map_err(io::Error::other)?;
        // Less than a huge page has nothing to gain.
        let worth = size as u64 >= HUGE_PAGE;
        let wish = worth.then(|| wish(top, size, guest)).flatten().unwrap_or(0);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: without MAP_FIXED the kernel takes free addresses only, and where `wish` is not free, others.
        let addr =
            unsafe { libc::mmap(ptr::without_provenance_mut(wish), size, prot, flags, file.as_raw_fd(), offset) };
        if addr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { addr: addr.expose_provenance(), size })
    }

    /// Maps parts of `file`, each an offset and a size in whole pages, one behind the other, to be read only.
    pub fn of_parts(file: &File, parts: &[(u64, usize)]) -> io::Result<Self> {
        let size = parts.iter().map(|(_, size)| size).sum();
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: without MAP_FIXED the kernel takes free addresses only.
        let addr = unsafe { libc::mmap(ptr::null_mut(), size, libc::PROT_NONE, flags, -1, 0) };
        if addr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let all = Self { addr: addr.expose_provenance(), size };
        let mut at = all.addr;
        for (offset, size) in parts {
            let (place, offset) =
                (ptr::with_exposed_provenance_mut(at), (*offset).try_into().map_err(io::Error::other)?);
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            // SAFETY: the place lies in `all`, of whose sizes it is a part, and which nobody uses yet.
            let part = unsafe { libc::mmap(place, *size, libc::PROT_READ, flags, file.as_raw_fd(), offset) };
            if part == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            at += size;
        }
        Ok(all)
    }

    /// The first byte.
    pub fn start(&self) -> *mut u8 {
        ptr::with_exposed_provenance_mut(self.addr)
    }

    /// Has the bytes of `[at, at + size)`, as they are now, reach memory itself, past the host's caches.
    pub fn write_back(&self, at: usize, size: usize) {
        let at = at.min(self.size);
        // SAFETY: the range was cut to the mapping, which can be read.
        unsafe { state::write_back(self.addr + at, size.min(self.size - at)) };
    }

    /// What looks into it; `backing` is where it lies in its file.
    ///
    /// # Safety
    /// The mapping lives longer than the region.
    pub unsafe fn region(&self, backing: FileOffset) -> Result<MmapRegion, MmapRegionError> {
        let region = MmapRegionBuilder::new(self.size).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        let region = region.with_mmap_flags(libc::MAP_SHARED).with_file_offset(backing);
        // SAFETY: `start` and `size` are this mapping, which outlives the region.
        unsafe { region.with_raw_mmap_pointer(self.start()) }.build()
    }

    /// Has the host put huge pages under `[at, at + size)`, with what is there now. Each huge page's worth must have been
    /// touched.
    ///
    /// # Errors
    /// The host is older than Linux 6.1, or has no huge page at hand; all is as it was.
    pub fn collapse(&self, at: usize, size: usize) -> io::Result<()> {
        let end = at.checked_add(size).filter(|end| *end <= self.size);
        end.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let start = ptr::with_exposed_provenance_mut::<c_void>(self.addr + at);
        // SAFETY: the range lies in this mapping, and the call changes no byte of it (madvise(2), MADV_COLLAPSE).
        let done = unsafe { libc::madvise(start, size, libc::MADV_COLLAPSE) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Mapping {
    /// Forgets what was written to `[at, at + size)` of a private mapping, whole pages: it is what is in the file again.
    /// False where the host refuses.
    pub fn revert(&self, at: usize, size: usize) -> bool {
        let Some(start) = self.place(at, size) else { return false };
        // SAFETY: the range lies in this mapping, to which no reference is ever made.
        unsafe { libc::madvise(start.cast(), size, libc::MADV_DONTNEED) == 0 }
    }
}

/// The most bytes that are read or written one word at a time, which is quicker than to call somebody for it; and who reads
/// so few looks at them, and must not see them change: each is read once, whatever the compiler thinks. More are copied as
/// fast as can be.
const FEW: usize = 64;

/// Accesses by others, guests above all, at the same time are as expected: no reference is ever made. Each is false where
/// it would not lie in the mapping whole.
impl Mapping {
    #[inline]
    fn place(&self, at: usize, size: usize) -> Option<*mut u8> {
        let end = at.checked_add(size)?;
        (end <= self.size).then(|| self.start().wrapping_add(at))
    }

    /// Reads `into.len()` bytes at `at`.
    #[inline]
    pub fn read(&self, at: usize, into: &mut [u8]) -> bool {
        let Some(mut from) = self.place(at, into.len()) else { return false };
        if into.len() > FEW {
            // SAFETY: `place` has seen that so many bytes lie in the mapping; `into` is ours.
            unsafe { ptr::copy_nonoverlapping(from.cast_const(), into.as_mut_ptr(), into.len()) };
            // Nor is this copy looked at by a second look at the guest's memory.
            std::hint::black_box(into);
            return true;
        }
        let (words, bytes) = into.as_chunks_mut::<8>();
        for word in words {
            // SAFETY: as above; an array of bytes may be anywhere.
            *word = unsafe { from.cast::<[u8; 8]>().read_volatile() };
            from = from.wrapping_add(8);
        }
        for byte in bytes {
            // SAFETY: as above.
            *byte = unsafe { from.read_volatile() };
            from = from.wrapping_add(1);
        }
        true
    }

    /// Writes `from` at `at`.
    #[inline]
    pub fn write(&self, at: usize, from: &[u8]) -> bool {
        let Some(mut into) = self.place(at, from.len()) else { return false };
        if from.len() > FEW {
            // SAFETY: `place` has seen that so many bytes lie in the mapping; `from` is ours.
            unsafe { ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) };
            return true;
        }
        let (words, bytes) = from.as_chunks::<8>();
        for word in words {
            // SAFETY: as above; an array of bytes may be anywhere.
            unsafe { into.cast::<[u8; 8]>().write_volatile(*word) };
            into = into.wrapping_add(8);
        }
        for byte in bytes {
            // SAFETY: as above.
            unsafe { into.write_volatile(*byte) };
            into = into.wrapping_add(1);
        }
        true
    }

    /// The two bytes at `at`, an even number, for accesses at once.
    pub fn word(&self, at: usize) -> Option<&AtomicU16> {
        let place = self.place(at, 2).filter(|_| at.is_multiple_of(2))?;
        // SAFETY: it lies in the mapping, which starts at a page, and everybody writes such bytes at once or as plain bytes.
        Some(unsafe { AtomicU16::from_ptr(place.cast()) })
    }

    /// The first of `size` bytes at `at`.
    pub fn bytes(&self, at: usize, size: usize) -> Option<*mut u8> {
        self.place(at, size)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing else unmaps it, and whoever used it held this mapping.
        unsafe { libc::munmap(self.start().cast(), self.size) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HUGE: usize = 2 << 20;

    #[test]
    fn accesses_lie_in_the_mapping_whole() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let mapping = Mapping::new(&file, 0, 8192, (0, program()), libc::MAP_SHARED).unwrap();
        let bytes: Vec<u8> = (0..200).collect();
        for size in [0, 1, 7, 8, 9, 63, 64, 65, 200] {
            for at in [0, 3, 8192 - size] {
                let mut back = vec![0; size];
                assert!(mapping.write(at, &bytes[..size]) && mapping.read(at, &mut back) && back == bytes[..size]);
            }
            assert!(
                !mapping.write(8193 - size, &bytes[..size]) && !mapping.read(usize::MAX - 1, &mut vec![0; size + 2])
            );
        }
        mapping.word(8190).unwrap().store(0x1234, std::sync::atomic::Ordering::Relaxed);
        assert!(mapping.word(8191).is_none() && mapping.word(8192).is_none() && mapping.word(3).is_none());
        let mut back = [0; 2];
        assert!(mapping.read(8190, &mut back) && u16::from_ne_bytes(back) == 0x1234);
        assert!(mapping.bytes(8000, 192).is_some() && mapping.bytes(8000, 193).is_none());
    }

    #[test]
    fn a_place_lies_in_its_huge_pages_as_the_guests_address_does() {
        let top = 0x7f12_3456_7000;
        for (size, guest) in [(HUGE, 0), (0x1234_5000, 0x1000), (1 << 40, 0x4000_0000), (HUGE + 0x1000, 0x1f_f000)] {
            let at = place(top, size, guest).unwrap();
            assert_eq!(at as u64 % HUGE_PAGE, guest % HUGE_PAGE, "{size:#x} {guest:#x}");
            assert!(at + size <= top && at + size + 3 * HUGE > top, "{at:#x}");
        }
        assert_eq!(place(top, top, 0), None);
    }

    #[test]
    fn a_program_that_lies_low_has_its_places_elsewhere() {
        for guest in [0, 0x1000, 0x4000_0000, 0x1f_f000] {
            let at = wish(0x40_0000, 64 * HUGE, guest).unwrap();
            assert!(at > GAP && at as u64 % HUGE_PAGE == guest % HUGE_PAGE, "{at:#x}");
        }
        assert_eq!(wish(GAP, usize::MAX - HUGE, 0), None);
    }
}
