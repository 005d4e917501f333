//! A disk with a driver's side of its queues, on real files and on hosts that fail in every way.

mod bouncing;
mod faults;
mod images;
mod opening;
mod power_cut;
mod requests;

use std::collections::VecDeque;
use std::fs::File;
use std::sync::{Arc, Mutex};

use super::engine::Done;
use super::*;
use crate::irq::TestWire;
use crate::memory::{Memory, Span};
use crate::virtio::{Queue, Ring as Area};

/// Descriptors of the test queues.
const SIZE: u16 = 64;
/// Each queue has this much RAM: its areas, then its data.
const ROOM: u64 = 0x10_0000;
const DATA: u64 = 0x4000;

/// A device and the driver's side of its queues.
struct Rig {
    memory: Memory,
    device: Block,
    active: Active,
    /// Of each queue: the next free descriptor and place for data, chains made available, chains seen used.
    queues: Vec<Side>,
    /// The queue for [`Rig::ask`].
    on: usize,
}

#[derive(Clone, Copy, Default)]
struct Side {
    descriptor: u16,
    data: u64,
    available: u16,
    used: u16,
}

impl Rig {
    fn new(device: Block) -> Self {
        let count = device.queues as u64;
        let memory = Memory::new(&[Span { start: 0, size: count * ROOM }], false).unwrap();
        let ring = |at: u64| Area {
            size: SIZE,
            ready: true,
            descriptors: at,
            available: at + 0x1000,
            used: at + 0x2000,
            ..Area::default()
        };
        let line: Arc<dyn crate::irq::IrqLine> = Arc::new(TestWire::default());
        let queue = |n| Queue::new(&memory, ring(n * ROOM), [false, true], line.clone());
        let active = Active::new((0..count).map(queue).collect(), feature::FLUSH);
        let mut rig = Self { memory, device, active, queues: vec![Side::default(); count as usize], on: 0 };
        rig.device.service(Wake::Start, &mut rig.active);
        rig
    }

    /// Room for data of one queue; it is used anew after a while.
    fn room(&mut self, queue: usize, size: u64) -> u64 {
        let side = &mut self.queues[queue];
        if side.data + size > ROOM - DATA {
            side.data = 0;
        }
        let at = queue as u64 * ROOM + DATA + side.data;
        side.data += size.next_multiple_of(16);
        at
    }

    /// Makes a chain available: what the device is to read, in these pieces, then room of these sizes. Gives its head and
    /// where the room is.
    fn put(&mut self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> (u16, Vec<u64>) {
        let base = queue as u64 * ROOM;
        let mut parts = Vec::new();
        for bytes in readable {
            let at = self.room(queue, bytes.len() as u64);
            self.memory.write(at, bytes).unwrap();
            parts.push((at, bytes.len() as u32, 0));
        }
        for size in writable {
            let at = self.room(queue, (*size).into());
            self.memory.write(at, &vec![0xaa; *size as usize]).unwrap();
            parts.push((at, *size, 2u16));
        }
        let side = &mut self.queues[queue];
        let head = side.descriptor % SIZE;
        for (n, (at, size, flags)) in parts.iter().enumerate() {
            let more = u16::from(n + 1 < parts.len());
            let here = side.descriptor % SIZE;
            side.descriptor = side.descriptor.wrapping_add(1);
            let mut raw = at.to_le_bytes().to_vec();
            raw.extend(size.to_le_bytes());
            raw.extend((flags | more).to_le_bytes());
            raw.extend((side.descriptor % SIZE).to_le_bytes());
            self.memory.write(base + 16 * u64::from(here), &raw).unwrap();
        }
        let slot = u64::from(side.available % SIZE);
        self.memory.store_u16(base + 0x1004 + 2 * slot, head).unwrap();
        side.available = side.available.wrapping_add(1);
        self.memory.store_u16(base + 0x1002, side.available).unwrap();
        (head, parts.iter().filter(|part| part.2 == 2).map(|part| part.0).collect())
    }

    fn service(&mut self) {
        self.active.queues.iter_mut().for_each(Queue::refill);
        self.device.service(Wake::Queue(0), &mut self.active);
    }

    /// The next chain that came back: its head, and how much was written.
    fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let (base, side) = (queue as u64 * ROOM, &mut self.queues[queue]);
        if self.memory.load_u16(base + 0x2002).unwrap() == side.used {
            return None;
        }
        let mut entry = [0; 8];
        self.memory.read(base + 0x2004 + 8 * u64::from(side.used % SIZE), &mut entry).unwrap();
        side.used = side.used.wrapping_add(1);
        let (head, size) = entry.split_at(4);
        Some((u32::from_le_bytes(head.try_into().unwrap()) as u16, u32::from_le_bytes(size.try_into().unwrap())))
    }

