//! The interrupt wire a device is given.
//!
//! A device never learns a number or a controller: it holds an [`IrqLine`] and moves it. Invariant: a call never blocks
//! and never fails; what a controller makes of it is the board's concern.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// Edges and levels raised in this process: each goes with a system call, beside which counting it is nothing.
static RAISED: AtomicU64 = AtomicU64::new(0);

/// Counts a line that is being raised.
pub fn count() {
    RAISED.fetch_add(1, Ordering::Relaxed);
}

/// How often any line was raised.
pub fn raised() -> u64 {
    RAISED.load(Ordering::Relaxed)
}

/// One interrupt input, seen from the device.
pub trait IrqLine: Send + Sync {
    /// A rising edge (ISA interrupts, MSI).
    fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
    /// Holds the line at a level.
    fn set(&self, high: bool);
}

/// A message-signalled interrupt (PCI 3.0 §6.8): a line that a driver points at a CPU.
pub trait MessageLine: IrqLine {
    /// From now on the line sends this message: the data of a write to this address.
    fn route(&self, address: u64, data: u32);
}

/// Writes of the guest that wake somebody instead of making an exit.
pub trait Doorbells: Send {
    /// From now on (or, with `on` false, no more) a write to this address rings the bell.
    fn connect(&self, address: u64, bell: &EventFd, on: bool);
}

/// A line that ends nowhere: the machine has no interrupt controller.
#[derive(Debug, Default)]
pub struct Unconnected;

impl IrqLine for Unconnected {
    fn set(&self, _high: bool) {}
}

/// A line that remembers what was done to it, for tests.
#[derive(Debug, Default)]
pub struct TestWire {
    pulses: std::sync::atomic::AtomicU64,
    level: std::sync::atomic::AtomicBool,
}

impl TestWire {
    /// How often the line was pulsed.
    pub fn pulses(&self) -> u64 {
        self.pulses.load(std::sync::atomic::Ordering::SeqCst)
    }

    /// The level the line is held at.
    pub fn level(&self) -> bool {
        self.level.load(std::sync::atomic::Ordering::SeqCst)
    }
}

impl IrqLine for TestWire {
    fn pulse(&self) {
        self.pulses.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }

    fn set(&self, high: bool) {
        self.level.store(high, std::sync::atomic::Ordering::SeqCst);
    }
}

/// One level line that several devices hold: it is high while any of them holds it high.
pub struct Shared {
    holders: Mutex<u64>,
    line: Box<dyn IrqLine>,
}

impl Shared {
    /// Nobody holds it.
    pub fn new(line: Box<dyn IrqLine>) -> Arc<Self> {
        Arc::new(Self { holders: Mutex::new(0), line })
    }

    /// The wire of one holder, who has a number below 64.
    pub fn holder(self: &Arc<Self>, number: u32) -> Holder {
        Holder { shared: self.clone(), bit: 1u64.checked_shl(number).unwrap_or(0) }
    }
}

/// The wire of one of several devices on a line.
pub struct Holder {
    shared: Arc<Shared>,
    bit: u64,
}

impl IrqLine for Holder {
    fn set(&self, high: bool) {
        let mut holders = self.shared.holders.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *holders;
        *holders = if high { before | self.bit } else { before & !self.bit };
        if (*holders != 0) != (before != 0) {
            self.shared.line.set(*holders != 0);
        }
    }
}

impl<T: IrqLine> IrqLine for std::sync::Arc<T> {
    fn pulse(&self) {
        self.as_ref().pulse();
    }

    fn set(&self, high: bool) {
        self.as_ref().set(high);
    }
}
