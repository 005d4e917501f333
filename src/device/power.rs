//! What ACPI's tables name for the life of the machine: sleep, reset, and events for the guest (the power button).
//!
//! One device with the registers of the hardware-reduced model (ACPI 6.5 §4.1, §4.8.3.7) and those that the DSDT's own code
//! reads and writes:
//!
//! | offset | register | |
//! |---|---|---|
//! | 0 | SLEEP_CONTROL_REG | SLP_TYP in bits 2 to 4, SLP_EN in bit 5: a write with SLP_EN and type 5 is the power-off |
//! | 1 | SLEEP_STATUS_REG | bit 7, WAK_STS: write 1 to clear; never set, there is no waking |
//! | 2 | RESET_REG | a write of 1 resets the machine |
//! | 3 | EVENT | bit 0: the power button, bit 1: the generation id is another; a read clears it |
//! | 4 | LISTENER | somebody in the guest listens to its buttons (the DSDT's code writes 1) |
//!
//! Invariant: the interrupt line is high exactly while an event has not been read.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::{unwrap, wrap};
use crate::bus::{Device, Effect, Saved};
use crate::irq::IrqLine;

/// Of the saved state.
const VERSION: u32 = 1;
/// Offsets.
pub const SLEEP_CONTROL: u64 = 0;
/// Sleep status.
pub const SLEEP_STATUS: u64 = 1;
/// Reset.
pub const RESET: u64 = 2;
/// Events.
pub const EVENT: u64 = 3;
/// Who hears them.
pub const LISTENER: u64 = 4;

/// The sleeping type of the power-off, as \_S5 names it.
pub const S5: u8 = 5;
const SLP_TYP: u64 = 7 << 2;
const SLP_EN: u64 = 1 << 5;
/// The power button's event.
pub const BUTTON: u8 = 1;
/// The event that the machine has another generation id: it goes on from a snapshot.
pub const GENERATION: u8 = 2;

/// The power button, seen from the host: pressed by whoever holds it, answered by the device when it is served.
#[derive(Debug, Clone, Default)]
pub struct Button(Arc<Wires>);

#[derive(Debug, Default)]
struct Wires {
    pressed: AtomicBool,
    renewed: AtomicBool,
    heard: AtomicBool,
    seen: AtomicBool,
}

impl Button {
    /// Presses it; the device notices when it is served next.
    pub fn press(&self) {
        self.0.seen.store(false, Ordering::SeqCst);
        self.0.pressed.store(true, Ordering::SeqCst);
    }

    /// The machine has another generation id; the device tells when it is served next.
    pub fn renew(&self) {
        self.0.renewed.store(true, Ordering::SeqCst);
    }

    /// It has, since the last time.
    fn take_renewed(&self) -> bool {
        self.0.renewed.swap(false, Ordering::SeqCst)
    }

    /// The guest has taken note of it since.
    pub fn was_seen(&self) -> bool {
        self.0.seen.load(Ordering::SeqCst)
    }

    /// The guest takes note of it.
    pub fn set_seen(&self) {
        self.0.seen.store(true, Ordering::SeqCst);
    }

    /// The guest has a driver that hears it.
    pub fn is_heard(&self) -> bool {
        self.0.heard.load(Ordering::SeqCst)
    }

    /// Says whether the guest hears it.
    pub fn set_heard(&self, heard: bool) {
        self.0.heard.store(heard, Ordering::SeqCst);
    }

    /// It has been pressed since the last time.
    pub fn take(&self) -> bool {
        self.0.pressed.swap(false, Ordering::SeqCst)
    }
}

/// Sleep, reset and events.
pub struct Power {
    // Wires
    button: Button,
    line: Box<dyn IrqLine>,
    // State
    events: u8,
    listener: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    events: u8,
    listener: bool,
}

impl Power {
    /// A machine that is awake.
    pub fn new(button: Button, line: Box<dyn IrqLine>) -> Self {
        Self { button, line, events: 0, listener: false }
    }

    fn tell(&self) {
        self.line.set(self.events != 0);
        self.button.set_heard(self.listener);
    }
}

