//! A snapshot that is written while its machine goes on.
//!
//! A thread watches RAM; once it does, the CPUs stop for a moment, in which it is given what the machine holds besides, and
//! writes all that from then on. Invariant: whoever asked for it gets one answer, once it is complete, or has failed, or the
//! machine has ended.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::control::Answer;
use crate::event::Worker;
use crate::host::output::Bell;
use crate::memory::Memory;
use crate::snapshot::{Base, Taken, Target, Watched, Written};

/// How long a machine that has ended waits for who writes, and how often it looks.
const PATIENCE: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(1);

/// What the two threads share.
#[derive(Default)]
struct Shared {
    /// RAM is watched.
    watched: AtomicBool,
    /// The machine that stands still for it may go on.
    frozen: AtomicBool,
    /// Why it stands still until all is written, if it does.
    still: OnceLock<String>,
    outcome: OnceLock<Result<Written, String>>,
    cancelled: AtomicBool,
}

/// Such a snapshot.
pub struct Writing {
    worker: Option<Worker<()>>,
    shared: Arc<Shared>,
    /// Somebody is to keep it.
    keep: bool,
    /// Rung when the moment has come.
    now: Bell,
    /// Rung for whoever is to ask for the outcome.
    bell: Bell,
    taken: Sender<Taken>,
    /// The machine was asked to stop for it.
    asked: bool,
    stood: Stood,
}

/// How long a machine stood still for it.
#[derive(Debug, Clone, Copy)]
enum Stood {
    /// It did not yet.
    Not,
    /// It does, since then.
    Since(Instant),
    /// It did.
    For(Duration),
}

/// What the thread has.
struct Watcher {
    shared: Arc<Shared>,
    target: Target,
    /// What it is a difference from, if it is one.
    base: Option<Base>,
    memory: Memory,
    now: Bell,
    taken: Receiver<Taken>,
    bell: Bell,
}

impl Watcher {
    fn run(self) {
        let watched = Watched::new(&self.memory);
        self.shared.watched.store(true, Ordering::SeqCst);
        self.bell.ring();
        let written = self.write(watched).map_err(|e| format!("{e:#}"));
        let _ = self.shared.outcome.set(written);
        self.goes_on();
    }

    /// The machine may.
    fn goes_on(&self) {
        self.shared.frozen.store(true, Ordering::SeqCst);
        self.bell.ring();
    }

    fn write(&self, mut watched: Watched) -> Result<Written> {
        watched.watch(&self.now).context("watching RAM")?;
        // Nobody gives anything where it is cancelled.
        let mut taken = self.taken.try_recv().map_err(|_| anyhow!("the machine has ended"))?;
        taken.copy_disks(&self.target, &self.shared.cancelled)?;
        let (moment, still) = watched.freeze().context("freezing RAM")?;
        match still {
            Some(why) => drop(self.shared.still.set(why)),
            None => self.goes_on(),
        }
        taken.write(moment.since(self.base.clone()), &self.target, &self.shared.cancelled)
    }
}

impl Writing {
    /// Begins to watch RAM; `bell` is rung whenever there is news. With a `base` only what has changed since is written.
    ///
    /// # Errors
    /// The host has no thread or descriptor left.
    pub fn start(memory: &Memory, target: Target, base: Option<Base>, bell: Bell) -> Result<Self> {
        let (shared, now) = (Arc::<Shared>::default(), Bell::new().context("eventfd")?);
        let ((taken, takes), keep) = (channel(), target.keep);
        let watcher = Watcher {
            shared: shared.clone(),
            target,
            base,
            memory: memory.clone(),
            now: now.clone(),
            taken: takes,
            bell: bell.clone(),
        };
        let worker = Some(Worker::start("snapshot".into(), move || watcher.run())?);
        Ok(Self { worker, shared, keep, now, bell, taken, asked: false, stood: Stood::Not })
    }

    /// The machine is to stop for a moment: true once.
    pub fn wants_the_machine(&mut self) -> bool {
        let wants = !self.asked && self.shared.watched.load(Ordering::SeqCst);
        self.asked |= wants;
        wants
    }

    /// What the machine is, which stands still since it was asked to, and does as long as this [`Writing::holds`] it.
    pub fn take(&mut self, taken: Result<Taken>, since: Instant) {
        self.stood = Stood::Since(since);
        match taken {
            // Where the thread has ended, the host has failed it; its outcome says how.
            Ok(taken) => drop(self.taken.send(taken)),
            Err(why) => drop(self.shared.outcome.set(Err(format!("{why:#}")))),
        }
        self.now.ring();
    }

    /// It comes to nothing, unless it is complete.
    pub fn give_up(&self) {
        self.shared.cancelled.store(true, Ordering::Relaxed);
    }

    /// The machine is to stand still.
    pub fn holds(&self) -> bool {
        self.asked && !self.shared.frozen.load(Ordering::SeqCst)
    }

    /// The machine goes on, or stands still for something else.
    pub fn goes_on(&mut self) {
        if let Stood::Since(begun) = self.stood {
            self.stood = Stood::For(begun.elapsed());
            // It may have been known before.
            self.bell.ring();
        }
    }

    /// What became of it, once that is known and the machine goes on.
    pub fn outcome(&self) -> Option<Answer> {
        let Stood::For(stood) = self.stood else { return None };
        let outcome = self.shared.outcome.get()?.clone();
        Some(outcome.map(|Written { memory, .. }| {
            serde_json::json!({ "memory": memory, "seconds": stood.as_secs_f64(), "copied": self.shared.still.get() }).to_string()
        }))
    }

    /// What a later one can be a difference from, once this is complete; not where nobody was to keep it.
    pub fn kept(&self) -> Option<Base> {
        let written = self.shared.outcome.get()?.as_ref().ok()?;
        self.keep.then(|| written.base.clone())
    }

    /// Nobody waits for it any more, unless it is complete: that gives what became of it.
    pub fn end(&mut self) -> Answer {
        self.goes_on();
        self.stop();
        let complete = self.outcome().filter(Result::is_ok);
        complete.unwrap_or_else(|| Err("the machine has ended".into()))
    }

    fn stop(&mut self) {
        self.give_up();
        self.now.ring();
        let Some(worker) = self.worker.take() else { return };
        let end = Instant::now() + PATIENCE;
        while !worker.has_ended() && Instant::now() < end {
            std::thread::sleep(LOOK);
        }
        // One that waits for a disk that does not answer is left to it; it comes to nothing.
        if worker.has_ended() {
            let _ = worker.join();
        }
    }
}

impl Drop for Writing {
    /// Nothing is left of one that is not complete.
    fn drop(&mut self) {
        self.stop();
    }
}
