//! The console (VIRTIO 1.3 §5.3): one port, hvc0 of Linux.
//!
//! Invariants: nobody waits here. What the far end does not take now stays with the guest, as a chain that it does not get
//! back yet; what comes for the guest stays with its sender until the guest has room, so that no byte is ever held here.

use std::os::fd::BorrowedFd;

use anyhow::Result;

use super::{Active, Chain, Kind, Queue, VirtioDevice, Wake};
use crate::bus::Saved;
use crate::console::Terminal;
use crate::device::{Stateless, unwrap, wrap};

/// Of the saved state.
const VERSION: u32 = 1;

const KIND: Kind = Kind { name: "virtio-console", id: 3, class: 0x07_8000, queues: &[64, 64] };
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// Columns and rows are valid; a byte can be written to the configuration space (§5.3.3).
const SIZE: u64 = 1 << 0;
const EMERGENCY_WRITE: u64 = 1 << 2;
/// cols, rows, max_nr_ports, emerg_wr (§5.3.4).
const SPACE: usize = 12;
const EMERGENCY: usize = 8;

/// Bytes moved at once.
const CHUNK: usize = 4096;
/// Bytes of the guest's in one call: others share the thread.
const MOST: usize = 64 * CHUNK;

/// The device.
pub struct Console {
    // Wires
    far: Box<dyn Terminal>,
    // State: none while nothing is in flight
    /// A chain whose bytes the far end has not all taken.
    sending: Option<Chain>,
    /// Bytes read from it that are still to go, from `start` on.
    bytes: Vec<u8>,
    start: usize,
    /// What the driver was told last.
    size: Option<[u16; 2]>,
}

impl Console {
    /// A console with its far end.
    pub fn new(far: Box<dyn Terminal>) -> Self {
        let size = far.size();
        Self { far, sending: None, bytes: Vec::new(), start: 0, size }
    }

    /// The bytes of a chain that are to go next; none at its end.
    fn rest(&mut self, chain: &mut Chain) -> &[u8] {
        if self.start >= self.bytes.len() {
            self.bytes.resize(CHUNK, 0);
            let count = chain.read(&mut self.bytes);
            self.bytes.truncate(count);
            self.start = 0;
        }
        self.bytes.get(self.start..).unwrap_or_default()
    }

    /// Passes on what the guest sends; true where there is more than one call may take.
    fn transmit(&mut self, queue: &mut Queue) -> bool {
        let mut done = 0;
        while let Some(mut chain) = self.sending.take().or_else(|| queue.pop()) {
            while !self.rest(&mut chain).is_empty() {
                let rest = self.bytes.get(self.start..).unwrap_or_default();
                let taken = if done < MOST { self.far.put(rest) } else { 0 };
                self.start += taken;
                done += taken;
                if taken == 0 {
                    self.sending = Some(chain);
                    return done >= MOST;
                }
            }
            queue.push(chain);
        }
        false
    }

    /// Gives the guest what there is for it, as far as it has room.
    fn receive(&mut self, queue: &mut Queue) {
        let mut bytes = [0; CHUNK];
        while queue.is_ready()
            && self.far.waiting()
            && let Some(mut chain) = queue.pop()
        {
            let room = CHUNK.min(chain.left_to_write() as usize);
            let count = self.far.get(bytes.get_mut(..room).unwrap_or_default());
            chain.write(bytes.get(..count).unwrap_or_default());
            queue.push(chain);
        }
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> Kind {
        KIND
    }

    fn features(&self) -> u64 {
        EMERGENCY_WRITE | if self.far.size().is_some() { SIZE } else { 0 }
    }

    fn space(&self) -> Vec<u8> {
        let [columns, rows] = self.far.size().unwrap_or_default().map(u16::to_le_bytes);
        let mut space = [columns, rows].concat();
        space.resize(SPACE, 0);
        space
    }

    fn set_space(&mut self, offset: usize, bytes: &[u8]) {
        // A character for when nothing else works (§5.3.4); what has no room is lost, and nobody waits.
        if let (EMERGENCY, Some(byte)) = (offset, bytes.first())
            && self.far.put(&[*byte]) == 0
        {
            self.far.lose(1);
        }
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.far.bell()]
    }

