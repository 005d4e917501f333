//! The Generic Interrupt Controller, in KVM: version 3 where the host has it, else 2.
//!
//! Invariant: it is made after the vCPUs and before any of them runs (KVM Documentation/virt/kvm/devices/arm-vgic*.rst:
//! the redistributors are counted when it is initialised).

use std::io;

use anyhow::{Context, Result};
use kvm_bindings::{
    KVM_ARM_IRQ_TYPE_SHIFT, KVM_ARM_IRQ_TYPE_SPI, KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR,
    KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, KVM_DEV_ARM_VGIC_GRP_ITS_REGS,
    KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_VGIC_ITS_ADDR_TYPE, KVM_VGIC_V2_ADDR_TYPE_CPU, KVM_VGIC_V2_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
};
use kvm_ioctls::DeviceFd;

use crate::arch::layout::{GENERATION_SPI, GIC_CPU, GIC_DISTRIBUTOR, GIC_ITS, GIC_REDISTRIBUTOR, has_its};
use crate::config::{Config, Gic, IrqChip, Msi};
use crate::error::refuse;
use crate::explain::call;
use crate::irq::IrqLine;
use crate::vm::{Vm, device_double, device_word};

/// The first shared peripheral interrupt (GICv3 architecture, IHI 0069, 2.2.1).
pub const FIRST_SPI: u32 = 32;
/// Interrupts that the GIC has: a multiple of 32, at least 64.
pub const INTERRUPTS: u32 = 128;

/// GICD_CTLR, GICD_ISENABLER0: control, and one bit for each interrupt (IHI 0069, 12.9).
const GICD_CTLR: u64 = 0;
const GICD_ISENABLER: u64 = 0x100;
/// Either group of interrupts is on.
const GROUPS: u32 = 3;

/// GITS_CTLR, and the bit of it that says that messages become interrupts (IHI 0069, 12.19.4).
const GITS_CTLR: u64 = 0;
const ENABLED: u64 = 1;

/// The GIC, where the machine has one, and its ITS.
#[derive(Default)]
pub struct Irqchip {
    pub(super) version: Option<Gic>,
    pub(super) gic: Option<DeviceFd>,
    pub(super) its: Option<DeviceFd>,
    /// Says that the generation id is another.
    pub(super) renewed: Option<Box<dyn IrqLine>>,
}

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

/// What this host's KVM can give a machine.
pub fn offers(vm: &Vm) -> String {
    let all = [
        ("GICv3", kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3),
        ("its ITS", kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS),
        ("GICv2", kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2),
    ];
    let there: Vec<_> = all.into_iter().filter(|(_, kind)| vm.can_make(*kind)).map(|(name, _)| name).collect();
    if there.is_empty() { "none: use --irqchip none".into() } else { there.join(", ") }
}

/// Settles what only the host can say: which GIC the machine has, and whether there is an ITS to it.
///
/// # Errors
/// The host's KVM has not what is asked for, or no GIC.
pub fn choose(vm: &Vm, config: &Config) -> Result<Config> {
    let mut config = config.clone();
    if config.irqchip != Some(IrqChip::None) {
        config.gic = choose_gic(&config, |version| vm.can_make(kind(version)))?;
        config.msi = Some(choose_msi(&config, || vm.can_make(kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS))?);
    }
    Ok(config)
}

fn choose_msi(config: &Config, can: impl Fn() -> bool) -> Result<Msi> {
    match config.msi {
        _ if config.gic == Some(Gic::V3) && config.msi != Some(Msi::None) && can() => Ok(Msi::Its),
        Some(Msi::Its) => {
            let refusal = refuse("--msi its: this host's KVM has no GICv3 ITS for guests");
            Err(refusal.hint("leave --msi out: devices then have wires only").into())
        }
        _ => Ok(Msi::None),
    }
}

fn choose_gic(config: &Config, can: impl Fn(Gic) -> bool) -> Result<Option<Gic>> {
    Ok(match config.gic {
        Some(version) if can(version) => Some(version),
        Some(version) => {
            let (asked, other) = if version == Gic::V2 { (2, Gic::V3) } else { (3, Gic::V2) };
            let refusal = refuse(format!("this host's KVM has no GICv{asked} for guests"));
            let hint = if can(other) { "leave --gic out: the host has the other version" } else { "--irqchip none" };
            return Err(refusal.hint(hint).into());
        }
        None if can(Gic::V3) => Some(Gic::V3),
        None if can(Gic::V2) && config.cpus.count() <= 8 => Some(Gic::V2),
        None if can(Gic::V2) => {
            let what =
                format!("{} CPUs are more than the 8 of GICv2, the only one of this host's KVM", config.cpus.count());
            return Err(refuse(what).hint("give --cpus a smaller number").into());
        }
        None => {
            let refusal = refuse("this host's KVM has no interrupt controller for guests, GICv3 or GICv2");
            return Err(refusal.hint("--irqchip none does without").into());
        }
    })
}

