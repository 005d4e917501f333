//! Virtio: devices, their queues, and two transports (VIRTIO 1.3).
//!
//! A [`VirtioDevice`] knows queues and its own configuration space, no transport; the transports ([`pci`], [`mmio`]) know
//! no device. Between them stands [`link::Link`], the registers that both have in common. While a driver is at work the
//! device and its queues are lent to the thread of [`worker`]; a reset, or whoever wants to look, has them back or goes
//! there. Invariant: a device is in one place at a time, and its queues with it.

use std::os::fd::BorrowedFd;

use crate::bus::Saved;
use crate::config::{Config, Switch};
use crate::memory::Memory;

pub mod balloon;
pub mod block;
pub mod console;
pub mod link;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rng;
#[cfg(test)]
pub mod tests;
pub mod vsock;
pub mod worker;

#[doc(hidden)]
pub mod fuzz;

pub use self::queue::{Chain, Part, Queue, Ring};
pub use self::worker::Watcher;

/// Feature bits of every device (VIRTIO 1.3 §6).
pub mod feature {
    /// VIRTIO_F_INDIRECT_DESC
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VIRTIO_F_VERSION_1
    pub const VERSION_1: u64 = 1 << 32;
}

/// What a device is.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// Its name in traces and snapshots.
    pub name: &'static str,
    /// The device id (VIRTIO 1.3 §5).
    pub id: u16,
    /// The PCI class: base class, subclass, programming interface.
    pub class: u32,
    /// The longest that each of its queues can be.
    pub queues: &'static [u16],
}

/// Why a device is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// Its driver is ready (or the machine goes on after a pause); it is told once, before anything else.
    Start,
    /// The driver has made buffers available in this queue.
    Queue(usize),
    /// This one of its descriptors (of [`VirtioDevice::sources`], or that it has watched by this number) has become readable
    /// or writable. It is said once: what the device leaves there, it must remember.
    Source(usize),
    /// The same, and its other end has closed: nothing will follow what can be read now.
    Ended(usize),
}

/// What a device at work has to do with.
pub struct Active {
    /// Its queues; those that the driver does not use give nothing.
    pub queues: Vec<Queue>,
    /// The features that both sides have agreed on.
    pub features: u64,
    /// The device's configuration space is not what it was: the driver is to be told.
    pub space_changed: bool,
    /// The device's descriptors are not those that it had.
    pub sources_changed: bool,
    /// The machine is another one than that which the driver began in. Who sees to that takes it back.
    pub moved: bool,
    /// Where the device has descriptors watched that come and go; none where it is at work for nobody.
    pub watcher: Option<Watcher>,
}

impl Active {
    /// What a device begins with.
    pub fn new(queues: Vec<Queue>, features: u64) -> Self {
        Self { queues, features, space_changed: false, sources_changed: false, moved: false, watcher: None }
    }
}

/// A device.
///
/// It is never called by two threads at once and never blocks for long: all virtio devices of a machine share a thread.
pub trait VirtioDevice: Send {
    /// What it is. It never changes.
    fn kind(&self) -> Kind;

    /// The features that it offers, besides those of every device.
    fn features(&self) -> u64;

    /// Its configuration space, as it is now. Its length never changes.
    fn space(&self) -> Vec<u8>;

    /// The driver writes to the configuration space; it lies within it.
    fn set_space(&mut self, _offset: usize, _bytes: &[u8]) {}

    /// The descriptors that it waits for; [`Active::sources_changed`] says when they are others.
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// Does what there is to do. At the end drivers are told of the chains that were given back.
    fn service(&mut self, wake: Wake, active: &mut Active);

    /// Finishes or gives up all that is in flight: afterwards no chain is out and nothing writes to guest RAM.
    fn drain(&mut self, _active: &mut Active) {}

    /// Its volatile state.
    fn save(&self) -> Saved;

    /// Takes over a state; an error leaves it as it was. The state of a fresh device resets it.
    fn load(&mut self, saved: &Saved) -> anyhow::Result<()>;
}

/// What devices are connected to, besides their drivers.
pub struct Ends {
    /// Guest RAM.
    pub memory: Memory,
    /// Devices whose far ends are the machine's own.
    pub connected: Vec<Box<dyn VirtioDevice>>,
}

/// The devices that a machine is asked to have, in the order of their slots.
///
/// # Errors
/// An option that says nothing, or a file or a network that is not to be had.
pub fn devices(config: &Config, ends: Ends) -> anyhow::Result<Vec<Box<dyn VirtioDevice>>> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for words in &config.disk {
        devices.push(Box::new(block::Block::new(words)?));
    }
    for (number, words) in config.net.iter().enumerate() {
        devices.push(Box::new(net::Net::new(words, config.name.as_deref(), number)?));
    }
    if let Some(words) = &config.vsock {
        devices.push(Box::new(vsock::Vsock::new(words)?));
    }
    devices.extend(ends.connected);
    if config.rng == Some(Switch::On) {
        devices.push(Box::new(rng::Rng));
    }
    Ok(devices)
}
