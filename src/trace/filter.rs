//! `--trace-filter`: which exits a trace shows.
//!
//! Terms joined by `&` must all hold, alternatives stand between `|` or commas: `io & 0x3f8..0x3ff | vcpu=1 & halt`.

use std::fmt;
use std::str::FromStr;

use crate::bus::{Buses, Exit};
use crate::config::{Space, number};

/// One condition.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Term {
    /// Port accesses, or accesses to memory addresses.
    Space(Space),
    /// Reads, or writes.
    Write(bool),
    /// A byte of the access lies in the range.
    Range(u64, u64),
    /// This CPU.
    Cpu(u32),
    /// This device, by the name that traces have for it.
    Device(String),
    /// HLT.
    Halt,
    /// Signals, kicks and interrupt windows, which are not shown otherwise.
    Irq,
}

/// Which exits are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    text: String,
    alternatives: Vec<Vec<Term>>,
}

impl FromStr for Term {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let cpu = |n: &str| u32::try_from(number(n)?).map_err(|_| format!("{n:?} is no CPU's number"));
        Ok(match (text, text.split_once('='), text.split_once("..")) {
            ("io", ..) => Self::Space(Space::Pio),
            ("mmio", ..) => Self::Space(Space::Mmio),
            ("read", ..) => Self::Write(false),
            ("write", ..) => Self::Write(true),
            ("halt", ..) => Self::Halt,
            ("irq", ..) => Self::Irq,
            (_, Some(("vcpu", n)), _) => Self::Cpu(cpu(n)?),
            (_, Some(("device", name)), _) if !name.is_empty() => Self::Device(name.into()),
            (_, _, Some((first, last))) => {
                let (first, last) = (number(first)?, number(last.trim_start_matches('='))?);
                if last < first {
                    return Err(format!("the range {text} ends before it begins"));
                }
                Self::Range(first, last)
            }
            _ => {
                let known = "io, mmio, read, write, halt, irq, vcpu=N, device=NAME, an address or FIRST..LAST";
                let address = number(text).map_err(|_| format!("{text:?} is none of {known}"))?;
                Self::Range(address, address)
            }
        })
    }
}

impl FromStr for Filter {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let all = |part: &str| part.split('&').map(|term| term.trim().parse()).collect();
        let alternatives = text.split(['|', ',']).map(all).collect::<Result<_, _>>()?;
        Ok(Self { text: text.to_owned(), alternatives })
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Space, address, length of all elements, whether the guest writes.
fn access(exit: &Exit<'_>) -> Option<(Space, u64, u64, bool)> {
    match exit {
        Exit::Read { space, addr, width, .. } => Some((*space, *addr, *width as u64, false)),
        Exit::Write { space, addr, width, .. } => Some((*space, *addr, *width as u64, true)),
        _ => None,
    }
}

impl Term {
    fn holds(&self, cpu: u32, exit: &Exit<'_>, buses: &Buses) -> bool {
        let access = access(exit);
        match self {
            Self::Space(wanted) => access.is_some_and(|(space, ..)| space == *wanted),
            Self::Write(wanted) => access.is_some_and(|(.., write)| write == *wanted),
            Self::Range(first, last) => access.is_some_and(|(_, addr, width, _)| {
                addr <= *last && addr.saturating_add(width.saturating_sub(1)) >= *first
            }),
            Self::Cpu(wanted) => cpu == *wanted,
            Self::Device(wanted) => access.is_some_and(|(space, addr, _, write)| {
                buses.name(space, addr, write).is_some_and(|(device, _)| device == wanted)
            }),
            Self::Halt => matches!(exit, Exit::Halt),
            Self::Irq => matches!(exit, Exit::Interrupted),
        }
    }
}

impl Filter {
    /// The exit is wanted.
    pub fn wants(&self, cpu: u32, exit: &Exit<'_>, buses: &Buses) -> bool {
        self.alternatives.iter().any(|all| all.iter().all(|term| term.holds(cpu, exit, buses)))
    }
}

/// Whether a trace shows an exit: without a filter all that the guest made.
pub fn wants(filter: Option<&Filter>, cpu: u32, exit: &Exit<'_>, buses: &Buses) -> bool {
    match filter {
        Some(filter) => filter.wants(cpu, exit, buses),
        None => !matches!(exit, Exit::Interrupted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::Builder;

    fn shown(filter: &str, cpu: u32, exit: &Exit<'_>) -> bool {
        let mut builder = Builder::default();
        let span = crate::memory::Span { start: 0xf4, size: 4 };
        builder.place(Space::Pio, span, crate::device::debug_exit::DebugExit).unwrap();
        filter.parse::<Filter>().unwrap().wants(cpu, exit, &builder.finish())
    }

    #[test]
    fn terms_and_alternatives() {
        let out = |addr| Exit::Write { space: Space::Pio, addr, width: 2, data: &[0, 0] };
        let mmio = Exit::Write { space: Space::Mmio, addr: 0x3f8, width: 1, data: &[0] };
        for (filter, exit, yes) in [
            ("io", out(0x10), true),
            ("io", mmio, false),
            ("io & 0x3f8..0x3ff", out(0x3f8), true),
            ("io & 0x3f8..0x3ff", out(0x3f7), true),
            ("io & 0x3f8..0x3ff", out(0x3f6), false),
            ("io & 0x3f8..0x3ff", out(0x400), false),
            ("0x400", out(0x3ff), true),
            ("read", out(1), false),
            ("write & vcpu=1", out(1), true),
            ("vcpu=0", out(1), false),
            ("halt | irq", Exit::Halt, true),
            ("halt,irq", Exit::Interrupted, true),
            ("halt", out(1), false),
            ("device=debug-exit", out(0xf4), true),
            ("device=serial", out(0xf4), false),
        ] {
            assert_eq!(shown(filter, 1, &exit), yes, "{filter}: {exit:?}");
        }
        assert!(!wants(None, 0, &Exit::Interrupted, &Builder::default().finish()));
    }

    #[test]
    fn what_is_no_filter_says_what_would_be() {
        for text in ["", "ios", "io &", "5..3", "vcpu=x", "vcpu=0x100000000", "device=", "io || mmio"] {
            assert!(text.parse::<Filter>().is_err(), "{text}");
        }
        assert!("ios".parse::<Filter>().unwrap_err().contains("mmio"));
    }
}
