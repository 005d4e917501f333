//! The state of a machine's CPUs and of KVM's part of it, for a snapshot: not there yet.

use anyhow::Result;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use crate::config::IrqChip;
use crate::error::{Refusal, refuse};

/// A CPU's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedCpu {}

/// The state of what KVM emulates besides CPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedVm {}

fn not_yet() -> Refusal {
    refuse("snapshots of arm64 machines are not there yet")
}

/// Reads a CPU's state.
///
/// # Errors
/// Always, as yet.
pub fn save_cpu(_kvm: &Kvm, _fd: &VcpuFd, _irqchip: Option<IrqChip>) -> Result<SavedCpu> {
    Err(not_yet().into())
}

/// Sets a CPU's state.
///
/// # Errors
/// Always, as yet.
pub fn load_cpu(_kvm: &Kvm, _fd: &VcpuFd, _saved: &SavedCpu) -> Result<()> {
    Err(not_yet().into())
}

/// Reads the state of what KVM emulates besides CPUs.
///
/// # Errors
/// Always, as yet.
pub fn save_vm(_fd: &VmFd, _cpus: &[&VcpuFd], _irqchip: Option<IrqChip>) -> Result<SavedVm> {
    Err(not_yet().into())
}

/// Sets that state.
///
/// # Errors
/// Always, as yet.
pub fn load_vm(_fd: &VmFd, _cpus: &[&VcpuFd], _saved: &SavedVm) -> Result<()> {
    Err(not_yet().into())
}
