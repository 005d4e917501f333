//! Output to a descriptor whose reader may be slow, stuck or gone.
//!
//! A vCPU pushes bytes into a bounded buffer ([`Output`]); the event loop writes them out ([`Flusher`]), at most
//! [`DELAY`] later, without ever blocking. A full buffer holds the vCPU back until there is room, but for no longer
//! than a second without progress; then bytes are dropped and counted until the reader moves again.
//!
//! Lock order: the one lock here is innermost; nothing else is taken under it.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

/// Bytes that wait at the most.
const CAPACITY: usize = 64 << 10;
/// How long a byte waits before it is written.
pub const DELAY: Duration = Duration::from_millis(8);
/// How long a vCPU waits for a reader that does not move.
const PATIENCE: Duration = Duration::from_secs(1);
/// What a pipe that polls writable takes without blocking: POSIX's least PIPE_BUF.
const PIECE: usize = 512;

/// Rings the event loop's bell. Clones ring the same one.
#[derive(Clone)]
pub struct Bell(Arc<OwnedFd>);

impl Bell {
    /// A bell, not yet rung.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new() -> rustix::io::Result<Self> {
        use rustix::event::{EventfdFlags, eventfd};
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    /// Rings. Never blocks: a counter that is full has been rung already.
    pub fn ring(&self) {
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Somebody who does not wait here, but wants to know when there is room again.
struct Waiter {
    bell: Bell,
    since: Instant,
    /// What had been written by then.
    moved: u64,
}

#[derive(Default)]
struct State {
    bytes: VecDeque<u8>,
    /// The event loop knows that there are bytes.
    armed: bool,
    /// It has been asked to write at once.
    urgent: bool,
    /// Who was told that there is no room.
    waiter: Option<Waiter>,
    /// The reader has not moved for [`PATIENCE`].
    stuck: bool,
    /// The machine is ending: no one waits any more.
    released: bool,
    /// Bytes written in all: whether the reader moves.
    moved: u64,
    lost: u64,
}

struct Shared {
    state: Mutex<State>,
    room: Condvar,
    bell: Bell,
    /// Write at each line end (a person is watching).
    by_line: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end that bytes are pushed into. Clones push into the same buffer.
#[derive(Clone)]
pub struct Output(Arc<Shared>);

impl Output {
    /// Takes one byte; waits for room, with bounds, where there is none.
    pub fn push(&self, byte: u8) {
        self.push_all(&[byte]);
    }

    /// Takes bytes; the same.
    pub fn push_all(&self, mut bytes: &[u8]) {
        let mut state = self.0.lock();
        let mut ring = false;
        while !bytes.is_empty() {
            let mut most = CAPACITY;
            if state.bytes.len() >= CAPACITY {
                state = self.wait_for_room(state);
                // While a machine is stopped its CPUs wait for nobody, and what they still have to say is kept.
                most = if state.released && !state.stuck { 2 * CAPACITY } else { CAPACITY };
            }
            let room = most.saturating_sub(state.bytes.len());
            if room == 0 {
                state.lost += bytes.len() as u64;
                break;
            }
            let (first, rest) = bytes.split_at(room.min(bytes.len()));
            state.bytes.extend(first);
            let urgent = self.0.by_line && first.contains(&b'\n') && !state.urgent;
            ring |= urgent || !state.armed;
            state.armed = true;
            state.urgent |= urgent;
            bytes = rest;
        }
        drop(state);
        if ring {
            self.0.bell.ring();
        }
    }

    /// Takes as many of the bytes as there is room for, and never waits; gives how many. Where that is not all, `bell`
    /// rings when it is worth another try: there is room, or the reader has not moved for so long that bytes are dropped
    /// and counted.
    pub fn offer(&self, bytes: &[u8], bell: &Bell) -> usize {
        let mut state = self.0.lock();
        // What a CPU still has to say while its machine stops has room too.
        let most = if state.released && !state.stuck { 2 * CAPACITY } else { CAPACITY };
        let room = most.saturating_sub(state.bytes.len());
        if room == 0 && state.stuck {
            state.lost += bytes.len() as u64;
            return bytes.len();
        }
        let first = bytes.get(..room).unwrap_or(bytes);
        state.bytes.extend(first);
        let full = first.len() < bytes.len();
        let urgent = !state.urgent && (full || self.0.by_line && first.contains(&b'\n'));
        let ring = urgent || !state.armed && !bytes.is_empty();
        state.armed |= !bytes.is_empty();
        state.urgent |= urgent;
        if full && state.waiter.is_none() {
            let (since, moved) = (Instant::now(), state.moved);
            state.waiter = Some(Waiter { bell: bell.clone(), since, moved });
        }
        drop(state);
        if ring {
            self.0.bell.ring();
        }
        first.len()
    }

    /// Bytes were given up before they came here.
    pub fn lose(&self, count: u64) {
        self.0.lock().lost += count;
    }

    fn wait_for_room<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        if state.stuck || state.released {
            return state;
        }
        state.urgent = true;
        self.0.bell.ring();
        loop {
            let before = state.moved;
            let full = |state: &mut State| state.bytes.len() >= CAPACITY && !state.released;
            let waited = self.0.room.wait_timeout_while(state, PATIENCE, full);
            let timeout;
            (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            if !timeout.timed_out() {
                return state;
            }
            if state.moved == before {
                state.stuck = true;
                return state;
            }
        }
    }

    /// The opposite of [`Output::release`]: the machine starts anew.
    pub fn hold(&self) {
        self.0.lock().released = false;
    }

    /// Lets every waiting vCPU go on; the machine is ending.
    pub fn release(&self) {
        self.0.lock().released = true;
        self.0.room.notify_all();
    }
}

/// What a flush left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// Nothing was waiting.
    Idle,
    /// All that was waiting has been written.
    Written,
    /// The reader takes no more for now.
    Waiting,
}

/// The end that writes.
pub struct Flusher {
    shared: Arc<Shared>,
    target: Target,
    /// Bytes taken out of the buffer and not yet written.
    taken: VecDeque<u8>,
    /// The reader is gone.
    closed: bool,
    /// Readers come and go (a socket): without one, bytes are dropped and that is no loss.
    visited: bool,
}

enum Target {
    /// No one is connected: bytes are dropped, as on a cable without a far end.
    Nowhere,
    /// A description of our own, so that O_NONBLOCK disturbs no one who shares the original.
    Own(OwnedFd),
    Socket(OwnedFd),
    /// A file: does not block.
    File(OwnedFd),
    /// Something that may block: asked first, written in small pieces.
    Ask(OwnedFd),
}

impl Target {
    fn new(fd: OwnedFd) -> rustix::io::Result<Self> {
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
        Ok(match kind {
            FileType::RegularFile | FileType::Directory => Self::File(fd),
            FileType::Socket => Self::Socket(fd),
            _ => match reopen(&fd, OFlags::WRONLY) {
                Ok(own) => Self::Own(own),
                Err(_) => Self::Ask(fd),
            },
        })
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Nowhere => None,
            Self::Own(fd) | Self::Socket(fd) | Self::File(fd) | Self::Ask(fd) => Some(fd.as_fd()),
        }
    }

    fn write(&self, bytes: &[u8]) -> rustix::io::Result<usize> {
        match self {
            Self::Nowhere => Ok(bytes.len()),
            Self::Own(fd) | Self::File(fd) => rustix::io::write(fd, bytes),
            Self::Socket(fd) => {
                use rustix::net::{SendFlags, send};
                send(fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            }
            Self::Ask(fd) => {
                if !writable(fd.as_fd(), Duration::ZERO) {
                    return Err(Errno::AGAIN);
                }
                rustix::io::write(fd, bytes.get(..PIECE).unwrap_or(bytes))
            }
        }
    }
}

/// A second, non-blocking description of what `fd` is open on.
pub fn reopen(fd: impl AsFd, access: OFlags) -> rustix::io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    rustix::fs::open(path, access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
}

fn writable(fd: BorrowedFd<'_>, patience: Duration) -> bool {
    let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(patience.subsec_nanos()) };
    poll(&mut [PollFd::new(&fd, PollFlags::OUT)], Some(&timeout)).is_ok_and(|ready| ready > 0)
}

/// Makes the two ends of an output to `fd`, or to no one yet.
///
/// # Errors
/// `fd` is not open.
pub fn output(fd: Option<OwnedFd>, bell: Bell) -> rustix::io::Result<(Output, Flusher)> {
    let by_line = fd.as_ref().is_some_and(rustix::termios::isatty);
    let target = fd.map_or(Ok(Target::Nowhere), Target::new)?;
    let bytes = VecDeque::with_capacity(CAPACITY);
    let state = Mutex::new(State { bytes, ..State::default() });
    let shared = Arc::new(Shared { state, room: Condvar::new(), bell, by_line });
    let flusher = Flusher { shared: shared.clone(), target, taken: VecDeque::new(), closed: false, visited: false };
    Ok((Output(shared), flusher))
}

impl Flusher {
    /// Bytes go to `fd` from now on, or to no one.
    ///
    /// # Errors
    /// `fd` is not open.
    pub fn connect(&mut self, fd: Option<OwnedFd>) -> rustix::io::Result<()> {
        self.target = fd.map_or(Ok(Target::Nowhere), Target::new)?;
        (self.closed, self.visited) = (false, true);
        Ok(())
    }

