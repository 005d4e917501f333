//! A guest as segments at physical addresses and an entry: what an ELF or a multiboot kernel comes down to.
//!
//! Invariant: a `Program`'s segments lie in its file, are not empty, do not wrap and do not overlap, so that what is
//! left to check when it is loaded is RAM.

use anyhow::Result;

use super::image::Image;
use super::place::{Places, prepare};
use super::symbols::SectionTable;
use crate::error::{Refusal, refuse};
use crate::memory::{Memory, Span};

/// One range of memory and what it holds at first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// What the file calls it: its index in the program header table.
    pub number: usize,
    /// Where its bytes are in the file.
    pub offset: u64,
    /// How many there are; the rest of `span` is zero.
    pub filled: u64,
    /// Physical addresses.
    pub span: Span,
    /// Bit 0: executed, 1: written, 2: read (System V ABI, p_flags).
    pub flags: u32,
}

/// A loadable program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// What to load, in the order of the file.
    pub segments: Vec<Segment>,
    /// Physical address of the first instruction.
    pub entry: u64,
    /// The ELF section headers, where the file has them.
    pub sections: Option<SectionTable>,
}

impl Program {
    /// Checks what can be checked without knowing RAM.
    pub fn new(image: &Image, segments: Vec<Segment>, entry: u64) -> Result<Self, Refusal> {
        if segments.is_empty() {
            return Err(refuse("there is nothing to load in it"));
        }
        for Segment { number, offset, filled, span, .. } in &segments {
            if *filled > span.size {
                let what = format!("segment {number} has {filled:#x} bytes in the file, {:#x} in memory", span.size);
                return Err(refuse(what));
            }
            if *filled > 0 {
                image.check(&format!("segment {number}"), *offset, *filled)?;
            }
        }
        let mut sorted: Vec<_> = segments.iter().collect();
        sorted.sort_by_key(|s| s.span);
        for pair in sorted.windows(2) {
            if let [a, b] = pair
                && a.span.overlaps(&b.span)
            {
                let (x, y) = (a.number.min(b.number), a.number.max(b.number));
                return Err(refuse(format!("segments {x} and {y} overlap: {} and {}", a.span, b.span)));
            }
        }
        Ok(Self { segments, entry, sections: None })
    }

    /// The entry lies in the part of a segment that the file fills.
    pub fn check_entry(&self) -> Result<(), Refusal> {
        let entry = Span { start: self.entry, size: 1 };
        match self.segments.iter().find(|s| s.span.contains(&entry)) {
            Some(segment) if self.entry - segment.span.start < segment.filled => Ok(()),
            Some(_) => {
                Err(refuse(format!("its entry, {:#x}, lies beyond the end of what the file holds for it", self.entry)))
            }
            None => Err(refuse(format!("its entry, {:#x}, lies in none of its segments", self.entry))),
        }
    }

    /// All of it lies below `limit`.
    pub fn check_below(&self, limit: u64, why: &str) -> Result<(), Refusal> {
        match self.segments.iter().find(|s| s.span.last() >= limit) {
            Some(Segment { number, span, .. }) => {
                Err(refuse(format!("segment {number} at {span} lies beyond {:#x}, {why}", limit - 1)))
            }
            None => Ok(()),
        }
    }

    /// The lowest address that is loaded.
    pub fn base(&self) -> u64 {
        self.segments.iter().map(|s| s.span.start).min().unwrap_or(0)
    }

    /// The highest address that is loaded.
    pub fn last(&self) -> u64 {
        self.segments.iter().map(|s| s.span.last()).max().unwrap_or(0)
    }

    /// Copies the segments to their places.
    ///
    /// What a segment has beyond its bytes in the file (bss) must read as zero, and does without a write: `memory` is
    /// fresh, a memfd reads as zeros, and segments do not overlap. Writing the zeros would only make the host
    /// give real pages for them.
    pub fn load(&self, image: &Image, memory: &Memory, places: &mut Places) -> Result<()> {
        for segment in &self.segments {
            places.claim(segment.span, &format!("segment {}", segment.number))?;
        }
        for Segment { number, offset, filled, span, .. } in &self.segments {
            if let Some(bytes) = Span::new(span.start, *filled) {
                prepare(memory, bytes, &format!("segment {number}"));
                image.copy_to(memory, bytes, *offset)?;
            }
        }
        Ok(())
    }
}
