//! An [`Engine`] for a file that wants memory aligned: what is not goes by way of rooms that are, in pieces.
//!
//! A device sees jobs that are done in part, as the host may do them anyway, and asks for the rest. Invariants: there are
//! never more than [`ROOMS`] rooms, which are made when they are first needed and then kept; a job that finds none waits
//! here, and is begun when one is free.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::engine::{Done, Engine};
use crate::host::sys::disk::{Buffers, Job, Work};
use crate::host::sys::room::Room;

/// Rooms of one disk.
pub const ROOMS: usize = 16;
/// Bytes of each: the most of a job that is done at once.
pub const PIECE: usize = 128 << 10;

/// A job that goes by way of a room: the memory that it is for.
struct Bounced {
    room: Arc<Room>,
    far: Buffers,
}

/// The engine that stands before another.
pub struct Bounce {
    inner: Box<dyn Engine>,
    align: usize,
    free: Vec<Arc<Room>>,
    /// How many rooms there are.
    made: usize,
    /// By slots.
    bounced: Vec<Option<Bounced>>,
    waiting: VecDeque<(usize, Job)>,
    /// What the other one would not take after all.
    refused: VecDeque<Done>,
    spare: Vec<Buffers>,
}

impl Bounce {
    /// Before `inner`, which wants memory at multiples of `align`, for jobs in so many slots.
    pub fn new(inner: Box<dyn Engine>, align: u32, slots: usize) -> Self {
        Self {
            inner,
            align: align as usize,
            free: Vec::new(),
            made: 0,
            bounced: (0..slots).map(|_| None).collect(),
            waiting: VecDeque::with_capacity(slots),
            refused: VecDeque::new(),
            spare: Vec::new(),
        }
    }

    fn room(&mut self) -> Option<Arc<Room>> {
        self.free.pop().or_else(|| {
            (self.made < ROOMS).then(|| {
                self.made += 1;
                Room::new(PIECE)
            })
        })
    }

    /// Hands a job over with a room in place of its memory.
    fn begin(&mut self, slot: usize, mut job: Job, room: Arc<Room>) -> Result<(), (Job, io::Error)> {
        let size = job.buffers.size().min(PIECE as u64) as usize;
        let mut near = self.spare.pop().unwrap_or_default();
        room.lend(size, &mut near);
        if job.work != Work::Read {
            job.buffers.copy_to(&near);
        }
        let far = std::mem::replace(&mut job.buffers, near);
        let Some(place) = self.bounced.get_mut(slot) else {
            return Err((job, io::ErrorKind::InvalidInput.into()));
        };
        *place = Some(Bounced { room, far });
        self.inner.push(slot, job).map_err(|(mut job, e)| {
            self.back(slot, &mut job, 0);
            (job, e)
        })
    }

    /// A job has its own memory again, with what was read for it.
    fn back(&mut self, slot: usize, job: &mut Job, done: u32) {
        let Some(Bounced { room, far }) = self.bounced.get_mut(slot).and_then(Option::take) else { return };
        let mut near = std::mem::replace(&mut job.buffers, far);
        if job.work == Work::Read && done > 0 {
            // As much as was read, and no more: what was there before is somebody else's.
            room.lend(done as usize, &mut near);
            near.copy_to(&job.buffers);
        }
        near.clear();
        self.spare.push(near);
        self.free.push(room);
    }
}

impl Engine for Bounce {
    fn push(&mut self, slot: usize, job: Job) -> Result<(), (Job, io::Error)> {
        let moves = matches!(job.work, Work::Read | Work::Write { .. });
        if !moves || job.buffers.is_aligned(self.align) {
            return self.inner.push(slot, job);
        }
        match self.room() {
            Some(room) => self.begin(slot, job, room),
            None => {
                self.waiting.push_back((slot, job));
                Ok(())
            }
        }
    }

    fn submit(&mut self) {
        while !self.waiting.is_empty()
            && let Some(room) = self.room()
        {
            let Some((slot, job)) = self.waiting.pop_front() else { break };
            if let Err((job, e)) = self.begin(slot, job, room) {
                self.refused.push_back((slot, job, Err(e)));
            }
        }
        self.inner.submit();
    }

    fn finished(&mut self) -> Option<Done> {
        if let Some(refused) = self.refused.pop_front() {
            return Some(refused);
        }
        let (slot, mut job, result) = self.inner.finished()?;
        self.back(slot, &mut job, *result.as_ref().unwrap_or(&0));
        Some((slot, job, result))
    }

    fn bell(&self) -> BorrowedFd<'_> {
        self.inner.bell()
    }

    fn hush(&self) {
        self.inner.hush();
    }
}
