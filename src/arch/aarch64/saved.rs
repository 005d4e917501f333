//! The whole state of a CPU, and the guest's clock, read and set: what a snapshot holds of KVM, but for the interrupt
//! controller, which is the board's.
//!
//! Which registers there are KVM says itself; a register's number carries its size (KVM api.rst 4.68), and its content is a
//! list of 32-bit words that nobody here looks into. Invariants: what decides which others there are comes first (the
//! registers of KVM's own firmware), a CPU's events last. And the guest's clock belongs to no CPU: KVM has one offset for
//! all, so that it is read and set once.

use std::io;

use anyhow::{Context, Result, bail};
use kvm_bindings::{
    KVM_REG_ARM_COPROC_MASK, KVM_REG_ARM_FW, KVM_REG_ARM_FW_FEAT_BMAP, KVM_REG_SIZE_MASK, KVM_REG_SIZE_SHIFT,
    kvm_mp_state, kvm_vcpu_events, kvm_vcpu_events__bindgen_ty_1,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::registers::{self, CNTPCT_EL0, CNTVCT_EL0, PMCNTENCLR_EL0, PMINTENCLR_EL1, PMOVSCLR_EL0};
use crate::config::IrqChip;
use crate::error::{Refusal, refuse};
use crate::host::sys::state::{counter_hertz, register_list};

/// The guest's counters, of which some KVMs can only set the first.
const CLOCKS: [u64; 2] = [CNTVCT_EL0, CNTPCT_EL0];
/// Each is the other side of a register that is kept: it reads the same, and some KVMs (Linux 6.8 to 6.14) clear what is set here.
const TWINS: [u64; 3] = [PMINTENCLR_EL1, PMCNTENCLR_EL0, PMOVSCLR_EL0];

/// The largest register has 2048 bits (KVM_REG_SIZE_U2048); those of less than 32 bits no arm64 CPU has.
const SIZES: std::ops::RangeInclusive<u64> = 2..=8;

/// A register's number and its content.
type Register = (u64, Vec<u32>);

/// A CPU's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedCpu {
    /// Whether it runs, or is switched off until PSCI starts it (KVM_GET_MP_STATE).
    mp_state: u32,
    registers: Vec<Register>,
    /// An SError waits to be taken.
    serror: bool,
    /// And this is its syndrome, where the CPU keeps one.
    syndrome: Option<u64>,
}

impl SavedCpu {
    /// Its guest can be told that it stood still: none can.
    pub fn hears_of_stops(&self) -> bool {
        false
    }
}

/// The guest's clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedVm {
    /// How often a second it counts.
    hertz: u64,
    /// The virtual counter, and the physical one where KVM lets it be set.
    counters: Vec<(u64, u64)>,
}

/// How many bytes a register has.
fn size(id: u64) -> Result<usize, Refusal> {
    let size = (id & KVM_REG_SIZE_MASK) >> KVM_REG_SIZE_SHIFT;
    if SIZES.contains(&size) {
        Ok(1 << size)
    } else {
        Err(refuse(format!("register {id:#x} has a size of no register")))
    }
}

/// A register of KVM's own firmware: its PSCI version, the services that a guest finds. They come before a CPU's first run,
/// and some have a say in others.
fn is_firmware(id: u64) -> bool {
    let class = id & u64::from(KVM_REG_ARM_COPROC_MASK);
    [KVM_REG_ARM_FW, KVM_REG_ARM_FW_FEAT_BMAP].map(u64::from).contains(&class)
}

fn read(fd: &VcpuFd, id: u64) -> Result<Vec<u32>> {
    let mut bytes = vec![0; size(id)?];
    fd.get_one_reg(id, &mut bytes).map_err(io::Error::from).with_context(|| format!("KVM_GET_ONE_REG {id:#x}"))?;
    Ok(bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
}

/// Words as one number, as people write it.
fn number(words: &[u32]) -> String {
    let digits: String = words.iter().rev().map(|word| format!("{word:08x}")).collect();
    match digits.trim_start_matches('0') {
        "" => "0".into(),
        digits => format!("0x{digits}"),
    }
}

/// A register's content as bytes, as many as it has.
fn content((id, words): &Register) -> Result<Vec<u8>, Refusal> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    if size(*id)? != bytes.len() {
        return Err(refuse(format!("register {id:#x} does not have {} bytes", bytes.len())));
    }
    Ok(bytes)
}

fn set(fd: &VcpuFd, register: &Register) -> Result<()> {
    let (bytes, (id, words)) = (content(register)?, register);
    let Err(e) = fd.set_one_reg(*id, &bytes) else { return Ok(()) };
    // Some can only be read, and some only be set before now (SVE's lengths); what is there is as good.
    let now = read(fd, *id).ok();
    if now.as_deref() == Some(words) {
        return Ok(());
    }
    let now = now.map_or("it has no such register".into(), |now| format!("it has {}", number(&now)));
    let why = format!("this host's CPUs, or its KVM, cannot have {} in register {id:#x}", number(words));
    Err(refuse(format!("{why}: {now} ({})", io::Error::from(e))).hint("take a host of the same kind").into())
}