    fn service(&mut self, wake: Wake, active: &mut Active) {
        if let Some(queue) = active.queues.get_mut(TRANSMIT)
            && self.transmit(queue)
        {
            self.far.ring();
        }
        if let Some(queue) = active.queues.get_mut(RECEIVE) {
            self.receive(queue);
        }
        // Drivers look at the size when it changes; Linux's does so only then.
        let size = self.far.size();
        if active.features & SIZE != 0 && (size != self.size || wake == Wake::Start) {
            active.space_changed = true;
            self.size = size;
        }
    }

    fn drain(&mut self, active: &mut Active) {
        let Some(chain) = self.sending.take() else { return };
        let rest = self.bytes.get(self.start..).unwrap_or_default();
        let left = rest.len() - self.far.put(rest).min(rest.len());
        self.far.lose(left as u64 + u64::from(chain.left_to_read()));
        self.bytes.clear();
        if let Some(queue) = active.queues.get_mut(TRANSMIT) {
            queue.push(chain);
        }
    }

    fn save(&self) -> Saved {
        wrap(VERSION, &Stateless {})
    }

    fn load(&mut self, saved: &Saved) -> Result<()> {
        unwrap(KIND.name, VERSION, saved).map(|Stateless {}| ())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::{Mutex, MutexGuard};

    use proptest::prelude::*;
    use rustix::fd::AsFd;

    use super::super::tests::{Driver, Rig};
    use super::*;
    use crate::host::output::Bell;

    #[derive(Default)]
    struct End {
        shown: Vec<u8>,
        /// Bytes that it takes now.
        room: usize,
        lost: u64,
        typed: VecDeque<u8>,
        asked: bool,
        size: Option<[u16; 2]>,
        rung: usize,
    }

    #[derive(Clone)]
    struct Far(std::sync::Arc<Mutex<End>>, Bell);

    impl Far {
        fn new(room: usize, size: Option<[u16; 2]>) -> Self {
            let end = End { room, size, ..End::default() };
            Self(std::sync::Arc::new(Mutex::new(end)), Bell::new().unwrap())
        }

        fn end(&self) -> MutexGuard<'_, End> {
            self.0.lock().unwrap()
        }

        /// What was shown, and how much was lost.
        fn seen(&self) -> (Vec<u8>, u64) {
            let end = self.end();
            (end.shown.clone(), end.lost)
        }
    }

    impl Terminal for Far {
        fn put(&mut self, bytes: &[u8]) -> usize {
            let mut end = self.end();
            let count = bytes.len().min(end.room);
            end.room -= count;
            end.shown.extend_from_slice(&bytes[..count]);
            count
        }

        fn lose(&mut self, count: u64) {
            self.end().lost += count;
        }

        fn waiting(&self) -> bool {
            let mut end = self.end();
            end.asked = true;
            !end.typed.is_empty()
        }

        fn get(&mut self, into: &mut [u8]) -> usize {
            let mut end = self.end();
            into.iter_mut().map_while(|slot| end.typed.pop_front().map(|byte| *slot = byte)).count()
        }

        fn size(&self) -> Option<[u16; 2]> {
            self.end().size
        }

        fn bell(&self) -> BorrowedFd<'_> {
            self.1.as_fd()
        }

