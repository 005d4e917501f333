//! Frames over a Unix socket, as QEMU and passt have them: the length in four bytes, the highest first, then the frame.
//!
//! The other end is another machine, or passt, a program that is a whole network in itself and needs no rights. Invariant:
//! what comes from there is bounded and checked; one that breaks the rule is hung up on, and that is a link that is down.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd};
use rustix::io::{Errno, FdFlags};

use super::{Chain, FRAME, HEADER, Received, Sent, Wire};
use crate::error::refuse;
use crate::event::{Edge, Readiness};
use crate::host::say::say;
use crate::host::socket::{Listener, connect};

/// Bytes of a length.
const LENGTH: usize = 4;
/// No frame is shorter than its addresses and its type.
const LEAST: usize = 14;
/// The longest frame, without virtio's header.
const LONGEST: usize = FRAME - HEADER;
/// Bytes that are read ahead: many small frames, or one of the longest and a bit.
const AHEAD: usize = 2 * (LENGTH + LONGEST);
/// Bytes that wait for the other end, so that many frames go in one system call.
const KEPT: usize = AHEAD;

const LISTENER: u64 = 0;
const PEER: u64 = 1;

/// One end of the wire.
pub struct Stream {
    inside: Readiness,
    /// What it tells of, kept so that nothing is allocated.
    ready: Vec<u64>,
    listener: Option<Listener>,
    peer: Option<UnixStream>,
    passt: Option<Child>,
    /// What was read and not looked at yet: `[start, end)` of it.
    incoming: Vec<u8>,
    start: usize,
    end: usize,
    /// Frames that go together, and what of them the other end did not take at once: `[gone, filled)` of it.
    outgoing: Vec<u8>,
    gone: usize,
    filled: usize,
}

impl Stream {
    fn new(listener: Option<Listener>, peer: Option<UnixStream>, passt: Option<Child>) -> Result<Self> {
        let inside = Readiness::new().context("epoll")?;
        if let Some(listener) = &listener {
            inside.watch(listener, LISTENER, Edge::Edge)?;
        }
        let incoming = vec![0; AHEAD];
        let mut own = Self {
            inside,
            ready: Vec::new(),
            listener,
            peer: None,
            passt,
            incoming,
            start: 0,
            end: 0,
            outgoing: Vec::new(),
            gone: 0,
            filled: 0,
        };
        own.take(peer);
        Ok(own)
    }

    /// Waits at `path` for the other end.
    ///
    /// # Errors
    /// The path is not to be had.
    pub fn listen(path: &Path) -> Result<Self> {
        Self::new(Some(Listener::new(path).context("--net")?), None, None)
    }

    /// Connects to the other end, which waits at `path`.
    ///
    /// # Errors
    /// Nobody is there.
    pub fn connect(path: &Path) -> Result<Self> {
        let socket = connect(path).map_err(|e| {
            let hint = "start the other end first: a machine with --net socket:PATH,listen";
            refuse(format!("--net socket:{}: {e}", path.display())).hint(hint)
        })?;
        Self::new(None, Some(socket), None)
    }