    /// Someone asked for bytes to be written at once.
    pub fn is_urgent(&self) -> bool {
        self.shared.lock().urgent
    }

    /// Someone has pushed bytes since the last flush that found none.
    pub fn is_armed(&self) -> bool {
        self.shared.lock().armed
    }

    /// Writes what was waiting when it was called, as far as that is possible without blocking. (Not what comes in the
    /// meantime: a steady writer's bytes would leave one by one.)
    pub fn flush(&mut self) -> Left {
        let left = self.flush_once();
        self.tell_waiter();
        left
    }

    /// Rings at who waits for room, if there is some or will be none.
    fn tell_waiter(&self) {
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        let Some(waiter) = &mut state.waiter else { return };
        let full = state.bytes.len() >= CAPACITY;
        if full && state.moved != waiter.moved {
            (waiter.since, waiter.moved) = (Instant::now(), state.moved);
        }
        state.stuck |= full && waiter.since.elapsed() >= PATIENCE;
        if (!full || state.stuck)
            && let Some(waiter) = state.waiter.take()
        {
            waiter.bell.ring();
        }
    }

    fn flush_once(&mut self) -> Left {
        if !self.write_taken() {
            return Left::Waiting;
        }
        let mut state = self.shared.lock();
        state.urgent = false;
        // The next byte rings the bell only after a flush that found nothing: a steady writer rings once.
        state.armed = !state.bytes.is_empty();
        if state.bytes.is_empty() {
            return Left::Idle;
        }
        if self.taken.capacity() == 0 {
            self.taken.reserve(CAPACITY);
        }
        std::mem::swap(&mut state.bytes, &mut self.taken);
        drop(state);
        self.shared.room.notify_all();
        if self.write_taken() { Left::Written } else { Left::Waiting }
    }

