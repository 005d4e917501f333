//! Who carries out the work of a disk while its device does something else: io_uring, or a few threads where the host
//! forbids that, or where an image has to be found in its file first.
//!
//! Invariant: a job that was taken comes back once; until then its memory is in use.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use vmm_sys_util::eventfd::EventFd;

use crate::event::Worker;
use crate::host::sys::disk::{Job, perform};
use crate::host::sys::uring::Ring;
use crate::host::sys::{eventfd, fd_of};

/// A job that is done: its slot, itself, and how many bytes or which error.
pub type Done = (usize, Job, io::Result<u32>);

/// Carries out jobs. Each is known by its slot.
pub trait Engine: Send {
    /// Takes a job; [`Engine::submit`] has it begun.
    ///
    /// # Errors
    /// It is not taken; it comes back with why.
    fn push(&mut self, slot: usize, job: Job) -> Result<(), (Job, io::Error)>;

    /// Begins what was pushed.
    fn submit(&mut self);

    /// A job that is done.
    fn finished(&mut self) -> Option<Done>;

    /// Becomes readable when a job is done.
    fn bell(&self) -> BorrowedFd<'_>;

    /// Puts what was done into the file, where others can read it; nothing is under way.
    ///
    /// # Errors
    /// The host's.
    fn settle(&self) -> io::Result<()> {
        Ok(())
    }

    /// Silences the bell, for those who wait until it is readable; who is told once when it becomes so need not.
    fn hush(&self) {}
}

impl Engine for Ring {
    fn push(&mut self, slot: usize, job: Job) -> Result<(), (Job, io::Error)> {
        Self::push(self, slot, job)
    }

    fn submit(&mut self) {
        let later = [libc::EAGAIN, libc::EBUSY, libc::EINTR].map(Some);
        if Self::submit(self).is_err_and(|e| later.contains(&e.raw_os_error())) {
            // The host has no room for it at the moment: others first.
            self.ring_later();
        }
    }

    fn finished(&mut self) -> Option<Done> {
        Self::finished(self)
    }

    fn bell(&self) -> BorrowedFd<'_> {
        Self::bell(self)
    }
}

/// What threads work on: a file, or an image in one.
pub trait Image: Send + Sync {
    /// Does a job, and waits.
    ///
    /// # Errors
    /// The host's.
    fn perform(&self, job: &mut Job) -> io::Result<u32>;

    /// As [`Engine::settle`].
    ///
    /// # Errors
    /// The same.
    fn settle(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Image for File {
    fn perform(&self, job: &mut Job) -> io::Result<u32> {
        perform(self, job)
    }
}

/// Threads for each disk.
const THREADS: usize = 4;

#[derive(Default)]
struct Lists {
    todo: VecDeque<(usize, Job)>,
    done: VecDeque<Done>,
    stop: bool,
}

struct Shared {
    image: Box<dyn Image>,
    lists: Mutex<Lists>,
    work: Condvar,
    bell: EventFd,
}

impl Shared {
    fn lists(&self) -> MutexGuard<'_, Lists> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What each thread does.
    fn run(&self) {
        let mut lists = self.lists();
        loop {
            if let Some((slot, mut job)) = lists.todo.pop_front() {
                drop(lists);
                let result = self.image.perform(&mut job);
                lists = self.lists();
                lists.done.push_back((slot, job, result));
                if lists.done.len() == 1 {
                    let _ = self.bell.write(1);
                }
            } else if lists.stop {
                return;
            } else {
                lists = self.work.wait(lists).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

/// A few threads.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<Worker<()>>,
    /// Pushed, and not submitted yet.
    new: Vec<(usize, Job)>,
    /// Done, and not given out yet.
    done: VecDeque<Done>,
    /// Taken, and not given out yet.
    out: usize,
}

impl Pool {
    /// Starts them.
    ///
    /// # Errors
    /// The host has no thread or no descriptor left.
    pub fn new(image: Box<dyn Image>) -> Result<Self> {
        let bell = eventfd().context("eventfd for a disk")?;
        let shared = Arc::new(Shared { image, lists: Mutex::default(), work: Condvar::new(), bell });
        let mut pool = Self { shared, workers: Vec::new(), new: Vec::new(), done: VecDeque::new(), out: 0 };
        for _ in 0..THREADS {
            let shared = pool.shared.clone();
            pool.workers.push(Worker::start("disk".into(), move || shared.run())?);
        }
        Ok(pool)
    }
}

impl Engine for Pool {
    fn push(&mut self, slot: usize, job: Job) -> Result<(), (Job, io::Error)> {
        self.new.push((slot, job));
        self.out += 1;
        Ok(())
    }

    fn submit(&mut self) {
        let new = self.new.len();
        if new == 0 {
            return;
        }
        self.shared.lists().todo.extend(self.new.drain(..));
        (0..new.min(THREADS)).for_each(|_| self.shared.work.notify_one());
    }

    fn finished(&mut self) -> Option<Done> {
        if self.done.is_empty() {
            std::mem::swap(&mut self.done, &mut self.shared.lists().done);
        }
        let done = self.done.pop_front()?;
        self.out -= 1;
        Some(done)
    }

    fn bell(&self) -> BorrowedFd<'_> {
        fd_of(&self.shared.bell)
    }

    fn settle(&self) -> io::Result<()> {
        self.shared.image.settle()
    }

    fn hush(&self) {
        let _ = self.shared.bell.read();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lists().stop = true;
        self.shared.work.notify_all();
        // One that hangs in the host is left to it, with the memory that it holds.
        if self.out == 0 {
            for worker in self.workers.drain(..) {
                let _ = worker.join();
            }
        }
    }
}
