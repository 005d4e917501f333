//! What KVM emulates besides CPUs, read and set: a GIC of either version, its ITS, the guest's clock.
//!
//! The GIC's registers are read and set as the guest would, by their offsets, in blocks of one kind (KVM
//! Documentation/virt/kvm/devices/arm-vgic-v3.rst, arm-vgic.rst and arm-vgic-its.rst). Invariants: what an interrupt is (its group, its kind,
//! its CPU) is set before whether it waits. And what lies in tables in RAM is there for the ITS to find: its own are written
//! before RAM is saved, and read once RAM is there.

use std::io;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{
    KVM_DEV_ARM_ITS_RESTORE_TABLES, KVM_DEV_ARM_ITS_SAVE_TABLES, KVM_DEV_ARM_VGIC_GRP_CPU_REGS,
    KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_DIST_REGS,
    KVM_DEV_ARM_VGIC_GRP_ITS_REGS, KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, KVM_DEV_ARM_VGIC_GRP_REDIST_REGS,
    KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES, kvm_device_attr,
};
use kvm_ioctls::{DeviceFd, VcpuFd};
use serde::{Deserialize, Serialize};

use super::gic::{FIRST_SPI, INTERRUPTS};
use crate::arch::{self, mpidr};
use crate::board::Board;
use crate::config::{Gic, IrqChip};
use crate::vm::{Vm, device_double, device_word};

/// Registers of one kind, one behind the other: the first one's offset, how many there are.
struct Block {
    name: &'static str,
    group: u32,
    first: u64,
    count: u64,
    kind: Kind,
}

/// How a register is set.
#[derive(PartialEq, Eq)]
enum Kind {
    /// As it is.
    Plain,
    /// Bits that are set by ones here, and cleared by ones in the registers 0x80 bytes on (IHI 0069, 12.9: GICD_ISENABLER and
    /// GICD_ICENABLER).
    Switches,
    /// Also where it is so already: that it is said allows more.
    Always,
    /// Without what software has sent: a GICv2 tells that together with who has.
    ByWires,
}

/// Interrupts that software sends, in a register with a bit for each of a CPU's own.
const SENT: u64 = 0xffff;

const fn block(name: &'static str, group: u32, first: u64, count: u64) -> Block {
    Block { name, group, first, count, kind: Kind::Plain }
}

const fn switches(name: &'static str, group: u32, first: u64, count: u64) -> Block {
    Block { name, group, first, count, kind: Kind::Switches }
}

const fn kept(kind: Kind, name: &'static str, first: u64) -> Block {
    Block { kind, ..block(name, DISTRIBUTOR, first, 1) }
}

const INTERFACE: u32 = KVM_DEV_ARM_VGIC_GRP_CPU_REGS;
const DISTRIBUTOR: u32 = KVM_DEV_ARM_VGIC_GRP_DIST_REGS;
const REDISTRIBUTOR: u32 = KVM_DEV_ARM_VGIC_GRP_REDIST_REGS;
const SYSTEM: u32 = KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS;
const ITS: u32 = KVM_DEV_ARM_VGIC_GRP_ITS_REGS;
const LEVELS: u32 = KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO;

/// Shared interrupts, and their registers of so many bits each.
const FIRST: u64 = FIRST_SPI as u64;
const SHARED: u64 = INTERRUPTS as u64 - FIRST;

const fn shared(name: &'static str, first: u64, bits: u64) -> Block {
    block(name, DISTRIBUTOR, first + FIRST * bits / 8, SHARED * bits / 32)
}

/// The distributor's, in the order in which they are set (IHI 0069, 12.9). The first says which of its ways KVM's GIC has;
/// which interrupts are held high by their devices is a register of none.
const OF_ALL: [Block; 10] = [
    block("GICD_IIDR", DISTRIBUTOR, 8, 1),
    shared("GICD_IROUTER", 0x6000, 64),
    shared("GICD_IGROUPR", 0x80, 1),
    shared("GICD_ICFGR", 0xc00, 2),
    shared("GICD_IPRIORITYR", 0x400, 8),
    block("levels", LEVELS, FIRST, SHARED / 32),
    shared("GICD_ISPENDR", 0x200, 1),
    shared("GICD_ISACTIVER", 0x300, 1),
    switches("GICD_ISENABLER", DISTRIBUTOR, 0x100 + FIRST / 8, SHARED / 32),
    block("GICD_CTLR", DISTRIBUTOR, 0, 1),
];

