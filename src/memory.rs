//! Guest RAM: the one way to it.
//!
//! RAM is a shared, sealed memfd mapped once (DESIGN rule 25); KVM is given the same mapping. Every read and write that
//! Bantam itself does goes through [`Memory`], so that a later version can mark pages dirty and so that no
//! guest-chosen address is ever followed unchecked. Invariant: an access outside RAM is an error, never a fault.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use anyhow::{Context, Result};
use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use crate::error::refuse;

type Ram = vm_memory::GuestMemoryMmap<()>;

/// A range of guest-physical addresses: `[start, start + size)`, never empty, never wrapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Span {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
}

impl Span {
    /// The span, or none where it would be empty or wrap around 2^64.
    pub fn new(start: u64, size: u64) -> Option<Self> {
        let last = size.checked_sub(1)?;
        start.checked_add(last).map(|_| Self { start, size })
    }

    /// Address of the last byte.
    pub fn last(&self) -> u64 {
        self.start + (self.size - 1)
    }

    /// The two have a byte in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.start <= other.last() && other.start <= self.last()
    }

    /// All of `other` lies in this span.
    pub fn contains(&self, other: &Self) -> bool {
        self.start <= other.start && other.last() <= self.last()
    }
}

impl std::fmt::Display for Span {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}..={:#x}", self.start, self.last())
    }
}

/// One mapping of guest RAM, as KVM's memory slots want it.
#[derive(Debug, Clone, Copy)]
pub struct Slot {
    /// Guest-physical addresses.
    pub span: Span,
    /// Where the first byte is mapped in this process.
    pub host: u64,
}

/// All RAM of one machine. Clones share it.
#[derive(Clone)]
pub struct Memory {
    ram: Arc<Ram>,
}

impl Memory {
    /// Makes RAM for `spans`, which are in ascending order, do not overlap and are multiples of the page size. With
    /// `hugepages`, spans that are multiples of 2 MiB are made of huge pages.
    ///
    /// # Errors
    /// The host cannot make or map that much.
    pub fn new(spans: &[Span], hugepages: bool) -> Result<Self> {
        let is_huge = |span: &Span| hugepages && span.size.is_multiple_of(HUGE_PAGE);
        let mut regions = Vec::with_capacity(spans.len());
        for huge in [false, true] {
            let spans: Vec<_> = spans.iter().filter(|span| is_huge(span) == huge).collect();
            if !spans.is_empty() {
                map_file(&spans, huge, &mut regions)?;
            }
        }
        regions.sort_by_key(|region| region.start_addr());
        let ram = Ram::from_regions(regions).context("arranging guest RAM")?;
        Ok(Self { ram: Arc::new(ram) })
    }

    /// The mappings, in the order of their addresses.
    pub fn slots(&self) -> Vec<Slot> {
        let slot = |region: &GuestRegionMmap<()>| {
            let span = Span { start: region.start_addr().0, size: region.len() };
            region.get_host_address(vm_memory::MemoryRegionAddress(0)).ok().map(|host| Slot { span, host: host as u64 })
        };
        self.ram.iter().filter_map(slot).collect()
    }

    /// All of `span` is RAM (adjacent mappings count as one).
    pub fn contains(&self, span: Span) -> bool {
        let size = usize::try_from(span.size).unwrap_or(usize::MAX);
        self.ram.check_range(GuestAddress(span.start), size)
    }

    /// Reads `into.len()` bytes at `addr`.
    ///
    /// # Errors
    /// Any of them is outside RAM.
    pub fn read(&self, addr: u64, into: &mut [u8]) -> Result<()> {
        self.ram.read_slice(into, GuestAddress(addr)).with_context(|| format!("reading guest RAM at {addr:#x}"))
    }

    /// Writes `from` at `addr`.
    ///
    /// # Errors
    /// Any of it is outside RAM.
    pub fn write(&self, addr: u64, from: &[u8]) -> Result<()> {
        self.ram.write_slice(from, GuestAddress(addr)).with_context(|| format!("writing guest RAM at {addr:#x}"))
    }

    /// Copies `[offset, offset + span.size)` of a file into `span`.
    ///
    /// # Errors
    /// The span is not RAM, or the file cannot be read or ends before.
    pub fn fill_from(&self, span: Span, file: &File, offset: u64) -> Result<()> {
        const CHUNK: usize = 1 << 20;
        let mut buffer = vec![0; usize::try_from(span.size).map_or(CHUNK, |size| size.min(CHUNK))];
        let mut done = 0;
        while done < span.size {
            let length = usize::try_from(span.size - done).map_or(CHUNK, |left| left.min(CHUNK));
            let part = buffer.get_mut(..length).context("buffer")?;
            file.read_exact_at(part, offset + done)
                .with_context(|| format!("reading {length} bytes at {:#x} of the file", offset + done))?;
            self.write(span.start + done, part)?;
            done += length as u64;
        }
        Ok(())
    }
}

