//! The registers that both transports have in common, and the lending of a device to the thread that serves it.
//!
//! Status, features, queues and configuration space (VIRTIO 1.3 §2, §4.1.4.3, §4.2.2), whatever address they have.
//! Invariant: from DRIVER_OK to the reset the device is on the [`Bench`] and nothing that describes its queues changes;
//! else it is here.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::worker::{Bench, Lent};
use super::{Active, Kind, Queue, Ring, VirtioDevice, feature};
use crate::bus::Saved;
use crate::host::sys::eventfd;
use crate::irq::IrqLine;
use crate::memory::Memory;

/// Bits of the device status (§2.1).
pub mod status {
    /// The driver knows how to drive it.
    pub const DRIVER_OK: u8 = 4;
    /// Both sides have agreed on features.
    pub const FEATURES_OK: u8 = 8;
    /// Only a reset helps.
    pub const NEEDS_RESET: u8 = 64;
}
use self::status::{DRIVER_OK, FEATURES_OK, NEEDS_RESET};

/// Bits of the interrupt status (§4.1.4.5, §4.2.2).
pub const QUEUE_INTERRUPT: u8 = 1;
/// The configuration space has changed.
pub const SPACE_INTERRUPT: u8 = 2;

/// An interrupt that is a level, with the register that says why it is high.
pub struct Isr {
    state: Mutex<IsrState>,
    line: Box<dyn IrqLine>,
}

struct IsrState {
    bits: u8,
    /// The line may be high.
    allowed: bool,
}

impl Isr {
    /// Low.
    pub fn new(line: Box<dyn IrqLine>) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(IsrState { bits: 0, allowed: true }), line })
    }

    fn with<R>(&self, change: impl FnOnce(&mut IsrState) -> R) -> R {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let level = |state: &IsrState| state.allowed && state.bits != 0;
        let before = level(&state);
        let result = change(&mut state);
        if level(&state) != before {
            self.line.set(!before);
        }
        result
    }

    /// Changes the register, and the line with it; gives what it was.
    pub fn change(&self, change: impl FnOnce(u8) -> u8) -> u8 {
        self.with(|state| {
            let new = change(state.bits);
            std::mem::replace(&mut state.bits, new)
        })
    }

    /// Lets the line be high, or holds it low whatever the register says.
    pub fn allow(&self, allowed: bool) {
        self.with(|state| state.allowed = allowed);
    }

    /// The register.
    pub fn bits(&self) -> u8 {
        self.with(|state| state.bits)
    }
}

/// One reason for an interrupt.
pub struct Reason(pub Arc<Isr>, pub u8);

impl IrqLine for Reason {
    fn pulse(&self) {
        self.0.change(|bits| bits | self.1);
    }

    fn set(&self, high: bool) {
        if high {
            self.pulse();
        }
    }
}

/// Where the interrupts of a device at work go.
pub struct Lines {
    /// One for each queue.
    pub queues: Vec<Arc<dyn IrqLine>>,
    /// For changes of the configuration space.
    pub space: Arc<dyn IrqLine>,
}

/// What of a device at work its registers show.
struct View {
    space: Mutex<Vec<u8>>,
    generation: AtomicU32,
    needs_reset: AtomicBool,
}

impl View {
    fn space(&self) -> MutexGuard<'_, Vec<u8>> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self, space: &[u8]) {
        let mut shown = self.space();
        if *shown != space {
            shown.clear();
            shown.extend_from_slice(space);
            self.generation.fetch_add(1, Ordering::Release);
        }
    }
}

/// Of the saved state of a transport's common part.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct State {
    status: u8,
    offered_select: u32,
    accepted_select: u32,
    accepted: u64,
    selected: u16,
    rings: Vec<Ring>,
    generation: u32,
    device: Saved,
}

