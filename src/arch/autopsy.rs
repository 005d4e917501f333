//! What a report asks of an architecture, in the words of none.
//!
//! Invariant: nothing here trusts an address: each is translated page by page by the guest's own tables, and what is not
//! RAM ends the reading.

use super::CpuState;
use crate::memory::Memory;

/// What a page may be used for, and where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    /// The guest-physical address.
    pub physical: u64,
    /// It may be written.
    pub write: bool,
    /// Programs may use it, not only the kernel.
    pub user: bool,
    /// Its bytes may be executed.
    pub execute: bool,
}

/// How an address is translated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Walk {
    /// One line for each entry that was read, the last the one that fails if any does.
    pub steps: Vec<String>,
    /// Where it led, or why it did not.
    pub end: Result<Page, String>,
}

/// What happened, in words.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Story {
    /// One thing after the other.
    pub lines: Vec<String>,
    /// What to look at.
    pub hints: Vec<String>,
}

impl Story {
    /// Adds a hint that is not there yet.
    pub fn hint(&mut self, text: impl Into<String>) {
        let text = text.into();
        if !self.hints.contains(&text) {
            self.hints.push(text);
        }
    }
}

/// Where a stack is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stack {
    /// The address of its last word.
    pub top: u64,
    /// The frame pointer.
    pub frame: u64,
    /// Bytes in a word.
    pub word: usize,
}

/// One instruction as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Its address.
    pub at: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// What it says.
    pub text: String,
}

/// The smallest page that any table describes.
const PAGE: u64 = 4096;

/// Up to `count` bytes at an address, as far as they are mapped RAM.
pub fn bytes(state: &CpuState, memory: &Memory, at: u64, count: usize) -> Vec<u8> {
    let mut all = Vec::with_capacity(count);
    while all.len() < count {
        let Some(here) = at.checked_add(all.len() as u64) else { break };
        let in_page = usize::try_from(PAGE - here % PAGE).unwrap_or(1);
        let mut part = vec![0; in_page.min(count - all.len())];
        let Ok(page) = state.walk(memory, here).end else { break };
        if memory.read(page.physical, &mut part).is_err() {
            break;
        }
        all.append(&mut part);
    }
    all
}

/// A little-endian word of 1 to 8 bytes at an address.
pub fn word(state: &CpuState, memory: &Memory, at: u64, size: usize) -> Option<u64> {
    let all = bytes(state, memory, at, size);
    (all.len() == size).then(|| all.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}
