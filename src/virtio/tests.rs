//! A driver's side of a queue, and a place to run a device in, for tests without guest, transport and thread.
//!
//! [`Rig`] is all that a device's own tests need: it makes queues, asks the device for things, and looks at what came back.
//! Invariant: it does what a well-behaved driver does; who wants another one writes to `memory` on its own.
#![allow(missing_docs)]

mod hostile;
mod queue;
mod transport;
mod worker;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::queue::MAX_SIZE;
use super::{Active, Queue, Ring, VirtioDevice, Wake, Watcher, feature};
use crate::irq::TestWire;
use crate::memory::{Memory, Span};

/// Bytes of RAM, from address 0.
pub const RAM: u64 = 16 << 20;
/// Each queue has this much of it: rings first, buffers behind them.
pub const SHARE: u64 = 2 << 20;
/// Rings lie before this offset.
const HEAP: u64 = 0x1_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub fn ram() -> Memory {
    Memory::new(&[Span { start: 0, size: RAM }], false).unwrap()
}

/// A descriptor as it lies in RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Descriptor {
    pub addr: u64,
    pub size: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    pub fn bytes(&self) -> [u8; 16] {
        let all = [
            &self.addr.to_le_bytes()[..],
            &self.size.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.next.to_le_bytes(),
        ];
        all.concat().try_into().unwrap()
    }
}

/// A chain that came back.
#[derive(Debug, PartialEq, Eq)]
pub struct Used {
    /// What [`Driver::add`] gave for it.
    pub head: u16,
    /// What the device says it wrote, and where it said so: the bytes of the buffers it could write, up to there.
    pub written: Vec<u8>,
}

/// Where a chain's buffers are, and the descriptors that it took.
struct Lent {
    writable: Vec<(u64, u32)>,
    taken: Vec<u16>,
}

/// The driver of one queue.
pub struct Driver {
    pub memory: Memory,
    pub ring: Ring,
    /// What it hears of used buffers.
    pub line: Arc<TestWire>,
    features: u64,
    free: Vec<u16>,
    lent: BTreeMap<u16, Lent>,
    available: u16,
    seen: u16,
    base: u64,
    heap: u64,
}

impl Driver {
    /// Its rings and buffers lie in the [`SHARE`] bytes from `base` on.
    pub fn new(memory: &Memory, base: u64, size: u16, features: u64) -> Self {
        assert!(size.is_power_of_two() && size <= MAX_SIZE);
        let (available, used) = (base + 0x8000, base + 0xa000);
        let ring = Ring { size, ready: true, descriptors: base, available, used, ..Ring::default() };
        assert!(ring.is_valid(memory));
        Self {
            memory: memory.clone(),
            ring,
            line: Arc::default(),
            features,
            free: (0..size).rev().collect(),
            lent: BTreeMap::new(),
            available: 0,
            seen: 0,
            base: base + HEAP,
            heap: base + HEAP,
        }
    }

    /// As if so many chains had gone through it already.
    #[must_use]
    pub fn aged(mut self, chains: u16) -> Self {
        (self.available, self.seen) = (chains, chains);
        (self.ring.next_available, self.ring.next_used) = (chains, chains);
        self.put16(self.ring.available + 2, chains);
        self.put16(self.ring.used + 2, chains);
        self
    }

    /// The device's end.
    pub fn queue(&self) -> Queue {
        let options = [feature::EVENT_IDX, feature::INDIRECT_DESC].map(|bit| self.features & bit != 0);
        Queue::new(&self.memory, self.ring, options, self.line.clone())
    }

    pub fn put16(&self, at: u64, value: u16) {
        self.memory.write(at, &value.to_le_bytes()).unwrap();
    }

