//! The memory-mapped transport (VIRTIO 1.3 §4.2, version 2): one page of registers for each device.
//!
//! Invariant: the interrupt line is high exactly while InterruptStatus is not zero.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::link::{Isr, Lines, Link, QUEUE_INTERRUPT, Reason, SPACE_INTERRUPT, State};
use crate::bus::{Device, Effect, Saved};
use crate::irq::IrqLine;

/// Of the saved state.
const VERSION: u32 = 1;
/// The register of notifications.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Where the configuration space begins.
const SPACE: u64 = 0x100;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// Of the transport (§4.2.2).
const TRANSPORT: u32 = 2;
/// Who made the device: any number, "BANT".
const VENDOR: u32 = 0x544e_4142;

/// A virtio device behind memory-mapped registers.
pub struct Mmio {
    // Wires
    isr: Arc<Isr>,
    // State
    link: Link,
}

#[derive(Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Whole {
    isr: u8,
    link: State,
}

impl Mmio {
    /// A device with its interrupt, a level.
    pub fn new(link: Link, line: Box<dyn IrqLine>) -> Self {
        Self { isr: Isr::new(line), link }
    }

    /// The device behind the registers.
    pub fn link(&self) -> &Link {
        &self.link
    }

    fn start(&mut self) {
        let reason = |why| Arc::new(Reason(self.isr.clone(), why)) as Arc<dyn IrqLine>;
        let queues = self.link.kind().queues.iter().map(|_| reason(QUEUE_INTERRUPT)).collect();
        let space = reason(SPACE_INTERRUPT);
        self.link.start(Lines { queues, space });
    }

    fn write_status(&mut self, value: u8) {
        if self.link.set_status(value) {
            self.start();
        }
        if value == 0 {
            self.isr.change(|_| 0);
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let low = |address: &mut u64| *address = *address & !0xffff_ffff | u64::from(value);
        let high = |address: &mut u64| *address = *address & 0xffff_ffff | u64::from(value) << 32;
        let link = &mut self.link;
        match offset {
            0x014 => *link.offered_select() = value,
            0x020 => link.accept(value),
            0x024 => *link.accepted_select() = value,
            0x030 => *link.selected() = u16::try_from(value).unwrap_or(u16::MAX),
            // 0 is no size; what does not fit leaves it as it was.
            0x038 => link.set_ring(|ring| ring.size = u16::try_from(value).unwrap_or(u16::MAX)),
            0x044 if value == 0 => link.close_ring(),
            0x044 => link.set_ring(|ring| ring.ready = true),
            QUEUE_NOTIFY => link.notify(value.into()),
            0x064 => {
                self.isr.change(|bits| bits & !value.to_le_bytes()[0]);
            }
            0x070 => self.write_status(value.to_le_bytes()[0]),
            0x080 => link.set_ring(|ring| low(&mut ring.descriptors)),
            0x084 => link.set_ring(|ring| high(&mut ring.descriptors)),
            0x090 => link.set_ring(|ring| low(&mut ring.available)),
            0x094 => link.set_ring(|ring| high(&mut ring.available)),
            0x0a0 => link.set_ring(|ring| low(&mut ring.used)),
            0x0a4 => link.set_ring(|ring| high(&mut ring.used)),
            _ => {}
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            0x000 => MAGIC,
            0x004 => TRANSPORT,
            0x008 => self.link.kind().id.into(),
            0x00c => VENDOR,
            0x010 => self.link.offered(),
            0x034 => self.link.most().into(),
            0x044 => self.link.ring().is_some_and(|ring| ring.ready).into(),
            0x060 => self.isr.bits().into(),
            0x070 => self.link.status().into(),
            // No shared memory: a length and a base of all ones (§4.2.2).
            0x0b0..=0x0bc => u32::MAX,
            0x0fc => self.link.generation(),
            _ => 0,
        }
    }
}

impl Device for Mmio {
    fn name(&self) -> &'static str {
        self.link.kind().name
    }

    fn register(&self, offset: u64, _write: bool) -> &'static str {
        match offset & !3 {
            0x000 => "MagicValue",
            0x004 => "Version",
            0x008 => "DeviceID",
            0x00c => "VendorID",
            0x010 => "DeviceFeatures",
            0x014 => "DeviceFeaturesSel",
            0x020 => "DriverFeatures",
            0x024 => "DriverFeaturesSel",
            0x030 => "QueueSel",
            0x034 => "QueueSizeMax",
            0x038 => "QueueSize",
            0x044 => "QueueReady",
            QUEUE_NOTIFY => "QueueNotify",
            0x060 => "InterruptStatus",
            0x064 => "InterruptACK",
            0x070 => "Status",
            0x080 => "QueueDescLow",
            0x084 => "QueueDescHigh",
            0x090 => "QueueDriverLow",
            0x094 => "QueueDriverHigh",
            0x0a0 => "QueueDeviceLow",
            0x0a4 => "QueueDeviceHigh",
            0x0ac => "SHMSel",
            0x0b0..=0x0bc => "SHM",
            0x0fc => "ConfigGeneration",
            SPACE.. => "Config",
            _ => "reserved",
        }
    }

    fn width(&self) -> usize {
        4
    }

    fn read(&mut self, offset: u64, width: usize) -> u64 {
        match offset.checked_sub(SPACE) {
            Some(at) => self.link.space(at, width),
            None if width == 4 && offset.is_multiple_of(4) => self.read_register(offset).into(),
            None => 0,
        }
    }

    fn write(&mut self, offset: u64, width: usize, value: u64) -> Effect {
        match offset.checked_sub(SPACE) {
            Some(at) => self.link.set_space(at, width, value),
            None if width == 4 && offset.is_multiple_of(4) => self.write_register(offset, (value & 0xffff_ffff) as u32),
            None => {}
        }
        Effect::None
    }

    fn reset(&mut self) {
        self.link.reset();
        self.isr.change(|_| 0);
    }

    fn save(&self) -> Saved {
        let whole = Whole { link: self.link.save(), isr: self.isr.bits() };
        crate::device::wrap(VERSION, &whole)
    }

    fn load(&mut self, saved: &Saved) -> Result<()> {
        let name = self.name();
        let whole: Whole = crate::device::unwrap(name, VERSION, saved)?;
        if whole.isr & !(QUEUE_INTERRUPT | SPACE_INTERRUPT) != 0 {
            bail!("{name}: its saved interrupt status has bits that do not exist");
        }
        let loaded = self.link.load(&whole.link).context(name);
        if loaded.is_ok() {
            self.isr.change(|_| whole.isr);
        }
        if self.link.is_due() {
            self.start();
        }
        loaded
    }
}
