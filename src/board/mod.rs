//! What is soldered on: interrupt controllers, clocks, the serial port. Each architecture is a module that exports the
//! same names: `build` and `prepare`.

#[cfg(target_arch = "x86_64")]
mod x86_64;
use std::sync::Arc;

#[cfg(target_arch = "x86_64")]
pub use x86_64::{build, prepare};

use crate::bus::{Buses, DeviceId};

/// The devices of one machine.
pub struct Board {
    /// All devices.
    pub buses: Arc<Buses>,
    /// The serial port, which the event loop tells of input.
    pub serial: DeviceId,
}
