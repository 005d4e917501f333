//! Watching a vCPU. The run loop calls [`Trace::enter`] before each KVM_RUN, [`Trace::returned`] after it and
//! [`Trace::leave`] once the exit has been answered; with [`Off`] all three compile to nothing.

mod filter;
mod last;
mod print;
mod record;
mod ring;
mod symbols;
mod track;

use std::sync::OnceLock;
use std::time::{Duration, Instant};

pub use self::filter::Filter;
pub use self::last::{Last, LastExits, Recent};
pub use self::print::{Print, describe};
pub use self::record::{MEMORY, Record, Recording};
pub use self::symbols::Symbols;
pub use self::track::Track;
use crate::bus::{Buses, Exit};

/// Finds the instruction that caused an exit, and says what it is.
pub type Culprit = Box<dyn Fn(&Exit<'_>) -> Option<String> + Send>;

/// A CPU whose KVM_RUN has returned.
pub trait Sight {
    /// Where the guest is: past the instruction that exited, or at it, as the host has it.
    fn pc(&mut self) -> u64;

    /// For `--trace-insn`.
    fn culprit(&mut self) -> Option<Culprit> {
        None
    }
}

/// Something that watches exits.
pub trait Trace {
    /// It wants to know where the guest is at each exit; to tell costs a copy of the registers.
    fn wants_pc(&self) -> bool {
        false
    }

    /// The guest is about to run.
    fn enter(&mut self) {}

    /// KVM_RUN has returned; the exit is about to be answered. `cpu` tells where the guest is, if that was asked for.
    fn returned(&mut self, _cpu: &mut impl Sight) {}

    /// An exit has been answered; what a read gave is in it.
    fn leave(&mut self, _exit: &Exit<'_>, _buses: &Buses) {}
}

/// Watches nothing, at no cost.
#[derive(Debug, Default, Clone, Copy)]
pub struct Off;

impl Trace for Off {}

/// Nothing, or something that watches.
impl<T: Trace> Trace for Option<T> {
    fn wants_pc(&self) -> bool {
        self.as_ref().is_some_and(T::wants_pc)
    }

    fn enter(&mut self) {
        if let Some(trace) = self {
            trace.enter();
        }
    }

    fn returned(&mut self, cpu: &mut impl Sight) {
        if let Some(trace) = self {
            trace.returned(cpu);
        }
    }

    fn leave(&mut self, exit: &Exit<'_>, buses: &Buses) {
        if let Some(trace) = self {
            trace.leave(exit, buses);
        }
    }
}

/// Two that watch.
impl<A: Trace, B: Trace> Trace for (A, B) {
    fn wants_pc(&self) -> bool {
        self.0.wants_pc() || self.1.wants_pc()
    }

    fn enter(&mut self) {
        self.0.enter();
        self.1.enter();
    }

    fn returned(&mut self, cpu: &mut impl Sight) {
        self.0.returned(cpu);
        self.1.returned(cpu);
    }

    fn leave(&mut self, exit: &Exit<'_>, buses: &Buses) {
        self.0.leave(exit, buses);
        self.1.leave(exit, buses);
    }
}

/// Since the trace's zero: the first time anyone asked.
pub fn now() -> Duration {
    static ZERO: OnceLock<Instant> = OnceLock::new();
    ZERO.get_or_init(Instant::now).elapsed()
}

/// One round of a vCPU through the loop: when, and where the guest was.
#[derive(Debug, Clone, Copy, Default)]
pub struct Round {
    /// KVM_RUN began; not known before the first one.
    pub entered: Option<Duration>,
    /// It returned.
    pub returned: Duration,
    /// Where the guest is; past the instruction that exited, or at it, as the host has it.
    pub pc: u64,
}

impl Round {
    /// The guest is about to run. But for the first time the clock is not read: what lies between the answer to an exit
    /// and this is a glance at a flag.
    fn enter(&mut self) {
        self.entered.get_or_insert_with(now);
    }

    /// KVM_RUN has returned.
    fn end(&mut self, cpu: &mut impl Sight) {
        self.returned = now();
        self.pc = cpu.pc();
    }

    /// The exit has been answered: the whole round, and when. The next one begins.
    fn answered(&mut self) -> (Self, Duration) {
        let (round, now) = (*self, now());
        self.entered = Some(now);
        (round, now)
    }

    /// How long KVM_RUN took.
    fn inside(&self) -> Duration {
        self.returned.saturating_sub(self.entered.unwrap_or(self.returned))
    }
}

/// A CPU that is at an address, for tests.
#[cfg(test)]
pub struct At(pub u64);

#[cfg(test)]
impl Sight for At {
    fn pc(&mut self) -> u64 {
        self.0
    }
}

/// A duration in a person's words.
pub struct Words(pub Duration);

impl Words {
    /// Appends them to a line.
    pub fn add(&self, line: &mut String) {
        let nanos = u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX);
        let micros = nanos / 1000;
        decimal(line, if micros < 100_000 { micros } else { micros / 1000 }, 1, b'0');
        if micros < 100 {
            line.push('.');
            decimal(line, nanos % 1000 / 100, 1, b'0');
        }
        line.push_str(if micros < 100_000 { " µs" } else { " ms" });
    }
}

/// Appends `value` to a line with at least so many digits, `fill` before them. The standard library's formatting takes
/// several times as long, and there are ten numbers in a line of a trace.
fn digits<const BASE: u64>(line: &mut String, mut value: u64, least: usize, fill: u8) {
    let mut text = [fill; 20];
    let mut used = 0;
    for place in text.iter_mut().rev() {
        let digit = (value % BASE) as u8;
        *place = digit + if digit < 10 { b'0' } else { b'a' - 10 };
        used += 1;
        value /= BASE;
        if value == 0 {
            break;
        }
    }
    let from = text.len() - used.max(least.min(text.len()));
    line.push_str(std::str::from_utf8(text.get(from..).unwrap_or_default()).unwrap_or_default());
}

fn decimal(line: &mut String, value: u64, least: usize, fill: u8) {
    digits::<10>(line, value, least, fill);
}

/// The same in hexadecimal, with its `0x`.
fn hex(line: &mut String, value: u64, least: usize) {
    line.push_str("0x");
    digits::<16>(line, value, least, b'0');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_durations_read_as_the_standard_library_writes_them() {
        let mut line = String::new();
        for value in [0, 9, 10, 255, 0xffff_ffff, u64::MAX] {
            line.clear();
            decimal(&mut line, value, 6, b' ');
            hex(&mut line, value, 4);
            hex(&mut line, value, 99);
            assert_eq!(line, format!("{value:>6}0x{value:04x}0x{value:020x}"));
        }
        for (nanos, words) in [(0, "0.0 µs"), (1_999, "1.9 µs"), (100_000, "100 µs"), (100_000_000, "100 ms")] {
            line.clear();
            Words(Duration::from_nanos(nanos)).add(&mut line);
            assert_eq!(line, words);
        }
    }
}
