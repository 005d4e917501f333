//! A split virtqueue, seen from the device (VIRTIO 1.3 §2.7): chains of buffers come out, used ones go back.
//!
//! Everything in it is the guest's, and may change while it is looked at: each value is read once, checked, and then
//! used. What the driver must never do breaks the queue, which then gives no chain any more until the device is reset
//! (the transport says DEVICE_NEEDS_RESET). Invariant: all parts of a [`Chain`] lie in RAM; in one call of the device at
//! most as many chains come out as the queue is long.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::host::sys::disk::Buffers;
use crate::irq::IrqLine;
use crate::memory::{Memory, Span};

/// The largest queue (§2.7: at most 32,768; nobody has that many).
pub const MAX_SIZE: u16 = 1024;
/// The longest chain that is followed: with indirect tables it may be longer than the queue.
const MAX_PARTS: usize = 1024;

/// Descriptor flags (§2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// VIRTQ_AVAIL_F_NO_INTERRUPT, VIRTQ_USED_F_NO_NOTIFY.
const SILENCE: u16 = 1;

/// A queue as the driver has set it up, and how far the device has come in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ring {
    /// Descriptors; a power of two.
    pub size: u16,
    /// The driver has enabled it.
    pub ready: bool,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring, the driver's area.
    pub available: u64,
    /// Address of the used ring, the device's area.
    pub used: u64,
    /// The next entry of the available ring to look at.
    pub next_available: u16,
    /// The next entry of the used ring to write.
    pub next_used: u16,
}

impl Ring {
    /// All three areas are where they may be (§2.7: aligned to 16, 2 and 4 bytes), in RAM.
    pub fn is_valid(&self, memory: &Memory) -> bool {
        let size = u64::from(self.size);
        let area = |at: u64, align: u64, length: u64| {
            at.is_multiple_of(align) && Span::new(at, length).is_some_and(|span| memory.contains(span))
        };
        self.size.is_power_of_two()
            && self.size <= MAX_SIZE
            && area(self.descriptors, 16, 16 * size)
            && area(self.available, 2, 6 + 2 * size)
            && area(self.used, 4, 6 + 8 * size)
    }
}

/// One buffer of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub size: u32,
}

/// A chain of buffers that the driver lends the device: some to read, then some to write.
pub struct Chain {
    memory: Memory,
    head: u16,
    parts: Vec<Part>,
    /// How many of the parts are for the device to read.
    readable: usize,
    reading: Cursor,
    writing: Cursor,
}

#[derive(Debug, Default, Clone, Copy)]
struct Cursor {
    part: usize,
    offset: u32,
    /// Bytes passed in all.
    done: u32,
}

impl Chain {
    /// What the device may read, as parts.
    pub fn readable(&self) -> &[Part] {
        self.parts.get(..self.readable).unwrap_or_default()
    }

    /// What the device may write, as parts.
    pub fn writable(&self) -> &[Part] {
        self.parts.get(self.readable..).unwrap_or_default()
    }

    /// Bytes that the device has not read yet.
    pub fn left_to_read(&self) -> u32 {
        total(self.readable()) - self.reading.done
    }

    /// Bytes that the device has not written yet.
    pub fn left_to_write(&self) -> u32 {
        total(self.writable()) - self.writing.done
    }

    /// Bytes that the device has written: what the used ring says.
    pub fn written(&self) -> u32 {
        self.writing.done
    }

    /// Reads on; gives how many bytes there were, fewer than asked for at the end only.
    pub fn read(&mut self, into: &mut [u8]) -> usize {
        let mut cursor = self.reading;
        let memory = &self.memory;
        let parts = self.parts.get(..self.readable).unwrap_or_default();
        let done = cursor.walk(parts, into.len(), |addr, at, size| {
            into.get_mut(at..at + size).is_some_and(|into| memory.read(addr, into).is_ok())
        });
        self.reading = cursor;
        done
    }

