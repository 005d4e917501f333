//! The addresses that a guest uses most: the space-saving algorithm (Metwally and others, 2005) over 32 places.
//!
//! A new address takes the place of the rarest, with its count, which is kept as the most that the new one's count may
//! be too high by. Any address that makes more than one in 32 accesses is there. One thread writes, any may read.

use std::sync::atomic::{AtomicU64, Ordering};

use super::histogram::add;
use crate::bus::Space;

const PLACES: usize = 32;
const WRITE: u64 = 1 << 62;
const MMIO: u64 = 1 << 63;
const ADDRESS: u64 = WRITE - 1;

#[derive(Default)]
struct Place {
    key: AtomicU64,
    count: AtomicU64,
    over: AtomicU64,
}

/// The table of one CPU.
#[derive(Default)]
pub struct Addresses {
    places: [Place; PLACES],
}

/// One address, as it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hot {
    /// Ports or memory.
    pub space: Space,
    /// The guest's address.
    pub addr: u64,
    /// The guest wrote.
    pub write: bool,
    /// Accesses, at most `over` too many.
    pub count: u64,
    /// How much too high the count may be.
    pub over: u64,
}

impl Addresses {
    /// Counts an access; gives the place that it is at, which is a good `guess` for the next one.
    pub fn record(&self, space: Space, addr: u64, write: bool, guess: usize) -> usize {
        let key = addr & ADDRESS | if write { WRITE } else { 0 } | if space == Space::Mmio { MMIO } else { 0 };
        if let Some(place) = self.places.get(guess)
            && place.key.load(Ordering::Relaxed) == key
            && place.count.load(Ordering::Relaxed) > 0
        {
            add(&place.count, 1);
            return guess;
        }
        self.search(key)
    }

    fn search(&self, key: u64) -> usize {
        let (mut rarest, mut least) = (0, u64::MAX);
        for (i, place) in self.places.iter().enumerate() {
            let count = place.count.load(Ordering::Relaxed);
            if count > 0 && place.key.load(Ordering::Relaxed) == key {
                add(&place.count, 1);
                return i;
            }
            if count < least {
                (rarest, least) = (i, count);
            }
        }
        if let Some(place) = self.places.get(rarest) {
            place.key.store(key, Ordering::Relaxed);
            place.over.store(least, Ordering::Relaxed);
            place.count.store(least + 1, Ordering::Relaxed);
        }
        rarest
    }

    /// All that is there, on top of `sums`.
    pub fn add_to(&self, sums: &mut Vec<Hot>) {
        for place in &self.places {
            let count = place.count.load(Ordering::Relaxed);
            if count == 0 {
                continue;
            }
            let (key, over) = (place.key.load(Ordering::Relaxed), place.over.load(Ordering::Relaxed));
            let space = if key & MMIO == 0 { Space::Pio } else { Space::Mmio };
            let hot = Hot { space, addr: key & ADDRESS, write: key & WRITE != 0, count, over };
            let same = |h: &&mut Hot| (h.space, h.addr, h.write) == (hot.space, hot.addr, hot.write);
            match sums.iter_mut().find(same) {
                Some(sum) => (sum.count, sum.over) = (sum.count + count, sum.over + over),
                None => sums.push(hot),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_most_survives_a_flood_of_others() {
        let (table, mut guess) = (Addresses::default(), 0);
        for i in 0..10_000u64 {
            guess = table.record(Space::Pio, 0x3f8, true, guess);
            guess = table.record(Space::Mmio, 0x3f8, false, guess);
            guess = table.record(Space::Mmio, 0x1000 + i, true, guess);
        }
        let mut hot = Vec::new();
        table.add_to(&mut hot);
        assert_eq!(hot.len(), PLACES);
        hot.sort_by_key(|h| std::cmp::Reverse(h.count));
        let first = Hot { space: Space::Pio, addr: 0x3f8, write: true, count: 10_000, over: 0 };
        assert!(hot[..2].contains(&first), "{hot:?}");
        assert!(hot[1].count == 10_000 && hot[2].count - hot[2].over <= 1, "{hot:?}");
        table.add_to(&mut hot);
        assert_eq!((hot.len(), hot[0].count), (PLACES, 20_000));
    }
}
