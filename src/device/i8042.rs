//! The i8042 keyboard controller, as far as a machine without a keyboard has one: the way to reset it.
//!
//! It is attached as two single bytes, data at offset 0 (port 0x60) and command or status at offset 4 (port 0x64); what
//! lies between is not the controller's. The command 0xfe, or any 0xf0..=0xff with bit 0 clear, pulses the reset line;
//! so does the output port written (0xd1) with bit 0 clear. **The A20 bit of the output port is kept and ignored**:
//! address line 20 is always on. The self-tests pass, the command byte can be read and written, and bytes for a
//! keyboard or a mouse are dropped: there is neither. It raises no interrupt.
//! Commands: IBM PS/2 Hardware Interface Technical Reference, *Keyboard and Auxiliary Device Controller*.
//!
//! Invariant: a command's answer stays in the output buffer, and the status says so, until it is read or replaced.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::{unwrap, wrap};
use crate::bus::{Device, Effect, Saved};

/// Of the saved state.
const VERSION: u32 = 1;

const DATA: u64 = 0;
const COMMAND: u64 = 4;

/// Status: the output buffer is full; firmware has run; the last write was a command; the keyboard is not locked.
/// The input buffer (bit 1) is never full.
const FULL: u8 = 1;
const SYSTEM: u8 = 1 << 2;
const WAS_COMMAND: u8 = 1 << 3;
const UNLOCKED: u8 = 1 << 4;

/// Output port: the reset line (0 resets) and address line 20.
const RESET_LINE: u8 = 1;
const A20: u8 = 1 << 1;

/// What the next byte written to the data port is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Next {
    /// The keyboard, which is not there.
    Keyboard,
    CommandByte,
    OutputPort,
}

/// The keyboard controller.
#[derive(Debug)]
pub struct I8042 {
    // State
    output: Option<u8>,
    next: Next,
    command_byte: u8,
    output_port: u8,
    was_command: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    output: Option<u8>,
    next: Next,
    command_byte: u8,
    output_port: u8,
    was_command: bool,
}

impl Default for I8042 {
    fn default() -> Self {
        // Firmware has set the system flag in the command byte, too.
        let output_port = RESET_LINE | A20;
        Self { output: None, next: Next::Keyboard, command_byte: SYSTEM, output_port, was_command: false }
    }
}

impl I8042 {
    fn command(&mut self, command: u8) -> Effect {
        self.was_command = true;
        self.next = Next::Keyboard;
        match command {
            0x20 => self.output = Some(self.command_byte),
            0x60 => self.next = Next::CommandByte,
            // Self-test passed; keyboard interface has no error.
            0xaa => self.output = Some(0x55),
            0xab => self.output = Some(0x00),
            0xd0 => self.output = Some(self.output_port),
            0xd1 => self.next = Next::OutputPort,
            0xf0..=0xff if command & RESET_LINE == 0 => return Effect::Reset,
            _ => {}
        }
        Effect::None
    }

    fn data(&mut self, byte: u8) -> Effect {
        self.was_command = false;
        match std::mem::replace(&mut self.next, Next::Keyboard) {
            Next::Keyboard => {}
            Next::CommandByte => self.command_byte = byte,
            Next::OutputPort if byte & RESET_LINE == 0 => return Effect::Reset,
            Next::OutputPort => self.output_port = byte,
        }
        Effect::None
    }
}

impl Device for I8042 {
    fn name(&self) -> &'static str {
        "i8042"
    }

    fn register(&self, offset: u64, write: bool) -> &'static str {
        match (offset, write) {
            (DATA, _) => "DATA",
            (COMMAND, true) => "COMMAND",
            (COMMAND, false) => "STATUS",
            _ => "RESERVED",
        }
    }

    fn read(&mut self, offset: u64, _width: usize) -> u64 {
        match offset {
            DATA => self.output.take().unwrap_or(0).into(),
            COMMAND => {
                let full = if self.output.is_some() { FULL } else { 0 };
                let was_command = if self.was_command { WAS_COMMAND } else { 0 };
                (full | SYSTEM | was_command | UNLOCKED).into()
            }
            _ => 0xff,
        }
    }

    fn write(&mut self, offset: u64, _width: usize, value: u64) -> Effect {
        let [byte, ..] = value.to_le_bytes();
        match offset {
            DATA => self.data(byte),
            COMMAND => self.command(byte),
            _ => Effect::None,
        }
    }

    fn reset(&mut self) {
        *self = Self::default();
    }

    fn save(&self) -> Saved {
        let &Self { output, next, command_byte, output_port, was_command } = self;
        wrap(VERSION, &State { output, next, command_byte, output_port, was_command })
    }

    fn load(&mut self, saved: &Saved) -> Result<()> {
        let State { output, next, command_byte, output_port, was_command } = unwrap(self.name(), VERSION, saved)?;
        if output_port & RESET_LINE == 0 {
            bail!("{}: an output port of {output_port:#04x} would hold the machine in reset", self.name());
        }
        *self = Self { output, next, command_byte, output_port, was_command };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(command: u64) -> (u64, u64, u64) {
        let mut device = I8042::default();
        assert_eq!(device.write(COMMAND, 1, command), Effect::None);
        let before = device.read(COMMAND, 1) & u64::from(FULL);
        let answer = device.read(DATA, 1);
        (before, answer, device.read(COMMAND, 1) & u64::from(FULL))
    }

    #[test]
    fn the_pulse_commands_reset() {
        for command in 0xf0..=0xff {
            let expected = if command % 2 == 0 { Effect::Reset } else { Effect::None };
            assert_eq!(I8042::default().write(COMMAND, 1, command), expected, "{command:#x}");
        }
    }

    #[test]
    fn the_output_port_resets_only_when_its_line_goes_low() {
        for (byte, expected) in [(0xfe, Effect::Reset), (0x00, Effect::Reset), (0x01, Effect::None)] {
            let mut device = I8042::default();
            assert_eq!(device.write(COMMAND, 1, 0xd1), Effect::None);
            assert_eq!(device.write(DATA, 1, byte), expected);
        }
        // Without the command before it, the byte is for the keyboard.
        assert_eq!(I8042::default().write(DATA, 1, 0), Effect::None);
    }

    #[test]
    fn the_a20_bit_is_kept_and_means_nothing() {
        let mut device = I8042::default();
        device.write(COMMAND, 1, 0xd1);
        assert_eq!(device.write(DATA, 1, 0xdd), Effect::None);
        device.write(COMMAND, 1, 0xd0);
        assert_eq!(device.read(DATA, 1), 0xdd);
    }

    #[test]
    fn an_answer_is_announced_and_read_once() {
        assert_eq!(ask(0xaa), (1, 0x55, 0));
        assert_eq!(ask(0xab), (1, 0x00, 0));
        assert_eq!(ask(0xd0), (1, 0x03, 0));
        assert_eq!(ask(0x20), (1, 0x04, 0));
        assert_eq!(ask(0xa9), (0, 0x00, 0));
    }

    #[test]
    fn the_status_never_tells_a_guest_to_wait_before_it_writes() {
        let mut device = I8042::default();
        for command in 0..=0xff {
            device.write(COMMAND, 1, command);
            assert_eq!(device.read(COMMAND, 1) & 2, 0);
        }
    }

    #[test]
    fn a_state_that_holds_the_reset_line_is_refused() {
        let mut device = I8042::default();
        let mut saved = device.save();
        saved.state["output_port"] = 2.into();
        assert!(device.load(&saved).is_err());
    }
}
