//! The arm64 board, as little of it as guests expect: GIC, timers, PL011, PL031, PSCI, and a device tree that says so.

mod fdt;
mod gic;

use std::io;

use anyhow::{Context, Result};
use kvm_bindings::{
    KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, KVM_CAP_ARM_NISV_TO_USER, kvm_enable_cap, kvm_vcpu_init,
};

pub use self::fdt::device_tree;
pub use self::gic::{Irqchip, choose};
use super::Board;
use crate::arch::layout::{CLOCK, DEBUG_EXIT, PAGE, SERIAL, SERIAL_SPI};
use crate::arch::{self, Layout, Waiting};
use crate::bus::{Builder, Space};
use crate::clock::HostClock;
use crate::config::{Config, IrqChip};
use crate::console::HostConsole;
use crate::device::debug_console::DebugConsole;
use crate::device::debug_exit::DebugExit;
use crate::device::pl011::Pl011;
use crate::device::pl031::Pl031;
use crate::irq::{IrqLine, Unconnected};
use crate::memory::{Memory, Span};
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// Makes the devices; the interrupt controller comes after the vCPUs, in [`prepare`].
///
/// # Errors
/// A debug console lies on a device.
pub fn build(vm: &Vm, config: &Config, _layout: &Layout, serial: HostConsole, debug: HostConsole) -> Result<Board> {
    // Where a host's KVM cannot report such an access, KVM_RUN fails instead, and the guest has died all the same.
    let nisv = kvm_enable_cap { cap: KVM_CAP_ARM_NISV_TO_USER, ..Default::default() };
    let _ = vm.fd().enable_cap(&nisv);
    let line: Box<dyn IrqLine> = match config.irqchip {
        Some(IrqChip::None) => Box::new(Unconnected),
        _ => vm.level(gic::line(SERIAL_SPI)),
    };
    let mut devices = Builder::default();
    let page = |start| Span { start, size: PAGE };
    let serial = devices.place(Space::Mmio, page(SERIAL), Pl011::new(Box::new(serial), line))?;
    devices.place(Space::Mmio, page(CLOCK), Pl031::new(Box::new(HostClock)))?;
    devices.place(Space::Mmio, Span { start: DEBUG_EXIT, size: 4 }, DebugExit)?;
    if let Some(at) = config.debugcon {
        devices.place(at.space, Span { start: at.addr, size: 1 }, DebugConsole::new(Box::new(debug)))?;
    }
    Ok(Board { buses: devices.finish(), serial, irqchip: Irqchip::default() })
}

/// Initialises the vCPUs, all but the first switched off until PSCI starts them, and makes the GIC.
///
/// # Errors
/// KVM refuses a CPU or the GIC.
pub fn prepare(vm: &Vm, vcpus: &[Vcpu], config: &Config, board: &mut Board) -> Result<()> {
    let mut target = kvm_vcpu_init::default();
    vm.fd().get_preferred_target(&mut target).map_err(io::Error::from).context("KVM_ARM_PREFERRED_TARGET")?;
    if let Some(features) = target.features.first_mut() {
        *features |= 1 << KVM_ARM_VCPU_PSCI_0_2;
    }
    for vcpu in vcpus {
        let mut own = target;
        if let (1.., Some(features)) = (vcpu.id(), own.features.first_mut()) {
            *features |= 1 << KVM_ARM_VCPU_POWER_OFF;
        }
        let id = vcpu.id();
        vcpu.fd().vcpu_init(&own).map_err(io::Error::from).with_context(|| format!("KVM_ARM_VCPU_INIT of CPU {id}"))?;
    }
    if let (Some(version), true) = (config.gic, config.irqchip != Some(IrqChip::None)) {
        board.irqchip = gic::make(vm, version)?;
    }
    Ok(())
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
