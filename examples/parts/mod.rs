//! What differs between the architectures: where things are, the guests, and a CPU that is about to start.

#![allow(dead_code)]

#[cfg_attr(target_arch = "aarch64", path = "aarch64.rs")]
#[cfg_attr(target_arch = "x86_64", path = "x86_64.rs")]
mod arch;

pub use arch::*;
