//! The PCI host: one bus, its functions' configuration spaces, and the window in memory where their BARs lie.
//!
//! Configuration space is reached in two ways: ECAM, 4 KiB of memory for each function (PCI Express 6.0 §7.2.2), and on a
//! PC the two ports of configuration mechanism #1 (PCI Local Bus 3.0 §3.2.2.3.2). One device stands for all of it, since
//! a guest may move BARs and the buses never change; only set-up goes through it, doorbells do not.
//!
//! Reads of ECAM need no exit where a [`Mirror`] shows the guest what they would give. A read that does more than that
//! (VIRTIO 1.3 §4.1.4.9: data of the capability for access without a BAR, once the driver has said what it means) puts an
//! end to the mirror: from then on all reads exit.
//!
//! Invariants: an address in the window belongs to the function with the lowest number whose BAR covers it; the mirror shows
//! what a read would give.

pub mod config;
pub mod msix;

use std::iter;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use self::config::{ConfigSpace, Identity};
use super::{unwrap, wrap};
use crate::bus::{Device, Effect, Saved};
use crate::memory::Span;

/// Of the saved state.
const VERSION: u32 = 1;
/// Slots of a bus.
pub const SLOTS: usize = 32;
/// The device's own offset of ECAM; the window is where its addresses are.
pub const ECAM: u64 = 1 << 60;
/// Bytes of it, for one bus.
pub const ECAM_SIZE: u64 = 1 << 20;
/// The device's own offset of the ports of configuration mechanism #1.
pub const PORTS: u64 = 1 << 61;
/// How many they are: an address, then data.
pub const PORTS_SIZE: u64 = 8;
/// In the address: it is meant.
const ENABLE: u32 = 1 << 31;

/// The host bridge, as such: nobody's, "BANT" again.
const HOST_BRIDGE: Identity = Identity { id: [0x1b36, 0x0008], class: 0x06_0000, revision: 0 };

/// A function of a PCI device; a device has one.
pub trait Function: Send {
    /// Its name in traces and snapshots.
    fn name(&self) -> &'static str;
    /// The name of a register in its BAR.
    fn register(&self, offset: u64) -> &'static str;
    /// Its configuration space.
    fn config(&self) -> &ConfigSpace;
    /// A read of its configuration space.
    fn read_config(&mut self, offset: usize, width: usize) -> u32;
    /// A write to its configuration space.
    fn write_config(&mut self, offset: usize, width: usize, value: u32);
    /// A read of its BAR.
    fn read(&mut self, offset: u64, width: usize) -> u64;
    /// A write to its BAR.
    fn write(&mut self, offset: u64, width: usize, value: u64);
    /// The state after power-on.
    fn reset(&mut self);
    /// Its volatile state.
    fn save(&self) -> Saved;
    /// Takes over a state; an error leaves it as it was.
    fn load(&mut self, saved: &Saved) -> Result<()>;
}

/// ECAM as memory that the guest reads: ones, until something is put there. Dropped, it shows nothing, and reads exit.
pub trait Mirror: Send {
    /// Shows these bytes, and zeroes behind them, on the page of a function that is there.
    fn show(&self, page: u64, bytes: &[u8]);
}

/// The pages of ECAM on which a host with so many functions shows something.
pub fn pages(functions: usize) -> Vec<u64> {
    (0..=functions).map(page).collect()
}

/// Where the page of a slot's function lies in ECAM.
fn page(slot: usize) -> u64 {
    (slot as u64) << 15
}

/// The host and all that is on its bus.
pub struct PciHost {
    // Configuration
    bridge: ConfigSpace,
    /// From slot 1 on.
    functions: Vec<Box<dyn Function>>,
    // Wires
    mirror: Option<Box<dyn Mirror>>,
    // State
    address: u32,
}

#[derive(Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct State {
    address: u32,
    bridge: Vec<u8>,
    functions: Vec<(String, Saved)>,
}

