//! What an arm64 host's KVM offers beyond what every architecture's does.

use kvm_bindings::KVM_CAP_ARM_NISV_TO_USER;
use kvm_ioctls::{Cap, Kvm};

use crate::arch::{Feature, feature};

/// The capabilities that only arm64 has.
pub const FEATURES: &[Feature] = &[
    feature(Cap::OneReg, "ONE_REG", true, "registers", "needs Linux 3.11"),
    feature(Cap::ArmPsci02, "ARM_PSCI_0_2", true, "starting CPUs, power-off, reset", "needs Linux 3.16"),
    feature(Cap::DeviceCtrl, "DEVICE_CTRL", false, "the GIC", "use --irqchip none"),
    feature(Cap::ArmVmIPASize, "ARM_VM_IPA_SIZE", false, "RAM beyond 1 TiB", "keep RAM below 2^40"),
    feature(Cap::ArmPmuV3, "ARM_PMU_V3", false, "(later) performance counters of guests", "none needed yet"),
    feature(Cap::ArmSve, "ARM_SVE", false, "(later) SVE in guests", "none needed yet"),
    feature(
        Cap::ArmPtrAuthAddress,
        "ARM_PTRAUTH_ADDRESS",
        false,
        "(later) pointer authentication in guests",
        "none needed yet",
    ),
    feature(Cap::SignalMsi, "SIGNAL_MSI", false, "(later) MSI interrupts", "none needed yet"),
    feature(Cap::VcpuEvents, "VCPU_EVENTS", false, "(later) snapshots", "none needed yet"),
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
