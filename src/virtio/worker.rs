//! The thread that all virtio devices of a machine share, and the place where they are while it does not run.
//!
//! Transports reach a device through [`Bench::with`]: on the thread while that runs, else on the spot. Invariant: the
//! devices at work belong to the thread while it runs, and to the bench while it does not; the lock of the bench is held
//! only to see which, or while there is no thread. A device does nothing while no thread runs: a machine that was restored
//! or paused changes nothing in RAM.

use std::collections::BTreeMap;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vmm_sys_util::eventfd::EventFd;

use super::{Active, VirtioDevice, Wake};
use crate::event::{ENDED, Edge, Readiness, Worker};
use crate::host::sys::{eventfd, fd_of};
use crate::trace::{Track, now};

/// The name of the thread.
pub const NAME: &str = "virtio";

/// What a transport lends while the driver of its device is at work.
pub struct Lent {
    /// The device.
    pub device: Box<dyn VirtioDevice>,
    /// Its queues.
    pub active: Active,
    /// One for each queue: the driver's notifications.
    pub doorbells: Vec<Arc<EventFd>>,
    /// Told when the device's space has changed, or when a queue broke (true).
    pub changed: Changed,
}

/// What a transport does when it is told.
pub type Changed = Box<dyn FnMut(&[u8], bool) + Send>;

impl Lent {
    /// Waits for what is in flight, as long as the device does.
    pub fn settle(&mut self) {
        self.device.drain(&mut self.active);
        self.active.queues.iter_mut().for_each(super::Queue::tell);
    }

    fn serve(&mut self, wake: Wake) {
        self.active.queues.iter_mut().for_each(super::Queue::refill);
        self.device.service(wake, &mut self.active);
        let mut broken = false;
        for (queue, bell) in self.active.queues.iter_mut().zip(&self.doorbells) {
            queue.tell();
            broken |= queue.is_broken();
            if queue.is_starved() {
                // Others first.
                let _ = bell.write(1);
            }
        }
        if broken || std::mem::take(&mut self.active.space_changed) {
            (self.changed)(&self.device.space(), broken);
        }
    }
}

/// Serves device `id`. Where nobody wants to see it, that costs one branch each time that it is woken.
fn serve(track: Option<&Track>, id: u32, lent: &mut Lent, wake: Wake) {
    let Some(track) = track else { return lent.serve(wake) };
    let begun = now();
    lent.serve(wake);
    let woken = match wake {
        Wake::Start => ("start", None),
        Wake::Queue(queue) => ("queue", Some(queue)),
        Wake::Source(source) | Wake::Ended(source) => ("source", Some(source)),
    };
    track.served((lent.device.kind().name, id), woken, begun);
}

type Job = Box<dyn FnOnce(&mut Devices) + Send>;

/// The devices at work, each by the number of its transport.
pub struct Devices {
    lent: BTreeMap<u32, Lent>,
    readiness: Readiness,
    /// Devices may do something.
    running: bool,
    /// Where each service is noted, if somebody wants to see it.
    track: Option<Track>,
}

/// A descriptor's token: the device's number, which is small, then whether it is a queue's, then which.
const SOURCE: u64 = 1 << 31;
const BELL: u64 = u64::MAX;

fn token(id: u32, queue: usize) -> u64 {
    u64::from(id) << 32 | queue as u64
}

impl Devices {
    /// Takes a device to work, which it begins when the thread runs.
    ///
    /// # Errors
    /// One of its descriptors cannot be waited for; it is at work nevertheless.
    pub fn start(&mut self, id: u32, lent: Lent) -> Result<()> {
        let watched = self.watch(id, &lent);
        self.lent.insert(id, lent);
        if self.running {
            self.serve(id, Wake::Start);
        }
        watched
    }

    fn watch(&self, id: u32, lent: &Lent) -> Result<()> {
        for (queue, bell) in lent.doorbells.iter().enumerate() {
            // What is still in it is the last driver's, or was said before the machine stopped: the start covers it.
            let _ = bell.read();
            self.readiness.watch(fd_of(bell), token(id, queue), Edge::Edge)?;
        }
        self.watch_sources(id, lent)
    }

    fn watch_sources(&self, id: u32, lent: &Lent) -> Result<()> {
        for (source, fd) in lent.device.sources().into_iter().enumerate() {
            self.readiness.watch(fd, token(id, source) | SOURCE, Edge::Ends)?;
        }
        Ok(())
    }

    /// Serves a device, and listens to what it has now.
    fn serve(&mut self, id: u32, wake: Wake) {
        let Some(lent) = self.lent.get_mut(&id) else { return };
        serve(self.track.as_ref(), id, lent, wake);
        if std::mem::take(&mut lent.active.sources_changed)
            && let Some(lent) = self.lent.get(&id)
        {
            // Where there is no memory for it, the device hears nothing; its driver's notifications wake it still.
            let _ = self.watch_sources(id, lent);
        }
    }

    /// Lets all devices begin, or go on.
    fn go_on(&mut self) {
        self.running = true;
        let all: Vec<_> = self.lent.keys().copied().collect();
        all.into_iter().for_each(|id| self.serve(id, Wake::Start));
    }