impl Device for Power {
    fn name(&self) -> &'static str {
        "power"
    }

    fn register(&self, offset: u64, _write: bool) -> &'static str {
        match offset {
            SLEEP_CONTROL => "SLEEP_CONTROL",
            SLEEP_STATUS => "SLEEP_STATUS",
            RESET => "RESET",
            EVENT => "EVENT",
            _ => "LISTENER",
        }
    }

    fn read(&mut self, offset: u64, _width: usize) -> u64 {
        match offset {
            EVENT => {
                let events = std::mem::take(&mut self.events);
                if events & BUTTON != 0 {
                    self.button.set_seen();
                }
                self.tell();
                events.into()
            }
            LISTENER => self.listener.into(),
            _ => 0,
        }
    }

    fn write(&mut self, offset: u64, _width: usize, value: u64) -> Effect {
        match offset {
            SLEEP_CONTROL if value & SLP_EN != 0 && value & SLP_TYP == u64::from(S5) << 2 => Effect::PowerOff,
            RESET if value & 0xff == 1 => Effect::Reset,
            LISTENER => {
                self.listener = value & 1 != 0;
                self.tell();
                Effect::None
            }
            _ => Effect::None,
        }
    }

    fn reset(&mut self) {
        (self.events, self.listener) = (0, false);
        self.tell();
    }

    fn service(&mut self) {
        let button = if self.button.take() { BUTTON } else { 0 };
        let generation = if self.button.take_renewed() { GENERATION } else { 0 };
        if button | generation != 0 {
            self.events |= button | generation;
            self.tell();
        }
    }

    fn save(&self) -> Saved {
        let &Self { events, listener, .. } = self;
        wrap(VERSION, &State { events, listener })
    }

    fn load(&mut self, saved: &Saved) -> Result<()> {
        let State { events, listener } = unwrap(self.name(), VERSION, saved)?;
        if events & !(BUTTON | GENERATION) != 0 {
            bail!("{}: EVENT of {events:#x} has bits that the register never holds", self.name());
        }
        (self.events, self.listener) = (events, listener);
        self.tell();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::TestWire;

    fn power() -> (Power, Button, Arc<TestWire>) {
        let (button, wire) = (Button::default(), Arc::new(TestWire::default()));
        (Power::new(button.clone(), Box::new(wire.clone())), button, wire)
    }

    #[test]
    fn sleeping_type_5_is_the_power_off_and_nothing_else_is() {
        let (mut power, ..) = power();
        assert_eq!(power.write(SLEEP_CONTROL, 1, 0x34), Effect::PowerOff);
        for other in [0, 0x14, 0x20, 0x30] {
            assert_eq!(power.write(SLEEP_CONTROL, 1, other), Effect::None, "{other:#x}");
        }
        assert_eq!((power.write(RESET, 1, 1), power.write(RESET, 1, 2)), (Effect::Reset, Effect::None));
        assert_eq!(power.write(SLEEP_STATUS, 1, 0x80), Effect::None);
    }

    #[test]
    fn another_generation_is_an_event_of_its_own() {
        let (mut power, button, wire) = power();
        button.renew();
        power.service();
        assert!(wire.level());
        assert_eq!((power.read(EVENT, 1), wire.level(), button.was_seen()), (2, false, false));
        button.renew();
        button.press();
        power.service();
        assert_eq!((power.read(EVENT, 1), power.read(EVENT, 1)), (3, 0));
    }

    #[test]
    fn the_button_raises_the_line_until_its_event_is_read() {
        let (mut power, button, wire) = power();
        power.service();
        assert!(!wire.level());
        button.press();
        power.service();
        assert!(wire.level() && !button.was_seen());
        assert_eq!((power.read(EVENT, 1), power.read(EVENT, 1)), (1, 0));
        assert!(!wire.level() && button.was_seen());
    }

    #[test]
    fn who_hears_the_button_is_known_until_the_machine_is_reset() {
        let (mut power, button, _) = power();
        assert!(!button.is_heard());
        power.write(LISTENER, 1, 1);
        assert!(button.is_heard() && power.read(LISTENER, 1) == 1);
        power.reset();
        assert!(!button.is_heard());
    }

    #[test]
    fn a_saved_event_raises_the_line_again() {
        let (mut power, button, wire) = power();
        power.write(LISTENER, 1, 1);
        button.press();
        power.service();
        let saved = power.save();
        power.reset();
        assert!(!wire.level());
        power.load(&saved).unwrap();
        assert!(wire.level() && button.is_heard());
        let mut bad = saved;
        bad.state["events"] = 4.into();
        assert!(power.load(&bad).is_err());
    }
}
