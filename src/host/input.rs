//! Input for a guest: a bounded queue between a descriptor and a device.
//!
//! Nothing is read before the guest first asks, so that a machine that never listens leaves stdin alone; and nothing
//! while [`CAPACITY`] bytes wait, so that a flood stays with its sender. The escape key (ctrl-a) is found here.
//!
//! Lock order: the one lock here is innermost.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::output::Bell;

/// Bytes that wait at the most.
pub const CAPACITY: usize = 4096;
/// Where reading goes on after a pause.
const LOW: usize = CAPACITY / 2;

/// The device's end, and the event loop's.
pub struct Input {
    queue: Mutex<VecDeque<u8>>,
    bell: Bell,
    /// Rings at a device that nobody else tells of input.
    device: OnceLock<Bell>,
    /// The queue may hold something.
    filled: AtomicBool,
    wanted: AtomicBool,
    used: AtomicBool,
    paused: AtomicBool,
    ended: AtomicBool,
}

impl Input {
    /// An empty queue; `bell` rings when the event loop should read.
    pub fn new(bell: Bell) -> Arc<Self> {
        let no = || AtomicBool::new(false);
        let queue = Mutex::new(VecDeque::with_capacity(CAPACITY));
        let device = OnceLock::new();
        Arc::new(Self { queue, bell, device, filled: no(), wanted: no(), used: no(), paused: no(), ended: no() })
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on `bell` rings when there is input.
    pub fn tell(&self, bell: Bell) {
        let _ = self.device.set(bell);
    }

    /// There are bytes for the guest. The first call starts the reading.
    pub fn waiting(&self) -> bool {
        self.want();
        self.filled.load(Ordering::Acquire)
    }

    fn want(&self) {
        if !self.wanted.load(Ordering::Relaxed) && !self.wanted.swap(true, Ordering::SeqCst) {
            self.bell.ring();
        }
    }

    /// The next byte for the guest. The first call starts the reading.
    pub fn get(&self) -> Option<u8> {
        if !self.waiting() {
            return None;
        }
        let mut queue = self.lock();
        let byte = queue.pop_front();
        if queue.is_empty() {
            self.filled.store(false, Ordering::Release);
        }
        self.used.store(byte.is_some() || self.used.load(Ordering::Relaxed), Ordering::Relaxed);
        if queue.len() <= LOW && self.paused.swap(false, Ordering::SeqCst) {
            self.bell.ring();
        }
        byte
    }

    /// All that the sender sent has been taken, and no more will come.
    pub fn hung_up(&self) -> bool {
        self.ended.load(Ordering::Acquire) && !self.filled.load(Ordering::Acquire)
    }

    /// The guest has asked for input.
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
    }

    /// The guest has taken a byte.
    pub fn is_used(&self) -> bool {
        self.used.load(Ordering::Relaxed)
    }

    /// How many bytes there is room for. None: reading pauses until the bell rings.
    pub fn room(&self) -> usize {
        let room = CAPACITY.saturating_sub(self.lock().len());
        if room == 0 {
            self.paused.store(true, Ordering::SeqCst);
            // The guest may have taken bytes since.
            return CAPACITY.saturating_sub(self.lock().len());
        }
        room
    }

    /// Adds what was read; `bytes` fits the room that [`Input::room`] gave.
    pub fn put(&self, bytes: &[u8]) {
        let mut queue = self.lock();
        let room = CAPACITY.saturating_sub(queue.len());
        queue.extend(bytes.iter().take(room));
        self.filled.store(!queue.is_empty(), Ordering::Release);
        drop(queue);
        if let Some(device) = self.device.get() {
            device.ring();
        }
    }

    /// The sender has ended.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// Another sender is there.
    pub fn begin(&self) {
        self.ended.store(false, Ordering::Release);
    }
}

/// What keys of an interactive console ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// Leave.
    Quit,
    /// Show what the machine is doing.
    Report,
    /// Show the keys.
    Help,
}

/// Finds ctrl-a sequences in what a person types.
#[derive(Debug, Default)]
pub struct Keys {
    escaped: bool,
}

/// ctrl-a.
const ESCAPE: u8 = 1;

/// The keys, for `ctrl-a h`.
pub const HELP: &str = "keys: ctrl-a x  leave\n      ctrl-a r  report: registers, page walks, instructions\n      ctrl-a h  this help\n      ctrl-a ctrl-a  send ctrl-a to the guest";

impl Keys {
    /// Moves what is for the guest into `guest`, and gives what is for Bantam.
    pub fn sort(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> Vec<Key> {
        let mut keys = Vec::new();
        for &byte in typed {
            match (std::mem::take(&mut self.escaped), byte) {
                (false, ESCAPE) => self.escaped = true,
                (true, b'x' | b'X') => keys.push(Key::Quit),
                (true, b'r' | b'R') => keys.push(Key::Report),
                (true, b'h' | b'H' | b'?') => keys.push(Key::Help),
                (true, ESCAPE) => guest.push(ESCAPE),
                // Not a key of ours: the guest gets what was typed.
                (true, other) => guest.extend([ESCAPE, other]),
                (false, other) => guest.push(other),
            }
        }
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_across_reads_and_the_rest_passes() {
        let mut keys = Keys::default();
        let mut guest = Vec::new();
        assert_eq!(keys.sort(b"ab\x01", &mut guest), []);
        assert_eq!(keys.sort(b"xc\x01h\x01r\x01\x01\x01z", &mut guest), [Key::Quit, Key::Help, Key::Report]);
        assert_eq!(guest, b"abc\x01\x01z");
    }

    #[test]
    fn the_queue_is_bounded_and_reading_resumes() {
        let input = Input::new(Bell::new().unwrap());
        assert!(!input.is_wanted());
        assert_eq!(input.get(), None);
        assert!(input.is_wanted() && !input.is_used());
        input.put(&vec![7; 2 * CAPACITY]);
        assert_eq!(input.room(), 0);
        let mut rung = [0; 8];
        rustix::io::read(&input.bell, &mut rung).unwrap();
        for _ in 0..=LOW {
            assert_eq!(input.get(), Some(7));
        }
        rustix::io::read(&input.bell, &mut rung).unwrap();
        assert_eq!(input.room(), LOW + 1);
        input.end();
        assert!(!input.hung_up());
        while input.get().is_some() {}
        assert!(input.hung_up() && input.is_used());
    }
}
