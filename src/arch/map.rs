//! The guest-physical map as every architecture has it: RAM, named ranges, and what any of them checks.
//!
//! Guest addresses are ABI: a change of a map changes what guests and snapshots see, so golden tests pin it. Invariant:
//! no two ranges of a [`Layout`] in the same space overlap.

use std::fmt;

use anyhow::Result;

use crate::config::{Config, Size, Space};
use crate::error::{Refusal, refuse, usage};
use crate::memory::{HUGE_PAGE, Span, page_size};

/// One named range of the map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// Ports or memory.
    pub space: Space,
    /// Addresses.
    pub span: Span,
    /// What is there.
    pub name: &'static str,
}

/// A range of memory addresses.
pub fn mmio(start: u64, size: u64, name: &'static str) -> Region {
    Region { space: Space::Mmio, span: Span { start, size }, name }
}

/// Bytes of ECAM for one bus.
pub const PCI_ECAM_SIZE: u64 = 1 << 20;
/// Bytes of a virtio device's own registers.
pub const VIRTIO_PAGE: u64 = 0x1000;

/// The virtio devices that are not on PCI, from `base` on.
pub fn virtio_pages(config: &Config, base: u64) -> impl Iterator<Item = Region> {
    (base..).step_by(VIRTIO_PAGE as usize).take(config.virtio_pages()).map(|at| mmio(at, VIRTIO_PAGE, "virtio device"))
}

/// Where everything is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// RAM, in ascending order; at most two spans.
    pub ram: Vec<Span>,
    /// GDT and page tables, where the guest starts in a mode that wants them.
    pub tables: Option<Span>,
    /// Memory that is no RAM, and tells the guest which of several machines it is, where an architecture wants it so.
    pub generation: Option<Span>,
    /// Everything, RAM included, ports after memory, in ascending order.
    pub regions: Vec<Region>,
}

impl Layout {
    /// Puts RAM, the tables and the generation id to the other regions, and the debug console where the configuration has one.
    ///
    /// # Errors
    /// The debug console lies on something else.
    pub fn new(
        config: &Config,
        ram: Vec<Span>,
        tables: Option<Span>,
        generation: Option<Span>,
        mut regions: Vec<Region>,
    ) -> Result<Self> {
        regions.extend(ram.iter().map(|s| mmio(s.start, s.size, "RAM")));
        regions.extend(tables.map(|s| mmio(s.start, s.size, "boot tables (GDT, page tables)")));
        regions.extend(generation.map(|s| mmio(s.start, s.size, "generation id")));
        if let Some(console) = config.debugcon {
            let span = Span { start: console.addr, size: 1 };
            if let Some(other) = regions.iter().find(|r| r.space == console.space && r.span.overlaps(&span)) {
                return Err(usage(format!("--debugcon {console}: the {} is at {}", other.name, other.span)).into());
            }
            regions.push(Region { space: console.space, span, name: "debug console" });
        }
        regions.sort_by_key(|r| (r.space == Space::Pio, r.span));
        Ok(Self { ram, tables, generation, regions })
    }

    /// Everything that is mapped as memory: RAM, the boot tables and the generation id, ascending.
    pub fn memory(&self) -> Vec<Span> {
        let mut spans = self.ram.clone();
        spans.extend(self.tables.into_iter().chain(self.generation));
        spans.sort();
        spans
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for region in &self.regions {
            let (first, last) = (region.span.start, region.span.last());
            match region.space {
                Space::Mmio => writeln!(
                    f,
                    "memory {first:#014x}..={last:#014x} {:>12} {}",
                    Size(region.span.size).to_string(),
                    region.name
                )?,
                Space::Pio => writeln!(
                    f,
                    "port           {first:#06x}..={last:#06x}         {:>12} {}",
                    region.span.size, region.name
                )?,
            }
        }
        Ok(())
    }
}

/// RAM as the configuration asks for it: its size, and its first address where it names one.
///
/// # Errors
/// RAM of no or of an odd size, more than `most` bytes, or at an odd address.
pub fn ram(config: &Config, most: u64) -> Result<(u64, Option<u64>), Refusal> {
    let size = config.memory.0;
    let page = if config.hugepages { HUGE_PAGE } else { page_size() };
    if size == 0 {
        return Err(refuse("a machine without RAM cannot run").hint("give --memory a size, as in --memory 128M"));
    }
    if !size.is_multiple_of(page) {
        let below = size - size % page;
        let hint = match below {
            0 => format!("the least is {page} bytes"),
            _ => format!("the nearest valid sizes are {below} and {} bytes", below.saturating_add(page)),
        };
        let what = format!("--memory of {size} bytes is not a multiple of the page size, {page} bytes");
        return Err(refuse(what).hint(hint));
    }
    if size > most {
        let (wanted, most, name) = (config.memory, Size(most), super::NAME);
        return Err(refuse(format!(
            "--memory {wanted} is more than the {most} an {name} machine of Bantam's can have"
        )));
    }
    let base = config.ram_base.map(|a| a.0);
    match base.filter(|base| !base.is_multiple_of(page)) {
        Some(base) => Err(usage(format!("--ram-base {base:#x} is not a multiple of the page size, {page:#x}"))),
        None => Ok((size, base)),
    }
}
