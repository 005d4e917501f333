//! The serial port of Arm machines: a PrimeCell UART PL011, revision r1p5 with its FIFOs of 32 bytes, as ARM DDI 0183G
//! describes it, without a baud rate. Parity, word length, flow control and DMA can be set and mean nothing.
//!
//! **Output** leaves at once, so the transmitter is always empty and never busy, whatever CR says: UARTEN is off after
//! reset, and the shortest of guests do nothing but write to DR (QEMU lets them, too).
//! **Input** is taken from the console only when the guest looks (it reads FR, DR or RIS, or has a receive interrupt
//! on), and never more of it than makes an interrupt. What the guest has not looked at waits in the console, which
//! pushes back on its sender. Drivers begin by clearing the receive interrupts and reading DR until FR says "empty"
//! (Linux, `pl011_enable_interrupts`), to be rid of noise; that would eat what a pipe sent ahead. So after ICR has
//! cleared a receive interrupt while both were masked, FR says "empty" once (`Silence`). On the chip, too, the next
//! character takes its time.
//! **Carrier** (FR bit DCD) is lost once the far end has hung up and the guest has read all that it sent: end of input.
//! CTS and DSR are always there.
//!
//! The interrupt is UARTINTR, a level (§2.8): high while an interrupt is pending and enabled. There is no character
//! clock, so the receive time-out (RT), 32 bit times on the chip, is over at once: RT is pending while there is
//! anything to read, and RX while there is as much as IFLS says. For the same reason ICR takes neither away; they go
//! with the data, so a guest that clears interrupts after it has read one byte of several still hears of the others.
//! A guest that has RX on and RT off would never hear of fewer bytes than the level; it gets RX from the first on, as
//! from QEMU. TX is made by a character that has left (§2.8, UARTTXINTR: by a transition, not by being empty) and
//! stays until it is cleared. No parity error, framing error or break ever arrives; only a full loop (CR's LBE)
//! overruns.
//!
//! Invariant: after every call `raised` is the level of the line and says whether an interrupt is pending and enabled.

use std::collections::VecDeque;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::{primecell, unwrap, wrap};
use crate::bus::{Device, Effect, Saved};
use crate::console::Console;
use crate::irq::IrqLine;

/// Of the saved state.
const VERSION: u32 = 1;

/// PeriphID0 to 3: part 0x011, designer 0x41 (Arm), revision 3 (r1p5), by which Linux knows that the FIFOs hold 32.
pub const PERIPHERAL: [u8; 4] = [0x11, 0x10, 0x34, 0x00];
const FIFO_DEPTH: usize = 32;

// Offsets of the registers (§3.2).
const DR: u64 = 0x00;
const RSR: u64 = 0x04;
const FR: u64 = 0x18;
const ILPR: u64 = 0x20;
const IBRD: u64 = 0x24;
const FBRD: u64 = 0x28;
const LCR_H: u64 = 0x2c;
const CR: u64 = 0x30;
const IFLS: u64 = 0x34;
const IMSC: u64 = 0x38;
const RIS: u64 = 0x3c;
const MIS: u64 = 0x40;
const ICR: u64 = 0x44;
const DMACR: u64 = 0x48;

/// RSR: a character found the receiver full.
const RSR_OVERRUN: u16 = 1 << 3;

/// FR: modem inputs, and how full the FIFOs are.
const FR_CTS: u16 = 1;
const FR_DSR: u16 = 1 << 1;
const FR_DCD: u16 = 1 << 2;
const FR_RX_EMPTY: u16 = 1 << 4;
const FR_RX_FULL: u16 = 1 << 6;
const FR_TX_EMPTY: u16 = 1 << 7;
const FR_RI: u16 = 1 << 8;
const FR_INPUTS: u16 = FR_CTS | FR_DSR | FR_DCD | FR_RI;

const LCR_FIFOS: u8 = 1 << 4;

/// CR: loopback, receive enable, and the outputs that loopback turns into inputs.
const CR_LOOP: u16 = 1 << 7;
const CR_RECEIVE: u16 = 1 << 9;
const CR_DTR: u16 = 1 << 10;
const CR_RTS: u16 = 1 << 11;
const CR_OUT1: u16 = 1 << 12;
const CR_OUT2: u16 = 1 << 13;
const CR_ALL: u16 = 0xff87;

// What the other registers have room for.
const FBRD_ALL: u8 = 0x3f;
const IFLS_ALL: u8 = 0x3f;
const DMACR_ALL: u8 = 0x07;

