//! A network card whose wire is a socket: frames of 1514 bytes, out of the guest and into it.

use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bantam::virtio::net::Net;

use crate::Subject;
use crate::driver::DEPTH;
use crate::stage::Stage;

const RX: usize = 0;
const TX: usize = 1;
/// `struct virtio_net_hdr_v1`.
const HEADER: usize = 12;
const FRAME: usize = 1514;
/// A frame on the wire: its length before it.
const UNIT: usize = 4 + FRAME;
/// Frames that the world sends at once: as many as the guest has buffers.
const BURST: usize = UNIT * DEPTH as usize;

/// What goes over the wire, many times.
fn burst() -> Vec<u8> {
    let frame = (FRAME as u32).to_be_bytes().into_iter().chain((0..FRAME).map(|n| n as u8));
    frame.collect::<Vec<_>>().repeat(DEPTH.into())
}

/// The device, and the other end of its wire.
pub struct Card {
    stage: Stage,
    peer: UnixStream,
    room: Vec<u8>,
    burst: Vec<u8>,
    out: bool,
}

impl Card {
    /// `out`: the guest sends, else it receives.
    pub fn new(path: &Path, out: bool, thread: bool) -> Result<Self> {
        let listener = UnixListener::bind(path).context("the wire")?;
        let device = Net::new(&format!("socket:{}", path.display()).parse()?, None, 0)?;
        let (peer, _) = listener.accept()?;
        std::fs::remove_file(path)?;
        peer.set_nonblocking(true)?;
        let stage = Stage::new(Box::new(device), thread)?;
        let size = (HEADER + FRAME) as u32;
        for slot in 0..DEPTH {
            stage.drivers.get(RX).context("a queue")?.shape(slot, &[], &[size])?;
            stage.drivers.get(TX).context("a queue")?.shape(slot, &[size], &[])?;
        }
        Ok(Self { stage, peer, room: vec![0; 2 * BURST], burst: burst(), out })
    }

    fn send(&mut self, requests: u64) -> Result<()> {
        let (mut begun, mut done, mut bytes) = (0, 0, 0);
        while done < requests || bytes < requests * UNIT as u64 {
            let driver = self.stage.drivers.get_mut(TX).context("a queue")?;
            while begun < requests
                && let Some(slot) = driver.free()
            {
                driver.offer(slot);
                begun += 1;
            }
            self.stage.kick(TX);
            let before = (done, bytes);
            let driver = self.stage.drivers.get_mut(TX).context("a queue")?;
            while driver.used().is_some() {
                done += 1;
            }
            bytes += drain(&self.peer, &mut self.room, &mut self.stage.calls)?;
            if before == (done, bytes) {
                self.stage.wait_or(&self.peer, libc::POLLIN);
            }
        }
        ensure!(bytes == requests * UNIT as u64, "{bytes} bytes came");
        Ok(())
    }

    fn receive(&mut self, requests: u64) -> Result<()> {
        let (mut done, mut left) = (0, requests * UNIT as u64);
        let mut offset = 0;
        while done < requests {
            let driver = self.stage.drivers.get_mut(RX).context("a queue")?;
            while let Some(slot) = driver.free() {
                driver.offer(slot);
            }
            self.stage.kick(RX);
            let before = (done, left);
            // No more than the guest has buffers for: what lies in between is the socket's.
            let under_way = requests * UNIT as u64 - left - done * UNIT as u64;
            let size = (BURST as u64 - under_way.min(BURST as u64)).min(left) as usize;
            let end = (offset + size).min(BURST);
            if let Some(bytes) = self.burst.get(offset..end).filter(|bytes| !bytes.is_empty()) {
                self.stage.calls += 1;
                let sent = some((&self.peer).write(bytes))?;
                (left, offset) = (left - sent as u64, (offset + sent) % BURST);
                self.stage.look();
            }
            let driver = self.stage.drivers.get_mut(RX).context("a queue")?;
            while let Some((slot, size)) = driver.used() {
                ensure!(size as usize == HEADER + FRAME, "{size} bytes came");
                ensure!(driver.get::<1>(slot, HEADER + FRAME - 1) == [(FRAME - 1) as u8], "another frame came");
                done += 1;
            }
            if before == (done, left) {
                self.stage.wait_or(&self.peer, 0);
            }
        }
        Ok(())
    }
}

impl Subject for Card {
    fn run(&mut self, requests: u64) -> Result<()> {
        if self.out { self.send(requests) } else { self.receive(requests) }
    }

    fn stage(&self) -> &Stage {
        &self.stage
    }
}

/// How much was transferred; none where there was nothing to transfer.
pub fn some(result: std::io::Result<usize>) -> Result<usize> {
    match result {
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(0),
        other => Ok(other?),
    }
}

/// Takes all there is; gives how much that was.
pub fn drain(mut socket: &UnixStream, room: &mut [u8], calls: &mut u64) -> Result<u64> {
    let mut all = 0;
    loop {
        *calls += 1;
        let count = some(socket.read(room))?;
        all += count as u64;
        if count < room.len() {
            return Ok(all);
        }
    }
}

/// The floor: the same bytes over such a socket, gathered from as many buffers or spread over them in one system call, and
/// nothing else. Nobody moves them with fewer copies.
pub struct Floor {
    near: UnixStream,
    far: UnixStream,
    /// Before each buffer, and the buffer.
    unit: (usize, usize),
    room: Vec<u8>,
    out: bool,
}

impl Floor {
    /// `before` and `size`: bytes of what goes before each piece, and of the piece.
    pub fn new(before: usize, size: usize, out: bool) -> Result<Self> {
        let (near, far) = UnixStream::pair()?;
        far.set_nonblocking(true)?;
        near.set_nonblocking(true)?;
        Ok(Self { near, far, unit: (before, size), room: vec![1; (before + size) * usize::from(DEPTH)], out })
    }

    /// What a network card has to move.
    pub fn net(out: bool) -> Result<Self> {
        Self::new(UNIT - FRAME, FRAME, out)
    }

    pub fn run(&mut self, requests: u64) -> Result<()> {
        let (before, size) = self.unit;
        let mut guest = vec![2; self.room.len()];
        let mut all = requests * (before + size) as u64;
        while all > 0 {
            let now = (all as usize).min(self.room.len());
            let mut moved = 0;
            while moved < now {
                // Both ends: where a socket holds less than a burst, in pieces.
                let (from, into) = if self.out { (&self.near, &self.far) } else { (&self.far, &self.near) };
                let near = guest.get_mut(moved..now).unwrap_or_default();
                let sent = if self.out {
                    let parts: Vec<_> = near.chunks(size).map(IoSlice::new).collect();
                    let mut from = from;
                    some(from.write_vectored(&parts))?
                } else {
                    let mut from = from;
                    some(from.write(self.room.get(moved..now).unwrap_or_default()))?
                };
                let mut got = 0;
                while got < sent {
                    let mut into = into;
                    got += if self.out {
                        some(into.read(&mut self.room))?
                    } else {
                        let near = guest.get_mut(moved + got..now).unwrap_or_default();
                        let mut parts: Vec<_> = near.chunks_mut(size).map(IoSliceMut::new).collect();
                        some(into.read_vectored(&mut parts))?
                    };
                }
                moved += sent;
            }
            all -= now as u64;
        }
        Ok(())
    }
}