        fn ring(&self) {
            self.end().rung += 1;
        }
    }

    fn rig(far: &Far) -> Rig<Console> {
        Rig::new(Console::new(Box::new(far.clone())))
    }

    #[test]
    fn what_has_no_room_stays_with_the_guest_until_it_has() {
        let far = Far::new(7, None);
        let mut rig = rig(&far);
        assert!(rig.ask(TRANSMIT, &[b"hello, ", b"world"], &[]).is_none());
        rig.drivers[TRANSMIT].add(&[b"!"], &[]);
        rig.kick(TRANSMIT);
        assert_eq!((far.end().shown.as_slice(), rig.drivers[TRANSMIT].out()), (&b"hello, "[..], 2));
        far.end().room = 100;
        rig.wake(Wake::Source(0));
        assert_eq!(far.seen(), (b"hello, world!".to_vec(), 0));
        assert!(rig.drivers[TRANSMIT].used().is_some() && rig.drivers[TRANSMIT].used().is_some());
    }

    #[test]
    fn one_call_passes_on_so_much_and_the_next_one_the_rest() {
        let far = Far::new(usize::MAX, None);
        let mut rig = rig(&far);
        let much = vec![b'x'; 2 * MOST / 16];
        let parts: Vec<&[u8]> = (0..16).map(|_| much.as_slice()).collect();
        rig.drivers[TRANSMIT].add_indirect(&parts[..12], &[]);
        rig.kick(TRANSMIT);
        let rung = far.end().rung;
        assert_eq!((far.seen().0.len(), rung, rig.drivers[TRANSMIT].out()), (MOST, 1, 1));
        rig.wake(Wake::Source(0));
        assert_eq!((far.end().shown.len(), rig.drivers[TRANSMIT].out()), (12 * much.len(), 1));
        assert!(rig.drivers[TRANSMIT].used().is_some());
    }

    #[test]
    fn what_is_typed_waits_for_buffers_and_none_is_held_here() {
        let far = Far::new(0, None);
        let mut rig = rig(&far);
        far.end().typed.extend(b"abcdefgh");
        rig.wake(Wake::Source(0));
        assert_eq!(far.end().typed.len(), 8);
        let used = rig.ask(RECEIVE, &[], &[2, 3]).unwrap();
        assert_eq!((used.written.as_slice(), far.end().typed.len()), (&b"abcde"[..], 3));
        assert_eq!(rig.ask(RECEIVE, &[], &[100]).unwrap().written, b"fgh");
        assert!(rig.ask(RECEIVE, &[], &[100]).is_none());
        far.end().typed.extend(b"i");
        rig.wake(Wake::Source(0));
        assert_eq!(rig.drivers[RECEIVE].used().unwrap().written, b"i");
    }

    #[test]
    fn nobody_is_asked_for_input_before_the_guest_listens() {
        let far = Far::new(0, None);
        let mut rig = rig(&far);
        assert!(std::mem::take(&mut far.end().asked));
        let mut silent = Driver::new(&rig.memory, 0, 64, 0);
        silent.ring = super::super::Ring::default();
        rig.active.queues[RECEIVE] = silent.queue();
        rig.wake(Wake::Start);
        assert!(!far.end().asked);
    }

    #[test]
    fn the_driver_is_told_of_the_size_first_and_when_it_changes() {
        let far = Far::new(0, Some([80, 25]));
        let mut rig = rig(&far);
        assert!(std::mem::take(&mut rig.active.space_changed) && rig.device.features() & SIZE != 0);
        assert_eq!(rig.device.space(), [80, 0, 25, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        rig.wake(Wake::Source(0));
        assert!(!rig.active.space_changed);
        far.end().size = Some([132, 43]);
        rig.wake(Wake::Source(0));
        assert!(rig.active.space_changed && rig.device.space().starts_with(&[132, 0, 43, 0]));
        assert_eq!(Console::new(Box::new(Far::new(0, None))).features() & SIZE, 0);
    }

    #[test]
    fn a_character_can_be_written_without_queues_and_waits_for_nobody() {
        let far = Far::new(1, None);
        let mut console = Console::new(Box::new(far.clone()));
        console.set_space(EMERGENCY, b"A\0\0\0");
        console.set_space(EMERGENCY, b"B\0\0\0");
        console.set_space(0, b"C");
        assert_eq!(far.seen(), (b"A".to_vec(), 1));
    }

    #[test]
    fn a_driver_that_goes_has_its_chain_and_what_was_left_of_it_is_counted() {
        let far = Far::new(3, None);
        let mut rig = rig(&far);
        assert!(rig.ask(TRANSMIT, &[&[b'x'; 5000]], &[]).is_none());
        far.end().room = 2;
        rig.device.drain(&mut rig.active);
        assert!(rig.drivers[TRANSMIT].used().is_some());
        assert_eq!(far.seen(), (b"xxxxx".to_vec(), 4995));
        far.end().room = 100;
        assert!(rig.ask(TRANSMIT, &[b"next"], &[]).is_some() && far.end().shown.ends_with(b"next"));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Send(Vec<usize>, usize),
        Listen(Vec<u32>, usize),
        Type(usize),
        Room(usize),
        Drain,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (prop::collection::vec(0..6000usize, 0..4), 0..2usize).prop_map(|(sizes, odd)| Step::Send(sizes, odd)),
            (prop::collection::vec(0..6000u32, 0..4), 0..2usize).prop_map(|(sizes, odd)| Step::Listen(sizes, odd)),
            (0..9000usize).prop_map(Step::Type),
            (0..20_000usize).prop_map(Step::Room),
            Just(Step::Drain),
        ]
    }

    proptest! {
        /// Chains may be empty, or have parts in the wrong direction: what is read is shown or counted, and what is typed
        /// arrives, both in their order.
        #[test]
        fn whatever_the_driver_does_no_byte_is_lost_twice_or_out_of_order(steps in prop::collection::vec(step(), 1..40)) {
            let far = Far::new(0, None);
            let mut rig = rig(&far);
            let (mut sent, mut typed, mut heard) = (0u64, 0u64, Vec::new());
            let mut shown_or_lost = 0;
            for step in steps {
                match step {
                    Step::Send(sizes, odd) if rig.drivers[TRANSMIT].out() < 8 => {
                        let parts: Vec<Vec<u8>> = sizes.iter().map(|size| {
                            (0..*size).map(|_| { sent += 1; sent as u8 }).collect()
                        }).collect();
                        let parts: Vec<_> = parts.iter().map(Vec::as_slice).collect();
                        let room = vec![8; odd + usize::from(parts.is_empty())];
                        rig.drivers[TRANSMIT].add(&parts, &room);
                        rig.kick(TRANSMIT);
                    }
                    Step::Listen(sizes, odd) if rig.drivers[RECEIVE].out() < 8 => {
                        let read = vec![&b"odd"[..]; odd + usize::from(sizes.is_empty())];
                        rig.drivers[RECEIVE].add(&read, &sizes);
                        rig.kick(RECEIVE);
                    }
                    Step::Type(count) => {
                        far.end().typed.extend((0..count).map(|_| { typed += 1; typed as u8 }));
                        rig.wake(Wake::Source(0));
                    }
                    Step::Room(room) => {
                        far.end().room = room;
                        rig.wake(Wake::Source(0));
                    }
                    Step::Drain => rig.device.drain(&mut rig.active),
                    _ => {}
                }
                while rig.drivers[TRANSMIT].used().is_some() {}
                while let Some(used) = rig.drivers[RECEIVE].used() {
                    heard.extend(used.written);
                }
                let end = far.end();
                prop_assert!(shown_or_lost <= end.shown.len() as u64 + end.lost);
                shown_or_lost = end.shown.len() as u64 + end.lost;
                if end.lost == 0 {
                    prop_assert!(end.shown.iter().zip(1u64..).all(|(byte, at)| *byte == at as u8));
                }
            }
            far.end().room = usize::MAX;
            (0..20).for_each(|_| rig.wake(Wake::Source(0)));
            let end = far.end();
            prop_assert_eq!(end.shown.len() as u64 + end.lost, sent);
            prop_assert!(heard.iter().zip(1u64..).all(|(byte, at)| *byte == at as u8));
            prop_assert_eq!(heard.len() as u64 + end.typed.len() as u64, typed);
            prop_assert!(!rig.is_broken());
        }
    }
}