/// The same of a GICv2 (IHI 0048, 4.3). KVM lets nobody set groups who has not told it the first.
const OF_ALL_2: [Block; 9] = [
    kept(Kind::Always, "GICD_IIDR", 8),
    shared("GICD_ITARGETSR", 0x800, 8),
    shared("GICD_IGROUPR", 0x80, 1),
    shared("GICD_ICFGR", 0xc00, 2),
    shared("GICD_IPRIORITYR", 0x400, 8),
    shared("GICD_ISPENDR", 0x200, 1),
    shared("GICD_ISACTIVER", 0x300, 1),
    switches("GICD_ISENABLER", DISTRIBUTOR, 0x100 + FIRST / 8, SHARED / 32),
    block("GICD_CTLR", DISTRIBUTOR, 0, 1),
];

/// Of each of its CPUs: what the distributor has of its own, and its interface (4.4).
const OF_A_CPU_2: [Block; 12] = [
    block("GICD_IGROUPR0", DISTRIBUTOR, 0x80, 1),
    block("GICD_ICFGR", DISTRIBUTOR, 0xc00, 2),
    block("GICD_IPRIORITYR", DISTRIBUTOR, 0x400, 8),
    kept(Kind::ByWires, "GICD_ISPENDR0", 0x200),
    block("GICD_SPENDSGIR", DISTRIBUTOR, 0xf20, 4),
    block("GICD_ISACTIVER0", DISTRIBUTOR, 0x300, 1),
    switches("GICD_ISENABLER0", DISTRIBUTOR, 0x100, 1),
    block("GICC_CTLR", INTERFACE, 0, 1),
    block("GICC_PMR", INTERFACE, 4, 1),
    block("GICC_BPR", INTERFACE, 8, 1),
    block("GICC_ABPR", INTERFACE, 0x1c, 1),
    block("GICC_APR", INTERFACE, 0xd0, 4),
];

/// Of a redistributor: the frame of the interrupts that are its CPU's own.
const OWN: u64 = 0x1_0000;

/// A redistributor's (IHI 0069, 12.11). The tables of message interrupts are named before they are used.
const OF_A_CPU: [Block; 10] = [
    block("GICR_PROPBASER", REDISTRIBUTOR, 0x70, 2),
    block("GICR_PENDBASER", REDISTRIBUTOR, 0x78, 2),
    block("GICR_CTLR", REDISTRIBUTOR, 0, 1),
    block("GICR_IGROUPR0", REDISTRIBUTOR, OWN + 0x80, 1),
    block("GICR_ICFGR", REDISTRIBUTOR, OWN + 0xc00, 2),
    block("GICR_IPRIORITYR", REDISTRIBUTOR, OWN + 0x400, 8),
    block("levels", LEVELS, 0, 1),
    block("GICR_ISPENDR0", REDISTRIBUTOR, OWN + 0x200, 1),
    block("GICR_ISACTIVER0", REDISTRIBUTOR, OWN + 0x300, 1),
    switches("GICR_ISENABLER0", REDISTRIBUTOR, OWN + 0x100, 1),
];

/// The encoding of a system register of the CPU interface: those here have op0 3, op1 0.
const fn system(crn: u64, crm: u64, op2: u64) -> u64 {
    3 << 14 | crn << 7 | crm << 3 | op2
}

/// ICC_CTLR_EL1, and what it says in PRIbits: how many bits of priorities there are, less one (IHI 0069, 12.2.6).
const CONTROL: u64 = system(12, 12, 4);

/// The CPU interface's. Its registers of active priorities are as many as `control` says: a bit for each priority.
fn of_an_interface(control: u64) -> [Block; 8] {
    let active = match (control >> 8 & 7) + 1 {
        7.. => 4,
        6 => 2,
        _ => 1,
    };
    [
        block("ICC_SRE_EL1", SYSTEM, system(12, 12, 5), 1),
        block("ICC_CTLR_EL1", SYSTEM, CONTROL, 1),
        block("ICC_PMR_EL1", SYSTEM, system(4, 6, 0), 1),
        block("ICC_BPR0_EL1", SYSTEM, system(12, 8, 3), 1),
        block("ICC_BPR1_EL1", SYSTEM, system(12, 12, 3), 1),
        block("ICC_AP0R_EL1", SYSTEM, system(12, 8, 4), active),
        block("ICC_AP1R_EL1", SYSTEM, system(12, 9, 0), active),
        block("ICC_IGRPEN_EL1", SYSTEM, system(12, 12, 6), 2),
    ]
}