/// Interrupts: the bits of IMSC, RIS, MIS and ICR.
const INT_RI: u16 = 1;
const INT_CTS: u16 = 1 << 1;
const INT_DCD: u16 = 1 << 2;
const INT_DSR: u16 = 1 << 3;
const INT_RX: u16 = 1 << 4;
const INT_TX: u16 = 1 << 5;
const INT_TIMEOUT: u16 = 1 << 6;
const INT_OVERRUN: u16 = 1 << 10;
const INT_ALL: u16 = 0x07ff;
/// What follows from the receiver holding data.
const INT_DATA: u16 = INT_RX | INT_TIMEOUT;
/// What happens, and stays until ICR clears it.
const INT_LATCHED: u16 = INT_RI | INT_CTS | INT_DCD | INT_DSR | INT_TX | INT_OVERRUN;

/// The modem inputs and the interrupts that tell of their changes.
const MODEM: [(u16, u16); 4] = [(FR_RI, INT_RI), (FR_CTS, INT_CTS), (FR_DCD, INT_DCD), (FR_DSR, INT_DSR)];

/// FR says once that there is nothing to read, to a driver that begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Silence {
    Possible,
    /// ICR has cleared a receive interrupt while both were masked.
    Due,
    /// Not again before a receive interrupt was enabled, or a guest that polls and clears each time would hear nothing.
    Over,
}

/// A PL011.
pub struct Pl011 {
    // Wires
    console: Box<dyn Console>,
    line: Box<dyn IrqLine>,
    /// The console may have input: it has not said otherwise since the host called or the guest read.
    waiting: bool,

    // State
    ilpr: u8,
    ibrd: u16,
    fbrd: u8,
    lcr: u8,
    cr: u16,
    ifls: u8,
    imsc: u16,
    dmacr: u8,
    overrun: bool,
    /// Of [`INT_LATCHED`].
    latched: u16,
    /// Modem inputs as last looked at.
    inputs: u16,
    silence: Silence,
    received: VecDeque<u8>,
    /// The line is high.
    raised: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    ilpr: u8,
    ibrd: u16,
    fbrd: u8,
    lcr: u8,
    cr: u16,
    ifls: u8,
    imsc: u16,
    dmacr: u8,
    overrun: bool,
    latched: u16,
    inputs: u16,
    silence: Silence,
    received: Vec<u8>,
}

impl State {
    /// After reset (§3.2, table "Register summary"): transmit and receive enabled, the UART not; half-full FIFOs.
    fn fresh() -> Self {
        Self {
            ilpr: 0,
            ibrd: 0,
            fbrd: 0,
            lcr: 0,
            cr: 0x0300,
            ifls: 0x12,
            imsc: 0,
            dmacr: 0,
            overrun: false,
            latched: 0,
            inputs: FR_CTS | FR_DSR | FR_DCD,
            silence: Silence::Possible,
            received: Vec::new(),
        }
    }

    /// No register holds a bit, and no FIFO a byte, that it has no room for.
    fn possible(&self) -> bool {
        self.fbrd & !FBRD_ALL == 0
            && self.cr & !CR_ALL == 0
            && self.ifls & !IFLS_ALL == 0
            && self.imsc & !INT_ALL == 0
            && self.dmacr & !DMACR_ALL == 0
            && self.latched & !INT_LATCHED == 0
            && self.inputs & !FR_INPUTS == 0
            && self.received.len() <= depth(self.lcr)
    }
}

/// How many received bytes there is room for: without FIFOs, one.
fn depth(lcr: u8) -> usize {
    if lcr & LCR_FIFOS == 0 { 1 } else { FIFO_DEPTH }
}

impl Pl011 {
    /// A serial port between `console` and the guest, with UARTINTR on `line`, which is low so far.
    pub fn new(console: Box<dyn Console>, line: Box<dyn IrqLine>) -> Self {
        let mut port = Self {
            console,
            line,
            waiting: true,
            ilpr: 0,
            ibrd: 0,
            fbrd: 0,
            lcr: 0,
            cr: 0,
            ifls: 0,
            imsc: 0,
            dmacr: 0,
            overrun: false,
            latched: 0,
            inputs: 0,
            silence: Silence::Possible,
            received: VecDeque::with_capacity(FIFO_DEPTH),
            raised: false,
        };
        port.take_over(State::fresh());
        port
    }

    fn take_over(&mut self, state: State) {
        #[rustfmt::skip]
        let State {
            ilpr, ibrd, fbrd, lcr, cr, ifls, imsc, dmacr, overrun, latched, inputs, silence, received,
        } = state;
        (self.ilpr, self.ibrd, self.fbrd, self.lcr, self.cr) = (ilpr, ibrd, fbrd, lcr, cr);
        (self.ifls, self.imsc, self.dmacr) = (ifls, imsc, dmacr);
        (self.overrun, self.latched, self.inputs, self.silence) = (overrun, latched, inputs, silence);
        self.received.clear();
        self.received.extend(received);
        self.waiting = true;
    }

