//! The guests of the bench, as bytes: what the floor runs and what Bantam is given are the same by construction.
//!
//! Both architectures' modules export the same names, and both are compiled everywhere, so that the bytes of each are
//! tested wherever tests run.

// Three programs include this file, and each uses its part.
#![allow(dead_code)]

pub mod aarch64;
pub mod x86_64;

#[cfg(target_arch = "aarch64")]
pub use aarch64::*;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

/// Exits of [`outs`] in the bench, unless it is told otherwise.
pub const EXITS: u32 = 100_000;

/// An access for `dispatch`: its name, whether it is to a port, address and width.
pub type Access = (&'static str, bool, u64, usize);

#[cfg(test)]
mod tests {
    #[test]
    fn the_example_is_the_floors_guest() {
        let example = guests::find(super::ADD_NAME).unwrap();
        assert_eq!((example.image)(), super::ADD);
    }
}
