//! Who has which part of guest RAM while a guest is loaded.
//!
//! Invariant: what is taken lies in RAM and never overlaps. Each question costs the logarithm of what is taken, or for
//! a search the number, so that a file with 65,534 segments gains nothing.

use std::collections::BTreeMap;

use anyhow::Result;

use crate::error::{Refusal, refuse};
use crate::explain::tell;
use crate::memory::{Memory, Span};

/// One past the last address that a 32-bit guest reaches.
pub const REACH: u64 = 1 << 32;

/// The least that huge pages are worth their calls for: more than any guest that is not an operating system.
const LARGE: u64 = 4 << 20;
/// The most that is made of huge pages at once, whatever a file says that it needs.
const MOST: u64 = 256 << 20;

/// Has RAM made of huge pages where something large comes to lie, before it is loaded.
pub fn prepare(memory: &Memory, span: Span, what: &str) {
    if span.size < LARGE {
        return;
    }
    let huge = memory.prefer_huge(Span { size: span.size.min(MOST), ..span });
    let why = "Huge pages under it, if the host has some: a fault for 2 MiB, where there would be 512.";
    tell("madvise", || format!("{what} at {span}, MADV_COLLAPSE: {huge} bytes of huge pages"), why);
}

/// What Linux takes from the end of RAM before it has an allocator: a description of each page, of a 64th of the page's
/// size, and hash tables, page tables and what each CPU has of its own.
const DESCRIBED: u64 = 64;
const TABLES: u64 = 4 << 20;
/// What it has allocated from the first free RAM behind the kernel when its init starts, at least.
const ALLOCATED: u64 = 12 << 20;
/// In less RAM than this nothing is sure.
const ROOMY: u64 = 96 << 20;

/// Has RAM made of huge pages where every Linux fills it in its first second, beside what is loaded: at the end, where an
/// initial RAM disk of `initrd` bytes may lie too, and behind `kernel`, its last byte.
pub fn prepare_linux(memory: &Memory, ram: &[Span], kernel: u64, initrd: u64) {
    let total = ram.iter().fold(0u64, |sum, span| sum.saturating_add(span.size));
    let (Some(top), true) = (ram.last(), total >= ROOMY) else { return };
    let size = (total / DESCRIBED + TABLES).saturating_add(initrd).min(top.size);
    prepare(memory, Span { start: top.last() - (size - 1), size }, "the end of RAM");
    // With RAM in two spans, it is in the upper one that Linux allocates.
    if let ([_], Some(span)) = (ram, Span::new(kernel.saturating_add(1), ALLOCATED)) {
        prepare(memory, span, "what follows the kernel");
    }
}

/// The places of one machine's RAM.
#[derive(Debug)]
pub struct Places {
    ram: Vec<Span>,
    usable: Vec<Span>,
    taken: BTreeMap<u64, (Span, String)>,
}

/// Spans as a person reads them.
pub fn list(spans: &[Span]) -> String {
    spans.iter().map(Span::to_string).collect::<Vec<_>>().join(" and ")
}

impl Places {
    /// All of `ram` is free; [`Places::find`] keeps to `usable`, in ascending order.
    pub fn new(ram: &[Span], usable: Vec<Span>) -> Self {
        Self { ram: ram.to_vec(), usable, taken: BTreeMap::new() }
    }

    /// The highest taken place that has a byte in common with `span`.
    fn conflict(&self, span: &Span) -> Option<&(Span, String)> {
        // Taken places are disjoint: where the last that starts in or before the span ends before it, so do all others.
        self.taken.range(..=span.last()).next_back().map(|(_, taken)| taken).filter(|(taken, _)| taken.overlaps(span))
    }

    /// Takes a place that the guest names.
    ///
    /// # Errors
    /// It is not in RAM, or taken; both ranges are named.
    pub fn claim(&mut self, span: Span, what: &str) -> Result<(), Refusal> {
        if !self.ram.iter().any(|ram| ram.contains(&span)) {
            return Err(refuse(format!("{what} at {span} lies outside RAM, {}", list(&self.ram)))
                .hint("give the machine more --memory, or RAM in another place"));
        }
        if let Some((other, owner)) = self.conflict(&span) {
            return Err(refuse(format!("{what} at {span} overlaps {owner} at {other}")));
        }
        self.taken.insert(span.start, (span, what.to_owned()));
        Ok(())
    }

    /// Takes the lowest free place of `size` bytes at or after `from`, a multiple of `align`, below 4 GiB.
    pub fn find(&mut self, size: u64, align: u64, from: u64, what: &str) -> Option<Span> {
        let span = self.usable.iter().find_map(|usable| {
            let mut at = usable.start.max(from).checked_next_multiple_of(align)?;
            loop {
                let span = Span::new(at, size).filter(|s| usable.contains(s) && s.last() < REACH)?;
                match self.conflict(&span) {
                    None => return Some(span),
                    // Always further up, so that this ends.
                    Some((other, _)) => at = other.last().checked_add(1)?.checked_next_multiple_of(align)?,
                }
            }
        })?;
        self.taken.insert(span.start, (span, what.to_owned()));
        Some(span)
    }