    fn loopback(&self) -> bool {
        self.cr & CR_LOOP != 0
    }

    /// How many received bytes make an interrupt (§3.3.9: RXIFLSEL, in eighths of the FIFO).
    fn trigger(&self) -> usize {
        if self.lcr & LCR_FIFOS == 0 || self.imsc & INT_TIMEOUT == 0 {
            return 1;
        }
        match self.ifls >> 3 {
            0 => FIFO_DEPTH / 8,
            1 => FIFO_DEPTH / 4,
            2 => FIFO_DEPTH / 2,
            3 => FIFO_DEPTH / 4 * 3,
            // 5 and above are reserved.
            _ => FIFO_DEPTH / 8 * 7,
        }
    }

    /// RIS.
    fn pending(&self) -> u16 {
        let full = if self.received.len() >= self.trigger() { INT_RX } else { 0 };
        let some = if self.received.is_empty() { 0 } else { INT_TIMEOUT };
        self.latched | full | some
    }

    /// Moves the line to where the interrupts have it. Where it is there already it is left alone: that is a system
    /// call for each access otherwise.
    fn drive(&mut self) {
        let high = self.pending() & self.imsc != 0;
        if high != self.raised {
            self.line.set(high);
        }
        self.raised = high;
    }

    /// Takes input from the console up to the trigger level. In loopback the chip is not connected to its input.
    fn pull(&mut self) {
        while self.waiting && !self.loopback() && self.received.len() < self.trigger() {
            match self.console.get() {
                Some(byte) => self.received.push_back(byte),
                None => self.waiting = false,
            }
        }
    }

    /// Looks at the modem inputs.
    fn sense(&mut self) {
        let wired = |output, input| if self.cr & output != 0 { input } else { 0 };
        let now = if self.loopback() {
            wired(CR_RTS, FR_CTS) | wired(CR_DTR, FR_DSR) | wired(CR_OUT1, FR_DCD) | wired(CR_OUT2, FR_RI)
        } else {
            let lost = self.received.is_empty() && self.console.hung_up();
            FR_CTS | FR_DSR | if lost { 0 } else { FR_DCD }
        };
        let changed = now ^ self.inputs;
        for (input, interrupt) in MODEM {
            self.latched |= if changed & input != 0 { interrupt } else { 0 };
        }
        self.inputs = now;
    }

    /// What follows from an access that may have changed something.
    fn settle(&mut self) {
        if self.imsc & INT_DATA != 0 {
            self.pull();
        }
        self.sense();
        self.drive();
    }

    fn read_data(&mut self) -> u16 {
        self.pull();
        let byte = self.received.pop_front().unwrap_or(0);
        self.waiting = true;
        byte.into()
    }

    fn read_flags(&mut self) -> u16 {
        self.pull();
        self.sense();
        let silent = self.silence == Silence::Due;
        if silent {
            self.silence = Silence::Over;
        }
        let empty = silent || self.received.is_empty();
        let full = !empty && self.received.len() >= depth(self.lcr);
        let receiver = if empty { FR_RX_EMPTY } else { 0 } | if full { FR_RX_FULL } else { 0 };
        self.inputs | FR_TX_EMPTY | receiver
    }

    fn read_pending(&mut self) -> u16 {
        self.pull();
        self.sense();
        self.pending()
    }

    /// DR: out to the console, or round to the receiver; either way the character is gone at once.
    fn transmit(&mut self, byte: u8) -> Effect {
        let effect = if self.loopback() {
            self.receive(byte);
            Effect::None
        } else {
            self.console.put(byte)
        };
        self.latched |= INT_TX;
        self.drive();
        effect
    }

    /// A byte from the loop. Where there is no room the receiver keeps what it has (§3.3.2).
    fn receive(&mut self, byte: u8) {
        if self.cr & CR_RECEIVE == 0 {
            return;
        }
        if self.received.len() >= depth(self.lcr) {
            self.overrun = true;
            self.latched |= INT_OVERRUN;
            return;
        }
        self.received.push_back(byte);
    }

    fn write_line_control(&mut self, value: u8) {
        // Switching the FIFOs off empties them (§3.3.8, procedure for CR); on, the one byte received stays.
        if self.lcr & !value & LCR_FIFOS != 0 {
            self.received.clear();
        }
        self.lcr = value;
    }

    fn write_mask(&mut self, value: u16) {
        self.imsc = value & INT_ALL;
        if self.imsc & INT_DATA != 0 {
            self.silence = Silence::Possible;
        }
    }

