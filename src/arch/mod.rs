//! What is true of the CPU: registers, entry states, the address map. No devices.
//!
//! Each architecture is a module that exports the same names:
//! `NAME`, `ELF_MACHINES`, `BootRegs`, `Layout`, `layout`, `vcpu_cpuid` …; the rest of Bantam writes `arch::Layout`.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;
