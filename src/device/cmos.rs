//! The CMOS clock: a Motorola MC146818 with 128 cells behind two ports, index and data, as the IBM PC/AT has it.
//!
//! Cells 0, 2, 4, 6..=9 and 0x32 (the century) are the time of day, in UTC, from the clock wire; BCD or binary and 24 or
//! 12 hours as register B says (24-hour BCD at power-on). A guest that sets the time gets it: the difference to the
//! clock is kept. It does so as the data sheet asks, with register B's SET bit on around it; a single cell written
//! without SET counts if the date is one then, and is dropped if not. The day of the week follows from the date.
//!
//! Firmware's cells tell the size of RAM: 0x15/0x16 below 640 KiB and 0x17/0x18, 0x30/0x31 above 1 MiB in KiB,
//! 0x34/0x35 from 16 MiB to 4 GiB and 0x5b..=0x5d above 4 GiB in 64 KiB. All others are plain storage.
//!
//! **There are no interrupts**: alarm, periodic and update interrupts can be enabled in register B and never come;
//! register C reads 0. Reset is power-on with a full battery: the cells are firmware's again and the time is the clock's.
//!
//! Invariant: what the guest writes never makes a time outside the years 0 to 9999.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::calendar::{self, Date};
use super::{unwrap, wrap};
use crate::bus::{Device, Effect, Saved};
use crate::clock::Clock;
use crate::memory::Span;

/// Of the saved state.
const VERSION: u32 = 1;

/// The offset of the index: to write it does nothing until another register is asked for.
pub const INDEX: u64 = 0;

const CELLS: usize = 128;

const SECOND: u8 = 0x00;
const MINUTE: u8 = 0x02;
const HOUR: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const A: u8 = 0x0a;
const B: u8 = 0x0b;
const C: u8 = 0x0c;
const D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// Register A: an update is in progress; at power-on the divider runs at 32 kHz and the rate is 1024 Hz.
const A_UPDATING: u8 = 1 << 7;
const A_FRESH: u8 = 0x26;
/// Register B: updates are held, binary not BCD, 24 hours not 12.
const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24: u8 = 1 << 1;
/// Register D: RAM and time are valid.
const D_VALID: u8 = 1 << 7;
const PM: u8 = 1 << 7;

/// With a 32 kHz time base the update takes 1984 µs and is announced 244 µs ahead (MC146818, table "Update Cycle
/// Times"). Here the cells change at the end of it, so a guest that saw it not in progress has time to read them all.
const UPDATE_NANOS: u32 = (1984 + 244) * 1000;

const DAY_SECONDS: i64 = 86_400;
const FIRST_SECOND: i64 = calendar::FIRST * DAY_SECONDS;
const LAST_SECOND: i64 = calendar::LAST * DAY_SECONDS + DAY_SECONDS - 1;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The CMOS clock.
pub struct Cmos {
    // Configuration
    /// Cells as firmware leaves them.
    firmware: [u8; CELLS],

    // Wires
    clock: Box<dyn Clock>,

    // State
    index: u8,
    a: u8,
    b: u8,
    /// Seconds from the clock's time to the guest's.
    offset: i64,
    /// Storage; the cells of the time of day count only while SET holds them.
    cells: [u8; CELLS],
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    index: u8,
    a: u8,
    b: u8,
    offset: i64,
    cells: Vec<u8>,
}

impl Cmos {
    /// A CMOS clock that shows the time of `clock` and the size of the RAM at `memory` (in ascending order).
    pub fn new(clock: Box<dyn Clock>, memory: &[Span]) -> Self {
        let firmware = firmware(memory);
        Self { firmware, clock, index: 0, a: A_FRESH, b: B_24, offset: 0, cells: firmware }
    }

    /// The clock's own seconds, held within what the calendar has.
    fn host_seconds(&self) -> i64 {
        i64::try_from(self.clock.now().as_secs()).map_or(LAST_SECOND, |s| s.min(LAST_SECOND))
    }

    fn is_held(&self) -> bool {
        self.b & B_SET != 0
    }

    /// A number of at most two digits as the cells have it.
    fn encode(&self, number: u8) -> u8 {
        if self.b & B_BINARY != 0 { number } else { ((number / 10 % 10) << 4) | (number % 10) }
    }

