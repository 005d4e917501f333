//! arm64: names and numbers from the Arm Architecture Reference Manual for A-profile (DDI 0487, "Arm ARM").

pub mod boot;
mod cause;
mod culprit;
mod entry;
mod features;
pub mod layout;
mod paging;
mod registers;
mod saved;
mod state;
mod story;

pub use boot::BootRegs;
pub use entry::{elf_mode, enter, enter_linux, flat_load, linear_entry};
pub use features::{FEATURES, check_page_size, host_facts};
pub use layout::{layout, vm_type};
pub use registers::{mpidr, set_register};
pub use saved::{SavedCpu, SavedVm, load_cpu, load_vm, save_cpu, save_vm};
pub use state::{CpuState, Waiting, halted_for_good, lost, pc, rests, seen, show_pc, trapped, waiting, was_stopped};

use crate::config::{CpuMode, IrqChip, Platform};

/// The architecture's name, as a person writes it.
pub const NAME: &str = "arm64";
/// The machine of an ELF core file (EM_AARCH64).
pub const CORE_MACHINE: u16 = 183;
/// What to do where there is no `/dev/kvm`.
pub const NO_KVM: &str =
    "the host's kernel needs CONFIG_KVM and a start at EL2 (a virtual host: nested virtualisation)";
/// What KVM_EXIT_SHUTDOWN means.
pub const SHUTDOWN: &str = "the CPU shut down";
/// CPUs whose redistributors have room in the map (GICv3; GICv2 has 8).
pub const MAX_CPUS: usize = 123;
/// WFI never exits.
pub const HALT_EXITS: bool = false;
/// A guest can be lost without an exit: see [`lost`].
pub const CAN_BE_LOST: bool = true;
/// CPUs are started by PSCI, whatever the interrupt controller.
pub const SMP_NEEDS_IRQCHIP: bool = false;

/// The mode every guest is entered in.
pub const FLAT_MODE: CpuMode = CpuMode::El1;
/// The mode a 64-bit ELF is entered in.
pub const ELF64_MODE: CpuMode = CpuMode::El1;
/// The interrupt controller of a flat guest with one CPU. WFI never exits, so to have none gains nothing.
pub const FLAT_IRQCHIP: IrqChip = IrqChip::Kernel;
/// There is one platform only.
pub const LINUX_PLATFORM: Option<Platform> = None;
/// There is no CPUID instruction.
pub const ASKS_CPUID: Option<u8> = None;
