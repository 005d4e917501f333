//! What an arm64 host's KVM offers beyond what every architecture's does.

use kvm_bindings::KVM_CAP_ARM_NISV_TO_USER;
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::registers;
use crate::arch::{Feature, feature};
use crate::error::{Refusal, refuse};

/// The capabilities that only arm64 has.
pub const FEATURES: &[Feature] = &[
    feature(Cap::OneReg, "ONE_REG", true, "registers", "needs Linux 3.11"),
    feature(Cap::ArmPsci02, "ARM_PSCI_0_2", true, "starting CPUs, power-off, reset", "needs Linux 3.16"),
    feature(Cap::DeviceCtrl, "DEVICE_CTRL", false, "the GIC", "use --irqchip none"),
    feature(Cap::ArmVmIPASize, "ARM_VM_IPA_SIZE", false, "RAM beyond 1 TiB", "keep RAM below 2^40"),
    feature(Cap::ArmPmuV3, "ARM_PMU_V3", false, "performance counters of guests (--cpu-features pmu)", "do without"),
    feature(Cap::ArmSve, "ARM_SVE", false, "SVE in guests (--cpu-features sve)", "do without"),
    feature(
        Cap::ArmPtrAuthAddress,
        "ARM_PTRAUTH_ADDRESS",
        false,
        "(later) pointer authentication in guests",
        "none needed yet",
    ),
    feature(Cap::SignalMsi, "SIGNAL_MSI", false, "message-signalled interrupts (--msi its)", "devices use their lines"),
    feature(Cap::VcpuEvents, "VCPU_EVENTS", false, "snapshots", "do without"),
];

/// Numbers worth knowing of this host.
pub fn host_facts(kvm: &Kvm) -> Vec<(&'static str, String)> {
    let ipa = match kvm.check_extension_int(Cap::ArmVmIPASize) {
        0 => "40 bits (the host offers no other)".to_owned(),
        bits => format!("32 to {bits} bits"),
    };
    let nisv = match kvm.check_extension_raw(KVM_CAP_ARM_NISV_TO_USER.into()) {
        0 => "no (such a guest ends KVM_RUN with an error)",
        _ => "yes",
    };
    vec![("guest-physical addresses", ipa), ("reports NISV accesses", nisv.to_owned())]
}

/// The host's CPU has pages of `size` bytes, which a guest says that it wants (Arm ARM D19.2.64, ID_AA64MMFR0_EL1: TGran4,
/// TGran64, TGran16). Where the CPU's word cannot be had the guest finds out itself.
///
/// # Errors
/// It has not.
pub fn check_page_size(fd: &VcpuFd, size: u32) -> Result<(), Refusal> {
    match registers::get(fd, registers::ID_AA64MMFR0_EL1) {
        Ok(word) if !has_page_size(word, size) => {
            let what = format!("this kernel has pages of {} KiB, which this host's CPU has not", size >> 10);
            Err(refuse(what).hint("take a kernel with pages of 4 KiB"))
        }
        _ => Ok(()),
    }
}

fn has_page_size(word: u64, size: u32) -> bool {
    let field = |at: u32| word >> at & 0xf;
    match size {
        0x1000 => field(28) != 0xf,
        0x4000 => field(20) != 0,
        0x1_0000 => field(24) != 0xf,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_sizes_of_a_cpu_are_those_of_its_register() {
        let sizes = |word| [0x1000, 0x4000, 0x1_0000].map(|size| has_page_size(word, size));
        // A Cortex-A72 (DDI 0488), one that has all, one that has none, one without 64 KiB.
        assert_eq!(sizes(0x0000_1124), [true, false, true]);
        assert_eq!(sizes(0x1210_0032), [true, true, true]);
        assert_eq!(sizes(0xff00_0000), [false, false, false]);
        assert_eq!(sizes(0x0f20_0000), [true, true, false]);
    }
}