    /// A cell as a number; none where it is not BCD though it should be.
    fn decode(&self, cell: u8) -> Option<u8> {
        if self.b & B_BINARY != 0 {
            return Some(cell);
        }
        (cell >> 4 <= 9 && cell & 15 <= 9).then(|| (cell >> 4) * 10 + (cell & 15))
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.b & B_24 != 0 {
            return self.encode(hour);
        }
        // 12, 1, 2, … 11, twice.
        self.encode((hour + 11) % 12 + 1) | if hour < 12 { 0 } else { PM }
    }

    fn decode_hour(&self, cell: u8) -> Option<u8> {
        if self.b & B_24 != 0 {
            return self.decode(cell).filter(|hour| *hour < 24);
        }
        let hour = self.decode(cell & !PM).filter(|hour| (1..=12).contains(hour))?;
        Some(hour % 12 + if cell & PM == 0 { 0 } else { 12 })
    }

    /// The time of day in the cells' form, when the clock is at `host`.
    fn time(&self, host: i64) -> [(u8, u8); 8] {
        let now = host.saturating_add(self.offset).clamp(FIRST_SECOND, LAST_SECOND);
        let (days, second) = (now.div_euclid(DAY_SECONDS), now.rem_euclid(DAY_SECONDS));
        let Date { year, month, day } = calendar::date_of(days);
        // Every number here has two digits.
        let cell = |number: i64| self.encode(u8::try_from(number).unwrap_or(0));
        [
            (SECOND, cell(second % 60)),
            (MINUTE, cell(second / 60 % 60)),
            (HOUR, self.encode_hour(u8::try_from(second / 3600).unwrap_or(0))),
            (WEEKDAY, self.encode(calendar::weekday_of(days))),
            (DAY, self.encode(day)),
            (MONTH, self.encode(month)),
            (YEAR, cell(year % 100)),
            (CENTURY, cell(year / 100)),
        ]
    }

    /// Puts the time of day into the cells.
    fn show_time(&mut self, host: i64) {
        for (index, cell) in self.time(host) {
            self.store(index, cell);
        }
    }

    /// The seconds since 1970 that the cells show; none where they are nonsense.
    fn shown_seconds(&self) -> Option<i64> {
        let number = |index| self.decode(self.cell(index));
        let below = |index, limit| number(index).filter(|n| *n < limit).map(i64::from);
        let year = below(CENTURY, 100)? * 100 + below(YEAR, 100)?;
        let days = calendar::days_of(Date { year, month: number(MONTH)?, day: number(DAY)? })?;
        let hour = i64::from(self.decode_hour(self.cell(HOUR))?);
        Some(days * DAY_SECONDS + hour * 3600 + below(MINUTE, 60)? * 60 + below(SECOND, 60)?)
    }

    /// Makes the time in the cells the guest's time, if it is one.
    fn set_time(&mut self, host: i64) {
        if let Some(seconds) = self.shown_seconds() {
            self.offset = seconds - host;
        }
    }

    fn cell(&self, index: u8) -> u8 {
        self.cells.get(usize::from(index)).copied().unwrap_or(0xff)
    }

    fn store(&mut self, index: u8, value: u8) {
        if let Some(cell) = self.cells.get_mut(usize::from(index)) {
            *cell = value;
        }
    }

    fn read_cell(&self) -> u8 {
        match self.index {
            A => {
                let updating = !self.is_held() && self.clock.now().subsec_nanos() >= 1_000_000_000 - UPDATE_NANOS;
                self.a | if updating { A_UPDATING } else { 0 }
            }
            B => self.b,
            C => 0,
            D => D_VALID,
            index if !self.is_held() && is_time(index) => {
                self.time(self.host_seconds()).into_iter().find(|(i, _)| *i == index).map_or(0, |(_, cell)| cell)
            }
            index => self.cell(index),
        }
    }

    fn write_cell(&mut self, value: u8) {
        // Looked at once, so that time does not go on between showing and setting it.
        let host = self.host_seconds();
        match self.index {
            A => self.a = value & !A_UPDATING,
            B => {
                let was_held = self.is_held();
                if !was_held {
                    self.show_time(host);
                }
                self.b = value;
                if was_held && !self.is_held() {
                    self.set_time(host);
                }
            }
            C | D => {}
            index if !self.is_held() && is_time(index) => {
                self.show_time(host);
                self.store(index, value);
                self.set_time(host);
            }
            index => self.store(index, value),
        }
    }
}

