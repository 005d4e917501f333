//! Who has which part of guest RAM while a guest is loaded.
//!
//! Invariant: what is taken lies in RAM and never overlaps. Each question costs the logarithm of what is taken, or for
//! a search the number, so that a file with 65,534 segments gains nothing.

use std::collections::BTreeMap;

use anyhow::Result;

use crate::error::{Refusal, refuse};
use crate::memory::Span;

/// One past the last address that a 32-bit guest reaches.
pub const REACH: u64 = 1 << 32;

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

    /// Takes the highest free place of `size` bytes, a multiple of `align`.
    pub fn highest(&mut self, size: u64, align: u64) -> Option<Span> {
        let span = self.usable.iter().rev().find_map(|usable| {
            let mut last = usable.last();
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
        refuse(format!("{what}, {size} bytes, does not fit in RAM below 4 GiB, {}{taken}", list(&self.usable)))
            .hint("give the machine more --memory")
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
        assert_eq!(places.highest(0x81, 16), Some(span(REACH + 0xff60, 0x81)));
        assert_eq!(places.highest(0x8, 16), Some(span(REACH + 0xff50, 0x8)));
        assert_eq!(places.highest(0xff51, 16), None);
        assert_eq!(places.highest(0xff50, 1), Some(span(REACH, 0xff50)));
        assert_eq!(places.highest(0x6000, 1), Some(span(0xa000, 0x6000)));
        assert_eq!((places.highest(0, 16), places.highest(u64::MAX, 16)), (None, None));
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
