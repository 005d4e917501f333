//! The serial port: a 16550A, as the National Semiconductor PC16550D data sheet describes it, without a baud rate.
//!
//! **Output** leaves at once, so the transmitter is always empty. **Input** is taken from the console only when the
//! guest looks (it reads LSR or RBR, or has the receive interrupt on), so that the FIFO resets and loopback tests with
//! which drivers begin lose nothing, and never more of it than the FIFO's trigger level, so that every RBR read that
//! leaves something to read lowers the interrupt and raises it again: a guest that takes one byte per interrupt gets
//! them all. What the guest has not looked at waits in the console, which pushes back on its sender.
//! **Carrier** (MSR bit DCD) is lost once the far end has hung up and the guest has read all that it sent: end of input.
//!
//! The interrupt is the chip's INTR pin; the line is pulsed when it rises. (The PC gates it with MCR's OUT2; hobby
//! kernels forget that, QEMU does without the gate, and so does this.) There is no character clock: the receive
//! time-out, four character times on the chip, is over at once. No parity, framing or break ever arrives.
//!
//! Not `vm_superio::Serial`: it ORs interrupt causes together, so "data and transmitter empty" reads as 0b110, the line
//! status interrupt; reading IIR forgets received data that is still in the FIFO; FCR is ignored, loopback included;
//! MSR cannot change. Its IIR is private, so a wrapper would keep a second copy of nearly every register.
//!
//! Invariant: after every call `raised` says whether a cause is pending and enabled.

use std::collections::VecDeque;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::{unwrap, wrap};
use crate::bus::{Device, Effect, Saved};
use crate::console::Console;
use crate::irq::IrqLine;

/// Of the saved state.
const VERSION: u32 = 1;

/// The offset of the line control register: to write it changes what others mean, and nothing else.
pub const LINE_CONTROL: u64 = 3;

const FIFO_DEPTH: usize = 16;

/// IER: received data, transmitter empty, line status, modem status.
const IER_RX: u8 = 1;
const IER_TX: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;
const IER_ALL: u8 = 0x0f;

/// IIR: what is pending, by priority (data sheet, table "Interrupt Control Functions").
const IIR_LINE: u8 = 0b0110;
const IIR_RX: u8 = 0b0100;
const IIR_TIMEOUT: u8 = 0b1100;
const IIR_TX: u8 = 0b0010;
const IIR_MODEM: u8 = 0b0000;
const IIR_NONE: u8 = 0b0001;
const IIR_FIFOS: u8 = 0xc0;

const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_RX: u8 = 1 << 1;
const FCR_TRIGGER: u8 = 0xc0;

const LCR_DLAB: u8 = 1 << 7;

/// MCR: the four outputs that loopback turns into inputs, and loopback.
const MCR_DTR: u8 = 1;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;
const MCR_ALL: u8 = 0x1f;

const LSR_READY: u8 = 1;
const LSR_OVERRUN: u8 = 1 << 1;
/// The holding and the shift register are empty.
const LSR_SENT: u8 = 0x60;

/// MSR: inputs, and how they changed since the last read (the same bits, four lower).
const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;

/// A 16550A.
pub struct Serial {
    // Wires
    console: Box<dyn Console>,
    line: Box<dyn IrqLine>,
    /// The console may have input: it has not said otherwise since the host called or the guest read.
    waiting: bool,

    // State
    divisor: u16,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    overrun: bool,
    /// The transmitter-empty interrupt has not been seen yet.
    sent: bool,
    /// Modem inputs as last looked at (high half of MSR).
    inputs: u8,
    /// Changes of them not read yet (low half of MSR).
    changes: u8,
    received: VecDeque<u8>,
    /// The INTR pin.
    raised: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    divisor: u16,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    overrun: bool,
    sent: bool,
    inputs: u8,
    changes: u8,
    received: Vec<u8>,
}

