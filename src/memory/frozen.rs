//! RAM as it is at a moment, while a guest goes on that writes to it: who writes waits until what was there is kept.
//!
//! Invariant: a part that is guarded holds what it held until it is let go, or all is; and whoever touches a part for the
//! first time is told of. A thread that answers must not touch RAM but by [`Memory::peek`], or it would wait for itself.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Memory, Slot, Span, page_size};
use crate::host::sys::userfault::{Fault, Guarded};

/// Such RAM. All is let go when it is dropped.
pub struct Frozen {
    memory: Memory,
    slots: Vec<Slot>,
    guarded: Guarded,
    // Dropped after what guards it.
    _thaw: Thaw,
}

/// What is done once nothing is guarded any more.
struct Thaw(Memory);

impl Drop for Thaw {
    fn drop(&mut self) {
        self.0.all.frozen.store(false, Ordering::SeqCst);
        // To guard a page of a huge page has made many of it.
        let huge = std::mem::take(&mut *self.0.huge());
        for span in huge {
            self.0.prefer_huge(span);
        }
    }
}

/// Somebody waits, at an address of the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// To write to what is guarded.
    ToWrite(u64),
    /// To touch what nobody ever did.
    ToBegin(u64),
}

impl Memory {
    /// Has whoever touches a part of RAM for the first time wait, and guards nothing yet.
    ///
    /// # Errors
    /// The host cannot: see [`Guarded::new`]; or RAM is not in a memory file alone.
    pub fn freeze(&self) -> io::Result<Frozen> {
        if self.all.private || self.all.hugepages {
            return Err(io::Error::other("its RAM is made of huge pages"));
        }
        self.settle();
        let guarded = Guarded::new()?;
        // What is given back to the host would be gone before it is kept.
        self.all.frozen.store(true, Ordering::SeqCst);
        let frozen = Frozen { memory: self.clone(), slots: self.slots(), guarded, _thaw: Thaw(self.clone()) };
        for slot in &frozen.slots {
            frozen.guarded.register(slot.host as usize, slot.span.size as usize)?;
        }
        Ok(frozen)
    }

    /// Reads what is in RAM's file; what was never touched reads as zeroes and stays untouched.
    ///
    /// # Errors
    /// It is not all RAM.
    pub fn peek(&self, addr: u64, into: &mut [u8]) -> io::Result<()> {
        let span = Span::new(addr, into.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
        let mut all = self.all.ram.iter().zip(&self.all.spans);
        let region = all.find(|(_, whole)| whole.contains(&span)).map(|(region, _)| region);
        let backing = region.and_then(|region| region.file_offset()).ok_or(io::ErrorKind::InvalidInput)?;
        let first = region.map_or(0, |region| region.start_addr().0);
        backing.file().read_exact_at(into, backing.start() + (addr - first))
    }

    /// Where a part of one mapping is in this process.
    pub fn place(&self, part: Span) -> Option<(usize, usize)> {
        let size = usize::try_from(part.size).ok()?;
        let (mapping, at) = self.one(part.start, size)?;
        Some((mapping.bytes(at, size)?.addr(), size))
    }
}

impl Frozen {
    /// Guards these parts, whole pages, in ascending order, from now on.
    ///
    /// # Errors
    /// They are none.
    pub fn guard(&self, parts: impl Iterator<Item = Span>) -> io::Result<()> {
        // Together what lies together: a call takes as long as hundreds of pages.
        let mut run: Option<(usize, usize)> = None;
        for part in parts {
            let (start, size) = self.memory.place(part).ok_or(io::ErrorKind::InvalidInput)?;
            run = match run {
                Some((first, so_far)) if first + so_far == start => Some((first, so_far + size)),
                Some((first, so_far)) => {
                    self.guarded.guard(first, so_far)?;
                    Some((start, size))
                }
                None => Some((start, size)),
            };
        }
        run.map_or(Ok(()), |(first, size)| self.guarded.guard(first, size))
    }

    /// Who waits, if anybody does who was not told of yet.
    pub fn waiting(&self) -> Option<Waiting> {
        let fault = self.guarded.waiting()?;
        let (Fault::Write(at) | Fault::First(at)) = fault;
        let address = self.slots.iter().find_map(|slot| slot.address(at))?;
        Some(match fault {
            Fault::Write(_) => Waiting::ToWrite(address),
            Fault::First(_) => Waiting::ToBegin(address),
        })
    }

