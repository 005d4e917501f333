//! The published systems of the field's "smallest virtual machine" write-ups: each runs as its author shows it.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;
use common::kvm;

/// Those that were written for this architecture: A, B and C for x86, D for arm64.
#[cfg_attr(target_arch = "aarch64", path = "systems/aarch64.rs")]
#[cfg_attr(target_arch = "x86_64", path = "systems/x86_64.rs")]
mod published;

/// System E is a tour of the API; `bantam check` shows the system calls of it.
#[test]
fn system_es_system_calls_are_in_check() {
    if !kvm() {
        return;
    }
    let outcome = common::bantam("check").run();
    outcome.expect(0).said_nothing();
    for line in ["API version", "12", "CPUs, recommended", "KVM_CAP_USER_MEMORY", "machines can run here"] {
        assert!(outcome.out().contains(line), "{line}");
    }
}