impl State {
    /// After a master reset; the data sheet leaves SCR and the divisor open, so these are 0 and 9600 baud.
    fn fresh() -> Self {
        Self {
            divisor: 12,
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            scr: 0,
            overrun: false,
            sent: false,
            inputs: MSR_CTS | MSR_DSR | MSR_DCD,
            changes: 0,
            received: Vec::new(),
        }
    }

    /// No register holds a bit, and no FIFO a byte, that it has no room for.
    fn possible(&self) -> bool {
        self.ier & !IER_ALL == 0
            && self.fcr & !(FCR_ENABLE | FCR_TRIGGER) == 0
            && (self.fcr & FCR_ENABLE != 0 || self.fcr == 0)
            && self.mcr & !MCR_ALL == 0
            && self.inputs & 0x0f == 0
            && self.changes & 0xf0 == 0
            && self.received.len() <= depth(self.fcr)
    }
}

/// How many received bytes there is room for: without FIFOs, one.
fn depth(fcr: u8) -> usize {
    if fcr & FCR_ENABLE == 0 { 1 } else { FIFO_DEPTH }
}

impl Serial {
    /// A serial port between `console` and the guest, with its interrupt on `line`.
    pub fn new(console: Box<dyn Console>, line: Box<dyn IrqLine>) -> Self {
        let mut port = Self {
            console,
            line,
            waiting: true,
            divisor: 0,
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            scr: 0,
            overrun: false,
            sent: false,
            inputs: 0,
            changes: 0,
            received: VecDeque::with_capacity(FIFO_DEPTH),
            raised: false,
        };
        port.take_over(State::fresh());
        port
    }

    fn take_over(&mut self, state: State) {
        let State { divisor, ier, fcr, lcr, mcr, scr, overrun, sent, inputs, changes, received } = state;
        (self.divisor, self.ier, self.fcr, self.lcr, self.mcr, self.scr) = (divisor, ier, fcr, lcr, mcr, scr);
        (self.overrun, self.sent, self.inputs, self.changes) = (overrun, sent, inputs, changes);
        self.received.clear();
        self.received.extend(received);
        self.waiting = true;
        // An interrupt that was on its way is raised again: one too many does no harm, one too few hangs a guest.
        self.raised = false;
        self.raise();
    }

    fn latch(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }

    fn loopback(&self) -> bool {
        self.mcr & MCR_LOOP != 0
    }

    /// How many received bytes make an interrupt.
    fn trigger(&self) -> usize {
        match self.fcr & (FCR_TRIGGER | FCR_ENABLE) {
            0x41 => 4,
            0x81 => 8,
            0xc1 => 14,
            _ => 1,
        }
    }

