//! What is soldered on: interrupt controllers, clocks, the serial port. Each architecture is a module that exports the
//! same names: `Irqchip`, `choose`, `build`, `prepare`, `device_tree`, `firmware`, `LINUX_CONSOLE`,
//! `linux_arguments`, `can_wake`, `renew`, `host_facts`; of snapshots `SavedVm`, `save_vm`, `load_vm`.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod virtio;
#[cfg(target_arch = "x86_64")]
mod x86_64;
use std::sync::Arc;

#[cfg(target_arch = "aarch64")]
pub use aarch64::*;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

use crate::bus::{Buses, DeviceId};
use crate::config::Config;
use crate::console::HostConsole;
use crate::device::power::Button;
use crate::memory::Span;
use crate::virtio::Ends;
use crate::virtio::worker::Bench;

/// Linux tests each cipher against known answers when it registers it, on every boot: a third of a second of the 1.3 that a
/// kernel like Debian's takes to its init. The option that leaves them out is Linux's own, and what a kernel has unless its
/// builder asks for the tests; with `fips=1` they run all the same (Linux Documentation/admin-guide/kernel-parameters).
const NO_CIPHER_TESTS: &str = "cryptomgr.notests";

/// What Linux is told in addition: its console, and what makes a virtual machine boot fast. A word of the user's with the
/// same name (what is before `=`) stands in the place of each.
pub fn linux_words(config: &Config) -> Vec<&'static str> {
    let console = if config.console_is_first() { "console=hvc0" } else { LINUX_CONSOLE };
    [vec![console], linux_arguments(config), vec![NO_CIPHER_TESTS]].concat()
}

/// What a guest is told when it starts, in the device tree of a machine that has one.
#[derive(Debug, Default, Clone, Copy)]
pub struct Chosen<'a> {
    /// The command line.
    pub cmdline: Option<&'a str>,
    /// The initial RAM disk.
    pub initrd: Option<Span>,
    /// Random numbers to begin with.
    pub seed: Option<&'a [u8; 72]>,
}

/// What a machine's firmware would have left in memory, as addresses and bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Firmware {
    /// Where the ACPI tables begin, with the RSDP.
    pub rsdp: Option<u64>,
    /// What it is called, where it lies, its bytes.
    pub parts: Vec<(&'static str, u64, Vec<u8>)>,
}

/// What a board's devices are connected to.
pub struct Wires {
    /// The serial port's far end.
    pub serial: HostConsole,
    /// The debug console's.
    pub debug: HostConsole,
    /// What virtio devices are connected to.
    pub ends: Ends,
}

/// The devices of one machine.
pub struct Board {
    /// All devices.
    pub buses: Arc<Buses>,
    /// The serial port, which the event loop tells of input.
    pub serial: DeviceId,
    /// Where the virtio devices work, where the machine has any.
    pub bench: Option<Bench>,
    /// The power button, where the machine has one.
    pub power: Option<PowerButton>,
    /// The in-kernel interrupt controller, as far as there is more to it than the machine's own descriptor.
    pub irqchip: Irqchip,
}

/// A button and the device that it belongs to.
pub struct PowerButton {
    /// The device.
    pub device: DeviceId,
    /// Its button.
    pub button: Button,
    /// Whether somebody hears it is known for sure.
    pub certain: bool,
}

impl Board {
    /// Whether the guest hears the power button, so that to press it says something; none where only that will tell.
    pub fn hears_button(&self) -> Option<bool> {
        let Some(power) = &self.power else { return Some(false) };
        let heard = power.button.is_heard();
        (heard || power.certain).then_some(heard)
    }

    /// The guest has taken note of the button since it was pressed.
    pub fn saw_button(&self) -> bool {
        self.power.as_ref().is_some_and(|power| power.button.was_seen())
    }

    /// Presses the power button.
    pub fn press_button(&self) {
        if let Some(power) = &self.power {
            power.button.press();
            self.serve(power);
        }
    }

    /// Has the button's device look at its wires.
    fn serve(&self, power: &PowerButton) {
        // A CPU that is at the device serves no event; it is gone in a moment.
        while !self.buses.service(power.device) {
            std::thread::yield_now();
        }
    }
}
