//! The arm64 board, as little of it as guests expect: GIC and its ITS, timers, PL011, PL031, PSCI, and a device tree that says so.

mod cpus;
mod fdt;
mod gic;
mod saved;

use anyhow::Result;
use kvm_bindings::{KVM_CAP_ARM_NISV_TO_USER, kvm_enable_cap};

pub use self::fdt::device_tree;
pub use self::gic::Irqchip;
pub use self::saved::{SavedVm, load_vm, save_vm};
use super::virtio::{self, INTX, Sockets};
use super::{Board, Firmware, PowerButton, Wires};
use crate::arch::layout::{
    CLOCK, DEBUG_EXIT, GENERATION, GPIO, GPIO_SPI, PAGE, PCI_SPI, PVPANIC, SERIAL, SERIAL_SPI, VIRTIO_SPI, has_its,
};
use crate::arch::{self, Layout, Waiting};
use crate::bus::{Builder, Space};
use crate::clock::HostClock;
use crate::config::{Config, IrqChip};
use crate::device::debug_console::DebugConsole;
use crate::device::debug_exit::DebugExit;
use crate::device::pl011::Pl011;
use crate::device::pl031::Pl031;
use crate::device::pl061::Pl061;
use crate::device::power::Button;
use crate::device::pvpanic::PvPanic;
use crate::explain::call;
use crate::host::random;
use crate::irq::{IrqLine, Shared, Unconnected};
use crate::memory::{Memory, Span};
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// The console that Linux is told of.
pub const LINUX_CONSOLE: &str = "console=ttyAMA0";
/// What it is told besides: to set no RAM aside for devices that want much of it in one piece, of which there are none. Most
/// kernels for arm64 keep 64 MiB, out of which Linux 7.3 cannot start in 128.
pub fn linux_arguments(_config: &Config) -> Vec<&'static str> {
    vec!["cma=0"]
}

/// Has a machine that goes on from a snapshot be another one than that which was written, where its guest has a driver that
/// hears of that: such a guest makes new random numbers as soon as it has taken the interrupt that tells it. Before any CPU
/// runs: a guest reads the id past its caches, and KVM writes back what is in the host's when the guest first reaches it.
///
/// # Errors
/// The host has no random numbers.
pub fn renew(board: &Board, memory: &Memory) -> Result<()> {
    if let Some(line) = &board.irqchip.renewed {
        memory.write(GENERATION, &random::<16>()?)?;
        line.pulse();
    }
    Ok(())
}

/// What a firmware would have left beside RAM: the machine's first generation id.
///
/// # Errors
/// The host has no random numbers.
pub fn firmware(config: &Config) -> Result<Firmware> {
    let mut parts = Vec::new();
    if config.irqchip != Some(IrqChip::None) {
        parts.push(("the generation id", GENERATION, random::<16>()?.to_vec()));
    }
    Ok(Firmware { rsdp: None, parts })
}

/// Settles what only the host can say: which interrupt controller the machine has. What it is asked for must be there.
///
/// # Errors
/// The host's KVM has not what is asked for, or no GIC.
pub fn choose(vm: &Vm, config: &Config) -> Result<Config> {
    cpus::check(vm, config)?;
    gic::choose(vm, config)
}

/// Makes the devices; the interrupt controller comes after the vCPUs, in [`prepare`].
///
/// # Errors
/// A debug console lies on a device.
pub fn build(vm: &Vm, config: &Config, _layout: &Layout, wires: Wires) -> Result<Board> {
    let Wires { serial, debug, ends } = wires;
    // Where a host's KVM cannot report such an access, KVM_RUN fails instead, and the guest has died all the same.
    let nisv = kvm_enable_cap { cap: KVM_CAP_ARM_NISV_TO_USER, ..Default::default() };
    let why = "A load or store outside RAM that the CPU does not describe shall exit, instead of failing KVM_RUN.";
    let _ = call("KVM_ENABLE_CAP", || ("KVM_CAP_ARM_NISV_TO_USER".into(), why), || vm.fd().enable_cap(&nisv));
    let line: Box<dyn IrqLine> = match config.irqchip {
        Some(IrqChip::None) => Box::new(Unconnected),
        _ => vm.level(gic::line(SERIAL_SPI)),
    };
    let mut devices = Builder::default();
    let page = |start| Span { start, size: PAGE };
    let serial = devices.place(Space::Mmio, page(SERIAL), Pl011::new(Box::new(serial), line))?;
    devices.place(Space::Mmio, page(CLOCK), Pl031::new(Box::new(HostClock)))?;
    let button = Button::default();
    let power = match config.irqchip {
        Some(IrqChip::None) => None,
        _ => {
            let device = Pl061::new(vm.level(gic::line(GPIO_SPI)), button.clone());
            // Whether its interrupt is enabled says for sure whether somebody hears it.
            Some(PowerButton { device: devices.place(Space::Mmio, page(GPIO), device)?, button, certain: true })
        }
    };
    devices.place(Space::Mmio, Span { start: PVPANIC, size: 1 }, PvPanic)?;
    devices.place(Space::Mmio, Span { start: DEBUG_EXIT, size: 4 }, DebugExit)?;
    if let Some(at) = config.debugcon {
        devices.place(at.space, Span { start: at.addr, size: 1 }, DebugConsole::new(Box::new(debug)))?;
    }
    let there = config.irqchip != Some(IrqChip::None) && config.virtio_devices() > 0;
    let first = if config.has_pci() { PCI_SPI } else { VIRTIO_SPI };
    let line = |spi| Shared::new(vm.level(gic::line(spi)));
    let sockets = Sockets {
        lines: (first..).take(if there { INTX } else { 0 }).map(line).collect(),
        numbers: [0; INTX],
        messages: there && has_its(config),
        senders: true,
        ports: None,
        mirror: virtio::mirror(vm, config),
    };
    let bench = virtio::place(vm, config, ends, sockets, &mut devices)?;
    Ok(Board { buses: devices.finish(), serial, bench, power, irqchip: Irqchip::default() })
}

/// Initialises the vCPUs, all but the first switched off until PSCI starts them, and makes the GIC.
///
/// # Errors
/// KVM refuses a CPU or the GIC.
pub fn prepare(vm: &Vm, vcpus: &[Vcpu], config: &Config, board: &mut Board) -> Result<()> {
    cpus::init(vm, vcpus, config)?;
    board.irqchip = gic::make(vm, config)?;
    cpus::finish(vcpus, config)
}

/// What this host's KVM has to solder on.
pub fn host_facts(vm: &Vm) -> Vec<(&'static str, String)> {
    vec![("interrupt controllers", gic::offers(vm))]
}

/// Whether a machine whose CPUs all seemed to have halted for good, now stopped, may go on after all: a CPU does not wait,
/// or an interrupt of a device is enabled.
///
/// # Errors
/// The GIC cannot be read.
pub fn can_wake(board: &Board, vcpus: &[Vcpu], memory: &Memory) -> Result<bool> {
    if vcpus.iter().any(|vcpu| arch::waiting(vcpu.fd(), memory) == Waiting::No) {
        return Ok(true);
    }
    board.irqchip.any_device_enabled()
}
