//! The debug-exit register: four bytes with which a guest ends the machine and says how.
//!
//! Any write ends it with the value written, whatever the width and the offset (QEMU's `isa-debug-exit` does the same).
//! Reads give all ones: there is nothing to read, so the register looks like the empty bus. Invariant: no state.

use anyhow::Result;

use super::{Stateless, unwrap, wrap};
use crate::bus::{Device, Effect, Saved};

/// Of the saved state.
const VERSION: u32 = 1;

/// The debug-exit register.
#[derive(Debug, Default)]
pub struct DebugExit;

impl Device for DebugExit {
    fn name(&self) -> &'static str {
        "debug-exit"
    }

    fn register(&self, _offset: u64, _write: bool) -> &'static str {
        "EXIT"
    }

    fn width(&self) -> usize {
        4
    }

    fn read(&mut self, _offset: u64, _width: usize) -> u64 {
        u64::MAX
    }

    fn write(&mut self, _offset: u64, _width: usize, value: u64) -> Effect {
        Effect::Exit(value)
    }

    fn reset(&mut self) {}

    fn save(&self) -> Saved {
        let Self = self;
        wrap(VERSION, &Stateless {})
    }

    fn load(&mut self, saved: &Saved) -> Result<()> {
        unwrap(self.name(), VERSION, saved).map(|Stateless {}| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::{Builder, Space};
    use crate::memory::Span;

    #[test]
    fn a_write_of_any_width_ends_the_machine_with_its_value() {
        let mut builder = Builder::default();
        builder.place(Space::Pio, Span { start: 0xf4, size: 4 }, DebugExit).unwrap();
        let buses = builder.finish();
        assert_eq!(buses.write(Space::Pio, 0xf4, 1, &[0x10]), Effect::Exit(0x10));
        assert_eq!(buses.write(Space::Pio, 0xf4, 2, &[0x34, 0x12]), Effect::Exit(0x1234));
        assert_eq!(buses.write(Space::Pio, 0xf4, 4, &[0xff; 4]), Effect::Exit(0xffff_ffff));
        assert_eq!(buses.write(Space::Pio, 0xf6, 1, &[7]), Effect::Exit(7));
    }

    #[test]
    fn it_reads_like_the_empty_bus() {
        assert_eq!(DebugExit.read(0, 4), u64::MAX);
    }
}