/// Reads a CPU's state; its last exit was completed.
///
/// # Errors
/// KVM refuses, or it has a register of unknown size.
pub fn save_cpu(_kvm: &Kvm, fd: &VcpuFd, _irqchip: Option<IrqChip>) -> Result<SavedCpu> {
    let ids = register_list(fd).context("KVM_GET_REG_LIST")?;
    let kept = |id: &u64| !CLOCKS.contains(id) && !TWINS.contains(id);
    let one = |id| Ok((id, read(fd, id)?));
    let events = fd.get_vcpu_events().map_err(io::Error::from).context("KVM_GET_VCPU_EVENTS")?.exception;
    Ok(SavedCpu {
        mp_state: fd.get_mp_state().map_err(io::Error::from).context("KVM_GET_MP_STATE")?.mp_state,
        registers: ids.into_iter().filter(kept).map(one).collect::<Result<_>>()?,
        serror: events.serror_pending != 0,
        syndrome: (events.serror_has_esr != 0).then_some(events.serror_esr),
    })
}

/// Sets a CPU's state, which has its features and has not run yet.
///
/// # Errors
/// A register cannot have its content here, or the state is not one of this version's.
pub fn load_cpu(_kvm: &Kvm, fd: &VcpuFd, saved: &SavedCpu) -> Result<()> {
    let SavedCpu { mp_state, registers, serror, syndrome } = saved;
    fd.set_mp_state(kvm_mp_state { mp_state: *mp_state }).map_err(io::Error::from).context("KVM_SET_MP_STATE")?;
    for first in [true, false] {
        let mut those = registers.iter().filter(|(id, _)| is_firmware(*id) == first);
        those.try_for_each(|register| set(fd, register))?;
    }
    let exception = kvm_vcpu_events__bindgen_ty_1 {
        serror_pending: (*serror).into(),
        serror_has_esr: syndrome.is_some().into(),
        serror_esr: syndrome.unwrap_or(0),
        ..Default::default()
    };
    let events = kvm_vcpu_events { exception, ..Default::default() };
    fd.set_vcpu_events(&events).map_err(io::Error::from).context("KVM_SET_VCPU_EVENTS")
}

/// Reads the guest's clock.
///
/// # Errors
/// KVM refuses.
pub fn save_vm(_fd: &VmFd, cpus: &[&VcpuFd], _irqchip: Option<IrqChip>) -> Result<SavedVm> {
    let cpu = cpus.first().context("no CPU")?;
    let mut counters = vec![(CNTVCT_EL0, registers::get(cpu, CNTVCT_EL0)?)];
    // Older ones (before Linux 6.4) do not know of it, and the guest has the host's.
    counters.extend(registers::get(cpu, CNTPCT_EL0).ok().map(|count| (CNTPCT_EL0, count)));
    Ok(SavedVm { hertz: counter_hertz(), counters })
}

/// Sets the guest's clock, of a machine none of whose CPUs has run.
///
/// # Errors
/// This host's counts at another rate, or the state is not one of this version's.
pub fn load_vm(_fd: &VmFd, cpus: &[&VcpuFd], saved: &SavedVm) -> Result<()> {
    let SavedVm { hertz, counters } = saved;
    if *hertz != counter_hertz() {
        let why = format!("the guest's clock counts {hertz} times a second, this host's {}", counter_hertz());
        return Err(refuse(why).hint("no arm64 CPU can scale it; take a host of the same kind").into());
    }
    let cpu = cpus.first().context("no CPU")?;
    for (id, count) in counters {
        if !CLOCKS.contains(id) {
            bail!("register {id:#x} is no clock");
        }
        // Of all CPUs at once: KVM keeps the difference to the host's counter for the machine.
        set(cpu, &(*id, vec![(count & 0xffff_ffff) as u32, (count >> 32) as u32]))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registers_number_says_how_many_bytes_it_has() {
        // x0; V0; FPSR; SVE's Z0, of KVM api.rst 4.68.
        let all = [(0x6030_0000_0010_0000, 8), (0x6040_0000_0010_0054, 16), (0x6020_0000_0010_00d4, 4)];
        all.into_iter().for_each(|(id, bytes)| assert_eq!(size(id).unwrap(), bytes));
        assert_eq!(size(0x6080_0000_0015_0000).unwrap(), 256);
        for id in [0, 0x6010_0000_0010_0000, 0x6090_0000_0015_0000, 0x60f0_0000_0015_0000, u64::MAX] {
            assert!(size(id).unwrap_err().to_string().contains("has a size of no register"), "{id:#x}");
        }
    }

    #[test]
    fn a_content_of_another_size_is_refused() {
        let x0 = 0x6030_0000_0010_0000;
        assert_eq!(content(&(x0, vec![0x0403_0201, 5])).unwrap(), [1, 2, 3, 4, 5, 0, 0, 0]);
        for words in [vec![], vec![1], vec![1; 3], vec![1; 4]] {
            assert!(content(&(x0, words)).unwrap_err().to_string().contains("does not have"));
        }
        assert!(content(&(u64::MAX, vec![])).is_err());
    }

    #[test]
    fn firmware_comes_first() {
        // KVM_REG_ARM_PSCI_VERSION, KVM_REG_ARM_STD_BMAP; PC, CNTV_CTL_EL0, SVE's Z0.
        assert!(is_firmware(0x6030_0000_0014_0000) && is_firmware(0x6030_0000_0016_0000));
        let others = [registers::PC, registers::CNTV_CTL_EL0, 0x6080_0000_0015_0000];
        assert!(!others.into_iter().any(is_firmware));
    }

    #[test]
    fn numbers_are_shown_as_people_write_them() {
        assert_eq!(
            [number(&[]), number(&[0, 0]), number(&[0x12, 0]), number(&[1, 2])],
            ["0", "0", "0x12", "0x200000001"]
        );
    }
}