/// Makes one sealed memory file and maps each span to its own part of it.
fn map_file(spans: &[&Span], huge: bool, regions: &mut Vec<GuestRegionMmap<()>>) -> Result<()> {
    let total = spans.iter().try_fold(0u64, |sum, s| sum.checked_add(s.size)).context("RAM size overflows")?;
    let fail = |what: &str, e: &dyn std::fmt::Display| {
        let (kind, hint) = match huge {
            true => (" in huge pages", "reserve some: sysctl vm.nr_hugepages=N (2 MiB each)"),
            false => ("", "try a smaller --memory"),
        };
        refuse(format!("cannot {what} {total} bytes of guest RAM{kind}: {e}")).hint(hint)
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let flags = if huge { flags | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB } else { flags };
    let file = rustix::fs::memfd_create("guest-ram", flags).context("cannot make a memory file for guest RAM")?;
    let file = Arc::new(File::from(file));
    file.set_len(total).map_err(|e| fail("size the memory file for", &e))?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(|e| fail("seal the memory file for", &e))?;
    // Huge pages are reserved now: a guest that touches one that is not there would kill the process.
    let reserve = if huge { 0 } else { libc::MAP_NORESERVE };
    let mut offset = 0;
    for span in spans {
        let size = usize::try_from(span.size).context("RAM does not fit this host's address space")?;
        let region = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | reserve)
            .with_file_offset(FileOffset::from_arc(file.clone(), offset))
            .build()
            .map_err(|e| fail("map", &e))?;
        regions.push(GuestRegionMmap::new(region, GuestAddress(span.start)).context("RAM wraps around 2^64")?);
        offset += span.size;
    }
    Ok(())
}

/// The size of a huge page.
pub const HUGE_PAGE: u64 = 2 << 20;

/// The page size of this host.
pub fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> Memory {
        Memory::new(&[Span { start: 0, size: 0x2000 }, Span { start: 0x10_0000, size: 0x1000 }], false).unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        let memory = two();
        memory.write(0x1ffe, &[1, 2]).unwrap();
        let mut back = [0; 2];
        memory.read(0x1ffe, &mut back).unwrap();
        assert_eq!(back, [1, 2]);
    }

    #[test]
    fn nothing_outside_ram_is_reached() {
        let memory = two();
        for addr in [0x1fff, 0x2000, 0xf_ffff, 0x10_0fff, u64::MAX] {
            assert!(memory.write(addr, &[0; 2]).is_err(), "{addr:#x}");
            assert!(memory.read(addr, &mut [0; 2]).is_err(), "{addr:#x}");
        }
        assert!(memory.contains(Span { start: 0, size: 0x2000 }));
        assert!(!memory.contains(Span { start: 0, size: 0x2001 }));
        assert!(!memory.contains(Span { start: 0x2000, size: u64::MAX - 0x2000 }));
    }

    #[test]
    fn the_slots_are_the_spans() {
        let slots = two().slots();
        let spans: Vec<_> = slots.iter().map(|s| (s.span.start, s.span.size)).collect();
        assert_eq!(spans, [(0, 0x2000), (0x10_0000, 0x1000)]);
        assert!(slots.iter().all(|s| s.host % page_size() == 0));
    }

    #[test]
    fn a_file_fills_ram_and_its_end_is_an_error() {
        let memory = two();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"0123456789", 0).unwrap();
        memory.fill_from(Span { start: 0x100, size: 4 }, &file, 3).unwrap();
        let mut back = [0; 5];
        memory.read(0x100, &mut back).unwrap();
        assert_eq!(&back, b"3456\0");
        assert!(memory.fill_from(Span { start: 0, size: 4 }, &file, 8).is_err());
    }

    #[test]
    fn spans_know_their_ends() {
        assert_eq!(Span::new(0, 0), None);
        assert_eq!(Span::new(u64::MAX, 2), None);
        let last = Span::new(u64::MAX, 1).unwrap();
        assert_eq!(last.last(), u64::MAX);
        let page = Span::new(0x1000, 0x1000).unwrap();
        assert!(!page.overlaps(&Span::new(0x2000, 1).unwrap()) && page.overlaps(&Span::new(0x1fff, 1).unwrap()));
        assert!(page.contains(&Span::new(0x1fff, 1).unwrap()) && !page.contains(&Span::new(0x1fff, 2).unwrap()));
    }
}