    pub fn get16(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read(at, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    /// Some bytes of RAM that nobody has.
    pub fn take(&mut self, size: u32) -> u64 {
        let at = self.heap;
        self.heap += u64::from(size).next_multiple_of(16);
        assert!(self.heap - self.base <= SHARE - HEAP, "the driver of the test is out of buffers");
        at
    }

    /// Puts a descriptor into the table.
    pub fn describe(&self, index: u16, descriptor: Descriptor) {
        self.memory.write(self.ring.descriptors + 16 * u64::from(index), &descriptor.bytes()).unwrap();
    }

    /// Makes a chain available that begins with this descriptor.
    pub fn offer(&mut self, head: u16) {
        self.put16(self.ring.available + 4 + 2 * u64::from(self.available % self.ring.size), head);
        self.available = self.available.wrapping_add(1);
        self.put16(self.ring.available + 2, self.available);
    }

    /// Takes the place of buffers: some filled with these bytes, some of these sizes to be written, filled with 0xee.
    fn buffers(&mut self, read: &[&[u8]], write: &[u32]) -> (Vec<Descriptor>, Lent) {
        let mut all = Vec::new();
        for bytes in read {
            let (size, addr) = (bytes.len() as u32, self.take(bytes.len() as u32));
            self.memory.write(addr, bytes).unwrap();
            all.push(Descriptor { addr, size, flags: 0, next: 0 });
        }
        let mut writable = Vec::new();
        for size in write {
            let addr = self.take(*size);
            self.memory.write(addr, &vec![0xee; *size as usize]).unwrap();
            all.push(Descriptor { addr, size: *size, flags: WRITE, next: 0 });
            writable.push((addr, *size));
        }
        (all, Lent { writable, taken: Vec::new() })
    }

    /// Makes a chain of buffers available: these bytes to read, then room of these sizes to write. Gives its head.
    pub fn add(&mut self, read: &[&[u8]], write: &[u32]) -> u16 {
        let (mut all, mut lent) = self.buffers(read, write);
        lent.taken = all.iter().map(|_| self.free.pop().expect("a free descriptor")).collect();
        let count = all.len();
        for (at, descriptor) in all.iter_mut().enumerate().take(count - 1) {
            descriptor.flags |= NEXT;
            descriptor.next = lent.taken[at + 1];
        }
        lent.taken.iter().zip(&all).for_each(|(index, descriptor)| self.describe(*index, *descriptor));
        self.lend(lent)
    }

    /// The same, in a table of its own.
    pub fn add_indirect(&mut self, read: &[&[u8]], write: &[u32]) -> u16 {
        let (mut all, mut lent) = self.buffers(read, write);
        let (count, size) = (all.len(), 16 * all.len() as u32);
        let addr = self.take(size);
        for (at, descriptor) in all.iter_mut().enumerate() {
            if at + 1 < count {
                descriptor.flags |= NEXT;
                descriptor.next = at as u16 + 1;
            }
            self.memory.write(addr + 16 * at as u64, &descriptor.bytes()).unwrap();
        }
        let index = self.free.pop().expect("a free descriptor");
        self.describe(index, Descriptor { addr, size, flags: INDIRECT, next: 0 });
        lent.taken = vec![index];
        self.lend(lent)
    }

    fn lend(&mut self, lent: Lent) -> u16 {
        let head = lent.taken[0];
        self.lent.insert(head, lent);
        self.offer(head);
        head
    }

    /// The next chain that has come back, if there is one.
    pub fn used(&mut self) -> Option<Used> {
        if self.get16(self.ring.used + 2) == self.seen {
            return None;
        }
        let mut entry = [0; 8];
        self.memory.read(self.ring.used + 4 + 8 * u64::from(self.seen % self.ring.size), &mut entry).unwrap();
        self.seen = self.seen.wrapping_add(1);
        let [id, size] = [0, 4].map(|at| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap()));
        let head = u16::try_from(id).unwrap();
        let lent = self.lent.remove(&head).expect("the device gives back a chain that it has");
        let mut written = Vec::new();
        for (addr, size) in &lent.writable {
            let mut bytes = vec![0; *size as usize];
            self.memory.read(*addr, &mut bytes).unwrap();
            written.extend(bytes);
        }
        assert!(size as usize <= written.len(), "the device wrote more than there is room");
        written.truncate(size as usize);
        self.free.extend(lent.taken);
        if self.lent.is_empty() {
            self.heap = self.base;
        }
        Some(Used { head, written })
    }

    /// How many chains the device has.
    pub fn out(&self) -> usize {
        self.lent.len()
    }

    /// With EVENT_IDX: the driver wants to hear of the chain that comes back after so many.
    pub fn hear_from(&self, used: u16) {
        self.put16(self.ring.available + 4 + 2 * u64::from(self.ring.size), used);
    }

    /// Without EVENT_IDX: the driver wants to hear nothing.
    pub fn hear_nothing(&self, nothing: bool) {
        self.put16(self.ring.available, nothing.into());
    }

    /// The device wants to hear of the last `new` chains.
    pub fn must_notify(&self, new: u16) -> bool {
        if self.features & feature::EVENT_IDX == 0 {
            return self.get16(self.ring.used) & 1 == 0;
        }
        let event = self.get16(self.ring.used + 4 + 8 * u64::from(self.ring.size));
        self.available.wrapping_sub(event).wrapping_sub(1) < new
    }
}

/// A device whose driver is at work.
pub struct Rig<D: VirtioDevice> {
    pub device: D,
    pub active: Active,
    /// One for each of its queues.
    pub drivers: Vec<Driver>,
    pub memory: Memory,
    /// What the device has watched besides its sources.
    watcher: Watcher,
}

impl<D: VirtioDevice> Rig<D> {
    /// All features that the device offers are agreed on, but EVENT_IDX: used chains are told of each time.
    pub fn new(device: D) -> Self {
        let features = device.features() | feature::VERSION_1 | feature::INDIRECT_DESC;
        Self::with_features(device, features)
    }