impl PciHost {
    /// A bus with these functions in slots 1, 2 and so on.
    ///
    /// # Errors
    /// There are more than a bus has slots.
    pub fn new(functions: Vec<Box<dyn Function>>) -> Result<Self> {
        if functions.len() >= SLOTS {
            bail!("{} PCI devices are more than the {} that a bus has room for", functions.len(), SLOTS - 1);
        }
        Ok(Self { bridge: ConfigSpace::new(&HOST_BRIDGE), functions, mirror: None, address: 0 })
    }

    /// Where a write to ECAM has no effect, on the functions that are there: offsets in it.
    pub fn idle(&self) -> impl Iterator<Item = Span> {
        let configs = iter::once(&self.bridge).chain(self.functions.iter().map(|function| function.config()));
        configs.enumerate().map(|(slot, config)| {
            let idle = config.idle();
            Span { start: page(slot) + idle.start as u64, size: idle.len() as u64 }
        })
    }

    /// Has `mirror` show what is in configuration space.
    #[must_use]
    pub fn mirrored(mut self, mirror: Option<Box<dyn Mirror>>) -> Self {
        self.mirror = mirror;
        self.show_all();
        self
    }

    /// Has the mirror show what is in a slot now.
    fn show(&mut self, slot: usize) {
        let config = match slot.checked_sub(1) {
            None => Some(&self.bridge),
            Some(index) => self.functions.get(index).map(|function| function.config()),
        };
        let Some(config) = config else { return };
        if config.is_live() {
            self.mirror = None;
        } else if let Some(mirror) = &self.mirror {
            mirror.show(page(slot), config.bytes());
        }
    }

    fn show_all(&mut self) {
        (0..=self.functions.len()).for_each(|slot| self.show(slot));
    }

    fn function(&mut self, slot: usize) -> Option<&mut Box<dyn Function>> {
        self.functions.get_mut(slot.checked_sub(1)?)
    }

    fn read_config(&mut self, place: &Place, width: usize) -> u32 {
        match (place.slot, place.function) {
            (0, 0) => self.bridge.read(place.register, width),
            (slot, 0) => self.function(slot).map_or(u32::MAX, |f| f.read_config(place.register, width)),
            _ => u32::MAX,
        }
    }

    fn write_config(&mut self, place: &Place, width: usize, value: u32) {
        match (place.slot, place.function) {
            (0, 0) => self.bridge.write(place.register, width, value),
            (slot, 0) => {
                if let Some(function) = self.function(slot) {
                    function.write_config(place.register, width, value);
                }
            }
            _ => {}
        }
        if place.function == 0 {
            self.show(place.slot);
        }
    }

    /// The register that the ports' data mean at this offset behind the address.
    fn addressed(&self, offset: u64) -> Option<Place> {
        let bus = self.address >> 16 & 0xff;
        let place = Place {
            slot: (self.address >> 11 & 31) as usize,
            function: self.address >> 8 & 7,
            register: (self.address & 0xfc) as usize + (offset & 3) as usize,
        };
        (self.address & ENABLE != 0 && bus == 0).then_some(place)
    }

    /// The function whose BAR covers an address, and the offset in it.
    fn at(&self, address: u64) -> Option<(usize, u64)> {
        let covers = |function: &dyn Function| function.config().offset_in_bar(address);
        self.functions.iter().enumerate().find_map(|(i, f)| Some((i, covers(f.as_ref())?)))
    }
}

/// A register in configuration space.
struct Place {
    slot: usize,
    function: u32,
    register: usize,
}

/// What an offset of the host's means.
enum Target {
    Config(Place),
    Ports(u64),
    Window(u64),
}

fn target(offset: u64) -> Target {
    if offset >= PORTS {
        return Target::Ports(offset - PORTS);
    }
    let Some(at) = offset.checked_sub(ECAM) else { return Target::Window(offset) };
    let (slot, function) = ((at >> 15) as usize, (at >> 12 & 7) as u32);
    Target::Config(Place { slot, function, register: (at & 0xfff) as usize })
}

