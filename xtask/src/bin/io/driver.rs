//! A driver's side of a queue, as Linux's virtio_ring has it: EVENT_IDX, and a table of its own for each request.
//!
//! Invariant: nothing is allocated and no system call made here; RAM is written the short way, so that what is measured is
//! the device. A request's slot is the index of its descriptor; what its parts are is laid down once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};

use anyhow::{Context, Result};
use bantam::irq::IrqLine;
use bantam::memory::{Memory, Span};
use bantam::virtio::{Queue, Ring};
use vmm_sys_util::eventfd::EventFd;

/// Requests at a time.
pub const DEPTH: u16 = 32;
/// Descriptors of a queue.
const SIZE: u16 = 64;
/// Bytes of RAM that each queue has.
pub const SHARE: u64 = 1 << 20;
/// Where in it the areas, the tables and the buffers are.
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const TABLES: u64 = 0x3000;
const BUFFERS: u64 = 0x1_0000;
/// Bytes of buffers that each slot has.
const ROOM: u64 = 0x4000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Counts interrupts, and wakes who waits for them: what KVM's irqfd does for a guest.
pub struct Line {
    pub count: AtomicU64,
    pub bell: Option<Arc<EventFd>>,
}

impl IrqLine for Line {
    fn pulse(&self) {
        self.count.fetch_add(1, Ordering::Relaxed);
        if let Some(bell) = &self.bell {
            let _ = bell.write(1);
        }
    }

    fn set(&self, high: bool) {
        if high {
            self.pulse();
        }
    }
}

/// RAM for so many queues.
pub fn ram(queues: u64) -> Result<Memory> {
    Memory::new(&[Span { start: 0, size: queues * SHARE }], false)
}

/// The driver of one queue.
pub struct Driver {
    /// The first byte of the queue's share, in this process.
    start: *mut u8,
    base: u64,
    memory: Memory,
    free: Vec<u16>,
    available: u16,
    told: u16,
    seen: u16,
}

// SAFETY: the address is that of RAM, which `memory` keeps where it is.
#[allow(unsafe_code)]
unsafe impl Send for Driver {}

impl Driver {
    /// The queue with this number.
    pub fn new(memory: &Memory, number: u64) -> Result<Self> {
        let slot = *memory.slots().first().context("no RAM")?;
        let base = number * SHARE;
        let start = std::ptr::with_exposed_provenance_mut((slot.host + base) as usize);
        Ok(Self {
            start,
            base,
            memory: memory.clone(),
            free: (0..DEPTH).rev().collect(),
            available: 0,
            told: 0,
            seen: 0,
        })
    }

    /// The device's end.
    pub fn queue(&self, line: Arc<Line>) -> Queue {
        let at = |offset| self.base + offset;
        let ring = Ring {
            size: SIZE,
            ready: true,
            descriptors: at(0),
            available: at(AVAILABLE),
            used: at(USED),
            ..Ring::default()
        };
        Queue::new(&self.memory, ring, [true, true], line)
    }

    /// Lays down what the requests of a slot are made of: sizes to read, then sizes to write. They lie one behind the other
    /// in the slot's buffers, each at a multiple of 64.
    pub fn shape(&self, slot: u16, read: &[u32], write: &[u32]) -> Result<()> {
        let mut table = Vec::new();
        let (mut offset, count) = (0, read.len() + write.len());
        for (at, size) in read.iter().chain(write).enumerate() {
            let more = if at + 1 < count { NEXT } else { 0 };
            let flags = if at < read.len() { more } else { more | WRITE };
            table.extend(descriptor(self.buffers(slot) + offset, *size, flags, at as u16 + 1));
            offset += u64::from(size.next_multiple_of(64));
        }
        anyhow::ensure!(offset <= ROOM && table.len() <= 128, "a request of {offset} bytes in {count} parts");
        let place = self.base + TABLES + 128 * u64::from(slot);
        self.memory.write(place, &table)?;
        let head = descriptor(place, table.len() as u32, INDIRECT, 0);
        self.memory.write(self.base + 16 * u64::from(slot), &head)
    }

