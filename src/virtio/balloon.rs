//! The balloon (VIRTIO 1.3 §5.5): the guest gives memory to the host, when asked to and when it has some free.
//!
//! Pages that a guest names are given back as [`Memory::give_back`] does, so they read as zeroes until they are written
//! again, whatever the guest says of them later. Invariant: a chain goes back to its driver after its pages were given
//! back, and in one call no page is given back twice, nor more than `MOST` numbers of pages are looked at.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use anyhow::{Context, Result};
use rustix::fd::AsFd;
use serde::{Deserialize, Serialize};

use super::{Active, Chain, Kind, Queue, VirtioDevice, Wake};
use crate::bus::Saved;
use crate::device::{unwrap, wrap};
use crate::host::output::Bell;
use crate::memory::{Memory, Span};

/// Of the saved state.
const VERSION: u32 = 1;

/// For: filling, emptying, statistics, hints, reports of free pages (§5.5.2). Linux counts only the queues that it uses, and
/// 6.12 oopses when its driver goes and there was a gap; so all are offered, and a queue whose feature was not taken may be
/// that of the reports.
const KIND: Kind = Kind { name: "virtio-balloon", id: 5, class: 0xff_0000, queues: &[128, 128, 128, 128, 128] };
const INFLATE: usize = 0;
const DEFLATE: usize = 1;

/// Statistics, which nobody asks for; hints of free pages, likewise (§5.5.3).
const STATISTICS: u64 = 1 << 1;
const HINTS: u64 = 1 << 3;
/// The guest may take pages out of the balloon rather than run out of memory; it reports free pages (§5.5.3).
const DEFLATE_ON_OOM: u64 = 1 << 2;
const REPORTING: u64 = 1 << 5;

/// num_pages, actual, free_page_hint_cmd_id, poison_val (§5.5.4); the third stays 0: no hints are wanted.
const SPACE: usize = 16;
/// Where in it the driver says how large the balloon is.
const ACTUAL: usize = 4;
/// The size of a balloon's pages, whatever the guest's own are (§5.5.6).
pub const PAGE: u64 = 4096;
/// Numbers of pages, and parts of free memory, that are looked at in one call: Linux has 256, and 32, in a chain.
const MOST: usize = 4096;
/// Of free memory, after which others have their turn: the host takes milliseconds for so many.
const MOST_BYTES: u64 = 64 << 20;

/// What the host wants of a balloon, and what it knows of it.
pub struct Wish {
    bell: Bell,
    target: AtomicU32,
    actual: AtomicU32,
    given_back: AtomicU64,
    ignored: AtomicU64,
}

/// What is known of a balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// How many bytes it shall hold.
    pub target: u64,
    /// How many it holds, as the guest says.
    pub actual: u64,
    /// How many have gone back to the host in all, by the balloon or because they were free; some of them more than once.
    pub given_back: u64,
    /// How often a guest named a page that it has not.
    pub ignored: u64,
}

impl Wish {
    /// The balloon shall be empty.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new() -> rustix::io::Result<Arc<Self>> {
        let (target, actual, given_back, ignored) = Default::default();
        Ok(Arc::new(Self { bell: Bell::new()?, target, actual, given_back, ignored }))
    }

    /// The balloon shall hold so many bytes; what is not a whole page does not count.
    pub fn aim(&self, bytes: u64) {
        self.target.store(u32::try_from(bytes / PAGE).unwrap_or(u32::MAX), Ordering::Release);
        self.bell.ring();
    }

    /// How things are.
    pub fn told(&self) -> Told {
        let bytes = |pages: &AtomicU32| u64::from(pages.load(Ordering::Acquire)) * PAGE;
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let (given_back, ignored) = (count(&self.given_back), count(&self.ignored));
        Told { target: bytes(&self.target), actual: bytes(&self.actual), given_back, ignored }
    }
}

/// What a machine has of its balloon, if it has one, in all its lives.
pub struct Remote(Option<Arc<Wish>>);

