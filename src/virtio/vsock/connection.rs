//! One connection: what each side has said, what waits, and how much each may still send.
//!
//! Invariant: at most [`BUFFER`] bytes of the guest's wait for the host's side, and no more is sent to the guest than it
//! has said that it takes.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::packet::{Header, NO_RECEIVE, NO_SEND, op};

/// Bytes of the guest's that may wait for a host's side that reads slowly: what we tell the guest as our buffer.
pub const BUFFER: u32 = 64 << 10;
/// The guest is told of room that it does not know of once there is so much.
pub const TELL: u32 = BUFFER / 4;

/// Most chains that data is read for at once.
const MOST_CHAINS: usize = 32;

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
    state: State,
    /// It is in the list of those that have something for the guest.
    pub queued: bool,
    // To the guest.
    /// There may be something to read.
    readable: bool,
    /// The flags of SHUTDOWN that hold for the host's side, and those that the guest was told.
    shut: u32,
    told_shut: u32,
    /// The guest's buffer, and how much has left it.
    peer_alloc: u32,
    peer_fwd: u32,
    sent: u32,
    /// Chains of the guest's that the next data is read for: more as long as there is more.
    wanted: usize,
    /// The guest has asked for credit, and we have asked it.
    owes_credit: bool,
    asked_credit: bool,
    // From the guest.
    waiting: VecDeque<u8>,
    fwd: u32,
    told_fwd: u32,
    /// The flags of SHUTDOWN that hold for the guest's side, and those that the host's side was told.
    guest_shut: u32,
    passed_shut: u32,
}

impl Connection {
    fn new(socket: UnixStream, state: State) -> Self {
        Self {
            socket: Some(socket),
            state,
            queued: false,
            readable: true,
            shut: 0,
            told_shut: 0,
            peer_alloc: 0,
            peer_fwd: 0,
            sent: 0,
            wanted: 1,
            owes_credit: false,
            asked_credit: false,
            waiting: VecDeque::new(),
            fwd: 0,
            told_fwd: 0,
            guest_shut: 0,
            passed_shut: 0,
        }
    }

    /// One that the host's side began.
    pub fn of_host(socket: UnixStream) -> Self {
        Self::new(socket, State::Asking)
    }

    /// One that the guest began, by this header.
    pub fn of_guest(socket: UnixStream, header: &Header) -> Self {
        let mut own = Self::new(socket, State::Granting);
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
    pub fn data(&mut self, bytes: &[u8]) -> Fate {
        let allowed = self.waiting.len().saturating_add(bytes.len()) <= BUFFER as usize;
        if self.state != State::Open || self.guest_shut & NO_SEND != 0 || !allowed {
            return Fate::Resets;
        }
        let done = if self.waiting.is_empty() { self.put(bytes) } else { 0 };
        if self.shut & NO_RECEIVE == 0 {
            self.waiting.extend(bytes.get(done..).unwrap_or_default());
        }
        Fate::Stays
    }

    /// Hands bytes to the host's side; gives how many it took. One that is gone takes them all.
    fn put(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() && self.shut & NO_RECEIVE == 0 {
            let Some(mut socket) = self.socket.as_ref() else { break };
            match socket.write(bytes.get(done..).unwrap_or_default()) {
                Ok(count @ 1..) => done += count,
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.fwd = self.fwd.wrapping_add(done as u32);
                    return done;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => self.shut |= NO_RECEIVE,
            }
        }
        self.fwd = self.fwd.wrapping_add(bytes.len() as u32);
        bytes.len()
    }

    /// Hands over what waits.
    fn flush(&mut self) {
        while !self.waiting.is_empty() {
            let mut waiting = std::mem::take(&mut self.waiting);
            let bytes = waiting.as_slices().0;
            let size = bytes.len();
            let done = self.put(bytes);
            waiting.drain(..done);
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

    /// Something has become of the host's side.
    pub fn wake(&mut self) -> Fate {
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

    /// There is something for the guest, or may be.
    pub fn wants(&self) -> bool {
        match self.state {
            State::Asking | State::Granting => true,
            State::Asked => false,
            State::Open => {
                let credit = self.owes_credit || self.fwd.wrapping_sub(self.told_fwd) >= TELL;
                credit || self.shut != self.told_shut || self.may_read() && (self.room() > 0 || !self.asked_credit)
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

    /// The next packet for the guest: its header, and its data in `into`; none where there is nothing after all.
    pub fn next(&mut self, into: &mut [u8]) -> Option<Header> {
        let mut header = Header { buf_alloc: BUFFER, fwd_cnt: self.fwd, ..Header::default() };
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
        if self.owes_credit || self.fwd.wrapping_sub(self.told_fwd) >= TELL {
            return Some(op::CREDIT_UPDATE);
        }
        if self.may_read() && self.room() == 0 && !self.asked_credit {
            self.asked_credit = true;
            return Some(op::CREDIT_REQUEST);
        }
        None
    }

    /// Reads what the guest can take.
    fn read(&mut self, into: &mut [u8]) -> u32 {
        let size = into.len().min(self.room() as usize);
        let Some(into) = into.get_mut(..size).filter(|into| !into.is_empty() && self.may_read()) else { return 0 };
        let Some(mut socket) = self.socket.as_ref() else { return 0 };
        match socket.read(into) {
            Ok(0) => {
                self.shut |= NO_SEND;
                if self.is_hung_up() {
                    self.shut |= NO_RECEIVE;
                }
                0
            }
            Ok(count) => {
                self.wanted = if count == size { (2 * self.wanted).min(MOST_CHAINS) } else { 1 };
                self.sent = self.sent.wrapping_add(count as u32);
                count as u32
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => 0,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                self.readable = false;
                0
            }
            // It is gone, and what it had not read with it.
            Err(_) => {
                self.shut |= NO_SEND | NO_RECEIVE;
                0
            }
        }
    }
}
