//! The event loop's two tools: readiness of descriptors, and threads that give back what they were given.
//!
//! Invariant: a [`Worker`]'s state has one owner at a time: the thread while it runs, the caller after `stop`.

use std::io;
use std::mem::MaybeUninit;
use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{Timespec, epoll};
use rustix::fd::{AsFd, OwnedFd};

use crate::host::sys;

/// Most events taken in one call.
const BATCH: usize = 32;

/// In a token, for those who want to know: nothing will follow what can be read now.
pub const ENDED: u64 = 1 << 63;

/// Waits for descriptors to become readable. Each is known by a token of the caller's.
pub struct Readiness {
    epoll: OwnedFd,
}

impl Readiness {
    /// Watches nothing.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)? })
    }

    fn event(token: u64, edge: Edge) -> (epoll::EventFlags, epoll::EventData) {
        let flags = match edge {
            Edge::Level => epoll::EventFlags::IN,
            Edge::Edge => epoll::EventFlags::IN | epoll::EventFlags::ET,
            Edge::Ends => epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ET,
            Edge::Both => {
                epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET
            }
        };
        (flags, epoll::EventData::new_u64(token))
    }

    /// Watches `fd`. False where the host cannot watch it: a file, which is always ready.
    ///
    /// # Errors
    /// The host has no memory left.
    pub fn watch(&self, fd: impl AsFd, token: u64, edge: Edge) -> io::Result<bool> {
        let (flags, data) = Self::event(token, edge);
        match epoll::add(&self.epoll, fd, data, flags) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::PERM) => Ok(false),
            // Watched already, and so it stays.
            Err(rustix::io::Errno::EXIST) => Ok(true),
            Err(e) => Err(e.into()),
        }
    }

    /// Watches `fd`, which is watched, in another way. What it waits for may be there already: then it is told.
    pub fn watch_for(&self, fd: impl AsFd, token: u64, edge: Edge) {
        let (flags, data) = Self::event(token, edge);
        let _ = epoll::modify(&self.epoll, fd, data, flags);
    }

    /// Watches `fd` no longer.
    pub fn forget(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Puts the tokens that are ready into `ready`, after at most `patience`; none after that time or a signal.
    ///
    /// # Errors
    /// The host refuses to wait.
    pub fn wait(&self, patience: Option<Duration>, ready: &mut Vec<u64>) -> io::Result<()> {
        let timeout = patience.map(|p| Timespec {
            tv_sec: i64::try_from(p.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(p.subsec_nanos()),
        });
        ready.clear();
        let mut events = [MaybeUninit::uninit(); BATCH];
        match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
            Ok((events, _)) => ready.extend(events.iter().map(|event| {
                // Only who asks for it is told.
                let flags = event.flags;
                let ended = flags.contains(epoll::EventFlags::RDHUP);
                event.data.u64() | if ended { ENDED } else { 0 }
            })),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }
}

/// When a watched descriptor reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    /// As long as it is readable.
    Level,
    /// When it becomes readable: a bell need not be read to fall silent.
    Edge,
    /// The same; and its token has [`ENDED`] once the other end of a socket has closed, whatever is left to read.
    Ends,
    /// The same; and when it becomes writable.
    Both,
}

/// What a thread needs for its stack, and what all of them take of the heap soon after.
const ROOM: usize = 4 << 20;

/// Who finds no memory for a few bytes ends the process: where address space is limited, that is found out before.
fn check_room() -> Result<()> {
    if sys::address_space_is_limited() {
        let mut room = Vec::<u8>::new();
        room.try_reserve_exact(ROOM)?;
        // Or the compiler would leave out what nobody uses.
        std::hint::black_box(&mut room);
    }
    Ok(())
}

/// A thread that was given something and gives it back.
pub struct Worker<T> {
    handle: JoinHandle<T>,
}

impl<T: Send + 'static> Worker<T> {
    /// Starts a thread named `name` that runs `work`.
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn start(name: String, work: impl FnOnce() -> T + Send + 'static) -> Result<Self> {
        let what = format!("cannot start thread {name}");
        check_room().context("too little address space is left").with_context(|| what.clone())?;
        let handle = std::thread::Builder::new().name(name).spawn(work).context(what)?;
        Ok(Self { handle })
    }

    /// Interrupts the system call that the thread waits in; what it does then is between it and its caller. False where the
    /// host refuses.
    pub fn kick(&self) -> bool {
        sys::kick(self.handle.as_pthread_t())
    }

    /// Whether [`Worker::join`] would not wait.
    pub fn has_ended(&self) -> bool {
        self.handle.is_finished()
    }

    /// Waits for the thread and takes back what it owned.
    ///
    /// # Errors
    /// The thread panicked (which ends the process before anyone can see this).
    pub fn join(self) -> Result<T> {
        self.handle.join().map_err(|_| anyhow::anyhow!("a thread panicked"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::output::Bell;

    #[test]
    fn a_bell_is_heard_once_and_silence_times_out() {
        let (readiness, bell) = (Readiness::new().unwrap(), Bell::new().unwrap());
        assert!(readiness.watch(&bell, 5, Edge::Edge).unwrap());
        let soon = Some(Duration::from_millis(1));
        let wait = |patience| {
            let mut ready = vec![99];
            readiness.wait(patience, &mut ready).unwrap();
            ready
        };
        assert!(wait(soon).is_empty());
        bell.ring();
        assert_eq!(wait(None), [5]);
        assert!(wait(soon).is_empty());
        bell.ring();
        assert_eq!(wait(None), [5]);
        readiness.forget(&bell);
        bell.ring();
        assert!(wait(soon).is_empty());
    }

    #[test]
    fn an_end_is_told_with_what_came_before_it() {
        use std::io::Write;
        let readiness = Readiness::new().unwrap();
        let (own, mut other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(readiness.watch(&own, 5, Edge::Ends).unwrap() && readiness.watch(&own, 6, Edge::Ends).unwrap());
        let mut ready = Vec::new();
        let mut wait = || {
            readiness.wait(Some(Duration::ZERO), &mut ready).unwrap();
            ready.clone()
        };
        // Writable from the beginning, which is told of once somebody asks for it.
        assert!(wait().is_empty());
        readiness.watch_for(&own, 5, Edge::Both);
        assert_eq!((wait(), wait()), (vec![5], vec![]));
        other.write_all(&[1]).unwrap();
        assert_eq!((wait(), wait()), (vec![5], vec![]));
        other.write_all(&[2]).unwrap();
        drop(other);
        assert_eq!((wait(), wait()), (vec![5 | ENDED], vec![]));
    }

    #[test]
    fn a_file_cannot_be_watched_and_that_is_no_error() {
        assert!(!Readiness::new().unwrap().watch(tempfile::tempfile().unwrap(), 1, Edge::Level).unwrap());
    }

    #[test]
    fn a_worker_gives_back_what_it_owned() {
        let mut owned = vec![1];
        let worker = Worker::start("worker".into(), move || {
            owned.push(2);
            owned
        });
        assert_eq!(worker.unwrap().join().unwrap(), [1, 2]);
    }
}