/// The ITS' (IHI 0069, 12.19): where its commands are before how far it is with them, and that it works at the end.
const OF_THE_ITS: [Block; 6] = [
    block("GITS_CBASER", ITS, 0x80, 1),
    block("GITS_CREADR", ITS, 0x90, 1),
    block("GITS_CWRITER", ITS, 0x88, 1),
    block("GITS_IIDR", ITS, 4, 1),
    block("GITS_BASER", ITS, 0x100, 8),
    block("GITS_CTLR", ITS, 0, 1),
];

/// What a block holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Registers {
    name: String,
    values: Vec<u64>,
}

/// The state of what KVM emulates besides CPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedVm {
    clock: arch::SavedVm,
    gic: Option<SavedGic>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedGic {
    distributor: Vec<Registers>,
    /// Of each CPU: its redistributor and its interface.
    cpus: Vec<Vec<Registers>>,
    its: Option<Vec<Registers>>,
}

impl Block {
    /// The attribute of the register `index` of this kind that is `cpu`'s.
    fn attribute(&self, cpu: u32, index: u64) -> u64 {
        let step = match self.group {
            SYSTEM => 1,
            ITS => 8,
            // Each tells of 32.
            LEVELS => 32,
            _ => 4,
        };
        let cpu = if self.group == ITS { 0 } else { mpidr(cpu) << 32 };
        cpu | (self.first + step * index)
    }

    fn is_wide(&self) -> bool {
        [SYSTEM, ITS].contains(&self.group)
    }

    fn get(&self, device: &DeviceFd, attribute: u64) -> Result<u64> {
        let value = if self.is_wide() {
            device_double(device, self.group, attribute)
        } else {
            device_word(device, self.group, attribute).map(u64::from)
        };
        value.with_context(|| format!("reading {}", self.name))
    }

    fn put(&self, device: &DeviceFd, attribute: u64, value: u64) -> Result<()> {
        if self.is_wide() {
            return tell(device, self.group, attribute, Some(&value));
        }
        let value = u32::try_from(value).context("the register has 32 bits")?;
        tell(device, self.group, attribute, Some(&value))
    }

    fn save(&self, device: &DeviceFd, cpu: u32) -> Result<Registers> {
        let wires = |value| if self.kind == Kind::ByWires { value & !SENT } else { value };
        let all = (0..self.count).map(|index| self.get(device, self.attribute(cpu, index)).map(wires));
        Ok(Registers { name: self.name.into(), values: all.collect::<Result<_>>()? })
    }

    fn load(&self, device: &DeviceFd, cpu: u32, saved: &Registers) -> Result<()> {
        for (index, value) in (0..).zip(&saved.values) {
            let at = self.attribute(cpu, index);
            // Some only say how this KVM is, and some are not left as they are set.
            if self.kind != Kind::Always && self.get(device, at)? == *value {
                continue;
            }
            let told = || format!("this host's KVM cannot have {value:#x} in {}", self.name);
            if self.kind == Kind::Switches {
                self.put(device, at + 0x80, !value & u64::from(u32::MAX)).with_context(told)?;
            }
            self.put(device, at, *value).with_context(told)?;
        }
        Ok(())
    }
}

/// Sets an attribute, or has KVM do something. Not narrated: there are hundreds.
fn tell<T>(device: &DeviceFd, group: u32, attr: u64, value: Option<&T>) -> Result<()> {
    let addr = value.map_or(0, |value| std::ptr::from_ref(value).expose_provenance() as u64);
    device
        .set_device_attr(&kvm_device_attr { flags: 0, group, attr, addr })
        .map_err(io::Error::from)
        .with_context(|| format!("KVM_SET_DEVICE_ATTR {group} {attr:#x}"))
}

fn save_all(device: &DeviceFd, cpu: u32, blocks: &[Block]) -> Result<Vec<Registers>> {
    blocks.iter().map(|block| block.save(device, cpu)).collect()
}

/// Blocks and what each is to hold, where a state is that of these.
fn pairs<'a>(blocks: &'a [Block], saved: &'a [Registers]) -> Result<impl Iterator<Item = (&'a Block, &'a Registers)>> {
    let fits =
        |(block, saved): (&Block, &Registers)| block.name == saved.name && block.count == saved.values.len() as u64;
    if blocks.len() != saved.len() || !blocks.iter().zip(saved).all(fits) {
        let here: Vec<_> = blocks.iter().map(|block| format!("{} {}", block.count, block.name)).collect();
        let told: Vec<_> = saved.iter().map(|saved| format!("{} {}", saved.values.len(), saved.name)).collect();
        let (here, told) = (here.join(", "), told.join(", "));
        bail!("an interrupt controller has the registers {here} here, and its state is that of {told}");
    }
    Ok(blocks.iter().zip(saved))
}

