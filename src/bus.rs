//! Devices and the two buses (ports and memory) that find them.
//!
//! Everything that is the same for all devices is done here, once: finding the device, byte order, accesses wider than
//! a register, string I/O, and the empty bus. **The empty bus reads all ones and drops what is written**; both are
//! counted.
//!
//! Invariant: after `Buses::new` the map never changes, so finding a device takes no lock. Each device has a lock of
//! its own; a device is never called with another device's lock held.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

pub use crate::config::Space;
use crate::memory::Span;

/// What a device asks of the machine in return for a register write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Go on.
    None,
    /// Reset the machine.
    Reset,
    /// Switch the machine off.
    PowerOff,
    /// The guest wrote this value to the debug-exit register.
    Exit(u64),
    /// A console has shown the text of `--until`.
    Until,
    /// The guest's kernel says that it has panicked.
    Panicked,
}

/// A device's volatile state, in a form a person can read.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Saved {
    /// The version of this device's own state type.
    pub version: u32,
    /// The state.
    pub state: serde_json::Value,
}

/// Something with registers.
///
/// Offsets count from the first byte the device was attached with. A width is 1, 2, 4 or 8 bytes and never more than
/// [`Device::width`]; an access never crosses the end of the device. Values are zero-extended; the bus drops what does
/// not fit the width.
pub trait Device: Send {
    /// The device's name in traces and snapshots.
    fn name(&self) -> &'static str;

    /// The name of what answers at `offset`, where several share one device (a bus behind this bus).
    fn name_at(&self, _offset: u64) -> &'static str {
        self.name()
    }

    /// The name of the register at `offset`, as its manual has it.
    fn register(&self, offset: u64, write: bool) -> &'static str;

    /// The widest access the device takes whole, in bytes; the bus splits wider ones, low bytes first.
    fn width(&self) -> usize {
        1
    }

    /// A read of `width` bytes at `offset`.
    fn read(&mut self, offset: u64, width: usize) -> u64;

    /// A write of `width` bytes at `offset`.
    fn write(&mut self, offset: u64, width: usize, value: u64) -> Effect;

    /// Puts the device into its state after power-on; wires stay as they are.
    fn reset(&mut self);

    /// The host has something for the device on one of its wires (console input).
    fn service(&mut self) {}

    /// A CPU has come to the end of the interrupt with this vector (of level-triggered ones only).
    fn end_of_interrupt(&mut self, _vector: u8) {}

    /// The device's volatile state.
    fn save(&self) -> Saved;

    /// Takes over a state; an error leaves the device as it was.
    fn load(&mut self, saved: &Saved) -> anyhow::Result<()>;
}

/// Why KVM_RUN returned, in the words of no architecture.
#[derive(Debug)]
pub enum Exit<'a> {
    /// The guest reads: `data` holds one or more elements of `width` bytes (more for string I/O) and is to be filled.
    Read {
        /// Ports or memory.
        space: Space,
        /// The guest's address.
        addr: u64,
        /// Bytes in one element.
        width: usize,
        /// Where the answer goes.
        data: &'a mut [u8],
    },
    /// The guest writes `data`, one or more elements of `width` bytes.
    Write {
        /// Ports or memory.
        space: Space,
        /// The guest's address.
        addr: u64,
        /// Bytes in one element.
        width: usize,
        /// What is written.
        data: &'a [u8],
    },
    /// HLT on a machine whose interrupt controllers are not in KVM.
    Halt,
    /// The end of a level-triggered interrupt with this vector, where the I/O APIC is not in KVM.
    EndOfInterrupt(u8),
    /// The CPU shut down (a triple fault on x86).
    Shutdown,
    /// KVM_EXIT_SYSTEM_EVENT: its type and data words.
    System {
        /// KVM_SYSTEM_EVENT_*.
        event: u32,
        /// What came with it.
        data: Vec<u64>,
    },
    /// KVM_EXIT_DEBUG.
    Debug,
    /// A signal, a kick or an interrupt window: nothing that the guest did.
    Interrupted,
    /// The guest, or KVM under it, cannot go on.
    Fault(Box<FaultInfo>),
}

/// A fatal exit, by the name the KVM API document has for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultInfo {
    /// `KVM_EXIT_…`, or the system call that failed.
    pub name: String,
    /// What came with it, in words and numbers.
    pub detail: String,
    /// Instruction bytes that KVM reported; may be empty.
    pub bytes: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
