//! What is true of the CPU: registers, entry states, the address map. No devices.
//!
//! Each architecture is a module that exports the same names; the rest of Bantam writes `arch::NAME`:
//!
//! * facts: `NAME`, `NO_KVM`, `SHUTDOWN`, `MAX_CPUS`, `HALT_EXITS`, `CAN_BE_LOST`, `SMP_NEEDS_IRQCHIP`, `FEATURES`, `host_facts`, `check_page_size`
//! * words: `FLAT_MODE`, `ELF64_MODE`, `FLAT_IRQCHIP`, `ASKS_CPUID`, `LINUX_PLATFORM`, `flat_load`, `elf_mode`, `linear_entry`, `set_register`
//! * the map: `layout`, `vm_type`
//! * CPUs: `BootRegs`, `enter`, `enter_linux`, `CpuState`, `halted_for_good`, `lost`, `rests`, `show_pc`, `pc`, `seen`, `was_stopped`
//! * snapshots: `SavedCpu`, `SavedVm`, `save_cpu`, `save_vm`, `load_cpu`, `load_vm`
//! * reports: of a `CpuState` its `mode`, `places`, `sites`, `walk`, `stack`, `disassemble`, `story`, `culprit`

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "aarch64")]
pub use aarch64::*;
mod autopsy;
mod map;
#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

pub use self::autopsy::{Line, Page, Stack, Story, Walk, bytes, word};
pub use self::map::{Layout, PCI_ECAM_SIZE, Region, VIRTIO_PAGE};

/// A capability of KVM, what Bantam does with it, and what to do where it is missing.
pub struct Feature {
    /// The capability.
    pub cap: kvm_ioctls::Cap,
    /// Its name, after `KVM_CAP_`.
    pub name: &'static str,
    /// Without it no machine runs.
    pub required: bool,
    /// What Bantam does with it.
    pub purpose: &'static str,
    /// What to do without it.
    pub remedy: &'static str,
}

/// A row of a table of features.
pub const fn feature(
    cap: kvm_ioctls::Cap,
    name: &'static str,
    required: bool,
    purpose: &'static str,
    remedy: &'static str,
) -> Feature {
    Feature { cap, name, required, purpose, remedy }
}
