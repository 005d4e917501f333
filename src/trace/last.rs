//! The last exits of each CPU, kept for a report of every machine: what `trace::Record` keeps more of, at a price.
//!
//! Invariant: to keep an exit takes no clock, no allocation, no lock and no system call; a few words are copied into a
//! ring on the CPU's own stack. So there is no order between CPUs, and no program counter. What ends a CPU is put into
//! words, once.

use std::sync::{Arc, Mutex, PoisonError};

use super::print::{Name, access};
use super::{Trace, describe};
use crate::bus::{Buses, Exit, Space};

/// How many of the last exits a report shows, and a CPU keeps.
pub const LAST: usize = 32;
/// How many it shows of each, where there are many CPUs.
const LEAST: usize = 4;

/// What a report shows of the last exits.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Recent {
    /// One a line, the newest last.
    pub lines: Vec<String>,
    /// The lines say where the guest was.
    pub places: bool,
    /// The lines are in order CPU by CPU only.
    pub by_cpu: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Nothing,
    Access(Space, bool),
    Halt,
    EndOfInterrupt,
    /// The CPU's last: [`Ring::end`] has the words.
    End,
}

/// One exit.
#[derive(Debug, Clone, Copy)]
struct Entry {
    addr: u64,
    /// The first bytes.
    data: u64,
    /// Bytes of all elements.
    length: u32,
    width: u8,
    what: What,
}

const NOTHING: Entry = Entry { addr: 0, data: 0, length: 0, width: 0, what: What::Nothing };

#[derive(Debug)]
struct Ring {
    entries: [Entry; LAST],
    next: usize,
    end: String,
}

const EMPTY: Ring = Ring { entries: [NOTHING; LAST], next: 0, end: String::new() };

/// The first bytes of an access of several elements, or of eight bytes, as a number.
#[cold]
fn long(data: &[u8]) -> u64 {
    data.iter().take(8).rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

impl Entry {
    fn words(&self, buses: &Buses, end: &str) -> String {
        match self.what {
            What::Nothing => String::new(),
            What::Halt => "hlt".into(),
            What::EndOfInterrupt => format!("end of interrupt {:#x}", self.addr),
            What::End => end.into(),
            What::Access(space, write) => {
                // What a register was called then, a device may not know any more.
                let name: Name = buses.name(space, self.addr, write).map(|(device, _)| (device, ""));
                let (mut line, width) = (String::new(), usize::from(self.width));
                let bytes = self.data.to_le_bytes();
                access(&mut line, name, (space, self.addr, width), bytes.get(..width).unwrap_or(&bytes), write);
                match self.length as usize / width.max(1) {
                    0 | 1 => line,
                    elements => format!("{line} and {} more", elements - 1),
                }
            }
        }
    }
}

impl Ring {
    fn words(&self, most: usize, buses: &Buses) -> Vec<String> {
        let (newer, older) = self.entries.split_at(self.next % LAST);
        let all: Vec<_> = older.iter().chain(newer).filter(|entry| entry.what != What::Nothing).collect();
        let skip = all.len().saturating_sub(most);
        all.into_iter().skip(skip).map(|entry| entry.words(buses, &self.end)).collect()
    }
}

/// Where the CPUs of a machine leave their last exits when they stop. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct LastExits(Arc<Mutex<Vec<(u32, Ring)>>>);

impl LastExits {
    /// Who keeps those of one CPU; one that runs anew goes on.
    pub fn of_cpu(&self, cpu: u32) -> Last {
        let mut home = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let ring = match home.iter().position(|(id, _)| *id == cpu) {
            Some(at) => home.swap_remove(at).1,
            None => EMPTY,
        };
        Last { cpu, ring, home: self.clone() }
    }

    /// Those of CPUs that have stopped, in words; `buses` have the names of the devices.
    pub fn recent(&self, buses: &Buses) -> Recent {
        let mut home = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        home.sort_by_key(|(cpu, _)| *cpu);
        let most = (LAST / home.len().max(1)).max(LEAST);
        let lines = |(cpu, ring): &(u32, Ring)| {
            let cpu = *cpu;
            ring.words(most, buses).into_iter().map(move |line| format!("cpu{cpu} {line}"))
        };
        Recent { lines: home.iter().flat_map(lines).collect(), places: false, by_cpu: home.len() > 1 }
    }
}

/// Keeps the last exits of one CPU.
pub struct Last {
    cpu: u32,
    ring: Ring,
    home: LastExits,
}

impl Trace for Last {
    #[inline]
    fn leave(&mut self, exit: &Exit<'_>, buses: &Buses) {
        let (space, addr, width, data, write) = match exit {
            Exit::Write { space, addr, width, data } => (*space, *addr, *width, *data, true),
            Exit::Read { space, addr, width, data } => (*space, *addr, *width, &data[..], false),
            other => return self.ring.rare(other, buses),
        };
        let word = match *data {
            [a] => a.into(),
            [a, b] => u16::from_le_bytes([a, b]).into(),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]).into(),
            _ => long(data),
        };
        // KVM gives no width beyond 8, and no more bytes than a page has.
        let (length, width) = (data.len() as u32, width as u8);
        self.ring.push(Entry { addr, data: word, length, width, what: What::Access(space, write) });
    }
}

