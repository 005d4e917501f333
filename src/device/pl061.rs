//! The general-purpose inputs of Arm machines: a PrimeCell GPIO PL061, as ARM DDI 0190B describes it; eight lines.
//!
//! One line has something at its end: the power button, on [`POWER`]. It is high while the button is down, and the
//! button springs back when the guest has looked at it (a read of GPIODATA that takes in its line): a driver is told by
//! an interrupt, waits until the line has settled and then looks, and no time that the button could be held for is
//! right for all of them. The other lines are open, and read 0 unless they are outputs.
//!
//! Bits 9 to 2 of the address of GPIODATA say which lines an access concerns (§3.3.1). A line's interrupt is a level
//! (GPIOIS) or an edge, of one kind or both (GPIOIBE, GPIOIEV); edges are kept until GPIOIC clears them.
//!
//! Invariant: the interrupt wire is high exactly while GPIOMIS is not 0.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::power::Button;
use super::{primecell, unwrap, wrap};
use crate::bus::{Device, Effect, Saved};
use crate::irq::IrqLine;

/// Of the saved state.
const VERSION: u32 = 1;

/// PeriphID0 to 3: part 0x061, designer 0x41 (Arm), revision 0.
pub const PERIPHERAL: [u8; 4] = [0x61, 0x10, 0x04, 0x00];

/// The line of the power button.
pub const POWER: u32 = 3;
const POWER_BIT: u8 = 1 << POWER;

// Offsets of the registers (§3.2). GPIODATA is all of 0x000 to 0x3fc.
const DATA_LAST: u64 = 0x3fc;
const DIR: u64 = 0x400;
const IS: u64 = 0x404;
const IBE: u64 = 0x408;
const IEV: u64 = 0x40c;
const IE: u64 = 0x410;
const RIS: u64 = 0x414;
const MIS: u64 = 0x418;
const IC: u64 = 0x41c;
const AFSEL: u64 = 0x420;

/// A PL061.
pub struct Pl061 {
    // Wires
    line: Box<dyn IrqLine>,
    button: Button,

    // State
    registers: State,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// What the outputs are set to.
    data: u8,
    /// GPIODIR: which lines are outputs.
    outputs: u8,
    /// GPIOIS.
    levels: u8,
    /// GPIOIBE.
    both: u8,
    /// GPIOIEV.
    high: u8,
    /// GPIOIE.
    enabled: u8,
    /// Edges that were seen and not cleared.
    edges: u8,
    /// GPIOAFSEL.
    alternate: u8,
    /// The button is down.
    down: bool,
}

impl State {
    /// The lines as they are.
    fn lines(&self) -> u8 {
        let inputs = if self.down { POWER_BIT } else { 0 };
        (self.data & self.outputs) | (inputs & !self.outputs)
    }

    /// GPIORIS.
    fn raised(&self) -> u8 {
        let active = self.lines() ^ !self.high;
        (self.levels & active) | (!self.levels & self.edges)
    }

    /// GPIOMIS.
    fn masked(&self) -> u8 {
        self.raised() & self.enabled
    }

    /// Keeps the edges that came since the lines were `before`.
    fn notice(&mut self, before: u8) {
        let now = self.lines();
        let (rising, falling) = (now & !before, before & !now);
        let wanted = (rising & (self.both | self.high)) | (falling & (self.both | !self.high));
        self.edges |= wanted & !self.levels;
    }
}

impl Pl061 {
    /// Its interrupt, and the button on line [`POWER`].
    pub fn new(line: Box<dyn IrqLine>, button: Button) -> Self {
        Self { line, button, registers: State::default() }
    }

    /// Carries what has changed to the wires.
    fn drive(&self) {
        self.line.set(self.registers.masked() != 0);
        self.button.set_heard(self.registers.enabled & POWER_BIT != 0);
    }

    fn press(&mut self, down: bool) {
        let before = self.registers.lines();
        self.registers.down = down;
        self.registers.notice(before);
    }
}