impl Remote {
    /// Of one that it has, or not.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new(has: bool) -> Result<Self> {
        Ok(Self(has.then(Wish::new).transpose().context("eventfd")?))
    }

    /// How many bytes it holds.
    pub fn actual(&self) -> Option<u64> {
        self.0.as_ref().map(|wish| wish.told().actual)
    }

    /// How it is, as JSON, after it was told how large it shall be in a machine of so much RAM.
    ///
    /// # Errors
    /// There is none, or so much RAM.
    pub fn ask(&self, size: Option<u64>, memory: u64) -> Result<String, String> {
        let wish = self.0.as_ref().ok_or("this machine has no balloon; start it with --balloon")?;
        match size {
            Some(size) if size > memory => return Err(format!("the machine has {memory} bytes of RAM in all")),
            Some(size) => wish.aim(size),
            None => {}
        }
        serde_json::to_string(&wish.told()).map_err(|e| e.to_string())
    }

    /// The device.
    pub fn device(&self) -> Option<Box<dyn VirtioDevice>> {
        self.0.clone().map(|wish| Box::new(Balloon::new(wish)) as _)
    }
}

/// The device. What it shall hold is the host's to say, in [`Wish`], and not part of its state: a driver that comes anew is
/// told the same.
pub struct Balloon {
    // Wires
    wish: Arc<Wish>,
    // State: none but `wish.actual` while nothing is in flight
    /// A chain of which numbers are left.
    inflating: Option<Chain>,
    /// The target that the driver was told last; one that starts knows of none.
    told: u32,
    /// Of this call: what to give back, and the chains that go back then, by their queues.
    spans: Vec<Span>,
    chains: Vec<(usize, Chain)>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    actual: u32,
}

impl Balloon {
    /// An empty balloon.
    pub fn new(wish: Arc<Wish>) -> Self {
        Self { wish, inflating: None, told: 0, spans: Vec::new(), chains: Vec::new() }
    }

    /// Notes the pages of chains in the first queue; false where more than may be looked at in a call are left.
    fn inflate(&mut self, queue: &mut Queue) -> bool {
        let mut left = MOST;
        while let Some(mut chain) = self.inflating.take().or_else(|| queue.pop()) {
            let mut number = [0; 4];
            while left > 0 && chain.read(&mut number) == number.len() {
                self.spans.push(Span { start: u64::from(u32::from_le_bytes(number)) * PAGE, size: PAGE });
                left -= 1;
            }
            if left == 0 && chain.left_to_read() > 0 {
                self.inflating = Some(chain);
                return false;
            }
            self.chains.push((INFLATE, chain));
        }
        true
    }

    /// Notes the free memory that chains in a queue describe; false as above.
    fn report(&mut self, index: usize, queue: &mut Queue) -> bool {
        let (mut left, mut bytes) = (MOST, 0);
        while left > 0 && bytes < MOST_BYTES {
            let Some(chain) = queue.pop() else { return true };
            let parts = chain.writable();
            left = left.saturating_sub(parts.len());
            bytes += u64::from(chain.left_to_write());
            self.spans.extend(parts.iter().filter_map(|part| Span::new(part.addr, part.size.into())));
            self.chains.push((index, chain));
        }
        false
    }

    /// Gives back what was noted, each page once.
    fn give_back(&mut self, memory: &Memory) {
        self.spans.sort_unstable();
        let mut spans = self.spans.drain(..).filter(|span| {
            let inside = memory.contains(*span);
            self.wish.ignored.fetch_add(u64::from(!inside), Ordering::Relaxed);
            inside
        });
        let mut run = spans.next();
        while let Some(span) = run {
            run = spans.next();
            // One behind or upon the other are one.
            let joined = run.filter(|next| next.start <= span.start + span.size);
            if let Some(next) = joined {
                let end = (span.start + span.size).max(next.start + next.size);
                run = Some(Span { start: span.start, size: end - span.start });
                continue;
            }
            self.wish.given_back.fetch_add(memory.give_back(span), Ordering::Relaxed);
        }
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> Kind {
        KIND
    }

    fn features(&self) -> u64 {
        STATISTICS | DEFLATE_ON_OOM | HINTS | REPORTING
    }

    fn space(&self) -> Vec<u8> {
        let pages = |pages: &AtomicU32| pages.load(Ordering::Acquire).to_le_bytes();
        let mut space = [pages(&self.wish.target), pages(&self.wish.actual)].concat();
        space.resize(SPACE, 0);
        space
    }

    fn set_space(&mut self, offset: usize, bytes: &[u8]) {
        if let (ACTUAL, Some(bytes)) = (offset, bytes.first_chunk()) {
            self.wish.actual.store(u32::from_le_bytes(*bytes), Ordering::Release);
        }
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.wish.bell.as_fd()]
    }