impl Device for PciHost {
    fn name(&self) -> &'static str {
        "pci"
    }

    fn name_at(&self, offset: u64) -> &'static str {
        match target(offset) {
            Target::Window(address) => self.at(address).and_then(|(i, _)| self.functions.get(i)),
            Target::Config(place) => place.slot.checked_sub(1).and_then(|i| self.functions.get(i)),
            Target::Ports(_) => None,
        }
        .map_or("pci", |function| function.name())
    }

    fn register(&self, offset: u64, _write: bool) -> &'static str {
        match target(offset) {
            Target::Config(_) => "config",
            Target::Ports(0..4) => "CONFIG_ADDRESS",
            Target::Ports(_) => "CONFIG_DATA",
            Target::Window(address) => {
                let there = self.at(address).and_then(|(i, offset)| Some((self.functions.get(i)?, offset)));
                there.map_or("window", |(function, offset)| function.register(offset))
            }
        }
    }

    fn width(&self) -> usize {
        4
    }

    fn read(&mut self, offset: u64, width: usize) -> u64 {
        match target(offset) {
            Target::Config(place) => self.read_config(&place, width).into(),
            Target::Ports(0) if width == 4 => self.address.into(),
            Target::Ports(0..4) => u64::MAX,
            Target::Ports(at) => self.addressed(at).map_or(u64::MAX, |place| self.read_config(&place, width).into()),
            Target::Window(address) => {
                let there = self.at(address).and_then(|(i, at)| Some((self.functions.get_mut(i)?, at)));
                there.map_or(u64::MAX, |(function, offset)| function.read(offset, width))
            }
        }
    }

    fn write(&mut self, offset: u64, width: usize, value: u64) -> Effect {
        let word = (value & 0xffff_ffff) as u32;
        match target(offset) {
            Target::Config(place) => self.write_config(&place, width, word),
            Target::Ports(0) if width == 4 => self.address = word & !3,
            Target::Ports(0..4) => {}
            Target::Ports(at) => {
                if let Some(place) = self.addressed(at) {
                    self.write_config(&place, width, word);
                }
            }
            Target::Window(address) => {
                if let Some((function, at)) =
                    self.at(address).and_then(|(i, at)| Some((self.functions.get_mut(i)?, at)))
                {
                    function.write(at, width, value);
                }
            }
        }
        Effect::None
    }

    fn reset(&mut self) {
        self.address = 0;
        self.bridge.reset();
        self.functions.iter_mut().for_each(|function| function.reset());
        self.show_all();
    }

    fn save(&self) -> Saved {
        let functions = self.functions.iter().map(|f| (f.name().to_owned(), f.save())).collect();
        wrap(VERSION, &State { address: self.address, bridge: self.bridge.bytes().to_vec(), functions })
    }

    fn load(&mut self, saved: &Saved) -> Result<()> {
        let state: State = unwrap(self.name(), VERSION, saved)?;
        let names = state.functions.iter().map(|(name, _)| name.as_str());
        if !names.eq(self.functions.iter().map(|function| function.name())) {
            bail!("pci: its saved functions are not those of this machine");
        }
        if state.address & 3 != 0 {
            bail!("pci: its saved address is not one");
        }
        self.bridge.check(&state.bridge).context("pci: the host bridge")?;
        let before: Vec<_> = self.functions.iter().map(|function| function.save()).collect();
        for (index, (function, (_, saved))) in self.functions.iter_mut().zip(&state.functions).enumerate() {
            if let Err(e) = function.load(saved) {
                // The others go back; they have saved these states themselves.
                for (function, before) in self.functions.iter_mut().zip(&before).take(index) {
                    let _ = function.load(before);
                }
                return Err(e.context("pci"));
            }
        }
        self.bridge.load(&state.bridge);
        self.address = state.address;
        self.show_all();
        Ok(())
    }
}