    /// Lets a part go that is kept now, or that nobody needs.
    ///
    /// # Errors
    /// It is none.
    pub fn let_go(&self, part: Span) -> io::Result<()> {
        let (start, size) = self.memory.place(part).ok_or(io::ErrorKind::InvalidInput)?;
        self.guarded.allow(start, size)
    }

    /// The page at `addr` begins, as zeroes; it is not guarded, whatever was said of it.
    ///
    /// # Errors
    /// It is none.
    pub fn begin(&self, addr: u64) -> io::Result<()> {
        let page = Span { start: addr - addr % page_size(), size: page_size() };
        let (start, size) = self.memory.place(page).ok_or(io::ErrorKind::InvalidInput)?;
        self.guarded.begin(start, size)
    }
}

impl AsFd for Frozen {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.guarded.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn huge_pages_are_huge_again_afterwards() {
        let whole = Span { start: 0, size: 16 << 20 };
        let memory = Memory::new(&[whole], false).unwrap();
        let at = format!("{:x}-", memory.slots()[0].host);
        // KiB that the host's page tables map by huge pages.
        let mapped = || {
            let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let mapping = maps.split_once(&at).map_or("", |(_, rest)| rest);
            let line = mapping.lines().find(|line| line.starts_with("ShmemPmdMapped:")).unwrap_or_default();
            line.split_whitespace().nth(1).map_or(0, |count| count.parse::<u64>().unwrap())
        };
        if memory.prefer_huge(whole) == 0 || mapped() == 0 {
            return crate::host::skipped("this host makes no huge pages here");
        }
        let before = mapped();
        match memory.freeze() {
            Ok(frozen) => frozen.guard([Span { size: 8 << 20, ..whole }].into_iter()).unwrap(),
            Err(e) => return crate::host::skipped(&format!("no userfaultfd here: {e}")),
        }
        assert_eq!(mapped(), before);
    }

    #[test]
    fn who_writes_to_what_is_frozen_waits_until_it_is_let_go() {
        let page = page_size();
        let memory = Memory::new(&[Span { start: 0, size: 64 * page }], false).unwrap();
        memory.write(0, &[1]).unwrap();
        memory.write(8 * page, &[1]).unwrap();
        memory.write(5 * page, &[1]).unwrap();
        let parts = [Span { start: 0, size: 4 * page }, Span { start: 8 * page, size: 4 * page }];
        let frozen = match memory.freeze() {
            Ok(frozen) => frozen,
            Err(e) => return crate::host::skipped(&format!("no userfaultfd here: {e}")),
        };
        frozen.guard(parts.into_iter()).unwrap();
        assert_eq!((frozen.waiting(), memory.give_back(parts[0])), (None, 0));
        memory.write(5 * page, &[3]).unwrap();
        let (writer, done) = (memory.clone(), Arc::new(AtomicBool::new(false)));
        let flag = done.clone();
        let thread = std::thread::spawn(move || {
            writer.write(8 * page, &[2]).unwrap();
            // Pages that were never there, one of them guarded.
            writer.write(9 * page, &[2]).unwrap();
            writer.write(20 * page, &[2]).unwrap();
            flag.store(true, Ordering::SeqCst);
            writer.write(0, &[2]).unwrap();
        });
        let wait = || loop {
            match frozen.waiting() {
                Some(waiting) => break waiting,
                None => std::thread::yield_now(),
            }
        };
        let byte = |at| {
            let mut byte = [9];
            memory.peek(at, &mut byte).unwrap();
            byte[0]
        };
        assert_eq!(wait(), Waiting::ToWrite(8 * page));
        assert_eq!((byte(8 * page), byte(9 * page), byte(30 * page)), (1, 0, 0));
        frozen.let_go(Span { start: 8 * page, size: page }).unwrap();
        for at in [9 * page, 20 * page] {
            assert_eq!(wait(), Waiting::ToBegin(at));
            frozen.begin(at).unwrap();
        }
        assert_eq!(wait(), Waiting::ToWrite(0));
        assert!((byte(0), byte(20 * page)) == (1, 2) && done.load(Ordering::SeqCst));
        drop(frozen);
        thread.join().unwrap();
        assert_eq!((byte(0), memory.give_back(parts[0])), (2, 4 * page));
        assert!(memory.peek(63 * page, &mut [0; 2]).is_ok() && memory.peek(64 * page - 1, &mut [0; 2]).is_err());
    }
}