    fn service(&mut self, wake: Wake, active: &mut Active) {
        let target = self.wish.target.load(Ordering::Acquire);
        if wake == Wake::Start {
            self.told = 0;
        }
        active.space_changed = self.told != target;
        self.told = target;
        let Active { queues, features, .. } = active;
        let mut all = true;
        for (index, queue) in queues.iter_mut().enumerate() {
            all &= match index {
                INFLATE => self.inflate(queue),
                // Pages come back by being touched.
                DEFLATE => {
                    while let Some(chain) = queue.pop() {
                        queue.push(chain);
                    }
                    true
                }
                2 if *features & STATISTICS != 0 => true,
                3 if *features & HINTS != 0 => true,
                _ if *features & REPORTING != 0 => self.report(index, queue),
                _ => true,
            };
        }
        if let Some(queue) = queues.first() {
            self.give_back(queue.memory());
        }
        for (index, chain) in self.chains.drain(..) {
            if let Some(queue) = queues.get_mut(index) {
                queue.push(chain);
            }
        }
        if !all {
            self.wish.bell.ring();
        }
    }

    fn drain(&mut self, active: &mut Active) {
        // Pages that are not given back do no harm.
        if let (Some(chain), Some(queue)) = (self.inflating.take(), active.queues.get_mut(INFLATE)) {
            queue.push(chain);
        }
    }

    fn save(&self) -> Saved {
        wrap(VERSION, &State { actual: self.wish.actual.load(Ordering::Acquire) })
    }

