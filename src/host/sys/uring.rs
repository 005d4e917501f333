//! Work on a file by way of io_uring: handed over in one system call, however much it is, and done while nobody waits.
//!
//! Invariant: memory that the kernel may still read or write is held by the [`Ring`], and for ever where the ring is
//! dropped before the kernel has answered.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, Probe, opcode, squeue};
use rustix::event::epoll;
use vmm_sys_util::eventfd::EventFd;

use super::disk::{Job, Work, position};
use super::{eventfd, fd_of};

/// A ring for one file.
pub struct Ring {
    ring: IoUring,
    file: File,
    /// Readable while the ring has an answer, or `later` was rung.
    bell: OwnedFd,
    later: EventFd,
    rung: bool,
    /// The jobs that the kernel has, or is about to get, by their slots.
    held: Vec<Option<Job>>,
}

impl Ring {
    /// A ring for jobs in so many slots.
    ///
    /// # Errors
    /// The host has no io_uring, forbids it, or has one that lacks what is used here.
    pub fn new(file: File, slots: u32) -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().build(slots)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let pieces = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Read::CODE, opcode::Write::CODE];
        let others = [opcode::Fsync::CODE, opcode::Fallocate::CODE];
        let params = ring.params();
        if !pieces.into_iter().chain(others).all(|code| probe.is_supported(code))
            || !params.is_feature_nodrop()
            || !params.is_feature_submit_stable()
        {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let later = eventfd()?;
        let bell = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // SAFETY: the ring has the descriptor, and is there as long as this borrow.
        let own = unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) };
        for fd in [own, fd_of(&later)] {
            epoll::add(&bell, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        }
        Ok(Self { ring, file, bell, later, rung: false, held: (0..slots).map(|_| None).collect() })
    }

    /// Becomes readable when a job is done. A job that is done at once, and taken back before anybody waits, wakes nobody:
    /// the ring's own descriptor is readable while an answer lies in it, and not as an eventfd once one has been there. The
    /// ring is nearly always writable too, of which who waits for both would be told each time; hence an epoll between.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Rings the bell, until the next submission.
    pub fn ring_later(&mut self) {
        self.rung = self.later.write(1).is_ok();
    }

    /// Takes a job, for a slot that is free. [`Ring::submit`] hands it over.
    ///
    /// # Errors
    /// There is no such slot, or no place: the job comes back, with why.
    pub fn push(&mut self, slot: usize, job: Job) -> Result<(), (Job, io::Error)> {
        let fail = |job, code| Err((job, io::Error::from_raw_os_error(code)));
        let Some(held) = self.held.get_mut(slot).filter(|held| held.is_none()) else { return fail(job, libc::EBUSY) };
        let entry = match entry(&job, Fd(self.file.as_raw_fd())) {
            Ok(entry) => entry.user_data(slot as u64),
            Err(e) => return Err((job, e)),
        };
        // The list of pieces does not move: moving the job moves only what refers to it.
        *held = Some(job);
        // SAFETY: the list of pieces and the memory that it describes stay until the kernel has answered: the job is
        // held here, untouched, and for ever where this ring is dropped before.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        match pushed {
            Ok(()) => Ok(()),
            Err(_) => match held.take() {
                Some(job) => fail(job, libc::EAGAIN),
                None => Ok(()),
            },
        }
    }

    /// Hands over what was pushed, if anything.
    ///
    /// # Errors
    /// The host takes nothing now; it can be tried again.
    pub fn submit(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.rung) {
            let _ = self.later.read();
        }
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        self.ring.submit().map(|_| ())
    }

    /// A job that is done: its slot, itself, and how many bytes or which error.
    pub fn finished(&mut self) -> Option<(usize, Job, io::Result<u32>)> {
        loop {
            let entry = self.ring.completion().next()?;
            let slot = usize::try_from(entry.user_data()).ok()?;
            if let Some(job) = self.held.get_mut(slot).and_then(Option::take) {
                let result = entry.result();
                let result = u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(result.wrapping_neg()));
                return Some((slot, job, result));
            }
        }
    }
}

fn entry(job: &Job, fd: Fd) -> io::Result<squeue::Entry> {
    let (pieces, count) = job.buffers.raw();
    let _ = position(job.offset)?;
    Ok(match job.work {
        Work::Read if !job.buffers.is_writable() => return Err(io::Error::from_raw_os_error(libc::EFAULT)),
        // A list of one piece is one more thing for the kernel to take in.
        Work::Read => match job.buffers.single() {
            Some((start, size)) => opcode::Read::new(fd, start, size).offset(job.offset).build(),
            None => opcode::Readv::new(fd, pieces, count).offset(job.offset).build(),
        },
        Work::Write { stable } => {
            let flags = if stable { libc::RWF_DSYNC } else { 0 };
            match job.buffers.single() {
                Some((start, size)) => {
                    opcode::Write::new(fd, start.cast_const(), size).offset(job.offset).rw_flags(flags).build()
                }
                None => opcode::Writev::new(fd, pieces, count).offset(job.offset).rw_flags(flags).build(),
            }
        }
        Work::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        Work::Discard | Work::Zero { .. } => {
            let mode = job.work.mode().unwrap_or_default();
            opcode::Fallocate::new(fd, job.size).offset(job.offset).mode(mode).build()
        }
    })
}

impl Drop for Ring {
    fn drop(&mut self) {
        // Forgotten, it holds what keeps its memory for ever.
        self.held.drain(..).flatten().for_each(std::mem::forget);
    }
}