fn load_all(device: &DeviceFd, cpu: u32, blocks: &[Block], saved: &[Registers]) -> Result<()> {
    pairs(blocks, saved)?.try_for_each(|(block, saved)| block.load(device, cpu, saved))
}

/// ICC_CTLR_EL1 of a CPU.
fn control(gic: &DeviceFd, cpu: u32) -> Result<u64> {
    let block = block("ICC_CTLR_EL1", SYSTEM, CONTROL, 1);
    block.get(gic, block.attribute(cpu, 0))
}

/// Has a device do something with tables in RAM.
fn order(device: &DeviceFd, what: u32, told: &'static str) -> Result<()> {
    tell(device, KVM_DEV_ARM_VGIC_GRP_CTRL, what.into(), None::<&u32>).context(told)
}

impl SavedGic {
    /// Reads all of a GICv2.
    fn save_2(gic: &DeviceFd, cpus: u32) -> Result<Self> {
        let cpus = (0..cpus).map(|cpu| save_all(gic, cpu, &OF_A_CPU_2)).collect::<Result<_>>()?;
        Ok(Self { distributor: save_all(gic, 0, &OF_ALL_2)?, cpus, its: None })
    }

    fn load_2(&self, gic: &DeviceFd, cpus: u32) -> Result<()> {
        let Self { distributor, cpus: own, its } = self;
        ensure!(own.len() == cpus as usize, "the saved interrupt controller is that of {} CPUs", own.len());
        ensure!(its.is_none(), "a GICv2 has no ITS, and the state has one");
        // Whether groups can be set is said first, that it works at the end; neither is of use to a CPU before.
        load_all(gic, 0, &OF_ALL_2, distributor)?;
        (0..).zip(own).try_for_each(|(cpu, saved)| load_all(gic, cpu, &OF_A_CPU_2, saved))
    }

    /// Reads all of a GICv3; what is in tables of the guest's is written to them.
    fn save(gic: &DeviceFd, its: Option<&DeviceFd>, cpus: u32) -> Result<Self> {
        if let Some(its) = its {
            order(its, KVM_DEV_ARM_ITS_SAVE_TABLES, "writing the tables of the ITS")?;
            order(gic, KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES, "writing which messages wait")?;
        }
        let one = |cpu| {
            let mut all = save_all(gic, cpu, &OF_A_CPU)?;
            all.extend(save_all(gic, cpu, &of_an_interface(control(gic, cpu)?))?);
            Ok(all)
        };
        Ok(Self {
            distributor: save_all(gic, 0, &OF_ALL)?,
            cpus: (0..cpus).map(one).collect::<Result<_>>()?,
            its: its.map(|its| save_all(its, 0, &OF_THE_ITS)).transpose()?,
        })
    }

    fn load(&self, gic: &DeviceFd, its: Option<&DeviceFd>, cpus: u32) -> Result<()> {
        let Self { distributor, cpus: own, its: of_its } = self;
        ensure!(own.len() == cpus as usize, "the saved interrupt controller is that of {} CPUs", own.len());
        load_all(gic, 0, &OF_ALL, distributor)?;
        for (cpu, saved) in (0..).zip(own) {
            let (redistributor, interface) = saved.split_at(OF_A_CPU.len().min(saved.len()));
            load_all(gic, cpu, &OF_A_CPU, redistributor)?;
            load_all(gic, cpu, &of_an_interface(control(gic, cpu)?), interface)?;
        }
        match (its, of_its) {
            (None, None) => Ok(()),
            (Some(its), Some(saved)) => {
                // The last lets it work, for which it needs its tables.
                let (before, last) = saved.split_at(saved.len().saturating_sub(1));
                let (blocks, control) = OF_THE_ITS.split_at(OF_THE_ITS.len() - 1);
                load_all(its, 0, blocks, before)?;
                order(its, KVM_DEV_ARM_ITS_RESTORE_TABLES, "reading the tables of the ITS")?;
                load_all(its, 0, control, last)
            }
            _ => bail!("one of the machine and the state has an ITS, and the other has not"),
        }
    }
}

