//! The PCI transport (VIRTIO 1.3 §4.1, modern devices): one BAR with all registers, and the capabilities that say where.
//!
//! Interrupts are MSI-X where the host can send messages, INTx else or where the driver leaves MSI-X off. Invariants: the
//! doorbells are connected exactly where the BAR lies, while it answers; an interrupt goes where the registers say when it
//! is raised.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::link::{Isr, Lines, Link, QUEUE_INTERRUPT, Reason, SPACE_INTERRUPT, State};
use crate::bus::Saved;
use crate::device::pci::Function;
use crate::device::pci::config::{ConfigSpace, Identity};
use crate::device::pci::msix::{self, CONTROL, ENTRY, Msix};
use crate::irq::{Doorbells, IrqLine, MessageLine, Unconnected};

/// Of the saved state.
const VERSION: u32 = 1;

/// Red Hat's number, and that of the first modern device (§4.1.2).
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;
/// Modern devices have revision 1 or higher.
const REVISION: u8 = 1;

/// The BAR: common registers, interrupt status, configuration space, notifications, MSI-X.
pub const BAR_SIZE: u32 = 0x8000;
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const SPACE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
/// Bytes of each part.
const PART: u64 = 0x1000;
const COMMON_SIZE: u32 = 0x40;
/// Bytes between the doorbells of two queues.
const BELL: u32 = 4;

/// The vendor capability, and its kinds (§4.1.4).
const VENDOR_CAPABILITY: u8 = 9;
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;
/// In the capability for access without a BAR: which BAR, offset, length, data.
const WINDOW_BAR: usize = 4;
const WINDOW_OFFSET: usize = 8;
const WINDOW_LENGTH: usize = 12;
const WINDOW_DATA: usize = 16;

/// VIRTIO_MSI_NO_VECTOR
const NO_VECTOR: u16 = 0xffff;

/// The wires of a virtio PCI function.
#[derive(Default)]
pub struct Wires {
    /// INTA#, a level.
    pub intx: Option<Box<dyn IrqLine>>,
    /// What the guest reads as the number of that interrupt.
    pub intx_number: u8,
    /// MSI-X vectors; none where the host has none.
    pub messages: Vec<Box<dyn MessageLine>>,
    /// Doorbells that make no exit; none where they are to.
    pub doorbells: Option<Box<dyn Doorbells>>,
    /// Its BAR answers from the start, for guests that know no better.
    pub answers: bool,
}

/// Where interrupts can go.
struct Ways {
    isr: Arc<Isr>,
    /// The driver uses MSI-X.
    messages: AtomicBool,
    vectors: Vec<Arc<dyn IrqLine>>,
}

/// A reason to interrupt: a queue, or the configuration space.
struct Signal {
    ways: Arc<Ways>,
    intx: Reason,
    /// Which of the vectors, or none.
    vector: AtomicU16,
}

impl Signal {
    fn new(ways: &Arc<Ways>, why: u8) -> Arc<Self> {
        Arc::new(Self { ways: ways.clone(), intx: Reason(ways.isr.clone(), why), vector: AtomicU16::new(NO_VECTOR) })
    }

    fn vector(&self) -> u16 {
        self.vector.load(Ordering::Acquire)
    }

    fn set_vector(&self, vector: u16) {
        self.vector.store(vector, Ordering::Release);
    }
}

impl IrqLine for Signal {
    fn pulse(&self) {
        if !self.ways.messages.load(Ordering::Acquire) {
            self.intx.pulse();
        } else if let Some(line) = self.ways.vectors.get(usize::from(self.vector())) {
            line.pulse();
        }
    }

    fn set(&self, high: bool) {
        if high {
            self.pulse();
        }
    }
}

/// A virtio device behind PCI.
pub struct Pci {
    // Configuration
    msix_at: Option<usize>,
    window_at: usize,
    // Wires
    ways: Arc<Ways>,
    doorbells: Option<Box<dyn Doorbells>>,
    /// Where the doorbells are connected.
    connected: Option<u64>,
    // State
    config: ConfigSpace,
    msix: Msix,
    link: Link,
    space_signal: Arc<Signal>,
    signals: Vec<Arc<Signal>>,
}

#[derive(Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Whole {
    config: Vec<u8>,
    msix: msix::State,
    isr: u8,
    link: State,
    space_vector: u16,
    vectors: Vec<u16>,
}

/// A vendor capability behind its id and link: length, kind, BAR 0, where and how long, and what follows.
fn capability(kind: u8, at: u64, size: u32, more: &[u8]) -> Vec<u8> {
    let length = (16 + more.len()).to_le_bytes()[0];
    let at = ((at & 0xffff_ffff) as u32).to_le_bytes();
    [&[length, kind, 0, 0, 0, 0], &at[..], &size.to_le_bytes(), more].concat()
}