    /// Tells all devices that their machine is another one now.
    pub fn renew(&mut self) {
        self.lent.values_mut().for_each(|lent| lent.active.moved = true);
    }

    /// Waits for something to do, and does it.
    fn turn(&mut self, patience: Option<Duration>, ready: &mut Vec<u64>) {
        // A host that refuses to wait is out of memory for good; the devices stand still and the machine does not.
        if self.readiness.wait(patience, ready).is_err() {
            ready.clear();
        }
        ready.drain(..).filter(|token| *token != BELL).for_each(|token| self.wake(token));
    }

    /// Gives a device back, with what is in flight: [`Lent::settle`] is due, for which not all devices are to wait.
    pub fn stop(&mut self, id: u32) -> Option<Lent> {
        let lent = self.lent.remove(&id)?;
        lent.doorbells.iter().for_each(|bell| self.readiness.forget(fd_of(bell)));
        lent.device.sources().into_iter().for_each(|fd| self.readiness.forget(fd));
        Some(lent)
    }

    /// A device at work.
    pub fn get(&mut self, id: u32) -> Option<&mut Lent> {
        self.lent.get_mut(&id)
    }

    fn wake(&mut self, token: u64) {
        let index = (token & (SOURCE - 1)) as usize;
        let wake = match (token & SOURCE, token & ENDED) {
            (0, _) => Wake::Queue(index),
            (_, 0) => Wake::Source(index),
            _ => Wake::Ended(index),
        };
        if let Ok(id) = u32::try_from((token & !ENDED) >> 32) {
            self.serve(id, wake);
        }
    }
}

struct Inner {
    /// Here while no thread runs.
    parked: Option<Devices>,
    jobs: Vec<Job>,
    stop: bool,
}

struct Shared {
    inner: Mutex<Inner>,
    bell: EventFd,
}

/// Where devices work. Clones are the same.
#[derive(Clone)]
pub struct Bench(Arc<Shared>);

impl Bench {
    /// No device, no thread.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new() -> Result<Self> {
        let bell = eventfd().context("eventfd for virtio")?;
        let readiness = Readiness::new().context("epoll for virtio")?;
        readiness.watch(fd_of(&bell), BELL, Edge::Edge)?;
        let parked = Some(Devices { lent: BTreeMap::new(), readiness, running: false, track: None });
        Ok(Self(Arc::new(Shared { inner: Mutex::new(Inner { parked, jobs: Vec::new(), stop: false }), bell })))
    }

    /// Does something with the devices at work, and waits for it.
    pub fn with<R: Send + 'static>(&self, job: impl FnOnce(&mut Devices) -> R + Send + 'static) -> Option<R> {
        let mut inner = self.0.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(devices) = &mut inner.parked {
            return Some(job(devices));
        }
        let (sender, receiver) = sync_channel(1);
        inner.jobs.push(Box::new(move |devices| {
            let _ = sender.send(job(devices));
        }));
        drop(inner);
        let _ = self.0.bell.write(1);
        receiver.recv().ok()
    }

    /// Notes each service from now on.
    pub fn note(&self, track: Track) {
        self.with(|devices| devices.track = Some(track));
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// The host has no thread left; then the devices stay here.
    pub fn start(&self) -> Result<Working> {
        let mut inner = self.0.inner.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(inner.parked.is_some(), "the virtio devices are at work already");
        inner.stop = false;
        let bench = self.clone();
        // It takes them as soon as the lock is free.
        let worker = Worker::start(NAME.into(), move || bench.run())?;
        Ok(Working { bench: self.clone(), worker: Some(worker) })
    }

    fn run(&self) {
        let parked = self.0.inner.lock().unwrap_or_else(PoisonError::into_inner).parked.take();
        let Some(mut devices) = parked else { return };
        devices.go_on();
        let mut ready = Vec::new();
        loop {
            devices.turn(None, &mut ready);
            let (jobs, stop) = {
                let mut inner = self.0.inner.lock().unwrap_or_else(PoisonError::into_inner);
                (std::mem::take(&mut inner.jobs), inner.stop)
            };
            for job in jobs {
                job(&mut devices);
            }
            if stop {
                let mut inner = self.0.inner.lock().unwrap_or_else(PoisonError::into_inner);
                for job in std::mem::take(&mut inner.jobs) {
                    job(&mut devices);
                }
                devices.running = false;
                inner.parked = Some(devices);
                return;
            }
        }
    }

    /// What the thread does in one turn, where there is none: for tests.
    #[doc(hidden)]
    pub fn turn(&self) {
        self.with(|devices| {
            if !devices.running {
                devices.go_on();
            }
            devices.turn(Some(Duration::ZERO), &mut Vec::new());
        });
    }
}

/// The thread, while it runs; dropped, it stops.
pub struct Working {
    bench: Bench,
    worker: Option<Worker<()>>,
}

impl Drop for Working {
    fn drop(&mut self) {
        self.bench.0.inner.lock().unwrap_or_else(PoisonError::into_inner).stop = true;
        let _ = self.bench.0.bell.write(1);
        if let Some(worker) = self.worker.take() {
            // It does not fail: a panic ends the process.
            let _ = worker.join();
        }
    }
}