/// Reads the state of what KVM emulates besides CPUs. That of message interrupts is in tables in RAM, which are written here.
///
/// # Errors
/// KVM refuses, or a table of the guest's is where no RAM is.
pub fn save_vm(vm: &Vm, cpus: &[&VcpuFd], board: &Board, irqchip: Option<IrqChip>) -> Result<SavedVm> {
    let (chip, count) = (&board.irqchip, cpus.len() as u32);
    let save = |gic| match chip.version {
        Some(Gic::V2) => SavedGic::save_2(gic, count),
        _ => SavedGic::save(gic, chip.its.as_ref(), count),
    };
    let gic = chip.gic.as_ref().map(save).transpose()?;
    Ok(SavedVm { gic, clock: arch::save_vm(vm.fd(), cpus, irqchip)? })
}

/// Sets that state, of a machine of the same kind that has its RAM and whose CPUs have theirs.
///
/// # Errors
/// KVM refuses, or the state is not one of this version's.
pub fn load_vm(vm: &Vm, cpus: &[&VcpuFd], board: &Board, (saved, _passed): (&SavedVm, Duration)) -> Result<()> {
    // A guest here cannot be told that it stood still: its counter goes on from where it was, whatever the time. After a
    // jump Linux reports CPUs that were busy as stuck, and one of two hours is too long for its sched_clock.
    let (SavedVm { clock, gic: saved }, chip) = (saved, &board.irqchip);
    match (&chip.gic, saved) {
        (None, None) => {}
        (Some(gic), Some(saved)) if chip.version == Some(Gic::V2) => saved.load_2(gic, cpus.len() as u32)?,
        (Some(gic), Some(saved)) => saved.load(gic, chip.its.as_ref(), cpus.len() as u32)?,
        _ => bail!("one of the machine and the state has an interrupt controller, and the other has not"),
    }
    // Last: from now on it goes on.
    arch::load_vm(vm.fd(), cpus, clock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_where_the_manual_and_kvm_have_them() {
        let at = |name: &str| {
            let block = OF_ALL.iter().chain(&OF_A_CPU).chain(&OF_THE_ITS).find(|block| block.name == name).unwrap();
            let last = block.attribute(0, block.count - 1);
            (block.attribute(0, 0), last)
        };
        // IHI 0069, 12.9 and 12.11: of interrupts 32 to 127.
        assert_eq!(at("GICD_IROUTER"), (0x6100, 0x63fc));
        assert_eq!(at("GICD_IGROUPR"), (0x84, 0x8c));
        assert_eq!(at("GICD_ICFGR"), (0xc08, 0xc1c));
        assert_eq!(at("GICD_IPRIORITYR"), (0x420, 0x47c));
        assert_eq!(at("GICD_ISENABLER"), (0x104, 0x10c));
        assert_eq!(at("levels"), (32, 96));
        assert_eq!(at("GICR_IPRIORITYR"), (0x1_0400, 0x1_041c));
        assert_eq!(at("GITS_BASER"), (0x100, 0x138));
        // Aff1 1, Aff0 0 for CPU 16, in the upper half.
        assert_eq!(OF_A_CPU[2].attribute(16, 0), 0x100 << 32);
        // "Op0 Op1 CRn CRm Op2" of arm-vgic-v3.rst: ICC_PMR_EL1 is S3_0_C4_C6_0, ICC_AP1R3_EL1 S3_0_C12_C9_3.
        let seven = of_an_interface(6 << 8);
        assert_eq!(seven[2].attribute(0, 0), 0xc230);
        assert_eq!(seven[6].attribute(1, 3), 1 << 32 | 0xc64b);
        assert_eq!([4, 5, 6].map(|bits| of_an_interface(bits << 8)[5].count), [1, 2, 4]);
    }

    #[test]
    fn a_state_of_other_registers_is_refused() {
        let saved = |name: &str, values: &[u64]| Registers { name: name.into(), values: values.to_vec() };
        let blocks = [block("A", DISTRIBUTOR, 0, 1), block("B", DISTRIBUTOR, 4, 2)];
        assert_eq!(pairs(&blocks, &[saved("A", &[1]), saved("B", &[1, 2])]).unwrap().count(), 2);
        for wrong in [
            vec![],
            vec![saved("A", &[1])],
            vec![saved("B", &[1, 2]), saved("A", &[1])],
            vec![saved("A", &[1]), saved("B", &[1])],
            vec![saved("A", &[1]), saved("B", &[1, 2, 3])],
            vec![saved("A", &[1]), saved("B", &[1, 2]), saved("B", &[1, 2])],
        ] {
            let error = pairs(&blocks, &wrong).err().unwrap().to_string();
            assert!(error.contains("the registers 1 A, 2 B here"), "{error}");
        }
    }
}
