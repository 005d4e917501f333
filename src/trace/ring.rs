//! A row of events that is bounded, what it holds in reserve included.

use std::collections::VecDeque;

/// How many it has room for when the first comes, if it may hold as many.
const LEAST: usize = 32;

/// Something that a ring holds.
pub trait Entry {
    /// Its bytes elsewhere.
    fn text(&self) -> usize {
        0
    }
}

/// What a ring may hold: so many events, and so many bytes of text in all.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    pub events: usize,
    pub text: usize,
}

impl Room {
    /// Three quarters of so many bytes for events, the rest for what a few of them have to say, or all with
    /// `--trace-insn`.
    pub fn of<E>(bytes: usize) -> Self {
        Self { events: bytes / 4 * 3 / size_of::<E>(), text: bytes / 4 }
    }
}

/// Events in a row; the oldest give way, and are counted.
#[derive(Debug)]
pub struct Ring<E> {
    pub events: VecDeque<E>,
    text: usize,
    pub dropped: u64,
}

impl<E> Default for Ring<E> {
    fn default() -> Self {
        Self { events: VecDeque::new(), text: 0, dropped: 0 }
    }
}

impl<E: Entry> Ring<E> {
    pub fn push(&mut self, event: E, room: Room) {
        let text = event.text();
        while self.events.len() >= room.events || self.text + text > room.text {
            let Some(old) = self.events.pop_front() else { break };
            self.text -= old.text();
            self.dropped += 1;
        }
        if self.events.len() == self.events.capacity() {
            // Left to itself it would double, beyond the bound.
            let more = self.events.len().max(LEAST).min(room.events.saturating_sub(self.events.len()));
            self.events.reserve_exact(more);
        }
        self.text += text;
        self.events.push_back(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Text(usize, [u64; 8]);

    impl Entry for Text {
        fn text(&self) -> usize {
            self.0
        }
    }

    #[test]
    fn a_ring_holds_no_more_than_its_room_reserve_and_texts_included() {
        let (bytes, mut ring) = (100 * size_of::<Text>(), Ring::default());
        for number in 0..1000usize {
            ring.push(Text(number % 97, [0; 8]), Room::of::<Text>(bytes));
            let text: usize = ring.events.iter().map(Entry::text).sum();
            assert_eq!(ring.text, text);
            assert!(ring.events.capacity() * size_of::<Text>() + text <= bytes, "{number}");
        }
        assert!(ring.events.len() > 10 && ring.dropped + ring.events.len() as u64 == 1000);
        assert_eq!(ring.events.back().map(|last| last.1.len()), Some(8));
    }
}