    /// Writes on; gives how many bytes had room, fewer than there are at the end only.
    pub fn write(&mut self, from: &[u8]) -> usize {
        let mut cursor = self.writing;
        let memory = &self.memory;
        let parts = self.parts.get(self.readable..).unwrap_or_default();
        let done = cursor.walk(parts, from.len(), |addr, at, size| {
            from.get(at..at + size).is_some_and(|from| memory.write(addr, from).is_ok())
        });
        self.writing = cursor;
        done
    }

    /// Passes over bytes to read, for a device that takes them by their parts; gives how many there were.
    pub fn skip_read(&mut self, size: usize) -> usize {
        let parts = self.parts.get(..self.readable).unwrap_or_default();
        self.reading.walk(parts, size, |_, _, _| true)
    }

    /// Passes over bytes that were written by their parts; gives how many had room.
    pub fn skip_write(&mut self, size: usize) -> usize {
        let parts = self.parts.get(self.readable..).unwrap_or_default();
        self.writing.walk(parts, size, |_, _, _| true)
    }

    /// The next `size` bytes to read, as parts, appended to `into`; they are passed over.
    pub fn take_read(&mut self, size: usize, into: &mut Vec<Part>) -> usize {
        let parts = self.parts.get(..self.readable).unwrap_or_default();
        self.reading.walk(parts, size, collect(into))
    }

    /// The next `size` bytes to write, as parts, appended to `into`; they are passed over, as if written.
    pub fn take_write(&mut self, size: usize, into: &mut Vec<Part>) -> usize {
        let parts = self.parts.get(self.readable..).unwrap_or_default();
        self.writing.walk(parts, size, collect(into))
    }

    /// The `size` bytes to write that come after the next `skip`, as parts, appended to `into`; nothing is passed over.
    pub fn look_write(&self, skip: usize, size: usize, into: &mut Vec<Part>) -> usize {
        let (parts, mut cursor) = (self.writable(), self.writing);
        cursor.walk(parts, skip, |_, _, _| true);
        cursor.walk(parts, size, collect(into))
    }

    /// Guest RAM, for a device that takes parts.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The index of its first descriptor, by which the driver knows it.
    pub fn head(&self) -> u16 {
        self.head
    }
}

fn collect(into: &mut Vec<Part>) -> impl FnMut(u64, usize, usize) -> bool {
    // A piece is never longer than its part.
    |addr, _, size| {
        into.push(Part { addr, size: size as u32 });
        true
    }
}

/// Describes what lies at `parts`, which are none afterwards, for the kernel to read from or write to; as [`Memory::lend`].
///
/// # Errors
/// Any of it is outside RAM.
pub fn lend(memory: &Memory, parts: &mut Vec<Part>, into: &mut Buffers) -> Result<()> {
    memory.lend(parts.drain(..).map(|part| (part.addr, part.size as usize)), into)
}

/// The sum does not overflow: a chain with more than 2^32 - 1 bytes breaks its queue.
fn total(parts: &[Part]) -> u32 {
    parts.iter().map(|part| part.size).sum()
}

impl Cursor {
    /// Calls `each` with address, offset and size of every piece of the next `size` bytes, until it says false.
    fn walk(&mut self, parts: &[Part], size: usize, mut each: impl FnMut(u64, usize, usize) -> bool) -> usize {
        let mut done = 0;
        while done < size
            && let Some(part) = parts.get(self.part)
        {
            let left = part.size - self.offset;
            let piece = left.min(u32::try_from(size - done).unwrap_or(u32::MAX));
            if piece > 0 && !each(part.addr + u64::from(self.offset), done, piece as usize) {
                break;
            }
            done += piece as usize;
            self.offset += piece;
            self.done += piece;
            if self.offset == part.size {
                *self = Self { part: self.part + 1, offset: 0, done: self.done };
            }
        }
        done
    }
}

/// The device's end of a queue whose driver is at work.
pub struct Queue {
    // Configuration
    memory: Memory,
    event_idx: bool,
    indirect: bool,
    // Wires
    line: Arc<dyn IrqLine>,
    // State
    ring: Ring,
    /// The driver was told of used entries up to here.
    told: u16,
    /// The driver may have been asked not to notify.
    quiet: bool,
    broken: bool,
    /// Chains that may still come out in this call of the device.
    budget: u16,
    starved: bool,
    /// Lists of parts that are not in use, so that a request allocates nothing.
    spare: Vec<Vec<Part>>,
}

