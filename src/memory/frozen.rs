//! RAM as it was at a moment, while a guest goes on that writes to it: who writes waits until what was there is kept.
//!
//! Invariant: a part that was frozen holds what it held then until it is let go, or all is.

use std::io;
use std::sync::atomic::Ordering;

use super::{Memory, Span};
use crate::host::sys::userfault::Guarded;

/// Such RAM. All is let go when it is dropped.
pub struct Frozen {
    memory: Memory,
    guarded: Guarded,
}

impl Memory {
    /// Freezes these parts, whole pages; nobody writes at this moment.
    ///
    /// # Errors
    /// The host cannot: see [`Guarded::new`]; or RAM is not in a memory file alone.
    pub fn freeze(&self, parts: impl Iterator<Item = Span>) -> io::Result<Frozen> {
        if self.all.private || self.all.hugepages {
            return Err(io::Error::other("its RAM is mapped from a snapshot, or made of huge pages"));
        }
        let guarded = Guarded::new()?;
        for (span, mapping) in self.all.spans.iter().zip(&self.all.mappings) {
            guarded.register(mapping.start().addr(), span.size as usize)?;
        }
        // Together what lies together: a call takes as long as hundreds of pages.
        let mut run: Option<(usize, usize)> = None;
        for part in parts {
            let (start, size) = self.place(part).ok_or(io::ErrorKind::InvalidInput)?;
            run = match run {
                Some((first, so_far)) if first + so_far == start => Some((first, so_far + size)),
                Some((first, so_far)) => {
                    guarded.guard(first, so_far)?;
                    Some((start, size))
                }
                None => Some((start, size)),
            };
        }
        run.map_or(Ok(()), |(first, size)| guarded.guard(first, size))?;
        // What is given back to the host would be gone before it is kept.
        self.all.frozen.store(true, Ordering::SeqCst);
        Ok(Frozen { memory: self.clone(), guarded })
    }

    /// Where a part of one mapping is in this process.
    fn place(&self, part: Span) -> Option<(usize, usize)> {
        let size = usize::try_from(part.size).ok()?;
        let (mapping, at) = self.one(part.start, size)?;
        Some((mapping.bytes(at, size)?.addr(), size))
    }
}

impl Frozen {
    /// The address in RAM that somebody waits to write to, if anybody does who was not told of yet.
    pub fn waiting(&self) -> Option<u64> {
        let at = self.guarded.waiting()?;
        let all = &self.memory.all;
        all.spans.iter().zip(&all.mappings).find_map(|(span, mapping)| {
            let offset = (at as u64).checked_sub(mapping.start().addr() as u64)?;
            (offset < span.size).then_some(span.start + offset)
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
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.memory.all.frozen.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::page_size;

    #[test]
    fn who_writes_to_what_is_frozen_waits_until_it_is_let_go() {
        let page = page_size();
        let memory = Memory::new(&[Span { start: 0, size: 64 * page }], false).unwrap();
        memory.write(0, &[1]).unwrap();
        memory.write(8 * page, &[1]).unwrap();
        let parts = [Span { start: 0, size: 4 * page }, Span { start: 8 * page, size: 4 * page }];
        let frozen = match memory.freeze(parts.into_iter()) {
            Ok(frozen) => frozen,
            Err(e) => return crate::host::skipped(&format!("no userfaultfd here: {e}")),
        };
        assert_eq!((frozen.waiting(), memory.give_back(parts[0])), (None, 0));
        memory.write(5 * page, &[3]).unwrap();
        let (writer, done) = (memory.clone(), std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false)));
        let flag = done.clone();
        let thread = std::thread::spawn(move || {
            // A page that was never there, too.
            writer.write(9 * page, &[2]).unwrap();
            flag.store(true, Ordering::SeqCst);
            writer.write(0, &[2]).unwrap();
        });
        let wait = || loop {
            match frozen.waiting() {
                Some(at) => break at,
                None => std::thread::yield_now(),
            }
        };
        assert_eq!(wait(), 9 * page);
        let mut bytes = [9];
        memory.read(9 * page, &mut bytes).unwrap();
        assert!(bytes == [0] && !done.load(Ordering::SeqCst));
        frozen.let_go(parts[1]).unwrap();
        assert_eq!(wait(), 0);
        memory.read(0, &mut bytes).unwrap();
        assert!(bytes == [1] && done.load(Ordering::SeqCst));
        drop(frozen);
        thread.join().unwrap();
        memory.read(0, &mut bytes).unwrap();
        assert_eq!((bytes, memory.give_back(parts[0])), ([2], 4 * page));
    }
}
