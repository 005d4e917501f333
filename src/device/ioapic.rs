//! The I/O APIC (82093AA data sheet, "Register description"): 24 inputs, each of which becomes a message to local APICs.
//! Used where KVM has the local APICs and nothing else (`--irqchip split`).
//!
//! Level-triggered inputs wait for the CPU's end of interrupt before they ask again; KVM has to be told which vectors
//! these are ([`Messages::expect_ends`]), or it keeps the ends to itself.
//!
//! Lock order: a device that moves its line holds its own lock, and then takes the chip's; the chip takes no other.
//! Invariant: an entry's remote IRR is set only where the entry is level-triggered.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::{unwrap, wrap};
use crate::bus::{Device, Effect, Saved};
use crate::irq::IrqLine;

/// Of the saved state.
const VERSION: u32 = 1;
/// Inputs.
pub const PINS: usize = 24;

/// Offsets.
const IOREGSEL: u64 = 0;
const IOWIN: u64 = 0x10;
/// What IOREGSEL selects: identification, version, arbitration, then two words for each input.
const ID: u8 = 0;
const VER: u8 = 1;
const ARB: u8 = 2;
const TABLE: u8 = 0x10;
/// Version 0x11, and the number of the last input.
const VERSION_WORD: u32 = 0x11 | (PINS as u32 - 1) << 16;

/// Bits of an entry.
const VECTOR: u64 = 0xff;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR: the chip's own.
const READ_ONLY: u64 = 1 << 12 | REMOTE_IRR;
/// Those that there are.
const USED: u64 = 0xff00_0000_0001_ffff;

/// A message to local APICs (Intel SDM vol. 3, 12.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Who gets it.
    pub address: u64,
    /// What it is.
    pub data: u32,
}

impl Message {
    fn of(entry: u64) -> Self {
        let (destination, logical) = (entry >> 56, entry >> 11 & 1);
        let data = (entry & (LEVEL | 7 << 8 | VECTOR)) as u32 | 1 << 14;
        Self { address: 0xfee0_0000 | destination << 12 | logical << 2, data }
    }
}

/// The wire to the local APICs.
pub trait Messages: Send {
    /// Sends one; false where no local APIC took it.
    fn send(&self, message: Message) -> bool;
    /// Says of which inputs the ends of interrupt are wanted, and what these send.
    fn expect_ends(&self, inputs: &[(usize, Message)]);
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    id: u8,
    select: u8,
    entries: Vec<u64>,
    /// Inputs that are high, a bit each.
    high: u32,
}

struct Chip {
    wire: Box<dyn Messages>,
    state: State,
}

impl Chip {
    fn fresh() -> State {
        State { entries: vec![MASKED; PINS], ..State::default() }
    }

    fn deliver(&mut self, pin: usize) {
        let Some(entry) = self.state.entries.get_mut(pin) else { return };
        if *entry & MASKED != 0 || *entry & LEVEL != 0 && *entry & REMOTE_IRR != 0 {
            return;
        }
        let taken = self.wire.send(Message::of(*entry));
        if taken && *entry & LEVEL != 0 {
            *entry |= REMOTE_IRR;
        }
    }

    fn is_high(&self, pin: usize) -> bool {
        self.state.high >> pin & 1 == 1
    }

    fn set(&mut self, pin: usize, high: bool) {
        let was = self.is_high(pin);
        let bit = 1 << pin;
        self.state.high = if high { self.state.high | bit } else { self.state.high & !bit };
        let level = self.state.entries.get(pin).is_some_and(|entry| entry & LEVEL != 0);
        if high && (level || !was) {
            self.deliver(pin);
        }
    }

    fn end(&mut self, vector: u8) {
        for pin in 0..PINS {
            let Some(entry) = self.state.entries.get_mut(pin) else { return };
            if *entry & REMOTE_IRR == 0 || *entry & VECTOR != u64::from(vector) {
                continue;
            }
            *entry &= !REMOTE_IRR;
            if self.is_high(pin) {
                self.deliver(pin);
            }
        }
    }

    fn tell_ends(&self) {
        // A masked one too, while the CPU has not come to its end: drivers mask first, and end then.
        let wanted =
            |(_, entry): &(usize, &u64)| *entry & LEVEL != 0 && (*entry & MASKED == 0 || *entry & REMOTE_IRR != 0);
        let all = self.state.entries.iter().enumerate().filter(wanted);
        let all: Vec<_> = all.map(|(pin, entry)| (pin, Message::of(*entry))).collect();
        self.wire.expect_ends(&all);
    }

