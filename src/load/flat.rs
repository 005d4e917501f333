//! Flat guests: bytes that are loaded where the user says, and entered there.
//!
//! Invariant: a flat guest has no word in anything; all that is odd about it is the user's, and named by its option.

use anyhow::Result;

use super::image::Image;
use super::place::{Places, list};
use crate::arch::{self, BootRegs, Layout};
use crate::config::{Addr, Config, Entry};
use crate::error::refuse;
use crate::memory::{Memory, Span};

/// Fills in the defaults of a flat guest.
///
/// # Errors
/// An entry that the mode does not have: status 2.
pub fn settle(config: &mut Config) -> Result<()> {
    config.cpu_mode.get_or_insert(arch::FLAT_MODE);
    config.load_at = Some(Addr(load_at(config)));
    let (mode, _, entry) = choice(config);
    arch::linear_entry(mode, entry)?;
    Ok(())
}

fn load_at(config: &Config) -> u64 {
    config.load_at.map_or_else(|| arch::flat_load(config), |at| at.0)
}

/// Mode, load address and entry of a settled configuration.
fn choice(config: &Config) -> (crate::config::CpuMode, u64, Entry) {
    let load_at = load_at(config);
    (config.cpu_mode.unwrap_or(arch::FLAT_MODE), load_at, config.entry.unwrap_or(Entry::Linear(load_at)))
}

/// Copies the guest to its place.
///
/// # Errors
/// It, or its entry, is not in RAM, or the file cannot be read.
pub fn load(config: &Config, image: &Image, memory: &Memory, layout: &Layout, places: &mut Places) -> Result<BootRegs> {
    let (mode, load_at, entry) = choice(config);
    let in_ram = |span: &Span| layout.ram.iter().any(|ram| ram.contains(span));
    let ram = list(&layout.ram);
    let span = Span::new(load_at, image.len())
        .ok_or_else(|| refuse(format!("{} bytes at {load_at:#x} wrap around 2^64", image.len())))?;
    if !in_ram(&span) {
        return Err(refuse(format!("the guest would be at {span}; RAM is at {ram}"))
            .hint("--memory sets RAM's size, --ram-base its start, --load-at the guest's place")
            .into());
    }
    let linear = arch::linear_entry(mode, entry)?;
    if !in_ram(&Span { start: linear, size: 1 }) {
        return Err(refuse(format!("the entry, {entry}, is not in RAM, {ram}")).into());
    }
    places.claim(span, "the guest")?;
    image.copy_to(memory, span, 0)?;
    arch::enter(mode, entry, memory, layout)
}

/// Whether a flat guest may come to execute an instruction that CPUID has a say in. Asked for, CPUID costs a fifth of the
/// time that a tiny machine takes from start to end (a trap for each leaf, on a virtual host).
///
/// All that such a guest can execute is its file, zeroes, and what it writes itself. A file of a boot sector's size has
/// no room for a program packed away in it; one that makes up a CPUID instruction as it runs reads zeroes, and wants
/// `--cpuid host`. `mark` is in each instruction that CPUID has a say in. (Real mode only: KVM takes the width of a physical address, for page tables, from CPUID too.)
///
/// # Errors
/// The file cannot be read.
pub fn may_ask_cpuid(image: &Image, mark: u8) -> Result<bool> {
    const TINY: usize = 512;
    if image.len() > TINY as u64 {
        return Ok(true);
    }
    Ok(image.head(TINY)?.contains(&mark))
}
