//! `bantam check`: what this host's KVM offers, each gap with its remedy.

use std::fmt::Write;

use anyhow::Result;
use kvm_ioctls::Cap;

use crate::arch;
use crate::vm::kvm;

/// A capability, what Bantam does with it, and what to do where it is missing.
pub struct Feature {
    cap: Cap,
    name: &'static str,
    /// Without it no machine runs.
    required: bool,
    use_: &'static str,
    remedy: &'static str,
}

const fn feature(cap: Cap, name: &'static str, required: bool, use_: &'static str, remedy: &'static str) -> Feature {
    Feature { cap, name, required, use_, remedy }
}

/// Every capability that Bantam uses or could use.
const FEATURES: &[Feature] = &[
    feature(Cap::UserMemory, "USER_MEMORY", true, "guest RAM", "needs Linux 2.6.25"),
    feature(Cap::ImmediateExit, "IMMEDIATE_EXIT", true, "stopping a CPU without a race", "needs Linux 4.13"),
    #[cfg(target_arch = "x86_64")]
    feature(Cap::SetTssAddr, "SET_TSS_ADDR", true, "real mode on older Intel CPUs", "needs Linux 2.6.25"),
    #[cfg(target_arch = "x86_64")]
    feature(Cap::ExtCpuid, "EXT_CPUID", true, "CPUID of the guest", "needs Linux 2.6.26"),
    #[cfg(target_arch = "x86_64")]
    feature(Cap::Irqchip, "IRQCHIP", false, "--irqchip kernel", "use --irqchip none, with one CPU"),
    #[cfg(target_arch = "x86_64")]
    feature(Cap::Pit2, "PIT2", false, "--irqchip kernel", "use --irqchip none, with one CPU"),
    feature(Cap::Irqfd, "IRQFD", false, "interrupts of devices", "use --irqchip none, with one CPU"),
    feature(Cap::MpState, "MP_STATE", false, "finding CPUs that halted for good", "end such machines with --timeout"),
    feature(
        Cap::SyncRegs,
        "SYNC_REGS",
        false,
        "entering a guest in one call instead of three",
        "none needed: Bantam makes the three",
    ),
    feature(Cap::Ioeventfd, "IOEVENTFD", false, "(later) doorbells of virtio devices", "none needed yet"),
    #[cfg(target_arch = "x86_64")]
    feature(Cap::SplitIrqchip, "SPLIT_IRQCHIP", false, "(later) --irqchip split", "none needed yet"),
    feature(Cap::ReadonlyMem, "READONLY_MEM", false, "(later) firmware in ROM", "none needed yet"),
    feature(Cap::OneReg, "ONE_REG", cfg!(target_arch = "aarch64"), "registers on arm64", "none needed on x86-64"),
    #[cfg(target_arch = "x86_64")]
    feature(Cap::Xsave, "XSAVE", false, "(later) snapshots", "none needed yet"),
    #[cfg(target_arch = "x86_64")]
    feature(Cap::AdjustClock, "ADJUST_CLOCK", false, "(later) clocks of snapshots", "none needed yet"),
    #[cfg(target_arch = "x86_64")]
    feature(Cap::X2ApicApi, "X2APIC_API", false, "(later) more than 255 CPUs", "none needed yet"),
    #[cfg(target_arch = "x86_64")]
    feature(
        Cap::TscDeadlineTimer,
        "TSC_DEADLINE_TIMER",
        false,
        "local APIC timers of guests",
        "guests use the other timer modes",
    ),
    feature(Cap::SetGuestDebug, "SET_GUEST_DEBUG", false, "(later) --gdb", "none needed yet"),
];

/// The report, and whether a machine can run here.
///
/// # Errors
/// `/dev/kvm` cannot be used at all; the error is the report.
pub fn check() -> Result<(String, bool)> {
    let kvm = kvm()?;
    let mut text = String::new();
    let mut line = |what: &str, value: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{what:27} {value}");
    };
    line("architecture", arch::NAME);
    line("/dev/kvm", "can be opened");
    line("API version", &kvm.get_api_version().to_string());
    line("CPUs, recommended", &kvm.get_nr_vcpus().to_string());
    line("CPUs, at most", &format!("{} (KVM), {} (Bantam)", kvm.get_max_vcpus(), arch::MAX_CPUS));
    line("memory slots", &kvm.get_nr_memslots().to_string());
    line("kvm_run", &format!("{} bytes a CPU", kvm.get_vcpu_mmap_size().unwrap_or(0)));
    #[cfg(target_arch = "x86_64")]
    line(
        "MSRs to save",
        &kvm.get_msr_index_list().map_or_else(|e| e.to_string(), |list| list.as_slice().len().to_string()),
    );
    let mut able = true;
    for feature in FEATURES {
        let there = kvm.check_extension(feature.cap);
        able &= there || !feature.required;
        let name = format!("KVM_CAP_{}", feature.name);
        let verdict = match (there, feature.required) {
            (true, _) => format!("yes      {}", feature.use_),
            (false, true) => format!("MISSING  {}: {}", feature.use_, feature.remedy),
            (false, false) => format!("no       {}: {}", feature.use_, feature.remedy),
        };
        line(&name, &verdict);
    }
    line("verdict", if able { "machines can run here" } else { "no machine can run here" });
    Ok((text, able))
}
