//! A disk (VIRTIO 1.3 §5.2): sectors of a file or of a block device for the guest.
//!
//! The device takes requests out of its queues, checks them, and gives them to an `Engine`; when that is done the chains
//! go back. Data goes between the file and guest RAM without a copy. Invariants: a slot holds the chain of the job that
//! the engine has under that number; a flush succeeds only where nothing that was written before has failed.

mod bounce;
mod engine;
mod image;
mod limit;
mod open;
mod qcow2;
pub mod request;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use self::bounce::Bounce;
use self::engine::{Engine, Pool};
use self::image::Packed;
use self::limit::Limit;
use self::open::{Format, MOST_QUEUES, Own};
pub use self::open::{Options, copy, open_own, serial};
use self::request::{ID, MOST_DISCARD, MOST_ZEROES, Medium, Request, SECTOR, parse, status};
use super::queue::lend;
use super::{Active, Chain, Kind, Part, VirtioDevice, Wake};
use crate::bus::Saved;
use crate::config::Words;
use crate::device::{unwrap, wrap};
use crate::host::say::say;
use crate::host::sys::disk::{Buffers, Job, Work};
use crate::host::sys::monotonic;
use crate::host::sys::uring::Ring;

/// Of the saved state.
const VERSION: u32 = 1;
/// Requests in flight at once, of all queues.
const SLOTS: usize = 128;
/// How long the host may take for what is in flight when the guest wants to be rid of it.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a job is begun anew where the host says "again".
const TRIES: u8 = 8;

const LENGTH: u16 = 256;
const QUEUES: [u16; MOST_QUEUES] = [LENGTH; MOST_QUEUES];
const NAME: &str = "virtio-blk";
/// Its descriptors: the engine's bell, then the limit's timer.
const TIMER: usize = 1;

/// Feature bits (§5.2.3).
mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Nothing but what would be missing.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// What was written is not all in the file.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    lost: bool,
}

/// A request whose job the engine has.
struct Flight {
    chain: Chain,
    queue: usize,
    tries: u8,
}

/// The device.
pub struct Block {
    // Configuration
    /// What it is called in what is said about it.
    name: String,
    medium: Medium,
    queues: usize,
    patience: Duration,
    // Wires
    engine: Box<dyn Engine>,
    limit: Option<Limit>,
    // State, but none that is saved: nothing is in flight then. What failed is the file's, whoever drives the disk.
    slots: Vec<Option<Flight>>,
    free: Vec<usize>,
    /// How many times the host has failed.
    errors: u64,
    /// Something that was to be written may be lost.
    failed: bool,
    /// The host never answered: it may still write to RAM, and the device is not used any more.
    gone: bool,
    spare: Vec<Buffers>,
    parts: Vec<Part>,
}

/// How a job that came back goes on.
enum Next {
    Again,
    End(u8),
}

impl Block {
    /// The disk that these words ask for.
    ///
    /// # Errors
    /// They say nothing, or the file is not to be had.
    pub fn new(words: &Words) -> Result<Self> {
        let options = Options::parse(words)?;
        let (file, mut medium) = options.open()?;
        let name = options.path.display().to_string();
        let what = || format!("--disk {name}");
        let engine: Box<dyn Engine> = if options.own == Some(Own::Overlay) {
            let image = Packed::overlay(&options, file, &mut medium.capacity).with_context(what)?;
            Box::new(Pool::new(Box::new(image)).with_context(what)?)
        } else if options.format == Some(Format::Qcow2) {
            Box::new(Pool::new(Box::new(Packed::new(&options, file, &mut medium)?)).with_context(what)?)
        } else {
            match Ring::new(file.try_clone().with_context(what)?, SLOTS as u32) {
                Ok(ring) => Box::new(ring),
                // The host has none, or forbids it.
                Err(_) => Box::new(Pool::new(Box::new(file)).with_context(what)?),
            }
        };
        let engine = match options.direct {
            true => Box::new(Bounce::new(engine, medium.block, SLOTS)),
            false => engine,
        };
        let limit = options.rate.map(Limit::new).transpose()?;
        Ok(Self::with(name, medium, options.queues, engine, limit))
    }

    fn with(name: String, medium: Medium, queues: usize, engine: Box<dyn Engine>, limit: Option<Limit>) -> Self {
        Self {
            name,
            medium,
            queues,
            patience: PATIENCE,
            engine,
            limit,
            slots: (0..SLOTS).map(|_| None).collect(),
            free: (0..SLOTS).rev().collect(),
            errors: 0,
            failed: false,
            gone: false,
            spare: Vec::new(),
            parts: Vec::new(),
        }
    }

    /// Takes requests as long as there are any and they may be begun; true where there was one.
    fn take(&mut self, active: &mut Active) -> bool {
        let mut any = false;
        for queue in 0..active.queues.len() {
            while self.may_begin()
                && let Some(chain) = active.queues.get_mut(queue).and_then(super::Queue::pop)
            {
                any = true;
                self.begin(queue, chain, active);
            }
        }
        any
    }

