//! The configuration space of a PCI function (PCI Local Bus 3.0 §6): bytes, and which of their bits a guest can change.
//!
//! Invariant: the bits that a guest cannot change are those that the function was made with.

use std::ops::Range;

use anyhow::{Result, bail};

/// Bytes of it; there is no extended one.
pub const SIZE: usize = 256;
/// Registers of the header (§6.1).
pub const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CLASS: usize = 0x08;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
/// Where the first capability lies.
const FIRST: usize = 0x40;

/// Command bits: the function answers in memory, may write to RAM, does not use INTx.
const MEMORY: u16 = 2;
const MASTER: u16 = 4;
const NO_INTX: u16 = 1 << 10;
/// Status bit: there are capabilities.
const HAS_CAPABILITIES: u8 = 1 << 4;

/// The bytes that tell a function's kind.
pub struct Identity {
    /// Vendor and device.
    pub id: [u16; 2],
    /// Base class, subclass, programming interface.
    pub class: u32,
    /// Revision.
    pub revision: u8,
}

/// A function's configuration space.
pub struct ConfigSpace {
    // Configuration
    fresh: [u8; SIZE],
    writable: [u8; SIZE],
    bar: u32,
    last_capability: usize,
    end: usize,
    // State
    bytes: [u8; SIZE],
    /// A read may do more than to give these bytes; follows from them.
    live: bool,
}

fn put(bytes: &mut [u8; SIZE], at: usize, value: &[u8]) {
    if let Some(to) = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..value.len())) {
        to.copy_from_slice(value);
    }
}

impl ConfigSpace {
    /// A function without BAR, interrupt and capabilities, which there is nothing to command.
    pub fn new(identity: &Identity) -> Self {
        let mut fresh = [0; SIZE];
        let [vendor, device] = identity.id.map(u16::to_le_bytes);
        put(&mut fresh, 0, &vendor);
        put(&mut fresh, 2, &device);
        put(&mut fresh, CLASS, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        put(&mut fresh, SUBSYSTEM, &vendor);
        put(&mut fresh, SUBSYSTEM + 2, &device);
        let mut writable = [0; SIZE];
        put(&mut writable, INTERRUPT_LINE, &[0xff]);
        Self { fresh, writable, bar: 0, last_capability: CAPABILITIES, end: FIRST, bytes: fresh, live: false }
    }

    /// Gives it BAR 0, in memory, of `size` bytes (a power of two), which lies at `address` and answers there.
    #[must_use]
    pub fn with_bar(mut self, size: u32, address: u32) -> Self {
        put(&mut self.writable, BAR0, &(!(size - 1)).to_le_bytes());
        put(&mut self.writable, COMMAND, &(MEMORY | MASTER | NO_INTX).to_le_bytes());
        put(&mut self.fresh, BAR0, &address.to_le_bytes());
        put(&mut self.fresh, COMMAND, &MEMORY.to_le_bytes());
        self.bar = size;
        self.bytes = self.fresh;
        self
    }

    /// It answers only once the guest has it do so, as firmware leaves what it does not boot from.
    #[must_use]
    pub fn silent(mut self) -> Self {
        put(&mut self.fresh, COMMAND, &[0, 0]);
        self.bytes = self.fresh;
        self
    }

    /// Gives it INTA#, which is the interrupt that `line` says.
    #[must_use]
    pub fn with_intx(mut self, line: u8) -> Self {
        put(&mut self.fresh, INTERRUPT_LINE, &[line]);
        put(&mut self.fresh, INTERRUPT_PIN, &[1]);
        self.bytes = self.fresh;
        self
    }

    /// Adds a capability: its id and what follows the link to the next; gives where it lies.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.end;
        put(&mut self.fresh, self.last_capability, &[at.to_le_bytes()[0]]);
        put(&mut self.fresh, at, &[id, 0]);
        put(&mut self.fresh, at + 2, body);
        put(&mut self.writable, at + 2, writable);
        if let Some(status) = self.fresh.get_mut(STATUS) {
            *status |= HAS_CAPABILITIES;
        }
        self.last_capability = at + 1;
        self.end = (at + 2 + body.len()).next_multiple_of(4);
        self.bytes = self.fresh;
        at
    }

    /// Reads; beyond the end there are zeroes.
    pub fn read(&self, offset: usize, width: usize) -> u32 {
        let byte = |at| u32::from(self.bytes.get(at).copied().unwrap_or(0));
        (offset..offset.saturating_add(width.min(4))).rev().fold(0, |value, at| value << 8 | byte(at))
    }

    /// Writes the bits that a guest can change.
    pub fn write(&mut self, offset: usize, width: usize, value: u32) {
        let places = self.bytes.iter_mut().zip(&self.writable).skip(offset);
        for ((byte, writable), new) in places.zip(value.to_le_bytes()).take(width) {
            *byte = *byte & !writable | new & writable;
        }
    }

    /// Puts bytes where a guest cannot, as a device does.
    pub fn set(&mut self, offset: usize, value: &[u8]) {
        put(&mut self.bytes, offset, value);
    }

