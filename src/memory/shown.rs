//! Pages that a guest reads and only Bantam writes, so that a register's value needs no exit.
//!
//! Invariant: where nothing is put there are ones, as on an empty bus; they are the same few pages all over.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags};

use super::mapping::Mapping;

/// Bytes of a page.
pub const PAGE: u64 = 0x1000;
/// How many bytes of ones are kept, to be shown again and again: memory against calls of mmap.
const ONES: u64 = 16 * PAGE;

/// Some pages with something on them among many with ones.
pub struct Shown {
    file: File,
    /// Where each lies that something can be put on: the first behind the ones in the file, the next behind it.
    pages: Vec<u64>,
    mapping: Mapping,
}

impl Shown {
    /// `size` bytes, with a page of its own at each of these offsets, in ascending order.
    ///
    /// # Errors
    /// The host's pages are larger, or it cannot make or map them.
    pub fn new(size: u64, pages: &[u64]) -> io::Result<Self> {
        if super::page_size() != PAGE || !size.is_multiple_of(PAGE) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let file = File::from(rustix::fs::memfd_create("shown", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
        file.set_len(ONES + pages.len() as u64 * PAGE)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        // Made here, since the program's file would have all of an array in it.
        file.write_all_at(&vec![0xff; ONES as usize], 0)?;
        let mapping = Mapping::of_parts(&file, &parts(size, pages)?)?;
        Ok(Self { file, pages: pages.to_vec(), mapping })
    }

    /// Where the first byte is mapped in this process.
    pub fn host(&self) -> u64 {
        self.mapping.start().addr() as u64
    }

    /// Puts bytes on the page at `page`, from its start; false where that is none of its own, or too small.
    pub fn put(&self, page: u64, bytes: &[u8]) -> bool {
        let fits = bytes.len() as u64 <= PAGE;
        let Some(number) = self.pages.binary_search(&page).ok().filter(|_| fits) else { return false };
        let written = self.file.write_all_at(bytes, ONES + number as u64 * PAGE).is_ok();
        // An arm64 guest may have mapped it as a device.
        self.mapping.write_back(usize::try_from(page).unwrap_or(usize::MAX), bytes.len());
        written
    }
}

/// What of the file lies where: offsets and sizes, one behind the other.
fn parts(size: u64, pages: &[u64]) -> io::Result<Vec<(u64, usize)>> {
    let in_order = pages.iter().zip(pages.iter().skip(1)).all(|(page, next)| page < next);
    if !in_order || pages.iter().any(|page| *page >= size || !page.is_multiple_of(PAGE)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut parts = Vec::new();
    let mut push = |offset, size: u64| usize::try_from(size).map(|size| parts.push((offset, size)));
    let (mut at, mut own) = (0, ONES);
    for page in pages.iter().copied().chain([size]) {
        while at < page {
            let ones = ONES.min(page - at);
            push(0, ones).map_err(io::Error::other)?;
            at += ones;
        }
        if page < size {
            push(own, PAGE).map_err(io::Error::other)?;
            (at, own) = (page + PAGE, own + PAGE);
        }
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_between_pages_is_ones() {
        assert_eq!(parts(0x3000, &[0x1000]).unwrap(), [(0, 0x1000), (ONES, 0x1000), (0, 0x1000)]);
        let all = parts(0x10_0000, &[0, 0x8000, 0x1_0000]).unwrap();
        assert_eq!(all.iter().map(|(_, size)| size).sum::<usize>(), 0x10_0000);
        assert_eq!(all[..4], [(ONES, 0x1000), (0, 0x7000), (ONES + PAGE, 0x1000), (0, 0x7000)]);
        for pages in [&[0x800u64][..], &[0x1000, 0x1000], &[0x2000, 0x1000], &[0x3000], &[u64::MAX]] {
            assert!(parts(0x3000, pages).is_err(), "{pages:x?}");
        }
    }

    #[test]
    fn only_pages_of_their_own_take_what_is_put() {
        if super::super::page_size() != PAGE {
            return;
        }
        let shown = Shown::new(0x4_0000, &[0, 0x8000]).unwrap();
        assert!(shown.host().is_multiple_of(PAGE));
        assert!(shown.put(0, &[1, 2]) && shown.put(0x8000, &[3; 0x1000]));
        assert!(!shown.put(0x1000, &[1]) && !shown.put(1, &[1]) && !shown.put(0, &[0; 0x1001]));
        let byte = |at: u64| {
            let mut byte = [0];
            shown.file.read_exact_at(&mut byte, at).map(|()| byte[0]).ok()
        };
        let places = [0, ONES - 1, ONES, ONES + 1, ONES + 2, ONES + 0x1000, ONES + 0x1fff, ONES + 0x2000];
        assert_eq!(places.map(byte), [Some(255), Some(255), Some(1), Some(2), Some(0), Some(3), Some(3), None]);
    }
}