    fn may_begin(&self) -> bool {
        !self.gone && !self.free.is_empty() && self.limit.as_ref().is_none_or(|limit| limit.is_open(monotonic()))
    }

    fn begin(&mut self, queue: usize, mut chain: Chain, active: &mut Active) {
        // Without room for a status nobody can be told anything; without a head there is nothing to be told.
        let room = chain.left_to_write() as usize;
        let request = if room == 0 { None } else { parse(&mut chain, &self.medium) };
        let Some(request) = request else {
            give_back(queue, chain, None, active);
            return;
        };
        // A driver that knows no flush takes what is written for written (§5.2.6.2).
        let stable = active.features & feature::FLUSH == 0;
        let plain = |work, offset, size| Ok((work, offset, size));
        let job = match request {
            Ok(Request::Read(offset)) => plain(Work::Read, offset, room as u64 - 1),
            Ok(Request::Write(offset)) => plain(Work::Write { stable }, offset, chain.left_to_read().into()),
            Ok(Request::Flush) if self.medium.read_only => Err(status::OK),
            Ok(Request::Flush) if self.failed => Err(status::IOERR),
            Ok(Request::Flush) => plain(Work::Sync, 0, 0),
            Ok(Request::Id) => {
                chain.write(self.medium.serial.get(..ID.min(room - 1)).unwrap_or_default());
                Err(status::OK)
            }
            Ok(Request::Discard(offset, size)) => plain(Work::Discard, offset, size),
            Ok(Request::Zero(offset, size, unmap)) => plain(Work::Zero { unmap }, offset, size),
            Err(status) => Err(status),
        };
        let has_data = !matches!(job, Ok((Work::Sync, ..)));
        match job {
            Ok((_, _, size)) if has_data && size == 0 => give_back(queue, chain, Some(status::OK), active),
            Ok((work, offset, size)) => {
                if let Some(limit) = &mut self.limit {
                    limit.pass(monotonic(), size);
                }
                self.start(queue, chain, Job { work, offset, size, buffers: Buffers::default() }, active);
            }
            Err(status) => give_back(queue, chain, Some(status), active),
        }
    }

    /// Gives a job to the engine, with the memory that its chain describes.
    fn start(&mut self, queue: usize, mut chain: Chain, mut job: Job, active: &mut Active) {
        let size = usize::try_from(job.size).unwrap_or(usize::MAX);
        match job.work {
            Work::Read => chain.take_write(size, &mut self.parts),
            Work::Write { .. } => chain.take_read(size, &mut self.parts),
            _ => 0,
        };
        job.buffers = self.spare.pop().unwrap_or_default();
        if lend(chain.memory(), &mut self.parts, &mut job.buffers).is_err() {
            give_back(queue, chain, Some(status::IOERR), active);
            return;
        }
        let Some(slot) = self.free.pop() else { return };
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(Flight { chain, queue, tries: 0 });
        }
        self.push(slot, job, active);
    }

    fn push(&mut self, slot: usize, job: Job, active: &mut Active) {
        if let Err((job, e)) = self.engine.push(slot, job) {
            self.note(&job, &e);
            self.end(slot, job, status::IOERR, active);
        }
    }

    /// Takes back what is done; true where there was anything.
    fn collect(&mut self, active: &mut Active) -> bool {
        let mut any = false;
        while let Some((slot, mut job, result)) = self.engine.finished() {
            any = true;
            match self.judge(slot, &mut job, result) {
                Next::Again => self.push(slot, job, active),
                Next::End(status) => self.end(slot, job, status, active),
            }
        }
        any
    }

    fn judge(&mut self, slot: usize, job: &mut Job, result: io::Result<u32>) -> Next {
        let code = result.as_ref().err().and_then(io::Error::raw_os_error);
        let flight = self.slots.get_mut(slot).and_then(Option::as_mut);
        // Cancelled is what a thread had handed over that has ended, as that of all devices does when a machine pauses.
        if matches!(code, Some(libc::EINTR | libc::EAGAIN | libc::ECANCELED))
            && let Some(flight) = flight.filter(|flight| flight.tries < TRIES)
        {
            flight.tries += 1;
            return Next::Again;
        }
        match (job.work, result) {
            (Work::Read | Work::Write { .. }, Ok(done @ 1..)) => {
                job.buffers.advance(done.into());
                job.offset = job.offset.saturating_add(done.into());
                if job.buffers.pieces() > 0 { Next::Again } else { Next::End(status::OK) }
            }
            // The file has become shorter than the disk.
            (Work::Read | Work::Write { .. }, Ok(_)) => self.fail(job, &io::ErrorKind::UnexpectedEof.into()),
            // Only a hint (§5.2.6.2).
            (Work::Discard, Err(_)) if code == Some(libc::EOPNOTSUPP) => Next::End(status::OK),
            (Work::Zero { .. }, Err(_)) if code == Some(libc::EOPNOTSUPP) => {
                job.work = Work::Write { stable: false };
                job.buffers.zeroes(job.size);
                Next::Again
            }
            (Work::Sync, Ok(_)) if self.failed => Next::End(status::IOERR),
            (_, Ok(_)) => Next::End(status::OK),
            (_, Err(e)) => self.fail(job, &e),
        }
    }

    fn fail(&mut self, job: &Job, error: &io::Error) -> Next {
        self.note(job, error);
        Next::End(status::IOERR)
    }

    /// The host has failed. What it was to write is lost, and stays so: the next sync may say that all is well.
    fn note(&mut self, job: &Job, error: &io::Error) {
        self.failed |= job.work != Work::Read;
        self.errors += 1;
        // A disk that fails, fails often.
        if self.errors.is_power_of_two() {
            let Job { work, offset, .. } = job;
            say(&format!("bantam: disk {}: {work:?} at {offset:#x}: {error} (error {})", self.name, self.errors));
        }
    }

    fn end(&mut self, slot: usize, mut job: Job, status: u8, active: &mut Active) {
        job.buffers.clear();
        self.spare.push(job.buffers);
        if let Some(flight) = self.slots.get_mut(slot).and_then(Option::take) {
            self.free.push(slot);
            give_back(flight.queue, flight.chain, Some(status), active);
        }
    }

    /// Does all that can be done without waiting.
    fn work(&mut self, active: &mut Active) {
        // What ends after the last look rings.
        while self.collect(active) | self.take(active) {
            self.engine.submit();
        }
    }
}