    fn command(&self) -> u16 {
        (self.read(COMMAND, 2) & 0xffff) as u16
    }

    /// Where nothing that is written has any effect: BARs, and what is around them, that a function does not have.
    pub fn idle(&self) -> Range<usize> {
        if self.bar == 0 { COMMAND..INTERRUPT_LINE } else { BAR0 + 4..INTERRUPT_LINE }
    }

    /// Where BAR 0 answers, if it does.
    pub fn bar(&self) -> Option<u32> {
        (self.bar != 0 && self.command() & MEMORY != 0).then(|| self.read(BAR0, 4) & !(self.bar - 1))
    }

    /// The offset in BAR 0 of an address, where it answers.
    pub fn offset_in_bar(&self, address: u64) -> Option<u64> {
        address.checked_sub(self.bar()?.into()).filter(|offset| *offset < self.bar.into())
    }

    /// The guest lets it use INTx.
    pub fn may_interrupt(&self) -> bool {
        self.command() & NO_INTX == 0
    }

    /// Whether a read of it may do more than to give what is written there.
    pub fn is_live(&self) -> bool {
        self.live
    }

    /// Says whether it may: after each change of the bytes that make it so.
    pub fn set_live(&mut self, live: bool) {
        self.live = live;
    }

    /// The state after power-on.
    pub fn reset(&mut self) {
        (self.bytes, self.live) = (self.fresh, false);
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether these bytes could be those of this function.
    ///
    /// # Errors
    /// They could not: where they differ.
    pub fn check(&self, bytes: &[u8]) -> Result<()> {
        if bytes.len() != SIZE {
            bail!("a PCI function's configuration space has {SIZE} bytes, not {}", bytes.len());
        }
        let fixed = |((new, fresh), writable): ((&u8, &u8), &u8)| (new ^ fresh) & !writable != 0;
        match bytes.iter().zip(&self.fresh).zip(&self.writable).position(fixed) {
            Some(at) => bail!("byte {at:#x} of a PCI function's configuration space is not what it always is"),
            None => Ok(()),
        }
    }

    /// Takes over bytes that were checked.
    pub fn load(&mut self, bytes: &[u8]) {
        put(&mut self.bytes, 0, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function() -> ConfigSpace {
        let identity = Identity { id: [0x1af4, 0x1042], class: 0x01_8000, revision: 1 };
        ConfigSpace::new(&identity).with_bar(0x8000, 0xd000_8000).with_intx(5)
    }

    #[test]
    fn a_bar_tells_its_size_and_takes_aligned_addresses() {
        let mut function = function();
        assert_eq!((function.read(0, 4), function.read(8, 4)), (0x1042_1af4, 0x0180_0001));
        assert_eq!((function.bar(), function.offset_in_bar(0xd000_8004)), (Some(0xd000_8000), Some(4)));
        assert_eq!(function.offset_in_bar(0xd001_0000), None);
        function.write(BAR0, 4, u32::MAX);
        assert_eq!(function.read(BAR0, 4), 0xffff_8000);
        function.write(BAR0, 4, 0xe000_1234);
        assert_eq!(function.bar(), Some(0xe000_0000));
        function.write(COMMAND, 2, 0);
        assert_eq!((function.bar(), function.offset_in_bar(0xe000_0000)), (None, None));
    }

    #[test]
    fn what_is_idle_takes_no_write() {
        let identity = Identity { id: [1, 2], class: 0x06_0000, revision: 0 };
        for mut config in [function(), ConfigSpace::new(&identity)] {
            config.add_capability(9, &[1, 2, 3], &[0xff; 3]);
            let before = config.bytes().to_vec();
            let idle = config.idle();
            assert!(idle.len() >= 0x28, "{idle:?}");
            idle.clone().for_each(|at| config.write(at, (idle.end - at).min(4), !config.read(at, 4)));
            assert_eq!(config.bytes(), before);
        }
    }

    #[test]
    fn capabilities_are_a_chain() {
        let mut function = function();
        let first = function.add_capability(9, &[1, 2, 3], &[0, 0xff]);
        let second = function.add_capability(0x11, &[4; 10], &[]);
        assert_eq!(function.read(CAPABILITIES, 1) as usize, first);
        assert_eq!((function.read(first, 2), function.read(second, 2)), (9 | (second as u32) << 8, 0x11));
        assert_eq!(function.read(STATUS, 1) & 0x10, 0x10);
        function.write(first + 2, 4, 0xaaaa_aaaa);
        assert_eq!(function.read(first + 2, 3), 0x03_aa01);
        let bytes = function.bytes().to_vec();
        assert!(function.check(&bytes).is_ok());
        assert!(function.check(&[&bytes[..2], &[0], &bytes[3..]].concat()).is_err());
        assert!(function.check(&bytes[1..]).is_err());
    }

    #[test]
    fn no_access_is_out_of_range() {
        let mut function = function();
        for offset in [0, 0xff, 0x100, 0xfff, usize::MAX] {
            function.write(offset, 4, 0);
            function.read(offset, 4);
        }
    }
}
