//! The Generic Interrupt Controller, in KVM: version 3 where the host has it, else 2.
//!
//! Invariant: it is made after the vCPUs and before any of them runs (KVM Documentation/virt/kvm/devices/arm-vgic*.rst:
//! the redistributors are counted when it is initialised).

use std::io;

use anyhow::{Context, Result};
use kvm_bindings::{
    KVM_ARM_IRQ_TYPE_SHIFT, KVM_ARM_IRQ_TYPE_SPI, KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR,
    KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_VGIC_V2_ADDR_TYPE_CPU,
    KVM_VGIC_V2_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
};
use kvm_ioctls::DeviceFd;

use crate::arch::layout::{GIC_CPU, GIC_DISTRIBUTOR, GIC_REDISTRIBUTOR};
use crate::config::{Config, Gic, IrqChip};
use crate::error::refuse;
use crate::vm::{Vm, device_word};

/// The first shared peripheral interrupt (GICv3 architecture, IHI 0069, 2.2.1).
pub const FIRST_SPI: u32 = 32;
/// Interrupts that the GIC has: a multiple of 32, at least 64.
const INTERRUPTS: u32 = 128;

/// GICD_CTLR, GICD_ISENABLER0: control, and one bit for each interrupt (IHI 0069, 12.9).
const GICD_CTLR: u64 = 0;
const GICD_ISENABLER: u64 = 0x100;
/// Either group of interrupts is on.
const GROUPS: u32 = 3;

/// The GIC, where the machine has one.
#[derive(Default)]
pub struct Irqchip(Option<DeviceFd>);

/// KVM_IRQ_LINE's number for a shared peripheral interrupt (api.rst 4.25).
pub fn line(spi: u32) -> u32 {
    KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT | (FIRST_SPI + spi)
}

fn kind(version: Gic) -> u32 {
    match version {
        Gic::V2 => kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2,
        Gic::V3 => kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
    }
}

/// Settles what only the host can say: which GIC the machine has.
///
/// # Errors
/// The host's KVM has not the one that is asked for, or none.
pub fn choose(vm: &Vm, config: &Config) -> Result<Config> {
    let mut config = config.clone();
    if config.irqchip == Some(IrqChip::None) {
        return Ok(config);
    }
    let can = |version| vm.can_make(kind(version));
    config.gic = match config.gic {
        Some(version) if can(version) => Some(version),
        Some(version) => {
            let (asked, other) = if version == Gic::V2 { (2, Gic::V3) } else { (3, Gic::V2) };
            let refusal = refuse(format!("this host's KVM has no GICv{asked} for guests"));
            let hint = if can(other) { "leave --gic out: the host has the other version" } else { "--irqchip none" };
            return Err(refusal.hint(hint).into());
        }
        None if can(Gic::V3) => Some(Gic::V3),
        None if can(Gic::V2) && config.cpus <= 8 => Some(Gic::V2),
        None if can(Gic::V2) => {
            let what = format!("{} CPUs are more than the 8 of GICv2, the only one of this host's KVM", config.cpus);
            return Err(refuse(what).hint("give --cpus a smaller number").into());
        }
        None => {
            let refusal = refuse("this host's KVM has no interrupt controller for guests, GICv3 or GICv2");
            return Err(refusal.hint("--irqchip none does without").into());
        }
    };
    Ok(config)
}

/// Makes the GIC of a machine whose vCPUs are all there.
///
/// # Errors
/// KVM refuses it.
pub fn make(vm: &Vm, version: Gic) -> Result<Irqchip> {
    let mut device = kvm_create_device { type_: kind(version), fd: 0, flags: 0 };
    let device = vm.fd().create_device(&mut device).map_err(io::Error::from).context("KVM_CREATE_DEVICE of the GIC")?;
    let places = match version {
        Gic::V2 => [(KVM_VGIC_V2_ADDR_TYPE_DIST, GIC_DISTRIBUTOR), (KVM_VGIC_V2_ADDR_TYPE_CPU, GIC_CPU)],
        Gic::V3 => [(KVM_VGIC_V3_ADDR_TYPE_DIST, GIC_DISTRIBUTOR), (KVM_VGIC_V3_ADDR_TYPE_REDIST, GIC_REDISTRIBUTOR)],
    };
    for (what, address) in places {
        set(&device, KVM_DEV_ARM_VGIC_GRP_ADDR, what.into(), Some(&address))?;
    }
    set(&device, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, Some(&INTERRUPTS))?;
    set(&device, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT.into(), None::<&u32>)?;
    Ok(Irqchip(Some(device)))
}

fn set<T>(device: &DeviceFd, group: u32, attr: u64, value: Option<&T>) -> Result<()> {
    let addr = value.map_or(0, |value| std::ptr::from_ref(value).expose_provenance() as u64);
    device
        .set_device_attr(&kvm_device_attr { flags: 0, group, attr, addr })
        .map_err(io::Error::from)
        .with_context(|| format!("KVM_SET_DEVICE_ATTR of the GIC, group {group}, attribute {attr:#x}"))
}

impl Irqchip {
    /// An interrupt of a device could reach a CPU. All vCPUs must have stopped.
    ///
    /// # Errors
    /// KVM refuses to show a register.
    pub fn any_device_enabled(&self) -> Result<bool> {
        let Some(device) = &self.0 else { return Ok(false) };
        let read = |offset| device_word(device, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, offset);
        if read(GICD_CTLR)? & GROUPS == 0 {
            return Ok(false);
        }
        for word in FIRST_SPI / 32..INTERRUPTS / 32 {
            if read(GICD_ISENABLER + 4 * u64::from(word))? != 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
