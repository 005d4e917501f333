//! pvpanic: one byte with which a guest's kernel says that it has panicked (QEMU docs/specs/pvpanic.rst; ACPI id QEMU0001,
//! device tree "qemu,pvpanic-mmio").
//!
//! A read gives the events that the device knows; a write of one is that event. Invariant: no state.

use anyhow::Result;

use super::{Stateless, unwrap, wrap};
use crate::bus::{Device, Effect, Saved};

/// Of the saved state.
const VERSION: u32 = 1;
/// Bit 0: the guest has panicked. Bit 1: it has, and a crash kernel of its own takes over.
const PANICKED: u64 = 1;
const CRASH_LOADED: u64 = 1 << 1;

/// The register.
#[derive(Debug, Default)]
pub struct PvPanic;

impl Device for PvPanic {
    fn name(&self) -> &'static str {
        "pvpanic"
    }

    fn register(&self, _offset: u64, _write: bool) -> &'static str {
        "EVENT"
    }

    fn read(&mut self, _offset: u64, _width: usize) -> u64 {
        PANICKED | CRASH_LOADED
    }

    fn write(&mut self, _offset: u64, _width: usize, value: u64) -> Effect {
        if value & PANICKED != 0 { Effect::Panicked } else { Effect::None }
    }

    fn reset(&mut self) {}

    fn save(&self) -> Saved {
        let Self = self;
        wrap(VERSION, &Stateless {})
    }

    fn load(&mut self, saved: &Saved) -> Result<()> {
        unwrap(self.name(), VERSION, saved).map(|Stateless {}| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told_and_a_crash_kernel_is_left_alone() {
        assert_eq!(PvPanic.read(0, 1), 3);
        assert_eq!(PvPanic.write(0, 1, PANICKED), Effect::Panicked);
        assert_eq!(PvPanic.write(0, 1, CRASH_LOADED), Effect::None);
        assert_eq!(PvPanic.write(0, 1, 0), Effect::None);
    }
}