fn is_time(index: u8) -> bool {
    matches!(index, SECOND | MINUTE | HOUR | WEEKDAY | DAY | MONTH | YEAR | CENTURY)
}

/// Bytes of RAM from `from` on without a gap, counted up to `limit`.
fn ram_from(memory: &[Span], from: u64, limit: u64) -> u64 {
    let end = memory.iter().fold(from, |end, span| {
        if span.start <= end && end <= span.last() { span.last().saturating_add(1) } else { end }
    });
    end.min(limit).saturating_sub(from)
}

/// The cells that tell the size of RAM, low byte first.
fn firmware(memory: &[Span]) -> [u8; CELLS] {
    let mut cells = [0; CELLS];
    let mut put = |places: &[usize], number: u64| {
        // As much as there is room for; more than that is told by the next, larger unit.
        let largest = (1 << (8 * places.len())) - 1;
        for (place, byte) in places.iter().zip(number.min(largest).to_le_bytes()) {
            if let Some(cell) = cells.get_mut(*place) {
                *cell = byte;
            }
        }
    };
    let extended = ram_from(memory, MIB, 4 * GIB) / KIB;
    put(&[0x15, 0x16], ram_from(memory, 0, 640 * KIB) / KIB);
    put(&[0x17, 0x18], extended);
    put(&[0x30, 0x31], extended);
    put(&[0x34, 0x35], ram_from(memory, 16 * MIB, 4 * GIB) / (64 * KIB));
    put(&[0x5b, 0x5c, 0x5d], ram_from(memory, 4 * GIB, u64::MAX) / (64 * KIB));
    cells
}