    /// Where in guest RAM a slot's buffers are.
    pub fn buffers(&self, slot: u16) -> u64 {
        self.base + BUFFERS + ROOM * u64::from(slot)
    }

    /// The same in this process.
    pub fn host(&self, slot: u16) -> *mut u8 {
        self.start.wrapping_add((BUFFERS + ROOM * u64::from(slot)) as usize)
    }

    /// Puts bytes into a slot's buffers.
    pub fn put<const N: usize>(&self, slot: u16, offset: usize, bytes: [u8; N]) {
        assert!(offset + N <= ROOM as usize);
        // SAFETY: within the slot's buffers, which the device has not got now.
        #[allow(unsafe_code)]
        unsafe {
            self.host(slot).wrapping_add(offset).cast::<[u8; N]>().write_unaligned(bytes);
        }
    }

    /// Takes bytes out of a slot's buffers.
    pub fn get<const N: usize>(&self, slot: u16, offset: usize) -> [u8; N] {
        assert!(offset + N <= ROOM as usize);
        // SAFETY: within the slot's buffers, which the device has not got any more.
        #[allow(unsafe_code)]
        unsafe {
            self.host(slot).wrapping_add(offset).cast::<[u8; N]>().read_unaligned()
        }
    }

    fn word(&self, offset: u64) -> &AtomicU16 {
        // SAFETY: an even address in the rings, which both sides use by atomic accesses only.
        #[allow(unsafe_code)]
        unsafe {
            AtomicU16::from_ptr(self.start.wrapping_add(offset as usize).cast())
        }
    }

    /// A slot that the device has not got.
    pub fn free(&mut self) -> Option<u16> {
        self.free.pop()
    }

    /// How many slots the device has.
    pub fn out(&self) -> usize {
        usize::from(DEPTH) - self.free.len()
    }

    /// Takes a slot back that was not made available.
    pub fn keep(&mut self, slot: u16) {
        self.free.push(slot);
    }

    /// Makes the request in a slot available.
    pub fn offer(&mut self, slot: u16) {
        self.word(AVAILABLE + 4 + 2 * u64::from(self.available % SIZE)).store(slot, Ordering::Relaxed);
        self.available = self.available.wrapping_add(1);
        self.word(AVAILABLE + 2).store(self.available, Ordering::Release);
    }

    /// The device wants to hear of what was made available since it was last asked (VIRTIO 1.3 §2.7.10).
    pub fn must_notify(&mut self) -> bool {
        let (new, old) = (self.available, std::mem::replace(&mut self.told, self.available));
        fence(Ordering::SeqCst);
        let event = self.word(USED + 4 + 8 * u64::from(SIZE)).load(Ordering::Relaxed);
        new != old && new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// The next request that came back: its slot, and how much was written.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        if self.word(USED + 2).load(Ordering::Acquire) == self.seen {
            return None;
        }
        let place = self.start.wrapping_add((USED + 4 + 8 * u64::from(self.seen % SIZE)) as usize);
        // SAFETY: an entry of the used ring, which the device has written and does not write again before it is taken.
        #[allow(unsafe_code)]
        let [id, size] = unsafe { place.cast::<[u32; 2]>().read() };
        self.seen = self.seen.wrapping_add(1);
        self.free.push(id as u16);
        Some((id as u16, size))
    }

    /// Wants an interrupt for what comes back next; false where something has already.
    pub fn listen(&self) -> bool {
        self.word(AVAILABLE + 4 + 2 * u64::from(SIZE)).store(self.seen, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.word(USED + 2).load(Ordering::Acquire) == self.seen
    }
}

fn descriptor(addr: u64, size: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    let words = [flags.to_le_bytes(), next.to_le_bytes()].into_iter().flatten();
    let all = addr.to_le_bytes().into_iter().chain(size.to_le_bytes()).chain(words);
    bytes.iter_mut().zip(all).for_each(|(to, from)| *to = from);
    bytes
}