/// The common registers of one device.
pub struct Link {
    // Configuration
    kind: Kind,
    number: u32,
    /// A reset is to load this.
    fresh: Saved,
    // Wires
    bench: Bench,
    memory: Memory,
    doorbells: Vec<Arc<EventFd>>,
    view: Arc<View>,
    // State
    /// Not here while its driver is at work.
    device: Option<Box<dyn VirtioDevice>>,
    offered: u64,
    status: u8,
    offered_select: u32,
    accepted_select: u32,
    accepted: u64,
    selected: u16,
    rings: Vec<Ring>,
}

impl Link {
    /// A device after power-on; `number` is its own among those of the bench.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new(device: Box<dyn VirtioDevice>, number: u32, bench: Bench, memory: Memory) -> Result<Self> {
        let kind = device.kind();
        let bell = |_: &u16| eventfd().map(Arc::new).context("eventfd for a queue");
        let doorbells = kind.queues.iter().map(bell).collect::<Result<_>>()?;
        let view = View {
            space: Mutex::new(device.space()),
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
        };
        Ok(Self {
            kind,
            number,
            fresh: device.save(),
            bench,
            memory,
            doorbells,
            view: Arc::new(view),
            offered: device.features() | feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC,
            device: Some(device),
            status: 0,
            offered_select: 0,
            accepted_select: 0,
            accepted: 0,
            selected: 0,
            rings: fresh_rings(kind),
        })
    }

    /// What the device is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its number among the machine's virtio devices.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The driver's notifications of each queue.
    pub fn doorbells(&self) -> &[Arc<EventFd>] {
        &self.doorbells
    }

    /// The driver is at work.
    pub fn is_active(&self) -> bool {
        self.device.is_none()
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        if self.view.needs_reset.load(Ordering::Acquire) { self.status | NEEDS_RESET } else { self.status }
    }

    /// The driver writes the device status; true where it has just become ready, and [`Link::start`] is due.
    #[must_use]
    pub fn set_status(&mut self, value: u8) -> bool {
        if value == 0 {
            self.reset();
            return false;
        }
        // Bits are set one after the other, and cleared by a reset only (§2.1.1).
        let mut new = (value & !NEEDS_RESET) & !self.status;
        let unknown = self.accepted & !self.offered;
        if new & FEATURES_OK != 0 && (unknown != 0 || self.accepted & feature::VERSION_1 == 0) {
            new &= !FEATURES_OK;
        }
        if (self.status | new) & FEATURES_OK == 0 {
            new &= !DRIVER_OK;
        }
        self.status |= new;
        new & DRIVER_OK != 0
    }

    /// Lends the device, with the queues that its driver has set up.
    pub fn start(&mut self, lines: Lines) {
        let Some(device) = self.device.take() else { return };
        let options = [feature::EVENT_IDX, feature::INDIRECT_DESC].map(|bit| self.accepted & bit != 0);
        let queue = |(ring, line): (&Ring, _)| Queue::new(&self.memory, *ring, options, line);
        let queues: Vec<_> = self.rings.iter().zip(lines.queues).map(queue).collect();
        let (view, line) = (self.view.clone(), lines.space);
        let changed = move |space: &[u8], broken: bool| {
            view.show(space);
            // Said once.
            if !broken || !view.needs_reset.swap(true, Ordering::AcqRel) {
                line.pulse();
            }
        };
        let active = Active::new(queues, self.accepted);
        let doorbells = self.doorbells.clone();
        let lent = Lent { device, active, doorbells, changed: Box::new(changed) };
        let number = self.number;
        // Fails where the host has no memory left for its own wait; the device then hears nothing, until a reset.
        let _ = self.bench.with(move |devices| devices.start(number, lent));
    }

    /// Has the device back, with nothing in flight and its queues where they are.
    fn take_back(&mut self) {
        if self.device.is_some() {
            return;
        }
        let number = self.number;
        if let Some(mut lent) = self.bench.with(move |devices| devices.stop(number)).flatten() {
            lent.settle();
            self.rings = lent.active.queues.iter().map(Queue::ring).collect();
            self.view.show(&lent.device.space());
            self.device = Some(lent.device);
        }
    }

    /// Puts all into the state after power-on.
    pub fn reset(&mut self) {
        self.take_back();
        if let Some(device) = &mut self.device {
            // It has saved this state itself.
            let _ = device.load(&self.fresh);
            self.view.show(&device.space());
        }
        self.view.generation.store(0, Ordering::Release);
        self.view.needs_reset.store(false, Ordering::Release);
        (self.status, self.offered_select, self.accepted_select, self.accepted, self.selected) = (0, 0, 0, 0, 0);
        self.rings = fresh_rings(self.kind);
    }

    /// Half of the features offered: which, and its bits.
    pub fn offered_select(&mut self) -> &mut u32 {
        &mut self.offered_select
    }

    /// The half of the features offered that is selected.
    pub fn offered(&self) -> u32 {
        half(self.offered, self.offered_select)
    }

    /// Which half of the features accepted is meant.
    pub fn accepted_select(&mut self) -> &mut u32 {
        &mut self.accepted_select
    }

    /// The half of the features accepted that is selected.
    pub fn accepted(&self) -> u32 {
        half(self.accepted, self.accepted_select)
    }

    /// The driver accepts features, which it can until both sides have agreed.
    pub fn accept(&mut self, bits: u32) {
        if self.status & FEATURES_OK == 0 && self.accepted_select < 2 {
            let shift = 32 * self.accepted_select;
            self.accepted = self.accepted & !(0xffff_ffff << shift) | u64::from(bits) << shift;
        }
    }

    /// Which queue is meant.
    pub fn selected(&mut self) -> &mut u16 {
        &mut self.selected
    }

    /// The selected queue, where there is one.
    pub fn ring(&self) -> Option<&Ring> {
        self.rings.get(usize::from(self.selected))
    }

    /// The longest that the selected queue can be; 0 where there is none.
    pub fn most(&self) -> u16 {
        self.kind.queues.get(usize::from(self.selected)).copied().unwrap_or(0)
    }

    /// The driver sets up the selected queue, which it can until it is ready itself.
    pub fn set_ring(&mut self, change: impl FnOnce(&mut Ring)) {
        let most = self.most();
        let open = self.status & DRIVER_OK == 0;
        let Some(ring) = self.rings.get_mut(usize::from(self.selected)).filter(|ring| open && !ring.ready) else {
            return;
        };
        let before = *ring;
        change(ring);
        if ring.size > most {
            *ring = before;
        }
    }

    /// The driver takes the selected queue out of use again, also while it is at work (§4.2.2.2): then nothing of it is in
    /// flight any more, and it stays closed until a reset.
    pub fn close_ring(&mut self) {
        let selected = usize::from(self.selected);
        let Some(ring) = self.rings.get_mut(selected).filter(|ring| ring.ready) else { return };
        ring.ready = false;
        if self.device.is_none() {
            let number = self.number;
            self.bench.with(move |devices| {
                if let Some(lent) = devices.get(number) {
                    lent.settle();
                    lent.active.queues.iter_mut().skip(selected).take(1).for_each(Queue::close);
                }
            });
        }
    }

    /// The driver notifies, where doorbells exit.
    pub fn notify(&self, queue: u64) {
        if let Some(bell) = usize::try_from(queue).ok().and_then(|queue| self.doorbells.get(queue)) {
            let _ = bell.write(1);
        }
    }

    /// Grows whenever the configuration space changes.
    pub fn generation(&self) -> u32 {
        self.view.generation.load(Ordering::Acquire)
    }

    /// Bytes of the configuration space; beyond its end there are zeroes.
    pub fn space(&self, offset: u64, width: usize) -> u64 {
        let space = self.view.space();
        let byte = |at: u64| usize::try_from(at).ok().and_then(|at| space.get(at)).copied().unwrap_or(0);
        (0..width as u64).rev().fold(0, |value, at| value << 8 | u64::from(byte(offset.saturating_add(at))))
    }

    /// The driver writes to the configuration space.
    pub fn set_space(&mut self, offset: u64, width: usize, value: u64) {
        let bytes = value.to_le_bytes();
        let length = self.view.space().len();
        let Some(bytes) = bytes.get(..width) else { return };
        let Some(offset) = usize::try_from(offset).ok().filter(|at| at.saturating_add(width) <= length) else { return };
        if let Some(device) = &mut self.device {
            device.set_space(offset, bytes);
            self.view.show(&device.space());
            return;
        }
        let (number, bytes) = (self.number, bytes.to_vec());
        let shown = self.bench.with(move |devices| {
            let lent = devices.get(number)?;
            lent.device.set_space(offset, &bytes);
            Some(lent.device.space())
        });
        if let Some(space) = shown.flatten() {
            self.view.show(&space);
        }
    }

    /// The state, with nothing in flight.
    pub fn save(&self) -> State {
        let number = self.number;
        let (rings, device) = match &self.device {
            Some(device) => (self.rings.clone(), device.save()),
            None => {
                let look = self.bench.with(move |devices| {
                    let lent = devices.get(number)?;
                    lent.settle();
                    Some((lent.active.queues.iter().map(Queue::ring).collect(), lent.device.save()))
                });
                look.flatten().unwrap_or_else(|| (self.rings.clone(), self.fresh.clone()))
            }
        };
        State {
            status: self.status(),
            offered_select: self.offered_select,
            accepted_select: self.accepted_select,
            accepted: self.accepted,
            selected: self.selected,
            rings,
            generation: self.generation(),
            device,
        }
    }

    /// Takes over a state; where the driver was at work the device is not lent yet, [`Link::start`] is due.
    ///
    /// # Errors
    /// A state that cannot be; all is as it was.
    pub fn load(&mut self, state: &State) -> Result<()> {
        let State { status, offered_select, accepted_select, accepted, selected, rings, generation, device } = state;
        let (agreed, active) = (status & FEATURES_OK != 0, status & DRIVER_OK != 0);
        if active && !agreed || agreed && (accepted & !self.offered != 0 || accepted & feature::VERSION_1 == 0) {
            bail!("{}: its saved status is one that no driver can reach", self.kind.name);
        }
        let fits = rings.iter().zip(self.kind.queues).all(|(ring, most)| ring.size <= *most);
        if rings.len() != self.rings.len() || !fits || status & NEEDS_RESET != 0 && !active {
            bail!("{}: its saved queues are not those of this device", self.kind.name);
        }
        self.take_back();
        let own = self.device.as_mut().with_context(|| format!("{}: it is at work", self.kind.name))?;
        own.load(device)?;
        self.view.show(&own.space());
        self.view.generation.store(*generation, Ordering::Release);
        self.view.needs_reset.store(status & NEEDS_RESET != 0, Ordering::Release);
        self.status = status & !NEEDS_RESET;
        (self.offered_select, self.accepted_select) = (*offered_select, *accepted_select);
        (self.accepted, self.selected) = (*accepted, *selected);
        self.rings.clone_from(rings);
        Ok(())
    }

    /// The driver is at work as far as the registers say: after a state was taken over, the device is to be lent.
    pub fn is_due(&self) -> bool {
        self.device.is_some() && self.status & DRIVER_OK != 0
    }
}

fn fresh_rings(kind: Kind) -> Vec<Ring> {
    kind.queues.iter().map(|most| Ring { size: *most, ..Ring::default() }).collect()
}

fn half(bits: u64, select: u32) -> u32 {
    match select {
        0 => (bits & 0xffff_ffff) as u32,
        1 => (bits >> 32) as u32,
        _ => 0,
    }
}
