//! Frames over a Unix socket, as QEMU and passt have them: the length in four bytes, the highest first, then the frame.
//!
//! The other end is another machine, or passt, a program that is a whole network in itself and needs no rights. Invariant:
//! what comes from there is bounded and checked; one that breaks the rule is hung up on, and that is a link that is down.

use std::io::IoSliceMut;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd};
use rustix::io::{Errno, FdFlags};
use rustix::net::{RecvAncillaryBuffer, RecvFlags, RecvMsg, ReturnFlags, recvmsg};

use super::{Chain, FRAME, HEADER, Sent, Wire};
use crate::error::refuse;
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
/// What stays free before the first of them, so that there is room for virtio's header before each frame.
const FRONT: usize = HEADER - LENGTH;
/// Bytes that wait for the other end, so that many frames go in one system call.
const KEPT: usize = AHEAD;

/// One end of the wire.
pub struct Stream {
    listener: Option<Listener>,
    peer: Option<UnixStream>,
    /// It is another than it was.
    other: bool,
    passt: Option<Child>,
    /// What was read and not looked at yet: `[start, end)` of it.
    incoming: Vec<u8>,
    start: usize,
    end: usize,
    /// The frame that was received and not taken: where it is, without its header.
    frame: Option<(usize, usize)>,
    /// All was read that was there, and what follows will be told of.
    drained: bool,
    /// Nothing may be told of any more: the other end has closed, or one before it whose event came late.
    ended: bool,
    /// Frames that go together, and what of them the other end did not take at once: `[gone, filled)` of it.
    outgoing: Vec<u8>,
    gone: usize,
    filled: usize,
}

impl Stream {
    fn new(listener: Option<Listener>, peer: Option<UnixStream>, passt: Option<Child>) -> Self {
        Self {
            listener,
            peer,
            other: false,
            passt,
            incoming: vec![0; FRONT + AHEAD],
            start: FRONT,
            end: FRONT,
            frame: None,
            drained: false,
            ended: false,
            outgoing: Vec::new(),
            gone: 0,
            filled: 0,
        }
    }

    /// Waits at `path` for the other end.
    ///
    /// # Errors
    /// The path is not to be had.
    pub fn listen(path: &Path) -> Result<Self> {
        Ok(Self::new(Some(Listener::new(path).context("--net")?), None, None))
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
        Ok(Self::new(None, Some(socket), None))
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
        Ok(Self::new(None, Some(own), Some(child)))
    }

    /// The other end is gone, or is to go; another may come.
    fn hang_up(&mut self) {
        (self.peer, self.frame, self.drained, self.ended) = (None, None, false, false);
        (self.start, self.end) = (FRONT, FRONT);
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
            (self.peer, self.other) = (Some(socket), true);
        }
    }

    /// Where the next whole frame of what was read lies; the length of one that can be none.
    fn next(&self) -> Result<Option<(usize, usize)>, usize> {
        let ahead = self.incoming.get(self.start..self.end).unwrap_or_default();
        let Some((length, rest)) = ahead.split_first_chunk::<LENGTH>() else { return Ok(None) };
        let size = u32::from_be_bytes(*length) as usize;
        if !(LEAST..=LONGEST).contains(&size) {
            return Err(size);
        }
        let from = self.start + LENGTH;
        Ok((rest.len() >= size).then_some((from, from + size)))
    }

    /// Reads more; false where there is no more.
    fn read(&mut self) -> bool {
        if self.drained {
            return false;
        }
        self.incoming.copy_within(self.start..self.end, FRONT);
        (self.start, self.end) = (FRONT, FRONT + self.end - self.start);
        let Some(peer) = &self.peer else { return false };
        let room = self.incoming.get_mut(self.end..).unwrap_or_default();
        let size = room.len();
        let mut beside = RecvAncillaryBuffer::default();
        match recvmsg(peer, &mut [IoSliceMut::new(room)], &mut beside, RecvFlags::empty()) {
            Ok(RecvMsg { bytes: count @ 1.., flags, .. }) => {
                // Less than there was room for was all; but what comes with a descriptor comes by itself.
                self.drained = count < size && !self.ended && !flags.contains(ReturnFlags::CTRUNC);
                self.end += count;
            }
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
        let listener = self.listener.iter().map(Listener::as_fd);
        listener.chain(self.peer.iter().map(UnixStream::as_fd)).collect()
    }

    fn offers(&self) -> u64 {
        0
    }

    fn begin(&mut self, _features: u64, _pairs: usize) {
        self.drained = false;
    }

    fn wake(&mut self, _source: usize, ended: bool) -> usize {
        self.drained = false;
        self.ended |= ended;
        self.welcome();
        self.flush();
        0
    }

    fn has_other_sources(&mut self) -> bool {
        std::mem::take(&mut self.other)
    }

    fn receive(&mut self, _pair: usize) -> Option<&mut [u8]> {
        while self.frame.is_none() {
            match self.next() {
                Ok(Some((from, to))) => (self.frame, self.start) = (Some((from, to)), to),
                Ok(None) => {
                    if !self.read() {
                        return None;
                    }
                }
                Err(size) => {
                    say(&format!("bantam: --net: the other end sends a frame of {size} bytes; it is hung up on"));
                    self.hang_up();
                }
            }
        }
        let (from, to) = self.frame?;
        // Over the length, and what lies before it: frames that were taken.
        let frame = self.incoming.get_mut(from - HEADER..to)?;
        frame.iter_mut().take(HEADER).for_each(|byte| *byte = 0);
        Some(frame)
    }

    fn taken(&mut self, _pair: usize) -> bool {
        self.frame = None;
        !(self.drained && self.next() == Ok(None))
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