/// The lines that an access to GPIODATA concerns.
fn mask(offset: u64) -> u8 {
    (offset >> 2).to_le_bytes()[0]
}

impl Device for Pl061 {
    fn name(&self) -> &'static str {
        "pl061"
    }

    fn register(&self, offset: u64, _write: bool) -> &'static str {
        match primecell::read_from(offset) {
            0..=DATA_LAST => "GPIODATA",
            DIR => "GPIODIR",
            IS => "GPIOIS",
            IBE => "GPIOIBE",
            IEV => "GPIOIEV",
            IE => "GPIOIE",
            RIS => "GPIORIS",
            MIS => "GPIOMIS",
            IC => "GPIOIC",
            AFSEL => "GPIOAFSEL",
            _ => primecell::identity_name(offset),
        }
    }

    fn width(&self) -> usize {
        4
    }

    fn read(&mut self, offset: u64, _width: usize) -> u64 {
        let state = &self.registers;
        let value = match primecell::read_from(offset) {
            data @ 0..=DATA_LAST => {
                let seen = state.lines() & mask(data);
                if state.down && mask(data) & POWER_BIT != 0 {
                    self.button.set_seen();
                    self.press(false);
                    self.drive();
                }
                seen.into()
            }
            DIR => state.outputs.into(),
            IS => state.levels.into(),
            IBE => state.both.into(),
            IEV => state.high.into(),
            IE => state.enabled.into(),
            RIS => state.raised().into(),
            MIS => state.masked().into(),
            AFSEL => state.alternate.into(),
            // GPIOIC can only be written; it reads as what is not there, 0.
            register => primecell::identity(PERIPHERAL, register),
        };
        primecell::lanes(offset, value)
    }

    fn write(&mut self, offset: u64, _width: usize, value: u64) -> Effect {
        let [value, ..] = value.to_le_bytes();
        let before = self.registers.lines();
        let state = &mut self.registers;
        match primecell::written_to(offset) {
            Some(data @ 0..=DATA_LAST) => {
                let written = mask(data) & state.outputs;
                state.data = (state.data & !written) | (value & written);
            }
            Some(DIR) => state.outputs = value,
            Some(IS) => state.levels = value,
            Some(IBE) => state.both = value,
            Some(IEV) => state.high = value,
            Some(IE) => state.enabled = value,
            Some(IC) => state.edges &= !value,
            Some(AFSEL) => state.alternate = value,
            _ => return Effect::None,
        }
        state.notice(before);
        self.drive();
        Effect::None
    }

    fn reset(&mut self) {
        self.registers = State::default();
        self.drive();
    }

    fn service(&mut self) {
        if self.button.take() {
            self.press(true);
            self.drive();
        }
    }

    fn save(&self) -> Saved {
        wrap(VERSION, &self.registers)
    }

    fn load(&mut self, saved: &Saved) -> Result<()> {
        self.registers = unwrap(self.name(), VERSION, saved)?;
        self.drive();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::TestWire;
    use std::sync::Arc;

    struct Rig {
        device: Pl061,
        wire: Arc<TestWire>,
        button: Button,
    }

    fn rig() -> Rig {
        let (wire, button) = (Arc::new(TestWire::default()), Button::default());
        Rig { device: Pl061::new(Box::new(wire.clone()), button.clone()), wire, button }
    }

    impl Rig {
        fn get(&mut self, register: u64) -> u64 {
            self.device.read(register, 4)
        }

        fn set(&mut self, register: u64, value: u64) {
            assert_eq!(self.device.write(register, 4, value), Effect::None);
        }

        fn press(&mut self) {
            self.button.press();
            self.device.service();
        }
    }

    /// GPIODATA of some lines.
    fn data(lines: u64) -> u64 {
        lines << 2
    }

    #[test]
    fn after_reset_all_lines_are_low_inputs_and_it_is_known_by_its_numbers() {
        let mut rig = rig();
        for register in (DIR..=AFSEL).step_by(4).chain([data(0xff)]) {
            assert_eq!(rig.get(register), 0, "{register:#x}");
        }
        let numbers: Vec<_> = (0xfe0..0x1000).step_by(4).map(|register| rig.get(register)).collect();
        assert_eq!(numbers, [0x61, 0x10, 0x04, 0x00, 0x0d, 0xf0, 0x05, 0xb1]);
        assert!(!rig.wire.level() && !rig.button.is_heard());
    }

    #[test]
    fn the_address_of_the_data_says_which_lines_an_access_concerns() {
        let mut rig = rig();
        rig.set(DIR, 0xf0);
        rig.set(data(0xff), 0xff);
        assert_eq!(rig.get(data(0xff)), 0xf0, "inputs are not written");
        rig.set(data(0x30), 0x10);
        assert_eq!((rig.get(data(0xff)), rig.get(data(0x50)), rig.get(data(0))), (0xd0, 0x50, 0));
    }

    #[test]
    fn a_press_is_an_edge_each_way_and_ends_when_the_guest_has_looked() {
        let mut rig = rig();
        rig.set(IBE, 8);
        rig.set(IE, 8);
        assert!(rig.button.is_heard());
        rig.press();
        assert!(!rig.button.was_seen());
        assert_eq!((rig.get(RIS), rig.get(MIS), rig.wire.level()), (8, 8, true));
        rig.set(IC, 8);
        assert!(!rig.wire.level());
        assert_eq!(rig.get(data(0xf7)), 0, "other lines");
        assert_eq!((rig.get(data(8)), rig.wire.level()), (8, true), "down, and then the edge of its coming up");
        assert!(rig.button.was_seen());
        rig.set(IC, 0xff);
        assert_eq!((rig.get(data(8)), rig.get(RIS), rig.wire.level()), (0, 0, false));
        rig.set(IE, 0);
        assert!(!rig.button.is_heard());
    }

    #[test]
    fn only_the_edges_that_are_wanted_are_kept() {
        // GPIOIBE, GPIOIEV, raised by the button going down, by its coming up.
        for (both, high, down, up) in [(0, 8, 8, 0), (0, 0, 0, 8), (8, 0, 8, 8), (8, 8, 8, 8)] {
            let mut rig = rig();
            rig.set(IBE, both);
            rig.set(IEV, high);
            rig.press();
            assert_eq!((rig.get(RIS), rig.get(MIS)), (down, 0), "{both} {high}");
            rig.set(IC, 8);
            rig.get(data(8));
            assert_eq!(rig.get(RIS), up, "{both} {high}");
        }
    }

    #[test]
    fn a_level_is_raised_as_long_as_it_is_there() {
        let mut rig = rig();
        rig.set(IS, 8);
        rig.set(IEV, 0xff);
        rig.set(IE, 8);
        rig.press();
        rig.set(IC, 8);
        assert!(rig.wire.level());
        rig.get(data(8));
        assert!(!rig.wire.level());
        rig.set(IEV, 0);
        assert!(rig.wire.level(), "low is wanted now");
    }

    #[test]
    fn a_reset_lets_the_button_up_and_tells_that_nobody_hears_it() {
        let mut rig = rig();
        rig.set(IE, 8);
        rig.set(IEV, 8);
        rig.press();
        rig.device.reset();
        assert!(!rig.wire.level() && !rig.button.is_heard());
        assert_eq!(rig.get(data(8)), 0);
    }

    #[test]
    fn a_loaded_device_raises_its_line_again() {
        let mut rig = self::rig();
        rig.set(IE, 8);
        rig.set(IEV, 8);
        rig.press();
        let mut other = self::rig();
        other.device.load(&rig.device.save()).unwrap();
        assert!(other.wire.level() && other.button.is_heard());
        assert_eq!(other.get(data(8)), 8);
    }
}
