//! The debug console: one byte; what is written to it goes to a console.
//!
//! A read gives 0xe9, by which a guest finds out that it is there (Bochs and QEMU answer the same at port 0xe9, at any
//! other place too). There is no input. Invariant: no state.

use anyhow::Result;

use super::{Stateless, unwrap, wrap};
use crate::bus::{Device, Effect, Saved};
use crate::console::Console;

/// Of the saved state.
const VERSION: u32 = 1;

/// The debug console.
pub struct DebugConsole {
    // Wires
    console: Box<dyn Console>,
}

impl DebugConsole {
    /// A debug console that writes to `console` and never reads from it.
    pub fn new(console: Box<dyn Console>) -> Self {
        Self { console }
    }
}

impl Device for DebugConsole {
    fn name(&self) -> &'static str {
        "debug-console"
    }

    fn register(&self, _offset: u64, _write: bool) -> &'static str {
        "DATA"
    }

    fn read(&mut self, _offset: u64, _width: usize) -> u64 {
        0xe9
    }

    fn write(&mut self, _offset: u64, _width: usize, value: u64) -> Effect {
        // The bus hands over one byte, zero-extended.
        let [byte, ..] = value.to_le_bytes();
        self.console.put(byte)
    }

    fn reset(&mut self) {}

    fn save(&self) -> Saved {
        let Self { console: _ } = self;
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
    use crate::console::TestConsole;
    use crate::memory::Span;

    #[test]
    fn what_is_written_reaches_the_console_byte_by_byte() {
        let far = TestConsole::default();
        let mut builder = Builder::default();
        builder.place(Space::Mmio, Span { start: 0x996, size: 1 }, DebugConsole::new(Box::new(far.clone()))).unwrap();
        let buses = builder.finish();
        assert_eq!(buses.write(Space::Mmio, 0x996, 1, b"Hello\n"), Effect::None);
        assert_eq!(*far.output.lock().unwrap(), b"Hello\n");
    }

    #[test]
    fn a_read_says_that_it_is_there() {
        assert_eq!(DebugConsole::new(Box::new(TestConsole::default())).read(0, 1), 0xe9);
    }

    #[test]
    fn the_consoles_wish_is_passed_on() {
        struct Full;
        impl Console for Full {
            fn put(&mut self, _byte: u8) -> Effect {
                Effect::Until
            }
            fn get(&mut self) -> Option<u8> {
                None
            }
            fn hung_up(&self) -> bool {
                false
            }
        }
        assert_eq!(DebugConsole::new(Box::new(Full)).write(0, 1, 0x21), Effect::Until);
    }
}