    fn word(&self, index: u8) -> u32 {
        match index {
            ID | ARB => u32::from(self.state.id) << 24,
            VER => VERSION_WORD,
            _ => {
                let Some(at) = index.checked_sub(TABLE) else { return 0 };
                let entry = self.state.entries.get(usize::from(at / 2)).copied().unwrap_or(0);
                (if at % 2 == 0 { entry } else { entry >> 32 }) as u32
            }
        }
    }

    fn set_word(&mut self, index: u8, value: u32) {
        if index == ID {
            self.state.id = (value >> 24 & 0xf) as u8;
        }
        let Some(at) = index.checked_sub(TABLE) else { return };
        let pin = usize::from(at / 2);
        let Some(entry) = self.state.entries.get_mut(pin) else { return };
        let (old, value) = (*entry, u64::from(value));
        let new = if at % 2 == 0 { old & !0xffff_ffff | value } else { old & 0xffff_ffff | value << 32 };
        let mut new = new & USED & !READ_ONLY | old & READ_ONLY;
        if new & LEVEL == 0 {
            new &= !REMOTE_IRR;
        }
        *entry = new;
        if (old | new) & LEVEL != 0 && old != new {
            self.tell_ends();
        }
        if new & LEVEL != 0 && self.is_high(pin) {
            self.deliver(pin);
        }
    }
}

/// The I/O APIC. Clones are the same chip.
#[derive(Clone)]
pub struct IoApic(Arc<Mutex<Chip>>);

impl IoApic {
    /// All inputs masked.
    pub fn new(wire: Box<dyn Messages>) -> Self {
        Self(Arc::new(Mutex::new(Chip { wire, state: Chip::fresh() })))
    }

    fn chip(&self) -> MutexGuard<'_, Chip> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The wire to one of its inputs.
    pub fn line(&self, pin: usize) -> Box<dyn IrqLine> {
        Box::new(Input { chip: self.clone(), pin: pin.min(PINS - 1) })
    }
}

struct Input {
    chip: IoApic,
    pin: usize,
}

impl IrqLine for Input {
    fn set(&self, high: bool) {
        if high {
            crate::irq::count();
        }
        self.chip.chip().set(self.pin, high);
    }
}

impl Device for IoApic {
    fn name(&self) -> &'static str {
        "ioapic"
    }

    fn register(&self, offset: u64, _write: bool) -> &'static str {
        match offset {
            IOREGSEL => "IOREGSEL",
            IOWIN => "IOWIN",
            _ => "reserved",
        }
    }

    fn width(&self) -> usize {
        4
    }

    fn read(&mut self, offset: u64, _width: usize) -> u64 {
        let chip = self.chip();
        match offset {
            IOREGSEL => chip.state.select.into(),
            IOWIN => chip.word(chip.state.select).into(),
            _ => 0,
        }
    }

    fn write(&mut self, offset: u64, _width: usize, value: u64) -> Effect {
        let mut chip = self.chip();
        let [select, ..] = value.to_le_bytes();
        match offset {
            IOREGSEL => chip.state.select = select,
            IOWIN => {
                let index = chip.state.select;
                chip.set_word(index, value as u32);
            }
            _ => {}
        }
        Effect::None
    }

    fn end_of_interrupt(&mut self, vector: u8) {
        self.chip().end(vector);
    }

    fn reset(&mut self) {
        let mut chip = self.chip();
        // The lines are the devices'.
        chip.state = State { high: chip.state.high, ..Chip::fresh() };
        chip.tell_ends();
    }

    fn save(&self) -> Saved {
        wrap(VERSION, &self.chip().state)
    }

    fn load(&mut self, saved: &Saved) -> Result<()> {
        let state: State = unwrap(self.name(), VERSION, saved)?;
        let sound = |entry: &u64| entry & !USED == 0 && (entry & LEVEL != 0 || entry & REMOTE_IRR == 0);
        if state.entries.len() != PINS || !state.entries.iter().all(sound) || state.id > 0xf || state.high >> PINS != 0
        {
            bail!("{}: its saved state is one that the chip never has", self.name());
        }
        let mut chip = self.chip();
        chip.state = state;
        chip.tell_ends();
        Ok(())
    }
}

#[cfg(test)]
#[allow(missing_docs)]
pub mod tests {
    use super::*;

    /// Remembers what was sent.
    #[derive(Clone, Default)]
    pub struct Sent(pub Arc<Mutex<Vec<Message>>>, pub Arc<Mutex<Vec<usize>>>);

    impl Messages for Sent {
        fn send(&self, message: Message) -> bool {
            self.0.lock().unwrap().push(message);
            // CPU 255 is one that there is not.
            message.address >> 12 & 0xff != 0xff
        }

