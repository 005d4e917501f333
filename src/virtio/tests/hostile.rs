//! Drivers that do anything, against a reference that is simple and slow: the same bytes in all of RAM afterwards.
//!
//! The reference has RAM as a plain list of bytes; whatever the device writes that the reference does not is found.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// RAM of these tests: rings and buffers below, what no driver ever mentions above.
const SMALL: usize = 0x8000;

/// The reference: VIRTIO 1.3 §2.7, word for word, and a device that writes what it reads.
struct Reference {
    ram: Vec<u8>,
    ring: Ring,
    event_idx: bool,
    quiet: bool,
    broken: bool,
}

/// A chain as the reference sees it: which bytes to read and which to write.
type Bytes = (Vec<usize>, Vec<usize>);

impl Reference {
    fn number(&self, at: u64, size: usize) -> Option<u64> {
        let at = usize::try_from(at).ok()?;
        let bytes = self.ram.get(at..at.checked_add(size)?)?;
        Some(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.ram[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    /// A whole call of the device.
    fn serve(&mut self) {
        let mut left = self.ring.size;
        while !self.broken {
            match self.next(left) {
                None => self.broken = true,
                Some(None) => return,
                Some(Some((head, bytes))) => self.echo(head, &bytes),
            }
            left = left.saturating_sub(1);
        }
    }

    fn waiting(&self) -> Option<u16> {
        let index = self.number(self.ring.available + 2, 2)? as u16;
        Some(index.wrapping_sub(self.ring.next_available)).filter(|waiting| *waiting <= self.ring.size)
    }

    fn next(&mut self, left: u16) -> Option<Option<(u64, Bytes)>> {
        if self.waiting()? == 0 {
            if self.event_idx {
                let event = self.ring.used + 4 + 8 * u64::from(self.ring.size);
                self.put(event, &self.ring.next_available.to_le_bytes());
            } else if self.quiet {
                self.quiet = false;
                self.put(self.ring.used, &[0, 0]);
            }
            if self.waiting()? == 0 {
                return Some(None);
            }
        }
        if left == 0 {
            return Some(None);
        }
        if !self.event_idx && !self.quiet {
            self.quiet = true;
            self.put(self.ring.used, &[1, 0]);
        }
        let slot = u64::from(self.ring.next_available) % u64::from(self.ring.size);
        let head = self.number(self.ring.available + 4 + 2 * slot, 2)?;
        let bytes = self.follow(head)?;
        self.ring.next_available = self.ring.next_available.wrapping_add(1);
        Some(Some((head, bytes)))
    }

    fn follow(&self, head: u64) -> Option<Bytes> {
        let (mut table, mut size, mut at, mut seen) = (self.ring.descriptors, u64::from(self.ring.size), head, 0);
        let (mut readable, mut writable, mut within, mut total) = (Vec::new(), Vec::new(), false, 0u64);
        loop {
            // As many as the table has is all there can be without a loop.
            if at >= size || seen == size {
                return None;
            }
            seen += 1;
            let here = table + 16 * at;
            let (addr, length) = (self.number(here, 8)?, self.number(here + 8, 4)?);
            let (flags, next) = (self.number(here + 12, 2)?, self.number(here + 14, 2)?);
            if length > 0 {
                let end = u128::from(addr) + u128::from(length);
                if end > self.ram.len() as u128 {
                    return None;
                }
            }
            if flags & 4 != 0 {
                let whole = length % 16 == 0 && (1..=1024).contains(&(length / 16));
                if within || flags & 1 != 0 || !whole {
                    return None;
                }
                (table, size, at, seen, within) = (addr, length / 16, 0, 0, true);
                continue;
            }
            total += length;
            if total >= 1 << 32 || flags & 2 == 0 && !writable.is_empty() {
                return None;
            }
            let range = addr as usize..addr.wrapping_add(length) as usize;
            if flags & 2 != 0 {
                writable.extend(range);
            } else {
                readable.extend(range);
            }
            if flags & 1 == 0 {
                return Some((readable, writable));
            }
            at = next;
        }
    }

    fn echo(&mut self, head: u64, (readable, writable): &Bytes) {
        let bytes: Vec<_> = readable.iter().map(|at| self.ram[*at]).collect();
        let written = bytes.len().min(writable.len());
        writable.iter().zip(bytes).for_each(|(at, byte)| self.ram[*at] = byte);
        let slot = u64::from(self.ring.next_used) % u64::from(self.ring.size);
        let entry = [(head as u32).to_le_bytes(), (written as u32).to_le_bytes()].concat();
        self.put(self.ring.used + 4 + 8 * slot, &entry);
        self.ring.next_used = self.ring.next_used.wrapping_add(1);
        self.put(self.ring.used + 2, &self.ring.next_used.to_le_bytes());
    }
}

/// What a driver does.
#[derive(Debug, Clone)]
enum Act {
    /// Writes a descriptor.
    Describe(u16, Descriptor),
    /// Writes one into a table of its own.
    Within(u16, Descriptor),
    /// Puts a head where the next is looked for, and so many more into the index.
    Offer(u16, u16),
    /// Writes anything anywhere.
    Poke(u16, u16),
    Ring,
}

const TABLE: u64 = 0x3000;
const HEAPS: u64 = 0x4000;

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let addr = prop_oneof![
        12 => HEAPS..HEAPS + 0x2000,
        2 => Just(TABLE),
        1 => 0..0x1000u64,
        1 => prop::sample::select(vec![SMALL as u64 - 8, SMALL as u64, u64::MAX, u64::MAX - 31, 0xfee0_0000, 1 << 63]),
    ];
    let size = prop_oneof![
        10 => 0..64u32,
        4 => prop::sample::select(vec![16u32, 32, 64, 128]),
        1 => prop::sample::select(vec![0, 0x1000, 0x8000, 0x8001, u32::MAX, u32::MAX - 15]),
    ];
    let flags = prop::sample::select(vec![0, 0, 0, 2, 2, 2, 1, 1, 1, 3, 3, 4, 4, 5, 6, 7, 0xfff8]);
    (addr, size, flags, prop_oneof![20 => 0..8u16, 1 => any::<u16>()])
        .prop_map(|(addr, size, flags, next)| Descriptor { addr, size, flags, next })
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        6 => (0..8u16, descriptor()).prop_map(|(at, descriptor)| Act::Describe(at, descriptor)),
        3 => (0..8u16, descriptor()).prop_map(|(at, descriptor)| Act::Within(at, descriptor)),
        6 => (prop_oneof![30 => 0..8u16, 1 => any::<u16>()], prop_oneof![30 => Just(1u16), 1 => any::<u16>()])
            .prop_map(|(head, more)| Act::Offer(head, more)),
        1 => (0..0x7000u16, any::<u16>()).prop_map(|(at, value)| Act::Poke(at, value)),
        4 => Just(Act::Ring),
    ]
}

/// Rings side by side, most often; else inside each other, or inside the buffers; some about to wrap around.
fn ring() -> impl Strategy<Value = Ring> {
    let place = |good: u64| prop_oneof![12 => Just(good), 1 => (0..0x600u64).prop_map(|at| at * 16)];
    let size = prop::sample::select(vec![1, 2, 4, 8, 8, 8, 16]);
    let age = prop_oneof![Just(0), Just(65_530u16), any::<u16>()];
    (size, place(0), place(0x1000), place(0x2000), age).prop_map(|(size, descriptors, available, used, age)| Ring {
        size,
        ready: true,
        descriptors,
        available,
        used,
        next_available: age,
        next_used: age,
    })
}

fn small() -> Memory {
    Memory::new(&[Span { start: 0, size: SMALL as u64 }], false).unwrap()
}

fn contents(memory: &Memory) -> Vec<u8> {
    let mut all = vec![0; SMALL];
    memory.read(0, &mut all).unwrap();
    all
}

#[test]
fn p21_any_driver_finds_the_same_bytes_as_with_the_reference() {
    let config = ProptestConfig { failure_persistence: None, cases: 1000, ..ProptestConfig::default() };
    let mut seen = [0u32; 3];
    let seen_by = std::cell::RefCell::new(&mut seen);
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let result = runner.run(&(ring(), any::<bool>(), vec(act(), 1..60)), |(ring, event_idx, acts)| {
        let memory = small();
        // A canary everywhere but where an index and the flags begin.
        memory.write(0, &vec![0xc5; SMALL]).unwrap();
        memory.write(ring.descriptors, &vec![0; 16 * usize::from(ring.size)]).unwrap();
        memory.write(ring.available, &[[0, 0], ring.next_available.to_le_bytes()].concat()).unwrap();
        let mut active = Active::new(vec![Queue::new(&memory, ring, [event_idx, true], Arc::<TestWire>::default())], 0);
        let mut echo = Echo::default();
        let mut reference = Reference { ram: contents(&memory), ring, event_idx, quiet: true, broken: false };
        for act in acts {
            let mut both = |at: u64, bytes: &[u8]| {
                memory.write(at, bytes).unwrap();
                reference.put(at, bytes);
            };
            let slot = 16 * u64::from(ring.size.min(8));
            match act {
                Act::Describe(at, descriptor) => {
                    both(ring.descriptors + 16 * u64::from(at) % slot, &descriptor.bytes());
                }
                Act::Within(at, descriptor) => both(TABLE + 16 * u64::from(at), &descriptor.bytes()),
                Act::Poke(at, value) => both(at.into(), &value.to_le_bytes()),
                Act::Offer(head, more) => {
                    let index = memory.load_u16(ring.available + 2).unwrap();
                    both(ring.available + 4 + 2 * u64::from(index % ring.size), &head.to_le_bytes());
                    both(ring.available + 2, &index.wrapping_add(more).to_le_bytes());
                }
                Act::Ring => {
                    active.queues[0].refill();
                    echo.service(Wake::Queue(0), &mut active);
                    active.queues[0].tell();
                    reference.serve();
                    let queue = &active.queues[0];
                    prop_assert_eq!((queue.is_broken(), queue.ring()), (reference.broken, reference.ring));
                    let (ours, theirs) = (contents(&memory), &reference.ram);
                    let differ = || ours.iter().zip(theirs).position(|(ours, theirs)| ours != theirs);
                    prop_assert!(ours == *theirs, "RAM differs from the reference's at {:x?}", differ());
                }
            }
        }
        let mut seen = seen_by.borrow_mut();
        seen[0] += u32::from(reference.broken);
        seen[1] += u32::from(echo.chains > 0);
        seen[2] += u32::from(echo.chains > 4);
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
    // The test means something: many are found out, many are served, many for long.
    assert!(seen.iter().all(|count| *count > 10), "{seen:?}");
}