    /// Serves the device until a chain has come back.
    fn wait(&mut self, queue: usize) -> (u16, u32) {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            self.service();
            if let Some(used) = self.used(queue) {
                return used;
            }
            assert!(Instant::now() < end, "the request never ended");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// A request in one queue, start to end: its status and what was written before it.
    fn ask(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> (u8, Vec<u8>) {
        let (head, at) = self.put(self.on, &[&header(kind, sector), data], &[room, 1]);
        let (used, written) = self.wait(self.on);
        assert_eq!((used, written), (head, room + 1));
        let (mut out, mut status) = (vec![0; room as usize], [0]);
        self.memory.read(at[0], &mut out).unwrap();
        self.memory.read(at[1], &mut status).unwrap();
        (status[0], out)
    }

    fn read(&mut self, sector: u64, size: u32) -> Vec<u8> {
        let (status, data) = self.ask(0, sector, &[], size);
        assert_eq!(status, status::OK);
        data
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.ask(1, sector, data, 0).0
    }

    fn flush(&mut self) -> u8 {
        self.ask(4, 0, &[], 0).0
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut head = [0; 16];
    head[..4].copy_from_slice(&kind.to_le_bytes());
    head[8..].copy_from_slice(&sector.to_le_bytes());
    head
}

fn medium(capacity: u64) -> Medium {
    Medium { capacity, read_only: false, block: 512, serial: *b"bantam-serial-number" }
}

/// A disk of this many bytes in a file, on threads and, where this host has it, on io_uring.
fn disks(size: u64) -> Vec<(Rig, File)> {
    let file = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        file
    };
    let rig = |engine, file: File| (Rig::new(Block::with("test".into(), medium(size), 1, engine, None)), file);
    let (first, second) = (file(), file());
    let pool: Box<dyn Engine> = Box::new(Pool::new(Box::new(first.try_clone().unwrap())).unwrap());
    let mut disks = vec![rig(pool, first)];
    match Ring::new(second.try_clone().unwrap(), SLOTS as u32) {
        Ok(ring) => disks.push(rig(Box::new(ring), second)),
        Err(e) => eprintln!("this host has no io_uring: {e}"),
    }
    disks
}

/// A host that does what a test says, when it says so.
struct Fake {
    bell: EventFd,
    inner: Arc<Mutex<Host>>,
}

#[derive(Default)]
struct Host {
    new: Vec<(usize, Job)>,
    /// What the host has and is not done with.
    has: Vec<(usize, Job)>,
    done: VecDeque<Done>,
    /// How often something was submitted.
    submissions: usize,
}

use vmm_sys_util::eventfd::EventFd;

impl Fake {
    /// A disk on such a host.
    fn disk(size: u64) -> (Rig, Arc<Mutex<Host>>) {
        let bell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let fake = Self { bell, inner: Arc::default() };
        let inner = fake.inner.clone();
        (Rig::new(Block::with("test".into(), medium(size), 1, Box::new(fake), None)), inner)
    }
}

impl Host {
    /// The host is done with the job that it has had for so long.
    fn end(&mut self, index: usize, result: io::Result<u32>) {
        let (slot, job) = self.has.remove(index);
        self.done.push_back((slot, job, result));
    }

    fn fails(&mut self, code: i32) {
        self.end(0, Err(io::Error::from_raw_os_error(code)));
    }

    /// Done as asked for, in full.
    fn ends(&mut self) {
        let size = self.has[0].1.buffers.size() as u32;
        self.end(0, Ok(size));
    }
}

impl Engine for Fake {
    fn push(&mut self, slot: usize, job: Job) -> Result<(), (Job, io::Error)> {
        self.inner.lock().unwrap().new.push((slot, job));
        Ok(())
    }

    fn submit(&mut self) {
        let mut inner = self.inner.lock().unwrap();
        inner.submissions += usize::from(!inner.new.is_empty());
        let new = std::mem::take(&mut inner.new);
        inner.has.extend(new);
    }

    fn finished(&mut self) -> Option<Done> {
        self.inner.lock().unwrap().done.pop_front()
    }

    fn bell(&self) -> BorrowedFd<'_> {
        crate::host::sys::fd_of(&self.bell)
    }
}