    /// Starts passt, which gives the guest an address and lets it reach what this user reaches.
    ///
    /// # Errors
    /// It is not installed.
    pub fn passt() -> Result<Self> {
        let (own, theirs) = UnixStream::pair().context("socketpair")?;
        own.set_nonblocking(true).context("socketpair")?;
        rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).context("socketpair")?;
        use std::os::unix::process::CommandExt;
        let mut command = Command::new("passt");
        command.args(["--foreground", "--quiet", "--fd", &theirs.as_raw_fd().to_string()]);
        // ctrl-c is the guest's.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.spawn().map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => {
                refuse("--net user: the program passt is not installed").hint("sudo apt install passt")
            }
            _ => refuse(format!("--net user: passt: {e}")),
        })?;
        Self::new(None, Some(own), Some(child))
    }

    /// The other end is there.
    fn take(&mut self, peer: Option<UnixStream>) {
        // Not to be watched for want of memory is not to be there.
        self.peer = peer.filter(|peer| self.inside.watch(peer, PEER, Edge::Both).is_ok());
    }

    /// The other end is gone, or is to go; another may come.
    fn hang_up(&mut self) {
        self.peer = None;
        (self.start, self.end) = (0, 0);
        (self.gone, self.filled) = (0, 0);
        if let Some(child) = &mut self.passt {
            let _ = child.kill();
            let ended = child.wait().map_or_else(|e| e.to_string(), |status| status.to_string());
            say(&format!("bantam: --net user: passt has ended ({ended}); the guest's network is down"));
            self.passt = None;
        }
        self.welcome();
    }

    fn welcome(&mut self) {
        if self.peer.is_none()
            && let Some(Ok(Some(socket))) = self.listener.as_ref().map(Listener::accept)
        {
            self.take(Some(socket));
        }
    }

    /// The next whole frame of what was read; the length of one that can be none.
    fn next(&mut self) -> Result<Option<&[u8]>, usize> {
        let ahead = self.incoming.get(self.start..self.end).unwrap_or_default();
        let Some((length, rest)) = ahead.split_first_chunk::<LENGTH>() else { return Ok(None) };
        let size = u32::from_be_bytes(*length) as usize;
        if !(LEAST..=LONGEST).contains(&size) {
            return Err(size);
        }
        if rest.len() < size {
            return Ok(None);
        }
        let from = self.start + LENGTH;
        self.start = from + size;
        Ok(self.incoming.get(from..from + size))
    }

    /// Reads more; false where there is no more.
    fn read(&mut self) -> bool {
        self.incoming.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let Some(peer) = &self.peer else { return false };
        match rustix::io::read(peer, self.incoming.get_mut(self.end..).unwrap_or_default()) {
            Ok(count @ 1..) => self.end += count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return false,
            Ok(_) | Err(_) => self.hang_up(),
        }
        true
    }

    /// Sends what waits; false where some of it still does.
    fn flush(&mut self) -> bool {
        while let Some(rest) = self.outgoing.get(self.gone..self.filled).filter(|rest| !rest.is_empty())
            && let Some(peer) = &self.peer
        {
            match rustix::io::write(peer, rest) {
                Ok(count @ 1..) => self.gone += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return false,
                Ok(_) | Err(_) => self.hang_up(),
            }
        }
        (self.gone, self.filled) = (0, 0);
        true
    }
}

impl Wire for Stream {
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.inside.as_fd()]
    }

    fn offers(&self) -> u64 {
        0
    }

    fn begin(&mut self, _features: u64, _pairs: usize) {}

    fn wake(&mut self) {
        // What is ready will be found so; the events are only taken.
        let _ = self.inside.wait(Some(Duration::ZERO), &mut self.ready);
        self.welcome();
        self.flush();
    }

    fn receive(&mut self, _pair: usize, frame: &mut [u8]) -> Received {
        loop {
            match self.next() {
                Ok(Some(bytes)) => {
                    let size = HEADER + bytes.len();
                    let places = frame.get_mut(..size).and_then(|frame| frame.split_at_mut_checked(HEADER));
                    let Some((header, place)) = places else { return Received::Frame(0) };
                    header.fill(0);
                    place.copy_from_slice(bytes);
                    return Received::Frame(size);
                }
                Ok(None) => {
                    if !self.read() {
                        return Received::Nothing;
                    }
                }
                Err(size) => {
                    say(&format!("bantam: --net: the other end sends a frame of {size} bytes; it is hung up on"));
                    self.hang_up();
                }
            }
        }
    }

    fn send(&mut self, _pair: usize, chain: &mut Chain) -> Sent {
        let size = chain.left_to_read().saturating_sub(HEADER as u32);
        let whole = LENGTH + size as usize;
        if self.peer.is_none() {
            return Sent::Gone;
        }
        if self.filled + whole > KEPT && !self.flush() {
            self.outgoing.copy_within(self.gone..self.filled, 0);
            (self.gone, self.filled) = (0, self.filled - self.gone);
            if self.filled + whole > KEPT {
                return Sent::Later;
            }
        }
        self.outgoing.resize(KEPT, 0);
        let place = self.outgoing.get_mut(self.filled..self.filled + whole).unwrap_or_default();
        if let Some((length, frame)) = place.split_first_chunk_mut::<LENGTH>() {
            *length = size.to_be_bytes();
            chain.skip_read(HEADER);
            chain.read(frame);
            self.filled += whole;
        }
        Sent::Gone
    }

    fn finish(&mut self) {
        self.flush();
    }

    fn is_up(&self) -> bool {
        self.peer.is_some()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.peer = None;
        if let Some(child) = &mut self.passt {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
