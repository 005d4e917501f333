//! Power cuts: what a guest was told is on the disk must be there, wherever the host's power ends.
//!
//! A guest writes and flushes at random; a host does its work in any order and one piece at a time, into a cache of which
//! only a sync makes anything stay. Each step goes into a log. Then the log is cut after each step, and what the guest knows by
//! then is compared with the least that can be on the disk.

use std::collections::BTreeMap;

use super::*;

const SECTORS: u64 = 64;

/// A small generator of numbers (xorshift), so that a run can be had again.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Event {
    /// The host has this in a sector, in its cache.
    Cached(u64, u8),
    /// The host begins a sync, and is done with it: what was cached before it began stays.
    SyncBegins(usize),
    SyncEnds(usize),
    /// The guest asks for a flush, after it was told that these were written.
    FlushAsked(u16, BTreeMap<u64, u8>),
    /// The guest is told that the flush is done.
    FlushTold(u16),
}

struct Trial {
    rig: Rig,
    host: Arc<Mutex<Host>>,
    log: Vec<Event>,
    /// Syncs that the host has begun, by slot.
    syncs: BTreeMap<usize, usize>,
    /// The guest's own: what it asked for, by head, and what it was told is written.
    asked: BTreeMap<u16, Option<(u64, u8)>>,
    told: BTreeMap<u64, u8>,
    version: u8,
}

impl Trial {
    fn new() -> Self {
        let (rig, host) = Fake::disk(SECTORS * SECTOR);
        let (log, told) = (Vec::new(), BTreeMap::new());
        Self { rig, host, log, syncs: BTreeMap::new(), asked: BTreeMap::new(), told, version: 0 }
    }

    /// The guest asks for something. It has at most one write to a sector under way, as those that care do.
    fn guest(&mut self, dice: &mut Dice) {
        // A chain that is under way keeps its first descriptor, by which the guest knows it.
        if self.asked.len() >= 10 || self.asked.contains_key(&(self.rig.queues[0].descriptor % SIZE)) {
            return;
        }
        if dice.roll(4) == 0 {
            let (head, _) = self.rig.put(0, &[&header(4, 0)], &[1]);
            self.asked.insert(head, None);
            self.log.push(Event::FlushAsked(head, self.told.clone()));
        } else {
            let sector = dice.roll(SECTORS);
            if self.asked.values().flatten().all(|(busy, _)| *busy != sector) {
                self.version = self.version % 250 + 1;
                let (head, _) = self.rig.put(0, &[&header(1, sector), &[self.version; 512]], &[1]);
                self.asked.insert(head, Some((sector, self.version)));
                // From now on it may be the old or the new.
                self.told.remove(&sector);
            }
        }
    }

    /// The host takes a step with any of its jobs.
    fn host(&mut self, dice: &mut Dice) {
        let mut host = self.host.lock().unwrap();
        if host.has.is_empty() {
            return;
        }
        let index = dice.roll(host.has.len() as u64) as usize;
        let (slot, job) = &host.has[index];
        let slot = *slot;
        match job.work {
            Work::Write { .. } => {
                let mut data = [0; 512];
                job.buffers.copy_out(&mut data);
                self.log.push(Event::Cached(job.offset / SECTOR, data[0]));
                host.end(index, Ok(512));
            }
            Work::Sync => match self.syncs.remove(&slot) {
                None => {
                    self.log.push(Event::SyncBegins(self.log.len()));
                    self.syncs.insert(slot, self.log.len() - 1);
                }
                Some(begun) => {
                    self.log.push(Event::SyncEnds(begun));
                    host.end(index, Ok(0));
                }
            },
            other => panic!("{other:?}"),
        }
    }

    /// The device does its work, and the guest looks at what came back.
    fn device(&mut self) {
        self.rig.service();
        while let Some((head, written)) = self.rig.used(0) {
            assert_eq!(written, 1);
            match self.asked.remove(&head).unwrap() {
                Some((sector, version)) => drop(self.told.insert(sector, version)),
                None => self.log.push(Event::FlushTold(head)),
            }
        }
    }
}

/// The first step after which a power cut loses what the guest was promised by then.
fn lost(log: &[Event]) -> Option<usize> {
    let (mut places, mut asked) = (BTreeMap::new(), BTreeMap::new());
    // Up to which step the log must have been on the disk by now, and up to which it was.
    let (mut needed, mut stays) = (0, 0);
    for (at, event) in log.iter().enumerate() {
        match event {
            Event::Cached(sector, version) => drop(places.insert((*sector, *version), at)),
            Event::SyncBegins(_) => {}
            Event::SyncEnds(begun) => stays = stays.max(*begun),
            Event::FlushAsked(head, promised) => {
                // What the guest was told is written, but the host never had, is lost for certain.
                let place = |version| places.get(&version).map_or(usize::MAX, |place| place + 1);
                let last = promised.iter().map(|(sector, version)| place((*sector, *version))).max();
                asked.insert(*head, last.unwrap_or(0));
            }
            Event::FlushTold(head) => needed = needed.max(asked[head]),
        }
        if needed > stays {
            return Some(at);
        }
    }
    None
}

#[test]
fn nothing_that_a_flush_promised_is_missing_after_any_cut() {
    let (mut cuts, mut promises) = (0, 0);
    for seed in 1..=12 {
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
        let mut trial = Trial::new();
        // Fewer than 250 writes: each version is there once.
        while trial.version < 200 {
            match dice.roll(3) {
                0 => trial.guest(&mut dice),
                1 => trial.host(&mut dice),
                _ => trial.device(),
            }
        }
        assert_eq!(lost(&trial.log), None, "seed {seed}");
        cuts += trial.log.len();
        promises += trial.log.iter().filter(|event| matches!(event, Event::FlushTold(_))).count();
    }
    assert!(cuts >= 500 && promises >= 100, "{cuts} cuts, {promises} flushes");
}

#[test]
fn the_comparison_finds_a_flush_that_came_too_early() {
    let (cached, asked) = (Event::Cached(3, 7), Event::FlushAsked(0, BTreeMap::from([(3, 7)])));
    let (begins, ends, told) = (Event::SyncBegins(1), Event::SyncEnds(1), Event::FlushTold(0));
    let log = [&cached, &begins, &asked, &ends, &told].map(Clone::clone);
    assert_eq!(lost(&log), None);
    // Without waiting; after a sync that began before the write was there; of what was never there.
    assert_eq!(lost(&[&cached, &begins, &asked, &told].map(Clone::clone)), Some(3));
    assert_eq!(lost(&[Event::SyncBegins(0), cached, asked.clone(), Event::SyncEnds(0), told.clone()]), Some(4));
    assert_eq!(lost(&[asked, Event::SyncBegins(1), Event::SyncEnds(1), told]), Some(3));
}
