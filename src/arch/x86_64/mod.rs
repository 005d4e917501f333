//! x86-64: names and numbers from the Intel SDM.

pub mod boot;
mod cpuid;
mod culprit;
mod decode;
mod entry;
mod faults;
mod features;
mod flags;
pub mod layout;
mod msrs;
mod registers;
mod saved;
mod state;
mod story;
mod walk;

pub use boot::BootRegs;
pub use cpuid::{Identity, cpuid};
pub use entry::{elf_mode, enter, enter_linux, flat_load, linear_entry};
pub use features::{FEATURES, check_page_size, host_facts};
pub use layout::{layout, vm_type};
pub use msrs::as_firmware_leaves_it;
pub use registers::set_register;
pub use saved::{SavedCpu, SavedVm, load_cpu, load_vm, save_cpu, save_vm};
pub use state::{CpuState, halted_for_good, lost, pc, rests, seen, show_pc, trapped, was_stopped};

use crate::config::{CpuMode, IrqChip, Platform};

/// The architecture's name, as a person writes it.
pub const NAME: &str = "x86-64";
/// The machine of an ELF core file (EM_X86_64).
pub const CORE_MACHINE: u16 = 62;
/// What to do where there is no `/dev/kvm`.
pub const NO_KVM: &str = "load its module: modprobe kvm_intel (Intel) or kvm_amd (AMD)";
/// What KVM_EXIT_SHUTDOWN means.
pub const SHUTDOWN: &str = "triple fault: an exception while the CPU was reporting a double fault";
/// CPUs that 8-bit local APIC ids can name (Intel SDM vol. 3, "Local APIC ID"; 255 is broadcast).
pub const MAX_CPUS: usize = 255;
/// A halt exits where the interrupt controllers are not in KVM.
pub const HALT_EXITS: bool = true;
/// A guest that is lost shuts its CPU down, which exits.
pub const CAN_BE_LOST: bool = false;
/// CPUs are started through local APICs, so several need interrupt controllers.
pub const SMP_NEEDS_IRQCHIP: bool = true;

/// The mode a flat guest is entered in unless its user says otherwise.
pub const FLAT_MODE: CpuMode = CpuMode::Real;
/// The mode a 64-bit ELF is entered in.
pub const ELF64_MODE: CpuMode = CpuMode::Long;
/// The interrupt controllers of a flat guest with one CPU: none, so that HLT exits and ends the machine.
pub const FLAT_IRQCHIP: IrqChip = IrqChip::None;

/// The platform that Linux gets.
pub const LINUX_PLATFORM: Option<Platform> = Some(Platform::Acpi);

/// A byte that every instruction begins with which CPUID has a say in, by itself or in KVM's emulator: the two-byte
/// opcodes (Intel SDM vol. 2, appendix A), CPUID, WRMSR, MOV to a control register and FXSAVE among them.
pub const ASKS_CPUID: Option<u8> = Some(0x0f);