/// Makes the GIC of a machine whose vCPUs are all there, and its ITS.
///
/// # Errors
/// KVM refuses one.
pub fn make(vm: &Vm, config: &Config) -> Result<Irqchip> {
    let Some(version) = config.gic.filter(|_| config.irqchip != Some(IrqChip::None)) else {
        return Ok(Irqchip::default());
    };
    let gic = make_gic(vm, version)?;
    let its = has_its(config).then(|| make_its(vm)).transpose()?;
    Ok(Irqchip { version: Some(version), gic: Some(gic), its, renewed: Some(vm.level(line(GENERATION_SPI))) })
}

fn create(vm: &Vm, kind: u32, name: &str, why: &'static str) -> Result<DeviceFd> {
    let mut device = kvm_create_device { type_: kind, fd: 0, flags: 0 };
    let fields = || (format!("type {kind} ({name})"), why);
    call("KVM_CREATE_DEVICE", fields, || vm.fd().create_device(&mut device))
        .map_err(io::Error::from)
        .with_context(|| format!("KVM_CREATE_DEVICE of the {name}"))
}

/// The ITS finds the GIC, which must be complete (devices/arm-vgic-its.rst).
fn make_its(vm: &Vm) -> Result<DeviceFd> {
    let why = "What turns messages of devices into interrupts of the GIC, inside KVM: one more device.";
    let device = create(vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS, "ITS", why)?;
    let told = (
        format!("KVM_DEV_ARM_VGIC_GRP_ADDR, type {KVM_VGIC_ITS_ADDR_TYPE}: {GIC_ITS:#x}"),
        "Where the guest finds its registers, and devices write their messages.",
    );
    set(&device, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_ITS_ADDR_TYPE.into(), Some(&GIC_ITS), told)?;
    let told = ("KVM_DEV_ARM_VGIC_CTRL_INIT".to_owned(), "It is complete, and so is the GIC that it belongs to.");
    set(&device, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT.into(), None::<&u32>, told)?;
    Ok(device)
}

fn make_gic(vm: &Vm, version: Gic) -> Result<DeviceFd> {
    let why = "The interrupt controller, inside KVM: a device with a descriptor of its own.";
    let device = create(vm, kind(version), if version == Gic::V2 { "GICv2" } else { "GICv3" }, why)?;
    let places = match version {
        Gic::V2 => [(KVM_VGIC_V2_ADDR_TYPE_DIST, GIC_DISTRIBUTOR), (KVM_VGIC_V2_ADDR_TYPE_CPU, GIC_CPU)],
        Gic::V3 => [(KVM_VGIC_V3_ADDR_TYPE_DIST, GIC_DISTRIBUTOR), (KVM_VGIC_V3_ADDR_TYPE_REDIST, GIC_REDISTRIBUTOR)],
    };
    for (what, address) in places {
        let told =
            (format!("KVM_DEV_ARM_VGIC_GRP_ADDR, type {what}: {address:#x}"), "Where the guest finds its registers.");
        set(&device, KVM_DEV_ARM_VGIC_GRP_ADDR, what.into(), Some(&address), told)?;
    }
    let told = (format!("KVM_DEV_ARM_VGIC_GRP_NR_IRQS: {INTERRUPTS}"), "How many interrupts it has.");
    set(&device, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, Some(&INTERRUPTS), told)?;
    let told = ("KVM_DEV_ARM_VGIC_CTRL_INIT".to_owned(), "It is complete: all CPUs are there, and none has run.");
    set(&device, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT.into(), None::<&u32>, told)?;
    Ok(device)
}

fn set<T>(device: &DeviceFd, group: u32, attr: u64, value: Option<&T>, told: (String, &'static str)) -> Result<()> {
    let addr = value.map_or(0, |value| std::ptr::from_ref(value).expose_provenance() as u64);
    let attribute = kvm_device_attr { flags: 0, group, attr, addr };
    call("KVM_SET_DEVICE_ATTR", || told, || device.set_device_attr(&attribute))
        .map_err(io::Error::from)
        .with_context(|| format!("KVM_SET_DEVICE_ATTR of the GIC or ITS, group {group}, attribute {attr:#x}"))
}

impl Irqchip {
    /// An interrupt of a device could reach a CPU. All vCPUs must have stopped.
    ///
    /// # Errors
    /// KVM refuses to show a register.
    pub fn any_device_enabled(&self) -> Result<bool> {
        if let Some(its) = &self.its
            && device_double(its, KVM_DEV_ARM_VGIC_GRP_ITS_REGS, GITS_CTLR)? & ENABLED != 0
        {
            // Which messages have interrupts is in tables of the guest's.
            return Ok(true);
        }
        let Some(device) = &self.gic else { return Ok(false) };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_its_comes_with_gicv3_where_the_host_has_it_unless_nobody_wants_it() {
        let choose = |gic, msi, can| choose_msi(&Config { gic: Some(gic), msi, ..Config::default() }, || can);
        assert_eq!(choose(Gic::V3, None, true).unwrap(), Msi::Its);
        assert_eq!(choose(Gic::V3, None, false).unwrap(), Msi::None);
        assert_eq!(choose(Gic::V3, Some(Msi::None), true).unwrap(), Msi::None);
        assert_eq!(choose(Gic::V2, None, true).unwrap(), Msi::None);
        let refusal = choose(Gic::V3, Some(Msi::Its), false).unwrap_err();
        assert_eq!(crate::error::verdict(&refusal).0, 125, "{refusal}");
    }
}
