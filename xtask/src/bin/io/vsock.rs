//! Sockets between guest and host: a stream out of the guest in packets of 2 KiB, and into it in packets of 4 KiB.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bantam::virtio::vsock::Vsock;

use crate::Subject;
use crate::driver::DEPTH;
use crate::net::{Floor, drain, some};
use crate::stage::Stage;

const RX: usize = 0;
const TX: usize = 1;
const HEADER: usize = 44;
/// Bytes of a packet: out, and in, which is what Linux has buffers for.
pub const OUT: usize = 2048;
pub const IN: usize = 4096;
/// What the other end takes or gives at once.
const PIECE: usize = 128 << 10;
/// The ports: the guest's, the host's.
const PORTS: (u32, u32) = (1000, 7);

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;

/// The device, and the host's side of a connection that the guest began.
pub struct Sockets {
    stage: Stage,
    peer: UnixStream,
    room: Vec<u8>,
    out: bool,
    /// Bytes that the device says that it keeps, those sent to it, how many of them it says that it has passed on, and those
    /// that came from it.
    credit: u64,
    sent: u64,
    passed: u64,
    came: u64,
    told: u64,
}

impl Sockets {
    /// `out`: the guest sends, else it receives.
    pub fn new(path: &Path, out: bool, thread: bool) -> Result<Self> {
        let device = Vsock::new(&format!("cid=3,path={}", path.display()).parse()?)?;
        let server = path.with_file_name(format!("{}_7", path.file_name().context("a name")?.to_string_lossy()));
        let listener = UnixListener::bind(&server).context("the server")?;
        let mut stage = Stage::new(Box::new(device), thread)?;
        // The first connection's; 0 is whom clients knock at.
        stage.source = 1;
        for slot in 0..DEPTH {
            stage.drivers.get(RX).context("a queue")?.shape(slot, &[], &[(HEADER + IN) as u32])?;
            stage.drivers.get(TX).context("a queue")?.shape(slot, &[HEADER as u32, OUT as u32], &[])?;
        }
        // Any socket will do until the connection is there.
        let (nobody, _) = UnixStream::pair()?;
        let room = vec![3; PIECE];
        let mut own = Self { stage, peer: nobody, room, out, credit: 0, sent: 0, passed: 0, came: 0, told: 0 };
        own.offer()?;
        own.say(REQUEST)?;
        own.stage.kick(TX);
        while !own.take()?.1 {
            own.stage.wait();
        }
        own.peer = listener.accept()?.0;
        own.peer.set_nonblocking(true)?;
        std::fs::remove_file(&server)?;
        Ok(own)
    }

    /// Gives the device all buffers to fill.
    fn offer(&mut self) -> Result<()> {
        let driver = self.stage.drivers.get_mut(RX).context("a queue")?;
        while let Some(slot) = driver.free() {
            driver.offer(slot);
        }
        self.stage.kick(RX);
        Ok(())
    }

    /// Makes a packet available, if there is a slot.
    fn say(&mut self, op: u16) -> Result<bool> {
        let driver = self.stage.drivers.get_mut(TX).context("a queue")?;
        let Some(slot) = driver.free() else { return Ok(false) };
        let len = if op == RW { OUT as u32 } else { 0 };
        driver.put(slot, 0, 3u64.to_le_bytes());
        driver.put(slot, 8, 2u64.to_le_bytes());
        driver.put(slot, 16, PORTS.0.to_le_bytes());
        driver.put(slot, 20, PORTS.1.to_le_bytes());
        driver.put(slot, 24, len.to_le_bytes());
        driver.put(slot, 28, 1u16.to_le_bytes());
        driver.put(slot, 30, op.to_le_bytes());
        driver.put(slot, 32, 0u32.to_le_bytes());
        driver.put(slot, 36, (1u32 << 30).to_le_bytes());
        driver.put(slot, 40, (self.came as u32).to_le_bytes());
        self.told = self.came;
        driver.offer(slot);
        Ok(true)
    }

    /// Takes what came back; gives how many packets were taken from the guest, and whether anything was said to it.
    fn take(&mut self) -> Result<(u64, bool)> {
        let mut any = false;
        let driver = self.stage.drivers.get_mut(RX).context("a queue")?;
        while let Some((slot, size)) = driver.used() {
            let op = u16::from_le_bytes(driver.get(slot, 30));
            ensure!([RESPONSE, RW, CREDIT_UPDATE].contains(&op), "the device says {op}");
            self.came += u64::from(size) - HEADER as u64;
            self.credit = u32::from_le_bytes(driver.get(slot, 36)).into();
            // The count has 32 bits, and never goes back.
            let passed = u32::from_le_bytes(driver.get(slot, 40));
            self.passed += u64::from(passed.wrapping_sub(self.passed as u32));
            any = true;
        }
        let (driver, mut done) = (self.stage.drivers.get_mut(TX).context("a queue")?, 0);
        while driver.used().is_some() {
            done += 1;
        }
        Ok((done, any))
    }

    fn send(&mut self, requests: u64) -> Result<()> {
        let (mut left, mut bytes) = (requests, 0);
        while bytes < requests * OUT as u64 {
            while left > 0 && self.sent + (OUT as u64) - self.passed <= self.credit && self.say(RW)? {
                self.sent += OUT as u64;
                left -= 1;
            }
            self.stage.kick(TX);
            let (done, any) = self.take()?;
            self.offer()?;
            let got = drain(&self.peer, &mut self.room, &mut self.stage.calls)?;
            bytes += got;
            if done == 0 && !any && got == 0 {
                self.stage.wait_or(&self.peer, libc::POLLIN);
            }
        }
        Ok(())
    }

    fn receive(&mut self, requests: u64) -> Result<()> {
        let start = self.came;
        let all = requests * IN as u64;
        let mut sent = 0;
        while self.came - start < all {
            self.offer()?;
            let most = IN as u64 * u64::from(DEPTH);
            let size = (most - (start + sent - self.came).min(most)).min(all - sent) as usize;
            if let Some(bytes) = self.room.get(..size).filter(|bytes| !bytes.is_empty()) {
                self.stage.calls += 1;
                sent += some((&self.peer).write(bytes))? as u64;
                self.stage.look();
            }
            if self.came - self.told > 1 << 28 && self.say(CREDIT_UPDATE)? {
                self.stage.kick(TX);
            }
            if !self.take()?.1 {
                self.stage.wait_or(&self.peer, 0);
            }
        }
        Ok(())
    }

    /// The same bytes without a device.
    pub fn floor(out: bool) -> Result<Floor> {
        Floor::new(0, if out { OUT } else { IN }, out)
    }
}

impl Subject for Sockets {
    fn run(&mut self, requests: u64) -> Result<()> {
        if self.out { self.send(requests) } else { self.receive(requests) }
    }

    fn stage(&self) -> &Stage {
        &self.stage
    }
}
