//! RAM that comes as it is touched: whoever touches a part that is not there yet, guest or device or this program, waits until
//! a thread has put it there.
//!
//! Invariant: nobody sees a byte of a part that its source has not vouched for: who waits for one waits until the process
//! ends. The thread itself never touches RAM, or it would wait for itself.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Memory, Span};
use crate::error::{refuse, status};
use crate::event::{Edge, Readiness, Worker};
use crate::host::output::Bell;
use crate::host::say::say;
use crate::host::sys::userfault::{Fault, Guarded};

/// For how long it is noted what is touched, and how many parts at most.
const NOTED: Duration = Duration::from_secs(1);
const MOST: usize = 1 << 16;
/// How long whoever runs the machine has to end it, once a part of it turned out to be wrong.
const PATIENCE: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(10);

/// What is wanted of the thread.
const NOTHING: u8 = 0;
const ALL: u8 = 1;
const END: u8 = 2;

const WAITING: u64 = 0;
const WISH: u64 = 1;

/// Where RAM comes from.
pub trait Source: Send + Sync {
    /// The part that an address lies in: whole pages of one mapping.
    fn part(&self, addr: u64) -> Option<Span>;

    /// Reads a part into as many bytes.
    ///
    /// # Errors
    /// It is not what it should be, and nobody may see it.
    fn read(&self, part: Span, into: &mut [u8]) -> Result<()>;

    /// All parts that are not zeroes.
    fn parts(&self) -> Vec<Span>;

    /// What will be touched soon, first what will be first.
    fn ahead(&self) -> Vec<Span>;

    /// What was touched soon, in that order.
    fn note(&self, parts: &[Span]);
}

/// What the thread shares with the machine.
struct Shared {
    source: Arc<dyn Source>,
    /// None where it is known, or somebody has it.
    noted: Mutex<Option<Noted>>,
    wish: AtomicU8,
    /// Why nobody may see more of it.
    broken: OnceLock<String>,
    /// Whoever runs the machine knows.
    told: AtomicBool,
}

/// RAM that comes, until all of it is there or nobody needs it.
pub struct Lazy {
    shared: Arc<Shared>,
    wish: Bell,
    worker: Mutex<Option<Worker<()>>>,
}

impl Lazy {
    /// Has `memory`, which nobody has touched, come from a source; `bell` is rung if it cannot.
    ///
    /// # Errors
    /// The host has no userfaultfd for this user.
    pub fn start(memory: &Memory, source: Arc<dyn Source>, bell: Bell) -> Result<Self> {
        let guarded = Guarded::first().map_err(|e| {
            let hint = "`bantam check` shows what it takes (userfaultfd); `--verify once` needs nothing of the host";
            refuse(format!("cannot compare RAM when it is touched: {e}")).hint(hint)
        })?;
        let mut places = Vec::new();
        for (span, mapping) in memory.all.spans.iter().zip(&memory.all.mappings) {
            guarded.register(mapping.start().addr(), span.size as usize).context("watching RAM")?;
            places.push((*span, mapping.start().addr()));
        }
        let mut ahead = source.ahead();
        ahead.reverse();
        let shared = Arc::new(Shared {
            source,
            noted: Mutex::new(ahead.is_empty().then(Noted::default)),
            wish: AtomicU8::new(NOTHING),
            broken: OnceLock::new(),
            told: AtomicBool::new(false),
        });
        let wish = Bell::new().context("eventfd")?;
        let mut fetching = Fetching {
            guarded,
            places,
            noted: ahead.is_empty().then(|| Instant::now() + NOTED),
            ahead,
            bytes: Vec::new(),
            shared: shared.clone(),
            wish: wish.clone(),
        };
        let worker = Worker::start("ram".into(), move || {
            if let Err(e) = fetching.run() {
                fetching.fail(&format!("{e:#}"), &bell);
            }
        })?;
        Ok(Self { shared, wish, worker: Mutex::new(Some(worker)) })
    }

    /// Waits until all is there that is not zeroes; it is RAM like any other from then on.
    pub fn settle(&self) {
        self.wants(ALL);
    }

    /// The machine has ended: what it has touched so far is all.
    pub fn note(&self) {
        self.shared.note();
    }

    /// Why the machine must end, and nobody wait for its CPUs.
    pub fn broken(&self) -> Option<&str> {
        let broken = self.shared.broken.get()?;
        self.shared.told.store(true, Ordering::Relaxed);
        Some(broken)
    }

    fn wants(&self, wish: u8) {
        let mut worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(worker) = worker.take() {
            self.shared.wish.store(wish, Ordering::SeqCst);
            self.wish.ring();
            let _ = worker.join();
        }
    }
}

impl Drop for Lazy {
    fn drop(&mut self) {
        self.wants(END);
    }
}

/// What was touched, in order, and once each.
#[derive(Default)]
struct Noted {
    parts: Vec<Span>,
    once: HashSet<Span>,
}

