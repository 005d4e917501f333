//! The interrupt wire a device is given.
//!
//! A device never learns a number or a controller: it holds an [`IrqLine`] and moves it. Invariant: a call never blocks
//! and never fails; what a controller makes of it is the board's concern.

/// One interrupt input, seen from the device.
pub trait IrqLine: Send + Sync {
    /// A rising edge (ISA interrupts, MSI).
    fn pulse(&self);
    /// Holds the line at a level.
    fn set(&self, high: bool);
}

/// A line that ends nowhere: the machine has no interrupt controller.
#[derive(Debug, Default)]
pub struct Unconnected;

impl IrqLine for Unconnected {
    fn pulse(&self) {}
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

impl<T: IrqLine> IrqLine for std::sync::Arc<T> {
    fn pulse(&self) {
        self.as_ref().pulse();
    }

    fn set(&self, high: bool) {
        self.as_ref().set(high);
    }
}
