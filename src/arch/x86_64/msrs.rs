//! What a PC's firmware leaves in a CPU: memory types, LINT pins, and what Linux would otherwise complain of.
//!
//! Invariant: the same on every CPU; each value is one that the SDM allows.

use std::io;

use anyhow::{Context, Result, bail};
use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::explain::{Outcome, call};

/// IA32_MTRR_DEF_TYPE (SDM vol. 3, 13.11.2.1): MTRRs on, fixed ones too, and write-back for what none of them names.
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRRS_WRITE_BACK: u64 = 1 << 11 | 6;
/// IA32_MISC_ENABLE (SDM vol. 4): fast string operations.
const MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;

/// Offsets in the local APIC's page, and delivery modes (SDM vol. 3, 12.5.1).
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const EXTINT: u32 = 7 << 8;
const NMI: u32 = 4 << 8;
const DELIVERY: u32 = 7 << 8;
const MASKED: u32 = 1 << 16;

/// Sets what a firmware would; `local_apic`: the CPU has one, in KVM; `pic`: and the machine 8259A.
///
/// # Errors
/// KVM refuses.
pub fn as_firmware_leaves_it(fd: &VcpuFd, local_apic: bool, pic: bool) -> Result<()> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [entry(MTRR_DEF_TYPE, MTRRS_WRITE_BACK), entry(MISC_ENABLE, FAST_STRINGS)];
    let msrs = Msrs::from_entries(&entries).context("two MSRs")?;
    let why =
        "What a PC's firmware leaves: memory is write-back where no MTRR says otherwise, string instructions are fast.";
    let fields = || (format!("IA32_MTRR_DEF_TYPE {MTRRS_WRITE_BACK:#x}, IA32_MISC_ENABLE {FAST_STRINGS:#x}"), why);
    let set = call("KVM_SET_MSRS", fields, || fd.set_msrs(&msrs)).map_err(io::Error::from).context("KVM_SET_MSRS")?;
    if set != entries.len() {
        bail!("KVM_SET_MSRS took {set} of {}", entries.len());
    }
    if !local_apic {
        return Ok(());
    }
    let why = "The two interrupt pins of the local APIC, as a PC's firmware leaves them: the 8259A, and the NMI.";
    let read = "The local APIC's registers, of which two are to change.";
    let mut lapic = call("KVM_GET_LAPIC", || (String::new(), read), || fd.get_lapic())
        .map_err(io::Error::from)
        .context("KVM_GET_LAPIC")?;
    set_pin(&mut lapic, LVT_LINT0, if pic { EXTINT } else { EXTINT | MASKED })?;
    set_pin(&mut lapic, LVT_LINT1, NMI)?;
    call("KVM_SET_LAPIC", || ("LINT0 ExtINT, LINT1 NMI".into(), why), || fd.set_lapic(&lapic))
        .map_err(io::Error::from)
        .context("KVM_SET_LAPIC")
}

impl Outcome for kvm_lapic_state {
    fn show(&self) -> String {
        format!("{} bytes of registers", self.regs.len())
    }
}

fn set_pin(lapic: &mut kvm_lapic_state, at: usize, mode: u32) -> Result<()> {
    let register =
        lapic.regs.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<4>()).context("the local APIC's page")?;
    // The array is of C's char, whose sign says nothing here.
    let value = u32::from_le_bytes(register.map(|byte| byte.to_le_bytes()[0]));
    *register = (value & !(DELIVERY | MASKED) | mode).to_le_bytes().map(|byte| i8::from_le_bytes([byte]));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_keeps_what_is_not_its_mode() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[LVT_LINT1..][..4].copy_from_slice(&[0x55, -1, 1, 0]);
        set_pin(&mut lapic, LVT_LINT1, NMI).unwrap();
        let bytes: Vec<u8> = lapic.regs[LVT_LINT1..][..4].iter().map(|b| b.to_le_bytes()[0]).collect();
        assert_eq!(u32::from_le_bytes(bytes.try_into().unwrap()), 0xfc55);
    }
}