impl Queue {
    /// A queue as its driver has set it up; one that is not ready or not valid gives nothing.
    pub fn new(memory: &Memory, ring: Ring, [event_idx, indirect]: [bool; 2], line: Arc<dyn IrqLine>) -> Self {
        Self {
            memory: memory.clone(),
            event_idx,
            indirect,
            line,
            ring,
            // Who gives a queue back tells first; what the driver was asked for by the device's former self is unknown.
            told: ring.next_used,
            quiet: true,
            broken: ring.ready && !ring.is_valid(memory),
            budget: ring.size,
            starved: false,
            spare: Vec::new(),
        }
    }

    /// Where its rings and buffers are.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// As it is now, for whoever keeps it while no driver is at work.
    pub fn ring(&self) -> Ring {
        self.ring
    }

    /// The driver has done what it must not.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// The driver uses it.
    pub fn is_ready(&self) -> bool {
        self.ring.ready && !self.broken
    }

    /// The driver uses it no longer.
    pub fn close(&mut self) {
        self.ring.ready = false;
    }

    /// Begins a call of the device.
    pub fn refill(&mut self) {
        self.budget = self.ring.size;
        self.starved = false;
    }

    /// More was there than may come out in one call: the device is to be called again.
    pub fn is_starved(&self) -> bool {
        self.starved
    }

    /// The next chain, if there is one. When there is none the driver is asked to notify of the next.
    pub fn pop(&mut self) -> Option<Chain> {
        if !self.is_ready() {
            return None;
        }
        let popped = self.try_pop();
        if popped.is_none() {
            self.broken = true;
        }
        popped?
    }

    /// None where the queue is found broken.
    fn try_pop(&mut self) -> Option<Option<Chain>> {
        if self.waiting()? == 0 && !self.arm()? {
            return Some(None);
        }
        if self.budget == 0 {
            self.starved = true;
            return Some(None);
        }
        if !self.event_idx && !self.quiet {
            self.quiet = true;
            self.memory.store_u16(self.ring.used, SILENCE).ok()?;
        }
        let slot = u64::from(self.ring.next_available % self.ring.size);
        let head = self.memory.load_u16(self.ring.available + 4 + 2 * slot).ok()?;
        let chain = self.walk(head)?;
        self.ring.next_available = self.ring.next_available.wrapping_add(1);
        self.budget -= 1;
        Some(Some(chain))
    }

    /// How many chains the driver has made available; none where that is more than there can be.
    fn waiting(&self) -> Option<u16> {
        let index = self.memory.load_u16(self.ring.available + 2).ok()?;
        Some(index.wrapping_sub(self.ring.next_available)).filter(|waiting| *waiting <= self.ring.size)
    }

    /// Asks to be notified of the next chain; true where one has come in the meantime.
    fn arm(&mut self) -> Option<bool> {
        if self.event_idx {
            let avail_event = self.ring.used + 4 + 8 * u64::from(self.ring.size);
            self.memory.store_u16(avail_event, self.ring.next_available).ok()?;
        } else if self.quiet {
            self.quiet = false;
            self.memory.store_u16(self.ring.used, 0).ok()?;
        }
        // What was written must be seen before what is read next is looked at (§2.7.10).
        fence(Ordering::SeqCst);
        Some(self.waiting()? > 0)
    }

