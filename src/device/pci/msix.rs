//! MSI-X (PCI Local Bus 3.0 §6.8.2): a table of messages, one for each reason to interrupt.
//!
//! Invariant: a message is sent only while the function and the table's entry let it; else it is pending, and sent when
//! they do again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::irq::{IrqLine, MessageLine};

/// The capability's id.
pub const CAPABILITY: u8 = 0x11;
/// Bits of message control that a guest can change: enable, function mask.
pub const CONTROL: u16 = ENABLE | MASK;
const ENABLE: u16 = 1 << 15;
const MASK: u16 = 1 << 14;
/// Bytes of a table entry.
pub const ENTRY: u64 = 16;
/// Of an entry's vector control: masked.
const MASKED: u32 = 1;

/// One interrupt.
struct Vector {
    line: Box<dyn MessageLine>,
    gate: Mutex<Gate>,
}

struct Gate {
    blocked: bool,
    pending: bool,
}

impl Vector {
    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IrqLine for Vector {
    fn pulse(&self) {
        let mut gate = self.gate();
        match gate.blocked {
            true => gate.pending = true,
            false => self.line.pulse(),
        }
    }

    fn set(&self, high: bool) {
        if high {
            self.pulse();
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    address: u64,
    data: u32,
    masked: bool,
}

/// After power-on every entry is masked.
const FRESH: Entry = Entry { address: 0, data: 0, masked: true };

/// The saved state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    entries: Vec<Entry>,
    pending: Vec<bool>,
}

/// A message must not be sent now.
fn blocked(control: u16, entry: &Entry) -> bool {
    control & CONTROL != ENABLE || entry.masked
}

/// The table of one function.
pub struct Msix {
    // Wires
    vectors: Vec<Arc<Vector>>,
    // State
    entries: Vec<Entry>,
    control: u16,
}

impl Msix {
    /// A table with one entry for each line.
    pub fn new(lines: Vec<Box<dyn MessageLine>>) -> Self {
        let vector = |line| Arc::new(Vector { line, gate: Mutex::new(Gate { blocked: true, pending: false }) });
        let vectors: Vec<_> = lines.into_iter().map(vector).collect();
        let entries = vec![FRESH; vectors.len()];
        Self { vectors, entries, control: 0 }
    }

    /// How many entries it has.
    pub fn size(&self) -> usize {
        self.entries.len()
    }

    /// The guest uses MSI-X.
    pub fn is_enabled(&self) -> bool {
        self.control & ENABLE != 0
    }

    /// The wire of one entry.
    pub fn line(&self, vector: u16) -> Option<Arc<dyn IrqLine>> {
        self.vectors.get(usize::from(vector)).map(|vector| vector.clone() as Arc<dyn IrqLine>)
    }

    /// The guest writes message control.
    pub fn set_control(&mut self, control: u16) {
        if self.control != control & CONTROL {
            self.control = control & CONTROL;
            (0..self.entries.len()).for_each(|index| self.apply(index));
        }
    }

    /// Opens or closes the gate of an entry.
    fn apply(&self, index: usize) {
        let (Some(entry), Some(vector)) = (self.entries.get(index), self.vectors.get(index)) else { return };
        let blocked = blocked(self.control, entry);
        let mut gate = vector.gate();
        if !blocked {
            vector.line.route(entry.address, entry.data);
        }
        gate.blocked = blocked;
        if !blocked && std::mem::take(&mut gate.pending) {
            vector.line.pulse();
        }
    }

    fn word(&self, offset: u64) -> Option<(usize, u64)> {
        let index = usize::try_from(offset / ENTRY).ok().filter(|index| *index < self.entries.len())?;
        Some((index, (offset % ENTRY) & !3))
    }

    /// Reads four bytes of the table.
    pub fn read(&self, offset: u64) -> u32 {
        let Some((entry, field)) = self.word(offset).and_then(|(i, field)| Some((self.entries.get(i)?, field))) else {
            return 0;
        };
        match field {
            0 => (entry.address & 0xffff_ffff) as u32,
            4 => (entry.address >> 32) as u32,
            8 => entry.data,
            _ => u32::from(entry.masked),
        }
    }

    /// Writes four bytes of the table.
    pub fn write(&mut self, offset: u64, value: u32) {
        let Some((index, field)) = self.word(offset) else { return };
        let Some(entry) = self.entries.get_mut(index) else { return };
        let before = *entry;
        match field {
            0 => entry.address = entry.address & !0xffff_ffff | u64::from(value & !3),
            4 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
            8 => entry.data = value,
            _ => entry.masked = value & MASKED != 0,
        }
        // One that is not masked must not be changed (§6.8.2.9); if it is, the table still says what is sent.
        if *entry != before {
            self.apply(index);
        }
    }

    /// Reads four bytes of the pending bits.
    pub fn pending(&self, offset: u64) -> u32 {
        let first = usize::try_from(offset & !3).unwrap_or(usize::MAX).saturating_mul(8);
        let bits = self.vectors.iter().skip(first).take(32).enumerate();
        bits.fold(0, |word, (bit, vector)| word | u32::from(vector.gate().pending) << bit)
    }

    /// The state after power-on.
    pub fn reset(&mut self) {
        self.control = 0;
        self.entries.fill(FRESH);
        for vector in &self.vectors {
            *vector.gate() = Gate { blocked: true, pending: false };
        }
    }

    /// The state; message control is in the configuration space.
    pub fn save(&self) -> State {
        let pending = self.vectors.iter().map(|vector| vector.gate().pending).collect();
        State { entries: self.entries.clone(), pending }
    }

    /// Whether a state can be one of this table, with message control.
    ///
    /// # Errors
    /// It has another number of entries, or holds back what it may send.
    pub fn check(&self, state: &State, control: u16) -> Result<()> {
        let reserved = state.entries.iter().any(|entry| entry.address & 3 != 0);
        if state.entries.len() != self.size() || state.pending.len() != self.size() || reserved {
            bail!("its saved MSI-X table is not one of {} entries", self.size());
        }
        let open = |entry: &Entry| !blocked(control, entry);
        if state.entries.iter().zip(&state.pending).any(|(entry, pending)| *pending && open(entry)) {
            bail!("its saved MSI-X table has a message pending that nothing holds back");
        }
        Ok(())
    }

    /// Takes over a state that was checked, with message control.
    pub fn load(&mut self, state: &State, control: u16) {
        self.entries.clone_from(&state.entries);
        self.control = control & CONTROL;
        for (index, (vector, pending)) in self.vectors.iter().zip(&state.pending).enumerate() {
            *vector.gate() = Gate { blocked: true, pending: *pending };
            self.apply(index);
        }
    }
}

#[cfg(test)]
#[allow(missing_docs)]
pub mod tests {
    use super::*;

    /// Remembers where it was pointed and what was sent.
    #[derive(Default, Clone)]
    pub struct TestMessages(Arc<Mutex<Wire>>);

    type Wire = (u64, u32, Vec<(u64, u32)>);

    impl TestMessages {
        pub fn sent(&self) -> Vec<(u64, u32)> {
            self.0.lock().unwrap().2.clone()
        }
    }

    impl IrqLine for TestMessages {
        fn pulse(&self) {
            let mut wire = self.0.lock().unwrap();
            let message = (wire.0, wire.1);
            wire.2.push(message);
        }
        fn set(&self, _high: bool) {}
    }

    impl MessageLine for TestMessages {
        fn route(&self, address: u64, data: u32) {
            let mut wire = self.0.lock().unwrap();
            (wire.0, wire.1) = (address, data);
        }
    }

    #[test]
    fn what_is_masked_is_pending_and_sent_later() {
        let wire = TestMessages::default();
        let mut table = Msix::new(vec![Box::new(wire.clone())]);
        let line = table.line(0).unwrap();
        table.write(0, 0xfee0_0003);
        table.write(8, 0x41);
        table.write(12, 0);
        line.pulse();
        assert_eq!((wire.sent(), table.pending(0)), (vec![], 1));
        table.set_control(ENABLE | MASK);
        assert_eq!(table.pending(0), 1);
        table.set_control(ENABLE);
        assert_eq!((wire.sent(), table.pending(0)), (vec![(0xfee0_0000, 0x41)], 0));
        table.write(12, 1);
        line.pulse();
        line.pulse();
        table.write(8, 0x42);
        table.write(12, 0);
        assert_eq!(wire.sent()[1..], [(0xfee0_0000, 0x42)]);
        assert_eq!([0, 4, 8, 12].map(|at| table.read(at)), [0xfee0_0000, 0, 0x42, 0]);
    }

    #[test]
    fn no_vector_of_the_guests_is_an_index() {
        let mut table = Msix::new(vec![Box::<TestMessages>::default()]);
        assert!(table.line(1).is_none() && table.line(0xffff).is_none());
        for offset in [16, 4096, u64::MAX] {
            table.write(offset, 1);
            assert_eq!((table.read(offset), table.pending(offset)), (0, 0));
        }
    }
}