struct Range {
    base: u64,
    /// Address of the last byte, so that a range may end at 2^64.
    last: u64,
    /// Offset in the device of the range's first byte.
    offset: u64,
    /// The device's own `width`.
    width: usize,
    device: DeviceId,
}

/// Names a device of one machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceId(usize);

/// A range that a device occupies, for `layout` and for reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Occupied {
    /// Ports or memory.
    pub space: Space,
    /// First address.
    pub base: u64,
    /// Last address.
    pub last: u64,
    /// The device's name.
    pub name: &'static str,
}

/// Collects devices; [`Builder::finish`] makes the buses.
#[derive(Default)]
pub struct Builder {
    pio: Vec<Range>,
    mmio: Vec<Range>,
    devices: Vec<Mutex<Box<dyn Device>>>,
    controller: Option<DeviceId>,
}

impl Builder {
    /// Makes a device the one that is told of ends of interrupt.
    pub fn hears_ends(&mut self, id: DeviceId) {
        self.controller = Some(id);
    }

    /// Adds a device; it answers nowhere yet.
    pub fn add(&mut self, device: impl Device + 'static) -> DeviceId {
        self.devices.push(Mutex::new(Box::new(device)));
        DeviceId(self.devices.len() - 1)
    }

    /// Lets a device answer at `at`; `offset` is the device's own offset of the first byte.
    ///
    /// # Errors
    /// An empty range, one that wraps, leaves the port space, or overlaps another device.
    pub fn attach(&mut self, id: DeviceId, space: Space, at: Span, offset: u64) -> anyhow::Result<()> {
        let limit = if space == Space::Pio { 0xffff } else { u64::MAX };
        let base = at.start;
        let last = Span::new(base, at.size).map(|span| span.last()).filter(|&last| last <= limit);
        let device = self.devices.get(id.0).ok_or_else(|| anyhow::anyhow!("no such device"))?;
        let (name, width) = {
            let device = lock(device);
            (device.name(), device.width())
        };
        let Some(last) = last else { anyhow::bail!("{name} at {base:#x}: {} bytes do not fit there", at.size) };
        let ranges = if space == Space::Pio { &mut self.pio } else { &mut self.mmio };
        let at = ranges.partition_point(|r| r.base <= base);
        let clash = [at.checked_sub(1), Some(at)].into_iter().flatten().filter_map(|i| ranges.get(i));
        if let Some(other) = clash.into_iter().find(|r| r.base <= last && base <= r.last) {
            anyhow::bail!("{name} at {base:#x}..={last:#x} overlaps {:#x}..={:#x}", other.base, other.last);
        }
        ranges.insert(at, Range { base, last, offset, width, device: id });
        Ok(())
    }

    /// Adds a device that answers at one range, with offset 0 at its first byte.
    ///
    /// # Errors
    /// As [`Builder::attach`].
    pub fn place(&mut self, space: Space, at: Span, device: impl Device + 'static) -> anyhow::Result<DeviceId> {
        let id = self.add(device);
        self.attach(id, space, at, 0)?;
        Ok(id)
    }

    /// The finished buses.
    pub fn finish(self) -> Arc<Buses> {
        Arc::new(Buses {
            pio: self.pio,
            mmio: self.mmio,
            devices: self.devices,
            controller: self.controller,
            missed: AtomicU64::new(0),
            first: Mutex::new(None),
        })
    }
}

/// The port and the memory bus of one machine, and its devices.
pub struct Buses {
    pio: Vec<Range>,
    mmio: Vec<Range>,
    devices: Vec<Mutex<Box<dyn Device>>>,
    controller: Option<DeviceId>,
    missed: AtomicU64,
    first: Mutex<Option<Miss>>,
}

/// An access that no device answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Miss {
    /// Ports or memory.
    pub space: Space,
    /// The guest's address.
    pub addr: u64,
    /// Bytes of the access.
    pub width: usize,
    /// The guest wrote.
    pub write: bool,
}

impl std::fmt::Display for Miss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = match (self.space, self.write) {
            (Space::Pio, true) => "out",
            (Space::Pio, false) => "in",
            (Space::Mmio, true) => "write",
            (Space::Mmio, false) => "read",
        };
        write!(f, "{what} {:#06x} ({} bytes)", self.addr, self.width)
    }
}

