//! Where a device is at work: in the hands of its driver, or on the thread `virtio` as in a machine.
//!
//! Invariant: the driver's own system calls are counted, so that they can be told from the device's.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use bantam::virtio::worker::{Bench, Lent, Watcher, Working};
use bantam::virtio::{Active, Queue, VirtioDevice, Wake, feature};
use vmm_sys_util::eventfd::EventFd;

use crate::driver::{Driver, Line, ram};

/// A device at work.
pub struct Stage {
    pub drivers: Vec<Driver>,
    line: Arc<Line>,
    place: Place,
    pub kicks: u64,
    /// System calls of the driver, and of what stands for the rest of the world.
    pub calls: u64,
    /// The number of the device's descriptor that the world is at.
    pub source: usize,
}

enum Place {
    /// Called by the driver: nobody else runs, and no doorbell is needed.
    Alone(Box<dyn VirtioDevice>, Active),
    /// On its thread.
    Thread { bells: Vec<Arc<EventFd>>, interrupt: Arc<EventFd>, _working: Working },
}

impl Stage {
    /// Starts a device; `thread`: on its thread.
    pub fn new(device: Box<dyn VirtioDevice>, thread: bool) -> Result<Self> {
        let count = device.kind().queues.len();
        let memory = ram(count as u64)?;
        let drivers = (0..count as u64).map(|n| Driver::new(&memory, n)).collect::<Result<Vec<_>>>()?;
        // A guest's CPU would wait until it is interrupted; so does who reads this.
        let interrupt = if thread { Some(Arc::new(EventFd::new(0)?)) } else { None };
        let line = Arc::new(Line { count: AtomicU64::new(0), bell: interrupt.clone() });
        let queues = drivers.iter().map(|driver| driver.queue(line.clone())).collect();
        let ours = feature::EVENT_IDX | feature::INDIRECT_DESC | feature::VERSION_1;
        let mut active = Active::new(queues, device.features() | ours);
        active.watcher = Some(Watcher::alone()?);
        let place = match interrupt {
            None => Place::Alone(device, active),
            Some(interrupt) => {
                let bell = || Ok(Arc::new(EventFd::new(libc::EFD_NONBLOCK)?));
                let bells = (0..count).map(|_| bell()).collect::<Result<Vec<_>>>()?;
                let lent = Lent { device, active, doorbells: bells.clone(), changed: Box::new(|_, _| {}) };
                let bench = Bench::new()?;
                bench.with(|devices| devices.start(0, lent)).context("the bench is gone")??;
                Place::Thread { bells, interrupt, _working: bench.start()? }
            }
        };
        let mut stage = Self { drivers, line, place, kicks: 0, calls: 0, source: 0 };
        stage.wake(Wake::Start);
        Ok(stage)
    }

    pub fn interrupts(&self) -> u64 {
        self.line.count.load(Ordering::Relaxed)
    }

    fn wake(&mut self, mut wake: Wake) {
        let Place::Alone(device, active) = &mut self.place else { return };
        loop {
            active.queues.iter_mut().for_each(Queue::refill);
            device.service(wake, active);
            active.queues.iter_mut().for_each(Queue::tell);
            match active.queues.iter().position(Queue::is_starved) {
                Some(queue) => wake = Wake::Queue(queue),
                None => return,
            }
        }
    }

    /// Tells the device of what was made available in a queue, if it wants to know.
    pub fn kick(&mut self, queue: usize) {
        if !self.drivers.get_mut(queue).is_some_and(Driver::must_notify) {
            return;
        }
        self.kicks += 1;
        if let Place::Thread { bells, .. } = &self.place {
            self.calls += 1;
            let _ = bells.get(queue).map(|bell| bell.write(1));
        } else {
            self.wake(Wake::Queue(queue));
        }
    }

    /// Lets the device look at what the world has for it: at one descriptor, since it has no other that matters. On its
    /// thread it does so by itself.
    pub fn look(&mut self) {
        self.wake(Wake::Source(self.source));
    }

    /// Waits for an interrupt, unless something has come back meanwhile.
    pub fn wait(&mut self) {
        let quiet = self.drivers.iter().all(Driver::listen);
        match &self.place {
            Place::Alone(..) => self.look(),
            Place::Thread { interrupt, .. } if quiet => {
                self.calls += 1;
                let _ = interrupt.read();
            }
            Place::Thread { .. } => {}
        }
    }

    /// Waits as [`Stage::wait`] does, or until the other end of a socket has or takes something.
    pub fn wait_or(&mut self, socket: &impl std::os::fd::AsRawFd, events: i16) {
        let quiet = self.drivers.iter().all(Driver::listen);
        let Place::Thread { interrupt, .. } = &self.place else { return self.look() };
        if !quiet {
            return;
        }
        use std::os::fd::AsRawFd as _;
        let fd = |fd, events| libc::pollfd { fd, events, revents: 0 };
        let mut fds = [fd(interrupt.as_raw_fd(), libc::POLLIN), fd(socket.as_raw_fd(), events)];
        self.calls += 1;
        // SAFETY: two structures, which live as long as the call.
        #[allow(unsafe_code)]
        unsafe {
            libc::poll(fds.as_mut_ptr(), 2, 1000);
        }
        let [first, _] = fds;
        if first.revents != 0 {
            self.calls += 1;
            let _ = interrupt.read();
        }
    }
}