impl Pci {
    /// A device whose BAR lies at `address` after power-on.
    pub fn new(link: Link, address: u32, wires: Wires) -> Self {
        let kind = link.kind();
        let identity =
            Identity { id: [VENDOR, FIRST_DEVICE.saturating_add(kind.id)], class: kind.class, revision: REVISION };
        let mut config = ConfigSpace::new(&identity).with_bar(BAR_SIZE, address);
        if !wires.answers {
            config = config.silent();
        }
        if wires.intx.is_some() {
            config = config.with_intx(wires.intx_number);
        }
        let part = (PART & 0xffff) as u32;
        config.add_capability(VENDOR_CAPABILITY, &capability(COMMON_CFG, COMMON, COMMON_SIZE, &[]), &[]);
        config.add_capability(VENDOR_CAPABILITY, &capability(NOTIFY_CFG, NOTIFY, part, &BELL.to_le_bytes()), &[]);
        config.add_capability(VENDOR_CAPABILITY, &capability(ISR_CFG, ISR, part, &[]), &[]);
        config.add_capability(VENDOR_CAPABILITY, &capability(DEVICE_CFG, SPACE, part, &[]), &[]);
        let mut open = [0; 18];
        open.iter_mut().skip(WINDOW_OFFSET - 2).for_each(|byte| *byte = 0xff);
        open.iter_mut().skip(WINDOW_BAR - 2).take(1).for_each(|byte| *byte = 0xff);
        let window_at = config.add_capability(VENDOR_CAPABILITY, &capability(PCI_CFG, 0, 0, &[0; 4]), &open);
        let msix = Msix::new(wires.messages);
        let msix_at = msix.size().checked_sub(1).map(|last| {
            let [low, high, ..] = last.to_le_bytes();
            let (table, pending) = ((TABLE & 0xffff) as u32, (PENDING & 0xffff) as u32);
            let body = [&[low, high][..], &table.to_le_bytes(), &pending.to_le_bytes()].concat();
            config.add_capability(msix::CAPABILITY, &body, &CONTROL.to_le_bytes())
        });
        let isr = Isr::new(wires.intx.unwrap_or_else(|| Box::new(Unconnected)));
        let vectors = (0..=u16::MAX).map_while(|vector| msix.line(vector)).collect();
        let ways = Arc::new(Ways { isr, messages: AtomicBool::new(false), vectors });
        let doorbells = wires.doorbells;
        let mut new = Self {
            msix_at,
            window_at,
            space_signal: Signal::new(&ways, SPACE_INTERRUPT),
            signals: kind.queues.iter().map(|_| Signal::new(&ways, QUEUE_INTERRUPT)).collect(),
            ways,
            doorbells,
            connected: None,
            config,
            msix,
            link,
        };
        new.connect();
        new
    }

    /// Puts the doorbells where the BAR is now.
    fn connect(&mut self) {
        let at = self.config.bar().map(u64::from);
        if at == self.connected {
            return;
        }
        let Some(wires) = &self.doorbells else { return };
        for (base, on) in [(self.connected, false), (at, true)] {
            let Some(base) = base else { continue };
            for (bell, offset) in self.link.doorbells().iter().zip((0..).step_by(BELL as usize)) {
                wires.connect(base + NOTIFY + offset, bell, on);
            }
        }
        self.connected = at;
    }

    /// Message control, as the configuration space has it.
    fn control(&self) -> u16 {
        self.msix_at.map_or(0, |at| (self.config.read(at + 2, 2) & 0xffff) as u16)
    }

    /// What follows from a change of the configuration space.
    fn configured(&mut self) {
        self.connect();
        self.msix.set_control(self.control());
        self.route();
        self.config.set_live(self.window().is_some());
    }

    /// Lets interrupts go where the registers say.
    fn route(&self) {
        self.ways.messages.store(self.msix.is_enabled(), Ordering::Release);
        self.ways.isr.allow(self.config.may_interrupt() && !self.msix.is_enabled());
    }

    fn start(&mut self) {
        let queues = self.signals.iter().map(|signal| signal.clone() as _).collect();
        self.link.start(Lines { queues, space: self.space_signal.clone() });
    }

    /// A vector that the table has, or none (§4.1.5.1.2).
    fn vector(&self, value: u64) -> u16 {
        u16::try_from(value).ok().filter(|v| usize::from(*v) < self.msix.size()).unwrap_or(NO_VECTOR)
    }

    fn selected_signal(&mut self) -> Option<&Signal> {
        let selected = usize::from(*self.link.selected());
        self.signals.get(selected).map(Arc::as_ref)
    }

