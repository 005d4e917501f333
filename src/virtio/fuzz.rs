//! Hostile drivers: what a soak runner calls by the million.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use anyhow::Result;

use super::link::Link;
use super::mmio::Mmio;
use super::pci::{Pci, Wires};
use super::worker::Bench;
use super::{Queue, Ring, VirtioDevice};
use crate::bus::Device;
use crate::console::Terminal;
use crate::device::pci::PciHost;
use crate::host::output::Bell;
use crate::irq::{IrqLine, MessageLine, TestWire};
use crate::memory::{Memory, Span};

/// Bytes of RAM, from address 0.
pub const RAM: u64 = 0x1_0000;
/// Where the function's BAR lies after power-on.
pub const BAR: u64 = 0xd000_0000;

fn ram(bytes: &[u8]) -> Result<Memory> {
    let memory = Memory::new(&[Span { start: 0, size: RAM }], false)?;
    memory.write(0, bytes.get(..RAM as usize).unwrap_or(bytes))?;
    Ok(memory)
}

fn contents(memory: &Memory) -> Result<Vec<u8>> {
    let mut all = vec![0; RAM as usize];
    memory.read(0, &mut all)?;
    Ok(all)
}

/// Takes all chains out of a queue in this RAM and gives them back filled; gives how many there were.
///
/// # Errors
/// The host has no memory.
///
/// # Panics
/// A buffer is outside RAM, more comes out than the queue is long, or a byte changed that is nobody's.
#[doc(hidden)]
pub fn fuzz_ring(bytes: &[u8], ring: Ring, options: [bool; 2]) -> Result<usize> {
    let memory = ram(bytes)?;
    let before = contents(&memory)?;
    let mut queue = Queue::new(&memory, ring, options, Arc::<TestWire>::default());
    let mut owned = vec![false; RAM as usize];
    let mut own = |start: u64, size: u64| {
        owned.iter_mut().skip(start as usize).take(size as usize).for_each(|byte| *byte = true);
    };
    if queue.is_ready() {
        own(ring.used, 6 + 8 * u64::from(ring.size));
    }
    let mut count = 0;
    for _ in 0..3 {
        queue.refill();
        let most = count + usize::from(ring.size);
        while let Some(mut chain) = queue.pop() {
            count += 1;
            assert!(count <= most, "more chains than the queue is long");
            for part in chain.readable().iter().chain(chain.writable()) {
                assert!(Span::new(part.addr, part.size.into()).is_some_and(|span| memory.contains(span)), "{part:?}");
            }
            chain.writable().iter().for_each(|part| own(part.addr, part.size.into()));
            while chain.write(&[0xaa; 512]) > 0 {}
            queue.push(chain);
        }
        queue.tell();
    }
    let after = contents(&memory)?;
    let stray = before.iter().zip(&after).zip(&owned).position(|((before, after), owned)| before != after && !owned);
    assert!(stray.is_none(), "a byte was written that is nobody's: {stray:x?}");
    Ok(count)
}

/// What a guest does to a transport.
#[derive(Debug, Clone, Copy)]
pub enum Touch {
    /// Reads a register.
    Read(u64, usize),
    /// Writes one.
    Write(u64, usize, u64),
    /// Writes eight bytes to RAM.
    Poke(u64, u64),
    /// Lets the devices do what they have to.
    Turn,
    /// The machine is saved, and another goes on.
    Restore,
}

/// A far end that takes all and says nothing.
pub struct Nobody(Bell);

impl Nobody {
    /// # Errors
    /// The host has no descriptor left.
    pub fn new() -> rustix::io::Result<Self> {
        Bell::new().map(Self)
    }
}

impl Terminal for Nobody {
    fn put(&mut self, bytes: &[u8]) -> usize {
        bytes.len()
    }
    fn lose(&mut self, _count: u64) {}
    fn waiting(&self) -> bool {
        false
    }
    fn get(&mut self, _into: &mut [u8]) -> usize {
        0
    }
    fn size(&self) -> Option<[u16; 2]> {
        None
    }
    fn bell(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
    fn ring(&self) {
        self.0.ring();
    }
}

struct Nowhere;

impl IrqLine for Nowhere {
    fn set(&self, _high: bool) {}
}

impl MessageLine for Nowhere {
    fn route(&self, _address: u64, _data: u32) {}
}

fn place(device: Box<dyn VirtioDevice>, pci: bool, memory: &Memory) -> Result<(Box<dyn Device>, Bench)> {
    let bench = Bench::new()?;
    let queues = device.kind().queues.len();
    let link = Link::new(device, 0, bench.clone(), memory.clone())?;
    if !pci {
        return Ok((Box::new(Mmio::new(link, Box::new(Nowhere))), bench));
    }
    let messages = (0..=queues).map(|_| Box::new(Nowhere) as _).collect();
    let wires = Wires { intx: Some(Box::new(Nowhere)), intx_number: 5, messages, doorbells: None, answers: true };
    let function = Pci::new(link, (BAR & 0xffff_ffff) as u32, wires);
    Ok((Box::new(PciHost::new(vec![Box::new(function)])?), bench))
}

/// Does all that to a device, of which `make` makes as many as are needed; true where its driver was at work in the end.
///
/// # Errors
/// The host has no memory.
///
/// # Panics
/// What was saved cannot be loaded, or a reset leaves something behind.
#[doc(hidden)]
pub fn fuzz_transport(
    make: &dyn Fn() -> Box<dyn VirtioDevice>,
    pci: bool,
    bytes: &[u8],
    touches: &[Touch],
) -> Result<bool> {
    let memory = ram(bytes)?;
    let (mut guest, mut bench) = place(make(), pci, &memory)?;
    let fresh = guest.save();
    for touch in touches {
        match *touch {
            Touch::Read(offset, width) => drop(guest.read(offset, width)),
            Touch::Write(offset, width, value) => drop(guest.write(offset, width, value)),
            Touch::Poke(at, value) => drop(memory.write(at, &value.to_le_bytes())),
            Touch::Turn => bench.turn(),
            Touch::Restore => {
                let saved = guest.save();
                let mut other = place(make(), pci, &memory)?;
                let loaded = other.0.load(&saved);
                assert!(loaded.is_ok(), "what was saved cannot be loaded: {loaded:?}");
                assert!(other.0.save() == saved, "what was loaded is not what was saved");
                (guest, bench) = other;
            }
        }
    }
    let active = bench.with(|devices| devices.get(0).is_some()) == Some(true);
    guest.reset();
    assert!(guest.save() == fresh, "a reset leaves something behind");
    Ok(active)
}