/// Gives a chain back with its status, for which the last byte that can be written is (§5.2.6).
fn give_back(queue: usize, mut chain: Chain, status: Option<u8>, active: &mut Active) {
    if let Some(status) = status {
        chain.skip_write((chain.left_to_write() as usize).saturating_sub(1));
        chain.write(&[status]);
    }
    if let Some(queue) = active.queues.get_mut(queue) {
        queue.push(chain);
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> Kind {
        // Mass storage, of no other kind.
        Kind { name: NAME, id: 2, class: 0x01_8000, queues: QUEUES.get(..self.queues).unwrap_or_default() }
    }

    fn features(&self) -> u64 {
        use feature::{BLK_SIZE, DISCARD, FLUSH, MQ, RO, SEG_MAX, TOPOLOGY, WRITE_ZEROES};
        // Without CONFIG_WCE the driver cannot turn the write-back cache off: it is the host's.
        let always = SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY;
        let kind = if self.medium.read_only { RO } else { DISCARD | WRITE_ZEROES };
        always | kind | if self.queues > 1 { MQ } else { 0 }
    }

    /// struct virtio_blk_config (§5.2.4).
    fn space(&self) -> Vec<u8> {
        let Medium { capacity, block, .. } = self.medium;
        let per_block = block / SECTOR as u32;
        let mut space = (capacity / SECTOR).to_le_bytes().to_vec();
        let word = |space: &mut Vec<u8>, value: u32| space.extend(value.to_le_bytes());
        // size_max: none. seg_max: what is left of a queue beside head and status. No geometry.
        [0, u32::from(LENGTH) - 2, 0, block].into_iter().for_each(|value| word(&mut space, value));
        // A page is best read and written whole: exponent, offset, least and best size in blocks.
        let page = 4096 / block;
        space.extend([page.trailing_zeros() as u8, 0]);
        space.extend((page as u16).to_le_bytes());
        word(&mut space, 0);
        // Write-back; the number of queues.
        space.extend([1, 0]);
        space.extend((self.queues as u16).to_le_bytes());
        // Of a discard: sectors, segments, alignment. Of zeroes: sectors, segments, whether their room can be given up.
        [MOST_DISCARD, 1, per_block, MOST_ZEROES, 1, 1].into_iter().for_each(|value| word(&mut space, value));
        space
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        let mut sources = vec![self.engine.bell()];
        sources.extend(self.limit.as_ref().map(Limit::timer));
        debug_assert!(sources.len() <= TIMER + 1);
        sources
    }

    /// Whatever the reason is, all queues are looked at: room for one's requests may come of another's.
    fn service(&mut self, _wake: Wake, active: &mut Active) {
        self.work(active);
    }

    fn drain(&mut self, active: &mut Active) {
        let end = Instant::now() + self.patience;
        while !self.gone {
            self.engine.submit();
            while self.collect(active) {
                self.engine.submit();
            }
            if self.free.len() == self.slots.len() {
                return;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.gone = true;
                break;
            }
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let bell = self.engine.bell();
            let _ = poll(&mut [PollFd::new(&bell, PollFlags::IN)], Some(&left));
            self.engine.hush();
        }
        if self.slots.iter_mut().filter_map(Option::take).count() > 0 {
            say(&format!("bantam: disk {}: the host does not answer; the disk is given up", self.name));
        }
    }

    fn save(&self) -> Saved {
        let lost = self.engine.settle().err();
        if let Some(e) = &lost {
            say(&format!("bantam: warning: --disk {}: what was written is not all in its file: {e}", self.name));
        }
        wrap(VERSION, &State { lost: lost.is_some() })
    }

    fn load(&mut self, saved: &Saved) -> Result<()> {
        let State { lost } = unwrap(NAME, VERSION, saved)?;
        ensure!(!lost, "{NAME}: what was written was not all in the disk's file when the machine was saved");
        Ok(())
    }
}