impl Ring {
    #[inline]
    fn push(&mut self, entry: Entry) {
        if let Some(place) = self.entries.get_mut(self.next % LAST) {
            *place = entry;
        }
        self.next = self.next.wrapping_add(1);
    }

    /// Keeps what is no access.
    #[cold]
    fn rare(&mut self, exit: &Exit<'_>, buses: &Buses) {
        let (what, addr) = match exit {
            Exit::Interrupted => return,
            Exit::Halt => (What::Halt, 0),
            Exit::EndOfInterrupt(vector) => (What::EndOfInterrupt, (*vector).into()),
            _ => {
                self.end.clear();
                describe(&mut self.end, exit, buses);
                (What::End, 0)
            }
        };
        self.push(Entry { what, addr, ..NOTHING });
    }
}

impl Drop for Last {
    /// The CPU has stopped.
    fn drop(&mut self) {
        let ring = std::mem::replace(&mut self.ring, EMPTY);
        self.home.0.lock().unwrap_or_else(PoisonError::into_inner).push((self.cpu, ring));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::Builder;

    #[test]
    fn the_last_exits_are_kept_and_told_with_the_names_of_devices() {
        let (home, mut builder) = (LastExits::default(), Builder::default());
        let span = crate::memory::Span { start: 0xf4, size: 4 };
        builder.place(Space::Pio, span, crate::device::debug_exit::DebugExit).unwrap();
        let buses = builder.finish();
        let mut last = home.of_cpu(0);
        for value in 0..100u8 {
            last.leave(&Exit::Write { space: Space::Pio, addr: 0xf4, width: 1, data: &[value] }, &buses);
            last.leave(&Exit::Interrupted, &buses);
        }
        last.leave(&Exit::Read { space: Space::Mmio, addr: 0x1000, width: 4, data: &mut [1, 2, 3, 4] }, &buses);
        last.leave(&Exit::Write { space: Space::Pio, addr: 0x10, width: 2, data: &[0x41; 20] }, &buses);
        assert!(home.recent(&buses).lines.is_empty(), "they are the CPU's until it stops");
        drop(last);
        // A CPU that goes on keeps what it had.
        let mut last = home.of_cpu(0);
        last.leave(&Exit::Shutdown, &buses);
        drop(last);
        let Recent { lines, places, by_cpu } = home.recent(&buses);
        assert_eq!((lines.len(), places, by_cpu), (LAST, false, false));
        assert_eq!(lines[0], "cpu0 out 0x00f4 ← 0x47 (1 bytes, debug-exit)");
        assert_eq!(lines[29], "cpu0 read 0x00001000 → 0x04030201 (4 bytes, no device)");
        assert_eq!(lines[30], "cpu0 out 0x0010 ← 0x4141 (2 bytes, no device) and 9 more");
        assert_eq!(lines[31], "cpu0 shutdown");
    }

    #[test]
    fn many_cpus_share_the_room_and_come_in_their_order() {
        let (home, buses) = (LastExits::default(), Builder::default().finish());
        let mut cpus: Vec<_> = (0..3).map(|cpu| home.of_cpu(cpu)).collect();
        for last in &mut cpus {
            (0..50).for_each(|_| last.leave(&Exit::Halt, &buses));
        }
        cpus.into_iter().rev().for_each(drop);
        let Recent { lines, by_cpu, .. } = home.recent(&buses);
        assert!(by_cpu && lines.len() == 30 && lines[0] == "cpu0 hlt" && lines[29] == "cpu2 hlt", "{lines:?}");
    }

    #[test]
    fn a_value_is_what_its_bytes_say() {
        let (home, buses) = (LastExits::default(), Builder::default().finish());
        for (width, value) in [(1, "0x01"), (2, "0x0201"), (4, "0x04030201"), (8, "0x0807060504030201")] {
            let data = &mut [1, 2, 3, 4, 5, 6, 7, 8][..width];
            home.of_cpu(0).leave(&Exit::Read { space: Space::Mmio, addr: 0, width, data }, &buses);
            let lines = home.recent(&buses).lines;
            assert_eq!(*lines.last().unwrap(), format!("cpu0 read 0x00000000 → {value} ({width} bytes, no device)"));
        }
    }
}