    /// The same, for what cannot do without.
    ///
    /// # Errors
    /// There is none.
    pub fn need(&mut self, size: u64, align: u64, from: u64, what: &str) -> Result<Span, Refusal> {
        self.find(size, align, from, what).ok_or_else(|| self.no_room(what, size))
    }

    /// Takes the highest free place of `size` bytes up to the address `last`, a multiple of `align`.
    pub fn highest(&mut self, size: u64, align: u64, last: u64) -> Option<Span> {
        let span = self.usable.iter().rev().find_map(|usable| {
            let mut last = usable.last().min(last);
            loop {
                let start = last.checked_sub(size.checked_sub(1)?)?;
                let span = Span::new(start - start % align, size).filter(|s| usable.contains(s))?;
                match self.conflict(&span) {
                    None => return Some(span),
                    // Always further down, so that this ends.
                    Some((other, _)) => last = other.start.checked_sub(1)?,
                }
            }
        })?;
        self.taken.insert(span.start, (span, "a place at the end".to_owned()));
        Some(span)
    }

    /// One past the last byte that is taken below 4 GiB; 0 where nothing is.
    pub fn top(&self) -> u64 {
        self.taken.range(..REACH).next_back().map_or(0, |(_, (span, _))| span.last().saturating_add(1))
    }

    /// That there is no place for something, and what is in its way.
    pub fn no_room(&self, what: &str, size: u64) -> Refusal {
        let largest = self.taken.values().max_by_key(|(span, _)| span.size);
        let taken = largest.map_or(String::new(), |(span, owner)| format!("; {owner} is at {span}"));
        refuse(format!("{what}, {size} bytes, does not fit in RAM where it must lie, {}{taken}", list(&self.usable)))
            .hint("give the machine more --memory, if it is less than 4 GiB")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, size: u64) -> Span {
        Span { start, size }
    }

    fn places() -> Places {
        let ram = [span(0, 0x10000), span(REACH, 0x10000)];
        Places::new(&ram, vec![span(0, 0x8000), span(0xa000, 0x6000), span(REACH, 0x10000)])
    }

    #[test]
    fn a_claim_outside_ram_or_on_another_is_refused_with_both_ranges() {
        let mut places = places();
        places.claim(span(0x1000, 0x1000), "segment 0").unwrap();
        places.claim(span(0x9000, 1), "segment 1").unwrap();
        for bad in [span(0x1000, 1), span(0x1fff, 1), span(0, 0x1001), span(0, 0x10000), span(0x8fff, 2)] {
            let text = places.claim(bad, "it").unwrap_err().to_string();
            assert!(text.contains(&bad.to_string()) && text.contains("overlaps segment"), "{text}");
        }
        for bad in [span(0xffff, 2), span(0x10000, 1), span(REACH - 1, 2), span(u64::MAX, 1)] {
            let text = places.claim(bad, "it").unwrap_err().to_string();
            assert!(text.contains(&bad.to_string()) && text.contains("0x0..=0xffff"), "{text}");
        }
        places.claim(span(0x2000, 1), "after").unwrap();
        places.claim(span(REACH, 1), "high").unwrap();
        assert_eq!(places.top(), 0x9001);
    }

    #[test]
    fn a_search_from_the_end_takes_the_highest_free_place() {
        let mut places = places();
        places.claim(span(REACH + 0xfff0, 0x10), "the end").unwrap();
        assert_eq!(places.highest(0x81, 16, u64::MAX), Some(span(REACH + 0xff60, 0x81)));
        assert_eq!(places.highest(0x8, 16, u64::MAX), Some(span(REACH + 0xff50, 0x8)));
        assert_eq!(places.highest(0xff51, 16, u64::MAX), None);
        assert_eq!(places.highest(0xff50, 1, u64::MAX), Some(span(REACH, 0xff50)));
        assert_eq!(places.highest(0x6000, 1, u64::MAX), Some(span(0xa000, 0x6000)));
        assert_eq!(places.highest(0x10, 16, 0x7025), Some(span(0x7010, 0x10)));
        assert_eq!((places.highest(0, 16, u64::MAX), places.highest(u64::MAX, 16, u64::MAX)), (None, None));
    }

    #[test]
    fn a_search_takes_the_lowest_free_place() {
        let mut places = places();
        places.claim(span(0x1000, 0x1801), "kernel").unwrap();
        assert_eq!(places.find(0x800, 0x1000, 0x1000, "a"), Some(span(0x3000, 0x800)));
        assert_eq!(places.find(0x800, 16, 0x1000, "b"), Some(span(0x3800, 0x800)));
        assert_eq!(places.find(0x6000, 0x1000, 0, "c"), Some(span(0xa000, 0x6000)));
        assert_eq!(places.find(0x6000, 0x1000, 0, "d"), None);
        assert_eq!(places.find(0, 16, 0, "nothing"), None);
        assert_eq!(places.find(u64::MAX, 16, 0, "all"), None);
        assert!(places.no_room("d", 0x6000).to_string().contains("0x0..=0x7fff"));
    }
}