    /// Follows a chain; none where it is not one.
    fn walk(&mut self, head: u16) -> Option<Chain> {
        let mut parts = self.spare.pop().unwrap_or_default();
        let (mut table, mut length) = (self.ring.descriptors, self.ring.size);
        let (mut index, mut left) = (head, self.ring.size);
        let (mut readable, mut bytes, mut inside) = (0, 0u32, false);
        loop {
            if index >= length || left == 0 || parts.len() >= MAX_PARTS {
                return None;
            }
            left -= 1;
            let (part, flags, next) = self.descriptor(table + 16 * u64::from(index))?;
            if flags & INDIRECT != 0 {
                // Not with NEXT, not within another, of whole descriptors (§2.7.5.3.1).
                let count = u16::try_from(part.size / 16).ok().filter(|count| (1..=MAX_SIZE).contains(count))?;
                if !self.indirect || inside || flags & NEXT != 0 || !part.size.is_multiple_of(16) {
                    return None;
                }
                (table, length, left, index, inside) = (part.addr, count, count, 0, true);
                continue;
            }
            bytes = bytes.checked_add(part.size)?;
            let writable = flags & WRITE != 0;
            if !writable && readable < parts.len() {
                return None;
            }
            // An empty buffer is nothing, and may be anywhere.
            if part.size > 0 {
                parts.push(part);
                readable += usize::from(!writable);
            }
            if flags & NEXT == 0 {
                break;
            }
            index = next;
        }
        let (reading, writing) = (Cursor::default(), Cursor::default());
        Some(Chain { memory: self.memory.clone(), head, parts, readable, reading, writing })
    }

    /// One descriptor, read once (§2.7.5); none where it does not describe RAM.
    fn descriptor(&self, at: u64) -> Option<(Part, u16, u16)> {
        let mut raw = [0; 16];
        self.memory.read(at, &mut raw).ok()?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, s0, s1, s2, s3, f0, f1, n0, n1] = raw;
        let part = Part {
            addr: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            size: u32::from_le_bytes([s0, s1, s2, s3]),
        };
        let in_ram = Span::new(part.addr, part.size.into()).map_or(part.size == 0, |span| self.memory.contains(span));
        in_ram.then_some((part, u16::from_le_bytes([f0, f1]), u16::from_le_bytes([n0, n1])))
    }

    /// The device leaves something undone for this queue, and is to be called again.
    pub fn again(&mut self) {
        self.starved = true;
    }

    /// Puts the chain that came out last back, unused: it comes out again next time.
    pub fn undo(&mut self, chain: Chain) {
        self.ring.next_available = self.ring.next_available.wrapping_sub(1);
        self.budget += 1;
        self.recycle(chain.parts);
    }

    /// Keeps a list of parts for the next chain.
    fn recycle(&mut self, mut parts: Vec<Part>) {
        parts.clear();
        if self.spare.len() < usize::from(self.ring.size) {
            self.spare.push(parts);
        }
    }

    /// Gives a chain back: the driver sees it as used, with what was written to it.
    pub fn push(&mut self, chain: Chain) {
        self.push_all([chain]);
    }

    /// Gives chains back that belong together: the driver sees all of them at once.
    pub fn push_all(&mut self, chains: impl IntoIterator<Item = Chain>) {
        let mut next = self.ring.next_used;
        for Chain { head, parts, writing, .. } in chains {
            self.recycle(parts);
            if !self.is_ready() {
                continue;
            }
            let slot = u64::from(next % self.ring.size);
            next = next.wrapping_add(1);
            let mut entry = [0; 8];
            let (id, size) = (u32::from(head).to_le_bytes(), writing.done.to_le_bytes());
            entry.iter_mut().zip(id.into_iter().chain(size)).for_each(|(to, from)| *to = from);
            self.broken |= self.memory.write(self.ring.used + 4 + 8 * slot, &entry).is_err();
        }
        if next != self.ring.next_used {
            // The entries are there before the index says so.
            self.broken |= self.memory.store_u16(self.ring.used + 2, next).is_err();
            self.ring.next_used = next;
        }
    }

    /// Tells the driver of chains given back, where it wants to know.
    pub fn tell(&mut self) {
        let next = self.ring.next_used;
        if self.told == next || !self.is_ready() {
            return;
        }
        // The index must be seen before what the driver wants is looked at (§2.7.7.2).
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.memory.load_u16(self.ring.available + 4 + 2 * u64::from(self.ring.size));
            event.map(|event| passes(event, next, self.told))
        } else {
            self.memory.load_u16(self.ring.available).map(|flags| flags & SILENCE == 0)
        };
        self.told = next;
        if wanted.unwrap_or(true) {
            self.line.pulse();
        }
    }
}

/// Going from `old` to `new` passes `event` (§2.7.7.1: from the entry behind which the other side wants to hear).
fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