    fn clear(&mut self, value: u16) {
        self.latched &= !value;
        if value & INT_DATA != 0 && self.imsc & INT_DATA == 0 && self.silence == Silence::Possible {
            self.silence = Silence::Due;
        }
    }
}

impl Device for Pl011 {
    fn name(&self) -> &'static str {
        "pl011"
    }

    fn register(&self, offset: u64, write: bool) -> &'static str {
        match (primecell::read_from(offset), write) {
            (DR, _) => "DR",
            (RSR, false) => "RSR",
            (RSR, true) => "ECR",
            (FR, _) => "FR",
            (ILPR, _) => "ILPR",
            (IBRD, _) => "IBRD",
            (FBRD, _) => "FBRD",
            (LCR_H, _) => "LCR_H",
            (CR, _) => "CR",
            (IFLS, _) => "IFLS",
            (IMSC, _) => "IMSC",
            (RIS, _) => "RIS",
            (MIS, _) => "MIS",
            (ICR, _) => "ICR",
            (DMACR, _) => "DMACR",
            _ => primecell::identity_name(offset),
        }
    }

    fn width(&self) -> usize {
        4
    }

    fn read(&mut self, offset: u64, _width: usize) -> u64 {
        let value = match primecell::read_from(offset) {
            DR => self.read_data().into(),
            RSR => u32::from(if self.overrun { RSR_OVERRUN } else { 0 }),
            FR => self.read_flags().into(),
            ILPR => self.ilpr.into(),
            IBRD => self.ibrd.into(),
            FBRD => self.fbrd.into(),
            LCR_H => self.lcr.into(),
            CR => self.cr.into(),
            IFLS => self.ifls.into(),
            IMSC => self.imsc.into(),
            RIS => self.read_pending().into(),
            MIS => u32::from(self.read_pending() & self.imsc),
            DMACR => self.dmacr.into(),
            // ICR can only be written; it reads as what is not there, 0.
            register => primecell::identity(PERIPHERAL, register),
        };
        self.settle();
        primecell::lanes(offset, value)
    }

    fn write(&mut self, offset: u64, _width: usize, value: u64) -> Effect {
        let [byte, high, ..] = value.to_le_bytes();
        let half = u16::from_le_bytes([byte, high]);
        let Some(register) = primecell::written_to(offset) else { return Effect::None };
        match register {
            DR => return self.transmit(byte),
            RSR => self.overrun = false,
            ILPR => self.ilpr = byte,
            IBRD => self.ibrd = half,
            FBRD => self.fbrd = byte & FBRD_ALL,
            LCR_H => self.write_line_control(byte),
            CR => self.cr = half & CR_ALL,
            IFLS => self.ifls = byte & IFLS_ALL,
            IMSC => self.write_mask(half),
            ICR => self.clear(half),
            DMACR => self.dmacr = byte & DMACR_ALL,
            _ => {}
        }
        self.settle();
        Effect::None
    }

    fn reset(&mut self) {
        self.take_over(State::fresh());
        self.drive();
    }

    fn service(&mut self) {
        self.waiting = true;
        self.settle();
    }

    fn save(&self) -> Saved {
        #[rustfmt::skip]
        let Self {
            console: _, line: _, waiting: _,
            ilpr, ibrd, fbrd, lcr, cr, ifls, imsc, dmacr, overrun, latched, inputs, silence, received,
            raised: _,
        } = self;
        wrap(
            VERSION,
            &State {
                ilpr: *ilpr,
                ibrd: *ibrd,
                fbrd: *fbrd,
                lcr: *lcr,
                cr: *cr,
                ifls: *ifls,
                imsc: *imsc,
                dmacr: *dmacr,
                overrun: *overrun,
                latched: *latched,
                inputs: *inputs,
                silence: *silence,
                received: received.iter().copied().collect(),
            },
        )
    }

    fn load(&mut self, saved: &Saved) -> Result<()> {
        let state: State = unwrap(self.name(), VERSION, saved)?;
        if !state.possible() {
            bail!("{}: its saved registers hold values that they have no room for", self.name());
        }
        self.take_over(state);
        // Said in any case: what the interrupt controller has kept or been given of the line is not known here.
        self.raised = self.pending() & self.imsc != 0;
        self.line.set(self.raised);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::{Builder, Space};
    use crate::console::TestConsole;
    use crate::memory::Span;
    use proptest::prelude::*;
    use std::sync::{Arc, Mutex};

    /// A line that remembers every level it was set to.
    #[derive(Default)]
    struct Levels(Mutex<Vec<bool>>);

    impl IrqLine for Levels {
        fn pulse(&self) {
            panic!("the line is a level");
        }
        fn set(&self, high: bool) {
            self.0.lock().unwrap().push(high);
        }
    }

    impl Levels {
        fn level(&self) -> bool {
            self.0.lock().unwrap().last().copied().unwrap_or(false)
        }
        fn calls(&self) -> usize {
            self.0.lock().unwrap().len()
        }
    }

    /// A port, its far end and its line.
    struct Rig {
        port: Pl011,
        far: TestConsole,
        line: Arc<Levels>,
    }

    impl Rig {
        fn new() -> Self {
            Self::with(TestConsole::default())
        }

        fn with(far: TestConsole) -> Self {
            let line = Arc::new(Levels::default());
            Self { port: Pl011::new(Box::new(far.clone()), Box::new(line.clone())), far, line }
        }

        fn get(&mut self, register: u64) -> u16 {
            u16::try_from(self.port.read(register, 4)).unwrap()
        }

        fn set(&mut self, register: u64, value: u16) {
            assert_eq!(self.port.write(register, 4, value.into()), Effect::None);
        }

        /// The far end sends.
        fn send(&mut self, bytes: &[u8]) {
            self.far.input.lock().unwrap().extend(bytes);
            self.port.service();
        }

        fn unread(&self) -> usize {
            self.far.input.lock().unwrap().len()
        }

        fn written(&self) -> Vec<u8> {
            self.far.output.lock().unwrap().clone()
        }

        /// Everything that is to be read, as a polling guest reads it.
        fn drain(&mut self) -> Vec<u8> {
            let mut bytes = Vec::new();
            while self.get(FR) & FR_RX_EMPTY == 0 {
                bytes.push(u8::try_from(self.get(DR)).unwrap());
            }
            bytes
        }
    }

    #[test]
    fn after_reset_the_registers_are_those_of_the_manual() {
        let mut rig = Rig::new();
        let values = [RSR, FR, ILPR, IBRD, FBRD, LCR_H, CR, IFLS, IMSC, RIS, MIS, ICR, DMACR].map(|r| rig.get(r));
        assert_eq!(values, [0, 0x97, 0, 0, 0, 0, 0x300, 0x12, 0, 0, 0, 0, 0]);
        let numbers: Vec<_> = (0xfe0..0x1000).step_by(4).map(|register| rig.get(register)).collect();
        assert_eq!(numbers, [0x11, 0x10, 0x34, 0x00, 0x0d, 0xf0, 0x05, 0xb1]);
        assert_eq!(rig.line.calls(), 0);
    }

    #[test]
    fn a_guest_that_only_writes_to_dr_is_heard_in_every_width() {
        let rig = Rig::new();
        let far = rig.far.clone();
        let mut builder = Builder::default();
        let id = builder.place(Space::Mmio, Span { start: 0x900_0000, size: primecell::SIZE }, rig.port).unwrap();
        let buses = builder.finish();
        for (width, data) in [(1, &b"H"[..]), (2, b"e\0"), (4, b"l\0\0\0"), (8, b"l\0\0\0\xff\0\0\0"), (1, b"o")] {
            assert_eq!(buses.write(Space::Mmio, 0x900_0000, width, data), Effect::None);
        }
        assert_eq!(buses.write(Space::Mmio, 0x900_0001, 1, b"!"), Effect::None);
        assert_eq!(*far.output.lock().unwrap(), b"Hello");
        let mut flags = [0; 1];
        buses.read(Space::Mmio, 0x900_0018, 1, &mut flags);
        assert_eq!(flags, [0x97]);
        far.input.lock().unwrap().push_back(b'x');
        assert!(buses.service(id));
        let mut data = [0xff; 4];
        buses.read(Space::Mmio, 0x900_0000, 4, &mut data);
        assert_eq!(data, *b"x\0\0\0");
    }

    #[test]
    fn the_consoles_wish_reaches_the_machine() {
        struct Wish;
        impl Console for Wish {
            fn put(&mut self, byte: u8) -> Effect {
                if byte == b'!' { Effect::Until } else { Effect::None }
            }
            fn get(&mut self) -> Option<u8> {
                None
            }
            fn hung_up(&self) -> bool {
                false
            }
        }
        let mut port = Pl011::new(Box::new(Wish), Box::new(Levels::default()));
        assert_eq!(port.write(DR, 1, 0x61), Effect::None);
        assert_eq!(port.write(DR, 4, 0x21), Effect::Until);
    }

    #[test]
    fn a_polling_guest_reads_every_byte_in_order() {
        let text: Vec<u8> = (0..200).collect();
        for (lcr, imsc) in [(0x60, 0), (0x70, 0), (0x70, INT_RX), (0x70, INT_DATA), (0x60, INT_DATA)] {
            let mut rig = Rig::new();
            rig.set(LCR_H, lcr);
            rig.set(IMSC, imsc);
            rig.send(&text);
            assert_eq!(rig.drain(), text, "LCR_H {lcr:#x}, IMSC {imsc:#x}");
            rig.send(b"more");
            assert_eq!(rig.drain(), b"more");
        }
    }

    #[test]
    fn a_guest_that_reads_one_byte_per_interrupt_gets_them_all() {
        let text: Vec<u8> = (0..100).collect();
        for (lcr, imsc) in [(0x60, INT_RX), (0x70, INT_RX), (0x70, INT_TIMEOUT), (0x70, INT_DATA)] {
            // Whether it clears the interrupt before it reads, after, or never.
            for clear in 0..3 {
                let mut rig = Rig::new();
                rig.set(LCR_H, lcr);
                rig.set(IMSC, imsc);
                rig.send(&text);
                let mut bytes = Vec::new();
                while rig.line.level() {
                    if clear == 1 {
                        rig.set(ICR, INT_ALL);
                    }
                    bytes.push(u8::try_from(rig.get(DR)).unwrap());
                    if clear == 2 {
                        rig.set(ICR, INT_ALL);
                    }
                }
                assert_eq!(bytes, text, "LCR_H {lcr:#x}, IMSC {imsc:#x}, way {clear}");
                assert_eq!(rig.line.calls(), 2, "the line rose and fell once");
            }
        }
    }

    #[test]
    fn the_console_is_read_only_when_the_guest_looks() {
        let mut rig = Rig::new();
        rig.send(b"abc");
        rig.set(DR, u16::from(b'x'));
        for register in [RSR, ILPR, IBRD, FBRD, LCR_H, CR, IFLS, IMSC, ICR, DMACR, 0xfe0] {
            rig.get(register);
        }
        assert_eq!(rig.unread(), 3);
        rig.get(FR);
        rig.get(FR);
        rig.get(RIS);
        assert_eq!(rig.unread(), 2);
        assert_eq!(rig.get(DR), u16::from(b'a'));
        assert_eq!(rig.unread(), 2);
    }

    #[test]
    fn no_more_is_taken_than_the_trigger_level() {
        for (ifls, level) in [(0x02, 4), (0x0a, 8), (0x12, 16), (0x1a, 24), (0x22, 28), (0x3f, 28)] {
            let mut rig = Rig::new();
            rig.set(LCR_H, 0x70);
            rig.set(IFLS, ifls);
            rig.set(IMSC, INT_DATA);
            rig.send(&vec![0; level - 1]);
            assert_eq!(rig.get(RIS), INT_TIMEOUT, "IFLS {ifls:#x}");
            rig.send(&[0; 50]);
            assert_eq!(rig.get(RIS), INT_DATA);
            assert_eq!(level + 49 - rig.unread(), level);
            rig.set(LCR_H, 0x60);
            assert_eq!(level + 49 - rig.unread(), level + 1, "without FIFOs there is room for one");
            assert_eq!(rig.get(FR) & (FR_RX_EMPTY | FR_RX_FULL), FR_RX_FULL);
        }
    }

    #[test]
    fn a_guest_without_the_time_out_hears_of_the_first_byte() {
        let mut rig = Rig::new();
        rig.set(LCR_H, 0x70);
        rig.set(IMSC, INT_RX);
        rig.send(b"a");
        assert!(rig.line.level());
        assert_eq!(rig.get(MIS), INT_RX);
    }

    #[test]
    fn input_that_came_before_linux_survives_its_start() {
        let mut rig = Rig::new();
        rig.send(b"ls\n");
        // What the early console and the console write: they look at FR before each character.
        rig.get(FR);
        rig.set(DR, u16::from(b'x'));
        // pl011_set_termios, pl011_hwinit, pl011_startup, pl011_enable_interrupts.
        rig.set(LCR_H, 0x70);
        rig.set(ICR, 0x7d0);
        let masked = rig.get(IMSC);
        rig.set(IMSC, INT_DATA);
        rig.set(IMSC, masked);
        rig.set(IFLS, 0x12);
        rig.set(CR, 0x301);
        rig.get(FR);
        rig.set(ICR, INT_DATA);
        assert_eq!(rig.drain(), b"", "this is what the driver throws away");
        rig.set(IMSC, INT_DATA);
        assert!(rig.line.level());
        assert_eq!(rig.drain(), b"ls\n");
        assert!(!rig.line.level());
    }

    #[test]
    fn a_guest_that_polls_and_clears_each_time_reads_on() {
        let mut rig = Rig::new();
        rig.send(b"abc");
        let mut bytes = Vec::new();
        for _ in 0..8 {
            rig.set(ICR, INT_ALL);
            if rig.get(FR) & FR_RX_EMPTY == 0 {
                bytes.push(rig.get(DR));
            }
        }
        assert_eq!(bytes, b"abc".map(u16::from));
    }

    #[test]
    fn a_character_sent_makes_a_transmit_interrupt_until_it_is_cleared() {
        let mut rig = Rig::new();
        rig.set(IMSC, INT_TX);
        assert!(!rig.line.level(), "being empty makes none");
        rig.set(DR, u16::from(b'x'));
        assert!(rig.line.level());
        assert_eq!((rig.get(RIS), rig.get(MIS)), (INT_TX, INT_TX));
        rig.set(ICR, INT_TX);
        assert!(!rig.line.level());
        // As Linux does: it writes first, and enables the interrupt where more is to be sent.
        rig.set(IMSC, 0);
        rig.set(DR, u16::from(b'y'));
        assert_eq!((rig.line.level(), rig.get(MIS)), (false, 0));
        rig.set(IMSC, INT_TX);
        assert!(rig.line.level());
        assert_eq!(rig.line.calls(), 3);
    }

    #[test]
    fn the_line_is_not_touched_while_its_level_stays() {
        let mut rig = Rig::new();
        for _ in 0..100 {
            rig.set(DR, u16::from(b'x'));
            rig.get(FR);
        }
        assert_eq!(rig.line.calls(), 0);
        rig.set(IMSC, INT_TX);
        for _ in 0..100 {
            rig.set(DR, u16::from(b'x'));
            rig.get(FR);
        }
        assert_eq!(rig.line.calls(), 1);
    }

    #[test]
    fn registers_hold_what_they_have_room_for() {
        let mut rig = Rig::new();
        let kept = [
            (ILPR, 0xff),
            (IBRD, 0xffff),
            (FBRD, 0x3f),
            (LCR_H, 0xff),
            (CR, 0xff87),
            (IFLS, 0x3f),
            (IMSC, 0x7ff),
            (DMACR, 7),
        ];
        for (register, kept) in kept {
            rig.set(register, 0xffff);
            assert_eq!(rig.get(register), kept, "{register:#x}");
            rig.set(register, 0);
            assert_eq!(rig.get(register), 0, "{register:#x}");
        }
    }

    #[test]
    fn in_loopback_nothing_leaves_and_the_modem_outputs_are_its_inputs() {
        let mut rig = Rig::new();
        rig.send(b"later");
        rig.set(CR, CR_LOOP | CR_RECEIVE);
        assert_eq!(rig.get(FR) & FR_INPUTS, 0);
        assert_eq!(rig.get(RIS), INT_CTS | INT_DSR | INT_DCD, "all inputs fell");
        for (output, input, interrupt) in
            [(CR_RTS, FR_CTS, INT_CTS), (CR_DTR, FR_DSR, INT_DSR), (CR_OUT1, FR_DCD, INT_DCD), (CR_OUT2, FR_RI, INT_RI)]
        {
            for (cr, inputs) in [(output, input), (0, 0)] {
                rig.set(ICR, INT_ALL);
                rig.set(CR, CR_LOOP | CR_RECEIVE | cr);
                assert_eq!((rig.get(FR) & FR_INPUTS, rig.get(RIS)), (inputs, interrupt));
            }
        }
        rig.set(DR, 0xae);
        assert_eq!(rig.drain(), [0xae]);
        // A receiver that is off hears nothing of it (old Linux provokes its first interrupt so).
        rig.set(CR, CR_LOOP);
        rig.set(DR, 0xae);
        assert_eq!(rig.drain(), b"");
        rig.set(CR, 0x300);
        assert_eq!(rig.drain(), b"later");
        assert!(rig.written().is_empty());
    }

    #[test]
    fn a_full_loop_overruns_and_keeps_what_it_has() {
        for (lcr, room) in [(0x70, 32), (0x60, 1)] {
            let mut rig = Rig::new();
            rig.set(LCR_H, lcr);
            rig.set(CR, CR_LOOP | CR_RECEIVE | CR_RTS);
            rig.set(IMSC, INT_OVERRUN);
            for byte in 0..room {
                rig.set(DR, byte);
            }
            assert_eq!((rig.get(RSR), rig.line.level(), rig.get(FR) & FR_RX_FULL), (0, false, FR_RX_FULL));
            rig.set(DR, 0xff);
            assert_eq!((rig.get(RSR), rig.line.level()), (RSR_OVERRUN, true));
            rig.set(ICR, INT_OVERRUN);
            assert_eq!((rig.get(RSR), rig.line.level()), (RSR_OVERRUN, false));
            rig.set(RSR, 0);
            assert_eq!(rig.get(RSR), 0);
            assert_eq!(rig.drain(), (0..u8::try_from(room).unwrap()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn switching_the_fifos_off_empties_them_and_on_keeps_what_is_there() {
        let mut rig = Rig::new();
        rig.set(CR, CR_LOOP | CR_RECEIVE);
        rig.set(DR, 1);
        rig.set(LCR_H, 0x70);
        rig.set(DR, 2);
        assert_eq!(rig.drain(), [1, 2]);
        rig.set(DR, 3);
        rig.set(LCR_H, 0x60);
        assert_eq!(rig.drain(), b"");
    }

    #[test]
    fn the_carrier_is_lost_when_all_that_was_sent_is_read() {
        let mut rig = Rig::with(TestConsole { closed: true, ..TestConsole::default() });
        rig.set(IMSC, INT_DCD);
        rig.send(b"ab");
        assert_eq!(rig.get(FR) & FR_DCD, FR_DCD);
        assert_eq!(rig.get(DR), u16::from(b'a'));
        assert_eq!(rig.get(FR) & FR_DCD, FR_DCD, "the receiver still holds some");
        assert_eq!(rig.unread(), 0);
        assert_eq!(rig.drain(), b"b");
        assert_eq!((rig.get(MIS), rig.line.level()), (INT_DCD, true));
        rig.set(ICR, INT_DCD);
        assert_eq!((rig.get(MIS), rig.line.level()), (0, false));
        assert_eq!(rig.get(FR) & FR_INPUTS, FR_CTS | FR_DSR);
    }

    #[test]
    fn every_byte_is_saved_and_the_line_is_high_again() {
        let mut rig = Rig::new();
        rig.set(LCR_H, 0x70);
        rig.set(IMSC, INT_DATA);
        rig.send(b"0123456789abcdefgh");
        let saved = rig.port.save();
        let mut other = Rig::new();
        other.port.load(&saved).unwrap();
        assert!(other.line.level());
        assert_eq!(other.drain(), b"0123456789abcdef");
        assert!(!other.line.level());
        assert_eq!(rig.unread(), 2);
        // Where the line is high already the controller may yet have been told otherwise; where it is high and shall
        // not be, it falls.
        let calls = rig.line.calls();
        rig.port.load(&saved).unwrap();
        assert_eq!((rig.line.level(), rig.line.calls()), (true, calls + 1));
        rig.port.load(&Rig::new().port.save()).unwrap();
        assert!(!rig.line.level());
    }

    #[test]
    fn reset_lowers_the_line() {
        let mut rig = Rig::new();
        rig.set(IMSC, INT_TX);
        rig.set(DR, u16::from(b'x'));
        rig.port.reset();
        assert_eq!((rig.line.level(), rig.line.calls()), (false, 2));
    }

    #[test]
    fn a_state_that_no_chip_can_be_in_is_refused() {
        for (field, value) in [
            ("fbrd", serde_json::json!(0x40)),
            ("cr", serde_json::json!(0x08)),
            ("ifls", serde_json::json!(0x40)),
            ("imsc", serde_json::json!(0x800)),
            ("dmacr", serde_json::json!(8)),
            ("latched", serde_json::json!(INT_RX)),
            ("inputs", serde_json::json!(FR_TX_EMPTY)),
            ("silence", serde_json::json!("golden")),
            ("received", serde_json::json!([1, 2])),
            ("received", serde_json::json!([256])),
        ] {
            let mut saved = Rig::new().port.save();
            saved.state[field] = value;
            assert!(Rig::new().port.load(&saved).is_err(), "{field}");
        }
        let mut saved = Rig::new().port.save();
        saved.state["lcr"] = 0x10.into();
        for (bytes, taken) in [(32, true), (33, false)] {
            saved.state["received"] = vec![0; bytes].into();
            assert_eq!(Rig::new().port.load(&saved).is_ok(), taken, "{bytes} bytes");
        }
    }

    proptest! {
        #[test]
        fn the_line_is_always_where_mis_has_it_and_never_set_twice(
            steps in proptest::collection::vec((0..0x13u64, any::<u16>(), 0..4u8), 0..100)
        ) {
            let mut rig = Rig::new();
            for (register, value, what) in steps {
                match what {
                    0 => rig.send(&value.to_le_bytes()),
                    1 => drop(rig.get(register * 4)),
                    _ => rig.set(register * 4, value),
                }
                let level = rig.line.level();
                prop_assert_eq!(rig.port.pending() & rig.port.imsc != 0, level);
                prop_assert!(rig.port.received.len() <= depth(rig.port.lcr));
                prop_assert_eq!(rig.get(MIS) != 0, level || rig.line.level());
            }
            let levels = rig.line.0.lock().unwrap().clone();
            prop_assert!(levels.first() != Some(&false) && levels.windows(2).all(|pair| pair[0] != pair[1]));
        }
    }
}
