//! What is soldered on: interrupt controllers, clocks, the serial port. Each architecture is a module that exports the
//! same names: `Irqchip`, `choose`, `build`, `prepare`, `device_tree`, `can_wake`.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;
use std::sync::Arc;

#[cfg(target_arch = "aarch64")]
pub use aarch64::*;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

use crate::bus::{Buses, DeviceId};

/// The devices of one machine.
pub struct Board {
    /// All devices.
    pub buses: Arc<Buses>,
    /// The serial port, which the event loop tells of input.
    pub serial: DeviceId,
    /// The in-kernel interrupt controller, as far as there is more to it than the machine's own descriptor.
    pub irqchip: Irqchip,
}
