//! One connection: what each side has said, what waits, and how much each may still send.
//!
//! Invariant: at most [`BUFFER`] bytes of the guest's, or [`LARGE`] where it was let grow, wait for the host's side, and no
//! more is sent to the guest than it has said that it takes.

use std::collections::VecDeque;
use std::io::{Error, ErrorKind, Result, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::PACKET;
use super::packet::{HEADER, Header, NO_RECEIVE, NO_SEND, op};
use crate::host::sys::disk::{Buffers, Came, MOST_PIECES};
use crate::virtio::queue::lend;
use crate::virtio::{Chain, Part};

/// Bytes of the guest's that may wait for a host's side that reads slowly: what we tell the guest as our buffer.
pub const BUFFER: u32 = 64 << 10;
/// The same for a host's side that has read much, where there is room for it: the guest has to be told less often.
pub const LARGE: u32 = 1 << 20;
/// So much it has to have read: more than can be in its socket.
const MUCH: u32 = 8 * BUFFER;

/// Most chains that data is read for at once.
const MOST_CHAINS: usize = 32;

/// Where the next packets for the guest go: chains of its own, each with room for more than a header.
pub struct Landing<'a> {
    /// The chains.
    pub chains: &'a [Chain],
    /// What describes their memory, empty before and after: kept so that nothing is allocated.
    pub parts: &'a mut Vec<Part>,
    /// The same for the kernel.
    pub buffers: &'a mut Buffers,
    /// The first byte of the data, where it was read before.
    pub first: Option<u8>,
}

impl Landing<'_> {
    /// Bytes of data that there is room for in a chain.
    pub fn room(chain: &Chain) -> usize {
        PACKET.min((chain.left_to_write() as usize).saturating_sub(HEADER))
    }

    /// The same in all of them.
    fn size(&self) -> usize {
        self.chains.iter().map(Self::room).sum()
    }

    /// How many chains the next data is to be read for, if it was so many: more as long as there is more, fewer where most
    /// stay empty.
    fn wanted(&self, was: usize, came: usize, more: bool) -> usize {
        let few: usize = self.chains.iter().take(was.div_ceil(4)).map(Self::room).sum();
        match more {
            true => (2 * was).min(MOST_CHAINS),
            false if came <= few => (was / 2).max(1),
            false => was,
        }
    }

    /// Reads at most `size` bytes to behind headers and the first byte.
    fn read(&mut self, socket: &UnixStream, size: usize) -> Result<Came> {
        let (mut skip, mut left) = (usize::from(self.first.is_some()), size);
        for chain in self.chains {
            // More than these are not read at once.
            if self.parts.len() >= MOST_PIECES {
                break;
            }
            left -= chain.look_write(HEADER + skip, left.min(Self::room(chain) - skip), self.parts);
            skip = 0;
        }
        let chain = self.chains.first().ok_or(ErrorKind::InvalidInput)?;
        let lent = lend(chain.memory(), self.parts, self.buffers);
        let came = lent.map_err(Error::other).and_then(|()| self.buffers.read_from(socket));
        self.buffers.clear();
        came
    }
}

/// What becomes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Stays,
    /// It ends, and the guest is to be told.
    Resets,
    /// It ends, and the guest knows.
    Ends,
}

/// Who began it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The host's side; the guest is to be asked.
    Asking,
    /// The guest has been asked.
    Asked,
    /// The guest; it is to be granted.
    Granting,
    /// Both sides know.
    Open,
}

