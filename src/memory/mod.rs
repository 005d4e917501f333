//! Guest RAM: the one way to it.
//!
//! RAM is a shared, sealed memfd mapped once, or a private mapping of a file that never changes (DESIGN rule 25); KVM is
//! given the same mapping. Every read and write that Bantam itself does goes through [`Memory`], so that a later version can mark pages dirty and so that no
//! guest-chosen address is ever followed unchecked. Invariant: an access outside RAM is an error, never a fault.

mod frozen;
mod lazy;
mod mapping;
pub mod pages;
pub mod shown;

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::{Context, Result, bail};
use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

pub use self::frozen::{Frozen, Waiting};
use self::lazy::Lazy;
pub use self::lazy::Source;
use self::mapping::Mapping;
use crate::error::refuse;
use crate::host::sys::disk::Buffers;

type Ram = vm_memory::GuestMemoryMmap<()>;

/// A range of guest-physical addresses: `[start, start + size)`, never empty, never wrapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
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
        self.offset(other.start, other.size).is_some()
    }

    /// How far into it `addr` is, if `size` bytes from there on lie in it.
    #[inline]
    pub fn offset(&self, addr: u64, size: u64) -> Option<u64> {
        let offset = addr.wrapping_sub(self.start);
        (offset < self.size && size <= self.size - offset).then_some(offset)
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

impl Slot {
    /// The guest's address of one in this process, if it lies here.
    fn address(&self, host: usize) -> Option<u64> {
        let offset = (host as u64).checked_sub(self.host)?;
        (offset < self.span.size).then_some(self.span.start + offset)
    }
}

/// All RAM of one machine. Clones share it.
#[derive(Clone)]
pub struct Memory {
    all: Arc<All>,
}

struct All {
    /// Who puts it there as it is touched. Dropped before what it puts it in.
    lazy: OnceLock<Lazy>,
    ram: Ram,
    /// Where the guest sees the mappings, in the same order.
    spans: Vec<Span>,
    // Dropped after what looks into them.
    mappings: Vec<Mapping>,
    /// Mappings that are multiples of a huge page are made of huge pages.
    hugepages: bool,
    /// What is written stays here: the file never changes.
    private: bool,
    /// Somebody keeps what is there: nothing is given back.
    frozen: AtomicBool,
    /// Where huge pages were wanted.
    huge: Mutex<Vec<Span>>,
}

/// A part of a file, and where the guest sees it.
type Part = (u64, Span);
/// A part that is mapped: how the guest's addresses reach it, and what keeps it.
type Mapped = (GuestRegionMmap<()>, Mapping);

impl Memory {
    /// Makes RAM for `spans`, which are in ascending order, do not overlap and are multiples of the page size. With
    /// `hugepages`, spans that are multiples of 2 MiB are made of huge pages.
    ///
    /// # Errors
    /// The host cannot make or map that much.
    pub fn new(spans: &[Span], hugepages: bool) -> Result<Self> {
        let is_huge = |span: &Span| hugepages && span.size.is_multiple_of(HUGE_PAGE);
        let mut parts = Vec::with_capacity(spans.len());
        for huge in [false, true] {
            let spans: Vec<_> = spans.iter().filter(|span| is_huge(span) == huge).collect();
            if !spans.is_empty() {
                map_file(&spans, huge, &mut parts)?;
            }
        }
        Self::of_parts(parts, hugepages, false)
    }

    /// Makes RAM that begins as `parts` of a file that never changes, each an offset in whole pages and where the guest sees
    /// it, in ascending order. What is read comes from the file once it is read; what is written stays here.
    ///
    /// # Errors
    /// The host cannot map that much.
    pub fn of_image(file: &Arc<File>, parts: &[Part]) -> Result<Self> {
        let mut mapped = Vec::with_capacity(parts.len());
        map_parts(file, parts, libc::MAP_PRIVATE | libc::MAP_NORESERVE, &mut mapped)
            .map_err(|e| refuse(format!("cannot map the file of guest RAM: {e}")))?;
        Self::of_parts(mapped, false, true)
    }

    fn of_parts(mut parts: Vec<Mapped>, hugepages: bool, private: bool) -> Result<Self> {
        parts.sort_by_key(|(region, _)| region.start_addr());
        let (regions, mappings): (Vec<_>, _) = parts.into_iter().unzip();
        let span = |region: &GuestRegionMmap<()>| Span { start: region.start_addr().0, size: region.len() };
        let spans = regions.iter().map(span).collect();
        let ram = Ram::from_regions(regions).context("arranging guest RAM")?;
        Ok(Self {
            all: Arc::new(All {
                lazy: OnceLock::new(),
                ram,
                spans,
                mappings,
                hugepages,
                private,
                frozen: AtomicBool::new(false),
                huge: Mutex::default(),
            }),
        })
    }

    /// It begins as a file that is not to change while the machine lives.
    pub fn is_of_an_image(&self) -> bool {
        self.all.private
    }

    /// The mappings, in the order of their addresses.
    pub fn slots(&self) -> Vec<Slot> {
        let slot = |region: &GuestRegionMmap<()>| {
            let span = Span { start: region.start_addr().0, size: region.len() };
            region.get_host_address(vm_memory::MemoryRegionAddress(0)).ok().map(|host| Slot { span, host: host as u64 })
        };
        self.all.ram.iter().filter_map(slot).collect()
    }

    /// The one mapping that `size` bytes at `addr` lie in, and where: the short way, which nearly all accesses go. None
    /// where they lie in two, or in none.
    #[inline]
    fn one(&self, addr: u64, size: usize) -> Option<(&Mapping, usize)> {
        let mut both = self.all.spans.iter().zip(&self.all.mappings);
        both.find_map(|(span, mapping)| Some((mapping, span.offset(addr, size as u64)? as usize)))
    }

    /// All of `span` is RAM (adjacent mappings count as one).
    pub fn contains(&self, span: Span) -> bool {
        if self.all.spans.iter().any(|one| one.contains(&span)) {
            return true;
        }
        let size = usize::try_from(span.size).unwrap_or(usize::MAX);
        self.all.ram.check_range(GuestAddress(span.start), size)
    }

    /// Reads `into.len()` bytes at `addr`.
    ///
    /// # Errors
    /// Any of them is outside RAM.
    #[inline]
    pub fn read(&self, addr: u64, into: &mut [u8]) -> Result<()> {
        if let Some((mapping, at)) = self.one(addr, into.len())
            && mapping.read(at, into)
        {
            return Ok(());
        }
        self.all.ram.read_slice(into, GuestAddress(addr)).with_context(|| format!("reading guest RAM at {addr:#x}"))
    }

    /// Writes `from` at `addr`.
    ///
    /// # Errors
    /// Any of it is outside RAM.
    #[inline]
    pub fn write(&self, addr: u64, from: &[u8]) -> Result<()> {
        if let Some((mapping, at)) = self.one(addr, from.len())
            && mapping.write(at, from)
        {
            return Ok(());
        }
        self.all.ram.write_slice(from, GuestAddress(addr)).with_context(|| format!("writing guest RAM at {addr:#x}"))
    }

    /// Has the host put huge pages under `span`, where it can: the guest then makes one fault where it would make 512. They
    /// are given as zeroes now, to their ends; so this is for what the guest will use anyway. Says how many bytes of huge
    /// pages there are now.
    pub fn prefer_huge(&self, span: Span) -> u64 {
        self.huge().push(span);
        let regions = self.all.ram.iter().zip(&self.all.mappings);
        let of_one = |(region, mapping): (&GuestRegionMmap<()>, &Mapping)| {
            let first = region.start_addr().0;
            // Elsewhere KVM could map none of them whole.
            let host = mapping.start().addr() as u64;
            (host % HUGE_PAGE == first % HUGE_PAGE).then_some(())?;
            let end = (first.checked_add(region.len())? / HUGE_PAGE).checked_mul(HUGE_PAGE)?;
            let start = first.max(span.start - span.start % HUGE_PAGE).checked_next_multiple_of(HUGE_PAGE)?;
            let end = span.last().checked_add(1)?.checked_next_multiple_of(HUGE_PAGE)?.min(end);
            let part = Span::new(start, end.checked_sub(start)?)?;
            // What is empty all through is not collapsed; a look at one byte makes its page.
            for at in (start..end).step_by(1 << 21) {
                self.read(at, &mut [0]).ok()?;
            }
            mapping.collapse((start - first).try_into().ok()?, part.size.try_into().ok()?).ok()?;
            Some(part.size)
        };
        regions.filter_map(of_one).sum()
    }

    fn huge(&self) -> MutexGuard<'_, Vec<Span>> {
        self.all.huge.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads two bytes at `addr`, an even address, at once; what was written before them by who wrote them is there too.
    ///
    /// # Errors
    /// They are outside RAM.
    pub fn load_u16(&self, addr: u64) -> Result<u16> {
        if let Some(word) = self.one(addr, 2).and_then(|(mapping, at)| mapping.word(at)) {
            return Ok(u16::from_le(word.load(Ordering::Acquire)));
        }
        let load = self.all.ram.load(GuestAddress(addr), Ordering::Acquire);
        load.map(u16::from_le).with_context(|| format!("reading guest RAM at {addr:#x}"))
    }

    /// Writes two bytes at `addr`, an even address, at once; who sees them sees all that was written before.
    ///
    /// # Errors
    /// They are outside RAM.
    pub fn store_u16(&self, addr: u64, value: u16) -> Result<()> {
        if let Some(word) = self.one(addr, 2).and_then(|(mapping, at)| mapping.word(at)) {
            word.store(value.to_le(), Ordering::Release);
            return Ok(());
        }
        let store = self.all.ram.store(value.to_le(), GuestAddress(addr), Ordering::Release);
        store.with_context(|| format!("writing guest RAM at {addr:#x}"))
    }

    /// Describes what lies at each of `parts`, an address and a size, for the kernel to read from or write to while nobody
    /// waits. RAM stays mapped as long as that description lives.
    ///
    /// # Errors
    /// Any of it is outside RAM.
    #[allow(unsafe_code)]
    pub fn lend(&self, parts: impl IntoIterator<Item = (u64, usize)>, into: &mut Buffers) -> Result<()> {
        into.keep(self.all.clone());
        for (addr, size) in parts {
            if let Some(place) = self.one(addr, size).and_then(|(mapping, at)| mapping.bytes(at, size)) {
                // SAFETY: it lies within a mapping of RAM, which `keep` keeps, and to which no reference is ever made.
                unsafe { into.push(place, size) };
                continue;
            }
            for slice in GuestMemoryBackend::get_slices(&self.all.ram, GuestAddress(addr), size) {
                let slice = slice.with_context(|| format!("lending guest RAM at {addr:#x}"))?;
                // SAFETY: it lies within a mapping of RAM, which `keep` keeps, and to which no reference is ever made.
                unsafe { into.push(slice.ptr_guard_mut().as_ptr(), slice.len()) };
            }
        }
        Ok(())
    }

    /// The parts of `span`, one mapping of [`Memory::slots`], that may hold anything but zeroes, in ascending order. To read
    /// the others would make them.
    pub fn touched(&self, span: Span) -> Vec<Span> {
        self.settle();
        self.touched_in(span, None)
    }

    /// The same of the process that this `pagemap` is of, which has what this one had.
    pub fn touched_in(&self, span: Span, pagemap: Option<&File>) -> Vec<Span> {
        let mut both = self.all.ram.iter().zip(&self.all.mappings);
        let Some((region, mapping)) = both.find(|(region, _)| region.start_addr().0 == span.start) else {
            return vec![span];
        };
        let Some(backing) = region.file_offset() else { return vec![span] };
        let mut parts = pages::data(backing.file(), backing.start(), span.size);
        if self.all.private {
            match pages::own(pagemap, mapping.start().addr(), span.size) {
                Ok(own) => parts.extend(own),
                Err(_) => return vec![span],
            }
            parts.sort_unstable();
        }
        parts.into_iter().filter_map(|(at, size)| Span::new(span.start + at, size)).collect()
    }

    /// The parts of RAM that were touched since it was mapped from an image, or that the host has mapped with those; none
    /// where the host does not say.
    pub fn mapped(&self) -> Vec<Span> {
        let of_one = |Slot { span, host }: Slot| {
            let parts = pages::touched(host as usize, span.size).unwrap_or_default();
            parts.into_iter().filter_map(move |(at, size)| Span::new(span.start + at, size))
        };
        self.slots().into_iter().flat_map(of_one).collect()
    }

    /// Gives the host back what lies behind `span`, as far as it is whole pages of RAM; gives how many bytes that were.
    /// They read as zeroes, or as they were at the beginning, and take memory again once they are touched.
    pub fn give_back(&self, span: Span) -> u64 {
        use rustix::fs::{FallocateFlags, fallocate};
        let mut done = 0;
        if self.all.frozen.load(Ordering::SeqCst) {
            return done;
        }
        for (region, mapping) in self.all.ram.iter().zip(&self.all.mappings) {
            let (first, size) = (region.start_addr().0, region.len());
            let Some(backing) = region.file_offset() else { continue };
            let page = if self.all.hugepages && size.is_multiple_of(HUGE_PAGE) { HUGE_PAGE } else { page_size() };
            // Offsets in the mapping, and so in the file: inwards to whole pages.
            let start = span.start.saturating_sub(first).min(size).next_multiple_of(page);
            let end = (span.last().saturating_add(1).saturating_sub(first)).min(size) / page * page;
            if start >= end {
                continue;
            }
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // A host that cannot keeps it.
            let given = match self.all.private {
                true => mapping.revert(start as usize, (end - start) as usize),
                false => fallocate(backing.file(), flags, backing.start() + start, end - start).is_ok(),
            };
            if given {
                done += end - start;
            }
        }
        done
    }

    /// Copies `[offset, offset + span.size)` of a file into `span`.
    ///
    /// # Errors
    /// The span is not RAM, or the file cannot be read or ends before.
    pub fn fill_from(&self, span: Span, file: &File, offset: u64) -> Result<()> {
        let what = || format!("reading {} bytes at {offset:#x} of the file into {span}", span.size);
        // Straight into RAM: a kernel of 50 MB is copied once. The position is the file's own, so nobody shares it.
        let mut file = file.try_clone().with_context(what)?;
        file.seek(SeekFrom::Start(offset)).with_context(what)?;
        let mut done = 0;
        while done < span.size {
            let left = usize::try_from(span.size - done).with_context(what)?;
            let read = self.all.ram.read_volatile_from(GuestAddress(span.start + done), &mut file, left);
            match read.with_context(what)? {
                0 => bail!("{}: it ends after {done}", what()),
                some => done += some as u64,
            }
        }
        Ok(())
    }
}

/// Makes one sealed memory file and maps each span to its own part of it.
fn map_file(spans: &[&Span], huge: bool, parts: &mut Vec<Mapped>) -> Result<()> {
    let total = spans.iter().try_fold(0u64, |sum, s| sum.checked_add(s.size)).context("RAM size overflows")?;
    let fail = |what: &str, e: &dyn std::fmt::Display| {
        let (kind, hint) = match huge {
            true => (" in huge pages", "reserve some: sysctl vm.nr_hugepages=N (2 MiB each)"),
            false => ("", "try a smaller --memory"),
        };
        refuse(format!("cannot {what} {total} bytes of guest RAM{kind}: {e}")).hint(hint)
    };
    let offsets = offsets(spans).context("RAM size overflows")?;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let flags = if huge { flags | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB } else { flags };
    let file = rustix::fs::memfd_create("guest-ram", flags).context("cannot make a memory file for guest RAM")?;
    let file = Arc::new(File::from(file));
    let end = offsets.last().zip(spans.last()).map_or(0, |(offset, span)| offset + span.size);
    file.set_len(end).map_err(|e| fail("size the memory file for", &e))?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(|e| fail("seal the memory file for", &e))?;
    // Huge pages are reserved now: a guest that touches one that is not there would kill the process.
    let flags = libc::MAP_SHARED | if huge { 0 } else { libc::MAP_NORESERVE };
    let places: Vec<Part> = offsets.into_iter().zip(spans.iter().map(|span| **span)).collect();
    Ok(map_parts(&file, &places, flags, parts).map_err(|e| fail("map", &e))?)
}

/// Maps parts of a file.
fn map_parts(file: &Arc<File>, places: &[Part], flags: i32, parts: &mut Vec<Mapped>) -> std::io::Result<()> {
    use std::io::Error;
    let mut top = mapping::program();
    for (offset, span) in places {
        let size = usize::try_from(span.size).map_err(Error::other)?;
        let mapping = Mapping::new(file, *offset, size, (span.start, top), flags)?;
        top = top.min(mapping.start().addr());
        let backing = FileOffset::from_arc(file.clone(), *offset);
        // SAFETY: the two stay together until `All` drops the regions, then the mappings.
        #[allow(unsafe_code)]
        let region = unsafe { mapping.region(backing) }.map_err(Error::other)?;
        let region = GuestRegionMmap::new(region, GuestAddress(span.start));
        parts.push((region.ok_or_else(|| Error::other("RAM wraps around 2^64"))?, mapping));
    }
    Ok(())
}

/// Where each span lies in the file: as far from the start of a huge page as in the guest.
fn offsets(spans: &[&Span]) -> Option<Vec<u64>> {
    let mut end = 0u64;
    let place = |span: &&Span| {
        let odd = span.start % HUGE_PAGE;
        let at = match span.size < HUGE_PAGE || end % HUGE_PAGE == odd {
            true => end,
            false => end.checked_next_multiple_of(HUGE_PAGE)?.checked_add(odd)?,
        };
        end = at.checked_add(span.size)?;
        Some(at)
    };
    spans.iter().map(place).collect()
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
    use std::os::unix::fs::FileExt;

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
    fn what_is_lent_is_ram_and_stays_there() {
        let memory = two();
        let mut buffers = Buffers::default();
        memory.lend([(0x1ffe, 2), (0x10_0000, 3)], &mut buffers).unwrap();
        assert_eq!(buffers.copy_in(b"abcde"), 5);
        let mut back = [0; 3];
        memory.read(0x10_0000, &mut back).unwrap();
        assert_eq!(&back, b"cde");
        for (addr, size) in [(0x1fff, 2), (0x2000, 1), (u64::MAX, 1), (0, usize::MAX)] {
            assert!(memory.lend([(addr, size)], &mut Buffers::default()).is_err(), "{addr:#x}");
        }
        drop(memory);
        assert_eq!(buffers.copy_out(&mut back), 3);
        assert_eq!(&back, b"abc");
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
    fn what_was_touched_is_told_from_what_was_not() {
        let memory =
            Memory::new(&[Span { start: 0x10_0000, size: 0x10_0000 }, Span { start: 0x40_0000, size: 0x2000 }], false)
                .unwrap();
        memory.write(0x10_3000, &[1]).unwrap();
        memory.write(0x40_1000, &[1]).unwrap();
        let parts: Vec<_> = memory.slots().iter().flat_map(|slot| memory.touched(slot.span)).collect();
        assert!(parts.iter().any(|part| part.contains(&Span { start: 0x10_3000, size: 1 })), "{parts:?}");
        assert!(parts.iter().any(|part| part.contains(&Span { start: 0x40_1000, size: 1 })), "{parts:?}");
        assert!(parts.iter().map(|part| part.size).sum::<u64>() <= 0x2000, "{parts:?}");
    }

    #[test]
    fn an_image_is_ram_that_never_changes_it() {
        let (page, file) = (page_size(), Arc::new(tempfile::tempfile().unwrap()));
        let bytes: Vec<u8> = (0..40).flat_map(|number| vec![number; page as usize]).collect();
        file.write_all_at(&bytes[..bytes.len() / 2], 0).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        let parts = [(0, Span { start: 0, size: 4 * page }), (16 * page, Span { start: 1 << 32, size: 24 * page })];
        let (one, other) = (Memory::of_image(&file, &parts).unwrap(), Memory::of_image(&file, &parts).unwrap());
        let byte = |memory: &Memory, at| {
            let mut byte = [0];
            memory.read(at, &mut byte).unwrap();
            byte[0]
        };
        let (second, empty) = (1 << 32, (1 << 32) + 20 * page);
        // What is a hole in the file and was not looked at is not touched; on tmpfs a look at a hole fills it.
        let touched = |memory: &Memory| memory.touched(memory.slots()[1].span);
        let there =
            |memory: &Memory, at| touched(memory).iter().any(|part| part.contains(&Span { start: at, size: 1 }));
        assert!(there(&one, second) && !there(&one, empty));
        assert_eq!((byte(&one, 3 * page), byte(&one, second), byte(&one, empty)), (3, 16, 0));
        one.write(empty, &[7]).unwrap();
        one.write(second, &[7]).unwrap();
        assert!(there(&one, second) && there(&one, empty));
        assert!(touched(&one).iter().map(|part| part.size).sum::<u64>() <= 8 * page);
        assert_eq!((byte(&one, second), byte(&one, empty), byte(&other, second), byte(&other, empty)), (7, 7, 16, 0));
        // What is given back is as it was.
        assert_eq!(one.give_back(Span { start: second, size: page }), page);
        assert_eq!((byte(&one, second), byte(&one, empty)), (16, 7));
        let mut after = vec![0; bytes.len()];
        file.read_exact_at(&mut after, 0).unwrap();
        assert!(
            after[..bytes.len() / 2] == bytes[..bytes.len() / 2] && after[bytes.len() / 2..].iter().all(|b| *b == 0)
        );
    }

    #[test]
    fn what_is_given_back_is_whole_pages_of_ram() {
        let page = page_size();
        let spans = [Span { start: 0, size: 8 * page }, Span { start: 16 * page, size: 4 * page }];
        let memory = Memory::new(&spans, false).unwrap();
        let fill = |count: u64, at| memory.write(at, &vec![1; (count * page) as usize]).unwrap();
        let back = |start, size| memory.give_back(Span { start, size });
        let kept = |at: u64| {
            let mut byte = [0];
            memory.read(at, &mut byte).unwrap();
            byte == [1]
        };
        fill(8, 0);
        fill(4, 16 * page);
        assert_eq!(back(page + 1, 3 * page), 2 * page);
        assert!(kept(page + 1) && !kept(2 * page) && !kept(4 * page - 1) && kept(4 * page));
        assert_eq!((back(5 * page, page - 1), back(12 * page, page), back(u64::MAX - 5, 6)), (0, 0, 0));
        // Over the hole between two mappings and the end of the last.
        assert_eq!(back(7 * page, 100 * page), 5 * page);
        assert!(!kept(7 * page) && !kept(19 * page) && kept(6 * page));
        assert_eq!(back(0, u64::MAX), 12 * page);
    }

    #[test]
    fn the_slots_are_the_spans() {
        let slots = two().slots();
        let spans: Vec<_> = slots.iter().map(|s| (s.span.start, s.span.size)).collect();
        assert_eq!(spans, [(0, 0x2000), (0x10_0000, 0x1000)]);
        assert!(slots.iter().all(|s| s.host % page_size() == 0));
    }

    #[test]
    fn large_ram_lies_in_its_files_huge_pages_as_in_the_guests() {
        let spans = [(0x1000, 0x30_0000), (0x4000_0000, 0x3000), (0x5010_0000, 0x70_0000), (1 << 32, 0x40_0000)];
        let memory = Memory::new(&spans.map(|(start, size)| Span { start, size }), false).unwrap();
        // Where it is mapped is a wish, which another machine in the same process may stand in the way of.
        for (slot, region) in memory.slots().iter().zip(memory.all.ram.iter()) {
            let offset = region.file_offset().unwrap().start();
            assert!(slot.span.size < HUGE_PAGE || offset % HUGE_PAGE == slot.span.start % HUGE_PAGE, "{offset:#x}");
        }
    }

    #[test]
    fn huge_pages_change_no_byte_and_lie_in_ram_only() {
        let memory = Memory::new(&[Span { start: 0x1000, size: 0x60_0000 }], false).unwrap();
        let places = [0x1000, 0x1f_ffff, 0x20_0000, 0x3f_fff0, 0x40_0000, 0x60_0fff];
        places.iter().for_each(|at| memory.write(*at, &[0x5a]).unwrap());
        for (start, size, most) in [(0x2000, 1, 0), (0x20_0001, 0x20_0000, 2), (0, u64::MAX, 2), (1 << 40, 0x1000, 0)] {
            let huge = memory.prefer_huge(Span { start, size });
            assert!(huge == 0 || huge == most * HUGE_PAGE, "{start:#x}: {huge:#x}");
        }
        let mut back = [0; 2];
        for at in places {
            memory.read(at.min(0x60_0fff - 1), &mut back).unwrap();
            assert!(back.contains(&0x5a), "{at:#x}: {back:x?}");
        }
        memory.read(0x3f_fff1, &mut back).unwrap();
        assert_eq!(back, [0, 0]);
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
