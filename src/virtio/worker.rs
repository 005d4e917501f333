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
use rustix::fd::AsFd;
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

    /// Serves the device, for each that wakes it; `track`: as somebody wants to see it, with its number.
    fn serve(&mut self, wakes: impl Iterator<Item = Wake>, track: Option<(&Track, u32)>) {
        self.active.queues.iter_mut().for_each(super::Queue::refill);
        for wake in wakes {
            let begun = track.map(|_| now());
            self.device.service(wake, &mut self.active);
            if let Some(((track, id), begun)) = track.zip(begun) {
                track.served((self.device.kind().name, id), woken(wake), begun);
            }
        }
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

/// What woke a device, in words.
fn woken(wake: Wake) -> (&'static str, Option<usize>) {
    match wake {
        Wake::Start => ("start", None),
        Wake::Queue(queue) => ("queue", Some(queue)),
        Wake::Source(source) | Wake::Ended(source) => ("source", Some(source)),
    }
}

type Job = Box<dyn FnOnce(&mut Devices) + Send>;

/// The devices at work, each by the number of its transport.
pub struct Devices {
    lent: BTreeMap<u32, Lent>,
    readiness: Arc<Readiness>,
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

/// The device that a token is of.
fn device(token: u64) -> u32 {
    ((token & !ENDED) >> 32) as u32
}

/// What a token says to its device.
fn wake(token: u64) -> Wake {
    let index = (token & (SOURCE - 1)) as usize;
    match (token & SOURCE, token & ENDED) {
        (0, _) => Wake::Queue(index),
        (_, 0) => Wake::Source(index),
        _ => Wake::Ended(index),
    }
}

/// Has descriptors of one device watched, besides those that it always has.
#[derive(Clone)]
pub struct Watcher {
    readiness: Arc<Readiness>,
    id: u32,
}

impl Watcher {
    /// For those who run a device without the thread.
    ///
    /// # Errors
    /// The host has no descriptor left.
    #[doc(hidden)]
    pub fn alone() -> std::io::Result<Self> {
        Ok(Self { readiness: Arc::new(Readiness::new()?), id: 0 })
    }

    /// Wakes the device when there is something to be read, or the other end closes, with this number, as long as `fd` is
    /// open; false where the host has no memory for it. Numbers are below 2^31, and not those of the device's own sources,
    /// which are counted from 0. What happens while the device is at work for nobody is lost.
    pub fn watch(&self, fd: impl AsFd, source: u32) -> bool {
        self.readiness.watch(fd, self.token(source), Edge::Ends).is_ok()
    }

    /// The same also when there is room for something to be written.
    pub fn watch_room(&self, fd: impl AsFd, source: u32) {
        self.readiness.watch_for(fd, self.token(source), Edge::Both);
    }

    fn token(&self, source: u32) -> u64 {
        token(self.id, source as usize) | SOURCE
    }

    /// For the same: what there is to wake the device for.
    #[doc(hidden)]
    pub fn look(&self) -> Vec<Wake> {
        let mut ready = Vec::new();
        let _ = self.readiness.wait(Some(Duration::ZERO), &mut ready);
        ready.into_iter().map(wake).collect()
    }
}

impl Devices {
    /// Takes a device to work, which it begins when the thread runs.
    ///
    /// # Errors
    /// One of its descriptors cannot be waited for; it is at work nevertheless.
    pub fn start(&mut self, id: u32, mut lent: Lent) -> Result<()> {
        lent.active.watcher = Some(Watcher { readiness: self.readiness.clone(), id });
        let watched = self.watch(id, &lent);
        self.lent.insert(id, lent);
        if self.running {
            self.serve(id, [Wake::Start]);
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
            self.readiness.watch(fd, token(id, source) | SOURCE, Edge::Both)?;
        }
        Ok(())
    }

    /// Serves a device, and listens to what it has now.
    fn serve(&mut self, id: u32, wakes: impl IntoIterator<Item = Wake>) {
        let Some(lent) = self.lent.get_mut(&id) else { return };
        lent.serve(wakes.into_iter(), self.track.as_ref().map(|track| (track, id)));
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
        all.into_iter().for_each(|id| self.serve(id, [Wake::Start]));
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
        ready.retain(|token| *token != BELL);
        // A driver hears of all that its device does in one turn together.
        ready.sort_unstable_by_key(|token| device(*token));
        for tokens in ready.chunk_by(|one, other| device(*one) == device(*other)) {
            let id = tokens.first().copied().map(device).unwrap_or_default();
            self.serve(id, tokens.iter().copied().map(wake));
        }
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
        let readiness = Arc::new(Readiness::new().context("epoll for virtio")?);
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
