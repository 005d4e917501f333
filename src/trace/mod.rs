//! Watching a vCPU. The run loop calls [`Trace::enter`] before each KVM_RUN and [`Trace::leave`] once the exit has been
//! answered; with [`Off`] both compile to nothing.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bus::{Buses, Exit, Space};
use crate::host::output::Output;

/// Something that watches exits.
pub trait Trace {
    /// The guest is about to run.
    fn enter(&mut self) {}

    /// An exit has been answered; what a read gave is in it.
    fn leave(&mut self, _exit: &Exit<'_>, _buses: &Buses) {}
}

/// Watches nothing, at no cost.
#[derive(Debug, Default, Clone, Copy)]
pub struct Off;

impl Trace for Off {}

/// Prints one line for each exit. All CPUs of a machine share the numbering and the output.
#[derive(Clone)]
pub struct Print {
    cpu: u32,
    number: Arc<AtomicU64>,
    output: Output,
    line: String,
}

impl Print {
    /// A printer for one CPU; [`Print::for_cpu`] makes those of its siblings.
    pub fn new(output: Output) -> Self {
        Self { cpu: 0, number: Arc::default(), output, line: String::new() }
    }

    /// The same printer for another CPU.
    #[must_use]
    pub fn for_cpu(&self, cpu: u32) -> Self {
        Self { cpu, ..self.clone() }
    }
}

impl Trace for Print {
    fn leave(&mut self, exit: &Exit<'_>, buses: &Buses) {
        if matches!(exit, Exit::Interrupted) {
            return;
        }
        let number = self.number.fetch_add(1, Ordering::Relaxed) + 1;
        self.line.clear();
        let _ = write!(self.line, "{number:>6} cpu{} ", self.cpu);
        describe(&mut self.line, exit, buses);
        self.line.push('\n');
        self.output.push_all(self.line.as_bytes());
    }
}

/// One exit in words: `out 0x0010 ← 0x0003 (2 bytes, no device)`.
pub fn describe(line: &mut String, exit: &Exit<'_>, buses: &Buses) {
    let result = match exit {
        Exit::Read { space, addr, width, data } => access(line, buses, (*space, *addr, *width), data, false),
        Exit::Write { space, addr, width, data } => access(line, buses, (*space, *addr, *width), data, true),
        Exit::Halt => write!(line, "hlt"),
        Exit::Shutdown => write!(line, "shutdown"),
        Exit::System { event, data } => write!(line, "system event {event} {data:x?}"),
        Exit::Debug => write!(line, "debug"),
        Exit::Interrupted => write!(line, "interrupted"),
        Exit::Fault(fault) => write!(line, "{}: {}", fault.name, fault.detail),
    };
    // Writing to a String cannot fail.
    let _ = result;
}

fn access(line: &mut String, buses: &Buses, at: (Space, u64, usize), data: &[u8], write: bool) -> std::fmt::Result {
    let (space, addr, width) = at;
    let (word, arrow, digits) = match (space, write) {
        (Space::Pio, true) => ("out", '←', 4),
        (Space::Pio, false) => ("in", '→', 4),
        (Space::Mmio, true) => ("write", '←', 8),
        (Space::Mmio, false) => ("read", '→', 8),
    };
    let mut elements = data.chunks(width.max(1)).map(|e| e.iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b)));
    let first = elements.next().unwrap_or(0);
    write!(line, "{word} 0x{addr:0digits$x} {arrow} 0x{first:0w$x} ({width} bytes, ", w = 2 * width)?;
    match buses.name(space, addr, write) {
        Some((device, register)) => write!(line, "{device}.{register})")?,
        None => write!(line, "no device)")?,
    }
    let more = elements.len();
    if more > 0 {
        write!(line, " and {more} more:")?;
        for value in elements.take(16) {
            write!(line, " 0x{value:0w$x}", w = 2 * width)?;
        }
        if more > 16 {
            write!(line, " …")?;
        }
    }
    Ok(())
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
