//! What an x86-64 host's KVM offers beyond what every architecture's does.

use kvm_ioctls::{Cap, Kvm, VcpuFd};

use crate::arch::{Feature, feature};
use crate::error::Refusal;

/// The capabilities that only x86-64 has.
pub const FEATURES: &[Feature] = &[
    feature(Cap::SetTssAddr, "SET_TSS_ADDR", true, "real mode on older Intel CPUs", "needs Linux 2.6.25"),
    feature(Cap::ExtCpuid, "EXT_CPUID", true, "CPUID of the guest", "needs Linux 2.6.26"),
    feature(Cap::Irqchip, "IRQCHIP", false, "--irqchip kernel", "use --irqchip none, with one CPU"),
    feature(Cap::Pit2, "PIT2", false, "--irqchip kernel", "use --irqchip none, with one CPU"),
    feature(Cap::SplitIrqchip, "SPLIT_IRQCHIP", false, "--irqchip split", "--irqchip kernel does without"),
    feature(Cap::Xsave, "XSAVE", false, "snapshots", "do without"),
    feature(Cap::AdjustClock, "ADJUST_CLOCK", false, "snapshots: the guest's clock", "do without"),
    feature(Cap::X2ApicApi, "X2APIC_API", false, "(later) more than 255 CPUs", "none needed yet"),
    feature(
        Cap::TscDeadlineTimer,
        "TSC_DEADLINE_TIMER",
        false,
        "local APIC timers of guests",
        "guests use the other timer modes",
    ),
    feature(Cap::SignalMsi, "SIGNAL_MSI", false, "--irqchip split", "--irqchip kernel does without"),
    feature(Cap::KvmclockCtrl, "KVMCLOCK_CTRL", false, "guests that stood still complain of no stall", "none needed"),
    feature(Cap::TscControl, "TSC_CONTROL", false, "snapshots of hosts with another TSC frequency", "do without"),
    feature(Cap::VcpuEvents, "VCPU_EVENTS", false, "snapshots", "do without"),
    feature(Cap::Debugregs, "DEBUGREGS", false, "snapshots", "do without"),
    feature(Cap::Xcrs, "XCRS", false, "snapshots", "do without"),
];

/// Numbers worth knowing of this host.
pub fn host_facts(kvm: &Kvm) -> Vec<(&'static str, String)> {
    let msrs = kvm.get_msr_index_list().map_or_else(|e| e.to_string(), |list| list.as_slice().len().to_string());
    vec![("MSRs to save", msrs)]
}

/// No guest of a PC says what pages it wants before it runs.
///
/// # Errors
/// None here.
pub fn check_page_size(_fd: &VcpuFd, _size: u32) -> Result<(), Refusal> {
    Ok(())
}