/// A poisoned lock means that a device panicked, and a panic ends the process; so the state behind it is never used.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Buses {
    fn find(&self, space: Space, addr: u64) -> Option<&Range> {
        let ranges = if space == Space::Pio { &self.pio } else { &self.mmio };
        let below = ranges.partition_point(|r| r.base <= addr).checked_sub(1)?;
        ranges.get(below).filter(|r| addr <= r.last)
    }

    fn device(&self, range: &Range) -> MutexGuard<'_, Box<dyn Device>> {
        // A range is only made by `attach`, which has checked its device.
        #[allow(clippy::indexing_slicing)]
        lock(&self.devices[range.device.0])
    }

    /// The largest part of a `width`-byte access at `addr` that goes one way: to one device, in a width it takes, or to
    /// no device.
    fn part(&self, space: Space, addr: u64, width: usize) -> (usize, Option<&Range>) {
        let Some(range) = self.find(space, addr) else {
            let next = (1..width).find(|&i| self.find(space, step(space, addr, i)).is_some());
            return (next.unwrap_or(width), None);
        };
        let room = usize::try_from(range.last - addr).unwrap_or(width).saturating_add(1);
        let most = width.min(range.width).min(room);
        (1 << most.max(1).ilog2().min(3), Some(range))
    }

    /// Reads one element into `data`.
    fn read_element(&self, space: Space, addr: u64, data: &mut [u8]) {
        let mut done = 0;
        while let Some(rest) = data.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let addr = step(space, addr, done);
            let (width, range) = self.part(space, addr, rest.len());
            let value = match range {
                Some(range) => self.device(range).read(addr - range.base + range.offset, width).to_le_bytes(),
                None => {
                    self.miss(Miss { space, addr, width, write: false });
                    [0xff; 8]
                }
            };
            // Where there is no device a part may be longer than a register.
            for (i, byte) in rest.iter_mut().take(width).enumerate() {
                *byte = value.get(i).copied().unwrap_or(0xff);
            }
            done += width;
        }
    }

    /// Writes one element; the effect is that of the first part that has one, and ends the element.
    fn write_element(&self, space: Space, addr: u64, data: &[u8]) -> Effect {
        let mut done = 0;
        while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
            let addr = step(space, addr, done);
            let (width, range) = self.part(space, addr, rest.len());
            match range {
                Some(range) => {
                    let value = rest.iter().take(width).rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
                    let effect = self.device(range).write(addr - range.base + range.offset, width, value);
                    if effect != Effect::None {
                        return effect;
                    }
                }
                None => self.miss(Miss { space, addr, width, write: true }),
            }
            done += width;
        }
        Effect::None
    }

    fn miss(&self, miss: Miss) {
        if self.missed.fetch_add(1, Ordering::Relaxed) == 0 {
            *lock(&self.first) = Some(miss);
        }
    }

    /// Answers an exit that reads: each element of `data` in turn, little-endian, as `rep ins` does.
    pub fn read(&self, space: Space, addr: u64, width: usize, data: &mut [u8]) {
        for element in data.chunks_mut(width.max(1)) {
            self.read_element(space, addr, element);
        }
    }

    /// Carries out an exit that writes: each element of `data` in turn, as `rep outs` does. An effect ends the string.
    pub fn write(&self, space: Space, addr: u64, width: usize, data: &[u8]) -> Effect {
        let effects = data.chunks(width.max(1)).map(|element| self.write_element(space, addr, element));
        effects.into_iter().find(|effect| *effect != Effect::None).unwrap_or(Effect::None)
    }

    /// Tells the interrupt controller that a CPU has come to the end of an interrupt.
    pub fn end_of_interrupt(&self, vector: u8) {
        if let Some(device) = self.controller.and_then(|id| self.devices.get(id.0)) {
            lock(device).end_of_interrupt(vector);
        }
    }

    /// Tells a device that the host has something for it. False where a vCPU is in the device at this moment: the
    /// event loop must not wait for it, since the vCPU may be waiting for the event loop to write its output.
    #[must_use]
    pub fn service(&self, id: DeviceId) -> bool {
        let Some(device) = self.devices.get(id.0) else { return true };
        match device.try_lock() {
            Ok(mut device) => device.service(),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner().service(),
            Err(TryLockError::WouldBlock) => return false,
        }
        true
    }

    /// The names of the device and the register at an address.
    pub fn name(&self, space: Space, addr: u64, write: bool) -> Option<(&'static str, &'static str)> {
        let range = self.find(space, addr)?;
        let device = self.device(range);
        let offset = addr - range.base + range.offset;
        Some((device.name_at(offset), device.register(offset, write)))
    }

    /// The number of the device at an address, as [`Buses::names`] counts them. Takes no lock.
    pub fn at(&self, space: Space, addr: u64) -> Option<usize> {
        self.find(space, addr).map(|range| range.device.0)
    }

    /// The names of all devices.
    pub fn names(&self) -> Vec<&'static str> {
        self.devices.iter().map(|device| lock(device).name()).collect()
    }

    /// The name and the state of each device.
    pub fn save(&self) -> Vec<(String, Saved)> {
        let one = |device: &Mutex<Box<dyn Device>>| {
            let device = lock(device);
            (device.name().to_owned(), device.save())
        };
        self.devices.iter().map(one).collect()
    }

    /// Gives each device its state.
    ///
    /// # Errors
    /// They are not those of the devices that are here, or one refuses.
    pub fn load(&self, saved: &[(String, Saved)]) -> anyhow::Result<()> {
        let names = self.names();
        if !names.iter().eq(saved.iter().map(|(name, _)| name)) {
            let told: Vec<_> = saved.iter().map(|(name, _)| name.as_str()).collect();
            anyhow::bail!("the devices here are {}, and the state is that of {}", names.join(", "), told.join(", "));
        }
        self.devices.iter().zip(saved).try_for_each(|(device, (_, saved))| lock(device).load(saved))
    }

    /// How many accesses found no device, and the first of them.
    pub fn misses(&self) -> (u64, Option<Miss>) {
        (self.missed.load(Ordering::Relaxed), *lock(&self.first))
    }

    /// Every range that a device answers at, in the order of space and address.
    pub fn map(&self) -> Vec<Occupied> {
        let ranges = self.pio.iter().map(|r| (Space::Pio, r)).chain(self.mmio.iter().map(|r| (Space::Mmio, r)));
        ranges.map(|(space, r)| Occupied { space, base: r.base, last: r.last, name: self.device(r).name() }).collect()
    }
}

