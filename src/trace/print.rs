//! A trace for a person: one line for each exit.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::filter::{Filter, wants};
use super::{Culprit, Round, Sight, Symbols, Trace, Words, decimal, hex};
use crate::bus::{Buses, Exit, Space};
use crate::host::output::Output;

/// Prints one line for each exit. All CPUs of a machine share the numbering and the output.
pub struct Print {
    cpu: u32,
    number: Arc<AtomicU64>,
    output: Output,
    filter: Option<Filter>,
    symbols: Symbols,
    round: Round,
    culprit: Option<Culprit>,
    line: String,
}

impl Print {
    /// A printer for one CPU; [`Print::for_cpu`] makes those of its siblings.
    pub fn new(output: Output, filter: Option<Filter>, symbols: Symbols) -> Self {
        let (number, round, line) = (Arc::default(), Round::default(), String::new());
        Self { cpu: 0, number, output, filter, symbols, round, culprit: None, line }
    }

    /// The same printer for another CPU.
    #[must_use]
    pub fn for_cpu(&self, cpu: u32) -> Self {
        let new = Self::new(self.output.clone(), self.filter.clone(), self.symbols.clone());
        Self { cpu, number: self.number.clone(), ..new }
    }
}

impl Trace for Print {
    fn wants_pc(&self) -> bool {
        true
    }

    fn enter(&mut self) {
        self.round.enter();
    }

    fn returned(&mut self, cpu: &mut impl Sight) {
        self.round.end(cpu);
        self.culprit = cpu.culprit();
    }

    fn leave(&mut self, exit: &Exit<'_>, buses: &Buses) {
        let (round, answered) = self.round.answered();
        if !wants(self.filter.as_ref(), self.cpu, exit, buses) {
            return;
        }
        let line = &mut self.line;
        line.clear();
        decimal(line, self.number.fetch_add(1, Ordering::Relaxed) + 1, 6, b' ');
        line.push_str(" cpu");
        decimal(line, self.cpu.into(), 1, b' ');
        line.push(' ');
        describe(line, exit, buses);
        line.push_str("  at ");
        decimal(line, round.returned.as_secs(), 1, b'0');
        line.push('.');
        decimal(line, round.returned.subsec_micros().into(), 6, b'0');
        line.push_str(" s, guest ");
        Words(round.inside()).add(line);
        line.push_str(", vmm ");
        Words(answered.saturating_sub(round.returned)).add(line);
        line.push_str(", pc ");
        hex(line, round.pc, 1);
        if !self.symbols.is_empty() {
            line.push_str(&self.symbols.suffix(round.pc));
        }
        if let Some(text) = self.culprit.take().and_then(|culprit| culprit(exit)) {
            line.push_str(": ");
            line.push_str(&text);
        }
        line.push('\n');
        self.output.push_all(line.as_bytes());
    }
}

/// One exit in words: `out 0x0010 ← 0x0003 (2 bytes, no device)`.
pub fn describe(line: &mut String, exit: &Exit<'_>, buses: &Buses) {
    let result = match exit {
        Exit::Read { space, addr, width, data } => {
            return access(line, buses.name(*space, *addr, false), (*space, *addr, *width), data, false);
        }
        Exit::Write { space, addr, width, data } => {
            return access(line, buses.name(*space, *addr, true), (*space, *addr, *width), data, true);
        }
        Exit::Halt => write!(line, "hlt"),
        Exit::EndOfInterrupt(vector) => write!(line, "end of interrupt {vector:#x}"),
        Exit::Shutdown => write!(line, "shutdown"),
        Exit::System { event, data } => write!(line, "system event {event} {data:x?}"),
        Exit::Debug => write!(line, "debug"),
        Exit::Interrupted => write!(line, "interrupted"),
        Exit::Fault(fault) => write!(line, "{}: {}", fault.name, fault.detail),
    };
    // Writing to a String cannot fail.
    let _ = result;
}

/// A device and its register.
pub(super) type Name = Option<(&'static str, &'static str)>;

/// One access in words: its place, its width and what it moved.
pub(super) fn access(line: &mut String, name: Name, at: (Space, u64, usize), data: &[u8], write: bool) {
    let (space, addr, width) = at;
    let (word, arrow, digits) = match (space, write) {
        (Space::Pio, true) => ("out ", " ← ", 4),
        (Space::Pio, false) => ("in ", " → ", 4),
        (Space::Mmio, true) => ("write ", " ← ", 8),
        (Space::Mmio, false) => ("read ", " → ", 8),
    };
    let mut elements = data.chunks(width.max(1)).map(|e| e.iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b)));
    let first = elements.next().unwrap_or(0);
    line.push_str(word);
    hex(line, addr, digits);
    line.push_str(arrow);
    hex(line, first, 2 * width);
    line.push_str(" (");
    decimal(line, width as u64, 1, b'0');
    line.push_str(" bytes, ");
    match name {
        // Where only the device is known.
        Some((device, "")) => line.push_str(device),
        Some((device, register)) => [device, ".", register].iter().for_each(|part| line.push_str(part)),
        None => line.push_str("no device"),
    }
    line.push(')');
    let more = elements.len();
    if more > 0 {
        line.push_str(" and ");
        decimal(line, more as u64, 1, b'0');
        line.push_str(" more:");
        for value in elements.take(16) {
            line.push(' ');
            hex(line, value, 2 * width);
        }
        if more > 16 {
            line.push_str(" …");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::Builder;

    fn line(exit: &Exit<'_>) -> String {
        let mut line = String::new();
        describe(&mut line, exit, &Builder::default().finish());
        line
    }

    #[test]
    fn an_access_reads_as_the_contract_has_it() {
        let out = Exit::Write { space: Space::Pio, addr: 0x10, width: 2, data: &[3, 0] };
        assert_eq!(line(&out), "out 0x0010 ← 0x0003 (2 bytes, no device)");
        let mut data = [0xff; 4];
        let read = Exit::Read { space: Space::Mmio, addr: 0xd000_0000, width: 4, data: &mut data };
        assert_eq!(line(&read), "read 0xd0000000 → 0xffffffff (4 bytes, no device)");
        let string = Exit::Write { space: Space::Pio, addr: 0x3f8, width: 1, data: b"ab" };
        assert_eq!(line(&string), "out 0x03f8 ← 0x61 (1 bytes, no device) and 1 more: 0x62");
        assert_eq!(line(&Exit::Halt), "hlt");
    }

    #[test]
    fn a_long_string_makes_a_bounded_line() {
        let data = vec![0; 4096];
        assert!(line(&Exit::Write { space: Space::Pio, addr: 0, width: 1, data: &data }).len() < 200);
    }
}