/// A connection.
pub struct Connection {
    /// None once the host's side is through.
    socket: Option<UnixStream>,
    /// The number by which the socket is watched.
    pub source: u32,
    state: State,
    /// It is in the list of those that have something for the guest.
    pub queued: bool,
    // To the guest.
    /// There may be something to read.
    readable: bool,
    /// A byte that was read already, by which we know that there is more.
    ahead: Option<u8>,
    /// The host's side has closed: what can be read is the last of it.
    ended: bool,
    /// The flags of SHUTDOWN that hold for the host's side, and those that the guest was told.
    shut: u32,
    told_shut: u32,
    /// The guest's buffer, and how much has left it.
    peer_alloc: u32,
    peer_fwd: u32,
    sent: u32,
    /// Chains of the guest's that the next data is read for.
    wanted: usize,
    /// The guest has asked for credit, and we have asked it.
    owes_credit: bool,
    asked_credit: bool,
    // From the guest.
    waiting: VecDeque<u8>,
    /// The room of the host's side is watched.
    watched: bool,
    /// What the guest is told as our buffer.
    alloc: u32,
    fwd: u32,
    told_fwd: u32,
    /// The flags of SHUTDOWN that hold for the guest's side, and those that the host's side was told.
    guest_shut: u32,
    passed_shut: u32,
}

impl Connection {
    fn new(socket: UnixStream, source: u32, state: State) -> Self {
        Self {
            socket: Some(socket),
            source,
            state,
            queued: false,
            readable: true,
            ahead: None,
            ended: false,
            shut: 0,
            told_shut: 0,
            peer_alloc: 0,
            peer_fwd: 0,
            sent: 0,
            wanted: 1,
            owes_credit: false,
            asked_credit: false,
            waiting: VecDeque::new(),
            watched: false,
            alloc: BUFFER,
            fwd: 0,
            told_fwd: 0,
            guest_shut: 0,
            passed_shut: 0,
        }
    }

    /// One that the host's side began.
    pub fn of_host(socket: UnixStream, source: u32) -> Self {
        Self::new(socket, source, State::Asking)
    }

    /// One that the guest began, by this header.
    pub fn of_guest(socket: UnixStream, source: u32, header: &Header) -> Self {
        let mut own = Self::new(socket, source, State::Granting);
        own.credit(header);
        own
    }

    /// The host's side, while it is not through.
    pub fn socket(&self) -> Option<&UnixStream> {
        self.socket.as_ref()
    }

    /// Bytes of the guest's that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Bytes that the guest may have more than others.
    pub fn more(&self) -> usize {
        (self.alloc - BUFFER) as usize
    }

    /// Its host's side has read so much that more would do good.
    pub fn deserves_more(&self) -> bool {
        let reads = self.socket.is_some() && self.shut & NO_RECEIVE == 0;
        self.alloc == BUFFER && self.fwd >= MUCH && reads
    }

    /// The guest may have [`LARGE`] bytes wait; it is told at once.
    pub fn grow(&mut self) {
        (self.alloc, self.owes_credit) = (LARGE, true);
    }

    /// True once, when something waits for the first time: from then on the room of the host's side is to be watched.
    pub fn needs_watch(&mut self) -> bool {
        !self.waiting.is_empty() && !std::mem::replace(&mut self.watched, true)
    }

    /// The guest's credit, which every packet carries.
    pub fn credit(&mut self, header: &Header) {
        (self.peer_alloc, self.peer_fwd) = (header.buf_alloc, header.fwd_cnt);
        self.asked_credit &= self.room() == 0;
    }

