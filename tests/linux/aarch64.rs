//! Arm's virtual machine.

use crate::common::bantam;
use crate::guest::linux;

/// The only one.
pub const CLOCKSOURCES: &[&str] = &["arch_sys_counter"];
/// A kernel that need not unpack itself: every `Image`.
pub const UNCOMPRESSED: &str = "6.12/vmlinuz";
/// Drivers of Debian's cloud kernels.
pub const HAS_PVPANIC: bool = false;
pub const HAS_BUTTON: bool = false;

/// What a kernel says of what this host gives its machines.
pub fn found() -> Vec<&'static str> {
    let host = bantam("check").run().out();
    if host.contains("its ITS") { vec!["ITS [mem 0x08080000-0x0809ffff]"] } else { Vec::new() }
}

/// A machine with this feature says these words where the host's KVM has it; where not, it is refused and says why.
fn feature(word: &str, capability: &str, found: &[&str]) {
    let words = format!("--memory 256M --cpus 2 --cpu-features {word}");
    if !bantam("check").run().out().lines().any(|line| line.starts_with(capability) && line.contains(" yes ")) {
        if crate::common::kvm() {
            bantam("example hello --cpu-features").arg(word).run().refused(125).said(capability).said("hint: leave");
            crate::common::skipped(&format!("this host has no {word} for guests; that it is refused was seen"));
        }
        return;
    }
    // A report reads the registers of such a CPU too.
    bantam("example crash --cpu-features").arg(word).run().expect(126).said("pc ").said("vbar ");
    let Some(guest) = linux(UNCOMPRESSED, &words, "bantam.checks=none") else { return };
    let told = guest.end();
    told.expect(0);
    for text in found {
        assert!(told.text.contains(text), "{text:?} is not in:\n{}", told.text);
    }
}

#[test]
fn the_guest_has_counters_where_the_host_has() {
    feature("pmu", "KVM_CAP_ARM_PMU_V3", &["hw perfevents: enabled with armv8_pmuv3"]);
}

#[test]
fn the_guest_has_sve_where_the_host_has() {
    feature("sve", "KVM_CAP_ARM_SVE", &["detected: Scalable Vector Extension", "SVE: maximum available vector length"]);
}
