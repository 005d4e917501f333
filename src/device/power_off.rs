//! The power-off register: the PM1a control register of ACPI's fixed hardware, without ACPI around it.
//!
//! Hobby kernels know it from QEMU, where writing 0x2000 to port 0x604 switches the machine off. The bits are those of
//! ACPI 6.5 §4.8.3.2.1: a write with SLP_EN (bit 13) set is the power-off, whatever sleeping type it names, since there
//! is no other sleeping state. SCI_EN, BM_RLD and SLP_TYP are kept and read back; SLP_EN and GBL_RLS are write-only and
//! read 0, as do the reserved bits. Invariant: the register never holds a bit that does not read back.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::{unwrap, wrap};
use crate::bus::{Device, Effect, Saved};

/// Of the saved state.
const VERSION: u32 = 1;

const SLP_EN: u16 = 1 << 13;
/// SCI_EN, BM_RLD and SLP_TYP.
const KEPT: u16 = 1 | 1 << 1 | 7 << 10;

/// The power-off register.
#[derive(Debug, Default)]
pub struct PowerOff {
    // State
    control: u16,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    control: u16,
}

impl Device for PowerOff {
    fn name(&self) -> &'static str {
        "power-off"
    }

    fn register(&self, _offset: u64, _write: bool) -> &'static str {
        "PM1a_CNT"
    }

    fn width(&self) -> usize {
        2
    }

    fn read(&mut self, offset: u64, _width: usize) -> u64 {
        let [low, high] = self.control.to_le_bytes();
        if offset == 0 { self.control.into() } else { u16::from_le_bytes([high, low]).into() }
    }

    fn write(&mut self, offset: u64, width: usize, value: u64) -> Effect {
        // One access is the whole register or one byte of it; the bus has cut off the rest.
        let [first, second, ..] = value.to_le_bytes();
        let [low, high] = self.control.to_le_bytes();
        let written = u16::from_le_bytes(match (offset, width) {
            (0, 1) => [first, high],
            (0, _) => [first, second],
            _ => [low, first],
        });
        self.control = written & KEPT;
        if written & SLP_EN == 0 { Effect::None } else { Effect::PowerOff }
    }

    fn reset(&mut self) {
        self.control = 0;
    }

    fn save(&self) -> Saved {
        let &Self { control } = self;
        wrap(VERSION, &State { control })
    }

    fn load(&mut self, saved: &Saved) -> Result<()> {
        let State { control } = unwrap(self.name(), VERSION, saved)?;
        if control & !KEPT != 0 {
            bail!("{}: PM1a_CNT of {control:#06x} has bits that the register never holds", self.name());
        }
        self.control = control;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::{Builder, Buses, Space};
    use crate::memory::Span;
    use std::sync::Arc;

    fn buses() -> Arc<Buses> {
        let mut builder = Builder::default();
        builder.place(Space::Pio, Span { start: 0x604, size: 2 }, PowerOff::default()).unwrap();
        builder.finish()
    }

    #[test]
    fn the_sleep_bit_switches_off_however_it_is_written() {
        assert_eq!(buses().write(Space::Pio, 0x604, 2, &[0x00, 0x20]), Effect::PowerOff);
        assert_eq!(buses().write(Space::Pio, 0x604, 4, &[0x00, 0x34, 0, 0]), Effect::PowerOff);
        assert_eq!(buses().write(Space::Pio, 0x605, 1, &[0x20]), Effect::PowerOff);
        assert_eq!(buses().write(Space::Pio, 0x604, 1, &[0x20]), Effect::None);
        assert_eq!(buses().write(Space::Pio, 0x604, 2, &[0xff, 0xdf]), Effect::None);
    }

    #[test]
    fn what_is_kept_reads_back_and_the_rest_reads_zero() {
        let buses = buses();
        let mut data = [0; 2];
        buses.write(Space::Pio, 0x604, 2, &[0xff, 0xdf]);
        buses.read(Space::Pio, 0x604, 2, &mut data);
        assert_eq!(data, [0x03, 0x1c]);
        buses.write(Space::Pio, 0x605, 1, &[0x04]);
        buses.read(Space::Pio, 0x605, 1, &mut data[..1]);
        assert_eq!(data[0], 0x04);
        buses.write(Space::Pio, 0x604, 1, &[0x01]);
        buses.read(Space::Pio, 0x604, 2, &mut data);
        assert_eq!(data, [0x01, 0x04]);
    }

    #[test]
    fn a_state_with_bits_that_never_stay_is_refused() {
        for control in [SLP_EN, 1 << 2, 0x8000] {
            let mut saved = PowerOff::default().save();
            saved.state["control"] = control.into();
            assert!(PowerOff::default().load(&saved).is_err(), "{control:#x}");
        }
    }
}