/// The address `by` bytes on; ports wrap at 2^16.
fn step(space: Space, addr: u64, by: usize) -> u64 {
    let next = addr.wrapping_add(by as u64);
    if space == Space::Pio { next & 0xffff } else { next }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Log = Arc<Mutex<Vec<(u64, usize, Option<u64>)>>>;

    /// Four bytes of storage that remember how they were accessed.
    struct Cells {
        bytes: [u8; 4],
        width: usize,
        log: Log,
    }

    impl Device for Cells {
        fn name(&self) -> &'static str {
            "cells"
        }
        fn register(&self, _offset: u64, _write: bool) -> &'static str {
            "CELL"
        }
        fn width(&self) -> usize {
            self.width
        }
        fn read(&mut self, offset: u64, width: usize) -> u64 {
            lock(&self.log).push((offset, width, None));
            let start = usize::try_from(offset).unwrap();
            self.bytes[start..start + width].iter().rev().fold(0, |v, b| v << 8 | u64::from(*b))
        }
        fn write(&mut self, offset: u64, width: usize, value: u64) -> Effect {
            lock(&self.log).push((offset, width, Some(value)));
            if value == 0xee { Effect::Exit(7) } else { Effect::None }
        }
        fn reset(&mut self) {}
        fn save(&self) -> Saved {
            Saved { version: 1, state: serde_json::Value::Null }
        }
        fn load(&mut self, _saved: &Saved) -> anyhow::Result<()> {
            Ok(())
        }
    }

    fn value(buses: &Buses, space: Space, addr: u64, width: usize) -> u64 {
        let mut bytes = [0; 8];
        buses.read(space, addr, width, &mut bytes[..width]);
        u64::from_le_bytes(bytes)
    }

    fn buses(width: usize) -> (Arc<Buses>, Log) {
        let log = Log::default();
        let mut builder = Builder::default();
        let cells = Cells { bytes: [0x11, 0x22, 0x33, 0x44], width, log: log.clone() };
        builder.place(Space::Pio, Span { start: 0x100, size: 4 }, cells).unwrap();
        (builder.finish(), log)
    }

    #[test]
    fn the_empty_bus_reads_ones_drops_writes_and_counts() {
        let (buses, log) = buses(1);
        let mut data = [0; 4];
        buses.read(Space::Pio, 0x10, 4, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert_eq!(buses.write(Space::Mmio, 0x100, 4, &data), Effect::None);
        let first = Miss { space: Space::Pio, addr: 0x10, width: 4, write: false };
        assert_eq!(buses.misses(), (2, Some(first)));
        assert!(lock(&log).is_empty());
    }

    #[test]
    fn a_wide_access_to_a_narrow_device_is_split_low_byte_first() {
        let (buses, log) = buses(1);
        assert_eq!(value(&buses, Space::Pio, 0x100, 4), 0x4433_2211);
        buses.write(Space::Pio, 0x100, 2, &[0xcd, 0xab]);
        let log = lock(&log).clone();
        assert_eq!(log[4..], [(0, 1, Some(0xcd)), (1, 1, Some(0xab))]);
    }

    #[test]
    fn a_wide_device_takes_a_wide_access_whole() {
        let (buses, log) = buses(4);
        assert_eq!(value(&buses, Space::Pio, 0x100, 4), 0x4433_2211);
        assert_eq!(*lock(&log), [(0, 4, None)]);
    }

    #[test]
    fn an_access_across_either_end_reaches_the_device_with_its_own_part() {
        let (buses, _) = buses(4);
        assert_eq!(value(&buses, Space::Pio, 0x102, 4), 0xffff_4433);
        assert_eq!(value(&buses, Space::Pio, 0xfe, 4), 0x2211_ffff);
        assert_eq!(value(&buses, Space::Pio, 0xff, 4), 0x3322_11ff);
        assert_eq!(value(&buses, Space::Pio, 0xffff, 2), 0xffff);
        assert_eq!(value(&buses, Space::Mmio, u64::MAX, 8), u64::MAX);
    }

    #[test]
    fn string_io_goes_element_by_element_to_the_same_port() {
        let (buses, log) = buses(4);
        assert_eq!(buses.write(Space::Pio, 0x100, 2, &[1, 0, 2, 0, 3, 0]), Effect::None);
        assert_eq!(*lock(&log), [(0, 2, Some(1)), (0, 2, Some(2)), (0, 2, Some(3))]);
        let mut data = [0; 4];
        buses.read(Space::Pio, 0x101, 2, &mut data);
        assert_eq!(data, [0x22, 0x33, 0x22, 0x33]);
    }

    #[test]
    fn an_effect_ends_a_string() {
        let (buses, log) = buses(1);
        assert_eq!(buses.write(Space::Pio, 0x100, 1, &[1, 0xee, 2]), Effect::Exit(7));
        assert_eq!(lock(&log).len(), 2);
    }

    #[test]
    fn odd_widths_are_split_into_what_the_device_takes() {
        let (buses, log) = buses(2);
        assert_eq!(value(&buses, Space::Pio, 0x100, 3), 0x33_2211);
        assert_eq!(*lock(&log), [(0, 2, None), (2, 1, None)]);
        for width in [0, 3, 5, 6, 7, 9, 16] {
            let mut data = [0; 16];
            buses.read(Space::Pio, 0xff, width, &mut data);
            buses.write(Space::Pio, 0xff, width, &data);
        }
    }

    #[test]
    fn overlap_and_wrap_are_refused() {
        let (_, log) = buses(1);
        let cells = || Cells { bytes: [0; 4], width: 1, log: log.clone() };
        let mut builder = Builder::default();
        builder.place(Space::Pio, Span { start: 0x10, size: 4 }, cells()).unwrap();
        for base in [0xd, 0x10, 0x12, 0x13] {
            assert!(builder.place(Space::Pio, Span { start: base, size: 4 }, cells()).is_err());
        }
        assert!(builder.place(Space::Pio, Span { start: 0xfffe, size: 4 }, cells()).is_err());
        assert!(builder.place(Space::Mmio, Span { start: u64::MAX, size: 2 }, cells()).is_err());
        assert!(builder.place(Space::Pio, Span { start: 0x20, size: 0 }, cells()).is_err());
        builder.place(Space::Mmio, Span { start: u64::MAX, size: 1 }, cells()).unwrap();
        builder.place(Space::Pio, Span { start: 0xc, size: 4 }, cells()).unwrap();
    }
}