    fn load(&mut self, saved: &Saved) -> Result<()> {
        let State { actual } = unwrap(KIND.name, VERSION, saved)?;
        self.wish.actual.store(actual, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::{RAM, Rig};
    use super::*;
    use crate::memory::page_size;

    /// Where the tests' own RAM begins: behind the queues.
    const FREE: u64 = 12 << 20;

    fn rig() -> Rig<Balloon> {
        Rig::new(Balloon::new(Wish::new().unwrap()))
    }

    fn numbers(pages: &[u32]) -> Vec<u8> {
        pages.iter().flat_map(|page| page.to_le_bytes()).collect()
    }

    fn page(number: u64) -> u32 {
        (FREE / PAGE + number) as u32
    }

    /// Bytes of RAM behind the queues that take memory.
    fn taken(memory: &Memory) -> u64 {
        let inside = |span: Span| span.last().saturating_sub(span.start.max(FREE) - 1);
        memory.touched(Span { start: 0, size: RAM }).into_iter().filter(|span| span.last() >= FREE).map(inside).sum()
    }

    fn fill(memory: &Memory) {
        memory.write(FREE, &vec![0x5a; (RAM - FREE) as usize]).unwrap();
        assert_eq!(taken(memory), RAM - FREE);
    }

    #[test]
    fn pages_in_the_balloon_go_back_to_the_host_and_come_back_empty() {
        let mut rig = rig();
        fill(&rig.memory);
        // As many as make whole pages of any host, in any order and some of them twice.
        let all: Vec<u32> = (0..64).rev().chain([5, 7]).map(page).collect();
        assert!(rig.ask(INFLATE, &[&numbers(&all)], &[]).is_some());
        assert_eq!((taken(&rig.memory), rig.device.wish.told().given_back), (RAM - FREE - 64 * PAGE, 64 * PAGE));
        assert!(rig.ask(DEFLATE, &[&numbers(&all)], &[]).is_some());
        let mut byte = [1];
        rig.memory.read(FREE, &mut byte).unwrap();
        assert_eq!(byte, [0]);
        rig.memory.write(FREE, &[7]).unwrap();
        rig.memory.read(FREE, &mut byte).unwrap();
        assert_eq!((byte, rig.device.wish.told().ignored), ([7], 0));
    }

    #[test]
    fn free_memory_that_is_reported_goes_back_on_whichever_queue() {
        for queue in 2..5 {
            // Who takes all features has it in its place; who takes no other, where Linux thinks that it is.
            let features = if queue == 4 { STATISTICS | HINTS | REPORTING } else { REPORTING };
            let mut rig = Rig::with_features(Balloon::new(Wish::new().unwrap()), features);
            fill(&rig.memory);
            // The driver of the tests takes buffers from its own share: there it is touched, and then it is not.
            let before = rig.device.wish.told().given_back;
            let used = rig.ask(queue, &[], &[1 << 20]).unwrap();
            let given = rig.device.wish.told().given_back - before;
            assert!(used.written.is_empty() && given > (1 << 20) - 2 * page_size() && given <= 1 << 20, "{given}");
        }
    }

    #[test]
    fn pages_that_the_guest_has_not_are_counted_and_left_alone() {
        let mut rig = rig();
        fill(&rig.memory);
        let last = (RAM / PAGE) as u32;
        assert!(rig.ask(INFLATE, &[&numbers(&[last, u32::MAX, 0x8000_0000])], &[]).is_some());
        let told = rig.device.wish.told();
        assert_eq!((told.ignored, told.given_back, taken(&rig.memory)), (3, 0, RAM - FREE));
    }

    #[test]
    fn a_long_list_takes_several_calls_and_comes_back_after_the_last() {
        let mut rig = rig();
        fill(&rig.memory);
        // Twice the same: a page of the second half is given back again.
        let all: Vec<u32> = (0..2 * MOST as u64 + 1).map(|at| page(at % 16)).collect();
        assert!(rig.ask(INFLATE, &[&numbers(&all)], &[]).is_none());
        assert_eq!(rig.device.wish.told().given_back, 16 * PAGE);
        rig.wake(Wake::Source(0));
        assert!(rig.drivers[INFLATE].used().is_none());
        rig.wake(Wake::Source(0));
        assert!(rig.drivers[INFLATE].used().is_some());
    }

    #[test]
    fn the_driver_is_told_of_a_new_size_and_says_how_far_it_is() {
        let mut rig = rig();
        let wish = rig.device.wish.clone();
        assert!(!rig.active.space_changed, "there is nothing to tell");
        wish.aim((3 << 20) + 5);
        // Both a driver that is there and one that starts.
        for wake in [Wake::Source(0), Wake::Start] {
            rig.wake(wake);
            assert!(std::mem::take(&mut rig.active.space_changed));
        }
        assert!(rig.device.space().starts_with(&[0, 3, 0, 0, 0, 0, 0, 0]) && rig.device.space().len() == SPACE);
        rig.wake(Wake::Source(0));
        assert!(!rig.active.space_changed);
        let fresh = rig.device.save();
        rig.device.set_space(ACTUAL, &256u32.to_le_bytes());
        rig.device.set_space(0, &[1; 4]);
        rig.device.set_space(6, &[1; 2]);
        let told = wish.told();
        assert_eq!((told.target, told.actual), (3 << 20, 1 << 20));
        let saved = rig.device.save();
        rig.device.load(&fresh).unwrap();
        // A driver that comes anew finds an empty balloon, and the same wish.
        assert_eq!((wish.told().target, wish.told().actual), (3 << 20, 0));
        rig.device.load(&saved).unwrap();
        assert_eq!(rig.device.save(), saved);
    }

    #[test]
    fn a_driver_that_goes_has_all_its_chains() {
        let mut rig = rig();
        rig.drivers[INFLATE].add(&[&numbers(&vec![page(0); MOST + 1])], &[]);
        rig.kick(INFLATE);
        assert!(rig.drivers[INFLATE].used().is_none());
        rig.device.drain(&mut rig.active);
        assert!(rig.drivers[INFLATE].used().is_some() && rig.device.inflating.is_none());
    }

    proptest! {
        /// Whatever is named, in whichever queue: only whole pages that were named lose what they held.
        #[test]
        fn only_what_was_named_is_given_back(
            chains in prop::collection::vec((0..5usize, prop::collection::vec(any::<u16>(), 0..80), 0..4u32), 1..12)
        ) {
            let mut rig = rig();
            fill(&rig.memory);
            let mut named = std::collections::BTreeSet::new();
            let mut outside = 0;
            for (queue, pages, odd) in chains {
                // Most of them are in the last MiBs of RAM, some lie behind it.
                let pages: Vec<u32> = pages.into_iter().map(|at| page(u64::from(at) % 1100)).collect();
                let mut bytes = numbers(&pages);
                bytes.extend(vec![0xff; odd as usize]);
                let room = if queue < 2 { vec![odd] } else { vec![] };
                rig.ask(queue, &[&bytes], &room);
                if queue == INFLATE {
                    outside += pages.iter().filter(|page| u64::from(**page) * PAGE >= RAM).count() as u64;
                    named.extend(pages);
                }
            }
            prop_assert!(!rig.is_broken());
            prop_assert_eq!(rig.device.wish.told().ignored, outside);
            for number in 0..(RAM - FREE) / PAGE {
                let mut byte = [0];
                rig.memory.read(FREE + number * PAGE, &mut byte).unwrap();
                let kept = byte == [0x5a];
                prop_assert!(kept || named.contains(&page(number)), "page {number}");
                prop_assert!(!kept || page_size() > PAGE || !named.contains(&page(number)), "page {number}");
            }
        }
    }
}