    pub fn with_features(device: D, features: u64) -> Self {
        let memory = ram();
        let sizes = device.kind().queues.iter().enumerate();
        let driver = |(at, size): (usize, &u16)| Driver::new(&memory, at as u64 * SHARE, *size, features);
        let drivers: Vec<_> = sizes.map(driver).collect();
        let queues = drivers.iter().map(Driver::queue).collect();
        let mut rig =
            Self { device, active: Active::new(queues, features), drivers, memory, watcher: Watcher::alone().unwrap() };
        rig.active.watcher = Some(rig.watcher.clone());
        rig.wake(Wake::Start);
        rig
    }

    /// Calls the device, as often as it has more to do than comes out in one call.
    pub fn wake(&mut self, mut wake: Wake) {
        loop {
            self.active.queues.iter_mut().for_each(Queue::refill);
            self.device.service(wake, &mut self.active);
            self.active.queues.iter_mut().for_each(Queue::tell);
            match self.active.queues.iter().position(Queue::is_starved) {
                Some(queue) => wake = Wake::Queue(queue),
                None => return,
            }
        }
    }

    pub fn kick(&mut self, queue: usize) {
        self.wake(Wake::Queue(queue));
    }

    /// Tells the device of what has become of the descriptors that it has watched, until nothing has any more.
    pub fn hear(&mut self) {
        loop {
            let wakes = self.watcher.look();
            if wakes.is_empty() {
                return;
            }
            wakes.into_iter().for_each(|wake| self.wake(wake));
        }
    }

    /// Makes a request and rings; what came back, if anything did at once.
    pub fn ask(&mut self, queue: usize, read: &[&[u8]], write: &[u32]) -> Option<Used> {
        self.drivers[queue].add(read, write);
        self.kick(queue);
        self.drivers[queue].used()
    }

    /// A queue is found broken: the driver would be told that the device needs a reset.
    pub fn is_broken(&self) -> bool {
        self.active.queues.iter().any(Queue::is_broken)
    }
}

/// Gives back what it is given: room is filled with the bytes to read, in their order.
pub struct Echo {
    /// How many chains it has had.
    pub chains: u64,
    space: Vec<u8>,
}

impl Default for Echo {
    fn default() -> Self {
        Self { chains: 0, space: vec![0; 8] }
    }
}

impl VirtioDevice for Echo {
    fn kind(&self) -> super::Kind {
        super::Kind { name: "echo", id: 63, class: 0xff_0000, queues: &[16, 8] }
    }

    fn features(&self) -> u64 {
        1
    }

    fn space(&self) -> Vec<u8> {
        self.space.clone()
    }

    fn set_space(&mut self, offset: usize, bytes: &[u8]) {
        self.space[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn service(&mut self, _wake: Wake, active: &mut Active) {
        for queue in &mut active.queues {
            while let Some(mut chain) = queue.pop() {
                self.chains += 1;
                let size = chain.left_to_read().min(chain.left_to_write()).min(RAM as u32);
                let mut bytes = vec![0; size as usize];
                chain.read(&mut bytes);
                chain.write(&bytes);
                queue.push(chain);
            }
        }
    }

    fn save(&self) -> crate::bus::Saved {
        crate::device::wrap(1, &(self.chains, &self.space))
    }

    fn load(&mut self, saved: &crate::bus::Saved) -> anyhow::Result<()> {
        let (chains, space): (u64, Vec<u8>) = crate::device::unwrap("echo", 1, saved)?;
        anyhow::ensure!(space.len() == 8, "echo: its space has 8 bytes");
        (self.chains, self.space) = (chains, space);
        Ok(())
    }
}

#[test]
fn a_device_answers_its_driver() {
    let mut rig = Rig::new(Echo::default());
    let used = rig.ask(0, &[b"hello ", b"world"], &[3, 20]).unwrap();
    assert_eq!((used.written.as_slice(), rig.drivers[0].line.pulses()), (&b"hello world"[..], 1));
    let head = rig.drivers[1].add_indirect(&[b"in", b"direct"], &[4, 4]);
    rig.kick(1);
    assert_eq!(rig.drivers[1].used(), Some(Used { head, written: b"indirect".to_vec() }));
    assert!(rig.drivers[1].used().is_none() && rig.drivers[1].out() == 0 && !rig.is_broken());
}

/// Sends bytes and a descriptor with them.
pub fn send_with_descriptor(socket: &std::os::unix::net::UnixStream, bytes: &[u8]) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut room = [std::mem::MaybeUninit::uninit(); 64];
    let fds = [rustix::stdio::stderr()];
    let mut beside = SendAncillaryBuffer::new(&mut room);
    assert!(beside.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(socket, &[std::io::IoSlice::new(bytes)], &mut beside, SendFlags::empty()).unwrap();
}

/// This host is one that `cargo xtask test` made, of QEMU without hardware's help.
pub fn host_is_emulated() -> bool {
    std::env::var_os("BANTAM_HOST_IS_TCG").is_some()
}