impl Shared {
    fn noted(&self) -> MutexGuard<'_, Option<Noted>> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn touched(&self, part: Span) {
        if let Some(Noted { parts, once }) = &mut *self.noted()
            && parts.len() < MOST
            && once.insert(part)
        {
            parts.push(part);
        }
    }

    fn note(&self) {
        let noted = self.noted().take();
        if let Some(Noted { parts, .. }) = noted {
            self.source.note(&parts);
        }
    }
}

/// What the thread has.
struct Fetching {
    guarded: Guarded,
    /// Where the guest sees each mapping, and where it is in this process.
    places: Vec<(Span, usize)>,
    /// The last is the next.
    ahead: Vec<Span>,
    /// Until when it is noted what is touched; none where that is known.
    noted: Option<Instant>,
    bytes: Vec<u8>,
    shared: Arc<Shared>,
    wish: Bell,
}

impl Fetching {
    fn run(&mut self) -> Result<()> {
        let (readiness, mut ready) = (Readiness::new().context("epoll")?, Vec::new());
        readiness.watch(&self.guarded, WAITING, Edge::Level).context("epoll")?;
        readiness.watch(&self.wish, WISH, Edge::Level).context("epoll")?;
        loop {
            while let Some(Fault::First(at) | Fault::Write(at)) = self.guarded.waiting() {
                let part = self.address(at).and_then(|addr| self.shared.source.part(addr));
                let part = part.context("somebody touched what is not RAM")?;
                self.fetch(part)?;
                self.shared.touched(part);
            }
            match self.shared.wish.load(Ordering::SeqCst) {
                NOTHING => {}
                wish => {
                    self.shared.note();
                    return if wish == ALL { self.rest() } else { Ok(()) };
                }
            }
            // While nobody waits.
            if let Some(part) = self.ahead.pop() {
                self.fetch(part)?;
                continue;
            }
            let patience = self.noted.map(|until| until.saturating_duration_since(Instant::now()));
            readiness.wait(patience, &mut ready).context("epoll")?;
            if self.noted.take_if(|until| *until <= Instant::now()).is_some() {
                self.shared.note();
            }
        }
    }

    /// The guest's address of one in this process.
    fn address(&self, at: usize) -> Option<u64> {
        self.places.iter().find_map(|(span, start)| {
            let offset = at.checked_sub(*start)? as u64;
            (offset < span.size).then_some(span.start + offset)
        })
    }

    fn fetch(&mut self, part: Span) -> Result<()> {
        let mut places = self.places.iter();
        let (span, start) = places.find(|(span, _)| span.contains(&part)).context("it is not RAM")?;
        self.bytes.resize(part.size as usize, 0);
        self.shared.source.read(part, &mut self.bytes)?;
        self.guarded.put(start + (part.start - span.start) as usize, &self.bytes).context("putting RAM in its place")
    }

    fn rest(&mut self) -> Result<()> {
        self.shared.source.parts().into_iter().try_for_each(|part| self.fetch(part))
    }

    /// Nobody who waits goes on.
    fn fail(&self, why: &str, bell: &Bell) {
        let _ = self.shared.broken.set(why.to_owned());
        bell.ring();
        let end = Instant::now() + PATIENCE;
        while !self.shared.told.load(Ordering::Relaxed) {
            // Whoever would hear of it waits itself.
            if Instant::now() >= end {
                crate::host::terminal::restore();
                say(&format!("bantam: {why}"));
                std::process::exit(status::DIED.into());
            }
            std::thread::sleep(LOOK);
        }
        loop {
            std::thread::park();
        }
    }
}

impl Memory {
    /// Makes RAM for `spans`, as [`Memory::new`] does, that comes from `source` as it is touched; `bell` is rung where it
    /// cannot: see [`Memory::broken`].
    ///
    /// # Errors
    /// The host cannot make that much, or has no userfaultfd for this user.
    pub fn lazy(spans: &[Span], source: Arc<dyn Source>, bell: Bell) -> Result<Self> {
        let memory = Self::new(spans, false)?;
        let lazy = Lazy::start(&memory, source, bell)?;
        let _ = memory.all.lazy.set(lazy);
        Ok(memory)
    }

    /// Why the machine must end, and nobody may wait for its CPUs, which may wait for RAM: it is not what it should be.
    pub fn broken(&self) -> Option<&str> {
        self.all.lazy.get()?.broken()
    }

    /// Has what was touched so far noted for machines that begin as this one did, where that is not known already.
    pub fn note_touched(&self) {
        if let Some(lazy) = self.all.lazy.get() {
            lazy.note();
        }
    }

    /// Waits until all RAM is there.
    pub(super) fn settle(&self) {
        if let Some(lazy) = self.all.lazy.get() {
            lazy.settle();
        }
    }
}