    /// The most urgent cause that is pending, of those `enabled`.
    fn cause(&self, enabled: u8) -> u8 {
        let on = |bit| enabled & bit != 0;
        if on(IER_LINE) && self.overrun {
            IIR_LINE
        } else if on(IER_RX) && self.received.len() >= self.trigger() {
            IIR_RX
        } else if on(IER_RX) && !self.received.is_empty() {
            IIR_TIMEOUT
        } else if on(IER_TX) && self.sent {
            IIR_TX
        } else if on(IER_MODEM) && self.changes != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    /// A cause went away, if only for a moment: INTR falls unless another holds it up.
    fn lower(&mut self, bit: u8) {
        self.raised &= self.cause(self.ier & !bit) != IIR_NONE;
    }

    /// Moves INTR to where the causes have it.
    fn raise(&mut self) {
        let high = self.cause(self.ier) != IIR_NONE;
        if high && !self.raised {
            self.line.pulse();
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

    /// Looks at the modem inputs; RI counts only when it goes away (data sheet: TERI).
    fn sense(&mut self) {
        let wired = |output, input| if self.mcr & output != 0 { input } else { 0 };
        let now = if self.loopback() {
            wired(MCR_RTS, MSR_CTS) | wired(MCR_DTR, MSR_DSR) | wired(MCR_OUT1, MSR_RI) | wired(MCR_OUT2, MSR_DCD)
        } else {
            let lost = self.received.is_empty() && self.console.hung_up();
            MSR_CTS | MSR_DSR | if lost { 0 } else { MSR_DCD }
        };
        let changed = (now ^ self.inputs) & !(now & MSR_RI);
        self.changes |= changed >> 4;
        self.inputs = now;
    }

    /// What follows from an access that may have changed something.
    fn settle(&mut self) {
        if self.ier & IER_RX != 0 {
            self.pull();
        }
        self.sense();
        self.raise();
    }

    fn read_received(&mut self) -> u8 {
        let byte = self.received.pop_front().unwrap_or(0);
        if self.received.len() < self.trigger() {
            self.lower(IER_RX);
        }
        self.waiting = true;
        self.pull();
        byte
    }

    fn read_cause(&mut self) -> u8 {
        let cause = self.cause(self.ier);
        if cause == IIR_TX {
            self.sent = false;
        }
        cause | if self.fcr & FCR_ENABLE == 0 { 0 } else { IIR_FIFOS }
    }

    fn read_line_status(&mut self) -> u8 {
        self.pull();
        let ready = if self.received.is_empty() { 0 } else { LSR_READY };
        let overrun = if std::mem::take(&mut self.overrun) { LSR_OVERRUN } else { 0 };
        LSR_SENT | ready | overrun
    }

    fn read_modem_status(&mut self) -> u8 {
        self.sense();
        self.inputs | std::mem::take(&mut self.changes)
    }

    /// THR: out to the console, or round to the receiver.
    fn transmit(&mut self, byte: u8) -> Effect {
        let effect = if self.loopback() {
            self.receive(byte);
            Effect::None
        } else {
            self.console.put(byte)
        };
        // The write takes the interrupt back; the byte is gone at once, which makes the next one.
        self.sent = true;
        if self.ier != 0 {
            self.lower(IER_TX);
            self.raise();
        }
        effect
    }

    /// A byte from the loop. Where there is no room the FIFO keeps what it has, a single register the newest.
    fn receive(&mut self, byte: u8) {
        if self.received.len() >= depth(self.fcr) {
            self.overrun = true;
            if self.fcr & FCR_ENABLE != 0 {
                return;
            }
            self.received.clear();
        }
        self.received.push_back(byte);
    }

    fn write_fifo_control(&mut self, value: u8) {
        // Switching the FIFOs on or off empties them. The other bits count only together with the first.
        let on = value & FCR_ENABLE != 0;
        let switched = (value ^ self.fcr) & FCR_ENABLE != 0;
        if switched || (on && value & FCR_CLEAR_RX != 0) {
            self.received.clear();
        }
        self.fcr = if on { value & (FCR_ENABLE | FCR_TRIGGER) } else { 0 };
    }

    fn write_interrupt_enable(&mut self, value: u8) {
        // The transmitter is empty, so switching its interrupt on raises it.
        self.sent |= value & !self.ier & IER_TX != 0;
        self.ier = value & IER_ALL;
    }
}

impl Device for Serial {
    fn name(&self) -> &'static str {
        "serial"
    }

    fn register(&self, offset: u64, write: bool) -> &'static str {
        match (offset, write) {
            (0, _) if self.latch() => "DLL",
            (1, _) if self.latch() => "DLM",
            (0, true) => "THR",
            (0, false) => "RBR",
            (1, _) => "IER",
            (2, true) => "FCR",
            (2, false) => "IIR",
            (3, _) => "LCR",
            (4, _) => "MCR",
            (5, _) => "LSR",
            (6, _) => "MSR",
            (7, _) => "SCR",
            _ => "RESERVED",
        }
    }

    fn read(&mut self, offset: u64, _width: usize) -> u64 {
        let [low, high] = self.divisor.to_le_bytes();
        let value = match offset {
            0 if self.latch() => low,
            1 if self.latch() => high,
            0 => self.read_received(),
            1 => self.ier,
            2 => self.read_cause(),
            3 => self.lcr,
            4 => self.mcr,
            5 => self.read_line_status(),
            6 => self.read_modem_status(),
            7 => self.scr,
            _ => 0xff,
        };
        self.settle();
        value.into()
    }

    fn write(&mut self, offset: u64, _width: usize, value: u64) -> Effect {
        let [byte, ..] = value.to_le_bytes();
        let [low, high] = self.divisor.to_le_bytes();
        match offset {
            0 if self.latch() => self.divisor = u16::from_le_bytes([byte, high]),
            1 if self.latch() => self.divisor = u16::from_le_bytes([low, byte]),
            0 => return self.transmit(byte),
            1 => self.write_interrupt_enable(byte),
            2 => self.write_fifo_control(byte),
            3 => self.lcr = byte,
            4 => self.mcr = byte & MCR_ALL,
            7 => self.scr = byte,
            // LSR and MSR are for reading; writes to them are for the factory.
            _ => {}
        }
        self.settle();
        Effect::None
    }

    fn reset(&mut self) {
        self.take_over(State::fresh());
    }

    fn service(&mut self) {
        self.waiting = true;
        self.settle();
    }

    fn save(&self) -> Saved {
        #[rustfmt::skip]
        let Self {
            console: _, line: _, waiting: _,
            divisor, ier, fcr, lcr, mcr, scr, overrun, sent, inputs, changes, received,
            raised: _,
        } = self;
        wrap(
            VERSION,
            &State {
                divisor: *divisor,
                ier: *ier,
                fcr: *fcr,
                lcr: *lcr,
                mcr: *mcr,
                scr: *scr,
                overrun: *overrun,
                sent: *sent,
                inputs: *inputs,
                changes: *changes,
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
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::TestConsole;
    use crate::irq::TestWire;
    use std::sync::Arc;

    const RBR: u64 = 0;
    const THR: u64 = 0;
    const IER: u64 = 1;
    const IIR: u64 = 2;
    const FCR: u64 = 2;
    const LCR: u64 = 3;
    const MCR: u64 = 4;
    const LSR: u64 = 5;
    const MSR: u64 = 6;
    const SCR: u64 = 7;

    /// A port, its far end and its wire.
    struct Rig {
        port: Serial,
        far: TestConsole,
        wire: Arc<TestWire>,
    }

    impl Rig {
        fn new() -> Self {
            Self::with(TestConsole::default())
        }

        fn with(far: TestConsole) -> Self {
            let wire = Arc::new(TestWire::default());
            Self { port: Serial::new(Box::new(far.clone()), Box::new(wire.clone())), far, wire }
        }

        fn get(&mut self, register: u64) -> u8 {
            u8::try_from(self.port.read(register, 1)).unwrap()
        }

        fn set(&mut self, register: u64, value: u8) {
            assert_eq!(self.port.write(register, 1, value.into()), Effect::None);
        }

        /// The far end sends.
        fn send(&mut self, bytes: &[u8]) {
            self.far.input.lock().unwrap().extend(bytes);
            self.port.service();
        }

        fn unread(&self) -> usize {
            self.far.input.lock().unwrap().len()
        }

        /// Everything that is to be read, as a polling guest reads it.
        fn drain(&mut self) -> Vec<u8> {
            let mut bytes = Vec::new();
            while self.get(LSR) & LSR_READY != 0 {
                bytes.push(self.get(RBR));
            }
            bytes
        }
    }

    #[test]
    fn after_reset_the_registers_are_those_of_the_data_sheet() {
        let mut rig = Rig::new();
        let values: Vec<_> = (0..8).map(|register| rig.get(register)).collect();
        assert_eq!(values, [0, 0, 0x01, 0, 0, 0x60, 0xb0, 0]);
    }

    #[test]
    fn output_reaches_the_console_and_its_wish_the_machine() {
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
        let mut rig = Rig::new();
        for byte in *b"Hi\n" {
            rig.set(THR, byte);
        }
        assert_eq!(*rig.far.output.lock().unwrap(), b"Hi\n");
        assert_eq!(rig.wire.pulses(), 0);
        let mut port = Serial::new(Box::new(Wish), Box::new(rig.wire));
        assert_eq!(port.write(THR, 1, 0x61), Effect::None);
        assert_eq!(port.write(THR, 1, 0x21), Effect::Until);
    }

    #[test]
    fn a_polling_guest_reads_every_byte_in_order() {
        let text: Vec<u8> = (0..200).collect();
        for fcr in [0x00, 0x01, 0x41, 0x81, 0xc1] {
            let mut rig = Rig::new();
            rig.set(FCR, fcr);
            rig.send(&text);
            assert_eq!(rig.drain(), text, "FCR {fcr:#x}");
            rig.send(b"more");
            assert_eq!(rig.drain(), b"more");
        }
    }

    #[test]
    fn a_guest_that_reads_one_byte_per_interrupt_gets_them_all() {
        let text: Vec<u8> = (0..100).collect();
        for fcr in [0x00, 0x01, 0x41, 0x81, 0xc7] {
            let mut rig = Rig::new();
            rig.set(FCR, fcr);
            rig.set(IER, IER_RX);
            rig.send(&text);
            let mut bytes = Vec::new();
            let mut seen = 0;
            while rig.wire.pulses() > seen {
                seen = rig.wire.pulses();
                bytes.push(rig.get(RBR));
            }
            assert_eq!(bytes, text, "FCR {fcr:#x}");
        }
    }

    #[test]
    fn input_that_came_before_the_driver_survives_its_start() {
        let mut rig = Rig::new();
        rig.send(b"abc");
        // The sequence that hobby kernels begin with, loopback test included.
        for (register, value) in
            [(IER, 0), (LCR, 0x80), (0, 3), (1, 0), (LCR, 3), (FCR, 0xc7), (MCR, 0x0b), (MCR, 0x1e), (THR, 0xae)]
        {
            rig.set(register, value);
        }
        assert_eq!(rig.get(RBR), 0xae);
        rig.set(MCR, 0x0f);
        assert_eq!(rig.drain(), b"abc");
        assert!(rig.far.output.lock().unwrap().is_empty());
    }

    #[test]
    fn the_console_is_read_only_when_the_guest_looks() {
        let mut rig = Rig::new();
        rig.send(b"abc");
        for register in [IER, IIR, LCR, MCR, MSR, SCR] {
            rig.get(register);
        }
        assert_eq!(rig.unread(), 3);
        rig.get(LSR);
        assert_eq!(rig.unread(), 2);
        rig.get(LSR);
        assert_eq!(rig.unread(), 2);
    }

    #[test]
    fn no_more_is_taken_than_the_trigger_level() {
        for (fcr, level) in [(0x00, 1), (0x01, 1), (0x41, 4), (0x81, 8), (0xc1, 14)] {
            let mut rig = Rig::new();
            rig.set(FCR, fcr);
            rig.set(IER, IER_RX);
            rig.send(&[0; 100]);
            rig.port.service();
            assert_eq!(100 - rig.unread(), level, "FCR {fcr:#x}");
        }
    }

    #[test]
    fn enabling_an_interrupt_that_is_due_raises_it() {
        let mut rig = Rig::new();
        rig.send(b"a");
        assert_eq!(rig.wire.pulses(), 0);
        rig.set(IER, IER_RX);
        assert_eq!((rig.wire.pulses(), rig.get(IIR)), (1, IIR_RX));
        // As a console does around its output: mask, write, unmask.
        rig.set(IER, 0);
        assert_eq!(rig.get(IIR), IIR_NONE);
        rig.set(IER, IER_RX);
        assert_eq!((rig.wire.pulses(), rig.get(IIR)), (2, IIR_RX));
        rig.set(IER, IER_TX);
        assert_eq!((rig.wire.pulses(), rig.get(IIR), rig.get(IIR)), (2, IIR_TX, IIR_NONE));
        rig.set(IER, 0);
        rig.set(IER, IER_TX);
        assert_eq!((rig.wire.pulses(), rig.get(IIR)), (3, IIR_TX));
    }

    #[test]
    fn received_data_stays_pending_until_it_is_read() {
        let mut rig = Rig::new();
        rig.set(IER, IER_RX | IER_TX);
        rig.send(b"a");
        // Both are pending: the more urgent shows, and reading it away uncovers the other.
        assert_eq!((rig.get(IIR), rig.get(IIR)), (IIR_RX, IIR_RX));
        assert_eq!(rig.get(RBR), b'a');
        assert_eq!((rig.get(IIR), rig.get(IIR)), (IIR_TX, IIR_NONE));
    }

    #[test]
    fn less_than_the_trigger_level_is_a_time_out() {
        let mut rig = Rig::new();
        rig.set(FCR, 0x41);
        rig.set(IER, IER_RX);
        rig.send(b"abc");
        assert_eq!((rig.get(IIR), rig.wire.pulses()), (IIR_TIMEOUT | IIR_FIFOS, 1));
        rig.send(b"d");
        assert_eq!((rig.get(IIR), rig.wire.pulses()), (IIR_RX | IIR_FIFOS, 1));
    }

    #[test]
    fn every_byte_sent_makes_a_transmitter_interrupt() {
        let mut rig = Rig::new();
        rig.set(IER, IER_TX);
        for i in 1..=3 {
            assert_eq!((rig.wire.pulses(), rig.get(IIR)), (i, IIR_TX));
            rig.set(THR, b'x');
        }
    }

    #[test]
    fn the_divisor_hides_data_and_interrupt_enable() {
        let mut rig = Rig::new();
        rig.set(IER, IER_LINE);
        rig.set(LCR, 0x83);
        rig.set(0, 0x34);
        rig.set(1, 0x12);
        assert_eq!(
            (rig.get(0), rig.get(1), rig.port.register(0, true), rig.port.register(1, false)),
            (0x34, 0x12, "DLL", "DLM")
        );
        rig.set(LCR, 0x03);
        assert_eq!((rig.get(IER), rig.port.register(0, true), rig.port.register(0, false)), (IER_LINE, "THR", "RBR"));
        assert!(rig.far.output.lock().unwrap().is_empty());
    }

    #[test]
    fn scratch_and_control_hold_what_they_have_room_for() {
        let mut rig = Rig::new();
        for (register, kept) in [(IER, 0x0f), (LCR, 0xff), (MCR, 0x1f), (SCR, 0xff)] {
            rig.set(register, 0xff);
            assert_eq!(rig.get(register), kept);
            rig.set(register, 0);
            assert_eq!(rig.get(register), 0);
        }
    }

    #[test]
    fn in_loopback_the_modem_outputs_are_its_inputs() {
        let mut rig = Rig::new();
        rig.set(MCR, MCR_LOOP);
        assert_eq!(rig.get(MSR), 0x0b, "all inputs fell");
        for (output, input) in [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT2, MSR_DCD)] {
            rig.set(MCR, MCR_LOOP | output);
            assert_eq!(rig.get(MSR), input | input >> 4);
            rig.set(MCR, MCR_LOOP);
            assert_eq!(rig.get(MSR), input >> 4);
        }
        // The ring indicator tells only of its end.
        rig.set(MCR, MCR_LOOP | MCR_OUT1);
        assert_eq!(rig.get(MSR), MSR_RI);
        rig.set(MCR, MCR_LOOP);
        assert_eq!(rig.get(MSR), MSR_RI >> 4);
    }

    #[test]
    fn a_full_loop_overruns_and_says_so_once() {
        let mut rig = Rig::new();
        rig.set(FCR, 0xc1);
        rig.set(MCR, MCR_LOOP);
        rig.set(IER, IER_LINE);
        for byte in 0..17 {
            rig.set(THR, byte);
        }
        assert_eq!((rig.wire.pulses(), rig.get(IIR)), (1, IIR_LINE | IIR_FIFOS));
        assert_eq!(rig.get(LSR), LSR_SENT | LSR_OVERRUN | LSR_READY);
        assert_eq!(rig.get(LSR), LSR_SENT | LSR_READY);
        assert_eq!(rig.drain(), (0..16).collect::<Vec<u8>>());
        // Without FIFOs the newest byte wins.
        rig.set(FCR, 0);
        rig.set(THR, 1);
        rig.set(THR, 2);
        assert_eq!(rig.drain(), [2]);
    }

    #[test]
    fn a_fifo_reset_empties_it() {
        let mut rig = Rig::new();
        for (before, reset) in [(0x01, 0x03), (0x01, 0x00), (0x00, 0x01)] {
            rig.set(FCR, before);
            rig.set(MCR, MCR_LOOP);
            rig.set(THR, 1);
            assert_eq!(rig.get(LSR) & LSR_READY, LSR_READY);
            rig.set(FCR, reset);
            assert_eq!(rig.get(LSR) & LSR_READY, 0, "{before:#x} {reset:#x}");
        }
        rig.set(FCR, 0x02);
        rig.set(THR, 1);
        rig.set(FCR, 0x02);
        assert_eq!(rig.drain(), [1], "without bit 0 the others mean nothing");
    }

    #[test]
    fn the_carrier_is_lost_when_all_that_was_sent_is_read() {
        let mut rig = Rig::with(TestConsole { closed: true, ..TestConsole::default() });
        rig.set(FCR, 0xc1);
        rig.send(b"ab");
        assert_eq!(rig.get(MSR) & MSR_DCD, MSR_DCD);
        assert_eq!(rig.get(LSR) & LSR_READY, LSR_READY);
        assert_eq!(rig.unread(), 0);
        assert_eq!(rig.get(MSR) & MSR_DCD, MSR_DCD, "the FIFO still holds some");
        rig.set(IER, IER_MODEM);
        assert_eq!(rig.drain(), b"ab");
        assert_eq!((rig.wire.pulses(), rig.get(IIR)), (1, IIR_MODEM | IIR_FIFOS));
        assert_eq!(rig.get(MSR), MSR_CTS | MSR_DSR | MSR_DCD >> 4);
        assert_eq!(rig.get(MSR), MSR_CTS | MSR_DSR);
        assert_eq!(rig.get(IIR), IIR_NONE | IIR_FIFOS);
    }

    #[test]
    fn every_byte_of_the_fifo_is_saved_and_its_interrupt_raised_again() {
        let mut rig = Rig::new();
        rig.set(FCR, 0xc1);
        rig.set(IER, IER_RX);
        rig.send(b"0123456789abcdef");
        let mut other = Rig::new();
        other.port.load(&rig.port.save()).unwrap();
        assert_eq!((other.wire.pulses(), other.get(IIR)), (1, IIR_RX | IIR_FIFOS));
        assert_eq!(other.drain(), b"0123456789abcd");
        assert_eq!(rig.unread(), 2);
    }

    #[test]
    fn a_state_that_no_chip_can_be_in_is_refused() {
        let port = Rig::new().port;
        for (field, value) in [
            ("ier", serde_json::json!(0x10)),
            ("fcr", serde_json::json!(0x40)),
            ("fcr", serde_json::json!(0x03)),
            ("mcr", serde_json::json!(0x20)),
            ("inputs", serde_json::json!(1)),
            ("changes", serde_json::json!(0x10)),
            ("received", serde_json::json!([1, 2])),
        ] {
            let mut saved = port.save();
            saved.state[field] = value;
            assert!(Rig::new().port.load(&saved).is_err(), "{field}");
        }
    }
}
