//! Puts the virtio devices on the board: as PCI functions, or as pages of registers.
//!
//! Invariant: the order of the devices is that of their slots and of their pages, so that a device's place depends on the
//! configuration only.

use std::sync::Arc;

use anyhow::{Context, Result};

use crate::arch::layout::{PCI_ECAM, PCI_WINDOW, PCI_WINDOW_SIZE, VIRTIO};
use crate::arch::{PCI_ECAM_SIZE, VIRTIO_PAGE};
use crate::bus::{Builder, Space};
use crate::config::{Config, Doorbell, Platform};
use crate::device::pci::{ECAM, Function, Mirror, PORTS, PORTS_SIZE, PciHost, pages};
use crate::irq::{IrqLine, Shared, Unconnected};
use crate::memory::Span;
use crate::virtio::link::Link;
use crate::virtio::mmio::{self, Mmio};
use crate::virtio::pci::{self, Pci};
use crate::virtio::worker::Bench;
use crate::virtio::{Ends, devices};
use crate::vm::{Shown, Vm};

/// Functions share the four lines of a PCI bus in turn.
pub const INTX: usize = 4;

/// What a board has for its virtio devices.
pub struct Sockets {
    /// The lines of INTx, or of the pages of registers in turn; none where there is no interrupt controller.
    pub lines: Vec<Arc<Shared>>,
    /// What the guest reads as their numbers.
    pub numbers: [u8; INTX],
    /// Messages can be sent (MSI).
    pub messages: bool,
    /// Interrupt controllers care who sends a message.
    pub senders: bool,
    /// Where the ports of PCI's configuration mechanism #1 are.
    pub ports: Option<u64>,
    /// ECAM that is read without exits.
    pub mirror: Option<Box<dyn Mirror>>,
}

/// Makes the devices that `config` asks for, and gives the bench where they work; none where there are none.
///
/// # Errors
/// A device cannot be made, or the bus has no place for it.
pub fn place(vm: &Vm, config: &Config, ends: Ends, sockets: Sockets, buses: &mut Builder) -> Result<Option<Bench>> {
    if config.virtio_devices() == 0 {
        return Ok(None);
    }
    let bench = Bench::new()?;
    let mut functions: Vec<Box<dyn Function>> = Vec::new();
    let memory = ends.memory.clone();
    for (number, device) in (0u32..).zip(devices(config, ends)?) {
        let link = Link::new(device, number, bench.clone(), memory.clone())?;
        if config.has_pci() {
            functions.push(Box::new(function(vm, config, &sockets, link, number)?));
        } else {
            page(vm, config, &sockets, link, buses)?;
        }
    }
    if config.has_pci() {
        let host = PciHost::new(functions)?;
        if config.trace.is_none() {
            let there = |span: Span| Span { start: PCI_ECAM + span.start, ..span };
            host.idle().for_each(|span| vm.postpone(Space::Mmio, there(span)));
        }
        let host = buses.add(host.mirrored(sockets.mirror));
        buses.attach(host, Space::Mmio, Span { start: PCI_ECAM, size: PCI_ECAM_SIZE }, ECAM)?;
        buses.attach(host, Space::Mmio, Span { start: PCI_WINDOW, size: PCI_WINDOW_SIZE }, PCI_WINDOW)?;
        if let Some(start) = sockets.ports {
            buses.attach(host, Space::Pio, Span { start, size: PORTS_SIZE }, PORTS)?;
        }
    }
    Ok(Some(bench))
}

impl Mirror for Shown {
    fn show(&self, page: u64, bytes: &[u8]) {
        // No more than there are functions is ever shown, and those have their pages.
        let _ = self.put(page, bytes);
    }
}

/// PCI's configuration space as memory. A trace shows every access, so there is none then.
pub fn mirror(vm: &Vm, config: &Config) -> Option<Box<dyn Mirror>> {
    if !config.has_pci() || config.trace.is_some() {
        return None;
    }
    let at = Span { start: PCI_ECAM, size: PCI_ECAM_SIZE };
    // A host that cannot has the exits.
    vm.show(at, &pages(config.virtio_devices())).ok().map(|shown| Box::new(shown) as _)
}

/// Which of the shared lines belongs to a PCI slot, or to a page of registers, of this number.
pub const fn turn(number: usize) -> usize {
    number % INTX
}

/// Where the registers of a device are that is not on PCI.
pub const fn page_of(number: usize) -> Span {
    Span { start: VIRTIO + number as u64 * VIRTIO_PAGE, size: VIRTIO_PAGE }
}

/// A PCI function in the slot behind those before it; slot 0 is the host bridge's.
fn function(vm: &Vm, config: &Config, sockets: &Sockets, link: Link, number: u32) -> Result<Pci> {
    let slot = number + 1;
    let turn = turn(slot as usize);
    let intx = sockets.lines.get(turn).map(|line| Box::new(line.holder(number)) as _);
    let sender = sockets.senders.then_some(slot << 3);
    // One for each queue, one for the configuration space.
    let count = if sockets.messages { link.kind().queues.len() + 1 } else { 0 };
    let messages = (0..count).map(|_| vm.message(sender)).collect::<Result<_>>()?;
    let doorbells = (config.doorbell != Some(Doorbell::Exit)).then(|| vm.doorbells());
    let intx_number = sockets.numbers.get(turn).copied().unwrap_or(0);
    let address = u32::try_from(PCI_WINDOW).context("the PCI window")? + number * pci::BAR_SIZE;
    // Linux switches what answers off and on for each of its BARs, when it looks how large they are, and the doorbells with it.
    let answers = config.platform != Some(Platform::Acpi);
    Ok(Pci::new(link, address, pci::Wires { intx, intx_number, messages, doorbells, answers }))
}

/// A page of registers.
fn page(vm: &Vm, config: &Config, sockets: &Sockets, link: Link, buses: &mut Builder) -> Result<()> {
    let number = link.number();
    let span = page_of(number as usize);
    if config.doorbell != Some(Doorbell::Exit) {
        for (queue, bell) in (0u32..).zip(link.doorbells()) {
            vm.ring_on(span.start + mmio::QUEUE_NOTIFY, queue, bell);
        }
    }
    let line: Box<dyn IrqLine> = match sockets.lines.get(turn(number as usize)) {
        Some(line) => Box::new(line.holder(number)),
        None => Box::new(Unconnected),
    };
    let device = Mmio::new(link, line);
    buses.place(Space::Mmio, span, device)?;
    Ok(())
}