    /// The common registers as bytes: a read may be of any width (§4.1.4.3).
    fn common(&mut self) -> [u8; COMMON_SIZE as usize] {
        let ring = self.link.ring().copied().unwrap_or_default();
        let selected = *self.link.selected();
        let exists = self.link.ring().is_some();
        let vector = self.selected_signal().map_or(NO_VECTOR, Signal::vector);
        let queues = (self.signals.len() & 0xffff) as u16;
        let fields: [(usize, u64, usize); 18] = [
            (0x00, (*self.link.offered_select()).into(), 4),
            (0x04, self.link.offered().into(), 4),
            (0x08, (*self.link.accepted_select()).into(), 4),
            (0x0c, self.link.accepted().into(), 4),
            (0x10, self.space_signal.vector().into(), 2),
            (0x12, queues.into(), 2),
            (0x14, self.link.status().into(), 1),
            (0x15, (self.link.generation() & 0xff).into(), 1),
            (0x16, selected.into(), 2),
            (0x18, ring.size.into(), 2),
            (0x1a, vector.into(), 2),
            (0x1c, ring.ready.into(), 2),
            (0x1e, if exists { selected.into() } else { 0 }, 2),
            (0x20, ring.descriptors, 8),
            (0x28, ring.available, 8),
            (0x30, ring.used, 8),
            (0x38, 0, 4),
            (0x3c, 0, 4),
        ];
        let mut image = [0; COMMON_SIZE as usize];
        for (at, value, size) in fields {
            let places = image.iter_mut().skip(at).take(size);
            places.zip(value.to_le_bytes()).for_each(|(place, byte)| *place = byte);
        }
        image
    }

    fn write_common(&mut self, offset: u64, width: usize, value: u64) {
        let word = (value & 0xffff_ffff) as u32;
        let short = (value & 0xffff) as u16;
        let low = |address: &mut u64| *address = *address & !0xffff_ffff | u64::from(word);
        let high = |address: &mut u64| *address = *address & 0xffff_ffff | u64::from(word) << 32;
        match (offset, width) {
            (0x00, 4) => *self.link.offered_select() = word,
            (0x08, 4) => *self.link.accepted_select() = word,
            (0x0c, 4) => self.link.accept(word),
            (0x10, 2) => self.space_signal.set_vector(self.vector(value)),
            (0x14, 1) => self.write_status(word.to_le_bytes()[0]),
            (0x16, 2) => *self.link.selected() = short,
            (0x18, 2) => self.link.set_ring(|ring| ring.size = short),
            (0x1a, 2) => {
                let new = self.vector(value);
                self.selected_signal().into_iter().for_each(|signal| signal.set_vector(new));
            }
            // 0 must not be written (§4.1.4.3.2).
            (0x1c, 2) if short == 1 => self.link.set_ring(|ring| ring.ready = true),
            (0x20, 4) => self.link.set_ring(|ring| low(&mut ring.descriptors)),
            (0x24, 4) => self.link.set_ring(|ring| high(&mut ring.descriptors)),
            (0x28, 4) => self.link.set_ring(|ring| low(&mut ring.available)),
            (0x2c, 4) => self.link.set_ring(|ring| high(&mut ring.available)),
            (0x30, 4) => self.link.set_ring(|ring| low(&mut ring.used)),
            (0x34, 4) => self.link.set_ring(|ring| high(&mut ring.used)),
            _ => {}
        }
    }

    fn write_status(&mut self, value: u8) {
        if self.link.set_status(value) {
            self.start();
        }
        if value == 0 {
            self.ways.isr.change(|_| 0);
            self.signals.iter().chain([&self.space_signal]).for_each(|signal| signal.set_vector(NO_VECTOR));
        }
    }

    /// The access that the capability without a BAR describes: an offset and a width that the BAR has.
    fn window(&self) -> Option<(u64, usize)> {
        let field = |at| self.config.read(self.window_at + at, 4);
        let (offset, width) = (field(WINDOW_OFFSET), field(WINDOW_LENGTH));
        let fits = [1, 2, 4].contains(&width) && offset.is_multiple_of(width) && offset < BAR_SIZE;
        (fits && self.config.read(self.window_at + WINDOW_BAR, 1) == 0).then_some((offset.into(), width as usize))
    }

    fn touches_window(&self, offset: usize, width: usize) -> bool {
        let data = self.window_at + WINDOW_DATA;
        offset < data + 4 && data < offset.saturating_add(width)
    }
}

fn bytes_of(image: &[u8], at: u64, width: usize) -> u64 {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    let byte = |at| u64::from(image.get(at).copied().unwrap_or(0));
    (at..at.saturating_add(width)).rev().fold(0, |value, at| value << 8 | byte(at))
}