    /// False where the reader takes no more for now.
    fn write_taken(&mut self) -> bool {
        while !self.taken.is_empty() {
            if self.closed {
                self.lose();
                break;
            }
            let (first, _) = self.taken.as_slices();
            match self.target.write(first) {
                Ok(written) => {
                    self.taken.drain(..written.min(self.taken.len()));
                    let mut state = self.shared.lock();
                    state.stuck = false;
                    state.moved += written as u64;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return false,
                Err(_) if self.visited => self.target = Target::Nowhere,
                Err(_) => self.closed = true,
            }
        }
        true
    }

    fn lose(&mut self) {
        self.shared.lock().lost += self.taken.len() as u64;
        self.taken.clear();
    }

    /// Writes what is left. Waits for a reader that moves, and `patience` for one that does not; gives how many bytes
    /// were lost since the last time, and whether that was because the reader is gone.
    pub fn finish(&mut self, patience: Duration) -> (u64, bool) {
        let (mut deadline, mut moved) = (Instant::now() + patience, 0);
        loop {
            match self.flush() {
                Left::Idle => break,
                Left::Written => continue,
                Left::Waiting => {}
            }
            let now_moved = self.shared.lock().moved;
            if now_moved != std::mem::replace(&mut moved, now_moved) && patience >= PATIENCE {
                deadline = Instant::now() + patience;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.lose();
                let rest = std::mem::take(&mut self.shared.lock().bytes);
                self.shared.lock().lost += rest.len() as u64;
                break;
            }
            if let Some(fd) = self.target.fd() {
                writable(fd, left.min(Duration::from_millis(50)));
            }
        }
        let mut state = self.shared.lock();
        (state.armed, state.urgent, state.stuck) = (false, false, false);
        (std::mem::take(&mut state.lost), self.closed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn pipe() -> (std::fs::File, Output, Flusher) {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let (output, flusher) = output(Some(write), Bell::new().unwrap()).unwrap();
        (read.into(), output, flusher)
    }

    #[test]
    fn bytes_arrive_in_order_and_a_steady_writer_rings_once() {
        let (mut read, output, mut flusher) = pipe();
        output.push_all(b"abc");
        assert!(flusher.is_armed());
        assert_eq!(flusher.flush(), Left::Written);
        output.push_all(b"def");
        assert_eq!(flusher.flush(), Left::Written);
        assert_eq!(flusher.flush(), Left::Idle);
        assert!(!flusher.is_armed());
        let mut rung = [0; 8];
        rustix::io::read(&flusher.shared.bell, &mut rung).unwrap();
        assert_eq!(u64::from_ne_bytes(rung), 1);
        drop((output, flusher));
        let mut all = String::new();
        read.read_to_string(&mut all).unwrap();
        assert_eq!(all, "abcdef");
    }

    #[test]
    fn a_reader_that_never_reads_costs_bounded_time_and_the_loss_is_counted() {
        let (_read, output, mut flusher) = pipe();
        let start = Instant::now();
        let total = 5 * CAPACITY;
        for _ in 0..total {
            output.push(b'x');
            if start.elapsed() < PATIENCE / 4 {
                flusher.flush();
            }
        }
        assert!(start.elapsed() < 3 * PATIENCE, "{:?}", start.elapsed());
        let (lost, closed) = flusher.finish(Duration::ZERO);
        assert!(!closed && lost > CAPACITY as u64 && lost < total as u64, "{lost}");
    }

    #[test]
    fn a_reader_that_is_gone_is_noticed_and_counted() {
        let (read, output, mut flusher) = pipe();
        drop(read);
        output.push_all(b"abc");
        assert_eq!(flusher.flush(), Left::Written);
        assert_eq!(flusher.finish(Duration::ZERO), (3, true));
    }

    #[test]
    fn the_original_description_stays_blocking() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let keep = write.try_clone().unwrap();
        let _both = output(Some(write), Bell::new().unwrap()).unwrap();
        assert!(!rustix::fs::fcntl_getfl(&keep).unwrap().contains(OFlags::NONBLOCK));
        drop(read);
    }

    #[test]
    fn what_a_cpu_says_while_its_machine_stops_is_kept_within_bounds() {
        let (_read, output, _flusher) = pipe();
        output.release();
        let kept_and_lost = || {
            let state = output.0.lock();
            (state.bytes.len(), state.lost)
        };
        output.push_all(&vec![0; CAPACITY + 100]);
        assert_eq!(kept_and_lost(), (CAPACITY + 100, 0));
        output.push_all(&vec![0; CAPACITY]);
        assert_eq!(kept_and_lost(), (2 * CAPACITY, 100));
    }

    #[test]
    fn who_does_not_wait_hears_of_room_and_of_a_reader_that_never_reads() {
        let (mut read, output, mut flusher) = pipe();
        let bell = Bell::new().unwrap();
        let heard = || rustix::io::read(&bell, &mut [0; 8]).is_ok();
        let all: Vec<u8> = (0..4 * CAPACITY).map(|at| (at % 251) as u8).collect();
        let (mut done, mut got) = (0, Vec::new());
        while done < all.len() {
            done += output.offer(&all[done..], &bell);
            if done < all.len() {
                assert!(!heard() && output.offer(&all[done..], &bell) == 0);
                while !heard() {
                    flusher.flush();
                    let mut bytes = [0; 4096];
                    let count = read.read(&mut bytes).unwrap();
                    got.extend_from_slice(&bytes[..count]);
                }
            }
        }
        while got.len() < all.len() {
            flusher.flush();
            let mut bytes = [0; 4096];
            let count = read.read(&mut bytes).unwrap();
            got.extend_from_slice(&bytes[..count]);
        }
        assert!(got == all && flusher.finish(Duration::ZERO) == (0, false));
        // Now nobody reads.
        let start = Instant::now();
        while output.offer(b"x", &bell) == 1 {
            flusher.flush();
        }
        while !heard() {
            flusher.flush();
            std::thread::sleep(DELAY);
        }
        assert!(start.elapsed() >= PATIENCE);
        assert_eq!(output.offer(b"lost", &bell), 4);
        assert!(flusher.finish(Duration::ZERO).0 >= 4);
    }

    #[test]
    fn release_frees_a_waiting_writer() {
        let (_read, output, _flusher) = pipe();
        output.push_all(&vec![0; CAPACITY]);
        let waiting = output.clone();
        let thread = std::thread::spawn(move || waiting.push(1));
        std::thread::sleep(Duration::from_millis(20));
        let start = Instant::now();
        output.release();
        thread.join().unwrap();
        assert!(start.elapsed() < PATIENCE / 2);
    }
}
