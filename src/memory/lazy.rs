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

use super::{Memory, Slot, Span};
use crate::error::{refuse, status};
use crate::event::{Edge, Readiness, Worker};
use crate::host::output::Bell;
use crate::host::say::say;
use crate::host::sys::userfault::{Fault, Guarded};

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

    /// For how long it is to be noted what is touched; none where nobody wants to know.
    fn notes(&self) -> Option<Duration>;

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
        let slots = memory.slots();
        for slot in &slots {
            guarded.register(slot.host as usize, slot.span.size as usize).context("watching RAM")?;
        }
        let (mut ahead, notes) = (source.ahead(), source.notes());
        ahead.reverse();
        let shared = Arc::new(Shared {
            source,
            noted: Mutex::new(notes.map(|_| Noted::default())),
            wish: AtomicU8::new(NOTHING),
            broken: OnceLock::new(),
            told: AtomicBool::new(false),
        });
        let wish = Bell::new().context("eventfd")?;
        let mut fetching = Fetching {
            guarded,
            slots,
            noted: notes.and_then(|notes| Instant::now().checked_add(notes)),
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
    slots: Vec<Slot>,
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
        let mut all = false;
        loop {
            while let Some(Fault::First(at) | Fault::Write(at)) = self.guarded.waiting() {
                let addr = self.slots.iter().find_map(|slot| slot.address(at));
                let part = addr.and_then(|addr| self.shared.source.part(addr));
                let part = part.context("somebody touched what is not RAM")?;
                self.fetch(part)?;
                self.shared.touched(part);
            }
            match self.shared.wish.load(Ordering::SeqCst) {
                ALL if !all => {
                    self.shared.note();
                    self.ahead = self.shared.source.parts();
                    all = true;
                }
                END => {
                    self.shared.note();
                    return Ok(());
                }
                _ => {}
            }
            // While nobody waits.
            if let Some(part) = self.ahead.pop() {
                self.fetch(part)?;
                continue;
            }
            if all {
                return Ok(());
            }
            let patience = self.noted.map(|until| until.saturating_duration_since(Instant::now()));
            readiness.wait(patience, &mut ready).context("epoll")?;
            if self.noted.take_if(|until| *until <= Instant::now()).is_some() {
                self.shared.note();
            }
        }
    }

    fn fetch(&mut self, part: Span) -> Result<()> {
        let mut slots = self.slots.iter();
        let Slot { span, host } = slots.find(|slot| slot.span.contains(&part)).context("it is not RAM")?;
        self.bytes.resize(part.size as usize, 0);
        self.shared.source.read(part, &mut self.bytes)?;
        self.guarded.put((host + (part.start - span.start)) as usize, &self.bytes).context("putting RAM in its place")
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
                crate::host::socket::remove_all();
                say(&format!("bantam: {why}"));
                crate::host::sys::exit_now(status::DIED);
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

#[cfg(test)]
mod tests {
    use super::*;

    const PART: u64 = 1 << 16;
    const PARTS: u64 = 400;

    /// Parts that hold their numbers, but for the last, which is zeroes; the order in which they were asked for.
    struct Numbers {
        asked: Mutex<Vec<u64>>,
        begun: Bell,
    }

    impl Source for Numbers {
        fn part(&self, addr: u64) -> Option<Span> {
            Span::new(addr / PART * PART, PART)
        }

        fn read(&self, part: Span, into: &mut [u8]) -> Result<()> {
            let (number, mut asked) = (part.start / PART, self.asked.lock().unwrap());
            asked.push(number);
            into.fill(if number == PARTS - 1 { 0 } else { number as u8 });
            if asked.len() == 3 {
                // Who touches the last comes now.
                self.begun.ring();
                std::thread::sleep(Duration::from_millis(100));
            }
            Ok(())
        }

        fn parts(&self) -> Vec<Span> {
            (0..PARTS - 1).filter_map(|number| self.part(number * PART)).collect()
        }

        fn ahead(&self) -> Vec<Span> {
            Vec::new()
        }

        fn notes(&self) -> Option<Duration> {
            None
        }

        fn note(&self, _parts: &[Span]) {}
    }

    /// Nobody waits for all of it who wants a part.
    #[test]
    fn a_guest_goes_on_while_all_of_its_ram_comes() {
        let span = Span { start: 0, size: PARTS * PART };
        let source = Arc::new(Numbers { asked: Mutex::default(), begun: Bell::new().unwrap() });
        let memory = match Memory::lazy(&[span], source.clone(), Bell::new().unwrap()) {
            Ok(memory) => memory,
            Err(e) => return crate::host::skipped(&format!("no userfaultfd here: {e}")),
        };
        let (guest, begun) = (memory.clone(), source.begun.clone());
        let thread = std::thread::spawn(move || {
            let (readiness, mut ready) = (Readiness::new().unwrap(), Vec::new());
            readiness.watch(&begun, 0, Edge::Level).unwrap();
            readiness.wait(None, &mut ready).unwrap();
            let mut byte = [9];
            guest.read((PARTS - 1) * PART, &mut byte).unwrap();
            byte
        });
        memory.settle();
        assert_eq!(thread.join().unwrap(), [0]);
        let asked = source.asked.lock().unwrap().clone();
        let at = asked.iter().position(|number| *number == PARTS - 1);
        assert!(at.is_some_and(|at| at < PARTS as usize / 2), "{asked:?}");
        assert_eq!(asked.len() as u64, PARTS);
        // It is RAM like any other.
        let mut byte = [0];
        memory.read(77 * PART, &mut byte).unwrap();
        assert_eq!((byte, memory.broken()), ([77], None));
        assert!(memory.freeze().is_ok());
    }
}
