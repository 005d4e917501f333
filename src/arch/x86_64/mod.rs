//! x86-64: names and numbers from the Intel SDM.

pub mod boot;
mod cpuid;
mod entry;
mod features;
pub mod layout;
mod registers;
mod state;

pub use boot::BootRegs;
pub use cpuid::cpuid;
pub use entry::{elf_mode, enter, linear_entry};
pub use features::{FEATURES, host_facts};
pub use layout::{Layout, layout};
pub use registers::set_register;
pub use state::{CpuState, halted_for_good, translate};

/// The architecture's name, as a person writes it.
pub const NAME: &str = "x86-64";
/// The module that gives a host its `/dev/kvm`.
pub const KVM_MODULE: &str = "kvm_intel (Intel) or kvm_amd (AMD)";
/// What KVM_EXIT_SHUTDOWN means.
pub const SHUTDOWN: &str = "triple fault: an exception while the CPU was reporting a double fault";
/// The register sets that Bantam sets with the first KVM_RUN (KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS).
pub const SYNC_REGS: i32 = 3;
/// CPUs that 8-bit local APIC ids can name (Intel SDM vol. 3, "Local APIC ID"; 255 is broadcast).
pub const MAX_CPUS: usize = 255;

/// Where a flat guest is loaded unless its user says otherwise: clear of the real-mode vector table and BIOS data area.
pub const FLAT_LOAD: u64 = 0x1000;

/// The mode a flat guest is entered in unless its user says otherwise.
pub const FLAT_MODE: crate::config::CpuMode = crate::config::CpuMode::Real;

/// A byte that every instruction begins with which CPUID has a say in, by itself or in KVM's emulator: the two-byte
/// opcodes (Intel SDM vol. 2, appendix A), CPUID, WRMSR, MOV to a control register and FXSAVE among them.
pub const ASKS_CPUID: u8 = 0x0f;
