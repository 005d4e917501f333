//! The legacy devices, one file each; each is a value with registers that implements [`crate::bus::Device`].
//!
//! A device names no board, machine or CPU: it is handed wires (an interrupt line, a clock, a console) and never learns
//! where it is attached. Invariant: nothing that a guest or a saved state holds makes a device panic, allocate without
//! bound or loop without bound; `conformance` checks that for each of them in one line.

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::bus::Saved;

mod calendar;
pub mod cmos;
#[cfg(test)]
mod conformance;
pub mod debug_console;
pub mod debug_exit;
pub mod i8042;
pub mod ioapic;
pub mod pci;
pub mod pl011;
pub mod pl031;
pub mod pl061;
pub mod power;
pub mod power_off;
mod primecell;
pub mod pvpanic;
pub mod serial;

/// Wraps a device's state. The state types are plain numbers and lists, which JSON always holds.
pub fn wrap(version: u32, state: &impl Serialize) -> Saved {
    Saved { version, state: serde_json::to_value(state).unwrap_or_default() }
}

/// The state of device `name`, as far as its form goes; what the values mean is for the device to check.
pub fn unwrap<T: Serialize + DeserializeOwned>(name: &str, version: u32, saved: &Saved) -> Result<T> {
    if saved.version != version {
        bail!("{name}: saved state of version {}, but this Bantam knows version {version}", saved.version);
    }
    let state = T::deserialize(&saved.state).with_context(|| format!("{name}: its saved state is not readable"))?;
    // Serde fills in an option that is missing and takes a list for a struct; a state says all, and in one way only.
    if wrap(version, &state) != *saved {
        bail!("{name}: its saved state lacks something or is not in the form that it was saved in");
    }
    Ok(state)
}

/// The saved form of a device that has no state: the empty object, so that anything else is refused.
#[derive(serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stateless {}
