//! `bantam check`: what this host's KVM offers, each gap with its remedy.

use std::fmt::Write;

use anyhow::Result;
use kvm_ioctls::Cap;

use crate::arch::{self, Feature, feature};
use crate::board;
use crate::config::Config;
use crate::host::sys::userfault;
use crate::vm::{Vm, kvm};

/// What every architecture's KVM may have.
const COMMON: &[Feature] = &[
    feature(Cap::UserMemory, "USER_MEMORY", true, "guest RAM", "needs Linux 2.6.25"),
    feature(Cap::ImmediateExit, "IMMEDIATE_EXIT", true, "stopping a CPU without a race", "needs Linux 4.13"),
    feature(Cap::Irqfd, "IRQFD", false, "interrupts of devices", "use --irqchip none, with one CPU"),
    feature(Cap::MpState, "MP_STATE", false, "finding CPUs that halted for good", "end such machines with --timeout"),
    feature(
        Cap::SyncRegs,
        "SYNC_REGS",
        false,
        "entering a guest in one call instead of three",
        "none needed: Bantam makes the three",
    ),
    feature(
        Cap::Ioeventfd,
        "IOEVENTFD",
        false,
        "doorbells of virtio devices without an exit",
        "none needed: they exit",
    ),
    feature(
        Cap::ReadonlyMem,
        "READONLY_MEM",
        false,
        "PCI's configuration, read without an exit",
        "none needed: it exits",
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
        let _ = writeln!(text, "{what:29} {value}");
    };
    line("architecture", arch::NAME);
    line("/dev/kvm", "can be opened");
    line("API version", &kvm.get_api_version().to_string());
    line("CPUs, recommended", &kvm.get_nr_vcpus().to_string());
    line("CPUs, at most", &format!("{} (KVM), {} (Bantam)", kvm.get_max_vcpus(), arch::MAX_CPUS));
    line("memory slots", &kvm.get_nr_memslots().to_string());
    line("kvm_run", &format!("{} bytes a CPU", kvm.get_vcpu_mmap_size().unwrap_or(0)));
    for (what, value) in arch::host_facts(kvm) {
        line(what, &value);
    }
    let touched = match userfault::Guarded::first() {
        Ok(_) => "yes      --verify lazy: RAM of a snapshot is compared when it is touched".into(),
        Err(e) => format!("no       --verify lazy ({e}): needs root or vm.unprivileged_userfaultfd=1"),
    };
    line("userfaultfd, first touch", &touched);
    let userfault = match userfault::Guarded::new() {
        Ok(_) => "yes      a snapshot or a clone is taken while the guest goes on".into(),
        Err(e) => format!(
            "no       a machine stands still until its snapshot is written ({e}): needs Linux 5.19 (arm64: 6.10), and root or vm.unprivileged_userfaultfd=1"
        ),
    };
    line("userfaultfd, write protection", &userfault);
    // What only a machine can tell.
    let machine = arch::layout(&Config::default()).and_then(|layout| Vm::new(arch::vm_type(kvm, &layout)?));
    let mut able = machine.is_ok();
    let cannot = |e| vec![("a machine", format!("cannot be made: {e:#}"))];
    let facts = machine.map_or_else(cannot, |vm| board::host_facts(&vm));
    for (what, value) in facts {
        line(what, &value);
    }
    for feature in COMMON.iter().chain(arch::FEATURES) {
        let there = kvm.check_extension(feature.cap);
        able &= there || !feature.required;
        let name = format!("KVM_CAP_{}", feature.name);
        let verdict = match (there, feature.required) {
            (true, _) => format!("yes      {}", feature.purpose),
            (false, true) => format!("MISSING  {}: {}", feature.purpose, feature.remedy),
            (false, false) => format!("no       {}: {}", feature.purpose, feature.remedy),
        };
        line(&name, &verdict);
    }
    line("verdict", if able { "machines can run here" } else { "no machine can run here" });
    Ok((text, able))
}