        fn expect_ends(&self, inputs: &[(usize, Message)]) {
            *self.1.lock().unwrap() = inputs.iter().map(|(pin, _)| *pin).collect();
        }
    }

    fn chip() -> (IoApic, Sent) {
        let sent = Sent::default();
        (IoApic::new(Box::new(sent.clone())), sent)
    }

    fn program(chip: &mut IoApic, pin: u8, entry: u64) {
        for (half, word) in [entry, entry >> 32].into_iter().enumerate() {
            chip.write(IOREGSEL, 4, u64::from(TABLE + 2 * pin) + half as u64);
            chip.write(IOWIN, 4, word & 0xffff_ffff);
        }
    }

    #[test]
    fn an_edge_is_a_message_and_a_masked_one_is_none() {
        let (mut chip, sent) = chip();
        let line = chip.line(4);
        line.pulse();
        assert!(sent.0.lock().unwrap().is_empty());
        program(&mut chip, 4, 0x0300_0000_0000_0831);
        line.pulse();
        line.set(true);
        line.set(true);
        let expected = Message { address: 0xfee0_3004, data: 0x4031 };
        assert_eq!(*sent.0.lock().unwrap(), [expected, expected]);
    }

    #[test]
    fn a_level_asks_again_at_each_end_until_the_line_falls() {
        let (mut chip, sent) = chip();
        let line = chip.line(9);
        program(&mut chip, 9, LEVEL | 0x41);
        assert_eq!(*sent.1.lock().unwrap(), [9]);
        line.set(true);
        line.set(true);
        let count = || sent.0.lock().unwrap().len();
        assert_eq!(count(), 1);
        chip.end_of_interrupt(0x42);
        assert_eq!(count(), 1);
        chip.end_of_interrupt(0x41);
        assert_eq!(count(), 2);
        line.set(false);
        chip.end_of_interrupt(0x41);
        assert_eq!(count(), 2);
        line.set(true);
        assert_eq!(count(), 3);
    }

    #[test]
    fn a_line_that_was_high_before_its_entry_was_unmasked_is_told() {
        let (mut chip, sent) = chip();
        chip.line(9).set(true);
        program(&mut chip, 9, LEVEL | MASKED | 0x41);
        assert!(sent.0.lock().unwrap().is_empty());
        program(&mut chip, 9, LEVEL | 0x41);
        assert_eq!(sent.0.lock().unwrap().len(), 1);
    }

    #[test]
    fn an_end_that_comes_while_the_entry_is_masked_is_not_lost() {
        let (mut chip, sent) = chip();
        program(&mut chip, 9, LEVEL | 0x41);
        chip.line(9).set(true);
        program(&mut chip, 9, LEVEL | MASKED | 0x41);
        assert_eq!(*sent.1.lock().unwrap(), [9]);
        chip.end_of_interrupt(0x41);
        assert_eq!(sent.0.lock().unwrap().len(), 1);
        program(&mut chip, 9, LEVEL | 0x41);
        assert_eq!(sent.0.lock().unwrap().len(), 2);
    }

    #[test]
    fn a_message_that_nobody_took_is_sent_again_to_whom_the_entry_then_names() {
        let (mut chip, sent) = chip();
        program(&mut chip, 9, 0xff << 56 | LEVEL | 0x41);
        chip.line(9).set(true);
        program(&mut chip, 9, LEVEL | 0x41);
        assert_eq!(sent.0.lock().unwrap().last().map(|message| message.address), Some(0xfee0_0000));
        chip.end_of_interrupt(0x41);
        assert!(sent.0.lock().unwrap().len() > 2);
    }

    #[test]
    fn registers_read_back_as_the_data_sheet_has_them() {
        let (mut chip, _) = chip();
        chip.write(IOREGSEL, 4, 1);
        assert_eq!((chip.read(IOREGSEL, 4), chip.read(IOWIN, 4)), (1, 0x17_0011));
        chip.write(IOREGSEL, 4, 0);
        chip.write(IOWIN, 4, 0xff00_0000);
        assert_eq!(chip.read(IOWIN, 4), 0x0f00_0000);
        program(&mut chip, 23, !MASKED);
        chip.write(IOREGSEL, 4, 0x3e);
        assert_eq!(chip.read(IOWIN, 4), 0xafff);
        chip.write(IOREGSEL, 4, 0x40);
        chip.write(IOWIN, 4, u64::MAX);
        assert_eq!(chip.read(IOWIN, 4), 0);
    }
}
