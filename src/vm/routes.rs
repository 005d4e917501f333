//! KVM's table of interrupt routes, and the wires that need it: messages (MSI) and doorbells.
//!
//! KVM takes the table only as a whole (api.rst 4.52 KVM_SET_GSI_ROUTING). Invariant: it holds the routes of the board's
//! own controllers and one for each message that was ever pointed somewhere.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KVM_MSI_VALID_DEVID, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::{Vm, halves};
use crate::explain::call;
use crate::host::sys::eventfd;
use crate::irq::{Doorbells, IrqLine, MessageLine};

/// The first number for a message: behind those of every controller's inputs.
const FIRST: u32 = 1024;
/// KVM_MAX_IRQ_ROUTES is 4096; some are the controllers'.
const MOST: u32 = 2048;

/// The table.
pub struct Routes {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    inputs: Vec<kvm_irq_routing_entry>,
    messages: BTreeMap<u32, kvm_irq_routing_entry>,
    taken: u32,
}

impl Routes {
    pub(super) fn new(vm: Arc<VmFd>) -> Arc<Self> {
        Arc::new(Self { vm, table: Mutex::default() })
    }

    /// Changes the table, and tells KVM of it where `tell`.
    fn change(&self, tell: bool, change: impl FnOnce(&mut Table)) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut table);
        if tell {
            let all: Vec<_> = table.inputs.iter().chain(table.messages.values()).copied().collect();
            // A guest whose interrupt has no way hears nothing; there is nobody else to tell.
            if let Ok(routes) = KvmIrqRouting::from_entries(&all) {
                let why = "Where each interrupt goes: KVM takes the table as a whole, the inputs of controllers and messages.";
                let fields = || (format!("{} routes", all.len()), why);
                let _ = call("KVM_SET_GSI_ROUTING", fields, || self.vm.set_gsi_routing(&routes));
            }
        }
    }

    /// The routes of the controllers' inputs, which KVM knows already where `known`.
    pub fn set_inputs(&self, inputs: Vec<kvm_irq_routing_entry>, known: bool) {
        self.change(!known, |table| table.inputs = inputs);
    }
}

/// A route that sends a message; `device` is who sends it, where interrupt controllers care.
pub fn message(gsi: u32, address: u64, data: u32, device: Option<u32>) -> kvm_irq_routing_entry {
    let [address_lo, address_hi] = halves(address);
    let sender = kvm_irq_routing_msi__bindgen_ty_1 { devid: device.unwrap_or(0) };
    let msi = kvm_irq_routing_msi { address_lo, address_hi, data, __bindgen_anon_1: sender };
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        flags: if device.is_some() { KVM_MSI_VALID_DEVID } else { 0 },
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}

/// A message, sent by writing to an irqfd.
struct KernelMessage {
    vm: Arc<VmFd>,
    routes: Arc<Routes>,
    event: EventFd,
    gsi: u32,
    device: Option<u32>,
    /// Where it points; none before it ever did.
    at: Mutex<Option<(u64, u32)>>,
}

impl IrqLine for KernelMessage {
    fn pulse(&self) {
        crate::irq::count();
        let _ = self.event.write(1);
    }

    fn set(&self, high: bool) {
        if high {
            self.pulse();
        }
    }
}

impl MessageLine for KernelMessage {
    fn route(&self, address: u64, data: u32) {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        if *at == Some((address, data)) {
            return;
        }
        // Before the first, since KVM takes an irqfd only once there is an interrupt controller.
        let why = "A write to this eventfd sends the message that the guest has just set up (MSI-X).";
        let fields = || (format!("gsi {}, fd {}", self.gsi, self.event.as_raw_fd()), why);
        let connect = || self.vm.register_irqfd(&self.event, self.gsi);
        if at.is_none() && call("KVM_IRQFD", fields, connect).is_err() {
            return;
        }
        *at = Some((address, data));
        let entry = message(self.gsi, address, data, self.device);
        self.routes.change(true, |table| {
            table.messages.insert(self.gsi, entry);
        });
    }
}

const RING: &str = "A write there makes no exit: KVM rings this eventfd, which wakes the thread of the virtio devices.";

fn ring(address: u64, bell: &EventFd, on: bool) -> String {
    format!("{} {address:#x}, fd {}", if on { "on" } else { "off" }, bell.as_raw_fd())
}

/// Doorbells in memory.
struct KernelBells(Arc<VmFd>);

impl Doorbells for KernelBells {
    fn connect(&self, address: u64, bell: &EventFd, on: bool) {
        let at = IoEventAddress::Mmio(address);
        let change = || match on {
            true => self.0.register_ioevent(bell, &at, NoDatamatch),
            false => self.0.unregister_ioevent(bell, &at, NoDatamatch),
        };
        // Where KVM has no room left, the write exits, and the device rings for itself.
        let _ = call("KVM_IOEVENTFD", || (ring(address, bell, on), RING), change);
    }
}

impl Vm {
    /// The table of interrupt routes.
    pub fn routes(&self) -> &Routes {
        &self.routes
    }

    /// A new message wire; `device` is its sender's number, where the interrupt controller cares.
    ///
    /// # Errors
    /// No descriptor or no route is left.
    pub fn message(&self, device: Option<u32>) -> Result<Box<dyn MessageLine>> {
        let mut gsi = None;
        self.routes.change(false, |table| {
            gsi = Some(FIRST + table.taken).filter(|_| table.taken < MOST);
            table.taken += 1;
        });
        let gsi = gsi.context("a machine has at most 2048 message-signalled interrupts")?;
        let event = eventfd().context("eventfd for an interrupt")?;
        let (vm, routes) = (self.fd.clone(), self.routes.clone());
        Ok(Box::new(KernelMessage { vm, routes, event, gsi, device, at: Mutex::new(None) }))
    }

    /// Doorbells that make no exit.
    pub fn doorbells(&self) -> Box<dyn Doorbells> {
        Box::new(KernelBells(self.fd.clone()))
    }

    /// Lets a 4-byte write of `value` to `address` ring a bell instead of making an exit.
    pub fn ring_on(&self, address: u64, value: u32, bell: &EventFd) {
        let connect = || self.fd.register_ioevent(bell, &IoEventAddress::Mmio(address), value);
        let fields = || (format!("{}, value {value}", ring(address, bell, true)), RING);
        let _ = call("KVM_IOEVENTFD", fields, connect);
    }
}
