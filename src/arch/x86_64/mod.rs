//! x86-64: names and numbers from the Intel SDM.

pub mod boot;
mod entry;
pub mod layout;
mod registers;

pub use boot::BootRegs;
pub use entry::{elf_mode, enter, linear_entry};
pub use layout::{Layout, layout};
pub use registers::set_register;

/// The architecture's name, as a person writes it.
pub const NAME: &str = "x86-64";

/// Where a flat guest is loaded unless its user says otherwise: clear of the real-mode vector table and BIOS data area.
pub const FLAT_LOAD: u64 = 0x1000;

/// The mode a flat guest is entered in unless its user says otherwise.
pub const FLAT_MODE: crate::config::CpuMode = crate::config::CpuMode::Real;
