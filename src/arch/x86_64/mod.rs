//! x86-64: names and numbers from the Intel SDM.

pub mod boot;
pub mod layout;
mod registers;

pub use boot::BootRegs;
pub use layout::{Layout, layout};
pub use registers::set_register;

/// The architecture's name, as a person writes it.
pub const NAME: &str = "x86-64";