impl Function for Pci {
    fn name(&self) -> &'static str {
        self.link.kind().name
    }

    fn register(&self, offset: u64) -> &'static str {
        match offset {
            0x00..0x04 => "device_feature_select",
            0x04..0x08 => "device_feature",
            0x08..0x0c => "driver_feature_select",
            0x0c..0x10 => "driver_feature",
            0x10 => "config_msix_vector",
            0x12 => "num_queues",
            0x14 => "device_status",
            0x15 => "config_generation",
            0x16 => "queue_select",
            0x18 => "queue_size",
            0x1a => "queue_msix_vector",
            0x1c => "queue_enable",
            0x1e => "queue_notify_off",
            0x20..0x28 => "queue_desc",
            0x28..0x30 => "queue_driver",
            0x30..0x38 => "queue_device",
            ISR..SPACE => "isr",
            SPACE..NOTIFY => "config",
            NOTIFY..TABLE => "notify",
            TABLE..PENDING => "msix_table",
            PENDING.. => "msix_pba",
            _ => "reserved",
        }
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn read_config(&mut self, offset: usize, width: usize) -> u32 {
        if self.touches_window(offset, width)
            && let Some((at, width)) = self.window()
        {
            let value = self.read(at, width);
            self.config.set(self.window_at + WINDOW_DATA, value.to_le_bytes().get(..width).unwrap_or_default());
        }
        self.config.read(offset, width)
    }

    fn write_config(&mut self, offset: usize, width: usize, value: u32) {
        self.config.write(offset, width, value);
        self.configured();
        if self.touches_window(offset, width)
            && let Some((at, width)) = self.window()
        {
            let data = self.config.read(self.window_at + WINDOW_DATA, width);
            self.write(at, width, data.into());
        }
    }

    fn read(&mut self, offset: u64, width: usize) -> u64 {
        match offset {
            COMMON..ISR => bytes_of(&self.common(), offset, width),
            // Reading it lowers the line.
            ISR => self.ways.isr.change(|_| 0).into(),
            SPACE..NOTIFY => self.link.space(offset - SPACE, width),
            TABLE..PENDING if width == 4 => self.msix.read(offset - TABLE).into(),
            PENDING.. if width == 4 => self.msix.pending(offset - PENDING).into(),
            _ => 0,
        }
    }

    fn write(&mut self, offset: u64, width: usize, value: u64) {
        match offset {
            COMMON..ISR => self.write_common(offset, width, value),
            SPACE..NOTIFY => self.link.set_space(offset - SPACE, width, value),
            NOTIFY..TABLE => self.link.notify((offset - NOTIFY) / u64::from(BELL)),
            TABLE..PENDING if width == 4 && offset - TABLE < ENTRY * self.msix.size() as u64 => {
                self.msix.write(offset - TABLE, (value & 0xffff_ffff) as u32);
            }
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.config.reset();
        self.write_status(0);
        self.msix.reset();
        self.connect();
        self.route();
    }

    fn save(&self) -> Saved {
        let whole = Whole {
            // First: it may still say something.
            link: self.link.save(),
            config: self.config.bytes().to_vec(),
            msix: self.msix.save(),
            isr: self.ways.isr.bits(),
            space_vector: self.space_signal.vector(),
            vectors: self.signals.iter().map(|signal| signal.vector()).collect(),
        };
        crate::device::wrap(VERSION, &whole)
    }

    fn load(&mut self, saved: &Saved) -> Result<()> {
        let name = self.name();
        let whole: Whole = crate::device::unwrap(name, VERSION, saved)?;
        let known = |vector: &u16| *vector == NO_VECTOR || usize::from(*vector) < self.msix.size();
        if whole.isr & !(QUEUE_INTERRUPT | SPACE_INTERRUPT) != 0
            || whole.vectors.len() != self.signals.len()
            || !whole.vectors.iter().chain([&whole.space_vector]).all(known)
        {
            bail!("{name}: its saved interrupts are not those of this device");
        }
        self.config.check(&whole.config).context(name)?;
        let control = self.msix_at.map_or(0, |at| (bytes_of(&whole.config, at as u64 + 2, 2) & 0xffff) as u16);
        self.msix.check(&whole.msix, control).context(name)?;
        let loaded = self.link.load(&whole.link);
        if loaded.is_ok() {
            self.config.load(&whole.config);
            self.config.set_live(self.window().is_some());
            self.msix.load(&whole.msix, control);
            self.ways.isr.change(|_| whole.isr);
            self.space_signal.set_vector(whole.space_vector);
            self.signals.iter().zip(whole.vectors).for_each(|(signal, vector)| signal.set_vector(vector));
            self.connect();
            self.route();
        }
        if self.link.is_due() {
            self.start();
        }
        loaded
    }
}