    /// Bytes that the guest can still take.
    fn room(&self) -> u32 {
        self.peer_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_fwd))
    }

    /// The guest grants what the host's side asked for; `line` is said to the latter.
    pub fn grant(&mut self, line: &str) -> Fate {
        if self.state != State::Asked {
            return Fate::Resets;
        }
        self.state = State::Open;
        // Nothing was written before: it has room, or is dead.
        let said = self.socket.as_mut().is_some_and(|socket| socket.write_all(line.as_bytes()).is_ok());
        if said { Fate::Stays } else { Fate::Resets }
    }

    /// The guest asks how much it may send.
    pub fn ask(&mut self) {
        self.owes_credit = true;
    }

    /// The guest sends.
    pub fn data(&mut self, bytes: &mut Buffers) -> Fate {
        let size = bytes.size() as usize;
        let allowed = self.waiting.len().saturating_add(size) <= self.alloc as usize;
        if self.state != State::Open || self.guest_shut & NO_SEND != 0 || !allowed {
            return Fate::Resets;
        }
        let mut done = 0;
        if self.waiting.is_empty() {
            done = self.put(size, |socket, _| {
                let count = bytes.write_to(socket)?;
                bytes.advance(count as u64);
                Ok(count)
            });
        }
        if done < size && self.shut & NO_RECEIVE == 0 {
            let mut rest = vec![0; size - done];
            bytes.copy_out(&mut rest);
            self.waiting.extend(rest);
        }
        Fate::Stays
    }

    /// Hands so many bytes to the host's side; `write` tries those from an offset on. Gives how many it took. One that is
    /// gone takes them all.
    fn put(&mut self, size: usize, mut write: impl FnMut(&UnixStream, usize) -> Result<usize>) -> usize {
        let mut done = 0;
        while done < size && self.shut & NO_RECEIVE == 0 {
            let Some(socket) = &self.socket else { break };
            match write(socket, done) {
                Ok(count @ 1..) => done += count,
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.fwd = self.fwd.wrapping_add(done as u32);
                    return done;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => self.shut |= NO_RECEIVE,
            }
        }
        self.fwd = self.fwd.wrapping_add(size as u32);
        size
    }

    /// Hands over what waits.
    fn flush(&mut self) {
        while !self.waiting.is_empty() {
            let mut waiting = std::mem::take(&mut self.waiting);
            let bytes = waiting.as_slices().0;
            let size = bytes.len();
            let done = self.put(size, |mut socket, done| socket.write(bytes.get(done..).unwrap_or_default()));
            waiting.drain(..done);
            // Room that is not used is nobody's.
            if waiting.capacity() > 4 * waiting.len() {
                waiting.shrink_to(2 * waiting.len());
            }
            self.waiting = waiting;
            if done < size {
                return;
            }
        }
        // A buffer for those that need one only.
        self.waiting = VecDeque::new();
    }

    /// The guest's side will not receive, or send, any more.
    pub fn shut(&mut self, flags: u32) {
        self.guest_shut |= flags & (NO_RECEIVE | NO_SEND);
    }

    /// Something has become of the host's side; `ended`: it has closed.
    pub fn wake(&mut self, ended: bool) -> Fate {
        self.ended |= ended;
        match self.state {
            // The guest has not heard of it.
            State::Asking if self.is_hung_up() => return Fate::Ends,
            State::Asked if self.is_hung_up() => return Fate::Resets,
            State::Asking | State::Asked => return Fate::Stays,
            State::Granting | State::Open => {}
        }
        self.readable = true;
        self.flush();
        if self.shut & NO_SEND != 0 && self.is_hung_up() {
            self.shut |= NO_RECEIVE;
        }
        Fate::Stays
    }

    /// The host's side has closed, both ways.
    fn is_hung_up(&self) -> bool {
        let Some(socket) = &self.socket else { return true };
        let mut fds = [PollFd::new(socket, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok() && fds.iter().any(|fd| fd.revents().contains(PollFlags::HUP))
    }

    /// Passes on what one side's end means to the other; to be asked after every change.
    pub fn settle(&mut self) -> Fate {
        if let Some(socket) = &self.socket {
            let news = self.guest_shut & !self.passed_shut;
            if news & NO_RECEIVE != 0 {
                let _ = socket.shutdown(Shutdown::Read);
                self.passed_shut |= NO_RECEIVE;
            }
            if news & NO_SEND != 0 && self.waiting.is_empty() {
                let _ = socket.shutdown(Shutdown::Write);
                self.passed_shut |= NO_SEND;
            }
        }
        let both = NO_RECEIVE | NO_SEND;
        if self.guest_shut == both && self.waiting.is_empty() {
            // The answer that the guest waits for (§5.10.6.6.1).
            return Fate::Resets;
        }
        if self.told_shut == both {
            // The guest's answer is still to come; the descriptor need not wait for it.
            (self.socket, self.waiting) = (None, VecDeque::new());
        }
        Fate::Stays
    }

    /// The guest asked for it, or there is much room that it does not know of: half of what it may have in flight, which
    /// for Linux since 6.19 is no more than it would keep itself.
    fn must_tell(&self) -> bool {
        let most = self.alloc.min(self.peer_alloc);
        self.owes_credit || self.fwd.wrapping_sub(self.told_fwd) >= (most / 2).max(1)
    }

    /// There is something for the guest, or may be.
    pub fn wants(&self) -> bool {
        match self.state {
            State::Asking | State::Granting => true,
            State::Asked => false,
            State::Open => {
                self.must_tell()
                    || self.shut != self.told_shut
                    || self.may_read() && (self.room() > 0 || !self.asked_credit)
            }
        }
    }

    /// For how many of the guest's chains there may be data.
    pub fn wanted(&self) -> usize {
        self.wanted
    }

    fn may_read(&self) -> bool {
        self.readable && self.socket.is_some() && self.shut & NO_SEND == 0 && self.guest_shut & NO_RECEIVE == 0
    }

    /// The next packets for the guest: their header, with the length of all their data, which is there already but for its
    /// first byte; none where there is nothing after all.
    pub fn next(&mut self, into: &mut Landing) -> Option<Header> {
        let mut header = Header { buf_alloc: self.alloc, fwd_cnt: self.fwd, ..Header::default() };
        match self.state {
            State::Asking => (self.state, header.op) = (State::Asked, op::REQUEST),
            State::Granting => (self.state, header.op) = (State::Open, op::RESPONSE),
            State::Asked => return None,
            State::Open => {
                header.len = self.read(into);
                header.op = if header.len > 0 { op::RW } else { self.control(&mut header.flags)? };
            }
        }
        (self.told_fwd, self.owes_credit) = (self.fwd, false);
        Some(header)
    }

    /// What there is to say besides data.
    fn control(&mut self, flags: &mut u32) -> Option<u16> {
        if self.shut != self.told_shut {
            (*flags, self.told_shut) = (self.shut, self.shut);
            return Some(op::SHUTDOWN);
        }
        if self.must_tell() {
            return Some(op::CREDIT_UPDATE);
        }
        if self.may_read() && self.room() == 0 && !self.asked_credit {
            self.asked_credit = true;
            return Some(op::CREDIT_REQUEST);
        }
        None
    }

    /// Reads what the guest can take, and a byte more: without that one would have to ask once more each time. Where it is
    /// not there, all was read that was there, and what follows will be told of; but not once the end was told of.
    fn read(&mut self, into: &mut Landing) -> u32 {
        let size = into.size().min(self.room() as usize);
        if size == 0 || !self.may_read() {
            return 0;
        }
        let Some(socket) = &self.socket else { return 0 };
        into.first = self.ahead.take();
        let mut came = usize::from(into.first.is_some());
        if size > came {
            match into.read(socket, size - came) {
                Ok(Came { count: 0, .. }) => {
                    self.shut |= NO_SEND;
                    if self.is_hung_up() {
                        self.shut |= NO_RECEIVE;
                    }
                }
                Ok(Came { count, more, cut }) => {
                    self.readable = more.is_some() || cut || self.ended;
                    self.wanted = into.wanted(self.wanted, came + count, more.is_some());
                    self.ahead = more;
                    came += count;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.readable = false,
                // It is gone, and what it had not read with it.
                Err(_) => self.shut |= NO_SEND | NO_RECEIVE,
            }
        }
        self.sent = self.sent.wrapping_add(came as u32);
        came as u32
    }
}