impl Device for Cmos {
    fn name(&self) -> &'static str {
        "cmos"
    }

    fn register(&self, offset: u64, _write: bool) -> &'static str {
        match (offset, self.index) {
            (0, _) => "INDEX",
            (1, SECOND) => "SECONDS",
            (1, MINUTE) => "MINUTES",
            (1, HOUR) => "HOURS",
            (1, WEEKDAY) => "DAY_OF_WEEK",
            (1, DAY) => "DATE",
            (1, MONTH) => "MONTH",
            (1, YEAR) => "YEAR",
            (1, CENTURY) => "CENTURY",
            (1, A) => "A",
            (1, B) => "B",
            (1, C) => "C",
            (1, D) => "D",
            (1, _) => "RAM",
            _ => "RESERVED",
        }
    }

    fn read(&mut self, offset: u64, _width: usize) -> u64 {
        // The index can only be written.
        if offset == 1 { self.read_cell().into() } else { 0xff }
    }

    fn write(&mut self, offset: u64, _width: usize, value: u64) -> Effect {
        let [byte, ..] = value.to_le_bytes();
        match offset {
            // The highest bit masks NMI, of which there is none.
            0 => self.index = byte & 0x7f,
            1 => self.write_cell(byte),
            _ => {}
        }
        Effect::None
    }

    fn reset(&mut self) {
        (self.index, self.a, self.b, self.offset, self.cells) = (0, A_FRESH, B_24, 0, self.firmware);
    }

    fn save(&self) -> Saved {
        let Self { firmware: _, clock: _, index, a, b, offset, cells } = self;
        wrap(VERSION, &State { index: *index, a: *a, b: *b, offset: *offset, cells: cells.to_vec() })
    }

    fn load(&mut self, saved: &Saved) -> Result<()> {
        let State { index, a, b, offset, cells } = unwrap(self.name(), VERSION, saved)?;
        let Ok(cells) = <[u8; CELLS]>::try_from(cells) else {
            bail!("{}: its saved state has not {CELLS} cells", self.name());
        };
        if index & 0x80 != 0 || a & A_UPDATING != 0 {
            bail!("{}: index {index:#04x} or register A {a:#04x} has a bit that it never holds", self.name());
        }
        if !(FIRST_SECOND - LAST_SECOND..=LAST_SECOND).contains(&offset) {
            bail!("{}: a clock {offset} seconds off is outside the years 0 to 9999", self.name());
        }
        (self.index, self.a, self.b, self.offset, self.cells) = (index, a, b, offset, cells);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::StoppedClock;
    use std::time::Duration;

    /// Thursday, 2024-02-29 13:05:09 UTC.
    const NOW: u64 = 1_709_211_909;

    fn at(now: Duration) -> Cmos {
        Cmos::new(Box::new(StoppedClock(now)), &[])
    }

    fn now() -> Cmos {
        at(Duration::from_secs(NOW))
    }

    fn get(device: &mut Cmos, index: u8) -> u8 {
        device.write(0, 1, index.into());
        u8::try_from(device.read(1, 1)).unwrap()
    }

    fn set(device: &mut Cmos, index: u8, value: u8) {
        device.write(0, 1, index.into());
        assert_eq!(device.write(1, 1, value.into()), Effect::None);
    }

    /// Century, year, month, day, hour, minute, second.
    const TIME: [u8; 7] = [CENTURY, YEAR, MONTH, DAY, HOUR, MINUTE, SECOND];

    fn time(device: &mut Cmos) -> [u8; 7] {
        TIME.map(|index| get(device, index))
    }

    fn set_all(device: &mut Cmos, b: u8, time: [u8; 7]) {
        set(device, B, b | B_SET);
        for (index, value) in TIME.into_iter().zip(time) {
            set(device, index, value);
        }
        set(device, B, b);
    }

    #[test]
    fn at_power_on_the_time_is_the_clocks_in_24_hour_bcd() {
        let mut device = now();
        assert_eq!(time(&mut device), [0x20, 0x24, 0x02, 0x29, 0x13, 0x05, 0x09]);
        assert_eq!(get(&mut device, WEEKDAY), 5);
        assert_eq!([A, B, C, D].map(|r| get(&mut device, r)), [0x26, 0x02, 0x00, 0x80]);
    }

    #[test]
    fn register_b_chooses_binary_and_12_hours() {
        let mut device = now();
        set(&mut device, B, B_BINARY | B_24);
        assert_eq!(time(&mut device), [20, 24, 2, 29, 13, 5, 9]);
        set(&mut device, B, B_BINARY);
        assert_eq!(get(&mut device, HOUR), 1 | PM);
        set(&mut device, B, 0);
        for (hour, cell) in [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)] {
            let mut device = at(Duration::from_secs(hour * 3600));
            set(&mut device, B, 0);
            assert_eq!(get(&mut device, HOUR), cell, "{hour}");
        }
    }

    #[test]
    fn what_a_guest_sets_is_what_it_reads_in_every_mode() {
        for (b, set_to) in [
            (B_24, [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]),
            (B_24, [0x21, 0x00, 0x02, 0x28, 0x00, 0x00, 0x00]),
            (0, [0x20, 0x00, 0x02, 0x29, 0x92, 0x30, 0x00]),
            (0, [0x00, 0x00, 0x01, 0x01, 0x12, 0x00, 0x00]),
            (B_BINARY, [99, 99, 12, 31, 11 | PM, 59, 59]),
            (B_BINARY | B_24, [20, 38, 1, 19, 3, 14, 8]),
        ] {
            let mut device = now();
            set_all(&mut device, b, set_to);
            assert_eq!(time(&mut device), set_to, "{b:#x}");
            assert_ne!(device.offset, 0);
        }
    }

    #[test]
    fn a_time_set_goes_on_with_the_clock() {
        let mut device = now();
        set_all(&mut device, B_24, [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]);
        device.clock = Box::new(StoppedClock(Duration::from_secs(NOW + 2)));
        assert_eq!(time(&mut device), [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]);
    }

    #[test]
    fn nonsense_is_dropped() {
        for (place, value) in
            [(0, 0xaa), (1, 0xff), (6, 0x1f), (2, 0x13), (2, 0x00), (3, 0x30), (4, 0x24), (5, 0x60), (6, 0x5a)]
        {
            let mut device = now();
            let before = time(&mut device);
            let mut wrong = before;
            wrong[place] = value;
            set_all(&mut device, B_24, wrong);
            assert_eq!(time(&mut device), before, "{place} {value:#x}");
            set(&mut device, TIME[place], value);
            assert_eq!(time(&mut device), before, "{place} {value:#x}, without SET");
        }
    }

    #[test]
    fn while_held_the_cells_are_storage() {
        let mut device = now();
        set(&mut device, B, B_SET | B_24);
        device.clock = Box::new(StoppedClock(Duration::from_secs(NOW + 1000)));
        assert_eq!(time(&mut device), [0x20, 0x24, 0x02, 0x29, 0x13, 0x05, 0x09]);
        set(&mut device, SECOND, 0xee);
        assert_eq!(get(&mut device, SECOND), 0xee);
    }

    #[test]
    fn a_single_cell_can_be_set() {
        let mut device = now();
        set(&mut device, HOUR, 0x22);
        assert_eq!(time(&mut device), [0x20, 0x24, 0x02, 0x29, 0x22, 0x05, 0x09]);
    }

    #[test]
    fn an_update_is_announced_before_the_second_ends() {
        for (nanos, expected) in [(0, 0), (997_771_999, 0), (997_772_000, A_UPDATING), (999_999_999, A_UPDATING)] {
            let mut device = at(Duration::new(NOW, nanos));
            assert_eq!(get(&mut device, A), A_FRESH | expected, "{nanos}");
            set(&mut device, B, B_SET);
            assert_eq!(get(&mut device, A), A_FRESH);
        }
    }

    #[test]
    fn the_registers_that_can_only_be_read_stay() {
        let mut device = now();
        for (index, value) in [(A, 0x7f), (C, 0), (D, 0x80)] {
            set(&mut device, index, 0xff);
            assert_eq!(get(&mut device, index), value);
        }
        assert_eq!(device.read(0, 1), 0xff);
    }

    #[test]
    fn other_cells_are_storage_and_the_nmi_bit_is_no_part_of_the_index() {
        let mut device = now();
        set(&mut device, 0x40, 0x5a);
        assert_eq!(get(&mut device, 0xc0), 0x5a);
        assert_eq!(get(&mut device, 0x7f), 0);
    }

    #[test]
    fn the_clock_never_leaves_its_calendar() {
        let mut device = at(Duration::MAX);
        assert_eq!(time(&mut device), [0x99, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]);
        device.offset = FIRST_SECOND - LAST_SECOND;
        assert_eq!(time(&mut device), [0x00, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]);
        device.offset = LAST_SECOND;
        assert_eq!(time(&mut device), [0x99, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]);
    }

    #[test]
    fn the_cells_tell_the_size_of_ram() {
        let cells = |memory: &[Span]| {
            let mut device = Cmos::new(Box::new(StoppedClock::default()), memory);
            let mut word = |low, high| u16::from_le_bytes([get(&mut device, low), get(&mut device, high)]);
            let words = (word(0x15, 0x16), word(0x17, 0x18), word(0x30, 0x31), word(0x34, 0x35));
            (words, [0x5b, 0x5c, 0x5d].map(|index| get(&mut device, index)))
        };
        let low = |size| Span { start: 0, size };
        assert_eq!(cells(&[]), ((0, 0, 0, 0), [0; 3]));
        assert_eq!(cells(&[low(64 * KIB)]), ((64, 0, 0, 0), [0; 3]));
        assert_eq!(cells(&[low(8 * MIB)]), ((640, 7 * 1024, 7 * 1024, 0), [0; 3]));
        assert_eq!(cells(&[low(512 * MIB)]), ((640, 0xffff, 0xffff, 0x1f00), [0; 3]));
        let high = Span { start: 4 * GIB, size: 5 * GIB };
        assert_eq!(cells(&[low(3 * GIB), high]), ((640, 0xffff, 0xffff, 0xbf00), [0x00, 0x40, 0x01]));
        assert_eq!(cells(&[Span { start: 0x1000, size: 64 * KIB }]), ((0, 0, 0, 0), [0; 3]));
        assert_eq!(cells(&[Span { start: 0, size: u64::MAX }]).1, [0xff; 3]);
    }

    #[test]
    fn a_state_out_of_range_is_refused() {
        for (field, value) in [
            ("index", serde_json::json!(0x80)),
            ("a", serde_json::json!(0xa6)),
            ("offset", serde_json::json!(i64::MAX)),
            ("offset", serde_json::json!(i64::MIN)),
            ("cells", vec![0; 127].into()),
        ] {
            let mut saved = now().save();
            saved.state[field] = value;
            assert!(now().load(&saved).is_err(), "{field}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_seven_bytes_are_a_time_or_dropped(b in 0u8..8, cells: [u8; 7]) {
            let mut device = now();
            set(&mut device, B, b);
            let before = time(&mut device);
            set_all(&mut device, b, cells);
            let after = time(&mut device);
            proptest::prop_assert!(after == cells || after == before, "{before:x?} {cells:x?} {after:x?}");
        }
    }
}
